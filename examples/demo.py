"""The demo: an embedded PostgreSQL, a worker, and about 9,000 real tasks to watch. `make demo`

    python examples/demo.py          watch it, then look around until Ctrl-C
    python examples/demo.py --exit   end after the summary; exit code 0 only if every count is what it should be

Some tasks are quick or slow, some fail and recover, some fail for good, some are urgent, repeated or cancelled, and one is a backup of
the database that holds them. The demo uses the same database as everything else: DATABASE_URL, or the embedded one in
./.orchestrator. It may run again on the same data, because the idempotency keys of its tasks begin with the name of the run.
"""
from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import logging
import os
import secrets
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import psycopg

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import orchestrator
from handlers import HANDLERS
from orchestrator import ConfigError, Orchestrator, error_line, redact_url

WAVES, WAVE_SECONDS, GIVE_UP_AFTER = 24, 0.25, 120
COLUMNS = ("waiting", "in flight", "retry due", "completed", "dead letter", "cancelled")
COUNTS = """
    select type, count(*) filter (where queued_at is not null), count(*) filter (where status in ('claimed', 'running')),
           count(*) filter (where next_retry_at is not null), count(*) filter (where status = 'completed'),
           count(*) filter (where status = 'dead_letter'), count(*) filter (where status = 'cancelled')
    from orchestrator.tasks where id >= %(first)s and starts_with(idempotency_key, %(run)s) group by type order by type"""
TIMES = """
    select type || case when priority > 0 then ', urgent' when ended_in_burst then ', burst' else '' end, count(*),
           percentile_cont(array[0.5, 0.95]) within group (order by extract(epoch from claimed_at - created_at))
             filter (where attempts = 1),
           percentile_cont(array[0.5, 0.95]) within group (order by extract(epoch from completed_at - claimed_at))
    from (select *, starts_with(idempotency_key, %(run)s || 'burst') as ended_in_burst from orchestrator.tasks) t
    where id >= %(first)s and starts_with(idempotency_key, %(run)s) and status = 'completed' group by 1 order by 1"""
RATE = """
    select count(*), extract(epoch from max(completed_at) - min(claimed_at)) from orchestrator.tasks
    where id >= %(first)s and starts_with(idempotency_key, %(run)s || 'burst')"""
FAILED_ATTEMPTS = """
    select count(*) from orchestrator.tasks t join orchestrator.task_events e on e.task_id = t.id and e.event = 'failed'
    where t.id >= %(first)s and starts_with(t.idempotency_key, %(run)s) and t.type in ('demo:flaky', 'demo:broken')"""


class Recent(logging.Handler):
    """Keeps the latest lines of the worker's log for the live view, which they would tear if they were printed."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: collections.deque[str] = collections.deque(maxlen=5)

    def emit(self, record: logging.LogRecord) -> None:
        # failing tasks are part of the demo; other warnings are real trouble
        if record.levelno >= logging.WARNING and not hasattr(record, "task_id") and not sys.stdout.isatty():
            print(record.getMessage(), file=sys.stderr)
        fields = [f"{name}={getattr(record, name)}" for name in ("type", "attempt", "error") if hasattr(record, name)]
        self.lines.append(" ".join([time.strftime("%H:%M:%S"), record.getMessage(), *fields]).replace("\n", " "))


class View:
    """The live view: redrawn in place on a terminal; elsewhere a line each second."""

    def __init__(self, title: str, recent: Recent) -> None:
        self.title, self.recent = title, recent
        self.live = sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self.started = self.drawn_at = time.monotonic()
        self.height, self.done = 0, 0
        self.rates: collections.deque[float] = collections.deque(maxlen=40)

    def show(self, rows: list[tuple], at_once: bool = False) -> None:
        now = time.monotonic()
        if now - self.drawn_at < (0.2 if self.live else 1) and not at_once:
            return
        done = sum(row[4] + row[5] + row[6] for row in rows)
        self.rates.append((done - self.done) / (now - self.drawn_at))
        self.done, self.drawn_at = done, now
        if self.live:
            self._redraw(rows)
        else:
            sums = [sum(row[i] for row in rows) for i in range(1, 7)]
            counts = ", ".join(f"{n:,} {name}" for name, n in zip(COLUMNS, sums, strict=True))
            print(f"{now - self.started:5.1f} s  {counts}; {self.rates[-1]:,.0f}/s", flush=True)

    def _redraw(self, rows: list[tuple]) -> None:
        most = max(*self.rates, 1)
        bars = "".join(" ▁▂▃▄▅▆▇█"[round(8 * rate / most)] for rate in self.rates)
        lines = [f"{self.title} · {time.monotonic() - self.started:.1f} s", "", table(("type", *COLUMNS), [])[0]]
        lines += table(("type", *COLUMNS), rows)[1:]
        lines += ["", f"ended per second  {bars} {self.rates[-1]:,.0f}", "", *self.recent.lines]
        width = shutil.get_terminal_size().columns - 1
        back = f"\x1b[{self.height}A" if self.height else ""
        # one write that clears each line behind its text, instead of the screen beforehand: nothing flickers
        sys.stdout.write(back + "".join(line[:width] + "\x1b[K\n" for line in lines) + "\x1b[J")
        sys.stdout.flush()
        self.height = len(lines)


def table(names: tuple[str, ...], rows: list[tuple]) -> list[str]:
    """Lines of a table: the first column aligned left, the others right."""
    def line(cells: tuple) -> str:
        texts = [f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in cells]
        return f"  {texts[0]:20}" + "".join(f"{text:>13}" for text in texts[1:])
    return [line(names), *map(line, rows)]


class Demo:
    """One run: enqueues the tasks, remembers how each must end, and asks the database whether it did."""

    def __init__(self, app: Orchestrator, connection: psycopg.Connection, view: View, stop: threading.Event) -> None:
        self.app, self.connection, self.view, self.stop = app, connection, view, stop
        self.run = f"demo-{secrets.token_hex(4)}-"
        self.number = 0
        self.expected: collections.Counter[tuple[str, str]] = collections.Counter()
        self.failures_expected = 0
        self.problems: list[str] = []
        self.first = self.add("demo:quick", None, "completed")
        self.example = self.backup_id = self.first

    def key(self, name: str) -> str:
        self.number += 1
        return f"{self.run}{name}-{self.number}"

    def add(self, kind: str, payload: object, ends_as: str, **options: object) -> str:
        self.expected[kind, ends_as] += 1
        return self.app.enqueue(kind, payload, idempotency_key=self.key(kind), **options)

    def add_quick(self, count: int, name: str = "quick", **options: object) -> list[str]:
        self.expected["demo:quick", "completed"] += count
        keys = [self.key(name) for _ in range(count)]
        self.app.enqueue_many("demo:quick", [{"n": n} for n in range(count)], idempotency_keys=keys, **options)
        return keys

    def select(self, query: str, **more: object) -> list[tuple]:
        return self.connection.execute(query, {"run": self.run, "first": self.first, **more}).fetchall()

    def watch(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self.stop.wait(0.1):
            self.view.show(self.select(COUNTS))

    def enqueue_everything(self) -> None:
        delayed = self.add("demo:slow", {"seconds": 1}, "cancelled", delay=3600)
        endless = self.add("demo:slow", {"seconds": 300}, "cancelled", priority=5)
        self.backup_id = self.add("task:backup", self.backup_payload(), "completed", priority=5)
        for wave in range(WAVES):
            keys = self.add_quick(150)
            if wave == 1:   # a client that repeats its request: these keys are known, so nothing is added
                again = self.app.enqueue_many("demo:quick", [{}] * len(keys), idempotency_keys=keys)
                if any(task_id.created for task_id in again):
                    self.problems.append("a repeated idempotency key made a second task")
            for n in (1, 2):
                self.add("demo:slow", {"seconds": 0.2 * n + 0.4 * (wave % 2)}, "completed")
                self.example = self.add("demo:flaky", {"fail_times": n}, "completed")
                self.failures_expected += n
            if wave % 6 == 0:
                self.add("demo:broken", None, "dead_letter")
                self.failures_expected += 1 + HANDLERS["demo:broken"].max_retries
            self.watch(WAVE_SECONDS)
            if self.stop.is_set():
                return
        self.cancel(delayed, endless)
        with psycopg.connect(self.app.config.database_url) as connection:   # all visible at once; the urgent ones come last
            self.add_quick(5000, "burst", connection=connection)
            self.add_quick(100, "urgent", priority=10, connection=connection)

    def cancel(self, *ids: str) -> None:
        for task_id in ids:
            answer = self.app.cancel(task_id)   # cancelled at once if it waits, asked to stop if it runs
            if answer not in ("cancelled", "cancelling"):
                self.problems.append(f"a task that should have been cancelled was {answer}")

    def backup_payload(self) -> dict[str, object]:
        info = self.connection.info
        payload: dict[str, object] = {"host": info.host, "port": info.port, "user": info.user, "database": info.dbname, "retention_days": 7}
        if info.password:   # by reference, so that it is not in the table of tasks
            os.environ["BACKUP_PASSWORD_DEMO"] = info.password
            payload["password_env"] = "BACKUP_PASSWORD_DEMO"
        return payload

    def wait_for_the_end(self) -> None:
        until = time.monotonic() + GIVE_UP_AFTER
        while not self.stop.is_set() and sum(sum(row[1:4]) for row in self.select(COUNTS)):
            if time.monotonic() > until:
                self.problems.append(f"not all tasks ended within {GIVE_UP_AFTER} s")
                return
            self.watch(0.1)
        self.view.show(self.select(COUNTS), at_once=True)

    def check(self) -> None:
        """Compare how the tasks ended with how they should have ended."""
        names = ("waiting", "in flight", "retry due", "completed", "dead_letter", "cancelled")
        found = {(row[0], name): n for row in self.select(COUNTS) for name, n in zip(names, row[1:], strict=True) if n}
        for key in sorted(self.expected.keys() | found.keys()):
            if self.expected[key] != found.get(key, 0):
                self.problems.append(f"{key[0]}: {found.get(key, 0)} {key[1]}, should be {self.expected[key]}")
        failures = self.select(FAILED_ATTEMPTS)[0][0]
        if failures != self.failures_expected:
            self.problems.append(f"{failures} attempts failed, should be {self.failures_expected}")
        for invariant, task_id, worker_id, detail in self.select("select invariant, task_id, worker_id, detail from orchestrator.audit()"):
            self.problems.append(f"audit: {invariant}: task {task_id}, worker {worker_id}: {detail}")
        backup = (self.app.get(self.backup_id) or {}).get("result") or {}
        if not os.path.exists(str(backup.get("path"))):
            self.problems.append("the backup left no file")

    def summary(self, address: str) -> None:
        def milliseconds(pair: list[float] | None) -> tuple[str, str]:
            return tuple(f"{1000 * value:,.1f} ms" for value in pair) if pair else ("–", "–")
        rows = [(name, count, *milliseconds(waits), *milliseconds(runs)) for name, count, waits, runs in self.select(TIMES)]
        print("\nLatencies (wait: from enqueued to claimed, at the first attempt; run: from claimed to recorded as done)")
        print("\n".join(table(("", "tasks", "wait p50", "wait p95", "run p50", "run p95"), rows)))
        count, seconds = self.select(RATE)[0]
        if seconds:
            print(f"\nThroughput  {count:,} quick tasks that waited at once ran in {seconds:.2f} s: "
                  f"{count / float(seconds):,.0f} tasks/s")
        print(f"Failures    {self.failures_expected} failed attempts; {self.expected['demo:flaky', 'completed']} tasks recovered, "
              f"{self.expected['demo:broken', 'dead_letter']} became dead letters after their retries")
        backup = (self.app.get(self.backup_id) or {}).get("result") or {}
        print(f"Backup      {backup.get('path')}, {backup.get('bytes', 0):,} bytes, {backup.get('tables')} tables, verified")
        if address:
            print(f"\nPage        {address}\nMetrics     {address}metrics")
        print(f"psql        {short_path(sys.executable)} {short_path(orchestrator.__file__)} psql\n\nTry there:")
        print("  select * from orchestrator.queue_stats;")
        print(f"  select jsonb_pretty(orchestrator.show_task('{self.example}'));")
        print("""  select orchestrator.enqueue('demo:slow', '{"seconds": 20}');  select * from orchestrator.running_tasks;""")


def short_path(path: str) -> str:
    """The path as one would type it here."""
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative


def start(app: Orchestrator) -> str:
    """Start the worker, on another port if METRICS_PORT is taken, and return the address of its page, if it has one."""
    if not app.config.database_url:   # the embedded database may have an older schema
        app.open()
        with psycopg.connect(app.config.database_url, autocommit=True) as connection:
            orchestrator.install(connection)
    try:
        app.start()
    except ConfigError as error:
        if "cannot listen" not in str(error) or app.config.metrics_port == 0:
            raise
        print(f"{error}\nThe demo takes a free port.")
        app.config = dataclasses.replace(app.config, metrics_port=0)
        app.start()
    if app._http is None:   # METRICS_PORT=off
        return ""
    host, port = app._http.server_address[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{host}:{port}/"


def play(app: Orchestrator, address: str, recent: Recent, stop: threading.Event, then_exit: bool) -> int:
    with psycopg.connect(app.config.database_url, autocommit=True) as connection:
        demo = Demo(app, connection, View(" · ".join(filter(None, ("orchestrator demo", address))), recent), stop)
        demo.enqueue_everything()
        demo.wait_for_the_end()
        if stop.is_set():
            return 130
        demo.check()
        demo.summary(address)
    print()
    for problem in demo.problems:
        print(f"WRONG: {problem}")
    if not demo.problems:
        print(f"All {sum(demo.expected.values()):,} tasks ended as they should (checked by SQL).")
    if not then_exit:
        print("The worker runs until Ctrl-C.", flush=True)
        stop.wait()
    return 1 if demo.problems else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exit", action="store_true", help="end after the summary")
    then_exit = parser.parse_args(argv).exit
    sys.stdout.reconfigure(errors="replace")
    os.environ.setdefault("BACKUP_ROOT", ".orchestrator/backups")
    stop, recent = threading.Event(), Recent()
    logger = logging.getLogger("orchestrator")
    logger.addHandler(recent)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    app = None
    try:
        app = Orchestrator(handlers=HANDLERS)
        print("Starting PostgreSQL (the first time takes a few seconds) and a worker …" if not app.config.database_url
              else f"Starting a worker on {redact_url(app.config.database_url)} …", flush=True)
        return play(app, start(app), recent, stop, then_exit)
    except (ConfigError, psycopg.Error) as error:
        print(f"error: {error_line(error)}", file=sys.stderr)
        return 2
    finally:
        if app is not None:
            with contextlib.suppress(psycopg.Error):
                app.stop(grace=2)


if __name__ == "__main__":
    sys.exit(main())
