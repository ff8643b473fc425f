"""sql/75_bulk.sql: filters, bulk operations in bounded batches, and the log of who did what."""
from __future__ import annotations

import random
import re
import signal
import subprocess
import threading
from typing import Any

import psycopg
import pytest
from psycopg.types.json import Jsonb

from conftest import START, clean_environment
from postgres import eventually
from steps import (
    Connection,
    audit,
    cancel,
    claim,
    claim_one,
    column,
    complete,
    enqueue,
    enqueue_some,
    events,
    fail,
    register,
    row,
    rows,
    start,
    status,
    task,
    value,
)

MATCH = {   # status → the states that it matches
    "ready": {"ready"}, "parked": {"parked"}, "blocked": {"blocked"}, "scheduled": {"scheduled", "retry_scheduled", "blocked"},
    "waiting": {"ready", "scheduled", "parked", "blocked", "retry_scheduled"}, "in_flight": {"claimed", "running", "stopping"},
    "unfinished": {"ready", "scheduled", "parked", "blocked", "retry_scheduled", "claimed", "running", "stopping"},
    "ended": {"completed", "cancelled"}, "pending": {"ready", "scheduled", "parked", "blocked"}, "claimed": {"claimed", "stopping"},
    "running": {"running"}, "retry_scheduled": {"retry_scheduled"}, "dead_letter": {"dead_letter"}, "completed": {"completed"},
    "cancelled": {"cancelled"}}
ACTS = {   # action → the states that it applies to, and the status that is meant where a filter names none
    "cancel": (MATCH["unfinished"] - {"stopping"}, "unfinished"), "retry": ({"dead_letter", "cancelled"}, "dead_letter"),
    "run_now": (MATCH["scheduled"] - {"blocked"}, "scheduled"), "prioritize": (MATCH["waiting"], "waiting"),
    "purge": ({"completed", "cancelled", "dead_letter"}, "ended")}


@pytest.fixture
def conn(conn: Connection) -> Any:
    register(conn)
    yield conn
    assert audit(conn) == []


def bulk(conn: Connection, action: str, filter: Any, dry_run: bool = False, **named: Any) -> Any:
    named = {"action": action, "filter": Jsonb(filter), "dry_run": dry_run, **named}
    arguments = ", ".join(f"p_{name} => %({name})s" for name in named)
    with conn.cursor(row_factory=psycopg.rows.dict_row) as cursor:
        return cursor.execute(f"select * from orchestrator.bulk_tasks({arguments})", named).fetchone()


def to_the_end(conn: Connection, action: str, filter: Any, **named: Any) -> tuple[int, int, int]:
    """matched, done and skipped of all calls."""
    sums = [0, 0, 0]
    answer: Any = {"operation": None}
    while True:
        answer = bulk(conn, action, filter, operation=answer["operation"], **named)
        sums = [total + answer[name] for total, name in zip(sums, ("matched", "done", "skipped"), strict=True)]
        if answer["next_after"] is None:
            return sums[0], sums[1], sums[2]


def each_state(conn: Connection, type: str = "t") -> dict[str, str]:
    """A task in each state, by state."""
    made = {}
    for state in ("completed", "dead_letter", "retry_scheduled", "claimed", "stopping", "running"):
        made[state] = enqueue(conn, type)
        claim_id, id = claim_one(conn, types=[type])
        assert id == made[state]
        if state == "completed":
            complete(conn, claim_id, id)
        elif state == "running":
            start(conn, claim_id, id)
        elif state == "stopping":
            cancel(conn, id)
        elif state != "claimed":
            fail(conn, claim_id, id, "no such host", after="1 hour", permanent=state == "dead_letter")
    made["scheduled"] = enqueue(conn, type, run_at="2030-01-01")
    made["cancelled"] = enqueue(conn, type)
    cancel(conn, made["cancelled"])
    for state in ("ready", "parked", "blocked"):
        made[state] = enqueue(conn, type)
    conn.execute("update orchestrator.tasks set queued_at = null, parked_at = clock_timestamp(), parked_by = type, concurrency_key = 'k'"
                 " where id = %s", [made["parked"]])
    conn.execute("update orchestrator.tasks set queued_at = null, blocked_until = clock_timestamp(), next_retry_at = '2030-01-01'"
                 " where id = %s", [made["blocked"]])
    return made


def snapshot(conn: Connection) -> list[Any]:
    return [conn.execute(f"select * from orchestrator.{table} order by 1").fetchall()
            for table in ("tasks", "task_events", "operations", "claims", "lanes", "freed_keys")]


@pytest.fixture
def unaudited(connect: Any) -> Connection:
    """For states that only tests make: a blocked task that waits for nothing."""
    conn: Connection = connect()
    register(conn)
    return conn


# -------------------------------------------------------------------------------------------------------------- filters
@pytest.mark.parametrize("given", [*MATCH, None])
@pytest.mark.parametrize("action", ACTS)
def test_each_action_does_what_its_filter_matches_and_applies_to_and_skips_the_rest(
        unaudited: Connection, action: str, given: str | None) -> None:
    conn = unaudited
    made, others = each_state(conn), each_state_of_nobody(conn)
    filter = {"type": "t", **({"status": given} if given else {})}
    applies, default = ACTS[action]
    matched = MATCH[given or default]
    options = {"value": Jsonb(7)} if action == "prioritize" else {}
    before = {id: task(conn, id) for id in (*made.values(), *others)}
    shown = bulk(conn, action, filter, dry_run=True, **options)
    assert shown["matched"] == len(matched) and shown["next_after"] is None
    assert len(shown["sample"]) == min(5, len(matched))
    assert {t["id"] for t in shown["sample"]} <= {made[state] for state in matched}
    assert to_the_end(conn, action, filter, limit=2, **options) == (len(matched), len(matched & applies), len(matched - applies))
    for state, id in made.items():
        changed = task(conn, id) != before[id]
        assert changed == (state in matched & applies), state
    assert all(task(conn, id) == before[id] for id in others)


def each_state_of_nobody(conn: Connection) -> list[str]:
    register(conn, "v", ["u"])
    return [enqueue(conn, "u"), enqueue(conn, "u", run_at="2030-01-01")]


@pytest.mark.parametrize(("filter", "found"), [
    ({"type": "mail:*"}, "ab"), ({"type": "mail:"}, "ab"), ({"type": "mail:a"}, "a"), ({"type": "m_il:*"}, ""), ({"priority": 5}, "b"),
    ({"priority": "5"}, "b"), ({"concurrency_key": "acme"}, "c"), ({"payload": {"user": {"id": 7}}}, "a"),
    ({"payload": {"list": [2]}}, "b"), ({"payload": {"password": "hunter2"}}, ""), ({"payload": {"password": "[redacted]"}}, "c"),
    ({"all": True}, "abc"), ({"created_before": "infinity", "created_after": "-infinity"}, "abc"),
    ({"type": "mail:*", "priority": 0}, "a"), ({"created_before": "2020-01-01"}, ""), ({"created_after": "2020-01-01"}, "abc"),
    ({"created_after": "2090-01-01"}, ""), ({"all": True, "type": "other"}, "c")])
def test_what_a_filter_matches_in_bulk_is_what_it_lists(conn: Connection, filter: dict[str, Any], found: str) -> None:
    made = {"a": enqueue(conn, "mail:a", {"user": {"id": 7, "name": "x"}}), "b": enqueue(conn, "mail:b", {"list": [1, 2]}, priority=5),
            "c": enqueue(conn, "other", {"password": "hunter2"}, concurrency_key="acme")}
    expected = {made[name] for name in found}
    sample = bulk(conn, "cancel", filter, dry_run=True)["sample"]
    assert [t["id"] for t in sample] == sorted(expected)
    assert {t["id"] for t in value(conn, "select orchestrator.api_tasks(p_filter => %s)", Jsonb(filter))["tasks"]} == expected
    assert bulk(conn, "cancel", filter)["done"] == len(expected)
    assert set(column(conn, "select id::text from orchestrator.tasks where status = 'cancelled'")) == expected


def test_a_time_splits_the_tasks_created_before_from_those_after(conn: Connection) -> None:
    first = enqueue(conn)
    eventually(lambda: value(conn, "select clock_timestamp() > created_at + interval '5 milliseconds' from orchestrator.tasks"))
    moment = value(conn, "select clock_timestamp()::text")
    eventually(lambda: value(conn, "select clock_timestamp() > %s::timestamptz + interval '5 milliseconds'", moment))
    second = enqueue(conn)
    for key, id in (("created_before", first), ("created_after", second)):
        assert [t["id"] for t in bulk(conn, "cancel", {key: moment}, dry_run=True)["sample"]] == [id]


def test_a_part_of_the_error_is_found_whatever_its_case_and_no_secret_in_it_is(conn: Connection) -> None:
    enqueue_some(conn, 2)
    first, second = claim(conn)
    fail(conn, first["claim_id"], first["id"], "No such HOST: postgres://me:hunter2@db", permanent=True)
    fail(conn, second["claim_id"], second["id"], "timeout", permanent=True)
    assert [t["id"] for t in bulk(conn, "retry", {"error": "such host"}, dry_run=True)["sample"]] == [first["id"]]
    assert bulk(conn, "retry", {"error": "me:[redacted]@"}, dry_run=True)["matched"] == 1
    for secret in ("hunter2", "me:h"):
        assert bulk(conn, "retry", {"error": secret}, dry_run=True)["matched"] == 0


def test_ids_and_the_beginning_of_one_stand_for_those_tasks_whatever_their_state(conn: Connection) -> None:
    ids = enqueue_some(conn, 3)
    cancel(conn, ids[0])
    assert bulk(conn, "retry", {"ids": [ids[0], ids[0], ids[1]]}, dry_run=True)["matched"] == 2
    assert (bulk(conn, "retry", {"id": ids[0]})["done"], status(conn, ids[0])) == (1, "pending")
    answer = bulk(conn, "retry", {"ids": ids})
    assert (answer["matched"], answer["done"], answer["skipped"]) == (3, 0, 3)
    assert bulk(conn, "cancel", {"ids": []})["matched"] == 0
    listed = value(conn, "select orchestrator.api_tasks(p_filter => %s)", Jsonb({"ids": ids[:2]}))
    assert [t["id"] for t in listed["tasks"]] == ids[1::-1]


@pytest.mark.parametrize(("action", "filter", "field", "said"), [
    ("cancel", {}, "filter", "is empty"), ("cancel", None, "filter", "is empty"), ("cancel", {"all": False}, "filter", "is empty"),
    ("cancel", {"colour": "blue"}, "filter", "colour is not known"), ("cancel", {"type": ""}, "type", "is empty"),
    ("cancel", {"type": None}, "type", "is empty"), ("cancel", {"error": ""}, "error", "is empty"),
    ("cancel", {"payload": {}}, "payload", "is empty"),
    ("cancel", {"status": "lost"}, "status", "is unknown"), ("cancel", {"status": "failed"}, "status", "is unknown"),
    ("cancel", {"status": "lost"}, "status", "must be one of ready, parked"), ("cancel", {"priority": "high"}, "priority", "type integer"),
    ("cancel", {"created_after": "soon"}, "created_after", "type timestamp"), ("cancel", {"ids": ["x"]}, "ids", "type uuid"),
    ("cancel", {"created_before": 5}, "created_before", "type timestamp"), ("cancel", {"ids": "x"}, "ids", "array"),
    ("cancel", {"id": "xyz"}, "id", "beginning"), ("drop", {"all": True}, "action", "must be"), (None, {"all": True}, "action", "must be"),
    ("prioritize", {"all": True}, "value", "must be a priority")])
def test_a_bad_filter_or_action_is_refused_and_named(conn: Connection, action: str, filter: Any, field: str, said: str) -> None:
    for dry_run in (True, False):
        with pytest.raises(psycopg.Error, match=said) as refused:
            bulk(conn, action, filter, dry_run)
        assert (refused.value.sqlstate, refused.value.diag.column_name) == ("OR001", field)
    assert value(conn, "select count(*) from orchestrator.operations") == 0


@pytest.mark.parametrize("filter", ["mail:*", ["mail:*"], 5])
def test_a_list_is_refused_by_what_is_no_object(conn: Connection, filter: Any) -> None:
    with pytest.raises(psycopg.Error, match="^filter: must be an object") as refused:
        value(conn, "select orchestrator.api_tasks(p_filter => %s)", Jsonb(filter))
    assert refused.value.sqlstate == "OR001"


@pytest.mark.parametrize("filter", [
    {"priority": "high"}, {"ids": ["x"]}, {"ids": "x"}, {"created_after": "soon"}, [], "all", 5])
def test_a_value_of_the_wrong_type_is_refused(conn: Connection, filter: Any) -> None:
    with pytest.raises(psycopg.Error) as refused:
        bulk(conn, "cancel", filter)
    assert refused.value.sqlstate == "OR001" or isinstance(refused.value, psycopg.DataError)


def test_a_value_and_a_limit_are_refused_where_they_mean_nothing(conn: Connection) -> None:
    for options, field in (({"value": Jsonb(1)}, "value"), ({"limit": 0}, "limit"), ({"limit": 10001}, "limit"),
                           ({"operation": 1}, "operation")):
        with pytest.raises(psycopg.Error) as refused:
            bulk(conn, "cancel", {"all": True}, **options)
        assert (refused.value.sqlstate, refused.value.diag.column_name) == ("OR001", field)
    for priority in ("high", None, 1.5, 1_000_001, -1_000_001):
        with pytest.raises(psycopg.Error, match="value: must be a priority"):
            bulk(conn, "prioritize", {"all": True}, value=Jsonb(priority))
    assert bulk(conn, "prioritize", {"all": True}, value=Jsonb(-1_000_000))["done"] == 0


# -------------------------------------------------------------------------------------------------------------- actions
def test_a_dry_run_writes_nothing_and_is_the_default(unaudited: Connection) -> None:
    conn = unaudited
    each_state(conn)
    before = snapshot(conn)
    for action in ACTS:
        options = {"value": Jsonb(3)} if action == "prioritize" else {}
        assert bulk(conn, action, {"all": True}, dry_run=True, **options)["matched"] > 0
        bulk(conn, action, {"all": True}, dry_run=None, **options)   # type: ignore[arg-type]
    assert value(conn, "select matched from orchestrator.bulk_tasks('cancel', '{\"all\": true}')") == 8
    with conn.transaction():
        conn.execute("set transaction read only")
        bulk(conn, "cancel", {"all": True}, dry_run=True)
    assert snapshot(conn) == before


@pytest.mark.parametrize("seed", range(2))
def test_what_a_dry_run_matches_is_what_is_done_or_skipped(unaudited: Connection, seed: int) -> None:
    conn, chance = unaudited, random.Random(seed)
    for type in ("t", "u"):
        register(conn, "w" + type, [type])
        for _ in range(2):
            conn.execute("select orchestrator.release_tasks(id) from orchestrator.claims")
            conn.execute("update orchestrator.tasks set queued_at = null, next_retry_at = '2031-01-01' where queued_at is not null")
            each_state(conn, type)
    for _ in range(12):
        action = chance.choice(list(ACTS))
        filter = {"all": True, **({"type": chance.choice(["t", "u", "*"])} if chance.random() < 0.5 else {}),
                  **({"status": chance.choice(list(MATCH))} if chance.random() < 0.7 else {}),
                  **({"priority": chance.choice([0, 1])} if chance.random() < 0.3 else {})}
        options = {"value": Jsonb(chance.choice([0, 1]))} if action == "prioritize" else {}
        shown = bulk(conn, action, filter, dry_run=True, **options)["matched"]
        matched, done, skipped = to_the_end(conn, action, filter, limit=chance.choice([1, 3, 100]), **options)
        assert (action, filter, shown) == (action, filter, matched) and matched == done + skipped


def test_events_and_the_log_say_who_did_it_and_in_which_operation(conn: Connection) -> None:
    waiting, later = enqueue(conn), enqueue(conn, run_at="2030-01-01")
    flying = enqueue(conn, priority=9)
    claim_one(conn)
    me = value(conn, "select current_user")
    for action, filter, options in (("prioritize", {"ids": [waiting]}, {"value": Jsonb(4)}), ("run_now", {"ids": [later]}, {}),
                                    ("cancel", {"type": "t"}, {}), ("retry", {"ids": [waiting]}, {})):
        operation = bulk(conn, action, filter, **options)["operation"]
        newest = row(conn, "select event, detail from orchestrator.task_events order by id desc limit 1")
        assert newest["detail"] == f"operation {operation} by {me}"
    assert events(conn, waiting) == ["prioritized", "cancelled", "retried"] and events(conn, later) == ["run_now", "cancelled"]
    assert events(conn, flying) == ["cancel_requested"]
    log = "select by, action, filter, value, done, skipped, ended_at >= at as ended from orchestrator.operations order by id"
    assert rows(conn, log) == [
        {"by": me, "action": action, "filter": filter, "value": value, "done": done, "skipped": 0, "ended": True}
        for action, filter, value, done in (
            ("prioritize", {"ids": [waiting]}, 4, 1), ("run_now", {"ids": [later]}, None, 1),
            ("cancel", {"type": "t", "status": "unfinished"}, None, 3), ("retry", {"ids": [waiting]}, None, 1))]
    with conn.transaction():
        bulk(conn, "prioritize", {"ids": [waiting]}, value=Jsonb(1))
        cancel(conn, waiting)   # by itself: no operation
    assert column(conn, "select detail from orchestrator.task_events order by id desc limit 1") == [f"by {me}"]


def test_a_task_is_done_after_those_that_were_created_before_it(conn: Connection) -> None:
    """The order in which cancelling cascades."""
    ids = enqueue_some(conn, 50)
    conn.execute("update orchestrator.tasks set queued_at = clock_timestamp() - random() * interval '1 hour'")
    assert to_the_end(conn, "cancel", {"type": "t"}, limit=7) == (50, 50, 0)
    assert column(conn, "select task_id::text from orchestrator.task_events order by id") == ids


def test_a_prioritized_task_goes_to_the_tail_of_its_new_lane_and_keeps_its_time(conn: Connection) -> None:
    before, moved = enqueue(conn, priority=5), enqueue(conn)
    later = enqueue(conn, run_at="2030-01-01")
    after = task(conn, later)["next_retry_at"]
    assert bulk(conn, "prioritize", {"status": "waiting", "priority": 0}, value=Jsonb(5))["done"] == 2
    assert task(conn, later)["next_retry_at"] == after and task(conn, later)["queued_at"] is None
    assert [t["id"] for t in claim(conn)] == [before, moved]


@pytest.mark.parametrize("moved", ["ready", "parked"])
def test_a_key_goes_on_when_its_task_in_turn_is_moved_behind_parked_ones(conn: Connection, moved: str) -> None:
    conn.execute("select orchestrator.limit_type('t', null, 1)")
    enqueue(conn, concurrency_key="k", priority=9)
    first = claim_one(conn)
    parked, turn = enqueue(conn, concurrency_key="k", priority=5), enqueue(conn, concurrency_key="k", priority=7)
    assert claim(conn) == []
    complete(conn, *first)
    assert claim(conn, limit=0) == [] and task(conn, turn)["queued_at"] and task(conn, parked)["parked_at"]
    if moved == "ready":
        assert bulk(conn, "prioritize", {"ids": [turn]}, value=Jsonb(5))["done"] == 1
    else:
        row(conn, "select orchestrator.bulk_tasks('prioritize', '{\"all\": true}', false, '6')")
    for _ in range(2):
        complete(conn, *claim_one(conn))
    assert {status(conn, parked), status(conn, turn)} == {"completed"}


def test_what_runs_now_wakes_an_idle_worker(conn: Connection, connect: Any) -> None:
    listener = connect()
    listener.execute("listen orchestrator")
    enqueue(conn, run_at="2030-01-01")
    conn.execute("select orchestrator.set_idle('w', true)")
    assert bulk(conn, "run_now", {"type": "t"})["done"] == 1
    assert next(listener.notifies(timeout=10)).channel == "orchestrator"
    assert len(claim(conn)) == 1


def test_purge_deletes_what_has_ended_with_its_events_and_keeps_dead_letters_unless_asked(conn: Connection) -> None:
    ids = enqueue_some(conn, 3)
    cancel(conn, ids[0])
    claimed = claim(conn, limit=1)[0]
    fail(conn, claimed["claim_id"], claimed["id"], permanent=True)
    assert bulk(conn, "purge", {"all": True})["done"] == 1
    assert column(conn, "select id::text from orchestrator.tasks order by id") == ids[1:]
    assert column(conn, "select distinct task_id::text from orchestrator.task_events") == [ids[1]]
    assert bulk(conn, "purge", {"status": "dead_letter"})["done"] == 1
    assert column(conn, "select id::text from orchestrator.tasks") == ids[2:]


# ---------------------------------------------------------------------------------------------------------- many at once
def test_a_call_is_bounded_and_the_next_goes_on_after_it(conn: Connection) -> None:
    ids = enqueue_some(conn, 25)
    first = bulk(conn, "cancel", {"type": "t"}, limit=10)
    assert (first["matched"], first["done"], str(first["next_after"])) == (10, 10, ids[9])
    assert row(conn, "select done, skipped, next_after::text, ended_at from orchestrator.operations") == {
        "done": 10, "skipped": 0, "next_after": ids[9], "ended_at": None}
    extra = enqueue(conn)   # it matches, too, and comes after them
    second = bulk(conn, "cancel", None, limit=100, operation=first["operation"])
    assert (second["operation"], second["done"], second["next_after"]) == (first["operation"], 16, None)
    assert status(conn, extra) == "cancelled"
    assert row(conn, "select done, ended_at is not null as ended from orchestrator.operations") == {"done": 26, "ended": True}
    with pytest.raises(psycopg.Error, match="operation: "):   # it would start again
        bulk(conn, "cancel", None, operation=first["operation"])


def test_a_task_that_comes_back_is_done_once(conn: Connection) -> None:
    def fail_all() -> None:
        for claimed in claim(conn, limit=100):
            fail(conn, claimed["claim_id"], claimed["id"], permanent=True)

    enqueue_some(conn, 30)
    fail_all()
    operation, done = None, 0
    for _ in range(3):
        answer = bulk(conn, "retry", {"type": "t"}, limit=10, operation=operation)
        operation, done = answer["operation"], done + answer["done"]
        fail_all()
    assert done == 30
    assert column(conn, "select distinct count(*) from orchestrator.task_events where event = 'retried' group by task_id") == [1]


@pytest.mark.parametrize("filter", [{"type": "t"}, {"error": "x"}, {"created_after": "2020-01-01"}, {"status": "pending"}])
def test_more_than_are_sorted_are_taken_by_their_ids(conn: Connection, filter: dict[str, Any]) -> None:
    """With a limit of 3, thirty in a state are too many to sort."""
    ids = enqueue_some(conn, 100)
    conn.execute("update orchestrator.tasks set last_error = 'x'")
    enqueue_some(conn, 20, "u")
    claim(conn, limit=5)
    expected = {"unfinished": 120, "pending": 115}["pending" if "status" in filter else "unfinished"]
    expected = 100 if filter.keys() & {"type", "error"} else expected
    assert bulk(conn, "cancel", filter, dry_run=True)["matched"] == expected
    assert to_the_end(conn, "cancel", filter, limit=3) == (expected, expected, 0)
    assert ("cancel_requested" in events(conn, ids[0])) == ("status" not in filter)


def test_a_dry_run_goes_on_where_it_ended(conn: Connection) -> None:
    conn.execute("alter table orchestrator.tasks drop constraint every_rule_holds")   # for speed
    last = enqueue_some(conn, 100_500)[-1]
    conn.execute("select orchestrator.cancel_task(%s)", [last])
    shown = bulk(conn, "cancel", {"type": "t"}, dry_run=True)
    assert shown["matched"] == 100_000 and shown["next_after"] is not None
    rest = bulk(conn, "cancel", {"type": "t"}, dry_run=True, after=shown["next_after"])
    assert (rest["matched"], rest["next_after"]) == (499, None)
    sparse = bulk(conn, "purge", {"type": "t"}, dry_run=True)   # looks at 100,000
    assert sparse["matched"] == 0 and sparse["next_after"] is not None
    assert bulk(conn, "purge", {"type": "t"}, dry_run=True, after=sparse["next_after"])["matched"] == 1


def test_what_others_hold_is_skipped_without_waiting(conn: Connection, connect: Any) -> None:
    ids = enqueue_some(conn, 3)
    other = connect(autocommit=False)
    claim(other, limit=1)
    conn.execute("set lock_timeout = '1s'")
    answer = bulk(conn, "cancel", {"type": "t"})
    assert (answer["matched"], answer["done"], answer["skipped"]) == (3, 2, 1)
    other.commit()
    assert [status(conn, id) for id in ids] == ["claimed", "cancelled", "cancelled"]


def test_a_task_that_no_longer_matches_when_its_lock_is_had_is_skipped(conn: Connection, connect: Any) -> None:
    """Between the look and the lock a worker claims one: it was to be cancelled only while ready."""
    ids = enqueue_some(conn, 2)
    conn.execute("""
        create function pg_temp.claims() returns trigger language plpgsql as $$ begin
          update orchestrator.tasks set queued_at = null, next_retry_at = '2030-01-01'
          where id = (select min(id::text)::uuid from orchestrator.tasks);
          return new; end $$""")
    conn.execute("create trigger between_look_and_lock after insert on orchestrator.operations"
                 " for each row execute function pg_temp.claims()")
    answer = bulk(conn, "cancel", {"status": "ready"})
    assert (answer["matched"], answer["done"], answer["skipped"]) == (2, 1, 1)
    assert [status(conn, id) for id in ids] == ["pending", "cancelled"]


def test_bulk_holds_its_rows_and_nothing_else(conn: Connection, connect: Any) -> None:
    """Whoever reports, claims or enqueues waits for the tasks of one batch at most, and for no lock of a table or a limit."""
    ids = enqueue_some(conn, 20)
    held = claim(conn, limit=5)
    operator = connect(autocommit=False)
    bulk(operator, "cancel", {"status": "ready"}, limit=10)
    conn.execute("set lock_timeout = '1s'")
    assert complete(conn, held[0]["claim_id"], *[h["id"] for h in held]) == {}
    assert len(claim(conn, limit=20)) == 5   # those of the next batch
    enqueue(conn)
    operator.commit()
    assert [status(conn, id) for id in ids].count("cancelled") == 10


def test_bulk_while_workers_drain_leaves_each_task_ended_once(conn: Connection, connect: Any) -> None:
    conn.execute("alter table orchestrator.tasks drop constraint every_rule_holds")   # for speed
    ids = [id for priority in range(3) for id in enqueue_some(conn, 1000, priority=priority)]
    stop, problems = threading.Event(), []

    def drain(number: int) -> None:
        try:
            with psycopg.connect(conn.info.dsn, autocommit=True, host=conn.info.host, password=conn.info.password) as mine:
                register(mine, f"w{number}")
                while not stop.is_set() and (got := claim(mine, f"w{number}", limit=20)):
                    complete(mine, got[0]["claim_id"], *[g["id"] for g in got])
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=drain, args=[n]) for n in range(2)]
    for thread in threads:
        thread.start()
    matched, done, skipped = to_the_end(conn, "cancel", {"status": "waiting", "priority": 0}, limit=100)
    to_the_end(conn, "prioritize", {"priority": 1}, value=Jsonb(9), limit=100)
    for thread in threads:
        thread.join(60)
    stop.set()
    assert problems == [] and matched == done + skipped
    ended = dict(conn.execute("select id::text, status::text from orchestrator.tasks").fetchall())
    assert ended.keys() == set(ids) and set(ended.values()) <= {"completed", "cancelled"}
    assert list(ended.values()).count("cancelled") == value(conn, "select count(*) from orchestrator.task_events where event = 'cancelled'")


def test_a_killed_operation_is_resumed_by_its_number(conn: Connection, installed: str) -> None:
    conn.execute("alter table orchestrator.tasks drop constraint every_rule_holds")   # for speed
    enqueue_some(conn, 20_000)
    environment = clean_environment(DATABASE_URL=installed)
    killed = subprocess.Popen([*START, "cancel", "--type", "t", "--yes"], env=environment, stdout=subprocess.DEVNULL)
    eventually(lambda: value(conn, "select done from orchestrator.operations"))
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    left = value(conn, "select done from orchestrator.operations where ended_at is null")
    assert 0 < left < 20_000
    number = value(conn, "select id from orchestrator.operations")
    resumed = subprocess.run([*START, "cancel", "--operation", str(number), "--yes"], env=environment, check=True,
                             capture_output=True, text=True)
    assert re.fullmatch(rf"\d+ cancelled, 0 skipped \(operation {number}\)\n", resumed.stdout)
    assert row(conn, "select done, ended_at is not null as ended from orchestrator.operations") == {"done": 20_000, "ended": True}
    assert value(conn, "select count(*) from orchestrator.task_events where event = 'cancelled'") == 20_000


# ------------------------------------------------------------------------------------------------------------------- log
def test_what_changes_behaviour_is_logged_once_and_what_changes_nothing_is_not(conn: Connection) -> None:
    for _ in range(2):
        for call in ("pause_type('t')", "limit_type('t', 3)", "schedule('s', '@daily', 't')", "pause_schedule('s')"):
            conn.execute(f"select orchestrator.{call}")
    for _ in range(2):
        for call in ("resume_type('t')", "resume_schedule('s')"):
            conn.execute(f"select orchestrator.{call}")
    id = value(conn, "select orchestrator.fire_schedule('s')::text")
    for _ in range(2):
        conn.execute("select orchestrator.unschedule('s')")
    me = value(conn, "select current_user")
    found = value(conn, "select orchestrator.api_operations()")["operations"]
    assert [(o["action"], o["filter"], o["value"]) for o in reversed(found)] == [
        ("pause", {"type": "t"}, None), ("limit", {"type": "t"}, {"max_running": 3}),
        ("schedule", {"schedule": "s"}, {"cron": "@daily", "timezone": "UTC", "type": "t"}), ("pause_schedule", {"schedule": "s"}, None),
        ("resume", {"type": "t"}, None), ("resume_schedule", {"schedule": "s"}, None),
        ("fire_schedule", {"schedule": "s"}, {"task_id": id}), ("unschedule", {"schedule": "s"}, None)]
    assert {o["by"] for o in found} == {me} and all(o["ended_at"] for o in found)
    assert [o["action"] for o in value(conn, "select orchestrator.api_operations(1)")["operations"]] == ["unschedule"]


def test_the_log_shows_no_secret(conn: Connection) -> None:
    bulk(conn, "cancel", {"payload": {"password": "hunter2"}})
    assert "hunter2" not in str(value(conn, "select orchestrator.api_operations()"))
