"""The command line: one command per station, the same flags everywhere, errors that say what to do.

In: `--config FILE`, `--set path.to.field=value`, `--root`. Out: lines and bars on stderr; with `--json` the Receipt as the
last line of stdout. jobs/*.py go through the same door (`job`). Knows no stage's fields: they come from its Config.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from rich.table import Table

from headtail import __version__
from headtail.config import StageConfig, apply_sets, load, read_yaml
from headtail.errors import ConfigError, HeadtailError
from headtail.progress import console, quiet, say
from headtail.receipt import Receipt

# command -> (module that has Config and run, one line of help)
STAGES: dict[str, tuple[str, str]] = {
    "world": ("headtail.examples.world", "make an example query log whose right answers are known"),
    "ingest": ("headtail.querylog", "read a query log: normalise, redact, count; hold out later traffic"),
    "plan": ("headtail.plan", "draw the line between head and tail; coverage curve; strata"),
    "precompute": ("headtail.precompute", "answer tables of queries with a teacher or a batch student"),
    "evaluate": ("headtail.evaluate", "compare answers with people's, by stratum, with intervals"),
    "curate": ("headtail.curate", "choose the golden rows a student learns from"),
    "gate": ("headtail.gate", "prove that a student or a generation is good enough, or say what is missing"),
    "distill": ("headtail.distill", "fine-tune a student on the golden rows"),
    "publish": ("headtail.publish", "build a cache generation and promote it as the current release"),
    "replay": ("headtail.replay", "send later traffic to a running server and measure"),
    "report": ("headtail.report", "write the page people look at"),
    "loop": ("headtail.loop", "the whole way once round"),
    "reference": ("headtail.reference", "train the shipped stand-in teacher and students' base from scratch"),
}

app = typer.Typer(
    name="headtail",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="An LLM's answers for all of your traffic, at a cost you can bear.",
    epilog="Start with: headtail loop --config jobs/configs/run_loop.laptop.yaml",
)

ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file with the stage's fields", metavar="FILE")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", help="one field over the file's: path.to.field=value (repeatable)", metavar="FIELD=VALUE")
]
Root = Annotated[str | None, typer.Option("--root", help="store: a directory or s3://bucket/prefix", metavar="DIR")]
AsJson = Annotated[bool, typer.Option("--json", help="print the receipt as the last line of stdout, and nothing else there")]


def read_config(name: str, file: Path | None, sets: list[str] | None, root: str | None) -> StageConfig:
    """The validated config of a stage from a file and flags."""
    kind = importlib.import_module(STAGES[name][0] if name in STAGES else f"headtail.{name}").Config
    found: StageConfig = load(kind, file, [*(sets or []), *([f"root={root}"] if root else [])])
    return found


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
    if name == "loop":
        _show_loop(root)
        return
    rows = ", ".join(f"{key} {value:,}" for key, value in receipt.rows.items())
    say(f"{name:<12} {rows or 'done'}  ({receipt.seconds:.1f} s)")
    say(f"{'':<12} {root.rstrip('/')}/{receipt.path}/receipt.json")


def _show_loop(root: str) -> None:
    from headtail import report
    from headtail.storage import open_storage, read_json

    summary = read_json(open_storage(root), "summary.json")
    console.print(report.table(summary))
    say(f"{summary['stations']} stations, {summary['stations_reused']} of them found done, {summary['loop_seconds']:.0f} s")
    say("")
    say(f"Open the report:        {summary['paths']['report']}")
    say("Review in MLflow:       make ui")
    say("Ask the release:        make serve, then curl 'localhost:8000/v1/answer?query=...'")
    say("Look a query up:        headtail lookup --root " + root + " 'pizza near me'")


def _command(name: str) -> Callable[..., None]:
    def command(config: ConfigFile = None, sets: Sets = None, root: Root = None, as_json: AsJson = False) -> None:
        run_stage(name, config, sets, root, as_json)

    command.__doc__ = f"{STAGES[name][1][0].upper()}{STAGES[name][1][1:]}."
    return command


Plan = Annotated[bool, typer.Option("--plan", help="say what would be asked, why, and what it would cost; then stop")]
Apply = Annotated[bool, typer.Option("--apply", help="print the plan, do it, and say what came of it")]
ProbeRows = Annotated[
    int | None,
    typer.Option(
        "--probe", min=0, help="rows that may be asked for the estimate; their answers are taken over; 0 asks none. 1000 with --plan"
    ),
]


def _precompute(
    config: ConfigFile = None,
    sets: Sets = None,
    root: Root = None,
    as_json: AsJson = False,
    plan: Plan = False,
    apply: Apply = False,
    probe: ProbeRows = None,
) -> None:
    """Answer tables of queries with a teacher or a batch student."""
    if not (plan or apply):
        if probe is not None:
            raise ConfigError("a probe is part of a plan", where="--probe", value=probe, fix="add --plan or --apply")
        run_stage("precompute", config, sets, root, as_json)
        return
    from headtail import precompute
    from headtail.generate.preview import ROWS
    from headtail.generate.shown import outcome, shown

    found = read_config("precompute", config, sets, root)
    assert isinstance(found, precompute.Config)
    planned = precompute.plan(found, probe if probe is not None else ROWS if plan else 0)
    console.print(shown(planned))
    if not apply:
        if as_json:
            print(planned.model_dump_json(), flush=True)
        return
    receipt = precompute.run(found, planned)
    _end("precompute", receipt, found.root, as_json)
    if not receipt.reused:
        console.print(outcome(receipt.facts["planned"]))


for _name in STAGES:
    _epilog = f"Every field that --config and --set take, with its meaning: headtail fields {_name}"
    app.command(_name, epilog=_epilog)(_precompute if _name == "precompute" else _command(_name))


@app.command()
def fields(stage: Annotated[str, typer.Argument(help="a command, such as plan")]) -> None:
    """List every field of a stage's config: name, default, what it is."""
    if stage not in {*STAGES, "serve", "review"}:
        raise ConfigError("no such stage", where="headtail fields", value=stage, fix=f"one of: {', '.join([*STAGES, 'serve', 'review'])}")
    kind = importlib.import_module(STAGES[stage][0] if stage in STAGES else f"headtail.{stage}").Config
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


@app.command(epilog="Every field that --config and --set take, with its meaning: headtail fields serve")
def serve(config: ConfigFile = None, sets: Sets = None, root: Root = None) -> None:
    """Serve the current release: cache, then live student, then fallback. Stops with Ctrl-C."""
    from headtail import serve as stage

    found = read_config("serve", config, sets, root)
    assert isinstance(found, stage.Config)
    stage.run_forever(found)


def _root_of(file: Path | None, sets: list[str] | None, root: str | None) -> str:
    """The store that these flags name. Any stage's or loop's config file will do: only its `root` is read."""
    data = apply_sets(read_yaml(file) if file else {}, sets or [])
    return root or str(data.get("root") or StageConfig().root)


@app.command()
def lookup(query: str, config: ConfigFile = None, sets: Sets = None, root: Root = None, as_json: AsJson = False) -> None:
    """Answer one query from the published generation, and say where the answer comes from. Exit code 3 on a miss."""
    from headtail import release
    from headtail.storage import open_storage

    found = release.lookup(open_storage(_root_of(config, sets, root)), query)
    print(json.dumps(found, ensure_ascii=False, indent=None if as_json else 2))
    if not found["cached"]:
        raise typer.Exit(3)


@app.command()
def rollback(config: ConfigFile = None, sets: Sets = None, root: Root = None, as_json: AsJson = False) -> None:
    """Make the previous release current again."""
    from headtail import release
    from headtail.storage import open_storage

    now = release.rollback(open_storage(_root_of(config, sets, root)))
    say(f"current release: {now.id} (generation {now.generation})")
    if as_json:
        print(now.model_dump_json())


review_app = typer.Typer(name="review", no_args_is_help=True, help="Look at the answers that are likely to be wrong, and decide.")
app.add_typer(review_app)
ReviewFile = Annotated[Path, typer.Argument(help="CSV (.csv), JSON Lines (.jsonl) or Label Studio (.json)", metavar="FILE")]
ReviewKind = Annotated[str, typer.Option("--format", help="csv, jsonl or labelstudio; else known by the file's ending")]


def _review(file: Path | None, sets: list[str] | None, root: str | None) -> Any:
    return read_config("review", file, sets, root)


@review_app.command("export")
def review_export(
    file: ReviewFile,
    rows: Annotated[int, typer.Option("--rows", help="the first so many by expected gain; 0: all", min=0)] = 0,
    decided: Annotated[bool, typer.Option("--decided", help="also what is decided, with the decision")] = False,
    kind: ReviewKind = "",
    config: ConfigFile = None,
    sets: Sets = None,
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Write the queue to a file."""
    from headtail import review

    made = review.export_file(_review(config, sets, root), file, kind, rows, decided)
    if as_json:
        print(json.dumps(dataclasses.asdict(made), ensure_ascii=False, default=str))


@review_app.command("import")
def review_import(
    file: ReviewFile, kind: ReviewKind = "", config: ConfigFile = None, sets: Sets = None, root: Root = None, as_json: AsJson = False
) -> None:
    """Record the decisions in a file; a second time nothing. Exit code 1 when rows were set aside."""
    from headtail import review

    made = review.import_file(_review(config, sets, root), file, kind)
    if as_json:
        print(json.dumps(dataclasses.asdict(made), ensure_ascii=False))
    if made.problems:
        raise typer.Exit(1)


@review_app.command("serve")
def review_serve(config: ConfigFile = None, sets: Sets = None, root: Root = None) -> None:
    """Show the queue on a page of this machine. Stops with Ctrl-C; every decision is recorded at once."""
    from headtail import review

    review.serve(_review(config, sets, root))


@app.command()
def diff(
    before: Annotated[str, typer.Argument(help="a generation's or release's id, `current` or `previous`")],
    after: Annotated[str, typer.Argument(help="the same")],
    examples: Annotated[int, typer.Option("--examples", help="queries shown of each kind, the most frequent first")] = 10,
    config: ConfigFile = None,
    sets: Sets = None,
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """What changed between two generations: rows added, dropped, changed, with the traffic they stand for."""
    from headtail import release
    from headtail.cache.diff import diff_table
    from headtail.storage import open_storage

    found = release.diff(open_storage(_root_of(config, sets, root)), before, after, examples)
    if as_json:
        print(found.model_dump_json())
    else:
        console.print(diff_table(found))


@app.command()
def gc(
    keep: Annotated[int, typer.Option("--keep", help="releases of the history that stay, the current one included")] = 5,
    days: Annotated[float, typer.Option("--days", help="generations younger than this many days stay")] = 14,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show what would go, and its bytes; remove nothing")] = False,
    config: ConfigFile = None,
    sets: Sets = None,
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Remove old generations that no kept release needs, and what killed writes left behind."""
    from headtail import release
    from headtail.cache.collect import collected_table
    from headtail.storage import open_storage

    found = release.collect(open_storage(_root_of(config, sets, root)), keep, days, dry_run)
    if as_json:
        print(found.model_dump_json())
    else:
        console.print(collected_table(found))


@app.command()
def status(config: ConfigFile = None, sets: Sets = None, root: Root = None, as_json: AsJson = False) -> None:
    """What is in a store: the latest run of each station and the current release."""
    from headtail.status import status as read
    from headtail.status import status_table

    found = read(_root_of(config, sets, root))
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
    else:
        console.print(status_table(found))


@app.command()
def doctor(config: ConfigFile = None, sets: Sets = None, root: Root = None, as_json: AsJson = False) -> None:
    """Check versions, device, model, store, token and ports before they cost anything. Takes a loop's config."""
    from headtail import doctor as checks
    from headtail import loop

    found = read_config("loop", config, sets, root)
    assert isinstance(found, loop.Config)
    results = checks.examine(found)
    if as_json:
        print(json.dumps([result.model_dump() for result in results], ensure_ascii=False))
    else:
        console.print(checks.table(results))
    if any(result.status == "bad" for result in results):
        raise typer.Exit(1)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="print the version and leave")] = False,
    silent: Annotated[bool, typer.Option("--quiet", help="no bars, no lines")] = False,
) -> None:
    if version:
        print(f"headtail {__version__}")
        raise typer.Exit
    quiet(silent)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: deliberate errors as three lines and an exit code, Ctrl-C as 130."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        code = app(arguments, standalone_mode=False)
    except HeadtailError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        print("stopped; what is finished stays, run again to go on", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")) and hasattr(error, "format_message"):
            print(f"error: {error.format_message()}", file=sys.stderr)
            sys.exit(2)
        raise
    if isinstance(code, int) and code:  # typer hands back the code of `typer.Exit`
        sys.exit(code)


def job(name: str) -> None:
    """What each jobs/*.py calls: the command `name` with this process's flags."""
    main([name, *sys.argv[1:]])


if __name__ == "__main__":
    main()
