-- Looking: views, statistics, the story of a task. Reads only. Payloads are shown with their secrets blanked; each view has
-- the predicate of the index that serves it (ready, due, in flight, dead).

-- Blanks the values of keys that name a secret, at any depth.
create or replace function orchestrator.redact(p_json jsonb) returns jsonb
language sql immutable parallel safe as $$
  select case jsonb_typeof(p_json)
    when 'object' then (select coalesce(jsonb_object_agg(e.key, case
        when e.key ~* '(password|passwd|passphrase|secret|token|api[_-]?key|private[_-]?key|credential|authorization)' and e.key !~* '_(env|file)$'
          and jsonb_typeof(e.value) <> 'null' then '"[redacted]"'
        else orchestrator.redact(e.value) end), '{}') from jsonb_each(p_json) e)
    when 'array' then (select coalesce(jsonb_agg(orchestrator.redact(a.value) order by a.ordinality), '[]')
                       from jsonb_array_elements(p_json) with ordinality a)
    else p_json end
$$;
comment on function orchestrator.redact(jsonb) is
  'The same JSON with the values of keys such as password, secret or token replaced by "[redacted]"; keys in _env and _file name '
  'a place, not a secret, and stay.';

-- For those who have no right on payloads: tasks without them, to be passed on as whole rows, and payloads with secrets blanked.
create or replace view orchestrator._bare_tasks as
  select t.id, t.type, t.status, t.priority, t.idempotency_key, t.worker_id, t.claim_id, t.created_at, t.queued_at, t.claimed_at,
         t.started_at, t.completed_at, t.updated_at, t.attempts, t.max_retries, t.last_error, t.next_retry_at, t.dead_at,
         t.cancel_requested_at, t.recoveries
  from orchestrator.tasks t;

create or replace view orchestrator._redacted_tasks as
  select t.id, orchestrator.redact(t.payload) as payload, orchestrator.redact(t.result) as result from orchestrator.tasks t;

create or replace view orchestrator.pending_tasks as
  select t.id, t.type, t.priority, t.status, t.queued_at as ready_since, t.next_retry_at, t.attempts, t.last_error, t.created_at,
         t.idempotency_key, orchestrator.redact(t.payload) as payload
  from orchestrator.tasks t where t.queued_at is not null
  union all
  select t.id, t.type, t.priority, t.status, null, t.next_retry_at, t.attempts, t.last_error, t.created_at,
         t.idempotency_key, orchestrator.redact(t.payload)
  from orchestrator.tasks t where t.next_retry_at is not null;
comment on view orchestrator.pending_tasks is 'Tasks that wait: ready since ready_since, or not before next_retry_at.';

create or replace view orchestrator.running_tasks as
  select t.id, t.type, t.priority, t.status, t.worker_id, t.claimed_at, t.started_at, clock_timestamp() - t.claimed_at as age,
         t.attempts, t.cancel_requested_at, orchestrator.redact(t.progress) as progress, orchestrator.redact(t.payload) as payload
  from orchestrator.claims c join orchestrator.tasks t on t.claim_id = c.id
  where t.status in ('claimed', 'running');
comment on view orchestrator.running_tasks is
  'Tasks in flight. One that is quick goes from claimed to completed in one step; running marks those that last.';

create or replace view orchestrator.dead_letters as
  select t.id, t.type, t.priority, t.dead_at, t.attempts, t.last_error, t.worker_id, t.created_at, t.idempotency_key,
         orchestrator.redact(t.payload) as payload
  from orchestrator.tasks t where t.dead_at is not null;
comment on view orchestrator.dead_letters is 'Tasks that failed for good; retry_task or retry_dead_letters puts them back.';

create or replace view orchestrator.queue_stats as
  with waiting as (
    select t.type, count(*) as n, min(t.queued_at) as oldest from orchestrator.tasks t where t.queued_at is not null group by 1),
  scheduled as (select t.type, count(*) as n from orchestrator.tasks t where t.next_retry_at is not null group by 1),
  flying as (select r.type, count(*) as n from orchestrator.running_tasks r group by 1),
  dead as (select t.type, count(*) as n from orchestrator.tasks t where t.dead_at is not null group by 1),
  types as (
    select l.type from orchestrator.lanes l union select p.type from orchestrator.task_types p where right(p.type, 1) not in ('*', ':')
    union select type from waiting union select type from scheduled union select type from flying union select type from dead)
  select y.type, coalesce(w.n, 0) as waiting, coalesce(s.n, 0) as scheduled, coalesce(f.n, 0) as in_flight,
         coalesce(d.n, 0) as dead_letters,
         coalesce(clock_timestamp() - w.oldest, interval '0') as oldest_waiting_age, coalesce(p.paused, false) as paused
  from types y
  left join waiting w using (type) left join scheduled s using (type) left join flying f using (type)
  left join dead d using (type) left join orchestrator.task_types p using (type)
  order by y.type;
comment on view orchestrator.queue_stats is
  'By type: ready, scheduled for later, in flight, dead letters, the age of '
  'the oldest ready one, and whether the type is paused.';

-- The first reason that holds, in words for whoever is on call.
create or replace function orchestrator.explain_task(p_id uuid) returns text
language plpgsql stable set search_path = '' as $$
declare
  t orchestrator._bare_tasks;
  v_workers int;
  v_ahead bigint;
begin
  select * into t from orchestrator._bare_tasks x where x.id = p_id;
  if not found then return 'no task has this id: it never existed, its transaction rolled back, or retention deleted it'; end if;
  select count(*) into v_workers from orchestrator.workers w where w.declared_dead_at is null and t.type like any (w.handles);
  case
    when t.status in ('completed', 'cancelled') then
      return format('%s at %s', t.status, t.completed_at);
    when t.status = 'dead_letter' then
      return format('gave up after %s attempts at %s: select orchestrator.retry_task(%L) tries again', t.attempts, t.dead_at, t.id);
    when t.status in ('claimed', 'running') then
      return format('%s by worker %s since %s%s%s', t.status, t.worker_id, t.claimed_at,
        case when t.cancel_requested_at is not null then ', asked to stop at ' || t.cancel_requested_at else '' end,
        coalesce((select ', whose last heartbeat is ' || extract(epoch from clock_timestamp() - w.last_heartbeat)::int || ' s old'
                  from orchestrator.workers w where w.id = t.worker_id), ', which is gone: the leader will recover it'));
    when v_workers = 0 then
      return format('no live worker handles %s: start one with a handler for it', t.type);
    when exists (select from orchestrator.task_types p where p.type = t.type and p.paused) then
      return format('the type is paused: select orchestrator.resume_type(%L)', t.type);
    when t.next_retry_at is not null then
      return format('not before %s (%s)', t.next_retry_at, case when t.attempts > 0 then 'a retry of attempt ' || t.attempts else 'scheduled' end);
    else
      select count(*) into v_ahead from (select from orchestrator.tasks x where x.type = t.type and x.priority = t.priority
                                         and x.queued_at < t.queued_at limit 1000) a;
      return format('ready; %s of the same type and priority are before it, for %s live workers',
                    case when v_ahead = 1000 then '1000 or more' else v_ahead::text end, v_workers);
  end case;
end $$;
comment on function orchestrator.explain_task(uuid) is 'Why a task is where it is, in one sentence, and what to do about it.';

create or replace function orchestrator.show_task(p_id uuid) returns jsonb
language sql stable set search_path = '' as $$
  select to_jsonb(t) || jsonb_build_object(
    'payload', r.payload, 'result', r.result,
    'max_retries', coalesce(t.max_retries, (orchestrator._policy(t.type)).max_retries),
    'explanation', orchestrator.explain_task(t.id),
    'events', (select coalesce(jsonb_agg(jsonb_build_object('at', e.at, 'event', e.event, 'attempt', e.attempt, 'worker_id', e.worker_id,
                                                            'detail', e.detail) order by e.id), '[]')
               from orchestrator.task_events e where e.task_id = t.id))
  from orchestrator._bare_tasks t join orchestrator._redacted_tasks r on r.id = t.id where t.id = p_id
$$;
comment on function orchestrator.show_task(uuid) is
  'One task''s whole story as JSON: its row (secrets blanked), explain_task, and its events. Null if there is none.';

create or replace function orchestrator.list_tasks(
  p_status text default null, p_type text default null, p_limit int default 50, p_before uuid default null)
returns setof jsonb language plpgsql stable
set search_path = '' set enable_seqscan = off as $$
begin
  if p_status is not null and p_status <> all (enum_range(null::orchestrator.task_status)::text[]) then
    perform orchestrator._invalid('status', 'must be one of ' || array_to_string(enum_range(null::orchestrator.task_status)::text[], ', '),
                                  'Leave it out for all.');
  end if;
  return query
    select orchestrator._brief(t) from orchestrator._bare_tasks t
    where (p_status is null or t.status = p_status::orchestrator.task_status) and (p_type is null or t.type = p_type)
      and (p_before is null or t.id < p_before)
    order by t.id desc limit least(p_limit, 1000);
end $$;
comment on function orchestrator.list_tasks(text, text, int, uuid) is
  'Tasks, the newest first, as JSON; p_before: only those created before that id, for the next page. Raises OR001.';

create or replace function orchestrator._brief(t orchestrator._bare_tasks) returns jsonb
language sql stable set search_path = '' as $$
  select jsonb_build_object('id', t.id, 'type', t.type, 'status', t.status, 'priority', t.priority, 'attempts', t.attempts,
    'worker_id', t.worker_id, 'created_at', t.created_at, 'started_at', t.started_at, 'completed_at', t.completed_at,
    'next_retry_at', t.next_retry_at, 'last_error', left(t.last_error, 500))
$$;
