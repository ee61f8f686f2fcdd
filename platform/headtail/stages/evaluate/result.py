"""What evaluate compared, and each answer source in three figures. The tables hold the rest."""

from __future__ import annotations

from pydantic import Field

from headtail.core.config import Config
from headtail.core.evidence import Figures
from headtail.core.paths import AnswersPath
from headtail.core.receipt import StageResult


class TeacherDifference(Config):
    """Micro-F1 minus the teacher's, on the same labelled rows, with its interval."""

    value: float = Field(description="the estimate")
    low: float = Field(description="lower end")
    high: float = Field(description="upper end")


class SourceFigures(Config):
    """One answer source beside people and beside the teacher. Null where nobody can know."""

    ece: float | None = Field(None, description="expected calibration error")
    ece_noise_floor: float | None = Field(None, description="what perfectly calibrated confidences would show on so many rows, by luck")
    auroc: float | None = Field(None, description="chance that a right answer has a higher confidence than a wrong one")
    agreement: float | None = Field(None, description="micro-F1 with the teacher's answers taken as right; no quality figure")
    minus_teacher: TeacherDifference | None = Field(None, description="over all labelled rows; null for the teacher itself")


class Result(StageResult):
    """What was compared with what."""

    labels: str = Field(description="table ref of the labelled rows, by fingerprint")
    answers: dict[str, AnswersPath] = Field(description="folder of the precompute receipt of each answer source")
    sources: dict[str, SourceFigures] = Field({}, description="confidence, agreement and difference of each answer source")
    figures: dict[str, Figures] = Field({}, description="each answer source against people, against the teacher, and its cost")
