"""The command line: one command per stage, the same flags everywhere, errors that say what to do.

In: `--config FILE`, `--set path.to.field=value`, `--root`. Out: lines and bars on stderr; with `--json` the Receipt as the
last line of stdout. jobs/*.py go through the same door (`job`).

    options.py  flags and configs     stages.py  the stages     store.py  commands on a store     review.py  the review queue
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from headtail import __version__
from headtail.adapters.progress import printable, quiet
from headtail.cli import stages, store
from headtail.cli.options import STAGES, read_config
from headtail.cli.review import review_app
from headtail.core.errors import HeadtailError
from headtail.core.secrets import hiding

__all__ = ["STAGES", "app", "job", "main", "read_config"]

app = typer.Typer(
    name="headtail",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="An LLM's answers for all of your traffic, at a cost you can bear.",
    epilog="Start with: headtail pipeline --config jobs/configs/run_pipeline.laptop.yaml",
)

stages.add(app)
store.add(app)
app.add_typer(review_app)


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
    sys.stdout, sys.stderr = hiding(sys.stdout), hiding(sys.stderr)  # also what frameworks, warnings and stack traces print
    try:
        code = app(arguments, standalone_mode=False)
    except HeadtailError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        print("stopped; what is finished stays, run again to go on", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")) and hasattr(error, "format_message"):
            print(f"error: {printable(error.format_message())}", file=sys.stderr)
            sys.exit(2)
        raise
    if isinstance(code, int) and code:  # typer hands back the code of `typer.Exit`
        sys.exit(code)


def job(name: str) -> None:
    """What each jobs/*.py calls: the command `name` with this process's flags."""
    main([name, *sys.argv[1:]])
