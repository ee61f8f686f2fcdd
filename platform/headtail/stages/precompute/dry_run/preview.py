"""`make -n` for answers: which rows a job would ask, why, and what they would cost, before it is billed.

In: a job, and how many rows the probe may ask. Out: a Preview: rows by what becomes of them, an Estimate with bounds.
The input is sorted into the job's own shards, and the probe's answers are taken over by the job: nothing is done twice.
Without a probe no engine starts. Decides nothing: `compare` says why a row is asked, `estimate` what the others will take.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
from pydantic import Field

from headtail.adapters.progress import progress_bar
from headtail.adapters.storage import open_storage, write_json
from headtail.batch.driver import chain_count, engine_error, find_open_shards
from headtail.batch.job import Job, ShardReceipt
from headtail.batch.ledger import Ledger
from headtail.batch.limits import UNPRICED
from headtail.batch.prepare import prepare_input
from headtail.batch.worker import Ask
from headtail.core.config import Config
from headtail.stages.precompute.dry_run.changes import Change, changes
from headtail.stages.precompute.dry_run.compare import KINDS, RESUMED, Comparison, Scope, Tally, scope
from headtail.stages.precompute.dry_run.estimate import Estimate, Probe, budget_problem, estimate
from headtail.stages.precompute.dry_run.probe import ask, pace_settings, probes
from headtail.stages.precompute.result import PlannedActual

ROWS = 1000  # of a probe, by default
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
    return f"{path}/dry_run.json"


def preview(job: Job, probe: int = ROWS) -> Preview:
    """What `job` would do. `probe`: rows that may be asked for the estimate; 0 asks none, and an earlier probe serves if there is one."""
    begun, store = time.monotonic(), open_storage(job.root)
    manifest = prepare_input(job)
    done, asks = find_open_shards(job, store, manifest)
    compared = scope(job, manifest, probe)
    tally = _compare(compared, [*done, *asks])
    known = probes(store, job)
    best, probed = max(known, key=lambda one: (one.how == pace_settings(job), one.rows), default=None), tally.probed
    if tally.sample is not None and tally.sample.num_rows and (best is None or best.rows < tally.sample.num_rows):
        best = ask(job, tally.sample, known)
        probed += _newly(compared, scope(job, manifest, 0), tally.sample)
    left = tally.asked - probed
    found = None
    if best is not None:
        found = estimate(best, left, max(1, min(chain_count(len(asks), job.workers), tally.open)), job.limits)
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
        beyond=budget_problem(found, job.limits, spent.get("seconds", 0.0)) if found else "",
        spent=spent,
        workers=job.workers,
        seconds=round(time.monotonic() - begun, 3),
        notes=tuple(_notes(job, best, tally.unrendered)),
    )
    write_json(store, plan_path(job.path), made.model_dump(mode="json"))
    return made


def finished_preview(path: str, rows: int) -> Preview:
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
    yield from job.task.notes
    if unrendered:
        yield f"the prompt of {unrendered:,} rows cannot be rendered: these rows end as failed without being asked"
    if not job.limits.priced:
        yield f"money is unknown: {UNPRICED}"
    if probe is not None and not job.reuse:
        yield "reuse is off: the probe's answers are not reused, its rows are asked again"
    if probe is not None and (moved := {name for name, value in pace_settings(job).items() if probe.how.get(name) != value}):
        yield f"the probe ran with another {', '.join(sorted(moved))}: time and money are for that; a larger --probe measures them again"
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
    with progress_bar("comparing with earlier jobs", rows) as shown:
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

    from headtail.adapters.cluster import start_cluster

    start_cluster()
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
                raise engine_error(error) from error


def _newly(before: Scope, now: Scope, sample: pa.Table) -> int:
    """Rows of a sample that a probe has answered just now."""
    pairs = set(zip(sample["query_key"].to_pylist(), sample["answer_key"].to_pylist(), strict=True))
    return len(pairs & now.probed - before.probed)


def preview_outcome(planned: Preview, ledger: Ledger, wall_s: float) -> dict[str, PlannedActual]:
    """A plan beside its result, for the receipt. Figures of earlier runs of the same job are left out of the actual ones."""
    found, spent = planned.estimate, planned.spent
    actual = {
        "tokens_in": ledger.new_tokens[0] - spent.get("tokens_in", 0.0),
        "tokens_out": ledger.new_tokens[1] - spent.get("tokens_out", 0.0),
        "engine_s": ledger.seconds - spent.get("seconds", 0.0),
        "wall_s": wall_s,
    }
    made = {"rows": PlannedActual(planned=planned.ask + planned.unrendered, actual=ledger.computed)}
    for name, value in actual.items():
        span = getattr(found, name) if found else None
        bounds = {"planned": span.value, "low": span.low, "high": span.high} if span else {}
        made[name] = PlannedActual(**bounds, actual=round(float(value), 3))
    return made
