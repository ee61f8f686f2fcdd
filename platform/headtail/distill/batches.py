"""Training rows as token sequences, and sequences as batches in which little is padding.

In: golden rows and a tokenizer. Out: per example its token ids, where the answer starts, and its weight; then, per epoch
and worker, batches whose rows have similar lengths. Every worker gets the same number of batches and no row is dropped:
what does not divide is filled up with rows of weight 0. Pure; knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from headtail.errors import TrainingError
from headtail.task import Task

TOKENS = pa.schema([("ids", pa.list_(pa.int32())), ("answer_start", pa.int32()), ("weight", pa.float32()), ("held_out", pa.bool_())])
WINDOW = 64  # batches within which rows are sorted by length: long enough for little padding, short enough to stay random


class Batch(NamedTuple):
    """A padded batch. Shapes: ids, mask (rows, tokens) int64; labels likewise with -100 outside answers; weight (rows,)."""

    ids: np.ndarray
    mask: np.ndarray
    labels: np.ndarray
    weight: np.ndarray

    @property
    def real_tokens(self) -> int:
        return int(self.mask.sum())


def prompt_text(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> str:
    """The text that a model is given for `messages`: its own chat template, ready for the answer."""
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))


def encode(task: Task, tokenizer: Any, golden: pa.Table, max_tokens: int, held_out: set[bytes]) -> pa.Table:
    """TOKENS rows for golden rows; a row longer than `max_tokens` is an error that names it, never cut."""
    prompts, targets = [], []
    for row in golden.to_pylist():
        prompts.append(prompt_text(tokenizer, task.messages(row["query"], {name: row.get(name) for name in task.side_inputs})))
        answer, problem = task.parse(row["answer"])
        if problem:
            raise TrainingError(f"a golden answer is not valid: {problem}", where=f"query {row['query']!r}", value=row["answer"])
        targets.append(task.target(answer) + tokenizer.eos_token)
    before = tokenizer(prompts, add_special_tokens=False)["input_ids"] if prompts else []
    after = tokenizer(targets, add_special_tokens=False)["input_ids"] if targets else []
    ids = [a + b for a, b in zip(before, after, strict=True)]
    for query, row in zip(golden["query"].to_pylist(), ids, strict=True):
        if len(row) > max_tokens:
            raise TrainingError(
                "a training row is too long",
                where=f"query {query!r}",
                value=f"{len(row)} tokens",
                fix=f"raise max_tokens (now {max_tokens}) or drop it",
            )
    keys = golden["query_key"].to_pylist()
    return pa.table(
        [ids, [len(a) for a in before], golden["weight"].to_pylist(), [key in held_out for key in keys]],
        schema=TOKENS,
    )


def epoch(
    ids: Sequence[np.ndarray], starts: np.ndarray, weights: np.ndarray, *, rows: int, workers: int, worker: int, seed: int, pad: int
) -> Iterator[Batch]:
    """This worker's batches of one epoch, `rows` rows each, in an order that depends on `seed` alone."""
    for chosen in plan_epoch(np.array([len(row) for row in ids]), rows=rows, workers=workers, seed=seed):
        mine = chosen[worker]
        real = mine >= 0
        index = np.where(real, mine, 0)
        yield collate([ids[i] for i in index], starts[index], np.where(real, weights[index], 0.0), pad)


def plan_epoch(lengths: np.ndarray, *, rows: int, workers: int, seed: int) -> list[np.ndarray]:
    """Row indices per step, shape (workers, rows) each; -1 marks a filler. Every row appears exactly once."""
    order = np.random.default_rng(seed).permutation(len(lengths))
    step = rows * workers
    window = step * WINDOW
    batches = []
    for begin in range(0, len(order), window):
        part = order[begin : begin + window]
        part = part[np.argsort(lengths[part], kind="stable")]
        for at in range(0, len(part), step):
            piece = part[at : at + step]
            full = np.full(step, -1, dtype=np.int64)
            full[: len(piece)] = piece
            batches.append(full.reshape(rows, workers).T)  # interleaved: a short last batch spreads over workers
    return [batches[i] for i in np.random.default_rng(seed + 1).permutation(len(batches))]


def collate(ids: Sequence[np.ndarray], starts: np.ndarray, weights: np.ndarray, pad: int) -> Batch:
    """Pad to the longest row; only answer tokens are labelled."""
    width = max(len(row) for row in ids)
    tokens = np.full((len(ids), width), pad, dtype=np.int64)
    mask = np.zeros((len(ids), width), dtype=np.int64)
    labels = np.full((len(ids), width), -100, dtype=np.int64)
    for i, row in enumerate(ids):
        tokens[i, : len(row)] = row
        mask[i, : len(row)] = 1
        labels[i, starts[i] : len(row)] = row[starts[i] :]
    return Batch(tokens, mask, labels, weights.astype(np.float32))
