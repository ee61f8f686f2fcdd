"""`headtail review`: the queue of answers that are likely to be wrong, as files and as a page."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from headtail.cli.options import AsJson, ConfigFile, Root, Sets, read_config

review_app = typer.Typer(name="review", no_args_is_help=True, help="Let people decide on answers that are most likely wrong.")
ReviewFile = Annotated[Path, typer.Argument(help="CSV (.csv), JSON Lines (.jsonl) or Label Studio (.json)", metavar="FILE")]
ReviewKind = Annotated[str, typer.Option("--format", help="csv, jsonl or labelstudio; default: by the file's ending")]


def _review(file: Path | None, sets: list[str] | None, root: str | None) -> Any:
    return read_config("review", file, sets, root)


@review_app.command("export")
def review_export(
    file: ReviewFile,
    rows: Annotated[int, typer.Option("--rows", help="how many rows, highest expected gain first; 0: all", min=0)] = 0,
    decided: Annotated[bool, typer.Option("--decided", help="also rows that are already decided, with the decision")] = False,
    kind: ReviewKind = "",
    config: ConfigFile = None,
    sets: Sets = None,
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Write the queue of suspect answers to a file."""
    from headtail import review

    made = review.export_reviews(_review(config, sets, root), file, kind, rows, decided)
    if as_json:
        print(json.dumps(dataclasses.asdict(made), ensure_ascii=False, default=str))


@review_app.command("import")
def review_import(
    file: ReviewFile, kind: ReviewKind = "", config: ConfigFile = None, sets: Sets = None, root: Root = None, as_json: AsJson = False
) -> None:
    """Read decisions from a file and record them.

    Importing the same file again changes nothing. Exit code 1 when rows were set aside.
    """
    from headtail import review

    made = review.import_reviews(_review(config, sets, root), file, kind)
    if as_json:
        print(json.dumps(dataclasses.asdict(made), ensure_ascii=False))
    if made.problems:
        raise typer.Exit(1)


@review_app.command("serve")
def review_serve(config: ConfigFile = None, sets: Sets = None, root: Root = None) -> None:
    """Show the queue on a local page; record each decision at once.

    Stops with Ctrl-C.
    """
    from headtail import review

    review.serve_page(_review(config, sets, root))
