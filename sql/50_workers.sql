-- Workers: registration, heartbeat, idle mark, and recovery of what dead workers held. Writes workers, task_types, claims, tasks,
-- task_events, lane_floors. Lock order: the leader's row → the dead worker's → its claims (ascending id) → tasks → lane_floors → tasks
-- that wait for what ended. The heartbeat touches workers alone: no other lock makes a worker seem dead.

create or replace function orchestrator.register_worker(
  p_id text, p_hostname text, p_pool_size int, p_version text, p_handlers jsonb default '{}') returns void
language plpgsql as $$
begin
  insert into orchestrator.workers (id, hostname, pool_size, version, handles)
  values (p_id, p_hostname, p_pool_size, p_version, array(select orchestrator._like(k) from jsonb_object_keys(p_handlers) k))
  on conflict (id) do nothing;   -- sent again, since the answer was lost
  insert into orchestrator.task_types as tt (type, max_retries, base_delay, max_delay, timeout)
  select h.key, coalesce((h.value ->> 'max_retries')::int, d.max_retries),
         coalesce(make_interval(secs => (h.value ->> 'base_delay')::double precision), d.base_delay),
         coalesce(make_interval(secs => (h.value ->> 'max_delay')::double precision), d.max_delay),
         make_interval(secs => (h.value ->> 'timeout')::double precision)
  from jsonb_each(p_handlers) h cross join orchestrator._default_policy() d
  order by h.key
  on conflict (type) do update
  set max_retries = excluded.max_retries, base_delay = excluded.base_delay, max_delay = excluded.max_delay,
      timeout = excluded.timeout, updated_at = clock_timestamp()
  where (tt.max_retries, tt.base_delay, tt.max_delay, tt.timeout)
        is distinct from (excluded.max_retries, excluded.base_delay, excluded.max_delay, excluded.timeout);
end $$;
comment on function orchestrator.register_worker is
  'Registers a worker under a new id, and its handlers'' policies: {type or pattern: {max_retries, base_delay, max_delay, timeout}}, '
  'in seconds, by default 3, 1, 3600 and none.';

create or replace function orchestrator.announce_stop(p_id text) returns void
language sql as $$
  update orchestrator.workers w set stopping_at = clock_timestamp(), idle = false where w.id = p_id and w.stopping_at is null
$$;
comment on function orchestrator.announce_stop is 'A worker claims no more, and ends when its tasks have.';

create or replace function orchestrator.unregister_worker(p_id text) returns boolean
language plpgsql as $$
begin
  delete from orchestrator.workers w where w.id = p_id and not exists (select from orchestrator.claims c where c.worker_id = p_id);
  if found then return true; end if;
  update orchestrator.workers w set declared_dead_at = clock_timestamp(), is_leader = false, idle = false where w.id = p_id;
  return false;
end $$;
comment on function orchestrator.unregister_worker is
  'Removes a worker that stops. One that holds claims is declared dead instead, to be recovered: then false.';

create or replace function orchestrator.heartbeat(p_id text) returns table (worker_id text, last_heartbeat timestamptz)
language plpgsql as $$
begin
  perform set_config('synchronous_commit', 'off', true);
  update orchestrator.workers w set last_heartbeat = clock_timestamp() where w.id = p_id and w.declared_dead_at is null;
  return query select w.id, w.last_heartbeat from orchestrator.workers w where w.declared_dead_at is null;
end $$;
comment on function orchestrator.heartbeat is
  'Records that a worker is alive. Returns all live workers; one not among them was declared dead, and must register under a new id.';

create or replace function orchestrator.cancelling_tasks(p_id text) returns setof uuid
language sql stable as $$
  select t.id from orchestrator.tasks t where t.cancel_requested_at is not null and t.worker_id = p_id and t.status in ('claimed', 'running')
$$;
comment on function orchestrator.cancelling_tasks is 'The tasks of a worker that were asked to stop.';

create or replace function orchestrator.set_idle(p_id text, p_idle boolean) returns void
language plpgsql as $$
begin
  perform set_config('synchronous_commit', 'off', true);   -- nothing is lost if a crash forgets it
  update orchestrator.workers w set idle = p_idle where w.id = p_id and w.idle <> p_idle;
end $$;
comment on function orchestrator.set_idle is
  'Marks a worker as waiting for work, so that enqueue notifies it. It must look once more after this.';

-- Recovers tasks of a locked claim: asked to cancel → cancelled; running → a failed attempt; not started → back to its old place,
-- uncharged. dead: the types of new dead letters.
create or replace function orchestrator._recover_tasks(
  p_claim_id bigint, p_ids uuid[], p_error text, out released int, out retried int, out dead text[], out cancelled int)
language plpgsql as $$
declare
  t record;
begin
  cancelled := orchestrator._lock_and_end_cancelled(p_claim_id, p_ids);
  retried := 0;
  dead := array[]::text[];
  for t in select x.id, x.type from orchestrator.tasks x where x.id = any (p_ids) and x.claim_id = p_claim_id and x.status = 'running' order by x.id loop
    perform orchestrator._add_event(t.id, 'recovered', null, null, p_error);
    if orchestrator._fail(p_claim_id, t.id, p_error, null, null, false, true) = 'dead_letter' then
      dead := dead || t.type;
    else
      retried := retried + 1;
    end if;
  end loop;
  perform orchestrator._shrink_claim(p_claim_id, retried + cardinality(dead));
  released := orchestrator._release(p_claim_id, p_ids, 'recovered', true);
end $$;

-- Recovers up to p_limit tasks of a claim, all together; if that fails, one by one, so that a bad row keeps back only itself.
create or replace function orchestrator._recover_claim(p_claim_id bigint, p_error text, p_limit int)
returns table (released int, retried int, dead text[], cancelled int, failed int)
language plpgsql as $$
declare
  v_ids uuid[];
begin
  perform from orchestrator.claims c where c.id = p_claim_id for no key update;
  if not found then return; end if;   -- its last task ended meanwhile
  v_ids := array(select t.id from orchestrator.tasks t where t.claim_id = p_claim_id and t.status in ('claimed', 'running') order by t.id limit p_limit);
  if v_ids = '{}' then
    perform orchestrator._shrink_claim(p_claim_id, 2147483647);
    return;
  end if;
  for i in 0..cardinality(v_ids) loop   -- 0: all together
    begin
      return query select r.*, 0 from orchestrator._recover_tasks(p_claim_id, case when i = 0 then v_ids else v_ids[i:i] end, p_error) r;
      exit when i = 0;
    exception when others then
      if i > 0 then
        raise warning 'task % could not be recovered: %', v_ids[i], sqlerrm;
        return query select 0, 0, '{}'::text[], 0, 1;
      end if;
    end;
  end loop;
end $$;

create or replace function orchestrator.declare_dead(p_worker_id text, p_term bigint, p_ids text[], p_seen timestamptz[]) returns int
language plpgsql as $$
declare
  v_n int;
begin
  if not orchestrator._leads(p_worker_id, p_term) then return null; end if;
  update orchestrator.workers w set declared_dead_at = clock_timestamp(), is_leader = false, idle = false
  from unnest(p_ids, p_seen) s(id, seen)
  where w.id = s.id and w.last_heartbeat = s.seen and w.id <> p_worker_id and w.declared_dead_at is null;
  get diagnostics v_n = row_count;
  return v_n;
end $$;
comment on function orchestrator.declare_dead is
  'The leader''s: declares the workers p_ids dead whose last heartbeat still is p_seen[i], seen WORKER_TIMEOUT ago by its own clock: a '
  'step of the server''s means nothing. Returns how many; null under a stale term.';

-- Takes no term: a single instance must not wait for the lease of a leader that is gone, and can't act on a missing connection.
create or replace function orchestrator.declare_disconnected_dead(p_worker_id text, out declared int, out living int)
language plpgsql as $$
begin
  update orchestrator.workers w set declared_dead_at = clock_timestamp(), is_leader = false, idle = false
  where w.id <> p_worker_id and w.declared_dead_at is null and not exists (
    select from pg_stat_activity a where a.datname = current_database() and a.application_name = orchestrator._application_name(w.id));
  get diagnostics declared = row_count;
  select count(*) into living from orchestrator.workers w where w.id <> p_worker_id and w.declared_dead_at is null;
end $$;
comment on function orchestrator.declare_disconnected_dead is
  'For a single instance at its start: declares workers without a connection dead. Returns how many, and how many others live.';

create or replace function orchestrator.recover_orphans(
  p_worker_id text, p_term bigint, p_limit int default 1000,
  out released int, out retried int, out dead_letters jsonb, out cancelled int, out failed int, out workers_removed int)
language plpgsql as $$
declare
  c record;
  r record;
  v_dead text[] := array[]::text[];
  v_claims bigint[];
begin
  if not orchestrator._leads(p_worker_id, p_term) then return; end if;
  released := 0; retried := 0; cancelled := 0; failed := 0;
  for c in
    select cl.id, cl.worker_id from orchestrator.claims cl left join orchestrator.workers w on w.id = cl.worker_id
    where w.id is null or w.declared_dead_at is not null order by cl.id limit p_limit
  loop
    v_claims := v_claims || c.id;
    for r in select * from orchestrator._recover_claim(c.id, format('worker %s died', c.worker_id), p_limit) loop
      released := released + r.released; retried := retried + r.retried; cancelled := cancelled + r.cancelled; failed := failed + r.failed;
      v_dead := v_dead || r.dead;
      p_limit := p_limit - (r.released + r.retried + cardinality(r.dead) + r.cancelled);   -- bad rows must not use it up
    end loop;
    exit when p_limit <= 0;
  end loop;
  perform orchestrator._claims_ended(v_claims);
  dead_letters := (select coalesce(jsonb_object_agg(d.type, d.n), '{}') from (select u.type, count(*) as n from unnest(v_dead) u(type) group by 1) d);
  delete from orchestrator.workers w where w.declared_dead_at is not null
    and not exists (select from orchestrator.claims cl where cl.worker_id = w.id);
  get diagnostics workers_removed = row_count;
end $$;
comment on function orchestrator.recover_orphans is
  'The leader''s: takes about p_limit tasks from workers that are dead or gone. Those not started go back to their old places, '
  'uncharged; running ones have failed an attempt. dead_letters: how many ended as such, by type. failed: rows that could not be '
  'recovered. A worker''s row goes with its last claim. Nulls under a stale term.';
