"""sql/40_finish.sql: complete, fail, release, snooze, progress, each fenced by its claim; retry_delay and policies."""
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
    claims,
    complete,
    enqueue,
    enqueue_some,
    events,
    fail,
    promote,
    register,
    release,
    retry,
    row,
    rows,
    snooze,
    start,
    status,
    task,
    value,
)


@pytest.fixture
def conn(conn):
    register(conn)
    yield conn
    assert audit(conn) == []


def complete_with(conn, claim_id, id, result):
    query = "select id::text, outcome from orchestrator.complete_tasks(array[%s::bigint], '{1}', array[%s::uuid], array[%s])"
    return dict(conn.execute(query, [claim_id, id, Jsonb(result)]).fetchall())


def test_complete_goes_from_claimed_to_completed_in_one_step(conn):
    enqueue(conn)
    claim_id, id = claim_one(conn)
    assert complete(conn, claim_id, id) == {}
    found = task(conn, id)
    assert (found["status"], found["attempts"], found["worker_id"], found["claim_id"]) == ("completed", 1, "w", claim_id)
    assert found["started_at"] == found["claimed_at"] <= found["completed_at"] == found["updated_at"]
    assert claims(conn) == {} and events(conn, id) == []


def test_complete_of_a_running_task_keeps_its_start_and_its_attempt(conn):
    enqueue(conn)
    claim_id, id = claim_one(conn)
    start(conn, claim_id, id)
    began = task(conn, id)["started_at"]
    assert complete(conn, claim_id, id) == {}
    assert (task(conn, id)["started_at"], task(conn, id)["attempts"]) == (began, 1)


def test_complete_of_several_claims_in_one_call_settles_each(conn):
    enqueue_some(conn, 6)
    first, second, third = claim(conn, limit=1), claim(conn, limit=2), claim(conn, limit=3)
    left = third.pop()
    groups = [third, first, second]
    assert rows(conn, "select * from orchestrator.complete_tasks(%s, %s, %s::uuid[])", [g[0]["claim_id"] for g in groups],
                [len(g) for g in groups], [t["id"] for g in groups for t in g]) == []
    assert claims(conn) == {left["claim_id"]: 1}
    assert value(conn, "select count(*) from orchestrator.tasks where status = 'completed'") == 5


def test_complete_keeps_the_results(conn):
    enqueue_some(conn, 3)
    one, two = claim(conn, limit=2), claim(conn, limit=1)
    results = [Jsonb({"n": 1}), None, Jsonb("three")]
    query = "select * from orchestrator.complete_tasks(%s, '{2,1}', %s::uuid[], %s::jsonb[])"
    assert rows(conn, query, [one[0]["claim_id"], two[0]["claim_id"]], [t["id"] for t in one + two], results) == []
    assert [task(conn, t["id"])["result"] for t in one + two] == [{"n": 1}, None, "three"]
    assert {status(conn, t["id"]) for t in one + two} == {"completed"}


def test_complete_gives_each_of_many_its_own_result(conn):
    enqueue_some(conn, 350)
    one, two = claim(conn, limit=230), claim(conn, limit=120)
    named = [t["id"] for t in one[::-1] + two]   # not in the order of the table
    query = "select * from orchestrator.complete_tasks(%s, '{230,119}', %s::uuid[], %s::jsonb[])"
    args = [one[0]["claim_id"], two[0]["claim_id"]], named[:-1], [Jsonb(id) for id in named[:-1]]
    assert rows(conn, query, *args) == []
    assert claims(conn) == {two[0]["claim_id"]: 1}
    assert value(conn, "select count(*) from orchestrator.tasks where status = 'completed' and result = to_jsonb(id)") == 349
    assert rows(conn, query, *args) == []   # sent again
    assert rows(conn, "select * from orchestrator.complete_tasks('{}', '{}', '{}', '{}')") == []


def test_complete_sent_again_is_not_rejected_and_changes_nothing(conn):
    enqueue(conn)
    claim_id, id = claim_one(conn)
    complete(conn, claim_id, id)
    before = task(conn, id)
    assert complete(conn, claim_id, id) == {}
    assert task(conn, id) == before


def test_complete_with_a_task_named_twice_counts_it_once(conn):
    ids = enqueue_some(conn, 2)
    claim_id = claim(conn)[0]["claim_id"]
    assert complete(conn, claim_id, ids[0], ids[0]) == {}
    assert claims(conn) == {claim_id: 1}


@pytest.mark.parametrize("way_out", ["failed", "released", "snoozed", "recovered and claimed again"])
def test_every_outcome_under_a_claim_that_was_lost_is_rejected(conn, way_out):
    id = enqueue(conn)
    old, _ = claim_one(conn)
    if way_out == "failed":
        fail(conn, old, id)
    elif way_out == "released":
        release(conn, old)
    elif way_out == "snoozed":
        snooze(conn, old, id)
    else:
        release(conn, old)
        claim_one(conn)
    before, story = task(conn, id), events(conn, id)
    assert complete(conn, old, id) == {id: "rejected"}
    assert complete_with(conn, old, id, 1) == {id: "rejected"}
    assert fail(conn, old, id) == "rejected"
    assert release(conn, old, id) == 0 and release(conn, old) == 0
    assert snooze(conn, old, id) == "rejected"
    assert start(conn, old, id) == 0
    assert value(conn, "select orchestrator.record_progress(%s, %s, '1')", old, id) is False
    assert task(conn, id) == before and events(conn, id) == story


def test_an_outcome_under_the_open_claim_of_another_task_is_rejected(conn):
    """Both claims are open: only the comparison of the claim keeps them apart."""
    mine, _ = enqueue_some(conn, 2)
    my_claim, _ = claim_one(conn)
    other_claim, _ = claim_one(conn)
    before = task(conn, mine)
    assert complete(conn, other_claim, mine) == {mine: "rejected"}
    assert complete_with(conn, other_claim, mine, 1) == {mine: "rejected"}
    assert fail(conn, other_claim, mine) == "rejected"
    assert release(conn, other_claim, mine) == 0
    assert snooze(conn, other_claim, mine) == "rejected"
    assert start(conn, other_claim, mine) == 0
    assert value(conn, "select orchestrator.record_progress(%s, %s, '1')", other_claim, mine) is False
    cancel(conn, mine)
    assert complete(conn, other_claim, mine) == {mine: "rejected"}
    assert task(conn, mine)["status"] == before["status"] and claims(conn) == {my_claim: 1, other_claim: 1}


def test_complete_that_waited_for_a_failure_is_rejected(conn, connect):
    enqueue(conn)
    claim_id, id = claim_one(conn)
    one, other = connect(autocommit=False), connect()
    assert fail(one, claim_id, id) == "retry_scheduled"
    late = background(lambda: complete(other, claim_id, id))
    wait_for_lock(conn, backend(other))
    one.commit()
    assert late.result(10) == {id: "rejected"}


def test_times_are_taken_after_the_wait_for_the_lock(conn, connect):
    """now() would be the moment before the wait: a completion before the cancellation that it waited for."""
    enqueue_some(conn, 2)
    claimed = claim(conn)
    holder, waiter = connect(autocommit=False), connect(autocommit=False)
    waiter.execute("select 1")  # its transaction begins here
    complete(holder, claimed[0]["claim_id"], claimed[0]["id"])
    late = background(lambda: complete(waiter, claimed[1]["claim_id"], claimed[1]["id"]))
    wait_for_lock(conn, backend(waiter))
    after = value(conn, "select clock_timestamp()")
    holder.commit()
    late.result(10)
    waiter.commit()
    assert task(conn, claimed[1]["id"])["completed_at"] > after


def test_fail_schedules_a_retry_within_the_jittered_delay_of_the_policy(conn):
    register(conn, "v", {"f": {"max_retries": 5, "base_delay": 100, "max_delay": 150}})
    enqueue(conn, "f")
    claim_id, id = claim_one(conn, types="f")
    assert fail(conn, claim_id, id, "boom") == "retry_scheduled"
    found = task(conn, id)
    assert (found["attempts"], found["last_error"], found["claim_id"], found["worker_id"]) == (1, "boom", None, None)
    assert found["started_at"] is None and found["claimed_at"] is None
    wait = (found["next_retry_at"] - found["updated_at"]).total_seconds()
    assert 50 <= wait <= 100
    assert events(conn, id) == ["failed", "retry_scheduled"] and claims(conn) == {}
    conn.execute("update orchestrator.tasks set next_retry_at = clock_timestamp()")
    promote(conn)
    claim_id, _ = claim_one(conn, types="f")
    fail(conn, claim_id, id)
    found = task(conn, id)
    assert 75 <= (found["next_retry_at"] - found["updated_at"]).total_seconds() <= 150  # 200, capped


@pytest.mark.parametrize(("own", "policy", "attempts"), [(0, 5, 1), (2, 5, 3), (None, 1, 2), (None, None, 4)])
def test_fail_makes_a_dead_letter_after_the_retries_of_the_task_or_else_of_its_type(conn, own, policy, attempts):
    type = "t"
    if policy is not None:
        type = "p:1"
        register(conn, "v", {"p:": {"max_retries": policy, "base_delay": 0}})
    id = enqueue(conn, type, max_retries=own)
    outcomes = []
    while not outcomes or outcomes[-1] == "retry_scheduled":
        promote(conn)
        claim_id, _ = claim_one(conn, types=[type])
        outcomes.append(fail(conn, claim_id, id, f"error {len(outcomes)}", after="0"))
    assert outcomes == ["retry_scheduled"] * (attempts - 1) + ["dead_letter"]
    found = task(conn, id)
    assert (found["attempts"], found["last_error"], found["worker_id"]) == (attempts, f"error {attempts - 1}", "w")
    assert found["dead_at"] and found["started_at"] and found["completed_at"] is None


def test_fail_for_good_makes_a_dead_letter_at_once(conn):
    enqueue(conn, max_retries=9)
    claim_id, id = claim_one(conn)
    assert fail(conn, claim_id, id, permanent=True) == "dead_letter"
    assert task(conn, id)["attempts"] == 1 and events(conn, id) == ["failed", "dead_letter"]


@pytest.mark.parametrize(("after", "seconds"), [("90 s", 90), ("0", 0), ("-1 hour", 0), ("5000 years", 3650 * 86400), ("3651 days",
    3650 * 86400)])
def test_fail_may_name_its_own_delay(conn, after, seconds):
    enqueue(conn)
    claim_id, id = claim_one(conn)
    fail(conn, claim_id, id, after=after)
    found = task(conn, id)
    assert (found["next_retry_at"] - found["updated_at"]).total_seconds() == pytest.approx(seconds, rel=0.01)


def test_fail_bounds_the_error_that_it_keeps(conn):
    enqueue(conn)
    claim_id, id = claim_one(conn)
    fail(conn, claim_id, id, "é" * 1_000_000)
    assert task(conn, id)["last_error"] == "é" * 8000
    assert value(conn, "select max(length(detail)) from orchestrator.task_events") == 8000


def test_fail_tasks_ends_tasks_of_several_claims_each_its_own_way(conn):
    a, b, c, d = enqueue_some(conn, 4)
    one, two = claim(conn, limit=2)[0]["claim_id"], claim(conn, limit=2)[0]["claim_id"]
    cancel(conn, d)
    query = """select id::text, outcome from orchestrator.fail_tasks(%s, %s::uuid[], '{e,e,e,e,e}', null,
               array['1 s', null, null, null, null]::interval[], '{f,t,null,f,f}')"""
    assert conn.execute(query, [[two, one, two, one, one], [c, a, d, b, c]]).fetchall() == [
        (c, "retry_scheduled"), (a, "dead_letter"), (d, "cancelled"), (b, "retry_scheduled"), (c, "rejected")]
    assert claims(conn) == {}


def test_release_gives_back_to_the_old_place_uncharged(conn):
    ids = enqueue_some(conn, 3)
    claim_id = claim(conn)[0]["claim_id"]
    start(conn, claim_id, ids[1])
    value(conn, "select orchestrator.record_progress(%s, %s, '1')", claim_id, ids[1])
    newer = enqueue(conn)
    assert release(conn, claim_id, ids[1]) == 1 and claims(conn) == {claim_id: 2}
    assert release(conn, claim_id) == 2 and claims(conn) == {}
    found = task(conn, ids[1])
    assert (found["status"], found["attempts"], found["recoveries"], found["progress"]) == ("pending", 0, 0, None)
    assert found["started_at"] is None and found["worker_id"] is None and found["queued_at"] == found["created_at"]
    assert {t["id"] for t in claim(conn, limit=3)} == set(ids) and claim_one(conn)[1] == newer
    assert row(conn, "select event, worker_id from orchestrator.task_events limit 1") == {"event": "released", "worker_id": "w"}


def test_release_takes_back_only_the_attempt_of_this_claim(conn):
    id = enqueue(conn)
    claim_id, _ = claim_one(conn)
    fail(conn, claim_id, id, after="0")
    promote(conn)
    claim_id, _ = claim_one(conn)
    start(conn, claim_id, id)
    release(conn, claim_id)
    assert task(conn, id)["attempts"] == 1


def test_release_outside_read_committed_is_refused(conn, connect):
    enqueue(conn)
    claim_id, id = claim_one(conn)
    strict = connect(autocommit=False)
    strict.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    with pytest.raises(psycopg.Error) as refused:
        release(strict, claim_id)
    assert refused.value.sqlstate == "OR005"
    strict.rollback()
    assert status(conn, id) == "claimed"


def test_release_forgotten_gives_back_the_claims_whose_answer_was_lost(conn):
    register(conn, "v")
    known, lost, asked, others = enqueue_some(conn, 4)
    claim_id, _ = claim_one(conn)
    claim(conn, limit=2)
    claim(conn, "v")
    cancel(conn, asked)
    assert value(conn, "select orchestrator.release_forgotten('w', %s)", [claim_id]) == 2
    assert [status(conn, id) for id in (known, lost, asked, others)] == ["claimed", "pending", "cancelled", "claimed"]
    assert value(conn, "select orchestrator.release_forgotten('w', '{}')") == 1


def test_snooze_puts_off_uncharged(conn):
    id = enqueue(conn)
    claim_id, _ = claim_one(conn)
    start(conn, claim_id, id)
    assert snooze(conn, claim_id, id, "2 hours") == "snoozed"
    found = task(conn, id)
    assert (found["status"], found["attempts"], found["worker_id"], found["claim_id"]) == ("pending", 0, None, None)
    assert (found["next_retry_at"] - found["updated_at"]).total_seconds() == pytest.approx(7200, abs=1)
    assert found["queued_at"] is None and events(conn, id) == ["snoozed"] and claims(conn) == {}


@pytest.mark.parametrize("delay", [None, "-1 s", "3651 days"])
def test_snooze_refuses_an_absurd_delay(conn, delay):
    enqueue(conn)
    claim_id, id = claim_one(conn)
    with pytest.raises(psycopg.Error, match="delay: must be") as refused:
        snooze(conn, claim_id, id, delay)
    assert refused.value.sqlstate == "OR001" and status(conn, id) == "claimed"


@pytest.mark.parametrize("end", ["complete", "complete with result", "fail", "release", "release all", "snooze"])
@pytest.mark.parametrize("running", [False, True])
def test_a_task_asked_to_cancel_ends_as_cancelled_however_its_attempt_ended(conn, end, running):
    id, other = enqueue_some(conn, 2)
    claim_id = claim(conn)[0]["claim_id"]
    if running:
        start(conn, claim_id, id)
    assert cancel(conn, id) == "cancelling"
    if end == "complete":
        assert complete(conn, claim_id, id) == {id: "cancelled"}
        assert complete(conn, claim_id, id) == {id: "cancelled"}  # sent again
    elif end == "complete with result":
        query = "select id::text, outcome from orchestrator.complete_tasks(%s, '{2}', %s::uuid[], '{1,2}')"
        assert conn.execute(query, [[claim_id], [id, other]]).fetchall() == [(id, "cancelled")]
    elif end == "fail":
        assert fail(conn, claim_id, id, permanent=True) == "cancelled"
    elif end.startswith("release"):
        assert release(conn, claim_id, *([id] if end == "release" else [])) == (1 if end == "release" else 2)
    else:
        assert snooze(conn, claim_id, id) == "cancelled"
    found = task(conn, id)
    assert (found["status"], found["attempts"], found["cancel_requested_at"]) == ("cancelled", 1, None)
    assert found["completed_at"] and found["started_at"] and events(conn, id)[-1] == "cancelled"
    still = {} if end in ("complete with result", "release all") else {claim_id: 1}
    assert claims(conn) == still


def test_progress_is_kept_while_the_claim_holds_the_task(conn):
    enqueue(conn)
    claim_id, id = claim_one(conn)
    assert value(conn, "select orchestrator.record_progress(%s, %s, '{\"done\": 3}')", claim_id, id) is True
    assert task(conn, id)["progress"] == {"done": 3}
    complete(conn, claim_id, id)
    assert task(conn, id)["result"] is None and task(conn, id)["progress"] == {"done": 3}
    assert value(conn, "select orchestrator.record_progress(%s, %s, '{}')", claim_id, id) is False


def test_a_task_keeps_its_newest_100_events(conn):
    id = enqueue(conn)
    for _ in range(130):
        release(conn, claim_one(conn)[0])
    assert len(events(conn, id)) == 100
    claim_id, _ = claim_one(conn)
    snooze(conn, claim_id, id, "0")
    assert events(conn, id) == ["released"] * 99 + ["snoozed"]


def test_a_dead_letter_that_is_retried_has_all_its_retries_again(conn):
    id = enqueue(conn, max_retries=1)
    for outcome in ("retry_scheduled", "dead_letter"):
        promote(conn)
        assert fail(conn, claim_one(conn)[0], id, after="0") == outcome
    assert retry(conn, id) == "pending"
    assert fail(conn, claim_one(conn)[0], id, after="0") == "retry_scheduled"


@pytest.mark.parametrize(("attempt", "base", "max", "random", "seconds"), [
    (1, "1 s", "1 hour", 1, 1), (2, "1 s", "1 hour", 1, 2), (5, "1 s", "1 hour", 1, 16), (5, "1 s", "1 hour", 0, 8),
    (5, "1 s", "10 s", 1, 10), (5, "1 s", "10 s", 0, 5), (5, "1 s", "10 s", 0.5, 7.5),
    (10_000, "1 s", "1 hour", 1, 3600), (2_147_483_647, "1 s", "1 hour", 0, 1800), (60, "0", "1 hour", 1, 0),
    (0, "4 s", "1 hour", 1, 4), (-5, "4 s", "1 hour", 1, 4), (-2_147_483_648, "4 s", "1 hour", 1, 4),
    (1, "1 year", "10 years", 1, 365.25 * 86400), (10_000, "1 year", "1 year", 1, 365.25 * 86400),
    (10_000, "170000000 years", "170000000 years", 1, 315_360_000), (3, "-1 s", "1 hour", 1, 0),
    (3, "1 s", "-1 hour", 1, 0), (3, "1 s", "0", 1, 0), (3, "1 ms", "1 hour", 1, 0.004),
    (None, "4 s", "1 hour", 1, 4), (1, None, "1 hour", 1, 1), (20, "1 s", None, 1, 3600), (1, "4 s", "1 hour", None, 4),
    (1, "4 s", "1 hour", -7, 2), (1, "4 s", "1 hour", 99, 4), (1, "4 s", "1 hour", float("nan"), 4),
    (1, "4 s", "1 hour", float("inf"), 4), (1, "4 s", "1 hour", float("-inf"), 2),
])
def test_retry_delay_doubles_is_capped_and_jittered_for_any_input(pure, attempt, base, max, random, seconds):
    query = "select extract(epoch from orchestrator.retry_delay(%s, %s, %s, %s))::double precision"
    assert value(pure, query, attempt, base, max, random) == pytest.approx(seconds)


@pytest.mark.parametrize(("base", "max", "seconds"), [
    ("infinity", "1 hour", 3600), ("1 s", "infinity", 16), ("infinity", "infinity", 315_360_000),
    ("-infinity", "1 hour", 0), ("1 s", "-infinity", 0)])
def test_retry_delay_of_infinite_intervals_is_finite(pure, base, max, seconds):
    if pure.info.server_version < 170000:
        pytest.skip("intervals are infinite since PostgreSQL 17")
    query = "select extract(epoch from orchestrator.retry_delay(5, %s, %s, 1))::double precision"
    assert value(pure, query, base, max) == seconds


def test_the_policy_of_a_type_is_its_own_or_of_the_longest_pattern(conn):
    register(conn, "v", {"a:b:c": {"max_retries": 1}, "a:b:": {"max_retries": 2}, "a:": {"max_retries": 3},
                         "star:*": {"max_retries": 4}, "*": {"max_retries": 9}, "a%b": {"max_retries": 5}})
    retries = {"a:b:c": 1, "a:b:d": 2, "a:x": 3, "b": 9, "a": 9, "a_b": 9, "star:x": 4}
    assert {type: value(conn, "select max_retries from orchestrator._policy(%s)", type) for type in retries} == retries


def test_pausing_a_type_keeps_the_policy_of_its_pattern(conn):
    register(conn, "v", {"a:": {"max_retries": 7}})
    conn.execute("select orchestrator.pause_type('a:b')")
    assert value(conn, "select max_retries from orchestrator._policy('a:b')") == 7
    register(conn, "u", {"a:b": {"max_retries": 8}})
    assert row(conn, "select max_retries, paused from orchestrator.task_types where type = 'a:b'") == {
        "max_retries": 8, "paused": True}


def detail(conn, event):
    return value(conn, "select detail from orchestrator.task_events where event = %s order by id desc limit 1", event)


def test_the_event_of_a_failure_keeps_the_traceback_and_last_error_does_not(conn):
    enqueue(conn)
    claim_id, id = claim_one(conn)
    fail(conn, claim_id, id, "boom", traceback="File x\n  line 1")
    assert task(conn, id)["last_error"] == "boom" and detail(conn, "failed") == "boom\nFile x\n  line 1"


def test_the_event_of_a_failure_is_bounded_and_needs_no_traceback(conn):
    enqueue(conn)
    claim_id, id = claim_one(conn)
    fail(conn, claim_id, id, "boom", after="0")
    assert detail(conn, "failed") == "boom"
    promote(conn)
    fail(conn, claim_one(conn)[0], id, "boom", traceback="é" * 1_000_000)
    assert len(detail(conn, "failed")) == 8000


def test_a_lost_result_is_noted_on_a_completed_task_only(conn):
    note = "select orchestrator.note_lost_result(%s, 'a set is not JSON')"
    id = enqueue(conn)
    claim_id, _ = claim_one(conn)
    assert value(conn, note, id) is False and value(conn, note, "00000000-0000-7000-8000-000000000000") is False
    complete(conn, claim_id, id)
    assert value(conn, note, id) is True
    assert events(conn, id) == ["result_lost"] and detail(conn, "result_lost") == "a set is not JSON"


def test_progress_stays_with_a_failed_attempt_and_goes_with_a_release(conn):
    enqueue(conn)
    claim_id, id = claim_one(conn)
    progress = "select orchestrator.record_progress(%s, %s, '7')"
    assert value(conn, progress, claim_id, id)
    fail(conn, claim_id, id, after="0")
    assert task(conn, id)["progress"] == 7
    promote(conn)
    claim_id, _ = claim_one(conn)
    release(conn, claim_id)
    assert task(conn, id)["progress"] is None


@pytest.mark.parametrize(("delay", "accepted"), [("3650 days", True), ("3651 days", False)])
def test_one_limit_holds_for_every_delay(conn, delay, accepted):
    id = enqueue(conn)
    claim_id, _ = claim_one(conn)
    calls = {"snooze": lambda: snooze(conn, claim_id, id, delay),
             "run_at": lambda: conn.execute("select orchestrator.enqueue('t', p_run_at => clock_timestamp() + %s::interval)", [delay])}
    for call in calls.values():
        if accepted:
            call()
        else:
            with pytest.raises(psycopg.Error, match="3650 days"):
                call()


def test_a_name_that_is_only_paused_is_no_policy(conn):
    register(conn, "v", {"a:": {"max_retries": 7}})
    conn.execute("select orchestrator.pause_type('a:b')")
    query = "select orchestrator._registered_as(%s)"
    assert [value(conn, query, type) for type in ("a:b", "a:", "c")] == ["a:", "a:", None]
    assert value(conn, "select (max_retries, base_delay, max_delay)::text from orchestrator._policy('c')") == "(3,00:00:01,01:00:00)"
