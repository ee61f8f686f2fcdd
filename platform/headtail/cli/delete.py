"""`headtail delete`: take a query and all that was made from it out of a store."""

from __future__ import annotations

from typing import Annotated

import typer

from headtail.adapters.progress import answers, say
from headtail.cli.options import AsJson, ConfigFile, Root, Sets, root_of
from headtail.cli.override import Who, person_name


def delete(
    query: Annotated[str, typer.Argument(help="the query, as people type it")],
    who: Who = "",
    why: Annotated[str, typer.Option("--why", help="why, in words; kept in the receipt, so do not repeat the query")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show what would be removed; remove nothing")] = False,
    config: ConfigFile = None,
    sets: Sets = None,
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Delete a query and all that was made from it.

    From tables, jobs, reviews, overrides, request logs, reports and snapshots. Servers stop answering it from a cache within a minute. A
    release without it becomes current; snapshots that hold it are removed, so their releases cannot be rolled back to. The output names
    what could not be reached. Killed, the same command goes on.
    """
    from headtail.adapters.storage import open_existing
    from headtail.releases.deletion import delete_query, plan_deletion

    store = open_existing(root_of(config, sets, root))
    if dry_run:
        plan = plan_deletion(store, query)
        if as_json:
            print(plan.model_dump_json())
            return
        answers.print(f"would go     {_counts(plan.rows)}; {len(plan.snapshots)} snapshots: {', '.join(plan.snapshots) or 'none'}")
        return
    receipt = delete_query(store, query, who=person_name(who), why=why)
    if as_json:
        print(receipt.model_dump_json())
        return
    answers.print(f"removed      {_counts(receipt.rows)}; {receipt.decisions} decisions, {receipt.overrides} overrides")
    answers.print(f"release      {receipt.release or 'the current one did not hold it'}")
    answers.print(f"snapshots    {', '.join(receipt.snapshots) or 'none'} removed")
    if receipt.removed:
        answers.print(f"pages        {', '.join(receipt.removed)}: removed, run these stages again to have them")
    for text in receipt.unreached:
        answers.print(f"not reached  {text}")
    say(f"delete       receipt: {store.uri(f'deletions/{receipt.number:08}.json')}")


def _counts(rows: dict[str, int]) -> str:
    return ", ".join(f"{count:,} rows of {stage}" for stage, count in sorted(rows.items())) or "no row"
