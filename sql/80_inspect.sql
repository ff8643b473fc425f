-- What a person looks at: views, statistics, the story of a task. Reads only. Payloads, results and errors have their secrets blanked;
-- each view has the predicate of the index that serves it.

-- Whether a key names a secret, split into words: apiKey, API_KEY and api-key are api_key.
create or replace function orchestrator._names_a_secret(p_key text) returns boolean
language sql immutable parallel safe begin atomic
  select p_key ~* 'pass|pwd|secret|token|key|credential|authorization' and k.words !~ '_(env|file|type|count|limit)$' and k.words ~
    '(^|_)([a-z]*pass(word|wd|phrase)s?|pwd|(access|auth|refresh|bearer|session|api|id)?token|(client|app|shared)?secrets?|'
    'credentials?|authorization|(api|private|access|signing|encryption)_?keys?)(_|$)'
  from (select lower(regexp_replace(regexp_replace(p_key, '([a-z0-9])([A-Z])|([A-Z])(?=[A-Z][a-z])', '\1\3_\2', 'g'), '[^A-Za-z0-9]+', '_', 'g')) as words) k;
end;

create or replace function orchestrator.redact_text(p_text text) returns text
language sql immutable parallel safe
return regexp_replace(regexp_replace(p_text, '(://[^\s:/@]*):(?!\d+[/?#])\S*@', '\1:[redacted]@', 'g'),
                      '((?:pass(?:word|wd|phrase)|pwd|secret|token|api_?key)=)[^\s,;&''")]+', '\1[redacted]', 'gi');
comment on function orchestrator.redact_text is
  'The text with passwords blanked: in URLs (scheme://user:password@host) and after password= or token=.';

create or replace function orchestrator._redact(p_json jsonb, p_depth int) returns jsonb
language sql immutable parallel safe as $$
  select case case when p_depth = 0 and jsonb_typeof(p_json) in ('object', 'array') then 'deep' else jsonb_typeof(p_json) end
    when 'deep' then '"[nested too deeply]"'
    when 'object' then
      (select coalesce(jsonb_object_agg(e.key, case when orchestrator._names_a_secret(e.key) and jsonb_typeof(e.value) <> 'null' then '"[redacted]"'
                                                    else orchestrator._redact(e.value, p_depth - 1) end), '{}') from jsonb_each(p_json) e)
    when 'array' then
      (select coalesce(jsonb_agg(orchestrator._redact(a.value, p_depth - 1) order by a.ordinality), '[]')
       from jsonb_array_elements(p_json) with ordinality a)
    when 'number' then case when length(p_json::text) < 16 then p_json
      when length(p_json::text) > 100 then to_jsonb(format('[a number of %s digits]', length(p_json::text)))
      when abs(p_json::numeric) > 9007199254740992 then to_jsonb(p_json::text) else p_json end
    when 'string' then case when p_json::text ~ '://|=' then to_jsonb(orchestrator.redact_text(p_json #>> '{}')) else p_json end
    else p_json end
$$;

create or replace function orchestrator.redact(p_json jsonb) returns jsonb
language sql immutable parallel safe set search_path = pg_catalog, pg_temp as $$ select orchestrator._redact(p_json, 50) $$;
comment on function orchestrator.redact is
  'The JSON to be shown: "[redacted]" for values whose keys name a secret as a whole word (password, apiKey; not max_tokens) unless '
  'they end in _env, _file, _type, _count or _limit; texts as redact_text has them; as text, what is nested over 50 levels deep, and '
  'numbers that a browser or Python can''t read.';

-- For those who have no right on payloads.
create or replace view orchestrator._bare_tasks as
  select t.id, t.type, t.status, t.priority, t.idempotency_key, t.worker_id, t.claim_id, t.created_at, t.queued_at, t.claimed_at,
         t.started_at, t.completed_at, t.updated_at, t.attempts, t.max_retries, t.last_error, t.next_retry_at, t.dead_at,
         t.cancel_requested_at, t.recoveries, t.concurrency_key, t.parked_at, t.parked_by, t.after, t.blocked_until, t.expires_at
  from orchestrator.tasks t;

-- progress: an object as names and values in the order in which they were written. preview: the first 200 characters of the payload, or
-- the size of what is too large for a list.
create or replace view orchestrator._redacted_tasks as
  select t.id, orchestrator.redact(t.payload) as payload, orchestrator.redact(t.result) as result, t.meta,
         case when json_typeof(t.progress) = 'object' then
           (select coalesce(jsonb_agg(jsonb_build_array(e.key, orchestrator.redact(jsonb_build_object(e.key, e.value)) -> e.key) order by e.ordinality), '[]')
            from json_each(t.progress) with ordinality e) else orchestrator.redact(t.progress::jsonb) end as progress,
         case when t.payload = '{}' then null
              when pg_column_size(t.payload) > 4000 or octet_length(t.payload::text) > 8000
                then '[' || pg_size_pretty(pg_column_size(t.payload)::bigint) || ' stored]'
              else left(orchestrator.redact(t.payload)::text, 200) end as preview,
         (select jsonb_agg(jsonb_build_object('name', s.name, 'result', orchestrator.redact(s.result), 'at', s.at, 'until', s.until) order by s.at, s.name)
          from orchestrator.task_steps s where s.task_id = t.id) as steps
  from orchestrator.tasks t;

create or replace view orchestrator.pending_tasks as
  select t.id, t.type, t.priority, t.status, t.queued_at as ready_since, case when t.blocked_until is null then t.next_retry_at end as next_retry_at,
         t.attempts,
         orchestrator.redact_text(t.last_error) as last_error, t.created_at, t.idempotency_key, orchestrator.redact(t.payload) as payload
  from (select * from orchestrator.tasks where queued_at is not null
        union all select * from orchestrator.tasks where next_retry_at is not null
        union all select * from orchestrator.tasks where parked_at is not null) t;
comment on view orchestrator.pending_tasks is
  'Tasks that wait: ready since ready_since, not before next_retry_at, or (neither) until others end: those in after, or of their key.';

create or replace view orchestrator.running_tasks as
  select t.id, t.type, t.priority, t.status, t.worker_id, t.claimed_at, t.started_at, clock_timestamp() - t.claimed_at as age,
         t.attempts, t.cancel_requested_at, orchestrator.redact(t.progress::jsonb) as progress, orchestrator.redact(t.payload) as payload
  from orchestrator.claims c join orchestrator.tasks t on t.claim_id = c.id
  where t.status in ('claimed', 'running');
comment on view orchestrator.running_tasks is 'Tasks in flight. Quick ones stay claimed; those that last are marked as running.';

create or replace view orchestrator.dead_letters as
  select t.id, t.type, t.priority, t.dead_at, t.attempts, orchestrator.redact_text(t.last_error) as last_error, t.worker_id, t.created_at,
         t.idempotency_key, orchestrator.redact(t.payload) as payload
  from orchestrator.tasks t where t.dead_at is not null;
comment on view orchestrator.dead_letters is 'Tasks that failed for good.';

-- type_stats.recent has sums that decay with a time constant of 15 minutes, as a load average: seconds, tasks enqueued and ended,
-- attempts, failed attempts.
create or replace view orchestrator._recent as
  select s.type, s.median, s.p95, s.recent[3] * d.decay / d.seconds as per_second, s.recent[2] * d.decay / d.seconds as enqueued_per_second,
         case when s.recent[4] * d.decay >= 0.05 then least(s.recent[5] / s.recent[4], 1) end as failure_share
  from orchestrator.type_stats s
  cross join lateral (select greatest(extract(epoch from clock_timestamp() - s.recent_at), 0)::double precision as idle) i
  cross join lateral (select exp(-i.idle / 900) as decay, nullif(s.recent[1] * exp(-i.idle / 900) + i.idle, 0) as seconds) d;

create or replace view orchestrator.queue_stats as
  with counted as (select * from orchestrator._count_live()),
  types as (
    select c.type from counted c union select p.type from orchestrator.task_types p where orchestrator._prefix(p.type) is null
    union select s.type from orchestrator.type_stats s where s.type <> 'other')
  select y.type, coalesce(c.waiting, 0) as waiting, coalesce(c.parked, 0) as parked, coalesce(c.scheduled, 0) as scheduled,
         coalesce(c.blocked, 0) as blocked, coalesce(c.in_flight, 0) as in_flight,
         coalesce(c.dead_letters, 0) as dead_letters, coalesce(clock_timestamp() - c.oldest, interval '0') as oldest_waiting_age,
         exists (select from orchestrator.task_types p where p.paused and y.type like p.likes) as paused, r.per_second, r.failure_share, r.median, r.p95
  from types y left join counted c using (type) left join orchestrator._recent r using (type)
  order by y.type;
comment on view orchestrator.queue_stats is
  'By type, counted live: ready, parked, scheduled (of these blocked by other tasks), in flight, dead letters, the age of the oldest '
  'ready one, and whether it is paused. From type_stats: tasks ended per second and share of failed attempts lately, seconds of runs.';

-- The three tasks that have been in flight longest under a limit, of one key or of all, and their workers.
create or replace function orchestrator._holders(p_limit text, p_key text) returns text
language sql stable as $$
  select ' (' || string_agg(format('%s by worker %s%s', h.id, h.worker_id, coalesce(
    ', last heard of ' || extract(epoch from clock_timestamp() - w.last_heartbeat)::int || ' s ago', ', which is gone')), ', ' order by h.claimed_at) || ')'
  from (select t.id, t.worker_id, t.claimed_at from orchestrator.claims c join orchestrator.tasks t on t.claim_id = c.id
        where c.limit_name = p_limit and (p_key is null or c.key = p_key) and t.status in ('claimed', 'running') order by t.claimed_at limit 3) h
  left join orchestrator.workers w on w.id = h.worker_id
$$;

-- Parents that failed come first, each with the call that frees it.
create or replace function orchestrator._explain_blocked(p_id uuid, p_until timestamptz) returns text
language sql stable as $$
  select format('waits for %s%s%s', string_agg(format('task %s (%s)', w.parent, case when w.status = 'dead_letter'
                  then format('a dead letter: select orchestrator.retry_task(%L) tries again, cancel_task(%L) gives up', w.parent, p_id)
                  else coalesce(w.status, 'deleted') end), ', ' order by w.n) filter (where w.n <= 3),
                case when count(*) > 3 then format(' and %s more', count(*) - 3) end,
                case when p_until > clock_timestamp() then format(', and for %s', p_until) end)
  from (select w.parent, t.status::text, row_number() over (order by t.status = 'dead_letter' desc, w.parent) as n
        from orchestrator.task_waits w left join orchestrator.tasks t on t.id = w.parent where w.child = p_id) w
$$;

create or replace function orchestrator.explain_task(p_id uuid) returns text
language plpgsql stable as $$
declare
  t orchestrator._bare_tasks;
  v_workers int;
  v_ahead bigint;
  v_paused text;
  l orchestrator.limits;
begin
  select * into t from orchestrator._bare_tasks x where x.id = p_id;
  if not found then return 'no task has this id: it never existed, its transaction rolled back, or retention deleted it'; end if;
  select count(*) into v_workers from orchestrator.workers w where w.declared_dead_at is null and t.type like any (w.handles);
  select p.type into v_paused from orchestrator.task_types p   -- by its own name or by a pattern
  where p.paused and t.type like p.likes order by p.type = t.type desc limit 1;
  select * into l from orchestrator.limits x where x.type = orchestrator._limit_of(t.type);
  case
    when t.status in ('completed', 'cancelled') then
      return format('%s at %s%s', t.status, t.completed_at,
        (select ': ' || nullif(concat_ws(': ', nullif(e.event, 'cancelled'), e.detail), '') || format('; select orchestrator.retry_task(%L) runs it', t.id)
         from orchestrator.task_events e where e.task_id = t.id and e.event in ('cancelled', 'expired') order by e.id desc limit 1));
    when t.status = 'dead_letter' then
      return format('gave up after %s at %s: select orchestrator.retry_task(%L) tries again', orchestrator._count_of(t.attempts, 'attempt'), t.dead_at, t.id);
    when t.status in ('claimed', 'running') then
      return format('%s by worker %s since %s%s%s', t.status, t.worker_id, t.claimed_at,
        case when t.cancel_requested_at is not null then ', asked to stop at ' || t.cancel_requested_at else '' end,
        coalesce((select ', whose last heartbeat is ' || extract(epoch from clock_timestamp() - w.last_heartbeat)::int || ' s old'
                  from orchestrator.workers w where w.id = t.worker_id), ', which is gone: the leader will recover it'));
    when t.blocked_until is not null then return orchestrator._explain_blocked(t.id, t.blocked_until);
    when t.expires_at <= clock_timestamp() then return format('expired at %s: promote_due, which workers call, cancels it', t.expires_at);
    when v_workers = 0 then return format('no live worker handles %s: start one with a handler for it', t.type);
    when v_paused is not null then return format('%1$s is paused: select orchestrator.resume_type(%1$L)', v_paused);
    when t.next_retry_at is not null then
      return coalesce(
        (select format('snoozed until the signal %1$L comes%2$s: select orchestrator.signal_task(%3$L, %1$L)',
                       s.name, ', or until ' || nullif(s.until, 'infinity'), t.id)
         from orchestrator.task_steps s where t.status = 'pending' and s.task_id = t.id and s.at is null and s.until > clock_timestamp() limit 1),
        format('not before %s (%s)', t.next_retry_at, case when t.attempts > 0 then 'a retry of attempt ' || t.attempts else 'scheduled' end));
    when t.parked_at is not null then
      return format('parked: as many of its concurrency key %L are in flight as the limit %s allows%s; it goes on when one of them ends',
                    t.concurrency_key, t.parked_by, orchestrator._holders(t.parked_by, t.concurrency_key));
    when l.max_running <= l.in_flight then
      return format('ready, but the limit %s is full: %s of %s are in flight%s; limit_type(%L, …) sets it', l.type, l.in_flight, l.max_running,
                    orchestrator._holders(l.type, null), l.type);
    when l.next_start_at > clock_timestamp() then
      return format('ready, but %s started under the limit %s within %s: the next may start at %s; limit_type(%L, …) sets it',
                    l.started_lately, l.type, l.rate_per, l.next_start_at, l.type);
    else
      select count(*) into v_ahead
      from (select from orchestrator.tasks x where x.type = t.type and x.priority = t.priority and x.queued_at < t.queued_at limit 1000) a;
      return format('ready; %s of the same type and priority are before it, for %s',
                    case when v_ahead = 1000 then '1000 or more' else v_ahead::text end, orchestrator._count_of(v_workers, 'live worker'));
  end case;
end $$;
comment on function orchestrator.explain_task is 'Why a task is where it is, in one sentence, and what to do about it.';

create or replace function orchestrator._count_of(p_n bigint, p_noun text) returns text
language sql immutable parallel safe return p_n || ' ' || p_noun || case when p_n = 1 then '' else 's' end;

create or replace function orchestrator._events(p_task_id uuid, p_redact boolean) returns jsonb
language sql stable as $$
  select coalesce(jsonb_agg(jsonb_build_object('at', e.at, 'event', e.event, 'attempt', e.attempt, 'worker_id', e.worker_id,
                                               'detail', case when p_redact then orchestrator.redact_text(e.detail) else e.detail end) order by e.id), '[]')
  from orchestrator.task_events e where e.task_id = p_task_id
$$;

create or replace function orchestrator.show_task(p_id uuid) returns jsonb
language sql stable as $$
  select to_jsonb(t) || to_jsonb(r) - 'preview' || jsonb_build_object(
    'last_error', orchestrator.redact_text(t.last_error), 'claim_id', t.claim_id::text,
    'max_retries', coalesce(t.max_retries, (orchestrator._policy(t.type)).max_retries),
    'parents', (select coalesce(jsonb_agg(jsonb_build_object('id', a.id, 'type', p.type, 'status', p.status) order by a.n), '[]')
                from unnest(t.after) with ordinality a(id, n) left join orchestrator._bare_tasks p on p.id = a.id where a.n <= 100),
    'children', (select coalesce(jsonb_agg(jsonb_build_object('id', c.id, 'type', c.type, 'status', c.status) order by c.id), '[]')
                 from (select w.child from orchestrator.task_waits w where w.parent = t.id order by w.child limit 100) w
                 join orchestrator._bare_tasks c on c.id = w.child),
    'explanation', orchestrator.explain_task(t.id), 'events', orchestrator._events(t.id, true))
  from orchestrator._bare_tasks t join orchestrator._redacted_tasks r on r.id = t.id where t.id = p_id
$$;
comment on function orchestrator.show_task is
  'A task''s story: its row (secrets blanked, but for meta; progress as [[name, value], …] in the handler''s order; claim_id as text), '
  'explain_task, events, and up to 100 parents (after) and children that wait for it. Null if there is none.';

create or replace function orchestrator.get_task(p_id uuid) returns jsonb
language sql stable as $$
  select to_jsonb(t) || jsonb_build_object('events', orchestrator._events(t.id, false)) from orchestrator.tasks t where t.id = p_id
$$;
comment on function orchestrator.get_task is
  'A task''s row and its events, nothing blanked, for the program that owns it and may read payloads. Null if there is none.';
