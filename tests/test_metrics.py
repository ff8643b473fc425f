"""What /metrics says: each metric's name and meaning, alone and among several workers, and what it costs."""
from __future__ import annotations

import re
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from prometheus_client.parser import text_string_to_metric_families

import orchestrator
from conftest import WorkerProcess
from orchestrator import BUCKETS, Counters, Discard, Handler, Orchestrator, Router, Tally
from postgres import eventually
from steps import Connection, count_now, enqueue, value

GLOBAL = {"tasks_pending", "tasks_parked", "tasks_blocked", "tasks_scheduled", "tasks_in_flight", "tasks_dead_letters",
          "tasks_oldest_pending_seconds",
          "tasks_enqueued_total", "workers_total", "workers_dead", "recovery_age_seconds", "queue_stats_age_seconds",
          "schedule_late_seconds", "schedules_failed"}

# name → (kind, labels), as dashboards and alerts rely on them
CONTRACT = {
    "tasks_enqueued_total": ("counter", {"type"}), "tasks_completed_total": ("counter", {"type", "status"}),
    "task_retries_total": ("counter", {"type", "attempt"}), "tasks_dead_letter_total": ("counter", {"type"}),
    "tasks_pending": ("gauge", {"type"}), "tasks_running": ("gauge", {"type"}), "worker_pool_active": ("gauge", set()),
    "worker_pool_capacity": ("gauge", set()), "workers_total": ("gauge", set()), "leader_status": ("gauge", {"worker_id"}),
    "task_duration_seconds_bucket": ("histogram", {"type", "le"}), "task_claim_duration_seconds_bucket": ("histogram", {"le"}),
    "task_wait_seconds_bucket": ("histogram", {"type", "le"}), "task_outcomes_rejected_total": ("counter", {"type"}),
    "pool_threads_replaced_total": ("counter", set()),
    "tasks_recovered_total": ("counter", {"outcome"}), "database_errors_total": ("counter", {"class"}),
    "tasks_scheduled": ("gauge", {"type"}), "tasks_in_flight": ("gauge", {"type"}), "tasks_dead_letters": ("gauge", {"type"}),
    "tasks_oldest_pending_seconds": ("gauge", {"type"}), "tasks_overdue": ("gauge", {"type"}),
    "tasks_longest_running_seconds": ("gauge", {"type"}), "worker_prefetch_size": ("gauge", set()),
    "worker_loop_lag_seconds": ("gauge", set()), "worker_database_silence_seconds": ("gauge", set()),
    "workers_dead": ("gauge", set()), "recovery_age_seconds": ("gauge", set()),
    "schedule_late_seconds": ("gauge", set()), "schedules_failed": ("gauge", set()), "schedules_fired_total": ("counter", set()),
    "tasks_parked": ("gauge", {"type"}), "tasks_blocked": ("gauge", {"type"}), "tasks_expired_total": ("counter", {"type"}),
    "queue_stats_age_seconds": ("gauge", set()), "orchestrator_build_info": ("gauge", {"version", "schema", "python"})}

Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def text_of(address: str) -> str:
    with urllib.request.urlopen(f"{address}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


def scrape(address: str) -> Series:
    return {(sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text_of(address)) for sample in family.samples}


def total(series: Series, name: str) -> float:
    return sum(number for (found, _), number in series.items() if found == name)


def get(series: Series, name: str, **labels: str) -> float | None:
    return series.get((name, tuple(sorted(labels.items()))))


def address_of(app: Orchestrator) -> str:
    assert app._http is not None
    return f"http://127.0.0.1:{app._http.server_address[1]}"


def tells_counts_of_now(app: Orchestrator) -> None:
    """Have the leader ask for the counts without waiting for its time."""
    heartbeat = app.worker.heartbeat   # type: ignore[union-attr]
    heartbeat.chores[heartbeat._sample_stats].due = 0.0
    heartbeat.bell.set()


def counted_series(conn: Connection, app: Orchestrator) -> Series:
    """A scrape that tells a count of now: the leader may have counted between any two steps of a test, and tell that count still."""
    count_now(conn)
    counts = {(f"tasks_{name}", types["type"]): types[column] for types in value(conn, "select orchestrator.metrics()")["types"]
              for name, column in (("pending", "waiting"), ("scheduled", "scheduled"), ("in_flight", "in_flight"),
                                   ("dead_letters", "dead_letters"), ("enqueued_total", "enqueued_total"))}

    def told() -> Series | None:
        tells_counts_of_now(app)
        found = scrape(address_of(app))
        return found if all(get(found, name, type=kind) == counts[name, kind] for name, kind in counts) else None

    return eventually(told, 20)


def names(series: Series) -> set[str]:
    return {name for name, _ in series}


def fail(task: Any) -> None:
    raise RuntimeError("as asked")


def discard(task: Any) -> None:
    raise Discard("as asked")


HANDLERS = {"ok": lambda task: None, "bad": Handler(fail, max_retries=1, base_delay=0), "never": Handler(discard, max_retries=20),
            "until cancelled": lambda task: task.cancelled.wait(20) and task.raise_if_cancelled(), "mail:": lambda task: None}


def start(url: str, handlers: Any = None, **settings: Any) -> Orchestrator:
    settings = {"heartbeat_interval": 0.2, "worker_timeout": 30.0, "leader_term": 5.0, "metrics_port": 0, "worker_pool_size": 4, **settings}
    return Orchestrator(url, handlers or HANDLERS, distributed_mode=True, **settings).start()


@pytest.fixture
def app(installed: str) -> Iterator[Orchestrator]:
    app = start(installed)
    yield app
    app.stop(0)


# --------------------------------------------------------------------------------------------------------------- one worker
def test_the_names_kinds_and_labels_are_the_documented_ones(app):
    eventually(lambda: "tasks_pending" in names(scrape(address_of(app))))
    found: dict[str, tuple[str, set[str]]] = {}
    for family in text_string_to_metric_families(text_of(address_of(app))):
        assert family.documentation, family.name
        for sample in family.samples:
            found[sample.name] = family.type, set(sample.labels)
    usual = {name for name in found if name.startswith("process_") or re.search(r"_(sum|count)$", name)}
    assert {name: found[name] for name in found.keys() - usual} == CONTRACT


def test_counters_of_registered_types_start_at_zero_so_that_rate_sees_the_first_event(app):
    series = scrape(address_of(app))
    for kind in HANDLERS:
        for status in ("completed", "failed", "cancelled"):
            assert get(series, "tasks_completed_total", type=kind, status=status) == 0
        for name in ("tasks_dead_letter_total", "task_outcomes_rejected_total", "tasks_running", "task_duration_seconds_count",
                     "task_wait_seconds_count"):
            assert get(series, name, type=kind) == 0
    assert {dict(labels)["attempt"] for name, labels in series if name == "task_retries_total" and dict(labels)["type"] == "bad"} == {"1"}
    assert get(series, "tasks_recovered_total", outcome="retried") == 0
    assert get(series, "database_errors_total", **{"class": "57"}) == 0
    assert get(series, "pool_threads_replaced_total") == 0
    later = eventually(lambda: (found := scrape(address_of(app))) and "tasks_enqueued_total" in names(found) and found)
    for kind in (*HANDLERS, "other"):
        for name in ("tasks_pending", "tasks_scheduled", "tasks_in_flight", "tasks_dead_letters", "tasks_enqueued_total"):
            assert get(later, name, type=kind) == 0


def counted(conn: Connection) -> bool:
    """Whether the queue was counted since it was empty: a type matched by a pattern counts as other until the first count after it."""
    return bool(value(conn, "select clock_timestamp() > counted_at + interval '20 ms' from orchestrator.stats_state"))


def test_each_outcome_is_counted_once_whoever_enqueued(app, conn):
    address = address_of(app)
    count_now(conn)
    eventually(lambda: counted(conn))
    for _ in range(3):
        app.enqueue("ok")
    enqueue(conn, "ok")   # as from psql
    for kind in ("bad", "never", "mail:welcome", "mail:bye", "nobody's"):
        enqueue(conn, kind)
    cancelled = enqueue(conn, "until cancelled")
    eventually(lambda: value(conn, "select started_at is not null from orchestrator.tasks where id = %s", cancelled))
    app.cancel(cancelled)
    ended = "select count(*) from orchestrator.tasks where status in ('completed', 'dead_letter', 'cancelled')"
    eventually(lambda: value(conn, ended) == 9 and total(scrape(address), "tasks_completed_total") == 10)   # it counts after its commit
    series = counted_series(conn, app)

    def completed(kind: str, status: str) -> float | None:
        return get(series, "tasks_completed_total", type=kind, status=status)

    assert (completed("ok", "completed"), completed("ok", "failed")) == (4, 0)
    assert (completed("bad", "completed"), completed("bad", "failed")) == (0, 2)   # attempts
    assert (completed("never", "failed"), completed("mail:", "completed")) == (1, 2)
    assert (completed("until cancelled", "cancelled"), completed("until cancelled", "completed")) == (1, 0)
    assert get(series, "task_retries_total", type="bad", attempt="1") == 1
    assert [get(series, "tasks_dead_letter_total", type=kind) for kind in ("bad", "never", "ok")] == [1, 1, 0]
    assert [get(series, "tasks_dead_letters", type=kind) for kind in ("bad", "never", "ok")] == [1, 1, 0]
    assert [get(series, "tasks_enqueued_total", type=kind) for kind in ("ok", "bad", "mail:", "other")] == [4, 1, 2, 1]
    assert [get(series, f"task_{what}_seconds_count", type="bad") for what in ("duration", "wait")] == [2, 2]
    assert get(series, "tasks_oldest_pending_seconds", type="other") > 0
    assert get(series, "task_claim_duration_seconds_count") > 0
    assert get(series, "workers_total") == 1
    assert 0 <= get(series, "queue_stats_age_seconds") < 10 and 0 <= get(series, "recovery_age_seconds") < 10


def test_10_000_random_types_leave_the_number_of_series_unchanged(app, conn):
    address = address_of(app)
    count_now(conn)
    eventually(lambda: counted(conn))
    enqueue(conn, "mail:first")
    eventually(lambda: get(scrape(address), "tasks_completed_total", type="mail:", status="completed") == 1)
    before = counted_series(conn, app)
    conn.execute("select orchestrator.enqueue('random-' || n) from generate_series(1, 10000) n")
    conn.execute("select orchestrator.enqueue('mail:' || n) from generate_series(1, 300) n")   # more than SQL tells apart
    eventually(lambda: get(scrape(address), "tasks_completed_total", type="mail:", status="completed") == 301, 30)
    after = counted_series(conn, app)
    assert total(after, "tasks_enqueued_total") == 10301
    assert get(after, "tasks_pending", type="other") == 10000
    assert after.keys() == before.keys()


def test_running_overdue_and_longest_running_are_told_while_it_lasts(installed):
    started, release = threading.Event(), threading.Event()

    def deaf(task: Any) -> None:
        started.set()
        release.wait(20)

    app = start(installed, {"deaf": Handler(deaf, timeout=0.1), "idle": deaf})
    try:
        app.enqueue("deaf")
        assert started.wait(10)
        series = eventually(lambda: (found := scrape(address_of(app))) and get(found, "tasks_overdue", type="deaf") == 1 and found)
        assert (get(series, "tasks_running", type="deaf"), get(series, "tasks_running", type="idle")) == (1, 0)
        assert (get(series, "worker_pool_active"), get(series, "worker_pool_capacity")) == (1, 4)
        assert 0.1 < get(series, "tasks_longest_running_seconds", type="deaf") < 20
        assert get(series, "tasks_longest_running_seconds", type="idle") == 0
    finally:
        release.set()
        app.stop(1)


def test_wait_is_counted_from_enqueue_to_start(installed, conn):
    enqueue(conn, "ok")
    before = time.monotonic()
    eventually(lambda: time.monotonic() - before > 0.3)   # the world takes its time: nothing runs yet
    app = start(installed)
    try:
        series = eventually(lambda: (found := scrape(address_of(app))) and get(found, "task_wait_seconds_count", type="ok") == 1 and found)
        assert 0.3 < get(series, "task_wait_seconds_sum", type="ok") < 20
        assert get(series, "task_wait_seconds_bucket", type="ok", le="0.25") == 0
    finally:
        app.stop(0)


def test_database_errors_are_counted_by_sqlstate_class(app, conn):
    with conn.transaction():   # a statement that waits is told why it ends; an idle connection may only find itself closed
        conn.execute("lock table orchestrator.workers")
        eventually(lambda: value(conn, "select count(pg_terminate_backend(pid)) from pg_locks where not granted and database = "
                                       "(select oid from pg_database where datname = current_database())"))
    eventually(lambda: (get(scrape(address_of(app)), "database_errors_total", **{"class": "57"}) or 0) > 0)


@pytest.fixture
def askers(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """The threads that have called the database since, but for those of the worker."""
    found: list[str] = []
    really_open = orchestrator.Link.open

    def open_and_tell(link: Any) -> Any:   # each call does
        found.append(threading.current_thread().name)
        return really_open(link)

    monkeypatch.setattr(orchestrator.Link, "open", open_and_tell)
    return lambda: [name for name in found if name not in ("claim", "report", "heartbeat")]


def test_a_scrape_never_asks_the_database(app, askers):
    eventually(lambda: "tasks_pending" in names(scrape(address_of(app))))
    assert "tasks_pending" in names(scrape(address_of(app)))
    assert askers() == []
    urllib.request.urlopen(address_of(app) + "/api/overview", timeout=10).close()
    assert len(askers()) == 1   # by /api, which shows that asking would have been seen


def test_scrapes_with_20_types_and_10_000_tasks_waiting_never_ask_the_database(installed, conn, askers):
    conn.execute("select count(*) from orchestrator.enqueue_many('nobody''s', array_fill('{}'::jsonb, array[10000]))")
    app = start(installed, {f"type-{n}": HANDLERS["ok"] for n in range(20)})
    try:
        count_now(conn)
        tells_counts_of_now(app)
        eventually(lambda: get(scrape(address_of(app)), "tasks_pending", type="other") == 10000, 20)
        before = askers()   # the start of the worker
        for _ in range(10):
            text_of(address_of(app))
        assert askers() == before
    finally:
        app.stop(0)


def test_a_leader_that_cannot_extend_its_lease_tells_nothing_global_once_it_is_over(app, monkeypatch):
    eventually(lambda: "tasks_pending" in names(scrape(address_of(app))))
    stuck, go_on = threading.Event(), threading.Event()

    def hang(*args: Any) -> Any:
        stuck.set()
        go_on.wait()
        raise psycopg.OperationalError("gone")

    monkeypatch.setattr(app.worker.heartbeat.link, "call", hang)
    try:
        assert stuck.wait(10)
        assert "tasks_pending" in names(scrape(address_of(app)))   # as long as nobody else can lead
        app.worker.lease_until = time.monotonic()
        series = scrape(address_of(app))
        assert not names(series) & GLOBAL
        assert total(series, "leader_status") == 0
    finally:
        go_on.set()


# ----------------------------------------------------------------------------------------------------------- several workers
SOME_HANDLERS = """
import os, time
from orchestrator import Handler

def hold(task):
    while not os.path.exists(task.payload["until"]):
        time.sleep(0.02)

HANDLERS = {"hold": hold, "last chance": Handler(hold, max_retries=0), "ok": lambda task: None}
"""


@pytest.fixture
def workers(installed, worker_process, tmp_path) -> Callable[..., WorkerProcess]:
    (tmp_path / "some_handlers.py").write_text(SOME_HANDLERS)
    quick = {"HANDLERS": "some_handlers", "DISTRIBUTED_MODE": "true", "HEARTBEAT_INTERVAL": "200ms", "LEADER_TERM": "1s"}
    return lambda **settings: worker_process(installed, **{**quick, **settings})


def leads(worker: WorkerProcess) -> bool:
    return total(scrape(worker.address), "leader_status") == 1


def test_what_is_global_comes_from_the_leader_alone_and_a_stale_one_tells_nothing(workers, conn):
    first, second = workers(WORKER_TIMEOUT="60s"), workers(WORKER_TIMEOUT="60s")
    for _ in range(3):
        enqueue(conn, "nobody's")
    eventually(lambda: leads(first) or leads(second))
    leader, other = (first, second) if leads(first) else (second, first)
    count_now(conn)
    eventually(lambda: get(scrape(leader.address), "tasks_pending", type="other") == 3)
    assert get(scrape(leader.address), "workers_total") == 2
    assert not names(scrape(other.address)) & GLOBAL

    leader.signal(signal.SIGSTOP)
    eventually(lambda: leads(other))
    count_now(conn)
    eventually(lambda: get(scrape(other.address), "tasks_enqueued_total", type="other") == 3)
    leader.signal(signal.SIGCONT)
    series = scrape(leader.address)   # before its next heartbeat tells it
    assert not names(series) & GLOBAL
    assert total(series, "leader_status") == 0


def test_recoveries_and_rejected_late_outcomes_are_counted_by_whom_they_happen_to(workers, conn, tmp_path):
    paused = workers(WORKER_TIMEOUT="1s", WORKER_POOL_SIZE=2)
    until = {"until": str(tmp_path / "go on")}
    retried, dead = enqueue(conn, "hold", until), enqueue(conn, "last chance", until)
    eventually(lambda: value(conn, "select count(*) from orchestrator.tasks where status = 'running'") == 2)
    paused.signal(signal.SIGSTOP)
    recovering = workers(WORKER_TIMEOUT="1s", WORKER_POOL_SIZE=2)
    series = eventually(lambda: (found := scrape(recovering.address)) and get(found, "tasks_dead_letter_total", type="last chance") == 1
                        and found, 20)
    assert [get(series, "tasks_recovered_total", outcome=outcome) for outcome in ("retried", "dead", "released", "failed")] == [1, 1, 0, 0]
    assert value(conn, "select status from orchestrator.tasks where id = %s", dead) == "dead_letter"
    (tmp_path / "go on").touch()
    paused.signal(signal.SIGCONT)

    def rejected() -> list[float | None]:
        found = scrape(paused.address)
        return [get(found, "task_outcomes_rejected_total", type=kind) for kind in ("hold", "last chance", "ok")]

    eventually(lambda: rejected() == [1, 1, 0], 20)
    eventually(lambda: value(conn, "select status from orchestrator.tasks where id = %s", retried) == "completed", 20)
    done = [get(scrape(worker.address), "tasks_completed_total", type="hold", status="completed") for worker in (paused, recovering)]
    assert sorted(done) == [0, 1]   # by whoever took it the second time


# ------------------------------------------------------------------------------------------------------------- without a database
class FakeTask:
    def __init__(self, kind: str, waited: float = 0.0, claimed: float = 0.0, started: float = 0.0, seconds: float = 0.0,
                 attempt: int = 1) -> None:
        self.type, self.waited, self.claimed, self.started, self.seconds, self.attempt = kind, waited, claimed, started, seconds, attempt


def make_counters(**handlers: Handler) -> Counters:
    router = Router()
    for kind, handler in (handlers or {"t": Handler(fail, max_retries=20)}).items():
        router.add(kind, handler)
    return Counters(router)


def test_the_buckets_tell_1_ms_from_1_h():
    assert (BUCKETS[0], BUCKETS[-1]) == (0.001, 3600)
    tally = Tally()
    tally.add([0.0005, 0.001, 0.0011, 3600, 3601])
    buckets = dict(tally.buckets())
    assert (buckets["0.001"], buckets["0.0025"], buckets["900"], buckets["3600"], buckets["+Inf"]) == (2, 3, 3, 4, 5)
    assert tally.sum == pytest.approx(7201.0026)
    assert [bound for bound, _ in tally.buckets()][:-1] == sorted(buckets.keys() - {"+Inf"}, key=float)


def test_what_is_counted_is_rendered():
    counters = make_counters()
    counters.replaced_threads = 3
    counters.error(psycopg.errors.UniqueViolation())
    counters.error(psycopg.OperationalError("gone"))
    status = orchestrator.WorkerStatus("w", False, [], [], 5, 7, 1.5, 2.5, [("t", 3.0, -1.0), ("t", 9.0, 1.0)], counters.snapshot(),
                                       {"types": [], "limits": [], "workers": 1, "dead_workers": 0, "at": 0.0}, 0.0)
    series = {(sample.name, tuple(sorted(sample.labels.items()))): sample.value
              for family in orchestrator.Collector(lambda: status).collect() for sample in family.samples}
    assert [get(series, f"worker_{name}") for name in ("pool_active", "pool_capacity", "prefetch_size", "loop_lag_seconds",
                                                       "database_silence_seconds")] == [2, 5, 7, 1.5, 2.5]
    assert [get(series, f"tasks_{name}", type="t") for name in ("running", "overdue", "longest_running_seconds")] == [2, 1, 9]
    assert get(series, "pool_threads_replaced_total") == 3
    assert [get(series, "database_errors_total", **{"class": name}) for name in ("23", "connection", "57")] == [1, 1, 0]
    assert get(series, "leader_status", worker_id="w") == 0 and not names(series) & GLOBAL   # who doesn't lead tells no counts


def test_the_attempt_label_is_bounded():
    counters = make_counters()
    for attempt in range(1, 1001):
        counters.ended([FakeTask("t", attempt=attempt)], "retry_scheduled")
    labels = {attempt: count for (_, attempt), count in counters.snapshot().retries.items()}
    assert labels == {**{str(n): 1 for n in range(1, 10)}, "10+": 991}


def test_a_type_that_is_not_registered_counts_as_other():
    counters = make_counters(**{"a": Handler(fail), "b:": Handler(fail), "b:c*": Handler(fail)})
    for kind, count in {"a": 1, "b:x": 2, "b:cd": 3, "z": 4, "aa": 5}.items():
        counters.ended([FakeTask(kind)] * count, "completed")
    counted = {kind: count for (kind, status), count in counters.snapshot().completed.items() if status == "completed"}
    assert counted == {"a": 1, "b:": 2, "b:c*": 3, "other": 9}


def test_wait_is_what_passed_before_the_claim_and_after_it():
    counters = make_counters()
    clock_was_set_back = FakeTask("t", waited=-5, claimed=1, started=1)
    counters.ran([FakeTask("t", waited=0.5, claimed=10, started=12), clock_was_set_back])
    assert counters.snapshot().waits["t"].sum == 2.5


class CountingLock:
    def __init__(self) -> None:
        self.lock, self.taken = threading.Lock(), 0

    def __enter__(self) -> None:
        self.lock.acquire()
        self.taken += 1

    def __exit__(self, *exception: object) -> None:
        self.lock.release()


def test_counting_costs_per_batch_not_per_task():
    counters = make_counters()
    looked_up: list[str] = []
    label, counters.label = counters.label, lambda kind: looked_up.append(kind) or label(kind)
    counters.lock = CountingLock()   # type: ignore[assignment]
    counters.ran([FakeTask("t") for _ in range(1000)])
    counters.ended([FakeTask("t")] * 1000, "completed")
    assert counters.lock.taken == 2   # type: ignore[attr-defined]
    assert looked_up == ["t", "t"]


def test_scrapes_while_loops_write_see_whole_batches_and_lose_none():
    counters = make_counters()
    batch = [FakeTask("t", seconds=1.0) for _ in range(50)]
    done = threading.Event()
    torn: list[object] = []

    def write() -> None:
        for _ in range(200):
            counters.ran(batch)

    def read() -> None:
        while not done.is_set():
            tally = counters.snapshot().seconds["t"]
            if sum(tally.counts) % 50 or tally.sum != sum(tally.counts):
                torn.append((tally.counts, tally.sum))

    readers = [threading.Thread(target=read) for _ in range(2)]
    writers = [threading.Thread(target=write) for _ in range(4)]
    for thread in readers + writers:
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    for thread in readers:
        thread.join()
    assert torn == []
    assert sum(counters.snapshot().seconds["t"].counts) == 4 * 200 * 50
