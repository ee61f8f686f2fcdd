"""The evaluation as one JSON document in the manner of HELM, for programs and for a release's evidence.

In: scored answer sources and the receipts of their answers. Out: per answer source a model, a prompt and its metrics per slice, with n,
interval and how it was made. Computes nothing that evaluate's tables do not hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from headtail.core.receipt import Receipt
from headtail.core.rows import ALL, STRATA
from headtail.core.task import Task
from headtail.stages.base import versions
from headtail.stages.evaluate.scoring import Calibration, ScoredSource, Sureness, exact_of, interval_json
from headtail.stages.precompute.result import Result as PrecomputeResult


def document(
    sure: Sureness,
    task: Task,
    labels: str,
    receipts: Mapping[str, Receipt[PrecomputeResult]],
    scored: Sequence[ScoredSource],
    quality: pa.Table,
    calibrated: Mapping[str, Calibration],
    gaps: Sequence[Mapping[str, Any]],
    notes: Sequence[str],
) -> dict[str, Any]:
    """The whole document; `human_labels` is the table reference that the labelled rows came from."""
    runs = []
    for s in scored:
        receipt, held = receipts.get(s.source), calibrated.get(s.source)
        model = receipt.result.model.model_dump() if receipt else {"name": "the task's fallback; no model"}
        run: dict[str, Any] = {"source": s.source, "model": model, "answers": receipt.path if receipt else ""}
        run["prompt_fingerprint"] = receipt.task_fingerprint if receipt else ""
        run["metrics"] = list(_metrics(s, quality, held, sure))
        run["reliability"] = [b._asdict() for b in held.bins] if held else []
        runs.append({**run, "versions": receipt.versions if receipt else {}})
    return {
        "format": "headtail-evaluation/1",
        "task": {
            "name": task.name,
            "description": task.file.description,
            "fingerprint": task.fingerprint,
            "score": task.file.score.model_dump(),
        },
        "human_labels": {"ref": labels, "n": len(scored[0].tp)},
        "interval": {**sure._asdict(), "unit": "labelled row"},
        "runs": runs,
        "differences": list(gaps),
        "versions": versions(),
        "notes": list(notes),
    }


def _metrics(s: ScoredSource, quality: pa.Table, calibration: Calibration | None, sure: Sureness) -> Iterator[dict[str, Any]]:
    for q in quality.filter(pc.equal(quality["source"], s.source)).to_pylist():
        figures = {"value": q["quality"], "low": q["low"], "high": q["high"], "method": q["method"], "effective_n": q["effective"]}
        yield {"name": "micro_f1", "split": q["stratum"], "n": q["n"], "answered": q["answered"], **figures}
    for name in (*STRATA, ALL):
        if s.where(name).any():
            yield {"name": "exact_match", "split": name, **interval_json(exact_of(s, name, sure))}
    for name, value in (
        (
            ("ece_15_equal_mass_bins", calibration.ece),
            ("ece_noise_floor", calibration.floor),
            ("auroc_confidence_vs_exact_match", calibration.auroc),
        )
        if calibration
        else ()
    ):
        if calibration and value == value:
            yield {"name": name, "split": ALL, "n": calibration.n, "value": value}
