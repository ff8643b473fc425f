"""Records each change of a task's status, in the tests only, and checks that the state machine has it."""
from __future__ import annotations

from steps import Connection, column, rows

LEGAL = {
    "pending": {"claimed", "cancelled", "pending"},  # pending → pending: its time has come
    "claimed": {"running", "completed", "retry_scheduled", "dead_letter", "cancelled", "pending"},
    "running": {"completed", "retry_scheduled", "dead_letter", "cancelled", "pending"},
    "retry_scheduled": {"pending", "cancelled"},
    "dead_letter": {"pending"},
    "cancelled": {"pending"},
    "completed": set(),
}

RECORDER = """
  create table public.transitions (
    n bigint generated always as identity, task_id uuid, old text, new text, old_claim bigint, new_claim bigint);
  create function public.record_transition() returns trigger language plpgsql as $$
  begin
    insert into public.transitions (task_id, old, new, old_claim, new_claim)
    values (new.id, old.status, new.status, old.claim_id, new.claim_id);
    return null;
  end $$;
  create trigger record_transition after update on orchestrator.tasks for each row
    when (old.status <> new.status or old.claim_id is distinct from new.claim_id) execute function public.record_transition();
"""
EXITS = """
  select task_id, old_claim, array_agg(new order by n) from public.transitions
  where old in ('claimed', 'running') and new not in ('claimed', 'running') group by 1, 2 having count(*) > 1
"""


def record_transitions(conn: Connection) -> None:
    conn.execute(RECORDER)


def check_transitions(conn: Connection) -> None:
    """Each one legal, each (task, claim) left once, and no task in flight moved from claim to claim."""
    for found in rows(conn, "select distinct old, new from public.transitions"):
        assert found["new"] in LEGAL[found["old"]], f"{found['old']} → {found['new']}"
    assert conn.execute(EXITS).fetchall() == []
    assert column(conn, "select task_id from public.transitions where old_claim <> new_claim and old in ('claimed', 'running')") == []
