"""Build a snapshot on local disk from ANSWER rows, as a merge of sorted streams.

In: streams of ANSWER tables, each in order of query_key, in order of precedence. Out: a LocalSnapshot: Parquet, LMDB, counts.
The first stream that has a publishable answer to a key wins; every row offered is published or counted in `left_out`.
One batch per stream is in memory; Parquet and digests are made on a thread beside LMDB. Knows nothing of stores,
manifests or releases.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from headtail.cache.lmdb_file import SOURCES, LmdbFile, Values
from headtail.cache.merge import SortedBatch, merge_order, merge_rounds, sorted_batches
from headtail.cache.snapshot import LocalSnapshot, disk_errors
from headtail.core.errors import InputError, LedgerError
from headtail.core.keys import KEY_BYTES, query_key
from headtail.core.redact import PLACEHOLDER
from headtail.core.rows import ANSWER, CACHED, State, conform, key_words

PIECE_ROWS = 131_072  # rows written at a time: a row group of the Parquet file, a transaction of LMDB
PIECE_BYTES = 256 << 20  # of text in a piece; fewer rows when answers are long
EXAMPLES = 12
OFFERED = pa.schema([ANSWER.field(name) for name in (*CACHED.names, "state")])  # what is read of ANSWER
UNRATED = "without_confidence"  # reason of answers that have none where a source's minimum is above 0; .<source> follows
Withhold = Callable[[pa.Table], Sequence[str]]
_AHEAD = 2  # pieces that may wait for the Parquet thread


def build_snapshot(
    streams: Sequence[Iterable[pa.Table]],
    folder: Path,
    *,
    min_confidence: Mapping[str, float] | None = None,
    share_redacted: bool = False,
    labels: Sequence[str] = (),
    withhold: Withhold | None = None,
) -> LocalSnapshot:
    """A snapshot in `folder` (empty, local). The first stream that has a publishable answer to a query wins.

    Streams are ascending by query_key, of OFFERED's columns or more; of rows with one key the first wins. `min_confidence`: by source;
    rows below, and rows without confidence where a minimum above 0 is asked, are left out. A redacted query stands
    for many questions: it is left out unless `share_redacted`. `labels`: of streams, for errors. `withhold`: a reason for each row of a
    CACHED table, empty where it may be published; the others are counted by it.
    """
    left_out: Counter[str] = Counter()
    names = [*labels, *(f"answers {i}" for i in range(len(labels), len(streams)))]
    with disk_errors("build the snapshot on", folder):
        writer = _Writer(folder)
    try:
        for piece in cut_pieces(merge_streams(streams, min_confidence or {}, left_out, names, share_redacted, withhold)):
            with disk_errors("build the snapshot on", folder):
                writer.add(piece)
        with disk_errors("build the snapshot on", folder):
            return writer.finish(left_out)
    finally:
        writer.close()


def merge_streams(
    streams: Sequence[Iterable[pa.Table]],
    least: Mapping[str, float],
    left_out: Counter[str],
    labels: Sequence[str],
    share_redacted: bool = False,
    withhold: Withhold | None = None,
) -> Iterator[pa.Table]:
    """CACHED rows in order of key, one per key; the others are counted in `left_out`."""
    offers = [_offers(stream, least, left_out, label, share_redacted, withhold) for stream, label in zip(streams, labels, strict=True)]
    for cut in merge_rounds(offers):
        some = [table for table in cut if table.num_rows]
        table = some[0] if len(some) == 1 else pa.concat_tables(some)
        yield table if len(some) == 1 else _first_of_each(table, left_out)


def cut_pieces(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows as pieces of PIECE_ROWS (fewer where they are long, and at the end), each in one chunk."""
    held: list[pa.Table] = []
    rows = 0
    for table in tables:
        held.append(table)
        rows += table.num_rows
        while rows >= PIECE_ROWS:
            whole = pa.concat_tables(held)
            yield from _split_by_size(whole.slice(0, PIECE_ROWS))
            held, rows = [whole.slice(PIECE_ROWS)], rows - PIECE_ROWS
    if rows:
        yield from _split_by_size(pa.concat_tables(held))


def _split_by_size(table: pa.Table) -> Iterator[pa.Table]:
    if table.num_rows > 1 and table.nbytes > PIECE_BYTES:
        half = table.num_rows // 2
        yield from _split_by_size(table.slice(0, half))
        yield from _split_by_size(table.slice(half))
    else:
        yield table.combine_chunks()


def _offers(
    stream: Iterable[pa.Table],
    least: Mapping[str, float],
    left_out: Counter[str],
    label: str,
    share_redacted: bool,
    withhold: Withhold | None,
) -> Iterator[SortedBatch]:
    """The rows of one stream that may be published, each key once, in order."""
    last: pa.Table | None = None  # the last row kept: its key may go on in the next batch
    for table, bound in sorted_batches((conform(table, OFFERED, label) for table in stream), label):
        kept = _publishable_rows(table, least, left_out, label)
        if not share_redacted:
            redacted = pc.match_substring_regex(kept.column("query"), PLACEHOLDER)
            left_out["redacted"] += pc.sum(redacted).as_py() or 0
            kept = kept.filter(pc.invert(redacted))
        if withhold is not None and kept.num_rows:
            reasons = withhold(kept)
            left_out.update(Counter(reason for reason in reasons if reason))
            kept = kept.filter(pa.array([not reason for reason in reasons]))
        if kept.num_rows:
            kept = _first_of_each(kept if last is None else pa.concat_tables([last, kept]), left_out).slice(last is not None)
        if kept.num_rows:
            last = kept.slice(kept.num_rows - 1)
        yield SortedBatch(kept, bound)


def _publishable_rows(table: pa.Table, least: Mapping[str, float], left_out: Counter[str], label: str) -> pa.Table:
    """The answered, confident rows, as CACHED; the others are counted by reason."""
    _check_plausible(table, label)
    states = {item["values"]: item["counts"] for item in pc.value_counts(table.column("state")).to_pylist()}
    answered = table
    if set(states) != {State.ANSWERED.value}:
        left_out.update({state: count for state, count in states.items() if state != State.ANSWERED})
        answered = table.filter(pc.equal(table.column("state"), State.ANSWERED.value))
    if answered.column("answer").null_count:
        raise InputError("a row in state answered has no answer", where=label, fix="run precompute again: its output is damaged")
    sure: Any = np.ones(answered.num_rows, dtype=bool)
    for source, least_of in least.items():
        if least_of > 0:
            mine = np.asarray(pc.equal(answered.column("source"), source))
            rated = np.asarray(pc.is_valid(answered.column("confidence")))
            above = pc.fill_null(pc.greater_equal(answered.column("confidence"), pa.scalar(least_of, pa.float32())), False)
            left_out[f"{UNRATED}.{source}"] += int((mine & ~rated).sum())
            left_out["unconfident"] += int((mine & rated & ~np.asarray(above)).sum())
            sure &= np.asarray(above) | ~mine
    return (answered if sure.all() else answered.filter(pa.array(sure))).select(CACHED.names)


def _check_plausible(table: pa.Table, label: str) -> None:
    """Refuse unknown sources and states, and keys that are not those of their texts (checked on a sample)."""
    for column, known in (("source", set(SOURCES)), ("state", set(State))):
        strange = set(pc.unique(table.column(column)).to_pylist()) - known
        if strange:
            raise InputError(
                f"answers hold an unknown {column}", where=label, value=sorted(map(str, strange)), fix=f"known: {', '.join(sorted(known))}"
            )
    if table.column("query_key").null_count or table.column("query").null_count:
        raise InputError("query_key and query must not be null", where=label, fix="run precompute again: its output is damaged")
    sample = table.slice(0, 64)
    for key, text in zip(sample.column("query_key").to_pylist(), sample.column("query").to_pylist(), strict=True):
        if key != query_key(text):
            raise InputError(
                "query_key is not the key of its query", where=label, value=text, fix="ingest the log again with this version of headtail"
            )


def _first_of_each(table: pa.Table, left_out: Counter[str]) -> pa.Table:
    """The first row of each key, in order of key; the others are counted, apart when their text differs."""
    order, first = merge_order(*key_words(table.column("query_key")))
    if not first.all():
        queries = table.column("query")
        winner = order[np.flatnonzero(first)[np.cumsum(first) - 1]]
        other = pc.not_equal(queries.take(pa.array(order[~first])), queries.take(pa.array(winner[~first])))
        collisions = int(pc.sum(other).as_py() or 0)
        left_out.update({"collision": collisions, "duplicate": int((~first).sum()) - collisions})
    elif (order[1:] > order[:-1]).all():
        return table
    return table.take(pa.array(order[first]))


class _Writer:
    """Pieces in order of key into LMDB here, into Parquet and digests on a thread."""

    def __init__(self, folder: Path) -> None:
        self.parquet, self.lmdb = folder / "answers.parquet", folder / "lmdb"
        self._lmdb = LmdbFile(self.lmdb)
        # Keys are random and texts differ: a dictionary would be filled and thrown away.
        self._parquet = pq.ParquetWriter(self.parquet, CACHED, compression="zstd", use_dictionary=["source"])
        self._digests = [blake2b(digest_size=KEY_BYTES) for _ in range(4)]
        self._prefixes: list[npt.NDArray[np.uint64]] = []
        self._sources: Counter[str] = Counter()
        self._top: list[tuple[int, str]] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="headtail-parquet")
        self._beside: deque[Future[None]] = deque()

    def add(self, piece: pa.Table) -> None:
        """The next rows in key order."""
        values = Values(piece)
        self._beside.append(self._thread.submit(self._note, piece, values))
        self._lmdb.add(piece, values)
        while len(self._beside) > _AHEAD:
            self._beside.popleft().result()

    def _note(self, piece: pa.Table, values: Values) -> None:
        high, low = key_words(piece.column("query_key"))
        lengths = np.diff(values.ends).astype("<u8")
        counts = np.asarray(pc.fill_null(piece.column("count"), 0)).astype("<i8")
        for digest, data in zip(self._digests, (np.stack([high, low], 1), lengths, counts, values.body), strict=True):
            digest.update(data)
        self._prefixes.append(high)
        for item in pc.value_counts(piece.column("source")).to_pylist():
            self._sources[item["values"]] += item["counts"]
        most = pc.select_k_unstable(piece, k=EXAMPLES, sort_keys=[("count", "descending"), ("query", "ascending")])
        best = piece.select(["count", "query"]).take(most)
        found = zip((c or 0 for c in best.column("count").to_pylist()), best.column("query").to_pylist(), strict=True)
        self._top = heapq.nsmallest(EXAMPLES, [*self._top, *found], key=lambda item: (-item[0], item[1]))
        self._parquet.write_table(piece, row_group_size=PIECE_ROWS)

    def finish(self, left_out: Counter[str]) -> LocalSnapshot:
        """Close and sync both files; they must hold the same rows."""
        while self._beside:
            self._beside.popleft().result()
        self._parquet.close()
        self._lmdb.finish()
        rows = pq.read_metadata(self.parquet).num_rows
        prefixes = np.concatenate(self._prefixes) if self._prefixes else np.empty(0, np.uint64)
        if not rows == self._lmdb.rows == len(prefixes) == sum(self._sources.values()):
            raise LedgerError(
                "Parquet and LMDB hold different numbers of rows", value=f"{rows} and {self._lmdb.rows} rows, {len(prefixes)} keys"
            )
        content = blake2b(b"".join(d.digest() for d in self._digests), digest_size=KEY_BYTES).hexdigest()
        shown = tuple(query for _, query in self._top)
        return LocalSnapshot(self.parquet, self.lmdb, dict(sorted(self._sources.items())), +left_out, shown, content, prefixes)

    def close(self) -> None:
        """Close thread and files, whether finished or not."""
        self._thread.shutdown()
        self._lmdb.close()
        with suppress(OSError):  # a full disk was reported before
            self._parquet.close()
