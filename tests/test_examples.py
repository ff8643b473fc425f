"""Each short program of examples/ does what it says, as a process on a real database."""
from __future__ import annotations

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

    def __init__(self, name: str, url: str, folder: Path, *args: str) -> None:
        self.log = Path(tempfile.mkstemp(prefix=name, dir=folder)[1])
        with self.log.open("w") as output:
            self.process = subprocess.Popen([sys.executable, str(EXAMPLES / name), *args], cwd=folder, stdin=subprocess.DEVNULL,
                                            stdout=output, stderr=output, env=clean_environment(DATABASE_URL=url, METRICS_PORT=0))

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

    def start(name: str, *args: str) -> Program:
        started.append(Program(name, installed, tmp_path, *args))
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


def ask(url: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
    try:
        with urllib.request.urlopen(url, None if body is None else json.dumps(body).encode(), timeout=10) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


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
    ("my_handlers.py", "worker .* started"), ("alerting.py", "^watching"), ("exactly_once.py", "deposits left")])
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
