"""The history of a log: what the queries of each past day came to on the days after it. The planner forecasts from it.

In: sums by query and day of one shard. Out: HISTORY rows, which add up over shards: queries of like count and like idleness share
a row, so the table has some hundred rows per origin and day, whatever the log's size. In a log of very many rows, light queries
are a sample by hash with its weight. Knows nothing of heads, budgets or forecasts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headtail.core.count_classes import count_class, idle_class
from headtail.core.redact import PLACEHOLDER
from headtail.core.rows import HISTORY, key_words, uniform_draw

ORIGINS = 84  # last days from which a later head is looked at: twelve weeks
AGES = 28  # days after its origin for which a head is looked at: four weeks
SAMPLE_ROWS = 4_000_000  # rows of the log above which light queries are sampled: about this many of theirs are kept
HEAVY = 64  # events in the log from which a query is never left out
Ints = npt.NDArray[np.int64]


class HistoryRules(NamedTuple):
    """The log's days (since 1970, ascending) and the share of light queries that is kept."""

    days: tuple[int, ...]
    share: float = 1.0


def history_rules(days: Mapping[int, int]) -> HistoryRules:
    """Rules for a log with these used rows by day."""
    halvings = max(0, math.ceil(math.log2(max(1, sum(days.values())) / SAMPLE_ROWS)))
    return HistoryRules(tuple(sorted(days)), 0.5**halvings)  # weights that are powers of two: sums do not depend on their order


def shard_history(table: pa.Table, rules: HistoryRules) -> pa.Table:
    """HISTORY of one shard. `table`: PART rows, one per query and day, in order of key and day."""
    if len(rules.days) < 2 or not table.num_rows:
        return HISTORY.empty_table()
    high, low = key_words(table["query_key"])
    new = np.append(True, (high[1:] != high[:-1]) | (low[1:] != low[:-1]))
    starts, query = np.flatnonzero(new), np.cumsum(new) - 1
    count = table["count"].to_numpy()
    firsts = table.take(pa.array(starts))
    weight = np.where(np.add.reduceat(count, starts) >= HEAVY, 1.0, 1 / rules.share)
    kept = (weight == 1.0) | (uniform_draw(firsts["query_key"], "history", 0) < rules.share)
    redacted = np.asarray(pc.match_substring_regex(firsts["query"].combine_chunks(), PLACEHOLDER))
    rows = kept[query]
    day = np.searchsorted(np.array(rules.days), table["day"].to_numpy()[rows])
    place = (np.cumsum(kept) - 1)[query[rows]]
    return _cells_by_origin(place, day, count[rows], weight[kept], redacted[kept], rules.days)


def _cells_by_origin(
    place: Ints, day: Ints, count: Ints, weight: npt.NDArray[np.float64], redacted: npt.NDArray[np.bool_], days: Sequence[int]
) -> pa.Table:
    """One pass over the days: counts and last days up to each origin, and the cells of later events."""
    order = np.argsort(day, kind="stable")
    place, day, count = place[order], day[order], count[order]
    edges = np.searchsorted(day, np.arange(len(days) + 1))
    total, last = np.zeros(len(weight), np.int64), np.full(len(weight), -1)
    begin, pieces = max(0, len(days) - ORIGINS), []
    for origin in range(len(days)):
        today = slice(edges[origin], edges[origin + 1])
        total[place[today]] += count[today]
        last[place[today]] = origin
        if origin < begin:
            continue
        cell = (count_class(total) * 8 + idle_class(np.where(total > 0, origin - last, 0))) * 2 + redacted
        cell = np.where(total > 0, cell, redacted)
        seen = total > 0
        pieces.append(_sums(cell[seen], np.full(int(seen.sum()), origin), weight[seen], total[seen] * weight[seen], origin))
        later = slice(edges[origin + 1], edges[min(len(days), origin + 1 + AGES)])
        heavy = weight[place[later]]
        pieces.append(_sums(cell[place[later]], day[later], heavy, count[later] * heavy, origin))
    origin_at, day_at, cell, queries, events = map(np.concatenate, zip(*pieces, strict=True))
    dates = np.array(days, np.int32)
    columns = [dates[origin_at], dates[day_at], cell // 16, cell // 2 % 8, cell % 2 == 1, queries, events]
    arrays = [pa.array(column) for column in columns]
    return pa.table([a.cast(f.type) for a, f in zip(arrays, HISTORY, strict=True)], schema=HISTORY)


def _sums(
    cell: Ints, day: Ints, queries: npt.NDArray[np.float64], events: npt.NDArray[np.float64], origin: int
) -> tuple[npt.NDArray[Any], ...]:
    """Queries and events by cell and day, of one origin; `day` is from the origin on. By counting: a sort took ten times as long."""
    width = int(cell.max(initial=0)) + 1
    code = (day - origin) * width + cell
    found = np.flatnonzero(np.bincount(code))
    sums = np.bincount(code, queries)[found], np.bincount(code, events)[found]
    return np.full(len(found), origin), origin + found // width, found % width, *sums


def merge_history(pieces: Sequence[pa.Table]) -> pa.Table:
    """HISTORY of all shards, in order of its columns."""
    names = HISTORY.names[:5]
    found = pa.concat_tables([HISTORY.empty_table(), *pieces]).group_by(names).aggregate([("queries", "sum"), ("events", "sum")])
    found = found.select([*names, "queries_sum", "events_sum"]).rename_columns(HISTORY.names)
    return found.sort_by([(name, "ascending") for name in names]).cast(HISTORY)
