"""Start training: the base where every worker finds it, the examples in the store, a Ray Train group that outlives its workers.

In: a config, a learner, training rows. Out: `work/done.json` of the finished run: the loss curve and where the weights are.
A run whose weights are whole is not trained again.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
from pydantic import Field

from headtail.adapters.cluster import unwrap_error
from headtail.adapters.progress import say
from headtail.adapters.storage import fetch_folder, put_folder, read_record, write_json, write_table
from headtail.core.config import Config as Record
from headtail.core.config import result_fields
from headtail.core.errors import TrainingError
from headtail.core.paths import StorePath
from headtail.core.task import Task
from headtail.engines.models import ResolvedModel
from headtail.stages.base import Stage
from headtail.stages.distill import resume
from headtail.stages.distill.learner import Learner
from headtail.stages.distill.run_record import TrainedRun

if TYPE_CHECKING:
    from headtail.stages.distill.stage import Config


class StoredBase(Record):
    """A base that was cut or made for this run."""

    files: tuple[StorePath, ...] = Field(description="its files in the store, which share a folder")
    name: str = Field(description="what it was made from")


class TrainingBase(NamedTuple):
    """What training starts from: `path` for this process, `files` in the store for the workers (none: they find base.model)."""

    tokenizer: Any
    path: str
    files: tuple[str, ...]
    name: str
    digest: str  # of base.model, which every worker finds for itself; empty where there are `files`


def prepare_base(
    config: Config, stage: Stage, learner: Learner, training_set: Sequence[tuple[Task, pa.Table]], resolved: ResolvedModel | None
) -> TrainingBase:
    """The base, loaded, cut or made. One that is cut or made here is saved to the store, from where workers and a resumed run take it."""
    store, folder, kept = stage.store, stage.scratch / "base", f"{stage.path}/work/base.json"
    if store.exists(kept):
        made = read_record(store, StoredBase, kept)
        folder = fetch_folder(store, made.files, folder)
        return TrainingBase(learner.load(str(folder))[1], str(folder), made.files, made.name, "")
    if resolved is None:
        assert config.base.shape is not None  # BaseModelConfig sees to it: model or shape
        texts = (text for task, table in training_set for text in learner.texts(task, table))
        model, tokenizer = learner.make(config.base.shape, texts, config.seed)
        name = str(getattr(learner, "base_description", "random weights"))
    elif not config.base.layers:
        _, tokenizer = learner.load(resolved.path, config.base.revision)
        return TrainingBase(tokenizer, resolved.path, (), resolved.name, resolved.digest)
    else:
        model, tokenizer = learner.load(resolved.path, config.base.revision, config.base.layers)
        name = f"{resolved.name}, {config.base.layers} of its layers"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shutil.copytree(folder, stage.scratch / "base-copy")
    files = [ref.path for ref in put_folder(store, stage.scratch / "base-copy", f"{stage.path}/work/base")]
    write_json(store, kept, StoredBase(files=tuple(files), name=name).model_dump(mode="json"))  # last: now it is there
    return TrainingBase(tokenizer, str(folder), tuple(files), name, "")


def train_student(
    config: Config,
    stage: Stage,
    learner: Learner,
    base: TrainingBase,
    examples: pa.Table,
    taught: pa.Table | None = None,
    teacher: ResolvedModel | None = None,
) -> TrainedRun:
    """How the run ended, as `done.json` says. `taught`: the examples as the `teacher` of logits reads them, if it reads others."""
    from headtail.adapters import cluster
    from headtail.adapters.meter import job_meter
    from headtail.stages.distill.train import Spec

    pad, digests = int(base.tokenizer.pad_token_id), (base.digest, teacher.digest if teacher else "")
    spec = Spec(stage.store, f"{stage.path}/work", learner, base.files, pad, config, None, *digests)
    if not stage.store.exists(spec.done):
        if taught is not None:
            write_table(stage.store, spec.taught, taught)
        data = write_table(stage.store, spec.examples, examples).sha256
        _begin(config, stage, data)
        cluster.start_cluster()
        with job_meter("distill", _total(config, examples)) as meter:
            _fit(config, stage, spec._replace(meter=meter, data=data))
    return read_record(stage.store, TrainedRun, spec.done)


def _begin(config: Config, stage: Stage, data: str) -> None:
    """Keep what the run is made of beside its checkpoints, and say what becomes of those that are there."""
    now = {**result_fields(config), "data": data}
    for text in resume.earlier_run(stage.store, stage.path, now):
        stage.note(f"this run {text}")
        say(f"distill      this run {text}")
    write_json(stage.store, f"{stage.path}/{resume.SETTINGS}", now)


def _total(config: Config, examples: pa.Table) -> int:
    total = int(sum(not held for held in examples["held_out"].to_pylist()) * config.epochs)
    return min(total, config.max_steps * config.batch_rows * config.workers) if config.max_steps else total


def _fit(config: Config, stage: Stage, spec: Any) -> None:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from headtail.stages.distill.train import train_worker

    resources = {"CPU": config.cpus_per_worker} | ({"GPU": config.gpus_per_worker} if config.gpus_per_worker else {})
    resources |= config.resources_per_worker
    trainer = TorchTrainer(
        lambda _: train_worker(spec),
        train_loop_config={},
        torch_config=TorchConfig(backend="nccl" if config.gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(num_workers=config.workers, use_gpu=config.gpus_per_worker > 0, resources_per_worker=resources),
        run_config=RunConfig(
            name=stage.path.replace("/", "-"),
            storage_path=str(Path(stage.scratch) / "ray-train"),
            failure_config=FailureConfig(max_failures=config.max_failures),
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        fix = "HEADTAIL_WORKER_LOGS=1 shows the workers' own output"
        raise unwrap_error(error, TrainingError, "training failed", where=stage.path, fix=fix) from error
