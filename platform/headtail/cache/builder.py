"""Build a generation on local disk from ANSWER rows, streaming.

In: streams of ANSWER tables, in order of precedence. Out: a Built: Parquet, LMDB, counts. Rows are spilled to one file
per range of keys, then each range is sorted, deduplicated and written in order, so at most one range
(PARTITION_ROWS) is in memory and LMDB is filled by appending. Every row offered is published or counted in `left_out`.
Knows nothing of stores, manifests or releases.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from headtail.cache import FORMAT, SOURCES, VALUE, Built, told
from headtail.errors import InputError, LedgerError
from headtail.keys import KEY_BYTES, query_key
from headtail.rows import ANSWER, CACHED, State, conform, key_words

PARTITION_ROWS = 500_000  # rows sorted at a time: about 250 MB at 250 bytes a row, twice while they are moved
SLICE_ROWS = 65_536  # rows turned into Python bytes at a time
EXAMPLES = 12
SPILLED = pa.schema(  # 64-bit offsets: a range may hold more than 2 GiB of text
    [pa.field(f.name, pa.large_string() if f.type == pa.string() else f.type) for f in CACHED] + [pa.field("precedence", pa.int16())]
)


def build_generation(
    streams: Sequence[Iterable[pa.Table]],
    folder: Path,
    *,
    expect: int = 0,
    min_confidence: Mapping[str, float] | None = None,
    partition_rows: int = PARTITION_ROWS,
) -> Built:
    """A generation in `folder` (empty, local). The first stream that has a publishable answer to a query wins.

    `expect`: rows about to come, to choose how finely to partition. `min_confidence`: by source; rows below, and rows
    without confidence where a minimum above 0 is asked, are left out. The result does not depend on `partition_rows`.
    """
    left_out: Counter[str] = Counter()
    with told("build the generation on", folder):
        with _Spill(folder, max(1, min(512, -(-expect // partition_rows)))) as spill:
            for precedence, stream in enumerate(streams):
                for table in stream:
                    kept = _publishable(conform(table, ANSWER, "answers"), min_confidence or {}, left_out)
                    spill.add(kept.append_column("precedence", pa.array(np.full(kept.num_rows, precedence, np.int16))))
        writer = _Writer(folder, spill.bytes, spill.rows)
        for part in spill.sorted(left_out):
            writer.add(part)
        return writer.finish(spill.rows, left_out)


def _publishable(table: pa.Table, min_confidence: Mapping[str, float], left_out: Counter[str]) -> pa.Table:
    """The answered, confident rows, as CACHED; the others are counted by reason."""
    _plausible(table)
    states = pc.value_counts(table.column("state")).to_pylist()
    left_out.update({item["values"]: item["counts"] for item in states if item["values"] != State.ANSWERED})
    answered = table.filter(pc.equal(table.column("state"), State.ANSWERED.value))
    if answered.column("answer").null_count:
        raise InputError("a row in state answered has no answer", where="answers", fix="run precompute again: its output is damaged")
    sure: Any = np.ones(answered.num_rows, dtype=bool)
    for source, least in min_confidence.items():
        if least > 0:
            above = pc.fill_null(pc.greater_equal(answered.column("confidence"), pa.scalar(least, pa.float32())), False)
            sure &= np.asarray(pc.or_(above, pc.not_equal(answered.column("source"), source)))
    left_out["unconfident"] += int((~sure).sum())
    return answered.filter(pa.array(sure)).select(CACHED.names)


def _plausible(table: pa.Table) -> None:
    """Refuse unknown sources and states, and keys that are not those of their texts (checked on a sample)."""
    for column, known in (("source", set(SOURCES)), ("state", set(State))):
        strange = set(pc.unique(table.column(column)).to_pylist()) - known
        if strange:
            raise InputError(
                f"answers hold an unknown {column}", where=column, value=sorted(map(str, strange)), fix=f"known: {', '.join(sorted(known))}"
            )
    if table.column("query_key").null_count or table.column("query").null_count:
        raise InputError("query_key and query must not be null", where="answers", fix="run precompute again: its output is damaged")
    sample = table.slice(0, 64)
    for key, text in zip(sample.column("query_key").to_pylist(), sample.column("query").to_pylist(), strict=True):
        if key != query_key(text):
            raise InputError(
                "query_key is not the key of its query",
                where="answers",
                value=text,
                fix="ingest the log again with this version of headtail",
            )


class _Spill:
    """Rows on disk, one Arrow stream per range of keys; ranges are in key order."""

    def __init__(self, folder: Path, partitions: int) -> None:
        self.paths = [folder / f"spill-{i:03}.arrow" for i in range(partitions)]
        self.rows = self.bytes = 0

    def __enter__(self) -> _Spill:
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        self._sinks = [pa.OSFile(str(path), "wb") for path in self.paths]
        self._writers = [pa.ipc.new_stream(sink, SPILLED, options=options) for sink in self._sinks]
        return self

    def __exit__(self, *_: object) -> None:
        for writer, sink in zip(self._writers, self._sinks, strict=True):
            writer.close()
            sink.close()

    def add(self, table: pa.Table) -> None:
        """Rows of CACHED with their precedence."""
        if not table.num_rows:
            return
        table = table.cast(SPILLED)
        self.rows += table.num_rows
        self.bytes += sum(int(pc.sum(pc.binary_length(table.column(name))).as_py() or 0) for name in ("query", "answer"))
        if len(self.paths) == 1:
            self._writers[0].write(table)
            return
        place = (key_words(table.column("query_key"))[0] >> np.uint64(48)) * np.uint64(len(self.paths)) >> np.uint64(16)
        order = np.argsort(place, kind="stable")
        ends = np.searchsorted(place[order], np.arange(len(self.paths) + 1, dtype=np.uint64))
        moved = table.take(pa.array(order))
        for i in np.flatnonzero(np.diff(ends)):
            self._writers[i].write(moved.slice(int(ends[i]), int(ends[i + 1] - ends[i])))

    def sorted(self, left_out: Counter[str]) -> Iterator[pa.Table]:
        """Each range, sorted by key, one row per key; the files are removed as they are read."""
        for path in self.paths:
            with pa.OSFile(str(path), "rb") as source:
                table = pa.ipc.open_stream(source).read_all()
            path.unlink()
            if table.num_rows:
                yield _first_per_key(table, left_out)


def _first_per_key(table: pa.Table, left_out: Counter[str]) -> pa.Table:
    high, low = key_words(table.column("query_key"))
    precedence = table.column("precedence").to_numpy()
    order = np.lexsort((precedence, low, high))  # stable: within one stream the first row wins
    high, low = high[order], low[order]
    first = np.ones(len(order), dtype=bool)
    first[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    if not first.all():
        queries = table.column("query")
        winner = order[np.flatnonzero(first)[np.cumsum(first) - 1]]
        other = pc.not_equal(queries.take(pa.array(order[~first])), queries.take(pa.array(winner[~first])))
        collisions = int(pc.sum(other).as_py() or 0)
        left_out.update({"collision": collisions, "duplicate": int((~first).sum()) - collisions})
    return table.take(pa.array(order[first])).drop_columns(["precedence"])


class _Writer:
    """Sorted rows into Parquet and LMDB at once; digests as they pass."""

    def __init__(self, folder: Path, text_bytes: int, rows: int) -> None:
        self.parquet, self.lmdb = folder / "answers.parquet", folder / "lmdb"
        self._parquet = pq.ParquetWriter(self.parquet, CACHED, compression="zstd")
        # Short values share pages of 4 KiB, long ones take whole pages: 4 times the text is above the worst case. The file is sparse.
        self._env = lmdb.open(str(self.lmdb), map_size=4 * text_bytes + 256 * rows + (64 << 20), lock=False, sync=False, metasync=False)
        self._digests = [blake2b(digest_size=KEY_BYTES) for _ in range(4)]
        self._prefixes: list[npt.NDArray[np.uint64]] = []
        self._sources: Counter[str] = Counter()
        self._top: list[tuple[int, str]] = []

    def add(self, table: pa.Table) -> None:
        """The next rows in key order."""
        for start in range(0, table.num_rows, SLICE_ROWS):
            piece = table.slice(start, SLICE_ROWS).combine_chunks()
            self._parquet.write_table(piece.cast(CACHED))
            keys, values = piece.column("query_key"), _values(piece)
            with self._env.begin(write=True) as txn:
                pairs = zip(keys.to_pylist(), values.to_pylist(), strict=True)
                done, added = txn.cursor().putmulti(pairs, append=True)
            if not done == added == piece.num_rows:
                raise LedgerError("LMDB did not take every row", where=str(self.lmdb), value=f"{added} of {piece.num_rows}")
            self._note(piece, values)

    def _note(self, piece: pa.Table, values: pa.Array) -> None:
        high, low = key_words(piece.column("query_key"))
        lengths = np.asarray(pc.binary_length(values)).astype("<u8")
        counts = np.asarray(pc.fill_null(piece.column("count"), 0)).astype("<i8")
        body = pc.binary_join(
            pa.LargeListArray.from_arrays(pa.array([0, len(values)], pa.int64()), values), pa.scalar(b"", pa.large_binary())
        )
        for digest, data in zip(
            self._digests, (np.stack([high, low], 1).tobytes(), lengths.tobytes(), counts.tobytes(), body[0].as_buffer()), strict=True
        ):
            digest.update(data)
        self._prefixes.append(high)
        for item in pc.value_counts(piece.column("source")).to_pylist():
            self._sources[item["values"]] += item["counts"]
        best = piece.select(["count", "query"]).take(pc.select_k_unstable(piece, k=EXAMPLES, sort_keys=[("count", "descending")]))
        found = zip((c or 0 for c in best.column("count").to_pylist()), best.column("query").to_pylist(), strict=True)
        self._top = heapq.nsmallest(EXAMPLES, [*self._top, *found], key=lambda item: (-item[0], item[1]))

    def finish(self, offered: int, left_out: Counter[str]) -> Built:
        """Close and fsync; what was spilled must have been written or counted."""
        self._parquet.close()
        self._env.sync(True)
        entries = self._env.stat()["entries"]
        self._env.close()
        prefixes = np.concatenate(self._prefixes) if self._prefixes else np.empty(0, np.uint64)
        if entries != len(prefixes) or offered != entries + left_out["duplicate"] + left_out["collision"]:
            raise LedgerError(
                "rows of the generation do not add up",
                value=f"{offered} offered, {entries} in LMDB, {len(prefixes)} written, {dict(left_out)} left out",
            )
        content = blake2b(b"".join(d.digest() for d in self._digests), digest_size=KEY_BYTES).hexdigest()
        shown = tuple(query for _, query in self._top)
        return Built(self.parquet, self.lmdb, dict(sorted(self._sources.items())), +left_out, shown, content, prefixes)


def _values(piece: pa.Table) -> pa.Array:
    """The LMDB value of each row: VALUE's header, the query, the answer. Built in Arrow: no Python object per field."""
    queries = piece.column("query").combine_chunks().cast(pa.large_binary())
    header = np.zeros(piece.num_rows, dtype=[("f", "u1"), ("s", "u1"), ("c", "<f4"), ("k", "V16"), ("n", "<u4")])
    header["f"] = FORMAT
    header["s"] = np.asarray(pc.index_in(piece.column("source"), value_set=pa.array(SOURCES, pa.large_string())))
    header["c"] = np.asarray(pc.fill_null(piece.column("confidence"), float("nan")))
    header["k"] = [key or bytes(KEY_BYTES) for key in piece.column("answer_key").to_pylist()]
    header["n"] = np.asarray(pc.binary_length(queries))
    fixed = pa.FixedSizeBinaryArray.from_buffers(pa.binary(VALUE.size), len(header), [None, pa.py_buffer(header.tobytes())])
    answers = piece.column("answer").combine_chunks().cast(pa.large_binary())
    return pc.binary_join_element_wise(fixed.cast(pa.large_binary()), queries, answers, pa.scalar(b"", pa.large_binary()))
