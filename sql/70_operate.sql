-- What an operator does: cancel, retry, pause. Writes tasks, task_events, lanes, task_types. Each locks one task row and no
-- claim: asking a task to stop doesn't take it off its claim; the outcome does.

create or replace function orchestrator.cancel_task(p_id uuid) returns text
language plpgsql
set search_path = '' set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off as $$
declare
  t record;   -- not the whole row: an operator has no right on payloads
begin
  select x.status, x.worker_id, x.cancel_requested_at, x.type, x.priority into t from orchestrator.tasks x where x.id = p_id for no key update;
  if not found then return 'not_found'; end if;
  if t.status in ('pending', 'retry_scheduled') then
    update orchestrator.tasks x
    set status = 'cancelled', completed_at = clock_timestamp(), updated_at = clock_timestamp(), queued_at = null, next_retry_at = null
    where x.id = p_id;
    perform orchestrator._record(p_id, 'cancelled', null, null, null);
    return 'cancelled';
  elsif t.status in ('claimed', 'running') then
    if t.cancel_requested_at is null then
      update orchestrator.tasks x set cancel_requested_at = clock_timestamp(), updated_at = clock_timestamp() where x.id = p_id;
      perform orchestrator._record(p_id, 'cancel_requested', null, t.worker_id, null);
      perform pg_notify('orchestrator_cancel', p_id::text);
    end if;
    return 'cancelling';
  end if;
  return t.status;
end $$;
comment on function orchestrator.cancel_task(uuid) is
  'Cancels a waiting task at once (returns cancelled); asks one in flight to stop (cancelling): it ends as cancelled when its '
  'handler does. Of one that has ended returns the status, of an unknown one not_found.';

create or replace function orchestrator.retry_task(p_id uuid) returns text
language plpgsql
set search_path = '' set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off as $$
declare
  t record;   -- not the whole row: an operator has no right on payloads
begin
  select x.status, x.worker_id, x.cancel_requested_at, x.type, x.priority into t from orchestrator.tasks x where x.id = p_id for no key update;
  if not found then return 'not_found'; end if;
  if t.status not in ('dead_letter', 'cancelled') then return t.status; end if;
  update orchestrator.tasks x
  set status = 'pending', queued_at = clock_timestamp(), updated_at = clock_timestamp(), attempts = 0, recoveries = 0, worker_id = null,
      claim_id = null, claimed_at = null, started_at = null, completed_at = null, dead_at = null, result = null
  where x.id = p_id;
  perform orchestrator._record(p_id, 'retried', null, null, 'by ' || current_user);
  perform orchestrator._announce(t.type, t.priority);
  return 'pending';
end $$;
comment on function orchestrator.retry_task(uuid) is
  'Puts a dead letter or a cancelled task back in the queue, at the tail, with all its retries. Returns pending; of a task in '
  'another status that status; of an unknown one not_found.';

create or replace function orchestrator.retry_dead_letters(p_type text default null, p_limit int default 1000) returns int
language plpgsql
set search_path = '' set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off as $$
declare
  v_id uuid;
  v_n int := 0;
begin
  for v_id in
    select t.id from orchestrator.tasks t where t.dead_at is not null and (p_type is null or t.type = p_type)
    order by t.dead_at limit p_limit for no key update skip locked
  loop
    v_n := v_n + (orchestrator.retry_task(v_id) = 'pending')::int;
  end loop;
  return v_n;
end $$;
comment on function orchestrator.retry_dead_letters(text, int) is
  'Retries up to p_limit dead letters, the oldest first; p_type null: of all types. Returns how many.';

create or replace function orchestrator.pause_type(p_type text) returns boolean
language plpgsql set search_path = '' as $$
begin
  perform orchestrator._check_task(p_type, 0, null, null, null);
  insert into orchestrator.task_types as t (type, paused) values (p_type, true)
  on conflict (type) do update set paused = true, updated_at = clock_timestamp() where not t.paused;
  return found;
end $$;
comment on function orchestrator.pause_type(text) is
  'Keeps tasks of a type from being claimed; what is in flight goes on. Returns whether that is new. Raises OR001.';

create or replace function orchestrator.resume_type(p_type text) returns boolean
language plpgsql set search_path = '' as $$
begin
  update orchestrator.task_types t set paused = false, updated_at = clock_timestamp() where t.type = p_type and t.paused;
  if not found then return false; end if;
  perform orchestrator._announce(p_type, l.priority)
  from (select distinct priority from orchestrator.lanes where type = p_type and dropped_at is null) l;
  return true;
end $$;
comment on function orchestrator.resume_type(text) is 'Undoes pause_type. Returns whether the type was paused.';
