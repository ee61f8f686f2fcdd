"""What every command takes, and how a config comes of it.

In: `--config FILE`, `--set path.to.field=value`, `--root`. Out: a validated config, or the root of a store.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated

import typer

from headtail.core.config import StageConfig, apply_sets, load, read_yaml

# command -> (module that has Config and run, one line of help)
STAGES: dict[str, tuple[str, str]] = {
    "example-data": ("headtail.examples.example_data", "make an example query log whose right answers are known"),
    "ingest": ("headtail.stages.ingest", "read a query log: normalise, redact, count; hold out holdout traffic"),
    "plan": ("headtail.stages.plan", "draw the line between head and tail; coverage curve; strata"),
    "precompute": ("headtail.stages.precompute", "answer tables of queries with a teacher or a batch student"),
    "evaluate": ("headtail.stages.evaluate", "compare answers with people's, by stratum, with intervals"),
    "curate": ("headtail.stages.curate", "choose the training rows a student learns from"),
    "gate": ("headtail.stages.gate", "prove that a student or a snapshot is good enough, or say what is missing"),
    "distill": ("headtail.stages.distill", "fine-tune a student on the training rows"),
    "sweep": ("headtail.stages.distill.sweep", "train a student for each point of a grid and name the best"),
    "ablate": (
        "headtail.studies.ablate",
        "what curation is worth: a student from each kind of training set, judged on the same human labels",
    ),
    "gap": (
        "headtail.studies.gap",
        "what side inputs are worth: teacher and student asked with them and without, on the same human labels",
    ),
    "publish": ("headtail.stages.publish", "build a cache snapshot and promote it as the current release"),
    "replay": ("headtail.stages.replay", "send holdout traffic to a running server and measure"),
    "report": ("headtail.stages.report", "write the page people look at"),
    "pipeline": ("headtail.pipeline", "the whole way once round"),
    "reference": ("headtail.studies.reference", "train the shipped placeholder teacher and students' base from scratch"),
}

MODULES = {**{name: module for name, (module, _) in STAGES.items()}, "serve": "headtail.stages.serve", "review": "headtail.review"}

ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file with the stage's fields", metavar="FILE")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", help="one field over the file's: path.to.field=value (repeatable)", metavar="FIELD=VALUE")
]
Root = Annotated[str | None, typer.Option("--root", help="store: a directory or s3://bucket/prefix", metavar="DIR")]
AsJson = Annotated[bool, typer.Option("--json", help="print the receipt as the last line of stdout, and nothing else there")]


def read_config(name: str, file: Path | None, sets: list[str] | None, root: str | None) -> StageConfig:
    """The validated config of a stage from a file and flags."""
    kind = importlib.import_module(MODULES[name]).Config
    found: StageConfig = load(kind, file, [*(sets or []), *([f"root={root}"] if root is not None else [])])
    return found


def root_of(file: Path | None, sets: list[str] | None, root: str | None) -> str:
    """The store that these flags name. Any stage's or pipeline's config file will do: only its `root` is read."""
    data = apply_sets(read_yaml(file) if file else {}, sets or [])
    return str(data.get("root", StageConfig().root)) if root is None else root
