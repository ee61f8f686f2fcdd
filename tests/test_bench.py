"""The arithmetic of the benchmarks: a figure that is claimed follows from what was measured."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from bench.precompute import rate, summary
from bench.scale import fit, plan_of
from bench.turns import in_turn


def run(system: str, start: float, rows_per_s: float, **facts: float) -> dict[str, Any]:
    """A run that took `start` seconds to begin and then went at a steady pace."""
    seconds = {str(rows): start + rows / rows_per_s for rows in (1000, 9000)}
    return {"system": system, "seconds": seconds, "said": [{"facts": facts}] if facts else []}


def test_starting_up_is_charged_to_nobody() -> None:
    assert rate(run("raw", 0, 500)["seconds"]) == pytest.approx(500)
    assert rate(run("headtail", 25, 500)["seconds"]) == pytest.approx(500)
    with pytest.raises(ValueError, match="took no longer"):
        rate({"1000": 9.0, "9000": 9.0})


def test_ratios_are_of_medians() -> None:
    runs = [run("raw", 3, speed) for speed in (500, 400, 100)]
    runs += [run("raw-plain", 3, 500), run("ray-data-llm", 30, 200)]
    runs += [run("headtail", 20, speed, engine_rows=speed, occupancy=speed / 1000) for speed in (380, 900, 300)]
    found = summary(runs, {"constrained": [90, 80, 10], "free": [100, 100, 300]}, {"overhead_us_per_row": 30.0})
    assert found["ratio_vs_raw_generate"] == pytest.approx(0.95)
    assert found["ratio_vs_raw_without_logprobs"] == pytest.approx(0.76)
    assert found["ratio_vs_ray_data_llm"] == pytest.approx(1.9)
    assert found["constrained_over_free"] == pytest.approx(0.8)
    assert found["overhead_us_per_row"] == 30.0
    assert found["occupancy"] == 0.9  # of the run that answered most


def test_the_slope_of_a_line() -> None:
    found = fit([1e6, 5e6, 20e6], [12 + rows * 30e-6 for rows in (1e6, 5e6, 20e6)])
    assert found["slope_us_per_row"] == pytest.approx(30)
    assert found["intercept_s"] == pytest.approx(12)
    assert found["r2"] == pytest.approx(1)
    assert fit([1.0, 2.0, 3.0], [1.0, 9.0, 2.0])["r2"] < 0.1


def test_the_plan_has_as_many_rows_as_asked() -> None:
    assert sum(table.num_rows for table in plan_of(100_001)) == 100_001


def test_systems_take_turns_and_what_is_no_json_is_no_figure() -> None:
    code = "import sys; print({'train': 1}); print('{\"a\": 1}'); print('{\"b\": \"' + sys.argv[1] + '\"}')"
    runs = in_turn(("x", "y"), 2, lambda system: [sys.executable, "-c", code, system])
    assert [run["system"] for run in runs] == ["x", "y", "y", "x"]
    assert runs[0] == {"system": "x", "b": "x", "said": [{"a": 1}]}
    with pytest.raises(SystemExit, match="ZeroDivisionError"):
        in_turn(("x",), 1, lambda system: [sys.executable, "-c", "1 / 0"])
