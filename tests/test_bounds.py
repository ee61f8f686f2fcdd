"""Bounds must hold at any n: a candidate that misses what is asked passes at most a share delta of the time.

Each cell simulates at least 2000 gates and counts those that pass; an exact binomial test says whether that can be chance.
The same check convicts the normal approximation, and a gate without its corrections: it can fail.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from bench.bounds import spans as span_answers
from headtail.core.bounds import Array, Either, Game, Proof, Share, count_labels_needed, holm, judge_assisted_proof, share_p

GATES = 2000
CHANCE = 1e-4  # of a false alarm per cell; seeds are fixed
SPAN = np.array([1.0, 0.8, 2 / 3, 0.5, 0.0])  # F1 of rows with a few spans

Draw = Callable[[np.random.Generator, float, tuple[int, ...]], Array]


def labels(rng: np.random.Generator, mean: float, shape: tuple[int, ...]) -> Array:
    """Right or wrong."""
    return np.asarray(rng.random(shape) < mean, np.float64)


def spans(rng: np.random.Generator, mean: float, shape: tuple[int, ...]) -> Array:
    """Mostly right, some in part, some wrong."""
    odd = np.array([0, 0.3, 0.35, 0.2, 0.15])
    share = (mean - SPAN @ odd) / (1 - SPAN @ odd)
    return np.asarray(SPAN[rng.choice(5, size=shape, p=odd * (1 - share) + share * (SPAN == 1))])


def disasters(rng: np.random.Generator, mean: float, shape: tuple[int, ...]) -> Array:
    """Steadily a little better than asked, and rarely nothing: samples without a disaster look perfect and without spread."""
    rare = 0.01
    return np.asarray(np.where(rng.random(shape) < rare, 0.0, mean / (1 - rare)))


def differences(rng: np.random.Generator, mean: float, shape: tuple[int, ...]) -> Array:
    """(a - b + 1) / 2 of two answer sources that differ on one row in ten."""
    up = 0.05 + (2 * mean - 1) / 2
    drawn = rng.random(shape)
    return np.where(drawn < up, 1.0, np.where(drawn < 0.1, 0.0, 0.5))


def convicted(passes: int, gates: int, delta: float) -> bool:
    """Whether so many passes cannot be the work of a gate that errs with chance delta at most."""
    return bool(stats.binomtest(passes, gates, delta, alternative="greater").pvalue < CHANCE)


def wald(scores: Array, least: float, delta: float) -> np.ndarray:
    """What this module is there to replace: mean - z s / sqrt(n)."""
    spread = scores.std(-1) / math.sqrt(scores.shape[-1])
    return np.asarray(scores.mean(-1) - stats.norm.isf(delta) * spread > least)


@pytest.mark.parametrize("n", [10, 45, 300, 2000])
@pytest.mark.parametrize("below", [0.0, 0.01])
@pytest.mark.parametrize("least, delta", [(0.5, 0.05), (0.9, 0.05), (0.97, 0.1)])
def test_a_share_that_misses_rarely_passes(n: int, below: float, least: float, delta: float) -> None:
    right = np.random.default_rng(n).binomial(n, least - below, 20 * GATES)
    passes = int((share_p(right, n, least) <= delta).sum())
    assert not convicted(passes, 20 * GATES, delta)
    if n >= 300 and not below:
        assert passes > 0.5 * delta * 20 * GATES  # and it does not simply refuse everyone


@pytest.mark.parametrize("draw", [labels, spans, disasters])
@pytest.mark.parametrize("n", [10, 60, 400])
@pytest.mark.parametrize("below", [0.0, 0.005])
def test_a_mean_that_misses_rarely_passes(draw: Draw, n: int, below: float) -> None:
    delta, least = 0.1, 0.9
    scores = draw(np.random.default_rng(n), least - below, (GATES, n))
    assert not convicted(int((Game(scores, delta).ps(least) <= delta).sum()), GATES, delta)


@pytest.mark.parametrize("n", [40, 400])
@pytest.mark.parametrize("drop", [0.0, 0.02])
def test_a_drop_that_is_too_large_rarely_passes(n: int, drop: float) -> None:
    delta, least = 0.05, (1 - drop) / 2
    scores = differences(np.random.default_rng(n), least, (GATES, n))
    assert not convicted(int((Game(scores, delta).ps(least) <= delta).sum()), GATES, delta)


def test_tuned_to_another_level_it_still_holds() -> None:
    scores = spans(np.random.default_rng(1), 0.85, (GATES, 200))
    ps = Game(scores, 0.001).ps(0.85)
    assert not any(convicted(int((ps <= delta).sum()), GATES, delta) for delta in (0.01, 0.05, 0.2, 0.5))


@pytest.mark.parametrize("n", [100, 800])
def test_weighted_by_traffic_it_holds(n: int) -> None:
    """Counts by a power law, up to 1000 times the least; frequent queries are answered worse than rare ones."""
    rng, top = np.random.default_rng(n), 1000
    ranks = np.arange(1, 3001)
    events = np.maximum(1, top // ranks)
    chance = np.where(events > 20, 0.7, 0.95)
    truth = float((events * chance).sum() / events.sum())
    rows = rng.integers(0, len(ranks), (GATES, n))
    scores = (rng.random((GATES, n)) < chance[rows]).astype(float)
    ps = Game(scores, 0.1, weights=events[rows] / top).ps(truth)
    assert not convicted(int((ps <= 0.1).sum()), GATES, 0.1)
    assert convicted(int((Game(scores, 0.1).ps(truth) <= 0.1).sum()), GATES, 0.1)  # rows alike are another mean


JUDGES: dict[str, Callable[[np.random.Generator, Array], Array]] = {
    "good": lambda rng, x: np.where(rng.random(x.shape) < 0.95, x, 1 - x),
    "graded": lambda rng, x: np.clip(0.2 + 0.6 * x + rng.normal(0, 0.15, x.shape), 0, 1),
    "coin": lambda rng, x: (rng.random(x.shape) < 0.5).astype(float),
    "contrary": lambda rng, x: 1 - x,
    "flatterer": lambda rng, x: np.ones_like(x),
    "mostly a flatterer": lambda rng, x: np.where(rng.random(x.shape) < 0.9, 1.0, x),
}


@pytest.mark.parametrize("judge", JUDGES)
@pytest.mark.parametrize("n, others", [(15, 400), (120, 400)])
def test_whatever_the_judge_a_mean_that_misses_rarely_passes(judge: str, n: int, others: int) -> None:
    delta, least, rng = 0.1, 0.85, np.random.default_rng(n)
    people, more = labels(rng, least, (GATES, n)), labels(rng, least, (GATES, others))
    game = judge_assisted_proof(people, JUDGES[judge](rng, people), JUDGES[judge](rng, more), delta)
    assert not convicted(int((game.ps(least) <= delta).sum()), GATES, delta)


def test_the_check_can_fail() -> None:
    """On samples as small or as lopsided as human labels are, the normal approximation is convicted by the same check."""
    rng = np.random.default_rng(0)
    for draw, n, least in ((labels, 45, 0.97), (disasters, 60, 0.9)):
        scores = draw(rng, least, (GATES, n))
        assert convicted(int(wald(scores, least, 0.05).sum()), GATES, 0.05)
        assert not convicted(int((Game(scores, 0.05).ps(least) <= 0.05).sum()), GATES, 0.05)


@pytest.mark.parametrize("candidates", [1, 5])
@pytest.mark.parametrize("n", [30, 250])
@pytest.mark.parametrize("judged", [False, True])
def test_of_several_candidates_on_several_strata_rarely_one_passes_that_misses(candidates: int, n: int, judged: bool) -> None:
    """Every candidate misses on the tail and is perfect elsewhere: the hardest case, since only the tail stands in the way."""
    delta, strata, least, rng = 0.1, 4, 0.9, np.random.default_rng(n)
    ps = np.zeros((GATES, candidates, strata))
    people = labels(rng, least, (GATES, candidates, n))
    if judged:
        more = labels(rng, least, (GATES, candidates, 200))
        judge = JUDGES["good"]
        helped = judge_assisted_proof(people, judge(rng, people), judge(rng, more), delta / candidates / strata / 2)
        plain = share_p(people.sum(-1), n, least)
        ps[..., 0] = np.minimum(1, 2 * np.minimum(plain, helped.ps(least)))
    else:
        ps[..., 0] = share_p(people.sum(-1), n, least)
    passed = holm(ps, delta / candidates)[0].all(-1)
    assert not convicted(int(passed.any(-1).sum()), GATES, delta)
    if candidates > 1 and n == 250 and not judged:
        uncorrected = holm(ps, delta)[0].all(-1).any(-1)
        assert convicted(int(uncorrected.sum()), GATES, delta)  # the correction for candidates is needed


def test_no_claim_of_many_is_falsely_shown() -> None:
    """All strata on the boundary: the chance that any is said to hold is at most delta, and uncorrected it is not."""
    rng, delta = np.random.default_rng(3), 0.05
    ps = share_p(rng.binomial(300, 0.9, (GATES, 6)), 300, 0.9)
    assert not convicted(int(holm(ps, delta)[0].any(-1).sum()), GATES, delta)
    assert convicted(int((ps <= delta).any(-1).sum()), GATES, delta)


# ---- what the figures are


def test_a_share_is_scipys_exact_test() -> None:
    for right, n, least in ((0, 5, 0.1), (3, 10, 0.2), (10, 10, 0.7), (57, 60, 0.9), (500, 1000, 0.48)):
        test = stats.binomtest(right, n, least, alternative="greater")
        assert Share(right, n).p(least) == pytest.approx(test.pvalue)
        assert Share(right, n).low(0.03) == pytest.approx(test.proportion_ci(0.97, "exact").low)


def naive(scores: list[float], least: float, level: float) -> float:
    """The p-value of a Game, a row at a time, from its description."""
    capital = best = 1.0
    total, squares, seen = 0.5, 0.25, 1
    for score in scores:
        stake = min(math.sqrt(2 * math.log(1 / level) / (len(scores) * squares / seen)), 0.75 / least)
        capital *= 1 + stake * (score - least)
        best = max(best, capital)
        total, seen = total + score, seen + 1
        squares += (score - total / seen) ** 2
    return 1 / best if np.mean(scores) > least else 1.0


SCORES = st.lists(st.sampled_from([0.0, 0.5, 2 / 3, 1.0]) | st.floats(0, 1), min_size=1, max_size=60)


@given(SCORES, st.floats(0.02, 0.99), st.floats(0.001, 0.4))
@settings(max_examples=150)
def test_a_game_is_the_naive_one(scores: list[float], least: float, level: float) -> None:
    game = Game(np.asarray(scores), level)
    assert game.p(least) == pytest.approx(naive(scores, least, level))
    assert game.p(least) <= game.p(min(1.0, least + 0.1)) + 1e-12
    low = game.low(level)
    assert low <= np.mean(scores) + 1e-9
    assert low < 1e-6 or game.p(low - 1e-6) <= level * (1 + 1e-6)
    assert game.p(min(1.0, low + 1e-6)) >= level * (1 - 1e-3)


@given(SCORES, SCORES, st.floats(0.05, 0.95))
@settings(max_examples=60)
def test_bounds_and_p_values_agree_for_assisted_games(people: list[float], more: list[float], least: float) -> None:
    x = np.asarray(people)
    game = judge_assisted_proof(x, np.round(x), np.asarray(more), 0.05)
    assert 0.005 <= game.p(least) <= 1
    assert (game.p(least) <= 0.05) == (game.low(0.05) >= least - 1e-9) or abs(game.low(0.05) - least) < 1e-6
    both = Either(Share(int(np.floor(x).sum()), len(x)), game)
    assert both.p(least) == pytest.approx(min(1.0, 2 * min(both.first.p(least), game.p(least))))


def test_repetitions_are_apart() -> None:
    rng = np.random.default_rng(0)
    people, more = labels(rng, 0.9, (7, 40)), labels(rng, 0.9, (7, 90))
    judge, other = JUDGES["graded"](rng, people), JUDGES["graded"](rng, more)
    together = judge_assisted_proof(people, judge, other, 0.05)
    for i in range(7):
        alone = judge_assisted_proof(people[i], judge[i], other[i], 0.05)
        assert together.ps(0.8)[i] == pytest.approx(alone.p(0.8))
        assert together.lows(0.1)[i] == pytest.approx(alone.low(0.1))


def test_nothing_is_known_without_rows() -> None:
    for proof in (Share(0, 0), Game(np.zeros(0), 0.05), judge_assisted_proof(np.zeros(0), np.zeros(0), np.ones(500), 0.05)):
        assert (proof.n, proof.p(0.3), proof.low(0.05)) == (0, 1.0, 0.0)
        assert math.isnan(proof.value)
    assert Share(0, 0).rows_needed(0.95, 0.05, 0.8) == 59  # 0.95^59 < 0.05: what all right would take
    assert Game(np.zeros(0), 0.05).rows_needed(0.95, 0.05, 0.8) in range(59, 90)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.01, 0.4))
def test_holm_is_the_textbooks(ps: list[float], delta: float) -> None:
    passed, levels = holm(ps, delta)
    left, going = len(ps), True
    for i in sorted(range(len(ps)), key=lambda i: ps[i]):
        level = delta / left
        going = going and ps[i] <= level
        assert bool(passed[i]) is going
        if going:
            assert levels[i] == pytest.approx(level)
            left -= 1
        else:
            assert levels[i] == pytest.approx(delta / left)
    assert all(p <= level for p, ok, level in zip(ps, passed, levels, strict=True) if ok)


# ---- power: what the bounds cost, and whether the labels that are asked for would do


@pytest.mark.parametrize("truth, least, level", [(0.9, 0.85, 0.05), (0.97, 0.95, 0.0125), (0.99, 0.9, 0.01), (0.6, 0.5, 0.05)])
def test_the_labels_asked_for_would_do(truth: float, least: float, level: float) -> None:
    rng = np.random.default_rng(5)
    n = Share(round(truth * 1000), 1000).rows_needed(least, level, 0.8)
    assert n is not None
    assert 0.76 < np.mean(share_p(rng.binomial(n, truth, 20_000), n, least) <= level) < 0.95
    if truth < 0.9:
        return
    seen = spans(rng, truth, (500,))
    m = Game(seen, level).rows_needed(least, level, 0.8)
    assert m is not None
    assert passes_of(seen, round(0.9 * m), least, level) < 0.82
    assert passes_of(seen, round(1.1 * m), least, level) > 0.78


def passes_of(seen: Array, n: int, least: float, level: float, weights: Array | None = None) -> float:
    """The share of games of n rows, drawn from `seen`, that show `least`."""
    drawn = np.random.default_rng(n).integers(0, len(seen), (1500, n))
    return float(np.mean(Game(seen[drawn], level, weights=None if weights is None else weights[drawn]).ps(least) <= level))


def test_the_labels_asked_for_have_a_range() -> None:
    few, some, many = (
        count_labels_needed(Share(180, 200), 0.85, 0.05, 0.8),
        count_labels_needed(Share(1800, 2000), 0.85, 0.05, 0.8),
        Share(179, 200),
    )
    assert few.rows == some.rows == Share(1800, 2000).rows_needed(0.85, 0.05, 0.8)
    for needed in (few, some):
        assert needed.least is not None
        assert needed.rows is not None
        assert needed.least < needed.rows
    assert few.most is None or some.most is None or few.most > some.most  # more labels, less doubt
    assert count_labels_needed(many, 0.9, 0.05, 0.8).rows is None
    assert count_labels_needed(many, 0.9, 0.05, 0.8).least is not None  # the truth may well be above


def test_micro_f1_on_the_boundary_rarely_passes_and_a_better_one_does() -> None:
    """Four spans at most, wanted and given: eight units. The truth is that of the rows drawn from."""
    delta, rng = 0.05, np.random.default_rng(4)
    scores, weights = span_answers(rng, 100_000, 0.93, 4)
    truth = float(np.average(scores, weights=weights))
    assert abs(truth - scores.mean()) > 0.003  # rows alike are another mean
    drawn = rng.integers(0, len(scores), (2 * GATES, 400))
    assert not convicted(int((Game(scores[drawn], delta, weights=weights[drawn]).ps(truth) <= delta).sum()), 2 * GATES, delta)
    assert passes_of(scores, 400, truth - 0.03, delta, weights) > 0.75


def test_no_labels_make_up_for_a_miss() -> None:
    proofs: list[Proof] = [Share(85, 100), Game(np.full(100, 0.85), 0.05), Game(np.linspace(0.7, 1, 101), 0.05)]
    for proof in proofs:
        assert proof.rows_needed(0.86, 0.05, 0.8) is None
        assert proof.p(0.86) > 0.05


def test_pairing_and_a_judge_save_labels() -> None:
    """Why they are there. On paired differences betting beats what any bound of two separate means could do."""
    rng = np.random.default_rng(2)
    power = np.mean(Game(differences(rng, 0.5, (300, 1000)), 0.05).ps((1 - 0.05) / 2) <= 0.05)
    assert power > 0.95
    people, more = labels(rng, 0.93, (300, 150)), labels(rng, 0.93, (300, 4000))
    alone = np.mean(Game(people, 0.025).ps(0.85) <= 0.025)
    good, coin = (
        np.mean(judge_assisted_proof(people, JUDGES[name](rng, people), JUDGES[name](rng, more), 0.025).ps(0.85) <= 0.025)
        for name in ("good", "coin")
    )
    assert good > alone + 0.15
    assert coin > alone - 0.12  # a useless judge is found out
