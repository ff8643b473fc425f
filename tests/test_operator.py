"""A program looks at many tasks and acts on them: app.list, app.bulk, app.stats, app.pause and app.resume."""
from __future__ import annotations

import pytest

from apps import make_app
from steps import enqueue_some


def test_a_program_lists_tasks_by_a_filter(installed, conn):
    app = make_app(installed)
    ids = enqueue_some(conn, 450)
    other = app.enqueue("u", {"user": 1, "password": "x"}, priority=5, concurrency_key="a")
    assert [task["id"] for task in app.list({"type": "t", "status": "ready"}, limit=3)] == ids[:3]
    assert len(app.list(limit=1000)) == 451 and len(app.list()) == 50
    [found] = app.list({"type": "u"})
    assert found["id"] == other and found["priority"] == 5 and "x" not in found["payload"]
    assert app.list({"type": "none"}) == []
    for given, limit, problem in (({"status": "lost"}, 5, "status: "), ({}, 0, "limit: ")):
        with pytest.raises(ValueError, match=problem):
            app.list(given, limit)
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
