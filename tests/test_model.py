"""Random calls of the SQL functions against a small model of the state machine in Python.

After each step every task, claim and worker in the database must be what the model says; after each example the audit must
find nothing, and every change of status that a trigger recorded must be one that the state machine has.
"""
from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, timedelta
from random import Random
from typing import Any, ClassVar

import hypothesis.strategies as st
from hypothesis import HealthCheck, Phase, note, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from psycopg.types.json import Jsonb

import steps
from steps import Connection, rows, value
from transitions import check_transitions, record_transitions

TYPES = ["a", "b:1", "b:2"]
PRIORITIES = [0, 0, 0, 5, -5]
POLICY = {"a": 1, "b:1": 2, "b:2": 2}  # max_retries, from the handlers below
HANDLERS = {"a": {"max_retries": 1, "base_delay": 3600}, "b:": {"max_retries": 2, "base_delay": 3600}}  # due only when told
OPERATIONS = """
  enqueue enqueue enqueue_many enqueue_many claim claim claim claim start start complete complete complete fail fail fail release snooze
  progress cancel cancel retry promote promote pause_or_resume limit die recover recover maintain prune
  schedule fire fire fire_by_hand pause_or_resume_schedule enqueue_after enqueue_after expire
""".split()  # noqa: SIM905
EXAMPLES, STEPS = int(os.environ.get("MODEL_EXAMPLES", "20")), 100
WAITING, IN_FLIGHT = ("pending", "retry_scheduled"), ("claimed", "running")


@dataclass
class Task:
    type: str
    priority: int
    max_retries: int | None
    status: str = "pending"
    scheduled: bool = False
    attempts: int = 0
    recoveries: int = 0
    claim: int | None = None
    worker: str | None = None
    asked: bool = False
    turn: str | None = None  # its concurrency key
    blocked: bool = False
    expires: bool = False
    waits: dict[str, str] = field(default_factory=dict, compare=False)  # what it still waits for: on_failure
    delayed: bool = field(default=False, compare=False)  # when it no longer waits
    limit: str | None = field(default=None, compare=False)  # that it was claimed under

    def leave(self, status: str, scheduled: bool = False) -> None:
        self.status, self.scheduled, self.asked, self.blocked = status, scheduled, False, False
        if status in WAITING:
            self.claim = self.worker = None
        else:
            self.expires = False

    def started(self) -> None:
        self.attempts += self.status == "claimed"

    def uncharged(self) -> None:
        self.attempts -= self.status == "running"

    def fail(self, permanent: bool) -> str:
        self.started()
        most = POLICY[self.type] if self.max_retries is None else self.max_retries
        if self.asked:
            self.leave("cancelled")
        elif permanent or self.attempts > most:
            self.leave("dead_letter")
        else:
            self.leave("retry_scheduled", scheduled=True)
        return self.status


@dataclass
class Schedule:
    type: str
    priority: int
    max_retries: int | None
    missed: str
    overlap: bool
    paused: bool = False
    last: str | None = None  # its last task


@dataclass
class Model:
    tasks: dict[str, Task] = field(default_factory=dict)
    schedules: dict[str, Schedule] = field(default_factory=dict)
    keys: dict[tuple[str, str], str] = field(default_factory=dict)
    workers: dict[str, bool] = field(default_factory=dict)  # alive?
    paused: set[str] = field(default_factory=set)
    limits: dict[str, tuple[int | None, int | None]] = field(default_factory=dict)  # type or pattern: in all, of each key
    claims: list[int] = field(default_factory=list)  # all there ever were: the old ones answer late

    def limit_of(self, type: str) -> str | None:
        return next((name for name in (type, "b:*") if name in self.limits and type.startswith(name.rstrip("*"))), None)

    def in_flight(self, limit: str, turn: str | None = None) -> int:
        return sum(task.status in IN_FLIGHT and self.limit_of(task.type) == limit and turn in (None, task.turn)
                   for task in self.tasks.values())

    def settle(self) -> None:
        """What waits for tasks that have ended goes its way; a child is younger than its parents."""
        for _, task in sorted(self.tasks.items()):
            for parent, mode in list(task.waits.items()) if task.blocked else ():
                ended = self.tasks[parent].status
                if ended == "completed" or (mode == "run" and ended in ("cancelled", "dead_letter")):
                    del task.waits[parent]
                elif ended == "cancelled" or (mode == "cancel" and ended == "dead_letter"):
                    task.leave("cancelled")
                    break
            if task.blocked and not task.waits:
                task.blocked, task.scheduled = False, task.delayed

    def held(self, claim: int, id: str) -> Task | None:
        task = self.tasks.get(id)
        return task if task and task.claim == claim and task.status in IN_FLIGHT else None


class Queue(RuleBasedStateMachine):
    conn: Connection
    counts: ClassVar[Counter[str]] = Counter()

    @initialize()
    def empty(self) -> None:
        self.model, self.names, self.steps = Model(), 0, 0
        self.conn.execute("""
          truncate orchestrator.tasks, orchestrator.claims, orchestrator.workers, orchestrator.task_types, orchestrator.task_events,
                   orchestrator.type_limits, orchestrator.starts, orchestrator.freed_keys, orchestrator.schedules,
                   orchestrator.task_waits, orchestrator.expiries,
                   orchestrator.lanes, orchestrator.lane_floors, public.transitions""")
        self.term = steps.lead(self.conn)
        for _ in range(2):
            self.register()

    def register(self, draw: Random | None = None) -> None:
        if sum(self.model.workers.values()) < 3:
            self.names += 1
            self.model.workers[steps.register(self.conn, f"w{self.names}", HANDLERS)] = True

    def pick(self, draw: Random, found: list[Any]) -> Any:
        """One of these; None if there are none."""
        return draw.choice(found) if found else None

    def some(self, draw: Random, *statuses: str) -> str | None:
        return self.pick(draw, [id for id, task in self.model.tasks.items() if not statuses or task.status in statuses])

    def some_held(self, draw: Random) -> tuple[int, str] | None:
        """A claim and a task: mostly one that the claim holds, else a late or a foreign one."""
        pairs = [(task.claim, id) for id, task in self.model.tasks.items() if task.status in IN_FLIGHT]
        if pairs and draw.randint(0, 4):
            return self.pick(draw, pairs)
        claim, id = self.pick(draw, self.model.claims), self.some(draw, *draw.choice([IN_FLIGHT, ()]))
        return (claim, id) if claim and id else None

    def enqueue(self, draw: Random) -> None:
        type, priority = draw.choice(TYPES), draw.choice(PRIORITIES)
        most, key = draw.choice([None, None, 0, 2]), draw.choice([None, None, "k", "l"])
        later, turn = draw.choice([False, False, True]), draw.choice([None, "x", "y"])
        id = steps.enqueue(self.conn, type, {}, priority=priority, max_retries=most, idempotency_key=key,
                           run_at="2030-01-01" if later else None, concurrency_key=turn)
        if key and (type, key) in self.model.keys:
            assert id == self.model.keys[type, key]
            return
        assert id not in self.model.tasks
        self.model.tasks[id] = Task(type, priority, most, scheduled=later, turn=turn)
        if key:
            self.model.keys[type, key] = id

    def enqueue_after(self, draw: Random) -> None:
        type, priority, mode = draw.choice(TYPES), draw.choice(PRIORITIES), draw.choice(["wait", "cancel", "run"])
        bad = {"wait": ["cancelled"], "cancel": ["cancelled", "dead_letter"], "run": []}[mode]
        known = [id for id, task in self.model.tasks.items() if task.status not in bad]
        parents = draw.sample(known[-8:], min(len(known), draw.randint(1, 3)))
        later, expires, key = draw.choice([False, False, True]), draw.choice([False, True]), draw.choice([None, None, "k"])
        id = steps.enqueue(self.conn, type, {}, priority=priority, after=parents, on_failure=mode, run_at="2030-01-01" if later else None,
                           expires_at="2031-01-01" if expires else None, idempotency_key=key)
        if key and (type, key) in self.model.keys:
            assert id == self.model.keys[type, key]
            return
        self.model.tasks[id] = Task(type, priority, None, blocked=True, expires=expires, waits=dict.fromkeys(parents, mode), delayed=later)
        if key:
            self.model.keys[type, key] = id

    def expire(self, draw: Random) -> None:
        up = [id for id, task in self.model.tasks.items() if task.expires and draw.choice([False, True])]
        self.conn.execute("update orchestrator.tasks set expires_at = clock_timestamp() where id = any (%s::uuid[])", [up])
        self.conn.execute("update orchestrator.expiries set at = clock_timestamp() where task_id = any (%s::uuid[])", [up])
        for id in up:
            self.model.tasks[id].leave("cancelled")
        self.promote(draw)
        self.counts["expired"] += len(up)

    def enqueue_many(self, draw: Random) -> None:
        type, priority = draw.choice(TYPES), draw.choice(PRIORITIES)
        keys = draw.choices([None, None, "k", "l", "m"], k=draw.randint(0, 5))
        query = "select id::text, created from orchestrator.enqueue_many(%s, %s::jsonb[], %s, %s::text[]) order by ordinal"
        got = self.conn.execute(query, [type, [Jsonb({})] * len(keys), priority, keys]).fetchall()
        assert len(got) == len(keys)
        for key, (id, created) in zip(keys, got, strict=True):
            known = self.model.keys.get((type, key)) if key else None
            assert created == (known is None) and id == (known or id)
            if created:
                self.model.tasks[id] = Task(type, priority, None)
                if key:
                    self.model.keys[type, key] = id

    def claim(self, draw: Random) -> None:
        types, limit = draw.choice([set(TYPES), {"a"}, {"b:1", "b:2"}]), draw.choice([3, 1, 6, 2, 0])
        named = draw.choice([sorted(types), {3: ["*"], 1: ["a"], 2: ["b:*", "b:1"]}[len(types)]])
        worker = self.pick(draw, [w for w, alive in self.model.workers.items() if alive])
        if worker is None:
            return
        ready = rows(self.conn, "select id::text, type, priority from orchestrator.tasks where coalesce(queued_at, parked_at) is not null "
                                "and type = any (%s) order by coalesce(queued_at, parked_at)", list(types - self.model.paused))
        before = {name: self.model.in_flight(name) for name in self.model.limits}
        got = steps.claim(self.conn, worker, named, limit)
        ids = {t["id"] for t in got}
        assert len(ids) == len(got) <= min(limit, len(ready)) and ids <= {t["id"] for t in ready}
        free = [t for t in ready if not self.model.limit_of(t["type"])]
        if not self.model.limits:
            assert len(got) == min(limit, len(ready))
        if len(got) < limit:   # all that may start has started
            assert {t["id"] for t in free} <= ids
            self.check_full([self.model.tasks[t["id"]] for t in ready if t["id"] not in ids], [self.model.tasks[id] for id in ids])
        left = [t for t in free if t["id"] not in ids]
        if left and got:
            assert max(t["priority"] for t in left) <= min(t["priority"] for t in got)
        for lane in {(t["type"], t["priority"]) for t in free}:  # the oldest of each lane
            taken = [t["id"] in ids for t in free if (t["type"], t["priority"]) == lane]
            assert taken == sorted(taken, reverse=True)
        for turn in {(t["type"], t["priority"], self.model.tasks[t["id"]].turn) for t in ready}:   # and of each key
            if turn[2] and self.model.limit_of(turn[0]):
                taken = [t["id"] in ids for t in ready if (t["type"], t["priority"], self.model.tasks[t["id"]].turn) == turn]
                assert taken == sorted(taken, reverse=True)
        for claimed in got:
            task = self.model.tasks[claimed["id"]]
            assert (claimed["attempts"], claimed["recoveries"]) == (task.attempts, task.recoveries)
            task.expires = False
            task.status, task.claim, task.worker, task.limit = "claimed", claimed["claim_id"], worker, self.model.limit_of(task.type)
        claims = {t["claim_id"] for t in got}
        assert not claims & set(self.model.claims)
        self.model.claims += sorted(claims)
        self.counts["claimed"] += len(got)
        for name, (most, each) in self.model.limits.items():
            assert most is None or self.model.in_flight(name) <= max(most, before[name])
            for turn in "xy":
                here = [task for task in self.model.tasks.values() if task.turn == turn and task.claim in claims
                        and self.model.limit_of(task.type) == name]
                assert each is None or not here or self.model.in_flight(name, turn) <= each

    def check_full(self, waiting: list[Task], taken: list[Task]) -> None:
        """Each of these waits since its limit is full, or its key (which it counts after those that were just taken)."""
        def counted(name: str, turn: str | None) -> int:
            busy = [task for task in self.model.tasks.values() if task.status in IN_FLIGHT
                    and name in (task.limit, self.model.limit_of(task.type))]
            busy += [task for task in taken if self.model.limit_of(task.type) == name]
            return sum(turn in (None, task.turn) for task in busy)

        for task in waiting:
            name = self.model.limit_of(task.type)
            assert name
            most, each = self.model.limits[name]
            assert (most is not None and counted(name, None) >= most) or (
                each is not None and task.turn and counted(name, task.turn) >= each)

    def limit(self, draw: Random) -> None:
        name = draw.choice(["a", "b:1", "b:*"])
        most, each = draw.choice([(None, None), (1, None), (3, None), (None, 1), (2, 1), (None, 2)])
        changed = value(self.conn, "select changed from orchestrator.limit_type(%s, %s, %s)", name, most, each)
        assert changed == (self.model.limits.get(name, (None, None)) != (most, each))
        self.model.limits.pop(name, None)
        if (most, each) != (None, None):
            self.model.limits[name] = most, each

    def start(self, draw: Random) -> None:
        if pair := self.some_held(draw):
            task = self.model.held(*pair)
            fresh = task is not None and task.status == "claimed"
            assert steps.start(self.conn, *pair) == fresh
            if fresh:
                task.started()
                task.status = "running"

    def complete(self, draw: Random) -> None:
        """Up to three claims in one call, each with its tasks, a foreign one among them now and then."""
        results = draw.choice([False, True])
        claims = draw.sample(self.model.claims[-6:], min(3, len(self.model.claims)))
        groups = [[id for id, task in self.model.tasks.items() if task.claim == claim and draw.choice([False, True])] for claim in claims]
        if groups and self.model.tasks and draw.choice([False, True]):
            foreign = self.some(draw)
            if all(foreign not in group for group in groups):
                groups[0].append(foreign)
        ids = [id for group in groups for id in group]
        got = dict(self.conn.execute(
            "select id::text, outcome from orchestrator.complete_tasks(%s::bigint[], %s::int[], %s::uuid[], %s::jsonb[])",
            [claims, [len(g) for g in groups], ids, [Jsonb({"r": 1})] * len(ids) if results else None]).fetchall())
        expected = {}
        for claim, group in zip(claims, groups, strict=True):
            for id in group:
                task = self.model.tasks[id]
                if self.model.held(claim, id):
                    task.started()
                    if task.asked:
                        expected[id] = "cancelled"
                    task.leave("cancelled" if task.asked else "completed")
                elif task.claim != claim or task.status != "completed":  # else it was reported before
                    expected[id] = "cancelled" if task.claim == claim and task.status == "cancelled" else "rejected"
        assert got == expected
        self.counts.update(expected.values())
        self.counts["completed"] += len(ids) - len(expected)

    def fail(self, draw: Random) -> None:
        permanent, after = draw.choice([False, False, True]), draw.choice([None, "0", "1 hour"])
        if pair := self.some_held(draw):
            task = self.model.held(*pair)
            expected = task.fail(permanent) if task else "rejected"
            assert steps.fail(self.conn, *pair, "error", after, permanent) == expected
            self.counts[expected] += 1

    def release(self, draw: Random) -> None:
        whole = draw.choice([False, True])
        if pair := self.some_held(draw):
            ids = [id for id in self.model.tasks if self.model.held(pair[0], id) and (whole or id == pair[1])]
            assert steps.release(self.conn, pair[0], *([] if whole else [pair[1]])) == len(ids)
            for id in ids:
                self.end_or_put_back(self.model.tasks[id])

    def end_or_put_back(self, task: Task, scheduled: bool = False) -> str:
        if task.asked:
            task.started()
            task.leave("cancelled")
        else:
            task.uncharged()
            task.leave("pending", scheduled)
        return task.status

    def snooze(self, draw: Random) -> None:
        if pair := self.some_held(draw):
            task = self.model.held(*pair)
            expected = "rejected"
            if task:
                expected = {"pending": "snoozed"}.get(self.end_or_put_back(task, scheduled=True), "cancelled")
            assert steps.snooze(self.conn, *pair) == expected

    def progress(self, draw: Random) -> None:
        if pair := self.some_held(draw):
            query = "select orchestrator.record_progress(%s, %s, '{}')"
            assert value(self.conn, query, *pair) == (self.model.held(*pair) is not None)

    def cancel(self, draw: Random) -> None:
        if id := self.some(draw, *draw.choice([IN_FLIGHT, ()])):
            task = self.model.tasks[id]
            if task.status in WAITING:
                task.leave("cancelled")
                expected = "cancelled"
            elif task.status in IN_FLIGHT:
                task.asked = True
                expected = "cancelling"
            else:
                expected = task.status
            assert steps.cancel(self.conn, id) == expected

    def retry(self, draw: Random) -> None:
        if id := self.some(draw, *(["dead_letter", "cancelled"] if draw.choice([False, True]) else [])):
            task = self.model.tasks[id]
            if task.status in ("dead_letter", "cancelled"):
                task.leave("pending")
                task.attempts = task.recoveries = 0
            assert steps.retry(self.conn, id) == task.status

    def promote(self, draw: Random) -> None:
        due = draw.choice([False, True])
        if due:
            self.conn.execute("update orchestrator.tasks set next_retry_at = clock_timestamp() where next_retry_at is not null")
        steps.promote(self.conn)
        query = "select id::text from orchestrator.tasks where next_retry_at is not null and blocked_until is null"
        self.model.settle()
        still = set(steps.column(self.conn, query))  # where no delay was asked for, some are due already
        for id, task in self.model.tasks.items():
            if task.scheduled and id not in still:
                task.leave("pending")
        assert not (due and still)

    def schedule(self, draw: Random) -> None:
        name = draw.choice(["s", "t"])
        new = Schedule(draw.choice(TYPES), draw.choice(PRIORITIES), draw.choice([None, 0]), draw.choice(["one", "all"]),
                       draw.choice([True, False]))
        if old := self.model.schedules.get(name):
            new.paused, new.last = old.paused, old.last
        next_at = value(self.conn, "select orchestrator.schedule(%s, '@every 1 hour', %s, '{}', 'UTC', %s, %s, %s, %s)",
                        name, new.type, new.priority, new.max_retries, new.missed, new.overlap)
        assert (next_at is None) == new.paused
        self.model.schedules[name] = new

    def fire(self, draw: Random) -> None:
        """As if nobody had polled for some hours; what is paused stays as it is."""
        query = """update orchestrator.schedules set next_at = date_trunc('hour', clock_timestamp()) - %s * interval '1 hour'
                   where not paused returning name, next_at"""
        due = dict(self.conn.execute(query, [draw.randint(0, 3)]).fetchall())
        assert due.keys() == {name for name, schedule in self.model.schedules.items() if not schedule.paused}
        fired = value(self.conn, "select fired from orchestrator.promote_due(0)")
        now = value(self.conn, "select clock_timestamp()")
        query = "select type || ' ' || idempotency_key, id::text from orchestrator.tasks where idempotency_key like 'schedule:%'"
        found = dict(self.conn.execute(query).fetchall())
        for name, next_at in due.items():
            schedule = self.model.schedules[name]
            times = [next_at + timedelta(hours=n) for n in range(4) if next_at + timedelta(hours=n) <= now]
            for at in times if schedule.missed == "all" else times[-1:]:
                if not schedule.overlap and schedule.last and self.model.tasks[schedule.last].status in (*WAITING, *IN_FLIGHT):
                    continue
                key = f"schedule:{name}:{at.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"
                schedule.last = self.model.keys.setdefault((schedule.type, key), found[f"{schedule.type} {key}"])
                self.model.tasks.setdefault(schedule.last, Task(schedule.type, schedule.priority, schedule.max_retries))
                fired -= 1
                self.counts["fired"] += 1
        assert fired == 0

    def fire_by_hand(self, draw: Random) -> None:
        if name := self.pick(draw, sorted(self.model.schedules)):
            schedule = self.model.schedules[name]
            schedule.last = str(value(self.conn, "select orchestrator.fire_schedule(%s)", name))
            assert schedule.last not in self.model.tasks
            self.model.tasks[schedule.last] = Task(schedule.type, schedule.priority, schedule.max_retries)

    def pause_or_resume_schedule(self, draw: Random) -> None:
        if name := self.pick(draw, sorted(self.model.schedules)):
            schedule = self.model.schedules[name]
            verb = "resume" if schedule.paused else "pause"
            assert value(self.conn, f"select orchestrator.{verb}_schedule(%s)", name) is True
            schedule.paused = not schedule.paused

    def pause_or_resume(self, draw: Random) -> None:
        type = next(iter(self.model.paused), None) or draw.choice(TYPES)  # one at a time
        verb = "resume" if type in self.model.paused else "pause"
        assert value(self.conn, f"select changed from orchestrator.{verb}_type(%s)", type) is True
        self.model.paused ^= {type}

    def die(self, draw: Random) -> None:
        busy = {task.worker for task in self.model.tasks.values() if task.status in IN_FLIGHT}
        if worker := self.pick(draw, [w for w, alive in self.model.workers.items() if alive and (w in busy or not busy)]):
            seen = value(self.conn, "select last_heartbeat from orchestrator.workers where id = %s", worker)
            assert value(self.conn, "select orchestrator.declare_dead('leader', %s, %s, %s)", self.term, [worker], [seen]) == 1
            self.model.workers[worker] = False
            self.register()  # its successor

    def recover(self, draw: Random) -> None:
        limit = draw.choice([1, 1000])
        expected, dead_letters = Counter(), Counter()
        dead = {worker for worker, alive in self.model.workers.items() if not alive}
        lost = [task for task in self.model.tasks.values() if task.status in IN_FLIGHT and task.worker in dead]
        got = steps.recover(self.conn, self.term, limit=limit)
        if limit < len(lost):  # which ones is the database's choice
            assert sum(got[name] for name in ("released", "retried", "cancelled")) + sum(got["dead_letters"].values()) == limit
            assert got["failed"] == 0
            lost = self.no_longer_held(lost)
        for task in lost:
            if task.status == "claimed" or task.asked:
                expected["cancelled" if task.asked else "released"] += 1
                task.recoveries += not task.asked
                self.end_or_put_back(task)
            else:
                task.recoveries += 1
                if task.fail(False) == "dead_letter":
                    dead_letters[task.type] += 1
                else:
                    expected["retried"] += 1
        assert {name: got[name] for name in ("released", "retried", "cancelled")} == {
            name: expected[name] for name in ("released", "retried", "cancelled")}
        assert got["dead_letters"] == dead_letters
        for worker in dead:
            if not any(task.worker == worker and task.status in IN_FLIGHT for task in self.model.tasks.values()):
                del self.model.workers[worker]
        self.counts["recovered"] += len(lost)

    def no_longer_held(self, tasks: list[Task]) -> list[Task]:
        held = set(steps.column(self.conn, "select id::text from orchestrator.tasks where status in ('claimed', 'running')"))
        return [task for id, task in self.model.tasks.items() if task in tasks and id not in held]

    def maintain(self, draw: Random) -> None:
        steps.raise_floors(self.conn, self.term)
        if draw.random() < 0.3:   # as if the floors had not risen for a minute
            self.conn.execute("update orchestrator.lane_floors set floor = floor - interval '1 minute'")
            self.conn.execute("update orchestrator.leader_state set drop_floors_at = null")
            self.conn.execute("select orchestrator.raise_floors('leader', %s, '1 minute')", [self.term])
        assert value(self.conn, "select orchestrator.rescan_lanes('leader', %s)", self.term) == 0

    def prune(self, draw: Random) -> None:
        """Nothing is that old, or all is kept for ever."""
        age = draw.choice(["1 hour", "0"])
        assert self.conn.execute("select * from orchestrator.prune('leader', %s, %s, %s)", [self.term, age, age]).fetchone() == (0, 0,
        False)

    # One rule, and a number for each step: of several rules and drawn arguments hypothesis would repeat some and leave out
    # most in most examples, and little would get anywhere. It still drops the steps that a failure doesn't need.
    @rule(seed=st.integers(0, 2**64 - 1))
    def step(self, seed: int) -> None:
        self.steps += 1
        draw = Random(f"{seed} {self.steps}")  # hypothesis likes to draw the same numbers again
        name = draw.choice(OPERATIONS)
        note(name)
        getattr(self, name)(draw)
        self.model.settle()
        self.counts["steps"] += 1

    @invariant()
    def the_database_is_what_the_model_says(self) -> None:
        query = """select id::text, type, priority, max_retries, status::text, next_retry_at is not null and blocked_until is null,
                          attempts, recoveries, claim_id, worker_id, cancel_requested_at is not null, concurrency_key,
                          blocked_until is not null,
                          expires_at is not null from orchestrator.tasks"""
        found = {id: Task(*columns) for id, *columns in self.conn.execute(query)}
        assert found == self.model.tasks
        open_tasks = Counter(task.claim for task in self.model.tasks.values() if task.status in IN_FLIGHT)
        assert steps.claims(self.conn) == open_tasks
        last = "select name, last_task_id::text from orchestrator.schedules"
        assert dict(self.conn.execute(last).fetchall()) == {name: schedule.last for name, schedule in self.model.schedules.items()}
        workers = "select id, declared_dead_at is null from orchestrator.workers where id <> 'leader'"
        assert dict(self.conn.execute(workers).fetchall()) == self.model.workers

    def teardown(self) -> None:
        assert steps.audit(self.conn) == []
        check_transitions(self.conn)


def test_random_calls_leave_the_database_as_the_model_says(conn):
    record_transitions(conn)
    Queue.counts = Counter()

    def queue() -> Queue:
        machine = Queue()
        machine.conn = conn
        return machine

    run_state_machine_as_test(queue, settings=settings(
        max_examples=EXAMPLES, stateful_step_count=STEPS, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck), phases=(Phase.generate,)))
    for bite in ("claimed", "completed", "retry_scheduled", "dead_letter", "cancelled", "rejected", "recovered", "fired", "expired"):
        assert Queue.counts[bite] >= EXAMPLES // 10, Queue.counts  # else the steps didn't get anywhere
