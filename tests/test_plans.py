"""Plans that a session cached while tasks was empty must not scan it, or walk a whole index, once it is full."""
from __future__ import annotations

import psycopg
import pytest
from psycopg.types.json import Jsonb

from steps import lead, register, row, rows, value

FILLED = 100_000
READS = """
  select relname as name, seq_scan, seq_tup_read + coalesce(idx_tup_fetch, 0) as rows from pg_stat_xact_user_tables
  where schemaname = 'orchestrator' and relname in ('tasks', 'task_events', 'task_steps', 'task_waits', 'expiries') order by 1
"""
INDEX_ENTRIES = """
  select sum(pg_stat_get_xact_tuples_returned(indexrelid)) from pg_index where indrelid = 'orchestrator.tasks'::regclass
"""
# Every function that is called while the queue works, with what it is called with: the names are of the test below.
HOT = {
    "enqueue": "select orchestrator.enqueue('t')",
    "enqueue with a key": "select orchestrator.enqueue('t', p_idempotency_key => gen_random_uuid()::text)",
    "enqueue with a known key": "select orchestrator.enqueue('t', p_idempotency_key => '3')",
    "enqueue_many": "select count(*) from orchestrator.enqueue_many('t', '{1}')",
    "enqueue_many with keys": """select count(*) from orchestrator.enqueue_many('t', array_fill('1'::jsonb, array[3]),
                                   p_idempotency_keys => array['3', '6', gen_random_uuid()::text])""",
    "replace_task": "select * from orchestrator.replace_task('u', '4', '{}', now() + interval '1 hour', p_priority => 1)",
    "replace_task, appending": "select * from orchestrator.replace_task('u', '4', '{}', p_mode => 'append')",
    "replace_task of a new key": "select * from orchestrator.replace_task('u', gen_random_uuid()::text)",
    "wait_tasks": "select * from orchestrator.wait_tasks(array[%(id)s, %(waiting)s]::uuid[], '0')",
    "claim_tasks": "select count(*) from orchestrator.claim_tasks('w', '{t,u,v}', 20)",
    "start_tasks": "select orchestrator.start_tasks(%(claim)s, %(ids)s::uuid[])",
    "record_progress": "select orchestrator.record_progress(%(claim)s, %(id)s, '1')",
    "complete_tasks": "select count(*) from orchestrator.complete_tasks(array[%(claim)s::bigint], '{5}', %(ids)s::uuid[])",
    "complete_tasks with results": """select count(*) from orchestrator.complete_tasks(array[%(claim)s::bigint], '{5}',
                                        %(ids)s::uuid[], array_fill('1'::jsonb, array[5]))""",
    "claim_tasks by pattern": "select count(*) from orchestrator.claim_tasks('w', '{*}', 20)",
    "claim_tasks by bytes": "select count(*) from orchestrator.claim_tasks('w', '{t,u,v}', 20, 1000000)",
    "fail_tasks": """select count(*) from orchestrator.fail_tasks(array[%(claim)s::bigint], array[%(id)s::uuid], '{e}',
                       '{tb}', '{null}', '{f}')""",
    "release_tasks": "select orchestrator.release_tasks(%(claim)s, %(ids)s::uuid[])",
    "release_tasks of a whole claim": "select orchestrator.release_tasks(%(claim)s)",
    "snooze_task": "select orchestrator.snooze_task(%(claim)s, %(id)s, '1 hour')",
    "promote_due": "select * from orchestrator.promote_due(10)",
    "record_step": "select orchestrator.record_step(%(claim)s, %(id)s, 'a', '1')",
    "steps": "select orchestrator.steps(%(id)s)",
    "await_signal": "select orchestrator.await_signal(%(claim)s, %(id)s, 'go')",
    "signal_task": "select orchestrator.signal_task(%(waiting)s, 'go')",
    "note_lost_result": "select orchestrator.note_lost_result(%(id)s, 'no')",
    "pause_type": "select * from orchestrator.pause_type('*')",
    "cancel_task, waiting": "select orchestrator.cancel_task(%(waiting)s)",
    "cancel_task, in flight": "select orchestrator.cancel_task(%(id)s)",
    "retry_task": "select orchestrator.retry_task(%(dead)s)",
    "bulk_tasks, retry": """select orchestrator.bulk_tasks('retry', jsonb_build_object('ids', jsonb_build_array(%(dead)s::text)), false)""",
    "heartbeat": "select * from orchestrator.heartbeat('w')",
    "cancelling_tasks": "select * from orchestrator.cancelling_tasks('w')",
    "recover_orphans": "select * from orchestrator.recover_orphans('leader', %(term)s)",
    "raise_floors": "select orchestrator.raise_floors('leader', %(term)s, '0')",
    "rescan_lanes": "select orchestrator.rescan_lanes('leader', %(term)s)",
    "prune": "select * from orchestrator.prune('leader', %(term)s, '1 day', '1 day', 20)",
}
NOBODY = "00000000-0000-0000-0000-000000000000"
# Blocked tasks are found among the scheduled ones.
# Filters, and how many rows of tasks a preview of what they match may read: three times those in the state, or those that are named.
FILTERS = [
    ('{"status": "dead_letter"}', 6_100), ('{"status": "dead_letter", "error": "x"}', 6_100), ('{"status": "scheduled"}', 20_100),
    ('{"status": "retry_scheduled"}', 10_100), ('{"status": "parked"}', 0), ('{"status": "blocked", "type": "t*"}', 20_100),
    ('{"status": "in_flight"}', 0), ('{"status": "running", "payload": {"a": 1}}', 0), ('{"status": "ready", "type": "none"}', 0),
    ('{"status": "ready", "type": "none:*"}', 0), ('{"ids": ["%(waiting)s", "%(dead)s"]}', 10), ('{"id": "%(waiting)s"}', 10),
    ('{"created_after": "2090-01-01"}', 5_100), ('{"created_before": "2020-01-01", "status": "completed"}', 100)]   # of random ids


@pytest.fixture(scope="module")
def session(server, template):
    """A session that called every function on empty analyzed tables, long enough to keep its plans; then they were filled."""
    url = server.create_database(template=template.rsplit("/", 1)[1])
    with psycopg.connect(url, autocommit=True) as conn, psycopg.connect(url, autocommit=True) as other:
        conn.execute("alter table orchestrator.tasks set (autovacuum_enabled = off)")
        conn.execute("alter table orchestrator.task_events set (autovacuum_enabled = off)")
        conn.execute("alter table orchestrator.tasks drop constraint every_rule_holds")  # a minute for so many rows on a slow machine
        term = lead(conn)
        register(conn, "w", "tuv")
        conn.execute("analyze")
        nothing = {"claim": 0, "id": NOBODY, "ids": [NOBODY], "waiting": NOBODY, "dead": NOBODY, "term": term}
        for filter, _ in FILTERS:
            for _ in range(7):
                conn.execute("select orchestrator.bulk_tasks('purge', %s)", [filter % {"waiting": NOBODY, "dead": NOBODY}])
        for call in HOT.values():
            with conn.transaction(force_rollback=True):
                for _ in range(7):
                    conn.execute(call, nothing)
        other.execute("""
          insert into orchestrator.tasks (type, idempotency_key) select substr('tuv', n %% 3 + 1, 1), n::text from generate_series(1, %s) n
        """, [FILLED])
        other.execute("""
          insert into orchestrator.tasks (type, queued_at, next_retry_at) select 't', null, now() + interval '1 hour'
          from generate_series(1, 5000)""")
        other.execute("""
          with blocked as (
            insert into orchestrator.tasks (type, queued_at, next_retry_at, blocked_until, expires_at)
            select 't', null, now() + case when n > 5 then interval '1 hour' else '0' end, now(), now() + interval '1 hour'
            from generate_series(1, 5000) n returning id),
          noted as (insert into orchestrator.expiries select now() + case when n > 5 then interval '1 hour' else '0' end, id
                    from (select row_number() over () as n, id from blocked) b)
          insert into orchestrator.task_waits select p.id, b.id, 'wait' from blocked b
          cross join (select id from orchestrator.tasks where type = 'v' order by queued_at desc limit 3) p""")
        other.execute("""
          insert into orchestrator.tasks (type, status, queued_at, dead_at, attempts, claim_id)
          select 't', 'dead_letter', null, now(), 1, 1 from generate_series(1, 2000)""")
        other.execute("""
          insert into orchestrator.tasks (id, type, status, queued_at, completed_at, started_at, attempts, claim_id)
          select gen_random_uuid(), 't', 'completed', null, now(), now(), 1, 1 from generate_series(1, 5000)""")
        other.execute("insert into orchestrator.task_events (task_id, event) select id, 'failed' from orchestrator.tasks")
        other.execute("insert into orchestrator.task_steps (task_id, name, result, at) select id, 's', '1', now() from orchestrator.tasks")
        for type in "tuv":
            other.execute("select orchestrator.enqueue(%s)", [type])
        yield conn, term
    server.drop_database(url)


@pytest.mark.parametrize("name", HOT)
def test_no_hot_function_scans_tasks_by_a_plan_of_when_it_was_empty(session, name):
    conn, term = session
    with conn.transaction(force_rollback=True):
        claimed = conn.execute("select claim_id, id::text from orchestrator.claim_tasks('w', '{t}', 5)").fetchall()
        ids = [id for _, id in claimed]
        given = {"claim": claimed[0][0], "id": ids[0], "ids": ids, "term": term,
                 "waiting": value(conn, "select id from orchestrator.tasks where queued_at is not null limit 1"),
                 "dead": value(conn, "select id from orchestrator.tasks where dead_at is not null limit 1")}
        if name == "recover_orphans":
            conn.execute("update orchestrator.workers set declared_dead_at = now() where id = 'w'")
            conn.execute("select orchestrator.start_tasks(%s, %s::uuid[])", [given["claim"], ids[:2]])
        if name == "promote_due":
            conn.execute("select orchestrator.snooze_task(%s, %s, '0')", [given["claim"], ids[0]])
        before, entries = row_by_table(conn), value(conn, INDEX_ENTRIES)
        conn.execute(HOT[name], given)
        after, entries_after = row_by_table(conn), value(conn, INDEX_ENTRIES)
    for table, counted in after.items():
        assert counted["seq_scan"] == before[table]["seq_scan"], f"{name} scanned {table}"
        assert counted["rows"] - before[table]["rows"] < 500, f"{name} read many rows of {table}"
    assert entries_after - entries < 1000, f"{name} walked an index"


@pytest.mark.parametrize(("filter", "most"), FILTERS)
def test_a_filter_reads_along_an_index_what_it_may_match(session, filter, most):
    conn, _ = session
    ids = {"waiting": value(conn, "select id from orchestrator.tasks where queued_at is not null limit 1"),
           "dead": value(conn, "select id from orchestrator.tasks where dead_at is not null limit 1")}
    filter %= ids
    with conn.transaction(force_rollback=True):
        before = row_by_table(conn)["tasks"]
        conn.execute("select orchestrator.bulk_tasks('purge', %s)", [filter])
        after = row_by_table(conn)["tasks"]
    assert after["seq_scan"] == before["seq_scan"]
    assert after["rows"] - before["rows"] <= most


def row_by_table(conn):
    return {found.pop("name"): found for found in rows(conn, READS)}


def test_the_list_of_hot_functions_is_complete(conn):
    """Whatever else writes tasks must be added above, or be named here."""
    query = """select array_agg(proname order by proname) from pg_proc where pronamespace = 'orchestrator'::regnamespace
               and proname !~ '^_' and prosrc ~ '(update|into) orchestrator.tasks'"""
    listed = {name.split(" ")[0].rstrip(",") for name in HOT}
    assert set(value(conn, query)) <= listed


def test_a_claim_costs_the_same_however_many_tasks_of_paused_or_foreign_types_wait(conn):
    conn.execute("alter table orchestrator.tasks set (autovacuum_enabled = off)")
    register(conn)
    conn.execute("select orchestrator.pause_type('paused')")
    for type in ("paused", "foreign"):
        conn.execute("select count(*) from orchestrator.enqueue_many(%s, array_fill(%s::jsonb, array[20000]))", [type, Jsonb({})])
    conn.execute("select orchestrator.enqueue('t')")
    with conn.transaction():
        before = value(conn, INDEX_ENTRIES)
        assert len(conn.execute("select * from orchestrator.claim_tasks('w', '{t,paused}', 10)").fetchall()) == 1
        assert value(conn, INDEX_ENTRIES) - before < 20
    assert row(conn, "select open_tasks from orchestrator.claims") == {"open_tasks": 1}
