-- Tables and indexes. The rule that makes it fast: no index on tasks may mention status, started_at, completed_at,
-- updated_at, worker_id, result or last_error (keys, INCLUDE or WHERE): a changed column that an index mentions stops
-- PostgreSQL's heap-only update, and completing a task must be heap-only. Hence queued_at, next_retry_at and dead_at, each
-- set only while the task waits for that, carry the partial indexes.

create table if not exists orchestrator.tasks (
  id                  uuid default orchestrator._uuidv7(),
  type                text not null,
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
  primary key (id) with (fillfactor = 45),
  -- Few, since PostgreSQL parses each one anew for each statement: fourteen of them were 27 µs of a bare insert's 38. These two
  -- refuse what a hand-made update gets wrong; audit() knows all the rules.
  constraint a_status_has_its_time check (case status
    when 'pending' then coalesce(queued_at, next_retry_at) when 'retry_scheduled' then next_retry_at
    when 'claimed' then claimed_at when 'running' then started_at
    when 'completed' then completed_at when 'cancelled' then completed_at when 'dead_letter' then dead_at end is not null),
  constraint a_task_rests_in_one_place check (num_nonnulls(queued_at, next_retry_at, completed_at, dead_at) <= 1)
) with (fillfactor = 32);   -- room for the next versions on the page: completions stay heap-only, also
                          -- while several workers' claims keep old versions from being pruned (at 40, half of them then did not)
comment on table orchestrator.tasks is 'One row for each task, waiting, in flight or ended. Written by the functions of this schema only.';
comment on column orchestrator.tasks.id is 'UUIDv7, so ordered by creation.';
comment on column orchestrator.tasks.type is 'Which handler runs it, such as task:backup; 1 to 255 bytes.';
comment on column orchestrator.tasks.payload is 'The handler''s input, at most 256 KiB of JSON.';
comment on column orchestrator.tasks.priority is 'Higher is claimed first; default 0.';
comment on column orchestrator.tasks.idempotency_key is 'Unique within its type for as long as the row is kept.';
comment on column orchestrator.tasks.worker_id is 'The worker that has it, or had it when it ended; null while waiting.';
comment on column orchestrator.tasks.claim_id is 'The claim that has it: the fence that each outcome must name.';
comment on column orchestrator.tasks.queued_at is 'Its place in its lane (type, priority), oldest first; set while it is ready to be claimed.';
comment on column orchestrator.tasks.attempts is 'Attempts started. It becomes a dead letter when an attempt fails and attempts > max_retries.';
comment on column orchestrator.tasks.max_retries is 'Retries after the first attempt, 0 to 1000; null: what task_types says of the type (3 if nothing).';
comment on column orchestrator.tasks.next_retry_at is 'When a delayed, snoozed or failed task becomes ready.';
comment on column orchestrator.tasks.cancel_requested_at is 'When a task in flight was asked to stop.';
comment on column orchestrator.tasks.recoveries is 'How often it was taken from a dead worker; from the first on it is marked running before its handler starts.';
comment on column orchestrator.tasks.result is 'What the handler returned, or the progress that it last reported while running.';

create index if not exists tasks_ready on orchestrator.tasks (type, priority desc, queued_at) where queued_at is not null;
create index if not exists tasks_claim on orchestrator.tasks (claim_id) where claim_id is not null;
create index if not exists tasks_due on orchestrator.tasks (next_retry_at) where next_retry_at is not null;
create index if not exists tasks_dead on orchestrator.tasks (dead_at) where dead_at is not null;
create index if not exists tasks_cancelling on orchestrator.tasks (cancel_requested_at) where cancel_requested_at is not null;
create unique index if not exists tasks_idempotency on orchestrator.tasks (type, idempotency_key) where idempotency_key is not null;

create table if not exists orchestrator.claims (
  id          bigint generated always as identity primary key,
  worker_id   text not null,
  claimed_at  timestamptz not null default clock_timestamp(),
  open_tasks  int not null,
  constraint open_tasks_is_positive check (open_tasks > 0)
) with (fillfactor = 50);
create index if not exists claims_worker on orchestrator.claims (worker_id);
comment on table orchestrator.claims is
  'One row for each batch of tasks a worker holds: the fence (its id), the in-flight index (joined with tasks.claim_id) and '
  'the lease that recovery walks. open_tasks = its tasks in claimed or running; the row goes with the last of them.';

create table if not exists orchestrator.workers (
  id               text primary key,
  hostname         text not null,
  started_at       timestamptz not null default clock_timestamp(),
  last_heartbeat   timestamptz not null default clock_timestamp(),
  pool_size        int not null,
  version          text not null,
  handles          text[] not null default '{}',
  idle             boolean not null default false,
  is_leader        boolean not null default false,
  leader_until     timestamptz,
  leader_term      bigint,
  declared_dead_at timestamptz,
  constraint leader_has_term_and_lease check (not is_leader or (leader_term is not null and leader_until is not null))
) with (fillfactor = 50);
create unique index if not exists workers_have_one_leader on orchestrator.workers (is_leader) where is_leader;
create index if not exists workers_idle on orchestrator.workers (id) where idle;
create sequence if not exists orchestrator.leader_terms;
comment on table orchestrator.workers is 'One row for each worker process that lives, or whose claims are still to be recovered.';
comment on column orchestrator.workers.id is 'hostname:pid:random, new at every start and after being declared dead.';
comment on column orchestrator.workers.handles is 'The types and patterns that it has handlers for.';
comment on column orchestrator.workers.idle is 'Set while it waits for work: only then does enqueue ring (NOTIFY), since ringing serialises commits.';
comment on column orchestrator.workers.leader_term is 'Rises at each election; every maintenance function names it.';
comment on sequence orchestrator.leader_terms is 'The numbers of leadership terms.';

create table if not exists orchestrator.task_types (
  type        text primary key,
  max_retries int,
  base_delay  interval not null default '1 second',
  max_delay   interval not null default '1 hour',
  timeout     interval,
  paused      boolean not null default false,
  updated_at  timestamptz not null default clock_timestamp()
);
create index if not exists task_types_paused on orchestrator.task_types (type) where paused;
comment on table orchestrator.task_types is
  'The retry policy of a type or pattern, written when a worker registers its handlers, and whether the type is paused. '
  'In SQL, since recovery applies it for types that the leader has no handler for.';
comment on column orchestrator.task_types.max_retries is 'Null: no worker registered it under this name; the row only says whether it is paused.';

create table if not exists orchestrator.task_events (
  id        bigint generated always as identity primary key,
  task_id   uuid not null,
  at        timestamptz not null default clock_timestamp(),
  event     text not null,
  attempt   int,
  worker_id text,
  detail    text
);
create index if not exists task_events_task on orchestrator.task_events (task_id, id);
comment on table orchestrator.task_events is
  'What a task went through beside the happy path: failed, retry_scheduled, dead_letter, released, recovered, snoozed, '
  'cancel_requested, cancelled, retried. The newest 100 of each task; gone with it.';

create table if not exists orchestrator.lanes (
  type       text not null,
  priority   int not null,
  opened_at  timestamptz not null default clock_timestamp(),
  dropped_at timestamptz
);
create index if not exists lanes_live on orchestrator.lanes (type, priority) where dropped_at is null;
comment on table orchestrator.lanes is
  'Each (type, priority) with tasks to claim. Without a unique key, so that opening one never waits and never deadlocks. '
  'dropped_at: found idle by the leader; kept until nobody can still be enqueuing into it.';

create table if not exists orchestrator.lane_floors (
  type       text not null,
  priority   int not null,
  generation bigint not null,
  floor      timestamptz not null
);
create index if not exists lane_floors_newest on orchestrator.lane_floors (type, priority, generation desc, floor);
comment on table orchestrator.lane_floors is
  'For a lane, the queued_at below which nothing is ready: the lowest floor of its newest generation. A claim starts there '
  'instead of walking the dead index entries that an old snapshot keeps.';

create table if not exists orchestrator.maintenance (
  one             boolean primary key default true check (one),
  safe_floor      timestamptz not null default '-infinity',
  candidate       timestamptz,
  candidate_vxids text[],
  prune_cursor    uuid not null default '00000000-0000-0000-0000-000000000000',
  rescan_type     text,
  claim_marks     jsonb not null default '[]'
);
-- not "on conflict", which waits for a leader that updates the row: it may be waiting for the locks of this installation
insert into orchestrator.maintenance (one) select true where not exists (select from orchestrator.maintenance);
comment on table orchestrator.maintenance is
  'The leader''s notes, one row: how far floors may rise, where pruning and the rescan stopped, and the oldest open claim of '
  'each minute of the last hour.';
