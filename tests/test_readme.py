"""The README holds: each of its examples is executed, its tables say what the code says, and what it names exists.

An invisible comment above each code block says how: `<!-- test: HOW -->`, with HOW one of
  psql                          one after another, against a database with the schema and some tasks
  python, prints "TEXT"         a program, to its end
  python worker, prints "TEXT"  a program that runs until it gets SIGTERM
  shell                         in a folder with a copy of the program
  handlers, enqueue TYPE        a handlers module, loaded by a worker that gets such a task
  none, REASON
"""
from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import psycopg
import pytest

from conftest import REPOSITORY, clean_environment
from postgres import Server, eventually

TEXT = (REPOSITORY / "README.md").read_text()


class Block(NamedTuple):
    line: int
    how: str
    language: str
    code: str


def blocks() -> list[Block]:
    found = re.finditer(r"^(?:<!-- test: (.*?) -->\n)?```(\w*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    return [Block(TEXT[:match.start(2)].count("\n") + 1, match[1] or "", match[2], match[3]) for match in found]


BLOCKS = blocks()


def those(how: str) -> list[Any]:
    return [pytest.param(block, id=f"line {block.line}") for block in BLOCKS if block.how.startswith(how)]


def environment(folder: Path, url: str, server: Server) -> dict[str, str]:
    """`python` and psql on the PATH, and the modules importable."""
    programs = folder / "bin"
    programs.mkdir()
    (programs / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (programs / "python").chmod(0o755)
    return clean_environment(DATABASE_URL=url, METRICS_PORT=0, PYTHONPATH=REPOSITORY,
                             PATH=f"{programs}:{server.bin}:{os.environ['PATH']}")


def run(args: list[str], stdin: str, **options: Any) -> str:
    result = subprocess.run(args, check=False, input=stdin, capture_output=True, text=True, timeout=50, **options)
    assert result.returncode == 0, f"exit code {result.returncode}\n{result.stdout}{result.stderr}"
    assert "Traceback" not in result.stderr, result.stderr
    return result.stdout + result.stderr


def test_readme_says_of_each_code_block_how_it_is_tested() -> None:
    known = r'psql|python( worker)?, prints ".+"|shell|handlers, enqueue \S+|none, .+'
    wrong = [block for block in BLOCKS if not re.fullmatch(known, block.how)]
    assert not wrong
    assert {block.how.split(",")[0] for block in BLOCKS} == {"psql", "python", "python worker", "shell", "handlers", "none"}
    allowed = ("interactive", "CI", "there are no such hosts", "Docker", "cluster", "Prometheus")
    assert all(any(word in block.how for word in allowed) for block in BLOCKS if block.how.startswith("none"))


def test_readme_psql_examples_run(installed: str, server: Server) -> None:
    setup = """select orchestrator.enqueue('demo:quick', '{}', 0, 'key-' || n) from generate_series(1, 3) n;
               select orchestrator.enqueue('demo:quick', p_run_at => now() + interval '1 day');"""
    for block in [Block(0, "psql", "sql", setup), *(block for block in BLOCKS if block.how == "psql")]:
        result = subprocess.run([server.bin / "psql", "-X", "-v", "ON_ERROR_STOP=1", installed], check=False, input=block.code,
                                capture_output=True, text=True, timeout=50)
        assert result.returncode == 0, f"line {block.line}: {result.stderr}"
    with psycopg.connect(installed) as conn:
        conn.execute("drop role my_service")   # of the whole server
        assert conn.execute("select status from orchestrator.tasks where type = 'order:confirm'").fetchall() == [("cancelled",)]
        assert conn.execute("select count(*) from orders").fetchone() == (1,)


def test_readme_queries_against_symptoms_run(conn: psycopg.Connection[Any]) -> None:
    rows = re.findall(r"^\|.*\|$", TEXT.split("## Troubleshooting")[1].split("## Tuning")[0], re.MULTILINE)
    queries = [query for row in rows for query in re.findall(r"`(select .*?)`", row)]
    assert len(queries) >= 8
    for query in queries:
        conn.execute(query)


@pytest.mark.parametrize("block", those("python, "))
def test_readme_python_example_prints_what_it_says(block: Block, installed: str, server: Server, tmp_path: Path) -> None:
    output = run([sys.executable, "-"], block.code, cwd=tmp_path, env=environment(tmp_path, installed, server))
    assert re.findall(r'"(.+)"', block.how)[0] in output


@pytest.mark.parametrize("block", those("python worker"))
def test_readme_python_worker_prints_what_it_says_and_stops_on_sigterm(
        block: Block, installed: str, server: Server, tmp_path: Path) -> None:
    log = tmp_path / "log"
    (tmp_path / "example.py").write_text(block.code)
    with log.open("w") as output:
        process = subprocess.Popen([sys.executable, "example.py"], cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                                   env=environment(tmp_path, installed, server))
    try:
        expected = re.findall(r'"(.+)"', block.how)[0]
        eventually(lambda: expected in log.read_text() or process.poll() is not None, 30)
        assert expected in log.read_text() and process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("block", those("shell"))
def test_readme_shell_example_runs(block: Block, db: str, server: Server, tmp_path: Path) -> None:
    for name in ("orchestrator.py", "handlers.py", "sql"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    output = run(["bash", "-eu", "-o", "pipefail"], block.code, cwd=tmp_path, env=environment(tmp_path, db, server))
    assert "2 enqueued, 0 known already, 0 bad lines" in output
    assert "no live worker handles demo:quick" in output


@pytest.mark.parametrize("block", those("handlers"))
def test_readme_handlers_module_runs_its_task(block: Block, installed: str, worker_process: Callable[..., Any], tmp_path: Path,
                                              conn: psycopg.Connection[Any]) -> None:
    (tmp_path / "handlers.py").write_text(block.code)
    worker_process(installed)
    kind = block.how.split("enqueue ")[1]
    conn.execute("select orchestrator.enqueue(%s, '{\"user\": \"Ada\"}')", [kind])
    eventually(lambda: conn.execute("select from orchestrator.tasks where status = 'completed' and type = %s", [kind]).fetchall())


# ------------------------------------------------------------------------------------------ what it says of the code
def sql_docs() -> ModuleType:
    sys.path.insert(0, str(REPOSITORY / "tools"))
    import sql_docs as module
    return module


def test_readme_tables_of_settings_functions_metrics_and_alerts_are_current(installed: str) -> None:
    written = sql_docs().written(TEXT, installed)
    assert written.splitlines() == TEXT.splitlines(), "run `make sql-docs`"


def test_readme_settings_table_has_each_setting_with_its_default() -> None:
    from orchestrator import Config
    table = dict(re.findall(r"^\| `([A-Z_]+)` \| (?:`(.*?)`)? \|", TEXT.split("## Settings")[1].split("##")[0], re.MULTILINE))
    defaults = Config.load({}, environ={})
    assert Config.load({}, environ={name: value for name, value in table.items() if value}) == defaults
    assert {name.lower() for name in table} == set(vars(defaults))


def test_readme_names_only_make_targets_files_and_sections_that_exist() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    code = [*re.findall(r"`([^`\n]+)`", TEXT), *(line for block in BLOCKS for line in block.code.splitlines())]
    assert {name for line in code for name in re.findall(r"^make ([a-z][a-z-]+)", line)} <= targets
    links = re.findall(r"\]\(([^)#\s]+)\)", TEXT) + re.findall(r'src(?:set)?="([^"]+)"', TEXT)
    assert [link for link in links if "://" not in link and not (REPOSITORY / link).exists()] == []
    headings = {re.sub(r"[^a-z -]", "", heading.lower()).replace(" ", "-") for heading in re.findall(r"^##+ (.*)$", TEXT, re.MULTILINE)}
    assert set(re.findall(r"\]\(#([^)]+)\)", TEXT)) <= headings


def test_readme_names_only_functions_and_views_that_exist(conn: psycopg.Connection[Any]) -> None:
    names = set(re.findall(r"\borchestrator\.([a-z]\w+)", TEXT)) - {"py"}
    known = {name for name, in conn.execute("""
        select proname from pg_proc where pronamespace = 'orchestrator'::regnamespace
        union select relname from pg_class where relnamespace = 'orchestrator'::regnamespace""").fetchall()}
    assert {name for name in names if not name.startswith("api_")} <= known


def test_readme_describes_each_role_and_no_other() -> None:
    roles = set(re.findall(r"\borchestrator_[a-z]+\b", (REPOSITORY / "sql" / "90_roles.sql").read_text()))
    section = TEXT.split("## Security")[1].split("## ")[0]
    assert set(re.findall(r"^\| `(orchestrator_\w+)`", section, re.MULTILINE)) == roles


def test_readme_describes_each_built_in_handler() -> None:
    from handlers import HANDLERS
    section = TEXT.split("## Built-in handlers")[1].split("## ")[0]
    assert {kind for kind in re.findall(r"`((?:task|service|demo):\S+)`", section)} == set(HANDLERS)
