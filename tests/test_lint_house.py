"""Each rule of tools/lint_house.py, seen red on a small program."""
from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from conftest import REPOSITORY
from tools import lint_house

BANNER = f"# --- {lint_house.BANNER} {'-' * 20}"


def program(**code: str) -> str:
    """A program of all sections, with this code in some: the name's words are joined by underscores."""
    parts = ['"""What it is."""', "from __future__ import annotations", code.pop("head", "")]
    for name in lint_house.SECTIONS:
        parts += [f"# {'=' * 40} {name}", code.pop(name.replace(" ", "_"), "")]
        if name == lint_house.BANNER_FOLLOWS:
            parts.append(BANNER)
    assert not code
    return "\n".join(parts) + "\n"


def findings(text: str, sql: str = "", readme: str = "") -> list[str]:
    return lint_house.findings(text, {"10.sql": sql}, readme)


def function(lines: int) -> str:
    return "def f():\n" + "    pass\n" * (lines - 1)


def test_a_good_program_has_no_findings():
    good = program(head="LIMIT = 1", database='QUERY = "select 1"', tasks="def task() -> Later:\n    return LIMIT, QUERY",
                   commands="class Later:\n    def run(self):\n        return task()")
    assert findings(good, "select 1;\n", "# Title\n") == []


def test_a_program_or_sql_or_readme_that_grows_too_large_is_found():
    most = lint_house.LIMITS
    text = program()
    text += ("#" * 99 + "\n") * (most["bytes of orchestrator.py"] // 100)
    assert findings(text) == [f"{len(text):,} bytes of orchestrator.py: at most {most['bytes of orchestrator.py']:,}"]
    bytes_of_sql = most["bytes of sql/"]
    assert findings(program(), sql="é" * (bytes_of_sql // 2 + 1)) == [
        f"{2 * (bytes_of_sql // 2 + 1):,} bytes of sql/: at most {bytes_of_sql:,}"]
    assert findings(program(), readme="line\n" * 351) == ["351 lines of README.md: at most 350"]


def test_a_long_line_is_found():
    assert findings(program(tasks="#" * 110)) == []
    [found] = findings(program(tasks="#" * 111))
    assert "a line of 111 characters: at most 110" in found


def test_a_long_function_is_found_also_in_a_class():
    assert findings(program(tasks=function(45))) == []
    assert "function f of 46 lines: at most 45" in findings(program(tasks=function(46)))[0]
    method = "class C:\n" + "".join(f"    {line}\n" for line in function(46).splitlines())
    assert "function f of 46 lines: at most 45" in findings(program(tasks=method))[0]


def test_a_long_class_is_found():
    assert findings(program(tasks="class C:\n" + "    x = 1\n" * 249)) == []
    assert "class C of 251 lines: at most 250" in findings(program(tasks="class C:\n" + "    x = 1\n" * 250))[0]


def test_sections_that_are_missing_or_in_another_order_are_found():
    assert "its sections are " in findings(program().replace("= metrics", "= measures"))[0]
    swapped = program().replace("= tasks", "= x").replace("= dispatch", "= tasks").replace("= x", "= dispatch")
    assert "database, dispatch, tasks, worker" in findings(swapped)[0]


def test_a_banner_that_is_missing_doubled_or_elsewhere_is_found():
    text = program()
    assert findings(text.replace(BANNER, "")) == [f"orchestrator.py: must have the line `# --- {lint_house.BANNER} ---…` once"]
    assert findings(text.replace(BANNER, f"{BANNER}\n{BANNER}")) == findings(text.replace(BANNER, ""))
    moved = text.replace(BANNER + "\n", "") + BANNER + "\n"
    assert "the banner must be at the end of the section orchestrator" in findings(moved)[0]


@pytest.mark.parametrize("statement", [
    "select 1", "SELECT count(*) FROM t", "\n  select *\n  from t", "insert into t values (1)", "update t set x = 1", "delete from t",
    "with found as (select 1) select * from found", "with moved (a, b) as materialized (", "listen orchestrator", "notify x", "truncate t",
    "create table t (x int)", "create or replace function f()", "drop schema orchestrator", "alter role r", "set local lock_timeout = 0",
    "set search_path to ''", "begin;", "do $$ begin end $$", "call orchestrator.f()", "copy t (x) from stdin", "grant all on t to r",
    "and x = any (select id from orchestrator.tasks)", "select orchestrator.enqueue('t')"])
def test_sql_outside_the_database_section_is_found(statement):
    assert "SQL outside the section database" in findings(program(worker=f"query = {statement!r}"))[0]
    assert findings(program(commands=f"query = {statement.encode()!r}"))
    assert findings(program(head=f"query = {statement!r}"))
    assert findings(program(database=f"query = {statement!r}")) == []


def test_sql_in_an_f_string_is_found():
    assert findings(program(worker='def f(name):\n    return f"select * from orchestrator.{name}"'))
    assert findings(program(worker='def f(name):\n    return f"{name} join orchestrator.tasks"'))


@pytest.mark.parametrize("text", [
    "Select a queue from the list", "select", "a task that was selected", "update", "update the schema", "with a timeout", "set it to 5",
    "delete", "begin", "listen", "the schema orchestrator", "create it", "orchestrator.py", "copy one file to your project",
    "from orchestrator.py"])
def test_prose_is_not_taken_for_sql(text):
    assert findings(program(worker=f"text = {text!r}")) == []


def test_docstrings_may_show_sql():
    assert findings(program(tasks='def f():\n    """select orchestrator.enqueue(\'t\')"""')) == []


def test_a_name_of_a_later_section_is_found_in_functions_methods_and_lambdas():
    for user in ("def f():\n    return Later()", "class C:\n    def m(self):\n        return [Later() for _ in ()]", "f = lambda: Later()"):
        [found] = findings(program(tasks=user, HTTP="class Later:\n    pass"))
        assert "in tasks, uses Later of the later section HTTP" in found


def test_a_section_may_use_itself_those_above_locals_and_annotations():
    fine = """
def first(value: Later) -> Later:
    later: Later = second()
    return later
def second():
    Later = 1
    return [Later for Later in range(Later)], ABOVE
class C:
    field: Later
    def Later(self):
        return self.Later
"""
    assert findings(program(head="ABOVE = 1", tasks=fine, HTTP="class Later:\n    pass")) == []


def test_a_name_that_is_defined_above_and_again_below_counts_as_above():
    assert findings(program(tasks="def f():\n    return x", database="x = 1", HTTP="x = 2")) == []


def test_a_name_defined_in_a_branch_of_the_module_counts_as_its_sections():
    later = "try:\n    import fcntl\nexcept ImportError:\n    fcntl = None"
    [found] = findings(program(tasks="def f():\n    return fcntl", HTTP=later))
    assert "uses fcntl of the later section HTTP" in found


def test_the_tool_prints_its_findings_and_fails(tmp_path):
    (tmp_path / "sql").mkdir()
    (tmp_path / "tools").mkdir()
    shutil.copy(REPOSITORY / "tools" / "lint_house.py", tmp_path / "tools")
    (tmp_path / "README.md").write_text("# Title\n")
    for text, code in ((program(), 0), (program(worker='q = "select 1"'), 1)):
        (tmp_path / "orchestrator.py").write_text(text)
        done = subprocess.run([sys.executable, tmp_path / "tools" / "lint_house.py"], check=False, capture_output=True, text=True)
        assert done.returncode == code
        assert f"{code} findings" in done.stdout
