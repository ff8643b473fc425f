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
    fail,
    lead,
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
    assert row(conn, "select * from orchestrator.promote_due()") == {"promoted": 0, "next_in": None, "fired": 0, "expired": {}}
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


def forget(conn, claim_id):
    """As a crash does with a claim that was not flushed: its tasks are pending again. So do all sequences fall back."""
    conn.execute("delete from orchestrator.claims where id = %s", [claim_id])
    conn.execute("""update orchestrator.tasks set status = 'pending', queued_at = created_at, worker_id = null, claim_id = null,
      claimed_at = null
                    where claim_id = %s""", [claim_id])
    conn.execute("""select setval(format('%I.%I', schemaname, sequencename)::regclass, start_value, false) from pg_sequences
                    where schemaname = 'orchestrator' and sequencename <> 'task_events_id_seq'""")


def test_a_late_outcome_of_a_claim_that_a_crash_forgot_is_rejected(conn):
    register(conn)
    register(conn, "v")
    id = enqueue(conn)
    forgotten, _ = claim_one(conn)
    forget(conn, forgotten)
    again, _ = claim_one(conn, "v")
    assert complete(conn, forgotten, id) == {id: "rejected"} and fail(conn, forgotten, id) == "rejected"
    assert start(conn, forgotten, id) == 0 and release(conn, forgotten) == 0
    assert (task(conn, id)["status"], task(conn, id)["worker_id"]) == ("claimed", "v") and again > forgotten
    assert complete(conn, again, id) == {} and audit(conn) == []


def test_claim_ids_ascend_in_time(conn):
    """Within one microsecond chance keeps them apart, across microseconds time does."""
    ids = [value(conn, "select orchestrator._new_claim_id()") for _ in range(100)]
    assert ids == sorted(ids) and len(set(ids)) == 100
    assert len(set(column(conn, "select orchestrator._new_claim_id() %% 1024 from generate_series(1, 300)"))) > 100
    year_2310 = "select extract(epoch from timestamptz '2310-01-01 00:00Z' - timestamptz '2025-01-01 00:00Z')::bigint * 1000000 * 1024 > 0"
    assert value(conn, year_2310) is True  # else it overflows a bigint


def test_only_a_claim_commits_without_waiting_for_the_flush(conn):
    register(conn)
    id = enqueue(conn)
    conn.execute("set synchronous_commit = on")
    with conn.transaction():
        assert claim(conn, types=["other"]) == []
        assert value(conn, "show synchronous_commit") == "on"
        [claimed] = claim(conn)
        assert value(conn, "show synchronous_commit") == "off"
    for call in (lambda: start(conn, claimed["claim_id"], id), lambda: complete(conn, claimed["claim_id"], id), lambda: enqueue(conn)):
        with conn.transaction():
            call()
            assert value(conn, "show synchronous_commit") == "on"


@pytest.mark.parametrize(("patterns", "expected"), [
    (["a:"], ["a:", "a:1", "a:2"]), (["a:*"], ["a:", "a:1", "a:2"]), (["a*"], ["a%", "a:", "a:1", "a:2", "ab"]),
    (["*"], ["a:", "a:1", "a:2", "ab", "b", "a%", "é:1"]), (["c:"], []), (["a:", "a:1", "b", "a*"], ["a%", "a:", "a:1", "a:2", "ab", "b"]),
    (["é:"], ["é:1"]), (["a%*"], ["a%"]), (["b", "c"], ["b"])])
def test_a_pattern_claims_the_types_that_start_with_it(conn, patterns, expected):
    register(conn)
    for type in ("a:", "a:1", "a:2", "ab", "b", "a%", "é:1"):
        enqueue(conn, type)
        enqueue(conn, type, priority=4)
    assert sorted(t["type"] for t in claim(conn, types=patterns, limit=100)) == sorted(expected * 2)


def test_a_pattern_shares_a_claim_equally_over_its_types(conn):
    register(conn)
    for type in ("m:1", "m:2", "m:3"):
        enqueue_some(conn, 30, type)
    assert Counter(t["type"] for t in claim(conn, types=["m:"], limit=30)) == {"m:1": 10, "m:2": 10, "m:3": 10}


@pytest.mark.parametrize("paused", [["a:1"], ["a:"], ["a:*", "a:1"], ["a*", "é:"], ["*"]])
def test_a_pattern_steps_over_what_is_paused(conn, paused):
    register(conn)
    types = ("a", "a:1", "a:2", "a:3", "b:1", "é:1", "é:2")
    for type in types:
        enqueue(conn, type)
    for name in paused:
        conn.execute("select orchestrator.pause_type(%s)", [name])
    covers = {"a:1": ["a:1"], "a:": ["a:1", "a:2", "a:3"], "a:*": ["a:1", "a:2", "a:3"], "a*": ["a", "a:1", "a:2", "a:3"],
              "é:": ["é:1", "é:2"], "*": types}
    left = set(types) - {type for name in paused for type in covers[name]}
    with conn.transaction(force_rollback=True):
        assert {t["type"] for t in claim(conn, types=["*"], limit=100)} == left
    assert {t["type"] for t in claim(conn, types=types, limit=100)} == left


def many_types(conn, n):
    conn.execute("insert into orchestrator.tasks (type) select 'm:' || lpad(n::text, 6, '0') from generate_series(1, %s) n", [n])


def test_a_claim_looks_at_a_thousand_types_of_a_pattern_and_at_a_thousand_more_from_one_taken_by_chance(conn):
    register(conn)
    many_types(conn, 3500)
    first = [f"m:{n:06}" for n in range(1, 1001)]
    assert column(conn, "select * from orchestrator._ready_types('m:', '{}')") == first
    conn.execute("update orchestrator.leader_state set sampled_type = 'm:002500'")
    assert column(conn, "select * from orchestrator._ready_types('m:', '{}')") == first + [f"m:{n:06}" for n in range(2500, 3500)]
    conn.execute("update orchestrator.leader_state set sampled_type = 'm:000500'")  # behind the first thousand nothing starts there
    assert column(conn, "select * from orchestrator._ready_types('m:', '{}')") == first
    assert len(claim(conn, types=["m:"], limit=50)) == 50


def test_each_ready_type_may_be_the_one_that_is_taken_by_chance(conn):
    term = lead(conn)
    many_types(conn, 4)
    seen = set()
    for _ in range(200):
        assert value(conn, "select orchestrator.rescan_lanes('leader', %s, '1 minute')", term) == 0
        seen.add(value(conn, "select sampled_type from orchestrator.leader_state"))
    assert seen == {f"m:{n:06}" for n in range(1, 5)}


@pytest.mark.parametrize("analyzed", [False, True])
@pytest.mark.parametrize("ready", [2, 20, 300])
def test_a_claim_takes_what_it_may_whatever_the_planner_knows_and_others_have_set(conn, connect, analyzed, ready):
    """A plan with the picked rows as the inner side of the join would pick again for each outer row."""
    register(conn)
    enqueue_some(conn, ready)
    if analyzed:
        conn.execute("analyze orchestrator.tasks")
    for setting in ("enable_tidscan", "enable_nestloop", "enable_indexscan", "enable_material"):
        other = connect()
        other.execute(f"set {setting} = off")
        for limit in (1, ready // 2, ready):
            with other.transaction(force_rollback=True):
                assert len(claim(other, limit=limit)) == limit


def claim_bytes(conn, limit, bytes, types=("t",)):
    got = rows(conn, "select id, octet_length(payload::text) as size from orchestrator.claim_tasks('w', %s, %s, %s)", list(types), limit,
    bytes)
    return len(got), sum(t["size"] for t in got)


LARGE = """select count(*) from orchestrator.enqueue_many(%s, array(
             select case when %s then jsonb_build_array(repeat('x',
               %s)) else to_jsonb(array(select md5(random()::text) from generate_series(1, %s / 36))) end
             from generate_series(1, %s)))"""


@pytest.mark.parametrize("compresses", [True, False])
@pytest.mark.parametrize("small", [0, 1000])
def test_a_claim_is_bounded_by_the_bytes_of_its_payloads(conn, compresses, small):
    """Also where small ones come first, from which nothing follows for those behind them."""
    register(conn)
    enqueue_some(conn, small)
    conn.execute(LARGE, ["t", compresses, 200_000, 200_000, 60])
    left = small + 60
    while left:
        n, size = claim_bytes(conn, 2000, 4_000_000)
        assert n > 0 and size <= 4_000_000
        left -= n
    assert audit(conn) == []


def test_the_bound_holds_over_several_lanes_and_lets_one_task_through_that_is_larger_than_it(conn):
    register(conn)
    for type in "abc":
        conn.execute(LARGE, [type, False, 100_000, 100_000, 10])
    assert claim_bytes(conn, 100, 50_000, "abc")[0] == 1
    n, size = claim_bytes(conn, 100, 1_500_000, "abc")
    assert 3 <= n <= 15 and size <= 1_500_000


def test_a_claim_of_small_tasks_takes_as_many_as_it_may(conn):
    register(conn)
    enqueue_some(conn, 2000)
    assert claim_bytes(conn, 2000, 67_108_864)[0] == 2000


@pytest.mark.parametrize(("kib", "most"), [(15, 2000), (20, 1000), (60, 500), (100, 250), (250, 125)])
def test_a_claim_takes_as_many_as_may_all_be_as_large_as_the_largest_ever(conn, kib, most):
    """Nobody weighs what is claimed: that cost every claim 5%."""
    register(conn)
    for refused in ("to_jsonb(repeat('x', 300000))", "'[1e20000]'"):
        with pytest.raises(psycopg.Error, match="payload"):
            conn.execute(f"select orchestrator.enqueue('t', {refused}::jsonb)")
    conn.execute("select orchestrator.enqueue('other', to_jsonb(repeat('x', %s * 1024)))", [kib])
    enqueue_some(conn, 2100)
    assert claim_bytes(conn, 2000, 2000 * 16384)[0] == most
    assert claim_bytes(conn, 50, 2000 * 16384)[0] == 50


@pytest.mark.parametrize("bytes", [None, 0, -1])
def test_a_claim_without_a_sensible_bound_of_bytes_is_refused(conn, bytes):
    register(conn)
    with pytest.raises(psycopg.Error, match="bytes: must be") as refused:
        claim_bytes(conn, 1, bytes)
    assert refused.value.sqlstate == "OR001"


@pytest.mark.parametrize(("column_name", "bad"), [("queued_at", "'-infinity'"), ("queued_at", "'infinity'"), ("type", "repeat('x', 256)")])
def test_the_table_refuses_rows_that_would_stop_others(conn, column_name, bad):
    conn.execute("alter table orchestrator.tasks drop constraint every_rule_holds")   # which only the tests have
    with pytest.raises(psycopg.errors.CheckViolation, match="a_status_has_its_time"):
        conn.execute(f"insert into orchestrator.tasks ({', '.join(sorted({'type', column_name}))}) values ("
                     + (f"{bad}, 't')" if column_name != "type" else f"{bad})"))


def test_rows_that_no_function_would_insert_stop_no_claim(conn):
    register(conn)
    conn.execute("""alter table orchestrator.tasks drop constraint if exists every_rule_holds;
                    insert into orchestrator.tasks (type, priority, max_retries, queued_at) values
                    ('t', 2147483647, null, '4000-01-01 BC'), ('t', -2147483648, -5, '9999-01-01'), (E'\\x01', 0, 2147483647, now()),
                      ('', 1, 1, now())""")
    got = claim(conn, types=["*", "t"], limit=10)
    assert len(got) == 4 and got[0]["waited"] > 0
    for claimed in got:
        assert fail(conn, claimed["claim_id"], claimed["id"]) in ("retry_scheduled", "dead_letter")
