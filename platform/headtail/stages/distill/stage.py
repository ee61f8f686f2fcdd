"""Distil: fine-tune a student on the training set, with Ray Train, DeepSpeed and (when asked) LoRA.

In: training rows and a base model. Out: `model/` in Hugging Face format, ready for an engine, its loss curve, its digest.
The same stage trains a teacher from people's answers: only base, data and settings differ. Refuses to train on a row
whose query is in a set of human labels, or nearly.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

from pydantic import Field, model_validator

from headtail.adapters.storage import Storage, open_storage
from headtail.adapters.storage.receipts import load_ref, output_table
from headtail.batch.lease import hold_lease
from headtail.core import leaks
from headtail.core.config import Config as Fields
from headtail.core.config import StageConfig, execution, result_fields
from headtail.core.errors import ConfigError
from headtail.core.io_format import IOFormat, ModelFormat
from headtail.core.receipt import Receipt, receipt_path
from headtail.core.task import Task, load_task
from headtail.engines.device import machine_computes_bf16
from headtail.engines.models import ResolvedModel, resolve_weights
from headtail.stages.base import Stage, run_once
from headtail.stages.base import identity as stage_identity
from headtail.stages.distill.base import BaseModelConfig
from headtail.stages.distill.encoder import Settings as EncoderSettings
from headtail.stages.distill.learner import Kind, learner_for
from headtail.stages.distill.logits import Logits
from headtail.stages.distill.result import Result, TrainingStage, TrainingTotals
from headtail.stages.distill.rows import (
    Rows,
    TrainingSet,
    Weights,
    count_left_out,
    examples,
    held_out_keys,
    read_rows,
    source_of,
    tables_of,
    with_side,
)

__all__ = ["Config", "Logits", "Lora", "Stopping", "TrainingSet", "Weights", "run", "student_fingerprint"]


VERSION = 4  # raise it when the same config and rows give another student


class Lora(Fields):
    """Low-rank adapters (Hu et al. 2021); merged into the weights after training."""

    rank: int = Field(16, ge=1, description="rank of the update")
    alpha: float = Field(32, gt=0, description="scale: the update is multiplied by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    targets: str | tuple[str, ...] = Field("all-linear", description="layers that get an adapter")


class Stopping(Fields):
    """Stop when the held-out rows get no better; the weights of the best evaluation are taken."""

    every: int = Field(100, ge=1, description="steps between evaluations")
    patience: int = Field(3, ge=1, description="evaluations in a row without a gain before training stops")
    min_delta: float = Field(0.0, ge=0, description="fall of eval_loss (nats) that counts as a gain")


class Config(StageConfig):
    """What to train, on what, and how long."""

    student: Kind = Field(
        "decoder", description="kind of model: decoder (writes text), encoder (classifies words), seq2seq (reads, then writes)"
    )
    io_format: IOFormat = Field(IOFormat(), description="how the student is prompted and what it writes")
    sets: tuple[TrainingSet, ...] = Field((TrainingSet(),), min_length=1, description="training rows, one or more tasks together")
    labels: tuple[str, ...] = Field(
        ("plan:human_labels",), description="table refs of sets of human labels that must share no query with the training rows"
    )
    near_labels: float | None = Field(
        leaks.NEAR,
        gt=0,
        le=1,
        description="trigram similarity from which a training row counts as a labelled query; null: only the same text counts",
    )
    weights: Weights = Field(Weights(), description="what a training row's weight is made of")
    base: BaseModelConfig = Field(BaseModelConfig(model="example:student-base"), description="the model that training starts from")
    lora: Lora | None = Field(Lora(), description="LoRA settings; null trains all weights")
    encoder: EncoderSettings = Field(EncoderSettings(), description="encoder students: corrections, misspelt words, pre-training")
    logits: Logits | None = Field(None, description="learn from a teacher's likeliest tokens too; null learns from its answers alone")
    two_stage: bool = Field(
        False, description="train with side inputs, then continue from those weights without them, as the tail is asked; twice the training"
    )
    epochs: float = Field(3.0, gt=0, description="passes over the training rows")
    max_steps: int = Field(0, ge=0, description="stop after this many optimiser steps; 0 for no limit")
    early_stopping: Stopping | None = Field(
        None, description="stop when eval_loss on held-out rows stops improving; null trains to the end"
    )
    batch_rows: int = Field(16, ge=1, description="rows per worker and step, at most")
    batch_tokens: int = Field(
        0, ge=0, description="tokens per worker and step, padding included, at most; 0: only batch_rows limits a step"
    )
    learning_rate: float = Field(2e-3, gt=0, description="peak of the schedule")
    warmup_share: float = Field(0.05, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    weight_decay: float = Field(0.01, ge=0, description="AdamW weight decay")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="bf16 keeps fp32 master weights; auto: bf16 on a GPU and on a CPU that computes it, else fp32"
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(2, description="DeepSpeed ZeRO stage: 2 up to about 3 B parameters, 3 above; 0 in fp32 alone")
    max_tokens: int = Field(512, ge=16, description="longest training row; a longer one is an error")
    held_out_share: float = Field(0.05, ge=0, lt=0.5, description="share of the rows kept for eval_loss, by hash")
    seed: int = Field(0, description="order of rows and initial weights")
    workers: int = Field(2, ge=1, description="Ray Train workers")
    cpus_per_worker: float = execution(1, "CPU cores per worker", gt=0)
    gpus_per_worker: float = execution(0, "GPUs per worker; 0 trains on CPU with gloo", ge=0)
    resources_per_worker: dict[str, float] = execution({}, "custom Ray resources per worker, such as {student: 1}: that role's nodes")
    log_steps: int = execution(100, "steps between points of the loss curve", ge=1)
    checkpoint_steps: int = execution(500, "steps between checkpoints", ge=1)
    max_failures: int = execution(3, "how often a lost worker group is started again from the last checkpoint", ge=0)

    @model_validator(mode="after")
    def _master_weights(self) -> Config:
        if self.zero_stage == 0 and self.precision == "bf16":
            raise ValueError(
                "zero_stage 0 keeps no fp32 master weights in bf16, and small steps are rounded away: take 1, or precision fp32"
            )
        return self

    @model_validator(mode="after")
    def _stages_differ(self) -> Config:
        if self.two_stage and (self.student == "encoder" or self.io_format.prompt == "query_only") and not self.io_format.side_inputs:
            raise ValueError(
                "two_stage: this I/O format shows no side inputs, so both stages would be the same: set io_format.side_inputs to true"
            )
        return self


class Sources(NamedTuple):
    """What a config names, found: the part of a run that is known before any work."""

    tasks: list[Task]
    refs: dict[str, tuple[Receipt, str]]
    base_model: ResolvedModel | None  # the base; None when it is made here
    teacher: ResolvedModel | None  # of `logits`
    inputs: dict[str, Any]
    replaces: dict[str, Any]


def run(config: Config) -> Receipt[Result]:
    """Train and save the model. Errors: LeakError, TrainingError, ConfigError (base not found, random base under LoRA)."""
    store, config = open_storage(config.root), _resolve_precision(config)
    sources = _sources(config, store)
    identity: dict[str, Any] = {"inputs": sources.inputs, "version": VERSION, "replaces": sources.replaces}
    folder = receipt_path("distill", stage_identity("distill", config, **identity)[1])
    with nullcontext() if store.exists(f"{folder}/receipt.json") else hold_lease(store, folder):  # a second driver of this run waits
        made = run_once("distill", Result, config, lambda stage: _work(config, stage, sources), **identity)
    work = f"{made.path}/work"
    if store.exists(f"{work}/done.json"):  # the receipt is there: what a resumed run would have needed can go
        for one in store.files(work):
            store.remove(one.path)
    return made


def student_fingerprint(config: Config) -> str:
    """The fingerprint that `run` would give: same fingerprint, same student."""
    config = _resolve_precision(config)
    sources = _sources(config, open_storage(config.root))
    return stage_identity("distill", config, inputs=sources.inputs, version=VERSION, replaces=sources.replaces)[1]


def _resolve_precision(config: Config) -> Config:
    """`config` with `precision: auto` decided here, once for all workers: it is part of the run's fingerprint."""
    if config.precision != "auto":
        return config
    half = config.zero_stage > 0 and (config.gpus_per_worker > 0 or machine_computes_bf16())
    return config.model_copy(update={"precision": "bf16" if half else "fp32"})


def _sources(config: Config, store: Storage) -> Sources:
    if config.base.shape is not None and config.lora is not None:
        raise ConfigError("LoRA on random weights learns noise", where="base.shape with lora", fix="set lora to null, or name base.model")
    held = {f"held.{i}": s.held_out for i, s in enumerate(config.sets) if s.held_out}
    named = (
        {f"training_set.{i}": s.training_set for i, s in enumerate(config.sets)}
        | held
        | {f"labels.{i}": ref for i, ref in enumerate(config.labels)}
    )
    if config.student == "encoder":
        named |= {f"queries.{i}": ref for i, ref in enumerate(config.encoder.queries)}
    refs = {name: load_ref(store, ref) for name, ref in named.items()}
    tasks = [load_task(s.task, config.allow_task_code) for s in config.sets]
    if config.two_stage and not any(task.side_inputs for task in tasks):
        fix = "set two_stage to false: live traffic has all that the teacher saw"
        raise ConfigError("no task here has side inputs", where="two_stage", value=", ".join(t.name for t in tasks), fix=fix)
    inputs: dict[str, Any] = {name: receipt.output(output) for name, (receipt, output) in refs.items()}
    found = resolve_weights(config.base.model, config.base.revision, store) if config.base.model else None  # once: it hashes the weights
    teacher = resolve_weights(config.logits.teacher, config.logits.revision, store) if config.logits and config.logits.teacher else None
    inputs |= {name: model.digest for name, model in (("base", found), ("teacher", teacher)) if model is not None}
    sets = [
        {
            "task": t.fingerprint,
            "training_set": refs[f"training_set.{i}"][1],
            "rows": s.rows,
            "held_out": refs[f"held.{i}"][1] if s.held_out else "",
        }
        for i, (t, s) in enumerate(zip(tasks, config.sets, strict=True))
    ]
    encoder = {**result_fields(config.encoder), "queries": []} if config.student == "encoder" else {}
    return Sources(tasks, refs, found, teacher, inputs, {"sets": sets, "labels": [], "encoder": encoder})


def _work(config: Config, stage: Stage, sources: Sources) -> Result:
    from headtail.stages.distill.encoder import unlabelled_queries
    from headtail.stages.distill.finish import finish_student, record_figures
    from headtail.stages.distill.launch import prepare_base, train_student

    store, tasks = stage.store, sources.tasks
    soft, stored = (config.logits.share, config.logits.stored) if config.logits else (0.0, 0)
    sets = zip(config.sets, tasks, strict=True)
    rows = [read_rows(store, config.weights, s, t, sources.refs, i, stored) for i, (s, t) in enumerate(sets)]
    labels = [output_table(store, r, name, ["query_key", "query"]) for r, name in _references(sources, "labels.")]
    leaks.refuse_leaks([table for one in rows for table in tables_of(one)], labels, where="distill", near=config.near_labels)
    first: Receipt[Result] | None = None
    shown = rows
    if config.two_stage:
        first = _first_stage(config, stage, rows, tasks)
        config, sources = _second_stage(config, sources, first, store)
        rows = [count_left_out(one, task) for one, task in zip(rows, tasks, strict=True)]
    for name, (receipt, _) in sources.refs.items():
        stage.inputs[name] = receipt.path
    queries = unlabelled_queries(store, _references(sources, "queries."), labels)
    settings = {"encoder": config.encoder, "queries": queries, "stored": stored}
    learner = learner_for(config.student, tasks, [one.training_set for one in rows], config.io_format, soft, **settings)
    base = prepare_base(config, stage, learner, [(t, one.training_set) for t, one in zip(tasks, rows, strict=True)], sources.base_model)
    if config.logits is not None:
        _check_logits(config, store, sources, learner.io_format, base.tokenizer)
    table = examples(learner, base.tokenizer, rows, tasks, config.max_tokens, config.held_out_share)
    if config.early_stopping is not None and True not in table["held_out"].to_pylist():
        fix = "raise held_out_share, or name sets.0.held_out"
        raise ConfigError("early stopping needs held-out rows, and there are none", where="early_stopping", fix=fix)
    if "soft" in table.column_names and True not in table["soft"].to_pylist():
        fix = "the student's chat template or end of text is another than the teacher's: name logits.teacher, or set logits to null"
        raise ConfigError(
            "no training row has log-probabilities stored for the tokens that the student must write", where="logits", fix=fix
        )
    taught = None  # what a teacher of logits reads: its answers are those to the rows as it was asked, side inputs and all
    if first is not None and sources.teacher is not None:
        taught = examples(learner, base.tokenizer, shown, tasks, config.max_tokens, config.held_out_share)
    done = train_student(config, stage, learner, base, table, taught, sources.teacher)
    digest = finish_student(config, stage, learner, base, done, table)
    read = [f"{receipt.path}:{name}" for receipt, name in _references(sources, "training_set.")]
    if (held := held_out_keys(rows)).num_rows:
        stage.table("held_out", held)
        read.append(f"{stage.path}:held_out")
    result = record_figures(config, stage, done, table, base.name, tasks, digest).model_copy(update={"trained_on": tuple(read)})
    if first is None:
        return result
    count = sum(int(with_side(one.training_set, task).sum()) for one, task in zip(shown, tasks, strict=True))
    return result.model_copy(update={"stages": _both_stages(stage, first, result.training, count)})


def _check_logits(config: Config, store: Storage, sources: Sources, fmt: ModelFormat, tokenizer: Any) -> None:
    """ConfigError unless the student can learn from the logits that it is to learn from, asked for or stored."""
    from headtail.stages.distill.logits import check_logits, check_stored

    if sources.teacher is not None:
        check_logits(config.student, fmt, tokenizer, sources.teacher, config.logits.revision if config.logits else "")
        return
    for receipt, name in _references(sources, "training_set."):
        check_stored(config.student, tokenizer, source_of(store, receipt), f"{receipt.path}:{name}")


def _first_stage(config: Config, stage: Stage, rows: list[Rows], tasks: list[Task]) -> Receipt[Result]:
    """The student that was shown side inputs: an ordinary run, found when it was made before. ConfigError when no row has any."""
    if not any(with_side(one.training_set, task).any() for one, task in zip(rows, tasks, strict=True)):
        fix = "set two_stage to false, or curate rows that the teacher was asked with side inputs"
        raise ConfigError("no training row has side inputs: both stages would be the same", where="two_stage", fix=fix)
    tracking = config.tracking.model_copy(update={"parent_run": stage.run_id, "run_name": "first stage"})
    return run(config.model_copy(update={"two_stage": False, "tracking": tracking}))


def _second_stage(config: Config, sources: Sources, first: Receipt, store: Storage) -> tuple[Config, Sources]:
    """The same training from the first stage's weights, of a student that is shown the query alone."""
    update = {"base": BaseModelConfig(model=first.path), "io_format": config.io_format.model_copy(update={"side_inputs": False})}
    return config.model_copy(update=update), sources._replace(base_model=resolve_weights(first.path, "", store))


def _both_stages(stage: Stage, first: Receipt[Result], second: TrainingTotals | None, count: int) -> tuple[TrainingStage, ...]:
    stage.inputs["first_stage"] = first.path
    stage.rows["side_inputs_left_out"] = count
    return tuple(
        TrainingStage(side_inputs=side, path=path, eval_loss=one.eval_loss, steps=float(one.steps), train_seconds=one.train_seconds)
        for side, path, one in (("shown", first.path, first.result.training), ("left out", stage.path, second))
        if one is not None
    )


def _references(sources: Sources, prefix: str) -> list[tuple[Receipt, str]]:
    return [ref for name, ref in sources.refs.items() if name.startswith(prefix)]
