"""Exactly-once effects: 200 deposits, some of which fail half-way, in a process that may be killed at any moment.

    python examples/exactly_once.py          kill -9 it while it runs, start it again: the balance is 200

The handler writes in task.transaction(): its writes and the completion of the task are one commit. An attempt that fails before the commit
leaves nothing behind. An attempt whose claim was lost, because the worker was declared dead meanwhile, is rolled back.
"""
import sys
import threading
from pathlib import Path

import psycopg

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # orchestrator.py is one folder up
from orchestrator import Orchestrator

DEPOSITS = 200
app = Orchestrator(metrics_port=0, worker_pool_size=4)


@app.handler("savings:deposit", max_retries=20, base_delay=0.05, max_delay=0.2)
def deposit(task):
    with task.transaction() as connection:
        connection.execute("update savings set balance = balance + 1 where id = 1")
        if task.payload["n"] % 10 == 0 and task.attempt == 1:
            raise RuntimeError("after the update, before the commit")


def main():
    app.open()
    with psycopg.connect(app.config.database_url, autocommit=True) as connection:
        connection.execute("create table if not exists savings (id int primary key, balance int not null)")
        connection.execute("insert into savings values (1, 0) on conflict do nothing")
        # idempotency keys: starting this program again enqueues nothing twice
        app.enqueue_many("savings:deposit", [{"n": n} for n in range(DEPOSITS)], idempotency_keys=[f"deposit-{n}" for n in range(DEPOSITS)])
        app.start()
        open_tasks = "select count(*) from orchestrator.tasks where type = 'savings:deposit' and status <> 'completed'"
        while (left := connection.execute(open_tasks).fetchone()[0]) > 0:
            print(f"{left} deposits left", flush=True)
            threading.Event().wait(0.05)
        print("balance", connection.execute("select balance from savings where id = 1").fetchone()[0], flush=True)
    app.stop()


if __name__ == "__main__":
    main()
