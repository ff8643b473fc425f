-- Enqueuing. Writes tasks, then lanes if the lane is new. Locks nothing but the rows it inserts; a repeated idempotency key
-- waits for the transaction that inserted it first. Everything happens in the caller's transaction: commit = enqueued.

-- Refuses what a task can't be, without ever echoing a payload.
create or replace function orchestrator._check_task(p_type text, p_priority int, p_key text, p_max_retries int, p_run_at timestamptz)
returns void language plpgsql stable set search_path = '' as $$
begin
  if p_type is null or octet_length(p_type) not between 1 and 255 or p_type ~ '[[:cntrl:]*]' then
    perform orchestrator._invalid('type', 'must be 1 to 255 bytes, without control characters or *', 'Use a name such as task:backup.');
  elsif p_priority is null or p_priority not between -1000000 and 1000000 then
    perform orchestrator._invalid('priority', 'must be a whole number from -1000000 to 1000000', 'Higher is claimed first; the default is 0.');
  elsif octet_length(p_key) not between 1 and 255 then
    perform orchestrator._invalid('idempotency_key', 'must be 1 to 255 bytes', 'Leave it out, or hash a longer key.');
  elsif p_max_retries not between 0 and 1000 then
    perform orchestrator._invalid('max_retries', 'must be from 0 to 1000', 'Leave it out for the policy of the type.');
  elsif p_run_at = 'infinity' or p_run_at = '-infinity' or p_run_at > clock_timestamp() + interval '10 years' then
    perform orchestrator._invalid('run_at', 'must be a moment within the next 10 years', 'Leave it out to run at once.');
  end if;
end $$;

-- Always by its text, since jsonb's own size says little: a value read from a table may be compressed, and a number such as
-- 1e100000 takes ten bytes.
create or replace function orchestrator._payload_too_large(p_payload jsonb) returns boolean
language sql stable parallel safe as $$
  select octet_length(p_payload::text) > 262144
$$;

-- The task first, the lane after: whoever drops idle lanes then sees this writer in pg_locks.
create or replace function orchestrator._announce(p_type text, p_priority int) returns void
language plpgsql set search_path = '' as $$
begin
  if not exists (select from orchestrator.lanes l where l.type = p_type and l.priority = p_priority and l.dropped_at is null) then
    insert into orchestrator.lanes (type, priority) values (p_type, p_priority);
  end if;
  -- the doorbell: only if some worker that runs this type is waiting
  perform pg_notify('orchestrator', p_type)
  where exists (select from orchestrator.workers w where w.idle and p_type like any (w.handles));
end $$;

create or replace function orchestrator.enqueue(
  p_type text, p_payload jsonb default '{}', p_priority int default 0, p_idempotency_key text default null,
  p_max_retries int default null, p_run_at timestamptz default null)
returns uuid language plpgsql
set search_path = '' set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off as $$
declare
  v_id uuid;
  v_now timestamptz := clock_timestamp();
  v_later timestamptz := case when p_run_at > v_now then p_run_at end;
begin
  perform orchestrator._check_task(p_type, p_priority, p_idempotency_key, p_max_retries, p_run_at);
  if orchestrator._payload_too_large(p_payload) then
    perform orchestrator._invalid('payload', 'is over 256 KiB', 'Store the data elsewhere and enqueue a reference to it.');
  end if;
  loop
    insert into orchestrator.tasks as t (type, payload, priority, idempotency_key, max_retries, queued_at, next_retry_at)
    values (p_type, coalesce(p_payload, '{}'), p_priority, p_idempotency_key, p_max_retries,
            case when v_later is null then clock_timestamp() end, v_later)
    on conflict (type, idempotency_key) where idempotency_key is not null do nothing
    returning t.id into v_id;
    exit when found;
    select t.id into v_id from orchestrator.tasks t where t.type = p_type and t.idempotency_key = p_idempotency_key;
    if found then return v_id; end if;   -- not found: it was pruned in between, so it is ours to insert
  end loop;
  if v_later is null then
    perform orchestrator._announce(p_type, p_priority);
  end if;
  return v_id;
end $$;
comment on function orchestrator.enqueue(text, jsonb, int, text, int, timestamptz) is
  'Adds a task in the caller''s transaction and returns its id. A repeated (type, idempotency_key) returns the first task''s '
  'id and changes nothing. p_max_retries null: the policy of the type. p_run_at: not before that moment. Raises OR001.';

create or replace function orchestrator.enqueue_many(
  p_type text, p_payloads jsonb[], p_priority int default 0, p_idempotency_keys text[] default null,
  p_max_retries int default null, p_run_at timestamptz default null)
returns table (ordinal int, id uuid, created boolean) language plpgsql
set search_path = '' set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
declare
  v_n int := coalesce(cardinality(p_payloads), 0);
  v_later timestamptz := case when p_run_at > clock_timestamp() then p_run_at end;
  v_ids uuid[];
  v_bad int;
begin
  perform orchestrator._check_task(p_type, p_priority, null, p_max_retries, p_run_at);
  select o into v_bad from unnest(p_payloads) with ordinality u(p, o) where orchestrator._payload_too_large(p) limit 1;
  if found then
    perform orchestrator._invalid(format('payloads[%s]', v_bad), 'is over 256 KiB', 'Store the data elsewhere and enqueue a reference to it.');
  end if;
  if cardinality(p_idempotency_keys) <> v_n then
    perform orchestrator._invalid('idempotency_keys', 'must be as many as the payloads', 'Use null for a task without a key.');
  end if;
  select o into v_bad from unnest(p_idempotency_keys) with ordinality u(k, o) where octet_length(k) not between 1 and 255 limit 1;
  if found then
    perform orchestrator._invalid(format('idempotency_keys[%s]', v_bad), 'must be 1 to 255 bytes', 'Use null for a task without a key.');
  end if;
  if v_n = 0 then return; end if;

  -- takes the lock on tasks before the ids are drawn, so that nothing that reads by id passes them unseen; LOCK TABLE would
  -- need more rights than a producer has
  insert into orchestrator.tasks (type) select '' where false;
  v_ids := orchestrator._uuidv7s(v_n);
  if p_idempotency_keys is null then
    insert into orchestrator.tasks (id, type, payload, priority, max_retries, queued_at, next_retry_at)
    select u.id, p_type, coalesce(u.payload, '{}'), p_priority, p_max_retries, case when v_later is null then clock_timestamp() end, v_later
    from unnest(v_ids, p_payloads) u(id, payload);
    return query select o::int, u.id, true from unnest(v_ids) with ordinality u(id, o);
  else
    return query select * from orchestrator._enqueue_keyed(p_type, v_ids, p_payloads, p_priority, p_idempotency_keys, p_max_retries, v_later);
  end if;
  if v_later is null then
    perform orchestrator._announce(p_type, p_priority);
  end if;
end $$;
comment on function orchestrator.enqueue_many(text, jsonb[], int, text[], int, timestamptz) is
  'Adds a task for each payload, in one statement, and returns (ordinal from 1, id, created); created is false where the '
  'idempotency key was known, in the table or earlier in the array. Raises OR001, and then adds none.';

-- Inserts in the order of the keys, so that two callers with the same keys don't deadlock.
create or replace function orchestrator._enqueue_keyed(
  p_type text, p_ids uuid[], p_payloads jsonb[], p_priority int, p_keys text[], p_max_retries int, p_later timestamptz)
returns table (ordinal int, id uuid, created boolean) language plpgsql
set search_path = '' set plan_cache_mode = force_generic_plan
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
#variable_conflict use_column
declare
  v_ids uuid[];
begin
  loop
    insert into orchestrator.tasks (id, type, payload, priority, idempotency_key, max_retries, queued_at, next_retry_at)
    select u.id, p_type, coalesce(u.payload, '{}'), p_priority, u.key, p_max_retries,
           case when p_later is null then clock_timestamp() end, p_later
    from unnest(p_ids, p_payloads, p_keys) with ordinality u(id, payload, key, o)
    where not exists (select from orchestrator.tasks t where t.id = u.id)
    order by u.key, u.o
    on conflict (type, idempotency_key) where idempotency_key is not null do nothing;
    v_ids := array(
      select case when u.key is null then u.id
                  else (select t.id from orchestrator.tasks t where t.type = p_type and t.idempotency_key = u.key) end
      from unnest(p_ids, p_keys) with ordinality u(id, key, o) order by u.o);
    exit when array_position(v_ids, null) is null;   -- else one was pruned between the two statements: it is ours to insert
  end loop;
  return query select u.o::int, u.id, u.id = u.own from unnest(v_ids, p_ids) with ordinality u(id, own, o);
end $$;
