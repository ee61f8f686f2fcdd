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
    eval_loss: float = Field(description="loss per answer token on held-out rows, nats")
    steps: float = Field(description="optimiser steps")
    train_seconds: float = Field(description="wall-clock seconds")


class Result(StageResult):
    """The student. Its weights are the outputs `model/...`."""

    digest: str = Field(description="hex SHA-256 over the files that can change an answer")
    base: str = Field("", description="what training started from")
    tasks: tuple[str, ...] = Field((), description="names of the tasks it learnt")
    trained_on: tuple[str, ...] = Field((), description="table refs of its training rows and of the rows that stopped its training")
    student: str = Field("decoder", description="kind of model: decoder, encoder or seq2seq")
    io_format: IOFormat = Field(IOFormat(), description="how it is prompted and what it writes")
    stopped_early: bool = Field(False, description="whether held-out rows got no better before the last step")
    figures: Figures = Field(Figures(), description="the teacher's cost, which the student's will be held against")
    stages: tuple[TrainingStage, ...] = Field((), description="both stages of two_stage; else none")
