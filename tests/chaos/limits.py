"""The fault with limits: workers are killed, they and the leader are paused until they are declared dead, tasks fail, snooze, and
are cancelled and retried, and limits change, while an independent monitor counts what is in flight. Never may it be over, and
nothing may be left waiting or held."""
from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from typing import Any

import psycopg
from faults import NOISE, fault, within
from harness import HEARTBEAT, TIMEOUT, Lab

RATE, PER = 40, 1.0
# type or pattern → what it may be set to, as (max_running, max_per_key); the first is where it starts
LIMITS = {"lim:all": [(3, None), (8, None), (1, None)], "lim:key": [(None, 1), (None, 3)], "lim:both": [(6, 2), (3, 1), (6, 1)],
          "pat:*": [(4, None), (9, 2), (2, 1)], "lim:rate": [(None, None)]}
TYPES = {"lim:all": "lim:all", "lim:key": "lim:key", "lim:both": "lim:both", "lim:rate": "lim:rate", "pat:a": "pat:*", "pat:b": "pat:*"}
CLAIMED = """
  create table chaos.claimed (type text, at timestamptz);
  create function chaos.note_claim() returns trigger language plpgsql as $$
  begin
    insert into chaos.claimed values (new.type, new.claimed_at);
    return null;
  end $$;
  create trigger chaos_claimed after update on orchestrator.tasks for each row
    when (new.status = 'claimed' and old.status <> 'claimed' and new.type = 'lim:rate') execute function chaos.note_claim()"""
IN_FLIGHT = """
  select type, concurrency_key, extract(epoch from claimed_at)::float8, extract(epoch from clock_timestamp())::float8
  from orchestrator.tasks where status in ('claimed', 'running')"""
IN_A_WINDOW = """
  select coalesce(max(n), 0) from (
    select count(*) over (order by at range between current row and %s * interval '1 second' following) as n from chaos.claimed) w"""


class Monitor(threading.Thread):
    """Takes a snapshot of the tasks in flight a hundred times a second. A lowered limit stops nothing, so what counts is the highest
    that was in force since the oldest of them was claimed."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(daemon=True)
        self.lab, self.looks, self.most, self.parked = lab, 0, dict.fromkeys(LIMITS, 0), 0
        self.history: dict[str, list[tuple[float, float, Any]]] = {name: [] for name in LIMITS}   # (from, until, setting)
        self.over: list[str] = []
        self.halt = threading.Event()

    def set(self, name: str, setting: tuple[int | None, int | None]) -> None:
        before = self.lab.value("select extract(epoch from clock_timestamp())::float8")
        self.history[name].append((before, float("inf"), setting))
        rate = (RATE, f"{PER} s") if name == "lim:rate" else (None, None)
        self.lab.execute("select orchestrator.limit_type(%s, %s, %s, %s, %s::interval)", name, *setting, *rate)
        if len(self.history[name]) > 1:
            began, _, old = self.history[name][-2]
            self.history[name][-2] = (began, self.lab.value("select extract(epoch from clock_timestamp())::float8"), old)

    def highest(self, name: str, which: int, since: float, now: float) -> float:
        found = [setting[which] for began, until, setting in list(self.history[name]) if began <= now and until >= since]
        return float("inf") if None in found else max(found)

    def judge(self, rows: list[tuple[str, str | None, float, float]]) -> None:
        groups: dict[tuple[str, str | None], list[tuple[float, float]]] = {}
        for type, key, claimed_at, now in rows:
            groups.setdefault((TYPES[type], None), []).append((claimed_at, now))
            if key is not None:
                groups.setdefault((TYPES[type], key), []).append((claimed_at, now))
        for (name, key), held in groups.items():
            allowed = self.highest(name, 1 if key else 0, min(at for at, _ in held), max(now for _, now in held))
            if key is None:
                self.most[name] = max(self.most[name], len(held))
            if len(held) > allowed:
                self.over.append(f"{len(held)} in flight of {name} {key or ''}, the limit is {allowed}")

    def run(self) -> None:
        with psycopg.connect(self.lab.url, autocommit=True, application_name="monitor") as connection:
            while not self.halt.wait(0.01):
                self.judge(connection.execute(IN_FLIGHT).fetchall())
                self.looks += 1
                if self.looks % 20 == 0:
                    count = connection.execute("select count(*) from orchestrator.tasks where parked_at is not null").fetchone()
                    self.parked = max(self.parked, count[0] if count else 0)


def enqueue(lab: Lab, n: int) -> None:
    for type in TYPES:
        payloads = [json.dumps({"seconds": lab.random.uniform(0.005, 0.06), "fail": int(lab.random.random() < 0.1),
                                "snooze": 0.5 * (lab.random.random() < 0.1)}) for _ in range(n)]
        keys = [lab.random.choice([*"abcdefgh", None]) for _ in range(n)]
        lab.extra_ids |= set(lab.column("select id::text from orchestrator.enqueue_many(%s, %s::jsonb[], p_concurrency_keys => %s)",
                                        type, payloads, keys))


def cancel_some(lab: Lab) -> None:
    """Of those that wait, are parked or in flight; some come back."""
    for call, which in (("cancel_task", "status not in ('completed', 'cancelled', 'dead_letter')"),
                        ("cancel_task", "parked_at is not null"), ("retry_task", "status = 'cancelled'")):
        lab.execute(f"""select orchestrator.{call}(t.id) from (
                          select id from orchestrator.tasks where {which} order by random() limit 8) t""")


def check(lab: Lab, monitor: Monitor) -> None:
    for over in monitor.over[:5]:
        lab.fail(over)
    fastest = lab.value(IN_A_WINDOW, PER - 0.000001)
    if fastest > RATE:
        lab.fail(f"{fastest} were claimed within {PER:g} s, the rate is {RATE}")
    claims = lab.value("select count(*) from orchestrator.claims")
    parked = lab.value("select count(*) from orchestrator.tasks where parked_at is not null")
    if claims or parked:
        lab.fail(f"{claims} claims and {parked} parked tasks are left")


@fault("SIGKILL, SIGSTOP, cancels and changes, with limits")
def limits(lab: Lab) -> str:
    rounds = 8 if lab.short else 120
    lab.execute(CLAIMED)
    monitor = Monitor(lab)
    for name, settings in LIMITS.items():
        monitor.set(name, settings[0])
    lab.work(4)
    monitor.start()
    killed: dict[int, float] = {}
    for n in range(rounds):
        enqueue(lab, 20)
        victim = lab.random.choice(lab.workers)
        if n % 4 == 0:
            victim.kill()
            killed[victim.pid] = time.time()
            lab.restart(victim)
        elif n % 4 == 2:   # longer than it takes to be declared dead, and then it goes on
            victim = (lab.leader() if n % 8 == 2 else None) or victim
            victim.signal(signal.SIGSTOP)
            time.sleep(TIMEOUT + 1.5)
            victim.signal(signal.SIGCONT)
        else:
            cancel_some(lab)
            name = lab.random.choice(list(LIMITS)[:-1])
            monitor.set(name, lab.random.choice(LIMITS[name]))
        time.sleep(lab.random.uniform(0.2, 0.8))
    for name, settings in list(LIMITS.items())[:-1]:
        monitor.set(name, settings[0])
    lab.drain(120)
    with contextlib.suppress(AssertionError):
        lab.wait("select true from (select count(*) as n from orchestrator.claims) c where n = 0", timeout=10)
    monitor.halt.set()
    monitor.join()
    check(lab, monitor)
    lab.since_kill(killed)
    within(lab, "recovery", TIMEOUT + 2 * HEARTBEAT + NOISE)
    lab.bit(monitor.parked, "no task was parked")
    lab.bit(monitor.most["lim:all"] >= 3 and monitor.most["pat:*"] >= 4, "no limit was ever reached")
    return f"{len(lab.extra_ids):,} tasks under 5 limits, {rounds} kills, pauses and changes, {monitor.looks:,} snapshots"
