"""app.perform() runs a handler as a worker would, without a database."""
from __future__ import annotations

import datetime
import io
import logging
import time
from collections.abc import Callable
from typing import Any
from uuid import UUID

import psycopg
import pytest

import orchestrator
from orchestrator import Config, Discard, Handler, Orchestrator, Retry, Snooze, Task
from steps import background, value


def make(function: Callable[[Task], Any], **policy: Any) -> Orchestrator:
    """With an address where no database is, so that whatever asks one fails."""
    return Orchestrator("postgresql://nobody@127.0.0.1:1/none", {"a": Handler(function, **policy)})


def test_it_returns_what_the_handler_returns_for_its_payload() -> None:
    assert make(lambda task: task.payload["n"] + 1).perform("a", {"n": 41}) == 42
    assert make(lambda task: None).perform("a") is None
    assert make(lambda task: task.payload).perform("a") == {}


def test_payload_and_result_go_through_json_as_in_production() -> None:
    seen: list[Any] = []

    def handler(task: Task) -> Any:
        seen.append(task.payload)
        return {1: (2, datetime.date(2030, 1, 31))}

    payload = {"when": datetime.datetime(2030, 1, 31, tzinfo=datetime.UTC), "parts": (1, 2)}
    assert make(handler).perform("a", payload) == {"1": [2, "2030-01-31"]}
    assert seen == [{"when": "2030-01-31T00:00:00+00:00", "parts": [1, 2]}]


def test_the_programs_own_json_default_is_asked() -> None:
    app = Orchestrator(json_default=lambda each: "an object", handlers={"a": lambda task: [task.payload, object()]})
    assert app.perform("a", object()) == ["an object", "an object"]


@pytest.mark.parametrize("error", [Retry("busy", after=3), Discard("no such account"), Snooze(60), KeyError("x"), SystemExit(3)])
def test_it_raises_what_the_handler_raises(error: BaseException) -> None:
    def handler(task: Task) -> None:
        raise error
    with pytest.raises(type(error)) as raised:
        make(handler).perform("a")
    assert raised.value is error


def test_async_handlers_run_too() -> None:
    async def handler(task: Task) -> Any:
        if task.payload == "bad":
            raise LookupError("so it is")
        return [task.type, task.payload]

    app = make(handler)
    assert app.perform("a", "good") == ["a", "good"]
    with pytest.raises(LookupError, match="so it is"):
        app.perform("a", "bad")


def test_a_generator_is_refused_as_by_a_worker() -> None:
    def handler(task: Task) -> Any:
        yield 1
    with pytest.raises(TypeError, match="must not yield"):
        make(handler).perform("a")


def test_middleware_of_both_kinds_wraps_the_handler() -> None:
    app = make(lambda task: [task.attempt])

    @app.use
    def outer(task: Task, call_next: Callable[[Task], Any]) -> Any:
        return ["outer", *call_next(task)]

    @app.use
    async def inner(task: Task, call_next: Callable[[Task], Any]) -> Any:
        return ["inner", *await call_next(task)]

    assert app.perform("a", attempt=2) == ["outer", "inner", 2]


def test_an_async_middleware_that_does_not_look_like_one_is_refused_and_holds_up_no_event_loop() -> None:
    async def handler(task: Task) -> int:
        return 1

    async def traced(task: Task, call_next: Callable[[Task], Any], name: str) -> Any:
        return await call_next(task)
    app = make(handler)
    app.use(lambda task, call_next: traced(task, call_next, "a"))
    answer = background(lambda: app.perform("a"))
    with pytest.raises(TypeError, match="must be an `async def` itself"):
        answer.result(10)
    app.router.middleware.clear()
    assert app.perform("a") == 1


def test_the_task_is_a_real_one_with_what_was_asked_for() -> None:
    task_id = "0192f0c1-2d3e-7a4b-8c5d-6e7f80910a1b"
    tasks: list[Task] = []
    app = make(tasks.append, max_retries=7, timeout=60)
    app.perform("a", {"n": 1}, attempt=3, id=task_id, meta={"by": "alice"})
    app.perform("a", id=UUID(task_id))
    app.perform("a")
    task, again, other = tasks
    assert (task.id, task.type, task.payload, task.attempt, task.max_retries) == (task_id, "a", {"n": 1}, 3, 7)
    assert (task.meta, again.meta, again.id, again.attempt) == ({"by": "alice"}, None, task_id, 1)
    assert UUID(other.id) != UUID(task_id)
    assert abs(task.created_at - datetime.datetime.now(datetime.UTC)) < datetime.timedelta(minutes=1)
    assert task.deadline is not None and 50 < task.deadline - time.monotonic() <= 60
    assert not task.cancelled.is_set() and task.worker_id == "perform"
    task.sleep(0)


def test_a_prefix_handles_its_types() -> None:
    app = Orchestrator(handlers={"mail:": lambda task: task.type, "mail:welcome": lambda task: "welcome"})
    assert [app.perform("mail:bye"), app.perform("mail:welcome")] == ["mail:bye", "welcome"]
    with pytest.raises(ValueError, match="type: no handler is registered for 'fax'"):
        app.perform("fax")


@pytest.mark.parametrize(("arguments", "problem"), [
    ({"payload": object()}, "payload: not JSON"), ({"payload": "\0"}, "payload: .*U\\+0000"), ({"attempt": 0}, "attempt: must be"),
    ({"id": "one"}, "id: "), ({"meta": {"a": {1, object()}}}, "meta: not JSON")])
def test_wrong_arguments_are_refused_by_name(arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        make(lambda task: None).perform("a", **arguments)


def test_a_result_that_could_not_be_kept_is_an_error() -> None:
    with pytest.raises(ValueError, match="result: not JSON"):
        make(lambda task: object()).perform("a")
    with pytest.raises(ValueError, match="over 1048576 bytes"):
        make(lambda task: "x" * 1_048_577).perform("a")


def test_progress_is_collected_as_the_page_would_show_it() -> None:
    def handler(task: Task) -> None:
        for done in (1, 2):
            task.progress({"done": done, "at": datetime.date(2030, 1, done)})
    seen: list[Any] = []
    make(handler).perform("a", progress=seen.append)
    assert seen == [{"done": 1, "at": "2030-01-01"}, {"done": 2, "at": "2030-01-02"}]
    make(handler).perform("a")
    with pytest.raises(ValueError, match="result: not JSON"):
        make(lambda task: task.progress(object())).perform("a")


def transfer(task: Task) -> str:
    with task.transaction() as connection:
        connection.execute("insert into transfers values (%s)", [task.payload["amount"]])
        if task.payload["amount"] < 0:
            raise Discard("less than nothing")
        task.complete({"moved": task.payload["amount"]})
    return "comes too late"


def test_a_transaction_is_refused_and_the_error_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match=r"transaction=.*drain"):
        make(transfer).perform("a", {"amount": 1})


def test_a_transaction_runs_on_the_connection_that_was_given(db: str) -> None:
    with psycopg.connect(db) as connection:
        connection.execute("create table transfers (amount int)")
        app = make(transfer)
        assert app.perform("a", {"amount": 5}, transaction=connection) == {"moved": 5}
        with pytest.raises(Discard):   # and what it wrote before is undone, alone
            app.perform("a", {"amount": -5}, transaction=connection)
        assert value(connection, "select array_agg(amount) from transfers") == [5]
        connection.rollback()          # all of it was in the test's own transaction
        assert value(connection, "select to_regclass('transfers')") is None


def test_complete_belongs_inside_the_transaction(db: str) -> None:
    def handler(task: Task) -> None:
        with task.transaction():
            pass
        task.complete(1)
    with psycopg.connect(db) as connection, pytest.raises(RuntimeError, match=r"complete\(\) belongs inside"):
        make(handler).perform("a", transaction=connection)


def fulfil(task: Task) -> Any:
    charge = task.step("charge", lambda: {"paid": (task.payload, task.attempt)})
    if (answer := task.signal("approved", timeout="1d")) is None:
        raise Discard("nobody approved it")
    return [charge, answer, task.step("ship", lambda: task.attempt)]


def test_steps_are_known_to_the_next_attempt_if_they_are_given() -> None:
    app, steps = make(fulfil), dict[str, Any]()
    with pytest.raises(Snooze):
        app.perform("a", 5, steps=steps)
    assert steps == {"charge": {"paid": [5, 1]}}
    steps["approved"] = {"by": "alice"}   # a signal
    assert app.perform("a", 5, attempt=2, steps=steps) == [{"paid": [5, 1]}, {"by": "alice"}, 2]
    assert steps == {"charge": {"paid": [5, 1]}, "approved": {"by": "alice"}, "ship": 2}
    with pytest.raises(Discard, match="nobody approved it"):   # it has timed out
        app.perform("a", 5, steps={"approved": None})


def test_steps_and_signals_of_coroutines_are_rehearsed_too() -> None:
    async def handler(task: Task) -> Any:
        return [await task.step_async("one", lambda: 1), await task.signal_async("two")]
    assert make(handler).perform("a", steps={"two": 2}) == [1, 2]


def test_results_of_parents_are_those_that_are_given() -> None:
    app = make(lambda task: sum(task.parents().values()))
    assert app.perform("a", parents={"one": 1, "two": 2}) == 3
    assert app.perform("a") == 0


def test_a_step_may_use_the_connection_that_was_given(db: str) -> None:
    def handler(task: Task) -> Any:
        return task.step("count", lambda connection: value(connection, "select 6 * 7"), transaction=True)
    with psycopg.connect(db) as connection:
        assert make(handler).perform("a", transaction=connection) == 42
    with pytest.raises(RuntimeError, match="transaction=connection"):
        make(handler).perform("a")


def test_what_the_handler_logs_has_the_tasks_id() -> None:
    stream, logger = io.StringIO(), logging.getLogger("test_perform")
    handler = logging.StreamHandler(stream)
    handler.setFormatter(orchestrator._LogFormat(Config.load({"log_format": "json"}).log_format == "json"))
    logger.addHandler(handler)
    task_id = "0192f0c1-2d3e-7a4b-8c5d-6e7f80910a1b"
    try:
        make(lambda task: logger.warning("inside")).perform("a", id=task_id)
        logger.warning("outside")
    finally:
        logger.removeHandler(handler)
    inside, outside = stream.getvalue().splitlines()
    assert f'"task_id": "{task_id}"' in inside and "task_id" not in outside
