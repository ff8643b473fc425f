-- Replacing what waits under a key. Writes tasks, task_events and freed_keys. Locks the task that has the key until the caller
-- commits, so that no claim takes it meanwhile; one in flight only if it passes its key on.

create or replace function orchestrator.replace_task(
  p_type text, p_idempotency_key text, p_payload jsonb default '{}', p_run_at timestamptz default null, p_mode text default 'replace',
  p_priority int default null, p_max_wait interval default null, p_concurrency_key text default null,
  p_meta jsonb default null, out id uuid, out action text)
language plpgsql as $$
declare
  t record;
  v_passed uuid;   -- had the key until now
  v_problem text := orchestrator._payload_problem(p_payload);
  v_later boolean;
  v_tail boolean;
begin
  perform orchestrator._check_task(p_type, coalesce(p_priority, 0), p_idempotency_key, null, p_run_at);
  perform orchestrator._invalid(field, problem, hint) from (values
    (p_idempotency_key is null, 'idempotency_key', 'must be given', 'It says which task to replace.'),
    (p_mode in ('replace', 'append', 'keep') is not true, 'mode', 'must be replace, append or keep', 'append joins arrays and merges objects.'),
    (p_max_wait < interval '0' or p_max_wait is not null and p_run_at is null, 'max_wait', 'must be 0 or more, and goes with run_at', 'It bounds run_at.'),
    (p_mode = 'append' and jsonb_typeof(p_payload) not in ('array', 'object'), 'payload', 'must be an array or an object', 'Such as [1].'),
    (v_problem is not null, 'payload', v_problem, 'Store the data elsewhere and enqueue a reference to it.')) w(wrong, field, problem, hint) where wrong;
  loop
    -- keep doesn't lock a task in flight: its report would wait
    select x.id, x.attempts, x.created_at, x.priority, x.queued_at, x.parked_at, x.blocked_until, x.concurrency_key,
           x.status in ('pending', 'retry_scheduled') and (x.expires_at <= clock_timestamp()) is not true as waits into t
    from orchestrator.tasks x
    where x.type = p_type and x.idempotency_key = p_idempotency_key and (p_mode <> 'keep' or x.status not in ('claimed', 'running'))
    for no key update;
    id := t.id;
    action := case p_mode when 'keep' then 'kept' else 'replaced' end;
    if t.waits and p_mode = 'keep' then return; end if;
    exit when t.waits and t.attempts = 0 and not exists (select from orchestrator.task_steps s where s.task_id = t.id);
    update orchestrator.tasks x set idempotency_key = null, updated_at = clock_timestamp() where x.id = t.id;
    v_passed := coalesce(t.id, v_passed);
    select e.id, case when e.created then 'enqueued' else action end into id, action from orchestrator.enqueue_many(
      p_type, array[p_payload], coalesce(p_priority, 0), array[p_idempotency_key], p_run_at => least(p_run_at, clock_timestamp() + p_max_wait),
      p_concurrency_keys => array[p_concurrency_key], p_meta => p_meta) e;
    if action = 'enqueued' and v_passed is not null then
      insert into orchestrator.task_events (task_id, event, detail) values (v_passed, 'key_passed_on', 'to ' || id);
    end if;
    if action <> 'replaced' then return; end if;   -- else another transaction was faster
  end loop;
  if p_mode = 'append' then   -- only here is a payload read, which a producer may not
    select case when jsonb_typeof(x.payload) <> jsonb_typeof(p_payload) then 'must be an ' || jsonb_typeof(x.payload) || ', like the payload that waits'
                else orchestrator._payload_problem(x.payload || p_payload) || ' with what waits' end, x.payload || p_payload
    into v_problem, p_payload from orchestrator.tasks x where x.id = t.id;
    if v_problem is not null then
      perform orchestrator._invalid('payload', v_problem, 'Use another key, or wait until that task has been claimed.');
    end if;
  end if;
  p_run_at := case when t.parked_at is null then least(p_run_at, t.created_at + p_max_wait) end;
  v_later := p_run_at > clock_timestamp();
  -- into a lane at its tail only: an old place may be below the floor
  v_tail := case when t.queued_at is null then not v_later and t.blocked_until is null else p_priority <> t.priority end;
  update orchestrator.tasks x
  set payload = coalesce(p_payload, '{}'), priority = coalesce(p_priority, x.priority), updated_at = clock_timestamp(),
      queued_at = case when v_later then null when v_tail then clock_timestamp() else x.queued_at end,
      next_retry_at = case when p_run_at is null or x.blocked_until is not null then x.next_retry_at when v_later then p_run_at end,
      blocked_until = case when x.blocked_until is not null then coalesce(p_run_at, x.blocked_until) end
  where x.id = t.id returning x.queued_at is not null into t.waits;
  if t.concurrency_key is not null and coalesce(t.queued_at, t.parked_at) is not null and (v_later or p_priority <> t.priority) then
    perform orchestrator._give_way(p_type, t.concurrency_key);
  end if;
  if t.waits then perform orchestrator._notify_idle(p_type); end if;
end $$;
comment on function orchestrator.replace_task is
  'Enqueues a task under a key, or changes the one that waits under it and never started. p_mode: replace takes the new payload, append '
  'joins arrays and merges objects, keep changes nothing. One that started or ended passes its key on to a new task (keep: only if it '
  'ended). p_run_at, p_priority null: as they were. p_max_wait: bounds p_run_at, from the first call on. p_concurrency_key, p_meta: of a '
  'new task. Returns its id and enqueued, replaced or kept. Raises OR001.';
