"""A label's design: read as people write it, thinned with the labels, and what it says of a query's chance to be drawn."""

from __future__ import annotations

import numpy as np
import pytest

from headtail.core.label_design import inclusion_chances, resolve_design, thin_design


@pytest.mark.parametrize(
    "design, inclusion, read",
    [
        ("", "", ("unknown", None)),
        (" Even ", "", ("even", None)),
        ("", "0.25", ("by_probability", 0.25)),
        ("by_traffic", "1e-3", ("by_traffic", 0.001)),
        ("census", "", ("census", 1.0)),
        ("", "NaN", ("unknown", None)),
        ("unknown", "0.5", ("unknown", 0.5)),
    ],
)
def test_reads_what_people_write(design: str, inclusion: str, read: tuple[str, float | None]) -> None:
    assert resolve_design(design, inclusion, "unknown") == (*read, "")


@pytest.mark.parametrize(
    "design, inclusion", [("random", ""), ("even", "0"), ("", "1.5"), ("", "half"), ("by_probability", ""), ("", "-inf")]
)
def test_says_what_is_wrong(design: str, inclusion: str) -> None:
    assert resolve_design(design, inclusion, "unknown")[2]


def test_a_label_without_a_design_takes_the_settings() -> None:
    assert resolve_design("", "", "even")[0] == "even"


def test_a_census_that_was_thinned_is_none() -> None:
    assert thin_design("census", 1.0, 0.3) == ("by_probability", 0.3)
    assert thin_design("by_traffic", 0.5, 0.5) == ("by_traffic", 0.25)
    assert thin_design("even", None, 0.3) == ("even", None)


def test_chances() -> None:
    nan = float("nan")
    found = inclusion_chances(
        ["even", "by_traffic", "by_probability", "unknown", None],
        np.array([nan, nan, 0.7, 0.7, nan]),
        np.array([1.0, 100.0, 1.0, 1.0, 1.0]),
        1000,
        np.full(5, 0.2),
    )
    assert found[:3] == pytest.approx([0.2, 1 - np.exp(-0.1), 0.7])
    assert np.isnan(found[3:]).all()
