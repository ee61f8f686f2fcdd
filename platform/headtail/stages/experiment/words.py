"""An experiment's result in sentences, for the terminal and the receipt's notes. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from headtail.stages.experiment.config import Config
from headtail.stages.experiment.result import VERDICTS, EffectEstimate, FullCoverage, PowerEstimate, RatioCheck, Result


def experiment_words(result: Result, config: Config) -> Iterator[str]:
    """What was found, in sentences."""
    yield VERDICTS[result.verdict]
    if result.ratio is not None:
        yield _ratio_words(result.ratio)
    for effect in result.effects:
        yield f"{effect.stratum}: {_effect_words(effect, config)}"
    if result.full is not None and result.verdict not in ("sample_ratio", "mixed_units"):
        yield from _full_words(result.full, config)
    for power in result.power:
        yield _power_words(power, config)


def _ratio_words(ratio: RatioCheck) -> str:
    split = f"{ratio.control:,} control and {ratio.treatment:,} treatment units, planned share {ratio.share:g}: p = {ratio.p:.2g}"
    changed = f"with changed answers {ratio.changed_control:,} and {ratio.changed_treatment:,}: p = {ratio.changed_p:.2g}"
    mixed = f"; {ratio.mixed:,} units met both arms and are left out" if ratio.mixed else ""
    return f"sample ratio {'as planned' if ratio.passed else 'NOT as planned'}: {split}; {changed}{mixed}"


def _effect_words(effect: EffectEstimate, config: Config) -> str:
    units = f"{effect.units_control:,} and {effect.units_treatment:,} units"
    if effect.value is None:
        return f"no effect: {units}"
    cuped = f"; the covariate leaves {effect.variance_left:.0%} of the variance" if effect.variance_left < 1 else ""
    return (
        f"{effect.value:+.4g} ({effect.low:+.4g} to {effect.high:+.4g} for one look, {effect.always_low:+.4g} to {effect.always_high:+.4g} "
        f"at every look; {config.confidence:.0%}) from {effect.control:.4g}, {units}{cuped}"
    )


def _full_words(full: FullCoverage, config: Config) -> Iterator[str]:
    if full.estimate is not None:
        yield f"all traffic at full coverage: {_effect_words(full.estimate, config)}"
    for one in full.thin:
        yield (
            f"no figure for all traffic: {one.stratum} has {one.traffic:.1%} of the traffic, and {one.units_control:,} and "
            f"{one.units_treatment:,} units with changed answers; each arm needs about {one.units_needed:,}"
        )
    for name, share in full.left_out.items():
        yield f"the figure for all traffic is not for {name}: too few units, {share:.1%} of the traffic"


def _power_words(power: PowerEstimate, config: Config) -> str:
    if power.detectable is None or power.always_detectable is None or power.mean is None:
        return f"{power.stratum}: {power.units:,} units are too few"
    thin = "; too thin for a figure on all traffic" if power.thin else ""
    longer = "" if power.times_as_long is None else f"; {config.effect:g} takes {power.times_as_long:.2g} times as long"
    return (
        f"{power.stratum}: mean {power.mean:.4g}, {power.units:,} units; detects {power.detectable:.4g} with chance {config.power:g} at "
        f"one look, {power.always_detectable:.4g} at any{longer}{thin}"
    )
