-- The settings that functions run under. Writes nothing. Each rule is here once, and holds for whatever the files before created.
-- search_path: nothing in a caller's schemas shadows a built-in. Only functions that are to be inlined go without: their bodies
-- were bound when they were created (return, begin atomic), or qualify every name (immutable SQL).
-- The planner: a plan cached while a table was empty would scan it whole ever after. A function passes its settings on to those
-- it calls, so public functions have these, and what a view calls; not those that look at everything, or at the leader's
-- counts alone.
do $$
declare
  f record;
begin
  for f in
    select p.oid::regprocedure as signature,
           p.provolatile <> 'i' and p.proname !~ '^(_(?!(count_live|in_flight|older_claims)$).*|audit|metrics|api_overview)$' as hot
    from pg_proc p join pg_language l on l.oid = p.prolang
    where p.pronamespace = 'orchestrator'::regnamespace and (l.lanname = 'plpgsql' or p.prosqlbody is null and p.provolatile <> 'i')
  loop
    execute format('alter function %s set search_path = pg_catalog, pg_temp %s', f.signature, case when f.hot then
      'set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off
       set enable_mergejoin = off' end);
  end loop;
end $$;
