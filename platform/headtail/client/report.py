"""What a client tells the server of its local hits, now and then: how many by release and source, and how long they took. No query.

In: hits. Out: a POST to /v1/client/hits every few seconds from a thread of its own, and a last one at the end. A report that the server
does not take is lost and counted: sent again it might count twice. Off unless `report_s` is set.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx

from headtail.core.buckets import BUCKETS, bucket_of

PATH = "/v1/client/hits"
_TIMEOUT_S = 5.0


class _Tally:
    """Hits of one release that are not reported yet."""

    def __init__(self) -> None:
        self.sources: Counter[str] = Counter()
        self.seconds = [0] * (len(BUCKETS) + 1)
        self.sum = 0.0


class HitReport:
    """Counts hits and reports them. `open_http`: a client whose base URL is the server. Safe in threads; a forked child starts anew."""

    def __init__(self, open_http: Callable[[], httpx.Client], every_s: float) -> None:
        self._open_http, self._every_s = open_http, every_s
        self.lost = 0
        self._begin()

    def note(self, release: str, source: str, seconds: float, times: int = 1) -> None:
        """Hits of one query: one look-up of so many seconds."""
        if self._pid != os.getpid():
            self._begin()  # the parent reports its own
        with self._lock:
            tally = self._tallies.get(release)
            if tally is None:
                tally = self._tallies[release] = _Tally()
            tally.sources[source] += times
            tally.seconds[bucket_of(seconds)] += times
            tally.sum += seconds * times

    def close(self) -> None:
        """Report what is left, and end the thread."""
        if self._pid == os.getpid():
            self._end.set()
            self._thread.join()

    def _begin(self) -> None:
        self._pid, self._lock, self._end = os.getpid(), threading.Lock(), threading.Event()
        self._tallies: dict[str, _Tally] = {}
        self._thread = threading.Thread(target=self._report, args=(self._end,), name="headtail-report", daemon=True)
        self._thread.start()

    def _report(self, end: threading.Event) -> None:
        with self._open_http() as http:
            while not end.wait(self._every_s):
                self._send(http)
            self._send(http)

    def _send(self, http: httpx.Client) -> None:
        with self._lock:
            tallies, self._tallies = self._tallies, {}
        for release, tally in tallies.items():
            body: dict[str, Any] = {"release": release, "hits": tally.sources, "seconds": tally.seconds, "sum_s": tally.sum}
            try:
                taken = http.post(PATH, json=body, timeout=_TIMEOUT_S).is_success
            except httpx.HTTPError:
                taken = False
            self.lost += 0 if taken else tally.sources.total()
