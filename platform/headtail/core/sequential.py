"""Tests that may be looked at after every request: is one of two releases worse, and by how much at most?

In: outcomes (0 good .. 1 bad) of both, window by window. Out: a Watch: two e-processes and a confidence sequence. Each is valid however
often it is looked at and whenever one stops: the chance that it ever errs is at most its level. Both releases are compared within a
window, so a rate that moves with the hour fools nothing. Needs outcomes that differ by the release alone: one per query, see
`releases.canary`. Knows nothing of releases or servers.

    worse   capital won by betting that the difference is above `tolerance`; 1/level of it proves that (Ville 1939)
    fine    capital won by betting that the difference is below `harm`
    low, high   the difference, by an empirical Bernstein confidence sequence (Waudby-Smith and Ramdas 2024, theorem 2)
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
from pydantic import Field

from headtail.core.config import Config

Array = npt.NDArray[np.float64]

STAKES = np.geomspace(0.01, 0.9, 8)  # of the highest stake that never loses all; an equal share of the capital bets each
_MOST_PAIRS = 50_000_000  # pairs beyond this are as good as never
_MOST_WEIGHT = 0.5  # of a row in the confidence sequence


class Margins(Config):
    """What counts as worse, and how sure a proof is."""

    tolerance: float = Field(
        0.005, ge=0, lt=0.5, description="difference of bad outcomes (0..1) that is accepted: no more is ever called worse"
    )
    harm: float = Field(0.02, gt=0, lt=0.5, description="difference (0..1) that must be ruled out before a release counts as fine")
    worse_level: float = Field(0.0025, gt=0, lt=1, description="chance that a release within the tolerance is ever called worse")
    fine_level: float = Field(0.01, gt=0, lt=1, description="chance that a release which harms is ever called fine")


class Watch(Config):
    """What is known so far of the difference of one kind of outcome: new release minus old one."""

    pairs: int = Field(0, ge=0, description="differences seen; each is of one or more requests of either release")
    total: float = Field(0.0, description="their sum")
    worse: tuple[float, ...] = Field((0.0,) * len(STAKES), description="log capital by stake, against `at most tolerance`")
    fine: tuple[float, ...] = Field((0.0,) * len(STAKES), description="log capital by stake, against `at least harm`")
    is_worse: bool = Field(False, description="proven: above the tolerance")
    is_fine: bool = Field(False, description="proven: below harm")
    sequence: tuple[float, float, float, float] = Field(
        (0.0, 0.0, 0.0, 0.0), description="of the confidence sequence: squares, weights, weighted values, weighted errors"
    )

    @property
    def difference(self) -> float:
        """The mean difference; NaN without pairs."""
        return self.total / self.pairs if self.pairs else math.nan

    def interval(self, level: float) -> tuple[float, float]:
        """Where the difference is, except with chance `level`, whenever one looks."""
        _, weights, values, errors = self.sequence
        if not weights:
            return -1.0, 1.0
        radius = (math.log(2 / level) + errors) / weights
        middle = values / weights
        return max(-1.0, 2 * (middle - radius) - 1), min(1.0, 2 * (middle + radius) - 1)

    def wins(self, level: float) -> float:
        """How far the proof that it is worse has come: 0 at the start, 1 is proof."""
        return max(0.0, min(1.0, _log_mean(np.asarray(self.worse)).item() / math.log(1 / level)))


def paired_differences(new: Array, old: Array) -> Array:
    """Differences of outcomes of one window, in random order each: the mean of some of `new` minus the mean of some of `old`.

    There are as many as the smaller of the two has outcomes; each outcome is in exactly one. Values lie in [-1, 1].
    """
    pairs = min(len(new), len(old))
    if not pairs:
        return np.empty(0)
    return _block_means(new, pairs) - _block_means(old, pairs)


def _block_means(values: Array, blocks: int) -> Array:
    ends = np.arange(1, blocks + 1) * len(values) // blocks
    sums = np.concatenate([[0.0], np.cumsum(values)])[np.concatenate([[0], ends])]
    return np.asarray(np.diff(sums) / np.diff(np.concatenate([[0], ends])))


def spread_outcomes(bad: int, requests: int, rng: np.random.Generator) -> Array:
    """`requests` outcomes of which `bad` are 1, in random order: all that a count of a window says."""
    outcomes = np.zeros(requests)
    outcomes[:bad] = 1.0
    return rng.permutation(outcomes)


def watch_differences(watch: Watch, differences: Array, margins: Margins) -> Watch:
    """`watch` after more differences. A proof stays a proof: it may be looked for after each difference, and is."""
    if not len(differences):
        return watch
    worse, is_worse = _bet(watch.worse, differences - margins.tolerance, 1 / (1 + margins.tolerance), margins.worse_level, watch.is_worse)
    fine, is_fine = _bet(watch.fine, margins.harm - differences, 1 / (1 - margins.harm), margins.fine_level, watch.is_fine)
    return Watch(
        pairs=watch.pairs + len(differences),
        total=watch.total + float(differences.sum()),
        worse=worse,
        fine=fine,
        is_worse=is_worse,
        is_fine=is_fine,
        sequence=_sequence(watch, differences),
    )


def _bet(capital: tuple[float, ...], gains: Array, most: float, level: float, proven: bool) -> tuple[tuple[float, ...], bool]:
    """Log capital by stake after these gains, and whether the mean capital ever reached 1/level. `most`: the stake that could lose all;
    `proven`: it did before."""
    paths = np.asarray(capital)[:, None] + np.cumsum(np.log1p(most * STAKES[:, None] * gains), -1)
    if not proven:
        near = paths[:, paths.max(0) >= math.log(1 / level)]  # the mean is at most the largest; seldom is one so large
        proven = bool((_log_mean(near) >= math.log(1 / level)).any())
    return tuple(paths[:, -1].tolist()), proven


def _log_mean(capital: Array) -> Array:
    return np.asarray(np.logaddexp.reduce(capital, axis=0) - math.log(len(STAKES)))


def _sequence(watch: Watch, differences: Array) -> tuple[float, float, float, float]:
    """Sums of the confidence sequence, over x = (difference + 1) / 2; weights and means depend on earlier rows alone."""
    squares, weights, values, errors = watch.sequence
    x = (differences + 1) / 2
    row = watch.pairs + np.arange(1, len(x) + 1)
    before = (watch.total + watch.pairs) / 2
    means = (0.5 + before + np.cumsum(x)) / (row + 1)
    spread = squares + np.cumsum((x - means) ** 2)
    variance = (0.25 + np.concatenate([[squares], spread[:-1]])) / row
    last_mean = np.concatenate([[(0.5 + before) / (watch.pairs + 1)], means[:-1]])
    weight = np.minimum(np.sqrt(2 * math.log(2 / 0.01) / (variance * row * np.log1p(row))), _MOST_WEIGHT)
    error = 4 * (x - last_mean) ** 2 * (-np.log1p(-weight) - weight) / 4
    return float(spread[-1]), weights + float(weight.sum()), values + float((weight * x).sum()), errors + float(error.sum())


def pairs_to_catch(rate: float, regression: float, margins: Margins, block: int = 19, power: float = 0.95) -> int | None:
    """Pairs within which a rise of bad outcomes from `rate` by `regression` is proven with chance `power`; None when it never is.

    For outcomes that are 0 or 1, one of the new release beside `block` of the old one. From mean and spread of what a pair adds to the log
    capital at the best of the stakes, whose share of the capital alone must suffice: an upper figure. `make simulate-releases` counts.
    """
    from scipy import stats  # half a second, which every process of a server would pay

    old = np.arange(block + 1)
    chance = stats.binom.pmf(old, block, rate)
    new = min(1.0, rate + regression)
    gains = np.concatenate([1 - old / block, -old / block]) - margins.tolerance
    weight = np.concatenate([new * chance, (1 - new) * chance])
    added = np.log1p(STAKES[:, None] / (1 + margins.tolerance) * gains)
    mean = added @ weight
    spread = np.sqrt(np.maximum((added**2) @ weight - mean**2, 0))
    goal, sure = math.log(len(STAKES) / margins.worse_level), NormalDist().inv_cdf(power)
    winning = mean > 0
    if not winning.any():
        return None
    # n mean - sure sqrt(n) spread = goal, solved for sqrt(n)
    root = (sure * spread[winning] + np.sqrt((sure * spread[winning]) ** 2 + 4 * mean[winning] * goal)) / (2 * mean[winning])
    found = math.ceil(float(root.min()) ** 2)
    return found if found <= _MOST_PAIRS else None
