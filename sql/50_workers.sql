-- Workers: registration, heartbeat, the idle mark, and recovery of what dead workers held. Writes workers, task_types,
-- claims, tasks, task_events, lanes, floors. Lock order: the leader's row → the dead worker's row → its claims (ascending id)
-- → tasks → floors.

create or replace function orchestrator.register_worker(
  p_id text, p_hostname text, p_pool_size int, p_version text, p_handlers jsonb default '{}') returns void
language plpgsql set search_path = '' as $$
begin
  insert into orchestrator.workers (id, hostname, pool_size, version, handles)
  values (p_id, p_hostname, p_pool_size, p_version, array(select orchestrator._like(k) from jsonb_object_keys(p_handlers) k))
  on conflict (id) do nothing;   -- sent again, since the answer was lost
  insert into orchestrator.task_types as tt (type, max_retries, base_delay, max_delay, timeout)
  select h.key, coalesce((h.value ->> 'max_retries')::int, 3), make_interval(secs => coalesce((h.value ->> 'base_delay')::double precision, 1)),
         make_interval(secs => coalesce((h.value ->> 'max_delay')::double precision, 3600)),
         make_interval(secs => (h.value ->> 'timeout')::double precision)
  from jsonb_each(p_handlers) h
  order by h.key
  on conflict (type) do update
  set max_retries = excluded.max_retries, base_delay = excluded.base_delay, max_delay = excluded.max_delay,
      timeout = excluded.timeout, updated_at = clock_timestamp()
  where (tt.max_retries, tt.base_delay, tt.max_delay, tt.timeout)
        is distinct from (excluded.max_retries, excluded.base_delay, excluded.max_delay, excluded.timeout);
end $$;
comment on function orchestrator.register_worker(text, text, int, text, jsonb) is
  'Registers a worker under a new id, with its handlers: {type or pattern: {max_retries, base_delay, max_delay, timeout}}, '
  'delays in seconds; what is left out is 3, 1, 3600 and none. Their policies are written to task_types.';

create or replace function orchestrator.unregister_worker(p_id text) returns boolean
language plpgsql set search_path = '' as $$
begin
  delete from orchestrator.workers w where w.id = p_id and not exists (select from orchestrator.claims c where c.worker_id = p_id);
  if found then return true; end if;
  update orchestrator.workers w set declared_dead_at = clock_timestamp(), is_leader = false, idle = false where w.id = p_id;
  return false;
end $$;
comment on function orchestrator.unregister_worker(text) is
  'A worker''s goodbye. If it still holds claims it is declared dead instead, and the leader recovers them; then returns false.';

create or replace function orchestrator.heartbeat(p_id text, out alive boolean, out cancelling uuid[])
language plpgsql set search_path = '' set enable_seqscan = off as $$
begin
  update orchestrator.workers w set last_heartbeat = clock_timestamp() where w.id = p_id and w.declared_dead_at is null;
  alive := found;
  cancelling := array(select t.id from orchestrator.tasks t where t.cancel_requested_at is not null and t.worker_id = p_id
                      and t.status in ('claimed', 'running'));
end $$;
comment on function orchestrator.heartbeat(text) is
  'Says that a worker lives. alive = false: it was declared dead and must register under a new id. cancelling: its tasks that '
  'were asked to stop.';

create or replace function orchestrator.cancelling_tasks(p_id text) returns uuid[]
language sql stable set search_path = '' set enable_seqscan = off as $$
  select array(select t.id from orchestrator.tasks t where t.cancel_requested_at is not null and t.worker_id = p_id
               and t.status in ('claimed', 'running'))
$$;
comment on function orchestrator.cancelling_tasks(text) is 'The tasks of a worker that were asked to stop.';

create or replace function orchestrator.set_idle(p_id text, p_idle boolean) returns void
language plpgsql set search_path = '' as $$
begin
  perform set_config('synchronous_commit', 'off', true);   -- nothing is lost if a crash forgets it
  update orchestrator.workers w set idle = p_idle where w.id = p_id and w.idle <> p_idle;
end $$;
comment on function orchestrator.set_idle(text, boolean) is
  'Marks a worker as waiting for work, so that enqueue rings; it must look for work once more after this.';

-- Recovery of some tasks of a locked claim: asked to cancel → cancelled; running → a failed attempt; not yet started → back to
-- its old place, uncharged. Returns {released, retried, dead, cancelled}.
create or replace function orchestrator._recover_tasks(p_claim_id bigint, p_ids uuid[], p_error text) returns int[]
language plpgsql set search_path = '' as $$
declare
  v_id uuid;
  v_cancelled int := orchestrator._end_cancelled(p_claim_id, p_ids);
  v_retried int := 0;
  v_dead int := 0;
begin
  for v_id in select t.id from orchestrator.tasks t where t.id = any (p_ids) and t.claim_id = p_claim_id and t.status = 'running' order by t.id loop
    perform orchestrator._record(v_id, 'recovered', null, null, p_error);
    if orchestrator._fail(p_claim_id, v_id, p_error, null, false, true) = 'dead_letter' then
      v_dead := v_dead + 1;
    else
      v_retried := v_retried + 1;
    end if;
  end loop;
  perform orchestrator._settle(p_claim_id, v_cancelled + v_retried + v_dead);
  return array[orchestrator._release(p_claim_id, p_ids, 'recovered', true), v_retried, v_dead, v_cancelled];
end $$;

-- One claim, its tasks all together; if a row makes that fail, one by one, so that a bad row keeps back only itself.
-- Returns {released, retried, dead, cancelled, failed}.
create or replace function orchestrator._recover_claim(p_claim_id bigint, p_error text, p_limit int) returns int[]
language plpgsql
set search_path = '' set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off as $$
declare
  v_ids uuid[];
  v_one int[];
  v_sum int[] := array[0, 0, 0, 0, 0];
begin
  perform from orchestrator.claims c where c.id = p_claim_id for no key update;
  if not found then return v_sum; end if;   -- its last task ended meanwhile
  v_ids := array(select t.id from orchestrator.tasks t where t.claim_id = p_claim_id and t.status in ('claimed', 'running') order by t.id limit p_limit);
  if v_ids = '{}' then
    delete from orchestrator.claims c where c.id = p_claim_id;
    return v_sum;
  end if;
  begin
    return orchestrator._recover_tasks(p_claim_id, v_ids, p_error) || 0;
  exception when others then
    for i in 1..cardinality(v_ids) loop
      begin
        v_one := orchestrator._recover_tasks(p_claim_id, v_ids[i:i], p_error) || 0;
      exception when others then
        raise warning 'task % could not be recovered: %', v_ids[i], sqlerrm;
        v_one := array[0, 0, 0, 0, 1];
      end;
      v_sum := array(select a + b from unnest(v_sum, v_one) u(a, b));
    end loop;
    return v_sum;
  end;
end $$;

create or replace function orchestrator.declare_dead(p_worker_id text, p_term bigint, p_timeout interval) returns int
language plpgsql set search_path = '' as $$
declare
  v_n int;
begin
  if not orchestrator._leads(p_worker_id, p_term) then return null; end if;
  update orchestrator.workers w set declared_dead_at = clock_timestamp(), is_leader = false, idle = false
  where w.id <> p_worker_id and w.declared_dead_at is null and w.last_heartbeat < clock_timestamp() - p_timeout;
  get diagnostics v_n = row_count;
  return v_n;
end $$;
comment on function orchestrator.declare_dead(text, bigint, interval) is
  'The leader''s: declares workers dead that were not heard of for p_timeout. Returns how many; null under a stale term.';

-- No term: a leader that is gone must not keep a single instance waiting for its lease to end. It can't act any more either,
-- since it maintains on the connection that is missing here.
create or replace function orchestrator.declare_disconnected_dead(p_worker_id text, out declared int, out living int)
language plpgsql set search_path = '' as $$
begin
  update orchestrator.workers w set declared_dead_at = clock_timestamp(), is_leader = false, idle = false
  where w.id <> p_worker_id and w.declared_dead_at is null and not exists (
    select from pg_stat_activity a where a.datname = current_database() and a.application_name = orchestrator._application_name(w.id));
  get diagnostics declared = row_count;
  select count(*) into living from orchestrator.workers w where w.id <> p_worker_id and w.declared_dead_at is null;
end $$;
comment on function orchestrator.declare_disconnected_dead(text) is
  'For a single instance at its start: declares workers dead at once that have no connection. Returns how many, and how many '
  'others live.';

create or replace function orchestrator.recover_orphans(
  p_worker_id text, p_term bigint, p_limit int default 1000,
  out released int, out retried int, out dead int, out cancelled int, out failed int, out workers_removed int)
language plpgsql set search_path = '' as $$
declare
  c record;
  v_sum int[] := array[0, 0, 0, 0, 0];
  v_one int[];
begin
  if not orchestrator._leads(p_worker_id, p_term) then return; end if;
  for c in
    select cl.id, cl.worker_id from orchestrator.claims cl left join orchestrator.workers w on w.id = cl.worker_id
    where w.id is null or w.declared_dead_at is not null order by cl.id limit p_limit
  loop
    v_one := orchestrator._recover_claim(c.id, format('worker %s died', c.worker_id), p_limit);
    v_sum := array(select a + b from unnest(v_sum, v_one) u(a, b));
    p_limit := p_limit - (select sum(n) from unnest(v_one[1:4]) n);   -- bad rows must not use it up
    exit when p_limit <= 0;
  end loop;
  delete from orchestrator.workers w where w.declared_dead_at is not null
    and not exists (select from orchestrator.claims cl where cl.worker_id = w.id);
  get diagnostics workers_removed = row_count;
  released := v_sum[1]; retried := v_sum[2]; dead := v_sum[3]; cancelled := v_sum[4]; failed := v_sum[5];
end $$;
comment on function orchestrator.recover_orphans(text, bigint, int) is
  'The leader''s: takes about p_limit tasks from workers that were declared dead or are gone. Not started: back to their old '
  'places, uncharged; running: a failed attempt. A worker''s row goes when its claims are gone. Nulls under a stale term.';
