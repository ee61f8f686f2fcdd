"""What precompute found: the model that answered, the engine that ran it, and what a dry run had said. Knows no rows."""

from __future__ import annotations

from pydantic import Field

from headtail.core.config import Config
from headtail.core.evidence import JobFigures
from headtail.core.io_format import ModelFormat
from headtail.core.receipt import StageResult
from headtail.core.rows import State

EngineFact = str | int | float | bool | None


class AnsweringModel(Config):
    """The model that made the answers."""

    name: str = Field(description="its name, such as example:teacher or distill/<fingerprint>")
    digest: str = Field(description="digest of its weights, or what pins it at an endpoint")


class PlannedActual(Config):
    """One figure of a dry run beside the result."""

    planned: float | None = Field(None, description="what the dry run said; null: it could not")
    low: float | None = Field(None, description="lower end of its 95 % interval")
    high: float | None = Field(None, description="upper end")
    actual: float = Field(description="what it was")


class JobRows(Config):
    """Rows of a job: those that went in are the sum over states, and duplicates beside them."""

    offered: int = Field(ge=0, description="rows in")
    states: dict[State, int] = Field(description="rows by the state that they ended in")
    duplicates: int = Field(ge=0, description="further rows with the query of one of these")
    reused: int = Field(ge=0, description="answers taken over from other jobs")
    recomputed: int = Field(ge=0, description="rows that an engine answered in this run")
    resumed: int = Field(ge=0, description="rows that an earlier run of this job had answered")

    def plain(self) -> dict[str, int]:
        """By the names of a receipt's rows."""
        kinds = {"duplicates": self.duplicates, "reused": self.reused, "recomputed": self.recomputed, "resumed": self.resumed}
        return {"in": self.offered, **{str(state): self.states[state] for state in State}, **kinds}


class Result(StageResult):
    """Who answered, and how."""

    source: str = Field(description="the answer source: teacher, batch_student or realtime_student")
    model: AnsweringModel = Field(description="the model that answered")
    rows: JobRows | None = Field(None, description="rows by state, and how they were made; null: a run of an earlier version")
    figures: JobFigures | None = Field(None, description="speed, tokens and money; null: a run of an earlier version")
    answer_settings: str = Field("", description="fingerprint over all that changes an answer besides its messages")
    io_format: ModelFormat | None = Field(None, description="how the model was prompted and what it wrote; null: the default")
    engine: dict[str, EngineFact] = Field({}, description="arguments and counters of the engine, by its own names; for people")
    engine_restarts: int = Field(0, ge=0, description="times that an engine was started again")
    given_up: int = Field(0, ge=0, description="rows in a state of `retry` that were asked in max_runs_per_row runs")
    max_runs_per_row: int = Field(0, ge=0, description="the limit of runs that `given_up` is counted for")
    usd_per_hour: float | None = Field(None, description="price of one worker, USD per hour")
    top_logprobs: int = Field(0, ge=0, description="likeliest tokens that are kept at each token of an answer")
    vocabulary: str = Field("", description="digest of the model's token ids, where likeliest tokens are kept; else empty")
    dry_run: dict[str, PlannedActual] = Field({}, description="what a dry run said beside what came of it, by figure")
