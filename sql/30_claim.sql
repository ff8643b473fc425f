-- Claiming. claim_tasks writes tasks and inserts one claim; start_tasks writes tasks; promote_due writes tasks and lanes.
-- Locks: claims (start_tasks) → tasks; claims of tasks skip what others have locked, so no claim waits for another. A large
-- claim also takes a place in line (advisory), which it only tries.
-- The planner settings on the hot functions are needed: a plan cached while a table was empty would scan it whole ever after.

-- The lanes of these types that have ready tasks, each with the queued_at of its oldest. A type is walked from priority to
-- priority along the ready index, so that its empty lanes cost nothing, however many there are. Where the leader has raised
-- floors, an old snapshot keeps dead index entries, and each lane of the type is looked up from its own floor instead.
create or replace function orchestrator._ready_lanes(p_types text[])
returns table (type text, priority int, head timestamptz) language plpgsql stable
set search_path = '' set plan_cache_mode = force_generic_plan
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
#variable_conflict use_column
declare
  v_floored text[];
  v_plain text[];
begin
  select array_agg(u.type) filter (where f.found), array_agg(u.type) filter (where f.found is null) into v_floored, v_plain
  from unnest(p_types) u(type)
  left join lateral (   -- limit 1: the newest come first, so the dead ones are not read
    select true as found from orchestrator.lane_floors f where f.type = u.type limit 1) f on true;
  return query
    with recursive lane as (
      select u.type, h.priority, h.queued_at
      from unnest(v_plain) u(type)
      cross join lateral (
        select t.priority, t.queued_at from orchestrator.tasks t
        where t.type = u.type and t.queued_at is not null order by t.priority desc, t.queued_at limit 1) h
      union all
      select l.type, h.priority, h.queued_at
      from lane l
      cross join lateral (
        select t.priority, t.queued_at from orchestrator.tasks t
        where t.type = l.type and t.priority < l.priority and t.queued_at is not null order by t.priority desc, t.queued_at limit 1) h)
    select l.type, l.priority, l.queued_at from lane l;
  if v_floored is not null then
    return query
      select l.type, l.priority, h.queued_at
      from (select distinct o.type, o.priority from orchestrator.lanes o where o.type = any (v_floored) and o.dropped_at is null) l
      cross join lateral (
        select t.queued_at from orchestrator.tasks t
        where t.type = l.type and t.priority = l.priority
          and t.queued_at >= coalesce((select f.floor from orchestrator.lane_floors f
                                       where f.type = l.type and f.priority = l.priority
                                       order by f.generation desc, f.floor limit 1), '-infinity')
        order by t.queued_at limit 1) h;
  end if;
end $$;

-- Highest priority first. Within one, every lane with work gives an equal share, in the order of their oldest tasks, and what
-- one lane leaves the others give in the next pass. A lane is one index range scan from its oldest ready task: the cost doesn't
-- depend on how much waits, here or in lanes of other types.
-- Large claims at the same time would meet at the same rows, and stepping over one that another has locked takes 1.2 µs. So
-- each takes a place in line, and starts as many shares further on where a lane holds that much: four workers drain 8% more.
create or replace function orchestrator.claim_tasks(p_worker_id text, p_types text[], p_limit int)
returns table (claim_id bigint, id uuid, type text, payload jsonb, attempts int, max_retries int, priority int,
               created_at timestamptz, waited double precision, recoveries int)
language plpgsql
set search_path = '' set plan_cache_mode = force_generic_plan
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
#variable_conflict use_column
declare
  v_types text[];
  v_priorities int[];
  v_heads timestamptz[];   -- of each lane, where to look from; null: nothing is left there
  v_first int := 1;        -- the lanes of one priority are v_first to v_last
  v_last int;
  v_lanes int;             -- of them with something left
  v_claim_id bigint;
  v_left int := p_limit;
  v_share int;
  v_taken int;
  v_place int := 0;
  v_from timestamptz;
  v_now timestamptz := clock_timestamp();
begin
  if p_limit is null or p_limit < 0 then   -- null would be no limit at all
    perform orchestrator._invalid('limit', 'must be 0 or more', 'How many tasks this worker has room for.');
  end if;
  perform orchestrator._check_worker(p_worker_id);
  while p_limit >= 500 and v_place < 7 and not pg_try_advisory_xact_lock(hashtext('orchestrator.claim'), v_place) loop
    v_place := v_place + 1;
  end loop;
  select array_agg(l.type), array_agg(l.priority), array_agg(l.head) into v_types, v_priorities, v_heads
  from (select * from orchestrator._ready_lanes(orchestrator._unpaused(p_types)) l order by l.priority desc, l.head) l;
  while v_left > 0 and v_first <= cardinality(v_types) loop
    v_claim_id := coalesce(v_claim_id, nextval('orchestrator.claims_id_seq'));
    v_lanes := cardinality(array_positions(v_priorities, v_priorities[v_first]));
    v_last := v_first + v_lanes - 1;
    while v_left > 0 and v_lanes > 0 loop   -- ends: in each pass but the first, a lane gives its whole share or is done with
      v_share := ceil(v_left::double precision / v_lanes);
      for i in v_first..v_last loop
        continue when v_heads[i] is null;
        v_from := v_heads[i];
        if v_place > 0 then
          v_from := (
            select t.queued_at from orchestrator.tasks t
            where t.type = v_types[i] and t.priority = v_priorities[i] and t.queued_at >= v_heads[i]
            order by t.queued_at offset v_place::bigint * v_share limit 1);   -- null, so none, in a shorter lane: see the next pass
        end if;
        return query
          -- materialized: a plain LIMIT … SKIP LOCKED could be run again by a join, and claim more than the limit
          with pick as materialized (
            select t.ctid as tid, t.queued_at from orchestrator.tasks t
            where t.type = v_types[i] and t.priority = v_priorities[i] and t.queued_at >= v_from
            order by t.queued_at limit least(v_share, v_left) for no key update skip locked)
          update orchestrator.tasks t
          set status = 'claimed', worker_id = p_worker_id, claim_id = v_claim_id, claimed_at = v_now, updated_at = v_now, queued_at = null
          from pick p where t.ctid = p.tid
          returning t.claim_id, t.id, t.type, t.payload, t.attempts, t.max_retries, t.priority, t.created_at,
                    date_part('epoch', v_now - p.queued_at), t.recoveries;
        get diagnostics v_taken = row_count;
        v_left := v_left - v_taken;
        exit when v_left <= 0;
        if v_taken < v_share and v_from = v_heads[i] then   -- it has no more; where it started further on, there may be some before
          v_heads[i] := null;
          v_lanes := v_lanes - 1;
        end if;
      end loop;
      v_place := 0;   -- only the first pass starts further on
    end loop;
    v_first := v_last + 1;
  end loop;
  if v_left < p_limit then
    insert into orchestrator.claims (id, worker_id, claimed_at, open_tasks)
    overriding system value values (v_claim_id, p_worker_id, v_now, p_limit - v_left);
  end if;
end $$;
comment on function orchestrator.claim_tasks(text, text[], int) is
  'Claims up to p_limit ready tasks of these types for a registered worker, under one claim. attempts: started before this '
  'one; waited: seconds since it became ready; recoveries > 0: call start_tasks before its handler. Raises OR001, OR003.';

create or replace function orchestrator._check_worker(p_worker_id text) returns void
language plpgsql stable set search_path = '' as $$
begin
  if not exists (select from orchestrator.workers w where w.id = p_worker_id and w.declared_dead_at is null) then
    raise exception 'worker % is not registered, or was declared dead', p_worker_id
      using errcode = 'OR003', hint = 'Register again, under a new id.';
  end if;
end $$;

create or replace function orchestrator._unpaused(p_types text[]) returns text[]
language plpgsql stable set search_path = '' set enable_seqscan = off as $$
declare
  v_paused text[] := array(select p.type from orchestrator.task_types p where p.paused);
begin
  if v_paused = '{}' then return p_types; end if;
  return array(select t from unnest(p_types) t where t <> all (v_paused));
end $$;

-- Which of the types that were ever enqueued match a pattern; a worker with exact types alone never asks.
create or replace function orchestrator.known_types(p_patterns text[]) returns setof text
language sql stable set search_path = '' as $$
  select distinct l.type from orchestrator.lanes l
  where l.dropped_at is null and l.type like any (array(select orchestrator._like(p) from unnest(p_patterns) p))
$$;
comment on function orchestrator.known_types(text[]) is 'The types with lanes that match one of these patterns (a:b, a:, a:*).';

create or replace function orchestrator.start_tasks(p_claim_id bigint, p_ids uuid[]) returns int
language plpgsql
set search_path = '' set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off as $$
declare
  v_started int;
  v_now timestamptz;
begin
  perform from orchestrator.claims c where c.id = p_claim_id for no key update;
  if not found then return 0; end if;
  v_now := clock_timestamp();
  -- "is not distinct from": no index can serve it, so the planner can't walk the claim for each id
  update orchestrator.tasks t
  set status = 'running', started_at = v_now, updated_at = v_now, attempts = attempts + 1
  where t.id = any (p_ids) and t.claim_id is not distinct from p_claim_id and t.status = 'claimed';
  get diagnostics v_started = row_count;
  return v_started;
end $$;
comment on function orchestrator.start_tasks(bigint, uuid[]) is
  'Marks claimed tasks as running, and counts the attempt. Returns how many; fewer than asked: the rest are no longer this claim''s.';

create or replace function orchestrator.promote_due(p_limit int default 1000, out promoted int, out next_in double precision)
language plpgsql
set search_path = '' set plan_cache_mode = force_generic_plan
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
declare
  v_now timestamptz := clock_timestamp();   -- itself it is volatile, so no index condition: all that is scheduled would be read
begin
  with pick as materialized (
    select t.ctid as tid from orchestrator.tasks t where t.next_retry_at <= v_now
    order by t.next_retry_at limit p_limit for no key update skip locked),
  due as (
    update orchestrator.tasks t
    set status = 'pending', queued_at = clock_timestamp(), next_retry_at = null, updated_at = clock_timestamp()
    where t.ctid = any (array(select tid from pick)) returning t.type, t.priority),
  announced as (select orchestrator._announce(d.type, d.priority) from (select distinct type, priority from due) d)
  select count(*) into promoted from due, (select count(*) from announced) a;
  select extract(epoch from t.next_retry_at - clock_timestamp()) into next_in
  from orchestrator.tasks t where t.next_retry_at is not null order by t.next_retry_at limit 1;
end $$;
comment on function orchestrator.promote_due(int) is
  'Makes delayed tasks and retries ready whose time has come, at the tail of their lanes. Any worker calls it, about once a '
  'second, so that retries flow without a leader. Returns how many, and the seconds until the next is due (null: none).';
