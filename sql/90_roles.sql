-- Who may do what. Loaded last: it takes from PUBLIC whatever the files before it created. Four roles without a login, to be granted
-- to those who have one: `grant orchestrator_worker to my_service`. The functions run with their caller's rights, so each role
-- has the functions it needs, those that they call, and the columns that they touch. Nobody but the owner has DDL rights.
--   orchestrator_producer   enqueues; can't read a payload back
--   orchestrator_worker     runs a worker, and serves its page and metrics; a handler that enqueues needs orchestrator_producer too
--   orchestrator_operator   cancels, retries, pauses, and looks; a worker whose page may act needs it too
--   orchestrator_auditor    looks: views, lists, audit. It has no right on payloads and results, and sees them with secrets blanked
-- Roles belong to the whole server. Where the installing role may not create them, a notice says so and the rest still works.

revoke all on schema orchestrator from public;
revoke all on all tables in schema orchestrator from public;
revoke all on all sequences in schema orchestrator from public;
revoke all on all functions in schema orchestrator from public;
revoke all on type orchestrator.task_status from public;

do $$
declare
  v_role text;
begin
  foreach v_role in array '{orchestrator_producer, orchestrator_worker, orchestrator_operator, orchestrator_auditor}'::text[] loop
    if to_regrole(v_role) is null then
      begin
        execute format('create role %I nologin', v_role);
      exception
        when duplicate_object or unique_violation then null;   -- installed in another database at the same moment
        when insufficient_privilege then
          raise notice 'the role % is not there and may not be created: nothing is granted to it', v_role
            using hint = 'Have an administrator create the four roles orchestrator_*, and install again.';
      end;
    end if;
  end loop;
end $$;

do $$
begin
  if to_regrole('orchestrator_producer') is null or to_regrole('orchestrator_worker') is null
     or to_regrole('orchestrator_operator') is null or to_regrole('orchestrator_auditor') is null then
    return;
  end if;

  -- what an earlier release granted is not what this one does
  revoke all on all tables in schema orchestrator from orchestrator_producer, orchestrator_worker, orchestrator_operator, orchestrator_auditor;
  revoke all on all sequences in schema orchestrator from orchestrator_producer, orchestrator_worker, orchestrator_operator, orchestrator_auditor;
  revoke all on all functions in schema orchestrator from orchestrator_producer, orchestrator_worker, orchestrator_operator, orchestrator_auditor;

  grant usage on schema orchestrator to orchestrator_producer, orchestrator_worker, orchestrator_operator, orchestrator_auditor;
  grant usage on type orchestrator.task_status to orchestrator_worker, orchestrator_operator, orchestrator_auditor;
  grant execute on function orchestrator.schema_version, orchestrator.longest_delay, orchestrator._invalid
    to orchestrator_producer, orchestrator_worker, orchestrator_operator, orchestrator_auditor;

  -- enqueue
  grant execute on function
    orchestrator.enqueue, orchestrator.enqueue_many, orchestrator._check_task, orchestrator._payload_problem, orchestrator._large_payload_problem,
    orchestrator._refuse_payload, orchestrator._read_line, orchestrator.enqueue_lines, orchestrator._notify_idle,
    orchestrator._enqueue_keyed, orchestrator._uuidv7, orchestrator._uuidv7s to orchestrator_producer;
  grant insert (id, type, payload, priority, idempotency_key, max_retries, queued_at, next_retry_at), select (id, type, idempotency_key)
    on orchestrator.tasks to orchestrator_producer;
  grant select (idle, handles) on orchestrator.workers to orchestrator_producer;

  -- look
  grant execute on function
    orchestrator.stats, orchestrator.metrics, orchestrator.list_tasks, orchestrator.show_task,
    orchestrator.explain_task, orchestrator.audit, orchestrator.redact, orchestrator.retry_delay, orchestrator.api_overview, orchestrator.api_history,
    orchestrator.api_tasks, orchestrator.api_running, orchestrator.api_retries, orchestrator.api_failures,
    orchestrator.api_dead_letters, orchestrator.api_task, orchestrator._age, orchestrator._api_check, orchestrator._api_id,
    orchestrator._api_int, orchestrator._api_task, orchestrator._api_text, orchestrator._api_types, orchestrator._api_workers,
    orchestrator._brief, orchestrator._broken_rule, orchestrator._ids_in_state,
    orchestrator._like, orchestrator._metric_label, orchestrator._page_by_id, orchestrator._page_in_state, orchestrator._policy,
    orchestrator._default_policy, orchestrator._prefix, orchestrator._registered_as
    to orchestrator_worker, orchestrator_operator, orchestrator_auditor;
  grant select (id, type, status, priority, idempotency_key, worker_id, claim_id, created_at, queued_at, claimed_at, started_at,
                completed_at, updated_at, attempts, max_retries, last_error, next_retry_at, dead_at, cancel_requested_at, recoveries)
    on orchestrator.tasks to orchestrator_operator, orchestrator_auditor;
  grant select on orchestrator._bare_tasks, orchestrator._redacted_tasks, orchestrator.pending_tasks, orchestrator.running_tasks,
    orchestrator.dead_letters, orchestrator.queue_stats, orchestrator.task_events, orchestrator.claims, orchestrator.workers,
    orchestrator.task_types, orchestrator.lanes, orchestrator.lane_floors, orchestrator.leader_state, orchestrator.type_stats,
    orchestrator.stats_state, orchestrator.stats_samples
    to orchestrator_worker, orchestrator_operator, orchestrator_auditor;

  -- run a worker, which may become the leader and then recovers, prunes and counts
  grant execute on function
    orchestrator.register_worker, orchestrator.unregister_worker, orchestrator.heartbeat, orchestrator.cancelling_tasks,
    orchestrator.set_idle, orchestrator.promote_due, orchestrator.claim_tasks, orchestrator.start_tasks,
    orchestrator.complete_tasks, orchestrator.fail_tasks, orchestrator.fail_task, orchestrator.release_tasks,
    orchestrator.release_forgotten, orchestrator.snooze_task, orchestrator.record_progress, orchestrator.acquire_leadership,
    orchestrator.resign_leadership,
    orchestrator.declare_dead, orchestrator.declare_disconnected_dead, orchestrator.recover_orphans, orchestrator.raise_floors,
    orchestrator.rescan_lanes, orchestrator.prune, orchestrator.note_lost_result,
    orchestrator.sample_stats, orchestrator._advance_safe_floor, orchestrator._notify_idle, orchestrator._application_name,
    orchestrator._count_enqueued, orchestrator._count_live, orchestrator._lock_and_end_cancelled,
    orchestrator._fail, orchestrator._idle_floors, orchestrator._is_slow, orchestrator._lock_floors, orchestrator._kept, orchestrator._claimable, orchestrator._refuse_claim,
    orchestrator._ready_types, orchestrator._next_lane, orchestrator._new_claim_id, orchestrator._most_bytes, orchestrator._too_heavy,
    orchestrator._note_lane, orchestrator._id_after, orchestrator._keep_sample, orchestrator._lane_head,
    orchestrator._leads, orchestrator._name_types, orchestrator._put_back, orchestrator._raise_floor,
    orchestrator._ready_lanes, orchestrator._add_event, orchestrator._recover_claim, orchestrator._recover_tasks,
    orchestrator._release, orchestrator._shrink_claim, orchestrator._store_counts, orchestrator._tasks_writers,
    orchestrator._uuid_at
    to orchestrator_worker;
  grant select, delete on orchestrator.tasks to orchestrator_worker;
  grant update (status, worker_id, claim_id, queued_at, claimed_at, started_at, completed_at, updated_at, attempts, last_error,
                next_retry_at, dead_at, cancel_requested_at, recoveries, result, progress) on orchestrator.tasks to orchestrator_worker;
  grant insert, update, delete on orchestrator.claims, orchestrator.workers, orchestrator.lanes, orchestrator.lane_floors,
    orchestrator.stats_samples to orchestrator_worker;
  grant insert, update on orchestrator.task_types, orchestrator.type_stats to orchestrator_worker;
  grant insert, delete on orchestrator.task_events to orchestrator_worker;
  grant update on orchestrator.leader_state, orchestrator.stats_state to orchestrator_worker;
  grant usage, select on sequence orchestrator.leader_terms to orchestrator_worker;

  -- cancel, retry, pause
  grant execute on function
    orchestrator.cancel_task, orchestrator.retry_task, orchestrator.retry_dead_letters, orchestrator.pause_type,
    orchestrator.resume_type, orchestrator.api_cancel, orchestrator.api_retry, orchestrator.api_retry_dead_letters,
    orchestrator.api_pause, orchestrator.api_resume, orchestrator._notify_idle, orchestrator._api_type, orchestrator._check_task,
    orchestrator._matching, orchestrator._ready_types, orchestrator._note_lane, orchestrator._kept, orchestrator._add_event to orchestrator_operator;
  grant update (status, worker_id, claim_id, queued_at, claimed_at, started_at, completed_at, updated_at, attempts, next_retry_at,
                dead_at, cancel_requested_at, recoveries, result, progress) on orchestrator.tasks to orchestrator_operator;
  grant insert, update on orchestrator.task_types to orchestrator_operator;
  grant insert, delete on orchestrator.task_events to orchestrator_operator;
  grant insert (type, priority) on orchestrator.lanes to orchestrator_operator;
end $$;
