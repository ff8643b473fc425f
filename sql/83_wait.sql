-- Waiting for the end of tasks. Reads only. It looks again and again, by primary key: whoever completes tasks knows nothing of it.

create or replace function orchestrator.wait_tasks(p_ids uuid[], p_timeout interval default '30 seconds')
returns table (id uuid, status text, result jsonb, error text) language plpgsql as $$
#variable_conflict use_column
declare
  v_until timestamptz := clock_timestamp() + least(p_timeout, interval '10 minutes');
  v_pause double precision := 0.01;
  v_open uuid[];
begin
  loop
    v_open := array(select t.id from orchestrator.tasks t where t.id = any (p_ids) and t.status not in ('completed', 'cancelled', 'dead_letter'));
    exit when v_open = '{}' or clock_timestamp() < v_until is not true;
    if exists (select from orchestrator.tasks t where t.id = any (v_open) and t.xmin = pg_current_xact_id_if_assigned()::xid) then
      perform orchestrator._invalid('ids', 'has a task of this transaction, which nobody runs before it commits', 'Commit first.');
    end if;
    perform pg_sleep(v_pause);
    v_pause := least(v_pause * 1.5, 0.5);
  end loop;
  return query
    select u.id, coalesce(t.status::text, 'not_found'), t.result, case when t.status <> 'completed' then t.last_error end
    from unnest(p_ids) with ordinality u(id, place) left join orchestrator.tasks t on t.id = u.id order by u.place;
end $$;
comment on function orchestrator.wait_tasks is
  'Waits until tasks have ended, p_timeout or 10 minutes at most, and returns a row for each, in order: its status (or not_found), '
  'result and last error. It keeps a snapshot meanwhile, so a program had better call it with 0 now and again. Needs READ COMMITTED. Raises OR001.';
