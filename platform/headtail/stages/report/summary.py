"""The summary: every figure of a report under one plain, flat name, with null for what was not run.

In: receipts by station, the quality table. Out: a dict that is JSON as it stands (names: docs/report.md), and the
few sentences that say what it means. Reads no files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from headtail import __version__
from headtail.core.evidence import read_evidence
from headtail.core.receipt import Receipt
from headtail.core.rows import SLICES, SMALL, State

STATIONS = (
    "ingest",
    "plan",
    "precompute_teacher",
    "publish_head",
    "evaluate_teacher",
    "curate",
    "distill",
    "precompute_student",
    "distill_realtime",
    "precompute_realtime",
    "evaluate",
    "gate",
    "gate_realtime",
    "publish",
    "replay",
)
REALTIME = ("distill_realtime", "precompute_realtime", "gate_realtime")  # there only where a second student answers live
MODELS = ("teacher", "student", "realtime")
TIERS = (*MODELS, "fallback")
SOURCES = ("cache", "live", "fallback")

# name in the summary: (station, part of its receipt, name there). The first station that has it wins.
_FIGURES: dict[str, tuple[tuple[str, str, str], ...]] = {
    "log_events": (("ingest", "rows", "events"),),
    "log_queries": (("ingest", "rows", "queries"),),
    "later_events": (("ingest", "rows", "later_events"),),
    "unseen_share_later_events": (("ingest", "metrics", "unseen_share_later_events"),),
    "gold_rows": (("plan", "rows", "gold"), ("ingest", "rows", "gold")),
    "head_rows": (("plan", "metrics", "head_rows"), ("plan", "rows", "head")),
    "head_coverage": (("plan", "metrics", "head_coverage"),),
    "head_coverage_later": (("plan", "metrics", "head_coverage_later"),),
    "seen_coverage_later": (("plan", "metrics", "seen_coverage_later"),),
    "zipf_exponent": (("plan", "metrics", "zipf_exponent"),),
    "golden_rows": (("curate", "rows", "golden"),),
    "golden_dropped": (("curate", "rows", "dropped"),),
    "published_rows": (("publish", "rows", "published"), ("publish_head", "rows", "published")),
    "coverage_log": (("publish", "metrics", "coverage"), ("publish_head", "metrics", "coverage")),
    "coverage_log_head": (("publish_head", "metrics", "coverage"),),
    "coverage_later_traffic": (("replay", "metrics", "cache_hit_share"),),
    "cache_hit_share": (("replay", "metrics", "cache_hit_share"),),
    "live_share": (("replay", "metrics", "live_share"),),
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
    for tier in MODELS:
        job = f"precompute_{tier}"
        made[f"model_{tier}"] = _model_name(receipts[job]) if job in receipts else None
        made |= {f"rows_{tier}_{name}": _figure(receipts, job, "rows", name) for name in _JOB_ROWS}
        made |= {f"{name}_{tier}": _figure(receipts, job, "metrics", name) for name in _JOB_METRICS}
        if made[f"usd_per_hour_{tier}"] is None and job in receipts:
            made[f"usd_per_hour_{tier}"] = receipts[job].facts.get("usd_per_hour")
        made[f"usd_per_million_running_{tier}"] = _running(made, tier)
    made |= dict(_training(receipts))
    made["usd_per_million_fallback"] = 0.0
    made["cost_ratio_teacher_to_student"] = _ratio(made["usd_per_million_teacher"], made["usd_per_million_student"])
    made["cost_ratio_teacher_to_realtime"] = _ratio(made["usd_per_million_teacher"], made["usd_per_million_realtime"])
    made["cost_ratio_running"] = _ratio(made["usd_per_million_running_teacher"], made["usd_per_million_running_student"])
    made["cost_ratio_running_realtime"] = _ratio(made["usd_per_million_running_teacher"], made["usd_per_million_running_realtime"])
    made["tiers"] = [tier for tier in TIERS if tier != "realtime" or made["model_realtime"]]
    for source in ("all", *SOURCES):
        end = "" if source == "all" else f"/{source}"
        made |= {f"latency_{source}_{p}_ms": _figure(receipts, "replay", "metrics", f"{p}_ms{end}") for p in ("p50", "p95", "p99")}
        made[f"requests_{source}"] = made["requests"] if source == "all" else _figure(receipts, "replay", "rows", source)
    made |= _gate(receipts, "gate", "gate") | _gate(receipts, "gate_realtime", "realtime_gate")
    made |= {"release": _fact(receipts, "release"), "generation": _fact(receipts, "generation")}
    made["student_served"] = bool(receipts["publish"].facts.get("student")) if "publish" in receipts else None
    made |= {f"seconds_{name}": receipts[name].seconds if name in receipts else None for name in STATIONS}
    made["not_run"] = [name for name in STATIONS if name not in receipts and (made["model_realtime"] or name not in REALTIME)]
    made["lineage"] = [_step(name, receipts[name], name in reused) for name in _ordered(receipts)]
    made["notes"] = list(dict.fromkeys(notes(receipts, made)))
    made["headline"] = list(headline(made))
    return made


def _gate(receipts: Mapping[str, Receipt], station: str, name: str) -> dict[str, Any]:
    """The verdict on a student, each claim in words, and what stood in the way."""
    if station not in receipts:
        return {f"{name}_passed": None, f"{name}_delta": None, f"{name}_claims": [], f"{name}_lacking": []}
    found = read_evidence(receipts[station].facts["evidence"])
    claims = [
        {"kind": claim.kind, "stratum": claim.stratum, "n": claim.n, "value": claim.value, "low": claim.low, "least": claim.least}
        | {"passed": claim.passed, "words": claim.words()}
        for claim in found.claims
    ]
    lacking = found.lacking()
    return {f"{name}_passed": not lacking, f"{name}_delta": found.delta, f"{name}_claims": claims, f"{name}_lacking": lacking}


def _training(receipts: Mapping[str, Receipt]) -> Iterator[tuple[str, Any]]:
    """How each student was made."""
    for tier, station, end in (("student", "distill", ""), ("realtime", "distill_realtime", "_realtime")):
        yield f"train_examples{end}", _figure(receipts, station, "rows", "golden")
        for name in ("train_loss", "eval_loss", "train_seconds"):
            yield f"{name}{end}", _figure(receipts, station, "metrics", name)
        for name in ("params", "trainable_params"):
            yield f"{tier}_{name}", _figure(receipts, station, "metrics", name)
        config = receipts[station].settings.get("config", {}) if station in receipts else {}
        form, kind = config.get("form", {}), config.get("student")
        yield f"{tier}_kind", kind
        yield f"{tier}_prompt", "bare" if kind == "encoder" else form.get("prompt")
        yield f"{tier}_answer", "labels" if kind == "encoder" else form.get("answer")


def _quality(receipts: Mapping[str, Receipt], quality: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
    found = {(line["tier"], line["stratum"]): line for line in quality}
    for name in SLICES:
        counts = [line["n"] for (_, stratum), line in found.items() if stratum == name]
        yield f"gold_rows_{name}", max(counts) if counts else None
    for tier in TIERS:
        for name in SLICES:
            line = found.get((tier, name), {})
            where = f"{tier}_{name}"
            yield f"quality_{where}", line.get("quality")
            yield f"quality_low_{where}", line.get("low")
            yield f"quality_high_{where}", line.get("high")
            yield f"quality_method_{where}", line.get("method")
        yield f"exact_{tier}", found.get((tier, "all"), {}).get("exact")
    for tier in MODELS:
        for name in ("ece", "auroc", "agreement")[: 2 if tier == "teacher" else 3]:
            yield f"{name}_{tier}", _evaluated(receipts, f"{name}/{tier}")
        for name in () if tier == "teacher" else ("times_faster", "times_fewer_tokens"):
            yield f"{name}_{tier}", _evaluated(receipts, f"figures/{tier}/{name}_than_teacher")
    for end in ("value", "low", "high"):
        for tier in MODELS[1:]:
            yield f"{tier}_minus_teacher{'' if end == 'value' else '_' + end}", _evaluated(receipts, f"difference/{tier}/{end}")


def _evaluated(receipts: Mapping[str, Receipt], metric: str) -> float | None:
    return next((value for name in _EVALUATIONS if (value := _figure(receipts, name, "metrics", metric)) is not None), None)


def notes(receipts: Mapping[str, Receipt], made: Mapping[str, Any]) -> Iterator[str]:
    """What a reader should know: the report's own remarks first, then each station's."""
    teacher = made["model_teacher"] or ""
    if teacher.startswith("example:"):
        yield (
            f"The teacher ({teacher}) is the small stand-in that ships with headtail, not a strong LLM: quality and cost ratios here "
            "show that the way works, not what a real teacher and student reach."
        )
    elif teacher.startswith("distill/"):
        yield (
            f"The teacher ({teacher}) was trained here on the training split of people's answers, because no model was named: it is a "
            "stand-in for a strong LLM."
        )
    if made["agreement_student"] is not None:
        yield "Agreement compares the student with its own teacher; it says nothing of whether either is right, and is no quality figure."
    small = [f"{name} ({made[f'gold_rows_{name}']})" for name in SLICES[:4] if (made[f"gold_rows_{name}"] or 0) < SMALL]
    if small and made["gold_rows_all"] is not None:
        yield f"Few gold rows in {', '.join(small)}: read the intervals, not the dots."
    if made["student_served"] is False and made["model_student"]:
        yield "The release serves no student: it did not pass the gate or was not named, so a miss ends in the fallback."
    if made["requests"]:
        yield f"Latency is what the replaying client saw over {int(made['requests']):,} requests; client and server may share a machine."
    if made["usd_per_million_teacher"] is not None:
        yield "Cost is the machine's price times the seconds it was busy, engine start included; the price is an assumption (docs/cost.md)."
    for name in _ordered(receipts):
        for text in receipts[name].notes:
            yield f"{name}: {text}"


def headline(made: Mapping[str, Any]) -> Iterator[str]:
    """What was found, in sentences for somebody who reads nothing else."""
    if made["coverage_later_traffic"] is not None:
        shares = [f"{percent(made['cache_hit_share'])} was answered from the cache"]
        shares += [f"{percent(made['live_share'])} live by the student"] if made["live_share"] else []
        shares += [f"{percent(made['fallback_share'])} by the fallback"] if made["fallback_share"] else []
        yield f"Of the later traffic, {_list(shares)}."
    elif made["head_coverage_later"] is not None:
        planned = percent(made["head_coverage_later"])
        yield f"The head of {made['head_rows']:,.0f} queries covers {planned} of later traffic (planned, not replayed)."
    scores = [f"the {tier} scores {_scored(made, tier)}" for tier in TIERS if made[f"quality_{tier}_all"] is not None]
    if scores:
        yield f"On {made['gold_rows_all']:,} queries answered by people, {_list(scores)} out of 1 (micro-F1, 95 % interval)."
    gap, low, high = (made[f"student_minus_teacher{end}"] for end in ("", "_low", "_high"))
    if gap is not None and low <= 0 <= high:
        yield f"On the same queries student and teacher cannot be told apart: difference {gap:+.2f} ({low:+.2f} to {high:+.2f})."
    elif gap is not None:
        side = "below" if gap < 0 else "above"
        yield f"On the same queries the student is {abs(gap):.2f} {side} the teacher (difference {low:+.2f} to {high:+.2f})."
    if made["gate_passed"]:
        sure = percent(1 - made["gate_delta"], 0)
        yield f"The gate let the student pass: all {len(made['gate_claims'])} claims hold, together with at least {sure} confidence."
    elif made["gate_passed"] is False:
        yield f"The gate refused the student; what is missing: {'; '.join(made['gate_lacking'])}."
    if made["realtime_gate_passed"]:
        yield "The gate let the realtime student pass too: it answers live what is not in the cache."
    elif made["realtime_gate_passed"] is False:
        yield f"The gate refused the realtime student; what is missing: {'; '.join(made['realtime_gate_lacking'])}."
    if made["latency_all_p50_ms"] is not None:
        half, most = ms(made["latency_all_p50_ms"]), ms(made["latency_all_p99_ms"])
        yield f"Half of the requests were answered within {half}, 99 of 100 within {most}."
    teacher, student, ratio = (made[k] for k in ("usd_per_million_teacher", "usd_per_million_student", "cost_ratio_teacher_to_student"))
    if ratio is not None:
        less = f"{ratio:.1f} times less" if ratio >= 1 else f"{1 / ratio:.1f} times more"
        yield f"A million queries cost {usd(teacher)} with the teacher and {usd(student)} with the student in batch: {less}."
        if made["cost_ratio_running_realtime"]:
            both = f"the student {made['cost_ratio_running']:.1f} and the realtime student {made['cost_ratio_running_realtime']:.1f} times"
            yield f"Without the engines' start, which a long run spreads thin, {both} less than the teacher."
    elif teacher is not None:
        yield f"A million queries cost {usd(teacher)} with the teacher."


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


def _scored(made: Mapping[str, Any], tier: str) -> str:
    low, high = made[f"quality_low_{tier}_all"], made[f"quality_high_{tier}_all"]
    return f"{made[f'quality_{tier}_all']:.2f} ({low:.2f} to {high:.2f})"


def _list(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _figure(receipts: Mapping[str, Receipt], station: str, part: str, name: str) -> Any:
    return getattr(receipts[station], part).get(name) if station in receipts else None


def _fact(receipts: Mapping[str, Receipt], name: str) -> Any:
    return next((receipts[s].facts[name] for s in ("publish", "publish_head") if s in receipts and name in receipts[s].facts), None)


def _task(receipts: Mapping[str, Receipt]) -> str | None:
    for receipt in receipts.values():
        for found in (receipt.facts.get("task"), receipt.settings.get("config", {}).get("task")):
            if found and isinstance(found, str):  # ingest's settings hold the parts of the task that matter to it, not its name
                return found.rstrip("/").rsplit("/", 1)[-1]
    return None


def _model_name(receipt: Receipt) -> str:
    model = receipt.facts.get("model", "")
    return str(model.get("name", "") if isinstance(model, Mapping) else model)


def _running(made: Mapping[str, Any], tier: str) -> float | None:
    """The cost without the engine's start, which a long run spreads over more rows: its price falls towards this."""
    usd, start, work = (made[f"{name}_{tier}"] for name in ("usd_per_million", "engine_start_s", "generate_s"))
    return usd * work / (work + start) if usd is not None and work and start is not None else None


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above and below else None


def _ordered(receipts: Mapping[str, Receipt]) -> list[str]:
    """Stations in the order of the data's way; those of other names (a trained teacher, say) by when they ran."""
    known = [name for name in STATIONS if name in receipts]
    for name in sorted((n for n in receipts if n not in STATIONS), key=lambda n: (receipts[n].started, n)):
        place = next((i for i, k in enumerate(known) if receipts[k].started > receipts[name].started), len(known))
        known.insert(place, name)
    return known


def _step(name: str, receipt: Receipt, reused: bool) -> dict[str, Any]:
    return {
        "station": name,
        "path": receipt.path,
        "fingerprint": receipt.fingerprint,
        "inputs": dict(receipt.inputs),
        "started": receipt.started,
        "seconds": receipt.seconds,
        "reused": reused,
        "run_id": receipt.run_id,
    }
