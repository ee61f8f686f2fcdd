"""The exact unconditional test of a paired difference: two answer sources on the same rows, each right or wrong.

In: rows on which the first alone is right, rows on which the second alone is, all rows. Out: a Proof (see `bounds`) of the difference of
their shares of right rows, on the scale (difference + 1) / 2. Rows on which both agree say only how rarely they differ, which is not known:
the p-value is the largest over every share of differing rows that the data allow.

    order of outcomes     the score statistic with its restricted estimate (Tango 1998, Statistics in Medicine 17)
    largest over shares   of a 1 - MISSED interval, and MISSED is added (Berger and Boos 1994, JASA 89): valid at any number of rows
    boundary only         enough, since the order is convex (Hsueh, Liu and Chen 2001, Biometrics 57)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import special

from headtail.core.bounds import Array, share_p, smallest_count

EXACT_PAIRED = "exact paired"
MISSED = 1e-5  # the chance that the share of differing rows lies outside the interval that is searched
_SHARES = 25  # of differing rows at which the tail is computed, then as many between the neighbours of the largest
_FAR = 6.5  # standard errors beyond which a number of differing rows counts as rejecting: 1e-10
_HALVINGS = 24  # of a bound: to 1e-7
_STEPS = 12  # halvings of a critical score: to 1e-3


@dataclass(frozen=True)
class PairedShare:
    """On `better` of `n` rows the candidate alone is right, on `worse` the other alone."""

    better: int
    worse: int
    n: int
    method: str = EXACT_PAIRED

    @property
    def value(self) -> float:
        return (1 + (self.better - self.worse) / self.n) / 2 if self.n else math.nan

    def p(self, least: float) -> float:
        """The chance of rows as good as these if the difference were 2 least - 1 or lower; at most that."""
        d = 2 * least - 1
        if not self.n or self.better - self.worse <= self.n * d:
            return 1.0
        seen = float(_scores(np.asarray(self.better), np.asarray(self.worse), self.n, d))
        low, high = _share_range(self.better + self.worse, self.n, MISSED)
        return min(1.0, MISSED + _largest_tail(self.n, d, seen, max(low, abs(d)), high))

    def low(self, level: float) -> float:
        if not self.n:
            return 0.0
        far = 4 * _FAR * math.sqrt(max(self.better + self.worse, 1)) / self.n
        low, high = max(0.0, self.value - far), self.value
        low = low if self.p(low) <= level else 0.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if self.p(middle) <= level else (low, middle)
        return low

    def rows_needed(self, least: float, level: float, power: float, lean: float = 0.0) -> int | None:
        """From the exact power of the test at the observed shares. Without a row: if no row differed."""
        d = 2 * least - 1
        better, worse = (self.better / self.n, self.worse / self.n) if self.n else (0.0, 0.0)
        differ, up = better + worse, better - worse
        if self.n and lean:
            up += lean * math.sqrt(max(differ - up * up, 1 / self.n) / self.n)
            differ = max(differ, abs(up))
        if up <= d + 1e-9 or level <= MISSED:
            return None
        return smallest_count(lambda n: _power(n, d, level, (differ + up) / 2, (differ - up) / 2) >= power)


def _scores(better: npt.NDArray[np.int64], worse: npt.NDArray[np.int64], n: int, d: float) -> Array:
    """The score statistic of "the difference is d", elementwise: observed minus d, over its standard error when it is d."""
    x, y = better.astype(np.float64), worse.astype(np.float64)
    linear = (x + y) * (1 - d) - 2 * d * (n - x)
    down = (linear + np.sqrt(np.maximum(0.0, linear**2 + 8 * n * y * d * (1 - d)))) / (4 * n)  # share of `worse`, restricted to d
    variance = n * (2 * down + d - d * d)
    gap = x - y - n * d
    return np.asarray(np.where(variance > 1e-12, gap / np.sqrt(np.maximum(variance, 1e-12)), np.where(gap > 1e-9, np.inf, 0.0)))


def _share_range(count: int, n: int, missed: float) -> tuple[float, float]:
    """Clopper and Pearson's interval for the share of differing rows."""
    low = float(special.betaincinv(count, n - count + 1, missed / 2)) if count else 0.0
    high = float(special.betaincinv(count + 1, n - count, 1 - missed / 2)) if count < n else 1.0
    return low, high


def _fewest_better(changed: npt.NDArray[np.int64], n: int, d: float, seen: float) -> npt.NDArray[np.int64]:
    """Of so many differing rows, how many must favour the candidate to score `seen`; one more than there are when none would do."""
    low, high = np.zeros_like(changed), changed + 1
    while (low < high).any():
        middle = (low + high) // 2
        holds = (middle > changed) | (_scores(np.minimum(middle, changed), changed - np.minimum(middle, changed), n, d) >= seen - 1e-9)
        low, high = np.where(holds, low, np.minimum(middle + 1, high)), np.where(holds, middle, high)
    return high


def _largest_tail(n: int, d: float, seen: float, low: float, high: float) -> float:
    """The largest P(score >= seen) when the difference is d, over shares of differing rows from `low` to `high`; 0 when there are none."""
    if low > high:
        return 0.0
    spread = _FAR * math.sqrt(n * max(low * (1 - low), high * (1 - high), 1 / n))
    changed = np.arange(max(0, math.floor(n * low - spread)), min(n, math.ceil(n * high + spread)) + 1)
    fewest = _fewest_better(changed, n, d, seen)
    # evenly in the arc sine, in which every binomial share has the same standard error
    ends = np.arcsin(np.sqrt([low, high]))
    largest = 0.0
    for _ in range(2):
        grid = np.linspace(ends[0], ends[1], _SHARES)
        tails = _tails(n, d, np.clip(np.sin(grid) ** 2, low, high), changed, fewest)
        at = int(tails.argmax())
        largest, ends = max(largest, float(tails[at])), grid[[max(0, at - 1), min(_SHARES - 1, at + 1)]]
    return largest


def _tails(n: int, d: float, shares: Array, changed: npt.NDArray[np.int64], fewest: npt.NDArray[np.int64]) -> Array:
    """P(score >= seen) at each share of differing rows; differing rows that are not listed count as rejecting."""
    q = shares[:, None]
    chance = np.exp(
        special.gammaln(n + 1)
        - special.gammaln(changed + 1)
        - special.gammaln(n - changed + 1)
        + special.xlogy(changed, q)
        + special.xlog1py(n - changed, -q)
    )
    favour = np.where(q > 0, (q + d) / np.maximum(2 * q, 1e-300), 0.5)
    tail = np.zeros_like(chance)
    counts = (fewest <= changed) & (chance > 1e-14)
    at = np.nonzero(counts)
    tail[counts] = share_p(fewest[at[1]], changed[at[1]], np.clip(favour[at[0], 0], 0, 1))
    return np.asarray((chance * tail).sum(-1) + np.maximum(0.0, 1 - chance.sum(-1)))


def _power(n: int, d: float, level: float, better: float, worse: float) -> float:
    """The chance that the test of "the difference is at most d" rejects when the truth is `better` - `worse`."""
    differ = better + worse
    low, high = _share_range(round(n * max(differ, abs(d))), n, 0.01)
    low, near = max(low, abs(d)), float(special.ndtri(1 - level))
    least, most = 0.8 * near, 1.6 * near + 2.0  # the critical score lies between
    for _ in range(_STEPS):
        middle = (least + most) / 2
        least, most = (least, middle) if _largest_tail(n, d, middle, low, high) <= level - MISSED else (middle, most)
    spread = _FAR * math.sqrt(n * max(differ * (1 - differ), 1 / n))
    changed = np.arange(max(0, math.floor(n * differ - spread)), min(n, math.ceil(n * differ + spread)) + 1)
    return float(_tails(n, better - worse, np.array([differ]), changed, _fewest_better(changed, n, d, most))[0])
