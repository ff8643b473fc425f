-- The settings that functions run under. Writes nothing. Each rule is here once, and holds for whatever the files before created.
-- search_path: nothing in a caller's schemas shadows a built-in. Only functions that are to be inlined go without: their bodies
-- were bound when they were created (return, begin atomic), or qualify every name (immutable SQL).
-- The planner: a plan cached while a table was empty would scan it whole ever after. A function passes its settings on to those
-- it calls, so public functions have these; not those that look at everything, or at the leader's counts alone.
do $$
declare
  f record;
begin
  for f in
    select p.oid::regprocedure as signature, p.provolatile <> 'i' and p.proname !~ '^(_.*|audit|metrics|api_overview)$' as hot
    from pg_proc p join pg_language l on l.oid = p.prolang
    where p.pronamespace = 'orchestrator'::regnamespace and (l.lanname = 'plpgsql' or p.prosqlbody is null and p.provolatile <> 'i')
  loop
    execute format('alter function %s set search_path = pg_catalog, pg_temp', f.signature);
    for i in 1..5 loop
      exit when not f.hot;
      execute format('alter function %s set %s', f.signature, (array['plan_cache_mode = force_generic_plan', 'enable_seqscan = off',
        'enable_bitmapscan = off', 'enable_hashjoin = off', 'enable_mergejoin = off'])[i]);
    end loop;
  end loop;
end $$;
