-- Tables and indexes. No index on tasks may mention status, started_at, completed_at, updated_at, worker_id, result, progress or
-- last_error (keys, INCLUDE or WHERE), or completing a task would no longer be a heap-only update. So partial indexes are on
-- queued_at, next_retry_at and dead_at, each set only while the task waits for that.
-- Types are collated "C": those under a prefix are one range of the ready index.

create table if not exists orchestrator.tasks (
  id                  uuid default orchestrator._uuidv7(),
  type                text collate "C" not null,
  payload             jsonb not null default '{}',
  status              orchestrator.task_status not null default 'pending',
  priority            int not null default 0,
  idempotency_key     text,
  worker_id           text,
  claim_id            bigint,
  created_at          timestamptz not null default clock_timestamp(),
  queued_at           timestamptz default clock_timestamp(),
  claimed_at          timestamptz,
  started_at          timestamptz,
  completed_at        timestamptz,
  updated_at          timestamptz not null default clock_timestamp(),
  attempts            int not null default 0,
  max_retries         int,
  last_error          text,
  next_retry_at       timestamptz,
  dead_at             timestamptz,
  cancel_requested_at timestamptz,
  recoveries          int not null default 0,
  result              jsonb,
  progress            json,
  concurrency_key     text collate "C",
  parked_at           timestamptz,
  parked_by           text collate "C",
  after               uuid[],
  blocked_until       timestamptz,
  expires_at          timestamptz,
  meta                jsonb,
  primary key (id) with (fillfactor = 45),
  -- One, and short: PostgreSQL parses its 4 kB of nodes anew for each statement, which is a fifth of a single enqueue. It refuses
  -- what would stop others, and what an update by hand gets wrong. audit() knows all the rules.
  constraint a_status_has_its_time check (
    status = any (case when isfinite(coalesce(queued_at, next_retry_at, parked_at)) then '{pending,retry_scheduled}'::orchestrator.task_status[]
                       when completed_at is not null then '{completed,cancelled}' when dead_at is not null then '{dead_letter}'
                       else '{claimed,running}' end)
    and num_nonnulls(queued_at, next_retry_at, parked_at, completed_at, dead_at) <= 1 and octet_length(type) <= 255)
) with (fillfactor = 32);   -- completions stay heap-only even while several workers' claims keep old versions (at 40, half did not)
comment on table orchestrator.tasks is 'One row for each task, waiting, in flight or ended. Written by the functions of this schema only.';

create table if not exists orchestrator.claims (
  id          bigint primary key,
  worker_id   text not null,
  claimed_at  timestamptz not null default clock_timestamp(),
  open_tasks  int not null,
  limit_name  text collate "C",
  key         text collate "C",
  constraint open_tasks_is_positive check (open_tasks > 0)
) with (fillfactor = 50);
comment on table orchestrator.claims is
  'A batch of tasks that a worker holds: fence (its id), index of what is in flight (by tasks.claim_id) and lease, which recovery '
  'walks. open_tasks of them are claimed or running; the row goes with the last.';

create table if not exists orchestrator.workers (
  id               text primary key,   -- hostname:pid:random, new at every start and after being declared dead
  hostname         text not null,
  started_at       timestamptz not null default clock_timestamp(),
  last_heartbeat   timestamptz not null default clock_timestamp(),
  pool_size        int not null,
  version          text not null,
  handles          text[] not null default '{}',     -- types and patterns, as LIKE patterns
  idle             boolean not null default false,   -- else enqueue doesn't notify, which serialises commits
  is_leader        boolean not null default false,
  leader_until     timestamptz,
  leader_term      bigint,        -- rises at each election; every function of the leader names it
  stopping_at      timestamptz,   -- since when it claims no more
  declared_dead_at timestamptz,
  constraint leader_has_term_and_lease check (not is_leader or (leader_term is not null and leader_until is not null))
) with (fillfactor = 50);
create sequence if not exists orchestrator.leader_terms;
create sequence if not exists orchestrator.payload_doublings;
comment on sequence orchestrator.payload_doublings is
  'How often 16 KiB must be doubled to hold any payload that was ever enqueued: _largest_payload.';
comment on table orchestrator.workers is 'Live worker processes, and dead ones whose claims are still to be recovered.';

create table if not exists orchestrator.task_types (
  type        text collate "C" primary key,
  likes       text collate "C" generated always as (orchestrator._like(type)) stored,
  max_retries int,   -- null: no worker registered it, it is only paused or was
  base_delay  interval,
  max_delay   interval,
  timeout     interval,
  paused      boolean not null default false,
  updated_at  timestamptz not null default clock_timestamp()
);
comment on table orchestrator.task_types is
  'Whether a type or pattern is paused, and its retry policy, as workers register it: recovery needs it where the leader has no '
  'handler.';

create table if not exists orchestrator.task_events (
  id        bigint generated always as identity primary key,
  task_id   uuid not null,
  at        timestamptz not null default clock_timestamp(),
  event     text not null,
  attempt   int,
  worker_id text,
  detail    text
);
comment on table orchestrator.task_events is
  'What happened to a task apart from success: failed, retry_scheduled, dead_letter, released, recovered, snoozed, '
  'cancel_requested, cancelled, retried, signalled, run_now, prioritized, result_lost, key_passed_on. Each task keeps the newest 100.';

create table if not exists orchestrator.lanes (
  type     text collate "C" not null,
  priority int not null,
  noted_at timestamptz not null default clock_timestamp()
);
comment on table orchestrator.lanes is
  'The lanes (type, priority) that many ready tasks were taken from lately: only their floors may have to rise. No unique key, so '
  'that noting a lane never waits.';

create table if not exists orchestrator.lane_floors (
  type       text collate "C" not null,
  priority   int not null,
  generation bigint not null,
  floor      timestamptz not null
);
comment on table orchestrator.lane_floors is
  'The queued_at below which a lane has nothing ready, where claims start: the lowest floor of its newest generation.';

create table if not exists orchestrator.leader_state (
  one             boolean primary key default true check (one),
  safe_floor      timestamptz not null default '-infinity',
  candidate       timestamptz,
  candidate_vxids text[],
  drop_floors_at  timestamptz,
  prune_cursor    uuid not null default '00000000-0000-0000-0000-000000000000',
  rescan_type     text collate "C",
  sampled_type    text collate "C"
);
comment on table orchestrator.leader_state is
  'The leader''s notes, one row: how far floors may rise, when to drop some, where pruning and the rescan stopped, and a ready type '
  'taken by chance.';

create table if not exists orchestrator.type_limits (
  type        text collate "C" primary key,
  likes       text collate "C" generated always as (orchestrator._like(type)) stored,
  max_running int,
  max_per_key int,
  rate        int,
  rate_per    interval,
  since       bigint,
  updated_at  timestamptz not null default clock_timestamp(),
  constraint a_rate_has_its_time check ((rate is null) = (rate_per is null))
);
comment on table orchestrator.type_limits is
  'The limits of types and patterns. A type is under its own, else that of the longest pattern. Claims lock the row. All null: '
  'removed; a claim deletes it when nothing is parked under it.';

create table if not exists orchestrator.starts (
  limit_name text collate "C" not null,
  at         timestamptz not null,
  n          int not null
);
comment on table orchestrator.starts is 'How many tasks were claimed when under a limit with a rate, as far back as that reaches.';

create table if not exists orchestrator.freed_keys (
  limit_name text collate "C" not null,
  key        text collate "C"
);
comment on table orchestrator.freed_keys is
  'Notes for the next claim: of these keys (null: all) of a limit, parked tasks may go on. Each key with room and parked tasks has one.';

create table if not exists orchestrator.task_waits (
  parent     uuid not null,
  child      uuid not null,
  on_failure text not null,
  primary key (parent, child)
);
comment on table orchestrator.task_waits is 'What blocked tasks (child) still wait for. While it is empty, others pay for one look.';

-- not an index on tasks, which would cost each enqueue 1%
create table if not exists orchestrator.expiries (
  at      timestamptz not null,
  task_id uuid not null,
  primary key (at, task_id)
);
comment on table orchestrator.expiries is 'When to look whether a task has expired, whatever becomes of it until then.';

create table if not exists orchestrator.schedules (
  name         text primary key,
  cron         text not null,
  timezone     text not null,
  type         text not null,
  payload      jsonb not null,
  priority     int not null,
  max_retries  int,
  missed       text not null,
  overlap      boolean not null,
  paused       boolean not null default false,
  next_at      timestamptz not null,
  active_since timestamptz not null default clock_timestamp(),
  last_fire_at timestamptz,
  last_task_id uuid,
  last_error   text,
  updated_at   timestamptz not null default clock_timestamp(),
  constraint missed_is_one_all_or_none check (missed in ('one', 'all', 'none')),
  constraint a_failed_schedule_is_paused check (last_error is null or paused)
) with (fillfactor = 50);
comment on table orchestrator.schedules is 'One row for each recurring task.';

do $do$
declare
  r record;
begin
  for r in
    select * from (values
      ('tasks.id', 'A UUIDv7: ordered by creation.'),
      ('tasks.type', 'Which handler runs it, such as task:backup; 1 to 255 bytes.'),
      ('tasks.payload', 'The handler''s input, at most 256 KiB.'),
      ('tasks.priority', 'Higher is claimed first.'),
      ('tasks.idempotency_key', 'Unique within its type while the row is kept.'),
      ('tasks.worker_id', 'The worker that has it, or had it when it ended; null while waiting.'),
      ('tasks.claim_id', 'The claim that has it, which each outcome must name.'),
      ('tasks.queued_at', 'Its place in its lane (type, priority), oldest first; set while it is ready.'),
      ('tasks.attempts', 'Attempts started. One that fails and is above max_retries makes a dead letter.'),
      ('tasks.max_retries', 'Retries after the first attempt, 0 to 1000; null: as task_types says.'),
      ('tasks.next_retry_at', 'When a delayed, snoozed or failed task becomes ready; of a blocked one, when to look at its parents again.'),
      ('tasks.cancel_requested_at', 'When a task in flight was asked to stop.'),
      ('tasks.recoveries', 'How often it was taken from a dead worker; then it is marked running first.'),
      ('tasks.result', 'What the handler returned.'),
      ('tasks.progress', 'What the handler reported last.'),
      ('tasks.concurrency_key', 'Whose turn it takes under a limit for each key, such as a tenant; 1 to 255 bytes.'),
      ('tasks.parked_at', 'Its queued_at, while as many tasks of its key are in flight as the limit parked_by allows.'),
      ('tasks.after', 'The tasks that it was enqueued to wait for.'),
      ('tasks.blocked_until', 'Set while it waits for other tasks: it becomes ready then at the earliest.'),
      ('tasks.expires_at', 'If it has not been claimed by then, it never is.'),
      ('tasks.meta', 'Beside the payload, such as a trace context: at most 8 KiB, shown as it is, so no secrets.'),
      ('schedules.name', '1 to 200 bytes; part of the idempotency key of its tasks.'),
      ('schedules.next_at', 'The earliest fire time that has not been dealt with.'),
      ('schedules.active_since', 'Its fire times count from here: when it was created, got another cron or time zone, or was resumed.'),
      ('schedules.last_fire_at', 'The fire time of last_task_id, or when fire_schedule created that.'),
      ('schedules.last_error', 'Why it could not fire and was paused.'),
      ('type_limits.since', 'Claims with a smaller id may hold its tasks without its name or their key; null until the first claim after a change.'),
      ('task_waits.on_failure', 'What a parent that does not complete means for the child: see enqueue.')) c(name, meaning)
  loop
    execute format('comment on column orchestrator.%s is %L', r.name, r.meaning);
  end loop;
end $do$;

-- Not "if not exists", which waits for all writers, and keeps them out, also where the index is there.
do $$
declare
  r record;
begin
  for r in
    select * from (values
      ('index', 'tasks_ready', 'tasks (type, priority desc, queued_at) where queued_at is not null'),
      ('index', 'tasks_claim', 'tasks (claim_id) where claim_id is not null'),
      ('index', 'tasks_due', 'tasks (next_retry_at) where next_retry_at is not null'),
      ('index', 'task_waits_child', 'task_waits (child, parent)'),
      ('index', 'tasks_dead', 'tasks (dead_at) where dead_at is not null'),
      ('index', 'tasks_cancelling', 'tasks (cancel_requested_at) where cancel_requested_at is not null'),
      ('index', 'tasks_parked', 'tasks (parked_by, concurrency_key, type, priority desc, parked_at) where parked_at is not null'),
      ('unique index', 'tasks_idempotency', 'tasks (type, idempotency_key) where idempotency_key is not null'),
      ('index', 'schedules_due', 'schedules (next_at) where not paused'),
      ('index', 'claims_worker', 'claims (worker_id)'),
      ('index', 'claims_limit', 'claims (limit_name, key) where limit_name is not null'),
      ('index', 'starts_newest', 'starts (limit_name, at)'),
      ('index', 'freed_keys_limit', 'freed_keys (limit_name)'),
      ('unique index', 'workers_have_one_leader', 'workers (is_leader) where is_leader'),
      ('index', 'workers_idle', 'workers (id) where idle'),
      ('index', 'task_types_paused', 'task_types (type) where paused'),
      ('index', 'task_events_task', 'task_events (task_id, id)'),
      ('index', 'lanes_lane', 'lanes (type, priority)'),
      -- in the order of the ready index, so that the next lane that has a floor is one look
      ('index', 'lane_floors_newest', 'lane_floors (type, priority desc, generation desc, floor)')) i(kind, name, definition)
    where to_regclass('orchestrator.' || i.name) is null
  loop
    execute format('create %s %I on orchestrator.%s', r.kind, r.name, r.definition);
  end loop;
end $$;

-- not "on conflict", which waits for a leader that updates the row, and may itself wait for this installation
insert into orchestrator.leader_state (one) select true where not exists (select from orchestrator.leader_state);
