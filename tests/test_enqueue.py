"""sql/20_enqueue.sql, and the small functions of sql/00_schema.sql."""
from __future__ import annotations

import uuid
from datetime import UTC, datetime

import psycopg
import pytest
from psycopg.types.json import Jsonb

from postgres import wait_for_lock
from steps import backend, background, claim, column, enqueue, register, row, rows, rung, task, value

CANARY = "canary-3f9c"


def test_enqueue_with_the_type_alone_has_the_defaults(conn):
    id = value(conn, "select orchestrator.enqueue('task:backup')")
    found = task(conn, id)
    assert (found["type"], found["payload"], found["status"]) == ("task:backup", {}, "pending")
    assert (found["priority"], found["attempts"], found["max_retries"], found["idempotency_key"]) == (0, 0, None, None)
    assert found["queued_at"] and found["next_retry_at"] is None


def test_enqueue_keeps_all_that_it_was_given(conn):
    at = datetime(2030, 1, 2, 3, tzinfo=UTC)
    found = task(conn, enqueue(conn, "a:b", {"n": [1, None, "é"]}, priority=-7, idempotency_key="k", max_retries=0, run_at=at))
    assert (found["payload"], found["priority"], found["idempotency_key"], found["max_retries"]) == (
        {"n": [1, None, "é"]}, -7, "k", 0)
    assert (found["status"], found["queued_at"], found["next_retry_at"]) == ("pending", None, at)


def test_enqueue_without_a_payload_means_an_empty_object(conn):
    assert task(conn, value(conn, "select orchestrator.enqueue('t', null)"))["payload"] == {}


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_enqueue_is_part_of_the_callers_transaction(conn, connect, end):
    register(conn)
    caller = connect(autocommit=False)
    id = enqueue(caller)
    assert claim(conn) == []
    getattr(caller, end)()
    assert [t["id"] for t in claim(conn)] == ([id] if end == "commit" else [])


def test_enqueue_to_run_in_the_past_is_ready_at_once(conn):
    assert task(conn, enqueue(conn, run_at=datetime(2020, 1, 1, tzinfo=UTC)))["queued_at"]


BAD = {
    "type": [None, "", "x" * 256, "é" * 128, "a\nb", "a\x01", "task:*"],
    "priority": [None, 1_000_001, -1_000_001],
    "idempotency_key": ["", "k" * 256, "é" * 128],
    "max_retries": [-1, 1001],
    "run_at": ["infinity", "-infinity", datetime(2126, 1, 1, tzinfo=UTC)],
    "payload": [Jsonb({"a": CANARY * 25_000})],
}


@pytest.mark.parametrize(("field", "bad"), [(field, bad) for field, values in BAD.items() for bad in values],
                         ids=lambda v: repr(v)[:20])
@pytest.mark.parametrize("function", ["enqueue", "enqueue_many"])
def test_bad_input_is_refused_naming_the_field_and_never_echoing_the_payload(pure, function, field, bad):
    given = {"type": "t", "payload": Jsonb({"a": CANARY}), field: bad}
    if function == "enqueue_many":
        given["payloads"] = [Jsonb({}), given.pop("payload")]
        if "idempotency_key" in given:
            given["idempotency_keys"] = [None, given.pop("idempotency_key")]
        field = {"payload": "payloads[2]", "idempotency_key": "idempotency_keys[2]"}.get(field, field)
    arguments = ", ".join(f"p_{name} => %({name})s" for name in given)
    with pytest.raises(psycopg.Error) as refused:
        pure.execute(f"select * from orchestrator.{function}({arguments})", given)
    diag = refused.value.diag
    assert refused.value.sqlstate == "OR001"
    assert diag.message_primary.startswith(field) and diag.column_name == field and diag.message_hint
    said = " ".join(str(getattr(diag, name)) for name in dir(diag) if not name.startswith("_"))
    assert CANARY not in said
    assert value(pure, "select count(*) from orchestrator.tasks") == 0


def test_the_largest_of_everything_is_accepted(conn):
    payload = {"a": "x" * (262_144 - len('{"a": ""}'))}
    id = enqueue(conn, "é" * 127 + "x", payload, priority=1_000_000, idempotency_key="k" * 255, max_retries=1000)
    assert value(conn, "select octet_length(payload::text) from orchestrator.tasks where id = %s", id) == 262_144
    with pytest.raises(psycopg.Error) as refused:
        enqueue(conn, "t", {"a": payload["a"] + "x"})
    assert refused.value.sqlstate == "OR001"


@pytest.mark.parametrize("payload", ["jsonb_build_object('a', repeat('x', 300000))", "'[1e100000, 1e100000, 1e100000]'",
                                     "jsonb_build_object('a', repeat(E'\\x01', 60000))"],
                         ids=["compressed in its table", "few bytes, many digits", "escapes"])
def test_a_payload_is_measured_by_its_text(conn, payload):
    conn.execute("create table public.source (payload jsonb)")
    conn.execute(f"insert into public.source values ({payload}::jsonb)")
    with pytest.raises(psycopg.Error) as refused:
        conn.execute("select orchestrator.enqueue('t', payload) from public.source")
    assert refused.value.sqlstate == "OR001"


def test_a_repeated_key_returns_the_first_task_and_changes_nothing(conn):
    first = enqueue(conn, "t", {"n": 1}, idempotency_key="k")
    assert enqueue(conn, "t", {"n": 2}, priority=9, idempotency_key="k") == first
    assert enqueue(conn, "u", idempotency_key="k") != first  # unique within its type
    found = task(conn, first)
    assert (found["payload"], found["priority"]) == ({"n": 1}, 0)


def test_a_key_is_taken_for_as_long_as_the_row_is_kept(conn):
    first = enqueue(conn, idempotency_key="k")
    conn.execute("select orchestrator.cancel_task(%s)", [first])
    assert enqueue(conn, idempotency_key="k") == first
    conn.execute("delete from orchestrator.tasks")
    assert enqueue(conn, idempotency_key="k") != first


MANY = "select id::text, created from orchestrator.enqueue_many('t', %s, p_idempotency_keys => %s) order by ordinal"


def enqueue_keys(conn, *keys: str | None) -> list[tuple[str, bool]]:
    return conn.execute(MANY, [[Jsonb({"n": n}) for n in range(len(keys))], list(keys)]).fetchall()


@pytest.mark.parametrize("end", ["commit", "rollback"])
@pytest.mark.parametrize("many", [False, True])
def test_a_second_caller_with_the_same_key_waits_for_the_first(conn, connect, end, many):
    first, second = connect(autocommit=False), connect()
    id = enqueue(first, idempotency_key="k")
    later = background(lambda: enqueue_keys(second, "k")[0] if many else (enqueue(second, idempotency_key="k"), None))
    wait_for_lock(conn, backend(second))
    getattr(first, end)()
    got, created = later.result(10)
    assert (got == id) == (end == "commit")
    if many:
        assert created == (end == "rollback")
    assert column(conn, "select id::text from orchestrator.tasks") == [got]


@pytest.mark.parametrize("many", [False, True])
def test_a_key_that_an_old_snapshot_cannot_see_is_a_serialization_failure(conn, connect, many):
    """Not a second task, and not a loop for ever."""
    caller = connect(autocommit=False)
    caller.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    caller.execute("set statement_timeout = '5s'")
    caller.execute("select count(*) from orchestrator.tasks")
    enqueue(conn, idempotency_key="k")
    with pytest.raises(psycopg.errors.SerializationFailure):
        enqueue_keys(caller, "k") if many else enqueue(caller, idempotency_key="k")


def test_enqueue_many_with_the_same_keys_in_another_order_does_not_deadlock(conn, connect):
    """Unsorted, the two would hold a and c, wait for b together, and then for each other."""
    holder, one, other = connect(autocommit=False), connect(), connect()
    b = enqueue(holder, idempotency_key="b")
    first = background(lambda: enqueue_keys(one, "a", "b", "c"))
    wait_for_lock(conn, backend(one))
    second = background(lambda: enqueue_keys(other, "c", "b", "a"))
    wait_for_lock(conn, backend(other))
    holder.commit()
    got = first.result(10)
    assert [created for _, created in got] == [True, False, True] and got[1][0] == b
    assert second.result(10) == [(id, False) for id, _ in reversed(got)]


def test_enqueue_many_tells_which_it_created_also_within_one_array(conn):
    known = enqueue(conn, idempotency_key="known")
    got = enqueue_keys(conn, "new", "known", "new", None, None)
    assert [created for _, created in got] == [True, False, False, True, True]
    assert got[1][0] == known and got[0][0] == got[2][0] and got[3][0] != got[4][0]
    assert task(conn, got[0][0])["payload"] == {"n": 0}  # the first of the two
    assert value(conn, "select count(*) from orchestrator.tasks") == 4


def test_enqueue_many_keeps_the_order_and_the_payloads(conn):
    query = "select * from orchestrator.enqueue_many('t', array(select to_jsonb(n) from generate_series(1, 1000) n), 5)"
    got = rows(conn, query)
    assert [r["ordinal"] for r in got] == list(range(1, 1001)) and all(r["created"] for r in got)
    assert [r["id"] for r in got] == sorted(r["id"] for r in got)
    assert column(conn, "select payload from orchestrator.tasks where priority = 5 order by id") == list(range(1, 1001))


@pytest.mark.parametrize("payloads", [None, []])
def test_enqueue_many_of_nothing_adds_nothing(conn, payloads):
    assert rows(conn, "select * from orchestrator.enqueue_many('t', %s::jsonb[])", payloads) == []
    assert value(conn, "select count(*) from orchestrator.tasks") == 0


def test_enqueue_many_wants_a_key_for_each_payload(conn):
    with pytest.raises(psycopg.Error, match="idempotency_keys: must be as many") as refused:
        conn.execute(MANY, [[Jsonb({})], ["a", "b"]])
    assert refused.value.sqlstate == "OR001"


def test_enqueue_many_to_run_later_waits_for_its_time(conn):
    query = "select id from orchestrator.enqueue_many('t', '{\"{}\"}', p_run_at => now() + interval '1 hour', p_idempotency_keys => %s)"
    for keys in (None, ["k"]):
        found = task(conn, value(conn, query, keys))
        assert (found["status"], found["queued_at"]) == ("pending", None) and found["next_retry_at"]


def test_first_tasks_of_new_types_in_opposite_order_neither_wait_nor_deadlock(conn, connect):
    one, other = connect(autocommit=False), connect(autocommit=False)
    for caller in (one, other):
        caller.execute("set lock_timeout = '500ms'")
    enqueue(one, "x", priority=1)
    enqueue(other, "y", priority=2)
    enqueue(one, "y", priority=2)
    enqueue(other, "x", priority=1)
    one.commit()
    other.commit()
    register(conn)
    assert [t["type"] for t in claim(conn, types="xy")] == ["y", "y", "x", "x"]


def test_enqueue_notifies_only_if_an_idle_worker_handles_the_type(conn, connect):
    listener = connect()
    listener.execute("listen orchestrator")
    register(conn, "busy", ["t"])
    register(conn, "other", ["u", "v:"])
    conn.execute("select orchestrator.set_idle('other', true)")
    enqueue(conn, "t")
    enqueue(conn, "v")  # not v:
    assert rung(listener, conn) == []
    enqueue(conn, "u")
    enqueue(conn, "v:1")
    conn.execute("select orchestrator.enqueue_many('v:2', '{\"{}\"}')")
    assert rung(listener, conn) == ["", "", ""]
    enqueue(conn, "u", run_at=datetime(2030, 1, 1, tzinfo=UTC))
    conn.execute("select orchestrator.set_idle('other', false)")
    enqueue(conn, "u")
    assert rung(listener, conn) == []


@pytest.mark.parametrize(("pattern", "matching", "others"), [
    ("a:b", ["a:b"], ["a:bc", "a:", "xa:b"]),
    ("a:", ["a:", "a:b", "a:b:c"], ["a", "b:a:"]),
    ("a:*", ["a:", "a:b"], ["a"]),
    ("a*", ["a", "ab"], ["ba"]),
    ("*", ["", "x"], []),
    ("50%_\\", ["50%_\\"], ["50xy\\", "50%_"]),
])
def test_a_pattern_matches_what_a_handler_of_it_takes(pure, pattern, matching, others):
    query = "select t like orchestrator._like(%s) from unnest(%s::text[]) t"
    assert column(pure, query, pattern, matching + others) == [True] * len(matching) + [False] * len(others)


def test_task_ids_are_version_7_and_rise_with_time(conn):
    ids = [enqueue(conn) for _ in range(50)]
    assert ids == sorted(ids) and {id[14] for id in ids} == {"7"} and {id[19] for id in ids} <= set("89ab")
    found = row(conn, "select orchestrator._uuid_at(created_at - interval '2 ms') as low, id, "
                      "orchestrator._uuid_at(created_at + interval '2 ms') as high from orchestrator.tasks limit 1")
    assert found["low"] < found["id"] < found["high"]


@pytest.mark.parametrize("n", [0, 1, 1000])
def test_many_ids_are_uuids_of_now_in_ascending_order(conn, n):
    before, ids, again, after = row(
        conn, "select orchestrator._uuid_at(clock_timestamp()) as before, orchestrator._uuidv7s(%s) as ids, "
              "orchestrator._uuidv7s(%s) as again, orchestrator._uuid_at(clock_timestamp() + interval '1 ms') as after", n, n).values()
    assert len(ids) == n
    assert len({*ids, *again}) == 2 * n
    assert ids == sorted(ids) and again == sorted(again)
    assert all(before < id < after and id.version == 7 and id.variant == uuid.RFC_4122 for id in ids + again)


@pytest.mark.parametrize(("payload", "problem"), [
    ("(repeat('[', 501) || repeat(']', 501))::jsonb", "nested"), ("(repeat('{\"a\":', 1000) || '1' || repeat('}', 1000))::jsonb", "nested"),
    ("'[1e20000, 1e20000]'::jsonb", "digits"), ("'[1e-10000]'::jsonb", "digits")])
def test_a_payload_that_others_could_not_show_is_refused(conn, payload, problem):
    for call in (f"select orchestrator.enqueue('t', {payload})", f"select * from orchestrator.enqueue_many('t', array['1', {payload}])"):
        with pytest.raises(psycopg.Error, match=f"payload.*{problem}") as refused:
            conn.execute(call)
        assert refused.value.sqlstate == "OR001"


@pytest.mark.parametrize("payload", [
    "(repeat('[', 499) || repeat(']', 499))::jsonb", "to_jsonb(array_fill(1e308::float8, array[800]))",
    "to_jsonb(array_fill(5e-324::float8, array[700]))",
    "to_jsonb(repeat(E'\\x01', 40000))", "to_jsonb(array_fill(true, array[10000]))"])
def test_an_honest_payload_is_accepted_and_its_text_is_within_what_a_claim_reckons_with(conn, payload):
    register(conn)
    conn.execute(f"select orchestrator.enqueue('t', {payload})")
    assert value(conn, "select octet_length(payload::text) <= orchestrator._largest_payload() from orchestrator.tasks")
    assert len(claim(conn)) == 1


def test_enqueuing_needs_nothing_of_lanes_and_floors(conn, connect):
    locker = connect(autocommit=False)
    locker.execute("lock table orchestrator.lanes, orchestrator.lane_floors in access exclusive mode")
    conn.execute("set lock_timeout = '1s'")
    assert enqueue(conn)


def lines(conn, *lines, defaults=None, stop=False):
    query = "select line, created, problem from orchestrator.enqueue_lines(%s, %s, %s) order by line"
    return conn.execute(query, [list(lines), Jsonb(defaults or {}), stop]).fetchall()


def test_lines_are_enqueued_each_with_the_defaults_for_what_it_leaves_out(conn):
    got = lines(conn, '{"payload": [1], "idempotency_key": "k"}', " ", '{"type": "b", "priority": 7, "max_retries": 0, "payload": null}',
                '{"idempotency_key": "k"}', '{"run_at": "2030-01-31T12:00:00+02:00", "payload": {"a": null}}',
                defaults={"type": "a", "priority": 3})
    assert got == [(1, True, None), (3, True, None), (4, False, None), (5, True, None)]
    assert conn.execute("select type, priority, max_retries, payload, idempotency_key, next_retry_at "
                        "from orchestrator.tasks order by id").fetchall() == [
        ("a", 3, None, [1], "k", None), ("b", 7, 0, {}, None, None),
        ("a", 3, None, {"a": None}, None, datetime(2030, 1, 31, 10, tzinfo=UTC))]


@pytest.mark.parametrize(("line", "problem"), [
    ("{nonsense", "is not JSON: "), ("[1]", "must be an object such as"), ('{"payload": {}}', "type: must be 1 to 255"),
    ('{"type": "a", "priority": "high"}', "priority: must be a whole number"), ('{"type": "a", "priority": true}',
    "priority: must be a whole number"),
    ('{"type": "a", "priority": 1.5}', "priority: must be a whole number"), ('{"type": "a", "priority": 99999999999}',
    "priority: must be a whole number"),
    ('{"type": "a", "priority": 9999999}', "priority: must be a whole number from"), ('{"type": "a", "max_retries": -1}',
    "max_retries: must be from"),
    ('{"type": "a", "colour": "blue"}', "colour: there is no such field"), ('{"type": "a", "payload": "\\u0000"}', "is not JSON: "),
    ('{"type": "a", "payload": NaN}', "is not JSON: "), ('{"type": "a", "run_at": "tomorrow"}', "run_at: must be a moment"),
    ('{"type": "a", "run_at": "2030-01-31T12:00:00"}', "run_at: must be a moment"), ('{"type": "a", "run_at": "2030-13-31T12:00:00Z"}',
    "run_at: "),
    ('{"type": "a", "run_at": "2130-01-31T12:00:00Z"}', "run_at: must be a moment within"), ('{"type": "a*"}', "type: must be"),
    ('{"type": 7}', "type: must be a string"),
    ('{"type": "a", "idempotency_key": ""}', "idempotency_key: must be"), ('{"type": "a", "payload": %s}' % ("[" * 100_000),
    "is not JSON: "),
    ('{"type": "a", "payload": "%s"}' % ("x" * 300_000), "payload: is over 256 KiB"),
], ids=lambda v: repr(v)[:30])
def test_a_bad_line_is_named_with_its_problem_and_keeps_nothing_else_back(conn, line, problem):
    [first, bad, last] = lines(conn, '{"type": "a"}', line, '{"type": "a"}')
    assert (first, last) == ((1, True, None), (3, True, None))
    assert bad[:2] == (2, None) and bad[2].startswith(problem) and "xxx" not in bad[2]


def test_lines_may_stop_at_the_first_bad_one(conn):
    got = lines(conn, '{"type": "a"}', '{"type": "b"}', '{"type": "a", "idempotency_key": ""}', '{"type": "a"}', "{nonsense", stop=True)
    assert [line for line, _, _ in got] == [1, 2, 3] and got[2][2].startswith("idempotency_key: ")
    assert column(conn, "select type from orchestrator.tasks order by id") == ["a", "b"]


def test_many_lines_of_few_kinds_go_in_together(conn):
    got = lines(conn, *[f'{{"type": "a", "payload": {n}, "priority": {n % 7}}}' for n in range(1000)])
    assert got == [(n, True, None) for n in range(1, 1001)]
    assert value(conn, "select array_agg(payload::int order by payload::int) from orchestrator.tasks") == list(range(1000))


def test_all_that_enqueue_leads_to_dedupes_into_one_notification_for_each_transaction(conn, connect):
    listener = connect()
    listener.execute("listen orchestrator")
    register(conn, "w", ["*"])
    conn.execute("select orchestrator.set_idle('w', true)")
    conn.execute("select orchestrator.enqueue('type ' || n) from generate_series(1, 50) n")
    assert rung(listener, conn) == [""]
