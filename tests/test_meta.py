"""Meta: what producers note beside the payload, app.on_enqueue(), task.meta, and the meta of fired schedules."""
from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from contextvars import ContextVar
from datetime import datetime
from typing import Any

import psycopg
import pytest

from apps import make_app, running, story, wait_for
from orchestrator import Orchestrator, Task
from steps import claim, column, enqueue, register, value

Connection = psycopg.Connection[Any]
METAS = "select meta from orchestrator.tasks order by id"


@pytest.fixture
def app(installed: str) -> Iterator[Orchestrator]:
    app = make_app(installed)
    yield app
    app.close()


def test_a_claim_returns_meta(conn: Connection) -> None:
    register(conn)
    conn.execute("""select orchestrator.enqueue('t', p_meta => '{"trace": "a"}'), orchestrator.enqueue('t')""")
    assert [task["meta"] for task in claim(conn)] == [{"trace": "a"}, None]


def test_a_handler_sees_meta_in_each_attempt(installed: str, conn: Connection) -> None:
    seen: list[Any] = []

    def handler(task: Task) -> None:
        seen.append(task.meta)
        if task.attempt == 1:
            raise RuntimeError
    with running(installed, {"t": handler}) as app:
        ids = [app.enqueue("t", meta={"by": "Ada"}), app.enqueue("t", max_retries=0)]
        conn.execute("update orchestrator.task_types set base_delay = '0', max_delay = '0'")
        wait_for(app, ids[0])
        wait_for(app, ids[1])
    assert sorted(seen, key=str) == [None, {"by": "Ada"}, {"by": "Ada"}]


def test_what_on_enqueue_returns_is_merged_and_the_calls_own_meta_takes_precedence(
        app: Orchestrator, installed: str, conn: Connection) -> None:
    found: list[Any] = [{"trace": 1, "by": "hook"}, None, {}, {"trace": 2}, {"trace": 3}, {"trace": 4}]
    app.on_enqueue(lambda: found.pop(0))

    @app.on_enqueue
    def second() -> dict[str, Any]:
        return {"from": "web"} if len(found) < 3 else {}
    app.enqueue("t", meta={"by": "Ada"})
    app.enqueue("t")
    app.enqueue("t", meta={"own": 1})
    app.enqueue("t", idempotency_key="k")
    app.enqueue_many("t", [1, 2])
    with psycopg.connect(installed) as connection:
        app.enqueue("t", connection=connection)
    assert column(conn, METAS) == [
        {"trace": 1, "by": "Ada"}, None, {"own": 1}, {"trace": 2, "from": "web"}, {"trace": 3, "from": "web"},
        {"trace": 3, "from": "web"}, {"trace": 4, "from": "web"}]


@pytest.mark.parametrize(("returned", "meta", "words"), [
    ({"a": object()}, None, "meta: not JSON"), ({"a": "b" * 9000}, None, "meta: must be a JSON object of at most 8 KiB"),
    ({"a": 1}, [1], "meta: must be a JSON object"),
    *[(rubbish, {"a": 1}, f"on_enqueue: must return a dict or None, not {type(rubbish).__name__}")
      for rubbish in ([("a", 1)], "trace", 5, object())]])
def test_meta_that_cannot_be_is_refused(app: Orchestrator, conn: Connection, returned: Any, meta: Any, words: str) -> None:
    app.on_enqueue(lambda: returned)
    with pytest.raises(ValueError, match=f"^{re.escape(words)}"):
        app.enqueue("t", meta=meta)
    assert column(conn, METAS) == []


def test_what_on_enqueue_raises_keeps_the_task_from_being_enqueued(app: Orchestrator, conn: Connection) -> None:
    @app.on_enqueue
    def broken() -> dict[str, Any]:
        raise LookupError("no user")
    with pytest.raises(LookupError, match="no user"):
        app.enqueue("t")
    assert column(conn, METAS) == []


@pytest.mark.parametrize("kind", ["plain", "async"])
def test_a_child_enqueued_in_a_handler_gets_the_handlers_context(installed: str, conn: Connection, kind: str) -> None:
    trace: ContextVar[str | None] = ContextVar("trace", default=None)
    app = make_app(installed)

    @app.use
    def traced(task: Task, call_next: Any) -> Any:
        token = trace.set((task.meta or {}).get("trace"))
        try:
            return call_next(task)
        finally:
            trace.reset(token)
    app.on_enqueue(lambda: {"trace": trace.get()} if trace.get() else None)

    def plain(task: Task) -> str:
        return app.enqueue("child")

    async def asynchronous(task: Task) -> str:
        await asyncio.sleep(0)
        return await app.enqueue_async("child")
    app.handler("parent", plain if kind == "plain" else asynchronous)
    with running(installed, app):
        traced_one, other = app.enqueue("parent", meta={"trace": "abc"}), app.enqueue("parent")
        children = [wait_for(app, id)["result"] for id in (traced_one, other)]
    assert [story(app, id)["meta"] for id in children] == [{"trace": "abc"}, None]
    app.close()


def test_a_fired_schedule_says_which_it_is_and_for_what_time(conn: Connection) -> None:
    conn.execute("set timezone = 'Asia/Kathmandu'")
    conn.execute("select orchestrator.schedule('each second', '@every 1 second', 't', p_missed => 'all')")
    conn.execute("update orchestrator.schedules set next_at = date_trunc('second', now() - interval '1.5 s')")
    fired = value(conn, "select fired from orchestrator.promote_due()")
    assert fired >= 2
    found = conn.execute("select meta, idempotency_key from orchestrator.tasks order by id").fetchall()
    for meta, key in found:
        assert meta == {"schedule": "each second", "fire_at": key[-20:]} and meta["fire_at"].endswith("Z")
        assert datetime.fromisoformat(meta["fire_at"]).tzinfo is not None
    assert len({meta["fire_at"] for meta, _ in found}) == fired
    by_hand = value(conn, "select orchestrator.fire_schedule('each second')")
    meta = value(conn, "select meta from orchestrator.tasks where id = %s", by_hand)
    assert meta["schedule"] == "each second"
    at = datetime.fromisoformat(meta["fire_at"])
    assert abs((at - value(conn, "select now()")).total_seconds()) < 60


def test_a_schedule_whose_name_is_as_long_as_may_be_fires(conn: Connection) -> None:
    name = '"' * 200
    conn.execute("select orchestrator.schedule(%s, '@every 1 second', 't')", [name])
    id = value(conn, "select orchestrator.fire_schedule(%s)", name)
    assert value(conn, "select meta ->> 'schedule' from orchestrator.tasks where id = %s", id) == name


def test_meta_is_shown_with_a_task(conn: Connection, app: Orchestrator) -> None:
    id = enqueue(conn, meta=psycopg.types.json.Jsonb({"trace": "abc"}))
    assert value(conn, "select orchestrator.show_task(%s)", id)["meta"] == story(app, id)["meta"] == {"trace": "abc"}
