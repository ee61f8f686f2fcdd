"""Gap: the value of side inputs to a model, and its loss without them, as in live traffic.

    labelled rows that have side inputs -> asked with them, asked without -> quality of each, on the same rows, by stratum

In: human labels, a teacher, perhaps a student. Out: a table (model x shown or not x stratum) with intervals and paired differences, and
a verdict for each model. Runs precompute and evaluate; makes no decision of its own. Rows without side inputs are
the same both times, so they are left out of every figure here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from headtail.adapters import charts
from headtail.adapters.progress import say
from headtail.adapters.storage import Storage, open_storage
from headtail.adapters.storage.receipts import load_ref, output_table
from headtail.batch import read_answers
from headtail.core.config import StageConfig, refuse_filled
from headtail.core.errors import ConfigError, InputError
from headtail.core.receipt import Receipt, StageResult
from headtail.core.rows import ALL, SMALL, STRATA, Source
from headtail.core.task import load_task
from headtail.engines import ModelConfig
from headtail.stages import evaluate, precompute
from headtail.stages.base import Stage, run_once
from headtail.stages.distill.rows import with_side
from headtail.stages.evaluate import Config as EvaluateConfig
from headtail.stages.evaluate.scoring import ScoredSource, Sureness, by_source, interval_json, paired_difference, quality_of
from headtail.stages.precompute import Config as PrecomputeConfig

# One model on one slice of the labelled rows that have side inputs, asked with them (`shown`) or without.
GAP = pa.schema(
    [
        ("model", pa.string()),  # teacher | student
        ("shown", pa.bool_()),
        ("stratum", pa.string()),
        ("labelled", pa.int64()),  # labelled rows of the stratum
        ("n", pa.int64()),  # of them, those with side inputs: what the figures rest on
        ("quality", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("difference", pa.float64()),  # minus the teacher that is shown them; null for itself
        ("difference_low", pa.float64()),
        ("difference_high", pa.float64()),
        ("effect", pa.float64()),  # minus the same model that is shown them: what leaving them out does; null when shown
        ("effect_low", pa.float64()),
        ("effect_high", pa.float64()),
    ]
)


# Fields of a group that the gap fills in, and its own field to set instead.
FILLED = {
    "precompute": {"inputs": "labels", "source": "", "model": "teacher or student", "side_inputs": ""},
    "evaluate": {"labels": "labels", "answers": ""},
}


class Config(StageConfig):
    """Who is asked, and on what. Root, task, references and tracking of the groups are filled in."""

    task: str = Field("query_segmentation", description="task folder or name of a shipped example; it must have side inputs")
    labels: str = Field("plan:human_labels", description="table ref of the labelled rows; rows with side inputs are evaluated")
    teacher: ModelConfig = Field(ModelConfig(), description="the model that answers the head")
    student: ModelConfig | None = Field(None, description="a student, such as {model: distill/ab12}; null leaves it out")
    precompute: PrecomputeConfig = Field(PrecomputeConfig(), description="how both are asked; the models are those above")
    evaluate: EvaluateConfig = Field(EvaluateConfig(), description="intervals")

    @model_validator(mode="before")
    @classmethod
    def _filled_in(cls, data: Any) -> Any:
        refuse_filled("gap", data, FILLED)
        return data


class Result(StageResult):
    """The gap, in words and as a verdict for each model. The table `gap` has the figures."""

    verdicts: dict[str, str] = Field(description="a sentence for each model")
    real: dict[str, bool] = Field(description="whether a model does worse without side inputs, by more than chance explains")


def run(config: Config) -> Receipt[Result]:
    """Ask, judge and compare once. ConfigError when the task has no side inputs, InputError when no labelled row has any."""
    store, task = open_storage(config.root), load_task(config.task, config.allow_task_code)
    if not task.side_inputs:
        raise ConfigError("this task has no side inputs", where="task", value=task.name, fix="there is no gap to measure")
    planned, name = load_ref(store, config.labels)
    labels, ref = output_table(store, planned, name), f"{planned.path}:{name}"
    keys = labels.filter(pa.array(with_side(labels, task)))["query_key"].combine_chunks()
    if not len(keys):
        fix = f"label queries that have {', '.join(task.side_inputs)}: most often those of the head"
        raise InputError("no labelled row has side inputs", where=ref, value=f"{labels.num_rows:,} rows", fix=fix)
    answered: dict[str, Receipt] = {}
    for model, found in _models(config).items():
        for shown in (True, False):
            say(f"gap          {model} {'with' if shown else 'without'} side inputs: {labels.num_rows:,} labelled, {len(keys):,} have any")
            asked = {"task": config.task, "inputs": (ref,), "source": model, "model": found, "side_inputs": shown}
            answered[source_name(model, shown)] = precompute.run(config.precompute.at(config, config.tracking, **asked))
    paths = {source: receipt.path for source, receipt in answered.items()}
    quality = evaluate.run(config.evaluate.at(config, config.tracking, task=config.task, labels=ref, answers=paths))

    def work(stage: Stage) -> Result:
        made = list(gap_rows(output_table(store, quality, "rows"), keys, list(_models(config)), config.evaluate.sure))
        moved = {
            model: _count_different_prompts(store, keys, answered[model], answered[source_name(model, False)]) for model in _models(config)
        }
        stage.rows |= {"human_labels": labels.num_rows, "with_side_inputs": len(keys)}
        stage.rows |= {f"asked_otherwise.{model}": count for model, count in moved.items()}
        return _write(stage, pa.Table.from_pylist(made, schema=GAP), moved, config.evaluate.confidence)

    groups: dict[str, Any] = {"teacher": {}, "student": {}, "precompute": {}, "evaluate": {}}
    inputs: dict[str, Any] = {"evaluation": quality, **answered}
    return run_once("gap", Result, config, work, inputs=inputs, task=task, replaces={"task": task.name, "labels": ref, **groups})


def _write(stage: Stage, table: pa.Table, moved: Mapping[str, int], confidence: float) -> Result:
    stage.table("gap", table)
    rows = table.to_pylist()
    result = Result(verdicts=verdicts(rows, moved), real=significant_losses(rows))
    for text in result.verdicts.values():
        say(f"gap          {text}")
    for line in rows:
        where = f"{source_name(line['model'], line['shown'])}/{line['stratum']}"
        stage.metrics |= {f"{key}/{where}": line[key] for key in ("quality", "difference", "effect") if line[key] is not None}
    for text in gap_remarks(rows):
        stage.note(text)
    known = [line for line in rows if line["quality"] is not None]
    points = [
        charts.QualityPoint(_label(x["model"], x["shown"]), x["stratum"], *(x[key] for key in ("quality", "low", "high", "n")))
        for x in known
    ]
    stage.figure("gap", charts.quality_chart(points, confidence=confidence))
    return result


def source_name(model: str, side_inputs: bool) -> str:
    """The name of an answer source in the evaluation."""
    return model if side_inputs else f"{model}_without"


def gap_rows(rows: pa.Table, keys: pa.Array, models: Sequence[str], sure: Sureness) -> Iterator[dict[str, Any]]:
    """GAP rows from an evaluation's SCORED rows, over the labelled rows `keys` alone: strata that have any, then all."""
    whole = by_source(rows)[0]
    scored = {found.source: found for found in by_source(rows.filter(pc.is_in(rows["query_key"], value_set=keys)))}
    first = scored[source_name(models[0], True)]
    for model in models:
        for shown in (True, False):
            mine = scored[source_name(model, shown)]
            for stratum in (*STRATA, ALL):
                n = int(mine.where(stratum).sum())
                if not n:
                    continue
                found = quality_of(mine, stratum, sure)
                quality = interval_json(found) if found else {}
                line: dict[str, Any] = {
                    "model": model,
                    "shown": shown,
                    "stratum": stratum,
                    "labelled": int(whole.where(stratum).sum()),
                    "n": n,
                }
                line |= {"quality": quality.get("value"), "low": quality.get("low"), "high": quality.get("high")}
                if mine is not first:
                    line |= _minus("difference", mine, first, stratum, sure)
                if not shown:
                    line |= _minus("effect", mine, scored[source_name(model, True)], stratum, sure)
                yield line


def _minus(name: str, one: ScoredSource, other: ScoredSource, stratum: str, sure: Sureness) -> dict[str, Any]:
    """A paired difference on the rows of a stratum, as columns `name`, `name_low`, `name_high`."""
    found = paired_difference(one, other, stratum, sure)
    return {name: found["value"], f"{name}_low": found["low"], f"{name}_high": found["high"]}


def _of_all(rows: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Each model without side inputs, all strata together: what the verdicts are about."""
    return (line for line in rows if line["stratum"] == ALL and not line["shown"])


def significant_losses(rows: Sequence[Mapping[str, Any]]) -> dict[str, bool]:
    """Whether a model does worse without side inputs, by more than chance explains: the interval is wholly below zero."""
    return {line["model"]: line["effect"] is not None and line["effect_high"] < 0 for line in _of_all(rows)}


def verdicts(rows: Sequence[Mapping[str, Any]], moved: Mapping[str, int]) -> dict[str, str]:
    """A sentence for each model. `moved`: rows that it was asked otherwise without side inputs."""
    found = {}
    for line in _of_all(rows):
        model, n = line["model"], line["n"]
        sentence = f"{model}: "
        if not moved[model]:
            sentence += f"no gap: its prompt shows no side inputs, so all {n:,} rows were asked the same both times"
        elif line["effect"] is None:
            sentence += f"not known: nothing on the {n:,} rows can be scored"
        else:
            points = f"{100 * line['effect']:+.1f} points ({100 * line['effect_low']:+.1f} to {100 * line['effect_high']:+.1f})"
            kind = "the gap is real" if line["effect_high"] < 0 else "no gap shown"
            sentence += f"{kind}: {points} without side inputs, on {n:,} rows that have them"
        found[model] = sentence
    return found


def gap_remarks(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What a reader should know before trusting the figures."""
    first = [line for line in rows if (line["model"], line["shown"]) == (rows[0]["model"], True)]
    if unknown := [name for name in STRATA if name not in {line["stratum"] for line in first}]:
        yield f"{', '.join(unknown)}: no labelled row has side inputs, so their effect is not known"
    for line in first:
        if line["n"] < SMALL:
            yield f"{line['stratum']}: only {line['n']} labelled rows have side inputs; its intervals are wide"
    if significant_losses(rows).get(Source.BATCH_STUDENT):
        yield "the student depends on side inputs that live traffic does not have: distil with two_stage=true, and measure again"


def _count_different_prompts(store: Storage, keys: pa.Array, with_inputs: Receipt, without: Receipt) -> int:
    """How many of `keys` a model was asked in other words, or at all only one of the two times."""
    asked = []
    for receipt in (with_inputs, without):
        tables = [t.filter(pc.is_in(t["query_key"], value_set=keys)) for t in read_answers(store, receipt, ["query_key", "answer_key"])]
        asked.append({pair for t in tables for pair in zip(t["query_key"].to_pylist(), t["answer_key"].to_pylist(), strict=True)})
    return len({key for key, _ in asked[0] ^ asked[1]})


def _models(config: Config) -> dict[str, ModelConfig]:
    return {str(Source.TEACHER): config.teacher, **({str(Source.BATCH_STUDENT): config.student} if config.student else {})}


def _label(model: str, side_inputs: bool) -> str:
    return model if side_inputs else f"{model}, not shown"
