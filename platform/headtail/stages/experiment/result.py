"""What an experiment showed: sample ratio, effects by stratum, and the effect on all traffic or why there is none."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from headtail.core.config import Config
from headtail.core.receipt import StageResult

Verdict = Literal["higher", "lower", "undecided", "sample_ratio", "mixed_units", "too_few_units", "power"]
VERDICTS: dict[str, str] = {
    "higher": "the treatment's outcome is higher",
    "lower": "the treatment's outcome is lower",
    "undecided": "no difference is shown",
    "sample_ratio": "no effect is given: the arms do not have the units that were planned",
    "mixed_units": "no effect is given: too many units met both arms",
    "too_few_units": "no effect is given: an arm has fewer than two units whose answers changed",
    "power": "before the start: no arms were compared",
}


class RatioCheck(Config):
    """Units by arm against the planned share."""

    control: int = Field(ge=0, description="units assigned to the control arm")
    treatment: int = Field(ge=0, description="units assigned to the treatment arm")
    share: float = Field(description="planned share of the treatment arm")
    p: float = Field(description="chance of a split as uneven by luck")
    changed_control: int = Field(ge=0, description="control units with a request whose answer changed")
    changed_treatment: int = Field(ge=0, description="the same of the treatment arm")
    changed_p: float = Field(description="chance of that split by luck")
    mixed: int = Field(ge=0, description="units that met both arms; they are in no figure")
    passed: bool = Field(description="whether both splits are as planned")


class EffectEstimate(Config):
    """Treatment minus control, in the outcome's unit per request."""

    stratum: str = Field(description="`all`: every request; `changed`: those whose answer changed; else these of one stratum")
    requests: int = Field(ge=0, description="requests")
    units_control: int = Field(ge=0, description="units in the control arm")
    units_treatment: int = Field(ge=0, description="units in the treatment arm")
    effective: float = Field(description="units that the variance rests on, of the arm with fewer")
    control: float | None = Field(description="outcome per request in the control arm, adjusted by the covariate; null: no request")
    treatment: float | None = Field(description="the same of the treatment arm")
    value: float | None = Field(description="the difference; null: an arm has fewer than two units")
    low: float | None = Field(description="lower end of the interval for one look")
    high: float | None = Field(description="its upper end")
    p: float | None = Field(description="chance of a difference as large without an effect, for one look")
    always_low: float | None = Field(description="lower end of the interval that holds at every look")
    always_high: float | None = Field(description="its upper end")
    variance_left: float = Field(1.0, description="share of the variance that the covariate leaves; 1: no covariate")


class ThinStratum(Config):
    """A stratum that says too little for a figure on all traffic."""

    stratum: str = Field(description="its name")
    traffic: float = Field(description="its share of all traffic")
    units_control: int = Field(ge=0, description="control units whose answers changed")
    units_treatment: int = Field(ge=0, description="the same of the treatment arm")
    effective: float = Field(description="units that the variance rests on, of the arm with fewer")
    units_needed: int = Field(ge=0, description="units that each arm needs, about")


class FullCoverage(Config):
    """The effect if the treatment answered every request, as far as the data show it."""

    estimate: EffectEstimate | None = Field(None, description="null: refused, or there are no strata")
    shares: dict[str, float] = Field({}, description="share of traffic of each stratum that it rests on")
    changes: dict[str, float] = Field({}, description="share of a stratum's covered requests whose answer changes")
    thin: tuple[ThinStratum, ...] = Field((), description="strata for which it was refused")
    left_out: dict[str, float] = Field(
        {}, description="thin strata with less than least_traffic of the traffic: the figure is not for them"
    )


class PowerEstimate(Config):
    """What an experiment as long as the log can detect in one stratum."""

    stratum: str = Field(description="`all`, or a stratum")
    units: int = Field(ge=0, description="units of the log with a request there")
    requests: int = Field(ge=0, description="requests")
    mean: float | None = Field(description="outcome per request; null: no request")
    detectable: float | None = Field(description="smallest effect that one look at the end detects with the wanted power")
    always_detectable: float | None = Field(description="the same for the interval that holds at every look")
    variance_left: float = Field(1.0, description="share of the variance that the covariate leaves; 1: no covariate")
    thin: bool = Field(description="an arm of this stratum would be too thin for a figure on all traffic")
    times_as_long: float | None = Field(None, description="logs of this length that `effect` takes, one look; null: no effect was named")


class Result(StageResult):
    """The verdict and what it rests on."""

    verdict: Verdict = Field(description="by the interval that holds at every look, of the requests whose answer changed")
    ratio: RatioCheck | None = Field(None, description="the sample-ratio check; null in mode power")
    effects: tuple[EffectEstimate, ...] = Field((), description="all, changed, and by stratum; empty when a check failed")
    full: FullCoverage | None = Field(None, description="the effect on all traffic at full coverage; null: not looked for")
    power: tuple[PowerEstimate, ...] = Field((), description="in mode power")
