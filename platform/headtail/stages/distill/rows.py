"""Training rows: read, weighted, split into rows for training and held-out rows, and turned into examples.

In: table refs of training rows and of held-out rows, what weights are made of. Out: Rows per set, and one table of examples.
Knows nothing of models but what a Learner says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from headtail.adapters.storage import Storage
from headtail.adapters.storage.receipts import load_receipt, output_table
from headtail.batch import read_answers
from headtail.core.config import Config
from headtail.core.errors import ConfigError, InputError, LeakError
from headtail.core.receipt import Receipt
from headtail.core.rows import TOP, TRAINING_SET, conform, shards_of, with_side_inputs, with_top
from headtail.core.task import Task
from headtail.releases.seal import open_labels
from headtail.stages.distill.learner import Learner
from headtail.stages.precompute.result import Result as PrecomputeResult


class TrainingSet(Config):
    """Rows of one task to learn from."""

    task: str = Field("query_segmentation", description="task name or folder")
    training_set: str = Field(
        "curate:training_set", description="table ref of training rows (TRAINING_SET columns and the task's side inputs)"
    )
    rows: int = Field(0, ge=0, description="use at most this many of them, from the start; 0 for all")
    held_out: str = Field(
        "",
        description="table ref of people's answers for eval_loss and early stopping, never trained on; empty: held_out_share",
    )


class Weights(Config):
    """A row's weight: training_set weight ** traffic * confidence ** confidence * (human when a person answered), mean 1 over a set."""

    traffic: float = Field(
        1.0, ge=0, description="exponent of the training row's weight, which curate computes from its events; 0: all equal"
    )
    confidence: float = Field(0.0, ge=0, description="exponent of the teacher's confidence (0..1); people's answers count as 1")
    human: float = Field(1.0, gt=0, description="factor for an answer that a person gave")


class Rows(NamedTuple):
    """One set: rows to learn from, and rows that only judge (empty when a share of the others does)."""

    training_set: pa.Table
    held_out: pa.Table


def held_out_keys(rows: Sequence[Rows]) -> pa.Table:
    """Keys of the rows that judged, as they were read: people's sealed answers are never among them."""
    return pa.concat_tables([one.held_out.select(["query_key"]) for one in rows])


def tables_of(rows: Rows) -> list[pa.Table]:
    """All of a set's tables: none of them may hold a labelled query."""
    return [rows.training_set, rows.held_out]


def read_rows(
    store: Storage,
    weights: Weights,
    config: TrainingSet,
    task: Task,
    refs: Mapping[str, tuple[Receipt, str]],
    number: int,
    top: int = 0,
) -> Rows:
    """The rows of set `number`, with their weights. InputError when there is none, LeakError when one is in both tables.

    `top`: with the likeliest tokens (rows.TOP), null where none are stored.
    """
    training_set = _training_set(store, *refs[f"training_set.{number}"], task, top)
    training_set = training_set.slice(0, config.rows) if config.rows else training_set
    sure = _confidence(store, refs[f"training_set.{number}"][0], training_set) if weights.confidence else None
    training_set = training_set.set_column(
        training_set.column_names.index("weight"), TRAINING_SET.field("weight"), pa.array(weigh(weights, training_set, sure))
    )
    if not config.held_out:
        return Rows(training_set, training_set.slice(0, 0))
    held = open_labels(store, _training_set(store, *refs[f"held.{number}"], task, top))
    both = held.filter(pc.is_in(held["query_key"], value_set=training_set["query_key"].combine_chunks()))
    if both.num_rows:
        raise LeakError(
            f"{both.num_rows:,} held-out rows are also trained on",
            where=f"sets.{number}.held_out",
            value=", ".join(map(repr, both["query"].to_pylist()[:5])),
            fix="split the people's answers before (ingest: labels_train_share), or leave held_out empty",
        )
    return Rows(training_set, held)


def with_side(table: pa.Table, task: Task) -> np.ndarray:
    """Which rows have any side input: bool per row."""
    found = np.zeros(table.num_rows, dtype=bool)
    for name in task.side_inputs:
        if name in table.column_names:
            found |= np.asarray(pc.fill_null(pc.list_value_length(table[name]), 0)) > 0
    return found


def count_left_out(rows: Rows, task: Task) -> Rows:
    """The same rows, answers and weights, with no side inputs: as queries of the tail are asked."""

    def bare(table: pa.Table) -> pa.Table:
        for name in task.side_inputs:
            at = table.schema.get_field_index(name)
            field = table.schema.field(at)
            table = table.set_column(at, field, pa.array([[]] * table.num_rows, field.type))
        return table

    return Rows(*(bare(table) for table in rows))


def weigh(weights: Weights, training_set: pa.Table, confidence: np.ndarray | None) -> np.ndarray:
    """The rows' weights, float32 with mean 1; `confidence` (0..1, NaN unknown) only when it counts."""
    found = training_set["weight"].to_numpy().astype(np.float64) ** weights.traffic
    human = pc.equal(training_set["origin"], "human").to_numpy(zero_copy_only=False).astype(bool)
    if confidence is not None:
        found *= np.where(human | np.isnan(confidence), 1.0, confidence) ** weights.confidence
    found[human] *= weights.human
    return np.asarray(found / max(found.mean(), 1e-12), dtype=np.float32)


def examples(
    learner: Learner, tokenizer: Any, rows: Sequence[Rows], tasks: Sequence[Task], max_tokens: int, held_out_share: float
) -> pa.Table:
    """All sets as one table of examples, in order: training rows, then held-out rows, set by set."""
    every = round(1 / held_out_share) if held_out_share else 0
    parts = []
    for one, task in zip(rows, tasks, strict=True):
        if one.held_out.num_rows:
            held = set(one.held_out["query_key"].to_pylist())
        else:
            keys = one.training_set["query_key"]
            held = set(keys.filter(shards_of(keys, every) == 0).to_pylist()) if every else set()
        parts.append(learner.encode(task, tokenizer, pa.concat_tables([one.training_set, one.held_out]), max_tokens, held))
    return pa.concat_tables(parts)


def _training_set(store: Storage, receipt: Receipt, output: str, task: Task, top: int) -> pa.Table:
    table = output_table(store, receipt, output)
    if table.num_rows == 0:
        raise InputError(
            "no training rows to train on", where=f"{receipt.path}:{output}", fix="lower curate's min_confidence or teach more rows"
        )
    schema = with_side_inputs(with_top(TRAINING_SET, top), task.side_inputs)
    if "origin" not in table.column_names:  # people's answers (HUMAN_LABELS rows): every one counts the same, none has a teacher behind it
        for name, value in (("weight", 1.0), ("origin", "human"), ("answer_key", None)):
            table = table.append_column(name, pa.array([value] * table.num_rows, schema.field(name).type))
    for name in task.side_inputs:
        if name not in table.column_names:
            table = table.append_column(name, pa.array([[]] * table.num_rows, schema.field(name).type))
    for name in TOP.names if top else ():
        if name not in table.column_names:
            table = table.append_column(name, pa.nulls(table.num_rows, TOP.field(name).type))
    return conform(table, schema, f"{receipt.path}:{output}")


def source_of(store: Storage, training_set: Receipt) -> Receipt[PrecomputeResult] | None:
    """The receipt of the teacher's answers that training rows were curated from; None when there is none, or none any more."""
    path = training_set.inputs.get("answers", "")
    there = path.startswith("precompute/") and store.exists(f"{path}/receipt.json")
    return load_receipt(store, "precompute", path, PrecomputeResult) if there else None


def _confidence(store: Storage, training_set: Receipt, table: pa.Table) -> np.ndarray:
    """The teacher's confidence of each row, through its answer_key; NaN where none is known."""
    source = training_set.inputs.get("answers", "")
    if not source.startswith("precompute/"):
        raise ConfigError(
            "these rows have no teacher's confidence",
            where="weights.confidence",
            value=training_set.path,
            fix="set it to 0, or train on curate:training_set",
        )
    known: dict[bytes, float] = {}
    wanted = table["answer_key"].combine_chunks()
    for read in read_answers(store, load_receipt(store, "precompute", source), ["answer_key", "confidence"]):
        piece = read.filter(pc.is_in(read["answer_key"], value_set=wanted))
        known.update(zip(piece["answer_key"].to_pylist(), piece["confidence"].to_pylist(), strict=True))
    found = [known.get(key) for key in table["answer_key"].to_pylist()]
    return np.array([float("nan") if one is None else one for one in found], dtype=np.float64)
