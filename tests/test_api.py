"""What the page shows: one SQL function for each address, bounded, and with its secrets blanked."""
from __future__ import annotations

from typing import Any

import psycopg
import pytest
from psycopg.types.json import Json

from steps import (
    Connection,
    cancel,
    claim,
    claim_one,
    complete,
    declare_dead,
    enqueue,
    enqueue_some,
    fail,
    lead,
    register,
    start,
    value,
)

UNKNOWN = "01890a5d-ac96-774b-bcce-b302099a8057"
GET = ("overview", "history", "tasks", "failures", "task", "operations")


@pytest.fixture(autouse=True)
def worker(conn: Connection) -> None:
    register(conn, "w", ("t", "u", "mail:"))


def api(conn: Connection, name: str, **parameters: str) -> Any:
    """As the page's server calls it: all arguments are text, PostgreSQL finds their types."""
    with psycopg.ClientCursor(conn) as cursor:
        arguments = ", ".join(f"p_{name} => %({name})s" for name in parameters)
        function = "show_task" if name == "task" else "api_" + name
        return cursor.execute(f"select orchestrator.{function}({arguments})", parameters).fetchone()[0]


def ids(answer: dict[str, Any]) -> list[str]:
    return [task["id"] for task in answer["tasks"]]


def pages(conn: Connection, name: str, **parameters: str) -> list[list[str]]:
    """All pages, by following next."""
    answer = api(conn, name, **parameters)
    found = [ids(answer)]
    while answer["next"]:
        answer = api(conn, name, **parameters, before=answer["next"])
        found.append(ids(answer))
    return found


def flat(found: list[list[str]]) -> list[str]:
    return [id for page in found for id in page]


def refused(conn: Connection, name: str, **parameters: Any) -> tuple[str, str]:
    """The SQLSTATE and the field or the message."""
    with pytest.raises(psycopg.Error) as caught:
        api(conn, name, **parameters)
    return str(caught.value.sqlstate), str(caught.value.diag.column_name or caught.value.diag.message_primary)


def dead(conn: Connection, n: int, type: str = "t") -> list[str]:
    """Dead letters, the newest first."""
    enqueue_some(conn, n, type)
    claimed = claim(conn, types=[type], limit=n)
    for c in claimed:
        fail(conn, c["claim_id"], c["id"], f"broken {c['id']}", permanent=True)
    return [str(c["id"]) for c in reversed(claimed)]


# ------------------------------------------------------------------------------------------------------------- overview
def test_overview_shows_what_was_counted_and_who_works(conn: Connection) -> None:
    term = lead(conn)
    enqueue_some(conn, 5)
    enqueue(conn, "nobody:here")
    conn.execute("insert into orchestrator.type_stats (type, since, enqueued_total)"
                 " values ('other', '00000000-0000-0000-0000-000000000000', 1)")
    conn.execute("select orchestrator.pause_type('u')")
    claim(conn, limit=2)
    conn.execute("select orchestrator.sample_stats('leader', %s)", [term])
    seen = api(conn, "overview")
    assert seen["totals"] == {"waiting": 4, "parked": 0, "scheduled": 0, "in_flight": 2, "dead_letters": 0, "enqueued_total": 7,
                              "ended_total": 1, "oldest_waiting": seen["totals"]["oldest_waiting"]}
    assert 0 <= seen["totals"]["oldest_waiting"] < 60
    assert 0 <= seen["counts"]["age"] < 60 and seen["counts"]["complete"]
    types = {t["type"]: t for t in seen["types"]}
    assert list(types) == ["nobody:here", "t", "u", "other"]   # the rest together, and last
    assert (types["nobody:here"]["waiting"], types["nobody:here"]["workers"], types["nobody:here"]["others"]) == (1, 0, False)
    assert (types["t"]["waiting"], types["t"]["in_flight"], types["t"]["workers"], types["t"]["paused"]) == (3, 2, 1, False)
    assert types["u"]["paused"] and types["u"]["workers"] == 1
    assert types["other"]["others"] and types["other"]["workers"] is None
    workers = {w["id"]: w for w in seen["workers"]}
    assert workers["leader"]["leads"] and not workers["w"]["leads"]
    assert workers["w"]["in_flight"] == 2 and workers["w"]["handles"] == ["mail:*", "t", "u"]
    assert 0 <= workers["w"]["heartbeat"] < 60


def test_overview_tells_a_dead_worker_and_a_type_that_nobody_handles(conn: Connection) -> None:
    declare_dead(conn, "w")
    conn.execute("select orchestrator.pause_type('u')")
    seen = api(conn, "overview")
    assert [w["declared_dead"] for w in seen["workers"]] == [True]
    assert {t["type"]: t["workers"] for t in seen["types"]} == {"t": 0, "u": 0}


def test_overview_tells_a_worker_that_stops_and_one_that_is_silent_for_longer_than_a_leader_may_be(conn: Connection) -> None:
    def seen() -> dict[str, Any]:
        return next(w for w in api(conn, "overview")["workers"] if w["id"] == "w")

    assert (seen()["stopping"], seen()["overdue"]) == (False, False)
    conn.execute("select orchestrator.announce_stop('w')")
    assert seen()["stopping"]
    conn.execute("update orchestrator.workers set last_heartbeat = last_heartbeat - interval '1 hour'")
    assert not seen()["overdue"]   # there is no leader to compare with
    lead(conn, length="20 seconds")
    assert seen()["overdue"]
    conn.execute("update orchestrator.workers set last_heartbeat = clock_timestamp() - interval '15 seconds' where id = 'w'")
    assert not seen()["overdue"]


def test_overview_works_before_anything_was_counted(conn: Connection) -> None:
    seen = api(conn, "overview")
    assert seen["counts"]["age"] is None and seen["totals"]["waiting"] == 0 and seen["totals"]["ended_total"] is None


def test_history_gives_the_samples_of_the_last_minutes(conn: Connection) -> None:
    conn.execute("insert into orchestrator.stats_samples select clock_timestamp() - make_interval(mins => m), m, 0, 0, 0, 10, null"
                 " from generate_series(0, 90, 30) m")
    answer = api(conn, "history", minutes="61")
    assert [dict(zip(answer["columns"], s, strict=True))["waiting"] for s in answer["samples"]] == [60, 30, 0]
    assert len(api(conn, "history")["samples"]) == 1


# --------------------------------------------------------------------------------------------------------------- search
def test_tasks_finds_by_whole_id_and_by_its_beginning_in_any_spelling(conn: Connection) -> None:
    wanted = enqueue(conn)
    enqueue(conn, "u")
    assert ids(api(conn, "tasks", id=wanted)) == [wanted]
    assert ids(api(conn, "tasks", id=wanted.replace("-", "").upper())) == [wanted]
    assert ids(api(conn, "tasks", id=wanted[:-1])) == [wanted]
    assert len(ids(api(conn, "tasks", id=wanted[:2]))) == 2
    for state in ("pending", "ready", "waiting"):
        assert ids(api(conn, "tasks", id=wanted[:2], type="t", status=state)) == [wanted]
    assert ids(api(conn, "tasks", id=wanted[:2], status="scheduled")) == []
    assert ids(api(conn, "tasks", id=UNKNOWN)) == []


def test_tasks_pages_through_everything_newest_first(conn: Connection) -> None:
    enqueued = enqueue_some(conn, 23) + enqueue_some(conn, 2, "u")
    found = pages(conn, "tasks", limit="10")
    assert [len(page) for page in found] == [10, 10, 5]
    assert flat(found) == sorted(enqueued, reverse=True)
    assert sorted(flat(pages(conn, "tasks", type="u", limit="1"))) == sorted(enqueued[-2:])


@pytest.mark.parametrize("limit", ["1", "3", "200"])
def test_tasks_pages_through_each_state(conn: Connection, limit: str) -> None:
    gone = dead(conn, 4)
    later = [enqueue(conn, run_at=f"2030-01-0{day}") for day in (1, 2, 3)]
    failed = claim_one_of(conn)
    flying = enqueue_some(conn, 4)
    held = claim(conn, limit=4)
    start(conn, held[0]["claim_id"], held[0]["id"])
    ready = enqueue_some(conn, 4)
    urgent = enqueue(conn, priority=5)
    cancelled = enqueue(conn, "u")
    cancel(conn, cancelled)

    def found(**parameters: str) -> list[str]:
        return flat(pages(conn, "tasks", limit=limit, **parameters))

    assert found(status="ready") == found(status="ready", type="t") == [urgent, *ready]
    assert found(status="scheduled") == [failed, *later]
    assert found(status="retry_scheduled") == [failed]
    assert sorted(found(status="in_flight")) == sorted(flying)
    assert found(status="running") == [str(held[0]["id"])]
    assert sorted(found(status="claimed")) == sorted(str(h["id"]) for h in held[1:])
    assert found(status="dead_letter") == gone
    assert found(status="dead_letter", type="u") == found(status="completed") == []
    assert found(status="cancelled") == found(status="cancelled", type="u") == [cancelled]
    assert sorted(found(status="pending")) == sorted([*later, *ready, urgent])


def claim_one_of(conn: Connection) -> str:
    """A task whose retry is due before all that is scheduled."""
    enqueue(conn)
    claim_id, id = claim_one(conn)
    assert fail(conn, claim_id, id, after="1 hour") == "retry_scheduled"
    return id


def test_a_type_alone_is_found_by_the_indexes_first_and_then_what_has_ended(conn: Connection) -> None:
    ended = [enqueue(conn, "u"), enqueue(conn, "u")]
    [first, second] = claim(conn, types=["u"])
    complete(conn, first["claim_id"], first["id"], second["id"])
    gone = dead(conn, 2, "u")
    [later, ready] = [enqueue(conn, "u", run_at="2031-01-01"), enqueue(conn, "u", priority=-5)]
    running = enqueue(conn, "u")
    claim(conn, types=["u"], limit=1)
    expected = [running, ready, later, *gone, *reversed(ended)]
    assert ids(api(conn, "tasks", type="u")) == expected
    for limit in ("1", "2", "3"):
        assert flat(pages(conn, "tasks", type="u", limit=limit)) == expected


def test_a_waiting_type_is_found_at_once_behind_many_newer_tasks(conn: Connection) -> None:
    unchecked(conn)
    first = enqueue(conn, "u")
    enqueue_some(conn, 15_000)
    answer = api(conn, "tasks", type="u", limit="1")
    assert ids(answer) == [first] and answer["looked"] == 1


def test_tasks_looks_at_10_000_at_a_time_and_tells_how_far_it_got_and_where_to_go_on(conn: Connection) -> None:
    unchecked(conn)
    first = enqueue(conn, "u")
    complete(conn, *claim_one(conn, types=["u"]))
    enqueue_some(conn, 15_000)
    answer = api(conn, "tasks", type="u")
    assert answer["tasks"] == [] and answer["next"] and answer["looked"] == 10_000
    assert answer["back_to"] == value(conn, "select to_jsonb(created_at) from orchestrator.tasks where id = %s", answer["next"])
    answer = api(conn, "tasks", type="u", before=answer["next"])
    assert ids(answer) == [first] and answer["next"] is None and answer["looked"] == 5_001


@pytest.mark.parametrize("beginning", ["mail:", "mail*", "ma*"])
def test_tasks_finds_types_by_their_beginning(conn: Connection, beginning: str) -> None:
    enqueue(conn, "t")
    done = enqueue(conn, "mail:done")
    complete(conn, *claim_one(conn, types=["mail:done"]))
    waiting = [enqueue(conn, "mail:a"), enqueue(conn, "mail:b"), enqueue(conn, "mail:b")]
    enqueue(conn, "m")
    enqueue(conn, "m%")
    for limit in ("1", "3", "200"):
        assert flat(pages(conn, "tasks", type=beginning, limit=limit)) == [*waiting, done]
        assert flat(pages(conn, "tasks", type=beginning, status="ready", limit=limit)) == waiting
    assert flat(pages(conn, "tasks", type=beginning, status="completed")) == [done]


def unchecked(conn: Connection) -> None:
    """For a test that adds many rows: the check of every rule, which only tests have, costs far more than the insert."""
    conn.execute("alter table orchestrator.tasks drop constraint if exists every_rule_holds")


def test_tasks_of_one_type_in_a_state_are_found_behind_10_000_others(conn: Connection) -> None:
    unchecked(conn)
    enqueue_some(conn, 12_000)
    conn.execute("update orchestrator.tasks set next_retry_at = '2030-01-01', queued_at = null")
    behind = enqueue(conn, "u", run_at="2031-01-01")
    answer = api(conn, "tasks", status="scheduled", type="u")
    assert (answer["tasks"], answer["next"], answer["cut"], answer["looked"]) == ([], "scheduled+10000", False, 10_000)
    answer = api(conn, "tasks", status="scheduled", type="u", before="scheduled+10000")
    assert ids(answer) == [behind] and answer["next"] is None


def test_a_state_is_listed_down_to_its_100_000th_task(conn: Connection) -> None:
    unchecked(conn)
    enqueue_some(conn, 100_050)
    answer = api(conn, "tasks", status="ready", before="ready+99900", limit="100")
    assert len(answer["tasks"]) == 100 and answer["next"] is None and answer["cut"]


def test_no_address_reads_the_table_whole(conn: Connection) -> None:
    calls: list[tuple[str, dict[str, str]]] = [
        *((name, {}) for name in GET if name != "task"), ("failures", {"type": "u"}), ("tasks", {"id": "0"}), ("tasks", {"type": "u"}),
        ("tasks", {"type": "t*"}), *(("tasks", {"status": s, **t}) for t in ({}, {"type": "u"}, {"type": "u*"}) for s in (
            "ready", "scheduled", "in_flight", "dead_letter", "running", "pending", "cancelled", "completed"))]
    conn.execute("analyze orchestrator.tasks")   # empty: a plan made now must stay right
    for name, parameters in calls:
        api(conn, name, **parameters)
    unchecked(conn)
    enqueue_some(conn, 30_000)
    read = "select seq_tup_read + coalesce(idx_tup_fetch, 0) from pg_stat_xact_user_tables where relname = 'tasks'"
    for name, parameters in calls:
        with conn.transaction():
            before = value(conn, read) or 0
            api(conn, name, **parameters)
            assert value(conn, read) - before <= 21_000, (name, parameters)


# ---------------------------------------------------------------------------------------------------------------- lists
def test_running_shows_the_longest_first_with_redacted_progress(conn: Connection) -> None:
    first = enqueue(conn, payload={"password": "canary"})
    claim_id, _ = claim_one(conn)
    start(conn, claim_id, first)
    conn.execute("select orchestrator.record_progress(%s, %s, %s)", [claim_id, first, Json({"at": 7, "token": "canary"})])
    second = enqueue(conn)
    claim_one(conn)
    answer = api(conn, "tasks", status="in_flight")
    assert ids(answer) == [first, second]
    assert answer["tasks"][0]["progress"] == [["at", 7], ["token", "[redacted]"]]
    assert answer["tasks"][0]["status"] == "running" and 0 <= answer["tasks"][0]["age"] < 60
    assert "canary" not in str(answer)


def test_retries_shows_the_next_first(conn: Connection) -> None:
    later = enqueue(conn, run_at="2035-01-01")
    retried = claim_one_of(conn)
    answer = api(conn, "tasks", status="scheduled")
    assert ids(answer) == [retried, later]
    assert answer["tasks"][0]["due_in"] == pytest.approx(3600, abs=60)
    assert answer["tasks"][0]["last_error"] == "no" and answer["tasks"][0]["attempts"] == 1
    assert ids(api(conn, "tasks", status="scheduled", limit="1")) == [retried]


def test_failures_shows_failed_attempts_newest_first_with_the_error(conn: Connection) -> None:
    a, b = enqueue(conn), enqueue(conn)
    for _ in range(2):
        claim_id, id = claim_one(conn)
        fail(conn, claim_id, id, "first " + id, after="1 hour")
    cancel(conn, enqueue(conn))
    answer = api(conn, "failures")
    assert [(f["task_id"], f["error"], f["attempt"], f["type"], f["status"], f["worker_id"]) for f in answer["failures"]] == [
        (b, "first " + b, 1, "t", "retry_scheduled", "w"), (a, "first " + a, 1, "t", "retry_scheduled", "w")]
    assert [f["task_id"] for f in api(conn, "failures", limit="1")["failures"]] == [b]
    assert api(conn, "failures", type="u")["failures"] == [] and len(api(conn, "failures", type="t")["failures"]) == 2


def test_dead_letters_are_paged_and_filtered_by_type(conn: Connection) -> None:
    newest, others = dead(conn, 5), dead(conn, 1, "u")
    assert pages(conn, "tasks", status="dead_letter", limit="2", type="t") == [newest[:2], newest[2:4], newest[4:]]
    assert ids(api(conn, "tasks", status="dead_letter", type="u")) == others
    assert api(conn, "tasks", status="dead_letter", type="u")["tasks"][0]["last_error"] == "broken " + others[0]


def test_task_tells_the_whole_story_with_secrets_blanked(conn: Connection) -> None:
    enqueue(conn, payload={"to": "x", "password": "canary"})
    claim_id, id = claim_one(conn)
    fail(conn, claim_id, id, "no such host", after="1 hour")
    story = api(conn, "task", id=id)
    assert [e["event"] for e in story["events"]] == ["failed", "retry_scheduled"]
    assert story["payload"] == {"to": "x", "password": "[redacted]"} and story["explanation"]
    assert "canary" not in str(story)


def test_an_unknown_id_is_null(conn: Connection) -> None:
    assert api(conn, "task", id=UNKNOWN) is None


# --------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(("name", "parameters", "field"), [
    ("tasks", {"id": "xyz"}, "id"), ("tasks", {"id": "0" * 33}, "id"), ("tasks", {"id": "1%"}, "id"),
    ("tasks", {"status": "failed"}, "status"), ("tasks", {"status": "'; drop"}, "status"),
    ("tasks", {"limit": "0"}, "limit"), ("tasks", {"limit": "201"}, "limit"), ("tasks", {"limit": "-1"}, "limit"),
    ("tasks", {"before": "yesterday"}, "before"), ("tasks", {"before": "ready+5"}, "before"), ("tasks", {"before": "+5"}, "before"),
    ("tasks", {"status": "ready", "before": UNKNOWN}, "before"), ("tasks", {"status": "ready", "before": "ready+999999"}, "before"),
    ("tasks", {"status": "ready", "before": "scheduled+1"}, "before"), ("tasks", {"id": "01", "type": "t", "before": "ready+1"}, "before"),
    ("tasks", {"filter": '{"colour": "blue"}'}, "filter"), ("tasks", {"filter": '{"error": ""}'}, "error"),
    ("failures", {"limit": "201"}, "limit"), ("operations", {"limit": "0"}, "limit"),
    ("history", {"minutes": "0"}, "minutes"), ("history", {"minutes": "121"}, "minutes")])
def test_a_bad_value_is_named(conn: Connection, name: str, parameters: dict[str, str], field: str) -> None:
    assert refused(conn, name, **parameters) == ("OR001", field)


@pytest.mark.parametrize(("name", "parameters", "said"), [
    ("tasks", {"limit": "1e3"}, 'type integer: "1e3"'),
    ("tasks", {"limit": "99999999999999999999"}, '"99999999999999999999" is out of range'),
    ("history", {"minutes": "soon"}, 'type integer: "soon"'), ("task", {"id": ""}, 'type uuid: ""'),
    ("task", {"id": UNKNOWN[:-1]}, "type uuid")])
def test_a_value_of_the_wrong_type_is_refused_by_the_database(
        conn: Connection, name: str, parameters: dict[str, str], said: str) -> None:
    state, message = refused(conn, name, **parameters)
    assert state.startswith("22") and said in message


@pytest.mark.parametrize("name", GET)
def test_a_parameter_that_is_not_known_is_refused(conn: Connection, name: str) -> None:
    known = {"id": UNKNOWN} if name == "task" else {}
    state, message = refused(conn, name, **known, limt="5")
    assert state == "42883" and "p_limt =>" in message


def test_what_reads_cannot_write(conn: Connection) -> None:
    id = enqueue(conn)
    with conn.transaction():
        conn.execute("set transaction read only")
        for name in GET:
            assert api(conn, name, **({"id": id} if name == "task" else {})) is not None, name
