"""sql/30_claim.sql: who gets which task, in which order, under which claim."""
from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime

import psycopg
import pytest
from psycopg.types.json import Jsonb

from postgres import wait_for_lock
from steps import (
    audit,
    backend,
    background,
    claim,
    claim_one,
    claims,
    column,
    complete,
    declare_dead,
    enqueue,
    enqueue_some,
    events,
    promote,
    register,
    release,
    row,
    rows,
    rung,
    start,
    task,
    value,
)


def test_a_claim_takes_the_oldest_of_the_highest_priority_first(conn):
    register(conn)
    low, high, first, second = (enqueue(conn, priority=p) for p in (-1, 5, 0, 0))
    assert [t["id"] for t in claim(conn, limit=2)] == [high, first]
    assert [t["id"] for t in claim(conn)] == [second, low]
    assert claim(conn) == []


def test_a_claim_returns_what_a_handler_needs_and_marks_the_tasks(conn):
    register(conn)
    id = enqueue(conn, payload={"n": 1}, priority=3, max_retries=7)
    [got] = claim(conn)
    assert got["id"] == id and got["type"] == "t" and got["payload"] == {"n": 1} and got["priority"] == 3
    assert (got["attempts"], got["max_retries"], got["recoveries"]) == (0, 7, 0)
    assert 0 <= got["waited"] < 10
    found = task(conn, id)
    assert (found["status"], found["worker_id"], found["claim_id"]) == ("claimed", "w", got["claim_id"])
    assert found["claimed_at"] and found["queued_at"] is None and found["started_at"] is None
    assert row(conn, "select worker_id, open_tasks from orchestrator.claims") == {"worker_id": "w", "open_tasks": 1}


def test_waited_counts_from_when_the_task_became_ready(conn):
    register(conn)
    enqueue(conn)
    conn.execute("update orchestrator.tasks set queued_at = queued_at - interval '90 seconds'")
    assert 90 <= claim(conn)[0]["waited"] < 100


def test_one_claim_holds_all_that_a_call_took_over_priorities_and_types(conn):
    register(conn)
    for priority in range(3):
        enqueue(conn, "a", priority=priority)
        enqueue(conn, "b", priority=priority)
    got = claim(conn, types="ab", limit=5)
    assert claims(conn) == {got[0]["claim_id"]: 5} and len({t["claim_id"] for t in got}) == 1
    assert len(got) == 5 and [t["priority"] for t in got] == [2, 2, 1, 1, 0]


def test_a_claim_takes_only_the_types_it_was_asked_for(conn):
    register(conn)
    enqueue(conn, "a")
    b = enqueue(conn, "b")
    assert [t["id"] for t in claim(conn, types=["b", "c"])] == [b]
    for none in ([], None):
        assert rows(conn, "select * from orchestrator.claim_tasks('w', %s, 5)", none) == []


def test_lanes_of_one_priority_share_a_claim_equally_and_leave_nothing_over(conn):
    register(conn)
    enqueue_some(conn, 1000, "big")
    enqueue_some(conn, 15, "small")
    enqueue_some(conn, 3, "tiny")
    got = Counter(t["type"] for t in claim(conn, types=["big", "small", "tiny"], limit=30))
    assert got == {"big": 14, "small": 13, "tiny": 3}  # 10 each, and of the 7 that tiny leaves: 4 and 3
    assert Counter(t["type"] for t in claim(conn, types=["big", "small", "tiny"], limit=100)) == {"big": 98, "small": 2}


def test_the_share_of_a_lane_whose_tasks_are_locked_goes_to_the_others(conn, connect):
    register(conn)
    enqueue_some(conn, 10, "a")
    locked = enqueue(conn, "b")
    other = connect()
    with other.transaction():
        other.execute("select from orchestrator.tasks where id = %s for no key update", [locked])
        assert [t["type"] for t in claim(conn, types=["a", "b"], limit=4)] == ["a"] * 4   # a's share is two, and b gives none


def ids_of(claimed):
    return [t["id"] for t in claimed]


def test_large_claims_at_the_same_time_start_apart_and_leave_nothing_over(conn, connect):
    register(conn)
    ids = enqueue_some(conn, 1300)
    other = connect()
    with other.transaction():
        assert ids_of(claim(other, limit=500)) == ids[:500]
        assert ids_of(claim(conn, limit=500)) == ids[500:1000]
        assert ids_of(claim(conn, limit=500)) == ids[1000:]
        assert claim(conn, limit=500) == []


def test_a_claim_of_all_there_is_may_name_any_limit(conn, connect):
    register(conn)
    ids = enqueue_some(conn, 3)
    first, second = connect(), connect()
    with first.transaction(), second.transaction():
        for other in (first, second):   # they have the first two places in line
            claim(other, limit=500, types=["other"])
        assert ids_of(claim(conn, limit=2**31 - 1)) == ids


def test_a_large_claim_that_started_further_on_looks_before_that_too(conn, connect):
    register(conn)
    ids = enqueue_some(conn, 1200)
    enqueue_some(conn, 500, "other")
    other = connect()
    with other.transaction():
        claim(other, types=["other"], limit=500)   # has the first place, although it wants none of these
        assert ids_of(claim(conn, limit=499)) == ids[:499]   # not large
        assert ids_of(claim(conn, limit=500)) == ids[999:] + ids[499:798]
        assert ids_of(claim(conn, limit=500)) == ids[798:999]
    assert audit(conn) == []


def test_a_lane_too_short_to_start_further_on_gets_its_share_all_the_same(conn, connect):
    register(conn)
    enqueue_some(conn, 2000, "big")
    enqueue_some(conn, 10, "small")
    enqueue_some(conn, 500, "other")
    other = connect()
    with other.transaction():
        claim(other, types=["other"], limit=500)
        assert Counter(t["type"] for t in claim(conn, types=["big", "small"], limit=500)) == {"big": 490, "small": 10}


def test_a_claim_of_one_takes_turns_by_the_age_of_the_lanes_heads(conn):
    register(conn)
    old = enqueue(conn, "a")
    newer = enqueue(conn, "b")
    newest = enqueue(conn, "a")
    assert [claim_one(conn, types="ab")[1] for _ in range(3)] == [old, newer, newest]


def test_priorities_are_strict_over_lanes(conn):
    register(conn)
    enqueue_some(conn, 50, "a", priority=0)
    high = enqueue_some(conn, 20, "b", priority=1)
    assert [t["id"] for t in claim(conn, types="ab", limit=20)] == high


@pytest.mark.parametrize("limit", [None, -1])
def test_a_claim_without_a_sensible_limit_is_refused(conn, limit):
    register(conn)
    id = enqueue(conn)
    with pytest.raises(psycopg.Error) as refused:
        claim(conn, limit=limit)
    assert refused.value.sqlstate == "OR001"
    assert task(conn, id)["status"] == "pending"


def test_a_claim_of_nothing_leaves_no_claim(conn):
    register(conn)
    enqueue(conn)
    assert claim(conn, limit=0) == [] and claim(conn, types=["other"]) == []
    assert claims(conn) == {}


@pytest.mark.parametrize("state", ["unknown", "declared dead"])
def test_only_a_living_registered_worker_may_claim(conn, state):
    enqueue(conn)
    if state == "declared dead":
        register(conn)
        declare_dead(conn, "w")
    with pytest.raises(psycopg.Error, match="worker w is not registered, or was declared dead") as refused:
        claim(conn)
    assert refused.value.sqlstate == "OR003"


def test_a_paused_type_is_kept_and_not_claimed_until_it_is_resumed(conn):
    register(conn)
    paused, other = enqueue(conn, "a"), enqueue(conn, "b")
    assert value(conn, "select changed from orchestrator.pause_type('a')") is True
    late = enqueue(conn, "a")
    assert [t["id"] for t in claim(conn, types="ab")] == [other]
    assert value(conn, "select changed from orchestrator.resume_type('a')") is True
    assert [t["id"] for t in claim(conn, types="ab")] == [paused, late]


def test_two_claims_at_once_neither_wait_nor_share_a_task(conn, connect):
    register(conn)
    ids = enqueue_some(conn, 10)
    one, other = connect(autocommit=False), connect(autocommit=False)
    one.execute("set lock_timeout = '1ms'")
    other.execute("set lock_timeout = '1ms'")
    first = claim(one, limit=6)
    assert [t["id"] for t in first] == ids[:6]
    assert [t["id"] for t in claim(other, limit=6)] == ids[6:]
    one.rollback()
    other.commit()
    assert [t["id"] for t in claim(conn)] == ids[:6]
    assert audit(conn) == []


def test_start_marks_running_and_counts_the_attempt(conn):
    register(conn)
    one, other = enqueue(conn), enqueue(conn)
    claim_id = claim(conn)[0]["claim_id"]
    assert start(conn, claim_id, one) == 1
    found = task(conn, one)
    assert (found["status"], found["attempts"]) == ("running", 1) and found["started_at"] >= found["claimed_at"]
    assert task(conn, other)["status"] == "claimed"
    assert start(conn, claim_id, one, other) == 1  # the first has started already
    assert task(conn, one)["attempts"] == 1


def test_start_under_another_claim_does_nothing(conn):
    register(conn)
    id = enqueue(conn)
    old, _ = claim_one(conn)
    release(conn, old)
    new, _ = claim_one(conn)
    assert start(conn, old, id) == 0
    other = enqueue(conn)
    also, _ = claim_one(conn)
    assert start(conn, also, id) == 0
    assert {task(conn, i)["status"] for i in (id, other)} == {"claimed"} and new != old


def test_start_waits_for_a_release_and_then_finds_nothing(conn, connect):
    register(conn)
    id = enqueue(conn)
    claim_id, _ = claim_one(conn)
    releaser, starter = connect(autocommit=False), connect()
    release(releaser, claim_id)
    late = background(lambda: start(starter, claim_id, id))
    wait_for_lock(conn, backend(starter))
    releaser.commit()
    assert late.result(10) == 0
    assert (task(conn, id)["status"], task(conn, id)["attempts"]) == ("pending", 0)


def test_promote_makes_due_tasks_ready_at_the_tail(conn):
    register(conn)
    delayed = enqueue(conn, run_at=datetime(2030, 1, 1, tzinfo=UTC))
    waiting = enqueue(conn)
    assert promote(conn) == 0 and claim_one(conn)[1] == waiting
    waiting = enqueue(conn)
    conn.execute("update orchestrator.tasks set next_retry_at = clock_timestamp() where id = %s", [delayed])
    assert promote(conn) == 1
    assert [t["id"] for t in claim(conn)] == [waiting, delayed]


def test_promote_tells_when_the_next_is_due(conn):
    assert row(conn, "select * from orchestrator.promote_due()") == {"promoted": 0, "next_in": None, "fired": 0}
    conn.execute("select orchestrator.enqueue('t', p_run_at => clock_timestamp() + interval '100 seconds')")
    found = row(conn, "select * from orchestrator.promote_due()")
    assert found["promoted"] == 0 and 95 < found["next_in"] <= 100


def test_promote_is_bounded_and_takes_those_due_first(conn):
    ids = [enqueue(conn, run_at=datetime(2030, 1, 1, tzinfo=UTC)) for _ in range(3)]
    for age, id in enumerate(ids):
        conn.execute("update orchestrator.tasks set next_retry_at = now() - %s * interval '1 s' where id = %s", [age, id])
    found = row(conn, "select * from orchestrator.promote_due(2)")
    assert found["promoted"] == 2 and found["next_in"] <= 0  # call again at once
    assert column(conn, "select id::text from orchestrator.tasks where next_retry_at is not null") == [ids[0]]


def test_promote_makes_a_task_claimable_and_notifies(conn, connect):
    listener = connect()
    listener.execute("listen orchestrator")
    register(conn)
    enqueue(conn, run_at=datetime(2030, 1, 1, tzinfo=UTC))
    assert claim(conn) == []
    conn.execute("update orchestrator.tasks set next_retry_at = clock_timestamp()")
    conn.execute("select orchestrator.set_idle('w', true)")
    assert promote(conn) == 1
    assert rung(listener, conn) == [""]
    assert len(claim(conn)) == 1


def test_two_promotions_at_once_share_the_work_without_waiting(conn, connect):
    for _ in range(4):
        enqueue(conn, run_at=datetime(2030, 1, 1, tzinfo=UTC))
    conn.execute("update orchestrator.tasks set next_retry_at = clock_timestamp()")
    one, other = connect(autocommit=False), connect()
    other.execute("set lock_timeout = '1ms'")
    assert value(one, "select promoted from orchestrator.promote_due(3)") == 3
    assert promote(other) == 1
    one.commit()
    assert promote(conn) == 0


HEAP_ONLY = """select n_tup_upd as updated, n_tup_hot_upd as heap_only from pg_stat_xact_user_tables
               where relid = 'orchestrator.tasks'::regclass"""


def complete_five_hundred(conn):
    """Adds 500 tasks, claims and completes them by 100; returns how many completions there were, and how many heap-only ones."""
    conn.execute("select count(*) from orchestrator.enqueue_many('t', array_fill(%s::jsonb, array[500]))", [Jsonb({"text": "x" * 100})])
    completed = heap_only = 0
    for _ in range(5):
        got = claim(conn, limit=100)
        with conn.transaction():
            before = row(conn, HEAP_ONLY)
            assert complete(conn, got[0]["claim_id"], *[t["id"] for t in got]) == {}
            after = row(conn, HEAP_ONLY)
        completed += after["updated"] - before["updated"]
        heap_only += after["heap_only"] - before["heap_only"]
    return completed, heap_only


def test_completions_are_heap_only_in_steady_state(conn):
    """A claim can't be: it changes queued_at and claim_id. A completion must be, or the table bloats."""
    register(conn)
    conn.execute("alter table orchestrator.tasks set (autovacuum_enabled = off)")
    for round in range(6):
        completed, heap_only = complete_five_hundred(conn)
        assert completed == 500
        assert round < 2 or heap_only >= 0.9 * completed
        conn.execute("delete from orchestrator.tasks where completed_at is not null and random() < 0.7")
        conn.execute("vacuum orchestrator.tasks")


def test_completions_are_heap_only_while_others_keep_old_versions(conn, connect):
    """As the claims of other workers do: the page of a task has room for all its versions."""
    register(conn)
    other = connect(autocommit=False)
    other.execute("set transaction isolation level repeatable read")
    other.execute("select 1")
    completed, heap_only = complete_five_hundred(conn)
    assert completed == 500
    assert heap_only >= 0.8 * completed   # 459 with the table's fillfactor of 32, 219 with 40


def test_a_task_that_was_claimed_twice_has_two_claims(conn):
    register(conn)
    id = enqueue(conn)
    old, _ = claim_one(conn)
    release(conn, old)
    new, _ = claim_one(conn)
    assert new > old and claims(conn) == {new: 1}
    assert complete(conn, old, id) == {id: "rejected"} and complete(conn, new, id) == {}
    assert events(conn, id) == ["released"] and audit(conn) == []
