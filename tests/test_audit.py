"""sql/82_audit.sql: audit() names each violation that is planted, and nothing on a healthy database."""
from __future__ import annotations

import re

import psycopg
import pytest

from postgres import install_schema
from steps import (
    audit,
    cancel,
    claim,
    claim_one,
    complete,
    enqueue,
    enqueue_some,
    fail,
    lead,
    promote,
    raise_floors,
    recover,
    register,
    release,
    retry,
    snooze,
    start,
    value,
)


def found(conn):
    """(invariant, task, worker) of each violation."""
    return [(invariant, str(id) if id else None, worker) for invariant, id, worker, _ in audit(conn)]


@pytest.fixture
def conn(conn):
    register(conn)
    return conn


def test_a_healthy_database_in_every_state_has_no_violation(conn):
    term = lead(conn)
    enqueue_some(conn, 20)
    enqueue(conn, idempotency_key="k")
    enqueue(conn, "u", idempotency_key="k")
    ended = claim(conn, limit=10)
    claim_id = ended[0]["claim_id"]
    ids = [t["id"] for t in ended]
    start(conn, claim_id, *ids[:6])
    complete(conn, claim_id, *ids[:3])
    fail(conn, claim_id, ids[3])
    fail(conn, claim_id, ids[4], permanent=True)
    cancel(conn, ids[5])
    snooze(conn, claim_id, ids[6])
    release(conn, claim_id, ids[7])
    cancel(conn, enqueue(conn))
    retry(conn, ids[4])
    raise_floors(conn, term)
    conn.execute("update orchestrator.workers set declared_dead_at = now() where id = 'w'")
    assert audit(conn) == []
    recover(conn, term)
    assert audit(conn) == []


def test_an_open_transaction_is_not_taken_for_a_violation(conn, connect):
    """One statement, one snapshot: half of a claim is never seen."""
    enqueue_some(conn, 5)
    worker = connect(autocommit=False)
    claim_id, id = claim_one(worker)
    assert audit(conn) == []
    worker.commit()
    complete(worker, claim_id, id)
    assert audit(conn) == []


def test_a_lower_policy_makes_no_violation_of_older_tasks(conn):
    id = enqueue(conn)
    for _ in range(3):
        fail(conn, claim_one(conn)[0], id, after="0")
        promote(conn)
    register(conn, "v", {"t": {"max_retries": 0}})
    claim_one(conn)
    assert audit(conn) == []


# rule → what breaks it, from a ready task (or one that was claimed, where the rule begins with +)
BROKEN_ROWS = {
    "type has 1 to 255 bytes": "type = repeat('x', 256)",
    "idempotency_key has 1 to 255 bytes": "idempotency_key = ''",
    "max_retries is 0 to 1000": "max_retries = -1",
    "failed is never at rest": "status = 'failed', queued_at = null",
    "only pending is queued": "status = 'dead_letter', dead_at = now()",
    "pending is either queued, scheduled or parked": "queued_at = null",
    "blocked is pending, and looked at some day": "blocked_until = now()",
    "parked is pending, with a key and a limit": "queued_at = null, parked_at = queued_at, parked_by = 't'",
    "+only the waiting expire": "expires_at = now()",
    "retry_scheduled has its time": "status = 'retry_scheduled', queued_at = null",
    "only the waiting have a next_retry_at": "status = 'dead_letter', dead_at = now(), queued_at = null, next_retry_at = now()",
    "waiting has no claim": "worker_id = 'w'",
    "+in flight has claim and worker": "worker_id = null",
    "+running and completed have started": "status = 'running'",
    "completed_at is when it completed or was cancelled": "status = 'cancelled', queued_at = null",
    "dead_at is when it became a dead letter": "dead_at = now()",
    "only in flight is asked to cancel": "cancel_requested_at = now()",
}


@pytest.mark.parametrize("name", BROKEN_ROWS)
def test_a_row_that_breaks_a_rule_is_named(conn, name):
    id = enqueue(conn)
    if name.startswith("+"):
        claim_one(conn)
    with pytest.raises(psycopg.errors.CheckViolation):   # by every_rule_holds, which only the tests have
        conn.execute(f"update orchestrator.tasks set {BROKEN_ROWS[name]}")
    for constraint in ("every_rule_holds", "a_status_has_its_time"):
        conn.execute(f"alter table orchestrator.tasks drop constraint {constraint}")
    conn.execute(f"update orchestrator.tasks set {BROKEN_ROWS[name]}")
    rule = name.lstrip("+")
    assert (rule, id) in [(invariant, task) for invariant, task, _ in found(conn)]


def test_each_rule_of_a_row_has_its_test(conn):
    text = value(conn, "select prosrc from pg_proc where proname = '_broken_rule'")
    assert set(re.findall(r"then '([^']+)'", text)) == {name.lstrip("+") for name in BROKEN_ROWS}


@pytest.mark.parametrize("by_hand", [
    "status = 'pending'", "status = 'pending', completed_at = null", "status = 'pending', queued_at = now()", "status = 'retry_scheduled'",
    "status = 'failed'", "status = 'dead_letter'", "status = 'dead_letter', dead_at = now()", "next_retry_at = now()", "queued_at = now()",
    "completed_at = null"])
def test_what_a_hand_made_update_gets_wrong_is_refused(conn, by_hand):
    id = enqueue(conn)
    complete(conn, claim_one(conn)[0], id)
    conn.execute("alter table orchestrator.tasks drop constraint every_rule_holds")
    with pytest.raises(psycopg.errors.CheckViolation, match="a_status_has_its_time"):
        conn.execute(f"update orchestrator.tasks set {by_hand}")


def test_open_tasks_that_differ_from_the_tasks_in_flight(conn):
    enqueue_some(conn, 2)
    claim(conn)
    conn.execute("update orchestrator.claims set open_tasks = 3")
    assert found(conn) == [("open_tasks is the number of its tasks in flight", None, "w")]
    assert "open_tasks is 3, in flight are 2" in audit(conn)[0][3]


def test_a_claim_without_tasks(conn):
    conn.execute("insert into orchestrator.claims (id, worker_id, open_tasks) values (1, 'w', 1)")
    assert found(conn) == [("a claim has tasks in flight", None, "w")]


def test_a_task_in_flight_without_a_claim(conn):
    ids = enqueue_some(conn, 2)
    claim_id, _ = claim_one(conn)
    claim_one(conn)
    conn.execute("delete from orchestrator.claims where id = %s", [claim_id])
    assert found(conn) == [("a task in flight has a claim", ids[0], "w")]


def test_a_task_in_flight_with_another_worker_than_its_claim(conn):
    id = enqueue(conn)
    claim_one(conn)
    conn.execute("update orchestrator.claims set worker_id = 'v'")
    assert found(conn) == [("a task in flight is with the worker of its claim", id, "w")]


@pytest.mark.parametrize(("own", "policy", "attempts"), [(0, None, 2), (2, 9, 4), (None, 1, 3), (None, None, 5)])
def test_more_attempts_than_retries_allow(conn, own, policy, attempts):
    type = "p:1"
    if policy is not None:
        register(conn, "v", {"p:": {"max_retries": policy}})
    id = enqueue(conn, type, max_retries=own)
    conn.execute("update orchestrator.tasks set attempts = %s", [attempts - 1])
    assert found(conn) == []
    conn.execute("update orchestrator.tasks set attempts = %s", [attempts])
    assert found(conn) == [("attempts are at most max_retries + 1", id, None)]


def test_an_attempt_that_failed_twice(conn):
    id = enqueue(conn)
    conn.execute("insert into orchestrator.task_events (task_id, event, attempt) values (%s, 'failed', 1), (%s, 'retried', null), "
                 "(%s, 'failed', 1), (%s, 'failed', 2)", [id] * 4)
    assert found(conn) == []
    conn.execute("insert into orchestrator.task_events (task_id, event, attempt) values (%s, 'failed', 2)", [id])
    assert found(conn) == [("an attempt fails once", id, None)]


def test_a_failure_after_the_completion(conn):
    id = enqueue(conn)
    complete(conn, claim_one(conn)[0], id)
    conn.execute("insert into orchestrator.task_events (task_id, event, attempt) values (%s, 'failed', 1)", [id])
    assert found(conn) == [("what has completed stays so", id, "w")]


def test_a_completion_after_the_clock_was_set_back_is_none_before_its_failure(conn):
    """The first attempt failed, the clock was set back by an hour, and then the second one completed."""
    id = enqueue(conn)
    complete(conn, claim_one(conn)[0], id)
    conn.execute("update orchestrator.tasks set attempts = 2, max_retries = 1 where id = %s", [id])
    event = "insert into orchestrator.task_events (task_id, event, attempt, at) values (%s, 'failed', %s, clock_timestamp() + '1 hour')"
    conn.execute(event, [id, 1])
    assert found(conn) == []
    conn.execute(event, [id, 2])
    assert found(conn) == [("what has completed stays so", id, "w")]


def test_ready_tasks_below_the_floor_of_their_lane(conn):
    low, high = enqueue(conn), enqueue(conn)
    conn.execute("insert into orchestrator.lane_floors select 't', 0, 2, queued_at from orchestrator.tasks where id = %s", [high])
    assert found(conn) == [("a ready task is not below the floor of its lane", low, None)]
    conn.execute("insert into orchestrator.lane_floors values ('t', 0, 1, '-infinity')")
    assert len(found(conn)) == 1  # the newest generation counts
    conn.execute("insert into orchestrator.lane_floors values ('t', 0, 2, '-infinity')")
    assert found(conn) == []  # and in it the lowest


def test_two_tasks_with_one_idempotency_key(conn):
    first, second = enqueue(conn, idempotency_key="k"), enqueue(conn)
    conn.execute("drop index orchestrator.tasks_idempotency")
    conn.execute("update orchestrator.tasks set idempotency_key = 'k'")
    assert found(conn) == [("an idempotency key is unique in its type", second, None)]
    assert first in audit(conn)[0][3]


def test_events_of_a_task_that_is_gone(conn):
    id = enqueue(conn)
    cancel(conn, id)
    conn.execute("delete from orchestrator.tasks")
    assert found(conn) == [("an event belongs to a task", id, None)]


def test_two_leaders(conn):
    lead(conn)
    conn.execute("drop index orchestrator.workers_have_one_leader")
    conn.execute("select setval('orchestrator.leader_terms', 100)")
    conn.execute("update orchestrator.workers set is_leader = true, leader_term = 99, leader_until = now() where id = 'w'")
    assert found(conn) == [("one worker leads at most", None, "leader"), ("one worker leads at most", None, "w")]


def test_two_workers_with_one_term(conn):
    term = lead(conn)
    conn.execute("update orchestrator.workers set leader_term = %s where id = 'w'", [term])
    assert found(conn) == [("a term has one leader", None, "leader"), ("a term has one leader", None, "w")]


@pytest.mark.parametrize("mark", ["idle = true", "is_leader = true, leader_term = 1, leader_until = now()"])
def test_a_dead_worker_that_leads_or_waits_for_work(conn, mark):
    conn.execute("select setval('orchestrator.leader_terms', 100)")
    conn.execute(f"update orchestrator.workers set declared_dead_at = now(), {mark}")
    assert found(conn) == [("a worker declared dead neither leads nor waits for work", None, "w")]


def test_a_leader_without_a_lease(conn):
    conn.execute("alter table orchestrator.workers drop constraint leader_has_term_and_lease")
    conn.execute("select setval('orchestrator.leader_terms', 100)")
    conn.execute("update orchestrator.workers set is_leader = true, leader_term = 1")
    assert found(conn) == [("a leader has a term and a lease", None, "w")]


def test_a_sequence_that_fell_behind_its_table(conn):
    for _ in range(2):
        cancel(conn, enqueue(conn))
    conn.execute("alter sequence orchestrator.task_events_id_seq restart")
    assert found(conn) == [("a sequence is not behind its table", None, None)]
    assert audit(conn)[0][3].startswith("task_events_id_seq is at 0, the table at 2")
    conn.execute("select setval('orchestrator.task_events_id_seq', 2)")
    assert found(conn) == []
    lead(conn)
    conn.execute("alter sequence orchestrator.leader_terms restart")
    assert found(conn) == [("a sequence is not behind its table", None, None)]
    conn.execute("select orchestrator.pause_type('t'), setval('orchestrator.leader_terms', 1)")
    assert found(conn) == []
    conn.execute("alter sequence orchestrator.operations_id_seq restart")
    assert found(conn) == [("a sequence is not behind its table", None, None)]


@pytest.mark.parametrize("sequence", ["task_events_id_seq", "leader_terms"])
def test_after_a_restore_of_data_alone_claims_reckon_with_the_largest_payloads(conn, installed, sequence):
    enqueue(conn, payload=["x" * 262000])
    cancel(conn, enqueue(conn))
    lead(conn)
    install_schema(installed)
    assert value(conn, "select orchestrator._largest_payload()") == 262144
    for name in ("payload_doublings", sequence):
        conn.execute(f"alter sequence orchestrator.{name} restart")
    enqueue(conn)
    assert len(claim(conn)) == 2
    install_schema(installed)
    enqueue_some(conn, 3)
    query = "select count(*) from orchestrator.claim_tasks('w', '{t}', 10, 600000)"
    assert value(conn, query) == 2 and audit(conn) == []


@pytest.mark.parametrize("table", ["leader_state", "stats_state"])
def test_a_table_of_one_row_that_lost_it(conn, table):
    conn.execute(f"delete from orchestrator.{table}")
    assert found(conn) == [("a table of one row has it", None, None)]
    assert table in audit(conn)[0][3]


def test_audit_reads_a_large_table_in_seconds(conn):
    conn.execute("alter table orchestrator.tasks drop constraint if exists every_rule_holds")   # it costs far more than the insert
    conn.execute("select count(*) from orchestrator.enqueue_many('t', array_fill('{}'::jsonb, array[50000]))")
    for _ in range(5):
        got = claim(conn, limit=1000)
        complete(conn, got[0]["claim_id"], *[t["id"] for t in got[:-1]])
    conn.execute("set statement_timeout = '20s'")
    assert audit(conn) == [] and value(conn, "select count(*) from orchestrator.claims") == 5


def test_a_schedule_whose_next_time_is_none_of_its_fire_times(conn):
    conn.execute("select orchestrator.schedule('s', '* * * * *', 't'), orchestrator.schedule('paused', '* * * * *', 't'), "
                 "orchestrator.schedule('gone', '* * * * *', 't', p_timezone => 'Europe/Berlin')")
    assert audit(conn) == []
    conn.execute("update orchestrator.schedules set timezone = 'Mars/Base' where name = 'gone'")   # it pauses itself when it is due
    conn.execute("update orchestrator.schedules set next_at = '2026-11-26 12:00:01Z'")
    conn.execute("update orchestrator.schedules set paused = true where name = 'paused'")
    assert [(invariant, detail) for invariant, _, _, detail in audit(conn)] == [
        ("the next time of a schedule is one of its fire times", "schedule s: 2026-11-26 12:00:01+00")]
