"""The worker: how each way a handler can end is recorded, and cancelling, timeouts, transactions, prefetch, reconnecting."""
from __future__ import annotations

import asyncio
import collections
import os
import select
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

import orchestrator
from apps import Relay, audit, events, make_app, running, story, wait_for, worker_of
from orchestrator import Cancelled, ClaimLost, Discard, Handler, Orchestrator, Retry, Snooze, Task
from postgres import LocalServer, eventually, install_schema
from steps import value

Connection = psycopg.Connection[Any]


class Gate:
    """A handler that says that it started, and waits until it may go on."""

    def __init__(self) -> None:
        self.started, self.open = threading.Semaphore(0), threading.Event()
        self.tasks: list[Task] = []

    def __call__(self, task: Task) -> None:
        self.tasks.append(task)
        self.started.release()
        assert self.open.wait(30)

    def wait_started(self) -> Task:
        assert self.started.acquire(timeout=15)
        return self.tasks[-1]


def obedient(task: Task) -> None:
    """Runs until it is asked to stop."""
    assert task.cancelled.wait(30)
    task.raise_if_cancelled()


def no_attempt_lost(conn: Connection) -> None:
    assert audit(conn) == []


# ------------------------------------------------------------------------------------------------------------ outcomes
class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no message")


def raising(error: BaseException) -> Callable[[Task], Any]:
    def handler(task: Task) -> None:
        raise error
    return handler


OUTCOMES: dict[str, tuple[Callable[[Task], Any], str, Any]] = {   # what it does, the status, what last_error says or the result is
    "none": (lambda task: None, "completed", None),
    "result": (lambda task: {"sum": [1, "ü", None]}, "completed", {"sum": [1, "ü", None]}),
    "false": (lambda task: False, "completed", False),
    "exception": (raising(ValueError("boom")), "dead_letter", "ValueError: boom (test_worker.py:"),
    "discard": (raising(Discard("no such customer")), "dead_letter", "no such customer"),
    "discard without words": (raising(Discard()), "dead_letter", "discarded"),
    "exit": (raising(SystemExit(3)), "dead_letter", "SystemExit: 3"),
    "interrupt": (raising(KeyboardInterrupt()), "dead_letter", "KeyboardInterrupt: "),
    "cancelled by itself": (raising(Cancelled("why not")), "dead_letter", "Cancelled: why not"),
    "unspeakable": (raising(Unspeakable()), "dead_letter", "Unspeakable: (its message cannot be shown)"),
    "NUL in the error": (raising(ValueError("a\0b")), "dead_letter", "ValueError: a\N{REPLACEMENT CHARACTER}b"),
    "surrogate in the error": (raising(ValueError("a\ud800b")), "dead_letter", "ValueError: a?b"),
    "huge error": (raising(ValueError("x" * 5_000_000)), "dead_letter", "xxx … xxx"),
    "not JSON": (lambda task: {1, 2}, "dead_letter", "not JSON"),
    "NaN": (lambda task: [float("nan")], "dead_letter", "not JSON"),
    "NUL in the result": (lambda task: {"a": "b\0c"}, "dead_letter", "U+0000"),
    "half a pair in the result": (lambda task: "\ud800", "dead_letter", "surrogate"),
    "recursive result": (lambda task: sys.modules, "dead_letter", "not JSON"),
    "huge result": (lambda task: "x" * 2_000_000, "dead_letter", "store the data elsewhere"),
    "too big a number": (lambda task: float("inf"), "dead_letter", "not JSON"),
}


def test_every_way_to_end_is_recorded(installed: str, conn: Connection) -> None:
    handlers = {name: Handler(function, max_retries=0) for name, (function, _, _) in OUTCOMES.items()}
    with running(installed, {**handlers, "ok": lambda task: None}) as app:
        ids = {name: app.enqueue(name) for name in OUTCOMES}
        for name, (_, status, said) in OUTCOMES.items():
            task = wait_for(app, ids[name])
            assert (name, task["status"], task["attempts"]) == (name, status, 1)
            if status == "completed":
                assert (name, task["result"]) == (name, said)
            else:
                assert said in task["last_error"] and len(task["last_error"]) <= 8192
        for _ in range(worker_of(app).config.worker_pool_size):   # no thread of the pool was lost
            wait_for(app, app.enqueue("ok"), "completed")
    no_attempt_lost(conn)


def test_a_failed_attempt_is_retried_until_it_succeeds(installed: str) -> None:
    attempts = []

    def third_time_lucky(task: Task) -> int:
        attempts.append(task.attempt)
        if task.attempt < 3:
            raise OSError("not yet")
        return task.attempt

    with running(installed, {"a": Handler(third_time_lucky, base_delay=0.01)}) as app:
        task = wait_for(app, app.enqueue("a"))
    assert attempts == [1, 2, 3] and (task["status"], task["result"], task["attempts"]) == ("completed", 3, 3)
    assert events(task) == ["failed", "retry_scheduled"] * 2


def test_retries_of_the_task_go_before_those_of_its_type(installed: str) -> None:
    with running(installed, {"a": Handler(raising(OSError()), max_retries=5, base_delay=0)}) as app:
        none, one = app.enqueue("a", max_retries=0), app.enqueue("a", max_retries=1)
        assert wait_for(app, none)["attempts"] == 1
        assert wait_for(app, one)["attempts"] == 2


def test_retry_after_is_kept_to(installed: str) -> None:
    with running(installed, {"a": raising(Retry("busy", after=1000))}) as app:
        task = wait_for(app, app.enqueue("a"), "retry_scheduled")
    assert "in 1000.000 s" in task["events"][-1]["detail"] and task["last_error"] == "busy"


def test_snooze_charges_no_attempt(installed: str) -> None:
    seen = []

    def twice(task: Task) -> None:
        seen.append(task.attempt)
        if len(seen) < 3:
            raise Snooze(0.01)

    with running(installed, {"a": Handler(twice, max_retries=0)}) as app:
        task = wait_for(app, app.enqueue("a"))
    assert seen == [1, 1, 1] and task["status"] == "completed" and task["attempts"] == 1
    assert events(task) == ["snoozed", "snoozed"]


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
    no_attempt_lost(conn)


def test_large_results_are_reported_in_several_calls(installed: str, conn: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an outage: PostgreSQL closes the connection on a message of 1 GiB, and would again and again."""
    monkeypatch.setattr(orchestrator, "CALL_LIMIT", 100)
    worker, calls = at_rest(installed), []
    worker._register()
    lengths = [10, 98, 2, 1, 200, 1, 1]   # with the quotes
    app = make_app(installed, {})
    app.enqueue_many("a", lengths)
    worker.arrived = orchestrator.claim_tasks(worker.links["claim"], worker.id, ["a"], 10)
    worker._hand_out(worker.id)
    tasks = sorted(worker.tasks.values(), key=lambda task: task.id)
    for task in tasks:
        task.outcome = orchestrator.Outcome("completed", orchestrator.result_json("x" * (task.payload - 2)) if task.payload > 1 else "1")
    complete = orchestrator.complete_tasks
    monkeypatch.setattr(orchestrator, "complete_tasks", lambda *args: (calls.append(len(args[3])), complete(*args))[1])
    worker._report(worker.links["report"], tasks)
    assert calls == [1, 2, 1, 1, 2]
    assert all(task.settled for task in tasks)
    assert value(conn, "select count(*) from orchestrator.tasks where length(result::text) = (payload #>> '{}')::int") == 7
    no_attempt_lost(conn)


def test_a_call_that_would_be_too_large_for_postgresql_is_refused(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orchestrator, "CALL_LIMIT", 2 ** 17)
    app = make_app(installed, {})
    with pytest.raises(ValueError, match="payloads: over 1 MiB in one call; add them in several"):
        app.enqueue_many("a", ["x" * 2 ** 18] * 4)
    app.enqueue_many("a", ["x" * (2 ** 18 - 100)] * 3)


def test_a_task_that_can_not_even_fail_is_given_back_and_holds_nothing_up(installed: str, conn: Connection) -> None:
    conn.execute("""
        create function refuse() returns trigger language plpgsql as $$ begin raise 'not %', random(); end $$;
        create trigger refuse before update on orchestrator.tasks for each row
        when (old.type = 'bad' and new.status not in ('pending', 'claimed', 'running')) execute function refuse()""")
    app = make_app(installed, {"bad": lambda task: None, "good": lambda task: None})
    app.enqueue("bad")
    with running(installed, app):
        eventually(lambda: worker_of(app).metrics.rejected["bad"] >= 1)
        assert wait_for(app, app.enqueue("good"))["status"] == "completed"
        worker_of(app).forgotten_at = 0.0   # it looks every 10 seconds
        eventually(lambda: worker_of(app).metrics.rejected["bad"] >= 2)
        assert not worker_of(app).health()
    no_attempt_lost(conn)


def test_a_task_of_a_type_without_a_handler_stays_and_show_says_so(installed: str) -> None:
    with running(installed, {"a": lambda task: None}) as app:
        stranger = app.enqueue("b")
        wait_for(app, app.enqueue("a"))
        task = story(app, stranger)
    assert task["status"] == "pending" and "no live worker handles b" in task["explanation"]


def test_a_pattern_gets_types_that_were_never_seen_before(installed: str) -> None:
    seen = []
    with running(installed, {"mail:": lambda task: seen.append(task.type)}) as app:
        wait_for(app, app.enqueue("mail:first"))
        wait_for(app, app.enqueue("mail:second"))
    assert seen == ["mail:first", "mail:second"]


def test_higher_priority_is_claimed_first(installed: str) -> None:
    app = make_app(installed, worker_pool_size=1)
    order: list[int] = []
    app.handler("a", lambda task: order.append(task.priority))
    for priority in (1, -5, 9, 0):
        app.enqueue("a", priority=priority)
    with running(installed, app):
        eventually(lambda: len(order) == 4)
    assert order == [9, 1, 0, -5]


def test_progress_shows_while_it_runs(installed: str) -> None:
    gate = Gate()

    def report(task: Task) -> None:
        task.progress({"done": 1})
        gate(task)

    with running(installed, {"a": report}) as app:
        task_id = app.enqueue("a")
        eventually(lambda: story(app, task_id)["result"] == {"done": 1})
        gate.open.set()
        assert wait_for(app, task_id)["status"] == "completed"


# ------------------------------------------------------------------------------------------------------------------- async
def test_async_handlers_run_together_on_one_thread(installed: str) -> None:
    threads, together = set(), 0
    arrived: asyncio.Event | None = None

    async def meet(task: Task) -> str:
        nonlocal together, arrived
        threads.add(threading.get_ident())
        arrived = arrived or asyncio.Event()
        together += 1
        if together == 3:
            arrived.set()
        await asyncio.wait_for(arrived.wait(), 10)
        return "met"

    with running(installed, {"a": meet}) as app:
        assert [wait_for(app, i)["result"] for i in [app.enqueue("a") for _ in range(3)]] == ["met"] * 3
    assert len(threads) == 1


@pytest.mark.parametrize("error", [ValueError("boom"), SystemExit("boom"), KeyboardInterrupt("boom")])
def test_an_async_handler_that_raises_fails_alone(installed: str, error: BaseException) -> None:
    async def either(task: Task) -> int:
        await asyncio.sleep(0)
        if task.payload:
            raise error
        return 1

    with running(installed, {"a": Handler(either, max_retries=0)}) as app:
        assert "boom" in wait_for(app, app.enqueue("a", True), "dead_letter")["last_error"]
        assert wait_for(app, app.enqueue("a", False))["result"] == 1


def test_a_cancelled_async_handler_ends_before_its_task_does(installed: str) -> None:
    started, cleaned, may_clean = threading.Event(), threading.Event(), threading.Event()

    async def sleeper(task: Task) -> None:
        started.set()
        try:
            await asyncio.sleep(60)
        finally:
            while not may_clean.is_set():
                await asyncio.sleep(0.01)
            cleaned.set()

    with running(installed, {"a": sleeper, "b": lambda task: None}) as app:
        task_id = app.enqueue("a")
        assert started.wait(10)
        task = worker_of(app).tasks[task_id]
        assert app.cancel(task_id) == "cancelling"
        eventually(lambda: task.cancel_reason == "cancelled")
        wait_for(app, app.enqueue("b"))   # what ended is reported by then
        assert story(app, task_id)["status"] in ("claimed", "running")
        may_clean.set()
        wait_for(app, task_id, "cancelled")
    assert cleaned.is_set()


def test_an_async_handler_is_cancelled_at_its_timeout(installed: str) -> None:
    async def sleeper(task: Task) -> None:
        await asyncio.sleep(60)

    with running(installed, {"a": Handler(sleeper, timeout=0.1, max_retries=0)}) as app:
        assert wait_for(app, app.enqueue("a"))["last_error"] == "timed out after 0.1 s"


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
        eventually(lambda: worker_of(app).running_tasks())
        assert app.cancel(task_id) == "cancelling"
        task = wait_for(app, task_id)
    assert task["status"] == "cancelled" and events(task) == ["cancel_requested", "cancelled"]
    no_attempt_lost(conn)


def test_a_handler_that_does_not_listen_ends_as_cancelled_too(installed: str) -> None:
    gate = Gate()
    with running(installed, {"a": gate, "b": Handler(lambda task: gate(task) or 1 / 0)}) as app:
        ids = [app.enqueue("a"), app.enqueue("b")]
        gate.wait_started()
        gate.wait_started()
        assert [app.cancel(i) for i in ids] == ["cancelling"] * 2
        gate.open.set()
        assert [wait_for(app, i)["status"] for i in ids] == ["cancelled"] * 2


@pytest.fixture
def greedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have workers hold more than they can run."""
    monkeypatch.setattr(orchestrator.Worker, "prefetch", lambda self: 40)
    monkeypatch.setattr(orchestrator.Worker, "_overloaded", lambda self: False)


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
    monkeypatch.setattr(orchestrator.Worker, "_notified", lambda self, channel, payload: None)
    with running(installed, {"a": obedient}, heartbeat_interval=15) as app:
        task_id = app.enqueue("a")
        wait_for(app, task_id, "running")
        app.cancel(task_id)
        wait_for(app, task_id, "cancelled")


# ---------------------------------------------------------------------------------------------------------------- timeouts
def test_at_its_timeout_a_handler_is_asked_to_stop(installed: str) -> None:
    reasons = []

    def listens(task: Task) -> None:
        assert task.cancelled.wait(10)
        reasons.append(task.cancel_reason)
        task.raise_if_cancelled()

    with running(installed, {"a": Handler(listens, timeout=0.1, max_retries=0)}) as app:
        task = wait_for(app, app.enqueue("a"))
    assert reasons == ["timeout"] and task["status"] == "dead_letter" and task["last_error"] == "timed out after 0.1 s"


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
        assert len(worker.places) == 4 and worker.idle_places() == 2
        gate.open.set()   # their late answers change nothing, and their places go
        eventually(lambda: len(worker.places) == 2)
        eventually(lambda: worker.in_hand() == 0)
        assert [story(app, task_id)["status"] for task_id in stuck] == ["dead_letter"] * 2
        assert sum(worker.metrics.rejected.values()) == 2
        wait_for(app, app.enqueue("ok"), "completed")
    no_attempt_lost(conn)


def test_more_stuck_handlers_than_places_shrink_the_pool_until_they_return(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orchestrator, "TIMEOUT_GRACE", 0.05)
    gate = Gate()
    with running(installed, {"stuck": Handler(gate, timeout=0.05, max_retries=0), "ok": lambda task: None}, worker_pool_size=1) as app:
        worker = worker_of(app)
        for task_id in [app.enqueue("stuck") for _ in range(2)]:
            wait_for(app, task_id, "dead_letter")
        waiting = app.enqueue("ok")
        eventually(lambda: worker.idle_places() == 0)
        gate.open.set()
        wait_for(app, waiting, "completed")
        eventually(lambda: len(worker.places) == 1)


def test_a_retry_may_run_while_the_abandoned_attempt_still_does(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orchestrator, "TIMEOUT_GRACE", 0.05)
    gates = [Gate(), Gate()]
    with running(installed, {"a": Handler(lambda task: gates[task.attempt - 1](task), timeout=0.3, base_delay=0, max_retries=1)}) as app:
        worker = worker_of(app)
        task_id = app.enqueue("a")
        gates[1].wait_started()
        gates[0].open.set()   # the first ends late: the second is still known, can be cancelled, and is waited for
        eventually(lambda: sum(worker.metrics.rejected.values()) == 1)
        assert worker.tasks[task_id].attempt == 2
        gates[1].open.set()
        assert wait_for(app, task_id)["attempts"] == 2


# ------------------------------------------------------------------------------------------------------------- transactions
@pytest.fixture
def ledger(conn: Connection) -> Callable[[], list[str]]:
    conn.execute("create table ledger (entry text)")
    return lambda: [entry for (entry,) in conn.execute("select entry from ledger order by entry")]


def test_a_transaction_commits_the_writes_and_the_completion_together(installed: str, conn: Connection, ledger: Any) -> None:
    seen = []

    def pay(task: Task) -> str:
        with task.transaction() as connection:
            connection.execute("insert into ledger values ('paid')")
            seen.append((ledger(), value(conn, "select status from orchestrator.tasks")))
        seen.append((ledger(), value(conn, "select status from orchestrator.tasks")))
        return "not kept: it completed before"

    with running(installed, {"a": pay}) as app:
        task = wait_for(app, app.enqueue("a"), "completed")
        eventually(lambda: not worker_of(app).tasks)
    assert seen[0][0] == [] and seen[0][1] in ("claimed", "running") and seen[1] == (["paid"], "completed")
    assert task["attempts"] == 1
    no_attempt_lost(conn)


def test_an_exception_rolls_the_writes_back(installed: str, ledger: Any) -> None:
    def fails(task: Task) -> None:
        with task.transaction() as connection:
            connection.execute("insert into ledger values ('paid')")
            raise ValueError("no")

    with running(installed, {"a": Handler(fails, max_retries=0)}) as app:
        assert "ValueError: no" in wait_for(app, app.enqueue("a"), "dead_letter")["last_error"]
    assert ledger() == []


def test_a_stolen_claim_aborts_the_transaction(installed: str, conn: Connection, ledger: Any) -> None:
    stolen, errors = [], []

    def robbed(task: Task) -> None:
        try:
            with task.transaction() as connection:
                connection.execute("insert into ledger values (%s)", [str(task.attempt)])
                if not stolen:
                    stolen.append(task.claim_id)   # as the leader would, had this worker been declared dead
                    conn.execute("select orchestrator.release_tasks(%s)", [task.claim_id])
        except ClaimLost as error:
            errors.append(error)
            raise

    with running(installed, {"a": robbed}) as app:
        task = wait_for(app, app.enqueue("a"))
    assert task["status"] == "completed" and len(errors) == 1
    assert ledger() == ["1"]
    no_attempt_lost(conn)


def test_a_cancel_aborts_the_transaction(installed: str, ledger: Any) -> None:
    gate = Gate()

    def pay(task: Task) -> None:
        with task.transaction() as connection:
            connection.execute("insert into ledger values ('paid')")
            gate(task)

    with running(installed, {"a": pay}) as app:
        task_id = app.enqueue("a")
        gate.wait_started()
        app.cancel(task_id)
        gate.open.set()
        wait_for(app, task_id, "cancelled")
    assert ledger() == []


def test_a_transaction_has_psycopgs_usual_values_and_no_limit_on_its_statements(installed: str) -> None:
    seen: list[Any] = []

    def look(task: Task) -> None:
        with task.transaction() as connection:
            seen.append(connection.execute("select '{\"a\": 1}'::jsonb, now(), current_setting('statement_timeout')").fetchone())

    with running(installed, {"a": look}) as app:
        wait_for(app, app.enqueue("a"), "completed")
    assert seen[0][0] == {"a": 1} and hasattr(seen[0][1], "tzinfo") and seen[0][2] == "0"


# ------------------------------------------------------------------------------------------------------------------ prefetch
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
    assert min(collections.Counter(number for number, _, _ in runs).values()) >= 6   # both work
    assert max(ended for *_, ended in runs) - min(began for _, began, _ in runs) < 3


def test_a_slow_task_does_not_hold_up_those_behind_it(installed: str) -> None:
    gate, done = Gate(), []

    def mixed(task: Task) -> None:
        if task.payload == "slow":
            gate(task)
        else:
            done.append(task.payload)

    with running(installed, {"a": mixed}, worker_pool_size=2) as app:
        worker = worker_of(app)
        app.enqueue_many("a", range(1000))
        eventually(lambda: len(done) == 1000)
        assert worker.mean is not None
        worker.mean = 1e-5   # known to be quick: the next come in long slices
        app.enqueue_many("a", ["slow", *range(300)])
        gate.wait_started()
        eventually(lambda: len(done) == 1300, 5)
        gate.open.set()


# ------------------------------------------------------------------------------------------------------- the database goes away
def test_a_worker_connects_again_when_its_connections_are_cut(
        installed: str, conn: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()
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
        heard: list[tuple[str, str]] = []
        monkeypatch.setattr(orchestrator.Worker, "_notified", lambda self, channel, payload: heard.append((channel, payload)))
        for channel in ("orchestrator", "orchestrator_cancel"):   # it listens again
            conn.execute(f"notify {channel}, 'ok'")
            eventually(lambda channel=channel: (channel, "ok") in heard)
    no_attempt_lost(conn)


def wait_for_on(conn: Connection, task_id: str, status: str) -> None:
    eventually(lambda: value(conn, "select status from orchestrator.tasks where id = %s", task_id) == status, 15)


@pytest.mark.parametrize("rings", ["set", "notify", "notify while it claims"])
def test_a_ring_wakes_the_claim_loop_at_once(installed: str, conn: Connection, monkeypatch: pytest.MonkeyPatch, rings: str) -> None:
    """However it comes: from this process, over the connection while it waits, or along with the answer to a claim."""
    claims = 0
    claim_tasks = orchestrator.claim_tasks
    waiting = orchestrator.Worker._wait_for_bell

    def claim_and_count(link: Any, *args: Any) -> Any:
        nonlocal claims
        claims += 1
        if rings == "notify while it claims" and claims == 5:
            link.connection.execute("notify orchestrator, 'a'")   # its own: it arrives together with the answer
        return claim_tasks(link, *args)

    monkeypatch.setattr(orchestrator, "claim_tasks", claim_and_count)
    monkeypatch.setattr(orchestrator.Worker, "_wait_for_bell", lambda self, seconds: waiting(self, 1000 if claims >= 5 else 0.01))
    with running(installed, {"a": lambda task: None}) as app:
        if rings != "notify while it claims":
            eventually(lambda: claims == 5)   # from here on it waits for ever
            if rings == "set":
                worker_of(app).wake_claim.set()
            else:
                conn.execute("notify orchestrator, 'a'")
        eventually(lambda: claims == 6)


def at_rest(url: str) -> orchestrator.Worker:
    """A worker whose threads were never started."""
    app = make_app(url, {"a": lambda task: None}, worker_pool_size=10)
    return orchestrator.Worker(app.config, app.router)


def test_a_notification_that_was_read_along_with_an_answer_is_heard_before_waiting(installed: str, conn: Connection) -> None:
    worker = at_rest(installed)
    link = worker.links["claim"]
    worker._listen(link)
    connection = link.open()
    conn.execute("notify orchestrator, 'a'")
    assert select.select([connection], [], [], 10)[0]
    connection.pgconn.consume_input()   # out of the socket, so that nothing is left for poll() to see
    assert not worker.wake_claim._rung
    worker._wait_for_bell(0)
    assert worker.wake_claim._rung
    link.close()


def test_a_bell_rings_until_it_is_cleared_and_again_after() -> None:
    bell = orchestrator.Bell()

    def rings() -> bool:
        return bool(select.select([bell], [], [], 0)[0])
    for _ in range(2):
        assert not rings()
        bell.set()
        bell.set()
        assert rings()
        bell.clear()
        bell.clear()   # must not block
    assert not rings()


@pytest.mark.parametrize("mean, in_hand, held, room", [
    (None, 0, 0, 0),            # not measured yet: no more than there are idle places, and here there are none
    (1.0, 0, 0, 1),             # ten places start ten tasks a second, so one within HOLD_SECONDS
    (1.0, 1, 1, 0),
    (1e-6, 0, 0, 2000),         # at once; 4,000 in all
    (1e-6, 2000, 2000, 2000),
    (1e-6, 2400, 2400, 1600),   # claims again at 60%
    (1e-6, 2401, 2401, 0),
    (1e-6, 0, 5000, 1010),      # finished and not reported counts: 6,000 and the pool at most
    (1e-6, 0, 6010, 0)])
def test_how_many_tasks_a_worker_claims(installed: str, mean: float | None, in_hand: int, held: int, room: int) -> None:
    worker = at_rest(installed)
    worker.mean, worker.handed = mean, in_hand
    worker.tasks = dict.fromkeys(map(str, range(held)))
    assert worker._room() == room


def test_a_new_worker_sees_to_all_chores_at_once_but_counts_later(installed: str) -> None:
    worker = at_rest(installed)
    before = time.monotonic()
    worker._register()
    later = [chore for chore in worker.chores if chore[0] > 0.0]
    assert [chore[3] for chore in later] == [worker._count]
    assert before + 1.0 <= later[0][0] <= time.monotonic() + 1.0


def test_large_payloads_bound_what_a_worker_holds(installed: str) -> None:
    worker = at_rest(installed)
    worker._register()
    worker.mean = 1e-6
    app = make_app(installed, {})
    for length, prefetch in ((100, 4000), (2 ** 18 - 2, 2 ** 8), (100, 4000)):
        app.enqueue_many("a", ["x" * length] * 3)
        worker.arrived = orchestrator.claim_tasks(worker.links["claim"], worker.id, ["a"], 10)
        worker._hand_out(worker.id)
        assert worker.prefetch() == prefetch
        worker._hand_out(worker.id)   # nothing came: nothing is known of it
        assert worker.prefetch() == prefetch
        worker.handed, held = 0, worker.tasks
        worker.tasks = dict.fromkeys(map(str, range(int(1.5 * prefetch))))   # finished, not yet reported
        assert worker._room() == 10
        worker.tasks = held


def test_what_arrived_but_was_not_handed_out_counts(installed: str) -> None:
    worker = at_rest(installed)
    worker.mean, worker.arrived = 1e-6, [()] * 2400
    assert worker._room() == 1600
    worker.tasks = dict.fromkeys(map(str, range(3000)))
    assert worker._room() == 6010 - 3000 - 2400


@pytest.mark.parametrize("texts", [[], [None], ["NULL", None, ""], ['a"b', "a\\b", '\\"', "a,b", "{x}", " ' ", "é\n\t"]])
def test_an_array_literal_holds_any_text(pure: Connection, texts: list[str | None]) -> None:
    assert value(pure, "select %s::text[]", orchestrator._texts(texts)) == texts


def test_a_link_does_something_else_while_the_server_works(installed: str, conn: Connection) -> None:
    link = orchestrator.Link(make_app(installed, {}).config)
    conn.execute("create table seen (n int)")
    done: list[int] = []

    def meanwhile() -> None:
        done.append(1)
        conn.execute("select pg_advisory_unlock(1)")   # what the server waits for: called later, it would wait for ever
    waited = "with waited as materialized (select pg_advisory_xact_lock(1)) "
    conn.execute("select pg_advisory_lock(1)")
    assert link.call(waited + "insert into seen select 7 from waited returning n", meanwhile=meanwhile) == [(7,)]
    assert done == [1]
    assert value(conn, "select n from seen") == 7   # committed when it returns
    conn.execute("select pg_advisory_lock(1)")
    with pytest.raises(psycopg.errors.DivisionByZero):
        link.call(waited + "select 1 / %s from waited", 0, meanwhile=meanwhile)
    assert done == [1, 1]
    connection = link.open()
    with pytest.raises(ZeroDivisionError):
        link.call("select %s::int", 5, meanwhile=lambda: done.append(1 // 0))
    assert link.open() is not connection   # whose answer nobody read
    assert link.call("select %s::int", 5, meanwhile=lambda: done.append(3)) == [(5,)]
    assert done[2:] == [3]
    link.close()


def test_where_raising_floors_helped_it_is_done_again_within_a_second(installed: str, conn: Connection) -> None:
    conn.execute("create table raised (at timestamptz)")
    conn.execute("create or replace function orchestrator.raise_floors(p_worker_id text, p_term bigint, p_worth interval default '0') "
                 "returns int language sql as 'insert into public.raised values (clock_timestamp()); select 1'")
    with running(installed, {}):   # once a second, no two could be so close
        eventually(lambda: value(conn, "select min(gap) < '0.6 s' from (select at - lag(at) over (order by at) gap from raised) g"))


def test_the_leader_rescans_for_at_most_a_200th_of_the_time(installed: str, conn: Connection) -> None:
    """Under an old snapshot the walk takes long, while others claim."""
    worker = at_rest(installed)
    worker._register()
    conn.execute("create or replace function orchestrator.rescan_lanes(p_worker_id text, p_term bigint, "
                 "p_budget interval default '0') returns int language sql as 'select 0 from pg_sleep(0.1)'")
    [chore] = [chore for chore in worker.chores if chore[3] == worker._rescan]
    now = time.monotonic()
    worker._rescan(worker.links["heartbeat"])
    assert chore[0] - now > 20
    worker.links["heartbeat"].close()


def test_a_link_opens_anew_when_its_prepared_statements_no_longer_fit(installed: str, conn: Connection) -> None:
    link = orchestrator.Link(make_app(installed, {}).config)
    conn.execute("create table widened (a int)")
    assert link.call("select * from widened") == []
    conn.execute("alter table widened add b int")
    with pytest.raises(psycopg.errors.FeatureNotSupported, match="cached plan"):
        link.call("select * from widened")
    assert link.call("select 1") == [(1,)]
    link.call("deallocate all")
    with pytest.raises(psycopg.errors.InvalidSqlStatementName):
        link.call("select 1")
    assert link.call("select 1") == [(1,)]
    connection = link.open()
    with pytest.raises(psycopg.errors.SyntaxError):
        link.call("selec 1")
    assert link.call("select 2") == [(2,)]   # under the name that the other didn't get
    assert link.open() is connection
    link.close()


def test_a_link_that_was_interrupted_while_preparing_opens_anew(
        installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server has prepared it, and the link doesn't know: the name must not be used again."""
    link = orchestrator.Link(make_app(installed, {}).config)
    connection = link.open()
    answer = link._answer

    def interrupted(connection: Connection) -> None:
        answer(connection)
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(link, "_answer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            link.call("select 1")
    assert link.call("select 1") == [(1,)]
    assert link.open() is not connection
    link.close()


@pytest.mark.parametrize("prepared", [True, False])
def test_a_link_prepares_each_query_once_if_at_all_and_keeps_no_answer(installed: str, prepared: bool) -> None:
    link = orchestrator.Link(make_app(installed, {}, prepared_statements=prepared).config)
    for argument, text in ((1, "1"), (2 ** 40, "1099511627776"), (None, None), (True, "t"), ("é", "é"), (0.5, "0.5"), ([1, 2], "{1,2}")):
        assert link.call("select %s::text, %s::int + 1", argument, 6) == [(text, 7)]
    statements = [row[0] for row in link.call("select statement from pg_prepared_statements where not from_sql")]
    assert [text for text in statements if "::int" in text] == (["select $1::text, $2::int + 1"] if prepared else [])
    with pytest.raises(psycopg.InterfaceError):   # nothing that it could load
        link._adapter.load_rows(0, 1, tuple)
    link.close()


def test_a_commit_that_fails_returns_no_rows_although_they_have_arrived(installed: str, conn: Connection) -> None:
    conn.execute("create table seen (n int unique deferrable initially deferred)")
    conn.execute("insert into seen values (7)")
    link = orchestrator.Link(make_app(installed, {}).config)
    with pytest.raises(psycopg.errors.UniqueViolation):
        link.call("insert into seen values (7) returning n", meanwhile=lambda: None)
    link.close()


def test_what_was_claimed_is_handed_out_also_if_the_next_claim_fails(
        installed: str, conn: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    """A claim that filled the room is handed out while the next is under way: it must not depend on how that ends."""
    claim_tasks, failed = orchestrator.claim_tasks, 0

    def claim_or_fail(*args: Any) -> Any:
        nonlocal failed
        if args[4] is not None and not failed:   # there are some to hand out
            failed += 1
            raise psycopg.OperationalError("planted")
        return claim_tasks(*args)
    monkeypatch.setattr(orchestrator, "claim_tasks", claim_or_fail)
    monkeypatch.setattr(orchestrator, "CLAIM_MAX", 2)
    monkeypatch.setattr(orchestrator.Worker, "prefetch", lambda self: 4)
    app = make_app(installed, {"a": lambda task: None}, worker_pool_size=2)
    app.enqueue_many("a", range(4))
    with running(installed, app):
        eventually(lambda: value(conn, "select count(*) from orchestrator.tasks where status = 'completed'") == 4)
    assert failed == 1
    assert value(conn, "select count(*) from orchestrator.task_events") == 0   # none was given back, to be claimed again


def test_what_was_claimed_by_a_worker_declared_dead_meanwhile_is_lost(installed: str, conn: Connection) -> None:
    worker = at_rest(installed)
    worker._register()
    claimed_as = worker.id
    value(conn, "select orchestrator.enqueue('a')")
    worker.arrived = orchestrator.claim_tasks(worker.links["claim"], claimed_as, ["a"], 5)
    worker._declared_dead(claimed_as)
    worker._hand_out(claimed_as)
    assert [task.cancel_reason for task in worker.tasks.values()] == ["lost"]


def test_polling_carries_on_where_no_notification_arrives(installed: str, conn: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orchestrator.Worker, "_notified", lambda self, channel, payload: None)
    with running(installed, {"a": lambda task: None}) as app:
        wait_for(app, app.enqueue("a"), "completed", timeout=3)


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
        eventually(lambda: worker_of(app).metrics.errors["connection"] >= 2)
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


def test_a_server_that_falls_silent_is_given_up(installed: str, conn: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that is stopped neither answers nor closes, which TCP keepalive can't see."""
    link = orchestrator.Link(make_app(installed).config)
    pid = link.call("select pg_backend_pid()")[0][0]
    blocker = psycopg.connect(installed)
    blocker.execute("select pg_advisory_lock(1)")
    monkeypatch.setattr(orchestrator, "STATEMENT_TIMEOUT", -4.5)   # the client's own deadline is 5 s later
    with pytest.raises(psycopg.OperationalError):
        link.call("select pg_advisory_lock(1)")
    monkeypatch.undo()
    blocker.close()
    assert link.call("select pg_backend_pid()")[0][0] != pid
    link.close()


def test_a_worker_gives_silent_connections_up_and_goes_on(installed: str, conn: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    relay = Relay(installed)
    with running(relay.url + "?connect_timeout=2", {"a": lambda task: None}) as app:
        wait_for(app, app.enqueue("a"))
        monkeypatch.setattr(orchestrator, "STATEMENT_TIMEOUT", -4.0)   # the client's own deadline is 5 s later
        relay.silent = True   # what is sent now is lost: no answer comes, and no end
        eventually(lambda: worker_of(app).metrics.errors["connection"] >= 2, 20)
        relay.silent = False
        monkeypatch.undo()
        task_id = str(value(conn, "select orchestrator.enqueue('a')"))
        wait_for_on(conn, task_id, "completed")
    relay.cut()


@pytest.mark.parametrize(("sqlstate", "gone"), [
    ("08006", True), ("57P01", True), ("25006", True),                        # broken, shutting down, a standby by now
    ("42P01", False), ("53200", False), ("22012", False), ("40P01", False)])  # it will answer the next call
def test_a_connection_is_given_up_only_for_errors_of_its_own(installed: str, sqlstate: str, gone: bool) -> None:
    link = orchestrator.Link(make_app(installed).config)
    pid = link.call("select pg_backend_pid()")[0][0]
    with pytest.raises(psycopg.Error) as failed:
        link.call(f"do $$ begin raise exception using errcode = '{sqlstate}'; end $$")
    assert failed.value.sqlstate == sqlstate
    assert (link.call("select pg_backend_pid()")[0][0] != pid) is gone
    link.close()


def test_a_database_that_turned_read_only_is_waited_for_on_new_connections(installed: str, conn: Connection) -> None:
    with running(installed, {"a": lambda task: None}) as app:
        wait_for(app, app.enqueue("a"))
        database = conn.info.dbname
        conn.execute(f"alter database {database} set default_transaction_read_only = on")
        conn.execute("select pg_terminate_backend(pid) from pg_stat_activity where datname = %s and pid <> pg_backend_pid()", [database])
        eventually(lambda: worker_of(app).metrics.errors["25"] >= 2, 15)
        conn.execute(f"alter database {database} reset default_transaction_read_only")
        task_id = str(value(conn, "select orchestrator.enqueue('a')"))   # a session that is there from before
        wait_for_on(conn, task_id, "completed")


# --------------------------------------------------------------------------------------------------------- health and identity
def test_a_wedged_claim_loop_stops_the_heartbeat_and_turns_health_bad(
        installed: str, conn: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    wedged, release = threading.Event(), threading.Event()
    original = orchestrator.Worker._claim

    def claim(self: orchestrator.Worker, *args: Any) -> float:
        if wedged.is_set():
            release.wait(30)
        return original(self, *args)

    monkeypatch.setattr(orchestrator.Worker, "_claim", claim)
    beat = "select last_heartbeat from orchestrator.workers"
    with running(installed, {"a": lambda task: None}, heartbeat_interval=0.1) as app:
        worker = worker_of(app)
        first = value(conn, beat)
        eventually(lambda: value(conn, beat) > first)
        wedged.set()
        eventually(lambda: time.monotonic() - worker.loop_at["claim"] > 1.2)   # it waits a second at most
        worker.loop_at["claim"] -= 60
        assert worker.health() == [problem for problem in worker.health() if "claim loop" in problem] != []
        last = [value(conn, beat)]

        def silent() -> bool:
            previous, now = last[0], value(conn, beat)
            last[0] = now
            return bool(previous == now and worker.wake_heartbeat.wait(0.5) is False and value(conn, beat) == now)
        eventually(silent)
        release.set()
        eventually(lambda: value(conn, beat) > last[0] and not worker.health())


def test_a_worker_that_was_declared_dead_stops_what_it_runs_and_goes_on_under_a_new_id(installed: str, conn: Connection) -> None:
    reasons = []

    def listens(task: Task) -> None:
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
        assert events(task) in (["released"], ["recovered", "failed", "retry_scheduled"])   # whoever was first, it or the leader
    no_attempt_lost(conn)


def test_a_single_instance_recovers_at_once_at_its_start(installed: str, conn: Connection) -> None:
    for status in ("running", "claimed"):
        conn.execute("select orchestrator.register_worker(%s, 'host', 1, '1', '{\"a\": {\"base_delay\": 0}}')", [status])
        conn.execute("select orchestrator.enqueue('a')")
        claim_id = value(conn, "select claim_id from orchestrator.claim_tasks(%s, '{a}', 1)", status)
        if status == "running":
            conn.execute("select orchestrator.start_tasks(claim_id, array[id]) from orchestrator.tasks where claim_id = %s", [claim_id])
    with running(installed, {"a": Handler(lambda task: None, base_delay=0)}, worker_timeout=3600) as app:
        eventually(lambda: value(conn, "select count(*) from orchestrator.tasks where status = 'completed'") == 2)
        assert sorted(a for (a,) in conn.execute("select attempts from orchestrator.tasks")) == [1, 2]
        assert value(conn, "select array_agg(id) from orchestrator.workers") == [worker_of(app).id]
    no_attempt_lost(conn)


def test_a_single_instance_beside_a_living_one_says_so_and_leaves_it_alone(
        installed: str, conn: Connection, caplog: pytest.LogCaptureFixture) -> None:
    gate = Gate()
    orchestrator.log.propagate = True
    with running(installed, {"a": gate}) as first:
        task_id = first.enqueue("a")
        wait_for(first, task_id, "running")
        with running(installed, {"b": lambda task: None}):
            assert "DISTRIBUTED_MODE is false, but 1 other workers live" in caplog.text
            gate.open.set()
            assert wait_for(first, task_id)["attempts"] == 1
    no_attempt_lost(conn)


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


def test_a_schema_of_another_version_is_refused_with_the_way_out(installed: str, conn: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    conn.execute("create or replace function orchestrator.schema_version() returns int language sql immutable as 'select 99'")
    with pytest.raises(orchestrator.ConfigError, match="^DATABASE_URL: .* version 99, .* use the newer"):
        make_app(installed, {"a": lambda task: None}).start()
    conn.execute("create or replace function orchestrator.schema_version() returns int language sql immutable as 'select 1'")
    monkeypatch.setattr(orchestrator, "SCHEMA_VERSION", 2)
    with pytest.raises(orchestrator.ConfigError, match="run `python orchestrator.py install`"):
        make_app(installed, {"a": lambda task: None}).start()


def test_a_worker_installs_the_schema_where_there_is_none(db: str) -> None:
    with running(db, {"a": lambda task: None}) as app:
        wait_for(app, app.enqueue("a"), "completed")


def test_a_port_in_use_is_refused_by_name(installed: str) -> None:
    with running(installed, {"a": lambda task: None}) as app:
        http = worker_of(app).http
        assert http is not None
        with pytest.raises(orchestrator.ConfigError, match="METRICS_PORT"):
            Orchestrator(installed, metrics_port=http.server_address[1]).start()


def test_stop_gives_back_what_has_not_started_and_finishes_the_rest(
        installed: str, conn: Connection, greedy: None) -> None:
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
    no_attempt_lost(conn)


def test_what_could_not_be_given_back_runs_here(installed: str, conn: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    overloaded, gate = threading.Event(), Gate()

    def no_database(*args: Any) -> int:
        raise psycopg.OperationalError("the connection is lost")

    monkeypatch.setattr(orchestrator.Worker, "prefetch", lambda self: 20)
    monkeypatch.setattr(orchestrator.Worker, "_overloaded", lambda self: overloaded.is_set())
    monkeypatch.setattr(orchestrator, "release_tasks", no_database)
    with running(installed, {"a": gate}, worker_pool_size=1) as app:
        app.enqueue("a")
        gate.wait_started()
        app.enqueue_many("a", range(10))
        eventually(lambda: value(conn, "select count(*) from orchestrator.tasks where status = 'claimed'") == 10)
        overloaded.set()
        eventually(lambda: worker_of(app).metrics.errors["connection"] >= 2)
        overloaded.clear()
        gate.open.set()
        eventually(lambda: value(conn, "select count(*) from orchestrator.tasks where status = 'completed'") == 11)
    no_attempt_lost(conn)


def test_stop_without_grace_gives_back_what_runs_uncharged(installed: str, conn: Connection) -> None:
    gate = Gate()
    app = make_app(installed, {"a": Handler(gate, max_retries=0)}).start()
    task_id = app.enqueue("a")
    gate.wait_started()
    wait_for(app, task_id, "running")
    app.stop(0)
    assert conn.execute("select status, attempts from orchestrator.tasks").fetchone() == ("pending", 0)
    gate.open.set()
    no_attempt_lost(conn)


def test_shutdown_asks_running_handlers_to_stop_and_gives_back_those_that_do(installed: str, conn: Connection) -> None:
    app = make_app(installed, {"a": obedient}).start()
    eventually(worker_of(app).registered.is_set)
    app.enqueue("a")
    eventually(worker_of(app).running_tasks)
    began = time.monotonic()
    app.stop(20)
    assert time.monotonic() - began < 5
    assert conn.execute("select status, attempts from orchestrator.tasks").fetchone() == ("pending", 0)


def test_reporting_makes_room_and_wakes_the_claim_loop(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orchestrator, "PREFETCH_MAX", 1)   # so that what is finished but not reported fills it up again and again
    sat_out = []

    waiting = orchestrator.Worker._wait_for_bell

    def wait_and_tell(worker: orchestrator.Worker, seconds: float) -> None:
        waiting(worker, seconds)
        if worker.full and worker._room() > 0 and not select.select([worker.wake_claim], [], [], 2)[0]:
            sat_out.append(seconds)   # there is room, and nobody says so
    monkeypatch.setattr(orchestrator.Worker, "_wait_for_bell", wait_and_tell)
    with running(installed, {"t": lambda task: None}, worker_pool_size=2, claim_interval=60) as app:
        worker = worker_of(app)
        app.enqueue_many("t", [{}] * 1000)
        eventually(lambda: sum(worker.metrics.completed.values()) == 1000, 30)
    assert sat_out == []


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
        eventually(lambda: len(worker_of(app).finished) == 1)   # it has ended, and is not reported
        assert value(conn, "select status::text from orchestrator.tasks where id = %s", second) == "claimed"
        began = time.monotonic()
        app.stop(30)
        assert time.monotonic() - began < 15
    assert value(conn, "select status::text from orchestrator.tasks where id = %s", second) == "completed"
