"""Gate: may this student, or this snapshot, be promoted? A statistical test, and its evidence. A rejection is an answer.

    human labels (the sealed ones, where any are) + answers + the task's policy -> criteria -> verdict

The candidate passes when it passes every criterion of `gate` in task.yaml: with confidence 1 - delta over all looks at these rows. Quality
rests on people's labels; a judge's scores can only tighten a bound on it. Promotes nothing itself: the registry and the release compute the
verdict anew.

    sources.py  candidate      releases/claim.py  rows      releases/look.py  earlier looks      releases/proof.py  criteria
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import Field

from headtail.adapters import charts
from headtail.adapters.progress import say
from headtail.adapters.storage import Storage, open_storage, read_text
from headtail.adapters.storage.receipts import load_receipt, load_ref
from headtail.core.config import StageConfig
from headtail.core.errors import ConfigError
from headtail.core.evidence import Criterion, Evidence, JudgeEvidence, figure_metrics
from headtail.core.receipt import Receipt
from headtail.core.rows import ALL, TRAFFIC
from headtail.core.task import Task, load_task
from headtail.releases.claim import Claim, needed_answers, read_claim
from headtail.releases.look import ledger_digest
from headtail.releases.proof import Verdict, prove_claim
from headtail.stages.base import Stage, run_once
from headtail.stages.evaluate.result import Result as EvaluateResult
from headtail.stages.gate.result import Result
from headtail.stages.gate.sources import answers_of, candidate_of

VERSION = 2
_UNITS = {"quality": "quality against people's answers", "drop": "minus the teacher's", "above": "minus the fallback's"}


class Config(StageConfig):
    """Whose answers are tested. What they must show is the policy of the task: `gate` in task.yaml."""

    task: str = Field("query_segmentation", description="task folder or name of a shipped example; its policy is what is tested")
    evaluation: str = Field("evaluate", description="evaluate receipt ref that names the human labels and the answers")
    source: str = Field("batch_student", description="the answer source of that evaluation to test")
    candidate: str = Field(
        "",
        description="distill/<fingerprint> or snapshots/<id>; it must be the candidate that the evaluation scored; "
        "empty: the model of `source`",
    )
    power: float = Field(
        0.8, gt=0.5, lt=1, description="chance of passing for which the needed labels are computed; it does not change the verdict"
    )
    judge: str = Field("", description="table ref of a judge's scores of the candidate's answers: query_key, score (0..1); empty: none")


def run(config: Config, task: Task | None = None) -> Receipt[Result]:
    """Test the candidate. The result says whether it passed, with the evidence; a rejection's notes say what is missing.

    `task`: what `config.task` names, where it is loaded already.
    """
    task, store = task or load_task(config.task, config.allow_task_code), open_storage(config.root)
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
    labels, policy = evaluation.result.labels, task.file.gate
    named = needed_answers(config.source, evaluation.result.answers, policy.max_drop)
    claim = read_claim(store, task, labels, config.source, named)
    verdict = prove_claim(store, task, claim, config.source, answers.path, labels, config.power, config.judge)

    def work(stage: Stage) -> Result:
        evidence = Evidence(
            passed=all(criterion.passed for criterion in verdict.criteria),
            task=task.name,
            candidate=candidate,
            digest=digest,
            source=config.source,
            answers=answers.path,
            evaluation=evaluation.path,
            score=policy.score,
            delta=policy.delta,
            candidates=verdict.divisor,
            look=verdict.look,
            policy=task.policy_digest,
            labels=labels,
            ledger=ledger_digest(),
            sealed=claim.sealed,
            excluded=claim.excluded,
            references=claim.references,
            correction=f"Holm over {len(verdict.criteria)} criteria at {policy.delta:g} / {verdict.divisor}, look {verdict.look}",
            criteria=verdict.criteria,
            data={**claim.digests, **({"judge": verdict.judge.sha256} if verdict.judge else {})},
            judge=verdict.judge.description if verdict.judge else None,
            figures=evaluation.result.figures[config.source],
        )
        _record(stage, evidence, verdict)
        for text in (*evidence.missing(), *remarks, *_remarks(evidence, claim)):
            stage.note(text)
        return Result(passed=evidence.passed, evidence=evidence, candidate_number=verdict.look)

    judge = load_ref(store, config.judge) if config.judge else None
    inputs: dict[str, Any] = {"evaluation": evaluation, "answers": answers, "candidate": digest, "ledger": ledger_digest()}
    inputs |= {"rows": claim.digests["rows"], "policy": task.policy_digest}
    inputs |= {"judge": judge[0].output(judge[1])} if judge else {}
    replaces = {
        "task": task.name,
        "evaluation": evaluation.path,
        "candidate": candidate,
        "look": verdict.look,
        "judge": f"{judge[0].path}:{judge[1]}" if judge else "",
    }
    receipt = run_once("gate", Result, config, work, inputs=inputs, task=task, version=VERSION, replaces=replaces)
    store.replace(_pointer(task.name, config.source), receipt.path.encode())
    _tell(candidate, receipt.result.evidence)
    return receipt


def _tell(candidate: str, found: Evidence) -> None:
    say(f"{'gate':<12} {candidate} {'passes' if found.passed else 'is REJECTED'}")
    for criterion in found.criteria:
        say(f"{'':<12} {'passed' if criterion.passed else 'failed'} {criterion.words()}")


def latest_verdict(store: Storage, task: str, source: str) -> Evidence | None:
    """What the latest gate of an answer source found; None when none ran."""
    pointer = _pointer(task, source)
    if not store.exists(pointer):
        return None
    return load_receipt(store, "gate", read_text(store, pointer).strip(), Result).result.evidence


def _pointer(task: str, source: str) -> str:
    return f"gate/latest/{task}/{source}"


def _record(stage: Stage, evidence: Evidence, verdict: Verdict) -> None:
    stage.rows = {"human_labels": verdict.human_labels}
    for criterion in evidence.criteria:
        where = f"{criterion.kind}/{criterion.stratum}"
        stage.rows[f"human_labels.{criterion.stratum}"] = criterion.n
        stage.metrics[f"threshold/{where}"] = criterion.threshold
        known = {"lower_bound": criterion.lower_bound, "p": criterion.p, "value": criterion.value, "open_value": criterion.open_value}
        stage.metrics |= {f"{name}/{where}": value for name, value in known.items() if value is not None}
        if criterion.lower_bound is not None:
            stage.metrics[f"short/{where}"] = criterion.short
        if not criterion.passed and criterion.more is not None:
            stage.metrics[f"more_labels/{where}"] = float(criterion.more)
        if criterion.judged:
            stage.rows[f"judged.{criterion.stratum}"] = criterion.judged
    stage.metrics |= {"passed": float(evidence.passed), "look": float(evidence.look)}
    stage.metrics |= figure_metrics(evidence.figures)
    stage.json("verdict", evidence.model_dump(mode="json"))
    stage.figure("gate", criteria_figure(evidence))
    stage.tracker.log(stage.run_id, {}, {}, {"headtail.gate": "passed" if evidence.passed else "rejected"})


def _remarks(evidence: Evidence, claim: Claim) -> Iterator[str]:
    if evidence.look > 1:
        what = "sealed labelled rows" if evidence.sealed else "labelled rows"
        yield (
            f"look {evidence.look} at these {what} in this store: delta is divided by {evidence.candidates}. Over all looks, for ever, the "
            f"chance that a bad candidate passes is at most {evidence.delta:g}; fresh human labels start anew"
        )
    if not evidence.sealed:
        yield "these labelled rows are open: whoever fits a candidate to them passes. Keep some for the gate: headtail labels seal"
    if evidence.excluded:
        yield f"{evidence.excluded:,} labelled rows are left out: the candidate was trained on them"
    if evidence.judge is not None:
        strata = {criterion.stratum for criterion in evidence.criteria if criterion.kind == "quality"}
        yield from _judge_remarks(evidence.judge, bool({ALL, TRAFFIC} & strata))


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
    if judge.apart:
        yield f"{judge.apart:,} judged rows are left out: the candidate learnt from them, or their label is not in this claim"
    if mixed:
        yield "the judge does not help on `all` and `traffic`: they mix strata as the human labels do, and its rows do not"


def criteria_figure(evidence: Evidence) -> Any:
    """A row per criterion: estimate (dot; of sealed rows that of the open ones), lower bound (start of the bar), threshold (tick).

    One panel per scale.
    """
    kinds = list(dict.fromkeys(criterion.kind for criterion in evidence.criteria))
    sizes = [sum(criterion.kind == kind for criterion in evidence.criteria) for kind in kinds]
    heights, ratios = 0.7 * len(kinds) + 0.5 * sum(sizes), [size + 0.6 for size in sizes]
    drawn, panels = charts.blank(7.2, heights, nrows=len(kinds), squeeze=False, height_ratios=ratios)
    for axes, kind in zip(panels[:, 0], kinds, strict=True):
        _panel(axes, [criterion for criterion in evidence.criteria if criterion.kind == kind], evidence.source)
    return drawn


def _panel(axes: Any, criteria: list[Criterion], source: str) -> None:
    shown = [(c.open_value if c.value is None else c.value) for c in criteria]
    tint, far = charts.colour(source), 1.0 if criteria[0].kind == "quality" else max([0.02, *(value or 0.0 for value in shown)]) * 1.2
    near = min([c.lower_bound for c in criteria if c.lower_bound is not None] + [c.threshold for c in criteria])
    for place, (criterion, value) in enumerate(zip(criteria, shown, strict=True)):
        colour = tint if criterion.passed else charts.MUTED
        if criterion.lower_bound is not None:
            axes.plot([criterion.lower_bound, far], [place, place], color=colour, linewidth=5, alpha=0.25, solid_capstyle="butt")
        if value is not None:
            axes.plot(value, place, "o", color=colour, markersize=6, markeredgecolor=charts.PAPER)
        axes.plot([criterion.threshold] * 2, [place - 0.32, place + 0.32], color=charts.INK, linewidth=1.8)
        text = "passed" if criterion.passed else "not shown" if criterion.lower_bound is None else f"short by {criterion.short:.1f} points"
        axes.annotate(text, (1, place), (6, 0), xycoords=("axes fraction", "data"), textcoords="offset points", va="center", color=colour)
    axes.set_yticks(range(len(criteria)), [f"{criterion.stratum}\nn = {criterion.n:,}" for criterion in criteria], color=charts.INK)
    axes.set_ylim(len(criteria) - 0.4, -0.6)
    axes.set_xlim(near - 0.04 * (far - near), far)
    axes.set_xlabel(f"{_UNITS[criteria[0].kind]}: estimate (dot), lower bound (start of the bar), threshold (tick)")
    axes.xaxis.grid(True)
