"""Steps and signals: sql/48_steps.sql, task.step() and task.signal(), the commands, and a worker that is killed at each point."""
from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest

from apps import claimed, events, make_app, registered, running, story, wait_for, worker_of
from orchestrator import Cancelled, ClaimLost, Discard, Task
from postgres import eventually, wait_for_lock
from steps import (
    audit,
    backend,
    background,
    cancel,
    claim_one,
    column,
    complete,
    declare_dead,
    enqueue,
    fail,
    lead,
    recover,
    register,
    retry,
    row,
    rung,
    snooze,
    start,
    value,
)
from steps import events as events_of
from test_cli import Answer, cli, cli_on, logging_as_before  # noqa: F401

Connection = psycopg.Connection[Any]


def record(conn: Connection, claim_id: int, id: str, name: str, result: Any = None) -> bool:
    return bool(value(conn, "select orchestrator.record_step(%s, %s, %s, %s)", claim_id, id, name, json.dumps(result)))


def known(conn: Connection, id: str) -> dict[str, Any]:
    return dict(value(conn, "select orchestrator.steps(%s)", id))


def awaited(conn: Connection, claim_id: int, id: str, name: str = "go", timeout: str | None = None) -> tuple[Any, ...]:
    """held, value, seconds to snooze"""
    found = conn.execute("select held, value, extract(epoch from snooze)::float8 from orchestrator.await_signal(%s, %s, %s, %s)",
                         [claim_id, id, name, timeout]).fetchone()
    assert found is not None
    return tuple(found)


def send(conn: Connection, id: str, name: str = "go", data: Any = ...) -> str:
    if data is ...:
        return str(value(conn, "select orchestrator.signal_task(%s, %s)", id, name))
    return str(value(conn, "select orchestrator.signal_task(%s, %s, %s)", id, name, json.dumps(data)))


def is_ready(conn: Connection, id: str) -> bool:
    return value(conn, "select queued_at is not null and next_retry_at is null from orchestrator.tasks where id = %s", id)


@pytest.fixture
def held(conn: Connection) -> tuple[int, str]:
    """A task in flight: its claim and its id."""
    register(conn)
    enqueue(conn)
    return claim_one(conn)


# ------------------------------------------------------------------------------------------------------------ steps in SQL
def test_record_step_keeps_the_first_result_of_each_name(conn: Connection, held: tuple[int, str]) -> None:
    claim_id, id = held
    assert record(conn, claim_id, id, "charge", {"id": 7}) and record(conn, claim_id, id, "charge", {"id": 8})
    assert record(conn, claim_id, id, "empty")
    assert known(conn, id) == {"charge": {"id": 7}, "empty": None}


def test_record_step_refuses_bad_names_and_large_results(conn: Connection, held: tuple[int, str]) -> None:
    for name, result, words in (("", 1, "name: must be 1 to 255 bytes"), ("é" * 128, 1, "name: must"), (None, 1, "name: must"),
                                ("a", "x" * 262_143, "result: is over 256 KiB")):
        with pytest.raises(psycopg.Error, match=words) as caught:
            record(conn, *held, name, result)   # type: ignore[arg-type]
        assert caught.value.sqlstate == "OR001"
    assert known(conn, held[1]) == {}


@pytest.mark.parametrize("name", ["", None, "x" * 256])
def test_await_signal_refuses_a_name_that_no_signal_can_have(conn: Connection, held: tuple[int, str], name: Any) -> None:
    with pytest.raises(psycopg.Error, match="name: must be 1 to 255 bytes") as refused:
        conn.execute("select orchestrator.await_signal(%s, %s, %s)", [*held, name])
    assert refused.value.sqlstate == "OR001"


@pytest.mark.parametrize("end", ["recovered", "failed", "snoozed", "cancelled", "completed by another claim"])
def test_record_step_and_await_signal_refuse_a_claim_that_no_longer_holds_the_task(conn: Connection, end: str) -> None:
    register(conn)
    id = enqueue(conn, max_retries=0)
    old, _ = claim_one(conn)
    start(conn, old, id)
    if end == "recovered":
        term = lead(conn)
        declare_dead(conn, "w")
        recover(conn, term)
    elif end == "failed":
        fail(conn, old, id)
    elif end == "snoozed":
        snooze(conn, old, id)
    elif end == "cancelled":
        cancel(conn, id)
        fail(conn, old, id)
    else:
        snooze(conn, old, id, "0")
        conn.execute("select orchestrator.promote_due()")
        complete(conn, claim_one(conn)[0], id)
    assert not record(conn, old, id, "a", 1)
    assert awaited(conn, old, id) == (False, None, None)
    assert known(conn, id) == {} and column(conn, "select name from orchestrator.task_steps") == []


def test_record_step_waits_for_who_takes_the_task_away_and_is_refused_then(
        conn: Connection, connect: Callable[..., Connection], held: tuple[int, str]) -> None:
    claim_id, id = held
    term = lead(conn)
    start(conn, claim_id, id)
    declare_dead(conn, "w")
    other, zombie = connect(autocommit=False), connect()
    recover(other, term)
    late = background(lambda: record(zombie, claim_id, id, "a", 1))
    wait_for_lock(conn, backend(zombie))
    other.commit()
    assert late.result(10) is False and known(conn, id) == {}


def test_recovery_waits_for_a_step_that_is_being_recorded(
        conn: Connection, connect: Callable[..., Connection], held: tuple[int, str]) -> None:
    claim_id, id = held
    term = lead(conn)
    start(conn, claim_id, id)
    declare_dead(conn, "w")
    zombie, leader = connect(autocommit=False), connect()
    assert record(zombie, claim_id, id, "a", 1)
    recovery = background(lambda: recover(leader, term))
    wait_for_lock(conn, backend(leader))
    zombie.commit()
    assert recovery.result(10)["retried"] == 1
    assert known(conn, id) == {"a": 1}   # so the next attempt knows it


# ---------------------------------------------------------------------------------------------------------- signals in SQL
def test_a_signal_before_its_wait_is_there_at_once(conn: Connection) -> None:
    register(conn)
    id = enqueue(conn)
    assert send(conn, id, "go", {"by": "Ada"}) == "delivered"
    assert is_ready(conn, id)
    claim_id, _ = claim_one(conn)
    assert awaited(conn, claim_id, id) == (True, {"by": "Ada"}, None)
    assert events_of(conn, id) == ["signalled"]


def test_a_signal_wakes_a_task_that_waits_and_rings_an_idle_worker(
        conn: Connection, connect: Callable[..., Connection], held: tuple[int, str]) -> None:
    claim_id, id = held
    listener = connect()
    listener.execute("listen orchestrator")
    conn.execute("select orchestrator.set_idle('w', true)")
    assert awaited(conn, claim_id, id) == (True, None, 3600)
    assert snooze(conn, claim_id, id) == "snoozed"
    assert rung(listener, conn) == [] and not is_ready(conn, id)
    assert send(conn, id, "other") == "delivered" and not is_ready(conn, id)
    assert send(conn, id) == "delivered" and is_ready(conn, id) and rung(listener, conn) == [""]
    claim_id, _ = claim_one(conn)
    assert awaited(conn, claim_id, id) == (True, {}, None)
    assert audit(conn) == []


def test_a_signal_that_comes_while_its_task_falls_asleep_wakes_it(conn: Connection, held: tuple[int, str]) -> None:
    claim_id, id = held
    awaited(conn, claim_id, id)
    assert send(conn, id) == "delivered"
    assert snooze(conn, claim_id, id) == "snoozed" and is_ready(conn, id)
    claim_id, _ = claim_one(conn)
    assert awaited(conn, claim_id, id, "next")[2] == 3600
    assert snooze(conn, claim_id, id) == "snoozed" and not is_ready(conn, id)   # the old signal wakes it no more


def test_a_signal_and_a_snooze_at_the_same_moment_lose_no_wake_up(
        conn: Connection, connect: Callable[..., Connection], held: tuple[int, str]) -> None:
    claim_id, id = held
    awaited(conn, claim_id, id)
    for first in ("signal", "snooze"):
        one, two = connect(autocommit=False), connect()
        assert (send(one, id) if first == "signal" else snooze(one, claim_id, id)) in ("delivered", "snoozed")
        late = (lambda on, claim_id: snooze(on, claim_id, id)) if first == "signal" else (lambda on, claim_id: send(on, id))
        later = background(partial(late, two, claim_id))
        wait_for_lock(conn, backend(two))
        one.commit()
        assert later.result(10) in ("delivered", "snoozed")
        assert is_ready(conn, id)
        conn.execute("delete from orchestrator.task_steps")
        claim_id, _ = claim_one(conn)
        awaited(conn, claim_id, id)


def test_a_signal_that_was_read_wakes_no_later_snooze(conn: Connection, held: tuple[int, str]) -> None:
    claim_id, id = held
    awaited(conn, claim_id, id)
    send(conn, id)
    awaited(conn, claim_id, id)
    assert snooze(conn, claim_id, id) == "snoozed" and not is_ready(conn, id)


def test_a_signal_leaves_delayed_tasks_and_retries_where_they_are(conn: Connection, held: tuple[int, str]) -> None:
    claim_id, id = held
    awaited(conn, claim_id, id)
    assert fail(conn, claim_id, id, after="1 hour") == "retry_scheduled"
    delayed = enqueue(conn, run_at="2030-01-01")
    assert send(conn, id) == send(conn, delayed) == "delivered"
    assert not is_ready(conn, id) and not is_ready(conn, delayed)


def test_the_first_signal_counts_and_a_step_can_be_answered_for(conn: Connection, held: tuple[int, str]) -> None:
    claim_id, id = held
    record(conn, claim_id, id, "charge", 1)
    assert [send(conn, id, "go", 1), send(conn, id, "go", 2), send(conn, id, "charge", 2), send(conn, id, "ship", None)] == [
        "delivered", "known", "known", "delivered"]
    assert record(conn, claim_id, id, "ship", 3)
    assert known(conn, id) == {"charge": 1, "go": 1, "ship": None}


def test_a_signal_to_an_ended_or_unknown_task_says_so(conn: Connection) -> None:
    register(conn)
    done, dead, off, nobody = enqueue(conn), enqueue(conn), enqueue(conn), "00000000-0000-0000-0000-000000000000"
    complete(conn, claim_one(conn)[0], done)
    fail(conn, claim_one(conn)[0], dead, permanent=True)
    cancel(conn, off)
    assert [send(conn, id) for id in (done, dead, off, nobody)] == ["completed", "dead_letter", "cancelled", "not_found"]
    assert column(conn, "select name from orchestrator.task_steps") == []


def test_signal_task_refuses_bad_names_and_large_values(conn: Connection, held: tuple[int, str]) -> None:
    for name, data, words in (("", 1, "name: must be 1 to 255 bytes"), ("a", "x" * 262_143, "value: is over 256 KiB")):
        with pytest.raises(psycopg.Error, match=words) as caught:
            send(conn, held[1], name, data)
        assert caught.value.sqlstate == "OR001"


def test_the_timeout_counts_from_the_first_wait_and_what_comes_later_is_refused(conn: Connection, held: tuple[int, str]) -> None:
    claim_id, id = held
    assert awaited(conn, claim_id, id, timeout="2 hours")[2] == 3600
    assert 0 < awaited(conn, claim_id, id, "soon", "5 minutes")[2] <= 300
    conn.execute("update orchestrator.task_steps set until = until - interval '90 minutes' where name = 'go'")   # an hour and a half later
    assert 1790 < awaited(conn, claim_id, id, timeout="2 hours")[2] <= 1800
    conn.execute("update orchestrator.task_steps set until = until - interval '31 minutes' where name = 'go'")
    assert awaited(conn, claim_id, id, timeout="2 hours") == (True, None, None)
    assert send(conn, id) == "timed_out"
    assert awaited(conn, claim_id, id, timeout="2 hours") == (True, None, None)   # in each later attempt, too


# --------------------------------------------------------------------------------------------- retry, retention, inspection
def test_retry_keeps_steps_and_begins_waits_anew_unless_it_is_to_start_afresh(conn: Connection, held: tuple[int, str]) -> None:
    claim_id, id = held
    record(conn, claim_id, id, "charge", 1)
    awaited(conn, claim_id, id, timeout="0")
    fail(conn, claim_id, id, permanent=True)
    assert retry(conn, id) == "pending" and known(conn, id) == {"charge": 1}
    assert send(conn, id) == "delivered"
    fail(conn, claim_one(conn)[0], id, permanent=True)
    assert value(conn, "select orchestrator.retry_task(%s, p_fresh => true)", id) == "pending" and known(conn, id) == {}
    assert audit(conn) == []


def test_steps_go_with_their_task(conn: Connection) -> None:
    register(conn)
    term = lead(conn)
    old, dead, young = (enqueue(conn) for _ in range(3))
    for id in (old, dead, young):
        claim_id, _ = claim_one(conn)
        record(conn, claim_id, id, "a", 1)
        fail(conn, claim_id, id, permanent=True) if id == dead else complete(conn, claim_id, id)
    conn.execute("update orchestrator.tasks set completed_at = completed_at - interval '1 day', dead_at = dead_at - interval '1 day' "
                 "where id <> %s", [young])
    of_old = value(conn, "select orchestrator._uuid_at(now() - interval '2 days')")
    conn.execute("update orchestrator.task_steps set task_id = %s where task_id = %s", [of_old, old])
    conn.execute("update orchestrator.tasks set id = %s where id = %s", [of_old, old])
    assert row(conn, "select completed, dead_letters from orchestrator.prune('leader', %s, '1 hour', '1 hour')", term) == {
        "completed": 1, "dead_letters": 1}
    assert column(conn, "select task_id::text from orchestrator.task_steps") == [young]
    assert audit(conn) == []


def test_audit_names_a_step_whose_task_is_gone(conn: Connection, held: tuple[int, str]) -> None:
    record(conn, *held, "a", 1)
    conn.execute("update orchestrator.task_steps set task_id = gen_random_uuid()")
    assert [found[0] for found in audit(conn)] == ["a step belongs to a task"]


def test_show_lists_steps_without_their_secrets_and_explain_says_what_is_waited_for(conn: Connection, held: tuple[int, str]) -> None:
    claim_id, id = held
    assert value(conn, "select orchestrator.show_task(%s)", id)["steps"] is None
    record(conn, claim_id, id, "charge", {"token": "hunter2"})
    awaited(conn, claim_id, id, "it's", "1 day")
    snooze(conn, claim_id, id)
    shown = value(conn, "select orchestrator.show_task(%s)", id)
    assert [(step["name"], step["result"], step["until"] is None) for step in shown["steps"]] == [
        ("charge", {"token": "[redacted]"}, True), ("it's", None, False)]
    assert shown["explanation"].startswith("snoozed until the signal 'it''s' comes, or until 20")
    assert shown["explanation"].endswith(f": select orchestrator.signal_task('{id}', 'it''s')")
    conn.execute("update orchestrator.task_steps set until = 'infinity' where until is not null")
    assert value(conn, "select orchestrator.explain_task(%s)", id).startswith("snoozed until the signal 'it''s' comes: select")


# ------------------------------------------------------------------------------------------------------ task.step() in Python
class Trouble:
    """A handler of three steps, each noted in `done`, that fails on purpose after those that are named."""

    def __init__(self, *fail_after: str) -> None:
        self.fail_after, self.done = list(fail_after), []   # type: ignore[var-annotated]

    def note(self, name: str) -> dict[str, Any]:
        self.done.append(name)
        return {"step": name, "run": len(self.done)}

    def __call__(self, task: Task) -> Any:
        results = []
        for name in ("a", "b", "c"):
            results.append(task.step(name, lambda: self.note(name)))   # noqa: B023
            if name in self.fail_after:
                self.fail_after.remove(name)
                raise RuntimeError(f"fails after {name}")
        return results


def test_a_later_attempt_goes_on_after_the_last_step(installed: str, conn: Connection) -> None:
    handler = Trouble("a", "b", "c")
    with running(installed, {"t": handler}) as app:
        id = app.enqueue("t", max_retries=5)
        conn.execute("update orchestrator.task_types set base_delay = '0', max_delay = '0'")
        done = wait_for(app, id)
    assert handler.done == ["a", "b", "c"] and done["attempts"] == 4
    assert done["result"] == [{"step": "a", "run": 1}, {"step": "b", "run": 2}, {"step": "c", "run": 3}]
    assert known(conn, id) == {name: result for name, result in zip("abc", done["result"], strict=True)}


def test_a_program_that_does_no_step_opens_no_connection_for_them(installed: str, conn: Connection) -> None:
    handlers: dict[str, Any] = {"plain": lambda task: None, "stepped": lambda task: task.step("a", lambda: 1)}
    with running(installed, handlers) as app:
        wait_for(app, app.enqueue("plain"))
        assert worker_of(app).steps.connection is None
        for _ in range(3):
            wait_for(app, app.enqueue("stepped"))
        assert worker_of(app).steps.connection is not None
        link = worker_of(app).steps
    assert link.connection is None


def test_a_step_returns_what_json_makes_of_its_result_at_once(installed: str) -> None:
    seen: list[Any] = []
    app = make_app(installed, {"t": lambda task: seen.append(task.step("a", lambda: {1: (2, {3})}))}, json_default=None)
    with running(installed, app):
        wait_for(app, app.enqueue("t"))
    assert seen == [{"1": [2, [3]]}]


@pytest.mark.parametrize(("name", "result", "words"), [
    ("", 1, "name: must be 1 to 255 bytes"), ("a\0", 1, "name: must be text"), (1, 1, "name: must be text"),
    (None, 1, "name: must be text"), ("a", "x" * 262_144, "over 262144 bytes of JSON"),
    ("a", [1] * 131_000, "result: is over 256 KiB"), ("a", object(), "result: not JSON")])
def test_a_step_that_cannot_be_kept_fails_its_attempt(installed: str, name: Any, result: Any, words: str) -> None:
    with running(installed, {"t": lambda task: task.step(name, lambda: result)}) as app:
        failed = wait_for(app, app.enqueue("t", max_retries=0))
    assert failed["status"] == "dead_letter" and failed["last_error"].startswith(f"ValueError: {words}")


def test_a_lost_claim_is_noticed_at_the_step(installed: str, conn: Connection) -> None:
    with registered(installed) as worker:
        id = enqueue(conn, "a")
        [task] = claimed(worker, 1)
        assert task.step("before", lambda: 1) == 1
        term = lead(conn)
        declare_dead(conn, worker.id)
        recover(conn, term)
        ran: list[int] = []
        with pytest.raises(ClaimLost, match=f"task {id} is no longer held"):
            task.step("after", lambda: ran.append(1))
        with pytest.raises(ClaimLost):
            task.signal("go")
        assert ran == [1] and known(conn, id) == {"before": 1}
        worker.steps.close()


def test_a_step_waits_for_a_database_that_is_away_and_runs_once(installed: str, conn: Connection) -> None:
    ran: list[int] = []

    def handler(task: Task) -> None:
        def cut_off() -> int:
            ran.append(1)
            conn.execute("select pg_terminate_backend(%s)", [worker_of(app).steps.open().info.backend_pid])
            return len(ran)
        assert task.step("a", cut_off) == 1
    app = make_app(installed, {"t": handler})
    with running(installed, app):
        assert wait_for(app, app.enqueue("t"))["attempts"] == 1
    assert ran == [1]


def test_a_child_that_a_handler_forked_asks_over_a_connection_of_its_own(installed: str, conn: Connection) -> None:
    """Over its parent's, each might read the answer to the other one's question, which may be another task's steps."""
    def handler(task: Task) -> None:
        worker = worker_of(app)
        task.step("parent", lambda: 1)
        with worker.steps_lock:   # as by the step of another task at this moment
            child = os.fork()
            if not child:
                signal.alarm(10)
                task.step("child", os.getppid)
                os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    app = make_app(installed, {"t": handler})
    with running(installed, app):
        done = wait_for(app, app.enqueue("t"), timeout=20)
    assert done["attempts"] == 1 and known(conn, done["id"]) == {"parent": 1, "child": os.getpid()}


def test_steps_that_begin_together_are_all_known_afterwards(
        installed: str, conn: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def handler(task: Task) -> list[str]:
        both, call = threading.Barrier(2), worker_of(app).call_step

        def together(task: Task, function: str, *args: Any) -> Any:
            if function == "steps":
                both.wait(15)
            return call(task, function, *args)
        monkeypatch.setattr(worker_of(app), "call_step", together)
        with ThreadPoolExecutor() as threads:
            list(threads.map(lambda name: task.step(name, lambda: ran.append(name)), "ab"))
        return [task.step(name, lambda: ran.append("again")) for name in "ab"]
    app = make_app(installed, {"t": handler})
    with running(installed, app):
        assert wait_for(app, app.enqueue("t"))["status"] == "completed"
    assert sorted(ran) == ["a", "b"]


def test_a_step_is_recorded_over_another_connection_if_this_one_has_become_useless(installed: str, conn: Connection) -> None:
    """What was prepared may be gone, or the server be a standby by now."""
    with registered(installed) as worker:
        id = enqueue(conn, "a")
        [task] = claimed(worker, 1)
        task.step("before", lambda: 1)
        for name, trouble in (("a", "deallocate all"), ("b", "set default_transaction_read_only = on")):
            worker.steps.open().execute(trouble)
            assert task.step(name, lambda: 2) == 2
        assert known(conn, id) == {"before": 1, "a": 2, "b": 2}
        worker.steps.close()


def test_a_step_whose_row_is_locked_for_long_is_recorded_later(
        installed: str, conn: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    with registered(installed) as worker:
        id = enqueue(conn, "a")
        [task] = claimed(worker, 1)
        task.step("before", lambda: 1)
        call, errors = worker.steps.call, [psycopg.errors.LockNotAvailable("locked"), psycopg.OperationalError("away")]

        def hindered(*args: Any) -> Any:
            if errors:
                raise errors.pop()
            return call(*args)
        monkeypatch.setattr(worker.steps, "call", hindered)
        assert task.step("a", lambda: 2) == 2 and errors == [] and known(conn, id) == {"before": 1, "a": 2}
        worker.steps.close()


def test_a_step_of_a_lost_task_does_not_begin(installed: str, conn: Connection) -> None:
    with registered(installed) as worker:
        enqueue(conn, "a")
        [task] = claimed(worker, 1)
        worker.declared_dead(worker.id)
        ran: list[int] = []
        with pytest.raises(ClaimLost):
            task.step("a", lambda: ran.append(1))
        assert ran == [] and worker.steps.connection is None


def test_a_step_of_a_task_that_is_to_stop_ends_as_cancelled_while_the_database_is_away(
        installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with registered(installed) as worker:
        app = make_app(installed)
        app.enqueue("a")
        [task] = claimed(worker, 1)
        task.cancel("timeout")

        def away(*_: Any) -> None:
            raise psycopg.OperationalError("away")
        monkeypatch.setattr(worker.steps, "call", away)
        with pytest.raises(Cancelled, match="away") as stopped:
            task.step("a", lambda: 1)
        assert isinstance(stopped.value.__cause__, psycopg.OperationalError)
        app.close()


# ------------------------------------------------------------------------------------------------------------- transactions
@pytest.fixture
def ledger(conn: Connection) -> Connection:
    conn.execute("create table public.ledger (n int)")
    return conn


def in_ledger(conn: Connection) -> list[int]:
    return column(conn, "select n from public.ledger order by n")


def write(connection: Connection) -> int:
    connection.execute("insert into public.ledger select count(*) + 1 from public.ledger")
    return 7


def test_a_step_in_a_transaction_of_its_own_writes_once_however_often_the_handler_runs(installed: str, ledger: Connection) -> None:
    left = ["no", "no"]

    def handler(task: Task) -> Any:
        found = task.step("charge", write, transaction=True)
        if left:
            raise RuntimeError(left.pop())
        return found
    with running(installed, {"t": handler}) as app:
        id = app.enqueue("t")
        ledger.execute("update orchestrator.task_types set base_delay = '0', max_delay = '0'")
        assert wait_for(app, id)["result"] == 7
    assert in_ledger(ledger) == [1] and known(ledger, id) == {"charge": 7}


@pytest.mark.parametrize("trouble", ["raises", "claim lost"])
def test_a_step_in_a_transaction_that_fails_leaves_neither_write_nor_record(installed: str, ledger: Connection, trouble: str) -> None:
    with registered(installed) as worker:
        id = enqueue(ledger, "a")
        [task] = claimed(worker, 1)

        def charge(connection: Connection) -> int:
            write(connection)
            if trouble == "raises":
                raise RuntimeError("no")
            term = lead(ledger)
            declare_dead(ledger, worker.id)
            recover(ledger, term)
            return 1
        with pytest.raises(RuntimeError if trouble == "raises" else ClaimLost):
            task.step("charge", charge, transaction=True)
        assert in_ledger(ledger) == [] and known(ledger, id) == {}
        if trouble == "raises":
            assert task.step("charge", write, transaction=True) == 7 and in_ledger(ledger) == [1]
        worker.steps.close()


def test_steps_inside_task_transaction_commit_with_the_completion(installed: str, ledger: Connection) -> None:
    def handler(task: Task) -> None:
        with task.transaction() as connection:
            assert task.step("a", lambda: write(connection)) == 7 == task.step("a", lambda: write(connection))
            assert known(ledger, task.id) == {}
            with pytest.raises(RuntimeError, match="open already"):
                task.step("b", write, transaction=True)
            task.complete("done")
    with running(installed, {"t": handler}) as app:
        done = wait_for(app, app.enqueue("t"))
    assert done["result"] == "done" and in_ledger(ledger) == [1] and known(ledger, done["id"]) == {"a": 7}


def test_a_step_inside_a_transaction_that_is_rolled_back_is_forgotten(installed: str, ledger: Connection) -> None:
    with registered(installed) as worker:
        id = enqueue(ledger, "a")
        [task] = claimed(worker, 1)
        with pytest.raises(RuntimeError), task.transaction() as connection:
            task.step("a", lambda: write(connection))
            raise RuntimeError
        with task.transaction() as connection:
            task.step("a", lambda: write(connection))
        assert in_ledger(ledger) == [1] and known(ledger, id) == {"a": 7}
        worker.steps.close()


# ------------------------------------------------------------------------------------------------------ task.signal() in Python
def approval(task: Task) -> Any:
    charge = task.step("charge", lambda: 1)
    answer = task.signal("approved", timeout=task.payload.get("timeout"))
    if answer is None:
        raise Discard("nobody approved it")
    return [charge, answer]


def test_a_handler_that_waits_for_a_signal_holds_no_place_and_goes_on_when_it_comes(installed: str, conn: Connection) -> None:
    with running(installed, {"t": approval, "quick": lambda task: None}, worker_pool_size=1) as app:
        id = app.enqueue("t")
        eventually(lambda: events(story(app, id)) == ["snoozed"])
        wait_for(app, app.enqueue("quick"))
        assert conn.execute("select attempts, status from orchestrator.tasks where id = %s", [id]).fetchone() == (0, "pending")
        assert app.signal(id, "approved", {"by": "Ada"}) == "delivered"
        done = wait_for(app, id)
        assert app.signal(id, "approved") == "completed"
    assert done["result"] == [1, {"by": "Ada"}] and done["attempts"] == 1


def test_a_signal_before_the_wait_needs_no_snooze(installed: str, conn: Connection) -> None:
    app = make_app(installed, {"t": approval})
    id = app.enqueue("t")
    assert app.signal(id, "approved") == "delivered" and app.signal(id, "approved", 2) == "known"
    with running(installed, app):
        done = wait_for(app, id)
    assert done["result"] == [1, {}] and events(done) == ["signalled"]


def test_a_wait_that_nobody_answers_ends_after_its_timeout(installed: str) -> None:
    with running(installed, {"t": approval}) as app:
        done = wait_for(app, app.enqueue("t", {"timeout": "300ms"}))
        assert app.signal(done["id"], "approved") == "dead_letter"
    assert done["last_error"] == "nobody approved it" and done["attempts"] == 1 and events(done)[0] == "snoozed"


@pytest.mark.parametrize("seed", [1, 2])
def test_no_wake_up_is_lost_among_many_signals_at_any_moment(
        installed: str, conn: Connection, connect: Callable[..., Connection], seed: int) -> None:
    """A lost one would leave its task off for an hour."""
    def handler(task: Task) -> list[Any]:
        return [task.signal("first"), task.step("between", lambda: 1), task.signal("second", timeout=3600)]
    app, dice, sender = make_app(installed, {"t": handler}), random.Random(seed), connect()
    with running(installed, app):
        ids = app.enqueue_many("t", range(150))
        left = [(id, name) for id in ids for name in ("first", "second")]
        dice.shuffle(left)
        for id, name in left:
            assert send(sender, id, name, name) == "delivered"
        eventually(lambda: value(conn, "select bool_and(status = 'completed') from orchestrator.tasks"), 30)
    assert column(conn, "select distinct result from orchestrator.tasks") == [["first", 1, "second"]]
    assert value(conn, "select count(*) from orchestrator.task_events where event = 'snoozed'") > 0
    assert audit(conn) == []


@pytest.mark.parametrize(("name", "timeout"), [("", None), ("a", -1), ("a", "soon"), (None, None)])
def test_signal_refuses_bad_names_and_times(installed: str, conn: Connection, name: Any, timeout: Any) -> None:
    with registered(installed) as worker:
        enqueue(conn, "a")
        [task] = claimed(worker, 1)
        with pytest.raises(ValueError, match=r"^(name|timeout): "):
            task.signal(name, timeout) if name is not None else task.signal("\0")
        assert column(conn, "select name from orchestrator.task_steps") == []
        worker.steps.close()


def test_signal_from_a_program_refuses_what_cannot_be(installed: str) -> None:
    app = make_app(installed)
    id = app.enqueue("t")
    for name, data, words in (("", 1, "name: must be"), ("a", {"a": float("nan")}, "value: not JSON"),
                              ("a", "x" * 262_143, "value: is over")):
        with pytest.raises(ValueError, match=f"^{words}"):
            app.signal(id, name, data)
    with pytest.raises(ValueError, match="id"):
        app.signal("no id", "a")
    app.close()


def test_retry_of_a_program_keeps_steps_or_forgets_them(installed: str, conn: Connection) -> None:
    app = make_app(installed)
    register(conn)
    for fresh in (False, True):
        id = app.enqueue("t")
        claim_id, _ = claim_one(conn)
        record(conn, claim_id, id, "a", 1)
        fail(conn, claim_id, id, permanent=True)
        assert app.retry(id, fresh=fresh) == "pending" and known(conn, id) == ({} if fresh else {"a": 1})
        complete(conn, claim_one(conn)[0], id)
    app.close()


# ------------------------------------------------------------------------------------------------------------------ async def
def test_async_handlers_await_steps_and_signals(installed: str, conn: Connection) -> None:
    done: list[str] = []

    async def pay() -> int:
        await asyncio.sleep(0)
        done.append("pay")
        return 7

    async def handler(task: Task) -> Any:
        charge = await task.step_async("charge", pay)
        answer = await task.signal_async("approved")
        sent = await task.step_async("ship", lambda: done.append("ship"))
        return [charge, answer, sent]
    with running(installed, {"t": handler}) as app:
        id = app.enqueue("t")
        eventually(lambda: events(story(app, id)) == ["snoozed"])
        app.signal(id, "approved", "yes")
        assert wait_for(app, id)["result"] == [7, "yes", None]
    assert done == ["pay", "ship"] and known(conn, id) == {"charge": 7, "approved": "yes", "ship": None}


def test_the_event_loop_goes_on_while_a_step_waits_for_the_database(
        installed: str, conn: Connection, connect: Callable[..., Connection]) -> None:
    locked, ticked, free = threading.Event(), threading.Event(), threading.Event()

    async def slow(task: Task) -> Any:
        await task.step_async("read", lambda: 1)
        locked.set()
        while not free.is_set():
            await asyncio.sleep(0.005)
        return await task.step_async("a", lambda: 2)

    async def ticking(task: Task) -> None:
        ticked.set()
    with running(installed, {"slow": slow, "ticking": ticking}) as app:
        id = app.enqueue("slow")
        assert locked.wait(15)
        holder = connect(autocommit=False)
        holder.execute("select from orchestrator.tasks where id = %s for update", [id])
        free.set()
        wait_for_lock(conn, worker_of(app).steps.open().info.backend_pid)
        app.enqueue("ticking")
        assert ticked.wait(15)
        holder.rollback()
        assert wait_for(app, id)["result"] == 2


# ------------------------------------------------------------------------------------------------------------------- commands
def test_the_command_signal_says_what_became_of_it(installed: str, cli: Callable[..., Answer], conn: Connection,  # noqa: F811
                                                   held: tuple[int, str]) -> None:
    claim_id, id = held
    awaited(conn, claim_id, id)
    assert (cli("signal", id, "go", '{"n": 1}').out, cli("signal", id, "go").code) == ("delivered\n", 1)
    assert known(conn, id) == {"go": {"n": 1}}
    assert json.loads(cli("--json", "signal", id, "go").out) == {"id": id, "status": "known"}
    bad = cli("signal", id, "go", "{")
    assert bad.code == 2 and "value: is not JSON" in bad.err


def test_the_command_show_lists_steps(installed: str, cli: Callable[..., Answer], conn: Connection,   # noqa: F811
                                      held: tuple[int, str]) -> None:
    claim_id, id = held
    record(conn, claim_id, id, "charge", {"id": 7})
    awaited(conn, claim_id, id, "approved")
    shown = cli("show", id).out
    assert '\n  step charge          {"id": 7}\n' in shown and "\n  step approved        waits for the signal\n" in shown


# --------------------------------------------------------------------------------------------------------------------- crashes
CRASHING = """
import os, signal
from pathlib import Path
from orchestrator import Handler

def crash_at(task, point):
    # once: what was noted on the disk outlives the process
    with open(task.payload["log"], "a") as log:
        log.write(f"{point}\\n")
    if task.payload["crash"] == point and Path(task.payload["log"]).read_text().split().count(point) == 1:
        os.kill(os.getpid(), signal.SIGKILL)

def fulfil(task):
    results = []
    for name in "abc":
        crash_at(task, f"before-{name}")
        def step(connection=None):
            crash_at(task, f"in-{name}")
            if connection is not None:
                connection.execute("insert into public.ledger values (1)")
                crash_at(task, f"written-{name}")
            return task.attempt
        results.append(task.step(name, step, transaction=name == "b"))
    crash_at(task, "end")
    return results

HANDLERS = {"t": Handler(fulfil, base_delay=0)}
"""


def test_a_worker_killed_at_any_point_of_three_steps_repeats_no_step_that_was_recorded(
        installed: str, ledger: Connection, worker_process: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "handlers.py").write_text(CRASHING)
    settings = {"WORKER_POOL_SIZE": 2, "CLAIM_INTERVAL": "100ms"}
    #                       what ran in which attempt, and so what the steps returned
    points = {"before-a": [2, 2, 2], "in-a": [2, 2, 2], "before-b": [1, 2, 2], "in-b": [1, 2, 2], "written-b": [1, 2, 2],
              "before-c": [1, 1, 2], "in-c": [1, 1, 2], "end": [1, 1, 1]}
    worker = worker_process(installed, **settings)
    for n, (point, results) in enumerate(points.items(), 1):
        log = tmp_path / point
        # marked first, as a task that came back is: else a crash so early charges it no attempt
        with ledger.transaction():
            id = enqueue(ledger, payload={"log": str(log), "crash": point})
            ledger.execute("update orchestrator.tasks set recoveries = 1 where id = %s", [id])
        assert worker.process.wait(20) == -signal.SIGKILL
        worker = worker_process(installed, **settings)
        eventually(lambda: value(ledger, "select status from orchestrator.tasks where id = %s", id) == "completed")   # noqa: B023
        assert value(ledger, "select result from orchestrator.tasks where id = %s", id) == results
        ran = [line for line in log.read_text().split() if line.startswith("in-")]
        repeated = [point] if point.startswith("in-") else ["in-b"] if point == "written-b" else []
        assert sorted(ran) == sorted(["in-a", "in-b", "in-c", *repeated])
        assert known(ledger, id) == dict(zip("abc", results, strict=True))
        assert len(in_ledger(ledger)) == n
    assert worker.stop() == 0 and audit(ledger) == []
