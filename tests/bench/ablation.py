"""What curation is worth, measured: students from raw, filtered, relabelled and right answers, judged on the same human labels.

    python -m tests.bench.ablation --root build/quickstart [--share 0.1] [--reviewed 200] [--student encoder]
    python -m tests.bench.ablation --root build/real/run_snips --task docs/benchmarks/real_data/snips_slots --people

In: a store that a pipeline has left (its teacher's answers, plan and log). Errors are planted in a copy of the answers; a reviewer who
knows the right ones goes through the first rows of the queue. What is right the example data knows, and where the log is people's,
the training split of their labels; with --people these stand in for the teacher's answers too. Out: a table and build/bench/ablation.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa

from headtail.adapters.storage import Storage, open_storage
from headtail.adapters.storage.receipts import load_receipt, output_table
from headtail.core.config import TrackingConfig, build_config
from headtail.core.keys import normalise
from headtail.core.receipt import LATEST, Receipt
from headtail.core.task import Task, load_task
from headtail.examples import example_data
from headtail.review.decision import Decision, current_moment
from headtail.review.log import DecisionLog
from headtail.stages import curate
from headtail.studies import ablate

from . import planted
from .machine import machine
from .suspects import answers_table, asked, put

OUT = Path("build/bench/ablation.json")
OFF = TrackingConfig(enabled=False)
STUDENTS: dict[str, dict[str, Any]] = {
    "decoder": {"epochs": 4},
    "encoder": {
        "student": "encoder",
        "io_format": {"side_inputs": True},
        "lora": None,
        "base": {"model": "", "shape": {"vocabulary": 2048, "hidden": 128, "layers": 2, "heads": 2, "feed_forward": 256, "positions": 128}},
        "epochs": 8,
    },
}


def right_answers(store: Storage, task: Task) -> dict[str, str]:
    """The right answer to queries of a log: to all of the example data, else to those of the training split of people's answers."""
    if not store.exists("example-data/LATEST"):
        table = output_table(store, load_receipt(store, "ingest"), "human_labels_train", ["query", "answer"])
        return dict(zip(table["query"].to_pylist(), table["answer"].to_pylist(), strict=True))
    made = load_receipt(store, "example-data", LATEST, example_data.Result)
    found: dict[str, str] = {}
    for text, meaning, _, _ in asked(made.result.data):
        found.setdefault(normalise(text), task.dump(example_data.right_answers(meaning)[task.name]))
    return found


def reviewed(store: Storage, task: Task, suspects: pa.Table, right: dict[str, str], rows: int) -> dict[str, int]:
    """A person who knows the right answers decides on the first rows of the queue."""
    made, counts = [], {"accept": 0, "correct": 0}
    for row in suspects.slice(0, rows).to_pylist():
        holds = right.get(row["query"])
        if holds is None:
            continue
        verdict = "accept" if holds == row["answer"] else "correct"
        counts[verdict] += 1
        made.append(
            Decision(row["query_key"], row["query"], verdict, holds, row["answer"], row["answer_key"], "bench", current_moment(), "")
        )
    if made:
        DecisionLog(store, task.name).record(made, "page")
    return counts


def one(root: str, task: Task, student: str, share: float, rows: int, seed: int, people: bool) -> dict[str, Any]:
    """Plant, review, ablate, in a copy of what is needed of the store."""
    with tempfile.TemporaryDirectory(prefix="headtail-ablation-") as folder:
        given, plan = open_storage(root), load_receipt(open_storage(root), "plan")
        right = right_answers(given, task)
        store = open_storage(folder)
        shutil.copytree(Path(given.root) / plan.path, Path(folder) / plan.path)
        if people:
            teacher = load_receipt(
                store, "precompute", put(store, "precompute", "answers/shard-00000", _as_taught(given, plan, task, right))
            )
        else:
            teacher = _teacher(given)
            shutil.copytree(Path(given.root) / teacher.path, Path(folder) / teacher.path)
        common = {"root": folder, "tracking": OFF, "task": str(task.folder)}
        spoilt = teacher
        if share:
            spoilt = planted.run(planted.Config.model_validate({**common, "answers": teacher.path, "share": share, "seed": seed}))
        settings: dict[str, Any] = {**common, "answers": spoilt.path, "labels": f"{plan.path}:human_labels"}
        whole = curate.run(curate.Config.model_validate({**settings, "min_gain": 0, "reviews": False}))
        counts = reviewed(store, task, output_table(store, whole, "suspects"), right, rows)
        human = put(store, "human", "training_set", _human(store, curate.Config.model_validate(settings), right))
        config = {
            **settings,
            "human": f"{human}:training_set",
            "curate": {"min_gain": 0, "suspicion": {"drop_above": 0.5}},
            "distill": STUDENTS[student],
        }
        receipt = ablate.run(build_config(ablate.Config, config, "bench"))
        ablation = output_table(store, receipt, "ablation")
        print(markdown(ablation))
        planted_rows = {"planted": spoilt.rows.get("planted", 0), "planted_share": share, "reviewed": counts}
        return {
            "student": student,
            **planted_rows,
            "seconds": receipt.seconds,
            "ablation": output_table(store, receipt, "ablation").to_pylist(),
        }


def markdown(table: pa.Table) -> str:
    """The table for people."""
    made = ["| variant | rows (by people) | stratum | n | quality | minus the first |", "|---|---|---|---|---|---|"]
    for line in table.to_pylist():
        quality = f"{line['quality']:.3f} [{line['low']:.3f}, {line['high']:.3f}]"
        gap = (
            ""
            if line["difference"] is None
            else f"{line['difference']:+.3f} [{line['difference_low']:+.3f}, {line['difference_high']:+.3f}]"
        )
        made.append(
            f"| {line['variant']} | {line['trained_on']:,} ({line['by_people']:,}) | {line['stratum']} | {line['n']} | {quality} | {gap} |"
        )
    return "\n".join(made)


def _human(store: Storage, config: curate.Config, right: dict[str, str]) -> pa.Table:
    """Right answers to the queries of the raw training set: what people would give if they answered all of them."""
    every = config.suspicion.model_copy(update={"drop_above": 1.0})  # hard queries look suspect: without them it would be another set
    raw = config.model_copy(update={"min_confidence": 0.0, "min_gain": 0.0, "reviews": False, "suspicion": every})
    training_set = output_table(store, curate.run(raw), "training_set")
    training_set = training_set.filter(pa.array([query in right for query in training_set["query"].to_pylist()]))
    answers = pa.array([right[query] for query in training_set["query"].to_pylist()], pa.string())
    training_set = training_set.set_column(training_set.schema.get_field_index("answer"), "answer", answers)
    return training_set.set_column(
        training_set.schema.get_field_index("origin"), "origin", pa.array(["human"] * training_set.num_rows, pa.string())
    )


def _as_taught(store: Storage, plan: Receipt, task: Task, right: dict[str, str]) -> pa.Table:
    """People's answers to the queries that the teacher would have answered, as if it always were right."""
    asked = [row for name in ("head", "teacher_sample") for row in output_table(store, plan, name, ["query", "count"]).to_pylist()]
    return answers_table(
        task, [(row["query"], json.loads(right[row["query"]]), row["count"], []) for row in asked if row["query"] in right]
    )


def _teacher(store: Storage) -> Receipt:
    """The teacher's precompute: the one that curate used last, else the latest."""
    if store.exists("curate/LATEST"):
        return load_receipt(store, "precompute", load_receipt(store, "curate").inputs["answers"])
    return load_receipt(store, "precompute")


def main() -> None:
    """One ablation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="build/quickstart")
    parser.add_argument("--task", default="query_segmentation")
    parser.add_argument("--student", choices=sorted(STUDENTS), default="encoder")
    parser.add_argument("--share", type=float, default=0.1, help="of the teacher's answers that are made wrong")
    parser.add_argument("--reviewed", type=int, default=200, help="rows of the queue that are reviewed")
    parser.add_argument("--people", action="store_true", help="people's labels, not the teacher's, are what errors are planted in")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    made = one(given.root, load_task(given.task), given.student, given.share, given.reviewed, given.seed, given.people)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps({"machine": machine(), **made}, indent=2) + "\n")


if __name__ == "__main__":
    main()
