"""The arithmetic of the training benchmark: a figure that is claimed follows from what was measured."""

from __future__ import annotations

from typing import Any

import pytest

from bench.distill import SYSTEMS, rate, summary


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
