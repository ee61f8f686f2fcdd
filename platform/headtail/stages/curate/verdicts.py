"""One verdict per answer: training_set with a weight, or the one reason why not. Pure.

In: the narrow columns of all answers, what people decided, and `inspect`, which sees the text of the rows that are left.
Out: Verdicts. The first reason that applies counts; the order of rows and shards changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from headtail.core.rows import State
from headtail.stages.curate.columns import AnswerColumns, Bools, Floats, Objects
from headtail.stages.curate.decisions import NOBODY, ReviewDecisions, match_decisions
from headtail.stages.curate.draw import Pool, pick

# Reasons a row is dropped; a row that is not answered has its state as the reason.
EVAL_ONLY, NEAR_LABELS, REVIEWED, UNCONFIDENT = "eval_only", "near_labels", "reviewed", "unconfident"
DUPLICATE, SUSPECT, OVER_QUOTA = "duplicate", "suspect", "over_quota"
KEPT = ""
Places = npt.NDArray[np.int64]


class VerdictRules(NamedTuple):
    """What decides, besides the rows."""

    min_confidence: float = 0.5
    drop_above: float = 1.0
    max_rows: int = 20_000
    min_rows: int = 2_000
    scan_rows: int = 400_000
    human_weight: float = 4.0
    shares: Mapping[str, float] = {}


class InspectedRows(NamedTuple):
    """What a look at the text gave for the rows at `place`."""

    place: Places
    score: Floats
    kind: Objects
    cluster: Places
    enough: int | None  # rows from which more gain too little; None: unknown


class Verdicts(NamedTuple):
    """The verdict on every answer, in reading order."""

    reason: Objects  # empty for training rows
    weight: Floats  # of training rows; 0 elsewhere
    answer: Objects  # a person's answer, else None
    stratum: Objects
    confidence: Floats  # NaN when the engine gave none
    notes: list[str]


def give_verdicts(
    rows: AnswerColumns,
    rules: VerdictRules,
    decided: ReviewDecisions = NOBODY,
    inspect: Callable[[Places, Objects], InspectedRows] | None = None,
) -> Verdicts:
    """Give every answer its reason to go, or a weight. `inspect` gets the places it may read and people's answers."""
    decisions = match_decisions(decided, rows)
    reason = np.full(len(rows.state), KEPT, dtype=object)
    mine = np.asarray([answer is not None for answer in decisions.answer], dtype=bool)
    answered = rows.state == State.ANSWERED

    def drop(which: Bools, why: str | Objects) -> None:
        which = which & (reason == KEPT)
        reason[which] = why if isinstance(why, str) else why[which]

    drop(rows.eval_only, EVAL_ONLY)
    drop(rows.near_labels, NEAR_LABELS)
    drop(decisions.dropped, REVIEWED)
    reviewable = reason == KEPT
    drop(~answered & ~mine, rows.state)
    with np.errstate(invalid="ignore"):
        drop((rows.confidence < rules.min_confidence) & ~mine, UNCONFIDENT)  # NaN is not below: unknown is not unsure
    drop(_duplicates(rows, answered, reason == KEPT), DUPLICATE)
    pool, size, notes = Pool.by_stratum(rows.stratum, rows.lot, rows.events)._replace(first=mine), rules.max_rows, list(decisions.notes)
    places = scan_places(rows, mine, reviewable & (reason != DUPLICATE), rules.scan_rows)
    if inspect is not None and len(places):
        seen = inspect(places, decisions.answer)
        pool = _with_findings(pool, seen)
        suspicious = np.zeros(len(reason), dtype=bool)
        suspicious[seen.place] = (seen.score >= rules.drop_above) & (rules.drop_above < 1)
        drop(suspicious & ~mine, SUSPECT)
        unseen = np.ones(len(reason), dtype=bool)
        unseen[seen.place] = False
        drop(unseen, OVER_QUOTA)
        size = min(size, max(seen.enough, rules.min_rows)) if seen.enough is not None else size
    candidates = np.flatnonzero(reason == KEPT)
    chosen, draw_notes = pick(pool.take(candidates), size, rules.shares)
    over = np.ones(len(reason), dtype=bool)
    over[candidates[chosen]] = False
    drop(over, OVER_QUOTA)
    kept = reason == KEPT
    weight = np.zeros(len(reason))
    weight[kept] = traffic_weights(rows.events[kept]) * np.where(mine[kept], rules.human_weight, 1.0)
    weight[kept] /= weight[kept].mean() if kept.any() else 1.0
    unknown = int((np.isnan(rows.confidence) & kept & ~mine).sum())
    if unknown and rules.min_confidence > 0:
        draw_notes.append(
            f"{unknown:,} training rows have no confidence (the engine gave no log-probabilities): they were not filtered by it"
        )
    return Verdicts(reason, weight, decisions.answer, rows.stratum, rows.confidence, [*notes, *draw_notes])


def traffic_weights(counts: Floats) -> Floats:
    """log(1 + events) over its mean: frequent queries matter more, but a thousandfold count only about tenfold."""
    if not len(counts):
        return counts
    raw = np.log1p(np.maximum(counts, 1.0))
    return np.asarray(raw / raw.mean(), dtype=np.float64)


def scan_places(rows: AnswerColumns, mine: Bools, among: Bools, most: int) -> Places:
    """The places whose text is looked at: all, or people's, then half by traffic and half by lot."""
    left = np.flatnonzero(among)
    if len(left) <= most:
        return left
    by_traffic = left[np.lexsort((rows.lot[left], -rows.events[left], ~mine[left]))]
    half = by_traffic[: most - most // 2]
    rest = np.setdiff1d(left, half, assume_unique=True)
    drawn = rest[np.argsort(rows.lot[rest], kind="stable")][: most // 2]
    return np.sort(np.concatenate([half, drawn]))


def _with_findings(pool: Pool, inspected: InspectedRows) -> Pool:
    kind, cluster = pool.kind.copy(), pool.cluster.copy()
    kind[inspected.place], cluster[inspected.place] = inspected.kind, inspected.cluster
    return pool._replace(kind=kind, cluster=cluster)


def _duplicates(rows: AnswerColumns, answered: Bools, among: Bools) -> Bools:
    """Rows whose query has a better answer: an answered row first, then the most confident; ties by answer_key."""
    index = np.flatnonzero(among)
    sure = -np.nan_to_num(rows.confidence[index], nan=-1.0)
    keys, answers = rows.key[index], rows.answer_key[index]
    order = np.lexsort((answers[:, 1], answers[:, 0], sure, ~answered[index], keys[:, 1], keys[:, 0]))
    same = np.all(keys[order][1:] == keys[order][:-1], axis=1)
    found = np.zeros(len(among), dtype=bool)
    found[index[order[1:][same]]] = True
    return found
