"""Orchestrators inside the test's process, and a way to the database that can fail."""
from __future__ import annotations

import contextlib
import socket
import threading
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
