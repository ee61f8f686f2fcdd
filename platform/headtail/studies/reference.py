"""Train the shipped models again from random weights: the placeholder teacher and the students' base.

In: the example data (other seeds than the quickstart's). Out: two Hugging Face folders with model cards, and the
teacher's measured quality on labelled queries it has not seen. The teacher learns the two product tasks; the base learns three
neighbouring ones (correction, chunking, coarse tags), so that a student still has to learn its task from the teacher.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from pydantic import Field

from headtail.adapters.storage import check_digest, fetch_folder, open_storage
from headtail.core.config import StageConfig, execution
from headtail.core.receipt import Receipt, StageResult
from headtail.core.task import EXAMPLES, load_task
from headtail.engines import ModelConfig
from headtail.engines.models import SHIPPED
from headtail.examples import example_data
from headtail.stages import distill, evaluate, ingest, plan, precompute
from headtail.stages.base import Stage, run_once
from headtail.stages.distill.base import BaseModelConfig, Shape

TASKS = ("query_segmentation", "query_intent")
PRETRAINING = tuple(str(EXAMPLES.parent / "pretraining" / name) for name in ("query_correction", "query_chunking", "query_tagging"))


_FROM_NOTHING = distill.Config(
    labels=(),
    base=BaseModelConfig(shape=Shape()),
    lora=None,
    epochs=2,
    batch_rows=32,
    held_out_share=0.01,
    log_steps=200,
    checkpoint_steps=400,
)
_SMALL = Shape(hidden=128, layers=3, heads=2, feed_forward=384)


class Config(StageConfig):
    """How the two models are made. The defaults made the ones in this repository."""

    teacher_data: example_data.Config = Field(
        example_data.Config(events=10_000, days=2, seed=1, universe=200_000, train=80_000, avoid_labels_seed=7, label="teacher data"),
        description="where the teacher's training rows come from; its training rows share no query with the quickstart's human labels",
    )
    teacher: distill.Config = Field(_FROM_NOTHING, description="the teacher's training")
    teacher_rows: tuple[int, ...] = Field((0, 20_000), description="training rows of each task, segmentation and intent; 0 for all")
    base_data: example_data.Config = Field(
        example_data.Config(
            events=10_000, days=2, seed=3, universe=200_000, train=30_000, avoid_labels_seed=7, tasks=PRETRAINING, label="base data"
        ),
        description="where the base's training rows come from",
    )
    base: distill.Config = Field(
        _FROM_NOTHING.model_copy(update={"base": BaseModelConfig(shape=_SMALL), "learning_rate": 3e-3, "checkpoint_steps": 1000}),
        description="the base's training",
    )
    labels_data: example_data.Config = Field(
        example_data.Config(events=20_000, label="labels data"), description="where the teacher is measured"
    )
    into: str = execution(str(SHIPPED), "folder that receives teacher/ and student-base/")


def run(config: Config) -> Receipt:
    """Train both, measure the teacher, write the folders and their cards."""
    common = {"root": config.root, "tracking": config.tracking}
    teacher = _train(config.teacher_data, config.teacher, TASKS, config.teacher_rows, common)
    base = _train(config.base_data, config.base, PRETRAINING, (0, 0, 0), common)
    quality = {task: _measure(config, task, teacher, common) for task in TASKS}

    def work(stage: Stage) -> StageResult:
        _copy(config, teacher, Path(config.into) / "teacher", teacher_card(teacher, quality))
        _copy(config, base, Path(config.into) / "student-base", base_card(base))
        for task, receipt in quality.items():
            stage.metrics |= {f"{task}/{key}": value for key, value in receipt.metrics.items() if key.startswith("quality/teacher")}
        return StageResult()

    inputs = {"teacher": teacher, "base": base, **quality}
    nested: dict[str, object] = {name: {} for name in ("teacher_data", "teacher", "base_data", "base", "labels_data")}
    return run_once("reference", StageResult, config, work, inputs=inputs, replaces=nested)


def _train(
    data: example_data.Config, training: distill.Config, tasks: tuple[str, ...], rows: tuple[int, ...], common: dict[str, object]
) -> Receipt:
    source = example_data.run(data.model_copy(update=common))
    sets = tuple(
        distill.TrainingSet(task=task, training_set=f"{source.path}:train_{load_task(task).name}", rows=n)
        for task, n in zip(tasks, rows, strict=True)
    )
    return distill.run(training.model_copy(update={**common, "sets": sets}))


def _measure(config: Config, task: str, teacher: Receipt, common: dict[str, object]) -> Receipt:
    store = open_storage(config.root)
    made = example_data.run(config.labels_data.model_copy(update=common))
    labels = store.uri(made.output(f"human_labels_{task}").path)
    log = ingest.run(ingest.Config.model_validate({**common, "task": task, "log": store.uri(f"{made.path}/log"), "labels": labels}))
    planned = plan.run(plan.Config.model_validate({**common, "task": task, "log": log.path}))
    answered = precompute.run(
        precompute.Config.model_validate(
            {
                **common,
                "task": task,
                "inputs": (f"{planned.path}:human_labels",),
                "source": "teacher",
                "model": ModelConfig(model=teacher.path),
            }
        )
    )
    return evaluate.run(
        evaluate.Config.model_validate(
            {**common, "task": task, "labels": f"{planned.path}:human_labels", "answers": {"teacher": answered.path}}
        )
    )


def _copy(config: Config, training: Receipt, into: Path, card: str) -> None:
    store = open_storage(config.root)
    files = [check_digest(store, ref) for name, ref in training.outputs.items() if name.startswith("model/")]
    folder = fetch_folder(store, files, Path(config.into) / ".fetched")
    into.mkdir(parents=True, exist_ok=True)
    for path in files:
        shutil.copy(folder / Path(path).name, into / Path(path).name)
        (into / Path(path).name).chmod(0o644)
    (into / "README.md").write_text(card, encoding="utf-8")


def teacher_card(training: Receipt, quality: dict[str, Receipt]) -> str:
    """The teacher's model card."""
    lines = []
    for task, receipt in quality.items():
        for name in ("all", "head", "torso", "tail", "unseen"):
            if f"quality/teacher/{name}" in receipt.metrics:
                found, low, high = (receipt.metrics[f"{kind}/teacher/{name}"] for kind in ("quality", "low", "high"))
                lines.append(f"| {task} | {name} | {found:.3f} | {low:.3f} .. {high:.3f} |")
    table = "\n".join(lines)
    return f"""# The reference teacher

A placeholder for a strong LLM, so that the quickstart runs where no model hub can be reached. {_training_text(training, 1)}
for the tasks query_segmentation and query_intent. It knows the vocabulary of that data and nothing else: do not use it for
anything real.

Quality against the human labels of the quickstart's example data (seed 7); none of their queries was in its training rows. Micro-F1 over
(text, label) for segmentation, accuracy for intent; 95 % bootstrap intervals.

| task | stratum | quality | interval |
|---|---|---|---|
{table}

Licence: Apache-2.0, as the rest of the repository. Training data: generated, contains no person's data.
"""


def base_card(training: Receipt) -> str:
    """The base's model card."""
    return f"""# The students' base

{_training_text(training, 3)}
for three tasks that are none of the product's: correcting the spelling of a query, cutting it into its parts, and tagging the
parts coarsely (what, where, when, other). A student starts here and learns its own task from a teacher's answers through LoRA.

Licence: Apache-2.0, as the rest of the repository. Training data: generated, contains no person's data.
"""


def _training_text(training: Receipt, seed: int) -> str:
    figures = training.metrics
    return (
        f"It is a Llama-type decoder of\n{figures['params'] / 1e6:.2f} M parameters (bf16), trained from random weights on "
        f"{training.rows['training_set']:,} rows of headtail's example data (seed {seed}) by\n`headtail reference`: "
        f"{figures['train_seconds'] / 60:.0f} minutes on 2 CPU cores, held-out loss per answer token "
        f"{figures['eval_loss']:.4f}. It was made"
    )
