"""`headtail override`: a person's answer to one query, served within a minute and in later snapshots."""

from __future__ import annotations

import getpass
import json
from pathlib import Path
from typing import Annotated

import typer

from headtail.adapters.progress import answers, say
from headtail.cli.options import AsJson, ConfigFile, Root, Sets, root_of
from headtail.core.errors import ConfigError

_LISTED = {"query", "answer", "who", "why", "until", "outranks", "at", "number", "task"}
Who = Annotated[str, typer.Option("--who", help="name of the person who decides; default: the user who runs the command")]


def person_name(who: str) -> str:
    """`who`, or the user who runs the command."""
    if who.strip():
        return who.strip()
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container whose user has no name
        raise ConfigError("the name of who decides is missing", where="--who", fix='add --who "your name"') from None


def override(
    query: Annotated[str, typer.Argument(help="the query, as people type it")] = "",
    answer: Annotated[str, typer.Argument(help="its answer, as JSON; of a task with labels the bare label")] = "",
    who: Who = "",
    why: Annotated[str, typer.Option("--why", help="why, in words; kept with the answer")] = "",
    until: Annotated[
        str, typer.Option("--until", help="last day that it holds, or the time: 2031-01-31T12:00:00+00:00; default: no end")
    ] = "",
    despite_guardrails: Annotated[
        bool, typer.Option("--despite-guardrails", help="take the answer although a guardrail of the task refuses it")
    ] = False,
    allow_task_code: Annotated[
        bool, typer.Option("--allow-task-code", help="let the task's own guardrail check run (guardrails.check)")
    ] = False,
    remove: Annotated[bool, typer.Option("--remove", help="take the override of QUERY back")] = False,
    listing: Annotated[bool, typer.Option("--list", help="show the overrides that hold")] = False,
    export: Annotated[
        Path | None, typer.Option("--export", help="write those that hold to this file, one JSON a line", metavar="FILE")
    ] = None,
    config: ConfigFile = None,
    sets: Sets = None,
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Give a person's answer to a query: it outranks every model's.

    Running servers serve it within a minute, and so does every later snapshot. It is checked against the schema and the guardrails of the
    current release's task. --list, --export and --remove show, save and take back.
    """
    from headtail.adapters.storage import open_existing
    from headtail.releases import overrides
    from headtail.releases.release import current_release

    store = open_existing(root_of(config, sets, root))
    if listing or export is not None:
        held = [
            entry.model_dump(mode="json", include=_LISTED) for entry in overrides.standing_overrides(store, current_release(store).task)
        ]
        if export is not None:
            export.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in held), encoding="utf-8")
            say(f"override     {len(held):,} written to {export}")
        elif as_json:
            print(json.dumps(held, ensure_ascii=False))
        else:
            _show(held)
        return
    if not query or bool(answer) == remove:
        fix = "headtail override QUERY ANSWER --why ..., headtail override QUERY --remove, or headtail override --list"
        raise ConfigError("give a query and an answer, or a query and --remove", where="headtail override", value=query, fix=fix)
    name = person_name(who)
    if remove:
        entry = overrides.remove_override(store, query, who=name, why=why)
        say(f"override     of {entry.query!r} taken back; servers follow within a minute")
    else:
        entry = overrides.set_override(
            store, query, answer, who=name, why=why, until=until, despite_guardrails=despite_guardrails, allow_code=allow_task_code
        )
        end = f" until {entry.until}" if entry.until else ""
        say(f"override     {entry.query!r} is answered with {entry.answer}{end}; servers follow within a minute")
    if as_json:
        print(entry.model_dump_json())


def _show(rows: list[dict[str, str]]) -> None:
    from rich.table import Table

    from headtail.adapters.progress import printable

    table = Table("query", "answer", "who", "why", "until", box=None)
    for row in rows:
        table.add_row(*(printable(str(row[name])) for name in ("query", "answer", "who", "why")), row["until"] or "no end")
    answers.print(table)
