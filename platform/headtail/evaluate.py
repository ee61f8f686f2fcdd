"""Evaluate answers against people's gold: quality by tier and stratum, with intervals, and how far confidences hold.

    gold + answers of each tier -> rows (one per gold row and tier) -> quality (tier x stratum), calibration, report

A gold row without a valid answer counts as missed. The fallback tier is computed from the task. What compares a student
with its teacher is called agreement and is no quality figure. Knows nothing of how answers were made.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, field_validator

from headtail import charts
from headtail.config import StageConfig
from headtail.errors import InputError
from headtail.generate import answers as read_answers
from headtail.intervals import BOOTSTRAP, Bin, Interval, auroc, ece, f1_difference, f1_interval, reliability, share_interval
from headtail.keys import canonical
from headtail.receipt import Receipt, load_receipt, load_ref
from headtail.rows import GOLD, KEY, Source, State, Stratum, conform
from headtail.station import Station, run_once, versions
from headtail.storage import open_storage
from headtail.task import Task, load_task

ALL, TRAFFIC = "all", "traffic"
SLICES = (*(str(s) for s in Stratum), ALL, TRAFFIC)
ABSENT = "absent"  # state of a gold row that a tier was never asked
SMALL = 30  # gold rows below which a figure is said to rest on few

# One gold row as one tier answered it.
ROWS = pa.schema(
    [
        ("query_key", KEY),
        ("query", pa.string()),
        ("stratum", pa.string()),
        ("count", pa.int64()),
        ("tier", pa.string()),
        ("wanted", pa.string()),
        ("given", pa.string()),  # null when there is no valid answer
        ("state", pa.string()),
        ("tp", pa.int32()),
        ("fp", pa.int32()),
        ("fn", pa.int32()),
        ("exact", pa.bool_()),
        ("confidence", pa.float32()),
    ]
)

# Quality of one tier on one slice of the gold rows. Figures are null when the slice has no row.
QUALITY = pa.schema(
    [
        ("tier", pa.string()),
        ("stratum", pa.string()),
        ("n", pa.int64()),
        ("answered", pa.int64()),
        ("quality", pa.float64()),  # micro-F1
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("exact", pa.float64()),  # share of rows wholly right
        ("effective", pa.float64()),  # equal rows that would carry as much (Kish)
        ("method", pa.string()),  # how the interval was made
    ]
)


class Config(StageConfig):
    """What is compared with what."""

    task: str = Field("query_segmentation", description="task folder or name of a shipped example")
    gold: str = Field("plan:gold", description="table ref of the gold rows, such as plan:gold or plan/ab12:gold")
    answers: dict[str, str] = Field({"teacher": "precompute"}, description="precompute receipt ref of each tier, by the tier's name")
    confidence: float = Field(0.95, gt=0.5, lt=1, description="chance with which an interval covers the truth")
    resamples: int = Field(2000, ge=200, le=100_000, description="bootstrap resamples")
    seed: int = Field(0, ge=0, description="seed of the bootstrap")

    @field_validator("answers")
    @classmethod
    def _tiers(cls, value: dict[str, str]) -> dict[str, str]:
        if Source.FALLBACK in value:
            raise ValueError("the fallback tier is computed from the task; leave it out")
        if not value:
            raise ValueError("name at least one tier, such as teacher: precompute")
        return value


class Given(NamedTuple):
    """What a tier gave for a query: parsed answer (None unless answered), state, confidence (None when unknown)."""

    answer: Any
    state: str
    confidence: float | None


def run(config: Config) -> Receipt:
    """Score every tier's answers to the gold rows."""
    task, store = load_task(config.task), open_storage(config.root)
    gold, name = load_ref(store, config.gold)
    found = {tier: load_receipt(store, "precompute", ref) for tier, ref in config.answers.items()}

    def work(station: Station) -> None:
        wanted = conform(gold.table(store, name), GOLD, gold.output(name).path)
        if not wanted.num_rows:
            fix = "name a gold column or file when you run ingest"
            raise InputError("no gold rows to evaluate on", where=gold.output(name).path, fix=fix)
        keys = wanted["query_key"].combine_chunks()
        given = {tier: lookup(task, read_answers(store, receipt, _COLUMNS), keys, receipt.path) for tier, receipt in found.items()}
        for tier, answers in given.items():
            if not answers:
                fix = f"add {config.gold} to precompute's inputs"
                raise InputError(f"no gold query is among the answers of {tier}", where=found[tier].path, value=config.gold, fix=fix)
        _write(station, config, task, found, score_rows(task, wanted, given))

    replaces = {"task": task.name, "gold": f"{gold.path}:{name}", "answers": {tier: receipt.path for tier, receipt in found.items()}}
    return run_once("evaluate", config, work, inputs={"gold": gold, **found}, task=task, replaces=replaces)


_COLUMNS = ["query_key", "answer_key", "state", "answer", "confidence"]


def lookup(task: Task, tables: Iterable[pa.Table], keys: pa.Array, where: str) -> dict[bytes, Given]:
    """The answers to `keys` among `tables`. Of several answers to one query an answered one wins, then the smaller answer_key.

    InputError when an answer is not valid under `task`: it belongs to another task, and its score would mean nothing.
    """
    best: dict[bytes, tuple[bool, bytes, dict[str, Any]]] = {}
    for table in tables:
        for row in table.filter(pc.is_in(table["query_key"], value_set=keys)).to_pylist():
            order = (row["state"] != State.ANSWERED, row["answer_key"] or b"")
            held = best.get(row["query_key"])
            if held is None or order < held[:2]:
                best[row["query_key"]] = (*order, row)
    return {key: _given(task, row, where) for key, (_, _, row) in best.items()}


def _given(task: Task, row: Mapping[str, Any], where: str) -> Given:
    if row["state"] != State.ANSWERED:
        return Given(None, row["state"], None)
    answer, problem = task.parse(row["answer"])
    if problem:
        fix = "name a precompute of this task, or run precompute again"
        raise InputError(f"an answer is not valid under task {task.name}: {problem}", where=where, value=row["answer"], fix=fix)
    return Given(answer, row["state"], row["confidence"])


def score_rows(task: Task, gold: pa.Table, tiers: Mapping[str, Mapping[bytes, Given]]) -> pa.Table:
    """One ROWS row per gold row and tier, the fallback's last."""
    lines = []
    for row in gold.to_pylist():
        wanted = _wanted(row)
        everyone = {tier: answers.get(row["query_key"], Given(None, ABSENT, None)) for tier, answers in tiers.items()}
        everyone[str(Source.FALLBACK)] = Given(task.fallback(row["query"]), str(State.ANSWERED), None)
        base = {name: row[name] for name in ("query_key", "query", "stratum", "count")}
        for tier, given in everyone.items():
            answered, counts = given.state == State.ANSWERED, task.score(wanted, given.answer)
            text = canonical(given.answer, tier) if answered else None
            line = {**base, "tier": tier, "wanted": row["answer"], "given": text, "state": given.state, "confidence": given.confidence}
            lines.append({**line, **counts._asdict(), "exact": answered and counts.right})
    return pa.Table.from_pylist(lines, schema=ROWS)


def _wanted(row: Mapping[str, Any]) -> Any:
    try:
        return json.loads(row["answer"])
    except (TypeError, json.JSONDecodeError) as error:
        where = f"query {row['query']!r}"
        raise InputError(f"a gold answer is not JSON: {error}", where=where, value=row["answer"], fix="run ingest again") from None


class Scored(NamedTuple):
    """One tier's rows as arrays."""

    tier: str
    stratum: np.ndarray[Any, np.dtype[Any]]
    traffic: np.ndarray[Any, np.dtype[np.float64]]
    tp: np.ndarray[Any, np.dtype[np.float64]]
    fp: np.ndarray[Any, np.dtype[np.float64]]
    fn: np.ndarray[Any, np.dtype[np.float64]]
    exact: np.ndarray[Any, np.dtype[np.bool_]]
    answered: np.ndarray[Any, np.dtype[np.bool_]]
    confidence: np.ndarray[Any, np.dtype[np.float64]]  # NaN when unknown
    given: list[str | None]

    def where(self, name: str) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """The rows of a slice."""
        if name == ALL:
            return np.ones(len(self.tp), dtype=bool)
        return self.traffic > 0 if name == TRAFFIC else self.stratum == name


def by_tier(rows: pa.Table) -> list[Scored]:
    """`rows` split by tier, in order of first appearance."""
    found = []
    for tier in rows["tier"].unique().to_pylist():
        part = rows.filter(pc.equal(rows["tier"], tier))
        tp, fp, fn, count = (part[name].cast(pa.float64()).to_numpy() for name in ("tp", "fp", "fn", "count"))
        confidence = part["confidence"].cast(pa.float64()).fill_null(float("nan")).to_numpy()
        answered = pc.equal(part["state"], State.ANSWERED.value).to_numpy()
        stratum = np.asarray(part["stratum"].to_pylist(), dtype=object)
        traffic = np.nan_to_num(count, nan=0.0)
        found.append(Scored(tier, stratum, traffic, tp, fp, fn, part["exact"].to_numpy(), answered, confidence, part["given"].to_pylist()))
    return found


def quality_of(scored: Scored, name: str, config: Config) -> Interval:
    """Micro-F1 of one tier on one slice. Rows in which nothing was wanted and nothing given carry no unit; a slice of
    such rows only has its share of answered rows as its quality, so that silence is not praised."""
    inside = scored.where(name)
    weights = scored.traffic[inside] if name == TRAFFIC else None
    tp, fp, fn = scored.tp[inside], scored.fp[inside], scored.fn[inside]
    found = f1_interval(tp, fp, fn, weights, confidence=config.confidence, resamples=config.resamples, seed=config.seed)
    return share_interval(scored.exact[inside], config.confidence) if found.value != found.value else found


def quality_rows(rows: pa.Table, config: Config) -> pa.Table:
    """The QUALITY table of scored rows: every tier on every slice."""
    columns: dict[str, list[Any]] = {name: [] for name in QUALITY.names}
    for scored in by_tier(rows):
        for name in SLICES:
            inside, found = scored.where(name), quality_of(scored, name, config)
            weights = scored.traffic[inside] if name == TRAFFIC else np.ones(int(inside.sum()))
            values = found if inside.any() else Interval(*[None] * 6)  # type: ignore[arg-type]
            exact = float(np.average(scored.exact[inside], weights=weights)) if inside.any() else None
            line = (scored.tier, name, int(inside.sum()), int(scored.answered[inside].sum()), values.value, values.low, values.high)
            for column, value in zip(QUALITY.names, (*line, exact, values.effective, values.method), strict=True):
                columns[column].append(value)
    return pa.table(columns, schema=QUALITY)


class Calibration(NamedTuple):
    """How far a tier's confidences hold, over its answered rows that have one. NaN when there are none, or no mix."""

    n: int
    ece: float
    auroc: float
    bins: list[Bin]


def calibration_of(scored: Scored, config: Config) -> Calibration:
    """Confidence against the whole answer being right."""
    known = scored.answered & ~np.isnan(scored.confidence)
    confidence, right = scored.confidence[known], scored.exact[known]
    bins = reliability(confidence, right, 15, config.confidence)
    return Calibration(int(known.sum()), ece(confidence, right), auroc(confidence, right), bins)


def agreement(task: Task, teacher: Scored, student: Scored) -> tuple[float, int]:
    """Micro-F1 of the student with the teacher's answers taken as wanted, and the rows both answered. Says nothing of quality."""
    tp = fp = fn = n = 0
    for theirs, ours in zip(teacher.given, student.given, strict=True):
        if theirs is None or ours is None:
            continue
        counts = task.score(json.loads(theirs), json.loads(ours))
        tp, fp, fn, n = tp + counts.tp, fp + counts.fp, fn + counts.fn, n + 1
    units = 2 * tp + fp + fn
    return (2 * tp / units if units else float(n > 0)), n


def differences(scored: Sequence[Scored], config: Config) -> Iterator[dict[str, Any]]:
    """Each other tier minus the teacher (the first tier when none has that name), on the same rows, by slice."""
    base = next((s for s in scored if s.tier == Source.TEACHER), scored[0])
    for other in scored:
        for name in (*(str(s) for s in Stratum), ALL) if other is not base else ():
            inside = other.where(name)
            if not inside.any():
                continue
            a, b = ((s.tp[inside], s.fp[inside], s.fn[inside]) for s in (other, base))
            found = f1_difference(a, b, confidence=config.confidence, resamples=config.resamples, seed=config.seed)
            yield {"tier": other.tier, "minus": base.tier, "split": name, **_interval(found)}


def _interval(found: Interval) -> dict[str, Any]:
    value = None if found.value != found.value else found.value
    return {"value": value, "low": found.low, "high": found.high, "n": found.n, "effective_n": found.effective, "method": found.method}


def _write(station: Station, config: Config, task: Task, receipts: Mapping[str, Receipt], rows: pa.Table) -> None:
    scored, quality = by_tier(rows), quality_rows(rows, config)
    calibrated = {s.tier: calibration_of(s, config) for s in scored if s.tier != Source.FALLBACK}
    gaps = list(differences(scored, config))
    for line in quality.to_pylist():
        if line["n"]:
            where = f"{line['tier']}/{line['stratum']}"
            station.metrics |= {f"quality/{where}": line["quality"], f"low/{where}": line["low"], f"high/{where}": line["high"]}
            if line["stratum"] == ALL:
                station.metrics[f"exact/{line['tier']}/{ALL}"] = line["exact"]
    for tier, found in calibrated.items():
        station.metrics |= {k: v for k, v in ((f"ece/{tier}", found.ece), (f"auroc/{tier}", found.auroc)) if v == v}
    for gap in gaps:
        if gap["split"] == ALL and gap["tier"] != Source.FALLBACK and gap["value"] is not None:
            station.metrics |= {f"difference/{gap['tier']}/{end}": gap[end] for end in ("value", "low", "high")}
    teacher = next((s for s in scored if s.tier == Source.TEACHER), None)
    for student in scored:
        if teacher and student.tier not in (Source.TEACHER, Source.FALLBACK):
            name = f"agreement/{student.tier}"
            station.metrics[name], both = agreement(task, teacher, student)
            station.note(f"{name} compares {student.tier} with teacher on the {both:,} gold rows both answered: it is no quality figure")
    station.rows |= {"gold": len(scored[0].tp), **{f"answered.{s.tier}": int(s.answered.sum()) for s in scored}}
    for text in remarks(quality, rows, task, receipts):
        station.note(text)
    station.table("rows", rows)
    station.table("quality", quality)
    station.figure("quality", _quality_figure(quality, config))
    station.figure("calibration", _calibration_figure(calibrated))
    station.json("report", helm(config, task, receipts, scored, quality, calibrated, gaps, station.notes))


def remarks(quality: pa.Table, rows: pa.Table, task: Task, receipts: Mapping[str, Receipt]) -> Iterator[str]:
    """What a reader should know before trusting the figures."""
    lines = quality.to_pylist()
    first = [line for line in lines if line["tier"] == lines[0]["tier"]]
    for line in first:
        if line["stratum"] in (ALL, TRAFFIC):
            continue
        if not line["n"]:
            yield f"{line['stratum']}: no gold rows, so nothing is known of it"
        elif line["n"] < SMALL:
            yield f"{line['stratum']}: only {line['n']} gold rows; its intervals are wide and exact (Clopper-Pearson), not bootstrap"
    exact = sorted({line["stratum"] for line in lines if line["n"] and line["n"] >= SMALL and line["method"] != BOOTSTRAP})
    if exact:
        why = "too few effective rows, or rows of one kind, for a bootstrap"
        yield f"{', '.join(exact)}: {why}; some intervals are Clopper-Pearson at the effective number of rows"
    for line in first:
        if line["stratum"] == TRAFFIC and line["n"] and line["effective"] < line["n"] / 4:
            yield f"traffic: {line['n']:,} gold rows weighted by their events carry as much as {line['effective']:.0f} equal rows"
    for tier, receipt in receipts.items():
        mine = rows.filter(pc.equal(rows["tier"], tier))
        absent = int(pc.sum(pc.equal(mine["state"], ABSENT)).as_py())
        if absent:
            yield f"{tier}: {absent:,} of {mine.num_rows:,} gold queries were never asked; they count as missed"
        made_under = receipt.task_fingerprint
        if made_under and made_under != task.fingerprint:
            yield f"{tier}: made under another prompt or schema of this task (fingerprint {made_under[:8]}, now {task.fingerprint[:8]})"


def helm(
    config: Config,
    task: Task,
    receipts: Mapping[str, Receipt],
    scored: Sequence[Scored],
    quality: pa.Table,
    calibrated: Mapping[str, Calibration],
    gaps: Sequence[Mapping[str, Any]],
    notes: Sequence[str],
) -> dict[str, Any]:
    """The evaluation as one JSON document in the manner of HELM: per tier a model, a prompt and its metrics per slice."""
    runs = []
    for s in scored:
        receipt, held = receipts.get(s.tier), calibrated.get(s.tier)
        model = receipt.facts.get("model", {}) if receipt else {"name": "the task's fallback; no model"}
        run = {"tier": s.tier, "model": model, "answers": receipt.path if receipt else ""}
        run["prompt_fingerprint"] = receipt.task_fingerprint if receipt else ""
        run["metrics"] = list(_metrics(s, quality, held, config))
        run["reliability"] = [b._asdict() for b in held.bins] if held else []
        runs.append({**run, "versions": receipt.versions if receipt else {}})
    return {
        "format": "headtail-evaluation/1",
        "task": {
            "name": task.name,
            "description": task.file.description,
            "fingerprint": task.fingerprint,
            "score": task.file.score.model_dump(),
        },
        "gold": {"ref": config.gold, "n": len(scored[0].tp)},
        "interval": {"confidence": config.confidence, "resamples": config.resamples, "seed": config.seed, "unit": "gold row"},
        "runs": runs,
        "differences": list(gaps),
        "versions": versions(),
        "notes": list(notes),
    }


def _metrics(s: Scored, quality: pa.Table, held: Calibration | None, config: Config) -> Iterator[dict[str, Any]]:
    for q in quality.filter(pc.equal(quality["tier"], s.tier)).to_pylist():
        figures = {"value": q["quality"], "low": q["low"], "high": q["high"], "method": q["method"], "effective_n": q["effective"]}
        yield {"name": "micro_f1", "split": q["stratum"], "n": q["n"], "answered": q["answered"], **figures}
    for name in (*(str(x) for x in Stratum), ALL):
        if s.where(name).any():
            yield {"name": "exact_match", "split": name, **_interval(share_interval(s.exact[s.where(name)], config.confidence))}
    for name, value in (("ece_15_equal_mass_bins", held.ece), ("auroc_confidence_vs_exact_match", held.auroc)) if held else ():
        if held and value == value:
            yield {"name": name, "split": ALL, "n": held.n, "value": value}


def _quality_figure(quality: pa.Table, config: Config) -> Any:
    lines = [line for line in quality.to_pylist() if line["n"]]
    points = [charts.Point(q["tier"], q["stratum"], q["quality"], q["low"], q["high"], q["n"]) for q in lines]
    return charts.quality(points, confidence=config.confidence)


def _calibration_figure(calibrated: Mapping[str, Calibration]) -> Any:
    labels = {tier: f"{tier}: ECE {c.ece:.3f}, AUROC {c.auroc:.3f}" for tier, c in calibrated.items()}
    return charts.calibration({tier: [charts.Reliable(*b) for b in c.bins] for tier, c in calibrated.items()}, labels)
