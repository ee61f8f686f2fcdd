"""The command line: one command per stage, the same flags everywhere, errors that say what to do.

In: `--config FILE`, `--set path.to.field=value`, `--root`. Out: progress on stderr; what was asked for on stdout, and with
`--json` as its last line. Exit codes: 0 done, 1 a job failed, 2 wrong input or config, 3 a miss of `lookup`, 4 a gate rejected
under `--strict`, 130 Ctrl-C or SIGTERM. jobs/*.py run the same commands (`job`).

    options.py  flags, configs, commands by role    stages.py  the stages       store.py  commands on a store
    status.py   what a store holds                  fields.py  configs' fields  doctor.py checks      review.py  the review queue
    keys.py     API keys                            labels.py human labels
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Annotated

import typer

from headtail import __version__
from headtail.adapters.progress import printable, quiet
from headtail.cli import stages, store
from headtail.cli.delete import delete
from headtail.cli.fields import fields
from headtail.cli.keys import keys_app
from headtail.cli.labels import labels_app
from headtail.cli.options import PANELS, STAGES, STOPPED, read_config
from headtail.cli.override import override
from headtail.cli.release import release_app
from headtail.cli.review import review_app
from headtail.core.errors import HeadtailError
from headtail.core.secrets import hide_in_output

__all__ = ["STAGES", "app", "job", "main", "read_config"]

app = typer.Typer(
    name="headtail",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Answer the frequent queries of a search log ahead of time with a strong LLM, and the others with small students of it.",
    epilog="Start with: headtail pipeline --config jobs/configs/run_pipeline.laptop.yaml. "
    "Exit codes: 0 done, 1 failed, 2 wrong input or config, 3 miss (lookup), 4 rejected (--strict), 130 Ctrl-C or SIGTERM.",
)

COMMANDS = {**store.COMMANDS, "fields": fields, "override": override, "delete": delete}
GROUPS = {"labels": labels_app, "review": review_app, "keys": keys_app, "release": release_app}  # commands with commands of their own

for _panel, _names in PANELS.items():
    for _name in _names:
        if _name in STAGES:
            app.command(_name, rich_help_panel=_panel, help=STAGES[_name][1], epilog=stages.epilog(_name))(stages.command(_name))
        elif _name == "serve":
            app.command(_name, rich_help_panel=_panel, epilog=stages.epilog(_name))(stages.serve)
        elif _name in GROUPS:
            app.add_typer(GROUPS[_name], rich_help_panel=_panel)
        else:
            app.command(_name, rich_help_panel=_panel)(COMMANDS[_name])


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="print the version and exit")] = False,
    silent: Annotated[bool, typer.Option("--quiet", help="print no progress")] = False,
) -> None:
    if version:
        print(f"headtail {__version__}")
        raise typer.Exit
    quiet(silent)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: deliberate errors as three lines and an exit code, Ctrl-C and SIGTERM as 130."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    hide_in_output()  # also in what frameworks, warnings and stack traces print
    try:
        code = app(arguments, standalone_mode=False)
    except HeadtailError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        code = STOPPED
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")) and hasattr(error, "format_message"):
            print(f"error: {printable(error.format_message())}", file=sys.stderr)
            sys.exit(2)
        raise
    if code == STOPPED:
        print("stopped; finished work is kept: run the same command again to go on", file=sys.stderr)
    if isinstance(code, int) and code:  # typer hands back the code of `typer.Exit`; to Ctrl-C it gives STOPPED itself
        sys.exit(code)


def job(name: str) -> None:
    """What each jobs/*.py calls: the command `name` with this process's flags."""
    main([name, *sys.argv[1:]])
