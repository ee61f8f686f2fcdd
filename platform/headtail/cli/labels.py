"""`headtail labels`: queries for people to label, drawn by a design; the page; the labels; a share of them for the gate alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from headtail.adapters.progress import say
from headtail.cli.options import AsJson, ConfigFile, Root, Sets, read_config, root_of

LabelsFile = Annotated[Path, typer.Argument(help="CSV (.csv), JSON Lines (.jsonl) or Label Studio (.json)", metavar="FILE")]
labels_app = typer.Typer(name="labels", no_args_is_help=True, help="Human labels: draw, answer, keep a share for the gate.")


@labels_app.command("seal")
def labels_seal(
    share: Annotated[float, typer.Option("--share", help="share of the labelled rows, 0 to 1", min=0.01, max=0.99)] = 0.5,
    labels: Annotated[str, typer.Option("--labels", help="table ref of the human labels")] = "plan:human_labels",
    config: ConfigFile = None,
    sets: Sets = None,
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Keep a share of the human labels for the gate.

    From now on evaluate, ablate, gap, replay and early stopping leave these rows out. The gate tests on them alone, and nothing but its
    verdict and a passed candidate's bounds comes out. Rows that nearly repeat each other are sealed together. A row that was looked at
    before cannot be sealed. There is no way back.
    """
    from headtail.adapters.storage import open_existing
    from headtail.adapters.storage.receipts import load_ref, output_table
    from headtail.releases.seal import seal_labels

    store = open_existing(root_of(config, sets, root))
    receipt, name = load_ref(store, labels)
    table = output_table(store, receipt, name, ["query_key", "query"])
    sealed, seen = seal_labels(store, f"{receipt.path}:{name}", table, share)
    say(f"labels       {sealed:,} of {table.num_rows:,} are sealed: the gate alone reads them")
    if seen:
        say(f"{'':<12} {seen:,} that were drawn stay open: somebody looked at them before, or at rows that they nearly repeat")
    if as_json:
        print(json.dumps({"labels": table.num_rows, "sealed": sealed, "seen_before": seen}))


def _labels(file: Path | None, sets: list[str] | None, root: str | None) -> Any:
    return read_config("labels", file, sets, root)


@labels_app.command("draw")
def labels_draw(file: LabelsFile, config: ConfigFile = None, sets: Sets = None, root: Root = None) -> None:
    """Write queries to label: the most frequent ones all, the others by traffic within strata.

    `headtail fields labels` lists what can be set: census, rows, width, threshold.
    """
    from headtail.review.label_draw import draw_labels
    from headtail.review.transfer import kind_of

    draw_labels(_labels(config, sets, root), file, kind_of(file, ""))


@labels_app.command("page")
def labels_page(
    file: Annotated[Path, typer.Argument(help="CSV (.csv) or JSON Lines (.jsonl) of `headtail labels draw`", metavar="FILE")],
    config: ConfigFile = None,
    sets: Sets = None,
    root: Root = None,
) -> None:
    """Let people answer drawn queries on a local page; record each answer at once.

    No model's answer is shown. Stops with Ctrl-C; `headtail labels read FILE OUT` then writes the labels. Fields: who, port.
    """
    from headtail.review.labelling import serve_labels

    serve_labels(_labels(config, sets, root), file)


@labels_app.command("read")
def labels_read(
    file: Annotated[Path, typer.Argument(help="the drawn file (.csv, .jsonl), or a JSON export of Label Studio (.json)", metavar="FILE")],
    out: Annotated[Path, typer.Argument(help="CSV for `headtail ingest --set labels=`", metavar="OUT")],
    config: ConfigFile = None,
    sets: Sets = None,
    root: Root = None,
) -> None:
    """Write the labels of a drawn file and of the page, or of a Label Studio export; each label keeps its design.

    Queries without an answer are left out and counted. Exit code 1 when rows were wrong; the other rows are written.
    """
    from headtail.review.labelling import read_labels

    if read_labels(_labels(config, sets, root), file, out).problems:
        raise typer.Exit(1)
