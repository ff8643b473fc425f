"""The house rules of orchestrator.py, sql/ and README.md that can be counted. Prints each finding; exits 1 if there is one."""
from __future__ import annotations

import ast
import re
import symtable
import sys
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent

LIMITS = {
    "bytes of orchestrator.py": 229_200,   # what comes in must be paid for
    "bytes of sql/": 259_000,
    "lines of README.md": 350,
    "characters of a line": 110,
    "lines of a class": 250,
    "lines of a function": 45,
}
# In this order; a section may use names of its own and of those above it.
SECTIONS = ("errors and checks", "settings and logging", "database", "tasks", "dispatch", "worker", "orchestrator",
            "metrics", "HTTP", "embedded PostgreSQL", "commands")
BANNER = "nothing below is needed to understand a worker"
BANNER_FOLLOWS = "orchestrator"
SQL_SECTION = "database"

HEADING = re.compile(r"# ={20,} (.+)")
# How statements begin; a space stands for any white space.
OPENINGS = (
    r"(select|insert into|delete from|merge into|truncate|listen|unlisten|notify|vacuum|analyze) \S", r"update \S+ set",
    r"with \w+ (\(.*?\) )?as ((not )?materialized )?\(", r"call \S+\(", r"do \$", r"copy \S+ (\(.*?\) )?(from|to)",
    r"(create|alter|drop|comment on) (or replace )?(table|view|function|schema|index|type|role|user|database|sequence|extension)",
    r"(grant|revoke) .* (to|from)", r"set (local|session|role) \S", r"set \w+[_.]\w+( to|\s*=)", r"(begin|commit|rollback);")
STATEMENT = re.compile(rf"\s*({'|'.join(OPENINGS)})".replace(" ", r"\s+"), re.DOTALL)
CALL = re.compile(r"\b(from|join|into|update|select)\s+orchestrator\.(?!py\b)\w")


def sections(program: str) -> list[tuple[str, int]]:
    """Each section's name and the line of its heading."""
    lines = enumerate(program.splitlines(), 1)
    return [(found[1].strip(), number) for number, line in lines if (found := HEADING.fullmatch(line))]


def section_of(line: int, found: list[tuple[str, int]]) -> int:
    """The number of the section that a line is in; -1: above them all."""
    return sum(start <= line for _, start in found) - 1


def size(text: str) -> int:
    return len(text.encode())


def too_large(program: str, sql: dict[str, str], readme: str) -> Iterator[str]:
    sizes = {"bytes of orchestrator.py": size(program), "bytes of sql/": sum(map(size, sql.values())),
             "lines of README.md": len(readme.splitlines())}
    for name, found in sizes.items():
        if found > LIMITS[name]:
            yield f"{found:,} {name}: at most {LIMITS[name]:,}"
    for number, line in enumerate(program.splitlines(), 1):
        if len(line) > LIMITS["characters of a line"]:
            yield f"orchestrator.py:{number}: a line of {len(line)} characters: at most {LIMITS['characters of a line']}"
    for node in ast.walk(ast.parse(program)):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            kind = "class" if isinstance(node, ast.ClassDef) else "function"
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > LIMITS[f"lines of a {kind}"]:
                yield f"orchestrator.py:{node.lineno}: {kind} {node.name} of {length} lines: at most {LIMITS[f'lines of a {kind}']}"


def wrong_order(program: str) -> Iterator[str]:
    """The headings and the banner, where they aren't those that are expected."""
    found = sections(program)
    if tuple(name for name, _ in found) != SECTIONS:
        yield "orchestrator.py: its sections are " + ", ".join(name for name, _ in found) + "; they must be " + ", ".join(SECTIONS)
    banners = [number for number, line in enumerate(program.splitlines(), 1) if re.fullmatch(rf"# -+ {BANNER} ?-+", line)]
    if len(banners) != 1:
        yield f"orchestrator.py: must have the line `# --- {BANNER} ---…` once"
    elif found and found[max(section_of(banners[0], found), 0)][0] != BANNER_FOLLOWS:
        yield f"orchestrator.py:{banners[0]}: the banner must be at the end of the section {BANNER_FOLLOWS}"


def sql_outside_the_database(program: str) -> Iterator[str]:
    """String literals that are SQL, outside the section that may have them. Docstrings may show SQL."""
    found, tree = sections(program), ast.parse(program)
    bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, (str, bytes)) or id(node) in bare:
            continue
        section = section_of(node.lineno, found)
        if section >= 0 and found[section][0] == SQL_SECTION:
            continue
        text = node.value if isinstance(node.value, str) else node.value.decode("latin-1")
        if is_sql(text):
            yield f"orchestrator.py:{node.lineno}: SQL outside the section {SQL_SECTION}: {' '.join(text.split())[:50]!r}"


def is_sql(text: str) -> bool:
    """Whether it looks like a statement: its keywords are lowercase or uppercase, so that "Select a queue" is not one."""
    first = (text.split() or [""])[0]
    text = text.lower() if first.isupper() else text
    return bool(STATEMENT.match(text) or CALL.search(text))


def definitions(program: str) -> dict[str, int]:
    """Of each name of the module: the line where it is first defined."""
    lines: dict[str, int] = {}
    for statement in ast.parse(program).body:
        for name, line in bound(statement):
            lines.setdefault(name, line)
    return lines


def bound(statement: ast.AST) -> Iterator[tuple[str, int]]:
    """The names that a statement of the module defines, with their lines."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield statement.name, statement.lineno   # what its body binds is its own
    elif isinstance(statement, (ast.Import, ast.ImportFrom)):
        for alias in statement.names:
            yield (alias.asname or alias.name).split(".")[0], statement.lineno
    elif isinstance(statement, ast.Name) and isinstance(statement.ctx, ast.Store):
        yield statement.id, statement.lineno
    elif not isinstance(statement, ast.Lambda):
        for child in ast.iter_child_nodes(statement):
            yield from bound(child)


def globals_used(table: symtable.SymbolTable) -> Iterator[tuple[symtable.SymbolTable, str]]:
    """(scope, name) where a function or class body refers to a name of the module. Annotations are not evaluated, and don't count."""
    for scope in table.get_children():
        if scope.get_type() in ("function", "class"):
            for symbol in scope.get_symbols():
                if symbol.is_global() and symbol.is_referenced():
                    yield scope, symbol.get_name()
        yield from globals_used(scope)


def upward(program: str) -> Iterator[str]:
    """Uses of what is defined only in a later section."""
    found, defined = sections(program), definitions(program)
    for scope, name in globals_used(symtable.symtable(program, "orchestrator.py", "exec")):
        line = scope.get_lineno()
        here, there = section_of(line, found), section_of(defined.get(name, 0), found)
        if there > here:
            place = found[here][0] if here >= 0 else "head"
            yield f"orchestrator.py:{line}: {scope.get_name()}, in {place}, uses {name} of the later section {found[there][0]}"


def findings(program: str, sql: dict[str, str], readme: str) -> list[str]:
    """All of them, those with a line in the order of lines."""
    found = [*too_large(program, sql, readme), *wrong_order(program), *sql_outside_the_database(program), *upward(program)]
    return sorted(found, key=lambda text: int((re.match(r"orchestrator\.py:(\d+)", text) or [0, 0])[1]))


def main(repository: Path = REPOSITORY) -> int:
    program = (repository / "orchestrator.py").read_text("utf-8")
    sql = {str(path): path.read_text("utf-8") for path in sorted((repository / "sql").rglob("*.sql"))}
    found = findings(program, sql, (repository / "README.md").read_text("utf-8"))
    print(*found, sep="\n", end="\n" if found else "")
    print(f"orchestrator.py: {size(program):,} bytes, sql/: {sum(map(size, sql.values())):,} bytes, {len(found)} findings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
