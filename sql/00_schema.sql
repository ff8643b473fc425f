-- The schema `orchestrator`: a durable task queue whose logic is in SQL. Load the files of this folder in the order of their
-- names, in one transaction, as `python orchestrator.py install` does; loading them again is safe. The life of a task:
--   enqueue → claim_tasks → [start_tasks] → complete_tasks
--                         → fail_tasks → (retry_scheduled) promote_due → claim_tasks … or (dead_letter) retry_task
--                         → release_tasks | snooze_task → claim_tasks …
-- schedule → promote_due enqueues, at each fire time.
-- What is made again after a crash (claims, heartbeats, floors, counts …) commits without waiting for the flush.
-- Lock order everywhere: the leader's row in workers → other workers → claims (ascending id) → tasks → task_steps → lane_floors
-- (35_floors.sql) → tasks that wait for those (45_after.sql).
-- A schedule's row is locked before those of tasks; promote_due skips one that is locked.

-- constraints, views, defaults and inlined functions are bound by this path
set local search_path = pg_catalog, pg_temp;

do $$
begin
  -- One installation at a time. Anybody may hold this key, so the wait ends; PostgreSQL rolls one of two back at worst.
  for i in 1..600 loop
    exit when pg_try_advisory_xact_lock(hashtext('orchestrator.install'));
    perform pg_sleep(0.1);
  end loop;
  if to_regnamespace('orchestrator') is null then   -- else somebody made it for a role that may not
    create schema orchestrator;
    comment on schema orchestrator is 'A durable task queue: its functions enqueue, claim, retry and recover tasks.';
  end if;
  if to_regprocedure('orchestrator.schema_version()') is not null then
    if orchestrator.schema_version() > 1 then
      raise exception 'the schema orchestrator is of version %, newer than these files (1)', orchestrator.schema_version()
        using errcode = 'OR004', hint = 'Install with the newer release, or run the newer orchestrator.py.';
    end if;
  end if;
  if to_regtype('orchestrator.task_status') is null then
    create type orchestrator.task_status as enum
      ('pending', 'claimed', 'running', 'completed', 'failed', 'retry_scheduled', 'dead_letter', 'cancelled');
  end if;
end $$;
comment on type orchestrator.task_status is
  'pending → claimed → running → completed | retry_scheduled | dead_letter | cancelled. failed is an event, and never at rest.';

create or replace function orchestrator.schema_version() returns int
language sql immutable parallel safe as $$ select 1 $$;
comment on function orchestrator.schema_version is 'The version of this schema. A worker starts only on the one that it knows.';

-- Private SQLSTATEs, each raised with a message that names the field or the way out:
--   OR001 invalid input    OR002 the claim is no longer held    OR003 the worker is not registered, or was declared dead
--   OR004 schema version   OR005 needs READ COMMITTED
create or replace function orchestrator._invalid(p_field text, p_problem text, p_hint text) returns void
language plpgsql as $$
begin
  raise exception '%: %', p_field, p_problem using errcode = 'OR001', column = p_field, hint = p_hint;
end $$;

-- A function without a search_path can be inlined: a standard body (return, begin atomic) is bound when it is created.
create or replace function orchestrator.longest_delay() returns interval
language sql immutable parallel safe return interval '3650 days';
comment on function orchestrator.longest_delay is 'The longest delay, snooze or wait for a retry: 3650 days.';

create or replace function orchestrator._kept(p_text text) returns text
language sql immutable parallel safe return left(p_text, 8000);

-- UUIDv7, ordered by time: the primary key is history. Before PostgreSQL 18: 48 bits of Unix milliseconds, 12 of the fraction
-- below, the rest from gen_random_uuid().
do $do$
begin
  if to_regprocedure('pg_catalog.uuidv7()') is not null then
    create or replace function orchestrator._uuidv7() returns uuid language sql volatile parallel safe return uuidv7();
  else
    create or replace function orchestrator._uuidv7() returns uuid
    language sql volatile parallel safe begin atomic
      select (lpad(to_hex(t.us / 1000), 12, '0') || to_hex(28672 + t.us % 1000 * 4096 / 1000) || right(gen_random_uuid()::text, 17))::uuid
      from (select (extract(epoch from clock_timestamp()) * 1000000)::bigint as us) t;
    end;
  end if;
end $do$;

-- n of them, ascending: the last 48 bits count up from the third quarter (RFC 9562, 6.2, method 2).
create or replace function orchestrator._uuidv7s(p_n int) returns uuid[]
language sql volatile parallel safe begin atomic
  select array(select (u.head || to_hex(u.tail + o))::uuid from generate_series(0, p_n - 1) o)
  from (select left(r.id, 24) as head, (1::bigint << 47) + (('x' || right(r.id, 12))::bit(48)::bigint >> 2) as tail
        from (select orchestrator._uuidv7()::text as id) r offset 0) u;   -- computed once
end;

-- The smallest UUIDv7 of a moment.
create or replace function orchestrator._uuid_at(p_at timestamptz) returns uuid
language sql immutable parallel safe
return (lpad(to_hex(least(greatest(floor(extract(epoch from p_at) * 1000), 0), 281474976710655)::bigint), 12, '0')
        || '70008000000000000000')::uuid;

-- The prefix `a:` of the pattern `a:` or `a:*`; null of a type. Only this function knows what a pattern is.
create or replace function orchestrator._prefix(p_pattern text) returns text
language sql immutable parallel safe return case when right(p_pattern, 1) in ('*', ':') then rtrim(p_pattern, '*') end;

create or replace function orchestrator._like(p_pattern text) returns text
language sql immutable parallel safe
return regexp_replace(coalesce(orchestrator._prefix(p_pattern), p_pattern), '([\\%_])', '\\\1', 'g')
       || case when orchestrator._prefix(p_pattern) is not null then '%' else '' end;

-- The application_name of a worker's heartbeat connection.
create or replace function orchestrator._application_name(p_worker_id text) returns text
language sql immutable parallel safe return 'orchestrator ' || right(p_worker_id, 50);
