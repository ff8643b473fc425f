-- Steps and signals: what a handler did, and what others sent it, kept across its attempts. Writes task_steps; a signal that ends a
-- wait also tasks. Lock order: a task → its steps. Only snooze_task knows of it: the signal may come while a task falls asleep.

create table if not exists orchestrator.task_steps (
  task_id uuid,
  name    text collate "C",
  result  jsonb,
  at      timestamptz,
  until   timestamptz,
  primary key (task_id, name)
);
comment on table orchestrator.task_steps is
  'By name, what the steps of a task returned and which signals it got (at: when; null: its handler waits for that signal until '
  'then). Goes with the task.';

create or replace function orchestrator._check_name(p_name text) returns void
language plpgsql stable as $$
begin
  if (octet_length(p_name) between 1 and 255) is not true then
    perform orchestrator._invalid('name', 'must be 1 to 255 bytes', 'Use a name such as charge.');
  end if;
end $$;

create or replace function orchestrator._keep_step(p_id uuid, p_name text, p_field text, p_result jsonb) returns void
language plpgsql as $$
begin
  perform orchestrator._check_name(p_name);
  if orchestrator._payload_problem(p_result) is not null then
    perform orchestrator._invalid(p_field, orchestrator._payload_problem(p_result), 'Store the data elsewhere, and a reference to it here.');
  end if;
  insert into orchestrator.task_steps as s (task_id, name, result, at) values (p_id, p_name, coalesce(p_result, 'null'), clock_timestamp())
  on conflict (task_id, name) do update set result = coalesce(p_result, 'null'), at = clock_timestamp() where s.at is null;
end $$;

-- True after its completion, too: the transaction of that may record steps.
create or replace function orchestrator._lock_held(p_claim_id bigint, p_id uuid) returns boolean
language plpgsql as $$
begin
  perform from orchestrator.tasks t
  where t.id = p_id and t.claim_id is not distinct from p_claim_id and t.status in ('claimed', 'running', 'completed') for no key update;
  return found;
end $$;

create or replace function orchestrator.record_step(p_claim_id bigint, p_id uuid, p_name text, p_result jsonb) returns boolean
language plpgsql as $$
begin
  if not orchestrator._lock_held(p_claim_id, p_id) then return false; end if;
  perform orchestrator._keep_step(p_id, p_name, 'result', p_result);
  return true;
end $$;
comment on function orchestrator.record_step is
  'Keeps what a step of a task returned, unless there is something of that name. Returns whether the claim still holds it. Raises OR001.';

create or replace function orchestrator.steps(p_id uuid) returns jsonb
language sql stable as $$
  select coalesce(jsonb_object_agg(s.name, s.result), '{}') from orchestrator.task_steps s where s.task_id = p_id and s.at is not null
$$;
comment on function orchestrator.steps is 'What the steps of a task returned, and the signals that it got: {name: result}.';

create or replace function orchestrator.await_signal(
  p_claim_id bigint, p_id uuid, p_name text, p_timeout interval default null, out held boolean, out value jsonb, out snooze interval)
language plpgsql as $$
declare
  v_now timestamptz := clock_timestamp();
  v_until timestamptz;
begin
  perform orchestrator._check_name(p_name);
  held := orchestrator._lock_held(p_claim_id, p_id);
  if not held then return; end if;
  insert into orchestrator.task_steps as s (task_id, name, until) values (p_id, p_name, coalesce(v_now + p_timeout, 'infinity'))
  on conflict (task_id, name) do update set until = case when s.at is null then s.until end
  returning s.result, s.until into value, v_until;
  if v_until > v_now then
    snooze := least(v_until, v_now + interval '1 hour') - v_now;
  end if;
end $$;
comment on function orchestrator.await_signal is
  'For a handler: the value of a signal, else how long to snooze before asking again, or neither: p_timeout is over since the first '
  'call. held: whether the claim still holds the task. Raises OR001.';

-- Makes a locked task ready that is off until a signal which has come; once.
create or replace function orchestrator._wake(p_id uuid) returns void
language plpgsql as $$
declare
  v_type text;
  v_names text[] := array(select s.name from orchestrator.task_steps s where s.task_id = p_id and s.at is not null and s.until is not null);
begin
  if v_names = '{}' then return; end if;
  update orchestrator.tasks t set queued_at = clock_timestamp(), next_retry_at = null, updated_at = clock_timestamp()
  where t.id = p_id and t.status = 'pending' and t.next_retry_at is not null returning t.type into v_type;
  if not found then return; end if;
  update orchestrator.task_steps s set until = null where s.task_id = p_id and s.name = any (v_names);
  perform orchestrator._notify_idle(v_type);
end $$;

create or replace function orchestrator.signal_task(p_id uuid, p_name text, p_value jsonb default '{}') returns text
language plpgsql as $$
declare
  v_state text;
begin
  select t.status into v_state from orchestrator.tasks t where t.id = p_id for no key update;
  if not found then return 'not_found'; end if;
  if v_state in ('completed', 'cancelled', 'dead_letter') then return v_state; end if;
  select case when s.at is not null then 'known' when s.until <= clock_timestamp() then 'timed_out' end into v_state
  from orchestrator.task_steps s where s.task_id = p_id and s.name = p_name;
  if found and v_state is not null then return v_state; end if;
  perform orchestrator._keep_step(p_id, p_name, 'value', p_value);
  perform orchestrator._add_event(p_id, 'signalled', null, null, p_name || ' by ' || current_user);
  perform orchestrator._wake(p_id);
  return 'delivered';
end $$;
comment on function orchestrator.signal_task is
  'Leaves a value for a task, and wakes it if it waits for that name. Returns delivered, known (the first counts, also a step of that '
  'name), timed_out, not_found, or the status of a task that has ended. Raises OR001.';
