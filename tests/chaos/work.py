"""The handlers that chaos.py's workers run. Each execution is noted in a file of its own process, which outlives a kill -9."""
from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg

import orchestrator
from orchestrator import Handler, Task

FOLDER = Path(os.environ.get("CHAOS_FOLDER", "."))
_file = os.open(FOLDER / f"executions-{os.getpid()}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

_steps = os.open(FOLDER / f"steps-{os.getpid()}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


def note(kind: str, task: Task) -> None:
    """begin | end | error, task, claim, attempt, worker, when: the monotonic clock is one for the whole machine."""
    os.write(_file, f"{kind} {task.id} {task.claim_id} {task.attempt} {task.worker_id} {time.monotonic()}\n".encode())


def noted(function: Callable[[Task], Any]) -> Callable[[Task], Any]:
    def run(task: Task) -> Any:
        note("begin", task)
        try:
            result = function(task)
        except BaseException:
            note("error", task)
            raise
        note("end", task)
        return result
    return run


def work(task: Task) -> None:
    time.sleep(task.payload.get("seconds", 0))
    if task.attempt <= task.payload.get("fail", 0):
        raise RuntimeError("fails on purpose")


def wait(task: Task) -> None:
    """Lasts as long as it may: `seconds`, or until it is asked to stop."""
    if task.cancelled.wait(task.payload["seconds"]):
        raise orchestrator.Cancelled


def fulfil(task: Task) -> list[Any]:
    """Three steps, the second of which writes in its own transaction, and a signal in between."""
    def step(name: str) -> str:
        os.write(_steps, f"{task.id} {task.claim_id} {name}\n".encode())
        time.sleep(task.payload["seconds"])
        return f"{name} of claim {task.claim_id}"

    def charge(connection: psycopg.Connection[Any]) -> str:
        connection.execute("insert into chaos.charges values (%s, %s)", [task.id, task.claim_id])
        return step("charge")
    results = [task.step("check", lambda: step("check")), task.step("charge", charge, transaction=True)]
    answer = task.signal("approved", timeout=600)
    return [*results, answer, task.step("ship", lambda: step("ship"))]


def deaf(task: Task) -> None:
    """Does not listen when asked to stop, and has a child."""
    subprocess.run(["sleep", str(task.payload["seconds"])], check=False)


def abort(task: Task) -> None:
    os.abort()


def exhaust_memory(task: Task) -> None:
    """Takes memory until there is no more, as a limit of a container would see it: then the kernel kills the process."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
    hoard = []
    try:
        while True:
            hoard.append(bytearray(4 << 20))
    except MemoryError:
        os.kill(os.getpid(), signal.SIGKILL)


def raise_memory_error(task: Task) -> None:
    """Takes memory until an allocation fails, holds it for a moment while the worker's other threads starve, and fails."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20), before[1]))
    hoard = []
    size = 4 << 20
    try:
        while True:
            try:
                hoard.append(bytearray(size))
            except MemoryError:
                if size <= 4096:
                    break
                size //= 4
        time.sleep(0.05)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        hoard.clear()
    raise MemoryError("fails on purpose")


def hold_gil(task: Task) -> None:
    """Stops every thread of the process: a C call that does not release the interpreter's lock."""
    ctypes.PyDLL(None).usleep(int(task.payload["seconds"] * 1e6))


POLICY = {"max_retries": 10, "base_delay": 0.2, "max_delay": 1}
HANDLERS = {
    "work": Handler(noted(work), **POLICY),
    "wait": Handler(noted(wait), **POLICY),
    "fulfil": Handler(noted(fulfil), **POLICY),
    "deaf": Handler(noted(deaf), **POLICY),
    "gil": Handler(noted(hold_gil), **POLICY),
    "abort": Handler(noted(abort), max_retries=2, base_delay=0.1, max_delay=0.5),
    "exhaust": Handler(noted(exhaust_memory), max_retries=2, base_delay=0.1, max_delay=0.5),
    "memory": Handler(noted(raise_memory_error), max_retries=2, base_delay=0.1, max_delay=0.5),
}
