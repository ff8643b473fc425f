"""What a program meets: units of time, ranges in messages, star imports, types under mypy, wrong settings, an empty database."""
from __future__ import annotations

import asyncio
import builtins
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest

import orchestrator
from apps import make_app, running, story, wait_for, worker_of
from conftest import PROGRAM, REPOSITORY, clean_environment
from orchestrator import Cancelled, ConfigError, Handler, Orchestrator, Retry, Snooze, Task
from postgres import eventually
from steps import background, value

Connection = psycopg.Connection[Any]


def python(*args: str, cwd: Path | None = None, **settings: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], cwd=cwd, check=False, capture_output=True, text=True, timeout=110,
                          env=clean_environment(**{"PYTHONPATH": REPOSITORY, **settings}))


# ---------------------------------------------------------------------------------------------------- seconds of all kinds
@pytest.mark.parametrize(("given", "seconds"), [(600, 600), (600.0, 600), ("10m", 600), ("600", 600), (timedelta(minutes=10), 600),
                                                ("1.5h", 5400), ("3650d", 315360000), (" 10m ", 600)])
def test_a_delay_a_timeout_and_a_wait_take_seconds_a_timedelta_or_text(
        installed: str, conn: Connection, given: Any, seconds: float) -> None:
    app = make_app(installed)
    for task_id in (app.enqueue("a", delay=given), app.enqueue_many("a", [1], delay=given)[0]):
        due = value(conn, "select next_retry_at from orchestrator.tasks where id = %s", task_id)
        left = (due - datetime.now(UTC)).total_seconds()
        assert seconds - 60 < left <= seconds
    app.close()
    handler = Handler(print, timeout=given, base_delay=given, max_delay=given)
    assert (handler.timeout, handler.base_delay, handler.max_delay) == (seconds,) * 3
    assert Snooze(given).seconds == Retry("x", after=given).after == seconds


@pytest.mark.parametrize("given", [-1, "ten", "10 minutes", True, float("nan"), float("inf"), timedelta(days=-1), timedelta(days=3651),
                                   "3651d", b"1s", [1], "", "1m30s"])
def test_what_is_no_time_span_is_refused_by_name_everywhere(installed: str, given: Any) -> None:
    app = make_app(installed)
    for name, call in {"delay": lambda: app.enqueue("a", delay=given), "after": lambda: Retry("x", after=given),
                       "seconds": lambda: Snooze(given), "timeout": lambda: Handler(print, timeout=given),
                       "base_delay": lambda: Handler(print, base_delay=given)}.items():
        with pytest.raises(ValueError, match=f"^{name}: must be "):
            call()
    app.close()


@pytest.mark.parametrize(("named", "text"), [
    ({"priority": 99999999999}, "priority: must be a whole number from -1000000 to 1000000"),
    ({"priority": -10 ** 30}, "priority: must be a whole number from -1000000 to 1000000"),
    ({"priority": 1.5}, "priority: must be a whole number from"), ({"priority": True}, "priority: must be a whole number"),
    ({"priority": "1"}, "priority: must be a whole number from"),
    ({"max_retries": 1001}, "max_retries: must be a whole number from 0 to 1000"),
    ({"max_retries": 2 ** 70}, "max_retries: must be a whole number from 0 to 1000"),
    ({"idempotency_key": ""}, "idempotency_key: must be 1 to 255 bytes"),
    ({"idempotency_key": "x" * 256}, "idempotency_key: must be 1 to 255"),
    ({"idempotency_key": "a\0b"}, "idempotency_key: must be text"), ({"idempotency_key": "\ud800"}, "idempotency_key: must be text"),
    ({"run_at": datetime(2030, 1, 1)}, "run_at: must be a datetime with a time zone"),   # noqa: DTZ001
    ({"run_at": "2030-01-01"}, "run_at: must be a datetime"),
    ({"run_at": datetime.max.replace(tzinfo=UTC)}, "run_at: must be a moment within"),
    ({"run_at": datetime(2030, 1, 1, tzinfo=UTC), "delay": 1}, "delay: give either"), ({"payload": {"a": object()}}, "payload: not JSON"),
    ({"payload": "x" * 300_000, "idempotency_key": "k"}, "payload: is over 256 KiB"),
    ({"payload": "x" * 300_000}, "payload: is over 256 KiB")])
def test_a_refusal_names_the_field_and_what_it_may_be(installed: str, named: dict[str, Any], text: str) -> None:
    app = make_app(installed)
    with pytest.raises(ValueError) as caught:
        app.enqueue("a", **named)
    assert str(caught.value).startswith(text) and "\n" not in str(caught.value)
    app.close()


def test_a_key_may_be_a_uuid(installed: str) -> None:
    app, key = make_app(installed), uuid4()
    first = app.enqueue("a", idempotency_key=key)
    assert app.enqueue("a", idempotency_key=str(key)) == first == app.enqueue_many("a", [1], idempotency_keys=[key])[0]
    app.close()


# --------------------------------------------------------------------------------------------------------------- imports
def test_a_star_import_brings_the_public_names_and_nothing_else() -> None:
    program = """
import datetime, json, time, uuid
before = dict(globals())
from orchestrator import *
changed = {name for name, value in globals().items() if name != 'before' and before.get(name) is not value}
import orchestrator
assert changed == set(orchestrator.__all__), changed
assert datetime.datetime and json.dumps and time.time and callable(Orchestrator)
"""
    done = python("-c", program)
    assert (done.returncode, done.stderr) == (0, "")
    assert not set(orchestrator.__all__) & set(dir(builtins))


def test_the_module_is_imported_where_there_is_no_fork_no_poll_and_no_fcntl() -> None:
    """As on Windows, where a program can enqueue."""
    program = """
import os, select, sys
for name in ("fcntl", "pwd", "grp", "resource", "termios"):
    sys.modules[name] = None
del os.register_at_fork, os.fork, select.poll
import orchestrator
app = orchestrator.Orchestrator(sys.argv[1])
print(len([app.enqueue("a") for _ in range(2)]))
"""
    done = python("-c", program, "postgresql://127.0.0.1:1/d")
    assert "OperationalError" in done.stderr and "connection" in done.stderr   # it got that far


def test_it_enqueues_there_too(installed: str) -> None:
    program = """
import os, select, sys
import psycopg
for name in ("fcntl", "pwd"):
    sys.modules[name] = None
del os.register_at_fork, select.poll
import orchestrator
app = orchestrator.Orchestrator(sys.argv[1])
print(len({app.enqueue("a") for _ in range(3)}))
"""
    done = python("-c", program, installed)
    assert (done.stdout, done.stderr) == ("3\n", "")


def test_mypy_sees_the_types_of_handlers_and_of_what_enqueue_returns(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text('''
from datetime import timedelta
from typing import Any
from uuid import uuid4

from orchestrator import EnqueuedId, Handler, Orchestrator, Task

app = Orchestrator(json_default=str, worker_pool_size=4)


@app.handler("a", timeout="1m", base_delay=timedelta(seconds=1))
def handler(task: Task) -> int:
    return len(task.payload)


@app.handler("b")
async def asynchronous(task: Task) -> str:
    return str(task.attempt)


def plain(task: Task) -> None:
    task.sleep("1s")


reveal_type(handler)
reveal_type(asynchronous)
reveal_type(app.handler("c", plain))
reveal_type(app.enqueue("a", {"n": 1}, delay="10m", idempotency_key=uuid4()))
reveal_type(app.enqueue_many("a", [1], delay=timedelta(1)))
reveal_type(app.get("x"))


@app.on_dead_letter
def told(task: Task, error: str) -> None:
    print(task.id, error)


async def main() -> EnqueuedId:
    return await app.enqueue_async("a")


HANDLERS: dict[str, Any] = {"d": Handler(plain, timeout="1m")}
''')
    (tmp_path / "wrong.py").write_text('''
from orchestrator import Orchestrator

app = Orchestrator()


@app.handler("a")
def handler(number: int) -> None: ...
''')
    done = python("-m", "mypy", "--strict", "--cache-dir", str(REPOSITORY / ".mypy_cache"), "program.py", "wrong.py", cwd=tmp_path,
                  MYPYPATH=REPOSITORY, PYTHONPATH="")
    told = [line.split(": note: Revealed type is ")[1].strip('"') for line in done.stdout.splitlines() if "Revealed type is" in line]
    simple = [text.replace("builtins.", "").replace("orchestrator.", "") for text in told]
    assert simple[:4] == ["def (task: Task) -> int", "def (task: Task) -> typing.Coroutine[Any, Any, str]", "def (task: Task)",
                          "EnqueuedId"], done
    assert simple[4] == "list[EnqueuedId]" and simple[5].startswith(("Union[dict[str, Any], None]", "dict[str, Any] | None"))
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert len(errors) == 1 and errors[0].startswith("wrong.py:7"), errors


# ---------------------------------------------------------------------------------------------------------- wrong settings
SCRIPT = """
import sys
sys.path.insert(0, {folder!r})
from orchestrator import Orchestrator
app = Orchestrator({given})

@app.handler("a")
def handler(task):
    pass

app.{call}
"""


@pytest.mark.parametrize(("settings", "said"), [
    ({"WORKER_POOL_SIZE": "abc"}, "error: WORKER_POOL_SIZE: must be a whole number"),
    ({"DATABASE_URL": "postgresql://[::1"}, "error: DATABASE_URL: is not a postgresql:// URL"),
    ({"WORKER_TIMEOUT": "5s"}, "error: WORKER_TIMEOUT: must be at least twice")])
def test_a_script_with_a_wrong_setting_ends_as_the_command_does(tmp_path: Path, settings: dict[str, str], said: str) -> None:
    (tmp_path / "app.py").write_text(SCRIPT.format(folder=str(REPOSITORY), given="", call="run()"))
    for program in ("app.py", str(PROGRAM)):
        done = python(program, cwd=tmp_path, **settings)
        assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith(said) and done.stderr.count("\n") == 1, done


def test_what_the_program_itself_gets_wrong_is_raised_where_it_is_wrong() -> None:
    for name, given in {"worker_pool_size": "abc", "no_such_setting": 1, "claim_interval": -1}.items():
        with pytest.raises(ConfigError, match=f"^{name.upper()}: "):
            Orchestrator(**{name: given})


# --------------------------------------------------------------------------------------------------------- an empty database
@pytest.mark.parametrize("call", ["enqueue", "enqueue_keyed", "enqueue_many", "enqueue_async", "get", "view"])
def test_the_first_use_of_an_empty_database_installs_the_schema(db: str, call: str) -> None:
    app = make_app(db)
    {"enqueue": lambda: app.enqueue("a"), "enqueue_keyed": lambda: app.enqueue("a", idempotency_key="k"),
     "enqueue_many": lambda: app.enqueue_many("a", [1]), "enqueue_async": lambda: asyncio.run(app.enqueue_async("a")),
     "get": lambda: app.get(uuid4()), "view": lambda: app.view("queue_stats")}[call]()   # type: ignore[no-untyped-call]
    assert story(app, app.enqueue("a", {"n": 1}))["payload"] == {"n": 1}
    app.close()


def test_many_first_uses_at_once_install_it_once(db: str) -> None:
    apps = [make_app(db) for _ in range(6)]
    futures = [background(lambda app=app: app.enqueue("a")) for app in apps]   # type: ignore[misc]
    assert len({future.result(60) for future in futures}) == 6
    for app in apps:
        app.close()


def test_a_transaction_of_the_callers_is_told_the_command_instead(db: str) -> None:
    app = make_app(db)
    with psycopg.connect(db) as caller, pytest.raises(ConfigError, match="install"):
        app.enqueue("a", connection=caller)


def test_a_role_that_may_not_install_is_told_so_in_one_line(db: str, server: Any) -> None:
    with server.connect() as conn:
        conn.execute("drop role if exists may_nothing; create role may_nothing login")
    app = make_app(db.replace("postgres@", "may_nothing@", 1))
    with pytest.raises((ConfigError, psycopg.errors.InsufficientPrivilege)) as caught:
        app.enqueue("a")
    assert "permission denied" in str(caught.value) or "install" in str(caught.value)
    app.close()


# ----------------------------------------------------------------------------------------------------------------- sleep
def test_sleep_ends_at_once_when_its_task_is_cancelled_and_again_each_time(installed: str) -> None:
    started, tries = threading.Event(), []

    def handler(task: Task) -> None:
        started.set()
        began = time.monotonic()
        for _ in range(3):   # a loop around it doesn't spin quietly
            try:
                task.sleep("10m")
            except Cancelled as error:
                tries.append(str(error))
        assert time.monotonic() - began < 60
        task.sleep(timedelta(minutes=10))

    with running(installed, {"a": handler}) as app:
        task_id = app.enqueue("a")
        assert started.wait(20)
        assert app.cancel(task_id) == "cancelling"
        assert wait_for(app, task_id)["status"] == "cancelled"
    assert tries == ["cancelled"] * 3


def test_sleep_sleeps_if_nothing_happens(installed: str) -> None:
    slept = []

    def handler(task: Task) -> None:
        began = time.monotonic()
        task.sleep("50ms")
        slept.append(time.monotonic() - began)

    with running(installed, {"a": handler}) as app:
        wait_for(app, app.enqueue("a"))
        assert slept[0] >= 0.05 and worker_of(app).health() == []


def test_grace_takes_text_too(installed: str) -> None:
    app = make_app(installed, {"a": lambda task: None})
    app.start()
    app.stop("1s")
    with pytest.raises(ValueError, match="^grace: "):
        app.stop("soon")


def test_a_script_that_runs_a_worker_stops_at_sigterm_with_code_0(installed: str, tmp_path: Path, conn: Connection) -> None:
    (tmp_path / "app.py").write_text(SCRIPT.format(folder=str(REPOSITORY), given=f"{installed!r}, metrics_port='off'", call="run()"))
    process = subprocess.Popen([sys.executable, "app.py"], cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=clean_environment())
    try:
        eventually(lambda: value(conn, "select count(*) from orchestrator.workers") == 1, 40)
        process.terminate()
        _, errors = process.communicate(timeout=40)
        assert process.returncode == 0 and "Traceback" not in errors and "stopped" in errors
    finally:
        process.kill()
