"""SIGTERM and SIGINT to a real worker process: nothing new starts, what runs may end, the rest goes back uncharged, and it exits."""
from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from apps import Relay, audit
from conftest import WorkerProcess
from postgres import eventually
from steps import enqueue, enqueue_some, value

Connection = psycopg.Connection[Any]
Workers = Callable[..., WorkerProcess]
HANDLERS = """
import concurrent.futures, pathlib, threading
from orchestrator import Handler

def held(task):   # until a file appears
    while not pathlib.Path(task.payload).exists():
        threading.Event().wait(0.02)
    return "done"

def stubborn(task):
    threading.Event().wait(3600)

def obedient(task):
    task.cancelled.wait(3600)
    task.raise_if_cancelled()

def leaves_a_thread(task):
    threading.Thread(target=stubborn, args=(task,), daemon=False).start()
    concurrent.futures.ThreadPoolExecutor().submit(stubborn, task)

HANDLERS = {"quick": lambda task: None, "held": held, "stubborn": Handler(stubborn, max_retries=0), "obedient": obedient,
            "leaves_a_thread": leaves_a_thread}
"""


@pytest.fixture
def start(worker_process: Workers, installed: str, tmp_path: Path) -> Workers:
    (tmp_path / "work.py").write_text(HANDLERS)

    def start_worker(**settings: Any) -> WorkerProcess:
        return worker_process(settings.pop("url", installed), **{
            "HANDLERS": "work.py", "WORKER_POOL_SIZE": 2, "CLAIM_INTERVAL": "100ms", "SHUTDOWN_GRACE": "20s", **settings})
    return start_worker


def status(conn: Connection, task_id: str) -> tuple[str, int]:
    row = conn.execute("select status, attempts from orchestrator.tasks where id = %s", [task_id]).fetchone()
    assert row is not None
    return row


def wait_running(conn: Connection, *ids: str) -> None:
    running = "select count(*) = %s from orchestrator.tasks where id = any (%s) and status = 'running'"
    eventually(lambda: value(conn, running, len(ids), list(ids)), 20)


def ended_within(worker: WorkerProcess, seconds: float) -> float:
    """How long it took to exit, with 0; the machine's own slowness is not its fault, so there is a second of tolerance."""
    began = time.monotonic()
    assert worker.process.wait(seconds + 15) == 0, worker.output
    took = time.monotonic() - began
    assert took <= seconds + 1, worker.output
    return took


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_worker_exits_at_once_and_says_goodbye(start: Workers, conn: Connection, number: signal.Signals) -> None:
    worker = start()
    worker.signal(number)
    ended_within(worker, 2)
    assert value(conn, "select count(*) from orchestrator.workers") == 0
    assert " stopped" in worker.output and "Traceback" not in worker.output


def test_a_busy_worker_finishes_what_runs_and_gives_the_rest_back(start: Workers, conn: Connection, tmp_path: Path) -> None:
    worker = start()
    running = [enqueue(conn, "held", str(tmp_path / "go")) for _ in range(2)]
    wait_running(conn, *running)
    waiting = enqueue_some(conn, 20, "quick")
    worker.signal(signal.SIGTERM)
    eventually(lambda: " stops: " in worker.output)
    late = enqueue(conn, "quick")
    (tmp_path / "go").touch()
    ended_within(worker, 3)
    assert [status(conn, task_id) for task_id in running] == [("completed", 1)] * 2
    assert {status(conn, task_id) for task_id in [*waiting, late]} == {("pending", 0)}
    assert audit(conn) == []


def test_what_is_left_after_the_grace_period_goes_back_uncharged(start: Workers, conn: Connection) -> None:
    worker = start(SHUTDOWN_GRACE="1s")
    stubborn, obedient = enqueue(conn, "stubborn"), enqueue(conn, "obedient")
    wait_running(conn, stubborn, obedient)
    worker.signal(signal.SIGTERM)
    eventually(lambda: status(conn, obedient) == ("pending", 0), 5)   # at once, since it stopped when asked
    assert ended_within(worker, 3) > 0.2
    assert status(conn, stubborn) == ("pending", 0)
    assert value(conn, "select count(*) from orchestrator.workers") == 0
    assert audit(conn) == []


def test_a_second_signal_ends_the_grace_period_at_once(start: Workers, conn: Connection) -> None:
    worker = start(SHUTDOWN_GRACE="1h")
    task_id = enqueue(conn, "stubborn")
    wait_running(conn, task_id)
    worker.signal(signal.SIGTERM)
    eventually(lambda: " stops: " in worker.output)
    worker.signal(signal.SIGTERM)
    ended_within(worker, 2)
    assert status(conn, task_id) == ("pending", 0)


@pytest.fixture
def relay(installed: str) -> Iterator[Relay]:
    made = Relay(installed)
    yield made
    made.cut()


@pytest.mark.parametrize("how", ["down", "silent"])
def test_a_database_that_is_gone_does_not_keep_a_worker(start: Workers, conn: Connection, relay: Relay, how: str) -> None:
    worker = start(url=relay.url, SHUTDOWN_GRACE="1s")
    task_id = enqueue(conn, "stubborn")
    wait_running(conn, task_id)
    if how == "down":
        relay.cut()
    else:
        relay.silent = True
    worker.signal(signal.SIGTERM)
    ended_within(worker, 3)
    assert status(conn, task_id)[0] == "running"   # for the next instance, or the leader, to recover


def test_a_database_that_does_not_answer_at_the_start_does_not_keep_a_worker(worker_process: Workers, relay: Relay) -> None:
    relay.silent = True
    worker = worker_process(relay.url, wait=False, HANDLERS="")
    eventually(lambda: relay.sockets)
    worker.signal(signal.SIGTERM)
    ended_within(worker, 2)
    assert "stopped before it had registered" in worker.output and "Traceback" not in worker.output


def test_a_thread_that_a_handler_left_behind_does_not_keep_the_process(start: Workers, conn: Connection) -> None:
    worker = start()
    task_id = enqueue(conn, "leaves_a_thread")
    eventually(lambda: status(conn, task_id)[0] == "completed")
    worker.signal(signal.SIGTERM)
    ended_within(worker, 2.5)


def test_while_it_stops_it_is_alive_but_not_ready(start: Workers, conn: Connection) -> None:
    worker = start()
    task_id = enqueue(conn, "stubborn")
    wait_running(conn, task_id)
    worker.signal(signal.SIGTERM)
    eventually(lambda: " stops: " in worker.output)
    answers = {path: http_status(worker.address + path) for path in ("/health", "/ready")}
    assert answers == {"/health": 200, "/ready": 503}
    assert value(conn, "select clock_timestamp() - last_heartbeat < interval '30 s' from orchestrator.workers")


def http_status(url: str) -> int:
    host, port = url.removeprefix("http://").split("/")[0].split(":")
    with socket.create_connection((host, int(port)), 5) as connection:
        connection.sendall(f"GET /{url.split('/', 3)[3]} HTTP/1.0\r\nHost: {host}:{port}\r\n\r\n".encode())
        return int(connection.recv(100).split()[1])
