"""The primary dies under load: workers and producers move over by DATABASE_URL's list of hosts, and nothing acknowledged is lost.

Two servers with synchronous replication, one promoted by hand; and, with TEST_PATRONI=1, two nodes under Patroni and etcd, which
promote by themselves. That one needs `pip install 'patroni[etcd3]'` (in the Python named by PATRONI_PYTHON, else this one) and
etcd on the PATH; as root it runs as the user postgres, who must be able to reach both. Prints the seconds to the first claim.
"""
from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from postgres import LocalServer, _account, bin_folder, eventually, free_port, install_schema, processes_below
from steps import audit, column, rows, value

HANDLERS = """
import time
HANDLERS = {"t": lambda task: time.sleep(0.01)}
"""
SETTINGS = {"DISTRIBUTED_MODE": "true", "HEARTBEAT_INTERVAL": "500ms", "WORKER_TIMEOUT": "3s", "LEADER_TERM": "3s", "WORKER_POOL_SIZE": 4}


def url(ports: list[int], database: str = "orchestrator") -> str:
    hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
    return f"postgresql://postgres@{hosts}/{database}?target_session_attrs=read-write&connect_timeout=3"


class Promoted:
    """Two servers; whoever runs them promotes the standby when the primary is gone."""

    def __init__(self) -> None:
        self.servers: list[LocalServer] = []

    def start(self) -> None:
        self.servers += [LocalServer(fsync=True)]
        self.servers += [LocalServer(fsync=True)]
        primary, standby = self.servers
        standby.stop_server("immediate")
        shutil.rmtree(standby.data)
        standby.run("pg_basebackup", "-h", "127.0.0.1", "-p", str(primary.port), "-U", "postgres", "-D", str(standby.data), "-R",
                    "-X", "stream", "-c", "fast")
        standby.start()
        with primary.connect() as conn:
            conn.execute("alter system set synchronous_standby_names = '*'")
            conn.execute("select pg_reload_conf()")
            eventually(lambda: value(conn, "select count(*) from pg_stat_replication where sync_state = 'sync'") == 1)
            conn.execute("create database orchestrator")
        self.url = url([server.port for server in self.servers])

    def kill_primary(self) -> None:
        self.servers[0].kill()

    def wait_for_primary(self) -> None:
        standby = self.servers[1]
        with (standby.data / "postgresql.auto.conf").open("a") as file:
            file.write("synchronous_standby_names = ''\n")   # it has no standby now, and must not wait for one
        standby.run("pg_ctl", "promote", "-D", str(standby.data), "-w")

    def stop(self) -> None:
        for server in self.servers:
            server.stop()


class Patroni:
    """Two nodes under Patroni, which keep the leader's key in one etcd; when a machine dies the other one takes over."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="patroni-", dir="/tmp"))
        self.account = _account()
        if self.account:
            shutil.chown(self.folder, *self.account)

    def start(self) -> None:
        self.etcd_port, peer = free_port(), free_port()
        here, peers = f"http://127.0.0.1:{self.etcd_port}", f"http://127.0.0.1:{peer}"
        self._start("etcd", ["etcd", "--name", "e", "--data-dir", str(self.folder / "etcd"), "--listen-client-urls", here,
                             "--advertise-client-urls", here, "--listen-peer-urls", peers, "--initial-advertise-peer-urls", peers,
                             "--initial-cluster", f"e={peers}"])
        self.ports = [free_port(), free_port()]
        self.nodes = [self._node(n, port) for n, port in enumerate(self.ports)]
        self.url = url(self.ports)
        eventually(lambda: self._primary() is not None, 60)
        with psycopg.connect(url(self.ports, "postgres"), autocommit=True) as conn:
            eventually(lambda: value(conn, "select count(*) from pg_stat_replication where sync_state = 'sync'") == 1, 60)
            conn.execute("create database orchestrator")

    def _start(self, name: str, command: list[str]) -> subprocess.Popen[bytes]:
        uid, gid = self.account or (None, None)
        with (self.folder / f"{name}.log").open("wb") as log:
            return subprocess.Popen(command, cwd=self.folder, user=uid, group=gid, extra_groups=[] if self.account else None,
                                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                                    env={"PATH": os.environ["PATH"], "HOME": str(self.folder)})

    def _node(self, number: int, port: int) -> subprocess.Popen[bytes]:
        folder = self.folder / f"n{number}"
        folder.mkdir(mode=0o700)
        if self.account:
            shutil.chown(folder, *self.account)
        rest = f"127.0.0.1:{free_port()}"
        trust = ["local all all trust", "host all all 127.0.0.1/32 trust", "host replication all 127.0.0.1/32 trust"]
        config = {
            "scope": "demo", "name": f"n{number}", "restapi": {"listen": rest, "connect_address": rest},
            "etcd3": {"hosts": f"127.0.0.1:{self.etcd_port}"},
            "bootstrap": {"dcs": {"ttl": 20, "loop_wait": 2, "retry_timeout": 4, "synchronous_mode": True,
                                  "postgresql": {"use_pg_rewind": True, "use_slots": True, "parameters": {"wal_log_hints": "on"}}},
                          "initdb": [{"encoding": "UTF8"}, {"locale": "C.UTF-8"}, {"auth": "trust"}], "pg_hba": trust},
            "postgresql": {"listen": f"127.0.0.1:{port}", "connect_address": f"127.0.0.1:{port}", "data_dir": str(folder / "data"),
                           "bin_dir": str(bin_folder()), "pgpass": str(folder / "pgpass"),
                           "parameters": {"unix_socket_directories": str(folder)},
                           "authentication": {"replication": {"username": "replicator"}, "superuser": {"username": "postgres"},
                                              "rewind": {"username": "postgres"}}}}
        (folder / "patroni.yml").write_text(json.dumps(config))   # JSON is YAML
        (folder / "patroni.yml").chmod(0o644)
        python = os.environ.get("PATRONI_PYTHON", sys.executable)
        return self._start(f"n{number}", [*python.split(), "-m", "patroni", str(folder / "patroni.yml")])

    def _primary(self) -> int | None:
        """The number of the node that takes writes."""
        for number, port in enumerate(self.ports):
            with contextlib.suppress(psycopg.OperationalError):
                with psycopg.connect(f"host=127.0.0.1 port={port} user=postgres dbname=postgres connect_timeout=2") as conn:
                    if value(conn, "select not pg_is_in_recovery()"):
                        return number
        return None

    def kill_primary(self) -> None:
        """As when the machine dies: Patroni and PostgreSQL at once, or Patroni would start it again."""
        number = self._primary()
        assert number is not None
        os.killpg(self.nodes[number].pid, signal.SIGKILL)
        for pid in processes_below(self.folder / f"n{number}"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.nodes[number].wait()

    def wait_for_primary(self) -> None:
        eventually(lambda: self._primary() is not None, 60)

    def stop(self) -> None:
        for pid in processes_below(self.folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        eventually(lambda: not processes_below(self.folder), 20)
        shutil.rmtree(self.folder, ignore_errors=True)


class Producer(threading.Thread):
    """Enqueues as fast as it is acknowledged, each task under a key, again after each error; keeps the ids that were acknowledged."""

    def __init__(self, dsn: str) -> None:
        super().__init__(daemon=True)
        self.dsn, self.acknowledged, self.retried, self.enough = dsn, list[str](), 0, threading.Event()

    def run(self) -> None:
        key = 0
        while not self.enough.is_set():
            with contextlib.suppress(psycopg.OperationalError, psycopg.errors.ReadOnlySqlTransaction):
                with psycopg.connect(self.dsn, autocommit=True) as conn:
                    while not self.enough.is_set():
                        query = "select orchestrator.enqueue('t', '{}', p_idempotency_key => %s)::text"
                        self.acknowledged.append(value(conn, query, str(key)))
                        key += 1
                        self.enough.wait(0.005)
            self.retried += not self.enough.is_set()
            self.enough.wait(0.05)


@pytest.fixture(params=["promoted", "patroni"])
def cluster(request: Any) -> Iterator[Promoted | Patroni]:
    if request.param == "patroni" and not os.environ.get("TEST_PATRONI"):
        pytest.skip("TEST_PATRONI is not set: it takes a minute, and needs Patroni and etcd")
    made = Promoted() if request.param == "promoted" else Patroni()
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.mark.timeout(240)
def test_primary_dies_under_load_and_nothing_acknowledged_is_lost(cluster, worker_process, tmp_path, capsys):
    install_schema(cluster.url)
    (tmp_path / "handlers.py").write_text(HANDLERS)
    workers = [worker_process(cluster.url, **SETTINGS) for _ in range(2)]
    producer = Producer(cluster.url)
    producer.start()

    def completed() -> int:
        with psycopg.connect(cluster.url, autocommit=True) as conn:
            return int(value(conn, "select count(*) from orchestrator.tasks where status = 'completed'"))

    eventually(lambda: completed() > 200, 30)
    killed = time.time()
    cluster.kill_primary()
    gone = time.time()   # what is claimed from now on, is on the new primary
    before = len(producer.acknowledged)
    cluster.wait_for_primary()
    promoted = time.time()
    with psycopg.connect(cluster.url, autocommit=True) as conn:
        claims = "select extract(epoch from min(claimed_at))::float from orchestrator.tasks where claimed_at > to_timestamp(%s)"
        claimed = eventually(lambda: value(conn, claims, gone), 30)
        eventually(lambda: len(producer.acknowledged) > before + 200, 30)
        producer.enough.set()
        producer.join(20)
        eventually(lambda: value(conn, "select count(*) from orchestrator.tasks where status <> 'completed'") == 0, 60)
        assert producer.retried > 0, "the fault never bit"
        assert set(producer.acknowledged) <= set(column(conn, "select id::text from orchestrator.tasks"))
        assert rows(conn, "select idempotency_key from orchestrator.tasks group by 1 having count(*) > 1") == []
        assert audit(conn) == []
        assert value(conn, "select count(*) from orchestrator.workers where declared_dead_at is null") == 2
    assert [worker.process.poll() for worker in workers] == [None, None], "a worker ended"
    with capsys.disabled():
        print(f"\n  failover ({type(cluster).__name__.lower()}): new primary {promoted - killed:.1f} s after the kill, first claim "
              f"{claimed - promoted:+.2f} s from then, {len(producer.acknowledged)} acknowledged, none lost")
    assert claimed - promoted < 10
    assert [worker.stop() for worker in workers] == [0, 0]
