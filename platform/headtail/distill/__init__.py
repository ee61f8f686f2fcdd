"""Distil: fine-tune a student on the golden set, with Ray Train, DeepSpeed and (when asked) LoRA.

In: golden rows and a base model. Out: `model/` in Hugging Face format, ready for vLLM, its loss curve, its digest.
The same stage trains a teacher from people's answers: only base, data and settings differ. Refuses to train on a row
whose query is in a gold set.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from headtail.config import Config as Fields
from headtail.config import StageConfig, execution
from headtail.distill.base import Base
from headtail.errors import ConfigError, InputError, LeakError
from headtail.keys import shard_of
from headtail.models import Found, resolve
from headtail.progress import say
from headtail.receipt import Receipt, load_ref
from headtail.rows import GOLDEN, conform, with_side_inputs
from headtail.station import Station, run_once
from headtail.storage import Storage, fetch_folder, open_storage, put_folder, read_json, write_table
from headtail.task import Task, load_task

__all__ = ["Config", "Lora", "TrainingSet", "run"]


class TrainingSet(Fields):
    """Rows of one task to learn from."""

    task: str = Field("query_segmentation", description="task name or folder")
    golden: str = Field("curate:golden", description="table ref of golden rows (GOLDEN columns and the task's side inputs)")
    rows: int = Field(0, ge=0, description="use at most this many of them, from the start; 0 for all")


class Lora(Fields):
    """Low-rank adapters (Hu et al. 2021); merged into the weights after training."""

    rank: int = Field(16, ge=1, description="rank of the update")
    alpha: float = Field(32, gt=0, description="scale: the update is multiplied by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    targets: str | tuple[str, ...] = Field("all-linear", description="layers that get an adapter")


class Config(StageConfig):
    """What to train, on what, and how long."""

    sets: tuple[TrainingSet, ...] = Field((TrainingSet(),), min_length=1, description="training rows, one or more tasks together")
    gold: tuple[str, ...] = Field(("plan:gold",), description="table refs of gold sets that must share no query with the training rows")
    base: Base = Field(Base(model="example:student-base"), description="the model that training starts from")
    lora: Lora | None = Field(Lora(), description="LoRA settings; null trains all weights")
    epochs: float = Field(3.0, gt=0, description="passes over the training rows")
    max_steps: int = Field(0, ge=0, description="stop after this many optimiser steps; 0 for no limit")
    batch_rows: int = Field(16, ge=1, description="rows per worker and step")
    learning_rate: float = Field(2e-3, gt=0, description="peak of the schedule")
    warmup_share: float = Field(0.05, ge=0, lt=1, description="share of the steps in which the rate rises")
    weight_decay: float = Field(0.01, ge=0, description="AdamW weight decay")
    precision: Literal["bf16", "fp32"] = Field("bf16", description="bf16 keeps fp32 master weights")
    zero_stage: Literal[0, 1, 2, 3] = Field(2, description="DeepSpeed ZeRO stage: 2 up to about 3 B parameters, 3 above")
    max_tokens: int = Field(512, ge=16, description="longest training row; a longer one is an error")
    held_out_share: float = Field(0.05, ge=0, lt=0.5, description="share of the rows kept for eval_loss, by hash")
    seed: int = Field(0, description="order of rows and initial weights")
    workers: int = Field(2, ge=1, description="Ray Train workers")
    cpus_per_worker: float = execution(1, "CPU cores per worker", gt=0)
    gpus_per_worker: float = execution(0, "GPUs per worker; 0 trains on CPU with gloo", ge=0)
    resources_per_worker: dict[str, float] = execution({}, "custom Ray resources per worker, such as {student: 1}: that role's nodes")
    log_steps: int = execution(100, "steps between points of the loss curve", ge=1)
    checkpoint_steps: int = execution(500, "steps between checkpoints", ge=1)
    max_failures: int = execution(3, "times that a lost worker group is started again from the last checkpoint", ge=0)


def run(config: Config) -> Receipt:
    """Train and save the model. Errors: LeakError, TrainingError, ConfigError (base not found, random base under LoRA)."""
    if config.base.shape is not None and config.lora is not None:
        raise ConfigError("LoRA on random weights learns noise", where="base.shape with lora", fix="set lora to null, or name base.model")
    store = open_storage(config.root)
    refs = {f"golden.{i}": load_ref(store, s.golden) for i, s in enumerate(config.sets)}
    refs |= {f"gold.{i}": load_ref(store, ref) for i, ref in enumerate(config.gold)}
    tasks = [load_task(s.task) for s in config.sets]
    inputs: dict[str, Any] = {name: receipt.output(output) for name, (receipt, output) in refs.items()}
    found = resolve(config.base.model, config.base.revision, store) if config.base.model else None  # once: it hashes the weights
    if found is not None:
        inputs["base"] = found.digest
    sets = [{"task": t.fingerprint, "golden": refs[f"golden.{i}"][1], "rows": config.sets[i].rows} for i, t in enumerate(tasks)]
    replaces = {"sets": sets, "gold": [], "workers": config.workers}
    return run_once("distill", config, lambda station: _work(config, station, tasks, refs, found), inputs=inputs, replaces=replaces)


def _work(config: Config, station: Station, tasks: list[Task], refs: dict[str, tuple[Receipt, str]], found: Found | None) -> None:
    golden = [_golden(station.store, *refs[f"golden.{i}"], task) for i, task in enumerate(tasks)]
    golden = [table.slice(0, s.rows) if s.rows else table for table, s in zip(golden, config.sets, strict=True)]
    gold = [refs[f"gold.{i}"] for i in range(len(config.gold))]
    check_leak(golden, [receipt.table(station.store, name, ["query_key", "query"]) for receipt, name in gold])
    for name, (receipt, _) in refs.items():
        station.inputs[name] = receipt.path
    tokenizer, made, base_name = _prepare_base(config, station, tasks, golden, found)
    base_path = found.path if found is not None else ""
    tokens = _tokens(config, station, tasks, golden, tokenizer)
    work = f"{station.path}/work"
    _train(config, station, tokenizer, made, base_path, tokens.num_rows)
    _finish(config, station, tokenizer, str(made or base_path), tokens)
    _record(config, station, read_json(station.store, f"{work}/history.json"), tokens, base_name, tasks)


def _golden(store: Storage, receipt: Receipt, output: str, task: Task) -> pa.Table:
    table = receipt.table(store, output)
    if table.num_rows == 0:
        raise InputError(
            "no golden rows to train on", where=f"{receipt.path}:{output}", fix="lower curate's min_confidence or teach more rows"
        )
    schema = with_side_inputs(GOLDEN, task.side_inputs)
    if "origin" not in table.column_names:  # people's answers (GOLD rows): every one counts the same, none has a teacher behind it
        for name, value in (("weight", 1.0), ("origin", "human"), ("answer_key", None)):
            table = table.append_column(name, pa.array([value] * table.num_rows, schema.field(name).type))
    for name in task.side_inputs:
        if name not in table.column_names:
            table = table.append_column(name, pa.array([[]] * table.num_rows, schema.field(name).type))
    return conform(table, schema, f"{receipt.path}:{output}")


def check_leak(golden: list[pa.Table], gold: list[pa.Table]) -> None:
    """LeakError when a training row's query is in a gold set."""
    held = {key: query for table in gold for key, query in zip(table["query_key"].to_pylist(), table["query"].to_pylist(), strict=True)}
    found = [held[key] for table in golden for key in table["query_key"].to_pylist() if key in held]
    if found:
        raise LeakError(
            f"{len(found)} training rows are in the gold set",
            where="distill",
            value=", ".join(map(repr, found[:5])),
            fix="withhold gold queries before teaching (plan does) and curate again",
        )


def _prepare_base(
    config: Config, station: Station, tasks: list[Task], golden: list[pa.Table], found: Found | None
) -> tuple[Any, Path | None, str]:
    """(tokenizer, local folder of a base made here or None, name). A base that is cut or made is saved to the store."""
    from headtail.distill.base import load_base, make_base
    from headtail.distill.tokenizer import train_tokenizer

    folder = station.scratch / "base"
    if found is None:
        assert config.base.shape is not None  # Base sees to it: model or shape
        tokenizer = train_tokenizer(_texts(tasks, golden), config.base.shape.vocabulary)
        tokenizer.model_max_length = config.base.shape.positions
        model, name = make_base(config.base.shape, tokenizer, config.seed), "random weights"
    else:
        model, tokenizer = load_base(found.path, config.base.revision, config.base.layers)
        name = found.name + (f", {config.base.layers} of its layers" if config.base.layers else "")
        if not config.base.layers:
            return tokenizer, None, name
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer, folder, name


def _texts(tasks: list[Task], golden: list[pa.Table]) -> Any:
    for task, table in zip(tasks, golden, strict=True):
        for row in table.to_pylist():
            yield from (message["content"] for message in task.messages(row["query"], {n: row[n] for n in task.side_inputs}))
            yield task.target(task.parse(row["answer"])[0])


def _tokens(config: Config, station: Station, tasks: list[Task], golden: list[pa.Table], tokenizer: Any) -> pa.Table:
    from headtail.distill.batches import encode

    every = round(1 / config.held_out_share) if config.held_out_share else 0
    parts = []
    for task, table in zip(tasks, golden, strict=True):
        held = {key for key in table["query_key"].to_pylist() if every and shard_of(key, every) == 0}
        parts.append(encode(task, tokenizer, table, config.max_tokens, held))
    tokens = pa.concat_tables(parts)
    write_table(station.store, f"{station.path}/work/tokens.parquet", tokens)
    return tokens


def _train(config: Config, station: Station, tokenizer: Any, made: Path | None, base_path: str, rows: int) -> None:
    from headtail import cluster
    from headtail.distill.train import Spec, worker
    from headtail.meter import metered

    cluster.start()
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    work = f"{station.path}/work"
    files: tuple[str, ...] = ()
    if made is not None:
        kept = station.scratch / "base-copy"
        shutil.copytree(made, kept)
        files = tuple(ref.path for ref in put_folder(station.store, kept, f"{work}/base"))
    settings = config.model_dump(mode="json")
    total = int(rows * (1 - config.held_out_share) * config.epochs)
    total = min(total, config.max_steps * config.batch_rows * config.workers) if config.max_steps else total
    with metered("distill", total) as meter:
        spec = Spec(
            station.store,
            work,
            f"{work}/tokens.parquet",
            files,
            base_path,
            config.base.revision,
            int(tokenizer.pad_token_id),
            settings,
            meter,
        )
        resources = {"CPU": config.cpus_per_worker} | ({"GPU": config.gpus_per_worker} if config.gpus_per_worker else {})
        resources |= config.resources_per_worker
        trainer = TorchTrainer(
            lambda _: worker(spec),
            train_loop_config={},
            torch_config=TorchConfig(backend="nccl" if config.gpus_per_worker else "gloo"),
            scaling_config=ScalingConfig(num_workers=config.workers, use_gpu=config.gpus_per_worker > 0, resources_per_worker=resources),
            run_config=RunConfig(
                name=station.path.replace("/", "-"),
                storage_path=str(station.scratch / "ray-train"),
                failure_config=FailureConfig(max_failures=config.max_failures),
            ),
        )
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise _told(error) from error


def _told(error: Exception) -> Exception:
    """The worker's own error when it is one of ours, else a TrainingError."""
    from headtail.errors import HeadtailError, TrainingError

    for found in getattr(error, "worker_failures", {}).values():
        cause = getattr(found, "cause", found)
        if isinstance(cause, HeadtailError):
            return cause
    return TrainingError(f"training failed: {error}", fix="see HEADTAIL_WORKER_LOGS=1 for the workers' own output")


def _finish(config: Config, station: Station, tokenizer: Any, base_path: str, tokens: pa.Table) -> None:
    """Fetch what was trained, merge, check, and make it the stage's output."""
    from headtail.distill.base import load_base
    from headtail.distill.merge import merge_lora
    from headtail.models import weights_digest

    names = (
        ("adapter_config.json", "adapter_model.safetensors")
        if config.lora
        else ("config.json", "generation_config.json", "model.safetensors")
    )
    files = [f"{station.path}/work/trained/{name}" for name in names]
    trained = fetch_folder(station.store, [f for f in files if station.store.exists(f)], station.scratch / "fetched")
    model = station.scratch / "model"
    if config.lora:
        probes = [np.asarray(row, dtype=np.int64) for row in tokens["ids"][:8].to_pylist()]
        station.metrics["merge_drift"] = merge_lora(load_base(base_path, config.base.revision)[0], trained, model, probes)
    else:
        model.mkdir()
        for name in names:
            if (trained / name).exists():
                shutil.copy(trained / name, model / name)
    tokenizer.save_pretrained(model)
    station.facts["digest"] = weights_digest(model)
    station.folder("model", model)


def _record(config: Config, station: Station, history: list[dict[str, float]], tokens: pa.Table, base: str, tasks: list[Task]) -> None:
    last = history[-1]
    held = int(np.sum(tokens["held_out"].to_numpy()))
    station.rows |= {"golden": tokens.num_rows - held, "held_out": held}
    station.metrics |= {"train_loss": last["loss"], "eval_loss": last["eval_loss"], "train_seconds": last["seconds"], "steps": last["step"]}
    station.facts |= {"base": base, "tasks": [t.name for t in tasks], "lora": config.lora.model_dump() if config.lora else None}
    station.metrics |= {k: float(v) for k, v in _sizes(station).items()}
    station.json("history", history)
    station.figure("loss", _curve(history))
    rows, steps = tokens.num_rows - held, int(last["step"])
    say(f"distill      {rows:,} rows from {base}: eval loss {last['eval_loss']:.4f}, {steps:,} steps, {last['seconds']:.0f} s")


def _sizes(station: Station) -> dict[str, int]:
    from safetensors import safe_open

    ref = station.outputs["model/model.safetensors"]
    with safe_open(station.store.fetch(ref.path, station.scratch / "sizes"), "np") as weights:
        params = sum(int(np.prod(weights.get_slice(key).get_shape())) for key in weights.keys())  # noqa: SIM118
    return {"params": params, "model_bytes": ref.bytes}


def _curve(history: list[dict[str, float]]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2))
    axes = figure.subplots()
    steps = [point["step"] for point in history]
    axes.plot(steps, [point["loss"] for point in history], label="training", color="#9aa5b1")
    axes.plot(steps, [point["eval_loss"] for point in history], label="held out", color="#0072b2")
    axes.set(xlabel="step", ylabel="loss per answer token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure
