"""The words of a query log and how often each was typed: what guardrails take for known.

In: tables of queries with counts. Out: WORDS, kept beside the snapshot (`words.parquet`) and read again by whoever serves it.
Counting is in bounded memory: of a log with more distinct words the rarest are dropped on the way. Knows nothing of guardrails.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from headtail.adapters.storage import Storage, read_table
from headtail.cache.manifest import read_manifest

WORDS = pa.schema([("word", pa.string()), ("count", pa.int64())])
WORDS_FILE = "words"  # its name in a manifest
MOST_WORDS = 200_000  # that are kept: some 25 MB in a process that serves them
_HELD = 2_000_000  # distinct words held while counting, some 100 MB


def count_words(tables: Iterable[pa.Table | pa.RecordBatch], side_inputs: Sequence[str] = (), least: int = 2) -> pa.Table:
    """Events by word of queries and side inputs, most frequent first, without words of fewer than `least` events.

    `tables` have query, count and the columns of `side_inputs`. A word counts once for each time it stands in a text.
    """
    held = WORDS.empty_table()
    for table in tables:
        pieces = [held, _split(table.column("query"), table.column("count"))]
        for name in side_inputs:
            texts = table.column(name)
            pieces.append(_split(pc.list_flatten(texts), pc.take(table.column("count"), pc.list_parent_indices(texts))))
        held = _summed(pa.concat_tables(pieces))
        if held.num_rows > _HELD:
            held = held.filter(pc.greater_equal(held.column("count"), least))
    known = held.filter(pc.greater_equal(held.column("count"), least)).sort_by([("count", "descending"), ("word", "ascending")])
    return known.slice(0, MOST_WORDS)


def _split(texts: pa.Array | pa.ChunkedArray, counts: pa.Array | pa.ChunkedArray) -> pa.Table:
    """The words of some texts with the count of each text, summed."""
    words = pc.utf8_split_whitespace(texts)
    flat = pc.utf8_trim(pc.list_flatten(words), characters=_SIGNS)
    table = pa.table([flat, pc.take(counts, pc.list_parent_indices(words))], schema=WORDS)
    return _summed(table.filter(pc.not_equal(table.column("word"), "")))


def _summed(table: pa.Table) -> pa.Table:
    return table.group_by("word").aggregate([("count", "sum")]).rename_columns(["word", "count"]).cast(WORDS)


_SIGNS = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"  # around a word; as guardrails take words


def load_words(store: Storage, snapshot: str) -> Mapping[str, int]:
    """Events by word, of the log that a snapshot was made from; empty where the log was not known."""
    files = read_manifest(store, snapshot).files
    if WORDS_FILE not in files:
        return {}
    return _mapping(read_table(store, files[WORDS_FILE]))


def read_words(file: Path) -> Mapping[str, int]:
    """Events by word, of a local file."""
    return _mapping(pq.read_table(file))


def _mapping(table: pa.Table) -> dict[str, int]:
    return dict(zip(table.column("word").to_pylist(), table.column("count").to_pylist(), strict=True))
