-- Counting, done by the leader, once for the page, the metrics and psql. Writes type_stats, stats_state and stats_samples; reads
-- tasks, claims, workers, task_types and task_events. Lock order: the leader's row → leader_state → stats_state → type_stats.
--
-- What waits is counted along the partial indexes, in one snapshot with what was enqueued. The next count comes 200 times as
-- long after a count as that count took, at most a minute later: less than 1% of one core. A million ready tasks take 0.08 s.
--
-- Each task ever enqueued is counted once, along the primary key, which is time. Tasks below the cursor are settled: the cursor
-- stays below the safe floor (35_floors.sql), so nobody can still commit there. Visible tasks above it are counted anew each
-- time, so a long transaction holds back nothing but the cursor. What ended = enqueued - waiting - scheduled - in flight.

create table if not exists orchestrator.type_stats (
  type            text collate "C" primary key,
  since           uuid not null,
  waiting         bigint not null default 0,
  scheduled       bigint not null default 0,
  in_flight       bigint not null default 0,
  dead_letters    bigint not null default 0,
  oldest_ready_at timestamptz,
  settled         bigint not null default 0,
  enqueued_total  bigint not null default 0,
  recent_at       timestamptz,
  recent_seconds  double precision not null default 0,
  recent_enqueued double precision not null default 0,
  recent_ended    double precision not null default 0,
  recent_attempts double precision not null default 0,
  recent_failures double precision not null default 0,
  runs            real[] not null default '{}',
  median          real,
  p95             real
) with (fillfactor = 50);
comment on table orchestrator.type_stats is
  'The counts of each registered type, of up to 200 other types that were seen, and of all the rest together as other. As of '
  'stats_state.counted_at; queue_stats counts live.';
comment on column orchestrator.type_stats.since is 'Tasks with a smaller id were enqueued before the type got its own row: they count as other.';
comment on column orchestrator.type_stats.waiting is 'Ready to be claimed; counting stops at 5 million of all types.';
comment on column orchestrator.type_stats.scheduled is 'Delayed, snoozed or to be retried later.';
comment on column orchestrator.type_stats.settled is 'Of enqueued_total, those below stats_state.cursor.';
comment on column orchestrator.type_stats.enqueued_total is 'Tasks ever enqueued, each counted once; a repeated idempotency key is not counted. It never falls.';
comment on column orchestrator.type_stats.recent_at is
  'When the recent_ columns were last updated. They are sums that decay with a time constant of 15 minutes, as a load average '
  'does: recent_ended / recent_seconds is the throughput. recent_failures are failed attempts of recent_attempts.';
comment on column orchestrator.type_stats.runs is
  'Seconds from start (from the claim, if it completed before it was marked as running) to completion of the latest 100 sampled '
  'runs; median and p95 are theirs. The sample: the first 500 tasks claimed after each count, each followed to its end.';

create table if not exists orchestrator.stats_state (
  one         boolean primary key default true check (one),
  cursor      uuid not null default '00000000-0000-0000-0000-000000000000',
  counted_at  timestamptz,
  took        interval not null default '0',
  next_at     timestamptz,
  complete    boolean not null default false,
  ended_total bigint,
  last_event  bigint,
  last_claim  bigint,
  watched     uuid[] not null default '{}'
) with (fillfactor = 50);
insert into orchestrator.stats_state (one) select true where not exists (select from orchestrator.stats_state);
comment on table orchestrator.stats_state is 'When and how the counts in type_stats were taken; one row.';
comment on column orchestrator.stats_state.cursor is 'Tasks with a smaller id are settled: counted for good.';
comment on column orchestrator.stats_state.took is 'How long the last count took; the next comes 200 times that later, 2 seconds at least and a minute at most.';
comment on column orchestrator.stats_state.complete is 'Whether the last count reached the newest task; false while it catches up on millions.';
comment on column orchestrator.stats_state.ended_total is
  'enqueued less waiting, scheduled and in flight; it falls when an ended task is retried. Null until complete.';
comment on column orchestrator.stats_state.watched is 'Sampled tasks that had not ended at the last count, at most 500.';

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
set search_path = pg_catalog, pg_temp set plan_cache_mode = force_generic_plan
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
language sql stable as $$
  select coalesce(s.type, 'other'), count(*) filter (where t.id < p_to), count(*) filter (where t.id >= p_to)
  from (select t.id, t.type from orchestrator.tasks t where t.id >= p_from order by t.id limit p_limit) t
  left join orchestrator.type_stats s on s.type = t.type and t.id >= s.since
  group by 1
$$;

-- Failed attempts by type among the first 20,000 events after p_after, and how many of them ended the task.
create or replace function orchestrator._count_failures(p_after bigint)
returns table (type text, failed bigint, dead bigint)
language sql stable as $$
  select coalesce(s.type, 'other'), count(*) filter (where e.event = 'failed'), count(*) filter (where e.event = 'dead_letter')
  from (select e.task_id, e.event from orchestrator.task_events e where e.id > p_after order by e.id limit 20000) e
  cross join lateral (select t.type from orchestrator.tasks t where t.id = e.task_id limit 1) t
  left join orchestrator.type_stats s on s.type = t.type
  where e.event in ('failed', 'dead_letter') group by 1
$$;

-- Gives each registered type a row, and up to 200 others: first those that wait, then those enqueued lately. When these rows
-- are used up and another type waits, those of idle types are added to other, so that no task is counted twice or lost.
create or replace function orchestrator._name_types(p_since uuid) returns void
language plpgsql as $$
declare
  v_room int;
  v_waiting text[];
begin
  insert into orchestrator.type_stats (type, since)
  select 'other', p_since
  union
  select p.type, p_since from orchestrator.task_types p where right(p.type, 1) not in ('*', ':')
  on conflict (type) do nothing;
  v_waiting := array(
    select y.type from (select t.type from orchestrator._ready_types('', '{}') t(type)
                        union select t.type from (select t.type from orchestrator.tasks t where t.next_retry_at is not null
                                                  order by t.next_retry_at limit 1000) t) y
    where not exists (select from orchestrator.type_stats s where s.type = y.type) order by y.type);
  select 200 - count(*) into v_room from orchestrator.type_stats s
  where s.type <> 'other' and not exists (select from orchestrator.task_types p where p.type = s.type);
  if v_room <= 0 and v_waiting <> '{}' then
    with idle as (
      delete from orchestrator.type_stats s
      where s.type <> 'other' and s.waiting + s.scheduled + s.in_flight + s.dead_letters = 0
        and not exists (select from orchestrator.task_types p where p.type = s.type)
      returning s.settled, s.enqueued_total),
    gone as (select count(*) as n, sum(i.settled) as settled, sum(i.enqueued_total) as enqueued from idle i)
    update orchestrator.type_stats o set settled = o.settled + g.settled, enqueued_total = o.enqueued_total + g.enqueued
    from gone g where o.type = 'other' and g.n > 0;
    select 200 - count(*) into v_room from orchestrator.type_stats s
    where s.type <> 'other' and not exists (select from orchestrator.task_types p where p.type = s.type);
  end if;
  insert into orchestrator.type_stats (type, since)
  select y.type, p_since
  from (select u.type, u.o from unnest(v_waiting) with ordinality u(type, o)
        union all
        select t.type, null from (select t.type from orchestrator.tasks t order by t.id desc limit 1000) t
        where not exists (select from orchestrator.type_stats s where s.type = t.type) group by 1) y
  order by y.o limit greatest(v_room, 0)
  on conflict (type) do nothing;
end $$;

create or replace function orchestrator.sample_stats(
  p_worker_id text, p_term bigint, p_limit int default 2000000, p_lag interval default '5 seconds')
returns double precision language plpgsql as $$
declare
  v_start timestamptz;
  v_to uuid;
  v_event bigint;
  s orchestrator.stats_state;
begin
  perform set_config('synchronous_commit', 'off', true);
  if not orchestrator._leads(p_worker_id, p_term) then return null; end if;
  select * into s from orchestrator.stats_state for no key update;
  v_start := clock_timestamp();
  if s.next_at > v_start and s.next_at < v_start + interval '10 minutes' then   -- later: the clock was set back
    return extract(epoch from s.next_at - v_start);
  end if;
  perform orchestrator._name_types(coalesce(orchestrator._uuid_at(s.counted_at + interval '10 milliseconds'), s.cursor));
  v_to := greatest(s.cursor, orchestrator._uuid_at(orchestrator._advance_safe_floor() - p_lag));
  select coalesce(max(e.id), 0) into v_event from orchestrator.task_events e;
  s.last_event := least(coalesce(s.last_event, v_event), v_event);   -- its sequence may have been set back
  s.complete := orchestrator._store_counts(s, v_to, p_limit, v_start) < p_limit;
  if not s.complete then
    v_to := least(v_to, (select t.id from orchestrator.tasks t where t.id >= s.cursor order by t.id offset p_limit limit 1));
  end if;
  select r.last_claim, r.watched into s.last_claim, s.watched from orchestrator._sample_runs(s.last_claim, s.watched) r;
  s.counted_at := clock_timestamp();
  s.took := s.counted_at - v_start;
  s.next_at := s.counted_at + least(greatest(200 * s.took, interval '2 seconds'), interval '1 minute');
  update orchestrator.stats_state o
  set cursor = v_to, counted_at = s.counted_at, took = s.took, next_at = s.next_at, complete = s.complete,
      ended_total = case when s.complete then n.ended else o.ended_total end,
      last_event = v_event, last_claim = s.last_claim, watched = s.watched
  from (select sum(t.enqueued_total - t.waiting - t.scheduled - t.in_flight) as ended from orchestrator.type_stats t) n;
  perform orchestrator._keep_sample(s.counted_at);
  return extract(epoch from s.next_at - s.counted_at);
end $$;
comment on function orchestrator.sample_stats(text, bigint, int, interval) is
  'The leader''s: counts tasks into type_stats, and every 10 seconds into stats_samples, unless the next count isn''t due. Goes '
  'through at most p_limit tasks of the primary key a call, and settles those older than p_lag before the safe floor. (An id is '
  'drawn a moment before the insert that brings it.) Returns the seconds until the next count is due; null under a stale term.';

-- One statement, so one snapshot: what ended is a difference of these counts. greatest: retention may delete what is not
-- settled yet, and a counter must not fall. The recent sums begin after a complete count, since catching up on millions looks
-- like as many endings. Returns how many tasks it went through along the primary key.
create or replace function orchestrator._store_counts(p_state orchestrator.stats_state, p_to uuid, p_limit int, p_at timestamptz) returns bigint
language sql set enable_hashjoin = on as $$
  with enqueued as materialized (select * from orchestrator._count_enqueued(p_state.cursor, p_to, p_limit)),
  live as materialized (
    select coalesce(s.type, 'other') as type, sum(l.waiting) as waiting, min(l.oldest) as oldest, sum(l.scheduled) as scheduled,
           sum(l.in_flight) as in_flight, sum(l.dead_letters) as dead_letters
    from orchestrator._count_live() l left join orchestrator.type_stats s on s.type = l.type group by 1),
  failures as materialized (select * from orchestrator._count_failures(p_state.last_event)),
  counted as (
    select k.type, coalesce(l.waiting, 0) as waiting, coalesce(l.scheduled, 0) as scheduled, coalesce(l.in_flight, 0) as in_flight,
           coalesce(l.dead_letters, 0) as dead_letters, l.oldest, k.settled + coalesce(e.settled, 0) as settled,
           greatest(k.enqueued_total, k.settled + coalesce(e.settled + e.beyond, 0)) as enqueued_total,
           coalesce(f.failed, 0) as failed, coalesce(f.dead, 0) as dead
    from orchestrator.type_stats k left join live l on l.type = k.type left join enqueued e on e.type = k.type
    left join failures f on f.type = k.type),
  changes as (
    select c.*, case when p_state.complete then 1 else 0 end as known, c.enqueued_total - k.enqueued_total as enqueued,
           greatest(c.enqueued_total - c.waiting - c.scheduled - c.in_flight
                    - (k.enqueued_total - k.waiting - k.scheduled - k.in_flight), 0) as ended,
           greatest(extract(epoch from p_at - coalesce(k.recent_at, p_state.counted_at, p_at)), 0)::double precision as seconds
    from counted c join orchestrator.type_stats k on k.type = c.type),
  stored as (
    update orchestrator.type_stats s
    set waiting = c.waiting, scheduled = c.scheduled, in_flight = c.in_flight, dead_letters = c.dead_letters,
        oldest_ready_at = c.oldest, settled = c.settled, enqueued_total = c.enqueued_total, recent_at = p_at,
        recent_seconds = s.recent_seconds * exp(-c.seconds / 900) + c.seconds * c.known,
        recent_enqueued = s.recent_enqueued * exp(-c.seconds / 900) + c.enqueued * c.known,
        recent_ended = s.recent_ended * exp(-c.seconds / 900) + c.ended * c.known,
        recent_failures = s.recent_failures * exp(-c.seconds / 900) + c.failed * c.known,
        recent_attempts = s.recent_attempts * exp(-c.seconds / 900) + (greatest(c.ended - c.dead, 0) + c.failed) * c.known
    from changes c
    where c.type = s.type
      and (s.waiting, s.scheduled, s.in_flight, s.dead_letters, s.oldest_ready_at, s.settled, s.enqueued_total, 0)
          is distinct from (c.waiting, c.scheduled, c.in_flight, c.dead_letters, c.oldest, c.settled, c.enqueued_total, c.failed))
  select coalesce(sum(e.settled + e.beyond), 0)::bigint from enqueued e
$$;

-- Looks at the first 500 tasks claimed since the last look, and at those that had not ended then, and notes how long they took.
create or replace function orchestrator._sample_runs(inout last_claim bigint, inout watched uuid[])
language plpgsql as $$
#variable_conflict use_variable
declare
  v_newest bigint := coalesce((select t.claim_id from orchestrator.tasks t where t.claim_id is not null order by t.claim_id desc limit 1), 0);
begin
  watched := watched || array(select t.id from orchestrator.tasks t where t.claim_id > least(coalesce(last_claim, v_newest), v_newest)
                              order by t.claim_id limit 500);
  last_claim := v_newest;
  with ended as materialized (
    select coalesce(s.type, 'other') as type, extract(epoch from t.completed_at - t.started_at)::real as seconds
    from orchestrator.tasks t left join orchestrator.type_stats s on s.type = t.type
    where t.id = any (watched) and t.status = 'completed'),
  runs as (
    select s.type, (array_agg(e.seconds) || min(s.runs))[1:100] as runs
    from ended e join orchestrator.type_stats s on s.type = e.type group by s.type)
  update orchestrator.type_stats s set runs = r.runs, median = q.both[1], p95 = q.both[2]
  from runs r cross join lateral (
    select percentile_cont('{0.5,0.95}'::double precision[]) within group (order by u) as both from unnest(r.runs) u) q
  where r.type = s.type;
  watched := array(select t.id from orchestrator.tasks t where t.id = any (watched) and t.status in ('claimed', 'running') limit 500);
end $$;

create or replace function orchestrator._keep_sample(p_at timestamptz) returns void
language plpgsql as $$
begin
  -- half a second early is on time, since counts come every 2 seconds or so
  if exists (select from orchestrator.stats_samples s where s.at > p_at - interval '9.5 seconds' and s.at <= p_at) then return; end if;
  delete from orchestrator.stats_samples s where s.at < p_at - interval '2 hours' or s.at > p_at;
  insert into orchestrator.stats_samples
  select p_at, sum(t.waiting), sum(t.scheduled), sum(t.in_flight), sum(t.dead_letters), sum(t.enqueued_total),
         (select s.ended_total from orchestrator.stats_state s where s.complete)
  from orchestrator.type_stats t;
end $$;
