"""Limits in Python: concurrency keys and meta, app.limit, LIMITS beside HANDLERS, the commands, and what a worker exports."""
from __future__ import annotations

import re
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from apps import claimed, end, make_app, registered, running
from conftest import WorkerProcess
from orchestrator import Orchestrator, Outcome, Task
from postgres import eventually
from steps import audit, column, count_now, row
from test_cli import Answer, cli, cli_on, logging_as_before  # noqa: F401

Connection = psycopg.Connection[Any]
LIMIT = "select max_running, max_per_key, rate, extract(epoch from rate_per)::float as per from orchestrator.limits where type = %s"
EXTRAS = "select concurrency_key, meta from orchestrator.tasks order by created_at, id"


@pytest.fixture
def app(installed: str) -> Iterator[Orchestrator]:
    app = make_app(installed)
    yield app
    app.close()


def limit_of(conn: Connection, name: str) -> Any:
    return conn.execute(LIMIT, [name]).fetchone()


# ------------------------------------------------------------------------------------------------------------- a program
def test_enqueue_takes_a_concurrency_key_and_meta_with_and_without_an_idempotency_key(app: Orchestrator, conn: Connection) -> None:
    app.enqueue("t", {"n": 1}, concurrency_key="acme", meta={"from": "web"})
    app.enqueue("t", {"n": 2}, concurrency_key="acme", meta={"from": "job"}, idempotency_key="once")
    app.enqueue("t", {"n": 3}, idempotency_key="twice")
    app.enqueue_many("t", [1, 2], concurrency_keys=["a", None], meta={"batch": 7})
    assert conn.execute(EXTRAS).fetchall() == [("acme", {"from": "web"}), ("acme", {"from": "job"}), (None, None),
                                               ("a", {"batch": 7}), (None, {"batch": 7})]


@pytest.mark.parametrize(("options", "words"), [
    ({"concurrency_key": ""}, "concurrency_key: must be 1 to 255 bytes"), ({"concurrency_key": "é" * 128}, "concurrency_key: must be"),
    ({"concurrency_key": "a\0"}, "concurrency_key: must be text"), ({"meta": [1]}, "meta: "), ({"meta": {"a": "b" * 9000}}, "meta: "),
    ({"meta": {"a": float("nan")}}, "meta: not JSON"), ({"meta": [1], "idempotency_key": "k"}, "meta: ")])
def test_enqueue_names_the_field_that_is_wrong(app: Orchestrator, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(words)}"):
        app.enqueue("t", **options)


def test_enqueue_many_wants_as_many_keys_as_payloads(app: Orchestrator) -> None:
    with pytest.raises(ValueError, match=r"^concurrency_keys: must be as many as the payloads"):
        app.enqueue_many("t", [1, 2], concurrency_keys=["a"])
    with pytest.raises(ValueError, match=r"^concurrency_keys\[2\]: must be 1 to 255 bytes"):
        app.enqueue_many("t", [1, 2], concurrency_keys=["a", ""])


def test_limit_says_whether_it_is_new_and_nothing_given_lifts_it(app: Orchestrator, conn: Connection) -> None:
    assert [app.limit("api:*", max_running=20, max_per_key=2, rate=14) for _ in range(2)] == [True, False]
    assert limit_of(conn, "api:*") == (20, 2, 14, 1)
    assert app.limit("api:*", rate=5, per="2m") is True and limit_of(conn, "api:*") == (None, None, 5, 120)
    assert [app.limit("api:*") for _ in range(2)] == [True, False] and limit_of(conn, "api:*") is None


def test_limit_in_the_callers_transaction_goes_with_it(app: Orchestrator, installed: str, conn: Connection) -> None:
    with psycopg.connect(installed) as connection:
        app.limit("t", max_running=1, connection=connection)
        connection.rollback()
    assert limit_of(conn, "t") is None


@pytest.mark.parametrize(("kind", "options", "words"), [
    ("t", {"max_running": 0}, "max_running: "), ("t", {"max_per_key": 1.5}, "max_per_key: "), ("t", {"rate": True}, "rate: "),
    ("t", {"rate": 1, "per": 0}, "per: "), ("t", {"rate": 1, "per": "2 days"}, "per: "), ("t", {"per": 1}, "per: "),
    ("a*b", {"max_running": 1}, "type: "), (None, {"max_running": 1}, "type: ")])
def test_limit_names_the_field_that_is_wrong(app: Orchestrator, kind: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"^{words}"):
        app.limit(kind, **options)


# -------------------------------------------------------------------------------------------------------------- a worker
def test_a_worker_runs_each_key_in_its_order_and_never_over_the_limit(installed: str, conn: Connection) -> None:
    lock, most, now, seen = threading.Lock(), [0], [0], {key: [] for key in "ab"}   # type: dict[str, list[int]]

    def note(task: Task) -> None:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
            seen[task.meta["key"]].append(task.payload["n"])
        task.sleep(0.005)
        with lock:
            now[0] -= 1

    with running(installed, {"t": note}) as app:
        app.limit("t", max_running=2, max_per_key=1)
        for n in range(10):
            for key in "ab":
                app.enqueue("t", {"n": n}, concurrency_key=key, meta={"key": key})
        eventually(lambda: column(conn, "select distinct status::text from orchestrator.tasks") == ["completed"], 30)
        assert seen == {"a": list(range(10)), "b": list(range(10))} and most[0] <= 2
    assert audit(conn) == []
    assert row(conn, "select in_flight, parked from orchestrator.limits") == {"in_flight": 0, "parked": 0}


def test_a_claims_several_claim_ids_are_started_released_and_reported_each_by_its_own(installed: str, conn: Connection) -> None:
    with registered(installed, {"t": lambda task: None}) as worker:
        conn.execute("select orchestrator.limit_type('t', 100, 10)")
        conn.execute("""select orchestrator.enqueue('t', '{}', p_concurrency_key => k, p_meta => '{"k": 1}')
                        from unnest('{a,b,c,a,b,c}'::text[]) k""")
        tasks = claimed(worker)
        assert len(tasks) == 6 and len({task.claim_id for task in tasks}) == 3
        assert [task.meta for task in tasks] == [{"k": 1}] * 6
        worker.claims._release_forgotten()   # all of them are known
        assert column(conn, "select status::text from orchestrator.tasks") == ["claimed"] * 6
        outcomes = [Outcome("completed")] * 2 + [None] * 2 + [Outcome("released")] * 2
        for task, outcome in zip(tasks, outcomes, strict=True):
            end(worker, task, outcome)
        worker.reports.poll()
        assert sorted(column(conn, "select status::text from orchestrator.tasks")) == ["completed"] * 4 + ["pending"] * 2
    assert audit(conn) == []


def test_meta_is_none_where_none_was_given(installed: str, conn: Connection) -> None:
    with registered(installed, {"t": lambda task: None}) as worker:
        conn.execute("select orchestrator.enqueue('t')")
        assert [task.meta for task in claimed(worker)] == [None]


# ---------------------------------------------------------------------------------------------------------------- LIMITS
LIMITED = """
from orchestrator import Limit
HANDLERS = {"api:*": lambda task: None}
LIMITS = {"api:*": Limit(max_running=20, max_per_key=2, rate=14, per=1)}
"""


def test_a_worker_defines_the_limits_of_its_module_before_it_claims(
        installed: str, conn: Connection, worker_process: Callable[..., WorkerProcess], tmp_path: Path) -> None:
    (tmp_path / "handlers.py").write_text(LIMITED)
    worker = worker_process(installed)
    eventually(lambda: " started, " in worker.output)
    assert limit_of(conn, "api:*") == (20, 2, 14, 1)
    # what a person lifts stays lifted, also when the worker registers anew
    conn.execute("select orchestrator.limit_type('api:*')")
    first = worker.id
    conn.execute("update orchestrator.workers set declared_dead_at = now()")
    eventually(lambda: worker.id != first, 30)
    assert limit_of(conn, "api:*") is None
    assert worker.stop() == 0


@pytest.mark.parametrize(("limits", "words"), [
    ("{'t': 5}", "LIMITS: must be a dict such as {'api:*': Limit(max_running=20)}"), ("[1]", "LIMITS: must be a dict"),
    ("{'t': Limit(max_running=0)}", "LIMITS['t']: max_running: must be"), ("{'t': Limit(per=1)}", "LIMITS['t']: per: must be")])
def test_limits_that_are_wrong_end_the_worker_with_one_line(
        installed: str, run_cli: Callable[..., Any], tmp_path: Path, limits: str, words: str) -> None:
    (tmp_path / "limited.py").write_text(f"from orchestrator import Limit\nHANDLERS = {{}}\nLIMITS = {limits}\n")
    done = run_cli("--handlers", str(tmp_path / "limited.py"), env={"DATABASE_URL": installed, "METRICS_PORT": 0})
    assert done.returncode == 2 and words in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


# -------------------------------------------------------------------------------------------------------------- commands
def test_the_command_limit_sets_and_lifts_and_limits_lists(cli: Callable[..., Answer], conn: Connection) -> None:  # noqa: F811
    cli("enqueue", "api:a", "--concurrency-key", "acme")
    assert column(conn, "select concurrency_key from orchestrator.tasks") == ["acme"]
    made = cli("limit", "api:*", "--max-running", "20", "--max-per-key", "2", "--rate", "14/2m")
    assert (made.code, made.out, made.err) == (0, "api:* is limited\n", "")
    assert limit_of(conn, "api:*") == (20, 2, 14, 120)
    assert cli("limit", "api:*", "--max-running", "20", "--max-per-key", "2", "--rate", "14/2m").out == "api:* is limited already\n"
    header, line = cli("limits").out.splitlines()
    assert header.split() == ["type", "in_flight", "max_running", "max_per_key", "parked", "rate", "rate_per", "next_start_at"]
    assert line.split() == ["api:*", "0", "20", "2", "0", "14", "00:02:00"]
    assert cli("limit", "api:*", "--none", "--json").json == {"limit": "api:*", "changed": True, "matching": 1}
    lifted = cli("limit", "other:*", "--none")
    assert (lifted.out, lifted.err) == ("other:* is not limited\n", "no known type matches other:*\n")
    assert cli("limits", "--json").json == []


@pytest.mark.parametrize(("flags", "words"), [
    ([], "limit: say"), (["--none", "--rate", "1/1s"], "limit: say"), (["--rate", "14"], "--rate: must be a number and a time"),
    (["--rate", "x/1s"], "--rate: must be"), (["--rate", "1/x"], "per: "), (["--max-running", "0"], "max_running: must be")])
def test_the_command_limit_says_what_is_wrong(cli: Callable[..., Answer], flags: list[str], words: str) -> None:  # noqa: F811
    answer = cli("limit", "t", *flags)
    assert answer.code == 2 and answer.err.startswith(f"error: {words}")


# --------------------------------------------------------------------------------------------------------------- metrics
def test_metrics_tell_how_full_limits_are_and_what_is_parked(installed: str, conn: Connection) -> None:
    conn.execute("select orchestrator.limit_type('t', 7, 1), orchestrator.limit_type('u', p_rate => 9, p_per => '1 s')")
    go = threading.Event()
    with running(installed, {"t": lambda task: go.wait(30)}) as app:
        for _ in range(3):
            app.enqueue("t", concurrency_key="a")
        eventually(lambda: row(conn, "select in_flight, parked from orchestrator.limits where type = 't'") == {"in_flight": 1, "parked": 2})
        address = f"http://127.0.0.1:{app._http.server_address[1]}"

        def found() -> dict[str, str]:
            count_now(conn)
            with urllib.request.urlopen(f"{address}/metrics", timeout=10) as answer:
                text = answer.read().decode()
            return dict(re.findall(r"^((?:limit_|tasks_parked).*) (\S+)$", text, re.MULTILINE))
        eventually(lambda: found() == {
            'tasks_parked{type="t"}': "2.0", 'tasks_parked{type="other"}': "0.0", 'limit_in_flight{limit="t"}': "1.0",
            'limit_in_flight{limit="u"}': "0.0", 'limit_max{limit="t"}': "7.0"}, 30)
        go.set()
