"""Counting by the leader: exact, whoever enqueues and whenever they commit, and cheap whatever waits."""
from __future__ import annotations

from typing import Any

import pytest

from postgres import eventually, wait_for_lock
from steps import (
    Connection,
    backend,
    background,
    cancel,
    claim,
    claim_one,
    complete,
    enqueue,
    enqueue_some,
    fail,
    lead,
    register,
    retry,
    row,
    rows,
    snooze,
    value,
)


@pytest.fixture
def term(conn: Connection) -> int:
    register(conn, "w", ("t", "u", "mail:"))
    return lead(conn)


def sample(conn: Connection, term: int, later: str = "1 minute", limit: int = 2_000_000, lag: str = "5 seconds") -> float:
    """Count now, as if `later` had passed since the last count."""
    conn.execute("update orchestrator.stats_state set next_at = null")
    conn.execute("update orchestrator.stats_samples set at = at - %s::interval", [later])
    return value(conn, "select orchestrator.sample_stats('leader', %s, %s, %s)", term, limit, lag)


def settle(conn: Connection, term: int) -> None:
    """Let the cursor pass everything that nobody can still commit, with a lag of 5 milliseconds instead of 5 seconds."""
    wait_past_the_newest(conn)
    for _ in range(2):   # the first may find writers that have ended since
        sample(conn, term, lag="5 milliseconds")


def unchecked(conn: Connection) -> None:
    """For a test that adds many rows: the check of every rule, which only tests have, costs far more than the insert."""
    conn.execute("alter table orchestrator.tasks drop constraint if exists every_rule_holds")


def wait_past_the_newest(conn: Connection) -> None:
    newest = "select coalesce(max(created_at), '-infinity') + interval '10 milliseconds' from orchestrator.tasks"
    newest = f"select clock_timestamp() > ({newest})"
    eventually(lambda: value(conn, newest))


def read(conn: Connection) -> dict[str, int]:
    """Scans of the whole table and rows fetched by this connection; ask twice in one transaction, for the difference."""
    return row(conn, "select seq_scan, coalesce(idx_tup_fetch, 0) as fetched from pg_stat_xact_user_tables"
                     " where relname = 'tasks'") or {"seq_scan": 0, "fetched": 0}


def enqueued(conn: Connection) -> dict[str, int]:
    query = "select type, enqueued_total from orchestrator.type_stats where enqueued_total > 0"
    return dict(conn.execute(query).fetchall())


def total(conn: Connection) -> int:
    return value(conn, "select sum(enqueued_total)::int from orchestrator.type_stats")


def test_sample_counts_each_state_by_type(conn: Connection, term: int) -> None:
    enqueue_some(conn, 5)
    enqueue(conn, "u")
    enqueue(conn, "mail:new")
    claim_id, id = claim_one(conn)
    fail(conn, claim_id, id, permanent=True)
    claim_id, id = claim_one(conn)
    fail(conn, claim_id, id, after="1 hour")
    claim_id, id = claim_one(conn)
    complete(conn, claim_id, id)
    claim_id, id = claim_one(conn)
    sample(conn, term)
    counts = {r["type"]: r for r in rows(conn, "select * from orchestrator.type_stats")}
    assert set(counts) == {"t", "u", "mail:new", "other"}
    t = counts["t"]
    assert (t["waiting"], t["scheduled"], t["in_flight"], t["dead_letters"], t["enqueued_total"]) == (1, 1, 1, 1, 5)
    assert counts["mail:new"]["waiting"] == counts["u"]["waiting"] == 1
    assert counts["u"]["oldest_ready_at"] == value(conn, "select queued_at from orchestrator.tasks where type = 'u'")
    state = row(conn, "select * from orchestrator.stats_state")
    assert state["complete"] and value(conn, "select ended_total from orchestrator._totals") == 2
    [kept] = rows(conn, "select * from orchestrator.stats_samples")
    assert (kept["waiting"], kept["scheduled"], kept["in_flight"], kept["dead_letters"], kept["enqueued_total"],
            kept["ended_total"]) == (3, 1, 1, 1, 7, 2)


def test_sample_agrees_with_the_live_view(conn: Connection, term: int) -> None:
    enqueue_some(conn, 7)
    enqueue_some(conn, 3, "u", priority=5)
    claim(conn, limit=4)
    sample(conn, term)
    live = "select type, waiting, scheduled, in_flight, dead_letters from orchestrator.queue_stats where type in ('t', 'u')"
    kept = "select type, waiting, scheduled, in_flight, dead_letters from orchestrator.type_stats where type in ('t', 'u') order by type"
    assert rows(conn, live) == rows(conn, kept)
    assert value(conn, "select clock_timestamp() - counted_at < interval '1 minute' from orchestrator.stats_state")


def test_sample_does_nothing_under_a_stale_term(conn: Connection, term: int) -> None:
    enqueue(conn)
    assert sample(conn, term - 1) is None
    assert value(conn, "select count(*) from orchestrator.type_stats") == 0


def test_sample_is_a_no_op_before_its_time(conn: Connection, term: int) -> None:
    for _ in range(3):   # the first takes longer, since everything is planned
        due = sample(conn, term)
    assert due == pytest.approx(2, abs=1)
    enqueue(conn)
    left = value(conn, "select orchestrator.sample_stats('leader', %s)", term)
    assert 0 < left <= 3
    assert total(conn) == 0


def test_next_count_comes_200_times_as_long_after_the_last_as_that_took(conn: Connection, term: int) -> None:
    unchecked(conn)
    enqueue_some(conn, 20_000)
    after = sample(conn, term)
    took = value(conn, "select extract(epoch from took)::float from orchestrator.stats_state")
    assert after == pytest.approx(min(max(200 * took, 2), 60))
    left = value(conn, "select extract(epoch from next_at - counted_at)::float from orchestrator.stats_state")
    assert left == pytest.approx(after)


def test_a_task_is_counted_once_however_often_counts_are_taken(conn: Connection, term: int) -> None:
    enqueue_some(conn, 10)
    for expected in (10, 20, 30):
        sample(conn, term)
        assert total(conn) == expected
        settle(conn, term)
        assert total(conn) == expected
        assert value(conn, "select sum(settled) from orchestrator.type_stats") == expected
        enqueue_some(conn, 10)


def test_a_repeated_idempotency_key_counts_once(conn: Connection, term: int) -> None:
    for _ in range(3):
        enqueue(conn, idempotency_key="k")
    sample(conn, term)
    assert total(conn) == 1


def test_a_late_committer_is_counted_once_when_it_commits(conn: Connection, connect: Any, term: int) -> None:
    late = connect(autocommit=False)
    enqueue_some(late, 3)
    enqueue_some(conn, 2)
    settle(conn, term)
    assert total(conn) == 2
    assert value(conn, "select sum(settled) from orchestrator.type_stats") == 0   # the late one may still commit below
    enqueue_some(conn, 2)
    settle(conn, term)
    assert total(conn) == 4
    late.commit()
    sample(conn, term)
    assert total(conn) == 7
    settle(conn, term)
    settle(conn, term)
    assert total(conn) == value(conn, "select sum(settled) from orchestrator.type_stats") == 7


def test_a_prepared_transaction_is_counted_once_when_it_commits(conn: Connection, connect: Any, term: int) -> None:
    late = connect(autocommit=False)
    late.tpc_begin(late.xid(1, "stats", "late"))
    enqueue_some(late, 3)
    late.tpc_prepare()
    enqueue_some(conn, 1)
    settle(conn, term)
    settle(conn, term)
    assert total(conn) == 1
    late.tpc_commit()
    settle(conn, term)
    settle(conn, term)
    assert total(conn) == value(conn, "select sum(settled) from orchestrator.type_stats") == 4


def test_a_rolled_back_enqueue_is_never_counted(conn: Connection, connect: Any, term: int) -> None:
    other = connect(autocommit=False)
    enqueue_some(other, 3)
    settle(conn, term)
    other.rollback()
    settle(conn, term)
    assert total(conn) == 0


def test_a_type_that_gets_a_row_later_does_not_count_again_what_counted_as_other(conn: Connection, term: int) -> None:
    sample(conn, term)
    full = ("insert into orchestrator.type_stats (type, since) select 'x' || n, '00000000-0000-0000-0000-000000000000'"
            " from generate_series(1, 200) n")
    conn.execute(full)
    conn.execute("update orchestrator.type_stats set dead_letters = 1 where type like 'x%'")   # so no row is free
    enqueue_some(conn, 4, "new")
    sample(conn, term)
    assert enqueued(conn) == {"other": 4}
    register(conn, "w2", ("new",))
    sample(conn, term)
    assert enqueued(conn) == {"other": 4}
    eventually(lambda: value(conn, "select orchestrator._uuid_at(clock_timestamp()) > since from orchestrator.type_stats"
                                   " where type = 'new'"))
    enqueue_some(conn, 2, "new")
    sample(conn, term)
    assert enqueued(conn) == {"other": 4, "new": 2}
    settle(conn, term)
    assert enqueued(conn) == {"other": 4, "new": 2}
    assert value(conn, "select waiting from orchestrator.type_stats where type = 'new'") == 6


def test_of_ten_thousand_random_types_200_have_a_row_and_the_rest_is_other(conn: Connection, term: int) -> None:
    unchecked(conn)
    conn.execute("select orchestrator.enqueue('random:' || n) from generate_series(1, 10000) n")
    sample(conn, term)
    sample(conn, term)
    assert total(conn) == 10_000
    assert value(conn, "select count(*) from orchestrator.type_stats where type like 'random:%%'") == 200
    assert value(conn, "select waiting from orchestrator.type_stats where type = 'other'") == 9_800


def test_a_pattern_tells_at_most_200_types_apart(conn: Connection, term: int) -> None:
    conn.execute("select orchestrator.enqueue('mail:' || n) from generate_series(1, 300) n")
    sample(conn, term)
    sample(conn, term)
    assert value(conn, "select count(*) from orchestrator.type_stats where type like 'mail:%%'") == 200
    assert total(conn) == 300
    assert value(conn, "select sum(waiting)::int from orchestrator.type_stats") == 300


def test_a_type_that_nobody_handles_has_a_row_of_its_own(conn: Connection, term: int) -> None:
    sample(conn, term)
    enqueue_some(conn, 3, "nobody:ready")
    enqueue(conn, "nobody:later", run_at="2030-01-01")
    sample(conn, term)
    counted = "select type, waiting::int, scheduled::int from orchestrator.type_stats where type like 'nobody:%' order by type"
    assert conn.execute(counted).fetchall() == [("nobody:later", 0, 1), ("nobody:ready", 3, 0)]


def test_rows_of_idle_types_make_room_for_others_and_no_task_is_counted_twice(conn: Connection, term: int) -> None:
    sample(conn, term)
    conn.execute("select orchestrator.enqueue('old:' || n) from generate_series(1, 200) n")
    sample(conn, term)
    claimed = claim(conn, types=[f"old:{n}" for n in range(1, 201)], limit=200)
    complete(conn, claimed[0]["claim_id"], *(c["id"] for c in claimed))
    enqueue_some(conn, 5, "young")
    for _ in range(3):
        sample(conn, term)
        assert total(conn) == 205
    settle(conn, term)
    assert total(conn) == value(conn, "select sum(settled) from orchestrator.type_stats") == 205
    assert value(conn, "select waiting from orchestrator.type_stats where type = 'young'") == 5


def recent(conn: Connection, type: str = "t") -> dict[str, Any]:
    return row(conn, "select * from orchestrator._recent where type = %s", type)


def pass_time(conn: Connection, seconds: int) -> None:
    """As if the last count were so much longer ago."""
    conn.execute("update orchestrator.type_stats set recent_at = recent_at - make_interval(secs => %s)", [seconds])
    conn.execute("update orchestrator.stats_state set counted_at = counted_at - make_interval(secs => %s)", [seconds])


def test_rate_and_share_of_failures_of_a_type_are_of_the_last_minutes(conn: Connection, term: int) -> None:
    sample(conn, term)
    ids = enqueue_some(conn, 20)
    claimed = claim(conn, limit=20)
    complete(conn, claimed[0]["claim_id"], *ids[:15])
    for id in ids[15:18]:
        fail(conn, claimed[0]["claim_id"], id, after="1 hour")
    fail(conn, claimed[0]["claim_id"], ids[18], permanent=True)
    pass_time(conn, 100)
    sample(conn, term)
    now = recent(conn)
    assert now["per_second"] == pytest.approx(16 / 100, rel=0.05)   # 15 completed, 1 dead letter
    assert now["enqueued_per_second"] == pytest.approx(20 / 100, rel=0.05)
    assert now["failure_share"] == pytest.approx(4 / 19)
    pass_time(conn, 900)
    later = recent(conn)
    assert later["per_second"] == pytest.approx(16 * 0.368 / (100 * 0.368 + 900), rel=0.05)
    assert later["failure_share"] == pytest.approx(4 / 19)
    pass_time(conn, 8 * 3600)
    assert recent(conn)["failure_share"] is None and recent(conn)["per_second"] < 0.001
    assert recent(conn, "u") == {**recent(conn, "u"), "failure_share": None, "median": None, "p95": None}


def test_catching_up_on_many_tasks_is_not_taken_for_a_rate(conn: Connection, term: int) -> None:
    enqueue_some(conn, 25)
    claimed = claim(conn, limit=25)
    complete(conn, claimed[0]["claim_id"], *(c["id"] for c in claimed))
    for _ in range(3):
        sample(conn, term, limit=10)
        pass_time(conn, 10)
    assert recent(conn)["per_second"] == recent(conn)["enqueued_per_second"] == 0


def test_durations_are_sampled_from_runs_that_ended_and_from_those_that_were_still_running(conn: Connection, term: int) -> None:
    enqueue(conn)
    complete(conn, *claim_one(conn))
    sample(conn, term)   # from here on
    enqueue_some(conn, 4)
    claimed = claim(conn, limit=4)
    claim_id = claimed[0]["claim_id"]
    complete(conn, claim_id, *(c["id"] for c in claimed[:3]))
    took = "update orchestrator.tasks set started_at = completed_at - make_interval(secs => %s) where id = %s"
    for seconds, c in zip((1, 2, 3), claimed, strict=False):
        conn.execute(took, [seconds, c["id"]])
    sample(conn, term)
    assert sorted(value(conn, "select runs from orchestrator.type_stats where type = 't'")) == [1, 2, 3]
    assert (recent(conn)["median"], recent(conn)["p95"]) == (2, pytest.approx(2.9))
    assert value(conn, "select watched::text[] from orchestrator.stats_state") == [claimed[3]["id"]]
    complete(conn, claim_id, claimed[3]["id"])
    conn.execute(took, [9, claimed[3]["id"]])
    sample(conn, term)
    sample(conn, term)   # and each only once
    assert sorted(value(conn, "select runs from orchestrator.type_stats where type = 't'")) == [1, 2, 3, 9]
    assert value(conn, "select watched from orchestrator.stats_state") == []


def test_a_counter_never_falls_when_tasks_are_deleted(conn: Connection, term: int) -> None:
    enqueue_some(conn, 5)
    sample(conn, term)
    conn.execute("delete from orchestrator.tasks where id in (select id from orchestrator.tasks limit 2)")
    sample(conn, term)
    assert total(conn) == 5
    settle(conn, term)
    conn.execute("delete from orchestrator.tasks")
    sample(conn, term)
    assert total(conn) == 5


def test_ended_total_follows_completions_cancels_and_dead_letters(conn: Connection, term: int) -> None:
    ids = enqueue_some(conn, 6)
    ended = "select ended_total::int from orchestrator._totals"
    claimed = claim(conn, limit=4)
    complete(conn, claimed[0]["claim_id"], *(c["id"] for c in claimed[:2]))
    fail(conn, claimed[2]["claim_id"], claimed[2]["id"], permanent=True)
    snooze(conn, claimed[3]["claim_id"], claimed[3]["id"])
    sample(conn, term)
    assert value(conn, ended) == 3
    assert cancel(conn, ids[5]) == "cancelled"
    settle(conn, term)
    assert value(conn, ended) == 4
    retry(conn, ids[5])
    sample(conn, term)
    assert value(conn, ended) == 3


def test_counting_catches_up_in_steps_when_much_is_new(conn: Connection, term: int) -> None:
    enqueue_some(conn, 25)
    wait_past_the_newest(conn)
    seen = []
    for _ in range(3):
        sample(conn, term, limit=10, lag="5 milliseconds")
        seen.append((total(conn), value(conn, "select complete from orchestrator.stats_state")))
    assert seen == [(10, False), (20, False), (25, True)]
    assert value(conn, "select sum(settled) from orchestrator.type_stats") == 25
    ended = "select ended_total from orchestrator.stats_samples order by at"
    assert [r["ended_total"] for r in rows(conn, ended)] == [None, None, 0]


def test_samples_are_ten_seconds_apart_and_kept_for_two_hours(conn: Connection, term: int) -> None:
    sample(conn, term)
    sample(conn, term, later="5 seconds")
    assert value(conn, "select count(*) from orchestrator.stats_samples") == 1
    sample(conn, term, later="5 seconds")
    assert value(conn, "select count(*) from orchestrator.stats_samples") == 2
    sample(conn, term, later="1 hour 59 minutes")
    assert value(conn, "select count(*) from orchestrator.stats_samples") == 3
    sample(conn, term, later="10 minutes")
    assert value(conn, "select count(*) from orchestrator.stats_samples") == 2


def test_counting_100_000_waiting_tasks_reads_indexes_only(conn: Connection, term: int) -> None:
    unchecked(conn)
    conn.execute("analyze orchestrator.tasks")   # empty: a plan made now must stay right
    sample(conn, term)
    enqueue_some(conn, 100_000)
    with conn.transaction():
        before = read(conn)
        sample(conn, term)
        assert read(conn)["seq_scan"] == before["seq_scan"]
    assert value(conn, "select waiting from orchestrator.type_stats where type = 't'") == 100_000


def test_counting_does_not_look_at_what_has_ended(conn: Connection, term: int) -> None:
    unchecked(conn)
    conn.execute("analyze orchestrator.tasks")
    sample(conn, term)
    enqueue_some(conn, 5000)
    claimed = claim(conn, limit=5000)
    complete(conn, claimed[0]["claim_id"], *(c["id"] for c in claimed))
    enqueue(conn)
    claim_one(conn)
    settle(conn, term)
    with conn.transaction():
        before = read(conn)
        sample(conn, term)
        after = read(conn)
    assert after["seq_scan"] == before["seq_scan"]
    assert after["fetched"] - before["fetched"] < 2_100   # the newest 1,000 by id for their types, the first 500 claimed since
    assert value(conn, "select in_flight from orchestrator.type_stats where type = 't'") == 1


def test_counting_a_backlog_at_rest_walks_nothing_but_the_ready_index(conn: Connection, term: int) -> None:
    unchecked(conn)
    enqueue_some(conn, 50_000)
    conn.execute("vacuum analyze orchestrator.tasks")
    settle(conn, term)
    plan = "\n".join(r["QUERY PLAN"] for r in rows(conn, """
        explain (analyze, buffers) select t.type, t.queued_at from orchestrator.tasks t where t.queued_at is not null
        order by t.type, t.priority desc, t.queued_at limit 5000000"""))
    assert "Index Only Scan using tasks_ready" in plan
    before = value(conn, "select cursor from orchestrator.stats_state")
    assert value(conn, "select count(*) from orchestrator.tasks where id >= %s", before) == 0   # nothing to go through again


def test_a_bulk_enqueue_that_waits_for_a_lock_is_counted_once(conn: Connection, connect: Any, term: int) -> None:
    blocker, producer = connect(autocommit=False), connect()
    sample(conn, term)
    blocker.execute("lock table orchestrator.tasks in share mode")
    pending = background(lambda: enqueue_some(producer, 3))
    wait_for_lock(conn, backend(producer))
    settle(conn, term)   # nobody holds a write lock: the floor passes the moment at which the producer began
    blocker.rollback()
    pending.result(10)
    settle(conn, term)
    settle(conn, term)
    assert total(conn) == value(conn, "select sum(settled) from orchestrator.type_stats") == 3
