"""The command line: every command, what it prints, and its exit code: 0 done, 1 not found or refused, 2 bad input."""
from __future__ import annotations

import functools
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest

import orchestrator
from apps import running, wait_for
from conftest import PROGRAM, START, WorkerProcess, clean_environment
from postgres import Server, eventually, processes_below
from steps import column, row, value

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
    """The command line sets logging up for its process, a worker's for all loggers, and takes numbers of any length."""
    loggers = orchestrator.log, logging.getLogger()
    before = [(logger.handlers[:], logger.propagate, logger.level) for logger in loggers]
    digits = sys.get_int_max_str_digits()
    yield
    sys.set_int_max_str_digits(digits)
    for logger, state in zip(loggers, before, strict=True):
        logger.handlers[:], logger.propagate, logger.level = state


@pytest.fixture
def cli_on(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Answer]:
    """The command line in this process, which spares each call 0.3 s; those that need a process of their own use run_cli."""
    monkeypatch.setattr(signal, "signal", lambda *args: None)   # psql ignores Ctrl-C: not the tests

    def call(url: str, *args: str) -> Answer:
        code = orchestrator.main(["--database-url", url, *args])
        out, err = capfd.readouterr()
        return Answer(code, out, err)

    return call


@pytest.fixture
def cli(cli_on: Callable[..., Answer], installed: str) -> Callable[..., Answer]:
    return functools.partial(cli_on, installed)


def refused(answer: Answer, words: str) -> None:
    """Bad input: one line, no traceback, exit code 2."""
    assert answer.code == 2 and answer.out == ""
    assert re.fullmatch(rf"error: .*{words}.*\n", answer.err), answer.err


# -------------------------------------------------------------------------------------------------------------- enqueue
def test_enqueue_prints_the_id(cli: Callable[..., Answer], conn: Connection) -> None:
    task_id = cli("enqueue", "a", '{"n": 1}', "--priority", "-5", "--key", "k", "--max-retries", "2").out.strip()
    row = conn.execute("select id::text, type, payload, priority, idempotency_key, max_retries, status from orchestrator.tasks").fetchone()
    assert row == (task_id, "a", {"n": 1}, -5, "k", 2, "pending")


def test_enqueue_tells_whether_the_key_was_known(cli: Callable[..., Answer], conn: Connection) -> None:
    first = cli("enqueue", "a", "--key", "k", "--json").json
    assert first == {"id": value(conn, "select id::text from orchestrator.tasks"), "created": True}
    assert cli("enqueue", "a", "--key", "k", "--json").json == {"id": first["id"], "created": False}
    again = cli("enqueue", "a", "--key", "k")
    assert (again.code, again.out, again.err) == (0, first["id"] + "\n", "the key k is known: this is the id of the first task\n")
    assert cli("enqueue", "b", "--key", "k").err == ""


def test_enqueue_takes_a_delay_or_a_moment(cli: Callable[..., Answer], conn: Connection) -> None:
    for args in (["--delay", "10m"], ["--delay", "600"], ["--run-at", "2030-01-31T12:00:00+01:00"], ["--run-at", "2030-01-31T12:00Z"]):
        assert cli("enqueue", "a", *args).code == 0
    assert value(conn, "select count(*) from orchestrator.tasks where next_retry_at > now() + interval '9 minutes'") == 4
    assert value(conn, "select count(*) from orchestrator.tasks where next_retry_at = '2030-01-31 11:00Z'") == 1


def test_a_payload_may_stand_behind_the_flags(cli: Callable[..., Answer], conn: Connection) -> None:
    assert cli("enqueue", "a", "--priority", "1", '{"n": 1}').code == 0
    assert cli("schedule", "s", "@daily", "a", "--priority", "1", '{"n": 2}').code == 0
    assert value(conn, "select payload from orchestrator.tasks") == {"n": 1}
    assert value(conn, "select payload from orchestrator.schedules") == {"n": 2}
    refused(cli("enqueue", "a", "--priority", "1", "{"), "payload: is not JSON")


REFUSED = [
    (["a", "{"], "payload: is not JSON"), (["a", "NaN"], "payload: is not JSON"), (["a", "[" * 100_000], "payload: is not JSON"),
    (["a", '"\\u0000"'], "payload: .*U.0000"), (["a*"], "type: "), ([], "TYPE: "),
    (["a", "--delay", "soon"], "delay: must be a duration"), (["a", "--delay=-1s"], "delay: "),
    (["a", "--key", ""], "idempotency_key"),
    (["a", "--run-at", "tomorrow"], "--run-at: must be a moment"), (["a", "--run-at", "9999-12-31T23:59:59+00:00"], "run.at: "),
    (["a", "--run-at", "2027-03-28T02:30"], "--run-at: .* time zone"), (["a", "--run-at", "2030-01-31"], "--run-at: .* time zone"),
    (["a", "--delay", "1s", "--run-at", "2030-01-31T12:00Z"], "delay: give either"), (["a", "--max-retries", "-1"], "max_retries: "),
    (["a", "--priority", "9999999999"], "priority: must be a whole number from -1000000 to 1000000"),
    (["a", "--on-error", "stop"], "--on-error: goes with --file only"),
    (["--file", "/no/such/file"], "--file: cannot read"), (["--file", "/"], "--file: ")]


def test_enqueue_refuses_in_one_line(cli: Callable[..., Answer], conn: Connection) -> None:
    for args, words in REFUSED:
        refused(cli("enqueue", *args), words)
    assert value(conn, "select count(*) from orchestrator.tasks") == 0


def test_arguments_that_do_not_exist_or_parse_end_with_2(cli: Callable[..., Answer]) -> None:
    for args in (["--priority", "high"], ["--max-retries", "1.5"], ["--colour", "blue"], ["{}", "extra"]):
        refused(cli("enqueue", "a", *args), "")


def test_what_makes_no_sense_with_a_file_is_refused(cli: Callable[..., Answer], conn: Connection, tmp_path: Path) -> None:
    (tmp_path / "f").write_text('{"type": "a"}\n')
    for args, words in ((["--key", "k"], "--key: "), (["a", '{"n": 1}'], "PAYLOAD: "), (["--delay", "soon"], "delay: "),
                        (["--delay", "1h", "--run-at", "2030-01-31T12:00Z"], "delay: give either"),
                        (["--run-at", "2030-01-31"], "--run-at: "), (["--priority", "1000001"], "priority: "),
                        (["--max-retries", "1001"], "max_retries: "), (["--timeout", "1"], "--file: goes without")):
        refused(cli("enqueue", *args, "--file", str(tmp_path / "f")), words)
    assert value(conn, "select count(*) from orchestrator.tasks") == 0


def test_a_delay_or_a_moment_is_the_default_of_a_files_lines(cli: Callable[..., Answer], conn: Connection, tmp_path: Path) -> None:
    (tmp_path / "f").write_text('{"type": "a"}\n{"type": "own", "run_at": "2031-01-31T12:00:00+00:00"}\n')
    due = "select next_retry_at > now() + interval '59 minutes' from orchestrator.tasks where type = %s order by id desc limit 1"
    for args in (["--delay", "1h"], ["--run-at", "2030-01-31T12:00:00+00:00"]):
        assert cli("enqueue", *args, "--file", str(tmp_path / "f")).out == "2 enqueued, 0 known already, 0 bad lines\n"
        assert value(conn, due, "a")
    assert value(conn, "select count(*) from orchestrator.tasks where next_retry_at = '2031-01-31 12:00Z'") == 2


def test_a_concurrency_key_is_the_default_of_a_files_lines(cli: Callable[..., Answer], conn: Connection, tmp_path: Path) -> None:
    (tmp_path / "f").write_text('{"type": "a"}\n{"type": "a", "concurrency_key": "own"}\n')
    assert cli("enqueue", "--concurrency-key", "tenant", "--file", str(tmp_path / "f")).code == 0
    assert column(conn, "select concurrency_key from orchestrator.tasks order by id") == ["tenant", "own"]


def test_the_byte_order_mark_of_a_file_is_no_part_of_its_first_line(
        cli: Callable[..., Answer], conn: Connection, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b'\xef\xbb\xbf{"type": "a"}\r\n{"type": "b"}\r\n')
    assert cli("enqueue", "--file", str(tmp_path / "f")).out == "2 enqueued, 0 known already, 0 bad lines\n"
    (tmp_path / "f").write_bytes(b'{"type": "a"}\n\xef\xbb\xbf{"type": "b"}\n')
    assert cli("enqueue", "--file", str(tmp_path / "f")).err.startswith("line 2: is not JSON")


def test_a_line_of_any_length_takes_bounded_memory_and_the_next_one_keeps_its_number(
        cli: Callable[..., Answer], conn: Connection, tmp_path: Path) -> None:
    with (tmp_path / "f").open("wb") as file:
        file.write(b'{"type": "a"}\n{"type": "b", "payload": "')
        for _ in range(20):
            file.write(b"x" * 2 ** 20)
        file.write(b'"}\n{"type": "c"}\n{nonsense\n{"type": "d", "payload": "\0"}')
    answer = cli("enqueue", "--file", str(tmp_path / "f"))
    assert [line.split(":")[0] for line in answer.err.splitlines()] == ["line 2", "line 4", "line 5"]
    assert "line 2: is longer than" in answer.err and answer.out.startswith("2 enqueued")
    assert column(conn, "select type from orchestrator.tasks order by id") == ["a", "c"]


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
    assert answer.code == 2 and answer.out == "1 enqueued, 0 known already, 1 bad line\n" and answer.err.startswith("line 3: ")
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
    assert answer.code == 2 and answer.out == "1 enqueued, 0 known already, 1 bad line\n"
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
        for n in range(5000):
            file.write(f'{{"type": "a", "payload": {n}, "priority": {n % 7}}}\n')
    assert cli("enqueue", "--file", str(tmp_path / "f")).out == "5000 enqueued, 0 known already, 0 bad lines\n"
    assert value(conn, "select sum(payload::int) from orchestrator.tasks") == sum(range(5000))


def test_a_dash_is_standard_input_and_the_type_may_come_from_the_command_line(run_cli: Run, installed: str, conn: Connection) -> None:
    done = run_cli("enqueue", "a", "--priority", "3", "--file", "-", env={"DATABASE_URL": installed},
                   stdin='{"payload": 1}\n{"payload": 2, "priority": 5, "type": "b"}\n')
    assert (done.returncode, done.stderr) == (0, "")
    assert conn.execute("select type, priority from orchestrator.tasks order by id").fetchall() == [("a", 3), ("b", 5)]


# ------------------------------------------------------------------------------------------------------ list, show, stats
def test_list_shows_the_newest_first_and_pages(cli: Callable[..., Answer]) -> None:
    ids = [cli("enqueue", kind).out.strip() for kind in ("a", "b", "a")]
    assert [task["id"] for task in cli("list", "--json").json] == ids[::-1]
    assert [task["id"] for task in cli("list", "--json", "--type", "a", "--limit", "1").json] == [ids[0]]   # the next to run
    assert [task["id"] for task in cli("list", "--json", "--before", ids[1]).json] == [ids[0]]
    assert cli("list", "--json", "--status", "completed").json == []
    table = cli("list").out.splitlines()
    assert table[0].split()[:3] == ["id", "type", "status"] and [line.split()[0] for line in table[1:]] == ids[::-1]


def test_list_refuses_bad_filters(cli: Callable[..., Answer]) -> None:
    for args in (["--status", "lost"], ["--limit", "0"], ["--limit", "-1"], ["--limit", "many"], ["--limit", "1001"], ["--before", "x"]):
        refused(cli("list", *args), "(status|limit|before): ")


def test_list_goes_on_where_a_page_ends_and_says_how(cli: Callable[..., Answer], conn: Connection) -> None:
    conn.execute("select orchestrator.enqueue('rare')")
    conn.execute("select orchestrator.enqueue_many('a', array_fill('{}'::jsonb, array[10050]))")
    assert [task["type"] for task in cli("list", "--type", "rare", "--json").json] == ["rare"]   # behind 10,000 others
    assert len(cli("list", "--limit", "450", "--json").json) == 450
    first = cli("list", "--status", "ready", "--type", "a", "--limit", "2")
    before = re.fullmatch(r"more: --before (\S+)\n", first.err)
    assert before is not None
    rest = cli("list", "--status", "ready", "--type", "a", "--limit", "2", "--before", before[1])
    assert not {line.split()[0] for line in first.out.splitlines()[1:]} & {line.split()[0] for line in rest.out.splitlines()[1:]}


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

    def remaining(*args: str) -> int:
        return int(cli("retry", *args, "--json").json["matched"])

    assert cli("retry", "--dead-letters", "--type", "a", "--limit", "1", "--json").json == {
        "operation": 1, "matched": 1, "done": 1, "skipped": 0}
    assert (remaining("--type", "a"), remaining("--all")) == (1, 2)
    assert cli("retry", "--dead-letters", "--limit", "1").out == "1 retried, 0 skipped (operation 2)\n"
    assert remaining("--all") == 1
    assert cli("retry", "--dead-letters").out == "1 retried, 0 skipped (operation 3)\n"
    assert remaining("--all") == 0
    assert cli("retry", "--dead-letters", "--json").json == {"operation": 4, "matched": 0, "done": 0, "skipped": 0}
    for args, words in (([UNKNOWN, "--dead-letters"], "ID: "), ([UNKNOWN, "--type", "a"], "ID: "),
                        ([UNKNOWN, "--limit", "1"], "ID: "), (["--dead-letters", "--limit", "0"], "limit: ")):
        refused(cli("retry", *args), words)


def test_all_dead_letters_are_retried_in_batches_whatever_fails_again_meanwhile(
        cli: Callable[..., Answer], conn: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    conn.execute("select orchestrator.register_worker('w', 'host', 1, '1', '{\"a\": {}}')")
    conn.execute("select orchestrator.enqueue_many('a', array_fill('{}'::jsonb, array[1250]))")

    def fail_all() -> None:
        conn.execute("select orchestrator.fail_task(c.claim_id, c.id, 'bad', null, true) from orchestrator.claim_tasks('w', '{a}', 2000) c")

    fail_all()
    really_call, batches = orchestrator.Orchestrator.json, []

    def call(app: Any, function: str, *args: Any, **named: Any) -> Any:
        answer = really_call(app, function, *args, **named)
        if function == "bulk_tasks":
            batches.append(answer[0]["done"])
            fail_all()   # a broken handler: they are dead letters again at once
        return answer

    monkeypatch.setattr(orchestrator.Orchestrator, "json", call)
    assert cli("retry", "--dead-letters", "--json").json == {"operation": 1, "matched": 1250, "done": 1250, "skipped": 0}
    assert max(batches) <= orchestrator.BULK_BATCH and sum(batches) == 1250
    assert value(conn, "select count(*) from orchestrator.tasks where status = 'dead_letter'") == 1250
    assert value(conn, "select count(*) from orchestrator.task_events where event = 'retried'") == 1250
    assert value(conn, "select count(distinct task_id) from orchestrator.task_events where event = 'retried'") == 1250


@pytest.mark.parametrize(("command", "done"), [("cancel", "cancelled"), ("retry", "retried"), ("purge", "deleted")])
def test_many_are_shown_first_and_acted_on_with_yes(cli: Callable[..., Answer], conn: Connection, command: str, done: str) -> None:
    ids = [cli("enqueue", "mail:a", '{"user": 7}').out.strip() for _ in range(7)]
    others = [cli("enqueue", "other").out.strip(), cli("enqueue", "mail:a", '{"user": 8}').out.strip()]
    if command != "cancel":
        for id in ids + others:
            cli("cancel", id)
    filter = [command, "--type", "mail:*", "--payload", '{"user": 7}', "--created-after", "1h", "--created-before", "2090-01-01T00:00:00Z",
              "--priority", "0", *(["--status", "cancelled"] if command == "retry" else [])]
    before = conn.execute("select * from orchestrator.tasks order by id").fetchall()
    lines = cli(*filter).out.splitlines()
    assert lines[0].split()[:3] == ["id", "type", "status"] and [line.split()[0] for line in lines[1:-1]] == ids[:5]
    assert lines[-1] == f"7 tasks in all: --yes to {command}"
    shown = cli(*filter, "--json").json
    assert shown["matched"] == 7 and [t["id"] for t in shown["sample"]] == ids[:5]
    assert conn.execute("select * from orchestrator.tasks order by id").fetchall() == before
    assert value(conn, "select count(*) from orchestrator.operations") == 0
    answer = cli(*filter, "--yes")
    assert (answer.code, answer.out) == (0, f"7 {done}, 0 skipped (operation 1)\n")
    assert cli(*filter, "--yes", "--json").json["done"] == 0
    kept = dict(conn.execute("select id::text, status::text from orchestrator.tasks").fetchall())
    assert {kept.pop(id) for id in others} == {"pending" if command == "cancel" else "cancelled"}
    assert list(kept.values()) == {"cancel": ["cancelled"] * 7, "retry": ["pending"] * 7, "purge": []}[command]
    log = cli("operations").out.splitlines()
    assert log[0].split()[:5] == ["id", "at", "by", "action", "filter"] and log[2].split()[0] == "1" and f" {command} " in log[2]
    assert [o["done"] for o in cli("operations", "--json").json] == [0, 7] and len(cli("operations", "--limit", "1", "--json").json) == 1


def test_bad_filters_of_many_are_refused(cli: Callable[..., Answer]) -> None:
    for args, words in ((["--status", "lost"], "status: is unknown"), (["--created-before", "soon"], "--created-before: must be a moment"),
                        (["--payload", "{"], "payload: is not JSON"), (["--priority", "high"], "priority: .*integer"), ([], "ID: "),
                        (["--type", ""], "type: is empty"), (["--operation", "7"], "operation: ")):
        refused(cli("cancel", *args, "--yes"), words)
    refused(cli("cancel", "--operation", "7", "--type", "a"), "--operation: goes without a filter")
    refused(cli("retry", "--dead-letters", "--status", "cancelled"), "--dead-letters: goes without --status")
    refused(cli("purge"), "filter: say which tasks with --type")
    assert cli("cancel", "--all").out.splitlines()[-1] == "0 tasks in all: --yes to cancel"


def test_list_takes_the_same_filters(cli: Callable[..., Answer]) -> None:
    wanted = cli("enqueue", "mail:a", '{"user": 7}', "--concurrency-key", "acme", "--priority", "3").out.strip()
    cli("enqueue", "mail:b")
    for filter in (["--payload", '{"user": 7}'], ["--concurrency-key", "acme"], ["--priority", "3"],
                   ["--type", "mail:a", "--created-after", "1h"], ["--status", "unfinished", "--priority", "3"]):
        assert [task["id"] for task in cli("list", *filter, "--json").json] == [wanted]
    assert cli("list", "--error", "x", "--json").json == cli("list", "--created-before", "1h", "--json").json == []


def test_pause_and_resume_end_with_0_when_the_state_is_as_asked(cli: Callable[..., Answer], conn: Connection) -> None:
    cli("enqueue", "mail:welcome")
    assert cli("pause", "mail:", "--json").json == {"paused": "mail:", "changed": True, "matching": 1}
    assert value(conn, "select paused from orchestrator.task_types where type = 'mail:'")
    told = [(answer.code, answer.out, answer.err) for answer in (cli(command, "mail:") for command in ("pause", "resume", "resume"))]
    assert told == [(0, "mail: is paused already\n", ""), (0, "mail: is resumed\n", ""), (0, "mail: is not paused\n", "")]
    assert cli("pause", "nail:").err == "no known type matches nail:\n"
    refused(cli("pause", "a*b"), "type: ")


def test_stats_and_audit(cli: Callable[..., Answer], conn: Connection) -> None:
    cli("enqueue", "a")
    cli("pause", "a")
    (row,) = cli("stats", "--json").json
    assert (row["type"], row["waiting"], row["in_flight"], row["paused"]) == ("a", 1, 0, True)
    assert cli("stats").out.splitlines()[0].split()[:5] == ["type", "waiting", "parked", "scheduled", "blocked"]
    assert cli("audit", "--json").json == []
    conn.execute("select orchestrator.register_worker('w', 'host', 1, '1')")
    conn.execute("insert into orchestrator.claims (id, worker_id, open_tasks) values (1, 'w', 3)")   # holds nothing
    answer = cli("audit")
    assert answer.code == 1 and "open_tasks" in answer.out


def test_pipes_that_close_are_no_error(installed: str, conn: Connection) -> None:
    conn.execute("select orchestrator.enqueue_many('a', array_fill('{}'::jsonb, array[1000]))")
    done = subprocess.run(f"{sys.executable} {PROGRAM} list --limit 1000 | head -1", check=True, shell=True, capture_output=True, text=True,
                          env=clean_environment(DATABASE_URL=installed))
    assert done.stdout.startswith("id ") and done.stderr == ""


# -------------------------------------------------------------------------------------------------------- install, psql
def test_install_makes_the_schema_and_may_be_repeated(cli_on: Callable[..., Answer], db: str) -> None:
    assert cli_on(db, "install", "--json").json == {"schema_version": orchestrator.SCHEMA_VERSION}
    with psycopg.connect(db, autocommit=True) as conn:
        conn.execute("drop view orchestrator.queue_stats cascade")
    before = cli_on(db, "stats")
    assert before.code == 2 and "run `python orchestrator.py install`" in before.err and before.err.count("\n") == 1
    for _ in range(2):
        assert cli_on(db, "install", "--json").json == {"schema_version": orchestrator.SCHEMA_VERSION}
    assert cli_on(db, "stats", "--json").out == "[]\n"


def test_install_print_is_sql_that_psql_loads(cli: Callable[..., Answer], server: Server, db: str) -> None:
    printed = cli("install", "--print")
    assert printed.code == 0
    subprocess.run([server.bin / "psql", "-q", "-v", "ON_ERROR_STOP=1", "-d", db], check=True, input=printed.out, text=True,
                   capture_output=True)
    with psycopg.connect(db) as conn:
        assert value(conn, "select orchestrator.schema_version()") == orchestrator.SCHEMA_VERSION


@pytest.mark.parametrize("args", [
    ["-tAc", "select 6 * 7"], ["-t", "-A", "-c", "select 6 * 7"], ["-X", "-tA", "--command", "select 6 * 7", "-q"]])
def test_psql_opens_on_the_database_in_use(
        cli: Callable[..., Answer], server: Server, monkeypatch: pytest.MonkeyPatch, args: list[str]) -> None:
    monkeypatch.setenv("PATH", f"{server.bin}:{os.environ['PATH']}")
    done = cli("psql", *args)
    assert (done.code, done.out, done.err) == (0, "42\n", "")


def test_psql_gets_the_password_by_the_environment(
        folder: Path, cli_on: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch) -> None:
    psql = folder / "bin" / "psql"
    psql.parent.mkdir()
    psql.write_text('#!/bin/sh\necho "$@"; echo "$PGPASSWORD" >&2; exit 3\n')
    psql.chmod(0o755)
    monkeypatch.setenv("PATH", f"{psql.parent}:/usr/bin:/bin")
    done = cli_on("postgresql://u:canary@127.0.0.1:1/db", "psql")
    assert done.code == 3 and "canary" not in done.out and "user=u" in done.out and done.err == "canary\n"


def test_version_and_help(cli: Callable[..., Answer]) -> None:
    assert cli("--version").out == f"orchestrator {orchestrator.VERSION} (schema {orchestrator.SCHEMA_VERSION})\n"
    shown = cli("--help")
    assert shown.code == 0 and all(word in shown.out for word in ("enqueue", "--worker-pool-size", "Guarantees"))
    shown = cli("stats", "--help")
    assert shown.code == 0 and all(word in shown.out for word in ("--json", "--worker-pool-size", "--database-url"))
    commands = {name[3:] for name in vars(orchestrator) if name.startswith("do_")} - {"run"}
    assert commands == set(re.findall(r"\w+", re.search(r"COMMAND --help(.*?)\n\n", orchestrator.__doc__, re.S)[1]))
    shown = cli("cancel", "--help").out
    assert shown.startswith("usage: orchestrator.py cancel [--payload PAYLOAD]") and "FILTER_" not in shown
    assert "--database-url" not in shown.split("\n\n")[0], "the usage is about the command"
    assert cli("nonsense").code == 2


@pytest.mark.parametrize("args", [
    ["--debug", "stats", "--json"], ["stats", "--json", "--debug"], ["--debug", "true", "stats", "--json"],
    ["--debug=false", "stats", "--json"], ["--distributed-mode", "--prepared-statements", "no", "stats", "--json"]])
def test_a_switch_may_stand_alone_and_leaves_the_command_alone(cli: Callable[..., Answer], args: list[str]) -> None:
    assert cli(*args).json == []


def test_a_switch_with_a_wrong_value_and_an_abbreviated_flag_are_refused(cli: Callable[..., Answer]) -> None:
    refused(cli("--debug=maybe", "stats"), "DEBUG: must be true or false")
    refused(cli("stats", "--deb"), "unrecognized arguments: --deb")


def test_the_module_is_imported_and_enqueues_where_only_windows_modules_are(installed: str, conn: Connection) -> None:
    """Windows has no fcntl, no pwd, no SIGALRM and no user ids."""
    code = ("import os, signal, sys\nsys.modules['fcntl'] = sys.modules['pwd'] = sys.modules['grp'] = None\n"
            "del signal.SIGALRM, signal.alarm, os.geteuid, os.getuid, os.fork\n"
            "import orchestrator\nassert orchestrator.main(['enqueue', 'a']) == 0\n"
            f"print(orchestrator.Orchestrator({installed!r}).enqueue('b'))")
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=PROGRAM.parent,
                          env=clean_environment(DATABASE_URL=installed))
    assert (done.returncode, done.stderr) == (0, "")
    assert column(conn, "select type from orchestrator.tasks order by id") == ["a", "b"]


def test_the_embedded_database_is_made_once_where_embedded_dir_says(folder: Path, run_cli: Run) -> None:
    (folder / "elsewhere").mkdir(mode=0o755)
    first = run_cli("enqueue", "a", env={"EMBEDDED_DIR": folder / "data"})
    assert first.returncode == 0 and first.stderr.count("\n") == 1
    assert "WARNING created a new, empty database in " in first.stderr and "EMBEDDED_DIR" in first.stderr
    second = run_cli("list", "--json", env={"EMBEDDED_DIR": folder / "data"}, cwd=folder / "elsewhere")
    assert [task["id"] for task in json.loads(second.stdout)] == [first.stdout.strip()] and second.stderr == ""
    assert not (folder / "elsewhere" / ".orchestrator").exists()


# ------------------------------------------------------------------------------------------------------------ schedules
SCHEDULE = """select cron, timezone, type, payload, priority, max_retries, missed, overlap from orchestrator.schedules where name = 's'"""
NIGHTLY = """
from orchestrator import Schedule
HANDLERS = {{"task:backup": lambda task: None}}
SCHEDULES = {{"nightly": Schedule({})}}
"""


def test_schedule_says_when_it_fires_next_and_lists_it(cli: Callable[..., Answer], conn: Connection) -> None:
    year = datetime.now(UTC).year + 1
    made = cli("schedule", "s", "0 12 1 1 *", "task:backup", '{"database": "app"}', "--timezone", "Asia/Kolkata", "--priority", "2",
               "--max-retries", "1", "--missed", "all", "--no-overlap")
    assert (made.code, made.out) == (0, f"next at {year}-01-01T06:30:00+00:00\n")
    assert row(conn, SCHEDULE) == {"cron": "0 12 1 1 *", "timezone": "Asia/Kolkata", "type": "task:backup", "payload": {"database": "app"},
                                  "priority": 2, "max_retries": 1, "missed": "all", "overlap": False}
    listed = cli("schedules").out.splitlines()
    assert listed[0].split() == ["name", "cron", "timezone", "type", "next_at", "last_fire_at", "state"]
    assert "task:backup" in listed[1] and "no live worker handles task:backup" in listed[1]
    [found] = cli("schedules", "--json").json
    assert found["name"] == "s" and datetime.fromisoformat(found["next_at"]) == datetime(year, 1, 1, 6, 30, tzinfo=UTC)
    conn.execute("select orchestrator.pause_schedule('s')")
    conn.execute("update orchestrator.schedules set payload = '{}', priority = 0, max_retries = null, missed = 'one', overlap = true")
    paused = cli("schedule", "s", "0 12 1 1 *", "task:backup", "--timezone", "Asia/Kolkata", "--json")
    assert paused.json == {"name": "s", "next_at": None}
    assert cli("schedule", "s", "0 12 1 1 *", "task:backup", "--timezone", "Asia/Kolkata").out == "it is paused\n"


def test_fire_enqueues_now_and_unschedule_removes(cli: Callable[..., Answer], conn: Connection) -> None:
    cli("schedule", "s", "@yearly", "t", '{"n": 1}')
    task_id = cli("fire", "s").out.strip()
    assert row(conn, "select id::text, type, payload from orchestrator.tasks") == {"id": task_id, "type": "t", "payload": {"n": 1}}
    assert cli("fire", "s", "--json").json["id"] != task_id
    assert (cli("unschedule", "s").out, column(conn, "select name from orchestrator.schedules")) == ("removed; its tasks stay\n", [])
    assert cli("unschedule", "s", "--json").json == {"name": "s", "removed": False}
    missing = cli("fire", "s")
    assert (missing.code, missing.out, missing.err) == (1, "", "there is no such schedule\n")
    assert cli("unschedule", "s").code == 1


def test_next_prints_the_times_of_an_expression(cli: Callable[..., Answer]) -> None:
    times = [datetime.fromisoformat(line) for line in cli("next", "30 3 * * mon-fri", "--timezone", "Europe/Berlin").out.splitlines()]
    assert len(times) == 5 and times == sorted(times) and {time.minute for time in times} == {30}
    assert len(cli("next", "@hourly", "-n", "3", "--json").json) == 3
    assert cli("next", "0 0 30 2 *").out == "never\n"


@pytest.mark.parametrize(("args", "words"), [
    (["next", "nonsense"], "cron: must have five fields"), (["next", "@daily", "--timezone", "Mars/Base"], "timezone: there is no"),
    (["next", "@daily", "-n", "0"], "-n: must be a whole number"), (["schedule", "s", "@daily", "t", "{"], "payload: is not JSON"),
    (["schedule", "s", "61 * * * *", "t"], "cron: minute"), (["schedule", "s", "@daily", "t", "--missed", "some"], "--missed"),
    (["schedule", "s", "@daily"], "type"), (["fire"], "name")])
def test_a_schedule_s_bad_input_is_one_line(cli: Callable[..., Answer], args: list[str], words: str) -> None:
    refused(cli(*args), words)


@pytest.mark.parametrize(("definition", "words"), [
    ("'30 3 * *', 'task:backup'", r"SCHEDULES\['nightly'\]: cron: must have five fields"),
    ("'@daily', 'task:backup', timezone='Berlin'", r"SCHEDULES\['nightly'\]: timezone: there is no 'Berlin'"),
    ("'@daily', 'task:backup', {1, object()}", r"SCHEDULES\['nightly'\]: payload: "),
    ("'@daily'", "cannot load .*TypeError: .*'type'")])
def test_a_wrong_schedule_is_one_line_and_exit_code_2(cli: Callable[..., Answer], tmp_path: Path, definition: str, words: str) -> None:
    (tmp_path / "mine.py").write_text(NIGHTLY.format(definition))
    answer = cli("--handlers", str(tmp_path / "mine.py"), "--metrics-port", "off")
    [line] = [line for line in answer.err.splitlines() if line.startswith("error: ")]
    assert answer.code == 2 and re.search(words, line), answer.err
    assert "Traceback" not in answer.err


@pytest.mark.parametrize("schedules", ["[]", "{'nightly': '30 3 * * *'}", "None"])
def test_schedules_that_are_no_dict_of_them_are_one_line(cli: Callable[..., Answer], tmp_path: Path, schedules: str) -> None:
    (tmp_path / "mine.py").write_text(f"HANDLERS = {{}}\nSCHEDULES = {schedules}\n")
    refused(cli("--handlers", str(tmp_path / "mine.py"), "--metrics-port", "off"), "SCHEDULES: must be a dict")


# ------------------------------------------------------------------------------------------------------ the embedded database
def test_commands_and_a_worker_share_the_embedded_database(folder: Path, run_cli: Run) -> None:
    (folder / "handlers.py").write_text("HANDLERS = {'a': lambda task: task.payload['n'] + 1}\n")
    with (folder / "log").open("w") as log:
        worker = subprocess.Popen(START, cwd=folder, stderr=log, stdout=log, start_new_session=True,
                                  env=clean_environment(METRICS_PORT=0))
    try:
        assert eventually(lambda: " started, " in (folder / "log").read_text(), 30)
        commands = [subprocess.Popen([*START, "enqueue", "a", f'{{"n": {n}}}'], cwd=folder, stdout=subprocess.PIPE,
                                     text=True, env=clean_environment()) for n in range(2)]
        ids = [command.communicate(timeout=30)[0].strip() for command in commands]
        assert [command.returncode for command in commands] == [0, 0]

        said = re.search(r"psql: \S+/psql '(postgresql://.*)'", (folder / "log").read_text())
        assert said is not None
        with psycopg.connect(said[1], autocommit=True) as conn:
            eventually(lambda: value(conn, "select count(*) from orchestrator.tasks where status = 'completed'") == 2)
        assert [json.loads(run_cli("show", "--json", task_id).stdout)["result"] for task_id in ids] == [1, 2]
        assert run_cli("psql", "-tAc", "select count(*) from orchestrator.tasks").stdout == "2\n"
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
def test_a_database_that_is_down_is_one_line(cli_on: Callable[..., Answer]) -> None:
    for args in (["stats"], ["enqueue", "a"], ["install"]):
        done = cli_on("postgresql://user:canary@127.0.0.1:1/db", *args)
        assert done.code == 2 and re.fullmatch(r"error: DATABASE_URL: [^\n]+\n", done.err) and "canary" not in done.err


@pytest.mark.parametrize("change", ["database", "host", "user"])
def test_a_wrong_database_host_or_user_is_one_line_that_says_what_to_check(
        cli_on: Callable[..., Answer], installed: str, change: str) -> None:
    parts = urlsplit(installed)
    user, host = parts.netloc.split("@")
    wrong = {"database": parts._replace(path="/nowhere"), "host": parts._replace(netloc=f"{user}@no.such.host.invalid:5432"),
             "user": parts._replace(netloc=f"nobody-here@{host}")}[change]
    done = cli_on(wrong.geturl(), "stats")
    assert done.code == 2
    assert re.fullmatch(r"error: DATABASE_URL: [^\n]+: check the user, the host and the name of the database\n", done.err)


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
    assert done.returncode == 2 and "the schema has version 99" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
