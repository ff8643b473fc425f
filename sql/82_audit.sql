-- The audit: each invariant that the data can show, looked for in one statement, so in one snapshot. Reads only, locks
-- nothing, and reads tasks whole a few times. The rules that constraints hold are looked at too: a constraint can be dropped,
-- or not be valid yet.

-- The rules of one row of tasks, under the names of their constraints in 10_tables.sql, and which of them it breaks.
create or replace function orchestrator._broken_constraints(t orchestrator._bare_tasks) returns table (name text, broken boolean)
language sql immutable parallel safe as $$
  select v.name, not v.holds from (values
    ('type_has_1_to_255_bytes', octet_length(t.type) between 1 and 255),
    ('idempotency_key_has_1_to_255_bytes', octet_length(t.idempotency_key) between 1 and 255),
    ('max_retries_is_0_to_1000', t.max_retries between 0 and 1000),
    ('failed_is_never_at_rest', t.status <> 'failed'),
    ('only_pending_is_queued', t.queued_at is null or t.status = 'pending'),
    ('pending_is_either_queued_or_scheduled', t.status <> 'pending' or (t.queued_at is null) <> (t.next_retry_at is null)),
    ('retry_scheduled_has_its_time', t.status <> 'retry_scheduled' or t.next_retry_at is not null),
    ('only_the_waiting_have_a_next_retry_at', t.next_retry_at is null or t.status in ('pending', 'retry_scheduled')),
    ('waiting_has_no_claim', t.status not in ('pending', 'retry_scheduled') or (t.claim_id is null and t.worker_id is null)),
    ('in_flight_has_claim_and_worker',
     t.status not in ('claimed', 'running') or (t.claim_id is not null and t.worker_id is not null and t.claimed_at is not null)),
    ('running_and_completed_have_started', t.status not in ('running', 'completed') or (t.started_at is not null and t.attempts > 0)),
    ('completed_at_is_when_it_completed_or_was_cancelled', (t.completed_at is not null) = (t.status in ('completed', 'cancelled'))),
    ('dead_at_is_when_it_became_a_dead_letter', (t.dead_at is not null) = (t.status = 'dead_letter')),
    ('only_in_flight_is_asked_to_cancel', t.cancel_requested_at is null or t.status in ('claimed', 'running'))
  ) v(name, holds)
$$;

create or replace function orchestrator.audit() returns table (invariant text, task_id uuid, worker_id text, detail text)
language sql stable set search_path = '' as $$
  with unguarded as materialized (   -- none, unless somebody dropped a constraint: then no row need be looked at
    select r.name from orchestrator._broken_constraints(null) r where not exists (
      select from pg_constraint c where c.conrelid = 'orchestrator.tasks'::regclass and c.conname = r.name and c.convalidated)),
  in_flight as materialized (
    select t.id, t.claim_id, t.worker_id, t.status from orchestrator.tasks t where t.status in ('claimed', 'running')),
  held as (select f.claim_id, count(*) as n from in_flight f where f.claim_id is not null group by 1),
  ready as materialized (
    select t.type, t.priority, min(t.queued_at) as head from orchestrator.tasks t where t.queued_at is not null group by 1, 2),
  floors as (
    select distinct on (f.type, f.priority) f.type, f.priority, f.floor from orchestrator.lane_floors f
    order by f.type, f.priority, f.generation desc, f.floor),
  policies as materialized (
    select y.type, p.max_retries, p.updated_at
    from (select distinct t.type from orchestrator.tasks t where t.attempts > 1) y cross join lateral orchestrator._policy(y.type) p),
  failures as (
    select e.task_id, e.worker_id, e.attempt, e.event,
           count(*) filter (where e.event = 'retried') over (partition by e.task_id order by e.id) as lives_before
    from orchestrator.task_events e where e.event in ('failed', 'retried'))

  select r.name, t.id, t.worker_id, 'status ' || t.status
  from orchestrator._bare_tasks t cross join lateral orchestrator._broken_constraints(t) r join unguarded g on g.name = r.name
  where exists (select from unguarded) and r.broken
  union all
  select 'open_tasks is the number of its tasks in flight', null, c.worker_id,
         format('claim %s: open_tasks is %s, in flight are %s', c.id, c.open_tasks, h.n)
  from orchestrator.claims c join held h on h.claim_id = c.id where c.open_tasks <> h.n
  union all
  select 'a claim has tasks in flight', null, c.worker_id, format('claim %s has none, open_tasks is %s', c.id, c.open_tasks)
  from orchestrator.claims c where not exists (select from held h where h.claim_id = c.id)
  union all
  select 'a task in flight has a claim', f.id, f.worker_id, format('%s, there is no claim %s', f.status, f.claim_id)
  from in_flight f where not exists (select from orchestrator.claims c where c.id = f.claim_id)
  union all
  select 'a task in flight is with the worker of its claim', f.id, f.worker_id, format('claim %s is of worker %s', c.id, c.worker_id)
  from in_flight f join orchestrator.claims c on c.id = f.claim_id where f.worker_id is distinct from c.worker_id
  union all
  -- a policy that is younger than the task may have been another at its first attempts
  select 'attempts are at most max_retries + 1', t.id, t.worker_id,
         format('%s attempts, max_retries is %s', t.attempts, coalesce(t.max_retries, p.max_retries))
  from orchestrator.tasks t join policies p on p.type = t.type
  where t.attempts > coalesce(t.max_retries, p.max_retries) + 1 and (t.max_retries is not null or (p.updated_at > t.created_at) is not true)
  union all
  select 'an attempt fails once', f.task_id, min(f.worker_id), format('attempt %s failed %s times', f.attempt, count(*))
  from failures f where f.event = 'failed' group by f.task_id, f.lives_before, f.attempt having count(*) > 1
  union all
  select 'what has completed stays so', t.id, t.worker_id, format('%s at %s, but it completed at %s', e.event, e.at, t.completed_at)
  from orchestrator.task_events e join orchestrator.tasks t on t.id = e.task_id
  where t.status = 'completed' and e.at > t.completed_at
  union all
  select 'a ready task is in a lane', t.id, null, format('no lane (%s, %s)', t.type, t.priority)
  from ready r join orchestrator.tasks t on t.type = r.type and t.priority = r.priority and t.queued_at is not null
  where not exists (select from orchestrator.lanes l where l.type = r.type and l.priority = r.priority
                    and (l.dropped_at is null or l.dropped_at > clock_timestamp() - interval '10 minutes'))   -- it is opened again soon
  union all
  select 'a ready task is not below the floor of its lane', t.id, null, format('queued at %s, floor %s', t.queued_at, f.floor)
  from ready r join floors f on f.type = r.type and f.priority = r.priority and r.head < f.floor
  join orchestrator.tasks t on t.type = r.type and t.priority = r.priority and t.queued_at < f.floor
  union all
  select 'an idempotency key is unique in its type', d.id, null, format('the key of task %s', d.first)
  from (select t.id, first_value(t.id) over (partition by t.type, t.idempotency_key order by t.id) as first
        from orchestrator.tasks t where t.idempotency_key is not null) d where d.id <> d.first
  union all
  select 'an event belongs to a task', e.task_id, null, format('%s events of a task that is gone', count(*))
  from orchestrator.task_events e where not exists (select from orchestrator.tasks t where t.id = e.task_id) group by 2
  union all
  select 'one worker leads at most', null, w.id, format('leader of term %s until %s', w.leader_term, w.leader_until)
  from orchestrator.workers w where w.is_leader and (select count(*) from orchestrator.workers o where o.is_leader) > 1
  union all
  select 'a term has one leader', null, w.id, format('term %s is also that of worker %s', w.leader_term, o.id)
  from orchestrator.workers w join orchestrator.workers o on o.leader_term = w.leader_term and o.id <> w.id
  union all
  select 'a worker declared dead neither leads nor waits for work', null, w.id, format('declared dead at %s', w.declared_dead_at)
  from orchestrator.workers w where w.declared_dead_at is not null and (w.is_leader or w.idle)
  union all
  select 'a leader has a term and a lease', null, w.id, null
  from orchestrator.workers w where w.is_leader and (w.leader_term is null or w.leader_until is null)
  order by 1, 2, 3
$$;
comment on function orchestrator.audit() is
  'One row for each violation of what must always hold: none on a healthy database. Reads tasks whole a few times, so seconds '
  'for millions of rows; task_id or worker_id is null where it is not of one.';
