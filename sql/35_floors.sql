-- Lane floors: a lower bound on queued_at for each lane, so that claims skip the dead index entries that an old snapshot keeps.
-- Writes lane_floors, lanes and leader_state. Lock order: the leader's row → leader_state → lane_floors, as a table. The leader only
-- tries that lock. Those who put tasks back share it to the end of their transaction, and may take the next claim's lock after it
-- (release_forgotten, recover_orphans): sharing never waits for sharing.

-- Only who holds a write lock on tasks may still commit a queued_at older than now: pg_locks shows them, prepared transactions too. So
-- take the time first and the list after; when none of the list is left, nothing older can appear. It needs queued_at =
-- clock_timestamp() inside the INSERT or UPDATE, and READ COMMITTED in all who take part.
-- A raise writes generation + 1, a lowering writes into the current one, so lowerings commute and none is lost to a raise. A lane
-- without a floor is looked at from its beginning, so dropping one hides nothing; under the lock, so that no lowering still to commit
-- outlives its generation.

create or replace function orchestrator._tasks_writers() returns text[]
language sql stable as $$
  select coalesce(array_agg(l.virtualtransaction), '{}') from pg_locks l
  where l.locktype = 'relation' and l.relation = 'orchestrator.tasks'::regclass and l.granted
    and l.database = (select d.oid from pg_database d where d.datname = current_database())
    and l.mode = 'RowExclusiveLock' and l.pid is distinct from pg_backend_pid()
$$;

-- Called last by whoever puts tasks back at an old queued_at, in the same transaction.
create or replace function orchestrator._put_back(p_types text[], p_priorities int[], p_heads timestamptz[], p_notify boolean default true)
returns void
language plpgsql as $$
declare
  r record;
begin
  if p_types is null then return; end if;
  if current_setting('transaction_isolation') <> 'read committed' then
    raise exception 'putting tasks back needs READ COMMITTED' using errcode = 'OR005', hint = 'begin isolation level read committed';
  end if;
  lock table orchestrator.lane_floors in row exclusive mode;
  for r in select u.type, u.priority, min(u.head) as head from unnest(p_types, p_priorities, p_heads) u(type, priority, head) group by 1, 2 loop
    if p_notify then perform orchestrator._notify_idle(r.type); end if;
    insert into orchestrator.lane_floors (type, priority, generation, floor)
    select f.type, f.priority, f.generation, r.head
    from (select * from orchestrator.lane_floors f where f.type = r.type and f.priority = r.priority
          order by f.generation desc, f.floor limit 1) f
    where r.head < f.floor;
  end loop;
end $$;

-- How far floors may rise: everything that will ever be queued below it is already visible.
create or replace function orchestrator._advance_safe_floor() returns timestamptz
language plpgsql as $$
declare
  s orchestrator.leader_state;
begin
  select * into s from orchestrator.leader_state for no key update;
  for look in 1..2 loop   -- for the last candidate, then for a new one
    if s.candidate is null then
      s.candidate := clock_timestamp();
      s.candidate_vxids := orchestrator._tasks_writers();
    end if;
    -- a prepared transaction has another number after a restart, -1/…: that holds any candidate back
    exit when exists (select from unnest(orchestrator._tasks_writers()) v where v = any (s.candidate_vxids) or v like '-1/%');
    s.safe_floor := s.candidate;
    s.candidate := null;
  end loop;
  update orchestrator.leader_state set safe_floor = s.safe_floor, candidate = s.candidate, candidate_vxids = s.candidate_vxids;
  return s.safe_floor;
end $$;

-- The oldest ready task of a lane from a floor on. '-infinity' walks all dead entries.
create or replace function orchestrator._lane_head(p_type text, p_priority int, p_floor timestamptz) returns timestamptz
language plpgsql stable as $$
begin
  return (select t.queued_at from orchestrator.tasks t
          where t.type = p_type and t.priority = p_priority and t.queued_at >= p_floor order by t.queued_at limit 1);
end $$;

-- Whether looking for the oldest ready task takes p_slow or longer, twice in a row: the first look after a rest is slow by itself, and
-- marks the entries that no snapshot needs any longer.
create or replace function orchestrator._is_slow(
  p_type text, p_priority int, p_floor timestamptz, p_slow interval, out slow boolean, out head timestamptz)
language plpgsql as $$
declare
  v_looked_at timestamptz;
begin
  for look in 1..2 loop
    v_looked_at := clock_timestamp();
    head := orchestrator._lane_head(p_type, p_priority, p_floor);
    slow := clock_timestamp() - v_looked_at >= p_slow;
    exit when not slow;
  end loop;
end $$;

-- Floors that have not risen for a minute and no longer help. Asking walks what the old snapshot keeps, so it takes at most about
-- 100 ms, and a 200th of the time.
create or replace function orchestrator._idle_floors(p_slow interval, out types text[], out priorities int[])
language plpgsql as $$
declare
  v_start timestamptz := clock_timestamp();
begin
  if (select s.drop_floors_at between v_start and v_start + interval '1 minute' from orchestrator.leader_state s) then return; end if;
  select array_agg(l.type), array_agg(l.priority) into types, priorities
  from (select f.type, f.priority from orchestrator.lane_floors f group by f.type, f.priority
        having max(f.floor) < v_start - interval '1 minute' order by random()) l
  where clock_timestamp() < v_start + interval '100 milliseconds' and not (orchestrator._is_slow(l.type, l.priority, '-infinity', p_slow)).slow;
  update orchestrator.leader_state set drop_floors_at = clock_timestamp() + 200 * (clock_timestamp() - v_start);
end $$;

create or replace function orchestrator.raise_floors(p_worker_id text, p_term bigint, p_slow interval default '30 microseconds') returns int
language plpgsql as $$
declare
  v_changed int := 0;
  v_safe timestamptz;
  v_idle record;
  l record;
  f orchestrator.lane_floors;
  s record;
begin
  perform set_config('synchronous_commit', 'off', true);
  if not orchestrator._leads(p_worker_id, p_term) or current_setting('transaction_isolation') <> 'read committed' then
    return null;
  end if;
  v_safe := orchestrator._advance_safe_floor();
  v_idle := orchestrator._idle_floors(p_slow);
  begin   -- keeps others from putting tasks back
    lock table orchestrator.lane_floors in share row exclusive mode nowait;
  exception when lock_not_available then
    return 0;
  end;
  for l in select type, priority from orchestrator.lanes group by type, priority order by random() limit 5000 loop
    select * into f from orchestrator.lane_floors x where x.type = l.type and x.priority = l.priority order by x.generation desc, x.floor limit 1;
    f.floor := coalesce(f.floor, '-infinity');
    s := orchestrator._is_slow(l.type, l.priority, f.floor, p_slow);
    continue when not s.slow or least(v_safe, s.head) <= f.floor;
    delete from orchestrator.lane_floors x where x.type = l.type and x.priority = l.priority and x.generation = f.generation;
    insert into orchestrator.lane_floors values (l.type, l.priority, coalesce(f.generation, 0) + 1, least(v_safe, s.head));
    v_changed := v_changed + 1;
  end loop;
  delete from orchestrator.lane_floors x using unnest(v_idle.types, v_idle.priorities) i(type, priority)
  where x.type = i.type and x.priority = i.priority;
  delete from orchestrator.lanes n where n.noted_at < clock_timestamp() - interval '10 minutes'   -- noted again if it is in use
    and not exists (select from orchestrator.lane_floors x where x.type = n.type and x.priority = n.priority);
  return v_changed + coalesce(cardinality(v_idle.types), 0);
end $$;
comment on function orchestrator.raise_floors is
  'The leader''s: raises the floors of lanes where looking for the oldest ready task takes p_slow or longer, drops those that no longer '
  'help, and locks floors to the end of its transaction. Returns how many of both; null under a stale term.';

-- The net under it all: walks the ready index from lane to lane, each from its beginning. On its way it takes a type by chance, from
-- which claims of a pattern with very many types look on.
create or replace function orchestrator.rescan_lanes(p_worker_id text, p_term bigint, p_budget interval default '20 milliseconds') returns int
language plpgsql as $$
declare
  v_mended int := 0;
  v_until timestamptz := clock_timestamp() + p_budget;
  v_seen int := 0;
  v_type text;
  v_sampled text;
  l record;
begin
  perform set_config('synchronous_commit', 'off', true);
  if not orchestrator._leads(p_worker_id, p_term) then return null; end if;
  select coalesce(s.rescan_type, '') into v_type from orchestrator.leader_state s;
  loop
    v_type := (select t.type from orchestrator.tasks t where t.queued_at is not null and t.type > v_type
               order by t.type, t.priority desc, t.queued_at limit 1);
    exit when v_type is null;
    v_seen := v_seen + 1;
    if random() * v_seen < 1 then v_sampled := v_type; end if;
    for l in select * from orchestrator._walk_lanes(array[v_type]) loop
      if l.head < (select f.floor from orchestrator.lane_floors f where f.type = l.type and f.priority = l.priority
                   order by f.generation desc, f.floor limit 1) then
        perform orchestrator._put_back(array[l.type], array[l.priority], array[l.head]);
        v_mended := v_mended + 1;
      end if;
    end loop;
    exit when clock_timestamp() > v_until;
  end loop;
  update orchestrator.leader_state set rescan_type = v_type, sampled_type = v_sampled
  where (rescan_type, sampled_type) is distinct from (v_type, v_sampled);
  return v_mended;
end $$;
comment on function orchestrator.rescan_lanes is
  'The leader''s: lowers floors that hide ready tasks (after a step of the clock), for about p_budget, and goes on next time where '
  'it stopped. Returns how many, normally 0; null under a stale term.';
