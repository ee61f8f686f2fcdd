"""Read tables that are sorted by query_key side by side, in bounded memory.

In: streams of tables, each ascending by query_key. Out: rounds of one table per stream; all rows of a key are in one
round, and rounds are in order of key. At most one batch per stream is held. No single row is examined here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headtail.core.errors import InputError
from headtail.core.rows import key_words

BATCH_ROWS = 131_072  # rows of one stream held at a time: about 20 MB at 150 bytes a row
Words = npt.NDArray[np.uint64]
Key = tuple[int, int]  # the two words of a query_key
END: Key = (1 << 64, 0)  # above every key


class SortedBatch(NamedTuple):
    """Rows of a stream, and its promise: what comes later has keys of `bound` or above."""

    table: pa.Table
    bound: Key


def sorted_batches(tables: Iterable[pa.Table | pa.RecordBatch], where: str) -> Iterator[SortedBatch]:
    """The rows of a stream in batches. InputError when they are not in order of query_key."""
    last: Key = (0, 0)
    for table in tables:
        whole = pa.Table.from_batches([table]) if isinstance(table, pa.RecordBatch) else table
        for start in range(0, whole.num_rows, BATCH_ROWS):
            piece = whole.slice(start, BATCH_ROWS)
            high, low = key_words(piece.column("query_key"))
            falls = (high[1:] < high[:-1]) | ((high[1:] == high[:-1]) & (low[1:] < low[:-1]))
            if falls.any() or (int(high[0]), int(low[0])) < last:
                at = int(np.argmax(falls)) + 1 if falls.any() else 0
                raise InputError(
                    "rows are not in order of query_key",
                    where=where,
                    value=piece.column("query_key")[at].as_py().hex(),
                    fix="this version writes answers in order of key: run precompute again with it, or sort the table by query_key",
                )
            last = (int(high[-1]), int(low[-1]))
            yield SortedBatch(piece, last)


def merge_rounds(streams: Sequence[Iterator[SortedBatch]]) -> Iterator[list[pa.Table]]:
    """Tables of the same range of keys, one per stream, range by range."""
    heads = [_Head(stream) for stream in streams]
    bound: Key = (0, 0)
    while heads and bound != END:
        for head in heads:
            if head.bound <= bound:
                head.load()
        bound = min(head.bound for head in heads)
        cut = [head.below(bound) for head in heads]
        if any(piece.num_rows for piece in cut):
            yield cut


class _Head:
    """What was read of a stream and not handed out yet."""

    def __init__(self, stream: Iterator[SortedBatch]) -> None:
        self._stream = stream
        self._table: pa.Table | None = None
        self.bound: Key = (-1, 0)

    def load(self) -> None:
        """Read one more batch behind what is held."""
        batch = next(self._stream, None)
        if batch is None:
            self.bound = END
            return
        held = self._table is not None and self._table.num_rows
        self._table = pa.concat_tables([self._table, batch.table]) if held else batch.table
        self._high, self._low = key_words(self._table.column("query_key"))
        self.bound = batch.bound

    def below(self, bound: Key) -> pa.Table:
        """Take the rows whose keys are below `bound`."""
        if self._table is None:
            return pa.table({})
        at = len(self._high) if bound == END else count_below(self._high, self._low, bound)
        taken, self._table = self._table.slice(0, at), self._table.slice(at)
        self._high, self._low = self._high[at:], self._low[at:]
        return taken


def count_below(high: Words, low: Words, key: Key) -> int:
    """How many of the sorted keys are below `key`."""
    start, end = (int(np.searchsorted(high, np.uint64(key[0]), side)) for side in ("left", "right"))
    return start + int(np.searchsorted(low[start:end], np.uint64(key[1]), "left"))


def merge_order(high: Words, low: Words) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """The stable order of keys that come as a few sorted runs, and which places in that order begin a new key."""
    order = np.argsort(high, kind="stable")  # timsort: runs are merged, not sorted again
    tops, bottoms = high[order], low[order]
    same = tops[1:] == tops[:-1]
    if (same & (bottoms[1:] < bottoms[:-1])).any():  # two keys share their first 8 bytes
        order = np.lexsort((low, high))
        tops, bottoms = high[order], low[order]
        same = tops[1:] == tops[:-1]
    first = np.ones(len(order), dtype=bool)
    first[1:] = ~(same & (bottoms[1:] == bottoms[:-1]))
    return order, first
