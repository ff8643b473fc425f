"""The page in headless Chromium, on a real worker: what it shows is what SQL says, and what it does happens."""
from __future__ import annotations

import re
import shutil
import textwrap
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from conftest import REPOSITORY, WorkerProcess
from postgres import eventually, free_port
from steps import Connection, column, count_now, enqueue, enqueue_some, row, status, value

# The shell, a package of its own in Debian, needs less than half of the CPU time.
CHROMIUM = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium-headless-shell")
ARGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync"]
# The page asks the server every 2 seconds, and eight times as often here.
HURRY = "{ const later = window.setTimeout; window.setTimeout = (call, ms, ...given) => later(call, ms === 2000 ? 250 : ms, ...given) }"
SCRIPT = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
TOKEN = "let-me-in"
expect.set_options(timeout=20_000)
HANDLERS = textwrap.dedent(f'''
    from orchestrator import Handler

    def fails(task):
        raise ValueError("broken " + task.payload.get("why", ""))

    def hangs(task):
        task.progress({{"step": 7, "password": "canary", "of": 2000}})
        task.cancelled.wait(50)

    HANDLERS = {{"ok": lambda task: None, "hangs": hangs, "fails": Handler(fails, max_retries=0),
                 "again": Handler(fails, base_delay=3000), {SCRIPT!r}: Handler(fails, max_retries=0)}}
''')


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield launched
        launched.close()


@pytest.fixture
def worker(installed: str, worker_process: Callable[..., WorkerProcess], tmp_path: Path) -> Callable[..., WorkerProcess]:
    """Start a worker with the handlers above."""
    (tmp_path / "work.py").write_text(HANDLERS)
    settings = {"HANDLERS": str(tmp_path / "work.py"), "CLAIM_INTERVAL": "100ms", "ADMIN_TOKEN": TOKEN}
    return lambda **more: worker_process(installed, **{**settings, **more})


class Tab:
    """A browser tab. At the end of the test its console must be clean, except for what the test expected."""

    def __init__(self, browser: Browser, **options: Any) -> None:
        self.expected: list[str] = []
        self.errors: list[str] = []
        self.page: Page = browser.new_page(**options)
        self.page.set_default_timeout(15_000)
        self.page.add_init_script(HURRY)
        self.page.on("console", lambda m: self.errors.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))

    def check(self) -> None:
        assert [e for e in self.errors if not any(re.search(x, e) for x in self.expected)] == []


@pytest.fixture
def tabs(browser: Browser) -> Iterator[Callable[..., Tab]]:
    opened: list[Tab] = []

    def open_tab(address: str, **options: Any) -> Tab:
        opened.append(Tab(browser, **options))
        opened[-1].page.goto(address)
        return opened[-1]

    yield open_tab
    for tab in opened:
        tab.check()
        tab.page.close()


@pytest.fixture
def page(worker: Callable[..., WorkerProcess], tabs: Callable[..., Tab]) -> Page:
    """The page of a worker that has an admin token."""
    return tabs(worker().address).page


def cell(page: Page, table: str, key: str, head: str) -> str:
    """What a table of the page says in the row whose first cell is `key`."""
    found = page.locator(f"#{table} tbody tr").filter(has=page.get_by_text(key, exact=True))
    at = page.locator(f"#{table} thead th").all_inner_texts().index(head)
    return found.locator("td").nth(at).inner_text()


def give_token(page: Page, token: str = TOKEN) -> None:
    page.locator("#token").fill(token)
    page.get_by_role("button", name="Go on").click()


def dead(conn: Connection, n: int, why: str = "") -> list[str]:
    ids = [enqueue(conn, "fails", {"why": why}) for _ in range(n)]
    eventually(lambda: all(status(conn, id) == "dead_letter" for id in ids))
    count_now(conn)
    return ids


def test_page_shows_the_numbers_that_sql_has(conn: Connection, page: Page) -> None:
    dead(conn, 3)
    again = enqueue(conn, "again")
    hanging = [enqueue(conn, "hangs") for _ in range(2)]
    enqueue_some(conn, 1234, "nobody:handles-it")
    conn.execute("select orchestrator.pause_type('ok')")
    enqueue_some(conn, 5, "ok")
    eventually(lambda: status(conn, again) == "retry_scheduled" and all(status(conn, h) == "running" for h in hanging))
    totals = row(conn, "select sum(waiting)::int waiting, sum(scheduled)::int scheduled, sum(in_flight)::int in_flight,"
                       " sum(dead_letters)::int dead from orchestrator.queue_stats")
    count_now(conn)
    assert totals == {"waiting": 1239, "scheduled": 1, "in_flight": 2, "dead": 3}
    for name, shown in (("waiting", "1,239"), ("scheduled", "1"), ("in-flight", "2"), ("dead", "3")):
        expect(page.locator(f"#{name}")).to_have_text(shown)
    expect(page.locator("#enqueued-note")).to_have_text("1,245 in all")
    assert [cell(page, "types", "ok", head) for head in ("State", "Ready")] == ["paused", "5"]
    assert [cell(page, "types", "hangs", head) for head in ("State", "In flight")] == ["working", "2"]
    assert cell(page, "types", "fails", "Dead") == "3"
    assert [cell(page, "types", "nobody:handles-it", head) for head in ("State", "Ready")] == ["no worker", "1,234"]
    expect(page.locator("#attention")).to_contain_text("Paused: ok (5 ready)")
    expect(page.locator("#attention")).to_contain_text("No live worker handles: nobody:handles-it (1,234 tasks)")
    expect(page.locator("#workers tbody tr")).to_have_count(1)
    expect(page.locator("#workers .leader")).to_have_text("leader")
    expect(page.locator("#running tbody tr")).to_have_count(2)
    expect(page.locator("#running tbody")).to_contain_text("step 7, password [redacted], of 2000")
    expect(page.locator("#retries tbody")).to_contain_text("ValueError: broken")
    expect(page.locator("#failures tbody tr")).to_have_count(4)
    expect(page.locator("#dead-letters tbody tr")).to_have_count(3)
    assert "canary" not in page.content()


def test_page_updates_itself_and_keeps_the_rows_and_the_focus_that_it_has(conn: Connection, page: Page) -> None:
    dead(conn, 1)
    link = page.locator("#dead-letters td.id a")
    link.focus()
    page.evaluate("document.querySelector('#dead-letters tbody tr').mine = true")
    dead(conn, 2)
    expect(page.locator("#dead-letters tbody tr")).to_have_count(3)
    assert page.evaluate("[...document.querySelectorAll('#dead-letters tbody tr')].map(row => row.mine === true)") == [
        False, False, True]
    assert page.evaluate("document.activeElement.closest('tr')?.mine") is True
    conn.execute("delete from orchestrator.tasks")
    expect(page.locator("#dead-letters tbody tr")).to_have_count(0)
    expect(page.get_by_text("None: nothing has failed for good.")).to_be_visible()


def test_depth_and_throughput_are_drawn_from_the_samples(conn: Connection, page: Page) -> None:
    conn.execute("""
        insert into orchestrator.stats_samples
        select clock_timestamp() - make_interval(secs => 30 + 10 * n), 900 + n, 0, 7, 0, 1000 - n * 20, 500 - n * 50
        from generate_series(0, 20) n""")
    page.reload()
    for line in ("#depth .line", "#rate .line.b"):   # wait_for_function would need eval, which the policy forbids
        expect(page.locator(line).first).to_have_attribute("d", re.compile("(L[^L]*){15}"))
    page.locator("#rate").focus()
    for _ in range(4):   # past what the worker has sampled meanwhile
        page.keyboard.press("ArrowLeft")
    expect(page.locator("#rate-legend")).to_have_text("ended 5.0/senqueued 2.0/s")
    expect(page.locator("#rate-at")).to_contain_text("at ")
    page.get_by_role("button", name="1 h", exact=True).click()
    expect(page.get_by_role("button", name="1 h", exact=True)).to_have_attribute("aria-pressed", "true")


def test_page_says_when_it_loses_the_server_and_goes_on_with_the_next(
        conn: Connection, worker: Callable[..., WorkerProcess], tabs: Callable[..., Tab]) -> None:
    port = free_port()
    first = worker(METRICS_PORT=port)
    tab = tabs(first.address)
    tab.expected = ["ERR_CONNECTION_REFUSED", "ERR_CONNECTION_RESET", "ERR_EMPTY_RESPONSE", "status of 503"]
    expect(tab.page.locator("#link-state")).to_contain_text("live")
    dead(conn, 1)
    expect(tab.page.locator("#dead")).to_have_text("1")
    tab.page.evaluate("window.before = true")
    first.kill()
    expect(tab.page.get_by_role("alert")).to_contain_text("No answer from the server since")
    expect(tab.page.locator("#dead")).to_have_text("1")   # what was known stays in sight
    worker(METRICS_PORT=port)
    expect(tab.page.get_by_role("alert")).to_be_hidden()
    expect(tab.page.locator("#link-state")).to_contain_text("live")
    dead(conn, 1)
    expect(tab.page.locator("#dead")).to_have_text("2")
    assert tab.page.evaluate("window.before")


def test_page_tells_a_database_that_is_gone_from_a_server_that_is(
        conn: Connection, worker: Callable[..., WorkerProcess], tabs: Callable[..., Tab]) -> None:
    tab = tabs(worker().address)
    tab.expected = ["status of 503"]
    expect(tab.page.locator("#link-state")).to_contain_text("live")
    sound = value(conn, "select pg_get_functiondef('orchestrator.api_overview'::regproc)")
    conn.execute("create or replace function orchestrator.api_overview() returns jsonb language plpgsql as "
                 "$$ begin raise 'starting up' using errcode = '57P03'; end $$")
    expect(tab.page.get_by_role("alert")).to_contain_text("The server answers, but not with data")
    conn.execute(sound)
    expect(tab.page.get_by_role("alert")).to_be_hidden()


def test_cancel_and_retry_ask_for_the_token_once(conn: Connection, page: Page) -> None:
    hanging = enqueue(conn, "hangs")
    [failed] = dead(conn, 1)
    page.get_by_role("button", name=f"Cancel {hanging}").click()
    give_token(page)
    expect(page.locator("#notice")).to_contain_text("Asked it to stop")
    eventually(lambda: status(conn, hanging) == "cancelled")
    page.get_by_role("button", name=f"Retry {failed}").click()
    eventually(lambda: column(conn, "select event from orchestrator.task_events where task_id = %s and event = 'retried'", failed))
    expect(page.locator("#ask")).to_be_hidden()


def test_schedules_say_when_and_why_not_and_are_fired_paused_and_resumed(conn: Connection, page: Page) -> None:
    expect(page.get_by_role("heading", name="Schedules")).to_be_hidden()
    rows = page.locator("#schedules tbody tr")
    conn.execute("select orchestrator.schedule('yearly', '0 0 1 1 *', 'ok', p_timezone => 'Europe/Berlin')")
    expect(rows).to_have_count(1)
    heads = ("Cron", "Time zone", "Type", "State")
    assert [cell(page, "schedules", "yearly", head) for head in heads] == ["0 0 1 1 *", "Europe/Berlin", "ok", "active"]
    expect(page.get_by_role("columnheader", name="Why")).to_be_hidden()   # nothing to say
    expect(rows).to_contain_text(re.compile(r"in \d+ (d|h|min)"))
    page.get_by_role("button", name="Fire yearly").click()
    expect(page.locator("#confirm")).to_contain_text("Fire yearly?")
    page.get_by_role("button", name="Fire it").click()
    give_token(page)
    expect(page.locator("#notice")).to_contain_text("ok is enqueued.")
    [id] = column(conn, "select id::text from orchestrator.tasks")
    rows.get_by_role("link", name="ago").click()
    expect(page.locator("#story-id")).to_have_text(id)
    page.get_by_role("button", name="Close").click()
    page.get_by_role("button", name="Pause yearly").click()
    page.get_by_role("button", name="Pause it").click()
    expect(rows.locator(".state")).to_have_attribute("title", "paused: select orchestrator.resume_schedule('yearly')")
    assert value(conn, "select paused from orchestrator.schedules") is True
    page.get_by_role("button", name="Resume yearly").click()
    expect(page.locator("#notice")).to_contain_text("yearly goes on with its next time.")
    assert value(conn, "select paused from orchestrator.schedules") is False


def test_schedules_in_trouble_come_first_and_ask_for_attention(conn: Connection, page: Page) -> None:
    for name, kind in (("a fine one", "ok"), ("handled by none", "nobody:handles-it"), ("z failed", "fails"),
                       ("of a paused type", "again"), (SCRIPT, "hangs")):
        conn.execute("select orchestrator.schedule(%s, '@yearly', %s)", [name, kind])
    conn.execute("select orchestrator.pause_type('again')")
    conn.execute("update orchestrator.schedules set paused = true, last_error = 'payload: is over 256 KiB' where name = 'z failed'")
    rows = page.locator("#schedules tbody tr")
    expect(rows).to_have_count(5)
    expect(rows.first).to_contain_text("payload: is over 256 KiB")
    expect(rows.first.locator(".state")).to_have_attribute("title", re.compile("^paused, since it could not fire: .*resume_schedule"))
    names = ("a fine one", "handled by none", "z failed", "of a paused type", SCRIPT)
    assert [cell(page, "schedules", name, "State") for name in names] == ["active", "no worker", "failed", "type paused", "active"]
    expect(page.locator("#attention")).to_contain_text("Schedules that could not fire, and are paused: fails (z failed)")
    assert page.evaluate("[document.scripts.length, document.images.length, typeof window.hacked]") == [1, 0, "undefined"]


def test_a_wrong_token_is_asked_for_again_and_nothing_happens(
        conn: Connection, worker: Callable[..., WorkerProcess], tabs: Callable[..., Tab]) -> None:
    tab = tabs(worker().address)
    tab.expected = ["status of 401"]
    page = tab.page
    [failed] = dead(conn, 1)
    page.get_by_role("button", name=f"Retry {failed}").click()
    give_token(page, "wrong")
    expect(page.locator("#ask-text")).to_contain_text("did not accept")
    assert status(conn, failed) == "dead_letter"
    page.keyboard.press("Escape")
    expect(page.locator("#ask")).to_be_hidden()
    assert page.evaluate("sessionStorage.length") == 0
    assert status(conn, failed) == "dead_letter"


def test_wide_actions_ask_before(conn: Connection, page: Page) -> None:
    failed = dead(conn, 3)
    conn.execute("select orchestrator.pause_type('fails')")
    button = page.get_by_role("button", name="Retry the dead letters of fails")
    button.click()
    give_token(page)
    expect(page.locator("#confirm")).to_contain_text("Retry 3 tasks?")
    expect(page.locator("#confirm")).to_contain_text("type fails, status dead_letter")
    page.locator("#confirm").get_by_role("button", name="Leave it").click()
    assert {status(conn, id) for id in failed} == {"dead_letter"}
    button.click()
    page.get_by_role("button", name="Retry them").click()
    expect(page.locator("#notice")).to_contain_text("3 tasks are back in the queue.")
    assert {status(conn, id) for id in failed} == {"pending"}
    page.get_by_role("button", name="Pause ok").click()
    page.get_by_role("button", name="Pause it").click()
    paused = "select paused from orchestrator.task_types where type = 'ok'"
    eventually(lambda: value(conn, paused))
    page.get_by_role("button", name="Resume ok").click()
    eventually(lambda: value(conn, paused) is False)


def test_what_was_found_is_cancelled_retried_and_purged_after_a_preview(conn: Connection, page: Page) -> None:
    conn.execute("select orchestrator.pause_type(%s)", [SCRIPT])
    ids = enqueue_some(conn, 700, SCRIPT)
    kept = enqueue(conn, "ok", run_at="2030-01-01")
    states = "select distinct status::text from orchestrator.tasks where type = %s"

    def act(action: str, state: str) -> None:
        page.goto(page.url.split("#")[0] + "#" + urllib.parse.urlencode({"type": SCRIPT, "status": state}))
        page.get_by_role("button", name=f"{action} these").click()

    act("Cancel", "ready")
    give_token(page)
    expect(page.locator("#confirm")).to_contain_text("Cancel 700 tasks?")
    expect(page.locator("#confirm")).to_contain_text(f"type {SCRIPT}, status ready matches {SCRIPT}")
    expect(page.locator("#confirm")).to_contain_text(" and so on. What is in flight")
    expect(page.locator("#results-title")).to_contain_text("Ready tasks of")
    assert column(conn, states, SCRIPT) == ["pending"]
    assert column(conn, "select action from orchestrator.operations") == ["pause"]
    page.get_by_role("button", name="Cancel them").click()
    expect(page.locator("#notice")).to_contain_text("700 tasks are cancelled.")
    assert column(conn, states, SCRIPT) == ["cancelled"]
    act("Retry", "cancelled")
    page.get_by_role("button", name="Retry them").click()
    expect(page.locator("#notice")).to_contain_text("700 tasks are back in the queue.")
    act("Purge", "ready")
    page.get_by_role("button", name="Purge them").click()
    expect(page.locator("#notice")).to_contain_text("0 tasks are deleted. 700 skipped.")
    conn.execute("select orchestrator.cancel_task(%s)", [ids[0]])
    act("Purge", "cancelled")
    page.get_by_role("button", name="Purge it").click()
    expect(page.locator("#notice")).to_contain_text("1 task is deleted.")
    assert status(conn, kept) == "pending" and value(conn, "select count(*) from orchestrator.tasks") == 700
    page.get_by_role("link", name="back to the overview").click()
    rows = page.locator("#operations tbody tr")
    expect(rows).to_have_count(5)
    expect(rows.first).to_contain_text("purge")
    expect(rows.last).to_contain_text('pause{"type":"')
    assert page.evaluate("[document.scripts.length, document.images.length, typeof window.hacked]") == [1, 0, "undefined"]


def test_page_is_read_only_without_an_admin_token(
        conn: Connection, worker: Callable[..., WorkerProcess], tabs: Callable[..., Tab]) -> None:
    address = worker(ADMIN_TOKEN="").address
    [failed] = dead(conn, 1)
    page = tabs(address).page
    expect(page.locator("#dead-letters tbody tr")).to_have_count(1)
    expect(page.locator("table button:visible")).to_have_count(0)
    page.locator("#dead-letters td.id a").click()
    expect(page.locator("#story")).to_be_visible()
    expect(page.locator("#story button:visible")).to_have_count(1)   # Close
    page.keyboard.press("Escape")
    page.goto(address + "/#status=dead_letter")
    expect(page.locator("#found tbody tr")).to_have_count(1)
    expect(page.locator("#results button:visible")).to_have_count(0)
    request = urllib.request.Request(address + "/api/retry", data=b'{"id": "%s"}' % failed.encode(),
                                     headers={"Authorization": f"Bearer {TOKEN}"}, method="POST")
    with pytest.raises(HTTPError) as refused:
        urllib.request.urlopen(request, timeout=10)
    assert refused.value.code == 403
    assert status(conn, failed) == "dead_letter"


def test_script_tags_in_type_payload_and_error_stay_text(conn: Connection, page: Page) -> None:
    id = enqueue(conn, SCRIPT, {"why": SCRIPT, SCRIPT: SCRIPT})
    eventually(lambda: status(conn, id) == "dead_letter")
    conn.execute("select orchestrator.pause_type(%s)", [SCRIPT])
    enqueue(conn, SCRIPT)
    count_now(conn)
    expect(page.locator("#dead-letters td.type")).to_have_text(SCRIPT)
    expect(page.locator("#failures td.grow")).to_contain_text(SCRIPT)
    expect(page.locator("#types")).to_contain_text(SCRIPT)
    expect(page.locator("#attention")).to_contain_text(SCRIPT)
    page.locator("#dead-letters td.id a").click()
    expect(page.locator("#story-title")).to_have_text(SCRIPT)
    expect(page.locator("#story-error")).to_contain_text(SCRIPT)
    expect(page.locator("#story-payload")).to_contain_text(SCRIPT)
    expect(page.locator("#story-events")).to_contain_text(SCRIPT)
    page.keyboard.press("Escape")
    page.locator("#types td a", has_text="script").click()
    expect(page.locator("#results-title")).to_contain_text(SCRIPT)
    assert page.evaluate("[document.scripts.length, document.images.length, typeof window.hacked]") == [1, 0, "undefined"]


def test_search_finds_by_id_type_and_status(conn: Connection, page: Page) -> None:
    failed = dead(conn, 2)
    done = enqueue(conn, "ok")
    eventually(lambda: status(conn, done) == "completed")
    enqueue_some(conn, 130, "nobody:handles-it")

    def search(text: str, state: str = "") -> None:
        page.keyboard.press("/")
        page.locator("#query").fill(text)
        page.locator("#status").select_option(state)
        page.keyboard.press("Enter")
        page.get_by_role("button", name="Search").click()

    rows = page.locator("#found tbody tr")
    search(done)
    expect(rows).to_have_count(1)
    expect(page.locator("#found td.id a")).to_have_attribute("title", done)
    search(failed[0][:-2])
    expect(rows).to_have_count(1)
    search("fails")
    expect(rows).to_have_count(2)
    search("fails", "completed")
    expect(page.get_by_text("No task found.")).to_be_visible()
    search("", "dead_letter")
    expect(rows).to_have_count(2)
    search("nobody:handles-it")
    expect(rows).to_have_count(100)
    page.get_by_role("button", name="Show more").click()
    expect(rows).to_have_count(130)
    expect(page.get_by_role("button", name="Show more")).to_be_hidden()
    page.get_by_role("link", name="back to the overview").click()
    expect(page.locator("#board")).to_be_visible()


def test_a_story_opens_by_its_address_and_closes_with_the_keyboard(conn: Connection, page: Page) -> None:
    [failed] = dead(conn, 1, "password=hunter2")
    conn.execute("update orchestrator.tasks set payload = payload || '{\"password\": \"canary\"}' where id = %s", [failed])
    page.goto(page.url.split("#")[0] + "#task=" + failed)
    story = page.locator("#story")
    expect(story).to_be_visible()
    expect(page.locator("#story-id")).to_have_text(failed)
    expect(page.locator("#story-why")).to_contain_text("gave up after 1")
    expect(page.locator("#story-events li")).to_have_count(4)   # enqueued, claimed, failed, dead letter
    expect(page.locator("#story-payload")).to_contain_text('"password": "[redacted]"')
    assert "canary" not in page.content()
    page.keyboard.press("Escape")
    expect(story).to_be_hidden()
    link = page.locator("#dead-letters td.id a")
    link.focus()
    page.keyboard.press("Enter")
    expect(story).to_be_visible()
    page.get_by_role("button", name="Close").click()
    expect(story).to_be_hidden()
    assert page.evaluate("document.activeElement.closest('#dead-letters') !== null")


def test_a_story_follows_its_task_and_acts_on_it(conn: Connection, page: Page) -> None:
    hanging = enqueue(conn, "hangs")
    eventually(lambda: status(conn, hanging) == "running")
    page.goto(page.url.split("#")[0] + "#task=" + hanging)
    expect(page.locator("#story-progress")).to_contain_text("step: 7\npassword: [redacted]\nof: 2000")
    page.get_by_role("button", name="Cancel the task").click()
    give_token(page)
    eventually(lambda: status(conn, hanging) == "cancelled")
    expect(page.locator("#story-facts")).to_contain_text("cancelled")
    expect(page.locator("#story").get_by_role("button", name="Retry")).to_be_visible()


def test_a_story_links_its_parents_and_the_children_that_wait_for_it(conn: Connection, page: Page) -> None:
    parent = enqueue(conn, "nobody:parent")
    child = enqueue(conn, "nobody:child", after=[parent])
    page.goto(page.url.split("#")[0] + "#task=" + child)
    facts = page.locator("#story-facts")
    expect(facts).to_contain_text("Depends onnobody:parent pending")
    expect(page.locator("#story-why")).to_contain_text(f"waits for task {parent} (pending)")
    facts.get_by_role("link", name="nobody:parent").click()
    expect(page.locator("#story-id")).to_have_text(parent)
    expect(facts).to_contain_text("Waiting for itnobody:child pending")
    expect(facts).to_contain_text("Statusready")
    enqueue(conn, "nobody:child", after=[parent])
    expect(facts.locator("dd div")).to_have_text(["nobody:child pending"] * 2)   # a line each


def test_what_is_due_comes_before_what_is_blocked(conn: Connection, page: Page) -> None:
    parent = enqueue(conn, "nobody:due", run_at="2030-01-01")
    for _ in range(9):
        enqueue(conn, "nobody:blocked", after=[parent])
    rows = page.locator("#retries tbody tr")
    expect(rows.first).to_contain_text("nobody:due")
    expect(rows.nth(1)).to_contain_text("nobody:blocked")
    expect(page.locator("#scheduled-note")).to_contain_text("next in")


def test_a_story_has_steps_signals_expiry_and_keys(conn: Connection, page: Page) -> None:
    id = enqueue(conn, "nobody:steps", concurrency_key="acme", expires_at="2030-01-01")
    conn.execute("""insert into orchestrator.task_steps (task_id, name, result, at, until) values
                    (%(id)s, 'charge', '{"id": "ch_1", "token": "canary"}', now(), null),
                    (%(id)s, 'approved', null, null, '2030-01-02')""", {"id": id})
    page.goto(page.url.split("#")[0] + "#task=" + id)
    expect(page.locator("#story-steps")).to_contain_text('charge{"id":"ch_1","token":"[redacted]"}approvedwaits for the signal until ')
    expect(page.locator("#story-facts")).to_contain_text("Concurrency keyacme")
    expect(page.locator("#story-facts")).to_contain_text("Expires")
    page.goto(page.url.split("#")[0] + "#task=" + enqueue(conn, "nobody:no-steps"))
    expect(page.locator("#story-title")).to_have_text("nobody:no-steps")
    expect(page.locator("#story-steps")).to_be_hidden()


def test_an_unknown_task_is_said_and_not_an_outage(
        worker: Callable[..., WorkerProcess], tabs: Callable[..., Tab]) -> None:
    tab = tabs(worker().address + "/#task=01890a5d-ac96-774b-bcce-b302099a8057")
    tab.expected = ["status of 404"]
    expect(tab.page.locator("#notice")).to_contain_text("There is no task with this id")
    expect(tab.page.get_by_role("alert")).to_be_hidden()
    expect(tab.page.locator("#story")).to_be_hidden()


def test_page_fits_any_width(conn: Connection, worker: Callable[..., WorkerProcess], tabs: Callable[..., Tab]) -> None:
    address = worker().address
    dead(conn, 1, "x" * 500)
    enqueue(conn, "hangs")
    for width in (320, 390, 770, 1100, 1400):
        page = tabs(address, viewport={"width": width, "height": 800}).page
        expect(page.locator("#dead-letters tbody tr")).to_have_count(1)
        expect(page.locator("#running tbody tr")).to_have_count(1)
        expect(page.get_by_role("button", name="Retry the dead letters of fails")).to_be_visible()   # the widest row there is
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.locator("#dead-letters td.id a").click()
        expect(page.locator("#story")).to_be_visible()
        assert page.evaluate("document.querySelector('#story').scrollWidth") <= width
        page.close()


def test_page_is_dark_where_dark_is_preferred(worker: Callable[..., WorkerProcess], tabs: Callable[..., Tab]) -> None:
    page = tabs(worker().address).page
    shades = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        shades.append([sum(int(n) for n in re.findall(r"\d+", page.evaluate(f"getComputedStyle(document.documentElement).{name}"))[:3])
                       for name in ("backgroundColor", "color")])
    (light_paper, light_ink), (dark_paper, dark_ink) = shades
    assert light_paper > 600 > light_ink and dark_paper < 150 < dark_ink


def test_page_is_one_file_with_nothing_from_outside_and_a_strict_policy(worker: Callable[..., WorkerProcess]) -> None:
    source = (REPOSITORY / "page.html").read_text()
    assert re.findall(r"(?:src|action|poster)\s*=|url\(|@import|https?:(?!//www\.w3\.org/2000/svg)", source) == []
    assert set(re.findall(r"<link[^>]*>", source)) == {'<link rel="icon" href="data:,">'}
    assert re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", source) == []
    assert re.findall(r"<[a-z][^>]*\s(?:style|on[a-z]+)\s*=", source) == []
    with urllib.request.urlopen(worker().address + "/", timeout=10) as response:
        policy = response.headers["Content-Security-Policy"]
        assert response.read().decode() == source
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy
    for part in ("connect-src 'self'", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"):
        assert part in policy


def unchecked(conn: Connection) -> None:
    """For a test that adds many rows: the check of every rule, which only tests have, costs far more than the insert."""
    conn.execute("alter table orchestrator.tasks drop constraint if exists every_rule_holds")


def test_trouble_comes_first_idle_types_are_folded_and_a_filter_finds_them(conn: Connection, page: Page) -> None:
    conn.execute("insert into orchestrator.task_types (type, max_retries) select 'tenant:' || n, 3 from generate_series(100, 399) n")
    conn.execute("select orchestrator.pause_type('tenant:333')")
    for type, n in (("tenant:333", 2), ("zz:nobody", 3)):
        enqueue_some(conn, n, type)
    count_now(conn)
    names = page.locator("#types td.type a")
    expect(names.first).to_have_text("tenant:333")   # registered by no worker that lives, and so is zz:nobody
    expect(names.nth(1)).to_have_text("zz:nobody")
    assert names.count() < 10
    assert page.evaluate("document.documentElement.scrollHeight") < 2500
    page.get_by_role("button", name="idle type").click()
    expect(names).to_have_count(306)
    page.get_by_role("button", name="Show fewer").click()
    page.locator("#filter").fill("tenant:21")
    expect(names).to_have_count(10)
    page.locator("#filter").fill("no such type")
    expect(page.get_by_text("No type has this in its name.")).to_be_visible()


def test_a_type_says_how_it_does_lately(conn: Connection, page: Page) -> None:
    dead(conn, 3)
    conn.execute("""update orchestrator.type_stats set recent_at = clock_timestamp(),
        recent = '{100, 4200, 4200, 4200, 420}', median = 0.25, p95 = 3 where type = 'ok'""")
    for head, said in (("State", "working"), ("Failing", "10%"), ("p50", "0.3 s"), ("p95", "3.0 s")):
        eventually(lambda head=head, said=said: cell(page, "types", "ok", head) == said)
    assert 30 < int(cell(page, "types", "ok", "Ended/s")) <= 42
    conn.execute("update orchestrator.type_stats set recent[5] = 2100 where type = 'ok'")
    expect(page.locator("#attention")).to_contain_text("ok (50% of attempts)")
    assert page.locator("#types td.type a").first.inner_text() in ("fails", "ok")


def test_a_full_and_a_stopping_worker_say_so(conn: Connection, worker: Callable[..., WorkerProcess], tabs: Callable[..., Tab]) -> None:
    page = tabs(worker(WORKER_POOL_SIZE=2).address).page
    for _ in range(3):
        enqueue(conn, "hangs")
    busy = page.locator("#workers tbody tr")
    expect(busy).to_contain_text("full")
    expect(busy).to_contain_text("2 of 2")
    conn.execute("select orchestrator.announce_stop(id) from orchestrator.workers")
    expect(busy).to_contain_text("stopping")


def test_an_empty_queue_shows_how_to_enqueue(conn: Connection, page: Page) -> None:
    expect(page.locator("#start-shell")).to_have_text(re.compile(r"python orchestrator.py enqueue \S.* '\{\}'"))
    line = page.locator("#start-sql").inner_text()
    page.locator("[data-copy=start-sql]").click()
    expect(page.locator("#notice")).to_contain_text(re.compile("Copied|Selected"))
    conn.execute(line)   # it is what it says
    count_now(conn)
    expect(page.locator("#start")).to_be_hidden()


def test_the_legend_says_what_the_tiles_say(conn: Connection, page: Page) -> None:
    conn.execute("insert into orchestrator.stats_samples values (clock_timestamp() - interval '5 seconds', 77, 27, 7, 0, 0, 0)")
    for _ in range(3):
        enqueue(conn, "ok", run_at="2035-01-01")
    count_now(conn)
    expect(page.locator("#scheduled")).to_have_text("3")
    expect(page.locator("#depth-legend")).to_have_text("ready 0in flight 0scheduled 3")


def test_a_column_in_which_no_row_says_anything_is_not_shown(conn: Connection, page: Page) -> None:
    conn.execute("select orchestrator.enqueue('nobody:here', '{\"to\": \"somebody\"}')")
    page.goto(page.url.split("#")[0] + "#status=ready")
    expect(page.locator("#found")).to_contain_text('{"to": "somebody"}')
    shown = page.locator("#found thead th:visible").all_inner_texts()
    assert "Payload" in shown and not {"Error", "Attempts", "Took"} & set(shown)


def test_a_search_goes_on_by_itself_to_the_oldest_task_and_says_how_far_it_looked(conn: Connection, page: Page) -> None:
    unchecked(conn)
    done = enqueue(conn, "ok")
    eventually(lambda: status(conn, done) == "completed")
    conn.execute("select orchestrator.pause_type('hangs')")
    enqueue_some(conn, 25_000, "hangs")
    page.goto(page.url.split("#")[0] + "#type=ok")
    expect(page.locator("#found tbody tr")).to_have_count(1)
    expect(page.locator("#found td.id a")).to_have_attribute("title", done)
    expect(page.locator("#found-note")).to_contain_text("25,001 tasks searched")
    expect(page.get_by_role("button", name="Search again")).to_be_visible()
    expect(page.get_by_role("button", name="Search further")).to_be_hidden()


def test_a_search_ends_after_some_seconds_and_can_go_on(page: Page) -> None:
    answer = ('{"now": 0, "tasks": [], "next": "01890a5d-ac96-774b-bcce-b302099a8057", "looked": 10000, "cut": false, '
              '"back_to": "2026-01-02T03:04:05Z"}')
    page.clock.install()
    page.route("**/api/tasks?*", lambda route: route.fulfill(status=200, content_type="application/json", body=answer))
    page.goto(page.url.split("#")[0] + "#type=gone")
    expect(page.locator("#found-note")).to_contain_text("Searching …")
    page.clock.fast_forward(9000)
    expect(page.get_by_role("button", name="Search further")).to_be_visible()
    expect(page.locator("#found-note")).to_contain_text(re.compile(r"0 tasks so far · [\d,]+0,000 tasks searched, back to "))


def test_page_keeps_up_with_a_backlog_of_100_000(conn: Connection, page: Page) -> None:
    unchecked(conn)
    for _ in range(5):
        enqueue_some(conn, 20_000, "nobody:handles-it")
    count_now(conn)
    expect(page.locator("#waiting")).to_have_text("100,000")
    page.locator("#waiting").click()
    expect(page.locator("#found tbody tr")).to_have_count(100)


def test_limits_show_how_full_they_are_and_what_is_parked(conn: Connection, page: Page) -> None:
    expect(page.get_by_role("heading", name="Limits")).to_be_hidden()
    conn.execute("select orchestrator.limit_type('hangs', 3, 1), orchestrator.limit_type('again*', p_rate => 9, p_per => '1 minute')")
    for key in ("acme", "acme", "acme", SCRIPT):
        conn.execute("select orchestrator.enqueue('hangs', p_concurrency_key => %s)", [key])
    rows = page.locator("#limits tbody tr")
    expect(rows).to_have_count(2)
    expect(rows.last).to_contain_text("2 of 3")
    expect(rows.last.locator(".meter")).to_have_attribute("style", re.compile("--full: 0.66"))
    expect(rows.last).to_contain_text("acme: 1 of 1")
    assert [cell(page, "limits", "hangs", head) for head in ("Parked", "Rate")] == ["2", ""]
    assert cell(page, "limits", "again*", "Rate") == "0 of 9 in 1 min"
    expect(page.locator("#waiting-note")).to_have_text("2 parked")
    assert cell(page, "types", "hangs", "Parked") == "2"
    assert page.evaluate("[document.scripts.length, document.images.length, typeof window.hacked]") == [1, 0, "undefined"]
