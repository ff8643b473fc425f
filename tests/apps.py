"""Orchestrators inside the test's process."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg

from orchestrator import Handler, Orchestrator, Task, Worker
from postgres import eventually

SETTINGS: dict[str, Any] = {
    "metrics_port": 0, "claim_interval": 0.1, "heartbeat_interval": 0.2, "worker_timeout": 30, "worker_pool_size": 4}
ENDED = ("completed", "dead_letter", "cancelled")


def make_app(url: str, handlers: dict[str, Handler | Callable[[Task], Any]] | None = None, **settings: Any) -> Orchestrator:
    return Orchestrator(url, handlers, **{**SETTINGS, **settings})


@contextmanager
def running(url: str, handlers: dict[str, Handler | Callable[[Task], Any]] | Orchestrator, **settings: Any) -> Iterator[Orchestrator]:
    """A worker in this process's threads, registered; stopped at the end without grace."""
    app = handlers if isinstance(handlers, Orchestrator) else make_app(url, handlers, **settings)
    app.start()
    try:
        eventually(worker_of(app).registered.is_set)
        yield app
    finally:
        app.stop(0)


def worker_of(app: Orchestrator) -> Worker:
    assert app.worker is not None
    return app.worker


def story(app: Orchestrator, task_id: str) -> dict[str, Any]:
    task = app.get(task_id)
    assert task is not None
    return task


def wait_for(app: Orchestrator, task_id: str, *statuses: str, timeout: float = 10) -> dict[str, Any]:
    """The task's story once it has one of these statuses; without any: once it has ended."""
    def there() -> dict[str, Any] | None:
        task = story(app, task_id)
        return task if task["status"] in (statuses or ENDED) else None
    found = eventually(there, timeout)
    assert found is not None
    return found


def events(task: dict[str, Any]) -> list[str]:
    return [event["event"] for event in task["events"]]


def audit(conn: psycopg.Connection[Any]) -> list[Any]:
    return conn.execute("select * from orchestrator.audit()").fetchall()
