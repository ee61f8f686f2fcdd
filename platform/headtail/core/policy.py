"""What a candidate of a task must show before it may be promoted: written into task.yaml before any result is known.

In: the field `gate` of task.yaml. Out: a TaskPolicy with a digest, which evidence carries and promotion compares, and the level at which
each further look at the same human labels is judged. Knows nothing of rows or tests.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from headtail.core.config import Config
from headtail.core.keys import fingerprint
from headtail.core.rows import ALL, SLICES, TRAFFIC


class TaskPolicy(Config):
    """Criteria, how surely, and how the chance of error is spent over looks at the same labelled rows."""

    score: Literal["exact", "f1", "micro_f1"] = Field(
        "exact",
        description="a row's score: exact (1 when wholly right, else 0), f1 (its own F1, 0..1) or micro_f1 (F1 over all units, as "
        "evaluate shows it; differences are then of the rows' own F1)",
    )
    minimum: dict[str, float] = Field(
        {},
        description="stratum -> minimum mean score (0..1); head, torso, tail, unseen, all (every labelled row "
        "counts the same) or traffic (rows count by events)",
    )
    max_drop: float | None = Field(
        0.05, ge=0, le=1, description="maximum drop of the mean score (0..1) below the teacher's; null: not tested"
    )
    above_fallback: bool = Field(True, description="whether the candidate must score above the task's fallback")
    relative_on: tuple[str, ...] = Field((ALL,), description="strata on which the candidate is compared with teacher and fallback")
    least_labels: int = Field(1, ge=1, description="labelled rows that each criterion must rest on")
    delta: float = Field(
        0.05,
        gt=0,
        lt=0.5,
        description="chance (0..0.5) that a bad candidate ever passes on the same labelled rows, however often one looks",
    )
    looks: int | None = Field(
        None,
        ge=1,
        description="looks that are planned: each is judged at delta / looks, and there are no more; null: look k at delta / (k(k+1))",
    )

    @field_validator("minimum")
    @classmethod
    def _least(cls, value: dict[str, float]) -> dict[str, float]:
        if any(not 0 < least < 1 for least in value.values()):
            raise ValueError("a minimum score lies above 0 and below 1: no number of labels can show 1")
        return value

    @model_validator(mode="after")
    def _something(self) -> TaskPolicy:
        unknown = [name for name in (*self.minimum, *self.relative_on) if name not in SLICES]
        if unknown:
            raise ValueError(f"unknown stratum {unknown[0]}; known: {', '.join(SLICES)}")
        if self.score == "micro_f1" and TRAFFIC in (*self.minimum, *self.relative_on):
            raise ValueError("traffic is gated by exact or f1, not by micro_f1: the design of the labels weighs rows, not units")
        if not self.minimum and not (self.relative_on and (self.max_drop is not None or self.above_fallback)):
            raise ValueError("there is no criterion: set minimum, max_drop or above_fallback")
        return self

    @property
    def criteria(self) -> int:
        """How many criteria there are: Holm's correction is over them."""
        compared = (self.max_drop is not None) + self.above_fallback
        return len(self.minimum) + compared * len(self.relative_on)

    def level(self, look: int) -> float:
        """The chance of error that look number `look` (from 1) may spend; all of them sum to at most delta. 0: nothing is left."""
        if self.looks is None:
            return self.delta / (look * (look + 1))
        return self.delta / self.looks if look <= self.looks else 0.0

    def looser_than(self, earlier: TaskPolicy) -> list[str]:
        """Fields in which this policy asks for less than an earlier one, or for what cannot be compared with it. Empty: what passes this
        one passes the earlier one too."""
        relative = earlier.relative_on if earlier.max_drop is not None or earlier.above_fallback else ()
        looser = {
            "score": self.score != earlier.score,
            "minimum": any(self.minimum.get(name, 0.0) < least for name, least in earlier.minimum.items()),
            "max_drop": earlier.max_drop is not None and (self.max_drop is None or self.max_drop > earlier.max_drop),
            "above_fallback": earlier.above_fallback and not self.above_fallback,
            "relative_on": not set(relative) <= set(self.relative_on),
            "least_labels": self.least_labels < earlier.least_labels,
            "delta": self.delta > earlier.delta,
            "looks": self.looks != earlier.looks,
        }
        return [name for name, less in looser.items() if less]

    def digest(self, score: str) -> str:
        """Over the policy and `score`, the fingerprint of how the task compares two answers."""
        return fingerprint({"policy": self.model_dump(mode="json"), "score": score})
