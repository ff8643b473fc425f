"""Values that must not go wrong quietly: what is read back, results and progress, transactions, JSON forms, awaitables, keys, passwords."""
from __future__ import annotations

import asyncio
import copy
import dataclasses
import datetime as dt
import enum
import functools
import json
import logging
import pickle
import sys
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from decimal import Decimal
from typing import Any, ClassVar, NamedTuple

import psycopg
import pytest

from apps import events, make_app, running, story, wait_for, worker_of
from orchestrator import Discard, EnqueuedId, Handler, Task, clean_text, redact_url
from postgres import eventually
from steps import column, value

Connection = psycopg.Connection[Any]


# ---------------------------------------------------------------------------------------------------------- read back
SECRETIVE = {"tokens_used": 12, "max_tokens": 4096, "secretary": "Eve", "password": "hunter2", "api_key": "k",
             "authorization": ["Bearer x"], "nested": [{"token": {"secret": None}}], "url": "postgresql://u:pw@h/d", "passenger": "Ada",
             "": 1}


def test_a_program_gets_its_own_data_back_as_it_gave_them(installed: str, conn: Connection) -> None:
    with running(installed, {"a": lambda task: task.payload}) as app:
        task = wait_for(app, app.enqueue("a", SECRETIVE))
    assert (task["payload"], task["result"]) == (SECRETIVE, SECRETIVE)
    shown = json.loads(value(conn, "select orchestrator.show_task(%s)::text", task["id"]))   # what people look at has no secrets
    assert "hunter2" not in json.dumps(shown) and "pw@h" not in json.dumps(shown)
    kept = ("tokens_used", "max_tokens", "secretary", "passenger")
    assert {name: shown["result"][name] for name in kept} == {name: SECRETIVE[name] for name in kept}


@pytest.mark.parametrize("payload", [0, False, "", [], {}, "null", 10 ** 400, -0.0, 1e-300, "\x7f\u2028\U0001f418", {"a": [None, True]}],
                         ids=lambda payload: repr(payload)[:20])
def test_any_json_value_is_what_the_handler_gets_and_what_is_read_back(installed: str, payload: Any) -> None:
    got = []
    with running(installed, {"a": lambda task: got.append(task.payload) or task.payload}) as app:
        task = wait_for(app, app.enqueue("a", payload))
    assert got == [payload] == [task["result"]] and task["payload"] == payload and type(got[0]) is type(task["result"])


# ------------------------------------------------------------------------------------------- transactions and results
@pytest.fixture
def ledger(conn: Connection) -> Callable[[], list[str]]:
    conn.execute("create table ledger (entry text)")
    return lambda: column(conn, "select entry from ledger order by entry")


def test_what_complete_was_given_commits_with_the_writes(installed: str, ledger: Callable[[], list[str]]) -> None:
    def handler(task: Task) -> None:
        with task.transaction() as connection:
            connection.execute("insert into ledger values ('x')")
            task.complete({"order": 7, "when": dt.date(2026, 1, 2)})

    with running(installed, {"a": handler}) as app:
        task = wait_for(app, app.enqueue("a"))
    assert (task["status"], task["result"], ledger()) == ("completed", {"order": 7, "when": "2026-01-02"}, ["x"])


def test_a_result_that_can_not_be_kept_is_refused_before_the_transaction_commits(installed: str, ledger: Callable[[], list[str]]) -> None:
    def handler(task: Task) -> None:
        with task.transaction() as connection:
            connection.execute("insert into ledger values ('x')")
            task.complete(object())

    with running(installed, {"a": Handler(handler, max_retries=0)}) as app:
        task = wait_for(app, app.enqueue("a"))
    assert (task["status"], ledger()) == ("dead_letter", []) and "not JSON" in task["last_error"]


@pytest.mark.parametrize("after", ["returns", "raises", "discards", "exits"])
def test_what_comes_after_the_transaction_is_too_late_repeats_nothing_and_is_said(
        installed: str, ledger: Callable[[], list[str]], caplog: pytest.LogCaptureFixture, after: str) -> None:
    def handler(task: Task) -> Any:
        with task.transaction() as connection:
            connection.execute("insert into ledger values ('x')")
        if after == "returns":
            return {"order": 7}
        raise {"raises": ValueError("after"), "discards": Discard("after"), "exits": SystemExit("after")}[after]

    with caplog.at_level(logging.INFO, "orchestrator"), running(installed, {"a": Handler(handler, base_delay=0)}) as app:
        task = wait_for(app, app.enqueue("a"))
        eventually(lambda: not worker_of(app).tasks)   # the handler has returned, too
    assert (task["status"], task["attempts"], task["result"], ledger()) == ("completed", 1, None, ["x"])
    said = [record for record in caplog.records if task["id"] in record.getMessage() and record.levelno >= logging.WARNING]
    assert len(said) == 1 and ("task.complete(result)" if after == "returns" else "after") in said[0].getMessage()


def test_a_second_transaction_of_the_same_task_is_rolled_back(installed: str, ledger: Callable[[], list[str]]) -> None:
    def handler(task: Task) -> None:
        for entry in ("first", "second"):
            with task.transaction() as connection:
                connection.execute("insert into ledger values (%s)", [entry])

    with running(installed, {"a": Handler(handler, base_delay=0)}) as app:
        task = wait_for(app, app.enqueue("a"))
    assert (task["status"], ledger()) == ("completed", ["first"])


# ------------------------------------------------------------------------------------------------------------ progress
@pytest.mark.parametrize("outcome", ["none", "result", "failure"])
def test_progress_is_never_the_result(installed: str, outcome: str) -> None:
    def handler(task: Task) -> Any:
        task.progress({"page": 3, "a": "before b"})
        while story(app, task.id)["progress"] is None:
            pass
        if outcome == "failure":
            raise Discard("no")
        return {"result": True} if outcome == "result" else None

    with running(installed, {"a": handler}) as app:
        task = wait_for(app, app.enqueue("a"))
    assert task["result"] == ({"result": True} if outcome == "result" else None)
    assert task["progress"] == {"page": 3, "a": "before b"}


def test_progress_takes_the_same_values_as_a_result(installed: str) -> None:
    with running(installed, {"a": lambda task: task.progress(dt.timedelta(1))}) as app:
        assert "not JSON" in wait_for(app, app.enqueue("a", max_retries=0))["last_error"]
    moment, done = dt.datetime(2026, 1, 2, tzinfo=dt.UTC), threading.Event()

    def handler(task: Task) -> None:
        task.progress([moment, uuid.UUID(int=1), Decimal("1.10")])
        assert done.wait(20)

    with running(installed, {"b": handler}) as app:
        task_id = app.enqueue("b")
        while (shown := story(app, task_id)["progress"]) is None:
            pass
        done.set()
        assert shown == ["2026-01-02T00:00:00+00:00", "00000000-0000-0000-0000-000000000001", "1.10"]


# --------------------------------------------------------------------------------------------------------------- JSON
class Colour(enum.Enum):
    RED = "red"
    PAIR = (1, dt.date(2026, 1, 2))


class Level(enum.IntEnum):
    HIGH = 3


@dataclasses.dataclass
class Order:
    id: uuid.UUID
    total: Decimal
    lines: list[Order] = dataclasses.field(default_factory=list)
    shared: ClassVar[str] = "no field"


@dataclasses.dataclass(slots=True, frozen=True)
class Point:
    x: int


class Model:   # as pydantic's
    def model_dump(self) -> dict[str, Any]:
        return {"at": dt.time(1, 2, 3), "colours": {Colour.RED}}


class Pair(NamedTuple):
    left: int
    right: dt.date


class Ours:
    pass


UTC = dt.UTC
FORMS: dict[str, tuple[Any, Any]] = {
    "datetime": (dt.datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC), "2026-01-02T03:04:05.000006+00:00"),
    "naive datetime": (dt.datetime(2026, 1, 2), "2026-01-02T00:00:00"),   # noqa: DTZ001
    "date": (dt.date(2026, 1, 2), "2026-01-02"), "time": (dt.time(3, 4), "03:04:00"),
    "uuid": (uuid.UUID(int=5), str(uuid.UUID(int=5))), "decimal": (Decimal("10.10"), "10.10"), "decimal nan": (Decimal("nan"), "NaN"),
    "enum": (Colour.RED, "red"), "enum of values": (Colour.PAIR, [1, "2026-01-02"]), "int enum": (Level.HIGH, 3),
    "dataclass": (Order(uuid.UUID(int=1), Decimal(2), [Order(uuid.UUID(int=3), Decimal("0.4"))]),
                  {"id": str(uuid.UUID(int=1)), "total": "2", "lines": [{"id": str(uuid.UUID(int=3)), "total": "0.4", "lines": []}]}),
    "slotted dataclass": (Point(1), {"x": 1}), "model": (Model(), {"at": "01:02:03", "colours": ["red"]}),
    "set": ({4}, [4]), "frozenset": (frozenset({"a"}), ["a"]), "tuple": ((1, dt.date(2026, 1, 2)), [1, "2026-01-02"]),
    "named tuple": (Pair(1, dt.date(2026, 1, 2)), [1, "2026-01-02"]), "deep": ([{"a": ({"b": Decimal(1)},)}], [{"a": [{"b": "1"}]}])}


def test_usual_values_have_one_json_form_in_payloads_results_and_keys_of_both(installed: str) -> None:
    with running(installed, {"a": lambda task: FORMS[task.payload[0]][0]}) as app:
        ids = {name: app.enqueue("a", [name, given]) for name, (given, _) in FORMS.items()}
        for name, (_, form) in FORMS.items():
            task = wait_for(app, ids[name])
            assert (name, task["status"], task["payload"][1], task["result"]) == (name, "completed", form, form)


class Hostile:
    """Its JSON form does what no form may."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def model_dump(self) -> Any:
        raise self.error


class Endless:
    def model_dump(self) -> Any:
        return {"again": Endless()}


LOST: dict[str, Callable[[], Any]] = {
    "bytes": lambda: b"x", "an object": Ours, "a class": lambda: Order, "a function": lambda: lambda: None, "nan": lambda: float("nan"),
    "nul": lambda: "a\0b", "half a pair": lambda: {"\ud800": 1}, "a tuple as key": lambda: {(1, 2): 3},
    "a uuid as key": lambda: {uuid.UUID(int=1): 3},
    "too long": lambda: "x" * 2_000_000, "too deep": lambda: functools.reduce(lambda inner, _: [inner], range(100_000), 1),
    "circular": lambda: sys.modules, "endless": Endless, "a number of many digits": lambda: 10 ** 10_000,
    "a form that raises": lambda: Hostile(AttributeError("x")), "a form that raises a ValueError": lambda: Hostile(ValueError("x")),
    "a form that exits": lambda: Hostile(SystemExit(3)), "a form that interrupts": lambda: Hostile(KeyboardInterrupt()),
    "a huge decimal place": lambda: {"n": float("inf")}}


def test_finished_work_is_never_repeated_for_its_results_sake_and_the_loss_is_told(
        installed: str, caplog: pytest.LogCaptureFixture) -> None:
    charged: list[str] = []

    def charge(task: Task) -> Any:
        charged.append(task.payload)
        return LOST[task.payload]()

    with caplog.at_level(logging.WARNING, "orchestrator"), running(installed, {"charge": Handler(charge, base_delay=0)}) as app:
        ids = {name: app.enqueue("charge", name) for name in LOST}
        for name in LOST:
            task = wait_for(app, ids[name])
            assert (name, task["status"], task["result"], task["attempts"], task["last_error"]) == (name, "completed", None, 1, None)
        while any("result_lost" not in events(story(app, task_id)) for task_id in ids.values()):
            pass
    assert sorted(charged) == sorted(LOST)
    for task_id in ids.values():
        assert sum(task_id in record.getMessage() and "could not be kept" in record.getMessage() for record in caplog.records) == 1


def test_the_programs_own_form_goes_before_the_usual_one_and_may_leave_the_rest_to_it(installed: str) -> None:
    def form(given: Any) -> Any:
        if isinstance(given, Ours):
            return "ours"
        if isinstance(given, Decimal):
            return float(given)
        raise TypeError("not mine")

    with running(installed, make_app(installed, {"a": lambda task: [Ours(), Decimal("0.5"), uuid.UUID(int=1), b"x"][task.payload[1]]},
                                     json_default=form)) as app:
        done = [wait_for(app, app.enqueue("a", [Ours(), n, Decimal("1.5")])) for n in range(4)]
    assert [task["payload"] for task in done] == [["ours", n, 1.5] for n in range(4)]
    assert [task["result"] for task in done] == ["ours", 0.5, str(uuid.UUID(int=1)), None]
    assert "result_lost" in events(done[3]) or done[3]["status"] == "completed"


@pytest.mark.parametrize("error", [ValueError("mine"), AttributeError("mine"), ZeroDivisionError("mine")])
def test_a_form_that_fails_is_an_error_of_the_program_that_enqueues_and_names_the_field(installed: str, error: Exception) -> None:
    def form(given: Any) -> Any:
        raise error

    app = make_app(installed, json_default=form)
    with pytest.raises((ValueError, type(error)), match="payload|mine"):
        app.enqueue("a", Ours())
    app.close()


@pytest.mark.parametrize("name", ["bytes", "nan", "nul", "half a pair", "a tuple as key", "circular", "too deep", "an object", "too long"])
def test_a_payload_that_is_not_json_is_refused_by_name(installed: str, name: str) -> None:
    app = make_app(installed)
    for call in (lambda: app.enqueue("a", LOST[name]()), lambda: app.enqueue_many("a", [1, LOST[name]()])):
        with pytest.raises(ValueError, match=r"^payload(s\[2\])?: "):
            call()
    app.close()


# ----------------------------------------------------------------------------------------------------------- awaitables
async def awaited(task: Task) -> str:
    await asyncio.sleep(0)
    return "awaited"


def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **named: Any) -> Any:
        return function(*args, **named)
    return wrapper


class Callee:
    async def __call__(self, task: Task) -> str:
        return await awaited(task)

    async def method(self, task: Task) -> str:
        return await awaited(task)

    @classmethod
    async def of_the_class(cls, task: Task) -> str:
        return await awaited(task)

    @staticmethod
    async def static(task: Task) -> str:
        return await awaited(task)


class Promise:
    def __await__(self) -> Iterator[Any]:
        yield from asyncio.sleep(0).__await__()
        return "awaited"   # type: ignore[return-value]


async def nested(task: Task) -> Any:
    return await asyncio.gather(awaited(task), asyncio.wait_for(awaited(task), 5))


HANDLERS: dict[str, Callable[[Task], Any]] = {
    "function": awaited, "wrapped": decorated(awaited), "object": Callee(), "method": Callee().method, "class method": Callee.of_the_class,
    "static": Callee.static, "partial": functools.partial(awaited), "lambda": lambda task: awaited(task),   # noqa: PLW0108
    "promise": lambda task: Promise(),
    "wrapped object": decorated(Callee()), "partial of object": functools.partial(Callee())}


async def middle(task: Task, call_next: Callable[[Task], Any]) -> Any:
    return [await call_next(task)]


class Middle:
    async def __call__(self, task: Task, call_next: Callable[[Task], Any]) -> Any:
        return [await call_next(task)]


MIDDLEWARE: dict[str, Callable[..., Any]] = {
    "async": middle, "async, wrapped": decorated(middle), "async object": Middle(), "async partial": functools.partial(middle),
    "async method": Middle().__call__, "plain": lambda task, call_next: [call_next(task)]}


def test_whatever_can_be_awaited_is(installed: str) -> None:
    with running(installed, {**HANDLERS, "nested": nested}) as app:
        for name in HANDLERS:
            assert (name, wait_for(app, app.enqueue(name))["result"]) == (name, "awaited")
        assert wait_for(app, app.enqueue("nested"))["result"] == ["awaited", "awaited"]


@pytest.mark.parametrize("name", MIDDLEWARE)
def test_middleware_of_every_kind_gets_the_value_of_handlers_of_every_kind(installed: str, name: str) -> None:
    app = make_app(installed, {"sync": lambda task: "awaited", "async": awaited, "object": Callee(), "none": lambda task: None})
    app.use(MIDDLEWARE[name])
    app.use(MIDDLEWARE[name])
    with running(installed, app):
        ids = {kind: app.enqueue(kind) for kind in ("sync", "async", "object", "none")}
        assert {kind: wait_for(app, id)["result"] for kind, id in ids.items()} == {
            "sync": [["awaited"]], "async": [["awaited"]], "object": [["awaited"]], "none": [[None]]}


def test_async_middleware_lets_as_many_handlers_run_as_there_are_places(installed: str) -> None:
    """They run in the pool, not in the few threads of an event loop's executor."""
    size = 40
    together = threading.Barrier(size)

    app = make_app(installed, {"a": lambda task: together.wait(30) and None}, worker_pool_size=size)
    app.use(middle)
    with running(installed, app):
        ids = app.enqueue_many("a", range(size))
        assert {wait_for(app, id, timeout=40)["status"] for id in ids} == {"completed"}


def test_a_plain_handler_under_async_middleware_is_over_before_its_task_ends(installed: str) -> None:
    """A cancelled task must not run on in a thread while it counts as ended."""
    started, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def obedient(task: Task) -> None:
        started.set()
        assert task.cancelled.wait(30) and go_on.wait(30)
        ended.set()
        task.raise_if_cancelled()

    app = make_app(installed, {"a": obedient})
    app.use(middle)
    with running(installed, app):
        task_id = app.enqueue("a")
        assert started.wait(30) and app.cancel(task_id) == "cancelling"
        for _ in range(20):
            assert story(app, task_id)["status"] in ("claimed", "running")   # it has not ended
        go_on.set()
        assert wait_for(app, task_id)["status"] == "cancelled" and ended.is_set()


def test_async_middleware_is_cancelled_though_an_awaitable_within_it_has_ended(installed: str) -> None:
    waiting = threading.Event()
    app = make_app(installed, {"a": awaited})

    @app.use
    async def outer(task: Task, call_next: Callable[[Task], Any]) -> None:
        await call_next(task)
        waiting.set()
        await asyncio.sleep(600)

    @app.use
    def inner(task: Task, call_next: Callable[[Task], Any]) -> Any:
        return call_next(task)   # the handler is awaited here, by the thread that the outer one waits for

    with running(installed, app):
        task_id = app.enqueue("a")
        assert waiting.wait(30) and app.cancel(task_id) == "cancelling"
        assert wait_for(app, task_id)["status"] == "cancelled"


def generator(task: Task) -> Iterator[int]:
    yield 1


async def async_generator(task: Task) -> AsyncIterator[int]:
    yield 1


@pytest.mark.parametrize("handler", [generator, async_generator, decorated(generator), lambda task: (n for n in range(3)),
                                     functools.partial(async_generator)], ids=range(5))
def test_a_generator_is_refused_and_not_taken_for_done(installed: str, handler: Any) -> None:
    with running(installed, {"a": Handler(handler, max_retries=0)}) as app:
        task = wait_for(app, app.enqueue("a"))
    assert task["status"] == "dead_letter" and "generator" in task["last_error"]


# --------------------------------------------------------------------------------------------------------------- keys
def test_enqueue_tells_whether_the_key_was_new_also_after_the_first_has_ended(installed: str, connect: Callable[..., Connection]) -> None:
    with running(installed, {"a": lambda task: None}) as app:
        first = app.enqueue("a", idempotency_key="k")
        wait_for(app, first)
        again = app.enqueue("a", {"other": 1}, idempotency_key="k")
        assert (again, first.created, again.created, app.enqueue("a").created) == (first, True, False, True)
        assert [id.created for id in app.enqueue_many("a", [1, 2], idempotency_keys=["k", "new"])] == [False, True]
        with connect(autocommit=False) as caller:
            assert not app.enqueue("a", idempotency_key="k", connection=caller).created
            assert app.enqueue("a", idempotency_key="fresh", connection=caller).created


def test_an_id_is_a_str_everywhere(installed: str) -> None:
    app = make_app(installed)
    made = app.enqueue("a", idempotency_key="k")
    known = app.enqueue("a", idempotency_key="k")
    app.close()
    assert isinstance(made, str) and json.dumps({"id": made}) == f'{{"id": "{made!s}"}}' and {made: 1}[str(made)] == 1
    for twin in (pickle.loads(pickle.dumps(known)), copy.copy(known), copy.deepcopy([known])[0]):
        assert (type(twin), twin, twin.created) == (EnqueuedId, known, False)
    assert uuid.UUID(made) == uuid.UUID(str(made))


@pytest.mark.parametrize("key", [uuid.UUID(int=7), "text", "é 🐘", "{a,\"b\"}", "NULL", "null", "a\\b'"])
def test_a_key_is_itself_by_itself_and_in_a_batch(installed: str, key: Any) -> None:
    app = make_app(installed)
    first = app.enqueue("a", idempotency_key=key)
    [again] = app.enqueue_many("a", [1], idempotency_keys=[key])
    assert again == first and not again.created and story(app, first)["idempotency_key"] == str(key)
    app.close()


# ---------------------------------------------------------------------------------------------------------- passwords
LEAKS = {
    "a url": "could not connect to postgresql://ada:canary@db.example.com:5432/shop", "a url with @": "postgres://ada:can@ry-canary@h/d",
    "a url with a slash": "amqp://guest:can/canary@h//", "redis": "redis://:canary@h:6379/0", "http": "GET https://u:canary@h/x?y=1 failed",
    "in quotes": "(psycopg) 'postgresql://u:canary@h/d'", "a parameter": "https://h/?password=canary&x=1",
    "a dsn": "h password=canary user=u",
    "a quoted dsn": "host=h password='can ary canary' user=u", "capitals": "PASSWORD=canary", "two": "a://u:canary@h and b://u:canary@h",
    "on a later line": "failed\nDATABASE_URL=postgresql://u:canary@h/d"}


def test_no_password_of_a_url_reaches_the_database_or_the_log(installed: str, conn: Connection, caplog: pytest.LogCaptureFixture) -> None:
    def failing(task: Task) -> None:
        try:
            raise OSError(LEAKS[task.payload])
        except OSError as error:
            raise {0: RuntimeError, 1: Discard, 2: Exception}[len(task.payload) % 3](LEAKS[task.payload]) from error

    with caplog.at_level(logging.DEBUG, "orchestrator"), running(installed, {"a": Handler(failing, max_retries=0)}) as app:
        for name in LEAKS:
            assert wait_for(app, app.enqueue("a", name))["status"] == "dead_letter"
    told = column(conn, "select t::text from orchestrator.tasks t") + column(conn, "select e::text from orchestrator.task_events e")
    lines = [record.getMessage() + str(record.__dict__) for record in caplog.records]
    assert [line for line in told + lines if "canary" in line] == []
    assert any("***" in line for line in told)


@pytest.mark.parametrize("text", ["see http://localhost:8080/a@b", "ratio 3://4:5", "mail ada@example.com: sent", "[::1]:5432",
                                  "12:30 @ noon", "https://example.com:443/x", "a password is needed"])
def test_what_holds_no_password_stays_as_it_is(text: str) -> None:
    assert clean_text(text) == redact_url(text) == text
