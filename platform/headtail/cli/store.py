"""Commands on a store: look a query up, compare and collect snapshots, roll back, see what is there, check before it costs.

Each reads only `root` of whatever config it is given.
"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from headtail.adapters.progress import console, printable, say
from headtail.cli.options import AsJson, ConfigFile, Root, Sets, read_config, root_of


def lookup(query: str, config: ConfigFile = None, sets: Sets = None, root: Root = None, as_json: AsJson = False) -> None:
    """Answer one query from the published snapshot, and say where the answer comes from. Exit code 3 on a miss."""
    from headtail.adapters.storage import open_existing
    from headtail.releases import release

    found = release.lookup(open_existing(root_of(config, sets, root)), query)
    text = json.dumps(found, ensure_ascii=False, indent=None if as_json else 2)
    print(text if as_json else printable(text))
    if not found["cached"]:
        raise typer.Exit(3)


def rollback(config: ConfigFile = None, sets: Sets = None, root: Root = None, as_json: AsJson = False) -> None:
    """Make the previous release current again."""
    from headtail.adapters.storage import open_existing
    from headtail.releases import release

    now = release.rollback(open_existing(root_of(config, sets, root)))
    say(f"current release: {now.id} (snapshot {now.snapshot})")
    if as_json:
        print(now.model_dump_json())


def diff(
    before: Annotated[str, typer.Argument(help="a snapshot's or release's id, `current` or `previous`")],
    after: Annotated[str, typer.Argument(help="the same")],
    examples: Annotated[int, typer.Option("--examples", help="queries shown of each kind, the most frequent first")] = 10,
    config: ConfigFile = None,
    sets: Sets = None,
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """What changed between two snapshots: rows added, dropped, changed, with the traffic they stand for."""
    from headtail.adapters.storage import open_existing
    from headtail.cache.diff import diff_table
    from headtail.releases import release

    found = release.diff(open_existing(root_of(config, sets, root)), before, after, examples)
    if as_json:
        print(found.model_dump_json())
    else:
        console.print(diff_table(found))


def gc(
    keep: Annotated[int, typer.Option("--keep", help="releases of the history that stay, the current one included")] = 5,
    days: Annotated[float, typer.Option("--days", help="snapshots younger than this many days stay")] = 14,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show what would go, and its bytes; remove nothing")] = False,
    config: ConfigFile = None,
    sets: Sets = None,
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Remove old snapshots that no kept release needs, and what killed writes left behind."""
    from headtail.adapters.storage import open_existing
    from headtail.cache.collect import collected_table
    from headtail.releases import release

    found = release.collect(open_existing(root_of(config, sets, root)), keep, days, dry_run)
    if as_json:
        print(found.model_dump_json())
    else:
        console.print(collected_table(found))


def status(config: ConfigFile = None, sets: Sets = None, root: Root = None, as_json: AsJson = False) -> None:
    """What is in a store: the latest run of each stage and the current release."""
    from headtail.cli.status import status as read
    from headtail.cli.status import status_table

    found = read(root_of(config, sets, root))
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
    else:
        console.print(status_table(found))


def doctor(config: ConfigFile = None, sets: Sets = None, root: Root = None, as_json: AsJson = False) -> None:
    """Check versions, device, model, store, token and ports before they cost anything. Takes a pipeline's config."""
    from headtail import pipeline
    from headtail.cli import doctor as checks

    found = read_config("pipeline", config, sets, root)
    assert isinstance(found, pipeline.Config)
    results = checks.examine(found)
    if as_json:
        print(json.dumps([vars(result) for result in results], ensure_ascii=False))
    else:
        console.print(checks.table(results))
    if any(result.status == "bad" for result in results):
        raise typer.Exit(1)


def add(app: typer.Typer) -> None:
    """These commands."""
    for command in (lookup, diff, rollback, gc, status, doctor):
        app.command()(command)
