"""Gate: may this student, or this snapshot, be promoted? A statistical test, and its evidence. A rejection is an answer.

    evaluation's scored rows + the policy -> criteria, each with a bound that is valid for any number of rows -> verdict

The candidate passes when it passes every criterion: with confidence 1 - delta, corrected for the number of criteria and of candidates.
Quality rests on people's labels; a judge's scores can only tighten a bound on it. Promotes nothing itself: the registry
and the release read the evidence.

    sources.py  candidate, scored rows, judge, earlier tests      criteria.py  scores -> proofs -> criteria (pure)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import Field, field_validator, model_validator

from headtail.adapters import charts
from headtail.adapters.progress import say
from headtail.adapters.storage import Storage, open_storage, read_text
from headtail.adapters.storage.receipts import load_receipt, load_ref
from headtail.core.config import StageConfig
from headtail.core.errors import ConfigError
from headtail.core.evidence import Criterion, Evidence, JudgeEvidence, figure_metrics
from headtail.core.receipt import Receipt
from headtail.core.rows import ALL, SLICES, TRAFFIC, Source
from headtail.core.task import load_task
from headtail.stages.base import Stage, run_once
from headtail.stages.evaluate.result import Result as EvaluateResult
from headtail.stages.gate.criteria import (
    CriterionTest,
    GatePolicy,
    ScoreName,
    SourceScores,
    compared_sources,
    criterion_tests,
    decide,
    source_rows,
)
from headtail.stages.gate.result import Result
from headtail.stages.gate.sources import (
    JudgeByStratum,
    answers_of,
    candidate_number,
    candidate_of,
    evaluation_labels,
    most_events,
    read_judge,
    scored_rows,
)

VERSION = 1
_UNITS = {"quality": "quality against people's answers", "drop": "minus the teacher's", "above": "minus the fallback's"}


class Config(StageConfig):
    """Which criteria, of whom, on which rows, and how surely."""

    task: str = Field("query_segmentation", description="task folder or name of a shipped example")
    evaluation: str = Field("evaluate", description="evaluate receipt ref whose scored rows are the proof")
    source: str = Field("batch_student", description="the answer source of that evaluation to test")
    candidate: str = Field(
        "",
        description="distill/<fingerprint> or snapshots/<id>; it must be the candidate that the evaluation scored; "
        "empty: the model of `source`",
    )
    score: ScoreName = Field("exact", description="a row's score: exact (1 when wholly right, else 0) or f1 (its own F1, 0..1)")
    minimum: dict[str, float] = Field(
        {},
        description="stratum -> minimum mean score (0..1); head, torso, tail, unseen, all (every labelled row "
        "counts the same) or traffic (rows count by events)",
    )
    max_drop: float | None = Field(
        0.05, ge=0, le=1, description="maximum drop of the mean score (0..1) below the teacher's; null: not tested"
    )
    above_fallback: bool = Field(True, description="whether the candidate must score above the task's fallback")
    relative_on: tuple[str, ...] = Field((ALL,), description="strata on which the candidate is compared with teacher and fallback")
    delta: float = Field(0.05, gt=0, lt=0.5, description="chance (0..0.5) that a candidate passes although a criterion is false")
    candidates: int = Field(
        1,
        ge=1,
        description="number of candidates compared on these labelled rows; delta is divided by it; earlier tests in this store count too",
    )
    power: float = Field(
        0.8, gt=0.5, lt=1, description="chance of passing for which the needed labels are computed; it does not change the verdict"
    )
    judge: str = Field("", description="table ref of a judge's scores of the candidate's answers: query_key, score (0..1); empty: none")

    @field_validator("minimum")
    @classmethod
    def _least(cls, value: dict[str, float]) -> dict[str, float]:
        if any(not 0 < least < 1 for least in value.values()):
            raise ValueError("a minimum score lies above 0 and below 1: no number of labels can show 1")
        return value

    @model_validator(mode="after")
    def _something(self) -> Config:
        unknown = [name for name in (*self.minimum, *self.relative_on) if name not in SLICES]
        if unknown:
            raise ValueError(f"unknown stratum {unknown[0]}; known: {', '.join(SLICES)}")
        if not self.minimum and not (self.relative_on and (self.max_drop is not None or self.above_fallback)):
            raise ValueError("there is no criterion: set minimum, max_drop or above_fallback")
        return self

    def policy(self, candidates: int) -> GatePolicy:
        """The policy, with the number of candidates that counts."""
        return GatePolicy(self.minimum, self.max_drop, self.above_fallback, self.relative_on, self.delta, candidates, self.power)


def run(config: Config) -> Receipt[Result]:
    """Test the candidate. The result says whether it passed, with the evidence; a rejection's notes say what is missing."""
    task, store = load_task(config.task, config.allow_task_code), open_storage(config.root)
    evaluation = load_receipt(store, "evaluate", config.evaluation, EvaluateResult)
    if evaluation.task != task.name:
        raise ConfigError(
            "the evaluation is of another task", where="task", value=f"{task.name}; {evaluation.path} is of {evaluation.task}"
        )
    answers = answers_of(store, evaluation, config.source)
    if answers.task_fingerprint not in ("", task.fingerprint):
        value = f"{task.fingerprint[:16]}, the answers' is {answers.task_fingerprint[:16]}"
        raise ConfigError(
            "the scored answers belong to another version of the task", where=answers.path, value=value, fix="run evaluate again"
        )
    candidate, digest, remarks = candidate_of(store, config.candidate, answers)
    planned, labels = evaluation_labels(store, evaluation)
    judge = load_ref(store, config.judge) if config.judge else None
    judged_by = f"{judge[0].path}:{judge[1]}" if judge else ""
    mine = {"answers": answers.path, "labels": labels, "score": config.score, "judge": judged_by, "evaluation": evaluation.path}
    number = candidate_number(store, f"gate/candidates/{task.name}/{config.source}", mine)
    policy = config.policy(max(config.candidates, number))

    def work(stage: Stage) -> Result:
        sources = _Sources(store, config, evaluation, answers, planned, policy)
        criteria = decide(sources.tests, policy)
        evidence = Evidence(
            passed=all(criterion.passed for criterion in criteria),
            task=task.name,
            candidate=candidate,
            digest=digest,
            source=config.source,
            answers=answers.path,
            evaluation=evaluation.path,
            score=config.score,
            delta=config.delta,
            candidates=policy.candidates,
            correction=f"Holm over {len(criteria)} criteria at {config.delta:g} / {policy.candidates} candidates",
            criteria=criteria,
            data=sources.digests,
            judge=sources.judge.description if sources.judge else None,
            figures=evaluation.result.figures[config.source],
        )
        _record(stage, config, evidence, sources)
        for text in (*evidence.missing(), *remarks, *_remarks(config, evidence, number)):
            stage.note(text)
        return Result(passed=evidence.passed, evidence=evidence, candidate_number=number)

    inputs: dict[str, Any] = {"evaluation": evaluation, "answers": answers, "candidate": digest}
    inputs |= {"judge": judge[0].output(judge[1])} if judge else {}
    replaces = {
        "task": task.name,
        "evaluation": evaluation.path,
        "candidate": candidate,
        "candidates": policy.candidates,
        "judge": judged_by,
    }
    receipt = run_once("gate", Result, config, work, inputs=inputs, task=task, version=VERSION, replaces=replaces)
    store.replace(_pointer(task.name, config.source), receipt.path.encode())
    found = receipt.result.evidence
    say(f"{'gate':<12} {candidate} {'passes' if found.passed else 'is REJECTED'}")
    for criterion in found.criteria:
        say(f"{'':<12} {'passed' if criterion.passed else 'failed'} {criterion.words()}")
    return receipt


def latest_verdict(store: Storage, task: str, source: str) -> Evidence | None:
    """What the latest gate of an answer source found; None when none ran."""
    pointer = _pointer(task, source)
    if not store.exists(pointer):
        return None
    return load_receipt(store, "gate", read_text(store, pointer).strip(), Result).result.evidence


def _pointer(task: str, source: str) -> str:
    return f"gate/latest/{task}/{source}"


class _Sources:
    """Everything a verdict rests on, read and checked."""

    def __init__(
        self, store: Storage, config: Config, evaluation: Receipt[EvaluateResult], answers: Receipt, planned: Receipt, policy: GatePolicy
    ) -> None:
        rows = scored_rows(store, evaluation)
        self.sources: dict[str, SourceScores] = {
            name: source_rows(rows, name, config.score) for name in dict.fromkeys([config.source, *compared_sources(policy)])
        }
        own = self.sources[config.source]
        if any(source.keys != own.keys for source in self.sources.values()):
            raise ConfigError("the answer sources were not scored on the same rows", where=evaluation.path, fix="run evaluate again")
        self.digests = {"rows": evaluation.output("rows").sha256, "human_labels": evaluation_labels(store, evaluation)[1]}
        self.judge: JudgeByStratum | None = None
        if config.judge:
            teacher = answers_of(store, evaluation, Source.TEACHER) if Source.TEACHER in evaluation.result.answers else None
            self.judge = read_judge(store, config.judge, answers, teacher, own)
            self.digests["judge"] = self.judge.sha256
        weighed = TRAFFIC in (*config.minimum, *config.relative_on)
        top = most_events(store, planned) if weighed else 0.0
        judged = self.judge.by_stratum if self.judge else {}
        self.tests: list[CriterionTest] = list(criterion_tests(policy, self.sources, config.source, config.score, judged, top))


def _record(stage: Stage, config: Config, evidence: Evidence, sources: _Sources) -> None:
    stage.rows = {"human_labels": len(sources.sources[config.source].keys)}
    for criterion in evidence.criteria:
        where = f"{criterion.kind}/{criterion.stratum}"
        stage.rows[f"human_labels.{criterion.stratum}"] = criterion.n
        stage.metrics |= {
            f"lower_bound/{where}": criterion.lower_bound,
            f"threshold/{where}": criterion.threshold,
            f"p/{where}": criterion.p,
            f"short/{where}": criterion.short,
        }
        if criterion.value is not None:
            stage.metrics[f"value/{where}"] = criterion.value
        if not criterion.passed and criterion.more is not None:
            stage.metrics[f"more_labels/{where}"] = float(criterion.more)
        if criterion.judged:
            stage.rows[f"judged.{criterion.stratum}"] = criterion.judged
    stage.metrics["passed"] = float(evidence.passed)
    stage.metrics |= figure_metrics(evidence.figures)
    stage.json("verdict", evidence.model_dump(mode="json"))
    stage.figure("gate", criteria_figure(evidence))
    stage.tracker.log(stage.run_id, {}, {}, {"headtail.gate": "passed" if evidence.passed else "rejected"})


def _remarks(config: Config, evidence: Evidence, number: int) -> list[str]:
    remarks = []
    if number > config.candidates:
        total = min(1.0, config.delta * sum(1 / k for k in range(1, number + 1)))
        remarks.append(
            f"test {number} on these labelled rows in this store: delta is divided by {number}, not {config.candidates}. "
            f"Over all {number} tests the chance that a bad candidate passed is at most {total:.3f}; fresh human labels start anew"
        )
    if evidence.judge is not None:
        remarks += _judge_remarks(evidence.judge, bool({ALL, TRAFFIC} & set(config.minimum)))
    return remarks


def _judge_remarks(judge: JudgeEvidence, mixed: bool) -> Iterator[str]:
    """What to know of the judge. `mixed`: a criterion is over rows of several strata."""
    if judge.own_teacher:
        yield f"the judge {judge.name} is the candidate's own teacher; the bound rests on people's labels and holds all the same"
    if judge.own_teacher is None:
        yield "the judge's table names no model, so whether it is the candidate's own teacher is not known"
    if not judge.answers_checked:
        yield "the judge's table has no answer_key: nothing shows that it looked at the candidate's answers"
    if judge.left_out:
        yield f"{judge.left_out:,} judged rows are not about the candidate's answers and were left out"
    if mixed:
        yield "the judge does not help on `all` and `traffic`: they mix strata as the human labels do, and its rows do not"


def criteria_figure(evidence: Evidence) -> Any:
    """A row per criterion: the estimate (dot), the lower bound (start of the bar), the threshold (tick). One panel per scale."""
    kinds = list(dict.fromkeys(criterion.kind for criterion in evidence.criteria))
    sizes = [sum(criterion.kind == kind for criterion in evidence.criteria) for kind in kinds]
    heights, ratios = 0.7 * len(kinds) + 0.5 * sum(sizes), [size + 0.6 for size in sizes]
    drawn, panels = charts.blank(7.2, heights, nrows=len(kinds), squeeze=False, height_ratios=ratios)
    for axes, kind in zip(panels[:, 0], kinds, strict=True):
        _panel(axes, [criterion for criterion in evidence.criteria if criterion.kind == kind], evidence.source)
    return drawn


def _panel(axes: Any, criteria: list[Criterion], source: str) -> None:
    tint, far = charts.colour(source), 1.0 if criteria[0].kind == "quality" else max([0.02, *(c.value or 0.0 for c in criteria)]) * 1.2
    near = min([c.lower_bound for c in criteria] + [c.threshold for c in criteria])
    for place, criterion in enumerate(criteria):
        colour = tint if criterion.passed else charts.MUTED
        axes.plot([criterion.lower_bound, far], [place, place], color=colour, linewidth=5, alpha=0.25, solid_capstyle="butt")
        if criterion.value is not None:
            axes.plot(criterion.value, place, "o", color=colour, markersize=6, markeredgecolor=charts.PAPER)
        axes.plot([criterion.threshold] * 2, [place - 0.32, place + 0.32], color=charts.INK, linewidth=1.8)
        text = "passed" if criterion.passed else f"short by {criterion.short:.1f} points"
        axes.annotate(text, (1, place), (6, 0), xycoords=("axes fraction", "data"), textcoords="offset points", va="center", color=colour)
    axes.set_yticks(range(len(criteria)), [f"{criterion.stratum}\nn = {criterion.n:,}" for criterion in criteria], color=charts.INK)
    axes.set_ylim(len(criteria) - 0.4, -0.6)
    axes.set_xlim(near - 0.04 * (far - near), far)
    axes.set_xlabel(f"{_UNITS[criteria[0].kind]}: estimate (dot), lower bound (start of the bar), threshold (tick)")
    axes.xaxis.grid(True)
