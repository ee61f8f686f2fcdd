"""Publish: answers become a snapshot, the snapshot a release, the release the current one.

    answers (first receipt wins) -> snapshots/<id> -> releases/<id>.json -> CURRENT

After a kill at any point nothing half published can be read: the manifest makes the snapshot exist, the receipt the stage's
output, and CURRENT moves last. Publishing the same again builds nothing and makes sure that CURRENT points to it. A
release without any answer, or one that loses too much of the current release's traffic, is not made current.
Knows nothing of how answers were made or how they are served.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import pyarrow as pa
from pydantic import Field

from headtail.adapters.progress import progress_bar, say
from headtail.adapters.storage import Storage, open_storage, stream_table
from headtail.adapters.storage.receipts import load_receipt
from headtail.batch import read_answers
from headtail.batch.answer_sources import answer_runs
from headtail.cache import LocalSnapshot, SnapshotManifest, publish_snapshot, snapshot_coverage, snapshot_path
from headtail.cache.builder import OFFERED, UNRATED, build_snapshot
from headtail.cache.lineage import find_logs, write_words
from headtail.cache.manifest import snapshot_damage
from headtail.cache.words import read_words
from headtail.core.config import StageConfig, execution
from headtail.core.errors import ConfigError, GateRejected, InputError, LedgerError, StorageError
from headtail.core.evidence import Evidence, Figures, figure_metrics, three_figures
from headtail.core.guardrails import AnswerGuard, OwnCheck, load_own_check
from headtail.core.receipt import LATEST, FileRef, Receipt
from headtail.core.rows import Source
from headtail.core.task import Task, load_task
from headtail.releases import release as releases
from headtail.releases.promotion import unproven_students, unproven_words
from headtail.releases.proof import recheck
from headtail.stages.base import NotDone, Stage, run_once
from headtail.stages.calibrate.result import Result as CalibrateResult
from headtail.stages.distill.result import Result as DistillResult
from headtail.stages.evaluate.result import Result as EvaluateResult
from headtail.stages.gate.result import Result as GateResult
from headtail.stages.precompute.result import Result as PrecomputeResult
from headtail.stages.publish.loss import refuse_loss
from headtail.stages.publish.people import PeopleAnswers, count_events, people_answers
from headtail.stages.publish.result import Result
from headtail.stages.publish.withhold import Withholding


class Config(StageConfig):
    """What is published, and whether it is promoted."""

    task: str = Field("query_segmentation", description="task folder or name of a shipped example")
    answers: tuple[str, ...] = Field(
        (LATEST,),
        min_length=1,
        description="precompute receipt refs; the first with an answer to a query wins; by default the latest, if it is the teacher's",
    )
    student: str = Field(
        "", description="distill receipt ref of the realtime student, which answers misses; empty: misses get the task's fallback"
    )
    evaluation: str = Field("", description="evaluate receipt ref kept as evidence")
    gates: tuple[str, ...] = Field(
        (),
        description="gate receipt refs, kept as evidence: of the student and of models whose answers are published; none may be rejected. "
        "Where the store has human labels for the task, each student needs one",
    )
    accept_unproven: bool = Field(
        False, description="publish students that no gate passed although there are human labels; the release records it"
    )
    calibration: str = Field(
        "", description="calibrate receipt ref of the student: the release then knows from where its answers are sure (docs/escalation.md)"
    )
    min_confidence: dict[Literal["teacher", "batch_student"], Annotated[float, Field(ge=0, le=1)]] = Field(
        {"teacher": 0.0, "batch_student": 0.0},
        description="minimum confidence (0..1) by source; the realtime student answers queries below it; above 0 answers without "
        "confidence, which are counted apart; an error when that is every answer of a source",
    )
    promote: bool = execution(True, "make the release current")
    max_lost_share: float = execution(
        0.05, "share (0..1) of the current release's traffic that may lose its answer when this one becomes current", ge=0, le=1
    )
    accept_loss: bool = execution(False, "make the release current although it loses more than max_lost_share")
    note: str = Field("", description="why, in words; kept with the release")


def find_publish(config: Config, task: Task | None = None) -> Receipt[Result] | None:
    """What `run` made before under `config`, or None. Promotes nothing."""
    try:
        return run(config.model_copy(update={"promote": False}), task, only_found=True)
    except NotDone:
        return None


def run(config: Config, task: Task | None = None, only_found: bool = False) -> Receipt[Result]:
    """Build the snapshot and its release unless they exist, then promote. `task`: the task, loaded. `only_found`: NotDone, not build."""
    task, store = task or load_task(config.task, config.allow_task_code), open_storage(config.root)
    answers = {ref: load_receipt(store, "precompute", ref, PrecomputeResult) for ref in config.answers}
    student = load_receipt(store, "distill", config.student) if config.student else None
    evaluation = load_receipt(store, "evaluate", config.evaluation, EvaluateResult) if config.evaluation else None
    for answered in answers.values():
        _same_task(task, answered)
    if config.answers == (LATEST,):
        _refuse_another_source(store, task, answers[LATEST])
    gated = [load_receipt(store, "gate", ref, GateResult) for ref in config.gates]
    calibrated = load_receipt(store, "calibrate", config.calibration, CalibrateResult) if config.calibration else None
    _check_calibration(store, calibrated, config.student)
    own_check = load_own_check(task, config.allow_task_code)
    logs = tuple(find_logs(store, list(answers.values())))
    people = people_answers(store, task)
    proofs = _check_gates(store, gated, student, task)
    unproven = unproven_students(store, task.name, student.path if student else "", [found.path for found in answers.values()], proofs)
    if unproven and not config.accept_unproven:
        fix = "name the gates that it passed: --set gates=[gate/<fingerprint>]; to publish it all the same: --set accept_unproven=true"
        raise GateRejected(f"this is not published: {unproven_words(unproven)}", where=", ".join(unproven), fix=fix)
    parts = _Parts(task, tuple(answers.values()), student, evaluation, proofs, calibrated, logs, people)

    def work(stage: Stage) -> Result:
        words, withholding = _guardrails(stage, parts, own_check)
        built = _build(stage, config, parts, withholding)
        manifest = _snapshot(stage, config, parts, built, words)
        return _release(stage, config, parts, manifest, withholding)

    parents = {"student": student, "evaluation": evaluation, "calibration": calibrated}
    inputs: dict[str, Receipt] = {name: receipt for name, receipt in parents.items() if receipt is not None}
    inputs |= {f"answers.{i}": receipt for i, receipt in enumerate(parts.answers)} | {f"gate.{i}": one for i, one in enumerate(gated)}
    replaces = {
        "task": task.name,
        "redacted": task.file.redacted,
        "guardrails": task.file.guardrails.model_dump(mode="json"),
        "answers": [receipt.path for receipt in parts.answers],
        "student": student.path if student else "",
        "evaluation": evaluation.path if evaluation else "",
        "gates": [found.path for found in gated],
        "calibration": calibrated.path if calibrated else "",
        "people": people.digest,
    }
    once = partial(run_once, "publish", Result, config, work, inputs=inputs, task=task, version=3, replaces=replaces, only_found=only_found)
    published = once()
    if published.reused and (damage := _find_damage(store, published.result)):
        say(f"{'publish':<12} what was published before cannot be served: {damage}; it is built again")
        store.remove(f"{published.path}/receipt.json")
        published = once()
    if config.promote:  # also when reused: after a rollback, publishing the same again makes it current again
        refuse_loss(store, published, config.max_lost_share, config.accept_loss)
        releases.promote(store, published.result.release)
        say(f"{'publish':<12} release {published.result.release} is current")
    return published


@dataclass(frozen=True)
class _Parts:
    """What a release is made of."""

    task: Task
    answers: tuple[Receipt[PrecomputeResult], ...]
    student: Receipt | None
    evaluation: Receipt[EvaluateResult] | None
    proofs: tuple[Evidence, ...]
    calibrated: Receipt[CalibrateResult] | None
    logs: tuple[Receipt, ...]
    people: PeopleAnswers

    @property
    def log(self) -> Receipt | None:
        """The log that all answers go back to; None when there is none, or several."""
        return self.logs[0] if len(self.logs) == 1 else None


def _check_gates(store: Storage, gated: Sequence[Receipt[GateResult]], student: Receipt | None, task: Task) -> tuple[Evidence, ...]:
    """The evidence of gates, computed anew. GateRejected when one was not passed, or none is of the student that is to be served."""
    proofs = tuple(receipt.result.evidence for receipt in gated)
    for receipt, found in zip(gated, proofs, strict=True):
        if missing := recheck(store, found, task):
            raise GateRejected(f"{found.candidate} is not published; missing: {'; '.join(missing)}", where=receipt.path)
    seen = [found.candidate for found in proofs]
    if student is not None and proofs and student.path not in seen:
        what = f"{student.path} is not published; missing: evidence of {student.path}; the given evidence is of {', '.join(seen)}"
        raise GateRejected(what, where=gated[0].path)
    return proofs


def _check_calibration(store: Storage, calibrated: Receipt[CalibrateResult] | None, student: str) -> None:
    """ConfigError when a calibration is of another model than the student: its threshold would promise nothing."""
    if calibrated is None:
        return
    if not student or load_receipt(store, "distill", student, DistillResult).result.digest != calibrated.result.digest:
        value = f"{calibrated.path} is of {calibrated.result.student}"
        fix = "name the calibrate run of this student, or leave calibration empty"
        raise ConfigError("this calibration is not of the student that is published", where="calibration", value=value, fix=fix)


def _find_damage(store: Storage, published: Result) -> str:
    """Why what was published before cannot be served any more: deleted, damaged or edited since. Empty when it can."""
    try:
        releases.load_release(store, published.release)
    except (InputError, StorageError) as error:
        return f"{error.what} ({error.where})"
    return snapshot_damage(store, published.snapshot)


def _same_task(task: Task, receipt: Receipt) -> None:
    """Answers to another prompt or schema are never served under this task."""
    if receipt.task_fingerprint != task.fingerprint:
        raise ConfigError(
            "these answers were made for another version of the task",
            where=f"answers: {receipt.path}",
            value=f"task {task.name} is {task.fingerprint[:16]}, the answers' is {receipt.task_fingerprint[:16]}",
            fix="run precompute with this task, or publish with the task as it was",
        )


def _refuse_another_source(store: Storage, task: Task, latest: Receipt[PrecomputeResult]) -> None:
    """ConfigError when nobody named answers and the latest are a student's: alone they would stand for the teacher's."""
    if (source := latest.result.source) != Source.TEACHER:
        runs = ",".join(some[0].path for some in answer_runs(store, task).values())
        what = f"the latest precompute is of {source}, not of the teacher"
        fix = f"name the answers to publish, such as --set answers=[{runs}]"
        raise ConfigError(what, where="answers", value=latest.path, fix=fix)


def _guardrails(stage: Stage, parts: _Parts, own_check: OwnCheck | None) -> tuple[Path | None, Withholding]:
    """The log's words as a local file (None without guardrails, or without a log), and what keeps answers out of the snapshot."""
    people, words = parts.people, None
    if not AnswerGuard(parts.task).active:
        return None, Withholding(AnswerGuard(parts.task), people.dropped, people.deleted)
    if parts.log is not None:
        words = write_words(stage.store, parts.log, parts.task, parts.task.file.guardrails.known_count, stage.scratch)
    else:
        stage.note("guardrails do not look up words: the answers do not go back to one log")
    return words, Withholding(AnswerGuard(parts.task, read_words(words) if words else None, own_check), people.dropped, people.deleted)


def _build(stage: Stage, config: Config, parts: _Parts, withholding: Withholding) -> LocalSnapshot:
    """The snapshot on local disk; every row offered must be published or left out."""
    people = parts.people.table(count_events(stage.store, parts.log, parts.people.answers))
    rows = [ref.rows or 0 for receipt in parts.answers for name, ref in receipt.outputs.items() if name.startswith("answers/")]
    offered = people.num_rows + sum(rows)
    folder = stage.scratch / "snapshot"
    folder.mkdir()
    started = time.monotonic()
    least = {str(source): value for source, value in config.min_confidence.items()}
    with progress_bar("publish", offered) as shown:

        def stream(receipt: Receipt) -> Iterator[pa.Table]:
            for table in read_answers(stage.store, receipt, columns=OFFERED.names):
                yield table
                shown.advance(table.num_rows)

        streams: list[Iterable[pa.Table]] = [[people], *(stream(receipt) for receipt in parts.answers)]  # of two answers the first wins
        labels = ["people's answers", *(receipt.path for receipt in parts.answers)]
        shared = parts.task.file.redacted == "cached"
        built = build_snapshot(streams, folder, min_confidence=least, share_redacted=shared, labels=labels, withhold=withholding)
    left = sum(built.left_out.values())
    if built.rows + left != offered:
        value = f"{offered} offered by the receipts, {built.rows} published, {left} left out"
        fix = "a receipt was changed by hand: restore it from a copy of the store, or run precompute again"
        raise LedgerError("rows of the answers do not add up", where=", ".join(labels), value=value, fix=fix)
    stage.rows = {
        "published": built.rows,
        **{f"published.{source}": rows for source, rows in built.rows_by_source.items()},
        "left_out": left,
        **{f"left_out.{reason}": rows for reason, rows in sorted(built.left_out.items())},
    }
    stage.metrics["build_rows_per_s"] = round(offered / max(time.monotonic() - started, 1e-9), 1)
    _tell_left_out(stage, config, built, parts)
    stage.metrics["withheld"] = float(withholding.counts.total())
    if text := withholding.note():
        stage.note(text)
        say(f"{'publish':<12} {text}; such as {withholding.examples[0].query!r} with {withholding.examples[0].answer}")
    if parts.people.stale:
        stage.note(f"{parts.people.stale:,} answers by people are not valid under the task's schema any more: they are not published")
    if hidden := built.left_out.get("redacted"):
        stage.note(f"{hidden:,} answers to redacted queries are not in the cache: each one is many questions (docs/task.md, `redacted`)")
    return built


def _tell_left_out(stage: Stage, config: Config, built: LocalSnapshot, parts: _Parts) -> None:
    """Say what was left out for want of a confidence. ConfigError when that is all of a source, InputError when nothing is left."""
    reasons = ", ".join(f"{rows:,} {reason}" for reason, rows in sorted(built.left_out.items())) or "no row was offered"
    for source, least in config.min_confidence.items():
        unrated = built.left_out.get(f"{UNRATED}.{source}", 0)
        if unrated and not built.rows_by_source.get(source):
            raise ConfigError(
                f"no answer of the {source} would be published: {unrated:,} have no confidence",
                where=f"min_confidence.{source}",
                value=least,
                fix=f"set min_confidence.{source} to 0, or use an engine that gives log-probs",
            )
        if unrated:
            text = f"{unrated:,} answers of the {source} have no confidence and are left out by min_confidence.{source}={least:g}"
            stage.note(text)
            say(f"{'publish':<12} {text}")
    if not built.rows:
        where = ", ".join(receipt.path for receipt in parts.answers)
        fix = "docs/cache.md and docs/guardrails.md say what each reason means; the current release stays current"
        raise InputError("nothing is fit to be published: every query would be a miss", where=where, value=reasons, fix=fix)


def _snapshot(stage: Stage, config: Config, parts: _Parts, built: LocalSnapshot, words: Path | None) -> SnapshotManifest:
    share = _coverage(stage, parts, built)
    manifest = publish_snapshot(
        stage.store,
        built,
        task=parts.task.name,
        task_fingerprint=parts.task.fingerprint,
        lineage=[receipt.path for receipt in parts.answers],
        min_confidence={str(source): value for source, value in config.min_confidence.items()},
        coverage=share,
        words=words,
    )
    stage.outputs |= manifest.files
    stage.outputs["manifest"] = _ref(stage.store, f"{snapshot_path(manifest.id)}/manifest.json")
    stage.metrics["bytes"] = float(sum(ref.bytes for ref in manifest.files.values()))
    if share is not None:
        stage.metrics["coverage"] = share
    return manifest


def _release(stage: Stage, config: Config, parts: _Parts, manifest: SnapshotManifest, withholding: Withholding) -> Result:
    previous = releases.current_id(stage.store)
    if parts.evaluation is not None:
        for receipt in parts.answers:
            if receipt.path not in parts.evaluation.inputs.values():
                stage.note(f"the evaluation {parts.evaluation.path} did not score the answers {receipt.path}")
    release = releases.make_release(
        stage.store,
        snapshot=manifest.id,
        task=parts.task,
        student=parts.student.path if parts.student else "",
        thresholds={str(source): value for source, value in config.min_confidence.items()},
        calibration=parts.calibrated.result.calibration if parts.calibrated else None,
        evidence=_evidence(parts),
        accept_unproven=config.accept_unproven,
        note=config.note,
    )
    stage.outputs["release"] = _ref(stage.store, f"{releases.FOLDER}/{release.id}.json")
    figures = dict(_figures(stage.store, parts))
    for role, known in figures.items():
        stage.metrics |= figure_metrics(known, role)
    stage.tracker.log(stage.run_id, {}, {}, {"headtail.snapshot": manifest.id, "headtail.release": release.id})
    return Result(
        snapshot=manifest.id,
        release=release.id,
        previous=previous,
        student=release.student,
        figures=figures,
        published=manifest.rows,
        withheld_answers=withholding.counts.total(),
        coverage=manifest.coverage,
        withheld=withholding.examples,
    )


def _evidence(parts: _Parts) -> releases.ReleaseEvidence:
    metrics = parts.evaluation.metrics if parts.evaluation else {}
    quality = {name: value for name, value in metrics.items() if name.startswith(("quality/", "exact/"))}
    return releases.ReleaseEvidence(evaluate=parts.evaluation.path if parts.evaluation else "", figures=quality, gates=parts.proofs)


def _figures(store: Storage, parts: _Parts) -> Iterator[tuple[str, Figures]]:
    """The three figures of the student that answers misses, and of each whose answers are published: its gate's, else the evaluation's.

    Where neither looked at it, its cost alone.
    """
    batch, taught = (
        [receipt for receipt in parts.answers if receipt.result.source == source] for source in (Source.BATCH_STUDENT, Source.TEACHER)
    )
    known: dict[str, Figures] = {}
    teacher = taught[0].result.figures if taught else None
    for receipt in batch:
        known.setdefault(receipt.result.model.name, three_figures(None, None, receipt.result.figures, teacher))
    evaluated = parts.evaluation.result if parts.evaluation else None
    for source, path in evaluated.answers.items() if evaluated else ():
        if evaluated and store.exists(f"{path}/receipt.json"):
            known[load_receipt(store, "precompute", path, PrecomputeResult).result.model.name] = evaluated.figures[source]
    known |= {proof.candidate: proof.figures for proof in parts.proofs if proof.figures != Figures()}
    if parts.student is not None:
        yield "realtime_student", known.get(parts.student.path) or three_figures(None, None, None, teacher)
    for number, name in enumerate(dict.fromkeys(receipt.result.model.name for receipt in batch)):
        yield f"batch_student{number + 1 if number else ''}", known[name]


def _coverage(stage: Stage, parts: _Parts, built: LocalSnapshot) -> float | None:
    """Share of the log's events before the cut, counted in the log itself; None when no log is in the answers' lineage."""
    if parts.log is None:
        stage.note(f"coverage is not known: {len(parts.logs)} logs in the answers' lineage")
        return None
    return snapshot_coverage(built.prefixes, stream_table(stage.store, parts.log.output("queries"), ["query_key", "count"]))


def _ref(store: Storage, path: str) -> FileRef:
    data = store.read(path)
    return FileRef(path=path, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
