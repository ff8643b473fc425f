-- What an operator does: cancel, retry, pause. Writes tasks, task_events, task_types, sometimes lanes. Locks tasks (then those that wait
-- for them) and no claim: asking a task to stop doesn't take it off its claim; the outcome does.

create or replace function orchestrator.cancel_task(p_id uuid) returns text
language plpgsql as $$
declare
  t record;   -- not the whole row: an operator has no right on payloads
begin
  select x.status, x.worker_id, x.cancel_requested_at into t
  from orchestrator.tasks x where x.id = p_id for no key update;
  if not found then return 'not_found'; end if;
  if t.status in ('pending', 'retry_scheduled') then
    perform orchestrator._cancel_waiting(p_id, 'cancelled', orchestrator._by());
    -- a bulk operation holds other tasks' rows, so it waits for none
    perform orchestrator._parents_ended(array[p_id], coalesce(current_setting('orchestrator.operation', true), '') <> '');
    return 'cancelled';
  elsif t.status in ('claimed', 'running') then
    if t.cancel_requested_at is null then
      update orchestrator.tasks x set cancel_requested_at = clock_timestamp(), updated_at = clock_timestamp() where x.id = p_id;
      perform orchestrator._add_event(p_id, 'cancel_requested', null, t.worker_id, orchestrator._by());
      perform pg_notify('orchestrator_cancel', '');
    end if;
    return 'cancelling';
  end if;
  return t.status;
end $$;
comment on function orchestrator.cancel_task is
  'Cancels a waiting task at once (returns cancelled); asks one in flight to stop (cancelling): it ends so when its handler does. With '
  'it goes what waits for it. Else returns the status of what has ended, or not_found.';

create or replace function orchestrator.retry_task(p_id uuid, p_fresh boolean default false) returns text
language plpgsql as $$
declare
  t record;
begin
  select x.status, x.type into t from orchestrator.tasks x where x.id = p_id for no key update;
  if not found then return 'not_found'; end if;
  if t.status not in ('dead_letter', 'cancelled') then return t.status; end if;
  update orchestrator.tasks x
  set status = 'pending', queued_at = clock_timestamp(), updated_at = clock_timestamp(), attempts = 0, recoveries = 0, worker_id = null,
      claim_id = null, claimed_at = null, started_at = null, completed_at = null, dead_at = null, progress = null
  where x.id = p_id;
  delete from orchestrator.task_steps s where s.task_id = p_id and (s.at is null or p_fresh);   -- a wait for a signal begins anew
  perform orchestrator._add_event(p_id, 'retried', null, null, orchestrator._by());
  perform orchestrator._notify_idle(t.type);
  return 'pending';
end $$;
comment on function orchestrator.retry_task is
  'Puts a dead letter or cancelled task back at the tail of its lane, with all its retries. It goes on after its last step; p_fresh: '
  'steps and signals are forgotten. Returns pending, else its status, or not_found.';

-- How many types that are registered, ready, or handled under a pattern does a type or pattern cover?
create or replace function orchestrator._covered_types(p_type text) returns int
language plpgsql stable as $$
begin
  if p_type is distinct from '*' then
    perform orchestrator._check_task(coalesce(orchestrator._prefix(p_type), p_type), 0, null, null, null);
  end if;
  return (select count(*) from (
    select p.type from orchestrator.task_types p where p.max_retries is not null and p.type like orchestrator._like(p_type)
    union select orchestrator._ready_types(orchestrator._prefix(p_type), '{}') where orchestrator._prefix(p_type) is not null
    union select p_type where orchestrator._prefix(p_type) is null and orchestrator._registered_as(p_type) is not null) m);
end $$;

create or replace function orchestrator.pause_type(p_type text, out changed boolean, out matching int)
language plpgsql as $$
begin
  matching := orchestrator._covered_types(p_type);
  insert into orchestrator.task_types as t (type, paused) values (p_type, true)
  on conflict (type) do update set paused = true, updated_at = clock_timestamp() where not t.paused;
  changed := found;
  if changed then perform orchestrator._log('pause', 'type', p_type); end if;
end $$;
comment on function orchestrator.pause_type is
  'Keeps tasks of a type or pattern from being claimed. Returns whether that is new, and how many known types it covers. Raises OR001.';

create or replace function orchestrator.resume_type(p_type text, out changed boolean, out matching int)
language plpgsql as $$
begin
  matching := orchestrator._covered_types(p_type);
  update orchestrator.task_types t set paused = false, updated_at = clock_timestamp() where t.type = p_type and t.paused;
  changed := found;
  if changed then
    perform orchestrator._log('resume', 'type', p_type);
    perform pg_notify('orchestrator', '') where exists (select from orchestrator.workers w where w.idle);
  end if;
end $$;
comment on function orchestrator.resume_type is
  'Undoes pause_type for the same type or pattern. Returns whether it was paused, and how many known types it covers. Raises OR001.';
