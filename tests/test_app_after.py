"""Dependencies and expiry in Python: enqueue(after=, on_failure=, expires=), task.parents(), the commands, what a worker counts."""
from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest

from apps import make_app, registered, running
from orchestrator import Orchestrator, Task
from postgres import eventually
from steps import audit, column, rows, status, task, value
from test_cli import Answer, cli, cli_on, logging_as_before  # noqa: F401

Connection = psycopg.Connection[Any]
UNKNOWN = "01890000-0000-7000-8000-000000000000"


@pytest.fixture
def app(installed: str) -> Iterator[Orchestrator]:
    app = make_app(installed)
    yield app
    app.close()


def waits(conn: Connection) -> dict[str, str]:
    """on_failure by child."""
    return dict(conn.execute("select child::text, on_failure from orchestrator.task_waits").fetchall())


def seconds_left(conn: Connection, id: str) -> float:
    left = value(conn, "select extract(epoch from expires_at - clock_timestamp())::float from orchestrator.tasks where id = %s", id)
    return float(left)


def test_each_way_to_enqueue_takes_after_on_failure_and_expires(app: Orchestrator, conn: Connection) -> None:
    parent = app.enqueue("t")
    made = [app.enqueue("t", after=[parent], on_failure="run", expires=60),
            app.enqueue("t", after=[UUID(parent)], on_failure="run", expires="1m", idempotency_key="k"),
            *app.enqueue_many("t", [1, 2], after=[parent], on_failure="run", expires=timedelta(minutes=1)),
            asyncio.run(app.enqueue_async("t", after=iter([parent]), on_failure="run", expires=datetime.now(UTC) + timedelta(minutes=1)))]
    with psycopg.connect(conn.info.dsn) as caller:
        made.append(app.enqueue("t", after=[made[0]], on_failure="run", expires=60, connection=caller))
    assert waits(conn) == dict.fromkeys(made, "run")
    assert all(50 < seconds_left(conn, id) <= 60 for id in made)
    assert [task(conn, id)["after"] for id in made] == [[UUID(parent)]] * 5 + [[UUID(made[0])]]


@pytest.mark.parametrize(("options", "words"), [
    ({"after": ["x"]}, "after[1]: must be a task's id"), ({"after": [UNKNOWN]}, f"after[1]: there is no task {UNKNOWN}"),
    ({"after": UNKNOWN}, "after: must be a list of ids"), ({"on_failure": "ignore"}, "on_failure: must be wait, cancel or run"),
    ({"after": [], "on_failure": "ignore"}, "on_failure: must be wait, cancel or run"), ({"expires": -1}, "expires: "),
    ({"expires": 0}, "expires_at: must be a moment to come"),
    ({"expires": datetime.now(UTC).replace(tzinfo=None)}, "expires: must be a datetime with"),
    ({"expires": 5, "delay": 10}, "expires_at: must be a moment to come, after run_at")])
def test_enqueue_names_the_field_that_is_wrong(app: Orchestrator, options: dict[str, Any], words: str) -> None:
    for call in (lambda: app.enqueue("t", **options), lambda: app.enqueue("t", idempotency_key="k", **options),
                 lambda: app.enqueue_many("t", [1], **options)):
        with pytest.raises(ValueError, match=f"^{re.escape(words)}"):
            call()


def test_a_handler_gets_the_results_of_the_tasks_that_it_waited_for(installed: str, conn: Connection) -> None:
    def total(task: Task) -> Any:
        return sorted(str(result) for result in task.parents().values())

    def fails(task: Task) -> None:
        raise ValueError("no")

    with running(installed, {"one": lambda task: 1, "two": lambda task: {"x": 2}, "none": lambda task: None, "fails": fails,
                             "total": total}) as app:
        with psycopg.connect(installed) as caller:   # a DAG in one transaction
            parents = [app.enqueue(type, max_retries=0, connection=caller) for type in ("one", "two", "none", "fails")]
            end = app.enqueue("total", after=parents, on_failure="run", connection=caller)
            last = app.enqueue("total", after=[end], connection=caller)
        eventually(lambda: status(conn, last) == "completed", 30)
        assert task(conn, end)["result"] == ["1", "None", "None", "{'x': 2}"]
        assert task(conn, last)["result"] == [str(["1", "None", "None", "{'x': 2}"])]
    assert audit(conn) == []


def test_a_task_without_parents_has_no_results(installed: str, conn: Connection) -> None:
    with running(installed, {"t": lambda task: task.parents()}) as app:
        id = app.enqueue("t")
        eventually(lambda: status(conn, id) == "completed")
        assert task(conn, id)["result"] == {}


def test_a_worker_sweeps_what_expired_and_counts_it(installed: str, conn: Connection) -> None:
    with registered(installed, {"t": lambda task: None}) as worker:
        ids = worker_ids = [value(conn, "select orchestrator.enqueue(%s, p_expires_at => now() + interval '1 hour')", type)
                            for type in ("t", "t", "u")]
        conn.execute("update orchestrator.tasks set expires_at = clock_timestamp()")
        conn.execute("update orchestrator.expiries set at = clock_timestamp()")
        worker.claims._promote_due()
        assert {str(status(conn, str(id))) for id in worker_ids} == {"cancelled"} and len(ids) == 3
        assert worker.counters.expired == {"t": 2, "other": 1}


def test_the_commands_enqueue_and_show_what_a_task_waits_for(cli: Callable[..., Answer], conn: Connection) -> None:   # noqa: F811
    parents = [cli("enqueue", "a").out.strip() for _ in range(2)]
    child = cli("enqueue", "b", "--after", parents[0], "--after", parents[1], "--on-failure", "run", "--expires", "60s").out.strip()
    assert waits(conn) == {child: "run"} and 50 < seconds_left(conn, child) <= 60
    shown = cli("show", child).out
    assert f"waits for task {parents[0]} (pending), task {parents[1]} (pending)" in shown
    assert re.search(rf"parents +{parents[0]} \(pending\), {parents[1]} \(pending\)\n", shown) and "children" not in shown
    assert re.search(rf"children +{child} \(pending\)\n", cli("show", parents[0]).out)
    answer = cli("enqueue", "b", "--after", UNKNOWN)
    assert answer.code == 2 and f"after[1]: there is no task {UNKNOWN}" in answer.err


def test_a_file_may_name_parents_and_the_flags_are_for_what_its_lines_leave_out(
        cli: Callable[..., Answer], conn: Connection, tmp_path: Any) -> None:   # noqa: F811
    first, second = (cli("enqueue", "a").out.strip() for _ in range(2))
    (tmp_path / "tasks.jsonl").write_text("\n".join(json.dumps(line) for line in (
        {"type": "b"}, {"type": "c", "after": [second], "on_failure": "cancel", "expires_at": "2030-01-01T00:00:00Z"},
        {"type": "d", "after": [UNKNOWN]})))
    answer = cli("enqueue", "--file", str(tmp_path / "tasks.jsonl"), "--after", first, "--on-failure", "run", "--expires", "1h")
    assert answer.code == 2 and f"line 3: after[1]: there is no task {UNKNOWN}" in answer.err
    query = """select t.type, w.parent::text, w.on_failure
               from orchestrator.task_waits w join orchestrator.tasks t on t.id = w.child order by 1"""
    assert [tuple(r.values()) for r in rows(conn, query)] == [("b", first, "run"), ("c", second, "cancel")]
    assert column(conn, "select extract(year from expires_at) = 2030 from orchestrator.tasks where type in ('b', 'c') order by type") == [
        False, True]
