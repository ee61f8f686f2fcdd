"""An answer's text: the one that a grammar accepts, its longest form, and whether a value is valid. Pure.

In: a part of an Outline's schema. Out: `writer` makes the text that xgrammar's grammar of it accepts, `longest_text` counts the
characters of the longest, `validator` says whether a value is valid. Knows nothing of engines or tasks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from typing import Any

import jsonschema_rs

Write = Callable[[Any], str]


DECIMALS = 6  # of a number: xgrammar writes no more, and no exponent


def validator(schema: Any) -> jsonschema_rs.Draft202012Validator:
    """What says whether an answer is valid. It fetches nothing: a $ref to another file or host is a ReferencingError."""
    return jsonschema_rs.Draft202012Validator(schema, retriever=_fetch_nothing)


def _fetch_nothing(uri: str) -> Any:
    raise ValueError(f"{uri} is outside of this schema")


def longest_text(part: Mapping[str, Any]) -> int:
    """Characters of the longest text that `writer(part)` makes, each character of a text counted as one."""
    if "enum" in part:
        return max(len(_compact(value)) for value in part["enum"])
    if "anyOf" in part:
        return max(longest_text(option) for option in part["anyOf"])
    kind: str = part["type"]
    if kind == "string":
        return int(part["maxLength"]) + 2
    if kind in ("integer", "number"):
        more = DECIMALS + 1 if kind == "number" else 0
        limits: list[float] = [part["minimum"], part["maximum"]]
        return more + max(len(str(int(abs(limit)))) + (limit < 0) for limit in limits)
    if kind == "array":
        items = [longest_text(item) for item in part.get("prefixItems", [])]
        others = int(part["maxItems"]) - len(items)
        return sum(items) + (others * longest_text(part["items"]) if others > 0 else 0) + 2 * max(1, int(part["maxItems"]))
    if kind == "object":
        fields = sorted((len(_text(name)) + 2 + longest_text(child) for name, child in part["properties"].items()), reverse=True)
        fields = fields[: part.get("maxProperties")]
        return sum(fields) + 2 * max(1, len(fields))
    return 5 if kind == "boolean" else 4


def text_bounds(part: Mapping[str, Any]) -> Iterator[int]:
    """maxLength of each string in an Outline's schema."""
    if part.get("type") == "string":
        yield part["maxLength"]
    inner = [*part.get("properties", {}).values(), *part.get("anyOf", []), *part.get("prefixItems", []), part.get("items")]
    for child in filter(None, inner):
        yield from text_bounds(child)


def writer(part: Mapping[str, Any]) -> Write:
    """From an answer that fits `part`, an Outline's schema, to the text that the grammar accepts: fields in the schema's order."""
    if "enum" in part:
        texts = {_identity(value): _compact(value) for value in part["enum"]}
        return lambda value: texts[_identity(value)]
    if "anyOf" in part:
        return _first([(fit_check(option), writer(option)) for option in part["anyOf"]])
    if part["type"] == "array":
        first = [writer(item) for item in part.get("prefixItems", [])]
        rest = writer(part["items"]) if part["items"] is not False else None
        return lambda value: "[" + ", ".join((first[i] if i < len(first) else rest)(item) for i, item in enumerate(value)) + "]"  # type: ignore[misc]
    if part["type"] == "object":
        fields = [(name, _text(name), writer(child)) for name, child in part["properties"].items()]
        return lambda value: "{" + ", ".join(f"{text}: {write(value[name])}" for name, text, write in fields if name in value) + "}"
    if part["type"] in ("integer", "number"):
        return lambda value: str(int(value)) if value == int(value) else format(Decimal(repr(value)), "f")
    return lambda value: json.dumps(value, ensure_ascii=False)


def fit_check(part: Mapping[str, Any]) -> Callable[[Any], bool]:
    """Whether a value fits `part`."""
    return validator(part).is_valid


def _first(options: list[tuple[Callable[[Any], bool], Write]]) -> Write:
    def write(value: Any) -> str:
        return next(write for fit, write in options if fit(value))(value)

    return write


def _identity(value: Any) -> str:
    """A text that two values share when they are equal under JSON Schema, for which 1 is 1.0 and true is not 1."""
    return _compact(value, lambda fields: sorted(fields, key=lambda field: str(field[0])))


def _compact(value: Any, order: Callable[[Any], Any] = list) -> str:
    """A value of an enum as xgrammar writes it: without blanks, floats with 17 digits."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_text(name)}:{_compact(item, order)}" for name, item in order(value.items())) + "}"
    if isinstance(value, list):
        return "[" + ",".join(_compact(item, order) for item in value) + "]"
    if isinstance(value, float):
        return f"{value + 0.0:.17g}"  # -0.0 is 0
    return _text(value)


def _text(value: Any) -> str:
    """A name or scalar of the schema as xgrammar writes it."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
