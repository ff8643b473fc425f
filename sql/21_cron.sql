-- Cron expressions: fire_times says when one fires, in the database's own time zones. Reads and writes no table, locks nothing.

do $$
begin
  if to_regtype('orchestrator._cron_fields') is null then
    -- every: the seconds of @every, and then the rest is null. every_hour: the hour field starts with *, so real time goes on when
    -- the clock changes. either_day: day and weekday are both restricted, so one of them is enough.
    create type orchestrator._cron_fields as (
      every bigint, minutes int[], hours int[], days int[], months int[], weekdays int[], every_hour boolean, either_day boolean);
  end if;
end $$;

-- One field as the numbers it stands for.
create or replace function orchestrator._cron_field(p_field text, p_text text, p_low int, p_high int, p_names text[] default '{}')
returns int[] language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
declare
  v_item text;
  v_match text[];   -- *, or first and last; step
  v_ends int[];
  v_numbers int[] := array[]::int[];
begin
  if p_text = '*' then return array(select generate_series(p_low, p_high)); end if;
  foreach v_item in array string_to_array(lower(p_text), ',') loop
    v_match := regexp_match(v_item, '^(?:(\*)|(\d{1,2}|[a-z]{3})(?:-(\d{1,2}|[a-z]{3}))?)(?:/(\d{1,2}))?$');
    v_ends := array(
      select case when e ~ '^\d' then e::int else array_position(p_names, e) + p_low - 1 end
      from unnest(v_match[2:3]) with ordinality u(e, o) order by o);
    if v_match[1] is not null then
      v_ends := array[p_low, p_high];
    elsif v_match[3] is null then
      v_ends[2] := case when v_match[4] is null then v_ends[1] else p_high end;   -- 5/10 is 5-59/10
    end if;
    if (v_ends[1] between p_low and v_ends[2] and v_ends[2] <= p_high and coalesce(v_match[4]::int, 1) > 0) is not true then
      perform orchestrator._invalid('cron', format('%s: %L is not a list of values from %s to %s', p_field, p_text, p_low, p_high),
                                    'Such as *, */15, 0, 1-5 or 1,3,5.');
    end if;
    v_numbers := v_numbers || array(select generate_series(v_ends[1], v_ends[2], coalesce(v_match[4]::int, 1)));
  end loop;
  return array(select distinct n from unnest(v_numbers) n order by n);
end $$;

create or replace function orchestrator._every(p_interval text) returns bigint
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_every interval;
  v_seconds numeric;
begin
  begin
    v_every := p_interval::interval;
    v_seconds := extract(epoch from v_every);
  exception when data_exception then null;
  end;
  if (v_seconds between 1 and extract(epoch from orchestrator.longest_delay()) and v_seconds % 1 = 0
      and extract(year from v_every) = 0 and extract(month from v_every) = 0) is not true then
    perform orchestrator._invalid('cron', '@every takes whole seconds, from 1 second to 3650 days, and no months',
                                  'Such as @every 90 seconds, or @every 1 hour 30 minutes.');
  end if;
  return v_seconds;
end $$;

create or replace function orchestrator._parse_cron(p_cron text) returns orchestrator._cron_fields
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  c orchestrator._cron_fields;
  v_cron text := lower(btrim(p_cron, E' \t\r\n'));
  f text[];
begin
  if v_cron ~ '^@every\s' then
    c.every := orchestrator._every(substr(v_cron, 8));
    return c;
  end if;
  f := regexp_split_to_array(case v_cron
    when '@hourly' then '0 * * * *' when '@daily' then '0 0 * * *' when '@midnight' then '0 0 * * *' when '@weekly' then '0 0 * * 0'
    when '@monthly' then '0 0 1 * *' when '@yearly' then '0 0 1 1 *' when '@annually' then '0 0 1 1 *' else v_cron end, '\s+');
  if cardinality(f) is distinct from 5 then
    perform orchestrator._invalid('cron', 'must have five fields: minute hour day month weekday',
                                  'Such as 30 3 * * 1-5, @hourly, or @every 90 seconds.');
  end if;
  c.minutes := orchestrator._cron_field('minute', f[1], 0, 59);
  c.hours := orchestrator._cron_field('hour', f[2], 0, 23);
  c.days := orchestrator._cron_field('day', f[3], 1, 31);
  c.months := orchestrator._cron_field('month', f[4], 1, 12, '{jan,feb,mar,apr,may,jun,jul,aug,sep,oct,nov,dec}');
  -- Sunday is 0 and 7: a range may end with it
  c.weekdays := orchestrator._cron_field('weekday', replace(f[5], '-sun', '-7'), 0, 7, '{sun,mon,tue,wed,thu,fri,sat}');
  if 7 = any (c.weekdays) then c.weekdays := c.weekdays || 0; end if;
  c.every_hour := left(f[2], 1) = '*';
  c.either_day := left(f[3], 1) <> '*' and left(f[5], 1) <> '*';
  return c;
end $$;

-- The fire times in (p_after, p_until], in no particular order. The clock changes at most once in three days, so a local time is
-- one of two moments at most. A fixed hour is the first of them; where the clock jumps over it, as much later as it jumps.
create or replace function orchestrator._fire_times_between(
  c orchestrator._cron_fields, p_timezone text, p_after timestamptz, p_until timestamptz)
returns setof timestamptz language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_after timestamp := p_after at time zone 'UTC';
  v_until timestamp := p_until at time zone 'UTC';
  v_first date := (p_after at time zone p_timezone)::date - 1;   -- the clock may jump from one day into the next, and back
  v_last date := (p_until at time zone p_timezone)::date + 1;
begin
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
      and case when c.either_day then extract(day from d.day)::int = any (c.days) or extract(dow from d.day)::int = any (c.weekdays)
               else extract(day from d.day)::int = any (c.days) and extract(dow from d.day)::int = any (c.weekdays) end
      and t.at > v_after and t.at <= v_until;
end $$;

create or replace function orchestrator.fire_times(
  p_cron text, p_timezone text default 'UTC', p_after timestamptz default now(), p_n int default 5, p_until timestamptz default 'infinity')
returns setof timestamptz language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  c orchestrator._cron_fields := orchestrator._parse_cron(p_cron);
  v_left int := p_n;
  v_found int;
  v_from timestamptz := p_after;
  v_to timestamptz;
  v_span interval := interval '2 hours';
  v_give_up timestamptz;
begin
  if isfinite(p_after) is not true then
    perform orchestrator._invalid('after', 'must be a moment', 'Leave it out for the times from now on.');
  end if;
  begin
    perform p_after at time zone p_timezone;
  exception when invalid_parameter_value then
    perform orchestrator._invalid('timezone', format('there is no %L', p_timezone), 'Such as UTC or Europe/Berlin: see pg_timezone_names.');
  end;
  if c.every is not null then
    return query
      select u.at
      from (select to_timestamp(c.every * (floor(extract(epoch from p_after) / c.every) + k)) from generate_series(1, p_n) k) u(at)
      where u.at <= p_until;
    return;
  end if;
  while v_left > 0 loop
    v_give_up := coalesce(v_give_up, v_from + interval '360000 hours');   -- 29 February may be a Sunday 40 years from now
    v_to := least(v_from + v_span, p_until, v_give_up);
    return query
      select f.at from orchestrator._fire_times_between(c, p_timezone, v_from, v_to) f(at) order by f.at limit v_left;
    get diagnostics v_found = row_count;
    exit when v_to >= least(p_until, v_give_up);
    if v_found > 0 then v_give_up := null; end if;
    v_left := v_left - v_found;
    v_from := v_to;
    v_span := v_span * 5;
  end loop;
end $$;
comment on function orchestrator.fire_times(text, text, timestamptz, int, timestamptz) is
  'The next p_n times of a cron expression after p_after, up to p_until. Minute hour day month weekday, each *, a number, a name, a '
  'range, with or without /step, or a list of these; @hourly, @daily, @weekly, @monthly, @yearly; or @every INTERVAL, in whole '
  'seconds counted from 1970. If day and weekday are both restricted, either is enough. Where the clock jumps over a fixed hour, it '
  'fires as much later; where the hour comes twice, at the first. Hours * and */n follow real time. Looks 41 years ahead. Raises OR001.';

-- The last fire time in (p_after, p_until], looked for in spans that grow backwards; null if there is none.
create or replace function orchestrator._last_fire_time(p_cron text, p_timezone text, p_after timestamptz, p_until timestamptz)
returns timestamptz language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  c orchestrator._cron_fields := orchestrator._parse_cron(p_cron);
  v_to timestamptz := p_until;
  v_from timestamptz;
  v_span interval := interval '2 hours';
  v_last timestamptz;
begin
  if c.every is not null then
    v_last := to_timestamp(c.every * floor(extract(epoch from p_until) / c.every));
    return case when v_last > p_after then v_last end;
  end if;
  while v_last is null and v_to > p_after loop
    v_from := greatest(p_after, v_to - v_span);
    select max(f.at) into v_last from orchestrator._fire_times_between(c, p_timezone, v_from, v_to) f(at);
    v_to := v_from;
    v_span := v_span * 5;
  end loop;
  return v_last;
end $$;
