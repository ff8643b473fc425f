-- The audit: each invariant that the data can show, in one statement, so in one snapshot. Reads only, and locks nothing.

create or replace function orchestrator._broken_rule(t orchestrator._bare_tasks) returns text
language sql immutable parallel safe as $$
  select case
    when octet_length(t.type) not between 1 and 255 then 'type has 1 to 255 bytes'
    when octet_length(t.idempotency_key) not between 1 and 255 then 'idempotency_key has 1 to 255 bytes'
    when t.max_retries not between 0 and 1000 then 'max_retries is 0 to 1000'
    when t.status = 'failed' then 'failed is never at rest'
    when t.queued_at is not null and t.status <> 'pending' then 'only pending is queued'
    when t.status = 'pending' and num_nonnulls(t.queued_at, t.next_retry_at, t.parked_at) <> 1 then 'pending is either queued, scheduled or parked'
    when t.blocked_until is not null and (t.status <> 'pending' or t.next_retry_at is null) then 'blocked is pending, and looked at some day'
    when num_nulls(t.parked_at, t.parked_by) = 1 or (t.parked_at is not null and (t.status <> 'pending' or t.concurrency_key is null))
      then 'parked is pending, with a key and a limit'
    when t.expires_at is not null and t.status <> 'pending' then 'only the waiting expire'
    when t.status = 'retry_scheduled' and t.next_retry_at is null then 'retry_scheduled has its time'
    when t.next_retry_at is not null and t.status not in ('pending', 'retry_scheduled') then 'only the waiting have a next_retry_at'
    when t.status in ('pending', 'retry_scheduled') and num_nonnulls(t.claim_id, t.worker_id) > 0 then 'waiting has no claim'
    when t.status in ('claimed', 'running') and num_nulls(t.claim_id, t.worker_id, t.claimed_at) > 0 then 'in flight has claim and worker'
    when t.status in ('running', 'completed') and (t.started_at is null or t.attempts < 1) then 'running and completed have started'
    when (t.completed_at is not null) <> (t.status in ('completed', 'cancelled'))
      then 'completed_at is when it completed or was cancelled'
    when (t.dead_at is not null) <> (t.status = 'dead_letter') then 'dead_at is when it became a dead letter'
    when t.cancel_requested_at is not null and t.status not in ('claimed', 'running') then 'only in flight is asked to cancel'
  end
$$;

-- What is in flight, and what is parked.
create or replace view orchestrator._audit_claims (invariant, task_id, worker_id, detail) as
  with in_flight as materialized (
    select t.id, t.claim_id, t.worker_id, t.status, t.concurrency_key from orchestrator.tasks t where t.status in ('claimed', 'running'))
  select case when h.n > 0 then 'open_tasks is the number of its tasks in flight' else 'a claim has tasks in flight' end, null::uuid, c.worker_id,
         format('claim %s: open_tasks is %s, in flight are %s', c.id, c.open_tasks, coalesce(h.n, 0))
  from orchestrator.claims c left join (select f.claim_id, count(*) as n from in_flight f group by 1) h on h.claim_id = c.id
  where c.open_tasks is distinct from h.n
  union all
  select case when c.id is null then 'a task in flight has a claim' else 'a task in flight is with the worker of its claim' end, f.id, f.worker_id,
         format('%s, claim %s of worker %s', f.status, f.claim_id, c.worker_id)
  from in_flight f left join orchestrator.claims c on c.id = f.claim_id where c.id is null or f.worker_id is distinct from c.worker_id
  union all
  select 'a claim has the key of its tasks', f.id, f.worker_id, format('claim %s has the key %L, the task %L', c.id, c.key, f.concurrency_key)
  from in_flight f join orchestrator.claims c on c.id = f.claim_id left join orchestrator.type_limits l on l.type = c.limit_name
  where f.concurrency_key is distinct from c.key and (c.key is not null or (l.max_per_key is not null and c.id >= l.since))
  union all
  -- those claimed before the limit was set as it is may be more
  select 'no more are in flight than a limit has', null, null,
         format('%s: %s of %s%s', l.type, sum(c.open_tasks), k.most, ' of the key ' || k.key)
  from orchestrator.type_limits l join orchestrator.claims c on c.limit_name = l.type and c.claimed_at >= l.updated_at
  cross join lateral (select null as key, l.max_running as most union all select c.key, l.max_per_key where c.key is not null) k
  group by l.type, k.key, k.most having sum(c.open_tasks) > k.most
  union all
  select 'a parked task goes on when its key has room', p.id, null, format('the key %L under the limit %s', p.key, p.name)
  from (select t.parked_by as name, t.concurrency_key as key, t.type, min(t.id::text)::uuid as id from orchestrator.tasks t
        where t.parked_at is not null group by 1, 2, 3) p
  left join orchestrator.type_limits l on l.type = p.name
  where (l.max_per_key <= orchestrator._in_flight(l.type, l.since, p.key) + (
           select count(*) from orchestrator.tasks t where t.queued_at is not null and t.type = p.type and t.concurrency_key = p.key)) is not true
    and not exists (select from orchestrator.freed_keys f where f.limit_name = p.name and (f.key is null or f.key = p.key));

-- Attempts, and what is left of tasks that are gone.
create or replace view orchestrator._audit_history (invariant, task_id, worker_id, detail) as
  with policies as materialized (
    select y.type, p.max_retries, p.updated_at
    from (select distinct t.type from orchestrator.tasks t where t.attempts > 1) y cross join lateral orchestrator._policy(y.type) p)
  -- a policy that is younger than the task may have been another at its first attempts
  select 'attempts are at most max_retries + 1', t.id, t.worker_id,
         format('%s attempts, max_retries is %s', t.attempts, coalesce(t.max_retries, p.max_retries))
  from orchestrator.tasks t join policies p on p.type = t.type
  where t.attempts > coalesce(t.max_retries, p.max_retries) + 1 and (t.max_retries is not null or (p.updated_at > t.created_at) is not true)
  union all
  select 'an attempt fails once', f.task_id, min(f.worker_id), format('attempt %s failed %s times', f.attempt, count(*))
  from (select e.*, count(*) filter (where e.event = 'retried') over (partition by e.task_id order by e.id) as lives_before
        from orchestrator.task_events e where e.event in ('failed', 'retried')) f
  where f.event = 'failed' group by f.task_id, f.lives_before, f.attempt having count(*) > 1
  union all
  -- by attempts, since a clock that was set back puts events after what they came before
  select 'what has completed stays so', t.id, t.worker_id, format('attempt %s %s, but attempt %s completed', e.attempt, e.event, t.attempts)
  from orchestrator.task_events e join orchestrator.tasks t on t.id = e.task_id
  where t.status = 'completed' and e.event in ('failed', 'retry_scheduled', 'dead_letter', 'cancelled') and e.attempt >= t.attempts
    and not exists (select from orchestrator.task_events n where n.task_id = e.task_id and n.event = 'retried' and n.id > e.id)
  union all
  select 'an event belongs to a task', e.task_id, null, format('%s events of a task that is gone', count(*))
  from orchestrator.task_events e where not exists (select from orchestrator.tasks t where t.id = e.task_id) group by 2
  union all
  select 'a step belongs to a task', s.task_id, null, s.name
  from orchestrator.task_steps s where not exists (select from orchestrator.tasks t where t.id = s.task_id);

-- Floors, keys, dependencies and expiry.
create or replace view orchestrator._audit_waiting (invariant, task_id, worker_id, detail) as
  select 'a ready task is not below the floor of its lane', t.id, null::text, format('queued at %s, floor %s', t.queued_at, f.floor)
  from (select distinct on (f.type, f.priority) f.* from orchestrator.lane_floors f order by f.type, f.priority, f.generation desc, f.floor) f
  join orchestrator.tasks t on t.type = f.type and t.priority = f.priority and t.queued_at < f.floor
  union all
  select 'an idempotency key is unique in its type', d.id, null, format('the key of task %s', d.first)
  from (select t.id, first_value(t.id) over (partition by t.type, t.idempotency_key order by t.id) as first
        from orchestrator.tasks t where t.idempotency_key is not null) d where d.id <> d.first
  union all
  select case when t.blocked_until is null then 'who waits for a task is blocked' else 'what has ended is waited for no longer' end, w.child, null,
         format('parent %s', w.parent)
  from orchestrator.task_waits w left join orchestrator.tasks t on t.id = w.child left join orchestrator.tasks p on p.id = w.parent
  where t.blocked_until is null or p.completed_at < least(t.updated_at, clock_timestamp() - interval '10 minutes') - interval '1 minute'
  union all
  select v.problem, t.id, null, null
  from orchestrator.tasks t cross join lateral (values
    (t.blocked_until, 'blocked is who waits for a task', exists (select from orchestrator.task_waits w where w.child = t.id)),
    (t.expires_at, 'what expires is looked at then', exists (select from orchestrator.expiries e where e.task_id = t.id))) v(at, problem, kept)
  where v.at is not null and not v.kept;

-- Workers, sequences, tables of one row, schedules.
create or replace view orchestrator._audit_house (invariant, task_id, worker_id, detail) as
  select v.invariant, null::uuid, w.id, format('term %s until %s, declared dead at %s', w.leader_term, w.leader_until, w.declared_dead_at)
  from orchestrator.workers w cross join lateral (values
    ('one worker leads at most', w.is_leader and (select count(*) from orchestrator.workers o where o.is_leader) > 1),
    ('a term has one leader', exists (select from orchestrator.workers o where o.leader_term = w.leader_term and o.id <> w.id)),
    ('a worker declared dead neither leads nor waits for work', w.declared_dead_at is not null and (w.is_leader or w.idle)),
    ('a leader has a term and a lease', w.is_leader and num_nulls(w.leader_term, w.leader_until) > 0)) v(invariant, broken) where v.broken
  union all
  select 'a sequence is not behind its table', null, null, format('%s is at %s, the table at %s: install sets it right', s.name, s.at, s.newest)
  from orchestrator._sequences s where s.at < s.newest
  union all
  select 'a table of one row has it', null, null, o.name || ' is empty: install adds it'
  from (values ('leader_state', exists (table orchestrator.leader_state)), ('stats_state', exists (table orchestrator.stats_state))) o(name, there)
  where not o.there
  union all
  select 'the next time of a schedule is one of its fire times', null, null, format('schedule %s: %s', s.name, s.next_at)
  from orchestrator.schedules s
  where not s.paused and s.next_at is distinct from case
    when s.timezone in (select z.name from pg_timezone_names z)   -- else it pauses itself when it is due
      then (select f.at from orchestrator.fire_times(s.cron, s.timezone, s.next_at - interval '1 second', 1) f(at)) else s.next_at end;

create or replace function orchestrator.audit() returns table (invariant text, task_id uuid, worker_id text, detail text)
language sql stable as $$
  select orchestrator._broken_rule(t), t.id, t.worker_id, 'status ' || t.status
  from orchestrator._bare_tasks t where orchestrator._broken_rule(t) is not null
  union all table orchestrator._audit_claims
  union all table orchestrator._audit_history
  union all table orchestrator._audit_waiting
  union all table orchestrator._audit_house
  order by 1, 2, 3
$$;
comment on function orchestrator.audit is
  'One row for each violation of what must always hold; none on a healthy database. Takes seconds for millions of tasks.';
