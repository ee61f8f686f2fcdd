"""Before the start: the smallest effect that an experiment as long as the log can show, and how long a named effect takes. Pure.

In: units of a log without arms, a Config. Out: PowerEstimates, whole and by stratum. The spread of the log's units is taken for that of
the experiment's, both arms alike. Knows nothing of tables.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np

from headtail.core.rows import ALL
from headtail.stages.experiment.config import Config
from headtail.stages.experiment.effect import Levels, UnitSums, look_factor, single_arm
from headtail.stages.experiment.result import PowerEstimate, Result
from headtail.stages.experiment.units import UnitArrays


def detectable_effects(units: UnitArrays, config: Config) -> Result:
    """All requests, then each stratum; with CUPED where there is a covariate."""
    masks = {ALL: np.ones(len(units.unit), bool)}
    if units.strata != (ALL,):
        masks |= {name: units.of_stratum(name) for name in units.strata}
    return Result(verdict="power", power=tuple(_estimate(name, units.part(mask), config) for name, mask in masks.items()))


def _estimate(name: str, units: UnitSums, config: Config) -> PowerEstimate:
    arm, variance, left = single_arm(units)
    share, requests = config.share, round(float(units.requests.sum()))
    smaller = min(share, 1 - share)
    thin = arm.units * smaller < config.min_units or arm.effective * smaller < config.min_effective
    if arm.units < 2:
        return PowerEstimate(
            stratum=name, units=arm.units, requests=requests, mean=None, detectable=None, always_detectable=None, thin=True
        )
    se = math.sqrt(variance / arm.units * (1 / share + 1 / (1 - share)))
    level, sure = NormalDist().inv_cdf((1 + config.confidence) / 2), NormalDist().inv_cdf(config.power)
    detectable = (level + sure) * se
    return PowerEstimate(
        stratum=name,
        units=arm.units,
        requests=requests,
        mean=arm.mean,
        detectable=detectable,
        always_detectable=(look_factor(arm.units, Levels(config.confidence, config.tight_units)) + sure) * se,
        variance_left=left,
        thin=thin,
        times_as_long=None if config.effect is None else (detectable / config.effect) ** 2,
    )
