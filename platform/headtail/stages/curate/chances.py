"""Chances: from the evidence against an answer to the chance that it is wrong, fitted to what people found.

In: the evidence of reviewed answers, whether each was wrong, what it stands for; the score that would be given without them. Out: a rising
function of the evidence (isotonic regression), or why there is none; how far it holds on rows that it was not fitted on. Pure.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from pydantic import Field

from headtail.core.calibration import calibration_error
from headtail.core.config import Config as Fields
from headtail.core.intervals import effective_rows
from headtail.stages.curate.columns import Bools, Floats
from headtail.stages.curate.reviewed import Reviewed

# Verdicts, and of them right and wrong ones, from which scores are fitted (docs/benchmarks/2026-12-01-suspects.md).
LEAST, OF_A_KIND = 50, 5
PRIOR_ROWS = 20.0  # that the score without verdicts counts as: few verdicts bend it, many replace it
_FOLDS = 5
Scores = Callable[[Floats], Floats]


class ScoreBin(Fields):
    """Reviewed answers of like chance."""

    n: int = Field(description="their number")
    chance: float = Field(description="mean chance of being wrong that was fitted without them")
    wrong: float = Field(description="share that was wrong")
    low: float = Field(description="lower end of its 95 % interval (Clopper-Pearson)")
    high: float = Field(description="upper end")


class Reliability(Fields):
    """How far fitted chances hold on reviewed answers: each is judged by a fit without its fold."""

    n: int = Field(description="reviewed answers")
    wrong: int = Field(description="of them wrong")
    brier: float = Field(description="mean squared distance of the chance from 1 (wrong) or 0 (right)")
    brier_unfitted: float = Field(description="the same of the scores that would be given without verdicts")
    ece: float = Field(description="expected calibration error")
    ece_floor: float = Field(description="what perfect chances would show on so many answers, on average")
    ece_floor_high: float = Field(description="what they would exceed in one of 20 draws")
    bins: tuple[ScoreBin, ...] = Field(description="of equal mass")


class SuspectScores(Fields):
    """Where the suspects' scores come from."""

    fitted: bool = Field(description="whether they are chances, fitted to people's verdicts")
    why: str = Field("", description="why they are not; empty when they are")
    verdicts: int = Field(description="people's verdicts on earlier suspects of these answers")
    wrong: int = Field(description="of them on answers that were wrong")
    at_random: int = Field(description="of them on rows that were drawn at random")
    left_out: int = Field(0, description="verdicts on other answers, or on rows whose evidence is not known")
    random_rows: Reliability | None = Field(None, description="reliability on rows drawn at random: what the whole queue is like")
    chosen_rows: Reliability | None = Field(None, description="reliability on rows that were chosen for their gain")


class ChanceFit(NamedTuple):
    """Lines between knots, level beyond them."""

    evidence: Floats
    chance: Floats

    def apply(self, evidence: Floats) -> Floats:
        """The chance (0..1) of being wrong."""
        return np.interp(evidence, self.evidence, self.chance)


def why_unfitted(reviewed: Reviewed) -> str:
    """Why scores cannot be fitted to these verdicts; empty: they can."""
    n, wrong = len(reviewed.wrong), int(reviewed.wrong.sum())
    if n >= LEAST and min(wrong, n - wrong) >= OF_A_KIND:
        return ""
    needed = f"{LEAST} are needed, {OF_A_KIND} of them on wrong answers and {OF_A_KIND} on right ones"
    return f"{n:,} verdicts on earlier suspects, {wrong:,} of them on wrong answers; {needed}"


def fit_chances(reviewed: Reviewed, scores: Scores) -> ChanceFit:
    """Least squares among rising functions of the evidence (pool adjacent violators; Zadrozny and Elkan 2002).

    `scores`: what would be given without verdicts. It counts as PRIOR_ROWS rows, spread as the reviewed ones are, so that no chance is 0 or
    1 because few rows of a kind were seen. The verdicts count as their effective number of rows.
    """
    from scipy import optimize

    weight = _weights(reviewed)
    weight = weight * effective_rows(weight) / weight.sum()
    evidence = np.concatenate([reviewed.evidence, reviewed.evidence])
    wrong = np.concatenate([reviewed.wrong.astype(np.float64), scores(reviewed.evidence)])
    weight = np.concatenate([weight, np.full(len(reviewed.evidence), PRIOR_ROWS / len(reviewed.evidence))])
    values, place = np.unique(evidence, return_inverse=True)
    mass = np.bincount(place, weight)
    found = optimize.isotonic_regression(np.bincount(place, weight * wrong) / mass, weights=mass)
    starts = found.blocks[:-1]
    middles = np.add.reduceat(values * mass, starts) / np.add.reduceat(mass, starts)
    return ChanceFit(middles, np.asarray(found.x, np.float64)[starts])


def _weights(reviewed: Reviewed) -> Floats:
    """What each row stands for, trimmed so that the rows drawn for others count together at most as much as the rest (Potter 1990).

    Untrimmed, a few dozen rows drawn at random would stand for the whole log: unbiased, and so noisy that the queue finds less than before.
    """
    weight, others = reviewed.stands_for.copy(), reviewed.stands_for > 1
    rest = float(weight[~others].sum())
    if rest and others.any():
        weight[others] *= min(1.0, rest / float(weight[others].sum()))
    return np.maximum(weight, 1.0)


def cross_fit(reviewed: Reviewed, scores: Scores, seed: int) -> Floats:
    """The chance of each reviewed row, by a fit to the rows of the other folds."""
    fold = np.random.default_rng(seed).permutation(len(reviewed.wrong)) % _FOLDS
    made = np.zeros(len(fold))
    for out in range(_FOLDS):
        made[fold == out] = fit_chances(_take(reviewed, fold != out), scores).apply(reviewed.evidence[fold == out])
    return made


def _take(reviewed: Reviewed, keep: Bools) -> Reviewed:
    evidence, wrong, at_random, stands_for, left_out = reviewed
    return Reviewed(evidence[keep], wrong[keep], at_random[keep], stands_for[keep], left_out)


def describe_scores(reviewed: Reviewed, scores: Scores, seed: int) -> SuspectScores:
    """What the receipt says of the scores."""
    why = why_unfitted(reviewed)
    counts = {"verdicts": len(reviewed.wrong), "wrong": int(reviewed.wrong.sum()), "at_random": int(reviewed.at_random.sum())}
    if why:
        return SuspectScores(fitted=False, why=why, left_out=reviewed.left_out, **counts)
    chance, unfitted = cross_fit(reviewed, scores, seed), scores(reviewed.evidence)
    kinds = [_reliability(chance[kind], unfitted[kind], reviewed.wrong[kind], seed) for kind in (reviewed.at_random, ~reviewed.at_random)]
    return SuspectScores(fitted=True, left_out=reviewed.left_out, random_rows=kinds[0], chosen_rows=kinds[1], **counts)


def _reliability(chance: Floats, unfitted: Floats, wrong: Bools, seed: int) -> Reliability | None:
    if not len(wrong):
        return None
    error = calibration_error(chance, wrong, seed=seed)
    bins = tuple(ScoreBin(n=b.n, chance=b.confidence, wrong=b.right, low=b.low, high=b.high) for b in error.bins)
    brier, before = (float(np.mean((given - wrong) ** 2)) for given in (chance, unfitted))
    return Reliability(
        n=error.n,
        wrong=int(wrong.sum()),
        brier=brier,
        brier_unfitted=before,
        ece=error.ece,
        ece_floor=error.floor,
        ece_floor_high=error.floor_high,
        bins=bins,
    )
