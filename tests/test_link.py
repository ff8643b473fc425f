"""The connection of a loop: what it calls by name, and a server that falls silent. tests/test_processes.py has forks and idle ends."""
from __future__ import annotations

import os
import time
from typing import Any

import psycopg
import pytest

import orchestrator
from apps import Relay
from orchestrator import Config, Link

Connection = psycopg.Connection[Any]


@pytest.fixture
def link(installed: str) -> Any:
    link = Link(Config.load({"database_url": installed}, environ={}))
    yield link
    link.close()


@pytest.mark.parametrize("name", ["stats_state; drop table orchestrator.tasks", "tasks t", "Heartbeat", "heartbeat(", "", "a" * 64, "é",
                                  "a.b", "x\n"])
def test_a_name_that_is_none_goes_into_no_statement(link: Link, name: str) -> None:
    for call in (lambda: link.call(name), lambda: link.call("api_tasks", **{name: "1"}), lambda: link.json(name), lambda: link.view(name)):
        with pytest.raises(ValueError, match="is not a name"):
            call()


def test_a_named_argument_and_a_view_are_read(link: Link) -> None:
    [task] = link.json("enqueue_many", "t", '{"{}"}', p_priority="3")
    assert (task["ordinal"], task["created"]) == (1, True)
    assert [(row["id"], row["priority"]) for row in link.view("pending_tasks")] == [(task["id"], 3)]


def test_a_silent_server_is_given_up_and_the_next_call_opens_a_new_connection(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orchestrator, "STATEMENT_TIMEOUT", -4.5)   # 5 seconds less
    relay = Relay(installed)
    link = Link(Config.load({"database_url": relay.url}, environ={}))
    monkeypatch.setitem(orchestrator.SESSION, "statement_timeout", "15s")
    link.call("enqueue", "before")
    first = link.connection
    relay.silent = True
    began = time.monotonic()
    with pytest.raises(psycopg.OperationalError, match="has not answered"):
        link.call("enqueue", "unheard")
    assert 0.4 < time.monotonic() - began < 5 and link.began is None
    relay.silent = False
    link.call("enqueue", "after")   # an answer to the call before would be mistaken for its own
    assert link.connection is not first
    link.close()
    relay.cut()


def test_a_forked_child_opens_a_connection_of_its_own(link: Link) -> None:
    pid = link.open().info.backend_pid
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, str(link.open().info.backend_pid).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert int(os.read(read, 20)) != pid
    assert link.open().info.backend_pid == pid
    os.close(read)
    os.close(write)
