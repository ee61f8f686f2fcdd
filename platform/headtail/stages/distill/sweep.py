"""Sweep: one student per point of a grid, each a distill of its own, all under one parent run in MLflow.

In: a distill config and lists of values for some of its fields. Out: a table of trials, and which was best. A trial is an
ordinary distill receipt: a sweep that was killed, or one with further values, trains only what is not there yet. A plain
grid, no search: a dozen runs of minutes need no scheduler that stops half of them by their first steps.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import Field

from headtail.adapters.progress import say
from headtail.core.config import StageConfig, build_config
from headtail.core.errors import ConfigError, TrainingError
from headtail.core.paths import StorePath
from headtail.core.receipt import Receipt, StageResult
from headtail.stages import distill
from headtail.stages.base import Stage, run_once

MAX_TRIALS = 256


class Config(StageConfig):
    """What is tried."""

    base: distill.Config = Field(distill.Config(), description="the student, but for the fields in grid")
    grid: dict[str, tuple[Any, ...]] = Field(
        {"learning_rate": (1e-3, 2e-3, 4e-3)}, description="values by field (lora.rank, seed, ...); every combination is a trial"
    )
    metric: str = Field("eval_loss", description="metric of a trial's receipt that decides which is best; lower is better")


class Result(StageResult):
    """The best trial."""

    best: StorePath = Field(description="folder of its distill receipt")
    best_trial: str = Field(description="its values, in words")
    best_values: dict[str, Any] = Field(description="its values by field")


class Trial(NamedTuple):
    """One point of the grid."""

    label: str  # "learning_rate=0.001, lora.rank=8"
    values: dict[str, Any]
    config: distill.Config


def run(config: Config) -> Receipt[Result]:
    """Train every trial, name the best. ConfigError before any training when a point is no valid config; TrainingError when all fail."""
    tried = trials(config)
    marks = {f"trial.{number:03}": distill.student_fingerprint(trial.config) for number, trial in enumerate(tried)}
    return run_once("sweep", Result, config, lambda stage: _work(config, stage, tried), inputs=marks, replaces={"base": {}, "grid": {}})


def trials(config: Config) -> list[Trial]:
    """The points of the grid, in order: the last field's values change fastest."""
    names = list(config.grid)
    points = list(itertools.product(*config.grid.values()))
    if not points or len(points) > MAX_TRIALS:
        raise ConfigError(
            f"a sweep has 1 to {MAX_TRIALS} trials",
            where="grid",
            value=len(points),
            fix="give every field at least one value, or fewer values in all",
        )
    plain = config.base.model_dump() | {
        "root": config.root,
        "allow_task_code": config.allow_task_code,
        "tracking": config.tracking.model_dump(),
    }
    found = []
    for point in points:
        values = dict(zip(names, point, strict=True))
        label = ", ".join(f"{name}={json.dumps(value)}" for name, value in values.items()) or "base"
        found.append(Trial(label, values, build_config(distill.Config, overlay_fields(plain, values), where=f"grid: {label}")))
    return found


def overlay_fields(plain: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """`plain` with each `path.to.field` set. A group that is null becomes one, with the defaults of its other fields."""
    data: dict[str, Any] = copy.deepcopy(dict(plain))
    for path, value in values.items():
        *parents, last = path.split(".")
        node = data
        for name in parents:
            if not isinstance(node.get(name), dict):
                node[name] = {}
            node = node[name]
        node[last] = value
    return data


def _work(config: Config, stage: Stage, tried: Sequence[Trial]) -> Result:
    table = []
    for number, trial in enumerate(tried):
        say(f"sweep        trial {number + 1} of {len(tried)}: {trial.label}")
        table.append(_run_trial(config, stage, number, trial))
    done = [row for row in table if row["path"]]
    if not done:
        raise TrainingError("every trial failed", where="grid", value=table[0]["reason"], fix="correct the base config")
    best = min(done, key=lambda row: row["value"])
    stage.rows |= {"trials": len(table), "failed": len(table) - len(done), "reused": sum(row["reused"] for row in done)}
    stage.metrics |= {f"best/{config.metric}": best["value"], f"worst/{config.metric}": max(row["value"] for row in done)}
    stage.inputs |= {f"trial.{row['number']:03}": row["path"] for row in done}
    stage.json("trials", table)
    if len(done) < len(table):
        stage.note(f"{len(table) - len(done)} of {len(table)} trials failed; see trials.json")
    say(f"sweep        best of {len(done)}: {best['trial']}, {config.metric} {best['value']:.4f} ({best['path']})")
    return Result(best=best["path"], best_trial=best["trial"], best_values=best["values"])


def _run_trial(config: Config, stage: Stage, number: int, trial: Trial) -> dict[str, Any]:
    row: dict[str, Any] = {"number": number, "trial": trial.label, "values": trial.values, "path": "", "value": None, "reason": ""}
    tracking = config.tracking.model_copy(update={"parent_run": stage.run_id, "run_name": trial.label})
    try:
        receipt = distill.run(trial.config.model_copy(update={"tracking": tracking}))
    except TrainingError as error:  # it diverged: an answer too. Other errors end the sweep
        return {**row, "reason": str(error)}
    value = receipt.metrics.get(config.metric)
    if value is None:
        raise ConfigError(
            "a trial has no such metric", where="metric", value=config.metric, fix=f"one of: {', '.join(sorted(receipt.metrics))}"
        )
    if receipt.reused:
        _log_earlier_trial(config, stage, trial, receipt)
    if not math.isfinite(value):
        return {**row, "reason": f"{config.metric} is {value}: no held-out rows?"}
    kept = ("train_loss", "eval_loss", "steps", "train_seconds", "real_token_share", "params")
    figures = {name: receipt.metrics[name] for name in kept if name in receipt.metrics}
    return {**row, "path": receipt.path, "value": value, "reused": receipt.reused, **figures}


def _log_earlier_trial(config: Config, stage: Stage, trial: Trial, receipt: Receipt) -> None:
    """A trial that was done before has its run under another parent: it gets one here too, that says so."""
    tags = {"headtail.path": receipt.path, "headtail.fingerprint": receipt.fingerprint, "headtail.first_run": receipt.run_id}
    tracker = stage.tracker
    run_id = tracker.start(f"{trial.label} (done before)", tags, parent=stage.run_id)
    tracker.log(run_id, trial.values, receipt.metrics)
    tracker.end(run_id)
