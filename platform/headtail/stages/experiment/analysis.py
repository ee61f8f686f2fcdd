"""From units to verdict: checks first, then effects, then the effect at full coverage or what is missing for it. Pure.

In: UnitArrays, units assigned, a Config. Out: a Result. A head-only effect is never carried to the tail: each stratum brings its own
effect, and a stratum with too few units whose answers changed means that there is no figure for all traffic.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from headtail.core.rows import ALL
from headtail.stages.experiment.config import Config
from headtail.stages.experiment.effect import ArmStats, Effect, Levels, combine_effects, sample_ratio_p, unit_effect
from headtail.stages.experiment.lookup import AnswerChange
from headtail.stages.experiment.result import EffectEstimate, FullCoverage, RatioCheck, Result, ThinStratum, Verdict
from headtail.stages.experiment.rows import AssignedUnits
from headtail.stages.experiment.units import UnitArrays

CHANGED, FULL = "changed", "full coverage"
_MOST_MIXED = 0.01  # share of units that met both arms above which no effect is given


class StratumPart(NamedTuple):
    """One stratum: its effect, its requests by AnswerChange, its share of the traffic."""

    name: str
    effect: Effect
    requests: dict[AnswerChange, float]
    traffic: float

    @property
    def change_share(self) -> float:
        """Share of the requests that the treatment covers whose answer changes."""
        covered = self.requests[AnswerChange.CHANGED] + self.requests[AnswerChange.SAME]
        return self.requests[AnswerChange.CHANGED] / covered if covered else 0.0


def analyse_experiment(units: UnitArrays, arms: AssignedUnits, config: Config) -> Result:
    """Checks, effects, verdict."""
    ratio = check_ratio(units, arms, config)
    stop = ratio_verdict(ratio)
    if stop is not None:
        return Result(verdict=stop, ratio=ratio)
    levels = Levels(config.confidence, config.tight_units)
    changed = units.change_mask()
    whole, triggered = (unit_effect(units.part(mask), levels) for mask in (np.ones(len(changed), bool), changed))
    total = float(units.requests.sum())
    estimates = [estimate_of(ALL, whole, total), estimate_of(CHANGED, triggered, float(units.requests[changed].sum()))]
    parts = stratum_parts(units, config, levels) if units.strata != (ALL,) else []
    estimates += [estimate_of(part.name, part.effect, part.requests[AnswerChange.CHANGED]) for part in parts]
    full = full_coverage(parts, units, config, levels) if parts else None
    return Result(verdict=_verdict(triggered), ratio=ratio, effects=tuple(estimates), full=full)


def check_ratio(units: UnitArrays, arms: AssignedUnits, config: Config) -> RatioCheck:
    """Units assigned, and units whose answers changed: both splits must be as planned, else who is compared was chosen by the treatment."""
    changed = units.part(units.change_mask()).requests > 0
    control, treatment = int((changed & ~units.treated).sum()), int((changed & units.treated).sum())
    p, changed_p = sample_ratio_p(arms.control, arms.treatment, config.share), sample_ratio_p(control, treatment, config.share)
    return RatioCheck(
        control=arms.control,
        treatment=arms.treatment,
        share=config.share,
        p=p,
        changed_control=control,
        changed_treatment=treatment,
        changed_p=changed_p,
        mixed=len(arms.mixed),
        passed=min(p, changed_p) >= config.ratio_level / 2,  # two looks share the level
    )


def ratio_verdict(ratio: RatioCheck) -> Verdict | None:
    """Why there is no effect; None: there is one."""
    if ratio.mixed > _MOST_MIXED * (ratio.control + ratio.treatment + ratio.mixed):
        return "mixed_units"
    return None if ratio.passed else "sample_ratio"


def stratum_parts(units: UnitArrays, config: Config, levels: Levels) -> list[StratumPart]:
    """Each stratum's effect on changed requests. Traffic: as the config says, else all requests of the log."""
    changed, parts = units.change_mask(), []
    for name in units.strata:
        mask = units.of_stratum(name)
        requests = {change: float(units.requests[mask & (units.change == change)].sum()) for change in AnswerChange}
        traffic = config.traffic.get(name, 0.0) if config.traffic else sum(requests.values()) / float(units.requests.sum())
        parts.append(StratumPart(name, unit_effect(units.part(mask & changed), levels), requests, traffic))
    return parts


def full_coverage(parts: list[StratumPart], units: UnitArrays, config: Config, levels: Levels) -> FullCoverage:
    """sum over strata of traffic share x share of covered answers that change x effect on those. Refused where a stratum is too thin."""
    thin = [found for part in parts if part.traffic > 0 and (found := thin_stratum(part, config)) is not None]
    missing = {name: share for name, share in config.traffic.items() if share > 0 and name not in units.strata}
    thin += [
        ThinStratum(stratum=name, traffic=share, units_control=0, units_treatment=0, effective=0, units_needed=config.min_units)
        for name, share in missing.items()
    ]
    left_out = {one.stratum: one.traffic for one in thin if one.traffic < config.least_traffic}
    refused = tuple(one for one in thin if one.stratum not in left_out)
    gone = {one.stratum for one in thin}
    used = [part for part in parts if part.traffic > 0 and part.name not in gone]
    whole = sum(part.traffic for part in used)
    shares = {part.name: part.traffic / whole for part in used}
    changes = {part.name: part.change_share for part in used}
    full = FullCoverage(shares=shares, changes=changes, thin=refused, left_out=left_out)
    moved = [part for part in used if part.change_share]
    if refused or not moved:
        return full
    weights = [shares[part.name] * part.change_share for part in moved]
    effect = combine_effects([part.effect for part in moved], weights, units.treated, levels)
    requests = sum(part.requests[AnswerChange.CHANGED] for part in moved)
    return full.model_copy(update={"estimate": estimate_of(FULL, effect, requests)})


def thin_stratum(part: StratumPart, config: Config) -> ThinStratum | None:
    """What a stratum lacks; None when it has enough. Answers that are all the same need no units: the effect is 0."""
    if part.requests[AnswerChange.SAME] and not part.requests[AnswerChange.CHANGED]:
        return None
    arms = (part.effect.control, part.effect.treatment)
    if all(arm.units >= config.min_units and arm.effective >= config.min_effective for arm in arms):
        return None
    return ThinStratum(
        stratum=part.name,
        traffic=part.traffic,
        units_control=arms[0].units,
        units_treatment=arms[1].units,
        effective=min(arm.effective for arm in arms),
        units_needed=max(_units_needed(arm, config) for arm in arms),
    )


def _units_needed(arm: ArmStats, config: Config) -> int:
    grown = arm.units * config.min_effective / arm.effective if arm.effective else 0.0
    return max(config.min_units, math.ceil(grown))


def _verdict(effect: Effect) -> Verdict:
    if math.isnan(effect.value):
        return "too_few_units"
    return "higher" if effect.look_low > 0 else "lower" if effect.look_high < 0 else "undecided"


def estimate_of(stratum: str, effect: Effect, requests: float) -> EffectEstimate:
    """An Effect for a receipt: null where it is NaN."""
    numbers = {
        "control": effect.control.mean,
        "treatment": effect.treatment.mean,
        "value": effect.value,
        "low": effect.low,
        "high": effect.high,
        "p": effect.p,
        "always_low": effect.look_low,
        "always_high": effect.look_high,
    }
    return EffectEstimate(
        stratum=stratum,
        requests=round(requests),
        units_control=effect.control.units,
        units_treatment=effect.treatment.units,
        effective=min(effect.control.effective, effect.treatment.effective),
        variance_left=effect.variance_left,
        **{name: None if math.isnan(value) else value for name, value in numbers.items()},
    )
