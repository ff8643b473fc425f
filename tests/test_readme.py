"""The README and docs/ hold: each example is executed, the tables say what the code says, and what they name exists.

An invisible comment above each code block says how: `<!-- test: HOW -->`, with HOW one of
  psql                          one after another, in the order of the documents, on a database with the schema and some tasks
  python, prints "TEXT"         a program, to its end, on an empty database
  python worker, prints "TEXT"  a program that runs until it gets SIGTERM, on an empty database
  shell, prints "A" and "B"     in a folder with a copy of the program
  handlers, enqueue TYPE        a handlers module, loaded by a worker that gets such a task
  pytest, FILE                  a file of a folder in which pytest then runs
  project, setup                how to copy the program into a project
  project, worker               the command that runs the project's worker
  project, prints "A" and "B"   commands beside that worker, which prints both
  none, REASON
"""
from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import psycopg
import pytest

from conftest import PROGRAM, REPOSITORY, START, clean_environment
from postgres import Server, eventually
from tools import bundle

DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
TEXTS = {str(path.relative_to(REPOSITORY)): path.read_text() for path in DOCUMENTS}
TEXT = "\n".join(TEXTS.values())


class Block(NamedTuple):
    place: str      # README.md line 20
    how: str
    language: str
    code: str


def blocks() -> list[Block]:
    pattern = re.compile(r"^(?:<!-- test: (.*?) -->\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [Block(f"{name} line {text[:match.start(2)].count(chr(10)) + 1}", match[1] or "", match[2], match[3])
            for name, text in TEXTS.items() for match in pattern.finditer(text)]


BLOCKS = blocks()


def those(how: str) -> list[Any]:
    return [pytest.param(block, id=block.place) for block in BLOCKS if block.how.startswith(how)]


def section(document: str, heading: str) -> str:
    return TEXTS[document].split(f"\n## {heading}\n")[1].split("\n## ")[0]


def environment(folder: Path, url: str, server: Server) -> dict[str, str]:
    """`python` and psql on the PATH, and the modules importable."""
    programs = folder / "bin"
    programs.mkdir()
    (programs / "python").write_text(f'''#!/bin/sh
        [ "$1" != orchestrator.py ] || set -- "{START[1]}" "$@"
        exec "{sys.executable}" "$@"
    ''')
    (programs / "python").chmod(0o755)
    return clean_environment(DATABASE_URL=url, METRICS_PORT=0, PYTHONPATH=REPOSITORY,
                             PATH=f"{programs}:{server.bin}:{os.environ['PATH']}")


def run(args: list[str], stdin: str, **options: Any) -> str:
    result = subprocess.run(args, check=False, input=stdin, capture_output=True, text=True, timeout=110, **options)
    assert result.returncode == 0, f"exit code {result.returncode}\n{result.stdout}{result.stderr}"
    assert "Traceback" not in result.stderr, result.stderr
    return result.stdout + result.stderr


def test_documents_say_of_each_code_block_how_it_is_tested() -> None:
    known = (r'psql|(python( worker)?|shell), prints ".+"|pytest, \w+\.py|handlers, enqueue \S+|'
             r'project, (setup|worker|prints ".+" and ".+")|none, .+')
    wrong = [block for block in BLOCKS if not re.fullmatch(known, block.how)]
    assert not wrong
    assert {block.how.split(",")[0] for block in BLOCKS} == {
        "psql", "python", "python worker", "pytest", "shell", "handlers", "project", "none"}
    allowed = ("interactive", "CI", "there are no such hosts", "Docker", "cluster", "Prometheus")
    assert all(any(word in block.how for word in allowed) for block in BLOCKS if block.how.startswith("none"))


def test_readme_is_short_and_every_document_is_linked_from_it() -> None:
    assert TEXTS["README.md"].count("\n") <= 350
    assert set(re.findall(r"\]\((docs/[\w-]+\.md)\)", TEXTS["README.md"])) == TEXTS.keys() - {"README.md"}


def test_documents_psql_examples_run(installed: str, server: Server) -> None:
    setup = """select orchestrator.enqueue('demo:quick', '{}', 0, 'key-' || n) from generate_series(1, 3) n;
               select orchestrator.enqueue('demo:quick', p_run_at => now() + interval '1 day');"""
    for block in [Block("setup", "psql", "sql", setup), *(block for block in BLOCKS if block.how == "psql")]:
        result = subprocess.run([server.bin / "psql", "-X", "-v", "ON_ERROR_STOP=1", installed], check=False, input=block.code,
                                capture_output=True, text=True, timeout=50)
        assert result.returncode == 0, f"{block.place}: {result.stderr}"
    with psycopg.connect(installed) as conn:
        conn.execute("drop role my_service")   # of the whole server
        assert conn.execute("select status from orchestrator.tasks where type = 'order:confirm'").fetchall() == [("cancelled",)]
        assert conn.execute("select count(*) from orders").fetchone() == (1,)


def test_documents_queries_against_symptoms_run(conn: psycopg.Connection[Any]) -> None:
    rows = re.findall(r"^\|.*\|$", section("docs/operations.md", "Troubleshooting"), re.MULTILINE)
    queries = [query for row in rows for query in re.findall(r"`(select .*?)`", row)]
    assert len(queries) >= 8
    for query in queries:
        conn.execute(query)


@pytest.mark.parametrize("block", those("python, "))
def test_documents_python_example_prints_what_it_says(block: Block, db: str, server: Server, tmp_path: Path) -> None:
    output = run([sys.executable, "-"], block.code, cwd=tmp_path, env=environment(tmp_path, db, server))
    assert re.findall(r'"(.+)"', block.how)[0] in output


@pytest.mark.parametrize("block", those("python worker"))
def test_documents_python_worker_prints_what_it_says_and_stops_on_sigterm(
        block: Block, db: str, server: Server, tmp_path: Path) -> None:
    log = tmp_path / "log"
    (tmp_path / "example.py").write_text(block.code)
    with log.open("w") as output:
        process = subprocess.Popen([sys.executable, "example.py"], cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                                   env=environment(tmp_path, db, server))
    try:
        expected = re.findall(r'"(.+)"', block.how)[0]
        eventually(lambda: expected in log.read_text() or process.poll() is not None, 30)
        assert expected in log.read_text() and process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()


def test_documents_pytest_example_passes(db: str, server: Server, tmp_path: Path) -> None:
    files = [block for block in BLOCKS if block.how.startswith("pytest, ")]
    for block in files:
        (tmp_path / block.how.removeprefix("pytest, ")).write_text(block.code)
    output = run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"], "", cwd=tmp_path, env=environment(tmp_path, db, server))
    assert f"{sum(block.code.count('def test_') for block in files)} passed" in output


@pytest.mark.parametrize("block", those("shell"))
def test_documents_shell_example_runs(block: Block, db: str, server: Server, tmp_path: Path) -> None:
    for name in ("orchestrator.py", "handlers.py", "sql"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    output = run(["bash", "-eu", "-o", "pipefail"], block.code, cwd=tmp_path, env=environment(tmp_path, db, server))
    assert all(text in output for text in re.findall(r'"(.+?)"', block.how))


@pytest.mark.parametrize("block", those("handlers"))
def test_documents_handlers_module_runs_its_task(block: Block, installed: str, worker_process: Callable[..., Any], tmp_path: Path,
                                              conn: psycopg.Connection[Any]) -> None:
    (tmp_path / "handlers.py").write_text(block.code)
    worker_process(installed)
    kind = block.how.split("enqueue ")[1]
    conn.execute("select orchestrator.enqueue(%s, '{\"user\": \"Ada\"}')", [kind])
    eventually(lambda: conn.execute("select from orchestrator.tasks where status = 'completed' and type = %s", [kind]).fetchall())


@pytest.fixture
def project(folder: Path) -> Path:
    """A folder as the README's path for copying one file makes it: the bundled program and handlers.py, nothing else."""
    setup = next(block.code for block in BLOCKS if block.how == "project, setup")
    assert "dist/orchestrator.py ." in setup
    (folder / "orchestrator.py").write_text(bundle.bundle())
    (folder / "handlers.py").write_text(next(block.code for block in BLOCKS if block.how.startswith("handlers")))
    return folder


def test_copying_one_file_names_the_packages_that_the_program_needs() -> None:
    setup = next(block.code for block in BLOCKS if block.how == "project, setup")
    needed = re.findall(r"^# dependencies = \[(.*)\]$", PROGRAM.read_text(), re.MULTILINE)[0]
    assert re.findall(r"pip install (.*)", setup)[0].split() == needed.split(", ")


def test_copying_one_file_into_a_project_leads_to_a_worker_on_an_embedded_database(project: Path) -> None:
    worker = next(block.code for block in BLOCKS if block.how == "project, worker")
    block = next(block for block in BLOCKS if block.how.startswith("project, prints"))
    programs = project / "bin"
    programs.mkdir()
    (programs / "python").write_text(f'''#!/bin/sh
        [ "$1" != orchestrator.py ] || set -- "{START[1]}" "$@"
        exec "{sys.executable}" "$@"
    ''')
    (programs / "python").chmod(0o755)
    env = clean_environment(METRICS_PORT=0, PATH=f"{programs}:{os.environ['PATH']}")
    log = project / "log"
    with log.open("w") as output:
        process = subprocess.Popen(["sh", "-c", f"exec {worker}"], cwd=project, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                                   env=env)
    try:
        address = eventually(lambda: re.search(r"http://\S+:\d+/", log.read_text()), 40)
        stats = run(["bash", "-eu", "-o", "pipefail"], block.code, cwd=project, env=env)
        assert "mail:welcome" in stats
        expected = re.findall(r'"(.+?)"', block.how)
        eventually(lambda: all(text in log.read_text() for text in expected))
        with urllib.request.urlopen(address[0], timeout=10) as page:
            assert page.status == 200 and b"</html>" in page.read()
        process.terminate()
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()


def test_each_type_that_a_psql_example_enqueues_has_a_handler_in_the_documents() -> None:
    from handlers import HANDLERS as built_in
    from orchestrator import Router
    modules: dict[str, Any] = {}
    for block in BLOCKS:
        if block.how.startswith("handlers"):
            exec(block.code, namespace := {"__name__": "handlers"})
            modules |= namespace["HANDLERS"]
    router = Router()
    for pattern, handler in {**built_in, **modules}.items():
        router.add(pattern, handler)
    code = "".join(block.code for block in BLOCKS if block.how == "psql" or block.how.startswith("project"))
    types = set(re.findall(r"enqueue(?:_many)?(?:\('| )([a-z]+:[a-z:]+)", code))
    assert {"mail:welcome", "order:confirm", "task:backup"} <= types
    assert [kind for kind in types if router.find(kind) is None] == []


def test_no_two_examples_create_the_same_table_or_handle_the_same_type_differently() -> None:
    sources = {block.place: block.code for block in BLOCKS}
    sources |= {path.name: path.read_text() for path in (REPOSITORY / "examples").iterdir() if path.suffix in (".py", ".sql")}
    for pattern in (r"create table if not exists (\w+)|__tablename__ = \"(\w+)\"", r"@app\.handler\(\"([^\"]+)\""):
        places: dict[str, list[str]] = {}
        for place, code in sources.items():
            for groups in re.findall(pattern, code):
                places.setdefault("".join(groups), []).append(place)
        assert len(places) > 2
        assert {name: where for name, where in places.items() if len(set(where)) > 1} == {}


# ------------------------------------------------------------------------------------------ what it says of the code
def sql_docs() -> ModuleType:
    sys.path.insert(0, str(REPOSITORY / "tools"))
    import sql_docs as module
    return module


def test_documents_tables_of_settings_functions_metrics_and_alerts_are_current(installed: str) -> None:
    for path, text in sql_docs().written(installed).items():
        assert text.splitlines() == TEXTS[path].splitlines(), f"{path}: run `make sql-docs`"


def test_settings_table_has_each_setting_with_its_default() -> None:
    from orchestrator import Config
    table = dict(re.findall(r"^\| `([A-Z_]+)` \| (?:`(.*?)`)? \|", TEXTS["docs/settings.md"], re.MULTILINE))
    defaults = Config.load({}, environ={})
    assert Config.load({}, environ={name: value for name, value in table.items() if value}) == defaults
    assert {name.lower() for name in table} == set(vars(defaults))


def anchors(text: str) -> set[str]:
    return {re.sub(r"[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-") for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


def test_documents_name_only_make_targets_files_and_sections_that_exist() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    for name, text in {**TEXTS, "CONTRIBUTING.md": (REPOSITORY / "CONTRIBUTING.md").read_text()}.items():
        code = [*re.findall(r"`([^`\n]+)`", text), *(line for block in BLOCKS for line in block.code.splitlines())]
        assert {name for line in code for name in re.findall(r"^make ([a-z][a-z-]+)", line)} <= targets
        folder = (REPOSITORY / name).parent
        links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src(?:set)?="([^"]+)"', text)
        for link in (link for link in links if "://" not in link):
            path, _, anchor = link.partition("#")
            target = folder / path if path else REPOSITORY / name
            assert target.exists(), f"{name}: {link}"
            assert not anchor or anchor in anchors(target.read_text()), f"{name}: {link}"


def test_documents_name_only_functions_and_views_that_exist(conn: psycopg.Connection[Any]) -> None:
    names = set(re.findall(r"\borchestrator\.([a-z]\w+)", TEXT)) - {"py"}
    known = {name for name, in conn.execute("""
        select proname from pg_proc where pronamespace = 'orchestrator'::regnamespace
        union select relname from pg_class where relnamespace = 'orchestrator'::regnamespace""").fetchall()}
    assert {name for name in names if not name.startswith("api_")} <= known


def test_documents_describe_each_role_and_no_other() -> None:
    roles = set(re.findall(r"\borchestrator_[a-z]+\b", (REPOSITORY / "sql" / "90_roles.sql").read_text()))
    rows = re.findall(r"^\| `(orchestrator_\w+)`", section("docs/operations.md", "Security"), re.MULTILINE)
    assert set(rows) == roles


def test_documents_describe_each_built_in_handler() -> None:
    from handlers import HANDLERS
    text = section("docs/handlers.md", "Built-in handlers")
    assert {kind for kind in re.findall(r"`((?:task|service|demo):\S+)`", text)} == set(HANDLERS)
