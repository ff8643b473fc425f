"""sql/70_operate.sql: cancel, retry, pause."""
from __future__ import annotations

import psycopg
import pytest
from psycopg.types.json import Jsonb

from postgres import wait_for_lock
from steps import (
    audit,
    backend,
    background,
    cancel,
    claim,
    claim_one,
    complete,
    enqueue,
    enqueue_some,
    events,
    fail,
    promote,
    register,
    retry,
    row,
    rung,
    start,
    status,
    task,
    value,
)

NOBODY = "00000000-0000-7000-8000-000000000000"


@pytest.fixture
def conn(conn):
    register(conn)
    yield conn
    assert audit(conn) == []


def dead_letter(conn, type="t"):
    enqueue(conn, type)
    claim_id, id = claim_one(conn, types=[type])
    assert fail(conn, claim_id, id, "broken", permanent=True) == "dead_letter"
    return id


@pytest.mark.parametrize("state", ["ready", "delayed", "retry_scheduled"])
def test_cancel_ends_a_waiting_task_at_once(conn, state):
    id = enqueue(conn, **({"run_at": "2030-01-01"} if state == "delayed" else {}))
    if state == "retry_scheduled":
        fail(conn, claim_one(conn)[0], id)
    assert cancel(conn, id) == "cancelled"
    found = task(conn, id)
    assert found["status"] == "cancelled" and found["completed_at"]
    assert found["queued_at"] is None and found["next_retry_at"] is None
    assert claim(conn) == [] and promote(conn) == 0 and events(conn, id)[-1] == "cancelled"


@pytest.mark.parametrize("state", ["claimed", "running"])
def test_cancel_asks_a_task_in_flight_to_stop_once(conn, connect, state):
    listener = connect()
    listener.execute("listen orchestrator_cancel; listen orchestrator")
    id = enqueue(conn)
    claim_id, _ = claim_one(conn)
    if state == "running":
        start(conn, claim_id, id)
    assert cancel(conn, id) == "cancelling" and cancel(conn, id) == "cancelling"
    assert status(conn, id) == state and task(conn, id)["cancel_requested_at"]
    assert events(conn, id) == ["cancel_requested"] and rung(listener, conn) == [""]
    assert complete(conn, claim_id, id) == {id: "cancelled"}


@pytest.mark.parametrize("state", ["completed", "dead_letter", "cancelled", "not_found"])
def test_cancel_of_what_has_ended_says_how(conn, state):
    if state == "not_found":
        id = NOBODY
    elif state == "dead_letter":
        id = dead_letter(conn)
    else:
        id = enqueue(conn)
        if state == "completed":
            complete(conn, claim_one(conn)[0], id)
        else:
            cancel(conn, id)
    before = task(conn, id)
    assert cancel(conn, id) == state and task(conn, id) == before


@pytest.mark.parametrize("state", ["dead_letter", "cancelled"])
def test_retry_puts_it_back_at_the_tail_with_all_its_retries(conn, state):
    if state == "dead_letter":
        id = dead_letter(conn)
    else:
        id = enqueue(conn)
        start(conn, claim_one(conn)[0], id)
        cancel(conn, id)
        complete(conn, task(conn, id)["claim_id"], id)
    first = enqueue(conn)
    assert retry(conn, id) == "pending" and retry(conn, id) == "pending"
    found = task(conn, id)
    assert (found["attempts"], found["recoveries"], found["worker_id"], found["claim_id"]) == (0, 0, None, None)
    assert found["dead_at"] is None and found["completed_at"] is None and found["started_at"] is None
    assert events(conn, id).count("retried") == 1
    assert [t["id"] for t in claim(conn)] == [first, id]


@pytest.mark.parametrize("state", ["pending", "claimed", "running", "retry_scheduled", "completed", "not_found"])
def test_retry_leaves_what_waits_runs_or_has_completed(conn, state):
    id = enqueue(conn) if state != "not_found" else NOBODY
    if state in ("claimed", "running", "retry_scheduled", "completed"):
        claim_id, _ = claim_one(conn)
        if state == "running":
            start(conn, claim_id, id)
        elif state == "retry_scheduled":
            fail(conn, claim_id, id)
        elif state == "completed":
            complete(conn, claim_id, id)
    before = task(conn, id)
    assert retry(conn, id) == state and task(conn, id) == before


def test_retry_makes_a_task_claimable_and_notifies(conn, connect):
    listener = connect()
    listener.execute("listen orchestrator")
    id = dead_letter(conn)
    conn.execute("select orchestrator.set_idle('w', true)")
    retry(conn, id)
    assert rung(listener, conn) == [""] and len(claim(conn)) == 1


def retry_dead(conn, limit=1000, **filter):
    """How many dead letters a call of bulk_tasks retries; the filter's keys may be left out."""
    return value(conn, "select done from orchestrator.bulk_tasks('retry', %s, false, p_limit => %s)", Jsonb(filter or {"all": True}), limit)


def test_retry_of_dead_letters_takes_the_oldest_of_a_type_or_of_all_up_to_the_limit(conn):
    a, b, c, d = dead_letter(conn, "a"), dead_letter(conn, "b"), dead_letter(conn, "a"), dead_letter(conn, "a")
    assert retry_dead(conn, 2, type="a") == 2
    assert [status(conn, id) for id in (a, b, c, d)] == ["pending", "dead_letter", "pending", "dead_letter"]
    assert retry_dead(conn) == 2
    assert retry_dead(conn) == 0


def test_retry_of_dead_letters_passes_over_one_that_somebody_else_is_retrying(conn, connect):
    one, other = dead_letter(conn), dead_letter(conn)
    operator = connect(autocommit=False)
    retry(operator, one)
    conn.execute("set lock_timeout = '1s'")
    assert retry_dead(conn) == 1
    operator.commit()
    assert status(conn, one) == status(conn, other) == "pending"


def test_pausing_and_resuming_say_whether_it_is_new(conn):
    assert [value(conn, f"select changed from orchestrator.{f}_type('x')") for f in ("resume", "pause", "pause", "resume", "resume")] == [
        False, True, False, True, False]


def test_resume_notifies_an_idle_worker(conn, connect):
    listener = connect()
    listener.execute("listen orchestrator")
    conn.execute("select orchestrator.pause_type('t')")
    enqueue(conn)
    conn.execute("select orchestrator.set_idle('w', true)")
    conn.execute("select orchestrator.resume_type('t')")
    assert rung(listener, conn) == [""]


@pytest.mark.parametrize("type", [None, "", "a*b", "x" * 256, "x" * 256 + ":*"])
def test_pause_refuses_what_is_neither_a_type_nor_a_pattern(conn, type):
    with pytest.raises(psycopg.Error, match="type: must be") as refused:
        conn.execute("select orchestrator.pause_type(%s)", [type])
    assert refused.value.sqlstate == "OR001"


def test_what_is_in_flight_goes_on_while_its_type_is_paused(conn):
    ids = enqueue_some(conn, 2)
    claim_id, _ = claim_one(conn)
    conn.execute("select orchestrator.pause_type('t')")
    assert complete(conn, claim_id, ids[0]) == {} and claim(conn) == []


def test_cancel_waits_for_a_claim_and_then_asks_the_worker(conn, connect):
    """It must not end a task that a worker has just got."""
    id = enqueue(conn)
    worker, operator = connect(autocommit=False), connect()
    claim_one(worker)
    late = background(lambda: cancel(operator, id))
    wait_for_lock(conn, backend(operator))
    worker.commit()
    assert late.result(10) == "cancelling"
    assert row(conn, "select status, cancel_requested_at is not null as asked from orchestrator.tasks") == {
        "status": "claimed", "asked": True}


def pause(conn, type, verb="pause"):
    return conn.execute(f"select changed, matching from orchestrator.{verb}_type(%s)", [type]).fetchone()


def test_a_paused_pattern_keeps_all_its_types_from_being_claimed_also_those_with_handlers_of_their_own(conn):
    register(conn, "v", ["mail:", "mail:welcome", "other"])
    for type in ("mail:welcome", "mail:bye", "mail", "other"):
        enqueue(conn, type)
    types = ["mail:welcome", "mail:bye", "mail", "other"]
    assert pause(conn, "mail:*") == (True, 3)  # mail:, mail:welcome, and mail:bye, which is ready
    assert sorted(t["type"] for t in claim(conn, types=types)) == ["mail", "other"]
    assert claim(conn, types=["mail:", "*"]) == []
    assert pause(conn, "mail:*", "resume") == (True, 3)
    assert sorted(t["type"] for t in claim(conn, types=["mail:"])) == ["mail:bye", "mail:welcome"]


@pytest.mark.parametrize(("type", "matching"), [("nobody:*", 0), ("nobody", 0), ("t", 1), ("a:1", 1), ("a:", 1), ("*", 2), ("a*", 1),
    ("a", 0)])
def test_pausing_says_how_many_known_types_it_covers(conn, type, matching):
    register(conn, "v", ["a:"])
    assert pause(conn, type) == (True, matching) and pause(conn, type) == (False, matching)
    assert pause(conn, type, "resume") == (True, matching)


def test_retry_of_dead_letters_takes_a_pattern_and_a_bounded_number(conn):
    ids = [dead_letter(conn, type) for type in ("a:1", "a:2", "b")]
    with pytest.raises(psycopg.Error, match="limit: must be a whole number from 1 to 10000"):
        retry_dead(conn, 1000000, type="a:")
    assert retry_dead(conn, 10000, type="a:") == 2
    assert [status(conn, id) for id in ids] == ["pending", "pending", "dead_letter"]
    assert retry_dead(conn) == 1
