"""sql/50_workers.sql: registration, heartbeat, and the recovery of what dead workers held."""
from __future__ import annotations

from datetime import timedelta

import pytest
from psycopg.types.json import Jsonb

from postgres import wait_for_lock
from steps import (
    audit,
    backend,
    background,
    cancel,
    claim,
    claim_one,
    claims,
    column,
    complete,
    declare_dead,
    enqueue,
    enqueue_some,
    events,
    fail,
    lead,
    promote,
    recover,
    register,
    release,
    row,
    rows,
    rung,
    start,
    status,
    task,
    value,
)

NOTHING = {"released": 0, "retried": 0, "dead_letters": {}, "cancelled": 0, "failed": 0, "workers_removed": 0}


@pytest.fixture
def conn(conn):
    yield conn
    assert audit(conn) == []


@pytest.fixture
def term(conn):
    return lead(conn)


def test_register_keeps_the_worker_and_the_policies_of_its_handlers(conn):
    register(conn, "w", {"a:b": {"max_retries": 0, "base_delay": 0.5, "max_delay": 60, "timeout": 90}, "c:*": {}})
    found = row(conn, "select * from orchestrator.workers")
    assert (found["id"], found["hostname"], found["pool_size"], found["version"]) == ("w", "host", 10, "1")
    assert found["handles"] == ["a:b", "c:%"] and not found["idle"] and not found["is_leader"]
    types = rows(conn, "select type, max_retries, base_delay, max_delay, timeout, paused from orchestrator.task_types order by 1")
    assert [tuple(t.values()) for t in types] == [
        ("a:b", 0, timedelta(seconds=0.5), timedelta(minutes=1), timedelta(seconds=90), False),
        ("c:*", 3, timedelta(seconds=1), timedelta(hours=1), None, False)]


def test_register_again_with_the_same_policy_writes_nothing_and_with_another_replaces_it(conn):
    register(conn, "v", {"a": {"max_retries": 1}})
    conn.execute("select orchestrator.pause_type('a')")
    before = row(conn, "select ctid, * from orchestrator.task_types")
    register(conn, "w", {"a": {"max_retries": 1}})
    assert row(conn, "select ctid, * from orchestrator.task_types") == before
    register(conn, "x", {"a": {"max_retries": 2}})
    after = row(conn, "select max_retries, paused from orchestrator.task_types")
    assert after == {"max_retries": 2, "paused": True}


def test_register_sent_again_changes_nothing(conn):
    """The answer to the first may have been lost."""
    register(conn, "w", {"a": {}})
    before = row(conn, "select * from orchestrator.workers")
    register(conn, "w", {"a": {}})
    assert row(conn, "select * from orchestrator.workers") == before


def test_workers_that_register_the_same_types_at_once_do_not_deadlock(conn, connect):
    """Both write their types in the order of the names, whatever order they were given in."""
    one, other, holder = connect(), connect(), connect(autocommit=False)
    register(conn, "first", ["a", "b", "c"])
    holder.execute("select from orchestrator.task_types where type = 'b' for update")
    first = background(lambda: register(one, "v", {t: {"max_retries": 7} for t in "abc"}))
    wait_for_lock(conn, backend(one))
    second = background(lambda: register(other, "w", {t: {"max_retries": 8} for t in "cba"}))
    wait_for_lock(conn, backend(other))
    holder.rollback()
    first.result(10), second.result(10)
    assert column(conn, "select max_retries from orchestrator.task_types") == [8, 8, 8]


def test_unregister_removes_a_worker_without_claims(conn):
    register(conn)
    assert value(conn, "select orchestrator.unregister_worker('w')") is True
    assert column(conn, "select id from orchestrator.workers") == []


def test_unregister_with_claims_leaves_them_to_the_leader(conn, term):
    register(conn)
    enqueue(conn)
    claim_one(conn)
    conn.execute("select orchestrator.set_idle('w', true)")
    assert value(conn, "select orchestrator.unregister_worker('w')") is False
    assert recover(conn, term) == {**NOTHING, "released": 1, "workers_removed": 1}


def heartbeat(conn, worker):
    return dict(conn.execute("select worker_id, last_heartbeat from orchestrator.heartbeat(%s)", [worker]).fetchall())


def test_a_heartbeat_is_recorded_and_returns_all_live_workers_with_theirs(conn):
    for worker in ("v", "w", "dead"):
        register(conn, worker)
    conn.execute("update orchestrator.workers set last_heartbeat = now() - interval '1 minute'")
    declare_dead(conn, "dead")
    got = heartbeat(conn, "w")
    assert got == dict(conn.execute("select id, last_heartbeat from orchestrator.workers where id in ('v', 'w')").fetchall())
    assert value(conn, "select clock_timestamp() - last_heartbeat < interval '10 s' from orchestrator.workers where id = 'w'")
    assert got["w"] > got["v"]


def test_heartbeat_of_a_worker_that_is_dead_or_unknown_says_so_and_revives_nothing(conn):
    register(conn)
    declare_dead(conn, "w")
    before = row(conn, "select * from orchestrator.workers")
    assert heartbeat(conn, "w") == heartbeat(conn, "nobody") == {}
    assert row(conn, "select * from orchestrator.workers") == before


def test_a_heartbeat_waits_for_no_other_table_than_workers(conn, connect):
    """Else a lock on one of them would make workers seem dead."""
    register(conn)
    locker = connect(autocommit=False)
    for table in column(conn,
        "select oid::regclass::text from pg_class where relnamespace = 'orchestrator'::regnamespace and relkind = 'r'"):
        if table != "orchestrator.workers":
            locker.execute(f"lock table {table} in access exclusive mode")
    conn.execute("set lock_timeout = '1s'")
    assert heartbeat(conn, "w").keys() == {"w"}
    locker.rollback()


def test_cancelling_tasks_names_the_workers_own_tasks_that_were_asked_to_stop(conn):
    register(conn, "v")
    register(conn, "w")
    mine, _, other = enqueue_some(conn, 3)
    claim(conn, "w", limit=2)
    claim(conn, "v")
    cancel(conn, mine)
    cancel(conn, other)
    assert column(conn, "select t::text from orchestrator.cancelling_tasks('w') t") == [mine]
    assert column(conn, "select t::text from orchestrator.cancelling_tasks('v') t") == [other]


def test_set_idle_marks_and_unmarks(conn):
    register(conn)
    for idle in (True, True, False):
        conn.execute("select orchestrator.set_idle('w', %s)", [idle])
        assert value(conn, "select idle from orchestrator.workers") is idle


def say_dead(conn, term, seen):
    query = "select orchestrator.declare_dead('leader', %s, %s, %s)"
    return value(conn, query, term, list(seen), list(seen.values()))


def test_declare_dead_takes_those_whose_heartbeat_is_the_one_that_was_seen_and_never_itself(conn, term):
    for worker in ("late", "punctual", "dead"):
        register(conn, worker)
    seen = dict(conn.execute("select id, last_heartbeat from orchestrator.workers").fetchall())
    declare_dead(conn, "dead")
    before = value(conn, "select declared_dead_at from orchestrator.workers where id = 'dead'")
    conn.execute("select orchestrator.set_idle('late', true)")
    heartbeat(conn, "punctual")
    assert say_dead(conn, term, {**seen, "nobody": seen["late"]}) == 1
    dead = "select id from orchestrator.workers where declared_dead_at is not null order by id"
    assert column(conn, dead) == ["dead", "late"]
    assert value(conn, "select declared_dead_at from orchestrator.workers where id = 'dead'") == before
    assert say_dead(conn, term, {}) == 0


@pytest.mark.parametrize("step", ["-1 hour", "1 hour"])
def test_a_step_of_the_clock_declares_nobody_dead(conn, term, step):
    """As if the worker's last heartbeat had been written before the clock was set: it beats on, and that is all that counts."""
    register(conn)
    conn.execute("update orchestrator.workers set last_heartbeat = last_heartbeat - %s::interval where id = 'w'", [step])
    seen = dict(conn.execute("select id, last_heartbeat from orchestrator.workers where id = 'w'").fetchall())
    heartbeat(conn, "w")
    assert say_dead(conn, term, seen) == 0


def test_declare_disconnected_dead_takes_those_without_a_connection(conn, connect):
    for worker in ("gone", "there", "here"):
        register(conn, worker)
    connect(application_name=value(conn, "select orchestrator._application_name('there')"))
    found = row(conn, "select * from orchestrator.declare_disconnected_dead('here')")
    assert found == {"declared": 1, "living": 1}
    assert column(conn, "select id from orchestrator.workers where declared_dead_at is not null") == ["gone"]


def test_a_long_worker_id_fits_an_application_name(conn, connect):
    register(conn, "here")
    worker = register(conn, "host." * 40 + ":123:abcdef")
    name = value(conn, "select orchestrator._application_name(%s)", worker)
    connect(application_name=name)
    assert row(conn, "select * from orchestrator.declare_disconnected_dead('here')") == {"declared": 0, "living": 1}


def test_recovery_gives_back_what_had_not_started_uncharged_and_in_its_old_place(conn, term):
    register(conn)
    ids = enqueue_some(conn, 2)
    claim(conn)
    newer = enqueue(conn)
    declare_dead(conn, "w")
    assert recover(conn, term) == {**NOTHING, "released": 2, "workers_removed": 1}
    found = task(conn, ids[0])
    assert (found["status"], found["attempts"], found["recoveries"], found["worker_id"]) == ("pending", 0, 1, None)
    assert found["queued_at"] == found["created_at"] and events(conn, ids[0]) == ["recovered"]
    register(conn, "v")
    got = claim(conn, "v", limit=3)
    assert [t["id"] for t in got] == [*ids, newer] and [t["recoveries"] for t in got] == [1, 1, 0]


def test_recovery_charges_what_was_running_with_a_failed_attempt(conn, term):
    register(conn)
    running, claimed = enqueue_some(conn, 2)
    claim_id = claim(conn)[0]["claim_id"]
    start(conn, claim_id, running)
    declare_dead(conn, "w")
    assert recover(conn, term) == {**NOTHING, "released": 1, "retried": 1, "workers_removed": 1}
    found = task(conn, running)
    assert (found["status"], found["attempts"], found["recoveries"]) == ("retry_scheduled", 1, 1)
    assert found["last_error"] == "worker w died" and events(conn, running) == ["recovered", "failed", "retry_scheduled"]
    assert status(conn, claimed) == "pending"


def test_a_task_that_kills_its_worker_is_dead_lettered_at_its_retries_and_its_neighbour_is_not_charged(conn, term):
    killer, neighbour = enqueue(conn, max_retries=2), enqueue(conn, max_retries=2)
    for n in range(3):
        register(conn, f"w{n}")
        promote(conn)
        got = claim(conn, f"w{n}")
        assert {t["id"] for t in got} == {killer, neighbour} and all(t["recoveries"] == n for t in got)
        start(conn, got[0]["claim_id"], killer)
        declare_dead(conn, f"w{n}")
        recover(conn, term)
        conn.execute("update orchestrator.tasks set next_retry_at = clock_timestamp() where next_retry_at is not null")
    assert (status(conn, killer), task(conn, killer)["attempts"]) == ("dead_letter", 3)
    assert (status(conn, neighbour), task(conn, neighbour)["attempts"]) == ("pending", 0)


def test_recovery_ends_what_was_asked_to_cancel(conn, term):
    register(conn)
    running, claimed = enqueue_some(conn, 2)
    start(conn, claim(conn)[0]["claim_id"], running)
    cancel(conn, running)
    cancel(conn, claimed)
    declare_dead(conn, "w")
    assert recover(conn, term) == {**NOTHING, "cancelled": 2, "workers_removed": 1}
    assert {status(conn, running), status(conn, claimed)} == {"cancelled"}


def test_recovery_leaves_living_workers_alone(conn, term):
    register(conn)
    enqueue(conn)
    claim_one(conn)
    assert recover(conn, term) == NOTHING
    assert claims(conn) and value(conn, "select count(*) from orchestrator.workers") == 2


def test_recovery_takes_claims_whose_workers_row_is_missing(conn, term):
    register(conn)
    id = enqueue(conn)
    claim_one(conn)
    conn.execute("delete from orchestrator.workers where id = 'w'")
    assert recover(conn, term) == {**NOTHING, "released": 1}
    assert status(conn, id) == "pending"


def test_recovery_is_bounded_and_the_workers_row_goes_with_its_last_claim(conn, term):
    register(conn)
    enqueue_some(conn, 5)
    claim(conn, limit=3)
    claim(conn, limit=2)
    declare_dead(conn, "w")
    assert [recover(conn, term, limit=2) for _ in range(3)] == [
        {**NOTHING, "released": 2}, {**NOTHING, "released": 2}, {**NOTHING, "released": 1, "workers_removed": 1}]


BREAK_A_TASK = """
  create function public.break_it() returns trigger language plpgsql as
    'begin raise exception ''this row cannot be written''; end';
  create trigger break_it before update on orchestrator.tasks for each row when (old.payload ? 'bad') execute function public.break_it();
"""


def test_a_bad_row_keeps_back_only_itself_and_its_workers_row(conn, term):
    register(conn)
    good = enqueue_some(conn, 3)
    bad = enqueue(conn, payload={"bad": 1})
    good += enqueue_some(conn, 3)
    got = claim(conn)
    start(conn, got[0]["claim_id"], good[0], good[5])
    conn.execute(BREAK_A_TASK)
    declare_dead(conn, "w")
    assert recover(conn, term) == {**NOTHING, "released": 4, "retried": 2, "failed": 1}
    assert status(conn, bad) == "claimed" and "claimed" not in {status(conn, id) for id in good}
    assert claims(conn) == {got[0]["claim_id"]: 1} and recover(conn, term) == {**NOTHING, "failed": 1}
    conn.execute("drop trigger break_it on orchestrator.tasks")
    assert recover(conn, term) == {**NOTHING, "released": 1, "workers_removed": 1}


def test_bad_rows_in_the_first_claims_do_not_keep_back_the_later_ones(conn, term):
    register(conn)
    for _ in range(3):
        enqueue(conn, payload={"bad": 1})
    claim(conn)
    good = enqueue_some(conn, 2)
    claim(conn)
    conn.execute(BREAK_A_TASK)
    declare_dead(conn, "w")
    assert recover(conn, term, limit=3) == {**NOTHING, "released": 2, "failed": 3}
    assert {status(conn, id) for id in good} == {"pending"}
    conn.execute("drop trigger break_it on orchestrator.tasks")
    recover(conn, term)


def test_an_answer_that_comes_after_the_recovery_is_rejected(conn, term):
    register(conn)
    id = enqueue(conn)
    claim_id, _ = claim_one(conn)
    declare_dead(conn, "w")
    recover(conn, term)
    assert complete(conn, claim_id, id) == {id: "rejected"} and fail(conn, claim_id, id) == "rejected"
    assert status(conn, id) == "pending"


def test_an_answer_that_the_recovery_waited_for_stands(conn, connect, term):
    register(conn)
    id = enqueue(conn)
    claim_id, _ = claim_one(conn)
    declare_dead(conn, "w")
    worker, leader = connect(autocommit=False), connect()
    complete(worker, claim_id, id)
    late = background(lambda: recover(leader, term))
    wait_for_lock(conn, backend(leader))
    worker.commit()
    assert late.result(10)["released"] == 0
    assert status(conn, id) == "completed" and events(conn, id) == []


def test_a_claim_that_was_open_when_its_worker_died_is_recovered_later(conn, connect, term):
    """The row of the worker is gone by then; its claim is found all the same."""
    register(conn)
    id = enqueue(conn)
    worker = connect(autocommit=False)
    claim_one(worker)
    declare_dead(conn, "w")
    assert recover(conn, term) == {**NOTHING, "workers_removed": 1}
    worker.commit()
    assert status(conn, id) == "claimed"
    assert recover(conn, term) == {**NOTHING, "released": 1}


def test_recovery_notifies_an_idle_worker(conn, connect, term):
    listener = connect()
    listener.execute("listen orchestrator")
    register(conn)
    enqueue(conn)
    claim_one(conn)
    register(conn, "v")
    conn.execute("select orchestrator.set_idle('v', true)")
    declare_dead(conn, "w")
    recover(conn, term)
    assert rung(listener, conn) == [""]


def test_a_release_notifies_an_idle_worker(conn, connect):
    listener = connect()
    listener.execute("listen orchestrator")
    register(conn)
    enqueue(conn)
    claim_id, _ = claim_one(conn)
    conn.execute("select orchestrator.set_idle('w', true)")
    release(conn, claim_id)
    assert rung(listener, conn) == [""]


def test_a_policy_is_applied_to_types_that_the_leader_does_not_handle(conn, term):
    register(conn, "w", {"s:": {"max_retries": 0}})
    id = enqueue(conn, "s:1")
    claim_id, _ = claim_one(conn, types=["s:1"])
    start(conn, claim_id, id)
    declare_dead(conn, "w")
    assert recover(conn, term)["dead_letters"] == {"s:1": 1}
    assert row(conn, "select detail from orchestrator.task_events where event = 'dead_letter'")["detail"] == "retries used up"


def test_policies_may_be_given_as_json_of_numbers(conn):
    conn.execute("select orchestrator.register_worker('w', 'h', 1, '1', %s)", [Jsonb({"a": {"max_retries": 0, "timeout": None}})])
    assert row(conn, "select max_retries, timeout from orchestrator.task_types") == {"max_retries": 0, "timeout": None}
