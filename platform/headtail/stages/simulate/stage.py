"""Simulate: a day of requests through designs of a server, before any is built.

    traffic (holdout, request log, file) + snapshot + scored rows + service times -> each design: latency, queues, machines, cost, quality

Latencies are those of a simulation: docs/benchmarks says how near they come to a server. Knows nothing of how a server is run.

    design.py  a design, service times      traffic.py, events.py  requests      flow.py  what happens to them (pure)
    probe.py  times of a running server
    quality.py, figures.py  outcome -> figures (pure)      words.py, figure.py  sentences, picture
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from headtail.adapters.progress import say
from headtail.adapters.storage import Storage, open_storage, read_table
from headtail.adapters.storage.receipts import load_receipt, output_table
from headtail.cache import read_manifest
from headtail.core.errors import InputError
from headtail.core.intervals import Array
from headtail.core.receipt import Receipt
from headtail.core.rows import SCORED, STRATA, Source, conform
from headtail.core.task import Task, load_task
from headtail.releases import release as releases
from headtail.stages.base import Stage, run_once
from headtail.stages.precompute.result import Result as PrecomputeResult
from headtail.stages.simulate import figures, probe
from headtail.stages.simulate.config import Config
from headtail.stages.simulate.design import ServiceTimes, ServingDesign
from headtail.stages.simulate.figure import designs_figure
from headtail.stages.simulate.flow import Arrivals, FlowOutcome, simulate_flow
from headtail.stages.simulate.quality import (
    MixtureSums,
    ScoredCells,
    mixture_quality,
    mixture_sums,
    quality_difference,
    scored_cells,
    why_unknown,
)
from headtail.stages.simulate.result import DesignFigures, QualityFigures, Result, StratumFigures
from headtail.stages.simulate.traffic import EventsFile, Traffic, load_traffic, open_events, snapshot_sources
from headtail.stages.simulate.words import design_words, doubt_words, need_words

VERSION = 3
LATENCIES = pa.schema([("design", pa.string()), ("way", pa.string()), ("quantile", pa.float64()), ("ms", pa.float64())])


def run(config: Config, task: Task | None = None) -> Receipt[Result]:
    """Simulate the designs, unless it was done with these settings. `task`: what `config.task` names, where it is loaded already."""
    task, store = task or load_task(config.task, config.allow_task_code), open_storage(config.root)
    log, plan = load_receipt(store, "ingest", config.log), load_receipt(store, "plan", config.plan)
    evaluation = load_receipt(store, "evaluate", config.evaluation) if config.evaluation else None
    snapshot = releases.load_release(store).snapshot if config.snapshot == "current" else config.snapshot
    if config.times_url:
        times = asyncio.run(_probe(store, snapshot, config))
        config = config.model_copy(update={"times": times, "times_url": "", "metrics_url": ""})
        say(f"{'simulate':<12} measured: {_times_words(times)}")

    events = open_events(store, config.traffic)

    def work(stage: Stage) -> Result:
        return _work(stage, config, task, log, plan, evaluation, snapshot, events)

    inputs: dict[str, Receipt | str] = {"log": log, "plan": plan, "snapshot": snapshot}
    if evaluation is not None:
        inputs["evaluation"] = evaluation
    if events.digest:
        inputs["events"] = events.digest
    replaces = {
        "task": task.name,
        "log": log.path,
        "plan": plan.path,
        "evaluation": evaluation.path if evaluation else "",
        "snapshot": snapshot,
    }
    receipt = run_once("simulate", Result, config, work, inputs=inputs, task=task, version=VERSION, replaces=replaces)
    for line in (*map(design_words, receipt.result.designs), *receipt.result.decision):
        say(f"{'simulate':<12} {line}")
    return receipt


def _work(
    stage: Stage, config: Config, task: Task, log: Receipt, plan: Receipt, evaluation: Receipt | None, snapshot: str, events: EventsFile
) -> Result:
    store = stage.store
    traffic = load_traffic(store, config.traffic, events, log, plan, task.file.strata.torso_min_count, config.seed)
    cached, rows = snapshot_sources(store, snapshot, traffic, config.designs)
    scored = (
        conform(output_table(store, evaluation, "rows"), SCORED, evaluation.output("rows").path) if evaluation else SCORED.empty_table()
    )
    if evaluation:
        _check_sources(config, scored, evaluation)
    cells, prices = scored_cells(scored, config.seed), _cached_prices(store, snapshot, config)
    realtime = config.realtime or next((s for s in (Source.REALTIME_STUDENT, Source.BATCH_STUDENT) if s in cells.by_source), "")
    made, seconds, sums = [], {}, {}
    for design, sources in zip(config.designs, cached, strict=True):
        arrivals = Arrivals(traffic.at, traffic.query, np.array([source is not None for source in sources])[traffic.query])
        outcome = simulate_flow(arrivals, design, config.times, config.seed, config.cores)
        needed = figures.needed_machines(arrivals, design, config.times, outcome, config.target, config.seed)
        counts = figures.answer_counts(outcome, sources[traffic.query], traffic.stratum[traffic.query], str(realtime), config.bigger)
        sums[design.name] = mixture_sums(cells, counts)
        quality = _quality(cells, counts, sums[design.name], traffic.by_stratum)
        made.append(_figures(config, design, outcome, needed, rows[design.name], prices, traffic, quality))
        seconds[design.name] = outcome.seconds
        stage.rows[design.name] = len(outcome.way)
    result = _compare(config, made, sums)
    stage.table("latency", _latencies(seconds))
    stage.figure("designs", designs_figure(seconds, result.designs))
    stage.metrics = dict(_metrics(result))
    for note in traffic.notes:
        say(f"{'simulate':<12} {note}")
    for note in (*traffic.notes, *_remarks(config, str(realtime), result)):
        stage.note(note)
    return result


def _figures(
    config: Config, design: ServingDesign, outcome: FlowOutcome, needed: tuple[ServingDesign, FlowOutcome, bool], rows: Mapping[str, int],
    prices: Mapping[str, float], traffic: Traffic, quality: QualityFigures,
) -> DesignFigures:  # fmt: skip
    latency = figures.latency_figures(outcome.seconds)
    assert latency is not None
    cost = figures.cost_figures(design, outcome, config.prices, rows, prices, traffic.day_requests)
    return DesignFigures(
        name=design.name,
        students=design.students,
        requests=len(outcome.way),
        latency=latency,
        ways=figures.way_figures(outcome),
        reasons=figures.reason_counts(outcome),
        late_share=figures.late_share(outcome),
        queues=figures.queue_figures(outcome, design),
        batch_rows=outcome.batch_rows,
        quality=quality,
        cost=cost,
        needed=figures.needed_figures(
            needed, figures.cost_figures(needed[0], needed[1], config.prices, rows, prices, traffic.day_requests)
        ),
    )


def _check_sources(config: Config, scored: pa.Table, evaluation: Receipt) -> None:
    """InputError when a source that was named was not evaluated: its designs would silently be without quality."""
    known = scored["source"].unique().to_pylist()
    bigger = config.bigger if any(design.escalation.slots for design in config.designs) else ""
    for field, name in (("realtime", config.realtime), ("bigger", bigger)):
        if name and name not in known:
            fix = f"name one of: {', '.join(sorted(known))}; or evaluate its answers (headtail evaluate --set answers.{name}=...)"
            raise InputError("the evaluation has no answers of this source", where=f"{field}, {evaluation.path}", value=name, fix=fix)


def _quality(cells: ScoredCells, counts: Mapping[str, Array], sums: MixtureSums | None, by_stratum: Array) -> QualityFigures:
    shares = by_stratum / by_stratum.sum()
    strata = {}
    for place, name in enumerate(STRATA):
        found = mixture_quality(cells, sums, place) if sums is not None else None
        strata[name] = StratumFigures(
            share=shares[place], **(dict(zip(("quality", "low", "high", "rows"), found, strict=True)) if found else {})
        )
    whole = mixture_quality(cells, sums) if sums is not None else None
    if whole is None:
        return QualityFigures(strata=strata, unknown=why_unknown(cells, counts))
    return QualityFigures(value=whole.value, low=whole.low, high=whole.high, strata=strata)


def _compare(config: Config, made: Sequence[DesignFigures], sums: Mapping[str, MixtureSums | None]) -> Result:
    """The designs beside the best of them. Nothing is compared where a design's own quality is not known, or is that of its overload."""
    if doubt := doubt_words(made, config.target.late_share):
        return Result(designs=tuple(made), decision=(f"whether a student is needed is not known: {doubt}",))
    best = max(made, key=lambda one: one.quality.value or 0.0).name
    designs = []
    for one in made:
        mine, top = sums[one.name], sums[best]
        assert mine is not None
        assert top is not None
        value, low, _ = quality_difference(mine, top) if one.name != best else (0.0, 0.0, 0.0)
        quality = one.quality.model_copy(update={"against_best": value, "against_best_low": low})
        designs.append(one.model_copy(update={"quality": quality}))
    good = [one for one in designs if (one.quality.against_best_low or 0.0) >= -config.quality_margin and one.needed.students is not None]
    enough = tuple(one.name for one in good if not one.students)
    return Result(designs=tuple(designs), best=best, enough=enough, decision=tuple(need_words(designs, good, best, config.quality_margin)))


def _cached_prices(store: Storage, snapshot: str, config: Config) -> dict[str, float]:
    """USD per million answers of each source: as set, else as the precompute receipts of the snapshot say."""
    found: dict[str, float] = {}
    for path in read_manifest(store, snapshot).lineage:
        answered = load_receipt(store, "precompute", path, PrecomputeResult).result
        if answered.figures is not None and answered.figures.usd_per_million is not None:
            found[answered.source] = answered.figures.usd_per_million
    return found | config.prices.cached_usd_per_million


async def _probe(store: Storage, snapshot: str, config: Config) -> ServiceTimes:
    """Hits drawn as people ask them; misses of words of the snapshot that nobody typed together."""
    table = read_table(store, read_manifest(store, snapshot).files["answers"], ["query", "count"])
    known, rng = table["query"].to_pylist(), random.Random(config.seed)
    if not known:
        raise InputError("the snapshot is empty: there is no hit to measure", where="times_url", fix="set times instead")
    hits = rng.choices(known, weights=table["count"].to_pylist(), k=config.probes)
    misses = list(unknown_queries(known, config.probes + probe.CROWD, rng))
    return await probe.measure_times(config.times_url, config.metrics_url or probe.metrics_of(config.times_url), hits, misses, config.seed)


def unknown_queries(known: Sequence[str], number: int, rng: random.Random) -> Iterator[str]:
    """Words of these queries, four at a time, that are none of them; a number ends each where there are few words."""
    held, words = set(known), sorted({word for query in known for word in query.split()})
    for place in range(number):
        text = " ".join(rng.choices(words, k=4))
        yield f"{text} {place}" if text in held or len(words) < 50 else text
        held.add(text)


def _latencies(seconds: Mapping[str, Array]) -> pa.Table:
    steps = np.concatenate([np.linspace(0, 0.99, 100), np.linspace(0.991, 1, 10)])
    rows = [
        {"design": name, "way": "all", "quantile": float(step), "ms": float(value)}
        for name, values in seconds.items()
        for step, value in zip(steps, 1000 * np.quantile(values, steps), strict=True)
    ]
    return pa.Table.from_pylist(rows, schema=LATENCIES)


def _metrics(result: Result) -> Iterator[tuple[str, float]]:
    for one in result.designs:
        figures_of: dict[str, Any] = {"p50_ms": one.latency.p50_ms, "p95_ms": one.latency.p95_ms, "p99_ms": one.latency.p99_ms}
        figures_of |= {"quality": one.quality.value, "usd_per_million": one.cost.total, "students_needed": one.needed.students}
        yield from ((f"{one.name}/{name}", float(value)) for name, value in figures_of.items() if value is not None)


def _remarks(config: Config, realtime: str, result: Result) -> Iterator[str]:
    yield f"latency is simulated, from service times of: {_times_words(config.times)}"
    if result.best is not None:
        yield "quality weighs the labelled rows of a stratum by what they stand for, and takes a source's answers alike wherever it answers"
    elif config.evaluation and any(one.quality.unknown for one in result.designs):
        yield "a quality is not known: a source was not evaluated, or nobody knows how the labels were drawn (docs/labels.md)"
    if realtime != Source.REALTIME_STUDENT and realtime:
        yield f"{realtime} stands for the realtime student: the evaluation has no answers of one"
    if any(one.cost.total is None for one in result.designs):
        yield "a cost is null where a price is not known: set prices"


def _times_words(times: ServiceTimes) -> str:
    parts = [
        f"{name.removesuffix('_ms')} {np.median(getattr(times, name)):.3g} ms" for name in ServiceTimes.model_fields if name.endswith("_ms")
    ]
    return f"{', '.join(parts)} (medians), {times.row_share:.2f} of a row more for each further one"
