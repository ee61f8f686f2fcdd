"""How two answers to one query are compared.

In: a wanted and a given answer (parsed JSON; given may be None when there is no answer). Out: counts of true positives,
false positives and false negatives, so that every score is a micro-F1 over rows. `none` is no unit, unless the task says that it counts.
Where a span's text stands in the query more than once, its place decides: spans are read in order, each after the one before.
Knows nothing of models or files.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from pydantic import Field

from headtail.core.config import Config
from headtail.core.errors import ConfigError
from headtail.core.keys import canonical
from headtail.core.scorers import Measure, edit_counts
from headtail.core.text import normalise

NO_UNIT = ("none",)  # labels that say that there is nothing: no unit, unless the task names its own in `ignore`


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

    kind: Literal["spans", "label", "exact", "set", "edit", "semantic", "custom"] = Field(
        description="spans: micro-F1 over (normalised text, label, place) triples; label: one field; exact: whole answers equal; set: "
        "micro-F1 over the values of a list; edit: over characters of a text; semantic: likeness of two texts; custom: a function of yours"
    )
    field: str = Field("", description="spans: the array of segments; label, set, edit, semantic: the field compared; else unused")
    text: str = Field("text", description="spans: name of the text within a segment")
    label: str = Field("label", description="spans: name of the label within a segment")
    ignore: tuple[str, ...] | None = Field(
        None, description="spans, label: values that are no unit; null: none, where the schema has it; []: every label counts"
    )
    encoder: str = Field(
        "",
        description="semantic: folder of an encoder with its tokenizer, in the task's folder (docs/task.md)",
    )
    function: str = Field("", description="custom: module:function of (wanted, given); needs allow_task_code")
    least: float = Field(1.0, gt=0, le=1, description="semantic, custom: likeness (0..1) from which an answer is wholly right")

    @property
    def without(self) -> tuple[str, ...]:
        """Values that are no unit."""
        return NO_UNIT if self.ignore is None else self.ignore


CODE_KINDS = ("semantic", "custom")  # computed by code or an encoder of the task's folder, which a release does not have


def score_answer(config: ScoreConfig, expected: Any, given: Any, measure: Measure | None = None, query: str | None = None) -> Counts:
    """Counts for one row. No answer (None) is all units wanted and missed. `measure`: what semantic and custom name, loaded. Without
    `query` a text that repeats has no place."""
    if config.kind in CODE_KINDS:
        if measure is None:
            fix = "score where the task is loaded from its folder"
            raise ConfigError("this score is computed by code that is not loaded here", where="score.kind", value=config.kind, fix=fix)
        if config.kind == "semantic":
            expected, given = (answer and str(_plain(answer.get(config.field) or "")) for answer in (expected, given))
        return Counts(*measure.counts(expected, given, config.least))
    if config.kind == "edit":
        text, other = (str(_plain((answer or {}).get(config.field) or "")) for answer in (expected, given))
        return Counts(*edit_counts(text, other)) if given is not None else Counts(0, 0, max(1, len(text)))
    words = normalise(query) if query is not None and config.kind == "spans" else None
    want, got = Counter(_units(config, expected, words)), Counter(_units(config, given, words))
    hit = sum((want & got).values())
    return Counts(hit, sum(got.values()) - hit, sum(want.values()) - hit)


def check_score(config: ScoreConfig, outline: Mapping[str, Any], where: str) -> None:
    """ConfigError when a name in `config` is not in the answers. `outline`: an Outline's schema, see `schema`."""
    if config.kind == "custom" and ":" not in config.function:
        raise ConfigError("field score.function: not module:function", where=where, value=config.function, fix="name your function")
    if config.kind == "semantic" and not config.encoder:
        raise ConfigError("field score.encoder is required", where=where, fix="name the folder of a local encoder")
    if config.kind in ("exact", "custom"):
        return
    fields = answer_fields(outline)
    if config.field not in fields:
        _refuse("field", config.field, fields, where)
    if config.kind == "label":
        _check_ignored(config, fields[config.field], where)
        return
    if config.kind in _TYPES:
        if not any(part.get("type") == _TYPES[config.kind] for part in _options(fields[config.field])):
            fix = f"kind: {config.kind} compares a field of type {_TYPES[config.kind]}"
            raise ConfigError("field score.field: of another type in the answer schema", where=where, value=config.field, fix=fix)
        return
    lists = [part for part in _options(fields[config.field]) if part.get("type") == "array"]
    if not lists:
        fix = "kind: spans compares a list of objects; use kind: label for one value, or exact"
        raise ConfigError("field score.field: not a list in the answer schema", where=where, value=config.field, fix=fix)
    inner = {name: part for found in lists if found["items"] for name, part in answer_fields(found["items"]).items()}
    for name in ("text", "label"):
        if getattr(config, name) not in inner:
            _refuse(name, getattr(config, name), inner, where)
    _check_ignored(config, inner[config.label], where)


def _check_ignored(config: ScoreConfig, part: Mapping[str, Any], where: str) -> None:
    labels = [value for option in _options(part) for value in option.get("enum", [None])]
    for name in config.ignore or ():
        if name not in labels and None not in labels:
            _refuse("ignore", name, labels, where)


_TYPES = {"set": "array", "edit": "string", "semantic": "string"}
_SIZES = {"spans": "maxItems", "set": "maxItems", "edit": "maxLength"}  # what of the schema bounds the units of an answer


def most_units(config: ScoreConfig, outline: Mapping[str, Any]) -> int:
    """The most units that a row can have, wanted and given together. `outline`: an Outline's schema, which bounds lists and texts."""
    if config.kind not in _SIZES:
        return 2 if config.kind in ("label", "exact") else 200  # a likeness counts in hundredths
    name = _SIZES[config.kind]
    return 2 * max(1, *(int(part[name]) for part in _options(answer_fields(outline)[config.field]) if name in part))


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


def _units(config: ScoreConfig, answer: Any, query: str | None) -> list[str]:
    if not isinstance(answer, dict):
        return []
    if config.kind == "exact":
        return [canonical(answer, "answer")]
    value = answer.get(config.field)
    if config.kind == "label":
        return [] if value is None or value in config.without else [canonical(value, config.field)]
    listed = value if isinstance(value, list) else []
    if config.kind == "set":
        return sorted({canonical(_plain(each), config.field) for each in listed})
    segments = [segment for segment in listed if isinstance(segment, dict)]
    texts = [_plain(segment.get(config.text)) for segment in segments]
    places = _places(texts, query) if query is not None else [0] * len(texts)
    return [
        f"{segment.get(config.label)}\0{text}\0{place}"
        for segment, text, place in zip(segments, texts, places, strict=True)
        if segment.get(config.label) not in config.without
    ]


def _places(texts: list[Any], query: str) -> list[int]:
    """Of each text, the how-manieth time it stands in the query, counting from 0: the first time after the text before it."""
    places, after = [], 0
    for text in texts:
        starts = (
            [match.start() for match in re.finditer(rf"(?<!\w)(?={re.escape(text)}(?!\w))", query)]
            if isinstance(text, str) and text
            else []
        )
        at = next((number for number, start in enumerate(starts) if start >= after), 0)
        places.append(at)
        after = starts[at] + len(text) if starts else after
    return places


def _plain(text: Any) -> Any:
    """A span's text as queries are: people type `Thai Food` of the query `thai food`."""
    return normalise(text) if isinstance(text, str) else text
