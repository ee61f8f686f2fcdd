"""What a publish made: the release, what it replaces, and what its guardrails withheld."""

from __future__ import annotations

from pydantic import Field

from headtail.core.config import Config
from headtail.core.evidence import Figures
from headtail.core.paths import StoreId, StoreIdOrEmpty, StudentOrEmpty
from headtail.core.receipt import StageResult


class WithheldAnswer(Config):
    """An answer that guardrails kept out of the snapshot."""

    reason: str = Field(description="a code of core.guardrails")
    query: str = Field(description="the query, normalised")
    answer: str = Field(description="the answer, canonical JSON")
    source: str = Field(description="who gave it")
    count: int = Field(0, ge=0, description="events of the query before the cut")


class Result(StageResult):
    """The release and what it replaces."""

    snapshot: StoreId = Field(description="id of the cache snapshot")
    release: StoreId = Field(description="id of the release")
    previous: StoreIdOrEmpty = Field(description="id of the release that was current when this one was made; empty: none was")
    student: StudentOrEmpty = Field(description="folder of the student that answers misses; empty: none does")
    figures: dict[str, Figures] = Field(description="of realtime_student and batch_student: against people, against the teacher, cost")
    published: int | None = Field(None, ge=0, description="answers in the snapshot; null: a run of an earlier version")
    withheld_answers: int | None = Field(None, ge=0, description="answers that guardrails withheld; null: a run of an earlier version")
    coverage: float | None = Field(None, description="share of the log's events before the cut that the snapshot answers; null: not known")
    withheld: tuple[WithheldAnswer, ...] = Field((), description="answers that guardrails withheld: of each reason the most frequent")
