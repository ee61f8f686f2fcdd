"""Simulations of figures for traffic: how often their intervals cover the truth, by the design of the labels.

A world: queries by Zipf's law, counted in a log and on a day held out, with queries never seen before; each query's answer is right or
wrong for ever, frequent ones more often right. Labels are drawn from it by a design, again and again. tests/test_post_stratify.py
runs it in a quick form, `make simulate-statistics` in full.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from headtail.core.intervals import Array
from headtail.core.label_design import inclusion_chances
from headtail.core.label_rows import DrawFrame, ExpectedQuality, rows_for_gate, rows_for_width
from headtail.core.near_duplicates import duplicate_clusters
from headtail.core.post_stratify import CELLS, Ints, TrafficCells, cell_of, labelled_traffic, share_traffic, traffic_cells, traffic_interval
from headtail.examples.example_data import Config, log_tables, sample
from headtail.examples.label_chances import label_chances

DESIGNS = ("even", "by_traffic", "log_rank", "census + traffic")
EXPONENTS, SIZES = (0.8, 1.05, 1.3), (300, 1000, 3000)
LOG, HELD_OUT, FRESH = 200_000, 25_000, 0.06


class World(NamedTuple):
    """Queries: events in the log and held out, rank, units right (twice, as micro-F1 counts) and in all."""

    counts: Ints
    events: Ints
    rank: Array
    hits: Array
    units: Array
    cells: TrafficCells

    @property
    def truth(self) -> float:
        return float(self.events @ self.hits / (self.events @ self.units))


def make_world(rng: np.random.Generator, exponent: float, queries: int = 20_000, head: float = 0.97, tail: float = 0.84) -> World:
    """`head`, `tail`: chance of a right answer at rank 1 and at the last rank; between them it falls with the log of the rank."""
    chance = np.arange(1, queries + 1) ** -exponent
    chance /= chance.sum()
    fresh = int(HELD_OUT * FRESH)
    counts = np.concatenate([rng.multinomial(int(LOG * (1 - FRESH)), chance), np.zeros(fresh, np.int64)])
    events = np.concatenate([rng.multinomial(HELD_OUT - fresh, chance), np.ones(fresh, np.int64)])
    rank = np.concatenate([np.arange(1, queries + 1), rng.integers(1, queries, fresh)]).astype(np.float64)
    came = counts + events > 0
    counts, events, rank = counts[came], events[came], rank[came]
    units = 2.0 * rng.integers(1, 4, len(counts)).astype(np.float64)
    wrong = rng.random(len(counts)) > head - (head - tail) * np.log(np.where(counts > 0, rank, queries)) / np.log(queries)
    hits = np.asarray(np.where(wrong, 2 * np.floor(rng.random(len(counts)) * units / 2), units), np.float64)
    return World(counts, events, rank, hits, units, traffic_cells(counts, events))


def draw(rng: np.random.Generator, world: World, design: str, n: int) -> tuple[Ints, Array]:
    """Places of the labelled queries, and the chance of each to be among them."""
    total, traffic = len(world.counts), (world.counts + world.events).astype(np.float64)
    if design == "even":
        return rng.choice(total, n, replace=False), np.full(n, n / total)
    certain = np.argsort(-world.counts, kind="stable")[: n // 3] if design.startswith("census") else np.zeros(0, np.int64)
    weight = 1 / (world.rank + 0.5) if design == "log_rank" else traffic
    weight = weight.copy()
    weight[certain] = 0
    draws = n - len(certain)
    cumulative = np.cumsum(weight / weight.sum())
    drawn = np.unique(np.searchsorted(cumulative, rng.random(draws)).clip(max=total - 1))
    chance = -np.expm1(-draws * weight[drawn] / weight.sum())
    return np.concatenate([certain, drawn]), np.concatenate([np.ones(len(certain)), chance])


def draw_frame(world: World, census: int, seed: int) -> tuple[Ints, DrawFrame]:
    """Places in the world of the queries that `labels draw` may draw, and the frame: queries of the day held out, in four strata."""
    places = np.flatnonzero(world.events > 0)
    counts = world.counts[places]
    stratum = np.where(counts == 0, 3, np.where(counts >= 100, 0, np.where(counts >= 5, 1, 2)))
    keys = np.random.default_rng(seed).random(len(places))
    return places, DrawFrame(counts, world.events[places].astype(np.float64), stratum, keys, census, seed)


def quality_of(world: World, places: Ints, frame: DrawFrame, hits: Array, units: Array) -> ExpectedQuality:
    """The true quality of the census and of the other queries, as somebody would state it who knows it."""
    census = np.zeros(len(places), bool)
    census[frame.draw(1).places[: frame.census]] = True
    parts = [world.events[places[part]] for part in (census, ~census)]
    shares = [float(e @ hits[places[part]] / (e @ units[places[part]])) for e, part in zip(parts, (census, ~census), strict=True)]
    return ExpectedQuality(*shares)


def reached_width(exponent: float, census: int, width: float, trials: int, seed: int = 0) -> tuple[float, float, float]:
    """(mean width of the interval over the width that was asked for, share of intervals that hold the truth, mean number of labels)."""
    ratio, held, labels = 0.0, 0, 0
    for trial in range(trials):
        world = make_world(np.random.default_rng([seed, trial]), exponent)
        places, frame = draw_frame(world, census, trial)
        quality = quality_of(world, places, frame, world.hits, world.units)
        drawn = frame.draw(rows_for_width(frame, width, quality.others))
        at = places[drawn.places]
        rows = labelled_traffic(world.counts[at], world.events[at].astype(np.float64), drawn.inclusion, np.arange(len(at)))
        found = traffic_interval(world.hits[at], world.units[at], rows, world.cells)
        ratio += (found.high - found.low) / width
        held += found.low <= world.truth <= found.high
        labels += len(at)
    return ratio / trials, held / trials, labels / trials


def reached_power(exponent: float, census: int, below: float, level: float, power: float, gates: int, seed: int = 0) -> tuple[float, float]:
    """(share of gates that pass a threshold `below` under the truth at `level`, mean number of labels), with labels for that power."""
    from headtail.core.traffic_proof import traffic_proof

    passed, labels, worlds = 0, 0, max(1, gates // 10)
    for number in range(worlds):
        world = make_world(np.random.default_rng([seed, number]), exponent)
        right = (world.hits == world.units).astype(np.float64)
        least = float(world.events @ right / world.events.sum()) - below
        places, frame = draw_frame(world, census, number)
        rows = rows_for_gate(frame, least, quality_of(world, places, frame, right, np.ones(len(right))), level, power)
        assert rows is not None
        for gate in range(10):
            rng = np.random.default_rng([seed, number, gate])
            drawn = frame._replace(seed=1000 + gate, keys=rng.random(len(places))).draw(rows)
            order = rng.permutation(len(drawn.places))
            at = places[drawn.places[order]]
            found = labelled_traffic(world.counts[at], world.events[at].astype(np.float64), drawn.inclusion[order], np.arange(len(at)))
            shares = share_traffic(found, world.cells)
            passed += traffic_proof(right[at], shares.certain, shares.drawn, shares.dark, found.cluster, level).p(least) <= level
            labels += len(at)
    return passed / (10 * worlds), labels / (10 * worlds)


def all_reached(trials: int = 12, gates: int = 200) -> Mapping[str, float]:
    """What `labels draw` reaches of the width and the power that it is asked for: the worst of all cells."""
    ratios, powers = [], []
    for exponent in EXPONENTS:
        for census in (100, 1000):
            for width in (0.02, 0.04):
                ratio, held, labels = reached_width(exponent, census, width, trials)
                print(
                    f"Zipf {exponent:<5} census {census:>5} width {width}: {ratio:.2f} times that, held {held:.2f}, {labels:,.0f} labels",
                    flush=True,
                )
                ratios.append(ratio)
            power, labels = reached_power(exponent, census, 0.05, 0.0125, 0.8, gates)
            print(f"Zipf {exponent:<5} census {census:>5} power 0.8: {power:.2f}, {labels:,.0f} labels", flush=True)
            powers.append(power)
    return {
        "draw_width_ratio_max": max(ratios),
        "draw_width_ratio_min": min(ratios),
        "draw_power_min": min(powers),
        "draw_power_max": max(powers),
    }


NAMES = ("even", "by_traffic of the log", "by_traffic of the day held out", "by_stratum", "census")


def draw_by_name(rng: np.random.Generator, world: World, name: str, n: int) -> tuple[Ints, Array]:
    """Places of labelled queries, drawn as people draw who note no chances, and the chances that the design's name alone gives them."""
    kind = name.split(" ")[0]
    if kind == "by_traffic":
        weight = world.counts if name.endswith("log") else world.events
        at = np.unique(rng.choice(len(weight), n, p=weight / weight.sum()))
    elif kind == "by_stratum":
        stratum = np.where(world.counts == 0, 3, np.where(world.counts >= 100, 0, np.where(world.counts >= 5, 1, 2)))
        parts = [np.flatnonzero(stratum == part) for part in range(4)]
        at = np.concatenate([rng.choice(part, min(n // 4, len(part)), replace=False) for part in parts])
    elif kind == "census":
        at = np.argsort(-world.counts, kind="stable")[:n]
    else:
        at = rng.choice(len(world.counts), n, replace=False)
    inclusion = np.full(len(at), 1.0 if kind == "census" else np.nan)  # as resolve_design reads them
    cell = cell_of(world.counts[at])
    labelled = np.bincount(cell, world.events[at] > 0, CELLS)
    band = (labelled / np.maximum(world.cells.queries, 1.0))[cell]
    return at, inclusion_chances([kind] * len(at), inclusion, world.counts[at].astype(np.float64), float(world.counts.sum()), band)


Draw = Callable[[np.random.Generator, World, str, int], tuple[Ints, Array]]


class Covered(NamedTuple):
    """Share of intervals that hold the truth, and their mean width."""

    share: float
    width: float


def covered(exponent: float, design: str, n: int, trials: int, seed: int = 0, worlds: int = 10, take: Draw | None = None) -> Covered:
    """`trials` draws, spread over `worlds` worlds. `take`: draw, by DESIGNS with chances, or draw_by_name, by NAMES without."""
    rng = np.random.default_rng([seed, int(100 * exponent), n, (NAMES if take is draw_by_name else DESIGNS).index(design)])
    held, width = 0, 0.0
    for _ in range(worlds):
        world = make_world(rng, exponent)
        for _ in range(trials // worlds):
            at, chance = (take or draw)(rng, world, design, n)
            rows = labelled_traffic(world.counts[at], world.events[at].astype(np.float64), chance, np.arange(len(at)))
            found = traffic_interval(world.hits[at], world.units[at], rows, world.cells)
            held += found.low - 1e-12 <= world.truth <= found.high + 1e-12
            width += found.high - found.low
    done = trials // worlds * worlds
    return Covered(held / done, width / done)


def all_named_coverages(trials: int = 1000) -> Mapping[str, float]:
    """Labels that have the name of their design and no chance: the least cover, and that of each cell."""
    figures = {}
    for exponent in EXPONENTS:
        for name in NAMES:
            for n in SIZES:
                found = covered(exponent, name, n, trials, worlds=max(10, trials // 20), take=draw_by_name)
                print(f"Zipf {exponent:<5} {name:<32} n {n:>5}: covers {found.share:.3f}, width {found.width:.4f}", flush=True)
                figures[f"cover/{exponent}/{name}/{n}"] = found.share
    return {**figures, "named_cover_min": min(figures.values()), "named_cover_max": max(figures.values())}


def all_coverages(trials: int = 1000) -> Mapping[str, float]:
    """Every exponent, design and number of labels; `traffic_interval_cover_min` and `_max` over them."""
    figures = {}
    for exponent in EXPONENTS:
        for design in DESIGNS:
            for n in SIZES:
                found = covered(exponent, design, n, trials, worlds=max(10, trials // 20))
                print(f"Zipf {exponent:<5} {design:<17} n {n:>5}: covers {found.share:.3f}, width {found.width:.4f}", flush=True)
                figures[f"cover/{exponent}/{design}/{n}"] = found.share
    ends = {"traffic_interval_cover_min": min(figures.values()), "traffic_interval_cover_max": max(figures.values())}
    return {**figures, **ends}


def example_traffic(draws: int = 40, labels: int = 1500) -> Mapping[str, float]:
    """The example data, labelled again and again as they are shipped: cover and mean width, for answers of which a share is wrong."""
    config = Config()
    days: list[Counter[str]] = [Counter() for _ in range(config.days)]
    for day, table in log_tables(config):
        days[day].update(table["query"].to_pylist())
    before, events = sum(days[:-1], Counter()), days[-1]
    queries = sorted(before.keys() | events.keys())
    counts, later = (np.array([found[query] for query in queries]) for found in (before, events))
    place = {query: at for at, query in enumerate(queries)}
    # frequent queries are answered better: 0.98 of the most frequent, 0.93 of those seen once or never
    wrong = np.random.default_rng(0).random(len(queries)) < np.where(counts > 100, 0.02, np.where(counts > 1, 0.05, 0.07))
    right: Array = 1.0 - wrong.astype(np.float64)
    truth, cells = float(later @ right / later.sum()), traffic_cells(counts, later)
    held, width = 0, 0.0
    for number in range(draws):
        drawn = list(sample(config, labels, f"draw {number}"))
        chances = np.array(label_chances(config, drawn, f"draw {number}"))
        at = np.array([place.get(text, -1) for text, _, _ in drawn])
        known = at >= 0  # a query of which the log has nothing is none of its traffic
        at = at[known]
        rows = labelled_traffic(counts[at], later[at].astype(np.float64), chances[known], duplicate_clusters([queries[i] for i in at]))
        found = traffic_interval(right[at], np.ones(len(at)), rows, cells)
        held += found.low <= truth <= found.high
        width += found.high - found.low
    print(
        f"example data, even over log rank: truth {truth:.4f}, covers {held / draws:.3f} of {draws}, width {width / draws:.4f}", flush=True
    )
    drawn_width, drawn_held = _example_draws(queries, counts, later, right, draws, labels)
    print(f"example data, census and by traffic: covers {drawn_held:.3f} of {draws}, width {drawn_width:.4f}", flush=True)
    return {
        "traffic_interval_width": drawn_width,
        "traffic_interval_cover_example": drawn_held,
        "traffic_interval_width_log_rank": width / draws,
        "traffic_interval_cover_log_rank": held / draws,
    }


def _example_draws(queries: list[str], counts: Ints, later: Ints, right: Array, draws: int, labels: int) -> tuple[float, float]:
    """(mean width, cover) of as many labels drawn as `labels draw` draws them: a census of a third, the rest by traffic within strata."""
    places = np.flatnonzero(later > 0)
    seen = counts[places]
    stratum = np.where(seen == 0, 3, np.where(seen >= 100, 0, np.where(seen >= 5, 1, 2)))
    truth, cells = float(later @ right / later.sum()), traffic_cells(counts, later)
    width, held = 0.0, 0
    for number in range(draws):
        keys = np.random.default_rng(number).random(len(places))
        frame = DrawFrame(seen, later[places].astype(np.float64), stratum, keys, labels // 3, number)
        drawn = frame.draw(labels - labels // 3)
        at = places[drawn.places]
        clusters = duplicate_clusters([queries[i] for i in at])
        rows = labelled_traffic(counts[at], later[at].astype(np.float64), drawn.inclusion, clusters)
        found = traffic_interval(right[at], np.ones(len(at)), rows, cells)
        width, held = width + found.high - found.low, held + (found.low <= truth <= found.high)
    return width / draws, held / draws


def all_false_passes(gates: int = 1000) -> Mapping[str, float]:
    """The traffic criterion at a threshold that is exactly the truth, delta 0.05, 1,000 labels."""
    figures = {
        f"false_pass/{exponent}/{design}": false_passes(design, exponent, 1000, gates) for exponent in EXPONENTS for design in DESIGNS
    }
    print(figures, flush=True)
    return {**figures, "traffic_false_pass_max": max(figures.values())}


def label_numbers() -> Mapping[str, float]:
    """What `make bench-numbers` shows of labels: the least cover of all designs, 300 draws each, and the example's interval."""
    return {"traffic_interval_cover_min": all_coverages(300)["traffic_interval_cover_min"], **example_traffic()}


SIMULATIONS: dict[str, Callable[[], Mapping[str, float]]] = {
    "traffic_coverage": all_coverages,
    "traffic_example": example_traffic,
    "traffic_false_passes": all_false_passes,
    "draw_reached": all_reached,
    "named_coverage": all_named_coverages,
}


def false_passes(design: str, exponent: float, n: int, gates: int, delta: float = 0.05, seed: int = 0) -> float:
    """How often a gate passes a threshold that is exactly the truth: the traffic criterion on right and wrong rows."""
    from headtail.core.traffic_proof import traffic_proof

    rng = np.random.default_rng([seed, int(100 * exponent), n, DESIGNS.index(design)])
    passed = 0
    for gate in range(gates):
        if gate % 20 == 0:
            world = make_world(rng, exponent)
            right = (world.hits == world.units).astype(np.float64)
            truth = float(world.events @ right / world.events.sum())
        at, chance = draw(rng, world, design, n)
        order = rng.permutation(len(at))
        at, chance = at[order], chance[order]
        rows = labelled_traffic(world.counts[at], world.events[at].astype(np.float64), chance, np.arange(len(at)))
        shares = share_traffic(rows, world.cells)
        passed += traffic_proof(right[at], shares.certain, shares.drawn, shares.dark, rows.cluster, delta).p(truth) <= delta
    return passed / gates
