"""A program looks at many tasks and acts on them: app.list, app.bulk, app.stats, app.pause and app.resume."""
from __future__ import annotations

import pytest

from apps import make_app
from steps import claim_one, column, enqueue_some, fail, register, value


def test_a_program_lists_tasks_by_a_filter(installed, conn):
    app = make_app(installed)
    ids = enqueue_some(conn, 450)
    other = app.enqueue("u", {"user": 1, "password": "x"}, priority=5, concurrency_key="a")
    assert [task["id"] for task in app.list({"type": "t", "status": "ready"}, limit=3)] == ids[:3]
    assert len(app.list(limit=1000)) == 451 and len(app.list()) == 50
    [found] = app.list({"concurrency_key": "a", "payload": {"user": 1}})
    assert found["id"] == other and found["priority"] == 5 and "x" not in found["payload"]
    assert app.list({"ids": [other]}) == [found] and app.list({"type": "none"}) == []
    for given, limit, problem in (({"colour": 1}, 5, "filter: "), ({"status": "lost"}, 5, "status: "), ({}, 0, "limit: ")):
        with pytest.raises(ValueError, match=problem):
            app.list(given, limit)
    app.close()


def test_a_program_acts_on_many_tasks_after_it_has_seen_how_many(installed, conn):
    app = make_app(installed)
    enqueue_some(conn, 2500)
    enqueue_some(conn, 5, "u")
    shown = app.bulk("cancel", {"type": "t"})
    assert (shown["matched"], shown["done"], shown["operation"], len(shown["sample"])) == (2500, 0, None, 5)
    assert value(conn, "select count(*) from orchestrator.tasks where status = 'cancelled'") == 0
    done = app.bulk("cancel", {"type": "t"}, dry_run=False)
    assert (done["matched"], done["done"], done["skipped"]) == (2500, 2500, 0)   # in three calls of one operation
    assert column(conn, "select id from orchestrator.operations") == [done["operation"]]
    assert value(conn, "select count(*) from orchestrator.tasks where status = 'cancelled'") == 2500
    assert app.bulk("prioritize", {"type": "u"}, value=7, dry_run=False)["done"] == 5
    assert column(conn, "select distinct priority from orchestrator.tasks where type = 'u'") == [7]
    for action, given, problem in (("explode", {"type": "t"}, "action: "), ("cancel", {}, "filter: "),
                                   ("prioritize", {"type": "t"}, "value: "), ("cancel", {"priority": "high"}, "high"),
                                   ("cancel", {"created_after": "soon"}, "soon"), ("\0", {"type": "t"}, "NUL")):
        with pytest.raises(ValueError, match=problem):
            app.bulk(action, given, dry_run=False)
    for value_ in (object(), float("nan"), "\0"):
        with pytest.raises(ValueError, match="^value: "):
            app.bulk("prioritize", {"type": "t"}, value=value_)
    with pytest.raises(ValueError, match="filter: must be an object"):
        app.list("t")
    app.close()


def test_a_program_retries_dead_letters(installed, conn):
    app = make_app(installed)
    register(conn)
    enqueue_some(conn, 1)
    fail(conn, *claim_one(conn), permanent=True)
    assert app.bulk("retry", {"status": "dead_letter"}, dry_run=False)["done"] == 1
    app.close()


def test_a_program_pauses_resumes_and_counts(installed, conn):
    app = make_app(installed)
    enqueue_some(conn, 3)
    assert (app.pause("t"), app.pause("t")) == (True, False)
    [counts] = app.stats()
    assert (counts["type"], counts["waiting"], counts["paused"]) == ("t", 3, True)
    assert (app.resume("t"), app.resume("t")) == (True, False)
    for call in (app.pause, app.resume):
        with pytest.raises(ValueError, match="type: "):
            call("a*b")
    app.close()
