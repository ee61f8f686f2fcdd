"""The parts of a precompute job: the types that its modules share.

In: nothing. Out: Job (what to do, sent whole to every worker), InputTable (an input), Journal and ShardReceipt (what is finished
of a shard, and its result) and the paths of a job's files. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyarrow as pa
from pydantic import Field

from headtail.adapters.storage import Storage, read_record
from headtail.batch.limits import Limits
from headtail.core.config import Config, result_fields
from headtail.core.io_format import DEFAULT, ModelFormat
from headtail.core.keys import fingerprint
from headtail.core.paths import StoreId, StoreIdOrEmpty
from headtail.core.receipt import FileRef
from headtail.core.rows import ANSWER, State, with_side_inputs, with_top
from headtail.core.task import Task
from headtail.engines import ModelConfig, text_versions

JOURNAL = "journal.json"  # of an open shard, in its folder


@dataclass(frozen=True)
class InputTable:
    """One input table in the store. `label` is for people, such as plan/ab12:head."""

    path: str
    label: str


class JobPaths:
    """Where the files of a job lie. `path` is its folder in the store."""

    path: str

    def manifest_path(self) -> str:
        return f"{self.path}/work/manifest.json"

    def part_path(self, part: int) -> str:
        return f"{self.path}/work/parts/part-{part:05d}.arrow"

    @property
    def shards_folder(self) -> str:
        return f"{self.path}/work/shards"

    def journal_path(self, shard: int) -> str:
        return f"{self.shards_folder}/{shard:05d}/{JOURNAL}"

    def segment_path(self, shard: int, name: str) -> str:
        return f"{self.shards_folder}/{shard:05d}/segment-{name}.parquet"

    def starts_path(self, run: str) -> str:
        return f"{self.path}/work/starts-{run}.json"

    def answers_path(self, shard: int, name: str) -> str:
        return f"{self.path}/answers/shard-{shard:05d}-{name}.parquet"

    def receipt_path(self, shard: int, edition: int) -> str:
        return f"{self.path}/shards/{shard:05d}-{edition}.json"


@dataclass(frozen=True)
class JobFolder(JobPaths):
    """A job of which only the folder is known."""

    path: str


@dataclass(frozen=True)
class Job(JobPaths):
    """All that decides a job and how it runs. `path` is its folder in the store at `root`; `digest` pins the model's weights.

    `io_format`: how the model is asked and answers; without `side_inputs` rows are asked as if they had none.
    """

    root: str
    path: str
    task: Task
    model: ModelConfig
    digest: str
    name: str
    source: str
    tables: tuple[InputTable, ...]
    workers: int = 1
    shards: int = 0
    flush_rows: int = 10_000
    flush_seconds: float = 10.0
    attempts: int = 3
    max_runs_per_row: int = 0
    retry: tuple[str, ...] = (State.FAILED,)
    reuse: bool = True
    reuse_jobs: int = 20
    keep_logprobs: bool = True
    top_logprobs: int = 0
    stall_seconds: float = 600.0
    limits: Limits = field(default_factory=Limits)
    io_format: ModelFormat = DEFAULT
    side_inputs: bool = True

    @cached_property
    def settings(self) -> str:
        """Fingerprint over all that changes an answer besides its messages: the other half of every answer_key."""
        return fingerprint(self.parts)

    @cached_property
    def parts(self) -> dict[str, Any]:
        """What `settings` is made over."""
        return answer_settings(self.task, self.model, self.digest, self.io_format)

    @property
    def schema(self) -> pa.Schema:
        """Of the answers this job makes."""
        return with_side_inputs(with_top(ANSWER, self.top_logprobs), self.task.side_inputs)


def answer_settings(task: Task, model: ModelConfig, digest: str, fmt: ModelFormat = DEFAULT) -> dict[str, Any]:
    """What changes an answer besides its messages: weights, precision, limits, schema, sampling, engine family, I/O format."""
    kept = {name: value for name, value in result_fields(model).items() if name != "model"}
    return {**task.answer_settings, "model": {**kept, "digest": digest}, "grammar": text_versions(model, fmt.kind), **fmt.settings}


class Journal(Config):
    """What is finished of a shard that is not. Replaced whole at each flush."""

    segments: tuple[FileRef, ...] = Field((), description="files of finished rows")
    runs: tuple[StoreId, ...] = Field((), description="which run of the job wrote each segment")
    crashes: int = Field(0, ge=0, description="how often the shard was begun since rows were last flushed")
    passed: int = Field(0, ge=0, description="rows flushed in a narrow window")
    suspect: StoreIdOrEmpty = Field("", description="answer_key of the row that was being asked alone when the engine last died")
    crashes_alone: int = Field(0, ge=0, description="how often in a row that was the same one")
    poison_rows: int = Field(0, ge=0, description="rows that were found to kill the engine")
    seconds: float = Field(0.0, ge=0, description="engine time so far")


class ShardReceipt(Config):
    """The result of one shard, published with its answers by one atomic step; the first to publish wins.

    An `edition` above 0 replaces one that held failed rows. Nothing reads answers except through these.
    """

    shard: int = Field(ge=0, description="number of the shard")
    edition: int = Field(0, ge=0, description="0 at first; one more each time failed rows of the one before were tried again")
    answers: FileRef = Field(description="the answers, sorted by query_key")
    rows: int = Field(ge=0, description="rows in, without duplicates")
    duplicates: int = Field(ge=0, description="input rows with the same query_key and answer_key as an earlier one")
    states: dict[str, int] = Field(description="rows by state; their sum is `rows`")
    failed_runs: dict[int, int] = Field({}, description="failed rows by the number of runs in which they failed the same way")
    given_up: int = Field(0, ge=0, description="rows in another state of `retry` that were asked in max_runs_per_row runs")
    reasons: dict[str, int] = Field({}, description="the most frequent reasons of failed rows, and how many rows each")
    tokens_in: int = Field(0, ge=0, description="prompt tokens of all rows")
    tokens_out: int = Field(0, ge=0, description="answer tokens of all rows")
    seconds: float = Field(0.0, ge=0, description="engine time that this job put into the shard, over all its runs")
    reused: int = Field(0, ge=0, description="rows whose answers an earlier job had made under the same answer_key")
    reused_seconds: float = Field(0.0, ge=0, description="engine time that went into the reused rows when they were made")
    reused_tokens_in: int = Field(0, ge=0, description="prompt tokens of the reused rows, when they were made")
    reused_tokens_out: int = Field(0, ge=0, description="answer tokens of the reused rows, when they were made")
    computed: int = Field(0, ge=0, description="rows that the run which published this had made itself")
    damaged: int = Field(0, ge=0, description="rows of earlier segments that could not be read and were made again")

    @property
    def failed(self) -> int:
        return self.states.get(State.FAILED, 0)

    def retryable(self, runs: int) -> int:
        """Failed rows that were not yet asked in `runs` runs; 0: all."""
        return self.failed - sum(rows for done, rows in self.failed_runs.items() if runs and done >= runs)


def edition_count(job: JobPaths, store: Storage, shard: int) -> int:
    """How many editions of a shard are published."""
    count = 0
    while store.exists(job.receipt_path(shard, count)):
        count += 1
    return count


def read_receipt(job: JobPaths, store: Storage, shard: int, edition: int) -> ShardReceipt:
    """A published ShardReceipt."""
    return read_record(store, ShardReceipt, job.receipt_path(shard, edition))


def read_journal(job: JobPaths, store: Storage, shard: int) -> Journal:
    """What is finished of an open shard; empty when nothing is."""
    path = job.journal_path(shard)
    return read_record(store, Journal, path) if store.exists(path) else Journal()
