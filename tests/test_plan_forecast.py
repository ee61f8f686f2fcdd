"""The forecast by simulation: Good-Turing takes the optimism off, bands hold on days that were not seen, no day leaks back."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from bench.forecast import Log, cells, example_counts, history_of
from headtail.stages.plan.ageing import age_losses, replan_after
from headtail.stages.plan.forecast import Misses, believes_season, correction, forecasts, residuals, widening
from headtail.stages.plan.history import History, worth_of_queries
from headtail.stages.plan.outlook import better_order, days_needed, make_outlook
from headtail.stages.plan.unseen import new_queries

DAYS, EVENTS = 40, 40 * 1500


@cache
def log(kind: str, seed: int = 50) -> History:
    return history_of(example_counts(kind, seed, DAYS, EVENTS))


def draws(rng: np.random.Generator, exponent: float, universe: int, events: int) -> np.ndarray:
    weights = np.arange(1, universe + 1.0) ** -exponent
    return rng.choice(universe, events, p=weights / weights.sum())


def history_of_days(days: list[np.ndarray]) -> History:
    counts: dict[tuple[str, int], int] = {}
    for day, ids in enumerate(days):
        names, each = np.unique(ids, return_counts=True)
        counts |= {(str(name), day): int(n) for name, n in zip(names.tolist(), each.tolist(), strict=True)}
    return history_of(counts)


@pytest.mark.parametrize("exponent", [0.8, 1.05, 1.3])
def test_good_turing_takes_off_what_in_sample_coverage_has_too_much(exponent: float) -> None:
    """True shares are known here: the estimate is within a point of them, at every size, where in-sample coverage may be 20 off."""
    rng = np.random.default_rng(3)
    universe, events = 30_000, 40_000
    ids = draws(rng, exponent, universe, events)
    history = history_of_days([ids[: events // 2], ids[events // 2 :]])
    counts = np.bincount(ids, minlength=universe)
    order = np.lexsort((rng.random(universe), -counts))  # equal counts in no order of their true shares
    share = np.arange(1, universe + 1.0) ** -exponent
    truth, sample = np.cumsum((share / share.sum())[order]), np.cumsum(counts[order]) / events
    sizes = np.array([10, 100, 1000, 5000, int((counts > 0).sum())])
    estimate = history.curve(1).stationary(sizes)
    assert np.abs(estimate - truth[sizes - 1]).max() < 0.01
    assert np.abs(sample[sizes - 1] - truth[sizes - 1]).max() > (0.05 if exponent > 1.2 else 0.12)


@pytest.mark.parametrize("times", [0.5, 1.0, 2.0])
def test_new_queries_of_a_longer_log(times: float) -> None:
    rng = np.random.default_rng(5)
    first, later = draws(rng, 0.9, 20_000, 30_000), draws(rng, 0.9, 20_000, int(30_000 * times))
    spectrum = np.bincount(np.bincount(first, minlength=20_000))[1:16].astype(float)
    came = len(np.setdiff1d(later, first))
    assert new_queries(spectrum, times) == pytest.approx(came, rel=0.1)
    assert new_queries(np.array([0.0, 5.0]), 1.0) == 0.0, "never below nothing"


@pytest.mark.parametrize("kind", ["no drift", "drift 3 % a day", "weekends with three times the new queries"])
def test_bands_hold_on_days_that_were_not_seen(kind: str) -> None:
    """90 % bands on at least 85 % of the cells, and narrow enough to say something."""
    rows = [row for row in cells(Log(kind, "50", log(kind)), (100, 1000)) if row["holds"] is not None]
    assert len(rows) > 200
    assert np.mean([row["holds"] for row in rows]) >= 0.85
    assert np.median([row["high"] - row["low"] for row in rows]) < (0.06 if kind == "no drift" else 0.2)
    came, value, stationary = (np.array([row[name] for row in rows]) for name in ("came", "value", "stationary"))
    assert np.abs(value - came).mean() <= np.abs(stationary - came).mean() * 1.25, (
        "the misses known correct the estimate, or do little harm"
    )
    if "drift 3" in kind:
        assert np.mean(stationary - came) > 0.02, "Good-Turing alone does not know of drift"


@pytest.mark.parametrize("ranking", ["count", "value"])
def test_nothing_later_than_the_forecast_is_used(ranking: str) -> None:
    """A log that ends on the day of the forecast gives the same forecast as one that goes on, to the bit."""
    counts = example_counts("drift 3 % a day", 51, 20, 20 * 800)
    until = min(day for _, day in counts) + 13
    whole, short = history_of(counts), history_of({key: n for key, n in counts.items() if key[1] <= until})
    sizes = np.array([10, 100, 1000])
    for horizon in (1, 2, 3):
        assert forecasts(short, horizon, sizes, 13, ranking) == forecasts(whole, horizon, sizes, 13, ranking)


@pytest.mark.parametrize("horizon", [1, 2, 3])
def test_no_band_without_enough_independent_misses(horizon: int) -> None:
    history = log("no drift")
    needed = days_needed(horizon)
    assert not forecasts(history, horizon, np.array([100]), needed - 2)[0].has_band
    assert forecasts(history, horizon, np.array([100]), needed - 1)[0].has_band, "on the last of so many days"


def test_a_band_that_failed_makes_later_ones_wider() -> None:
    rng = np.random.default_rng(1)
    quiet = rng.normal(0, 0.01, (30, 1))
    broken = np.concatenate([quiet[:12], quiet[12:] + 0.2])
    usual, wider = (widening(residuals(Misses(np.arange(30), values, np.full(30, 1e6)), 1), 1, 14) for values in (quiet, broken))
    assert usual == 1
    assert wider > 1.4, "one whole day failed"


def test_a_weekly_season_is_found_and_none_is_invented() -> None:
    rng = np.random.default_rng(2)
    noise = rng.normal(0, 0.01, (60, 2))
    weekly = noise + np.where(np.arange(60) % 7 == 5, 0.1, 0.0)[:, None]
    for values, season in ((noise, False), (weekly, True)):
        misses = Misses(np.arange(60), values, np.full(60, 1e4))
        assert believes_season(misses, 1) is season
    assert not believes_season(Misses(np.arange(20), weekly[:20], np.full(20, 1e4)), 1), "not from three weeks"
    fixed = correction(Misses(np.arange(60), weekly, np.full(60, 1e4)), 61, 1, weekly=True)
    assert fixed is not None
    assert fixed == pytest.approx(0.1, abs=0.02), "day 61 is a fifth day"


def test_a_head_ages_where_traffic_drifts_and_not_where_it_does_not() -> None:
    still, moving = (age_losses(log(kind), 500, DAYS - 1) for kind in ("no drift", "drift 10 % a day"))
    assert max(one.loss for one in still) < 0.02
    assert replan_after(still, 0.02).days is None
    assert moving[5].loss > 0.1
    found = replan_after(moving, 0.05)
    assert found.days is not None
    assert found.days <= 4
    assert found.soonest is None or found.soonest <= found.days
    assert [one.low for one in moving if one.age > 20] == [None] * sum(one.age > 20 for one in moving), "too few days for an interval"


def test_the_order_by_value_is_taken_where_it_covered_more() -> None:
    assert better_order(log("drift 10 % a day"), DAYS - 1, 3, 500)[0] == "value"
    assert better_order(log("no drift"), DAYS - 1, 3, 500)[0] == "count"
    assert better_order(log("drift 10 % a day"), 8, 7, 500) == ("count", None), "too short to say"


def test_a_query_that_stopped_coming_is_worth_less() -> None:
    worth = worth_of_queries(log("drift 10 % a day"), DAYS - 1, np.array([10, 10, 10, 200]), np.array([0, 7, 20, 0]))
    assert worth[0] > 2 * worth[1] > 2 * worth[2]
    assert worth[3] > worth[0]


def test_the_outlook_says_what_is_not_known() -> None:
    outlook = make_outlook(log("no drift"), 6, 7, 100, "count", 0.02)
    assert [one.has_band for one in outlook.head] == [True, False, False, False]
    assert outlook.checked is not None
    assert outlook.checked[0].horizon == 28, "ages that the log keeps"
    assert outlook.replan.days is None
