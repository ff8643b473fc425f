"""sql/35_floors.sql: a floor never hides a ready task, whoever commits late; and it is what keeps a claim cheap."""
from __future__ import annotations

import psycopg
import pytest

from postgres import LocalServer, install_schema, wait_for_lock
from steps import (
    audit,
    backend,
    background,
    claim,
    claim_one,
    claims,
    complete,
    enqueue,
    enqueue_some,
    lead,
    raise_floors,
    register,
    release,
    row,
    rows,
    snooze,
    task,
    value,
)


@pytest.fixture
def conn(conn):
    register(conn)
    yield conn
    assert audit(conn) == []


@pytest.fixture
def term(conn):
    return lead(conn)


def give_floors(conn, *types):
    """A lane that has a floor is looked up from it; the others are found in the ready index itself."""
    conn.execute("insert into orchestrator.lane_floors select t, -1000, 1, '-infinity' from unnest(%s::text[]) t", [list(types)])


def rescan(conn, term, budget="1 minute"):
    return value(conn, "select orchestrator.rescan_lanes('leader', %s, %s)", term, budget)


def floor(conn, type="t"):
    query = "select floor from orchestrator.lane_floors where type = %s order by generation desc, floor limit 1"
    return value(conn, query, type)


def drain(conn, *types):
    for claimed in iter(lambda: claim(conn, types=types or ["t"], limit=1000), []):
        complete(conn, claimed[0]["claim_id"], *[t["id"] for t in claimed])


def test_the_floor_of_an_empty_lane_rises_to_where_nothing_older_can_appear(conn, term):
    last = task(conn, enqueue_some(conn, 3)[-1])
    drain(conn)
    assert raise_floors(conn, term) == 1
    assert last["queued_at"] < floor(conn) <= value(conn, "select clock_timestamp()")
    new = enqueue(conn)
    assert [t["id"] for t in claim(conn)] == [new]


def test_the_floor_of_a_lane_with_tasks_rises_to_the_oldest(conn, term):
    ids = enqueue_some(conn, 3)
    claim_one(conn)
    assert raise_floors(conn, term) == 1
    assert floor(conn) == task(conn, ids[1])["queued_at"]
    assert raise_floors(conn, term) == 0  # nothing to gain
    assert [t["id"] for t in claim(conn)] == ids[1:]


def test_a_lane_that_is_quick_to_look_at_is_left_alone(conn, term):
    enqueue(conn)
    drain(conn)
    conn.execute("insert into orchestrator.lanes values ('t', 0)")
    assert value(conn, "select orchestrator.raise_floors('leader', %s, '1 minute')", term) == 0
    assert floor(conn) is None


@pytest.mark.parametrize("slow_looks", [1, 2])
def test_a_floor_is_raised_only_if_the_second_look_is_slow_too(conn, term, slow_looks):
    """After a rest the first one always is, so that an idle system would write a floor each second."""
    enqueue(conn)
    drain(conn)
    conn.execute("create sequence looks")
    conn.execute("insert into orchestrator.lanes values ('t', 0)")
    conn.execute(f"""create or replace function orchestrator._lane_head(p_type text, p_priority int,
      p_floor timestamptz) returns timestamptz
        language plpgsql as $$ begin if nextval('public.looks') <= {slow_looks} then perform pg_sleep(1); end if; return null; end $$""")
    assert value(conn, "select orchestrator.raise_floors('leader', %s, '900 ms')", term) == slow_looks - 1


def test_an_open_older_writer_holds_the_floor_back(conn, connect, term):
    writer = connect(autocommit=False)
    late = enqueue(writer)
    enqueue(conn)
    drain(conn)
    for _ in range(3):
        raise_floors(conn, term)
    assert (floor(conn) or value(conn, "select '0001-01-01'::timestamptz")) < task(writer, late)["queued_at"]
    writer.commit()
    assert [t["id"] for t in claim(conn)] == [late]
    raise_floors(conn, term)
    assert floor(conn) > task(conn, late)["created_at"]


def test_a_plain_insert_holds_the_floor_back_as_enqueue_does(conn, connect, term):
    enqueue(conn)
    drain(conn)
    writer = connect(autocommit=False)
    writer.execute("insert into orchestrator.tasks (type) values ('t')")
    for _ in range(3):
        raise_floors(conn, term)
    writer.commit()
    assert len(claim(conn)) == 1


@pytest.mark.parametrize("how", ["enqueue", "enqueue_many", "enqueue_many with keys", "retry_task", "promote_due"])
def test_a_transaction_that_began_before_the_floor_rose_queues_above_it(conn, connect, term, how):
    """now() is when a transaction began: with it the task would be queued below the floor, and hidden."""
    id = enqueue(conn)
    if how == "retry_task":
        conn.execute("select orchestrator.cancel_task(%s)", [id])
    elif how == "promote_due":
        snooze(conn, claim_one(conn)[0], id, "0")
    drain(conn)
    writer = connect(autocommit=False)
    writer.execute("select 1")  # its now()
    enqueue(conn)
    drain(conn)
    raise_floors(conn, term)
    writer.execute({"enqueue": "select orchestrator.enqueue('t')",
                    "enqueue_many": "select count(*) from orchestrator.enqueue_many('t', '{1}')",
                    "enqueue_many with keys": "select count(*) from orchestrator.enqueue_many('t', '{1}', 0, '{k}')",
                    "retry_task": f"select orchestrator.retry_task('{id}')",
                    "promote_due": "select orchestrator.promote_due()"}[how])
    writer.commit()
    assert len(claim(conn)) == 1


def test_a_reader_or_a_writer_of_other_tables_does_not_hold_the_floor_back(conn, connect, term):
    conn.execute("create table public.other (n int)")
    reader, writer = connect(autocommit=False), connect(autocommit=False)
    reader.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    reader.execute("select count(*) from orchestrator.tasks")
    writer.execute("insert into public.other values (1)")
    last = task(conn, enqueue(conn))
    drain(conn)
    raise_floors(conn, term)
    assert floor(conn) > last["queued_at"]


def test_a_prepared_transaction_holds_the_floor_back_until_it_ends(conn, connect, term):
    if value(conn, "select current_setting('max_prepared_transactions')::int") == 0:
        pytest.skip("this server allows no prepared transactions")
    enqueue(conn)
    drain(conn)
    writer = connect()
    name = f"late {conn.info.dbname}"
    writer.execute("begin")
    late = enqueue(writer)
    raise_floors(conn, term)  # the candidate now names the writer's session
    writer.execute(f"prepare transaction '{name}'")
    try:
        for _ in range(3):
            raise_floors(conn, term)
        held = floor(conn)
    finally:
        conn.execute(f"commit prepared '{name}'")
    assert held is None or held < task(conn, late)["queued_at"]
    assert [t["id"] for t in claim(conn)] == [late]
    raise_floors(conn, term)
    raise_floors(conn, term)
    assert floor(conn) > task(conn, late)["created_at"]


def test_a_prepared_transaction_that_outlived_a_restart_holds_the_floor_back():
    """It comes back under another number than the one that was noted."""
    own = LocalServer()
    try:
        url = own.create_database()
        install_schema(url)
        with psycopg.connect(url, autocommit=True) as conn, psycopg.connect(url, autocommit=True) as writer:
            term = lead(conn)
            register(conn)
            enqueue(conn)
            drain(conn)
            writer.execute("begin")
            late = enqueue(writer)
            raise_floors(conn, term)
            writer.execute("prepare transaction 'late'")
        own.stop_server()
        own.start()
        with psycopg.connect(url, autocommit=True) as conn:
            for _ in range(3):
                raise_floors(conn, term)
            conn.execute("commit prepared 'late'")
            assert [t["id"] for t in claim(conn)] == [late]
            assert audit(conn) == []
    finally:
        own.stop()


def test_a_released_task_lowers_the_floor_to_its_old_place(conn, term):
    id = enqueue(conn)
    claim_id, _ = claim_one(conn)
    raise_floors(conn, term)
    assert floor(conn) > task(conn, id)["created_at"]
    release(conn, claim_id)
    assert floor(conn) == task(conn, id)["created_at"]
    assert [t["id"] for t in claim(conn)] == [id]


def test_lowerings_by_two_at_once_neither_wait_nor_lose_each_other(conn, connect, term):
    first, second = enqueue(conn), enqueue(conn)
    one, other = claim_one(conn)[0], claim_one(conn)[0]
    raise_floors(conn, term)
    a, b = connect(autocommit=False), connect(autocommit=False)
    b.execute("set lock_timeout = '500ms'")
    release(a, one)
    release(b, other)
    b.commit()
    assert [t["id"] for t in claim(conn)] == [second]
    a.commit()
    assert [t["id"] for t in claim(conn)] == [first]


def test_floors_do_not_rise_while_a_task_is_being_put_back(conn, connect, term):
    enqueue(conn)
    claim_id, id = claim_one(conn)
    raise_floors(conn, term)
    releaser = connect(autocommit=False)
    release(releaser, claim_id)
    enqueue(conn)
    drain(conn)
    assert raise_floors(conn, term) == 0
    releaser.commit()
    assert [t["id"] for t in claim(conn)] == [id]


def test_a_task_put_back_while_floors_rise_waits_and_lowers_the_new_floor(conn, connect, term):
    enqueue(conn)
    claim_id, id = claim_one(conn)
    leader, releaser = connect(autocommit=False), connect()
    assert raise_floors(leader, term) == 1
    back = background(lambda: release(releaser, claim_id))
    wait_for_lock(conn, backend(releaser))
    leader.commit()
    assert back.result(10) == 1
    assert [t["id"] for t in claim(conn)] == [id]


def test_each_raise_leaves_one_floor_for_each_lane(conn, term):
    for _ in range(5):
        enqueue(conn)
        drain(conn)
        raise_floors(conn, term)
    assert value(conn, "select count(*) from orchestrator.lane_floors") == 1
    assert value(conn, "select generation from orchestrator.lane_floors") == 5


def drop_floors(conn, term, slow="1 minute", age="1 minute"):
    """As if the floors had been raised that long ago, and it were time to ask whether they help."""
    conn.execute("delete from orchestrator.lanes")  # so that none rises
    conn.execute("update orchestrator.lane_floors set floor = floor - %s::interval", [age])
    conn.execute("update orchestrator.leader_state set drop_floors_at = null")
    return value(conn, "select orchestrator.raise_floors('leader', %s, %s)", term, slow)


def test_a_floor_that_no_longer_helps_is_dropped_and_one_that_helps_stays(conn, term):
    ids = enqueue_some(conn, 3)
    claim_one(conn)
    raise_floors(conn, term)
    assert drop_floors(conn, term, slow="0") == 0  # no look is that quick
    assert floor(conn) is not None
    conn.execute("update orchestrator.lane_floors set floor = now()")
    assert drop_floors(conn, term, age="0") == 0  # it may rise still
    assert drop_floors(conn, term) == 1
    assert floor(conn) is None
    assert drop_floors(conn, term) == 0
    assert [t["id"] for t in claim(conn)] == ids[1:]
    enqueue(conn)
    drain(conn)
    assert raise_floors(conn, term) == 1


def test_whether_floors_help_is_asked_for_a_200th_of_the_time(conn, term):
    """It walks all that an old snapshot keeps. A time far ahead was written before the clock was set back."""
    enqueue(conn)
    drain(conn)
    raise_floors(conn, term)
    conn.execute("""create or replace function orchestrator._lane_head(p_type text, p_priority int, p_floor timestamptz) returns timestamptz
        language plpgsql as $$ begin perform pg_sleep(0.1); return null; end $$""")
    drop_floors(conn, term, slow="0")  # two looks
    assert 20 <= value(conn, "select extract(epoch from drop_floors_at - clock_timestamp()) from orchestrator.leader_state") + 15 <= 120
    drop = "select orchestrator.raise_floors('leader', %s, '1 minute')"
    conn.execute("update orchestrator.leader_state set drop_floors_at = clock_timestamp() + interval '50 s'")
    assert value(conn, drop, term) == 0 and floor(conn)
    conn.execute("update orchestrator.leader_state set drop_floors_at = clock_timestamp() + interval '1 hour'")
    assert value(conn, drop, term) == 1 and floor(conn) is None


def test_whether_a_floor_helps_is_asked_from_the_very_beginning_and_a_second_time_when_the_old_snapshot_is_gone(conn, connect, term):
    pin = connect(autocommit=False)
    pin.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    pin.execute("select count(*) from orchestrator.tasks")
    enqueue_some(conn, 5000)
    drain(conn)
    raise_floors(conn, term)

    def ask():
        assert drop_floors(conn, term, slow="0") == 0
    assert entries_read(conn, ask) >= 2 * 5000
    pin.rollback()
    assert 5000 <= entries_read(conn, ask) < 2 * 5000  # the first look marks the dead ones, the second passes them by
    assert entries_read(conn, ask) < 5000


def test_floors_are_not_dropped_while_a_task_is_being_put_back(conn, connect, term):
    enqueue(conn)
    claim_id, id = claim_one(conn)
    raise_floors(conn, term)
    releaser = connect(autocommit=False)
    release(releaser, claim_id)
    assert drop_floors(conn, term) == 0
    releaser.commit()
    assert floor(conn) is not None
    assert drop_floors(conn, term) == 1
    raise_floors(conn, term)
    assert [t["id"] for t in claim(conn)] == [id]


def test_a_task_put_back_while_floors_are_dropped_waits_and_is_found(conn, connect, term):
    enqueue(conn)
    claim_id, id = claim_one(conn)
    raise_floors(conn, term)
    leader, releaser = connect(autocommit=False), connect()
    assert drop_floors(leader, term) == 1
    back = background(lambda: release(releaser, claim_id))
    wait_for_lock(conn, backend(releaser))
    leader.commit()
    assert back.result(10) == 1
    assert floor(conn) is None
    assert [t["id"] for t in claim(conn)] == [id]


def test_raising_outside_read_committed_does_nothing(conn, connect, term):
    enqueue(conn)
    strict = connect(autocommit=False)
    strict.isolation_level = psycopg.IsolationLevel.SERIALIZABLE
    assert raise_floors(strict, term) is None
    strict.rollback()
    assert floor(conn) is None


def entries_read(conn, call):
    """How many entries of the ready index a call walks over."""
    query = "select pg_stat_get_xact_tuples_returned('orchestrator.tasks_ready'::regclass)"
    with conn.transaction():
        before = value(conn, query)
        call()
        return value(conn, query) - before


def test_under_an_old_snapshot_a_claim_skips_the_dead_entries_below_the_floor(conn, connect, term):
    pin = connect(autocommit=False)
    pin.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    pin.execute("select count(*) from orchestrator.tasks")
    enqueue_some(conn, 5000)
    drain(conn)
    enqueue_some(conn, 10)
    assert entries_read(conn, lambda: claim(conn, limit=2)) > 5000
    raise_floors(conn, term)
    assert entries_read(conn, lambda: claim(conn, limit=2)) < 50


def lanes(conn):
    return conn.execute("select type, priority from orchestrator.lanes order by 1, 2").fetchall()


def test_a_claim_notes_a_lane_that_much_was_taken_from_once(conn):
    assert lanes(conn) == []
    enqueue_some(conn, 1200)
    enqueue_some(conn, 600, priority=3)
    claim(conn, limit=2000)
    enqueue_some(conn, 600)
    claim(conn, limit=2000)
    assert lanes(conn) == [("t", 0), ("t", 3)]


def test_a_lane_without_a_note_is_claimed_from_and_needs_none(conn, term):
    ids = enqueue_some(conn, 3)
    give_floors(conn, "t")
    conn.execute("delete from orchestrator.lanes")
    assert [t["id"] for t in claim(conn)] == ids


def test_a_note_goes_after_ten_minutes_unless_its_lane_has_a_floor(conn, term):
    conn.execute("""insert into orchestrator.lanes select t, 0, clock_timestamp() - interval '11 minutes' from unnest('{a,b}'::text[]) t
                    union all values ('c', 0, clock_timestamp())""")
    give_floors(conn, "a")
    conn.execute("insert into orchestrator.lane_floors values ('b', 0, 1, clock_timestamp())")
    conn.execute("select orchestrator.raise_floors('leader', %s, '1 minute')", [term])
    assert lanes(conn) == [("b", 0), ("c", 0)]


def test_lanes_with_and_without_floors_of_one_type_are_all_found(conn, term):
    ids = {priority: enqueue(conn, priority=priority) for priority in (5, -3, 0, 2_000, -1_000_000, 1_000_000, 4)}
    conn.execute("""insert into orchestrator.lane_floors values ('t', 3, 1, '-infinity'), ('t', 0, 1, '-infinity'), ('t', 5, 1,
      '-infinity'),
                    ('t', 1000000, 1, '-infinity'), ('t', -1000000, 1, '-infinity'), ('t', -7, 1, 'infinity'), ('s', 0, 1, 'infinity')""")
    for types in (["t"], ["*"]):
        with conn.transaction(force_rollback=True):
            assert [t["id"] for t in claim(conn, types=types)] == [ids[p] for p in sorted(ids, reverse=True)]


def test_rescan_mends_a_floor_that_is_too_high(conn, term):
    types = [f"type {n}" for n in range(20)]
    ids = {type: enqueue(conn, type, priority=n % 3) for n, type in enumerate(types)}
    low = enqueue(conn, "type 3", priority=-5)
    assert rescan(conn, term) == 0
    give_floors(conn, "type 3", "type 7")
    conn.execute("""insert into orchestrator.lane_floors select t, p, 1, clock_timestamp() + interval '1 hour'
                    from (values ('type 3', -5), ('type 7', 1), ('type 9', 0)) l(t, p)""")
    assert len(audit(conn)) == 3
    assert len(claim(conn, types=types, limit=100)) == 18
    assert rescan(conn, term) == 3
    assert {t["id"] for t in claim(conn, types=types, limit=100)} == {low, ids["type 7"], ids["type 9"]}


def test_rescan_goes_on_where_its_budget_ended(conn, term):
    types = [f"type {n}" for n in range(5)]
    for type in types:
        enqueue(conn, type)
        conn.execute("insert into orchestrator.lane_floors values (%s, 0, 1, clock_timestamp() + interval '1 hour')", [type])
    assert claim(conn, types=types) == []
    mended = []
    while len(mended) < 6:
        mended.append(rescan(conn, term, "-1 s"))
    assert mended[:5] == [1] * 5 and rescan(conn, term) == 0
    assert len(claim(conn, types=types)) == 5


def test_a_task_that_was_inserted_by_hand_is_claimed(conn, term):
    give_floors(conn, "t")
    conn.execute("insert into orchestrator.tasks (type) values ('t')")
    assert rescan(conn, term) == 0 and len(claim(conn)) == 1


def test_recovery_puts_an_unstarted_task_back_below_the_floor(conn, term):
    id = enqueue(conn)
    claim_one(conn)
    raise_floors(conn, term)
    conn.execute("update orchestrator.workers set declared_dead_at = now() where id = 'w'")
    assert row(conn, "select released, failed from orchestrator.recover_orphans('leader', %s)", term) == {"released": 1, "failed": 0}
    register(conn, "v")
    assert [t["id"] for t in claim(conn, "v")] == [id]
    assert len(claims(conn)) == 1 and rows(conn, "select from orchestrator.workers where id = 'w'") == []
