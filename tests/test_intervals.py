"""Intervals must cover the truth as often as they say, also on small and lopsided samples, and be quick."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score

from headtail.core.intervals import (
    BOOTSTRAP,
    EXACT,
    NONE,
    Array,
    auroc,
    clopper_pearson,
    ece,
    effective_rows,
    f1_difference,
    f1_interval,
    reliability,
    share_interval,
)

UNITS = st.lists(st.tuples(*[st.integers(0, 4)] * 3, st.integers(0, 50)), min_size=1, max_size=80)
SCORED = st.lists(st.tuples(st.sampled_from([0.1, 0.25, 0.5, 0.5, 0.9, 1.0]) | st.floats(0, 1), st.booleans()), min_size=1, max_size=120)


def labels(rng: np.random.Generator, n: int, right: float) -> tuple[Array, Array, Array]:
    """Rows of a label task: one unit each."""
    hit = (rng.random(n) < right).astype(float)
    return hit, 1 - hit, 1 - hit


def spans(rng: np.random.Generator, n: int, right: float) -> tuple[Array, Array, Array]:
    """Rows of a span task: 1-4 units, easy and hard queries, as many wrong as missed or fewer."""
    wanted = rng.integers(1, 5, n)
    hit = rng.binomial(wanted, rng.beta(3 * right, 3 * (1 - right), n))
    return hit.astype(float), rng.binomial(wanted - hit, 0.7).astype(float), (wanted - hit).astype(float)


def covered(draw: object, truth: float, trials: int = 400) -> float:
    """Share of trials whose interval holds the truth."""
    found = [draw(i) for i in range(trials)]  # type: ignore[operator]
    return float(np.mean([x.low <= truth <= x.high for x in found]))


@pytest.mark.parametrize("right", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("n", [12, 40, 120, 400])
def test_covers_labels(right: float, n: int) -> None:
    rng = np.random.default_rng(n)
    assert covered(lambda i: f1_interval(*labels(rng, n, right), resamples=400, seed=i), right) >= 0.92


@pytest.mark.parametrize("right", [0.6, 0.9])
@pytest.mark.parametrize("n", [15, 60, 300])
def test_covers_spans(right: float, n: int) -> None:
    rng = np.random.default_rng(n)
    tp, fp, fn = spans(rng, 400_000, right)
    truth = float(2 * tp.sum() / (2 * tp + fp + fn).sum())
    assert covered(lambda i: f1_interval(*spans(rng, n, right), resamples=400, seed=i), truth) >= 0.92


@pytest.mark.parametrize("n", [40, 300])
def test_covers_traffic_of_the_labelled_rows(n: int) -> None:
    """Weights are those of the labelled queries at hand; what is random is whether each is answered right."""
    rng = np.random.default_rng(n)
    counts = np.maximum(1, np.round(20_000 / np.arange(1, n + 1)))
    chance = np.linspace(0.95, 0.6, n)
    truth = float((counts * chance).sum() / counts.sum())

    def draw(i: int) -> object:
        hit = (rng.random(n) < chance).astype(float)
        return f1_interval(hit, 1 - hit, 1 - hit, counts, resamples=400, seed=i)

    assert covered(draw, truth) >= 0.92


def test_covers_a_paired_difference() -> None:
    rng = np.random.default_rng(5)

    def draw(i: int) -> object:
        hard = rng.random(200)
        a, b = (hard < 0.85).astype(float), (hard + rng.normal(0, 0.1, 200) < 0.80).astype(float)
        return f1_difference((b, 1 - b, 1 - b), (a, 1 - a, 1 - a), resamples=400, seed=i)

    hard = np.random.default_rng(6).random(2_000_000)
    truth = float((hard + np.random.default_rng(7).normal(0, 0.1, len(hard)) < 0.80).mean() - (hard < 0.85).mean())
    assert covered(draw, truth) >= 0.92


def test_pairing_narrows() -> None:
    rng = np.random.default_rng(0)
    a = labels(rng, 500, 0.85)
    other = a[0].copy()
    other[:40] = 1 - other[:40]
    b = (other, 1 - other, 1 - other)
    paired, alone = f1_difference(b, a), [f1_interval(*side) for side in (a, b)]
    assert paired.method == BOOTSTRAP
    assert paired.high - paired.low < 0.8 * ((alone[1].high - alone[0].low) - (alone[1].low - alone[0].high))


def test_same_rows_do_not_differ() -> None:
    found = f1_difference(*[labels(np.random.default_rng(1), 100, 0.8)] * 2)
    assert found.value == 0.0
    assert found.low < 0 < found.high  # ten rows on which they differ are asked for before a bootstrap says "none"


@given(UNITS)
@settings(max_examples=150)
def test_interval_holds_its_value(rows: list[tuple[int, int, int, int]]) -> None:
    tp, fp, fn, weight = (np.asarray(c, dtype=float) for c in zip(*rows, strict=True))
    found = f1_interval(tp, fp, fn, weight, resamples=300)
    if not ((2 * tp + fp + fn) * weight).sum():
        assert found.method == NONE
        return
    assert found.value == pytest.approx(2 * (tp * weight).sum() / ((2 * tp + fp + fn) * weight).sum())
    assert 0 <= found.low <= found.value + 1e-9
    assert found.value - 1e-9 <= found.high <= 1
    assert found.effective <= np.count_nonzero(weight) + 1e-9
    order = np.random.default_rng(0).permutation(len(rows))
    again = f1_interval(tp[order], fp[order], fn[order], weight[order], resamples=300)
    assert (again.low, again.high) == pytest.approx((found.low, found.high))  # row order is nothing


def test_grouped_rows_are_the_plain_bootstrap() -> None:
    """Equal rows are drawn together; the naive way, row by row, must give the same distribution."""
    rng = np.random.default_rng(3)
    tp, fp, fn = spans(rng, 200, 0.7)
    found = f1_interval(tp, fp, fn, resamples=20_000)
    naive = []
    for _ in range(4000):
        pick = rng.integers(0, 200, 200)
        naive.append(2 * tp[pick].sum() / (2 * tp + fp + fn)[pick].sum())
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(naive, [0.025, 0.975])), abs=0.004)


def test_all_right_is_not_certain() -> None:
    for n, low in ((5, 0.478), (20, 0.832), (100, 0.964), (2000, 0.998)):  # (0.025)^(1/n)
        found = f1_interval(np.ones(n), np.zeros(n), np.zeros(n))
        assert (found.method, found.high) == (EXACT, 1.0)
        assert found.low == pytest.approx(low, abs=1e-3)
        none = f1_interval(np.zeros(n), np.ones(n), np.ones(n))
        assert (none.low, none.high) == pytest.approx((0.0, 1 - low), abs=1e-3)


def test_one_heavy_query_is_few_rows() -> None:
    """A thousand labelled rows of which one has half the traffic say little about traffic."""
    weight = np.concatenate([[1000.0], np.ones(1000)])
    assert effective_rows(weight) == pytest.approx(4.0, abs=0.1)
    hit = np.ones(1001)
    found = f1_interval(hit, 1 - hit, 1 - hit, weight)
    assert found.low < 0.5


def test_no_rows() -> None:
    empty = np.zeros(0)
    assert f1_interval(empty, empty, empty).method == NONE
    assert share_interval(np.zeros(0, dtype=bool)).n == 0
    assert np.isnan(ece(empty, empty.astype(bool)))
    assert np.isnan(auroc(empty, empty.astype(bool)))
    assert reliability(empty, empty.astype(bool)) == []


def test_clopper_pearson_is_scipys() -> None:
    for right, n in ((0, 7), (3, 10), (10, 10), (57, 60), (500, 1000)):
        wanted = stats.binomtest(right, n).proportion_ci(0.95, "exact")
        assert clopper_pearson(right, n) == pytest.approx((wanted.low, wanted.high))


@given(SCORED)
@settings(max_examples=200)
def test_calibration_against_naive(rows: list[tuple[float, bool]]) -> None:
    scores, right = np.asarray([r[0] for r in rows]), np.asarray([r[1] for r in rows])
    bins = reliability(scores, right)
    assert sum(b.n for b in bins) == len(rows)
    assert len(bins) <= 15
    assert [b.confidence for b in bins] == sorted(b.confidence for b in bins)
    assert ece(scores, right) == pytest.approx(naive_ece(rows), abs=1e-9)
    order = np.random.default_rng(1).permutation(len(rows))
    assert ece(scores[order], right[order]) == pytest.approx(ece(scores, right))
    if 0 < right.sum() < len(rows):
        assert auroc(scores, right) == pytest.approx(roc_auc_score(right, scores))
    else:
        assert np.isnan(auroc(scores, right))


def naive_ece(rows: list[tuple[float, bool]]) -> float:
    """By hand: a row's bin is the number of inner 15-quantiles below its score."""
    scores = [r[0] for r in rows]
    edges = sorted({float(np.quantile(scores, i / 15)) for i in range(1, 15)})
    groups: dict[int, list[tuple[float, bool]]] = {}
    for score, right in rows:
        groups.setdefault(sum(edge < score for edge in edges), []).append((score, right))
    return sum(abs(sum(r for _, r in g) - sum(s for s, _ in g)) for g in groups.values()) / len(rows)


def test_equal_mass_bins() -> None:
    scores = np.random.default_rng(0).random(1500) ** 3
    bins = reliability(scores, np.ones(1500, dtype=bool))
    assert [b.n for b in bins] == [100] * 15


def test_calibrated_scores_have_a_small_error() -> None:
    rng = np.random.default_rng(2)
    scores = rng.random(20_000)
    assert ece(scores, rng.random(20_000) < scores) < 0.02
    assert ece(scores, rng.random(20_000) < scores / 2) > 0.2


def test_quick() -> None:
    """2000 resamples of 5000 rows in under a second, all rows distinct (the worst case)."""
    rng = np.random.default_rng(0)
    tp, fp, fn = spans(rng, 5000, 0.8)
    weight = rng.random(5000) + 0.5
    best = float("inf")
    for seed in range(3):
        start = time.process_time()
        assert f1_interval(tp, fp, fn, weight, seed=seed).method == BOOTSTRAP
        best = min(best, time.process_time() - start)
    assert best < 1.0


def test_deterministic() -> None:
    rows = spans(np.random.default_rng(0), 300, 0.7)
    assert f1_interval(*rows, seed=1) == f1_interval(*rows, seed=1)
    assert f1_interval(*rows, seed=1) != f1_interval(*rows, seed=2)
