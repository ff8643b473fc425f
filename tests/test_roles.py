"""Least privilege: what each of the four roles may do, tried on every function of the catalog, and a whole worker under its role."""
from __future__ import annotations

import json
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest
from psycopg import sql

from postgres import LocalServer, eventually, install_schema
from steps import audit, claim, column, enqueue, fail, register, rows, value

PURE = {"schema_version", "longest_delay", "redact", "redact_text", "retry_delay"}
READ = PURE | {
    "fire_times", "schedule_history",
    "explain_task", "show_task", "audit", "metrics", "api_overview", "api_history", "api_tasks", "api_failures", "api_operations"}
DECISIONS = {
    "producer": PURE | {"enqueue", "enqueue_many", "enqueue_lines", "replace_task"},
    "worker": READ | {"enqueue", "enqueue_many", "enqueue_lines", "schedule",
        "register_worker", "unregister_worker", "heartbeat", "cancelling_tasks", "set_idle", "announce_stop", "promote_due", "claim_tasks",
        "start_tasks", "complete_tasks", "fail_tasks", "fail_task", "release_tasks", "release_forgotten", "snooze_task",
        "record_progress", "acquire_leadership", "resign_leadership", "declare_dead", "declare_disconnected_dead", "recover_orphans",
        "raise_floors", "rescan_lanes", "prune", "sample_stats", "note_lost_result", "get_task", "limit_type", "replace_task",
        "wait_tasks", "record_step", "steps", "await_signal", "parent_results"},
    "operator": READ | {"cancel_task", "retry_task", "bulk_tasks", "retry_dead_letters", "pause_type", "resume_type", "limit_type",
                         "enqueue", "schedule", "unschedule", "pause_schedule", "resume_schedule", "fire_schedule", "signal_task"},
    "auditor": READ,
}
ROLES = sorted(DECISIONS)
VIEWS = ("pending_tasks", "running_tasks", "dead_letters", "queue_stats", "schedule_states", "limits")
HANDLERS = """
import orchestrator
def fail(task):
    raise RuntimeError("no")
def discard_or_snooze(task):
    raise orchestrator.Snooze(0.01) if task.priority else orchestrator.Discard("enough")
def wait(task):
    task.progress({"step": 1, "password": "hunter2"})
    task.cancelled.wait(30)
    task.raise_if_cancelled()
def written(task):
    with task.transaction() as connection:
        connection.execute("select 1")
HANDLERS = {"task:ok": lambda task: {"n": 1}, "task:fail": orchestrator.Handler(fail, max_retries=1, base_delay=0.01),
            "task:discard": discard_or_snooze, "task:wait": wait, "task:written": written, "task:pattern:*": lambda task: None}
"""


def as_user(url: str, user: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=f"{user}:secret@{parts.netloc.rsplit('@', 1)[1]}"))


@pytest.fixture
def login(installed: str, conn: Any) -> Iterator[Any]:
    """Make a user with these of the four roles, and return the URL to connect as it."""
    made: list[str] = []

    def make(*roles: str) -> str:
        name = f"user_{conn.info.dbname}_{len(made)}"
        made.append(name)
        conn.execute(sql.SQL("create role {} login password 'secret'").format(sql.Identifier(name)))
        for role in roles:
            conn.execute(sql.SQL("grant {} to {}").format(sql.Identifier("orchestrator_" + role), sql.Identifier(name)))
        return as_user(installed, name)

    yield make
    for name in made:
        conn.execute("select pg_terminate_backend(pid) from pg_stat_activity where usename = %s", [name])
        conn.execute(sql.SQL("drop role {}").format(sql.Identifier(name)))


def functions(conn: Any) -> list[dict[str, Any]]:
    return rows(conn, """
        select p.oid::regprocedure::text as signature, p.proname as name, p.prosrc as body,
               'select ' || p.oid::regproc || '(' || coalesce(
                      (select string_agg('null::' || format_type(a, null), ', ' order by o)
                       from unnest(p.proargtypes) with ordinality u(a, o)), '') || ')' as call
        from pg_proc p where p.pronamespace = 'orchestrator'::regnamespace order by 1""")


def test_every_public_function_has_a_decision(conn):
    public = {f["name"] for f in functions(conn) if not f["name"].startswith("_")}
    assert public == set().union(*DECISIONS.values())


@pytest.mark.parametrize("role", ROLES)
def test_each_role_may_call_its_functions_and_the_helpers_and_nothing_else(conn, role):
    wrong = []
    for function in functions(conn):
        refused = None
        with suppress(psycopg.Error), conn.transaction(force_rollback=True):
            conn.execute(f"set local role orchestrator_{role}")
            try:
                conn.execute(function["call"])
            except psycopg.Error as error:
                message = str(error).split("\n")[0]
                refused = message if message.startswith("permission denied for function") else None
                raise
        may = function["name"] in DECISIONS[role] or function["name"].startswith("_")
        expected = None if may else f"permission denied for function {function['name']}"
        if refused != expected:
            wrong.append(f"{function['signature']}: {refused or 'allowed'}, should be {expected or 'allowed'}")
    assert wrong == []


def test_every_function_runs_with_the_rights_of_its_caller(conn):
    """So a helper that anyone may call gives nobody a right that the tables don't give."""
    assert column(conn, "select oid::regprocedure::text from pg_proc where pronamespace = 'orchestrator'::regnamespace and prosecdef") == []


@pytest.mark.parametrize(("role", "calls"), [
    ("producer", ("_task_summaries(array[%(id)s]::uuid[])", "_count_live()", "_ready_types('', '{}')",
                  "_matching('{}', 'ready', 0, null, 10, 10)", "_log('pause', 'type', 'x')",
                  "_events(%(id)s, false)", "_leads('w', 1)", "_advance_safe_floor()", "_sample_runs(0, '{}')")),
    ("auditor", ("_sample_runs(0, '{}')", "_name_types(%(id)s)", "_advance_safe_floor()", "_leads('w', 1)"))])
def test_helpers_give_no_right_that_the_tables_do_not_give(login, conn, role, calls):
    id = enqueue(conn, payload={"a": 1})
    with psycopg.connect(login(role), autocommit=True) as user:
        for call in calls:
            with pytest.raises(psycopg.errors.InsufficientPrivilege, match="table|relation|view|sequence"):
                user.execute(f"select * from orchestrator.{call}", {"id": id})


def test_a_schema_of_their_own_shows_an_auditor_no_secret(login, conn):
    """Functions and operators that shadow those of pg_catalog in the caller's search_path get nothing to read."""
    id = enqueue(conn, payload={"password": "hunter2", "deep": [{"token": "hunter2"}]})
    conn.execute("update orchestrator.tasks set last_error = 'postgres://a:hunter2@b/c'")
    with psycopg.connect(login("auditor"), autocommit=True) as auditor:
        names = sql.Identifier(conn.info.dbname), sql.Identifier(auditor.info.user)
        conn.execute(sql.SQL("grant create on database {} to {}").format(*names))
        auditor.execute("create schema evil")
        auditor.execute("create table evil.seen (text text)")
        leak = "begin insert into evil.seen values ($1::pg_catalog.text); return {}; end"
        for name, arguments, returns, result in (
                ("jsonb_typeof", "jsonb", "text", "'string'"), ("jsonb_each", "jsonb, out key text, out value jsonb", "setof record", ""),
                ("to_jsonb", "jsonb", "jsonb", "$1"), ("to_jsonb", "text", "jsonb", "null"),
                ("regexp_replace", "text, text, text, text", "text", "$1"),
                ("length", "text", "int", "1"), ("pg_column_size", "jsonb", "int", "1"), ("octet_length", "text", "int", "1"),
                ("jsonb_array_elements", "jsonb", "setof jsonb", ""), ("json_each", "json", "setof json", "")):
            auditor.execute(f"create function evil.{name}({arguments}) returns {returns} language plpgsql as $$ {leak.format(result)} $$")
        auditor.execute("create function evil.same(jsonb, jsonb) returns boolean language plpgsql as $$ " + leak.format("true") + " $$")
        auditor.execute("create operator evil.= (leftarg = jsonb, rightarg = jsonb, function = evil.same)")
        auditor.execute("create function evil.like(text, text) returns boolean language plpgsql as $$ " + leak.format("true") + " $$")
        auditor.execute("create operator evil.~ (leftarg = text, rightarg = text, function = evil.like)")
        auditor.execute("create operator evil.~* (leftarg = text, rightarg = text, function = evil.like)")
        auditor.execute("set search_path = evil, pg_catalog")
        for query in (f"select orchestrator.show_task('{id}')", "select orchestrator.api_tasks()",
                      f"select orchestrator._task_summaries(array['{id}'::uuid])",
                      *(f"select * from orchestrator.{view}" for view in (*VIEWS, "_redacted_tasks"))):
            assert "hunter2" not in str(auditor.execute(query).fetchall())
        assert auditor.execute("select text from evil.seen where text like '%hunter2%'").fetchall() == []
    conn.execute("drop schema evil cascade")
    conn.execute(sql.SQL("revoke create on database {} from {}").format(*names))


def test_public_has_nothing(conn, login):
    assert column(conn, "select oid::regprocedure::text from pg_proc where pronamespace = 'orchestrator'::regnamespace "
                        "and has_function_privilege('public', oid, 'execute')") == []
    assert column(conn, "select oid::regclass::text from pg_class where relnamespace = 'orchestrator'::regnamespace "
                        "and case when relkind in ('r', 'v') then has_table_privilege('public', oid, "
                        "'select, insert, update, delete, truncate, references, trigger') "
                        "or has_any_column_privilege('public', oid, 'select, insert, update, references') end") == []
    assert column(conn, "select oid::regclass::text from pg_class where relnamespace = 'orchestrator'::regnamespace "
                        "and case when relkind = 'S' then has_sequence_privilege('public', oid, 'usage, select, update') end") == []
    assert value(conn, "select has_schema_privilege('public', 'orchestrator', 'usage, create')") is False
    assert value(conn, "select has_type_privilege('public', 'orchestrator.task_status', 'usage')") is False
    with psycopg.connect(login()) as stranger, pytest.raises(psycopg.errors.InsufficientPrivilege):
        enqueue(stranger)


def test_no_role_may_change_the_schema(login):
    with psycopg.connect(login(*ROLES), autocommit=True) as conn:
        for statement in ("create table orchestrator.x ()", "create function orchestrator.x() returns int language sql as 'select 1'",
                          "drop function orchestrator.enqueue", "alter table orchestrator.tasks add x int", "truncate orchestrator.tasks",
                          "create index on orchestrator.tasks (type)", "drop schema orchestrator cascade"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                conn.execute(statement)


def test_producer_enqueues_and_sees_no_payload(login, conn):
    with psycopg.connect(login("producer"), autocommit=True) as producer:
        first = enqueue(producer, "a", {"password": "x"}, idempotency_key="k", run_at="2030-01-01")
        assert enqueue(producer, "a", idempotency_key="k", run_at="2030-01-01") == first
        enqueue(producer, "a", priority=3, max_retries=0)
        assert len(column(producer, "select id from orchestrator.enqueue_many('b', '{1,2}', 0, '{k,k}')")) == 2
        for query in ("select payload from orchestrator.tasks", "select * from orchestrator.pending_tasks",
                      "select last_error from orchestrator.tasks", "update orchestrator.tasks set max_retries = 1",
                      "update orchestrator.tasks set status = 'completed'", "update orchestrator.tasks set payload = '1' returning payload",
                      "delete from orchestrator.tasks", "insert into orchestrator.tasks (type, status) values ('a', 'completed')"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                producer.execute(query)
    assert value(conn, "select count(*) from orchestrator.tasks") == 3
    assert audit(conn) == []


def test_producer_replaces_and_keeps_what_waits_and_whoever_may_read_payloads_appends(login, conn):
    register(conn, "w", ("t",))
    conn.execute("select orchestrator.limit_type('t', p_max_per_key => 1)")
    call = "select action from orchestrator.replace_task('t', 'k', %s, %s, %s, %s, p_concurrency_key => 'a')"
    now, later = value(conn, "select now()"), value(conn, "select now() + interval '1 hour'")
    with psycopg.connect(login("producer"), autocommit=True) as producer:
        for mode, run_at, action in (("append", now, "enqueued"), ("replace", later, "replaced"), ("replace", now, "replaced"),
                                     ("keep", None, "kept"), ("replace", later, "replaced"), ("replace", now, "replaced")):
            assert value(producer, call, "[1]", run_at, mode, 3) == action
        assert value(producer, call, "[2]", None, "replace", 4) == "replaced"
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            value(producer, call, "[3]", None, "append", None)
        claim(conn)
        assert value(producer, call, "[4]", None, "keep", None) == "kept"
        assert value(producer, call, "[4]", None, "replace", None) == "enqueued"
    with psycopg.connect(login("worker"), autocommit=True) as worker:
        assert value(worker, call, "[5]", later, "append", 1) == "replaced"
    assert column(conn, "select payload from orchestrator.tasks order by id") == [[2], [4, 5]]
    assert audit(conn) == []


def test_auditor_sees_everything_but_secrets_and_changes_nothing(login, conn):
    register(conn)
    ids = [enqueue(conn, payload={"password": "hunter2", "to": "a"}) for _ in range(3)]
    claim(conn, limit=1)
    conn.execute("select orchestrator.cancel_task(%s)", [ids[2]])
    with psycopg.connect(login("auditor"), autocommit=True) as auditor:
        for view in VIEWS:
            assert "hunter2" not in str(rows(auditor, f"select * from orchestrator.{view}"))
        assert value(auditor, "select orchestrator.show_task(%s)", ids[0])["payload"] == {"password": "[redacted]", "to": "a"}
        assert "cancelled" in value(auditor, "select orchestrator.explain_task(%s)", ids[2])
        assert audit(auditor) == []
        assert rows(auditor, "select * from orchestrator.type_stats") == []
        assert len(value(auditor, "select orchestrator.api_tasks(p_status => 'ready')")["tasks"]) == 1
        assert len(value(auditor, "select orchestrator.api_tasks()")["tasks"]) == 3
        assert value(auditor, "select orchestrator.api_tasks(p_status => 'in_flight')")["tasks"][0]["id"] == ids[0]
        assert column(auditor, "select status from orchestrator.tasks where id = %s", ids[2]) == ["cancelled"]
        for query in ("select payload from orchestrator.tasks", "select result from orchestrator.tasks", "select * from orchestrator.tasks",
                      "select orchestrator.cancel_task(gen_random_uuid())", f"select orchestrator.get_task('{ids[0]}')",
                      "delete from orchestrator.task_events",
                      "update orchestrator.task_types set paused = true"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                auditor.execute(query)


def test_operator_cancels_retries_and_pauses_without_a_right_on_payloads(login, conn):
    register(conn)
    ids = [enqueue(conn, payload={"n": n}) for n in range(3)]
    [flying] = claim(conn, limit=1)
    with psycopg.connect(login("operator"), autocommit=True) as operator:
        assert value(operator, "select orchestrator.cancel_task(%s)", ids[0]) == "cancelling"
        assert value(operator, "select orchestrator.cancel_task(%s)", ids[1]) == "cancelled"
        assert value(operator, "select orchestrator.retry_task(%s)", ids[1]) == "pending"
        assert value(operator, "select changed from orchestrator.pause_type('t')") is True
        assert value(operator, "select changed from orchestrator.resume_type('t')") is True
        fail(conn, claim(conn, limit=1)[0]["claim_id"], ids[2], permanent=True)
        assert value(operator, "select done from orchestrator.bulk_tasks('retry', '{\"all\": true}', false)") == 1
        for query in ("select payload from orchestrator.tasks", "delete from orchestrator.tasks",
                      "select orchestrator.enqueue_many('t', '{1}')",
                      "select orchestrator.claim_tasks('w', '{t}', 1)", "update orchestrator.tasks set payload = '{}'"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                operator.execute(query)
    assert flying["id"] == ids[0]
    assert audit(conn) == []


def test_operator_acts_on_many_by_their_payloads_without_reading_them_and_purges_only_as_a_worker_too(login, conn):
    for n in range(3):
        enqueue(conn, payload={"n": n, "password": "hunter2"})
    bulk = "select matched, done from orchestrator.bulk_tasks(%s, %s, %s)"
    with psycopg.connect(login("operator"), autocommit=True) as operator:
        for payload, matched in (('{"n": 1}', 1), ('{"password": "hunter2"}', 0), ('{"password": "[redacted]"}', 2)):
            filter = '{"payload": ' + payload + "}"
            assert operator.execute(bulk, ["cancel", filter, True]).fetchone() == (matched, None)
            assert operator.execute(bulk, ["cancel", filter, False]).fetchone() == (matched, matched)
        assert "hunter2" not in str(operator.execute("select sample from orchestrator.bulk_tasks('purge', '{\"all\": true}')").fetchall())
        assert column(operator, "select distinct by from orchestrator.operations") == [operator.info.user]
        assert column(operator, "select distinct detail from orchestrator.task_events where detail !~ '^operation [0-9]+ by user_'") == []
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            operator.execute(bulk, ["purge", '{"all": true}', False])
    with psycopg.connect(login("operator", "worker"), autocommit=True) as both:
        assert both.execute(bulk, ["purge", '{"all": true}', False]).fetchone() == (3, 3)
    for role in ("producer", "worker", "auditor"):
        with psycopg.connect(login(role), autocommit=True) as other, pytest.raises(psycopg.errors.InsufficientPrivilege):
            other.execute(bulk, ["cancel", '{"all": true}', True])


def test_operator_runs_now_and_prioritizes(login, conn):
    conn.execute("select orchestrator.limit_type('t', null, 1)")
    later, ready = enqueue(conn, run_at="2030-01-01", concurrency_key="k"), enqueue(conn, concurrency_key="k")
    bulk = "select done from orchestrator.bulk_tasks(%s, %s, false, %s)"
    with psycopg.connect(login("operator"), autocommit=True) as operator:
        assert value(operator, bulk, "run_now", '{"type": "t"}', None) == 1
        assert value(operator, bulk, "prioritize", '{"type": "t"}', "5") == 2
        assert "attempt" in str(operator.execute("select orchestrator.api_tasks(p_filter => '{\"priority\": 5}')").fetchone())
    assert set(column(conn, "select id::text from orchestrator.tasks where queued_at is not null and priority = 5")) == {later, ready}
    assert audit(conn) == []


def test_worker_and_operator_fire_schedules_and_an_auditor_sees_all_of_them_but_their_payloads(login, conn):
    with psycopg.connect(login("operator"), autocommit=True) as operator:
        operator.execute("select orchestrator.schedule('by hand', '@yearly', 'task:t', '{\"password\": \"hunter2\"}')")
        assert value(operator, "select orchestrator.pause_schedule('by hand')") is True
        assert value(operator, "select orchestrator.resume_schedule('by hand')") is True
        assert value(operator, "select orchestrator.fire_schedule('by hand')") is not None
        assert column(operator, "select name from orchestrator.schedule_states") == ["by hand"]
        assert audit(operator) == []
        operator.execute("select orchestrator.schedule('gone', '@yearly', 'task:t')")
        assert value(operator, "select orchestrator.unschedule('gone')") is True
    with psycopg.connect(login("worker"), autocommit=True) as worker:
        worker.execute("select orchestrator.schedule('each second', '@every 1 second', 'task:t')")
        conn.execute("update orchestrator.schedules set next_at = date_trunc('second', now() - interval '5 s') where name = 'each second'")
        assert value(worker, "select fired from orchestrator.promote_due()") == 1
        assert audit(worker) == []
    with psycopg.connect(login("auditor"), autocommit=True) as auditor:
        assert column(auditor, "select name from orchestrator.schedule_states") == ["by hand", "each second"]
        assert len(column(auditor, "select task_id from orchestrator.schedule_history('each second') where task_id is not null")) == 1
        assert len(column(auditor, "select at from orchestrator.fire_times('@hourly') f(at)")) == 5
        assert value(auditor, "select orchestrator.api_overview()")["schedules"][1]["name"] == "by hand"
        assert audit(auditor) == []
        for query in ("select payload from orchestrator.schedules", "select * from orchestrator.schedules",
                      "select orchestrator.schedule('x', '@daily', 't')", "select orchestrator.fire_schedule('by hand')",
                      "update orchestrator.schedules set paused = true"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                auditor.execute(query)
    with psycopg.connect(login("producer"), autocommit=True) as producer:
        for query in ("select name from orchestrator.schedules", "select * from orchestrator.schedule_states",
                      "select orchestrator.schedule('x', '@daily', 't')"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                producer.execute(query)


def test_worker_records_steps_operator_signals_and_nobody_else_reads_what_they_hold(login, conn):
    register(conn)
    id = enqueue(conn)
    with psycopg.connect(login("worker"), autocommit=True) as worker, psycopg.connect(login("operator"), autocommit=True) as operator, \
            psycopg.connect(login("auditor"), autocommit=True) as auditor:
        [flying] = claim(worker, limit=1)
        assert value(worker, "select orchestrator.record_step(%s, %s, 'charge', '{\"token\": \"hunter2\"}')", flying["claim_id"], id)
        assert value(worker, "select held from orchestrator.await_signal(%s, %s, 'go')", flying["claim_id"], id)
        assert value(worker, "select orchestrator.snooze_task(%s, %s, '1 hour')", flying["claim_id"], id) == "snoozed"
        assert "signal 'go'" in value(operator, "select orchestrator.explain_task(%s)", id)
        assert value(operator, "select orchestrator.signal_task(%s, 'go', '{\"pin\": 1}')", id) == "delivered"
        assert value(worker, "select orchestrator.steps(%s)", id) == {"charge": {"token": "hunter2"}, "go": {"pin": 1}}
        assert "hunter2" not in str(value(auditor, "select orchestrator.show_task(%s)", id))
        assert value(operator, "select orchestrator.cancel_task(%s)", id) == "cancelled"
        assert value(operator, "select orchestrator.retry_task(%s, true)", id) == "pending"
        assert value(worker, "select orchestrator.steps(%s)", id) == {}
        for user in (operator, auditor):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                user.execute("select result from orchestrator.task_steps")
        assert audit(auditor) == audit(operator) == []


def post(address: str, action: str, **body: str) -> tuple[int, Any]:
    request = urllib.request.Request(f"{address}/api/{action}", json.dumps(body).encode(), {"Authorization": "Bearer secret"})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def get(address: str, path: str) -> str:
    with urllib.request.urlopen(address + path, timeout=10) as answer:
        return str(answer.read().decode())


def test_a_whole_worker_runs_under_its_role_alone(login, conn, worker_process, tmp_path):
    """It runs tasks of every outcome, leads, recovers, prunes, counts and serves the page; another role acts through the page."""
    (tmp_path / "handlers.py").write_text(HANDLERS)
    register(conn, "dead", ["task:ok"])
    orphan = enqueue(conn, "task:ok")
    claim(conn, "dead", ["task:ok"])
    conn.execute("update orchestrator.workers set last_heartbeat = now() - interval '1 hour'")
    kinds = ["task:ok", "task:fail", "task:discard", "task:written", "task:pattern:x", "task:wait"]
    settings = {"ADMIN_TOKEN": "secret", "DISTRIBUTED_MODE": "true", "HEARTBEAT_INTERVAL": "300ms", "WORKER_TIMEOUT": "2s",
                "LEADER_TERM": "2s", "CLEANUP_INTERVAL": "200ms", "RETENTION_COMPLETED": "1s", "RETENTION_DEAD_LETTER": "1s"}
    worker = worker_process(login("worker"), **settings)
    with psycopg.connect(login("producer"), autocommit=True) as producer:
        ids = {kind: enqueue(producer, kind) for kind in kinds}
        snoozed = enqueue(producer, "task:discard", priority=1)
    state = "select status::text from orchestrator.tasks where id = %s"
    eventually(lambda: value(conn, state, ids["task:wait"]) == "running")
    eventually(lambda: column(conn, "select id from orchestrator.workers where is_leader and id <> 'dead'"))
    for kind in ("overview", "history", "tasks", "failures"):
        assert "error" not in json.loads(get(worker.address, f"/api/{kind}"))
    assert eventually(lambda: 'tasks_pending{type="task:ok"}' in get(worker.address, "/metrics"), 15)
    assert post(worker.address, "cancel", id=ids["task:wait"])[0] == 403
    operator = worker_process(login("worker", "operator"), **settings)
    assert post(operator.address, "cancel", id=ids["task:wait"]) == (200, {"result": "cancelling"})
    eventually(lambda: value(conn, "select count(*) from orchestrator.workers where id = 'dead'") == 0)   # recovered, so it can run
    assert post(operator.address, "pause", type="task:ok")[0] == 200
    # everything that ended is pruned after a second, the orphan of the dead worker too; what is snoozed over and over stays
    gone = [*ids.values(), orphan]
    eventually(lambda: column(conn, "select id::text from orchestrator.tasks where id = any (%s::uuid[])", gone) == [], 20)
    assert value(conn, state, snoozed) in ("pending", "claimed", "running")
    assert (worker.stop(), operator.stop()) == (0, 0)
    assert "permission denied" not in worker.output + operator.output.replace("cancel: permission denied", "")
    assert audit(conn) == []


def test_a_worker_without_a_role_says_that_it_lacks_a_right(login, run_cli):
    done = run_cli("run", env={"DATABASE_URL": login(), "METRICS_PORT": 0})
    assert done.returncode == 2
    assert "permission denied" in done.stderr and "Security in docs/operations.md" in done.stderr
    assert "Traceback" not in done.stderr


def test_printed_sql_is_what_a_dba_runs_and_a_worker_then_needs_no_ddl(server, db, run_cli, worker_process, tmp_path):
    printed = run_cli("install", "--print").stdout
    file = tmp_path / "install.sql"
    for _ in range(2):   # a DBA may run it again
        file.write_text(printed)
        done = subprocess.run([server.bin / "psql", db, "-qX", "-v", "ON_ERROR_STOP=1", "-f", file], check=False,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    with psycopg.connect(db, autocommit=True) as conn:
        conn.execute("create role plain_worker login password 'secret' in role orchestrator_worker")
        try:
            worker = worker_process(as_user(db, "plain_worker"))
            assert worker.stop() == 0
            assert "permission denied" not in worker.output
        finally:
            conn.execute("drop role plain_worker")


def test_install_by_a_role_that_may_not_create_roles_works_and_says_so():
    server = LocalServer()
    try:
        db = server.create_database()
        with server.connect() as admin:
            admin.execute("create role plain login")
            admin.execute(sql.SQL("grant create on database {} to plain").format(sql.Identifier(urlsplit(db).path[1:])))
            notices: list[str] = []
            with psycopg.connect(as_user(db, "plain")) as conn:
                conn.add_notice_handler(lambda diagnostic: notices.append(diagnostic.message_primary or ""))
                install_schema_on(conn)
            assert sum("may not be created" in notice for notice in notices) == 4
            with psycopg.connect(as_user(db, "plain"), autocommit=True) as conn:
                enqueue(conn)
                assert audit(conn) == []
                assert value(conn, "select has_function_privilege('public', 'orchestrator.schema_version()', 'execute')") is False
            for role in ROLES:
                admin.execute(f"create role orchestrator_{role}")
        install_schema(as_user(db, "plain"))
        with psycopg.connect(as_user(db, "plain"), autocommit=True) as conn:
            assert value(conn, "select has_function_privilege('orchestrator_worker', "
                               "'orchestrator.claim_tasks(text, text[], int, bigint)', 'execute')") is True
    finally:
        server.stop()


def install_schema_on(conn: psycopg.Connection[Any]) -> None:
    import orchestrator

    for text in orchestrator.install_sql():
        conn.execute(text.encode())
