-- Filters, which lists, page, command line and bulk operations share, and the log of what operators did. Writes operations, and what
-- cancel_task and retry_task write. Bulk operations lock tasks with skip locked, in ascending order, and wait for nothing.

create table if not exists orchestrator.operations (
  id         bigint generated always as identity primary key,
  at         timestamptz not null default clock_timestamp(),
  by         text not null default current_user,
  action     text not null,
  filter     jsonb not null,
  value      jsonb,
  done       bigint,
  skipped    bigint,
  next_after uuid,
  ended_at   timestamptz default clock_timestamp()
);
comment on table orchestrator.operations is
  'What operators did to many tasks, to a type, a limit or a schedule: who, when, to what (filter) and, of tasks, to how many. Until '
  'ended_at is set, bulk_tasks goes on after next_after. Kept for ever.';

-- A restore of data alone leaves sequences behind their tables.
create or replace view orchestrator._sequences as
  select s.name, coalesce(pg_sequence_last_value(('orchestrator.' || s.name)::regclass), 0) as at, s.newest
  from (values ('task_events_id_seq', (select max(e.id) from orchestrator.task_events e)),
               ('operations_id_seq', (select max(o.id) from orchestrator.operations o)),
               ('leader_terms', (select max(w.leader_term) from orchestrator.workers w))) s(name, newest);
select setval('orchestrator.payload_doublings', 4)   -- 256 KiB: nobody has weighed what was restored
where exists (select from orchestrator._sequences s where s.newest > s.at);
select setval(('orchestrator.' || s.name)::regclass, s.newest) from orchestrator._sequences s where s.newest > s.at;

create or replace function orchestrator._log(p_action text, p_key text, p_name text, p_value jsonb default null) returns void
language sql as $$
  insert into orchestrator.operations (action, filter, value) values (p_action, jsonb_build_object(p_key, p_name), p_value)
$$;

-- For events: who did it, and in which bulk operation.
create or replace function orchestrator._by() returns text
language sql stable
return coalesce('operation ' || nullif(current_setting('orchestrator.operation', true), '') || ' ', '') || 'by ' || current_user;

-- The lists that have all tasks of a status, as they are shown: those with an index of their own, or by id.
create or replace function orchestrator._walks(p_status text) returns text[]
language sql immutable parallel safe
return case when p_status in ('ready', 'parked', 'scheduled', 'in_flight', 'dead_letter') then array[p_status]
  when p_status in ('claimed', 'running') then '{in_flight}' when p_status in ('retry_scheduled', 'blocked') then '{scheduled}'
  when p_status in ('pending', 'waiting') then '{ready,parked,scheduled}'
  when p_status = 'unfinished' then '{in_flight,ready,parked,scheduled}' else '{ids}' end;

create or replace function orchestrator._check_filter(p_filter jsonb) returns void
language plpgsql stable as $$
declare
  v_keys text[] := '{id,ids,type,status,created_after,created_before,priority,concurrency_key,error,payload,all}'::text[];
  v_statuses text[] := '{ready,parked,blocked,scheduled,waiting,in_flight,unfinished,ended}' ||
    array_remove(enum_range(null::orchestrator.task_status)::text[], 'failed');   -- none rests in failed
  v_key text;
begin
  if jsonb_typeof(p_filter) <> 'object' then
    perform orchestrator._invalid('filter', 'must be an object', 'Such as {"type": "mail:*"}.');
  end if;
  perform orchestrator._invalid(case when k.known then k.key else 'filter' end, case when k.known then 'is empty' else k.key || ' is not known' end,
                                'A filter is an object of some of ' || array_to_string(v_keys, ', ') || '.')
  from (select e.key, e.value, e.key = any (v_keys) as known from jsonb_each(p_filter) e) k where not k.known or k.value in ('null', '""', '{}');
  if p_filter ->> 'status' <> all (v_statuses) then
    perform orchestrator._invalid('status', 'is unknown: must be one of ' || array_to_string(v_statuses, ', '), 'Or leave it out.');
  elsif replace(btrim(p_filter ->> 'id'), '-', '') !~* '^[0-9a-f]{1,32}$' then
    perform orchestrator._invalid('id', 'must be the beginning of a task''s id', 'Digits and a to f.');
  end if;
  begin
    v_key := 'priority';
    perform (p_filter ->> v_key)::int;
    v_key := 'ids';
    perform translate(p_filter ->> v_key, '[]', '{}')::uuid[];
    foreach v_key in array '{created_after,created_before}'::text[] loop
      perform (p_filter ->> v_key)::timestamptz;
    end loop;
  exception when data_exception then
    perform orchestrator._invalid(v_key, sqlerrm, 'Such as {"priority": 10, "ids": [], "created_after": "2030-01-31 12:00+00"}.');
  end;
end $$;

-- The tasks of the list p_walk that match, from its p_skip-th on, or by id: `ids` from p_from down, `up` from p_from up. Looks at
-- p_bound tasks, and says at how many, and if there are more, at which last. Each part of the union reads along an index as far as
-- needed.
create or replace function orchestrator._matching(
  p_filter jsonb, p_walk text, p_skip int, p_from uuid, p_limit int, p_bound int, out ids uuid[], out looked int, out stopped int, out last uuid)
language plpgsql stable as $$
declare
  f record;
  r record;
  v_prefix text := orchestrator._prefix(coalesce(p_filter ->> 'type', '*'));
  v_id text := coalesce(replace(btrim(p_filter ->> 'id'), '-', ''), '');
  v_low uuid;
  v_high uuid;
begin
  perform orchestrator._check_filter(p_filter);
  select x.*, orchestrator._like(x.type) as likes, coalesce(v_prefix, x.type) as first, coalesce(v_prefix || chr(1114111), x.type) as final into f
  from jsonb_to_record(p_filter) x(ids uuid[], type text, status text, created_after timestamptz, created_before timestamptz, priority int,
                                   concurrency_key text, error text, payload jsonb);
  v_low := greatest(rpad(v_id, 32, '0')::uuid, case when f.created_after is not null then orchestrator._uuid_at(f.created_after) end,
                    case when p_walk = 'up' then p_from end);
  v_high := least(rpad(v_id, 32, 'f')::uuid, case when f.created_before is not null then orchestrator._uuid_at(f.created_before) end,
                  case when p_walk = 'ids' then p_from end);
  if p_walk = 'up' and f.ids is null and orchestrator._walks(f.status) <> '{ids}' then
    f.ids := '{}';
    for r in select m.* from unnest(orchestrator._walks(f.status)) w cross join lateral orchestrator._matching(
               p_filter - '{error,payload}'::text[], w, 0, null, p_limit * 10, least(p_limit * 10, p_bound)) m loop
      f.ids := case when r.stopped is null then f.ids || r.ids end;   -- null: too many to sort
      exit when f.ids is null;
    end loop;
  end if;
  with b as not materialized (select * from orchestrator._bare_tasks),
  walked as materialized (
    select row_number() over () as place, w.* from (
      (select * from b where p_walk = 'ready' and queued_at is not null and type >= f.first and type <= f.final
       order by type, priority desc, queued_at offset p_skip limit p_bound)
      union all
      (select * from b where p_walk = 'parked' and parked_at is not null
       order by parked_by, concurrency_key, type, priority desc, parked_at offset p_skip limit p_bound)
      union all
      (select * from b where p_walk = 'scheduled' and next_retry_at is not null order by next_retry_at offset p_skip limit p_bound)
      union all
      (select * from b where p_walk = 'dead_letter' and dead_at is not null order by dead_at desc offset p_skip limit p_bound)
      union all
      (select t.* from (select id from orchestrator.claims where p_walk = 'in_flight' order by id) c
       cross join lateral (select * from b where claim_id = c.id and status in ('claimed', 'running') limit 10000000) t offset p_skip limit p_bound)
      union all
      (select * from b where p_walk = 'ids' and f.ids is null and id >= v_low and id <= v_high and id is distinct from p_from
       order by id desc limit p_bound)
      union all
      (select * from b where p_walk = 'up' and f.ids is null and id >= v_low and id <= v_high and id is distinct from p_from
       order by id limit p_bound)
      union all
      (select t.* from (select d from (select distinct unnest(f.ids) as d) d order by case p_walk when 'up' then d end, d desc) u
       cross join lateral (select * from b where id = u.d limit 1) t limit p_bound)) w),
  found as materialized (
    select w.place, w.id from walked w
    where w.id >= v_low and w.id <= v_high and w.id is distinct from p_from
      and (f.type is null or w.type like f.likes) and (f.priority is null or w.priority = f.priority)
      and (f.concurrency_key is null or w.concurrency_key = f.concurrency_key)
      and (f.status is null or case f.status when 'ready' then w.queued_at is not null when 'parked' then w.parked_at is not null
        when 'blocked' then w.blocked_until is not null when 'scheduled' then w.next_retry_at is not null
        when 'waiting' then w.status in ('pending', 'retry_scheduled') when 'in_flight' then w.status in ('claimed', 'running')
        when 'unfinished' then w.status in ('pending', 'retry_scheduled', 'claimed', 'running')
        when 'ended' then w.status in ('completed', 'cancelled') else w.status::text = f.status end)
      and (f.error is null or strpos(lower(orchestrator.redact_text(w.last_error)), lower(f.error)) > 0)
      and (f.payload is null or exists (select from orchestrator._redacted_tasks p where p.id = w.id and p.payload @> f.payload))
    limit p_limit),
  stop as (select case when (select count(*) from found) = p_limit then (select max(x.place) from found x)
                       when (select count(*) from walked) = p_bound then p_bound end as place)
  select array(select x.id from found x order by x.place), coalesce(s.place, (select count(*) from walked)), s.place,
         (select w.id from walked w where w.place = s.place limit 1)
    into ids, looked, stopped, last from stop s;
end $$;

-- Acts on those of these tasks that nobody else holds, that still match, and that may be acted upon; returns how many that are.
create or replace function orchestrator._act(p_action text, p_filter jsonb, p_ids uuid[], p_priority int) returns int
language plpgsql as $$
declare
  v_ids uuid[];
  v_id uuid;
begin
  p_ids := array(select t.id from orchestrator.tasks t where t.id = any (p_ids) order by t.id for no key update skip locked);
  v_ids := array(   -- a statement of its own, which sees what changed before the locks
    select t.id
    from (select unnest(m.ids) as id from orchestrator._matching(p_filter || jsonb_build_object('ids', p_ids), 'up', 0, null, 10000, 10001) m) u
    cross join lateral (select b.* from orchestrator._bare_tasks b where b.id = u.id limit 1) t
    where case p_action when 'cancel' then t.status in ('pending', 'retry_scheduled', 'claimed', 'running') and t.cancel_requested_at is null
      when 'retry' then t.status in ('dead_letter', 'cancelled') when 'run_now' then t.next_retry_at is not null and t.blocked_until is null
      when 'prioritize' then t.status in ('pending', 'retry_scheduled') and t.priority <> p_priority
      else t.status in ('completed', 'cancelled', 'dead_letter') end
    order by t.id);
  if p_action = 'purge' then
    return orchestrator._delete_tasks(v_ids, true);
  elsif p_action in ('cancel', 'retry') then
    foreach v_id in array v_ids loop
      perform case p_action when 'cancel' then orchestrator.cancel_task(v_id) else orchestrator.retry_task(v_id) end;
    end loop;
  else   -- to the tail of the lane that it is in by now: the floor of another one might hide its old place
    perform orchestrator._note_lane(l.type, l.priority)
    from (select distinct b.type, b.priority from orchestrator._bare_tasks b where b.id = any (v_ids) and b.queued_at is not null) l;
    update orchestrator.tasks t
    set priority = coalesce(p_priority, t.priority), updated_at = clock_timestamp(),
        status = case when p_priority is null then 'pending' else t.status end,
        next_retry_at = case when p_priority is not null then t.next_retry_at end,
        queued_at = case when t.queued_at is not null or p_priority is null then clock_timestamp() end,
        parked_at = case when t.parked_at is not null then clock_timestamp() end
    where t.id = any (v_ids);
    perform orchestrator._give_way(k.type, k.concurrency_key)   -- one put back in its key's turn may be behind parked ones by now
    from (select distinct b.type, b.concurrency_key from orchestrator._bare_tasks b
          where b.id = any (v_ids) and b.concurrency_key is not null and coalesce(b.queued_at, b.parked_at) is not null) k;
    perform orchestrator._add_event(u.id, case p_action when 'run_now' then p_action else 'prioritized' end, null, null, orchestrator._by())
    from unnest(v_ids) u(id);
    perform orchestrator._notify_idle(l.type)
    from (select distinct b.type from orchestrator._bare_tasks b where b.id = any (v_ids) and b.queued_at is not null) l;
  end if;
  return cardinality(v_ids);
end $$;

create or replace function orchestrator.bulk_tasks(
  p_action text, p_filter jsonb, p_dry_run boolean default true, p_value jsonb default null, p_limit int default 1000,
  p_operation bigint default null, p_after uuid default null,
  out operation bigint, out matched int, out done int, out skipped int, out next_after uuid, out sample jsonb)
language plpgsql as $$
declare
  v_ids uuid[];
begin
  p_dry_run := coalesce(p_dry_run, true);
  p_filter := case when jsonb_typeof(p_filter) = 'object' then p_filter else '{}' end;
  if p_operation is not null then
    select o.filter, o.value, coalesce(p_after, o.next_after) into p_filter, p_value, p_after from orchestrator.operations o
    where o.id = p_operation and o.action = p_action and o.ended_at is null for no key update;
    if not found then
      perform orchestrator._invalid('operation', 'is not an unfinished operation of this action', 'See the table operations.');
    end if;
  elsif (p_action in ('cancel', 'retry', 'run_now', 'prioritize', 'purge')) is not true then
    perform orchestrator._invalid('action', 'must be cancel, retry, run_now, prioritize or purge', 'prioritize takes p_value, a priority.');
  elsif (p_action = 'prioritize') <> (p_value is not null) or (p_value #>> '{}' ~ '^-?(\d{1,6}|1000000)$') is not true and p_value is not null then
    perform orchestrator._invalid('value', 'must be a priority from -1000000 to 1000000, and goes with prioritize only', 'Such as p_value => ''10''.');
  elsif p_filter - 'all' = '{}' and p_filter -> 'all' is distinct from 'true' then
    perform orchestrator._invalid('filter', 'is empty', 'Say {"all": true} if you mean every task.');
  elsif not p_filter ?| '{status,id,ids}' then
    p_filter := p_filter || jsonb_build_object('status', case p_action when 'cancel' then 'unfinished' when 'retry' then 'dead_letter'
      when 'run_now' then 'scheduled' when 'prioritize' then 'waiting' else 'ended' end);
  end if;
  select m.ids, m.last into v_ids, next_after
  from orchestrator._matching(p_filter, 'up', 0, p_after, case when p_dry_run then 100000 else orchestrator._check_range('limit', p_limit, 10000) end,
                              100000) m;
  matched := cardinality(v_ids);
  if p_dry_run then
    sample := orchestrator._task_summaries(v_ids[:5]);
    return;
  end if;
  operation := p_operation;
  if operation is null then
    insert into orchestrator.operations (action, filter, value) values (p_action, p_filter, p_value) returning id into operation;
  end if;
  perform set_config('orchestrator.operation', operation::text, true);   -- not for the function: that takes a superuser
  done := orchestrator._act(p_action, p_filter, v_ids, (p_value #>> '{}')::int);
  perform set_config('orchestrator.operation', '', true);
  skipped := matched - done;
  update orchestrator.operations o
  set done = coalesce(o.done, 0) + bulk_tasks.done, skipped = coalesce(o.skipped, 0) + bulk_tasks.skipped, next_after = bulk_tasks.next_after,
      ended_at = case when bulk_tasks.next_after is null then clock_timestamp() end
  where o.id = operation;
end $$;
comment on function orchestrator.bulk_tasks is
  'Cancels, retries, runs now (run_now), prioritizes (p_value) or purges (if ended) the tasks that a filter matches. A dry run, the '
  'default, counts up to 100,000 (matched) and shows five (sample). Otherwise it takes p_limit (up to 10,000) by their ids, skips what '
  'others hold or the action doesn''t apply to, and notes that in operations. Call it again with p_operation => operation (a dry run: '
  'p_after => next_after) until next_after is null. The filter: an object of id (its beginning), ids, type (or pattern), status (as '
  'tasks have it, ready, parked, blocked, scheduled, waiting, in_flight, unfinished, ended; by default what the action applies to), '
  'created_after, created_before, priority, concurrency_key, error and payload (a part of it), or {"all": true}. Raises OR001.';

create or replace function orchestrator.retry_dead_letters(p_type text default null, p_limit int default 1000) returns int
language plpgsql as $$
begin
  return (select b.done from orchestrator.bulk_tasks(
    'retry', jsonb_strip_nulls(jsonb_build_object('status', 'dead_letter', 'type', p_type)), false, p_limit => least(p_limit, 10000)) b);
end $$;
comment on function orchestrator.retry_dead_letters is
  'Retries up to p_limit (at most 10,000) dead letters of a type or pattern (null: all). Returns how many: call it again until that is 0.';
