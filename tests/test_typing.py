"""What mypy --strict makes of a user's program: it knows handlers, decorators, tasks and results, and finds mistakes.

As users have it: the one file beside their own, and the package of the wheel with its marker of types.
"""
from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from conftest import clean_environment
from test_wheel import bin, wheel  # noqa: F401
from tools import bundle

RIGHT = '''
import asyncio
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any, assert_type

from orchestrator import (
    Cancelled, ClaimLost, ConfigError, Discard, EnqueuedId, Handler, Limit, Orchestrator, Retry, Schedule, Snooze, Task, TaskFailed)


def plain(task: Task) -> int:
    return task.attempt


HANDLERS = {"b": Handler(plain, max_retries=5, base_delay="10s", timeout=timedelta(minutes=1))}
SCHEDULES = {"nightly": Schedule("@daily", "a", {"n": 1}, timezone="Europe/Berlin", missed="all")}
LIMITS = {"a": Limit(max_running=2, rate=3, per="1m")}
app = Orchestrator("postgresql://localhost/app", {"a": plain, **HANDLERS}, worker_pool_size=4)


@app.handler("task:sync", max_retries=3, base_delay=1, max_delay="1h", timeout=None)
def sync(task: Task) -> dict[str, str]:
    assert_type(task.id, str)
    assert_type(task.type, str)
    assert_type(task.payload, Any)
    assert_type(task.attempt, int)
    assert_type(task.max_retries, int)
    assert_type(task.priority, int)
    assert_type(task.created_at, datetime)
    assert_type(task.deadline, float | None)
    assert_type(task.cancelled.is_set(), bool)
    assert_type(task.cancel_reason, str | None)
    task.sleep("1s")
    task.progress({"step": 1})
    with task.transaction() as connection:
        connection.execute("select 1")
        task.complete({"n": 1})
    if task.attempt > 1:
        raise Snooze(60)
    raise Retry("no", after=timedelta(seconds=3)) if task.priority else Discard("never")


@app.handler("task:async:")
async def later(task: Task) -> list[int]:
    await asyncio.sleep(task.payload["seconds"])
    return [task.attempt]


@app.use
def timed(task: Task, call_next: Callable[[Task], Any]) -> Any:
    return call_next(task)


@app.use
async def awaited(task: Task, call_next: Callable[[Task], Any]) -> object:
    return await call_next(task)


@app.on_dead_letter
def report(task: Task, error: str) -> None:
    print(task.id, error)


app.handler("c", plain, timeout=5)
assert_type(app.handler("d", plain)(Task.__new__(Task)), int)
assert_type(sync(Task.__new__(Task)), dict[str, str])
assert_type(timed(Task.__new__(Task), plain), Any)
assert_type(report(Task.__new__(Task), "no"), None)

made = app.enqueue("a", {"n": 1}, priority=1, idempotency_key="k", delay="10m", concurrency_key="tenant", meta={"by": "me"})
assert_type(made, EnqueuedId)
assert_type(made.created, bool)
assert_type(app.enqueue_many("a", [1, 2]), list[EnqueuedId])
assert_type(app.replace("a", "k", [1], mode="append", delay=10, max_wait="1m", priority=None), EnqueuedId)
assert_type(app.schedule("s", "@daily", "a"), datetime | None)
assert_type(app.limit("a", max_running=1), bool)
assert_type(app.pause("a:*"), bool)
assert_type(app.resume("a:*"), bool)
assert_type(app.cancel(made), str)
assert_type(app.retry(made), str)
assert_type(app.get(made), dict[str, Any] | None)
assert_type(app.list({"type": "a", "status": "ready"}, limit=10), list[dict[str, Any]])
assert_type(app.stats(), list[dict[str, Any]])
assert_type(app.bulk("prioritize", {"type": "a"}, value=3, dry_run=False), dict[str, Any])
assert_type(app.wait(made, timeout="1m"), Any)
assert_type(app.wait_all([made]), list[Any])


async def main() -> str:
    assert_type(await app.enqueue_async("a", {"n": 1}, priority=1), EnqueuedId)
    try:
        assert_type(await app.wait_async(made, 10), Any)
    except TaskFailed as failed:
        assert_type(failed.error, str | None)
        return failed.status
    except (Cancelled, ClaimLost, ConfigError, TimeoutError):
        pass
    return "completed"


if __name__ == "__main__":
    app.run()
'''

# Each line with a mistake says which kind of error mypy has to find.
WRONG = '''
from collections.abc import Callable

from orchestrator import Handler, Orchestrator, Retry, Task

app = Orchestrator()


@app.handler("a")   # type-var
def without_a_task() -> None:
    pass


@app.handler("b", max_retry=3)   # call-overload untyped-decorator
def unknown_policy(task: Task) -> None:
    pass


@app.handler("c", timeout=object())   # call-overload untyped-decorator
def no_time(task: Task) -> None:
    task.attempts   # attr-defined
    task.attempt = 3   # misc
    task.sleep(None)   # arg-type
    raise Retry(after=1.0, later=2)   # call-arg


@app.use   # type-var
def no_middleware(task: Task) -> None:
    pass


@app.on_dead_letter   # type-var
def no_hook(task: Task, error: int) -> None:
    pass


Handler(no_time, base_delay=[1])   # arg-type
app.enqueue("a", {}, prioritiy=3)   # call-arg
app.enqueue("a", {}, delay=[3])   # arg-type
app.enqueue(5)   # arg-type
app.replace("a", "k", [1], mode="merge")   # arg-type
app.replace("a", payload=[1])   # call-arg
made: int = app.enqueue("a")   # assignment
app.list("a")   # arg-type
app.bulk("cancel")   # call-arg
app.wait("id", timeout=None)   # arg-type


async def main() -> None:
    app.enqueue_async("a")   # unused-coroutine
    await app.enqueue_async("a", prioritiy=3)   # call-arg
    await app.wait_async(3)   # arg-type
'''


def found(folder: Path, *options: str | Path) -> set[str]:
    (folder / "right.py").write_text(RIGHT)
    (folder / "wrong.py").write_text(WRONG)
    done = subprocess.run([sys.executable, "-m", "mypy", "--strict", *options, "right.py", "wrong.py"], cwd=folder, check=False,
                          capture_output=True, text=True, env=clean_environment(), timeout=110)
    assert done.stderr == ""
    errors = [re.fullmatch(r"(\S+): error: .*\[(.+)\]", line) for line in done.stdout.splitlines() if ": error: " in line]
    return {f"{error[1]} {error[2]}" for error in errors if error}


def expected() -> set[str]:
    lines = [(number, line.split("   # ")[1]) for number, line in enumerate(WRONG.splitlines(), 1) if "   # " in line]
    return {f"wrong.py:{number} {code}" for number, codes in lines for code in codes.split()}


def test_mistakes_of_a_program_beside_the_one_file_are_found_and_no_others(tmp_path):
    (tmp_path / "orchestrator.py").write_text(bundle.bundle())
    assert found(tmp_path) == expected()


def test_mistakes_of_a_program_that_installed_the_wheel_are_found_and_no_others(tmp_path, bin):  # noqa: F811
    assert found(tmp_path, "--python-executable", bin / "python") == expected()
