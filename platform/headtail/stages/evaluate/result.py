"""What evaluate compared, and each answer source in three figures. The tables hold the rest."""

from __future__ import annotations

from pydantic import Field

from headtail.core.evidence import Figures
from headtail.core.paths import AnswersPath
from headtail.core.receipt import StageResult


class Result(StageResult):
    """What was compared with what."""

    labels: str = Field(description="table ref of the labelled rows, by fingerprint")
    answers: dict[str, AnswersPath] = Field(description="folder of the precompute receipt of each answer source")
    figures: dict[str, Figures] = Field({}, description="each answer source against people, against the teacher, and its cost")
