"""Fixtures: one PostgreSQL server a session, a fresh database a test, the command line and workers as processes."""
from __future__ import annotations

import atexit
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest

from postgres import Server, eventually, hold_every_rule, install_schema, make_small, processes_below, start_server, temporary_folder

REPOSITORY = Path(__file__).resolve().parent.parent
PROGRAM = REPOSITORY / "orchestrator.py"
START = [sys.executable, str(REPOSITORY / "tests" / "compiled.py"), str(PROGRAM)]   # python orchestrator.py

# The files that take longest start first: one of them at the end would keep a single process.
LONGEST = ["test_page", "test_readme", "test_examples", "test_handlers_nextjs", "test_cli", "test_bulk", "test_embedded", "test_model",
           "test_chaos", "test_program", "test_migrations", "test_races", "test_replace", "test_crash", "test_after", "test_demo",
           "test_handlers_backup", "test_report_loop", "test_claim_loop", "test_worker", "test_wheel", "test_typing", "test_steps"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    started = start_server()
    atexit.register(started.stop)  # also when pytest is interrupted before it gets to the line after yield
    yield started
    atexit.unregister(started.stop)
    started.stop()


@pytest.fixture(scope="session")
def template(server: Server) -> Iterator[str]:
    """A database that has the schema, to be cloned."""
    url = server.create_database()
    install_schema(url)
    hold_every_rule(url)
    make_small(url)
    yield url
    server.drop_database(url)


@pytest.fixture
def db(server: Server) -> Iterator[str]:
    """The URL of an empty database."""
    url = server.create_database()
    yield url
    server.drop_database(url)


@pytest.fixture
def installed(server: Server, template: str) -> Iterator[str]:
    """The URL of a database that has the schema and no rows."""
    url = server.create_database(template=urlsplit(template).path.lstrip("/"))
    yield url
    server.drop_database(url)


@pytest.fixture
def connect(installed: str) -> Iterator[Callable[..., psycopg.Connection[Any]]]:
    """Open further connections to the test's database; autocommit, unless told otherwise."""
    opened: list[psycopg.Connection[Any]] = []

    def open_connection(autocommit: bool = True, **parameters: Any) -> psycopg.Connection[Any]:
        opened.append(psycopg.connect(installed, autocommit=autocommit, **parameters))
        return opened[-1]

    yield open_connection
    for connection in opened:
        connection.close()


@pytest.fixture
def conn(connect: Callable[..., psycopg.Connection[Any]]) -> psycopg.Connection[Any]:
    """An autocommit connection to a database that has the schema and no rows."""
    return connect()


@pytest.fixture(scope="session")
def pure(server: Server, template: str) -> Iterator[psycopg.Connection[Any]]:
    """An autocommit connection to one database for all tests of what changes nothing, as many small ones are."""
    url = server.create_database(template=urlsplit(template).path.lstrip("/"))
    with psycopg.connect(url, autocommit=True) as connection:
        yield connection
    server.drop_database(url)


def clean_environment(**settings: Any) -> dict[str, str]:
    """Only what a program needs to run, and these settings: nothing of the shell that started the tests gets in."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "LANG") if name in os.environ}
    return {**kept, "PYTHONUNBUFFERED": "1", **{name: str(value) for name, value in settings.items()}}


@pytest.fixture
def folder() -> Iterator[Path]:
    """An empty folder that other users may enter: an embedded PostgreSQL that root starts runs as somebody else."""
    path = temporary_folder(programs=True)
    path.chmod(0o755)
    yield path
    for pid in processes_below(path):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def run_cli(folder: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `python orchestrator.py ARGS` to its end, in an empty folder."""

    def run(*args: str, env: dict[str, Any] | None = None, stdin: str | None = None, cwd: Path | None = None,
            timeout: float = 50) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*START, *args], check=False, input=stdin or "", text=True,
                              capture_output=True, cwd=cwd or folder, env=clean_environment(**env or {}),
                              timeout=timeout)

    return run


class WorkerProcess:
    """`python orchestrator.py` in a session of its own, its output in a file."""

    def __init__(self, url: str, log: Path, args: tuple[str, ...], settings: dict[str, Any]) -> None:
        self.url, self.log = url, log
        settings = {"DATABASE_URL": url, "METRICS_PORT": 0, **settings}
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [*START, *args], stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                env=clean_environment(**settings), cwd=log.parent, start_new_session=True)
        self.pid = self.process.pid

    @property
    def output(self) -> str:
        return self.log.read_text()

    @property
    def address(self) -> str:
        """http://host:port of its metrics, from its log."""
        return str(eventually(lambda: re.findall(r"http://[^\s/]+:\d+", self.output))[0])

    @property
    def id(self) -> str | None:
        """Its id in orchestrator.workers, which holds its process id; the latest, as it takes a new one when fenced."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            return self._id(connection)

    def _id(self, connection: psycopg.Connection[Any]) -> str | None:
        newest = "select id from orchestrator.workers where id like %s order by started_at desc limit 1"
        row = connection.execute(newest, [f"%:{self.pid}:%"]).fetchone()
        return row[0] if row else None

    def wait_registered(self) -> None:
        def registered() -> bool:
            assert self.process.poll() is None, f"the worker ended with {self.process.returncode}:\n{self.output}"
            return self._id(connection) is not None

        with psycopg.connect(self.url, autocommit=True) as connection:
            eventually(registered, 20)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def stop(self, timeout: float = 40) -> int:
        """SIGTERM, and return the exit code."""
        self.process.terminate()
        return self.process.wait(timeout)

    def kill(self) -> None:
        """kill -9 of the whole session, also what its handlers started in the same process group."""
        if self.process.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def worker_process(tmp_path: Path) -> Iterator[Callable[..., WorkerProcess]]:
    """Start workers: `worker_process(url, "--flag", WORKER_POOL_SIZE=5)`; killed at the end of the test."""
    started: list[WorkerProcess] = []

    def start(url: str, *args: str, wait: bool = True, **settings: Any) -> WorkerProcess:
        started.append(WorkerProcess(url, tmp_path / f"worker-{len(started) + 1}.log", args, settings))
        if wait:
            started[-1].wait_registered()
        return started[-1]

    yield start
    for worker in started:
        worker.kill()
