"""Which jobs answered: the run that stands for an answer source where nobody named one.

In: a task, and the labels that must have been asked. Out: the folder of one finished precompute per answer source. The latest precompute of
a store is of whatever source ran last, so it stands for no source by itself; and of several runs of one source nobody guesses.
"""

from __future__ import annotations

from collections.abc import Sequence

from headtail.adapters.storage import Storage
from headtail.adapters.storage.receipts import load_receipt
from headtail.batch.catalog import CatalogEntry, catalog_entries, finished_jobs
from headtail.core.errors import ConfigError
from headtail.core.receipt import LATEST, Receipt
from headtail.core.rows import Source
from headtail.core.task import Task

PRECOMPUTE = "precompute"


def answer_runs(store: Storage, task: Task, asked: str = "") -> dict[str, list[CatalogEntry]]:
    """Finished jobs of a task by answer source, newest first; of a source only those under the task's prompt of today, if there are any.

    `asked`: a table that they must have answered, as stage/fingerprint:output; empty: any.
    """
    runs: dict[str, list[tuple[CatalogEntry, Receipt]]] = {}
    for entry in finished_jobs(store, task.name):
        receipt = load_receipt(store, PRECOMPUTE, entry.path)
        if not asked or asked.replace(":", ".") in receipt.inputs:
            runs.setdefault(entry.source, []).append((entry, receipt))
    found = {}
    for source, some in sorted(runs.items(), key=lambda item: (item[0] != Source.TEACHER, item[0])):
        current = [entry for entry, receipt in some if receipt.task_fingerprint == task.fingerprint]
        found[source] = current or [entry for entry, _ in some]
    return found


def sources_of_labels(store: Storage, task: Task, labels: str) -> dict[str, str]:
    """The run of each answer source that was asked the labelled queries. ConfigError when there is none, or more than one of a source."""
    runs = answer_runs(store, task, labels)
    if not runs:
        what = "no finished precompute of this task was asked the labelled queries"
        fix = f"run precompute with {labels} among its inputs, or name answers: --set answers.teacher=precompute/<fingerprint>"
        raise ConfigError(what, where="answers", value=f"task {task.name}, labels {labels}", fix=fix)
    if several := [entry for some in runs.values() if len(some) > 1 for entry in some]:
        flags = " ".join(f"--set answers.{source}={some[0].path}" for source, some in runs.items())
        what = "an answer source has several runs that were asked the labelled queries"
        raise ConfigError(what, where="answers", value=_list_runs(several), fix=f"name one of each source, such as {flags}")
    return {source: some[0].path for source, some in runs.items()}


def source_ref(store: Storage, task: Task, ref: str, source: str) -> str:
    """`ref`; where it is the latest precompute and that is of another answer source, the one run of `source`. ConfigError without one."""
    if ref not in (LATEST, PRECOMPUTE):
        return ref
    latest = load_receipt(store, PRECOMPUTE, ref).path
    others = {entry.path: entry.source for entry in catalog_entries(store)}
    if others.get(latest, source) == source:
        return latest
    runs = answer_runs(store, task).get(source, [])
    if len(runs) != 1:
        what = f"the latest precompute is of {others[latest]}, not of {source}"
        fix = "set answers to the run that is meant: precompute/<fingerprint>"
        raise ConfigError(what, where="answers", value=_list_runs(runs) or f"no run of {source} for task {task.name}", fix=fix)
    return runs[0].path


def _list_runs(runs: Sequence[CatalogEntry]) -> str:
    return ", ".join(f"{entry.path} ({entry.source} by {entry.model}, {entry.began})" for entry in runs)
