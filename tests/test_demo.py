"""The demo as a person sees it: it runs, counts right, shares its data with an earlier run, and stops when asked."""
from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from types import ModuleType

import psycopg
import pytest

from conftest import REPOSITORY, clean_environment
from orchestrator import Orchestrator
from postgres import eventually, processes_below

DEMO = REPOSITORY / "examples" / "demo.py"


@pytest.mark.timeout(200)
def test_demo_counts_right_twice_on_the_same_data_and_serves_until_ctrl_c(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        first = subprocess.run([sys.executable, str(DEMO), "--exit"], check=False, cwd=folder, capture_output=True, text=True,
                               env=clean_environment(METRICS_PORT=port), timeout=100)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "tasks ended as they should" in first.stdout
    assert first.stderr.startswith("created a new, empty database in ") and first.stderr.count("\n") == 1
    assert f"cannot listen on 127.0.0.1 {port}" in first.stdout and "The demo takes a free port." in first.stdout
    assert re.search(r"Backup +\S+/\.orchestrator/backups/\S+\.dump, [\d,]+ bytes, \d+ tables, verified", first.stdout)
    assert "\x1b" not in first.stdout, "plain lines where there is no terminal"
    assert not processes_below(folder), "the embedded server stops with its last user"

    output = folder / "output"
    with output.open("w") as file:
        process = subprocess.Popen([sys.executable, str(DEMO)], cwd=folder, stdout=file, stderr=file, start_new_session=True,
                                   env=clean_environment(METRICS_PORT=0))
    try:
        eventually(lambda: "until Ctrl-C" in output.read_text() or process.poll() is not None, 90)
        text = output.read_text()
        assert process.poll() is None and "tasks ended as they should" in text, text
        assert len(list((folder / ".orchestrator" / "backups").glob("*.dump"))) == 2
        check_what_it_says_to_try(text, folder)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(30) == 0, output.read_text()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert "Traceback" not in output.read_text()
    assert not processes_below(folder / ".orchestrator")


def check_what_it_says_to_try(text: str, folder: Path) -> None:
    with urllib.request.urlopen(re.findall(r"Metrics +(http://\S+)", text)[0], timeout=10) as answer:
        assert b'tasks_completed_total{status="completed",type="demo:quick"}' in answer.read()
    queries = re.findall(r"^  (select .*)$", text, re.MULTILINE)
    assert len(queries) == 3
    with psycopg.connect(f"postgresql://postgres@/postgres?host={folder}/.orchestrator", autocommit=True) as connection:
        for query in queries:
            connection.execute(query)


def demo_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_check_names_each_count_that_is_wrong(installed: str) -> None:
    module = demo_module()
    with contextlib.closing(Orchestrator(installed)) as app, psycopg.connect(installed, autocommit=True) as connection:
        demo = module.Demo(app, connection, module.View("", module.Recent()), threading.Event())
        demo.add("demo:broken", None, "dead_letter")
        demo.check()
    assert "demo:quick: 1 waiting, should be 0" in demo.problems
    assert "demo:quick: 0 completed, should be 1" in demo.problems
    assert "demo:broken: 0 dead_letter, should be 1" in demo.problems
    assert "the backup left no file" in demo.problems


def test_live_view_rewrites_its_lines_in_place(capsys: pytest.CaptureFixture[str]) -> None:
    module = demo_module()
    view = module.View("title", module.Recent())
    view.live = True
    view.show([("demo:quick", 1, 2, 3, 4, 5, 6)], at_once=True)
    height = view.height
    view.show([("demo:quick", 0, 0, 0, 10, 5, 6)], at_once=True)
    second = capsys.readouterr().out.split("\x1b[J")[1]
    assert second.startswith(f"\x1b[{height}A"), "it goes back to its first line"
    assert "\x1b[2J" not in second, "and never clears the screen, which would flicker"
