"""replace_task: replacing, appending to and keeping what waits under a key, whatever its task is doing."""
from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest
from psycopg.types.json import Jsonb

from apps import make_app
from postgres import wait_for_lock
from steps import (
    audit,
    backend,
    background,
    cancel,
    claim,
    claim_one,
    column,
    complete,
    enqueue,
    enqueue_some,
    events,
    fail,
    lead,
    promote,
    raise_floors,
    register,
    row,
    rows,
    rung,
    snooze,
    start,
    task,
    value,
)

SECONDS = "select extract(epoch from %s::timestamptz - clock_timestamp())::float"


def replace(conn: Any, payload: Any = None, mode: str = "replace", key: str | None = "k", **named: Any) -> tuple[str, str]:
    """(id, action) of a task of type t; `named` are further parameters without p_."""
    given = {"type": "t", "idempotency_key": key, "payload": Jsonb(payload if payload is not None else {}), "mode": mode, **named}
    arguments = ", ".join(f"p_{name} => %({name})s" for name in given)
    id, action = conn.execute(f"select * from orchestrator.replace_task({arguments})", given).fetchone()
    return str(id), action


def soon(conn: Any, length: str = "1 hour") -> Any:
    return value(conn, "select clock_timestamp() + %s::interval", length)


def payload_of(conn: Any, id: str) -> Any:
    return task(conn, id)["payload"]


@pytest.fixture
def conn(conn):
    """With a worker `w`; after the test nothing may break a rule of the audit."""
    register(conn, "w", ("t", "u"))
    yield conn
    assert audit(conn) == []


# --- each status and mode ------------------------------------------------------------------------------------------------------

def taken(conn: Any, end: Callable[[int, str], object]) -> None:
    end(*claim_one(conn))


def parked(conn: Any, id: str) -> None:
    conn.execute("select orchestrator.limit_type('t', p_max_per_key => 1)")
    enqueue(conn, concurrency_key="a")
    conn.execute("update orchestrator.tasks set queued_at = created_at - interval '1 hour' where id <> %s", [id])
    claim(conn)
    assert task(conn, id)["parked_at"] is not None


def blocked(conn: Any, id: str) -> None:
    conn.execute("insert into orchestrator.task_waits (parent, child, on_failure) values (%s, %s, 'wait')", [enqueue(conn, "u"), id])
    conn.execute("update orchestrator.tasks set queued_at = null, blocked_until = now(), next_retry_at = now() + interval '1 day' "
                 "where id = %s", [id])


def expiring(conn: Any, id: str, length: str) -> None:
    conn.execute("insert into orchestrator.expiries (at, task_id) select now() + %s::interval, %s", [length, id])
    conn.execute("update orchestrator.tasks t set expires_at = e.at from orchestrator.expiries e where t.id = e.task_id")


# How a task of the key k comes to be so. The first of the table's columns is what becomes of it in the modes replace and append,
# the second in the mode keep: changed or kept as the one task of its key, or the key passed on to a new one.
STATES: dict[str, tuple[Callable[[Any, str], object], str, str]] = {
    "ready": (lambda conn, id: None, "replaced", "kept"),
    "delayed": (lambda conn, id: conn.execute(
        "update orchestrator.tasks set queued_at = null, next_retry_at = now() + interval '1 day'"), "replaced", "kept"),
    "parked": (parked, "replaced", "kept"),
    "blocked": (blocked, "replaced", "kept"),
    "snoozed": (lambda conn, id: taken(conn, lambda c, id: snooze(conn, c, id)), "replaced", "kept"),
    "with steps": (lambda conn, id: taken(conn, lambda c, id: (conn.execute("select orchestrator.record_step(%s, %s, 'a', '1')", [c, id]),
                                                               snooze(conn, c, id))), "enqueued", "kept"),
    "cancelled and retried": (lambda conn, id: conn.execute(
        "select orchestrator.cancel_task(%(id)s), orchestrator.retry_task(%(id)s)", {"id": id}), "replaced", "kept"),
    "expired": (lambda conn, id: expiring(conn, id, "0"), "enqueued", "enqueued"),
    "expiring later": (lambda conn, id: expiring(conn, id, "1 hour"), "replaced", "kept"),
    "claimed": (lambda conn, id: claim_one(conn), "enqueued", "kept"),
    "running": (lambda conn, id: taken(conn, lambda c, id: start(conn, c, id)), "enqueued", "kept"),
    "retry_scheduled": (lambda conn, id: taken(conn, lambda c, id: fail(conn, c, id, after="1 day")), "enqueued", "kept"),
    "ready again": (lambda conn, id: (taken(conn, lambda c, id: fail(conn, c, id, after="0")), promote(conn)), "enqueued", "kept"),
    "completed": (lambda conn, id: taken(conn, lambda c, id: complete(conn, c, id)), "enqueued", "enqueued"),
    "cancelled": (cancel, "enqueued", "enqueued"),
    "dead_letter": (lambda conn, id: taken(conn, lambda c, id: fail(conn, c, id, permanent=True)), "enqueued", "enqueued"),
}


@pytest.mark.parametrize("mode", ["replace", "append", "keep"])
@pytest.mark.parametrize("state", STATES)
def test_each_status_and_mode(conn, state, mode):
    prepare, changing, keeping = STATES[state]
    first = enqueue(conn, payload=[1], idempotency_key="k", concurrency_key="a")
    prepare(conn, first)
    before = task(conn, first)
    id, action = replace(conn, [2], mode)
    after = task(conn, first)
    assert action == (keeping if mode == "keep" else changing)
    changed = {name for name in before if before[name] != after[name]} - {"updated_at"}
    if action == "enqueued":
        assert id != first and payload_of(conn, id) == [2] and task(conn, id)["idempotency_key"] == "k"
        assert after["payload"] == [1] and changed == {"idempotency_key"}
        assert events(conn, first)[-1] == "key_passed_on"
        assert column(conn, "select detail from orchestrator.task_events where event = 'key_passed_on'") == [f"to {id}"]
    else:
        assert id == first and changed == ({"payload"} if action == "replaced" else set())   # its time and its place stay
        assert after["payload"] == {"replace": [2], "append": [1, 2], "keep": [1]}[mode]


def test_a_key_that_nobody_has_makes_a_new_task_in_each_mode(conn):
    for mode in ("replace", "append", "keep"):
        id, action = replace(conn, [1], mode, key=mode, priority=7, concurrency_key="a")
        assert action == "enqueued" and payload_of(conn, id) == [1]
        assert row(conn, "select priority, concurrency_key, status from orchestrator.tasks where id = %s", id) == {
            "priority": 7, "concurrency_key": "a", "status": "pending"}


def test_types_have_keys_of_their_own(conn):
    other = enqueue(conn, "u", [1], idempotency_key="k")
    assert replace(conn, [2])[1] == "enqueued" and payload_of(conn, other) == [1]


def test_a_payload_of_null_is_an_empty_object(conn):
    id, _ = replace(conn, [1])
    conn.execute("select orchestrator.replace_task('t', 'k', null)")
    assert payload_of(conn, id) == {}
    conn.execute("select orchestrator.replace_task('t', 'k', null, p_mode => 'append')")
    assert payload_of(conn, id) == {}


# --- time, place and priority --------------------------------------------------------------------------------------------------

def test_debounce_moves_the_time_with_each_call_up_to_max_wait_after_the_first(conn):
    def call(run_in: str) -> float:
        id, _ = replace(conn, run_at=soon(conn, run_in), max_wait="1 minute")
        return value(conn, SECONDS, task(conn, id)["next_retry_at"])

    assert 9 < call("10 seconds") <= 10
    assert 29 < call("30 seconds") <= 30
    assert 50 < call("2 minutes") <= 60
    conn.execute("update orchestrator.tasks set created_at = created_at - interval '59 seconds'")
    assert 0 < call("10 seconds") <= 1
    conn.execute("update orchestrator.tasks set created_at = created_at - interval '1 second'")
    assert call("10 seconds") is None and len(claim(conn)) == 1


def test_the_first_call_too_is_bounded_by_max_wait(conn):
    id, _ = replace(conn, run_at=soon(conn), max_wait="10 seconds")
    assert 5 < value(conn, SECONDS, task(conn, id)["next_retry_at"]) <= 10


def test_throttle_keeps_the_time_of_the_first_call_and_the_newest_payload(conn):
    id, _ = replace(conn, 1, run_at=soon(conn, "10 seconds"), max_wait="10 seconds")
    first = task(conn, id)["next_retry_at"]
    for n in range(2, 5):
        replace(conn, n, run_at=soon(conn, "10 seconds"), max_wait="10 seconds")
    assert abs((task(conn, id)["next_retry_at"] - first).total_seconds()) < 0.5 and payload_of(conn, id) == 4


def test_a_ready_task_may_be_put_off_and_a_delayed_one_called_in(conn):
    id, _ = replace(conn)
    replace(conn, run_at=soon(conn))
    assert claim(conn) == [] and task(conn, id)["queued_at"] is None
    replace(conn, run_at=soon(conn, "-1 second"))
    assert task(conn, id)["next_retry_at"] is None
    assert [t["id"] for t in claim(conn)] == [id]


def test_a_ready_task_keeps_its_place_if_its_time_is_now(conn):
    first = enqueue(conn, idempotency_key="k")
    enqueue(conn)
    replace(conn, run_at=soon(conn, "-1 second"))
    assert claim_one(conn)[1] == first


def test_a_replaced_time_is_kept_to_by_promote_due(conn):
    id, _ = replace(conn, run_at=soon(conn))
    replace(conn, run_at=soon(conn, "0.01 seconds"))
    conn.execute("select pg_sleep(0.02)")
    assert promote(conn) == 1 and claim_one(conn)[1] == id


def test_a_new_priority_takes_the_tail_of_its_lane_and_the_same_one_changes_no_place(conn):
    a = enqueue(conn, idempotency_key="k")
    b = enqueue(conn, priority=5)
    assert replace(conn, priority=5) == (a, "replaced")
    c = enqueue(conn, priority=5)
    replace(conn, priority=5)
    assert [t["id"] for t in claim(conn)] == [b, a, c]


def test_no_floor_of_the_new_lane_hides_an_older_task(conn):
    term = lead(conn)
    old = enqueue(conn, idempotency_key="k")
    for _ in range(3):   # the floor of the lane with priority 5 rises above the place that the old task has in the other lane
        enqueue(conn, priority=5)
        claim(conn, limit=1)
        raise_floors(conn, term)
    floor = value(conn, "select max(floor) from orchestrator.lane_floors where priority = 5")
    assert floor > task(conn, old)["queued_at"]
    replace(conn, priority=5)
    assert [t["id"] for t in claim(conn)] == [old]


def test_a_replaced_task_that_keeps_its_place_is_not_hidden_by_a_floor(conn):
    term = lead(conn)
    enqueue_some(conn, 3)
    old = enqueue(conn, idempotency_key="k")
    claim(conn, limit=3)
    raise_floors(conn, term)
    replace(conn, [2])
    raise_floors(conn, term)
    assert [t["id"] for t in claim(conn)] == [old]


def test_a_blocked_task_takes_a_new_time_and_stays_blocked(conn):
    id = enqueue(conn, idempotency_key="k")
    blocked(conn, id)
    look = task(conn, id)["next_retry_at"]
    for run_in in ("1 hour", "-1 second"):
        run_at = soon(conn, run_in)
        replace(conn, [2], run_at=run_at, priority=3)
        t = task(conn, id)
        assert (t["queued_at"], t["blocked_until"], t["next_retry_at"], t["priority"]) == (None, run_at, look, 3)


# --- limits --------------------------------------------------------------------------------------------------------------------

def test_a_parked_task_stays_parked_whatever_its_time_and_priority(conn):
    id = enqueue(conn, idempotency_key="k", concurrency_key="a")
    parked(conn, id)
    place = task(conn, id)["parked_at"]
    replace(conn, [2], run_at=soon(conn))
    assert (task(conn, id)["parked_at"], task(conn, id)["next_retry_at"]) == (place, None)
    replace(conn, [3], priority=5)
    assert task(conn, id)["parked_at"] == place
    [busy] = column(conn, "select id::text from orchestrator.tasks where status = 'claimed'")
    complete(conn, task(conn, busy)["claim_id"], busy)
    assert [(t["id"], t["payload"]) for t in claim(conn)] == [(id, [3])]


def test_a_key_goes_on_when_a_parked_task_is_moved_before_the_one_in_its_turn(conn):
    conn.execute("select orchestrator.limit_type('t', null, 1)")
    enqueue(conn, concurrency_key="k", priority=9)
    first = claim_one(conn)
    parked = enqueue(conn, concurrency_key="k", priority=5, idempotency_key="parked")
    turn = enqueue(conn, concurrency_key="k", priority=7)
    assert claim(conn) == []
    complete(conn, *first)
    assert claim(conn, limit=0) == [] and task(conn, turn)["queued_at"] and task(conn, parked)["parked_at"]
    conn.execute("select orchestrator.replace_task('t', 'parked', p_priority => 7)")
    for expected in (parked, turn):
        claim_id, id = claim_one(conn)
        assert id == expected and complete(conn, claim_id, id) == {}


@pytest.mark.parametrize("change", [{"run_at": "1 hour"}, {"priority": -5}])
def test_a_ready_task_that_leaves_its_keys_turn_lets_the_next_one_of_the_key_go_on(conn, change):
    conn.execute("select orchestrator.limit_type('t', p_max_per_key => 1)")
    busy, turn, line = (enqueue(conn, idempotency_key=key, concurrency_key="a") for key in ("1", "k", "3"))
    claim(conn)
    complete(conn, task(conn, busy)["claim_id"], busy)
    register(conn, "v", ("u",))
    claim(conn, "v", ("t",), 0)   # puts the second back into its lane, and claims nothing
    conn.execute("update orchestrator.tasks set queued_at = coalesce(queued_at, parked_at), parked_at = null, parked_by = null "
                 "where id = %s", [turn])
    conn.execute("delete from orchestrator.freed_keys")
    assert task(conn, turn)["queued_at"] and task(conn, line)["parked_at"]
    replace(conn, **{name: soon(conn, given) if name == "run_at" else given for name, given in change.items()})
    assert [t["id"] for t in claim(conn, limit=1)] == [line]


# --- refusals ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("given", "problem"), [
    ({"mode": "merge"}, "mode: must be replace, append or keep"), ({"mode": None}, "mode: must be"),
    ({"key": None}, "idempotency_key: must be given"), ({"key": ""}, "idempotency_key: must be 1 to 255 bytes"),
    ({"type": "a*"}, "type: "), ({"priority": 10 ** 7}, "priority: "),
    ({"run_at": "infinity"}, "run_at: "), ({"max_wait": "1 minute"}, "max_wait: must be 0 or more, and goes with run_at"),
    ({"max_wait": "-1 minute", "run_at": "2030-01-01"}, "max_wait: "), ({"payload": ["x" * 262144]}, "payload: is over 256 KiB"),
    ({"payload": 5, "mode": "append"}, "payload: must be an array or an object"),
    ({"payload": {}, "mode": "append"}, "payload: must be an array, like the payload that waits"),
    ({"key": "new", "concurrency_key": ""}, r"concurrency_keys?(\[1\])?: "),
    ({"payload": ["x" * 131072], "mode": "append"}, "payload: is over 256 KiB with what waits")])
def test_what_is_refused_names_the_field_and_changes_nothing(conn, given, problem):
    replace(conn, ["x" * 131072])
    before = rows(conn, "select * from orchestrator.tasks")
    with pytest.raises(psycopg.Error, match=f"^{problem}") as error:
        replace(conn, **given)
    assert error.value.sqlstate == "OR001" and error.value.diag.message_hint
    assert rows(conn, "select * from orchestrator.tasks") == before


# --- together with others ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("state", ["none", "ready", "completed"])
@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_of_two_callers_the_second_waits_for_the_first_and_finds_what_it_did(conn, connect, state, end):
    if state != "none":
        enqueue(conn, payload=[0], idempotency_key="k")
    if state == "completed":
        taken(conn, lambda c, id: complete(conn, c, id))
    first, second = connect(autocommit=False), connect()
    id, _ = replace(first, [1], "append")
    late = background(lambda: replace(second, [2], "append"))
    wait_for_lock(conn, backend(second))
    getattr(first, end)()
    late_id, action = late.result(10)
    kept = [0] * (state == "ready") + [1] * (end == "commit")
    assert payload_of(conn, late_id) == [*kept, 2]
    assert (late_id == id) == (end == "commit" or state == "ready")
    assert action == ("replaced" if kept else "enqueued")


def test_a_claim_passes_over_what_a_caller_has_kept_until_it_commits(conn, connect):
    """So the task sees what that caller's transaction wrote."""
    id = enqueue(conn, idempotency_key="k")
    caller = connect(autocommit=False)
    for mode in ("keep", "replace"):
        assert replace(caller, mode=mode)[0] == id
        assert claim(conn) == []
        caller.rollback()
    assert [t["id"] for t in claim(conn)] == [id]


def test_keep_does_not_hold_up_the_report_of_a_task_in_flight(conn, connect):
    enqueue(conn, idempotency_key="k")
    claim_id, id = claim_one(conn)
    caller = connect(autocommit=False)
    assert replace(caller, mode="keep") == (id, "kept")
    conn.execute("set lock_timeout = '5s'")
    assert complete(conn, claim_id, id) == {}


def test_a_savepoint_is_no_other_transaction(connect, conn):
    """The first call inside it must not take its own task for somebody else's, and append twice."""
    caller = connect(autocommit=False)
    with caller.transaction(), caller.transaction():
        id, action = replace(caller, [1], "append")
    assert action == "enqueued" and replace(caller, [2], "append") == (id, "replaced")
    caller.commit()
    assert payload_of(conn, id) == [1, 2]


def test_an_idle_worker_is_woken_by_a_task_that_becomes_ready(conn, connect):
    conn.execute("update orchestrator.workers set idle = true")
    conn.execute("listen orchestrator")
    for run_in, heard in (("1 hour", []), ("1 hour", []), ("-1 second", [""]), ("-1 second", [""])):
        replace(conn, run_at=soon(conn, run_in))
        assert rung(conn, connect()) == heard
    replace(conn, mode="keep")
    assert rung(conn, connect()) == []


def test_a_schedule_does_not_fire_a_time_again_whose_task_passed_its_key_on(conn):
    conn.execute("select orchestrator.schedule('s', '@every 1 hour', 't')")
    conn.execute("update orchestrator.schedules set next_at = next_at - interval '1 hour'")
    promote(conn)
    [key] = column(conn, "select idempotency_key from orchestrator.tasks")
    cancel(conn, value(conn, "select id from orchestrator.tasks"))
    assert replace(conn, key=key)[1] == "enqueued"
    promote(conn)
    assert value(conn, "select count(*) from orchestrator.tasks") == 2


@pytest.mark.parametrize("seed", range(2))
def test_of_a_random_run_the_payloads_are_a_permutation_of_what_was_appended(conn, seed):
    """One session, each step at random: what is appended is in one task, in order, whatever becomes of the tasks meanwhile."""
    rng = random.Random(seed)
    sent = 0
    held: list[tuple[int, str]] = []
    for _ in range(150):
        step = rng.random()
        if step < 0.6:
            replace(conn, list(range(sent, sent + (n := rng.randint(1, 3)))), "append", rng.choice("ab"),
                    run_at=rng.choice([None, soon(conn, "-1 second"), soon(conn)]), priority=rng.choice([None, 0, 1]))
            sent += n
        elif step < 0.75:
            held += [(t["claim_id"], t["id"]) for t in claim(conn, limit=1)]
        elif held:
            claim_id, id = held.pop(rng.randrange(len(held)))
            rng.choice([complete, fail, lambda *of: snooze(*of, "0"), lambda *of: fail(*of, permanent=True)])(conn, claim_id, id)
        else:
            promote(conn)
    payloads = column(conn, "select payload from orchestrator.tasks")
    assert sorted(n for payload in payloads for n in payload) == list(range(sent))
    assert all(payload == sorted(payload) for payload in payloads)


def test_four_producers_append_while_two_workers_drain_and_each_event_is_in_exactly_one_task(conn, connect):
    register(conn, "v")
    done = threading.Event()

    def produce(number: int) -> int:
        producer, rng = connect(), random.Random(number)
        for n in range(150):
            replace(producer, [number * 1000 + n], "append", rng.choice("ab"))
        return 150

    def drain(worker: str) -> int:
        connection, count = connect(), 0
        while not done.is_set():
            for t in claim(connection, worker, limit=2):
                assert complete(connection, t["claim_id"], t["id"]) == {}
                count += 1
        return count

    producers = [background(lambda n=n: produce(n)) for n in range(4)]
    workers = [background(lambda name=name: drain(name)) for name in "wv"]
    sent = sum(producer.result(60) for producer in producers)
    done.set()
    drained = sum(worker.result(10) for worker in workers)
    found = column(conn, "select e::int from orchestrator.tasks t, jsonb_array_elements(t.payload) e")
    assert len(found) == len(set(found)) == sent == 600
    assert drained > 20


# --- a program and the command line --------------------------------------------------------------------------------------------

def test_a_program_replaces_appends_and_keeps(installed, conn):
    app = make_app(installed)
    first = app.replace("t", UUID(int=5), [1], delay="1h", max_wait=timedelta(hours=2), priority=3, concurrency_key="a", meta={"by": "me"})
    again = app.replace("t", str(UUID(int=5)), [2], mode="append")
    assert (first.created, again.created, again == first) == (True, False, True)
    assert app.replace("t", UUID(int=5), [3], mode="keep") == first
    t = task(conn, first)
    assert (t["payload"], t["priority"], t["concurrency_key"], t["meta"]) == ([1, 2], 3, "a", {"by": "me"})
    assert app.replace("t", UUID(int=5), run_at=datetime.now(UTC), priority=-1) == first
    assert row(conn, "select payload, priority, next_retry_at from orchestrator.tasks where id = %s", first) == {
        "payload": {}, "priority": -1, "next_retry_at": None}
    app.close()


def test_a_program_replaces_in_its_own_transaction(installed, conn):
    app = make_app("postgresql://127.0.0.1:1/nowhere")   # never used
    with psycopg.connect(installed) as caller:
        app.replace("t", "k", connection=caller)
        assert value(conn, "select count(*) from orchestrator.tasks") == 0
    assert value(conn, "select idempotency_key from orchestrator.tasks") == "k"


@pytest.mark.parametrize(("given", "problem"), [
    ({"mode": "merge"}, "mode: "), ({"key": ""}, "key: "), ({"key": None}, "key: "),
    ({"type": ""}, "type: "), ({"max_wait": "1m"}, "max_wait: "),
    ({"max_wait": -1, "delay": 1}, "max_wait: "), ({"priority": 10 ** 7}, "priority: "), ({"payload": {1, 2}, "delay": "x"}, "delay: "),
    ({"payload": object()}, "payload: "), ({"payload": 5, "mode": "append"}, "payload: "), ({"concurrency_key": ""}, "concurrency_key: "),
    ({"delay": 1, "run_at": datetime.now(UTC)}, "delay: give either")])
def test_a_program_is_told_which_field_is_wrong(installed, given, problem):
    app = make_app(installed)
    with pytest.raises(ValueError, match=f"^{problem}"):
        app.replace(**{"type": "t", "key": "k", **given})
    app.close()


def test_the_command_enqueue_replaces_appends_and_keeps(installed, conn, run_cli):
    def run(*args: str) -> tuple[int, str, str]:
        done = run_cli("enqueue", "t", *args, env={"DATABASE_URL": installed})
        return done.returncode, done.stdout.strip(), done.stderr

    _, id, _ = run("[1]", "--key", "k", "--append", "--delay", "10s", "--max-wait", "1m", "--priority", "2")
    assert run("[2]", "--key", "k", "--append") == (0, id, "")
    assert run("[3]", "--key", "k", "--keep") == (0, id, "")
    assert row(conn, "select payload, priority, queued_at from orchestrator.tasks") == {"payload": [1, 2], "priority": 2, "queued_at": None}
    assert run("[4]", "--key", "k", "--replace", "--run-at", "2020-01-01T00:00:00Z", "--json") == (
        0, json.dumps({"id": id, "created": False}), "")
    assert row(conn, "select payload, next_retry_at from orchestrator.tasks") == {"payload": [4], "next_retry_at": None}
    for args, problem in ((["--replace"], "--replace: goes with --key"), (["--key", "k", "--keep", "--append"], "--keep: goes with"),
                          (["--key", "k", "--keep", "--max-retries", "1"], "--keep: goes with"),
                          (["--key", "k", "--keep", "--on-failure", "run"], "--keep: goes with"), (["--max-wait", "1m"], "--max-wait: "),
                          (["--key", "k", "--replace", "--max-wait", "1m"], "max_wait: "),
                          (["--file", "-", "--replace"], "--file: "), (["--file", "-", "--wait"], "--file: ")):
        code, out, error = run(*args)
        assert (code, out) == (2, "") and error.startswith(f"error: {problem}")
