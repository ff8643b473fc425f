"""Write the generated tables of docs/, each between two markers: SQL functions, settings, metrics and alerts.

`make sql-docs`. The functions, views and tables come from the catalog and its comments, the settings from Config, the metrics from
two running workers, the alerts from configs/alerts.yml. A test compares the documents with what this would write.
"""
from __future__ import annotations

import dataclasses
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import yaml
from prometheus_client import CollectorRegistry

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from handlers import HANDLERS
from orchestrator import Config, Orchestrator
from postgres import install_schema, start_server

REPOSITORY = Path(__file__).resolve().parent.parent
DOCUMENTS = {"docs/sql.md": ("sql",), "docs/settings.md": ("settings",), "docs/metrics.md": ("metrics", "alerts")}
HEADINGS = {"20_enqueue.sql": "Enqueue", "22_schedules.sql": "Schedules", "32_limits.sql": "Limits", "45_after.sql": "Workflows",
            "47_replace.sql": "Workflows", "48_steps.sql": "Workflows", "83_wait.sql": "Workflows", "70_operate.sql": "Operate",
            "75_bulk.sql": "Operate",
            "80_inspect.sql": "Inspect", "82_audit.sql": "Inspect",
            "00_schema.sql": "Inspect"}   # for people; the rest is for workers, the leader and the page
FUNCTIONS = """
    select p.proname, pg_get_function_arguments(p.oid), pg_get_function_result(p.oid), obj_description(p.oid, 'pg_proc')
    from pg_proc p where p.pronamespace = 'orchestrator'::regnamespace and p.proname !~ '^_' and p.prokind = 'f'
      and p.prorettype <> 'trigger'::regtype
    order by p.proname, 2"""
RELATIONS = """
    select c.relname, c.relkind, obj_description(c.oid, 'pg_class')
    from pg_class c where c.relnamespace = 'orchestrator'::regnamespace and c.relkind in ('r', 'v')
      and c.relname !~ '^_' order by c.relname"""
COLUMNS = """
    select a.attname, format_type(a.atttypid, a.atttypmod), col_description(a.attrelid, a.attnum) from pg_attribute a
    where a.attrelid = %s::regclass and a.attnum > 0 and not a.attisdropped order by a.attnum"""


def defined_in() -> dict[str, str]:
    """Which file of sql/ defines a function."""
    files = {}
    for path in sorted((REPOSITORY / "sql").glob("*.sql")):
        for name in re.findall(r"^\s*create or replace function orchestrator\.(\w+)", path.read_text(), re.MULTILINE):
            files[name] = path.name
    return files


def cell(text: str | None) -> str:
    return (text or "").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def table(names: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}", *(f"| {' | '.join(row)} |" for row in rows), ""]


def arguments(text: str) -> str:
    """Shorter, and with no `::type` behind the defaults."""
    text = re.sub(r"::[a-z.\"\[\] ]+?(?=,|$)", "", text).replace("timestamp with time zone", "timestamptz")
    return text.replace(" DEFAULT ", " = ").replace("integer", "int").replace("NULL", "null")


def sql_docs(connection: psycopg.Connection[Any]) -> str:
    with connection.transaction():
        connection.execute("set local search_path = pg_catalog, orchestrator")   # no `orchestrator.` before each type
        functions = connection.execute(FUNCTIONS).fetchall()
        relations = connection.execute(RELATIONS).fetchall()
        columns = connection.execute(COLUMNS, ["orchestrator.tasks"]).fetchall()
    files = defined_in()
    groups: dict[str, list[tuple[str, ...]]] = {heading: [] for heading in [*HEADINGS.values(), "Rest"]}
    for name, args, result, comment in functions:
        out = re.findall(r"OUT (\w+ [^,]+)", args)   # the columns of a single row
        args = re.sub(r"(, )?OUT \w+ [^,]+", "", args)
        returns = f"row ({arguments(', '.join(out))})" if out else arguments(re.sub(r"^TABLE\((.*)\)$", r"rows (\1)", result))
        groups[HEADINGS.get(files.get(name, ""), "Rest")].append((f"`{name}({arguments(args)})`", f"`{returns}`", cell(comment)))
    lines = []
    for heading in (heading for heading in dict.fromkeys(HEADINGS.values()) if groups[heading]):
        lines += [f"### {heading}", "", *table(("function", "returns", "what it does"), groups[heading])]
    views = [(f"`{name}`", cell(comment)) for name, kind, comment in relations if kind == "v"]
    lines += ["### Views", "", *table(("view", "what it shows"), views)]
    lines += ["### For workers, the leader and the page", "", *table(("function", "returns", "what it does"), groups["Rest"])]
    lines += ["### Tables, and the columns of `tasks`", "",
              *table(("table", "what it holds"), [(f"`{name}`", cell(comment)) for name, kind, comment in relations if kind == "r"]),
              *table(("column of tasks", "type", "what it is"),
                     [(f"`{name}`", f"`{arguments(kind)}`", cell(comment)) for name, kind, comment in columns])]
    lines.pop()   # the empty line behind the last table
    return "\n".join(lines)


def default(field: dataclasses.Field[Any]) -> str:
    """A default as one would write it in the environment."""
    value = field.default
    if isinstance(value, float):   # all durations, and they alone
        unit, seconds = next((unit, seconds) for unit, seconds in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)) if value % seconds == 0)
        return f"`{value / seconds:g}{unit}`"
    return "" if value in ("", None) else f"`{str(value).lower()}`"


def settings() -> str:
    rows = [(f"`{field.name.upper()}`", default(field), cell(field.metadata["help"])) for field in dataclasses.fields(Config)]
    return "\n".join(table(("setting", "default", "what it is"), rows)).rstrip()


def families(app: Orchestrator) -> Callable[[], dict[str, Any]]:
    """Start a worker, and return the function that collects its metric families, by name."""
    registered: list[Any] = []
    register = CollectorRegistry.register

    def note(registry: CollectorRegistry, collector: Any) -> None:
        registered.append(collector)
        register(registry, collector)
    CollectorRegistry.register = note   # type: ignore[method-assign]
    try:
        app.start()
    finally:
        CollectorRegistry.register = register   # type: ignore[method-assign]
    ours = [collector for collector in registered if type(collector).__module__ == "orchestrator"]
    assert ours, "the worker registers no collector"
    return lambda: {family.name: family for collector in ours for family in collector.collect()}


def metrics(url: str) -> str:
    """Of two workers, of which one leads: the leader alone exports what is true of the whole queue."""
    leader, follower = (Orchestrator(url, handlers=HANDLERS, metrics_port=0, distributed_mode=True) for _ in range(2))
    try:
        of_leader = families(leader)
        until = time.monotonic() + 30
        while "tasks_pending" not in of_leader() and time.monotonic() < until:
            threading.Event().wait(0.05)
        of_each = families(follower)().keys()
        found = of_leader()
        assert found.keys() - of_each, "the first worker does not lead"
        rows = []
        for family in found.values():
            name = family.name + {"counter": "_total", "info": "_info"}.get(family.type, "")
            labels = getattr(family, "_labelnames", ())
            shown = f"`{name}`" + (f" by {', '.join(labels)}" if labels else "")
            rows.append((shown, family.type, "each worker" if family.name in of_each else "the leader", cell(family.documentation)))
    finally:
        follower.stop(grace=0)
        leader.stop(grace=0)
    return "\n".join(table(("metric", "kind", "exported by", "what it is"), rows)).rstrip()


def alerts() -> str:
    groups = yaml.safe_load((REPOSITORY / "configs" / "alerts.yml").read_text())["groups"]
    rows = []
    for rule in (rule for group in groups for rule in group["rules"]):
        wait = f"for {rule['for']}" if "for" in rule else "at once"
        when = " ".join(rule["expr"].split()).replace("|", "\\|")
        what_to_do = cell(rule["annotations"]["description"].strip())
        rows.append((f"`{rule['alert']}`", rule["labels"]["severity"], f"`{when}` {wait}", what_to_do))
    return "\n".join(table(("alert", "severity", "when", "what to do"), rows)).rstrip()


def replaced(document: str, name: str, text: str) -> str:
    """The document with the part between two markers replaced."""
    begin, end = f"<!-- {name}: written by make sql-docs -->", f"<!-- end of {name} -->"
    if document.count(begin) != 1 or document.count(end) != 1:
        raise SystemExit(f"the document must have {begin} and {end}, each once")
    before, rest = document.split(begin)
    return f"{before}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}"


def written(url: str) -> dict[str, str]:
    """The documents as they should be, by path; `url` is a database that has the schema and no worker."""
    with psycopg.connect(url) as connection:
        parts = {"sql": sql_docs(connection)}
    parts |= {"settings": settings(), "metrics": metrics(url), "alerts": alerts()}
    documents = {}
    for path, names in DOCUMENTS.items():
        documents[path] = (REPOSITORY / path).read_text()
        for name in names:
            documents[path] = replaced(documents[path], name, parts[name])
    return documents


def main() -> None:
    server = start_server()
    try:
        url = server.create_database()
        install_schema(url)
        for path, text in written(url).items():
            (REPOSITORY / path).write_text(text)
        server.drop_database(url)
    finally:
        server.stop()


if __name__ == "__main__":
    main()
