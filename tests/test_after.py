"""sql/45_after.sql: tasks that wait for others."""
from __future__ import annotations

import itertools
import threading
import time
from random import Random

import hypothesis.strategies as st
import psycopg
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from psycopg.types.json import Jsonb

from postgres import eventually, wait_for_lock
from steps import (
    audit,
    backend,
    background,
    cancel,
    claim,
    claim_one,
    column,
    complete,
    declare_dead,
    enqueue,
    fail,
    lead,
    promote,
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
from transitions import check_transitions, record_transitions


def waits(conn):
    return rows(conn, "select parent::text, child::text, on_failure from orchestrator.task_waits order by 1, 2")


def died(conn, type="t"):
    """A dead letter."""
    id = enqueue(conn, type)
    [found] = [t for t in claim(conn, types=[type]) if t["id"] == id]
    assert fail(conn, found["claim_id"], id, permanent=True) == "dead_letter"
    return id


@pytest.fixture(autouse=True)
def worker(conn):
    register(conn)


def test_a_task_after_another_is_not_claimed(conn):
    first = enqueue(conn)
    second = enqueue(conn, after=[first])
    assert [t["id"] for t in claim(conn)] == [first]
    assert waits(conn) == [{"parent": first, "child": second, "on_failure": "wait"}]
    found = task(conn, second)
    assert (found["status"], found["queued_at"], [str(a) for a in found["after"]]) == ("pending", None, [first])
    assert found["blocked_until"] is not None and audit(conn) == []


def test_a_completed_parent_is_not_waited_for(conn):
    first = enqueue(conn)
    complete(conn, *claim_one(conn))
    second = enqueue(conn, after=[first])
    assert waits(conn) == [] and [t["id"] for t in claim(conn)] == [second]


def test_no_parents_are_as_no_after(conn):
    assert [t["id"] for t in claim(conn)] == [] and enqueue(conn, after=[]) == claim(conn)[0]["id"]


def test_a_parent_named_twice_is_waited_for_once(conn):
    first = enqueue(conn)
    enqueue(conn, after=[first, first])
    assert len(waits(conn)) == 1


NOBODY = "01890000-0000-7000-8000-000000000000"


ENQUEUED = {"enqueue": "select orchestrator.enqueue('t', p_after => %s::uuid[], p_on_failure => %s)",
            "enqueue_many": "select orchestrator.enqueue_many('t', '{1,2}', p_after => %s::uuid[], p_on_failure => %s)"}


def ended(conn, end):
    """A task's id."""
    if end in ("unknown", "null"):
        return NOBODY if end == "unknown" else None
    if end == "dead_letter":
        return died(conn)
    id = enqueue(conn)
    cancel(conn, id)
    return id


@pytest.mark.parametrize("call", ENQUEUED)
@pytest.mark.parametrize(("end", "on_failure", "problem"), [
    ("unknown", "wait", f"there is no task {NOBODY}"), ("unknown", "cancel", "there is no task"), ("unknown", "run", "there is no task"),
    ("null", "wait", "there is no task null"), ("cancelled", "wait", "task .* is cancelled"),
    ("cancelled", "cancel", "task .* is cancelled"), ("dead_letter", "cancel", "task .* is a dead letter")])
def test_a_parent_that_can_not_be_waited_for_is_refused(conn, call, end, on_failure, problem):
    parent, good = ended(conn, end), enqueue(conn)
    before = value(conn, "select count(*) from orchestrator.tasks")
    with pytest.raises(psycopg.DatabaseError, match=rf"^after\[2\]: {problem}") as error:
        conn.execute(ENQUEUED[call], [[good, parent], on_failure])
    assert error.value.sqlstate == "OR001"
    assert value(conn, "select count(*) from orchestrator.tasks") == before and waits(conn) == []


@pytest.mark.parametrize("call", ENQUEUED)
@pytest.mark.parametrize(("end", "on_failure", "waited"), [
    ("dead_letter", "wait", 2), ("dead_letter", "run", 1), ("cancelled", "run", 1)])
def test_what_has_ended_is_waited_for_only_if_it_may_still_complete(conn, call, end, on_failure, waited):
    parent, good = ended(conn, end), enqueue(conn)
    conn.execute(ENQUEUED[call], [[good, parent], on_failure])
    assert {w["parent"] for w in waits(conn)} == {good, parent} if waited == 2 else {good}
    blocked = "select count(*) from orchestrator.tasks where blocked_until is not null"
    assert value(conn, blocked) == {"enqueue": 1, "enqueue_many": 2}[call]


@pytest.mark.parametrize(("named", "field"), [({"on_failure": "ignore"}, "on_failure"), ({"on_failure": None}, "on_failure")])
def test_a_wrong_value_is_refused_by_its_name(conn, named, field):
    first = enqueue(conn)
    with pytest.raises(psycopg.DatabaseError, match=f"^{field}: "):
        enqueue(conn, after=[first], **named)


def test_a_known_key_returns_the_first_task_whatever_its_parents_became(conn):
    first = enqueue(conn)
    child = enqueue(conn, after=[first], idempotency_key="k")
    cancel(conn, first)
    assert enqueue(conn, after=[first], idempotency_key="k") == child
    query = "select id::text, created from orchestrator.enqueue_many('t', '{1,2}', 0, '{k,k}', p_after => %s::uuid[])"
    assert rows(conn, query, [first]) == [{"id": child, "created": False}] * 2
    with pytest.raises(psycopg.DatabaseError, match=r"after\[1\]"):
        conn.execute("select orchestrator.enqueue_many('t', '{1,2}', 0, '{k,new}', p_after => %s::uuid[])", [[first]])


def test_a_child_is_ready_in_the_transaction_that_completes_its_last_parent(conn, connect):
    first, second = enqueue(conn), enqueue(conn)
    child = enqueue(conn, after=[first, second])
    a, b = claim(conn)
    complete(conn, a["claim_id"], first)
    assert waits(conn) == [{"parent": second, "child": child, "on_failure": "wait"}] and claim(conn) == []
    with connect(autocommit=False) as other:
        complete(other, b["claim_id"], second)
        assert claim(conn) == []
    assert waits(conn) == [] and [t["id"] for t in claim(conn)] == [child]
    assert task(conn, child)["blocked_until"] is None


def ready(conn):
    return set(column(conn, "select id::text from orchestrator.tasks where queued_at is not null"))


def test_an_idle_worker_is_woken_for_a_child(conn, connect):
    first = enqueue(conn)
    enqueue(conn, after=[first])
    claim_id, _ = claim_one(conn)
    conn.execute("select orchestrator.set_idle('w', true)")
    listener = connect()
    listener.execute("listen orchestrator")
    complete(conn, claim_id, first)
    assert rung(listener, conn) == [""]


def family(conn, on_failure="wait"):
    """A running parent with a child that has a child: (claim, parent, child, grandchild)."""
    parent = enqueue(conn)
    child = enqueue(conn, after=[parent], on_failure=on_failure)
    grandchild = enqueue(conn, after=[child])
    claim_id, _ = claim_one(conn)
    start(conn, claim_id, parent)
    return claim_id, parent, child, grandchild


# how a running parent ends → its status then
ENDS = {
    "fails for good": lambda conn, claim_id, id: fail(conn, claim_id, id, permanent=True),
    "is cancelled, completes": lambda conn, claim_id, id: (cancel(conn, id), complete(conn, claim_id, id)),
    "is cancelled, fails": lambda conn, claim_id, id: (cancel(conn, id), fail(conn, claim_id, id)),
    "is cancelled, is released": lambda conn, claim_id, id: (cancel(conn, id), release(conn, claim_id, id)),
    "is cancelled, is forgotten": lambda conn, claim_id, id: (
        cancel(conn, id), conn.execute("select orchestrator.release_forgotten('w', '{}')")),
    "is cancelled, snoozes": lambda conn, claim_id, id: (cancel(conn, id), snooze(conn, claim_id, id)),
    "is cancelled, its worker dies": lambda conn, claim_id, id: (
        cancel(conn, id), declare_dead(conn, "w"), recover(conn, lead(conn))),
    "its worker dies at the last attempt": lambda conn, claim_id, id: (
        conn.execute("update orchestrator.tasks set max_retries = 0 where status = 'running'"),
        declare_dead(conn, "w"), recover(conn, lead(conn))),
}


@pytest.mark.parametrize("on_failure", ["wait", "cancel", "run"])
@pytest.mark.parametrize("end", ENDS)
def test_what_waits_for_a_task_goes_its_way_in_the_transaction_that_ends_it(conn, end, on_failure):
    claim_id, parent, child, grandchild = family(conn, on_failure)
    ENDS[end](conn, claim_id, parent)
    dead = status(conn, parent) == "dead_letter"
    assert dead or status(conn, parent) == "cancelled"
    if on_failure == "run":
        assert ready(conn) == {child} and status(conn, grandchild) == "pending"
    elif dead and on_failure == "wait":
        assert ready(conn) == set() and len(waits(conn)) == 2
    else:
        assert (status(conn, child), status(conn, grandchild), waits(conn)) == ("cancelled", "cancelled", [])
        why = "select detail from orchestrator.task_events where task_id = %s"
        assert value(conn, why, child) == f"task {parent} {'is a dead letter' if dead else 'was cancelled'}"
        assert value(conn, why, grandchild) == f"task {child} was cancelled"
    assert audit(conn) == []


def test_a_dead_letter_that_is_retried_and_completes_frees_its_children(conn):
    claim_id, parent, child, _ = family(conn)
    fail(conn, claim_id, parent, permanent=True)
    retry(conn, parent)
    assert [t["id"] for t in claim(conn)] == [parent]
    complete(conn, task(conn, parent)["claim_id"], parent)
    assert ready(conn) == {child}


def test_a_failed_attempt_changes_nothing_for_the_children(conn):
    claim_id, parent, _, _ = family(conn, "cancel")
    assert fail(conn, claim_id, parent) == "retry_scheduled"
    assert ready(conn) == set() and len(waits(conn)) == 2


def test_cancelling_the_root_cancels_all_that_waits_for_it(conn):
    root = enqueue(conn)
    ids = [root]
    for n in range(1, 30):
        ids.append(enqueue(conn, after=[ids[(n - 1) // 2]]))
    other = enqueue(conn)
    cleanup = enqueue(conn, after=[ids[-1], other], on_failure="run")
    assert cancel(conn, root) == "cancelled"
    assert {status(conn, id) for id in ids} == {"cancelled"} and waits(conn) == [{"parent": other, "child": cleanup, "on_failure": "run"}]
    assert audit(conn) == []


def test_a_cancelled_child_can_be_retried_and_waits_for_nothing_then(conn):
    _, _, child, grandchild = family(conn)
    assert cancel(conn, child) == "cancelled" and status(conn, grandchild) == "cancelled"
    assert retry(conn, child) == "pending"
    assert ready(conn) == {child} and waits(conn) == [] and task(conn, child)["after"] is not None


@pytest.mark.parametrize("on_failure", ["wait", "cancel", "run"])
@pytest.mark.parametrize("how", ["retention", "by hand"])
def test_a_parent_that_is_deleted_ends_the_wait(conn, how, on_failure):
    claim_id, parent, child, grandchild = family(conn, "run" if on_failure == "run" else "wait")
    conn.execute("update orchestrator.task_waits set on_failure = 'wait' where child = %s", [child])
    fail(conn, claim_id, parent, permanent=True)   # held, so that there is something to delete
    conn.execute("update orchestrator.task_waits set on_failure = %s where child = %s", [on_failure, child])
    if how == "retention":
        conn.execute("update orchestrator.tasks set dead_at = now() - interval '2 days' where dead_at is not null")
        conn.execute("select orchestrator.prune('leader', %s, '0', '1 day')", [lead(conn)])
        assert task(conn, parent) is None
    else:
        conn.execute("delete from orchestrator.task_events where task_id = %s", [parent])
        conn.execute("delete from orchestrator.tasks where id = %s", [parent])
        look(conn)
    if on_failure == "run":
        assert ready(conn) == {child}
    else:
        assert (status(conn, child), status(conn, grandchild), waits(conn)) == ("cancelled", "cancelled", [])
        detail = value(conn, "select detail from orchestrator.task_events where task_id = %s", child)
        assert detail == f"task {parent} was deleted"
    assert audit(conn) == []


def prune(conn, parent):
    term = lead(conn)

    def pruned():
        conn.execute("select orchestrator.prune('leader', %s, '1 microsecond', '0')", [term])
        return task(conn, parent) is None
    assert eventually(pruned)


def test_a_completed_parent_may_be_deleted_while_the_child_waits_for_another(conn):
    first, second = enqueue(conn), enqueue(conn)
    child = enqueue(conn, after=[first, second])
    a, b = claim(conn)
    complete(conn, a["claim_id"], first)
    prune(conn, first)
    assert status(conn, child) == "pending"
    complete(conn, b["claim_id"], second)
    assert ready(conn) == {child}


def test_a_child_that_missed_its_parents_completion_is_freed_before_retention_deletes_the_parent(conn):
    parent, child = missed(conn)
    prune(conn, parent)
    assert ready(conn) == {child}


def test_retention_locks_no_child_of_an_old_parent_that_has_not_ended(conn, connect):
    """It locked each of them in each pass, and waited for whoever had one, with the leader's row in its hand."""
    parent = enqueue(conn)
    child = enqueue(conn, after=[parent])
    term = lead(conn)
    with connect(autocommit=False) as other:
        other.execute("select from orchestrator.tasks where id = %s for update", [child])
        conn.execute("set lock_timeout = '1s'")
        assert row(conn, "select * from orchestrator.prune('leader', %s, '1 microsecond', '1 day')", term)["completed"] == 0
    assert status(conn, parent) == "pending" and task(conn, child)["blocked_until"] is not None


def test_a_completed_parent_whose_child_somebody_has_locked_is_not_purged(conn, connect):
    parent, child = missed(conn)
    purge = "select done from orchestrator.bulk_tasks('purge', '{\"status\": \"completed\"}', false)"
    with connect(autocommit=False) as other:
        other.execute("select from orchestrator.tasks where id = %s for update", [child])
        assert value(conn, purge) == 0
    assert value(conn, purge) == 1 and ready(conn) == {child} and task(conn, parent) is None


def test_a_delayed_child_waits_for_the_later_of_both(conn):
    parents = [enqueue(conn) for _ in range(2)]
    claimed = {t["id"]: t["claim_id"] for t in claim(conn)}
    soon = enqueue(conn, after=parents[:1], run_at="2030-01-01")
    late = enqueue(conn, after=parents[1:], run_at="2030-01-01")
    found = task(conn, late)
    assert found["blocked_until"].year == 2030 and found["next_retry_at"].year != 2030
    complete(conn, claimed[parents[0]], parents[0])
    found = task(conn, soon)
    assert (found["next_retry_at"].year, found["blocked_until"], found["queued_at"]) == (2030, None, None)
    conn.execute("update orchestrator.tasks set blocked_until = now() where id = %s", [late])   # the time has come
    promote(conn)
    assert ready(conn) == set()
    complete(conn, claimed[parents[1]], parents[1])
    assert ready(conn) == {late} and audit(conn) == []


def test_a_child_with_a_key_takes_its_turn_when_its_parents_have_completed(conn):
    conn.execute("select orchestrator.limit_type('t', p_max_per_key => 1)")
    parent = enqueue(conn)
    child = enqueue(conn, after=[parent], concurrency_key="k")
    enqueue(conn, concurrency_key="k")
    claimed = {t["id"]: t["claim_id"] for t in claim(conn)}
    complete(conn, claimed[parent], parent)
    assert len(claimed) == 2 and claim(conn) == [] and status(conn, child) == "pending"
    [(id, claim_id)] = [(id, claim_id) for id, claim_id in claimed.items() if id != parent]
    complete(conn, claim_id, id)
    assert [t["id"] for t in claim(conn)] == [child]


def test_many_parents_and_many_children(conn):
    ids = column(conn, "select id::text from orchestrator.enqueue_many('t', array_fill('{}'::jsonb, array[500]))")
    middle = enqueue(conn, after=ids)
    query = "select id::text from orchestrator.enqueue_many('t', array_fill('{}'::jsonb, array[500]), p_after => %s::uuid[])"
    after = set(column(conn, query, [middle]))
    for _ in range(5):
        taken = claim(conn, limit=100)
        complete(conn, taken[0]["claim_id"], *[t["id"] for t in taken])
    [taken] = claim(conn, limit=100)
    assert taken["id"] == middle
    complete(conn, taken["claim_id"], middle)
    assert ready(conn) == after and waits(conn) == [] and audit(conn) == []


def test_completing_some_of_many_parents_reads_no_other_waits(conn):
    """Also by plans of when one parent had many children."""
    parent = enqueue(conn)
    conn.execute("select orchestrator.enqueue_many('u', array_fill('{}'::jsonb, array[1000]), p_after => array[%s::uuid])", [parent])
    conn.execute("analyze orchestrator.task_waits")
    complete(conn, claim_one(conn)[0], parent)
    ids = column(conn, "select id::text from orchestrator.enqueue_many('t', array_fill('{}'::jsonb, array[2000]))")
    enqueue(conn, after=ids)
    taken = claim(conn, limit=100)
    read = "select sum(pg_stat_get_xact_tuples_returned(indexrelid)) from pg_index where indrelid = 'orchestrator.task_waits'::regclass"
    with conn.transaction():
        before = value(conn, read)
        complete(conn, taken[0]["claim_id"], *[t["id"] for t in taken])
        assert value(conn, read) - before < 2500   # 1000 dead ones
    assert len(waits(conn)) == 1900


def test_a_cascade_reads_no_other_waits(conn):
    """It walked all waits there are, and for each those found so far: 10,000 children took 9 s."""
    many = "select count(*) from orchestrator.enqueue_many('t', array_fill('{}'::jsonb, array[5000]), p_after => array[%s]::uuid[])"
    column(conn, many, enqueue(conn))
    conn.execute("analyze orchestrator.task_waits")   # all of them have the same parent
    parent = enqueue(conn)
    query = "select id::text from orchestrator.enqueue_many('t', array_fill('{}'::jsonb, array[5]), p_after => array[%s]::uuid[])"
    children = column(conn, query, parent)
    last = enqueue(conn, after=[children[2]])
    read = "select sum(pg_stat_get_xact_tuples_returned(indexrelid)) from pg_index where indrelid = 'orchestrator.task_waits'::regclass"
    with conn.transaction():
        cancel(conn, parent)
        assert value(conn, read) < 200
    assert {status(conn, id) for id in (*children, last)} == {"cancelled"} and len(waits(conn)) == 5000


# --- what people see ------------------------------------------------------------------------------------------------------------------

def explain(conn, id):
    return value(conn, "select orchestrator.explain_task(%s)", id)


def test_a_blocked_task_says_what_it_waits_for_and_how_to_free_it(conn):
    first, second = enqueue(conn), enqueue(conn)
    child = enqueue(conn, after=[first, second], run_at="2030-01-01")
    assert explain(conn, child) == f"waits for task {first} (pending), task {second} (pending), and for 2030-01-01 00:00:00+00"
    claimed = {t["id"]: t["claim_id"] for t in claim(conn)}
    fail(conn, claimed[second], second, permanent=True)
    assert explain(conn, child).startswith(
        f"waits for task {second} (a dead letter: select orchestrator.retry_task('{second}') tries again, "
        f"cancel_task('{child}') gives up), task {first} (claimed), and for")
    many = enqueue(conn, after=[enqueue(conn) for _ in range(5)])
    assert explain(conn, many).endswith(" and 2 more")
    cancel(conn, first)
    complete(conn, claimed[first], first)
    assert explain(conn, child).endswith(f": task {first} was cancelled; select orchestrator.retry_task('{child}') runs it")
    other = enqueue(conn)
    cancel(conn, other)
    assert "task " not in explain(conn, other)


def test_a_task_shows_its_parents_and_the_children_that_wait_for_it(conn):
    parent = enqueue(conn, "up")
    child = enqueue(conn, "down", after=[parent])
    show = "select orchestrator.show_task(%s)"
    assert value(conn, show, child)["parents"] == [{"id": parent, "type": "up", "status": "pending"}]
    assert value(conn, show, parent)["children"] == [{"id": child, "type": "down", "status": "pending"}]
    assert (value(conn, show, parent)["parents"], value(conn, show, child)["children"]) == ([], [])
    complete(conn, *claim_one(conn, types=["up"]))
    assert value(conn, show, child)["parents"][0]["status"] == "completed" and value(conn, show, parent)["children"] == []


def test_blocked_tasks_are_counted_as_such_and_not_as_ended(conn):
    parent = enqueue(conn)
    enqueue(conn, "u", after=[parent])
    enqueue(conn, "u", run_at="2030-01-01")
    assert rows(conn, "select type, waiting, scheduled, blocked from orchestrator.queue_stats where type in ('t', 'u') order by 1") == [
        {"type": "t", "waiting": 1, "scheduled": 0, "blocked": 0}, {"type": "u", "waiting": 0, "scheduled": 2, "blocked": 1}]
    register(conn, "v", {"u": {}})
    conn.execute("select orchestrator.sample_stats('leader', %s)", [lead(conn)])
    assert {t["type"]: t["blocked"] for t in value(conn, "select orchestrator.metrics()")["types"]} == {"t": 0, "u": 1, "other": 0}
    assert value(conn, "select orchestrator.api_overview()")["totals"]["ended_total"] == 0
    pending = "select next_retry_at from orchestrator.pending_tasks where type = 'u' order by id"
    assert [at and at.year for at in column(conn, pending)] == [None, 2030]


def test_the_audit_knows_the_rules_of_waits(conn):
    parent, other = enqueue(conn), enqueue(conn)
    child = enqueue(conn, after=[parent, other])
    [claimed, _] = claim(conn)
    conn.execute("alter table orchestrator.tasks drop constraint if exists every_rule_holds")

    def broken(update):
        with conn.transaction(force_rollback=True):
            conn.execute(update)
            return sorted({invariant for invariant, *_ in audit(conn)})

    assert broken("delete from orchestrator.task_waits") == ["blocked is who waits for a task"]
    unblocked = "update orchestrator.tasks set blocked_until = null where blocked_until is not null"
    assert broken(unblocked) == ["who waits for a task is blocked"]
    assert broken(f"delete from orchestrator.tasks where id = '{child}'") == ["who waits for a task is blocked"]
    assert broken("update orchestrator.tasks set expires_at = now() + interval '1 hour' where blocked_until is not null") == [
        "what expires is looked at then"]
    waited = f"insert into orchestrator.task_waits values ('{parent}', '{child}', 'wait')"
    complete(conn, claimed["claim_id"], parent)
    assert broken(waited) == []   # it may have been missed, and is looked at soon
    assert broken(f"{waited}; update orchestrator.tasks set completed_at = now() - interval '12 minutes' where id = '{parent}'") == [
        "what has ended is waited for no longer"]


def test_a_cancelled_parent_of_a_child_that_was_locked_is_no_violation_until_the_child_has_been_looked_at(conn, connect):
    parent = enqueue(conn)
    child = enqueue(conn, after=[parent])
    conn.execute("update orchestrator.tasks set next_retry_at = clock_timestamp() + interval '8 minutes' where id = %s", [child])
    with connect(autocommit=False) as other:
        other.execute("select from orchestrator.tasks where id = %s for update", [child])
        conn.execute("select orchestrator.bulk_tasks('cancel', %s, false)", [Jsonb({"ids": [parent]})])
    conn.execute("update orchestrator.tasks set completed_at = clock_timestamp() - interval '2 minutes' where id = %s", [parent])
    conn.execute("select orchestrator.bulk_tasks('prioritize', %s, false, '5')", [Jsonb({"ids": [child]})])
    assert status(conn, child) == "pending" and audit(conn) == []


def test_each_role_may_do_its_part(conn, connect):
    other = connect()
    other.execute("set role orchestrator_producer")
    parent = enqueue(other)
    child = enqueue(other, after=[parent], expires_at="2030-01-01")
    other.execute("set role orchestrator_worker")
    [claimed] = claim(other)
    complete(other, claimed["claim_id"], parent)
    assert ready(conn) == {child} and other.execute("select * from orchestrator.parent_results(%s)", [child]).fetchall()
    grandchild = enqueue(other, after=[child])
    look(other)
    other.execute("set role orchestrator_operator")
    assert explain(other, grandchild) == f"waits for task {child} (pending)"
    assert cancel(other, child) == "cancelled" and status(conn, grandchild) == "cancelled" and audit(other) == []


# --- looks ----------------------------------------------------------------------------------------------------------------------------

def missed(conn):
    """A parent that completed while the transaction of its child was under way: (parent, child)."""
    parent = enqueue(conn)
    [claimed] = claim(conn)
    with psycopg.connect(conn.info.dsn) as other:
        child = enqueue(other, after=[parent])
        complete(conn, claimed["claim_id"], parent)
    assert waits(conn) and ready(conn) == set()
    return parent, child


def look(conn):
    """As if the time of the next look at each blocked task had come."""
    conn.execute("update orchestrator.tasks set next_retry_at = clock_timestamp() where id in ("
                 "select id from orchestrator.tasks where blocked_until is not null for update skip locked)")
    return conn.execute("select * from orchestrator.promote_due()").fetchone()


def test_a_child_that_missed_its_parents_completion_is_looked_at_as_soon_as_it_has_committed(conn):
    _, child = missed(conn)
    conn.execute("select orchestrator.promote_due()")
    assert ready(conn) == {child} and waits(conn) == [] and audit(conn) == []


def test_looks_become_rare_but_never_end(conn):
    parent = enqueue(conn)
    child = enqueue(conn, after=[parent])
    rests = []
    for _ in range(9):
        look(conn)
        rest = "select extract(epoch from next_retry_at - updated_at)::float from orchestrator.tasks where id = %s"
        rests.append(value(conn, rest, child))
        conn.execute("update orchestrator.tasks set updated_at = clock_timestamp() - interval '1 second' * %s where id = %s",
                     [rests[-1], child])
    assert 1 <= rests[0] <= 2 and all(1.3 * a < b <= 3 * a + 0.01 or b > 598 for a, b in itertools.pairwise(rests))
    assert 598 < rests[-1] <= 600
    next_in = value(conn, "select next_in from orchestrator.promote_due()")
    assert 590 < next_in <= 600


def test_a_parent_that_completes_between_the_looks_is_seen_by_the_second(conn, connect):
    parent = enqueue(conn)
    [claimed] = claim(conn)
    other = connect(autocommit=False)
    complete(other, claimed["claim_id"], parent)   # has looked for children
    child = enqueue(conn, after=[parent])
    conn.execute("select orchestrator.promote_due()")
    other.commit()
    assert ready(conn) == set()
    look(conn)
    assert ready(conn) == {child}


def test_a_look_skips_a_child_that_another_transaction_has_locked(conn, connect):
    _, child = missed(conn)
    other = connect(autocommit=False)
    other.execute("select from orchestrator.tasks where id = %s for update", [child])
    conn.execute("set statement_timeout = '5s'")
    look_at = "select orchestrator._settle_child(%s, null, true)"
    assert value(conn, look_at, child) is False and waits(conn)
    other.rollback()
    look(conn)
    assert ready(conn) == {child}


def test_promoting_waits_for_nobody_down_the_line(conn, connect):
    parent, child = missed(conn)
    grandchild = enqueue(conn, after=[child])
    conn.execute("delete from orchestrator.tasks where id = %s", [parent])
    other = connect(autocommit=False)
    other.execute("select from orchestrator.tasks where id = %s for update", [grandchild])
    conn.execute("set statement_timeout = '5s'")
    look(conn)
    assert (status(conn, child), status(conn, grandchild)) == ("cancelled", "pending")
    other.rollback()
    look(conn)
    assert status(conn, grandchild) == "cancelled" and waits(conn) == []


# --- races ----------------------------------------------------------------------------------------------------------------------------

def test_of_two_parents_that_complete_at_the_same_time_the_later_frees_the_child(conn, connect):
    first, second = enqueue(conn), enqueue(conn)
    child = enqueue(conn, after=[first, second])
    register(conn, "v")
    (a, _), (b, _) = claim_one(conn), claim_one(conn, "v")
    one, two = connect(autocommit=False), connect()
    complete(one, a, first)
    waiting = background(lambda: complete(two, b, second))
    wait_for_lock(conn, backend(two))
    one.commit()
    waiting.result(timeout=10)
    assert ready(conn) == {child} and waits(conn) == []


def test_a_cascade_locks_nothing_below_a_child_that_keeps_waiting(conn, connect):
    """That is older than what is locked by then: a deadlock with whoever ends another parent of both."""
    parent = enqueue(conn)
    waiting = enqueue(conn, after=[parent])
    below = enqueue(conn, after=[waiting])
    goes, last = (enqueue(conn, after=[parent], on_failure="cancel") for _ in range(2))
    beyond = enqueue(conn, after=[goes])
    claim_id, _ = claim_one(conn)
    with connect(autocommit=False) as other:
        other.execute("select from orchestrator.tasks where id = %s for update", [below])
        conn.execute("set lock_timeout = '1s'")
        assert fail(conn, claim_id, parent, permanent=True) == "dead_letter"
    ends = [status(conn, id) for id in (waiting, below, goes, last, beyond)]
    assert ends == ["pending", "pending", "cancelled", "cancelled", "cancelled"]
    assert [(w["parent"], w["child"]) for w in waits(conn)] == [(parent, waiting), (waiting, below)]


def test_children_are_locked_in_the_order_of_their_ids(conn, connect):
    """Else two that end such tasks would wait for each other. The youngest one waits for another transaction meanwhile."""
    root, other_root = enqueue(conn), enqueue(conn)
    child = enqueue(conn, after=[root])
    middle = enqueue(conn, after=[child, other_root])
    last = enqueue(conn, after=[root, other_root])
    holder, one = connect(autocommit=False), connect()
    holder.execute("select from orchestrator.tasks where id = %s for update", [middle])
    waiting = background(lambda: cancel(one, root))
    wait_for_lock(conn, backend(one))
    with conn.transaction():   # not locked yet, since it is younger than the one that is waited for
        conn.execute("select from orchestrator.tasks where id = %s for update nowait", [last])
    holder.rollback()
    assert waiting.result(timeout=10) == "cancelled"
    assert {status(conn, id) for id in (child, middle, last)} == {"cancelled"}


# --- all together ---------------------------------------------------------------------------------------------------------------------

class Stress:
    """Producers with long transactions, workers, an operator who retries and cancels."""

    def __init__(self, connect, seed):
        self.connect, self.seed = connect, seed
        self.ids, self.lock = [], threading.Lock()
        self.stop, self.errors = threading.Event(), []

    def thread(self, work, n):
        def run():
            try:
                work(self.connect(), Random(f"{self.seed} {work.__name__} {n}"), n)
            except Exception as error:
                self.errors.append(error)
                self.stop.set()
        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def produce(self, conn, draw, n):
        for _ in range(150):
            mine = []
            with conn.transaction(force_rollback=draw.random() < 0.05):
                for _ in range(draw.randint(1, 3)):
                    with self.lock:
                        known = self.ids[-30:] + mine
                    after = draw.sample(known, min(len(known), draw.choice([0, 1, 1, 2, 3])))
                    try:
                        with conn.transaction():
                            mine.append(enqueue(conn, after=after, on_failure=draw.choice(["wait", "wait", "cancel", "run"])))
                    except psycopg.DatabaseError as error:
                        if error.sqlstate != "OR001":   # it was cancelled, or rolled back
                            raise
                time.sleep(draw.choice([0, 0, 0, 0.003, 0.02]))
            with self.lock:
                self.ids += mine
            if draw.random() < 0.05:
                cancel(conn, draw.choice(self.ids[-20:]))

    def work(self, conn, draw, n):
        polled = 0.0
        while not self.stop.is_set():
            if time.monotonic() > polled:
                conn.execute("select orchestrator.promote_due()")
                polled = time.monotonic() + 0.05
            taken = claim(conn, f"w{n}", limit=draw.randint(1, 8))
            if not taken:
                time.sleep(0.003)
                continue
            draw.shuffle(taken)
            time.sleep(draw.choice([0, 0, 0.003]))
            bad = [t for t in taken if draw.random() < 0.07]
            complete(conn, taken[0]["claim_id"], *[t["id"] for t in taken if t not in bad])
            for t in bad:
                fail(conn, t["claim_id"], t["id"], permanent=True)

    def run(self, conn):
        workers = [self.thread(self.work, n) for n in range(3)]
        producers = [self.thread(self.produce, n) for n in range(2)]
        for producer in producers:
            producer.join()
        until = time.monotonic() + 8
        left = "select count(*) from orchestrator.tasks where status not in ('completed', 'cancelled')"
        while not self.stop.is_set() and value(conn, left) and time.monotonic() < until:
            conn.execute("select orchestrator.retry_dead_letters()")
            time.sleep(0.02)
        self.stop.set()
        for worker in workers:
            worker.join()


@pytest.mark.parametrize("seed", [1, 2])
def test_no_child_runs_before_its_parents_and_none_is_left_over(conn, connect, seed):
    for n in range(3):
        register(conn, f"w{n}", {"t": {"max_retries": 0}})
    record_transitions(conn)
    conn.execute(EARLY)
    stress = Stress(connect, seed)
    stress.run(conn)
    assert stress.errors == []
    query = "select id::text, status::text, blocked_until from orchestrator.tasks where status not in ('completed', 'cancelled')"
    assert rows(conn, query) == [] and waits(conn) == [] and audit(conn) == []
    assert column(conn, "select child from public.early") == []
    assert value(conn, "select count(*) from orchestrator.tasks where after <> '{}' and status = 'completed'") > 20
    check_transitions(conn)


# Records each claim of a task that has just been blocked, or whose parents (not of on_failure run, which is not kept) have not completed.
EARLY = """
  create table public.early (child uuid, parent uuid);
  create function public.record_early() returns trigger language plpgsql as $$
  begin
    insert into public.early select w.child, w.parent from orchestrator.task_waits w where w.child = new.id;
    insert into public.early select new.id, p.id from unnest(new.after) a join orchestrator.tasks p on p.id = a
    where p.status not in ('completed', 'cancelled', 'dead_letter')
      and not exists (select from orchestrator.task_events e where e.task_id = p.id and e.event = 'retried');
    return null;
  end $$;
  create trigger record_early after update on orchestrator.tasks for each row
    when (old.status = 'pending' and new.status = 'claimed') execute function public.record_early();
"""


def model(parents, modes, dies):
    """How each task ends: parents has the earlier tasks that each waits for, modes its on_failure, dies whether it fails for good."""
    ends = []
    for n, names in enumerate(parents):
        above = [ends[p] for p in names]
        bad = {"wait": {"cancelled"}, "cancel": {"cancelled", "dead_letter"}, "run": set()}[modes[n]]
        held = {"wait": {"pending", "dead_letter"}, "cancel": {"pending"}, "run": {"pending"}}[modes[n]]
        if bad & set(above):
            ends.append("cancelled")
        elif held & set(above):
            ends.append("pending")
        else:
            ends.append("dead_letter" if dies[n] else "completed")
    return ends


@st.composite
def dags(draw):
    n = draw(st.integers(2, 12))
    parents = [sorted(draw(st.sets(st.integers(0, k - 1), max_size=3))) if k else [] for k in range(n)]
    return (parents, draw(st.lists(st.sampled_from(["wait", "cancel", "run"]), min_size=n, max_size=n)),
            draw(st.lists(st.sampled_from([False, False, False, True]), min_size=n, max_size=n)), draw(st.integers(0, 2**32)))


@settings(max_examples=40, deadline=None, database=None, derandomize=True, phases=(Phase.generate,),
          suppress_health_check=list(HealthCheck))
@given(dag=dags())
def test_any_dag_ends_as_the_model_says(conn, dag):
    parents, modes, dies, seed = dag
    conn.execute("truncate orchestrator.tasks, orchestrator.claims, orchestrator.task_waits, orchestrator.task_events")
    draw, ids = Random(seed), []
    with conn.transaction():
        for n, names in enumerate(parents):
            ids.append(enqueue(conn, after=[ids[p] for p in names], on_failure=modes[n]))
    while taken := claim(conn, limit=draw.randint(1, 3)):
        for t in draw.sample(taken, len(taken)):
            if dies[ids.index(t["id"])]:
                fail(conn, t["claim_id"], t["id"], permanent=True)
            else:
                complete(conn, t["claim_id"], t["id"])
    assert [status(conn, id) for id in ids] == model(parents, modes, dies)
    assert audit(conn) == []
    # and when all dead letters are retried and complete, nothing waits for ever
    while value(conn, "select orchestrator.retry_dead_letters()"):
        while taken := claim(conn, limit=100):
            complete(conn, taken[0]["claim_id"], *[t["id"] for t in taken])
    assert {status(conn, id) for id in ids} <= {"completed", "cancelled"} and waits(conn) == []
