"""Ablation: what curation is worth, by training a student on each kind of training set and judging all of them on the same human labels.

    raw          the teacher's answers as they are
    reviewed     raw, with people's decisions before the teacher's answers
    filtered     without the unconfident and the suspect
    relabelled   filtered, with people's decisions
    human        people's answers alone, when there are any to train on

In: a teacher's answers, human labels, and the stages' own configs. Out: a table (variant x stratum) of quality with intervals, and each
variant's paired difference from the first. Runs curate, distill, precompute and evaluate; makes no decision of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field, model_validator

from headtail.adapters import charts
from headtail.adapters.progress import say
from headtail.adapters.storage import Storage, open_storage
from headtail.adapters.storage.receipts import load_receipt, load_ref, output_table
from headtail.batch.answer_sources import source_ref
from headtail.core.config import StageConfig, refuse_filled
from headtail.core.errors import ConfigError
from headtail.core.receipt import Receipt, StageResult
from headtail.core.rows import ALL, STRATA, Source
from headtail.core.task import Task, load_task
from headtail.stages import curate, distill, evaluate, precompute
from headtail.stages.base import Stage, run_once
from headtail.stages.curate import Config as CurateConfig
from headtail.stages.curate import Suspicion
from headtail.stages.distill import Config as DistillConfig
from headtail.stages.evaluate import Config as EvaluateConfig
from headtail.stages.evaluate.scoring import by_source, paired_difference
from headtail.stages.precompute import Config as PrecomputeConfig

Variant = Literal["raw", "reviewed", "filtered", "relabelled", "human"]
HUMAN = "human"
UNFILTERED, PEOPLES = ("raw", "reviewed"), ("reviewed", "relabelled")

# One variant's student on one slice of the human labels. `difference`: minus the first variant on the same rows, null for the first itself.
ABLATION = pa.schema(
    [
        ("variant", pa.string()),
        ("stratum", pa.string()),
        ("trained_on", pa.int64()),  # training rows
        ("by_people", pa.int64()),  # of them
        ("n", pa.int64()),
        ("quality", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("difference", pa.float64()),
        ("difference_low", pa.float64()),
        ("difference_high", pa.float64()),
    ]
)


# Fields of a group that the ablation fills in, and its own field to set instead.
FILLED = {
    "curate": {"answers": "answers", "labels": "labels", "reviews": "variants"},
    "distill": {"sets": "", "labels": "labels"},
    "precompute": {"inputs": "labels", "source": "", "model.model": ""},
    "evaluate": {"labels": "labels", "answers": ""},
}


class Config(StageConfig):
    """Which variants, and how each student is made. A group is that stage's own config, without the fields that the ablation fills in."""

    task: str = Field("query_segmentation", description="task folder or name of a shipped example")
    answers: str = Field("precompute", description="precompute receipt ref of the teacher's answers; precompute: its latest run")
    labels: str = Field("plan:human_labels", description="table ref of the labelled rows that judge every variant")
    human: str = Field(
        "", description="table ref of people's answers to train on, such as ingest:human_labels_train; empty leaves that variant out"
    )
    variants: tuple[Variant, ...] = Field(
        ("raw", "reviewed", "filtered", "relabelled", "human"), min_length=2, description="the first is compared with"
    )
    curate: CurateConfig = Field(
        CurateConfig(suspicion=Suspicion(drop_above=0.5)), description="of filtered and relabelled; raw and reviewed turn every filter off"
    )
    distill: DistillConfig = Field(DistillConfig(), description="the same for every variant")
    precompute: PrecomputeConfig = Field(PrecomputeConfig(), description="how the students answer the labelled queries")
    evaluate: EvaluateConfig = Field(EvaluateConfig(), description="intervals")

    @model_validator(mode="before")
    @classmethod
    def _filled_in(cls, data: Any) -> Any:
        refuse_filled("ablation", data, FILLED)
        return data


def run(config: Config) -> Receipt:
    """Train and judge every variant once; what was done before is reused."""
    store, task = open_storage(config.root), load_task(config.task, config.allow_task_code)
    variants = [name for name in config.variants if name != HUMAN or config.human]
    if len(variants) < 2:
        raise ConfigError("an ablation needs two variants", where="variants", value=variants, fix="name people's answers in `human`")
    config = _resolve(config, store, task)
    training_set: dict[str, tuple[Receipt, str]] = {}
    answered: dict[str, str] = {}
    for name in variants:
        training_set[name] = load_ref(store, config.human) if name == HUMAN else (_curate(config, name), "training_set")
        where, output = training_set[name]
        say(f"ablate       {name}: a student from {where.outputs[output].rows or 0:,} rows")
        sets = (distill.TrainingSet(task=config.task, training_set=f"{where.path}:{output}"),)
        student = distill.run(config.distill.at(config, config.tracking, sets=sets, labels=(config.labels,)))
        model = config.precompute.model.model_copy(update={"model": student.path})
        asked = {"task": config.task, "inputs": (config.labels,), "source": "batch_student", "model": model}
        answered[name] = precompute.run(config.precompute.at(config, config.tracking, **asked)).path
    quality = evaluate.run(config.evaluate.at(config, config.tracking, task=config.task, labels=config.labels, answers=answered))

    def work(stage: Stage) -> StageResult:
        trained = {name: _rows(*found) for name, found in training_set.items()}
        made = pa.Table.from_pylist(
            list(ablation_rows(output_table(store, quality, "rows"), output_table(store, quality, "quality"), trained, config)),
            schema=ABLATION,
        )
        stage.table("ablation", made)
        shown = made.to_pylist()
        stage.rows |= {f"training_set.{name}": count for name, (count, _) in trained.items()}
        for line in shown:
            stage.metrics |= {
                f"{key}/{line['variant']}/{line['stratum']}": line[key] for key in ("quality", "difference") if line[key] is not None
            }
        points = [charts.QualityPoint(x["variant"], x["stratum"], x["quality"], x["low"], x["high"], x["n"]) for x in shown]
        stage.figure("ablation", charts.quality_chart(points, confidence=config.evaluate.confidence))
        stage.note("one training run each: a difference between training sets cannot be separated from one between seeds")
        return StageResult()

    refs = {"answers": config.answers, "labels": config.labels, "human": config.human, "task": task.name}
    groups: dict[str, Any] = {name: {} for name in ("curate", "distill", "precompute", "evaluate")}
    inputs = {"evaluation": quality, **{name: found for name, (found, _) in training_set.items()}}
    return run_once("ablate", StageResult, config, work, inputs=inputs, task=task, replaces={**refs, **groups, "variants": variants})


def _resolve(config: Config, store: Storage, task: Task) -> Config:
    """References by fingerprint: students' answers are made on the way, and `latest` would be theirs."""
    named = {}
    for name in ("labels", "human"):
        if ref := getattr(config, name):
            receipt, output = load_ref(store, ref)
            named[name] = f"{receipt.path}:{output}"
    answers = source_ref(store, task, config.answers, Source.TEACHER)
    return config.model_copy(update={**named, "answers": load_receipt(store, "precompute", answers).path})


def ablation_rows(rows: pa.Table, quality: pa.Table, trained: dict[str, tuple[int, int]], config: Config) -> Iterator[dict[str, Any]]:
    """ABLATION rows: strata that have human labels, and all of them, for each variant."""
    scored = {found.source: found for found in by_source(rows)}
    figures = {(line["source"], line["stratum"]): line for line in quality.to_pylist()}
    base = scored[next(iter(trained))]
    for name, (count, people) in trained.items():
        for stratum in (*STRATA, ALL):
            figure = figures[name, stratum]
            if not base.where(stratum).any():
                continue
            line = {"variant": name, "stratum": stratum, "trained_on": count, "by_people": people, "n": figure["n"]}
            line |= {key: figure[key] for key in ("quality", "low", "high")}
            if scored[name] is not base:
                gap = paired_difference(scored[name], base, stratum, config.evaluate.sure)
                line |= {"difference": gap["value"], "difference_low": gap["low"], "difference_high": gap["high"]}
            yield line


def _curate(config: Config, variant: str) -> Receipt:
    changes: dict[str, Any] = {"task": config.task, "answers": config.answers, "labels": config.labels, "reviews": variant in PEOPLES}
    if variant in UNFILTERED:
        changes |= {"min_confidence": 0.0, "suspicion": config.curate.suspicion.model_copy(update={"drop_above": 1.0})}
    return curate.run(config.curate.at(config, config.tracking, **changes))


def _rows(receipt: Receipt, output: str) -> tuple[int, int]:
    """(rows, those that people answered)."""
    count = receipt.outputs[output].rows or 0
    return count, receipt.rows.get("training_set.human", 0) if receipt.stage == "curate" else count
