"""What people's labels say of a judge, and what the judge says of the answers: figures with intervals. Pure: arrays in, rows out.

Agreement and kappa; how kind the judge is beside people; its bias by position, by length and by model family. Shares have
Clopper-Pearson intervals, means of bounded values those of betting (`core.bounds`), valid at any number of rows; kappa has a bootstrap
from 30 rows on, and none below. Rows come in an order drawn from their keys. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from headtail.core.bounds import Array, Game
from headtail.core.intervals import BOOTSTRAP, share_interval
from headtail.core.rows import ALL, SMALL, STRATA

BETTING, NO_INTERVAL = "betting", "none"
_RESAMPLES = 2000


class JudgeFigure(NamedTuple):
    """A figure with its interval; null ends where it has no right to one."""

    figure: str
    stratum: str
    n: int
    value: float
    low: float | None
    high: float | None
    method: str


class JudgeRows(NamedTuple):
    """Judged rows as arrays. `people` and `people_other` are NaN without a label; `second` is NaN without a second round.

    Pointwise: `first` is the judge's score of the answer, `second` of the other answer. Pairwise: both are the judge's preference for the
    answer over the other one, as it was shown first and second. `asked`: whether the judge was asked, in every round that there is.
    """

    stratum: npt.NDArray[np.object_]
    first: Array
    second: Array
    people: Array
    people_other: Array
    length: Array
    length_other: Array
    asked: npt.NDArray[np.bool_]


def mean_figure(name: str, stratum: str, values: Array, reach: float, confidence: float) -> JudgeFigure:
    """The mean of values in -reach..reach, or in 0..1 when reach is 0."""
    low, width = (-reach, 2 * reach) if reach else (0.0, 1.0)
    x, miss = (values - low) / width, (1 - confidence) / 2
    ends = Game(x, miss).low(miss), 1 - Game(1 - x, miss).low(miss)
    return JudgeFigure(name, stratum, len(x), float(values.mean()), low + width * ends[0], low + width * ends[1], BETTING)


def _share(name: str, right: npt.NDArray[np.bool_], confidence: float) -> JudgeFigure:
    found = share_interval(right, confidence)
    return JudgeFigure(name, ALL, found.n, found.value, found.low, found.high, found.method)


def kappa_figure(judge: Array, people: Array, confidence: float, seed: int = 0) -> JudgeFigure | None:
    """Cohen's kappa of two raters' classes; None when chance alone explains everything."""
    classes = np.unique(np.concatenate([judge, people]))
    counts = np.zeros((len(classes), len(classes)))
    np.add.at(counts, (np.searchsorted(classes, judge), np.searchsorted(classes, people)), 1)
    value = float(_kappa(counts[None])[0])
    if value != value:
        return None
    if len(judge) < SMALL:
        return JudgeFigure("kappa", ALL, len(judge), value, None, None, NO_INTERVAL)
    drawn = np.random.default_rng(seed).multinomial(len(judge), counts.ravel() / len(judge), size=_RESAMPLES)
    miss = (1 - confidence) / 2
    low, high = np.nanquantile(_kappa(drawn.reshape(-1, *counts.shape).astype(float)), [miss, 1 - miss])
    return JudgeFigure("kappa", ALL, len(judge), value, float(low), float(high), BOOTSTRAP)


def _kappa(counts: Array) -> Array:
    """Of confusion counts (..., k, k); NaN where both raters know one class only."""
    n = counts.sum((-2, -1))
    same = np.trace(counts, axis1=-2, axis2=-1) / n
    chance = (counts.sum(-1) * counts.sum(-2)).sum(-1) / n**2
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((same - chance) / (1 - chance))


def judge_figures(rows: JudgeRows, pairwise: bool, confidence: float) -> list[JudgeFigure]:
    """Every figure that the rows give."""
    held = np.ones(len(rows.first), bool) if pairwise else ~np.isnan(rows.first)
    figures = [*_answer_figures(rows, pairwise, confidence)]
    labelled = ~np.isnan(rows.people) & held & rows.asked
    if pairwise:
        both = rows.asked & ~np.isnan(rows.first) & ~np.isnan(rows.second)
        if both.any():
            first_shown = (rows.first[both] + 1 - rows.second[both]) / 2 - 0.5
            figures.append(mean_figure("bias_position", ALL, first_shown, 0.5, confidence))
            figures.append(_share("same_in_both_orders", rows.first[both] == rows.second[both], confidence))
        figures += _pairwise_calibration(rows, labelled & ~np.isnan(_preference(rows)), confidence)
    else:
        figures += _pointwise_calibration(rows, labelled, confidence)
    return figures


def _preference(rows: JudgeRows) -> Array:
    """The mean of both orders, or the one that there is. NaN without any."""
    both = np.stack([rows.first, rows.second])
    count = (~np.isnan(both)).sum(0)
    return np.asarray(np.where(count > 0, np.nansum(both, 0) / np.maximum(count, 1), np.nan))


def _answer_figures(rows: JudgeRows, pairwise: bool, confidence: float) -> Iterator[JudgeFigure]:
    """The judge's view of the answers, by stratum. Strata are drawn each by itself, so there is no figure over all."""
    score = _preference(rows) if pairwise else rows.first
    for stratum in STRATA:
        mine = (rows.stratum == stratum) & ~np.isnan(score)
        if mine.any():
            yield mean_figure("preference" if pairwise else "score", stratum, score[mine], 0, confidence)
        both = mine & ~np.isnan(rows.second)
        if not pairwise and both.any():
            yield mean_figure("score_other", stratum, rows.second[both], 0, confidence)
            yield mean_figure("difference", stratum, (rows.first - rows.second)[both], 1, confidence)


def _pointwise_calibration(rows: JudgeRows, labelled: npt.NDArray[np.bool_], confidence: float) -> Iterator[JudgeFigure]:
    if not labelled.any():
        return
    judge, people, length = rows.first[labelled], rows.people[labelled], rows.length[labelled]
    says, right = judge >= 0.5, people >= 0.5
    yield _share("agreement", says == right, confidence)
    if kappa := kappa_figure(says.astype(float), right.astype(float), confidence):
        yield kappa
    if (~right).any():
        yield _share("passes_wrong", says[~right], confidence)
    if right.any():
        yield _share("fails_right", ~says[right], confidence)
    error = judge - people
    yield mean_figure("bias", ALL, error, 1, confidence)
    order = np.argsort(length, kind="stable")
    half = len(order) // 2
    short, long = np.sort(order[:half]), np.sort(order[len(order) - half :])  # each half in the order drawn from the keys
    if half and length[order[0]] < length[order[-1]]:
        yield mean_figure("bias_length", ALL, error[long] - error[short], 2, confidence)
    both = labelled & ~np.isnan(rows.second) & ~np.isnan(rows.people_other)
    if both.any():
        apart = (rows.first - rows.people - rows.second + rows.people_other)[both]
        yield mean_figure("bias_family", ALL, apart, 2, confidence)


def _pairwise_calibration(rows: JudgeRows, labelled: npt.NDArray[np.bool_], confidence: float) -> Iterator[JudgeFigure]:
    labelled = labelled & ~np.isnan(rows.people_other)
    if not labelled.any():
        return
    judge, people = _preference(rows)[labelled], ((1 + rows.people - rows.people_other) / 2)[labelled]
    says, wants = np.sign(judge - 0.5), np.sign(people - 0.5)
    if wants.any():
        yield _share("agreement", (says == wants)[wants != 0], confidence)
    if kappa := kappa_figure(says, wants, confidence):
        yield kappa
    yield mean_figure("bias_family", ALL, judge - people, 1, confidence)
    longer = np.sign(rows.length - rows.length_other)[labelled]
    if longer.any():
        yield mean_figure("bias_length", ALL, ((judge - people) * longer)[longer != 0], 1, confidence)
