"""The whole pipeline on one screen: from a query log to a release that answers live traffic, and a report.

In: a log (or nothing: then the example data), a task, a teacher (or people's answers to train one on). Out: a receipt
per stage, a release, `report.html` and `summary.json`. Each stage is found done when nothing it depends on changed,
so a second run takes seconds. Decides nothing that a stage could decide.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

from pydantic import Field, model_validator

from headtail.adapters.progress import say
from headtail.adapters.storage import check_digest, open_storage, read_bytes
from headtail.adapters.tracking import Tracker
from headtail.core.answer_source import source_named
from headtail.core.config import StageConfig, execution, refuse_filled
from headtail.core.errors import ConfigError
from headtail.core.receipt import Receipt, StageResult
from headtail.core.rows import Source, Stratum
from headtail.core.task import EXAMPLES, Task, load_task
from headtail.engines import ModelConfig
from headtail.examples import example_data
from headtail.examples.example_data import Config as ExampleDataConfig
from headtail.releases import registry, release
from headtail.releases.seal import keep_for_gate
from headtail.stages import calibrate, curate, distill, evaluate, gate, ingest, plan, precompute, publish, replay, report, serve
from headtail.stages.calibrate import Config as CalibrateConfig
from headtail.stages.curate import Config as CurateConfig
from headtail.stages.distill import Config as DistillConfig
from headtail.stages.distill.base import BaseModelConfig
from headtail.stages.distill.fit import can_answer, choose_output, refuse_ignored
from headtail.stages.distill.result import Result as DistillResult
from headtail.stages.evaluate import Config as EvaluateConfig
from headtail.stages.gate import Config as GateConfig
from headtail.stages.gate.result import Result as GateResult
from headtail.stages.ingest import Config as IngestConfig
from headtail.stages.plan import Config as PlanConfig
from headtail.stages.precompute import Config as PrecomputeConfig
from headtail.stages.publish import Config as PublishConfig
from headtail.stages.publish import Result as PublishResult
from headtail.stages.replay import Config as ReplayConfig
from headtail.stages.report import note
from headtail.stages.serve import Config as ServeConfig

R = TypeVar("R", bound=StageResult)
SHIPPED_TEACHER, PLACEHOLDER = "example:teacher", "placeholder"
TORSO, TAIL, UNSEEN = str(Stratum.TORSO), str(Stratum.TAIL), str(Stratum.UNSEEN)
TEACHER, BATCH, REALTIME = str(Source.TEACHER), str(Source.BATCH_STUDENT), str(Source.REALTIME_STUDENT)

# Fields of a group that the pipeline fills in, and the pipeline's field to set instead.
_STUDENT = {"sets": "", "labels": ""}
FILLED: dict[str, dict[str, str]] = {
    "example_data": {},
    "ingest": {"log": "log", "labels": "labels", "labels_train_share": "labels_train_share"},
    "plan": {"log": "log"},
    "train_teacher": _STUDENT,
    "precompute_teacher": {"inputs": "", "source": ""},
    "curate": {"answers": "", "labels": "labels"},
    "distill_batch": _STUDENT,
    "precompute_batch": {"inputs": "", "source": "", "model.model": ""},
    "distill_realtime": _STUDENT,
    "evaluate": {"labels": "labels", "answers": ""},
    "gate": {"evaluation": "", "source": "", "candidate": ""},
    "calibrate": {"evaluation": "", "source": "", "strata": ""},
    "publish": {"answers": "", "student": "", "evaluation": "", "gates": "", "calibration": "", "accept_unproven": "promote_unproven"},
    "serve": {"release": "", "request_log": "", "tasks": ""},
    "replay": {"log": "log", "plan": "", "release": "", "url": ""},
}


class Config(StageConfig):
    """One pipeline. A group named like a stage is that stage's own config, without the fields that the pipeline fills in."""

    task: str = Field("query_segmentation", description="task name or folder")
    log: str = Field("", description="query log: file, folder or glob; empty makes the example data")
    labels: str = Field(
        "",
        description="file of people's answers: columns query, answer, optional split; or a column of the log: ingest.columns.labels",
    )
    labels_train_share: float = Field(
        0.7, gt=0, lt=1, description="share of the human labels that trains the teacher when none is named; the rest evaluates"
    )
    labels_sealed_share: float = Field(0.5, ge=0, lt=1, description="share of 100 or more human labels that the gate alone reads; 0: none")
    replay_holdout: bool = Field(True, description="serve the release and replay holdout traffic against it")
    promote_unproven: bool = Field(False, description="promote a student without a gate when there are no human labels")
    example_data: ExampleDataConfig = Field(ExampleDataConfig(), description="the example data, used when log is empty")
    ingest: IngestConfig = Field(IngestConfig(), description="see headtail fields ingest")
    plan: PlanConfig = Field(PlanConfig(), description="see headtail fields plan")
    train_teacher: DistillConfig = Field(
        DistillConfig(base=BaseModelConfig(model=SHIPPED_TEACHER), lora=None, epochs=6, learning_rate=1e-3),
        description="how a teacher is trained on human labels",
    )
    precompute_teacher: PrecomputeConfig = Field(
        PrecomputeConfig(model=ModelConfig(model=PLACEHOLDER)),
        description="see headtail fields precompute; its model is the teacher. placeholder: the shipped one for a shipped task, else one "
        "trained on human labels",
    )
    curate: CurateConfig = Field(CurateConfig(), description="see headtail fields curate")
    distill_batch: DistillConfig = Field(
        DistillConfig(),
        description="see headtail fields distill; here base.model: teacher starts from the pipeline's teacher, with base.layers",
    )
    precompute_batch: PrecomputeConfig = Field(
        PrecomputeConfig(max_unanswered_share=1.0),  # a student that answers few rows is the gate's to reject, not the end of the pipeline
        description="see headtail fields precompute",
    )
    distill_realtime: DistillConfig | None = Field(
        None,
        description="a second, smaller student that answers misses in real time; null, or an encoder that cannot hold the task's answers: "
        "the first one does both. Its fields: headtail fields distill",
    )
    one_student: bool = Field(
        False,
        description="train one student alone, for batch and for misses: the realtime one where it can answer the task, else the other",
    )
    evaluate: EvaluateConfig = Field(EvaluateConfig(), description="see headtail fields evaluate")
    gate: GateConfig = Field(GateConfig(), description="see headtail fields gate; the policy is the task's")
    calibrate: CalibrateConfig = Field(CalibrateConfig(), description="what is promised of a miss; see headtail fields calibrate")
    publish: PublishConfig = Field(PublishConfig(), description="see headtail fields publish")
    serve: ServeConfig = Field(ServeConfig(), description="see headtail fields serve")
    replay: ReplayConfig = Field(ReplayConfig(), description="see headtail fields replay")
    summary: str = execution("summary.json", "where in the store the summary is also written")

    @model_validator(mode="before")
    @classmethod
    def _filled_in(cls, data: Any) -> Any:
        refuse_filled("pipeline", data, FILLED)
        return data

    @model_validator(mode="after")
    def _nothing_ignored(self) -> Self:
        """Also what only some other field makes the pipeline overwrite."""
        asked = self.precompute_batch
        refuse_ignored({"distill_batch": self.distill_batch, "distill_realtime": self.distill_realtime}, asked, asked.side_inputs)
        return self


class _Pipeline:
    """The stages' receipts so far, and the settings that all stages share."""

    def __init__(self, config: Config, task: Task, tracker: Tracker, parent: str) -> None:
        self.config, self.task, self.tracker, self.parent = config, task, tracker, parent
        self.receipts: dict[str, Receipt] = {}
        self.tracking = config.tracking.model_copy(update={"parent_run": parent})

    def stage(self, name: str, run: Callable[[Any], Receipt[R]], config: StageConfig, **filled: Any) -> Receipt[R]:
        """Run one stage with the pipeline's root and tracking, and with the fields that are `filled` in."""
        self.receipts[name] = made = run(config.at(self.config, self.tracking.model_copy(update={"run_name": name}), **filled))
        return made

    def task_stage(self, name: str, run: Callable[..., Receipt[R]], config: StageConfig, **filled: Any) -> Receipt[R]:
        """`stage` for one that is about the pipeline's task: it gets the Task, which is read once, before the first stage."""
        return self.stage(name, lambda whole: run(whole, task=self.task), config, task=self.config.task, **filled)


def run(config: Config) -> Receipt[report.Result]:
    """Once round the pipeline. Returns the report's receipt; errors of a stage end the pipeline with that stage named."""
    started = time.monotonic()
    tracker = Tracker(config.tracking, config.root)
    task = load_task(config.task, config.allow_task_code)
    parent = tracker.start("pipeline", {"headtail.task": task.name})
    prompt = tracker.prompt(f"headtail-{task.name}", task.template, {"fingerprint": task.fingerprint, "task": task.name})
    pipeline = _Pipeline(config, task, tracker, parent)
    try:
        receipt = _stages(pipeline)
    except BaseException:
        tracker.end(parent, "FAILED")
        raise
    store = open_storage(config.root)
    summary = report.flat_summary(receipt.result.summary)
    store.replace(config.summary, read_bytes(store, receipt.output("summary")))
    seconds, reused = time.monotonic() - started, sum(found.reused for found in pipeline.receipts.values())
    numbers = {key: float(value) for key, value in summary.items() if isinstance(value, int | float) and not isinstance(value, bool)}
    numbers |= {"pipeline_seconds": round(seconds, 1), "stages": float(len(pipeline.receipts)), "stages_reused": float(reused)}
    lineage = {f"headtail.stage.{name}": f"{one.path} run={one.run_id or '-'}" for name, one in pipeline.receipts.items()}
    tags = {**lineage, "mlflow.note.content": note.release_note(pipeline.receipts, pipeline.task.name, summary["paths"]["report"], prompt)}
    tracker.log(parent, {"task": task.name, "log": config.log or "example data"}, numbers, tags)
    with tempfile.TemporaryDirectory(prefix="headtail-report-") as scratch:
        tracker.artifact(parent, store.fetch(check_digest(store, receipt.output("report")), Path(scratch)))
    tracker.end(parent)
    say(f"{len(pipeline.receipts)} stages, {reused} of them found done, {seconds:.0f} s")
    return receipt


def _stages(pipeline: _Pipeline) -> Receipt[report.Result]:
    config, do = pipeline.config, pipeline.task_stage
    if config.plan.rebuild and config.replay_holdout:
        raise ConfigError("a head of all days cannot be measured by replay_holdout", where="plan.rebuild", fix="set one of them to false")
    named = named_teacher(config, pipeline.task)
    _tell_placeholder(config, named)
    log, labels = _inputs(pipeline)
    train_share = 0.0 if named else config.labels_train_share
    ingested = do("ingest", ingest.run, config.ingest, log=log, labels=labels, labels_train_share=train_share)
    teacher = named or _train_teacher(pipeline, ingested)
    planned = do("plan", plan.run, config.plan, log=ingested.path)
    asked = {"inputs": _tables(planned, "head", "teacher_sample", "human_labels"), "source": TEACHER, "model": teacher}
    answered = do("precompute_teacher", precompute.run, config.precompute_teacher, **asked)
    _publish_head(pipeline, answered)
    labelled = {"labels": f"{planned.path}:human_labels"}
    keep_for_gate(open_storage(config.root), planned, config.labels_sealed_share)
    judged = planned.output("human_labels").rows != 0
    if judged:
        do("evaluate_teacher", evaluate.run, config.evaluate, **labelled, answers={TEACHER: answered.path})
    training_set = do("curate", curate.run, config.curate, **labelled, answers=answered.path)
    students = _students(pipeline, training_set, planned, teacher)
    answers = {TEACHER: answered.path, **{source: student.answered.path for source, student in students.items()}}
    quality = do("evaluate", evaluate.run, config.evaluate, **labelled, answers=answers) if judged else None
    gates = _gates(pipeline, students, quality) if quality else {}
    passed = {source: student for source, student in students.items() if _passes(config, gates.get(source))}
    serving = passed.get(REALTIME) or passed.get(BATCH)
    calibrated = _calibrate(pipeline, quality, passed) if quality and serving else None
    parts = {
        "answers": (answered.path, *([passed[BATCH].answered.path] if BATCH in passed else [])),
        "student": serving.made.path if serving else "",
        "evaluation": quality.path if quality else "",
        "gates": tuple(gates[source].path for source in passed if source in gates),
        "calibration": calibrated.path if calibrated else "",
        "accept_unproven": bool(serving) and not gates,  # _passes: only as promote_unproven asks
    }
    published = do("publish", publish.run, config.publish, **parts)
    _register(pipeline, students, gates, published)
    if config.replay_holdout:
        _replay(pipeline, ingested, planned, published)
    paths = {name: receipt.path for name, receipt in pipeline.receipts.items() if name != "example-data"}
    reused = tuple(name for name, receipt in pipeline.receipts.items() if receipt.reused)
    return pipeline.stage("report", report.run, report.Config(), receipts=paths, title=f"headtail: {pipeline.task.name}", reused=reused)


def _tables(planned: Receipt, *names: str) -> tuple[str, ...]:
    return tuple(f"{planned.path}:{name}" for name in names)


def _publish_head(pipeline: _Pipeline, answered: Receipt) -> None:
    """A first release of the teacher's answers alone. Where a release is current already, it stays so until the new one is whole."""
    config, how = pipeline.config, {"answers": (answered.path,)}
    if release.current_id(open_storage(config.root)) == "":
        pipeline.task_stage("publish_head", publish.run, config.publish, **how)
    elif done := publish.find_publish(config.publish.at(config, pipeline.tracking, task=config.task, **how), pipeline.task):
        pipeline.receipts["publish_head"] = done


class _Student(NamedTuple):
    """A student, and what it answered."""

    made: Receipt[DistillResult]
    answered: Receipt


def _students(pipeline: _Pipeline, training_set: Receipt, planned: Receipt, teacher: ModelConfig) -> dict[str, _Student]:
    """The batch student answers what the teacher did not; the realtime student, if there is one, only labelled rows: its work is misses."""
    config, found = pipeline.config, {}
    sets = (distill.TrainingSet(task=config.task, training_set=f"{training_set.path}:training_set"),)
    students: dict[str, tuple[DistillConfig, tuple[str, ...]]] = {}
    second = config.distill_realtime if config.distill_realtime is not None and can_answer(config.distill_realtime, pipeline.task) else None
    if second is not None:
        second = _all_read(_of_teacher(second, teacher), planned)
    if second is not None and config.one_student:
        students[BATCH] = (second, ("student_rows", "human_labels"))
    else:
        students[BATCH] = (choose_output(_of_teacher(config.distill_batch, teacher), pipeline.task), ("student_rows", "human_labels"))
        if second is not None:
            students[REALTIME] = (second, ("human_labels",))
    for source, (how, tables) in students.items():
        name = source_named(source).stage
        made = pipeline.stage(name("distill"), distill.run, how, sets=sets, labels=(f"{planned.path}:human_labels",))
        model = config.precompute_batch.model.model_copy(update={"model": made.path})
        asked: dict[str, Any] = {
            "inputs": _tables(planned, *tables),
            "source": source,
            "model": model,
            "side_inputs": config.precompute_batch.side_inputs and not how.two_stage,  # judged as it will be asked
        }
        found[source] = _Student(made, pipeline.task_stage(name("precompute"), precompute.run, config.precompute_batch, **asked))
    return found


def _of_teacher(config: DistillConfig, teacher: ModelConfig) -> DistillConfig:
    """A student whose base is called `teacher` starts from the pipeline's own, whatever that turns out to be."""
    if config.base.model != TEACHER:
        return config
    base = config.base.model_copy(update={"model": teacher.model, "revision": teacher.revision})
    return config.model_copy(update={"base": base})


def _all_read(config: DistillConfig, planned: Receipt) -> DistillConfig:
    """An encoder that is made here first learns to guess words of all queries of the plan, unless its config says of which, or of none."""
    if config.student != "encoder" or config.base.shape is None or "queries" in config.encoder.model_fields_set:
        return config
    queries = _tables(planned, "head", "teacher_sample", "student_rows")
    return config.model_copy(update={"encoder": config.encoder.model_copy(update={"queries": queries})})


def _gates(pipeline: _Pipeline, students: Mapping[str, _Student], quality: Receipt) -> dict[str, Receipt[GateResult]]:
    """The gate's verdict on each student. All are judged on the same human labels, so each further one is tested more strictly."""
    gates, how = {}, pipeline.config.gate
    for source, student in students.items():
        what = {"evaluation": quality.path, "source": source, "candidate": student.made.path}
        gates[source] = pipeline.task_stage(source_named(source).stage("gate"), gate.run, how, **what)
    return gates


def _passes(config: Config, gated: Receipt[GateResult] | None) -> bool:
    """Whether a student is published. Without human labels there is no gate: then only when that was asked for."""
    if gated is not None:
        return gated.result.passed
    rejected = "REJECTED: no human labels to judge it by (labels=..., or promote_unproven=true)"
    say(f"gate         student {'promoted unproven, as asked' if config.promote_unproven else rejected}")
    return config.promote_unproven


def _calibrate(pipeline: _Pipeline, quality: Receipt, passed: Mapping[str, _Student]) -> Receipt[calibrate.Result]:
    """From where the student that answers misses is sure, on the strata that it meets: unseen queries alone where the cache has the batch
    student's answers."""
    config, source = pipeline.config, REALTIME if REALTIME in passed else BATCH
    cached = BATCH in passed and not config.publish.min_confidence.get("batch_student")
    strata = (UNSEEN,) if cached else (TORSO, TAIL, UNSEEN)
    return pipeline.task_stage("calibrate", calibrate.run, config.calibrate, evaluation=quality.path, source=source, strata=strata)


def _register(
    pipeline: _Pipeline, students: Mapping[str, _Student], gates: Mapping[str, Receipt[GateResult]], published: Receipt[PublishResult]
) -> None:
    """Every student in MLflow's registry, with its gate's evidence."""
    for source, student in students.items():
        gated = gates.get(source)
        registry.register_student(
            pipeline.tracker,
            pipeline.config.root,
            task=pipeline.task,
            source=source,
            student=student.made,
            base=student.made.result.base,
            gate=gated.path if gated else "",
            evidence=gated.result.evidence if gated else None,
            release=published.result.release,
        )


def _inputs(pipeline: _Pipeline) -> tuple[str, str]:
    """(log, labels): the user's, or the example data's."""
    config = pipeline.config
    if config.log:
        return config.log, config.labels
    if config.labels:
        fix = "name the log that they are of (log, or LOG= of make); without one the pipeline uses the example data and its labels"
        raise ConfigError("labels are given, and no log", where="labels", value=config.labels, fix=fix)
    task = pipeline.task
    made = pipeline.stage("example-data", example_data.run, config.example_data)
    store = open_storage(config.root)
    if f"human_labels_{task.name}" not in made.outputs:
        fix = "give LOG=your log (and LABELS=answers), or use query_segmentation or query_intent"
        raise ConfigError("the example data has no answers for this task", where="task", value=task.name, fix=fix)
    return store.uri(f"{made.path}/log"), store.uri(made.output(f"human_labels_{task.name}").path)


def named_teacher(config: Config, task: Task) -> ModelConfig | None:
    """The teacher that was named, or the shipped placeholder for a shipped task."""
    teacher = config.precompute_teacher.model
    if teacher.model != PLACEHOLDER:
        return teacher
    return teacher.model_copy(update={"model": SHIPPED_TEACHER}) if task.folder.is_relative_to(EXAMPLES) else None


def _tell_placeholder(config: Config, teacher: ModelConfig | None) -> None:
    """Print which model answers when no teacher is named."""
    name = "name a teacher: --set precompute_teacher.model.model=... (make: TEACHER=...)"
    if teacher is None:
        share = f"{config.labels_train_share:.0%} of people's answers (labels_train_share), or on those whose column split says train,"
        say(f"teacher      none is named: a PLACEHOLDER is trained on {share} and answers in its place; {name}")
    elif config.precompute_teacher.model.model == PLACEHOLDER and config.log:
        say(f"teacher      none is named: the shipped PLACEHOLDER {teacher.model}, trained on example data, answers your log; {name}")


def _train_teacher(pipeline: _Pipeline, ingested: Receipt) -> ModelConfig:
    """No teacher was named for this task: train one on the training split of people's answers."""
    config = pipeline.config
    if ingested.output("human_labels_train").rows == 0:
        fix = "name TEACHER=model, or give LABELS=file with columns query, answer (and split)"
        raise ConfigError("no teacher is named and there are no human labels to train one on", where="precompute_teacher.model", fix=fix)
    sets = (distill.TrainingSet(task=config.task, training_set=f"{ingested.path}:human_labels_train"),)
    made = pipeline.stage("train_teacher", distill.run, config.train_teacher, sets=sets, labels=(f"{ingested.path}:human_labels",))
    return config.precompute_teacher.model.model_copy(update={"model": made.path})


def _replay(pipeline: _Pipeline, ingested: Receipt, planned: Receipt, published: Receipt[PublishResult]) -> None:
    """Serve the release and send it the traffic of a later day; skipped when this release was replayed before."""
    config = pipeline.config
    changes = {"log": ingested.path, "plan": planned.path, "release": published.result.release}
    done = replay.find_replay(config.replay.at(config, pipeline.tracking, task=config.task, **changes), pipeline.task)
    if done is not None:
        pipeline.receipts["replay"] = done
        return
    with serve.start_server(config.serve.at(config, pipeline.tracking, release=published.result.release, request_log=False)) as server:
        pipeline.task_stage("replay", replay.run, config.replay, **changes, url=server.url)
