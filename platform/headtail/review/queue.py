"""The queue: answers that may be wrong, in order of the expected gain of a review, rows drawn at random among them.

In: a table of rows.SUSPECT (any table ref, such as `curate:suspects`), with side inputs when it has them. Out: ranked rows
by place, and the rows of a query. Knows nothing of decisions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headtail.adapters.storage import Storage
from headtail.adapters.storage.receipts import load_ref, output_table
from headtail.core.errors import InputError
from headtail.core.rows import SUSPECT, conform, with_side_inputs
from headtail.core.task import Task

# What `ref` of a queue looks like: the only form of a reference that is taken from a file that someone sends.
REF = re.compile(r"[a-z_]{1,64}/[0-9a-zA-Z]{1,64}:[a-z_]{1,64}")
_LATER = ("place", "evidence", "drawn_from")  # columns that queues of older releases lack; no person is shown them
_SHORT = ("score", "confidence", "agreement")  # float32: shown with the fewest digits that give the same number back


@dataclass(frozen=True)
class Item:
    """One suspect. Keys are hex, answers canonical JSON."""

    rank: int  # from 1
    query_key: str
    query: str
    answer: str | None
    answer_key: str | None
    stratum: str
    count: int
    score: float | None
    gain: float | None
    reasons: tuple[str, ...]
    alternatives: tuple[str, ...]
    confidence: float | None
    agreement: float | None
    side: dict[str, list[str]]


@dataclass(frozen=True)
class Queue:
    """A ranked table of suspects. `ref` names it for ever: stage/fingerprint:output."""

    table: pa.Table
    ref: str
    side_inputs: tuple[str, ...] = ()

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def item(self, place: int) -> Item:
        """The suspect at `place`, from 0."""
        return self._item(place, self.table.slice(place, 1).to_pylist()[0])

    def items(self, places: Iterable[int]) -> Iterable[Item]:
        """The suspects at `places`, in that order."""
        wanted = list(places)
        for start in range(0, len(wanted), 4096):
            part = wanted[start : start + 4096]
            yield from map(self._item, part, self.table.take(pa.array(part, pa.int64())).to_pylist())

    def _item(self, place: int, row: dict[str, Any]) -> Item:
        side = {name: list(row.pop(name) or ()) for name in self.side_inputs}
        row = {name: value for name, value in row.items() if name not in _LATER}
        for name in _SHORT:
            row[name] = None if row[name] is None else float(str(np.float32(row[name])))
        row |= {name: tuple(row[name] or ()) for name in ("reasons", "alternatives")}
        row |= {"stratum": row["stratum"] or "", "count": row["count"] or 0}
        key = row["answer_key"]
        return Item(
            rank=place + 1, side=side, **{**row, "query_key": row["query_key"].hex(), "answer_key": key.hex() if key is not None else None}
        )

    @cached_property
    def places(self) -> dict[bytes, list[int]]:
        """The places of each query, from 0."""
        found: dict[bytes, list[int]] = {}
        for place, key in enumerate(self.table["query_key"].to_pylist()):
            found.setdefault(key, []).append(place)
        return found

    @cached_property
    def gain(self) -> npt.NDArray[np.float64]:
        """Expected gain by place; 0 where it is unknown."""
        return np.nan_to_num(np.asarray(self.table["gain"].fill_null(0.0), np.float64))


def make_queue(table: pa.Table, ref: str, side_inputs: Iterable[str] = ()) -> Queue:
    """`table` as a queue: by place; of rows without a place by falling gain, then by key."""
    side = tuple(name for name in side_inputs if name in table.column_names)
    for name in _LATER:
        if name not in table.column_names:
            table = table.append_column(name, pa.nulls(table.num_rows, SUSPECT.field(name).type))
    table = conform(table, with_side_inputs(SUSPECT, side), ref)
    if table["query_key"].null_count or table["query"].null_count:
        raise InputError("a suspect without query or query_key", where=ref)
    order = pc.sort_indices(table, [("place", "ascending"), ("gain", "descending"), ("query_key", "ascending")])
    return Queue(table.take(order).combine_chunks(), ref, side)


def load_queue(store: Storage, ref: str, task: Task) -> Queue:
    """The queue that a table ref names. InputError when it belongs to another task."""
    receipt, name = load_ref(store, ref)
    if receipt.task not in ("", task.name):
        fix = f"set task to {receipt.task} (--set task={receipt.task}), or name another queue"
        raise InputError("this queue belongs to another task", where=ref, value=receipt.task, fix=fix)
    return make_queue(output_table(store, receipt, name), f"{receipt.path}:{name}", task.side_inputs)
