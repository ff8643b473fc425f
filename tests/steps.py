"""What the SQL tests do again and again, in one line each."""
from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

import psycopg
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from postgres import eventually

Connection = psycopg.Connection[Any]


def value(conn: Connection, query: str, *parameters: Any) -> Any:
    """The first column of the first row."""
    found = conn.execute(query, parameters).fetchone()
    return found[0] if found else None


def column(conn: Connection, query: str, *parameters: Any) -> list[Any]:
    return [found[0] for found in conn.execute(query, parameters)]


def row(conn: Connection, query: str, *parameters: Any) -> Any:
    """The first row as a dict."""
    with conn.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(query, parameters).fetchone()


def rows(conn: Connection, query: str, *parameters: Any) -> list[dict[str, Any]]:
    with conn.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(query, parameters).fetchall()


def enqueue(conn: Connection, type: str = "t", payload: Any = None, **named: Any) -> str:
    """Enqueue one task and return its id; `named` are enqueue's parameters without p_."""
    named = {"type": type, "payload": Jsonb(payload if payload is not None else {}), **named}
    arguments = ", ".join(f"p_{name} => %({name})s" for name in named)
    return str(conn.execute(f"select orchestrator.enqueue({arguments})", named).fetchone()[0])


def enqueue_some(conn: Connection, n: int, type: str = "t", priority: int = 0) -> list[str]:
    query = "select id::text from orchestrator.enqueue_many(%s, array_fill('{}'::jsonb, array[%s]), %s)"
    return column(conn, query, type, n, priority)


def register(conn: Connection, worker: str = "w", handlers: dict[str, Any] | Iterable[str] = ("t",)) -> str:
    handlers = handlers if isinstance(handlers, dict) else {type: {} for type in handlers}
    conn.execute("select orchestrator.register_worker(%s, 'host', 10, '1', %s)", [worker, Jsonb(handlers)])
    return worker


def claim(conn: Connection, worker: str = "w", types: Iterable[str] = ("t",), limit: int = 10) -> list[dict[str, Any]]:
    return rows(conn, "select *, id::text from orchestrator.claim_tasks(%s, %s, %s)", worker, list(types), limit)


def claim_one(conn: Connection, worker: str = "w", types: Iterable[str] = ("t",)) -> tuple[int, str]:
    """Claim one task and return (claim id, task id)."""
    [claimed] = claim(conn, worker, types, 1)
    return claimed["claim_id"], str(claimed["id"])


def start(conn: Connection, claim_id: int, *ids: str) -> int:
    return value(conn, "select orchestrator.start_tasks(%s, %s::uuid[])", claim_id, list(ids))


def complete(conn: Connection, claim_id: int, *ids: str) -> dict[str, str]:
    """Complete tasks of one claim; returns those that didn't, with their outcomes."""
    query = "select id::text, outcome from orchestrator.complete_tasks(array[%s::bigint], array[%s::int], %s::uuid[])"
    return dict(conn.execute(query, [claim_id, len(ids), list(ids)]).fetchall())


def fail(conn: Connection, claim_id: int, id: str, error: str = "no", after: str | None = None,
         permanent: bool = False) -> str:
    return value(conn, "select orchestrator.fail_task(%s, %s, %s, %s, %s)", claim_id, id, error, after, permanent)


def release(conn: Connection, claim_id: int, *ids: str) -> int:
    return value(conn, "select orchestrator.release_tasks(%s, %s::uuid[])", claim_id, list(ids) or None)


def snooze(conn: Connection, claim_id: int, id: str, delay: str = "1 hour") -> str:
    return value(conn, "select orchestrator.snooze_task(%s, %s, %s)", claim_id, id, delay)


def cancel(conn: Connection, id: str) -> str:
    return value(conn, "select orchestrator.cancel_task(%s)", id)


def retry(conn: Connection, id: str) -> str:
    return value(conn, "select orchestrator.retry_task(%s)", id)


def promote(conn: Connection) -> int:
    return value(conn, "select promoted from orchestrator.promote_due()")


def lead(conn: Connection, worker: str = "leader", length: str = "1 hour") -> int:
    """Register a worker that has no handlers, elect it, and return its term."""
    register(conn, worker, ())
    elected, term = conn.execute("select is_leader, term from orchestrator.acquire_leadership(%s, %s)",
                                 [worker, length]).fetchone()
    assert elected
    return term


def recover(conn: Connection, term: int, worker: str = "leader", limit: int = 1000) -> dict[str, int]:
    return row(conn, "select * from orchestrator.recover_orphans(%s, %s, %s)", worker, term, limit)


def declare_dead(conn: Connection, worker: str) -> None:
    """As the leader does with a worker that it hasn't heard of."""
    conn.execute("update orchestrator.workers set declared_dead_at = clock_timestamp(), idle = false where id = %s",
                 [worker])


def task(conn: Connection, id: str) -> Any:
    return row(conn, "select * from orchestrator.tasks where id = %s", id)


def status(conn: Connection, id: str) -> str:
    return value(conn, "select status from orchestrator.tasks where id = %s", id)


def events(conn: Connection, id: str) -> list[str]:
    return column(conn, "select event from orchestrator.task_events where task_id = %s order by id", id)


def claims(conn: Connection) -> dict[int, int]:
    """Open tasks by claim."""
    return dict(conn.execute("select id, open_tasks from orchestrator.claims").fetchall())


def audit(conn: Connection) -> list[Any]:
    return conn.execute("select * from orchestrator.audit()").fetchall()


def backend(conn: Connection) -> int:
    return conn.info.backend_pid


def background(call: Callable[[], Any]) -> Future[Any]:
    """Run `call` on a thread: for what is expected to wait for a lock."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def rung(conn: Connection, other: Connection) -> list[str]:
    """The notifications that `conn`, which listens to `orchestrator`, has got so far; `other` sends the last one."""
    other.execute("notify orchestrator, 'the last one'")
    heard = []
    for notification in conn.notifies(timeout=10):
        if notification.payload == "the last one":
            return heard
        heard.append(notification.payload)
    raise AssertionError("the last notification did not come")


def count_now(conn: Connection) -> None:
    """Have the queue counted in the leader's name: on a busy machine the next count may be half a minute away."""
    def counted() -> bool:
        conn.execute("update orchestrator.stats_state set next_at = null")
        return bool(column(conn, "select w.id from orchestrator.workers w, orchestrator.sample_stats(w.id, w.leader_term) due "
                                 "where w.is_leader and due is not null"))
    eventually(counted, 30)
