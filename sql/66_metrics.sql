-- What the leader exports of the whole queue at /metrics, from its counts; writes nothing. A type counts under the name of its policy,
-- so the number of series follows what is registered, never what is enqueued.

create or replace function orchestrator.metrics() returns jsonb
language sql stable as $$
  with labels as (
    select n.type, coalesce(sum(t.waiting), 0) as waiting, coalesce(sum(t.parked), 0) as parked, coalesce(sum(t.scheduled), 0) as scheduled,
           coalesce(sum(t.blocked), 0) as blocked,
           coalesce(sum(t.in_flight), 0) as in_flight, coalesce(sum(t.dead_letters), 0) as dead_letters,
           coalesce(extract(epoch from max(s.counted_at - t.oldest_ready_at)), 0) as oldest_seconds,
           coalesce(sum(t.enqueued_total), 0) as enqueued_total
    -- first all labels: each series is there from the start, at 0
    from (select p.type, null as counted from orchestrator.task_types p where p.max_retries is not null
          union all select coalesce(orchestrator._registered_as(c.type), 'other'), c.type from orchestrator.type_stats c) n
    cross join orchestrator.stats_state s left join orchestrator.type_stats t on t.type = n.counted
    group by n.type)
  select jsonb_build_object(
    'types', (select coalesce(jsonb_agg(to_jsonb(l) order by l.type), '[]') from labels l),
    'limits', (select coalesce(jsonb_agg(jsonb_build_object('limit', l.type, 'in_flight', l.in_flight, 'max', l.max_running) order by l.type), '[]')
               from orchestrator.limits l),
    'age', (select extract(epoch from clock_timestamp() - s.counted_at) from orchestrator.stats_state s),
    'workers', (select count(*) from orchestrator.workers w where w.declared_dead_at is null),
    'dead_workers', (select count(*) from orchestrator.workers w where w.declared_dead_at is not null),
    'schedule_late', (select extract(epoch from coalesce(greatest(clock_timestamp() - min(s.next_at), '0'), '0'))
                      from orchestrator.schedules s where not s.paused),
    'schedules_failed', (select count(*) from orchestrator.schedules s where s.last_error is not null))
$$;
comment on function orchestrator.metrics is
  'The counts of type_stats by registered type or pattern (the rest is other), their age in seconds (null: never counted), limits with '
  'what is in flight under them, live workers, dead workers whose tasks are still to be recovered, by how many seconds the latest '
  'schedule is late, and how many could not fire. Its cost doesn''t depend on the backlog.';
