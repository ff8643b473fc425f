-- A worker that stops says so, for the page. Writes workers.

alter table orchestrator.workers add column if not exists stopping_at timestamptz;
comment on column orchestrator.workers.stopping_at is 'Since when it claims no more and only lets its tasks end.';

create or replace function orchestrator.announce_stop(p_id text) returns void
language sql set search_path = pg_catalog, pg_temp as $$
  update orchestrator.workers w set stopping_at = clock_timestamp(), idle = false where w.id = p_id and w.stopping_at is null
$$;
comment on function orchestrator.announce_stop(text) is 'Says that a worker claims no more, and ends when its tasks have.';
