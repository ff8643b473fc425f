"""sql/80_inspect.sql: views, show, list, explain, and what they must not show."""
from __future__ import annotations

import psycopg
import pytest
from psycopg.types.json import Jsonb

from steps import (
    cancel,
    claim,
    claim_one,
    column,
    complete,
    declare_dead,
    enqueue,
    enqueue_some,
    fail,
    register,
    row,
    rows,
    snooze,
    start,
    value,
)

SECRET = "canary-7d1e"


@pytest.fixture
def conn(conn):
    register(conn)
    return conn


@pytest.fixture
def busy(conn):
    """One task in each state, by the name of the state."""
    ids = {}
    for state in ("completed", "dead_letter", "retry_scheduled", "snoozed", "running", "claimed"):
        ids[state] = enqueue(conn, payload={"password": SECRET, "database": "app"})
        claim_id, id = claim_one(conn)
        if state == "completed":
            complete(conn, claim_id, id)
        elif state in ("dead_letter", "retry_scheduled"):
            fail(conn, claim_id, id, "broken", permanent=state == "dead_letter")
        elif state == "snoozed":
            snooze(conn, claim_id, id)
        elif state == "running":
            start(conn, claim_id, id)
    ids["pending"] = enqueue(conn, payload={"password": SECRET})
    ids["delayed"] = enqueue(conn, run_at="2030-01-01")
    ids["cancelled"] = enqueue(conn)
    cancel(conn, ids["cancelled"])
    return ids


def ids_in(conn, view):
    return set(column(conn, f"select id::text from orchestrator.{view}"))


def test_each_view_shows_its_tasks_and_no_secret(conn, busy):
    assert ids_in(conn, "pending_tasks") == {busy[s] for s in ("pending", "delayed", "snoozed", "retry_scheduled")}
    assert ids_in(conn, "running_tasks") == {busy["claimed"], busy["running"]}
    assert ids_in(conn, "dead_letters") == {busy["dead_letter"]}
    for view in ("pending_tasks", "running_tasks", "dead_letters"):
        shown = "\n".join(column(conn, f"select v::text from orchestrator.{view} v"))
        assert SECRET not in shown and "redacted" in shown
    found = row(conn, "select * from orchestrator.dead_letters")
    assert (found["last_error"], found["attempts"], found["payload"]) == ("broken", 1, {"password": "[redacted]", "database": "app"})


def test_queue_stats_counts_each_type(conn, busy):
    enqueue(conn, "other")
    conn.execute("select orchestrator.pause_type('paused')")
    conn.execute("update orchestrator.tasks set queued_at = queued_at - interval '5 minutes' where queued_at is not null and type = 't'")
    found = {r.pop("type"): r for r in rows(conn, "select * from orchestrator.queue_stats")}
    assert found.keys() == {"t", "other", "paused"}
    age = found["t"].pop("oldest_waiting_age").total_seconds()
    assert 300 <= age < 310
    assert found["t"] == {"waiting": 1, "scheduled": 3, "in_flight": 2, "ended_last_hour": 2, "dead_letters": 1, "paused": False}
    assert (found["other"]["waiting"], found["paused"]["paused"], found["paused"]["waiting"]) == (1, True, 0)


def test_queue_stats_does_not_count_what_ended_over_an_hour_ago(conn, busy):
    conn.execute("update orchestrator.tasks set completed_at = now() - interval '61 minutes' where status = 'completed'")
    assert value(conn, "select ended_last_hour from orchestrator.queue_stats where type = 't'") == 1


@pytest.mark.parametrize("view", ["pending_tasks", "running_tasks", "dead_letters", "queue_stats"])
def test_each_view_is_served_by_indexes(conn, view):
    """Of 20,000 tasks that have ended, none is read."""
    conn.execute("alter table orchestrator.tasks set (autovacuum_enabled = off)")
    conn.execute("""
      insert into orchestrator.tasks (type, status, queued_at, claim_id, worker_id, claimed_at, started_at, attempts, completed_at)
      select 't', 'completed', null, 1, 'w', now(), now(), 1, now() - interval '2 hours' from generate_series(1, 20000)""")
    enqueue_some(conn, 3)
    conn.execute("select setval('orchestrator.claims_id_seq', 10)")
    claim(conn, limit=1)
    conn.execute("""update orchestrator.maintenance set claim_marks = jsonb_build_array(
                    jsonb_build_object('at', extract(epoch from now()) - 3660, 'claim', 10))""")
    conn.execute("analyze orchestrator.tasks, orchestrator.claims")
    counters = """select seq_scan, coalesce(idx_tup_fetch, 0) + seq_tup_read as fetched from pg_stat_xact_user_tables
                  where relid = 'orchestrator.tasks'::regclass"""
    with conn.transaction():
        before = row(conn, counters)
        conn.execute(f"select * from orchestrator.{view}")
        after = row(conn, counters)
    assert after["seq_scan"] == before["seq_scan"] and after["fetched"] - before["fetched"] < 50


@pytest.mark.parametrize(("given", "shown"), [
    ({"password": "x"}, {"password": "[redacted]"}),
    ({"DB_PASSWORD": "x", "ApiKey": 1, "x-api-key": 2}, dict.fromkeys(("DB_PASSWORD", "ApiKey", "x-api-key"), "[redacted]")),
    ({"a": [{"secret": {"deep": 1}}, {"b": {"token": [1, 2]}}]}, {"a": [{"secret": "[redacted]"}, {"b": {"token": "[redacted]"}}]}),
    ({"password_env": "PGPASS", "password_file": "/run/secret"}, {"password_env": "PGPASS", "password_file": "/run/secret"}),
    ({"password": None, "user": "u"}, {"password": None, "user": "u"}),
    ([1, "two", None, []], [1, "two", None, []]),
    ("password", "password"), (3, 3), ({}, {}), (None, None),
])
def test_redact_blanks_secrets_at_any_depth_and_nothing_else(pure, given, shown):
    assert value(pure, "select orchestrator.redact(%s)", Jsonb(given)) == shown


def explain(conn, id):
    return value(conn, "select orchestrator.explain_task(%s)", id)


def test_explain_gives_the_reason_for_each_state(conn, busy):
    id = busy["dead_letter"]
    assert f"select orchestrator.retry_task('{id}')" in explain(conn, id) and "after 1 attempts" in explain(conn, id)
    assert explain(conn, busy["completed"]).startswith("completed at ")
    assert explain(conn, busy["cancelled"]).startswith("cancelled at ")
    assert explain(conn, busy["running"]).startswith("running by worker w since ") and "last heartbeat" in explain(conn, busy["running"])
    assert "a retry of attempt 1" in explain(conn, busy["retry_scheduled"])
    assert explain(conn, busy["delayed"]).startswith("not before ") and "scheduled" in explain(conn, busy["delayed"])
    assert explain(conn, busy["pending"]) == "ready; 0 of the same type and priority are before it, for 1 live workers"
    assert explain(conn, "00000000-0000-7000-8000-000000000000").startswith("no task has this id")


def test_explain_says_when_nobody_handles_the_type_or_it_is_paused(conn):
    assert "no live worker handles foreign" in explain(conn, enqueue(conn, "foreign"))
    id = enqueue(conn)
    conn.execute("select orchestrator.pause_type('t')")
    assert "select orchestrator.resume_type('t')" in explain(conn, id)
    declare_dead(conn, "w")
    assert "no live worker handles t" in explain(conn, id)


def test_explain_says_that_a_task_in_flight_was_asked_to_stop_or_has_lost_its_worker(conn):
    id = enqueue(conn)
    claim_one(conn)
    cancel(conn, id)
    assert "asked to stop at" in explain(conn, id)
    conn.execute("delete from orchestrator.workers")
    assert "which is gone: the leader will recover it" in explain(conn, id)


def test_show_tells_the_whole_story_without_secrets(conn, busy):
    shown = value(conn, "select orchestrator.show_task(%s)", busy["dead_letter"])
    assert [e["event"] for e in shown["events"]] == ["failed", "dead_letter"]
    assert shown["events"][0]["detail"] == "broken" and shown["max_retries"] == 3 and shown["explanation"].startswith("gave up")
    assert SECRET not in str(shown)
    assert value(conn, "select orchestrator.show_task(%s)", "00000000-0000-7000-8000-000000000000") is None


def listed(conn, *given):
    return column(conn, f"select t ->> 'id' from orchestrator.list_tasks({', '.join(['%s'] * len(given))}) t", *given)


def test_list_shows_the_newest_first_by_status_and_type_a_page_at_a_time(conn):
    ids = enqueue_some(conn, 5)
    other = enqueue(conn, "other")
    cancel(conn, ids[1])
    assert listed(conn) == [other, *reversed(ids)]
    assert listed(conn, "cancelled") == [ids[1]] and listed(conn, None, "other") == [other]
    assert listed(conn, None, None, 2) == [other, ids[4]]
    assert listed(conn, None, None, 2, ids[4]) == [ids[3], ids[2]]
    assert listed(conn, "pending", "t", 50, ids[3]) == [ids[2], ids[0]]


def test_list_refuses_a_status_that_does_not_exist(conn):
    with pytest.raises(psycopg.Error, match="status: must be one of pending, claimed") as refused:
        listed(conn, "done")
    assert refused.value.sqlstate == "OR001"
