"""Counters that all processes of a server share: one file, mapped by each, one row per front process.

In: what a front counts. Out: the sums over all rows, for `/metrics` and `status`. A row has one writer, so nothing is locked; a
process that takes the place of a dead one goes on with its row. Knows nothing of Prometheus or HTTP.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from headtail.core.buckets import BUCKETS, bucket_of
from headtail.core.rows import Source
from headtail.stages.serve.answerer import REASONS
from headtail.stages.serve.errors import CODES

PATHS = ("cache", "realtime", "escalated", "fallback")
# Numbers of a row that only grow.
REQUESTS = [f"requests/{path}/{source}" for path in PATHS for source in Source]
BUCKET_COUNTS = [f"seconds/{path}/{i}" for path in PATHS for i in range(len(BUCKETS) + 1)]
DEGRADED = [f"degraded/{reason}" for reason in REASONS]
REFUSED = [f"refused/{code}" for code in CODES]
ARM_KINDS = ("queries", "errors", "degraded", "slow")
ARMS = [f"arm/{arm}/{kind}" for arm in ("champion", "canary") for kind in ARM_KINDS]  # each query once, while a canary runs
FEEDBACK_KINDS = ("up", "down", "corrected", "used", "unused")
FEEDBACKS = [f"feedback/{kind}" for kind in FEEDBACK_KINDS]
ESCALATION_RESULTS = (
    *("answered", "budget", "overloaded", "timeout", "unavailable", "outdated", "truncated", "invalid", "withheld", "error", "left"),
)
ESCALATIONS = [f"escalation/{result}" for result in ESCALATION_RESULTS]
SHADOWS = [f"shadow/{source}/{kind}" for source in Source for kind in ("compared", "agreed")]
CLIENT_STATES = ("current", "other")  # whether a client's hit was of the release that the front serves
CLIENTS = [f"client/{state}/{source}" for state in CLIENT_STATES for source in Source]
CLIENT_BUCKETS = [f"client_seconds/{i}" for i in range(len(BUCKETS) + 1)]
EVENTS = [
    "client_microseconds",
    "escalation_nanousd",
    "escalation_tokens_in",
    "escalation_tokens_out",
    "log_lines",
    "log_dropped",
    "feedback_lines",
    "feedback_dropped",
    "trace_spans",
    "trace_dropped",
    "tokens_in",
    "tokens_out",
    "refresh_failures",
    "shadow_dropped",
    "shadow_asked",
    "shadow_microusd",
    "callers_left",
    "admin_calls",
    "failed_logins",
    "limited_logins",
    "student_frames",
    "student_misses",
    "starts",
]
SUMS = [f"seconds/{path}/sum" for path in PATHS]  # of seconds
# Numbers of a row that only grow, and are set once a second: see `store_counts`.
STORES = ["cpu_microseconds", "dynamic_misses", "dynamic_spoiled", "redis_failures", "redis_skipped", "unlimited", "key_file_failures"]
# Numbers of a row that are set. Ids of 16 hexadecimal digits are held as whole numbers.
GAUGES = [
    "pid",
    "release",
    "snapshot",
    "canary",
    "students",
    "bigger_models",
    "student_queue",
    "in_flight",
    "swapped_at",
    "published_at",
    "snapshot_rows",
    *STORES,
]
_NAMES = [
    *REQUESTS,
    *BUCKET_COUNTS,
    *DEGRADED,
    *REFUSED,
    *ARMS,
    *FEEDBACKS,
    *SHADOWS,
    *CLIENTS,
    *CLIENT_BUCKETS,
    *ESCALATIONS,
    *EVENTS,
    *SUMS,
    *GAUGES,
]
_PLACE = {name: at for at, name in enumerate(_NAMES)}
_FLOATS = {*SUMS, "swapped_at", "published_at"}
_WIDTH = len(_NAMES)
LAYOUT = blake2b("\n".join(_NAMES).encode(), digest_size=8).hexdigest()  # two processes that share a file must agree on it


class Reading(NamedTuple):
    """What the rows hold: `sums` over all of them, `rows` one by one."""

    sums: dict[str, float]
    rows: list[dict[str, float]]


class Counters:
    """One row, open for writing. `starts`: whether the process counts its start here; a front does so for the first of its tasks."""

    def __init__(self, path: Path, row: int, starts: bool = True) -> None:
        self._map = _map(path)
        base = row * _WIDTH
        self._ints = memoryview(self._map).cast("Q")[base : base + _WIDTH]
        self._floats = memoryview(self._map).cast("d")[base : base + _WIDTH]
        for name in GAUGES:
            self.set(name, 0)
        self.set("pid", os.getpid())
        if starts:
            self.add("starts")

    def add(self, name: str, by: int = 1) -> None:
        """Count `by` more of `name`."""
        self._ints[_PLACE[name]] += by

    def set(self, name: str, value: float) -> None:
        """Set a gauge."""
        if name in _FLOATS:
            self._floats[_PLACE[name]] = value
        else:
            self._ints[_PLACE[name]] = int(value)

    def count_reply(self, path: str, source: str, seconds: float, reason: str = "") -> None:
        """Count an answer: its source, how long it took and, when it is degraded, why."""
        ints, at = self._ints, _AT[path, source]
        ints[at.requests] += 1
        ints[at.buckets + bucket_of(seconds)] += 1
        self._floats[at.sum] += seconds
        if reason:
            ints[_PLACE[f"degraded/{reason}"]] += 1

    def close(self) -> None:
        """Unmap the file."""
        self._ints.release()
        self._floats.release()
        self._map.close()


class _Places(NamedTuple):
    requests: int
    buckets: int
    sum: int


_AT = {
    (path, str(source)): _Places(_PLACE[f"requests/{path}/{source}"], _PLACE[f"seconds/{path}/0"], _PLACE[f"seconds/{path}/sum"])
    for path in PATHS
    for source in Source
}


def create_counters(path: Path, rows: int) -> None:
    """A new file of zeros, for `rows` front processes."""
    with path.open("wb") as file:
        file.truncate(rows * _WIDTH * 8)


def read_counters(path: Path) -> Reading:
    """What all rows hold now."""
    held = _map(path)
    try:
        ints, floats = memoryview(held).cast("Q"), memoryview(held).cast("d")
        rows = [
            {name: float(floats[base + at]) if name in _FLOATS else ints[base + at] for name, at in _PLACE.items()}
            for base in range(0, len(ints) - _WIDTH + 1, _WIDTH)
        ]
        ints.release()
        floats.release()
    finally:
        held.close()
    return Reading({name: sum(row[name] for row in rows) for name in _NAMES}, rows)


def id_number(mark: str) -> int:
    """An id of up to 16 hexadecimal digits as a number, for a gauge; 0 for any other."""
    try:
        return int(mark, 16) if len(mark) <= 16 else 0
    except ValueError:
        return 0


def number_id(number: float) -> str:
    """The id that `id_number` was given."""
    return f"{int(number):016x}"


def releases_of(rows: Iterable[dict[str, float]]) -> set[str]:
    """Ids of the releases that the processes serve."""
    return {number_id(row["release"]) for row in rows if row["release"]}


def _map(path: Path) -> mmap.mmap:
    held = os.open(path, os.O_RDWR)
    try:
        return mmap.mmap(held, 0)
    finally:
        os.close(held)
