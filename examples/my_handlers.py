"""A module of handlers, and middleware around all of them.

    python examples/my_handlers.py                             a program of its own, with the middleware
    HANDLERS=examples/my_handlers.py python orchestrator.py    the handlers alone, run by the command line
"""
import asyncio
import logging
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # orchestrator.py is one folder up
from orchestrator import Handler, Orchestrator, Retry, Snooze

log = logging.getLogger("my_handlers")


def report(task):
    """A long task that reports its progress, which `show ID` displays, and stops when it is asked to."""
    for part in range(10):
        task.progress({"part": part})
        task.sleep(0.01)   # not time.sleep: this raises Cancelled when the task has to stop
    return {"parts": 10}


async def fetch(task):
    """Runs on the event loop that all async handlers share."""
    await asyncio.sleep(0.01)
    return task.payload


def nightly(task):
    """Comes back an hour later, uncharged, until the payload says now."""
    if not task.payload.get("now"):
        raise Snooze(3600)


def limited(task):
    if task.attempt == 1:
        raise Retry("the server is busy", after=0.1)
    return f"attempt {task.attempt}"


HANDLERS = {
    "report:*": Handler(report, max_retries=1, timeout=600),
    "fetch": Handler(fetch, max_retries=8, base_delay=0.5, max_delay=60),
    "nightly": nightly,
    "limited": limited,
}


def timed(task, call_next):
    """The outermost middleware: logs how long each attempt took, however it ended."""
    started = time.monotonic()
    try:
        return call_next(task)
    finally:
        log.info("%s attempt %d took %.3f s", task.type, task.attempt, time.monotonic() - started)


def tenant_required(task, call_next):
    """A check that applies to all handlers."""
    if isinstance(task.payload, dict) and task.payload.get("tenant") == "blocked":
        raise PermissionError("this tenant is blocked")
    return call_next(task)


def main():
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    app = Orchestrator(handlers=HANDLERS)
    app.use(timed)
    app.use(tenant_required)
    app.run()


if __name__ == "__main__":
    main()
