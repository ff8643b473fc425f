"""sql/21_cron.sql: which times a cron expression stands for."""
from __future__ import annotations

import itertools
import os
import random
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import psycopg
import pytest

from cron_reference import ZONES, Cron, Window, random_cron, random_window
from steps import column, value

SEED = int(os.environ.get("CRON_SEED", "1"))
CASES = int(os.environ.get("CRON_CASES", "2000"))  # random expressions; 20 for each window of two days
EVERY_DAY = frozenset(range(1, 32)), frozenset(range(1, 13)), frozenset(range(7))


def at(text):
    return datetime.fromisoformat(text).astimezone(UTC)


def fires(conn, cron, zone="UTC", after="2026-11-26T12:00Z", n=5, until="infinity"):
    return column(conn, "select orchestrator.fire_times(%s, %s, %s, %s, %s)", cron, zone, after, n, until)


def local(conn, cron, zone, after, n=4):
    """Fire times as a clock on the wall shows them, with its offset."""
    return [moment.astimezone(ZoneInfo(zone)).strftime("%d %H:%M %z") for moment in fires(conn, cron, zone, after, n)]


def same_zone_data(conn, window):
    """Whether this machine's zone data and the server's agree around a window."""
    hours = [window.start + timedelta(minutes=30 * n) for n in range(-96, 48 * 2 + 97)]
    theirs = column(conn, "select u.at at time zone %s from unnest(%s::timestamptz[]) u(at)", window.zone, hours)
    return theirs == [hour.astimezone(ZoneInfo(window.zone)).replace(tzinfo=None) for hour in hours]


def windows(conn, seed, n):
    """Random windows, the zones in turn, where both zone data agree."""
    try:
        ZoneInfo("Europe/Berlin")
    except KeyError:
        pytest.skip("this machine has no zone data to compare with: install tzdata")
    chance = random.Random(seed)
    found = [random_window(chance, ZONES[number % len(ZONES)]) for number in range(n)]
    agreed = [window for window in found if same_zone_data(conn, window)]
    assert len(agreed) > n * .8
    return chance, agreed


def in_minutes(rows):
    return [[moment // 60 for moment in row] for (row,) in rows]


BATCH = """
  select array(select extract(epoch from f)::bigint from orchestrator.fire_times(cron, %(zone)s, %(start)s, 5000, %(end)s) f)
  from unnest(%(crons)s::text[]) with ordinality u(cron, o) order by o
"""


def test_random_expressions_fire_when_the_reference_says(pure):
    """2,000 expressions in 20 zones, most around a change of the clock; CRON_CASES and CRON_SEED make it more, and others."""
    chance, agreed = windows(pure, SEED, CASES // 20)
    times = 0
    for window in agreed:
        minutes = window.local_minutes()
        crons = [random_cron(chance) for _ in range(20)]
        given = {"zone": window.zone, "start": window.start, "end": window.end, "crons": [cron.text for cron in crons]}
        for cron, got in zip(crons, in_minutes(pure.execute(BATCH, given)), strict=True):
            expected = window.fires(cron, minutes)
            times += len(expected)
            assert got == expected, (cron.text, window)
    assert times > 100 * len(agreed)


def test_any_split_of_time_gives_the_same_fire_times(pure):
    """One call, calls for one time each, calls from one moment to the next, and the last time up to each moment."""
    chance, agreed = windows(pure, SEED + 1, 30)
    for window in agreed:
        cron = random_cron(chance)
        whole = fires(pure, cron.text, window.zone, window.start, 5000, window.end)
        cuts = [window.start, *sorted(window.start + timedelta(seconds=chance.randrange(2 * 86400)) for _ in range(6)), window.end]
        parts = [fires(pure, cron.text, window.zone, one, 5000, other) for one, other in itertools.pairwise(cuts)]
        assert [moment for part in parts for moment in part] == whole, (cron.text, window)
        for cut in cuts[1:]:
            last = value(pure, "select orchestrator._last_fire_time(%s, %s, %s, %s)", cron.text, window.zone, window.start, cut)
            assert last == max((moment for moment in whole if moment <= cut), default=None), (cron.text, window, cut)
        for before, after in zip([window.start, *whole[:9]], whole[:10], strict=False):
            assert fires(pure, cron.text, window.zone, before, 1) == [after], (cron.text, window)


def test_a_jump_over_midnight_keeps_all_times_and_their_order(pure):
    """In Nuuk, 23:00 is followed by 00:00 of the next day: 23:30 fires at 00:30, after what is due at 00:15."""
    window = Window("America/Nuuk", at("2025-03-29T20:00Z"))
    cron = Cron("15,30 0,23 * * *", frozenset({15, 30}), frozenset({0, 23}), *EVERY_DAY)
    found = fires(pure, cron.text, window.zone, window.start, 100, window.end)
    assert [int(moment.timestamp()) // 60 for moment in found] == window.fires(cron, [])
    assert found == sorted(set(found))
    assert local(pure, "45 23 * * *", "America/Nuuk", "2025-03-30T01:00Z", 2) == ["30 00:45 -0100", "30 23:45 -0100"]


def test_a_midnight_that_comes_twice_belongs_to_the_same_day(pure):
    """In St. John's, 00:01 was followed by 23:01 of the day before."""
    assert local(pure, "0 0 7 11 *", "America/St_Johns", "2010-11-07T02:00Z", 1) == ["07 00:00 -0230"]
    until = at("2010-11-07T03:00Z")   # there, 23:30 of the day before
    assert fires(pure, "0 0 7 11 *", "America/St_Johns", "2010-11-07T02:00Z", 5, until) == [at("2010-11-07T02:30:00Z")]
    found = local(pure, "0 */12 7 11 *", "America/St_Johns", "2010-11-07T02:00Z", 3)
    assert found == ["07 00:00 -0230", "07 00:00 -0330", "07 12:00 -0330"]


@pytest.mark.parametrize(("cron", "expected"), [
    ("* * * * *", ["12:01", "12:02", "12:03"]),
    ("*/20 * * * *", ["12:20", "12:40", "13:00"]),
    ("50/5 * * * *", ["12:50", "12:55", "13:50"]),
    ("10-12,40 * * * *", ["12:10", "12:11", "12:12"]),
    ("  5   13  *  * *  ", ["13:05", "27 13:05", "28 13:05"]),
    ("@hourly", ["13:00", "14:00", "15:00"]),
    ("@Daily", ["27 00:00", "28 00:00", "29 00:00"]),
    ("@midnight", ["27 00:00", "28 00:00", "29 00:00"]),
    ("@weekly", ["29 00:00", "12-06 00:00", "12-13 00:00"]),
    ("@monthly", ["12-01 00:00", "2027-01-01 00:00", "2027-02-01 00:00"]),
    ("@yearly", ["2027-01-01 00:00", "2028-01-01 00:00", "2029-01-01 00:00"]),
    ("@annually", ["2027-01-01 00:00", "2028-01-01 00:00", "2029-01-01 00:00"]),
    ("0 9 * * mon-fri", ["27 09:00", "30 09:00", "12-01 09:00"]),
    ("0 9 * * FRI-Sun", ["27 09:00", "28 09:00", "29 09:00"]),
    ("0 9 * * 7", ["29 09:00", "12-06 09:00", "12-13 09:00"]),
    ("0 9 * * 0", ["29 09:00", "12-06 09:00", "12-13 09:00"]),
    ("0 0 * jan,Jul *", ["2027-01-01 00:00", "2027-01-02 00:00", "2027-01-03 00:00"]),
    ("0 0 13 * fri", ["27 00:00", "12-04 00:00", "12-11 00:00"]),        # both restricted: either is enough
    ("0 0 */2 * sun", ["29 00:00", "12-13 00:00", "12-27 00:00"]),       # a day field that starts with * isn't restricted: both
    ("0 0 29 2 *", ["2028-02-29 00:00", "2032-02-29 00:00", "2036-02-29 00:00"]),
    ("0 0 29 2 */7", ["2032-02-29 00:00", "2060-02-29 00:00", "2088-02-29 00:00"]),
    ("@every 90 seconds", ["12:01:30", "12:03", "12:04:30"]),
    ("@every 1 hour 30 minutes", ["13:30", "15:00", "16:30"]),
    ("@EVERY 1 day", ["27 00:00", "28 00:00", "29 00:00"]),
    ("@every 7 days", ["12-03 00:00", "12-10 00:00", "12-17 00:00"]),
])
def test_an_expression_stands_for_these_times(pure, cron, expected):
    """After Thursday, 2026-11-26 12:00 UTC."""
    assert fires(pure, cron, n=3) == [moment(text) for text in expected]


def moment(text):
    """`12:01`, `27 00:00`, `12-06 00:00` and so on, the rest as of 2026-11-26."""
    day, _, time = text.rpartition(" ")
    return at(f"{'2026-11-26'[:10 - len(day)]}{day}T{time}Z")


@pytest.mark.parametrize(("cron", "part"), [
    (None, "five fields"), ("", "five fields"),
    ("* * * *", "five fields"), ("* * * * * *", "five fields"), ("@reboot", "five fields"),
    ("60 * * * *", "minute: '60' is not a list of values from 0 to 59"), ("* 24 * * *", "hour"), ("* * 0 * *", "day"),
    ("* * 32 * *", "day"),     ("* * * 13 *", "month"), ("* * * * 8", "weekday"), ("5-1 * * * *", "minute"), ("*/0 * * * *", "minute"),
    ("1, * * * *", "minute"),
    ("-1 * * * *", "minute"), ("*/ * * * *", "minute"), ("1.5 * * * *", "minute"), ("* * l * *", "day"), ("* * 15w * *", "day"),
    ("* * * * 5#2", "weekday"), ("? * * * *", "minute"), ("mon * * * *", "minute"), ("* * * foo *", "month"), ("* * * * monday", "weekday"),
    ("* * * * fri-mon", "weekday"), ("*-5 * * * *", "minute"), ("١ * * * *", "minute"),
    ("@every", "five fields"), ("@every ", "five fields"), ("@every soon", "@every"), ("@every 0 seconds", "@every"),
    ("@every -1 hour", "@every"), ("@every 1.5 seconds", "@every"), ("@every 1 month", "@every"), ("@every 1 year", "@every"),
    ("@every 3651 days", "@every"), ("@every infinity", "@every"), ("@every 999999999999999 days", "@every"),
])
def test_what_is_no_expression_is_refused_with_the_field(pure, cron, part):
    with pytest.raises(psycopg.Error, match="cron: ") as caught:
        fires(pure, cron)
    assert caught.value.sqlstate == "OR001" and caught.value.diag.column_name == "cron"
    assert part in str(caught.value) and caught.value.diag.message_hint


def test_a_date_that_never_comes_has_no_times_and_takes_no_time(pure):
    assert fires(pure, "0 0 31 2 *") == [] and fires(pure, "* * 30 feb *") == []


def test_an_unknown_zone_and_a_time_without_end_are_refused(pure):
    with pytest.raises(psycopg.Error, match="timezone: there is no 'Mars/Base'"):
        fires(pure, "* * * * *", "Mars/Base")
    with pytest.raises(psycopg.Error, match="after: must be a moment"):
        fires(pure, "* * * * *", after="-infinity")


def test_fire_times_ends_after_n_times_or_at_until(pure):
    assert fires(pure, "* * * * *", n=0) == []
    assert len(fires(pure, "*/7 * * * *", n=3000)) == 3000
    assert len(fires(pure, "@yearly", n=200)) == 200
    until = at("2026-11-26T12:30:00Z")
    assert fires(pure, "*/15 * * * *", n=10, until=until)[-1] == until and len(fires(pure, "@every 10 minutes", n=10, until=until)) == 3
    assert fires(pure, "*/15 * * * *", n=10, until=at("2026-11-26T12:14:59Z")) == []
    assert len(column(pure, "select orchestrator.fire_times('@hourly')")) == 5


def test_fixed_hours_that_the_clock_jumps_over_fire_as_much_later_once(pure):
    assert local(pure, "30 2 * * *", "Europe/Berlin", "2026-03-28T00:00+01:00", 3) == ["28 02:30 +0100", "29 03:30 +0200", "30 02:30 +0200"]
    found = local(pure, "30 2,3 * * *", "Europe/Berlin", "2026-03-28T12:00+01:00", 3)
    assert found == ["29 03:30 +0200", "30 02:30 +0200", "30 03:30 +0200"]
    assert local(pure, "15 2 * * *", "Australia/Lord_Howe", "2026-10-03T12:00Z", 2) == ["04 02:45 +1100", "05 02:15 +1100"]


def test_when_the_clock_jumps_forward_every_hour_goes_on_and_nothing_is_added(pure):
    assert local(pure, "30 * * * *", "Europe/Berlin", "2026-03-29T00:00Z", 3) == ["29 01:30 +0100", "29 03:30 +0200", "29 04:30 +0200"]
    assert local(pure, "30 */2 * * *", "Europe/Berlin", "2026-03-28T23:00Z", 2) == ["29 00:30 +0100", "29 04:30 +0200"]


def test_fixed_hours_that_come_twice_fire_once_at_the_first(pure):
    assert local(pure, "30 2 * * *", "Europe/Berlin", "2026-10-24T00:00Z", 3) == ["24 02:30 +0200", "25 02:30 +0200", "26 02:30 +0100"]
    assert local(pure, "30 0-23 * * *", "Europe/Berlin", "2026-10-25T00:00Z", 2) == ["25 02:30 +0200", "25 03:30 +0100"]


def test_when_the_clock_goes_back_every_hour_fires_in_both_hours(pure):
    assert local(pure, "30 * * * *", "Europe/Berlin", "2026-10-25T00:00Z", 3) == ["25 02:30 +0200", "25 02:30 +0100", "25 03:30 +0100"]
    assert local(pure, "30 */2 * * *", "Europe/Berlin", "2026-10-25T00:00Z", 3) == ["25 02:30 +0200", "25 02:30 +0100", "25 04:30 +0100"]


def test_every_interval_is_real_time_whatever_the_session_s_zone(connect):
    """A day is 24 hours, also where one has 23."""
    conn = connect(options="-c timezone=Europe/Berlin -c intervalstyle=sql_standard")
    found = fires(conn, "@every 1 day", "Europe/Berlin", "2026-03-28T00:00Z", 3)
    assert found == [at(f"2026-03-{day}T00:00Z") for day in (29, 30, 31)]
    assert fires(conn, "0 12 * * *", "UTC", "2026-03-28T13:00Z", 2) == [at(f"2026-03-{day}T12:00Z") for day in (29, 30)]
