"""Workers and servers that die or freeze while they hold tasks: real processes, real signals. tests/chaos/ does it on a larger scale."""
from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from conftest import WorkerProcess
from postgres import LocalServer, eventually, install_schema
from steps import audit, column, enqueue, enqueue_some, events, register, task, value

HANDLERS = str(Path(__file__).parent / "chaos" / "work.py")
Connection = psycopg.Connection[Any]
Start = Callable[..., WorkerProcess]


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """Many workers, short leases, the handlers of tests/chaos."""
    return {"HANDLERS": HANDLERS, "CHAOS_FOLDER": tmp_path, "DISTRIBUTED_MODE": "true", "HEARTBEAT_INTERVAL": "300ms",
            "WORKER_TIMEOUT": "1500ms", "LEADER_TERM": "1s", "SHUTDOWN_GRACE": "2s"}


def statuses(conn: Connection) -> dict[str, int]:
    return dict(conn.execute("select status::text, count(*) from orchestrator.tasks group by 1").fetchall())


def executions(folder: Path, id: str) -> list[str]:
    """The workers that began to run a task."""
    lines = [line.split() for path in folder.glob("executions-*") for line in path.read_text().splitlines()]
    lines.sort(key=lambda line: float(line[5]))
    return [worker for kind, task_id, _, _, worker, _ in lines if kind == "begin" and task_id == id]


def test_kill_9_charges_what_ran_and_not_what_had_not_started(
        conn: Connection, installed: str, worker_process: Start, settings: Any) -> None:
    worker = worker_process(installed, WORKER_POOL_SIZE=2, **settings)
    enqueue_some(conn, 500, "work")     # quick ones teach the worker to hold many
    eventually(lambda: statuses(conn) == {"completed": 500})
    ran = enqueue(conn, "wait", {"seconds": 60})
    eventually(lambda: task(conn, ran)["status"] == "running")
    # the first of these freezes the process, the others are in its hands
    held = column(conn, "select id::text from orchestrator.enqueue_many('gil', array_fill('{\"seconds\": 60}'::jsonb, array[20]))")
    eventually(lambda: statuses(conn).get("claimed") == 20)

    worker.kill()
    conn.execute("update orchestrator.tasks set payload = '{\"seconds\": 0}'")   # the next attempt is short
    worker_process(installed, WORKER_POOL_SIZE=2, **settings)
    eventually(lambda: statuses(conn) == {"completed": 521}, 30)

    assert task(conn, ran)["attempts"] == 2
    assert events(conn, ran) == ["recovered", "failed", "retry_scheduled"]
    assert "died" in task(conn, ran)["last_error"]
    assert {(task(conn, id)["attempts"], tuple(events(conn, id))) for id in held} == {(1, ("recovered",))}
    assert audit(conn) == []


def test_a_stopped_workers_late_outcome_is_rejected_and_it_goes_on(
        conn: Connection, installed: str, worker_process: Start, settings: Any, tmp_path: Path) -> None:
    stopped = worker_process(installed, **settings)
    id = enqueue(conn, "work", {"seconds": 0.6})
    eventually(lambda: task(conn, id)["status"] == "running")
    first = stopped.id
    stopped.signal(signal.SIGSTOP)
    other = worker_process(installed, **settings)
    eventually(lambda: task(conn, id)["status"] == "completed", 30)
    before = task(conn, id)

    stopped.signal(signal.SIGCONT)
    eventually(lambda: f"task rejected: work {id}" in stopped.output, 20)
    assert task(conn, id) == before and before["worker_id"] == other.id
    assert executions(tmp_path, id) == [first, other.id]
    eventually(lambda: stopped.id not in (None, first), 20)
    assert other.stop() == 0
    next_one = enqueue(conn, "work")
    eventually(lambda: task(conn, next_one)["status"] == "completed", 20)
    assert task(conn, next_one)["worker_id"] == stopped.id
    assert audit(conn) == []


def test_a_task_that_kills_its_worker_is_dead_lettered_and_its_neighbours_are_not_charged(
        conn: Connection, installed: str, worker_process: Start, settings: Any) -> None:
    settings["DISTRIBUTED_MODE"] = "false"   # whoever starts next recovers at once
    before = enqueue_some(conn, 20, "work")
    killer = enqueue(conn, "abort")
    after = enqueue_some(conn, 20, "work")
    deaths = 0
    worker = worker_process(installed, wait=False, **settings)

    def all_ended() -> bool:
        nonlocal worker, deaths
        if worker.process.poll() is not None:
            deaths += 1
            worker = worker_process(installed, wait=False, **settings)
        return statuses(conn) == {"completed": 40, "dead_letter": 1}

    eventually(all_ended, 50)
    assert task(conn, killer)["attempts"] == 3      # max_retries is 2
    assert events(conn, killer)[-1] == "dead_letter"
    assert deaths in (3, 4)      # the first time, nobody knows yet who it was
    assert {task(conn, id)["attempts"] for id in before + after} == {1}
    assert audit(conn) == []


def test_a_single_instance_recovers_at_its_start_what_kill_9_left(conn: Connection, installed: str, worker_process: Start) -> None:
    settings = {"HANDLERS": HANDLERS, "DISTRIBUTED_MODE": "false"}    # with the default WORKER_TIMEOUT of 30 s
    first = worker_process(installed, **settings)
    id = enqueue(conn, "wait", {"seconds": 60})
    eventually(lambda: task(conn, id)["status"] == "running")
    first.kill()
    conn.execute("update orchestrator.tasks set payload = '{\"seconds\": 0}'")
    worker_process(installed, **settings)
    eventually(lambda: task(conn, id)["status"] == "completed", 10)
    assert task(conn, id)["attempts"] == 2
    assert value(conn, "select count(*) from orchestrator.workers") == 1


def test_register_worker_may_be_sent_again_when_its_answer_was_lost(conn: Connection) -> None:
    register(conn)
    register(conn)
    assert value(conn, "select count(*) from orchestrator.workers") == 1


def test_a_worker_whose_thread_ended_exits_instead_of_lingering(
        conn: Connection, installed: str, worker_process: Start, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(
        "import orchestrator\n"
        "def no_memory(self):\n    raise MemoryError\n"
        "def sabotage(task):\n    orchestrator.ReportLoop.poll = no_memory\n"
        "HANDLERS = {'sabotage': sabotage}\n")
    worker = worker_process(installed, HANDLERS=tmp_path / "broken.py", SHUTDOWN_GRACE="1s")
    enqueue(conn, "sabotage")
    assert worker.process.wait(20) == 1
    assert "the report thread ended: MemoryError" in worker.output


@pytest.fixture
def crashing_server() -> Iterator[LocalServer]:
    """A server of the test's own, with fsync on."""
    started = LocalServer(fsync=True)
    yield started
    started.stop()


def test_workers_outlive_crashes_of_the_server_and_lose_nothing(crashing_server: LocalServer, worker_process: Start, settings: Any) -> None:
    url = crashing_server.create_database()
    install_schema(url)
    workers = [worker_process(url, **{**settings, "WORKER_TIMEOUT": "20s"}) for _ in range(2)]
    acknowledged: set[str] = set()
    enough = threading.Event()

    def produce() -> None:
        n = 0
        while not enough.is_set():
            try:
                with psycopg.connect(url, autocommit=True) as connection:
                    while not enough.wait(0.002):
                        acknowledged.add(enqueue(connection, "work", {"n": n}, idempotency_key=str(n)))
                        n += 1
            except psycopg.OperationalError:
                enough.wait(0.05)

    producer = threading.Thread(target=produce)
    producer.start()
    try:
        for _ in range(2):
            so_far = len(acknowledged)
            eventually(lambda so_far=so_far: len(acknowledged) > so_far + 100, 30)
            crashing_server.stop_server("immediate")
            crashing_server.start()
        so_far = len(acknowledged)
        eventually(lambda: len(acknowledged) > so_far + 100, 30)
    finally:
        enough.set()
        producer.join()
    with psycopg.connect(url, autocommit=True) as conn:
        eventually(lambda: set(statuses(conn)) == {"completed"}, 30)
        assert set(column(conn, "select id::text from orchestrator.tasks")) == acknowledged
        assert audit(conn) == []
    assert [worker.process.poll() for worker in workers] == [None, None]
