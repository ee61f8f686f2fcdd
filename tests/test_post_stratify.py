"""Figures for traffic must cover the truth as often as they say, whatever the design; and be the sum that they are said to be."""

from __future__ import annotations

import numpy as np
import pytest

from bench.label_designs import DESIGNS, NAMES, covered, draw, draw_by_name, make_world
from headtail.core.post_stratify import (
    CELLS,
    cell_of,
    jeffreys,
    labelled_traffic,
    share_traffic,
    traffic_cells,
    traffic_interval,
)

# of 200 intervals that cover 95 to 99 %; an honest 95 % gives fewer than 182 once in 300 times
LEAST = 0.91


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("exponent", [0.8, 1.3])
def test_covers_the_truth(design: str, exponent: float) -> None:
    assert covered(exponent, design, 1000, 200).share >= LEAST


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("exponent", [0.8, 1.3])
def test_labels_that_name_their_design_cover_the_truth(name: str, exponent: float) -> None:
    """Without a chance beside the name: the chances that evaluate works out."""
    assert covered(exponent, name, 1000, 200, take=draw_by_name).share >= LEAST


def test_labels_drawn_from_the_log_say_nothing_of_unseen_traffic() -> None:
    """Their intervals are wide for that alone: the day held out has 6 % of unseen events, which no label of the log stands for."""
    world = make_world(np.random.default_rng(3), 1.05)
    at, chance = draw_by_name(np.random.default_rng(4), world, "by_traffic of the log", 1000)
    events = world.events[at].astype(float)
    found = traffic_interval(world.hits[at], world.units[at], labelled_traffic(world.counts[at], events, chance, at), world.cells)
    seen = traffic_cells(world.counts[world.counts > 0], world.events[world.counts > 0])
    alone = traffic_interval(world.hits[at], world.units[at], labelled_traffic(world.counts[at], events, chance, at), seen)
    unseen = world.cells.events[0] / world.cells.events.sum()
    assert found.high - found.low == pytest.approx((alone.high - alone.low) * (1 - unseen) + unseen, abs=0.01)
    assert unseen > alone.high - alone.low


def test_rows_as_they_come_do_not_cover() -> None:
    """What was shown before: the labelled rows weighted by their events, as if they were the traffic; head and tail by one weight."""
    rng, missed = np.random.default_rng(0), 0
    for _ in range(20):
        world = make_world(rng, 1.05, head=0.97, tail=0.6)
        at, _ = draw(rng, world, "even", 1000)
        low, high = jeffreys(float(world.hits[at].sum() / world.units[at].sum()) * 1000, 1000, 0.95)
        missed += not low <= world.truth <= high
    assert missed >= 18


def test_a_census_leaves_no_doubt() -> None:
    world = make_world(np.random.default_rng(1), 1.05, queries=500)
    at = np.arange(len(world.counts))
    rows = labelled_traffic(world.counts, world.events.astype(float), np.ones(len(at)), at)
    found = traffic_interval(world.hits, world.units, rows, world.cells)
    assert (found.low, found.value, found.high) == pytest.approx((world.truth,) * 3)


def test_value_is_the_sum_over_cells() -> None:
    """Two cells with enough rows, nobody labelled for certain: share of traffic times mean."""
    counts = np.array([1] * 20 + [4] * 20)
    right = np.array([1.0] * 10 + [0.0] * 10 + [1.0] * 20)
    cells = traffic_cells(np.array([1] * 1000 + [4] * 1000), np.array([1] * 1000 + [5] * 1000))
    rows = labelled_traffic(counts, np.zeros(40), np.full(40, 0.02), np.arange(40))
    found = traffic_interval(right, np.ones(40), rows, cells)
    assert found.value == pytest.approx((1000 * 0.5 + 5000 * 1.0) / 6000)
    assert found.low < found.value < found.high


def test_a_cluster_is_one_row() -> None:
    world = make_world(np.random.default_rng(2), 1.05)
    at, chance = draw(np.random.default_rng(3), world, "by_traffic", 400)
    four = np.repeat(at, 4)
    rows = [
        labelled_traffic(world.counts[a], np.zeros(len(a)), np.repeat(chance, times) * 0.5, np.repeat(np.arange(len(at)), times))
        for a, times in ((at, 1), (four, 4))
    ]
    once, again = (traffic_interval(world.hits[a], world.units[a], r, world.cells) for a, r in zip((at, four), rows, strict=True))
    assert again.effective == pytest.approx(once.effective, rel=0.05)
    assert (again.low, again.high) == pytest.approx((once.low, once.high), abs=0.01)


def test_unseen_traffic_without_a_label_may_be_anything() -> None:
    counts, events = np.array([0] * 100 + [8] * 100), np.array([1] * 100 + [9] * 100)
    rows = labelled_traffic(counts[100:], events[100:].astype(float), np.ones(100), np.arange(100))
    found = traffic_interval(np.ones(100), np.ones(100), rows, traffic_cells(counts, events))
    assert (found.low, found.high) == pytest.approx((0.9, 1.0))
    shares = share_traffic(rows, traffic_cells(counts, events))
    assert shares.dark == pytest.approx(0.1)
    assert shares.certain.sum() == pytest.approx(0.9)


def test_shares_are_the_whole_traffic() -> None:
    world = make_world(np.random.default_rng(4), 1.05)
    for design in DESIGNS:
        at, chance = draw(np.random.default_rng(5), world, design, 500)
        rows = labelled_traffic(world.counts[at], world.events[at].astype(float), chance, np.arange(len(at)))
        shares = share_traffic(rows, world.cells)
        assert shares.certain.sum() + shares.drawn.sum() + shares.dark == pytest.approx(1.0)


def test_cells_are_doublings() -> None:
    assert cell_of(np.array([0, 1, 2, 3, 4, 1023, 1024])).tolist() == [0, 1, 2, 2, 3, 10, 11]
    assert cell_of(np.array([10**12 * 10**6])).max() < CELLS
