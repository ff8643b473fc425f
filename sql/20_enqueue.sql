-- Enqueuing. Writes tasks, task_waits for those that wait for others, expiries for those that expire. Locks only what it inserts; a
-- repeated idempotency key waits for the transaction that inserted it first.

-- Never echoes a payload.
create or replace function orchestrator._check_task(p_type text, p_priority int, p_key text, p_max_retries int, p_run_at timestamptz)
returns void language plpgsql stable as $$
begin
  if p_type is null or octet_length(p_type) not between 1 and 255 or p_type ~ '[[:cntrl:]*]' then
    perform orchestrator._invalid('type', 'must be 1 to 255 bytes, without control characters or *', 'Use a name such as task:backup.');
  elsif p_priority is null or p_priority not between -1000000 and 1000000 then
    perform orchestrator._invalid('priority', 'must be a whole number from -1000000 to 1000000', 'Higher is claimed first; the default is 0.');
  elsif octet_length(p_key) not between 1 and 255 then
    perform orchestrator._invalid('idempotency_key', 'must be 1 to 255 bytes', 'Leave it out, or hash a longer key.');
  elsif p_max_retries not between 0 and 1000 then
    perform orchestrator._invalid('max_retries', 'must be from 0 to 1000', 'Leave it out for the policy of the type.');
  elsif not isfinite(p_run_at) or p_run_at > clock_timestamp() + orchestrator.longest_delay() then
    perform orchestrator._invalid('run_at', 'must be a moment within the next 3650 days', 'Leave it out to run at once.');
  end if;
end $$;

create or replace function orchestrator._check_extras(
  p_concurrency_key text, p_run_at timestamptz, p_expires_at timestamptz, p_on_failure text, p_meta jsonb)
returns void language plpgsql stable as $$
begin
  if octet_length(p_concurrency_key) not between 1 and 255 then
    perform orchestrator._invalid('concurrency_key', 'must be 1 to 255 bytes', 'Leave it out, or hash a longer key.');
  elsif (p_expires_at > greatest(clock_timestamp(), p_run_at) and p_expires_at < clock_timestamp() + orchestrator.longest_delay()) is false then
    perform orchestrator._invalid('expires_at', 'must be a moment to come, after run_at, within the next 3650 days',
                                  'Leave it out if it may start at any time.');
  elsif (p_on_failure in ('wait', 'cancel', 'run')) is not true then
    perform orchestrator._invalid('on_failure', 'must be wait, cancel or run', 'What becomes of it if a task that it waits for does not complete.');
  elsif jsonb_typeof(p_meta) <> 'object' or octet_length(p_meta::text) > 8192 then
    perform orchestrator._invalid('meta', 'must be a JSON object of at most 8 KiB', 'Such as {"trace": {…}}; larger data belongs in the payload.');
  end if;
end $$;

-- The bytes that no payload is above as text, so that claims are bounded without weighing: 16 to 256 KiB. It never falls.
create or replace function orchestrator._largest_payload() returns int
language sql
return 16384 << least(coalesce(pg_sequence_last_value('orchestrator.payload_doublings'), 0), 4)::int;

-- Why a payload is refused, by its text: a stored jsonb may be compressed, and 1e100000 takes ten bytes, but an honest 1e-308 takes
-- 27 times its bytes as text.
create or replace function orchestrator._large_payload_problem(p_payload jsonb) returns text
language plpgsql as $$
declare
  v_bytes int := octet_length(p_payload::text);
begin
  if v_bytes > 262144 then
    return 'is over 256 KiB';
  elsif jsonb_path_exists(p_payload, 'strict $.**{500}') then
    return 'is nested more than 500 levels deep';
  elsif v_bytes > 32 * pg_column_size(p_payload) and pg_column_compression(p_payload) is null then
    return 'has numbers of too many digits';
  end if;
  while v_bytes > orchestrator._largest_payload() loop
    perform nextval('orchestrator.payload_doublings');
  end loop;
  return null;
end $$;

-- Payloads below 1,000 bytes need no closer look.
create or replace function orchestrator._payload_problem(p_payload jsonb) returns text
language sql
return case when octet_length(p_payload::text) >= 1000 then orchestrator._large_payload_problem(p_payload) end;

-- The notification is empty: whoever may connect can send one.
create or replace function orchestrator._notify_idle(p_type text) returns void
language plpgsql as $$
begin
  if exists (select from orchestrator.workers w where w.idle and p_type like any (w.handles)) then
    perform pg_notify('orchestrator', '');
  end if;
end $$;

create or replace function orchestrator.enqueue(
  p_type text, p_payload jsonb default '{}', p_priority int default 0, p_idempotency_key text default null,
  p_max_retries int default null, p_run_at timestamptz default null, p_concurrency_key text default null,
  p_expires_at timestamptz default null, p_after uuid[] default null, p_on_failure text default 'wait', p_meta jsonb default null)
returns uuid language plpgsql as $$
declare
  v_id uuid;
  v_later timestamptz := case when p_run_at > clock_timestamp() then p_run_at end;
  v_problem text := orchestrator._payload_problem(p_payload);
  v_parents uuid[];
  v_blocked timestamptz;
begin
  perform orchestrator._check_task(p_type, p_priority, p_idempotency_key, p_max_retries, p_run_at);
  if v_problem is not null then
    perform orchestrator._invalid('payload', v_problem, 'Store the data elsewhere and enqueue a reference to it.');
  end if;
  if num_nonnulls(p_concurrency_key, p_expires_at, p_after, p_meta) > 0 or p_on_failure <> 'wait' then
    perform orchestrator._check_extras(p_concurrency_key, p_run_at, p_expires_at, p_on_failure, p_meta);
    v_parents := orchestrator._open_parents(p_after, p_on_failure);
    if v_parents is not null then
      v_blocked := coalesce(v_later, clock_timestamp());
      v_later := clock_timestamp();   -- looked at as soon as it has committed
    end if;
  end if;
  loop
    insert into orchestrator.tasks as t (type, payload, priority, idempotency_key, max_retries, queued_at, next_retry_at, concurrency_key,
                                           expires_at, after, blocked_until, meta)
    values (p_type, coalesce(p_payload, '{}'), p_priority, p_idempotency_key, p_max_retries,
            case when v_later is null then clock_timestamp() end, v_later, p_concurrency_key,
            p_expires_at, p_after, v_blocked, p_meta)
    on conflict (type, idempotency_key) where idempotency_key is not null do nothing
    returning t.id into v_id;
    exit when found;
    select t.id into v_id from orchestrator.tasks t where t.type = p_type and t.idempotency_key = p_idempotency_key;
    if found then return v_id; end if;   -- not found: it was pruned in between, so it is ours to insert
  end loop;
  if v_later is null then
    perform orchestrator._notify_idle(p_type);
  end if;
  if v_parents is not null or p_expires_at is not null then
    perform orchestrator._wait_for(array[v_id], v_parents, p_after, p_on_failure, p_expires_at);
  end if;
  return v_id;
end $$;
comment on function orchestrator.enqueue is
  'Adds a task in the caller''s transaction and returns its id. A repeated (type, idempotency_key) returns the id of the first '
  'task and changes nothing. p_max_retries null: the policy of the type. p_run_at: not before that moment. p_concurrency_key: see '
  'limit_type. p_expires_at: cancelled if not claimed by then. p_after: it waits until these tasks have completed; p_on_failure: what '
  'then if one becomes a dead letter: wait (until it is retried and completes), cancel, or run; if one is cancelled or deleted, so is '
  'it, or it runs. p_meta: a JSON object of at most 8 KiB beside the payload, never redacted. Raises OR001.';

create or replace function orchestrator._check_many(p_payloads jsonb[], p_idempotency_keys text[], p_concurrency_keys text[]) returns void
language plpgsql as $$
declare
  v_bad int;
begin
  select o into v_bad from unnest(p_payloads) with ordinality u(p, o) where orchestrator._payload_problem(p) is not null limit 1;
  if found then
    perform orchestrator._invalid(format('payloads[%s]', v_bad), orchestrator._payload_problem(p_payloads[v_bad]),
                                  'Store the data elsewhere and enqueue references to it.');
  end if;
  if cardinality(p_idempotency_keys) <> coalesce(cardinality(p_payloads), 0) then
    perform orchestrator._invalid('idempotency_keys', 'must be as many as the payloads', 'Use null for a task without a key.');
  end if;
  select o into v_bad from unnest(p_idempotency_keys) with ordinality u(k, o) where octet_length(k) not between 1 and 255 limit 1;
  if found then
    perform orchestrator._invalid(format('idempotency_keys[%s]', v_bad), 'must be 1 to 255 bytes', 'Use null for a task without a key.');
  end if;
  if cardinality(p_concurrency_keys) <> coalesce(cardinality(p_payloads), 0) then
    perform orchestrator._invalid('concurrency_keys', 'must be as many as the payloads', 'Use null for a task without a key.');
  end if;
end $$;

create or replace function orchestrator.enqueue_many(
  p_type text, p_payloads jsonb[], p_priority int default 0, p_idempotency_keys text[] default null,
  p_max_retries int default null, p_run_at timestamptz default null, p_concurrency_keys text[] default null,
  p_expires_at timestamptz default null, p_after uuid[] default null, p_on_failure text default 'wait', p_meta jsonb default null)
returns table (ordinal int, id uuid, created boolean) language plpgsql as $$
declare
  v_n int := coalesce(cardinality(p_payloads), 0);
  v_later timestamptz := case when p_run_at > clock_timestamp() then p_run_at end;
  v_ids uuid[];
  v_found uuid[];   -- the task of each payload, new or known
  v_parents uuid[] := orchestrator._open_parents(p_after, p_on_failure);
  v_blocked timestamptz;
begin
  perform orchestrator._check_task(p_type, p_priority, null, p_max_retries, p_run_at);
  perform orchestrator._check_many(p_payloads, p_idempotency_keys, p_concurrency_keys);
  perform orchestrator._check_extras(k, p_run_at, p_expires_at, p_on_failure, p_meta) from unnest(coalesce(p_concurrency_keys, array[null])) k
  where num_nonnulls(k, p_expires_at, p_after, p_meta) > 0 or p_on_failure <> 'wait';
  if v_n = 0 then return; end if;
  if v_parents is not null then
    v_blocked := coalesce(v_later, clock_timestamp());
    v_later := clock_timestamp();
  end if;

  -- locks tasks before the ids are drawn, so that nothing that reads by id passes them unseen; LOCK TABLE needs more rights
  insert into orchestrator.tasks (type) select '' where false;
  v_ids := orchestrator._uuidv7s(v_n);
  v_found := v_ids;
  if p_idempotency_keys is null then
    insert into orchestrator.tasks (id, type, payload, priority, max_retries, queued_at, next_retry_at, concurrency_key, expires_at, after,
                                    blocked_until, meta)
    select u.id, p_type, coalesce(u.payload, '{}'), p_priority, p_max_retries, case when v_later is null then clock_timestamp() end, v_later,
           u.turn, p_expires_at, p_after, v_blocked, p_meta
    from unnest(v_ids, p_payloads, p_concurrency_keys) u(id, payload, turn);
  else
    loop
      insert into orchestrator.tasks (id, type, payload, priority, idempotency_key, max_retries, queued_at, next_retry_at, concurrency_key,
                                      expires_at, after, blocked_until, meta)
      select u.id, p_type, coalesce(u.payload, '{}'), p_priority, u.key, p_max_retries, case when v_later is null then clock_timestamp() end, v_later,
             u.turn, p_expires_at, p_after, v_blocked, p_meta
      from unnest(v_ids, p_payloads, p_idempotency_keys, p_concurrency_keys) with ordinality u(id, payload, key, turn, o)
      where not exists (select from orchestrator.tasks t where t.id = u.id)
      order by u.key, u.o   -- so that two callers with the same keys don't deadlock
      on conflict (type, idempotency_key) where idempotency_key is not null do nothing;
      v_found := array(
        select case when u.key is null then u.id
                    else (select t.id from orchestrator.tasks t where t.type = p_type and t.idempotency_key = u.key) end
        from unnest(v_ids, p_idempotency_keys) with ordinality u(id, key, o) order by u.o);
      exit when array_position(v_found, null) is null;   -- else one was pruned between the two statements: it is ours to insert
    end loop;
  end if;
  if v_later is null then
    perform orchestrator._notify_idle(p_type);
  end if;
  if v_parents is not null or p_expires_at is not null then
    perform orchestrator._wait_for(array(select unnest(v_ids) intersect select unnest(v_found)), v_parents, p_after, p_on_failure, p_expires_at);
  end if;
  return query select u.o::int, u.id, u.id = u.own from unnest(v_found, v_ids) with ordinality u(id, own, o);
end $$;
comment on function orchestrator.enqueue_many is
  'Adds a task for each payload and returns (ordinal from 1, id, created). created is false where the idempotency key was known, in the '
  'table or earlier in the array. The rest is as enqueue has it, the same for all. Raises OR001, and then adds none.';

-- A line as the arguments of enqueue, over the defaults, or what is wrong with it.
create or replace function orchestrator._read_line(p_line text, p_defaults jsonb, out problem text, out task jsonb)
language plpgsql stable as $$
declare
  v_reading text := 'is not JSON';
begin
  task := p_line::jsonb;
  if jsonb_typeof(task) <> 'object' then
    problem := 'must be an object such as {"type": "task:backup", "payload": {}}';
    return;
  end if;
  task := '{"priority": 0, "on_failure": "wait"}' || p_defaults || (
    select coalesce(jsonb_object_agg(e.key, e.value), '{}') from jsonb_each(task) e where e.value <> 'null');
  select left(e.key, 50) || ': ' || coalesce(f.rule, 'there is no such field; there are type, payload, priority, idempotency_key, '
    'max_retries, run_at, concurrency_key, expires_at, after, on_failure, meta')
  into problem
  from jsonb_each(task) e left join (values
    ('payload|meta', '', ''), ('type|idempotency_key|concurrency_key|on_failure', '^"', 'must be a string'),
    ('priority|max_retries', '^-?[0-9]{1,9}$', 'must be a whole number'),
    ('after', '^\[("[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"(, )?)+\]$', 'must be a list of ids of tasks'),
    ('(run|expires)_at', '^"\d{4}-\d\d-\d\d[T ][\d:.]+(Z|[+-][\d:]+)"$', 'must be a moment such as 2030-01-31T12:00:00+00:00')) f(field, form, rule)
    on e.key ~ ('^(' || f.field || ')$')
  where f.field is null or e.value::text !~ f.form limit 1;
  if problem is not null then return; end if;
  foreach v_reading in array '{run_at,expires_at}'::text[] loop
    perform (task ->> v_reading)::timestamptz;
  end loop;
  perform orchestrator._check_task(t.type, t.priority, t.idempotency_key, t.max_retries, t.run_at),
          orchestrator._check_extras(t.concurrency_key, t.run_at, t.expires_at, t.on_failure, t.meta),
          orchestrator._check_parents(t.after, t.on_failure)
  from jsonb_to_record(task) t(type text, priority int, idempotency_key text, max_retries int, run_at timestamptz, concurrency_key text,
                               expires_at timestamptz, after uuid[], on_failure text, meta jsonb);
  problem := 'payload: ' || orchestrator._payload_problem(task -> 'payload');
exception when others then   -- whatever a line holds, the others are read
  problem := case when sqlstate = 'OR001' then sqlerrm else v_reading || ': ' || sqlerrm end;
end $$;

-- Lines that agree in all but payload and keys go in together.
create or replace function orchestrator.enqueue_lines(p_lines text[], p_defaults jsonb default '{}', p_stop boolean default false)
returns table (line int, id uuid, created boolean, problem text) language plpgsql as $$
declare
  v_own text[] := '{payload,idempotency_key,concurrency_key}'::text[];   -- of each line
  g record;
begin
  for g in
    with read as materialized (
      select l.n, r.* from unnest(p_lines) with ordinality l(line, n)
      cross join lateral orchestrator._read_line(l.line, p_defaults) r where l.line ~ '[^[:space:]]'),
    alike as (
      select r.problem, r.task - v_own as common, array_agg(r.n order by r.n) as lines, array_agg(r.task -> 'payload' order by r.n) as payloads,
             case when bool_or(r.task ? 'idempotency_key') then array_agg(r.task ->> 'idempotency_key' order by r.n) end as keys,
             case when bool_or(r.task ? 'concurrency_key') then array_agg(r.task ->> 'concurrency_key' order by r.n) end as turns
      from read r
      where not p_stop or r.n <= coalesce((select min(b.n) from read b where b.problem is not null), r.n)
      group by r.problem, common, case when r.problem is not null then r.n end)
    select a.*, t.* from alike a
    cross join lateral jsonb_to_record(case when a.problem is null then a.common else '{}' end) t(
      type text, priority int, max_retries int, run_at timestamptz, expires_at timestamptz, after uuid[], on_failure text, meta jsonb)
    order by a.lines[1]
  loop
    if g.problem is not null then
      return query select g.lines[1]::int, null::uuid, null::boolean, g.problem;
    else
      return query
        select g.lines[m.ordinal]::int, m.id, m.created, null::text
        from orchestrator.enqueue_many(g.type, g.payloads, g.priority, g.keys, g.max_retries, g.run_at, g.turns,
                                       g.expires_at, g.after, g.on_failure, g.meta) m;
    end if;
  end loop;
end $$;
comment on function orchestrator.enqueue_lines is
  'Enqueues lines of JSON {type, payload, …}, with the arguments of enqueue; p_defaults: for those that a line leaves out. Returns for '
  'each line but blank ones its number from 1 and its id and whether it was created, or the problem. p_stop: nothing behind the first '
  'problem is enqueued.';
