"""Which jobs ran in a store, so that an answer is paid for once: it is found by its answer_key, whichever job made it.

In: jobs, as they begin. Out: numbered entries under precompute/catalog, and the answers that earlier jobs under the same
settings made for a range of keys: published shards and, of jobs that were cut short, the segments their journals name.
Directories are never listed. Knows nothing of engines.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from headtail.adapters import append_log
from headtail.adapters.storage import Storage, read_record, read_table
from headtail.batch.job import Job, JobPaths, edition_count, read_journal, read_receipt
from headtail.batch.prepare import InputManifest
from headtail.core.config import Config
from headtail.core.errors import StorageError
from headtail.core.keys import overlapping_shards
from headtail.core.paths import AnswersPath, StoreId
from headtail.core.receipt import FileRef, Receipt
from headtail.core.rows import ANSWER, TOP, State

FOLDER = "precompute/catalog"
ANSWERS = "answers/"  # outputs of this kind, one per shard, in a stage's receipt
_CARRIED = ("count", "stratum", "eval_only", "source")  # an answer's columns that belong to the asking job, not to the answer


class CatalogEntry(Config):
    """One job that began. Later jobs compare themselves with it."""

    path: AnswersPath = Field(description="the job's folder")
    task: StoreId = Field(description="name of the task")
    source: str = Field(description="teacher or student")
    model: str = Field(description="name of the model")
    settings: StoreId = Field(description="fingerprint over all that changes an answer besides its messages")
    parts: dict[str, Any] = Field(description="what `settings` was made over")
    template: str = Field(description="the prompt, as Jinja2")
    side_inputs: tuple[str, ...] = Field((), description="the task's side inputs")
    shown: bool = Field(True, description="whether rows were asked with the side inputs that they had")
    began: str = Field(description="UTC, ISO 8601")


def register_job(store: Storage, job: Job) -> None:
    """Enter a job in the catalog, once. Killed in between it may be entered twice, which changes nothing."""
    mark = f"{job.path}/work/entry"
    if store.exists(mark):
        return
    entry = CatalogEntry(
        path=job.path,
        task=job.task.name,
        source=job.source,
        model=job.name,
        settings=job.settings,
        parts=job.parts,
        template=job.task.template,
        side_inputs=job.task.side_inputs,
        shown=job.side_inputs,
        began=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    number = append_log.append_entry(store, FOLDER, lambda _: entry.model_dump_json(indent=1).encode())
    store.replace(mark, str(number).encode())


def catalog_entries(store: Storage) -> list[CatalogEntry]:
    """All jobs of the store, newest first, each once."""
    found = {entry.path: entry for entry in append_log.read_entry_records(store, CatalogEntry, FOLDER)}
    return list(reversed(found.values()))


def finished_jobs(store: Storage, task: str) -> Iterator[CatalogEntry]:
    """The jobs of a task that have a receipt, newest first."""
    return (entry for entry in catalog_entries(store) if entry.task == task and store.exists(f"{entry.path}/receipt.json"))


def earlier_jobs(store: Storage, job: Job) -> list[EarlierJob]:
    """Jobs whose answers this one may take over, newest first: the same settings, so the same key means the same answer."""
    if not job.reuse:
        return []
    same = [entry for entry in catalog_entries(store) if entry.settings == job.settings and entry.path != job.path]
    return [EarlierJob(store, entry.path) for entry in same[: job.reuse_jobs]]


class EarlierJob(JobPaths):
    """The answers of one earlier job, finished or cut short, by range of keys."""

    def __init__(self, store: Storage, path: str) -> None:
        self.store, self.path = store, path
        self._seen: dict[int, tuple[FileRef, ...]] = {}

    @cached_property
    def _published_shards(self) -> dict[int, FileRef] | None:
        path = f"{self.path}/receipt.json"
        if not self.store.exists(path):
            return None
        receipt = read_record(self.store, Receipt, path)
        return {int(name.rpartition("-")[2]): ref for name, ref in receipt.outputs.items() if name.startswith(ANSWERS)}

    @cached_property
    def _shards(self) -> int:
        path = self.manifest_path()
        if not self.store.exists(path):
            return 0
        return read_record(self.store, InputManifest, path).shards

    def answers(self, shard: int, shards: int, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """Tables of ANSWER rows that hold all there are in the range of shard `shard` of `shards`, and others."""
        for number in overlapping_shards(shard, shards, self._shards) if self._shards else ():
            if number not in self._seen:
                self._seen[number] = self._files(number)
            for ref in self._seen[number]:
                try:
                    table = read_table(self.store, ref, columns)
                except (StorageError, OSError, pa.ArrowInvalid):
                    continue  # deleted or damaged: these rows are asked again
                yield table

    def _files(self, number: int) -> tuple[FileRef, ...]:
        if self._published_shards is not None:
            return (self._published_shards[number],) if number in self._published_shards else ()
        if edition := edition_count(self, self.store, number):
            return (read_receipt(self, self.store, number, edition - 1).answers,)
        return read_journal(self, self.store, number).segments


def complete_rows(table: pa.Table, top: int) -> np.ndarray:
    """Which answers of an earlier job hold all that is asked for: answered rows lack their `top` likeliest tokens, or have them."""
    if not top:
        return np.ones(table.num_rows, bool)
    answered = pc.equal(table["state"], str(State.ANSWERED))
    if TOP.names[0] not in table.column_names:
        return np.asarray(pc.invert(answered))
    tokens, likeliest = (pc.fill_null(pc.list_value_length(table[name]), 0) for name in TOP.names[:2])
    has = pc.and_(pc.greater(tokens, 0), pc.greater_equal(likeliest, pc.multiply(tokens, top)))
    return np.asarray(pc.or_(pc.invert(answered), has))


def adapt_rows(table: pa.Table, inputs: pa.Table, job: Job) -> pa.Table:
    """Answer rows of an earlier job as rows of this one: what belongs to the asker comes from its own input rows, `inputs`."""
    columns = []
    for field in job.schema:
        if field.name == "source":
            column: Any = pa.repeat(pa.scalar(job.source), table.num_rows)
        elif field.name in _CARRIED or field.name not in (*ANSWER.names, *TOP.names):
            column = inputs[field.name]
        elif field.name in table.column_names:
            column = table[field.name]
        else:
            column = pa.nulls(table.num_rows, field.type)
        columns.append(column.cast(field.type))
    return pa.Table.from_arrays(columns, schema=job.schema)
