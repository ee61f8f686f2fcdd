"""The lowest confidence from which a student's answers are right often enough, proven at any number of labels. Pure.

In: labelled rows in two halves: confidence (NaN: none), and whether the answer was right. Out: a ThresholdChoice, with what is kept and how
much of that is right; what escalation is worth; how many labels it takes. Knows nothing of strata, prices or models.

How: thresholds to try, and where to begin, come from the first half alone. The second half tests them from there downwards, each with
an exact binomial test at level delta, and stops at the first that fails: fixed-sequence testing ("Learn then Test", Angelopoulos et
al. 2021, section 4). Of the thresholds that are truly too low, only the first in that order can be the first false promise, so the
chance of one is at most delta.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from headtail.core.bounds import Game, Share, share_p
from headtail.core.intervals import Array, clopper_pearson

LEVELS = 25  # thresholds to try: quantiles of the first half's confidences
FEWEST = 30  # rows from a threshold on, below which nobody can say how many more it would take


class LabelledRows(NamedTuple):
    """Rows of one half. An answer without a confidence is never kept; one that is not there (invalid, say) is not right and has none."""

    confidence: Array
    right: npt.NDArray[np.bool_]


class ShareInterval(NamedTuple):
    """A share with an interval."""

    value: float
    low: float
    high: float


class ThresholdChoice(NamedTuple):
    """`threshold`: None when none passed. `begin`: where the test began; None without any confidence. `tested`: how many
    thresholds, up to the first failure. `p`: of the last that passed, else of the first.

    `kept`, `precision`: the share of the second half's rows from the threshold on (without one: from `begin`), and the share of these that
    is right.
    """

    threshold: float | None
    begin: float | None
    tested: int
    p: float
    n: int
    kept: ShareInterval
    precision: ShareInterval


def choose_threshold(first: LabelledRows, second: LabelledRows, target: float, delta: float) -> ThresholdChoice:
    """The lowest threshold that passes. Intervals are at 95 %, all thresholds that could have been chosen together (Bonferroni)."""
    levels = threshold_levels(first.confidence)
    if not len(levels):
        nothing = ShareInterval(math.nan, 0.0, 1.0)
        return ThresholdChoice(None, None, 0, 1.0, len(second.right), nothing, nothing)
    n1, k1 = _counts(first, levels)
    begin = int(np.argmin(share_p(k1, n1, target)))
    levels = levels[begin:]
    n2, k2 = _counts(second, levels)
    ps = share_p(k2, n2, target)
    passed = int(np.argmax(np.append(ps > delta, True)))  # how many, from the beginning on
    at = max(0, passed - 1)
    sure = 1 - 0.05 / len(levels)
    kept, rows = int(n2[at]), len(second.right)
    return ThresholdChoice(
        threshold=float(levels[at]) if passed else None,
        begin=float(levels[0]),
        tested=min(passed + 1, len(levels)),
        p=float(ps[at]),
        n=rows,
        kept=_interval(kept, rows, sure),
        precision=_interval(int(k2[at]), kept, sure),
    )


def threshold_levels(confidence: Array) -> Array:
    """Thresholds to try, from high to low: confidences that are there, the lowest among them."""
    known: Array = confidence[~np.isnan(confidence)]
    if not len(known):
        return known
    levels: Array = np.unique(np.quantile(known, np.linspace(0, 1, LEVELS), method="lower"))
    return levels[::-1]


class Gain(NamedTuple):
    """What escalation is worth: share right before, after, and the difference, over all rows, with intervals."""

    before: ShareInterval
    after: ShareInterval
    difference: ShareInterval


def escalation_gain(rows: LabelledRows, other: npt.NDArray[np.bool_], threshold: float, tried: int) -> Gain:
    """Rows below `threshold` are answered by another model, which is right where `other` says so.

    Intervals are at 95 % for `tried` thresholds together. That of the difference is by betting, valid at any number of rows (bounds.Game).
    """
    stays = _keeps(rows.confidence, threshold)
    after, n, level = np.where(stays, rows.right, other), len(rows.right), 0.05 / max(1, tried)
    before, now = (_interval(int(right.sum()), n, 1 - level) for right in (rows.right, after))
    change = after.astype(np.float64) - rows.right.astype(np.float64)
    low = 2 * Game((1 + change) / 2, level / 2).low(level / 2) - 1
    high = 1 - 2 * Game((1 - change) / 2, level / 2).low(level / 2)
    return Gain(before, now, ShareInterval(float(change.mean()) if n else math.nan, low, high))


def labels_needed(first: LabelledRows, second: LabelledRows, target: float, delta: float, power: float) -> int | None:
    """Labelled rows in both halves with which some threshold would pass with chance `power`, the truth being what was seen here; about.

    None when no number of rows will do.
    """
    both = LabelledRows(np.concatenate([first.confidence, second.confidence]), np.concatenate([first.right, second.right]))
    n, k = _counts(both, threshold_levels(both.confidence))
    tested = len(second.right) / len(both.right) if len(second.right) else 0.5
    needed = []
    for kept, right in zip(n.tolist(), k.tolist(), strict=True):
        if kept < min(FEWEST, int(n.max())):  # a handful of rows that happen to be right shows nothing
            continue
        rows = Share(right, kept).rows_needed(target, delta, power) if kept else None
        if rows is not None:
            needed.append(math.ceil(rows / (kept / len(both.right)) / tested))
    return max(min(needed), math.ceil(1.1 * len(both.right))) if needed else None  # these rows were not enough: a tenth more at least


def _keeps(confidence: Array, threshold: float) -> npt.NDArray[np.bool_]:
    return np.asarray(np.nan_to_num(confidence, nan=-1.0) >= threshold)


def _counts(rows: LabelledRows, levels: Array) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(rows kept, of them right) at each level."""
    stays = np.nan_to_num(rows.confidence, nan=-1.0)[None, :] >= levels[:, None]
    return stays.sum(1), (stays & rows.right[None, :]).sum(1)


def _interval(right: int, n: int, confidence: float) -> ShareInterval:
    return ShareInterval(right / n if n else math.nan, *clopper_pearson(right, n, confidence))
