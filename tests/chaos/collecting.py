"""The fault with appended events: workers are killed while producers append to a few keys, and roll some of it back. Each event that was
committed must be in exactly one task, and no other in any."""
from __future__ import annotations

import random
import threading
import time
from collections import Counter

import psycopg
from faults import NOISE, TIMEOUT, fault, within
from harness import Lab

KEYS = "abcd"
APPEND = """
  select * from orchestrator.replace_task('work', %s, jsonb_build_object('seconds', 0.02, %s::text, 1), p_mode => 'append',
    p_run_at => clock_timestamp() + %s * interval '1 second', p_max_wait => '1 second', p_priority => %s, p_concurrency_key => %s)"""
COLLECTED = "select e from orchestrator.tasks t cross join lateral jsonb_object_keys(t.payload) e where e <> 'seconds'"


class Collector(threading.Thread):
    """A producer that appends until it is told to stop; `sent` are the events that it committed."""

    def __init__(self, lab: Lab, number: int) -> None:
        super().__init__(daemon=True)
        self.url, self.number, self.random = lab.url, number, random.Random(lab.seed * 10 + number)
        self.sent: set[str] = set()
        self.stop = threading.Event()
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            with psycopg.connect(self.url, autocommit=True) as connection:
                for n in range(1_000_000):
                    if self.stop.is_set():
                        return
                    self.append(connection, f"event {self.number} {n}")
        except Exception as error:
            self.error = error

    def append(self, connection: psycopg.Connection[tuple[object, ...]], event: str) -> None:
        key, rolls_back = self.random.choice(KEYS), self.random.random() < 0.1
        later = self.random.choice([0, 0.05, 0.3])
        with connection.transaction(force_rollback=rolls_back):
            connection.execute(APPEND, [key, event, later, self.random.choice([None, 0, 1]), key])
            time.sleep(self.random.choice([0, 0, 0.01]))
        if not rolls_back:
            self.sent.add(event)


@fault("SIGKILL, with appended events")
def collecting(lab: Lab) -> str:
    rounds = 6 if lab.short else 60
    lab.execute("select * from orchestrator.limit_type('work', p_max_per_key => 1)")
    lab.work(3)
    collectors = [Collector(lab, number) for number in range(4)]
    for collector in collectors:
        collector.start()
    killed: dict[int, float] = {}
    for _ in range(rounds):
        time.sleep(lab.random.uniform(0.5, 1.5))
        victim = lab.random.choice(lab.workers)
        victim.kill()
        killed[victim.pid] = time.time()
        lab.restart(victim)
    for collector in collectors:
        collector.stop.set()
        collector.join(30)
        if collector.error or collector.is_alive():
            lab.fail(f"a producer got {collector.error!r}")
    lab.drain(120)
    lab.extra_ids |= set(lab.column("select id::text from orchestrator.tasks"))
    lab.since_kill(killed)
    sent: set[str] = set().union(*(collector.sent for collector in collectors))
    found = Counter(lab.column(COLLECTED))
    for events, what in ((sent - found.keys(), "events are in no task"),
                         (found.keys() - sent, "events are in a task, and were rolled back"),
                         ({event for event, count in found.items() if count > 1}, "events are in several tasks")):
        if events:
            lab.fail(f"{len(events)} {what}, such as {min(events)}")
    passed = lab.value("select count(*) from orchestrator.task_events where event = 'key_passed_on'")
    lab.bit(passed, "no key was passed on")
    within(lab, "recovery", 2 * TIMEOUT + NOISE)
    return f"{len(sent):,} events in {len(lab.extra_ids):,} tasks of {len(KEYS)} keys, {rounds} kills"
