"""Plant label errors in a teacher's answers, so that it can be measured how many of them curation finds.

In: a precompute receipt. Out: another one, whose answers are the same but for a known share that is wrong now, and a truth table
that says which: no stage reads it. A planted error keeps the confidence, log-probs and samples
of the answer it replaces, so nothing but the answer gives it away. Which rows, and how, depends on the query and the seed alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from headtail.adapters.storage import open_storage, read_table
from headtail.adapters.storage.receipts import load_receipt
from headtail.batch import ANSWERS
from headtail.core.config import StageConfig
from headtail.core.receipt import Receipt
from headtail.core.rows import KEY, State, uniform_draw
from headtail.core.task import Task, load_task
from headtail.stages.base import Stage, run_once
from headtail.stages.precompute.result import Result as PrecomputeResult

# What was planted: `answer` is the answer that stood there, `planted` what stands there now.
PLANTED = pa.schema([("query_key", KEY), ("query", pa.string()), ("answer", pa.string()), ("planted", pa.string()), ("kind", pa.string())])


class Config(StageConfig):
    """How many errors, and where."""

    task: str = Field("query_segmentation", description="task folder or name of a shipped example")
    answers: str = Field("precompute", description="precompute receipt ref of the answers")
    share: float = Field(0.05, gt=0, lt=1, description="share of the answered rows that is made wrong")
    seed: int = Field(0, ge=0, description="of which rows, and how")


def run(config: Config) -> Receipt[PrecomputeResult]:
    """A precompute receipt with errors planted; output `planted` is the truth."""
    task, store = load_task(config.task, config.allow_task_code), open_storage(config.root)
    source = load_receipt(store, "precompute", config.answers, PrecomputeResult)

    def work(stage: Stage) -> PrecomputeResult:
        names = sorted(name for name in source.outputs if name.startswith(ANSWERS))
        shards = [read_table(store, source.outputs[name]) for name in names]
        labels = span_labels(task, shards)
        truth = []
        for name, table in zip(names, shards, strict=True):
            spoilt, planted = plant(task, table, config.share, config.seed, labels)
            stage.table(name, spoilt)
            truth.append(planted)
        stage.table("planted", pa.concat_tables(truth))
        stage.rows |= {**source.rows, "planted": sum(table.num_rows for table in truth)}
        stage.note("answers with planted errors: for measuring how well suspects are found, never to be trained on or published")
        return source.result

    replaces = {"answers": source.path, "task": task.name}
    return run_once("precompute", PrecomputeResult, config, work, inputs={"answers": source}, task=task, replaces=replaces)


def plant(task: Task, table: pa.Table, share: float, seed: int, labels: Sequence[str] = ()) -> tuple[pa.Table, pa.Table]:
    """(the table with errors, what was planted). `labels`: those that a span may have; of label tasks the schema says it."""
    chosen = np.flatnonzero(
        (uniform_draw(table["query_key"], "planted", seed) < share) & (table["state"].to_numpy(zero_copy_only=False) == State.ANSWERED)
    )
    answers = table["answer"].to_pylist()
    lines = []
    for place in chosen.tolist():
        key, query = table["query_key"][place].as_py(), table["query"][place].as_py()
        wrong, kind = spoil(task, task.parse(answers[place])[0], random.Random(f"{key.hex()}/{seed}"), labels)
        if wrong is not None:
            lines.append((key, query, answers[place], task.dump(wrong), kind))
            answers[place] = task.dump(wrong)
    made = table.set_column(table.schema.get_field_index("answer"), table.schema.field("answer"), pa.array(answers, pa.string()))
    columns = list(zip(*lines, strict=True)) if lines else [()] * len(PLANTED)
    return made, pa.table([pa.array(column, field.type) for column, field in zip(columns, PLANTED, strict=True)], schema=PLANTED)


def span_labels(task: Task, tables: Sequence[pa.Table]) -> list[str]:
    """The labels that the spans of these answers have; empty for other tasks."""
    names = task.file.score
    if names.kind != "spans":
        return []
    parsed = (task.parse(text)[0] for table in tables for text in table["answer"].drop_null().to_pylist())
    return sorted({str(segment[names.label]) for answer in parsed if answer for segment in answer[names.field]})


def spoil(task: Task, answer: Any, rng: random.Random, labels: Sequence[str]) -> tuple[Any, str]:
    """(a wrong answer that is valid under the schema, how it was made), or (None, "") when none was found."""
    ways = _span_ways(task, labels) if task.file.score.kind == "spans" else _label_ways(task)
    names = list(ways)
    rng.shuffle(names)
    for name in names:
        for wrong in ways[name](answer, rng):
            if wrong != answer and not task.parse(task.dump(wrong))[1] and not task.score(answer, wrong).right:
                return wrong, name
    return None, ""


def _label_ways(task: Task) -> dict[str, Callable[[Any, random.Random], Iterator[Any]]]:
    def relabel(answer: Any, rng: random.Random) -> Iterator[Any]:
        fields = {name: list(kind["enum"]) for name, kind in task.schema.get("properties", {}).items() if "enum" in kind}
        scored = [name for name in (task.file.score.field,) if name in fields] or sorted(fields)
        for name in scored:
            yield {**answer, name: rng.choice([value for value in fields[name] if value != answer.get(name)])}

    return {"label": relabel}


def _span_ways(task: Task, labels: Sequence[str]) -> dict[str, Callable[[Any, random.Random], Iterator[Any]]]:
    field, text, label = task.file.score.field, task.file.score.text, task.file.score.label

    def label_(answer: Any, rng: random.Random) -> Iterator[Any]:
        segments = list(answer[field])
        if segments and len(labels) > 1:
            at = rng.randrange(len(segments))
            other = rng.choice([name for name in labels if name != segments[at][label]])
            yield {**answer, field: [*segments[:at], {**segments[at], label: other}, *segments[at + 1 :]]}

    def boundary(answer: Any, rng: random.Random) -> Iterator[Any]:
        segments = list(answer[field])
        for at in rng.sample(range(len(segments)), len(segments)):
            words = segments[at][text].split(" ")
            if at + 1 < len(segments) and len(words) > 1:  # the last word goes to the next segment
                left, right = " ".join(words[:-1]), f"{words[-1]} {segments[at + 1][text]}"
                yield {
                    **answer,
                    field: [*segments[:at], {**segments[at], text: left}, {**segments[at + 1], text: right}, *segments[at + 2 :]],
                }
            if at + 1 < len(segments):  # two become one
                both = {**segments[at], text: f"{segments[at][text]} {segments[at + 1][text]}"}
                yield {**answer, field: [*segments[:at], both, *segments[at + 2 :]]}
            if len(words) > 1:  # one becomes two
                parts = [{**segments[at], text: words[0]}, {**segments[at], text: " ".join(words[1:])}]
                yield {**answer, field: [*segments[:at], *parts, *segments[at + 1 :]]}

    def missing(answer: Any, rng: random.Random) -> Iterator[Any]:
        segments = list(answer[field])
        if len(segments) > 1:
            at = rng.randrange(len(segments))
            yield {**answer, field: [*segments[:at], *segments[at + 1 :]]}

    def word(answer: Any, rng: random.Random) -> Iterator[Any]:
        segments = list(answer[field])
        if segments:
            at = rng.randrange(len(segments))
            words = segments[at][text].split(" ")
            words[rng.randrange(len(words))] = rng.choice(_STRANGE)
            yield {**answer, field: [*segments[:at], {**segments[at], text: " ".join(words)}, *segments[at + 1 :]]}

    return {"label": label_, "boundary": boundary, "missing": missing, "word": word}


_STRANGE = ("umbrella", "violin", "tuesday", "copper", "lighthouse", "mango", "ladder", "winter")  # what a model may make up
