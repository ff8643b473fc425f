-- Lane floors: a lower bound on queued_at for each lane, so that claims skip the dead index entries that an old snapshot
-- keeps. Writes lanes, lane_floors and maintenance. Lock order: the leader's row → maintenance → the floors' advisory lock,
-- which is last everywhere: shared by those who put tasks back (_put_back), only tried by the leader.
--
-- Who may still commit a queued_at older than now? Those who hold a write lock on tasks: pg_locks shows them, prepared
-- transactions too. So take the time first and the list after; when none of the list is left, nothing older can appear.
-- It needs queued_at = clock_timestamp() taken inside the INSERT or UPDATE, and READ COMMITTED in all who take part.
-- A lane's floor is the lowest of its newest generation: a raise writes generation + 1, a lowering writes into the current
-- one, so lowerings commute with each other and none is lost to a raise. A lane without a floor is looked at from its very
-- beginning, so dropping one hides nothing; under the lock, so that no lowering still to commit outlives its generation.

create or replace function orchestrator._tasks_writers() returns text[]
language sql stable set search_path = '' as $$
  select coalesce(array_agg(l.virtualtransaction), '{}') from pg_locks l
  where l.locktype = 'relation' and l.relation = 'orchestrator.tasks'::regclass and l.granted
    and l.database = (select d.oid from pg_database d where d.datname = current_database())
    and l.mode = 'RowExclusiveLock' and l.pid is distinct from pg_backend_pid()
$$;

-- Called last by whoever puts tasks back at an old queued_at, in the same transaction.
create or replace function orchestrator._put_back(p_types text[], p_priorities int[], p_heads timestamptz[]) returns void
language plpgsql set search_path = '' as $$
declare
  r record;
begin
  if p_types is null then return; end if;
  if current_setting('transaction_isolation') <> 'read committed' then
    raise exception 'putting tasks back needs READ COMMITTED' using errcode = 'OR005', hint = 'begin isolation level read committed';
  end if;
  perform pg_advisory_xact_lock_shared(hashtext('orchestrator.floors'));
  for r in select u.type, u.priority, min(u.head) as head from unnest(p_types, p_priorities, p_heads) u(type, priority, head) group by 1, 2 loop
    perform orchestrator._announce(r.type, r.priority);
    insert into orchestrator.lane_floors (type, priority, generation, floor)
    select f.type, f.priority, f.generation, r.head
    from (select * from orchestrator.lane_floors f where f.type = r.type and f.priority = r.priority
          order by f.generation desc, f.floor limit 1) f
    where r.head < f.floor;
  end loop;
end $$;

-- How far floors may rise: everything that will ever be queued below it is already visible.
create or replace function orchestrator._advance_safe_floor() returns timestamptz
language plpgsql set search_path = '' as $$
declare
  m orchestrator.maintenance;
begin
  select * into m from orchestrator.maintenance for no key update;
  if m.candidate is not null then
    -- a prepared transaction keeps its number, but after a restart has another, -1/…, so that holds any candidate back
    if not exists (select from unnest(orchestrator._tasks_writers()) v where v = any (m.candidate_vxids) or v like '-1/%') then
      m.safe_floor := m.candidate;
      m.candidate := null;
    end if;
  end if;
  if m.candidate is null then
    m.candidate := clock_timestamp();
    m.candidate_vxids := orchestrator._tasks_writers();
    if m.candidate_vxids = '{}' then
      m.safe_floor := m.candidate;
      m.candidate := null;
    end if;
  end if;
  update orchestrator.maintenance set safe_floor = m.safe_floor, candidate = m.candidate, candidate_vxids = m.candidate_vxids;
  return m.safe_floor;
end $$;

-- The oldest ready task of a lane, looked for from its floor; null: nothing is ready.
create or replace function orchestrator._lane_head(p_type text, p_priority int) returns timestamptz
language plpgsql stable
set search_path = '' set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off as $$
begin
  return (select t.queued_at from orchestrator.tasks t
          where t.type = p_type and t.priority = p_priority
            and t.queued_at >= coalesce((select f.floor from orchestrator.lane_floors f
                                         where f.type = p_type and f.priority = p_priority
                                         order by f.generation desc, f.floor limit 1), '-infinity')
          order by t.queued_at limit 1);
end $$;

-- Raises one lane if that is worth a row: only where dead entries made the look slow.
create or replace function orchestrator._raise_floor(p_type text, p_priority int, p_safe timestamptz, p_worth interval) returns boolean
language plpgsql set search_path = '' as $$
declare
  v_generation bigint;
  v_floor timestamptz;
  v_head timestamptz;
  v_looked_at timestamptz;
begin
  for look in 1..2 loop   -- the first one after a rest is slow by itself
    v_looked_at := clock_timestamp();
    v_head := orchestrator._lane_head(p_type, p_priority);
    if clock_timestamp() - v_looked_at < p_worth then return false; end if;
  end loop;
  select f.generation, f.floor into v_generation, v_floor from orchestrator.lane_floors f
  where f.type = p_type and f.priority = p_priority order by f.generation desc, f.floor limit 1;
  if least(p_safe, v_head) <= coalesce(v_floor, '-infinity') then return false; end if;
  delete from orchestrator.lane_floors f where f.type = p_type and f.priority = p_priority and f.generation = v_generation;
  insert into orchestrator.lane_floors values (p_type, p_priority, coalesce(v_generation, 0) + 1, least(p_safe, v_head));
  return true;
end $$;

create or replace function orchestrator.raise_floors(p_worker_id text, p_term bigint, p_worth interval default '30 microseconds') returns int
language plpgsql set search_path = '' as $$
declare
  v_raised int := 0;
  v_safe timestamptz;
  l record;
begin
  if not orchestrator._leads(p_worker_id, p_term) or current_setting('transaction_isolation') <> 'read committed' then
    return null;
  end if;
  v_safe := orchestrator._advance_safe_floor();
  if not pg_try_advisory_xact_lock(hashtext('orchestrator.floors')) then return 0; end if;
  for l in select distinct type, priority from orchestrator.lanes where dropped_at is null loop
    v_raised := v_raised + orchestrator._raise_floor(l.type, l.priority, v_safe, p_worth)::int;
  end loop;
  return v_raised;
end $$;
comment on function orchestrator.raise_floors(text, bigint, interval) is
  'The leader''s: raises the floors of lanes where looking for the oldest ready task takes p_worth or longer, twice '
  'in a row. Returns how many; null under a stale term. Call it in a transaction of its own: it keeps the floors'' lock to the end.';

-- Whether claims would walk dead entries if the lane had no floor.
create or replace function orchestrator._floor_helps(p_type text, p_priority int, p_quick interval) returns boolean
language plpgsql
set search_path = '' set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off as $$
declare
  v_looked_at timestamptz;
begin
  for look in 1..2 loop   -- the first one marks the entries that no snapshot needs any longer, and so makes the second quick
    v_looked_at := clock_timestamp();
    perform from orchestrator.tasks t
    where t.type = p_type and t.priority = p_priority and t.queued_at is not null order by t.queued_at limit 1;
    if clock_timestamp() - v_looked_at < p_quick then return false; end if;
  end loop;
  return true;
end $$;

create or replace function orchestrator.drop_floors(
  p_worker_id text, p_term bigint, p_quick interval default '30 microseconds', p_budget interval default '100 milliseconds') returns int
language plpgsql set search_path = '' as $$
declare
  v_until timestamptz := clock_timestamp() + p_budget;
  v_types text[];
  v_priorities int[];
begin
  if not orchestrator._leads(p_worker_id, p_term) then return null; end if;
  select array_agg(l.type), array_agg(l.priority) into v_types, v_priorities   -- before the lock, as it may take long
  from (select type, priority from orchestrator.lane_floors group by type, priority
        having max(floor) < clock_timestamp() - interval '1 minute'   -- one that still rises helps
        order by random()) l                                          -- else the same slow ones would use up the budget each time
  where clock_timestamp() < v_until and not orchestrator._floor_helps(l.type, l.priority, p_quick);
  if v_types is null or not pg_try_advisory_xact_lock(hashtext('orchestrator.floors')) then return 0; end if;
  delete from orchestrator.lane_floors f using unnest(v_types, v_priorities) l(type, priority)
  where f.type = l.type and f.priority = l.priority;
  return cardinality(v_types);
end $$;
comment on function orchestrator.drop_floors(text, bigint, interval, interval) is
  'The leader''s: drops floors that have not risen for a minute and no longer help, as looking for the oldest ready task from '
  'the very beginning takes less than p_quick. Takes about p_budget. Returns how many; null under a stale term.';

-- Lanes whose tasks are all gone cost each claim a look. Dropping marks a lane first; enqueue then opens a new one. Those who
-- saw the old one may still commit into it, until safe_floor has passed dropped_at: then a lane that holds tasks is opened
-- again, and the mark goes.
create or replace function orchestrator.drop_idle_lanes(p_worker_id text, p_term bigint, p_idle interval default '5 minutes') returns int
language plpgsql set search_path = '' as $$
declare
  v_dropped int;
  r record;
begin
  if not orchestrator._leads(p_worker_id, p_term) then return null; end if;
  for r in delete from orchestrator.lanes where dropped_at < (select m.safe_floor from orchestrator.maintenance m) returning type, priority loop
    if orchestrator._lane_head(r.type, r.priority) is not null then
      perform orchestrator._announce(r.type, r.priority);
    end if;
  end loop;
  with idle as (
    select l.type, l.priority from orchestrator.lanes l where l.dropped_at is null
    group by 1, 2 having max(l.opened_at) < clock_timestamp() - p_idle and orchestrator._lane_head(l.type, l.priority) is null)
  update orchestrator.lanes l set dropped_at = clock_timestamp()
  from idle where l.type = idle.type and l.priority = idle.priority and l.dropped_at is null;
  get diagnostics v_dropped = row_count;
  return v_dropped;
end $$;
comment on function orchestrator.drop_idle_lanes(text, bigint, interval) is
  'The leader''s: drops lanes opened p_idle ago or longer that hold no ready task, and opens again those that got one meanwhile. '
  'Returns how many were dropped; null under a stale term.';

-- The net under it all: walks the ready index from lane to lane, each from its very beginning, and mends a lane that is
-- missing and a floor that hides a task. Bounded by time; goes on next time where it stopped.
create or replace function orchestrator.rescan_lanes(p_worker_id text, p_term bigint, p_budget interval default '20 milliseconds') returns int
language plpgsql
set search_path = '' set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off as $$
declare
  v_mended int := 0;
  v_until timestamptz := clock_timestamp() + p_budget;
  v_type text;
  l record;
begin
  if not orchestrator._leads(p_worker_id, p_term) then return null; end if;
  select coalesce(m.rescan_type, '') into v_type from orchestrator.maintenance m;
  loop
    select t.type, t.priority, t.queued_at into l from orchestrator.tasks t
    where t.queued_at is not null and t.type > v_type order by t.type, t.priority desc, t.queued_at limit 1;
    if not found then v_type := null; exit; end if;
    while found loop
      v_type := l.type;
      v_mended := v_mended + orchestrator._mend_lane(l.type, l.priority, l.queued_at)::int;
      select t.type, t.priority, t.queued_at into l from orchestrator.tasks t
      where t.queued_at is not null and t.type = v_type and t.priority < l.priority order by t.type, t.priority desc, t.queued_at limit 1;
    end loop;
    exit when clock_timestamp() > v_until;
  end loop;
  update orchestrator.maintenance set rescan_type = v_type where rescan_type is distinct from v_type;
  return v_mended;
end $$;
comment on function orchestrator.rescan_lanes(text, bigint, interval) is
  'The leader''s: looks for ready tasks that no claim can see (a missing lane, a floor set too high after a clock step), and '
  'mends them, for about p_budget. Returns how many lanes were mended, normally 0; null under a stale term.';

create or replace function orchestrator._mend_lane(p_type text, p_priority int, p_head timestamptz) returns boolean
language plpgsql set search_path = '' as $$
begin
  if not exists (select from orchestrator.lanes l where l.type = p_type and l.priority = p_priority and l.dropped_at is null)
     or p_head < (select f.floor from orchestrator.lane_floors f where f.type = p_type and f.priority = p_priority
                  order by f.generation desc, f.floor limit 1) then
    perform orchestrator._put_back(array[p_type], array[p_priority], array[p_head]);
    return true;
  end if;
  return false;
end $$;
