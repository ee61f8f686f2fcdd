"""People's answers: checked against the task, one per query, kept apart from rows that may train a model.

In: label cells as found (query, answer text, split). Out: tables human_labels and human_labels_train, cells that are no valid answer, and
how often people disagreed. Knows nothing of files or stages.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from headtail.core import leaks, typed_answer
from headtail.core.label_design import UNKNOWN, resolve_design, thin_design
from headtail.core.query import clean_text
from headtail.core.rows import DESIGN as DESIGN_COLUMNS
from headtail.core.rows import FEEDBACK_DESIGN, HUMAN_LABELS, SET_ASIDE, uniform_draw
from headtail.core.task import Task
from headtail.core.text import normalise
from headtail.stages.ingest.intake import cell_excerpt

INVALID, REDACTED, SPLIT, NEAR, DESIGN = "label_invalid", "label_redacted", "label_split", "label_near", "label_design"
TRAIN, TEST = "train", "test"


class ResolvedLabels(NamedTuple):
    """`human_labels` and `train`: HUMAN_LABELS rows by key, count 0 and stratum "" still to be filled; they share no query, nor nearly."""

    labels: pa.Table
    train: pa.Table
    set_aside: pa.Table
    conflicts: int  # queries with more than one answer; the most frequent was kept, of several the first
    overlaps: int  # queries marked train and test alike; kept for test only
    astray: int = 0  # answers with a span that is not in the query, though both are normalised


def resolve_labels(
    labels: pa.Table, task: Task, train_share: float, seed: int, redacting: bool = True, design: str = UNKNOWN
) -> ResolvedLabels:
    """One valid answer per query, in the task's canonical form, divided into human labels and human_labels_train.

    `design`: how labels were drawn that do not say it themselves.
    """
    answers, problems = _answers(labels["answer"], task)
    splits, unknown = _splits(labels["split"])
    designs, chances, wrong = _designs(labels, design)
    reasons = _reasons(labels, answers, unknown, splits, wrong)
    problems = [was or now for was, now in zip(problems, wrong, strict=True)]
    aside = _set_aside(labels, reasons, problems, redacting)
    valid = pa.table(
        {
            **{name: labels[name] for name in ("query_key", "query", "seq")},
            "answer": answers,
            "test": pc.equal(splits, TEST),
            "train": pc.equal(splits, TRAIN),
        }
    ).filter(pc.equal(reasons, ""))
    if not valid.num_rows:
        return ResolvedLabels(HUMAN_LABELS.empty_table(), HUMAN_LABELS.empty_table(), aside, 0, 0)
    kept, conflicts = _vote(valid)
    marks = valid.group_by("query_key").aggregate([("test", "max"), ("train", "max")])
    marks = marks.take(pc.index_in(kept["query_key"], marks["query_key"]))
    test, train = np.asarray(marks["test_max"]), np.asarray(marks["train_max"])
    chosen = train | (uniform_draw(kept["query_key"], "human_labels_train", seed) < train_share)
    in_train = chosen & ~test
    first = pc.index_in(kept["seq_min"].combine_chunks(), labels["seq"].combine_chunks()).to_pylist()
    shares = np.where(test | train, 1.0, 1 - train_share).tolist()  # a column `split` overrides the share
    drawn = [thin_design(designs[at], chances[at], share) for at, share in zip(first, shares, strict=True)]
    columns = [kept["query_key"], kept["query"], kept["answer"], pa.array(np.zeros(len(kept), np.int64)), pa.repeat("", len(kept))]
    columns += [pa.array(column, field.type) for column, field in zip(zip(*drawn, strict=True), DESIGN_COLUMNS, strict=True)]
    rows = pa.table(columns, schema=HUMAN_LABELS)
    near = _near(rows, in_train)
    sources = labels.filter(pc.is_in(labels["seq"], kept["seq_min"].filter(pa.array(near)).combine_chunks()))
    aside = pa.concat_tables([aside, _aside(sources, [NEAR] * len(sources), sources["query"].to_pylist())])
    human_labels, train_rows = rows.filter(pa.array(~in_train)), rows.filter(pa.array(in_train & ~near))
    return ResolvedLabels(human_labels, train_rows, aside, conflicts, int((test & train).sum()), _count_absent_spans(rows, task))


def _near(rows: pa.Table, in_train: np.ndarray) -> np.ndarray:
    """Training rows that nearly repeat a query of the human labels: a model that learns them has seen the test."""
    human_labels = leaks.LabelledQueries(rows.filter(pa.array(~in_train))["query"].to_pylist())
    queries = zip(rows["query"].to_pylist(), in_train.tolist(), strict=True)
    return np.asarray([train and human_labels.find(clean_text(query)) is not None for query, train in queries], dtype=bool)


def fill_counts(human_labels: pa.Table, queries: list[pa.Table]) -> pa.Table:
    """`human_labels` with the events of each query before the cut; 0 when it was not seen."""
    counts = np.zeros(len(human_labels), np.int64)
    for run in queries:
        places = pc.index_in(run["query_key"], human_labels["query_key"].combine_chunks())
        there = np.flatnonzero(np.asarray(places.is_valid()))
        counts[np.asarray(pc.drop_null(places))] = run["count"].to_numpy()[there]
    return human_labels.set_column(human_labels.schema.get_field_index("count"), "count", pa.array(counts))


def _answers(cells: pa.ChunkedArray, task: Task) -> tuple[pa.Array, list[str]]:
    """Canonical answers, null where a cell is no valid answer; and per row what is wrong with it."""
    coded = cells.combine_chunks().dictionary_encode()
    parsed = [_answer(value, task) for value in coded.dictionary.to_pylist()]
    places = coded.indices.to_pylist()
    answers = pa.array([answer for answer, _ in parsed], pa.string()).take(coded.indices)
    return answers, [parsed[place][1] for place in places]


def _answer(cell: bytes, task: Task) -> tuple[str | None, str]:
    """(canonical answer, "") or (None, what is wrong). A task scored by label also takes the bare label.

    Labels and spans are taken as people type them: see `human.parse` and `_spans`.
    """
    try:
        text = cell.decode("utf-8").strip()
    except UnicodeDecodeError:
        return None, "not UTF-8"
    answer, problem = typed_answer.parse_typed_answer(task, text)
    if problem:
        return None, problem
    for span in _spans(answer, task):
        span[task.file.score.text] = normalise(span[task.file.score.text])
    return task.dump(answer), ""


def _spans(answer: Any, task: Task) -> Iterator[dict[str, Any]]:
    """The spans of an answer that hold text; none when the task is not scored by spans."""
    config = task.file.score
    spans = answer.get(config.field) if config.kind == "spans" and isinstance(answer, dict) else None
    for span in spans if isinstance(spans, list) else ():
        if isinstance(span, dict) and isinstance(span.get(config.text), str):
            yield span


def _count_absent_spans(rows: pa.Table, task: Task) -> int:
    """Rows with a span that is not in the query: it can never be found there."""
    if task.file.score.kind != "spans":
        return 0
    pairs = zip(rows["query"].to_pylist(), map(json.loads, rows["answer"].to_pylist()), strict=True)
    return sum(any(span[task.file.score.text] not in query for span in _spans(answer, task)) for query, answer in pairs)


def _splits(cells: pa.ChunkedArray) -> tuple[pa.Array, pa.Array]:
    """(train, test or "" per row, whether the cell was something else)."""
    coded = cells.combine_chunks().dictionary_encode()
    known = [value.decode("utf-8", "replace").strip().lower() for value in coded.dictionary.to_pylist()]
    texts = pc.fill_null(pa.array(known, pa.string()).take(coded.indices), "")
    return texts, pc.invert(pc.is_in(texts, pa.array(["", TRAIN, TEST])))


def _designs(labels: pa.Table, otherwise: str) -> tuple[list[str], list[float | None], list[str]]:
    """Per row the design, the inclusion probability, and what is wrong with them."""
    cells = zip(*(labels[name].to_pylist() for name in ("design", "inclusion")), strict=True)
    found = [resolve_design(_text(design), _text(chance), otherwise) for design, chance in cells]
    designs, chances, problems = zip(*found, strict=True) if found else ((), (), ())
    return list(designs), list(chances), list(problems)


def _reasons(labels: pa.Table, answers: pa.Array, unknown: pa.Array, splits: pa.Array, wrong: list[str]) -> pa.Array:
    """Per row why it is not used; empty: it is. Callers choose what they give feedback on: it may train a model and judges none."""
    reasons = pc.if_else(answers.is_null(), INVALID, "")
    reasons = pc.if_else(unknown, SPLIT, reasons)
    designs = pc.fill_null(pc.utf8_lower(labels["design"].combine_chunks().cast(pa.string(), safe=False)), "")
    feedback = pc.equal(pc.utf8_trim_whitespace(designs), FEEDBACK_DESIGN)
    reasons = pc.if_else(pc.and_not(pc.not_equal(pa.array(wrong, pa.string()), ""), feedback), DESIGN, reasons)
    reasons = pc.if_else(pc.and_(feedback, pc.not_equal(splits, TRAIN)), DESIGN, reasons)
    return pc.if_else(labels["redacted"].combine_chunks(), REDACTED, reasons)  # the answer may still hold what was redacted


def _set_aside(labels: pa.Table, reasons: pa.Array, problems: list[str], redacting: bool) -> pa.Table:
    bad = np.flatnonzero(np.asarray(pc.not_equal(reasons, "")))
    rows: list[dict[str, Any]] = labels.take(pa.array(bad)).to_pylist()
    names = reasons.take(pa.array(bad)).to_pylist()
    cells = {SPLIT: "split", DESIGN: "design"}
    texts = [
        row["query"]
        if name == REDACTED or (name == DESIGN and not problems[i])  # of feedback there is nothing to correct
        else cell_excerpt(f"{row['query']}: {_text(row[cells.get(name, 'answer')])} {problems[i]}", redacting)
        for i, row, name in zip(bad, rows, names, strict=True)
    ]
    return _aside(labels.take(pa.array(bad)), names, texts)


def _aside(rows: pa.Table, reasons: list[str], texts: list[str]) -> pa.Table:
    columns = [rows["file"].combine_chunks(), rows["row"].combine_chunks(), pa.array(reasons, pa.string()), pa.array(texts, pa.string())]
    return pa.table(columns, schema=SET_ASIDE)


def _text(cell: bytes | None) -> str:
    return (cell or b"")[:400].decode("utf-8", "replace")


def _vote(valid: pa.Table) -> tuple[pa.Table, int]:
    """Per query the answer most often given, of several the one given first; and how many queries had several answers."""
    votes = valid.group_by(["query_key", "query", "answer"]).aggregate([("seq", "count"), ("seq", "min")])
    order = pc.sort_indices(votes, [("query_key", "ascending"), ("seq_count", "descending"), ("seq_min", "ascending")])
    votes = votes.take(order)
    several = Counter(votes["query_key"].to_pylist())
    _, first = np.unique(np.array(list(map(bytes, votes["query_key"].to_pylist())), dtype="V16"), return_index=True)
    return votes.take(pa.array(np.sort(first))), sum(1 for n in several.values() if n > 1)
