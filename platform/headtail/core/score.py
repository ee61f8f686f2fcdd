"""How two answers to one query are compared.

In: a wanted and a given answer (parsed JSON; given may be None when there is no answer). Out: counts of true positives,
false positives and false negatives, so that every score is a micro-F1 over rows: for a label it equals accuracy.
Knows nothing of queries, models or files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from pydantic import Field

from headtail.core.config import Config
from headtail.core.errors import ConfigError
from headtail.core.keys import canonical
from headtail.core.text import normalise


class Counts(NamedTuple):
    """Units right (tp), given but not wanted (fp), wanted but not given (fn)."""

    tp: int
    fp: int
    fn: int

    @property
    def right(self) -> bool:
        """Whether the whole answer is right."""
        return self.fp == 0 and self.fn == 0


class ScoreConfig(Config):
    """How two answers are scored: the units compared and where they stand in the answer."""

    kind: Literal["spans", "label", "exact"] = Field(
        description="spans: micro-F1 over (normalised text, label) pairs; label: accuracy of one field; exact: whole answers equal"
    )
    field: str = Field("", description="spans: the array of segments; label: the field compared; unused by exact")
    text: str = Field("text", description="spans: name of the text within a segment")
    label: str = Field("label", description="spans: name of the label within a segment")
    ignore: tuple[str, ...] = Field((), description="spans: labels that do not count, such as none")


def score_answer(config: ScoreConfig, expected: Any, given: Any) -> Counts:
    """Counts for one row. No answer (None) is all units wanted and missed."""
    want, got = Counter(_units(config, expected)), Counter(_units(config, given))
    hit = sum((want & got).values())
    return Counts(hit, sum(got.values()) - hit, sum(want.values()) - hit)


def check_score(config: ScoreConfig, outline: Mapping[str, Any], where: str) -> None:
    """ConfigError when a name in `config` is not in the answers. `outline`: an Outline's schema, see `schema`."""
    if config.kind == "exact":
        return
    fields = answer_fields(outline)
    if config.field not in fields:
        _refuse("field", config.field, fields, where)
    if config.kind == "label":
        return
    lists = [part for part in _options(fields[config.field]) if part.get("type") == "array"]
    if not lists:
        fix = "kind: spans compares a list of objects; use kind: label for one value, or exact"
        raise ConfigError("field score.field: not a list in the answer schema", where=where, value=config.field, fix=fix)
    inner = {name: part for found in lists if found["items"] for name, part in answer_fields(found["items"]).items()}
    for name in ("text", "label"):
        if getattr(config, name) not in inner:
            _refuse(name, getattr(config, name), inner, where)
    labels = [value for part in _options(inner[config.label]) for value in part.get("enum", [None])]
    for name in config.ignore:
        if name not in labels and None not in labels:
            _refuse("ignore", name, labels, where)


def _options(part: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [inner for option in part["anyOf"] for inner in _options(option)] if "anyOf" in part else [part]


def answer_fields(part: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that an object of the schema may have, by name. `part`: of an Outline's schema."""
    return {name: child for option in _options(part) for name, child in option.get("properties", {}).items()}


def _refuse(name: str, value: str, known: Iterable[Any], where: str) -> None:
    listed = ", ".join(map(str, known)) or "none"
    fix = f"the answer schema has {listed} there"
    raise ConfigError(f"field score.{name}: not in the answer schema", where=where, value=value, fix=fix)


def f1(counts: Iterable[Counts]) -> float:
    """Micro-F1 over rows, 2tp / (2tp + fp + fn); 1.0 when nothing was wanted and nothing given."""
    tp = fp = fn = 0
    for row in counts:
        tp, fp, fn = tp + row.tp, fp + row.fp, fn + row.fn
    return 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 1.0


def _units(config: ScoreConfig, answer: Any) -> list[str]:
    if not isinstance(answer, dict):
        return []
    if config.kind == "exact":
        return [canonical(answer, "answer")]
    value = answer.get(config.field)
    if config.kind == "label":
        return [] if value is None else [canonical(value, config.field)]
    segments = value if isinstance(value, list) else []
    return [
        f"{segment.get(config.label)}\0{_plain(segment.get(config.text))}"
        for segment in segments
        if isinstance(segment, dict) and segment.get(config.label) not in config.ignore
    ]


def _plain(text: Any) -> Any:
    """A span's text as queries are: people type `Thai Food` of the query `thai food`."""
    return normalise(text) if isinstance(text, str) else text
