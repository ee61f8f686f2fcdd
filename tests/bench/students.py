"""Students beside their teacher: what a row costs end to end, in turn in one run, and what quality is lost where.

    python -m tests.bench.students --root build/quickstart                     the students of that store's current release and loop
    python -m tests.bench.students --root ROOT --student decoder=distill/ab --student encoder=distill/cd --inputs student_rows human_labels
    python -m tests.bench.students --root ROOT --student code=distill/ab --engine code=transformers

In: a store with a finished plan and distilled students. Out: figures, and with --out a JSON file. All run `precompute` on the
same rows, through Ray, in a store of their own that holds nothing else, so that nothing is found done or taken over. Seconds per
row are those of the receipts: prompts made and keyed, engine, answers parsed, checked and stored; with and without engine start.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from headtail.adapters.progress import console
from headtail.adapters.storage import Storage, open_storage
from headtail.adapters.storage.receipts import load_receipt
from headtail.core import io_format
from headtail.core.config import TrackingConfig
from headtail.core.receipt import Receipt
from headtail.engines import ModelConfig
from headtail.engines.models import find_model
from headtail.stages import evaluate, precompute

from .machine import machine

OFF = TrackingConfig(enabled=False)
STRATA = ("all", "head", "torso", "tail", "unseen")
TEACHER = "teacher"


def copied(source: Storage, target: Storage, receipts: Sequence[Receipt]) -> None:
    """The files of finished stages, in another store."""
    for receipt in receipts:
        for path in [*(ref.path for ref in receipt.outputs.values()), f"{receipt.path}/receipt.json"]:
            target.replace(path, source.read(path))
        target.replace(f"{receipt.stage}/LATEST", receipt.path.encode())


def turn(
    root: str, plan: Receipt, models: Mapping[str, str], task: str, inputs: Sequence[str], cpus: int, engines: Mapping[str, str]
) -> dict[str, Receipt[Any]]:
    """One `precompute` of each model over the same rows in a fresh store, and their evaluation when human labels are among the rows."""
    source = open_storage(root)
    with tempfile.TemporaryDirectory(prefix="headtail-bench-") as folder:
        store = open_storage(folder)
        copied(source, store, [plan, *(load_receipt(source, "distill", ref) for ref in models.values() if ref.startswith("distill/"))])
        made: dict[str, Receipt[Any]] = {}
        for name, model in models.items():
            config = precompute.Config(
                root=folder,
                tracking=OFF,
                task=task,
                inputs=tuple(f"{plan.path}:{table}" for table in inputs),
                source=TEACHER if name == TEACHER else "batch_student",
                model=ModelConfig.model_validate({"model": model, "cpus": cpus, "engine": engines.get(name, "vllm")}),
            )
            made[name] = precompute.run(config)
        if "human_labels" in inputs:
            answers = {name: receipt.path for name, receipt in made.items()}
            made["evaluation"] = evaluate.run(
                evaluate.Config(root=folder, tracking=OFF, task=task, labels=f"{plan.path}:human_labels", answers=answers)
            )
        return made


def figures(turns: Sequence[Mapping[str, Receipt[Any]]]) -> dict[str, Any]:
    """Medians over turns: microseconds per row of each model, how many times cheaper each student is, quality by stratum, points lost."""
    names = [name for name in turns[0] if name != "evaluation"]
    cost = {name: statistics.median(1e6 * _seconds(one[name], False) for one in turns) for name in names}
    whole = {name: statistics.median(1e6 * _seconds(one[name], True) for one in turns) for name in names}
    told = ("tokens_in_per_row", "tokens_out_per_row")
    found: dict[str, Any] = {
        "rows": turns[0][TEACHER].rows["in"],
        "us_per_row": cost,
        "us_per_row_with_start": whole,
        "tokens_per_row": {name: [turns[0][name].metrics.get(key) for key in told] for name in names},
        "engines": {name: turns[0][name].result.engine for name in names},
    }
    for name in names:
        if name != TEACHER:
            found[f"{name}_cost_ratio"] = cost[TEACHER] / cost[name]
            found[f"{name}_cost_ratio_with_start"] = whole[TEACHER] / whole[name]
            found[f"{name}_cost_ratios"] = [_seconds(one[TEACHER], False) / _seconds(one[name], False) for one in turns]
    if "evaluation" in turns[0]:
        quality = turns[0]["evaluation"].metrics
        found["quality"] = {name: {s: quality[f"quality/{name}/{s}"] for s in STRATA if f"quality/{name}/{s}" in quality} for name in names}
        for name in names:
            if name != TEACHER:
                found[f"{name}_quality_gap"] = 100 * (quality[f"quality/{TEACHER}/all"] - quality[f"quality/{name}/all"])  # points
    return found


def _seconds(receipt: Receipt, start: bool) -> float:
    """Seconds of a worker per row."""
    return (receipt.metrics["generate_s"] + (receipt.metrics["engine_start_s"] if start else 0.0)) / receipt.rows["in"]


def measure(
    root: str, students: Mapping[str, str], *, plan: str = "latest", task: str = "query_segmentation", teacher: str = "example:teacher",
    inputs: Sequence[str] = ("student_rows", "human_labels"), cpus: int = 2, engines: Mapping[str, str] | None = None, repeats: int = 1,
) -> dict[str, Any]:  # fmt: skip
    """`figures` of `repeats` turns on the rows of a plan."""
    store = open_storage(root)
    models = {TEACHER: teacher} | {name: load_receipt(store, "distill", ref).path for name, ref in students.items()}
    return figures([turn(root, load_receipt(store, "plan", plan), models, task, inputs, cpus, engines or {}) for _ in range(repeats)])


def students_of(root: str) -> dict[str, str]:
    """The newest student of each kind in a store: kind -> distill/<fingerprint>."""
    store, found = open_storage(root), {}
    receipts = [load_receipt(store, "distill", f"distill/{folder.name}") for folder in sorted(Path(root, "distill").glob("?*/"))]
    for receipt in sorted(receipts, key=lambda receipt: receipt.started):
        kind = io_format.read_format(Path(find_model(ModelConfig(model=receipt.path), store).path)).kind
        found[str(kind)] = receipt.path
    return found


def show(found: Mapping[str, Any]) -> None:
    """The figures as two tables: cost, quality."""
    cost = Table("model", "engine", "us/row", "with start", "cheaper", "tokens in", "out")
    quality = Table("quality", *STRATA)
    for name, us in found["us_per_row"].items():
        ratio, tokens = found.get(f"{name}_cost_ratio"), found["tokens_per_row"][name]
        cost.add_row(
            name,
            found["engines"][name]["engine"],
            f"{us:,.0f}",
            f"{found['us_per_row_with_start'][name]:,.0f}",
            "" if ratio is None else f"{ratio:.1f}",
            *("" if count is None else f"{count:.1f}" for count in tokens),
        )
        reached = found.get("quality", {}).get(name, {})
        quality.add_row(name, *(f"{reached[s]:.3f}" if s in reached else "" for s in STRATA))
    console.print(cost)
    if "quality" in found:
        console.print(quality)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that say which students of which store are measured on which rows."""
    parser.add_argument("--dry-run", default="latest")
    parser.add_argument("--student", action="append", default=[], help="name=distill/<fingerprint>; default: the newest of each kind")
    parser.add_argument("--engine", action="append", default=[], help="name=engine, of a student or of teacher; default: vllm")
    parser.add_argument("--task", default="query_segmentation")
    parser.add_argument("--teacher", default="example:teacher")
    parser.add_argument("--inputs", nargs="+", default=["student_rows", "human_labels"])
    parser.add_argument("--cpus", type=int, default=2)


def measured(given: argparse.Namespace, repeats: int) -> dict[str, Any]:
    """`measure` as the flags say."""
    named = dict(text.split("=", 1) for text in given.student) or students_of(given.root)
    asked = {name: getattr(given, name) for name in ("plan", "task", "teacher", "inputs", "cpus")}
    engines = dict(text.split("=", 1) for text in given.engine)
    if unknown := set(engines) - {TEACHER, *named}:
        raise SystemExit(f"--engine: no student is called {', '.join(sorted(unknown))}; there are {', '.join([TEACHER, *named])}")
    return {**measure(given.root, named, **asked, engines=engines, repeats=repeats), "students": named}


def main() -> None:
    """Measure, show, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None)
    add_flags(parser)
    given = parser.parse_args()
    found = measured(given, given.repeats)
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps({**found, **machine()}, indent=2) + "\n", encoding="utf-8")
    show(found)


if __name__ == "__main__":
    main()
