"""The threshold's promise is false at most as often as it says: counted over thousands of simulated sets of labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
from scipy import stats

from headtail.core.threshold import LabelledRows, choose_threshold, escalation_gain, labels_needed

TARGET, DELTA = 0.9, 0.1


class Truth(NamedTuple):
    """Kinds of answers: the confidence of each, how common it is, and how often it is right."""

    confidence: np.ndarray
    share: np.ndarray
    right: np.ndarray

    def draw(self, n: int, random: np.random.Generator) -> LabelledRows:
        kind = random.choice(len(self.share), n, p=self.share / self.share.sum())
        return LabelledRows(self.confidence[kind], random.random(n) < self.right[kind])

    def precision(self, threshold: float) -> float:
        kept = self.confidence >= threshold
        return float((self.share * self.right)[kept].sum() / self.share[kept].sum())


GRID = np.linspace(0.005, 0.995, 100)
EVEN = np.ones(100)
TRUTHS: dict[str, Truth] = {
    # every threshold is a hair too low: the worst case, where each promise is false
    "nothing is right often enough": Truth(GRID, EVEN, np.full(100, TARGET - 1e-6)),
    "calibrated": Truth(GRID, EVEN, np.minimum(1.0, 0.6 + 0.4 * GRID)),
    "the top is right, the rest a hair too low": Truth(GRID, EVEN, np.where(GRID > 0.8, 0.99, 0.8775)),
    "anti-calibrated": Truth(GRID, EVEN, 0.97 - 0.2 * GRID),
    "ties": Truth(np.array([0.2, 0.5, 0.9, 1.0]), np.array([0.2, 0.3, 0.3, 0.2]), np.array([0.5, 0.9, 0.9, 0.8999])),
    "one confidence for all": Truth(np.array([0.7]), np.array([1.0]), np.array([TARGET - 1e-6])),
    "a dip in the middle": Truth(GRID, EVEN, np.where((GRID > 0.5) & (GRID < 0.7), 0.6, 0.95)),
}


@pytest.mark.parametrize("n", [40, 300, 2000])
@pytest.mark.parametrize("name", TRUTHS)
def test_a_promise_is_false_at_most_as_often_as_delta(name: str, n: int) -> None:
    truth, random, draws = TRUTHS[name], np.random.default_rng(sum(map(ord, name)) + n), 600
    chosen = [choose_threshold(truth.draw(n, random), truth.draw(n, random), TARGET, DELTA) for _ in range(draws)]
    false = sum(one.threshold is not None and truth.precision(one.threshold) < TARGET for one in chosen)
    assert stats.binomtest(false, draws, DELTA, alternative="greater").pvalue > 1e-4, f"{false} false promises in {draws}"


def test_the_obvious_way_promises_too_much() -> None:
    """The lowest threshold at which the same rows reach the target: what the split, the test and the sequence are for."""
    truth, random, draws = TRUTHS["the top is right, the rest a hair too low"], np.random.default_rng(0), 300

    def obvious(rows: LabelledRows) -> float:
        return float(min(t for t in np.unique(rows.confidence) if rows.right[rows.confidence >= t].mean() >= TARGET))

    false = sum(truth.precision(obvious(truth.draw(300, random))) < TARGET for _ in range(draws))
    assert false > 3 * DELTA * draws


def test_a_promise_that_can_be_made_is_made() -> None:
    """From 0.5 on 98 of 100 answers are right, below 0.5 half: with 1,000 labels the threshold is near 0.5 in most draws."""
    truth, random = Truth(GRID, EVEN, np.where(GRID >= 0.5, 0.98, 0.5)), np.random.default_rng(1)
    chosen = [choose_threshold(truth.draw(500, random), truth.draw(500, random), TARGET, DELTA) for _ in range(50)]
    found = [one.threshold for one in chosen if one.threshold is not None]
    assert len(found) >= 48
    assert 0.4 < np.median(found) < 0.56
    assert all(one.p <= DELTA and one.precision.low <= one.precision.value <= one.precision.high for one in chosen if one.threshold)


def test_without_confidences_or_rows_nothing_is_promised() -> None:
    none, empty = LabelledRows(np.full(50, np.nan), np.ones(50, dtype=bool)), LabelledRows(np.empty(0), np.empty(0, dtype=bool))
    for first, second in ((none, none), (empty, empty), (none, empty)):
        found = choose_threshold(first, second, TARGET, DELTA)
        assert (found.threshold, found.begin, found.tested) == (None, None, 0)
        assert labels_needed(first, second, TARGET, DELTA, 0.8) is None
    sure = LabelledRows(np.full(50, 0.9), np.ones(50, dtype=bool))
    assert choose_threshold(sure, empty, TARGET, DELTA).threshold is None


def test_answers_without_a_confidence_are_never_covered() -> None:
    confidence, right = np.where(np.arange(400) % 2, 0.8, np.nan), np.arange(400) % 2 == 1
    rows = LabelledRows(confidence, right)  # those with a confidence are right, the others wrong
    found = choose_threshold(rows, rows, TARGET, DELTA)
    assert (found.threshold, found.kept.value, found.precision.value) == (0.8, 0.5, 1.0)


def test_the_number_of_labels_that_is_named_is_about_enough() -> None:
    truth, random = Truth(GRID, EVEN, np.where(GRID >= 0.5, 0.95, 0.5)), np.random.default_rng(5)
    first, second = truth.draw(40, random), truth.draw(40, random)
    needed = labels_needed(first, second, TARGET, DELTA, 0.8)
    assert choose_threshold(first, second, TARGET, DELTA).threshold is None
    assert needed is not None
    assert 80 < needed < 5000
    passed = [choose_threshold(truth.draw(needed // 2, random), truth.draw(needed // 2, random), TARGET, DELTA) for _ in range(100)]
    assert sum(one.threshold is not None for one in passed) > 50
    bad = Truth(GRID, EVEN, np.full(100, 0.5)).draw(400, random)
    assert labels_needed(bad, bad, TARGET, DELTA, 0.8) is None


WAYS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "a better model": lambda random, n: random.random(n) < 0.95,
    "a worse model": lambda random, n: random.random(n) < 0.3,
}


@pytest.mark.parametrize("name", WAYS)
def test_intervals_of_the_gain_cover_the_truth(name: str) -> None:
    truth, random, draws, outside = TRUTHS["calibrated"], np.random.default_rng(6), 300, 0
    below = truth.confidence < 0.5
    bigger = 0.95 if name == "a better model" else 0.3
    real = float(((bigger - truth.right)[below]).sum() / 100)
    for _ in range(draws):
        rows = truth.draw(200, random)
        found = escalation_gain(rows, WAYS[name](random, 200), 0.5, 1)
        outside += not found.difference.low <= real <= found.difference.high
        assert found.difference.value == pytest.approx(found.after.value - found.before.value)
    assert outside <= 0.1 * draws
