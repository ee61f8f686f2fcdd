"""What was asked twice and what that cost, from the log that `faults` keeps: row by row, kill by kill, not from headtail's books.

In: lines of time, pid, kind, what. Out: an Account: rows given more than once, and per kill the job's seconds that were
lost with it and the seconds until a row was asked again. Pure but for reading the log.

Lost with a kill: the time between completions that went into rows which were asked again, and in each killed process the
time since its last completion, if a row was with the engine. Starting an engine is no repeated work: it is counted apart.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple


class Event(NamedTuple):
    """One line. Kinds: s generate began, a row asked, d row done, e row ended in an error, k kill, f write failed on purpose."""

    time: float
    pid: int
    kind: str
    what: str


class Follow:
    """The events of a log that grows, read as far as it goes."""

    def __init__(self, path: Path) -> None:
        self.path, self.events, self._rest, self._at = path, list[Event](), b"", 0

    def read(self) -> list[Event]:
        """All events so far."""
        if self.path.exists():
            with self.path.open("rb") as file:
                file.seek(self._at)
                data = self._rest + file.read()
                self._at = file.tell()
            *lines, self._rest = data.split(b"\n")
            self.events += [_event(line) for line in lines]
        return self.events

    def count(self, kind: str) -> int:
        return sum(event.kind == kind for event in self.read())

    def first(self, kind: str) -> float:
        """The time of the first such event; 0 when there is none."""
        return next((event.time for event in self.read() if event.kind == kind), 0.0)

    def workers(self) -> list[int]:
        """Process ids that ran an engine, in order of their start."""
        return list(dict.fromkeys(event.pid for event in self.read() if event.kind == "s"))


def _event(line: bytes) -> Event:
    time, pid, kind, what = line.decode().split(" ", 3)
    return Event(float(time), int(pid), kind, what)


@dataclass
class Account:
    """`lost` and `idle` have an entry per kill, in order of time."""

    rows: int = 0
    lost: list[float] = field(default_factory=list)
    idle: list[float] = field(default_factory=list)
    unkilled: int = 0  # rows given twice although nothing was killed


def account(events: Sequence[Event]) -> Account:
    """The Account of one job's events. A row that ended in an error and is asked again repeats nothing."""
    events = sorted(events, key=lambda event: event.time)
    kills = [event for event in events if event.kind in "kf"]
    times = [kill.time for kill in kills]
    made = Account(lost=[0.0] * len(kills), idle=[0.0] * len(kills))
    spent, given = _spent(events)
    for given_times in given.values():
        for event in given_times[:-1]:
            made.rows += 1
            if kills:  # the kill that followed; what an orphan does after the last one was lost with that
                made.lost[min(bisect_left(times, event.time), len(kills) - 1)] += spent[event]
            else:
                made.unkilled += 1
    asked = [event.time for event in events if event.kind == "a"]
    for place, kill in enumerate(kills):
        made.lost[place] += _in_flight(events, kill)
        following = times[place + 1] if place + 1 < len(times) else float("inf")
        at = bisect_right(asked, kill.time)
        if at < len(asked) and asked[at] <= following:
            made.idle[place] = asked[at] - kill.time
    return made


def _spent(events: Sequence[Event]) -> tuple[dict[Event, float], dict[str, list[Event]]]:
    """Seconds that each completion took since the one before in its process; and the completions of each row."""
    last: dict[int, float] = {}
    spent: dict[Event, float] = {}
    given: dict[str, list[Event]] = defaultdict(list)
    for event in events:
        if event.kind in "de":
            spent[event] = event.time - last.get(event.pid, event.time)
        if event.kind == "d":
            given[event.what].append(event)
        if event.kind in "sde":
            last[event.pid] = event.time
    return spent, given


def _in_flight(events: Sequence[Event], kill: Event) -> float:
    """Seconds from the last completion in the killed process to its end, if a row was with its engine."""
    out, last = 0, kill.time
    end = bisect_left(events, kill.time, key=lambda event: event.time)
    for event in events[:end]:
        if event.pid == kill.pid:
            out += {"a": 1, "d": -1, "e": -1}.get(event.kind, 0)
            last = event.time if event.kind in "sde" else last
    return kill.time - last if out > 0 else 0.0
