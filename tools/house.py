"""Print the size of the house as a table, this tree beside another revision. `python tools/house.py [--write] REVISION`

--write puts the table into CONTRIBUTING.md.

Lengths are in lines from `def` or `class` to the end. Threads, locks, tables and settings are counted where the source creates them.
"""
from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def git(*args: str) -> str:
    return subprocess.run(["git", *args], cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout


def longest(tree: ast.AST, *kinds: type[ast.AST]) -> str:
    sizes = {node.name: node.end_lineno - node.lineno + 1 for node in ast.walk(tree) if isinstance(node, kinds)}   # type: ignore[attr-defined]
    name = max(sizes, key=lambda name: sizes[name])
    return f"`{name}`, {sizes[name]:,}"


def size(text: str) -> str:
    return f"{len(text.encode()) / 1000:.0f} kB, {len(text.splitlines()):,} lines"


def settings(tree: ast.AST) -> int:
    config = next(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == "Config")
    return sum(isinstance(node, ast.AnnAssign) for node in config.body)


def figures(files: list[str], read: Callable[[str], str]) -> dict[str, str]:
    program = read("orchestrator.py")
    sql = "".join(read(name) for name in files if re.fullmatch(r"sql/\d\d_\w+\.sql", name))
    tree = ast.parse(program)
    # to the end of its body: $$; or, of a body in standard SQL, end; or the end of the statement
    starts = re.split(r"(?m)^(?=create or replace function orchestrator\.)", sql)[1:]
    ends = (re.search(r"(?ms)\A.*?(?:\$\$(?:(?!\$\$).)*\$\$;|begin atomic.*?^end;|\breturn\s[^;]*;)$", start) for start in starts)
    lengths = {start.split(".", 1)[1].split("(")[0]: end[0].count("\n") + 1 for start, end in zip(starts, ends, strict=True) if end}
    longest_sql = max(lengths, key=lambda name: lengths[name])
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
                  and isinstance(node.value, ast.Name) and node.value.id == "self"}
    return {
        "orchestrator.py": size(program),
        "sql/": size(sql),
        "README.md": size(read("README.md")),
        "longest class": longest(tree, ast.ClassDef),
        "longest function": longest(tree, ast.FunctionDef, ast.AsyncFunctionDef),
        "longest SQL function": f"`{longest_sql}`, {lengths[longest_sql]}",
        "names of attributes in all classes": str(len(attributes)),
        "SQL functions, public": str(len({name for name in lengths if not name.startswith("_")})),
        "SQL functions, private": str(len({name for name in lengths if name.startswith("_")})),
        "tables": str(len(set(re.findall(r"create table if not exists orchestrator\.(\w+)", sql)))),
        "places that start a thread": str(len(re.findall(r"threading\.Thread\(", program))),
        "locks and conditions": str(len(re.findall(r"threading\.(?:R?Lock|Condition|Semaphore|BoundedSemaphore)\(", program))),
        "settings": str(settings(tree)),
    }


def main() -> int:
    write, revisions = "--write" in sys.argv, [word for word in sys.argv[1:] if word != "--write"]
    if len(revisions) != 1:
        sys.exit(__doc__)
    names = git("ls-tree", "-r", "--name-only", revisions[0]).splitlines()
    before = figures(names, lambda name: git("show", f"{revisions[0]}:{name}"))
    now = figures(git("ls-files").splitlines(), lambda name: (REPOSITORY / name).read_text())
    table = "\n".join(["| | before | now |", "|---|---|---|", *(f"| {name} | {before[name]} | {now[name]} |" for name in now)])
    if not write:
        print(table)
        return 0
    document = REPOSITORY / "CONTRIBUTING.md"
    text, found = re.subn(r"(?s)(<!-- house -->\n).*?(<!-- end of house -->)", lambda match: f"{match[1]}{table}\n{match[2]}",
                          document.read_text())
    if found != 1:
        sys.exit("CONTRIBUTING.md: must have <!-- house --> and <!-- end of house -->, each once")
    document.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
