"""A notification is a hint to look, whoever sent it: its content means nothing, and what it costs is bounded."""
from __future__ import annotations

import collections
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest

from apps import make_app, running, wait_for, worker_of
from orchestrator import Link, Orchestrator, Task
from postgres import Server, eventually
from steps import background, column, value

Connection = psycopg.Connection[Any]
FLOOD = "select count(pg_notify(%s, %s || i)) from generate_series(1, 100000) i"


@pytest.fixture
def stranger(server: Server, installed: str) -> Iterator[Connection]:
    """Someone who may connect to the database, and nothing else."""
    role = "anyone_" + urlsplit(installed).path.lstrip("/")
    with server.connect() as conn:
        conn.execute(f"create role {role} login".encode())
    with psycopg.connect(installed.replace("postgres@", f"{role}@", 1), autocommit=True) as conn:
        yield conn
    with server.connect() as conn:
        conn.execute(f"drop role {role}".encode())


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> collections.Counter[str]:
    """How often each function was called, by any link of this process."""
    counts: collections.Counter[str] = collections.Counter()
    run = Link._run

    def counting(link: Link, columns: str, source: str, *more: Any) -> Any:
        counts[source] += 1
        return run(link, columns, source, *more)

    monkeypatch.setattr(Link, "_run", counting)
    return counts


def settled(app: Orchestrator) -> None:
    """Idle, and the database knows it."""
    eventually(lambda: worker_of(app).claims.idle and not worker_of(app).claims.heard)


def cpu_seconds(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_hundred_thousand_notifications_at_once_cost_a_worker_less_than_a_second(
        installed: str, conn: Connection, stranger: Connection, worker_process: Callable[..., Any], tmp_path: Any) -> None:
    (tmp_path / "patterns.py").write_text("HANDLERS = {'m:*': lambda task: None}")
    worker = worker_process(installed, HANDLERS="patterns")
    app = make_app(installed)
    wait_for(app, app.enqueue("m:first"), timeout=30)
    eventually(lambda: value(conn, "select bool_or(idle) from orchestrator.workers"))
    before = cpu_seconds(worker.pid)
    for channel in ("orchestrator", "orchestrator_cancel"):
        stranger.execute(FLOOD, [channel, "m:x"])
    began = time.monotonic()
    wait_for(app, app.enqueue("m:honest"), timeout=30)
    assert time.monotonic() - began < 10
    eventually(lambda: not column(stranger, "select 1 where pg_notification_queue_usage() > 0.0001"), 30)   # all were received
    assert cpu_seconds(worker.pid) - before < 1.0
    assert worker.stop() == 0
    app.close()


def test_a_stream_of_notifications_causes_a_bounded_number_of_looks_and_delays_no_task(
        installed: str, stranger: Connection, asked: collections.Counter[str]) -> None:
    with running(installed, {"m:*": lambda task: None}, claim_interval=60, heartbeat_interval=1) as app:
        wait_for(app, app.enqueue("m:first"))
        settled(app)
        asked.clear()
        began = time.monotonic()
        sent = 0
        while time.monotonic() < began + 2:
            stranger.execute("select pg_notify('orchestrator', %s)", [f"m:{sent}"])
            sent += 1
        seconds = time.monotonic() - began
        assert sent > 100
        assert asked["claim_tasks"] <= 25 + 25 * seconds
        late = background(lambda: [stranger.execute("select pg_notify('orchestrator', '')") for _ in range(500)])
        began = time.monotonic()
        wait_for(app, app.enqueue("m:honest"))
        assert time.monotonic() - began < 5
        late.result(30)


def test_a_single_notification_starts_a_task_at_once_after_a_flood(installed: str, stranger: Connection) -> None:
    started = threading.Event()
    with running(installed, {"a": lambda task: started.set()}, claim_interval=60) as app:
        settled(app)
        stranger.execute(FLOOD, ["orchestrator", "a"])
        for _ in range(5):
            started.clear()
            app.enqueue("a")
            assert started.wait(10)


def test_no_notification_cancels_anything_and_looks_are_bounded(
        installed: str, stranger: Connection, asked: collections.Counter[str]) -> None:
    started, go_on = threading.Event(), threading.Event()
    reasons = []

    def handler(task: Task) -> str:
        started.set()
        assert go_on.wait(60)
        reasons.append((task.cancel_reason, task.cancelled.is_set()))
        return "to its end"

    with running(installed, {"a": handler}) as app:
        task_id = app.enqueue("a")
        assert started.wait(20)
        asked.clear()
        began = time.monotonic()
        stranger.execute("select count(pg_notify('orchestrator_cancel', %s)) from generate_series(1, 1000)", [task_id])
        stranger.execute("select count(pg_notify('orchestrator_cancel', %s || i)) from generate_series(1, 50000) i", [task_id])
        for _ in range(300):
            stranger.execute("select pg_notify('orchestrator_cancel', %s)", [task_id])
        eventually(lambda: asked["cancelling_tasks"] >= 2)
        assert asked["cancelling_tasks"] <= 3 + 11 * (time.monotonic() - began)
        go_on.set()
        assert wait_for(app, task_id)["result"] == "to its end"
    assert reasons == [(None, False)]


def test_a_real_cancellation_gets_through_a_flood(installed: str, stranger: Connection) -> None:
    started = threading.Event()

    def obedient(task: Task) -> None:
        started.set()
        task.sleep(60)

    with running(installed, {"a": obedient}) as app:
        task_id = app.enqueue("a")
        assert started.wait(20)
        stop = threading.Event()

        def flood() -> None:
            while not stop.is_set():
                stranger.execute("select count(pg_notify('orchestrator_cancel', i::text)) from generate_series(1, 100) i")

        flooding = background(flood)
        try:
            assert app.cancel(task_id) == "cancelling"
            assert wait_for(app, task_id)["status"] == "cancelled"
        finally:
            stop.set()
            flooding.result(30)


@pytest.mark.parametrize("payload", ["", "x" * 7999, "é🐘", "m:x", "{\"a\": 1}", "*"])
def test_any_content_is_ignored(installed: str, stranger: Connection, payload: str) -> None:
    with running(installed, {"m:*": lambda task: "done"}) as app:
        for channel in ("orchestrator", "orchestrator_cancel"):
            stranger.execute("select pg_notify(%s, %s)", [channel, payload])
        assert wait_for(app, app.enqueue("m:x"))["result"] == "done"
        assert worker_of(app).health() == []


def test_many_new_types_in_one_transaction_stall_no_worker(installed: str, conn: Connection) -> None:
    with running(installed, {"m:*": lambda task: None, "other": lambda task: None}, claim_interval=60) as app:
        settled(app)
        conn.execute("select orchestrator.enqueue('m:' || i) from generate_series(1, 3000) i")
        began = time.monotonic()
        wait_for(app, app.enqueue("other", priority=1), timeout=20)
        assert time.monotonic() - began < 10
        eventually(lambda: value(conn, "select count(*) from orchestrator.tasks where status <> 'completed'") == 0, 60)


def test_an_idle_worker_asks_as_rarely_as_its_intervals_say(installed: str, asked: collections.Counter[str]) -> None:
    """Counted after it has settled: with long intervals only what has an interval of its own is left."""
    for intervals, most in (({"claim_interval": 60, "heartbeat_interval": 600, "worker_timeout": 2000}, 1.0), (
            {"claim_interval": 1, "heartbeat_interval": 10}, 4.0)):
        with running(installed, {"a": lambda task: None}, **intervals) as app:
            settled(app)
            eventually(lambda: asked["sample_stats"] >= 1)
            asked.clear()
            began = time.monotonic()
            threading.Event().wait(2)
            assert asked.total() <= 2 + most * (time.monotonic() - began), asked
        asked.clear()
