"""Orchestrators inside the test's process, and a way to the database that can fail."""
from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg

from orchestrator import Handler, Link, Orchestrator, Outcome, Task, Worker
from postgres import eventually
from steps import value

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


def at_rest(url: str, handlers: dict[str, Any] | None = None, **settings: Any) -> Worker:
    """A worker whose threads were never started."""
    app = make_app(url, handlers or {"a": lambda task: None}, **{"worker_pool_size": 10, **settings})
    return Worker(app.config, app.router)


@contextmanager
def registered(url: str, handlers: dict[str, Any] | None = None, **settings: Any) -> Iterator[Worker]:
    """A worker at rest, which the database knows; its links are closed at the end."""
    worker = at_rest(url, handlers, **settings)
    worker.reports.link.settings["lock_timeout"] = "100ms"   # of 1 s: tests hold locks for as long as they like
    worker.heartbeat.register()
    worker.claims.claiming_as = worker.id
    try:
        yield worker
    finally:
        for loop in (worker.claims, worker.reports, worker.heartbeat):
            Link.close(loop.link)


def claimed(worker: Worker, count: int = 10) -> list[Task]:
    """What a worker at rest claims and hands out, in the order of the claim."""
    worker.claims.claiming_as = worker.id
    worker.claims._claim(count)
    ids = [row[1] for row in worker.claims.arrived]
    worker.claims._hand_out()
    return [worker.tasks[id] for id in ids]


def end(worker: Worker, task: Task, outcome: Outcome | None = None) -> None:
    """As a pool thread does when a handler has ended."""
    with contextlib.suppress(ValueError):
        worker.pool.ready.remove(task)
    task.started, task.outcome = time.monotonic(), outcome
    worker.pool.finished.append(task)


class Gate:
    """A handler that says that it started, and waits until it may go on."""

    def __init__(self) -> None:
        self.started, self.open = threading.Semaphore(0), threading.Event()
        self.tasks: list[Task] = []

    def __call__(self, task: Task) -> None:
        self.tasks.append(task)
        self.started.release()
        assert self.open.wait(30)

    def wait_started(self) -> Task:
        assert self.started.acquire(timeout=15)
        return self.tasks[-1]


def obedient(task: Task) -> None:
    """Runs until it is asked to stop."""
    assert task.cancelled.wait(30)
    task.raise_if_cancelled()


def raising(error: BaseException) -> Callable[[Task], Any]:
    def handler(task: Task) -> None:
        raise error
    return handler


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


def wait_for_on(conn: psycopg.Connection[Any], task_id: str, status: str, timeout: float = 15) -> None:
    eventually(lambda: value(conn, "select status from orchestrator.tasks where id = %s", task_id) == status, timeout)


def audit(conn: psycopg.Connection[Any]) -> list[Any]:
    return conn.execute("select * from orchestrator.audit()").fetchall()


class Relay:
    """A way to the database that can be cut, and turned silent."""

    def __init__(self, target: str, port: int = 0) -> None:
        self.target = psycopg.conninfo.conninfo_to_dict(target)
        self.listener = socket.create_server(("127.0.0.1", port))
        self.sockets: list[socket.socket] = []
        self.silent = False
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"postgresql://{self.target['user']}@127.0.0.1:{self.listener.getsockname()[1]}/{self.target['dbname']}"

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            far = socket.create_connection((str(self.target["host"]), int(str(self.target["port"]))))
            self.sockets += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                if not self.silent:
                    sink.sendall(data)
        except OSError:
            pass
        for end in (source, sink):
            end.close()

    def cut(self) -> None:
        for end in (self.listener, *self.sockets):
            with contextlib.suppress(OSError):   # closed already
                end.shutdown(socket.SHUT_RDWR)   # of the listener too: a thread in accept() would keep the port listening
        self.listener.close()
