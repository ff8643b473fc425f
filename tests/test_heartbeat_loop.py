"""The heartbeat loop: whom it takes for dead, by its own clock; the lease; chores, none of which stops another."""
from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

import orchestrator
from apps import Gate, at_rest, audit, make_app, registered, running, wait_for, worker_of
from orchestrator import Config, ConfigError, Handler
from postgres import eventually
from steps import column, enqueue, register, value

Connection = psycopg.Connection[Any]


class Clock:
    """Stands in for the module `time`: its monotonic() is what the test says."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class FakeLink:
    """Answers heartbeat() with the rows that it was given, and notes who was declared dead."""

    def __init__(self) -> None:
        self.rows: dict[str, str] = {}
        self.declared: list[tuple[str, str]] = []

    def call(self, function: str, *args: Any) -> list[Any]:
        if function == "heartbeat":
            return list(self.rows.items())
        if function == "declare_dead":
            self.declared += zip(*(json.loads("[" + text[1:-1] + "]") for text in args[2:]), strict=True)
            return [(len(self.declared),)]
        assert function == "recover_orphans"
        return [(0, 0, "{}", 0, 0, 0)]


class Leader:
    """A leader's heartbeat loop without a database, at a time of the test's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
        self.clock, self.link = Clock(), FakeLink()
        worker = at_rest("postgresql://nowhere/", heartbeat_interval=10, worker_timeout=30, **settings)
        worker.term = 1
        self.loop = worker.heartbeat
        self.loop.link = self.link    # type: ignore[assignment]
        self.link.rows = {worker.id: "now"}
        monkeypatch.setattr(orchestrator, "time", self.clock)

    def look(self, after: float, **beats: str) -> list[tuple[str, str]]:
        """A heartbeat and a recovery so many seconds later; returns who was declared dead."""
        self.clock.now += after
        self.link.rows.update(beats)
        self.loop._beat()
        self.link.declared.clear()
        self.loop._recover()
        return list(self.link.declared)


def test_a_worker_is_declared_dead_when_its_heartbeat_has_not_changed_for_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    leader = Leader(monkeypatch)
    assert leader.look(0, a="1", b="1") == []
    assert leader.look(10, a="2") == []
    assert leader.look(10, a="3") == []
    assert leader.look(10, a="4") == [("b", "1")]    # the heartbeat that was seen goes along: a later one saves it


def test_no_step_of_the_databases_clock_makes_a_living_worker_look_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only whether a heartbeat changes counts, not what time it says."""
    leader = Leader(monkeypatch)
    for stamp in ("2026-01-01", "2036-01-01", "2016-01-01", "2026-01-02", "1970-01-01"):
        assert leader.look(10, a=stamp) == []


def test_a_new_leader_gives_everyone_the_whole_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    leader = Leader(monkeypatch)
    assert leader.look(10_000, a="long ago") == []
    assert leader.look(10) == [] and leader.look(10) == []
    assert leader.look(10) == [("a", "long ago")]


@pytest.mark.parametrize("pause", [15.5, 29.0, 31.0, 3600.0])
def test_after_a_pause_everyone_gets_the_whole_timeout_anew(monkeypatch: pytest.MonkeyPatch, pause: float) -> None:
    """The database was away, or this process was stopped: others may not have been able to send anything either."""
    leader = Leader(monkeypatch)
    assert leader.look(0, a="1") == [] and leader.look(10) == []
    assert leader.look(pause) == []
    assert leader.look(10) == [] and leader.look(10) == []
    assert leader.look(10) == [("a", "1")]


def test_recovery_right_after_an_outage_declares_nobody_dead_before_a_heartbeat_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the database is back, recovery may be due before the heartbeat is: what was seen last is old by then."""
    leader = Leader(monkeypatch)
    assert leader.look(0, a="1") == []
    leader.clock.now += 300
    leader.loop._recover()
    assert leader.link.declared == []


def test_a_short_worker_timeout_does_not_turn_each_interval_into_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    leader = Leader(monkeypatch)
    config = Config.load({"heartbeat_interval": 10, "worker_timeout": 20}, {})
    leader.loop.config = config
    assert leader.look(0, a="1") == []
    assert leader.look(10) == []
    assert leader.look(10) == [("a", "1")]


def test_who_is_gone_from_the_heartbeats_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    leader = Leader(monkeypatch)
    leader.look(0, a="1")
    del leader.link.rows["a"]
    leader.look(10)
    assert leader.loop.seen == {}
    assert leader.look(10, a="1") == [] and leader.look(10) == [] and leader.look(10) == []


def test_a_worker_that_is_missing_from_its_own_heartbeat_was_declared_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    leader = Leader(monkeypatch)
    worker = leader.loop.worker
    worker.registered.set()
    before = worker.id
    leader.link.rows = {"a": "1"}
    leader.loop._beat()
    assert worker.id != before and not worker.registered.is_set() and leader.loop.bell.is_set()


def test_a_locked_table_of_tasks_makes_nobody_look_dead(installed: str, conn: Connection, connect: Callable[..., Connection]) -> None:
    """The heartbeat touches `workers` alone."""
    with registered(installed) as worker:
        holder = connect(autocommit=False)
        holder.execute("lock table orchestrator.tasks, orchestrator.claims, orchestrator.task_events in access exclusive mode")
        before = value(conn, "select last_heartbeat from orchestrator.workers")
        worker.heartbeat.link.call("heartbeat", worker.id)
        assert value(conn, "select last_heartbeat from orchestrator.workers") > before
        holder.rollback()


# ---------------------------------------------------------------------------------------------------------------- the lease
def test_a_lease_counts_from_before_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    leader = Leader(monkeypatch, leader_term=10)
    worker = leader.loop.worker

    def slow(function: str, *args: Any) -> list[Any]:
        assert function == "acquire_leadership"
        leader.clock.now += 4
        return [(True, 7, "")]
    leader.link.call = slow    # type: ignore[method-assign]
    worker.term = None
    leader.loop._lead()
    assert worker.term == 7 and worker.leads() and worker.lease_until == pytest.approx(leader.clock.now - 4 + 9)
    leader.clock.now += 5.1
    assert not worker.leads()
    leader.link.call = lambda *args: [(False, 8, "")]    # type: ignore[method-assign]
    leader.loop._lead()
    assert worker.term is None and not worker.leads()


# ------------------------------------------------------------------------------------------------------------------- chores
def test_a_new_worker_sees_to_all_chores_at_once_but_counts_later(installed: str) -> None:
    before = time.monotonic()
    with registered(installed) as worker:
        later = [chore for chore in worker.heartbeat.chores.values() if chore.due > 0.0]
        assert [chore.run for chore in later] == [worker.heartbeat._sample_stats]
        assert before + 1.0 <= later[0].due <= time.monotonic() + 1.0


@pytest.mark.parametrize("broken", ["_recover", "_raise_floors", "_rescan_lanes", "_prune", "_sample_stats", "_lead"])
def test_a_chore_that_fails_stops_no_other(installed: str, conn: Connection, broken: str) -> None:
    with registered(installed) as worker:
        heartbeat, ran = worker.heartbeat, []
        for run, chore in heartbeat.chores.items():
            name = run.__name__    # type: ignore[attr-defined]

            def stand_in(name: str = name) -> None:
                ran.append(name)
                if name == broken:
                    raise psycopg.errors.UniqueViolation("planted")
            stand_in.__name__ = name
            chore.run, chore.due = stand_in, 0.0
        worker.term, worker.lease_until = 1, time.monotonic() + 60
        heartbeat.poll()
        assert sorted(ran) == sorted(run.__name__ for run in heartbeat.chores)    # type: ignore[attr-defined]
        due = [chore.due - time.monotonic() for run, chore in heartbeat.chores.items()
               if run.__name__ == broken]    # type: ignore[attr-defined]
        assert due[0] > 0    # not at once again
        assert worker.counters.errors["23"] == 1


def test_a_chore_that_fails_is_tried_again_soon_and_only_leaders_see_to_theirs(installed: str) -> None:
    with registered(installed) as worker:
        heartbeat, ran = worker.heartbeat, []
        chore = heartbeat.chores[heartbeat._prune]
        other = heartbeat.chores[heartbeat._beat]
        for one in heartbeat.chores.values():
            one.due = time.monotonic() + 1000

        def away() -> None:
            ran.append(1)
            raise psycopg.OperationalError("planted")
        chore.run, chore.due = away, 0.0
        heartbeat.poll()
        assert not ran    # it doesn't lead
        worker.term, worker.lease_until = 1, time.monotonic() + 60
        with pytest.raises(psycopg.OperationalError):
            heartbeat.poll()
        assert 0 < chore.due - time.monotonic() <= 2.0 and other.due > time.monotonic() + 900


def test_a_leader_prunes_on_while_there_is_more(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with registered(installed) as worker:
        heartbeat, more = worker.heartbeat, [True, False]
        monkeypatch.setattr(heartbeat, "_as_leader", lambda function, *args: (1000, 0, more.pop(0)))
        chore = heartbeat.chores[heartbeat._prune]
        worker.term, worker.lease_until = 1, time.monotonic() + 60
        for soon in (True, False):
            for one in heartbeat.chores.values():
                one.due = 0.0 if one is chore else time.monotonic() + 1000
            heartbeat.poll()
            assert (chore.due < time.monotonic() + 1) is soon and (chore.due > time.monotonic() + 50) is not soon


def test_where_raising_floors_helped_it_is_done_again_within_a_second(installed: str, conn: Connection) -> None:
    conn.execute("create table raised (at timestamptz)")
    replace(conn, "raise_floors", "insert into public.raised values (clock_timestamp()); select 1")
    with running(installed, {}):   # once a second, no two could be so close
        eventually(lambda: value(conn, "select min(gap) < '0.6 s' from (select at - lag(at) over (order by at) gap from raised) g"))


def replace(conn: Connection, function: str, body: str) -> None:
    """Have a function of the schema do something else."""
    [(arguments, result)] = conn.execute(
        "select pg_get_function_arguments(oid), pg_get_function_result(oid) from pg_proc "
        "where proname = %s and pronamespace = 'orchestrator'::regnamespace", [function]).fetchall()
    conn.execute(f"create or replace function orchestrator.{function}({arguments}) returns {result} language sql as $b$ {body} $b$")


def test_the_leader_rescans_for_at_most_a_200th_of_the_time(installed: str, conn: Connection) -> None:
    """Under an old snapshot the walk takes long, while others claim."""
    replace(conn, "rescan_lanes", "select 0 from pg_sleep(0.1)")
    with registered(installed) as worker:
        assert worker.heartbeat._rescan_lanes() > 20


def test_a_recovery_that_reached_its_limit_goes_on_at_once(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with registered(installed) as worker:
        heartbeat, answers = worker.heartbeat, [(500, 300, '{"a": 100}', 0, 0, 0), (1, 0, "{}", 0, 0, 0)]
        monkeypatch.setattr(heartbeat, "_as_leader", lambda function, *args: answers.pop(0))
        for soon in (True, False):
            delay = heartbeat._recover()
            assert (delay is not None and delay < 1) is soon
        assert worker.counters.dead_letters["a"] == 100 and worker.counters.recovered["released"] == 501


def test_a_stale_term_recovers_nothing_and_counts_nothing(installed: str) -> None:
    with registered(installed) as worker:
        worker.term = 99
        worker.heartbeat._recover()
        worker.heartbeat._prune()
        worker.heartbeat._sample_stats()
        assert not worker.counters.recovered.total() and worker.stats is None


# -------------------------------------------------------------------------------------------------------------- registering
def test_a_single_instance_recovers_at_once_at_its_start(installed: str, conn: Connection) -> None:
    for status in ("running", "claimed"):
        conn.execute("select orchestrator.register_worker(%s, 'host', 1, '1', '{\"a\": {\"base_delay\": 0}}')", [status])
        conn.execute("select orchestrator.enqueue('a')")
        claim_id = value(conn, "select claim_id from orchestrator.claim_tasks(%s, '{a}', 1)", status)
        if status == "running":
            conn.execute("select orchestrator.start_tasks(claim_id, array[id]) from orchestrator.tasks where claim_id = %s", [claim_id])
    with running(installed, {"a": Handler(lambda task: None, base_delay=0)}, worker_timeout=3600) as app:
        eventually(lambda: value(conn, "select count(*) from orchestrator.tasks where status = 'completed'") == 2)
        assert sorted(column(conn, "select attempts from orchestrator.tasks")) == [1, 2]
        assert value(conn, "select array_agg(id) from orchestrator.workers") == [worker_of(app).id]
    assert audit(conn) == []


def test_a_single_instance_beside_a_living_one_says_so_and_leaves_it_alone(
        installed: str, conn: Connection, caplog: pytest.LogCaptureFixture) -> None:
    gate = Gate()
    orchestrator.log.propagate = True
    with running(installed, {"a": gate}) as first:
        task_id = first.enqueue("a")
        wait_for(first, task_id, "running")
        with running(installed, {"b": lambda task: None}):
            assert "DISTRIBUTED_MODE is false, but 1 other worker lives" in caplog.text
            gate.open.set()
            assert wait_for(first, task_id)["attempts"] == 1
    assert audit(conn) == []


def test_a_schema_of_another_version_is_refused_with_the_way_out(installed: str, conn: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    conn.execute("create or replace function orchestrator.schema_version() returns int language sql immutable as 'select 99'")
    with pytest.raises(ConfigError, match="^DATABASE_URL: .* version 99, .* use the newer"):
        make_app(installed, {"a": lambda task: None}).start()
    conn.execute("create or replace function orchestrator.schema_version() returns int language sql immutable as 'select 1'")
    monkeypatch.setattr(orchestrator, "SCHEMA_VERSION", 2)
    with pytest.raises(ConfigError, match="run `python orchestrator.py install`"):
        make_app(installed, {"a": lambda task: None}).start()


def test_a_worker_installs_the_schema_where_there_is_none(db: str) -> None:
    with running(db, {"a": lambda task: None}) as app:
        assert wait_for(app, app.enqueue("a"), "completed")["attempts"] == 1
        assert app.call("schema_version") == [(orchestrator.SCHEMA_VERSION,)]


def test_a_worker_that_was_declared_dead_stops_what_it_runs_and_goes_on_under_a_new_id(installed: str, conn: Connection) -> None:
    reasons = []

    def listens(task: orchestrator.Task) -> None:
        if not reasons:
            assert task.cancelled.wait(10)
            reasons.append(task.cancel_reason)
            task.raise_if_cancelled()

    with running(installed, {"a": Handler(listens, base_delay=0)}) as app:
        worker = worker_of(app)
        old, task_id = worker.id, app.enqueue("a")
        wait_for(app, task_id, "running")
        conn.execute("update orchestrator.workers set declared_dead_at = now(), is_leader = false, idle = false")
        eventually(lambda: worker.id != old and worker.registered.is_set())
        task = wait_for(app, task_id)
        assert reasons == ["lost"] and task["status"] == "completed" and task["worker_id"] == worker.id
        found = [event["event"] for event in task["events"]]
        assert found in (["released"], ["recovered", "failed", "retry_scheduled"])   # whoever was first, it or the leader
    assert audit(conn) == []


def test_a_silent_worker_is_declared_dead_by_the_leader_and_its_tasks_are_recovered(installed: str, conn: Connection) -> None:
    """The whole way, with short intervals; a step of the database's clock would change nothing here."""
    register(conn, "silent", ["a"])
    task_id = enqueue(conn, "a")
    conn.execute("select from orchestrator.claim_tasks('silent', '{a}', 1)")
    settings: dict[str, Any] = {"heartbeat_interval": 0.1, "worker_timeout": 1, "leader_term": 0.5, "distributed_mode": True}
    with running(installed, {"a": lambda task: None}, **settings) as app:
        register(conn, "living", ["b"])
        stop = threading.Event()

        def beat() -> None:
            with psycopg.connect(installed, autocommit=True) as connection:
                while not stop.wait(0.1):
                    connection.execute("select orchestrator.heartbeat('living')")
        beating = threading.Thread(target=beat)
        beating.start()
        try:
            wait_for(app, task_id, "completed", timeout=20)
            assert "living" in column(conn, "select id from orchestrator.workers where declared_dead_at is null")
        finally:
            stop.set()
            beating.join()


def test_no_heartbeat_is_sent_by_a_worker_that_is_not_well(installed: str, conn: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    with registered(installed) as worker:
        before = value(conn, "select last_heartbeat from orchestrator.workers")
        monkeypatch.setattr(worker, "health", lambda: ["a loop has not moved"])
        worker.heartbeat.chores[worker.heartbeat._beat].due = 0.0
        assert worker.heartbeat.poll() == 1.0
        assert value(conn, "select last_heartbeat from orchestrator.workers") == before


