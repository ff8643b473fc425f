"""A connection for one thread: calls by name, what breaks it, what it waits for and for how long, what its session relies on."""
from __future__ import annotations

import datetime
import os
import signal
import threading
import time
from typing import Any

import psycopg
import pytest

import orchestrator
from apps import Relay, make_app
from orchestrator import After, Link
from postgres import LocalServer, eventually
from steps import value

Connection = psycopg.Connection[Any]


@pytest.fixture
def link(installed: str) -> Any:
    made = Link(make_app(installed).config)
    yield made
    made.close()


def define(conn: Connection, name: str, arguments: str, result: str, body: str, language: str = "sql") -> None:
    conn.execute(f"create or replace function orchestrator.{name}({arguments}) returns {result} language {language} as $b$ {body} $b$")


def pid_of(link: Link) -> int:
    return link.open().info.backend_pid


# ------------------------------------------------------------------------------------------------------------ calls by name
def test_a_function_is_called_by_its_name_with_whatever_arguments(link: Link, conn: Connection) -> None:
    define(conn, "echo_", "p_text text, p_n int, p_at timestamptz default null", "table (a text, b int, c timestamptz)",
           "select p_text, p_n + 1, p_at")
    for argument, text in ((1, "1"), (2 ** 40, "1099511627776"), (None, None), (True, "t"), ("é", "é"), (0.5, "0.5"), ([1, 2], "{1,2}")):
        assert link.call("echo_", argument, 6) == [(text, 7, None)]
    assert link.call("echo_", p_n="1", p_text="x") == [("x", 2, None)]
    assert link.call("echo_", "x", p_n=1) == [("x", 2, None)]
    assert link.json("echo_", "x", 1) == [{"a": "x", "b": 2, "c": None}]
    [(_, _, at)] = link.call("echo_", "x", 1, After(3600))
    ahead = datetime.datetime.fromisoformat(at + ":00") - datetime.datetime.now(datetime.UTC)
    assert datetime.timedelta(minutes=59) < ahead < datetime.timedelta(minutes=61)


def test_a_view_is_read_by_its_name(link: Link, conn: Connection) -> None:
    conn.execute("create view orchestrator.two as select n, array[n] as many from generate_series(1, 2) n")
    assert link.view("two") == [{"n": 1, "many": [1]}, {"n": 2, "many": [2]}]


@pytest.mark.parametrize("bad", ["", "A", "x; drop table t", "x()", "x.y", "x1", "x" * 64, 'x"', "x\n", "ä", "x y", "x--"])
def test_what_is_not_a_name_is_refused_before_it_is_sent(link: Link, bad: str) -> None:
    for call in (lambda: link.call(bad), lambda: link.json(bad), lambda: link.view(bad), lambda: link.call("x", **{bad: 1})):
        with pytest.raises(ValueError, match="is not a name"):
            call()
    assert link.call("schema_version") == [(orchestrator.SCHEMA_VERSION,)]


def test_values_are_never_part_of_the_statement(link: Link, conn: Connection) -> None:
    define(conn, "echo_", "p_text text", "text", "select p_text")
    evil = "'); drop table orchestrator.tasks; --"
    assert link.call("echo_", evil) == [(evil,)] and link.call("echo_", p_text=evil) == [(evil,)]
    with psycopg.connect(conn.info.dsn) as other:
        assert orchestrator.call_in(other, "echo_", evil) == [(evil,)]


@pytest.mark.parametrize("texts", [[], [None], ["NULL", None, ""], ['a"b', "a\\b", '\\"', "a,b", "{x}", " ' ", "é\n\t"]])
def test_an_array_literal_holds_any_text(pure: Connection, texts: list[str | None]) -> None:
    assert value(pure, "select %s::text[]", orchestrator.texts(texts)) == texts


# ------------------------------------------------------------------------------------------------------------- while it waits
def test_a_link_does_something_else_while_the_server_works(link: Link, conn: Connection) -> None:
    conn.execute("create table seen (n int)")
    waited = "perform pg_advisory_xact_lock(1);"
    define(conn, "note", "", "int", f"begin {waited} insert into public.seen values (7); return 7; end", "plpgsql")
    define(conn, "divide", "p_n int", "int", f"begin {waited} return 1 / p_n; end", "plpgsql")
    define(conn, "echo_", "p_n int", "int", "select p_n")
    done: list[int] = []

    def meanwhile() -> None:
        done.append(1)
        conn.execute("select pg_advisory_unlock(1)")   # what the server waits for: called later, it would wait for ever
    conn.execute("select pg_advisory_lock(1)")
    assert link.call("note", meanwhile=meanwhile) == [(7,)]
    assert done == [1]
    assert value(conn, "select n from seen") == 7   # committed when it returns
    conn.execute("select pg_advisory_lock(1)")
    with pytest.raises(psycopg.errors.DivisionByZero):
        link.call("divide", 0, meanwhile=meanwhile)
    assert done == [1, 1]
    connection = link.open()
    with pytest.raises(ZeroDivisionError):
        link.call("echo_", 5, meanwhile=lambda: done.append(1 // 0))
    assert link.open() is not connection   # whose answer nobody read
    assert link.call("echo_", 5, meanwhile=lambda: done.append(3)) == [(5,)]
    assert done[2:] == [3]


def test_a_commit_that_fails_returns_no_rows_although_they_have_arrived(link: Link, conn: Connection) -> None:
    conn.execute("create table seen (n int unique deferrable initially deferred)")
    conn.execute("insert into seen values (7)")
    define(conn, "note", "", "int", "insert into public.seen values (7) returning n")
    with pytest.raises(psycopg.errors.UniqueViolation):
        link.call("note", meanwhile=lambda: None)


# ------------------------------------------------------------------------------------------------------- prepared statements
def test_a_link_opens_anew_when_its_prepared_statements_no_longer_fit(link: Link, conn: Connection) -> None:
    conn.execute("create view orchestrator.widened as select 1 as a")
    define(conn, "deallocate_", "", "void", "begin deallocate all; end", "plpgsql")
    define(conn, "one", "", "table (n int)", "select 1")
    assert link.call("one") == [(1,)]
    conn.execute("drop function orchestrator.one")
    define(conn, "one", "", "table (n int, m int)", "select 1, 2")
    with pytest.raises(psycopg.errors.FeatureNotSupported, match="cached plan"):
        link.call("one")
    assert link.call("one") == [(1, 2)]
    link.call("deallocate_")
    with pytest.raises(psycopg.errors.InvalidSqlStatementName):
        link.call("one")
    assert link.call("one") == [(1, 2)]
    connection = link.open()
    with pytest.raises(psycopg.errors.UndefinedFunction):
        link.call("not_there")
    assert link.call("schema_version") == [(1,)]   # under the name that the other didn't get
    assert link.open() is connection


def test_a_link_that_was_interrupted_while_preparing_opens_anew(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server has prepared it, and the link doesn't know: the name must not be used again."""
    connection = link.open()
    answer = link._answer

    def interrupted(connection: Connection) -> None:
        answer(connection)
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(link, "_answer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            link.call("schema_version")
    assert link.call("schema_version") == [(1,)]
    assert link.open() is not connection


@pytest.mark.parametrize("prepared", [True, False])
def test_a_link_prepares_each_call_once_if_at_all_and_keeps_no_answer(installed: str, conn: Connection, prepared: bool) -> None:
    define(conn, "echo_", "p_text text, p_n int", "table (a text, b int)", "select p_text, p_n + 1")
    define(conn, "prepared", "", "table (statement text)", "select statement from pg_prepared_statements where not from_sql")
    link = Link(make_app(installed, {}, prepared_statements=prepared).config)
    for n in range(20):
        assert link.call("echo_", n, 6) == [(str(n), 7)]
    statements = [row[0] for row in link.call("prepared")]
    assert [text for text in statements if "echo_" in text] == (["select * from orchestrator.echo_($1, $2) r"] if prepared else [])
    with pytest.raises(psycopg.InterfaceError):   # nothing that it could load
        link._adapter.load_rows(0, 1, tuple)
    link.close()


# --------------------------------------------------------------------------------------------------------- broken connections
@pytest.mark.parametrize(("sqlstate", "gone"), [
    ("08006", True), ("57P01", True), ("25006", True),                        # broken, shutting down, a standby by now
    ("42P01", False), ("53200", False), ("22012", False), ("40P01", False)])  # it will answer the next call
def test_a_connection_is_given_up_only_for_errors_of_its_own(link: Link, conn: Connection, sqlstate: str, gone: bool) -> None:
    define(conn, "fail", "", "void", f"begin raise exception using errcode = '{sqlstate}'; end", "plpgsql")
    pid = pid_of(link)
    with pytest.raises(psycopg.Error) as failed:
        link.call("fail")
    assert failed.value.sqlstate == sqlstate
    assert (pid_of(link) != pid) is gone


def test_a_server_that_falls_silent_is_given_up(link: Link, installed: str, conn: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that is stopped neither answers nor closes, which TCP keepalive can't see."""
    define(conn, "wait_", "", "void", "select pg_advisory_lock(1)")
    pid = pid_of(link)
    blocker = psycopg.connect(installed)
    blocker.execute("select pg_advisory_lock(1)")
    monkeypatch.setattr(orchestrator, "STATEMENT_TIMEOUT", -4.5)   # the client's own deadline is 5 s later
    began = time.monotonic()
    with pytest.raises(psycopg.OperationalError, match="has not answered for"):
        link.call("wait_")
    assert 0.4 < time.monotonic() - began < 5 and link.began is None
    monkeypatch.undo()
    blocker.close()
    assert pid_of(link) != pid


@pytest.mark.parametrize("during", ["is_pooled", "prepare_session", "listen"])
def test_a_server_that_falls_silent_right_after_connecting_is_given_up(
        installed: str, monkeypatch: pytest.MonkeyPatch, during: str) -> None:
    """Every wait of a link has its end, also those that make the session ready."""
    relay = Relay(installed)
    link = Link(make_app(relay.url).config)
    link.heard, link.channels = lambda channel: None, ("orchestrator",)
    function = "prepare_session" if during == "listen" else during
    original = getattr(orchestrator, function)

    def silent(*args: Any) -> Any:
        relay.silent = during != "listen"
        answer = original(*args)
        relay.silent = True
        return answer
    monkeypatch.setattr(orchestrator, function, silent)
    monkeypatch.setattr(orchestrator, "STATEMENT_TIMEOUT", -4.5)
    errors: list[BaseException] = []

    def connect() -> None:
        try:
            link.open()
        except psycopg.OperationalError as error:
            errors.append(error)
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(10)
    relay.cut()
    assert not thread.is_alive() and "has not answered" in str(errors[0])
    assert link.connection is None


def test_a_transaction_of_a_handlers_may_take_longer(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orchestrator, "STATEMENT_TIMEOUT", -4.9)
    with orchestrator.connect(make_app(installed).config) as connection:
        assert connection.execute("select 1 from pg_sleep(0.4)").fetchone() == (1,)


def test_a_stopped_backend_is_given_up(server: Any, link: Link, conn: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    if not isinstance(server, LocalServer):
        pytest.skip("needs a server whose processes it may stop")
    pid = pid_of(link)
    os.kill(pid, signal.SIGSTOP)
    try:
        monkeypatch.setattr(orchestrator, "STATEMENT_TIMEOUT", -4.5)
        with pytest.raises(psycopg.OperationalError, match="has not answered for"):
            link.call("schema_version")
        assert link.connection is None
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_connection_that_was_closed_while_idle_is_noticed_before_anything_is_sent(link: Link, conn: Connection) -> None:
    pid = pid_of(link)
    link.reopen_if_closed()
    assert pid_of(link) == pid
    conn.execute("select pg_terminate_backend(%s)", [pid])
    eventually(lambda: not value(conn, "select count(*) from pg_stat_activity where pid = %s", pid))
    eventually(lambda: link.reopen_if_closed() or link.connection is None)
    assert link.call("schema_version") == [(1,)]


# --------------------------------------------------------------------------------------------------------------- its session
def test_statements_are_prepared_unless_told_not_to(installed: str, conn: Connection) -> None:
    define(conn, "count_prepared", "", "bigint", "select count(*) from pg_prepared_statements")
    direct = Link(make_app(installed).config)
    plain = Link(make_app(installed, prepared_statements=False).config)
    assert (direct.call("count_prepared")[0][0], plain.call("count_prepared")[0][0]) == (1, 0)
    assert not direct.pooled and not plain.pooled
    direct.close()
    plain.close()


HOSTILE = {"default_transaction_isolation": "repeatable read", "default_transaction_read_only": "on", "datestyle": "German, DMY",
           "search_path": "hostile, public", "timezone": "Asia/Kathmandu", "standard_conforming_strings": "off", "array_nulls": "off",
           "transform_null_equals": "on", "lock_timeout": "1ms", "statement_timeout": "1ms", "extra_float_digits": "-15",
           "intervalstyle": "iso_8601", "bytea_output": "escape", "row_security": "off"}


def test_a_session_relies_on_nothing_that_alter_database_can_change(installed: str, conn: Connection) -> None:
    for name, setting in HOSTILE.items():
        conn.execute(f"alter database {conn.info.dbname} set {name} = {setting!r}" if name != "search_path" else
                     f"alter database {conn.info.dbname} set search_path = {setting}")
    link = Link(make_app(installed).config)
    link.open()
    assert not link.pooled
    query = "select lower(name), setting from pg_settings where lower(name) = any (%s)"
    found = dict(link.open().execute(query, [list(HOSTILE)]).fetchall())
    assert found == {**{name: orchestrator.SESSION[name] for name in HOSTILE}, "lock_timeout": "10000", "statement_timeout": "15000"}
    link.close()
