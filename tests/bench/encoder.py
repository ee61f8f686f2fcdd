"""An encoder student beside its teacher: what a row costs end to end, in turn in one run, and what quality is lost where.

    python -m tests.bench.encoder --root build/quickstart --plan plan/ab --student distill/cd --inputs rest gold

In: a store with a finished plan and a distilled student. Out: figures, and with --out a JSON file. Both run `precompute` on the
same rows, through Ray, in a store of their own that holds nothing else, so that nothing is found done or taken over. Seconds per
row are those of the receipts: prompts made and keyed, engine, answers parsed, checked and stored; with and without engine start.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headtail import evaluate, precompute
from headtail.config import TrackingConfig
from headtail.engines import ModelConfig
from headtail.progress import console
from headtail.receipt import Receipt, load_receipt
from headtail.storage import Storage, open_storage

from .machine import machine

OFF = TrackingConfig(enabled=False)
STRATA = ("all", "head", "torso", "tail", "unseen")


def copied(source: Storage, target: Storage, receipts: Sequence[Receipt]) -> None:
    """The files of finished stages, in another store."""
    for receipt in receipts:
        for path in [*(ref.path for ref in receipt.outputs.values()), f"{receipt.path}/receipt.json"]:
            target.replace(path, source.read(path))
        target.replace(f"{receipt.stage}/LATEST", receipt.path.encode())


def turn(root: str, plan: Receipt, models: dict[str, str], task: str, inputs: Sequence[str], cpus: int) -> dict[str, Receipt]:
    """One `precompute` of each model over the same rows in a fresh store, and their evaluation when gold is among the rows."""
    source = open_storage(root)
    with tempfile.TemporaryDirectory(prefix="headtail-bench-") as folder:
        store = open_storage(folder)
        copied(source, store, [plan, *(load_receipt(source, "distill", ref) for ref in models.values() if ref.startswith("distill/"))])
        made = {}
        for name, model in models.items():
            config = precompute.Config(
                root=folder,
                tracking=OFF,
                task=task,
                inputs=tuple(f"{plan.path}:{table}" for table in inputs),
                source="teacher" if name == "teacher" else "student",
                model=ModelConfig(model=model, cpus=cpus),
            )
            made[name] = precompute.run(config)
        if "gold" in inputs:
            answers = {name: receipt.path for name, receipt in made.items()}
            made["evaluation"] = evaluate.run(
                evaluate.Config(root=folder, tracking=OFF, task=task, gold=f"{plan.path}:gold", answers=answers)
            )
        return made


def figures(turns: Sequence[dict[str, Receipt]]) -> dict[str, Any]:
    """Medians over turns: microseconds per row of each model, how many times cheaper the encoder is, quality by stratum, points lost."""
    cost = {name: statistics.median(1e6 * _seconds(one[name], False) for one in turns) for name in ("teacher", "encoder")}
    whole = {name: statistics.median(1e6 * _seconds(one[name], True) for one in turns) for name in ("teacher", "encoder")}
    found: dict[str, Any] = {
        "rows": turns[0]["teacher"].rows["in"],
        "us_per_row": cost,
        "us_per_row_with_start": whole,
        "encoder_cost_ratio": cost["teacher"] / cost["encoder"],
        "encoder_cost_ratio_with_start": whole["teacher"] / whole["encoder"],
        "cost_ratios": [_seconds(one["teacher"], False) / _seconds(one["encoder"], False) for one in turns],
        "engine": turns[0]["encoder"].facts["engine"],
    }
    if "evaluation" in turns[0]:
        quality = turns[0]["evaluation"].metrics
        found["quality"] = {
            tier: {s: quality[f"quality/{tier}/{s}"] for s in STRATA if f"quality/{tier}/{s}" in quality} for tier in ("teacher", "encoder")
        }
        found["encoder_quality_gap"] = 100 * (quality["quality/teacher/all"] - quality["quality/encoder/all"])  # points
    return found


def _seconds(receipt: Receipt, start: bool) -> float:
    """Seconds of a worker per row."""
    return (receipt.metrics["generate_s"] + (receipt.metrics["engine_start_s"] if start else 0.0)) / receipt.rows["in"]


def measure(
    root: str, plan: str, student: str, *, task: str = "query_segmentation", teacher: str = "example:teacher",
    inputs: Sequence[str] = ("rest", "gold"), cpus: int = 2, repeats: int = 1,
) -> dict[str, Any]:  # fmt: skip
    """`figures` of `repeats` turns on the rows of a plan. For bench-distill: encoder_cost_ratio and encoder_quality_gap are among them."""
    store = open_storage(root)
    models = {"teacher": teacher, "encoder": load_receipt(store, "distill", student).path}
    return figures([turn(root, load_receipt(store, "plan", plan), models, task, inputs, cpus) for _ in range(repeats)])


def main() -> None:
    """Measure, show, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True)
    parser.add_argument("--plan", default="latest")
    parser.add_argument("--student", default="latest")
    parser.add_argument("--task", default="query_segmentation")
    parser.add_argument("--teacher", default="example:teacher")
    parser.add_argument("--inputs", nargs="+", default=["rest", "gold"])
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args()
    found = measure(
        given.root, given.plan, given.student, task=given.task, teacher=given.teacher, inputs=given.inputs, cpus=given.cpus,
        repeats=given.repeats,
    )  # fmt: skip
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps({**found, **machine()}, indent=2) + "\n", encoding="utf-8")
    console.print_json(json.dumps(found))


if __name__ == "__main__":
    main()
