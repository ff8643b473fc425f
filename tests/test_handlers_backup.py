"""task:backup against real servers: what is restored equals what was dumped, what may go goes, what fails says why."""
from __future__ import annotations

import contextlib
import datetime
import errno
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import psycopg
import pytest
from psycopg.types.json import Jsonb

import handlers
from handlers import DAY, STAMP, check_backup
from orchestrator import Cancelled, Discard, Retry
from postgres import LocalServer, Server, bin_folder, eventually, free_port
from test_handlers_process import StandInTask, call, in_thread

CANARY = "Kanarien:vogel\\'\" $x"
CONTENT = """
create table customer (id int primary key, name text, at timestamptz);
insert into customer
    select n, 'näme ' || n, '2026-01-01'::timestamptz + n * interval '1 min' from generate_series(1, 5000) n;
create table "odd ""name" (x bytea);
insert into "odd ""name" select decode(md5(n::text), 'hex') from generate_series(1, 300) n;
create table empty ();
create view big_ids as select * from customer where id > 4000;
create table part (n int) partition by range (n);
create table part_1 partition of part for values from (0) to (100);
insert into part select generate_series(0, 99);
"""
DUMPING = ("select pid from pg_stat_activity"
           " where application_name = 'orchestrator backup' and datname = current_database()")
LOCKED = " and wait_event_type = 'Lock'"
TABLES = 5  # customer, odd "name, empty, part, part_1


def address(url: str) -> dict[str, Any]:
    """The fields of a payload that say which database."""
    parts = urlsplit(url)
    fields = {"host": parts.hostname, "port": parts.port, "user": parts.username, "database": unquote(parts.path[1:])}
    return fields | ({"password": unquote(parts.password)} if parts.password else {})


@pytest.fixture
def root(tmp_path, monkeypatch, server) -> Path:
    """BACKUP_ROOT, the only place that a backup may be written to."""
    monkeypatch.setenv("BACKUP_ROOT", str(tmp_path / "backups"))
    monkeypatch.setenv("PG_BIN", str(server.bin))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path / "backups"


@pytest.fixture
def source(db, root) -> dict[str, Any]:
    """The payload for a database with something in it."""
    with psycopg.connect(db) as connection:
        connection.execute(CONTENT)
    return address(db)


def fingerprint(url: str) -> dict[str, tuple[int, str]]:
    """Row count and checksum of each table and view."""
    found = {}
    with psycopg.connect(url) as connection:
        names = [row[0] for row in connection.execute(
            "select oid::regclass::text from pg_class"
            " where relkind in ('r', 'p', 'v') and relnamespace = 'public'::regnamespace")]
        for name in names:
            rows = sorted(str(row) for row in connection.execute(f"select t::text from {name} t".encode()))
            found[name] = (len(rows), hashlib.md5("".join(rows).encode()).hexdigest())
    return found


def restore(dump: str, url: str) -> None:
    program = str(Path(os.environ["PG_BIN"]) / "pg_restore")
    subprocess.run([program, "--no-owner", "--exit-on-error", "--dbname", url, dump], check=True, timeout=50)


def permissions(path: Path) -> int:
    return path.stat().st_mode & 0o777


def wrapper(directory: Path, name: str, script: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text(f"#!/bin/sh\n{script}\n")
    (directory / name).chmod(0o755)


@pytest.fixture
def programs(tmp_path, monkeypatch, root) -> Callable[..., Path]:
    """Make a PG_BIN of the real programs, some of them replaced by a shell script; REAL is the real directory."""
    real, directory = Path(os.environ["PG_BIN"]), tmp_path / "programs"

    def make(**scripts: str) -> Path:
        for name in ("psql", "pg_dump", "pg_restore"):
            wrapper(directory, name, f'REAL={real}\n{scripts.get(name, f"exec $REAL/{name}")} "$@"')
        monkeypatch.setenv("PG_BIN", str(directory))
        return directory

    return make


# --- A backup that can be relied on -----------------------------------------------------------------------------------

def test_backup_restores_to_the_same_rows(source, server, db, root):
    result = call(handlers.backup, StandInTask(source))
    assert Path(result["path"]).parent == root
    assert result["tables"] == TABLES
    assert result["bytes"] == os.path.getsize(result["path"])
    assert 0 < result["seconds"] < 60
    assert result["removed"] == 0
    restored = server.create_database()
    try:
        restore(result["path"], restored)
        assert fingerprint(restored) == fingerprint(db)
        assert fingerprint(restored)["customer"][0] == 5000
    finally:
        server.drop_database(restored)


def test_backup_is_private_and_leaves_nothing_beside_it(source, root):
    old = os.umask(0)
    try:
        result = call(handlers.backup, StandInTask({**source, "backup_dir": "a/b"}))
    finally:
        os.umask(old)
    path = Path(result["path"])
    assert path.parent == root / "a/b"
    assert permissions(path) == 0o600
    assert {permissions(directory) for directory in (root, root / "a", root / "a/b")} == {0o700}
    assert os.listdir(path.parent) == [path.name]
    assert os.listdir(tempfile.gettempdir()) == []


def test_backup_dir_that_others_may_read_is_closed_to_them(source, root):
    root.mkdir(mode=0o755)
    call(handlers.backup, StandInTask(source))
    assert permissions(root) == 0o700


def test_backup_runs_over_a_unix_socket_directory(server, source):
    if not isinstance(server, LocalServer):
        pytest.skip("the server's socket directory isn't on this machine")
    result = call(handlers.backup, StandInTask({**source, "host": str(server.folder)}))
    assert result["tables"] == TABLES


@pytest.mark.parametrize("name", ["host=nowhere.invalid dbname=postgres", "postgres://nowhere.invalid/x",
                                  "it's \"odd\" & $(touch x) ä", "../../etc/x", "a\\b"])
def test_name_of_a_database_is_only_ever_its_name(server, root, name):
    url = server.create_database(name)
    try:
        fields = address(server.dsn()) | {"database": name}
        with psycopg.connect(url) as connection:
            connection.execute("create table here (n int)")
        result = call(handlers.backup, StandInTask(fields))
        assert result["tables"] == 1
        assert Path(result["path"]).parent == root
        with pytest.raises(Discard, match="does not exist"):
            call(handlers.backup, StandInTask({**fields, "database": name[:-1]}))
    finally:
        server.drop_database(url)


def test_backup_reports_its_size_while_it_runs(source, monkeypatch, blocked):
    monkeypatch.setattr(handlers, "REPORT_EVERY", 0.05)
    task, running = blocked(source)
    eventually(lambda: task.reports)
    assert set(task.reports[-1]) == {"bytes"}
    task.cancel()
    with pytest.raises(Cancelled):
        running.result(10)


# --- Cancelled, timed out ---------------------------------------------------------------------------------------------

@pytest.fixture
def blocked(db) -> Iterator[Callable[..., Any]]:
    """Start a backup and wait until its pg_dump waits for a table that is locked; return (task, future)."""
    with psycopg.connect(db) as holder, psycopg.connect(db, autocommit=True) as watcher:
        tasks = []

        def start(payload: dict[str, Any]) -> Any:
            holder.execute("lock table customer in access exclusive mode")
            task = StandInTask(payload)
            tasks.append(task)
            running = in_thread(handlers.backup, task)
            eventually(lambda: running.done() or watcher.execute(DUMPING + LOCKED).fetchone(), 20)
            assert not running.done(), running.exception()
            return task, running

        yield start
        for task in tasks:
            task.cancel()


@pytest.mark.parametrize("reason", ["cancelled", "timeout", "shutdown", "lost"])
def test_backup_that_is_stopped_ends_pg_dump_and_leaves_no_file(source, root, db, blocked, reason):
    task, running = blocked({**source, "password": CANARY})
    assert [name.endswith(".dump.partial") for name in os.listdir(root)] == [True]
    assert permissions(root / os.listdir(root)[0]) == 0o600
    task.cancel(reason)
    with pytest.raises(Cancelled):
        running.result(10)
    assert os.listdir(root) == []
    assert secret_files() == []
    with psycopg.connect(db, autocommit=True) as connection:
        eventually(lambda: connection.execute(DUMPING).fetchone() is None)


def test_backup_cancelled_before_it_starts_connects_to_nothing(source, root):
    task = StandInTask(source)
    task.cancel()
    with pytest.raises(Cancelled):
        call(handlers.backup, task)
    assert os.listdir(root) == []


# --- Failures: clear, and told apart ----------------------------------------------------------------------------------

def test_unreachable_host_is_tried_again(source, root):
    with pytest.raises(Retry, match="Connection refused"):
        call(handlers.backup, StandInTask({**source, "port": free_port()}))
    assert os.listdir(root) == []


def test_database_or_role_that_does_not_exist_is_permanent(source):
    for field in ("database", "user"):
        with pytest.raises(Discard, match="does not exist"):
            call(handlers.backup, StandInTask({**source, field: "absent"}))


def test_table_that_the_role_may_not_read_is_permanent(source, db, root):
    role = f"nobody_{os.getpid()}"
    with psycopg.connect(db, autocommit=True) as connection:
        connection.execute(f"create role {role} login password 'x'")
        try:
            with pytest.raises(Discard, match="permission denied for table"):
                call(handlers.backup, StandInTask({**source, "user": role, "password": "x"}))
        finally:
            connection.execute(f"drop role {role}")
    assert os.listdir(root) == []


def test_pg_dump_older_than_the_server_is_permanent(source, programs):
    programs(pg_dump="echo 'pg_dump (PostgreSQL) 9.6.24'; exit;")
    with pytest.raises(Discard, match=r"pg_dump 9 is older than the server, PostgreSQL \d+: install"):
        call(handlers.backup, StandInTask(source))


def test_pg_dump_of_debian_15_against_a_newer_server_is_permanent(source, server, monkeypatch):
    if not (bin_folder("15") / "pg_dump").exists() or server.version_num < 160000:
        pytest.skip("needs Debian's PostgreSQL 15 client and a newer server")
    monkeypatch.setenv("PG_BIN", str(bin_folder("15")))
    with pytest.raises(Discard, match="pg_dump 15 is older than the server"):
        call(handlers.backup, StandInTask(source))


def test_pg_dump_without_psql_says_itself_that_it_is_older(source, programs):
    directory = programs(pg_dump="[ \"$1\" = --version ] && { echo 'pg_dump (PostgreSQL) 9.6.24'; exit; }; "
                                 "echo 'pg_dump: error: aborting because of server version mismatch' >&2; exit 1;")
    (directory / "psql").unlink()
    with pytest.raises(Discard, match="server version mismatch"):
        call(handlers.backup, StandInTask(source))


def test_missing_pg_dump_is_permanent(source, monkeypatch, tmp_path):
    monkeypatch.setenv("PG_BIN", str(tmp_path))
    with pytest.raises(Discard, match="pg_dump is not"):
        call(handlers.backup, StandInTask(source))


def test_pg_dump_of_the_servers_own_version_is_chosen_among_several(source, server, tmp_path, monkeypatch):
    own = server.version_num // 10000
    for version in (own - 1, own, own + 1):
        directory = tmp_path / str(version)
        wrapper(directory, "psql", f'exec {server.bin}/psql "$@"')
        wrapper(directory, "pg_restore", f'exec {server.bin}/pg_restore "$@"')
        wrapper(directory, "pg_dump", f'[ "$1" = --version ] && exec echo "pg_dump (PostgreSQL) {version}.1"\n'
                                      f'touch {directory}/used; exec {server.bin}/pg_dump "$@"')
    for found, used in (((own + 1, own, own - 1), own), ((own - 1, own + 1), own + 1)):
        directories = [tmp_path / str(version) for version in found]
        monkeypatch.setattr(handlers, "pg_directories", lambda directories=directories: directories)
        call(handlers.backup, StandInTask(source))
        assert (tmp_path / str(used) / "used").exists()
    assert not (tmp_path / str(own - 1) / "used").exists()


def test_full_disk_is_tried_again_and_leaves_no_file(source, root, db):
    root.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(root)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        with pytest.raises(Retry, match="backup_dir: the disk is full .*No space left on device"):
            call(handlers.backup, StandInTask(source))
        assert os.listdir(root) == []
    finally:
        subprocess.run(["umount", root], check=True)


def test_pg_dump_that_finds_the_disk_full_is_tried_again(source, root, programs):
    programs(pg_dump="[ \"$1\" = --version ] && exec $REAL/pg_dump --version; "
                     "echo 'pg_dump: error: could not write to output file: No space left on device' >&2; exit 1;")
    with pytest.raises(Retry, match="the disk is full"):
        call(handlers.backup, StandInTask(source))
    assert os.listdir(root) == []


def test_dump_that_cannot_be_listed_is_not_kept(source, root, programs):
    programs(pg_dump='[ "$1" = --version ] && exec $REAL/pg_dump --version; '
                     'echo garbage; exit;')
    with pytest.raises(Retry, match="pg_restore failed"):
        call(handlers.backup, StandInTask(source))
    assert os.listdir(root) == []


def test_error_text_is_bounded_and_without_the_password(source, programs):
    programs(pg_dump='[ "$1" = --version ] && exec $REAL/pg_dump --version; exec >&2; cat "$PGPASSFILE"; seq 100000; '
                     'cut -c 9- "$PGPASSFILE"; exit 1;')
    with pytest.raises(Retry) as failure:
        call(handlers.backup, StandInTask({**source, "password": "canary"}))
    assert "canary" not in str(failure.value)
    assert "***" in str(failure.value)
    assert len(str(failure.value)) < 1200


def test_backup_dir_that_is_a_file_is_permanent(source, root):
    root.mkdir()
    (root / "file").touch()
    with pytest.raises(Discard, match="backup_dir: "):
        call(handlers.backup, StandInTask({**source, "backup_dir": "file"}))


# --- What others do to its directory meanwhile ------------------------------------------------------------------------

def replace_by_link(directory: Path) -> None:
    """Move a directory away, and put a link to another one in its place."""
    directory.rename(directory.with_name("moved"))
    directory.with_name("other").mkdir()
    directory.symlink_to(directory.with_name("other"))


def replace_by_directory(directory: Path) -> None:
    directory.rename(directory.with_name("moved"))
    directory.mkdir()


def remove_partial(directory: Path) -> None:
    for path in directory.glob("*.partial"):
        path.unlink()


def empty_the_name(directory: Path) -> None:
    """Put an empty file in the place of the one that is being written."""
    path, = directory.glob("*.partial")
    path.unlink()
    path.touch()


@pytest.mark.parametrize("change", [replace_by_link, replace_by_directory, remove_partial, empty_the_name])
def test_backup_fails_when_its_file_is_not_what_its_path_names_any_more(source, root, db, change):
    with psycopg.connect(db) as holder, psycopg.connect(db, autocommit=True) as watcher:
        holder.execute("lock table customer in access exclusive mode")
        running = in_thread(handlers.backup, StandInTask({**source, "backup_dir": "daily"}))
        eventually(lambda: running.done() or watcher.execute(DUMPING + LOCKED).fetchone(), 20)
        assert not running.done(), running.exception()
        change(root / "daily")
    with pytest.raises(Retry, match="backup_dir: "):
        running.result(20)
    left = [path for path in root.rglob("*") if path.is_file()]
    assert [path for path in left if path.suffix == ".dump" and change is not empty_the_name] == []
    assert [path for path in left if path.stat().st_size] == []


def test_directory_that_is_replaced_before_pg_dump_opens_anything_is_no_success(source, root, programs):
    programs(pg_dump=f'[ "$1" = --version ] && exec $REAL/pg_dump --version; cd {root}; mv daily moved; mkdir other; '
                     'ln -s other daily; exec $REAL/pg_dump')
    with pytest.raises(Retry, match="backup_dir: "):
        call(handlers.backup, StandInTask({**source, "backup_dir": "daily"}))
    assert [path for path in root.rglob("*") if path.is_file()] == []


def test_dump_of_0_bytes_is_not_a_backup(source, root, programs):
    programs(pg_dump='[ "$1" = --version ] && exec $REAL/pg_dump --version; exit 0;')
    with pytest.raises(Retry, match="pg_restore failed"):
        call(handlers.backup, StandInTask(source))
    assert os.listdir(root) == []


def test_link_put_into_the_path_after_its_check_is_not_followed(root, tmp_path):
    (tmp_path / "elsewhere").mkdir(mode=0o755)
    root.mkdir()
    for link in (root / "daily", root / "a"):
        link.symlink_to(tmp_path / "elsewhere")
    for path in (root / "daily", root / "a/b"):
        with pytest.raises(Discard, match="backup_dir: "):
            handlers.open_private_directory(str(path))
    assert permissions(tmp_path / "elsewhere") == 0o755
    assert os.listdir(tmp_path / "elsewhere") == []


def test_backup_dir_of_another_user_is_refused_and_left_alone(source, root):
    if os.geteuid():
        pytest.skip("giving a directory away needs root")
    root.mkdir(mode=0o755)
    os.chown(root, 12345, 12345)
    with pytest.raises(Discard, match="backup_dir: belongs to another user"):
        call(handlers.backup, StandInTask(source))
    assert permissions(root) == 0o755
    result = call(handlers.backup, StandInTask({**source, "backup_dir": "below"}))
    assert Path(result["path"]).parent == root / "below"


@pytest.mark.parametrize(("number", "error"), [(errno.ENOSPC, Retry), (errno.EMFILE, Retry), (errno.EIO, Retry),
                                               (errno.EACCES, Discard)])
def test_error_that_may_pass_does_not_end_the_task_for_good(source, root, monkeypatch, number, error):
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "mkdir", fail)
    with pytest.raises(error, match=f"backup_dir: {os.strerror(number)}"):
        call(handlers.backup, StandInTask(source))


def test_two_backups_at_once_are_two_files(source, root, shelf):
    old = {shelf(100), shelf(200)}
    both = [in_thread(handlers.backup, StandInTask({**source, "retention_days": 7})) for _ in range(2)]
    results = [one.result(30) for one in both]
    assert sorted(os.listdir(root)) == sorted(Path(result["path"]).name for result in results)
    assert len(os.listdir(root)) == 2
    assert sum(result["removed"] for result in results) == len(old)


def test_old_backup_that_another_one_removes_first_is_no_failure(source, root, shelf, monkeypatch, caplog):
    old = {shelf(100), shelf(200)}
    for name in ("listdir", "scandir"):
        def list_then_remove(directory: Any, real: Callable[..., Any] = getattr(os, name)) -> Any:
            found = list(real(directory))
            for path in [root / name for name in old]:
                path.unlink(missing_ok=True)
            return found

        monkeypatch.setattr(os, name, list_then_remove)
    result = call(handlers.backup, StandInTask({**source, "retention_days": 7}))
    assert result["removed"] == 0
    assert [path.name for path in root.iterdir()] == [Path(result["path"]).name]
    assert caplog.text == ""


# --- Passwords --------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def strict_server() -> Iterator[Server]:
    """A server that asks for a password."""
    started = LocalServer()
    try:
        with started.connect() as connection:
            connection.execute(psycopg.sql.SQL("create role keeper superuser login password {}").format(CANARY))
            (started.data / "pg_hba.conf").write_text("local all all trust\nhost all keeper all scram-sha-256\n"
                                                      "host all clear all password\n")
            connection.execute("create role clear superuser login password 'secret'")
            connection.execute("create table customer as select generate_series(1, 10) n")
            connection.execute("select pg_reload_conf()")
        yield started
    finally:
        started.stop()


@pytest.fixture
def guarded(strict_server, root) -> dict[str, Any]:
    return {"host": "127.0.0.1", "port": strict_server.port, "user": "keeper", "database": "postgres"}


@pytest.fixture
def holding_customer(strict_server) -> Iterator[Callable[[], Any]]:
    """Lock the table, so that a pg_dump stops in the middle of its work; return how to see it waiting."""
    with psycopg.connect(host=str(strict_server.folder), port=strict_server.port, user="postgres") as holder, \
            psycopg.connect(host=str(strict_server.folder), port=strict_server.port, user="postgres",
                            autocommit=True) as watcher:
        holder.execute("lock table customer in access exclusive mode")
        yield watcher.execute("select 1").connection.execute


def secret_files() -> list[Path]:
    """The password files of all running pg_dump."""
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has ended
            name = re.search(rb"PGPASSFILE=/proc/self/(fd/\d+)", environment.read_bytes())
            if name:
                found.append(environment.parent / name[1].decode())
    return found


def everywhere_in_proc(text: str) -> list[str]:
    """Where a text shows in the command line or the environment of any process but this one."""
    found = []
    for path in (*Path("/proc").glob("[0-9]*/cmdline"), *Path("/proc").glob("[0-9]*/environ")):
        try:
            if text.encode() in path.read_bytes() and path.parent.name != str(os.getpid()):
                found.append(str(path))
        except OSError:
            continue  # gone meanwhile
    return found


@pytest.mark.parametrize("way", ["password", "password_env", "password_file"])
def test_password_is_seen_nowhere_while_pg_dump_runs_and_after(
        guarded, holding_customer, root, tmp_path, monkeypatch, caplog, capfd, way):
    caplog.set_level("DEBUG")
    monkeypatch.setenv("BACKUP_PASSWORD_KEEPER", CANARY)
    monkeypatch.setenv("BACKUP_SECRETS", str(tmp_path))
    (tmp_path / "secret").write_text(CANARY + "\n")
    value = {"password": CANARY, "password_env": "BACKUP_PASSWORD_KEEPER", "password_file": "secret"}[way]
    task = StandInTask({**guarded, way: value})
    running = in_thread(handlers.backup, task)
    eventually(lambda: running.done() or holding_customer(DUMPING + LOCKED).fetchone())
    assert not running.done(), running.exception()
    passfile, = secret_files()
    assert permissions(passfile) == 0o600
    assert os.readlink(passfile).startswith("/memfd:")  # no name, so a worker that is killed leaves nothing of it
    assert CANARY.replace("\\", "\\\\").replace(":", "\\:") in passfile.read_text()
    assert everywhere_in_proc("--format=custom")  # the search does find what is there
    assert everywhere_in_proc(CANARY) == everywhere_in_proc(passfile.read_text().strip()) == []
    holding_customer("select pg_cancel_backend(pid) from (" + DUMPING + ") dumping")
    with pytest.raises(Retry, match="canceling statement due to user request") as failure:
        running.result(20)
    assert secret_files() == []
    written = [str(failure.value), repr(failure.value), caplog.text, *capfd.readouterr(), repr(task.reports)]
    assert not [text for text in written if CANARY in text or "Kanarien" in text]


@pytest.mark.parametrize("way", ["password", "password_env"])
def test_password_with_odd_characters_opens_the_server(guarded, monkeypatch, root, way):
    monkeypatch.setenv("BACKUP_PASSWORD", CANARY)
    result = call(handlers.backup, StandInTask({**guarded, way: CANARY if way == "password" else "BACKUP_PASSWORD"}))
    assert result["tables"] == 1
    assert CANARY not in repr(result)
    assert not [path for path in root.iterdir() if CANARY.encode() in path.read_bytes() or CANARY in path.name]


def test_worker_that_is_killed_leaves_no_password_on_disk(guarded, holding_customer, root, tmp_path):
    code = ("import handlers, sys; from test_handlers_process import StandInTask;"
            "handlers.backup(StandInTask(eval(sys.stdin.read())))")
    path = os.pathsep.join([str(Path(handlers.__file__).parent), str(Path(__file__).parent)])
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, text=True,
                          env={**os.environ, "PYTHONPATH": path}) as worker:
        assert worker.stdin is not None
        worker.stdin.write(repr({**guarded, "password": CANARY}))
        worker.stdin.close()
        eventually(lambda: worker.poll() is not None or holding_customer(DUMPING + LOCKED).fetchone())
        assert worker.poll() is None
        worker.kill()
    eventually(lambda: not everywhere_in_proc("--format=custom"))
    assert [path for path in tmp_path.rglob("*") if path.is_file() and "Kanarien" in path.read_text("latin-1")] == []
    assert [path.suffix for path in root.iterdir()] == [".partial"]


def test_password_longer_than_a_piece_of_output_shows_no_part_of_it(source, programs):
    programs(pg_dump='[ "$1" = --version ] && exec $REAL/pg_dump --version; exec >&2; '
                     'cut -c 9- "$PGPASSFILE"; printf "%0490d\\n" 0; exit 1;')
    with pytest.raises(Retry) as failure:
        call(handlers.backup, StandInTask({**source, "password": "canary" * 150}))
    assert "nary" not in str(failure.value)


@pytest.mark.parametrize("password", ["password", "failed", "user"])
def test_password_that_is_a_word_of_the_error_does_not_hide_that_it_is_permanent(guarded, password):
    with pytest.raises(Discard, match=r"\*\*\*"):
        call(handlers.backup, StandInTask({**guarded, "password": password}))


def test_url_with_a_password_in_a_programs_output_is_redacted(source, programs):
    programs(pg_dump='[ "$1" = --version ] && exec $REAL/pg_dump --version; '
                     'echo "cannot reach postgresql://me:c@nary@db/shop" >&2; exit 1;')
    with pytest.raises(Retry, match=r"cannot reach postgresql://me:\*\*\*@db/shop"):
        call(handlers.backup, StandInTask(source))


def test_wrong_password_is_permanent_and_not_repeated_in_the_error(guarded):
    with pytest.raises(Discard, match="password authentication failed") as failure:
        call(handlers.backup, StandInTask({**guarded, "password": "wrong-canary"}))
    assert "wrong-canary" not in str(failure.value)


def test_missing_password_is_permanent(guarded, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(Discard, match="no password supplied"):
        call(handlers.backup, StandInTask(guarded))


def test_password_is_not_sent_in_clear_to_a_server_that_asks_for_it_so(guarded, server):
    if int(subprocess.run([server.bin / "psql", "--version"], check=True, capture_output=True, text=True)
           .stdout.split()[-1].partition(".")[0]) < 16:
        pytest.skip("libpq has require_auth since 16")
    with pytest.raises(Discard, match="authentication method requirement"):
        call(handlers.backup, StandInTask({**guarded, "user": "clear", "password": "secret"}))


# --- Retention --------------------------------------------------------------------------------------------------------

def stamp(days_ago: float) -> str:
    return (datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=days_ago)).strftime(STAMP)


@pytest.fixture
def shelf(source, root) -> Callable[..., str]:
    """Put a file into the backup directory, so old by its name and its modification time; return its name."""
    label = check_backup(source).label

    def put(days_ago: float = 100, *, name: str = "{label}-{stamp}.dump", mtime_days_ago: float | None = None) -> str:
        root.mkdir(mode=0o700, exist_ok=True)
        path = root / name.format(label=label, stamp=stamp(days_ago))
        path.write_text("a backup")
        at = time.time() - (days_ago if mtime_days_ago is None else mtime_days_ago) * DAY
        os.utime(path, (at, at))
        return path.name

    return put


def test_retention_removes_old_backups_of_this_database_only(source, root, shelf, tmp_path):
    label = check_backup(source).label
    goes = {shelf(8), shelf(7.01), shelf(3000)}
    stays = {
        shelf(6.9), shelf(0.1),
        shelf(mtime_days_ago=-400),  # from the future
        shelf(mtime_days_ago=1),  # touched since, or copied here
        shelf(days_ago=-400, mtime_days_ago=100),  # its name is from the future
        *(shelf(name=check_backup({**source, **other}).label + "-{stamp}.dump") for other in (
            {"database": source["database"] + "2"}, {"database": "x" + source["database"]}, {"port": 1},
            {"host": "elsewhere"})),
        shelf(name="{label}-x-{stamp}.dump"), shelf(name="x{label}-{stamp}.dump"),
        shelf(name=".{label}-{stamp}.dump"), shelf(name="{label}-{stamp}.dump\n"),
        shelf(name="{label}-{stamp}.dump.gz"), shelf(name="{label}-{stamp}.dump.partial.old"),
        shelf(name="{label}-20260101T000000Z.dump"), shelf(name="{label}-99999999T999999.999999Z.dump"),
        shelf(name="{label}-٢٠٢٤٠١٠١T٠٠٠٠٠٠.٠٠٠٠٠٠Z.dump"),
        shelf(name="notes.txt"), shelf(name="-rf"), shelf(name="*"),
        shelf(0.5, name="{label}-{stamp}.dump.partial"),  # another worker may be writing it
    }
    goes.add(shelf(2, name="{label}-{stamp}.dump.partial"))  # left by a worker that was killed
    directory, link = root / f"{label}-{stamp(90)}.dump", root / f"{label}-{stamp(92)}.dump"
    below, target = root / "sub" / f"{label}-{stamp(91)}.dump", tmp_path / "target"
    for path in (directory, root / "sub"):
        path.mkdir()
    for path in (below, target):
        path.touch()
    link.symlink_to(target)
    for path in (directory, link, below, target):
        os.utime(path, (0, 0), follow_symlinks=False)
    before = set(os.listdir(root))
    result = call(handlers.backup, StandInTask({**source, "retention_days": 7}))
    after = set(os.listdir(root))
    assert before - after == goes
    assert stays | {directory.name, link.name} < after
    assert after - before == {Path(result["path"]).name}
    assert result["removed"] == len(goes)
    assert link.exists()
    assert below.exists()


def test_retention_of_0_or_none_keeps_everything(source, root, shelf):
    old = shelf(5000)
    call(handlers.backup, StandInTask(source))
    call(handlers.backup, StandInTask({**source, "retention_days": 0}))
    assert old in os.listdir(root)
    assert len(os.listdir(root)) == 3


def test_retention_never_removes_the_backup_just_made(source, root):
    first = call(handlers.backup, StandInTask({**source, "retention_days": 1e-9}))
    second = call(handlers.backup, StandInTask({**source, "retention_days": 1e-9}))
    assert os.listdir(root) == [Path(second["path"]).name]
    assert second["removed"] == 1
    assert first["path"] != second["path"]


def test_last_good_backup_stays_when_the_next_one_fails(source, root, shelf, programs):
    old = shelf(5000)
    for failing in ({"port": free_port()}, {"database": "absent"}):
        with pytest.raises((Retry, Discard)):
            call(handlers.backup, StandInTask({**source, "retention_days": 1, **failing}))
    programs(pg_restore="exit 1;")
    with pytest.raises(Retry):
        call(handlers.backup, StandInTask({**source, "retention_days": 1}))
    assert os.listdir(root) == [old]


def test_backup_is_good_although_an_old_one_cannot_be_removed(source, root, shelf, monkeypatch, caplog):
    old = shelf(5000)
    unlink = os.unlink

    def refuse(path: Any, **options: Any) -> None:
        if path == old:
            raise PermissionError(1, "Operation not permitted")
        unlink(path, **options)

    monkeypatch.setattr(os, "unlink", refuse)
    result = call(handlers.backup, StandInTask({**source, "retention_days": 1}))
    assert os.path.exists(result["path"])
    assert result["removed"] == 0
    assert "cannot remove the old backup" in caplog.text


# --- Under a worker ---------------------------------------------------------------------------------------------------

def test_password_shows_nowhere_but_in_the_payload_itself(
        guarded, conn, installed, worker_process, run_cli, root, monkeypatch):
    canary = "K4n4r13nv0g3l"
    worker = worker_process(installed, HANDLERS="handlers", BACKUP_ROOT=root, PG_BIN=os.environ["PG_BIN"], DEBUG="true",
                            BACKUP_PASSWORD_X=canary)
    enqueue = "select orchestrator.enqueue('task:backup', %s)::text"
    ids = [conn.execute(enqueue, [Jsonb({**guarded, **password})]).fetchone()[0]
           for password in ({"password": canary}, {"password_env": "BACKUP_PASSWORD_X"})]
    status = "select status::text, last_error from orchestrator.tasks where id = %s"
    for task in ids:
        eventually(lambda task=task: conn.execute(status, [task]).fetchone()[0] == "dead_letter", 30)
        assert "password authentication failed" in conn.execute(status, [task]).fetchone()[1]
    pages = ["/", "/metrics", "/health", "/ready", "/api/overview", "/api/history", "/api/tasks", "/api/failures",
             "/api/tasks?status=in_flight", "/api/tasks?status=scheduled", "/api/tasks?status=dead_letter",
             *(f"/api/task?id={task}" for task in ids)]
    seen = {path: get(worker.address + path) for path in pages}
    assert ids[0] in seen["/api/tasks?status=dead_letter"]
    seen |= {command: run_cli(*command.split(), env={"DATABASE_URL": installed}).stdout for command in (
        f"show {ids[0]}", f"show {ids[0]} --json", "list --json", "stats")}
    assert "password" in seen[f"show {ids[0]}"]
    views = ("pending_tasks", "running_tasks", "dead_letters", "queue_stats", "task_events", "workers", "task_types")
    seen |= {view: str(conn.execute(f"select t::text from orchestrator.{view} t".encode()).fetchall()) for view in views}
    seen["log"] = worker.output
    assert "dead_letter" in seen["log"] or "password authentication failed" in seen["log"]
    seen["without the payload"] = str(conn.execute("select to_jsonb(t) - 'payload' from orchestrator.tasks t").fetchall())
    assert [where for where, text in seen.items() if canary in text] == []
    assert os.listdir(root) == []


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as response:
        return str(response.read().decode())


def test_backup_under_a_worker_ends_with_its_result(source, conn, installed, worker_process, root):
    worker_process(installed, HANDLERS="handlers", BACKUP_ROOT=root, PG_BIN=os.environ["PG_BIN"])
    task = conn.execute("select orchestrator.enqueue('task:backup', %s)", [Jsonb(source)]).fetchone()[0]
    result = eventually(lambda: conn.execute(
        "select result from orchestrator.tasks where id = %s and status = 'completed'", [task]).fetchone(), 30)[0]
    assert set(result) == {"path", "bytes", "seconds", "tables", "removed"}
    assert result["bytes"] == os.path.getsize(result["path"])
