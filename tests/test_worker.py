"""A worker as a whole: start and stop, health, the database going away and coming back."""
from __future__ import annotations

import os
import threading
import time
from typing import Any

import psycopg
import pytest

import orchestrator
from apps import Gate, Relay, audit, make_app, obedient, running, wait_for, wait_for_on, worker_of
from orchestrator import ClaimLoop, ConfigError, Handler, Orchestrator, Pool
from postgres import LocalServer, eventually, install_schema
from steps import value

Connection = psycopg.Connection[Any]


# ------------------------------------------------------------------------------------------------------- the database goes away
def test_a_worker_connects_again_when_its_connections_are_cut(
        installed: str, conn: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, heard = Gate(), list[str]()
    monkeypatch.setattr(ClaimLoop, "_hear", lambda self, channel: heard.append(channel))
    with running(installed, {"a": gate, "ok": lambda task: None}) as app:
        before = app.enqueue("a")
        gate.wait_started()
        ours = "from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
        assert value(conn, f"select count(pg_terminate_backend(pid)) {ours}") >= 3
        gate.open.set()
        wait_for_on(conn, before, "completed")
        after = str(value(conn, "select orchestrator.enqueue('ok')"))
        wait_for_on(conn, after, "completed")
        assert worker_of(app).health() == []
        heard.clear()
        for channel in ("orchestrator", "orchestrator_cancel"):   # it listens again
            conn.execute(f"notify {channel}, 'ok'")
            eventually(lambda channel=channel: channel in heard)
    assert audit(conn) == []


@pytest.fixture
def own_server() -> Any:
    """A server of the test's own, which may be stopped."""
    if os.environ.get("TEST_DATABASE_URL") or os.environ.get("TEST_POSTGRES"):
        pytest.skip("needs a server that it may stop")
    server = LocalServer(fsync=True)   # what it says is committed must outlive its crash
    yield server
    server.stop()


def test_a_worker_outlives_a_crash_and_a_restart_of_the_server(own_server: LocalServer) -> None:
    url = own_server.create_database()
    install_schema(url)
    gate = Gate()
    with running(url, {"a": gate, "ok": lambda task: "ok"}) as app:
        task_id = app.enqueue("a")
        gate.wait_started()
        own_server.stop_server("immediate")
        gate.open.set()   # its outcome is kept until the server is back
        eventually(lambda: worker_of(app).counters.errors["connection"] >= 2)
        assert worker_of(app).health() == []
        own_server.start()
        with psycopg.connect(url, autocommit=True) as conn:
            wait_for_on(conn, task_id, "completed")
            wait_for_on(conn, str(value(conn, "select orchestrator.enqueue('ok')")), "completed")
            assert audit(conn) == []
            assert value(conn, "select attempts from orchestrator.tasks where id = %s", task_id) == 1


def test_a_worker_that_starts_while_the_database_is_down_waits_for_it(own_server: LocalServer) -> None:
    url = own_server.create_database()
    install_schema(url)
    own_server.stop_server()
    app = make_app(url, {"a": lambda task: None}).start()
    try:
        assert worker_of(app).health() == []
        assert any("not registered" in problem for problem in worker_of(app).readiness())
        own_server.start()
        eventually(worker_of(app).registered.is_set)
        wait_for(app, app.enqueue("a"), "completed")
    finally:
        app.stop(0)


def test_a_worker_gives_silent_connections_up_and_goes_on(installed: str, conn: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    relay = Relay(installed)
    with running(relay.url + "?connect_timeout=2", {"a": lambda task: None}) as app:
        wait_for(app, app.enqueue("a"))
        monkeypatch.setattr(orchestrator, "STATEMENT_TIMEOUT", -4.0)   # the client's own deadline is 5 s later
        now, worker = time.monotonic(), worker_of(app)
        eventually(lambda: min(worker.claims.link.answered, worker.heartbeat.link.answered) > now)   # no call is under the old one
        relay.silent = True   # what is sent now is lost: no answer comes, and no end
        eventually(lambda: worker_of(app).counters.errors["connection"] >= 2, 20)
        relay.silent = False
        monkeypatch.undo()
        task_id = str(value(conn, "select orchestrator.enqueue('a')"))
        wait_for_on(conn, task_id, "completed")
    relay.cut()


def test_a_database_that_turned_read_only_is_waited_for_on_new_connections(installed: str, conn: Connection) -> None:
    """A standby, or a primary that was made one: our session can't be set to write there."""
    with running(installed, {"a": lambda task: None}) as app:
        wait_for(app, app.enqueue("a"))
        database = conn.info.dbname
        conn.execute("create function read_only() returns trigger language plpgsql as "
                     "$$ begin raise exception 'read-only' using errcode = '25006'; end $$")
        for table in ("tasks", "workers", "leader_state"):
            conn.execute(f"create trigger read_only before insert or update on orchestrator.{table} execute function read_only()")
        pids = "select array_agg(pid) from pg_stat_activity where datname = %s and application_name like 'orchestrator%%'"
        before = set(value(conn, pids, database))
        eventually(lambda: worker_of(app).counters.errors["25"] >= 2, 15)
        eventually(lambda: set(value(conn, pids, database) or []) - before)
        for table in ("tasks", "workers", "leader_state"):
            conn.execute(f"drop trigger read_only on orchestrator.{table}")
        task_id = str(value(conn, "select orchestrator.enqueue('a')"))
        wait_for_on(conn, task_id, "completed")


@pytest.mark.parametrize("way", ["postgresql://127.0.0.1:1/nowhere", "postgresql://h.invalid/d"])
def test_a_database_that_waiting_will_not_mend_is_said_once(way: str, caplog: pytest.LogCaptureFixture) -> None:
    orchestrator.log.propagate = True
    caplog.set_level("INFO", "orchestrator")
    app = make_app(way, {"a": lambda task: None})
    worker = orchestrator.Worker(app.config, app.router)
    try:
        worker.start()
        eventually(lambda: worker.counters.errors["connection"] >= 3)
        assert worker.health() == []
    finally:
        worker.stop(0)
    levels = {record.levelname for record in caplog.records if record.getMessage().startswith("waiting for the database")}
    assert levels == ({"ERROR"} if "invalid" in way else {"INFO"})
    assert ("check the user, the host" in caplog.text) is ("invalid" in way)


# --------------------------------------------------------------------------------------------------------------------- health
def test_a_wedged_claim_loop_stops_the_heartbeat_and_turns_health_bad(
        installed: str, conn: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    wedged, release = threading.Event(), threading.Event()
    original = ClaimLoop._claim

    def claim(self: ClaimLoop, room: int) -> bool:
        if wedged.is_set():
            release.wait(30)
        return original(self, room)

    monkeypatch.setattr(ClaimLoop, "_claim", claim)
    beat = "select last_heartbeat from orchestrator.workers"
    with running(installed, {"a": lambda task: None}, heartbeat_interval=0.1) as app:
        worker = worker_of(app)
        first = value(conn, beat)
        eventually(lambda: value(conn, beat) > first)
        wedged.set()
        eventually(lambda: time.monotonic() - worker.claims.moved_at > 1.2)   # it waits a second at most
        worker.claims.moved_at -= 60
        assert worker.health() == [problem for problem in worker.health() if "claim loop" in problem] != []
        last = [value(conn, beat)]

        def silent() -> bool:
            previous, now = last[0], value(conn, beat)
            last[0] = now
            return bool(previous == now and worker.stopped.wait(0.5) is False and value(conn, beat) == now)
        eventually(silent)
        release.set()
        eventually(lambda: value(conn, beat) > last[0] and not worker.health())


def test_a_worker_whose_thread_ended_says_so(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(self: ClaimLoop, room: int) -> bool:
        raise MemoryError
    with running(installed, {"a": lambda task: None}) as app:
        worker = worker_of(app)
        monkeypatch.setattr(ClaimLoop, "_claim", no_memory)
        eventually(lambda: worker.fatal is not None)
        assert worker.health() == [str(worker.fatal)] and "the claim thread ended: MemoryError" in str(worker.fatal)
        assert worker.status().problems == worker.health() and worker.status().not_ready


def test_status_tells_of_what_runs(installed: str) -> None:
    gate = Gate()
    with running(installed, {"a:": Handler(gate, timeout=60)}) as app:
        app.enqueue("a:b")
        gate.wait_started()
        status = worker_of(app).status()
        [(kind, seconds, left)] = status.running
        assert kind == "a:b" and 0 <= seconds < 30 and left is not None and 30 < left <= 60
        assert (status.problems, status.not_ready, status.pool_size) == ([], [], 4)
        assert status.worker_id == worker_of(app).id and status.counters.completed["a:", "completed"] == 0
        assert status.database_silence < 10 and status.loop_lag < 10
        gate.open.set()
        eventually(lambda: worker_of(app).status().counters.completed["a:", "completed"] == 1)
        assert worker_of(app).status().running == []


def test_a_port_in_use_is_refused_by_name(installed: str) -> None:
    with running(installed, {"a": lambda task: None}) as app:
        assert app._http is not None
        with pytest.raises(ConfigError, match="METRICS_PORT"):
            Orchestrator(installed, metrics_port=app._http.server_address[1]).start()


# ------------------------------------------------------------------------------------------------------------------- stopping
def test_stop_gives_back_what_has_not_started_and_finishes_the_rest(
        installed: str, conn: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pool, "prefetch", lambda self: 40)   # it holds more than it can run
    monkeypatch.setattr(Pool, "overloaded", lambda self: False)
    gate = Gate()
    app = make_app(installed, {"a": gate}, worker_pool_size=1).start()
    eventually(worker_of(app).registered.is_set)
    first = app.enqueue("a")
    gate.wait_started()
    rest = [app.enqueue("a") for _ in range(20)]
    eventually(lambda: value(conn, "select count(*) from orchestrator.tasks where status = 'claimed'") == 20)
    stopping = threading.Thread(target=app.stop, args=(10,))
    stopping.start()
    eventually(lambda: value(conn, "select count(*) from orchestrator.tasks where status = 'pending'") == 20)
    gate.open.set()
    stopping.join(10)
    assert value(conn, "select status from orchestrator.tasks where id = %s", first) == "completed"
    assert value(conn, "select count(*) from orchestrator.tasks where id = any (%s) and attempts = 0 and status = 'pending'", rest) == 20
    assert value(conn, "select count(*) from orchestrator.workers") == 0
    assert len(gate.tasks) == 1
    assert audit(conn) == []


def test_stop_without_grace_gives_back_what_runs_uncharged(installed: str, conn: Connection) -> None:
    gate = Gate()
    app = make_app(installed, {"a": Handler(gate, max_retries=0)}).start()
    task_id = app.enqueue("a")
    gate.wait_started()
    wait_for(app, task_id, "running")
    app.stop(0)
    assert conn.execute("select status, attempts from orchestrator.tasks").fetchone() == ("pending", 0)
    gate.open.set()
    assert audit(conn) == []


def test_shutdown_asks_running_handlers_to_stop_and_gives_back_those_that_do(installed: str, conn: Connection) -> None:
    app = make_app(installed, {"a": obedient}).start()
    eventually(worker_of(app).registered.is_set)
    app.enqueue("a")
    eventually(worker_of(app).pool.running)
    began = time.monotonic()
    app.stop(20)
    assert time.monotonic() - began < 5
    assert conn.execute("select status, attempts from orchestrator.tasks").fetchone() == ("pending", 0)
