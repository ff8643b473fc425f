-- Tasks that wait for others (parents), and tasks that expire. Writes tasks, task_events, task_waits, expiries.
-- A child is ready in the transaction that ends the last of its parents. One that ends during the child's transaction doesn't see it: so
-- promote_due looks at each child soon after it has committed, and then ever more rarely.
-- Locks: what ended → the tasks that wait for it, one at a time in ascending order of their ids, also down the line: a child is younger
-- than its parents. promote_due, which may hold any, skips those that are locked.

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
                                  'Name tasks enqueued before, by this transaction or one that has committed, and on_failure run if they may '
                                  'have failed.');
  end if;
end $$;

-- Notes what the new tasks wait for (p_parents, of p_after; null: nothing), and when they expire.
create or replace function orchestrator._wait_for(
  p_ids uuid[], p_parents uuid[], p_after uuid[], p_on_failure text, p_expires_at timestamptz) returns void
language plpgsql as $$
begin
  if p_parents is not null and p_ids <> '{}' then
    perform orchestrator._check_parents(p_after, p_on_failure);
    insert into orchestrator.task_waits (parent, child, on_failure) select p, c, p_on_failure from unnest(p_ids) c cross join unnest(p_parents) p;
  end if;
  if p_expires_at is not null then
    insert into orchestrator.expiries (at, task_id) select p_expires_at, i from unnest(p_ids) i;
  end if;
end $$;

-- Cancels a waiting task that the caller has locked.
create or replace function orchestrator._cancel_waiting(p_id uuid, p_event text, p_detail text) returns void
language plpgsql as $$
declare
  t record;
begin
  select x.type, x.priority, x.queued_at, x.concurrency_key into t from orchestrator.tasks x where x.id = p_id;
  update orchestrator.tasks x
  set status = 'cancelled', completed_at = clock_timestamp(), updated_at = clock_timestamp(), queued_at = null, next_retry_at = null,
      parked_at = null, parked_by = null, blocked_until = null, expires_at = null
  where x.id = p_id;
  perform orchestrator._add_event(p_id, p_event, null, null, p_detail);
  delete from orchestrator.task_waits w where w.child = p_id;
  if t.queued_at is not null and t.concurrency_key is not null then
    perform orchestrator._give_way(t.type, t.concurrency_key);
  end if;
  if t.queued_at is not null and random() < 0.002 then   -- as a claim does
    perform orchestrator._note_lane(t.type, t.priority);
  end if;
end $$;

-- Decides on a child of which these parents (null: any) have ended: ready, cancelled (then true), or still blocked. It is locked first,
-- so that of two parents that end at the same time the later one sees the other.
create or replace function orchestrator._settle_child(p_child uuid, p_parents uuid[], p_skip_locked boolean) returns boolean
language plpgsql as $$
declare
  c record;
  v_why text;   -- it is cancelled
begin
  if p_skip_locked then
    select t.type, t.blocked_until, t.next_retry_at - t.updated_at as rest into c
    from orchestrator.tasks t where t.id = p_child and t.blocked_until is not null for no key update skip locked;
  else
    select t.type, t.blocked_until, null::interval as rest into c
    from orchestrator.tasks t where t.id = p_child and t.blocked_until is not null for no key update;
  end if;
  if not found then return false; end if;
  with waits as materialized (
    select p.id, coalesce(t.status::text, 'deleted') as status, w.on_failure, w.tid
    from unnest(coalesce(p_parents, array(select w.parent from orchestrator.task_waits w where w.child = p_child))) p(id)
    -- offset 0: else it might go through all that the child waits for
    cross join lateral (select w.on_failure, w.ctid as tid from orchestrator.task_waits w where w.parent = p.id and w.child = p_child offset 0) w
    left join orchestrator.tasks t on t.id = p.id),
  done as (
    delete from orchestrator.task_waits w where w.ctid = any (array(
      select d.tid from waits d where d.status = 'completed' or (d.on_failure = 'run' and d.status in ('cancelled', 'dead_letter', 'deleted')))))
  select min(format('task %s %s', w.id, case w.status when 'dead_letter' then 'is a dead letter' else 'was ' || w.status end)) into v_why from waits w
  where (w.on_failure <> 'run' and w.status in ('cancelled', 'deleted')) or (w.on_failure = 'cancel' and w.status = 'dead_letter');
  if v_why is not null then
    perform orchestrator._cancel_waiting(p_child, 'cancelled', v_why);
    return true;
  elsif not exists (select from orchestrator.task_waits w where w.child = p_child) then
    update orchestrator.tasks t
    set blocked_until = null, queued_at = case when c.blocked_until <= clock_timestamp() then clock_timestamp() end,
        next_retry_at = case when c.blocked_until > clock_timestamp() then c.blocked_until end, updated_at = clock_timestamp()
    where t.id = p_child;
    perform orchestrator._notify_idle(c.type);
  elsif p_skip_locked then   -- whole seconds, so that many are looked at together
    update orchestrator.tasks t
    set next_retry_at = date_trunc('second', clock_timestamp() + least(greatest(3 * c.rest, interval '2 seconds'), interval '10 minutes')),
        updated_at = clock_timestamp()
    where t.id = p_child;
  end if;
  return false;
end $$;

-- Called last by whoever ends or deletes tasks.
create or replace function orchestrator._parents_ended(p_parents uuid[], p_skip_locked boolean default false) returns void
language plpgsql as $$
declare
  c record;
begin
  if not exists (select from orchestrator.task_waits) then return; end if;
  for c in
    -- offset 0: else it might walk all waits in the order of the children
    select w.child, array_agg(w.parent) as parents
    from unnest(p_parents) p cross join lateral (select * from orchestrator.task_waits x where x.parent = p offset 0) w group by w.child order by w.child
  loop
    if orchestrator._settle_child(c.child, c.parents, p_skip_locked) then   -- then the rest, with all that wait for them, directly or not
      perform orchestrator._settle_child(o.id, null, p_skip_locked) from (
        with recursive d as (
          select w.child as id
          from unnest(p_parents || c.child) p cross join lateral (select * from orchestrator.task_waits x where x.parent = p offset 0) w
          where w.child > c.child   -- not what is below those before it, which may wait on
          union select w.child from d cross join lateral (select * from orchestrator.task_waits x where x.parent = d.id offset 0) w)
        select d.id from d order by d.id offset 0) o;
      return;
    end if;
  end loop;
end $$;

create or replace function orchestrator.parent_results(p_id uuid) returns table (id uuid, result jsonb)
language sql stable as $$
  select p.id, p.result from orchestrator.tasks t cross join unnest(t.after) a join orchestrator.tasks p on p.id = a where t.id = p_id
$$;
comment on function orchestrator.parent_results is
  'The tasks that a task was enqueued to wait for, each with its result; without those that retention has deleted.';

create or replace function orchestrator._claims_ended(p_claim_ids bigint[]) returns void
language plpgsql as $$
begin
  perform orchestrator._parents_ended(array(
    select t.id from orchestrator.tasks t
    where t.claim_id = any (p_claim_ids) and t.status in ('cancelled', 'dead_letter') and exists (select from orchestrator.task_waits)));
end $$;

-- Cancels waiting tasks whose time is up, p_limit at most. Returns how many by type.
create or replace function orchestrator._expire(p_now timestamptz, p_limit int) returns jsonb
language plpgsql as $$
declare
  v_noted uuid[];
  v_ids uuid[];
begin
  with gone as (
    delete from orchestrator.expiries e
    where e.ctid = any (array(select x.ctid from orchestrator.expiries x where x.at <= p_now order by x.at limit p_limit for update skip locked))
    returning e.task_id)
  select array_agg(g.task_id) into v_noted from gone g;
  if v_noted is null then return '{}'::jsonb; end if;
  v_ids := array(select t.id from orchestrator.tasks t where t.id = any (v_noted) and t.expires_at <= p_now for no key update skip locked);
  perform orchestrator._cancel_waiting(i, 'expired', null) from unnest(v_ids) i;
  insert into orchestrator.expiries (at, task_id)   -- another transaction has these locked
  select greatest(t.expires_at, clock_timestamp() + interval '1 second'), t.id
  from orchestrator.tasks t where t.id = any (v_noted) and t.expires_at is not null;
  perform orchestrator._parents_ended(v_ids, true);
  return (select coalesce(jsonb_object_agg(t.type, t.n), '{}')
          from (select t.type, count(*) as n from orchestrator.tasks t where t.id = any (v_ids) group by t.type) t);
end $$;
