-- What the page shows, one function for each address of /api/: `select orchestrator.api_overview('{}')` in psql is what the page
-- sees. Each takes the parameters of the address as one object of strings. Reads only, except for the last section, which
-- calls the functions of 70_operate.sql. Each list walks an index, and not far: the cost doesn't depend on how many tasks
-- there are. Payloads and results come with their secrets blanked.

-- The parameters, or OR001: a misspelt name must not be ignored.
create or replace function orchestrator._api_check(p jsonb, p_known text[]) returns void
language plpgsql stable set search_path = '' as $$
declare
  v_key text;
begin
  if jsonb_typeof(p) is distinct from 'object' then
    perform orchestrator._invalid('parameters', 'must be a JSON object', 'Such as {"id": "…"}.');
  end if;
  select e.key into v_key from jsonb_each(p) e where e.key <> all (p_known) order by e.key limit 1;
  if found then
    perform orchestrator._invalid(left(v_key, 50), 'is not a parameter here',
                                  case when p_known = '{}' then 'It takes none.' else 'It takes: ' || array_to_string(p_known, ', ') || '.' end);
  end if;
  select e.key into v_key from jsonb_each(p) e where jsonb_typeof(e.value) in ('object', 'array') order by e.key limit 1;
  if found then
    perform orchestrator._invalid(v_key, 'must be a string', 'Such as {"id": "…"}.');
  end if;
end $$;

-- A parameter as text; an empty one is as good as none.
create or replace function orchestrator._api_text(p jsonb, p_key text) returns text
language sql immutable parallel safe as $$ select nullif(btrim(p ->> p_key), '') $$;

create or replace function orchestrator._api_int(p jsonb, p_key text, p_default int, p_min int, p_max int) returns int
language plpgsql stable set search_path = '' as $$
declare
  v_text text := orchestrator._api_text(p, p_key);
begin
  if v_text is null then return p_default; end if;
  if v_text !~ '^\d{1,9}$' or v_text::int not between p_min and p_max then
    perform orchestrator._invalid(p_key, format('must be a whole number from %s to %s', p_min, p_max), 'Leave it out for the default.');
  end if;
  return v_text::int;
end $$;

create or replace function orchestrator._api_id(p jsonb) returns uuid
language plpgsql stable set search_path = '' as $$
declare
  v_text text := orchestrator._api_text(p, 'id');
begin
  if v_text is null or v_text !~* '^[0-9a-f]{8}(-?[0-9a-f]{4}){3}-?[0-9a-f]{12}$' then
    perform orchestrator._invalid('id', 'must be the whole id of a task', 'Such as 01890a5d-ac96-774b-bcce-b302099a8057; tasks?id= finds it by its beginning.');
  end if;
  return v_text::uuid;
end $$;

create or replace function orchestrator._api_type(p jsonb) returns text
language plpgsql stable set search_path = '' as $$
declare
  v_type text := p ->> 'type';
begin
  perform orchestrator._check_task(v_type, 0, null, null, null);
  return v_type;
end $$;

-- An age in seconds, which a browser whose clock is wrong shows rightly.
create or replace function orchestrator._age(p_at timestamptz) returns double precision
language sql volatile parallel safe as $$
  select case when p_at is not null then greatest(round(extract(epoch from clock_timestamp() - p_at), 3), 0)::double precision end
$$;

create or replace function orchestrator.api_overview(p jsonb default '{}') returns jsonb
language plpgsql set search_path = '' as $$
begin
  perform orchestrator._api_check(p, '{}');
  return jsonb_build_object(
    'now', extract(epoch from clock_timestamp()),
    'schema_version', orchestrator.schema_version(),
    'counts', (select jsonb_build_object('age', orchestrator._age(s.counted_at), 'took', extract(epoch from s.took), 'complete', s.complete)
               from orchestrator.stats_state s),
    'totals', (select jsonb_build_object(
                 'waiting', coalesce(sum(t.waiting), 0), 'scheduled', coalesce(sum(t.scheduled), 0), 'in_flight', coalesce(sum(t.in_flight), 0),
                 'dead_letters', coalesce(sum(t.dead_letters), 0), 'oldest_waiting', orchestrator._age(min(t.oldest_ready_at)),
                 'enqueued_total', coalesce(sum(t.enqueued_total), 0), 'ended_total', (select s.ended_total from orchestrator.stats_state s))
               from orchestrator.type_stats t),
    'types', orchestrator._api_types(),
    'workers', orchestrator._api_workers());
end $$;
comment on function orchestrator.api_overview(jsonb) is
  'Totals, types (counts, paused, how many live workers handle them) and workers (who leads, heartbeat age, tasks in flight), as '
  'the leader counted counts.age seconds ago. Ages in seconds.';

create or replace function orchestrator._api_types() returns jsonb
language sql set search_path = '' as $$
  select coalesce(jsonb_agg(jsonb_build_object(
    'type', y.type, 'waiting', coalesce(s.waiting, 0), 'scheduled', coalesce(s.scheduled, 0), 'in_flight', coalesce(s.in_flight, 0),
    'dead_letters', coalesce(s.dead_letters, 0), 'oldest_waiting', orchestrator._age(s.oldest_ready_at),
    'enqueued_total', coalesce(s.enqueued_total, 0), 'paused', coalesce(y.paused, false), 'others', y.others,
    'workers', case when not y.others then (select count(*) from orchestrator.workers w where w.declared_dead_at is null and y.type like any (w.handles)) end)
    order by y.others, y.type), '[]')
  from (select coalesce(s.type, p.type) as type, p.paused, coalesce(s.type = 'other' and p.type is null, false) as others
        from orchestrator.type_stats s full join orchestrator.task_types p on p.type = s.type
        where s.type is not null or right(p.type, 1) not in ('*', ':')
        order by 1 limit 1000) y
  left join orchestrator.type_stats s on s.type = y.type
  where not y.others or s.enqueued_total > 0
$$;

create or replace function orchestrator._api_workers() returns jsonb
language sql set search_path = '' as $$
  select coalesce(jsonb_agg(jsonb_build_object(
    'id', w.id, 'hostname', w.hostname, 'version', w.version, 'pool_size', w.pool_size, 'up', orchestrator._age(w.started_at),
    'heartbeat', orchestrator._age(w.last_heartbeat), 'leads', w.is_leader and w.leader_until > clock_timestamp(), 'term', w.leader_term,
    'declared_dead', w.declared_dead_at is not null, 'idle', w.idle,
    'in_flight', (select coalesce(sum(c.open_tasks), 0) from orchestrator.claims c where c.worker_id = w.id),
    'handles', (select jsonb_agg(replace(replace(h, '\', ''), '%', '*') order by h) from unnest(w.handles) h)) order by w.started_at, w.id), '[]')
  from (select * from orchestrator.workers w order by w.started_at limit 500) w
$$;

create or replace function orchestrator.api_history(p jsonb default '{}') returns jsonb
language plpgsql stable set search_path = '' as $$
declare
  v_minutes int;
begin
  perform orchestrator._api_check(p, '{minutes}');
  v_minutes := orchestrator._api_int(p, 'minutes', 15, 1, 120);
  return jsonb_build_object(
    'now', extract(epoch from clock_timestamp()),
    'columns', '["at", "waiting", "scheduled", "in_flight", "dead_letters", "enqueued_total", "ended_total"]'::jsonb,
    'samples', (select coalesce(jsonb_agg(jsonb_build_array(
                  round(extract(epoch from s.at), 3), s.waiting, s.scheduled, s.in_flight, s.dead_letters, s.enqueued_total, s.ended_total)
                  order by s.at), '[]')
                from orchestrator.stats_samples s where s.at > clock_timestamp() - make_interval(mins => v_minutes)));
end $$;
comment on function orchestrator.api_history(jsonb) is
  'minutes (1 to 120, default 15): the samples of all types together of that time, about every 10 seconds.';

-- Lists -------------------------------------------------------------------------------------------------------------------

create or replace function orchestrator._api_task(t orchestrator._bare_tasks) returns jsonb
language sql stable set search_path = '' as $$
  select orchestrator._brief(t) || jsonb_build_object('claimed_at', t.claimed_at, 'dead_at', t.dead_at, 'queued_at', t.queued_at,
    'cancel_requested_at', t.cancel_requested_at, 'max_retries', coalesce(t.max_retries, (orchestrator._policy(t.type)).max_retries))
$$;

-- Ids of tasks in one state, from its partial index, in its order, and their places there, to go on from: skips p_skip, and
-- looks at no more than 10,000. A limit in a lateral subquery, here and below, keeps the planner from turning the join around,
-- to walk all tasks for a few claims.
create or replace function orchestrator._ids_in_state(p_state text, p_type text, p_status text, p_skip int, p_limit int)
returns table (place int, id uuid)
language plpgsql stable
set search_path = '' set plan_cache_mode = force_generic_plan
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
#variable_conflict use_column
begin
  if p_state = 'ready' and p_type is not null then
    return query select p_skip + (row_number() over ())::int, r.id from (
      select t.id from orchestrator.tasks t where t.queued_at is not null and t.type = p_type
      order by t.type, t.priority desc, t.queued_at offset p_skip limit p_limit) r;
  elsif p_state = 'ready' then
    return query select p_skip + (row_number() over ())::int, r.id from (
      select t.id from orchestrator.tasks t where t.queued_at is not null
      order by t.type, t.priority desc, t.queued_at offset p_skip limit p_limit) r;
  elsif p_state = 'scheduled' then
    return query select r.place, r.id from (
      select p_skip + (row_number() over ())::int as place, d.* from (
        select t.id, t.type, t.status from orchestrator.tasks t where t.next_retry_at is not null
        order by t.next_retry_at offset p_skip limit 10000) d) r
      where (p_type is null or r.type = p_type) and (p_status is null or r.status::text = p_status) order by r.place limit p_limit;
  elsif p_state = 'in_flight' then
    return query select r.place, r.id from (
      select p_skip + (row_number() over ())::int as place, f.* from (
        select t.id, t.type, t.status from (select c.id from orchestrator.claims c order by c.id) c
        cross join lateral (select x.id, x.type, x.status from orchestrator.tasks x
                            where x.claim_id = c.id and x.status in ('claimed', 'running') limit 10000000) t
        offset p_skip limit 10000) f) r
      where (p_type is null or r.type = p_type) and (p_status is null or r.status::text = p_status) order by r.place limit p_limit;
  else
    return query select r.place, r.id from (
      select p_skip + (row_number() over ())::int as place, d.* from (
        select t.id, t.type from orchestrator.tasks t where t.dead_at is not null
        order by t.dead_at desc offset p_skip limit 10000) d) r
      where p_type is null or r.type = p_type order by r.place limit p_limit;
  end if;
end $$;

-- A page of tasks in one state, and where the next begins: '+' and how many places to skip. Beyond 100,000 it says so instead.
create or replace function orchestrator._page_in_state(p_state text, p_type text, p_status text, p_before text, p_limit int) returns jsonb
language plpgsql stable
set search_path = '' set plan_cache_mode = force_generic_plan
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
declare
  v_skip int := coalesce(substr(p_before, 2)::int, 0);
  v_ids uuid[];
  v_next int;
  v_tasks jsonb;
begin
  select array_agg(i.id order by i.place), max(i.place) into v_ids, v_next
  from orchestrator._ids_in_state(p_state, p_type, p_status, v_skip, p_limit) i;
  if cardinality(v_ids) is distinct from p_limit then   -- the page is not full: there is more only if the look was cut short
    v_next := case when p_state <> 'ready' then (select i.place from orchestrator._ids_in_state(p_state, null, null, v_skip + 9999, 1) i) end;
  end if;
  select jsonb_agg(orchestrator._api_task(x.t) order by u.place) into v_tasks
  from unnest(v_ids) with ordinality u(id, place) cross join lateral (select t from orchestrator._bare_tasks t where t.id = u.id limit 1) x;
  return jsonb_build_object('tasks', coalesce(v_tasks, '[]'), 'next', case when v_next < 100000 then '+' || v_next end,
                            'cut', coalesce(v_next >= 100000, false));
end $$;

-- A page of tasks by id, the newest first, from p_from to p_to: looks at no more than 10,000.
create or replace function orchestrator._page_by_id(p_from uuid, p_to uuid, p_before uuid, p_type text, p_status text, p_limit int) returns jsonb
language plpgsql stable
set search_path = '' set plan_cache_mode = force_generic_plan
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
declare
  v_ids uuid[];
  v_next uuid;
  v_tasks jsonb;
begin
  v_ids := array(
    select r.id from (
      select t.id, t.type, t.status from orchestrator.tasks t where t.id >= p_from and t.id <= p_to and t.id < p_before
      order by t.id desc limit 10000) r
    where (p_type is null or r.type = p_type) and (p_status is null or r.status::text = p_status) order by r.id desc limit p_limit);
  v_next := v_ids[p_limit];
  if v_next is null then
    select t.id into v_next from orchestrator.tasks t where t.id >= p_from and t.id <= p_to and t.id < p_before
    order by t.id desc offset 9999 limit 1;
  end if;
  select jsonb_agg(orchestrator._api_task(t) order by t.id desc) into v_tasks from orchestrator._bare_tasks t where t.id = any (v_ids);
  return jsonb_build_object('tasks', coalesce(v_tasks, '[]'), 'next', v_next, 'cut', false);
end $$;

create or replace function orchestrator.api_tasks(p jsonb default '{}') returns jsonb
language plpgsql stable set search_path = '' as $$
declare
  v_prefix text := lower(replace(orchestrator._api_text(p, 'id'), '-', ''));
  v_type text := nullif(p ->> 'type', '');
  v_status text := orchestrator._api_text(p, 'status');
  v_before text := orchestrator._api_text(p, 'before');
  v_limit int := orchestrator._api_int(p, 'limit', 50, 1, 200);
  v_state text;
begin
  perform orchestrator._api_check(p, '{id, type, status, before, limit}');
  if v_prefix !~ '^[0-9a-f]{1,32}$' then
    perform orchestrator._invalid('id', 'must be the beginning of a task''s id', 'Digits and a to f.');
  elsif v_status is not null and v_status <> all ('{ready, scheduled, in_flight, pending, claimed, running, retry_scheduled, dead_letter, completed, cancelled}') then
    perform orchestrator._invalid('status', 'is none', 'One of ready, scheduled, in_flight, pending, claimed, running, retry_scheduled, dead_letter, completed, cancelled.');
  end if;
  v_state := case when v_status in ('ready', 'scheduled', 'in_flight', 'dead_letter') then v_status
                  when v_status in ('claimed', 'running') then 'in_flight' when v_status = 'retry_scheduled' then 'scheduled' end;
  if v_before is not null and v_before !~ (case when v_state is not null and v_prefix is null then '^\+\d{1,5}$'
                                                else '^[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}$' end) then
    perform orchestrator._invalid('before', 'must be what the page before gave as next', 'Leave it out for the first page.');
  end if;
  if v_state is not null and v_prefix is null then
    return orchestrator._page_in_state(v_state, v_type, case when v_status in ('claimed', 'running', 'retry_scheduled') then v_status end,
                                       v_before, v_limit);
  elsif v_status in ('ready', 'scheduled', 'in_flight') then
    perform orchestrator._invalid('status', 'goes with an id only as tasks have it', 'Such as pending, running or dead_letter.');
  end if;
  return orchestrator._page_by_id(rpad(coalesce(v_prefix, ''), 32, '0')::uuid, rpad(coalesce(v_prefix, ''), 32, 'f')::uuid,
                                  coalesce(v_before, 'ffffffff-ffff-ffff-ffff-ffffffffffff')::uuid, v_type, v_status, v_limit);
end $$;
comment on function orchestrator.api_tasks(jsonb) is
  'Search: id (or its beginning), type, status (also ready, scheduled, in_flight), limit (1 to 200, default 50), before (the '
  'next of the page before). The newest first; a state with an index of its own in that order. Each page looks at 10,000 tasks '
  'at most, so one that is not full may have a next. Raises OR001.';

create or replace function orchestrator.api_running(p jsonb default '{}') returns jsonb
language plpgsql
set search_path = '' set plan_cache_mode = force_generic_plan
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
begin
  perform orchestrator._api_check(p, '{limit}');
  return jsonb_build_object('now', extract(epoch from clock_timestamp()), 'tasks', (
    select coalesce(jsonb_agg(orchestrator._api_task(x.t) || jsonb_build_object(
             'age', orchestrator._age(coalesce((x.t).started_at, (x.t).claimed_at)),
             'progress', (select r.result from orchestrator._redacted_tasks r where r.id = i.id)) order by i.place), '[]')
    from orchestrator._ids_in_state('in_flight', null, null, 0, orchestrator._api_int(p, 'limit', 50, 1, 200)) i
    cross join lateral (select t from orchestrator._bare_tasks t where t.id = i.id limit 1) x));
end $$;
comment on function orchestrator.api_running(jsonb) is
  'limit (1 to 200, default 50): tasks in flight, the longest first, with their age in seconds and the progress they report.';

create or replace function orchestrator.api_retries(p jsonb default '{}') returns jsonb
language plpgsql
set search_path = '' set plan_cache_mode = force_generic_plan
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
begin
  perform orchestrator._api_check(p, '{limit}');
  return jsonb_build_object('now', extract(epoch from clock_timestamp()), 'tasks', (
    select coalesce(jsonb_agg(orchestrator._api_task(x.t) || jsonb_build_object(
             'due_in', round(extract(epoch from (x.t).next_retry_at - clock_timestamp()), 3)) order by i.place), '[]')
    from orchestrator._ids_in_state('scheduled', null, null, 0, orchestrator._api_int(p, 'limit', 50, 1, 200)) i
    cross join lateral (select t from orchestrator._bare_tasks t where t.id = i.id limit 1) x));
end $$;
comment on function orchestrator.api_retries(jsonb) is
  'limit (1 to 200, default 50): retries and other tasks that wait for their time, the next one first; due_in in seconds.';

create or replace function orchestrator.api_failures(p jsonb default '{}') returns jsonb
language plpgsql
set search_path = '' set plan_cache_mode = force_generic_plan
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
begin
  perform orchestrator._api_check(p, '{limit}');
  return jsonb_build_object('now', extract(epoch from clock_timestamp()), 'failures', (
    select coalesce(jsonb_agg(jsonb_build_object('event', f.id, 'task_id', f.task_id, 'type', t.type, 'status', t.status, 'attempt', f.attempt,
                                                 'worker_id', f.worker_id, 'age', orchestrator._age(f.at), 'error', left(f.detail, 500))
                              order by f.id desc), '[]')
    from (select e.* from (select * from orchestrator.task_events e order by e.id desc limit 5000) e
          where e.event = 'failed' order by e.id desc limit orchestrator._api_int(p, 'limit', 50, 1, 200)) f
    left join orchestrator.tasks t on t.id = f.task_id));
end $$;
comment on function orchestrator.api_failures(jsonb) is
  'limit (1 to 200, default 50): failed attempts among the last 5000 events, the newest first, with the error.';

create or replace function orchestrator.api_dead_letters(p jsonb default '{}') returns jsonb
language plpgsql stable set search_path = '' as $$
begin
  perform orchestrator._api_check(p, '{type, before, limit}');
  return orchestrator.api_tasks(p || '{"status": "dead_letter"}');
end $$;
comment on function orchestrator.api_dead_letters(jsonb) is 'type, before, limit as in api_tasks: dead letters, the newest first. Raises OR001.';

create or replace function orchestrator.api_task(p jsonb) returns jsonb
language plpgsql stable set search_path = '' as $$
begin
  perform orchestrator._api_check(p, '{id}');
  return orchestrator.show_task(orchestrator._api_id(p));
end $$;
comment on function orchestrator.api_task(jsonb) is 'id: one task''s whole story (show_task); null if there is none. Raises OR001.';

-- Acting -------------------------------------------------------------------------------------------------------------------

create or replace function orchestrator.api_cancel(p jsonb) returns jsonb
language plpgsql set search_path = '' as $$
declare
  v_outcome text;
begin
  perform orchestrator._api_check(p, '{id}');
  v_outcome := orchestrator.cancel_task(orchestrator._api_id(p));
  return case when v_outcome <> 'not_found' then jsonb_build_object('id', orchestrator._api_id(p), 'outcome', v_outcome) end;
end $$;
comment on function orchestrator.api_cancel(jsonb) is 'id: cancel_task; outcome is what that returns, null for an unknown id. Raises OR001.';

create or replace function orchestrator.api_retry(p jsonb) returns jsonb
language plpgsql set search_path = '' as $$
declare
  v_outcome text;
begin
  perform orchestrator._api_check(p, '{id}');
  v_outcome := orchestrator.retry_task(orchestrator._api_id(p));
  return case when v_outcome <> 'not_found' then jsonb_build_object('id', orchestrator._api_id(p), 'outcome', v_outcome) end;
end $$;
comment on function orchestrator.api_retry(jsonb) is 'id: retry_task; outcome is what that returns, null for an unknown id. Raises OR001.';

create or replace function orchestrator.api_retry_dead_letters(p jsonb) returns jsonb
language plpgsql set search_path = '' as $$
begin
  perform orchestrator._api_check(p, '{type, limit}');
  return jsonb_build_object('retried', orchestrator.retry_dead_letters(orchestrator._api_type(p), orchestrator._api_int(p, 'limit', 1000, 1, 1000)));
end $$;
comment on function orchestrator.api_retry_dead_letters(jsonb) is
  'type, limit (1 to 1000, the default): retries so many dead letters of a type, the oldest first; retried: how many. Raises OR001.';

create or replace function orchestrator.api_pause(p jsonb) returns jsonb
language plpgsql set search_path = '' as $$
begin
  perform orchestrator._api_check(p, '{type}');
  return jsonb_build_object('type', p ->> 'type', 'changed', (orchestrator.pause_type(orchestrator._api_type(p))).changed, 'paused', true);
end $$;
comment on function orchestrator.api_pause(jsonb) is 'type: pause_type; changed: whether it was not paused before. Raises OR001.';

create or replace function orchestrator.api_resume(p jsonb) returns jsonb
language plpgsql set search_path = '' as $$
begin
  perform orchestrator._api_check(p, '{type}');
  return jsonb_build_object('type', p ->> 'type', 'changed', (orchestrator.resume_type(orchestrator._api_type(p))).changed, 'paused', false);
end $$;
comment on function orchestrator.api_resume(jsonb) is 'type: resume_type; changed: whether it was paused before. Raises OR001.';
