"""Evaluate answers against human labels: quality by answer source and stratum, with intervals, and the calibration of confidences.

    human labels + answers of each source -> rows (one per labelled row and source) -> quality (source x stratum), calibration, report

A labelled row without a valid answer counts as missed. The fallback is computed from the task. A comparison of a student
with its teacher is called agreement and is not a quality figure. Knows nothing of how answers were made.

    scoring.py  quality, calibration, differences      served.py  the same of what users get
    confusion.py  what is taken for what      validity.py  valid answers by themselves      watch_list.py  worse than today's answers
    releases/traffic.py  what labels are of it      document.py  all of it as one HELM-like JSON      words.py  in sentences
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, field_validator

from headtail.adapters import charts
from headtail.adapters.progress import say
from headtail.adapters.storage import open_storage
from headtail.adapters.storage.receipts import load_receipt, load_ref, output_table
from headtail.batch import read_answers
from headtail.batch.answer_scores import ABSENT, COLUMNS, find_answers, score_rows
from headtail.batch.answer_sources import sources_of_labels
from headtail.cache.lineage import find_logs, write_words
from headtail.cache.words import read_words
from headtail.core.answer_source import SOURCES
from headtail.core.config import StageConfig
from headtail.core.errors import ConfigError, InputError
from headtail.core.evidence import Figures, figure_metrics, three_figures
from headtail.core.guardrails import AnswerGuard, load_own_check
from headtail.core.intervals import BOOTSTRAP
from headtail.core.post_stratify import POST_STRATIFIED, TrafficCells
from headtail.core.receipt import Receipt
from headtail.core.rows import ALL, FEEDBACK_DESIGN, SMALL, TRAFFIC, Source
from headtail.core.task import Task, load_task
from headtail.releases.claim import source_part
from headtail.releases.look import record_look
from headtail.releases.seal import open_labels, seals_digest
from headtail.releases.traffic import LogTraffic, label_rows, read_traffic, traffic_note, traffic_table, with_traffic
from headtail.stages.base import Stage, run_once
from headtail.stages.evaluate.confusion import write_confusion
from headtail.stages.evaluate.document import document
from headtail.stages.evaluate.result import Result, SourceFigures, TeacherDifference
from headtail.stages.evaluate.scoring import (
    Calibration,
    ScoredSource,
    Sureness,
    agreement,
    by_source,
    calibration_of,
    quality_rows,
    source_differences,
)
from headtail.stages.evaluate.served import serve_rows
from headtail.stages.evaluate.validity import write_validity
from headtail.stages.evaluate.watch_list import read_status_quo, write_watch_list
from headtail.stages.evaluate.words import evaluation_lines
from headtail.stages.precompute.result import Result as PrecomputeResult


class Config(StageConfig):
    """What is compared with what."""

    task: str = Field("query_segmentation", description="task folder or name of a shipped example")
    labels: str = Field(
        "plan:human_labels", description="table ref of the labelled rows, such as plan:human_labels or plan/ab12:human_labels"
    )
    answers: dict[str, str] = Field(
        {},
        description="precompute receipt ref of each answer source, by its name; empty: of each source the run that was asked the labels",
    )
    status_quo: str = Field(
        "",
        description="what users get today, for the watch list: a CSV, JSONL or Parquet file with `query`, a table ref, or a precompute "
        "receipt ref; empty: none",
    )
    status_quo_column: str = Field("answer", description="column of that file or table with the answers, as JSON")
    confidence: float = Field(0.95, gt=0.5, lt=1, description="chance with which an interval covers the truth")
    resamples: int = Field(2000, ge=200, le=100_000, description="bootstrap resamples")
    seed: int = Field(0, ge=0, description="seed of the bootstrap")

    @field_validator("answers")
    @classmethod
    def _sources(cls, value: dict[str, str]) -> dict[str, str]:
        if Source.FALLBACK in value:
            raise ValueError("the fallback is computed from the task; leave it out")
        return value

    @property
    def sure(self) -> Sureness:
        """How intervals are made."""
        return Sureness(self.confidence, self.resamples, self.seed)


def run(config: Config, task: Task | None = None) -> Receipt[Result]:
    """Score the answers of every source to the labelled rows. `task`: what `config.task` names, where it is loaded already."""
    task, store = task or load_task(config.task, config.allow_task_code), open_storage(config.root)
    human_labels, name = load_ref(store, config.labels)
    refs = config.answers or sources_of_labels(store, task, f"{human_labels.path}:{name}")
    receipts = {source: load_receipt(store, "precompute", ref, PrecomputeResult) for source, ref in refs.items()}
    _check_sources(receipts)
    today = read_status_quo(store, config.status_quo, config.status_quo_column) if config.status_quo else None

    def work(stage: Stage) -> Result:
        every = label_rows(check_design(output_table(store, human_labels, name), labels), human_labels.output(name).path)
        wanted = open_labels(store, every)
        if wanted.num_rows < every.num_rows:
            stage.note(f"{every.num_rows - wanted.num_rows:,} of the {every.num_rows:,} human labels are sealed: the gate alone reads them")
        if not wanted.num_rows:
            fix = "name a labels column or file when you run ingest"
            raise InputError("no labelled rows to evaluate on", where=human_labels.output(name).path, fix=fix)
        keys = wanted["query_key"].combine_chunks()
        given = {
            source: find_answers(task, read_answers(store, receipt, COLUMNS), keys, receipt.path) for source, receipt in receipts.items()
        }
        for source, answers in given.items():
            if not answers:
                fix = f"add {config.labels} to precompute's inputs"
                raise InputError(
                    f"no labelled query is among the answers of {source}", where=receipts[source].path, value=config.labels, fix=fix
                )
        traffic = read_traffic(store, human_labels, keys)
        wanted = with_traffic(wanted, traffic)
        rows = score_rows(task, wanted, given)
        record_look(store, "evaluate", task.name, task.policy_digest, {source: source_part(rows, source) for source in receipts})
        write_validity(stage, rows, config.sure)
        write_confusion(stage, task, rows)
        if today is not None:
            write_watch_list(stage, task, rows, today, config.confidence)
        sources, figures = _write(stage, config, task, receipts, rows, traffic)
        if note := traffic_note(wanted, traffic):
            stage.note(note)
        return Result(labels=labels, answers=answered_by, sources=sources, figures=figures)

    labels, answered_by = f"{human_labels.path}:{name}", {source: receipt.path for source, receipt in receipts.items()}
    replaces = {"task": task.name, "labels": labels, "answers": answered_by, "status_quo": today.where if today else ""}
    inputs: dict[str, Receipt | str] = {"labels": human_labels, "seals": seals_digest(store), **receipts}
    inputs |= {"status_quo": today.digest} if today else {}
    receipt = run_once("evaluate", Result, config, work, inputs=inputs, task=task, version=7, replaces=replaces)
    for place, line in enumerate(evaluation_lines(receipt, config.confidence)):
        say(f"{'' if place else 'evaluate':<12} {line}")
    return receipt


def _check_sources(receipts: Mapping[str, Receipt[PrecomputeResult]]) -> None:
    """ConfigError when the name of an answer source is given to answers of another: they would be compared and gated as its own."""
    for name, receipt in receipts.items():
        if name != receipt.result.source and name in {known.name for known in SOURCES if known.model}:
            what = f"these are not answers of {name}"
            value = f"{receipt.path}: source {receipt.result.source}, by {receipt.result.model.name}"
            fix = f"name a run of {name} (headtail status), or give these a name of your own, such as --set answers.other={receipt.path}"
            raise ConfigError(what, where=f"answers.{name}", value=value, fix=fix)


def check_design(labels: pa.Table, where: str) -> pa.Table:
    """The same table. InputError when its labels come from feedback: callers choose what they complain about, so it is no sample."""
    if "design" in labels.column_names and pc.any(pc.equal(labels["design"], FEEDBACK_DESIGN)).as_py():
        fix = "evaluate on people's labels of a random sample (docs/labels.md); look at feedback with headtail review"
        raise InputError("labels from feedback are no random sample: quality on them is not the users'", where=where, fix=fix)
    return labels


def _write(
    stage: Stage,
    config: Config,
    task: Task,
    receipts: Mapping[str, Receipt[PrecomputeResult]],
    rows: pa.Table,
    traffic: LogTraffic | None,
) -> tuple[dict[str, SourceFigures], dict[str, Figures]]:
    cells = traffic.cells if traffic else None
    scored, quality = by_source(rows), quality_rows(rows, config.sure, cells)
    calibrated = {s.source: calibration_of(s, config.sure) for s in scored if s.source != Source.FALLBACK}
    gaps = list(source_differences(scored, config.sure))
    for line in quality.to_pylist():
        if line["n"]:
            where = f"{line['source']}/{line['stratum']}"
            stage.metrics |= {f"quality/{where}": line["quality"], f"low/{where}": line["low"], f"high/{where}": line["high"]}
            if line["stratum"] == ALL:
                stage.metrics[f"exact/{line['source']}/{ALL}"] = line["exact"]
            if task.file.score.kind == "label":
                stage.metrics[f"accuracy/{where}"] = line["exact"]
    sources = {source: _source_figures(stage, task, source, scored, found, gaps) for source, found in calibrated.items()}
    for source, known_of in sources.items():
        plain = known_of.model_dump(exclude={"minus_teacher"}, exclude_none=True)
        stage.metrics |= {f"{name}/{source}": value for name, value in plain.items()}
        if known_of.minus_teacher is not None:
            stage.metrics |= {f"difference/{source}/{end}": value for end, value in known_of.minus_teacher}
    if (guard := _guard(stage, config, task, receipts)).active:
        _serve(stage, config, guard, rows, quality, cells)
    figures = dict(_figures(quality, sources, receipts))
    for source, known in figures.items():
        stage.metrics |= figure_metrics(known, source)
    stage.rows |= {"human_labels": len(scored[0].tp), **{f"answered.{s.source}": int(s.answered.sum()) for s in scored}}
    for text in remarks(quality, rows, task, receipts):
        stage.note(text)
    stage.table("rows", rows)
    stage.table("quality", quality)
    stage.table("traffic", traffic_table(traffic))
    stage.figure("quality", _quality_figure(quality, config))
    stage.figure("calibration", _calibration_figure(calibrated))
    stage.json("report", document(config.sure, task, config.labels, receipts, scored, quality, calibrated, gaps, stage.notes))
    return sources, figures


def _source_figures(
    stage: Stage, task: Task, source: str, scored: list[ScoredSource], found: Calibration, gaps: list[dict[str, Any]]
) -> SourceFigures:
    """An answer source beside people and beside the teacher; a note that agreement is no quality."""
    mine, teacher = (next((s for s in scored if s.source == name), None) for name in (source, Source.TEACHER))
    agreed = None
    if mine and teacher and source != Source.TEACHER:
        agreed, both = agreement(task, teacher, mine)
        stage.note(
            f"agreement/{source} compares {source} with teacher on the {both:,} labelled rows both answered: this is not a quality figure"
        )
    gap = next((gap for gap in gaps if gap["split"] == ALL and gap["source"] == source and gap["value"] is not None), None)
    return SourceFigures(
        ece=_known(found.ece),
        ece_noise_floor=_known(found.floor),
        auroc=_known(found.auroc),
        agreement=agreed,
        minus_teacher=TeacherDifference(value=gap["value"], low=gap["low"], high=gap["high"]) if gap else None,
    )


def _known(value: float) -> float | None:
    return value if value == value else None


def _guard(stage: Stage, config: Config, task: Task, receipts: Mapping[str, Receipt]) -> AnswerGuard:
    """The guardrails that publish and serve hold these answers to, with the words of the log that the answers go back to."""
    own_check, logs = load_own_check(task, config.allow_task_code), find_logs(stage.store, list(receipts.values()))
    if len(logs) != 1 or not AnswerGuard(task).active:
        return AnswerGuard(task, None, own_check)
    return AnswerGuard(
        task, read_words(write_words(stage.store, logs[0], task, task.file.guardrails.known_count, stage.scratch)), own_check
    )


def _serve(stage: Stage, config: Config, guard: AnswerGuard, rows: pa.Table, quality: pa.Table, cells: TrafficCells | None) -> None:
    """Quality of what users get: beside `quality`, which scores every answer, also one that is never served."""
    served, withheld = serve_rows(rows, guard)
    table = quality_rows(served, config.sure, cells)
    stage.table("quality_served", table)
    before = {line["source"]: line["quality"] for line in quality.to_pylist() if line["stratum"] == ALL}
    for line in table.to_pylist():
        source = line["source"]
        if line["n"] and source != Source.FALLBACK:
            stage.metrics[f"served/{source}/{line['stratum']}"] = line["quality"]
        if line["stratum"] == ALL and source != Source.FALLBACK:
            stage.rows[f"withheld.{source}"] = withheld[source]
            if withheld[source]:
                stage.note(
                    f"{source}: guardrails withhold {withheld[source]:,} of its answers to the {line['n']:,} labelled queries; with the "
                    f"fallback in their place its quality is {line['quality']:.3f}, not {before[source]:.3f} (served/{source}/all)"
                )


def _figures(
    quality: pa.Table, sources: Mapping[str, SourceFigures], receipts: Mapping[str, Receipt[PrecomputeResult]]
) -> Iterator[tuple[str, Figures]]:
    """Each answer source against people, against the teacher, and what a million rows cost beside the teacher's."""
    against_people = {line["source"]: line["quality"] for line in quality.to_pylist() if line["stratum"] == ALL and line["n"]}
    for source, receipt in receipts.items():
        teacher = receipts[Source.TEACHER].result.figures if Source.TEACHER in receipts and source != Source.TEACHER else None
        agreed = sources[source].agreement if source in sources else None
        yield source, three_figures(against_people.get(source), agreed, receipt.result.figures, teacher)


def remarks(quality: pa.Table, rows: pa.Table, task: Task, receipts: Mapping[str, Receipt]) -> Iterator[str]:
    """What a reader should know before trusting the figures."""
    lines = quality.to_pylist()
    first = [line for line in lines if line["source"] == lines[0]["source"]]
    for line in first:
        if line["stratum"] in (ALL, TRAFFIC):
            continue
        if not line["n"]:
            yield f"{line['stratum']}: no labelled rows, so its quality is not known"
        elif line["n"] < SMALL:
            yield f"{line['stratum']}: only {line['n']} labelled rows; its intervals are wide and exact (Clopper-Pearson), not bootstrap"
    bulk = (BOOTSTRAP, POST_STRATIFIED)
    exact = list(dict.fromkeys(line["stratum"] for line in lines if line["n"] >= SMALL and line["method"] not in bulk))
    if exact:
        why = "too few effective rows, or rows of one kind, for a bootstrap"
        yield f"{', '.join(exact)}: {why}; some intervals are Clopper-Pearson at the effective number of rows"
    for line in first:
        if line["stratum"] == TRAFFIC and line["n"] and line["effective"] < line["n"] / 4:
            yield f"traffic: {line['n']:,} labelled rows tell as much of the traffic as {line['effective']:.0f} equal rows"
    clusters, labelled = len(pc.unique(rows["cluster"].drop_null())), first[-1 - (first[-1]["stratum"] == TRAFFIC)]["n"]
    if 0 < clusters < labelled:
        yield f"{labelled:,} labelled rows are {clusters:,} queries that do not nearly repeat each other; each cluster counts as one row"
    for source, receipt in receipts.items():
        mine = rows.filter(pc.equal(rows["source"], source))
        absent = int(pc.sum(pc.equal(mine["state"], ABSENT)).as_py())
        if absent:
            yield f"{source}: {absent:,} of {mine.num_rows:,} labelled queries were never asked; they count as missed"
        made_under = receipt.task_fingerprint
        if made_under and made_under != task.fingerprint:
            yield f"{source}: made under another prompt or schema of this task (fingerprint {made_under[:8]}, now {task.fingerprint[:8]})"


def _quality_figure(quality: pa.Table, config: Config) -> Any:
    lines = [line for line in quality.to_pylist() if line["n"]]
    points = [charts.QualityPoint(q["source"], q["stratum"], q["quality"], q["low"], q["high"], q["n"]) for q in lines]
    return charts.quality_chart(points, confidence=config.confidence)


def _calibration_figure(calibrated: Mapping[str, Calibration]) -> Any:
    labels = {source: f"{source}: ECE {c.ece:.3f} (noise {c.floor:.3f}), AUROC {c.auroc:.3f}" for source, c in calibrated.items()}
    return charts.calibration_chart({source: [charts.ReliabilityBin(*b) for b in c.bins] for source, c in calibrated.items()}, labels)
