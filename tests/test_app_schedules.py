"""Schedules in Python: app.schedule, SCHEDULES beside HANDLERS, what a worker counts and its page's actions."""
from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from apps import Relay, make_app, running, wait_for, worker_of
from conftest import WorkerProcess
from orchestrator import Orchestrator, Schedule
from postgres import eventually
from steps import audit, column, row, value

Connection = psycopg.Connection[Any]
DEFINED = """select cron, timezone, type, payload, priority, max_retries, missed, overlap from orchestrator.schedules where name = 's'"""


@pytest.fixture
def app(installed: str) -> Iterator[Orchestrator]:
    app = make_app(installed)
    yield app
    app.close()


# ------------------------------------------------------------------------------------------------------------- a program
def test_schedule_defines_what_its_arguments_say_and_returns_the_next_time(app: Orchestrator, conn: Connection) -> None:
    assert app.schedule("s", "@daily", "t") == datetime.combine(datetime.now(UTC).date() + timedelta(days=1), datetime.min.time(), UTC)
    assert row(conn, DEFINED) == {"cron": "@daily", "timezone": "UTC", "type": "t", "payload": {}, "priority": 0, "max_retries": None,
                                  "missed": "one", "overlap": True}
    app.schedule("s", "0 12 1 1 *", "u", [datetime(2026, 1, 31, tzinfo=UTC)], timezone="Asia/Kolkata", priority=-3, max_retries=0,
                 missed="all", overlap=False)
    assert row(conn, DEFINED) == {
        "cron": "0 12 1 1 *", "timezone": "Asia/Kolkata", "type": "u", "payload": ["2026-01-31T00:00:00+00:00"], "priority": -3,
        "max_retries": 0, "missed": "all", "overlap": False}


def test_a_paused_schedule_has_no_next_time(app: Orchestrator) -> None:
    app.schedule("s", "@daily", "t")
    assert app.call("pause_schedule", "s") == [(True,)]
    assert app.schedule("s", "@daily", "t") is None


def test_schedule_in_a_transaction_of_the_callers_is_gone_after_its_rollback(app: Orchestrator, installed: str, conn: Connection) -> None:
    with psycopg.connect(installed) as mine:
        next_at = app.schedule("s", "@hourly", "t", connection=mine)
        assert next_at == value(mine, "select next_at from orchestrator.schedules")
        mine.rollback()
    assert column(conn, "select name from orchestrator.schedules") == []


@pytest.mark.parametrize(("field", "change"), [
    ("name", {"name": ""}), ("name", {"name": 5}), ("cron", {"cron": "* * *"}), ("cron", {"cron": None}), ("type", {"type": "a*b"}),
    ("payload", {"payload": {1, "a", object()}}), ("payload", {"payload": "x" * 300_000}), ("timezone", {"timezone": "Mars/Base"}),
    ("priority", {"priority": 1.5}), ("priority", {"priority": 10 ** 7}), ("max_retries", {"max_retries": -1}),
    ("missed", {"missed": "some"})])
def test_what_is_wrong_is_a_value_error_that_names_its_field(app: Orchestrator, field: str, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{field}: "):
        app.schedule(**{"name": "s", "cron": "@daily", "type": "t", **change})


def test_a_worker_fires_what_is_due_runs_it_and_counts_it(installed: str, conn: Connection) -> None:
    with running(installed, {"t": lambda task: task.payload}, claim_interval=60) as app:
        app.schedule("s", "@every 1 second", "t", {"n": 1})
        claims = worker_of(app).claims

        def completed() -> int:
            return int(value(conn, "select count(*) from orchestrator.tasks where status = 'completed'"))

        def looks() -> bool:   # now; by itself it would within claim_interval
            claims.chores[claims._promote_due].due = 0.0
            claims.bell.set()
            return completed() >= 1
        eventually(looks, 10)
        eventually(lambda: completed() >= 2, 10)   # it knows when the next time is
        fired = worker_of(app).status().counters.schedules_fired
        assert 2 <= fired <= value(conn, "select count(*) from orchestrator.tasks")
    late = column(conn, "select extract(epoch from created_at - right(idempotency_key, 20)::timestamptz)::float from orchestrator.tasks")
    assert min(late) >= 0 and sorted(late)[len(late) // 2] < 5   # it woke for the time, not by claim_interval
    assert audit(conn) == []


# ------------------------------------------------------------------------------------------------------------- SCHEDULES
NIGHTLY = """
from orchestrator import Schedule
HANDLERS = {"task:backup": lambda task: None}
SCHEDULES = {"nightly": Schedule("30 3 * * *", "task:backup", {"database": "app"}, timezone="Europe/Berlin", overlap=False)}
"""


def test_a_worker_defines_the_schedules_of_its_module_before_it_claims(
        installed: str, conn: Connection, worker_process: Callable[..., WorkerProcess], tmp_path: Path) -> None:
    (tmp_path / "handlers.py").write_text(NIGHTLY)

    def started() -> WorkerProcess:
        worker = worker_process(installed, HEARTBEAT_INTERVAL="200ms")   # so it notices soon that it was declared dead
        eventually(lambda: " started, " in worker.output)
        return worker

    assert started().stop() == 0
    found = rows_of(conn)
    assert found == [("nightly", "30 3 * * *", "Europe/Berlin", {"database": "app"}, False)]
    updated = value(conn, "select updated_at from orchestrator.schedules")
    worker = started()
    assert value(conn, "select updated_at from orchestrator.schedules") == updated
    # what a person removes stays away, also when the worker registers anew
    conn.execute("select orchestrator.unschedule('nightly')")
    first = worker.id
    conn.execute("update orchestrator.workers set declared_dead_at = now()")
    eventually(lambda: worker.id != first, 30)
    assert rows_of(conn) == []
    # what another deployment defined, and this one lacks, stays
    conn.execute("select orchestrator.schedule('other', '@daily', 't')")
    assert worker.stop() == 0
    assert started().stop() == 0
    assert [name for name, *_ in rows_of(conn)] == ["nightly", "other"]


def rows_of(conn: Connection) -> list[Any]:
    return conn.execute("select name, cron, timezone, payload, overlap from orchestrator.schedules order by 1").fetchall()


def test_a_worker_that_starts_while_the_database_is_away_defines_them_when_it_is_back(installed: str, conn: Connection) -> None:
    relay = Relay(installed)
    app = make_app(relay.url, {"t": lambda task: None})
    port = relay.listener.getsockname()[1]
    relay.cut()
    app.router.schedules["s"] = Schedule("@daily", "t")
    app.start()
    try:
        assert not worker_of(app).registered.is_set()
        relay = Relay(installed, port)
        eventually(worker_of(app).registered.is_set, 20)
        assert column(conn, "select name from orchestrator.schedules") == ["s"]
    finally:
        app.stop(0)
        relay.cut()


# ------------------------------------------------------------------------------------------------------ metrics and HTTP
def metrics_of(app: Orchestrator) -> dict[str, float]:
    with urllib.request.urlopen(f"{address(app)}/metrics", timeout=10) as answer:
        found = re.findall(r"^(schedule\w+) (\S+)$", answer.read().decode(), re.MULTILINE)
    return {name: float(number) for name, number in found}


def address(app: Orchestrator) -> str:
    return f"http://127.0.0.1:{app._http.server_address[1]}"


def test_metrics_tell_how_late_the_latest_is_which_failed_and_what_was_fired(
        installed: str, conn: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    assert value(conn, "select orchestrator.metrics()")["schedule_late"] == 0
    for name in ("late", "in time", "paused", "failed"):
        conn.execute("select orchestrator.schedule(%s, '@hourly', 't')", [name])
    conn.execute("update orchestrator.schedules set paused = true where name in ('paused', 'failed')")
    conn.execute("update orchestrator.schedules set last_error = 'why' where name = 'failed'")
    conn.execute("update orchestrator.schedules set next_at = next_at - interval '10 hours' where name <> 'in time'")
    numbers = value(conn, "select orchestrator.metrics()")
    assert 8 * 3600 < numbers["schedule_late"] <= 10 * 3600 and numbers["schedules_failed"] == 1
    with running(installed, {"t": lambda task: None}) as app:
        eventually(lambda: len(metrics_of(app)) == 3, 20)
        eventually(lambda: metrics_of(app)["schedules_fired_total"] == 1)   # missed: one
        assert metrics_of(app)["schedules_failed"] == 1
        eventually(lambda: metrics_of(app)["schedule_late_seconds"] == 0, 20)


def act(app: Orchestrator, action: str, **fields: Any) -> tuple[int, Any]:
    request = urllib.request.Request(f"{address(app)}/api/{action}", json.dumps(fields).encode(), {"Authorization": "Bearer boss"})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, json.load(answer)["result"]
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["error"]


def test_the_page_may_fire_pause_and_resume(installed: str, conn: Connection) -> None:
    with running(installed, {"t": lambda task: None}, admin_token="boss") as app:
        app.schedule("s", "@yearly", "t")
        status, task_id = act(app, "fire_schedule", name="s")
        assert status == 200 and wait_for(app, task_id)["status"] == "completed"
        assert [act(app, "pause_schedule", name="s") for _ in range(2)] == [(200, True), (200, False)]
        with urllib.request.urlopen(f"{address(app)}/api/overview", timeout=10) as answer:
            [shown] = json.load(answer)["schedules"]
        assert (shown["name"], shown["paused"], shown["task_id"], shown["next_in"]) == ("s", True, task_id, None)
        assert [act(app, "resume_schedule", name="s") for _ in range(2)] == [(200, True), (200, False)]
        for action in ("fire_schedule", "pause_schedule", "resume_schedule"):
            assert act(app, action, name="nowhere") == (404, "there is no such schedule")
            assert act(app, action, nome="s")[0] == 400
    assert audit(conn) == []
