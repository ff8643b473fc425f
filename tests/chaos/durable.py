"""The fault with steps and signals: workers are killed and stopped while handlers of three steps run, and wait for a signal in between.
A step that was recorded is not done again, one in a transaction has written once, and every signal arrives."""
from __future__ import annotations

import random
import signal
import time

from faults import NOISE, TIMEOUT, fault, within
from harness import Lab

LEDGER = "create table chaos.charges (task_id uuid, claim bigint)"
WRONG = """
  select format('%s: result %s, steps %s', t.id, t.result, s.steps) from orchestrator.tasks t, orchestrator.steps(t.id) s(steps)
  where t.type = 'fulfil' and t.status = 'completed' and t.result is distinct from
    jsonb_build_array(s.steps -> 'check', s.steps -> 'charge', jsonb_build_object('of', t.id), s.steps -> 'ship')"""
CHARGES = """
  select format('%s: charged by claims %s, recorded is %s', t.id, array_agg(c.claim), orchestrator.steps(t.id) -> 'charge')
  from orchestrator.tasks t left join chaos.charges c on c.task_id = t.id where t.type = 'fulfil'
  group by t.id having count(c.claim) <> 1 or orchestrator.steps(t.id) ->> 'charge' <> 'charge of claim ' || min(c.claim)"""
# of a task, when each claim was given, and when each step was recorded
GIVEN = "select task_id::text, now_claim, at from chaos.transitions where now = 'claimed'"
RECORDED = "select task_id::text, name, at from orchestrator.task_steps where at is not null"


def check(lab: Lab) -> int:
    """Returns how many steps were done more than once."""
    for query, what in ((WRONG, "results that are not those of the steps"), (CHARGES, "charges too many or too few")):
        if found := lab.column(query):
            lab.fail(f"{len(found)} {what}, such as {found[0]}")
    given = {(task, claim): at for task, claim, at in lab.execute(GIVEN)}
    recorded = {(task, name): at for task, name, at in lab.execute(RECORDED)}
    done: dict[tuple[str, str], int] = {}
    for path in lab.folder.glob("steps-*"):
        for task, claim, name in map(str.split, path.read_text().splitlines()):
            done[task, name] = done.get((task, name), 0) + 1
            if (at := recorded.get((task, name))) and given[task, int(claim)] > at:
                lab.fail(f"{task} did {name} again under claim {claim}, which was given after it had been recorded")
    if set(done) != {key for key in recorded if key[1] != "approved"}:
        lab.fail("what was done is not what was recorded")
    return sum(n - 1 for n in done.values())


@fault("SIGKILL and SIGSTOP, with steps and signals")
def steps(lab: Lab) -> str:
    total, rounds = (300, 6) if lab.short else (4_000, 60)
    lengths = random.Random(lab.seed)
    lab.execute(LEDGER)
    lab.work(3)
    producer = lab.produce(total, rate=total / (rounds * 1.5), make=lambda n: ("fulfil", {"seconds": lengths.uniform(0, 0.3)}))
    killed: dict[int, float] = {}
    sent = 0

    def signal_some(until: float) -> None:
        """Tasks that have just come, that wait, and that are in flight: each once."""
        nonlocal sent
        while time.monotonic() < until:
            for id in [*producer.acknowledged.values()][sent:sent + lab.random.randint(0, 20)]:
                state = lab.value("select orchestrator.signal_task(%s, 'approved', jsonb_build_object('of', %s::text))", id, id)
                if state not in ("delivered", "known"):   # known: its answer was lost
                    lab.fail(f"{id} was sent a signal: {state}")
                sent += 1
            time.sleep(lab.random.uniform(0, 0.2))
    for n in range(rounds):
        signal_some(time.monotonic() + lab.random.uniform(0.5, 1.5))
        victim = lab.random.choice(lab.workers)
        if n % 3 == 2:   # its steps come late
            victim.signal(signal.SIGSTOP)
            signal_some(time.monotonic() + 2 * TIMEOUT)
            victim.signal(signal.SIGCONT)
        else:
            victim.kill()
            killed[victim.pid] = time.time()
            lab.restart(victim)
    until = time.monotonic() + 60
    while sent < total and time.monotonic() < until:
        signal_some(time.monotonic() + 0.2)
    lab.drain(120)
    lab.since_kill(killed)
    repeated = check(lab)
    lab.bit(repeated, "no step was done twice")
    within(lab, "recovery", 2 * TIMEOUT + NOISE)
    return f"{total:,} tasks of 3 steps, {rounds} kills and stops, {repeated} steps repeated"
