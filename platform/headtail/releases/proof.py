"""From the rows of a claim to evidence, and from evidence back: what lets a candidate pass is computed anew wherever it is promoted.

In: a Claim, the task's policy, the number of the look. Out: criteria; of sealed rows no figure but a passed gate's bounds. `recheck` reads
the answers and labels that evidence names, scores and tests them again, and believes nothing else. Knows nothing of stages.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import pyarrow as pa

from headtail.adapters.storage import Storage
from headtail.adapters.storage.receipts import load_receipt
from headtail.core.errors import ConfigError, GateRejected, HeadtailError
from headtail.core.evidence import Criterion, Evidence, policy_gap
from headtail.core.policy import TaskPolicy
from headtail.core.post_stratify import TrafficCells
from headtail.core.score import most_units
from headtail.core.task import Task
from headtail.releases.claim import AnswererResult, Claim, answers_are_own, read_claim, source_part
from headtail.releases.criteria import (
    CriterionTest,
    GatePolicy,
    ScoreName,
    SourceScores,
    compared_sources,
    criterion_tests,
    decide,
    source_rows,
)
from headtail.releases.judge_scores import JudgeByStratum, read_judge
from headtail.releases.look import LEDGER, ledger_digest, record_gate


class Verdict(NamedTuple):
    """What a claim came to."""

    criteria: tuple[Criterion, ...]
    look: int
    divisor: int  # of delta
    judge: JudgeByStratum | None
    human_labels: int  # rows


def look_policy(policy: TaskPolicy, look: int, power: float) -> GatePolicy:
    """The policy as the tests take it, at the level of one look."""
    level, after = policy.level(look), policy.level(look + 1)
    share = after / level if after else 1.0
    return GatePolicy(policy.minimum, policy.max_drop, policy.above_fallback, policy.relative_on, level, power, share)


def prove_claim(
    store: Storage,
    task: Task,
    claim: Claim,
    source: str,
    answers: str,
    labels: str,
    power: float = 0.8,
    judge: str = "",
) -> Verdict:
    """Write the look down, then test every criterion of the task's policy at its level. GateRejected when no look is left, or a gate saw
    these rows under a stricter policy.

    What cannot be tested (rows or judge's scores that are refused) is an error before the look: nothing is spent for it.
    """
    policy = task.file.gate
    if judge and policy.score == "micro_f1":
        what = "a judge's scores help exact and f1, not micro_f1: they say nothing of units"
        raise ConfigError(what, where="judge, gate.score", value=judge, fix="leave judge empty, or gate by f1")
    sources = _sources(claim.rows, look_policy(policy, 1, power), source, policy.score)
    scores = None
    if judge:
        teacher = next((one.digest for one in claim.references), "")
        scores = read_judge(store, judge, load_receipt(store, "precompute", answers), teacher, sources[source], claim.apart)
    look = record_gate(store, task, source, source_part(claim.rows, source), scores.sha256 if scores else "")
    level = policy.level(look)
    if not level:
        fix = "draw and seal fresh human labels"
        raise GateRejected(
            f"look {look} at these labelled rows: the policy plans {policy.looks}, and they are spent", where=labels, fix=fix
        )
    rule = look_policy(policy, look, power)
    tests = _tests(task, sources, claim.cells, rule, source, scores)
    criteria = tuple(_enough(criterion, policy.least_labels) for criterion in decide(tests, rule))
    if claim.sealed:
        opened = None if claim.open is None else _sources(claim.open, rule, source, policy.score)
        guide = [] if opened is None else _tests(task, opened, claim.cells, rule, source, None)
        criteria = tuple(withhold_figures(criteria, guide, rule))
    return Verdict(criteria, look, round(policy.delta / level), scores, len(sources[source].keys))


def withhold_figures(criteria: tuple[Criterion, ...], guide: list[CriterionTest], rule: GatePolicy) -> list[Criterion]:
    """Of sealed rows: the verdict, and the bounds once all criteria are passed. Figures of rejections could be climbed, look by look.

    `guide`: the same criteria on open rows, which say how many labels it would take were the truth as seen there.
    """
    passed = all(criterion.passed for criterion in criteria)
    made = []
    for place, criterion in enumerate(criteria):
        known = guide[place] if guide else None
        hidden: dict[str, float | None] = dict.fromkeys(("right", "value", "p", "open_value", "more", "more_least", "more_most"))
        if known is not None and known.proof.n and (mean := known.proof.value) == mean:
            hidden["open_value"] = known.natural(mean)
            if not criterion.passed:
                hidden |= known.labels_needed(criterion.level, rule, criterion.n)
        made.append(criterion.model_copy(update=hidden if passed else {**hidden, "lower_bound": None}))
    return made


def recheck(store: Storage, evidence: Evidence, task: Task) -> list[str]:
    """What keeps this evidence from a promotion, in words: what it lacks itself, a policy that is not the task's, answers that are not the
    candidate's, figures that its rows do not bear out. Empty when nothing does."""
    if found := evidence.missing() or policy_gap(evidence, task.name, task.policy_digest):
        return found
    if evidence.ledger != ledger_digest():
        return [f"its looks were counted in another ledger than the one that {LEDGER} names: run headtail gate again"]
    named = {evidence.source: evidence.answers, **{one.source: one.answers for one in evidence.references}}
    try:
        model = load_receipt(store, "precompute", evidence.answers, AnswererResult).result.model
        if not answers_are_own(store, evidence.candidate, evidence.digest, evidence.answers, model.digest if model else ""):
            return [f"the answers {evidence.answers} are not those of {evidence.candidate}: run headtail gate again"]
        claim = read_claim(store, task, evidence.labels, evidence.source, named)
        if claim.digests != {name: evidence.data[name] for name in claim.digests} or claim.sealed != evidence.sealed:
            return ["its rows are not those of the store any more: run headtail gate again"]
        judge = evidence.judge.ref if evidence.judge else ""
        verdict = prove_claim(store, task, claim, evidence.source, evidence.answers, evidence.labels, judge=judge)
    except HeadtailError as error:
        return [f"the verdict cannot be computed anew: {error.what} ({error.where})"]
    return [f"computed anew, not shown: {criterion.words()}" for criterion in verdict.criteria if not criterion.passed]


def _enough(criterion: Criterion, least: int) -> Criterion:
    update = {"least_labels": least, "passed": criterion.passed and criterion.n >= least}
    return criterion.model_copy(update=update)


def _sources(rows: pa.Table, rule: GatePolicy, source: str, score: ScoreName) -> dict[str, SourceScores]:
    return {name: source_rows(rows, name, score) for name in dict.fromkeys([source, *compared_sources(rule)])}


def _tests(
    task: Task, sources: Mapping[str, SourceScores], cells: TrafficCells | None, rule: GatePolicy, source: str, judge: JudgeByStratum | None
) -> list[CriterionTest]:
    units = most_units(task.file.score, task.outline.schema)
    return list(criterion_tests(rule, sources, source, task.file.gate.score, judge.by_stratum if judge else {}, cells, units))
