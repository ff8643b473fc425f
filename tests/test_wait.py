"""Waiting for the end of tasks: wait_tasks, app.wait and the commands, all by looking again."""
from __future__ import annotations

import asyncio
import json
import pickle
import time
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest

import orchestrator
from apps import make_app, running
from orchestrator import TaskFailed
from postgres import eventually
from steps import backend, background, cancel, claim_one, complete, enqueue, fail, register, retry, rows, start, value

NOBODY = "00000000-0000-7000-8000-000000000000"


def wait(conn: Any, *ids: str, timeout: str = "20 seconds") -> list[dict[str, Any]]:
    return rows(conn, "select id::text, status, result, error from orchestrator.wait_tasks(%s::uuid[], %s)", list(ids), timeout)


def waits(watcher: Any, conn: Any) -> None:
    """Until `conn` sleeps between two looks."""
    eventually(lambda: value(watcher, "select wait_event = 'PgSleep' from pg_stat_activity where pid = %s", backend(conn)))


def finish(conn: Any, id: str, result: Any = None) -> None:
    conn.execute("select * from orchestrator.complete_tasks(array[%s], '{1}', array[%s]::uuid[], array[%s]::jsonb[])",
                 [claim_one(conn)[0], id, json.dumps(result)])


# --- SQL -----------------------------------------------------------------------------------------------------------------------

def test_what_has_ended_is_told_at_once_in_the_order_that_was_asked(conn):
    register(conn)
    done = enqueue(conn)
    finish(conn, done, {"n": 1})
    dead, gone = enqueue(conn), enqueue(conn)
    fail(conn, *claim_one(conn), "no way", permanent=True)
    cancel(conn, gone)
    before = time.monotonic()
    assert [tuple(t.values()) for t in wait(conn, gone, done, NOBODY, dead, done)] == [
        (gone, "cancelled", None, None), (done, "completed", {"n": 1}, None), (NOBODY, "not_found", None, None),
        (dead, "dead_letter", None, "no way"), (done, "completed", {"n": 1}, None)]
    assert wait(conn) == [] and time.monotonic() - before < 5


def test_an_error_of_an_earlier_attempt_is_not_that_of_a_completed_task(conn):
    register(conn)
    id = enqueue(conn)
    fail(conn, *claim_one(conn), after="0")
    conn.execute("select orchestrator.promote_due()")
    finish(conn, id)
    assert [(t["status"], t["error"]) for t in wait(conn, id)] == [("completed", None)]


@pytest.mark.parametrize("timeout", ["0", "-1 second", "20 milliseconds"])
def test_what_has_not_ended_by_then_is_told_as_it_is(conn, timeout):
    register(conn)
    running_one, delayed = enqueue(conn), enqueue(conn)
    conn.execute("update orchestrator.tasks set queued_at = null, next_retry_at = now() + interval '1 day' where id = %s", [delayed])
    start(conn, *claim_one(conn))
    assert [t["status"] for t in wait(conn, running_one, delayed, timeout=timeout)] == ["running", "pending"]


@pytest.mark.parametrize("end", ["complete", "cancel", "fail"])
def test_one_statement_waits_until_the_last_task_has_ended(conn, connect, end):
    register(conn)
    first, second = enqueue(conn), enqueue(conn)
    waiter = connect()
    answer = background(lambda: wait(waiter, first, second))
    waits(conn, waiter)
    finish(conn, first, 1)
    waits(conn, waiter)
    assert not answer.done()
    if end == "cancel":
        cancel(conn, second)
    else:
        claim = claim_one(conn)
        fail(conn, *claim, permanent=True) if end == "fail" else complete(conn, *claim)
    expected = {"complete": "completed", "cancel": "cancelled", "fail": "dead_letter"}[end]
    assert [t["status"] for t in answer.result(10)] == ["completed", expected]


def test_a_task_that_an_operator_retries_is_waited_for_again(conn, connect):
    register(conn)
    id = enqueue(conn)
    fail(conn, *claim_one(conn), permanent=True)
    retry(conn, id)
    waiter = connect()
    answer = background(lambda: wait(waiter, id))
    waits(conn, waiter)
    finish(conn, id, "later")
    assert answer.result(10)[0]["result"] == "later"


def test_a_task_of_the_waiting_transaction_itself_is_refused(conn, connect):
    caller = connect(autocommit=False)
    id = enqueue(caller)
    with pytest.raises(psycopg.Error, match="ids: has a task of this transaction") as error, caller.transaction():
        wait(caller, id)
    assert error.value.sqlstate == "OR001" and error.value.diag.message_hint == "Commit first."
    other = enqueue(conn)
    assert wait(caller, other, timeout="10 milliseconds")[0]["status"] == "pending"
    assert wait(caller, id, timeout="0")[0]["status"] == "pending"   # a look is no wait


# --- a program -----------------------------------------------------------------------------------------------------------------

def test_a_program_gets_the_results_of_handlers_in_the_order_that_it_asks_for(installed):
    with running(installed, {"double": lambda task: task.payload * 2, "nothing": lambda task: None}) as app:
        ids = app.enqueue_many("double", [1, 2, 3])
        assert app.wait_all(reversed(ids)) == [6, 4, 2]
        assert app.wait_all([ids[0], ids[0]]) == [2, 2] and app.wait_all([]) == []
        assert app.wait(ids[1].upper()) == 4
        assert app.wait(app.enqueue("nothing"), "10s") is None
        assert asyncio.run(app.wait_async(app.enqueue("double", "ab"))) == "abab"


@pytest.mark.timeout(60)
def test_a_program_that_gives_up_a_wait_can_end(installed):
    """asyncio.run() waits for the threads of its loop."""
    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(app.wait_async(id, timeout=3600), 0.1)

    app = make_app(installed)
    id = app.enqueue("never")
    asyncio.run(give_up())
    app.close()


def test_a_program_is_told_how_a_task_failed(installed):
    def discard(task: Any) -> None:
        raise orchestrator.Discard("no stock")

    with running(installed, {"ok": lambda task: 1, "discard": discard}) as app:
        ids = [app.enqueue("ok"), app.enqueue("discard"), app.enqueue("other")]
        app.cancel(ids[2])
        for asked, status, error in ((ids[1], "dead_letter", "no stock"), (ids[2], "cancelled", None), (NOBODY, "not_found", None)):
            with pytest.raises(TaskFailed) as failed:
                app.wait(asked)
            assert (failed.value.status, failed.value.error, failed.value.id) == (status, error, asked)
            assert pickle.loads(pickle.dumps(failed.value)).status == status
            assert str(failed.value) == f"task {asked}: {status}" + (": no stock" if error else "")
        with pytest.raises(TaskFailed, match="dead_letter: no stock"):   # the first of those that were asked for
            app.wait_all(ids)


def test_waiting_ends_in_time_and_without_a_connection_held(installed, monkeypatch):
    monkeypatch.setattr(orchestrator, "LINKS", 1)
    app = make_app(installed)
    id = app.enqueue("a")
    for timeout in (0, 0.05, "50ms"):
        before = time.monotonic()
        with pytest.raises(TimeoutError, match=f"task {id} has not ended"):
            app.wait(id, timeout)
        assert time.monotonic() - before < 5
    waiting = background(lambda: app.wait(id, 20))
    app.cancel(id)   # by that one connection
    with pytest.raises(TaskFailed, match="cancelled"):
        waiting.result(10)
    app.close()


def test_waiting_looks_less_and_less_often_and_only_at_what_has_not_ended(installed, monkeypatch, conn):
    app = make_app(installed)
    first, second = app.enqueue("a"), app.enqueue("a")
    looks: list[str] = []
    pauses: list[float] = []
    asked = app.json

    def call(function: str, ids: str, timeout: str) -> Any:
        looks.append(ids)
        assert timeout == "0"
        return asked(function, ids, timeout)

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            cancel(conn, first)
        if len(pauses) == 15:
            cancel(conn, second)

    monkeypatch.setattr(app, "json", call)
    given_up: Any = SimpleNamespace(wait=sleep)
    assert [task["status"] for task in app._wait([first, second], 1000, given_up)[0]] == ["cancelled", "cancelled"]
    assert looks == [f"{{{first},{second}}}"] * 4 + [f"{{{second}}}"] * 12
    assert pauses[:2] == [0.01, 0.015] and pauses[-1] == 0.5 and pauses == sorted(pauses)
    app.close()


@pytest.mark.parametrize(("ids", "timeout", "problem"), [(["x"], 1, "id: must be"), ([NOBODY], -1, "timeout: "),
    ([NOBODY], "soon", "timeout: ")])
def test_what_is_wrong_with_a_wait_is_named(ids, timeout, problem):
    with pytest.raises(ValueError, match=problem):
        orchestrator.Orchestrator("postgresql://127.0.0.1:1/nowhere").wait_all(ids, timeout)


# --- commands ------------------------------------------------------------------------------------------------------------------

def test_the_command_wait_prints_results_and_says_by_its_exit_code_how_it_ended(installed, conn, run_cli):
    def run(*args: str) -> tuple[int, str, str]:
        done = run_cli(*args, env={"DATABASE_URL": installed})
        return done.returncode, done.stdout, done.stderr

    register(conn)
    done = enqueue(conn)
    finish(conn, done, {"n": "ü\u009b"})
    dead = enqueue(conn)
    fail(conn, *claim_one(conn), "no\x1b[31m way", permanent=True)
    waiting = enqueue(conn)
    assert run("wait", done) == (0, '{"n": "\\u00fc\\u009b"}\n', "")
    assert run("wait", done, dead) == (1, '{"n": "\\u00fc\\u009b"}\n', f"error: task {dead}: dead_letter: no [31m way\n")
    assert run("wait", dead) == (1, "", f"error: task {dead}: dead_letter: no [31m way\n")
    assert run("wait", done, waiting, "--timeout", "20ms") == (3, "", f"error: task {waiting} has not ended\n")
    code, out, _ = run("wait", done, dead, "--json")
    assert code == 1 and json.loads(out) == [
        {"id": done, "status": "completed", "result": {"n": "ü\u009b"}, "error": None},
        {"id": dead, "status": "dead_letter", "result": None, "error": "no\x1b[31m way"}]
    for args, problem in ((("wait", "x"), "id: "), (("wait", done, "--timeout", "soon"), "timeout: "),
                          (("enqueue", "t", "--timeout", "1m"), "--timeout: "), (("wait",), "the following arguments")):
        code, out, error = run(*args)
        assert code == 2 and out == "" and problem in error


def test_enqueue_wait_prints_the_result_of_the_task(installed, run_cli):
    with running(installed, {"double": lambda task: task.payload * 2}):
        done = run_cli("enqueue", "double", "21", "--wait", "--timeout", "20s", env={"DATABASE_URL": installed})
    assert (done.returncode, done.stdout, done.stderr) == (0, "42\n", "")
    late = run_cli("enqueue", "double", "21", "--wait", "--timeout", "0", env={"DATABASE_URL": installed})
    assert late.returncode == 3 and late.stdout == "" and "has not ended" in late.stderr
