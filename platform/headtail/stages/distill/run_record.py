"""What a training run keeps of itself in the store: the loss curve, where the loop was at a checkpoint, what it was made of, how it ended.

In: nothing. Out: frozen models that travel as JSON between the workers, the driver and a resumed run. Knows no tensors.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from headtail.core.config import Config
from headtail.core.paths import StorePath


class LossPoint(Config):
    """One point of the loss curve. Losses are per answer token, in nats."""

    step: float = Field(ge=0, description="optimiser steps so far")
    loss: float = Field(description="mean training loss since the point before; NaN before the first step")
    eval_loss: float = Field(description="loss on held-out rows; NaN without any")
    seconds: float = Field(ge=0, description="seconds of training so far, those before a resume included")


class BestWeights(Config):
    """The evaluation with the lowest loss, and where its weights are."""

    step: int = Field(ge=0, description="its step")
    eval_loss: float = Field(description="loss on held-out rows")
    files: tuple[StorePath, ...] = Field(description="its weights in the store; none on other ranks than the first")


class LoopRecord(Config):
    """Where the loop was: with the weights, all that a checkpoint must hold. The same on every rank."""

    step: int = Field(ge=0, description="optimiser steps so far")
    history: tuple[LossPoint, ...] = Field((), description="the loss curve")
    losses: tuple[float, ...] = Field((), description="of the steps since its last point")
    best: BestWeights | None = Field(None, description="null: nothing was evaluated yet, or no early stopping")
    patience: int = Field(0, ge=0, description="evaluations since the best")
    seconds: float = Field(0.0, ge=0, description="seconds of training so far")


class TrainingMakeup(Config):
    """What a checkpoint was made of: one of another makeup is not continued."""

    zero_stage: int = Field(ge=0, description="DeepSpeed ZeRO stage")
    precision: str = Field(description="bf16 or fp32")
    lora: dict[str, Any] | None = Field(None, description="the adapter's settings; null: all weights train")
    workers: int = Field(ge=1, description="Ray Train workers")
    data: str = Field("", description="digest of the examples")


class TrainedRun(Config):
    """How a training ended: `work/done.json`."""

    history: tuple[LossPoint, ...] = Field(min_length=1, description="the loss curve")
    files: tuple[StorePath, ...] = Field(min_length=1, description="the weights in the store: an adapter, or all")
    steps: int = Field(ge=0, description="optimiser steps that were made")
    taken_step: int = Field(ge=0, description="the step whose weights were taken")
    stopped_early: bool = Field(False, description="whether held-out rows got no better before the last step")
    real_tokens: int = Field(ge=0, description="tokens that were read, without padding, over all workers")
    tokens: int = Field(ge=0, description="the same with padding")
    rows: int = Field(ge=0, description="rows that were read")
    trained_params: int | None = Field(None, ge=0, description="parameters that train; null: a run of an earlier version")
    logits_bytes: int | None = Field(None, ge=0, description="bytes of the teacher's logits in the store; null: none are learnt from")
    logits_bytes_per_row: float | None = Field(None, ge=0, description="the same per training row")

    @property
    def final_point(self) -> LossPoint:
        """The last point of the curve at the step whose weights were taken."""
        return next((point for point in reversed(self.history) if point.step == self.taken_step), self.history[-1])
