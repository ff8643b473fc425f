"""The Process helper of handlers.py, with real children; and what the other tests of handlers share."""
from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest

import handlers
from handlers import Process, minimal_environment
from orchestrator import Cancelled, Task
from postgres import eventually

NEVER = threading.Event()


@dataclass
class StandInTask:
    """What a handler sees of a Task, without a worker or a database."""

    payload: Any = field(default_factory=dict)
    type: str = "test"
    attempt: int = 1
    max_retries: int = 3
    priority: int = 0
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    created_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    deadline: float | None = None
    worker_id: str = "test"
    cancelled: threading.Event = field(default_factory=threading.Event)
    cancel_reason: str | None = None
    reports: list[Any] = field(default_factory=list)

    def progress(self, value: object) -> None:
        self.reports.append(value)

    def raise_if_cancelled(self) -> None:
        if self.cancelled.is_set():
            raise Cancelled(self.cancel_reason)

    def sleep(self, seconds: float) -> None:
        self.cancelled.wait(seconds)
        self.raise_if_cancelled()

    def cancel(self, reason: str = "cancelled") -> None:
        self.cancel_reason = reason
        self.cancelled.set()


def in_thread(handler: Callable[[Task], Any], task: StandInTask) -> Future[Any]:
    """Run a handler as the pool does, beside the test, which it doesn't keep from ending."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(call(handler, task))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def call(handler: Callable[[Task], Any], task: StandInTask) -> Any:
    return handler(cast(Task, task))


def alive_in_group(group: int) -> list[int]:
    """The processes of a group, without zombies, which only wait for init."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _parent, process_group = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(process_group) == group and state not in "ZX":
            found.append(int(stat.parent.name))
    return found


def python(code: str, *args: str) -> list[str]:
    return [sys.executable, "-c", code, *args]


@pytest.fixture
def start() -> Iterator[Callable[..., Process]]:
    """Start a Process with the minimal environment; closed at the end of the test."""
    started: list[Process] = []

    def process(args: list[str], **options: Any) -> Process:
        started.append(Process(args, env=minimal_environment(), **options))
        return started[-1]

    yield process
    for one in started:
        one.close(0)


def finish(process: Process) -> str:
    assert process.wait(NEVER, 20)
    process.close()
    return process.tail()


def test_arguments_reach_the_child_as_they_are(start, tmp_path):
    words = ["$(touch made)", "; touch made", "`touch made`", "a b", "*", "-rf", "'", '"']
    output = finish(start(python("import sys; print(*sys.argv[1:], sep='\\n')", *words), cwd=str(tmp_path)))
    assert output.split("\n") == words
    assert list(tmp_path.iterdir()) == []


def test_child_has_a_closed_stdin_and_a_session_of_its_own(start):
    source, target = os.pipe()
    os.write(target, b"typed at the worker's terminal")
    os.close(target)
    stdin = os.dup(0)
    os.dup2(source, 0)
    try:
        process = start(python("import os, sys; print(repr(sys.stdin.read()), os.getsid(0), os.getpgid(0))"))
        assert finish(process) == f"'' {process.pid} {process.pid}"
    finally:
        os.dup2(stdin, 0)
        os.close(stdin)
        os.close(source)


def test_child_sees_nothing_of_the_workers_environment_beside_the_minimum(start, monkeypatch):
    for name in ("DATABASE_URL", "ADMIN_TOKEN", "BACKUP_PASSWORD", "PGPASSWORD", "LD_PRELOAD", "PYTHONPATH"):
        monkeypatch.setenv(name, "canary")
    output = finish(start(python("import os; print(*os.environ, *os.environ.values())")))
    assert "PATH" in output.split()
    assert "canary" not in output


def test_child_inherits_no_descriptor(start):
    with open(__file__) as file:
        os.set_inheritable(file.fileno(), True)
        output = finish(start(python("import os; print(*os.listdir('/proc/self/fd'))")))
    assert set(output.split()) == {"0", "1", "2", "3"}  # 3 is that directory


def test_output_is_read_to_the_end_and_kept_in_bounds(start):
    process = start(python("[print('line', n) for n in range(200_000)]; print('x' * 20_000_000); print('end')"))
    output = finish(process)
    assert process.status == 0
    assert output.endswith("x\nend")
    assert len(output) <= 1500
    assert sum(map(len, process._lines)) <= 100 * handlers.LINE_BYTES


def test_output_is_text_that_a_database_can_store(start):
    code = r"import os; os.write(1, b'\x1b[31mred\x1b[0m \xff\x00\x07 \x1b[?25h end\r\n')"
    assert finish(start(python(code))) == "red \ufffd  end"


def test_status_is_the_exit_code_or_the_signal(start):
    assert handlers.ended_how(start_and_finish(start, "raise SystemExit(3)")) == "exit code 3"
    killed = start_and_finish(start, "import os; os.kill(os.getpid(), 9)")
    assert handlers.ended_how(killed) == "killed by SIGKILL"


def test_signal_without_a_name_is_told_by_its_number(start):
    number = signal.SIGRTMIN + 1
    assert handlers.ended_how(start_and_finish(start, f"import os; os.kill(os.getpid(), {number})")) == (
        f"killed by signal {number}")


def test_child_is_not_left_running_when_its_reader_cannot_start(start, monkeypatch):
    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    with pytest.raises(RuntimeError):
        start(["sleep", "60"])
    assert Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text() == ""


def test_output_can_go_to_a_file_while_errors_are_kept(start, tmp_path):
    with (tmp_path / "file").open("wb") as file:
        output = finish(start(["sh", "-c", "echo data; echo error >&2"], stdout=file.fileno()))
    assert output == "error"
    assert (tmp_path / "file").read_text() == "data\n"


@pytest.mark.parametrize("url", ["postgres://me:canary@db/x", "at redis://:canary@h:6379/0.", "amqp://u:c@nary@h",
                                 "https://u:canary%40@h?x=1", "mysql://u:a/canary@h/x"])
def test_password_in_a_url_is_not_kept(start, url):
    output = finish(start(python("import sys; print(sys.argv[1])", url)))
    assert "***@" in output
    assert "nary" not in output


def start_and_finish(start: Callable[..., Process], code: str) -> int | None:
    process = start(python(code))
    finish(process)
    return process.status


def test_wait_returns_at_once_when_cancelled(start):
    process = start(python("import time; time.sleep(60)"))
    cancelled = threading.Event()
    threading.Timer(0.3, cancelled.set).start()
    started = time.monotonic()
    assert not process.wait(cancelled, 30)
    assert time.monotonic() - started < 20


def test_wait_returns_after_its_timeout(start):
    process = start(python("import time; time.sleep(60)"))
    assert not process.wait(NEVER, 0.2)


STUBBORN_FAMILY = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = "import time; print('grandchild', flush=True); time.sleep(60)"  # inherits that SIGTERM is ignored
subprocess.Popen([sys.executable, "-c", child])
time.sleep(60)
"""


def test_close_kills_the_whole_group_even_where_sigterm_is_ignored(start):
    process = start(python(STUBBORN_FAMILY))
    eventually(lambda: "grandchild" in process.tail())
    assert len(alive_in_group(process.pid)) == 2
    started = time.monotonic()
    process.close(grace=0.5)
    assert 0.5 <= time.monotonic() - started < 20
    assert process.status == -signal.SIGKILL
    assert eventually(lambda: not alive_in_group(process.pid))


def test_close_reaches_grandchildren_whose_parent_has_ended_already(start):
    orphan = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    process = start(python(orphan))
    assert process.wait(NEVER, 10)
    assert len(alive_in_group(process.pid)) == 1
    process.close()
    assert eventually(lambda: not alive_in_group(process.pid))


def test_close_gives_time_to_end_in_order(start):
    code = """
import os, signal, time
def end(*_):
    time.sleep(0.3)
    os.write(1, b"put away\\n")
    raise SystemExit
signal.signal(signal.SIGTERM, end)
os.write(1, b"up\\n")
time.sleep(60)
"""
    process = start(python(code))
    eventually(lambda: "up" in process.tail())
    process.close(grace=20)
    assert process.tail() == "up\nput away"
    assert process.status == 0


def test_close_leaves_no_zombie_no_descriptor_and_no_thread(start):
    finish(start(["true"]))  # whatever Python opens once is open now
    gc.collect()   # other tests' garbage holds some, too
    descriptors, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    for command in (["true"], ["false"], ["sleep", "60"]) * 3:
        process = start(command)
        process.close(grace=5)
        process.close()  # again does no harm
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert threading.active_count() == threads
    children = Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split()
    assert children == []


def test_missing_program_leaves_nothing_running(start):
    with pytest.raises(FileNotFoundError):
        start(["/nowhere/such-program"])
    assert Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text() == ""


def test_group_ends_when_the_worker_is_killed(tmp_path):
    worker = """
import handlers, sys, threading
process = handlers.Process([sys.executable, "-c", sys.argv[1]], env=handlers.minimal_environment())
while "grandchild" not in process.tail():
    process.wait(threading.Event(), 0.05)
print(process.pid, flush=True)
process.wait(threading.Event(), 60)
"""
    path = os.pathsep.join([str(Path(handlers.__file__).parent), os.environ.get("PYTHONPATH", "")])
    parent = subprocess.Popen([sys.executable, "-c", worker, STUBBORN_FAMILY], stdout=subprocess.PIPE, text=True,
                              cwd=tmp_path, env={**os.environ, "PYTHONPATH": path})
    assert parent.stdout is not None
    with parent.stdout:
        group = int(parent.stdout.readline())
        assert len(alive_in_group(group)) == 2
        parent.kill()
        parent.wait()
        assert eventually(lambda: not alive_in_group(group))
