"""service:nextjs and service:notion-clone: with a stand-in for npm that behaves as told, then with a real Next.js."""
from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.types.json import Jsonb

import handlers
from orchestrator import Cancelled, Discard, Retry, Snooze
from postgres import eventually, free_port
from test_handlers_process import StandInTask, alive_in_group, call, in_thread

# Listens as `npm run dev -- --hostname H --port P` would, and then does what the directory's behaviour.py says.
STAND_IN_NPM = f"""#!{sys.executable}
import http.server, os, signal, subprocess, sys, threading, time
arguments = dict(zip(sys.argv[1:], sys.argv[2:]))
host, port = arguments["--hostname"], int(arguments["--port"])
def listen():
    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(404)
            self.end_headers()
        do_HEAD = do_GET
    server = http.server.ThreadingHTTPServer((host, port), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
print("arguments", sys.argv[1:], flush=True)
exec(open("behaviour.py").read())
"""
STAY = "listen(); time.sleep(600)"


@pytest.fixture
def project(tmp_path, monkeypatch) -> Callable[..., dict[str, Any]]:
    """Make a project that behaves as told, and return the payload that runs it."""
    programs, directory = tmp_path / "programs", tmp_path / "services" / "shop"
    programs.mkdir()
    (programs / "npm").write_text(STAND_IN_NPM)
    (programs / "npm").chmod(0o755)
    (directory / "node_modules/next").mkdir(parents=True)
    (directory / "package.json").write_text('{"scripts": {"dev": "next dev"}}')
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("SERVICE_ROOT", str(tmp_path / "services"))
    monkeypatch.setattr(handlers, "CHECK_EVERY", 0.05)

    def behaving(behaviour: str, **more: Any) -> dict[str, Any]:
        (directory / "behaviour.py").write_text(behaviour)
        return {"working_dir": str(directory), "port": free_port(), **more}

    return behaving


def until_ready(task: StandInTask, timeout: float = 30) -> dict[str, Any]:
    return dict(eventually(lambda: next((report for report in task.reports if report["ready"]), None), timeout))


def port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def test_service_reports_starting_then_ready_with_url_pid_and_uptime(project, monkeypatch):
    monkeypatch.setattr(handlers, "REPORT_EVERY", 0.1)
    task = StandInTask(project(STAY))
    running = in_thread(handlers.nextjs, task)
    ready = until_ready(task)
    assert task.reports[0]["ready"] is False
    assert ready["url"] == f"http://127.0.0.1:{task.payload['port']}"
    assert alive_in_group(ready["pid"])
    eventually(lambda: task.reports[-1]["uptime"] > ready["uptime"])
    assert json.loads(json.dumps(task.reports[-1])) == task.reports[-1]
    task.cancel()
    with pytest.raises(Cancelled):
        running.result(10)


@pytest.mark.parametrize("reason", ["cancelled", "shutdown", "lost", "timeout"])
def test_service_stops_its_whole_group_for_every_reason(project, reason):
    family = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);" + STAY
    task = StandInTask(project(family))
    running = in_thread(handlers.nextjs, task)
    pid = until_ready(task)["pid"]
    assert len(alive_in_group(pid)) == 2
    task.cancel(reason)
    with pytest.raises(Cancelled):
        running.result(10)
    assert eventually(lambda: not alive_in_group(pid))
    assert port_is_free(task.payload["port"])


def test_service_that_ignores_sigterm_is_killed_fast_enough_for_a_shutdown(project):
    task = StandInTask(project("signal.signal(signal.SIGTERM, signal.SIG_IGN);" + STAY))
    running = in_thread(handlers.nextjs, task)
    pid = until_ready(task)["pid"]
    task.cancel("shutdown")
    with pytest.raises(Cancelled):
        running.result(2.5)
    assert eventually(lambda: not alive_in_group(pid))


def test_service_cancelled_while_it_starts_is_stopped(project):
    task = StandInTask(project("time.sleep(600)"))
    running = in_thread(handlers.nextjs, task)
    pid = eventually(lambda: task.reports)[0]["pid"]
    task.cancel()
    with pytest.raises(Cancelled):
        running.result(10)
    assert eventually(lambda: not alive_in_group(pid))


def test_service_that_exits_with_0_completes(project):
    result = call(handlers.nextjs, StandInTask(project("print('done')")))
    assert result["exit_code"] == 0
    assert result["url"].startswith("http://127.0.0.1:")


def test_service_that_dies_fails_with_its_last_lines(project):
    behaviour = "listen(); [print('line', n) for n in range(5000)]; print('out of memory'); sys.exit(3)"
    task = StandInTask(project(behaviour))
    with pytest.raises(Retry, match=r"exit code 3") as failure:
        call(handlers.nextjs, task)
    assert str(failure.value).endswith("out of memory")
    assert len(str(failure.value)) < 2000


def test_service_killed_by_a_signal_says_which(project):
    task = StandInTask(project(STAY))
    running = in_thread(handlers.nextjs, task)
    os.kill(until_ready(task)["pid"], signal.SIGKILL)
    with pytest.raises(Retry, match="killed by SIGKILL"):
        running.result(10)


# --- Failures that a long healthy run makes good ----------------------------------------------------------------------

DIES_WHEN_ASKED = "listen(); open('up', 'w').close()\nwhile not os.path.exists('die'): time.sleep(0.01)\nsys.exit(3)"


def run_once(task: StandInTask) -> BaseException | None:
    """Run a service until it is ready, then let it die; return what the handler raised."""
    die = Path(task.payload["working_dir"], "die")
    die.unlink(missing_ok=True)
    task.reports.clear()
    running = in_thread(handlers.nextjs, task)
    until_ready(task)
    die.touch()
    return running.exception(20)


def test_death_after_a_short_run_is_a_failed_attempt(project):
    assert isinstance(run_once(StandInTask(project(DIES_WHEN_ASKED))), Retry)


def test_death_after_a_long_healthy_run_is_not_charged(project, monkeypatch, caplog):
    monkeypatch.setattr(handlers, "HEALTHY_RUN", 0.0)
    task = StandInTask(project(DIES_WHEN_ASKED), attempt=1)
    for _ in range(3):
        assert isinstance(run_once(task), Snooze)
    assert f"task {task.id}: restarting http://127.0.0.1:{task.payload['port']} in 1 s" in caplog.text
    assert "exit code 3" in caplog.text


def test_long_healthy_run_makes_good_for_the_failures_before_it(project, monkeypatch):
    task = StandInTask(project(DIES_WHEN_ASKED), attempt=4)  # three failed
    monkeypatch.setattr(handlers, "HEALTHY_RUN", 0.0)
    delays = [run_once(task)]
    monkeypatch.setattr(handlers, "HEALTHY_RUN", 600.0)
    delays += [run_once(task) for _ in range(3)]
    assert [delay.seconds for delay in delays if isinstance(delay, Snooze)] == [1, 2, 4, 8]
    assert isinstance(run_once(task), Retry)
    assert task.id not in handlers.forgiven


def test_port_in_use_after_a_long_healthy_run_uses_up_what_it_made_good(project, monkeypatch):
    task = StandInTask(project(DIES_WHEN_ASKED), attempt=2)
    monkeypatch.setattr(handlers, "HEALTHY_RUN", 0.0)
    assert isinstance(run_once(task), Snooze)
    with socket.create_server(("127.0.0.1", task.payload["port"])):
        with pytest.raises(Snooze):
            call(handlers.nextjs, task)
        with pytest.raises(Retry, match="is in use"):
            call(handlers.nextjs, task)


def test_service_that_was_never_ready_is_not_healthy_however_long_it_ran(project, monkeypatch):
    monkeypatch.setattr(handlers, "HEALTHY_RUN", 0.5)
    with pytest.raises(Retry, match="no answer"):
        call(handlers.nextjs, StandInTask(project("time.sleep(600)", ready_timeout=1)))


def test_service_that_never_answers_fails_after_ready_timeout(project):
    task = StandInTask(project("print('thinking', flush=True); time.sleep(600)", ready_timeout=1))
    with pytest.raises(Retry, match=r"no answer on http://127.0.0.1:.* within 1 s.*\n.*\nthinking"):
        call(handlers.nextjs, task)
    assert not alive_in_group(task.reports[0]["pid"])


def test_service_whose_server_is_gone_while_its_parent_lives_on_fails(project):
    child = "exec(open('child.py').read())"
    payload = project(f"child = subprocess.Popen([sys.executable, '-c', {child!r}, host, str(port)]);"
                      "open('child.pid', 'w').write(str(child.pid)); time.sleep(600)")
    directory = Path(payload["working_dir"])
    (directory / "child.py").write_text("import http.server, sys\nhttp.server.ThreadingHTTPServer((sys.argv[1], "
                                        "int(sys.argv[2])), http.server.SimpleHTTPRequestHandler).serve_forever()")
    task = StandInTask(payload)
    running = in_thread(handlers.nextjs, task)
    pid = until_ready(task)["pid"]
    os.kill(int((directory / "child.pid").read_text()), signal.SIGKILL)
    with pytest.raises(Retry, match=r"nothing listens on"):
        running.result(10)
    assert eventually(lambda: not alive_in_group(pid))


def test_port_in_use_is_said_and_nothing_started(project):
    payload = project(STAY)
    with socket.create_server(("127.0.0.1", payload["port"])):
        task = StandInTask(payload)
        with pytest.raises(Retry, match=rf"port: http://127.0.0.1:{payload['port']} is in use"):
            call(handlers.nextjs, task)
    assert task.reports == []


def test_host_that_is_not_of_this_machine_is_refused(project):
    with pytest.raises(Discard, match=r"cannot listen on http://192\.0\.2\.1:"):
        call(handlers.nextjs, StandInTask(project(STAY, host="192.0.2.1")))


def test_lock_held_by_an_earlier_instance_names_its_process(project):
    payload = project(STAY)
    lock = Path(payload["working_dir"], ".next/dev/lock")
    lock.parent.mkdir(parents=True)
    lock.write_text('{"pid":4242,"port":3000}')
    task = StandInTask(payload)
    with lock.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(Retry, match="process 4242 runs `next dev` there already"):
            call(handlers.nextjs, task)
    assert task.reports == []


def test_lock_file_that_nobody_holds_does_not_prevent_a_start(project):
    payload = project("print('done')")
    lock = Path(payload["working_dir"], ".next/dev/lock")
    lock.parent.mkdir(parents=True)
    lock.write_text('{"pid":4242,"port":3000}')
    assert call(handlers.nextjs, StandInTask(payload))["exit_code"] == 0


def test_exit_with_0_that_leaves_a_lock_behind_is_a_failure(project):
    behaviour = "os.makedirs('.next/dev'); open('.next/dev/lock', 'w').write('{}')"
    with pytest.raises(Retry, match="its server process was killed"):
        call(handlers.nextjs, StandInTask(project(behaviour)))


def test_service_gets_no_secret_of_the_worker(project, monkeypatch):
    monkeypatch.setenv("DATABASE_URL", "postgresql://u:canary@db/x")
    payload = project("open('environment', 'w').write(repr(dict(os.environ))); print('done')")
    call(handlers.nextjs, StandInTask(payload))
    environment = Path(payload["working_dir"], "environment").read_text()
    assert "NEXT_TELEMETRY_DISABLED" in environment
    assert "canary" not in environment


def test_project_without_a_dev_script_runs_the_local_next(project, tmp_path):
    payload = project("")
    node = tmp_path / "programs/node"
    node.write_text(f"#!{sys.executable}\nimport sys\nprint(sys.argv[1:])\nsys.exit(7)\n")
    node.chmod(0o755)
    Path(payload["working_dir"], "package.json").write_text("{}")
    with pytest.raises(Retry) as failure:
        call(handlers.nextjs, StandInTask(payload))
    assert f"node_modules/next/dist/bin/next', 'dev', '--hostname', '127.0.0.1', '--port', '{payload['port']}']" in str(
        failure.value)


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda directory: (directory / "package.json").unlink(), "working_dir: has no readable package.json"),
    (lambda directory: (directory / "package.json").write_text("{"), "working_dir: has no readable package.json"),
    (lambda directory: shutil.rmtree(directory / "node_modules"), "working_dir: Next.js is not installed there"),
    (shutil.rmtree, "working_dir: there is no such directory"),
], ids=["no package.json", "broken package.json", "nothing installed", "no directory"])
def test_directory_that_is_no_project_is_refused_for_good(project, spoil, message):
    payload = project(STAY)
    spoil(Path(payload["working_dir"]))
    with pytest.raises(Discard, match=message):
        call(handlers.nextjs, StandInTask(payload))


def test_missing_npm_is_permanent(project, monkeypatch, tmp_path):
    payload = project(STAY)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Discard, match="npm is not on the worker's PATH"):
        call(handlers.nextjs, StandInTask(payload))


def test_notion_clone_runs_its_directory_on_its_port(project, monkeypatch):
    payload = project(STAY)
    monkeypatch.setenv("NOTION_CLONE_DIR", payload["working_dir"])
    monkeypatch.setenv("NOTION_CLONE_PORT", str(payload["port"]))
    monkeypatch.setenv("SERVICE_ROOT", "/nowhere")  # it bounds payloads, and this isn't one
    task = StandInTask({})
    running = in_thread(handlers.notion_clone, task)
    assert until_ready(task)["url"] == f"http://127.0.0.1:{payload['port']}"
    task.cancel()
    with pytest.raises(Cancelled):
        running.result(10)


def test_notion_clone_without_its_directory_says_which_setting(monkeypatch, tmp_path):
    monkeypatch.setenv("NOTION_CLONE_DIR", str(tmp_path / "absent"))
    with pytest.raises(Discard, match=f"NOTION_CLONE_DIR: there is no directory {tmp_path}/absent"):
        call(handlers.notion_clone, StandInTask({}))


@pytest.mark.parametrize("port", ["0", "65536", "abc", "-1", "3000 "])
def test_notion_clone_with_a_bad_port_says_which_setting(monkeypatch, tmp_path, port):
    monkeypatch.setenv("NOTION_CLONE_DIR", str(tmp_path))
    monkeypatch.setenv("NOTION_CLONE_PORT", port)
    with pytest.raises(Discard, match="NOTION_CLONE_PORT: must be a port number"):
        call(handlers.notion_clone, StandInTask({}))


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOMEM])
def test_error_that_may_pass_does_not_end_a_service_for_good(project, monkeypatch, number):
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(socket, "create_server", fail)
    with pytest.raises(Retry, match="cannot listen on"):
        call(handlers.nextjs, StandInTask(project(STAY)))


def test_npm_that_cannot_be_started_says_so(project, tmp_path):
    payload = project(STAY)
    (tmp_path / "programs/npm").write_text("#!/nowhere/interpreter\n")
    with pytest.raises(Retry, match="npm cannot be started: No such file"):
        call(handlers.nextjs, StandInTask(payload))


def test_package_json_that_blocks_or_nests_too_deep_is_refused(project):
    payload = project(STAY)
    package = Path(payload["working_dir"], "package.json")
    package.write_text("[" * 100_000)
    with pytest.raises(Discard, match="has no readable package.json"):
        call(handlers.nextjs, StandInTask(payload))
    package.unlink()
    os.mkfifo(package)
    running = in_thread(handlers.nextjs, StandInTask(payload))
    with pytest.raises(Discard, match="has no readable package.json"):
        running.result(20)


def test_cancelled_while_the_server_sends_its_answer_byte_by_byte(project):
    drip = """
server = socket.create_server((host, port))
while True:
    client, _ = server.accept()
    try:
        while True:
            client.send(b"H")
            time.sleep(0.2)
    except OSError:
        pass
"""
    task = StandInTask(project("import socket\n" + drip))
    running = in_thread(handlers.nextjs, task)
    eventually(lambda: task.reports)
    eventually(lambda: not port_is_free(task.payload["port"]))
    with pytest.raises(TimeoutError):
        running.result(1)
    task.cancel()
    with pytest.raises(Cancelled):
        running.result(20)


# --- A real Next.js ---------------------------------------------------------------------------------------------------

APPLICATION = Path(__file__).parent / "nextjs_app"
needs_npm = pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
slow_first_install = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def installed_application(request, tmp_path_factory) -> Path:
    """A folder with the application's node_modules, installed once for each package-lock.json and kept in pytest's cache."""
    version = hashlib.sha256((APPLICATION / "package-lock.json").read_bytes()).hexdigest()[:12]
    cached = getattr(request.config, "cache", None)  # None under -p no:cacheprovider
    cache = Path(cached.mkdir("nextjs")) if cached else tmp_path_factory.mktemp("nextjs")
    application = cache / version
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test runs at once
        if not application.exists():
            partial = cache / "partial"
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(APPLICATION, partial)
            subprocess.run(["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts"], cwd=partial, check=True)
            partial.rename(application)
    return application


@pytest.fixture
def application(installed_application, tmp_path, monkeypatch) -> dict[str, Any]:
    """The payload for a copy of the application of this test's own: Next.js allows one server in a directory."""
    def link_or_copy(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)

    directory = tmp_path / "services/app"
    shutil.copytree(APPLICATION, directory)
    shutil.copytree(installed_application / "node_modules", directory / "node_modules", symlinks=True, copy_function=link_or_copy)
    monkeypatch.setenv("SERVICE_ROOT", str(tmp_path / "services"))
    return {"working_dir": "app", "port": free_port()}


def page(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as response:
        return str(response.read().decode())


def server_process(group: int) -> int:
    """The process that serves, which `npm run dev` → sh → `next dev` started."""
    def name(pid: int) -> str:
        try:
            return Path(f"/proc/{pid}/cmdline").read_text()
        except OSError:
            return ""

    return next(pid for pid in alive_in_group(group) if name(pid).startswith("next-server"))


@needs_npm
@slow_first_install
def test_real_nextjs_is_served_started_again_after_kill_9_of_its_child_and_cancelled(application):
    first = StandInTask(application)
    running = in_thread(handlers.nextjs, first)
    ready = until_ready(first, 60)
    assert "Hello from Next.js" in page(ready["url"])
    assert len(alive_in_group(ready["pid"])) == 4
    os.kill(server_process(ready["pid"]), signal.SIGKILL)
    with pytest.raises(Retry, match=r"its server process was killed.*\n(.*\n)*.*Ready in"):
        running.result(20)
    assert eventually(lambda: not alive_in_group(ready["pid"]))

    second = StandInTask(application, attempt=2)
    running = in_thread(handlers.nextjs, second)
    again = until_ready(second, 60)
    assert "Hello from Next.js" in page(again["url"])
    second.cancel()
    with pytest.raises(Cancelled):
        running.result(10)
    assert eventually(lambda: not alive_in_group(again["pid"]))
    assert port_is_free(application["port"])


@needs_npm
@slow_first_install
def test_real_nextjs_left_by_a_killed_npm_holds_its_lock_and_is_named(application, tmp_path):
    directory = tmp_path / "services/app"
    port = free_port()
    npm = subprocess.Popen(["npm", "run", "dev", "--", "--hostname", "127.0.0.1", "--port", str(port)], cwd=directory,
                           stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                           env=handlers.minimal_environment(NEXT_TELEMETRY_DISABLED="1"), start_new_session=True)
    try:
        eventually((directory / ".next/dev/lock").exists, 60)
        server = server_process(npm.pid)
        npm.kill()
        npm.wait()
        with pytest.raises(Retry, match=f"process {server} runs `next dev` there already"):
            call(handlers.nextjs, StandInTask(application))
    finally:
        os.killpg(npm.pid, signal.SIGKILL)
        npm.wait()


# --- Under a worker ---------------------------------------------------------------------------------------------------

class Service:
    """One service:nextjs task in the database, and what there is to see of it."""

    def __init__(self, connection: psycopg.Connection[Any], payload: dict[str, Any]) -> None:
        self.connection = connection
        self.id = self.ask("select orchestrator.enqueue('service:nextjs', %s)", Jsonb(payload))

    def ask(self, query: str, *args: Any) -> Any:
        row = self.connection.execute(query.encode(), args).fetchone()
        return row[0] if row else None

    @property
    def status(self) -> str:
        return str(self.ask("select status::text from orchestrator.tasks where id = %s", self.id))

    @property
    def attempts(self) -> int:
        return int(self.ask("select attempts from orchestrator.tasks where id = %s", self.id))

    def wait_ready(self, other_than: int = 0) -> dict[str, Any]:
        """What `show` tells of it, once it is ready with another process than that one."""
        def progress() -> dict[str, Any] | None:
            shown = dict(self.ask("select orchestrator.show_task(%s)", self.id)["progress"] or [])
            return shown if self.status == "running" and shown and shown["ready"] and shown["pid"] != other_than else None

        return dict(eventually(progress, 60) or {})


@pytest.fixture
def run_service(conn, installed, worker_process) -> Callable[..., Any]:
    """Enqueue a service and start a worker for it; return both."""
    def run(payload: dict[str, Any]) -> tuple[Service, Any]:
        worker = worker_process(installed, HANDLERS="handlers", SERVICE_ROOT=os.environ["SERVICE_ROOT"])
        return Service(conn, payload), worker

    return run


@needs_npm
@slow_first_install
def test_real_nextjs_stops_with_its_worker_and_goes_on_with_the_next(application, run_service, worker_process, installed):
    service, worker = run_service(application)
    ready = service.wait_ready()
    assert "Hello from Next.js" in page(ready["url"])
    assert worker.stop() == 0
    assert alive_in_group(ready["pid"]) == []
    assert (service.status, service.attempts) == ("pending", 0)

    other = worker_process(installed, HANDLERS="handlers", SERVICE_ROOT=os.environ["SERVICE_ROOT"])
    again = service.wait_ready(other_than=ready["pid"])
    assert "Hello from Next.js" in page(again["url"])
    os.kill(server_process(again["pid"]), signal.SIGKILL)
    restarted = service.wait_ready(other_than=again["pid"])
    assert "Hello from Next.js" in page(restarted["url"])
    assert service.attempts == 2
    assert "its server process was killed" in service.ask("select last_error from orchestrator.tasks where id = %s",
                                                          service.id)
    service.ask("select orchestrator.cancel_task(%s)", service.id)
    eventually(lambda: service.status == "cancelled", 20)
    assert alive_in_group(restarted["pid"]) == []
    assert other.stop() == 0


def test_service_that_exits_with_0_is_completed_under_a_worker(project, run_service):
    service, _ = run_service(project("print('done')"))
    assert eventually(lambda: service.status == "completed", 20)


def test_service_that_dies_again_and_again_after_healthy_runs_is_never_a_dead_letter(
        project, conn, installed, worker_process, tmp_path):
    settings = tmp_path / "with_short_runs.py"
    settings.write_text("import handlers\nfrom orchestrator import Handler\n"
                        "handlers.HEALTHY_RUN = 0.05\nhandlers.CHECK_EVERY = 0.05\n"
                        "HANDLERS = {'service:nextjs': Handler(handlers.nextjs, max_retries=0)}\n")
    worker_process(installed, HANDLERS=settings, SERVICE_ROOT=os.environ["SERVICE_ROOT"])
    service = Service(conn, project("listen(); open('runs', 'a').write('x'); time.sleep(1); sys.exit(3)"))
    runs = Path(service.ask("select payload from orchestrator.tasks where id = %s", service.id)["working_dir"], "runs")
    eventually(lambda: runs.exists() and len(runs.read_text()) >= 3, 30)
    assert service.status in ("pending", "claimed", "running")
    assert service.attempts <= 1
    service.ask("select orchestrator.cancel_task(%s)", service.id)


def test_service_ends_with_a_worker_that_is_killed(project, run_service):
    service, worker = run_service(project("signal.signal(signal.SIGTERM, signal.SIG_IGN);" + STAY))
    pid = service.wait_ready()["pid"]
    os.kill(worker.pid, signal.SIGKILL)
    assert eventually(lambda: not alive_in_group(pid))


def test_service_stops_within_the_grace_of_an_impatient_shutdown(project, run_service):
    service, worker = run_service(project("signal.signal(signal.SIGTERM, signal.SIG_IGN);" + STAY))
    pid = service.wait_ready()["pid"]
    worker.signal(signal.SIGTERM)
    worker.signal(signal.SIGINT)
    worker.process.wait(10)
    eventually(lambda: not alive_in_group(pid))
    assert (service.status, service.attempts) == ("pending", 0)
