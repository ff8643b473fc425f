-- Leader election and retention. Writes workers, leader_state, tasks and what is kept of them. Every function of the leader takes
-- (worker, term), locks the leader's row to the end of its transaction, and does nothing under a stale term. Lock order: the
-- leader's row first, except that an election locks the leader of before, if nobody else has it.

create or replace function orchestrator.acquire_leadership(
  p_worker_id text, p_length interval, out is_leader boolean, out term bigint, out until timestamptz)
language plpgsql as $$
begin
  -- A lease that ends later than one from now is older than a step of the clock: nobody would lead until then.
  update orchestrator.workers w set leader_until = clock_timestamp() + p_length
  where w.id in (select o.id from orchestrator.workers o where o.is_leader and o.id <> p_worker_id
                   and o.leader_until > clock_timestamp() + p_length for no key update skip locked);
  -- first the lock, then the time: an UPDATE that waits computes its values before
  perform from orchestrator.workers w where w.id = p_worker_id for no key update;
  -- demote whoever's lease has run out; skip locked: the leader is just extending it, or at work
  update orchestrator.workers w set is_leader = false
  where w.id in (select o.id from orchestrator.workers o where o.is_leader and o.leader_until <= clock_timestamp() for no key update skip locked);
  update orchestrator.workers w
  set is_leader = true, leader_until = clock_timestamp() + p_length,
      leader_term = case when w.is_leader then w.leader_term else nextval('orchestrator.leader_terms') end
  where w.id = p_worker_id and w.declared_dead_at is null
    and not exists (select from orchestrator.workers o where o.is_leader and o.id <> p_worker_id)
  returning w.leader_term, w.leader_until into term, until;
  is_leader := found;
exception when unique_violation then   -- another one was elected between the look and the update
  is_leader := false;
end $$;
comment on function orchestrator.acquire_leadership is
  'Extends this worker''s leadership by p_length from now, or elects it if nobody leads. term rises at each election.';

create or replace function orchestrator.resign_leadership(p_worker_id text, p_term bigint) returns boolean
language plpgsql as $$
begin
  update orchestrator.workers w set is_leader = false where w.id = p_worker_id and w.is_leader and w.leader_term = p_term;
  return found;
end $$;
comment on function orchestrator.resign_leadership is 'Ends a term early: the next leader need not wait for the lease.';

-- Locks the leader's row, so that nobody is elected before the caller's transaction ends.
create or replace function orchestrator._leads(p_worker_id text, p_term bigint) returns boolean
language plpgsql as $$
begin
  perform from orchestrator.workers w
  where w.id = p_worker_id and w.is_leader and w.leader_term = p_term and w.leader_until > clock_timestamp() for no key update;
  return found;
end $$;

-- Deletes tasks that have ended, with all that is kept of them; returns how many. p_skip_locked: it waits for nobody who has a child of
-- one locked.
create or replace function orchestrator._delete_tasks(p_ids uuid[], p_skip_locked boolean) returns int
language plpgsql as $$
declare
  v_n int;
begin
  perform orchestrator._parents_ended(   -- first, since some completed
    array(select t.id from orchestrator.tasks t where t.id = any (p_ids) and t.completed_at is not null), p_skip_locked);
  p_ids := array(   -- one that completed stays while a child of it is locked, which would else be cancelled
    select t.id from orchestrator.tasks t where t.id = any (p_ids) and (t.status in ('cancelled', 'dead_letter')
      or t.status = 'completed' and not exists (select from orchestrator.task_waits w where w.parent = t.id)) for update);
  delete from orchestrator.task_events e where e.task_id = any (p_ids);
  delete from orchestrator.tasks t where t.id = any (p_ids);
  get diagnostics v_n = row_count;
  perform orchestrator._parents_ended(p_ids, p_skip_locked);   -- of dead letters
  if exists (select from orchestrator.task_steps) then
    delete from orchestrator.task_steps s where s.task_id = any (p_ids);
  end if;
  return v_n;
end $$;

-- Walks the primary key, history by time, from where it stopped.
create or replace function orchestrator.prune(
  p_worker_id text, p_term bigint, p_completed interval, p_dead_letter interval, p_limit int default 1000,
  out completed int, out dead_letters int, out more boolean)
language plpgsql as $$
declare
  v_cursor uuid;
  v_ids uuid[];
  v_completed_before timestamptz := clock_timestamp() - p_completed;   -- clock_timestamp() itself is no index condition
  v_dead_before timestamptz := clock_timestamp() - p_dead_letter;
begin
  perform set_config('synchronous_commit', 'off', true);
  if not orchestrator._leads(p_worker_id, p_term) then return; end if;
  completed := 0;
  dead_letters := 0;
  more := false;
  if p_completed > interval '0' then
    select s.prune_cursor into v_cursor from orchestrator.leader_state s;
    v_ids := array(select t.id from orchestrator.tasks t
                   where t.id > v_cursor and t.id < orchestrator._uuid_at(v_completed_before) order by t.id limit p_limit);
    more := cardinality(v_ids) = p_limit;
    update orchestrator.leader_state
    set prune_cursor = case when more then v_ids[p_limit] else '00000000-0000-0000-0000-000000000000' end;
    completed := orchestrator._delete_tasks(array(
      select t.id from orchestrator.tasks t where t.id = any (v_ids) and t.completed_at < v_completed_before), false);
  end if;
  if p_dead_letter > interval '0' then
    v_ids := array(select t.id from orchestrator.tasks t where t.dead_at < v_dead_before order by t.dead_at limit p_limit
                   for update skip locked);
    more := more or cardinality(v_ids) = p_limit;
    dead_letters := orchestrator._delete_tasks(v_ids, false);
  end if;
end $$;
comment on function orchestrator.prune is
  'The leader''s: deletes tasks that completed or were cancelled p_completed ago, and dead letters of p_dead_letter ago (0: never), '
  'with their events and steps. Looks at p_limit tasks of each. more: call it again at once. Nulls under a stale term.';
