"""The stages as commands: run one, show what a person wants to know after it, list its fields.

Knows no stage's fields: they come from its Config. Only precompute has flags of its own (`--dry-run`, `--apply`).
"""

from __future__ import annotations

import importlib
import json
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from rich.table import Table

from headtail.adapters.progress import console, say
from headtail.cli.options import MODULES, STAGES, AsJson, ConfigFile, Root, Sets, read_config
from headtail.core.errors import ConfigError
from headtail.core.receipt import Receipt


def run_stage(name: str, file: Path | None, sets: list[str] | None, root: str | None, as_json: bool) -> Receipt:
    """Run a stage and print its receipt."""
    config = read_config(name, file, sets, root)
    receipt: Receipt = importlib.import_module(STAGES[name][0]).run(config)
    _end(name, receipt, config.root, as_json)
    return receipt


def _end(name: str, receipt: Receipt, root: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps(receipt.model_dump(mode="json"), ensure_ascii=False), flush=True)
    else:
        show(name, receipt, root)


def show(name: str, receipt: Receipt, root: str) -> None:
    """What a person wants to know after a stage."""
    if name == "pipeline":
        _show_pipeline(root)
        return
    rows = ", ".join(f"{key} {value:,}" for key, value in receipt.rows.items())
    say(f"{name:<12} {rows or 'done'}  ({receipt.seconds:.1f} s)")
    say(f"{'':<12} {root.rstrip('/')}/{receipt.path}/receipt.json")


def _show_pipeline(root: str) -> None:
    from headtail.adapters.storage import open_storage, read_json
    from headtail.stages import report

    store = open_storage(root)
    summary = read_json(store, "summary.json")
    console.print(report.table(summary, console.width))
    say("")
    say(f"Open the report:        {store.uri(summary['paths']['report'])}")
    say("Review in MLflow:       make ui")
    say("Ask the release:        make serve, then curl 'localhost:8000/v1/answer?query=...'")
    say("Look a query up:        headtail lookup --root " + root + " 'pizza near me'")


def _command(name: str) -> Callable[..., None]:
    def command(config: ConfigFile = None, sets: Sets = None, root: Root = None, as_json: AsJson = False) -> None:
        run_stage(name, config, sets, root, as_json)

    command.__doc__ = f"{STAGES[name][1][0].upper()}{STAGES[name][1][1:]}."
    return command


DryRun = Annotated[bool, typer.Option("--dry-run", help="say what would be asked, why, and what it would cost; then stop")]
Apply = Annotated[bool, typer.Option("--apply", help="print what would be asked, do it, and say what came of it")]
ProbeRows = Annotated[
    int | None,
    typer.Option(
        "--probe", min=0, help="rows that may be asked for the estimate; their answers are taken over; 0 asks none. 1000 with --dry-run"
    ),
]


def _precompute(
    config: ConfigFile = None,
    sets: Sets = None,
    root: Root = None,
    as_json: AsJson = False,
    dry_run: DryRun = False,
    apply: Apply = False,
    probe: ProbeRows = None,
) -> None:
    """Answer tables of queries with a teacher or a batch student."""
    if not (dry_run or apply):
        if probe is not None:
            raise ConfigError("a probe is part of a dry run", where="--probe", value=probe, fix="add --dry-run or --apply")
        run_stage("precompute", config, sets, root, as_json)
        return
    from headtail.stages import precompute
    from headtail.stages.precompute.dry_run.preview import ROWS
    from headtail.stages.precompute.dry_run.shown import outcome, shown

    found = read_config("precompute", config, sets, root)
    assert isinstance(found, precompute.Config)
    planned = precompute.forecast(found, probe if probe is not None else ROWS if dry_run else 0)
    console.print(shown(planned))
    if not apply:
        if as_json:
            print(planned.model_dump_json(), flush=True)
        return
    receipt = precompute.run(found, planned)
    _end("precompute", receipt, found.root, as_json)
    if not receipt.reused:
        console.print(outcome(receipt.facts["dry_run"]))


def fields(stage: Annotated[str, typer.Argument(help="a command, such as plan")]) -> None:
    """List every field of a stage's config: name, default, what it is."""
    if stage not in MODULES:
        raise ConfigError("no such stage", where="headtail fields", value=stage, fix=f"one of: {', '.join(MODULES)}")
    kind = importlib.import_module(MODULES[stage]).Config
    table = Table("field", "default", "what it is", title=f"headtail {stage}", title_justify="left")
    for path, default, text in _fields(kind, ""):
        table.add_row(path, default, text)
    console.print(table)


def _fields(kind: type[BaseModel], prefix: str) -> list[tuple[str, str, str]]:
    rows = []
    for name, field in kind.model_fields.items():
        inner = next((t for t in _kinds(field.annotation) if isinstance(t, type) and issubclass(t, BaseModel)), None)
        if inner is not None and typing.get_origin(field.annotation) not in (tuple, list, dict):
            rows += _fields(inner, f"{prefix}{name}.")
        else:
            shown = "required" if field.is_required() else str(field.default if field.default is not None else "null")
            rows.append((prefix + name, shown, field.description or ""))
    return rows


def _kinds(annotation: Any) -> tuple[Any, ...]:
    return typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)


def serve(config: ConfigFile = None, sets: Sets = None, root: Root = None) -> None:
    """Serve the current release: cache, then realtime student, then fallback. Stops with Ctrl-C."""
    from headtail.stages import serve as stage

    found = read_config("serve", config, sets, root)
    assert isinstance(found, stage.Config)
    stage.run_forever(found)


def add(app: typer.Typer) -> None:
    """Every stage, `fields` and `serve`."""
    about = "Every field that --config and --set take, with its meaning: headtail fields"
    for name in STAGES:
        app.command(name, epilog=f"{about} {name}")(_precompute if name == "precompute" else _command(name))
    app.command()(fields)
    app.command(epilog=f"{about} serve")(serve)
