"""Jobs for the null engine, run in this process: one worker, no Ray. Shared by the tests of `generate`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator

import pyarrow as pa
import pytest

from headtail.adapters.storage import open_storage, read_table, write_table
from headtail.batch import InputTable, Job
from headtail.batch.catalog import register_job
from headtail.batch.driver import find_open_shards
from headtail.batch.ledger import Ledger, close_ledger
from headtail.batch.prepare import prepare_input
from headtail.batch.worker import Worker
from headtail.core import keys
from headtail.core.rows import PLANNED, with_side_inputs
from headtail.core.task import Task
from headtail.engines import Completion, ModelConfig, Request

MakeJob = Callable[..., Job]


def planned(queries: list[str], **columns: list[object]) -> pa.Table:
    """A plan's table of `queries`."""
    rows = [
        {
            "query_key": keys.query_key(query),
            "query": query,
            "count": len(queries) - i,
            "rank": i + 1,
            "stratum": "head",
            "eval_only": False,
            "businesses": ["Joe's Diner"] if i % 3 == 0 else None,
            **{name: values[i] for name, values in columns.items()},
        }
        for i, query in enumerate(queries)
    ]
    return pa.Table.from_pylist(rows, schema=with_side_inputs(PLANNED, ("businesses",)))


def maker(root: str, segmentation: Task) -> MakeJob:
    """A job over one or more tables of queries, with the null engine."""

    def make(*tables: pa.Table, **fields: object) -> Job:
        store = open_storage(root)
        refs = []
        for i, table in enumerate(tables):
            write_table(store, f"plan/x/{i}.parquet", table)
            refs.append(InputTable(f"plan/x/{i}.parquet", f"plan/x:{i}"))
        job = Job(
            root=root,
            path="precompute/x",
            task=segmentation,
            model=ModelConfig(engine="null", model="null:faults"),
            digest="null",
            name="null",
            source="teacher",
            tables=tuple(refs),
            flush_rows=20,
            flush_seconds=1000.0,  # by rows alone: what is lost with a kill can be counted
        )
        return dataclasses.replace(job, **fields)  # type: ignore[arg-type]

    return make


def run_here(job: Job, run: str = "run0") -> tuple[Ledger, Worker]:
    """`generate` without Ray: one worker in this process."""
    store = open_storage(job.root)
    manifest = prepare_input(job)
    register_job(store, job)
    done, asks = find_open_shards(job, store, manifest)
    worker = Worker(job, manifest, run)
    made = worker.work(asks)
    report = {"worker": worker.name, "engine": {}, "start_s": worker.start_s, "restarts": worker.restarts}
    return close_ledger(job, store, manifest, done, made, [report]), worker


def rows_of(job: Job, ledger: Ledger) -> pa.Table:
    store = open_storage(job.root)
    return pa.concat_tables([read_table(store, shard.answers.path) for shard in ledger.shards])


class _Killed(BaseException):
    """Stands for SIGKILL: nothing of ours catches it."""


def interrupted(job: Job, after: int, run: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run until the engine has answered `after` rows, then die without a word. Returns rows answered."""
    from headtail.engines.null import NullEngine

    answered = 0
    plain = NullEngine.generate

    def counted(self: NullEngine, requests: Iterable[Request]) -> Iterator[Completion]:
        nonlocal answered
        for completion in plain(self, requests):
            if answered == after:
                raise _Killed
            answered += 1
            yield completion

    with monkeypatch.context() as patch:
        patch.setattr(NullEngine, "generate", counted)
        with contextlib.suppress(_Killed):
            run_here(job, run)
    return answered
