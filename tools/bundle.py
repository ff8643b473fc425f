"""Write dist/orchestrator.py: one file to copy into a project, with the SQL and the page inside.

Between the two markers of orchestrator.py stand each file of sql/ and page.html as they are, as raw strings: readable, greppable,
and the same bytes each time.
"""
from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(?<=\n)# --- bundled files: .*?\n# --- end of bundled files -*\n", re.DOTALL)


def raw_string(name: str, text: str) -> str:
    """A raw string literal of exactly this text."""
    if not text.endswith("\n") or "\r" in text:
        raise SystemExit(f"{name}: must end with a newline, and have no carriage returns")
    for quotes in ('"""', "'''"):
        literal = f"r{quotes}{text}{quotes}"
        if quotes not in text and ast.literal_eval(literal) == text:
            return literal
    raise SystemExit(f"{name}: has both kinds of triple quotes, so no raw string can hold it")


def bundle(repository: Path = REPOSITORY) -> str:
    """The bundled program. Raises SystemExit where that is impossible."""
    program = (repository / "orchestrator.py").read_text("utf-8")
    folder = repository / "sql"
    files = {str(path.relative_to(folder)): path.read_text("utf-8") for path in sorted(folder.rglob("*.sql"))}
    page = (repository / "page.html").read_text("utf-8")
    lines = ["# --- bundled files: sql/ and page.html, as in the repository ".ljust(125, "-"), "BUNDLED_SQL: dict[str, str] = {"]
    lines += [f"{name!r}: {raw_string(name, text)},\n" for name, text in files.items()]
    lines += ["}", f"BUNDLED_PAGE = {raw_string('page.html', page)}"]
    lines += ["# --- end of bundled files ".ljust(125, "-"), ""]
    bundled, found = BLOCK.subn(lambda _: "\n".join(lines), program)
    if found != 1:
        raise SystemExit("orchestrator.py: must have the two markers of the bundled files, once")
    compile(bundled, "dist/orchestrator.py", "exec")
    return bundled


def main() -> int:
    target = REPOSITORY / "dist" / "orchestrator.py"
    target.parent.mkdir(exist_ok=True)
    target.write_text(bundle(), "utf-8")
    target.chmod(0o755)
    print(f"{target.relative_to(REPOSITORY)}: {target.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
