"""What escalation may cost: so many a minute, so many USD an hour and a day, over all front processes of a node.

In: wishes to escalate, and what each cost in the end. Out: a Reservation, or none when the budget is spent. It is kept in one mapped file
that the processes share and that outlives the server: a restart does not begin a new budget. An escalation reserves what the dearest
one so far cost, so the budget is exceeded at most by those that are under way when a dearer one shows. Windows are the clock's (UTC):
this minute, this hour, this day. Knows nothing of models or queries.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

_NUMBERS = 7
MINUTE, COUNT, HOUR, HOUR_USD, DAY, DAY_USD, DEAREST = range(_NUMBERS)
_TRIES = 2000  # for the lock, each about a microsecond: a process that was stopped while it holds it does not stop the others


class Reservation(NamedTuple):
    """USD that are held for one escalation, and the hour and day that they are counted in."""

    usd: float
    hour: float
    day: float


class EscalationBudget:
    """The budget. 0 is no limit. `path`: the file that the processes of a node share."""

    def __init__(
        self, path: Path, per_minute: int, usd_per_hour: float, usd_per_day: float, clock: Callable[[], float] = time.time
    ) -> None:
        self._per_minute, self._usd_per_hour, self._usd_per_day, self._clock = per_minute, usd_per_hour, usd_per_day, clock
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if os.fstat(self._file).st_size < _NUMBERS * 8:
            os.ftruncate(self._file, _NUMBERS * 8)
        self._map = mmap.mmap(self._file, _NUMBERS * 8)
        self._held = memoryview(self._map).cast("d")

    def reserve(self) -> Reservation | None:
        """Room for one escalation; None when there is none left."""
        with self._lock() as locked:
            if not locked:
                return None
            held = self._held
            _, hour, day = self._turn()
            usd = held[DEAREST]
            if (
                (self._per_minute and held[COUNT] + 1 > self._per_minute)
                or (self._usd_per_hour and held[HOUR_USD] + usd > self._usd_per_hour)
                or (self._usd_per_day and held[DAY_USD] + usd > self._usd_per_day)
            ):
                return None
            held[COUNT] += 1
            held[HOUR_USD] += usd
            held[DAY_USD] += usd
            return Reservation(usd, hour, day)

    def charge(self, reservation: Reservation, usd: float) -> None:
        """What an escalation cost, in place of what was reserved for it; 0 when it never reached the model."""
        with self._lock() as locked:
            if not locked:
                return  # what was reserved stays
            held = self._held
            _, hour, day = self._turn()
            held[DEAREST] = max(held[DEAREST], usd)
            if reservation.hour == hour:
                held[HOUR_USD] = max(0.0, held[HOUR_USD] + usd - reservation.usd)
            if reservation.day == day:
                held[DAY_USD] = max(0.0, held[DAY_USD] + usd - reservation.usd)

    def close(self) -> None:
        """Let go of the file."""
        self._held.release()
        self._map.close()
        os.close(self._file)

    def _turn(self) -> tuple[float, float, float]:
        """This minute, hour and day; a window that is over begins anew."""
        held, now = self._held, self._clock()
        windows = now // 60, now // 3600, now // 86400
        for window, at, spent in zip(windows, (MINUTE, HOUR, DAY), (COUNT, HOUR_USD, DAY_USD), strict=True):
            if held[at] != window:
                held[at], held[spent] = window, 0.0
        return windows

    @contextmanager
    def _lock(self) -> Iterator[bool]:
        for _ in range(_TRIES):
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                continue
        else:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)
