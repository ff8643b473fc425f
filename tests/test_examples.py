"""Each short program of examples/ does what it says, as a process on a real database."""
from __future__ import annotations

import gzip
import http.server
import importlib.util
import json
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from conftest import REPOSITORY, clean_environment
from postgres import Server, eventually

EXAMPLES = REPOSITORY / "examples"


class Program:
    """An example that was started; its output in a file."""

    def __init__(self, name: str, url: str, folder: Path, *args: str, **settings: str) -> None:
        self.log = Path(tempfile.mkstemp(prefix=name, dir=folder)[1])
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(EXAMPLES / name), *args], cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                env=clean_environment(DATABASE_URL=url, METRICS_PORT=0, **settings))

    @property
    def output(self) -> str:
        return self.log.read_text()

    def printed(self, text: str, timeout: float = 30) -> str:
        """Wait until a line that matches is printed, and return it."""
        def found() -> str | None:
            ended = self.process.poll() is not None   # asked before its last lines are read
            match = re.search(f"^.*{text}.*$", self.output, re.MULTILINE)
            assert match or not ended, self.output
            return match[0] if match else None
        return str(eventually(found, timeout))


@pytest.fixture
def start(installed: str, tmp_path: Path) -> Iterator[Callable[..., Program]]:
    started: list[Program] = []

    def start(name: str, *args: str, **settings: str) -> Program:
        started.append(Program(name, installed, tmp_path, *args, **settings))
        return started[-1]

    yield start
    for program in started:
        program.process.kill()
        program.process.wait()


def test_each_example_has_a_test_and_is_named_in_its_help() -> None:
    text = Path(__file__).read_text()
    for path in EXAMPLES.iterdir():
        if path.suffix in (".py", ".sql") and path.name != "demo.py":   # the demo has a file of its own
            assert f'"{path.name}"' in text, f"{path.name} has no test"
            assert f"examples/{path.name}" in path.read_text()[:600], f"{path.name} does not say how to run it"


def ask(url: str, body: dict[str, Any] | None = None, kind: str = "application/json") -> tuple[int, dict[str, Any]]:
    data = None if body is None else (json.dumps(body) if kind == "application/json" else urllib.parse.urlencode(body)).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, {"Content-Type": kind}), timeout=10) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error) if error.headers.get_content_subtype() == "json" else {}


def test_web_app_stores_an_order_and_its_task_together_or_neither(start: Callable[..., Program], conn: psycopg.Connection[Any]) -> None:
    address = start("web_app.py", "0").printed("^http://")
    status, placed = ask(address, {"customer": "Ada"})
    assert status == 201
    eventually(lambda: ask(f"{address}/{placed['order']}") == (200, {"customer": "Ada", "status": "confirmed"}))
    task = conn.execute("select status, payload from orchestrator.tasks where id = %s", [placed["task"]]).fetchone()
    assert task == ("completed", {"order": placed["order"]})
    assert ask(address, {"customer": ""})[0] == 400
    assert ask(address, {})[0] == 400
    assert ask(f"{address}/99")[0] == 404
    assert conn.execute("select count(*), (select count(*) from shop_orders) from orchestrator.tasks").fetchone() == (1, 1)


def test_other_drivers_enqueue_in_their_own_transactions(start: Callable[..., Program], conn: psycopg.Connection[Any]) -> None:
    program = start("other_drivers.py")
    assert program.process.wait(40) == 0, program.output
    names = ["Ada", "Bob", "Cy", "Di"] + (["Fay"] if importlib.util.find_spec("asyncpg") else [])
    assert program.output.splitlines() == [f"bookings of {', '.join(names)}", f"tasks {len(names)}"]
    pairs = "select o.customer from orchestrator.tasks t join bookings o on o.id = (t.payload ->> 'booking')::int order by t.id"
    assert [row[0] for row in conn.execute(pairs)] == names


def test_checked_payload_refuses_wrong_payloads_by_the_name_of_the_field(start: Callable[..., Program]) -> None:
    program = start("checked_payload.py")
    assert program.process.wait(40) == 0, program.output
    lines = re.findall(r"^(?:completed|dead_letter) .*$", program.output, re.MULTILINE)
    assert lines[0] == "completed cat.jpg resized to 640 pixels at quality 80"
    assert [line.split()[0] for line in lines] == ["completed"] + 5 * ["dead_letter"]
    parts = ("'width'", "width: must be of type int", "width: must be from 1", "'colour'", "payload:")
    assert [part for line, part in zip(lines[1:], parts, strict=True) if part not in line] == []


def test_my_handlers_run_inside_the_middleware(start: Callable[..., Program], conn: psycopg.Connection[Any]) -> None:
    for kind, payload in (("report:sales", "{}"), ("fetch", '{"n": 1}'), ("fetch", '{"tenant": "blocked"}'), ("nightly", "{}"),
                          ("nightly", '{"now": true}'), ("limited", "{}")):
        conn.execute("select orchestrator.enqueue(%s, %s::jsonb)", [kind, payload])
    program = start("my_handlers.py")
    states = "select type, status::text, attempts, result from orchestrator.tasks order by id"
    wanted = [("report:sales", "completed", 1, {"parts": 10}), ("fetch", "completed", 1, {"n": 1}), ("nightly", "pending", 0, None),
              ("nightly", "completed", 1, None), ("limited", "completed", 2, "attempt 2")]
    eventually(lambda: set(map(repr, wanted)) <= set(map(repr, conn.execute(states).fetchall())), 30)
    blocked = conn.execute("select status::text, last_error from orchestrator.tasks where payload ->> 'tenant' = 'blocked'").fetchone()
    assert blocked is not None and "this tenant is blocked" in (blocked[1] or "")
    assert re.search(r"limited attempt 2 took 0\.\d+ s", program.output)
    program.process.send_signal(signal.SIGTERM)
    assert program.process.wait(20) == 0


def test_my_handlers_also_load_by_the_command_line(
        worker_process: Callable[..., Any], installed: str, conn: psycopg.Connection[Any]) -> None:
    worker_process(installed, HANDLERS=EXAMPLES / "my_handlers.py")
    conn.execute("select orchestrator.enqueue('report:x')")
    eventually(lambda: conn.execute("select from orchestrator.tasks where status = 'completed'").fetchall())


def test_alerting_announces_what_ends_here_and_what_ends_elsewhere_once_each(
        start: Callable[..., Program], worker_process: Callable[..., Any], installed: str, conn: psycopg.Connection[Any],
        tmp_path: Path) -> None:
    program = start("alerting.py", "0.1")
    program.printed("watching")
    (tmp_path / "elsewhere.py").write_text("""if True:
        from orchestrator import Discard
        def die(task):
            raise Discard("no such account")
        HANDLERS = {"payment:refund": die}""")
    worker_process(installed, HANDLERS=tmp_path / "elsewhere.py", DISTRIBUTED_MODE="true")
    for kind in ("payment:collect", "payment:refund"):
        conn.execute("select orchestrator.enqueue(%s, '{\"amount\": 0}')", [kind])
    assert "payment:collect became a dead letter at attempt 1: amount: must be more than 0" in program.printed(r"ALERT \(hook\)")
    assert "payment:refund became a dead letter at attempt 1: no such account" in program.printed(r"ALERT \(query\) .*refund")
    conn.execute("select orchestrator.enqueue('payment:collect', '{\"amount\": -1}')")
    eventually(lambda: program.output.count("ALERT") == 3)
    assert program.output.count("ALERT (query)") == 1
    program.process.send_signal(signal.SIGTERM)
    assert program.process.wait(20) == 0


@pytest.mark.parametrize(("name", "expected"), [
    ("web_app.py", "^http://"), ("other_drivers.py", "^tasks"), ("checked_payload.py", "^completed"),
    ("my_handlers.py", "worker .* started"), ("alerting.py", "^watching"), ("exactly_once.py", "deposits left"),
    ("django_project.py", "^confirmed"), ("fastapi_app.py", "running on"), ("flask_app.py", "^http://"),
    ("pydantic_payload.py", "^completed"), ("asyncio_program.py", "^completed"), ("structured_logs.py", "shipping"),
    ("opentelemetry_traces.py", "process"), ("sentry_errors.py", "^snoozed")])
def test_examples_start_on_an_empty_database(name: str, expected: str, db: str, tmp_path: Path) -> None:
    program = Program(name, db, tmp_path)
    try:
        program.printed(expected)
    finally:
        program.process.kill()
        program.process.wait()


class Moody(http.server.BaseHTTPRequestHandler):
    """Answers /busy with 429 once, /date with 503 and a date once, /gone with 404."""

    seen: dict[str, list[float]]

    def do_GET(self) -> None:
        first = self.path not in self.seen
        self.seen.setdefault(self.path, []).append(time.monotonic())
        status = {"/busy": 429, "/date": 503}.get(self.path, 200) if first else 200
        self.send_response(404 if self.path == "/gone" else status)
        if status == 429:
            self.send_header("Retry-After", "2")
        elif status == 503:
            self.send_header("Retry-After", self.date_time_string(int(time.time()) + 3))
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


def test_http_call_waits_as_long_as_retry_after_asks(start: Callable[..., Program]) -> None:
    Moody.seen = {}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Moody)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        program = start("http_call.py", *(f"{address}/{path}" for path in ("busy", "date", "gone", "fine")), "file:///etc/passwd")
        assert program.process.wait(50) == 0, program.output
    finally:
        server.shutdown()
        server.server_close()
    assert f"{address}/busy completed attempts=2" in program.output
    assert f"{address}/date completed attempts=2" in program.output
    assert f"{address}/gone dead_letter attempts=1 HTTP 404" in program.output
    assert f"{address}/fine completed attempts=1" in program.output
    assert "dead_letter attempts=1 url: must be http or https" in program.output
    busy, date = Moody.seen["/busy"], Moody.seen["/date"]
    assert busy[1] - busy[0] >= 2.0 and date[1] - date[0] >= 1.9   # the date has whole seconds


def test_exactly_once_survives_failures_and_kill_9(start: Callable[..., Program], conn: psycopg.Connection[Any]) -> None:
    for _ in range(2):
        program = start("exactly_once.py")
        program.printed(r"^\d+ deposits left")
        program.process.kill()
        program.process.wait()
        assert (conn.execute("select sum(balance) from savings").fetchone() or (200,))[0] < 200, "killed too late to prove anything"
    last = start("exactly_once.py")
    assert last.process.wait(50) == 0, last.output
    assert re.findall(r"^balance (\d+)$", last.output, re.MULTILINE) == ["200"]
    assert conn.execute("select sum(balance) from savings").fetchone() == (200,)
    failed = "select count(*) from orchestrator.task_events where event = 'failed' and detail like '%before the commit%'"
    assert (conn.execute(failed).fetchone() or (0,))[0] > 0, "no attempt failed half-way: the test proves nothing"


def test_psql_only_is_a_producer_a_worker_and_an_operator(installed: str, server: Server) -> None:
    result = subprocess.run([server.bin / "psql", "-X", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-f", EXAMPLES / "psql_only.sql", installed],
                            check=False, capture_output=True, text=True, timeout=50)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = [line for line in result.stdout.splitlines() if line]
    assert lines.count("t") >= 2 and "f" not in lines
    assert "2|nobody answered again" in lines
    assert [line.split("|")[0] for line in lines if "|" in line and line.split("|")[0] in ("failed", "retry_scheduled", "dead_letter")] == [
        "failed", "retry_scheduled", "failed", "dead_letter"]
    assert any(line.endswith("|rejected") for line in lines)
    assert lines[lines.index("pending") + 1] == "cancelled"
    assert lines[-1] == "0", "audit() finds nothing"


# -------------------------------------------------------------------------------------------------- with others' packages
def lines_of(program: Program) -> list[dict[str, Any]]:
    """What it printed as JSON, once it has ended."""
    assert program.process.wait(50) == 0, program.output
    return [json.loads(line) for line in program.output.splitlines() if line.startswith("{")]


@pytest.mark.parametrize(("name", "table", "kind"), [
    ("fastapi_app.py", "fastapi_orders", "application/json"), ("flask_app.py", "flask_orders", "application/x-www-form-urlencoded")])
def test_web_frameworks_store_an_order_and_its_task_together_or_neither(
        start: Callable[..., Program], conn: psycopg.Connection[Any], name: str, table: str, kind: str) -> None:
    program = start(name, "0")
    address = re.findall(r"http://[\d.:]+", program.printed("(running on |^)http://"))[0] + "/orders"
    status, placed = ask(address, {"customer": "Ada"}, kind)
    assert status == 201
    eventually(lambda: ask(f"{address}/{placed['order']}") == (200, {"customer": "Ada", "status": "confirmed"}))
    assert conn.execute("select id::text, payload from orchestrator.tasks").fetchall() == [(placed["task"], {"order": placed["order"]})]
    assert ask(address, {"customer": ""}, kind)[0] == 400
    assert ask(f"{address}/2")[0] == 404
    assert conn.execute(f"select (select count(*) from orchestrator.tasks), (select count(*) from {table})").fetchone() == (1, 1)
    program.process.send_signal(signal.SIGINT)
    program.printed("worker .* stopped")
    assert conn.execute("select status::text from orchestrator.tasks").fetchall() == [("completed",)]


def test_django_stores_an_order_and_its_task_together_or_neither(start: Callable[..., Program], conn: psycopg.Connection[Any]) -> None:
    program = start("django_project.py")   # which uses "django_backend.py"
    assert program.process.wait(40) == 0, program.output
    assert "confirmed: Ada in de, attempt 1" in program.output
    assert conn.execute("select customer, status from django_orders").fetchall() == [("Ada", "confirmed")]
    tasks = conn.execute("select type, priority, status::text, payload from orchestrator.tasks").fetchall()
    assert tasks == [("django:emails:__main__.confirm", 5, "completed", {"args": [1], "kwargs": {"language": "de"}})]


def test_the_django_backend_does_what_djangos_own_promise(installed: str, tmp_path: Path) -> None:
    """In a process of its own, since Django has one configuration a process."""
    (tmp_path / "jobs.py").write_text("""if True:
        from django_project import task

        @task
        async def double(n):
            return {"n": [2 * n, (1,)]}

        @task(takes_context=True)
        def fail(context):
            raise LookupError(f"attempt {context.attempt}")""")
    (tmp_path / "checks.py").write_text("""if True:
        import asyncio, contextlib, datetime
        from django_project import app, confirm, run, transaction
        from django_backend import TaskResultStatus as Status, exceptions, signals
        from jobs import double, fail

        def refused(error, call, *args, **kwargs):
            try:
                call(*args, **kwargs)
            except error:
                return
            raise AssertionError(f"{error} was not raised")

        seen = []
        signals.task_enqueued.connect(lambda sender, task_result, **kwargs: seen.append(task_result.id), weak=False)
        app.handler("django:", run, max_retries=1, base_delay=0)
        with transaction.atomic():
            result = double.enqueue(4)
            assert result.status == Status.READY and app.get(result.id) is None, "it is not committed yet"
            with contextlib.suppress(KeyError), transaction.atomic():
                undone = double.enqueue(5)
                raise KeyError
        later = double.using(run_after=datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1), priority=7).enqueue(6)
        failed = fail.enqueue()
        assert seen == [result.id, undone.id, later.id, failed.id]
        assert app.drain("django:emails:*") == {}
        assert app.drain() == {"completed": 1, "retry_scheduled": 1, "dead_letter": 1}

        result.refresh()
        assert (result.status, result.return_value, result.attempts) == (Status.SUCCESSFUL, {"n": [8, [1]]}, 1)
        assert result.enqueued_at <= result.started_at <= result.finished_at and result.errors == []
        failed.refresh()
        assert (failed.status, failed.attempts, failed.is_finished) == (Status.FAILED, 2, True)
        assert [f"LookupError: attempt {n}" in error.traceback for n, error in enumerate(failed.errors, 1)] == [True, True]
        later = double.get_result(later.id)
        assert (later.status, later.task.priority, later.args, later.finished_at) == (Status.READY, 7, [6], None)

        for nothing in (undone.id, app.enqueue("other:kind:of"), "x", None):
            refused(exceptions.TaskResultDoesNotExist, double.get_result, nothing)
        refused(exceptions.TaskResultMismatch, confirm.get_result, result.id)
        refused(TypeError, double.enqueue, object())

        async def main():
            result = await double.aenqueue(1)
            await result.arefresh()
            assert result.status == Status.READY

        asyncio.run(main())
        print("all is well")""")
    result = subprocess.run([sys.executable, "checks.py"], check=False, cwd=tmp_path, capture_output=True, text=True, timeout=50,
                            env=clean_environment(DATABASE_URL=installed, PYTHONPATH=f"{EXAMPLES}:{REPOSITORY}"))
    assert result.stdout == "all is well\n", result.stdout + result.stderr


def test_a_django_worker_is_the_module_of_the_documents(
        worker_process: Callable[..., Any], installed: str, conn: psycopg.Connection[Any], tmp_path: Path) -> None:
    [worker] = re.findall(r"```python\n(import os, django .*?)```", (REPOSITORY / "docs/integrations.md").read_text(), re.DOTALL)
    (tmp_path / "worker.py").write_text(worker)
    (tmp_path / "mysite").mkdir()
    address = psycopg.conninfo.conninfo_to_dict(installed)
    names = {"NAME": address["dbname"], "USER": address["user"], "HOST": address["host"], "PORT": address["port"]}
    (tmp_path / "mysite" / "settings.py").write_text(
        f"DATABASES = {{'default': {names | {'ENGINE': 'django.db.backends.postgresql'}}}}\n"
        "TASKS = {'default': {'BACKEND': 'django_backend.OrchestratorBackend'}}\nUSE_TZ = True\n")
    (tmp_path / "mysite" / "tasks.py").write_text("""if True:
        try:
            from django.tasks import task
        except ImportError:   # Django 5.2
            from django_tasks import task

        @task(takes_context=True)
        def double(context, n):
            return [2 * n, context.attempt]""")
    conn.execute("select orchestrator.enqueue('django:default:mysite.tasks.double', '{\"args\": [4], \"kwargs\": {}}')")
    worker_process(installed, HANDLERS=tmp_path / "worker.py", PYTHONPATH=f"{EXAMPLES}:{tmp_path}")
    eventually(lambda: conn.execute("select result from orchestrator.tasks where status = 'completed'").fetchone() == ([8, 1],))


def test_pydantic_payload_refuses_wrong_payloads_by_the_names_of_the_fields(start: Callable[..., Program]) -> None:
    program = start("pydantic_payload.py")
    assert program.process.wait(40) == 0, program.output
    good, *bad = re.findall(r"^(?:completed|dead_letter) .*$", program.output, re.MULTILINE)
    assert good == "completed {'due': '2030-01-31', 'amount': '39.80', 'number': 1, 'currency': 'EUR'}"
    assert [re.findall(r"(\w+): ", line) for line in bad] == [["due", "currency"], ["amount", "paid"]]
    assert [line.split()[0] for line in bad] == ["dead_letter", "dead_letter"]


def test_asyncio_program_gets_its_results(start: Callable[..., Program], conn: psycopg.Connection[Any]) -> None:
    program = start("asyncio_program.py")
    assert program.process.wait(40) == 0, program.output
    assert sorted(re.findall(r"^completed .*$", program.output, re.MULTILINE)) == [f"completed /{page} by asyncio" for page in "abcd"]
    assert conn.execute("select count(*) from orchestrator.tasks where max_retries = 5").fetchone() == (4,)
    assert (conn.execute("select count(*) from orchestrator.tasks where payload ->> 'url' ~ '/next'").fetchone() or (0,))[0] == 4


def test_structured_logs_have_the_task_in_each_line_of_its_handler(start: Callable[..., Program], conn: psycopg.Connection[Any]) -> None:
    lines = {line["event"].split(":")[0]: line for line in lines_of(start("structured_logs.py"))}
    (task_id,) = conn.execute("select id::text from orchestrator.tasks").fetchone() or ("",)
    for event, logger in (("shipping", "shop"), ("the printer is low on paper", "a.library.that.knows.no.structlog")):
        line = lines[event]
        assert (line["task_id"], line["task_type"], line["attempt"], line["logger"]) == (task_id, "parcel:ship", 1, logger)
    assert lines["shipping"]["order"] == 7
    assert lines["task completed"]["task_id"] == task_id and lines["task completed"]["duration"] >= 0
    assert "task_id" not in lines["outside of any task"]


def test_opentelemetry_traces_lead_from_enqueue_to_run_and_retries_link_back(start: Callable[..., Program]) -> None:
    spans = lines_of(start("opentelemetry_traces.py"))
    request, first, again, label, ship = spans
    assert [span["name"] for span in spans] == [
        "POST /orders", "process order:confirm", "process order:confirm", "print the label", "process order:ship"]
    trace_of, id_of = (lambda span: span["context"]["trace_id"]), (lambda span: span["context"]["span_id"])
    assert (trace_of(first), first["parent_id"]) == (trace_of(request), id_of(request))
    assert (first["status"]["status_code"], first["events"][0]["attributes"]["exception.type"]) == ("ERROR", "ConnectionError")
    assert trace_of(again) != trace_of(request) and again["parent_id"] is None
    assert [link["context"]["span_id"] for link in again["links"]] == [id_of(request)]
    assert (again["status"]["status_code"], again["attributes"]["task.attempt"]) == ("UNSET", 2)
    assert (trace_of(ship), ship["parent_id"]) == (trace_of(again), id_of(again))   # enqueued inside of a handler
    assert (trace_of(label), label["parent_id"]) == (trace_of(again), id_of(ship))   # inside of a coroutine
    assert {span["kind"] for span in (first, again, ship)} == {"SpanKind.CONSUMER"}


class Sentry(http.server.BaseHTTPRequestHandler):
    """Keeps the items of the envelopes that it gets: their type and their content."""

    items: list[tuple[str, dict[str, Any]]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Content-Encoding"] == "gzip":
            body = gzip.decompress(body)
        _, *lines = [json.loads(line) for line in body.splitlines() if line]
        self.items += [(head["type"], content) for head, content in zip(lines[::2], lines[1::2], strict=True)]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


def test_sentry_errors_have_the_task_and_the_trace_of_the_request(start: Callable[..., Program], conn: psycopg.Connection[Any]) -> None:
    Sentry.items = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Sentry)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        program = start("sentry_errors.py", SENTRY_DSN=f"http://key@127.0.0.1:{server.server_port}/1")
        assert program.process.wait(50) == 0, program.output
    finally:
        server.shutdown()
        server.server_close()
    ids = dict(conn.execute("select type || ' ' || status::text, id::text from orchestrator.tasks").fetchall())
    events = [content for kind, content in Sentry.items if kind == "event"]
    told = sorted((each["exception"]["values"][-1]["type"], each["level"], each["contexts"]["task"]["attempt"], each["tags"]["task.id"])
                  for each in events)
    confirm, check = ids["order:receipt dead_letter"], ids["order:check dead_letter"]
    assert told == [("ConnectionError", "error", 2, confirm), ("ConnectionError", "warning", 1, confirm), ("Discard", "error", 1, check)]
    traces = [(content["transaction"], content["contexts"]["trace"]["trace_id"]) for kind, content in Sentry.items if kind == "transaction"]
    assert sorted(name for name, _ in traces) == ["POST /orders", "order:check", "order:check", "order:receipt", "order:receipt"]
    assert {each["contexts"]["trace"]["trace_id"] for each in events} == {dict(traces)["POST /orders"]}
