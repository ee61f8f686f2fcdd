"""Commands on a store: look a query up, compare and collect snapshots, roll back, show status, check before a run.

Each reads only `root` of the config that it gets; `doctor` reads a pipeline's.
"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from headtail.adapters.progress import answers, printable, say
from headtail.cli.options import AsJson, ConfigFile, Root, Sets, read_config, root_of


def lookup(query: str, config: ConfigFile = None, sets: Sets = None, root: Root = None, as_json: AsJson = False) -> None:
    """Answer one query from the cache; exit code 3 on a miss.

    The output also names the answer's source, key, snapshot and release, and the runs that made it.
    """
    from headtail.adapters.storage import open_existing
    from headtail.releases.lookup import look_up

    found = look_up(open_existing(root_of(config, sets, root)), query)
    text = json.dumps(found, ensure_ascii=False, indent=None if as_json else 2)
    print(text if as_json else printable(text))
    if not found["cached"]:
        raise typer.Exit(3)


def rollback(config: ConfigFile = None, sets: Sets = None, root: Root = None, as_json: AsJson = False) -> None:
    """Make the previous release current: cache and student together."""
    from headtail.adapters.storage import open_existing
    from headtail.releases import release

    now = release.rollback(open_existing(root_of(config, sets, root)))
    say(f"current release: {now.id} (snapshot {now.snapshot})")
    if as_json:
        print(now.model_dump_json())


def diff(
    before: Annotated[str, typer.Argument(help="id of a snapshot or a release, `current` or `previous`")],
    after: Annotated[str, typer.Argument(help="the same")],
    examples: Annotated[int, typer.Option("--examples", help="how many example queries of each kind to show, most frequent first")] = 10,
    config: ConfigFile = None,
    sets: Sets = None,
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Compare two snapshots: rows added, dropped, changed.

    Each kind comes with its share of the traffic and with examples.
    """
    from headtail.adapters.storage import open_existing
    from headtail.cache.diff import diff_table
    from headtail.releases import release

    found = release.diff_references(open_existing(root_of(config, sets, root)), before, after, examples)
    if as_json:
        print(found.model_dump_json())
    else:
        answers.print(diff_table(found))


def gc(
    keep: Annotated[int, typer.Option("--keep", help="how many of the last releases to keep, the current one included")] = 5,
    days: Annotated[float, typer.Option("--days", help="keep snapshots that are younger than this, in days")] = 14,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show what would be removed, and its bytes; remove nothing")] = False,
    config: ConfigFile = None,
    sets: Sets = None,
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Remove old snapshots that no kept release needs.

    The remains of killed writes go too. --dry-run shows what would be removed.
    """
    from headtail.adapters.storage import open_existing
    from headtail.cache.collect import collection_table
    from headtail.releases.garbage import collect_garbage

    found = collect_garbage(open_existing(root_of(config, sets, root)), keep, days, dry_run)
    if as_json:
        print(found.model_dump_json())
    else:
        answers.print(collection_table(found))


def status(config: ConfigFile = None, sets: Sets = None, root: Root = None, as_json: AsJson = False) -> None:
    """Show unfinished jobs, models, gate verdicts, the release.

    A job that runs renews its lease every 10 s; a job whose lease is silent for 60 s counts as dead. Run its command again to resume it.
    """
    from headtail.cli.status import status as read
    from headtail.cli.status import status_table

    found = read(root_of(config, sets, root))
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
    else:
        answers.print(status_table(found))


def doctor(config: ConfigFile = None, sets: Sets = None, root: Root = None, as_json: AsJson = False) -> None:
    """Check machine, store, log, models, servers before you start.

    Takes a pipeline's config. Each finding comes with its cure; exit code 1 when one of them would stop the pipeline.
    """
    from headtail import pipeline
    from headtail.cli import doctor as checks

    found = read_config("pipeline", config, sets, root)
    assert isinstance(found, pipeline.Config)
    results = checks.examine(found)
    if as_json:
        print(json.dumps([vars(result) for result in results], ensure_ascii=False))
    else:
        answers.print(checks.findings_table(results))
    if any(result.status == "bad" for result in results):
        raise typer.Exit(1)


COMMANDS = {command.__name__: command for command in (lookup, diff, rollback, gc, status, doctor)}
