"""The quickest faults of tests/chaos/chaos.py, and that its verdict sees what it is there to see."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import clean_environment
from postgres import Server

CHAOS = Path(__file__).parent / "chaos"
sys.path.append(str(CHAOS))

import durable  # noqa: E402
import limits  # noqa: E402
import mutants  # noqa: E402
import schedules  # noqa: E402
from harness import Lab  # noqa: E402


@pytest.mark.timeout(180)
def test_chaos_short_version_passes(tmp_path: Path) -> None:
    faults = ["COMMIT acknowledged"]
    only = [part for fault in faults for part in ("--only", fault)]
    ended = subprocess.run([sys.executable, str(CHAOS / "chaos.py"), "--short", "--seed", "7", "--json", str(tmp_path / "rows"), *only],
                           check=False, capture_output=True, text=True, cwd=tmp_path, env=clean_environment(), timeout=170)
    rows = json.loads((tmp_path / "rows").read_text()) if (tmp_path / "rows").exists() else []
    assert [row["problems"] for row in rows if row["problems"]] == [], ended.stdout
    assert ended.returncode == 0 and len(rows) == 1, ended.stdout + ended.stderr


def test_each_mutant_changes_the_code_as_it_is(tmp_path: Path) -> None:
    house = tmp_path / "house"
    mutants.copy_house(house)
    whole = {path: path.read_text() for path in [house / "orchestrator.py", *house.glob("sql/*.sql")]}
    for mutant in mutants.MUTANTS:
        file = mutants.mutate(house, mutant)   # asserts that what it changes is there
        assert file.read_text() != whole[file], mutant.name
        file.write_text(whole[file])


@pytest.fixture
def lab(server: Server) -> Lab:
    with Lab("planted", server, seed=1, short=True) as lab:
        yield lab
        lab.problems.clear()    # they were planted: keep no logs
    server.drop_database(lab.url)


def claim(lab: Lab, worker: str = "a:1:x") -> int:
    lab.execute("select orchestrator.register_worker(%s, 'here', 1, '0')", worker)
    return int(lab.value("select claim_id from orchestrator.claim_tasks(%s, array['t'], 1)", worker))


def enqueue(lab: Lab) -> str:
    lab.extra_ids.add(lab.value("select orchestrator.enqueue('t')::text"))
    return max(lab.extra_ids)


def problems(lab: Lab) -> str:
    lab.verdict("one task")
    return " | ".join(lab.problems)


def complete(lab: Lab, claim_id: int, id: str) -> None:
    lab.execute("select * from orchestrator.complete_tasks(array[%s::bigint], array[1], array[%s::uuid])", claim_id, id)


def test_verdict_of_a_healthy_run_is_empty(lab: Lab) -> None:
    id = enqueue(lab)
    complete(lab, claim(lab), id)
    assert problems(lab) == ""


def test_verdict_sees_a_lost_task(lab: Lab) -> None:
    lab.execute("delete from orchestrator.tasks where id = %s", enqueue(lab))
    assert "1 acknowledged tasks are gone" in problems(lab)


def test_verdict_sees_a_task_that_waits_for_ever(lab: Lab) -> None:
    enqueue(lab)
    assert "not ended" in problems(lab)


def test_verdict_sees_a_task_that_nobody_enqueued(lab: Lab) -> None:
    id = enqueue(lab)
    complete(lab, claim(lab), id)
    lab.extra_ids.clear()
    assert "1 tasks that nobody enqueued" in problems(lab)


def test_verdict_sees_two_exits_of_one_claim(lab: Lab) -> None:
    id = enqueue(lab)
    held = claim(lab)
    complete(lab, held, id)
    lab.execute("update orchestrator.tasks set status = 'running', completed_at = null where id = %s", id)   # as if the fence were gone
    lab.execute("update orchestrator.tasks set status = 'completed', completed_at = now() where id = %s", id)
    found = problems(lab)
    assert "1 tasks ended twice" in found and "illegal transitions: {('completed', 'running'): 1}" in found


def test_verdict_sees_an_execution_that_overlaps_another(lab: Lab) -> None:
    id = enqueue(lab)
    held = claim(lab)
    lab.execute("update orchestrator.tasks set claim_id = claim_id + 1")   # as if the fence were gone
    lines = [f"begin {id} {held} 1 a:1:x 100.0", f"begin {id} {held + 1} 1 a:2:x 101.0", f"end {id} {held} 1 a:1:x 102.0"]
    (lab.folder / "executions-1").write_text("\n".join(lines[:1] + lines[2:]))
    (lab.folder / "executions-2").write_text(lines[1])
    assert f"{id} ran again although claim {held} still held it" in problems(lab)


@pytest.mark.parametrize("forgets", [False, True])
def test_verdict_sees_an_execution_under_a_claim_that_is_in_no_ledger(lab: Lab, forgets: bool) -> None:
    """Which only a crash may cause: it forgets a claim that was not flushed, and the task runs again."""
    id = enqueue(lab)
    held = claim(lab)
    complete(lab, held, id)
    lines = [f"{what} {id} {claim_id} 1 a:1:x 100.0" for claim_id in (held - 1, held) for what in ("begin", "end")]
    (lab.folder / "executions-1").write_text("\n".join(lines))
    lab.forgets = forgets
    row = lab.verdict("one task")
    assert row.problems == ([] if forgets else [f"{id} ran under claim {held - 1}, which was never given"])
    assert (row.again, row.forgotten) == ((1, 1) if forgets else (0, 0))


def test_verdict_sees_a_recovery_by_who_does_not_lead(lab: Lab) -> None:
    id = enqueue(lab)
    held = claim(lab)
    lab.execute("update orchestrator.workers set declared_dead_at = now()")
    lab.execute("select orchestrator._recover_claim(%s, 'planted', 10)", held)
    complete(lab, claim(lab, "a:2:x"), id)
    found = problems(lab)
    assert "1 recoveries by chaos, while None led" in found and "a:1:x was declared dead by chaos, while None led" in found


def test_verdict_sees_a_worker_declared_dead_that_nobody_had_touched(lab: Lab) -> None:
    lab.execute("select orchestrator.register_worker(w, 'here', 1, '0') from unnest(array['a:1:x', 'a:2:x']) w")
    lab.execute("select orchestrator.acquire_leadership('a:1:x', '1 hour')")
    lab.execute("update orchestrator.workers set declared_dead_at = now() where id = 'a:2:x'")
    lab.short = False    # else a busy machine may do that too
    assert "1 workers were declared dead that nobody had touched" in problems(lab)
    assert lab.verdict("").false_deaths == 1
    lab.tampered.add(2)
    assert lab.verdict("").false_deaths == 0


def test_verdict_sees_terms_that_do_not_rise(lab: Lab) -> None:
    lab.execute("select orchestrator.register_worker('a:1:x', 'here', 1, '0')")
    for term in (2, 1):
        lab.execute("update orchestrator.workers set is_leader = true, leader_term = %s, leader_until = now()", term)
        lab.execute("update orchestrator.workers set is_leader = false")
    assert "term 1 follows term 2" in problems(lab)


def test_verdict_sees_a_fire_time_that_has_no_task_and_no_reason(lab: Lab) -> None:
    lab.execute(schedules.DEFINE)
    lab.execute("update orchestrator.schedules set next_at = date_trunc('second', now() - interval '9 s'), "
                "active_since = now() - interval '10 s'")
    lab.execute("select orchestrator.promote_due()")
    lab.execute("update orchestrator.tasks set status = 'completed', queued_at = null, attempts = 1, started_at = now(), "
                "completed_at = now()")
    schedules.check(lab, [(0, 1e12)])   # nobody was there, so 'one' may lack some, and 'apart' waits for its first task
    assert lab.problems == [] and len(lab.extra_ids) >= 5 * 9 + 2
    lab.execute("drop view pg_temp.missing, pg_temp.fired")
    lab.execute("delete from orchestrator.tasks where idempotency_key like 'schedule:all 3:%' "
                "and right(idempotency_key, 20)::timestamptz between now() - interval '5 s' and now() - interval '2.5 s'")
    lab.execute("update orchestrator.tasks set completed_at = completed_at - interval '1 hour' "
                "where idempotency_key like 'schedule:apart:%'")
    lab.short = False
    schedules.check(lab, [])
    found = " | ".join(lab.problems)
    assert " fire times without a task, such as of all 3 at " in found and " fire times left out although the last task had ended" in found
    assert "a fire time of 'one', has no task although workers were there" in found


def test_verdict_sees_a_step_that_was_done_again_and_a_charge_too_many(lab: Lab) -> None:
    lab.execute(durable.LEDGER)
    lab.execute("select orchestrator.register_worker('a:1:x', 'here', 1, '0')")
    id = lab.value("select orchestrator.enqueue('fulfil')::text")

    def flying() -> int:
        return int(lab.value("select claim_id from orchestrator.claim_tasks('a:1:x', '{fulfil}', 1)"))

    def does(claim_id: int, *names: str) -> None:
        with (lab.folder / "steps-1").open("a") as ledger:
            ledger.writelines(f"{id} {claim_id} {name}\n" for name in names)
    first = flying()
    lab.execute("insert into chaos.charges values (%s, %s)", id, first)
    for name in ("check", "charge"):
        lab.execute("select orchestrator.record_step(%s, %s, %s, to_jsonb(format('%%s of claim %%s', %s::text, %s::bigint)))",
                    first, id, name, name, first)
    does(first, "check", "check", "charge")
    assert durable.check(lab) == 1 and lab.problems == []
    lab.execute("select orchestrator.release_tasks(%s)", first)
    second = flying()
    does(second, "check", "ship")
    lab.execute("insert into chaos.charges values (%s, %s)", id, second)
    complete(lab, second, id)
    assert durable.check(lab) == 2
    found = " | ".join(lab.problems)
    assert f"{id} did check again under claim {second}" in found and "1 charges too many or too few" in found
    assert "1 results that are not those of the steps" in found and "what was done is not what was recorded" in found
def test_the_monitor_sees_what_is_over_its_limit_and_nothing_else(lab: Lab) -> None:
    monitor = limits.Monitor(lab)
    monitor.set("lim:both", (2, 1))
    now = lab.value("select extract(epoch from clock_timestamp())::float8")
    held = [("lim:both", "a", now, now), ("lim:both", "b", now, now)]
    monitor.judge(held)
    assert monitor.over == []
    monitor.judge([*held, ("lim:both", None, now, now)])
    monitor.judge([held[0], held[0]])
    assert monitor.over == ["3 in flight of lim:both , the limit is 2", "2 in flight of lim:both a, the limit is 1"]
    monitor.set("lim:both", (1, 1))
    monitor.judge(held)   # claimed before the limit fell
    assert len(monitor.over) == 2
    now = lab.value("select extract(epoch from clock_timestamp())::float8")
    monitor.judge([("lim:both", key, now, now) for key in "ab"])
    assert monitor.over[2:] == ["2 in flight of lim:both , the limit is 1"]


def test_verdict_sees_a_rate_that_was_exceeded_and_what_is_left_under_a_limit(lab: Lab) -> None:
    lab.execute(limits.CLAIMED)
    lab.execute("insert into chaos.claimed select 'lim:rate', '2030-01-01Z'::timestamptz + n * interval '25 ms' "
                "from generate_series(1, 80) n")
    limits.check(lab, limits.Monitor(lab))
    assert lab.problems == []
    lab.execute("insert into chaos.claimed values ('lim:rate', '2030-01-01 00:00:00.99Z')")
    lab.execute("insert into orchestrator.claims (id, worker_id, open_tasks, limit_name) values (1, 'w', 1, 'lim:all')")
    limits.check(lab, limits.Monitor(lab))
    assert lab.problems == ["41 were claimed within 1 s, the rate is 40", "1 claims and 0 parked tasks are left"]


def test_a_fault_that_never_bit_fails(lab: Lab) -> None:
    lab.bit(0, "no kill")
    assert problems(lab) == "the fault never bit: no kill"
