"""What a gate decided. The evidence says on which figures."""

from __future__ import annotations

from pydantic import Field

from headtail.core.evidence import Evidence
from headtail.core.receipt import StageResult
from headtail.stages.precompute.result import AnsweringModel


class JudgeResult(StageResult):
    """What a judge's receipt says of the judge."""

    model: AnsweringModel | None = Field(None, description="the model that judged; null: not said")


class Result(StageResult):
    """The verdict and its evidence."""

    passed: bool = Field(description="whether every criterion is passed")
    evidence: Evidence = Field(description="the criteria, their figures and what they rest on")
    candidate_number: int = Field(ge=1, description="which look this is at these labelled rows")
