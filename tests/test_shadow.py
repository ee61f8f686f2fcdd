"""The stage shadow: agreement by release and source with its interval, and a queue of answers that the model does not give."""

from __future__ import annotations

import datetime
import json
from typing import Any

import pyarrow as pa
import pytest

from headtail.adapters.storage import Storage, write_table
from headtail.adapters.storage.receipts import output_table
from headtail.core.config import TrackingConfig
from headtail.core.errors import InputError
from headtail.core.rows import SHADOW
from headtail.core.task import Task
from headtail.review.queue import load_queue
from headtail.stages import shadow
from test_serve import segments

OFF = TrackingConfig(enabled=False)


def row(query: str, agree: bool | None, source: str = "teacher", at: int = 0, **more: Any) -> dict[str, Any]:
    """A row of rows.SHADOW; `at`: minutes."""
    when = datetime.datetime(2031, 1, 31, 12, at, tzinfo=datetime.UTC)
    fields = {"time": when, "request_id": "", "query": query, "release": "a" * 16, "source": source, "cached": source == "teacher"}
    answers = {"answer": json.dumps(segments(query)), "shadow": None if agree is None else json.dumps(segments(query, "name"))}
    score = None if agree is None else 1.0 if agree else 0.25
    rest = {"degraded": False, "confidence": 0.5, "side_inputs": "{}", "model": "m", "state": "answered", "reason": "", "answer_key": ""}
    return {**fields, **answers, **rest, "score": score, "agree": agree, "tokens_in": 1, "tokens_out": 1, "usd": 0.01, **more}


def keep(store: Storage, rows: list[dict[str, Any]], day: str = "2031-01-31") -> None:
    write_table(store, f"shadow/{day}/120000-n-1-1.parquet", pa.Table.from_pylist(rows, schema=SHADOW))


def run(store: Storage, **options: Any) -> Any:
    return shadow.run(shadow.Config(root=store.root, tracking=OFF, **options))


def test_agreement_by_source_and_the_queue(store: Storage, segmentation: Task) -> None:
    same = [row(f"same {n}", True) for n in range(9)]
    mended = [row("mended", False, at=1), row("mended", True, at=2)]  # the last answer is what is served now
    wrong = [row("often wrong", False, "realtime_student", n) for n in range(3)]
    keep(store, [*same, *mended, *wrong, row("once wrong", False, "realtime_student"), row("no answer", None, state="failed")])
    receipt = run(store)
    figures = {one["source"]: one for one in output_table(store, receipt, "agreement").to_pylist()}
    assert (figures["teacher"]["n"], figures["teacher"]["answered"], figures["teacher"]["agree"]) == (12, 11, 10 / 11)
    assert figures["teacher"]["low"] < 10 / 11 < figures["teacher"]["high"] < 1
    assert (figures["realtime_student"]["agree"], figures["realtime_student"]["score"]) == (0.0, 0.25)
    assert receipt.rows == {"in": 16, "compared": 15, "differ": 5, "suspects": 2}
    assert receipt.result.usd == pytest.approx(0.16)
    queue = load_queue(store, f"{receipt.path}:suspects", segmentation)
    assert [(item.query, item.count, item.alternatives) for item in queue.items(range(2))] == [
        ("often wrong", 3, (json.dumps(segments("often wrong", "name")),)),
        ("once wrong", 1, (json.dumps(segments("once wrong", "name")),)),
    ]
    assert run(store).reused
    keep(store, same, "2031-02-01")
    assert run(store).rows["in"] == 25
    assert run(store, since="2031-02-01").rows["in"] == 9


def test_without_rows_it_says_how_they_come(store: Storage) -> None:
    with pytest.raises(InputError, match="no rows of shadow mode"):
        run(store)
