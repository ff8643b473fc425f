"""What is seen of an error: the user's own frame, its causes, who holds the event loop, a database that can't be reached, hooks."""
from __future__ import annotations

import asyncio
import json
import logging
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest

import orchestrator
from apps import make_app, running, story, wait_for, worker_of
from orchestrator import Discard, Handler, Orchestrator, Retry, Task, backoff, wont_mend
from postgres import Server, eventually
from steps import value

Connection = psycopg.Connection[Any]
HERE = Path(__file__).name


def line_of(function: Callable[..., Any], marker: str) -> int:
    """The number of the line of this file, in this function, that holds the marker."""
    first = function.__code__.co_firstlineno
    lines = Path(__file__).read_text().split("\n")[first - 1:]
    return first + next(n for n, line in enumerate(lines) if marker in line)


# -------------------------------------------------------------------------------------------------------------- frames
def parses(task: Task) -> None:
    json.loads("{")   # the users line


def inner() -> None:
    json.loads("{")   # the inner line


def calls_inner(task: Task) -> None:
    inner()


def in_a_lambda(task: Task) -> Any:
    return sorted([1, "a"], key=lambda x: x + 1)   # the lambda line


async def asynchronous(task: Task) -> None:
    await asyncio.wait_for(asyncio.get_running_loop().create_future(), 0.01)   # the async line


def by_a_cursor(task: Task) -> None:
    with task.transaction() as connection:
        connection.execute("select 1/0")   # the cursor line


@pytest.mark.parametrize(("handler", "marker", "name", "also"), [
    (parses, "# the users line", "parses", "decoder.py"), (calls_inner, "# the inner line", "inner", "decoder.py"),
    (in_a_lambda, "# the lambda line", "<lambda>", "TypeError"), (asynchronous, "# the async line", "asynchronous", "Timeout"),
    (by_a_cursor, "# the cursor line", "by_a_cursor", "DivisionByZero")])
def test_the_last_frame_of_the_users_own_code_is_named(
        installed: str, handler: Callable[[Task], Any], marker: str, name: str, also: str) -> None:
    with running(installed, {"a": Handler(handler, max_retries=0)}) as app:
        task = wait_for(app, app.enqueue("a"))
    source = inner if handler is calls_inner else handler
    assert task["last_error"].endswith(f"({HERE}:{line_of(source, marker)} in {name})")
    assert "site-packages" not in task["last_error"] and "\n" not in task["last_error"].strip()
    failed = next(event for event in task["events"] if event["event"] == "failed")["detail"]
    assert also in failed and "Traceback" in failed and f"in {name}" in failed


def test_an_error_without_a_frame_of_the_users_names_the_innermost(installed: str) -> None:
    with running(installed, {"a": Handler(json.loads, max_retries=0), "b": Handler(int, max_retries=0)}) as app:   # type: ignore[arg-type]
        assert "TypeError" in wait_for(app, app.enqueue("a"))["last_error"]
        assert "TypeError" in wait_for(app, app.enqueue("b"))["last_error"]


def chained(task: Task) -> None:
    try:
        try:
            raise KeyError("the first cause")
        except KeyError as error:
            raise OSError("the second") from error
    except OSError:
        raise RuntimeError("what was seen")   # noqa: B904 - implicitly chained


def grouped(task: Task) -> None:
    raise ExceptionGroup("several", [ValueError("one of them"), OSError("another")])


def noted(task: Task) -> None:
    error = ValueError("told")
    error.add_note("a note on it")
    raise error


@pytest.mark.parametrize(("handler", "said"), [
    (chained, ["the first cause", "the second", "what was seen", "direct cause", "During handling"]),
    (grouped, ["several", "one of them", "another"]), (noted, ["told", "a note on it"])])
def test_the_event_keeps_causes_groups_and_notes(installed: str, handler: Callable[[Task], Any], said: list[str]) -> None:
    with running(installed, {"a": Handler(handler, max_retries=0)}) as app:
        task = wait_for(app, app.enqueue("a"))
    detail = next(event for event in task["events"] if event["event"] == "failed")["detail"]
    assert [words for words in said if words not in detail] == []


def endless(task: Task) -> None:
    def down(n: int) -> None:
        raise ValueError("x" * 100_000) if n == 0 else down(n - 1)   # type: ignore[misc]
    try:
        down(900)
    except ValueError as error:
        raise RuntimeError("y" * 100_000) from error


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise SystemExit(1)


def unspeakable(task: Task) -> None:
    raise Unspeakable from Unspeakable()


def cyclic(task: Task) -> None:
    one, two = ValueError("one"), ValueError("two")
    one.__cause__, two.__cause__ = two, one
    raise one


@pytest.mark.parametrize("handler", [endless, unspeakable, cyclic])
def test_what_is_kept_of_an_error_is_bounded_whatever_it_is(installed: str, conn: Connection, handler: Callable[[Task], Any]) -> None:
    with running(installed, {"a": Handler(handler, max_retries=0), "ok": lambda task: "ok"}, worker_pool_size=1) as app:
        task = wait_for(app, app.enqueue("a"))
        assert wait_for(app, app.enqueue("ok"))["result"] == "ok"   # the only thread lives
    assert len(task["last_error"]) <= 8000
    assert value(conn, "select max(length(detail)) from orchestrator.task_events") <= 8000


def test_a_retry_and_a_discard_keep_their_words_and_their_causes(installed: str) -> None:
    def handler(task: Task) -> None:
        try:
            json.loads("{")
        except ValueError as error:
            raise (Discard if task.payload else Retry)("because of a bad file") from error

    with running(installed, {"a": Handler(handler, max_retries=0)}) as app:
        for kind in (0, 1):
            assert wait_for(app, app.enqueue("a", kind))["last_error"] == "because of a bad file"


# ----------------------------------------------------------------------------------------------- who holds the event loop
def test_the_handler_that_holds_the_event_loop_is_named_by_those_that_time_out_for_it(installed: str) -> None:
    holding, release, waiting = threading.Event(), threading.Event(), set[str]()

    async def holds(task: Task) -> None:
        while len(waiting) < 3:
            await asyncio.sleep(0.01)
        holding.set()
        release.wait(30)   # blocks all others

    async def waits(task: Task) -> None:
        waiting.add(task.id)
        await asyncio.sleep(600)

    with running(installed, {"holds": Handler(holds, max_retries=0), "waits": Handler(waits, max_retries=0, timeout=2)}) as app:
        holder = app.enqueue("holds")
        victims = [app.enqueue("waits") for _ in range(3)]
        try:
            assert holding.wait(30)
            eventually(lambda: all(task.cancel_reason == "timeout" for task in worker_of(app).pool.running() if task.type == "waits"))
        finally:
            release.set()
        for victim in victims:
            error = wait_for(app, victim)["last_error"]
            assert error.startswith("timed out after 2 s") and f"holds {holder} held the event loop" in error
        assert wait_for(app, holder)["status"] == "completed"


def test_a_timeout_of_its_own_blames_nobody(installed: str) -> None:
    async def waits(task: Task) -> None:
        await asyncio.sleep(600)

    with running(installed, {"waits": Handler(waits, max_retries=0, timeout=0.1), "sync": Handler(
            lambda task: task.sleep(600), max_retries=0, timeout=0.1)}) as app:
        assert wait_for(app, app.enqueue("waits"))["last_error"] == "timed out after 0.1 s"
        assert wait_for(app, app.enqueue("sync"))["last_error"] == "timed out after 0.1 s"


# -------------------------------------------------------------------------------------- a database that can't be reached
@pytest.mark.parametrize("what", ["database", "host", "role"])
def test_an_address_that_waiting_will_not_mend_is_said_once_with_a_hint(
        server: Server, installed: str, worker_process: Callable[..., Any], what: str) -> None:
    url = {"database": server.dsn("no_such_database"), "host": "postgresql://postgres@no-such-host.invalid/d",
           "role": installed.replace("postgres@", "nobody_here@", 1)}[what]
    worker = worker_process(url, wait=False)
    eventually(lambda: len(re.findall("database: ", worker.output)) >= 3, 40)
    time.sleep(1.5)   # some more tries
    worker.kill()
    lines = worker.output.splitlines()
    told = [line for line in lines if "WARNING heartbeat: database: " in line]
    assert [line for line in told if "check the user, the host and the name of the database" not in line] == []
    assert len(told) <= 4   # at the 1st, 2nd, 4th, 8th time
    waiting = [line for line in lines if "waiting for the database" in line]
    assert len(waiting) == 1 and " ERROR " in waiting[0]
    assert "Traceback" not in worker.output


def test_a_server_that_only_starts_late_is_waited_for_quietly(worker_process: Callable[..., Any]) -> None:
    worker = worker_process("postgresql://postgres@127.0.0.1:1/d", wait=False)
    eventually(lambda: "waiting for the database" in worker.output, 40)
    worker.kill()
    assert " ERROR " not in worker.output and "check the user" not in worker.output


@pytest.mark.parametrize("what", ["database", "host", "role"])
def test_enqueuing_there_says_what_to_check_in_one_line(server: Server, installed: str, run_cli: Callable[..., Any], what: str) -> None:
    url = {"database": server.dsn("no_such_database"), "host": "postgresql://postgres@no-such-host.invalid/d",
           "role": installed.replace("postgres@", "nobody_here@", 1)}[what]
    done = run_cli("enqueue", "a", env={"DATABASE_URL": url})
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: DATABASE_URL: ") and "check the user, the host and the name of the database" in done.stderr


def test_tries_get_rarer_up_to_two_seconds_and_differ() -> None:
    waits = [[backoff(tries) for _ in range(20)] for tries in range(12)]
    assert all(0.02 < wait <= 0.05 for wait in waits[0]) and all(1 <= wait <= 2 for wait in waits[-1])
    assert len(set(waits[-1])) > 10   # so that many workers don't come at once


def test_only_what_waiting_will_not_mend_is_called_so(installed: str) -> None:
    def failure(url: str) -> psycopg.Error:
        with pytest.raises(psycopg.OperationalError) as caught:
            psycopg.connect(url, connect_timeout=3)
        return caught.value

    assert wont_mend(failure(installed + "_not_there"))
    assert not wont_mend(failure("postgresql://postgres@127.0.0.1:1/d"))
    assert not wont_mend(psycopg.errors.CannotConnectNow("the database system is starting up"))


# --------------------------------------------------------------------------------------------------------------- hooks
def test_a_dead_letter_hook_hears_of_every_kind_of_end_and_its_own_errors_harm_nobody(
        installed: str, caplog: pytest.LogCaptureFixture) -> None:
    heard: list[tuple[str, str]] = []
    app = make_app(installed, {
        "raises": Handler(parses, max_retries=0), "discards": lambda task: (_ for _ in ()).throw(Discard("never")),
        "late": Handler(lambda task: task.sleep(600), max_retries=0, timeout=0.1), "exits": Handler(exits, max_retries=0),
        "retried": Handler(parses, max_retries=1, base_delay=0), "fine": lambda task: None, "used": Handler(asynchronous, max_retries=0)})

    @app.on_dead_letter
    def raises(task: Task, error: str) -> None:
        raise SystemExit(f"the hook's own, for {task.type}")

    @app.on_dead_letter
    def hears(task: Task, error: str) -> None:
        heard.append((task.type, error))

    with caplog.at_level(logging.INFO, "orchestrator"), running(installed, app):
        ids = {kind: app.enqueue(kind) for kind in ("raises", "discards", "late", "exits", "retried", "fine", "used")}
        ended = {kind: wait_for(app, id) for kind, id in ids.items()}
        eventually(lambda: len(heard) >= 6)
    assert sorted(kind for kind, _ in heard) == ["discards", "exits", "late", "raises", "retried", "used"]
    for kind, error in heard:
        assert error == ended[kind]["last_error"] and ended[kind]["status"] == "dead_letter"
    assert dict(heard)["late"].startswith("timed out") and dict(heard)["discards"] == "never"
    assert sum("on_dead_letter: SystemExit: the hook's own" in record.getMessage() for record in caplog.records) == 6
    assert raises.__name__ == "raises"   # the decorator returns the function


def exits(task: Task) -> None:
    raise SystemExit(3)


def test_a_slow_hook_holds_up_no_outcome(installed: str) -> None:
    go_on, called = threading.Event(), threading.Event()
    app = make_app(installed, {"bad": Handler(exits, max_retries=0), "ok": lambda task: "ok"})

    @app.on_dead_letter
    def slow(task: Task, error: str) -> None:
        called.set()
        go_on.wait(30)

    with running(installed, app):
        wait_for(app, app.enqueue("bad"))
        assert called.wait(20)
        assert wait_for(app, app.enqueue("ok"))["result"] == "ok" and wait_for(app, app.enqueue("bad"))["status"] == "dead_letter"
        go_on.set()


def test_a_hook_may_be_async(installed: str) -> None:
    heard = threading.Event()
    app = make_app(installed, {"bad": Handler(exits, max_retries=0)})

    async def hook(task: Task, error: str) -> None:
        await asyncio.sleep(0)
        heard.set()

    app.on_dead_letter(hook)
    with running(installed, app):
        wait_for(app, app.enqueue("bad"))
        assert heard.wait(20)


def test_hooks_that_wait_are_called_before_the_worker_has_stopped(installed: str) -> None:
    heard = []
    app = make_app(installed, {"bad": Handler(exits, max_retries=0)})
    app.on_dead_letter(lambda task, error: heard.append(task.payload))
    app.start()
    ids = app.enqueue_many("bad", range(20))
    for id in ids:
        wait_for(app, id)
    app.stop(5)
    assert sorted(heard) == list(range(20))


def test_the_log_says_all_in_the_message_whatever_the_programs_format_is(installed: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), running(installed, {"bad": Handler(exits, max_retries=0)}) as app:
        task_id = app.enqueue("bad")
        wait_for(app, task_id)
        eventually(lambda: any("dead_letter" in record.getMessage() for record in caplog.records))
    [said] = [record for record in caplog.records if "dead_letter" in record.getMessage()]
    assert all(words in said.getMessage() for words in (task_id, "bad", "SystemExit: 3", "attempt 1"))
    assert said.__dict__["task_id"] == task_id and said.__dict__["error"] == story_error(installed, task_id)


def story_error(url: str, task_id: str) -> str:
    app = Orchestrator(url)
    error: str = story(app, task_id)["last_error"]
    app.close()
    return error


def test_a_handlers_own_lines_carry_its_tasks_id(installed: str, worker_process: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "speaking.py").write_text("""
import asyncio, logging
log = logging.getLogger("mine")

def sync(task):
    log.info("said by %s", task.type)

async def asynchronous(task):
    await asyncio.sleep(0)
    log.info("said by %s", task.type)

HANDLERS = {"sync": sync, "async": asynchronous}
""")
    for format in ("text", "json"):
        worker = worker_process(installed, HANDLERS="speaking", LOG_FORMAT=format)
        app = make_app(installed)
        ids = {kind: app.enqueue(kind) for kind in ("sync", "async")}
        for kind, id in ids.items():
            wait_for(app, id, timeout=30)
            [line] = [line for line in worker.output.splitlines() if f"said by {kind}" in line]
            if format == "text":
                assert f"INFO [{id}] said by {kind}" in line
            else:
                assert (json.loads(line)["task_id"], json.loads(line)["level"]) == (id, "INFO")
        app.close()
        assert worker.stop() == 0


def test_urls_in_errors_of_the_database_are_redacted() -> None:
    assert "canary" not in orchestrator.database_problem(psycopg.OperationalError("postgresql://u:canary@h/d does not exist"))
    assert urlsplit("postgresql://u:canary@h/d").password == "canary"
