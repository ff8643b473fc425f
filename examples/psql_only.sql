-- psql alone: enqueue, act as a worker by hand, operate. Any language that can run SQL can do the same.
--   python orchestrator.py install && psql "$DATABASE_URL" -v ON_ERROR_STOP=1 -f examples/psql_only.sql

\echo == enqueue: two tasks, the second twice
select orchestrator.enqueue('sql:greet', '{"name": "Ada"}', p_max_retries => 1) as first_id \gset
select orchestrator.enqueue('sql:greet', '{"name": "Bob"}', p_priority => 5, p_idempotency_key => 'greet-bob') as second_id \gset
select orchestrator.enqueue('sql:greet', '{"name": "Bob"}', p_priority => 5, p_idempotency_key => 'greet-bob') = :'second_id' as same_task;

\echo == act as a worker: register with the types to handle, claim, report the outcome
select orchestrator.register_worker('psql-worker', 'localhost', 1, '1', '{"sql:greet": {"max_retries": 1, "base_delay": 0}}');
select claim_id, id, payload from orchestrator.claim_tasks('psql-worker', array['sql:greet'], 1) \gset claimed_
\echo the urgent task came first:
select :'claimed_id' = :'second_id' as urgent_first;
select orchestrator.complete_tasks(array[:claimed_claim_id], array[1], array[:'claimed_id'::uuid], array['{"said": "hello"}'::jsonb]);

\echo == a late outcome is rejected: the claim no longer holds the task
select * from orchestrator.complete_tasks(array[:claimed_claim_id], array[1], array[:'first_id'::uuid]);

\echo == a failed attempt, its retry, and a dead letter
select claim_id from orchestrator.claim_tasks('psql-worker', array['sql:greet'], 1) \gset claimed_
select orchestrator.fail_task(:claimed_claim_id, :'first_id', 'nobody answered', p_retry_after => '0 s');
select promoted from orchestrator.promote_due();
select claim_id from orchestrator.claim_tasks('psql-worker', array['sql:greet'], 1) \gset claimed_
select orchestrator.fail_task(:claimed_claim_id, :'first_id', 'nobody answered again');
select attempts, last_error from orchestrator.dead_letters where id = :'first_id';

\echo == the whole story of the task, and back to the queue
select e ->> 'event' as event, e ->> 'attempt' as attempt, e ->> 'detail' as detail
from jsonb_array_elements(orchestrator.show_task(:'first_id') -> 'events') e;
select orchestrator.retry_task(:'first_id');
select orchestrator.cancel_task(:'first_id');

\echo == the worker leaves; audit() finds nothing
select orchestrator.unregister_worker('psql-worker');
select count(*) as violations from orchestrator.audit();
