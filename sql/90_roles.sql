-- Who may do what. Loaded last: it takes from PUBLIC whatever the files before created. Every function runs with its caller's
-- rights, so those on tables and columns decide. Four roles without a login: `grant orchestrator_worker to my_service`.
--   orchestrator_producer   enqueues and replaces what waits; can't read a payload, so not append to it
--   orchestrator_worker     runs a worker, which fires schedules and so may enqueue, and serves its page and metrics
--   orchestrator_operator   cancels, retries, pauses, limits, defines and fires schedules, and looks; a worker whose page may act needs it too
--   orchestrator_auditor    looks: views, lists, audit, with the secrets of payloads and results blanked
-- Where the installing role may not create roles, a notice says so and the rest still works.

do $$
declare
  r record;
  v_role text;
  v_missing boolean := false;
  v_all text := 'orchestrator_producer, orchestrator_worker, orchestrator_operator, orchestrator_auditor';
  v_look text := 'orchestrator_worker, orchestrator_operator, orchestrator_auditor';
  v_shown text;     -- what anyone may read of a task
  v_changed text;   -- what changes after a task was enqueued
begin
  foreach v_role in array string_to_array(v_all, ', ') loop
    begin
      if to_regrole(v_role) is null then execute format('create role %I nologin', v_role); end if;
    exception
      when duplicate_object or unique_violation then null;   -- installed in another database at the same moment
      when insufficient_privilege then
        v_missing := true;
        raise notice 'the role % is not there and may not be created: nothing is granted to it', v_role
          using hint = 'Have an administrator create the four roles orchestrator_*, and install again.';
    end;
  end loop;

  -- what an earlier release granted is not what this one does
  foreach v_role in array '{public}' || case when v_missing then '{}' else string_to_array(v_all, ', ') end loop
    execute format('revoke all on all tables in schema orchestrator from %1$s; revoke all on all sequences in schema orchestrator from %1$s;
                    revoke all on all functions in schema orchestrator from %1$s; revoke all on schema orchestrator from %1$s;
                    revoke all on type orchestrator.task_status from %1$s', v_role);
  end loop;
  if v_missing then return; end if;
  execute format('grant usage on schema orchestrator to %1$s; grant usage on type orchestrator.task_status to %1$s', v_all);

  -- helpers and pure functions do nothing that their caller may not
  for r in
    select p.oid::regprocedure as signature, case
      when p.proname ~ '^_' or p.provolatile = 'i' then v_all
      when p.proname = 'enqueue' then 'orchestrator_producer, orchestrator_worker, orchestrator_operator'   -- firing a schedule enqueues
      when p.proname ~ '^(enqueue|replace_)' then 'orchestrator_producer, orchestrator_worker'
      when p.proname ~ '^(schedule|limit_type)$' then 'orchestrator_worker, orchestrator_operator'   -- a worker applies its SCHEDULES and LIMITS
      when p.proname ~ '^(cancel|retry|pause|resume|signal|bulk)_|^(unschedule|fire_schedule)$' then 'orchestrator_operator'
      when p.proname ~ '^(api|show|explain)_|^(audit|metrics|fire_times|schedule_history)$' then v_look
      else 'orchestrator_worker' end as roles
    from pg_proc p where p.pronamespace = 'orchestrator'::regnamespace
  loop
    execute format('grant execute on function %s to %s', r.signature, r.roles);
  end loop;

  select string_agg(quote_ident(a.attname), ', ') filter (where a.attname !~ '^(payload|result|progress|meta)$'),
         string_agg(quote_ident(a.attname), ', ') filter (
           where a.attname !~ '^(id|type|payload|priority|idempotency_key|created_at|max_retries|concurrency_key|meta|after)$')
    into v_shown, v_changed
  from pg_attribute a where a.attrelid = 'orchestrator.tasks'::regclass and a.attnum > 0 and not a.attisdropped;

  -- enqueue
  grant insert (id, type, payload, priority, idempotency_key, max_retries, queued_at, next_retry_at, concurrency_key, expires_at, after, blocked_until, meta),
        select (id, type, idempotency_key, status)
    on orchestrator.tasks to orchestrator_producer, orchestrator_worker, orchestrator_operator;
  grant select (idle, handles) on orchestrator.workers to orchestrator_producer;
  grant insert on orchestrator.task_waits, orchestrator.expiries to orchestrator_producer, orchestrator_operator;
  grant select, delete on orchestrator.task_waits to orchestrator_operator;
  grant usage on sequence orchestrator.payload_doublings to orchestrator_producer, orchestrator_operator;

  -- replace_task; to append it reads payloads, which a producer may not
  grant select (status, priority, created_at, queued_at, next_retry_at, attempts, parked_at, blocked_until, expires_at, concurrency_key)
    on orchestrator.tasks to orchestrator_producer;
  grant update (payload, priority, idempotency_key, updated_at, queued_at, next_retry_at, blocked_until)
    on orchestrator.tasks to orchestrator_producer, orchestrator_worker;
  grant insert (task_id, event, detail) on orchestrator.task_events to orchestrator_producer;
  grant select (task_id) on orchestrator.task_steps to orchestrator_producer;
  grant insert on orchestrator.freed_keys to orchestrator_producer;
  grant select on orchestrator.type_limits to orchestrator_producer;

  -- look, and run a worker: any worker may become the leader, and then recovers, prunes and counts
  execute format('grant select (%s) on orchestrator.tasks to %s', v_shown, v_look);
  for r in
    select c.oid::regclass as name, c.relkind from pg_class c
    where c.relnamespace = 'orchestrator'::regnamespace and c.relkind in ('r', 'v', 'S') and c.relname not in ('tasks', 'schedules', 'task_steps')
  loop
    if r.relkind = 'S' then
      execute format('grant select on sequence %s to %s', r.name, v_look);
      execute format('grant usage on sequence %s to orchestrator_worker', r.name);
    else
      execute format('grant select on %s to %s', r.name, v_look);
      if r.relkind = 'r' then execute format('grant insert, update, delete on %s to orchestrator_worker', r.name); end if;
    end if;
  end loop;
  grant select, delete on orchestrator.tasks to orchestrator_worker;
  execute format('grant update (%s) on orchestrator.tasks to orchestrator_worker, orchestrator_operator', v_changed);

  -- steps return what handlers know; who signals sees their names
  grant select, insert, update, delete on orchestrator.task_steps to orchestrator_worker;
  execute format('grant select (task_id, name, at, until) on orchestrator.task_steps to %s', v_look);
  grant insert (task_id, name, result, at), update (result, at, until), delete on orchestrator.task_steps to orchestrator_operator;

  -- cancel, retry, pause, limit
  grant insert, update on orchestrator.task_types, orchestrator.type_limits to orchestrator_operator;
  grant insert on orchestrator.freed_keys to orchestrator_operator;
  grant update (priority) on orchestrator.tasks to orchestrator_operator;
  grant insert, update on orchestrator.operations to orchestrator_operator;
  grant insert, delete on orchestrator.task_events to orchestrator_operator;
  grant insert (type, priority) on orchestrator.lanes to orchestrator_operator;

  -- schedules: who defines or fires one knows its payload
  grant select, insert, update, delete on orchestrator.schedules to orchestrator_worker, orchestrator_operator;
  select string_agg(quote_ident(a.attname), ', ') filter (where a.attname <> 'payload') into v_shown
  from pg_attribute a where a.attrelid = 'orchestrator.schedules'::regclass and a.attnum > 0 and not a.attisdropped;
  execute format('grant select (%s) on orchestrator.schedules to orchestrator_auditor', v_shown);
end $$;
