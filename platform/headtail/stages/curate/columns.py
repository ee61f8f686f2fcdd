"""The narrow columns of all answers, in reading order: what is needed to judge a row without its text in memory.

In: tables of ANSWER rows, shard by shard, and the labelled queries. Out: arrays of about 100 bytes a row. Personal data
is removed from queries first; a query that changed gets a new key. LeakError for a labelled query that is not marked `eval_only`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headtail.core.errors import InputError, LeakError
from headtail.core.keys import KEY_BYTES, normalise, query_key
from headtail.core.leaks import LabelledQueries
from headtail.core.redact import redact
from headtail.core.rows import key_words, uniform_draw

NARROW = ["query_key", "query", "answer_key", "state", "confidence", "count", "stratum", "eval_only"]
Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Objects = npt.NDArray[np.object_]


class AnswerColumns(NamedTuple):
    """One entry per answer."""

    key: npt.NDArray[np.uint64]  # n x 2, words of query_key
    answer_key: npt.NDArray[np.uint64]  # n x 2
    lot: Floats  # 0..1 by query_key and seed alone, so that shards and order change nothing
    state: Objects
    confidence: Floats  # NaN when the engine gave none
    events: Floats
    stratum: Objects
    eval_only: Bools
    near_labels: Bools  # repeats a labelled query nearly; never set for eval_only rows


def read_columns(tables: Iterable[pa.Table], labels: LabelledQueries, seed: int) -> AnswerColumns:
    """The columns of all tables. InputError when there is no row."""
    parts: dict[str, list[Any]] = {name: [] for name in AnswerColumns._fields}
    for table in tables:
        texts, keys = clean_queries(table)
        held = _eval_only(table, texts, keys, labels)
        parts["key"].append(np.column_stack(key_words(keys)))
        parts["answer_key"].append(np.column_stack(key_words(table["answer_key"])))
        parts["lot"].append(uniform_draw(keys, "curate", seed))
        parts["confidence"].append(table["confidence"].cast(pa.float64()).fill_null(float("nan")).to_numpy())
        parts["events"].append(table["count"].cast(pa.float64()).fill_null(0.0).to_numpy())
        parts["eval_only"].append(held)
        near = [not out and labels.find(text) is not None for text, out in zip(texts, held.tolist(), strict=True)]
        parts["near_labels"].append(np.asarray(near, dtype=bool))
        for name in ("state", "stratum"):  # dictionary-encoded, so that a million rows hold five strings
            coded = table[name].fill_null("").combine_chunks().dictionary_encode()
            parts[name].append(np.asarray(coded.dictionary.to_pylist(), dtype=object)[coded.indices.to_numpy()])
    if not sum(map(len, parts["state"])):
        raise InputError("no answers to curate", where="answers", fix="run precompute on at least one row")
    return AnswerColumns(**{name: np.concatenate(found) for name, found in parts.items()})


def clean_queries(table: pa.Table) -> tuple[list[str], pa.Array]:
    """Query texts without personal data, and their keys: as stored, or computed again where something was removed."""
    texts = [normalise(query) for query in table["query"].to_pylist()]
    keys = table["query_key"].combine_chunks().cast(pa.binary(KEY_BYTES))
    taken_out = {row: found.text for row, text in enumerate(texts) if (found := redact(text)).any}
    if taken_out:
        listed = keys.to_pylist()
        for row, text in taken_out.items():
            texts[row], listed[row] = text, query_key(text)
        keys = pa.array(listed, pa.binary(KEY_BYTES))
    return texts, keys


def _eval_only(table: pa.Table, texts: list[str], keys: pa.Array, labels: LabelledQueries) -> Bools:
    """Rows that are marked `eval_only`. LeakError when a labelled query is not: by its stored key, or by the key of its text."""
    anew = pa.array([query_key(text) for text in texts], pa.binary(KEY_BYTES))
    of_labelled = pc.or_(pc.is_in(anew, value_set=labels.keys), pc.is_in(keys, value_set=labels.keys))
    marked = table["eval_only"].fill_null(False).combine_chunks()
    leaked = table.filter(pc.and_(of_labelled, pc.invert(marked)))
    if leaked.num_rows:
        raise LeakError(
            f"{leaked.num_rows:,} answers to labelled queries are not marked eval_only: a student would be tested on what it learnt",
            where="answers",
            value=", ".join(repr(query) for query in leaked["query"].to_pylist()[:3]),
            fix="run plan with these human labels, then precompute again",
        )
    return np.asarray(marked.to_numpy(zero_copy_only=False), dtype=bool)
