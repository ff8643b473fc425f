"""What a program uses: registering handlers, enqueuing, cancelling, retrying; and how a type finds its handler."""
from __future__ import annotations

import asyncio
import json
import pickle
import threading
import time
from collections.abc import Callable
from copy import deepcopy
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest

import orchestrator
from apps import make_app, running, story, wait_for
from orchestrator import ConfigError, Handler, Orchestrator, Retry, Router, Snooze, Task
from postgres import eventually
from steps import claim_one, value

Connection = psycopg.Connection[Any]


def nothing(task: Task) -> None:
    pass


# ------------------------------------------------------------------------------------------------------------ registering
def test_an_exact_type_goes_before_the_longest_prefix() -> None:
    router = Router()
    handlers = {pattern: Handler(nothing, max_retries=n) for n, pattern in enumerate(("mail:welcome", "mail:", "m*", "*"))}
    for pattern, handler in handlers.items():
        router.add(pattern, handler)
    found = {kind: router.find(kind) for kind in ("mail:welcome", "mail:bye", "mail:welcome:again", "mai", "other")}
    assert found == {"mail:welcome": handlers["mail:welcome"], "mail:bye": handlers["mail:"], "mail:welcome:again": handlers["mail:"],
                     "mai": handlers["m*"], "other": handlers["*"]}


def test_what_has_no_handler_is_not_found() -> None:
    router = Router()
    router.add("mail:", nothing)
    assert router.find("mail") is None and router.find("email:x") is None


@pytest.mark.parametrize("pattern", ["", "a*b", "*a", "x" * 256, "a\nb", 5, None])
def test_a_bad_pattern_is_refused(pattern: Any) -> None:
    with pytest.raises(ConfigError, match="handler "):
        Router().add(pattern, nothing)


@pytest.mark.parametrize("pattern", ["task:a", "task:", "t*"])
def test_registering_the_same_twice_is_an_error(pattern: str) -> None:
    app = Orchestrator()
    app.handler(pattern, nothing)
    with pytest.raises(ConfigError, match="is registered already"):
        app.handler(pattern)(nothing)


@pytest.mark.parametrize("handler", [None, "function", 5])
def test_a_handler_that_is_no_function_is_refused(handler: Any) -> None:
    with pytest.raises(ConfigError, match="handler 'a'"):
        Orchestrator(handlers={"a": handler})


@pytest.mark.parametrize("policy", [
    {"max_retries": -1}, {"max_retries": 1001}, {"max_retries": True}, {"max_retries": 1.5}, {"base_delay": -1}, {"base_delay": "soon"},
    {"max_delay": float("nan")}, {"max_delay": float("inf")}, {"timeout": 0}, {"timeout": -1}, {"retries": 3}])
def test_a_bad_policy_is_refused_by_name(policy: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"handler 'a': .*{next(iter(policy))}"):
        Orchestrator().handler("a", nothing, **policy)


def test_the_decorator_returns_the_function_and_keeps_its_policy() -> None:
    app = Orchestrator()
    assert app.handler("a", max_retries=7, base_delay=2, max_delay=3, timeout=4)(nothing) is nothing
    assert app.router.handlers["a"] == Handler(nothing, 7, 2, 3, 4)


def test_a_policys_times_may_be_seconds_timedeltas_or_text() -> None:
    assert Handler(nothing, 3, "500ms", timedelta(hours=1), "1m") == Handler(nothing, 3, 0.5, 3600, 60)


def test_a_handler_can_not_come_after_the_start(installed: str) -> None:
    with running(installed, {"a": nothing}) as app, pytest.raises(ConfigError, match="before the worker starts"):
        app.handler("b", nothing)


def test_policies_are_registered_for_sql(installed: str, conn: Connection) -> None:
    with running(installed, {"a:": Handler(nothing, max_retries=2, base_delay=0.5, max_delay=60, timeout=9)}):
        row = conn.execute("select type, max_retries, base_delay, max_delay, timeout from orchestrator.task_types").fetchone()
    assert row == ("a:", 2, timedelta(seconds=0.5), timedelta(seconds=60), timedelta(seconds=9))


# ------------------------------------------------------------------------------------------------------------- enqueuing
def test_enqueue_returns_the_id_of_a_waiting_task(installed: str) -> None:
    app = make_app(installed)
    task = story(app, app.enqueue("a", {"n": 1}, priority=5, max_retries=2))
    app.close()
    assert (task["type"], task["payload"], task["status"], task["priority"], task["max_retries"]) == ("a", {"n": 1}, "pending", 5, 2)


def test_a_repeated_idempotency_key_returns_the_first_id(installed: str, conn: Connection) -> None:
    app = make_app(installed)
    first = app.enqueue("a", {"n": 1}, idempotency_key="k")
    assert app.enqueue("a", {"n": 2}, idempotency_key="k") == first
    assert app.enqueue("b", idempotency_key="k") != first
    app.close()
    assert value(conn, "select count(*) from orchestrator.tasks") == 2


def test_enqueue_many_tells_which_were_created_in_order(installed: str) -> None:
    app = make_app(installed)
    first = app.enqueue("a", idempotency_key="x")
    made = app.enqueue_many("a", [1, 2, 3, 4], idempotency_keys=["x", None, "y", "y"])
    app.close()
    assert [task_id.created for task_id in made] == [False, True, True, False]
    assert made[0] == first and made[2] == made[3]


def test_an_id_tells_whether_its_task_is_new_and_is_text(installed: str) -> None:
    app = make_app(installed)
    first, again, other = app.enqueue("a", idempotency_key="k"), app.enqueue("a", idempotency_key="k"), app.enqueue("a")
    app.close()
    assert (first.created, again.created, other.created) == (True, False, True) and first == again
    for copy in (pickle.loads(pickle.dumps(again)), deepcopy(again)):
        assert copy == again and copy.created is False
    assert json.dumps([first]) == f'["{first}"]'


def test_a_key_may_be_a_uuid_and_a_delay_a_timedelta_or_text(installed: str, conn: Connection) -> None:
    app = make_app(installed)
    key = UUID(int=7)
    assert app.enqueue("a", idempotency_key=key) == app.enqueue("a", idempotency_key=str(key))
    for delay in (timedelta(minutes=1), "1m", "60s", 60):
        task_id = app.enqueue("a", delay=delay)
        seconds = value(conn, "select extract(epoch from next_retry_at - now())::float from orchestrator.tasks where id = %s", task_id)
        assert 30 < seconds <= 60.5
    app.close()


def test_a_call_that_would_be_too_large_for_postgresql_is_refused(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orchestrator, "CALL_LIMIT", 2 ** 17)
    app = make_app(installed, {})
    with pytest.raises(ValueError, match="payloads: over 1 MiB in one call; add them in several"):
        app.enqueue_many("a", ["x" * 2 ** 18] * 4)
    app.enqueue_many("a", ["x" * (2 ** 18 - 100)] * 3)
    app.close()


def test_enqueue_many_takes_an_iterator_and_nothing(installed: str, conn: Connection) -> None:
    app = make_app(installed)
    assert app.enqueue_many("a", []) == []
    assert len(app.enqueue_many("a", (n for n in range(5000)))) == 5000
    app.close()
    assert value(conn, "select sum((payload)::int) from orchestrator.tasks") == sum(range(5000))


def test_a_delayed_task_waits(installed: str, conn: Connection) -> None:
    app = make_app(installed)
    ids = [app.enqueue("a", delay=60), app.enqueue("a", run_at=datetime.now(UTC) + timedelta(minutes=1))]
    app.close()
    for task_id in ids:
        seconds = value(conn, "select extract(epoch from next_retry_at - now())::float from orchestrator.tasks where id = %s", task_id)
        assert 30 < seconds <= 60.5


def test_a_short_delay_is_kept_to_and_not_much_exceeded(installed: str) -> None:
    started = threading.Event()
    with running(installed, {"a": lambda task: started.set()}) as app:
        before = time.monotonic()
        app.enqueue("a", delay=0.3)
        assert started.wait(10)
        assert time.monotonic() - before >= 0.3


def test_a_connection_joins_the_callers_transaction(installed: str, conn: Connection) -> None:
    app = Orchestrator("postgresql://127.0.0.1:1/nowhere")   # never used
    with psycopg.connect(installed, row_factory=psycopg.rows.dict_row) as caller:
        task_id = app.enqueue("a", {"n": 1}, connection=caller)
        assert len(app.enqueue_many("a", [1, 2], connection=caller)) == 2
        assert value(conn, "select count(*) from orchestrator.tasks") == 0
        caller.rollback()
        assert value(conn, "select count(*) from orchestrator.tasks") == 0
        task_id = app.enqueue("a", connection=caller)
        caller.commit()
    assert value(conn, "select id::text from orchestrator.tasks") == task_id


NAN = float("nan")
NESTED: list[Any] = []
for _ in range(100_000):
    NESTED = [NESTED]
BAD = [
    ("type", {"type": ""}), ("type", {"type": "x" * 256}), ("type", {"type": "a\0b"}), ("type", {"type": "a*"}), ("type", {"type": 5}),
    ("type", {"type": None}), ("type", {"type": "\ud800"}), ("payload", {"payload": NAN}), ("payload", {"payload": {"a": "\0canary"}}),
    ("payload", {"payload": ["canary\ud800"]}), ("payload", {"payload": b"canary"}), ("payload", {"payload": object()}),
    ("payload", {"payload": "canary" * 50_000}), ("payload", {"payload": NESTED}), ("priority", {"priority": "high"}),
    ("priority", {"priority": 1.5}), ("priority", {"priority": True}), ("priority", {"priority": 2**40}),
    ("priority", {"priority": 2_000_000}),
    ("idempotency_key", {"idempotency_key": ""}), ("idempotency_key", {"idempotency_key": "k" * 256}),
    ("idempotency_key", {"idempotency_key": "\0"}), ("max_retries", {"max_retries": -1}),
    ("max_retries", {"max_retries": 2**31}), ("max_retries", {"max_retries": "3"}), ("delay", {"delay": -1}), ("delay", {"delay": NAN}),
    ("delay", {"delay": 1e12}), ("delay", {"delay": "soon"}), ("run_at", {"run_at": "tomorrow"}),
    ("run_at", {"run_at": datetime(2030, 1, 1)}),  # noqa: DTZ001
    ("run_at", {"run_at": datetime(9000, 1, 1, tzinfo=UTC)}), ("delay", {"delay": 1, "run_at": datetime.now(UTC)})]


def test_what_a_task_can_not_be_is_refused_by_name_and_never_echoed(installed: str, conn: Connection) -> None:
    app = make_app(installed)
    for field, given in BAD:
        with pytest.raises(ValueError, match=f"^{field}") as refused:
            app.enqueue(**{"type": "a", **given})
        assert "canary" not in str(refused.value) and not isinstance(refused.value, UnicodeError)
    app.close()
    assert value(conn, "select count(*) from orchestrator.tasks") == 0


def test_enqueue_many_names_the_bad_payload_and_adds_none(installed: str, conn: Connection) -> None:
    app = make_app(installed)
    for bad in (NAN, "x" * 300_000):
        with pytest.raises(ValueError, match=r"^payloads\[2\]"):
            app.enqueue_many("a", [1, bad, 3])
    with pytest.raises(ValueError, match="^idempotency_keys"):
        app.enqueue_many("a", [1, 2], idempotency_keys=["k"])
    app.close()
    assert value(conn, "select count(*) from orchestrator.tasks") == 0


def test_any_json_arrives_as_it_was_sent(installed: str) -> None:
    payloads = [{}, [], "", 0, False, 1.5, "ünï\U0001f600\\u0000", {"a": [{"b": None}]}, 10**30, "\\\\u0000"]
    seen = {}
    with running(installed, {"a": lambda task: seen.update({task.id: task.payload})}) as app:
        sent = {app.enqueue("a", payload): payload for payload in payloads} | {app.enqueue("a"): {}}
        eventually(lambda: len(seen) == len(sent))
    assert seen == sent


def test_threads_share_one_app(installed: str, conn: Connection) -> None:
    app = make_app(installed)
    threads = [threading.Thread(target=lambda: [app.enqueue("a") for _ in range(50)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    app.close()
    assert value(conn, "select count(*) from orchestrator.tasks") == 400


def test_enqueue_connects_again_after_its_connection_broke(installed: str, conn: Connection) -> None:
    app = make_app(installed)
    app.enqueue("a")
    ours = "from pg_stat_activity where application_name = 'orchestrator' and datname = current_database()"
    pid = value(conn, f"select pid, pg_terminate_backend(pid) {ours}")
    eventually(lambda: not value(conn, f"select count(*) {ours}") and not Path(f"/proc/{pid}").exists())
    app.enqueue("a")   # it was closed while idle: nothing was sent, so it is safe to send it over another one
    assert value(conn, "select count(*) from orchestrator.tasks") == 2
    errors: list[Exception] = []

    def enqueue() -> None:
        try:
            app.enqueue("a")
        except psycopg.OperationalError as error:
            errors.append(error)
    with psycopg.connect(installed) as holder:
        holder.execute("lock table orchestrator.tasks")
        thread = threading.Thread(target=enqueue)
        thread.start()
        eventually(lambda: value(conn, f"select count(*) {ours} and wait_event_type = 'Lock'"))
        conn.execute(f"select pg_terminate_backend(pid) {ours}")
        thread.join(10)
    assert len(errors) == 1   # it can't know whether that one arrived
    app.enqueue("a")
    app.close()


# ------------------------------------------------------------------------------------------------------- cancel, retry, get
def test_cancel_and_retry_say_what_became_of_the_task(installed: str) -> None:
    app = make_app(installed)
    task_id = app.enqueue("a")
    unknown = "01890000-0000-7000-8000-000000000000"
    assert [app.cancel(task_id), app.cancel(task_id)] == ["cancelled", "cancelled"]
    assert [app.retry(task_id), app.retry(task_id)] == ["pending", "pending"]
    assert [app.cancel(unknown), app.retry(unknown), app.get(unknown)] == ["not_found", "not_found", None]
    app.close()


@pytest.mark.parametrize("bad", ["", "5", None, "01890000-0000-7000-8000-00000000000g", "x' or 1=1"])
def test_an_id_that_is_none_is_refused(bad: Any) -> None:
    app = Orchestrator("postgresql://127.0.0.1:1/nowhere")   # not asked
    for call in (app.cancel, app.retry, app.get):
        with pytest.raises(ValueError, match="^id: "):
            call(bad)


def test_get_tells_the_story(installed: str, conn: Connection) -> None:
    app = make_app(installed)
    task_id = app.enqueue("a", {"password": "canary", "n": 1})
    conn.execute("select orchestrator.register_worker('w', 'host', 1, '1', '{\"a\": {}}')")
    claim_id, _ = claim_one(conn, "w", ["a"])
    conn.execute("select orchestrator.fail_task(%s, %s, 'boom')", [claim_id, task_id])
    task = story(app, task_id)
    app.close()
    assert [event["event"] for event in task["events"]] == ["failed", "retry_scheduled"]
    assert task["last_error"] == "boom"
    assert task["payload"] == {"password": "canary", "n": 1}   # the program's own
    shown = value(conn, "select orchestrator.show_task(%s)", task_id)
    assert shown["last_error"] == "boom" and "canary" not in json.dumps(shown)   # for people


# -------------------------------------------------------------------------------------------------- handlers, as they are called
def test_a_handler_sees_the_whole_task(installed: str) -> None:
    seen: dict[str, Any] = {}

    def look(task: Task) -> None:
        seen.update(id=task.id, type=task.type, payload=task.payload, attempt=task.attempt, max_retries=task.max_retries,
                    priority=task.priority, created=task.created_at, cancelled=task.cancelled.is_set(), reason=task.cancel_reason,
                    left=(task.deadline or 0) - time.monotonic(), worker=task.worker_id)

    with running(installed, {"a:*": Handler(look, max_retries=5, timeout=60)}) as app:
        task_id = app.enqueue("a:b", {"n": 1}, priority=-3)
        task = wait_for(app, task_id)
    assert seen["id"] == task_id and seen["type"] == "a:b" and seen["payload"] == {"n": 1} and seen["attempt"] == 1
    assert seen["max_retries"] == 5 and seen["priority"] == -3 and not seen["cancelled"] and seen["reason"] is None
    assert seen["created"] == datetime.fromisoformat(task["created_at"]) and 50 < seen["left"] <= 60
    assert seen["worker"] == task["worker_id"]


def test_middleware_wraps_every_call_the_first_outermost(installed: str) -> None:
    app = make_app(installed)
    order = []

    @app.use
    def outer(task: Task, call_next: Callable[[Task], Any]) -> Any:
        order.append("outer in")
        result = call_next(task)
        order.append("outer out")
        return [result]

    @app.use
    def inner(task: Task, call_next: Callable[[Task], Any]) -> Any:
        order.append("inner")
        return call_next(task) if task.payload != "stop" else "stopped"

    app.handler("a", lambda task: order.append("handler"))

    @app.handler("b")
    async def b(task: Task) -> str:
        await asyncio.sleep(0)
        return "b"

    with running(installed, app):
        assert wait_for(app, app.enqueue("a"))["result"] == [None]
        assert order == ["outer in", "inner", "handler", "outer out"]
        assert wait_for(app, app.enqueue("a", "stop"))["result"] == ["stopped"]
        assert wait_for(app, app.enqueue("b"))["result"] == ["b"]
    assert order.count("handler") == 1


def test_middleware_that_raises_fails_the_attempt(installed: str) -> None:
    app = make_app(installed, {"a": Handler(nothing, max_retries=0)})

    @app.use
    def refuse(task: Task, call_next: Callable[[Task], Any]) -> None:
        raise PermissionError("not today")

    with running(installed, app):
        assert "PermissionError: not today" in wait_for(app, app.enqueue("a"))["last_error"]


@pytest.mark.parametrize("bad", [-1, float("nan"), "soon", 1e12, True])
def test_retry_and_snooze_refuse_what_is_no_time(bad: Any) -> None:
    with pytest.raises(ValueError, match="seconds"):
        Snooze(bad)
    with pytest.raises(ValueError, match="after"):
        Retry(after=bad)


def test_start_twice_is_an_error(installed: str) -> None:
    with running(installed, {"a": nothing}) as app, pytest.raises(RuntimeError, match="is running already"):
        app.start()


def test_the_module_is_the_same_under_both_names() -> None:
    assert orchestrator.Orchestrator is Orchestrator


def test_enqueue_installs_the_schema_in_a_new_database(db: str) -> None:
    app = Orchestrator(db)
    task_id = app.enqueue("t")
    assert story(app, task_id)["status"] == "pending"
    app.close()


def test_enqueue_in_a_callers_transaction_without_the_schema_says_what_to_run(db: str) -> None:
    with psycopg.connect(db) as caller, pytest.raises(ConfigError, match=r"DATABASE_URL: .*python orchestrator.py install"):
        Orchestrator(db).enqueue("t", connection=caller)


@pytest.mark.parametrize("given", [object(), None.__class__, "postgresql://"])
def test_a_connection_of_another_kind_is_refused_in_one_line(given: Any) -> None:
    with pytest.raises(ValueError, match="connection: must be a psycopg.Connection, not "):
        Orchestrator("postgresql://127.0.0.1:1/nowhere").enqueue("t", connection=given)
