"""The fault with schedules: workers are killed, one after another and all at once, and the leader is paused, while schedules fire.
Every fire time must have its task, or a reason for having none."""
from __future__ import annotations

import signal
import time

from faults import NOISE, fault, within
from harness import Lab

DEFINE = """
  select orchestrator.schedule('all ' || n, '@every 1 second', 'work', '{"seconds": 0.01}', p_missed => 'all') from generate_series(1, 5) n
  union all select orchestrator.schedule('one', '@every 1 second', 'work', p_missed => 'one')
  union all select orchestrator.schedule('apart', '@every 1 second', 'work', '{"seconds": 0.6}', p_missed => 'all', p_overlap => false)"""
FIRED = """
  create temp view fired as
    select substr(left(t.idempotency_key, -21), 10) as name, right(t.idempotency_key, 20)::timestamptz as at, t.id, t.created_at,
           coalesce(t.completed_at, t.dead_at, 'infinity') as ended_at
    from orchestrator.tasks t where t.idempotency_key like 'schedule:%';
  create temp view missing as   -- counted out here, not by fire_times
    select s.name, u.at from orchestrator.schedules s
    cross join lateral generate_series(date_trunc('second', s.active_since) + interval '1 second', s.next_at - interval '1 second',
                                       interval '1 second') u(at)
    where not exists (select from fired f where f.name = s.name and f.at = u.at)"""


def check(lab: Lab, outages: list[tuple[float, float]]) -> None:
    """outages: from when until when (of the database's clock) no worker was there."""
    lab.execute(FIRED)
    lab.extra_ids |= set(lab.column("select id::text from fired"))
    lost = lab.column("select format('%s at %s', name, at) from missing where name like 'all %' order by 1")
    if lost:
        lab.fail(f"{len(lost)} fire times without a task, such as of {lost[0]}")
    # the last one was unfinished when it was asked for
    lost = lab.column("""
        select m.at::text from missing m where m.name = 'apart' and not exists (
          select from fired f where f.name = m.name and f.at < m.at and f.ended_at > m.at - interval '1 second')""")
    if lost:
        lab.fail(f"{len(lost)} fire times left out although the last task had ended, such as {lost[0]}")
    for at in lab.column("select extract(epoch from at)::float8 from missing where name = 'one'"):
        if not any(began - 1 <= at <= ended + NOISE for began, ended in outages):
            lab.slow(f"{at:.0f}, a fire time of 'one', has no task although workers were there")
    early = lab.value("select count(*) from fired where created_at < at")
    if early:
        lab.fail(f"{early} tasks before their fire time")
    lab.recovery = [late for at, late in lab.execute("""
        select extract(epoch from at)::float8, extract(epoch from created_at - at)::float8 from fired""")
        if not any(began - 1 <= at <= ended for began, ended in outages)]


@fault("SIGKILL and a paused leader, with schedules")
def schedules(lab: Lab) -> str:
    rounds = 6 if lab.short else 60
    lab.work(3)
    lab.execute(DEFINE)
    outages: list[tuple[float, float]] = []
    for n in range(rounds):
        time.sleep(lab.random.uniform(0.3, 1.5))
        if n % 3 == 0:   # whoever fires just now
            victim = lab.random.choice(lab.workers)
            victim.kill()
            lab.restart(victim)
        elif n % 3 == 1:
            leader = lab.leader()
            if leader is not None:
                leader.signal(signal.SIGSTOP)
                time.sleep(2)
                leader.signal(signal.SIGCONT)
        else:
            began = lab.value("select extract(epoch from clock_timestamp())::float8")
            for worker in list(lab.workers):
                worker.kill()
            time.sleep(2.5)
            for worker in list(lab.workers):
                lab.restart(worker).wait_registered()
            outages.append((began, lab.value("select extract(epoch from clock_timestamp())::float8")))
    time.sleep(2)
    lab.execute("select orchestrator.pause_schedule(name) from orchestrator.schedules")
    lab.drain(60)
    check(lab, outages)
    lab.bit(lab.value("select count(*) from missing where name = 'one'"), "no fire time was missed while there was no worker")
    within(lab, "firing", NOISE)
    return f"7 schedules a second, {len(lab.extra_ids):,} fire times, {rounds} kills and pauses"
