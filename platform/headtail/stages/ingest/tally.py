"""Counting by query in bounded memory: partial sums spilled by range of key, finished shard by shard, merged by count.

In: tables of (query_key, query, day, count) and, per side input, the values seen, in any order and any number of pieces.
Out: a stream of queries by falling count, the same for holdout traffic. The result depends on neither the order of the pieces
nor the number of shards. Knows nothing of files, tasks or Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headtail.core.rows import HOLDOUT, KEY, QUERY, SIDE_INPUT, key_words, shards_of, uniform_draw, with_side_inputs
from headtail.stages.ingest.history import HistoryRules, shard_history
from headtail.stages.ingest.merges import RuleMerges, merges_by_rule

PART = pa.schema([("query_key", KEY), ("query", pa.string()), ("day", pa.int32()), ("count", pa.int64())])
PART_BY_RULES = pa.schema([*PART, ("rules", pa.uint8())])
RAW_TEXT = pa.dictionary(pa.int32(), pa.binary())
RAW_PART = pa.schema([("text", RAW_TEXT), ("day", pa.int32()), ("rules", pa.uint8()), ("count", pa.int64())])
SEEN_SIDE = pa.schema([("query_key", KEY), ("day", pa.int32()), ("time", pa.int64()), ("seq", pa.int64()), ("value", SIDE_INPUT)])
RAW_SIDE = pa.schema([("text", RAW_TEXT), *list(SEEN_SIDE)[1:]])
Ints = npt.NDArray[np.int64]
NO_DAY = -(2**31)  # stands for the day in a log without times
HELD_ROWS = 1 << 20
HELD_BYTES = 256 << 20


class HoldoutCut(NamedTuple):
    """What is held out as holdout traffic: days from `day` on (since 1970), or without times a share of events drawn by `seed`."""

    day: int | None
    share: float = 0.0
    seed: int = 0


Combine = Callable[[pa.Table], pa.Table]


class Spill:
    """Pieces of one kind of table, kept by shard: in memory while few, then in files under `folder`.

    `combine` makes a table smaller without changing what it means; `settle` makes rows of `schema` of it. Both are run on what is held,
    when it is too much.
    """

    def __init__(
        self, folder: Path, schema: pa.Schema, shards: int, combine: Combine = lambda table: table, settle: Combine = lambda table: table
    ) -> None:
        self.folder, self.schema, self.shards = folder, schema, shards
        self.combine, self.settle = combine, settle
        self._held: list[pa.Table] = []
        self._rows = self._bytes = 0
        self._thread = ThreadPoolExecutor(1)  # what is held is made smaller while more comes in
        self._job: Future[None] | None = None
        self._combined: list[pa.Table] = []
        self._files: dict[int, pa.RecordBatchFileWriter] = {}
        self._ready: dict[int, pa.Table] = {}

    def add(self, table: pa.Table) -> None:
        if table.num_rows:
            self._held.append(table)
            self._rows, self._bytes = self._rows + table.num_rows, self._bytes + table.nbytes
        if self._rows > HELD_ROWS or self._bytes > HELD_BYTES:
            self._wait()
            self._job = self._thread.submit(self._shrink, self._held)
            self._held, self._rows, self._bytes = [], 0, 0

    def _wait(self) -> None:
        if self._job is not None:
            self._job.result()

    def _shrink(self, held: list[pa.Table]) -> None:
        table = self.combine(pa.concat_tables([*self._combined, *held]))
        self._combined = [table]
        if table.num_rows > HELD_ROWS // 2 or table.nbytes > HELD_BYTES // 2:
            self._combined = []
            self._write(table)

    def _write(self, table: pa.Table) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for shard, piece in self._split_by_shard(table):
            if shard not in self._files:
                options = pa.ipc.IpcWriteOptions(compression="lz4")
                self._files[shard] = pa.ipc.new_file(str(self._path(shard)), self.schema, options=options)
            self._files[shard].write_table(piece)

    def _split_by_shard(self, table: pa.Table) -> Iterator[tuple[int, pa.Table]]:
        table = self.settle(table)
        if self.shards == 1:
            yield 0, table
            return
        ids = shards_of(table["query_key"], self.shards).astype(np.uint8)  # sorted in one pass
        order = np.argsort(ids, kind="stable")
        bounds = np.searchsorted(ids[order], np.arange(self.shards + 1))
        table = table.take(pa.array(order))
        for shard in np.flatnonzero(np.diff(bounds)):
            yield int(shard), table.slice(bounds[shard], bounds[shard + 1] - bounds[shard])

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}.arrow"

    def close(self) -> None:
        """No more pieces: what is held goes to the files, or stays in memory when there are none."""
        self._wait()
        self._thread.shutdown()
        if held := [*self._combined, *self._held]:
            table = self.combine(pa.concat_tables(held))
            if self._files:
                self._write(table)
            else:
                self._ready = dict(self._split_by_shard(table))
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
        """A shard as one table."""
        return pa.concat_tables([self.schema.empty_table(), *self.stream(shard)])


def sum_raw(table: pa.Table) -> pa.Table:
    """RAW_PART rows with one row per text, day and rules. Arrow's own `group_by` on text takes four times as long."""
    texts, day = one_dictionary(table["text"]), table["day"].to_numpy().astype(np.int64)
    first, span = day.min(), int(day.max() - day.min()) + 1
    place = (np.asarray(texts.indices, np.int64) * span + (day - first)) * 256 + table["rules"].to_numpy()
    found, sums = sum_by(place, table["count"].to_numpy())
    text, rest = np.divmod(found, 256 * span)
    columns = [pa.DictionaryArray.from_arrays(text.astype(np.int32), texts.dictionary), (rest >> 8) + first, rest & 255, sums]
    return pa.table([pa.array(column) for column in columns], names=RAW_PART.names).cast(RAW_PART)


def latest_raw(table: pa.Table) -> pa.Table:
    """RAW_SIDE rows with the last one of each text and day."""
    texts, day = one_dictionary(table["text"]), table["day"].to_numpy().astype(np.int64)
    group = np.asarray(texts.indices, np.int64) * (int(day.max() - day.min()) + 1) + (day - day.min())
    rows = last_rows(group, table["time"].to_numpy(), table["seq"].to_numpy())
    return table.set_column(0, "text", texts).take(pa.array(rows))


def raw_texts(texts: pa.Array, places: Ints) -> pa.DictionaryArray:
    """`texts` at `places` as RAW_TEXT, without those that are not there."""
    there = np.zeros(len(texts), bool)
    there[places] = True
    return pa.DictionaryArray.from_arrays((np.cumsum(there, dtype=np.int32) - 1)[places], texts.filter(pa.array(there)))


def one_dictionary(column: pa.ChunkedArray) -> pa.DictionaryArray:
    """A column of RAW_TEXT as one array."""
    return column.unify_dictionaries().combine_chunks()


def sum_by(place: Ints, count: Ints) -> tuple[Ints, Ints]:
    """The distinct of `place`, in order, and their sums of `count`."""
    order = np.argsort(place)
    ordered = place[order]
    starts = _starts(ordered)
    return ordered[starts], np.add.reduceat(count[order], starts) if len(starts) else count


def last_rows(group: Ints, time: Ints, seq: Ints) -> Ints:
    """Of each group the row with the greatest (time, seq)."""
    order = np.lexsort((seq, time, group))
    return np.asarray(order[np.flatnonzero(np.diff(group[order], append=-1))], np.int64)


def key_places(keys: pa.ChunkedArray) -> Ints:
    """The place of each key among the distinct keys in order."""
    high, low = key_words(keys)
    distinct, places = np.unique(high, return_inverse=True)
    lows = np.zeros(len(distinct), np.uint64)
    lows[places] = low
    if (lows[places] != low).any():  # two keys begin with the same 64 bits
        order = np.lexsort((low, high))
        places[order] = np.cumsum(np.append(False, (np.diff(high[order]) != 0) | (np.diff(low[order]) != 0)))
    return np.asarray(places, np.int64)


def sum_days(table: pa.Table, places: Ints | None = None) -> pa.Table:
    """PART rows with one row per query and day, in order of key and day. `places`: `key_places`, where they are known already."""
    if not table.num_rows:
        return table
    day = table["day"].to_numpy().astype(np.int64)
    places = key_places(table["query_key"]) if places is None else places
    both = places * (day.max() - day.min() + 1) + (day - day.min())
    order = np.argsort(both)
    starts = _starts(both[order])
    kept = table.take(pa.array(order[starts]))
    return kept.set_column(3, "count", pa.array(np.add.reduceat(table["count"].to_numpy()[order], starts), pa.int64()))


def _starts(*columns: npt.NDArray[np.generic]) -> npt.NDArray[np.int64]:
    """Where a new group begins in columns sorted together."""
    if not len(columns[0]):
        return np.zeros(0, np.int64)
    changes = np.zeros(len(columns[0]) - 1, bool)
    for column in columns:
        changes |= column[1:] != column[:-1]
    return np.concatenate([np.zeros(1, np.int64), np.flatnonzero(changes) + 1])


class CountedShard(NamedTuple):
    """One shard, finished: queries (QUERY + side inputs) and holdout traffic (HOLDOUT), each by falling count, then key; HISTORY;
    what each rule of the normal form merged."""

    queries: pa.Table
    holdout: pa.Table
    history: pa.Table
    merges: RuleMerges


def finish_shard(parts: Sequence[pa.Table], sides: Mapping[str, Sequence[pa.Table]], cut: HoldoutCut, rules: HistoryRules) -> CountedShard:
    """One shard from its partial sums and side inputs."""
    table = pa.concat_tables(parts).combine_chunks()
    places = key_places(table["query_key"])
    merges = merges_by_rule(places, table["count"].to_numpy(), table["rules"].to_numpy())
    table = sum_days(table.select(PART.names), places)
    history = shard_history(table, rules)
    high, low = key_words(table["query_key"])
    starts = _starts(high, low)
    day, count = table["day"].to_numpy(), table["count"].to_numpy()
    table = table.take(pa.array(starts))
    if not len(starts):
        return CountedShard(with_side_inputs(QUERY, list(sides)).empty_table(), HOLDOUT.empty_table(), history, merges)
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
    return CountedShard(queries.cast(with_side_inputs(QUERY, list(sides))), holdout.cast(HOLDOUT), history, merges)


def _draw_holdout(chance: npt.NDArray[np.float64], counts: npt.NDArray[np.int64], share: float) -> npt.NDArray[np.int64]:
    """How many of `counts` events are held out: binomial, by inversion of one uniform draw per query."""
    from scipy.stats import binom

    return np.asarray(binom.ppf(chance, counts, share), np.int64).clip(0, counts)


def _side(pieces: Sequence[pa.Table], cut: HoldoutCut, keys: pa.ChunkedArray) -> pa.ChunkedArray:
    """The value of one side input for each of `keys`: that of the most recent row before the cut, null without one."""
    table = pa.concat_tables(pieces)
    if cut.day is not None:
        table = table.filter(pc.less(table["day"], cut.day))
    table = table.combine_chunks()
    table = table.take(pa.array(last_rows(key_places(table["query_key"]), table["time"].to_numpy(), table["seq"].to_numpy())))
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


def keep_shard(folder: Path, number: int, shard: CountedShard) -> CountedShard:
    """A shard whose queries and holdout traffic are on disk, mapped."""
    queries, holdout = (keep_run(folder, f"{kind}-{number}", table) for kind, table in zip(("queries", "holdout"), shard, strict=False))
    return shard._replace(queries=queries, holdout=holdout)


def total(tables: Iterable[pa.Table]) -> int:
    """The sum of their counts."""
    return sum(int(pc.sum(table["count"]).as_py() or 0) for table in tables)
