"""Training rows as token sequences, and sequences as batches in which little is padding.

In: training rows and a tokenizer. Out: per example its token ids, where the answer starts, and its weight; then, per epoch,
which rows each worker takes at each step. Rows of a step have similar lengths, so little is padding and no two examples
ever share a sequence. Every worker gets the same number of batches and no row is dropped. Pure; knows nothing of models.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from headtail.core.errors import TrainingError
from headtail.core.io_format import DEFAULT, ModelFormat
from headtail.core.task import Task
from headtail.engines.control import Encoder

EXAMPLE = pa.schema([("length", pa.int32()), ("weight", pa.float32()), ("held_out", pa.bool_())])  # what every kind's rows have
TOKENS = pa.schema([("ids", pa.list_(pa.int32())), ("answer_start", pa.int32()), *EXAMPLE])  # a decoder's
UNTAUGHT = -100  # what torch's cross entropy leaves out
WINDOW = 64  # batches within which rows are sorted by length: long enough for little padding, short enough to stay random

Columns = dict[str, Any]  # examples by column: a list of arrays for list columns, one array for the others


class Batch(NamedTuple):
    """One padded batch: arrays by name for the loss (first axis: rows), how many tokens are real and how many cells there are."""

    arrays: dict[str, np.ndarray]
    real_tokens: int
    tokens: int


def encode_examples(
    task: Task, tokenizer: Any, training_set: pa.Table, max_tokens: int, held_out: set[bytes], fmt: ModelFormat = DEFAULT
) -> pa.Table:
    """TOKENS rows for training rows, asked and answered in `form`; a row longer than `max_tokens` is an error that names it, never cut."""
    prompts, targets = [], []
    for row in training_set.to_pylist():
        prompts.append(fmt.messages(task, row["query"], {name: row.get(name) for name in task.side_inputs}))
        targets.append(fmt.target(task, training_answer(task, row)))
    encoder, end = Encoder(tokenizer), int(tokenizer.eos_token_id)
    before, after = encoder.chats(prompts), encoder.texts(targets)
    ids = [[*a, *b, end] for a, b in zip(before, after, strict=True)]
    lengths = [len(row) for row in ids]
    check_lengths(training_set["query"].to_pylist(), lengths, max_tokens)
    keys = training_set["query_key"].to_pylist()
    return pa.table(
        [ids, [len(a) for a in before], lengths, training_set["weight"].to_pylist(), [key in held_out for key in keys]],
        schema=TOKENS,
    )


def training_answer(task: Task, row: Mapping[str, Any]) -> Any:
    """The answer of a training row; TrainingError names a row whose answer is none."""
    answer, problem = task.parse(row["answer"])
    if problem:
        raise TrainingError(f"a training answer is not valid: {problem}", where=f"query {row['query']!r}", value=row["answer"])
    return answer


def check_lengths(queries: Sequence[str], lengths: Sequence[int], max_tokens: int) -> None:
    """TrainingError names the first row that is longer than `max_tokens`: rows are never cut."""
    for query, length in zip(queries, lengths, strict=True):
        if length > max_tokens:
            fix = f"raise max_tokens (now {max_tokens}) or drop it"
            raise TrainingError("a training row is too long", where=f"query {query!r}", value=f"{length} tokens", fix=fix)


def example_columns(table: pa.Table) -> Columns:
    """The examples of a table, ready for `collate`; lists are views of one buffer, so a million rows are no million copies."""
    found: Columns = {}
    for name in table.column_names:
        column = table[name].combine_chunks()
        column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
        if pa.types.is_list(column.type):
            ends, values = column.offsets.to_numpy(), column.values.to_numpy()
            found[name] = [values[a:b] for a, b in itertools.pairwise(ends)]
        else:
            found[name] = column.to_numpy(zero_copy_only=False)
    return found


def plan_epoch(lengths: np.ndarray, *, rows: int, workers: int, seed: int, tokens: int = 0) -> list[list[np.ndarray]]:
    """Row indices per step and worker, in an order that depends on `seed` alone; every row appears exactly once.

    A step takes at most `rows` rows per worker, and with `tokens` at most that many cells (rows times longest row) per worker,
    but never less than a row. Steps of one window differ by at most a row, so no step is a small remainder of noisy gradient;
    each worker takes a stretch of a step's rows, so the longest rows of a step pad only those beside them. A worker's part is
    empty only when a step has fewer rows than workers.
    """
    order = np.random.default_rng(seed).permutation(len(lengths))
    window = rows * workers * WINDOW
    steps: list[np.ndarray] = []
    for begin in range(0, len(order), window):
        part = order[begin : begin + window]
        part = part[np.argsort(lengths[part], kind="stable")]
        steps += _by_tokens(part, lengths, rows, workers, tokens) if tokens else np.array_split(part, -(-len(part) // (rows * workers)))
    shuffled = np.random.default_rng(seed + 1).permutation(len(steps))
    return [np.array_split(steps[i], workers) for i in shuffled]


def _by_tokens(part: np.ndarray, lengths: np.ndarray, rows: int, workers: int, tokens: int) -> list[np.ndarray]:
    """Cut rows sorted by length so that no worker's share of a step is more than `rows` rows or `tokens` cells."""
    steps, begin = [], 0
    while begin < len(part):
        each = 1
        while each < rows and begin + each * workers < len(part):
            longest = lengths[part[min(begin + (each + 1) * workers, len(part)) - 1]]
            if (each + 1) * longest > tokens:
                break
            each += 1
        steps.append(part[begin : begin + each * workers])
        begin += each * workers
    return steps


def steps_of(lengths: Callable[[int], np.ndarray], *, rows: int, workers: int, seed: int, tokens: int, epochs: float) -> list[int]:
    """How many steps each epoch takes, `lengths(number)` being what epoch `number` shows; of a last, broken epoch only its share."""
    whole, count = math.ceil(epochs), len(lengths(0))
    if not count:
        return [0] * whole
    if tokens:
        each = [len(plan_epoch(lengths(i), rows=rows, workers=workers, seed=epoch_seed(seed, i), tokens=tokens)) for i in range(whole)]
    else:
        each = [_count(count, rows * workers)] * whole
    broken = epochs - (whole - 1)
    return [*each[:-1], math.ceil(each[-1] * broken - 1e-9)]


def _count(rows: int, step: int) -> int:
    full, rest = divmod(rows, step * WINDOW)
    return full * WINDOW + -(-rest // step)


def epoch_seed(seed: int, number: int) -> int:
    """The seed of epoch `number`'s order."""
    return seed + 1000 * number


def collate(ids: Sequence[np.ndarray], starts: np.ndarray, weights: np.ndarray, pad: int) -> Batch:
    """A decoder's batch: ids, mask, labels (rows, tokens) int64, padded to the longest row; UNTAUGHT where nothing is to be learnt."""
    width = max(len(row) for row in ids)
    tokens = np.full((len(ids), width), pad, dtype=np.int64)
    mask = np.zeros((len(ids), width), dtype=np.int64)
    labels = np.full((len(ids), width), UNTAUGHT, dtype=np.int64)
    for i, row in enumerate(ids):
        tokens[i, : len(row)] = row
        mask[i, : len(row)] = 1
        labels[i, starts[i] : len(row)] = row[starts[i] :]
    arrays: dict[str, np.ndarray] = {"ids": tokens, "mask": mask, "labels": labels, "weight": weights.astype(np.float32)}
    return Batch(arrays, int(mask.sum()), mask.size)
