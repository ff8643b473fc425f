-- Waiting for the end of tasks, by looking at them again and again. Reads only: nothing else knows of it.

create or replace function orchestrator.wait_tasks(p_ids uuid[], p_timeout interval default '30 seconds')
returns table (id uuid, status text, result jsonb, error text) language plpgsql as $$
declare
  v_until timestamptz := clock_timestamp() + least(p_timeout, interval '10 minutes');
  v_pause double precision := 0.01;
  v_own boolean;
begin
  loop
    select bool_or(t.xmin = pg_current_xact_id_if_assigned()::xid) into v_own from orchestrator.tasks t
    where t.id = any (p_ids) and t.status not in ('completed', 'cancelled', 'dead_letter') having count(*) > 0;
    exit when not found or clock_timestamp() < v_until is not true;
    if v_own then
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
  'Waits until tasks have ended, p_timeout or 10 minutes at most. A row for each, in order: status (or not_found), result, last error. It '
  'keeps a snapshot meanwhile: programs better call it with 0 now and again. Needs READ COMMITTED. Raises OR001.';
