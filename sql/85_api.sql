-- What the page shows, one function for each address of /api/. Reads only. Each list walks an index, and not far: the cost doesn't
-- depend on how many tasks there are. Payloads, results and errors have their secrets blanked.

-- In seconds, which a browser whose clock is wrong shows correctly.
create or replace function orchestrator._age(p_at timestamptz) returns double precision
language sql volatile parallel safe
return case when p_at is not null then greatest(round(extract(epoch from clock_timestamp() - p_at), 3), 0)::double precision end;

create or replace function orchestrator._api_types() returns jsonb
language sql as $$
  with handled as (select w.handles, count(*) as n from orchestrator.workers w where w.declared_dead_at is null group by 1),
  listed as (
    select coalesce(s.type, p.type) as type, coalesce(s.type = 'other' and p.type is null, false) as others
    from orchestrator.type_stats s full join orchestrator.task_types p on p.type = s.type
    where s.type is not null or orchestrator._prefix(p.type) is null order by 1 limit 1000)
  select coalesce(jsonb_agg(to_jsonb(t) order by t.others, t.type), '[]')
  from (select y.type, y.others, coalesce(s.waiting, 0) as waiting, coalesce(s.parked, 0) as parked, coalesce(s.scheduled, 0) as scheduled,
          coalesce(s.in_flight, 0) as in_flight, coalesce(s.dead_letters, 0) as dead_letters, coalesce(s.enqueued_total, 0) as enqueued_total,
          orchestrator._age(s.oldest_ready_at) as oldest_waiting,
          exists (select from orchestrator.task_types p where p.paused and not y.others and y.type like p.likes) as paused,
          case when not y.others then (select coalesce(sum(h.n), 0) from handled h where y.type like any (h.handles)) end as workers,
          r.per_second, r.enqueued_per_second, r.failure_share, r.median, r.p95
        from listed y left join orchestrator.type_stats s on s.type = y.type left join orchestrator._recent r on r.type = y.type
        where not y.others or s.enqueued_total > 0) t
$$;

-- overdue: it has been silent for longer than the leader's lease lasts from one heartbeat to its end.
create or replace function orchestrator._api_workers() returns jsonb
language sql as $$
  select coalesce(jsonb_agg(to_jsonb(x) - 'started_at' order by x.started_at, x.id), '[]')
  from (select w.started_at, w.id, w.hostname, w.version, w.pool_size, w.idle, orchestrator._age(w.started_at) as up, w.leader_term as term,
          orchestrator._age(w.last_heartbeat) as heartbeat, w.is_leader and w.leader_until > clock_timestamp() as leads,
          coalesce(clock_timestamp() - w.last_heartbeat > (
            select l.leader_until - l.last_heartbeat from orchestrator.workers l where l.is_leader), false) as overdue,
          w.declared_dead_at is not null as declared_dead, w.stopping_at is not null as stopping,
          (select coalesce(sum(c.open_tasks), 0) from orchestrator.claims c where c.worker_id = w.id) as in_flight,
          (select jsonb_agg(replace(replace(h, '\', ''), '%', '*') order by h) from unnest(w.handles) h) as handles
        from orchestrator.workers w order by w.started_at limit 500) x
$$;

-- Trouble first, then what fires next.
create or replace function orchestrator._api_schedules() returns jsonb
language sql as $$
  select coalesce(jsonb_agg(to_jsonb(x) order by x.error is null, x.paused, x.next_at, x.name), '[]')
  from (select s.name, s.cron, s.timezone, s.type, s.paused, orchestrator.redact_text(s.last_error) as error, s.next_at, s.last_task_id as task_id,
          extract(epoch from s.next_at - clock_timestamp()) as next_in, orchestrator._age(s.last_fire_at) as last,
          orchestrator.redact_text(s.state) as state
        from orchestrator.schedule_states s order by s.last_error is null, s.paused, s.next_at, s.name limit 100) x
$$;

-- keys: the ten with the most in flight.
create or replace function orchestrator._api_limits() returns jsonb
language sql as $$
  select coalesce(jsonb_agg(to_jsonb(x) order by x.limit), '[]')
  from (select l.type as limit, l.max_running, l.max_per_key, l.rate, extract(epoch from l.rate_per) as per, l.in_flight, l.parked, l.started_lately,
          case when l.next_start_at is not null then greatest(round(extract(epoch from l.next_start_at - clock_timestamp()), 3), 0) end as next_start_in,
          (select coalesce(jsonb_agg(jsonb_build_array(k.key, k.n) order by k.n desc, k.key), '[]')
           from (select c.key, sum(c.open_tasks) as n from orchestrator.claims c where c.limit_name = l.type and c.key is not null
                 group by c.key order by n desc, c.key limit 10) k) as keys
        from orchestrator.limits l) x
$$;

create or replace function orchestrator.api_overview() returns jsonb
language sql as $$
  select jsonb_build_object(
    'now', extract(epoch from clock_timestamp()), 'schema_version', orchestrator.schema_version(),
    'counts', jsonb_build_object('age', orchestrator._age(s.counted_at), 'took', extract(epoch from s.took), 'complete', s.complete),
    'totals', to_jsonb(t) - 'oldest' || jsonb_build_object('oldest_waiting', orchestrator._age(t.oldest)),
    'types', orchestrator._api_types(), 'limits', orchestrator._api_limits(), 'workers', orchestrator._api_workers(),
    'schedules', orchestrator._api_schedules())
  from orchestrator._totals t left join orchestrator.stats_state s on true
$$;
comment on function orchestrator.api_overview is
  'Totals, types (counts, paused, how many live workers handle them, rate and share of failures of the last 15 minutes or so, p50 '
  'and p95 of sampled runs), limits and workers, as the leader counted counts.age seconds ago. Ages and durations in seconds.';

create or replace function orchestrator._check_range(p_field text, p_value int, p_max int) returns int
language plpgsql stable as $$
begin
  if p_value is null or p_value not between 1 and p_max then
    perform orchestrator._invalid(p_field, format('must be a whole number from 1 to %s', p_max), 'Leave it out for the default.');
  end if;
  return p_value;
end $$;

create or replace function orchestrator.api_history(p_minutes int default 15) returns jsonb
language sql stable as $$
  select jsonb_build_object(
    'now', extract(epoch from clock_timestamp()),
    'columns', '["at", "waiting", "scheduled", "in_flight", "dead_letters", "enqueued_total", "ended_total", "parked"]'::jsonb,
    'samples', (select coalesce(jsonb_agg(jsonb_build_array(
                  round(extract(epoch from s.at), 3), s.waiting, s.scheduled, s.in_flight, s.dead_letters, s.enqueued_total, s.ended_total, s.parked)
                  order by s.at), '[]')
                from orchestrator.stats_samples s where s.at > clock_timestamp() - make_interval(mins => c.minutes)))
  from (select orchestrator._check_range('minutes', p_minutes, 120) as minutes offset 0) c   -- checked, however empty samples is
$$;
comment on function orchestrator.api_history is
  'p_minutes (1 to 120): the samples of all types together of that time, about every 10 seconds. Raises OR001.';

create or replace function orchestrator.api_tasks(
  p_id text default null, p_type text default null, p_status text default null, p_before text default null, p_limit int default 50,
  p_filter jsonb default '{}')
returns jsonb language plpgsql stable as $$
declare
  v_filter jsonb := coalesce(p_filter, '{}') || jsonb_strip_nulls(jsonb_build_object('id', p_id, 'type', nullif(p_type, ''), 'status', p_status));
  v_left int := orchestrator._check_range('limit', p_limit, 200);
  v_walks text[] := case when v_filter ?| '{id,ids}' then '{ids}' when v_filter ? 'status' or not v_filter ? 'type'
    then orchestrator._walks(v_filter ->> 'status') else orchestrator._walks('unfinished') || '{dead_letter,ids}' end;
  v_walk text := case when p_before is null then v_walks[1] when p_before ~ '^[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}$' then 'ids'
    when p_before ~ '^\w+\+\d{1,5}$' then nullif(split_part(p_before, '+', 1), 'ids') end;
  v_skip int := 0;
  v_before uuid;
  v_ids uuid[] := array[]::uuid[];
  v_looked int := 0;
  v_cut boolean := false;
  r record;
begin
  if v_walk = any (v_walks) is not true then
    perform orchestrator._invalid('before', 'must be what the page before gave as next', 'Leave it out for the first page.');
  elsif v_walk = 'ids' then
    v_before := p_before::uuid;
  else
    v_skip := coalesce(split_part(p_before, '+', 2)::int, 0);
  end if;
  while v_left > 0 and v_looked < 10000 and v_walk is not null loop
    r := orchestrator._matching(case when v_walk = 'ids' and cardinality(v_walks) > 1 then v_filter || '{"status": "ended"}' else v_filter end,
                                v_walk, v_skip, v_before, v_left, 10000);
    v_ids := v_ids || r.ids;
    v_left := v_left - cardinality(r.ids);
    v_looked := v_looked + r.looked;
    v_skip := v_skip + r.stopped;
    if v_walk = 'ids' then
      v_before := r.last;
      v_walk := case when v_before is not null then 'ids' end;
    elsif v_skip < 100000 is not true then
      v_cut := v_cut or v_skip is not null;
      v_skip := 0;
      v_walk := v_walks[array_position(v_walks, v_walk) + 1];
    end if;
  end loop;
  return jsonb_build_object(
    'now', extract(epoch from clock_timestamp()), 'tasks', orchestrator._task_summaries(v_ids), 'cut', v_cut, 'looked', v_looked,
    'next', case when v_walk = 'ids' then coalesce(v_before::text, 'ffffffff-ffff-ffff-ffff-ffffffffffff') else v_walk || '+' || v_skip end,
    'back_to', (select t.created_at from orchestrator.tasks t where t.id = v_before));
end $$;
comment on function orchestrator.api_tasks is
  'Search by a filter (see bulk_tasks; p_id, p_type and p_status are parts of it); p_limit (1 to 200); p_before: next of the page before. '
  'States with an index come in its order, all else the newest first; a type alone: what is in flight, waits, is dead, has ended. A page '
  'looks at some 10,000 tasks (looked), so one that is not full may have a next. back_to: how far back it got; cut: a state''s list ends '
  'at 100,000. Raises OR001.';

create or replace function orchestrator._task_summaries(p_ids uuid[]) returns jsonb
language sql as $$
  select coalesce(jsonb_agg(
    to_jsonb(t) - '{idempotency_key,claim_id,updated_at,recoveries,parked_by,after,expires_at}'::text[] || jsonb_build_object(
      'max_retries', coalesce(t.max_retries, (orchestrator._policy(t.type)).max_retries), 'payload', r.preview,
      'last_error', left(orchestrator.redact_text(t.last_error), 500), 'due_in', round(extract(epoch from t.next_retry_at - clock_timestamp()), 3))
    || case when t.status in ('claimed', 'running') then
      jsonb_build_object('age', orchestrator._age(coalesce(t.started_at, t.claimed_at)), 'progress', r.progress) else '{}' end order by u.place), '[]')
  from unnest(p_ids) with ordinality u(id, place)
  cross join lateral (select * from orchestrator._bare_tasks b where b.id = u.id limit 1) t
  cross join lateral (select * from orchestrator._redacted_tasks b where b.id = u.id limit 1) r
$$;

create or replace function orchestrator.api_failures(p_type text default null, p_limit int default 50) returns jsonb
language sql as $$
  select jsonb_build_object('now', extract(epoch from clock_timestamp()), 'failures', coalesce(jsonb_agg(to_jsonb(f) order by f.event desc), '[]'))
  from (select e.id as event, e.task_id, t.type, t.status, e.attempt, e.worker_id, orchestrator._age(e.at) as age,
               left(orchestrator.redact_text(e.detail), 500) as error
        from (select * from orchestrator.task_events e order by e.id desc limit 5000) e
        left join lateral (select t.type, t.status from orchestrator.tasks t where t.id = e.task_id limit 1) t on true
        where e.event = 'failed' and (p_type is null or t.type = p_type)
        order by e.id desc limit orchestrator._check_range('limit', p_limit, 200)) f
$$;
comment on function orchestrator.api_failures is
  'p_type, p_limit (1 to 200): failed attempts among the last 5000 events, the newest first, with the error. Raises OR001.';

create or replace function orchestrator.api_operations(p_limit int default 50) returns jsonb
language sql as $$
  select jsonb_build_object('now', extract(epoch from clock_timestamp()), 'operations', coalesce(jsonb_agg(to_jsonb(o) - 'next_after'
    || jsonb_build_object('filter', orchestrator.redact(o.filter), 'value', orchestrator.redact(o.value)) order by o.id desc), '[]'))
  from (select * from orchestrator.operations x order by x.id desc limit orchestrator._check_range('limit', p_limit, 1000)) o
$$;
comment on function orchestrator.api_operations is 'p_limit (1 to 1000): what operators did, the newest first. Raises OR001.';
