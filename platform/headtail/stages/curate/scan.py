"""The rows whose text is looked at: candidates with query, answer and side inputs in memory, in order of key.

In: a reader of the answers and the places wanted. Out: a Scan, the same whatever the order of rows and shards: personal data
taken out, answers parsed, people's answers in the place of the teacher's. Bounded by the number of places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headtail.core.errors import InputError
from headtail.core.redact import redact
from headtail.core.rows import SIDE_INPUT, uniform_draw
from headtail.core.task import Task
from headtail.stages.curate.columns import Objects, clean_queries

TEXT = ["query_key", "query", "answer", "answer_key", "state", "stratum", "count", "confidence", "agreement", "samples"]
BATCH = 16_384
Reader = Callable[[list[str]], Iterable[pa.Table]]


class Scan(NamedTuple):
    """One entry per row looked at, by query_key and answer_key."""

    table: pa.Table  # TEXT (query and key clean), then the side inputs
    place: npt.NDArray[np.int64]  # in reading order
    lot: npt.NDArray[np.float64]  # 0..1 by key and seed, for folds and samples
    query: list[str]
    side: list[str]  # all side inputs of the row as one text, in small letters
    answer: list[Any]  # parsed, a person's where there is one; None when the row has none
    human: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.query)


def scan(read: Reader, task: Task, positions: npt.NDArray[np.int64], people: Objects, seed: int) -> Scan:
    """The rows at `positions` (rising). `people`: a person's answer or None for every answer, in reading order."""
    parts, places = [], []
    for table, start in place_pieces(read([*TEXT, *task.side_inputs])):
        mine = positions[np.searchsorted(positions, start) : np.searchsorted(positions, start + table.num_rows)]
        if len(mine):
            part = table.take(pa.array(mine - start))
            texts, keys = clean_queries(part)
            part = part.set_column(0, "query_key", keys).set_column(1, "query", pa.array(texts, pa.string()))
            for name in task.side_inputs:
                part = part.set_column(part.schema.get_field_index(name), name, side_column(part, name))
            parts.append(part)
            places.append(mine)
    if not parts:
        empty = np.zeros(0, dtype=np.int64)
        return Scan(pa.table({name: [] for name in TEXT}), empty, empty.astype(float), [], [], [], empty.astype(bool))
    whole, place = pa.concat_tables(parts), np.concatenate(places)
    order = pc.sort_indices(whole, [("query_key", "ascending"), ("answer_key", "ascending")])
    whole, place = whole.take(order).combine_chunks(), place[order.to_numpy()]
    said = [people[at] for at in place.tolist()]
    stored = [person or text for person, text in zip(said, whole["answer"].to_pylist(), strict=True)]
    queries = whole["query"].to_pylist()
    answers = [parse_clean(task, text, query) if text is not None else None for text, query in zip(stored, queries, strict=True)]
    human = np.asarray([person is not None for person in said])
    return Scan(whole, place, uniform_draw(whole["query_key"], "scan", seed), queries, _sides(whole, task), answers, human)


def side_column(table: pa.Table, name: str) -> pa.Array:
    """A side input without personal data."""
    return pa.array([redact_values(values) for values in table[name].to_pylist()], SIDE_INPUT)


def _sides(table: pa.Table, task: Task) -> list[str]:
    columns = [table[name].to_pylist() for name in task.side_inputs]
    rows = zip(*columns, strict=True) if columns else [()] * table.num_rows
    return [" ".join(text for values in row for text in values or ()).casefold() for row in rows]


def place_pieces(tables: Iterable[pa.Table]) -> Iterator[tuple[pa.Table, int]]:
    """Pieces of at most 16 thousand rows, each with the place of its first row."""
    start = 0
    for table in tables:
        for offset in range(0, table.num_rows, BATCH):
            yield table.slice(offset, BATCH), start + offset
        start += table.num_rows


def parse_clean(task: Task, text: str, query: str) -> Any:
    """The answer in `text`, parsed once more, without personal data. InputError when the task's schema refuses it."""
    answer, problem = task.parse(text)
    if problem:
        raise InputError(
            f"an answered row is not valid under task {task.name}: {problem}",
            where=f"query {query!r}",
            value=text,
            fix="run precompute again",
        )
    without = redact_values(answer)
    if without != answer:
        _, problem = task.parse(task.dump(without))
        if problem:
            raise InputError(
                f"an answer holds personal data, and without it is not valid under task {task.name}: {problem}",
                where=f"query {query!r}",
                fix="drop this answer in review, or let the schema take <email>, <phone> and <card>",
            )
    return without


def redact_values(value: Any) -> Any:
    """A JSON value with personal data taken out of every text."""
    if isinstance(value, str):
        return redact(value).text
    if isinstance(value, list):
        return [redact_values(item) for item in value]
    if isinstance(value, dict):
        return {name: redact_values(item) for name, item in value.items()}
    return value
