-- What the leader exports of the whole queue at /metrics. Reads type_stats, stats_state, task_types and workers; writes nothing.

-- The name a type is shown under: itself if registered, else the longest pattern it matches, else other. So the number of
-- series follows what is registered, never what is enqueued.
create or replace function orchestrator._metric_label(p_type text) returns text
language sql stable set search_path = '' as $$
  select coalesce(
    (select p.type from orchestrator.task_types p
     where p.type = p_type or (right(p.type, 1) in ('*', ':') and p_type like orchestrator._like(p.type))
     order by p.type = p_type desc, length(p.type) desc limit 1), 'other')
$$;

create or replace function orchestrator.metrics() returns jsonb
language sql stable set search_path = '' as $$
  with labels as (
    select n.type, coalesce(sum(t.waiting), 0) as waiting, coalesce(sum(t.scheduled), 0) as scheduled,
           coalesce(sum(t.in_flight), 0) as in_flight, coalesce(sum(t.dead_letters), 0) as dead_letters,
           coalesce(extract(epoch from max(s.counted_at - t.oldest_ready_at)), 0) as oldest_seconds,
           coalesce(sum(t.enqueued_total), 0) as enqueued_total
    from (select p.type, null as counted from orchestrator.task_types p   -- so that each series is there from the start, at 0
          union all select orchestrator._metric_label(c.type), c.type from orchestrator.type_stats c) n
    cross join orchestrator.stats_state s left join orchestrator.type_stats t on t.type = n.counted
    group by n.type)
  select jsonb_build_object(
    'types', (select coalesce(jsonb_agg(to_jsonb(l) order by l.type), '[]') from labels l),
    'age', (select extract(epoch from clock_timestamp() - s.counted_at) from orchestrator.stats_state s),
    'workers', (select count(*) from orchestrator.workers w where w.declared_dead_at is null),
    'dead_workers', (select count(*) from orchestrator.workers w where w.declared_dead_at is not null))
$$;
comment on function orchestrator.metrics() is
  'The counts of type_stats by registered type or pattern (the rest is other), how old they are in seconds (null: never '
  'counted), live workers, and workers declared dead whose tasks are still to be recovered. Cheap whatever waits.';
