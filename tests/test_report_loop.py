"""The report loop: what the database refuses holds nothing up, giving back, careful starts, cancellations."""
from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

import orchestrator
from apps import (
    Gate,
    Relay,
    audit,
    claimed,
    end,
    events,
    make_app,
    obedient,
    registered,
    running,
    story,
    wait_for,
    worker_of,
)
from orchestrator import Handler, Outcome, Pool, ReportLoop, Snooze, Task
from postgres import eventually
from steps import column, enqueue, enqueue_some, register, value

Connection = psycopg.Connection[Any]


# ----------------------------------------------------------------------------------------------- what the database refuses
def test_what_the_database_refuses_is_a_failed_attempt_and_holds_nothing_up(installed: str, conn: Connection) -> None:
    deep: Any = None
    for _ in range(900):
        deep = [deep]
    conn.execute("alter table orchestrator.tasks add constraint small check (octet_length(result::text) < 1000)")
    results = {"deep": deep, "big": "x" * 2000, "good": 1}
    with running(installed, {"a": Handler(lambda task: results[task.payload], max_retries=0)}) as app:
        ids = {name: app.enqueue("a", name) for name in ("big", "good", "deep", "good")}
        assert wait_for(app, ids["good"])["result"] == 1
        assert "could not be recorded" in wait_for(app, ids["big"], "dead_letter")["last_error"]
        wait_for(app, ids["deep"], "dead_letter")
    assert audit(conn) == []


def test_a_task_that_can_not_even_fail_is_given_back_and_holds_nothing_up(installed: str, conn: Connection) -> None:
    refuse(conn, "bad")
    app = make_app(installed, {"bad": lambda task: None, "good": lambda task: None})
    app.enqueue("bad")
    with running(installed, app):
        eventually(lambda: worker_of(app).counters.rejected["bad"] >= 1)
        assert wait_for(app, app.enqueue("good"))["status"] == "completed"
        claims = worker_of(app).claims
        claims.chores[claims._release_forgotten].due = 0.0   # it looks every 10 seconds
        eventually(lambda: worker_of(app).counters.rejected["bad"] >= 2)
        assert not worker_of(app).health()
    assert audit(conn) == []


def refuse(conn: Connection, kind: str) -> None:
    """Have the database refuse every outcome of tasks of a type."""
    conn.execute(f"""
        create function refuse() returns trigger language plpgsql as $$ begin raise 'not %', random(); end $$;
        create trigger refuse before update on orchestrator.tasks for each row
        when (old.type = '{kind}' and new.status not in ('pending', 'claimed', 'running')) execute function refuse()""")


OUTCOMES = {
    "plain": None, "completed": Outcome("completed", "7"), "failed": Outcome("failed", "no", traceback="where"),
    "snoozed": Outcome("snoozed", after=1000.0), "longest snooze": Outcome("snoozed", after=float(orchestrator.LONGEST_DELAY)),
    "released": Outcome("released")}


@pytest.mark.parametrize("kind", OUTCOMES)
def test_a_locked_row_holds_up_no_other_outcome_of_any_kind(
        installed: str, conn: Connection, connect: Callable[..., Connection], kind: str) -> None:
    enqueue_some(conn, 2 * len(OUTCOMES) + 3, "a")
    with registered(installed) as worker:
        tasks = claimed(worker, 100)
        given = [OUTCOMES[kind], *OUTCOMES.values(), *OUTCOMES.values(), OUTCOMES[kind], OUTCOMES[kind]]
        locked, others = tasks[0], tasks[1:]
        holder = connect(autocommit=False)
        holder.execute("select from orchestrator.tasks where id = %s for update", [locked.id])
        for task, outcome in zip(tasks, given, strict=True):
            end(worker, task, outcome)
        worker.reports.poll()
        assert {task.id for task in others} & worker.tasks.keys() == set()
        assert list(worker.tasks.values()) == worker.reports.unreported == list(worker.reports.locked) == [locked]
        worker.reports.poll()    # not at once again
        assert worker.reports.locked and locked.ended == ""
        holder.rollback()
        worker.reports.locked[locked] = 0.0    # five seconds later
        worker.reports.poll()
        assert worker.tasks == {} and worker.reports.locked == {} and worker.reports.unreported == []
    assert value(conn, "select count(*) from orchestrator.tasks where status in ('claimed', 'running')") == 0
    assert audit(conn) == []


def test_an_outcome_that_is_refused_is_reworded_and_the_others_are_reported(installed: str, conn: Connection) -> None:
    """Of every kind, in one batch; a snooze over the limit is what SQL refuses by itself."""
    enqueue_some(conn, 8, "a")
    with registered(installed, {"a": Handler(lambda task: None, max_retries=0)}) as worker:
        tasks = claimed(worker, 10)
        bad = Outcome("snoozed", after=orchestrator.LONGEST_DELAY + 1e6)
        for task, outcome in zip(tasks, [bad, *OUTCOMES.values(), None], strict=True):
            end(worker, task, outcome)
        assert worker.reports.poll() == 0.0    # there is something to report at once
        assert list(worker.tasks.values()) == [tasks[0]]
        worker.reports.poll()
        assert worker.tasks == {}
    found = conn.execute("select status::text, last_error from orchestrator.tasks where id = %s", [tasks[0].id]).fetchone()
    assert found is not None and found[0] == "dead_letter" and "its outcome could not be recorded" in found[1]
    assert audit(conn) == []


def test_python_and_sql_agree_on_the_longest_snooze(installed: str, conn: Connection) -> None:
    with pytest.raises(ValueError, match="seconds"):
        Snooze(orchestrator.LONGEST_DELAY + 1)

    def snooze(task: Task) -> None:
        raise Snooze("3650d")
    with running(installed, {"a": snooze}) as app:
        task_id = app.enqueue("a")
        assert eventually(lambda: events(story(app, task_id))) == ["snoozed"]
        assert story(app, task_id)["status"] == "pending"


def test_a_chore_that_is_refused_stops_no_other(installed: str, conn: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    """Marks, progress and cancellations: the functions behind them are broken one by one."""
    monkeypatch.setattr(orchestrator, "LOCKED_SECONDS", 0.2)   # after which a refused task is tried again
    gates = Gate()

    def report(task: Task) -> None:
        task.progress(1)
        gates(task)
    for broken, signature in (("start_tasks", "p_claim_id bigint, p_ids uuid[]"),
                              ("record_progress", "p_claim_id bigint, p_id uuid, p_progress jsonb")):
        conn.execute(f"alter function orchestrator.{broken} rename to kept")
        conn.execute(f"create function orchestrator.{broken}({signature}) returns int language plpgsql as "
                     "$$ begin raise exception 'broken' using errcode = '23505'; end $$")
        with running(installed, {"gate": gates, "a": report, "stops": obedient, "quick": lambda task: None}) as app:
            task_id, stops = app.enqueue("a"), app.enqueue("stops")
            gates.wait_started()
            eventually(lambda app=app: worker_of(app).counters.errors["23"] >= 1)
            app.cancel(stops)
            assert wait_for(app, stops)["status"] == "cancelled"
            assert wait_for(app, app.enqueue("quick"))["status"] == "completed"
            gates.open.set()
            assert wait_for(app, task_id)["status"] == "completed"
            gates.open.clear()
        conn.execute(f"drop function orchestrator.{broken}; alter function orchestrator.kept rename to {broken}")


def test_a_locked_row_is_marked_later_and_its_neighbours_at_once(
        installed: str, conn: Connection, connect: Callable[..., Connection]) -> None:
    enqueue_some(conn, 5, "a")
    gate = Gate()
    with registered(installed, {"a": gate}) as worker:
        tasks = claimed(worker)
        holder = connect(autocommit=False)
        holder.execute("select from orchestrator.tasks where id = %s for update", [tasks[2].id])
        worker.pool.start()
        try:
            for _ in tasks:
                gate.wait_started()
            for task in tasks:
                task.started -= 1.0
            worker.reports.poll()
            assert [task.marked for task in tasks] == [True, True, False, True, True]
            assert list(worker.reports.locked) == [tasks[2]]
            holder.rollback()
            worker.reports.locked[tasks[2]] = 0.0
            worker.reports.poll()
            assert tasks[2].marked and worker.reports.locked == {}
            assert column(conn, "select distinct status::text from orchestrator.tasks") == ["running"]
        finally:
            gate.open.set()
            worker.pool.stop()


def test_large_results_are_reported_in_several_calls(installed: str, conn: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an outage: PostgreSQL closes the connection on a message of 1 GiB, and would again and again."""
    monkeypatch.setattr(orchestrator, "CALL_LIMIT", 100)
    lengths = [10, 98, 2, 1, 200, 1, 1]   # with the quotes
    make_app(installed, {}).enqueue_many("a", lengths)
    calls: list[int] = []
    with registered(installed) as worker:
        tasks = sorted(claimed(worker), key=lambda task: task.id)
        for task in tasks:
            end(worker, task, Outcome("completed", worker.router.result_json("x" * (task.payload - 2)) if task.payload > 1 else "1"))
        complete = worker.reports._report_completed
        monkeypatch.setattr(worker.reports, "_report_completed", lambda tasks: (calls.append(len(tasks)), complete(tasks))[1])
        worker.reports.poll()
    assert calls == [1, 2, 1, 1, 2]
    assert all(task.ended == "reported" for task in tasks)
    assert value(conn, "select count(*) from orchestrator.tasks where length(result::text) = (payload #>> '{}')::int") == 7
    assert audit(conn) == []


def test_a_task_that_is_handed_over_twice_is_reported_once(installed: str, conn: Connection) -> None:
    """As by a thread that was ended from outside just after it handed it over."""
    enqueue_some(conn, 2, "a")
    with registered(installed) as worker:
        tasks, worker.pool.interrupted = claimed(worker), True
        for task in (*tasks, *tasks):
            end(worker, task, None)
        worker.reports.poll()
        end(worker, tasks[0], None)
        worker.reports.poll()
        assert +worker.counters.completed == {("a", "completed"): 2} and not worker.counters.rejected.total()
    assert audit(conn) == []


@pytest.mark.parametrize("outcome", [None, Outcome("failed", "late"), Outcome("snoozed", after=1.0), Outcome("released")])
def test_the_late_outcome_of_a_claim_that_is_gone_leaves_the_next_claim_of_its_task_in_hand(
        installed: str, conn: Connection, outcome: Outcome | None) -> None:
    """A crash of the server forgot the claim while its handler ran, and this worker has claimed the task again."""
    enqueue_some(conn, 1, "a")
    with registered(installed) as worker:
        [first] = claimed(worker)
        assert value(conn, "select orchestrator.release_tasks(%s)", first.claim_id) == 1
        [second] = claimed(worker)
        end(worker, first, outcome)
        worker.reports.poll()
        assert worker.tasks == {second.id: second} and worker.counters.rejected == {"a": 1}
        end(worker, second, None)
        worker.reports.poll()
        assert not worker.tasks and column(conn, "select status::text from orchestrator.tasks") == ["completed"]
    assert audit(conn) == []


# ------------------------------------------------------------------------------------------------------------ giving back
@pytest.fixture
def greedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have workers hold more than they can run."""
    monkeypatch.setattr(Pool, "prefetch", lambda self: 40)
    monkeypatch.setattr(Pool, "overloaded", lambda self: False)


def test_what_could_not_be_given_back_is_given_back_later(installed: str, conn: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    overloaded, gate = threading.Event(), Gate()

    def no_database(self: ReportLoop, tasks: list[Task]) -> None:
        raise psycopg.OperationalError("the connection is lost")

    monkeypatch.setattr(Pool, "prefetch", lambda self: 20)
    monkeypatch.setattr(Pool, "overloaded", lambda self: overloaded.is_set())
    with running(installed, {"a": gate}, worker_pool_size=1) as app:
        app.enqueue("a")
        gate.wait_started()
        app.enqueue_many("a", range(10))
        eventually(lambda: value(conn, "select count(*) from orchestrator.tasks where status = 'claimed'") == 10)
        with monkeypatch.context() as patch:
            patch.setattr(ReportLoop, "_release", no_database)
            overloaded.set()
            eventually(lambda: worker_of(app).counters.errors["connection"] >= 2)
            overloaded.clear()
        gate.open.set()
        eventually(lambda: value(conn, "select count(*) from orchestrator.tasks where status = 'completed'") == 11)
    assert audit(conn) == []


def test_what_can_not_be_given_back_while_it_stops_does_not_start(
        installed: str, conn: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_database(self: ReportLoop, tasks: list[Task]) -> None:
        raise psycopg.OperationalError("the connection is lost")
    enqueue_some(conn, 3, "a")
    with registered(installed) as worker:
        tasks = claimed(worker)
        worker.draining.set()
        with monkeypatch.context() as patch:
            patch.setattr(ReportLoop, "_release", no_database)
            with pytest.raises(psycopg.OperationalError):
                worker.reports.poll()
        assert not worker.pool.ready and worker.reports.unreported == tasks
        worker.reports.poll()
        assert worker.tasks == {} and not worker.reports.unreported
    assert column(conn, "select distinct status::text from orchestrator.tasks") == ["pending"]


def test_a_locked_row_keeps_no_other_from_being_given_back(
        installed: str, conn: Connection, connect: Callable[..., Connection]) -> None:
    enqueue_some(conn, 5, "a")
    with registered(installed) as worker:
        tasks = claimed(worker)
        holder = connect(autocommit=False)
        holder.execute("select from orchestrator.tasks where id = %s for update", [tasks[1].id])
        worker.draining.set()
        worker.reports.poll()
        assert list(worker.tasks.values()) == worker.reports.unreported == [tasks[1]] and not worker.pool.ready
        holder.rollback()
        worker.reports.locked[tasks[1]] = 0.0
        worker.reports.poll()
        assert worker.tasks == {}
    assert column(conn, "select distinct status::text from orchestrator.tasks") == ["pending"]
    assert audit(conn) == []


def test_slow_tasks_are_not_hoarded(installed: str) -> None:
    runs: list[tuple[int, float, float]] = []

    def handler_of(number: int) -> Callable[[Task], None]:
        def slow(task: Task) -> None:
            began = time.monotonic()
            task.cancelled.wait(1)
            runs.append((number, began, time.monotonic()))
        return slow

    apps = [make_app(installed, {"slow": handler_of(n)}, worker_pool_size=5, distributed_mode=True) for n in range(2)]
    apps[0].enqueue_many("slow", range(20))
    with running(installed, apps[0]), running(installed, apps[1]):
        eventually(lambda: len(runs) == 20, 15)
    numbers = [number for number, _, _ in runs]
    assert min(numbers.count(0), numbers.count(1)) >= 6   # both work
    assert max(ended for *_, ended in runs) - min(began for _, began, _ in runs) < 3


# ----------------------------------------------------------------------------------------------------------- careful starts
def recovered_tasks(conn: Connection, count: int) -> list[str]:
    """Tasks that once lost their worker."""
    ids = enqueue_some(conn, count, "a")
    register(conn, "gone", ["a"])
    claim = value(conn, "select min(claim_id) from orchestrator.claim_tasks('gone', '{a}', 100)")
    conn.execute("select orchestrator.release_tasks(%s)", [claim])
    conn.execute("update orchestrator.tasks set recoveries = 1")
    conn.execute("delete from orchestrator.workers where id = 'gone'")
    return ids


def test_a_task_that_once_lost_its_worker_is_marked_running_before_it_starts(installed: str, conn: Connection) -> None:
    app = make_app(installed)
    ids = [app.enqueue("a") for _ in range(3)]
    conn.execute("select orchestrator.register_worker('gone', 'host', 1, '1', '{\"a\": {}}')")
    conn.execute("select from orchestrator.claim_tasks('gone', '{a}', 10)")
    seen = {}

    def look(task: Task) -> None:
        with psycopg.connect(installed) as connection:
            seen[task.id] = value(connection, "select status from orchestrator.tasks where id = %s", task.id)

    app.handler("a", look)
    with running(installed, app):
        for task_id in ids:
            assert wait_for(app, task_id)["attempts"] == 1
    assert seen == dict.fromkeys(ids, "running")


def test_recovered_tasks_start_one_after_the_other(installed: str, conn: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the one which kills its worker is charged for it, and its neighbours are not."""
    recovered_tasks(conn, 3)
    with registered(installed) as worker:
        tasks = claimed(worker)
        assert list(worker.reports.careful) == tasks and not worker.pool.ready
        reports, pool = worker.reports, worker.pool
        monkeypatch.setattr(pool, "idle", lambda: 10)
        reports.poll()
        assert list(pool.ready) == [tasks[0]] and tasks[0].marked and pool.tickets.get() == 1
        reports.poll()    # it has not started yet
        assert list(pool.ready) == [tasks[0]]
        pool.ready.clear()
        tasks[0].started = time.monotonic() + 60
        reports.poll()    # it runs, for less than CAREFUL_SECONDS
        assert not pool.ready
        tasks[0].started = time.monotonic() - orchestrator.CAREFUL_SECONDS
        reports.poll()    # it runs for longer: the next may start
        assert list(pool.ready) == [tasks[1]]
        pool.ready.clear()
        end(worker, tasks[1])
        reports.poll()    # it has ended
        assert list(pool.ready) == [tasks[2]]
        assert [task.marked for task in tasks] == [True] * 3


def test_a_careful_start_waits_for_an_idle_thread_and_does_not_begin_while_stopping(
        installed: str, conn: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    recovered_tasks(conn, 1)
    with registered(installed) as worker:
        [task] = claimed(worker)
        worker.reports.poll()    # there are no threads
        assert not worker.pool.ready and not task.marked
        monkeypatch.setattr(worker.pool, "idle", lambda: 1)
        worker.draining.set()
        worker.reports.poll()
        assert not worker.pool.ready and worker.tasks == {}    # given back
    assert conn.execute("select status::text, attempts from orchestrator.tasks").fetchone() == ("pending", 0)


def test_a_locked_row_keeps_no_other_recovered_task_from_starting(
        installed: str, conn: Connection, connect: Callable[..., Connection], monkeypatch: pytest.MonkeyPatch) -> None:
    recovered_tasks(conn, 2)
    with registered(installed) as worker:
        locked, other = claimed(worker)
        monkeypatch.setattr(worker.pool, "idle", lambda: 1)
        holder = connect(autocommit=False)
        holder.execute("select from orchestrator.tasks where id = %s for update", [locked.id])
        worker.reports.poll()
        worker.reports.poll()
        assert list(worker.pool.ready) == [other] and list(worker.reports.careful) == [locked]
        holder.rollback()


def test_a_recovered_task_that_was_cancelled_or_lost_meanwhile_does_not_start(
        installed: str, conn: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    recovered_tasks(conn, 2)
    with registered(installed) as worker:
        cancelled, lost = claimed(worker)
        monkeypatch.setattr(worker.pool, "idle", lambda: 1)
        conn.execute("select orchestrator.cancel_task(%s)", [cancelled.id])
        cancelled.cancel("cancelled")
        conn.execute("select orchestrator.release_tasks(%s, array[%s]::uuid[])", [lost.claim_id, lost.id])
        for _ in range(3):
            worker.reports.poll()
        assert not worker.pool.ready and worker.tasks == {} and not worker.reports.careful
        assert worker.counters.completed["a", "cancelled"] == 1 and worker.counters.rejected["a"] == 1
    assert sorted(column(conn, "select status::text from orchestrator.tasks")) == ["cancelled", "pending"]


# -------------------------------------------------------------------------------------------------------------- cancelling
def test_a_waiting_task_is_cancelled_at_once(installed: str) -> None:
    gate = Gate()
    with running(installed, {"a": gate}, worker_pool_size=1) as app:
        app.enqueue("a")
        gate.wait_started()
        pending, scheduled = app.enqueue("a"), app.enqueue("a", delay=60)
        assert app.cancel(pending) == app.cancel(scheduled) == "cancelled"
        gate.open.set()
        eventually(lambda: not worker_of(app).tasks)
        assert len(gate.tasks) == 1
        assert story(app, pending)["status"] == story(app, scheduled)["status"] == "cancelled"


def test_a_running_task_is_told_and_ends_as_cancelled(installed: str, conn: Connection) -> None:
    with running(installed, {"a": obedient}) as app:
        task_id = app.enqueue("a")
        eventually(worker_of(app).pool.running)
        assert app.cancel(task_id) == "cancelling"
        task = wait_for(app, task_id)
    assert task["status"] == "cancelled" and events(task) == ["cancel_requested", "cancelled"]
    assert audit(conn) == []


def test_a_handler_that_does_not_listen_ends_as_cancelled_too(installed: str) -> None:
    gate = Gate()
    with running(installed, {"a": gate, "b": Handler(lambda task: gate(task) or 1 / 0)}) as app:
        ids = [app.enqueue("a"), app.enqueue("b")]
        gate.wait_started()
        gate.wait_started()
        assert [app.cancel(i) for i in ids] == ["cancelling"] * 2
        gate.open.set()
        assert [wait_for(app, i)["status"] for i in ids] == ["cancelled"] * 2


def test_a_claimed_task_that_was_cancelled_never_starts(installed: str, greedy: None) -> None:
    gate = Gate()
    with running(installed, {"a": gate}, worker_pool_size=1) as app:
        worker = worker_of(app)
        app.enqueue("a")
        gate.wait_started()
        second = app.enqueue("a")
        wait_for(app, second, "claimed")
        assert app.cancel(second) == "cancelling"
        eventually(lambda: worker.tasks[second].cancel_reason == "cancelled")
        gate.open.set()
        wait_for(app, second, "cancelled")
        assert len(gate.tasks) == 1


def test_cancelling_works_without_notify(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orchestrator.ClaimLoop, "_hear", lambda self, channel: None)
    with running(installed, {"a": obedient}, heartbeat_interval=15) as app:
        task_id = app.enqueue("a")
        wait_for(app, task_id, "running")
        assert app.cancel(task_id) == "cancelling"
        assert wait_for(app, task_id, "cancelled")["status"] == "cancelled"


def test_a_notification_alone_cancels_nothing(installed: str, conn: Connection) -> None:
    """Anyone who may connect can send one, and its payload is not read: cancellations are read from the table."""
    gate = Gate()
    with running(installed, {"a": gate}) as app:
        task_id = app.enqueue("a")
        task = gate.wait_started()
        before = worker_of(app).reports.last_look
        conn.execute("select pg_notify('orchestrator_cancel', %s)", [task_id])
        eventually(lambda: worker_of(app).reports.last_look > before)
        assert task.cancel_reason is None
        gate.open.set()
        assert wait_for(app, task_id)["status"] == "completed"


def test_however_many_notifications_come_cancellations_are_looked_for_ten_times_a_second(installed: str, conn: Connection) -> None:
    enqueue(conn, "a")
    with registered(installed) as worker:
        claimed(worker)
        reports, looks = worker.reports, []
        call = reports.link.call
        reports.link.call = lambda name, *args: (looks.append(name), call(name, *args))[1]   # type: ignore[method-assign]
        reports.poll()
        began = time.monotonic()
        for _ in range(1000):
            reports.look_for_cancellations()
            reports.poll()
        assert looks.count("cancelling_tasks") <= 2 + 10 * (time.monotonic() - began)
        reports.last_look, reports.cancels_at = time.monotonic() - 0.1, time.monotonic() + 1
        reports.look_for_cancellations()
        assert reports.cancels_at <= time.monotonic()    # at once, as the last look was a while ago


# ---------------------------------------------------------------------------------------------------------------- timeouts
def test_a_handler_that_ignores_its_timeout_fails_and_the_pool_keeps_its_size(
        installed: str, conn: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orchestrator, "TIMEOUT_GRACE", 0.1)
    gate = Gate()
    with running(installed, {"stuck": Handler(gate, timeout=0.1, max_retries=0), "ok": lambda task: task.id}, worker_pool_size=2) as app:
        worker = worker_of(app)
        stuck = [app.enqueue("stuck") for _ in range(2)]
        for task_id in stuck:
            assert "did not stop" in wait_for(app, task_id, "dead_letter")["last_error"]
        wait_for(app, app.enqueue("ok"), "completed")
        eventually(lambda: len(worker.pool.slots) == 4 and worker.pool.idle() == 2)
        gate.open.set()   # their late answers change nothing, and their slots go
        eventually(lambda: len(worker.pool.slots) == 2)
        eventually(lambda: not worker.tasks)
        assert [story(app, task_id)["status"] for task_id in stuck] == ["dead_letter"] * 2
        eventually(lambda: sum(worker.counters.rejected.values()) == 2)
        wait_for(app, app.enqueue("ok"), "completed")
    assert audit(conn) == []


def test_at_its_timeout_a_handler_is_asked_to_stop(installed: str) -> None:
    reasons = []

    def listens(task: Task) -> None:
        assert task.cancelled.wait(10)
        reasons.append(task.cancel_reason)
        task.raise_if_cancelled()

    with running(installed, {"a": Handler(listens, timeout=0.1, max_retries=0)}) as app:
        task = wait_for(app, app.enqueue("a"))
    assert reasons == ["timeout"] and task["status"] == "dead_letter" and task["last_error"] == "timed out after 0.1 s"


def test_a_retry_may_run_while_the_abandoned_attempt_still_does(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orchestrator, "TIMEOUT_GRACE", 0.05)
    gates = [Gate(), Gate()]
    with running(installed, {"a": Handler(lambda task: gates[task.attempt - 1](task), timeout=0.3, base_delay=0, max_retries=1)}) as app:
        worker = worker_of(app)
        task_id = app.enqueue("a")
        gates[1].wait_started()
        gates[0].open.set()   # the first ends late: the second is still known, can be cancelled, and is waited for
        eventually(lambda: sum(worker.counters.rejected.values()) == 1)
        assert worker.tasks[task_id].attempt == 2
        gates[1].open.set()
        assert wait_for(app, task_id)["attempts"] == 2


# ----------------------------------------------------------------------------------------------------- the database is away
@pytest.mark.parametrize("how", ["cut", "silent"])
def test_a_timeout_is_kept_to_and_slots_are_replaced_while_the_database_is_away(
        installed: str, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(orchestrator, "TIMEOUT_GRACE", 0.2)
    gate, quick, stopped = Gate(), threading.Event(), threading.Event()

    def listens(task: Task) -> None:
        gate.started.release()
        assert task.cancelled.wait(20)
        stopped.set()
        task.raise_if_cancelled()
    relay = Relay(installed)
    handlers = {"listens": Handler(listens, timeout=1), "deaf": Handler(gate, timeout=1), "quick": lambda task: quick.set()}
    with running(relay.url + "?connect_timeout=2", handlers, worker_pool_size=2) as app:
        try:
            worker = worker_of(app)
            for kind in ("listens", "deaf"):
                app.enqueue(kind)
                assert gate.started.acquire(timeout=10)
            app.enqueue("quick")
            if how == "cut":
                relay.cut()
            else:
                relay.silent = True
            assert stopped.wait(5)
            eventually(lambda: len(worker.pool.slots) == 3 and sum(slot.abandoned for slot in worker.pool.slots) == 1)
            assert worker.pool.idle() == 2 and worker.health() == []
            assert len(worker.tasks) >= 2    # nothing of it is reported yet
        finally:
            gate.open.set()
            relay.cut()


def test_a_database_that_is_away_is_not_asked_again_and_again(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that runs on wakes the report loop often; it still keeps its distance between two attempts to connect."""
    relay, gate = Relay(installed), Gate()
    with running(relay.url, {"a": gate}) as app:
        app.enqueue("a")
        gate.wait_started()
        worker = worker_of(app)
        relay.cut()
        began, before = time.monotonic(), worker.counters.errors["connection"]
        bell = worker.pool.news
        while time.monotonic() < began + 1.5:
            bell.set()
            worker.stopped.wait(0.001)
        tried = worker.counters.errors["connection"] - before
        # from 25 ms, doubling: at most 7 attempts in 1.6 s, then one a second, by each of three loops
        assert tried <= 3 * (7 + time.monotonic() - began)
        gate.open.set()


# ----------------------------------------------------------------------------------------------------------------- pauses
def test_small_reports_keep_a_distance_but_not_when_it_stops(installed: str, conn: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orchestrator, "REPORT_PAUSE", 3600.0)
    gate = Gate()
    gate.open.set()
    with running(installed, {"t": gate}) as app:
        first = app.enqueue("t")
        wait_for(app, first, "completed")
        second = app.enqueue("t")
        gate.wait_started()
        gate.wait_started()
        eventually(lambda: len(worker_of(app).pool.finished) == 1)   # it has ended, and is not reported
        assert value(conn, "select status::text from orchestrator.tasks where id = %s", second) == "claimed"
        began = time.monotonic()
        app.stop(30)
        assert time.monotonic() - began < 15
    assert value(conn, "select status::text from orchestrator.tasks where id = %s", second) == "completed"


def test_progress_is_sent_at_most_twice_a_second_the_latest_of_it(installed: str, conn: Connection) -> None:
    sent: list[str] = []
    enqueue(conn, "a")
    with registered(installed) as worker:
        [task] = claimed(worker)
        chore = worker.reports.chores[worker.reports._send_progress]
        worker.reports.link.call = (   # type: ignore[method-assign]
            lambda name, *args: (sent.append(args[-1]) if name == "record_progress" else None) or [])
        worker.reports.do_chores()
        for n in range(5):
            task.progress(n)
            worker.reports.do_chores()
        assert sent == ["0"] and 0.4 < chore.due - time.monotonic() <= 0.5
        chore.due = 0.0
        worker.reports.do_chores()
        assert sent == ["0", "4"]
        task.progress(5)
        task.ended = "reported"
        chore.due = 0.0
        worker.reports.do_chores()
        assert sent == ["0", "4"] and worker.reports.progress == {}
