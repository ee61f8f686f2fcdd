"""Flags of every command, the config that they give, and the commands by role.

In: `--config FILE`, `--set path.to.field=value`, `--root`. Out: a validated config, or the root of a store.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated

import typer

from headtail.core.config import StageConfig, apply_sets, load_config, read_yaml

# command -> (module that has Config and run, one line of help)
STAGES: dict[str, tuple[str, str]] = {
    "pipeline": ("headtail.pipeline", "Run every stage once: query log in, release and report out."),
    "example-data": ("headtail.examples.example_data", "Make an example query log whose right answers are known."),
    "ingest": ("headtail.stages.ingest", "Read a query log: normalise, redact, count, hold out a day."),
    "plan": ("headtail.stages.plan", "Split head from tail; coverage curve. No model is needed."),
    "precompute": ("headtail.stages.precompute", "Have a model answer tables of queries; --dry-run estimates."),
    "publish": ("headtail.stages.publish", "Make a cache snapshot of answers the current release."),
    "evaluate": ("headtail.stages.evaluate", "Compare answers with human labels, by stratum."),
    "judge": ("headtail.stages.judge", "Have a model judge answers; say how far it agrees with people."),
    "curate": ("headtail.stages.curate", "Choose what a student learns from; rank suspect answers."),
    "feedback": ("headtail.stages.feedback", "Turn callers' feedback into a review queue and labels."),
    "shadow": ("headtail.stages.shadow", "Say how served answers agree with another model's."),
    "experiment": ("headtail.stages.experiment", "Say what an A/B shows, and whether it holds for all traffic."),
    "gate": ("headtail.stages.gate", "Prove that a student is good enough, or say what is missing."),
    "calibrate": ("headtail.stages.calibrate", "Prove from which confidence on a student is right enough."),
    "report": ("headtail.stages.report", "Write one page and one JSON with the figures of given runs."),
    "distill": ("headtail.stages.distill", "Train a student on the training set."),
    "sweep": ("headtail.stages.distill.sweep", "Train a student for each point of a grid; name the best."),
    "ablate": ("headtail.studies.ablate", "Measure what curation is worth, by one student per variant."),
    "gap": ("headtail.studies.gap", "Measure what side inputs are worth to teacher and student."),
    "reference": ("headtail.studies.reference", "Train the shipped placeholder models from scratch."),
    "simulate": ("headtail.stages.simulate", "Compare designs of a server: latency, machines, cost, quality."),
    "replay": ("headtail.stages.replay", "Send holdout traffic to a running server and measure it."),
}

# The commands of `headtail --help`, by the roles of docs/README.md
PANELS: dict[str, tuple[str, ...]] = {
    "Start here": ("doctor", "pipeline", "status", "fields"),
    "I want answers": ("example-data", "ingest", "plan", "precompute", "publish", "lookup"),
    "I review quality": (
        "labels",
        "evaluate",
        "judge",
        "curate",
        "review",
        "feedback",
        "shadow",
        "gate",
        "calibrate",
        "experiment",
        "report",
    ),
    "I train students": ("distill", "sweep"),
    "I operate": ("serve", "replay", "simulate", "release", "override", "delete", "rollback", "diff", "gc", "keys"),
    "I measure methods": ("gap", "ablate", "reference"),
}

MODULES = {
    **{name: module for name, (module, _) in STAGES.items()},
    "serve": "headtail.stages.serve",
    "review": "headtail.review",
    "labels": "headtail.review.label_draw",
}
REJECTED = 4  # exit code under --strict
STOPPED = 130  # exit code after Ctrl-C

ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file with the command's fields", metavar="FILE")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", help="one field over the file's: path.to.field=value (repeatable)", metavar="FIELD=VALUE")
]
Root = Annotated[str | None, typer.Option("--root", help="store: a directory or s3://bucket/prefix", metavar="DIR")]
AsJson = Annotated[bool, typer.Option("--json", help="print the result as JSON, as the last line of stdout and nothing else there")]
Strict = Annotated[bool, typer.Option("--strict", help=f"exit code {REJECTED} when a gate rejects; without it a rejection is exit code 0")]


def read_config(name: str, file: Path | None, sets: list[str] | None, root: str | None) -> StageConfig:
    """The validated config of a command from a file and flags."""
    kind = importlib.import_module(MODULES[name]).Config
    found: StageConfig = load_config(kind, file, [*(sets or []), *([f"root={root}"] if root is not None else [])], name=name)
    return found


def root_of(file: Path | None, sets: list[str] | None, root: str | None) -> str:
    """The store that these flags name. Any stage's or pipeline's config file will do: only its `root` is read."""
    data = apply_sets(read_yaml(file) if file else {}, sets or [])
    return str(data.get("root", StageConfig().root)) if root is None else root
