"""Take the README's pictures of the page, docs/page.png and docs/page-dark.png: two workers on a scratch database, real tasks,
headless Chromium. `make screenshot`; needs chromium on the PATH. The 15 minutes before the first task are made up, so that the
drawings are as wide as they are after a quarter of an hour.
"""
from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import psycopg
from playwright.sync_api import sync_playwright

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "tests"))
from postgres import LocalServer, eventually, install_schema  # noqa: E402

SECONDS = 40
CHROMIUM = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync")
HANDLERS = textwrap.dedent('''
    import random
    from orchestrator import Discard, Handler

    def quick(task):
        if random.random() < 0.02:
            raise TimeoutError("smtp.example.com did not answer within 10 s")

    def resize(task):
        task.cancelled.wait(random.uniform(0.5, 3))
        if random.random() < 0.15:
            raise OSError("truncated image: 1042 of 8817 bytes")

    def deliver(task):
        raise Discard("410 Gone: https://hooks.example.com/orders was removed")

    def crawl(task):
        for page in range(10000):
            task.progress({"step": "fetching", "page": page, "of": 10000})
            if task.cancelled.wait(0.5):
                return

    HANDLERS = {"mail:": Handler(quick, max_retries=5, base_delay=20), "image:resize": Handler(resize, base_delay=30),
                "webhook:deliver": deliver, "search:crawl": crawl, "report:weekly": quick, "invoice:send": quick}
''')
HISTORY = """
    insert into orchestrator.stats_samples
    select clock_timestamp() - make_interval(secs => s), 60 + 40 * sin(s / 70.0) + 400 * exp(-(((s - 540) / 45.0) ^ 2)) + 9 * random(),
           26 + s / 90, 9 + 5 * sin(s / 40.0), 3, -s * 50 - 300 * sin(s / 60.0), null
    from generate_series(25, 900, 10) s"""
ENDED = """
    update orchestrator.stats_samples a set ended_total = enqueued_total - waiting - scheduled - in_flight
    where ended_total is null"""
ENQUEUE = """
    select orchestrator.enqueue('mail:welcome', jsonb_build_object('to', n)) from generate_series(1, %(mails)s) n
    union all select orchestrator.enqueue('mail:digest', '{}', -1) from generate_series(1, 2)
    union all select orchestrator.enqueue('image:resize', jsonb_build_object('path', '/photos/' || n)) from generate_series(1, 2) n
    union all select orchestrator.enqueue('webhook:deliver', '{"url": "https://hooks.example.com/orders", "secret": "x"}') where %(odd)s
    union all select orchestrator.enqueue('invoice:send', '{}')"""
FIRST = """
    select orchestrator.enqueue('search:crawl', '{"site": "https://example.com"}') from generate_series(1, 2)
    union all select orchestrator.enqueue('report:weekly', '{}', p_run_at => clock_timestamp() + make_interval(hours => n))
              from generate_series(1, 8) n"""
SCHEDULES = """
    select orchestrator.schedule('monday report', '0 8 * * mon', 'report:weekly', p_timezone => 'Europe/Berlin'),
           orchestrator.schedule('digest', '@every 20 seconds', 'mail:digest'),
           orchestrator.schedule('invoices', '*/15 8-18 * * mon-fri', 'invoice:send')"""


@contextlib.contextmanager
def busy_workers() -> Iterator[tuple[str, str]]:
    """Two workers that have things to do. Yields the database's URL and the address of the first one's page."""
    server = LocalServer()
    folder = Path(tempfile.mkdtemp(prefix="screenshot-"))
    workers: list[subprocess.Popen[bytes]] = []
    stopped = threading.Event()
    try:
        url = server.create_database("screenshot")
        install_schema(url)
        (folder / "work.py").write_text(HANDLERS)
        for n in (1, 2):
            environment = {**os.environ, "DATABASE_URL": url, "HANDLERS": str(folder / "work.py"), "METRICS_PORT": "0",
                           "DISTRIBUTED_MODE": "true", "ADMIN_TOKEN": "screenshot", "WORKER_POOL_SIZE": "8"}
            with (folder / f"{n}.log").open("wb") as log:
                workers.append(subprocess.Popen([sys.executable, REPOSITORY / "orchestrator.py"], cwd=folder, env=environment,
                                                stdout=log, stderr=log, start_new_session=True))
        address = eventually(lambda: re.findall(r"http://[^\s/]+:\d+", (folder / "1.log").read_text()), 30)[0]
        producer = threading.Thread(target=produce, args=(url, stopped), daemon=True)
        producer.start()
        yield url, address
    finally:
        stopped.set()
        for worker in workers:
            worker.kill()
            worker.wait()
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


def produce(url: str, stopped: threading.Event) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(HISTORY)
        connection.execute(ENDED)
        connection.execute(FIRST)
        connection.execute(SCHEDULES)
        connection.execute("select orchestrator.pause_type('invoice:send')")
        turn = 0
        while not stopped.wait(0.5):
            turn += 1
            connection.execute(ENQUEUE, {"mails": 15 + 10 * (turn % 4), "odd": turn % 20 == 3})


def main() -> int:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        print("chromium is not on the PATH: apt-get install chromium", file=sys.stderr)
        return 1
    (REPOSITORY / "docs").mkdir(exist_ok=True)
    with busy_workers() as (_, address), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(CHROMIUM))
        for scheme, name in (("light", "page.png"), ("dark", "page-dark.png")):
            page = browser.new_page(viewport={"width": 1280, "height": 960}, color_scheme=scheme)
            page.goto(address)
            page.wait_for_timeout(SECONDS * 1000 if scheme == "light" else 3000)
            page.screenshot(path=REPOSITORY / "docs" / name)
        browser.close()
    print("docs/page.png docs/page-dark.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
