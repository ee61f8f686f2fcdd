"""From a JSON Schema to the nodes of its code, or a refusal that names the place.

In: a schema and what follows a part. Out: a Node that can write every value that is valid under the schema. It may also write
others too: keywords that only narrow (patterns, bounds of numbers, `not`) are left to validation. A schema that also allows values that
have no compact text (unknown properties, items of any kind, recursion) is refused. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any, NamedTuple

from headtail.core.compact.nodes import END, STOP, Choice, Const, List, Node, Nothing, Number, Object, Text
from headtail.core.compact.streams import json_identity
from headtail.core.errors import ConfigError
from headtail.core.schema import resolve_pointer

ALPHABET = "|~^=<>{}[]_;*@#%$+()!?:,"  # of a choice's options, in this order: first what people seldom type
_LETTERS = "abcdefghijklmnopqrstuvwxyz"  # of choices with more options than there are symbols
_MOST = 10_000  # parts of a schema; options of a choice
_FIX = "write it with plain types, `properties` and `additionalProperties: false`, or keep answer: json"
_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")


class Place(NamedTuple):
    """What a part of a text may rely on. `follow`: a symbol or the end comes after it; `last`: the end does."""

    follow: bool
    last: bool


class Builder:
    """Makes nodes and remembers which symbols they use."""

    def __init__(self, root: Mapping[str, Any], where: str) -> None:
        self.root, self.where = root, where
        self.used: set[str] = set()
        self._refs: tuple[str, ...] = ()
        self._parts = 0

    def node(self, schema: Any, path: str, place: Place) -> Node:
        """The node of `schema`: of its keywords that say what a value is, the first that can be written."""
        self._parts += 1
        if self._parts > _MOST:
            raise self._refusal("the schema has too many parts", path)
        if not isinstance(schema, Mapping) or not schema:
            raise self._refusal("a value may be anything here", path)
        refusal: ConfigError | None = None
        for name in ("const", "enum", "type", "$ref", "anyOf", "oneOf", "allOf"):
            if name not in schema:
                continue
            try:
                return self._by(name, schema, path, place)
            except ConfigError as error:
                refusal = refusal or error
        raise refusal or self._refusal("nothing says which values may stand here", path)

    def _by(self, name: str, schema: Mapping[str, Any], path: str, place: Place) -> Node:
        if name in ("const", "enum"):
            values = [schema["const"]] if name == "const" else schema["enum"]
            return self._choice([Const(value=value) for value in _spellings(values)], path)
        if name == "type":
            kinds = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
            return self._choice([self._of_type(kind, schema, path, place) for kind in kinds], path)
        if name == "$ref":
            return self._reference_node(str(schema["$ref"]), path, place)
        options = [{"type": schema["type"], **option} if _lends_type(schema, option) else option for option in schema[name]]
        if name != "allOf":
            return self._choice([self.node(option, path, place) for option in options if option is not False], path)
        refusal: ConfigError | None = None
        for option in options:  # a value fits all of them: one that can be written is enough
            try:
                return self.node(option, path, place)
            except ConfigError as error:
                refusal = refusal or error
        raise refusal or self._refusal("an empty allOf", path)

    def _reference_node(self, ref: str, path: str, place: Place) -> Node:
        if ref in self._refs:
            raise self._refusal(f"{ref} leads back to itself", path)
        if not (ref == "#" or ref.startswith("#/")) or any("$id" in part for part in _inner(self.root)):
            raise self._refusal(f"{ref} is not looked up: only #/... within a schema without $id", path)
        self._refs = (*self._refs, ref)
        try:
            return self.node(resolve_pointer(ref, self.root), path, place)
        finally:
            self._refs = self._refs[:-1]

    def _of_type(self, kind: str, schema: Mapping[str, Any], path: str, place: Place) -> Node:
        if kind == "object":
            return self._object(schema, path, place)
        if kind == "array":
            return self._list(schema, path, place)
        if kind == "boolean":
            return self._choice([Const(value=False), Const(value=True)], path)
        if kind == "null":
            return Const()
        stop = not place.follow
        self.used |= {STOP} if stop else set()
        if kind == "string":
            least, most = int(schema.get("minLength", 0)), _whole(schema.get("maxLength"))
            return Text(not stop, False, stop=stop, least=least, most=most)
        if kind in ("number", "integer"):
            return Number(False, False, stop=stop, whole=kind == "integer")
        raise self._refusal(f"type {kind} is none of {', '.join(_TYPES)}", path)

    def _choice(self, options: list[Node], path: str) -> Node:
        """One of `options`; a choice among them gives its own options instead of itself."""
        flat = [inner for option in options for inner in (option.options if isinstance(option, Choice) else (option,))]
        if not flat:
            raise self._refusal("no value can stand here", path)
        if len(flat) > _MOST:
            raise self._refusal(f"{len(flat)} options are too many", path)
        if len(flat) == 1:
            return flat[0]
        if len(flat) <= len(ALPHABET):
            self.used |= set(ALPHABET[: len(flat)])
            return Choice(False, True, options=tuple(flat), symbols=tuple(ALPHABET[: len(flat)]))
        width = next(w for w in range(1, 9) if len(_LETTERS) ** w >= len(flat))
        words = ("".join(letters) for letters in product(_LETTERS, repeat=width))
        return Choice(False, False, options=tuple(flat), symbols=tuple(next(words) for _ in flat))

    def _list(self, schema: Mapping[str, Any], path: str, place: Place) -> Node:
        if "prefixItems" in schema or "items" not in schema:
            raise self._refusal("a list needs `items`, and no prefixItems", path)
        if schema["items"] is False:
            return Const(value=[])
        within, end = f"{path}[]", not place.last
        # After an item comes the next one, END, or the text's end. How an item begins does not hang on what follows it.
        item = self.node(schema["items"], within, Place(True, False))
        item = self.node(schema["items"], within, Place(item.marked, False))
        lead = ALPHABET[0] if item.empty or (end and item.ends) else ""  # or one item would look like none
        if lead:
            item = self.node(schema["items"], within, Place(True, False))
        self.used |= ({lead} if lead else set()) | ({END} if end else set())
        least, most = int(schema.get("minItems", 0)), _whole(schema.get("maxItems"))
        marked = bool(lead) or item.marked
        return List(not end, marked, end or (not lead and item.ends), item=item, end=end, lead=lead, least=least, most=most)

    def _object(self, schema: Mapping[str, Any], path: str, place: Place) -> Node:
        if schema.get("additionalProperties") is not False or schema.get("patternProperties"):
            raise self._refusal("an object may hold properties that the schema does not name", path)
        made: list[tuple[str, Node, bool]] = []
        required = schema.get("required", ())
        for name, inner in reversed(list(schema.get("properties", {}).items())):  # from the end: what follows decides
            node, optional = self._property(inner, name in required, f"{path}.{name}", place)
            made.insert(0, (name, node, optional))
            place = Place(node.marked and (place.follow or not node.empty), place.last and _always_nothing(node))
        return _sequence(made)

    def _property(self, schema: Any, required: bool, path: str, place: Place) -> tuple[Node, bool]:
        if schema is False:
            return Nothing(), True
        node = self.node(schema, path, place)
        return (node, False) if required else (self._choice([Nothing(), node], path), True)

    def _refusal(self, what: str, path: str) -> ConfigError:
        return ConfigError(f"field {path}: its answers have no compact format: {what}", where=self.where, fix=_FIX)


def _sequence(properties: list[tuple[str, Node, bool]]) -> Object:
    empty, marked, ends = True, True, False
    for _, node, _ in properties:
        if empty:
            marked, ends = marked and node.marked, ends or node.ends
        empty = empty and node.empty
    return Object(empty, marked, ends, properties=tuple(properties))


def _always_nothing(node: Node) -> bool:
    if isinstance(node, Object):
        return all(_always_nothing(inner) for _, inner, _ in node.properties)
    return isinstance(node, Const | Nothing)


def _lends_type(schema: Mapping[str, Any], option: Any) -> bool:
    return "type" in schema and isinstance(option, Mapping) and "type" not in option


def _whole(bound: Any) -> int | None:
    return None if bound is None else int(bound)


def _inner(schema: Any) -> Iterator[Mapping[str, Any]]:
    """All mappings within a schema, itself left out."""
    for child in schema.values() if isinstance(schema, Mapping) else schema if isinstance(schema, list) else ():
        if isinstance(child, Mapping):
            yield child
        yield from _inner(child)


def _spellings(values: list[Any]) -> list[Any]:
    """`values` and all that equals one of them under JSON Schema, for which 1 is 1.0; each once, those as given first."""
    distinct = {json_identity(value): value for value in values}
    for value in values:
        for other in _equals(value):
            distinct.setdefault(json_identity(other), other)
            if len(distinct) > _MOST:
                return list(distinct.values())
    return list(distinct.values())


def _equals(value: Any) -> Iterator[Any]:
    if isinstance(value, bool) or value is None or isinstance(value, str):
        yield value
    elif isinstance(value, int | float):
        yield value
        if value == int(value):
            yield int(value)
            if abs(value) < 1e300 and float(value) == value:
                yield float(value)
        if value == 0:
            yield -0.0
    elif isinstance(value, list):
        yield from (list(parts) for parts in product(*(list(_equals(part)) for part in value)))
    else:
        names = list(value)
        yield from (dict(zip(names, parts, strict=True)) for parts in product(*(list(_equals(value[name])) for name in names)))
