"""The stages as commands: run one, and show what a person wants to know after it.

Knows no stage's fields: they come from its Config. Flags of their own have precompute (`--dry-run`, `--apply`), gate and
pipeline (`--strict`).
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headtail.adapters.progress import answers, console, say
from headtail.cli.options import REJECTED, STAGES, AsJson, ConfigFile, Root, Sets, Strict, read_config
from headtail.core.errors import ConfigError
from headtail.core.receipt import Receipt

if TYPE_CHECKING:
    from headtail.stages.report.tree import Summary


def run_stage(name: str, file: Path | None, sets: list[str] | None, root: str | None, as_json: bool) -> tuple[Receipt[Any], str]:
    """Run a stage and print its receipt; the receipt and the store's root."""
    config = read_config(name, file, sets, root)
    stage = importlib.import_module(STAGES[name][0])
    with redirect_stdout(sys.stderr):  # Ray says on stdout that a worker died: that is no answer
        receipt: Receipt[Any] = stage.run(config)
    _end(name, receipt, config.root, as_json)
    return receipt, config.root


def _end(name: str, receipt: Receipt, root: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps(receipt.model_dump(mode="json"), ensure_ascii=False), flush=True)
    else:
        show(name, receipt, root)


def show(name: str, receipt: Receipt[Any], root: str) -> None:
    """What a person wants to know after a stage."""
    if name == "pipeline":
        _show_pipeline(receipt.result.summary, root)
        return
    rows = ", ".join(f"{key} {value:,}" for key, value in receipt.rows.items())
    say(f"{name:<12} {rows or 'done'}  ({receipt.seconds:.1f} s)")
    say(f"{'':<12} {root.rstrip('/')}/{receipt.path}/receipt.json")


def _show_pipeline(summary: Summary, root: str) -> None:
    from headtail.adapters.storage import open_storage
    from headtail.stages import report

    console.print(report.summary_table(summary, console.width))
    say("")
    say(f"Open the report:        {open_storage(root).uri(summary.paths['report'])}")
    say("Review in MLflow:       make ui")
    say("Ask the release:        make serve, then curl 'localhost:8000/v1/answer?query=...'")
    say("Look a query up:        headtail lookup --root " + root + " 'pizza near me'")


def _plain(name: str) -> Callable[..., None]:
    def run(config: ConfigFile = None, sets: Sets = None, root: Root = None, as_json: AsJson = False) -> None:
        run_stage(name, config, sets, root, as_json)

    return run


def _gate(config: ConfigFile = None, sets: Sets = None, root: Root = None, as_json: AsJson = False, strict: Strict = False) -> None:
    receipt, _ = run_stage("gate", config, sets, root, as_json)
    if strict and not receipt.result.passed:
        raise typer.Exit(REJECTED)


def _pipeline(config: ConfigFile = None, sets: Sets = None, root: Root = None, as_json: AsJson = False, strict: Strict = False) -> None:
    receipt, store = run_stage("pipeline", config, sets, root, as_json)
    if strict and (reason := _rejection(receipt, store)):
        say(f"--strict     {reason}: exit code {REJECTED}")
        raise typer.Exit(REJECTED)


def _rejection(receipt: Receipt, root: str) -> str:
    """Why a pipeline, by the receipt of its report, counts as rejected; empty when every student passed its gate."""
    from headtail.adapters.storage import open_storage
    from headtail.adapters.storage.receipts import load_receipt
    from headtail.stages.gate import Result

    store = open_storage(root)
    gates = [load_receipt(store, "gate", path, Result).result for path in receipt.inputs.values() if path.startswith("gate/")]
    if not gates:
        return "no gate ran, since there are no human labels"
    return "; ".join(f"{gate.evidence.candidate} ({gate.evidence.source}) is rejected" for gate in gates if not gate.passed)


DryRun = Annotated[bool, typer.Option("--dry-run", help="show which rows would be asked, why, and what they would cost; then stop")]
Apply = Annotated[bool, typer.Option("--apply", help="show the same, run the job, and compare the estimate with what happened")]
ProbeRows = Annotated[
    int | None,
    typer.Option(
        "--probe", min=0, help="rows to ask for the estimate; the job reuses their answers; 0 asks none. Default with --dry-run: 1000"
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
    if not (dry_run or apply):
        if probe is not None:
            raise ConfigError("--probe works only with --dry-run or --apply", where="--probe", value=probe, fix="add --dry-run or --apply")
        run_stage("precompute", config, sets, root, as_json)
        return
    from headtail.stages import precompute
    from headtail.stages.precompute.dry_run.preview import ROWS
    from headtail.stages.precompute.dry_run.terminal import outcome_table, preview_tables

    found = read_config("precompute", config, sets, root)
    assert isinstance(found, precompute.Config)
    with redirect_stdout(sys.stderr):
        planned = precompute.forecast(found, probe if probe is not None else ROWS if dry_run else 0)
    (console if apply or as_json else answers).print(preview_tables(planned))
    if not apply:
        if as_json:
            print(planned.model_dump_json(), flush=True)
        return
    with redirect_stdout(sys.stderr):
        receipt = precompute.run(found, planned)
    _end("precompute", receipt, found.root, as_json)
    if not receipt.reused:
        console.print(outcome_table(receipt.result.dry_run))


def serve(config: ConfigFile = None, sets: Sets = None, root: Root = None) -> None:
    """Answer live queries over HTTP: cache, student, fallback.

    It serves the current release until Ctrl-C. A page to try it is on the port after it.
    """
    from headtail.stages import serve as stage

    found = read_config("serve", config, sets, root)
    assert isinstance(found, stage.Config)
    stage.run_forever(found)


def epilog(name: str) -> str:
    """Where the fields of a command's config are listed."""
    return f"Every field that --config and --set take, with its meaning: headtail fields {name}"


def command(name: str) -> Callable[..., None]:
    """The command that runs a stage."""
    special: dict[str, Callable[..., None]] = {"precompute": _precompute, "gate": _gate, "pipeline": _pipeline}
    return special.get(name) or _plain(name)
