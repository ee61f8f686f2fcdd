"""Arithmetic of the benchmark of students."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from bench.students import copied, figures
from conftest import answered_by, keep
from headtail.adapters.storage import open_storage
from headtail.adapters.storage.receipts import load_receipt, output_table
from headtail.core.receipt import Receipt


def receipt(rows: int, seconds: float, start: float, **metrics: float) -> Receipt:
    made = {"generate_s": seconds, "engine_start_s": start, **metrics}
    return Receipt(
        stage="x",
        fingerprint="f",
        path="x/f",
        started="",
        seconds=1.0,
        rows={"in": rows},
        metrics=made,
        result=answered_by(engine={"engine": "x"}),
    )


def test_the_ratio_is_of_seconds_per_row_by_median() -> None:
    turns = [{"teacher": receipt(100, t, 10), "encoder": receipt(100, e, 2)} for t, e in ((10, 1), (30, 1), (20, 2))]
    found = figures(turns)
    assert found["us_per_row"] == {"teacher": 200_000, "encoder": 10_000}
    assert found["encoder_cost_ratio"] == pytest.approx(20)
    assert found["encoder_cost_ratio_with_start"] == pytest.approx(10)
    assert found["encoder_cost_ratios"] == pytest.approx([10, 30, 10])
    assert "quality" not in found


def test_points_lost_are_those_of_all_labels() -> None:
    quality = {"quality/teacher/all": 0.968, "quality/encoder/all": 0.955, "quality/teacher/tail": 0.9}
    turn = {"teacher": receipt(1, 1, 0), "encoder": receipt(1, 1, 0), "evaluation": receipt(1, 1, 0, **quality)}
    found = figures([turn])
    assert found["encoder_quality_gap"] == pytest.approx(1.3)
    assert found["quality"] == {"teacher": {"all": 0.968, "tail": 0.9}, "encoder": {"all": 0.955}}


def test_stages_are_copied_whole_and_the_source_is_left_alone(root: str, tmp_path: Path) -> None:
    source, target = open_storage(root), open_storage(str(tmp_path / "other"))
    made = keep(source, "plan", "ab" * 8, {"human_labels": pa.table({"a": [1]})})
    copied(source, target, [made])
    for store in (source, target):
        assert output_table(store, load_receipt(store, "plan"), "human_labels")["a"].to_pylist() == [1]
