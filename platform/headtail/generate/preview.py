"""`make -n` for answers: what a job would ask, why, and what that would cost, before it is billed.

In: a job, and how many rows may be asked to find out. Out: a Preview: rows by what becomes of them, an Estimate with bounds.
The input is sorted into the job's own shards, and the probe's answers are taken over by the job: nothing is done twice.
Without a probe no engine starts. Decides nothing; `compare` says why a row is asked, `estimate` what is left will take.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from headtail.config import Config, build, result_fields
from headtail.generate import _ours, chains, generate, survey, sweep
from headtail.generate.catalog import entries
from headtail.generate.changes import Change, changes
from headtail.generate.compare import KINDS, RESUMED, Comparison, Scope, Tally, probes_of, scope
from headtail.generate.estimate import Estimate, Probe, beyond, estimate, moments, pace
from headtail.generate.job import Job, Journal, ShardReceipt, Table
from headtail.generate.ledger import Ledger
from headtail.generate.prepare import prepare
from headtail.generate.worker import Ask
from headtail.keys import fingerprint
from headtail.progress import bar, say
from headtail.storage import Storage, open_storage, read_json, read_table, write_json, write_table

ROWS = 1000  # of a probe, where nobody says otherwise
IN_PROCESS_ROWS = 200_000  # fewer are compared here, in some ten seconds; a cluster would take longer to start
_CHUNK = 16  # shards per Ray task: earlier jobs are opened once for all of them
_Items = Sequence[ShardReceipt | Ask]


class Group(Config):
    """Rows of one kind."""

    kind: str = Field(description="reused, resumed, retried, changed or new")
    parts: tuple[str, ...] = Field((), description="changed: the parts of the key that differ; retried: the state they were in")
    rows: int = Field(ge=0, description="rows")
    traffic: int = Field(ge=0, description="events of the log that these rows stand for; 0 when not known")
    examples: tuple[str, ...] = Field((), description="queries among them, the most frequent first")


class Preview(Config):
    """What a job would do."""

    path: str = Field(description="the job's folder")
    rows: int = Field(ge=0, description="rows that are to end in a state, duplicates left out")
    duplicates: int = Field(0, ge=0, description="input rows that ask the same as another")
    groups: tuple[Group, ...] = Field(description="rows by what becomes of them; their sum is `rows`")
    probed: int = Field(0, ge=0, description="rows among those to be asked that probes of this job have answered: they are taken over")
    ask: int = Field(0, ge=0, description="rows that an engine is still to be asked")
    unrendered: int = Field(0, ge=0, description="rows whose prompt cannot be made: they end as failed without being asked")
    against: tuple[str, ...] = Field((), description="earlier jobs that asked the changed rows, most rows first")
    changes: tuple[Change, ...] = Field((), description="what is another than in the first of `against`")
    probe: Probe | None = Field(None, description="what the estimate rests on")
    estimate: Estimate | None = Field(None, description="what the rows to be asked will take; null without a probe")
    beyond: str = Field("", description="which budget the estimate's upper bound exceeds")
    spent: dict[str, float] = Field({}, description="engine seconds and tokens of earlier runs of this very job")
    workers: int = Field(1, ge=1, description="engines that the times are for")
    seconds: float = Field(0.0, ge=0, description="what the comparison and the probe took")
    notes: tuple[str, ...] = Field((), description="what a reader should know")

    def of(self, kind: str) -> int:
        """Rows of a kind."""
        return sum(group.rows for group in self.groups if group.kind == kind)

    @property
    def traffic(self) -> int:
        return sum(group.traffic for group in self.groups)


def plan_path(path: str) -> str:
    """Where the Preview of the job at `path` is kept."""
    return f"{path}/plan.json"


def preview(job: Job, probe: int = ROWS) -> Preview:
    """What `job` would do. `probe`: rows that may be asked for the estimate; 0 asks none, and an earlier probe serves if there is one."""
    begun, store = time.monotonic(), open_storage(job.root)
    manifest = prepare(job)
    done, asks = survey(job, store, manifest)
    compared = scope(job, manifest, probe)
    tally = _compare(compared, [*done, *asks])
    known = _probes(store, job)
    best, probed = max(known, key=lambda one: (one.how == _how(job), one.rows), default=None), tally.probed
    if tally.sample is not None and tally.sample.num_rows and (best is None or best.rows < tally.sample.num_rows):
        best = _ask(job, tally.sample, known)
        probed += _newly(compared, scope(job, manifest, 0), tally.sample)
    left = tally.asked - probed
    found = None
    if best is not None:
        found = estimate(best, left, max(1, min(chains(len(asks), job.workers), tally.open)), job.limits)
    spent = dict(tally.spent)
    made = Preview(
        path=job.path,
        rows=tally.rows.total(),
        duplicates=tally.duplicates,
        groups=_groups(tally),
        probed=probed,
        ask=left,
        unrendered=tally.unrendered,
        against=tuple(path for path, count in tally.against.most_common() if count),
        changes=_changes(compared, tally),
        probe=best,
        estimate=found,
        beyond=beyond(found, job.limits, spent.get("seconds", 0.0)) if found else "",
        spent=spent,
        workers=job.workers,
        seconds=round(time.monotonic() - begun, 3),
        notes=tuple(_notes(job, best, tally.unrendered)),
    )
    write_json(store, plan_path(job.path), made.model_dump(mode="json"))
    return made


def finished(path: str, rows: int) -> Preview:
    """The Preview of a job that is done."""
    return Preview(path=path, rows=rows, groups=(Group(kind=RESUMED, rows=rows, traffic=0),))


def _groups(tally: Tally) -> tuple[Group, ...]:
    order = sorted(tally.rows, key=lambda group: (KINDS.index(group[0]), -tally.rows[group], group[1]))
    return tuple(
        Group(
            kind=group[0],
            parts=group[1],
            rows=tally.rows[group],
            traffic=tally.traffic[group],
            examples=tuple(query for _, query in tally.examples.get(group, ())),
        )
        for group in order
        if tally.rows[group]
    )


def _changes(compared: Scope, tally: Tally) -> tuple[Change, ...]:
    top = next((path for path, count in tally.against.most_common(1) if count), None)
    entry = next((older.entry for older in compared.older if older.entry.path == top), None)
    return changes(entry, compared.job) if entry else ()


def _notes(job: Job, probe: Probe | None, unrendered: int) -> Iterator[str]:
    if unrendered:
        yield f"the prompt of {unrendered:,} rows cannot be made: they end as failed without being asked"
    if probe is not None and not job.reuse:
        yield "reuse is off: the probe's answers are not taken over, its rows are asked again"
    if probe is not None and (moved := {name for name, value in _how(job).items() if probe.how.get(name) != value}):
        yield f"the probe ran with another {', '.join(sorted(moved))}: time and money are those of then; a larger --probe is timed anew"
    if probe is not None and not probe.pace.steady:
        yield (
            f"the probe was too small for an engine that works on {probe.pace.at_once:,} rows at a time: time and money are upper "
            f"bounds; --probe {4 * probe.pace.at_once} gives an estimate"
        )
    if probe is not None and (failed := probe.states.get("failed", 0)) > job.limits.failed_share * probe.rows:
        yield f"{failed} of {probe.rows} probe rows failed: more than max_failed_share={job.limits.failed_share:g} allows"


# --- comparing


def _compare(compared: Scope, items: _Items) -> Tally:
    """All shards compared: here, or by Ray tasks when there are many rows."""
    rows, tally = compared.manifest.rows, Tally()
    with bar("comparing with earlier jobs", rows) as shown:
        for found in _here(compared, items) if rows <= IN_PROCESS_ROWS else _on_cluster(compared, items):
            tally.add(found, compared.keep)
            shown.advance(found.rows.total() + found.duplicates)
    return tally


def _here(compared: Scope, items: _Items) -> Iterator[Tally]:
    comparison = Comparison(compared)
    return (comparison.of([item]) for item in items)


def _there(compared: Scope, items: _Items) -> Tally:
    return Comparison(compared).of(items)


def _on_cluster(compared: Scope, items: _Items) -> Iterator[Tally]:
    """A Ray task per chunk of shards; twice as many under way as there are cores, so that the driver's memory stays flat."""
    import ray

    from headtail.cluster import start

    start()
    task, shared = ray.remote(num_cpus=1)(_there), ray.put(compared)
    cores = max(1, int(ray.cluster_resources().get("CPU", 1)))
    size = max(1, min(_CHUNK, len(items) // (2 * cores)))
    chunks = [items[at : at + size] for at in range(0, len(items), size)]
    flying: list[Any] = []
    for at in range(len(chunks) + 2 * cores):
        if at < len(chunks):
            flying.append(task.remote(shared, chunks[at]))
        if flying and (len(flying) > 2 * cores or at >= len(chunks)):
            ready, flying = ray.wait(flying, num_returns=1)
            try:
                yield ray.get(ready[0])
            except ray.exceptions.RayError as error:
                raise _ours(error) from error


# --- probing


def _probes(store: Storage, job: Job) -> list[Probe]:
    """Probes of this job that came to their end."""
    mine = [entry.path for entry in entries(store) if entry.path.startswith(probes_of(job.path))]
    there = [path for path in (f"{path}/probe.json" for path in mine) if store.exists(path)]
    return [build(Probe, read_json(store, path), where=store.uri(path)) for path in there]


def _newly(before: Scope, now: Scope, sample: pa.Table) -> int:
    """Rows of a sample that a probe has answered just now."""
    pairs = set(zip(sample["query_key"].to_pylist(), sample["answer_key"].to_pylist(), strict=True))
    return len(pairs & now.probed - before.probed)


def _ask(job: Job, sample: pa.Table, known: Sequence[Probe]) -> Probe:
    """Have the rows of a sample answered by one engine, as a job of their own whose answers any job may take over."""
    store = open_storage(job.root)
    path = f"{probes_of(job.path)}{fingerprint([key.hex() for key in sample['answer_key'].to_pylist()])[:16]}"
    if not store.exists(f"{path}/input.parquet"):
        write_table(store, f"{path}/input.parquet", sample.drop_columns(["answer_key", "draw"]))
    table = Table(f"{path}/input.parquet", "probe")
    limits = dataclasses.replace(job.limits, workers=1)
    mine = dataclasses.replace(job, path=path, tables=(table,), workers=1, shards=1, reuse=True, limits=limits)
    say(f"  probe: {sample.num_rows:,} rows are asked to learn what the others will take")
    begun = time.monotonic()
    ledger = generate(mine)
    made = _measure(store, mine, ledger, sample, time.monotonic() - begun)
    timed = max([made, *(one for one in known if one.how == made.how)], key=lambda one: one.pace.rows)
    made = made.model_copy(update={"pace": timed.pace, "start_s": timed.start_s, "setup_s": timed.setup_s})
    write_json(store, f"{path}/probe.json", made.model_dump(mode="json"))
    sweep(store, mine)
    return made


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
    told = mine.limits
    usd = (ledger.seconds + ledger.start_s) / 3600 * told.usd_per_hour
    usd += told.tokens_usd(ledger.tokens_in - ledger.reused_tokens_in, ledger.tokens_out - ledger.reused_tokens_out)
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
        usd=usd,
        how=_how(mine),
    )


def _how(job: Job) -> dict[str, Any]:
    answers = result_fields(job.model)
    return {name: value for name, value in job.model.model_dump(mode="json").items() if name not in answers and "usd" not in name}


def _timeline(store: Storage, mine: Job) -> pa.Table:
    """Rows of a probe's longest run in the order they were finished."""
    columns = ["answer_key", "seconds", "tokens_out"]
    empty = pa.table({name: pa.array([], mine.schema.field(name).type) for name in columns})
    if not store.exists(mine.journal_path(0)):
        return empty
    journal = build(Journal, read_json(store, mine.journal_path(0)), where=mine.path)
    runs: dict[str, list[pa.Table]] = {}
    for ref, run in zip(journal.segments, journal.runs, strict=True):
        runs.setdefault(run, []).append(read_table(store, ref.path, columns))
    return max((pa.concat_tables(tables) for tables in runs.values()), key=len, default=empty)


# --- afterwards


def kept(planned: Preview, ledger: Ledger, wall_s: float) -> dict[str, Any]:
    """A plan beside what came of it, for the receipt. Figures of earlier runs of the same job are left out of the actual ones."""
    found, spent = planned.estimate, planned.spent
    actual = {
        "tokens_in": ledger.tokens_in - ledger.reused_tokens_in - spent.get("tokens_in", 0.0),
        "tokens_out": ledger.tokens_out - ledger.reused_tokens_out - spent.get("tokens_out", 0.0),
        "engine_s": ledger.seconds - spent.get("seconds", 0.0),
        "wall_s": wall_s,
    }
    made: dict[str, Any] = {"rows": {"planned": planned.ask + planned.unrendered, "actual": ledger.computed}}
    for name, value in actual.items():
        span = getattr(found, name) if found else None
        bounds = {"planned": span.value, "low": span.low, "high": span.high} if span else {}
        made[name] = {**bounds, "actual": round(float(value), 3)}
    return made
