-- Claiming. claim_tasks writes tasks, claims and sometimes lanes; start_tasks writes tasks; promote_due writes tasks, and what
-- 22_schedules.sql and 45_after.sql do. Limits: 32_limits.sql.
-- Locks: claims (start_tasks) → tasks. Claims skip tasks that others have locked, so none waits for another. A large one also takes a
-- place in line (an advisory lock), which it only tries.

-- The types with this prefix that may have ready tasks and are not paused, along the ready index: at most 1,000, and 1,000 more from
-- one that the leader takes by chance, so that none is always left out. A type with floors is returned in any case, and bounds each
-- look, since an old snapshot keeps dead entries there.
create or replace function orchestrator._ready_types(p_prefix text, p_paused text[]) returns setof text language plpgsql stable as $$
declare
  v_from text := p_prefix;   -- lower types are done with
  v_left int := 1000;
  v_again boolean := true;
  v_floored text;
  v_type text;
  v_prefix text;
begin
  loop
    v_floored := (select f.type from orchestrator.lane_floors f where f.type >= v_from
                  order by f.type, f.priority desc, f.generation desc, f.floor limit 1);
    v_type := coalesce((select t.type from orchestrator.tasks t   -- below 256 bytes, which no type has
                        where t.type >= v_from and t.type < coalesce(v_floored, repeat(chr(1114111), 64)) and t.queued_at is not null
                        order by t.type, t.priority desc, t.queued_at limit 1), v_floored);
    exit when v_type is null or not starts_with(v_type, p_prefix);
    v_from := v_type || E'\x01';   -- the least string above it
    if v_type like any (p_paused) then
      v_prefix := (select min(orchestrator._prefix(p.type)) from orchestrator.task_types p where p.paused and v_type like p.likes);
      exit when v_prefix = '';
      if ascii(right(v_prefix, 1)) < 127 then   -- the whole range of a paused pattern is stepped over
        v_from := left(v_prefix, -1) || chr(ascii(right(v_prefix, 1)) + 1);
      end if;
      continue;
    end if;
    return next v_type;
    v_left := v_left - 1;
    if v_left = 0 then
      v_from := (select s.sampled_type from orchestrator.leader_state s where v_again and s.sampled_type > v_type);
      exit when v_from is null;
      v_left := 1000;
      v_again := false;
    end if;
  end loop;
end $$;

create or replace function orchestrator._claimable(p_types text[]) returns text[]
language plpgsql stable as $$
declare
  v_paused text[] := array(select p.likes from orchestrator.task_types p where p.paused);
begin
  return array(
    select u.type from unnest(p_types) u(type) where orchestrator._prefix(u.type) is null and not u.type like any (v_paused)
    union
    select r from unnest(p_types) u(type) cross join lateral orchestrator._ready_types(orchestrator._prefix(u.type), v_paused) r
    where orchestrator._prefix(u.type) is not null);
end $$;

-- The next lane of a type that has ready tasks, or a floor, where it is looked up (then head may be null): only what lies between
-- two floors is walked.
create or replace function orchestrator._next_lane(p_type text, p_below bigint) returns table (priority int, head timestamptz)
language sql stable begin atomic
  select coalesce(t.priority, f.priority),
         coalesce(t.queued_at, (select h.queued_at from orchestrator.tasks h
                                where h.type = p_type and h.priority = f.priority and h.queued_at >= f.floor order by h.queued_at limit 1))
  from (select) one
  left join lateral (
    select l.priority, l.floor from orchestrator.lane_floors l where l.type = p_type and l.priority < p_below
    order by l.priority desc, l.generation desc, l.floor limit 1) f on true
  left join lateral (
    select t.priority, t.queued_at from orchestrator.tasks t
    where t.type = p_type and t.priority < p_below and t.priority > coalesce(f.priority, -2147483649) and t.queued_at is not null
    order by t.priority desc, t.queued_at limit 1) t on true
  where coalesce(t.priority, f.priority) is not null;
end;

-- From the beginning of each lane, whatever its floor. Inlined wherever it is called.
create or replace function orchestrator._walk_lanes(p_types text[]) returns table (type text, priority int, head timestamptz)
language sql stable begin atomic
  with recursive lane as (
    select u.type, h.priority, h.queued_at
    from unnest(p_types) u(type) cross join lateral (
      select t.priority, t.queued_at from orchestrator.tasks t
      where t.type = u.type and t.queued_at is not null order by t.priority desc, t.queued_at limit 1) h
    union all
    select l.type, h.priority, h.queued_at
    from lane l cross join lateral (
      select t.priority, t.queued_at from orchestrator.tasks t
      where t.type = l.type and t.priority < l.priority and t.queued_at is not null order by t.priority desc, t.queued_at limit 1) h)
  select l.type, l.priority, l.queued_at from lane l;
end;

-- The lanes of these types that have ready tasks, each with the queued_at of its oldest, along the ready index.
create or replace function orchestrator._ready_lanes(p_types text[])
returns table (type text, priority int, head timestamptz) language plpgsql stable as $$
begin
  if exists (select from orchestrator.lane_floors) then
    return query
      with recursive lane as (
        select u.type, n.priority, n.head from unnest(p_types) u(type) cross join lateral orchestrator._next_lane(u.type, 2147483648) n
        union all
        select l.type, n.priority, n.head from lane l cross join lateral orchestrator._next_lane(l.type, l.priority) n)
      select l.type, l.priority, l.head from lane l where l.head is not null;
  else
    return query select * from orchestrator._walk_lanes(p_types);
  end if;
end $$;

-- The lanes that a claim goes through: highest priority first, then by their oldest tasks, each with its limit.
-- One statement tells that nothing out of the ordinary is in force and walks the lanes: each further one costs a small claim 4%.
create or replace function orchestrator._lanes_to_claim(
  p_worker_id text, p_types text[], out types text[], out priorities int[], out heads timestamptz[], out limits text[])
language plpgsql as $$
declare
  v_plain boolean;
begin
  if array_to_string(p_types, ' ') !~ '[*:]( |$)' then   -- quick, and never wrong about a pattern
    select p.plain, l.* into v_plain, types, priorities, heads
    from (select exists (select from orchestrator.workers w where w.id = p_worker_id and w.declared_dead_at is null)
             and not exists (select from orchestrator.task_types p where p.paused)
             and not exists (select from orchestrator.type_limits) and not exists (select from orchestrator.lane_floors) as plain offset 0) p
    cross join lateral (
      select array_agg(w.type), array_agg(w.priority), array_agg(w.head)
      from (select * from orchestrator._walk_lanes(p_types) w where p.plain order by w.priority desc, w.head) w) l;
    if v_plain then return; end if;
  end if;
  if not exists (select from orchestrator.workers w where w.id = p_worker_id and w.declared_dead_at is null) then
    raise exception 'worker % is not registered, or was declared dead', p_worker_id
      using errcode = 'OR003', hint = 'Register again, under a new id.';
  elsif exists (select from orchestrator.type_limits) then
    select l.* into types, priorities, heads, limits from orchestrator._limited_lanes(p_types) l;
  else
    select array_agg(l.type), array_agg(l.priority), array_agg(l.head) into types, priorities, heads
    from (select * from orchestrator._ready_lanes(orchestrator._claimable(p_types)) l order by l.priority desc, l.head) l;
  end if;
end $$;

-- Ascending, and never given out twice, even if a crash forgets claims: microseconds since 2025 (until 2310) and 10 random bits.
create or replace function orchestrator._new_claim_id() returns bigint
language sql volatile parallel safe
return (extract(epoch from clock_timestamp() - timestamptz '2025-01-01 00:00:00+00') * 1000000)::bigint * 1024 + floor(random() * 1024)::bigint;

-- Only lanes that much is taken from need a floor some day: claims note a lane once in 500 tasks, by chance.
create or replace function orchestrator._note_lane(p_type text, p_priority int) returns void
language plpgsql as $$
begin
  if not exists (select from orchestrator.lanes l where l.type = p_type and l.priority = p_priority) then
    insert into orchestrator.lanes (type, priority) values (p_type, p_priority);
  end if;
end $$;

-- Highest priority first. Within one, every lane gives an equal share, in the order of their oldest tasks, and what one leaves the
-- others give in the next pass. A lane is one index range scan from its oldest ready task.
-- Stepping over a row that another claim has locked takes 1.2 µs. So each large claim takes a place in line, and starts as many
-- shares further on where a lane holds that much: four workers drain 8% more.
-- With the picked rows as a join's inner side, LIMIT … SKIP LOCKED would run again for each outer row, and claim too many. It can't:
-- with enable_seqscan off, tasks t has no path but the TID scan, an inner side itself. (A materialized CTE takes 3% longer.) One
-- function, since another one in between would store each task twice.
create or replace function orchestrator.claim_tasks(p_worker_id text, p_types text[], p_limit int, p_bytes bigint default 67108864)
returns table (claim_id bigint, id uuid, type text, payload jsonb, attempts int, max_retries int, priority int,
               created_at timestamptz, waited double precision, recoveries int, meta jsonb)
language plpgsql set enable_tidscan = on as $$
declare
  l record;               -- the lanes: types, priorities, limits, and heads, where to look from; null: nothing is left there
  v_first int := 1;       -- the lanes of one priority are v_first to v_last
  v_last int;
  v_lanes int;            -- of them with something left
  v_claim_id bigint := orchestrator._new_claim_id();
  v_left int := least(p_limit, greatest(p_bytes / orchestrator._largest_payload(), 1));
  v_claimed int := 0;
  v_share int;
  v_taken int;
  v_place int := 0;
  v_from timestamptz;
  v_now timestamptz;
begin
  if (p_limit >= 0) is not true then
    perform orchestrator._invalid('limit', 'must be 0 or more', 'How many tasks this worker has room for.');
  elsif (p_bytes > 0) is not true then
    perform orchestrator._invalid('bytes', 'must be 1 or more', 'How many bytes of payloads this worker has room for.');
  end if;
  p_limit := v_left;
  while v_left >= 500 and v_place < 7 and not pg_try_advisory_xact_lock(hashtext('orchestrator.claim'), v_place) loop
    v_place := v_place + 1;
  end loop;
  l := orchestrator._lanes_to_claim(p_worker_id, p_types);
  v_now := clock_timestamp();   -- after the wait for limits' locks
  while v_left > 0 and v_first <= cardinality(l.types) loop
    v_lanes := cardinality(array_positions(l.priorities, l.priorities[v_first]));
    v_last := v_first + v_lanes - 1;
    while v_left > 0 and v_lanes > 0 loop   -- ends: in each pass but the first, a lane gives its whole share or is done with
      v_share := ceil(v_left::double precision / v_lanes);
      for i in v_first..v_last loop
        continue when l.heads[i] is null;
        v_from := l.heads[i];
        if l.limits[i] is not null then
          return query select * from orchestrator._claim_limited(p_worker_id, l.limits[i], l.types[i], l.priorities[i], v_from, least(v_share, v_left), v_now);
          get diagnostics v_taken = row_count;
        else
          if v_place > 0 then
            v_from := (
              select t.queued_at from orchestrator.tasks t
              where t.type = l.types[i] and t.priority = l.priorities[i] and t.queued_at >= l.heads[i]
              order by t.queued_at offset v_place::bigint * v_share limit 1);   -- null, so none, in a shorter lane
          end if;
          return query
            update orchestrator.tasks t
            set status = 'claimed', worker_id = p_worker_id, claim_id = v_claim_id, claimed_at = v_now, updated_at = v_now, queued_at = null,
                expires_at = null
            from (select t.ctid as tid, t.queued_at from orchestrator.tasks t
                  where t.type = l.types[i] and t.priority = l.priorities[i] and t.queued_at >= v_from
                    and (t.expires_at is null or t.expires_at > v_now)
                  order by t.queued_at limit least(v_share, v_left) for no key update skip locked) p
            where t.ctid = p.tid
            returning t.claim_id, t.id, t.type, t.payload, t.attempts, t.max_retries, t.priority, t.created_at,
                      date_part('epoch', v_now - p.queued_at), t.recoveries, t.meta;
          get diagnostics v_taken = row_count;
          v_claimed := v_claimed + v_taken;
          if v_taken > random() * 500 then
            perform orchestrator._note_lane(l.types[i], l.priorities[i]);
          end if;
        end if;
        v_left := v_left - v_taken;
        exit when v_left <= 0;
        if v_taken < v_share and v_from = l.heads[i] then   -- where it started further on, there may be some before
          l.heads[i] := null;
          v_lanes := v_lanes - 1;
        end if;
      end loop;
      v_place := 0;   -- only the first pass starts further on
    end loop;
    v_first := v_last + 1;
  end loop;
  -- If a crash forgets the claim, its tasks are pending again.
  if v_left < p_limit and set_config('synchronous_commit', 'off', true) = 'off' and v_claimed > 0 then
    insert into orchestrator.claims (id, worker_id, claimed_at, open_tasks) values (v_claim_id, p_worker_id, v_now, v_claimed);
  end if;
end $$;
comment on function orchestrator.claim_tasks is
  'Claims up to p_limit ready tasks of the types and patterns (a:, a:*, *) in p_types for a registered worker, with p_bytes of payloads '
  'at most (or a single task), reckoning with the largest ever enqueued. attempts: started before this one; waited: seconds since it '
  'became ready; recoveries > 0: call start_tasks before its handler. Tasks under limits have claims of their own. Commits without '
  'waiting for the flush. Raises OR001, OR003.';

create or replace function orchestrator.start_tasks(p_claim_id bigint, p_ids uuid[]) returns int
language plpgsql as $$
declare
  v_started int;
  v_now timestamptz;
begin
  perform from orchestrator.claims c where c.id = p_claim_id for no key update;
  if not found then return 0; end if;
  v_now := clock_timestamp();
  -- "is not distinct from": no index serves it, so the planner can't walk the claim for each id
  update orchestrator.tasks t
  set status = 'running', started_at = v_now, updated_at = v_now, attempts = attempts + 1
  where t.id = any (p_ids) and t.claim_id is not distinct from p_claim_id and t.status = 'claimed';
  get diagnostics v_started = row_count;
  return v_started;
end $$;
comment on function orchestrator.start_tasks is
  'Marks claimed tasks as running, and counts the attempt. Returns how many: the claim no longer holds the rest.';

create or replace function orchestrator.promote_due(
  p_limit int default 1000, out promoted int, out next_in double precision, out fired int, out expired jsonb)
language plpgsql as $$
declare
  v_blocked uuid[];
  v_now timestamptz := clock_timestamp();   -- itself it is volatile, so no index condition: all that is scheduled would be read
  v_fire_at timestamptz;
begin
  select f.fired, f.next_fire_at into fired, v_fire_at from orchestrator._fire_schedules(v_now) f;
  if fired = 0 then   -- a task that a handler may have seen must not come back under another id
    perform set_config('synchronous_commit', 'off', true);
  end if;
  with pick as materialized (
    select t.ctid as tid, t.id, t.blocked_until from orchestrator.tasks t where t.next_retry_at <= v_now
    order by t.next_retry_at limit p_limit for no key update skip locked),
  due as (
    update orchestrator.tasks t
    set status = 'pending', queued_at = clock_timestamp(), next_retry_at = null, updated_at = clock_timestamp()
    where t.ctid = any (array(select tid from pick where blocked_until is null)) returning t.type),
  notified as (select orchestrator._notify_idle(d.type) from (select distinct type from due) d)
  select count(*), (select array_agg(p.id) from pick p where p.blocked_until is not null) into promoted, v_blocked
  from due, (select count(*) from notified) a;
  if v_blocked is not null then
    perform orchestrator._parents_ended(array(select b from unnest(v_blocked) b where orchestrator._settle_child(b, null, true)), true);
  end if;
  expired := orchestrator._expire(v_now, p_limit);
  select extract(epoch from least(v_fire_at, (select t.next_retry_at from orchestrator.tasks t where t.next_retry_at is not null
                                              order by t.next_retry_at limit 1),
                                  (select e.at from orchestrator.expiries e order by e.at limit 1)) - clock_timestamp()) into next_in;
end $$;
comment on function orchestrator.promote_due is
  'Makes delayed tasks and retries ready that are due, at the tail of their lanes, fires schedules, cancels what has expired, and looks '
  'whether blocked tasks may go on. Every worker calls it, about once a second, so none of it needs a leader. Returns how many it made '
  'ready (promoted), enqueued for schedules (fired) and cancelled by type (expired), and the seconds until the next is due (next_in; '
  'null: none).';
