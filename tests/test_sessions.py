"""Sessions as others configure them: every hostile setting of a database or role, hostile objects in public, and URLs of all kinds."""
from __future__ import annotations

import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import psycopg
import pytest
from psycopg import sql

from apps import make_app, running, story, wait_for, worker_of
from conftest import PROGRAM, clean_environment
from orchestrator import SESSION, Config, ConfigError, Handler, Link, Orchestrator, Task, install_script
from postgres import SQL_FILES, Server, eventually
from steps import column, value

Connection = psycopg.Connection[Any]
TEXT = "it's \\ \"1\" – 日本語 🐘 $1 %s {}"   # what quoting and encodings get wrong

HOSTILE = {
    "default_transaction_isolation": "serializable", "default_transaction_read_only": "on", "default_transaction_deferrable": "on",
    "datestyle": "German, DMY", "intervalstyle": "sql_standard", "timezone": "Asia/Kathmandu", "search_path": "public, pg_catalog",
    "standard_conforming_strings": "off", "backslash_quote": "off", "transform_null_equals": "on", "array_nulls": "off",
    "statement_timeout": "1s", "lock_timeout": "1ms", "idle_in_transaction_session_timeout": "10ms", "idle_session_timeout": "200ms",
    "client_encoding": "latin1", "client_min_messages": "debug1", "extra_float_digits": "-15", "bytea_output": "escape",
    "row_security": "off", "jit": "on", "jit_above_cost": "0", "plan_cache_mode": "force_custom_plan",
    "join_collapse_limit": "1", "from_collapse_limit": "1",
    "work_mem": "64kB", "check_function_bodies": "off", "quote_all_identifiers": "on", "synchronous_commit": "off",
    "plpgsql.extra_errors": "all", "plpgsql.variable_conflict": "use_variable", "session_replication_role": "replica"}
PLANNER = "select name from pg_settings where name like 'enable\\_%%' and vartype = 'bool' and context = 'user'"
# Flipping these breaks or floods the server itself, or they belong to one transaction.
SPARED = re.compile(r"^(transaction_|log_|debug_print|trace_|zero_damaged|ignore_|allow_|is_superuser|debug_(assert|discard|copy|write)|"
                    r"default_transaction_read_only|default_with_oids|ssl_|update_process_title|exit_on_error|wal_|sync|jit_|"
                    r"krb|gss|array_nulls|data_sync|lo_compat|session_auth|compute_query_id|track_)")
TWISTED = {"bool": "case boot_val when 'on' then 'off' else 'on' end", "enum": "(array_remove(enumvals, boot_val))[1]"}


def psql(server: Server, url: str, script: str, *args: str) -> str:
    options = "-c default_transaction_read_only=off -c client_min_messages=warning"
    done = subprocess.run([server.bin / "psql", url, "-XAtq", "-v", "ON_ERROR_STOP=1", *args], input=script, text=True, capture_output=True,
                          check=False, env=clean_environment(PGOPTIONS=options, PGCLIENTENCODING="UTF8"))
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def configure(server: Server, url: str, settings: dict[str, str], role: bool = False) -> None:
    """Set them for all sessions of the database, or for the role in it, which goes before that."""
    database = sql.Identifier(urlsplit(url).path.lstrip("/"))
    whom = sql.SQL("role postgres in database {}") if role else sql.SQL("database {}")
    with server.connect() as conn:
        for name, setting in settings.items():
            form = sql.SQL("alter {} set {} = {}" if name == "search_path" else "alter {} set {} to {}").format(
                whom.format(database), sql.SQL(name), sql.SQL(setting) if name == "search_path" else sql.Literal(setting))
            conn.execute(form)


def live(server: Server, url: str, look: Connection) -> None:
    """Everything that can happen to a task: by Python, by psql, and after another worker's death."""
    started, moments = threading.Event(), []

    def obedient(task: Task) -> None:
        moments.append(task.created_at)
        started.set()
        assert task.cancelled.wait(30)
        task.raise_if_cancelled()

    def reporting(task: Task) -> str:
        task.progress({"text": TEXT})
        eventually(lambda: story(app, task.id)["progress"])
        return TEXT

    def paying(task: Task) -> None:
        with task.transaction() as connection:
            connection.execute("insert into public.ledger values (%s)", [TEXT])
            task.complete({"paid": TEXT})

    def failing(task: Task) -> None:
        raise RuntimeError(TEXT)

    def staged(task: Task) -> list[Any]:
        return [task.step("a", lambda: TEXT), task.signal(TEXT), list(task.parents().values())]

    app = make_app(url, {"ok": lambda task: task.payload, "stages": staged,
                         "fails": Handler(failing, max_retries=1, base_delay=0), "obedient": obedient,
                         "reports": reporting, "pays": paying}, claim_interval=0.05, heartbeat_interval=0.1)
    app.open()
    orphan = app.enqueue("ok", "orphan")
    app.call("register_worker", "host:1:gone", "host", 1, "1", '{"ok": {}}')
    assert [row[1] for row in app.call("claim_tasks", "host:1:gone", "{ok}", 10)] == [orphan]
    psqls = psql(server, url, "select orchestrator.enqueue('ok', :'payload')", "-v", f'payload={{"text": "{chr(233)}\\\\n"}}')
    look.execute("create table public.ledger (entry text)")
    ours = app._links[0].open()
    for name, setting in SESSION.items():
        shown = (ours.execute(f"select pg_catalog.current_setting('{name}')".encode()).fetchone() or ("",))[0]
        assert (name, shown.lower().replace('"', "").replace("1min", "60s")) == (name, setting.lower())
    with running(url, app):
        assert wait_for(app, orphan)["recoveries"] == 1 and story(app, orphan)["result"] == "orphan"
        assert wait_for(app, psqls)["result"] == {"text": "é\\n"}
        keyed = app.enqueue("ok", {"text": TEXT}, idempotency_key=TEXT, priority=5, max_retries=0)
        assert (app.enqueue("ok", idempotency_key=TEXT), app.enqueue("ok", idempotency_key=TEXT).created) == (keyed, False)
        assert wait_for(app, keyed)["result"] == {"text": TEXT}
        assert [id.created for id in app.enqueue_many("ok", [1, TEXT, None], idempotency_keys=["a", None, "a"])] == [True, True, False]
        failed = wait_for(app, app.enqueue("fails"))
        assert (failed["status"], failed["attempts"]) == ("dead_letter", 2) and TEXT in failed["last_error"]
        assert wait_for(app, app.enqueue("reports"))["result"] == TEXT
        assert wait_for(app, app.enqueue("pays"))["result"] == {"paid": TEXT}
        assert column(look, "select entry from public.ledger") == [TEXT]
        stopping = app.enqueue("obedient")
        assert started.wait(30) and app.cancel(stopping) == "cancelling"
        assert wait_for(app, stopping)["status"] == "cancelled" and app.retry(failed["id"]) == "pending"
        assert abs((moments[0] - datetime.now(UTC)).total_seconds()) < 300
        soon, later = app.enqueue("ok", delay=0.2), app.enqueue("ok", run_at=datetime.now(UTC) + timedelta(days=3))
        assert wait_for(app, soon)["status"] == "completed" and story(app, later)["status"] == "pending"
        assert datetime.fromisoformat(story(app, later)["next_retry_at"]) > datetime.now(UTC) + timedelta(days=2)
        assert app.cancel(later) == "cancelled" and app.cancel(later) == "cancelled"
        compose(app)
        look_at_everything(app, failed["id"])
        assert psql(server, url, f"select orchestrator.cancel_task('{later}'), orchestrator.retry_task('{later}')") == "cancelled|pending"
        assert app.call("pause_type", "fails")[0][0] is True
        assert not +worker_of(app).counters.errors, worker_of(app).counters.errors
    assert column(look, "select a::text from orchestrator.audit() a") == []


def compose(app: Orchestrator) -> None:
    """Tasks that wait for others, expire, are replaced, take steps and signals, and many at once."""
    app.limit("ok", max_running=50, max_per_key=1)
    later = datetime.now(UTC) + timedelta(days=1)
    parent = app.replace("ok", TEXT + "r", [1], run_at=later, concurrency_key=TEXT)
    child = app.enqueue("stages", TEXT, after=[parent], on_failure="cancel", expires=3600, meta={"text": TEXT})
    assert app.call("explain_task", child)[0][0].startswith(f"waits for task {parent} (pending)")
    assert app.replace("ok", TEXT + "r", [2], mode="append", priority=3, run_at=later) == parent
    assert app.replace("ok", TEXT + "r", mode="keep") == parent
    for action, priority in (("prioritize", 7), ("run_now", None)):
        assert app.bulk(action, {"ids": [str(parent)], "payload": [1, 2]}, dry_run=False, value=priority)["done"] == 1
    assert app.wait(parent) == [1, 2] and app.signal(child, TEXT, TEXT) == "delivered"
    assert app.wait(child) == [TEXT, TEXT, [[1, 2]]]
    gone = app.enqueue("ok", delay=3600, expires=7200)
    left = app.enqueue("ok", after=[gone])
    assert app.bulk("cancel", {"id": str(gone), "created_after": "2020-01-01"}, dry_run=False)["done"] == 1
    assert wait_for(app, left)["status"] == "cancelled"   # not at once where a worker is just looking at it
    assert app.list({"status": "ended"}, 3)
    assert app.bulk("retry", {"ids": [str(gone)]}, dry_run=False)["done"] == 1 and app.wait(gone) == {}
    assert app.bulk("purge", {"type": "ok", "error": TEXT}, dry_run=False)["done"] == 0
    assert app.bulk("purge", {"ids": [str(left), str(gone), str(child)]}, dry_run=False)["done"] == 3
    expiring = app.enqueue("nobody", expires=0.05)
    assert wait_for(app, expiring)["status"] == "cancelled"


def look_at_everything(app: Orchestrator, task_id: str) -> None:
    assert {row["type"] for row in app.view("queue_stats")} >= {"fails"}
    for view in ("pending_tasks", "running_tasks", "dead_letters"):
        app.view(view)
    for function in ("api_overview", "api_history", "api_tasks", "api_failures", "metrics"):
        assert app.call(function)[0][0]
    assert app.call("show_task", task_id)[0][0] and app.call("show_task", p_id=task_id)[0][0]
    assert app.call("explain_task", task_id)


@pytest.fixture
def look(server: Server, db: str) -> Iterator[Connection]:
    """A session with settings of its own, to look with."""
    usual = {"default_transaction_read_only": "off", "idle_session_timeout": "0", "statement_timeout": "0", "lock_timeout": "0",
             "default_transaction_isolation": "read\\ committed", "standard_conforming_strings": "on", "row_security": "on",
             "idle_in_transaction_session_timeout": "0", "session_replication_role": "origin"}
    options = " ".join(f"-c {name}={setting}" for name, setting in usual.items())
    with psycopg.connect(db, autocommit=True, client_encoding="UTF8", options=options) as conn:
        yield conn


@pytest.mark.parametrize("role", [False, True], ids=["alter database", "alter role"])
def test_tasks_live_whatever_the_settings_of_the_database_or_role_are(server: Server, db: str, look: Connection, role: bool) -> None:
    planner = {name: "off" for name in column(look, PLANNER)}
    newer = {"transaction_timeout": "300ms", "restrict_nonsystem_relation_kind": "view, foreign-table"}
    known = set(column(look, "select name from pg_settings"))
    settings = {**HOSTILE, **planner, **{name: setting for name, setting in newer.items() if name in known}}
    configure(server, db, settings, role)
    live(server, db, look)


def test_a_database_whose_transactions_are_read_only_by_default_gets_tasks(server: Server, db: str, look: Connection) -> None:
    configure(server, db, {"default_transaction_read_only": "on", "default_transaction_isolation": "repeatable read"})
    look.execute("create table ledger (entry int)")

    def pay(task: Task) -> None:
        with task.transaction() as connection:
            connection.execute("insert into ledger values (1)")

    with running(db, {"pays": pay}) as app:
        assert wait_for(app, app.enqueue("pays"))["status"] == "completed"
    assert column(look, "select entry from ledger") == [1]


def test_tasks_live_with_every_switch_turned_and_every_choice_made_otherwise(server: Server, db: str, look: Connection) -> None:
    """What nobody thought of is in here: all settings that a session may change, of the kinds that have another value."""
    settings: dict[str, str] = {}
    for kind, other in TWISTED.items():
        for name, setting in look.execute(f"""select name, {other} from pg_settings
                where vartype = %s and context in ('user', 'superuser') order by name""".encode(), [kind]):
            if setting is not None and not SPARED.match(name):
                settings[name] = setting   # noqa: PERF403
    assert len(settings) > 50
    configure(server, db, settings)
    live(server, db, look)


def test_the_script_for_psql_installs_whatever_the_settings_are(server: Server, db: str, look: Connection) -> None:
    settings = {name: setting for name, setting in HOSTILE.items() if name not in (
        "idle_in_transaction_session_timeout", "default_transaction_read_only")}   # psql reads line by line, and needs a moment
    configure(server, db, settings)
    psql(server, db, install_script())
    psql(server, db, install_script())
    assert column(look, "select a::text from orchestrator.audit() a") == []
    app = make_app(db)
    assert app.enqueue("a", TEXT).created and app.enqueue_many("a", [TEXT])
    app.close()


# ------------------------------------------------------------------------------------------------------ hostile objects
def names_in_use() -> list[str]:
    """Every word that our SQL or our program uses."""
    texts = [file.read_text() for file in SQL_FILES] + [PROGRAM.read_text()]
    return sorted({word for text in texts for word in re.findall(r"[a-z_][a-z0-9_]+", text)})


def plant(conn: Connection, owner: str) -> int:
    """For each built-in function, operator, type and relation whose name we use, one in public that takes its calls and tells of it."""
    conn.execute(f"""
        grant create, usage on schema public to {owner};
        set role {owner};
        create sequence public.taken;
        grant all on sequence public.taken to public""".encode())
    conn.execute("set search_path = pg_catalog, pg_temp")
    # "any" is for C alone: anyelement takes one argument of any type, which goes before a variadic
    planted = conn.execute("""
        select p.proname, array(select case a.type when '"any"'::regtype then 'anyelement' else format_type(a.type, null) end
                                from unnest(p.proargtypes::oid[]) with ordinality a(type, o) order by o) as types,
               p.proretset, format_type(p.prorettype, null) as result
        from pg_proc p
        where p.pronamespace = 'pg_catalog'::regnamespace and p.proname = any (%s) and p.pronargs > 0
          and not exists (select from unnest(p.proargtypes::oid[]) t join pg_type y on y.oid = t
                          where y.typtype = 'p'
                            and y.typname not in ('any', 'anyelement', 'anyarray', 'anynonarray', 'record', 'cstring'))""",
        [names_in_use()]).fetchall()
    made = 0
    for name, types, _, _ in planted:
        if "cstring" in types or "record" in types or ("anyarray" in types and len(set(types)) > 1 and "anyelement" not in types):
            types = [{"cstring": "text", "record": "text"}.get(t, t) for t in types]
        with conn.transaction():
            conn.execute(sql.SQL("""create or replace function public.{}({}) returns text language plpgsql as
                $$ begin perform pg_catalog.nextval('public.taken'); raise exception 'a function of a stranger ran'; end $$""").format(
                    sql.Identifier(name), sql.SQL(", ".join(types))))
        made += 1
    conn.execute("""create function public.strange(l anyelement, r anyelement) returns boolean language plpgsql as
        $$ begin perform pg_catalog.nextval('public.taken'); raise exception 'an operator of a stranger ran'; end $$""")
    for kind in ("text", "int", "bigint", "uuid", "jsonb", "timestamptz", "interval", "boolean", "numeric", "name", "oid",
                 '"char"', "float8"):
        name = "strange_" + re.sub(r"\W", "", kind)
        conn.execute(f"""create function public.{name}(l {kind}, r {kind}) returns boolean language plpgsql as
            $$ begin perform pg_catalog.nextval('public.taken'); raise exception 'an operator of a stranger ran'; end $$""".encode())
        for operator in ("=", "<>", "<", ">", "<=", ">=", "+", "-", "*", "/", "%", "||", "~", "!~", "~~", "->", "->>", "#>", "@>", "&&",
                         "?"):
            conn.execute(f"create operator public.{operator} (function = public.{name}, leftarg = {kind}, rightarg = {kind})".encode())
    for relation in ("tasks", "workers", "claims", "lanes", "task_types", "task_events", "queue_stats", "pg_class", "pg_proc",
                     "pg_namespace", "pg_stat_activity", "pg_type", "pg_roles", "pg_settings",
                     "pg_attribute", "pg_constraint", "pg_index", "pg_depend"):
        conn.execute(f"create table public.{relation} (oid oid)".encode())
    for kind in ("uuid", "jsonb", "interval", "timestamptz", "regclass", "task_status", "regprocedure", "text", "int4", "int8"):
        conn.execute(f"create type public.{kind} as enum ()".encode())
    conn.execute("reset role; reset search_path")
    return made


def test_nothing_of_a_strangers_in_public_is_ever_used(server: Server, db: str, look: Connection) -> None:
    owner = "stranger_" + urlsplit(db).path.lstrip("/")
    with server.connect() as conn:
        conn.execute(f"create role {owner}".encode())
    try:
        assert plant(look, owner) > 250
        configure(server, db, {"search_path": "public, pg_catalog"})
        with psycopg.connect(db) as other, pytest.raises(psycopg.errors.RaiseException, match="stranger"):
            other.execute("select lower('A'::pg_catalog.text)")   # the trap works
        look.execute("select pg_catalog.setval('public.taken', 1, false)")
        psql(server, db, install_script())   # what constraints, views and defaults are bound to
        live(server, db, look)
        assert value(look, "select is_called from public.taken") is False
    finally:
        server.drop_database(db)
        with server.connect() as conn:
            conn.execute(f"drop role {owner}".encode())


# --------------------------------------------------------------------------------------------------------- URLs of all kinds
def answers(url: str, **environment: str) -> None:
    app = make_app(url)
    assert app.enqueue("a", idempotency_key="k")
    app.close()


@pytest.mark.parametrize("query", ["schema=public", "schema=public&connection_limit=5&pool_timeout=0", "pgbouncer=true&application_name=x",
                                   "statement_cache_size=0&sslmode=disable&schema=a%20b", "sslmode=prefer", ""])
@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg", "postgresql+asyncpg", "postgres+psycopg2"])
def test_a_url_as_an_orm_writes_it_will_do(installed: str, scheme: str, query: str) -> None:
    url = installed.replace("postgresql", scheme, 1) + ("?" + query if query else "")
    if scheme in ("postgresql", "postgresql+psycopg") or query == "schema=public":   # each way with each other: once is enough
        answers(url)
    assert "schema" not in Config.load({"database_url": url}).database_url


def test_options_in_the_url_are_kept_and_cost_nothing(installed: str) -> None:
    url = f"{installed}?options={quote('-c statement_timeout=60s -c work_mem=5MB -c search_path=public')}"
    link = Link(Config.load({"database_url": url}))
    connection = link.open()
    assert not link.pooled and connection.prepare_threshold is not None
    names = ("statement_timeout", "work_mem", "search_path")
    shown = {name: (connection.execute(f"show {name}".encode()).fetchone() or ("",))[0] for name in names}
    assert shown == {"statement_timeout": "15s", "work_mem": "5MB", "search_path": "pg_catalog, pg_temp"}
    link.close()


def test_pgoptions_and_a_service_file_are_honoured(installed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = psycopg.conninfo.conninfo_to_dict(installed)
    (tmp_path / "services").write_text("[mine]\n" + "".join(f"{key}={target[key]}\n" for key in ("host", "port", "user", "dbname"))
                                       + "options=-c work_mem=6MB\n")
    monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "services"))
    for url, memory, options in (("service=mine", "6MB", ""), ("postgresql://?service=mine", "6MB", ""),
                                 (installed, "7MB", "-c work_mem=7MB -c datestyle=German")):
        monkeypatch.setenv("PGOPTIONS", options)
        link = Link(Config.load({"database_url": url}))
        assert (link.open().execute("show work_mem").fetchone() or ("",))[0] == memory and not link.pooled
        link.close()
        with running(url, {"a": lambda task: "done"}) as app:
            assert wait_for(app, app.enqueue("a"))["result"] == "done"


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_a_database_that_can_not_hold_every_text_is_refused_in_one_line(
        server: Server, run_cli: Callable[..., subprocess.CompletedProcess[str]], encoding: str) -> None:
    name = f"encoded_{encoding.lower()}"
    with server.connect() as conn:
        conn.execute(f"create database {name} template template0 encoding '{encoding}' locale 'C'".encode())
    url = server.dsn(name)
    try:
        for args in (["install"], []):
            done = run_cli(*args, env={"DATABASE_URL": url, "METRICS_PORT": "off"})
            last = done.stderr.strip().split("\n")[-1]
            assert done.returncode == 2 and last.startswith("error: DATABASE_URL: ") and encoding in last, (args, done)
            assert "Traceback" not in done.stderr
        with psycopg.connect(url, autocommit=True, client_encoding=encoding) as conn:   # nor where someone installed it by psql
            conn.execute(install_script().encode())
        app = make_app(url)
        with pytest.raises(ConfigError, match=encoding):
            app.enqueue("a", "日本")
        with pytest.raises(ConfigError, match=encoding):
            app.start()
    finally:
        server.drop_database(url)


@pytest.mark.parametrize("whose", ["owned", "granted"])
def test_a_role_that_may_not_create_schemas_installs_into_one_that_is_there(server: Server, db: str, look: Connection, whose: str) -> None:
    database, role = urlsplit(db).path.lstrip("/"), "installer_" + urlsplit(db).path.lstrip("/")
    look.execute(f"""
        create role {role} login;
        revoke create on database {database} from public, {role};
        create schema orchestrator {f'authorization {role}' if whose == 'owned' else ''};
        grant create, usage on schema orchestrator to {role}""".encode())
    url = db.replace("postgres@", f"{role}@", 1)
    try:
        with running(url, {"a": lambda task: "done"}) as app:   # installs, too
            assert wait_for(app, app.enqueue("a"))["result"] == "done"
        psql(server, url, install_script())
        assert column(look, "select a::text from orchestrator.audit() a") == []
    finally:
        server.drop_database(db)
        with server.connect() as conn:
            conn.execute(f"drop role {role}".encode())
