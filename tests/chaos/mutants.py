"""Break the program on purpose, one rule at a time, in a copy: the tests must notice. Exits 1 if some mutant stays green.

    python tests/chaos/mutants.py            all of them
    python tests/chaos/mutants.py fence      those whose name contains "fence"
    python tests/chaos/mutants.py python     those of orchestrator.py; sql: those of sql/
"""
from __future__ import annotations

import ast
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS))

from postgres import Server, start_server  # noqa: E402

PARTS = ("orchestrator.py", "handlers.py", "page.html", "pyproject.toml", "sql", "tests")   # of the copy
PYTHON = "orchestrator.py"


@dataclass
class Mutant:
    name: str
    file: str      # of sql/, without its ending; or PYTHON
    function: str  # only what is in this function is changed; "" in the whole file
    old: str
    new: str
    tests: str     # "finish claim or late": the tests of test_finish.py whose names have one of these in them
    more: tuple[str, ...] = ()   # another function of the file, and what is changed in it


def python(name: str, function: str, old: str, new: str, tests: str, *more: str) -> Mutant:
    return Mutant(name, PYTHON, function, old, new, tests, more)


FENCE = "t.claim_id is not distinct from p_claim_id"
MUTANTS = [
    # the fence: an outcome names its claim
    Mutant("fence of complete_tasks", "40_finish", "complete_tasks", FENCE + "s[i]", "true", "finish claim"),
    Mutant("fence of _fail", "40_finish", "_fail", FENCE, "true", "finish claim"),
    Mutant("fence of _release", "40_finish", "_release", FENCE, "true", "finish claim"),
    Mutant("fence of _lock_and_end_cancelled", "40_finish", "_lock_and_end_cancelled", FENCE, "true", "finish claim"),
    Mutant("fence of record_progress", "40_finish", "record_progress", FENCE, "true", "finish claim"),
    Mutant("fence of start_tasks", "30_claim", "start_tasks", FENCE, "true", "finish claim"),
    Mutant("what a lane leaves is left", "30_claim", "claim_tasks", "while v_left > 0 and v_lanes > 0 loop", "for pass in 1..1 loop",
           "claim lanes"),
    Mutant("a lane that filled its share is left", "30_claim", "claim_tasks", "v_taken < v_share and", "v_taken <= v_share and",
           "claim lane"),
    Mutant("what is before the start is left", "30_claim", "claim_tasks", "and v_from = l.heads[i]", "", "claim started_further"),
    Mutant("large claims start at the same rows", "30_claim", "claim_tasks", "v_place::bigint * v_share", "0", "claim started_further"),
    Mutant("a short lane is passed over", "30_claim", "claim_tasks", "v_place := 0;   --", "--", "claim too_short"),
    # the lock order: claims by id, before tasks
    Mutant("lock order of complete_tasks", "40_finish", "complete_tasks", "order by c.id for", "order by c.id desc for",
           "races order_of_their_ids"),
    Mutant("lock order of fail_tasks", "40_finish", "fail_tasks", "order by c.id for", "order by c.id desc for",
           "races order_of_their_ids"),
    Mutant("lock order of recover_orphans", "50_workers", "recover_orphans",
           "order by cl.id limit", "order by cl.id desc limit",
           "races order_of_their_ids"),
    *[Mutant(f"no lock on the claim in {function}", file, function, " for no key update", "", "races before_its_task")
      for file, function in [("40_finish", "complete_tasks"), ("40_finish", "fail_tasks"), ("40_finish", "_release_claim"),
                             ("40_finish", "snooze_task"), ("50_workers", "_recover_claim")]],
    Mutant("a cancel request may slip in", "40_finish", "_lock_and_end_cancelled",
           "order by t.id for no key update", "order by t.id", "races cancel"),
    Mutant("keys in any order", "20_enqueue", "enqueue_many",
           "order by u.key, u.o", "order by u.o", "enqueue deadlock"),
    Mutant("a claim waits for locked tasks", "30_claim", "claim_tasks",
           "for no key update skip locked", "for no key update",
           "claim two_claims"),
    # the time: of the moment, not of the transaction's start
    Mutant("now() in complete_tasks", "40_finish", "complete_tasks", "clock_timestamp()", "now()", "finish times"),
    Mutant("now() in the lease", "60_leader", "acquire_leadership", "clock_timestamp()", "now()", "leader lease"),
    Mutant("the lease before the lock", "60_leader", "acquire_leadership",
           "perform from orchestrator.workers w where w.id = p_worker_id for no key update;", "", "leader lease"),
    Mutant("now() in enqueue", "20_enqueue", "enqueue", "then clock_timestamp()", "then now()", "floors began_before"),
    Mutant("now() in enqueue_many", "20_enqueue", "enqueue_many",
           "then clock_timestamp()", "then now()", "floors began_before"),
    Mutant("now() in retry_task", "70_operate", "retry_task",
           "queued_at = clock_timestamp()", "queued_at = now()", "floors began_before"),
    # bulk operations
    Mutant("a dry run that writes", "75_bulk", "bulk_tasks", "if p_dry_run then", "if false then", "bulk dry_run"),
    Mutant("bulk acts out of order", "75_bulk", "_act", "    order by t.id);", "    order by t.id desc);", "bulk created_before"),
    Mutant("a batch out of order", "75_bulk", "_matching", "       order by id limit p_bound)", "       order by id desc limit p_bound)",
           "bulk more_than"),
    Mutant("bulk waits for who holds a task", "75_bulk", "_act", "update skip locked", "update", "bulk without_waiting"),
    Mutant("bulk acts on what no longer matches", "75_bulk", "_act", "p_filter || jsonb_build_object", "jsonb_build_object",
           "bulk no_longer"),
    Mutant("an operation that ended starts again", "75_bulk", "bulk_tasks", "and o.ended_at is null", "", "bulk bounded"),
    Mutant("now() in promote_due", "30_claim", "promote_due",
           "queued_at = clock_timestamp()", "queued_at = now()", "floors began_before"),
    # steps and signals
    Mutant("fence of steps", "48_steps", "_lock_held", FENCE, "true", "steps claim"),
    Mutant("a step does not wait for who takes its task away", "48_steps", "_lock_held", " for no key update", "", "steps waits_for_who"),
    Mutant("the last result counts", "48_steps", "_keep_step", "where s.at is null", "", "steps first_result"),
    Mutant("a timeout begins anew", "48_steps", "await_signal", "then s.until end", "then excluded.until end", "steps first_wait"),
    Mutant("a signal while a task falls asleep is missed", "40_finish", "snooze_task", "perform orchestrator._wake(p_id);", "",
           "steps asleep or moment"),
    Mutant("an old signal wakes again", "48_steps", "_wake", "set until = null", "set until = s.until", "steps asleep"),
    Mutant("a signal wakes who waits for another", "48_steps", "_wake", "s.at is not null and s.until is not null);",
           "s.until is not null);", "steps rings"),
    Mutant("a late signal is taken", "48_steps", "signal_task", "when s.until <= clock_timestamp() then 'timed_out'", "",
           "steps first_wait"),
    Mutant("steps stay when their task goes", "60_leader", "_delete_tasks", "s.task_id = any (p_ids);", "false;", "steps go_with"),
    python("a step in a transaction commits without it", "Task._record", "if self._unrecorded is not None:", "if False:",
           "steps inside_task_transaction or rolled_back"),
    python("a rolled back step is remembered", "Task._connection", "self._steps = None", "pass", "steps rolled_back or leaves_neither"),
    # recovery
    Mutant("recovery charges what had not started", "50_workers", "_recover_tasks",
           "x.status = 'running'", "x.status in ('claimed', 'running')",
           "workers uncharged"),
    Mutant("release charges what was running", "40_finish", "_release",
           "t.attempts - (t.status = 'running')::int", "t.attempts", "finish release"),
    Mutant("recovery leaves no mark", "40_finish", "_release",
           "t.recoveries + p_recovered::int", "t.recoveries", "workers uncharged"),
    Mutant("a bad row stops recovery", "50_workers", "_recover_claim",
           "exception when others", "exception when no_data_found", "workers bad_row"),
    Mutant("the worker's row goes before its claims", "50_workers", "recover_orphans",
           "and not exists (", "and true or exists (", "workers last_claim"),
    Mutant("one attempt more", "40_finish", "_fail",
           "v_attempts > least(", "v_attempts > 1 + least(", "finish dead_letter"),
    # schedules
    Mutant("no row lock in firing", "22_schedules", "_fire_schedules", "for no key update skip locked", "", "schedules under_the_lock"),
    Mutant("a poll waits for another", "22_schedules", "_fire_schedules", "update skip locked", "update", "schedules without_waiting"),
    Mutant("a fire time without a key", "22_schedules", "_fire", "orchestrator._fire_key(s.name, v_at)", "null", "schedules set_back"),
    Mutant("next_at stays", "22_schedules", "_fire",
           "(select f.at from orchestrator.fire_times(s.cron, s.timezone, v_at, 1) f(at))", "s.next_at", "schedules promote_due"),
    Mutant("of the missed the first fires", "22_schedules", "_fire",
           "coalesce(orchestrator._last_fire_time(s.cron, s.timezone, s.next_at, p_now), s.next_at)", "s.next_at", "schedules missed"),
    Mutant("none fires late", "22_schedules", "_fire", "continue when s.missed = 'none' and v_at <= p_now - interval '1 minute';", "",
           "schedules less_than_a_minute"),
    Mutant("unfinished tasks overlap", "22_schedules", "_fire", "continue when not s.overlap and", "continue when false and",
           "schedules overlap"),
    Mutant("unfinished tasks overlap, in the model", "22_schedules", "_fire", "continue when not s.overlap and", "continue when false and",
           "model random"),
    Mutant("a broken schedule stops the others", "22_schedules", "_fire_schedules", "when others then", "when division_by_zero then",
           "schedules broken"),
    Mutant("what isn't its fault pauses a schedule", "22_schedules", "_fire_schedules",
           "when transaction_rollback or", "when division_by_zero or", "schedules own_fault"),
    Mutant("a deployment forgets what was missed", "22_schedules", "schedule",
           "then s.next_at else n.next_at end", "then n.next_at else n.next_at end", "schedules missed"),
    Mutant("resumed, it makes up for the pause", "22_schedules", "resume_schedule",
           "(select f.at from orchestrator.fire_times(s.cron, s.timezone, clock_timestamp(), 1) f(at))", "s.next_at", "schedules paused"),
    Mutant("what was fired may be forgotten", "30_claim", "promote_due", "if fired = 0 then", "if true then", "schedules flush"),
    Mutant("a fixed hour fires twice", "21_cron", "_fire_times_between", "then 2 else 1 end", "then 2 else 2 end", "cron twice"),
    Mutant("a fixed hour that is jumped over is left out", "21_cron", "_fire_times_between",
           "case when not c.every_hour then array[l.at - o.before] end", "null::timestamp[]", "cron jumps"),
    # leadership
    Mutant("any term", "60_leader", "_leads", "w.leader_term = p_term", "p_term is not null", "leader stale_term"),
    Mutant("no end of the lease", "60_leader", "_leads",
           "and w.leader_until > clock_timestamp()", "", "leader stale_term"),
    Mutant("whoever was the leader", "60_leader", "_leads", "and w.is_leader", "", "leader stale_term"),
    Mutant("the leader's row not locked", "60_leader", "_leads", "for no key update", "", "leader nobody_is_elected"),
    *[Mutant(f"no look at the term in {function}", file, function,
             "if not orchestrator._leads(p_worker_id, p_term)", "if false", "leader stale_term")
      for file, function in [("35_floors", "raise_floors"), ("35_floors", "rescan_lanes"), ("50_workers", "declare_dead"),
                             ("50_workers", "recover_orphans"), ("60_leader", "prune")]],
    Mutant("0 is not for ever", "60_leader", "prune", "interval '0'", "interval '-1 s'", "leader for_ever"),
    # floors
    Mutant("floors rise over open writers", "35_floors", "_advance_safe_floor",
           "orchestrator._tasks_writers()", "'{}'::text[]", "floors holds_the_floor"),
    Mutant("floors rise over prepared transactions", "35_floors", "_advance_safe_floor",
           "or v like '-1/%'", "", "floors prepared"),
    Mutant("a release leaves the floor", "40_finish", "_release",
           "perform orchestrator._put_back", "if false then perform orchestrator._put_back",
           "floors released"),
    Mutant("floors are dropped while a task is put back", "35_floors", "raise_floors",
           "lock table orchestrator.lane_floors in share row exclusive mode nowait;", "", "floors being_put_back"),
    Mutant("floors that help are dropped", "35_floors", "_is_slow", ">= p_slow", "> interval '1 day'", "floors helps"),
    Mutant("floors are asked about without end", "35_floors", "_idle_floors", "200 * (", "0 * (", "floors a_200th"),
    # claims that a crash may forget, patterns, bytes
    Mutant("claim ids from a sequence", "30_claim", "claim_tasks", "orchestrator._new_claim_id()", "nextval('orchestrator.leader_terms')",
           "claim crash_forgot"),
    Mutant("a claim waits for its flush", "30_claim", "claim_tasks", "'synchronous_commit', 'off', true",
           "'synchronous_commit', 'on', true",
           "claim flush"),
    *[Mutant(f"what must not be forgotten is: {function}", file, function, "\nbegin\n",
             "\nbegin\n  perform set_config('synchronous_commit', 'off', true);\n", "claim flush")
      for file, function in [("20_enqueue", "enqueue"), ("30_claim", "start_tasks"), ("40_finish", "complete_tasks")]],
    Mutant("all types of a pattern are looked at", "30_claim", "_ready_types", "v_left := v_left - 1;", "", "claim thousand"),
    Mutant("late names are left out", "30_claim", "_ready_types", "where v_again and", "where false and", "claim thousand"),
    Mutant("what is paused is found by its pattern", "30_claim", "_ready_types", "if v_type like any (p_paused) then",
           "if false and v_type is null then",
           "claim steps_over"),
    Mutant("bytes are not counted", "30_claim", "claim_tasks", "p_bytes / orchestrator._largest_payload()", "p_limit",
           "claim bytes"),
    Mutant("large payloads leave no trace", "20_enqueue", "_large_payload_problem", "perform nextval('orchestrator.payload_doublings');",
           "exit;", "claim bytes"),
    Mutant("a heartbeat in time does not help", "50_workers", "declare_dead", "and w.last_heartbeat = s.seen", "", "workers heartbeat"),
    Mutant("a lease of a clock that was set back stays", "60_leader", "acquire_leadership", "o.leader_until > clock_timestamp() + p_length",
           "false",
           "leader set_back"),
    # what a worker says of itself and of others
    Mutant("heartbeats judged by the database's clock", "50_workers", "declare_dead", "w.last_heartbeat = s.seen",
           "w.last_heartbeat < clock_timestamp() - interval '30 seconds'", "workers declare_dead"),
    Mutant("a result is lost of what did not complete", "40_finish", "note_lost_result", "and t.status = 'completed'", "",
           "finish lost_result"),
    Mutant("forgotten claims of others", "40_finish", "release_forgotten", "c.worker_id = p_worker_id and", "", "finish forgotten"),
    Mutant("claims that are known are forgotten", "40_finish", "release_forgotten", "c.id <> all (p_known)", "true", "finish forgotten"),
    Mutant("cancelled tasks of others", "50_workers", "cancelling_tasks", "t.worker_id = p_id and", "", "workers cancelling"),
    Mutant("the heartbeat reads tasks", "50_workers", "heartbeat", "return query select",
           "lock table orchestrator.tasks in access share mode; return query select", "workers no_other_table"),
    Mutant("a sequence stays behind its table", "75_bulk", "", "_sequences s where s.newest > s.at;", "_sequences s where false;",
           "install sequences"),
    Mutant("retention stops at the first full look", "60_leader", "prune", "more := cardinality(v_ids) = p_limit;", "", "leader again"),
    # dependencies and expiry
    Mutant("a child isn't locked first", "45_after", "_settle_child", "t.blocked_until is not null for no key update;",
           "t.blocked_until is not null;", "after same_time"),
    Mutant("no second look", "45_after", "_settle_child", "least(greatest(3 * c.rest, interval '2 seconds'), interval '10 minutes')",
           "interval '10 years'", "after rare"),
    Mutant("looks don't become rare", "45_after", "_settle_child", "3 * c.rest", "c.rest", "after rare"),
    Mutant("looks wait for locks", "45_after", "_settle_child", "for no key update skip locked", "for no key update",
           "after skips or nobody"),
    Mutant("a child isn't looked at when it has committed", "20_enqueue", "enqueue", "v_later := clock_timestamp();   --",
           "v_later := clock_timestamp() + interval '1 minute';   --", "after as_soon_as"),
    Mutant("a cascade out of order", "45_after", "_parents_ended", "from d order by d.id offset 0", "from d order by d.id desc offset 0",
           "after order_of"),
    Mutant("children out of order", "45_after", "_parents_ended", "group by w.child order by w.child",
           "group by w.child order by w.child desc", "after order_of"),
    Mutant("a cascade of one generation", "45_after", "_parents_ended",
           "union select w.child from d "
           "cross join lateral (select * from orchestrator.task_waits x where x.parent = d.id offset 0) w", "", "after root"),
    Mutant("a blocked task is promoted", "30_claim", "promote_due", "where blocked_until is null", "", "after later_of"),
    Mutant("retention forgets who waits", "60_leader", "_delete_tasks", "t.completed_at is not null)", "false)",
           "after before_retention"),
    Mutant("expiry isn't in the claim", "30_claim", "claim_tasks", "and (t.expires_at is null or t.expires_at > v_now)", "",
           "expiry never"),
    Mutant("expiry isn't in the claim under a limit", "32_limits", "_line_up",
           "and (t.expires_at is null or t.expires_at > clock_timestamp())", "", "expiry never"),
    Mutant("a claimed task still expires", "30_claim", "claim_tasks", "expires_at = null", "expires_at = t.expires_at",
           "expiry claimed"),
    # limits
    Mutant("claims don't lock their limit", "32_limits", "_lock_limits", "l.type = v_name for no key update", "l.type = v_name",
           "limits follow_each_other"),
    Mutant("a limit counts before the lock", "32_limits", "_lock_limits",
           "current_setting('transaction_isolation') <> 'read committed'", "false",
           "limits frozen"),
    Mutant("no note when a key has room", "32_limits", "_give_back", "if p_key is not null then", "if false and p_key is not null then",
           "limits comes_back"),
    Mutant("what came under another limit stays parked", "32_limits", "_return_parked",
           "or orchestrator._limit_of(f.type) is distinct from l.type", "", "limits under_a_pattern"),
    Mutant("limits don't see each other", "32_limits", "limit_type",
           "lock table orchestrator.type_limits in share update exclusive mode;", "", "limits waits_for_another"),
    Mutant("nobody is told of a permit", "32_limits", "_give_back", "perform pg_notify('orchestrator', '')", "null", "limits wakes"),
    Mutant("parked tasks go back below the floor", "32_limits", "_return_parked", "perform orchestrator._put_back",
           "if false then perform orchestrator._put_back", "limits floor"),
    Mutant("notes are thrown away", "32_limits", "_return_parked", "v_back.n < k.room or", "", "limits locked"),
    Mutant("parked behind what may be cancelled", "32_limits", "_line_up", "where g.n <= p_room", "", "limits behind_the_last"),
    Mutant("the younger overtakes the parked", "32_limits", "_line_up", "(i.full or i.late)", "i.full", "limits behind_the_parked"),
    Mutant("a key with room is forgotten", "32_limits", "_line_up",
           "(where g.late and not g.full)", "(where false)", "limits locked_elder"),
    Mutant("older claims don't count", "32_limits", "_in_flight",
           "if orchestrator._older_claims(p_name, p_since)", "if false", "limits already"),
    Mutant("a cancelled task doesn't give way", "45_after", "_cancel_waiting",
           "perform orchestrator._give_way(t.type, t.concurrency_key)", "null",
           "limits gives_way"),
    # the one constraint on tasks, and the claim that finds nothing out of the ordinary
    Mutant("an infinite time", "10_tables", "", "isfinite(coalesce(queued_at, next_retry_at, parked_at))",
           "coalesce(queued_at, next_retry_at, parked_at) is not null", "claim would_stop_others"),
    Mutant("a type of any length", "10_tables", "", "and octet_length(type) <= 255", "", "claim would_stop_others"),
    Mutant("a task rests in two places", "10_tables", "",
           "and num_nonnulls(queued_at, next_retry_at, parked_at, completed_at, dead_at) <= 1", "", "audit hand_made"),
    Mutant("plain though a type is paused", "30_claim", "_lanes_to_claim",
           "and not exists (select from orchestrator.task_types p where p.paused)", "", "operate pause"),
    Mutant("plain though there are limits", "30_claim", "_lanes_to_claim", "and not exists (select from orchestrator.type_limits)", "",
           "limits flight"),
    Mutant("plain though there are floors", "30_claim", "_lanes_to_claim", "and not exists (select from orchestrator.lane_floors)", "",
           "floors"),
    # plans and noise
    Mutant("the planner may scan", "88_settings", "", "enable_seqscan = off", "enable_seqscan = on", "plans complete_tasks"),
    Mutant("due by a volatile function", "30_claim", "promote_due",
           "t.next_retry_at <= v_now", "t.next_retry_at <= clock_timestamp()", "plans promote"),
    Mutant("every enqueue notifies", "20_enqueue", "_notify_idle", "w.idle and", "", "enqueue notifies"),
    Mutant("claims walk what is dead", "30_claim", "_ready_lanes", "exists (select from orchestrator.lane_floors)", "false",
           "floors old_snapshot"),
    # orchestrator.py: the pool, which needs no database
    python("a ticket keeps its neighbours", "Pool.supervise", "if (idle := self.idle()) and", "if (idle := self.idle()) and False and",
           "pool slow_task or idle_threads or rescue"),
    python("a lost thread is not replaced", "Pool._keep_size", "range(min(", "range(0 * min(", "pool lost_thread"),
    python("a lost thread is not counted", "Pool._keep_size", "+= sum(not slot.abandoned for slot in gone)", "+= 0", "pool lost_thread"),
    python("an abandoned slot is not replaced", "Pool._keep_size", "(len(self.slots) - stuck)", "len(self.slots)",
           "pool ignores_its_timeout"),
    python("an interrupted thread takes its outcome along", "Pool._keep_size", "self.finished.extend(left)", "pass", "pool exception"),
    python("an outcome is out of hand for a moment", "Pool._run", "now = clock()\n                    task.seconds",
           "slot.task = None\n                    now = clock()\n                    task.seconds", "pool just_after or any_line"),
    python("timeouts do not count", "Pool.supervise", "self._time_out(slot, task, now - task.deadline)", "pass", "pool at_its_timeout"),
    python("the supervisor ends with its first error", "Pool._supervise_until_stopped", "log.exception(",
           "raise\n                log.exception(",
           "pool error_of_its_own"),
    python("a late outcome is reported after its stand-in's", "Pool.abandon",
           'task.ended = "abandoned"', "pass",
           "pool ignores_its_timeout"),
    python("a pool that runs nothing is well", "Pool.problems", "if usable else", "if True else", "pool unhealthy"),
    python("what waits starts though the pool was stopped", "Pool.stop", "self.take_all()", "pass", "pool once_the_pool_was_stopped"),
    python("supervision waits for the database", "Pool._supervise_until_stopped", "self.supervise()", "pass",
           "report_loop database_is_away",
           "ReportLoop.poll", "self._report_all()", "self._report_all(); self.pool.supervise()"),
    # the loops
    python("an outcome that is refused holds up the others", "Loop.together",
           "if len(tasks) == 1:\n                    refused", "if True:\n                    refused",
           "report_loop holds_nothing_up or holds_up or refused_is_reworded"),
    python("a chore that is refused holds up the others", "Loop.attempt", "if not is_refusal(error) or", "if True or",
           "claim_loop chore_that_fails"),
    python("a broken thread is lingered with", "Loop.run", "worker.fatal = worker.fatal or", "_ =", "crash thread_ended"),
    python("a hint cancels what the table does not", "ReportLoop._see_cancellations",
           'self.link.call("cancelling_tasks", worker.id)', "((id,) for id in list(worker.tasks))",
           "report_loop notification_alone"),
    python("each hint is a look", "ReportLoop.look_for_cancellations", "self.last_look + 0.1", "0.0", "report_loop ten_times"),
    python("each notification is a look", "ClaimLoop.wait", "if self.fruitless > 10:", "if False:", "claim_loop bounded_number"),
    python("a claim whose answer was lost stays", "ClaimLoop.__init__",
           "Chore(self._release_forgotten, 10.0)", "Chore(self._promote_due, 10.0)",
           "claim_loop chore_that_fails"),
    python("what arrived is forgotten", "ClaimLoop._release_forgotten", "known = {row[0] for row in self.arrived}", "known = set()",
           "claim_loop answer_was_lost"),
    python("bytes in hand do not count", "ClaimLoop._bytes_left",
           "PAYLOAD_LIMIT - sum(task.payload_length for task in list(tasks.values()))", "PAYLOAD_LIMIT",
           "claim_loop mix_of_sizes"),
    python("recovered tasks start unmarked", "ReportLoop._start_with_care",
           "self._mark([task])", "task.marked = True", "report_loop once_lost_its_worker"),
    python("recovered tasks start together", "ReportLoop._start_with_care", "now - (last.started or now) < CAREFUL_SECONDS", "False",
           "report_loop one_after_the_other"),
    python("an ended attempt takes the next one along", "Worker.forget", "and held.claim_id == task.claim_id", "",
           "report_loop claim_that_is_gone"),
    # the heartbeat loop
    python("heartbeats judged by the database's clock", "HeartbeatLoop._beat", "else (at, now)",
           "else (at, now - time.time() + datetime.fromisoformat(at).timestamp())", "heartbeat_loop clock"),
    python("a heartbeat in time does not help", "HeartbeatLoop._beat", "and before[other][0] == at else", "else",
           "heartbeat_loop timeout or silent"),
    python("an outage counts as silence", "HeartbeatLoop._beat", "before = {}", "pass", "heartbeat_loop pause"),
    python("silence counts until now", "HeartbeatLoop._recover", "limit = self.looked_at", "limit = clock()",
           "heartbeat_loop outage"),
    python("a lease counts from its answer", "HeartbeatLoop._lead", "(term, before + 0.9", "(term, clock() + 0.9",
           "heartbeat_loop lease"),
    python("a chore that fails stops the others", "Loop.do_chores", "self.attempt(chore.run, refused=delay)", "chore.run()",
           "heartbeat_loop chore_that_fails"),
    python("a sick worker sends heartbeats", "HeartbeatLoop.poll",
           "if problems := worker.health():", "if False:", "heartbeat_loop not_well"),
    python("retention stops after a call", "HeartbeatLoop._prune", "0.05 if more else None", "None", "heartbeat_loop prunes_on"),
    python("recovery stops at its limit", "HeartbeatLoop._recover", ">= 900", ">= 900000", "heartbeat_loop reached_its_limit"),
    python("a worker declared dead goes on as before", "Worker.declared_dead", 'self.cancel_all("lost")', "pass",
           "heartbeat_loop declared_dead_stops"),
    # ways to end
    python("what JSON has no form for repeats the work", "Router.completed", 'return Outcome("completed", lost=',
           'return Outcome("failed", ',
           "dispatch can_not_be_kept"),
    python("an exit in a handler ends its thread", "run_task", "except BaseException as error:", "except Exception as error:",
           "dispatch every_way"),
    python("a forked child works on", "_await", "os._exit(0)", "pass", "dispatch forked_child"),
    python("the event loop ends with a callback", "_run_loop", "while not loop.is_closed():", "for _ in range(1):", "dispatch outlives"),
    python("a stale claim commits its transaction", "Task.transaction", "self._check_held(not rows)", "pass", "dispatch stolen_claim"),
    # replacing and waiting
    Mutant("an old place in a new lane", "47_replace", "replace_task", "else p_priority <> t.priority end", "else false end",
           "replace floor_of_the_new_lane"),
    Mutant("what is replaced isn't locked", "47_replace", "replace_task", "for no key update", "", "replace two_callers or passes_over"),
    Mutant("keep locks what is in flight", "47_replace", "replace_task", "and (p_mode <> 'keep' or x.status not in ('claimed', 'running'))",
           "", "replace hold_up"),
    Mutant("another transaction's task is left as it is", "47_replace", "replace_task", "if action <> 'replaced' then", "if true then",
           "replace two_callers"),
    Mutant("a started task is replaced", "47_replace", "replace_task", "t.waits and t.attempts = 0", "t.waits", "replace each_status"),
    Mutant("a key's turn is lost with the place", "47_replace", "replace_task", "t.concurrency_key is not null and", "false and",
           "replace leaves_its_keys_turn"),
    Mutant("a first call's time has no bound", "47_replace", "replace_task", "least(p_run_at, clock_timestamp() + p_max_wait)", "p_run_at",
           "replace first_call"),
    Mutant("a transaction waits for itself", "83_wait", "wait_tasks", "if v_own then", "if false then", "wait itself"),
    python("each look fetches all results", "Operator._wait", "array(waiting)", "array(ids)", "wait looks_less"),
    # connections
    python("a silent server is waited for", "_before", "if not ready and time.monotonic() > until:", "if False:", "link silent"),
    python("names go into statements unchecked", "_statement", 'if not re.fullmatch(r"[a-z_]{1,63}", word):', "if False:", "link name"),
    python("a child uses its parent's links", "_after_fork", "client._reset()", "pass", "processes forked_children"),
    python("a connection that was closed while idle is used", "Link.reopen_if_closed", "if said:", "if False:",
           "processes closed_while_idle"),
    python("one module under two names", "", "\n_share_module()\n", "\n", "processes one_set_of_classes"),
    python("after an error half-way the connection is used again", "Link.__exit__", "if halfway or", "if False and halfway or",
           "link silent"),
]


parsed = functools.cache(ast.parse)   # most mutants start from the same text


def span(text: str, file: str, function: str) -> tuple[int, int]:
    """Where a function begins and ends in the text."""
    if not function:
        return 0, len(text)
    if file != PYTHON:
        found = re.search(rf"create or replace function orchestrator\.{function}\(.*?(\nend \$\$;|\n\$\$;|(?=\ncreate )|$)", text, re.S)
        assert found, f"there is no function {function} in {file}"
        return found.span()
    nodes: list[ast.AST] = [parsed(text)]
    for part in function.split("."):
        nodes = [node for parent in nodes for node in ast.iter_child_nodes(parent)
                 if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and node.name == part]
    assert len(nodes) == 1, f"there is no {function}"
    lines = text.splitlines(keepends=True)
    first, last = nodes[0].lineno, nodes[0].end_lineno   # type: ignore[attr-defined]
    return len("".join(lines[:first - 1])), len("".join(lines[:last]))


def changed(text: str, file: str, function: str, old: str, new: str) -> str:
    """`if false then` opens a block of SQL, which is closed at the end of its line."""
    start, end = span(text, file, function)
    assert old in text[start:end], f"{old!r} is not in {function or file}"
    body = text[start:end].replace(old, new)
    if new.startswith("if false then"):
        body = re.sub(r"(if false then .*?;)", r"\1 end if;", body)
    return text[:start] + body + text[end:]


def mutate(house: Path, mutant: Mutant) -> Path:
    """Change the copy, and return the file."""
    file = house / (mutant.file if mutant.file == PYTHON else f"sql/{mutant.file}.sql")
    text = changed(file.read_text(), mutant.file, mutant.function, mutant.old, mutant.new)
    file.write_text(changed(text, mutant.file, *mutant.more) if mutant.more else text)   # type: ignore[call-arg]
    return file


def run_tests(server: Server, house: Path, tests: str) -> tuple[int, str]:
    kept = {name: value for name, value in os.environ.items() if name != "ORCHESTRATOR_SQL"}
    # without byte code: it is taken for that of the next mutant, which has the same size and second
    environment = {**kept, "TEST_DATABASE_URL": server.url, "PYTHONDONTWRITEBYTECODE": "1"}
    file, _, words = tests.partition(" ")
    done = subprocess.run([sys.executable, "-m", "pytest", "-xq", "-p", "no:cacheprovider", "--tb=line",
                           house / "tests" / f"test_{file}.py", "-k", words], check=False,
                          capture_output=True, text=True, env=environment, cwd=house)
    return done.returncode, done.stdout


def verdict(code: int, output: str) -> str:
    if code == 0:
        return "green"
    return "red" if code == 1 and re.search(r"\d+ failed", output) else "broken"  # such as SQL that doesn't load


def copy_house(house: Path) -> None:
    house.mkdir()
    for part in PARTS:
        source = TESTS.parent / part
        if source.is_dir():
            shutil.copytree(source, house / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, house / part)


def main(wanted: str = "") -> int:
    mutants = [mutant for mutant in MUTANTS
               if wanted in mutant.name or wanted == ("python" if mutant.file == PYTHON else "sql")]
    server = start_server()
    bad = 0
    try:
        with tempfile.TemporaryDirectory() as temporary:
            house, whole = Path(temporary) / "house", Path(temporary) / "whole"
            for folder in (house, whole):   # what is written meanwhile in the repository is not mixed in
                copy_house(folder)
            for mutant in mutants:
                try:
                    file = mutate(house, mutant)
                except AssertionError as error:   # the code has moved on
                    print(f"stale   {mutant.name:50}  {error}", flush=True)
                    bad += 1
                    continue
                began = time.monotonic()
                code, output = run_tests(server, house, mutant.tests)
                shutil.copy(whole / file.relative_to(house), file)
                seen = verdict(code, output)
                bad += seen != "red"
                print(f"{seen:6}  {mutant.name:50}  {mutant.tests:40}  {time.monotonic() - began:5.1f} s", flush=True)
                if seen == "broken":
                    print(output[-2000:])
    finally:
        server.stop()
    print(f"{len(mutants)} mutants, {bad} not noticed")
    return 1 if bad or not mutants else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
