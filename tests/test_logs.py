"""The log: one line an event, as text or JSON, whatever a task says; no line a task when there are many; no secrets."""
from __future__ import annotations

import json
import logging
import re
import sys
import types
from typing import Any

import psycopg
import pytest

import orchestrator
from orchestrator import Config, _LogFormat, error_line, redact_url
from postgres import eventually
from steps import enqueue, enqueue_some, value

HANDLERS = r"""
from orchestrator import Handler

def fail(task):
    raise RuntimeError("first line\r\n2026-01-01T00:00:00.000Z INFO task completed task_id=forged \x1b[31m\u2028 end")

HANDLERS = {"ok": lambda task: {"a result": task.payload}, "bad": Handler(fail, max_retries=0), "t": lambda task: None}
"""
LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (DEBUG|INFO|WARNING|ERROR) \S.*")


def record(message: str = "something happened", **fields: Any) -> logging.LogRecord:
    return logging.makeLogRecord({"msg": message, "levelname": "INFO", "created": 0.25, "msecs": 250.0, **fields})


@pytest.mark.parametrize("character", ["\n", "\r", "\0", "\x1b", "\x7f", "\x85", "\x9b", "\u2028", "\u2029", "\u202e"])
@pytest.mark.parametrize("as_json", [False, True])
def test_no_character_breaks_a_line_or_steers_a_terminal(character, as_json):
    text = _LogFormat(as_json).format(record(f"a{character}b", error=f"c{character}d"))
    assert character not in text and len(text.splitlines()) == 1
    assert f"\\u{ord(character):04x}" in text or (as_json and json.loads(text)["message"] == f"a{character}b")


def test_a_text_line_has_time_level_and_message_which_says_everything():
    text = _LogFormat(False).format(record('it said "x=1" and\nleft', task_id="1", duration=0.5, empty=""))
    assert text == '1970-01-01T00:00:00.250Z INFO it said "x=1" and\\u000aleft'


@pytest.mark.parametrize("as_json", [False, True])
def test_a_line_of_a_handlers_own_logger_has_the_tasks_id(as_json):
    task = types.SimpleNamespace(id="some-id")
    token = orchestrator._running_in.set(types.SimpleNamespace(task=task))
    try:
        own, ours = (_LogFormat(as_json).format(record(name=name)) for name in ("myapp", "orchestrator"))
    finally:
        orchestrator._running_in.reset(token)
    assert "some-id" not in ours and "something happened" in own
    assert json.loads(own)["task_id"] == "some-id" if as_json else "[some-id] something happened" in own


def test_a_json_line_has_the_fields_as_members():
    text = _LogFormat(True).format(record(task_id="1", duration=0.5, error="line\nline", other=object))
    assert json.loads(text) == {"time": "1970-01-01T00:00:00.250Z", "level": "INFO", "message": "something happened", "task_id": "1",
                                "duration": 0.5, "error": "line\nline", "other": "<class 'object'>"}


@pytest.mark.parametrize("as_json", [False, True])
def test_a_traceback_stays_in_its_line(as_json):
    try:
        raise KeyError("x")
    except KeyError:
        text = _LogFormat(as_json).format(record(exc_info=sys.exc_info()))
    assert len(text.splitlines()) == 1 and "Traceback" in text and "KeyError" in text


def json_lines(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines()]


def test_the_end_of_an_attempt_is_one_line_with_task_type_attempt_worker_and_duration(installed, conn, worker_process, tmp_path):
    (tmp_path / "some_handlers.py").write_text(HANDLERS)
    worker = worker_process(installed, HANDLERS="some_handlers", LOG_FORMAT="json")
    ok, bad = enqueue(conn, "ok", {"password": "canary-1"}), enqueue(conn, "bad", {"token": "canary-2"})

    def ends() -> dict[str, dict[str, Any]]:
        return {line["task_id"]: line for line in json_lines(worker.output) if "task_id" in line}

    lines = eventually(lambda: (found := ends()) and len(found) == 2 and found)
    assert worker.stop() == 0
    assert set(lines[ok]) == {"time", "level", "message", "task_id", "type", "attempt", "worker", "duration"}
    assert (lines[ok]["level"], lines[ok]["type"], lines[ok]["attempt"]) == ("INFO", "ok", 1)
    assert re.fullmatch(rf"task completed: ok {ok}, attempt 1, \d\.\d{{3}} s", lines[ok]["message"])
    assert lines[ok]["worker"].split(":")[1] == str(worker.pid) and 0 <= lines[ok]["duration"] < 5
    assert lines[bad]["level"] == "WARNING"
    assert re.match(rf"task dead_letter: bad {bad}, attempt 1, \d\.\d{{3}} s: RuntimeError: first line\r\n2026", lines[bad]["message"])
    assert "first line\r\n2026" in lines[bad]["error"]
    assert len([line for line in json_lines(worker.output) if line.get("task_id") in (ok, bad)]) == 2
    assert "canary" not in worker.output   # neither payload nor result


def test_text_lines_stay_lines_whatever_an_error_says(installed, conn, worker_process, tmp_path):
    (tmp_path / "some_handlers.py").write_text(HANDLERS)
    worker = worker_process(installed, HANDLERS="some_handlers", DEBUG="true")   # with tracebacks, then
    bad = enqueue(conn, "bad")
    eventually(lambda: f"task dead_letter: bad {bad}, attempt 1" in worker.output)
    assert worker.stop() == 0
    lines = worker.output.splitlines()
    assert [line for line in lines if not LINE.fullmatch(line)] == []
    assert [line for line in lines if line.startswith("2026-01-01")] == []
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", worker.output)


def test_many_tasks_are_told_in_a_rate_line_not_one_by_one(installed, conn, worker_process, tmp_path):
    (tmp_path / "some_handlers.py").write_text(HANDLERS)
    worker = worker_process(installed, HANDLERS="some_handlers", LOG_FORMAT="json")
    enqueue_some(conn, 3000)
    eventually(lambda: value(conn, "select count(*) from orchestrator.tasks where status = 'completed'") == 3000, 20)
    assert worker.stop() == 0
    messages = [line["message"] for line in json_lines(worker.output)]
    assert 1 <= sum(message.startswith("task completed:") for message in messages) <= 40   # 20 in ten seconds
    told = [re.match(r"(\d+) tasks completed in the last \d+ s \(\d+/s\)", message) for message in messages]
    assert sum(int(match[1]) for match in told if match) == 3000


def test_a_few_tasks_are_told_one_by_one_and_not_again(installed, conn, worker_process, tmp_path):
    (tmp_path / "some_handlers.py").write_text(HANDLERS)
    worker = worker_process(installed, HANDLERS="some_handlers")
    enqueue_some(conn, 3)
    eventually(lambda: worker.output.count("task completed: t ") == 3)
    assert worker.stop() == 0
    assert "tasks completed in the last" not in worker.output


def test_no_password_of_a_connection_string_is_logged(worker_process):
    url = "postgresql://ada:canary-1@127.0.0.1:1/d?sslpassword=canary-2&application_name=x"
    worker = worker_process(url, wait=False, DEBUG="true")
    eventually(lambda: "waiting for the database at DATABASE_URL=postgresql://ada:***@127.0.0.1:1/d" in worker.output, 20)
    eventually(lambda: worker.output.count("database: ") >= 3, 20)
    worker.kill()
    assert "canary" not in worker.output


@pytest.mark.parametrize(("given", "shown"), [
    ("postgresql://u:pw@h/d", "postgresql://u:***@h/d"), ("postgresql://:pw@h/d", "postgresql://:***@h/d"),
    ("postgresql://u:p:w@h1,h2/d", "postgresql://u:***@h1,h2/d"), ("postgresql://u:p@w@h/d", "postgresql://u:***@h/d"),
    ("postgresql://u@h/d?password=pw&x=1", "postgresql://u@h/d?password=***&x=1"),
    ("host=h password=pw user=u", "host=h password=*** user=u"),
    ("password = 'p w\\' x' host=h", "password = *** host=h"), ("PASSWORD=pw", "PASSWORD=***"), ("postgresql://u@h/d", "postgresql://u@h/d"),
    ("host=h", "host=h")])
def test_a_connection_string_is_shown_without_its_password(given, shown):
    assert redact_url(given) == shown


def test_a_database_error_is_logged_without_the_values_of_its_detail(conn):
    conn.execute("create temporary table unique_things (thing text primary key)")
    conn.execute("insert into unique_things values ('canary')")
    with pytest.raises(psycopg.errors.UniqueViolation) as caught:
        conn.execute("insert into unique_things values ('canary')")
    assert "canary" in str(caught.value) and "canary" not in error_line(caught.value)


def test_a_wrong_connection_string_is_refused_without_showing_it():
    with pytest.raises(Exception, match="DATABASE_URL") as caught:
        Config.load({"database_url": "postgresql://u:canary%zz@h/d"})
    assert "canary" not in str(caught.value)
