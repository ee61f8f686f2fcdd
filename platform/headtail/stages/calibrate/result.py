"""What calibrate gives to a release, and the figures beside it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from headtail.core.calibration import StudentCalibration
from headtail.core.config import Config
from headtail.core.receipt import StageResult

Verdict = Literal["promised", "too_costly", "too_few_labels", "not_right_enough", "no_confidence", "looks_spent"]
VERDICTS: dict[str, str] = {
    "promised": "the target is shown",
    "too_costly": "the target is shown, but escalation would cost more than it may",
    "too_few_labels": "the target is not shown: more labels may show it",
    "not_right_enough": "the target is not shown, and more labels alone will not show it",
    "no_confidence": "no answer to a labelled row has a confidence",
    "looks_spent": "the looks at these labelled rows that the task's policy plans are spent",
}


class EstimatedShare(Config):
    """A share or a difference of shares, with its 95 % interval; null without rows."""

    value: float | None = Field(None, description="the estimate")
    low: float | None = Field(None, description="lower end")
    high: float | None = Field(None, description="upper end")


class CalibrationFigures(Config):
    """How far chances hold on the rows that tested them."""

    ece: float | None = Field(None, description="expected calibration error, 10 bins of equal mass")
    floor: float | None = Field(None, description="what perfect chances would show on so many rows, on average")
    floor_high: float | None = Field(None, description="what perfect chances would exceed in one of 20 draws")


class EscalationFigures(Config):
    """What the threshold keeps and what escalation costs and gains, on the rows that tested it. Without a threshold that was shown: where
    the test began."""

    rows_first: int = Field(ge=0, description="labelled rows that the map and the thresholds to try were made from")
    rows: int = Field(ge=0, description="labelled rows that tested them")
    threshold: float | None = Field(None, description="the lowest confidence at which the target is shown, whatever it costs; null: none")
    precision: EstimatedShare = Field(EstimatedShare(), description="share right among answers from there on")
    escalated: EstimatedShare = Field(EstimatedShare(), description="share of misses below it")
    usd_per_million: float | None = Field(None, description="USD that escalation costs per million misses; null: no price is known")
    before: EstimatedShare = Field(EstimatedShare(), description="share of all misses answered rightly by the student alone")
    after: EstimatedShare = Field(
        EstimatedShare(), description="the same with escalation; null: no answers of a bigger model were evaluated"
    )
    gain: EstimatedShare = Field(EstimatedShare(), description="after minus before, on the same rows")
    labels_needed: int | None = Field(
        None, description="labelled rows in all with which the next look would likely show the target; null: shown, or none"
    )


class Result(StageResult):
    """The calibration that a release takes over, of which student it is, and what it rests on."""

    calibration: StudentCalibration = Field(description="what the release holds and the front uses")
    verdict: Verdict = Field(description="whether something is promised, or why not")
    source: str = Field(description="the answer source of the evaluation that was looked at")
    student: str = Field(description="name of its model")
    digest: str = Field(description="digest of its model's weights")
    own: CalibrationFigures = Field(description="the student's own confidence taken as a chance")
    mapped: CalibrationFigures = Field(description="the same after the map")
    figures: EscalationFigures = Field(description="what the threshold keeps, costs and gains")
    look: int = Field(1, ge=1, description="which different look this is at labelled rows that it shares with earlier ones")
    level: float | None = Field(None, description="the chance of error that this look spends of delta; null: of an earlier version")
