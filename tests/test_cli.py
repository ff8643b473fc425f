"""The command line: every command, what it prints, and its exit code: 0 done, 1 not found or refused, 2 bad input."""
from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

import orchestrator
from apps import running, wait_for
from conftest import PROGRAM, WorkerProcess, clean_environment
from postgres import Server, eventually, processes_below
from steps import column, value

Connection = psycopg.Connection[Any]
Run = Callable[..., subprocess.CompletedProcess[str]]
UNKNOWN = "01890000-0000-7000-8000-000000000000"


class Answer:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        assert self.code in (0, 1), self.err
        return json.loads(self.out)


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """The command line sets logging up for its process."""
    before = orchestrator.log.handlers[:], orchestrator.log.propagate, orchestrator.log.level
    yield
    orchestrator.log.handlers[:], orchestrator.log.propagate, orchestrator.log.level = before


@pytest.fixture
def cli(installed: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Answer]:
    """The command line in this process, which spares each call 0.3 s; those that need a process of their own use run_cli."""
    monkeypatch.setattr(signal, "signal", lambda *args: None)   # psql ignores Ctrl-C: not the tests

    def call(*args: str) -> Answer:
        try:
            code = orchestrator.main(["--database-url", installed, *args])
        except SystemExit as end:   # argparse
            code = int(end.code or 0)
        out, err = capfd.readouterr()
        return Answer(code, out, err)

    return call


def refused(answer: Answer, words: str) -> None:
    """Bad input: one line, no traceback, exit code 2."""
    assert answer.code == 2 and answer.out == ""
    assert re.fullmatch(rf"error: .*{words}.*\n", answer.err), answer.err


# -------------------------------------------------------------------------------------------------------------- enqueue
def test_enqueue_prints_the_id(cli: Callable[..., Answer], conn: Connection) -> None:
    task_id = cli("enqueue", "a", '{"n": 1}', "--priority", "-5", "--key", "k", "--max-retries", "2").out.strip()
    row = conn.execute("select id::text, type, payload, priority, idempotency_key, max_retries, status from orchestrator.tasks").fetchone()
    assert row == (task_id, "a", {"n": 1}, -5, "k", 2, "pending")
    assert cli("enqueue", "a", "--key", "k", "--json").json == {"id": task_id}


def test_enqueue_takes_a_delay_or_a_moment(cli: Callable[..., Answer], conn: Connection) -> None:
    for args in (["--delay", "10m"], ["--run-at", "2030-01-31T12:00:00+00:00"], ["--run-at", "2030-01-31"]):
        assert cli("enqueue", "a", *args).code == 0
    assert value(conn, "select count(*) from orchestrator.tasks where next_retry_at > now() + interval '9 minutes'") == 3


REFUSED = [
    (["a", "{"], "payload: is not JSON"), (["a", "NaN"], "payload: is not JSON"), (["a", "[" * 100_000], "payload: is not JSON"),
    (["a", '"\\u0000"'], "payload: .*U.0000"), (["a*"], "type: "), ([], "TYPE: "),
    (["a", "--delay", "soon"], "--delay: must be a duration"), (["a", "--delay=-1s"], "--delay: "),
    (["a", "--key", ""], "idempotency_key: "),
    (["a", "--run-at", "tomorrow"], "--run-at: must be a moment"), (["a", "--run-at", "9999-12-31T23:59:59"], "run.at: "),
    (["a", "--run-at", "0001-01-01"], "run.at: "),
    (["a", "--delay", "1s", "--run-at", "2030-01-31"], "delay: give either"), (["a", "--max-retries", "-1"], "max_retries: "),
    (["a", "--priority", "9999999999"], "priority: "), (["--file", "/no/such/file"], "--file: cannot read"), (["--file", "/"], "--file: ")]


def test_enqueue_refuses_in_one_line(cli: Callable[..., Answer], conn: Connection) -> None:
    for args, words in REFUSED:
        refused(cli("enqueue", *args), words)
    assert value(conn, "select count(*) from orchestrator.tasks") == 0


def test_arguments_that_do_not_exist_or_parse_end_with_2(cli: Callable[..., Answer]) -> None:
    for args in (["--priority", "high"], ["--max-retries", "1.5"], ["--colour", "blue"], ["{}", "extra"]):
        answer = cli("enqueue", "a", *args)
        assert answer.code == 2 and "error: " in answer.err and "Traceback" not in answer.err


# ------------------------------------------------------------------------------------------------------- enqueue --file
LINES = [
    '{"type": "a", "payload": {"n": 1}}',
    "",
    "{nonsense",                                              # 3
    '{"type": "b", "payload": [2], "priority": 7, "max_retries": 0, "idempotency_key": "k"}',
    '{"payload": {}}',                                        # 5: no type
    '{"type": "a", "priority": "high"}',                      # 6
    '{"type": "a", "priority": true}',                        # 7
    '{"type": "a", "colour": "blue"}',                        # 8
    "[1]",                                                    # 9
    '{"type": "a", "payload": "\\u0000"}',                    # 10
    '{"type": "a", "payload": NaN}',                          # 11
    '{"type": "a", "run_at": "tomorrow"}',                    # 12
    '{"type": "a*"}',                                         # 13
    '{"type": "a", "priority": 99999999999}',                 # 14
    '{"type": "b", "idempotency_key": "k"}',                  # 15: known already
    '{"type": "a", "run_at": "2030-01-31T12:00:00+00:00", "payload": null}',
    '{"type": "a", "payload": %s}' % ("[" * 100_000),         # 17
    '{"type": "a", "payload": "%s"}' % ("x" * 300_000),       # 18
]
BAD_LINES = [3, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 17, 18, 19]


@pytest.fixture
def tasks_file(tmp_path: Path) -> Path:
    path = tmp_path / "tasks.jsonl"
    path.write_bytes("\n".join(LINES).encode() + b'\n{"type": "\xff"}\n{"type": "last"}')
    return path


def test_a_file_goes_in_but_for_its_bad_lines(cli: Callable[..., Answer], conn: Connection, tasks_file: Path) -> None:
    answer = cli("enqueue", "--file", str(tasks_file), "--json")
    assert answer.code == 2 and json.loads(answer.out) == {"created": 4, "known": 1, "bad": len(BAD_LINES)}
    numbers = [int(number) for number in re.findall(r"^line (\d+): ", answer.err, re.MULTILINE)]
    assert sorted(numbers) == BAD_LINES and len(answer.err.splitlines()) == len(BAD_LINES) and "xxx" not in answer.err
    assert sorted(column(conn, "select type from orchestrator.tasks")) == ["a", "a", "b", "last"]
    assert conn.execute("select payload, priority, max_retries from orchestrator.tasks where type = 'b'").fetchone() == ([2], 7, 0)


def test_a_file_may_stop_at_its_first_bad_line(cli: Callable[..., Answer], conn: Connection, tasks_file: Path) -> None:
    answer = cli("enqueue", "--file", str(tasks_file), "--on-error", "stop")
    assert answer.code == 2 and answer.out == "1 enqueued, 0 known already, 1 bad lines\n" and answer.err.startswith("line 3: ")
    assert column(conn, "select type from orchestrator.tasks") == ["a"]


def test_stopping_keeps_what_came_before_and_nothing_after(cli: Callable[..., Answer], conn: Connection, tmp_path: Path) -> None:
    lines = [{"type": "a", "payload": 1}, {"type": "b*"}, {"type": "a", "payload": 3}, {"type": "c"}]
    (tmp_path / "f").write_text("\n".join(map(json.dumps, lines)))
    assert cli("enqueue", "--file", str(tmp_path / "f"), "--on-error", "stop").code == 2
    assert column(conn, "select type from orchestrator.tasks") == ["a"]


def test_stopping_names_only_the_first_bad_line(cli: Callable[..., Answer], conn: Connection, tmp_path: Path) -> None:
    """Line 2 is refused by the database, to which it goes with its neighbours; line 4 is found bad at once."""
    (tmp_path / "f").write_text('{"type": "a"}\n{"type": "a", "idempotency_key": ""}\n{"type": "a"}\n{nonsense\n')
    answer = cli("enqueue", "--file", str(tmp_path / "f"), "--on-error", "stop")
    assert answer.code == 2 and answer.out == "1 enqueued, 0 known already, 1 bad lines\n"
    assert answer.err.startswith("line 2: ") and len(answer.err.splitlines()) == 1


def test_a_null_in_a_file_is_as_if_it_were_left_out(cli: Callable[..., Answer], conn: Connection, tmp_path: Path) -> None:
    names = ("type", "payload", "priority", "idempotency_key", "max_retries", "run_at")
    (tmp_path / "f").write_text(json.dumps(dict.fromkeys(names)) + '\n{"run_at": ""}\n')
    answer = cli("enqueue", "a", "--priority", "3", "--max-retries", "7", "--file", str(tmp_path / "f"))
    assert answer.code == 2 and answer.out.startswith("1 enqueued") and answer.err.startswith("line 2: run_at: ")
    assert conn.execute("select type, payload, priority, idempotency_key, max_retries, next_retry_at from orchestrator.tasks"
                        ).fetchall() == [("a", {}, 3, None, 7, None)]


def test_a_long_file_of_many_kinds_is_streamed(cli: Callable[..., Answer], conn: Connection, tmp_path: Path) -> None:
    with (tmp_path / "f").open("w") as file:
        for n in range(30_000):
            file.write(f'{{"type": "a", "payload": {n}, "priority": {n % 7}}}\n')
    assert cli("enqueue", "--file", str(tmp_path / "f")).out == "30000 enqueued, 0 known already, 0 bad lines\n"
    assert value(conn, "select sum(payload::int) from orchestrator.tasks") == sum(range(30_000))


def test_a_dash_is_standard_input_and_the_type_may_come_from_the_command_line(run_cli: Run, installed: str, conn: Connection) -> None:
    done = run_cli("enqueue", "a", "--priority", "3", "--file", "-", env={"DATABASE_URL": installed},
                   stdin='{"payload": 1}\n{"payload": 2, "priority": 5, "type": "b"}\n')
    assert (done.returncode, done.stderr) == (0, "")
    assert conn.execute("select type, priority from orchestrator.tasks order by id").fetchall() == [("a", 3), ("b", 5)]


# ------------------------------------------------------------------------------------------------------ list, show, stats
def test_list_shows_the_newest_first_and_pages(cli: Callable[..., Answer]) -> None:
    ids = [cli("enqueue", kind).out.strip() for kind in ("a", "b", "a")]
    assert [task["id"] for task in cli("list", "--json").json] == ids[::-1]
    assert [task["id"] for task in cli("list", "--json", "--type", "a", "--limit", "1").json] == [ids[2]]
    assert [task["id"] for task in cli("list", "--json", "--before", ids[1]).json] == [ids[0]]
    assert cli("list", "--json", "--status", "completed").json == []
    table = cli("list").out.splitlines()
    assert table[0].split()[:3] == ["id", "type", "status"] and [line.split()[0] for line in table[1:]] == ids[::-1]


def test_list_refuses_bad_filters(cli: Callable[..., Answer]) -> None:
    for args in (["--status", "lost"], ["--limit", "0"], ["--limit", "-1"], ["--limit", "many"], ["--limit", "1001"], ["--before", "x"]):
        answer = cli("list", *args)
        assert answer.code == 2 and "error: " in answer.err and "Traceback" not in answer.err
        assert "--database-url" in answer.err or "DATABASE_URL" not in answer.err


def test_show_tells_the_story_without_secrets_and_without_steering_the_terminal(cli: Callable[..., Answer]) -> None:
    task_id = cli("enqueue", "a", '{"password": "canary", "x": "\\u001b[31mred"}').out.strip()
    shown = cli("show", task_id)
    assert shown.code == 0 and "a " + task_id + ": pending" in shown.out and "no live worker handles a" in shown.out
    assert "canary" not in shown.out and "\x1b" not in shown.out
    story = cli("show", task_id, "--json").json
    assert story["id"] == task_id and story["payload"]["password"] == "[redacted]" and story["events"] == []


def test_an_unknown_task_is_1_and_no_id_at_all_2(cli: Callable[..., Answer]) -> None:
    for command in ("show", "cancel", "retry"):
        assert cli(command, UNKNOWN).code == 1
        refused(cli(command, "x"), "id: must be a task's id")
    refused(cli("retry"), "ID: ")


def test_cancel_and_retry(cli: Callable[..., Answer], conn: Connection) -> None:
    task_id = cli("enqueue", "a").out.strip()
    assert cli("cancel", task_id).out == "cancelled\n"
    assert cli("cancel", task_id, "--json").json == {"id": task_id, "status": "cancelled"}
    assert cli("retry", task_id, "--json").json == {"id": task_id, "status": "pending"}
    conn.execute("select orchestrator.register_worker('w', 'host', 1, '1', '{\"a\": {}}')")
    conn.execute("select from orchestrator.claim_tasks('w', '{a}', 1)")
    assert (cli("cancel", task_id).out, cli("cancel", task_id).code) == ("cancelling\n", 0)
    conn.execute("select orchestrator.complete_tasks(array[claim_id], '{1}', array[id]) from orchestrator.tasks")
    assert cli("cancel", task_id).out == "cancelled\n"
    conn.execute("update orchestrator.tasks set status = 'completed'")
    assert [(cli(command, task_id).code, cli(command, task_id).out) for command in ("cancel", "retry")] == [(1, "completed\n")] * 2


def test_retry_of_dead_letters(cli: Callable[..., Answer], conn: Connection) -> None:
    conn.execute("select orchestrator.register_worker('w', 'host', 1, '1', '{\"a\": {}, \"b\": {}}')")
    for kind in ("a", "a", "b"):
        cli("enqueue", kind)
    conn.execute("select from orchestrator.claim_tasks('w', '{a,b}', 5)")
    conn.execute("select orchestrator.fail_task(claim_id, id, 'bad', null, true) from orchestrator.tasks")
    assert cli("retry", "--dead-letters", "--type", "a", "--limit", "1", "--json").json == {"retried": 1}
    assert cli("retry", "--dead-letters").out.startswith("2 dead letters")
    assert cli("retry", "--dead-letters", "--json").json == {"retried": 0}


def test_pause_and_resume(cli: Callable[..., Answer], conn: Connection) -> None:
    assert cli("pause", "a", "--json").json == {"paused": "a", "changed": True}
    assert value(conn, "select paused from orchestrator.task_types where type = 'a'")
    assert (cli("resume", "a").code, cli("resume", "a").code) == (0, 1)
    refused(cli("pause", "a*"), "type: ")


def test_stats_and_audit(cli: Callable[..., Answer], conn: Connection) -> None:
    cli("enqueue", "a")
    cli("pause", "a")
    (row,) = cli("stats", "--json").json
    assert (row["type"], row["waiting"], row["in_flight"], row["paused"]) == ("a", 1, 0, True)
    assert cli("stats").out.splitlines()[0].split()[:2] == ["type", "waiting"]
    assert cli("audit", "--json").json == []
    conn.execute("select orchestrator.register_worker('w', 'host', 1, '1')")
    conn.execute("insert into orchestrator.claims (worker_id, open_tasks) values ('w', 3)")   # holds nothing
    answer = cli("audit")
    assert answer.code == 1 and "open_tasks" in answer.out


def test_pipes_that_close_are_no_error(installed: str, conn: Connection) -> None:
    conn.execute("select orchestrator.enqueue_many('a', array_fill('{}'::jsonb, array[1000]))")
    done = subprocess.run(f"{sys.executable} {PROGRAM} list --limit 1000 | head -1", check=True, shell=True, capture_output=True, text=True,
                          env=clean_environment(DATABASE_URL=installed))
    assert done.stdout.startswith("id ") and done.stderr == ""


# -------------------------------------------------------------------------------------------------------- install, psql
def test_install_makes_the_schema_and_may_be_repeated(run_cli: Run, db: str) -> None:
    before = run_cli("stats", env={"DATABASE_URL": db})
    assert before.returncode == 2 and "run `python orchestrator.py install`" in before.stderr and before.stderr.count("\n") == 1
    for _ in range(2):
        assert json.loads(run_cli("install", "--json", env={"DATABASE_URL": db}).stdout) == {"schema_version": orchestrator.SCHEMA_VERSION}
    assert run_cli("stats", "--json", env={"DATABASE_URL": db}).stdout == "[]\n"


def test_install_print_is_sql_that_psql_loads(run_cli: Run, server: Server, db: str) -> None:
    printed = run_cli("install", "--print")
    assert printed.returncode == 0
    subprocess.run([server.bin / "psql", "-q", "-v", "ON_ERROR_STOP=1", "-d", db], check=True, input=printed.stdout, text=True,
                   capture_output=True)
    with psycopg.connect(db) as conn:
        assert value(conn, "select orchestrator.schema_version()") == orchestrator.SCHEMA_VERSION


@pytest.mark.parametrize("args", [
    ["-tAc", "select 6 * 7"], ["-t", "-A", "-c", "select 6 * 7"], ["-X", "-tA", "--command", "select 6 * 7", "-q"]])
def test_psql_opens_on_the_database_in_use(run_cli: Run, server: Server, installed: str, args: list[str]) -> None:
    done = run_cli("psql", *args, env={"DATABASE_URL": installed, "PATH": f"{server.bin}:{os.environ['PATH']}"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "42\n", "")


def test_psql_gets_the_password_by_the_environment(folder: Path, run_cli: Run) -> None:
    psql = folder / "bin" / "psql"
    psql.parent.mkdir()
    psql.write_text('#!/bin/sh\necho "$@"; echo "$PGPASSWORD" >&2; exit 3\n')
    psql.chmod(0o755)
    done = run_cli("psql", env={"DATABASE_URL": "postgresql://u:canary@127.0.0.1:1/db", "PATH": f"{psql.parent}:/usr/bin:/bin"})
    assert done.returncode == 3 and "canary" not in done.stdout and "user=u" in done.stdout and done.stderr == "canary\n"


def test_version_and_help(run_cli: Run) -> None:
    assert run_cli("--version").stdout == f"orchestrator {orchestrator.VERSION} (schema {orchestrator.SCHEMA_VERSION})\n"
    shown = run_cli("--help")
    assert shown.returncode == 0 and all(word in shown.stdout for word in ("enqueue", "--worker-pool-size", "Guarantees"))
    assert run_cli("nonsense").returncode == 2


# ------------------------------------------------------------------------------------------------------ the embedded database
def test_commands_and_a_worker_share_the_embedded_database(folder: Path, run_cli: Run) -> None:
    (folder / "handlers.py").write_text("HANDLERS = {'a': lambda task: task.payload['n'] + 1}\n")
    with (folder / "log").open("w") as log:
        worker = subprocess.Popen([sys.executable, str(PROGRAM)], cwd=folder, stderr=log, stdout=log, start_new_session=True,
                                  env=clean_environment(METRICS_PORT=0))
    try:
        assert eventually(lambda: " started: " in (folder / "log").read_text(), 30)
        commands = [subprocess.Popen([sys.executable, str(PROGRAM), "enqueue", "a", f'{{"n": {n}}}'], cwd=folder, stdout=subprocess.PIPE,
                                     text=True, env=clean_environment()) for n in range(2)]
        ids = [command.communicate(timeout=30)[0].strip() for command in commands]
        assert [command.returncode for command in commands] == [0, 0]

        def results() -> list[Any]:
            return [json.loads(run_cli("show", "--json", task_id).stdout)["result"] for task_id in ids]
        eventually(lambda: results() == [1, 2])
        assert run_cli("psql", "-tAc", "select count(*) from orchestrator.tasks").stdout == "2\n"
        assert re.search(r"psql: \S+/psql '?postgresql://", (folder / "log").read_text())
    finally:
        worker.terminate()
        assert worker.wait(30) == 0


def test_a_worker_brings_its_embedded_server_back_when_it_is_killed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with running("", {"a": lambda task: "ran"}) as app:
        assert app._embedded is not None
        pgdata = app._embedded.data / "pgdata"
        os.kill(int((pgdata / "postmaster.pid").read_text().split()[0]), signal.SIGKILL)
        eventually(lambda: not processes_below(pgdata))

        def ran_after() -> bool:
            try:
                return wait_for(app, app.enqueue("a"))["result"] == "ran"
            except psycopg.OperationalError:
                return False
        eventually(ran_after, 40)
    assert not processes_below(pgdata)


# ---------------------------------------------------------------------------------------------------------------- bad input
def test_a_database_that_is_down_is_one_line(run_cli: Run) -> None:
    for args in (["stats"], ["enqueue", "a"], ["install"]):
        done = run_cli(*args, env={"DATABASE_URL": "postgresql://user:canary@127.0.0.1:1/db"})
        assert done.returncode == 2 and re.fullmatch(r"error: DATABASE_URL: [^\n]+\n", done.stderr) and "canary" not in done.stderr


@pytest.mark.parametrize(("name", "text", "words"), [
    ("broken.py", "import no_such_module_anywhere\n", "No module named"), ("broken.py", "def f(:\n", "SyntaxError"),
    ("broken.py", "X = 1\n", "no dict HANDLERS"), ("broken.py", "HANDLERS = [1]\n", "no dict HANDLERS"),
    ("broken.py", "HANDLERS = {'a': 5}\n", "handler 'a'"), ("broken.py", "HANDLERS = {'a*b': print}\n", "handler 'a"),
    ("broken.py", "raise SystemExit('no')\n", "SystemExit"),
    ("broken.py", "from orchestrator import Handler\nHANDLERS = {'a': Handler(print, max_retries=-1)}\n", "max_retries"),
    ("other.py", "", "there is no file|cannot load")])
def test_a_handlers_module_that_does_not_load_is_one_line(
        folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], name: str, text: str, words: str) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (folder / name).write_text(text)
    assert orchestrator.main(["--database-url", "postgresql://127.0.0.1:1/db", "--handlers", "broken.py", "--metrics-port", "0"]) == 2
    assert re.fullmatch(rf"error: [^\n]*({words})[^\n]*\n", capfd.readouterr().err)


def test_a_port_in_use_is_one_line(run_cli: Run, installed: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run_cli(env={"DATABASE_URL": installed, "METRICS_PORT": taken.getsockname()[1]})
    assert done.returncode == 2 and re.fullmatch(r"error: METRICS_HOST, METRICS_PORT: [^\n]+\n", done.stderr)


@pytest.mark.parametrize("host", ["a" * 70 + ".b", "192.0.2.1"])   # no name at all; an address of another machine
def test_a_host_that_is_not_ours_is_one_line(capfd: pytest.CaptureFixture[str], host: str) -> None:
    assert orchestrator.main(["--database-url", "postgresql://127.0.0.1:1/db", "--metrics-host", host, "--metrics-port", "0"]) == 2
    assert re.fullmatch(r"error: METRICS_HOST, METRICS_PORT: [^\n]+\n", capfd.readouterr().err)


def test_a_worker_waits_for_a_database_that_is_down_and_says_so(worker_process: Callable[..., WorkerProcess]) -> None:
    worker = worker_process("postgresql://user:canary@127.0.0.1:1/db", wait=False)
    eventually(lambda: "waiting for the database at DATABASE_URL=postgresql://user:***@127.0.0.1:1/db" in worker.output)
    assert worker.process.poll() is None
    assert worker.stop() == 0 and "canary" not in worker.output and "Traceback" not in worker.output


def test_a_worker_refuses_a_schema_of_another_version(run_cli: Run, installed: str, conn: Connection) -> None:
    conn.execute("create or replace function orchestrator.schema_version() returns int language sql immutable as 'select 99'")
    done = run_cli(env={"DATABASE_URL": installed, "METRICS_PORT": 0})
    assert done.returncode == 2 and "schema there has version 99" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
