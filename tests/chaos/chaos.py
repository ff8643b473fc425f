"""Kill, stop and disconnect everything while tasks run; nothing may be lost, nothing may end twice.

  python tests/chaos/chaos.py                    every fault at its full size (55 minutes; times are judged, so leave the machine to it)
  python tests/chaos/chaos.py --short            the version of CI (4 minutes; judges what is lost, doubled or illegal)
  python tests/chaos/chaos.py --only SIGKILL     this fault, or those whose name contains this; may be repeated
  python tests/chaos/chaos.py --list

Prints a row for each fault; exits with 1 if an invariant was violated, a limit exceeded, or a fault never bit. CHAOS_KEEP=1 keeps the
workers' logs. The PostgreSQL is one of its own, with fsync on.
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import collecting  # noqa: E402, F401 (it registers its fault, as the next ones)
import dags  # noqa: E402, F401
import durable  # noqa: E402, F401
import limits  # noqa: E402, F401
import schedules  # noqa: E402, F401
from faults import FAULTS, SERVER_CLOCK  # noqa: E402
from harness import Lab, Row, follow, local_server, server_with_a_clock  # noqa: E402

from postgres import LocalServer  # noqa: E402

ONLY_FULL = {"SIGKILL, default leases"}   # not for CI: a worker is declared dead after 30 s only
DOCUMENT = HERE.parent.parent / "docs" / "benchmarks.md"
HEADINGS = ("fault", "size", "seed", "lost", "ended twice", "run again", "late outcomes rejected", "recovered", "recovery p50 / p99", "")


def cells(row: Row) -> list[str]:
    def seconds(value: float) -> str:
        return f"{value * 1000:.1f} ms" if value < 0.1 else f"{value:.1f} s"
    times = f"{seconds(row.p50)} / {seconds(row.p99)}" if row.p50 is not None and row.p99 is not None else "–"
    return [row.fault, row.size, str(row.seed), str(row.lost), str(row.twice), str(row.again), str(row.late), str(row.recoveries), times,
            "pass" if row.passed else "FAIL"]


def table(rows: list[Row]) -> str:
    lines = [HEADINGS, ["---"] * len(HEADINGS), *(cells(row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


@contextlib.contextmanager
def lab_for(name: str, server: LocalServer, seed: int, short: bool) -> Iterator[Lab]:
    """The shared server and a database of its own; two servers where one of them is to fail, one with a clock that can be set."""
    if name == SERVER_CLOCK:
        with server_with_a_clock() as (own, set_off), Lab(name, own, seed, short) as lab:
            lab.clock = set_off
            yield lab
        return
    if name != "standby promoted":
        with Lab(name, server, seed, short) as lab:
            yield lab
            server_url = lab.url
        server.drop_database(server_url)
        return
    with local_server() as first, local_server() as second:
        follow(second, first)
        url = f"postgresql://postgres@127.0.0.1:{first.port},127.0.0.1:{second.port}/postgres?target_session_attrs=read-write"
        with Lab(name, first, seed, short, url=url) as lab:
            lab.servers = first, second
            yield lab


def run(name: str, server: LocalServer, seed: int, short: bool) -> Row:
    began = time.monotonic()
    lab = None
    try:
        with lab_for(name, server, seed, short) as lab:
            size = FAULTS[name](lab)
            return lab.verdict(size)
    except Exception as error:
        traceback.print_exc()
        problems = [*(lab.problems if lab else []), f"{type(error).__name__}: {error}"]
        return Row(name, "–", seed, seconds=time.monotonic() - began, problems=problems)


def write_document(rows: list[Row]) -> None:
    text = DOCUMENT.read_text()
    new, found = re.subn(r"(<!-- chaos -->\n).*?(<!-- /chaos -->)", lambda m: f"{m[1]}{table(rows)}\n{m[2]}", text, flags=re.DOTALL)
    if not found:
        sys.exit("docs/benchmarks.md lacks the markers <!-- chaos --> … <!-- /chaos -->")
    DOCUMENT.write_text(new)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="small sizes")
    parser.add_argument("--only", action="append", metavar="FAULT", help="only the fault of this name, else those whose name contains it")
    parser.add_argument("--seed", type=int, default=int(time.time()) % 1_000_000)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    parser.add_argument("--write-docs", action="store_true", help="put the table into docs/benchmarks.md")
    parser.add_argument("--list", action="store_true", help="only name the faults")
    args = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGINT):   # INT too: a shell's background job ignores it
        signal.signal(number, lambda number, _: sys.exit(128 + number))   # by way of all that must be stopped
    wanted = args.only or [""]   # a name, else a part of names
    names = [name for name in FAULTS if any(part == name or (part not in FAULTS and part.lower() in name.lower()) for part in wanted)]
    if args.short:
        names = [name for name in names if name not in ONLY_FULL]
    if args.list or not names:
        print("\n".join(FAULTS))
        return 0 if args.list else 2
    rows: list[Row] = []
    print(f"seed {args.seed}", flush=True)
    with local_server() as server:
        for name in names:
            row = run(name, server, args.seed, args.short)
            rows.append(row)
            print("  ".join(cells(row)) + f"  ({row.seconds:.0f} s)", flush=True)
    print("\n" + table(rows))
    for row in rows:
        for problem in row.problems[:10]:
            print(f"{row.fault}: {problem}")
    if args.json:
        args.json.write_text(json.dumps([{**dataclasses.asdict(row), "passed": row.passed} for row in rows], indent=1))
    if args.write_docs:
        write_document(rows)
    return 0 if all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
