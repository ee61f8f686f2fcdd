"""`headtail keys`: who may call the server. A key is printed once, when it is made; the file holds a digest of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from headtail.adapters.progress import answers, say
from headtail.cli.options import AsJson

keys_app = typer.Typer(name="keys", no_args_is_help=True, help="Say who may call the server: keys, scopes, limits.")
KeyName = Annotated[str, typer.Argument(help="who the key is for: letters, digits, `_`, `-`, `.`", metavar="NAME")]
KeysFile = Annotated[Path, typer.Option("--file", help="the file of keys, as `api_keys` of the server's config names it", metavar="FILE")]


def _print(name: str, secret: str, as_json: bool) -> None:
    say("this key is shown once; the file holds a digest of it")
    print(json.dumps({"name": name, "key": secret}) if as_json else secret)


@keys_app.command("add")
def keys_add(
    name: KeyName,
    file: KeysFile,
    scopes: Annotated[str, typer.Option("--scopes", help="answer, metrics, admin; separated by commas")] = "answer",
    rate: Annotated[str, typer.Option("--rate", help="requests in the long run, such as 100/s or 6000/min; empty: no limit")] = "",
    burst: Annotated[int, typer.Option("--burst", help="requests at once", min=1)] = 1,
    until: Annotated[str, typer.Option("--until", help="when the key ends, such as 2031-01-01T00:00:00+00:00; empty: never")] = "",
    as_json: AsJson = False,
) -> None:
    """Make a key and print it.

    Running servers take it within a second. Nobody can read it from the file again.
    """
    from headtail.stages.serve.api_keys import add_key, parse_rate

    _print(name, add_key(file, name, [scope.strip() for scope in scopes.split(",")], parse_rate(rate), burst, until), as_json)


@keys_app.command("list")
def keys_list(file: KeysFile, as_json: AsJson = False) -> None:
    """Show names, scopes and limits of all keys; no key and no digest."""
    from rich.table import Table

    from headtail.stages.serve.api_keys import read_keys

    rows = [held.model_dump(mode="json", exclude={"digest", "slot"}) for held in read_keys(file).keys]
    if as_json:
        print(json.dumps(rows))
        return
    table = Table("name", "scopes", "per second", "burst", "created", "valid until", box=None)
    for row in rows:
        limit = f"{row['per_s']:g}" if row["per_s"] else "no limit"
        table.add_row(row["name"], ", ".join(row["scopes"]), limit, str(row["burst"]), row["created"], row["until"] or "it is revoked")
    answers.print(table)


@keys_app.command("revoke")
def keys_revoke(name: KeyName, file: KeysFile) -> None:
    """End all keys of a name.

    Running servers refuse them within a second.
    """
    from headtail.stages.serve.api_keys import revoke_key

    say(f"revoked {revoke_key(file, name)} key(s) of {name}")


@keys_app.command("rotate")
def keys_rotate(
    name: KeyName,
    file: KeysFile,
    overlap: Annotated[float, typer.Option("--overlap", help="hours that the key before it stays valid", min=0)] = 24.0,
    as_json: AsJson = False,
) -> None:
    """Make a new key for a name; the one before it ends later.

    Scopes and limits stay. Both keys share one limit.
    """
    from headtail.stages.serve.api_keys import rotate_key

    _print(name, rotate_key(file, name, overlap * 3600), as_json)
