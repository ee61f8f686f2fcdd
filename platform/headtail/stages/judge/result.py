"""What a judge said of answers, and what people's labels say of the judge. The tables have the rows and every figure."""

from __future__ import annotations

from pydantic import Field

from headtail.core.paths import StorePath, StorePathOrEmpty
from headtail.core.receipt import StageResult
from headtail.stages.precompute.result import AnsweringModel


class Result(StageResult):
    """Who judged what, and how far the judge agrees with people."""

    model: AnsweringModel = Field(description="the model that judged")
    kind: str = Field(description="pointwise: each answer by itself; pairwise: two answers beside each other, in both orders")
    answers: StorePath = Field(description="precompute receipt of the judged answers")
    against: StorePathOrEmpty = Field("", description="precompute receipt of the answers that they are compared with; empty: none")
    families: dict[str, tuple[str, ...]] = Field(
        {}, description="model families of the judge, of the answers' model and its teachers, and of the other answers'"
    )
    same_family: bool = Field(False, description="whether the judge is of the family of the judged answers' model or its teachers")
    labelled: int = Field(0, ge=0, description="judged rows that people labelled: what the calibration rests on")
    agreement: float | None = Field(None, description="share of these on which the judge and people agree; null: no such rows")
    kappa: float | None = Field(None, description="the same beyond chance (Cohen); null: not known")
