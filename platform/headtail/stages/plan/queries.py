"""The queries of a log as a plan needs them: counts, last days, which may be cached, what they cost the teacher.

In: a table of QUERY rows by falling count, in the store; with holdout traffic, all days' queries as one table of that kind. Out: a
LogQueries of arrays, one entry per query. The only place of this stage that reads texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headtail.adapters.storage import Storage, read_table, stream_table
from headtail.core.errors import LedgerError
from headtail.core.intervals import Array
from headtail.core.receipt import FileRef
from headtail.core.redact import PLACEHOLDER
from headtail.core.rows import QUERY, SIDE_INPUT, key_words, with_side_inputs
from headtail.core.task import Task
from headtail.stages.plan.selection import Ints, Mask


class LogQueries(NamedTuple):
    """The queries of a log by falling count."""

    ref: FileRef
    keys: pa.ChunkedArray
    counts: Ints
    last_days: Ints  # days since 1970 of each query's last event; -1 in a log without times
    may: Mask  # one cached answer may serve it
    chars: Array | None  # characters of query and side inputs, where the price depends on them


def read_queries(store: Storage, ref: FileRef, task: Task, with_chars: bool) -> LogQueries:
    """LedgerError when the table is not by falling count, or its texts are of other queries."""
    table = read_table(store, ref, ["query_key", "count", "last_day"])
    counts = table["count"].to_numpy()
    if np.any(np.diff(counts) > 0):
        raise LedgerError("queries are not by falling count", where=ref.path, fix="run ingest again")
    last = pc.fill_null(table["last_day"].cast(pa.int32()), -1).to_numpy().astype(np.int64)
    may, chars = _texts(store, ref, task, len(counts), with_chars)
    return LogQueries(ref, table["query_key"], counts, last, may, chars)


def _texts(store: Storage, ref: FileRef, task: Task, queries: int, with_chars: bool) -> tuple[Mask, Array | None]:
    """Which queries one cached answer may serve (all but redacted ones, unless the task says that they share an answer), and lengths."""
    every = task.file.redacted == "cached"
    if every and not with_chars:
        return np.ones(queries, bool), None
    redacted, chars = [np.zeros(0, bool)], [np.zeros(0)]
    columns = ["query", *(task.side_inputs if with_chars else ())]
    for batch in stream_table(store, ref, columns):
        redacted.append(np.asarray(pc.match_substring_regex(batch.column("query"), PLACEHOLDER)))
        if with_chars:
            chars.append(_chars(batch, task.side_inputs))
    found: Mask = np.concatenate(redacted)
    if len(found) != queries:
        raise LedgerError("the texts read are not the queries of the log", where=ref.path, value=f"{len(found):,} of {queries:,}")
    return (np.ones(queries, bool) if every else np.logical_not(found)), (np.concatenate(chars) if with_chars else None)


def _chars(batch: pa.RecordBatch, side_inputs: Sequence[str]) -> Array:
    total = np.asarray(pc.utf8_length(batch.column("query")), np.float64)
    for name in side_inputs:
        joined = pc.binary_join(pc.fill_null(batch.column(name), pa.scalar([], SIDE_INPUT)), " ")
        total = total + np.asarray(pc.fill_null(pc.utf8_length(joined), 0), np.float64)
    return np.asarray(total)


def all_days(queries: pa.Table, holdout: pa.Table, side_inputs: Sequence[str], first_day: pa.Scalar, last_day: pa.Scalar) -> pa.Table:
    """QUERY rows of the log and of holdout traffic together, by falling count, then key.

    Holdout rows have no day of their own: the first and the last held-out day stand for it. Their side inputs are null.
    """
    schema = with_side_inputs(QUERY, side_inputs)
    places = pc.index_in(queries["query_key"].combine_chunks(), holdout["query_key"].combine_chunks())
    again, more = np.asarray(places.is_valid()), holdout["count"].to_numpy()
    counts = queries["count"].to_numpy().copy()
    counts[again] += more[np.asarray(places.drop_null())]
    last = pc.if_else(pa.array(again), last_day, queries["last_day"].combine_chunks())
    queries = queries.set_column(2, "count", pa.array(counts)).set_column(4, "last_day", last)
    new = holdout.filter(pc.invert(holdout["seen"])).select(["query_key", "query", "count"])
    for name, day in (("first_day", first_day), ("last_day", last_day)):
        new = new.append_column(name, pa.array([day.as_py()] * len(new), pa.date32()))
    for name in side_inputs:
        new = new.append_column(pa.field(name, SIDE_INPUT), pa.nulls(len(new), SIDE_INPUT))
    both = pa.concat_tables([queries.select(schema.names).cast(schema), new.select(schema.names).cast(schema)])
    high, low = key_words(both["query_key"])
    order: npt.NDArray[np.int64] = np.lexsort((low, high, -both["count"].to_numpy()))
    return both.take(pa.array(order))
