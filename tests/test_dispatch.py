"""Running one task: how each way a handler can end is recorded; async handlers; transactions; what a task can be asked."""
from __future__ import annotations

import asyncio
import contextlib
import enum
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import psycopg
import pytest

import orchestrator
from apps import Gate, audit, events, make_app, obedient, raising, running, story, wait_for, worker_of
from orchestrator import Cancelled, ClaimLost, Discard, Handler, Retry, Router, Snooze, Task
from postgres import eventually
from steps import value

Connection = psycopg.Connection[Any]


# ------------------------------------------------------------------------------------------------------------ outcomes
class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no message")


class Exiting(Exception):
    def __str__(self) -> str:
        raise SystemExit(1)


class Unprintable(Exception):
    """Neither a message nor a traceback can be had."""

    def __str__(self) -> str:
        raise KeyboardInterrupt

    def __getattribute__(self, name: str) -> Any:
        if name in ("__cause__", "__context__", "__notes__", "__suppress_context__"):
            raise SystemExit(1)
        return super().__getattribute__(name)


OUTCOMES: dict[str, tuple[Callable[[Task], Any], str, Any]] = {   # what it does, the status, what last_error says or the result is
    "none": (lambda task: None, "completed", None),
    "result": (lambda task: {"sum": [1, "ü", None]}, "completed", {"sum": [1, "ü", None]}),
    "false": (lambda task: False, "completed", False),
    "set": (lambda task: {7}, "completed", [7]),
    "exception": (raising(ValueError("boom")), "dead_letter", "ValueError: boom (apps.py:"),
    "discard": (raising(Discard("no such customer")), "dead_letter", "no such customer"),
    "discard without words": (raising(Discard()), "dead_letter", "discarded"),
    "exit": (raising(SystemExit(3)), "dead_letter", "SystemExit: 3"),
    "interrupt": (raising(KeyboardInterrupt()), "dead_letter", "KeyboardInterrupt: "),
    "cancelled by itself": (raising(Cancelled("why not")), "dead_letter", "Cancelled: why not"),
    "unspeakable": (raising(Unspeakable()), "dead_letter", "Unspeakable: (its message cannot be shown)"),
    "exits when asked for its message": (raising(Exiting()), "dead_letter", "Exiting: (its message cannot be shown)"),
    "unprintable": (raising(Unprintable()), "dead_letter", "Unprintable: (its message cannot be shown)"),
    "discard with a message that exits": (raising(Discard(Exiting())), "dead_letter", "(its message cannot be shown)"),
    "NUL in the error": (raising(ValueError("a\0b")), "dead_letter", "ValueError: a\N{REPLACEMENT CHARACTER}b"),
    "surrogate in the error": (raising(ValueError("a\ud800b")), "dead_letter", "ValueError: a?b"),
    "huge error": (raising(ValueError("x" * 5_000_000)), "dead_letter", "xxx … xxx"),
    "password in the error": (raising(OSError("no answer from postgresql://u:canary@h/d")), "dead_letter", "postgresql://u:***@h/d"),
    "generator": (lambda task: (n for n in range(3)), "dead_letter", "it must not yield"),
}
LOST: dict[str, tuple[Callable[[Task], Any], str]] = {   # what it returns, and why that can't be kept
    "not JSON": (lambda task: object(), "not JSON"),
    "NaN": (lambda task: [float("nan")], "not JSON"),
    "NUL in the result": (lambda task: {"a": "b\0c"}, "U+0000"),
    "half a pair in the result": (lambda task: "\ud800", "surrogate"),
    "recursive result": (lambda task: sys.modules, "not JSON"),
    "huge result": (lambda task: "x" * 2_000_000, "store the data elsewhere"),
    "too big a number": (lambda task: float("inf"), "not JSON"),
}


def test_every_way_to_end_is_recorded(installed: str, conn: Connection) -> None:
    handlers = {name: Handler(function, max_retries=0) for name, (function, _, _) in OUTCOMES.items()}
    with running(installed, {**handlers, "ok": lambda task: None}) as app:
        ids = {name: app.enqueue(name) for name in OUTCOMES}
        for name, (_, status, said) in OUTCOMES.items():
            task = wait_for(app, ids[name])
            assert (name, task["status"], task["attempts"]) == (name, status, 1)
            if status == "completed":
                assert (name, task["result"]) == (name, said)
            else:
                assert said in task["last_error"] and len(task["last_error"]) <= 8000
                assert "canary" not in str(task)
        for _ in range(worker_of(app).config.worker_pool_size):   # no thread of the pool was lost
            wait_for(app, app.enqueue("ok"), "completed")
        assert worker_of(app).counters.replaced_threads == 0
    assert audit(conn) == []


def test_a_result_that_can_not_be_kept_does_not_repeat_the_work(installed: str, conn: Connection) -> None:
    runs: list[str] = []

    def handler_of(name: str, function: Callable[[Task], Any]) -> Callable[[Task], Any]:
        def handler(task: Task) -> Any:
            runs.append(name)
            return function(task)
        return handler

    with running(installed, {name: handler_of(name, function) for name, (function, _) in LOST.items()}) as app:
        ids = {name: app.enqueue(name) for name in LOST}
        for name, (_, said) in LOST.items():
            task = wait_for(app, ids[name])
            assert (name, task["status"], task["attempts"], task["result"]) == (name, "completed", 1, None)
            [event] = eventually(lambda name=name: story(app, ids[name])["events"])
            assert event["event"] == "result_lost" and said in event["detail"]
        wait_for(app, app.enqueue("NaN"), "completed")
    assert sorted(runs) == sorted([*LOST, "NaN"])
    assert audit(conn) == []


class Colour(enum.Enum):
    RED = "red"


@dataclass
class Point:
    x: int
    y: Decimal


class Model:
    """As a pydantic model."""

    def model_dump(self) -> Any:
        return {"at": date(2030, 1, 2)}


def test_values_with_a_usual_form_are_json_in_results_and_payloads(installed: str) -> None:
    given = [datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC), date(2030, 1, 2), UUID(int=5), Decimal("1.50"), Colour.RED,
             Point(1, Decimal(2)), Model(), {"a"}]
    form = ["2030-01-02T03:04:05+00:00", "2030-01-02", "00000000-0000-0000-0000-000000000005", "1.50", "red",
            {"x": 1, "y": "2"}, {"at": "2030-01-02"}, ["a"]]
    with running(installed, {"a": lambda task: given}) as app:
        task = wait_for(app, app.enqueue("a", given))
    assert task["result"] == task["payload"] == form


def test_a_program_may_give_values_a_form_of_its_own(installed: str) -> None:
    def own(value: Any) -> Any:
        if isinstance(value, complex):
            return [value.real, value.imag]
        raise TypeError

    app = make_app(installed, {"a": lambda task: [1j, date(2030, 1, 2)]}, json_default=own)
    with running(installed, app):
        assert wait_for(app, app.enqueue("a"))["result"] == [[0.0, 1.0], "2030-01-02"]


def test_a_failed_attempt_is_retried_until_it_succeeds(installed: str) -> None:
    attempts = []

    def third_time_lucky(task: Task) -> int:
        attempts.append(task.attempt)
        if task.attempt < 3:
            raise OSError("not yet")
        return task.attempt

    with running(installed, {"a": Handler(third_time_lucky, base_delay=0.01)}) as app:
        task = wait_for(app, app.enqueue("a"))
    assert attempts == [1, 2, 3] and (task["status"], task["result"], task["attempts"]) == ("completed", 3, 3)
    assert events(task) == ["failed", "retry_scheduled"] * 2


def test_retries_of_the_task_go_before_those_of_its_type(installed: str) -> None:
    with running(installed, {"a": Handler(raising(OSError()), max_retries=5, base_delay=0)}) as app:
        none, one = app.enqueue("a", max_retries=0), app.enqueue("a", max_retries=1)
        assert wait_for(app, none)["attempts"] == 1
        assert wait_for(app, one)["attempts"] == 2


def test_retry_after_is_kept_to(installed: str) -> None:
    with running(installed, {"a": raising(Retry("busy", after=1000))}) as app:
        task = wait_for(app, app.enqueue("a"), "retry_scheduled")
    assert "in 1000.000 s" in task["events"][-1]["detail"] and task["last_error"] == "busy"


def test_snooze_charges_no_attempt(installed: str) -> None:
    seen = []

    def twice(task: Task) -> None:
        seen.append(task.attempt)
        if len(seen) < 3:
            raise Snooze(0.01)

    with running(installed, {"a": Handler(twice, max_retries=0)}) as app:
        task = wait_for(app, app.enqueue("a"))
    assert seen == [1, 1, 1] and task["status"] == "completed" and task["attempts"] == 1
    assert events(task) == ["snoozed", "snoozed"]


def test_an_error_names_the_users_own_frame_and_its_event_keeps_the_causes(installed: str) -> None:
    def parse(task: Task) -> None:
        import json
        try:
            json.loads("{")
        except ValueError as error:
            raise RuntimeError("unreadable") from error

    def innermost(task: Task) -> None:
        import json
        json.loads("{")

    with running(installed, {"cause": Handler(parse, max_retries=0), "library": Handler(innermost, max_retries=0)}) as app:
        cause, library = wait_for(app, app.enqueue("cause")), wait_for(app, app.enqueue("library"))
    assert "RuntimeError: unreadable (test_dispatch.py:" in cause["last_error"] and "in parse)" in cause["last_error"]
    assert "(test_dispatch.py:" in library["last_error"] and "in innermost)" in library["last_error"]
    detail = cause["events"][0]["detail"]
    assert "JSONDecodeError" in detail and "direct cause" in detail


# ------------------------------------------------------------------------------------------------------------------- async
def test_async_handlers_run_together_on_one_thread(installed: str) -> None:
    threads, together = set(), 0
    arrived: asyncio.Event | None = None

    async def meet(task: Task) -> str:
        nonlocal together, arrived
        threads.add(threading.get_ident())
        arrived = arrived or asyncio.Event()
        together += 1
        if together == 3:
            arrived.set()
        await asyncio.wait_for(arrived.wait(), 10)
        return "met"

    with running(installed, {"a": meet}) as app:
        assert [wait_for(app, i)["result"] for i in [app.enqueue("a") for _ in range(3)]] == ["met"] * 3
    assert len(threads) == 1


@pytest.mark.parametrize("error", [ValueError("boom"), SystemExit("boom"), KeyboardInterrupt("boom")])
def test_an_async_handler_that_raises_fails_alone(installed: str, error: BaseException) -> None:
    async def either(task: Task) -> int:
        await asyncio.sleep(0)
        if task.payload:
            raise error
        return 1

    with running(installed, {"a": Handler(either, max_retries=0)}) as app:
        assert "boom" in wait_for(app, app.enqueue("a", True), "dead_letter")["last_error"]
        assert wait_for(app, app.enqueue("a", False))["result"] == 1


def test_the_event_loop_outlives_what_a_handler_leaves_on_it(installed: str) -> None:
    """A callback that exits, and one that stops the loop: those who wait on it must not wait for ever."""
    async def leave(task: Task) -> str:
        loop = asyncio.get_running_loop()
        if task.payload == "exit":
            loop.call_soon(sys.exit)
        else:
            loop.call_soon(loop.stop)
        await asyncio.sleep(0.01)
        return "on"

    with running(installed, {"a": leave}) as app:
        for payload in ("exit", "stop", "exit"):
            assert wait_for(app, app.enqueue("a", payload))["result"] == "on"


def wrapped(function: Callable[[Task], Any]) -> Callable[[Task], Any]:
    @functools.wraps(function)
    def wrapper(task: Task) -> Any:
        return function(task)
    return wrapper


class CallableObject:
    async def __call__(self, task: Task) -> str:
        await asyncio.sleep(0)
        return "ran"


async def coroutine(task: Task) -> str:
    await asyncio.sleep(0)
    return "ran"


@pytest.mark.parametrize("handler", [
    wrapped(coroutine), CallableObject(), lambda task: next(iter([coroutine(task)])), functools.partial(coroutine)],
                         ids=["wraps", "object", "lambda", "partial"])
def test_whatever_returns_an_awaitable_is_awaited(handler: Callable[[Task], Any]) -> None:
    router = Router()
    router.add("a", handler)
    assert router.finish(task_of(handler), handler(task_of(handler))) == "ran"


def task_of(handler: Callable[[Task], Any], payload: str = "{}") -> Task:
    """A task in nobody's hands."""
    class Nobody:
        id = "nobody"
    row = (1, "01890000-0000-7000-8000-000000000000", "a", payload, 0, None, 0, "2030-01-01 00:00:00+00", 0.0, 0)
    return Task(Nobody(), row, Handler(handler))   # type: ignore[arg-type]


def test_async_middleware_awaits_handlers_of_both_kinds(installed: str) -> None:
    app = make_app(installed, {"sync": lambda task: "sync", "async": coroutine})

    @app.use
    async def around(task: Task, call_next: Callable[[Task], Any]) -> Any:
        return [await call_next(task)]

    with running(installed, app):
        assert wait_for(app, app.enqueue("sync"))["result"] == ["sync"]
        assert wait_for(app, app.enqueue("async"))["result"] == ["ran"]


def test_a_cancelled_async_handler_ends_before_its_task_does(installed: str) -> None:
    started, cleaned, may_clean = threading.Event(), threading.Event(), threading.Event()

    async def sleeper(task: Task) -> None:
        started.set()
        try:
            await asyncio.sleep(60)
        finally:
            while not may_clean.is_set():
                await asyncio.sleep(0.01)
            cleaned.set()

    with running(installed, {"a": sleeper, "b": lambda task: None}) as app:
        task_id = app.enqueue("a")
        assert started.wait(10)
        task = worker_of(app).tasks[task_id]
        assert app.cancel(task_id) == "cancelling"
        eventually(lambda: task.cancel_reason == "cancelled")
        wait_for(app, app.enqueue("b"))   # what ended is reported by then
        assert story(app, task_id)["status"] in ("claimed", "running")
        may_clean.set()
        wait_for(app, task_id, "cancelled")
    assert cleaned.is_set()


def test_an_async_handler_is_cancelled_at_its_timeout(installed: str) -> None:
    async def sleeper(task: Task) -> None:
        await asyncio.sleep(60)

    with running(installed, {"a": Handler(sleeper, timeout=0.1, max_retries=0)}) as app:
        assert wait_for(app, app.enqueue("a"))["last_error"] == "timed out after 0.1 s"


def test_a_timeout_names_the_task_that_holds_the_event_loop(installed: str) -> None:
    gate = Gate()

    async def holds(task: Task) -> None:
        gate(task)   # without await: nothing else on the loop runs

    async def waits(task: Task) -> None:
        await asyncio.sleep(60)

    with running(installed, {"holder": holds, "waits": Handler(waits, timeout=0.3, max_retries=0)}) as app:
        waiting = app.enqueue("waits")
        eventually(lambda: any(task.id == waiting for task in worker_of(app).pool.running()))
        holder = app.enqueue("holder")
        gate.wait_started()
        task = worker_of(app).tasks[waiting]
        eventually(lambda: task.cancel_reason == "timeout")
        gate.open.set()
        assert f"while holder {holder} held the event loop" in wait_for(app, waiting, "dead_letter")["last_error"]


# ------------------------------------------------------------------------------------------------- what a task can be asked
def test_sleep_and_raise_if_cancelled_end_a_cancelled_handler() -> None:
    task = task_of(lambda task: None)
    task.raise_if_cancelled()
    task.sleep(0)
    task.cancel("cancelled")
    task.cancel("timeout")   # the first reason stays
    began = time.monotonic()
    with pytest.raises(Cancelled, match="cancelled"):
        task.sleep("1h")
    with pytest.raises(Cancelled, match="cancelled"):
        task.raise_if_cancelled()
    assert time.monotonic() - began < 5 and task.cancelled.is_set()


def test_progress_shows_while_it_runs_and_is_no_result(installed: str) -> None:
    gate = Gate()

    def report(task: Task) -> None:
        task.progress({"done": 1})
        gate(task)

    with running(installed, {"a": report}) as app:
        task_id = app.enqueue("a")
        eventually(lambda: story(app, task_id)["progress"] == {"done": 1})
        gate.open.set()
        task = wait_for(app, task_id)
        assert (task["status"], task["result"]) == ("completed", None)


def test_progress_that_is_not_json_is_refused_in_the_handler(installed: str) -> None:
    with running(installed, {"a": Handler(lambda task: task.progress(object()), max_retries=0)}) as app:
        assert "not JSON" in wait_for(app, app.enqueue("a"), "dead_letter")["last_error"]


# ------------------------------------------------------------------------------------------------------------- transactions
@pytest.fixture
def ledger(conn: Connection) -> Callable[[], list[str]]:
    conn.execute("create table ledger (entry text)")
    return lambda: [entry for (entry,) in conn.execute("select entry from ledger order by entry")]


def test_a_transaction_commits_the_writes_and_the_completion_together(
        installed: str, conn: Connection, ledger: Any, caplog: pytest.LogCaptureFixture) -> None:
    seen = []

    def pay(task: Task) -> str:
        with task.transaction() as connection:
            connection.execute("insert into ledger values ('paid')")
            seen.append((ledger(), value(conn, "select status from orchestrator.tasks")))
        seen.append((ledger(), value(conn, "select status from orchestrator.tasks")))
        return "not kept: it completed before"

    orchestrator.log.propagate = True
    with running(installed, {"a": pay}) as app:
        task = wait_for(app, app.enqueue("a"), "completed")
        eventually(lambda: not worker_of(app).tasks)
        assert worker_of(app).counters.completed["a", "completed"] == 1
    assert seen[0][0] == [] and seen[0][1] in ("claimed", "running") and seen[1] == (["paid"], "completed")
    assert task["attempts"] == 1 and task["result"] is None
    assert "comes after its transaction" in caplog.text   # and that is said
    assert audit(conn) == []


def test_a_result_can_commit_with_the_transaction(installed: str, conn: Connection, ledger: Any) -> None:
    def pay(task: Task) -> None:
        with task.transaction() as connection:
            connection.execute("insert into ledger values ('paid')")
            task.complete({"order": 7})

    with running(installed, {"a": pay}) as app:
        task = wait_for(app, app.enqueue("a"), "completed")
    assert task["result"] == {"order": 7} and ledger() == ["paid"]
    assert audit(conn) == []


def test_complete_belongs_inside_a_transaction(installed: str) -> None:
    with running(installed, {"a": Handler(lambda task: task.complete(1), max_retries=0)}) as app:
        assert "belongs inside" in wait_for(app, app.enqueue("a"), "dead_letter")["last_error"]


def test_an_error_after_the_transaction_is_said_and_repeats_nothing(
        installed: str, ledger: Any, caplog: pytest.LogCaptureFixture) -> None:
    def pay(task: Task) -> None:
        with task.transaction() as connection:
            connection.execute("insert into ledger values ('paid')")
        raise ValueError("too late")

    orchestrator.log.propagate = True
    with running(installed, {"a": pay}) as app:
        assert wait_for(app, app.enqueue("a"))["status"] == "completed"
        eventually(lambda: not worker_of(app).tasks)
    assert ledger() == ["paid"]
    assert "its handler raised after that: ValueError: too late" in caplog.text


def test_an_exception_rolls_the_writes_back(installed: str, ledger: Any) -> None:
    def fails(task: Task) -> None:
        with task.transaction() as connection:
            connection.execute("insert into ledger values ('paid')")
            raise ValueError("no")

    with running(installed, {"a": Handler(fails, max_retries=0)}) as app:
        assert "ValueError: no" in wait_for(app, app.enqueue("a"), "dead_letter")["last_error"]
    assert ledger() == []


def test_a_stolen_claim_aborts_the_transaction(installed: str, conn: Connection, ledger: Any) -> None:
    stolen, errors = [], []

    def robbed(task: Task) -> None:
        try:
            with task.transaction() as connection:
                connection.execute("insert into ledger values (%s)", [str(task.attempt)])
                if not stolen:
                    stolen.append(task.claim_id)   # as the leader would, had this worker been declared dead
                    conn.execute("select orchestrator.release_tasks(%s)", [task.claim_id])
        except ClaimLost as error:
            errors.append(error)
            raise

    with running(installed, {"a": robbed}) as app:
        task = wait_for(app, app.enqueue("a"))
    assert task["status"] == "completed" and len(errors) == 1
    assert ledger() == ["1"]
    assert audit(conn) == []


def test_a_cancel_aborts_the_transaction(installed: str, ledger: Any) -> None:
    gate = Gate()

    def pay(task: Task) -> None:
        with task.transaction() as connection:
            connection.execute("insert into ledger values ('paid')")
            gate(task)

    with running(installed, {"a": pay}) as app:
        task_id = app.enqueue("a")
        gate.wait_started()
        app.cancel(task_id)
        gate.open.set()
        wait_for(app, task_id, "cancelled")
    assert ledger() == []


def test_a_transaction_has_psycopgs_usual_values_and_no_limit_on_its_statements(installed: str) -> None:
    seen: list[Any] = []

    def look(task: Task) -> None:
        with task.transaction() as connection:
            seen.append(connection.execute("select '{\"a\": 1}'::jsonb, now(), current_setting('statement_timeout')").fetchone())

    with running(installed, {"a": look}) as app:
        wait_for(app, app.enqueue("a"), "completed")
    assert seen[0][0] == {"a": 1} and hasattr(seen[0][1], "tzinfo") and seen[0][2] == "0"


# ------------------------------------------------------------------------------------------------------------ dead letters
def test_a_dead_letter_hook_hears_of_failures_and_timeouts_and_may_fail_itself(installed: str) -> None:
    heard: list[tuple[str, str]] = []
    app = make_app(installed, {"fails": Handler(raising(OSError("no")), max_retries=0),
                               "slow": Handler(obedient, timeout=0.05, max_retries=0),
                               "retried": Handler(raising(OSError("no")), max_retries=1, base_delay=1000)})

    @app.on_dead_letter
    def broken(task: Task, error: str) -> None:
        raise SystemExit

    @app.on_dead_letter
    def hear(task: Task, error: str) -> None:
        heard.append((task.type, error))

    with running(installed, app):
        wait_for(app, app.enqueue("retried"), "retry_scheduled")
        for kind in ("fails", "slow"):
            wait_for(app, app.enqueue(kind), "dead_letter")
        eventually(lambda: len(heard) == 2)
    assert [kind for kind, _ in heard] == ["fails", "slow"]
    assert "OSError: no" in heard[0][1] and heard[1][1] == "timed out after 0.05 s"


# ------------------------------------------------------------------------------------------------------------------- forks
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_forked_child_that_returns_exits_at_once(installed: str, kind: str) -> None:
    """It would otherwise be a second worker with the parent's connections, and keep its port."""
    def fork(task: Task) -> int:
        return os.fork() or os.getppid()   # in the child: something else, which must not be reported

    async def fork_async(task: Task) -> int:
        return fork(task)

    with running(installed, {"a": fork if kind == "sync" else fork_async, "b": lambda task: "b"}) as app:
        child = wait_for(app, app.enqueue("a"), "completed")["result"]
        assert child != os.getpid()

        def ended() -> int | None:
            pid, status = os.waitpid(child, os.WNOHANG)
            return None if pid == 0 else os.waitstatus_to_exitcode(status) + 1
        try:
            assert eventually(ended) == 1
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        assert wait_for(app, app.enqueue("b"))["result"] == "b"
