"""The claim loop: how much it claims, of how many bytes, when it looks, what wakes it, and what a claim's end can be."""
from __future__ import annotations

import os
import select
import time
from typing import Any

import psycopg
import pytest

import orchestrator
from apps import (
    Gate,
    at_rest,
    audit,
    claimed,
    end,
    make_app,
    registered,
    running,
    story,
    wait_for,
    worker_of,
)
from orchestrator import ClaimLoop, Link, Pool, Task
from postgres import eventually
from steps import enqueue, enqueue_some, value

Connection = psycopg.Connection[Any]


# ------------------------------------------------------------------------------------------------------- what is claimed
def test_a_task_of_a_type_without_a_handler_stays_and_show_says_so(installed: str) -> None:
    with running(installed, {"a": lambda task: None}) as app:
        stranger = app.enqueue("b")
        wait_for(app, app.enqueue("a"))
        task = story(app, stranger)
    assert task["status"] == "pending"
    with psycopg.connect(installed) as conn:
        shown = value(conn, "select orchestrator.show_task(%s)", stranger)
    assert "no live worker handles b" in shown["explanation"]


def test_a_pattern_gets_types_that_were_never_seen_before(installed: str) -> None:
    seen = []
    with running(installed, {"mail:": lambda task: seen.append(task.type)}) as app:
        wait_for(app, app.enqueue("mail:first"))
        wait_for(app, app.enqueue("mail:second"))
    assert seen == ["mail:first", "mail:second"]


def test_higher_priority_is_claimed_first(installed: str) -> None:
    app = make_app(installed, worker_pool_size=1)
    order: list[int] = []
    app.handler("a", lambda task: order.append(task.priority))
    for priority in (1, -5, 9, 0):
        app.enqueue("a", priority=priority)
    with running(installed, app):
        eventually(lambda: len(order) == 4)
    assert order == [9, 1, 0, -5]


# -------------------------------------------------------------------------------------------------------------- how much
@pytest.fixture
def ten_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """All ten threads are idle."""
    monkeypatch.setattr(Pool, "idle", lambda self: self.size)


@pytest.mark.parametrize("mean, in_hand, held, room", [
    (None, 0, 0, 0),            # not measured yet: no more than there are idle threads, and here there are none
    (1.0, 0, 0, 1),             # ten threads start ten tasks a second, so one within HOLD_SECONDS
    (1.0, 1, 1, 0),
    (1e-6, 0, 0, 2000),         # at once; 4,000 in all
    (1e-6, 2000, 2000, 2000),
    (1e-6, 2800, 2800, 1200),   # claims again at 70%
    (1e-6, 2801, 2801, 0),
    (1e-6, 0, 5000, 1010),      # finished and not reported counts: 6,000 and the pool at most
    (1e-6, 0, 6010, 0)])
def test_how_many_tasks_a_worker_claims(installed: str, mean: float | None, in_hand: int, held: int, room: int) -> None:
    worker = at_rest(installed)
    worker.pool.mean = mean
    worker.pool.ready.extend([blank(worker)] * in_hand)
    worker.tasks = dict.fromkeys(map(str, range(held)), blank(worker))
    assert worker.claims._room() == room


def blank(worker: orchestrator.Worker, length: int = 2) -> Task:
    handler = worker.router.find("a")
    assert handler is not None
    return Task(worker, (1, "id", "a", "x" * length, 0, None, 0, "", 0.0, 0), handler)


def test_a_worker_that_knows_no_pace_claims_for_its_idle_threads(installed: str, ten_idle: None) -> None:
    worker = at_rest(installed)
    assert worker.claims._room() == 10
    worker.pool.ready.extend([blank(worker)] * 4)
    worker.tasks = dict.fromkeys(map(str, range(4)), blank(worker))
    assert worker.claims._room() == 6


def test_what_arrived_but_was_not_handed_out_counts(installed: str) -> None:
    worker = at_rest(installed)
    worker.pool.mean, worker.claims.arrived = 1e-6, [blank(worker)._row] * 2800
    assert worker.claims._room() == 1200
    worker.tasks = dict.fromkeys(map(str, range(3000)), blank(worker))
    assert worker.claims._room() == 6010 - 3000 - 2800


def test_recovered_tasks_that_wait_for_their_start_count(installed: str) -> None:
    worker = at_rest(installed)
    worker.pool.mean = 1e-6
    worker.reports.careful.extend([blank(worker)] * 2800)
    assert worker.claims._room() == 1200


def test_large_payloads_bound_what_a_worker_holds(installed: str) -> None:
    app = make_app(installed, {})
    app.enqueue_many("a", ["x" * (2 ** 18 - 2)] * 300)
    with registered(installed) as worker:
        worker.pool.mean = 1e-6
        while (room := worker.claims._room()) > 0:
            claimed(worker, room)
        assert 128 < len(worker.tasks) <= 2 ** 8    # of 4,000
        for id in list(worker.tasks)[:80]:
            del worker.tasks[id]
        assert worker.claims._room() > 0


def test_what_is_full_of_bytes_still_claims_for_idle_threads(installed: str, ten_idle: None) -> None:
    worker = at_rest(installed)
    worker.pool.mean, worker.claims.largest = 1e-6, orchestrator.PAYLOAD_LIMIT
    worker.tasks = {"1": blank(worker, orchestrator.PAYLOAD_LIMIT * 4 // 5)}
    assert worker.claims._room() > 0
    worker.pool.ready.extend([blank(worker)] * 10)    # those have something to do
    assert worker.claims._room() == 0


# -------------------------------------------------------------------------------------------------------------- how many bytes
MIXES = {
    "small, then large": [10] * 300 + [200_000] * 40,
    "large, then small": [200_000] * 40 + [10] * 300,
    "in turn": [10, 200_000, 3_000] * 40,
    "growing": [100 * n for n in range(200)],
    "the largest": [262_000] * 40,
}


@pytest.mark.parametrize("mix", MIXES)
def test_whatever_the_mix_of_sizes_a_worker_holds_no_more_bytes_than_its_limit(
        installed: str, conn: Connection, monkeypatch: pytest.MonkeyPatch, mix: str) -> None:
    """Claims as fast as it may, while little of what it holds ends."""
    limit, lengths = 2 ** 22, MIXES[mix]    # 16 of the largest
    monkeypatch.setattr(orchestrator, "PAYLOAD_LIMIT", limit)
    make_app(installed, {}).enqueue_many("a", ["x" * length for length in lengths])
    done, most = 0, 0
    with registered(installed) as worker:
        worker.pool.mean = 1e-6
        for _ in range(10 * len(lengths)):
            room = worker.claims._room()
            if room > 0:
                worker.claims._claim(room)
                worker.claims._hand_out()
            held = sum(task.payload_length for task in worker.tasks.values())
            assert held <= limit
            most = max(most, held)
            for task in list(worker.tasks.values())[:3]:
                end(worker, task)
                done += 1
            worker.reports.poll()
            if done == len(lengths):
                break
        assert done == len(lengths) and most > min(limit, sum(lengths)) / 3    # and holds many all the same
    assert audit(conn) == []


def test_a_full_worker_claims_no_more_until_something_ends(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = at_rest(installed)
    worker.pool.mean = 1e-6
    worker.claims.largest = orchestrator.PAYLOAD_LIMIT
    worker.tasks = {"1": blank(worker, 100)}
    assert worker.claims._bytes_left() == orchestrator.PAYLOAD_LIMIT - 100
    monkeypatch.setattr(orchestrator, "PAYLOAD_LIMIT", 100)
    assert worker.claims._bytes_left() == 0 and worker.claims._room() == 0
    worker.tasks = {}
    assert worker.claims._bytes_left() == 50 and worker.claims.largest == 1


# ------------------------------------------------------------------------------------------------------- what wakes it
@pytest.mark.parametrize("wakes", ["set", "notify", "notify while it claims"])
def test_a_hint_wakes_the_claim_loop_at_once(installed: str, conn: Connection, monkeypatch: pytest.MonkeyPatch, wakes: str) -> None:
    """However it comes: from this process, over the connection while it waits, or along with the answer to a claim."""
    claims = 0
    claim, waiting = ClaimLoop._claim, ClaimLoop.wait

    def claim_and_count(self: ClaimLoop, room: int) -> bool:
        nonlocal claims
        claims += 1
        if wakes == "notify while it claims" and claims == 5:
            assert self.link.connection is not None
            self.link.connection.execute("notify orchestrator, 'a'")   # its own: it arrives together with the answer
        return claim(self, room)

    monkeypatch.setattr(ClaimLoop, "_claim", claim_and_count)
    monkeypatch.setattr(ClaimLoop, "wait", lambda self, seconds: waiting(self, 1000 if claims >= 5 else 0.01))
    with running(installed, {"a": lambda task: None}) as app:
        if wakes != "notify while it claims":
            eventually(lambda: claims == 5)   # from here on it waits for ever
            if wakes == "set":
                worker_of(app).pool.room.set()
            else:
                conn.execute("notify orchestrator, 'a'")
        eventually(lambda: claims == 6)


def test_a_notification_that_was_read_along_with_an_answer_is_heard_before_waiting(installed: str, conn: Connection) -> None:
    with registered(installed) as worker:
        claims = worker.claims
        connection = claims.link.open()
        conn.execute("notify orchestrator, 'a'")
        assert select.select([connection], [], [], 10)[0]
        connection.pgconn.consume_input()   # out of the socket, so that nothing is left for poll() to see
        assert not claims.heard
        claims.wait(1000)
        assert claims.heard


def test_a_byte_that_was_left_in_the_bell_does_not_keep_the_loop_busy(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads that set it at the same moment write two, one of them after the loop has cleared it."""
    polls = 0
    rest = ClaimLoop.rest

    def count(self: ClaimLoop, seconds: float) -> None:
        nonlocal polls
        polls += 1
        rest(self, seconds)
    monkeypatch.setattr(ClaimLoop, "rest", count)
    worker = at_rest(installed)
    os.write(worker.pool.room._write, b"!")
    worker.claims.wait(0.05)
    assert polls <= 3
    worker.pool.room.set()
    worker.claims.wait(60)


def test_polling_carries_on_where_no_notification_arrives(installed: str, conn: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ClaimLoop, "_hear", lambda self, channel: None)
    with running(installed, {"a": lambda task: None}) as app:
        assert wait_for(app, app.enqueue("a"), "completed", timeout=20)["attempts"] == 1


def test_a_flood_of_notifications_stops_neither_claims_nor_heartbeats(installed: str, conn: Connection) -> None:
    """Anyone who may connect can send them: 100,000 in one transaction, of types that a pattern covers."""
    beat = "select last_heartbeat from orchestrator.workers"
    with running(installed, {"m:*": lambda task: None}) as app:
        wait_for(app, app.enqueue("m:before"))
        before = value(conn, beat)
        for channel in ("orchestrator", "orchestrator_cancel"):
            conn.execute("select count(pg_notify(%s, 'm:' || i)) from generate_series(1, 100000) i", [channel])
        assert wait_for(app, app.enqueue("m:after"), timeout=15)["status"] == "completed"
        eventually(lambda: value(conn, beat) > before, 15)
        assert worker_of(app).health() == []


def test_notifications_that_find_nothing_cost_a_bounded_number_of_looks(installed: str, conn: Connection, ten_idle: None) -> None:
    with registered(installed) as worker:
        claims = worker.claims
        claims.idle = True
        for _ in range(30):
            claims.heard = True
            claims.poll()
        began = time.monotonic()
        for _ in range(10):
            claims._hear("orchestrator")
            claims.wait(60)    # not for the notification that is there already
            claims.poll()
        assert time.monotonic() - began > 0.3
        enqueue(conn, "a")
        claims.heard = True
        claims.poll()
        assert claims.fruitless == 0    # what finds work is no flood


def test_many_new_types_in_one_transaction_do_not_stall_a_worker(installed: str, conn: Connection) -> None:
    with running(installed, {"m:*": lambda task: None}) as app:
        wait_for(app, app.enqueue("m:before"))
        conn.execute("select count(orchestrator.enqueue('m:' || i, '{}')) from generate_series(1, 3000) i")
        app.enqueue("m:after", priority=100)
        eventually(lambda: value(conn, "select status from orchestrator.tasks where type = 'm:after'") == "completed", 15)


# ------------------------------------------------------------------------------------------------------- how a claim can end
def test_what_was_claimed_is_handed_out_also_if_the_next_claim_fails(
        installed: str, conn: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    """A claim that filled the room is handed out while the next is under way: it must not depend on how that ends."""
    claim, failed = ClaimLoop._claim, 0

    def claim_or_fail(self: ClaimLoop, room: int) -> bool:
        nonlocal failed
        if self.arrived and not failed:   # there are some to hand out
            failed += 1
            raise psycopg.OperationalError("planted")
        return claim(self, room)
    monkeypatch.setattr(ClaimLoop, "_claim", claim_or_fail)
    monkeypatch.setattr(orchestrator, "CLAIM_MAX", 2)
    monkeypatch.setattr(Pool, "prefetch", lambda self: 4)
    app = make_app(installed, {"a": lambda task: None}, worker_pool_size=2)
    app.enqueue_many("a", range(4))
    with running(installed, app):
        eventually(lambda: value(conn, "select count(*) from orchestrator.tasks where status = 'completed'") == 4)
    assert failed == 1
    assert value(conn, "select count(*) from orchestrator.task_events") == 0   # none was given back, to be claimed again


def test_what_was_claimed_by_a_worker_declared_dead_meanwhile_is_lost(installed: str, conn: Connection) -> None:
    with registered(installed) as worker:
        value(conn, "select orchestrator.enqueue('a')")
        worker.claims._claim(5)
        worker.declared_dead(worker.id)
        worker.claims._hand_out()
        assert [task.cancel_reason for task in worker.tasks.values()] == ["lost"]


def test_a_claim_whose_answer_was_lost_is_given_back(installed: str, conn: Connection) -> None:
    with registered(installed) as worker:
        enqueue_some(conn, 3, "a")
        [known] = claimed(worker, 1)
        worker.claims._claim(1)
        [forgotten], worker.claims.arrived = worker.claims.arrived, []    # its answer never came
        worker.claims._claim(1)                                           # arrived, and not handed out yet
        worker.claims._release_forgotten()
        found = dict(conn.execute("select id::text, status::text from orchestrator.tasks").fetchall())
        assert found == {known.id: "claimed", forgotten[1]: "pending", worker.claims.arrived[0][1]: "claimed"}


@pytest.mark.parametrize("function", ["promote_due(p_limit int default 1000)", "release_forgotten(p_worker_id text, p_known bigint[])"])
def test_a_chore_that_fails_stops_no_claim(installed: str, conn: Connection, function: str) -> None:
    """As when a sequence was set back, and each insert of an event fails."""
    conn.execute(f"alter function orchestrator.{function.split('(')[0]} rename to kept")
    conn.execute(f"create function orchestrator.{function} returns table (promoted int, next_in double precision) language plpgsql "
                 "as $$ begin raise exception 'duplicate key' using errcode = '23505'; end $$")
    with running(installed, {"a": lambda task: None}) as app:
        eventually(lambda: worker_of(app).counters.errors["23"] >= 1)
        assert wait_for(app, app.enqueue("a"))["status"] == "completed"
        assert worker_of(app).health() == []


def test_events_that_can_not_be_written_stop_no_claim(installed: str, conn: Connection) -> None:
    """`alter sequence … restart`, as a restore of the data alone does."""
    def fails(task: Task) -> None:
        raise ValueError("no")
    with running(installed, {"ok": lambda task: None, "fails": orchestrator.Handler(fails, base_delay=0.01, max_retries=50)}) as app:
        app.enqueue("fails")
        eventually(lambda: value(conn, "select count(*) from orchestrator.task_events") >= 4)
        conn.execute("alter sequence orchestrator.task_events_id_seq restart")
        app.enqueue("fails")
        eventually(lambda: worker_of(app).counters.errors["23"] >= 1)
        assert wait_for(app, app.enqueue("ok"))["status"] == "completed"


def test_reporting_makes_room_and_wakes_the_claim_loop(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orchestrator, "PREFETCH_MAX", 1)   # so that what is finished but not reported fills it up again and again
    sat_out = []
    waiting = ClaimLoop.wait

    def wait_and_tell(self: ClaimLoop, seconds: float) -> None:
        waiting(self, seconds)
        pool = self.worker.pool
        if pool.wanted and self._room() > 0 and not select.select([pool.room], [], [], 2)[0]:
            sat_out.append(seconds)   # there is room, and nobody says so
    monkeypatch.setattr(ClaimLoop, "wait", wait_and_tell)
    with running(installed, {"t": lambda task: None}, worker_pool_size=2, claim_interval=60) as app:
        worker = worker_of(app)
        eventually(lambda: worker.claims.idle)   # or nobody would notify it, and it looks after a minute
        app.enqueue_many("t", [{}] * 1000)
        eventually(lambda: sum(worker.counters.completed.values()) == 1000, 30)
    assert sat_out == []


def test_a_full_worker_is_not_idle_and_an_idle_one_says_so(installed: str, conn: Connection) -> None:
    """Producers notify those that are idle only."""
    gate, idle = Gate(), "select idle from orchestrator.workers"
    with running(installed, {"a": gate}, worker_pool_size=1) as app:
        eventually(lambda: value(conn, idle))
        app.enqueue("a")
        gate.wait_started()
        eventually(lambda: not value(conn, idle))
        gate.open.set()
        eventually(lambda: value(conn, idle))


def test_a_connection_that_listened_and_broke_listens_again(installed: str, conn: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    monkeypatch.setattr(ClaimLoop, "_hear", lambda self, channel: heard.append(channel))
    with registered(installed) as worker:
        for _ in range(2):
            worker.claims.link.open()
            for channel in ("orchestrator", "orchestrator_cancel"):
                conn.execute(f"notify {channel}, 'x'")
            worker.claims.link.open()    # once is enough
            eventually(lambda: worker.claims.rest(0.01) or len(heard) == 2)
            heard.clear()
            Link.close(worker.claims.link)


