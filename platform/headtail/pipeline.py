"""The whole way on one screen: from a query log to a release that answers live traffic, and the report on it.

In: a log (or nothing: then the example world), a task, a teacher (or people's answers to train one on). Out: a receipt
per station, a release, `report.html` and `summary.json`. Each station is found done when nothing it depends on changed,
so a second run is a matter of seconds. Decides nothing that a station could decide.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field

from headtail.adapters.progress import say
from headtail.adapters.storage import check, open_storage, read_json, write_json
from headtail.adapters.tracking import Tracker
from headtail.core import io_format, tagging
from headtail.core.config import StageConfig, execution
from headtail.core.errors import ConfigError
from headtail.core.receipt import Receipt
from headtail.core.task import EXAMPLES, Task, load_task
from headtail.engines import ModelConfig
from headtail.examples import world
from headtail.examples.world import Config as WorldConfig
from headtail.releases import registry, release
from headtail.stages import curate, distill, evaluate, gate, ingest, plan, precompute, publish, replay, report, serve
from headtail.stages.curate import Config as CurateConfig
from headtail.stages.distill import Config as DistillConfig
from headtail.stages.distill.base import Base
from headtail.stages.evaluate import Config as EvaluateConfig
from headtail.stages.gate import Config as GateConfig
from headtail.stages.ingest import Config as IngestConfig
from headtail.stages.plan import Config as PlanConfig
from headtail.stages.precompute import Config as PrecomputeConfig
from headtail.stages.publish import Config as PublishConfig
from headtail.stages.replay import Config as ReplayConfig
from headtail.stages.report import note
from headtail.stages.serve import Config as ServeConfig

SHIPPED_TEACHER = "example:teacher"
TEACHER, BATCH, REALTIME = "teacher", "student", "realtime"  # tiers


class Config(StageConfig):
    """One loop. The groups named like a station are that station's own config; root, task and references are filled in."""

    task: str = Field("query_segmentation", description="task name or folder")
    log: str = Field("", description="query log: file, folder or glob; empty makes the example world")
    gold: str = Field(
        "",
        description="file of people's answers: columns query, answer, optional split; or a column of the log: ingest.columns.gold",
    )
    teacher: ModelConfig | None = Field(
        None,
        description="the model that answers the head; null: the shipped stand-in for a shipped task, else one trained on gold",
    )
    gold_train_share: float = Field(
        0.7, gt=0, lt=1, description="share of the gold that trains the teacher when none is named; the rest evaluates"
    )
    live: bool = Field(True, description="serve the release and replay later traffic against it")
    promote_unproven: bool = Field(False, description="let a student go live although there is no gold to judge it by")
    world: WorldConfig = Field(WorldConfig(), description="the example world, used when log is empty")
    ingest: IngestConfig = Field(IngestConfig(log=""), description="see headtail ingest --help")
    plan: PlanConfig = Field(PlanConfig(), description="see headtail plan --help")
    train_teacher: DistillConfig = Field(
        DistillConfig(base=Base(model=SHIPPED_TEACHER), lora=None, epochs=6, learning_rate=1e-3),
        description="how a teacher is trained on gold",
    )
    precompute_teacher: PrecomputeConfig = Field(PrecomputeConfig(), description="see headtail precompute --help")
    curate: CurateConfig = Field(CurateConfig(), description="see headtail curate --help")
    distill: DistillConfig = Field(
        DistillConfig(),
        description="see headtail distill --help; here base.model: teacher starts from the loop's teacher, with base.layers",
    )
    precompute_student: PrecomputeConfig = Field(
        PrecomputeConfig(max_unanswered_share=1.0),  # a student that answers few rows is the gate's to reject, not the end of the loop
        description="see headtail precompute --help",
    )
    realtime: DistillConfig | None = Field(
        None,
        description="a second, smaller student that answers misses live; null, or an encoder that cannot hold the task's answers: "
        "the first one does both. See headtail distill --help",
    )
    one_student: bool = Field(
        False,
        description="train one student alone, which answers both ahead of time and live: the realtime one where it can answer the task, "
        "else the other",
    )
    evaluate: EvaluateConfig = Field(EvaluateConfig(), description="see headtail evaluate --help")
    gate: GateConfig = Field(GateConfig(), description="what the student must show to be promoted; see headtail gate --help")
    publish: PublishConfig = Field(PublishConfig(), description="see headtail publish --help")
    serve: ServeConfig = Field(ServeConfig(), description="see headtail serve --help")
    replay: ReplayConfig = Field(ReplayConfig(), description="see headtail replay --help")
    summary: str = execution("summary.json", "where in the store the summary is also written")


class _Loop:
    """The stations' receipts so far, and what every station is handed."""

    def __init__(self, config: Config, task: Task, tracker: Tracker, parent: str) -> None:
        self.config, self.task, self.tracker, self.parent = config, task, tracker, parent
        self.receipts: dict[str, Receipt] = {}
        self.tracking = config.tracking.model_copy(update={"parent_run": parent})

    def station(self, name: str, run: Callable[[Any], Receipt], config: StageConfig, **changes: Any) -> Receipt:
        """Run one station with the loop's root, tracking and, of `changes`, those that it knows."""
        known = {key: value for key, value in changes.items() if key in type(config).model_fields}
        self.receipts[name] = run(config.at(self.config, self.tracking.model_copy(update={"run_name": name}), **known))
        return self.receipts[name]


def run(config: Config) -> Receipt:
    """Once round the loop. Returns the report's receipt; errors of a station end the loop with that station named."""
    started = time.monotonic()
    tracker = Tracker(config.tracking, config.root)
    task = load_task(config.task, config.allow_task_code)
    parent = tracker.start("loop", {"headtail.task": task.name})
    prompt = tracker.prompt(f"headtail-{task.name}", task.template, {"fingerprint": task.fingerprint, "task": task.name})
    loop = _Loop(config, task, tracker, parent)
    try:
        receipt = _stations(loop)
    except BaseException:
        tracker.end(parent, "FAILED")
        raise
    store = open_storage(config.root)
    summary = read_json(store, receipt.output("summary"))
    write_json(store, config.summary, summary)
    seconds, reused = time.monotonic() - started, sum(found.reused for found in loop.receipts.values())
    numbers = {key: float(value) for key, value in summary.items() if isinstance(value, int | float) and not isinstance(value, bool)}
    numbers |= {"loop_seconds": round(seconds, 1), "stations": float(len(loop.receipts)), "stations_reused": float(reused)}
    lineage = {f"headtail.station.{name}": f"{one.path} run={one.run_id or '-'}" for name, one in loop.receipts.items()}
    tags = {**lineage, "mlflow.note.content": note.about(loop.receipts, loop.task.name, summary["paths"]["report"], prompt)}
    tracker.log(parent, {"task": task.name, "log": config.log or "example world"}, numbers, tags)
    with tempfile.TemporaryDirectory(prefix="headtail-report-") as scratch:
        tracker.artifact(parent, store.fetch(check(store, receipt.output("report")), Path(scratch)))
    tracker.end(parent)
    say(f"{len(loop.receipts)} stations, {reused} of them found done, {seconds:.0f} s")
    return receipt


def _stations(loop: _Loop) -> Receipt:
    config, do = loop.config, loop.station
    shared = {"task": config.task}
    log, gold = _log(loop)
    teacher = _named_teacher(config, loop.task)
    _tell_placeholder(config, teacher)
    ingested = do(
        "ingest", ingest.run, config.ingest, **shared, log=log, gold=gold, gold_train_share=0.0 if teacher else config.gold_train_share
    )
    if teacher is None:
        teacher = _train_teacher(loop, ingested)
    planned = do("plan", plan.run, config.plan, **shared, log=ingested.path)
    tables = tuple(f"{planned.path}:{name}" for name in ("head", "teach", "gold"))
    taught = do("precompute_teacher", precompute.run, config.precompute_teacher, **shared, inputs=tables, source="teacher", model=teacher)
    first = release.current_id(open_storage(config.root)) == ""  # later, the old release stays live until the new one is whole
    do("publish_head", publish.run, config.publish, **shared, answers=(taught.path,), student="", evaluation="", promote=first)
    gold_ref = f"{planned.path}:gold"
    judged = planned.output("gold").rows != 0
    if judged:
        do("evaluate_teacher", evaluate.run, config.evaluate, **shared, gold=gold_ref, answers={TEACHER: taught.path})
    golden = do("curate", curate.run, config.curate, **shared, answers=taught.path, gold=gold_ref)
    sets = (distill.TrainingSet(task=config.task, golden=f"{golden.path}:golden"),)
    students = _students(loop, sets, planned, teacher)
    tiers = {TEACHER: taught.path} | {tier: found.answered.path for tier, found in students.items()}
    quality = do("evaluate", evaluate.run, config.evaluate, **shared, gold=gold_ref, answers=tiers) if judged else None
    passed = {tier: found for tier, found in students.items() if _passes(loop, tier, found.made, quality, len(students))}
    live = passed.get(REALTIME) or passed.get(BATCH)
    gates = {tier: loop.receipts.get(_at("gate", tier)) for tier in students}
    published = do(
        "publish",
        publish.run,
        config.publish,
        **shared,
        answers=(taught.path, *([passed[BATCH].answered.path] if BATCH in passed else [])),
        student=live.made.path if live else "",
        evaluation=quality.path if quality else "",
        gates=tuple(found.path for tier in passed if (found := gates[tier])),
    )
    for tier, student in students.items():
        registry.register(
            loop.tracker, config.root, task=loop.task.name, tier=tier, student=student.made, gated=gates[tier], published=published
        )
    if config.live:
        _replay(loop, ingested, planned, published)
    paths = {name: receipt.path for name, receipt in loop.receipts.items() if name != "world"}
    reused = tuple(name for name, receipt in loop.receipts.items() if receipt.reused)
    return do("report", report.run, report.Config(), receipts=paths, title=f"headtail: {loop.task.name}", reused=reused)


class _Student(NamedTuple):
    """A student, and what it answered."""

    made: Receipt
    answered: Receipt


def _at(station: str, tier: str) -> str:
    """The name of a station for a tier: the batch student's is the station's own."""
    return station if tier == BATCH else f"{station}_{tier}"


def _students(loop: _Loop, sets: tuple[distill.TrainingSet, ...], planned: Receipt, teacher: ModelConfig) -> dict[str, _Student]:
    """The batch student answers what the teacher did not; the realtime student, if there is one, answers gold alone: its work is live."""
    config, found = loop.config, {}
    wanted: dict[str, tuple[DistillConfig, tuple[str, ...]]] = {}
    second = config.realtime if config.realtime is not None and _fits(config.realtime, loop.task) else None
    if second is not None:
        second = _all_read(_of_teacher(second, teacher), planned)
    if second is not None and config.one_student:
        wanted[BATCH] = (second, ("rest", "gold"))
    else:
        wanted[BATCH] = (_coded(_of_teacher(config.distill, teacher), loop.task), ("rest", "gold"))
        if second is not None:
            wanted[REALTIME] = (second, ("gold",))
    for tier, (how, tables) in wanted.items():
        made = loop.station(_at("distill", tier), distill.run, how, sets=sets, gold=(f"{planned.path}:gold",))
        model = config.precompute_student.model.model_copy(update={"model": made.path})
        asked: dict[str, Any] = {
            "task": config.task,
            "inputs": tuple(f"{planned.path}:{name}" for name in tables),
            "source": "student",
            "model": model,
            "side_inputs": config.precompute_student.side_inputs and not how.two_stage,  # judged as it will be asked
        }
        found[tier] = _Student(made, loop.station(f"precompute_{tier}", precompute.run, config.precompute_student, **asked))
    return found


def _of_teacher(config: DistillConfig, teacher: ModelConfig) -> DistillConfig:
    """A student whose base is called `teacher` starts from the loop's own, whatever that turns out to be."""
    if config.base.model != TEACHER:
        return config
    base = config.base.model_copy(update={"model": teacher.model, "revision": teacher.revision})
    return config.model_copy(update={"base": base})


def _coded(config: DistillConfig, task: Task) -> DistillConfig:
    """With answers in JSON where the task's cannot be put in code; why is said."""
    if config.form.answer == "json":
        return config
    try:
        io_format.made_for(task, config.form, config.student)
    except ConfigError as error:
        say(f"distill      answers in JSON: {error.what} ({error.where})")
        return config.model_copy(update={"form": config.form.model_copy(update={"answer": "json"})})
    return config


def _fits(config: DistillConfig, task: Task) -> bool:
    """Whether a student of this kind can answer the task at all; when not, why is said."""
    if config.student != "encoder":
        return True
    try:
        tagging.scheme(task.schema, task.name)
    except ConfigError as error:
        say(f"realtime     none: {error.what}; the batch student answers live too")
        return False
    return True


def _all_read(config: DistillConfig, planned: Receipt) -> DistillConfig:
    """An encoder that is made here first learns to guess words of all queries of the plan."""
    if config.student != "encoder" or config.base.shape is None or config.encoder.queries:
        return config
    queries = tuple(f"{planned.path}:{name}" for name in ("head", "teach", "rest"))
    return config.model_copy(update={"encoder": config.encoder.model_copy(update={"queries": queries})})


def _passes(loop: _Loop, tier: str, student: Receipt, quality: Receipt | None, candidates: int) -> bool:
    """The gate's verdict on a student; both are judged on the same gold, so each must be surer."""
    config = loop.config
    if quality is None:
        return _unproven(config)
    how = config.gate.model_copy(update={"candidates": max(config.gate.candidates, candidates)})
    asked = {"task": config.task, "evaluation": quality.path, "tier": tier, "candidate": student.path}
    return bool(loop.station(_at("gate", tier), gate.run, how, **asked).facts["passed"])


def _unproven(config: Config) -> bool:
    """Without gold nothing says whether the student is any good: it goes live only when that was asked for."""
    done = (
        "promoted unproven, as asked" if config.promote_unproven else "REFUSED: no gold to judge it by (gold=..., or promote_unproven=true)"
    )
    say(f"gate         student {done}")
    return config.promote_unproven


def _log(loop: _Loop) -> tuple[str, str]:
    """(log, gold): the user's, or the example world's."""
    config = loop.config
    if config.log:
        return config.log, config.gold
    task = loop.task
    made = loop.station("world", world.run, config.world)
    store = open_storage(config.root)
    if f"gold_{task.name}" not in made.outputs:
        fix = "give LOG=your log (and GOLD=answers), or use query_segmentation or query_intent"
        raise ConfigError("the example world has no answers for this task", where="task", value=task.name, fix=fix)
    return store.uri(f"{made.path}/log"), store.uri(made.output(f"gold_{task.name}").path)


def _named_teacher(config: Config, task: Task) -> ModelConfig | None:
    if config.teacher is not None:
        return config.teacher
    shipped = task.folder.is_relative_to(EXAMPLES)
    return config.precompute_teacher.model.model_copy(update={"model": SHIPPED_TEACHER}) if shipped else None


def _tell_placeholder(config: Config, teacher: ModelConfig | None) -> None:
    """Say first of all what answers instead of a teacher that nobody named."""
    name = "name a teacher: --set teacher.model=... (make: TEACHER=...)"
    if teacher is None:
        share = f"{config.gold_train_share:.0%} of people's answers (gold_train_share)"
        say(f"teacher      none is named: a PLACEHOLDER is trained on {share} and answers in its place; {name}")
    elif config.teacher is None and config.log:
        say(f"teacher      none is named: the shipped PLACEHOLDER {teacher.model}, trained on example data, answers your log; {name}")


def _train_teacher(loop: _Loop, ingested: Receipt) -> ModelConfig:
    """No teacher was named for this task: train one on the training split of people's answers."""
    config = loop.config
    if ingested.output("gold_train").rows == 0:
        fix = "name TEACHER=model, or give GOLD=file with columns query, answer (and split)"
        raise ConfigError("no teacher is named and there is no gold to train one on", where="teacher", fix=fix)
    sets = (distill.TrainingSet(task=config.task, golden=f"{ingested.path}:gold_train"),)
    made = loop.station("train_teacher", distill.run, config.train_teacher, sets=sets, gold=(f"{ingested.path}:gold",))
    return config.precompute_teacher.model.model_copy(update={"model": made.path})


def _replay(loop: _Loop, ingested: Receipt, planned: Receipt, published: Receipt) -> None:
    """Serve the release and send it the traffic of a later day; skipped when this release was replayed before."""
    config = loop.config
    changes = {"task": config.task, "log": ingested.path, "plan": planned.path, "release": published.facts["release"]}
    done = replay.find(config.replay.at(config, loop.tracking, **changes))
    if done is not None:
        loop.receipts["replay"] = done
        return
    with serve.start(config.serve.at(config, loop.tracking, release=published.facts["release"])) as server:
        loop.station("replay", replay.run, config.replay, **changes, url=server.url)
