-- Ending an attempt: complete, fail, release, snooze. Each names its claim, the fence: a task that was recovered and claimed again has
-- another, so a late outcome changes nothing, and is rejected. A task that was asked to cancel ends as cancelled, however its
-- attempt ended. Writes claims, tasks, task_events, and lane_floors where a task is put back.
-- Lock order: claims (ascending id) → tasks → lane_floors → tasks that wait for what ended (45_after.sql).

create or replace function orchestrator._default_policy(out max_retries int, out base_delay interval, out max_delay interval)
language sql immutable parallel safe begin atomic
  select 3, interval '1 second', interval '1 hour';
end;

create or replace function orchestrator.retry_delay(p_attempt int, p_base interval, p_max interval, p_random double precision)
returns interval language sql immutable parallel safe begin atomic
  -- bounded: 2^n overflows, and make_interval() of a huge number turns negative
  select make_interval(secs =>
    (0.5 + 0.5 * least(greatest(coalesce(p_random, 1), 0), 1))
    * least(greatest(extract(epoch from coalesce(p_base, d.base_delay)), 0)::double precision * power(2, least(greatest(coalesce(p_attempt, 1), 1) - 1, 60)),
            greatest(extract(epoch from coalesce(p_max, d.max_delay)), 0)::double precision,
            extract(epoch from orchestrator.longest_delay())::double precision))
  from orchestrator._default_policy() d;
end;
comment on function orchestrator.retry_delay is
  'base · 2^(attempt − 1), at most max, times a factor from a half (random = 0) to 1 (random = 1). Safe for any input.';

-- The registered name that applies to a type: itself, else the longest pattern.
create or replace function orchestrator._registered_as(p_type text) returns text
language sql stable as $$
  select p.type from orchestrator.task_types p where p.max_retries is not null and p_type like p.likes
  order by p.type = p_type desc, length(p.type) desc limit 1
$$;

create or replace function orchestrator._policy(p_type text) returns orchestrator.task_types
language sql stable as $$
  select coalesce(p.type, p_type), p.likes, coalesce(p.max_retries, d.max_retries), coalesce(p.base_delay, d.base_delay),
         coalesce(p.max_delay, d.max_delay), p.timeout, p.paused, p.updated_at
  from orchestrator._default_policy() d left join orchestrator.task_types p on p.type = orchestrator._registered_as(p_type)
$$;

-- The newest 100 events of a task are kept, since it may snooze for ever.
create or replace function orchestrator._add_event(p_task_id uuid, p_event text, p_attempt int, p_worker_id text, p_detail text) returns void
language plpgsql as $$
begin
  insert into orchestrator.task_events (task_id, event, attempt, worker_id, detail)
  values (p_task_id, p_event, p_attempt, p_worker_id, orchestrator._kept(p_detail));
  delete from orchestrator.task_events e where e.task_id = p_task_id and e.id <=
    (select o.id from orchestrator.task_events o where o.task_id = p_task_id order by o.id desc offset 100 limit 1);
end $$;

-- Takes ended tasks off their locked claim, which goes with the last of them.
create or replace function orchestrator._shrink_claim(p_claim_id bigint, p_ended int) returns void
language plpgsql as $$
declare
  v_limit text;
  v_key text;
begin
  if p_ended > 0 then
    delete from orchestrator.claims c where c.id = p_claim_id and c.open_tasks <= p_ended returning c.limit_name, c.key into v_limit, v_key;
    if not found then
      update orchestrator.claims c set open_tasks = open_tasks - p_ended where c.id = p_claim_id returning c.limit_name, c.key into v_limit, v_key;
    end if;
    if v_limit is not null then
      perform orchestrator._give_back(v_limit, v_key);
    end if;
  end if;
end $$;

create or replace function orchestrator.complete_tasks(
  p_claim_ids bigint[], p_counts int[], p_ids uuid[], p_results jsonb[] default null, p_again boolean default true)
returns table (id uuid, outcome text) language plpgsql as $$
declare
  v_from int := 1;
  v_to int;
  v_ids uuid[];
  v_done int;
  v_now timestamptz;
begin
  perform from orchestrator.claims c where c.id = any (p_claim_ids) order by c.id for no key update;
  v_now := clock_timestamp();   -- after the wait for the locks
  if p_results is not null then   -- by 100, since each result is looked for by its id's place: 2,000 at once took 7.5 µs each, so 3.8
    select coalesce(array_agg(c.id order by c.o, k), '{}'), array_agg(least(100, c.n - k) order by c.o, k) into p_claim_ids, p_counts
    from unnest(p_claim_ids, p_counts) with ordinality c(id, n, o) cross join generate_series(0, c.n - 1, 100) k;
  end if;
  for i in 1..cardinality(p_claim_ids) loop
    v_to := v_from + p_counts[i] - 1;
    v_ids := p_ids[v_from:v_to];
    update orchestrator.tasks t
    set status = 'completed', started_at = coalesce(t.started_at, t.claimed_at), completed_at = v_now, updated_at = v_now,
        attempts = t.attempts + (t.status = 'claimed')::int,
        result = p_results[v_from - 1 + array_position(v_ids, t.id)]   -- not a join, which would walk the table
    where t.id = any (v_ids) and t.claim_id is not distinct from p_claim_ids[i]
      and t.status in ('claimed', 'running') and t.cancel_requested_at is null;
    get diagnostics v_done = row_count;
    if v_done < cardinality(v_ids) then
      perform orchestrator._lock_and_end_cancelled(p_claim_ids[i], v_ids);
      return query
        select u.id, case when t.status = 'cancelled' and t.claim_id = p_claim_ids[i] then 'cancelled' else 'rejected' end
        from unnest(v_ids) u(id) left join orchestrator.tasks t on t.id = u.id
        where (p_again and t.status = 'completed' and t.claim_id = p_claim_ids[i]) is not true;   -- if true: a report sent again
    end if;
    perform orchestrator._shrink_claim(p_claim_ids[i], v_done);
    v_from := v_to + 1;
  end loop;
  if exists (select from orchestrator.task_waits) then
    perform orchestrator._parents_ended(p_ids);
  end if;
end $$;
comment on function orchestrator.complete_tasks is
  'Completes tasks: p_ids holds p_counts[i] of p_claim_ids[i], one claim after another; p_results, if given, one for each. Returns '
  'only those that did not complete: cancelled (it was asked for) or rejected (no longer of that claim; if p_again is false, also '
  'completed already: what commits with it must not commit twice).';

-- Ends those of a locked claim's tasks that were asked to cancel, and leaves the others locked: nobody can ask any more.
create or replace function orchestrator._lock_and_end_cancelled(p_claim_id bigint, p_ids uuid[]) returns int
language plpgsql as $$
declare
  v_n int := 0;
  r record;
begin
  perform from orchestrator.tasks t
  where t.id = any (p_ids) and t.claim_id is not distinct from p_claim_id and t.status in ('claimed', 'running') order by t.id for no key update;
  for r in
    update orchestrator.tasks t
    set status = 'cancelled', completed_at = clock_timestamp(), updated_at = clock_timestamp(), cancel_requested_at = null,
        started_at = coalesce(t.started_at, t.claimed_at), attempts = t.attempts + (t.status = 'claimed')::int
    where t.id = any (p_ids) and t.claim_id is not distinct from p_claim_id
      and t.status in ('claimed', 'running') and t.cancel_requested_at is not null
    returning t.id, t.attempts, t.worker_id
  loop
    perform orchestrator._add_event(r.id, 'cancelled', r.attempts, r.worker_id, null);
    v_n := v_n + 1;
  end loop;
  perform orchestrator._shrink_claim(p_claim_id, v_n);
  return v_n;
end $$;

-- A failed attempt of a task of a locked claim. Returns the status that it got, or 'rejected'.
create or replace function orchestrator._fail(
  p_claim_id bigint, p_id uuid, p_error text, p_traceback text, p_retry_after interval, p_permanent boolean, p_recovered boolean)
returns text language plpgsql as $$
declare
  v_task orchestrator.tasks;
  v_policy orchestrator.task_types;
  v_attempts int;
  v_status orchestrator.task_status;
  v_ends boolean;
  v_now timestamptz := clock_timestamp();
  v_delay interval;
begin
  select * into v_task from orchestrator.tasks t
  where t.id = p_id and t.claim_id is not distinct from p_claim_id and t.status in ('claimed', 'running') for no key update;
  if not found then return 'rejected'; end if;
  v_policy := orchestrator._policy(v_task.type);
  v_attempts := v_task.attempts + (v_task.status = 'claimed')::int;
  v_status := (case when v_task.cancel_requested_at is not null then 'cancelled'
                   when p_permanent or v_attempts > least(coalesce(v_task.max_retries, v_policy.max_retries), 1000) then 'dead_letter'
                   else 'retry_scheduled' end)::orchestrator.task_status;
  v_ends := v_status <> 'retry_scheduled';
  v_delay := least(greatest(coalesce(p_retry_after, orchestrator.retry_delay(v_attempts, v_policy.base_delay, v_policy.max_delay, random())),
                            interval '0'), orchestrator.longest_delay());
  update orchestrator.tasks t
  set status = v_status, attempts = v_attempts, last_error = orchestrator._kept(p_error), updated_at = v_now, cancel_requested_at = null,
      claim_id = case when v_ends then t.claim_id end, worker_id = case when v_ends then t.worker_id end,
      claimed_at = case when v_ends then t.claimed_at end, started_at = case when v_ends then coalesce(t.started_at, t.claimed_at) end,
      completed_at = case when v_status = 'cancelled' then v_now end, dead_at = case when v_status = 'dead_letter' then v_now end,
      next_retry_at = case when not v_ends then v_now + v_delay end, recoveries = t.recoveries + p_recovered::int
  where t.id = p_id;
  perform orchestrator._add_event(p_id, 'failed', v_attempts, v_task.worker_id, concat_ws(E'\n', p_error, p_traceback));
  perform orchestrator._add_event(p_id, v_status::text, v_attempts, v_task.worker_id,
    case when not v_ends then 'in ' || extract(epoch from v_delay)::numeric(15, 3) || ' s'
         when v_status = 'dead_letter' then case when p_permanent then 'permanent error' else 'retries used up' end end);
  return v_status;
end $$;

create or replace function orchestrator.fail_tasks(
  p_claim_ids bigint[], p_ids uuid[], p_errors text[], p_tracebacks text[], p_retry_afters interval[], p_permanents boolean[])
returns table (id uuid, outcome text) language plpgsql as $$
begin
  perform from orchestrator.claims c where c.id = any (p_claim_ids) order by c.id for no key update;
  for i in 1..cardinality(p_ids) loop
    id := p_ids[i];
    outcome := orchestrator._fail(p_claim_ids[i], p_ids[i], p_errors[i], p_tracebacks[i], p_retry_afters[i],
                                  coalesce(p_permanents[i], false), false);
    perform orchestrator._shrink_claim(p_claim_ids[i], (outcome <> 'rejected')::int);
    return next;
  end loop;
  if exists (select from orchestrator.task_waits) then
    perform orchestrator._parents_ended(p_ids);
  end if;
end $$;
comment on function orchestrator.fail_tasks is
  'Records a failed attempt of each task, named by its claim: a retry after p_retry_afters[i] (null: the policy''s backoff), or a dead '
  'letter if permanent or out of retries. p_tracebacks[i] is kept in the event. Returns the status of each, or rejected.';

create or replace function orchestrator.fail_task(
  p_claim_id bigint, p_id uuid, p_error text, p_retry_after interval default null, p_permanent boolean default false)
returns text language sql as $$
  select f.outcome from orchestrator.fail_tasks(array[p_claim_id], array[p_id], array[p_error], null, array[p_retry_after], array[p_permanent]) f
$$;
comment on function orchestrator.fail_task is 'fail_tasks for one task: returns its status or rejected.';

-- Puts tasks of a locked claim back to their old places, or off by p_delay, uncharged.
create or replace function orchestrator._release(
  p_claim_id bigint, p_ids uuid[], p_event text, p_recovered boolean, p_delay interval default null) returns int
language plpgsql as $$
declare
  v_n int;
  v_types text[];
  v_priorities int[];
  v_heads timestamptz[];
  v_ids uuid[];
  v_workers text[];
begin
  -- the worker is read before it is cleared
  select array_agg(t.id), array_agg(t.worker_id) into v_ids, v_workers
  from (select t.id, t.worker_id from orchestrator.tasks t
        where t.id = any (p_ids) and t.claim_id is not distinct from p_claim_id and t.status in ('claimed', 'running')
          and t.cancel_requested_at is null
        order by t.id for no key update) t;
  with released as (
    update orchestrator.tasks t
    set status = 'pending', queued_at = case when p_delay is null then t.created_at end, next_retry_at = clock_timestamp() + p_delay,
        worker_id = null, claim_id = null, claimed_at = null, started_at = null, progress = null, updated_at = clock_timestamp(),
        attempts = t.attempts - (t.status = 'running')::int, recoveries = t.recoveries + p_recovered::int
    where t.id = any (v_ids)
    returning t.type, t.priority, t.queued_at)
  select count(*), array_agg(type), array_agg(priority), array_agg(queued_at) into v_n, v_types, v_priorities, v_heads from released;
  perform orchestrator._add_event(u.id, p_event, null, u.worker, 'for ' || extract(epoch from p_delay)::numeric(15, 3) || ' s')
  from unnest(v_ids, v_workers) u(id, worker);
  perform orchestrator._shrink_claim(p_claim_id, v_n);
  if p_delay is null then
    perform orchestrator._put_back(v_types, v_priorities, v_heads);
  end if;
  return v_n;
end $$;

create or replace function orchestrator._release_claim(p_claim_id bigint, p_ids uuid[]) returns int
language plpgsql as $$
begin
  perform from orchestrator.claims c where c.id = p_claim_id for no key update;
  if not found then return 0; end if;
  p_ids := coalesce(p_ids, array(select t.id from orchestrator.tasks t where t.claim_id = p_claim_id and t.status in ('claimed', 'running')));
  return orchestrator._lock_and_end_cancelled(p_claim_id, p_ids) + orchestrator._release(p_claim_id, p_ids, 'released', false);
end $$;

create or replace function orchestrator.release_tasks(p_claim_id bigint, p_ids uuid[] default null) returns int
language plpgsql as $$
declare
  v_n int := orchestrator._release_claim(p_claim_id, p_ids);
begin
  perform orchestrator._claims_ended(array[p_claim_id]);
  return v_n;
end $$;
comment on function orchestrator.release_tasks is
  'Gives tasks of a claim back (p_ids null: all), uncharged and at their old places. Returns how many left the claim.';

create or replace function orchestrator.release_forgotten(p_worker_id text, p_known bigint[]) returns int
language plpgsql as $$
declare
  v_ids bigint[] := array(select c.id from orchestrator.claims c where c.worker_id = p_worker_id and c.id <> all (p_known) order by c.id);
  v_n int := (select coalesce(sum(orchestrator._release_claim(c, null)), 0) from unnest(v_ids) c);
begin
  perform orchestrator._claims_ended(v_ids);
  return v_n;
end $$;
comment on function orchestrator.release_forgotten is
  'Releases a worker''s claims but p_known: those whose answer was lost. Returns how many tasks left them.';

create or replace function orchestrator.snooze_task(p_claim_id bigint, p_id uuid, p_delay interval) returns text
language plpgsql as $$
begin
  if p_delay is null or p_delay < interval '0' or p_delay > orchestrator.longest_delay() then
    perform orchestrator._invalid('delay', 'must be from 0 to 3650 days', 'Give it as an interval.');
  end if;
  perform from orchestrator.claims c where c.id = p_claim_id for no key update;
  if not found then return 'rejected'; end if;
  if orchestrator._lock_and_end_cancelled(p_claim_id, array[p_id]) > 0 then
    perform orchestrator._parents_ended(array[p_id]);
    return 'cancelled';
  end if;
  if orchestrator._release(p_claim_id, array[p_id], 'snoozed', false, p_delay) = 0 then return 'rejected'; end if;
  perform orchestrator._wake(p_id);
  return 'snoozed';
end $$;
comment on function orchestrator.snooze_task is
  'Puts a task off, uncharged. Returns snoozed, cancelled or rejected. Raises OR001.';

create or replace function orchestrator.record_progress(p_claim_id bigint, p_id uuid, p_progress json) returns boolean
language plpgsql as $$
begin
  perform set_config('synchronous_commit', 'off', true);
  update orchestrator.tasks t set progress = p_progress, updated_at = clock_timestamp()
  where t.id = p_id and t.claim_id is not distinct from p_claim_id and t.status in ('claimed', 'running');
  return found;
end $$;
comment on function orchestrator.record_progress is 'Keeps the progress of a task. Returns whether the claim still holds it.';

create or replace function orchestrator.note_lost_result(p_id uuid, p_problem text) returns boolean
language plpgsql as $$
begin
  if not exists (select from orchestrator.tasks t where t.id = p_id and t.status = 'completed') then return false; end if;
  perform orchestrator._add_event(p_id, 'result_lost', null, null, p_problem);
  return true;
end $$;
comment on function orchestrator.note_lost_result is
  'Records that the result of a completed task could not be kept. Returns whether there is one.';
