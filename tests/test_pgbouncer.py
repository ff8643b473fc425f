"""Behind a real PgBouncer in transaction mode: no session state on the task path, polling instead of LISTEN."""
from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest

from apps import audit, running, wait_for, worker_of
from orchestrator import Handler, Task
from postgres import LocalServer, Server, eventually, free_port
from steps import value

Connection = psycopg.Connection[Any]
PGBOUNCER = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
pytestmark = pytest.mark.skipif(PGBOUNCER is None, reason="pgbouncer is not installed: apt-get install pgbouncer")


def start_pgbouncer(server: Server, ignored: str) -> tuple[subprocess.Popen[bytes], int, Path]:
    """In transaction mode, with few server connections. It refuses to run as root."""
    folder, port = Path(tempfile.mkdtemp(prefix="pgbouncer-", dir="/tmp")), free_port()
    (folder / "users").write_text('"postgres" ""\n')
    (folder / "ini").write_text(f"""[databases]
* = host={server.host} port={server.port}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = trust
auth_file = {folder}/users
pool_mode = transaction
default_pool_size = 6
max_client_conn = 200
{ignored}
""")
    user = next((u for u in pwd.getpwall() if u.pw_name in ("postgres", "nobody")), None) if os.geteuid() == 0 else None
    for path in (folder, *folder.iterdir()):
        if user:
            os.chown(path, user.pw_uid, user.pw_gid)
    process = subprocess.Popen([str(PGBOUNCER), "-q", str(folder / "ini")], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, user=user.pw_uid if user else None, group=user.pw_gid if user else None,
                               extra_groups=[] if user else None, cwd="/")
    return process, port, folder


@pytest.fixture(params=["options ignored", "options refused"])
def pooled(request: pytest.FixtureRequest, server: Server, installed: str) -> Iterator[str]:
    """The URL of the test's database through PgBouncer."""
    if not isinstance(server, LocalServer):
        pytest.skip("needs a server that trusts local connections")
    names = "extra_float_digits,options" if request.param == "options ignored" else "extra_float_digits"
    process, port, folder = start_pgbouncer(server, f"ignore_startup_parameters = {names}")
    url = f"postgresql://postgres@127.0.0.1:{port}{urlsplit(installed).path}"

    def answers() -> bool:
        assert process.poll() is None
        try:
            psycopg.connect(url, connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    try:
        eventually(answers)
        yield url
    finally:
        process.terminate()
        process.wait()
        shutil.rmtree(folder)


def test_a_worker_runs_behind_it(pooled: str, conn: Connection) -> None:
    conn.execute("create table ledger (entry text)")
    started = threading.Event()

    def pay(task: Task) -> None:
        with task.transaction() as connection:
            for n in range(8):   # often enough for psycopg to prepare it, if it did
                connection.execute("insert into ledger values (%s)", [str(n)])

    def obedient(task: Task) -> None:
        started.set()
        assert task.cancelled.wait(20)
        task.raise_if_cancelled()

    handlers = {"quick": lambda task: task.payload, "pay": pay, "obedient": obedient,
                "fails": Handler(lambda task: 1 / 0, max_retries=1, base_delay=0)}
    with running(pooled, handlers, claim_interval=0.05) as app:
        worker = worker_of(app)
        ids = app.enqueue_many("quick", range(500))
        paid, failed, stopped = app.enqueue("pay"), app.enqueue("fails"), app.enqueue("obedient")
        assert started.wait(15)
        assert app.cancel(stopped) == "cancelling"
        assert wait_for(app, stopped)["status"] == "cancelled"   # seen by asking: no notification gets through
        assert wait_for(app, failed)["attempts"] == 2
        assert wait_for(app, paid)["status"] == "completed"
        eventually(lambda: value(conn, "select count(*) from orchestrator.tasks where id = any (%s) and status = 'completed'", ids) == 500)
        assert all(loop.link.pooled for loop in (worker.claims, worker.reports, worker.heartbeat))
        assert not +worker.counters.errors
    assert value(conn, "select count(*) from ledger") == 8
    assert audit(conn) == []


def test_nothing_is_left_in_the_sessions_of_others(pooled: str) -> None:
    with running(pooled, {"quick": lambda task: None}) as app:
        wait_for(app, app.enqueue("quick"))
        with psycopg.connect(pooled, autocommit=True, prepare_threshold=None) as other:
            for _ in range(20):
                row = other.execute("select current_setting('statement_timeout'), (select count(*) from pg_prepared_statements)").fetchone()
                assert row == ("0", 0)


def test_two_single_instances_behind_it_leave_each_other_alone(pooled: str, conn: Connection) -> None:
    """Who lives can't be seen in pg_stat_activity there; heartbeats still can."""
    with running(pooled, {"a": lambda task: None}) as first:
        before = worker_of(first).id
        with running(pooled, {"a": lambda task: None}):
            beat = value(conn, "select last_heartbeat from orchestrator.workers where id = %s", before)
            eventually(lambda: value(conn, "select last_heartbeat > %s from orchestrator.workers where id = %s", beat, before))
            assert worker_of(first).id == before
            assert value(conn, "select count(*) from orchestrator.workers where declared_dead_at is null") == 2
