"""The faults of the table: each a function of a Lab that does its worst while tasks flow, and returns how much of it there was."""
from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
from harness import GRACE, HEARTBEAT, REPOSITORY, SHORT_LEASES, TERM, TIMEOUT, Lab, Worker, build_skew, follow, promote
from proxy import Proxy

from postgres import LocalServer, eventually

CLIENT_DEADLINE = 20.0    # orchestrator.py's STATEMENT_TIMEOUT + 5: when a worker gives a silent server up
NOISE = 3.0               # seconds that a busy machine may add to any limit

Fault = Callable[[Lab], str]
FAULTS: dict[str, Fault] = {}
SERVER_CLOCK = "server's clock ±1 h"


def fault(name: str) -> Callable[[Fault], Fault]:
    def register(function: Fault) -> Fault:
        FAULTS[name] = function
        return function
    return register


def within(lab: Lab, what: str, limit: float) -> None:
    if lab.recovery and max(lab.recovery) > limit:
        lab.slow(f"{what} took {max(lab.recovery):.1f} s, the limit is {limit:.1f} s")


def name_of(lab: Lab, worker: Worker) -> str:
    """The id under which a worker process is registered and alive."""
    return str(lab.wait("select id from orchestrator.workers where id like %s and declared_dead_at is null", f"%:{worker.pid}:%"))


# ------------------------------------------------------------------------------------------------------------------ processes
@fault("none")
def none(lab: Lab) -> str:
    total = 5_000 if lab.short else 100_000
    lab.expect_rerun = False
    lab.produce(total, make=lambda n: ("work", {"fail": int(n % 100 == 7)}))
    lab.work(2 if lab.short else 4)
    lab.drain(600)
    return f"{total:,} tasks, {2 if lab.short else 4} processes"


def kill_workers(lab: Lab, total: int, kills: int, workers: int, leases: dict[str, str], limit: float, pause: float = 1.0) -> str:
    lab.work(workers, leases=leases)
    lengths = random.Random(lab.seed)
    lab.produce(total, rate=total / (kills * 1.5 * pause),
                make=lambda n: ("work", {"seconds": lengths.uniform(0, 0.3), "fail": int(n % 50 == 7)}))
    killed: dict[int, float] = {}
    in_flight = 0
    for _ in range(kills):
        time.sleep(lab.random.uniform(pause, 2 * pause))
        victim = lab.random.choice(lab.workers)
        in_flight += lab.value("select count(*) from orchestrator.tasks where status in ('claimed', 'running') and worker_id like %s",
                               f"%:{victim.pid}:%")
        victim.kill()
        killed[victim.pid] = time.time()
        lab.restart(victim)
    lab.drain(180)
    lab.since_kill(killed)
    lab.bit(lab.recovery, "no killed worker held a task")
    within(lab, "recovery", limit)
    again = sum(1 for e in lab.executions() if e.how == "" or e.how == "end") - len(lab.column("select 1 from orchestrator.tasks"))
    if again > 4 * in_flight + 20 * kills:    # what is in flight changes between the count and the kill
        lab.slow(f"{again} executions too many for {kills} kills that met {in_flight} tasks in flight")
    return f"{total:,} tasks, {kills} kills"


@fault("SIGKILL")
def sigkill(lab: Lab) -> str:
    if lab.short:
        return kill_workers(lab, 1_500, 6, 3, SHORT_LEASES, TIMEOUT + 2 * HEARTBEAT + TERM + NOISE, pause=0.5)
    return kill_workers(lab, 20_000, 100, 4, SHORT_LEASES, TIMEOUT + 2 * HEARTBEAT + TERM + NOISE)


@fault("SIGKILL, default leases")
def sigkill_defaults(lab: Lab) -> str:
    """As it is shipped: a heartbeat each 10 s, dead after 30 s. Left out of the short version: it takes over a minute."""
    return kill_workers(lab, 3_000, 5, 4, {}, 30 + 2 * 10 + 30 + NOISE, pause=3)


@fault("SIGSTOP, SIGCONT")
def sigstop(lab: Lab) -> str:
    stops = 2 if lab.short else 50
    lab.work(3)
    lab.produce(None, rate=25)
    for _ in range(stops):
        victim = lab.random.choice([w for w in lab.workers if w is not lab.leader()])
        name = name_of(lab, victim)
        # stop it while a task of its runs
        lab.wait("select true from orchestrator.tasks where worker_id = %s and status in ('claimed', 'running')", name)
        victim.signal(signal.SIGSTOP)
        stopped = time.time()
        lab.wait("select true from chaos.workers where worker = %s and event = 'dead'", name, timeout=60)
        lab.recovery.append(time.time() - stopped)
        time.sleep(max(0.0, stopped + 2 * TIMEOUT - time.time()))
        victim.signal(signal.SIGCONT)
        lab.wait("select true from orchestrator.workers where id like %s and declared_dead_at is null", f"%:{victim.pid}:%", timeout=30)
    lab.drain(120)
    lab.bit(lab.rejected(), "no late outcome was rejected")
    within(lab, "being declared dead", TIMEOUT + 2 * HEARTBEAT + NOISE)
    for worker in lab.workers:
        if not worker.alive:
            lab.fail(f"a stopped worker ended: {worker.output[-500:]}")
    return f"{stops} stops of {2 * TIMEOUT:g} s"


def dead_after_their_retries(lab: Lab, types: list[str]) -> None:
    """Tasks of these types are dead letters after exactly three attempts; all others are none."""
    for kind, status, attempts, count in lab.execute(
            "select type, status::text, attempts, count(*) from orchestrator.tasks t "
            "where type = any (%s) and not (status = 'dead_letter' and attempts = 3) or type <> all (%s) and status <> 'completed' "
            "group by 1, 2, 3", types, types):
        lab.fail(f"{count} tasks of type {kind} ended as {status} after {attempts} attempts")


@fault("task aborts, or uses up the memory")
def suicidal_tasks(lab: Lab) -> str:
    total, bad = (600, 4) if lab.short else (2_000, 20)
    every = total // bad

    def make(n: int) -> tuple[str, dict[str, Any]]:
        return ("abort", "exhaust")[n // every % 2] if n % every == every // 2 else "work", {"seconds": 0.005}
    lab.supervise()
    lab.produce(total, rate=200, make=make)
    lab.work(2, wait=False)    # one may abort before it is seen
    lab.drain(400)
    lab.bit(lab.restarts >= bad, f"only {lab.restarts} processes died")
    dead_after_their_retries(lab, ["abort", "exhaust"])
    bad_ids = set(lab.column("select id::text from orchestrator.tasks where type <> 'work'"))
    runs = lab.executions()
    charged = lab.column("select id::text from orchestrator.tasks where type = 'work' and attempts > 1")
    for task in charged:
        # Two tasks that ran for a while side by side (CAREFUL_SECONDS or longer) can't be told apart when their worker dies, so both are
        # charged: the row says how many. Charged for less is a fault.
        apart = [abs(k.begin - e.begin) for e in runs if e.task == task for k in runs if k.task in bad_ids and k.worker == e.worker]
        if not any(0.05 < seconds < 5 for seconds in apart):
            lab.fail(f"{task} was charged for a crash that it only sat beside: {apart}")
    if charged:
        return f"{bad} among {total:,}, {lab.restarts} crashes, {len(charged)} neighbours charged"
    return f"{bad} among {total:,}, {lab.restarts} crashes"


@fault("allocations fail")
def memory_errors(lab: Lab) -> str:
    total, bad = (400, 5) if lab.short else (2_000, 20)
    every = total // bad
    lab.supervise()
    lab.produce(total, rate=100, make=lambda n: ("memory" if n % every == every // 2 else "work", {"seconds": 0.005}))
    lab.work(2)
    lab.drain(300)
    dead_after_their_retries(lab, ["memory"])
    lab.bit(lab.value("select count(*) from orchestrator.task_events where event = 'failed'"), "no allocation failed")
    return f"{bad} among {total:,}"


@fault("interpreter lock held")
def gil(lab: Lab) -> str:
    holds = 2 if lab.short else 10
    lab.work(2)
    lab.produce(None, rate=20)
    half = lab.produce(holds, rate=0.5, prefix="half", make=lambda n: ("gil", {"seconds": 0.5 * TIMEOUT}))
    half.join(120)
    lab.wait("select count(*) = %s or null from orchestrator.tasks where type = 'gil' and status = 'completed'", holds, timeout=300)
    if lab.value("select count(*) from chaos.workers where event = 'dead'"):
        lab.slow("a worker was declared dead although it held the lock for half the timeout only")
    before = lab.rejected()
    for n in range(holds):
        lab.tampered |= {w.pid for w in lab.workers}
        twice = lab.produce(1, prefix=f"twice{n}-", make=lambda n: ("gil", {"seconds": 2.5 * TIMEOUT}))
        twice.join(30)
        [task_id] = twice.acknowledged.values()
        lab.wait("select true from orchestrator.task_events where task_id = %s and event = 'recovered'", task_id)
        # it may freeze one worker after another: let it be the last run
        lab.execute("select orchestrator.cancel_task(%s)", task_id)
        lab.wait("select status = 'cancelled' or status = 'completed' or null from orchestrator.tasks where id = %s", task_id, timeout=60)
        eventually(lambda: len(lab.column("select 1 from orchestrator.workers where declared_dead_at is null")) == 2, 60)
    lab.drain()
    eventually(lambda: lab.rejected() > before, 30)
    return f"{holds} × {0.5 * TIMEOUT:g} s, {holds} × {2.5 * TIMEOUT:g} s"


@fault("SIGTERM")
def sigterm(lab: Lab) -> str:
    """Idle, busy with what listens and what doesn't, twice, while the server is down, while it is silent."""
    rounds = 1 if lab.short else 10
    exits: list[float] = []

    def stop(worker: Worker, limit: float, what: str, signals: int = 1) -> None:
        began = time.monotonic()
        worker.signal(signal.SIGTERM)
        for _ in range(signals - 1):
            time.sleep(0.3)
            worker.signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.process.wait(limit + 20)
        exits.append(time.monotonic() - began)
        if worker.alive:
            lab.fail(f"{what}: it did not exit")
            worker.kill()
        elif exits[-1] > limit + NOISE / 10:
            lab.slow(f"{what}: the exit took {exits[-1]:.1f} s")
        elif worker.process.returncode != 0:
            lab.fail(f"{what}: exit code {worker.process.returncode}: {worker.output[-300:]}")
        lab.workers.remove(worker)

    def busy(kind: str, count: int, prefix: str) -> Worker:
        [worker] = lab.work(1)
        lab.produce(count, prefix=prefix, make=lambda n: (kind, {"seconds": 60})).join(30)
        lab.wait("select count(*) = %s or null from orchestrator.tasks where status = 'running'", min(count, 8))
        return worker

    def give_back_all() -> None:
        """Nothing in flight, nothing charged; then end them, so that the drain need not wait."""
        lab.wait("select count(*) = 0 or null from orchestrator.tasks where status in ('claimed', 'running')", timeout=30)
        if lab.value("select count(*) from orchestrator.tasks where attempts > 0 and status <> 'cancelled'"):
            lab.fail("a task was charged for a shutdown")
        lab.execute("select orchestrator.cancel_task(id) from orchestrator.tasks where status in ('pending', 'retry_scheduled')")

    for n in range(rounds):
        [worker] = lab.work(1)
        stop(worker, 2.0, "idle")
        stop(busy("wait", 12, f"listens{n}-"), GRACE + 2, "busy with tasks that listen")
        give_back_all()
        worker = busy("deaf", 12, f"deaf{n}-")
        stop(worker, GRACE + 2, "busy with tasks that do not listen")
        give_back_all()
        stop(busy("deaf", 12, f"twice{n}-"), 0.3 + 2, "twice", signals=2)
        give_back_all()
    lab.outage = True
    for n in range(rounds):
        proxy, url = lab.proxy()
        for what in ("the connection refused", "the server silent"):
            [worker] = lab.work(1, url=url)
            lab.produce(6, prefix=f"{what}{n}-", make=lambda n: ("wait", {"seconds": 60})).join(30)
            lab.wait("select count(*) = 6 or null from orchestrator.tasks where status = 'running'")
            if what == "the connection refused":
                assert isinstance(lab.server, LocalServer)
                lab.server.stop_server("fast")
            else:
                proxy.silence()
            stop(worker, GRACE + 2, what)
            if what == "the connection refused":
                lab.server.start()
            else:
                proxy.pass_again(forget=True)
            [other] = lab.work(1)    # it recovers what the other one could not give back
            lab.wait("select count(*) = 0 or null from orchestrator.tasks t join orchestrator.workers w on w.id = t.worker_id "
                     "where t.status in ('claimed', 'running') and w.id not like %s", f"%:{other.pid}:%", timeout=60)
            lab.execute("select orchestrator.cancel_task(id) from orchestrator.tasks where completed_at is null")
            lab.drain(60)
            stop(other, GRACE + 2, "after the outage")
    lab.recovery = exits
    return f"{6 * rounds} exits"


@fault("leader paused, killed, resigned")
def leaders(lab: Lab) -> str:
    changes = 4 if lab.short else 100
    lab.work(3)
    lab.produce(None, rate=20)
    for n in range(changes):
        leader = eventually(lab.leader, 30)
        term = lab.value("select leader_term from orchestrator.workers where is_leader")
        what = ("paused", "killed", "resigned", "killed")[n % 4]
        if what == "paused":
            leader.signal(signal.SIGSTOP)
        elif what == "killed":
            leader.kill()
        else:
            leader.signal(signal.SIGTERM)
        at = time.time()
        lab.wait("select true from chaos.workers where event = 'elected' and term > %s", term, timeout=30)
        lab.recovery.append(lab.value("select extract(epoch from min(at))::float8 from chaos.workers where event = 'elected' and term > %s",
                                      term) - at)
        if what == "paused":
            time.sleep(1.0)
            leader.signal(signal.SIGCONT)
        else:
            leader.process.wait(GRACE + 30)
            lab.restart(leader).wait_registered()
    lab.drain()
    within(lab, "the next election", TERM + 2 * HEARTBEAT + NOISE)
    return f"{changes} leaders"


@fault("clock ±1 h")
def clock(lab: Lab) -> str:
    """One worker an hour ahead, one an hour behind, one that jumps back and forth."""
    library = build_skew(lab.folder)
    jump = lab.folder / "jump"
    jump.write_text("0")
    lab.expect_rerun = False
    total, seconds = (600, 6) if lab.short else (6_000, 60)
    lab.produce(total, rate=total / seconds)
    for settings in ({"SKEW": "3600"}, {"SKEW": "-3600"}, {"SKEW_FILE": str(jump)}):
        lab.work(1, LD_PRELOAD=str(library), **settings)
    until, jumps = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        time.sleep(1)
        jumps += 1
        jump.write_text(("3600", "-3600")[jumps % 2])
    lab.drain()
    lines = "".join(w.output for w in lab.workers[:2])
    hours = {line[:13] for line in lines.splitlines() if re.match(r"\d{4}-\d\d-\d\dT\d\d", line)}
    lab.bit(len(hours) >= 2, "the workers' logs show one clock")
    if lab.value("select count(*) from chaos.workers where event = 'dead'"):
        lab.fail("a worker was declared dead")
    return f"{total:,} tasks, {jumps} jumps"


@fault(SERVER_CLOCK)
def server_clock(lab: Lab) -> str:
    """Steps forward and back, at each of which a worker dies, at every second pair the leader too: none is taken for dead that lives, and
    what the dead ones held is recovered as soon as ever."""
    steps = 4 if lab.short else 40
    lab.work(4)
    lab.produce(None, rate=40, make=lambda n: ("work", {"seconds": 0.5 if n % 10 == 0 else 0.01}))
    ahead = 0
    for n in range(steps):
        leader = eventually(lab.leader, 30)
        victim = lab.random.choice([w for w in lab.workers if w is not leader])
        name = name_of(lab, victim)
        dying = [victim, leader] if n % 4 >= 2 else [victim]
        # it dies with a task that runs
        lab.wait("select true from orchestrator.tasks where worker_id = %s and status = 'running'", name)
        ahead = 3600 - ahead
        lab.clock(ahead)
        began = time.monotonic()
        for worker in dying:
            worker.kill()
        lab.wait("select count(*) = 0 or null from orchestrator.claims where worker_id = %s", name)
        lab.recovery.append(time.monotonic() - began)
        limit = TIMEOUT + 2 * HEARTBEAT + NOISE + (TERM if leader in dying else 0)
        if lab.recovery[-1] > limit:
            lab.slow(f"step {n + 1}: recovery took {lab.recovery[-1]:.1f} s, the limit is {limit:.1f} s")
        for worker in dying:
            lab.restart(worker).wait_registered()
    lab.clock(3600)    # a retry waits for its moment
    off = lab.value("select extract(epoch from clock_timestamp())::float8") - time.time()
    lab.bit(abs(off - 3600) < 60, "the server's clock was right")
    lab.drain()
    for dead in lab.column("select worker from chaos.workers where event = 'dead'"):
        if int(dead.split(":")[-2]) not in lab.tampered:
            lab.fail(f"{dead} was declared dead, and lived")
    return f"{steps} steps, {steps // 2} leaders killed"


# ------------------------------------------------------------------------------------------------------------------- database
def resumes(lab: Lab, ready: float, limit: float, what: str) -> None:
    """Measure the seconds (time.time()) from when the database could be reached to the next task claimed."""
    at = lab.wait("select extract(epoch from min(at))::float8 from chaos.transitions where now = 'claimed' and at > to_timestamp(%s)",
                  ready, timeout=60)
    lab.recovery.append(at - ready)
    if at - ready > limit:
        lab.slow(f"{what}: {at - ready:.1f} s until tasks were claimed again")


def no_worker_ended(lab: Lab) -> None:
    for worker in lab.workers:
        if not worker.alive:
            lab.fail(f"a worker ended with {worker.process.returncode}: {worker.output[-500:]}")


@fault("server crashes")
def restart(lab: Lab) -> str:
    """pg_ctl stop -m immediate is a crash: the server recovers from its write-ahead log."""
    assert isinstance(lab.server, LocalServer)
    crashes = 3 if lab.short else 20
    lab.forgets = True
    lab.work(3)
    producer = lab.produce(None, rate=80)
    for _ in range(crashes):
        time.sleep(lab.random.uniform(1, 2))
        lab.server.stop_server("immediate")
        time.sleep(lab.random.uniform(0, 3 if lab.short else 5))
        lab.server.start()
        resumes(lab, time.time(), 5 + NOISE, "after a restart")
    lab.drain()
    no_worker_ended(lab)
    lab.bit(producer.retried, "no producer noticed")
    return f"{crashes} crashes"


@fault("server crashes under load")
def crash_under_load(lab: Lab) -> str:
    """At any moment. A claim waits for no flush, so a crash may forget the last ones: their tasks run again, and what the first run says of
    them is refused. At some crashes a worker dies too: what it held is recovered."""
    assert isinstance(lab.server, LocalServer)
    crashes = 5 if lab.short else 60
    lab.forgets = True
    lab.work(4)
    dice = random.Random(lab.seed)
    lab.produce(None, rate=300, make=lambda n: ("work", {"seconds": 0.3 if n % 100 == 0 else dice.uniform(0, 0.03)}))
    for n in range(crashes):
        time.sleep(lab.random.uniform(0.1, 1.5))
        victim = lab.random.choice(lab.workers) if n % 10 == 4 else None
        name = name_of(lab, victim) if victim else ""
        lab.server.stop_server("immediate")
        if victim:
            victim.kill()
        lab.server.start()
        ready = time.time()
        resumes(lab, ready, 5 + NOISE, "after a crash")
        if victim:
            lab.wait("select count(*) = 0 or null from orchestrator.claims where worker_id = %s", name)
            if time.time() - ready > TIMEOUT + 2 * HEARTBEAT + TERM + NOISE:
                lab.slow(f"recovery after a crash took {time.time() - ready:.1f} s")
            lab.restart(victim).wait_registered()
    lab.drain()
    no_worker_ended(lab)
    return f"{crashes} crashes, {lab.value('select count(*) from orchestrator.tasks'):,} tasks"


@fault("server away for 2 × WORKER_TIMEOUT")
def long_outage(lab: Lab) -> str:
    """Nobody's heartbeat could arrive: whoever leads first must not take the others for dead, nor run again what they still run."""
    assert isinstance(lab.server, LocalServer)
    times = 1 if lab.short else 10
    lab.expect_rerun = False
    lab.work(3)
    for n in range(times):
        lab.produce(12, prefix=f"long{n}-", make=lambda n: ("wait", {"seconds": 2 * TIMEOUT + 6})).join(30)
        lab.wait("select count(*) = 12 or null from orchestrator.tasks where status = 'running'")
        lab.server.stop_server("fast")
        time.sleep(2 * TIMEOUT)
        lab.server.start()
        resumes_after = time.time()
        lab.produce(30, prefix=f"after{n}-").join(30)
        resumes(lab, resumes_after, 5 + NOISE, "after the outage")
        lab.drain(60)
    no_worker_ended(lab)
    if lab.value("select count(*) from chaos.workers where event = 'dead'"):
        lab.fail("a worker was declared dead")
    return f"{times} × {2 * TIMEOUT:g} s"


@fault("connections terminated")
def terminate(lab: Lab) -> str:
    seconds = 8 if lab.short else 120
    rate, after = 80, 5 if lab.short else 10
    lab.work(3)
    lab.produce(rate * (seconds + after + 2), rate=rate)
    until, killed = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        time.sleep(0.5)
        names = lab.column("select pid from pg_stat_activity where datname = current_database() and "
                           "(application_name like 'orchestrator%%' or application_name = 'producer')")
        if names:
            killed += lab.value("select pg_terminate_backend(%s)::int", lab.random.choice(names))
    calm = time.time()
    lab.drain()
    no_worker_ended(lab)
    ended = lab.value("select count(*) from orchestrator.tasks where completed_at between to_timestamp(%s) and to_timestamp(%s)",
                      calm, calm + after)
    if ended < 0.95 * rate * after:
        lab.slow(f"only {ended} tasks ended in the {after} s after, {rate * after} were enqueued")
    lab.bit("terminating connection" in "".join(worker.output for worker in lab.workers), "no worker noticed")
    return f"{killed} connections in {seconds} s"


@fault("network silent")
def blackhole(lab: Lab) -> str:
    """The leader's network falls silent for 15 s and comes back; then for ever, with new connections possible."""
    rounds = 1 if lab.short else 10
    proxies = [lab.proxy() for _ in range(3)]
    by_pid: dict[int, Proxy] = {}
    for proxy, url in proxies:
        [worker] = lab.work(1, url=url)
        by_pid[worker.pid] = proxy
    lab.produce(None, rate=40)
    for n in range(2 * rounds):
        for_ever = n % 2 == 1
        leader = eventually(lab.leader, 30)
        [name] = lab.column("select id from orchestrator.workers where is_leader")
        lab.tampered.add(leader.pid)
        proxy = by_pid[leader.pid]
        proxy.silence()
        lab.wait("select true from chaos.workers where worker = %s and event = 'dead'", name, timeout=TIMEOUT + TERM + 10)
        if not for_ever:
            time.sleep(2 if lab.short else 10)
        proxy.pass_again(forget=for_ever)
        ready = time.time()
        lab.wait("select true from orchestrator.workers where id like %s and declared_dead_at is null", f"%:{leader.pid}:%", timeout=60)
        lab.recovery.append(time.time() - ready)
    lab.drain(180)
    no_worker_ended(lab)
    within(lab, "coming back", CLIENT_DEADLINE + 5 + NOISE)
    return f"{rounds} × {6 if lab.short else 15} s, {rounds} × for ever"


@fault("COMMIT acknowledged to nobody")
def lost_replies(lab: Lab) -> str:
    """The server commits an enqueue, a claim, a start, a completion, a failure; its answer is lost with the connection."""
    times = 3 if lab.short else 100
    proxy, url = lab.proxy()
    proxy.lose_reply("orchestrator.register_worker(")
    lab.work(1, url=url, PREPARED_STATEMENTS="false")
    eventually(lambda: not proxy.armed)
    lab.work(1)
    lost = {"register_worker": proxy.lost}
    number = 0
    for what in ("claim_tasks", "complete_tasks", "fail_tasks", "start_tasks", "enqueue_many"):
        before = proxy.lost
        for _ in range(times if what in ("claim_tasks", "complete_tasks", "enqueue_many") else max(1, times // 5)):
            proxy.lose_reply(f"orchestrator.{what}(", 500 if what == "claim_tasks" else 0)
            give_up = time.monotonic() + 30
            while proxy.armed and time.monotonic() < give_up:
                number += 1
                payload = {"seconds": 0.3 if what == "start_tasks" else 0.002, "fail": int(what == "fail_tasks")}
                producer = lab.produce(6, url=url if what == "enqueue_many" else None, prefix=f"{what}{number}-",
                                       make=lambda n, payload=payload: ("work", payload))
                producer.join(30)
                time.sleep(0.02)
            if proxy.armed:
                lab.fail(f"no worker called {what}")
        lost[what] = proxy.lost - before
    proxy.lose_reply(None)
    lab.drain()
    no_worker_ended(lab)
    lab.bit(min(lost.values()) > 0, f"replies lost: {lost}")
    return ", ".join(f"{count} {what.partition('_')[0]}" for what, count in lost.items())


@fault("standby promoted")
def failover(lab: Lab) -> str:
    """Two servers, replicating synchronously; the primary crashes, the other is promoted, the first becomes its standby."""
    times = 1 if lab.short else 5
    primary, standby = lab.servers
    lab.outage = lab.forgets = True
    lab.work(3)
    producer = lab.produce(None, rate=60)
    for _ in range(times):
        time.sleep(2)
        primary.stop_server("immediate")
        time.sleep(0.5)
        promote(standby)
        resumes(lab, time.time(), 5 + NOISE, "after a failover")
        time.sleep(2)
        follow(primary, standby)
        primary, standby = standby, primary
    lab.drain()
    no_worker_ended(lab)
    lab.bit(producer.retried, "no producer noticed")
    return f"{times} failovers"


@fault("old snapshot held")
def old_snapshot(lab: Lab) -> str:
    """A transaction that stays open keeps every dead row; claiming must not get slower for it."""
    rounds, size, lasting = (6, 1_000, 0.0) if lab.short else (200, 5_000, 600.0)
    lab.produce(1, prefix="first").join(30)
    lab.execute("select orchestrator.register_worker('here:0:measure', 'here', 10, '0', '{\"work\": {}}')")
    leader = lab.work(1, leases={}, HANDLERS=str(_no_handlers(lab)))[0]      # raises the floors, and runs nothing
    lab.tampered.add(leader.pid)

    def cycle() -> list[float]:
        lab.execute("select count(*) from orchestrator.enqueue_many('work', array_fill('{}'::jsonb, array[%s]))", size)
        seconds = []
        while True:
            began = time.perf_counter()
            rows = lab.execute("select claim_id, id from orchestrator.claim_tasks('here:0:measure', array['work'], 50)")
            if not rows:
                return seconds
            seconds.append(time.perf_counter() - began)
            lab.execute("select * from orchestrator.complete_tasks(array[%s::bigint], array[%s::int], %s::uuid[])", rows[0][0], len(rows),
                        [row[1] for row in rows])
            lab.execute("select orchestrator.heartbeat('here:0:measure')")

    def p99(seconds: list[float]) -> float:
        return sorted(seconds)[int(len(seconds) * 0.99)] * 1000

    cycle()
    with psycopg.connect(lab.url) as old:
        old.execute("set transaction isolation level repeatable read")
        old.execute("select count(*) from orchestrator.tasks")
        began = time.monotonic()
        for n in range(rounds):
            lab.recovery += cycle()
            time.sleep(max(0.0, began + lasting * (n + 1) / rounds - time.monotonic()))
        held = time.monotonic() - began
        # the fault has bitten: nothing that was updated since could be removed
        lab.wait("select n_dead_tup >= %s or null from pg_stat_all_tables where relid = 'orchestrator.tasks'::regclass", rounds * size)
        old.rollback()
    lab.extra_ids = set(lab.column("select id::text from orchestrator.tasks"))
    tenth = len(lab.recovery) // 10
    start, end = p99(lab.recovery[:tenth]), p99(lab.recovery[-tenth:])
    if end > 2 * start:
        lab.slow(f"the p99 of a claim was {start:.1f} ms in the first tenth, {end:.1f} ms in the last")
    return f"{rounds * size:,} tasks in {held:.0f} s, p99 of a claim {start:.1f} → {end:.1f} ms"


def _no_handlers(lab: Lab) -> Path:
    path = lab.folder / "nothing.py"
    path.write_text("HANDLERS = {}\n")
    return path


@fault("16 installs at once")
def installs(lab: Lab) -> str:
    """On an empty database, and on one whose workers are busy."""
    rounds = 1 if lab.short else 10
    program = [sys.executable, str(REPOSITORY / "orchestrator.py"), "install"]

    def install(url: str) -> None:
        running = [subprocess.Popen(program, cwd=lab.folder, env={**_bare(), "DATABASE_URL": url}, stdout=subprocess.PIPE,
                                    stderr=subprocess.STDOUT, text=True) for _ in range(16)]
        for process in running:
            output, _ = process.communicate(timeout=120)
            if process.returncode != 0:
                lab.fail(f"install: {output[-500:]}")
    lab.expect_rerun = False
    lab.work(2)
    lab.produce(None, rate=50)
    for _ in range(rounds):
        install(lab.url)
        empty = lab.server.create_database()
        install(empty)
        with psycopg.connect(empty) as connection:
            if connection.execute("select * from orchestrator.audit()").fetchall():
                lab.fail("audit() of a fresh database")
        lab.server.drop_database(empty)
    lab.drain()
    return f"{2 * rounds} × 16"


def _bare() -> dict[str, str]:
    return {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
