-- Tasks that wait for others. Writes tasks, task_events, task_waits.

-- Those of p_after that a new task has to wait for, or that it can't wait for (_check_parents); null: none.
create or replace function orchestrator._open_parents(p_after uuid[], p_on_failure text) returns uuid[]
language sql stable as $$
  select array_agg(distinct a) from unnest(p_after) a left join orchestrator.tasks t on t.id = a
  where t.status is distinct from 'completed' and (p_on_failure = 'run' and t.status in ('cancelled', 'dead_letter')) is not true
$$;

create or replace function orchestrator._check_parents(p_after uuid[], p_on_failure text) returns void
language plpgsql stable as $$
declare
  v record;
begin
  select a.id, a.n, t.status into v from unnest(p_after) with ordinality a(id, n) left join orchestrator.tasks t on t.id = a.id
  where t.id is null or (t.status = 'cancelled' and p_on_failure <> 'run') or (t.status = 'dead_letter' and p_on_failure = 'cancel')
  order by a.n limit 1;
  if found then
    perform orchestrator._invalid(format('after[%s]', v.n), case when v.status is null then format('there is no task %s', coalesce(v.id::text, 'null'))
                                                                 else format('task %s is %s', v.id, replace(v.status::text, 'dead_', 'a dead ')) end,
                                  'Name tasks enqueued before, by this transaction or one that has committed, and on_failure run if they may have failed.');
  end if;
end $$;

-- The new tasks p_children wait for p_parents, of p_after.
create or replace function orchestrator._wait_for(p_children uuid[], p_parents uuid[], p_after uuid[], p_on_failure text) returns void
language plpgsql as $$
begin
  if p_children = '{}' then return; end if;
  perform orchestrator._check_parents(p_after, p_on_failure);
  insert into orchestrator.task_waits (parent, child, on_failure) select p, c, p_on_failure from unnest(p_children) c cross join unnest(p_parents) p;
end $$;
