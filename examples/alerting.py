"""Alert on dead letters: at once on those that end in this worker, and by a query on those that end elsewhere.

    python examples/alerting.py [SECONDS]     look every SECONDS, 10 by default, until Ctrl-C

A task whose worker died is made a dead letter by the leader, in SQL: no handler and no hook of Python is there to see it. So a query looks
for new dead letters of all workers. It looks back further than to its last run, since a transaction may commit a while after the dead_at
that it wrote, and remembers what it has announced.
"""
import signal
import sys
import threading
from pathlib import Path

import psycopg

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # orchestrator.py is one folder up
from orchestrator import Discard, Orchestrator

NEW_DEAD_LETTERS = """
    select id::text, type, attempts, last_error, dead_at from orchestrator.dead_letters
    where dead_at > now() - interval '10 minutes' order by dead_at"""
app = Orchestrator()
announced = set()
lock = threading.Lock()


def alert(how, task_id, text):
    """Send an e-mail or a message here. A task that is retried by hand and dies again is announced again by the hook only."""
    with lock:
        if how == "query" and task_id in announced:
            return
        announced.add(task_id)
    print(f"ALERT ({how}) {task_id}: {text}", flush=True)


@app.on_dead_letter
def ended_here(task, error):
    """Called on the worker on which the last attempt ended: retries used up, Discard, or a timeout."""
    alert("hook", task.id, f"{task.type} became a dead letter at attempt {task.attempt}: {error}")


@app.handler("payment:collect", max_retries=0)
def collect(task):
    if task.payload["amount"] <= 0:
        raise Discard("amount: must be more than 0")


def look(connection):
    for task_id, kind, attempts, error, _ in connection.execute(NEW_DEAD_LETTERS):
        alert("query", task_id, f"{kind} became a dead letter at attempt {attempts}: {error}")


def main():
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    signal.signal(signal.SIGINT, lambda *_: stopped.set())
    app.start()
    print("watching", flush=True)
    while not stopped.wait(float(sys.argv[1]) if sys.argv[1:] else 10):
        try:
            with psycopg.connect(app.config.database_url) as connection:
                look(connection)
        except psycopg.OperationalError as error:   # the database is away: look again later
            print(error, file=sys.stderr, flush=True)
    app.stop()


if __name__ == "__main__":
    main()
