"""The evidence for a promotion: what was claimed of a candidate, on which rows, by which bound, and whether it held.

In: what a gate found. Out: an Evidence, which travels as JSON (receipt, release, registry) and says by itself what is
lacking, so that whoever promotes need not have seen the gate. A verdict that does not follow from its own figures is
lacking too. Knows nothing of how claims are tested.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field

from headtail.core.config import Config, build
from headtail.core.errors import ConfigError, GateRefused

_NEEDED = ("rows", "gold")  # digests without which nobody can check the figures


class Claim(Config):
    """One thing that must hold of the candidate on one stratum. `least` and `low` are on the scale of its kind."""

    kind: Literal["quality", "drop", "above"] = Field(
        description="quality: mean score; drop: mean score minus the teacher's on the same rows; above: minus the fallback's"
    )
    stratum: str = Field(description="head, torso, tail, unseen, all or traffic")
    least: float = Field(ge=-1, le=1, description="what must be shown: the mean is above this")
    n: int = Field(ge=0, description="rows with people's labels")
    right: int | None = Field(None, description="of them wholly right, when the score is exact")
    judged: int = Field(0, ge=0, description="further rows with a judge's score alone")
    value: float | None = Field(None, description="the mean, estimated; null without rows")
    low: float = Field(ge=-1, le=1, description="the mean is above this, except with chance `level`")
    level: float = Field(gt=0, lt=1, description="the chance of error at which this claim was judged")
    p: float = Field(ge=0, le=1, description="p-value of: the mean is `least` or lower")
    method: str = Field(description="the bound")
    passed: bool = Field(description="whether it holds")
    more: int | None = Field(
        None, description="further labels with which it would likely hold, the truth being what was observed; null: none"
    )

    @property
    def short(self) -> float:
        """Points (hundredths) by which the bound misses what is asked."""
        return max(0.0, 100 * (self.least - self.low))

    def words(self) -> str:
        """What is missing, or what was shown, for people."""
        asked = {"quality": f"{self.least:g} asked", "drop": f"at most {-self.least:g} below the teacher", "above": "above the fallback"}
        start = f"{self.stratum}: " if self.kind == "quality" else f"{self.stratum}, {asked[self.kind]}: "
        end = f"; {asked['quality']}" if self.kind == "quality" else ""
        if self.value is None:
            return f"{start}no labels at all, {self.more or 'many'} if all of them are right{end}"
        seen = f"{self.value:+.3f}" if self.kind != "quality" else f"{self.value:.3f}"
        low = f"{self.low:+.3f}" if self.kind != "quality" else f"{self.low:.3f}"
        shown = f"{seen} on {self.n:,} labels{f' and {self.judged:,} judged rows' if self.judged else ''}, at least {low} shown{end}"
        if self.passed:
            return start + shown
        if self.more is None:
            return f"{start}{self.short:.1f} points, more labels alone will not do ({shown})"
        return f"{start}{self.more:,} more labels, or {self.short:.1f} points ({shown})"


class Evidence(Config):
    """What a gate found of one candidate."""

    format: Literal["headtail-gate/1"] = Field("headtail-gate/1", description="layout of this record")
    passed: bool = Field(description="the verdict: every claim holds")
    task: str = Field(description="name of the task")
    candidate: str = Field(min_length=1, description="distill/<fingerprint>, generations/<id> or the model's name")
    digest: str = Field(min_length=1, description="digest of the candidate's weights, or of a generation's content")
    tier: str = Field(description="the tier of the evaluation that was judged")
    answers: str = Field(min_length=1, description="receipt of the answers that were scored")
    evaluation: str = Field(min_length=1, description="receipt of the evaluation")
    score: str = Field(description="what a row's score is: exact (0 or 1) or f1 (0..1)")
    delta: float = Field(gt=0, lt=1, description="chance that a candidate passes although a claim is false")
    candidates: int = Field(ge=1, description="candidates by which delta is divided")
    correction: str = Field(description="how claims and candidates were corrected for")
    claims: tuple[Claim, ...] = Field(min_length=1, description="every claim")
    data: dict[str, str] = Field(description="SHA-256 of each table the claims rest on")
    judge: dict[str, Any] = Field({}, description="the judge whose scores helped, if any: ref, name, own_teacher, rows")
    figures: dict[str, float | None] = Field({}, description="against people, against the teacher, cost per million against the teacher's")

    def lacking(self) -> list[str]:
        """What stands in the way of a promotion, in words; empty when nothing does."""
        return list(self._lacking())

    def _lacking(self) -> Iterator[str]:
        for name in _NEEDED:
            if not re.fullmatch(r"[0-9a-f]{64}", self.data.get(name, "")):
                yield f"no digest of the {name}"
        unproven = [claim for claim in self.claims if not claim.passed]
        yield from (claim.words() for claim in unproven)
        left, budget = len(self.claims), self.delta / self.candidates
        for claim in sorted(self.claims, key=lambda found: found.p) if not unproven else ():
            if not claim.n or claim.p > budget / left * (1 + 1e-9) or claim.low < claim.least - 1e-9:
                yield f"{claim.stratum}: said to hold, but its own figures do not show it (p {claim.p:.3g} at level {budget / left:.3g})"
            left -= 1
        if not unproven and not self.passed:
            yield "the verdict is: refused"

    def tags(self) -> dict[str, str]:
        """As tags of a registered model: a line per claim for people, what is lacking, and the whole as JSON."""
        lines = {f"gate.{claim.kind}.{claim.stratum}": f"{'holds' if claim.passed else 'MISSED'}; {claim.words()}" for claim in self.claims}
        missing = self.lacking()
        rest = {"gate.passed": str(not missing).lower(), "gate.lacking": "; ".join(missing), "gate.correction": self.correction}
        return {**lines, **rest, "gate.evaluation": self.evaluation, "gate.evidence": self.model_dump_json()}


def three_figures(
    quality: float | None, agreement: float | None, own: Mapping[str, float], teacher: Mapping[str, float]
) -> dict[str, float | None]:
    """A student in three figures: quality against people, agreement with its teacher (no quality figure), cost per million rows.

    `own`, `teacher`: metrics of the precompute receipts that answered (`teacher` empty when the teacher itself is meant or did
    not answer). Cost in USD, in tokens per row and in seconds of all workers together, and how many times the teacher's it is.
    Null where nobody can know: docs/evaluate.md says when.
    """
    found = {"quality_against_people": quality, "agreement_with_teacher": agreement}
    for side, metrics in (("own", own), ("teacher", teacher)):
        tokens = [metrics.get(f"tokens_{way}_per_row") for way in ("in", "out")]
        rate = metrics.get("rows_per_s")
        found[f"usd_per_million_{side}"] = metrics.get("usd_per_million")
        found[f"tokens_per_row_{side}"] = None if None in tokens else sum(t for t in tokens if t is not None)
        found[f"seconds_per_million_{side}"] = 1e6 / rate if rate else None
    for name, what in (("cheaper", "usd_per_million"), ("faster", "seconds_per_million"), ("fewer_tokens", "tokens_per_row")):
        ours, theirs = found[f"{what}_own"], found[f"{what}_teacher"]
        found[f"times_{name}_than_teacher"] = theirs / ours if ours and theirs else None
    return found


def figures_of(facts: Mapping[str, Any], tier: str) -> dict[str, float | None]:
    """The three figures that an evaluation's facts hold of a tier; all null when it was made before there were any."""
    return dict(facts.get("figures", {}).get(tier) or three_figures(None, None, {}, {}))


def figure_metrics(figures: Mapping[str, float | None], of: str = "") -> dict[str, float]:
    """Figures that are known as metrics of a receipt: `figures/<name>`, or `figures/<of>/<name>`."""
    return {"/".join(filter(None, ("figures", of, name))): value for name, value in figures.items() if value is not None}


def read_evidence(data: Mapping[str, Any] | Evidence) -> Evidence:
    """Evidence from JSON. GateRefused names every field that is missing or wrong."""
    if isinstance(data, Evidence):
        return data
    try:
        return build(Evidence, data, where="evidence")
    except ConfigError as error:
        raise GateRefused(f"the evidence is not complete: {error.what}", where="evidence", fix="run: headtail gate") from None
