"""Steps and signals: sql/48_steps.sql, task.step() and task.signal(), the commands, and a worker that is killed at each point."""
from __future__ import annotations

import asyncio
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from apps import claimed, events, make_app, registered, running, story, wait_for, worker_of
from orchestrator import ClaimLost, Discard, Orchestrator, Snooze, Task
from postgres import eventually, wait_for_lock
from steps import (
    audit,
    background,
    backend,
    cancel,
    claim,
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
    rows,
    rung,
    snooze,
    start,
    value,
)
from steps import events as events_of
from test_cli import Answer, cli, logging_as_before  # noqa: F401

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
    for first, second in ((send, snooze), (snooze, send)):
        one, two = connect(autocommit=False), connect()
        call = {send: lambda on: send(on, id, "go"), snooze: lambda on: snooze(on, claim_id, id)}
        call[first](one)
        later = background(lambda: call[second](two))   # noqa: B023
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
    conn.execute("update orchestrator.task_steps set task_id = orchestrator._uuid_at(now() - interval '2 days') where task_id = %s", [old])
    conn.execute("update orchestrator.tasks set id = orchestrator._uuid_at(now() - interval '2 days') where id = %s", [old])
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
    assert shown["explanation"].startswith("snoozed until the signal it's or 20")
    assert shown["explanation"].endswith(f": select orchestrator.signal_task('{id}', 'it''s')")
    conn.execute("update orchestrator.task_steps set until = 'infinity' where until is not null")
    assert value(conn, "select orchestrator.explain_task(%s)", id).startswith("snoozed until the signal it's: select")
