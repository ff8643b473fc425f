"""What every fault needs: a database that notes each transition, worker processes, producers that remember what was acknowledged,
and the verdict over all of it. The ledgers are independent of the orchestrator: acknowledged ids (producer), executions (files of the
workers), transitions, elections and declared deaths (triggers, in the test's database only)."""
from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
from proxy import Proxy
from psycopg.types.json import Jsonb

from postgres import LocalServer, Server, eventually, install_schema

REPOSITORY = Path(__file__).resolve().parent.parent.parent
HERE = Path(__file__).resolve().parent
HEARTBEAT, TIMEOUT, TERM, GRACE = 0.5, 3.0, 2.0, 2.0     # seconds; short, so that many faults fit into little time
SHORT_LEASES = {"HEARTBEAT_INTERVAL": "500ms", "WORKER_TIMEOUT": "3s", "LEADER_TERM": "2s", "SHUTDOWN_GRACE": "2s"}
ENDED = ("completed", "dead_letter", "cancelled")
IN_FLIGHT = ("claimed", "running")
LEGAL = {("pending", "claimed"), ("pending", "cancelled"), ("retry_scheduled", "pending"), ("retry_scheduled", "cancelled"),
         ("claimed", "running"), *((was, now) for was in IN_FLIGHT for now in ("pending", "retry_scheduled", *ENDED)),
         ("dead_letter", "pending"), ("cancelled", "pending")}

RECORDER = """
create schema chaos;
create table chaos.transitions (n bigint generated always as identity, at timestamptz not null default clock_timestamp(), task_id uuid,
  was text, now text, was_claim bigint, now_claim bigint, was_worker text, attempts int, recovered boolean, actor text, leader text);
create table chaos.workers (n bigint generated always as identity, at timestamptz not null default clock_timestamp(), worker text,
  event text, term bigint, actor text, leader text);
create function chaos.note_task() returns trigger language plpgsql as $$
declare
  v_recovered boolean := new.recoveries > old.recoveries;
begin
  insert into chaos.transitions (task_id, was, now, was_claim, now_claim, was_worker, attempts, recovered, actor, leader)
  values (new.id, old.status, new.status, old.claim_id, new.claim_id, old.worker_id, new.attempts, v_recovered,
          case when v_recovered then current_setting('application_name') end,
          case when v_recovered then (select orchestrator._application_name(w.id) from orchestrator.workers w where w.is_leader) end);
  return null;
end $$;
create trigger chaos after update on orchestrator.tasks for each row
  when (old.status is distinct from new.status or old.claim_id is distinct from new.claim_id) execute function chaos.note_task();
create function chaos.note_worker() returns trigger language plpgsql as $$
declare
  v_leader text := (select orchestrator._application_name(w.id) from orchestrator.workers w where w.is_leader);
  v_actor text := current_setting('application_name');
begin
  if tg_op = 'DELETE' then
    if old.is_leader then
      insert into chaos.workers (worker, event, term, actor) values (old.id, 'deposed', old.leader_term, v_actor);
    end if;
    return null;
  end if;
  if new.is_leader and not old.is_leader then
    insert into chaos.workers (worker, event, term, actor) values (new.id, 'elected', new.leader_term, v_actor);
  elsif old.is_leader and not new.is_leader then
    insert into chaos.workers (worker, event, term, actor) values (new.id, 'deposed', old.leader_term, v_actor);
  end if;
  if new.declared_dead_at is not null and old.declared_dead_at is null then
    insert into chaos.workers (worker, event, actor, leader) values (new.id, 'dead', v_actor, v_leader);
  end if;
  return null;
end $$;
create trigger chaos after update or delete on orchestrator.workers for each row execute function chaos.note_worker();
"""


@dataclasses.dataclass
class Row:
    """What the table shows of one fault."""

    fault: str
    size: str
    seed: int
    lost: int = 0
    twice: int = 0            # tasks that ended twice: two accepted exits of a claim, or two completions
    again: int = 0            # executions beyond the first that no failed attempt asked for
    forgotten: int = 0        # of these, executions under a claim that a crash forgot
    late: int = 0             # late outcomes that the fence refused
    recoveries: int = 0       # tasks taken from dead workers
    false_deaths: int = 0     # workers declared dead that nobody had touched
    p50: float | None = None
    p99: float | None = None
    seconds: float = 0.0
    problems: list[str] = dataclasses.field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.problems


class Worker:
    """One worker process, its output in a file."""

    def __init__(self, lab: Lab, url: str, settings: dict[str, Any]) -> None:
        lab.started += 1
        self.lab, self.url, self.settings = lab, url, settings
        self.log = lab.folder / f"worker-{lab.started}.log"
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        env = {**kept, "PYTHONUNBUFFERED": "1", "DATABASE_URL": url, "HANDLERS": str(HERE / "work.py"), "METRICS_PORT": "0",
               "DISTRIBUTED_MODE": "true", "WORKER_POOL_SIZE": "8", "CHAOS_FOLDER": str(lab.folder), **settings}
        with self.log.open("w") as output:
            self.process = subprocess.Popen([sys.executable, str(REPOSITORY / "orchestrator.py")], cwd=lab.folder,
                                            env={k: str(v) for k, v in env.items()},
                                            stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)
        self.pid = self.process.pid

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def wait_registered(self, timeout: float = 60) -> None:
        def registered() -> bool:
            if not self.alive:
                raise AssertionError(f"a worker ended with {self.process.returncode}: {self.output[-2000:]}")
            return bool(self.lab.column("select 1 from orchestrator.workers where id like %s", f"%:{self.pid}:%"))
        eventually(registered, timeout)

    def signal(self, number: signal.Signals, tampered: bool = True) -> None:
        if tampered:
            self.lab.tampered.add(self.pid)
        self.process.send_signal(number)

    def kill(self) -> None:
        """kill -9 of the process alone: what it started is left to itself, as a crash leaves it."""
        self.lab.tampered.add(self.pid)
        self.process.kill()
        self.process.wait()

    def session(self) -> list[int]:
        """The processes of its session: itself and its children."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = stat.read_text().rpartition(")")[2].split()
                if int(fields[3]) == self.pid and fields[0] != "Z":
                    found.append(int(stat.parent.name))
        return found


class Producer(threading.Thread):
    """Enqueues `total` tasks (None: until finish is set), `rate` a second (None: as fast as it can), each with a key, and again until
    it is acknowledged."""

    def __init__(self, url: str, total: int | None, rate: float | None, make: Callable[[int], tuple[str, dict[str, Any]]],
                 prefix: str = "k") -> None:
        super().__init__(daemon=True)
        self.url, self.total, self.rate, self.make, self.prefix = url, total, rate, make, prefix
        self.acknowledged: dict[str, str] = {}    # key → id
        self.changed: list[str] = []              # keys that were acknowledged under another id the second time
        self.retried = 0                          # batches that had to be sent again
        self.acks: list[float] = []               # when (monotonic) each batch was acknowledged
        self.finish = threading.Event()           # all that was begun is acknowledged first
        self.halt = threading.Event()

    def run(self) -> None:
        started, sent = time.monotonic(), 0
        connection: psycopg.Connection[Any] | None = None
        while (self.total is None or sent < self.total) and not self.halt.is_set() and not self.finish.is_set():
            size = 500 if self.rate is None else max(1, int((time.monotonic() - started) * self.rate) - sent)
            batch = range(sent, sent + size if self.total is None else min(self.total, sent + size))
            connection = self._until_acknowledged(connection, batch)
            sent = batch.stop
            if self.rate is not None:
                self.halt.wait(max(0.05, 1 / self.rate))
        if connection is not None:
            connection.close()

    def _until_acknowledged(self, connection: psycopg.Connection[Any] | None, batch: range) -> psycopg.Connection[Any] | None:
        by_type: dict[str, list[tuple[str, dict[str, Any]]]] = defaultdict(list)
        for n in batch:
            kind, payload = self.make(n)
            by_type[kind].append((f"{self.prefix}{n}", payload))
        for kind, tasks in by_type.items():
            while not self.halt.is_set():
                try:
                    connection = connection or psycopg.connect(self.url, autocommit=True, connect_timeout=5, application_name="producer",
                                                               tcp_user_timeout=3000, options="-c statement_timeout=10s")
                    rows = connection.execute("select id::text from orchestrator.enqueue_many(%s, %s, 0, %s) order by ordinal",
                                              [kind, [Jsonb(payload) for _, payload in tasks], [key for key, _ in tasks]]).fetchall()
                except psycopg.Error:
                    self.retried += 1
                    if connection is not None:
                        connection.close()
                    connection = None
                    self.halt.wait(0.1)
                    continue
                self.acks.append(time.monotonic())
                for (key, _), (task_id,) in zip(tasks, rows, strict=True):
                    if self.acknowledged.setdefault(key, task_id) != task_id:
                        self.changed.append(key)
                break
        return connection


class Lab:
    """One database, its workers and producers, and the verdict."""

    def __init__(self, fault: str, server: Server, seed: int, short: bool, url: str | None = None) -> None:
        self.fault, self.server, self.seed, self.short = fault, server, seed, short
        self.random = random.Random(f"{seed} {fault}")
        self.folder = Path(tempfile.mkdtemp(prefix="chaos-", dir="/tmp"))
        self.url = url or server.create_database()
        self.log_from = server.log.stat().st_size if isinstance(server, LocalServer) else 0
        self.started = 0
        self.workers: list[Worker] = []
        self.proxies: list[Proxy] = []
        self.producers: list[Producer] = []
        self.tampered: set[int] = set()          # pids of workers that something was done to
        self.recovery: list[float] = []          # seconds, of whatever the fault measures
        self.problems: list[str] = []
        self.extra_ids: set[str] = set()         # acknowledged outside a producer
        self.expect_rerun = True                 # whether anything may run again that did not fail
        self.restarts = 0                        # of workers, by their supervisor or the fault
        self.servers: tuple[LocalServer, LocalServer]    # the primary and its standby, where there are two
        self.outage = False                      # the database was away, so a death declared afterwards is not false
        self.forgets = False                     # a crash may forget claims that were not flushed
        self.clock: Callable[[int], None]        # sets the server's clock off by so many seconds, where that can be done
        self._connection: psycopg.Connection[Any] | None = None
        self._lock = threading.Lock()
        self._stop_supervising = threading.Event()
        self.began = time.monotonic()

    def __enter__(self) -> Lab:
        install_schema(self.url)
        self.execute(RECORDER)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop_supervising.set()
        for producer in self.producers:
            producer.halt.set()
        for worker in self.workers:
            for pid in worker.session():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            worker.process.wait()
        for proxy in self.proxies:
            proxy.close()
        if self._connection is not None:
            self._connection.close()
        if exception[0] is None and not self.problems and not os.environ.get("CHAOS_KEEP"):
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            print(f"    the workers' logs are in {self.folder}", flush=True)

    # ------------------------------------------------------------------------------------------------------- the database
    def execute(self, query: str, *args: Any) -> Any:
        """Run a statement on a connection of our own, anew if the server was away; returns rows, if any."""
        give_up = time.monotonic() + 90
        with self._lock:
            while True:
                try:
                    if self._connection is None or self._connection.closed:
                        self._connection = psycopg.connect(self.url, autocommit=True, application_name="chaos", connect_timeout=5)
                    cursor = self._connection.execute(query, args or None)   # type: ignore[call-overload]
                    return cursor.fetchall() if cursor.description else []
                except (psycopg.OperationalError, psycopg.errors.ReadOnlySqlTransaction):
                    if self._connection is not None:
                        self._connection.close()
                    if time.monotonic() > give_up:
                        raise
                    time.sleep(0.1)

    def column(self, query: str, *args: Any) -> list[Any]:
        return [row[0] for row in self.execute(query, *args)]

    def value(self, query: str, *args: Any) -> Any:
        return self.execute(query, *args)[0][0]

    def wait(self, query: str, *args: Any, timeout: float = 60) -> Any:
        """Wait until the query's first column is true in a first row."""
        return eventually(lambda: next(iter(self.column(query, *args)), None), timeout)

    # -------------------------------------------------------------------------------------------------------- its actors
    def work(self, count: int, *, url: str | None = None, wait: bool = True, leases: dict[str, str] = SHORT_LEASES,
             **settings: Any) -> list[Worker]:
        new = [Worker(self, url or self.url, {**leases, **settings}) for _ in range(count)]
        self.workers += new
        if wait:
            for worker in new:
                worker.wait_registered()
        return new

    def restart(self, worker: Worker) -> Worker:
        """Start another one with the same settings, as a supervisor would."""
        self.restarts += 1
        self.workers.remove(worker)
        [new] = self.work(1, url=worker.url, wait=False, leases={}, **worker.settings)
        return new

    def supervise(self) -> None:
        """From now on, restart whatever worker ends by itself."""
        def watch() -> None:
            while not self._stop_supervising.wait(0.05):
                for worker in [w for w in self.workers if not w.alive]:
                    self.tampered.add(worker.pid)
                    self.restart(worker)
        threading.Thread(target=watch, daemon=True).start()

    def proxy(self) -> tuple[Proxy, str]:
        proxy = Proxy(self.server.port)
        self.proxies.append(proxy)
        return proxy, re.sub(r":\d+/", f":{proxy.port}/", self.url)

    def produce(self, total: int | None, rate: float | None = None, url: str | None = None, prefix: str = "k",
                make: Callable[[int], tuple[str, dict[str, Any]]] | None = None) -> Producer:
        producer = Producer(url or self.url, total, rate, make or self.mixed, prefix)
        self.producers.append(producer)
        producer.start()
        return producer

    def mixed(self, n: int) -> tuple[str, dict[str, Any]]:
        """Mostly quick tasks; one in 50 fails at first, one in 40 lasts long enough to be marked running."""
        dice = random.Random(f"{self.seed} {n}")
        return "work", {"n": n, "seconds": 0.4 if n % 40 == 0 else dice.uniform(0, 0.01), "fail": int(n % 50 == 7)}

    def leader(self) -> Worker | None:
        """The worker that leads by a lease that has not run out."""
        for (name,) in self.execute("select id from orchestrator.workers where is_leader and leader_until > clock_timestamp()"):
            for worker in self.workers:
                if f":{worker.pid}:" in name:
                    return worker
        return None

    def open_tasks(self) -> int:
        return int(self.value("select count(*) from orchestrator.tasks where status <> all (%s::orchestrator.task_status[])", list(ENDED)))

    def drain(self, timeout: float = 120) -> None:
        """Wait until the producers are done and every task has ended."""
        until = time.monotonic() + timeout
        for producer in self.producers:
            if producer.total is None:
                producer.finish.set()
            producer.join(max(0.1, until - time.monotonic()))
            if producer.is_alive():
                self.fail("a producer did not get its tasks acknowledged")
                producer.halt.set()
        with contextlib.suppress(AssertionError):
            eventually(lambda: self.open_tasks() == 0, max(1, until - time.monotonic()))

    def fail(self, problem: str) -> None:
        self.problems.append(problem)

    def slow(self, problem: str) -> None:
        """What a busy machine may cause too: a failure at full size, on a machine of its own; a remark in the short version."""
        if self.short:
            print(f"    not judged: {problem}", flush=True)
        else:
            self.fail(problem)

    def bit(self, happened: object, what: str) -> None:
        """A fault that changed nothing proves nothing."""
        if not happened:
            self.fail(f"the fault never bit: {what}")

    # -------------------------------------------------------------------------------------------------------- the verdict
    def executions(self) -> list[Execution]:
        found = []
        for path in self.folder.glob("executions-*"):
            open_now: dict[tuple[str, str], Execution] = {}
            for line in path.read_text().splitlines():
                kind, task, claim, attempt, worker, at = line.split()
                if kind == "begin":
                    found.append(Execution(task, int(claim), int(attempt), worker, float(at)))
                    open_now[task, claim] = found[-1]
                else:
                    open_now[task, claim].end, open_now[task, claim].how = float(at), kind
        return found

    def rejected(self) -> int:
        """Late outcomes that the fence refused, as the workers logged them."""
        return sum(len(re.findall(r"task rejected: ", path.read_text(errors="replace"))) for path in self.folder.glob("worker-*.log"))

    def since_kill(self, killed: dict[int, float]) -> None:
        """Measure, for each killed pid, the seconds from its death (time.time()) until the last of its tasks was taken from it,
        if any was."""
        for pid, at in killed.items():
            last = self.value("""select extract(epoch from max(at))::float8 from chaos.transitions
                                 where recovered and was_worker like %s and at > to_timestamp(%s)""", f"%:{pid}:%", at)
            if last is not None:
                self.recovery.append(last - at)

    def verdict(self, size: str) -> Row:
        row = Row(self.fault, size, self.seed, problems=self.problems)
        transitions = [Transition(*r) for r in self.execute(
            "select extract(epoch from at)::float8, task_id::text, was, now, was_claim, now_claim, was_worker, recovered, actor, leader "
            "from chaos.transitions order by n")]
        self._check_tasks(row)
        self._check_transitions(row, transitions)
        self._check_executions(row, transitions)
        self._check_leaders(row)
        for invariant, task, worker, detail in self.execute("select * from orchestrator.audit()"):
            self.fail(f"audit: {invariant}: {task or ''} {worker or ''} {detail}")
        for deadlock in self._deadlocks():
            self.fail(f"deadlock: {deadlock}")
        if row.forgotten:
            row.size += f", {row.forgotten} executions forgotten"
        row.late = self.rejected()
        row.recoveries = sum(t.recovered for t in transitions)
        if self.recovery:
            ordered = sorted(self.recovery)
            row.p50, row.p99 = ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
        row.seconds = time.monotonic() - self.began
        return row

    def _deadlocks(self) -> list[str]:
        """What the server's log says of deadlocks since this fault began."""
        if not isinstance(self.server, LocalServer):
            return []
        with self.server.log.open(errors="replace") as log:
            log.seek(self.log_from)
            return [" ".join(found.split()) for found in re.findall(r"deadlock detected\n(.*?)\n\S", log.read(), re.DOTALL)]

    def _check_tasks(self, row: Row) -> None:
        status = dict(self.execute("select id::text, status::text from orchestrator.tasks"))
        acknowledged = set(self.extra_ids)
        for producer in self.producers:
            acknowledged |= set(producer.acknowledged.values())
            if producer.changed:
                self.fail(f"{len(producer.changed)} keys were acknowledged under two ids")
        missing = acknowledged - status.keys()
        open_now = Counter(s for s in status.values() if s not in ENDED)
        row.lost = len(missing) + open_now.total()
        if missing:
            self.fail(f"{len(missing)} acknowledged tasks are gone")
        if open_now:
            self.fail(f"not ended: {dict(open_now)}")
            for why, task in self.execute("""select orchestrator.explain_task(t.id), to_jsonb(t) - 'payload' from orchestrator.tasks t
                                             where t.status <> all (%s::orchestrator.task_status[]) limit 5""", list(ENDED)):
                self.fail(f"{why} {task}")
        if len(status) > len(acknowledged):
            self.fail(f"{len(status) - len(acknowledged)} tasks that nobody enqueued, or enqueued twice")

    def _check_transitions(self, row: Row, transitions: list[Transition]) -> None:
        illegal = Counter((t.was, t.now) for t in transitions if (t.was, t.now) not in LEGAL)
        if illegal:
            self.fail(f"illegal transitions: {dict(illegal)}")
        exits = Counter((t.task, t.was_claim) for t in transitions if t.was in IN_FLIGHT and t.now not in IN_FLIGHT)
        completions = Counter(t.task for t in transitions if t.now == "completed")
        row.twice = len({task for (task, _), n in exits.items() if n > 1} | {task for task, n in completions.items() if n > 1})
        if row.twice:
            self.fail(f"{row.twice} tasks ended twice")
        strangers = [t for t in transitions if t.recovered and t.actor != t.leader]
        if strangers:
            self.fail(f"{len(strangers)} recoveries by {strangers[0].actor}, while {strangers[0].leader} led")

    def _check_executions(self, row: Row, transitions: list[Transition]) -> None:
        """Each claim runs its task once, and one execution begins during another only after the other's claim was taken away."""
        wall = time.time() - time.monotonic()
        given = {(t.task, t.now_claim): n for n, t in enumerate(transitions) if t.now == "claimed"}
        left = {(t.task, t.was_claim): t for t in transitions if t.was in IN_FLIGHT and t.now not in IN_FLIGHT}
        by_task: dict[str, list[Execution]] = defaultdict(list)
        for execution in self.executions():
            if (execution.task, execution.claim) in given:
                by_task[execution.task].append(execution)
            elif self.forgets:   # under a claim that a crash forgot, so the task was pending again
                row.again += 1
                row.forgotten += 1
            else:
                self.fail(f"{execution.task} ran under claim {execution.claim}, which was never given")
        for task, runs in by_task.items():
            # not by when they began: a worker that was stopped may begin late what was taken from it
            runs.sort(key=lambda e: given[e.task, e.claim])
            claims = Counter(e.claim for e in runs)
            if max(claims.values()) > 1:
                self.fail(f"{task} ran twice under one claim")
            for before, after in itertools.pairwise(runs):
                row.again += before.how != "error"
                exit_ = left.get((task, before.claim))
                if exit_ is None or exit_.now not in ("pending", "retry_scheduled", "dead_letter", "cancelled"):
                    self.fail(f"{task} ran again although claim {before.claim} {exit_.now if exit_ else 'still held it'}")
                elif not hasattr(self, "clock") and exit_.at - wall > after.begin + 0.05:   # two clocks are compared
                    self.fail(f"{task} ran under claim {after.claim} before it was taken from claim {before.claim}")
        if row.again and not self.expect_rerun:
            self.slow(f"{row.again} executions too many")

    def _check_leaders(self, row: Row) -> None:
        leading: str | None = None
        last_term = 0
        for worker, event, term, actor, leader in self.execute("select worker, event, term, actor, leader from chaos.workers order by n"):
            if event == "elected":
                if leading is not None:
                    self.fail(f"{worker} was elected while {leading} led")
                if term <= last_term:
                    self.fail(f"term {term} follows term {last_term}")
                leading, last_term = worker, term
            elif event == "deposed":
                leading = None
            else:
                own = self.value("select orchestrator._application_name(%s)", worker)
                if actor not in (leader, own):
                    self.fail(f"{worker} was declared dead by {actor}, while {leader} led")
                if actor != own and int(worker.split(":")[-2]) not in self.tampered:
                    row.false_deaths += 1
        if row.false_deaths and not self.outage:
            self.slow(f"{row.false_deaths} workers were declared dead that nobody had touched")


@dataclasses.dataclass(slots=True)
class Execution:
    task: str
    claim: int
    attempt: int
    worker: str
    begin: float          # monotonic
    end: float | None = None
    how: str = ""         # end, error, or nothing: its process died, or still runs it


@dataclasses.dataclass(slots=True)
class Transition:
    at: float             # seconds since 1970, the database's clock
    task: str
    was: str
    now: str
    was_claim: int | None
    now_claim: int | None
    was_worker: str | None
    recovered: bool
    actor: str | None
    leader: str | None


def follow(server: LocalServer, primary: LocalServer) -> None:
    """Make this server a synchronous standby of another, from a fresh copy; whatever it held is gone."""
    with contextlib.suppress(subprocess.CalledProcessError):
        server.stop_server("immediate")
    shutil.rmtree(server.data)
    server.run("pg_basebackup", "-h", "127.0.0.1", "-p", str(primary.port), "-U", "postgres", "-D", str(server.data), "-R", "-X", "stream",
               "-c", "fast")
    server.start()
    with primary.connect() as connection:
        connection.execute("alter system set synchronous_standby_names = '*'")
        connection.execute("select pg_reload_conf()")
        eventually(lambda: connection.execute("select 1 from pg_stat_replication where sync_state = 'sync'").fetchone(), 30)


def promote(server: LocalServer) -> None:
    """Make a standby the primary; with no standby of its own, it must not wait for one."""
    with (server.data / "postgresql.auto.conf").open("a") as file:
        file.write("synchronous_standby_names = ''\n")
    server.run("pg_ctl", "promote", "-D", str(server.data), "-w")


@contextlib.contextmanager
def local_server(**settings: Any) -> Iterator[LocalServer]:
    server = LocalServer(fsync=True, **settings)
    try:
        yield server
    finally:
        server.stop()


def build_skew(folder: Path) -> Path:
    """The library that sets a program's clock off. Raises AssertionError where there is no compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    assert compiler, "there is no C compiler to build skew.c with"
    library = folder / "skew.so"
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", library, HERE / "skew.c", "-ldl"], check=True)
    return library


@contextlib.contextmanager
def server_with_a_clock() -> Iterator[tuple[LocalServer, Callable[[int], None]]]:
    """A server, and a function that sets its clock off by so many seconds, as one step."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="skew-") as temporary:
        folder = Path(temporary)
        folder.chmod(0o755)    # the server runs as somebody else

        def set_off(seconds: int) -> None:
            (folder / "new").write_text(str(seconds))
            (folder / "new").replace(folder / "seconds")    # at once: nobody reads half of it
        set_off(0)
        preloaded = {"LD_PRELOAD": str(build_skew(folder)), "SKEW_FILE": str(folder / "seconds")}
        os.environ.update(preloaded)    # the server gets all of the environment, workers little of it
        try:
            server = LocalServer(fsync=True)
        finally:
            for name in preloaded:
                del os.environ[name]
        try:
            yield server, set_off
        finally:
            server.stop()
