"""Sentry: what a handler raises is an event with the task's id, type and attempt, in the trace of the request that enqueued the task.

    pip install sentry-sdk; SENTRY_DSN=https://… python examples/sentry_errors.py

An attempt that will be repeated is a warning, the last one is an error. examples/alerting.py has what ends without an exception.
"""
import sys
from pathlib import Path

import sentry_sdk

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # orchestrator.py is one folder up
from orchestrator import Cancelled, Discard, Orchestrator, Snooze

app = Orchestrator(metrics_port=0)


@app.on_enqueue
def carry_on():
    """Each task gets the trace in which it is enqueued, as meta beside its payload."""
    return {"sentry": {"sentry-trace": sentry_sdk.get_traceparent(), "baggage": sentry_sdk.get_baggage()}}


@app.use
def reported(task, call_next):
    with sentry_sdk.isolation_scope() as scope:
        scope.set_tags({"task.type": task.type, "task.id": task.id})
        scope.set_context("task", {"attempt": task.attempt, "max_retries": task.max_retries, "worker": task.worker_id})   # not the payload
        came_from = sentry_sdk.continue_trace((task.meta or {}).get("sentry", {}), op="queue.process", name=task.type)
        with sentry_sdk.start_transaction(came_from):
            try:
                return call_next(task)
            except (Snooze, Cancelled):
                raise
            except Exception as error:
                last = isinstance(error, Discard) or task.attempt > task.max_retries
                scope.set_level("error" if last else "warning")
                sentry_sdk.capture_exception(error)
                raise


@app.handler("order:receipt", max_retries=1)
async def confirm(task):
    raise ConnectionError("the mail server is busy")


@app.handler("order:check")
def check(task):
    raise Snooze(60) if task.payload["order"] == 7 else Discard("no such order")


def main():
    sentry_sdk.init(traces_sample_rate=1.0)   # SENTRY_DSN says where to
    with sentry_sdk.start_transaction(op="http.server", name="POST /orders"):
        app.enqueue("order:receipt", {"order": 7})
        app.enqueue("order:check", {"order": 8})
    app.drain(scheduled=True)   # here and now; elsewhere a worker, which repeats what failed after a while
    app.enqueue("order:check", {"order": 7})
    print(*app.drain())
    app.close()


if __name__ == "__main__":
    main()
