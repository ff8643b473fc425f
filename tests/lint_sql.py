"""The house rules of sql/, checked in the catalog of a scratch server that has it installed. Exits 1 on a finding.

plpgsql_check looks into the function bodies where it can be had: Debian's package is for PostgreSQL 15.
"""
from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg

from postgres import SQL_FILES, LocalServer, install_schema

PLPGSQL_CHECK = Path("/usr/share/postgresql/15/extension/plpgsql_check.control")

# A column that an index mentions in any way, its predicate included, ends heap-only updates of it. BRIN excepted.
HOT_COLUMNS = """
  select format('%s: an index on tasks may not mention %s: completions would no longer be heap-only',
                i.indexrelid::regclass, a.attname)
  from pg_index i
  join pg_class c on c.oid = i.indexrelid
  join pg_am m on m.oid = c.relam and m.amname <> 'brin'
  join pg_attribute a on a.attrelid = i.indrelid and a.attnum > 0
  where i.indrelid = 'orchestrator.tasks'::regclass
    and a.attname in ('status', 'started_at', 'completed_at', 'updated_at', 'worker_id', 'result', 'progress', 'last_error')
    and (a.attnum = any (i.indkey) or exists (
      select from pg_depend d where d.classid = 'pg_class'::regclass and d.objid = i.indexrelid
        and d.refclassid = 'pg_class'::regclass and d.refobjid = i.indrelid and d.refobjsubid = a.attnum))
"""

COMMENTS = """
  select format('%s %s: COMMENT ON is missing', kind, name) from (
    select case c.relkind when 'v' then 'view' else 'table' end, c.relname::text, c.oid::regclass::text,
           obj_description(c.oid, 'pg_class')
    from pg_class c where c.relnamespace = 'orchestrator'::regnamespace and c.relkind in ('r', 'p', 'v', 'm')
    union all
    select 'function', p.proname, p.oid::regprocedure::text, obj_description(p.oid, 'pg_proc')
    from pg_proc p where p.pronamespace = 'orchestrator'::regnamespace
    union all
    select 'type', t.typname, t.oid::regtype::text, obj_description(t.oid, 'pg_type')
    from pg_type t where t.typnamespace = 'orchestrator'::regnamespace and t.typtype in ('e', 'd')
  ) as everything (kind, short, name, comment) where short !~ '^_' and comment is null
"""

# What a caller's search_path could turn into something else: pg_catalog comes first, temporary objects last. A body in standard
# SQL is bound when it is created, so it needs none.
SEARCH_PATH = """
  select format('%s: must have set search_path = pg_catalog, pg_temp, or a body in standard SQL', p.oid::regprocedure)
  from pg_proc p
  where p.pronamespace = 'orchestrator'::regnamespace and p.prosqlbody is null
    and p.proname not in ('schema_version', '_redact', '_broken_rule')   -- these are called for each value or row, by functions that pin it
    and not ('search_path=pg_catalog, pg_temp' = any (coalesce(p.proconfig, '{}')))
"""

OVERLOADED = "select proname from pg_proc where pronamespace = 'orchestrator'::regnamespace group by 1 having count(*) > 1"

BODIES = """
  select format('%s line %s: %s: %s %s', p.oid::regprocedure, c.lineno, c.level, c.message, c.detail)
  from pg_proc p
  join pg_language l on l.oid = p.prolang and l.lanname = 'plpgsql'
  left join pg_trigger t on t.tgfoid = p.oid
  cross join lateral plpgsql_check_function_tb(p.oid, coalesce(t.tgrelid, 0), fatal_errors => false,
    extra_warnings => true, performance_warnings => false, security_warnings => true) as c
  where p.pronamespace = 'orchestrator'::regnamespace and (p.prorettype <> 'trigger'::regtype or t.oid is not null)
"""
ALLOWED: tuple[str, ...] = ()  # parts of findings of plpgsql_check that were looked at and are right as they are


def broken_rules(conn: psycopg.Connection[Any]) -> Iterator[str]:
    for rule in (HOT_COLUMNS, COMMENTS, SEARCH_PATH):
        for (finding,) in conn.execute(rule):
            yield finding
    for (name,) in conn.execute(OVERLOADED):
        yield f"{name}: no function name is overloaded, since calls leave the types of arguments to PostgreSQL"


def checked_bodies(conn: psycopg.Connection[Any]) -> Iterator[str]:
    conn.execute("create extension plpgsql_check")
    for (finding,) in conn.execute(BODIES):
        if not any(part in finding for part in ALLOWED):
            yield finding


def headers() -> Iterator[str]:
    for file in SQL_FILES:
        if not file.read_text().startswith("-- "):
            yield f"{file.name}: must open with its purpose, the tables it writes and its lock order"


def findings_on(version: str | None, check: Any) -> list[str]:
    server = LocalServer(version)
    try:
        url = server.create_database()
        install_schema(url)
        install_schema(url)  # it must be safe to run again
        with psycopg.connect(url, autocommit=True) as conn:
            return list(check(conn))
    finally:
        server.stop()


def main() -> int:
    findings = [*headers(), *findings_on(None, broken_rules)]
    if PLPGSQL_CHECK.exists():
        findings += findings_on("15", checked_bodies)
    else:
        print("function bodies were not checked: that needs the Debian package postgresql-15-plpgsql-check")
    print(*findings, sep="\n", end="\n" if findings else "")
    print(f"{len(SQL_FILES)} SQL files, {len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
