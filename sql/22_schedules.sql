-- Schedules: recurring tasks. promote_due, which every worker calls, fires those that are due: no leader is needed. Writes schedules;
-- firing also writes tasks. Locks: a schedule's row, skipped where another transaction holds it → whatever enqueue locks.
-- A time fires once, since next_at moves on in the transaction that enqueues its task, and since the task's idempotency key names
-- the time: schedule:NAME:2026-11-26T12:00:00Z.

-- Refuses a definition that could never fire; returns its first fire time.
create or replace function orchestrator._check_schedule(s orchestrator.schedules) returns timestamptz
language plpgsql stable as $$
declare
  v_next timestamptz;
begin
  if (octet_length(s.name) between 1 and 200 and s.name !~ '[[:cntrl:]]') is not true then
    perform orchestrator._invalid('name', 'must be 1 to 200 bytes, without control characters', 'Use a name such as nightly-backup.');
  elsif (s.missed in ('one', 'all', 'none')) is not true then
    perform orchestrator._invalid('missed', 'must be one, all or none', 'What to make up for after a time without a running worker.');
  elsif not exists (select from pg_timezone_names z where z.name = s.timezone) then   -- at time zone would take "Berlin1", too
    perform orchestrator._invalid('timezone', format('there is no %L', s.timezone), 'Such as UTC or Europe/Berlin: see pg_timezone_names.');
  elsif orchestrator._payload_problem(s.payload) is not null then
    perform orchestrator._invalid('payload', orchestrator._payload_problem(s.payload), 'Store the data elsewhere, and a reference to it here.');
  end if;
  perform orchestrator._check_task(s.type, s.priority, null, s.max_retries, null);
  v_next := orchestrator.fire_times(s.cron, s.timezone, clock_timestamp(), 1);
  if v_next is null then
    perform orchestrator._invalid('cron', format('%L never comes', s.cron), 'As 0 0 30 2 *: February has no 30th.');
  end if;
  return v_next;
end $$;

create or replace function orchestrator.schedule(
  p_name text, p_cron text, p_type text, p_payload jsonb default '{}', p_timezone text default 'UTC', p_priority int default 0,
  p_max_retries int default null, p_missed text default 'one', p_overlap boolean default true)
returns timestamptz language plpgsql as $$
declare
  o orchestrator.schedules;
  n orchestrator.schedules;
begin
  select * into o from orchestrator.schedules s where s.name = p_name;
  n := o;
  n.name := p_name; n.cron := p_cron; n.timezone := p_timezone; n.type := p_type; n.payload := coalesce(p_payload, '{}');
  n.priority := p_priority; n.max_retries := p_max_retries; n.missed := p_missed; n.overlap := coalesce(p_overlap, true);
  -- compared without a lock, so that a deployment in a long transaction keeps no schedule from firing
  if n is distinct from o then
    n.next_at := orchestrator._check_schedule(n);
    n.paused := false;
    n.last_error := null;
    n.active_since := clock_timestamp();
    n.updated_at := clock_timestamp();
    insert into orchestrator.schedules as s values (n.*)
    on conflict (name) do update
    set (cron, timezone, type, payload, priority, max_retries, missed, overlap, updated_at)
          = row (n.cron, n.timezone, n.type, n.payload, n.priority, n.max_retries, n.missed, n.overlap, n.updated_at),
        paused = s.paused and s.last_error is null, last_error = null,   -- one that failed gets another chance
        -- the same fire times: what was missed meanwhile is still due
        (next_at, active_since) = (
          select case when same then s.next_at else n.next_at end, case when same then s.active_since else n.active_since end
          from (select (s.cron, s.timezone) = (n.cron, n.timezone) and s.last_error is null as same) x);
    perform orchestrator._log('schedule', 'schedule', p_name, jsonb_build_object('cron', p_cron, 'timezone', p_timezone, 'type', p_type));
  end if;
  return (select s.next_at from orchestrator.schedules s where s.name = p_name and not s.paused);
end $$;
comment on function orchestrator.schedule is
  'Creates or changes a schedule: at each of fire_times(p_cron, p_timezone), a task of that type is enqueued. Returns the next one '
  '(null: it is paused). The same definition again changes nothing; another cron or time zone counts from now on. p_missed: which of '
  'the times without a worker are made up for: the last (one), all, or none that is a minute late. p_overlap false: none fires while '
  'the last task is unfinished. Raises OR001.';

create or replace function orchestrator.unschedule(p_name text) returns boolean
language plpgsql as $$
begin
  delete from orchestrator.schedules s where s.name = p_name;
  if found then perform orchestrator._log('unschedule', 'schedule', p_name); return true; end if;
  return false;
end $$;
comment on function orchestrator.unschedule is 'Removes a schedule; its tasks stay. Returns whether there was one.';

create or replace function orchestrator.pause_schedule(p_name text) returns boolean
language plpgsql as $$
begin
  update orchestrator.schedules s set paused = true where s.name = p_name and not s.paused;
  if found then perform orchestrator._log('pause_schedule', 'schedule', p_name); return true; end if;
  return (select false from orchestrator.schedules s where s.name = p_name);
end $$;
comment on function orchestrator.pause_schedule is
  'Keeps a schedule from firing. Returns whether that is new; null: there is none.';

create or replace function orchestrator.resume_schedule(p_name text) returns boolean
language plpgsql as $$
begin
  update orchestrator.schedules s
  set paused = false, last_error = null, active_since = clock_timestamp(),
      next_at = (select f.at from orchestrator.fire_times(s.cron, s.timezone, clock_timestamp(), 1) f(at))
  where s.name = p_name and s.paused;
  if found then perform orchestrator._log('resume_schedule', 'schedule', p_name); return true; end if;
  return (select false from orchestrator.schedules s where s.name = p_name);
end $$;
comment on function orchestrator.resume_schedule is
  'Has a paused schedule, also one that failed, go on with the next time from now. Returns whether it was paused; null: there is none.';

create or replace function orchestrator.fire_schedule(p_name text) returns uuid
language plpgsql as $$
declare
  s orchestrator.schedules;
  v_id uuid;
begin
  select * into s from orchestrator.schedules x where x.name = p_name for no key update;
  if not found then return null; end if;
  v_id := orchestrator.enqueue(p_type => s.type, p_payload => s.payload, p_priority => s.priority, p_max_retries => s.max_retries,
                                p_meta => orchestrator._fire_meta(s.name, clock_timestamp()));
  update orchestrator.schedules x set last_fire_at = clock_timestamp(), last_task_id = v_id where x.name = p_name;
  perform orchestrator._log('fire_schedule', 'schedule', p_name, jsonb_build_object('task_id', v_id));
  return v_id;
end $$;
comment on function orchestrator.fire_schedule is
  'Enqueues a schedule''s task now, even if it is paused; its fire times stay. Returns the task''s id; null: there is none.';

create or replace function orchestrator._fire_key(p_name text, p_at timestamptz) returns text
language sql stable parallel safe return 'schedule:' || p_name || ':' || to_char(p_at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"');

-- {"schedule": NAME, "fire_at": "2026-11-26T12:00:00Z"}
create or replace function orchestrator._fire_meta(p_name text, p_at timestamptz) returns jsonb
language sql stable return jsonb_build_object('schedule', p_name, 'fire_at', right(orchestrator._fire_key(p_name, p_at), 20));

-- Deals with what is due of a locked schedule. Returns how many tasks it enqueued.
create or replace function orchestrator._fire(s orchestrator.schedules, p_now timestamptz) returns int
language plpgsql as $$
declare
  v_at timestamptz;
  v_fired int := 0;
begin
  foreach v_at in array case
    when s.missed = 'all' then   -- the next call has the rest
      s.next_at || array(select f.at from orchestrator.fire_times(s.cron, s.timezone, s.next_at, 99, p_now) f(at))
    else array[coalesce(orchestrator._last_fire_time(s.cron, s.timezone, s.next_at, p_now), s.next_at)] end
  loop
    continue when s.missed = 'none' and v_at <= p_now - interval '1 minute';
    continue when not s.overlap and exists (
      select from orchestrator.tasks t where t.id = s.last_task_id and t.status in ('pending', 'claimed', 'running', 'retry_scheduled'));
    s.last_task_id := orchestrator.enqueue(p_type => s.type, p_payload => s.payload, p_priority => s.priority,
                                           p_idempotency_key => orchestrator._fire_key(s.name, v_at), p_max_retries => s.max_retries,
                                           p_meta => orchestrator._fire_meta(s.name, v_at));
    s.last_fire_at := v_at;
    v_fired := v_fired + 1;
  end loop;
  update orchestrator.schedules x
  set last_fire_at = s.last_fire_at, last_task_id = s.last_task_id,
      next_at = (select f.at from orchestrator.fire_times(s.cron, s.timezone, v_at, 1) f(at))
  where x.name = s.name;
  return v_fired;
end $$;

-- Fires up to 100 schedules that are due. next_fire_at: when to call again. One that another transaction holds doesn't count: that
-- fires it, or a later call does.
create or replace function orchestrator._fire_schedules(p_now timestamptz, out fired int, out next_fire_at timestamptz)
language plpgsql as $$
declare
  s orchestrator.schedules;
  v_seen boolean := false;
begin
  fired := 0;
  next_fire_at := (select x.next_at from orchestrator.schedules x where not x.paused order by x.next_at limit 1);
  if (next_fire_at <= p_now) is not true then return; end if;   -- all that it costs while nothing is due
  for s in
    select * from orchestrator.schedules x where x.next_at <= p_now and not x.paused
    order by x.next_at limit 100 for no key update skip locked
  loop
    v_seen := true;
    begin
      fired := fired + orchestrator._fire(s, p_now);
    exception
      when transaction_rollback or insufficient_resources or object_not_in_prerequisite_state or operator_intervention or system_error then
        raise;   -- not its own fault: the whole call is repeated
      when others then
        update orchestrator.schedules x set paused = true, last_error = orchestrator._kept(sqlerrm) where x.name = s.name;
    end;
  end loop;
  select x.next_at into next_fire_at from orchestrator.schedules x
  where not x.paused and x.next_at > case when v_seen then '-infinity' else p_now end order by x.next_at limit 1;
end $$;

create or replace function orchestrator.schedule_history(p_name text, p_since timestamptz default now() - interval '1 day')
returns table (fire_at timestamptz, task_id uuid, status text) language sql stable as $$
  with fires as (   -- of earlier definitions, too
    select right(t.idempotency_key, 20)::timestamptz as at, t.id, t.status
    from orchestrator.schedules s join orchestrator.tasks t on t.type = s.type
    where s.name = p_name and left(t.idempotency_key, -20) = 'schedule:' || s.name || ':'
      and t.idempotency_key between orchestrator._fire_key(p_name, p_since) and orchestrator._fire_key(p_name, now())),
  expected as (
    select f.at from orchestrator.schedules s
    cross join lateral orchestrator.fire_times(s.cron, s.timezone, greatest(p_since, s.active_since), 10000,
                                               least(s.next_at - interval '1 second', now())) f(at)   -- next_at is still to come
    where s.name = p_name)
  select at, f.id, coalesce(f.status::text, 'no task') from expected e full join fires f using (at) order by 1
$$;
comment on function orchestrator.schedule_history is
  'The fire times of a schedule since p_since, each with its task; no task: it was left out (p_missed, p_overlap), or retention '
  'deleted it. Goes back as far as tasks are kept, for missing ones to active_since.';

create or replace view orchestrator.schedule_states as
  select s.name, s.cron, s.timezone, s.type, s.priority, s.max_retries, s.missed, s.overlap, s.paused,
         case when not s.paused then s.next_at end as next_at, s.last_fire_at, s.last_task_id, s.last_error, s.updated_at,
         case
           when s.last_error is not null then
             format('paused, since it could not fire: %s; mend it, then select orchestrator.resume_schedule(%L)', s.last_error, s.name)
           when s.paused then format('paused: select orchestrator.resume_schedule(%L)', s.name)
           when not exists (select from orchestrator.workers w where w.declared_dead_at is null and s.type like any (w.handles)) then
             format('no live worker handles %s: start one with a handler for it', s.type)
           when s.next_at < clock_timestamp() - interval '1 minute' then
             format('late since %s: no worker polls, or a transaction holds its row', s.next_at)
           else coalesce(
             (select format('active, but %1$s is paused: select orchestrator.resume_type(%1$L)', p.type)
              from orchestrator.task_types p where p.paused and s.type like p.likes limit 1), 'active') end as state
  from orchestrator.schedules s order by s.name;
comment on view orchestrator.schedule_states is
  'Schedules without their payloads. next_at: null while paused. state: active, or why it does not fire or nobody runs its tasks, and '
  'what to do about it.';
