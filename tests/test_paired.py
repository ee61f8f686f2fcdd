"""The exact paired test: its size is counted outcome by outcome, not simulated; it needs fewer labels than betting does."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from headtail.core.bounds import Game
from headtail.core.paired import MISSED, PairedShare


def tail(n: int, d: float, share: float, region: list[tuple[int, int]]) -> float:
    """The trinomial chance of a set of (better, worse), from its definition."""
    up, down = (share + d) / 2, (share - d) / 2
    return math.fsum(float(stats.multinomial.pmf([x, y, n - x - y], n, [up, down, 1 - share])) for x, y in region)


def score(x: int, y: int, n: int, d: float) -> float:
    """Tango's statistic, its restricted estimate found by searching the likelihood."""
    downs = np.linspace(max(0.0, -d), (1 - d) / 2, 20_001)[1:-1]
    likelihood = x * np.log(np.maximum(downs + d, 1e-300)) + y * np.log(downs) + (n - x - y) * np.log1p(-2 * downs - d)
    down = float(downs[likelihood.argmax()])
    return (x - y - n * d) / math.sqrt(n * (2 * down + d - d * d))


@pytest.mark.parametrize("n, d", [(12, -0.1), (30, -0.05), (30, 0.0)])
def test_a_drop_that_is_too_large_passes_at_most_at_the_level(n: int, d: float) -> None:
    """Every outcome of n rows, at every share of differing rows: the chance that the test errs, exactly."""
    ps = {(x, y): PairedShare(x, y, n).p((1 + d) / 2) for x in range(n + 1) for y in range(n + 1 - x) if x - y > n * d}
    largest = 0.0
    for level in (0.01, 0.05, 0.2):
        region = [outcome for outcome, p in ps.items() if p <= level]
        errors = [tail(n, d, share, region) for share in np.linspace(abs(d) + 1e-6, 1 - 1e-6, 15)]
        assert max(errors) <= level
        largest = max(largest, max(errors) / level)
    assert largest > 0.5  # and it does not simply refuse everyone


def test_the_p_value_is_the_largest_over_the_shares_of_differing_rows() -> None:
    n, d, x, y = 24, -0.1, 3, 2
    seen = score(x, y, n, d)
    region = [(a, b) for a in range(n + 1) for b in range(n + 1 - a) if a - b > n * d and score(a, b, n, d) >= seen - 1e-4]
    low, high = stats.binomtest(x + y, n).proportion_ci(1 - MISSED, "exact")
    naive = max(tail(n, d, share, region) for share in np.linspace(max(low, abs(d)), high, 60))
    assert PairedShare(x, y, n).p((1 + d) / 2) == pytest.approx(naive + MISSED, rel=0.01)


@pytest.mark.parametrize("better, worse, n", [(10, 12, 400), (0, 0, 100), (30, 5, 300), (2, 40, 250)])
def test_bounds_and_p_values_agree(better: int, worse: int, n: int) -> None:
    proof = PairedShare(better, worse, n)
    low = proof.low(0.05)
    assert low <= proof.value
    assert proof.p(low - 1e-5) <= 0.05 < proof.p(low + 1e-5)
    ps = [proof.p(low - gap) for gap in (0.002, 0.01, 0.03)]
    assert ps == sorted(ps, reverse=True)


def test_labels_needed_are_those_of_a_simulation_and_fewer_than_betting_needs() -> None:
    """A student that differs from its teacher on one row in ten, may fall by 0.05, at level 0.05: docs/benchmarks has this case."""
    share, least, level, rng = 0.1, 0.475, 0.05, np.random.default_rng(1)
    needed = PairedShare(500, 500, 10_000).rows_needed(least, level, 0.8)
    assert needed is not None

    def passes(n: int) -> float:
        drawn = rng.multinomial(n, [share / 2, share / 2, 1 - share], 3000)
        pairs, counts = np.unique(drawn[:, :2], axis=0, return_counts=True)
        return sum(int(c) for (x, y), c in zip(pairs.tolist(), counts, strict=True) if PairedShare(x, y, n).p(least) <= level) / 3000

    assert passes(round(0.9 * needed)) < 0.8 < passes(round(1.1 * needed))
    betting = rng.choice([1.0, 0.0, 0.5], (1500, round(1.25 * needed)), p=[share / 2, share / 2, 1 - share])
    assert np.mean(Game(betting, level).ps(least) <= level) < 0.8


def test_an_equal_student_is_shown_by_rows_that_do_not_differ() -> None:
    assert PairedShare(0, 0, 58).p(0.475) > 0.05 >= PairedShare(0, 0, 59).p(0.475)  # 0.95^59 < 0.05
    assert PairedShare(0, 0, 0).p(0.475) == 1.0
    assert PairedShare(0, 0, 0).rows_needed(0.475, 0.05, 0.8) in range(55, 65)
    assert PairedShare(0, 20, 400).rows_needed(0.475, 0.05, 0.8) is None


def test_the_range_of_labels_needed_holds_them() -> None:
    proof = PairedShare(12, 14, 250)
    few, some, many = (proof.rows_needed(0.475, 0.05, 0.8, lean) or math.inf for lean in (1.28, 0.0, -1.28))
    assert few < some < many
