"""The requests of a day: which query comes when, in which stratum it is, and what a design's snapshot answers.

In: holdout traffic and a rate, or the request log of a server, or a file of a log with times. Out: a Traffic; for a design, the answers'
sources. A day with more requests than are simulated is cut to its busiest stretch. Knows nothing of servers.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from headtail.adapters.storage import Storage, read_table
from headtail.adapters.storage.day_files import REQUESTS, day_of, list_day_files
from headtail.adapters.storage.frequency import query_strata
from headtail.adapters.storage.user_tables import read_user_table
from headtail.cache import read_manifest
from headtail.core.config import Config
from headtail.core.errors import InputError
from headtail.core.intervals import Array
from headtail.core.keys import fingerprint, query_key
from headtail.core.receipt import Receipt
from headtail.core.record import Day
from headtail.core.rows import STRATA
from headtail.stages.simulate.design import ServingDesign
from headtail.stages.simulate.events import TimedRequests, timed_requests

DAY_S, HOLDOUT_RATE = 86_400.0, 50.0
_EPOCH = datetime.date(1970, 1, 1)


class TrafficConfig(Config):
    """Which requests come, and when."""

    events: str = Field(
        "",
        description="CSV, JSON Lines or Parquet file (s3:// too) with columns query and time; `requests`: the store's request log; empty: "
        "the holdout traffic of `log`, at rate_per_s",
    )
    day: Day = Field("", description="day of the events, as 2031-01-31; empty: the last one")
    rate_per_s: float | None = Field(
        None, gt=0, description="requests per second, mean over a day; null: as the events came, and 50 for holdout traffic"
    )
    peak: float = Field(2.0, ge=1, description="the busiest moment over the mean, for holdout traffic, whose times are not known")
    requests: int = Field(100_000, ge=1, description="requests that are simulated at most: the busiest stretch of the day")


class Traffic(NamedTuple):
    """A stretch of a day. `at`: seconds, ascending; `query`: place in `keys` and `stratum` (place in STRATA)."""

    at: Array
    query: npt.NDArray[np.int64]
    keys: pa.Array
    stratum: npt.NDArray[np.int8]
    day_requests: float
    notes: tuple[str, ...]

    @property
    def by_stratum(self) -> Array:
        """Requests by stratum."""
        return np.bincount(self.stratum[self.query], minlength=len(STRATA)).astype(np.float64)


class EventsFile(NamedTuple):
    """A file that was named for events, read; without one there is no table. `digest`: what the events are; empty for holdout traffic."""

    table: pa.Table | None
    digest: str


def open_events(store: Storage, config: TrafficConfig) -> EventsFile:
    """The file of `events`, or the digest of the store's request log. InputError when there is no such file, or it is no table."""
    if config.events in ("", REQUESTS):
        return EventsFile(None, fingerprint(list_day_files(store, REQUESTS), REQUESTS) if config.events else "")
    table, data = read_user_table(config.events, "traffic.events")
    return EventsFile(table, hashlib.sha256(data).hexdigest())


def load_traffic(
    store: Storage, config: TrafficConfig, events: EventsFile, log: Receipt, plan: Receipt, torso_min_count: int, seed: int
) -> Traffic:
    """The requests. InputError when there are none, or when nothing says at which times they come."""
    rng = np.random.default_rng(seed)
    if config.events:
        found = timed_requests(_request_table(store, config) if events.table is None else events.table, config.events)
        at, query, day = _day_requests(config, found, rng)
        keys = pa.array([query_key(text) for text in found.queries], pa.binary(16))
        day_requests, notes = float(len(at)), [f"requests of {day}"]
        if config.rate_per_s is not None:
            day_requests = config.rate_per_s * DAY_S
            at *= len(at) / day_requests
            notes.append(
                f"they are simulated {day_requests / len(at):,.2f} times as fast as they came, for traffic.rate_per_s={config.rate_per_s:g}"
            )
        notes += [found.left_out] * bool(found.left_out)
    else:
        keys, query = _holdout(store, log, rng)
        rate = config.rate_per_s or HOLDOUT_RATE
        at, day_requests = np.cumsum(rng.exponential(1 / (rate * config.peak), len(query))), rate * DAY_S
        notes = [f"holdout traffic in random order at {rate * config.peak:g} requests/s: no daily rhythm is in it"]
    cut = busiest_stretch(at, config.requests)
    if len(at) > config.requests:
        notes.append(f"the busiest {config.requests:,} of {len(at):,} requests are simulated")
    elif len(query) < config.requests:
        notes.append(f"there are {len(query):,} requests to simulate: the tails of latency are as rough as they are few")
    return Traffic(at[cut], query[cut], keys, query_strata(store, plan, log, keys, torso_min_count), day_requests, tuple(notes))


def busiest_stretch(at: Array, most: int) -> slice:
    """The `most` consecutive requests that came in the shortest time."""
    if len(at) <= most:
        return slice(0, len(at))
    begin = int(np.argmin(at[most - 1 :] - at[: len(at) - most + 1]))
    return slice(begin, begin + most)


def snapshot_sources(store: Storage, snapshot: str, traffic: Traffic, designs: Sequence[ServingDesign]) -> tuple[list[Any], dict[str, Any]]:
    """For each design: by query, the source whose answer its cache holds (None: a miss); and its answers by source."""
    table = read_table(store, read_manifest(store, snapshot).files["answers"], ["query_key", "source", "count"])
    table = table.sort_by([("count", "descending"), ("query_key", "ascending")])
    found, rows = [], {}
    for design in designs:
        held = table.filter(pc.is_in(table["source"], value_set=pa.array(design.cached, pa.string())))
        held = held.slice(0, design.cached_rows) if design.cached_rows is not None else held
        places = pc.index_in(traffic.keys, held["query_key"].combine_chunks())
        found.append(np.asarray(held["source"].combine_chunks().take(places).to_pylist(), object))
        rows[design.name] = {one["values"]: one["counts"] for one in pc.value_counts(held["source"]).to_pylist()}
    return found, rows


def _holdout(store: Storage, log: Receipt, rng: np.random.Generator) -> tuple[pa.Array, npt.NDArray[np.int64]]:
    """Its queries, and its events in random order, none twice: drawn again and again, rare queries would seem to come back."""
    table = read_table(store, log.output("holdout"), ["query_key", "count"])
    query = np.repeat(np.arange(table.num_rows), np.asarray(table["count"]))
    if not len(query):
        raise InputError(
            "the log has no holdout traffic", where=log.path, fix="ingest with holdout_days of at least 1, or set traffic.events"
        )
    return table["query_key"].combine_chunks(), rng.permutation(query)


def _day_requests(config: TrafficConfig, found: TimedRequests, rng: np.random.Generator) -> tuple[Array, npt.NDArray[np.int64], str]:
    """Of one day: times in seconds, ascending, the query of each, and the day."""
    last, first = int(found.day.max()), int(found.day.min())
    number = (datetime.date.fromisoformat(config.day) - _EPOCH).days if config.day else last
    mine = found.day == number
    if not mine.any():
        fix = f"name a day from {_day(first)} to {_day(last)}, or leave it empty for the last one"
        raise InputError("no request is of this day", where="traffic.day", value=config.day, fix=fix)
    at = found.at[mine]
    if not at.any():
        fix = "leave traffic.events empty, or name a log with times of day"
        raise InputError("the times of this log are days", where="traffic.events", value=config.events, fix=fix)
    if not (at % 1).any():  # whole seconds: all of a second's requests would come at once
        at = at + rng.random(len(at))
    order = np.argsort(at, kind="stable")
    return at[order], found.query[mine][order], _day(number)


def _day(number: int) -> str:
    return str(_EPOCH + datetime.timedelta(number))


def _request_table(store: Storage, config: TrafficConfig) -> pa.Table:
    files = sorted(path for path in list_day_files(store, REQUESTS) if config.day in ("", day_of(path)))
    if not files:
        raise InputError(
            "the store has no request log", where=store.uri(REQUESTS), fix="serve with request_log=true, or set traffic.events"
        )
    last = day_of(files[-1])
    return pa.concat_tables([read_table(store, path, ["query", "time"]) for path in files if day_of(path) == last])
