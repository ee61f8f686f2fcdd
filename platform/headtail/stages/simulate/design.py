"""A design: what answers a request, with how many processes, limits and machines. Service times: how long each part works.

In: YAML and `--set`. Out: frozen configs. The fields that a server has too have its names and defaults. Knows nothing of events.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from headtail.core.config import Config
from headtail.core.intervals import Array
from headtail.core.rows import Source

Milliseconds = Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(min_length=1)]  # a sample; one value: always as long
Shares = Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(min_length=1)]
CACHED = (Source.TEACHER, Source.BATCH_STUDENT, Source.HUMAN_OVERRIDE)


class EscalationDesign(Config):
    """A bigger model for what the student is unsure of."""

    slots: int = Field(0, ge=0, description="answers that the bigger model works on at once, over all its engines; 0: there is none")
    unsure_share: float = Field(0.1, ge=0, le=1, description="share of queries of whose answer the student is unsure")
    timeout_ms: float = Field(5000, gt=0, description="milliseconds that an unsure answer waits for it")
    per_minute: int = Field(60, ge=0, description="escalations per minute; 0: no limit")
    max_waiting: int = Field(16, ge=1, description="escalations of one front process that may wait at once")


class ServingDesign(Config):
    """One way to serve the same requests."""

    name: str = Field(description="name of the design", pattern=r"^[a-z][a-z0-9_]*$")
    cached: tuple[str, ...] = Field(CACHED, description="sources whose answers the snapshot holds; empty: there is no cache")
    cached_rows: int | None = Field(None, ge=0, description="of these answers the most frequent ones; null: all")
    fronts: int = Field(2, ge=1, description="front processes")
    students: int = Field(1, ge=0, description="student engines; 0: misses get the fallback at once")
    slots: int = Field(
        0,
        ge=0,
        description="rows that an engine works on at once, each leaving when it is done (vLLM); 0: what waits together is one batch",
    )
    realtime_timeout_ms: float = Field(2000, gt=0, description="milliseconds a miss waits for the student before it gets the fallback")
    max_misses: int = Field(64, ge=1, description="misses of one front process that may wait at once; the next one gets the fallback")
    dynamic_ttl_s: float = Field(3600, ge=0, description="seconds that a student's answer is given again; 0: never")
    dynamic_answers: int = Field(100_000, ge=1, description="answers that one front process keeps for that")
    dynamic_shared: bool = Field(False, description="the front processes share these answers (Redis)")
    escalation: EscalationDesign = Field(EscalationDesign(), description="the bigger model")

    @model_validator(mode="after")
    def _sources(self) -> Self:
        if unknown := set(self.cached) - set(CACHED):
            raise ValueError(f"cached: a snapshot has no answers of {min(unknown)}; name some of {', '.join(CACHED)}")
        if self.escalation.slots and not self.students:
            raise ValueError("escalation: without students nothing is unsure; set students, or escalation.slots=0")
        return self


class ServiceTimes(Config):
    """How long the parts work, in milliseconds, each as a sample from which it is drawn. The defaults are those of
    docs/benchmarks/2026-11-30-simulate.md after a rest of 5 ms: an encoder, on two cores."""

    wire_ms: Milliseconds = Field((0.04,), description="outside the processes that serve: client and network, both ways")
    front_ms: Milliseconds = Field((0.35,), description="a front process with one request: a hit, or the fallback")
    miss_ms: Milliseconds = Field((0.95,), description="a front process with a miss, beyond that: to the student and back")
    student_ms: Milliseconds = Field((2.6,), description="a student's engine with one row alone")
    row_share: float = Field(0.22, ge=0, description="each further row beside it, as a share of that")
    escalated_ms: Milliseconds = Field((1000.0,), description="the bigger model with one row")
    rest_ms: Milliseconds = Field((0,), description="how long a part has had nothing to do, ascending; one value: that makes no difference")
    front_rest: Shares = Field(
        (1,), description="a front process after each of `rest_ms`, as a share of front_ms and of miss_ms; between them: in line"
    )
    student_rest: Shares = Field((1,), description="a student's engine after each of `rest_ms`, as a share of student_ms")

    @model_validator(mode="after")
    def _rests(self) -> Self:
        if len({len(self.rest_ms), len(self.front_rest), len(self.student_rest)}) > 1 or sorted(set(self.rest_ms)) != list(self.rest_ms):
            raise ValueError("rest_ms, front_rest and student_rest: give as many values of each, and rest_ms in ascending order")
        return self

    def seconds(self, name: str) -> Array:
        """The sample of a field, in seconds."""
        return np.asarray(getattr(self, f"{name}_ms"), np.float64) / 1000

    def pace(self, name: Literal["front", "student"], rest_s: float) -> float:
        """How long a part works after a rest of so many seconds, as a share of the time that is its sample."""
        return float(np.interp(1000 * rest_s, self.rest_ms, self.front_rest if name == "front" else self.student_rest))
