"""The pool alone, without a database: tickets, pace and prefetch, timeouts, threads that are lost or outlive their timeout."""
from __future__ import annotations

import contextlib
import ctypes
import dis
import inspect
import select
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import orchestrator
from apps import Gate, obedient
from orchestrator import Bell, Counters, Handler, Outcome, Pool, Router, Slot, Task
from postgres import eventually


class Nobody:
    id = "nobody"


def make_pool(size: int, **handlers: Handler | Callable[[Task], Any]) -> Pool:
    router = Router()
    for name, handler in handlers.items():
        router.add(name, handler)
    return Pool(size, router, Counters(router))


def make_tasks(pool: Pool, kind: str, count: int = 1) -> list[Task]:
    handler = pool.router.find(kind)
    assert handler is not None
    return [Task(Nobody(), (1, f"{kind}{n}", kind, str(n), 0, None, 0, "", 0.0, 0), handler)   # type: ignore[arg-type]
            for n in range(count)]


def put(pool: Pool, kind: str, count: int = 1) -> list[Task]:
    tasks = make_tasks(pool, kind, count)
    pool.put(tasks)
    return tasks


@contextlib.contextmanager
def started(pool: Pool) -> Iterator[Pool]:
    pool.start()
    try:
        yield pool
    finally:
        pool.stop()


@pytest.fixture
def unsupervised(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test itself calls supervise(), when it is time for it."""
    monkeypatch.setattr(Pool, "_supervise_until_stopped", lambda self: self.stopped.wait())


@pytest.fixture
def no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orchestrator, "TIMEOUT_GRACE", 0.05)


def tickets(pool: Pool) -> list[int]:
    return [pool.tickets.get() for _ in range(pool.tickets.qsize())]


# --------------------------------------------------------------------------------------------------------------- tickets
def test_each_task_has_a_ticket_of_its_own_until_the_pace_is_known() -> None:
    pool = make_pool(4, a=lambda task: None)
    put(pool, "a", 3)
    assert tickets(pool) == [1, 1, 1] and len(pool.ready) == 3


@pytest.mark.parametrize(("mean", "count", "expected"), [
    (1e-6, 1000, [50] * 20),          # TICKET_MAX
    (1e-6, 10, [3, 3, 3, 1]),         # shared by the four threads
    (0.001, 10, [2, 2, 2, 2, 2]),     # TICKET_SECONDS
    (1.0, 3, [1, 1, 1])])
def test_tickets_cover_all_tasks_and_last_two_milliseconds(mean: float, count: int, expected: list[int]) -> None:
    pool = make_pool(4, a=lambda task: None)
    pool.mean = mean
    put(pool, "a", count)
    assert tickets(pool) == expected and sum(expected) == count


def test_tasks_run_in_the_order_in_which_they_came(unsupervised: None) -> None:
    seen: list[int] = []
    pool = make_pool(1, a=lambda task: seen.append(task.payload))
    pool.mean = 1e-6
    with started(pool):
        tasks = put(pool, "a", 100)
        eventually(lambda: len(pool.finished) == 100)
    assert seen == list(range(100)) and list(pool.finished) == tasks
    assert all(task.outcome is None and task.started > 0 for task in tasks)


def test_a_slow_task_keeps_its_ticket_and_not_its_neighbours(unsupervised: None) -> None:
    """The slow one is first in a ticket of several: the other thread and the rescue run all that came behind it."""
    gate, done = Gate(), []
    pool = make_pool(2, slow=gate, quick=lambda task: done.append(task.payload))
    pool.mean = 1e-6
    with started(pool):
        slow, quick = make_tasks(pool, "slow"), make_tasks(pool, "quick", 99)
        pool.put(slow + quick)    # two tickets of 50: one is the slow task's
        gate.wait_started()
        eventually(lambda: len(done) == 50)
        eventually(lambda: pool.idle() == 1)
        assert len(pool.ready) == 49 and pool.tickets.empty()
        pool.supervise()
        eventually(lambda: len(done) == 99)
        assert not pool.ready and list(pool.finished) == quick
        gate.open.set()
        eventually(lambda: len(pool.finished) == 100)


def test_idle_threads_get_what_waits_behind_a_slow_task_by_itself() -> None:
    gate, done = Gate(), []
    pool = make_pool(2, slow=gate, quick=lambda task: done.append(task.payload))
    pool.mean = 1e-6
    with started(pool):
        pool.put(make_tasks(pool, "slow") + make_tasks(pool, "quick", 300))
        gate.wait_started()
        eventually(lambda: len(done) == 300)
        gate.open.set()


@pytest.mark.parametrize(("waiting", "rescued"), [(0, []), (1, [1]), (3, [1, 1]), (9, [4, 4]), (1000, [50, 50])])
def test_a_rescue_shares_what_waits_among_the_idle_once_no_ticket_is_left(
        monkeypatch: pytest.MonkeyPatch, waiting: int, rescued: list[int]) -> None:
    monkeypatch.setattr(Pool, "_keep_size", lambda self: None)
    pool = make_pool(3, a=lambda task: None)
    pool.slots = [Slot(), Slot(), Slot()]    # without threads
    [pool.slots[0].task] = make_tasks(pool, "a")
    pool.ready.extend(make_tasks(pool, "a", waiting))
    pool.tickets.put(7)
    pool.supervise()
    assert tickets(pool) == [7]
    pool.supervise()
    assert tickets(pool) == rescued


def test_a_ticket_without_a_task_does_no_harm(unsupervised: None) -> None:
    """Such as that of a task which was given back, or which another ticket took."""
    pool = make_pool(2, a=lambda task: None)
    with started(pool):
        for _ in range(20):
            pool.tickets.put(5)
        put(pool, "a", 3)
        eventually(lambda: len(pool.finished) == 3 and pool.idle() == 2 and pool.tickets.empty())


def test_put_first_goes_before_all_that_waits(unsupervised: None) -> None:
    gate = Gate()
    pool = make_pool(1, slow=gate, a=lambda task: None)
    with started(pool):
        put(pool, "slow")
        gate.wait_started()
        behind = put(pool, "a", 3)
        first = make_tasks(pool, "a")
        pool.put_first(first[0])
        gate.open.set()
        eventually(lambda: len(pool.finished) == 5)
        assert list(pool.finished)[1:] == first + behind


def test_what_was_taken_back_does_not_run(unsupervised: None) -> None:
    gate = Gate()
    pool = make_pool(1, slow=gate, a=lambda task: None)
    with started(pool):
        put(pool, "slow")
        gate.wait_started()
        behind = put(pool, "a", 3)
        assert pool.take_all() == behind and not pool.ready
        gate.open.set()
        eventually(lambda: pool.idle() == 1 and pool.tickets.empty())
        assert len(pool.finished) == 1


def test_a_task_that_was_cancelled_before_it_started_does_not_run(unsupervised: None) -> None:
    pool = make_pool(1, a=lambda task: 1 / 0)
    [task] = make_tasks(pool, "a")
    task.cancel("cancelled")
    with started(pool):
        pool.put([task])
        eventually(lambda: pool.finished)
    assert task.outcome == Outcome("released")


def test_what_waits_does_not_start_once_the_pool_was_stopped(unsupervised: None) -> None:
    gate, started_late = Gate(), []
    pool = make_pool(1, slow=gate, a=started_late.append)
    pool.mean = 1e-6
    pool.start()
    pool.put([*make_tasks(pool, "slow"), *make_tasks(pool, "a", 40)])   # one ticket for all of them
    gate.wait_started()
    pool.stop()
    gate.open.set()
    pool.slots[0].join(10)
    assert not pool.slots[0].is_alive() and started_late == []


def test_a_stopped_pool_is_not_filled_up_again(unsupervised: None) -> None:
    pool = make_pool(2, a=lambda task: None)
    pool.start()
    pool.stop()
    eventually(lambda: not any(slot.is_alive() for slot in pool.slots))
    pool.supervise()    # it may just have been at work
    assert not any(slot.is_alive() for slot in pool.slots) and pool.counters.replaced_threads == 0
    assert pool.problems() == []


def test_whoever_waits_for_room_is_told_when_a_ticket_is_used_up(unsupervised: None) -> None:
    pool = make_pool(1, a=lambda task: None)
    with started(pool):
        put(pool, "a")
        eventually(lambda: pool.finished and pool.idle() == 1)
        assert not pool.room.is_set() and pool.news.is_set()
        pool.wanted = True
        put(pool, "a")
        eventually(pool.room.is_set)


# -------------------------------------------------------------------------------------------------------- pace and prefetch
@pytest.mark.parametrize(("mean", "held"), [
    (None, 0),        # not measured yet: no more than run at once
    (1.0, 1),         # ten threads start ten tasks a second, so one within HOLD_SECONDS
    (0.001, 1000),
    (1e-6, 4000)])    # PREFETCH_MAX
def test_a_pool_holds_what_it_starts_within_a_tenth_of_a_second(mean: float | None, held: int) -> None:
    pool = make_pool(10)
    pool.mean = mean
    assert pool.prefetch() == held


def test_the_pace_follows_the_last_tasks() -> None:
    pool = make_pool(1, a=lambda task: None)

    def measure(seconds: float, count: int) -> float | None:
        batch = make_tasks(pool, "a", count)
        for task in batch:
            task.seconds = seconds
        pool.measure(batch)
        return pool.mean
    assert measure(0, 0) is None
    assert measure(2.0, 1) == 2.0
    assert measure(1.0, 5) == pytest.approx(1.9)     # a tenth
    assert measure(0.9, 1000) == pytest.approx(1.4)  # half at most
    assert sum(pool.counters.snapshot().seconds["a"].counts) == 1006


def test_slow_tasks_show_in_the_pace_before_they_end(unsupervised: None) -> None:
    gate = Gate()
    pool = make_pool(2, slow=gate)
    pool.mean = 1e-6
    with started(pool):
        [first, _] = put(pool, "slow", 2)
        gate.wait_started()
        gate.wait_started()
        first.started -= 60
        pool.supervise()
        assert pool.mean > 30
        gate.open.set()


def test_a_pool_is_overloaded_when_others_could_start_its_tasks_sooner() -> None:
    pool = make_pool(10, a=lambda task: None)
    pool.ready.extend(make_tasks(pool, "a", 11))
    assert not pool.overloaded()
    pool.mean = 0.9
    assert not pool.overloaded()
    pool.mean = 1.0
    assert pool.overloaded()


# -------------------------------------------------------------------------------------------------------------- timeouts
def test_at_its_timeout_a_handler_is_asked_to_stop_without_a_database() -> None:
    pool = make_pool(1, a=Handler(obedient, timeout=0.05))
    with started(pool):
        [task] = put(pool, "a")
        eventually(lambda: pool.finished)
    assert task.cancel_reason == "timeout" and task.outcome == Outcome("failed", "timed out after 0.05 s")
    assert task.deadline == pytest.approx(task.started + 0.05)


def test_a_handler_that_ignores_its_timeout_is_abandoned_and_its_slot_replaced(no_grace: None) -> None:
    gate = Gate()
    pool = make_pool(2, stuck=Handler(gate, timeout=0.05), ok=lambda task: None)
    with started(pool):
        stuck = put(pool, "stuck", 2)
        eventually(lambda: len(pool.finished) == 2)
        for twin in list(pool.finished):
            [task] = [task for task in stuck if task.id == twin.id]
            assert task is not twin and task.ended == "abandoned" and twin.ended == ""
            assert twin.outcome == Outcome("failed", "timed out after 0.05 s, and did not stop when asked")
            assert (twin.claim_id, twin.started) == (task.claim_id, task.started) and twin.seconds >= 0.1
        eventually(lambda: len(pool.slots) == 4 and pool.idle() == 2)
        assert pool.problems() == []
        [ok] = put(pool, "ok")
        eventually(lambda: pool.finished[-1] is ok)
        gate.open.set()    # their threads end, and nobody counts them as lost
        eventually(lambda: len(pool.slots) == 2 and len(pool.finished) == 5)
        assert pool.counters.replaced_threads == 0


def test_more_stuck_handlers_than_slots_shrink_the_pool_until_they_return(
        no_grace: None, caplog: pytest.LogCaptureFixture) -> None:
    orchestrator.log.propagate = True
    gate = Gate()
    pool = make_pool(1, stuck=Handler(gate, timeout=0.05), ok=lambda task: None)
    with started(pool):
        put(pool, "stuck", 2)
        eventually(lambda: len(pool.finished) == 2)
        [waiting] = put(pool, "ok")
        eventually(lambda: pool.problems() == ["no thread of the pool can run a task"])
        assert len(pool.slots) == 2 and pool.idle() == 0
        for _ in range(10):
            eventually(lambda: pool.stuck == 2)
            pool.supervise()
        assert caplog.text.count("the pool shrinks") == 1   # said once, not in each round
        gate.open.set()
        eventually(lambda: waiting in pool.finished and len(pool.slots) == 1)
        assert pool.problems() == []


def test_an_abandoned_threads_ticket_goes_to_others(no_grace: None) -> None:
    gate, done = Gate(), []
    pool = make_pool(1, stuck=Handler(gate, timeout=0.05), ok=done.append)
    pool.mean = 1e-6
    with started(pool):
        pool.put(make_tasks(pool, "stuck") + make_tasks(pool, "ok", 40))   # one ticket for all
        eventually(lambda: len(done) == 40)   # its stand-in's
        gate.open.set()


# ---------------------------------------------------------------------------------------------------- threads that are lost
class Stopped(BaseException):
    """What one thread makes another raise."""


def raise_in(thread: threading.Thread) -> None:
    assert ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(Stopped)) == 1


def test_a_lost_thread_is_replaced_and_counted(unsupervised: None, caplog: pytest.LogCaptureFixture) -> None:
    """An asynchronous exception that a handler left behind: it comes when no handler runs."""
    orchestrator.log.propagate = True
    pool = make_pool(2, a=lambda task: None)
    with started(pool):
        lost = pool.slots[0]
        raise_in(lost)
        # it is raised when that thread gets something to do
        eventually(lambda: pool.tickets.put(1) or not lost.is_alive())
        pool.supervise()
        assert pool.counters.snapshot().replaced_threads == 1
        assert len(pool.slots) == 2 and lost not in pool.slots
        put(pool, "a", 20)
        eventually(lambda: len(pool.finished) == 20)
    assert "a pool thread was ended from outside" in caplog.text


def test_an_exception_that_arrives_just_after_the_handler_returned_loses_no_outcome(
        unsupervised: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the pool's own code, before the outcome is handed over."""
    run_task = orchestrator.run_task

    def and_raise(router: Router, task: Task) -> None:
        run_task(router, task)
        raise Stopped
    pool = make_pool(1, a=lambda task: {"n": 7})
    with started(pool):
        with monkeypatch.context() as patch:
            patch.setattr(orchestrator, "run_task", and_raise)
            [task] = put(pool, "a")
            eventually(lambda: not pool.slots[0].is_alive())
        pool.supervise()
        assert list(pool.finished) == [task] and task.outcome == Outcome("completed", '{"n":7}')
        assert pool.running() == []
        put(pool, "a")
        eventually(lambda: len(pool.finished) == 2)


def lines_of_a_task() -> list[tuple[int, Outcome]]:
    """The lines of Pool._run from the task's place in the slot until its ticket is used up, and how it has ended there."""
    lines, first = inspect.getsourcelines(Pool._run)
    texts = [line.split("#")[0].strip() for line in lines]
    start, runs, last = map(texts.index, ("slot.task = task", "run_task(router, task)", "slot.ticket = 0"))
    return [(first + n, orchestrator.INTERRUPTED if n <= runs else Outcome("completed", "7"))
            for n in range(start + 1, last) if texts[n] not in ("", "break")]


@pytest.mark.parametrize(("line", "outcome"), lines_of_a_task())
def test_an_exception_at_any_line_loses_neither_a_task_nor_its_outcome(unsupervised: None, line: int, outcome: Outcome) -> None:
    def trace_calls(frame: Any, event: str, arg: Any) -> Any:
        return trace_lines if frame.f_code is Pool._run.__code__ else None

    def trace_lines(frame: Any, event: str, arg: Any) -> Any:
        if event == "line" and frame.f_lineno == line:
            raise Stopped
        return trace_lines
    pool = make_pool(1, a=lambda task: 7)
    threading.settrace(trace_calls)
    try:
        pool.start()
    finally:
        threading.settrace(None)   # type: ignore[arg-type]
    try:
        [task] = put(pool, "a")
        eventually(lambda: not pool.slots[0].is_alive())
        pool.supervise()
        assert set(pool.finished) == {task} and task.outcome == outcome
        assert not pool.ready
    finally:
        pool.stop()


def test_no_exception_comes_between_taking_a_task_and_its_place_in_the_slot() -> None:
    """CPython looks for them at calls and jumps only: there are none between the two."""
    names = [step.opname for step in dis.get_instructions(Pool._run)]
    [start] = [n for n, step in enumerate(dis.get_instructions(Pool._run)) if step.opname == "FOR_ITER"]
    [placed] = [n for n, step in enumerate(dis.get_instructions(Pool._run)) if step.opname == "STORE_ATTR" and step.argval == "task"
                and n < names.index("PRECALL" if "PRECALL" in names else "CALL", start)]
    assert not any(word in name for name in names[start:placed] for word in ("CALL", "JUMP", "RESUME")), names[start:placed]


def test_an_exception_while_the_handler_runs_is_a_failed_attempt(unsupervised: None) -> None:
    running, stop = threading.Event(), threading.Event()

    def spin(task: Task) -> None:
        running.set()
        while not stop.wait(0.01):
            pass
    pool = make_pool(1, a=spin)
    with started(pool):
        [task] = put(pool, "a")
        assert running.wait(10)
        raise_in(pool.slots[0])
        eventually(lambda: pool.finished)
        stop.set()
        assert list(pool.finished) == [task]
        assert task.outcome is not None and task.outcome.kind == "failed" and "Stopped" in (task.outcome.text or "")
        assert pool.slots[0].is_alive()


def test_a_thread_lost_while_an_outcome_is_made_reports_that_it_was_ended(
        unsupervised: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_outcome(task: Task, error: BaseException) -> Outcome:
        raise Stopped
    monkeypatch.setattr(orchestrator, "_outcome_of", no_outcome)
    pool = make_pool(1, a=lambda task: 1 / 0)
    with started(pool):
        [task] = put(pool, "a")
        eventually(lambda: not pool.slots[0].is_alive())
        pool.supervise()
        assert list(pool.finished) == [task] and task.outcome is orchestrator.INTERRUPTED


def test_a_pool_that_runs_nothing_is_unhealthy(unsupervised: None) -> None:
    pool = make_pool(1, a=lambda task: None)
    assert pool.problems() == []    # not started
    with started(pool):
        assert pool.problems() == []
        raise_in(pool.slots[0])
        pool.tickets.put(1)
        eventually(lambda: pool.problems() == ["no thread of the pool can run a task"])
        pool.supervise()
        assert pool.problems() == []


def test_a_pool_without_its_supervisor_is_unhealthy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pool, "_supervise_until_stopped", lambda self: None)
    with started(make_pool(1)) as pool:
        eventually(lambda: pool.problems() == ["the pool's supervisor has ended"])


def test_the_supervisor_goes_on_after_an_error_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as no memory for one more thread."""
    failed = threading.Event()
    supervise = Pool.supervise

    def fail_once(self: Pool) -> None:
        if not failed.is_set():
            failed.set()
            raise RuntimeError("can't start new thread")
        supervise(self)
    monkeypatch.setattr(Pool, "supervise", fail_once)
    pool = make_pool(1, a=Handler(obedient, timeout=0.05))
    with started(pool):
        assert failed.wait(10)
        put(pool, "a")
        eventually(lambda: pool.finished)


# ------------------------------------------------------------------------------------------------------------------- bell
def test_a_bell_rings_until_it_is_cleared_and_again_after() -> None:
    bell = Bell()

    def rings() -> bool:
        return bool(select.select([bell], [], [], 0)[0])
    for _ in range(2):
        assert not rings() and not bell.is_set()
        bell.set()
        bell.set()
        assert rings() and bell.is_set()
        bell.clear()
        bell.clear()   # must not block
    assert not rings()
