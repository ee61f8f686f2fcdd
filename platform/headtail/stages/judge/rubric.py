"""How a judge's words become scores: `judge.yaml` beside the judge's `task.yaml`.

In: a task folder. Out: a Rubric that turns the judge's answer into a score of 0 to 1. The judge's task is a task as any other: its
prompt, schema and sampling are in `task.yaml`; its side inputs name what it is shown of the judged answers. Knows no rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, field_validator

from headtail.core.config import Config, build_config, read_json_like
from headtail.core.errors import ConfigError
from headtail.core.keys import canonical
from headtail.core.score import answer_fields
from headtail.core.task import Task

CANDIDATE, FIRST, SECOND, PROMPT = "candidate", "first", "second", "prompt"
SHOWN = {"pointwise": (CANDIDATE,), "pairwise": (FIRST, SECOND)}  # side inputs that a judge must be shown


class Rubric(Config):
    """What of the judge's answer is its verdict, and what each verdict is worth."""

    kind: Literal["pointwise", "pairwise"] = Field(description="pointwise: one answer (`candidate`); pairwise: two (`first`, `second`)")
    field: str = Field(description="the field of the judge's answer that is its verdict; its schema lists the values (enum)")
    scores: dict[str, float] = Field(description="value -> score (0..1); pairwise: 1 when the first answer is better, 0 the second")

    @field_validator("scores")
    @classmethod
    def _range(cls, value: dict[str, float]) -> dict[str, float]:
        if any(not 0 <= score <= 1 for score in value.values()) or len(set(value.values())) < 2:
            raise ValueError("scores lie between 0 and 1, and at least two differ")
        return value

    def verdict(self, answer: Mapping[str, Any]) -> str:
        """The judge's verdict as `scores` spells it."""
        return _spell(answer[self.field])


def _spell(value: Any) -> str:
    return value if isinstance(value, str) else canonical(value, "verdict")


def load_rubric(judge: Task, judged: Task) -> Rubric:
    """The rubric in the judge's folder, checked against its schema and side inputs. ConfigError names file, field and value."""
    path = judge.folder / "judge.yaml"
    where = str(path)
    if not path.is_file():
        fix = "write judge.yaml with kind, field and scores there (docs/judge.md), or use answer_judge or answer_preference"
        raise ConfigError("this task is no judge: judge.yaml not found", where=str(judge.folder), fix=fix)
    rubric = build_config(Rubric, read_json_like(path), where)
    fields = answer_fields(judge.outline.schema)
    values = [_spell(value) for value in fields.get(rubric.field, {}).get("enum", ())]
    if not values:
        fix = "name a field whose schema is an enum"
        raise ConfigError("field field: the judge's answer has no such list of values", where=where, value=rubric.field, fix=fix)
    if set(values) != set(rubric.scores):
        fix = f"give each value a score: {', '.join(values)}"
        raise ConfigError("field scores: not the values of the schema", where=where, value=", ".join(rubric.scores), fix=fix)
    _check_side_inputs(judge.side_inputs, SHOWN[rubric.kind], judged)
    return rubric


def _check_side_inputs(names: Sequence[str], needed: Sequence[str], judged: Task) -> None:
    known = (*needed, PROMPT, *judged.side_inputs)
    wrong = [name for name in names if name not in known] + [name for name in needed if name not in names]
    if wrong:
        fix = f"a judge of this kind must have {' and '.join(needed)}, and may have any of {', '.join(known[len(needed) :])}"
        raise ConfigError("field side_inputs: not what this judge is shown", where="the judge's task.yaml", value=wrong[0], fix=fix)
