"""Random calls of the SQL functions by several connections whose transactions stay open, then an end to all that waits.

One step is taken after the other, so a seed replays. A call that would wait for another connection's lock times out at once, and
rolls its transaction back; under an odd seed it waits instead, and goes on when the lock is free. What one transaction decides
while another's change is not committed is so seen with either end of it. The audit must find nothing in any committed state.
At the end live workers complete what comes, and each task must end. A failure prints the seed and the shortest sequence of steps
found that still fails. FUZZ_SEEDS=100-199 runs other seeds.
"""
from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from random import Random
from typing import Any

import psycopg
import pytest
from psycopg.pq import TransactionStatus
from psycopg.types.json import Jsonb

import steps
from steps import Connection, audit, background, column, row, rows, value
from transitions import check_transitions, record_transitions

SEEDS: Iterable[int] = (1, 3, 4, 6, 11, 12, 31)   # one of each mixture; 11 and 31 see the mutants of limits
if os.environ.get("FUZZ_SEEDS"):
    first, last = map(int, os.environ["FUZZ_SEEDS"].split("-"))
    SEEDS = range(first, last + 1)
CONNECTIONS, STEPS = 4, 120
TYPES = ["a", "b:1", "b:2"]
HANDLERS = {"a": {"max_retries": 1, "base_delay": 3600}, "b:*": {"max_retries": 2, "base_delay": 3600}}   # due only when told
LIMITS = [*[(None, 1, None)] * 5, (None, 2, None), (None, 2, None), (1, None, None), (2, 1, None), (3, 2, None),
          (None, None, 3), (None, 1, 4), (None, None, None)]   # max_running, max_per_key, rate
LATER = "2030-01-01"
UNFINISHED = "status not in ('completed', 'cancelled', 'dead_letter')"
IN_FLIGHT = "status in ('claimed', 'running')"
LIVE = "select id from orchestrator.workers where declared_dead_at is null and id <> 'leader' order by id"
# How often each call is made, in mixtures: parked tasks, keys and limits, what waits for something else, and all alike.
PARKED = Counter(enqueue=1, enqueue_many=4, claim=20, complete=13, cancel=11, release=2, fail=1, replace=2, bulk=2, time=1, limit=1,
                 die=1, recover=1)
KEYS = Counter(enqueue=6, enqueue_many=8, claim=22, complete=14, fail=2, snooze=2, release=3, cancel=5, replace=3, limit=2, bulk=3,
               time=3, promote=2, retry=2, die=1, recover=1, expire=1, pause=1, start=1, signal=1, raise_floors=1, rescan=1)
WAITS = Counter(enqueue=4, enqueue_after=8, claim=8, complete=7, fail=5, snooze=3, cancel=4, retry=4, promote=6, time=4, bulk=4, prune=3,
                expire=4, replace=4, wait_for_signal=4, signal=4, step=1, fire=2, schedule=1, die=1, recover=2, limit=1, release=1)
MIXTURES = [PARKED, KEYS + Counter(limit=6), PARKED, WAITS, PARKED, KEYS,
            Counter(dict.fromkeys(KEYS | WAITS, 1)) + Counter(claim=3, enqueue=2, complete=2)]
ALLOWED = {"55P03", "40P01", "OR001", "OR003"}   # another one has it locked; so have both; impossible; the worker was declared dead
TABLES = """tasks claims workers task_types task_events type_limits starts freed_keys schedules task_waits expiries task_steps
            lanes lane_floors operations""".split()   # noqa: SIM905
GUARD = """
  create table public.deleted (task_id uuid);
  create function public.note_deletion() returns trigger language plpgsql as $$
  begin
    if old.status not in ('completed', 'cancelled', 'dead_letter') then
      raise exception 'task % is deleted, and has not ended', old.id;
    end if;
    insert into public.deleted values (old.id);
    return old;
  end $$;
  create trigger note_deletion before delete on orchestrator.tasks for each row execute function public.note_deletion();
  do $$ begin
    execute (select string_agg(format('alter table %s set (autovacuum_enabled = off)', c.oid::regclass), ';') from pg_class c
             where c.relnamespace = 'orchestrator'::regnamespace and c.relkind = 'r');   -- it takes locks at times of its own
    execute format('create view public.quick_audit as
                    select * from orchestrator._audit_claims%1$s union all select * from orchestrator._audit_waiting%1$s',
                   case when to_regclass('orchestrator._audit_claims') is null then '()' end);
  end $$"""


class Fault(Exception):
    """What must not be."""


@dataclass(frozen=True)
class Step:
    connection: int
    name: str
    end: str   # what then becomes of the connection's transaction: commit, rollback, open, or open without this step
    seed: int


def plan(seed: int) -> list[Step]:
    draw = Random(f"plan {seed}")
    mixture = MIXTURES[seed % len(MIXTURES)]
    names, weights = list(mixture), list(mixture.values())
    patience = draw.choice([1, 2, 5])
    made = [Step(0, name, "commit", draw.getrandbits(32)) for name in ("limit", "enqueue_many", "enqueue_many", "claim")]
    for _ in range(STEPS):
        if draw.random() < 0.06:
            made.append(Step(0, "quiet", "commit", draw.getrandbits(32)))
        [name], [end] = draw.choices(names, weights), draw.choices(["open", "commit", "rollback", "undo"], [patience, 4, 1, 0.3])
        made.append(Step(draw.randrange(CONNECTIONS), name, end, draw.getrandbits(32)))
    return made


@dataclass
class Fuzz:
    """One run. `watcher` sees what has committed; what it changes is the clock."""
    watcher: Connection
    connections: list[Connection]
    types: list[str]
    limited: list[str]   # types and patterns that have limits at times
    turns: list[str | None]   # concurrency keys
    log: list[str] = field(default_factory=list)
    workers: list[str] = field(default_factory=lambda: ["w1", "w2"])
    ids: list[str] = field(default_factory=list)               # of all tasks, also of those that were rolled back
    handed: list[tuple[int, str]] = field(default_factory=list)   # (claim, task), as claimed, committed or not
    # of each connection's transaction: the ids that it enqueued, what it claimed, whether it changed limits
    enqueued: dict[int, list[str]] = field(default_factory=dict)
    claimed: dict[int, list[tuple[int, str]]] = field(default_factory=dict)
    changed: set[int] = field(default_factory=set)
    kept: list[str] = field(default_factory=list)              # enqueued and committed
    old: set[tuple[int, str]] = field(default_factory=set)     # handed before the limits changed last
    hidden: set[tuple[int, str]] = field(default_factory=set)  # of those, what nobody could see then
    begun: list[tuple[int, str]] = field(default_factory=list)    # claimed and committed since the limits or the clock changed
    before_shift: int = 0
    patient: bool = False   # calls wait for locks
    under_way: dict[int, tuple[Step, Future[tuple[str, str]]]] = field(default_factory=dict)   # by connection
    late: set[int] = field(default_factory=set)   # connections whose call has waited

    @classmethod
    def of(cls, connections: list[Connection], seed: int) -> Fuzz:
        """Few types, limits and keys, so that much meets."""
        draw = Random(f"world {seed}")
        types = draw.choice([["a"], ["b:1"], ["b:1", "b:1", "b:1", "b:2"], ["b:1", "b:1", "b:2", "a"]])
        patient = seed % 2 == 1
        if MIXTURES[seed % len(MIXTURES)] is PARKED:
            return cls(connections[0], connections[1:], ["b:1"], [draw.choice(["b:1", "b:*"])], ["x"], patient=patient)
        names = ["a", "*"] if types == ["a"] else ["b:1", "b:*", "*"]
        return cls(connections[0], connections[1:], types, draw.sample(names, draw.randint(1, len(names))),
                   draw.choice([["x"], ["x", "x", "x", "y"], [None, "x", "x", "y"]]), patient=patient)

    def begin(self) -> None:
        self.watcher.execute("set lock_timeout = '20s'")
        self.watcher.execute("truncate public.transitions, public.deleted, " + ", ".join(f"orchestrator.{table}" for table in TABLES) + "; "
                             "update orchestrator.leader_state set prune_cursor = default, candidate = null, safe_floor = '-infinity'")
        self.watcher.execute("set lock_timeout = '1ms'")
        self.term = steps.lead(self.watcher, length="10 years")
        for worker in self.workers:
            steps.register(self.watcher, worker, HANDLERS)
        patience = "100ms" if self.patient else "1ms"
        self.watcher.execute(f"alter function orchestrator._lock_limits set lock_timeout = '{patience}'")
        for conn in self.connections:   # and what SQL decides by chance
            conn.execute(f"select setseed(0.5), set_config('lock_timeout', '{0 if self.patient else 1}', false)")
            conn.commit()

    # --- what a step needs --------------------------------------------------------------------------------------------------

    def name(self, id: str | None) -> str:
        return f"t{self.ids.index(id)}" if id in self.ids else str(id)

    def names(self, ids: list[str]) -> str:
        return " ".join(map(self.name, ids))

    def some(self, conn: Connection, draw: Random, where: str = "true") -> str | None:
        found = column(conn, f"select id::text from orchestrator.tasks where {where} order by id")
        return draw.choice(found[-20:]) if found else None

    def held(self, conn: Connection, draw: Random) -> tuple[int, str]:
        """A claim and one of its tasks; now and then a late one."""
        found = conn.execute(f"select claim_id, id::text from orchestrator.tasks where {IN_FLIGHT} order by id").fetchall()
        if self.handed and (not found or draw.random() < 0.05):
            found = self.handed[-20:]
        return draw.choice(found) if found else (0, "00000000-0000-0000-0000-000000000000")

    def know(self, number: int, *ids: str) -> str:
        for id in ids:
            if id not in self.ids:
                self.ids.append(id)
                self.enqueued.setdefault(number, []).append(id)
        return self.names(list(ids))

    def limits(self, conn: Connection) -> dict[str, dict[str, Any]]:
        return {found["type"]: found for found in rows(conn, "select type, max_running, max_per_key, rate from orchestrator.type_limits "
                                                             "where num_nonnulls(max_running, max_per_key, rate) > 0")}

    @staticmethod
    def limit_of(limits: dict[str, Any], type: str) -> str | None:
        return next((name for name in (type, "b:*", "*") if name in limits and type.startswith(name.rstrip("*"))), None)

    # --- steps: each returns what is to be read in the log ---------------------------------------------------------------------

    def enqueue(self, conn: Connection, draw: Random, number: int) -> str:
        named = {"priority": draw.choice([0, 0, 0, 5]), "concurrency_key": draw.choice(self.turns),
                 "idempotency_key": draw.choice([None] * 6 + ["k", "l"]), "run_at": draw.choice([None] * 5 + [LATER]),
                 "max_retries": draw.choice([None, None, 0])}
        if draw.random() < 0.1:
            named["expires_at"] = "2031-01-01"
        type = draw.choice(self.types)
        id = steps.enqueue(conn, type, [0], **named)
        return f"{self.know(number, id)}: {type} {({key: value for key, value in named.items() if value})}"

    def enqueue_after(self, conn: Connection, draw: Random, number: int) -> str:
        parents = column(conn, "select id::text from orchestrator.tasks order by id")[-10:]
        parents = draw.sample(parents, min(len(parents), draw.randint(1, 3)))
        named = {"on_failure": draw.choice(["wait", "cancel", "run"]), "concurrency_key": draw.choice([None, "x"]),
                 "run_at": draw.choice([None, None, LATER]), "expires_at": draw.choice([None, None, "2031-01-01"]),
                 "idempotency_key": draw.choice([None, None, None, "k"])}
        id = steps.enqueue(conn, draw.choice(self.types), [0], after=parents, **named)
        return f"{self.know(number, id)} after {self.names(parents)} {({key: value for key, value in named.items() if value})}"

    def enqueue_many(self, conn: Connection, draw: Random, number: int) -> str:
        n, type = draw.randint(2, 6), draw.choice(self.types)
        keys, turns = draw.choices([None, None, None, None, "k", "m"], k=n), draw.choices(self.turns, k=n)
        got = column(conn, "select id::text from orchestrator.enqueue_many(%s, %s::jsonb[], 0, %s::text[], p_concurrency_keys => "
                           "%s::text[]) order by ordinal", type, [Jsonb([0])] * n, keys, turns)
        return f"{self.know(number, *got)}: {type}"

    def claim(self, conn: Connection, draw: Random, number: int) -> str:
        worker = draw.choice(column(conn, LIVE))
        types, most = draw.choice([["*"], ["a", "b:*"], TYPES, [draw.choice(self.types)]]), draw.choice([1, 1, 2, 3, 10, 10, 0])
        line = self.line()
        got = steps.claim(conn, worker, types, most)
        pairs = [(t["claim_id"], t["id"]) for t in got]
        if number not in self.late:
            self.check_order(conn, line, [t["id"] for t in got])
        self.handed += pairs
        self.claimed.setdefault(number, []).extend(pairs)
        return f"{worker} {types} {most}: {self.names([t['id'] for t in got])}"

    def start(self, conn: Connection, draw: Random, number: int) -> str:
        claim, id = self.held(conn, draw)
        return f"{self.name(id)}: {steps.start(conn, claim, id)}"

    def complete(self, conn: Connection, draw: Random, number: int) -> str:
        claim, id = self.held(conn, draw)
        ids = [i for c, i in self.handed if c == claim] if draw.random() < 0.3 else [id]
        return f"{self.names(ids)}: but {steps.complete(conn, claim, *ids)}"

    def fail(self, conn: Connection, draw: Random, number: int) -> str:
        claim, id = self.held(conn, draw)
        return f"{self.name(id)}: {steps.fail(conn, claim, id, after=draw.choice([None, '0']), permanent=draw.random() < 0.4)}"

    def snooze(self, conn: Connection, draw: Random, number: int) -> str:
        claim, id = self.held(conn, draw)
        return f"{self.name(id)}: {steps.snooze(conn, claim, id, draw.choice(['0', '1 hour']))}"

    def release(self, conn: Connection, draw: Random, number: int) -> str:
        if draw.random() < 0.2:
            known = [claim for claim, _ in self.handed if draw.random() < 0.7]
            return str(value(conn, "select orchestrator.release_forgotten(%s, %s::bigint[])", draw.choice(self.workers), known))
        claim, id = self.held(conn, draw)
        ids = draw.choice([[id], []])
        return f"{self.names(ids) or f'all with {self.name(id)}'}: {steps.release(conn, claim, *ids)}"

    def wait_for_signal(self, conn: Connection, draw: Random, number: int) -> str:
        claim, id = self.held(conn, draw)
        got = row(conn, "select held, snooze from orchestrator.await_signal(%s, %s, %s, %s)", claim, id, draw.choice(["s", "u"]),
                  draw.choice([None, "0", "1 hour"]))
        said = steps.snooze(conn, claim, id, "1 hour") if got["snooze"] else None
        return f"{self.name(id)}: {got['held']} {said}"

    def signal(self, conn: Connection, draw: Random, number: int) -> str:
        sleeps = f"{UNFINISHED} and exists (select from orchestrator.task_steps s where s.task_id = id)"
        id = self.some(conn, draw, sleeps) or self.some(conn, draw)
        return f"{self.name(id)}: {value(conn, 'select orchestrator.signal_task(%s, %s)', id, draw.choice(['s', 'u']))}"

    def step(self, conn: Connection, draw: Random, number: int) -> str:
        claim, id = self.held(conn, draw)
        return f"{self.name(id)}: {value(conn, 'select orchestrator.record_step(%s, %s, %s, %s)', claim, id, draw.choice('su'), '1')}"

    def cancel(self, conn: Connection, draw: Random, number: int) -> str:
        ready = "queued_at is not null and concurrency_key is not null"
        id = self.some(conn, draw, draw.choice([UNFINISHED, "parked_at is not null", "parked_at is not null", ready]))
        return f"{self.name(id)}: {steps.cancel(conn, id)}" if id else ""

    def retry(self, conn: Connection, draw: Random, number: int) -> str:
        id = self.some(conn, draw, "status in ('dead_letter', 'cancelled')")
        return f"{self.name(id)}: {steps.retry(conn, id)}" if id else ""

    def replace(self, conn: Connection, draw: Random, number: int) -> str:
        later, priority = draw.choice([None, None, "2020-01-01", LATER]), draw.choice([None, None, 0, 5])
        got = row(conn, "select id::text, action from orchestrator.replace_task(%s, %s, '[1]', %s, %s, %s, %s, %s)",
                  draw.choice(self.types), draw.choice("kl"), later, draw.choice(["replace", "append", "keep"]), priority,
                  "1 day" if later and draw.random() < 0.3 else None, draw.choice([None, "x"]))
        return f"{self.know(number, got['id'])} {got['action']} {later} {priority}"

    def bulk(self, conn: Connection, draw: Random, number: int) -> str:
        action = draw.choice(["cancel", "retry", "run_now", "prioritize", "prioritize", "purge"])
        found: dict[str, Any] = draw.choice([{"all": True}, {"type": draw.choice(["a", "b:*"])}, {"concurrency_key": "x"},
                                             {"status": "parked"}, {"status": "ready"}])
        if "status" in found and action in ("retry", "run_now", "purge"):
            found = {"all": True}
        call = "select operation, done, next_after from orchestrator.bulk_tasks(%s, %s, false, %s, %s, %s)"
        most, done, got = draw.choice([1, 2, 1000]), 0, {}
        while not got or (got["next_after"] and draw.random() < 0.8):
            got = row(conn, call, action, Jsonb(found), "5" if action == "prioritize" else None, most, got.get("operation"))
            done += got["done"]
        return f"{action} {found} {most}: {done}"

    def limit(self, conn: Connection, draw: Random, number: int) -> str:
        name, (running, per_key, rate) = draw.choice(self.limited), draw.choice(LIMITS)
        self.changed.add(number)
        got = value(conn, "select changed from orchestrator.limit_type(%s, %s, %s, %s, %s)", name, running, per_key, rate,
                    rate and "1 hour")
        return f"{name} max_running {running}, max_per_key {per_key}, rate {rate}: {got}"

    def pause(self, conn: Connection, draw: Random, number: int) -> str:
        if draw.random() < 0.6:
            return f"resume {column(conn, 'select orchestrator.resume_type(type) from orchestrator.task_types where paused order by type')}"
        name = draw.choice([*self.types, "b:*"])
        return f"{name}: {value(conn, 'select changed from orchestrator.pause_type(%s)', name)}"

    def schedule(self, conn: Connection, draw: Random, number: int) -> str:
        name, call = draw.choice("pq"), draw.choice(["", "", "pause_", "resume_", "un"])
        if call:
            return f"{call}schedule {name}: {value(conn, f'select orchestrator.{call}schedule(%s)', name)}"
        conn.execute("select orchestrator.schedule(%s, '0 0 1 1 *', %s, p_missed => %s, p_overlap => %s)",
                     [name, draw.choice(self.types), draw.choice(["one", "all", "none"]), draw.choice([True, False])])
        return name

    def fire(self, conn: Connection, draw: Random, number: int) -> str:
        """By hand, or since a year has passed."""
        name = draw.choice("pq")
        if draw.random() < 0.5:
            id = value(conn, "select orchestrator.fire_schedule(%s)::text", name)
            return f"{name}: {self.know(number, id) if id else None}"
        self.tick("""update orchestrator.schedules s
                     set next_at = (select f.at from orchestrator.fire_times(s.cron, s.timezone, now() - interval '2 years', 1) f(at))
                     where s.name in (select name from orchestrator.schedules where name = %s and not paused for no key update skip locked)
                  """, name)
        return f"a year passes, {self.promote(conn, draw, number)}"

    def promote(self, conn: Connection, draw: Random, number: int) -> str:
        return str(conn.execute("select * from orchestrator.promote_due(%s)", [draw.choice([1, 3, 1000])]).fetchone())

    def die(self, conn: Connection, draw: Random, number: int) -> str:
        """Or say goodbye, with claims or without; and another worker comes."""
        worker = draw.choice(column(conn, LIVE))
        if gone := draw.random() < 0.4:
            gone = value(conn, "select orchestrator.unregister_worker(%s)", worker)
        else:
            steps.declare_dead(conn, worker)
        self.workers.append(f"w{len(self.workers) + 1}")
        return f"{worker} {gone}, then {steps.register(conn, self.workers[-1], HANDLERS)}"

    def recover(self, conn: Connection, draw: Random, number: int) -> str:
        return str(steps.recover(conn, self.term, limit=draw.choice([1, 1000])))

    def raise_floors(self, conn: Connection, draw: Random, number: int) -> str:
        return str(steps.raise_floors(conn, self.term))

    def rescan(self, conn: Connection, draw: Random, number: int) -> str:
        return str(value(conn, "select orchestrator.rescan_lanes('leader', %s)", self.term))

    def prune(self, conn: Connection, draw: Random, number: int) -> str:
        age = draw.choice(["1 microsecond", "1 hour"])
        return str(row(conn, "select * from orchestrator.prune('leader', %s, %s, %s, %s)", self.term, age, age, draw.choice([2, 1000])))

    def tick(self, query: str, *parameters: Any) -> None:
        """Move a time into the past, of what nobody has locked."""
        try:
            self.watcher.execute(query, parameters)
        except psycopg.errors.LockNotAvailable:
            pass

    def time(self, conn: Connection, draw: Random, number: int) -> str:
        """It passes: what was put off is due, and rates start anew."""
        self.tick("""update orchestrator.tasks set next_retry_at = clock_timestamp() where id in (
                       select id from orchestrator.tasks where next_retry_at > clock_timestamp() for no key update skip locked)""")
        self.tick("update orchestrator.starts set at = at - interval '1 hour'")
        self.before_shift, self.begun = len(self.handed), []
        return ""

    def expire(self, conn: Connection, draw: Random, number: int) -> str:
        self.tick("""with up as (update orchestrator.tasks set expires_at = clock_timestamp() where id in (
                       select id from orchestrator.tasks where expires_at is not null for no key update skip locked) returning id)
                     update orchestrator.expiries e set at = clock_timestamp() from up where e.task_id = up.id""")
        return self.promote(conn, draw, number)

    # --- what must always hold -------------------------------------------------------------------------------------------------

    def line(self) -> dict[str, tuple[Any, Any, str | None]]:
        """What waits for its key's turn: its line, its place there, and the limit that it is parked under if it may be locked."""
        what = """select id::text, type, priority, concurrency_key, coalesce(queued_at, parked_at), %s from orchestrator.tasks
                  where concurrency_key is not null and (expires_at is null or expires_at > clock_timestamp()) and %s"""
        found = self.watcher.execute(what % ("parked_by", "parked_at is not null")).fetchall()
        unlocked = "coalesce(queued_at, parked_at) is not null for no key update skip locked"
        found += self.watcher.execute(what % ("null", unlocked)).fetchall()
        return {id: ((type, priority, key), place, under) for id, type, priority, key, place, under in found}

    def check_order(self, conn: Connection, line: dict[str, tuple[Any, Any, str | None]], got: list[str]) -> None:
        """One of each key at a time: none before an elder that was free to go, or may still be as it is parked."""
        limits = self.limits(conn) if got else {}
        for id in got:
            mine, place, locked = line.get(id, (None, None, None))
            if mine and not locked and (name := self.limit_of(limits, mine[0])) and limits[name]["max_per_key"] == 1:
                before = [elder for elder, (other, at, under) in line.items()
                          if other == mine and at < place and elder not in got and under in (None, name)]
                # as this transaction sees them, which may have cancelled some, or put them elsewhere
                before = column(conn, "select id::text from orchestrator.tasks where id = any (%s::uuid[]) and priority = %s "
                                      "and coalesce(queued_at, parked_at) < %s", before, mine[1], place)
                if before:
                    raise Fault(f"overtaken: {self.name(id)} was claimed before {self.names(before)}")

    def ended(self, number: int, committed: bool) -> None:
        """The connection's transaction has ended."""
        ids, pairs = self.enqueued.pop(number, []), self.claimed.pop(number, [])
        changed = number in self.changed
        self.changed.discard(number)
        if not committed:
            self.ids = [id if id not in ids else f"gone {id}" for id in self.ids]
            return
        self.kept += ids
        if changed:
            self.old = set(self.handed)
            self.hidden = self.old - {(claim, id) for claim, id, _, _ in self.in_flight()}
            self.before_shift, self.begun = len(self.handed), []
        new = set(self.handed[self.before_shift:])
        self.begun += [pair for pair in pairs if pair in new]
        if pairs:
            self.check_limits()
        # holds in each committed state, not only when it is quiet
        for found in self.watcher.execute("table public.quick_audit"):
            raise Fault(f"audit: {found[0]}: {self.name(str(found[1]))} {found[3]}")

    def in_flight(self) -> list[tuple[int, str, str, str | None]]:
        found = f"select claim_id, id::text, type, concurrency_key from orchestrator.tasks where {IN_FLIGHT}"
        return self.watcher.execute(found).fetchall()

    def check_limits(self) -> None:
        """Nothing was claimed while as many were in flight as a limit allows, or had started."""
        limits = self.limits(self.watcher)
        groups: dict[tuple[str, str | None], set[tuple[int, str]]] = {}
        for claim, id, type, key in self.in_flight():
            if (name := self.limit_of(limits, type)) and (claim, id) not in self.hidden:
                for group in {(name, None), (name, key)}:
                    groups.setdefault(group, set()).add((claim, id))
        for (name, key), found in groups.items():
            most = limits[name]["max_running" if key is None else "max_per_key"]
            if most and len(found) > most and not found <= self.old:
                raise Fault(f"over a limit: {len(found)} of {name} {key or ''}: {self.names([id for _, id in found])}")
        types = dict(self.watcher.execute("select id::text, type from orchestrator.tasks").fetchall()) if self.begun else {}
        begun = Counter(self.limit_of(limits, types[id]) for _, id in self.begun if id in types)
        for name, limit in limits.items():
            if limit["rate"] and begun[name] > limit["rate"]:
                raise Fault(f"over a rate: {begun[name]} of {name} started")

    def quiet(self, draw: Random) -> None:
        """All transactions end."""
        while True:
            self.await_calls()
            number = next((n for n, conn in enumerate(self.connections)
                           if n not in self.under_way and conn.info.transaction_status != TransactionStatus.IDLE), None)
            if number is not None:
                commits = draw.random() < 0.7
                self.log.append(f"  c{number} {'commits' if commits else 'rolls back'}")
                self.end(number, commits)
            elif not self.under_way:
                break
        for found in audit(self.watcher):
            raise Fault(f"audit: {found[0]}: {self.name(str(found[1]))} {found[3]}")

    # --- the end ---------------------------------------------------------------------------------------------------------------

    def settle(self, draw: Random) -> None:
        """Time passes, and a live worker completes what it gets, until nothing moves."""
        def left() -> list[Any]:
            found = f"select id, status, claim_id, queued_at, parked_at from orchestrator.tasks where {UNFINISHED} order by id"
            return self.watcher.execute(found).fetchall()

        before: list[Any] = []
        while (now := left()) != before:
            before = now
            self.time(self.watcher, draw, 0)
            steps.promote(self.watcher)
            steps.recover(self.watcher, self.term)
            for t in steps.claim(self.watcher, "last", ["*"], 10):
                steps.complete(self.watcher, t["claim_id"], t["id"])
        if found := audit(self.watcher):
            raise Fault(f"audit at the end: {found[0][0]}: {self.name(str(found[0][1]))} {found[0][3]}")

    def finish(self, draw: Random) -> None:
        self.quiet(draw)
        self.watcher.execute("set lock_timeout = '20s'")
        for type in column(self.watcher, "select type from orchestrator.task_types where paused"):
            self.watcher.execute("select orchestrator.resume_type(%s)", [type])
        steps.register(self.watcher, "last", HANDLERS)
        for claim, id, _, _ in self.in_flight():
            if draw.random() < 0.5:
                steps.complete(self.watcher, claim, id)
        self.watcher.execute("update orchestrator.workers set declared_dead_at = now() where id not in ('last', 'leader')")
        waits_for_ever = """select w.parent::text from orchestrator.task_waits w join orchestrator.tasks p on p.id = w.parent
                             where p.status = 'dead_letter' and w.on_failure = 'wait'"""
        self.settle(draw)
        while dead := column(self.watcher, waits_for_ever):
            stuck = rows(self.watcher, f"select * from orchestrator.tasks where {UNFINISHED} and blocked_until is null")
            if stuck:
                break
            for id in dead:
                steps.retry(self.watcher, id)
            self.settle(draw)
        for stuck in rows(self.watcher, f"select * from orchestrator.tasks where {UNFINISHED} order by id"):
            said = value(self.watcher, "select orchestrator.explain_task(%s)", stuck["id"])
            raise Fault(f"stuck: {self.name(str(stuck['id']))} {said}")
        self.check_rest()

    def check_rest(self) -> None:
        """Nothing is lost, and nothing left."""
        steps.claim(self.watcher, "last", ["*"], 10)   # reads the last notes
        known = set(column(self.watcher, "select id::text from orchestrator.tasks union select task_id::text from public.deleted"))
        if lost := [id for id in self.kept if id not in known]:
            raise Fault(f"lost: {self.names(lost)}")
        for table, where in {"claims": "true", "task_waits": "true", "expiries": "at < clock_timestamp()",
                             "freed_keys": "exists (select from orchestrator.type_limits)",
                             "type_limits": "num_nonnulls(max_running, max_per_key, rate) = 0"}.items():
            if found := self.watcher.execute(f"select * from orchestrator.{table} where {where}").fetchall():
                raise Fault(f"left in {table}: {found}")
        try:
            check_transitions(self.watcher)
        except AssertionError as error:
            raise Fault(f"transition: {error}") from error

    def do(self, step: Step) -> None:
        draw = Random(step.seed)
        if step.name == "quiet":
            self.quiet(draw)
        elif step.connection in self.under_way:   # then others end, so that it may go on
            for number, conn in enumerate(self.connections):
                if number not in self.under_way and conn.info.transaction_status != TransactionStatus.IDLE:
                    self.log.append(f"  c{number} commits")
                    self.end(number, True)
            self.await_calls()
        else:
            self.late.discard(step.connection)
            call = background(lambda: self.call(step, draw)) if self.patient else Future()
            if not self.patient:
                call.set_result(self.call(step, draw))
            self.under_way[step.connection] = step, call
            self.await_calls()

    def call(self, step: Step, draw: Random) -> tuple[str, str]:
        """What it said, and how its transaction goes on."""
        conn = self.connections[step.connection]
        done = [list(what.get(step.connection, [])) for what in (self.enqueued, self.claimed)]
        try:
            if step.end == "undo":
                conn.execute("savepoint before")
            said = getattr(self, step.name)(conn, draw, step.connection)
            if step.end == "undo":
                conn.execute("rollback to savepoint before")
                new = [id for id in self.enqueued.get(step.connection, []) if id not in done[0]]
                self.ids = [id if id not in new else f"gone {id}" for id in self.ids]
                self.enqueued[step.connection], self.claimed[step.connection] = done
            return said, step.end
        except psycopg.Error as error:
            if error.sqlstate not in ALLOWED:
                raise Fault(f"error: {step.name}: {error}") from error
            return f"{error.sqlstate} {error.diag.message_primary}", "rollback"

    def await_calls(self) -> None:
        """Until each call has ended, or waits for a lock."""
        waiting = "select count(*) from unnest(%s::int[]) p(pid) where pg_blocking_pids(pid) <> '{}'"
        while self.under_way:
            wait([call for _, call in self.under_way.values()], 0.005, FIRST_COMPLETED)
            ended = [number for number, (_, call) in self.under_way.items() if call.done()]
            for number in ended:
                step, call = self.under_way.pop(number)
                said, end = call.result()
                self.log.append(f"  c{number} {step.name} {said} [{end}]{' after a wait' if number in self.late else ''}")
                if end in ("commit", "rollback"):
                    self.end(number, end == "commit")
            if not ended:
                pids = [steps.backend(self.connections[number]) for number in self.under_way]
                if value(self.watcher, waiting, pids) == len(pids):
                    self.late |= set(self.under_way)
                    return

    def end(self, number: int, commits: bool) -> None:
        conn = self.connections[number]
        conn.commit() if commits else conn.rollback()
        self.ended(number, commits)

    def run(self, planned: list[Step], seed: int) -> str | None:
        """What went wrong, if anything."""
        self.begin()
        try:
            for step in planned:
                self.do(step)
            self.finish(Random(f"end {seed}"))
        except Fault as fault:
            return str(fault)
        finally:
            for number in self.under_way:
                self.connections[number].cancel_safe()
            wait([call for _, call in self.under_way.values()], 20)
            for conn in self.connections:
                conn.rollback()
        return None


def shortest(fails: Callable[[list[Step]], bool], planned: list[Step], tries: int = 150) -> list[Step]:
    """Leaves out ever smaller parts for as long as it still fails."""
    size = len(planned) // 2
    while tries > 0:
        start, before = 0, len(planned)
        while start < len(planned) and tries > 0:
            without = planned[:start] + planned[start + size:]
            tries -= 1
            if fails(without):
                planned = without
            else:
                start += size
        if size <= 1 and len(planned) == before:
            break
        size = max(size // 2, 1)
    return planned


def open_connections(url: str) -> list[Connection]:
    """The watcher, and those that are driven; the database notes transitions and deletions."""
    opened = [psycopg.connect(url, autocommit=n == 0) for n in range(CONNECTIONS + 1)]
    record_transitions(opened[0])
    opened[0].execute(GUARD)
    for conn in opened:
        conn.execute("set lock_timeout = '1ms'; set statement_timeout = '20s'; set deadlock_timeout = '20ms'")
        conn.commit()
    return opened


@pytest.fixture(scope="module")
def connections(server: Any, template: str) -> Iterator[list[Connection]]:
    url = server.create_database(template=template.rsplit("/", 1)[1])
    opened = open_connections(url)
    yield opened
    for conn in opened:
        conn.close()
    server.drop_database(url)


@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_transactions_are_open_meanwhile_each_task_ends(connections, seed):
    def run(planned: list[Step]) -> tuple[str | None, Fuzz]:
        fuzz = Fuzz.of(connections, seed)
        return fuzz.run(planned, seed), fuzz

    failed, fuzz = run(plan(seed))
    if failed:
        kind = failed.split(":")[0]
        found, fuzz = run(shortest(lambda planned: str(run(planned)[0]).split(":")[0] == kind, plan(seed)))
        pytest.fail(f"seed {seed}: {failed}\n{found}\n" + "\n".join(fuzz.log), pytrace=False)
