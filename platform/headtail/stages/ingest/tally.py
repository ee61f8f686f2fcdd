"""Counting by query in bounded memory: partial sums spilled by range of key, finished shard by shard, merged by count.

In: tables of (query_key, query, day, count) and, per side input, the values seen, in any order and any number of pieces.
Out: a stream of queries by falling count, the same for holdout traffic. The result depends on neither the order of the pieces
nor the number of shards. Knows nothing of files, tasks or Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headtail.core.rows import HOLDOUT, KEY, QUERY, SIDE_INPUT, key_words, shards_of, uniform_draw, with_side_inputs

PART = pa.schema([("query_key", KEY), ("query", pa.string()), ("day", pa.int32()), ("count", pa.int64())])
SEEN_SIDE = pa.schema([("query_key", KEY), ("day", pa.int32()), ("time", pa.int64()), ("seq", pa.int64()), ("value", SIDE_INPUT)])
NO_DAY = -(2**31)  # stands for the day in a log without times
HELD_ROWS = 1 << 19


class HoldoutCut(NamedTuple):
    """What is held out as holdout traffic: days from `day` on (since 1970), or without times a share of events drawn by `seed`."""

    day: int | None
    share: float = 0.0
    seed: int = 0


class Spill:
    """Pieces of one kind of table, kept by shard: in memory while few, then in files under `folder`.

    `combine` makes a table smaller without changing what it means; it is run on what is held and on what is read back.
    """

    def __init__(self, folder: Path, schema: pa.Schema, shards: int, combine: Callable[[pa.Table], pa.Table] | None = None) -> None:
        self.folder, self.schema, self.shards = folder, schema, shards
        self.combine = combine or (lambda table: table)
        self._held: list[pa.Table] = []
        self._rows = 0
        self._files: dict[int, pa.RecordBatchFileWriter] = {}
        self._ready: dict[int, pa.Table] = {}

    def add(self, table: pa.Table) -> None:
        if table.num_rows:
            self._held.append(table)
            self._rows += table.num_rows
        if self._rows > HELD_ROWS:
            self._held = [self.combine(pa.concat_tables(self._held))]
            self._rows = self._held[0].num_rows
            if self._rows > HELD_ROWS // 2:
                self._write()

    def _write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for shard, piece in self._split_by_shard():
            if shard not in self._files:
                options = pa.ipc.IpcWriteOptions(compression="lz4")
                self._files[shard] = pa.ipc.new_file(str(self._path(shard)), self.schema, options=options)
            self._files[shard].write_table(piece)
        self._held, self._rows = [], 0

    def _split_by_shard(self) -> Iterator[tuple[int, pa.Table]]:
        table = pa.concat_tables(self._held) if self._held else self.schema.empty_table()
        if self.shards == 1:
            yield 0, table
            return
        ids = shards_of(table["query_key"], self.shards)
        order = np.argsort(ids, kind="stable")
        bounds = np.searchsorted(ids[order], np.arange(self.shards + 1))
        table = table.take(pa.array(order))
        for shard in np.flatnonzero(np.diff(bounds)):
            yield int(shard), table.slice(bounds[shard], bounds[shard + 1] - bounds[shard])

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}.arrow"

    def close(self) -> None:
        """No more pieces: what is held goes to the files, or stays in memory when there are none."""
        if not self._files:
            self._ready = dict(self._split_by_shard())
            return
        if self._held:
            self._write()
        for writer in self._files.values():
            writer.close()

    def stream(self, shard: int) -> Iterator[pa.Table]:
        """The pieces of a shard, after `close`."""
        if shard in self._ready:
            yield self._ready[shard]
        elif shard in self._files:
            with pa.OSFile(str(self._path(shard))) as source:
                reader = pa.ipc.open_file(source)
                for i in range(reader.num_record_batches):
                    yield pa.Table.from_batches([reader.get_batch(i)])

    def shard(self, shard: int) -> pa.Table:
        """A shard as one table, combined."""
        pieces = list(self.stream(shard))
        return self.combine(pa.concat_tables(pieces)) if pieces else self.schema.empty_table()


def sum_days(table: pa.Table) -> pa.Table:
    """PART rows with one row per query and day, in order of key and day."""
    high, low = key_words(table["query_key"])
    day = table["day"].to_numpy()
    order = np.lexsort((day, low, high))
    starts = _starts(high[order], low[order], day[order])
    kept = table.take(pa.array(order[starts]))
    sums = np.add.reduceat(table["count"].to_numpy()[order], starts) if len(starts) else np.zeros(0, np.int64)
    return kept.set_column(3, "count", pa.array(sums, pa.int64()))


def latest_by_day(table: pa.Table) -> pa.Table:
    """SEEN_SIDE rows with the last one of each query and day."""
    return _latest(table, by_day=True)


def _latest(table: pa.Table, by_day: bool) -> pa.Table:
    high, low = key_words(table["query_key"])
    day = table["day"].to_numpy()
    order = np.lexsort((table["seq"].to_numpy(), table["time"].to_numpy(), day, low, high))
    starts = _starts(high[order], low[order], *([day[order]] if by_day else []))
    last = np.append(starts[1:], len(order)) - 1 if len(starts) else starts
    return table.take(pa.array(order[last]))


def _starts(*columns: npt.NDArray[np.generic]) -> npt.NDArray[np.int64]:
    """Where a new group begins in columns sorted together."""
    if not len(columns[0]):
        return np.zeros(0, np.int64)
    changes = np.zeros(len(columns[0]) - 1, bool)
    for column in columns:
        changes |= column[1:] != column[:-1]
    return np.concatenate([np.zeros(1, np.int64), np.flatnonzero(changes) + 1])


def finish_shard(parts: Sequence[pa.Table], sides: Mapping[str, Sequence[pa.Table]], cut: HoldoutCut) -> tuple[pa.Table, pa.Table]:
    """One shard's queries (QUERY + side inputs) and holdout traffic (HOLDOUT), each by falling count, then key."""
    table = sum_days(pa.concat_tables(parts))
    high, low = key_words(table["query_key"])
    starts = _starts(high, low)
    day, count = table["day"].to_numpy(), table["count"].to_numpy()
    table = table.take(pa.array(starts))
    if not len(starts):
        return with_side_inputs(QUERY, list(sides)).empty_table(), HOLDOUT.empty_table()
    before = np.ones(len(day), bool) if cut.day is None else day < cut.day
    total = np.add.reduceat(count, starts)
    seen = np.add.reduceat(np.where(before, count, 0), starts)
    first = np.minimum.reduceat(np.where(before, day, 2**31 - 1), starts)
    last = np.maximum.reduceat(np.where(before, day, NO_DAY), starts)
    if cut.day is None and cut.share > 0:
        seen = total - _draw_holdout(uniform_draw(table["query_key"], "later", cut.seed), total, cut.share)
    rows = np.flatnonzero(seen)
    rows = rows[np.argsort(-seen[rows], kind="stable")]
    queries = table.select(["query_key", "query"]).take(pa.array(rows))
    queries = queries.append_column("count", pa.array(seen[rows], pa.int64()))
    for name, days in (("first_day", first[rows]), ("last_day", last[rows])):
        queries = queries.append_column(name, pa.array(days, pa.int32(), mask=days == NO_DAY).cast(pa.date32()))
    for name, pieces in sides.items():
        queries = queries.append_column(pa.field(name, SIDE_INPUT), _side(pieces, cut, queries["query_key"]))
    held = total - seen
    rows = np.flatnonzero(held)
    rows = rows[np.argsort(-held[rows], kind="stable")]
    holdout = table.select(["query_key", "query"]).take(pa.array(rows))
    holdout = holdout.append_column("count", pa.array(held[rows], pa.int64())).append_column("seen", pa.array(seen[rows] > 0))
    return queries.cast(with_side_inputs(QUERY, list(sides))), holdout.cast(HOLDOUT)


def _draw_holdout(chance: npt.NDArray[np.float64], counts: npt.NDArray[np.int64], share: float) -> npt.NDArray[np.int64]:
    """How many of `counts` events are held out: binomial, by inversion of one uniform draw per query."""
    from scipy.stats import binom

    return np.asarray(binom.ppf(chance, counts, share), np.int64).clip(0, counts)


def _side(pieces: Sequence[pa.Table], cut: HoldoutCut, keys: pa.ChunkedArray) -> pa.ChunkedArray:
    """The value of one side input for each of `keys`: that of the most recent row before the cut, null without one."""
    table = pa.concat_tables(pieces)
    if cut.day is not None:
        table = table.filter(pc.less(table["day"], cut.day))
    table = _latest(table, by_day=False)
    return table["value"].take(pc.index_in(keys, table["query_key"]))


def merge_runs(runs: Sequence[pa.Table], rows: int = 1 << 18) -> Iterator[pa.Table]:
    """Tables by falling count, then key, as one stream in that order. Each table's keys are all below those of the next.

    Counts are cut into ranges of at most `rows` rows; a range is gathered from all runs and sorted, and where one count alone
    has more rows than that, runs follow one another, being in order of key already. No heap, no loop over rows.
    """
    falling = [-run["count"].to_numpy() for run in runs]
    if not runs or not sum(map(len, falling)):
        return
    values, sizes = np.unique(np.concatenate(falling), return_counts=True)
    begin = 0
    while begin < len(values):
        reached = np.cumsum(sizes[begin : begin + rows])
        end = begin + max(1, int(np.searchsorted(reached, rows, side="right")))
        pieces = [
            run.slice(a, b - a)
            for run, counts in zip(runs, falling, strict=True)
            for a, b in [(np.searchsorted(counts, values[begin]), np.searchsorted(counts, values[end - 1], side="right"))]
            if b > a
        ]
        if end - begin == 1 or len(pieces) == 1:
            yield from (piece.slice(i, rows) for piece in pieces for i in range(0, piece.num_rows, rows))
        else:
            gathered = pa.concat_tables(pieces)
            high, low = key_words(gathered["query_key"])
            yield gathered.take(pa.array(np.lexsort((low, high, -gathered["count"].to_numpy()))))
        begin = end


def keep_run(folder: Path, name: str, table: pa.Table) -> pa.Table:
    """`table` on disk, mapped: it takes memory only while it is read."""
    if not table.num_rows:
        return table
    folder.mkdir(parents=True, exist_ok=True)
    path = str(folder / f"{name}.arrow")
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=1 << 18)
    return pa.ipc.open_file(pa.memory_map(path)).read_all()


def total(tables: Iterable[pa.Table]) -> int:
    """The sum of their counts."""
    return sum(int(pc.sum(table["count"]).as_py() or 0) for table in tables)
