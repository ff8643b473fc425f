"""What fire_times must return, worked out in another way: by zoneinfo, and minute by minute where the hour field starts with *."""
from __future__ import annotations

import random
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from zoneinfo import ZoneInfo

# Half-hour and two-hour changes, negative daylight saving, changes at midnight and across it, jumps of three hours, none at all.
ZONES = ["UTC", "Africa/Cairo", "Africa/Casablanca", "America/Havana", "America/New_York", "America/Nuuk", "America/Santiago",
         "America/Scoresbysund", "America/St_Johns", "Antarctica/Casey", "Antarctica/Troll", "Asia/Beirut", "Asia/Gaza", "Asia/Kathmandu",
         "Asia/Pyongyang", "Asia/Tehran", "Australia/Lord_Howe", "Europe/Berlin", "Europe/Dublin", "Pacific/Chatham"]
DAYS = 2  # that a window has
MINUTE = timedelta(minutes=1)


@dataclass(frozen=True)
class Cron:
    text: str
    minutes: frozenset[int]
    hours: frozenset[int]
    days: frozenset[int]
    months: frozenset[int]
    weekdays: frozenset[int]  # 0 = Sunday

    @property
    def every_hour(self) -> bool:
        return self.text.split()[1].startswith("*")

    def on(self, day: int, month: int, weekday: int) -> bool:
        _, _, days, _, weekdays = self.text.split()
        one, other = day in self.days, weekday in self.weekdays
        either = not days.startswith("*") and not weekdays.startswith("*")
        return month in self.months and ((one or other) if either else (one and other))


def random_cron(chance: random.Random) -> Cron:
    fields = [_random_field(chance, *limits) for limits in ((0, 59, .2), (0, 23, .35), (1, 31, .6), (1, 12, .8), (0, 7, .6))]
    minutes, hours, days, months, weekdays = (numbers for _, numbers in fields)
    return Cron(" ".join(text for text, _ in fields), minutes, hours, days, months, frozenset(number % 7 for number in weekdays))


def _random_field(chance: random.Random, low: int, high: int, star: float) -> tuple[str, frozenset[int]]:
    kind = chance.random()
    if kind < star:
        return "*", frozenset(range(low, high + 1))
    if kind < star + .15:
        step = chance.randint(1, max(2, (high - low) // 2))
        return f"*/{step}", frozenset(range(low, high + 1, step))
    texts: list[str] = []
    numbers: set[int] = set()
    for _ in range(chance.randint(1, 3)):
        first, step = chance.randint(low, high), chance.randint(1, 9)
        last = chance.randint(first, high)
        text, found = chance.choice([
            (f"{first}", [first]), (f"{first}", [first]), (f"{first}-{last}", range(first, last + 1)),
            (f"{first}-{last}/{step}", range(first, last + 1, step)), (f"{first}/{step}", range(first, high + 1, step))])
        texts.append(text)
        numbers.update(found)
    return ",".join(texts), frozenset(numbers)


@dataclass(frozen=True)
class Window:
    """Two days from a start, in a zone: most have a change of the clock in them."""

    zone: str
    start: datetime

    @property
    def end(self) -> datetime:
        return self.start + timedelta(days=DAYS)

    def local_minutes(self) -> list[tuple[int, int, int, int, int, int]]:
        """(minutes since 1970, minute, hour, day, month, weekday) of each whole minute after the start, up to the end."""
        zone = ZoneInfo(self.zone)
        at = self.start.replace(second=0) + MINUTE
        found = []
        while at <= self.end:
            local = at.astimezone(zone)
            found.append((int(at.timestamp()) // 60, local.minute, local.hour, local.day, local.month, local.isoweekday() % 7))
            at += MINUTE
        return found

    def fires(self, cron: Cron, local_minutes: list[tuple[int, int, int, int, int, int]]) -> list[int]:
        """Its fire times in the window, in minutes since 1970."""
        if cron.every_hour:
            return [at for at, minute, hour, day, month, weekday in local_minutes
                    if minute in cron.minutes and hour in cron.hours and cron.on(day, month, weekday)]
        zone, found = ZoneInfo(self.zone), set()
        for number in range(-2, DAYS + 3):
            day = self.start.astimezone(zone).date() + timedelta(days=number)
            if cron.on(day.day, day.month, day.isoweekday() % 7):
                for hour in cron.hours:
                    for minute in cron.minutes:
                        # fold=0: the first of two; where there is none, by the offset before the change
                        local = datetime(day.year, day.month, day.day, hour, minute, tzinfo=zone, fold=0)
                        if self.start < (at := local.astimezone(UTC)) <= self.end:
                            found.add(int(at.timestamp()) // 60)
        return sorted(found)


@lru_cache
def changes(zone: str) -> list[datetime]:
    """The hours, from 2015 to 2036, before which the clock changed."""
    clock, found = ZoneInfo(zone), []
    at = datetime(2015, 1, 1, tzinfo=UTC)
    before = at.astimezone(clock).utcoffset()
    while at.year < 2037:
        at += timedelta(hours=6)
        if (now := at.astimezone(clock).utcoffset()) != before:
            found.append(at)
            before = now
    return found


def random_window(chance: random.Random, zone: str) -> Window:
    """Of ten, four around any change of the clock, four around one from 2027 to 2030, two anywhere."""
    kind = chance.random()
    near = [at for at in changes(zone) if kind >= .4 or 2027 <= at.year <= 2030]
    if kind < .8 and near:
        start = chance.choice(near) - timedelta(hours=chance.randint(1, 40))
    else:
        start = datetime(2015, 1, 1, tzinfo=UTC) + timedelta(hours=chance.randrange(22 * 365 * 24))
    return Window(zone, start + timedelta(minutes=chance.randint(0, 59), seconds=chance.randint(0, 59)))
