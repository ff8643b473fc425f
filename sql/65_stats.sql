-- Counting, by the leader, once for all who ask: page, metrics, psql. Writes type_stats, stats_state and stats_samples; reads
-- task_types, lanes, claims, tasks and maintenance.safe_floor. Lock order: the leader's row → stats_state → type_stats.
--
-- What waits is counted along the partial indexes, in one snapshot with what was enqueued, and not sooner than 200 times as
-- long as the last count took (a minute at most, since a burst makes one count long): less than 1% of one core. A million
-- ready tasks take 0.08 s.

-- What was ever enqueued, by whomever, is counted once along the primary key, which is time. Below the cursor it is settled:
-- the cursor stays below safe_floor, so nobody can still commit there (35_floors.sql says why). Above it, whatever is visible
-- is counted anew each time, so that a long transaction holds back nothing but the cursor. A clock that is set back hides what
-- is enqueued before it has caught up. What ended follows: enqueued less what still waits or is in flight.

create table if not exists orchestrator.type_stats (
  type            text primary key,
  since           uuid not null,
  waiting         bigint not null default 0,
  scheduled       bigint not null default 0,
  in_flight       bigint not null default 0,
  dead_letters    bigint not null default 0,
  oldest_ready_at timestamptz,
  settled         bigint not null default 0,
  enqueued_total  bigint not null default 0
) with (fillfactor = 50);
comment on table orchestrator.type_stats is
  'The counts of each type that has a handler or a policy of its own (up to 200 more that match a pattern), and of all the '
  'others together under the name other. As of stats_state.counted_at; live counts: queue_stats.';
comment on column orchestrator.type_stats.type is 'A type, or other.';
comment on column orchestrator.type_stats.since is 'Tasks with a smaller id were enqueued before the type was told apart: they count as other.';
comment on column orchestrator.type_stats.waiting is 'Ready to be claimed; counting stops at 5 million of all types.';
comment on column orchestrator.type_stats.scheduled is 'Delayed, snoozed or to be retried later.';
comment on column orchestrator.type_stats.settled is 'Of enqueued_total, those below stats_state.cursor.';
comment on column orchestrator.type_stats.enqueued_total is 'Tasks ever enqueued, by anyone, each once; a repeated idempotency key is none. It never falls.';

create table if not exists orchestrator.stats_state (
  one         boolean primary key default true check (one),
  cursor      uuid not null default '00000000-0000-0000-0000-000000000000',
  counted_at  timestamptz,
  took        interval not null default '0',
  next_at     timestamptz,
  complete    boolean not null default false,
  ended_total bigint
) with (fillfactor = 50);
insert into orchestrator.stats_state (one) select true where not exists (select from orchestrator.stats_state);
comment on table orchestrator.stats_state is 'When and how the counts in type_stats were taken; one row.';
comment on column orchestrator.stats_state.cursor is 'Tasks with a smaller id are settled: counted for good.';
comment on column orchestrator.stats_state.took is 'How long the last count took; the next comes 200 times that later, 2 seconds at least and a minute at most.';
comment on column orchestrator.stats_state.complete is 'Whether the last count reached the newest task; not while it catches up on millions.';
comment on column orchestrator.stats_state.ended_total is
  'enqueued less waiting, scheduled and in flight; it falls when an ended task is retried. Null until complete.';

create table if not exists orchestrator.stats_samples (
  at             timestamptz primary key,
  waiting        bigint not null,
  scheduled      bigint not null,
  in_flight      bigint not null,
  dead_letters   bigint not null,
  enqueued_total bigint not null,
  ended_total    bigint
);
comment on table orchestrator.stats_samples is
  'The counts of all types together, about every 10 seconds, for the last 2 hours. Throughput is the difference of two samples.';

-- What waits or rests, by type, each along its partial index. At most 5 million of each kind, so that even a huge backlog is
-- counted within seconds.
create or replace function orchestrator._count_live()
returns table (type text, waiting bigint, oldest timestamptz, scheduled bigint, in_flight bigint, dead_letters bigint)
language sql stable
set search_path = '' set plan_cache_mode = force_generic_plan
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
  select u.type, sum(u.waiting)::bigint, min(u.oldest), sum(u.scheduled)::bigint, sum(u.in_flight)::bigint, sum(u.dead)::bigint
  from (
    select r.type, count(*) as waiting, min(r.queued_at) as oldest, 0 as scheduled, 0 as in_flight, 0 as dead
    from (select t.type, t.queued_at from orchestrator.tasks t where t.queued_at is not null
          order by t.type, t.priority desc, t.queued_at limit 5000000) r group by 1
    union all
    select s.type, 0, null, count(*), 0, 0
    from (select t.type from orchestrator.tasks t where t.next_retry_at is not null order by t.next_retry_at limit 5000000) s group by 1
    union all
    select f.type, 0, null, 0, count(*), 0
    -- the limit keeps the planner from turning the join around, to walk all tasks that ever had a claim
    from orchestrator.claims c cross join lateral (select t.type from orchestrator.tasks t
          where t.claim_id = c.id and t.status in ('claimed', 'running') limit 5000000) f group by 1
    union all
    select d.type, 0, null, 0, 0, count(*)
    from (select t.type from orchestrator.tasks t where t.dead_at is not null order by t.dead_at limit 5000000) d group by 1
  ) u group by 1
$$;

-- What was enqueued from p_from on, by the name it counts under: below p_to, and beyond.
create or replace function orchestrator._count_enqueued(p_from uuid, p_to uuid, p_limit int)
returns table (type text, settled bigint, beyond bigint)
language sql stable
set search_path = '' set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off as $$
  select coalesce(s.type, 'other'), count(*) filter (where t.id < p_to), count(*) filter (where t.id >= p_to)
  from (select t.id, t.type from orchestrator.tasks t where t.id >= p_from order by t.id limit p_limit) t
  left join orchestrator.type_stats s on s.type = t.type and t.id >= s.since
  group by 1
$$;

-- The id that comes p_n tasks after p_from.
create or replace function orchestrator._id_after(p_from uuid, p_n int) returns uuid
language sql stable set search_path = '' set enable_seqscan = off as $$
  select t.id from orchestrator.tasks t where t.id >= p_from order by t.id offset p_n limit 1
$$;

-- Tells registered types apart from then on; what the last count may have put under other stays there, so that no task
-- counts twice. A pattern may match any number of types, so those are 200 at most.
create or replace function orchestrator._name_types(p_since uuid) returns void
language plpgsql set search_path = '' as $$
begin
  insert into orchestrator.type_stats (type, since)
  select 'other', p_since
  union
  select p.type, p_since from orchestrator.task_types p where right(p.type, 1) not in ('*', ':')
  on conflict (type) do nothing;
  insert into orchestrator.type_stats (type, since)
  select distinct l.type, p_since from orchestrator.lanes l
  where not exists (select from orchestrator.type_stats s where s.type = l.type)
    and l.type like any (array(select orchestrator._like(p.type) from orchestrator.task_types p where right(p.type, 1) in ('*', ':')))
  order by l.type
  limit greatest(200 - (select count(*) from orchestrator.type_stats s
                        where not exists (select from orchestrator.task_types p where p.type = s.type)), 0)
  on conflict (type) do nothing;
end $$;

create or replace function orchestrator.sample_stats(p_worker_id text, p_term bigint, p_limit int default 2000000)
returns double precision language plpgsql set search_path = '' as $$
declare
  v_start timestamptz;
  v_state orchestrator.stats_state;
  v_to uuid;
  v_counted bigint;
begin
  if not orchestrator._leads(p_worker_id, p_term) then return null; end if;
  select * into v_state from orchestrator.stats_state for no key update;
  v_start := clock_timestamp();
  if v_state.next_at > v_start and v_state.next_at < v_start + interval '10 minutes' then   -- later: the clock was set back
    return extract(epoch from v_state.next_at - v_start);
  end if;
  perform orchestrator._name_types(coalesce(orchestrator._uuid_at(v_state.counted_at + interval '10 milliseconds'), v_state.cursor));
  -- 5 seconds below safe_floor: an id is drawn a moment before the insert that brings it, and _uuid_at rounds to milliseconds
  select greatest(v_state.cursor, orchestrator._uuid_at(m.safe_floor - interval '5 seconds')) into v_to from orchestrator.leader_state m;
  v_counted := orchestrator._store_counts(v_state.cursor, v_to, p_limit);
  v_state.complete := v_counted < p_limit;
  if not v_state.complete then
    v_to := least(v_to, orchestrator._id_after(v_state.cursor, p_limit));
  end if;
  v_state.counted_at := clock_timestamp();
  v_state.took := v_state.counted_at - v_start;
  v_state.next_at := v_state.counted_at + least(greatest(200 * v_state.took, interval '2 seconds'), interval '1 minute');
  update orchestrator.stats_state s
  set cursor = v_to, counted_at = v_state.counted_at, took = v_state.took, next_at = v_state.next_at, complete = v_state.complete,
      ended_total = case when v_state.complete then n.ended else s.ended_total end
  from (select sum(t.enqueued_total - t.waiting - t.scheduled - t.in_flight) as ended from orchestrator.type_stats t) n;
  perform orchestrator._keep_sample(v_state.counted_at);
  return extract(epoch from v_state.next_at - v_state.counted_at);
end $$;
comment on function orchestrator.sample_stats(text, bigint, int) is
  'The leader''s: counts tasks into type_stats, and every 10 seconds into stats_samples, unless it is too early for that. '
  'Goes through at most p_limit tasks of the primary key a call, and goes on there the next time. Returns the seconds until '
  'the next count is due; null under a stale term.';

-- One statement, so one snapshot: what ended is a difference of these counts. greatest: retention may delete what is not
-- settled yet, and a counter must not fall. Returns how many tasks it went through along the primary key.
create or replace function orchestrator._store_counts(p_from uuid, p_to uuid, p_limit int) returns bigint
language sql set search_path = '' as $$
  with enqueued as materialized (select * from orchestrator._count_enqueued(p_from, p_to, p_limit)),
  live as materialized (
    select coalesce(s.type, 'other') as type, sum(l.waiting) as waiting, min(l.oldest) as oldest, sum(l.scheduled) as scheduled,
           sum(l.in_flight) as in_flight, sum(l.dead_letters) as dead_letters
    from orchestrator._count_live() l left join orchestrator.type_stats s on s.type = l.type group by 1),
  fresh as (
    select k.type, coalesce(l.waiting, 0) as waiting, coalesce(l.scheduled, 0) as scheduled, coalesce(l.in_flight, 0) as in_flight,
           coalesce(l.dead_letters, 0) as dead_letters, l.oldest, k.settled + coalesce(e.settled, 0) as settled,
           greatest(k.enqueued_total, k.settled + coalesce(e.settled + e.beyond, 0)) as enqueued_total
    from orchestrator.type_stats k left join live l on l.type = k.type left join enqueued e on e.type = k.type),
  stored as (
    update orchestrator.type_stats s
    set waiting = f.waiting, scheduled = f.scheduled, in_flight = f.in_flight, dead_letters = f.dead_letters,
        oldest_ready_at = f.oldest, settled = f.settled, enqueued_total = f.enqueued_total
    from fresh f
    where f.type = s.type
      and (s.waiting, s.scheduled, s.in_flight, s.dead_letters, s.oldest_ready_at, s.settled, s.enqueued_total)
          is distinct from (f.waiting, f.scheduled, f.in_flight, f.dead_letters, f.oldest, f.settled, f.enqueued_total))
  select coalesce(sum(e.settled + e.beyond), 0)::bigint from enqueued e
$$;

create or replace function orchestrator._keep_sample(p_at timestamptz) returns void
language plpgsql set search_path = '' as $$
begin
  -- half a second early is on time, since counts come every 2 seconds or so
  if exists (select from orchestrator.stats_samples s where s.at > p_at - interval '9.5 seconds' and s.at <= p_at) then return; end if;
  delete from orchestrator.stats_samples s where s.at < p_at - interval '2 hours' or s.at > p_at;
  insert into orchestrator.stats_samples
  select p_at, sum(t.waiting), sum(t.scheduled), sum(t.in_flight), sum(t.dead_letters), sum(t.enqueued_total),
         (select s.ended_total from orchestrator.stats_state s where s.complete)
  from orchestrator.type_stats t;
end $$;

create or replace function orchestrator.stats()
returns table (type text, waiting bigint, scheduled bigint, in_flight bigint, dead_letters bigint, oldest_waiting_age interval,
               enqueued_total bigint, paused boolean, count_age interval)
language sql stable set search_path = '' as $$
  select t.type, t.waiting, t.scheduled, t.in_flight, t.dead_letters, clock_timestamp() - t.oldest_ready_at, t.enqueued_total,
         coalesce(p.paused, false), clock_timestamp() - s.counted_at
  from orchestrator.type_stats t cross join orchestrator.stats_state s left join orchestrator.task_types p on p.type = t.type
  order by t.type
$$;
comment on function orchestrator.stats() is
  'By type, what the leader counted last, and how old that is (count_age): cheap whatever waits. queue_stats counts live.';
