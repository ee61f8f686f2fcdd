"""The probe of a dry run: some rows of a job, really answered, to estimate the others. It is a separate job.

In: a job and a random sample of the rows it would ask. Out: a Probe: states, tokens, and the engine's pace, kept beside the
probe's answers, which the job takes over through the catalog. After a kill it continues; a second call finds it.
`estimate` computes the cost of the other rows from it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from headtail.adapters.progress import say
from headtail.adapters.storage import Storage, open_storage, read_record, read_table, write_json, write_table
from headtail.batch import generate, remove_work_files
from headtail.batch.catalog import catalog_entries
from headtail.batch.job import InputTable, Job, Journal
from headtail.batch.lease import hold_lease
from headtail.batch.ledger import Ledger
from headtail.core.config import result_fields
from headtail.core.keys import fingerprint
from headtail.stages.precompute.dry_run.compare import probes_of
from headtail.stages.precompute.dry_run.estimate import Probe, moments, pace


def probes(store: Storage, job: Job) -> list[Probe]:
    """Probes of this job that came to their end."""
    mine = [entry.path for entry in catalog_entries(store) if entry.path.startswith(probes_of(job.path))]
    there = [path for path in (f"{path}/probe.json" for path in mine) if store.exists(path)]
    return [read_record(store, Probe, path) for path in there]


def ask(job: Job, sample: pa.Table, known: Sequence[Probe]) -> Probe:
    """Have the rows of a sample answered by one engine, as a job of their own whose answers any job may take over."""
    store = open_storage(job.root)
    path = f"{probes_of(job.path)}{fingerprint([key.hex() for key in sample['answer_key'].to_pylist()])[:16]}"
    if not store.exists(f"{path}/input.parquet"):
        write_table(store, f"{path}/input.parquet", sample.drop_columns(["answer_key", "draw"]))
    table = InputTable(f"{path}/input.parquet", "probe")
    limits = dataclasses.replace(job.limits, workers=1)
    mine = dataclasses.replace(job, path=path, tables=(table,), workers=1, shards=1, reuse=True, limits=limits)
    say(f"  probe: {sample.num_rows:,} rows are asked, to estimate the others")
    begun = time.monotonic()
    with hold_lease(store, path):
        ledger = generate(mine)
    probe = _measure(store, mine, ledger, sample, time.monotonic() - begun)
    timed = max([probe, *(one for one in known if one.how == probe.how)], key=lambda one: one.pace.rows)
    probe = probe.model_copy(update={"pace": timed.pace, "start_s": timed.start_s, "setup_s": timed.setup_s})
    write_json(store, f"{path}/probe.json", probe.model_dump(mode="json"))
    remove_work_files(store, mine)
    return probe


def _measure(store: Storage, mine: Job, ledger: Ledger, sample: pa.Table, wall: float) -> Probe:
    """What a probe that is done says: from its answers, and from its journal, which has them in the order they were finished."""
    answers = read_table(store, ledger.shards[0].answers.path, ["tokens_in", "tokens_out", "seconds"])
    work = 1.0 + np.asarray(answers["tokens_out"], np.float64)
    order = _timeline(store, mine)
    spent = ledger.seconds or float(np.asarray(answers["seconds"], np.float64).sum())
    if order.num_rows:
        place = {key: at for at, key in enumerate(sample["answer_key"].to_pylist())}
        places = np.array([place[key] for key in order["answer_key"].to_pylist()], np.int64)
        samples = max(1, mine.task.file.sampling.n)
        slots = int(ledger.engine.get("max_num_seqs") or ledger.engine.get("concurrency") or 1)
        timed = np.asarray(order["seconds"], np.float64), 1.0 + np.asarray(order["tokens_out"], np.float64)
        found = pace(np.argsort(np.argsort(places)), *timed, max(1, slots // samples), spent)
    else:  # nothing was asked now: an earlier probe that was cut short had asked every row
        found = pace(np.arange(len(work)), np.asarray(answers["seconds"], np.float64), work, len(work), spent)
    return Probe(
        path=mine.path,
        rows=ledger.rows,
        states=ledger.states,
        tokens_in=moments(answers["tokens_in"]),
        tokens_out=moments(answers["tokens_out"]),
        work=moments(work),
        pace=found,
        start_s=ledger.start_s,
        setup_s=max(0.0, wall - ledger.start_s - ledger.seconds),
        seconds=ledger.seconds,
        usd=mine.limits.price(ledger.seconds + ledger.start_s, *ledger.new_tokens) if mine.limits.priced else None,
        how=pace_settings(mine),
    )


def pace_settings(job: Job) -> dict[str, Any]:
    """Engine settings that change a job's pace and no answer."""
    answers = result_fields(job.model)
    return {name: value for name, value in job.model.model_dump(mode="json").items() if name not in answers and "usd" not in name}


def _timeline(store: Storage, mine: Job) -> pa.Table:
    """Rows of a probe's longest run in the order they were finished."""
    columns = ["answer_key", "seconds", "tokens_out"]
    empty = pa.table({name: pa.array([], mine.schema.field(name).type) for name in columns})
    if not store.exists(mine.journal_path(0)):
        return empty
    journal = read_record(store, Journal, mine.journal_path(0))
    runs: dict[str, list[pa.Table]] = {}
    for ref, run in zip(journal.segments, journal.runs, strict=True):
        runs.setdefault(run, []).append(read_table(store, ref.path, columns))
    return max((pa.concat_tables(tables) for tables in runs.values()), key=len, default=empty)
