"""Installing the schema: again, at once, by psql, over a newer one, during traffic, by a plain role."""
from __future__ import annotations

import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from postgres import SQL_FILES, install_schema
from steps import audit, claim, claim_one, column, complete, enqueue, events, fail, lead, promote, register, release, rows, status, value

OBJECTS = """
  select pg_describe_object('pg_proc'::regclass, oid, 0), pg_get_functiondef(oid) from pg_proc
  where pronamespace = 'orchestrator'::regnamespace and prokind = 'f'
  union all
  select pg_describe_object('pg_class'::regclass, oid, 0), reloptions::text from pg_class
  where relnamespace = 'orchestrator'::regnamespace
  union all
  select conname, pg_get_constraintdef(oid) from pg_constraint where connamespace = 'orchestrator'::regnamespace
  order by 1, 2
"""


def test_install_again_changes_nothing_and_keeps_the_rows(installed, conn):
    register(conn)
    waiting, running = enqueue(conn, priority=1), enqueue(conn, priority=2)
    [claimed] = claim(conn, limit=1)
    before = rows(conn, OBJECTS)
    install_schema(installed)
    assert rows(conn, OBJECTS) == before
    assert complete(conn, claimed["claim_id"], running) == {}
    assert (status(conn, waiting), status(conn, running)) == ("pending", "completed")


def test_install_16_times_at_once_succeeds_each_time(db):
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda _: install_schema(db), range(16)))
    with psycopg.connect(db, autocommit=True) as conn:
        assert value(conn, "select count(*) from orchestrator.leader_state") == 1
        assert enqueue(conn)


@pytest.mark.parametrize("how", ["one transaction", "a transaction for each statement"])
def test_psql_loads_the_files_in_the_order_of_their_names(server, db, how):
    options = ["-1"] if how == "one transaction" else []
    files = [part for file in SQL_FILES for part in ("-f", str(file))]
    done = subprocess.run([server.bin / "psql", db, "-qX", "-v", "ON_ERROR_STOP=1", *options, *files], check=False,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with psycopg.connect(db, autocommit=True) as conn:
        assert value(conn, "select orchestrator.schema_version()") == 1
        assert enqueue(conn)


def test_install_refuses_a_newer_schema_and_leaves_it(installed, conn):
    conn.execute("create or replace function orchestrator.schema_version() returns int language sql as 'select 2'")
    before = rows(conn, OBJECTS)
    with pytest.raises(psycopg.Error, match="version 2, newer than these files") as refused:
        install_schema(installed)
    assert refused.value.sqlstate == "OR004"
    assert rows(conn, OBJECTS) == before


def test_install_that_fails_leaves_nothing(db):
    with pytest.raises(ZeroDivisionError), psycopg.connect(db) as conn:
        for file in SQL_FILES:
            conn.execute(file.read_text().encode())
        raise ZeroDivisionError
    with psycopg.connect(db) as conn:
        assert value(conn, "select to_regnamespace('orchestrator')") is None


def test_install_during_traffic_stops_none_of_it(installed, connect):
    done = threading.Event()
    counts = []

    def work(worker: str) -> None:
        conn = connect()
        register(conn, worker, ["t", "u"])
        ended = 0
        while not done.is_set() or not ended:
            enqueue(conn, "tu"[ended % 2])
            for task in claim(conn, worker, ["t", "u"]):
                assert complete(conn, task["claim_id"], str(task["id"])) == {}
                ended += 1
            conn.execute("select orchestrator.heartbeat(%s)", [worker])
        counts.append(ended)

    with ThreadPoolExecutor(2) as pool:
        working = [pool.submit(work, name) for name in ("v", "w")]
        try:
            for _ in range(5):
                install_schema(installed)
        finally:
            done.set()
        for future in working:
            future.result()
    assert len(counts) == 2 and min(counts) > 0
    assert audit(connect()) == []


def test_install_again_waits_for_no_writer_and_keeps_none_out(installed, conn, connect):
    """Or it would be a deadlock with whoever writes to two tables: an open transaction has written to all."""
    indexes = "select indexrelid::regclass::text from pg_index where starts_with(indrelid::regclass::text, 'orchestrator.') order by 1"
    before = column(conn, indexes)
    names = column(conn, "select oid::regclass::text from pg_class where relnamespace = 'orchestrator'::regnamespace and relkind = 'r'")
    writer = connect(autocommit=False)
    for name in names:
        writer.execute(f"lock table {name} in row exclusive mode")
    with connect(autocommit=False, options="-c lock_timeout=3s") as installing:
        for file in SQL_FILES:
            installing.execute(file.read_text().encode())
        for name in names:
            writer.execute(f"set local lock_timeout = '3s'; lock table {name} in row exclusive mode; delete from {name}")
        installing.commit()
    writer.rollback()
    assert column(conn, indexes) == before and len(before) > 13


def test_a_role_without_privileges_installs_and_works_in_its_own_schema(server, db):
    role = f"plain_{db.rsplit('_', 1)[1]}"
    with psycopg.connect(db, autocommit=True) as conn:
        conn.execute(f"create role {role}")
        conn.execute(f"grant create on database {conn.info.dbname} to {role}")
        try:
            conn.execute(f"set role {role}")
            for file in SQL_FILES:
                conn.execute(file.read_text().encode())
            register(conn)
            id = enqueue(conn)
            [claimed] = claim(conn)
            assert complete(conn, claimed["claim_id"], id) == {}
            assert column(conn, "select distinct tableowner from pg_tables where schemaname = 'orchestrator'") == [role]
        finally:
            conn.execute("reset role")
            conn.execute(f"drop owned by {role}")
            conn.execute(f"drop role {role}")


def test_install_sets_sequences_and_single_rows_right_after_a_restore_of_data_alone(installed, conn):
    register(conn)
    term = lead(conn)
    id = enqueue(conn)
    fail(conn, claim_one(conn)[0], id, after="0")
    conn.execute("alter sequence orchestrator.task_events_id_seq restart; alter sequence orchestrator.leader_terms restart")
    conn.execute("delete from orchestrator.leader_state; delete from orchestrator.stats_state")
    install_schema(installed)
    promote(conn)
    fail(conn, claim_one(conn)[0], id, after="0")
    assert events(conn, id) == ["failed", "retry_scheduled"] * 2
    conn.execute("select orchestrator.resign_leadership('leader', %s)", [term])
    assert value(conn, "select term from orchestrator.acquire_leadership('leader', '1 min')") > term
    assert value(conn, "select count(*) from orchestrator.leader_state") == value(conn,
    "select count(*) from orchestrator.stats_state") == 1


def test_install_leaves_sequences_that_are_ahead(installed, conn):
    before = value(conn, "select nextval('orchestrator.task_events_id_seq')")
    install_schema(installed)
    assert value(conn, "select nextval('orchestrator.task_events_id_seq')") == before + 1


# A function in public for each built-in one, that is found first, and some whose arguments fit better.
HOSTILE = """
  do $do$
  declare r record;
  begin
    for r in
      select distinct on (p.proname, p.pronargs) p.proname, pg_get_function_identity_arguments(p.oid) as arguments
      from pg_proc p join pg_namespace n on n.oid = p.pronamespace
      where n.nspname = 'pg_catalog' and p.prokind = 'f' and p.proname in (
        'num_nonnulls', 'num_nulls', 'octet_length', 'isfinite', 'unnest', 'jsonb_typeof', 'jsonb_each', 'left', 'right', 'lower', 'now',
        'clock_timestamp', 'random', 'floor', 'replace', 'rtrim', 'lpad', 'starts_with', 'pg_notify', 'uuidv7', 'gen_random_uuid', 'to_hex')
    loop
      begin
        execute format('create function public.%I(%s) returns int language plpgsql as %L', r.proname, r.arguments,
                       'begin raise exception $$hostile function$$; end');
      exception when others then null;
      end;
    end loop;
    create function public.num_nonnulls(timestamptz, timestamptz, timestamptz, timestamptz) returns int language plpgsql as
      'begin raise exception $$hostile function$$; end';
    create function public.unnest(uuid[]) returns setof uuid language plpgsql as 'begin raise exception $$hostile function$$; end';
  end $do$;
"""


def test_hostile_functions_in_public_are_neither_installed_nor_called(db):
    with psycopg.connect(db, autocommit=True) as conn:
        name = conn.info.dbname
        conn.execute(HOSTILE)
        assert value(conn, "select count(*) from pg_proc where pronamespace = 'public'::regnamespace") > 20
        conn.execute(f"alter database {name} set search_path = public, pg_catalog")
    install_schema(db)
    with psycopg.connect(db, autocommit=True) as conn:
        conn.execute("create temp table tasks (id int); create temp table jsonb (id int); create temp table workers (id int)")
        register(conn, handlers=["t", "a:"])
        id = enqueue(conn)
        assert value(conn, "select count(*) from orchestrator.enqueue_many('a:1', '{1,2}')") == 2
        claimed = claim(conn, types=["t", "*"])
        assert len(claimed) == 3
        assert complete(conn, claimed[0]["claim_id"], id) == {} and release(conn, claimed[0]["claim_id"]) == 2
        assert fail(conn, *claim_one(conn, types=["a:"])) == "retry_scheduled"
        assert audit(conn) == []
