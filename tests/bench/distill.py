"""headtail's training loop beside a plain Hugging Face Trainer: same data, model, batch, precision and threads, in turn in one run.

    python -m tests.bench.distill                               some 5 minutes on 2 cores
    python -m tests.bench.distill --root build/quickstart       with what its students cost and lose (tests.bench.students)

In: nothing but this checkout, or a store with students. Out: a table and build/bench/distill.json. Rows per second are of the
steady state: the first steps of each run are left out. The plain Trainer draws rows at random and pads to the longest of a
batch; `trainer-grouped` is the same with its own grouping by length, the stronger rival. Every run is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from headtail.adapters.progress import console

from . import students
from .machine import machine
from .turns import in_turn

OUT = Path("build/bench/distill.json")
SYSTEMS = ("headtail", "trainer", "trainer-grouped")
CLAIMED = ("decoder_cost_ratio", "encoder_cost_ratio", "decoder_quality_gap", "encoder_quality_gap")
SKIPPED = 0.2  # share of a run's steps that come before its steady state
RATE = 1e-3


class Setting(NamedTuple):
    """What all systems share."""

    folder: str  # store with the rows
    training_set: str  # table ref
    rows: int
    batch: int
    threads: int
    precision: str
    model: str


def rate(steps: list[float], seconds: list[float], rows_per_step: float) -> float:
    """Rows per second between the first step after the start and the last."""
    first = next(i for i, step in enumerate(steps) if step >= SKIPPED * steps[-1])
    return (steps[-1] - steps[first]) * rows_per_step / (seconds[-1] - seconds[first])


def headtail_turn(setting: Setting) -> dict[str, Any]:
    """One epoch through `distill`: Ray Train, DeepSpeed, one worker."""
    from headtail.adapters.storage import open_storage
    from headtail.core.config import TrackingConfig
    from headtail.stages import distill
    from headtail.stages.distill.base import BaseModelConfig

    sets = (distill.TrainingSet(training_set=setting.training_set, rows=setting.rows),)
    config = distill.Config(
        root=setting.folder,
        tracking=TrackingConfig(enabled=False),
        sets=sets,
        labels=(),
        base=BaseModelConfig(model=setting.model),
        lora=None,
        epochs=1,
        batch_rows=setting.batch,
        learning_rate=RATE,
        precision="bf16" if setting.precision == "bf16" else "fp32",
        zero_stage=0 if setting.precision == "fp32" else 2,
        held_out_share=0,
        workers=1,
        cpus_per_worker=setting.threads,
        log_steps=max(1, setting.rows // setting.batch // 20),
        checkpoint_steps=10**9,
        seed=time.time_ns() % 2**31,  # a run of its own, not found done
    )
    made = distill.run(config)
    history = json.loads(open_storage(setting.folder).read(made.output("history").path))
    steps, seconds = [p["step"] for p in history], [p["seconds"] for p in history]
    per_step = setting.rows / made.metrics["steps"]
    return {"rows_per_s": rate(steps, seconds, per_step), "loss": history[-1]["loss"], "real_token_share": made.metrics["real_token_share"]}


def trainer_turn(setting: Setting, grouped: bool) -> dict[str, Any]:
    """One epoch through transformers.Trainer as its documentation shows it."""
    import numpy as np
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from headtail.adapters.storage import open_storage
    from headtail.adapters.storage.receipts import load_ref
    from headtail.core.task import load_task
    from headtail.stages.distill.learner import DecoderLearner
    from headtail.stages.distill.rows import TrainingSet, Weights, read_rows

    torch.set_num_threads(setting.threads)
    learner, task, store = DecoderLearner(), load_task("query_segmentation"), open_storage(setting.folder)
    chosen = TrainingSet(training_set=setting.training_set, rows=setting.rows)
    training_set = read_rows(store, Weights(), chosen, task, {"training_set.0": load_ref(store, setting.training_set)}, 0).training_set
    from headtail.engines.models import resolve_weights

    model, tokenizer = learner.load(resolve_weights(setting.model, "", store).path)
    examples = learner.encode(task, tokenizer, training_set, 512, set()).to_pylist()
    data = [{"input_ids": row["ids"], "labels": [-100] * row["answer_start"] + row["ids"][row["answer_start"] :]} for row in examples]
    seen = {"real": 0, "all": 0}

    def collate(rows: list[dict[str, list[int]]]) -> dict[str, Any]:
        width = max(len(row["input_ids"]) for row in rows)
        seen["real"] += sum(len(row["input_ids"]) for row in rows)
        seen["all"] += width * len(rows)
        pads = [width - len(row["input_ids"]) for row in rows]
        ids = [row["input_ids"] + [tokenizer.pad_token_id] * n for row, n in zip(rows, pads, strict=True)]
        labels = [row["labels"] + [-100] * n for row, n in zip(rows, pads, strict=True)]
        mask = [[1] * (width - n) + [0] * n for n in pads]
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "attention_mask": torch.tensor(mask)}

    ends: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]  # transformers is Any here
        def on_step_end(self, *given: Any, **named: Any) -> None:
            ends.append(time.monotonic())

    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            per_device_train_batch_size=setting.batch,
            num_train_epochs=1,
            learning_rate=RATE,
            lr_scheduler_type="cosine",
            warmup_steps=10,
            weight_decay=0.01,
            adam_beta2=0.95,
            max_grad_norm=1.0,
            bf16=setting.precision == "bf16",
            use_cpu=True,
            save_strategy="no",
            logging_steps=10**6,
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            train_sampling_strategy="group_by_length" if grouped else "random",
            seed=int(np.random.default_rng().integers(2**31)),
        )
        done = Trainer(model=model, args=arguments, train_dataset=data, data_collator=collate, callbacks=[Clock()]).train()
    steps = [float(i + 1) for i in range(len(ends))]
    share = seen["real"] / seen["all"]
    return {"rows_per_s": rate(steps, ends, setting.rows / len(ends)), "loss": done.training_loss, "real_token_share": share}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over turns, and headtail's speed as a share of each rival's."""
    found = {s: statistics.median(run["rows_per_s"] for run in runs if run["system"] == s) for s in SYSTEMS}
    shares = {s: statistics.median(run["real_token_share"] for run in runs if run["system"] == s) for s in SYSTEMS}
    return {
        "throughput_vs_trainer": found["headtail"] / found["trainer"],
        "throughput_vs_trainer_grouped": found["headtail"] / found["trainer-grouped"],
        "real_token_share": shares["headtail"],
        "real_token_share_by_system": shares,
        "rows_per_s": found,
    }


def _turn(system: str, setting: Setting) -> None:
    from headtail.stages.distill.base import silence_training

    silence_training()
    made = headtail_turn(setting) if system == "headtail" else trainer_turn(setting, system == "trainer-grouped")
    print(json.dumps(made), flush=True)


def _rows(folder: str, rows: int) -> str:
    from headtail.core.config import TrackingConfig
    from headtail.examples import example_data

    made = example_data.run(
        example_data.Config(root=folder, tracking=TrackingConfig(enabled=False), events=500, days=2, train=rows, labels=40, seed=3)
    )
    return f"{made.path}:train_query_segmentation"


def main() -> None:
    """Measure, show, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 2)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--model", default="example:student-base")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--root", default="", help="store whose students are measured beside their teacher; empty: none are")
    students.add_flags(parser)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--turn", default="", help=argparse.SUPPRESS)
    parser.add_argument("--setting", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.turn:
        _turn(given.turn, Setting(**json.loads(given.setting)))
        return
    costs = students.measured(given, given.repeats) if given.root else dict.fromkeys(CLAIMED)
    with tempfile.TemporaryDirectory(prefix="headtail-bench-") as folder:
        setting = Setting(folder, _rows(folder, given.rows), given.rows, given.batch, given.threads, given.precision, given.model)
        asked = json.dumps(setting._asdict())
        places = {"OMP_NUM_THREADS": str(setting.threads), "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
        command = [sys.executable, "-m", "tests.bench.distill", "--setting", asked, "--turn"]
        runs = in_turn(SYSTEMS, given.repeats, lambda system: [*command, system], places)
    found = {**summary(runs), **costs, "setting": setting._replace(folder="", training_set="")._asdict(), "runs": runs, **machine()}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    title = f"training, {setting.precision}, {setting.threads} threads"
    table = Table("system", "rows/s", "real tokens", title=title, title_justify="left")
    for system in SYSTEMS:
        table.add_row(system, f"{found['rows_per_s'][system]:.1f}", f"{found['real_token_share_by_system'][system]:.3f}")
    console.print(table)
    if given.root:
        students.show(found)
    for name in ("throughput_vs_trainer", "throughput_vs_trainer_grouped", *CLAIMED):
        console.print(f"{name:<32} {'not measured' if found.get(name) is None else format(found[name], '.3f')}")


if __name__ == "__main__":
    main()
