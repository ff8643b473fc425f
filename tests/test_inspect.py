"""sql/80_inspect.sql: views, show, explain, and what they must not show."""
from __future__ import annotations

import re

import pytest
from psycopg.types.json import Json, Jsonb

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
    assert found["t"] == {"waiting": 1, "parked": 0, "scheduled": 3, "blocked": 0, "in_flight": 2, "dead_letters": 1, "paused": False,
                          "per_second": None, "failure_share": None, "median": None, "p95": None}
    assert (found["other"]["waiting"], found["paused"]["paused"], found["paused"]["waiting"]) == (1, True, 0)


def test_queue_stats_shows_a_type_as_paused_by_a_pattern(conn):
    register(conn, "m", ("mail:",))
    id = enqueue(conn, "mail:new")
    conn.execute("insert into orchestrator.task_types (type, paused) values ('mail:*', true)")
    assert value(conn, "select paused from orchestrator.queue_stats where type = 'mail:new'")
    assert not value(conn, "select coalesce(bool_or(paused), false) from orchestrator.queue_stats where type <> 'mail:new'")
    assert explain(conn, id) == "mail:* is paused: select orchestrator.resume_type('mail:*')"


@pytest.mark.parametrize("view", ["pending_tasks", "running_tasks", "dead_letters", "queue_stats"])
def test_each_view_is_served_by_indexes(conn, view):
    """Of 20,000 tasks that have ended, none is read."""
    conn.execute("alter table orchestrator.tasks set (autovacuum_enabled = off)")
    conn.execute("alter table orchestrator.tasks drop constraint if exists every_rule_holds")   # it costs far more than the insert
    conn.execute("""
      insert into orchestrator.tasks (type, status, queued_at, claim_id, worker_id, claimed_at, started_at, attempts, completed_at)
      select 't', 'completed', null, 1, 'w', now(), now(), 1, now() - interval '2 hours' from generate_series(1, 20000)""")
    enqueue_some(conn, 3)
    claim(conn, limit=1)
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
    # whole words: what only resembles a secret's name stays
    *(({name: 12}, {name: 12}) for name in (
        "tokens_used", "max_tokens", "maxTokens", "secretary", "tokenizer", "token_count", "passwordless", "keyboard", "key", "monkey",
        "author", "authorized", "primary_key", "passenger", "compass", "secretType", "credentialed")),
    *(({name: "x"}, {name: "[redacted]"}) for name in (
        "token", "access_token", "accessToken", "apiKey", "API_KEY", "APIKey", "api_keys", "client-secret", "clientSecret", "db_password",
        "dbPassword", "PGPASSWORD", "passphrase", "Authorization", "Proxy-Authorization", "private_key", "privateKey", "credentials",
        "user.password", "authToken", "secrets", "pwd", "AWS_SECRET_ACCESS_KEY", "password hash")),
    ({"dsn": "postgres://u:s3cret@h/db?x=1"}, {"dsn": "postgres://u:[redacted]@h/db?x=1"}),
    ({"n": 9007199254740992, "m": 9007199254740993, "f": 0.5}, {"n": 9007199254740992, "m": "9007199254740993", "f": 0.5}),
])
def test_redact_blanks_secrets_at_any_depth_and_nothing_else(pure, given, shown):
    assert value(pure, "select orchestrator.redact(%s)", Jsonb(given)) == shown


@pytest.mark.parametrize(("given", "shown"), [
    ("could not connect to postgres://app:hunter2@db:5432/app", "could not connect to postgres://app:[redacted]@db:5432/app"),
    ("redis://:hunter2@cache and amqp://a:b@c@mq/", "redis://:[redacted]@cache and amqp://a:[redacted]@mq/"),
    ("host=db user=app password=hunter2 dbname=app", "host=db user=app password=[redacted] dbname=app"),
    ("GET /?api_key=abc&x=1 -> 403", "GET /?api_key=[redacted]&x=1 -> 403"),
    ("http://host:8080/users/a@example.com", "http://host:8080/users/a@example.com"),
    ("invalid token: unexpected end; mail a@b.c, see https://example.com", "invalid token: unexpected end; mail a@b.c, see https://example.com"),
    (None, None), ("", "")])
def test_redact_text_blanks_passwords_and_leaves_the_rest(pure, given, shown):
    assert value(pure, "select orchestrator.redact_text(%s)", given) == shown


def test_errors_are_shown_without_passwords_wherever_they_are_shown(conn):
    id = enqueue(conn)
    fail(conn, *claim_one(conn), error=f"no route to postgres://app:{SECRET}@db/app", permanent=True)
    for query in ("select last_error from orchestrator.dead_letters", f"select orchestrator.show_task('{id}')::text",
                  "select orchestrator.api_tasks(p_status => 'dead_letter')::text", "select orchestrator.api_failures()::text"):
        assert "postgres://app:[redacted]@db/app" in value(conn, query) and SECRET not in value(conn, query)
    enqueue(conn)
    fail(conn, *claim_one(conn), error=f"no route to postgres://app:{SECRET}@db/app", after="1 hour")
    assert "[redacted]" in value(conn, "select last_error from orchestrator.pending_tasks")


def test_a_row_that_cannot_be_shown_is_shown_as_such_and_harms_no_other(conn):
    sound = enqueue(conn, payload={"a": 1})
    nested = '{"a": ' * 2200 + "1" + "}" * 2200
    conn.execute("insert into orchestrator.tasks (type, payload) values ('t', %s::jsonb), ('t', %s::jsonb), ('t', %s::jsonb)",
                 [nested, '{"n": ' + "9" * 6000 + "}", '{"n": 1e100000}'])
    shown = column(conn, "select payload::text from orchestrator.pending_tasks")
    assert len(shown) == 4 and '{"a": 1}' in shown
    assert sum("[nested too deeply]" in text for text in shown) == 1
    assert sum("a number of 6000 digits" in text for text in shown) == sum("a number of 100001 digits" in text for text in shown) == 1
    for id in column(conn, "select id from orchestrator.tasks"):
        assert value(conn, "select orchestrator.show_task(%s)", id)["status"] == "pending"
    assert sound in [t["id"] for t in value(conn, "select orchestrator.api_tasks(p_status => 'ready')")["tasks"]]
    assert len(value(conn, "select orchestrator.api_tasks()")["tasks"]) == 4


def test_progress_is_shown_in_the_order_in_which_the_handler_gave_it(conn):
    id = enqueue(conn)
    claim_id, _ = claim_one(conn)
    start(conn, claim_id, id)
    progress = {"step": "loading", "page": 3, "of": 2000, "file": "customers.csv", "token": SECRET,
                "deep": {"password": SECRET}, "big": 2**60}
    conn.execute("select orchestrator.record_progress(%s, %s, %s)", [claim_id, id, Json(progress)])
    expected = [["step", "loading"], ["page", 3], ["of", 2000], ["file", "customers.csv"], ["token", "[redacted]"],
                ["deep", {"password": "[redacted]"}], ["big", str(2**60)]]
    assert value(conn, "select orchestrator.show_task(%s)", id)["progress"] == expected
    assert value(conn, "select orchestrator.api_tasks(p_status => 'running')")["tasks"][0]["progress"] == expected
    conn.execute("select orchestrator.record_progress(%s, %s, %s)", [claim_id, id, Json("half")])
    assert value(conn, "select orchestrator.show_task(%s)", id)["progress"] == "half"


@pytest.mark.parametrize(("payload", "preview"), [
    ({}, None), ({"to": "x", "token": SECRET}, '{"to": "x", "token": "[redacted]"}'), ({"a": "b" * 300}, '{"a": "' + "b" * 193)])
def test_lists_show_the_beginning_of_each_payload(conn, payload, preview):
    enqueue(conn, payload=payload)
    assert value(conn, "select orchestrator.api_tasks()")["tasks"][0]["payload"] == preview


def test_lists_show_only_the_size_of_a_large_payload(conn):
    enqueue(conn, payload={"a": "b" * 200_000})
    assert re.fullmatch(r"\[\d+ (bytes|kB) stored\]", value(conn, "select orchestrator.api_tasks()")["tasks"][0]["payload"])


def test_get_gives_the_program_its_task_with_nothing_blanked(conn):
    payload = {"tokens_used": 12, "password": SECRET, "n": 2**60}
    id = enqueue(conn, payload=payload)
    claim_id, _ = claim_one(conn)
    fail(conn, claim_id, id, f"https://a:{SECRET}@b", permanent=True)
    task = value(conn, "select orchestrator.get_task(%s)", id)
    assert task["payload"] == payload and task["claim_id"] == claim_id and task["status"] == "dead_letter" and task["max_retries"] is None
    assert task["last_error"] == task["events"][0]["detail"] == f"https://a:{SECRET}@b"
    assert [e["event"] for e in task["events"]] == ["failed", "dead_letter"]
    assert value(conn, "select orchestrator.get_task(%s)", "00000000-0000-7000-8000-000000000000") is None


def test_claim_ids_beyond_what_a_browser_counts_are_shown_as_text(conn):
    id = enqueue(conn)
    claim_one(conn)
    conn.execute("update orchestrator.tasks set claim_id = 9223372036854775806")
    assert value(conn, "select orchestrator.show_task(%s)", id)["claim_id"] == "9223372036854775806"


def explain(conn, id):
    return value(conn, "select orchestrator.explain_task(%s)", id)


def test_explain_gives_the_reason_for_each_state(conn, busy):
    id = busy["dead_letter"]
    assert f"select orchestrator.retry_task('{id}')" in explain(conn, id) and "after 1 attempt at" in explain(conn, id)
    assert explain(conn, busy["completed"]).startswith("completed at ")
    assert explain(conn, busy["cancelled"]).startswith("cancelled at ")
    assert explain(conn, busy["running"]).startswith("running by worker w since ") and "last heartbeat" in explain(conn, busy["running"])
    assert "a retry of attempt 1" in explain(conn, busy["retry_scheduled"])
    assert explain(conn, busy["delayed"]).startswith("not before ") and "scheduled" in explain(conn, busy["delayed"])
    assert explain(conn, busy["pending"]) == "ready; 0 of the same type and priority are before it, for 1 live worker"
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
