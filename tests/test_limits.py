"""Limits: what runs at once of a type or pattern, of each concurrency key, and what starts in a stretch of time."""
from __future__ import annotations

import threading
import time
from random import Random
from typing import Any

import psycopg
import pytest

from postgres import wait_for_lock
from steps import (
    audit,
    backend,
    background,
    cancel,
    claim,
    column,
    complete,
    declare_dead,
    enqueue,
    enqueue_some,
    events,
    fail,
    lead,
    promote,
    raise_floors,
    recover,
    register,
    release,
    retry,
    row,
    rows,
    rung,
    snooze,
    start,
    status,
    task,
    value,
)


def limit(conn, type: str = "t", **named: Any) -> bool:
    """limit_type(max_running=, max_per_key=, rate=, per=): whether that is new."""
    arguments = "".join(f", p_{name} => %({name})s" for name in named)
    return conn.execute(f"select changed from orchestrator.limit_type(%(type)s{arguments})", {"type": type, **named}).fetchone()[0]


def claimed(conn, worker: str = "w", types=("t",), limit: int = 10) -> list[str]:
    return [t["id"] for t in claim(conn, worker, types, limit)]


def finish(conn, *ids: str) -> None:
    """Complete tasks, each by the claim that has it."""
    for id in ids:
        assert complete(conn, task(conn, id)["claim_id"], id) == {}


def parked(conn) -> list[str]:
    return column(conn, "select id::text from orchestrator.tasks where parked_at is not null order by parked_at")


def keyed(conn, *keys: str | None, type: str = "t", **named: Any) -> list[str]:
    return [enqueue(conn, type, concurrency_key=key, **named) for key in keys]


@pytest.fixture
def conn(conn):
    """With a worker `w`; after the test nothing may break a rule of the audit."""
    register(conn, "w", ("t", "u", "api:*"))
    yield conn
    assert audit(conn) == []


# --- max_running ---------------------------------------------------------------------------------------------------------------

def test_no_more_are_in_flight_than_the_limit_has(conn):
    ids = enqueue_some(conn, 5)
    assert limit(conn, max_running=3) is True
    assert claimed(conn, limit=2) == ids[:2]
    assert claimed(conn) == ids[2:3]
    assert claimed(conn) == []
    finish(conn, ids[1])
    assert claimed(conn) == ids[3:4]


def test_the_same_limit_again_changes_nothing(conn):
    assert limit(conn, max_running=3) is True
    assert limit(conn, max_running=3) is False
    assert limit(conn, max_running=4) is True
    assert limit(conn) is True
    assert limit(conn) is False


@pytest.mark.parametrize(("named", "field"), [
    ({"max_running": 0}, "max_running"), ({"max_per_key": -1}, "max_per_key"), ({"rate": 0, "per": "1 s"}, "rate"), ({"rate": 5}, "per"),
    ({"per": "1 s"}, "per"), ({"rate": 5, "per": "0"}, "per"), ({"rate": 5, "per": "2 days"}, "per"),
    ({"type": "a*b", "max_running": 1}, "type")])
def test_an_impossible_limit_is_refused_by_the_name_of_its_field(conn, named, field):
    with pytest.raises(psycopg.Error, match=f"^{field}: ") as caught:
        limit(conn, **named)
    assert caught.value.sqlstate == "OR001"


def test_a_pattern_limits_its_types_together(conn):
    limit(conn, "api:*", max_running=2)
    for type in ("api:x", "api:y", "api:z"):
        enqueue_some(conn, 2, type)
    free = enqueue(conn, "t")
    assert len(claimed(conn, types=["api:*"])) == 2
    assert claimed(conn, types=["api:*", "t"]) == [free]
    assert claimed(conn, types=["api:y"]) == []


def test_a_type_is_under_its_own_limit_or_that_of_the_longest_pattern(conn):
    limit(conn, "*", max_running=1)
    limit(conn, "api:*", max_running=2)
    limit(conn, "api:x", max_running=3)
    for type in ("api:x", "api:y", "t"):
        enqueue_some(conn, 5, type)
    got = claim(conn, types=["api:x", "api:y", "t"], limit=50)
    assert sorted(t["type"] for t in got) == ["api:x"] * 3 + ["api:y"] * 2 + ["t"]


def test_tasks_of_other_lanes_take_what_the_limit_leaves(conn):
    limit(conn, max_running=1)
    enqueue_some(conn, 30)
    enqueue_some(conn, 30, "u")
    got = claim(conn, types=["t", "u"], limit=20)
    assert sorted(t["type"] for t in got) == ["t"] + ["u"] * 19


def test_a_limited_lane_gives_all_that_is_asked_for(conn):
    limit(conn, max_running=100)
    enqueue_some(conn, 30)
    enqueue_some(conn, 2, "u")
    assert len(claim(conn, types=["t", "u"], limit=20)) == 20


def test_higher_priority_comes_first_under_a_limit(conn):
    limit(conn, max_running=2)
    low, high = enqueue(conn), enqueue(conn, priority=5)
    assert claimed(conn, limit=1) == [high]
    assert claimed(conn, limit=1) == [low]


# --- a permit comes back however a task leaves its claim --------------------------------------------------------------------------

def leave(conn, way: str, claim_id: int, id: str) -> None:
    if way == "completed":
        assert complete(conn, claim_id, id) == {}
    elif way == "failed":
        assert fail(conn, claim_id, id, after="1 hour") == "retry_scheduled"
    elif way == "dead":
        assert fail(conn, claim_id, id, permanent=True) == "dead_letter"
    elif way == "released":
        assert release(conn, claim_id, id) == 1
    elif way == "forgotten":
        assert value(conn, "select orchestrator.release_forgotten('w', '{}')") == 1
    elif way == "snoozed":
        assert snooze(conn, claim_id, id) == "snoozed"
    elif way in ("cancelled", "cancelled by release", "cancelled by snooze"):
        assert cancel(conn, id) == "cancelling"
        if way == "cancelled":
            assert complete(conn, claim_id, id) == {id: "cancelled"}
        elif way == "cancelled by release":
            assert release(conn, claim_id, id) == 1
        else:
            assert snooze(conn, claim_id, id) == "cancelled"
    else:
        if way == "recovered running":
            start(conn, claim_id, id)
        term = lead(conn)
        declare_dead(conn, "w")
        recover(conn, term)
        register(conn, "v")


@pytest.mark.parametrize("way", ["completed", "failed", "dead", "released", "forgotten", "snoozed", "cancelled", "cancelled by release",
                                 "cancelled by snooze", "recovered", "recovered running"])
def test_a_permit_comes_back_when_a_task_leaves_its_claim(conn, way):
    limit(conn, max_running=1, max_per_key=1)
    first, second = keyed(conn, "k", "k")
    [got] = claim(conn)
    assert got["id"] == first and claimed(conn) == []
    leave(conn, way, got["claim_id"], first)
    worker = "v" if way.startswith("recovered") else "w"
    goes_on = first if way in ("released", "forgotten", "recovered") else second   # put back at its old place
    assert claimed(conn, worker) == [goes_on]
    finish(conn, goes_on)
    cancel(conn, first)
    assert claimed(conn, worker) in ([], [second])
    for id in column(conn, "select id::text from orchestrator.tasks where status = 'claimed'"):
        finish(conn, id)
    assert (parked(conn), rows(conn, "select * from orchestrator.claims")) == ([], [])


def test_a_bad_row_in_recovery_keeps_only_its_own_permit(conn):
    limit(conn, max_running=2)
    ids = enqueue_some(conn, 4)
    claimed(conn)
    term = lead(conn)
    declare_dead(conn, "w")
    conn.execute(f"alter table orchestrator.tasks add constraint bad check (id <> '{ids[0]}' or status <> 'pending') not valid")
    assert recover(conn, term)["failed"] == 1
    register(conn, "v")
    assert claimed(conn, "v") == [ids[1]]
    conn.execute("alter table orchestrator.tasks drop constraint bad")
    recover(conn, term)
    assert claimed(conn, "v") == [ids[0]]


# --- max_per_key ------------------------------------------------------------------------------------------------------------------

def test_no_more_of_a_key_are_in_flight_and_others_go_past(conn):
    limit(conn, max_per_key=2)
    a1, a2, a3, b1, none = keyed(conn, "a", "a", "a", "b", None)
    assert claimed(conn) == [a1, a2, b1, none]
    assert parked(conn) == [a3]
    assert task(conn, a3)["parked_by"] == "t"
    finish(conn, a1)
    assert claimed(conn) == [a3]


def test_one_of_each_key_at_a_time_is_first_in_first_out(conn):
    limit(conn, max_per_key=1)
    ids = keyed(conn, *"aaaa")
    order = []
    for turn in range(6):
        if turn == 2:
            ids += keyed(conn, "a", "a")   # younger than those that are parked
        [id] = claimed(conn)
        assert claimed(conn) == []
        order.append(id)
        finish(conn, id)
    assert order == ids


def test_what_comes_between_the_note_and_the_claim_waits_behind_the_parked(conn, connect):
    """The completion commits after the claim has read the notes, and before it counts."""
    limit(conn, max_per_key=1)
    first, second = keyed(conn, "a", "a")
    claimed(conn)
    assert claimed(conn) == [] and parked(conn) == [second]
    third = enqueue(conn, concurrency_key="a")
    finish(conn, first)
    conn.execute("delete from orchestrator.freed_keys")   # as if the claim's first statement had come before
    assert claimed(conn) == []
    assert parked(conn) == [second, third]
    conn.execute("insert into orchestrator.freed_keys values ('t', 'a')")
    assert claimed(conn) == [second]


def test_a_parked_task_keeps_its_place_and_a_higher_priority_goes_first(conn):
    limit(conn, max_per_key=1)
    first, low = keyed(conn, "a", "a")
    claimed(conn)
    claimed(conn)
    high = enqueue(conn, concurrency_key="a", priority=5)
    claimed(conn)
    finish(conn, first)
    assert claimed(conn) == [high]
    finish(conn, high)
    assert claimed(conn) == [low]


def test_keys_are_limited_across_the_types_of_a_pattern(conn):
    limit(conn, "api:*", max_per_key=1)
    [x], [y] = keyed(conn, "a", type="api:x"), keyed(conn, "a", type="api:y")
    assert claimed(conn, types=["api:*"]) == [x]
    assert parked(conn) == [y]
    finish(conn, x)
    assert claimed(conn, types=["api:*"]) == [y]   # though nothing of the pattern was ready


def test_a_flood_of_one_tenant_does_not_delay_another(conn):
    limit(conn, max_per_key=2)
    conn.execute("select count(*) from orchestrator.enqueue_many('t', array_fill('{}'::jsonb, array[5000]), 0, null, null, null, "
                 "array_fill('flood'::text, array[5000]))")
    other = enqueue(conn, concurrency_key="other")
    assert other in claimed(conn)
    assert len(parked(conn)) == 4998


def test_what_is_behind_the_last_task_that_starts_is_not_parked(conn):
    """b2 waits for b1, which is in no flight yet: if b1 is cancelled, nobody would note that the key has room."""
    limit(conn, max_per_key=1)
    a1, b1, b2 = keyed(conn, "a", "b", "b")
    assert claimed(conn, limit=1) == [a1]
    assert parked(conn) == []
    cancel(conn, b1)
    assert claimed(conn) == [b2]


def test_a_parked_task_can_be_cancelled_and_retried(conn):
    limit(conn, max_per_key=1)
    first, second, third = keyed(conn, *"aaa")
    claimed(conn)
    assert parked(conn) == [second, third]
    assert cancel(conn, second) == "cancelled"
    assert (status(conn, second), events(conn, second)) == ("cancelled", ["cancelled"])
    finish(conn, first)
    assert claimed(conn) == [third]
    retry(conn, second)
    assert claimed(conn) == [] and parked(conn) == [second]


def test_a_parked_task_that_another_transaction_has_locked_is_looked_for_again(conn, connect):
    limit(conn, max_per_key=1)
    first, second = keyed(conn, "a", "a")
    claimed(conn)
    other = connect(autocommit=False)
    assert cancel(other, second) == "cancelled"
    finish(conn, first)
    assert claimed(conn) == []
    other.rollback()
    assert claimed(conn) == [second]


def test_a_task_put_back_before_a_locked_elder_is_parked_again_and_not_forgotten(conn, connect):
    """The elder is being cancelled: the younger is put back in its stead, and waits behind it, since that may be rolled back."""
    limit(conn, max_per_key=1)
    first, second, third = keyed(conn, *"aaa")
    claimed(conn)
    other = connect(autocommit=False)
    cancel(other, second)
    finish(conn, first)
    assert claimed(conn) == [] and parked(conn) == [second, third]
    other.commit()
    assert claimed(conn) == [third]


def test_a_task_that_was_put_back_and_then_cancelled_gives_way(conn):
    limit(conn, max_per_key=1)
    first, second, third = keyed(conn, *"aaa")
    claimed(conn)
    finish(conn, first)
    assert claimed(conn, limit=0) == []
    assert parked(conn) == [third]   # second is back in its lane
    cancel(conn, second)
    assert claimed(conn) == [third]


def test_a_paused_type_does_not_hold_up_the_key_for_others_of_the_pattern(conn):
    limit(conn, "api:*", max_per_key=1)
    first, x, y = (keyed(conn, "a", type=type)[0] for type in ("api:x", "api:x", "api:y"))
    assert claimed(conn, types=["api:*"]) == [first]
    assert parked(conn) == [x, y]
    conn.execute("select orchestrator.pause_type('api:x')")
    finish(conn, first)
    assert claimed(conn, types=["api:*"]) == [y]


def test_a_retry_takes_its_turn_again(conn):
    limit(conn, max_per_key=1)
    first, second = keyed(conn, "a", "a")
    [got] = claim(conn)
    fail(conn, got["claim_id"], first, after="0")
    promote(conn)
    assert claimed(conn) == [second]
    assert parked(conn) == [first]


def test_parked_tasks_go_back_below_a_floor_that_has_risen(conn):
    limit(conn, max_per_key=1)
    first, second = keyed(conn, "a", "a")
    claimed(conn)
    enqueue(conn, concurrency_key="b")
    raise_floors(conn, lead(conn))
    finish(conn, first)
    assert second in claimed(conn)


def test_each_claim_of_a_limit_has_one_key(conn):
    limit(conn, max_per_key=3)
    keyed(conn, "a", "b", "a", None)
    enqueue(conn, "u", concurrency_key="a")
    got = claim(conn, types=["t", "u"])
    assert len({t["claim_id"] for t in got}) == 4
    named = rows(conn, "select limit_name, key, open_tasks from orchestrator.claims order by limit_name, key")
    assert [tuple(c.values()) for c in named] == [("t", "a", 2), ("t", "b", 1), ("t", None, 1), (None, None, 1)]


# --- rate -------------------------------------------------------------------------------------------------------------------------

def test_no_more_start_in_a_window_than_the_rate_has(conn):
    limit(conn, rate=3, per="1 hour")
    ids = enqueue_some(conn, 8)
    assert claimed(conn, limit=2) == ids[:2]
    finish(conn, *ids[:2])
    assert claimed(conn) == ids[2:3]
    assert claimed(conn) == []
    conn.execute("update orchestrator.starts set at = at - interval '1 hour' where n = 2")   # as if the hour had passed
    assert claimed(conn) == ids[3:5]
    assert value(conn, "select sum(n) from orchestrator.starts") == 3


def test_starts_in_the_future_do_not_count_after_the_clock_was_set_back(conn):
    limit(conn, rate=1, per="1 hour")
    ids = enqueue_some(conn, 2)
    claimed(conn)
    conn.execute("update orchestrator.starts set at = clock_timestamp() + interval '1 day'")
    assert claimed(conn) == ids[1:]


# --- limits that change -----------------------------------------------------------------------------------------------------------

def test_a_lowered_limit_stops_nothing_and_lets_nothing_start(conn):
    limit(conn, max_running=4)
    ids = enqueue_some(conn, 6)
    assert len(claimed(conn)) == 4
    limit(conn, max_running=2)
    assert claimed(conn) == []
    finish(conn, ids[0], ids[1])
    assert claimed(conn) == []
    finish(conn, ids[2])
    assert claimed(conn) == ids[4:5]


def test_a_new_limit_counts_what_is_in_flight_already(conn):
    ids = enqueue_some(conn, 5)
    enqueue(conn, "u")
    assert len(claim(conn, types=["t", "u"], limit=4)) == 4   # three of t
    limit(conn, max_running=3)
    assert claimed(conn) == []
    finish(conn, ids[0])
    assert claimed(conn) == ids[3:4]


def test_a_new_limit_of_keys_counts_what_is_in_flight_already(conn):
    first, second = keyed(conn, "a", "a")
    assert claimed(conn, limit=1) == [first]
    limit(conn, max_per_key=1)
    assert claimed(conn) == [] and parked(conn) == [second]
    finish(conn, first)   # of a claim that knows nothing of the limit
    assert claimed(conn) == [second]


def test_a_limit_of_keys_added_to_one_of_all(conn):
    limit(conn, max_running=5)
    first, second = keyed(conn, "a", "a")
    assert claimed(conn, limit=1) == [first]
    limit(conn, max_running=5, max_per_key=1)
    assert claimed(conn) == []
    finish(conn, first)
    assert claimed(conn) == [second]


@pytest.mark.parametrize("then", [{}, {"max_per_key": 3}, {"max_running": 9}])
def test_a_raised_or_removed_limit_lets_parked_tasks_go(conn, then):
    limit(conn, max_per_key=1)
    ids = keyed(conn, *"aaabb")
    assert len(claimed(conn)) == 2
    limit(conn, **then)
    assert sorted(claimed(conn)) == sorted(set(ids) - {ids[0], ids[3]})
    assert parked(conn) == []
    assert value(conn, "select count(*) from orchestrator.type_limits") == bool(then)


def test_tasks_parked_under_a_pattern_go_on_under_a_limit_of_their_own(conn):
    limit(conn, "*", max_per_key=1)
    first, second, third = keyed(conn, *"aaa")
    assert claimed(conn) == [first]
    finish(conn, first)
    limit(conn, "t", max_per_key=1)
    for id in (second, third):
        assert claimed(conn) == [id]
        finish(conn, id)


def test_a_limit_waits_for_another_one_that_is_not_committed(conn, connect):
    """Neither would see that they share types, and what is parked under one of them would stay there."""
    other, late = connect(autocommit=False), connect()
    ids = keyed(conn, *"aaa")
    limit(other, "t", max_per_key=1)
    waits = background(lambda: limit(late, "*", max_per_key=1))
    wait_for_lock(conn, backend(late))
    assert claimed(conn, limit=1) == ids[:1]   # no claim waits
    other.commit()
    assert waits.result(20) is True
    finish(conn, ids[0])
    for id in ids[1:]:
        assert claimed(conn) == [id]
        finish(conn, id)


def test_many_parked_tasks_go_back_in_parts(conn):
    limit(conn, max_per_key=1)
    conn.execute("select count(*) from orchestrator.enqueue_many('t', array_fill('{}'::jsonb, array[12000]), 0, null, null, null, "
                 "array_fill('a'::text, array[12000]))")
    claimed(conn)
    assert len(parked(conn)) == 11999
    limit(conn)
    claimed(conn)
    assert len(parked(conn)) == 1999
    claimed(conn)
    assert len(parked(conn)) == 0


def test_a_claim_does_not_wait_for_long_for_an_operators_open_transaction(conn, connect):
    limit(conn, max_running=1)
    enqueue(conn)
    free = enqueue(conn, "u")
    other = connect(autocommit=False)
    limit(other, max_running=2)
    assert claimed(conn, types=["t", "u"]) == [free]
    other.rollback()
    assert len(claimed(conn, types=["t", "u"])) == 1


# --- locks, notifications, rights ---------------------------------------------------------------------------------------------------

def test_two_claims_under_one_limit_follow_each_other(conn, connect):
    limit(conn, max_running=3)
    enqueue_some(conn, 6)
    finish(conn, *claimed(conn, limit=1))   # the first one after a change writes to the limit's row
    first, second = connect(autocommit=False), connect()
    assert len(claimed(first, limit=2)) == 2
    later = background(lambda: claimed(second, limit=5))
    wait_for_lock(conn, backend(second))
    first.commit()
    assert len(later.result(20)) == 1


def test_a_completion_does_not_wait_for_a_claim(conn, connect):
    limit(conn, max_running=3, max_per_key=2)
    keyed(conn, *"aaa")
    ids = claimed(conn)
    other = connect(autocommit=False)
    claimed(other)
    conn.execute("set lock_timeout = '1s'")
    finish(conn, *ids)
    other.commit()
    assert len(claimed(conn)) == 1


def test_claims_without_a_limit_never_meet_the_lock(conn, connect):
    limit(conn, max_running=3)
    enqueue(conn)
    other = connect(autocommit=False)
    claimed(other)
    free = enqueue(conn, "u")
    conn.execute("set lock_timeout = '100ms'")
    assert claimed(conn, types=["u"]) == [free]


def test_a_permit_that_comes_back_wakes_an_idle_worker_if_something_waits(conn, connect):
    listening = connect()
    listening.execute("listen orchestrator")
    limit(conn, max_running=2, max_per_key=1)
    first, second, u = *keyed(conn, "a", "a"), enqueue(conn, "u")
    assert claimed(conn, types=["t", "u"]) == [first, u]
    conn.execute("update orchestrator.workers set idle = true")
    finish(conn, u)
    assert rung(listening, conn) == []
    finish(conn, first)
    assert rung(listening, conn) == [""]
    assert claimed(conn) == [second]
    finish(conn, second)
    assert rung(listening, conn) == []   # nothing waits


def test_a_changed_limit_wakes_an_idle_worker(conn, connect):
    listening = connect()
    listening.execute("listen orchestrator")
    conn.execute("update orchestrator.workers set idle = true")
    limit(conn, max_running=1)
    limit(conn, max_running=1)
    assert rung(listening, conn) == [""]


def test_limits_refuse_a_snapshot_that_is_frozen(conn, connect):
    limit(conn, max_running=3)
    other = connect(autocommit=False)
    other.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    with pytest.raises(psycopg.Error) as caught:
        claimed(other)
    assert caught.value.sqlstate == "OR005"


def test_large_payloads_under_a_limit_stay_within_the_bytes_of_the_claim(conn):
    limit(conn, max_running=50)
    for _ in range(6):
        enqueue(conn, payload={"x": "y" * 200000})
    assert len(rows(conn, "select id from orchestrator.claim_tasks('w', '{t}', 10, 600000)")) == 2
    assert len(rows(conn, "select id from orchestrator.claim_tasks('w', '{t}', 10, 1000)")) == 1


def test_a_workers_own_role_claims_under_limits(conn, connect):
    limit(conn, max_running=2, max_per_key=1, rate=5, per="1 hour")
    first, second = keyed(conn, "a", "a")
    other = connect()
    other.execute("set role orchestrator_worker")
    assert claimed(other) == [first]
    finish(other, first)
    assert claimed(other) == [second]
    other.execute("set role orchestrator_operator")
    assert limit(other, max_running=9) is True
    other.execute("set role orchestrator_worker")
    claimed(other)
    other.execute("set role orchestrator_auditor")
    assert row(other, "select type, max_running, in_flight, parked from orchestrator.limits") == {
        "type": "t", "max_running": 9, "in_flight": 1, "parked": 0}


# --- what people see ----------------------------------------------------------------------------------------------------------------

def explain(conn, id: str) -> str:
    return value(conn, "select orchestrator.explain_task(%s)", id)


def test_a_parked_task_names_its_limit_and_who_holds_its_key(conn):
    limit(conn, max_per_key=1)
    first, second = keyed(conn, "tenant", "tenant")
    claimed(conn)
    assert explain(conn, second) == (f"parked: as many of its concurrency key 'tenant' are in flight as the limit t allows "
                                     f"({first} by worker w, last heard of 0 s ago); it goes on when one of them ends")
    conn.execute("delete from orchestrator.workers")
    register(conn, "v")
    assert "by worker w, which is gone" in explain(conn, second)


def test_a_ready_task_names_the_limit_that_is_full(conn):
    limit(conn, "*", max_running=1)
    first, second = enqueue_some(conn, 2)
    claimed(conn)
    said = explain(conn, second)
    assert said.startswith(f"ready, but the limit * is full: 1 of 1 are in flight ({first} by worker w") and "limit_type('*', …)" in said


def test_a_ready_task_names_the_rate_that_is_used_up(conn):
    limit(conn, rate=1, per="1 hour")
    claimed(conn)
    first, second = enqueue_some(conn, 2)
    assert explain(conn, second).startswith("ready; 1 of the same type")
    assert claimed(conn) == [first]
    at = value(conn, "select next_start_at from orchestrator.limits")
    assert explain(conn, second).startswith("ready, but 1 started under the limit t within 01:00:00: the next may start at 20")
    assert value(conn, "select claimed_at + interval '1 hour' from orchestrator.tasks where id = %s", first) == at


def test_parked_tasks_are_counted_listed_and_found(conn):
    limit(conn, max_per_key=1, max_running=3)
    ids = keyed(conn, *"aaa")
    claimed(conn)
    assert row(conn, "select waiting, parked, in_flight from orchestrator.queue_stats where type = 't'") == {
        "waiting": 0, "parked": 2, "in_flight": 1}
    assert column(conn, "select id::text from orchestrator.pending_tasks order by id") == ids[1:]
    found = value(conn, "select orchestrator.api_tasks(p_type => 't')")["tasks"]
    assert [t["id"] for t in found] == [ids[0], ids[1], ids[2]]
    assert [t["id"] for t in value(conn, "select orchestrator.api_tasks(p_status => 'parked')")["tasks"]] == ids[1:]
    term = lead(conn)
    conn.execute("select orchestrator.sample_stats('leader', %s)", [term])
    overview = value(conn, "select orchestrator.api_overview()")
    assert overview["totals"]["parked"] == 2 and overview["totals"]["ended_total"] == 0
    assert overview["limits"] == [{"limit": "t", "max_running": 3, "max_per_key": 1, "rate": None, "per": None, "in_flight": 1, "parked": 2,
                                   "started_lately": None, "next_start_in": None, "keys": [["a", 1]]}]
    metrics = value(conn, "select orchestrator.metrics()")
    assert metrics["limits"] == [{"limit": "t", "in_flight": 1, "max": 3}]
    assert {t["type"]: t["parked"] for t in metrics["types"]}["t"] == 2


def broken(conn, update: str) -> list[str]:
    """The rules that the audit finds broken after this update, which is undone."""
    with conn.transaction(force_rollback=True):
        conn.execute(update)
        return sorted({invariant for invariant, *_ in audit(conn)})


def test_the_audit_knows_the_rules_of_limits(conn):
    limit(conn, max_per_key=1, max_running=2)
    keyed(conn, *"aab")
    claimed(conn)
    assert broken(conn, "update orchestrator.type_limits set max_running = 1") == ["no more are in flight than a limit has"]
    assert broken(conn, "update orchestrator.claims set key = 'a'") == [
        "a claim has the key of its tasks", "no more are in flight than a limit has"]
    assert broken(conn, "update orchestrator.claims set key = null") == [
        "a claim has the key of its tasks", "a parked task goes on when its key has room"]
    assert broken(conn, "update orchestrator.type_limits set max_per_key = 2") == ["a parked task goes on when its key has room"]
    assert broken(conn, "delete from orchestrator.type_limits") == ["a parked task goes on when its key has room"]
    assert broken(conn, "delete from orchestrator.type_limits; insert into orchestrator.freed_keys values ('t', null)") == []


def test_meta_and_key_travel_with_the_task(conn):
    id = enqueue(conn, concurrency_key="k", meta='{"trace": {"password": 1}}')
    [got] = claim(conn)
    assert got["meta"] == {"trace": {"password": 1}}
    for shown in ("show_task", "get_task"):
        told = value(conn, f"select orchestrator.{shown}(%s)", id)
        assert (told["meta"], told["concurrency_key"]) == ({"trace": {"password": 1}}, "k")
    query = """select (orchestrator.enqueue_many('t', array['{}', '{}']::jsonb[], p_concurrency_keys => array['a', null],
               p_idempotency_keys => %s, p_meta => '{"m": 1}')).id"""
    for keys in (None, ["i", None]):
        ids = column(conn, query, keys)
        assert [(task(conn, id)["concurrency_key"], task(conn, id)["meta"]) for id in ids] == [("a", {"m": 1}), (None, {"m": 1})]
    lines = ['{"type": "t", "concurrency_key": "a", "meta": {"m": 2}}', '{"type": "t"}',
             '{"type": "t", "concurrency_key": 5}', '{"type": "t", "meta": 5}']
    got = rows(conn, "select * from orchestrator.enqueue_lines(%s) order by line", lines)
    assert [task(conn, r["id"])["concurrency_key"] for r in got[:2]] == ["a", None]
    assert task(conn, got[0]["id"])["meta"] == {"m": 2}
    assert [r["problem"] for r in got[2:]] == ["concurrency_key: must be a string", "meta: must be a JSON object of at most 8 KiB"]


@pytest.mark.parametrize(("named", "field"), [
    ({"concurrency_key": ""}, "concurrency_key"), ({"concurrency_key": "x" * 256}, "concurrency_key"), ({"meta": "[]"}, "meta"),
    ({"meta": f'{{"x": "{"y" * 8192}"}}'}, "meta")])
def test_an_impossible_key_or_meta_is_refused(conn, named, field):
    with pytest.raises(psycopg.Error, match=f"^{field}: ") as caught:
        enqueue(conn, **named)
    assert caught.value.sqlstate == "OR001"


# --- all together -------------------------------------------------------------------------------------------------------------------

LIMITS = {"a": {"max_running": 3}, "b": {"max_per_key": 2},
          "api:*": {"max_running": 4, "max_per_key": 1}, "free": {"rate": 50, "per": "200 ms"}}


class Stress:
    """Producers, workers that do everything, an operator, and a monitor that counts in snapshots of its own."""

    def __init__(self, connect, seed: int) -> None:
        self.connect, self.seed, self.stop, self.errors = connect, seed, threading.Event(), []
        self.most: dict[tuple[str, str | None], int] = {}

    def thread(self, work, *args) -> threading.Thread:
        def run() -> None:
            try:
                work(self.connect(), Random(f"{self.seed} {work.__name__} {args}"), *args)
            except Exception as error:
                self.errors.append(error)
                self.stop.set()
        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def produce(self, conn, draw: Random, n: int) -> None:
        for _ in range(n):
            type = draw.choice(["a", "b", "api:x", "api:y", "free"])
            enqueue(conn, type, priority=draw.choice([0, 0, 5]), concurrency_key=draw.choice([None, "k1", "k2", "k3"]))

    def work(self, conn, draw: Random, number: int) -> None:
        while not self.stop.is_set():
            name = register(conn, f"w{number}.{draw.random()}", {type: {"max_retries": 50, "base_delay": 0.01, "max_delay": 0.02}
                                                                 for type in ("a", "b", "api:*", "free")})
            while not self.stop.is_set():
                if draw.random() < 0.2:
                    promote(conn)
                got = claim(conn, name, ["a", "b", "api:*", "free"], draw.randint(1, 8))
                if draw.random() < 0.5:
                    self.stop.wait(draw.random() * 0.004)
                if draw.random() < 0.02:
                    declare_dead(conn, name)   # and what it holds is left for recovery
                    break
                draw.shuffle(got)
                for t in got:
                    self.outcome(conn, draw, t["claim_id"], t["id"])
                if not got:
                    self.stop.wait(0.003)

    def outcome(self, conn, draw: Random, claim_id: int, id: str) -> None:
        way = draw.random()
        if way < 0.1:
            fail(conn, claim_id, id, after=draw.choice([None, "0"]))
        elif way < 0.15:
            release(conn, claim_id, id)
        elif way < 0.2:
            snooze(conn, claim_id, id, "10 ms")
        else:
            if way < 0.3:
                start(conn, claim_id, id)
            complete(conn, claim_id, id)

    def operate(self, conn, draw: Random) -> None:
        term = lead(conn)
        while not self.stop.wait(0.01):
            recover(conn, term)
            if draw.random() < 0.3:
                raise_floors(conn, term)
            if found := column(conn, "select id::text from orchestrator.tasks where completed_at is null order by random() limit 1"):
                cancel(conn, found[0])
            type = draw.choice(list(LIMITS))
            smaller = {name: max(1, n // 2) if isinstance(n, int) else n for name, n in LIMITS[type].items()}
            limit(conn, type, **draw.choice([LIMITS[type], smaller]))

    def monitor(self, conn, draw: Random) -> None:
        name = "case when type like 'api:%%' then 'api:*' else type end"
        query = f"""select {name}, null, count(*) from orchestrator.tasks where status in ('claimed', 'running') group by 1
                    union all select {name}, concurrency_key, count(*) from orchestrator.tasks
                    where status in ('claimed', 'running') and concurrency_key is not null group by 1, 2"""
        while not self.stop.wait(0.002):
            for limit, key, n in conn.execute(query.replace("%%", "%")):
                self.most[limit, key] = max(self.most.get((limit, key), 0), n)


@pytest.mark.parametrize("seed", range(2))
def test_limits_hold_in_every_snapshot_and_nothing_is_left_waiting(conn, connect, seed):
    for type, named in LIMITS.items():
        limit(conn, type, **named)
    stress = Stress(connect, seed)
    threads = [stress.thread(stress.work, number) for number in range(4)] + [stress.thread(stress.operate), stress.thread(stress.monitor)]
    producer = stress.thread(stress.produce, 600)
    counts = """select count(*) filter (where status not in ('completed', 'cancelled', 'dead_letter')),
                       count(*) filter (where status = 'completed')
                from orchestrator.tasks"""
    last, since = None, time.monotonic()
    while not stress.stop.is_set():
        left = conn.execute(counts).fetchone()
        if left[0] == 0 and not producer.is_alive():
            break
        if left != last:
            last, since = left, time.monotonic()
        if time.monotonic() - since > 10:
            stuck = rows(conn, "select type, status, concurrency_key, parked_by, worker_id, next_retry_at from orchestrator.tasks "
                               "where completed_at is null")
            stress.errors.append(AssertionError(f"stuck: {stuck[:5]} {rows(conn, 'select * from orchestrator.freed_keys')}"))
            break
        time.sleep(0.05)
    stress.stop.set()
    for thread in [*threads, producer]:
        thread.join()
    assert stress.errors == []
    for (type, key), most in stress.most.items():
        allowed = LIMITS[type].get("max_running" if key is None else "max_per_key")
        assert allowed is None or most <= allowed, (type, key, most)
    assert value(conn, "select count(*) from orchestrator.claims") == 0
    window = """select max(n) from (select count(*) over (order by claimed_at range between '199.999 ms' preceding and current row) as n
                                    from orchestrator.tasks where type = 'free' and claimed_at is not null) w"""
    assert value(conn, window) <= 50
