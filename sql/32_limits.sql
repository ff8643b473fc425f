-- Limits: how many tasks of a type or pattern run at once, in all or of each concurrency key, and how many start in a stretch of
-- time. Writes type_limits, starts, freed_keys, claims, tasks, lane_floors.
-- The claims are the permits. Tasks under a limit have claims of their own, which name the limit and the key, and what is in flight is
-- the sum of their open_tasks. So no counter leaks: a permit comes back in the transaction in which its task leaves the claim, however
-- it does. A task whose key is full is parked: it leaves its lane. Whoever gives back a permit of a key notes that in freed_keys, and
-- the next claim puts as many parked tasks back at their old places.
-- Locks: a claim first locks the rows of its limits in type_limits (ascending), then counts by a new snapshot, so exactly, and waits
-- for nothing more but the lock on lane_floors. Those who give permits back lock nothing here: their notes wait for the next claim.
-- limit_type waits for its like: they may share types.

-- The limit that a type is under; null: none.
create or replace function orchestrator._limit_of(p_type text) returns text
language sql stable as $$
  select l.type from orchestrator.type_limits l where p_type like l.likes and num_nonnulls(l.max_running, l.max_per_key, l.rate) > 0
  order by l.type = p_type desc, length(l.type) desc limit 1
$$;

-- Whether claims are left that may hold tasks under this limit without saying so.
create or replace function orchestrator._older_claims(p_name text, p_since bigint) returns boolean
language sql stable as $$
  select exists (select from orchestrator.claims c
                 where c.id < coalesce(p_since, 9223372036854775807) and (c.limit_name is distinct from p_name or c.key is null))
$$;

-- What is in flight under a limit: of one key, or (null) in all.
create or replace function orchestrator._in_flight(p_name text, p_since bigint, p_key text) returns int
language plpgsql stable as $$
declare
  v_n int;
begin
  if p_key is null then
    v_n := (select coalesce(sum(c.open_tasks), 0) from orchestrator.claims c where c.limit_name = p_name);
  else
    v_n := (select coalesce(sum(c.open_tasks), 0) from orchestrator.claims c where c.limit_name = p_name and c.key = p_key);
  end if;
  if orchestrator._older_claims(p_name, p_since) then
    v_n := v_n + (
      select count(*) from orchestrator.claims c
      cross join lateral (select t.type, t.concurrency_key from orchestrator.tasks t
                          where t.claim_id = c.id and t.status in ('claimed', 'running') limit 10000000) t
      where c.id < coalesce(p_since, 9223372036854775807) and (c.limit_name is distinct from p_name or (c.key is null and p_key is not null))
        and (p_key is null or t.concurrency_key = p_key) and orchestrator._limit_of(t.type) = p_name);
  end if;
  return v_n;
end $$;

-- Locks the limits that ready tasks are under, and those of these types and patterns that parked tasks may go on under. One that
-- another transaction keeps locked, such as an operator's, is left out after a second: all else goes on.
create or replace function orchestrator._lock_limits(p_types text[], p_claimable text[]) returns text[]
language plpgsql
set lock_timeout = '1s' as $$
declare
  v_held text[] := array[]::text[];
  v_name text;
begin
  if current_setting('transaction_isolation') <> 'read committed' then
    raise exception 'claiming tasks under a limit needs READ COMMITTED' using errcode = 'OR005', hint = 'begin isolation level read committed';
  end if;
  for v_name in
    select n.name from (
      select orchestrator._limit_of(r.type) as name from (select distinct l.type from orchestrator._ready_lanes(p_claimable) l) r
      union
      select f.limit_name from orchestrator.freed_keys f where exists (
        select from unnest(p_types) u(type) where f.limit_name like orchestrator._like(u.type) or u.type like orchestrator._like(f.limit_name))) n
    where n.name is not null order by n.name
  loop
    begin
      perform from orchestrator.type_limits l where l.type = v_name for no key update;
      if found then
        v_held := v_held || v_name;
      else
        delete from orchestrator.freed_keys f where f.limit_name = v_name;   -- nothing is parked under what is gone
      end if;
    exception when lock_not_available then null;
    end;
  end loop;
  return v_held;
end $$;

-- The types that tasks of a key (null: of each key) are parked of, one after another along the index.
create or replace function orchestrator._parked_types(p_name text, p_key text) returns table (key text, type text)
language sql stable as $$
  with recursive k as (
    (select t.concurrency_key as key, t.type from orchestrator.tasks t
     where t.parked_at is not null and t.parked_by = p_name and t.concurrency_key >= coalesce(p_key, '') order by t.concurrency_key, t.type limit 1)
    union all
    select n.* from k cross join lateral (
      select t.concurrency_key, t.type from orchestrator.tasks t
      where t.parked_at is not null and t.parked_by = p_name and (t.concurrency_key, t.type) > (k.key, k.type)
      order by t.concurrency_key, t.type limit 1) n
    where k.key = p_key or p_key is null)
  select k.key, k.type from k where k.key = p_key or p_key is null
$$;

-- Reads the notes of limits that the caller has locked, and puts back as many parked tasks of those keys as they have room for (all
-- if their type came under another limit), at most 10,000. That many of each type: one may be paused, or have no worker. A note
-- stays where a task is locked or more are parked, and while older claims may end without one. Returns whether any came back.
create or replace function orchestrator._return_parked(p_held text[]) returns boolean
language plpgsql as $$
declare
  v_back record;
  k record;
  v_types text[];
  v_priorities int[];
  v_heads timestamptz[];
begin
  for k in
    with noted as (delete from orchestrator.freed_keys f where f.limit_name = any (p_held) returning f.limit_name, f.key),
    freed as (
      select distinct n.limit_name, p.key, p.type from (select distinct limit_name, key from noted) n
      cross join lateral orchestrator._parked_types(n.limit_name, n.key) p)
    select f.limit_name as name, f.key, f.type, l.since,
           case when l.max_per_key is null or orchestrator._limit_of(f.type) is distinct from l.type then 10000
                else least(l.max_per_key - orchestrator._in_flight(l.type, l.since, f.key), 10000) end as room
    from freed f join orchestrator.type_limits l on l.type = f.limit_name order by f.limit_name, f.key, f.type
  loop
    with next as materialized (
      select t.ctid as tid from orchestrator.tasks t
      where t.parked_at is not null and t.parked_by = k.name and t.concurrency_key = k.key and t.type = k.type
      order by t.priority desc, t.parked_at limit greatest(k.room, 0) for no key update skip locked),
    back as (
      update orchestrator.tasks t set queued_at = t.parked_at, parked_at = null, parked_by = null, updated_at = clock_timestamp()
      where t.ctid = any (array(select n.tid from next n)) returning t.type, t.priority, t.queued_at)
    select count(*) as n, array_agg(b.type) as types, array_agg(b.priority) as priorities, array_agg(b.queued_at) as heads into v_back from back b;
    v_types := v_types || v_back.types; v_priorities := v_priorities || v_back.priorities; v_heads := v_heads || v_back.heads;
    if (v_back.n < k.room or k.room = 10000 or orchestrator._older_claims(k.name, k.since)) and exists (
        select from orchestrator.tasks t where t.parked_at is not null and t.parked_by = k.name and t.concurrency_key = k.key and t.type = k.type) then
      insert into orchestrator.freed_keys values (k.name, k.key);
    end if;
  end loop;
  perform orchestrator._put_back(v_types, v_priorities, v_heads, false);   -- whoever left the note has woken the idle
  delete from orchestrator.type_limits l
  where l.type = any (p_held) and num_nonnulls(l.max_running, l.max_per_key, l.rate) = 0
    and not exists (select from orchestrator.tasks t where t.parked_at is not null and t.parked_by = l.type);
  return v_types is not null;
end $$;

-- The lanes of claim_tasks where there are limits, each with its own. Those whose limit isn't locked are left out.
create or replace function orchestrator._limited_lanes(
  p_types text[], out types text[], out priorities int[], out heads timestamptz[], out limits text[])
language plpgsql as $$
declare
  v_claimable text[] := orchestrator._claimable(p_types);
  v_held text[] := orchestrator._lock_limits(p_types, v_claimable);
begin
  if orchestrator._return_parked(v_held) then
    v_claimable := orchestrator._claimable(p_types);
  end if;
  select array_agg(l.type), array_agg(l.priority), array_agg(l.head), array_agg(l.name) into types, priorities, heads, limits
  from (select l.type, l.priority, l.head, orchestrator._limit_of(l.type) as name from orchestrator._ready_lanes(v_claimable) l
        order by l.priority desc, l.head) l
  where l.name is null or l.name = any (v_held);
end $$;

-- How many of p_want tasks may start now under a limit that the caller has locked.
create or replace function orchestrator._room(l orchestrator.type_limits, p_want int, p_now timestamptz) returns int
language plpgsql as $$
begin
  if l.rate is not null then
    delete from orchestrator.starts s where s.limit_name = l.type and (s.at <= p_now - l.rate_per or s.at > p_now);   -- later: the clock was set back
    p_want := least(p_want, l.rate - (select coalesce(sum(s.n), 0) from orchestrator.starts s where s.limit_name = l.type));
  end if;
  if l.max_running is not null and p_want > 0 then
    p_want := least(p_want, l.max_running - orchestrator._in_flight(l.type, l.since, null));
  end if;
  return p_want;
end $$;

-- Of the first p_n tasks of a lane: those that may start, p_room at most, and those to be parked, since their key is full or has older
-- parked tasks. If it isn't full, those may be on their way back, or cancelled: such keys are noted. Nothing behind the last one that
-- starts is parked: what is before it in its key's line may still be cancelled.
create or replace function orchestrator._line_up(
  l orchestrator.type_limits, p_type text, p_priority int, p_from timestamptz, p_room int, p_n int,
  out tids tid[], out times timestamptz[], out keys text[], out parked tid[], out noted text[])
language sql as $$
  with pick as materialized (
    select t.ctid as tid, t.queued_at, case when l.max_per_key is not null then t.concurrency_key end as key from orchestrator.tasks t
    where t.type = p_type and t.priority = p_priority and t.queued_at >= p_from and (t.expires_at is null or t.expires_at > clock_timestamp())
    order by t.queued_at limit p_n for no key update skip locked),
  keys as materialized (
    select k.key, l.max_per_key - orchestrator._in_flight(l.type, l.since, k.key) as room, (
             select t.parked_at from orchestrator.tasks t
             where t.parked_at is not null and t.parked_by = l.type and t.concurrency_key = k.key and t.type = p_type and t.priority = p_priority
             order by t.parked_at limit 1) as line
    from (select distinct i.key from pick i where i.key is not null) k),
  gated as (
    select i.*, (i.full or i.late) is true as gated from (
      select i.*, row_number() over (partition by i.key order by i.queued_at) > k.room as full, i.queued_at > k.line as late
      from pick i left join keys k on k.key = i.key) i),
  placed as (
    select g.* from (select g.*, count(*) filter (where not g.gated) over (order by g.queued_at, g.tid) as n from gated g) g where g.n <= p_room)
  select array_agg(g.tid order by g.n) filter (where not g.gated), array_agg(g.queued_at order by g.n) filter (where not g.gated),
         array_agg(g.key order by g.n) filter (where not g.gated), array_agg(g.tid) filter (where g.gated),
         array_agg(distinct g.key) filter (where g.late and not g.full)
  from placed g
$$;

-- The share of one lane under a limit. What may not start is parked, so that the next look reaches further.
create or replace function orchestrator._claim_limited(
  p_worker_id text, p_name text, p_type text, p_priority int, p_from timestamptz, p_want int, p_now timestamptz)
returns table (claim_id bigint, id uuid, type text, payload jsonb, attempts int, max_retries int, priority int,
               created_at timestamptz, waited double precision, recoveries int, meta jsonb)
language plpgsql as $$
declare
  v_limit orchestrator.type_limits;
  v record;
  v_room int;
  v_first_id bigint;
begin
  update orchestrator.type_limits l set since = orchestrator._new_claim_id() where l.type = p_name and l.since is null;
  select * into v_limit from orchestrator.type_limits l where l.type = p_name;
  v_room := orchestrator._room(v_limit, p_want, p_now);
  for look in 0..8 loop
    exit when v_room <= 0;
    v := orchestrator._line_up(v_limit, p_type, p_priority, p_from, v_room,
                               greatest(v_room, case when v_limit.max_per_key is not null then least(25 * 4 ^ look, 4000)::int end));
    if v.parked is not null then
      update orchestrator.tasks t set parked_at = t.queued_at, parked_by = p_name, queued_at = null, updated_at = p_now where t.ctid = any (v.parked);
      insert into orchestrator.freed_keys select p_name, k from unnest(v.noted) k
        union all select p_name, null where orchestrator._older_claims(p_name, v_limit.since);   -- those leave no note when they end
      if cardinality(v.parked) > random() * 50 then perform orchestrator._note_lane(p_type, p_priority); end if;
    end if;
    if v.tids is not null then
      v_first_id := orchestrator._new_claim_id();
      return query
        with made as (   -- one claim for each key, and one for the tasks without
          insert into orchestrator.claims (id, worker_id, claimed_at, open_tasks, limit_name, key)
          select v_first_id + 1024 * row_number() over (), p_worker_id, p_now, count(*), p_name, k from unnest(v.keys) k group by k
          returning claims.id, claims.key)
        update orchestrator.tasks t
        set status = 'claimed', worker_id = p_worker_id, claimed_at = p_now, updated_at = p_now, queued_at = null, expires_at = null,
            claim_id = (select m.id from made m where m.key is not distinct from u.key)
        from unnest(v.tids, v.keys, v.times) u(tid, key, at) where t.ctid = u.tid
        returning t.claim_id, t.id, t.type, t.payload, t.attempts, t.max_retries, t.priority, t.created_at,
                  date_part('epoch', p_now - u.at), t.recoveries, t.meta;
      if v_limit.rate is not null then
        insert into orchestrator.starts values (p_name, p_now, cardinality(v.tids));
      end if;
      v_room := v_room - cardinality(v.tids);
    end if;
    exit when v.parked is null;   -- nothing was in the way: there is no more
  end loop;
end $$;

-- A permit was given back, in the caller's transaction: leaves a note for its key, and wakes an idle worker if something waits.
create or replace function orchestrator._give_back(p_name text, p_key text) returns void
language plpgsql as $$
begin
  if p_key is not null then
    insert into orchestrator.freed_keys values (p_name, p_key);
  end if;
  if exists (select from orchestrator.workers w where w.idle) and (
      exists (select from orchestrator.tasks t where t.parked_at is not null and t.parked_by = p_name and t.concurrency_key = p_key)
      or exists (select from orchestrator._ready_lanes(orchestrator._claimable(array[p_name])))) then
    perform pg_notify('orchestrator', '');
  end if;
end $$;

-- A ready task left its lane unclaimed: if it was put back in its key's turn, another one may go on.
create or replace function orchestrator._give_way(p_type text, p_key text) returns void
language sql as $$
  insert into orchestrator.freed_keys select l, p_key from orchestrator._limit_of(p_type) l where l is not null
$$;

create or replace function orchestrator.limit_type(
  p_type text, p_max_running int default null, p_max_per_key int default null, p_rate int default null, p_per interval default null,
  out changed boolean, out matching int)
language plpgsql as $$
begin
  matching := orchestrator._covered_types(p_type);
  if least(p_max_running, p_max_per_key, p_rate) < 1 then
    perform orchestrator._invalid(case when p_max_running < 1 then 'max_running' when p_max_per_key < 1 then 'max_per_key' else 'rate' end,
                                  'must be 1 or more', 'Leave it out for no limit; pause_type lets nothing run.');
  elsif (p_rate is null) <> (p_per is null) or p_per <= interval '0' or p_per > interval '1 day' then
    perform orchestrator._invalid('per', 'must be above 0 and at most 1 day, and goes with a rate', 'Such as p_rate => 14, p_per => ''1 second''.');
  end if;
  lock table orchestrator.type_limits in share update exclusive mode;
  -- of those that share types with it, too: what is in flight or parked may come under another of them
  perform from orchestrator.type_limits l where l.type like orchestrator._like(p_type) or p_type like l.likes order by l.type for no key update;
  insert into orchestrator.type_limits as l (type, max_running, max_per_key, rate, rate_per)
  select p_type, p_max_running, p_max_per_key, p_rate, p_per
  where num_nonnulls(p_max_running, p_max_per_key, p_rate) > 0 or exists (select from orchestrator.type_limits e where e.type = p_type)
  on conflict (type) do update
  set max_running = excluded.max_running, max_per_key = excluded.max_per_key, rate = excluded.rate, rate_per = excluded.rate_per,
      updated_at = clock_timestamp()
  where (l.max_running, l.max_per_key, l.rate, l.rate_per) is distinct from (excluded.max_running, excluded.max_per_key, excluded.rate, excluded.rate_per);
  changed := found;
  if changed then
    perform orchestrator._log('limit', 'type', p_type, jsonb_strip_nulls(jsonb_build_object(
      'max_running', p_max_running, 'max_per_key', p_max_per_key, 'rate', p_rate, 'per', p_per)));
    with shared as (
      update orchestrator.type_limits l set since = null where l.type like orchestrator._like(p_type) or p_type like l.likes returning l.type)
    insert into orchestrator.freed_keys select s.type, null from shared s;
    if exists (select from orchestrator.workers w where w.idle) then
      perform pg_notify('orchestrator', '');
    end if;
  end if;
end $$;
comment on function orchestrator.limit_type is
  'Limits a type, or all types of a pattern together: p_max_running in flight at once, p_max_per_key of each concurrency key (1: in '
  'their order), p_rate claimed in any p_per. All null: no limit. What is in flight goes on. Returns whether that is new, and how '
  'many known types it covers. Raises OR001.';

create or replace view orchestrator.limits as
  select l.type, l.max_running, l.max_per_key, l.rate, l.rate_per, orchestrator._in_flight(l.type, l.since, null) as in_flight,
         (select count(*) from orchestrator.tasks t where t.parked_at is not null and t.parked_by = l.type) as parked,
         s.n as started_lately, case when s.n >= l.rate then s.at + l.rate_per end as next_start_at, l.updated_at
  from orchestrator.type_limits l
  left join lateral (select coalesce(sum(s.n), 0) as n, min(s.at) as at from orchestrator.starts s
                     where s.limit_name = l.type and s.at > clock_timestamp() - l.rate_per) s on l.rate is not null
  where num_nonnulls(l.max_running, l.max_per_key, l.rate) > 0;
comment on view orchestrator.limits is
  'Each limit with what is in flight under it, parked since its key is full, and claimed within the last rate_per; if that is all of the '
  'rate, when the next may be.';
