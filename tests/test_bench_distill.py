"""The arithmetic of the training benchmark: a figure that is claimed follows from what was measured."""

from __future__ import annotations

from typing import Any

import pytest

from bench.distill import SYSTEMS, rate, students, summary
from headtail.receipt import Receipt


def receipt(stage: str, **metrics: float) -> Receipt:
    started = "2030-01-01T00:00:00+00:00"
    return Receipt(stage=stage, fingerprint="f" * 16, path=f"{stage}/f", started=started, seconds=1.0, metrics=metrics)


def test_the_first_steps_are_charged_to_nobody() -> None:
    steps = [float(i) for i in range(1, 101)]
    for start in (1, 40):
        seconds = [start + 0.1 * step for step in steps]
        assert rate(steps, seconds, 16) == pytest.approx(160)
    warming = [10 + step if step < 10 else 20 + 0.1 * step for step in steps]
    assert rate(steps, warming, 16) == pytest.approx(160)


def test_ratios_are_of_medians() -> None:
    speeds = {"headtail": (90, 120, 10), "trainer": (100, 60, 75), "trainer-grouped": (100, 100, 1)}
    runs: list[dict[str, Any]] = [
        {"system": s, "rows_per_s": speed, "real_token_share": 0.9 if s == "trainer" else 0.97} for s in SYSTEMS for speed in speeds[s]
    ]
    found = summary(runs)
    assert found["throughput_vs_trainer"] == pytest.approx(90 / 75)
    assert found["throughput_vs_trainer_grouped"] == pytest.approx(0.9)
    assert found["real_token_share"] == 0.97


def test_a_missing_receipt_is_null_not_a_guess() -> None:
    assert set(students({}, None).values()) == {None}
    teacher = receipt("precompute", rows_per_s=10, tokens_in_per_row=200, tokens_out_per_row=40)
    decoder = receipt("precompute", rows_per_s=55, tokens_in_per_row=9, tokens_out_per_row=7)
    scored = receipt("evaluate", **{"quality/teacher/all": 0.95, "quality/decoder/all": 0.94})
    found = students({"teacher": teacher, "decoder": decoder}, scored)
    assert found["decoder_cost_ratio"] == 5.5
    assert found["decoder_quality_gap"] == pytest.approx(1.0)
    assert found["encoder_cost_ratio"] is found["encoder_quality_gap"] is None
    assert (found["teacher_tokens_per_row"], found["decoder_tokens_per_row"]) == ([200, 40], [9, 7])
