"""An answer schema as a grammar can hold it: its outline, the longest answer, and the one text of an answer. Pure.

In: a JSON Schema. Out: an Outline, which is a smaller schema without references: each part is an enum, a bounded string, number or
array, a closed object, or anyOf of these. Every valid answer fits the outline; keywords that narrow it further are left to
validation and named in `notes`. A schema whose answers could grow without end is refused by the path of the part that could.
text.py defines the text of an answer. Knows nothing of engines or tasks.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any, NamedTuple
from urllib.parse import unquote

from headtail.core.errors import ConfigError
from headtail.core.schema.text import DECIMALS, longest_text

_LARGEST = 2**53 - 1  # of a number: some readers of JSON confuse larger whole numbers
_MOST_PARTS = 10_000
_MOST_CHARACTERS = 1_000_000  # of an answer: some 250,000 tokens, more than any model writes in one answer
_CHOICES = ("const", "enum", "$ref", "anyOf", "oneOf", "allOf", "type")  # the first of these that is bounded gives the outline
_KINDS = ("object", "array", "string", "number", "integer", "boolean", "null")
_BOUNDS = {
    *("minLength", "maxLength", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "items", "prefixItems"),
    *("minItems", "maxItems", "properties", "required", "additionalProperties", "minProperties", "maxProperties"),
}
_VALIDATED = {
    *("pattern", "multipleOf", "uniqueItems", "contains", "minContains", "maxContains", "propertyNames", "patternProperties"),
    *("dependentRequired", "dependentSchemas", "if", "then", "else", "not", "unevaluatedItems", "unevaluatedProperties"),
}
_SAID = {
    *("title", "description", "default", "examples", "$comment", "$schema", "$id", "$defs", "definitions", "deprecated"),
    *("readOnly", "writeOnly", "format", "discriminator", "contentEncoding", "contentMediaType"),
}
_KNOWN = {*_CHOICES, *_BOUNDS, *_VALIDATED, *_SAID}


class Outline(NamedTuple):
    """`schema`: what a grammar is made of; `longest`: characters of the longest answer, an escape is one; `notes`: what it lacks."""

    schema: dict[str, Any]
    longest: int
    notes: tuple[str, ...]


def close_objects(schema: Any) -> Any:
    """`schema` with `additionalProperties: false` where an object names its properties and says nothing of others."""
    if not isinstance(schema, Mapping):
        return schema
    copy = dict(schema)
    for group in ("properties", "$defs", "definitions"):
        if isinstance(copy.get(group), Mapping):
            copy[group] = {name: close_objects(child) for name, child in copy[group].items()}
    for group in ("prefixItems", "anyOf", "oneOf", "allOf"):
        if isinstance(copy.get(group), list):
            copy[group] = [close_objects(child) for child in copy[group]]
    if "items" in copy:
        copy["items"] = close_objects(copy["items"])
    says = {"additionalProperties", "patternProperties", "unevaluatedProperties"} & copy.keys()
    if "object" in _kinds(copy) and "properties" in copy and not says:
        copy["additionalProperties"] = False
    return copy


def outline(schema: Any, where: str = "task.yaml", path: str = "answer") -> Outline:
    """The outline of a schema. ConfigError names the part without bounds, or that no value can fit."""
    found = _Outliner(schema, where)
    part = found.part(schema, path)
    return Outline(part, longest_text(part), tuple(dict.fromkeys(found.notes)))


def resolve_reference(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part that a chain of $ref leads to; `schema` itself when it has none."""
    for _ in range(100):
        if "$ref" not in schema:
            break
        schema = resolve_pointer(str(schema["$ref"]), root)
    return schema


def resolve_pointer(ref: str, root: Any) -> Any:
    """The part of `root` that a $ref within it names; KeyError, IndexError, ValueError or TypeError when there is none."""
    node = root
    for step in ref.split("/")[1:]:
        name = unquote(step).replace("~1", "/").replace("~0", "~")
        node = node[int(name)] if isinstance(node, list) else node[name]
    return node


def _kinds(schema: Mapping[str, Any]) -> list[str]:
    kinds = schema.get("type", [])
    return [kinds] if isinstance(kinds, str) else list(kinds)


class _Outliner:
    """Makes the outline of one schema. `refs`: those being followed."""

    def __init__(self, root: Any, where: str) -> None:
        self.root, self.where = root, where
        self.notes: list[str] = []
        self._refs: tuple[str, ...] = ("#",)
        self._parts = 0

    def part(self, schema: Any, path: str) -> dict[str, Any]:
        self._parts += 1
        if self._parts > _MOST_PARTS:
            self._refuse(path, f"the schema has more than {_MOST_PARTS:,} parts, references followed", "make it smaller")
        if schema is False:
            self._refuse(path, "no value can stand here (false)", "leave the field out")
        if not isinstance(schema, Mapping) or not set(_CHOICES) & schema.keys():
            self._refuse(path, "nothing says which values may stand here, so an answer has no bound", "give it a type, an enum or a const")
        self._check_names(schema, path)
        refusal: ConfigError | None = None
        for name in (name for name in _CHOICES if name in schema):
            kept = len(self.notes)
            try:
                made = self._by(name, schema, path)
            except ConfigError as error:
                refusal = refusal or error
                del self.notes[kept:]
                continue
            self._note_unheld(name, schema, path)
            if (longest := longest_text(made)) > _MOST_CHARACTERS:
                what = f"the longest value has {longest:,} characters; no model writes more than {_MOST_CHARACTERS:,}"
                self._refuse(path, what, "lower maxLength and maxItems there to what an answer needs")
            return made
        assert refusal is not None  # there was a name, and it was refused
        raise refusal

    def _check_names(self, schema: Mapping[str, Any], path: str) -> None:
        for name in schema:
            if name not in _KNOWN and not str(name).startswith("x-"):
                near = difflib.get_close_matches(str(name), sorted(_KNOWN), n=1)
                hint = f"did you mean {near[0]}?" if near else "leave it out; docs/task.md lists the keywords that are read"
                self._refuse(path, f"the keyword {name} is not read here", hint)

    def _note_unheld(self, chosen: str, schema: Mapping[str, Any], path: str) -> None:
        unheld = [name for name in schema if name in _VALIDATED or (name in _CHOICES and name not in (chosen, "type"))]
        if chosen in ("const", "enum", "$ref", "anyOf", "oneOf", "allOf"):
            unheld += [name for name in schema if name in _BOUNDS]
        if unheld:
            self.notes.append(f"{path}: no grammar holds {', '.join(unheld)}; an answer that breaks it is `invalid`")
        if chosen == "oneOf":
            self.notes.append(f"{path}: the grammar holds oneOf as anyOf; an answer that fits two of its options is `invalid`")
        if "format" in schema:
            self.notes.append(f"{path}: format is held by neither the grammar nor validation; `pattern` is validated")

    def _by(self, name: str, schema: Mapping[str, Any], path: str) -> dict[str, Any]:
        if name in ("const", "enum"):
            return self._enum([schema["const"]] if name == "const" else schema["enum"], path)
        if name == "$ref":
            return self._reference(str(schema["$ref"]), path)
        if name == "type":
            return _any([self._of_kind(kind, schema, path) for kind in _kinds(schema)])
        options = schema[name]
        if name == "allOf" and len(options) > 1:
            self._refuse(path, "no grammar holds an allOf of several parts, so an answer has no bound", "write its parts as one")
        kind = schema.get("type")  # an option of scalars may leave it to the schema around it
        lent = {"type": kind} if kind in ("string", "number", "integer") else {}
        parts = [option if option is False or not isinstance(option, Mapping) else {**lent, **option} for option in options]
        made = [self.part(option, path) for option in parts if option is not False]
        return (
            _any(made) if made else self._refuse(path, f"no value can stand here: {name} has no option", "add one, or leave the field out")
        )

    def _reference(self, ref: str, path: str) -> dict[str, Any]:
        if ref in self._refs:
            self._refuse(
                path, f"$ref {ref} leads back to itself, so an answer can nest without end", "write out as many levels as are needed"
            )
        try:
            target = resolve_pointer(ref, self.root) if ref == "#" or ref.startswith("#/") else None
        except (KeyError, IndexError, ValueError, TypeError):
            target = None
        if target is None:
            self._refuse(path, f"$ref {ref} leads nowhere in this schema", "put what it names into the schema's own $defs")
        self._refs = (*self._refs, ref)
        try:
            return self.part(target, path)
        finally:
            self._refs = self._refs[:-1]

    def _enum(self, values: list[Any], path: str) -> dict[str, Any]:
        if not values:
            self._refuse(path, "an enum without values", "name its values, or leave the field out")
        kinds = {type(value) for value in values}
        odd = next((value for value in values if isinstance(value, bool | int | float)), None)
        if str in kinds and odd is not None:
            shown, kind = json.dumps(odd), "true or false" if isinstance(odd, bool) else "a number"
            self._refuse(
                path, f"an enum that mixes text with {shown}, which is {kind}", f'write "{shown}" in quotes if it is text; else use anyOf'
            )
        if str in kinds and None in values:
            self.notes.append(f'{path}: enum holds null, which is no value; the text would be "null" in quotes')
        for number in (value for value in _scalars(values) if isinstance(value, int | float) and not isinstance(value, bool)):
            if abs(number) > _LARGEST or round(number, DECIMALS) != number or repr(number) == "-0.0":
                self._refuse(path, f"{number} is beyond {_LARGEST}, has more than {DECIMALS} decimals or is -0.0", "write it as text")
        return {"enum": list(values)}

    def _of_kind(self, kind: str, schema: Mapping[str, Any], path: str) -> dict[str, Any]:
        if kind not in _KINDS:
            self._refuse(path, f"type {kind} is not known", f"take one of {', '.join(_KINDS)}")
        if kind == "object":
            return self._object(schema, path)
        if kind == "array":
            return self._array(schema, path)
        if kind in ("integer", "number"):
            return {"type": kind, **self._limits(kind, schema, path)}
        if kind == "string":
            if "maxLength" not in schema:
                self._refuse(path, "text needs maxLength, enum or const (pattern and format bound nothing)", "add maxLength")
            return {"type": kind, **self._sizes(schema, "minLength", "maxLength", path)}
        return {"type": kind}

    def _sizes(self, schema: Mapping[str, Any], least: str, most: str, path: str) -> dict[str, int]:
        sizes = {name: int(schema[name]) for name in (least, most) if name in schema}
        if max(sizes.values(), default=0) > _LARGEST:
            self._refuse(path, f"{least} or {most} is beyond {_LARGEST}", "lower it")
        if sizes.get(least, 0) > sizes.get(most, math.inf):
            self._refuse(
                path, f"no value can stand here: {least} {sizes[least]} is above {most} {sizes[most]}", f"raise {most} or lower {least}"
            )
        return sizes

    def _limits(self, kind: str, schema: Mapping[str, Any], path: str) -> dict[str, int | float]:
        """minimum and maximum, both of them values that can be written."""
        step = Decimal(1) if kind == "integer" else Decimal(1).scaleb(-DECIMALS)
        limits = {name: Decimal(repr(schema[name])) for name in _BOUNDS if name.lower().endswith(("minimum", "maximum")) and name in schema}
        low = [math.ceil(limits["minimum"] / step)] if "minimum" in limits else []
        low += [math.floor(limits["exclusiveMinimum"] / step) + 1] if "exclusiveMinimum" in limits else []
        high = [math.floor(limits["maximum"] / step)] if "maximum" in limits else []
        high += [math.ceil(limits["exclusiveMaximum"] / step) - 1] if "exclusiveMaximum" in limits else []
        if not low or not high:
            name = "an integer" if kind == "integer" else "a number"
            lacks = "minimum" if not low else "maximum"
            self._refuse(path, f"{name} needs minimum and maximum: without {lacks} its digits have no end", "add both, or use an enum")
        least, most = max(low) * step, min(high) * step
        if max(abs(least), abs(most)) > _LARGEST:
            self._refuse(path, f"a limit beyond {_LARGEST}", "take narrower limits, or text")
        if least > most:
            self._refuse(path, f"no {kind} lies between its limits", "widen them")
        return {"minimum": _number(least), "maximum": _number(most)}

    def _array(self, schema: Mapping[str, Any], path: str) -> dict[str, Any]:
        first, rest = schema.get("prefixItems", []), schema.get("items")
        most = schema.get("maxItems", len(first) if rest is False else None)
        if most is None:
            self._refuse(path, "a list needs maxItems", "add maxItems" + (", or items: false after prefixItems" if first else ""))
        if rest is None and most > len(first):
            self._refuse(path, "a list needs items: nothing says what may stand in it", "add items")
        array: dict[str, Any] = {"type": "array", **self._sizes({**schema, "maxItems": most}, "minItems", "maxItems", path)}
        array["maxItems"] = min(most, len(first)) if rest is False else most
        prefix = [self.part(item, f"{path}[{i}]") for i, item in enumerate(first[:most])]
        array |= {"prefixItems": prefix} if prefix else {}
        array["items"] = self.part(rest, f"{path}[]") if array["maxItems"] > len(prefix) else False
        return array

    def _object(self, schema: Mapping[str, Any], path: str) -> dict[str, Any]:
        if "patternProperties" in schema:
            self._refuse(path, "patternProperties lets an object have any number of fields", "name the fields in `properties`")
        others = schema.get("additionalProperties", schema.get("unevaluatedProperties", False))
        if others is not False:
            self._refuse(
                path,
                "an object may hold fields that the schema does not name",
                "set additionalProperties: false, name them in `properties`",
            )
        if "properties" not in schema and "additionalProperties" not in schema:
            self._refuse(path, "an object needs `properties`: nothing says what it holds", "name its fields in `properties`")
        fields = {name: child for name, child in schema.get("properties", {}).items() if child is not False}
        required = [name for name in fields if name in schema.get("required", ())]
        if missing := [name for name in schema.get("required", ()) if name not in fields]:
            self._refuse(path, f"required names {missing[0]}, which is not in `properties`: no answer would be valid", "add it or drop it")
        properties = {name: self.part(child, f"{path}.{name}") for name, child in fields.items()}
        counts = self._sizes(schema, "minProperties", "maxProperties", path)
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False, **counts}

    def _refuse(self, path: str, what: str, fix: str) -> Any:
        raise ConfigError(f"field {path}: {what}", where=self.where, fix=fix)


def _any(options: list[dict[str, Any]]) -> dict[str, Any]:
    return options[0] if len(options) == 1 else {"anyOf": options}


def _scalars(value: Any) -> Iterator[Any]:
    if isinstance(value, list | Mapping):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _scalars(item)
    else:
        yield value


def _number(value: Decimal) -> int | float:
    return int(value) if value == int(value) else float(value)
