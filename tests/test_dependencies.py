"""The pinned dependencies: named alike everywhere, and the parts of psycopg that are not its public API are as Link expects."""
from __future__ import annotations

import ast
import importlib
import inspect
import re
import socket
import time
import tomllib

import psycopg
import pytest
from psycopg import waiting

import orchestrator
from conftest import PROGRAM, REPOSITORY

# Documented by psycopg: a minor version doesn't change them.
PUBLIC = {"psycopg", "psycopg.pq", "psycopg.adapt.PyFormat", "psycopg.adapt.Transformer", "psycopg.conninfo.conninfo_to_dict",
          "psycopg.conninfo.make_conninfo", "psycopg.types.json.Jsonb", "psycopg.types.string.TextLoader", "psycopg.rows.tuple_row"}
# Not documented, and how orchestrator.py calls them.
INTERNAL = {
    "psycopg.generators.execute": ("pgconn",),
    "psycopg.errors.error_from_result": ("result", "encoding"),
    "psycopg.adapt.Transformer.dump_sequence": ("self", "params", "formats"),
    "psycopg.adapt.Transformer.set_pgresult": ("self", "result"),
    "psycopg.adapt.Transformer.load_rows": ("self", "row0", "row1", "make_row"),
    "psycopg.Connection.wait": ("self", "gen"),
    "psycopg.pq.PGconn.send_query_params": ("self", "command", "param_values"),
    "psycopg.pq.PGconn.send_prepare": ("self", "name", "command"),
    "psycopg.pq.PGconn.send_query_prepared": ("self", "name", "param_values"),
}


def requirements() -> list[str]:
    lines = (REPOSITORY / "requirements.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def minors_of_the_range() -> list[str]:
    """From psycopg[binary]>=3.2.11,<3.4: 3.2 and 3.3."""
    found = re.search(r"(?m)^psycopg\[binary\]>=3\.(\d+)(?:\.\d+)?,<3\.(\d+)$", "\n".join(requirements()))
    assert found, "requirements.txt: psycopg must be pinned to minor versions, as psycopg[binary]>=3.2.11,<3.4"
    return [f"3.{minor}" for minor in range(int(found[1]), int(found[2]))]


def untested(version: str, minors: list[str]) -> str | None:
    """What to do about a version of psycopg that nobody has tried with Link."""
    if ".".join(version.split(".")[:2]) in minors:
        return None
    return (f"psycopg {version} is not among the tested minors {', '.join(minors)}: run the tests with it, look at what Link uses of it, "
            "then move the range in requirements.txt, pyproject.toml and the head of orchestrator.py")


def resolve(name: str) -> object:
    parts = name.split(".")
    found: object = importlib.import_module(parts[0])
    for number, part in enumerate(parts[1:], 2):
        if not hasattr(found, part):
            importlib.import_module(".".join(parts[:number]))
        found = getattr(found, part)
    return found


def changed(name: str, arguments: tuple[str, ...]) -> str | None:
    """How a part of psycopg differs from what orchestrator.py expects of it."""
    try:
        parameters = inspect.signature(resolve(name)).parameters.values()   # type: ignore[arg-type]
    except (AttributeError, ImportError):
        return f"{name} is gone"
    names = tuple(parameter.name for parameter in parameters)
    required = [parameter.name for parameter in parameters if parameter.default is parameter.empty
                and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)]
    if names[:len(arguments)] != arguments or not set(required) <= set(arguments):
        return f"{name}{names} was called with {arguments}"
    return None


def imported() -> set[str]:
    """What orchestrator.py imports of psycopg, by full name."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(PROGRAM.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] == "psycopg"}


def test_requirements_wheel_and_script_header_name_the_same_ranges():
    header = re.search(r"(?ms)^# /// script\n(.*?)^# ///$", PROGRAM.read_text())
    assert header
    script = tomllib.loads(re.sub(r"(?m)^# ?", "", header[1]))
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert script["dependencies"] == project["dependencies"] == requirements()
    assert script["requires-python"] == project["requires-python"]


def test_the_installed_psycopg_is_of_a_tested_minor_version():
    assert untested(psycopg.__version__, minors_of_the_range()) is None


def test_an_untested_psycopg_is_named_with_what_to_do():
    assert minors_of_the_range() == ["3.2", "3.3"]
    assert untested("3.4.0", minors_of_the_range()).startswith("psycopg 3.4.0 is not among the tested minors 3.2, 3.3: ")
    assert untested("3.30.1", minors_of_the_range())
    assert untested("3.3.9", minors_of_the_range()) is None


@pytest.mark.parametrize("name", INTERNAL)
def test_psycopg_has_the_internal_part_as_link_uses_it(name):
    assert changed(name, INTERNAL[name]) is None


def test_a_changed_internal_part_is_noticed():
    assert changed("psycopg.generators.perform", ("pgconn",)) == "psycopg.generators.perform is gone"
    assert "was called with" in str(changed("psycopg.generators.execute", ("pgconn", "timeout")))
    assert "was called with" in str(changed("psycopg.adapt.Transformer.load_rows", ("self", "row0", "row1")))


def test_a_wait_for_a_silent_server_resumes_its_generator_at_each_interval():
    """Link's deadline relies on it: the generator sees that nothing is ready, and may raise."""
    ours, theirs = socket.socketpair()
    seen = []

    def until_the_third_time():
        while len(seen) < 3:
            seen.append((yield waiting.Wait.R))
        return "given up"

    with ours, theirs:
        began = time.monotonic()
        assert waiting.wait(until_the_third_time(), ours.fileno(), 0.01) == "given up"
    assert [int(ready) for ready in seen] == [0, 0, 0]
    assert time.monotonic() - began < 5


def test_every_import_from_psycopg_is_known_as_public_or_checked_here():
    modules = {name.rsplit(".", 1)[0] for name in INTERNAL}
    assert imported() - PUBLIC <= modules | set(INTERNAL) | {"psycopg.generators", "psycopg.waiting"}


def test_the_internal_parts_that_link_calls_are_checked_here():
    used = set(re.findall(r"\b(?:adapter|server|generators|errors)\.(\w+)\(", inspect.getsource(orchestrator.Link)))
    assert len(used) >= 8 and used <= {name.rsplit(".", 1)[1] for name in INTERNAL}
