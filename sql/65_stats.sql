-- Counting, done by the leader, once for the page, the metrics and psql. Writes type_stats, stats_state and stats_samples.
-- Lock order: the leader's row → leader_state → stats_state → type_stats.
-- What waits is counted along the partial indexes: a million ready tasks take 0.08 s. The next count comes 200 times as long after one
-- as that took, at most a minute later: less than 1% of a core.
-- Each task ever enqueued is counted once, along the primary key, which is time. Tasks below the cursor are settled: it stays below the
-- safe floor (35_floors.sql), so nobody can still commit there. Those above it are counted anew each time, so a long transaction holds
-- back nothing but the cursor.

create table if not exists orchestrator.type_stats (
  type            text collate "C" primary key,
  since           uuid not null,               -- tasks with a smaller id count as other: the type had no row yet
  waiting         bigint not null default 0,   -- counting stops at 5 million of all types
  parked          bigint not null default 0,   -- their concurrency key is full
  scheduled       bigint not null default 0,
  blocked         bigint not null default 0,   -- of those scheduled: they wait for other tasks
  in_flight       bigint not null default 0,
  dead_letters    bigint not null default 0,
  oldest_ready_at timestamptz,
  settled         bigint not null default 0,   -- of enqueued_total, those below the cursor
  enqueued_total  bigint not null default 0,
  ended_total     bigint generated always as (enqueued_total - waiting - parked - scheduled - in_flight) stored,   -- falls when one is retried
  recent_at       timestamptz,
  recent          double precision[] not null default '{0,0,0,0,0}',   -- see _recent
  runs            real[] not null default '{}',   -- seconds that the latest 100 sampled runs took
  median          real,
  p95             real
) with (fillfactor = 50);
comment on table orchestrator.type_stats is
  'The counts of each registered type, of up to 200 others that were seen, and of the rest together as other, as of '
  'stats_state.counted_at; queue_stats counts live. enqueued_total counts each task once, and never falls.';

create table if not exists orchestrator.stats_state (
  one         boolean primary key default true check (one),
  cursor      uuid not null default '00000000-0000-0000-0000-000000000000',   -- tasks with a smaller id are settled
  counted_at  timestamptz,
  took        interval not null default '0',
  next_at     timestamptz,
  complete    boolean not null default false,   -- false while a count catches up on millions, and ended_total is wrong
  last_event  bigint,
  last_claim  bigint,
  watched     uuid[] not null default '{}'      -- sampled tasks that had not ended at the last count
) with (fillfactor = 50);
insert into orchestrator.stats_state (one) select true where not exists (select from orchestrator.stats_state);
comment on table orchestrator.stats_state is 'When and how the counts in type_stats were taken; one row.';

create table if not exists orchestrator.stats_samples (
  at             timestamptz primary key,
  waiting        bigint not null,
  scheduled      bigint not null,
  in_flight      bigint not null,
  dead_letters   bigint not null,
  enqueued_total bigint not null,
  ended_total    bigint,
  parked         bigint not null default 0
);
comment on table orchestrator.stats_samples is
  'The counts of all types together, about every 10 seconds, for 2 hours. Throughput is the difference of two samples.';

-- What waits or rests, by type, each along its partial index: at most 5 million, so that it takes seconds at worst.
create or replace function orchestrator._count_live()
returns table (type text, waiting bigint, oldest timestamptz, parked bigint, scheduled bigint, in_flight bigint, dead_letters bigint, blocked bigint)
language sql stable as $$
  select u.type, sum(u.waiting)::bigint, min(u.oldest), sum(u.parked)::bigint, sum(u.scheduled)::bigint, sum(u.in_flight)::bigint, sum(u.dead)::bigint,
         sum(u.blocked)::bigint
  from (
    select r.type, count(*) as waiting, min(r.queued_at) as oldest, 0 as parked, 0 as scheduled, 0 as in_flight, 0 as dead, 0 as blocked
    from (select t.type, t.queued_at from orchestrator.tasks t where t.queued_at is not null
          order by t.type, t.priority desc, t.queued_at limit 5000000) r group by 1
    union all
    select p.type, 0, null, count(*), 0, 0, 0, 0
    from (select t.type from orchestrator.tasks t where t.parked_at is not null
          order by t.parked_by, t.concurrency_key, t.type, t.priority desc, t.parked_at limit 5000000) p group by 1
    union all
    select s.type, 0, null, 0, count(*), 0, 0, count(s.blocked_until)
    from (select t.type, t.blocked_until from orchestrator.tasks t where t.next_retry_at is not null order by t.next_retry_at limit 5000000) s group by 1
    union all
    select f.type, 0, null, 0, 0, count(*), 0, 0
    -- the limit keeps the planner from turning the join around, to walk all tasks that ever had a claim
    from orchestrator.claims c cross join lateral (select t.type from orchestrator.tasks t
          where t.claim_id = c.id and t.status in ('claimed', 'running') limit 5000000) f group by 1
    union all
    select d.type, 0, null, 0, 0, 0, count(*), 0
    from (select t.type from orchestrator.tasks t where t.dead_at is not null order by t.dead_at limit 5000000) d group by 1
  ) u group by 1
$$;

create or replace view orchestrator._totals as
  select coalesce(sum(s.waiting), 0) as waiting, coalesce(sum(s.parked), 0) as parked, coalesce(sum(s.scheduled), 0) as scheduled,
         coalesce(sum(s.in_flight), 0) as in_flight, coalesce(sum(s.dead_letters), 0) as dead_letters,
         coalesce(sum(s.enqueued_total), 0) as enqueued_total, min(s.oldest_ready_at) as oldest,
         case when (select c.complete from orchestrator.stats_state c) then sum(s.ended_total) end as ended_total
  from orchestrator.type_stats s;

create or replace view orchestrator._unregistered as
  select s.* from orchestrator.type_stats s
  where s.type <> 'other' and not exists (select from orchestrator.task_types p where p.type = s.type);

-- Gives each registered type a row, and up to 200 others: first those that wait, then those enqueued lately. When these are used up and
-- another type waits, idle ones are added to other.
create or replace function orchestrator._name_types(p_since uuid) returns void
language plpgsql as $$
declare
  v_new text[];
  v_waiting int;   -- of them
begin
  insert into orchestrator.type_stats (type, since)
  select 'other', p_since union select p.type, p_since from orchestrator.task_types p where orchestrator._prefix(p.type) is null
  on conflict (type) do nothing;
  select array_agg(y.type order by y.late, y.type), count(*) filter (where y.late = 0) into v_new, v_waiting
  from (select u.type, min(u.late) as late
        from (select r as type, 0 as late from orchestrator._ready_types('', '{}') r
              union all
              (select t.type, 0 from orchestrator.tasks t where t.next_retry_at is not null order by t.next_retry_at limit 1000)
              union all
              (select t.type, 1 from orchestrator.tasks t order by t.id desc limit 1000)) u
        where not exists (select from orchestrator.type_stats s where s.type = u.type) group by u.type) y;
  if v_waiting > 0 and (select count(*) from orchestrator._unregistered) >= 200 then
    with idle as (
      delete from orchestrator.type_stats s
      where s.type in (select u.type from orchestrator._unregistered u where u.ended_total = u.enqueued_total and u.dead_letters = 0)
      returning s.settled, s.enqueued_total)
    update orchestrator.type_stats o set settled = o.settled + g.settled, enqueued_total = o.enqueued_total + g.enqueued
    from (select sum(i.settled) as settled, sum(i.enqueued_total) as enqueued from idle i having count(*) > 0) g where o.type = 'other';
  end if;
  insert into orchestrator.type_stats (type, since)
  select u.type, p_since from unnest(v_new) with ordinality u(type, o)
  order by u.o limit (select greatest(200 - count(*), 0) from orchestrator._unregistered);
end $$;

-- One statement, so one snapshot: what ended is a difference of these counts. greatest: retention may delete what is not settled yet, and
-- a counter must not fall. The recent sums begin after a complete count: catching up looks like as many endings. Returns how many tasks
-- it went through along the primary key.
create or replace function orchestrator._store_counts(p_state orchestrator.stats_state, p_to uuid, p_limit int, p_at timestamptz) returns bigint
language sql set enable_hashjoin = on as $$
  with counts as (
    select l.*, 0 as settled, 0 as seen, 0 as failed, 0 as dead from orchestrator._count_live() l
    union all
    select coalesce(s.type, 'other'), 0, null, 0, 0, 0, 0, 0, count(*) filter (where t.id < p_to), count(*), 0, 0
    from (select t.id, t.type from orchestrator.tasks t where t.id >= p_state.cursor order by t.id limit p_limit) t
    left join orchestrator.type_stats s on s.type = t.type and t.id >= s.since group by 1
    union all
    select t.type, 0, null, 0, 0, 0, 0, 0, 0, 0, count(*) filter (where e.event = 'failed'), count(*) filter (where e.event = 'dead_letter')
    from (select e.task_id, e.event from orchestrator.task_events e where e.id > p_state.last_event order by e.id limit 20000) e
    cross join lateral (select t.type from orchestrator.tasks t where t.id = e.task_id limit 1) t
    where e.event in ('failed', 'dead_letter') group by 1
    union all
    select k.type, 0, null, 0, 0, 0, 0, 0, 0, 0, 0, 0 from orchestrator.type_stats k),
  counted as materialized (
    select coalesce(s.type, 'other') as type, sum(c.waiting) as waiting, min(c.oldest) as oldest, sum(c.parked) as parked, sum(c.scheduled) as scheduled,
           sum(c.blocked) as blocked, sum(c.in_flight) as in_flight, sum(c.dead_letters) as dead_letters, sum(c.settled) as settled, sum(c.seen) as seen,
           sum(c.failed) as failed, sum(c.dead) as dead
    from counts c left join orchestrator.type_stats s on s.type = c.type group by 1),
  changes as (
    select c.*, n.enqueued_total, n.enqueued_total - k.enqueued_total as enqueued, n.seconds,
           greatest(n.enqueued_total - c.waiting - c.parked - c.scheduled - c.in_flight - k.ended_total, 0) as ended
    from counted c join orchestrator.type_stats k on k.type = c.type
    cross join lateral (
      select greatest(k.enqueued_total, k.settled + c.seen) as enqueued_total,
             greatest(extract(epoch from p_at - coalesce(k.recent_at, p_state.counted_at, p_at)), 0)::double precision as seconds) n),
  stored as (
    update orchestrator.type_stats s
    set waiting = c.waiting, parked = c.parked, scheduled = c.scheduled, blocked = c.blocked, in_flight = c.in_flight, dead_letters = c.dead_letters,
        oldest_ready_at = c.oldest, settled = s.settled + c.settled, enqueued_total = c.enqueued_total, recent_at = p_at,
        recent = (select array_agg(r.old * exp(-c.seconds / 900) + r.new * p_state.complete::int order by r.o)
                  from unnest(s.recent, array[c.seconds, c.enqueued, c.ended, greatest(c.ended - c.dead, 0) + c.failed, c.failed])
                  with ordinality r(old, new, o))
    from changes c
    where c.type = s.type and (s.waiting, s.parked, s.scheduled, s.blocked, s.in_flight, s.dead_letters, s.oldest_ready_at, s.enqueued_total, 0, 0)
          is distinct from (c.waiting, c.parked, c.scheduled, c.blocked, c.in_flight, c.dead_letters, c.oldest, c.enqueued_total, c.settled, c.failed))
  select coalesce(sum(c.seen), 0)::bigint from counted c
$$;

-- Follows the first 500 tasks claimed after each count to their ends.
create or replace function orchestrator._sample_runs(p_last bigint, p_watched uuid[]) returns void
language plpgsql as $$
declare
  v_newest bigint := coalesce((select t.claim_id from orchestrator.tasks t where t.claim_id is not null order by t.claim_id desc limit 1), 0);
  v_ids uuid[] := p_watched || array(select t.id from orchestrator.tasks t where t.claim_id > least(coalesce(p_last, v_newest), v_newest)
                                     order by t.claim_id limit 500);
begin
  with ended as (
    select s.type, (array_agg(extract(epoch from t.completed_at - t.started_at)::real) || min(s.runs))[1:100] as runs
    from orchestrator.tasks t join orchestrator.type_stats s
      on s.type = coalesce((select k.type from orchestrator.type_stats k where k.type = t.type), 'other')
    where t.id = any (v_ids) and t.status = 'completed' group by s.type)
  update orchestrator.type_stats s set runs = r.runs, median = q.both[1], p95 = q.both[2]
  from ended r cross join lateral (
    select percentile_cont('{0.5,0.95}'::double precision[]) within group (order by u) as both from unnest(r.runs) u) q
  where r.type = s.type;
  update orchestrator.stats_state
  set last_claim = v_newest,
      watched = array(select t.id from orchestrator.tasks t where t.id = any (v_ids) and t.status in ('claimed', 'running') limit 500);
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
  -- the lag: an id is drawn a moment before the insert that brings it
  v_to := greatest(s.cursor, orchestrator._uuid_at(orchestrator._advance_safe_floor() - p_lag));
  select coalesce(max(e.id), 0) into v_event from orchestrator.task_events e;
  s.last_event := least(s.last_event, v_event);   -- its sequence may have been set back
  s.complete := orchestrator._store_counts(s, v_to, p_limit, v_start) < p_limit;
  if not s.complete then
    v_to := least(v_to, (select t.id from orchestrator.tasks t where t.id >= s.cursor order by t.id offset p_limit limit 1));
  end if;
  perform orchestrator._sample_runs(s.last_claim, s.watched);
  s.counted_at := clock_timestamp();
  s.took := s.counted_at - v_start;
  s.next_at := s.counted_at + least(greatest(200 * s.took, interval '2 seconds'), interval '1 minute');
  update orchestrator.stats_state
  set cursor = v_to, counted_at = s.counted_at, took = s.took, next_at = s.next_at, complete = s.complete, last_event = v_event;
  delete from orchestrator.stats_samples x where x.at < s.counted_at - interval '2 hours' or x.at > s.counted_at;
  insert into orchestrator.stats_samples
  select s.counted_at, t.waiting, t.scheduled, t.in_flight, t.dead_letters, t.enqueued_total, t.ended_total, t.parked
  -- half a second early is on time, since counts come every 2 seconds or so
  from orchestrator._totals t where not exists (select from orchestrator.stats_samples x where x.at > s.counted_at - interval '9.5 seconds');
  return extract(epoch from s.next_at - s.counted_at);
end $$;
comment on function orchestrator.sample_stats is
  'The leader''s: counts tasks into type_stats, and every 10 seconds into stats_samples, if a count is due. Goes through at most p_limit '
  'tasks of the primary key, and settles those older than p_lag before the safe floor. Returns the seconds until the next count is '
  'due; null under a stale term.';
