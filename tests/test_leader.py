"""sql/60_leader.sql: one leader at most, terms that rise, nothing done under a stale term, retention."""
from __future__ import annotations

import psycopg
import pytest

from postgres import wait_for_lock
from steps import (
    audit,
    backend,
    background,
    cancel,
    claim,
    claim_one,
    column,
    complete,
    declare_dead,
    enqueue,
    enqueue_some,
    fail,
    lead,
    register,
    retry,
    row,
    rows,
    start,
    status,
    task,
    value,
)


@pytest.fixture
def conn(conn):
    yield conn
    assert audit(conn) == []


def acquire(conn, worker, length="1 hour"):
    found = row(conn, "select *, until > clock_timestamp() as future from orchestrator.acquire_leadership(%s, %s)", worker, length)
    return found["term"] if found["is_leader"] else None


def expire(conn):
    conn.execute("update orchestrator.workers set leader_until = clock_timestamp() where is_leader")


def leaders(conn):
    return column(conn, "select id from orchestrator.workers where is_leader")


@pytest.fixture
def pair(conn):
    return register(conn, "a", ()), register(conn, "b", ())


def test_the_first_to_ask_leads_and_the_others_do_not(conn, pair):
    found = row(conn, "select *, until - clock_timestamp() <= interval '60 s' as bounded from orchestrator.acquire_leadership('a', '60 s')")
    assert found["is_leader"] and found["term"] > 0 and found["bounded"]
    assert acquire(conn, "b") is None and leaders(conn) == ["a"]


def test_the_leader_extends_its_lease_in_the_same_term(conn, pair):
    term = acquire(conn, "a", "1 minute")
    before = value(conn, "select leader_until from orchestrator.workers where id = 'a'")
    assert acquire(conn, "a", "2 minutes") == term
    assert value(conn, "select leader_until from orchestrator.workers where id = 'a'") > before


def test_a_lease_that_ran_out_passes_to_whoever_asks_in_a_higher_term(conn, pair):
    first = acquire(conn, "a")
    expire(conn)
    second = acquire(conn, "b")
    assert second > first and leaders(conn) == ["b"]
    assert acquire(conn, "a") is None


def test_a_leader_whose_lease_ran_out_needs_a_new_term(conn, pair):
    first = acquire(conn, "a")
    expire(conn)
    assert acquire(conn, "a") > first


def test_resigning_lets_the_next_lead_at_once(conn, pair):
    first = acquire(conn, "a")
    assert value(conn, "select orchestrator.resign_leadership('a', %s)", first + 1) is False
    assert leaders(conn) == ["a"]
    assert value(conn, "select orchestrator.resign_leadership('a', %s)", first) is True
    assert value(conn, "select orchestrator.resign_leadership('a', %s)", first) is False
    assert acquire(conn, "b") > first


@pytest.mark.parametrize("state", ["unknown", "declared dead"])
def test_who_is_unknown_or_declared_dead_cannot_lead(conn, pair, state):
    if state == "declared dead":
        declare_dead(conn, "a")
    assert acquire(conn, "a" if state == "declared dead" else "nobody") is None
    assert leaders(conn) == []


def test_a_leader_that_is_declared_dead_no_longer_leads(conn, pair):
    acquire(conn, "a")
    conn.execute("update orchestrator.workers set is_leader = false, declared_dead_at = now() where id = 'a'")
    assert acquire(conn, "a") is None and acquire(conn, "b")


def test_unregistering_gives_up_the_lead_also_with_claims_open(conn):
    register(conn, "a")
    register(conn, "b")
    enqueue(conn)
    claim_one(conn, "a")
    acquire(conn, "a")
    assert value(conn, "select orchestrator.unregister_worker('a')") is False
    assert acquire(conn, "b")


def test_two_leaders_are_impossible(conn, pair):
    acquire(conn, "a")
    with pytest.raises(psycopg.errors.UniqueViolation):
        conn.execute("update orchestrator.workers set is_leader = true, leader_term = 99, leader_until = now() where id = 'b'")


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_of_two_that_ask_at_once_one_leads(conn, connect, pair, end):
    one, other = connect(autocommit=False), connect()
    assert acquire(one, "a")
    late = background(lambda: acquire(other, "b"))
    wait_for_lock(conn, backend(other))
    getattr(one, end)()
    assert (late.result(10) is None) == (end == "commit")
    assert leaders(conn) == (["a"] if end == "commit" else ["b"])


def test_nobody_is_elected_while_a_maintenance_call_is_in_its_transaction(conn, connect, pair):
    """Its lease may run out meanwhile: it holds its row, and the next election sees a leader still."""
    term = acquire(conn, "a")
    maintaining = connect(autocommit=False)
    assert value(maintaining, "select orchestrator.declare_dead('a', %s, '{}', '{}')", term) == 0
    assert column(conn, "select id from orchestrator.workers where is_leader for no key update skip locked") == []
    maintaining.execute("update orchestrator.workers set leader_until = clock_timestamp() where id = 'a'")
    assert acquire(conn, "b") is None
    maintaining.commit()
    assert acquire(conn, "b") > term


def test_a_lease_begins_when_the_lock_was_got_not_when_it_was_asked_for(conn, connect, pair):
    acquire(conn, "a")
    holder, waiter = connect(autocommit=False), connect(autocommit=False)
    waiter.execute("select 1")  # its transaction begins here
    holder.execute("select from orchestrator.workers where id = 'a' for update")
    late = background(lambda: acquire(waiter, "a", "1 second"))
    wait_for_lock(conn, backend(waiter))
    after = value(conn, "select clock_timestamp()")
    holder.rollback()
    late.result(10)
    waiter.commit()
    assert value(conn, "select leader_until - interval '1 second' from orchestrator.workers where id = 'a'") >= after


# What a maintenance function is called with, apart from (worker, term) and defaults.
SAMPLES = {"p_ids": "array['silent']", "p_seen": "(select array_agg(last_heartbeat) from orchestrator.workers where id = 'silent')",
           "interval": "'1 microsecond'", "integer": "1000", "bigint": "1000", "text": "'x'", "jsonb": "'{}'"}


def maintenance_functions(conn):
    """From the catalog: every function that takes a term, as a call with %s for worker and term."""
    query = """
      select p.proname as name, array_agg(a.name order by a.o) as names, array_agg(format_type(a.type, null) order by a.o) as types,
             p.pronargs - p.pronargdefaults as needed
      from pg_proc p
      cross join lateral unnest(p.proargnames[:p.pronargs], p.proargtypes::oid[]) with ordinality a(name, type, o)
      where p.pronamespace = 'orchestrator'::regnamespace and 'p_term' = any (p.proargnames)
        and p.proname not in ('_leads', 'resign_leadership')
      group by p.oid, p.proname, p.pronargs, p.pronargdefaults order by 1"""
    calls = {}
    for found in rows(conn, query):
        given = ["p_worker_id => %s", "p_term => %s"]
        given += [f"{name} => {SAMPLES.get(name) or SAMPLES[type]}" for name, type in zip(found["names"], found["types"], strict=True)
                  if (name not in ("p_worker_id", "p_term") and type == "interval") or
                  (name not in ("p_worker_id", "p_term") and found["names"].index(name) < found["needed"])]
        calls[found["name"]] = f"select * from orchestrator.{found['name']}({', '.join(given)})"
    return calls


def contents(conn):
    """All that a maintenance function could change."""
    tables = column(conn, "select relname from pg_class where relnamespace = 'orchestrator'::regnamespace and relkind = 'r'")
    return {table: sorted(str(found) for found in conn.execute(f"select t::text from orchestrator.{table} t")) for table in tables}


def plenty_to_do(conn):
    """Something for every maintenance function: the dead, their claims, ended tasks, a floor that may rise, one that is too high."""
    register(conn, "dead", ["t", "u", "gone", "hidden"])
    enqueue(conn, "gone")
    [gone] = claim(conn, "dead", ["gone"])
    complete(conn, gone["claim_id"], gone["id"])
    enqueue_some(conn, 4)
    one, two, three, _four = claim(conn, "dead", ["t"])
    start(conn, one["claim_id"], three["id"])
    complete(conn, one["claim_id"], one["id"])
    fail(conn, two["claim_id"], two["id"], permanent=True)
    enqueue(conn, "hidden")
    conn.execute("insert into orchestrator.lane_floors "
                 "values ('hidden', 0, 1, clock_timestamp() + interval '1 hour'), ('v', 0, 1, '-infinity')")
    conn.execute("insert into orchestrator.lanes values ('gone', 0)")
    register(conn, "silent", ["u"])
    declare_dead(conn, "dead")
    conn.execute("update orchestrator.tasks set id = (overlay(id::text placing '00000000' from 1))::uuid where status = 'completed'")
    conn.execute("update orchestrator.workers set last_heartbeat = now() - interval '1 hour' where id = 'silent'")


KNOWN = {"raise_floors", "rescan_lanes", "declare_dead", "recover_orphans", "prune"}


@pytest.mark.parametrize("stale", ["an older term", "another worker", "a lease that ran out", "resigned", "no term"])
def test_every_maintenance_function_does_nothing_under_a_stale_term(conn, stale):
    term = lead(conn)
    register(conn, "other", ())
    worker, named = "leader", term
    if stale == "an older term":
        expire(conn)
        assert acquire(conn, "leader") > term
    elif stale == "another worker":
        worker = "other"
    elif stale == "a lease that ran out":
        expire(conn)
    elif stale == "resigned":
        conn.execute("select orchestrator.resign_leadership('leader', %s)", [term])
    else:
        named = None
    plenty_to_do(conn)
    calls = maintenance_functions(conn)
    assert calls.keys() >= KNOWN
    before = contents(conn)
    for name, call in calls.items():
        assert set(conn.execute(call, [worker, named]).fetchone()) == {None}, name
        assert contents(conn) == before, name
    conn.execute("delete from orchestrator.lane_floors where type = 'hidden'")  # for the audit at the end


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_every_maintenance_function_does_its_work_under_the_right_term(conn, name):
    """What makes the test above worth something."""
    term = lead(conn)
    plenty_to_do(conn)
    before = contents(conn)
    assert None not in conn.execute(maintenance_functions(conn)[name], ["leader", term]).fetchone()
    assert contents(conn) != before
    conn.execute("delete from orchestrator.lane_floors where type = 'hidden'")


def prune(conn, term, completed="7 days", dead="30 days", limit=1000):
    found = row(conn, "select * from orchestrator.prune('leader', %s, %s, %s, %s)", term, completed, dead, limit)
    return found["completed"], found["dead_letters"]


def aged(conn, id, days):
    """As if it had been enqueued and had ended that many days ago: its id is its age too. Returns the new id."""
    query = """
      with old as (
        update orchestrator.tasks set id = (left(orchestrator._uuid_at(now() - %(age)s::interval)::text, 13) || right(id::text, 23))::uuid,
          created_at = now() - %(age)s::interval, completed_at = completed_at - %(age)s::interval,
          dead_at = dead_at - %(age)s::interval
        where id = %(id)s returning id)
      update orchestrator.task_events e set task_id = old.id from old where e.task_id = %(id)s"""
    conn.execute(query, {"age": f"{days} days", "id": id})
    return value(conn, "select id::text from orchestrator.tasks where right(id::text, 23) = right(%s, 23)", id)


def ended(conn, how, days):
    id = enqueue(conn)
    if how == "cancelled":
        cancel(conn, id)
    else:
        claim_id, _ = claim_one(conn)
        if how == "completed":
            complete(conn, claim_id, id)
        else:
            fail(conn, claim_id, id, permanent=True)
    return aged(conn, id, days)


@pytest.fixture
def term(conn):
    register(conn)
    return lead(conn)


def test_prune_deletes_what_ended_long_ago_with_its_events(conn, term):
    kept = [ended(conn, "completed", 6), ended(conn, "cancelled", 6), ended(conn, "dead_letter", 29)]
    for how in ("completed", "completed", "cancelled"):
        ended(conn, how, 8)
    ended(conn, "dead_letter", 31)
    waiting = aged(conn, enqueue(conn), 400)
    assert prune(conn, term) == (3, 1)
    assert set(column(conn, "select id::text from orchestrator.tasks")) == {*kept, waiting}
    assert set(column(conn, "select task_id::text from orchestrator.task_events")) == set(kept[1:])
    assert prune(conn, term) == (0, 0)


def test_prune_goes_by_when_a_task_ended_not_by_when_it_was_enqueued(conn, term):
    id = ended(conn, "completed", 100)
    conn.execute("update orchestrator.tasks set completed_at = now()")
    assert prune(conn, term) == (0, 0) and status(conn, id) == "completed"


@pytest.mark.parametrize("forever", ["0", "-1 day", None])
def test_prune_of_nothing_keeps_for_ever(conn, term, forever):
    ended(conn, "completed", 1000)
    ended(conn, "dead_letter", 1000)
    assert prune(conn, term, forever, forever) == (0, 0)
    assert prune(conn, term, "7 days", forever) == (1, 0)
    assert prune(conn, term, forever, "30 days") == (0, 1)


def test_prune_looks_at_a_few_tasks_a_call_and_goes_on_from_there(conn, term):
    for n in range(5):
        ended(conn, "completed", 10 + n)
    waiting = aged(conn, enqueue(conn, "other"), 100)  # the oldest stays, and is passed over
    assert [prune(conn, term, limit=2) for _ in range(4)] == [(1, 0), (2, 0), (2, 0), (0, 0)]
    late = ended(conn, "completed", 50)  # behind the cursor: found in the next round
    assert (prune(conn, term, limit=2), prune(conn, term, limit=2)) == ((1, 0), (0, 0))
    assert column(conn, "select id::text from orchestrator.tasks") == [waiting] and late


def test_prune_is_bounded_for_dead_letters_too(conn, term):
    for n in range(3):
        ended(conn, "dead_letter", 100 + n)
    assert [prune(conn, term, limit=2)[1] for _ in range(3)] == [2, 1, 0]


def test_prune_leaves_a_dead_letter_that_is_being_retried(conn, connect, term):
    id = ended(conn, "dead_letter", 100)
    operator = connect(autocommit=False)
    assert retry(operator, id) == "pending"
    conn.execute("set lock_timeout = '1s'")
    assert prune(conn, term) == (0, 0)
    operator.commit()
    assert task(conn, id)["status"] == "pending"


def test_prune_that_waited_for_a_retry_keeps_the_task_and_its_story(conn, connect, term):
    id = ended(conn, "cancelled", 100)
    operator, leader = connect(autocommit=False), connect()
    assert retry(operator, id) == "pending"
    late = background(lambda: prune(leader, term))
    wait_for_lock(conn, backend(leader))
    operator.commit()
    assert late.result(10) == (0, 0)
    assert status(conn, id) == "pending" and value(conn, "select count(*) from orchestrator.task_events") == 2


@pytest.mark.parametrize("alive", [True, False])
def test_a_lease_from_before_the_clock_was_set_back_does_not_keep_others_from_leading(conn, pair, alive):
    """As if the leader had written its lease an hour ahead. It may extend it; if it is dead, one length is waited for."""
    term = acquire(conn, "a", "10 s")
    conn.execute("update orchestrator.workers set leader_until = clock_timestamp() + interval '1 hour' where id = 'a'")
    assert acquire(conn, "b", "10 s") is None
    assert value(conn, "select leader_until <= clock_timestamp() + interval '10 s' from orchestrator.workers where id = 'a'")
    if alive:
        assert acquire(conn, "a", "10 s") == term and acquire(conn, "b", "10 s") is None
    else:
        expire(conn)
        assert acquire(conn, "b", "10 s") > term


def more(conn, term, completed="7 days", limit=2):
    return value(conn, "select more from orchestrator.prune('leader', %s, %s, '30 days', %s)", term, completed, limit)


def test_prune_says_whether_it_should_be_called_again(conn, term):
    """Also where it deleted nothing of what it looked at: what may be deleted is behind that."""
    kept = [ended(conn, "dead_letter", 20) for _ in range(4)]
    gone = ended(conn, "completed", 9)
    assert [more(conn, term) for _ in range(3)] == [True, True, False]
    assert set(column(conn, "select id::text from orchestrator.tasks")) == set(kept) and gone
    for n in range(4):
        ended(conn, "dead_letter", 100 + n)
    assert [more(conn, term, "0") for _ in range(3)] == [True, True, False]
