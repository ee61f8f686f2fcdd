"""What distil made: the student's weights by digest, what it started from, how it is prompted. Knows no tensors."""

from __future__ import annotations

from pydantic import Field

from headtail.core.config import Config
from headtail.core.evidence import Figures
from headtail.core.io_format import IOFormat
from headtail.core.paths import StorePath
from headtail.core.receipt import StageResult


class TrainingStage(Config):
    """One of the two stages of a student that is trained with side inputs and then without."""

    side_inputs: str = Field(description="shown, or left out")
    path: StorePath = Field(description="folder of the stage's student")
    eval_loss: float | None = Field(description="loss per answer token on held-out rows, nats; null without any")
    steps: float = Field(description="optimiser steps")
    train_seconds: float = Field(description="wall-clock seconds")


class TrainingTotals(Config):
    """How the training went. A loss is null where it is not a number: without held-out rows, or without a step."""

    examples: int = Field(ge=0, description="training rows, without held-out ones")
    steps: int = Field(ge=0, description="optimiser steps")
    train_loss: float | None = Field(None, description="training loss per answer token where the weights were taken, nats")
    eval_loss: float | None = Field(None, description="the same on held-out rows")
    train_seconds: float = Field(ge=0, description="wall-clock seconds")
    params: int = Field(ge=0, description="parameters of the model that is served")
    trained_params: int | None = Field(None, ge=0, description="parameters that trained; null: a run of an earlier version")


class Result(StageResult):
    """The student. Its weights are the outputs `model/...`."""

    digest: str = Field(description="hex SHA-256 over the files that can change an answer")
    base: str = Field("", description="what training started from")
    tasks: tuple[str, ...] = Field((), description="names of the tasks it learnt")
    trained_on: tuple[str, ...] = Field((), description="table refs of its training rows and of the rows that stopped its training")
    student: str = Field("decoder", description="kind of model: decoder, encoder or seq2seq")
    io_format: IOFormat = Field(IOFormat(), description="how it is prompted and what it writes")
    stopped_early: bool = Field(False, description="whether held-out rows got no better before the last step")
    training: TrainingTotals | None = Field(None, description="how the training went; null: a run of an earlier version")
    figures: Figures = Field(Figures(), description="the teacher's cost, which the student's will be held against")
    stages: tuple[TrainingStage, ...] = Field((), description="both stages of two_stage; else none")
