"""sql/45_after.sql: tasks that wait for others."""
from __future__ import annotations

import psycopg
import pytest

from steps import audit, cancel, claim, claim_one, column, complete, enqueue, fail, register, row, rows, status, task, value


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
    ("null", "wait", "there is no task null"), ("cancelled", "wait", "task .* is cancelled"), ("cancelled", "cancel", "task .* is cancelled"),
    ("dead_letter", "cancel", "task .* is a dead letter")])
def test_a_parent_that_can_not_be_waited_for_is_refused(conn, call, end, on_failure, problem):
    parent, good = ended(conn, end), enqueue(conn)
    before = value(conn, "select count(*) from orchestrator.tasks")
    with pytest.raises(psycopg.DatabaseError, match=rf"^after\[2\]: {problem}") as error:
        conn.execute(ENQUEUED[call], [[good, parent], on_failure])
    assert error.value.sqlstate == "OR001"
    assert value(conn, "select count(*) from orchestrator.tasks") == before and waits(conn) == []


@pytest.mark.parametrize("call", ENQUEUED)
@pytest.mark.parametrize(("end", "on_failure", "waited"), [("dead_letter", "wait", 2), ("dead_letter", "run", 1), ("cancelled", "run", 1)])
def test_what_has_ended_is_waited_for_only_if_it_may_still_complete(conn, call, end, on_failure, waited):
    parent, good = ended(conn, end), enqueue(conn)
    conn.execute(ENQUEUED[call], [[good, parent], on_failure])
    assert {w["parent"] for w in waits(conn)} == {good, parent} if waited == 2 else {good}
    assert value(conn, "select count(*) from orchestrator.tasks where blocked_until is not null") == {"enqueue": 1, "enqueue_many": 2}[call]


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
