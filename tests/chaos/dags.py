"""The fault with dependencies: workers are killed, one after another and all at once, while graphs of tasks are enqueued, some of
whose tasks fail at first. No task may start before its parents have completed, and none may be left over."""
from __future__ import annotations

import time

from faults import fault
from harness import Lab

# four parents, of which one fails at first; a fan-in; three children of that; and one more behind them all
DAG = """
  with parents as (
    select array_agg(orchestrator.enqueue('work', jsonb_build_object('seconds', 0.02 * n, 'fail', (n = 2)::int))) as ids
    from generate_series(1, 4) n),
  middle as (select orchestrator.enqueue('work', p_after => p.ids) as id from parents p),
  children as (select array_agg(orchestrator.enqueue('work', '{"seconds": 0.01}', p_after => array[m.id])) as ids
               from middle m, generate_series(1, 3)),
  last as (select orchestrator.enqueue('work', p_after => c.ids || p.ids, p_on_failure => 'run') as id from children c, parents p)
  select id::text from (select unnest(p.ids) as id from parents p union all select m.id from middle m
                        union all select unnest(c.ids) from children c union all select l.id from last l) i"""


def check(lab: Lab) -> None:
    # a claim notes its time when it begins
    early = lab.column("""
        select format('%s started %s before %s completed', c.id, p.completed_at - c.started_at, p.id)
        from orchestrator.tasks c cross join unnest(c.after) a join orchestrator.tasks p on p.id = a
        where c.started_at < p.completed_at - interval '0.1 second'""")
    if early:
        lab.fail(f"{len(early)} tasks started before their parents had completed, such as: {early[0]}")
    left = lab.value("select count(*) from orchestrator.task_waits")
    if left:
        lab.fail(f"{left} waits are left over")


@fault("SIGKILL, with dependencies")
def dags(lab: Lab) -> str:
    rounds = 8 if lab.short else 80
    lab.work(3)
    kills = 0
    for n in range(rounds):
        for _ in range(10):
            lab.extra_ids |= set(lab.column(DAG))
            time.sleep(lab.random.uniform(0, 0.05))
        for victim in list(lab.workers) if n % 4 == 3 else [lab.random.choice(lab.workers)]:
            victim.kill()
            lab.restart(victim)
            kills += 1
    lab.drain(60)
    check(lab)
    lab.bit(lab.value("select count(*) from orchestrator.task_events where event = 'recovered'"), "no task was recovered")
    return f"{len(lab.extra_ids):,} tasks, {kills} kills"
