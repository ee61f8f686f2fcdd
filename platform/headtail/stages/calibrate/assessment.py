"""From labelled rows to a calibration, a threshold and what escalation costs and gains. Pure.

In: rows in two halves, a policy. Out: an Assessment. The first half makes the map and the thresholds to try; the second half tests both, so
nothing is judged on the rows that made it. Knows nothing of tables, receipts or charts.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from headtail.core.calibration import CalibrationError, ConfidenceMap, calibration_error, fit_map
from headtail.core.intervals import Array
from headtail.core.threshold import LEVELS, LabelledRows, ShareInterval, ThresholdChoice, choose_threshold, escalation_gain, labels_needed
from headtail.stages.calibrate.result import CalibrationFigures, EscalationFigures, EstimatedShare, Verdict


class ConfidenceRows(NamedTuple):
    """Labelled rows of one student: confidence (NaN: none), whether it is right, whether a bigger model is right (None: not known), and
    which rows are of the first half."""

    confidence: Array
    right: npt.NDArray[np.bool_]
    bigger: npt.NDArray[np.bool_] | None
    first: npt.NDArray[np.bool_]

    def half(self, first: bool) -> LabelledRows:
        """The rows of one half."""
        inside = self.first == first
        return LabelledRows(self.confidence[inside], self.right[inside])


class PromisePolicy(NamedTuple):
    """What is to be promised. `level`: the chance of error that this look may spend, `after` the next one (0: there is none); prices in USD
    per million."""

    target: float
    level: float
    after: float
    usd_per_million: float | None
    max_usd_per_million: float | None
    power: float


class Assessment(NamedTuple):
    """What was found. `threshold`: None unless the verdict is promised."""

    map: ConfidenceMap | None
    threshold: float | None
    verdict: Verdict
    own: CalibrationError
    mapped: CalibrationError
    choice: ThresholdChoice
    figures: EscalationFigures


def assess_confidence(rows: ConfidenceRows, policy: PromisePolicy) -> Assessment:
    """The map, the threshold and the figures."""
    first, second = rows.half(True), rows.half(False)
    choice = choose_threshold(first, second, policy.target, policy.level)
    known = ~np.isnan(second.confidence)
    confidence, right = second.confidence[known], second.right[known]
    made = ~np.isnan(first.confidence)
    found = fit_map(first.confidence[made], first.right[made])
    own = calibration_error(confidence, right)
    mapped = calibration_error(found.apply_all(confidence) if found is not None else confidence, right)
    needed = None
    if choice.threshold is None and policy.after:  # with more labels one looks again
        needed = labels_needed(first, second, policy.target, policy.after, policy.power)
    figures = _figures(rows, choice, policy, needed)
    verdict = _verdict(choice, figures, policy) if policy.level else "looks_spent"
    return Assessment(found, choice.threshold if verdict == "promised" else None, verdict, own, mapped, choice, figures)


def calibration_figures(found: CalibrationError) -> CalibrationFigures:
    """The same for a receipt; null without rows."""
    return CalibrationFigures(ece=found.ece, floor=found.floor, floor_high=found.floor_high) if found.n else CalibrationFigures()


def _verdict(choice: ThresholdChoice, figures: EscalationFigures, policy: PromisePolicy) -> Verdict:
    if choice.threshold is None:
        if choice.begin is None:
            return "no_confidence"
        return "not_right_enough" if figures.labels_needed is None else "too_few_labels"
    usd, most = figures.usd_per_million, policy.max_usd_per_million
    return "too_costly" if most is not None and (usd is None or usd > most) else "promised"


def _figures(rows: ConfidenceRows, choice: ThresholdChoice, policy: PromisePolicy, needed: int | None) -> EscalationFigures:
    second, at = rows.half(False), choice.threshold if choice.threshold is not None else choice.begin
    base = EscalationFigures(rows_first=int(rows.first.sum()), rows=len(second.right), threshold=choice.threshold, labels_needed=needed)
    if at is None or not base.rows:
        return base
    bigger = rows.bigger[~rows.first] if rows.bigger is not None else None
    gain = escalation_gain(second, bigger if bigger is not None else second.right, at, LEVELS)
    escalated = 1 - choice.kept.value
    return base.model_copy(
        update={
            "precision": _estimate(choice.precision),
            "escalated": EstimatedShare(value=escalated, low=1 - choice.kept.high, high=1 - choice.kept.low),
            "usd_per_million": None if policy.usd_per_million is None else escalated * policy.usd_per_million,
            "before": _estimate(gain.before),
            "after": _estimate(gain.after) if bigger is not None else EstimatedShare(),
            "gain": _estimate(gain.difference) if bigger is not None else EstimatedShare(),
        }
    )


def _estimate(found: ShareInterval) -> EstimatedShare:
    return EstimatedShare() if found.value != found.value else EstimatedShare(value=found.value, low=found.low, high=found.high)
