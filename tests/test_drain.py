"""app.drain() runs what is ready in this thread, over the SQL of a worker."""
from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest

from apps import audit, events, make_app, running, story, wait_for
from orchestrator import Cancelled, ConfigError, Discard, Handler, Orchestrator, Retry, Snooze, Task
from postgres import Server, eventually
from steps import column, declare_dead, enqueue, lead, recover, value

Connection = psycopg.Connection[Any]


@pytest.fixture(autouse=True)
def nothing_is_left_behind(conn: Connection) -> Iterator[None]:
    """No worker, no claim, nothing that audit() would find."""
    yield
    assert column(conn, "select id from orchestrator.workers where id like 'drain:%%'") == []
    assert value(conn, "select count(*) from orchestrator.claims") == 0
    assert audit(conn) == []


def behave(task: Task) -> Any:
    """Ends as its payload says."""
    how = task.payload
    if how == "fails":
        raise RuntimeError("it fails")
    if how == "retries later":
        raise Retry("busy", after=3600)
    if how == "is discarded":
        raise Discard("hopeless")
    if how == "snoozes":
        raise Snooze(60)
    return how if how != "returns nothing" else None


def test_each_outcome_is_the_one_that_a_worker_would_have(installed: str, conn: Connection) -> None:
    app = make_app(installed, {"a": behave, "once": Handler(behave, max_retries=0)})
    ways = ("returns something", "returns nothing", "fails", "retries later", "is discarded", "snoozes")
    ids = {way: app.enqueue("a", way) for way in ways}
    last = app.enqueue("once", "fails")
    assert app.drain() == {"completed": 2, "retry_scheduled": 2, "dead_letter": 2, "snoozed": 1}
    statuses = [story(app, id)["status"] for id in (*ids.values(), last)]
    assert statuses == ["completed", "completed", "retry_scheduled", "retry_scheduled", "dead_letter", "pending", "dead_letter"]
    assert story(app, ids["returns something"])["result"] == "returns something"
    assert story(app, last)["last_error"].startswith("RuntimeError: it fails")
    assert events(story(app, ids["fails"])) == ["failed", "retry_scheduled"]
    assert app.drain() == {}, "what is to be retried waits for its time"


def test_it_runs_in_the_callers_thread_by_priority(installed: str) -> None:
    order: list[Any] = []
    app = make_app(installed, {"a": lambda task: order.append((task.payload, threading.current_thread(), task.worker_id[:6]))})
    for priority in (1, 3, 2):
        app.enqueue("a", priority, priority=priority)
    assert app.drain() == {"completed": 3}
    assert order == [(n, threading.current_thread(), "drain:") for n in (3, 2, 1)]


def test_async_handlers_and_middleware_run_too(installed: str) -> None:
    async def handler(task: Task) -> str:
        return "awaited"
    app = make_app(installed, {"a": handler})
    app.use(lambda task, call_next: f"{call_next(task)} inside")
    task_id = app.enqueue("a")
    assert app.drain() == {"completed": 1}
    assert story(app, task_id)["result"] == "awaited inside"


def test_what_a_task_enqueues_is_run_as_well(installed: str) -> None:
    app = make_app(installed)

    @app.handler("count:down")
    def count_down(task: Task) -> None:
        if task.payload:
            app.enqueue("count:down", task.payload - 1)

    app.enqueue("count:down", 3)
    assert app.drain() == {"completed": 4}


def test_a_transaction_completes_its_task(installed: str, conn: Connection) -> None:
    conn.execute("create table written (n int)")

    def handler(task: Task) -> None:
        with task.transaction() as connection:
            connection.execute("insert into written values (1)")
            task.complete("kept")

    app = make_app(installed, {"a": handler})
    task_id = app.enqueue("a")
    assert app.drain() == {"completed": 1}
    assert (story(app, task_id)["result"], value(conn, "select n from written")) == ("kept", 1)


def test_a_task_that_is_cancelled_while_it_runs_ends_as_cancelled(installed: str) -> None:
    app = make_app(installed, {"a": lambda task: app.cancel(task.id)})
    app.enqueue("a")
    assert app.drain() == {"cancelled": 1}


@pytest.mark.parametrize(("types", "expected"), [
    ("*", {"mail:a", "mail:b", "sms:a", "sms"}), ("mail:*", {"mail:a", "mail:b"}), ("mail:", {"mail:a", "mail:b"}), ("mail:a", {"mail:a"}),
    ("sms", {"sms"}), ("sms:*", {"sms:a"}), ("s*", {"sms:a", "sms"})])
def test_it_runs_a_type_or_a_pattern_of_those_that_are_handled(installed: str, conn: Connection, types: str, expected: set[str]) -> None:
    ran: set[str] = set()
    app = make_app(installed, dict.fromkeys(("mail:", "mail:a", "sms*"), lambda task: ran.add(task.type)))
    for kind in ("mail:a", "mail:b", "sms:a", "sms", "fax"):
        enqueue(conn, kind)
    assert app.drain(types) == {"completed": len(expected)}
    assert ran == expected


@pytest.mark.parametrize("types", ["fax", "fax:*", "", "mail"])
def test_types_that_nobody_handles_are_an_error(installed: str, types: str) -> None:
    with pytest.raises(ValueError, match=f"types: no handler is registered for '{types}'".replace("*", r"\*")):
        make_app(installed, {"mail:": behave} if types else {"*": behave}).drain(types)


def test_a_list_of_types_is_refused(installed: str) -> None:
    with pytest.raises(ValueError, match="^types: must be a type, or a pattern"):
        make_app(installed, {"a": behave}).drain(["a"])


def test_a_handlers_exception_is_raised_once_it_is_recorded(installed: str) -> None:
    app = make_app(installed, {"a": behave})
    ids = [app.enqueue("a", way) for way in ("snoozes", "fails", "returns something")]
    with pytest.raises(RuntimeError, match="it fails"):
        app.drain(raises=True)
    assert [story(app, id)["status"] for id in ids] == ["pending", "retry_scheduled", "pending"]
    assert app.drain(raises=True) == {"completed": 1}


def test_an_interrupt_ends_the_drain_in_any_case(installed: str) -> None:
    def handler(task: Task) -> None:
        raise KeyboardInterrupt
    app = make_app(installed, {"a": handler})
    task_id = app.enqueue("a")
    with pytest.raises(KeyboardInterrupt):
        app.drain()
    assert story(app, task_id)["status"] == "retry_scheduled"


def test_an_interrupt_between_claim_and_report_gives_the_task_back(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt
    app = make_app(installed, {"a": behave})
    task_id = app.enqueue("a")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("orchestrator.run_task", interrupted)
        app.drain()
    assert story(app, task_id)["status"] == "pending"
    assert app.drain() == {"completed": 1}


def test_a_handler_that_raises_cancelled_of_its_own_accord_has_failed(installed: str) -> None:
    def handler(task: Task) -> None:
        raise Cancelled("no reason")
    app = make_app(installed, {"a": handler})
    app.enqueue("a")
    assert app.drain() == {"retry_scheduled": 1}


def test_a_task_that_enqueues_itself_meets_the_limit(installed: str) -> None:
    app = make_app(installed, {"a": lambda task: app.enqueue("a")})
    app.enqueue("a")
    with pytest.raises(RuntimeError, match=r"limit: 20 tasks ran, and there are more"):
        app.drain(limit=20)


def test_the_limit_may_be_met_exactly(installed: str, conn: Connection) -> None:
    app = make_app(installed, {"a": behave})
    app.enqueue_many("a", ["x", "y"])
    assert app.drain(limit=2) == {"completed": 2}
    app.enqueue_many("a", ["x", "y", "z"])
    with pytest.raises(RuntimeError):
        app.drain(limit=2)
    assert value(conn, "select count(*) from orchestrator.tasks where status = 'pending' and queued_at is not null") == 1
    with pytest.raises(ValueError, match="limit: must be"):
        app.drain(limit=0)


def test_limits_are_the_real_ones(installed: str, conn: Connection) -> None:
    app = make_app(installed, {"api:": behave, "key:": behave, "a": behave})
    app.limit("api:*", rate=2, per="1h")
    app.enqueue_many("api:call", list("abcde"))
    assert app.drain() == {"completed": 2}, "the rate"
    app.limit("key:*", max_per_key=1)
    app.enqueue_many("key:x", list("abc"), concurrency_keys=["k"] * 3)
    assert app.drain("key:*") == {"completed": 3}, "one after another"
    app.limit("a", max_running=1)
    app.enqueue_many("a", list("ab"))
    app.call("register_worker", "other", "host", 1, "1", "{}")
    assert len(app.call("claim_tasks", "other", "{a}", 1)) == 1
    assert app.drain("a") == {}, "another worker has the only permit"
    app.call("release_forgotten", "other", "{}")
    assert app.drain("a") == {"completed": 2}
    app.call("unregister_worker", "other")


def test_a_drain_ends_as_a_worker_would(server: Server, template: str) -> None:
    """Of the same tasks, with the same dependencies, under the same limits."""
    def ends_of(run: Callable[[Orchestrator], object]) -> list[Any]:
        url = server.create_database(template=urlsplit(template).path.lstrip("/"))
        app = make_app(url, {"a": Handler(behave, base_delay=3600), "key:": behave, "parent": lambda task: app.enqueue("child") and None,
                             "child": behave})
        app.limit("key:*", max_running=2, max_per_key=1)
        app.limit("a", max_running=1)
        for way in ("returns something", "fails", "retries later", "is discarded", "snoozes"):
            app.enqueue("a", way)
        app.enqueue_many("key:x", list("abcdef"), concurrency_keys=list("xyxyxy"))
        app.enqueue("parent")
        one, two, dead = app.enqueue("a", 1), app.enqueue("key:x", 2), app.enqueue("child", "is discarded")
        last = app.enqueue("a", 3, after=[one, two])
        app.enqueue("child", "after all", after=[last, dead], on_failure="run")
        app.enqueue("child", "never", after=[dead], on_failure="cancel")
        app.enqueue("child", "blocked", after=[last, dead])
        run(app)
        app.close()
        with psycopg.connect(url, autocommit=True) as conn:
            found = conn.execute("""
                select type, payload, status::text, attempts, result, left(last_error, 20), worker_id is null, claim_id is null,
                       (select array_agg(event order by id) from orchestrator.task_events where task_id = t.id)
                from orchestrator.tasks t order by type, payload""").fetchall()
            assert audit(conn) == []
        server.drop_database(url)
        return found

    def run_worker(app: Orchestrator) -> None:
        with running(app.config.database_url, app):
            left = "select count(*) from orchestrator.tasks where num_nonnulls(queued_at, parked_at) > 0"
            with psycopg.connect(app.config.database_url, autocommit=True) as conn:
                eventually(lambda: [value(conn, f"{left} or status in ('claimed', 'running')"),
                                    value(conn, "select count(*) from orchestrator.tasks")] == [0, 20])

    ends = ends_of(lambda app: app.drain())
    assert ends == ends_of(run_worker)
    assert {payload: status for _, payload, status, *_ in ends if payload in ("after all", "never", "blocked")} == {
        "after all": "completed", "never": "cancelled", "blocked": "pending"}


def test_a_paused_type_waits(installed: str) -> None:
    app = make_app(installed, {"a": behave})
    app.enqueue("a")
    app.call("pause_type", "a")
    assert app.drain() == {}
    app.call("resume_type", "a")
    assert app.drain() == {"completed": 1}


def test_a_schedule_that_was_fired_is_run(installed: str) -> None:
    app = make_app(installed, {"nightly": lambda task: task.payload})
    app.schedule("nightly", "30 3 * * *", "nightly", {"n": 1})
    assert app.drain() == {}
    [(task_id,)] = app.call("fire_schedule", "nightly")
    assert app.drain() == {"completed": 1}
    assert story(app, str(task_id))["result"] == {"n": 1}


def test_hooks_have_been_called_when_it_returns(installed: str) -> None:
    dead: list[Any] = []
    app = make_app(installed, {"a": behave})
    app.on_dead_letter(lambda task, error: threading.Event().wait(0.2) or dead.append((task.id, error)))
    task_id = app.enqueue("a", "is discarded")
    assert app.drain() == {"dead_letter": 1}
    assert dead == [(task_id, "hopeless")]


def test_what_others_have_locked_is_left_to_them(installed: str, conn: Connection, connect: Callable[..., Connection]) -> None:
    app = make_app(installed, {"a": behave})
    held, _ = app.enqueue("a"), app.enqueue("a")
    other = connect(autocommit=False)
    other.execute("select from orchestrator.tasks where id = %s for update", [held])
    assert app.drain() == {"completed": 1}
    other.rollback()
    assert app.drain() == {"completed": 1}


def test_an_outcome_waits_for_the_lock_on_its_row(
        installed: str, connect: Callable[..., Connection], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.LOCKED_SECONDS", 0.05)
    other = connect(autocommit=False)

    def handler(task: Task) -> None:
        other.execute("select from orchestrator.tasks where id = %s for update", [task.id])
        threading.Timer(1.2, other.rollback).start()   # the first report gives up after a second

    app = make_app(installed, {"a": handler})
    app.enqueue("a")
    assert app.drain() == {"completed": 1}


def test_it_may_run_beside_a_worker_of_the_same_program(installed: str) -> None:
    with running(installed, {"a": behave}) as app:
        task_id = app.enqueue("a", "returns something")
        app.drain()
        wait_for(app, task_id, "completed")
        assert app.worker is not None and app.worker.registered.is_set()
    assert app.drain() == {}, "and after it"


def test_it_goes_on_beside_a_leader_however_long_it_takes(installed: str, conn: Connection) -> None:
    """Between tasks it sends heartbeats; one that took too long was given to others, and is not its any more."""
    alive = "select last_heartbeat from orchestrator.workers where id = %s"
    beats: list[Any] = []

    def handler(task: Task) -> None:
        beats.append(value(conn, alive, task.worker_id))
        threading.Event().wait(0.1)   # longer than HEARTBEAT_INTERVAL
        if task.payload == 2 and not task.recovered:
            declare_dead(conn, task.worker_id)
            recover(conn, lead(conn))

    app = make_app(installed, {"a": handler}, heartbeat_interval=0.1)
    app.enqueue_many("a", range(4))
    assert app.drain() == {"completed": 4, "rejected": 1}
    assert len(set(beats)) == 5


def test_a_drain_whose_connections_broke_gives_back_what_it_held_and_says_goodbye(installed: str, conn: Connection) -> None:
    def handler(task: Task) -> None:
        if task.payload == 1 and not broken:
            broken.append(1)
            conn.execute("select pg_terminate_backend(pid, 5000) from pg_stat_activity where pid <> pg_backend_pid() "
                         "and datname = current_database()")
    broken: list[int] = []
    app = make_app(installed, {"a": handler})
    app.enqueue_many("a", range(3))
    with pytest.raises(psycopg.OperationalError):
        app.drain()
    assert column(conn, "select id from orchestrator.workers") == []
    assert column(conn, "select status::text from orchestrator.tasks order by id") == ["completed", "pending", "pending"]
    assert app.drain() == {"completed": 2}


def test_without_a_schema_it_is_installed_and_a_wrong_address_is_told(db: str) -> None:
    assert make_app(db, {"a": behave}).drain() == {}
    with pytest.raises((psycopg.OperationalError, ConfigError)):
        Orchestrator("postgresql://nobody@127.0.0.1:1/none", {"a": behave}).drain()


def test_retries_that_are_due_and_schedules_that_are_due_are_run(installed: str, conn: Connection) -> None:
    app = make_app(installed, {"a": behave, "nightly": behave})
    app.enqueue("a", "retries later")
    assert app.drain() == {"retry_scheduled": 1}
    app.schedule("nightly", "30 3 * * *", "nightly")
    conn.execute("update orchestrator.tasks set next_retry_at = now() - interval '1 second', payload = '1'")
    conn.execute("update orchestrator.schedules set next_at = now() - interval '1 second'")
    assert app.drain() == {"completed": 2}


def test_steps_and_signals_are_the_real_ones(installed: str, conn: Connection) -> None:
    charged: list[int] = []

    def handler(task: Task) -> Any:
        return [task.step("charge", lambda: charged.append(task.attempt) or len(charged)), task.signal("approved")]

    app = make_app(installed, {"order": handler})
    task_id = app.enqueue("order")
    assert app.drain() == {"snoozed": 1}
    app.signal(task_id, "approved", {"by": "alice"})
    assert app.drain() == {"completed": 1}
    assert (story(app, task_id)["result"], charged) == ([1, {"by": "alice"}], [1])


def test_hooks_at_enqueue_give_meta(installed: str) -> None:
    app = make_app(installed, {"a": lambda task: task.meta})
    app.on_enqueue(lambda: {"trace": "t"})
    assert app.perform("a", meta={"by": "alice"}) == {"trace": "t", "by": "alice"}
    task_id = app.enqueue("a")
    assert app.drain() == {"completed": 1}
    assert story(app, task_id)["result"] == {"trace": "t"}


def test_no_connection_is_left_open(installed: str, conn: Connection) -> None:
    app = make_app(installed, {"a": lambda task: task.step("one", lambda: 1)})
    app.enqueue("a")
    app.drain()
    app.close()
    others = "select count(*) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
    eventually(lambda: value(conn, others) == 0)   # the server notices a moment later


def test_scheduled_runs_what_is_delayed_or_to_be_retried_at_once(installed: str, conn: Connection) -> None:
    def handler(task: Task) -> str:
        if task.attempt < 3:
            raise RuntimeError("not yet")
        return f"attempt {task.attempt}"

    app = make_app(installed, {"flaky": Handler(handler, base_delay=3600), "mail:": behave, "dead": Handler(behave, max_retries=2)})
    flaky, delayed = app.enqueue("flaky"), app.enqueue("mail:bye", "sent", delay="1d")
    dead, other = app.enqueue("dead", "fails"), app.enqueue("other:type", delay="1d")
    assert app.drain("mail:*") == {}
    assert app.drain("mail:*", scheduled=True) == {"completed": 1}
    assert (story(app, delayed)["result"], story(app, flaky)["status"]) == ("sent", "pending")
    assert app.drain(scheduled=True) == {"completed": 1, "retry_scheduled": 4, "dead_letter": 1}
    assert (story(app, flaky)["result"], story(app, dead)["attempts"]) == ("attempt 3", 3)
    assert value(conn, "select next_retry_at > now() from orchestrator.tasks where id = %s", other), "nobody handles it here"


def test_scheduled_meets_the_limit_where_a_task_snoozes_for_ever(installed: str) -> None:
    app = make_app(installed, {"a": behave})
    app.enqueue("a", "snoozes")
    with pytest.raises(RuntimeError, match="limit: 10 tasks ran"):
        app.drain(scheduled=True, limit=10)


def test_scheduled_runs_more_than_one_call_takes(installed: str) -> None:
    app = make_app(installed, {"a": behave})
    app.enqueue_many("a", list(range(1100)), delay="1h")
    assert app.drain(scheduled=True) == {"completed": 1100}
