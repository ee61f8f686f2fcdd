"""From trained weights to the stage's output: merged, in bf16, with tokenizer and I/O format, and figures for the receipt.

In: `done.json` of a finished run. Out: `model/`, its digest, `history.json`, the loss curve, metrics.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from headtail.adapters import charts
from headtail.adapters.progress import say
from headtail.adapters.storage import fetch_folder
from headtail.adapters.storage.receipts import load_receipt
from headtail.core.evidence import JobFigures, figure_metrics, three_figures
from headtail.core.task import Task
from headtail.engines.models import weights_digest
from headtail.stages.base import Stage
from headtail.stages.distill.launch import TrainingBase
from headtail.stages.distill.learner import Learner
from headtail.stages.distill.result import Result, TrainingTotals
from headtail.stages.distill.rows import source_of
from headtail.stages.distill.run_record import LossPoint, TrainedRun

if TYPE_CHECKING:
    from headtail.stages.distill.stage import Config

PROBES = 8  # rows on which the folder that is served is compared with what was trained


def finish_student(config: Config, stage: Stage, learner: Learner, base: TrainingBase, done: TrainedRun, examples: pa.Table) -> str:
    """Fetch what was trained, merge, check, and make it the stage's output. Returns its digest."""
    from headtail.stages.distill.batches import example_columns
    from headtail.stages.distill.merge import check_saved, merge_lora

    trained = fetch_folder(stage.store, done.files, stage.scratch / "fetched")
    model = stage.scratch / "model"
    model.mkdir()
    base.tokenizer.save_pretrained(model)
    rows, pad = example_columns(examples.slice(0, PROBES)), int(base.tokenizer.pad_token_id)
    probes = [learner.collate(rows, np.array([i]), np.ones(1, np.float32), pad) for i in range(len(rows["length"]))]
    if config.lora:
        stage.metrics["merge_drift"] = merge_lora(learner, learner.load(base.path, config.base.revision)[0], trained, model, probes)
    else:
        save_bf16(trained, model)
        whole = stage.scratch / "whole"  # what was trained is the store's own folder: the tokenizer does not go into it
        base.tokenizer.save_pretrained(whole)
        for file in trained.iterdir():
            (whole / file.name).unlink(missing_ok=True)
            (whole / file.name).symlink_to(file.resolve())
        stage.metrics["merge_drift"] = check_saved(learner, learner.load(str(whole))[0], model, probes)
    learner.finish(model)
    digest = weights_digest(model)
    stage.folder("model", model)
    return digest


def save_bf16(trained: Path, into: Path) -> None:
    """A saved model with its weights in bf16, as it is served."""
    import torch
    from safetensors.torch import load_file, save_file

    for file in sorted(trained.iterdir()):
        if file.suffix == ".safetensors":
            weights = {name: value.to(torch.bfloat16) if value.is_floating_point() else value for name, value in load_file(file).items()}
            save_file(weights, into / file.name, metadata={"format": "pt"})
        elif file.name == "config.json":
            (into / file.name).write_text(
                json.dumps({**json.loads(file.read_text()), "dtype": "bfloat16"}, indent=2, sort_keys=True) + "\n"
            )
        else:
            (into / file.name).write_bytes(file.read_bytes())


def record_figures(config: Config, stage: Stage, done: TrainedRun, examples: pa.Table, base: str, tasks: list[Task], digest: str) -> Result:
    """The figures of a finished run, and its result."""
    held = int(np.sum(examples["held_out"].to_numpy()))
    stage.rows |= {"training_set": examples.num_rows - held, "held_out": held}
    params, size = _sizes(stage)
    training = TrainingTotals(
        examples=stage.rows["training_set"],
        steps=done.steps,
        train_loss=_finite(done.final_point.loss),
        eval_loss=_finite(done.final_point.eval_loss),
        train_seconds=done.history[-1].seconds,
        params=params,
        trained_params=done.trained_params,
    )
    stage.metrics |= {"train_loss": done.final_point.loss, "eval_loss": done.final_point.eval_loss, "train_seconds": training.train_seconds}
    stage.metrics |= {"steps": float(done.steps), "taken_step": float(done.taken_step), "params": float(params), "model_bytes": float(size)}
    stage.metrics |= {} if done.trained_params is None else {"trained_params": float(done.trained_params)}
    stage.metrics["real_token_share"] = done.real_tokens / max(done.tokens, 1)
    if "exact" in examples.column_names:  # labels cannot hold every answer: those they change teach something else than was wanted
        stage.metrics["labels_exact_share"] = float(np.mean(examples["exact"].to_numpy(zero_copy_only=False)))
    if done.logits_bytes is not None and done.logits_bytes_per_row is not None:
        stage.metrics |= {"logits_bytes": float(done.logits_bytes), "logits_bytes_per_row": done.logits_bytes_per_row}
    if "soft" in examples.column_names:
        soft = int(np.sum(examples.filter(pc.invert(examples["held_out"]))["soft"].to_numpy()))
        stage.rows["training_set.logits"] = soft
        if soft < stage.rows["training_set"]:
            rest = stage.rows["training_set"] - soft
            stage.note(f"{rest:,} rows learn from the written token alone: no log-probabilities are stored of the tokens they are taught")
    figures = three_figures(None, None, None, _teacher(config, stage))
    stage.metrics |= figure_metrics(figures)
    stage.json("history", [point.model_dump() for point in done.history])
    stage.figure("loss", _curve(done.history, done.taken_step))
    say(
        f"distill      {stage.rows['training_set']:,} rows from {base}: eval loss {done.final_point.eval_loss:.4f}, {done.steps:,} steps, "
        f"{training.train_seconds:.0f} s{', stopped early' if done.stopped_early else ''}"
    )
    return Result(
        digest=digest,
        base=base,
        tasks=tuple(task.name for task in tasks),
        student=config.student,
        io_format=config.io_format,
        stopped_early=done.stopped_early,
        training=training,
        figures=figures,
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _teacher(config: Config, stage: Stage) -> JobFigures | None:
    """Figures of the teacher's answers behind the training rows: what the student will be compared with. None when there are none."""
    training_set = {stage.inputs[f"training_set.{number}"] for number in range(len(config.sets))}
    found = [source_of(stage.store, load_receipt(stage.store, path.partition("/")[0], path)) for path in training_set]
    return found[0].result.figures if found[0] is not None and len({one and one.path for one in found}) == 1 else None


def _sizes(stage: Stage) -> tuple[int, int]:
    """(parameters, bytes) of the model that is served."""
    from safetensors import safe_open

    params = size = 0
    for name, ref in stage.outputs.items():
        if name.startswith("model/") and name.endswith(".safetensors"):
            with safe_open(stage.store.fetch(ref.path, stage.scratch / "sizes"), "np") as weights:
                params += sum(int(np.prod(weights.get_slice(key).get_shape())) for key in weights.keys())  # noqa: SIM118
            size += ref.bytes
    return params, size


def _curve(history: Sequence[LossPoint], taken: int) -> Any:
    figure, axes = charts.blank(6, 3.2)
    steps = [point.step for point in history]
    axes.plot(steps, [point.loss for point in history], label="training", color="#9aa5b1")
    axes.plot(steps, [point.eval_loss for point in history], label="held out", color="#0072b2")
    if taken != steps[-1]:
        axes.axvline(taken, color="#d55e00", linewidth=1, linestyle="--", label=f"taken: step {taken}")
    axes.set(xlabel="step", ylabel="loss per answer token")
    axes.legend(frameon=False)
    return figure
