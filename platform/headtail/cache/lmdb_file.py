"""The LMDB file of a snapshot: how a row is laid out, and how many are written at once.

In: CACHED tables in order of query_key, each key once. Out: a folder with `data.mdb`, synced and checked. Values are
made in Arrow and cut from one buffer; rows are appended, so pages are full and nothing is sorted or moved.
Knows nothing of answers, manifests or stores.
"""

from __future__ import annotations

import struct
from itertools import pairwise
from pathlib import Path

import lmdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headtail.core.errors import InputError, LedgerError
from headtail.core.keys import KEY_BYTES
from headtail.core.rows import Source

FORMAT = 3  # of a value; a reader refuses any other. 1 kept the query's length, at 4 bytes a row; 2 knew one student
VALUE = struct.Struct("<Bf16s")  # format and source, confidence (NaN: none), answer_key; then query, NUL, answer
SOURCES = tuple(Source)  # a value holds an index into this, below 16: append only
_NUL = b"\0"  # no normalised text holds one
_SPARE = 64 << 20  # bytes of the map kept free beyond the worst case of the next piece
_TAKEN = 16_384  # rows of a transaction: its pages, some 3 MB, stay near the processor
_CHECKED = 16  # rows of a piece read back at the end


class Values:
    """The LMDB values of some rows, one after another in `body`; row i is body[ends[i]:ends[i + 1]]."""

    def __init__(self, piece: pa.Table) -> None:
        queries, answers = (_whole(piece.column(name)) for name in ("query", "answer"))
        header = np.zeros(len(queries), dtype=[("f", "u1"), ("c", "<f4"), ("k", f"V{KEY_BYTES}")])
        kinds = pc.index_in(piece.column("source"), value_set=pa.array(SOURCES, piece.schema.field("source").type))
        header["f"] = np.asarray(kinds, dtype=np.uint8) + (FORMAT << 4)
        header["c"] = np.asarray(pc.fill_null(piece.column("confidence"), float("nan")))
        header["k"] = fixed_width(pc.fill_null(piece.column("answer_key"), bytes(KEY_BYTES)), KEY_BYTES)
        heads = pa.FixedSizeBinaryArray.from_buffers(pa.binary(VALUE.size), len(header), [None, pa.py_buffer(header)])
        made = pc.binary_join_element_wise(
            heads.cast(pa.large_binary()), queries, pa.scalar(_NUL, pa.large_binary()), answers, pa.scalar(b"", pa.large_binary())
        )
        self.ends = np.frombuffer(made.buffers()[1], np.int64)[: len(made) + 1]
        self.body: pa.Buffer = made.buffers()[2]
        if _NUL in _body(queries):
            raise InputError("a query holds the character NUL", where="answers", fix="ingest the log again: `normalise` removes it")

    def __len__(self) -> int:
        return len(self.ends) - 1


def _whole(column: pa.ChunkedArray) -> pa.Array:
    """A column of text as one array of bytes with 64-bit offsets."""
    return column.cast(pa.large_binary()).combine_chunks()


def _body(texts: pa.Array) -> bytes:
    """The bytes of all texts together; of a slice only its own."""
    ends = np.frombuffer(texts.buffers()[1], np.int64)[texts.offset : texts.offset + len(texts) + 1] if len(texts) else [0, 0]
    data: bytes = texts.buffers()[2].slice(int(ends[0]), int(ends[-1] - ends[0])).to_pybytes() if ends[-1] > ends[0] else b""
    return data


def fixed_width(column: pa.ChunkedArray, width: int) -> npt.NDArray[np.void]:
    """A column of values of `width` bytes, without nulls; its `tolist` gives bytes three times as fast as Arrow's."""
    array = column.combine_chunks()
    return (
        np.frombuffer(array.buffers()[1], f"V{width}")[array.offset : array.offset + len(array)] if len(array) else np.zeros(0, f"V{width}")
    )


class LmdbFile:
    """An LMDB file being written. Errors of LMDB and the disk come as they are."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rows = folder, 0
        self._size = _SPARE  # of the map; grown as rows come
        self._env = lmdb.open(str(folder), map_size=self._size, lock=False, sync=False, metasync=False)
        self._sample: list[tuple[bytes, bytes]] = []

    def add(self, piece: pa.Table, values: Values) -> None:
        """The next rows in order of key, with their values."""
        self._grow(len(values.body) + len(values) * 64)
        keys, ends, body = fixed_width(piece.column("query_key"), KEY_BYTES).tolist(), values.ends.tolist(), values.body.to_pybytes()
        for start in range(0, len(keys), _TAKEN):
            rows = (body[a:b] for a, b in pairwise(ends[start : start + _TAKEN + 1]))  # as LMDB takes them: a list is a third slower
            with self._env.begin(write=True) as txn:
                done, added = txn.cursor().putmulti(zip(keys[start : start + _TAKEN], rows, strict=True), append=True)
            if not done == added == len(keys[start : start + _TAKEN]):
                raise LedgerError("LMDB did not store every row", where=str(self.folder), value=f"{added} of {len(keys)}")
        self.rows += len(keys)
        step = max(1, len(keys) // _CHECKED)
        self._sample += [(keys[i], body[ends[i] : ends[i + 1]]) for i in range(0, len(keys), step)]

    def _grow(self, more: int) -> None:
        """Make room for `more` bytes of rows: short ones share pages of 4 KiB, long ones take whole pages, so at most twice that."""
        used = (self._env.info()["last_pgno"] + 1) * 4096
        if used + 2 * more + _SPARE > self._size:
            self._size = 2 * (used + 2 * more + _SPARE)
            self._env.set_mapsize(self._size)

    def finish(self) -> None:
        """Sync to disk, then open what was written and compare its count and a sample of its rows."""
        self._env.sync(True)
        self.close()
        with lmdb.open(str(self.folder), readonly=True, lock=False, create=False, readahead=False) as env, env.begin() as txn:
            entries = env.stat()["entries"]
            wrong = sum(txn.get(key) != value for key, value in self._sample)
        if entries != self.rows or wrong:
            value = f"{entries} entries for {self.rows} rows; {wrong} of {len(self._sample)} rows read back differ"
            raise LedgerError("the LMDB file does not hold what was written", where=str(self.folder), value=value)

    def close(self) -> None:
        """Close the file; nothing more can be added."""
        self._env.close()
