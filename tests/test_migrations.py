"""Upgrading in place: migration + files = fresh install, old workers go on meanwhile, a newer schema is refused.

There is one release so far. So the test makes the next two out of a copy of this one: version 2 adds a column, a table and a
parameter with a default; version 3 adds an index. What is proved is the mechanism that a real migration will use.
"""
from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest

import orchestrator
from conftest import PROGRAM, REPOSITORY, clean_environment
from postgres import eventually, install_schema
from steps import audit, column, enqueue, register, rows, value

NOW = orchestrator.SCHEMA_VERSION
NEXT, LAST = NOW + 1, NOW + 2
CATALOG = """
  select 'table' as kind, c.relname::text as name, pg_get_userbyid(c.relowner) || ' ' || coalesce(c.reloptions::text, '') || ' '
         || coalesce((select string_agg(a::text, ',' order by a::text) from unnest(c.relacl) a), '') as is
  from pg_class c where relnamespace = 'orchestrator'::regnamespace
  union all select 'column', format('%s.%s', attrelid::regclass, attnum),
         format('%s %s %s %s %s', attname, format_type(atttypid, atttypmod), attnotnull, pg_get_expr(adbin, adrelid), attacl)
  from pg_attribute a left join pg_attrdef d on adrelid = attrelid and adnum = attnum
  where attnum > 0 and attrelid in (select oid from pg_class where relnamespace = 'orchestrator'::regnamespace and relkind in ('r', 'v'))
  union all select 'function', oid::regprocedure::text,
         pg_get_functiondef(oid) || coalesce((select string_agg(a::text, ',' order by a::text) from unnest(proacl) a), '')
  from pg_proc where pronamespace = 'orchestrator'::regnamespace
  union all select 'constraint', conname::text, pg_get_constraintdef(oid) from pg_constraint
  where connamespace = 'orchestrator'::regnamespace and conname <> 'every_rule_holds'   -- the tests' own
  union all select 'index', indexrelid::regclass::text, pg_get_indexdef(indexrelid)
  from pg_index where indrelid in (select oid from pg_class where relnamespace = 'orchestrator'::regnamespace)
  union all select 'view', oid::regclass::text, pg_get_viewdef(oid) from pg_class
  where relnamespace = 'orchestrator'::regnamespace and relkind = 'v'
  union all select 'comment', pg_describe_object(classoid, objoid, objsubid), description from pg_description
  where objoid in (select oid from pg_class where relnamespace = 'orchestrator'::regnamespace
                   union all select oid from pg_proc where pronamespace = 'orchestrator'::regnamespace)
  order by 1, 2, 3
"""
MIGRATIONS = {
    f"{NEXT:03}_notes.sql": """
        alter table orchestrator.tasks add column if not exists note text;
        create table orchestrator.notes (task_id uuid primary key, note text not null default 'it''s $1');
        insert into orchestrator.notes (task_id) select id from orchestrator.tasks;
        drop function orchestrator.retry_task(uuid, boolean);
        """,
    f"{LAST:03}_notes_by_text.sql": "create index notes_by_text on orchestrator.notes (note);\n",
}


def release(folder: Path, version: int) -> Path:
    """A copy of the program and its SQL as that later release would be; returns the program."""
    folder.mkdir()
    program = folder / "orchestrator.py"
    program.write_text(re.sub(r"(?m)^SCHEMA_VERSION = \d+", f"SCHEMA_VERSION = {version}", PROGRAM.read_text()))
    shutil.copytree(REPOSITORY / "sql", folder / "sql")
    (folder / "sql" / "migrations").mkdir(exist_ok=True)
    edit(folder / "sql" / "00_schema.sql", (f"schema_version() > {NOW}", f"schema_version() > {version}"),
         (f"these files ({NOW})", f"these files ({version})"), (f"as $$ select {NOW} $$", f"as $$ select {version} $$"))
    if version >= NEXT:
        edit(folder / "sql" / "10_tables.sql", ("  meta                jsonb,\n", "  meta                jsonb,\n  note text,\n"), (
            "create table if not exists orchestrator.claims",
            "create table if not exists orchestrator.notes (task_id uuid primary key, note text not null default 'it''s $1');\n"
            + ("create index if not exists notes_by_text on orchestrator.notes (note);\n" if version >= LAST else "")
            + "create table if not exists orchestrator.claims"))
        edit(folder / "sql" / "70_operate.sql",
             ("retry_task(p_id uuid, p_fresh boolean default false) returns",
              "retry_task(p_id uuid, p_fresh boolean default false, p_note text default null) returns"))
    for name, text in MIGRATIONS.items():
        if int(name[:3]) <= version:
            (folder / "sql" / "migrations" / name).write_text(text)
    return program


def edit(file: Path, *changes: tuple[str, str]) -> None:
    text = file.read_text()
    for old, new in changes:
        assert text.count(old) == 1, f"{file.name} has {old!r} {text.count(old)} times"
        text = text.replace(old, new)
    file.write_text(text)


def run(program: Path, url: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(program), *args], check=False, capture_output=True, text=True, cwd=program.parent,
                          env=clean_environment(DATABASE_URL=url, METRICS_PORT=0), timeout=50)


def catalog(url: str) -> list[dict[str, Any]]:
    with psycopg.connect(url, autocommit=True) as conn:
        return rows(conn, CATALOG.replace("%", "%%"))


@pytest.fixture
def fresh(server: Any) -> Any:
    """The catalog of a fresh install of a release."""
    made: list[str] = []

    def install(program: Path) -> list[dict[str, Any]]:
        made.append(server.create_database())
        done = run(program, made[-1], "install")
        assert done.returncode == 0, done.stderr
        return catalog(made[-1])

    yield install
    for url in made:
        server.drop_database(url)


def test_versions_agree_with_each_other_and_with_the_migrations(conn):
    numbers = [int(path.name.split("_")[0]) for path in sorted((REPOSITORY / "sql" / "migrations").glob("*.sql"))]
    assert value(conn, "select orchestrator.schema_version()") == NOW
    assert numbers == list(range(2, NOW + 1))
    assert "00_schema.sql" in orchestrator.sql_files()


@pytest.mark.parametrize("version", [NEXT, LAST])
def test_upgrade_gives_the_catalog_of_a_fresh_install_and_keeps_the_rows(installed, conn, fresh, tmp_path, version):
    tasks = [enqueue(conn, payload={"n": n}) for n in range(3)]
    program = release(tmp_path / "next", version)
    done = run(program, installed, "install", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert catalog(installed) == fresh(program)
    assert value(conn, "select orchestrator.schema_version()") == version
    assert column(conn, "select task_id::text from orchestrator.notes order by 1") == sorted(tasks)
    assert column(conn, "select id::text from orchestrator.tasks order by 1") == sorted(tasks)
    assert run(program, installed, "install").returncode == 0   # again: each migration ran once
    assert value(conn, "select count(*) from orchestrator.notes") == 3


def test_upgrade_in_two_steps_equals_upgrade_in_one(installed, fresh, tmp_path):
    assert run(release(tmp_path / "next", NEXT), installed, "install").returncode == 0
    last = release(tmp_path / "last", LAST)
    assert run(last, installed, "install").returncode == 0
    assert catalog(installed) == fresh(last)


def test_printed_sql_upgrades_too(installed, server, fresh, tmp_path):
    program = release(tmp_path / "next", LAST)
    printed = run(program, installed, "install", "--print").stdout
    done = subprocess.run([server.bin / "psql", installed, "-qX", "-v", "ON_ERROR_STOP=1"], input=printed, check=False,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert catalog(installed) == fresh(program)


def test_migration_that_fails_changes_nothing(installed, conn, tmp_path):
    program = release(tmp_path / "next", NEXT)
    with (program.parent / "sql" / "migrations" / f"{NEXT:03}_notes.sql").open("a") as file:
        file.write("select 1 / 0;\n")
    before = catalog(installed)
    done = run(program, installed, "install")
    assert done.returncode == 2 and "division by zero" in done.stderr and "Traceback" not in done.stderr
    assert catalog(installed) == before


def test_older_release_refuses_a_newer_schema_and_leaves_it(installed, tmp_path, run_cli):
    assert run(release(tmp_path / "next", NEXT), installed, "install").returncode == 0
    before = catalog(installed)
    for args in (["install"], ["run"]):
        done = run_cli(*args, env={"DATABASE_URL": installed, "METRICS_PORT": 0})
        assert done.returncode == 2
        assert f"version {NEXT}" in done.stderr and "Traceback" not in done.stderr
    assert catalog(installed) == before


def test_newer_release_refuses_to_work_on_the_older_schema_and_says_what_to_run(installed, tmp_path):
    done = run(release(tmp_path / "next", NEXT), installed, "run")
    assert done.returncode == 2
    assert f"version {NOW}, this program knows {NEXT}: run `python orchestrator.py install`" in done.stderr


def test_workers_of_the_release_before_go_on_during_a_rolling_upgrade(installed, conn, worker_process: Callable[..., Any], tmp_path):
    """Tasks flow all the time; the old worker works on the new schema, also after it was declared dead; then a new one joins."""
    (tmp_path / "handlers.py").write_text("HANDLERS = {'t': lambda task: None}\n")
    settings = {"DISTRIBUTED_MODE": "true", "HEARTBEAT_INTERVAL": "300ms", "WORKER_TIMEOUT": "5s", "LEADER_TERM": "3s"}
    old = worker_process(installed, **settings)
    program = release(tmp_path / "next", NEXT)
    first = old.id
    state = "select count(*) from orchestrator.tasks where status <> 'completed'"

    def works(seconds: float = 15) -> None:
        for _ in range(20):
            enqueue(conn)
        eventually(lambda: value(conn, state) == 0, seconds)

    works()
    upgrade = subprocess.Popen([sys.executable, str(program), "install"], env=clean_environment(DATABASE_URL=installed), cwd=program.parent)
    while upgrade.poll() is None:
        enqueue(conn)
    assert upgrade.returncode == 0
    assert value(conn, "select orchestrator.schema_version()") == NEXT
    works()
    conn.execute("update orchestrator.workers set declared_dead_at = now(), is_leader = false")   # as a leader would
    eventually(lambda: old.id not in (None, first))
    works()
    new = subprocess.Popen([sys.executable, str(program)], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT,
                           env=clean_environment(DATABASE_URL=installed, METRICS_PORT=0, **settings))
    try:
        eventually(lambda: value(conn, "select count(*) from orchestrator.workers where declared_dead_at is null") == 2, 20)
        works()
        assert old.stop() == 0
        works()
    finally:
        new.terminate()
        assert new.wait(20) == 0
    assert audit(conn) == []


def test_fresh_install_leaves_migrations_out(db, tmp_path):
    program = release(tmp_path / "next", LAST)
    assert run(program, db, "install").returncode == 0
    with psycopg.connect(db, autocommit=True) as conn:
        assert value(conn, "select orchestrator.schema_version()") == LAST
        register(conn)
        assert enqueue(conn)
    with pytest.raises(psycopg.Error, match=f"version {LAST}, newer"):
        install_schema(db)
