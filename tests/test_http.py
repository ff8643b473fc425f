"""The HTTP server, by real sockets: who gets in, what is refused and how, and that nothing keeps a health check out."""
from __future__ import annotations

import base64
import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest

import orchestrator
from orchestrator import Orchestrator
from postgres import Server, eventually, free_port
from steps import enqueue

Answer = tuple[int, dict[str, str], bytes]


def talk(port: int, request: bytes, then_close: bool = False) -> Answer:
    """Send these bytes, and read the answer to its end: status, headers, body."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        with contextlib.suppress(ConnectionError):   # it may refuse before it has read everything
            client.sendall(request)
        if then_close:
            client.shutdown(socket.SHUT_WR)
        received = b""
        with contextlib.suppress(ConnectionError):
            while data := client.recv(65536):
                received += data
    head, _, body = received.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    assert lines[0].startswith("HTTP/1.0 "), received[:200]
    return int(lines[0].split()[1]), {name.lower(): value for name, value in (line.split(": ", 1) for line in lines[1:])}, body


def ask(port: int, path: str, method: str = "GET", body: bytes = b"", **headers: str) -> Answer:
    lines = [f"{method} {path} HTTP/1.1", f"Host: {headers.pop('Host', f'127.0.0.1:{port}')}",
             *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
    return talk(port, "\r\n".join([*lines, "", ""]).encode("latin-1") + body)


def basic(text: str) -> str:
    return "Basic " + base64.b64encode(text.encode()).decode()


def start(url: str, **settings: Any) -> Orchestrator:
    return Orchestrator(url, {"t": lambda task: None}, metrics_port=0, worker_pool_size=1, distributed_mode=True, **settings).start()


def port_of(app: Orchestrator) -> int:
    assert app._http is not None
    return int(app._http.server_address[1])


def free_port_pair() -> int:
    """A free port whose next one is free, too."""
    while True:
        port = free_port()
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port + 1)):
            return port


@pytest.fixture(scope="module")
def server_url(server: Server, template: str) -> Iterator[str]:
    url = server.create_database(template=urlsplit(template).path.lstrip("/"))
    yield url
    server.drop_database(url)


@pytest.fixture(scope="module")
def ports(server_url: str) -> Iterator[dict[str, int]]:
    """Workers' ports: open, the same by a host's other name, with a token (and an admin's), and with a user and password."""
    url = server_url
    apps = {"open": start(url), "named": start(url, metrics_host="127.1"), "token": start(url, metrics_auth="sésame", admin_token="boss"),
            "user": start(url, metrics_auth="ada:pass:word")}
    yield {name: port_of(app) for name, app in apps.items()}
    for thread in [threading.Thread(target=app.stop, args=(0,)) for app in apps.values()]:
        thread.start()
        thread.join()


# ----------------------------------------------------------------------------------------------------------- who gets in
@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_health_and_ready_answer_in_json_and_ask_for_no_password(ports, path):
    status, headers, body = ask(ports["token"], path)
    assert (status, headers["content-type"]) == (200, "application/json")
    answer = json.loads(body)
    assert answer["status"] == "ok" and answer["problems"] == []
    assert set(answer) == {"status", "problems", "worker_id", "version"}


@pytest.mark.parametrize("path", ["/", "/metrics", "/api/overview", "/nothing"])
def test_all_else_asks_for_metrics_auth(ports, path):
    status, headers, _ = ask(ports["token"], path)
    assert (status, headers["www-authenticate"]) == (401, 'Basic realm="orchestrator", charset="UTF-8"')


@pytest.mark.parametrize(("which", "given", "status"), [
    ("token", "Bearer sésame".encode().decode("latin-1"), 200),
    ("token", "bearer sésame".encode().decode("latin-1"), 200),
    ("token", "Bearer boss", 200),          # who may act may look
    ("token", basic("anyone:sésame"), 200),  # all that a browser can send
    ("token", "Bearer sesame", 401), ("token", "Bearer", 401), ("token", "Bearer \xe9", 401), ("token", "sésame", 401),
    ("token", basic("sésame"), 401), ("token", basic("sésame:"), 401), ("token", "Basic !!!", 401), ("token", "Digest x", 401),
    ("user", basic("ada:pass:word"), 200), ("user", "Bearer ada:pass:word", 200),
    ("user", basic("ada:pass"), 401), ("user", basic("eve:pass:word"), 401), ("user", basic(""), 401), ("user", basic("\xff"), 401)])
def test_metrics_auth_takes_a_bearer_token_or_user_and_password(ports, which, given, status):
    assert ask(ports[which], "/metrics", Authorization=given)[0] == status


def test_secrets_are_compared_in_constant_time(ports, monkeypatch):
    """Made to say yes to everything, the comparison lets everybody in: so nothing else compares."""
    monkeypatch.setattr(orchestrator.hmac, "compare_digest", lambda given, wanted: True)
    for which, given in (("token", "Bearer x"), ("token", basic("a:x")), ("user", basic("a:x"))):
        assert ask(ports[which], "/metrics", Authorization=given)[0] == 200
    assert ask(ports["token"], "/api/nothing", "POST", Authorization="Bearer x")[0] == 404


@pytest.mark.parametrize(("host", "status"), [
    ("127.0.0.1", 200), ("127.0.0.1:9090", 200), ("localhost:1", 200), ("[::1]:9090", 200), ("10.0.0.1", 200),
    ("evil.example", 403), ("evil.example:9090", 403),
    ("localhost.evil.example", 403), ("127.0.0.1.evil.example", 403), ("[", 403), ("", 403)])
def test_a_name_pointed_at_loopback_reads_nothing(ports, host, status):
    """DNS rebinding: some website's name suddenly resolves to 127.0.0.1, and its script is same-origin with us."""
    for which in ("open", "named"):
        assert ask(ports[which], "/metrics", Host=host)[0] == status
        assert ask(ports[which], "/health", Host=host)[0] == 200


def test_with_metrics_auth_any_name_will_do(ports):
    assert ask(ports["user"], "/metrics", Host="worker.internal", Authorization=basic("ada:pass:word"))[0] == 200


# --------------------------------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "PROPFIND", "get", "X" * 5000])
@pytest.mark.parametrize("which", ["open", "token"])
def test_other_methods_are_405(ports, which, method):
    status, headers, body = ask(ports[which], "/", method)
    assert (status, headers["allow"]) == (405, "GET, HEAD, POST")
    assert "XXX" not in body.decode()
    assert not [name for name in headers if name.startswith("access-control")]   # so a browser's preflight gets a no


@pytest.mark.parametrize("path", ["/api/cancel", "/", "/metrics"])
def test_without_an_admin_token_post_is_403(ports, path):
    assert ask(ports["open"], path, "POST", b"{}", Content_Length="2")[0] == 403


@pytest.mark.parametrize("given", ["", "Bearer", "Bearer sésame".encode().decode("latin-1"), basic("x:boss"), "Bearer bos", "Bearer boss2"])
def test_post_takes_nothing_but_the_admin_token_as_a_bearer(ports, given):
    """A password that a browser sends by itself must not do: then any site's form could post."""
    assert ask(ports["token"], "/api/bulk", "POST", b"{}", Content_Length="2", Authorization=given)[0] == 401


@pytest.mark.parametrize("path", [
    "/../../etc/passwd", "/..%2f..%2fetc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd", "/orchestrator.py", "/page.html",
    "/sql/00_schema.sql",
    "/api/", "/api", "/api/../metrics", "/api/cancel", "/api/_brief", "/api/overview(null)--", "/metrics/", "/health/../metrics",
    "/\x00", "/%00", "/.env", "x", "*", "\\..\\.."])
def test_paths_that_are_none_are_404(ports, path):
    status, _, body = ask(ports["open"], path)
    assert (status, json.loads(body)["error"][:8]) == (404, "there is")


@pytest.mark.parametrize(("request_line", "status"), [
    (b"GARBAGE\r\n\r\n", 400), (b"GET / HTTP/x\r\n\r\n", 400), (b"GET / HTTP/2.0\r\n\r\n", 400), (b"GET / / HTTP/1.1\r\n\r\n", 400),
    (b"GET http://[/ HTTP/1.1\r\n\r\n", 400), (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400),
    (b"GET /metrics?" + b"a=1&" * 30 + b" HTTP/1.1\r\n\r\n", 400),
    (b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\n\r\n", 414),
    (b"GET /metrics HTTP/1.1\r\nX: " + b"a" * 70000 + b"\r\n\r\n", 431),
    (b"GET /metrics HTTP/1.1\r\n" + b"".join(b"X-%d: 1\r\n" % n for n in range(200)) + b"\r\n", 431)])
def test_malformed_and_oversized_requests_get_a_4xx(ports, request_line, status):
    found, headers, body = talk(ports["open"], request_line)
    assert (found, headers["content-type"]) == (status, "application/json")
    assert len(body) < 200


ADMIN = {"Authorization": "Bearer boss"}
UNKNOWN = "01890000-0000-7000-8000-000000000000"


@pytest.mark.parametrize(("headers", "body", "status"), [
    ({}, b"", 411), ({"Transfer_Encoding": "chunked"}, b"2\r\n{}\r\n0\r\n\r\n", 411),
    ({"Transfer_Encoding": "chunked", "Content_Length": "2"}, b"{}", 411),
    ({"Content_Length": "-1"}, b"", 400), ({"Content_Length": "abc"}, b"", 400), ({"Content_Length": "\xb2"}, b"{}", 400),
    ({"Content_Length": "9" * 5000}, b"", 400), ({"Content_Length": "2\r\nContent-Length: 3"}, b"{} ", 400),
    ({"Content_Length": str(10 ** 12)}, b"{}", 413), ({"Content_Length": "65537"}, b" " * 65537, 413),
    ({"Content_Length": "1"}, b"{", 400), ({"Content_Length": "2"}, b"[]", 400), ({"Content_Length": "4"}, b"null", 400),
    ({"Content_Length": "10"}, b'{"id": 12}', 400), ({"Content_Length": "11"}, b'{"id":"\xff\xfe"}', 400),
    ({"Content_Length": "60000"}, b"[" * 60000, 400), ({"Content_Length": "9"}, b'{"a":NaN}', 400)])
def test_a_bad_body_gets_a_4xx(ports, headers, body, status):
    found, _, answer = ask(ports["token"], "/api/cancel", "POST", body, **ADMIN, **headers)
    assert (found, "error" in json.loads(answer)) == (status, True)


def test_a_body_that_ends_too_soon_or_does_not_come_gets_a_4xx(ports, monkeypatch):
    request = b"POST /api/cancel HTTP/1.1\r\nAuthorization: Bearer boss\r\nContent-Length: 100\r\n\r\n{"
    assert talk(ports["token"], request, then_close=True)[0] == 400
    monkeypatch.setattr(orchestrator.HttpRequest, "timeout", 0.3)
    assert talk(ports["token"], request)[0] == 408


def test_an_unknown_action_is_404(ports):
    assert ask(ports["token"], "/api/overview", "POST", b"{}", Content_Length="2", **ADMIN)[0] == 404


def post(port: int, name: str, **fields: Any) -> tuple[int, Any]:
    body = json.dumps(fields).encode()
    status, _, answer = ask(port, f"/api/{name}", "POST", body, Content_Length=str(len(body)), **ADMIN)
    return status, json.loads(answer)


@pytest.mark.parametrize(("name", "fields", "word"), [
    ("cancel", {"id": "x"}, "id: "), ("cancel", {"id": 12}, "id: "), ("retry", {"id": ""}, "id: "), ("cancel", {}, "none"),
    ("cancel", {"id": UNKNOWN, "colour": "blue"}, "id, colour"), ("cancel", {"id": [UNKNOWN]}, "id: send a JSON object"),
    ("cancel", {"id": 1.5}, "id: send"), ("cancel", {"id": "\0"}, "id: must be text"), ("cancel", {"id": "\ud800"}, "id: must be text"),
    ("bulk", {"action": "retry", "filter": {"type": "t"}, "limit": "many"}, "limit: "),
    ("bulk", {"action": "retry", "filter": {"type": "t"}, "limit": 10 ** 12}, "limit: "),
    ("bulk", {"action": "retry", "filter": {}}, "filter: "), ("bulk", {"action": "retry", "filter": {"colour": "blue"}}, "colour"),
    ("bulk", {"action": "retry", "filter": "{"}, "filter: "), ("limit", {"type": "t", "max_running": "x"}, "max_running: "),
    ("pause", {"type": "a*b"}, "type: ")])
def test_a_bad_field_of_an_action_is_400_and_named(ports, name, fields, word):
    status, answer = post(ports["token"], name, **fields)
    assert status == 400 and word in answer["error"]


@pytest.mark.parametrize(("address", "word"), [
    ("task?id=x", "id: "), ("task", "none"), ("tasks?colour=blue", "colour"), ("tasks?limit=many", "limit: "),
    ("tasks?limit=99999999999", "limit: "), ("tasks?type=t&status=lost", "status: "), ("history?minutes=x", "minutes: "),
    ("tasks?type=%00", "type: must be text"), ("tasks?Type=t", "is not a name"), ("tasks?t);--=x", "is not a name")])
def test_a_bad_parameter_is_400_and_named(ports, address, word):
    status, _, body = ask(ports["open"], "/api/" + address)
    assert status == 400 and word in json.loads(body)["error"]


def test_actions_answer_with_what_their_function_returns(ports, server_url):
    with psycopg.connect(server_url, autocommit=True) as conn:
        task_id = enqueue(conn, "nobody's")
    assert post(ports["token"], "cancel", id=task_id) == (200, {"result": "cancelled"})
    assert post(ports["token"], "retry", id=task_id) == (200, {"result": "pending"})
    for filter in (json.dumps({"ids": [task_id]}), {"ids": [task_id]}):
        shown = post(ports["token"], "bulk", action="cancel", filter=filter, limit=10)[1]["result"]
        assert (shown["matched"], shown["done"], shown["sample"][0]["id"]) == (1, None, task_id)
    done = post(ports["token"], "bulk", action="cancel", filter=filter, dry_run=False, value=None)[1]["result"]
    assert (done["matched"], done["done"], done["next_after"]) == (1, 1, None)
    status, _, body = ask(ports["open"], "/api/operations?limit=1")
    assert status == 200 and json.loads(body)["operations"][0]["id"] == done["operation"]
    assert post(ports["token"], "limit", type="limited", max_running=5) == (200, {"result": {"changed": True, "matching": 0}})
    assert post(ports["token"], "limit", type="limited") == (200, {"result": {"changed": True, "matching": 0}})
    for action in ("pause", "resume"):
        assert post(ports["token"], action, type="t") == (200, {"result": {"changed": True, "matching": 1}})


def test_actions_are_logged_without_secrets(ports, caplog):
    caplog.set_level(logging.INFO)
    assert post(ports["token"], "bulk", action="retry", filter={"payload": {"password": "hunter2"}})[0] == 200
    assert post(ports["token"], "pause", type="no postgresql://ada:hunter2@db/x")[0] == 200
    assert '/api/bulk by HTTP: {"action": "retry"}' in caplog.text
    assert "/api/pause by HTTP" in caplog.text and "ada:***@db/x" in caplog.text and "hunter2" not in caplog.text


def test_a_task_that_is_not_there_is_404(ports):
    for name in ("cancel", "retry"):
        assert post(ports["token"], name, id=UNKNOWN) == (404, {"error": "there is no such task"})
    assert ask(ports["open"], f"/api/task?id={UNKNOWN}")[0] == 404


def test_empty_parameters_are_as_if_they_were_left_out(ports):
    answers = [ask(ports["open"], "/api/" + address) for address in ("tasks", "tasks?type=&status=&limit=&before=")]
    assert [(status, json.loads(body)["tasks"]) for status, _, body in answers] == [(200, json.loads(answers[0][2])["tasks"])] * 2


# -------------------------------------------------------------------------------------------- requests that wait for the database
class Silent:
    """A link whose database says nothing until it is let go."""

    def __init__(self) -> None:
        self.asked, self.go_on = threading.Event(), threading.Event()

    def reopen_if_closed(self) -> None:
        pass

    def call(self, function: str, **arguments: Any) -> list[tuple[str]]:
        self.asked.set()
        self.go_on.wait(30)
        return [("{}",)]

    def close(self) -> None:
        pass


@pytest.fixture
def lone() -> Iterator[Callable[..., orchestrator.HttpServer]]:
    """A server without a worker and without a database."""
    servers: list[orchestrator.HttpServer] = []

    def start(link: Any = None, **settings: Any) -> orchestrator.HttpServer:
        config = orchestrator.Config.load({"database_url": "postgresql://127.0.0.1:1/none", **settings}, {})
        status = orchestrator.WorkerStatus("w", False, [], [], 1, 0, 0.0, 0.0, [], orchestrator.Counters(orchestrator.Router()),
                                           None, 0.0)
        servers.append(orchestrator.HttpServer(config, lambda: status))
        servers[-1].link = link or servers[-1].link
        servers[-1].start()
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def test_requests_that_wait_for_a_silent_database_are_bounded_even_if_their_clients_leave(lone):
    link = Silent()
    server = lone(link, metrics_port=0)
    port = server.server_address[1]
    before = threading.active_count()
    for _ in range(orchestrator.MAX_WAITING):
        with socket.create_connection(("127.0.0.1", port)) as client:   # asks, and is gone
            client.sendall(b"GET /api/overview HTTP/1.0\r\n\r\n")
    eventually(lambda: threading.active_count() == before + orchestrator.MAX_WAITING)
    for _ in range(100):
        status, headers, body = ask(port, "/api/overview")
        assert (status, headers["retry-after"]) == (503, "5") and b"wait for the database" in body
    eventually(lambda: threading.active_count() == before + orchestrator.MAX_WAITING)
    assert ask(port, "/health")[0] == 200
    link.go_on.set()
    eventually(lambda: threading.active_count() == before)
    assert ask(port, "/api/overview")[0] == 200


def test_a_request_waits_for_its_turn_for_a_bounded_time(lone, monkeypatch):
    monkeypatch.setattr(orchestrator, "WAIT_SECONDS", 0.1)
    link = Silent()
    port = lone(link, metrics_port=0).server_address[1]
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(b"GET /api/overview HTTP/1.0\r\n\r\n")
        assert link.asked.wait(10)
        assert ask(port, "/api/overview")[0] == 503
    link.go_on.set()


# ------------------------------------------------------------------------------------------------------------ the port
def test_where_many_workers_are_usual_the_next_free_port_is_taken_and_said(lone, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("orchestrator"), "propagate", True)
    caplog.set_level(logging.INFO)
    first = free_port_pair()
    monkeypatch.setattr(orchestrator, "METRICS_PORT", first)
    servers = [lone(distributed_mode=True, metrics_port=first) for _ in range(2)]
    assert [server.server_address[1] for server in servers] == [first, first + 1]
    assert f"port {first} is in use: the page and the metrics are on port {first + 1}" in caplog.text


@pytest.mark.parametrize("settings", [{"distributed_mode": False, "default": True}, {"distributed_mode": True, "default": False}])
def test_a_single_worker_and_a_port_that_was_given_take_no_other(lone, monkeypatch, settings):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(orchestrator, "METRICS_PORT", port if settings["default"] else 9090)
        with pytest.raises(orchestrator.ConfigError, match="METRICS_PORT=0 takes any free port, off none"):
            lone(distributed_mode=settings["distributed_mode"], metrics_port=port)


@pytest.mark.parametrize("off", ["off", "none"])
def test_metrics_port_off_means_no_server(installed, off):
    app = Orchestrator(installed, {"t": lambda task: None}, metrics_port=off, worker_pool_size=1).start()
    try:
        assert app._http is None and app.worker is not None and app.worker.registered.is_set()
    finally:
        app.stop(0)


# ------------------------------------------------------------------------------------------------------------ how it answers
@pytest.mark.parametrize("path", ["/", "/health", "/ready", "/api/overview", "/nothing"])
def test_head_is_get_without_the_body(ports, path):
    asked, headers, body = ask(ports["open"], path)
    status, head_headers, nothing = ask(ports["open"], path, "HEAD")
    assert (status, nothing) == (asked, b"")
    assert int(headers["content-length"]) == len(body) > 0
    assert "content-length" in head_headers


@pytest.mark.parametrize(("path", "method"), [("/", "GET"), ("/metrics", "GET"), ("/health", "GET"), ("/api/overview", "GET"),
                                              ("/nothing", "GET"), ("/", "POST"), ("/", "BREW")])
def test_every_answer_has_the_headers_that_keep_browsers_in_check(ports, path, method):
    _, headers, _ = ask(ports["open"], path, method)
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none'") and "frame-ancestors 'none'" in policy and "unsafe" not in policy
    assert not headers["server"].strip().startswith("BaseHTTP") and "Python" not in headers["server"]


def test_the_pages_policy_allows_its_own_script_and_no_other():
    page = "<style>a{}</style><script>1</script>"
    policy = orchestrator.content_security_policy(page)
    assert "script-src 'sha256-a4ayc/80/OGda4BO/1o/V0etpOqiLx1JwB5S3beHW0s='" in policy   # of "1"
    assert "connect-src 'self'" in policy and "base-uri 'none'" in policy and "form-action 'none'" in policy
    assert orchestrator.content_security_policy("<p>").count("'none'") == 6


def test_a_bug_is_answered_with_500_and_logged(ports, installed, monkeypatch, caplog):
    def broken(self: Any, *args: Any) -> None:
        raise KeyError("secret")

    monkeypatch.setattr(orchestrator.HttpServer, "ask", broken)
    monkeypatch.setattr(logging.getLogger("orchestrator"), "propagate", True)
    status, _, body = ask(ports["open"], "/api/overview")
    assert status == 500 and b"secret" not in body
    assert [record for record in caplog.records if "/api/overview failed" in record.getMessage() and record.exc_info]


# -------------------------------------------------------------------------------------------------------------- slow clients
def test_500_half_open_clients_do_not_keep_a_health_check_out(installed, worker_process):
    worker = worker_process(installed)
    port = urlsplit(worker.address).port
    assert port is not None
    with contextlib.ExitStack() as clients:
        for n in range(500):
            client = clients.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
            client.sendall(b"GET /health HT" if n % 2 else b"")
        for _ in range(5):
            began = time.monotonic()
            assert ask(port, "/health")[0] == 200
            assert time.monotonic() - began < 3   # a client has 5 seconds for its request
        status = Path(f"/proc/{worker.pid}/status").read_text()
        threads = int(status.split("Threads:")[1].split()[0])
        assert threads < 150


def closed_after(port: int, first: bytes, drip: bytes, every: float, timeout: float) -> float:
    """Seconds until the server closes on a client that sends `first`, then `drip` again and again."""
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=every) as client:
        client.sendall(first)
        while time.monotonic() - began < timeout:
            with contextlib.suppress(TimeoutError):
                try:
                    if not client.recv(1000):
                        return time.monotonic() - began
                    client.sendall(drip)
                except ConnectionError:
                    return time.monotonic() - began
                continue
            with contextlib.suppress(ConnectionError):
                if drip:
                    client.sendall(drip)
    raise AssertionError(f"still open after {timeout} s")


def test_a_client_that_says_nothing_is_dropped(ports, monkeypatch):
    monkeypatch.setattr(orchestrator.HttpRequest, "timeout", 0.3)
    assert closed_after(ports["open"], b"", b"", 0.1, 5) < 4
    assert closed_after(ports["open"], b"GET /health HTTP/1.1\r\nX: ", b"", 0.1, 5) < 4


def test_a_client_that_sends_a_byte_now_and_then_is_dropped_too(ports, monkeypatch):
    monkeypatch.setattr(orchestrator, "CLIENT_SECONDS", 0.5)
    assert closed_after(ports["open"], b"GET /health HTTP/1.1\r\nX: ", b"a", 0.1, 5) < 4


# ---------------------------------------------------------------------------------------------------------- health and ready
def test_health_does_not_need_the_database_and_ready_says_what_is_wrong(worker_process):
    """The database takes the connection and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as mute:
        port = free_port()
        url = f"postgresql://u:canary-7@127.0.0.1:{mute.getsockname()[1]}/d"
        worker = worker_process(url, wait=False, METRICS_PORT=port)

        def listening() -> bool:
            with contextlib.suppress(OSError):
                return ask(port, "/health")[0] == 200
            return False

        eventually(listening, 20)
        began = time.monotonic()
        assert ask(port, "/health")[0] == 200
        status, _, body = ask(port, "/ready")
        assert time.monotonic() - began < 3
        answer = json.loads(body)
        assert (status, answer["status"]) == (503, "failing")
        assert answer["problems"] == ["not registered: the database was not reached yet"]
        assert b"canary-7" not in body and b"canary-7" not in ask(port, "/metrics")[2]
        assert "canary-7" not in worker.output


@pytest.fixture
def app(installed: str) -> Iterator[Orchestrator]:
    app = start(installed)
    yield app
    if app.worker is not None:
        app.stop(0)


def test_health_turns_503_when_a_loop_no_longer_moves_and_200_when_it_does(app, monkeypatch):
    worker, entered, gate = app.worker, threading.Event(), threading.Event()

    def wedged() -> float:
        entered.set()
        gate.wait()
        return 0.1

    monkeypatch.setattr(worker.claims, "poll", wedged)
    worker.pool.room.set()
    assert entered.wait(5)
    assert ask(port_of(app), "/health")[0] == 200
    worker.claims.moved_at -= 600   # ten minutes go by
    for path in ("/health", "/ready"):
        status, _, body = ask(port_of(app), path)
        assert (status, json.loads(body)["problems"]) == (503, ["the claim loop has not moved for 600 s"])
    gate.set()
    eventually(lambda: ask(port_of(app), "/health")[0] == 200)


def test_ready_turns_503_when_the_database_has_not_answered_lately(app):
    worker = app.worker   # nothing to report here
    silent = {loop: threading.Event() for loop in (worker.claims, worker.heartbeat)}

    def fall_silent(loop: Any) -> None:
        silent[loop].set()
        threading.Event().wait()

    for loop in silent:
        loop.link.call = lambda *_, loop=loop, meanwhile=None: fall_silent(loop)
        loop.bell.set()
    assert all(event.wait(10) for event in silent.values())   # what was under way has been answered by now
    for loop in worker.loops:
        loop.link.answered -= 100
    status, _, body = ask(port_of(app), "/ready")
    assert (status, json.loads(body)["problems"]) == (503, ["the database has not answered for 100 s"])
    assert ask(port_of(app), "/health")[0] == 200


def test_ready_turns_503_while_it_drains_and_health_does_not(installed):
    started, release = threading.Event(), threading.Event()

    def work(task: Any) -> None:
        started.set()
        release.wait(20)

    app = Orchestrator(installed, {"t": work}, metrics_port=0).start()
    port, worker = port_of(app), app.worker
    app.enqueue("t")
    assert started.wait(10)
    stopping = threading.Thread(target=app.stop, args=(20,))
    stopping.start()
    assert worker.draining.wait(5)
    status, _, body = ask(port, "/ready")
    assert (status, json.loads(body)["problems"]) == (503, ["shutting down"])
    assert ask(port, "/health")[0] == 200
    release.set()
    stopping.join(20)
    assert not stopping.is_alive()
