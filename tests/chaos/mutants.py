"""Break the SQL on purpose, one rule at a time, in a copy: the tests must notice. Exits 1 if some mutant stays green.

    python tests/chaos/mutants.py            all of them
    python tests/chaos/mutants.py fence      those whose name contains "fence"
"""
from __future__ import annotations

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

SQL = TESTS.parent / "sql"


@dataclass
class Mutant:
    name: str
    file: str
    function: str  # only what is in this function is changed; "": anywhere in the file
    old: str
    new: str
    tests: str  # "finish claim": the tests of test_finish.py whose name has "claim" in it


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
    Mutant("what is before the start is left", "30_claim", "claim_tasks", "and v_from = v_heads[i]", "", "claim started_further"),
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
      for file, function in [("40_finish", "complete_tasks"), ("40_finish", "fail_tasks"), ("40_finish", "release_tasks"),
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
    Mutant("now() in promote_due", "30_claim", "promote_due",
           "queued_at = clock_timestamp()", "queued_at = now()", "floors began_before"),
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
    Mutant("floors are dropped while a task is put back", "35_floors", "_lock_floors",
           "lock table orchestrator.lane_floors in share row exclusive mode nowait;", "", "floors being_put_back"),
    Mutant("floors that help are dropped", "35_floors", "_is_slow", ">= p_slow", "> interval '1 day'", "floors helps"),
    Mutant("floors are asked about without end", "35_floors", "_idle_floors", "200 * (", "0 * (", "floors a_200th"),
    # claims that a crash may forget, patterns, bytes
    Mutant("claim ids from a sequence", "30_claim", "claim_tasks", "orchestrator._new_claim_id()", "nextval('orchestrator.leader_terms')",
           "claim crash_forgot"),
    Mutant("a claim waits for its flush", "30_claim", "claim_tasks", "'synchronous_commit', 'off', true", "'synchronous_commit', 'on', true",
           "claim flush"),
    Mutant("all types of a pattern are looked at", "30_claim", "_ready_types", "v_left := v_left - 1;", "", "claim thousand"),
    Mutant("late names are left out", "30_claim", "_ready_types", "where v_again and", "where false and", "claim thousand"),
    Mutant("what is paused is found by its pattern", "30_claim", "_ready_types", "if v_type like any (p_paused) then", "if false and v_type is null then",
           "claim steps_over"),
    Mutant("bytes are not counted", "30_claim", "claim_tasks", "v_weigh boolean := p_limit > p_bytes / 262144;", "v_weigh boolean := false;",
           "claim bytes"),
    Mutant("a heavy claim goes on as before", "30_claim", "claim_tasks",
           "v_left := least(v_left, greatest((p_bytes - v_claimed * v_most) / 262144, (v_claimed = 0)::int));", "", "claim bytes"),
    Mutant("a heartbeat in time does not help", "50_workers", "declare_dead", "and w.last_heartbeat = s.seen", "", "workers heartbeat"),
    Mutant("a lease of a clock that was set back stays", "60_leader", "acquire_leadership", "o.leader_until > clock_timestamp() + p_length", "false",
           "leader set_back"),
    # plans and noise
    Mutant("the planner may scan", "88_settings", "", "'enable_seqscan = off'", "'enable_seqscan = on'", "plans complete_tasks"),
    Mutant("due by a volatile function", "30_claim", "promote_due",
           "t.next_retry_at <= v_now", "t.next_retry_at <= clock_timestamp()", "plans promote"),
    Mutant("every enqueue notifies", "20_enqueue", "_notify_idle", "w.idle and", "", "enqueue notifies"),
    Mutant("claims walk what is dead", "30_claim", "_ready_lanes", "exists (select from orchestrator.lane_floors)", "false", "floors old_snapshot"),
]


def mutate(folder: Path, mutant: Mutant) -> None:
    """Change the copy of the SQL; `if false then` opens a block, which is closed at the end of its line."""
    file = folder / f"{mutant.file}.sql"
    text = file.read_text()
    function = rf"create or replace function orchestrator\.{mutant.function}\(.*?\nend \$\$;"
    found = re.search(function if mutant.function else ".*", text, re.S)
    assert found, f"{mutant.name}: there is no function {mutant.function} in {mutant.file}"
    assert mutant.old in found[0], f"{mutant.name}: {mutant.old!r} is not in {mutant.function}"
    body = found[0].replace(mutant.old, mutant.new)
    if mutant.new.startswith("if false then"):
        body = re.sub(r"(if false then .*?;)", r"\1 end if;", body)
    file.write_text(text[:found.start()] + body + text[found.end():])


def run_tests(server: Server, folder: Path, tests: str) -> tuple[int, str]:
    environment = {**os.environ, "TEST_DATABASE_URL": server.url, "ORCHESTRATOR_SQL": str(folder)}
    file, words = tests.split()
    done = subprocess.run([sys.executable, "-m", "pytest", "-xq", "-p", "no:cacheprovider", "--tb=line",
                           TESTS / f"test_{file}.py", "-k", words], check=False,
                          capture_output=True, text=True, env=environment, cwd=TESTS.parent)
    return done.returncode, done.stdout


def verdict(code: int, output: str) -> str:
    if code == 0:
        return "green"
    return "red" if code == 1 and re.search(r"\d+ failed", output) else "broken"  # such as SQL that doesn't load


def main(wanted: str = "") -> int:
    mutants = [mutant for mutant in MUTANTS if wanted in mutant.name]
    server = start_server()
    bad = 0
    try:
        with tempfile.TemporaryDirectory() as temporary:
            whole, folder = Path(temporary) / "whole", Path(temporary) / "sql"
            shutil.copytree(SQL, whole)
            for mutant in mutants:
                shutil.rmtree(folder, ignore_errors=True)
                shutil.copytree(whole, folder)
                mutate(folder, mutant)
                began = time.monotonic()
                code, output = run_tests(server, folder, mutant.tests)
                seen = verdict(code, output)
                bad += seen != "red"
                print(f"{seen:6}  {mutant.name:50}  {mutant.tests:30}  {time.monotonic() - began:5.1f} s", flush=True)
                if seen == "broken":
                    print(output[-2000:])
    finally:
        server.stop()
    print(f"{len(mutants)} mutants, {bad} not noticed")
    return 1 if bad or not mutants else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
