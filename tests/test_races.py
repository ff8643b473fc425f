"""Every pair of operations on the same task, by two connections, in both orders, forced to meet.

The first is done but not committed when the second begins. Whether the second then waits is seen in pg_stat_activity. The
end must be that of doing one after the other, which is found out beforehand in transactions that are rolled back.
"""
from __future__ import annotations

import time
from typing import Any

import psycopg
import pytest

from steps import (
    audit,
    backend,
    background,
    cancel,
    claim,
    claim_one,
    complete,
    declare_dead,
    enqueue,
    fail,
    lead,
    recover,
    register,
    release,
    retry,
    row,
    snooze,
    start,
    value,
)
from transitions import check_transitions, record_transitions

OPERATIONS = {
    "complete": lambda conn, claim_id, id, term: complete(conn, claim_id, id),
    "fail": lambda conn, claim_id, id, term: fail(conn, claim_id, id),
    "release": lambda conn, claim_id, id, term: release(conn, claim_id),
    "snooze": lambda conn, claim_id, id, term: snooze(conn, claim_id, id),
    "cancel": lambda conn, claim_id, id, term: cancel(conn, id),
    "recover": lambda conn, claim_id, id, term: recover(conn, term),
    "retry": lambda conn, claim_id, id, term: retry(conn, id),
    "claim": lambda conn, claim_id, id, term: sorted(t["id"] == id for t in claim(conn, "v")),
    "replace": lambda conn, claim_id, id, term: value(
        conn, "select action from orchestrator.replace_task('t', 'k', '[1]', p_mode => 'append')"),
}
# Who locks the task (or the claim before it), by the state that it is in. Only claim skips what is locked.
LOCKING = {
    "running": {"complete", "fail", "release", "snooze", "cancel", "recover", "retry", "replace"},
    "claimed": {"complete", "fail", "release", "snooze", "cancel", "recover", "retry", "replace"},
    "pending": {"cancel", "retry", "claim", "replace"},
    "dead_letter": {"cancel", "retry", "replace"},
}


@pytest.fixture(scope="module")
def connections(server, template):
    """(watcher, first, second) on a database with a leader and a recorder of transitions; and the leader's term."""
    url = server.create_database(template=template.rsplit("/", 1)[1])
    with (psycopg.connect(url, autocommit=True) as watcher, psycopg.connect(url) as first, psycopg.connect(url) as second):
        record_transitions(watcher)
        term = lead(watcher)
        for conn in (first, second):
            conn.execute("set statement_timeout = '20s'")
            conn.commit()
        yield watcher, first, second, term
    server.drop_database(url)


def prepare(conn: Any, state: str) -> tuple[int, str]:
    """A task in this state, whose worker was declared dead but may still answer; and its claim, or the last that it had."""
    conn.execute("delete from orchestrator.tasks; delete from orchestrator.claims; delete from orchestrator.task_events; "
                 "delete from orchestrator.workers where not is_leader; delete from public.transitions")
    register(conn, "w")
    register(conn, "v")
    enqueue(conn, payload=[0], idempotency_key="k")
    claim_id, id = claim_one(conn)
    if state == "running":
        start(conn, claim_id, id)
    elif state == "pending":
        release(conn, claim_id)
    elif state == "dead_letter":
        fail(conn, claim_id, id, permanent=True)
    declare_dead(conn, "w")
    return claim_id, id


def ends(conn: Any, id: str) -> Any:
    return tuple(row(conn, "select status, attempts, recoveries, worker_id, cancel_requested_at is not null as asked, "
                           "result, payload, idempotency_key from orchestrator.tasks where id = %s", id).values())


def in_turn(conn: Any, names: list[str], *of_task: Any) -> tuple[dict[str, Any], Any]:
    """What the operations return one after the other, and how the task ends; undone."""
    answers = {f"{name} {n}": OPERATIONS[name](conn, *of_task) for n, name in enumerate(names)}
    end = ends(conn, of_task[1])
    conn.rollback()
    return answers, end


def meet(watcher: Any, second: Any, call: Any) -> tuple[bool, Any]:
    """Begin the second operation; True if it came to wait for a lock, and its future."""
    late = background(call)
    query = "select wait_event_type = 'Lock' from pg_stat_activity where pid = %s"
    deadline = time.monotonic() + 15
    while not late.done():
        if value(watcher, query, backend(second)):
            return True, late
        assert time.monotonic() < deadline, "it neither ended nor waited"
    return False, late


@pytest.mark.parametrize("second_name", OPERATIONS)
@pytest.mark.parametrize("first_name", OPERATIONS)
def test_two_operations_on_one_task_end_as_if_one_came_after_the_other(connections, first_name, second_name):
    watcher, first, second, term = connections
    for state, locking in LOCKING.items():
        for end in ("commit", "rollback"):
            claim_id, id = prepare(watcher, state)
            of_task = (claim_id, id, term)
            untouched = ends(watcher, id)
            alone = in_turn(second, [second_name], *of_task)
            first_alone = in_turn(second, [first_name], *of_task)
            one_way = in_turn(second, [first_name, second_name], *of_task)
            other_way = in_turn(second, [second_name, first_name], *of_task)

            answer = OPERATIONS[first_name](first, *of_task)
            waited, late = meet(watcher, second, lambda given=of_task: OPERATIONS[second_name](second, *given))
            getattr(first, end)()
            late_answer = late.result(15)
            second.commit()

            where = f"{first_name} ({end}), then {second_name} of a {state} task"
            both_lock = first_name in locking and second_name in locking - {"claim"}
            assert waited == (both_lock or first_name == second_name == "recover"), where  # two recoveries: the leader's row
            got = (answer, late_answer, ends(watcher, id))
            if end == "rollback":
                legal = [(answer, alone[0][f"{second_name} 0"], alone[1])]
            else:
                legal = [(one_way[0][f"{first_name} 0"], one_way[0][f"{second_name} 1"], one_way[1])]
                if not waited:
                    legal.append((other_way[0][f"{first_name} 1"], other_way[0][f"{second_name} 0"], other_way[1]))
            if second_name == "claim":  # it passes over a task that is locked, even by one that then changes nothing
                legal.append((answer, [], first_alone[1] if end == "commit" else untouched))
            assert got in legal, where
            check_transitions(watcher)
            assert audit(watcher) == [], where



def until_waiting(watcher: Any, conn: Any, call: Any) -> Any:
    waits, future = meet(watcher, conn, call)
    assert waits
    return future


LOCKERS = ["complete", "fail", "release", "snooze", "start", "recover"]


@pytest.mark.parametrize(("first_name", "second_name"), [(a, b) for a in LOCKERS for b in LOCKERS if (a, b) != ("recover", "recover")])
def test_a_claim_is_locked_before_its_task_so_that_two_never_wait_for_each_other(connections, first_name, second_name):
    """A third holds the task. The first waits for it with the claim in hand, the second for the claim."""
    watcher, first, second, term = connections
    operations = {**OPERATIONS, "start": lambda conn, claim_id, id, term: start(conn, claim_id, id)}
    of_task = (*prepare(watcher, "claimed"), term)
    with psycopg.connect(watcher.info.dsn) as holder:
        holder.execute("select from orchestrator.tasks where id = %s for update", [of_task[1]])
        one = until_waiting(watcher, first, lambda: operations[first_name](first, *of_task))
        other = until_waiting(watcher, second, lambda: operations[second_name](second, *of_task))
        holder.rollback()
        one.result(15)
        first.commit()
        other.result(15)
        second.commit()
    assert audit(watcher) == []
    check_transitions(watcher)


SEVERAL = {
    "complete": "select * from orchestrator.complete_tasks(%(claims)s, '{1,1}', %(ids)s::uuid[])",
    "fail": "select * from orchestrator.fail_tasks(%(claims)s, %(ids)s::uuid[], '{e,e}', null, '{null,null}', '{f,f}')",
    "recover": "select * from orchestrator.recover_orphans('leader', %(term)s)",
}


@pytest.mark.parametrize(("first_name", "second_name"), [(a, b) for a in SEVERAL for b in SEVERAL if (a, b) != ("recover", "recover")])
def test_claims_are_locked_in_the_order_of_their_ids(connections, first_name, second_name):
    """A third holds the later claim. The first waits for it with the earlier one in hand, the second for the earlier one."""
    watcher, first, second, term = connections
    early, id = prepare(watcher, "running")
    register(watcher, "x")
    enqueue(watcher)
    late, late_id = claim_one(watcher, "x")
    declare_dead(watcher, "x")
    given = {"claims": [late, early], "ids": [late_id, id], "term": term}
    with psycopg.connect(watcher.info.dsn) as holder:
        holder.execute("select from orchestrator.claims where id = %s for update", [late])
        one = until_waiting(watcher, first, lambda: first.execute(SEVERAL[first_name], given))
        other = until_waiting(watcher, second, lambda: second.execute(SEVERAL[second_name], given))
        holder.rollback()
        one.result(15)
        first.commit()
        other.result(15)
        second.commit()
    assert audit(watcher) == []
    check_transitions(watcher)


# What may meet at a child: the first is done but not committed when the second begins. parent and other are in flight, and the child
# waits for both; gone is a dead letter that it waits for, too, where retention takes part.
AT_A_CHILD = {
    "complete": lambda conn, at: complete(conn, at["claim"], at["parent"]),
    "complete the other": lambda conn, at: complete(conn, at["other_claim"], at["other"]),
    "fail for good": lambda conn, at: fail(conn, at["claim"], at["parent"], permanent=True),
    "cancel the child": lambda conn, at: cancel(conn, at["child"]),
    "cancel another parent": lambda conn, at: cancel(conn, at["waiting"]),
    "prune": lambda conn, at: row(conn, "select * from orchestrator.prune('leader', %s, '0', '1 hour')", at["term"]),
    "retry": lambda conn, at: retry(conn, at["gone"]),
    "promote": lambda conn, at: conn.execute("select orchestrator.promote_due()"),
}


def at_a_child(conn: Any, term: int, mode: str) -> dict[str, Any]:
    conn.execute("delete from orchestrator.task_waits; delete from orchestrator.expiries")
    _, gone = prepare(conn, "dead_letter")
    conn.execute("update orchestrator.tasks set dead_at = now() - interval '1 day'")
    parent, other = enqueue(conn), enqueue(conn)
    [first], [second] = claim(conn, "v", limit=1), claim(conn, "v", limit=1)
    waiting = enqueue(conn, "later")
    child = enqueue(conn, "child", after=[parent, other] if mode == "two" else [parent, other, gone, waiting], on_failure="wait")
    enqueue(conn, "grandchild", after=[child], on_failure="run")
    return {"term": term, "gone": gone, "claim": first["claim_id"], "parent": parent, "other_claim": second["claim_id"], "other": other,
            "waiting": waiting, "child": child}


def end_of(conn: Any) -> list[Any]:
    conn.execute("update orchestrator.tasks set next_retry_at = clock_timestamp() where blocked_until is not null")
    conn.execute("select orchestrator.promote_due()")   # what was skipped is looked at later
    return conn.execute("""select type, status::text, queued_at is not null, blocked_until is not null, dead_at is not null
                           from orchestrator.tasks order by id""").fetchall() + conn.execute("""
                           select p.type, c.type from orchestrator.task_waits w left join orchestrator.tasks p on p.id = w.parent
                           join orchestrator.tasks c on c.id = w.child order by 1, 2""").fetchall()


@pytest.mark.parametrize(("first_name", "second_name"), [(a, b) for a in AT_A_CHILD for b in AT_A_CHILD if a != b])
def test_two_that_meet_at_a_child_end_as_if_one_came_after_the_other(connections, first_name, second_name):
    watcher, first, second, term = connections
    mode = "four" if {first_name, second_name} & {"cancel another parent", "prune", "retry"} else "two"
    ends = []
    for names in ((first_name, second_name), (second_name, first_name)):
        at = at_a_child(watcher, term, mode)
        for name in names:
            AT_A_CHILD[name](watcher, at)
        ends.append(end_of(watcher))
    at = at_a_child(watcher, term, mode)
    AT_A_CHILD[first_name](first, at)
    _, later = meet(watcher, second, lambda: AT_A_CHILD[second_name](second, at))
    first.commit()
    later.result(15)
    second.commit()
    assert end_of(watcher) in ends
    assert audit(watcher) == []
    check_transitions(watcher)
