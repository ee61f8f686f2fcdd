"""The sequential test keeps its promises by simulation, in the fast form; `make simulate-releases` is the full one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.releases import RATES, catches, differences, false_returns, twins
from headtail.core.sequential import (
    Array,
    Margins,
    Watch,
    paired_differences,
    pairs_to_catch,
    spread_outcomes,
    watch_differences,
)

MARGINS = Margins()


def too_many(found: int, watches: int, promised: float) -> bool:
    """More than were promised. Seeds are fixed, so there is no room for chance: a share that is 1.5 times the promise is seen with 97 %."""
    return found > promised * watches


@pytest.mark.parametrize("rate, more, daily", [(0.01, 0.0, False), (0.01, 0.005, False), (0.2, 0.005, False), (0.1, 0.0, True)])
def test_a_canary_within_the_tolerance_is_seldom_called_worse(rate: float, more: float, daily: bool) -> None:
    """At a level at which errors can be counted; four kinds at `worse_level` together stay below 1 %."""
    loose = Margins(worse_level=0.1)
    found = false_returns(200, 10_000, rate, more, loose, np.random.default_rng(1), daily)
    assert not too_many(found, 200, loose.worse_level)
    assert 4 * MARGINS.worse_level <= 0.01


def test_a_canary_beyond_the_tolerance_is_called_worse() -> None:
    """So that silence in the test above says something: twice the tolerance more is found in most of these watches."""
    assert false_returns(50, 10_000, 0.01, 2 * MARGINS.tolerance, Margins(worse_level=0.1), np.random.default_rng(1)) > 40


@pytest.mark.parametrize("rate", RATES)
def test_two_points_more_are_caught_within_the_promised_number(rate: float) -> None:
    promised, caught = catches(200, rate, MARGINS, np.random.default_rng(2))
    assert caught >= 190, "95 %: with a chance of 0.9 so many come up in 1 of 120 tries"
    assert promised == {0.01: 3179, 0.05: 9149, 0.2: 25232, 0.5: 37815}[rate]  # docs/release.md says so


def test_what_is_within_the_tolerance_is_never_promised_to_be_caught() -> None:
    assert pairs_to_catch(0.1, 0.005, MARGINS) is None
    assert pairs_to_catch(0.1, 0.004, MARGINS) is None
    few, many = (pairs_to_catch(0.1, more, MARGINS) for more in (0.1, 0.02))
    assert few is not None
    assert many is not None
    assert few < many / 10


def test_equal_releases_stay_equal_under_a_power_law_only_if_each_query_counts_once() -> None:
    """A few frequent queries fall to one release by chance. Counted by request, that is a difference that no number of requests removes."""
    loose, rng = Margins(worse_level=0.05), np.random.default_rng(3)
    assert not too_many(twins(60, 20_000, loose, rng, once=True), 60, loose.worse_level)
    assert too_many(twins(60, 20_000, loose, rng, once=False), 60, loose.worse_level)


@pytest.mark.parametrize("truth", [0.0, 0.03])
def test_the_interval_holds_the_truth_whenever_one_looks(truth: float) -> None:
    rng, missed = np.random.default_rng(4), 0
    for _ in range(100):
        watch = Watch()
        for _ in range(20):
            watch = watch_differences(watch, differences(rng, 0.1 + truth, 0.1, 200), MARGINS)
            low, high = watch.interval(0.05)
            if not low <= truth <= high:
                missed += 1
                break
    assert not too_many(missed, 100, 0.05)
    assert high - low < 0.12
    assert abs(watch.difference - truth) < 0.05


def test_no_harm_is_proven_too_and_a_canary_that_harms_is_seldom_called_fine() -> None:
    rng = np.random.default_rng(5)
    fine = watch_differences(Watch(), differences(rng, 0.01, 0.01, 5000), MARGINS)
    assert (fine.is_fine, fine.is_worse) == (True, False)
    loose = Margins(fine_level=0.1)
    found = sum(watch_differences(Watch(), differences(rng, 0.12, 0.1, 5000), loose).is_fine for _ in range(200))
    assert not too_many(found, 200, loose.fine_level)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(0, 2**32 - 1))
def test_windows_may_be_cut_anywhere(cuts: list[int], seed: int) -> None:
    found = differences(np.random.default_rng(seed), 0.3, 0.2, 40)
    whole, parts = watch_differences(Watch(), found, MARGINS), Watch()
    for piece in np.split(found, sorted(cuts)):
        parts = watch_differences(parts, piece, MARGINS)
    assert (parts.pairs, parts.is_worse, parts.is_fine) == (whole.pairs, whole.is_worse, whole.is_fine)
    for name in ("worse", "fine", "sequence"):
        assert np.allclose(getattr(parts, name), getattr(whole, name))


arms = st.lists(st.floats(0, 1), max_size=30).map(lambda values: np.asarray(values, np.float64))


@given(arms, arms)
def test_pairs_use_every_outcome_once_when_the_sizes_divide(new: Array, old: Array) -> None:
    found = paired_differences(new, old)
    assert len(found) == min(len(new), len(old))
    assert not len(found) or (np.abs(found) <= 1).all()
    if len(new) and len(old) and len(old) % len(new) == 0:
        assert np.isclose(found.mean(), new.mean() - old.mean())


def test_counts_become_outcomes() -> None:
    outcomes = spread_outcomes(3, 10, np.random.default_rng(0))
    assert sorted(outcomes.tolist()) == [0.0] * 7 + [1.0] * 3


def test_capital_shows_how_far_a_proof_has_come() -> None:
    assert Watch().wins(0.01) == 0
    found = watch_differences(Watch(), np.full(200, 0.5), MARGINS)
    assert (found.wins(0.01), found.is_worse) == (1.0, True)
    assert Watch().interval(0.05) == (-1.0, 1.0)
    assert np.isnan(Watch().difference)
