"""The evidence for a promotion: which criteria a candidate had to pass, on which rows, by which bound, and whether it passed.

In: what a gate found. Out: an Evidence, which travels as JSON (receipt, release, registry) and says what is
missing, so that the code that promotes does not need the gate. A verdict that does not follow from its own figures
is missing too. Knows nothing of how criteria are tested.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field

from headtail.core.config import Config, build_config
from headtail.core.errors import ConfigError, GateRejected
from headtail.core.paths import StorePath

_NEEDED = ("rows", "human_labels")  # digests without which nobody can check the figures


class Criterion(Config):
    """One thing that a candidate must show on one stratum. `threshold` and `lower_bound` are on the scale of its kind."""

    kind: Literal["quality", "drop", "above"] = Field(
        description="quality: mean score; drop: mean score minus the teacher's on the same rows; above: minus the fallback's"
    )
    stratum: str = Field(description="head, torso, tail, unseen, all or traffic")
    threshold: float = Field(ge=-1, le=1, description="the lower bound must reach this")
    n: int = Field(ge=0, description="rows with people's labels")
    right: int | None = Field(None, description="of them wholly right, when the score is exact")
    judged: int = Field(0, ge=0, description="further rows with a judge's score alone")
    value: float | None = Field(None, description="the mean, estimated; null without rows")
    lower_bound: float | None = Field(
        ge=-1,
        le=1,
        description="the mean is above this, except with chance `level`; null: failed on sealed rows, which say no more than that",
    )
    level: float = Field(gt=0, lt=1, description="the chance of error at which this criterion was judged")
    p: float | None = Field(ge=0, le=1, description="p-value of: the mean is `threshold` or lower; null: the rows are sealed")
    method: str = Field(description="the bound")
    passed: bool = Field(description="whether the lower bound reaches the threshold")
    more: int | None = Field(
        None, description="further labels with which it would likely pass the next look, the truth being what was observed; null: none"
    )
    more_least: int | None = Field(None, description="the same if the truth is better than observed: the near end of an 80 % range")
    more_most: int | None = Field(None, description="the same if it is worse: the far end; null: then no number of labels will do")
    open_value: float | None = Field(None, description="the mean on open rows, where the criterion was tested on sealed ones")
    least_labels: int = Field(1, ge=1, description="labelled rows that the policy asks for")

    @property
    def short(self) -> float:
        """Points (hundredths) by which the lower bound misses the threshold."""
        return 0.0 if self.lower_bound is None else max(0.0, 100 * (self.threshold - self.lower_bound))

    def words(self) -> str:
        """The criterion and its figures, for people; what is missing first when it is not passed."""
        against = {"quality": "", "drop": ", minus the teacher", "above": ", minus the fallback"}
        where, sign = f"{self.stratum}{against[self.kind]}", "" if self.kind == "quality" else "+"
        if 0 < self.n < self.least_labels:
            return f"{where}: {self.n:,} labels, the policy asks for at least {self.least_labels:,}"
        if self.n and self.value is None:
            return f"{where}: {self._sealed_words(sign)}"
        if self.value is None or self.lower_bound is None:
            return f"{where}: no labels at all, {self.more or 'many'} if all of them are right; threshold {self.threshold:g}"
        judged = f" and {self.judged:,} judged rows" if self.judged else ""
        figures = (
            f"{self.value:{sign}.3f} on {self.n:,} labels{judged}, lower bound {self.lower_bound:{sign}.3f}, threshold {self.threshold:g}"
        )
        if self.passed:
            return f"{where}: {figures}"
        if self.more is None:
            return f"{where}: {self.short:.1f} points, more labels alone will not do ({figures})"
        far = f"to {self.more_most:,}" if self.more_most else "or more than any number"
        likely = f" (likely {self.more_least:,} {far})" if self.more_least else ""
        return f"{where}: {self.more:,} more labels{likely}, or {self.short:.1f} points ({figures})"

    def _sealed_words(self, sign: str) -> str:
        if self.passed and self.lower_bound is not None:
            return f"lower bound {self.lower_bound:{sign}.3f} on {self.n:,} sealed labels, threshold {self.threshold:g}"
        if self.passed:
            return f"shown on {self.n:,} sealed labels, threshold {self.threshold:g}"
        found = f"not shown on {self.n:,} sealed labels, threshold {self.threshold:g} at level {self.level:.2g}"
        if self.open_value is None:
            return found
        if self.more is None:
            return f"{found}; the open labels have {self.open_value:{sign}.3f}: more labels alone will not do"
        return f"{found}; were it the open labels' {self.open_value:{sign}.3f}, {self.more:,} more sealed labels would show it"


class JobFigures(Config):
    """Speed, tokens and money of a batch of answers. Seconds are those of all its runs. Money is null where no price is known."""

    rows_per_s: float = Field(description="rows generated per second; 0: none was generated")
    tokens_in: float = Field(description="prompt tokens")
    tokens_out: float = Field(description="answer tokens")
    tokens_in_per_row: float = Field(description="prompt tokens per row")
    tokens_out_per_row: float = Field(description="answer tokens per row")
    engine_start_s: float = Field(description="seconds until the engine was ready")
    generate_s: float = Field(description="seconds of generation")
    answered_share: float = Field(description="answered rows over rows in")
    usd: float | None = Field(None, description="USD that this job paid")
    usd_saved: float | None = Field(None, description="USD that answers taken over from other jobs saved")
    usd_per_million: float | None = Field(None, description="USD per million such rows")


class Figures(Config):
    """A student in three figures: quality against people, agreement with its teacher (no quality figure), cost beside the teacher's.

    Cost per million rows in USD, in tokens per row and in seconds of all workers together. Null where nobody can know:
    docs/evaluate.md says when.
    """

    quality_against_people: float | None = Field(None, description="micro-F1 on human labels")
    agreement_with_teacher: float | None = Field(None, description="micro-F1 with the teacher's answers taken as right")
    usd_per_million_own: float | None = Field(None, description="USD per million rows")
    tokens_per_row_own: float | None = Field(None, description="tokens read and written per row")
    seconds_per_million_own: float | None = Field(None, description="seconds per million rows")
    usd_per_million_teacher: float | None = Field(None, description="the teacher's USD per million rows")
    tokens_per_row_teacher: float | None = Field(None, description="the teacher's tokens per row")
    seconds_per_million_teacher: float | None = Field(None, description="the teacher's seconds per million rows")
    times_cheaper_than_teacher: float | None = Field(None, description="the teacher's USD over the student's")
    times_faster_than_teacher: float | None = Field(None, description="the teacher's seconds over the student's")
    times_fewer_tokens_than_teacher: float | None = Field(None, description="the teacher's tokens over the student's")


class JudgeEvidence(Config):
    """The judge whose scores tightened a bound, and what is known of it."""

    ref: str = Field(description="table of its scores: receipt:output")
    name: str | None = Field(description="its model; null: its table names none")
    own_teacher: bool | None = Field(description="whether it is the candidate's own teacher; null: not known")
    rows: int = Field(ge=0, description="rows with a score of the candidate's answers")
    left_out: int = Field(ge=0, description="rows about other answers")
    apart: int = Field(0, ge=0, description="rows that the candidate learnt from, or whose label is not in this claim: left out")
    labelled_without_score: int = Field(ge=0, description="rows with people's labels that it did not score")
    answers_checked: bool = Field(description="whether its rows name the answers that it looked at")


class ReferenceEvidence(Config):
    """An answer source that a claim compares the candidate with."""

    source: str = Field(description="teacher")
    answers: StorePath = Field(description="receipt of its answers")
    digest: str = Field(description="digest of its weights; another than the candidate's")
    rows: str = Field(description="SHA-256 of its scored rows; it was asked on all of them")


FORMER_FORMAT: Literal["headtail-gate/3"] = "headtail-gate/3"  # names neither labels nor a policy: it can be kept, and not computed anew


class Evidence(Config):
    """What a gate found of one candidate."""

    format: Literal["headtail-gate/3", "headtail-gate/4"] = Field("headtail-gate/4", description="layout of this record")
    passed: bool = Field(description="the verdict: every criterion is passed")
    task: str = Field(description="name of the task")
    candidate: str = Field(min_length=1, description="distill/<fingerprint>, snapshots/<id> or the model's name")
    digest: str = Field(min_length=1, description="digest of the candidate's weights, or of a snapshot's content")
    source: str = Field(description="the answer source of the evaluation that was judged")
    answers: StorePath = Field(description="receipt of the answers that were scored")
    evaluation: StorePath = Field(description="receipt of the evaluation")
    score: str = Field(description="what a row's score is: exact (0 or 1) or f1 (0..1)")
    delta: float = Field(gt=0, lt=1, description="chance that a candidate passes although a criterion is not true of it")
    candidates: int = Field(ge=1, description="what delta is divided by at this look: k(k+1) for look k, or the looks that are planned")
    look: int = Field(1, ge=1, description="which different look this is at labelled rows that it shares with earlier ones")
    policy: str = Field("", description="digest of the policy in task.yaml that was tested; empty: of an earlier version")
    labels: str = Field("", description="table ref of the human labels")
    ledger: str = Field("", description="SHA-256 of the address of the ledger of looks, where it is outside of the store; empty: in it")
    sealed: bool = Field(False, description="whether the rows are sealed: nothing but the gate ever read them")
    excluded: int = Field(0, ge=0, description="labelled rows that the candidate was trained on, left out")
    references: tuple[ReferenceEvidence, ...] = Field((), description="what the candidate is compared with")
    correction: str = Field(description="how criteria and candidates were corrected for")
    criteria: tuple[Criterion, ...] = Field(min_length=1, description="every criterion")
    data: dict[str, str] = Field(description="SHA-256 of each table the criteria rest on")
    judge: JudgeEvidence | None = Field(None, description="the judge whose scores helped; null: none")
    figures: Figures = Field(Figures(), description="against people, against the teacher, cost beside the teacher's")

    def missing(self) -> list[str]:
        """What is missing for a promotion, in words; empty when nothing is."""
        return list(self._missing())

    def _missing(self) -> Iterator[str]:
        for name in _NEEDED:
            if not re.fullmatch(r"[0-9a-f]{64}", self.data.get(name, "")):
                yield f"no digest of the {name.replace('_', ' ')}"
        unproven = [criterion for criterion in self.criteria if not criterion.passed]
        yield from (criterion.words() for criterion in unproven)
        left, budget = len(self.criteria), self.delta / self.candidates
        for criterion in sorted(self.criteria, key=lambda found: found.level if found.p is None else found.p) if not unproven else ():
            p, low = (criterion.level if criterion.p is None else criterion.p), criterion.lower_bound
            enough = criterion.n >= criterion.least_labels and low is not None and low >= criterion.threshold - 1e-9
            if not enough or p > budget / left * (1 + 1e-9):
                shown = f"p {p:.3g} at level {budget / left:.3g}"
                yield f"{criterion.stratum}: marked as passed, but its own figures do not show it ({shown})"
            left -= 1
        if not unproven and not self.passed:
            yield "the verdict is: rejected"

    def tags(self) -> dict[str, str]:
        """As tags of a registered model: a line per criterion for people, what is missing, and the whole as JSON."""
        lines = {
            f"gate.{criterion.kind}.{criterion.stratum}": f"{'passed' if criterion.passed else 'failed'}; {criterion.words()}"
            for criterion in self.criteria
        }
        found = self.missing()
        rest = {"gate.passed": str(not found).lower(), "gate.missing": "; ".join(found), "gate.correction": self.correction}
        return {**lines, **rest, "gate.evaluation": self.evaluation, "gate.evidence": self.model_dump_json()}


def three_figures(quality: float | None, agreement: float | None, own: JobFigures | None, teacher: JobFigures | None) -> Figures:
    """Figures of an answer source, from the jobs that answered; null without one (`teacher` too when it itself is meant)."""
    (usd, tokens, seconds), (usd_teacher, tokens_teacher, seconds_teacher) = _costs(own), _costs(teacher)
    return Figures(
        quality_against_people=quality,
        agreement_with_teacher=agreement,
        usd_per_million_own=usd,
        tokens_per_row_own=tokens,
        seconds_per_million_own=seconds,
        usd_per_million_teacher=usd_teacher,
        tokens_per_row_teacher=tokens_teacher,
        seconds_per_million_teacher=seconds_teacher,
        times_cheaper_than_teacher=_times(usd_teacher, usd),
        times_faster_than_teacher=_times(seconds_teacher, seconds),
        times_fewer_tokens_than_teacher=_times(tokens_teacher, tokens),
    )


def _costs(job: JobFigures | None) -> tuple[float | None, float | None, float | None]:
    """(USD per million rows, tokens per row, seconds per million rows)."""
    if job is None:
        return None, None, None
    return job.usd_per_million, job.tokens_in_per_row + job.tokens_out_per_row, 1e6 / job.rows_per_s if job.rows_per_s else None


def _times(theirs: float | None, ours: float | None) -> float | None:
    return theirs / ours if ours and theirs else None


def figure_metrics(figures: Figures, of: str = "") -> dict[str, float]:
    """Figures that are known as metrics of a receipt: `figures/<name>`, or `figures/<of>/<name>`."""
    return {"/".join(filter(None, ("figures", of, name))): value for name, value in figures if value is not None}


def read_evidence(data: Mapping[str, Any] | Evidence) -> Evidence:
    """Evidence from JSON. GateRejected names every field that is missing or wrong."""
    if isinstance(data, Evidence):
        return data
    try:
        return build_config(Evidence, data, where="evidence")
    except ConfigError as error:
        raise GateRejected(f"the evidence is not complete: {error.what}", where="evidence", fix="run: headtail gate") from None


def policy_gap(evidence: Evidence, task: str, policy: str) -> list[str]:
    """Words when evidence was made under another policy (a digest) than the task's own; empty when it was not."""
    if evidence.policy == policy:
        return []
    made = evidence.policy[:8] or "none, of an earlier version of headtail"
    return [f"the policy of task {task} (gate in task.yaml) is {policy[:8]}, the evidence's is {made}: run headtail gate again"]
