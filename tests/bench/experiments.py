"""Simulated A/B tests with a known effect: how often intervals hold it, at one look and at every look, and how often refusals are right.

    python -m tests.bench.statistics --only experiment_effects experiment_looks experiment_coverage

The code under test is the stage's own (`unit_effect`, `analyse_experiment`); the truth is in the generators here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from headtail.stages.experiment import Config
from headtail.stages.experiment.analysis import analyse_experiment
from headtail.stages.experiment.effect import Levels, UnitSums, unit_effect
from headtail.stages.experiment.lookup import AnswerChange
from headtail.stages.experiment.rows import AssignedUnits
from headtail.stages.experiment.units import UnitArrays

EFFECT = 0.05  # in every world: outcome per request
SPLIT = {"head": 0.6, "tail": 0.4}
HEAD_EFFECT, TAIL_EFFECT = 0.08, 0.01
Rng = np.random.Generator


def clicks(rng: Rng, units: int, share: float = 0.5, before: bool = False) -> UnitSums:
    """Users with habits of their own; who clicks more asks more."""
    treated = rng.random(units) < share
    habit = 0.9 * rng.beta(2, 5, units)
    requests = 1 + rng.poisson(4 * habit)
    outcome = rng.binomial(requests, habit + EFFECT * treated)
    earlier = rng.poisson(30 * habit)
    known = (rng.binomial(earlier, habit).astype(float), earlier.astype(float)) if before else (None, None)
    return UnitSums(treated, outcome.astype(float), requests.astype(float), *known)


def skewed(rng: Rng, units: int) -> UnitSums:
    """One request per unit, outcome log-normal: money."""
    treated = rng.random(units) < 0.5
    return UnitSums(treated, rng.lognormal(0, 1, units) + EFFECT * treated, np.ones(units))


def queries(rng: Rng, units: int) -> UnitSums:
    """A canary of 10 %: queries are the units, with 1 to some hundred requests."""
    treated = rng.random(units) < 0.1
    requests = np.minimum(300, 1 + rng.pareto(1.3, units).astype(int))
    rate = 0.9 * rng.beta(1, 4, units)
    return UnitSums(treated, rng.binomial(requests, rate + EFFECT * treated).astype(float), requests.astype(float))


KINDS: Mapping[str, tuple[int, Callable[[Rng, int], UnitSums]]] = {
    "clicks": (800, clicks),
    "clicks, CUPED": (800, lambda rng, units: clicks(rng, units, before=True)),
    "clicks, 10 % treated": (3000, lambda rng, units: clicks(rng, units, share=0.1)),
    "skewed": (2000, skewed),
    "queries": (20_000, queries),
}


def cover_of_effects(experiments: int, kinds: Sequence[str] = tuple(KINDS), seed: int = 0) -> dict[str, float]:
    """Share of 95 % intervals, for one look, that hold the effect."""
    found = {}
    for kind in kinds:
        units, make = KINDS[kind]
        rng = np.random.default_rng(seed)
        effects = [unit_effect(make(rng, units), Levels()) for _ in range(experiments)]
        found[kind] = float(np.mean([effect.low <= EFFECT <= effect.high for effect in effects]))
        left = np.mean([effect.variance_left for effect in effects])
        effective = np.median([min(effect.control.effective, effect.treatment.effective) for effect in effects])
        print(f"one look    {kind:<22} {found[kind]:.4f} of {experiments:,}; variance left {left:.2f}, effective units {effective:,.0f}")
    return found


class Arrivals:
    """Requests in order of time: unit, arm, outcome."""

    def __init__(self, rng: Rng, units: int, returning: bool) -> None:
        self.treated = rng.random(units) < 0.5
        habit = 0.9 * rng.beta(2, 5, units)
        requests = 1 + rng.poisson(4 * habit)
        self.unit = np.repeat(np.arange(units), requests)
        entered = np.sort(rng.random(units))
        later = rng.random(len(self.unit)) if returning else np.zeros(len(self.unit))
        first = np.concatenate([[0], np.cumsum(requests)[:-1]])
        later[first] = 0
        self.time = entered[self.unit] + later * (1 - entered[self.unit])
        self.outcome = (rng.random(len(self.unit)) < (habit + EFFECT * self.treated)[self.unit]).astype(float)
        self.entered = entered

    def until(self, units: int) -> UnitSums:
        """What is known when so many units have come."""
        inside = self.time <= self.entered[units - 1]
        outcome, requests = (
            np.asarray(np.bincount(self.unit[inside], w[inside], units), float) for w in (self.outcome, np.ones(len(inside)))
        )
        return UnitSums(self.treated[:units], outcome, requests)


def first_units(sums: UnitSums) -> Callable[[int], UnitSums]:
    """What is known when so many units have come, each with all of its requests."""
    return lambda n: UnitSums(sums.treated[:n], sums.outcome[:n], sums.requests[:n])


def cover_of_looks(
    experiments: int, kinds: Sequence[str] = ("clicks", "returning", "skewed"), looks: int = 30, units: int = 8000, seed: int = 1
) -> dict[str, float]:
    """Share of experiments in which the 95 % confidence sequence holds the effect at all of its looks, and Welch's interval does.

    `clicks`: all requests of a unit at once; `returning`: over the rest of the experiment; `skewed`: log-normal outcomes.
    """
    grid = np.unique(np.geomspace(400, units, looks).astype(int))
    found: dict[str, float] = {}
    for kind in kinds:
        rng, always, once = np.random.default_rng(seed), 0, 0
        for _ in range(experiments):
            until = first_units(skewed(rng, units)) if kind == "skewed" else Arrivals(rng, units, kind == "returning").until
            effects = [unit_effect(until(n), Levels(tight_units=4000)) for n in grid]
            always += all(effect.look_low <= EFFECT <= effect.look_high for effect in effects)
            once += all(effect.low <= EFFECT <= effect.high for effect in effects)
        found[kind] = always / experiments
        print(
            f"every look  {kind:<22} {found[kind]:.4f} of {experiments:,} at {len(grid)} looks; Welch's interval {once / experiments:.4f}"
        )
    return found


def two_strata(rng: Rng, users: int, tail_share: float, tail_rate: float, covered: bool) -> UnitArrays:
    """Users with three head requests each; a share of them has a tail request. The treatment does less in the tail."""
    treated = rng.random(users) < 0.5
    habit = 0.9 * rng.beta(4, 10, users)
    has_tail = np.flatnonzero(rng.random(users) < tail_share)
    tail = rng.random(len(has_tail)) < np.clip(tail_rate * habit[has_tail] * 3.5 + TAIL_EFFECT * treated[has_tail] * covered, 0, 1)
    groups = users + len(has_tail)
    change = np.full(groups, AnswerChange.CHANGED, np.int8)
    change[users:] = AnswerChange.CHANGED if covered else AnswerChange.NOT_COVERED
    outcome = np.concatenate([rng.binomial(3, habit + HEAD_EFFECT * treated), tail]).astype(float)
    requests = np.concatenate([np.full(users, 3.0), np.ones(len(has_tail))])
    unit: npt.NDArray[np.int64] = np.concatenate([np.arange(users), has_tail])
    stratum = np.concatenate([np.zeros(users, np.int64), np.ones(len(has_tail), np.int64)])
    return UnitArrays(treated, None, None, unit, stratum, change, outcome, requests, ("head", "tail"))


# world: share of users with a tail request, of 4,000; rate of events there; whether the treatment answers the tail at all
WORLDS = {
    "head_only": (0.5, 0.3, False),
    "thin_tail": (0.06, 0.3, True),  # 120 units in each arm, 200 are wanted
    "nearly_enough": (0.085, 0.3, True),  # 170 units in each arm
    "few_events": (0.4, 0.01, True),  # 800 units in each arm, of which 8 and 16 have an event
    "just_enough": (0.12, 0.3, True),  # 240 units in each arm
    "enough": (0.3, 0.3, True),  # 600 units in each arm
}


def full_coverage_outcomes(experiments: int, seed: int = 2) -> dict[str, float]:
    """How often the figure for all traffic is refused or given, and how often it is right where it is given."""
    config = Config(control="a", treatment="b", traffic=SPLIT)
    truth = SPLIT["head"] * HEAD_EFFECT + SPLIT["tail"] * TAIL_EFFECT
    found: dict[str, float] = {}
    for world, options in WORLDS.items():
        rng = np.random.default_rng(seed)
        results = []
        for _ in range(experiments):
            units = two_strata(rng, 4000, *options)
            arms = AssignedUnits(int((~units.treated).sum()), int(units.treated.sum()), ())
            results.append(analyse_experiment(units, arms, config))
        given = [result for result in results if result.full is not None]  # a sample ratio fails once in a thousand
        full = [result.full.estimate for result in given if result.full is not None and result.full.estimate is not None]
        refused = 1 - len(full) / len(given)
        if world in ("just_enough", "enough"):
            found[f"answered_{world}"] = 1 - refused
            found[f"cover_{world}"] = float(np.mean([(one.low or 0) <= truth <= (one.high or 0) for one in full]))
        else:
            found[f"refused_{world}"] = refused
        if world == "head_only":
            heads = [result.effects[2] for result in given]
            found["cover_head_only_extrapolated"] = float(np.mean([(one.low or 0) <= truth <= (one.high or 0) for one in heads]))
        print(f"coverage    {world:<22} refused {refused:.4f} of {experiments:,}")
    print("coverage   ", "; ".join(f"{name} {value:.4f}" for name, value in found.items() if name.startswith("cover")))
    return found


def _named(prefix: str, figures: Mapping[str, float]) -> dict[str, float]:
    return {f"{prefix}_{name.replace(', ', '_').replace(' % ', '_percent_').replace(' ', '_')}": value for name, value in figures.items()}


def experiment_numbers() -> Mapping[str, float]:
    """What `make bench-numbers` shows of experiments: the least cover of all kinds of traffic at one look, 2,000 experiments each."""
    return {"interval_coverage": min(cover_of_effects(2000).values())}


SIMULATIONS: Mapping[str, Callable[[], Mapping[str, float]]] = {
    "experiment_effects": lambda: _named("experiment_cover", cover_of_effects(10_000)),
    "experiment_looks": lambda: _named("experiment_cover_every_look", cover_of_looks(2000)),
    "experiment_coverage": lambda: _named("experiment", full_coverage_outcomes(8000)),
}
