"""sql/22_schedules.sql: schedules that fire once for each of their times. Time is an argument here, or rows are set back."""
from __future__ import annotations

import itertools
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from threading import Barrier

import psycopg
import pytest
from psycopg.types.json import Jsonb

from postgres import eventually
from steps import (
    audit,
    backend,
    background,
    cancel,
    claim,
    claim_one,
    column,
    complete,
    declare_dead,
    fail,
    register,
    row,
    rows,
    rung,
    snooze,
    start,
    value,
)

NOON = datetime(2026, 11, 26, 12, tzinfo=UTC)
MINUTE = timedelta(minutes=1)


@pytest.fixture(scope="module")
def database(server, template):
    url = server.create_database(template=template.rsplit("/", 1)[1])
    yield url
    server.drop_database(url)


@pytest.fixture
def installed(database):
    """One database for all tests here, emptied after each: there are many, and they are small."""
    yield database
    with psycopg.connect(database) as connection:
        connection.execute("drop function if exists public.fault() cascade")
        for table in ("schedules", "tasks", "task_events", "claims", "workers", "task_types", "lanes"):
            connection.execute(f"truncate orchestrator.{table}")


@pytest.fixture
def conn(conn):
    conn.execute("set lock_timeout = '5s'")   # a poll that waits for another is an error
    yield conn
    assert audit(conn) == []


def schedule(conn, name="s", cron="* * * * *", type="t", **named):
    """Define a schedule and return its next fire time; `named` are schedule()'s parameters without p_."""
    named = {"name": name, "cron": cron, "type": type, **named}
    arguments = ", ".join(f"p_{key} => %({key})s" for key in named)
    return conn.execute(f"select orchestrator.schedule({arguments})", named).fetchone()[0]


def set_back(conn, next_at=NOON, name="s"):
    """As if the schedule had been defined just before next_at, and nobody had polled since."""
    conn.execute("update orchestrator.schedules set next_at = %s, active_since = %s where name = %s",
                 [next_at, next_at - timedelta(seconds=1), name])


def due(conn, next_at=NOON, name="s", cron="* * * * *", **named):
    schedule(conn, name, cron, **named)
    set_back(conn, next_at, name)


def poll(conn, now):
    """What promote_due does about schedules when the clock says `now`: returns how many tasks it enqueued."""
    return value(conn, "select fired from orchestrator._fire_schedules(%s)", now)


def fired_at(conn, name="s"):
    """The fire times that have a task, by its key, in the order of the tasks."""
    keys = column(conn, "select idempotency_key from orchestrator.tasks where idempotency_key is not null order by id")
    return [datetime.fromisoformat(key[-20:]) for key in keys if key[:-20] == f"schedule:{name}:"]


def fired(conn, name="s"):
    return [moment.strftime("%H:%M:%S") for moment in fired_at(conn, name)]


def of(conn, what, name="s"):
    return value(conn, f"select {what} from orchestrator.schedules where name = %s", name)


def history(conn, name="s", since=NOON - timedelta(hours=1)):
    return [(at.strftime("%H:%M"), status) for at, status in conn.execute(
        "select fire_at, status from orchestrator.schedule_history(%s, %s)", [name, since])]


def refused(caught, field):
    return caught.value.sqlstate == "OR001" and caught.value.diag.column_name == field and caught.value.diag.message_hint


# ------------------------------------------------------------------------------------------------------------ definition

def test_schedule_returns_the_next_fire_time_and_a_fire_time_becomes_a_task(conn):
    next_at = schedule(conn, "nightly", "30 3 * * *", "task:backup", payload=Jsonb({"to": "s3"}), timezone="Europe/Berlin", priority=5,
                       max_retries=7)
    assert next_at == value(conn, "select orchestrator.fire_times('30 3 * * *', 'Europe/Berlin', now(), 1)")
    set_back(conn, datetime(2026, 7, 1, 1, 30, tzinfo=UTC), "nightly")
    assert poll(conn, datetime(2026, 7, 1, 1, 30, tzinfo=UTC)) == 1
    task = row(conn, "select id, type, payload, priority, max_retries, status, idempotency_key from orchestrator.tasks")
    assert task == {"id": of(conn, "last_task_id", "nightly"), "type": "task:backup", "payload": {"to": "s3"}, "priority": 5,
                    "max_retries": 7, "status": "pending", "idempotency_key": "schedule:nightly:2026-07-01T01:30:00Z"}
    assert of(conn, "last_fire_at", "nightly") == datetime(2026, 7, 1, 1, 30, tzinfo=UTC)
    assert of(conn, "next_at", "nightly") == datetime(2026, 7, 2, 1, 30, tzinfo=UTC)


@pytest.mark.parametrize(("field", "named"), [
    ("name", {"name": ""}), ("name", {"name": "x" * 201}), ("name", {"name": "a\nb"}), ("name", {"name": None}),
    ("cron", {"cron": "* * * *"}), ("cron", {"cron": None}), ("cron", {"cron": "0 0 30 2 *"}), ("cron", {"cron": "@every 1 month"}),
    ("type", {"type": ""}), ("type", {"type": "a:*"}), ("type", {"type": None}), ("priority", {"priority": 2_000_000}),
    ("max_retries", {"max_retries": -1}), ("missed", {"missed": "some"}), ("missed", {"missed": None}),
    ("timezone", {"timezone": "Mars/Base"}), ("timezone", {"timezone": "Berlin1"}), ("timezone", {"timezone": None}),
    ("payload", {"payload": Jsonb("x" * 300_000)}),
])
def test_schedule_refuses_what_could_never_fire(pure, field, named):
    with pytest.raises(psycopg.Error) as caught:
        schedule(pure, **{"name": "s", **named})
    assert refused(caught, field)
    assert value(pure, "select count(*) from orchestrator.schedules") == 0


def test_a_date_that_never_comes_is_refused_by_name(conn):
    with pytest.raises(psycopg.Error, match="cron: '0 0 31 2 .' never comes"):
        schedule(conn, cron="0 0 31 2 *")


def test_the_longest_name_still_fires(conn):
    due(conn, name="x" * 200)
    assert poll(conn, NOON) == 1


def test_a_schedule_is_defined_in_the_caller_s_transaction(conn, connect):
    other = connect(autocommit=False)
    schedule(other)
    other.rollback()
    assert of(conn, "true") is None


def test_the_same_definition_again_changes_nothing_and_what_was_missed_still_fires(conn):
    due(conn, missed="all", timezone="Europe/Berlin", payload=Jsonb({"a": 1, "b": None}), overlap=False, max_retries=2)
    conn.execute("select orchestrator._fire_schedules(%s)", [NOON - MINUTE])
    before = row(conn, "select xmin::text, s.* from orchestrator.schedules s")
    again = schedule(conn, missed="all", timezone="Europe/Berlin", payload=Jsonb({"b": None, "a": 1}), overlap=False, max_retries=2)
    assert again == NOON and row(conn, "select xmin::text, s.* from orchestrator.schedules s") == before
    poll(conn, NOON + MINUTE)
    assert fired(conn)[0] == "12:00:00"


@pytest.mark.parametrize("change", [
    {"payload": Jsonb({"new": 1})}, {"priority": 3}, {"type": "other"}, {"missed": "all"}, {"overlap": False}, {"max_retries": 0}])
def test_another_definition_with_the_same_times_keeps_what_was_missed(conn, change):
    due(conn)
    before = of(conn, "updated_at")
    assert schedule(conn, **change) == NOON
    [(name, new)] = change.items()
    assert of(conn, name) == getattr(new, "obj", new) and of(conn, "updated_at") > before
    assert of(conn, "active_since") < NOON


@pytest.mark.parametrize("change", [{"cron": "*/5 * * * *"}, {"timezone": "Asia/Kathmandu"}])
def test_another_cron_or_time_zone_counts_from_now_on(conn, change):
    due(conn, NOON - timedelta(days=400))
    now = datetime.now(UTC)
    assert schedule(conn, **change) > now and of(conn, "active_since") >= now - timedelta(seconds=1)
    assert poll(conn, now) == 0 and fired(conn) == []


def test_one_definition_at_once_by_many_makes_one_schedule(conn, connect):
    """A deployment of many programs: 100 definitions over 8 connections."""
    connections = [connect() for _ in range(8)]
    barrier = Barrier(8, timeout=20)

    def define(number):
        barrier.wait()
        return [schedule(connections[number], cron="0 0 1 1 *") for _ in range(100 // 8 + 1)]

    with ThreadPoolExecutor(8) as pool:
        answers = list(itertools.chain(*pool.map(define, range(8))))
    assert set(answers) == {of(conn, "next_at")} and len(answers) >= 100
    before = row(conn, "select xmin::text, s.* from orchestrator.schedules s")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(define, range(8)))
    assert rows(conn, "select xmin::text, s.* from orchestrator.schedules s") == [before]


def test_unschedule_removes_the_schedule_and_leaves_its_tasks(conn):
    due(conn)
    poll(conn, NOON)
    assert value(conn, "select orchestrator.unschedule('s')") is True and value(conn, "select orchestrator.unschedule('s')") is False
    assert len(fired(conn)) == 1 and poll(conn, NOON + MINUTE) == 0


# ---------------------------------------------------------------------------------------------------- when nobody ran

def test_of_the_missed_times_the_last_fires_by_default(conn):
    due(conn, cron="*/10 * * * *")
    assert poll(conn, NOON + 35 * MINUTE) == 1
    assert fired(conn) == ["12:30:00"] and of(conn, "next_at") == NOON + 40 * MINUTE
    assert history(conn) == [("12:00", "no task"), ("12:10", "no task"), ("12:20", "no task"), ("12:30", "pending")]


def test_the_last_missed_time_is_found_years_back(conn):
    due(conn, NOON.replace(year=2020), cron="* * * 1 *")
    assert poll(conn, NOON) == 1
    assert value(conn, "select idempotency_key from orchestrator.tasks") == "schedule:s:2026-01-31T23:59:00Z"
    assert of(conn, "next_at") == datetime(2027, 1, 1, tzinfo=UTC)


def test_all_missed_times_fire_the_oldest_first(conn):
    due(conn, cron="*/10 * * * *", missed="all")
    assert poll(conn, NOON + 35 * MINUTE) == 4
    assert fired(conn) == ["12:00:00", "12:10:00", "12:20:00", "12:30:00"] and of(conn, "next_at") == NOON + 40 * MINUTE


def test_more_than_a_hundred_missed_times_take_several_calls(conn):
    due(conn, missed="all")
    assert [poll(conn, NOON + 240 * MINUTE) for _ in range(4)] == [100, 100, 41, 0]
    times = fired(conn)
    assert len(set(times)) == 241 and times == sorted(times)


@pytest.mark.parametrize(("late", "expected"), [(timedelta(0), ["12:30:00"]), (timedelta(seconds=59), ["12:30:00"]), (MINUTE, [])])
def test_with_none_only_what_is_less_than_a_minute_late_fires(conn, late, expected):
    due(conn, cron="*/10 * * * *", missed="none")
    poll(conn, NOON + 30 * MINUTE + late)
    assert fired(conn) == expected and of(conn, "next_at") == NOON + 40 * MINUTE
    assert of(conn, "last_fire_at") == (NOON + 30 * MINUTE if expected else None)


@pytest.mark.parametrize("missed", ["one", "all", "none"])
def test_any_split_of_time_into_calls_fires_the_same(conn, missed):
    """all: each time once, however many calls; one: the last, which one call at the end fires too."""
    chance = random.Random(7)
    for number, cron in enumerate(["*/17 * * * *", "@every 25 minutes", "13,50 */3 * * *", "30 2 * * *", "0 4 * * mon,fri"] * 2):
        times = column(conn, "select orchestrator.fire_times(%s, 'America/St_Johns', %s, 1000, %s)", cron, NOON, NOON + timedelta(days=2))
        end = NOON + timedelta(seconds=chance.randrange(2 * 86400))
        for name, calls in (("once", 0), ("often", chance.randint(1, 9))):
            due(conn, times[0], f"{name}{number}", cron, missed=missed, timezone="America/St_Johns")
            for now in [*sorted(NOON + (end - NOON) * chance.random() for _ in range(calls)), *[end] * 6]:
                poll(conn, now)
        expected = [moment for moment in times if moment <= end]
        once, often = fired_at(conn, f"once{number}"), fired_at(conn, f"often{number}")
        if missed == "all":
            assert once == often == expected
        elif missed == "one":
            assert once == expected[-1:] == often[-1:] and set(often) <= set(expected) and len(set(often)) == len(often)
        else:
            assert set(once) <= set(often) <= set(expected)
        assert of(conn, "next_at", f"once{number}") == of(conn, "next_at", f"often{number}") > end


def test_a_clock_that_is_set_back_fires_nothing_twice(conn):
    due(conn)
    assert [poll(conn, NOON), poll(conn, NOON - timedelta(hours=1)), poll(conn, NOON)] == [1, 0, 0]
    assert poll(conn, NOON + MINUTE) == 1 and fired(conn) == ["12:00:00", "12:01:00"]


def test_a_time_whose_next_at_was_set_back_by_hand_has_its_task_already(conn):
    due(conn)
    poll(conn, NOON)
    first = of(conn, "last_task_id")
    set_back(conn)
    poll(conn, NOON)
    assert len(fired(conn)) == 1 and of(conn, "last_task_id") == first


# --------------------------------------------------------------------------------------------------------- many at once

def test_four_pollers_at_once_fire_each_time_once(conn, connect):
    """The row lock alone must do: what is said to be fired is as much as there is, so no key kept a second task away."""
    for number in range(6):
        due(conn, NOON, f"s{number}", "@every 1 second", missed="all")
    connections = [connect() for _ in range(4)]
    barrier = Barrier(4, timeout=20)

    def run(number):
        total = 0
        for second in range(25):
            if second % 5 == 0:
                barrier.wait()
            total += poll(connections[number], NOON + timedelta(seconds=second))
        return total

    with ThreadPoolExecutor(4) as pool:
        total = sum(pool.map(run, range(4)))
    total += poll(conn, NOON + timedelta(seconds=24))   # what somebody else held in the last round
    keys = column(conn, "select idempotency_key from orchestrator.tasks")
    assert total == len(keys) == len(set(keys)) == 6 * 25
    assert Counter(key.split(":")[1] for key in keys) == {f"s{number}": 25 for number in range(6)}


def test_a_schedule_that_another_worker_fires_is_passed_over_without_waiting(conn, connect):
    due(conn)
    due(conn, name="free")
    other = connect(autocommit=False)
    other.execute("select from orchestrator.schedules where name = 's' for update")
    assert poll(conn, NOON) == 1 and fired(conn) == [] and fired(conn, "free") == ["12:00:00"]
    other.commit()
    assert poll(conn, NOON) == 1


@pytest.mark.parametrize("end", ["commit", "rollback", "killed"])
def test_a_worker_that_dies_while_it_fires_leaves_it_to_the_next(conn, connect, end):
    due(conn)
    other = connect(autocommit=False)
    assert poll(other, NOON) == 1 and poll(conn, NOON) == 0
    if end == "killed":
        pid = backend(other)
        conn.execute("select pg_terminate_backend(%s)", [pid])
        eventually(lambda: value(conn, "select count(*) from pg_stat_activity where pid = %s", pid) == 0)
    else:
        getattr(other, end)()
    assert poll(conn, NOON) == (0 if end == "commit" else 1)
    assert fired(conn) == ["12:00:00"]


def test_a_poller_that_saw_a_time_before_another_fired_it_looks_again_under_the_lock(conn, connect):
    """It waits for a key that a schedule's first task needs, with an old picture of the second schedule."""
    due(conn, NOON, "a")
    due(conn, NOON + timedelta(seconds=1), "b", "@every 1 hour")
    other, blocker = connect(), connect(autocommit=False)
    blocker.execute("select orchestrator.enqueue('t', p_idempotency_key => 'schedule:a:2026-11-26T12:00:00Z')")
    pending = background(lambda: poll(other, NOON + timedelta(seconds=30)))
    eventually(lambda: value(conn, "select wait_event_type = 'Lock' from pg_stat_activity where pid = %s", backend(other)))
    poll(conn, NOON + timedelta(seconds=30))
    blocker.rollback()
    pending.result(10)
    assert fired(conn, "b") == ["12:00:01"] and fired(conn, "a") == ["12:00:00"]


def test_a_deployment_in_a_long_transaction_delays_only_what_it_changes(conn, connect):
    due(conn, name="same")
    due(conn, name="changed")
    other = connect(autocommit=False)
    schedule(other, "same")
    schedule(other, "changed", priority=3)
    assert poll(conn, NOON) == 1 and fired(conn, "same") == ["12:00:00"]
    other.commit()
    assert poll(conn, NOON) == 1 and value(conn, "select max(priority) from orchestrator.tasks") == 3


# ------------------------------------------------------------------------------------------------ pause, resume, by hand

def test_a_paused_schedule_does_not_fire_and_goes_on_from_the_time_it_is_resumed(conn):
    due(conn, missed="all")
    poll(conn, NOON)
    assert [value(conn, "select orchestrator.pause_schedule('s')") for _ in range(2)] == [True, False]
    assert poll(conn, NOON + 9 * MINUTE) == 0 and schedule(conn, missed="all") is None
    assert [value(conn, "select orchestrator.resume_schedule('s')") for _ in range(2)] == [True, False]
    assert value(conn, "select next_at > now() and active_since > now() - interval '1 minute' from orchestrator.schedules")
    assert poll(conn, datetime.now(UTC)) == 0 and fired(conn) == ["12:00:00"]   # and the task that waits is not touched
    assert value(conn, "select status from orchestrator.tasks") == "pending"


def test_a_new_definition_leaves_a_paused_schedule_paused(conn):
    schedule(conn)
    conn.execute("select orchestrator.pause_schedule('s')")
    assert schedule(conn, cron="@hourly") is None and of(conn, "paused") and of(conn, "cron") == "@hourly"


@pytest.mark.parametrize("function", ["pause_schedule", "resume_schedule", "fire_schedule"])
def test_there_is_nothing_to_do_with_a_schedule_that_does_not_exist(conn, function):
    assert value(conn, f"select orchestrator.{function}('none')") is None


def test_fire_schedule_enqueues_at_once_each_time_and_keeps_the_fire_times(conn):
    due(conn, payload=Jsonb({"a": 1}), priority=2, max_retries=1)
    conn.execute("select orchestrator.pause_schedule('s')")
    ids = [value(conn, "select orchestrator.fire_schedule('s')") for _ in range(2)]
    assert rows(conn, "select type, payload, priority, max_retries, idempotency_key from orchestrator.tasks") == [
        {"type": "t", "payload": {"a": 1}, "priority": 2, "max_retries": 1, "idempotency_key": None}] * 2
    assert len(set(ids)) == 2 and of(conn, "last_task_id") == ids[1] and of(conn, "next_at") == NOON
    assert value(conn, "select last_fire_at > now() - interval '1 minute' from orchestrator.schedules")


# --------------------------------------------------------------------------------------------------------- no overlap

@pytest.mark.parametrize("state", ["pending", "claimed", "running", "retry_scheduled", "snoozed", "by hand"])
def test_without_overlap_a_time_is_left_out_while_the_last_task_is_unfinished(conn, state):
    register(conn)
    due(conn, cron="*/10 * * * *", overlap=False)
    if state == "by hand":
        conn.execute("select orchestrator.fire_schedule('s')")
    else:
        poll(conn, NOON)
    if state not in ("pending", "by hand"):
        claim_id, id = claim_one(conn)
        if state == "running":
            start(conn, claim_id, id)
        elif state == "retry_scheduled":
            fail(conn, claim_id, id)
        elif state == "snoozed":
            snooze(conn, claim_id, id)
    assert poll(conn, NOON + 10 * MINUTE) == 0
    assert of(conn, "next_at") == NOON + 20 * MINUTE and history(conn)[-1] == ("12:10", "no task")


@pytest.mark.parametrize("end", ["completed", "dead_letter", "cancelled", "deleted"])
def test_without_overlap_the_next_time_fires_once_the_last_task_has_ended(conn, end):
    register(conn)
    due(conn, cron="*/10 * * * *", overlap=False)
    poll(conn, NOON)
    if end == "cancelled":
        cancel(conn, of(conn, "last_task_id"))
    elif end == "deleted":
        conn.execute("delete from orchestrator.tasks")
    else:
        claim_id, id = claim_one(conn)
        complete(conn, claim_id, id) if end == "completed" else fail(conn, claim_id, id, permanent=True)
    assert poll(conn, NOON + 10 * MINUTE) == 1


def test_without_overlap_of_all_missed_times_the_first_fires(conn):
    due(conn, cron="*/10 * * * *", overlap=False, missed="all")
    assert poll(conn, NOON + 35 * MINUTE) == 1 and fired(conn) == ["12:00:00"]
    assert [status for _, status in history(conn)] == ["pending", "no task", "no task", "no task"]


def test_with_overlap_several_tasks_wait_at_once(conn):
    due(conn)
    assert [poll(conn, NOON + n * MINUTE) for n in range(3)] == [1, 1, 1] and len(fired(conn)) == 3


# ------------------------------------------------------------------------------------------------------ a broken schedule

BROKEN = {
    "its zone was removed": ("timezone = 'Mars/Base'", "Mars/Base"),
    "its cron is no longer one": ("cron = 'x'", "five fields"),
    "its payload is too large": ("payload = to_jsonb(repeat('x', 300000))", "256 KiB"),
    "its time never comes again": ("cron = '0 0 31 2 *'", "next_at"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_schedule_is_paused_alone_with_its_error(conn, how):
    change, part = BROKEN[how]
    for name, at in (("before", NOON - MINUTE), ("broken", NOON), ("s", NOON)):
        due(conn, at, name)
    conn.execute(f"update orchestrator.schedules set {change} where name = 'broken'")
    assert poll(conn, NOON) == 2 and fired(conn, "broken") == []
    assert fired(conn, "before") == ["12:00:00"] and fired(conn) == ["12:00:00"]
    assert of(conn, "paused", "broken") and part in of(conn, "last_error", "broken") and of(conn, "next_at", "broken") == NOON
    assert poll(conn, NOON + MINUTE) == 2


def broken(conn):
    due(conn)
    conn.execute("update orchestrator.schedules set timezone = 'Mars/Base'")
    poll(conn, NOON)


def test_a_broken_schedule_that_is_defined_anew_goes_on_from_now(conn):
    broken(conn)
    assert schedule(conn) > datetime.now(UTC)
    assert not of(conn, "paused") and of(conn, "last_error") is None


def test_a_broken_schedule_can_be_resumed_once_it_is_mended_and_not_before(conn):
    broken(conn)
    with pytest.raises(psycopg.Error, match="Mars/Base"):
        conn.execute("select orchestrator.resume_schedule('s')")
    conn.execute("update orchestrator.schedules set timezone = 'UTC'")
    assert value(conn, "select orchestrator.resume_schedule('s')") is True and of(conn, "last_error") is None


@pytest.mark.parametrize("sqlstate", ["40P01", "53100", "55P03", "57P01", "58030"])
def test_what_is_not_a_schedule_s_own_fault_doesn_t_pause_it(conn, sqlstate):
    """A deadlock, a full disk, a lock timeout, a shutdown, an I/O error: the worker calls again."""
    due(conn)
    conn.execute(f"""
        create function public.fault() returns trigger language plpgsql as $$ begin raise 'fault' using errcode = '{sqlstate}'; end $$;
        create trigger fault before insert on orchestrator.tasks for each row execute function public.fault()""")
    with pytest.raises(psycopg.Error) as caught:
        poll(conn, NOON)
    assert caught.value.sqlstate == sqlstate and not of(conn, "paused") and of(conn, "next_at") == NOON
    conn.execute("drop trigger fault on orchestrator.tasks")
    assert poll(conn, NOON) == 1


# --------------------------------------------------------------------------------------------- promote_due and the queue

def promote(conn):
    return row(conn, "select * from orchestrator.promote_due()")


def test_promote_due_fires_and_says_when_to_come_back(conn):
    assert promote(conn) == {"promoted": 0, "next_in": None, "fired": 0, "expired": {}}
    due(conn, cron="0 0 1 1 *")
    answer = promote(conn)
    expected = of(conn, "extract(epoch from next_at - now())::float")
    assert answer["promoted"] == 0 and answer["fired"] == 1 and answer["next_in"] == pytest.approx(expected, abs=5)
    conn.execute("select orchestrator.enqueue('t', p_run_at => now() + interval '30 seconds')")
    assert promote(conn)["next_in"] == pytest.approx(30, abs=5)   # a delayed task is earlier than the schedule
    conn.execute("select orchestrator.pause_schedule('s')")
    conn.execute("delete from orchestrator.tasks where next_retry_at is not null")
    assert promote(conn) == {"promoted": 0, "next_in": None, "fired": 0, "expired": {}}


def test_what_was_fired_waits_for_the_flush_as_any_enqueue_does(conn):
    due(conn)
    conn.execute("set synchronous_commit = 'local'")
    for expected in (1, 0):
        with conn.transaction():
            assert promote(conn)["fired"] == expected
            assert value(conn, "show synchronous_commit") == ("local" if expected else "off")


def test_promote_due_comes_back_at_once_while_more_is_due(conn):
    conn.execute("""
        insert into orchestrator.schedules (name, cron, timezone, type, payload, priority, missed, overlap, next_at)
        select n::text, '@every 3650 days', 'UTC', 't', '{}', 0, 'one', true, '2019-12-20' from generate_series(1, 150) n""")
    answers = [promote(conn) for _ in range(3)]
    assert [answer["fired"] for answer in answers] == [100, 50, 0]
    assert answers[0]["next_in"] < 0 < answers[1]["next_in"]


def test_a_schedule_held_by_another_transaction_doesn_t_make_workers_spin(conn, connect):
    due(conn)
    other = connect(autocommit=False)
    other.execute("select from orchestrator.schedules for update")
    assert promote(conn) == {"promoted": 0, "next_in": None, "fired": 0, "expired": {}}
    schedule(conn, "free", "0 0 1 1 *")
    assert promote(conn)["next_in"] > 0


def test_firing_wakes_an_idle_worker_and_the_task_is_claimed(conn, connect):
    register(conn)
    conn.execute("update orchestrator.workers set idle = true")
    listener = connect()
    listener.execute("listen orchestrator")
    due(conn)
    assert promote(conn)["fired"] == 1 and len(rung(listener, conn)) == 1
    assert len(claim(conn)) == 1


def test_a_schedule_of_a_paused_type_fires_and_its_task_waits(conn):
    register(conn)
    conn.execute("select orchestrator.pause_type('t')")
    due(conn)
    assert poll(conn, NOON) == 1 and claim(conn) == []
    conn.execute("select orchestrator.resume_type('t')")
    assert len(claim(conn)) == 1


def test_a_time_whose_task_retention_deleted_doesn_t_fire_again(conn):
    due(conn)
    poll(conn, NOON)
    conn.execute("delete from orchestrator.tasks")
    assert poll(conn, NOON) == 0 and fired(conn) == [] and history(conn) == [("12:00", "no task")]


READS = """select seq_scan, coalesce(idx_scan, 0) as idx_scan, seq_tup_read + coalesce(idx_tup_fetch, 0) as rows
           from pg_stat_xact_user_tables where relid = 'orchestrator.schedules'::regclass"""


def test_without_schedules_promote_due_looks_into_an_empty_index_once(conn):
    with conn.transaction():
        conn.execute("select * from orchestrator.promote_due()")
        assert row(conn, READS) == {"seq_scan": 0, "idx_scan": 1, "rows": 0}


def test_promote_due_reads_only_what_is_due_of_many_schedules(conn):
    conn.execute("select * from orchestrator.promote_due()")   # the plan is that of an empty table
    conn.execute("""
        insert into orchestrator.schedules (name, cron, timezone, type, payload, priority, missed, overlap, next_at)
        select n::text, '@every 3650 days', 'UTC', 't', '{}', 0, 'one', true, '2039-12-15' from generate_series(1, 5000) n""")
    due(conn)
    with conn.transaction():
        before = row(conn, READS)
        assert promote(conn)["fired"] == 1
        after = row(conn, READS)
    assert after["seq_scan"] == before["seq_scan"] and after["rows"] - before["rows"] < 10


# ------------------------------------------------------------------------------------------------- history and states

def test_history_has_the_tasks_of_earlier_definitions_and_misses_nothing_before_this_one(conn):
    due(conn, cron="*/10 * * * *")
    poll(conn, NOON)
    schedule(conn, cron="*/15 * * * *")
    set_back(conn, NOON + 30 * MINUTE)
    conn.execute("update orchestrator.schedules set active_since = %s", [NOON + 14 * MINUTE])
    poll(conn, NOON + 45 * MINUTE)
    register(conn)
    for claimed in claim(conn, limit=1):
        complete(conn, claimed["claim_id"], claimed["id"])
    assert history(conn) == [("12:00", "completed"), ("12:15", "no task"), ("12:30", "no task"), ("12:45", "pending")]
    assert history(conn, since=NOON + 30 * MINUTE) == [("12:45", "pending")] and history(conn, "none") == []


def test_history_tells_schedules_apart_whose_names_begin_alike(conn):
    for name in ("s", "s:x", "s-2", "S"):
        due(conn, name=name)
    poll(conn, NOON)
    assert history(conn) == history(conn, "s:x") == history(conn, "S") == [("12:00", "pending")]


def test_history_doesn_t_call_missing_what_is_still_to_be_fired(conn):
    due(conn, cron="*/10 * * * *", missed="all")
    assert history(conn) == []


def state(conn, name="s"):
    return value(conn, "select state from orchestrator.schedule_states where name = %s", name)


def test_the_view_says_of_each_schedule_whether_it_will_fire_and_run_or_what_to_do(conn):
    schedule(conn)
    assert state(conn) == "no live worker handles t: start one with a handler for it"
    register(conn)
    assert state(conn) == "active"
    conn.execute("select orchestrator.pause_type('t')")
    assert state(conn) == "active, but t is paused: select orchestrator.resume_type('t')"
    conn.execute("select orchestrator.resume_type('t')")
    set_back(conn, NOON - timedelta(days=400))
    assert state(conn).startswith("late since 2025-10-22")
    declare_dead(conn, "w")
    assert state(conn).startswith("no live worker")
    conn.execute("select orchestrator.pause_schedule('s')")
    assert state(conn) == "paused: select orchestrator.resume_schedule('s')"
    assert value(conn, "select next_at from orchestrator.schedule_states") is None
    conn.execute("delete from orchestrator.schedules")
    broken(conn)
    assert "Mars/Base" in state(conn) and state(conn).endswith("select orchestrator.resume_schedule('s')")
