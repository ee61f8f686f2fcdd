"""The answer sources that are made and evaluated ahead of a release: one table, from which a report derives all that it says of each.

In: nothing. Out: SOURCES, in the order of a report's columns. Another answer source is a row here: its stages, columns, figures, colours
and sentences follow. Who answered a request is wider (`core.rows.Source`). Knows nothing of receipts or figures.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from headtail.core.config import Config
from headtail.core.rows import Source

STUDENT = "_student"  # how the name of a student ends; its stages are named without it


class AnswerSource(Config):
    """One answer source."""

    name: str = Field(min_length=1, pattern=r"^[a-z][a-z0-9_]*$", description="its name in tables, such as batch_student")
    role: Literal["teacher", "student", "fixed"] = Field(
        description="teacher: students learn from it, and are compared with it; student: learns; fixed: no model answers"
    )
    colour: str = Field(pattern="^#[0-9a-f]{6}$", description="its colour on white")
    dark: str = Field(pattern="^#[0-9a-f]{6}$", description="its colour on a dark page")
    marker: str = Field("^", description="its sign in a figure, for prints without colours: a name of matplotlib's")
    terminal: str = Field("", description="its colour in a terminal: a name of rich's")
    optional: bool = Field(False, description="whether a whole pipeline may do without it: it is then not shown, and nothing is missing")
    without: str = Field("none", description="what a release says in its place when it is not there")

    @property
    def label(self) -> str:
        """Its name for people."""
        return self.name.replace("_", " ")

    @property
    def short(self) -> str:
        """Its name in the names of stages, and as the head of a column: batch of batch_student."""
        return self.name.removesuffix(STUDENT)

    @property
    def model(self) -> bool:
        """Whether a model answers."""
        return self.role != "fixed"

    def stage(self, stage: str) -> str:
        """The name of one of its stages in a pipeline: precompute_teacher, distill_batch, gate_realtime."""
        return f"{stage}_{self.short}"


# Colours are Okabe and Ito's, which colour-blind readers can tell apart.
SOURCES = (
    AnswerSource(name=Source.TEACHER, role="teacher", colour="#0072b2", dark="#56b4e9", marker="o", terminal="blue"),
    AnswerSource(name=Source.BATCH_STUDENT, role="student", colour="#d55e00", dark="#ff8b3d", marker="s", terminal="dark_orange3"),
    AnswerSource(
        name=Source.REALTIME_STUDENT,
        role="student",
        colour="#aa4499",
        dark="#dd88cc",
        marker="^",
        terminal="magenta",
        optional=True,
        without="none: the batch student answers misses too",
    ),
    AnswerSource(name=Source.FALLBACK, role="fixed", colour="#7d7d7d", dark="#a6a6a6", marker="D", terminal="bright_black"),
)


def source_named(name: str) -> AnswerSource:
    """The row of SOURCES of this name. KeyError when there is none."""
    return {source.name: source for source in SOURCES}[name]
