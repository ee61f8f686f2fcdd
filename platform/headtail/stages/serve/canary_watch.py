"""The supervisor's watch on a canary: counts of both releases, window by window, into the sequential test.

In: the shared counters, the canary's record. Out: entries of the record; one of them takes the canary back when it is proven worse, and
fronts follow it. Knows nothing of requests.
"""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

from headtail.adapters.storage import Storage
from headtail.core.secrets import hide
from headtail.releases.canary import ArmCounts, CanaryRecord, CanaryWatcher, is_running, read_canary
from headtail.stages.serve.front.counters import ARM_KINDS, read_counters

log = logging.getLogger("headtail.serve")
WINDOW_S = 10.0


class CanaryWatch:
    """Compares in a thread of its own, from `start` to `close`. `settle_s`: seconds in which all fronts have read a new record."""

    def __init__(self, store: Storage, counters: Path, settle_s: float, watcher: CanaryWatcher | None = None) -> None:
        self._store, self._counters, self._settle_s = store, counters, settle_s
        self._watcher = watcher or CanaryWatcher(store)
        self._record: CanaryRecord | None = None
        self._salt, self._since, self._before = "", 0.0, dict[str, float]()
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to watch."""
        self._thread = threading.Thread(target=self._watch, name="headtail-canary", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Take in the last window, and end."""
        self._end.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(WINDOW_S):
            self._try()
        self._try(last=True)

    def _try(self, last: bool = False) -> None:
        try:
            if self.step() and last:
                self._watcher.save()
        except Exception as error:  # a store out of reach: the next window holds what this one missed
            log.warning("the canary cannot be compared now: %s", hide(str(error))[:300])

    def step(self) -> bool:
        """Take in what was counted since the last step; whether a canary runs."""
        self._record = record = read_canary(self._store, self._record)
        if record is None or not is_running(self._store, record):
            self._salt = ""
            return False
        if record.salt != self._salt:  # a new canary: counts of the one before go on for a moment
            self._salt, self._since, self._before = record.salt, time.monotonic(), {}
        if time.monotonic() - self._since < self._settle_s:
            return False
        sums = read_counters(self._counters).sums
        if not self._before:
            self._before = sums
            return True
        champion, canary = (self._arm(arm, sums) for arm in ("champion", "canary"))
        self._before = sums
        if champion.queries or canary.queries:
            self._record = self._watcher.add(record, champion, canary)
        return True

    def _arm(self, arm: str, sums: dict[str, float]) -> ArmCounts:
        return ArmCounts(**{kind: int(sums[f"arm/{arm}/{kind}"] - self._before[f"arm/{arm}/{kind}"]) for kind in ARM_KINDS})
