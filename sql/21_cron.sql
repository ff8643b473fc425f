-- Cron expressions: when they fire, in the database's own time zones. Reads and writes no table, locks nothing.

-- One field as the numbers it stands for.
create or replace function orchestrator._cron_field(p_field text, p_text text, p_low int, p_high int, p_names text[] default '{}')
returns int[] language plpgsql immutable as $$
declare
  v_text text := p_text;
  v_numbers int[];
  v_valid boolean;
begin
  for i in 1..cardinality(p_names) loop
    v_text := regexp_replace(v_text, '\m' || p_names[i] || '\M', (p_low + i - 1)::text, 'g');
  end loop;
  select array_agg(distinct n), bool_and((f.first between p_low and f.last and f.last <= p_high and f.step > 0) is true)
  into v_numbers, v_valid
  from regexp_split_to_table(v_text, ',') i
  cross join lateral regexp_match(i, '^(?:(\*)|([0-9]{1,2})(?:-([0-9]{1,2}))?)(?:/([0-9]{1,2}))?$') m
  cross join lateral (   -- 5/10 is 5-59/10
    select case when m[1] = '*' then p_low else m[2]::int end as first, coalesce(m[4]::int, 1) as step,
           case when m[1] = '*' or m[3] is null and m[4] is not null then p_high else coalesce(m[3], m[2])::int end as last) f
  left join lateral generate_series(f.first, f.last, nullif(f.step, 0)) n on true;
  if not v_valid then
    perform orchestrator._invalid('cron', format('%s: %L is not a list of values from %s to %s', p_field, p_text, p_low, p_high),
                                  'Such as *, */15, 0, 1-5 or 1,3,5.');
  end if;
  return v_numbers;
end $$;

-- every: the seconds of @every; then the rest is null. every_hour: it starts with *, so real time goes on when the clock changes.
-- either_day: day and weekday are both restricted, so one of them is enough.
create or replace function orchestrator._parse_cron(
  p_cron text, out every bigint, out minutes int[], out hours int[], out days int[], out months int[], out weekdays int[],
  out every_hour boolean, out either_day boolean)
language plpgsql stable as $$
declare
  v_cron text := lower(btrim(p_cron, E' \t\r\n'));
  v_every interval;
  f text[];
begin
  if v_cron ~ '^@every\s' then
    begin
      v_every := substr(v_cron, 8)::interval;
      every := extract(epoch from v_every);
    exception when data_exception or feature_not_supported then null;   -- the latter: infinity
    end;
    if (every between 1 and extract(epoch from orchestrator.longest_delay()) and every = extract(epoch from v_every)
        and extract(year from v_every) = 0 and extract(month from v_every) = 0) is not true then
      perform orchestrator._invalid('cron', '@every takes whole seconds, from 1 second to 3650 days, and no months',
                                    'Such as @every 90 seconds, or @every 1 hour 30 minutes.');
    end if;
    return;
  end if;
  f := regexp_split_to_array(coalesce(
    '{"@hourly": "0 * * * *", "@daily": "0 0 * * *", "@midnight": "0 0 * * *", "@weekly": "0 0 * * 0", "@monthly": "0 0 1 * *",
      "@yearly": "0 0 1 1 *", "@annually": "0 0 1 1 *"}'::jsonb ->> v_cron, v_cron), '\s+');
  if cardinality(f) is distinct from 5 then
    perform orchestrator._invalid('cron', 'must have five fields: minute hour day month weekday',
                                  'Such as 30 3 * * 1-5, @hourly, or @every 90 seconds.');
  end if;
  minutes := orchestrator._cron_field('minute', f[1], 0, 59);
  hours := orchestrator._cron_field('hour', f[2], 0, 23);
  days := orchestrator._cron_field('day', f[3], 1, 31);
  months := orchestrator._cron_field('month', f[4], 1, 12, '{jan,feb,mar,apr,may,jun,jul,aug,sep,oct,nov,dec}');
  -- Sunday is 0 and 7: a range may end with it
  weekdays := orchestrator._cron_field('weekday', replace(f[5], '-sun', '-7'), 0, 7, '{sun,mon,tue,wed,thu,fri,sat}');
  if 7 = any (weekdays) then weekdays := weekdays || 0; end if;
  every_hour := left(f[2], 1) = '*';
  either_day := left(f[3], 1) <> '*' and left(f[5], 1) <> '*';
end $$;

-- The fire times in (p_after, p_until], in any order. The clock changes at most once in three days, so a local time is one of two
-- moments at most. A fixed hour is the first of them; where the clock jumps over it, as much later as it jumps.
create or replace function orchestrator._fire_times_between(p_cron text, p_timezone text, p_after timestamptz, p_until timestamptz)
returns setof timestamptz language plpgsql stable as $$
declare
  c record;
  v_after timestamp := p_after at time zone 'UTC';
  v_until timestamp := p_until at time zone 'UTC';
  v_first date := (p_after at time zone p_timezone)::date - 1;   -- the clock may jump from one day into the next, and back
  v_last date := (p_until at time zone p_timezone)::date + 1;
begin
  select * into c from orchestrator._parse_cron(p_cron);
  if c.every is not null then
    return query
      select to_timestamp(c.every * k)
      from generate_series(floor(extract(epoch from p_after) / c.every) + 1, floor(extract(epoch from p_until) / c.every)) k;
    return;
  end if;
  return query
    select distinct t.at at time zone 'UTC'
    from (select v_first + n as day, (v_first + n - 1)::timestamp as before, (v_first + n + 2)::timestamp as after
          from generate_series(0, v_last - v_first) n offset 0) d
    cross join lateral (   -- the offsets from UTC before and after a change
      select (d.before at time zone 'UTC' at time zone p_timezone) - d.before as before,
             (d.after at time zone 'UTC' at time zone p_timezone) - d.after as after offset 0) o
    cross join lateral (   -- early, since what fires each minute has 1,440 times a day
      select h from unnest(c.hours) h
      where d.day + make_interval(hours => h) - greatest(o.before, o.after) <= v_until
        and d.day + make_interval(hours => h + 1) - least(o.before, o.after) > v_after offset 0) h
    cross join unnest(c.minutes) m
    cross join lateral (select d.day + make_interval(hours => h, mins => m) as at) l
    cross join lateral unnest(case
      when o.before = o.after then array[l.at - o.before]
      else coalesce(
        nullif(array(
          select u.at from unnest(array[l.at - o.before, l.at - o.after]) u(at)
          where u.at at time zone 'UTC' at time zone p_timezone = l.at
          order by u.at limit case when c.every_hour then 2 else 1 end), '{}'),
        case when not c.every_hour then array[l.at - o.before] end)
      end) t(at)
    where extract(month from d.day)::int = any (c.months)
      and (extract(day from d.day)::int = any (c.days))::int + (extract(dow from d.day)::int = any (c.weekdays))::int
          >= case when c.either_day then 1 else 2 end
      and t.at > v_after and t.at <= v_until;
end $$;

create or replace function orchestrator.fire_times(
  p_cron text, p_timezone text default 'UTC', p_after timestamptz default now(), p_n int default 5, p_until timestamptz default 'infinity')
returns setof timestamptz language plpgsql stable as $$
declare
  v_span interval := interval '10 minutes';
  v_to timestamptz;
  v_found int;
begin
  if isfinite(p_after) is not true then
    perform orchestrator._invalid('after', 'must be a moment', 'Leave it out for the times from now on.');
  end if;
  begin
    perform p_after at time zone p_timezone;
  exception when invalid_parameter_value then
    perform orchestrator._invalid('timezone', format('there is no %L', p_timezone), 'Such as UTC or Europe/Berlin: see pg_timezone_names.');
  end;
  while p_n > 0 loop
    v_to := least(p_after + v_span, p_until);
    return query
      select f.at from orchestrator._fire_times_between(p_cron, p_timezone, p_after, v_to) f(at) order by f.at limit p_n;
    get diagnostics v_found = row_count;
    -- 29 February may be a Sunday 40 years from now
    exit when v_to >= p_until or (v_found = 0 and v_span = interval '360000 hours');
    p_n := p_n - v_found;
    p_after := v_to;
    v_span := least(v_span * 12, interval '360000 hours');
  end loop;
end $$;
comment on function orchestrator.fire_times is
  'The next p_n times of a cron expression after p_after, up to p_until. Minute hour day month weekday, each *, a number, a name, a '
  'range, with or without /step, or a list of these; @hourly, @daily, @weekly, @monthly, @yearly; or @every INTERVAL, in whole '
  'seconds counted from 1970. If day and weekday are both restricted, either is enough. A fixed hour that the clock jumps over fires as '
  'much later; one that comes twice, at the first. Hours * and */n follow real time. Looks 41 years ahead. Raises OR001.';

-- The last fire time in (p_after, p_until], looked for in spans that grow backwards; null if there is none.
create or replace function orchestrator._last_fire_time(p_cron text, p_timezone text, p_after timestamptz, p_until timestamptz)
returns timestamptz language plpgsql stable as $$
declare
  v_span interval := interval '10 minutes';
  v_last timestamptz;
begin
  loop
    v_last := (select max(f.at) from orchestrator._fire_times_between(p_cron, p_timezone, greatest(p_after, p_until - v_span), p_until) f(at));
    p_until := p_until - v_span;
    v_span := v_span * 12;
    exit when (v_last is null and p_until > p_after) is not true;
  end loop;
  return v_last;
end $$;
