"""Requests with their times: a file that the user names, or the store's request log.

In: a table with the columns query and time. Out: a TimedRequests, and which rows are no request. Times are what ingest takes for
times, with their parts of a second. A time that is none is an error that names the row: a day with holes is not the day that was.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from headtail.core.cells import TIMES, flat, plain_texts, second_parts, times
from headtail.core.errors import InputError
from headtail.core.intervals import Array
from headtail.core.query import clean_text

FIELD = "traffic.events"
_DAY_S = 86_400


class TimedRequests(NamedTuple):
    """Requests of all days. `day`: since 1970; `at`: seconds of the day; `query`: place in `queries`, which are clean."""

    day: Array
    at: Array
    query: Array
    queries: list[str]
    left_out: str  # rows that are no request, and why; empty: none


def timed_requests(table: pa.Table, where: str) -> TimedRequests:
    """The requests of `table`. InputError without a column, without a request, or for a time that cannot be read."""
    for name in ("query", "time"):
        if name not in table.column_names:
            value, fix = f"{where} has {', '.join(table.column_names)}", f"rename the column in the file to {name}"
            raise InputError(f"the events have no column {name}", where=FIELD, value=value, fix=fix)
    days, at = _times(table["time"], where)
    texts = _query_texts(table["query"], where)
    queries = [clean_text(text) for text in texts.dictionary.to_pylist()]
    query = np.asarray(pc.fill_null(texts.indices, -1), np.int64)
    asks = np.append(np.array([bool(text) for text in queries], np.bool_), False)[query]
    use = asks & ~np.isnan(at)
    if not use.any():
        raise InputError(
            "no row has a query and a time", where=FIELD, value=f"{where}: {len(use):,} rows", fix="name a log with requests in it"
        )
    silent, timeless = int((~asks).sum()), int((asks & np.isnan(at)).sum())
    left = [f"{count:,} without a {name}" for name, count in (("query", silent), ("time", timeless)) if count]
    return TimedRequests(days[use], at[use], query[use], queries, f"rows left out: {', '.join(left)}" if left else "")


def _query_texts(column: pa.ChunkedArray, where: str) -> pa.DictionaryArray:
    try:
        return flat(column).cast(pa.string()).dictionary_encode()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        fix = "write queries as UTF-8 text"
        raise InputError(f"column query holds no text: {error}", where=f"{FIELD}, {where}", value=column.type, fix=fix) from error


def _times(column: pa.ChunkedArray, where: str) -> tuple[Array, Array]:
    """Days since 1970, and seconds of the day, which are NaN where the cell is empty."""
    cells = flat(column)
    cells = cells.cast(pa.float64()) if pa.types.is_decimal(cells.type) else cells
    seconds = times(cells)
    filled = pc.invert(pc.is_null(cells, nan_is_null=True))
    if (texts := plain_texts(cells)) is not None:
        filled = pc.fill_null(pc.greater(pc.utf8_length(pc.utf8_trim_whitespace(texts)), 0), False)
    wrong = np.flatnonzero(np.asarray(pc.and_(filled, pc.is_null(seconds))))
    if len(wrong):
        row = int(wrong[0])
        place = f"{FIELD}, {where}, row {row + 1}"
        raise InputError("this is no time between 1970 and 2200", where=place, value=cells[row].as_py(), fix=f"write {TIMES}")
    days, at = np.divmod(np.asarray(seconds, np.float64), _DAY_S)
    return days, at + second_parts(cells)
