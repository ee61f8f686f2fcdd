"""Confidence made a chance: the map never falls, holds on fresh rows, and its error is read beside what luck alone would show."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from headtail.core.calibration import CalibrationError, ConfidenceMap, StudentCalibration, calibration_error, fit_map
from headtail.core.record import parse_record


def rows(n: int, seed: int, power: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """Confidences that promise too much: an answer of confidence c is right with chance c ** power."""
    draw = np.random.default_rng(seed)
    confidence = draw.random(n)
    return confidence, draw.random(n) < confidence**power


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=300), st.lists(st.floats(0, 1), min_size=2, max_size=20))
@example([(0.75, True), (0.6875, False)], [0.0, 1.0])
def test_a_map_never_falls_and_stays_a_chance(made: list[tuple[float, bool]], asked: list[float]) -> None:
    confidence, right = np.array([x for x, _ in made]), np.array([y for _, y in made])
    found = fit_map(confidence, right)
    assert found is not None
    chances = found.apply_all(np.sort(asked))
    assert np.all(np.diff(chances) >= -1e-12)
    assert np.all((chances > 0) & (chances < 1)), "no number of rows shows that an answer is always right"


@pytest.mark.parametrize("n, method", [(150, "platt"), (2000, "isotonic")])
def test_a_map_is_right_on_rows_that_it_has_not_seen(n: int, method: str) -> None:
    found = fit_map(*rows(n, 0))
    assert found is not None
    assert found.method == method
    confidence, right = rows(4000, 1)
    before, after = calibration_error(confidence, right), calibration_error(found.apply_all(confidence), right)
    assert before.ece > 0.2
    assert after.ece < (0.05 if method == "isotonic" else 0.1)
    at = np.linspace(0.2, 0.95, 20)
    assert np.abs(found.apply_all(at) - at**3).mean() < (0.04 if method == "isotonic" else 0.1)


def test_confidence_that_is_the_wrong_way_round_becomes_one_chance_for_all() -> None:
    confidence, right = rows(120, 2)
    found = fit_map(1 - confidence, right)
    assert found is not None
    assert (found.method, found.slope) == ("platt", 0.0)
    many, right = rows(3000, 2)
    flat = fit_map(1 - many, right)
    assert flat is not None
    assert np.ptp(flat.apply_all(np.linspace(0, 1, 50))) < 0.05


def test_rows_of_one_kind_and_no_rows() -> None:
    found = fit_map(np.full(50, 0.7), np.ones(50, dtype=bool))
    assert found is not None
    assert 0.9 < found.apply(0.7) < 1
    assert fit_map(np.empty(0), np.empty(0, dtype=bool)) is None
    assert calibration_error(np.empty(0), np.empty(0, dtype=bool)).bins == []


def test_the_noise_floor_is_what_perfect_chances_show() -> None:
    """Perfectly calibrated chances lie at the floor on average, and above its upper end once in twenty; a wrong map lies far above."""
    draw, found = np.random.default_rng(3), list[CalibrationError]()
    for seed in range(200):
        chance = draw.random(300)
        found.append(calibration_error(chance, draw.random(300) < chance, resamples=200, seed=seed))
    assert abs(np.mean([one.ece - one.floor for one in found])) < 0.003
    assert 0.01 < np.mean([one.ece > one.floor_high for one in found]) < 0.12
    confidence, right = rows(300, 4)
    wrong = calibration_error(confidence, right)
    assert wrong.ece > 2 * wrong.floor_high
    assert sum(one.n for one in wrong.bins) == 300
    assert all(one.low <= one.right <= one.high for one in wrong.bins)


def test_what_a_release_keeps_survives_json_and_compares_as_tables_store() -> None:
    knots = ((0.25, 0.5), (0.75, 1.0))
    kept = StudentCalibration(
        receipt="calibrate/a1", map=ConfidenceMap(method="isotonic", knots=knots), target=0.9, delta=0.05, threshold=float(np.float32(0.9))
    )
    again = parse_record(StudentCalibration, kept.model_dump_json().encode(), "x")
    assert again == kept
    assert [again.map.apply(x) for x in (0.0, 0.25, 0.5, 0.9)] == [0.5, 0.5, 0.75, 1.0] if again.map else False
    assert again.is_sure(0.9), "the live number has 64 bits, the threshold was read from a table of 32"
    assert not again.is_sure(0.8999)
    assert not again.is_sure(None)
    assert not kept.model_copy(update={"threshold": None}).is_sure(1.0)
    assert math.isclose(ConfidenceMap(method="platt", slope=2.0, intercept=0.0).apply(0.5), 0.5)
