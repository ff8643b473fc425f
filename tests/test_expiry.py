"""Expiry: tasks that never start after their time. sql/45_after.sql, and the filters of the claims."""
from __future__ import annotations

from datetime import UTC, datetime, timedelta

import psycopg
import pytest

from steps import (
    audit,
    claim,
    claim_one,
    column,
    complete,
    enqueue,
    events,
    fail,
    register,
    release,
    retry,
    row,
    rows,
    status,
    task,
    value,
)


@pytest.fixture(autouse=True)
def worker(conn):
    register(conn)


def soon():
    return datetime.now(UTC) + timedelta(hours=1)


def expire(conn, *ids):
    """The time of these is up."""
    conn.execute("update orchestrator.tasks set expires_at = clock_timestamp() "
                 "where id = any (%s::uuid[]) and expires_at is not null", [list(ids)])
    conn.execute("update orchestrator.expiries set at = clock_timestamp() where task_id = any (%s::uuid[])", [list(ids)])


def sweep(conn, limit=1000):
    return row(conn, "select expired, next_in from orchestrator.promote_due(%s)", limit)


@pytest.mark.parametrize("limited", [False, True])
def test_what_has_expired_is_never_claimed(conn, limited):
    if limited:
        conn.execute("select orchestrator.limit_type('t', p_max_running => 10)")
    ids = [enqueue(conn, expires_at=soon()) for _ in range(3)]
    expire(conn, ids[0], ids[2])
    assert [t["id"] for t in claim(conn)] == [ids[1]]
    assert status(conn, ids[0]) == "pending"   # until it is swept


def test_what_was_claimed_no_longer_expires(conn):
    id = enqueue(conn, expires_at=soon(), max_retries=3)
    claim_id, _ = claim_one(conn)
    assert task(conn, id)["expires_at"] is None
    expire(conn, id)
    assert sweep(conn)["expired"] == {} and status(conn, id) == "claimed"
    assert column(conn, "select task_id from orchestrator.expiries") == []
    fail(conn, claim_id, id, after="0")
    sweep(conn)
    claim_id, _ = claim_one(conn)
    release(conn, claim_id, id)
    assert [t["id"] for t in claim(conn)] == [id]
    complete(conn, task(conn, id)["claim_id"], id)
    assert audit(conn) == []


def test_a_claimed_task_under_a_limit_no_longer_expires(conn):
    conn.execute("select orchestrator.limit_type('t', p_max_running => 10)")
    id = enqueue(conn, expires_at=soon())
    claim_one(conn)
    assert task(conn, id)["expires_at"] is None and audit(conn) == []


def waiting(conn, form):
    """A task that waits in this form, and expires."""
    if form == "ready":
        return enqueue(conn, expires_at=soon())
    if form == "delayed":
        return enqueue(conn, expires_at=soon(), run_at=datetime.now(UTC) + timedelta(minutes=1))
    if form == "blocked":
        return enqueue(conn, expires_at=soon(), after=[enqueue(conn, "other")])
    conn.execute("select orchestrator.limit_type('t', p_max_per_key => 1)")
    enqueue(conn, concurrency_key="k")
    id = enqueue(conn, concurrency_key="k", expires_at=soon())
    claim(conn)
    claim(conn)
    assert task(conn, id)["parked_at"] is not None
    return id


@pytest.mark.parametrize("form", ["ready", "delayed", "blocked", "parked"])
def test_each_waiting_form_is_swept(conn, form):
    id = waiting(conn, form)
    next_in = sweep(conn)["next_in"]
    assert status(conn, id) == "pending" and next_in <= 3600
    expire(conn, id)
    assert sweep(conn)["expired"] == {"t": 1}
    found = task(conn, id)
    assert (found["status"], events(conn, id)) == ("cancelled", ["expired"])
    assert [found[name] for name in ("queued_at", "next_retry_at", "parked_at", "parked_by", "blocked_until", "expires_at")] == [None] * 6
    assert value(conn, "select count(*) from orchestrator.expiries") == value(conn, "select count(*) from orchestrator.task_waits") == 0
    assert audit(conn) == []


def test_a_retry_of_an_expired_task_does_not_expire(conn):
    id = enqueue(conn, expires_at=soon())
    expire(conn, id)
    sweep(conn)
    assert retry(conn, id) == "pending" and sweep(conn)["expired"] == {}
    assert [t["id"] for t in claim(conn)] == [id] and audit(conn) == []


def test_what_waits_for_an_expired_task_goes_its_way(conn):
    id = enqueue(conn, expires_at=soon())
    child = enqueue(conn, after=[id])
    grandchild, cleanup = enqueue(conn, after=[child]), enqueue(conn, after=[child], on_failure="run")
    expire(conn, id)
    assert sweep(conn)["expired"] == {"t": 1}
    assert [status(conn, i) for i in (id, child, grandchild, cleanup)] == ["cancelled"] * 3 + ["pending"]
    assert [t["id"] for t in claim(conn)] == [cleanup]


def test_a_sweep_is_bounded_and_comes_again_at_once_while_there_is_more(conn):
    query = "select id::text from orchestrator.enqueue_many('t', array_fill('{}'::jsonb, array[25]), p_expires_at => %s)"
    ids = column(conn, query, soon())
    expire(conn, *ids)
    first = sweep(conn, 10)
    assert first["expired"] == {"t": 10} and first["next_in"] <= 0
    assert sweep(conn, 10)["expired"] == {"t": 10} and sweep(conn, 10) == {"expired": {"t": 5}, "next_in": None}


def test_what_another_transaction_has_locked_is_swept_later(conn, connect):
    id = enqueue(conn, expires_at=soon())
    expire(conn, id)
    other = connect(autocommit=False)
    other.execute("select from orchestrator.tasks where id = %s for update", [id])
    conn.execute("set statement_timeout = '5s'")
    found = sweep(conn)
    assert found["expired"] == {} and 0 < found["next_in"] <= 1
    other.rollback()
    expire(conn, id)
    assert sweep(conn)["expired"] == {"t": 1}


def test_a_later_expiry_counts(conn):
    id = enqueue(conn, expires_at=soon())
    conn.execute("update orchestrator.expiries set at = clock_timestamp()")
    assert sweep(conn)["expired"] == {}
    assert value(conn, "select at from orchestrator.expiries") == task(conn, id)["expires_at"] and audit(conn) == []


def test_two_workers_sweep_each_task_once(conn, connect):
    ids = [enqueue(conn, expires_at=soon()) for _ in range(10)]
    expire(conn, *ids)
    other = connect(autocommit=False)
    assert sweep(other, 5)["expired"] == {"t": 5}
    assert sweep(conn)["expired"] == {"t": 5}
    other.commit()
    assert {tuple(events(conn, id)) for id in ids} == {("expired",)}


@pytest.mark.parametrize("call", ["enqueue('t', '{}', p_expires_at => %s)", "enqueue_many('t', '{1}', p_expires_at => %s)"])
@pytest.mark.parametrize("at", ["2020-01-01", "infinity", "-infinity", "2126-01-01"])
def test_an_impossible_moment_is_refused(conn, call, at):
    with pytest.raises(psycopg.DatabaseError, match="^expires_at: must be a moment to come") as error:
        conn.execute(f"select orchestrator.{call}", [at])
    assert error.value.sqlstate == "OR001"


def test_a_task_that_would_expire_before_its_time_is_refused(conn):
    with pytest.raises(psycopg.DatabaseError, match="^expires_at: .* after run_at"):
        enqueue(conn, run_at=soon() + timedelta(hours=1), expires_at=soon())


def test_lines_may_expire_and_wait(conn):
    parent = enqueue(conn)
    lines = [f'{{"type": "t", "after": ["{parent}"], "on_failure": "run", "expires_at": "2030-01-01T00:00:00Z"}}',
             '{"type": "t", "after": "x"}', '{"type": "t", "after": ["01890000-0000-7000-8000-000000000000"]}',
             '{"type": "t", "expires_at": "2020-01-01T00:00:00Z"}', '{"type": "t", "on_failure": "ignore", "after": []}',
             '{"type": "t", "expires_at": "2030-13-01T00:00:00Z"}']
    got = rows(conn, "select line, id, problem from orchestrator.enqueue_lines(%s) order by line", lines)
    made = task(conn, got[0]["id"])
    assert [str(a) for a in made["after"]] == [parent] and made["expires_at"].year == 2030
    assert value(conn, "select on_failure from orchestrator.task_waits") == "run"
    assert [r["problem"][:30] for r in got[1:]] == [
        "after: must be a list of ids o", "after[1]: there is no task 018", "expires_at: must be a moment t",
        "after: must be a list of ids o", "expires_at: date/time field va"]
