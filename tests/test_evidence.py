"""Evidence says by itself what is missing: nothing missing, nothing failed, and no verdict that its own figures do not bear out."""

from __future__ import annotations

import json
from typing import Any

import pytest

from conftest import figures_of
from headtail.core.bounds import Share, holm
from headtail.core.errors import GateRejected
from headtail.core.evidence import Criterion, Figures, figure_metrics, read_evidence, three_figures


def criteria(*found: tuple[str, int, int, float], delta: float = 0.05, candidates: int = 1) -> list[dict[str, Any]]:
    """(stratum, right, n, least) as a gate would judge them."""
    proofs = [Share(right, n) for _, right, n, _ in found]
    ps = [proof.p(least) for proof, (*_, least) in zip(proofs, found, strict=True)]
    passed, levels = holm(ps, delta / candidates)
    return [
        Criterion(
            kind="quality",
            stratum=name,
            threshold=least,
            n=n,
            right=right,
            value=right / n if n else None,
            lower_bound=proof.low(float(level)),
            level=float(level),
            p=p,
            method=proof.method,
            passed=bool(ok),
            more=None if ok or (need := proof.rows_needed(least, float(level), 0.8)) is None else need - n,
        ).model_dump()
        for proof, p, ok, level, (name, right, n, least) in zip(proofs, ps, passed, levels, found, strict=True)
    ]


def evidence(*found: tuple[str, int, int, float], **changes: Any) -> dict[str, Any]:
    """Evidence of a student, as JSON; by default it passes on two strata."""
    judged = criteria(*(found or (("head", 290, 300, 0.9), ("tail", 280, 300, 0.88))))
    made = {
        "passed": all(criterion["passed"] for criterion in judged),
        "task": "query_intent",
        "candidate": "distill/" + "d" * 16,
        "digest": "D",
        "source": "batch_student",
        "answers": "precompute/" + "s" * 16,
        "evaluation": "evaluate/" + "e" * 16,
        "score": "exact",
        "delta": 0.05,
        "candidates": 1,
        "correction": "Holm",
        "criteria": judged,
        "data": {"rows": "0" * 64, "human_labels": "1" * 64},
    }
    return json.loads(json.dumps({**made, **changes}))  # type: ignore[no-any-return]


def test_whole_and_passed_lacks_nothing() -> None:
    found = read_evidence(evidence())
    assert found.passed
    assert found.missing() == []
    assert read_evidence(json.loads(found.tags()["gate.evidence"])) == found
    assert found.tags()["gate.quality.tail"].startswith("passed; tail: 0.933 on 300 labels, lower bound 0.9")


@pytest.mark.parametrize("field", ["criteria", "data", "delta", "candidate", "evaluation", "passed", "correction", "answers"])
def test_a_missing_field_is_named(field: str) -> None:
    with pytest.raises(GateRejected, match=f"not complete: field {field} is required"):
        read_evidence({key: value for key, value in evidence().items() if key != field})
    with pytest.raises(GateRejected, match="not complete"):
        read_evidence({})


def test_empty_criteria_and_missing_digests_are_missing() -> None:
    with pytest.raises(GateRejected, match="field criteria"):
        read_evidence(evidence(criteria=[]))
    assert read_evidence(evidence(data={"rows": "0" * 64})).missing() == ["no digest of the human labels"]


def test_a_rejection_says_what_is_missing() -> None:
    found = read_evidence(evidence(("head", 290, 300, 0.9), ("tail", 210, 240, 0.85), ("torso", 80, 100, 0.85), ("unseen", 0, 0, 0.9)))
    assert not found.passed
    tail, torso, unseen = found.missing()
    assert tail.startswith("tail: ")
    assert "more labels, or 2." in tail
    assert "0.875 on 240 labels, lower bound 0.8" in tail
    assert "threshold 0.85" in tail
    assert torso.startswith("torso: 1")
    assert "points, more labels alone will not do" in torso
    assert unseen == "unseen: no labels at all, 39 if all of them are right; threshold 0.9"
    assert found.tags()["gate.quality.tail"].startswith("failed; tail: ")


def test_a_verdict_that_its_figures_do_not_bear_out_is_refused() -> None:
    """Someone writes `passed` into evidence that was rejected, or raises delta's share: it is missing all the same."""
    refused = evidence(("head", 290, 300, 0.9), ("tail", 210, 240, 0.85))
    forged = {**refused, "passed": True, "criteria": [{**criterion, "passed": True} for criterion in refused["criteria"]]}
    assert ["tail" in text and "do not show it" in text for text in read_evidence(forged).missing()] == [True]
    assert read_evidence({**evidence(), "passed": False}).missing() == ["the verdict is: rejected"]
    assert read_evidence({**evidence(("tail", 222, 240, 0.88))}).missing() == []  # p 0.017
    assert "do not show it" in read_evidence({**evidence(("tail", 222, 240, 0.88)), "candidates": 5}).missing()[0]
    without = evidence()
    without["criteria"][0]["n"] = 0
    assert "do not show it" in read_evidence(without).missing()[0]


def test_three_figures_say_null_where_nothing_is_known() -> None:
    own = figures_of(usd_per_million=0.5, tokens_in_per_row=8.0, tokens_out_per_row=2.0, rows_per_s=500.0)
    found = three_figures(0.9, 0.95, own, figures_of(usd_per_million=10.0))
    assert found.times_cheaper_than_teacher == 20.0
    assert (found.tokens_per_row_own, found.seconds_per_million_own) == (10.0, 2000.0)
    assert (found.tokens_per_row_teacher, found.seconds_per_million_teacher) == (0.0, None)
    assert (found.times_faster_than_teacher, found.times_fewer_tokens_than_teacher) == (None, None)
    nothing = three_figures(None, None, None, None)
    assert {value for _, value in nothing} == {None}
    assert (figure_metrics(nothing), nothing) == ({}, Figures())
    assert figure_metrics(found, "batch_student")["figures/batch_student/times_cheaper_than_teacher"] == 20.0
    assert len(figure_metrics(found)) == sum(value is not None for _, value in found)
    whole = three_figures(0.9, 0.95, own, own.model_copy(update={"rows_per_s": 25.0, "tokens_out_per_row": 92.0}))
    assert (whole.times_faster_than_teacher, whole.times_fewer_tokens_than_teacher) == (20.0, 10.0)
