"""Rolling restarts: MAX_TASKS and MAX_AGE end a worker process as SIGTERM does; hooks around a worker's life."""
from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest

from apps import at_rest, claimed, end, make_app, registered, running, wait_for, worker_of
from conftest import REPOSITORY, clean_environment
from orchestrator import ConfigError, Orchestrator
from postgres import eventually
from steps import audit, column, enqueue, enqueue_some, value

Connection = psycopg.Connection[Any]
HANDLERS = "HANDLERS = {'t': lambda task: None, 'wait': lambda task: task.sleep(60)}"
PROGRAM = """
import sys
from orchestrator import Orchestrator
app = Orchestrator()
app.on_start(lambda: print("first opened"))
@app.on_start
def second():
    print("second opened")
    if "fail" in sys.argv:
        raise LookupError("no such model")
app.on_stop(lambda: print("first closed"))
@app.on_stop
def broken():
    raise RuntimeError("cannot close")
app.on_stop(lambda: print("last closed"))
@app.handler("t")
def handler(task):
    print("task ran")
app.run()
print("after run")
"""


# ---------------------------------------------------------------------------------------------------- MAX_TASKS and MAX_AGE
def test_a_worker_ends_after_so_many_tasks_and_another_one_does_the_rest(
        installed: str, conn: Connection, worker_process: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "handlers.py").write_text(HANDLERS)
    enqueue_some(conn, 5)
    waiting = enqueue(conn, "wait")
    first = worker_process(installed, MAX_TASKS=5, DISTRIBUTED_MODE="true", WORKER_POOL_SIZE=2, SHUTDOWN_GRACE="5s")
    assert first.process.wait(30) == 0, first.output
    assert column(conn, "select distinct status::text from orchestrator.tasks where type = 't'") == ["completed"]
    # it was running, or not yet: given back, uncharged
    assert conn.execute("select status, attempts from orchestrator.tasks where id = %s", [waiting]).fetchone() == ("pending", 0)
    assert column(conn, "select id from orchestrator.workers") == [] and audit(conn) == []
    assert "MAX_TASKS" in first.output and "Traceback" not in first.output


def test_a_worker_ends_when_it_is_old(installed: str, worker_process: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "handlers.py").write_text(HANDLERS)
    worker = worker_process(installed, "--max-age", "1s")
    assert worker.process.wait(30) == 0, worker.output
    assert "MAX_AGE" in worker.output


def test_a_sigterm_while_a_worn_out_worker_stops_is_the_first_signal_and_ends_no_grace_period(
        installed: str, conn: Connection, worker_process: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "handlers.py").write_text(
        "import os, time\ndef held(task):\n    while not os.path.exists('go'):\n        time.sleep(0.01)\n"
        "HANDLERS = {'t': lambda task: None, 'held': held}")
    held = enqueue(conn, "held")
    worker = worker_process(installed, MAX_TASKS=1, WORKER_POOL_SIZE=2, SHUTDOWN_GRACE="1h")
    eventually(lambda: value(conn, "select status = 'running' from orchestrator.tasks where id = %s", held))
    enqueue(conn)
    eventually(lambda: " stops: " in worker.output)
    worker.signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        worker.process.wait(0.5)
    (tmp_path / "go").touch()
    assert worker.process.wait(20) == 0, worker.output
    assert conn.execute("select status, attempts from orchestrator.tasks where id = %s", [held]).fetchone() == ("completed", 1)


def test_tasks_are_counted_as_they_run_whatever_becomes_of_them(installed: str, conn: Connection) -> None:
    with registered(installed, max_tasks=3) as worker:
        enqueue_some(conn, 3, "a")
        for n, task in enumerate(claimed(worker, 3), 1):
            assert not worker.worn_out()
            end(worker, task)
            worker.reports.poll()
            assert bool(worker.worn_out()) == (n == 3)


def test_age_is_up_to_ten_percent_less_so_that_not_all_workers_end_at_once(monkeypatch: pytest.MonkeyPatch, installed: str) -> None:
    now = [1000.0]
    monkeypatch.setattr("orchestrator.clock", lambda: now[0])
    workers = [at_rest(installed, max_age="100s") for _ in range(50)]
    now[0] = 1089.0
    assert not any(worker.worn_out() for worker in workers)
    now[0] = 1095.0
    assert 0 < sum(bool(worker.worn_out()) for worker in workers) < 50
    now[0] = 1100.0
    assert all(worker.worn_out() for worker in workers)


def test_without_them_a_worker_is_never_worn_out(monkeypatch: pytest.MonkeyPatch, installed: str) -> None:
    worker = at_rest(installed)
    monkeypatch.setattr("orchestrator.clock", lambda: 1e12)
    assert not worker.worn_out()


@pytest.mark.parametrize(("name", "given"), [("max_tasks", -1), ("max_tasks", "some"), ("max_age", "10"), ("max_age", -1)])
def test_what_is_no_limit_is_refused(name: str, given: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{name.upper()}: "):
        Orchestrator("postgresql://nowhere", **{name: given})


# ------------------------------------------------------------------------------------------------------------------- hooks
def test_hooks_run_once_around_a_workers_work_on_start_in_order_on_stop_backwards(installed: str, conn: Connection) -> None:
    heard: list[str] = []
    app = make_app(installed, {"t": lambda task: heard.append("task")})
    id = app.enqueue("t")
    for n in (1, 2):
        app.on_start(lambda n=n: heard.append(f"start {n}") or conn.execute("select 1"))   # type: ignore[misc]
        app.on_stop(lambda n=n: heard.append(f"stop {n}"))   # type: ignore[misc]
    with running(installed, app):
        wait_for(app, id)
    app.stop()
    app.close()
    assert heard == ["start 1", "start 2", "task", "stop 2", "stop 1"]


def test_nothing_is_claimed_before_on_start_has_returned(installed: str, conn: Connection) -> None:
    app, opened = make_app(installed, {"t": lambda task: opened.is_set()}), threading.Event()
    id = app.enqueue("t")

    @app.on_start
    def slow() -> None:
        assert column(conn, "select id from orchestrator.workers") == []
        opened.set()
    with running(installed, app):
        assert wait_for(app, id)["result"] is True


def test_tasks_have_ended_when_on_stop_is_called(installed: str, conn: Connection) -> None:
    app, began = make_app(installed), threading.Event()
    seen: list[Any] = []

    @app.handler("t")
    def handler(task: Any) -> None:
        began.set()
        task.sleep(60)
    state = "select status, (select count(*) from orchestrator.workers) from orchestrator.tasks"
    app.on_stop(lambda: seen.append(conn.execute(state).fetchone()))
    app.start()
    app.enqueue("t")
    assert began.wait(15)
    app.stop(5)
    assert seen == [("pending", 0)]


def test_an_exception_in_on_start_is_a_config_error_and_no_worker_starts(installed: str, conn: Connection) -> None:
    app = make_app(installed, {"t": lambda task: None})
    heard: list[str] = []
    app.on_stop(lambda: heard.append("stop"))

    @app.on_start
    def broken() -> None:
        raise LookupError("no such model")
    with pytest.raises(ConfigError, match=r"^on_start: LookupError: no such model \(test_rolling.py:\d+ in broken\)$"):
        app.start()
    assert app.worker is None and heard == [] and column(conn, "select id from orchestrator.workers") == []
    app.router.start_hooks.clear()
    with running(installed, app):   # it can be tried again
        assert worker_of(app).registered.is_set()
    assert heard == ["stop"]


def test_on_stop_runs_where_the_worker_cannot_start_after_on_start(installed: str, conn: Connection) -> None:
    heard: list[str] = []
    app = make_app(installed, {})
    app.on_start(lambda: heard.append("start"))
    app.on_stop(lambda: heard.append("stop"))
    conn.execute("create or replace function orchestrator.schema_version() returns int language sql immutable as 'select 99'")
    with pytest.raises(ConfigError, match="version 99"):
        app.start()
    assert heard == ["start", "stop"] and app.worker is None


def test_health_is_answered_and_ready_is_not_while_on_start_takes_its_time(installed: str) -> None:
    app = make_app(installed, {})
    answers: list[int] = []

    @app.on_start
    def slow() -> None:
        for path in ("health", "ready"):
            try:
                answers.append(urllib.request.urlopen(f"http://127.0.0.1:{app._http.server_address[1]}/{path}", timeout=10).status)
            except urllib.error.HTTPError as error:
                answers.append(error.code)
    with running(installed, app):
        assert answers == [200, 503]


def test_async_hooks_are_waited_for(installed: str) -> None:
    app, heard = make_app(installed, {}), []

    def hear(word: str) -> None:
        @getattr(app, f"on_{word}")   # type: ignore[untyped-decorator]
        async def hook() -> None:
            await asyncio.sleep(0)
            heard.append(word)
    hear("start")
    hear("stop")
    with running(installed, app):
        assert heard == ["start"]
    assert heard == ["start", "stop"]


def run_program(installed: str, tmp_path: Path, *args: str, **settings: Any) -> subprocess.Popen[bytes]:
    (tmp_path / "program.py").write_text(PROGRAM)
    output = (tmp_path / "out").open("w")
    return subprocess.Popen([sys.executable, "program.py", *args], cwd=tmp_path, stdout=output, stderr=output,
                            env=clean_environment(DATABASE_URL=installed, METRICS_PORT=0, PYTHONPATH=REPOSITORY, **settings))


@pytest.mark.parametrize("end_by", ["SIGTERM", "MAX_TASKS"])
def test_a_program_opens_and_closes_around_run(installed: str, conn: Connection, tmp_path: Path, end_by: str) -> None:
    process = run_program(installed, tmp_path, **({"MAX_TASKS": 1} if end_by == "MAX_TASKS" else {}))
    out = tmp_path / "out"
    try:
        enqueue(conn)
        eventually(lambda: "task ran" in out.read_text() or process.poll() is not None, 30)
        if end_by == "SIGTERM":
            process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0, out.read_text()
    finally:
        process.kill()
        process.wait()
    lines = [line for line in out.read_text().splitlines() if line in (
        "first opened", "second opened", "task ran", "last closed", "first closed", "after run")]
    assert lines == ["first opened", "second opened", "task ran", "last closed", "first closed", "after run"]
    assert "RuntimeError: cannot close" in out.read_text()   # logged, and the others were called


def test_a_program_whose_on_start_raises_ends_with_a_clear_error(installed: str, conn: Connection, tmp_path: Path) -> None:
    process = run_program(installed, tmp_path, "fail")
    assert process.wait(30) == 2
    text = (tmp_path / "out").read_text()
    assert text.splitlines()[-1] == "error: on_start: LookupError: no such model (program.py:10 in second)"
    assert "closed" not in text   # what never opened
    assert value(conn, "select count(*) from orchestrator.workers") == 0
