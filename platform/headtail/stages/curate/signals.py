"""Evidence against an answer, signal by signal: the log of how much more likely the signal makes a wrong answer.

In: the rows looked at. Out: Signals, and answers that something else would give instead. Evidence is 0 where a signal says
nothing. A hit that nearly every row has (a fallback that always differs, words that no answer should hold) weighs nothing.

    doubt_signals  confidence, agreement of samples    student_signals       cross-validated small models
    rule_signals   words not in the query, words and   neighbour_signal      similar queries with another answer
                   labels that nobody else has         disagreement_signals  another answer source, the task's fallback
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from headtail.core.task import Task
from headtail.stages.curate import crossval, neighbours
from headtail.stages.curate.crossval import Items
from headtail.stages.curate.scan import Scan
from headtail.stages.curate.tags import TaggedQuery, field_labels, label_fields, tag, untag, word_similarity

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
ENOUGH = 200  # answers below which nothing is learnt from them
_SENSITIVITY = 0.5  # share of wrong answers that a guard or another answerer is taken to hit: an assumption, see docs/curate.md
_UNSURE = 0.005  # probability below which a small model's figures are noise
_PRIOR, _STRENGTH = 0.9, 1.0  # of neighbours: as if one more had been seen that agrees to 90 %


class Signal(NamedTuple):
    """Evidence per row (natural log of odds, 0: none), its weight in the sum, and its words for a reviewer."""

    name: str
    weight: float
    evidence: Floats
    say: Callable[[int], str]


class View(NamedTuple):
    """The rows as labels: per row one tuple of labels (label-like tasks) or a TaggedQuery (spans); None where there is no answer."""

    fields: tuple[str, ...]
    labels: list[tuple[str, ...] | None]
    tagged: list[TaggedQuery | None]

    @property
    def kinds(self) -> list[str]:
        """The answer's type: its labels as one text, empty when it has none."""
        if self.fields:
            return ["+".join(found) if found else "" for found in self.labels]
        return [found.kind if found else "" for found in self.tagged]


def view(scan: Scan, task: Task) -> View:
    """The rows as labels."""
    fields, spans = label_fields(task), task.file.score.kind == "spans"
    labels = [field_labels(a, fields) if fields and isinstance(a, dict) else None for a in scan.answer]
    tagged = [tag(task, q, a) if spans and isinstance(a, dict) else None for q, a in zip(scan.query, scan.answer, strict=True)]
    return View(fields, labels, tagged)


def problems(scan: Scan, view: View) -> list[Items]:
    """What small models can learn from these rows: a set of items per field, or one of words. Empty when nothing, or too few."""
    known = [row for row, answer in enumerate(scan.answer) if answer is not None]
    if len(known) < ENOUGH:
        return []
    if view.fields:
        features = crossval.text_features(scan.query, scan.side)
        if features is None:
            return []
        rows = np.asarray(known)
        columns = [[view.labels[row][at] for row in known] for at in range(len(view.fields))]  # type: ignore[index]
        return [_make_items(features[rows], column, rows) for column in columns]
    tags = {row: found.words for row in known if (found := view.tagged[row])}
    if not tags:
        return []
    features = crossval.word_features(list(tags.values()), [scan.side[row] for row in tags])
    owners = np.asarray([row for row, words in tags.items() for _ in words])
    return [_make_items(features, [word.tag for words in tags.values() for word in words], owners)]


def _make_items(features: Any, labels: Sequence[str], rows: npt.NDArray[Any]) -> Items:
    names = sorted(set(labels))
    number = {name: place for place, name in enumerate(names)}
    return Items(features, np.asarray([number[label] for label in labels], dtype=np.int64), rows.astype(np.int64), names)


class StudentSignals(NamedTuple):
    """What the small models say: evidence, the share of rows they count as wrong, and per row the answer they would give."""

    signal: Signal
    wrong_share: float
    instead: Callable[[int], Any]


def student_signals(scan: Scan, view: View, sets: list[Items], task: Task, folds: int, seed: int) -> StudentSignals | None:
    """Cross-validated students over every field or word; a row is as doubtful as its most doubtful item."""
    fold = np.minimum((scan.lot * folds).astype(np.int64), folds - 1)
    margin, flagged = np.full(len(scan), np.nan), np.zeros(len(scan), dtype=bool)
    judged = [crossval.out_of_fold(items, fold[items.row], folds, seed) for items in sets]
    worst: list[tuple[str, str, float]] = [("", "", 0.0)] * len(scan)
    for items, found in zip(sets, judged, strict=True):
        np.logical_or.at(flagged, items.row, crossval.off_diagonal(items, found))
        # How much more likely another label is: a model that knows nothing of a word gives no evidence against its label
        against_item = np.log((found.best_probability + _UNSURE) / (found.own + _UNSURE))
        for item in np.flatnonzero(~np.isnan(against_item)).tolist():
            row = int(items.row[item])
            if not against_item[item] <= margin[row]:
                margin[row] = against_item[item]
                worst[row] = items.names[items.label[item]], items.names[found.best[item]], float(found.own[item])
    if np.isnan(margin).all():
        return None
    evidence = np.nan_to_num(margin - np.nanmedian(margin))

    def say(row: int) -> str:
        return f"small models give {worst[row][0]} {worst[row][2]:.2f}, and say {worst[row][1]}"

    def instead(row: int) -> Any:
        return _instead(task, scan, view, sets, judged, starts, row)

    starts = [np.searchsorted(items.row, np.arange(len(scan) + 1)) for items in sets]
    answered = max(1, sum(answer is not None for answer in scan.answer))
    return StudentSignals(Signal("students", 1.0, evidence, say), float(flagged.sum()) / answered, instead)


def _instead(task: Task, scan: Scan, view: View, sets: list[Items], judged: list[crossval.FoldScores], starts: list[Any], row: int) -> Any:
    best = []
    for items, found, start in zip(sets, judged, starts, strict=True):
        mine = range(int(start[row]), int(start[row + 1]))
        if not mine or any(found.best[item] < 0 for item in mine):
            return None
        best.append([items.names[found.best[item]] for item in mine])
    if view.fields:
        return {**scan.answer[row], **{name: json.loads(labels[0]) for name, labels in zip(view.fields, best, strict=True)}}
    tagged = view.tagged[row]
    return untag(task, [word.written for word in tagged.words], best[0]) if tagged else None


def neighbour_signal(scan: Scan, view: View, places: npt.NDArray[np.float32], count: int) -> Signal | None:
    """How far the nearest queries are answered otherwise: over whole labels, or over the words both have."""
    if sum(answer is not None for answer in scan.answer) < ENOUGH:
        return None
    near = neighbours.nearest(places, count)
    agree = _labels_agree(view, near) if view.fields else _words_agree(view, near)
    if not near.row.shape[1] or np.isnan(agree).all():
        return None
    return Signal(
        "neighbours",
        0.5,
        doubt_evidence(agree, 0.02),
        lambda row: f"queries that read alike are answered otherwise ({agree[row]:.2f} agree)",
    )


def _labels_agree(view: View, near: neighbours.Neighbours) -> Floats:
    number = {found: place for place, found in enumerate(sorted({found for found in view.labels if found}))}
    mine = np.asarray([number[found] if found else -1 for found in view.labels])
    theirs, weight = mine[near.row], near.similarity.astype(np.float64) ** 2
    weight[theirs < 0] = 0
    agree = ((theirs == mine[:, None]) * weight).sum(axis=1)
    made = (agree + _PRIOR * _STRENGTH) / (weight.sum(axis=1) + _STRENGTH)
    made[mine < 0] = np.nan
    return np.asarray(made, dtype=np.float64)


def _words_agree(view: View, near: neighbours.Neighbours) -> Floats:
    """The word whose label the fewest neighbours share decides."""
    known = [{word.text: word.tag[2:] for word in found.words} if found else {} for found in view.tagged]
    made = np.full(len(known), np.nan)
    for row, mine in enumerate(known):
        others = [(known[other], float(similar) ** 2) for other, similar in zip(near.row[row].tolist(), near.similarity[row], strict=True)]
        least = 1.0
        for word, label in mine.items():
            seen_by = [(theirs[word] == label, weight) for theirs, weight in others if word in theirs]
            if seen_by:
                total = sum(weight for _, weight in seen_by)
                least = min(least, (sum(same * weight for same, weight in seen_by) + _PRIOR * _STRENGTH) / (total + _STRENGTH))
        if mine:
            made[row] = min(least, _PRIOR)
    return made


def doubt_signals(scan: Scan) -> list[Signal]:
    """The teacher's own doubt: confidence on decision tokens, and how far its samples agree."""
    found = []
    for name, weight, told in (("confidence", 0.7, "low confidence"), ("agreement", 1.0, "samples disagree, share that agrees")):
        values = scan.table[name].cast("float64").fill_null(float("nan")).to_numpy()
        if np.isnan(values).all():
            continue
        found.append(Signal(name, weight, doubt_evidence(values, 0.02), lambda row, told=told, values=values: f"{told} {values[row]:.2f}"))  # type: ignore[misc]
    return found


def rule_signals(scan: Scan, view: View) -> list[Signal]:
    """Hits of plain rules. What they weigh follows from how rare they are."""
    rows = range(len(scan))
    if view.fields:
        counts = Counter(found for found in view.labels if found)
        rare = np.asarray([bool(found) and counts[found] == 1 for found in view.labels])  # type: ignore[index]
        return [rule_signal("label", rare, lambda row: "no other answer has this label")]
    absent = [found.absent if found else () for found in view.tagged]
    left_out = [[word.text for word in found.words if word.tag == "O"] if found else [] for found in view.tagged]
    queries = Counter(word for query in scan.query for word in set(query.split(" ")))
    changed = [[(w.text, w.written) for w in found.words if w.text != w.written] if found else [] for found in view.tagged]
    strange = [
        [new for old, new in pairs if not queries[new] or (queries[old] > queries[new] and word_similarity(old, new) < 0.6)]
        for pairs in changed
    ]
    made = [
        rule_signal("not in query", np.asarray([bool(a) for a in absent]), lambda row: f"not in the query: {', '.join(absent[row][:3])}"),
        rule_signal(
            "left out", np.asarray([bool(a) for a in left_out]), lambda row: f"words without a segment: {', '.join(left_out[row][:3])}"
        ),
        rule_signal(
            "unknown words", np.asarray([bool(a) for a in strange]), lambda row: f"a word nobody asks for: {', '.join(strange[row][:3])}"
        ),
    ]
    return [signal for signal in made if len(rows) and signal.evidence.any()]


def disagreement_signals(scan: Scan, task: Task, answers: Mapping[str, Sequence[Any]]) -> list[Signal]:
    """Rows that another answerer answers otherwise, under the task's own score. `answers`: per name one per row, None unknown."""
    made = []
    for name, theirs in answers.items():
        comparable = np.asarray([a is not None and b is not None for a, b in zip(scan.answer, theirs, strict=True)])
        if not comparable.any():
            continue
        pairs = zip(comparable.tolist(), scan.answer, theirs, scan.query, strict=True)
        differs = np.asarray([known and not task.score(mine, other, query).right for known, mine, other, query in pairs])
        made.append(rule_signal(name, differs, lambda row, name=name: f"{name} answers otherwise", comparable))  # type: ignore[misc]
    return made


def doubt_evidence(agreeing: Floats, least: float) -> Floats:
    """Evidence from a probability that the answer is right, relative to the middle row; 0 where it is NaN."""
    p = np.clip(agreeing, least, 1 - least)
    odds = np.log((1 - p) / p)
    middle = np.nanmedian(odds) if not np.isnan(odds).all() else 0.0
    return np.nan_to_num(odds - middle)


def rule_signal(name: str, hits: Bools, say: Callable[[int], str], applies: Bools | None = None) -> Signal:
    """Evidence of a rule that hits some rows: the log of how much oftener it is taken to hit wrong answers than it hits at all."""
    applies = np.ones(len(hits), dtype=bool) if applies is None else applies
    share = float(np.clip(hits[applies].mean() if applies.any() else 0.0, 1 / max(2, len(hits)), 1 - 1 / max(2, len(hits))))
    sensitivity = max(_SENSITIVITY, share)
    missed = np.log((1 - sensitivity) / (1 - share)) if sensitivity < 1 else 0.0
    evidence = np.where(hits, np.log(sensitivity / share), missed) * applies
    return Signal(name, 1.0, evidence if hits.any() else np.zeros(len(hits)), say)
