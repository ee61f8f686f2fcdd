"""Lower bounds that are valid for any number of rows: for shares, for means of bounded scores, and with a judge's help.

In: scores between 0 and 1, one per row, rows drawn independently and in random order. Out: p-values of "the mean is at most
m", lower bounds at a level (the chance that they are wrong), and how many rows it would take. No decision rests on
a normal approximation. Arrays may have leading axes, one per repetition. Knows nothing of strata, answer sources or tables.

    Share       right and wrong rows: the exact binomial test (Clopper and Pearson 1934)
    Game        scores in 0..1: betting against the mean (Waudby-Smith and Ramdas 2024)
    assisted    people's scores on few rows and a judge's on many: a Game (after Angelopoulos et al. 2023)
    micro-F1    a Game too: rows' own F1, weighted by their units, of which the schema bounds the number
    Either      two tests of one mean, with the level split between them
    holm        which of several criteria are true together (Holm 1979)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from scipy import special

Array = npt.NDArray[np.float64]

EXACT, BETTING, ASSISTED = "clopper-pearson", "betting", "prediction-powered betting"
LEAN = 1.2816  # standard errors to each side of an 80 % interval
_CAP = 0.75  # of the stake at which one row of the lowest score would lose everything
_WEIGHTED_CAP = 0.97  # the same for weighted rows: hardly a row has the greatest weight, and the cap binds where weights are small
JUDGES_SHARE = 0.1  # of the level, spent on the judge's mean: with many rows it is known well at any level
_MOST_ROWS = 10_000_000  # labels beyond this are as good as never
SIMULATED = 20_000  # rows up to which labels needed are simulated
_GAMES, _MOST_CELLS = 1000, 2_000_000  # games of one size, and their rows together
_STEPS = 34  # halvings of an interval of length 1: to 6e-11
_PRIOR_ROWS = 2.0  # rows that the first guess of a judge's worth (one half) counts as
_LEARNING_ROWS = 3  # rows at the start that win little because stakes are still small


class Proof(Protocol):
    """What is known of one mean."""

    @property
    def n(self) -> int: ...
    @property
    def value(self) -> float:
        """The point estimate; NaN without rows."""
        ...

    @property
    def method(self) -> str: ...
    def p(self, least: float) -> float:
        """The chance of rows as good as these if the mean were `least` or lower; at most that, for a Game."""
        ...

    def low(self, level: float) -> float:
        """The largest m with p(m) <= level: the mean is above it except with chance `level`."""
        ...

    def rows_needed(self, least: float, level: float, power: float, lean: float = 0.0) -> int | None:
        """Rows with which p(least) <= level would be met with chance `power`, if the truth lies `lean` standard errors above what
        was observed; within 10 %. None when that is not above `least`: then no number of rows will do."""
        ...


def share_p(right: npt.ArrayLike, n: npt.ArrayLike, least: npt.ArrayLike) -> Array:
    """P(Binomial(n, least) >= right), elementwise; 1 when right is 0."""
    k, rows, m = (np.asarray(x, dtype=np.float64) for x in (right, n, least))
    return np.asarray(np.where(k <= 0, 1.0, special.betainc(np.maximum(k, 1), np.maximum(rows - k, 0) + 1, m)), np.float64)


@dataclass(frozen=True)
class Share:
    """`right` of `n` rows are right. Exact: the p-value is the binomial tail, the bound is its inverse."""

    right: int
    n: int
    method: str = EXACT

    @property
    def value(self) -> float:
        return self.right / self.n if self.n else float("nan")

    def p(self, least: float) -> float:
        return float(share_p(self.right, self.n, least))

    def low(self, level: float) -> float:
        return float(special.betaincinv(self.right, self.n - self.right + 1, level)) if self.right else 0.0

    def rows_needed(self, least: float, level: float, power: float, lean: float = 0.0) -> int | None:
        truth = self.value if self.n else 1.0  # without a row: if all were right
        if self.n and lean:
            truth = float(special.betaincinv(self.right + 0.5, self.n - self.right + 0.5, special.ndtr(lean)))
        if truth <= least:
            return None

        def enough(n: int) -> bool:
            # the fewest right that pass: the binomial quantile, corrected by a step where SciPy's approximation is off
            k = min(n, int(special.bdtrik(1 - level, n, least)) + 1)
            while k > 0 and share_p(k - 1, n, least) <= level:
                k -= 1
            while k <= n and share_p(k, n, least) > level:
                k += 1
            return k <= n and float(share_p(k, n, truth)) >= power

        return smallest_count(enough)


@dataclass(frozen=True)
class Game:
    """Money won by betting that rows score above m. If their mean is m or lower nobody expects to win, and a capital that
    ever reaches 1/level has a chance of at most `level` (Ville 1939), at any number of rows and for any distribution.

    Row i multiplies the capital by 1 + stake_i weight_i (payoff_i - m); stakes depend on earlier rows alone and never risk
    all. `payoffs` (..., n) lie between `floors` and what is wanted of them; for plain scores floors are 0. With `weights` (0..1) the
    mean is the weighted one, sum(w x) / sum(w). `level`: the level it is tuned to; the p-value is valid whatever it is.
    `spent`: the chance of error that went into the payoffs, added to every p-value. `estimate`: the point estimate.
    """

    payoffs: Array
    level: float
    floors: Array | None = None
    weights: Array | None = None
    spent: float = 0.0
    estimate: float | None = None
    method: str = BETTING

    @property
    def n(self) -> int:
        return int(self.payoffs.shape[-1])

    @property
    def value(self) -> float:
        if self.estimate is not None:
            return self.estimate
        return (
            float(np.average(self.payoffs, weights=self.weights)) if self.n and (self.weights is None or self.weights.any()) else math.nan
        )

    @property
    def _cap(self) -> float:
        return _CAP if self.weights is None else _WEIGHTED_CAP

    @cached_property
    def _stakes(self) -> Array:
        """sqrt(2 log(1/level) / (n variance of the rows before)): their predictable plug-in, for n rows."""
        n, w = self.n, np.ones(self.n) if self.weights is None else self.weights
        row = np.arange(1, n + 1)
        mean = (0.5 + np.cumsum(w * self.payoffs, -1)) / (1 + np.cumsum(w, -1))
        size = (1 + np.cumsum(w * w, -1)) / (row + 1)
        spread = (size / 4 + np.cumsum((w * (self.payoffs - mean)) ** 2, -1)) / (row + 1)
        before = np.concatenate([np.full((*spread.shape[:-1], 1), 0.25), spread[..., :-1]], -1)
        return np.asarray(np.sqrt(2 * math.log(1 / (self.level - self.spent)) / (n * before)))

    def capital(self, least: npt.ArrayLike) -> Array:
        """The highest log capital reached, by repetition; 0 at the start, and where the rows' own mean is not above `least`.

        It falls as `least` rises.
        """
        m = np.asarray(least, dtype=np.float64)[..., None]
        if not self.n:
            return np.zeros(self.payoffs.shape[:-1])
        stakes = np.minimum(self._stakes, self._cap / np.maximum(m - (0.0 if self.floors is None else self.floors), 1e-12))
        gains = self.payoffs - m if self.weights is None else self.weights * (self.payoffs - m)
        reached = np.cumsum(np.log1p(stakes * gains), -1).max(-1)
        return np.asarray(np.where(gains.sum(-1) > 0, np.maximum(0.0, reached), 0.0))

    def ps(self, least: npt.ArrayLike) -> Array:
        """`p` by repetition."""
        return np.minimum(1.0, self.spent + np.exp(-self.capital(least)))

    def lows(self, level: float) -> Array:
        """`low` by repetition: by halving, since the capital falls as m rises."""
        low, high = np.zeros(self.payoffs.shape[:-1]), np.ones(self.payoffs.shape[:-1])
        for _ in range(_STEPS):
            middle = (low + high) / 2
            holds = self.ps(middle) <= level
            low, high = np.where(holds, middle, low), np.where(holds, high, middle)
        return np.asarray(low)

    def p(self, least: float) -> float:
        return float(self.ps(least))

    def low(self, level: float) -> float:
        return float(self.lows(level))

    def rows_needed(self, least: float, level: float, power: float, lean: float = 0.0) -> int | None:
        """By simulation: games of rows drawn from these. Beyond SIMULATED rows from mean and spread of what a row adds."""
        if level <= self.spent:
            return None
        if not self.n:
            return Game(np.ones(1), self.level).rows_needed(least, level, power)
        about = self._first_guess(least, level, power, lean)
        if about is None:
            return None
        key = least, level, power
        if key not in self._ratios:
            there = self._first_guess(*key, 0.0)
            self._ratios[key] = self._simulated_rows(*key, there) / there if there and there <= SIMULATED else 1.0
        return max(1, round(about * self._ratios[key]))

    @cached_property
    def _ratios(self) -> dict[tuple[float, float, float], float]:
        """Simulated rows over those of `_first_guess`, by least, level and power."""
        return {}

    def _first_guess(self, least: float, level: float, power: float, lean: float) -> int | None:
        w = np.ones(self.n) if self.weights is None else self.weights
        gains = w * (self.payoffs - least)
        gains = gains + lean * gains.std() / math.sqrt(self.n)
        if gains.mean() <= 0:
            return None
        variance = float(gains.var()) + 1e-12
        most = self._cap / max(1e-12, least - (0.0 if self.floors is None else float(self.floors.min())))
        tuned, goal, sure = math.log(1 / (self.level - self.spent)), math.log(1 / (level - self.spent)), float(special.ndtri(power))

        def enough(n: int) -> bool:
            won = np.log1p(np.maximum(min(math.sqrt(2 * tuned / (n * variance)), most) * gains, -self._cap))
            return bool((n - _LEARNING_ROWS) * won.mean() - sure * math.sqrt(n) * won.std() >= goal)

        return smallest_count(enough)

    def _simulated_rows(self, least: float, level: float, power: float, about: int) -> float:
        """Rows at which games win with chance `power`: a probit line over the square root of the rows, through five sizes about there."""
        rng, sure, center = np.random.default_rng(0), float(special.ndtri(power)), float(about)
        for _ in range(4):
            sizes = np.unique(np.maximum(1, np.rint(center * np.array([0.6, 0.8, 1.0, 1.2, 1.45]))).astype(np.int64))
            won = np.array([self._share_won(least, level, int(size), rng) for size in sizes])
            inside = (won > 0.02) & (won < 0.995)
            if inside.sum() >= 2:
                slope, start = np.polyfit(np.sqrt(sizes[inside]), special.ndtri(won[inside]), 1, w=np.sqrt(won * (1 - won))[inside])
                found = ((sure - start) / slope) ** 2 if slope > 0 and sure > start else center
                if 0.7 * center <= found <= 1.3 * center:
                    return float(found)
                center = float(np.clip(found, center / 2, center * 2))
            else:
                center *= 0.6 if won[-1] >= power else 1.6
        return center

    def _share_won(self, least: float, level: float, size: int, rng: np.random.Generator) -> float:
        """The share of games of `size` rows drawn from these that win."""
        drawn = rng.integers(0, self.n, (max(60, min(_GAMES, _MOST_CELLS // size)), size))
        floors = None if self.floors is None else self.floors[drawn]
        weights = None if self.weights is None else self.weights[drawn]
        return float((Game(self.payoffs[drawn], level, floors, weights, self.spent).ps(least) <= level).mean())


def judge_assisted_proof(people: Array, judge: Array, more: Array, level: float, share: float = JUDGES_SHARE) -> Game:
    """Few rows with people's scores and a judge's, many with the judge's alone (`more`), one bound: prediction-powered
    inference (Angelopoulos et al. 2023) at finite n.

    1. The judge's mean over all rows is above `low`, by betting on `more`, except with chance share x level.
    2. Then row i pays people_i - lambda_i (judge_i - low), whose mean is at most the mean of people's scores would be: bet on
       it with what is left of the level. The two chances of error add up (Bonferroni), for any judge, however bad.

    lambda_i (0..1) is how far the judge is believed: the slope of people's scores on the judge's over earlier rows, so the
    data choose it and the bet stays fair (the idea of power tuning, Angelopoulos, Duchi and Zrnic 2023). A useless judge
    gets a lambda near 0. Shapes (..., n), (..., n), (..., N); `people` and `more` hold different rows.
    """
    n, others = people.shape[-1], more.shape[-1]
    low = Game(more, level * share).lows(level * share)[..., None]
    row = np.arange(1, n + 1)
    mean_p, mean_j = ((0.5 + np.cumsum(x, -1)) / (row + 1) for x in (people, judge))
    both = np.cumsum((people - mean_p) * (judge - mean_j), -1)
    alone = np.cumsum((judge - mean_j) ** 2, -1)
    slope = (both + _PRIOR_ROWS * 0.125) / (alone + _PRIOR_ROWS * 0.25)
    first = np.full((*slope.shape[:-1], 1), 0.5)
    trust = np.clip(np.concatenate([first, slope[..., :-1]], -1), 0, 1) * (others / (others + n) if others else 0.0)
    payoffs, floors = people - trust * (judge - low), -trust * (1 - low)
    estimate = None
    if people.ndim == 1 and n and others:
        estimate = float(people.mean() - trust[-1] * (judge.mean() - more.mean()))
    return Game(payoffs, level, floors, spent=level * share, estimate=estimate, method=ASSISTED)


@dataclass(frozen=True)
class Either:
    """Two proofs of one mean, each tested at half of the level: it holds when either shows it (Bonferroni)."""

    first: Proof
    second: Proof

    @property
    def n(self) -> int:
        return self.first.n

    @property
    def value(self) -> float:
        return self.second.value

    @property
    def method(self) -> str:
        return f"{self.first.method} or {self.second.method}"

    def p(self, least: float) -> float:
        return min(1.0, 2 * min(self.first.p(least), self.second.p(least)))

    def low(self, level: float) -> float:
        return max(self.first.low(level / 2), self.second.low(level / 2))

    def rows_needed(self, least: float, level: float, power: float, lean: float = 0.0) -> int | None:
        found = [n for proof in (self.first, self.second) if (n := proof.rows_needed(least, level / 2, power, lean)) is not None]
        return min(found, default=None)


def holm(p: npt.ArrayLike, delta: float) -> tuple[npt.NDArray[np.bool_], Array]:
    """Which claims hold, and the level at which each was judged, along the last axis (Holm 1979).

    The smallest p-value is judged at delta/m, the next at delta/(m-1), ... up to the first that fails; it and all after it
    fail, judged at the level of the stop. The chance that any claim that holds is false is at most delta, whatever the dependence.
    """
    found = np.asarray(p, dtype=np.float64)
    m = found.shape[-1]
    order = np.argsort(found, -1, kind="stable")
    steps = delta / (m - np.arange(m, dtype=np.float64))
    passed = np.logical_and.accumulate(np.take_along_axis(found, order, -1) <= steps, -1)
    stop = np.minimum(passed.sum(-1, keepdims=True), m - 1)
    levels = np.where(passed, steps, steps[stop])
    back = np.argsort(order, -1, kind="stable")
    return np.take_along_axis(passed, back, -1), np.take_along_axis(levels, back, -1)


class LabelsNeeded(NamedTuple):
    """Labels in all; and if the truth is a little better or worse than what was observed. None: no number of labels will do."""

    rows: int | None
    least: int | None
    most: int | None


def count_labels_needed(proof: Proof, least: float, level: float, power: float) -> LabelsNeeded:
    """Labels with which `least` would be shown at `level` with chance `power`; its range takes the truth to lie one side or the other
    of what was observed by LEAN standard errors: 80 % of an interval."""
    return LabelsNeeded(*(proof.rows_needed(least, level, power, lean) for lean in (0.0, LEAN, -LEAN)))


def smallest_count(enough: Callable[[int], bool]) -> int | None:
    """The smallest n that is enough, by doubling and halving; shares go up and down by single rows, so: about."""
    high = 1
    while not enough(high):
        high *= 2
        if high > _MOST_ROWS:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
