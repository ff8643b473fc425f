"""One process is not one connection: forks, threads, event loops, closed connections, other drivers', and one module under every name."""
from __future__ import annotations

import asyncio
import contextlib
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy

from apps import make_app, running, story, wait_for, worker_of
from conftest import PROGRAM, clean_environment
from orchestrator import EnqueuedId, Orchestrator
from postgres import eventually
from steps import background, column, value

Connection = psycopg.Connection[Any]
CHILDREN, EACH = 4, 50


# -------------------------------------------------------------------------------------------------------------- forks
def in_a_child(work: Callable[[], object]) -> Callable[[], None]:
    """Fork; the child does the work and exits by it. Returns what waits for it, and fails if the child did."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException as error:
            os.write(2, f"in the child: {error!r}\n".encode())
        finally:
            os._exit(code)

    def ended() -> bool:
        done, status = os.waitpid(pid, os.WNOHANG)
        assert not done or status == 0, f"the child ended with {os.waitstatus_to_exitcode(status)}"
        return bool(done)
    def wait() -> None:
        try:
            eventually(ended, 30)
        except AssertionError:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            raise
    return wait


def test_forked_children_get_their_own_ids_and_leave_the_parents_connection_alone(installed: str, conn: Connection, tmp_path: Path) -> None:
    app = make_app(installed)
    app.enqueue("parent")   # so that there is a connection to inherit
    parents = app._links[0].connection
    begin = multiprocessing.Event()

    def child(number: int) -> None:
        assert begin.wait(30)
        ids = [app.enqueue("child", number) for _ in range(EACH)]
        assert all(story(app, id)["payload"] == number for id in ids)
        (tmp_path / f"{number}").write_text("\n".join(ids))
        app.close()

    waits = [in_a_child(lambda n=n: child(n)) for n in range(CHILDREN)]   # type: ignore[misc]
    begin.set()
    mine = [app.enqueue("parent", "parent") for _ in range(EACH)]   # meanwhile
    for wait in waits:
        wait()
    for number in range(CHILDREN):
        wanted = column(conn, "select id::text from orchestrator.tasks where payload = to_jsonb(%s::int) order by id", number)
        assert (tmp_path / f"{number}").read_text().split() == wanted and len(wanted) == EACH
    assert mine == column(conn, "select id::text from orchestrator.tasks where payload = '\"parent\"' order by id")
    app.enqueue("parent")
    assert app._links[0].connection is parents and not parents.closed   # it has lived through all of that
    app.close()


def test_a_grandchild_and_a_collected_connection_harm_nobody(installed: str) -> None:
    """A connection that the child's garbage collector takes must not say good-bye in the parent's name."""
    app = make_app(installed)
    app.enqueue("parent")
    parents = app._links[0].connection

    def child() -> None:
        app.enqueue("child")
        wait = in_a_child(lambda: (app.enqueue("grandchild"), app.close()))
        wait()
        app.enqueue("child")
        app.close()
        gc.collect()

    in_a_child(child)()
    app.enqueue("parent")
    assert app._links[0].connection is parents
    app.close()


def test_a_fork_while_threads_enqueue_leaves_no_lock_held_in_the_child(installed: str) -> None:
    app, stop = make_app(installed), threading.Event()

    def busy() -> None:
        while not stop.is_set():
            app.enqueue("busy")

    threads = [threading.Thread(target=busy) for _ in range(6)]   # more than there are links
    for thread in threads:
        thread.start()
    try:
        for _ in range(10):
            in_a_child(lambda: (app.enqueue("child"), app.close()))()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert len(app.list({"type": "child"})) == 10
    app.close()


def test_a_child_of_a_program_that_runs_a_worker_enqueues_and_closes_without_the_worker(installed: str) -> None:
    with running(installed, {"a": lambda task: "done"}) as app:
        in_a_child(lambda: (app.enqueue("a"), app.stop(), app.close()))()
        assert wait_for(app, app.enqueue("a"))["result"] == "done"   # worker, page and connections of the parent go on
        assert worker_of(app).health() == []


def test_a_child_may_run_a_worker_of_its_own(installed: str, conn: Connection) -> None:
    with running(installed, {"a": lambda task: os.getpid()}, distributed_mode=True) as app:
        parent = worker_of(app).id

        def child() -> None:
            app.start()
            eventually(worker_of(app).registered.is_set)
            assert worker_of(app).id != parent
            app.stop(0)

        in_a_child(child)()
        assert column(conn, "select id from orchestrator.workers where declared_dead_at is null") == [parent]
        assert wait_for(app, app.enqueue("a"))["result"] == os.getpid()


FORKING_HANDLERS = """
import multiprocessing, time

def live(born):
    born.set()   # Python forgets a signal that comes before this
    time.sleep(600)

def work(task):
    context = multiprocessing.get_context("fork")
    born = context.Event()
    child = context.Process(target=live, args=[born])
    child.start()
    born.wait(20)
    child.terminate()
    child.join(20)
    return child.exitcode

HANDLERS = {"fork": work}
"""


def test_a_child_that_a_handler_forks_can_be_terminated(installed: str, tmp_path: Path, worker_process: Callable[..., Any]) -> None:
    """It inherits the worker's handling of signals, which only notes that one came."""
    (tmp_path / "forking.py").write_text(FORKING_HANDLERS)
    worker = worker_process(installed, HANDLERS="forking")
    app = make_app(installed)
    assert wait_for(app, app.enqueue("fork"), timeout=30)["result"] == -15
    app.close()
    assert worker.stop() == 0


# ------------------------------------------------------------------------------------------------- closed connections
def end_sessions(conn: Connection, but: int = 0) -> None:
    others = "select pid from pg_stat_activity where datname = current_database() and pid not in (pg_backend_pid(), %s)"
    for pid in column(conn, others, but):
        conn.execute("select pg_terminate_backend(%s)", [pid])
    eventually(lambda: not column(conn, others, but))


def test_a_connection_that_was_closed_while_idle_is_replaced_before_anything_is_sent(installed: str, conn: Connection) -> None:
    app = make_app(installed)
    for round in range(3):
        app.enqueue("a", round)
        end_sessions(conn)
    assert app.enqueue_many("a", [3, 4]) and app.get(app.enqueue("a", 5))
    end_sessions(conn)
    assert {row["type"]: row["waiting"] for row in app.view("queue_stats")} == {"a": 6}
    app.close()


def test_all_idle_connections_of_many_threads_may_be_closed_at_once(installed: str, conn: Connection) -> None:
    app, together = make_app(installed), threading.Barrier(4)

    def enqueue() -> None:
        together.wait(10)
        app.enqueue("a")

    for _ in range(3):
        for future in [background(enqueue) for _ in range(4)]:
            future.result(30)
        end_sessions(conn)
    assert value(conn, "select count(*) from orchestrator.tasks") == 12
    app.close()


def test_the_page_too_survives_a_closed_idle_connection(installed: str, conn: Connection) -> None:
    with running(installed, {"a": lambda task: None}) as app:
        server = app._http
        assert server.ask("api_overview", {}, False)
        server.link.connection.execute("set application_name = 'the page'")
        conn.execute("select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'the page'")
        eventually(lambda: not column(conn, "select pid from pg_stat_activity where application_name = 'the page'"))
        assert server.ask("api_overview", {}, False)


def test_a_server_that_is_away_is_an_error_at_once_and_enqueuing_goes_on_when_it_is_back(installed: str) -> None:
    app = make_app("postgresql://postgres@127.0.0.1:1/nowhere")
    with pytest.raises(psycopg.OperationalError):
        app.enqueue("a")
    app.config = make_app(installed).config
    with pytest.raises(psycopg.OperationalError):   # the link knows the address it was made with
        app.enqueue("a")
    app.close()
    assert app.enqueue("a")
    app.close()


# ------------------------------------------------------------------------------------------- threads and event loops
def test_a_thread_that_waits_for_an_uncommitted_key_holds_up_no_other(installed: str, connect: Callable[..., Connection]) -> None:
    app, holder, watcher = make_app(installed), connect(autocommit=False), connect()
    app.enqueue("a", idempotency_key="k", connection=holder)
    waiting = background(lambda: app.enqueue("a", idempotency_key="k"))
    blocked = "select pid from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
    eventually(lambda: column(watcher, blocked))
    for _ in range(20):
        app.enqueue("other")
    assert column(watcher, blocked) and not waiting.done()   # all of them while it waited
    holder.rollback()
    assert waiting.result(20).created
    app.close()


def test_more_threads_than_links_share_them(installed: str, conn: Connection) -> None:
    app = make_app(installed)
    futures = [background(lambda n=n: [app.enqueue("a", n) for _ in range(10)]) for n in range(16)]   # type: ignore[misc]
    ids = [id for future in futures for id in future.result(40)]
    assert len(set(ids)) == 160 == value(conn, "select count(*) from orchestrator.tasks")
    assert value(conn, "select count(*) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid() "
                       "and backend_type = 'client backend'") <= 4
    app.close()


def test_an_event_loop_goes_on_while_enqueue_async_waits(installed: str, connect: Callable[..., Connection]) -> None:
    app, holder, watcher = make_app(installed), connect(autocommit=False), connect()
    app.enqueue("warm")
    holder.execute("lock table orchestrator.tasks in access exclusive mode")

    async def program() -> tuple[EnqueuedId, int]:
        turns = 0
        adding = asyncio.ensure_future(app.enqueue_async("a", {"n": 1}, priority=3, idempotency_key="k"))
        while not await asyncio.to_thread(lambda: column(
                watcher, "select 1 from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'")):
            turns += 1
        assert not adding.done()
        holder.rollback()
        return await adding, turns

    task_id, _ = asyncio.run(program())
    assert task_id.created
    task = story(app, task_id)
    assert (task["payload"], task["priority"], task["idempotency_key"]) == ({"n": 1}, 3, "k")
    app.close()


def test_a_lock_that_is_never_given_back_ends_the_wait_and_breaks_nothing(installed: str, connect: Callable[..., Connection]) -> None:
    app, holder = make_app(installed), connect(autocommit=False)
    app.enqueue("warm")
    app._links[0].connection.execute("set lock_timeout = '50ms'")   # type: ignore[union-attr]
    holder.execute("lock table orchestrator.tasks in access exclusive mode")
    with pytest.raises(psycopg.errors.LockNotAvailable):
        app.enqueue("a")
    holder.rollback()
    app.enqueue("a")
    app.close()


# -------------------------------------------------------------------------------------------- other drivers' connections
def test_a_connection_of_another_kind_is_refused_by_one_line_that_says_what_to_do(installed: str) -> None:
    class Foreign:   # as asyncpg's and psycopg2's: no psycopg.Connection
        pass

    async def asynchronous() -> None:
        async with await psycopg.AsyncConnection.connect(installed) as connection:
            refused(connection, "AsyncConnection")

    def refused(connection: Any, name: str) -> None:
        for call in (lambda: app.enqueue("a", connection=connection), lambda: app.enqueue("a", idempotency_key="k", connection=connection),
                     lambda: app.enqueue_many("a", [1], connection=connection)):
            with pytest.raises(ValueError, match="^connection: must be a psycopg.Connection") as caught:
                call()
            assert name in str(caught.value) and "examples/other_drivers.py" in str(caught.value) and "\n" not in str(caught.value)

    app = Orchestrator("postgresql://127.0.0.1:1/nowhere")   # never used
    engine = sqlalchemy.create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(installed))
    with engine.connect() as connection:
        refused(connection, "Connection")
        assert app.enqueue("a", connection=connection.connection.driver_connection).created   # type: ignore[arg-type]
        connection.rollback()
    engine.dispose()
    asyncio.run(asynchronous())
    with psycopg.connect(installed) as own:
        refused(own.cursor(), "Cursor")
    refused(Foreign(), "Foreign")
    refused(installed, "str")
    assert (PROGRAM.parent / "examples" / "other_drivers.py").exists()


@pytest.mark.parametrize("options", ["dict rows", "client-side binding", "raw cursors", "namedtuple rows", "pipeline"])
def test_a_psycopg_connection_of_any_settings_will_do(installed: str, options: str) -> None:
    factories: dict[str, Any] = {"dict rows": psycopg.rows.dict_row, "namedtuple rows": psycopg.rows.namedtuple_row}
    cursors: dict[str, Any] = {"client-side binding": psycopg.ClientCursor, "raw cursors": psycopg.RawCursor}
    app = make_app(installed)
    with psycopg.connect(installed, row_factory=factories.get(options, psycopg.rows.tuple_row),
                         cursor_factory=cursors.get(options, psycopg.Cursor)) as connection:
        if options == "pipeline":
            with connection.pipeline():
                ids = [app.enqueue("a", {"text": "it's \\ \"1\" %s $1"}, delay="1h", idempotency_key="k", connection=connection)]
        else:
            ids = [app.enqueue("a", {"text": "it's \\ \"1\" %s $1"}, delay="1h", idempotency_key="k", connection=connection)]
        ids += app.enqueue_many("b", [1, "\\"], connection=connection)
    assert [story(app, id)["payload"] for id in ids] == [{"text": "it's \\ \"1\" %s $1"}, 1, "\\"]
    assert not app.enqueue("a", idempotency_key="k").created
    app.close()


# ------------------------------------------------------------------------------------------------- names of the module
HANDLERS = """
import {module} as first
from {module} import Discard, Handler, Snooze
{also}

def snooze(task):
    if not hasattr(snooze, "before"):
        snooze.before = True
        raise {other}Snooze(0)
    return "snoozed once"

def discard(task):
    raise Discard("never again")

HANDLERS = {{"discard": discard, "snooze": snooze, "exactly": Handler(discard, max_retries=0)}}
"""
NAMES = {   # how it is started, what the handlers import
    "-m myapp.orchestrator, by attribute": (["-m", "myapp.orchestrator"], "myapp.orchestrator", "import myapp.orchestrator",
                                           "myapp.orchestrator."),
    "-m myapp.orchestrator, both names": (["-m", "myapp.orchestrator"], "myapp.orchestrator", "import orchestrator", "orchestrator."),
    "the file, by attribute": (["myapp/orchestrator.py"], "myapp.orchestrator", "import myapp.orchestrator", "myapp.orchestrator."),
    "the file, short name": (["myapp/orchestrator.py"], "orchestrator", "", ""),
    "another name, through a link": (["linked.py"], "myapp.queue_of_mine", "import orchestrator", "orchestrator."),
}


@pytest.mark.parametrize("case", NAMES)
def test_a_module_has_one_set_of_classes_under_every_name(
        installed: str, tmp_path: Path, worker_process: Callable[..., Any], conn: Connection, case: str) -> None:
    started, module, also, other = NAMES[case]
    package = tmp_path / "myapp"
    package.mkdir()
    (package / "__init__.py").write_text("")
    file = package / f"{module.split('.')[-1]}.py"
    file.write_text(PROGRAM.read_text())
    (tmp_path / "linked.py").symlink_to(file)
    (tmp_path / "my_handlers.py").write_text(HANDLERS.format(module=module, also=also, other=other))
    log = tmp_path / "log"
    with log.open("w") as output:
        worker = subprocess.Popen([sys.executable, *started], cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                                  env=clean_environment(DATABASE_URL=installed, HANDLERS="my_handlers", METRICS_PORT="off",
                                                        PYTHONPATH=tmp_path))
    try:
        app = make_app(installed)
        ids = {kind: app.enqueue(kind) for kind in ("snooze", "discard", "exactly")}
        for kind, status, error in (("snooze", "completed", None), ("discard", "dead_letter", "never again"),
                                    ("exactly", "dead_letter", "never again")):
            eventually(lambda kind=kind: worker.poll() is None and story(app, ids[kind])["status"] not in (   # type: ignore[misc]
                "pending", "claimed", "running"), 30)
            task = story(app, ids[kind])
            assert (kind, task["status"], task["last_error"], task["attempts"]) == (kind, status, error, 1), log.read_text()
        app.close()
    finally:
        worker.kill()
        worker.wait()


def test_a_second_name_for_the_running_module_is_the_same_module(tmp_path: Path) -> None:
    package = tmp_path / "myapp"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "orchestrator.py").symlink_to(PROGRAM)
    (tmp_path / "lazy.py").write_text("def __getattr__(name):\n    raise RuntimeError('looked for ' + name)\n")
    program = ("import lazy, orchestrator, myapp.orchestrator, importlib\nfrom myapp import orchestrator as third\n"
               "assert orchestrator is myapp.orchestrator is third\n"
               "assert importlib.import_module('myapp.orchestrator') is orchestrator\nprint('one')")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=False, capture_output=True, text=True,
                          env=clean_environment(PYTHONPATH=f"{tmp_path}:{PROGRAM.parent}"))
    assert (done.stdout, done.stderr) == ("one\n", "")


def test_a_process_that_multiprocessing_spawns_has_one_module_too(installed: str, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(f"""
import multiprocessing, sys
sys.path.insert(0, {str(PROGRAM.parent)!r})
from orchestrator import Discard, Orchestrator
app = Orchestrator({installed!r})

def work(n):
    import orchestrator
    return orchestrator.Discard is Discard, app.enqueue("spawned", n)

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        same, ids = zip(*pool.map(work, range(4)))
    print(all(same), len(set(ids)), [app.get(id)["payload"] for id in ids])
""")
    done = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, check=False, capture_output=True, text=True, timeout=60,
                          env=clean_environment())
    assert (done.stdout, done.stderr) == ("True 4 [0, 1, 2, 3]\n", "")
