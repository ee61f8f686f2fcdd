"""The summary: every figure of a report under one plain, flat name, with null for what was not run.

In: receipts by stage, the quality table. Out: a dict of plain JSON values (names: docs/report.md), and the
few sentences that say what it means. Reads no files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from headtail import __version__
from headtail.core.receipt import Receipt, StageResult
from headtail.core.rows import SLICES, SMALL, State
from headtail.stages.distill.result import Result as DistillResult
from headtail.stages.gate.result import Result as GateResult
from headtail.stages.precompute.result import Result as PrecomputeResult
from headtail.stages.publish import Result as PublishResult

R = TypeVar("R", bound=StageResult)
RESULTS: dict[str, type[StageResult]] = {
    "precompute": PrecomputeResult,
    "distill": DistillResult,
    "gate": GateResult,
    "publish": PublishResult,
}
REPORTED_STAGES = (
    "ingest",
    "plan",
    "precompute_teacher",
    "publish_head",
    "evaluate_teacher",
    "curate",
    "distill_batch",
    "precompute_batch",
    "distill_realtime",
    "precompute_realtime",
    "evaluate",
    "gate_batch",
    "gate_realtime",
    "publish",
    "replay",
)
REALTIME = ("distill_realtime", "precompute_realtime", "gate_realtime")  # there only where a second student answers live
MODELS = ("teacher", "batch_student", "realtime_student")
_JOBS = {"teacher": "precompute_teacher", "batch_student": "precompute_batch", "realtime_student": "precompute_realtime"}
SOURCES = (*MODELS, "fallback")
PATHS = ("cache", "realtime", "fallback")

# name in the summary: (stage, part of its receipt, name there). The first stage that has it wins.
_FIGURES: dict[str, tuple[tuple[str, str, str], ...]] = {
    "log_events": (("ingest", "rows", "events"),),
    "log_queries": (("ingest", "rows", "queries"),),
    "holdout_events": (("ingest", "rows", "holdout_events"),),
    "unseen_share_holdout_events": (("ingest", "metrics", "unseen_share_holdout_events"),),
    "labelled_rows": (("plan", "rows", "human_labels"), ("ingest", "rows", "human_labels")),
    "head_rows": (("plan", "metrics", "head_rows"), ("plan", "rows", "head")),
    "head_coverage": (("plan", "metrics", "head_coverage"),),
    "head_coverage_holdout": (("plan", "metrics", "head_coverage_holdout"),),
    "seen_coverage_holdout": (("plan", "metrics", "seen_coverage_holdout"),),
    "zipf_exponent": (("plan", "metrics", "zipf_exponent"),),
    "training_rows": (("curate", "rows", "training_set"),),
    "training_dropped": (("curate", "rows", "dropped"),),
    "published_rows": (("publish", "rows", "published"), ("publish_head", "rows", "published")),
    "coverage_log": (("publish", "metrics", "coverage"), ("publish_head", "metrics", "coverage")),
    "coverage_log_head": (("publish_head", "metrics", "coverage"),),
    "coverage_holdout_traffic": (("replay", "metrics", "cache_hit_share"),),
    "cache_hit_share": (("replay", "metrics", "cache_hit_share"),),
    "realtime_share": (("replay", "metrics", "realtime_share"),),
    "fallback_share": (("replay", "metrics", "fallback_share"),),
    "degraded_share": (("replay", "metrics", "degraded_share"),),
    "requests": (("replay", "metrics", "requests"), ("replay", "rows", "requests")),
    "request_errors": (("replay", "metrics", "errors"), ("replay", "rows", "errors")),
    "requests_per_s": (("replay", "metrics", "requests_per_s"),),
    "replay_quality": (("replay", "metrics", "quality"),),
}
_JOB_METRICS = (
    "rows_per_s",
    "tokens_in",
    "tokens_out",
    "tokens_in_per_row",
    "tokens_out_per_row",
    "engine_start_s",
    "generate_s",
    "answered_share",
    "usd",
    "usd_per_hour",
    "usd_per_million",
)
_JOB_ROWS = ("in", *(str(s) for s in State), "duplicates", "reused", "recomputed", "resumed")
_EVALUATIONS = ("evaluate", "evaluate_teacher")


def summarise(
    receipts: Mapping[str, Receipt], quality: Iterable[Mapping[str, Any]], title: str, reused: Sequence[str] = ()
) -> dict[str, Any]:
    """Every figure under its name. `quality`: rows of evaluate's quality table."""
    made: dict[str, Any] = {"title": title, "headtail": __version__, "task": _task(receipts)}
    for name, places in _FIGURES.items():
        made[name] = next((value for place in places if (value := _figure(receipts, *place)) is not None), None)
    made |= dict(_quality(receipts, quality))
    for source in MODELS:
        job = _JOBS[source]
        answered = result_of(receipts, PrecomputeResult, job)
        made[f"model_{source}"] = answered.model.name if answered else None
        made |= {f"rows_{source}_{name}": _figure(receipts, job, "rows", name) for name in _JOB_ROWS}
        made |= {f"{name}_{source}": _figure(receipts, job, "metrics", name) for name in _JOB_METRICS}
        if made[f"usd_per_hour_{source}"] is None:
            made[f"usd_per_hour_{source}"] = answered.usd_per_hour if answered else None
        made[f"usd_per_million_running_{source}"] = _running(made, source)
    made |= dict(_training(receipts))
    made["usd_per_million_fallback"] = 0.0
    made["cost_ratio_teacher_to_batch_student"] = _ratio(made["usd_per_million_teacher"], made["usd_per_million_batch_student"])
    made["cost_ratio_teacher_to_realtime_student"] = _ratio(made["usd_per_million_teacher"], made["usd_per_million_realtime_student"])
    made["cost_ratio_running_batch_student"] = _ratio(
        made["usd_per_million_running_teacher"], made["usd_per_million_running_batch_student"]
    )
    made["cost_ratio_running_realtime_student"] = _ratio(
        made["usd_per_million_running_teacher"], made["usd_per_million_running_realtime_student"]
    )
    made["sources"] = [source for source in SOURCES if source != "realtime_student" or made["model_realtime_student"]]
    for path in ("all", *PATHS):
        end = "" if path == "all" else f"/{path}"
        made |= {f"latency_{path}_{p}_ms": _figure(receipts, "replay", "metrics", f"{p}_ms{end}") for p in ("p50", "p95", "p99")}
        made[f"requests_{path}"] = made["requests"] if path == "all" else _figure(receipts, "replay", "rows", path)
    made |= _gate(receipts, "gate_batch") | _gate(receipts, "gate_realtime")
    published = result_of(receipts, PublishResult, "publish", "publish_head")
    made |= {name: getattr(published, name) if published else None for name in ("release", "snapshot")}
    served = result_of(receipts, PublishResult, "publish")
    made["student_served"] = bool(served.student) if served else None
    made |= {f"seconds_{name}": receipts[name].seconds if name in receipts else None for name in REPORTED_STAGES}
    made["not_run"] = [
        name for name in REPORTED_STAGES if name not in receipts and (made["model_realtime_student"] or name not in REALTIME)
    ]
    made["lineage"] = [_step(name, receipts[name], name in reused) for name in _stage_order(receipts)]
    made["notes"] = list(dict.fromkeys(notes(receipts, made)))
    made["headline"] = list(headline(made))
    return made


def _gate(receipts: Mapping[str, Receipt], name: str) -> dict[str, Any]:
    """The verdict on a student, each criterion in words, and what is missing."""
    gated = result_of(receipts, GateResult, name)
    if gated is None:
        return {f"{name}_passed": None, f"{name}_delta": None, f"{name}_criteria": [], f"{name}_missing": []}
    found = gated.evidence
    criteria = [
        {
            "kind": criterion.kind,
            "stratum": criterion.stratum,
            "n": criterion.n,
            "value": criterion.value,
            "lower_bound": criterion.lower_bound,
            "threshold": criterion.threshold,
        }
        | {"passed": criterion.passed, "words": criterion.words()}
        for criterion in found.criteria
    ]
    missing = found.missing()
    return {f"{name}_passed": not missing, f"{name}_delta": found.delta, f"{name}_criteria": criteria, f"{name}_missing": missing}


def _training(receipts: Mapping[str, Receipt]) -> Iterator[tuple[str, Any]]:
    """How each student was made."""
    for source, stage in (("batch_student", "distill_batch"), ("realtime_student", "distill_realtime")):
        yield f"train_examples_{source}", _figure(receipts, stage, "rows", "training_set")
        for name in ("train_loss", "eval_loss", "train_seconds"):
            yield f"{name}_{source}", _figure(receipts, stage, "metrics", name)
        for name in ("params", "trainable_params"):
            yield f"{source}_{name}", _figure(receipts, stage, "metrics", name)
        made = result_of(receipts, DistillResult, stage)
        encoder = made is not None and made.student == "encoder"
        yield f"{source}_kind", made.student if made else None
        yield f"{source}_prompt", "query_only" if encoder else made.io_format.prompt if made else None
        yield f"{source}_output", "labels" if encoder else made.io_format.output if made else None


def _quality(receipts: Mapping[str, Receipt], quality: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
    found = {(line["source"], line["stratum"]): line for line in quality}
    for name in SLICES:
        counts = [line["n"] for (_, stratum), line in found.items() if stratum == name]
        yield f"labelled_rows_{name}", max(counts) if counts else None
    for source in SOURCES:
        for name in SLICES:
            line = found.get((source, name), {})
            where = f"{source}_{name}"
            yield f"quality_{where}", line.get("quality")
            yield f"quality_low_{where}", line.get("low")
            yield f"quality_high_{where}", line.get("high")
            yield f"quality_method_{where}", line.get("method")
        yield f"exact_{source}", found.get((source, "all"), {}).get("exact")
    for source in MODELS:
        for name in ("ece", "auroc", "agreement")[: 2 if source == "teacher" else 3]:
            yield f"{name}_{source}", _quality_metric(receipts, f"{name}/{source}")
        for name in () if source == "teacher" else ("times_faster", "times_fewer_tokens"):
            yield f"{name}_{source}", _quality_metric(receipts, f"figures/{source}/{name}_than_teacher")
    for end in ("value", "low", "high"):
        for source in MODELS[1:]:
            yield f"{source}_minus_teacher{'' if end == 'value' else '_' + end}", _quality_metric(receipts, f"difference/{source}/{end}")


def _quality_metric(receipts: Mapping[str, Receipt], metric: str) -> float | None:
    return next((value for name in _EVALUATIONS if (value := _figure(receipts, name, "metrics", metric)) is not None), None)


def notes(receipts: Mapping[str, Receipt], summary: Mapping[str, Any]) -> Iterator[str]:
    """What a reader should know: the report's own remarks first, then each stage's."""
    teacher = summary["model_teacher"] or ""
    if teacher.startswith("example:"):
        yield (
            f"The teacher ({teacher}) is the small placeholder that ships with headtail, not a strong LLM: quality and cost ratios here "
            "show that the pipeline works, and not what a real teacher and student reach."
        )
    elif teacher.startswith("distill/"):
        yield (
            f"The teacher ({teacher}) was trained here on the training split of people's answers, because no model was named: it is a "
            "placeholder for a strong LLM."
        )
    if summary["agreement_batch_student"] is not None:
        yield (
            "Agreement compares the batch student with its own teacher; "
            "it does not say whether either is right, and is not a quality figure."
        )
    small = [f"{name} ({summary[f'labelled_rows_{name}']})" for name in SLICES[:4] if (summary[f"labelled_rows_{name}"] or 0) < SMALL]
    if small and summary["labelled_rows_all"] is not None:
        yield f"Few labelled rows in {', '.join(small)}: read the intervals, not the dots."
    if summary["student_served"] is False and summary["model_batch_student"]:
        yield "The release serves no student: it did not pass the gate or was not named, so a miss ends in the fallback."
    if summary["requests"]:
        yield f"Latency is what the replaying client saw over {int(summary['requests']):,} requests; client and server may share a machine."
    if summary["usd_per_million_teacher"] is not None:
        yield "Cost is the machine's price times the seconds it was busy, engine start included; the price is an assumption (docs/cost.md)."
    for name in _stage_order(receipts):
        for text in receipts[name].notes:
            yield f"{name}: {text}"


def headline(summary: Mapping[str, Any]) -> Iterator[str]:
    """What was found, in sentences for somebody who reads nothing else."""
    if summary["coverage_holdout_traffic"] is not None:
        shares = [f"{percent(summary['cache_hit_share'])} was answered from the cache"]
        shares += [f"{percent(summary['realtime_share'])} by the realtime student"] if summary["realtime_share"] else []
        shares += [f"{percent(summary['fallback_share'])} by the fallback"] if summary["fallback_share"] else []
        yield f"Of the holdout traffic, {_list(shares)}."
    elif summary["head_coverage_holdout"] is not None:
        planned = percent(summary["head_coverage_holdout"])
        yield f"The head of {summary['head_rows']:,.0f} queries covers {planned} of holdout traffic (planned, not replayed)."
    scores = [
        f"the {name_of(source)} scores {_quality_text(summary, source)}"
        for source in SOURCES
        if summary[f"quality_{source}_all"] is not None
    ]
    if scores:
        yield f"On {summary['labelled_rows_all']:,} queries answered by people, {_list(scores)} out of 1 (micro-F1, 95 % interval)."
    gap, low, high = (summary[f"batch_student_minus_teacher{end}"] for end in ("", "_low", "_high"))
    if gap is not None and low <= 0 <= high:
        yield f"On the same queries no difference of batch student and teacher is shown: difference {gap:+.2f} ({low:+.2f} to {high:+.2f})."
    elif gap is not None:
        side = "below" if gap < 0 else "above"
        yield f"On the same queries the batch student is {abs(gap):.2f} {side} the teacher (difference {low:+.2f} to {high:+.2f})."
    if summary["gate_batch_passed"]:
        sure = percent(1 - summary["gate_batch_delta"], 0)
        yield f"The gate let the batch student pass: all {len(summary['gate_batch_criteria'])} criteria, with at least {sure} confidence."
    elif summary["gate_batch_passed"] is False:
        yield f"The gate rejected the batch student; what is missing: {'; '.join(summary['gate_batch_missing'])}."
    if summary["gate_realtime_passed"]:
        yield "The gate let the realtime student pass too: it answers live what is not in the cache."
    elif summary["gate_realtime_passed"] is False:
        yield f"The gate rejected the realtime student; what is missing: {'; '.join(summary['gate_realtime_missing'])}."
    if summary["latency_all_p50_ms"] is not None:
        half, most = ms(summary["latency_all_p50_ms"]), ms(summary["latency_all_p99_ms"])
        yield f"Half of the requests were answered within {half}, 99 of 100 within {most}."
    teacher, student, ratio = (
        summary[k] for k in ("usd_per_million_teacher", "usd_per_million_batch_student", "cost_ratio_teacher_to_batch_student")
    )
    if ratio is not None:
        less = f"{ratio:.1f} times less" if ratio >= 1 else f"{1 / ratio:.1f} times more"
        yield f"A million queries cost {usd(teacher)} with the teacher and {usd(student)} with the batch student: {less}."
        if summary["cost_ratio_running_realtime_student"]:
            batch, realtime = (summary[f"cost_ratio_running_{one}"] for one in MODELS[1:])
            both = f"the batch student {batch:.1f} and the realtime student {realtime:.1f} times"
            yield f"Without the engines' start, which matters little in a long run, {both} less than the teacher."
    elif teacher is not None:
        yield f"A million queries cost {usd(teacher)} with the teacher."


def name_of(source: str) -> str:
    """An answer source in words."""
    return source.replace("_", " ")


def percent(value: float | None, digits: int = 1) -> str:
    """A share for people, a dash when unknown."""
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def ms(value: float | None) -> str:
    """Milliseconds for people."""
    if value is None:
        return "–"
    return f"{value:,.0f} ms" if value >= 10 else f"{value:.1f} ms"


def usd(value: float | None) -> str:
    """Money for people."""
    if value is None:
        return "–"
    return f"USD {value:,.0f}" if value >= 1000 else f"USD {value:,.2f}"


def _quality_text(summary: Mapping[str, Any], source: str) -> str:
    low, high = summary[f"quality_low_{source}_all"], summary[f"quality_high_{source}_all"]
    return f"{summary[f'quality_{source}_all']:.2f} ({low:.2f} to {high:.2f})"


def _list(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _figure(receipts: Mapping[str, Receipt], stage: str, part: str, name: str) -> Any:
    return getattr(receipts[stage], part).get(name) if stage in receipts else None


def result_of(receipts: Mapping[str, Receipt], kind: type[R], *names: str) -> R | None:
    """The result of the first of these stages that was run."""
    results = (receipts[name].result for name in names if name in receipts)
    return next((result for result in results if isinstance(result, kind)), None)


def _task(receipts: Mapping[str, Receipt]) -> str | None:
    """A task that decided a stage's outputs; a log and its plan may have been made for another that reads the same columns."""
    tasks = sorted((not receipt.task_fingerprint, receipt.task) for receipt in receipts.values() if receipt.task)
    return tasks[0][1] if tasks else None


def _running(summary: Mapping[str, Any], source: str) -> float | None:
    """The cost without the engine's start, which a long run spreads over more rows: its price falls towards this."""
    usd, start, work = (summary[f"{name}_{source}"] for name in ("usd_per_million", "engine_start_s", "generate_s"))
    return usd * work / (work + start) if usd is not None and work and start is not None else None


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above and below else None


def _stage_order(receipts: Mapping[str, Receipt]) -> list[str]:
    """Stages in the order of the data's way; those of other names (a trained teacher, say) by when they ran."""
    known = [name for name in REPORTED_STAGES if name in receipts]
    for name in sorted((n for n in receipts if n not in REPORTED_STAGES), key=lambda n: (receipts[n].started, n)):
        place = next((i for i, k in enumerate(known) if receipts[k].started > receipts[name].started), len(known))
        known.insert(place, name)
    return known


def _step(name: str, receipt: Receipt, reused: bool) -> dict[str, Any]:
    return {
        "stage": name,
        "path": receipt.path,
        "fingerprint": receipt.fingerprint,
        "inputs": dict(receipt.inputs),
        "started": receipt.started,
        "seconds": receipt.seconds,
        "reused": reused,
        "run_id": receipt.run_id,
    }
