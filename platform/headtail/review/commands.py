"""Review: people look at the answers that are likely to be wrong, highest expected gain first.

    a queue (rows.SUSPECT, ranked by gain) -> a file and back (CSV, JSON Lines, Label Studio), or a page on this machine
      -> reviews/<task>/: who decided what, when and why -> `decisions`, which curation prefers to the teacher

Decisions are checked against the task's schema before they are recorded. Knows nothing of how suspects are found or of
what becomes of decisions.
"""

from __future__ import annotations

import getpass
from collections.abc import Callable
from pathlib import Path

from pydantic import Field

from headtail.adapters.progress import say
from headtail.adapters.storage import open_storage
from headtail.core.config import StageConfig, execution
from headtail.core.errors import ConfigError
from headtail.core.task import load_task
from headtail.review.log import DecisionLog
from headtail.review.queue import load_queue
from headtail.review.transfer import ExportReport, ImportReport, export_queue, kind_of
from headtail.review.transfer import import_decisions as _import_file

_TOLD = 10  # rows set aside that are shown one by one


class Config(StageConfig):
    """What is reviewed and by whom."""

    task: str = Field("query_segmentation", description="task folder or name of a shipped example")
    suspects: str = Field(
        "curate:suspects", description="table ref of the queue: answers that may be wrong, with the expected gain of a review"
    )
    who: str = execution("", "name recorded with each decision that has no other name; empty: the user who runs the command")
    port: int = execution(0, "TCP port of the page on 127.0.0.1; 0: any that is free", ge=0, le=65535)


def export_reviews(config: Config, file: Path, kind: str = "", rows: int = 0, decided: bool = False) -> ExportReport:
    """Write the queue to `file`. `kind`: csv, jsonl, labelstudio, or known by the file's ending; `rows`: the first so many, 0 all."""
    task, store, found = load_task(config.task, config.allow_task_code), open_storage(config.root), kind_of(file, kind)
    queue = load_queue(store, config.suspects, task)
    report = export_queue(file, found, queue, DecisionLog(store, task.name), task, rows, decided)
    say(f"review       {report.rows:,} rows written to {file} ({found})")
    say(f"{'':<12} {report.left_out:,} more without a decision are in the queue; {report.decided:,} with one are left out")
    if report.config is not None:
        say(f"{'':<12} labelling config for the Label Studio project: {report.config}")
    return report


def import_reviews(config: Config, file: Path, kind: str = "") -> ImportReport:
    """Record the decisions in `file`; a second time nothing. Rows that are wrong are set aside, the others recorded."""
    task, store, found = load_task(config.task, config.allow_task_code), open_storage(config.root), kind_of(file, kind)
    report = _import_file(file, found, store, DecisionLog(store, task.name), task, config.suspects, reviewer_name(config.who))
    counts = f"{report.recorded:,} decisions recorded, {report.known:,} known before"
    counts += f", {report.undecided:,} undecided, {len(report.problems):,} set aside"
    say(f"review       {report.rows:,} rows read: {counts}")
    for number, note in report.notes[:_TOLD]:
        say(f"{'':<12} row {number:,}, recorded: {note}")
    if len(report.notes) > _TOLD:
        say(f"{'':<12} and {len(report.notes) - _TOLD:,} more such notes")
    for number, problem in report.problems[:_TOLD]:
        say(f"{'':<12} row {number:,}: {problem}")
    if report.problems:
        more = len(report.problems) - _TOLD
        say(f"{'':<12} {f'and {more:,} more: ' if more > 0 else 'all of them: '}{report.aside}")
    return report


def serve_page(config: Config, started: Callable[[str], None] | None = None) -> None:
    """Show the queue on a page of this machine until Ctrl-C. `started` gets the page's address."""
    from headtail.review.desk import Desk
    from headtail.review.server import ReviewServer

    task, store = load_task(config.task, config.allow_task_code), open_storage(config.root)
    desk = Desk(store, task, load_queue(store, config.suspects, task), reviewer_name(config.who))
    with ReviewServer(desk, config.port) as server:
        say(f"review       {len(desk.queue):,} rows, {desk.progress()['decided']:,} decided; Ctrl-C ends the page, decisions are kept")
        say(f"{'':<12} {server.url}")
        if started is not None:
            started(server.url)
        server.wait()


def reviewer_name(who: str) -> str:
    """`who`, or the user who runs the command. ConfigError when neither is known."""
    if who.strip():
        return who.strip()
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container whose user has no name
        raise ConfigError("the reviewer's name is missing", where="who", fix="add --set who=your-name") from None
