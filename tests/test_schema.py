"""Answer schemas against xgrammar itself: what is taught its grammar accepts, and what it accepts has an end, which is known."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from headtail.core.errors import ConfigError
from headtail.core.schema import close_objects, outline, resolve_reference, writer
from headtail.engines.grammar import engine_schema, schema_grammar

WIDE = 10**6  # max_tokens that leave every bound in the grammar


def obj(fields: dict[str, Any], required: list[str] | None = None, **more: Any) -> dict[str, Any]:
    names = list(fields) if required is None else required
    return {"type": "object", "properties": fields, "required": names, "additionalProperties": False, **more}


def accepts(schema: Any, text: str) -> bool:
    import xgrammar
    from xgrammar.testing import _is_grammar_accept_string

    made = xgrammar.Grammar.from_json_schema(json.dumps(schema, ensure_ascii=False), any_whitespace=False)
    read = xgrammar.Grammar.from_ebnf(schema_grammar(schema, "here"))  # what an engine is told
    accepted = bool(_is_grammar_accept_string(made, text))
    assert bool(_is_grammar_accept_string(read, text)) == accepted
    return accepted


# --- random schemas, each with random answers

_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
_PLAIN = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters='"\\'), max_size=5)
_NAMES = st.one_of(st.sampled_from(["z", "a", "m"]), _TEXT)
_NUMBERS = st.one_of(st.integers(-(10**9), 10**9), st.integers(-(10**9), 10**9).map(lambda n: round(n / 10**6, 6)).filter(lambda x: x != 0))


def _ordered(low: Any, high: Any) -> tuple[Any, Any]:
    return (low, high) if low <= high else (high, low)


_ENUMS = st.one_of(
    st.lists(st.one_of(_TEXT, st.none()), min_size=1, max_size=4),
    st.lists(st.one_of(_NUMBERS, st.booleans(), st.none()), min_size=1, max_size=4),
    st.lists(
        st.recursive(_TEXT | _NUMBERS, lambda x: st.lists(x, max_size=2) | st.dictionaries(_NAMES, x, max_size=3), max_leaves=4), min_size=1
    ).filter(lambda values: all(isinstance(value, list | dict) for value in values)),
).map(lambda values: {"enum": values})
_INTEGERS = st.tuples(st.integers(-(2**40), 2**40), st.integers(0, 2**40), st.sampled_from(["m", "exclusiveM"])).map(
    lambda t: {"type": "integer", t[2] + "inimum": t[0], "maximum": t[0] + t[1] + 1}
)
_DECIMALS = st.tuples(_NUMBERS, _NUMBERS).map(lambda t: {"type": "number", "minimum": min(t), "maximum": max(t)})
_STRINGS = st.tuples(st.integers(0, 2), st.integers(2, 6)).map(lambda t: {"type": "string", "minLength": t[0], "maxLength": t[1]})
_LISTED = st.sampled_from([["string", "null"], ["integer", "string"], ["boolean", "null", "number"]]).map(
    lambda kinds: {"type": kinds, "maxLength": 4, "minimum": -2, "maximum": 12}
)
_LEAVES = st.one_of(
    _ENUMS, _INTEGERS, _DECIMALS, _STRINGS, _LISTED, st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"const": "k"}])
)


@st.composite
def _objects(draw: st.DrawFn, inner: st.SearchStrategy[Any]) -> dict[str, Any]:
    fields = draw(st.dictionaries(_NAMES, inner, max_size=4))
    order = draw(st.permutations(list(fields)))
    required = [name for name in order if draw(st.booleans())]
    made = {"type": "object", "properties": {name: fields[name] for name in order}, "required": required}
    return made | draw(st.sampled_from([{}, {"additionalProperties": False}]))


def _grown(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    options = st.lists(inner, min_size=1, max_size=3)
    return st.one_of(
        _objects(inner),
        _objects(inner),
        st.builds(lambda items, most: {"type": "array", "items": items, "maxItems": most}, inner, st.integers(0, 3)),
        st.builds(lambda first, rest: {"type": "array", "prefixItems": first, "items": rest, "maxItems": 3}, options, inner),
        st.builds(lambda first: {"type": "array", "prefixItems": first, "items": False}, options),
        options.map(lambda parts: {"anyOf": parts}),
        options.map(lambda parts: {"oneOf": parts}),
        inner.map(lambda part: {"allOf": [part], "description": "as pydantic writes it"}),
        st.just({"$ref": "#/$defs/a~1b%20~0%25"}),
    )


_SCHEMAS = st.builds(
    lambda fields, shared: {**fields, "$defs": {"a/b ~%": shared}}, _objects(st.recursive(_LEAVES, _grown, max_leaves=6)), _objects(_LEAVES)
)


def _answer(draw: st.DrawFn, schema: Any, root: Any, text: st.SearchStrategy[str]) -> Any:
    schema = resolve_reference(schema, root)
    for name in ("enum", "anyOf", "oneOf", "allOf"):
        if name in schema:
            chosen = draw(st.sampled_from(schema[name]))
            return chosen if name == "enum" else _answer(draw, chosen, root, text)
    if "const" in schema:
        return schema["const"]
    kind = schema["type"] if isinstance(schema["type"], str) else draw(st.sampled_from(schema["type"]))
    if kind == "object":
        fields = schema["properties"].items()
        names = [name for name, _ in fields if name in schema["required"] or draw(st.booleans())]
        return {name: _answer(draw, schema["properties"][name], root, text) for name in draw(st.permutations(names))}
    if kind == "array":
        first = [_answer(draw, item, root, text) for item in schema.get("prefixItems", [])]
        more = draw(st.integers(0, schema["maxItems"] - len(first))) if schema["items"] is not False else 0
        return [*first, *(_answer(draw, schema["items"], root, text) for _ in range(more))]
    if kind == "string":
        return draw(text.filter(lambda t: schema.get("minLength", 0) <= len(t) <= schema["maxLength"]))
    if kind == "number":
        return draw(
            st.one_of(_NUMBERS, st.just(schema["minimum"]), st.just(float(schema["maximum"]))).filter(
                lambda x: schema["minimum"] <= x <= schema["maximum"]
            )
        )
    if kind == "integer":
        low = schema.get("minimum", schema.get("exclusiveMinimum", 0) + 1)
        return draw(st.integers(low, schema["maximum"]).flatmap(lambda n: st.sampled_from([n, float(n)])))
    return draw(st.booleans()) if kind == "boolean" else None


@st.composite
def _cases(draw: st.DrawFn) -> tuple[dict[str, Any], Any, int]:
    schema = draw(_SCHEMAS)
    most = draw(st.sampled_from([1, WIDE]))  # 1: no text has a bound in the grammar, and any character may be escaped
    return schema, _answer(draw, schema, schema, _PLAIN if most == WIDE else _TEXT), most


@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(_cases())
def test_what_is_taught_the_grammar_accepts(case: tuple[dict[str, Any], Any, int]) -> None:
    schema, answer, most = close_objects(case[0]), case[1], case[2]
    assume(jsonschema_rs.Draft202012Validator(schema).is_valid(answer))  # oneOf may fit twice
    found = outline(schema)
    text = writer(found.schema)(answer)
    assert json.loads(text) == answer
    assert accepts(engine_schema(schema, most), text), (text, engine_schema(schema, most))
    if most == WIDE:
        assert len(text) - text.count("\\") <= found.longest


# --- the longest text of a grammar, from xgrammar's own EBNF

_TOKEN = re.compile(r'\s*("(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|\{\d+, -?\d+\}|[\w.]+|::=|[|()*+?]|\(=)')


def longest(schema: Any) -> float:
    """Characters of the longest text that a grammar accepts; infinite when it has no end."""
    from xgrammar.testing import _json_schema_to_ebnf

    rules = dict(
        line.split(" ::= ", 1) for line in _json_schema_to_ebnf(json.dumps(schema, ensure_ascii=False), any_whitespace=False).splitlines()
    )
    known: dict[str, float] = {}

    def of(name: str) -> float:
        if name not in known:
            known[name] = float("inf")  # until it is known: a rule that leads back to itself has no end
            known[name] = _Body(_TOKEN.findall(rules[name].split(" (=")[0]), of).options()
        return known[name]

    return of("root")


class _Body:
    def __init__(self, tokens: list[str], of: Any) -> None:
        self.tokens, self.of, self.at = tokens, of, 0

    def options(self) -> float:
        best = self.sequence()
        while self.at < len(self.tokens) and self.tokens[self.at] == "|":
            self.at += 1
            best = max(best, self.sequence())
        return best

    def sequence(self) -> float:
        total = 0.0
        while self.at < len(self.tokens) and self.tokens[self.at] not in "|)":
            size = self.one()
            after = self.tokens[self.at] if self.at < len(self.tokens) else ""
            if after in ("*", "+"):
                size, self.at = float("inf"), self.at + 1
            elif after.startswith("{"):
                most = int(after[1:-1].split(", ")[1])
                size, self.at = (float("inf") if most < 0 else size * most if most else 0.0), self.at + 1
            total += size
        return total

    def one(self) -> float:
        token = self.tokens[self.at]
        self.at += 1
        if token == "(":
            size = self.options()
            self.at += 1
            return size
        if token.startswith('"'):
            return len(re.sub(r"\\(x[0-9a-f]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|.)", "c", token[1:-1]))
        return 1 if token.startswith("[") else float(self.of(token))


@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(_SCHEMAS)
def test_the_longest_answer_is_the_longest_that_the_grammar_accepts(schema: dict[str, Any]) -> None:
    found, by_grammar = outline(schema).longest, longest(engine_schema(schema, WIDE))
    decimals = '"number"' in json.dumps(schema)
    assert by_grammar <= found if decimals else by_grammar == found


# --- what has no end, or cannot be

STRING = {"type": "string"}
A = {"enum": ["a"]}


@pytest.mark.parametrize(
    "part, said",
    [
        (STRING, "answer.m: text needs maxLength"),
        ({"type": "string", "format": "email"}, "answer.m: text needs maxLength"),
        ({"type": "string", "pattern": "^a*$"}, "answer.m: text needs maxLength"),
        ({"type": "string", "minLength": 3}, "answer.m: text needs maxLength"),
        ({"type": ["string", "null"]}, "answer.m: text needs maxLength"),
        ({"type": ["array", "null"], "items": A}, "answer.m: a list needs maxItems"),
        ({"type": ["object", "null"]}, "answer.m: an object needs `properties`"),
        ({}, "answer.m: nothing says which values"),
        (True, "answer.m: nothing says which values"),
        ({"description": "anything"}, "answer.m: nothing says which values"),
        ({"type": "string", "maxLength": 10_000_000_000}, r"answer.m: the longest value has 10,000,000,002 characters"),
        ({"type": "array", "maxItems": 10**9, "items": {"type": "string", "maxLength": 100}}, "answer.m: the longest value has 104,"),
        (obj({name: {"type": "string", "maxLength": 600_000} for name in "xy"}), "answer.m: the longest value has 1,200,0"),
        ({"maxLength": 4}, "answer.m: nothing says which values"),
        ({"not": A}, "answer.m: nothing says which values"),
        ({"if": A, "then": A}, "answer.m: nothing says which values"),
        ({"type": "integer"}, "answer.m: an integer needs minimum and maximum"),
        ({"type": "integer", "minimum": 0}, "without maximum"),
        ({"type": "number", "exclusiveMaximum": 0}, "without minimum"),
        ({"type": ["integer", "null"], "multipleOf": 2}, "answer.m: an integer needs"),
        ({"type": "integer", "minimum": 0, "maximum": 2**53}, "answer.m: a limit beyond"),
        ({"type": "integer", "exclusiveMinimum": 1, "exclusiveMaximum": 2}, "answer.m: no integer lies between"),
        ({"type": "number", "minimum": 0.1234567, "maximum": 0.1234569}, "answer.m: no number lies between"),
        ({"type": "object"}, "answer.m: an object needs `properties`"),
        ({"type": "object", "properties": {}, "additionalProperties": True}, "answer.m: an object may hold fields"),
        ({"type": "object", "properties": {}, "additionalProperties": STRING}, "answer.m: an object may hold fields"),
        ({"type": "object", "properties": {}, "unevaluatedProperties": A}, "answer.m: an object may hold fields"),
        ({"type": "object", "propertyNames": A, "additionalProperties": A}, "answer.m: an object may hold fields"),
        (obj({}, patternProperties={"^a": A}), "answer.m: patternProperties"),
        (obj({"x": {"type": "string"}}), "answer.m.x: text needs maxLength"),
        (obj({"x": A}, ["x", "y"]), "answer.m: required names y"),
        ({"type": "array", "items": A}, "answer.m: a list needs maxItems"),
        ({"type": "array", "items": A, "maxItems": 10**20}, "answer.m: minItems or maxItems is beyond"),
        ({"type": "array", "maxItems": 3}, "answer.m: a list needs items"),
        ({"type": "array", "maxItems": 3, "items": STRING}, r"answer.m\[\]: text needs maxLength"),
        ({"type": "array", "prefixItems": [A]}, "answer.m: a list needs maxItems"),
        ({"type": "array", "prefixItems": [A], "maxItems": 2}, "answer.m: a list needs items"),
        ({"type": "array", "prefixItems": [A, STRING], "items": False}, r"answer.m\[1\]: text needs maxLength"),
        ({"type": "array", "items": A, "minItems": 3, "maxItems": 2}, "answer.m: no value can stand here: minItems 3"),
        ({"anyOf": [A, STRING]}, "answer.m: text needs maxLength"),
        ({"oneOf": [{"type": "null"}, {"type": "integer"}]}, "answer.m: an integer needs"),
        ({"allOf": [STRING]}, "answer.m: text needs maxLength"),
        ({"allOf": [{"type": "string"}, {"maxLength": 3}]}, "answer.m: no grammar holds an allOf of several parts"),
        ({"anyOf": [False]}, "answer.m: no value can stand here"),
        ({"$ref": "#/$defs/text"}, "answer.m: text needs maxLength"),
        ({"$ref": "#"}, r"answer.m: \$ref # leads back to itself"),
        ({"anyOf": [{"type": "null"}, {"$ref": "#/$defs/tree"}]}, r"answer.m.kid: \$ref #/\$defs/tree leads back to itself"),
        ({"$ref": "#/$defs/nowhere"}, r"answer.m: \$ref #/\$defs/nowhere leads nowhere"),
        ({"$ref": "https://example.org/x"}, r"answer.m: \$ref https://example.org/x leads nowhere"),
        ({"$dynamicRef": "#x", **A}, r"answer.m: the keyword \$dynamicRef is not read here"),
        ({"type": "string", "maxlength": 5}, "answer.m: the keyword maxlength is not read here.*\n.*\n.*did you mean maxLength"),
        ({"enum": []}, "answer.m: an enum without values"),
        ({"enum": ["yes", True]}, 'answer.m: an enum that mixes text with true.*\n.*\n.*write "true" in quotes'),
        ({"enum": ["unknown", 404]}, "answer.m: an enum that mixes text with 404, which is a number"),
        ({"enum": [1e-7]}, "answer.m: 1e-07 is beyond"),
        ({"const": [2**60]}, "answer.m: 1152921504606846976 is beyond"),
    ],
)
def test_what_has_no_end_is_refused_by_its_path(part: Any, said: str) -> None:
    tree = {"type": "object", "properties": {"kid": {"$ref": "#/$defs/tree"}}}
    with pytest.raises(ConfigError, match=said) as error:
        outline({**obj({"m": part}), "$defs": {"text": STRING, "tree": tree}})
    assert error.value.fix


def test_many_parts_are_refused_before_they_are_built() -> None:
    defs: dict[str, Any] = {"d0": {"enum": ["x"]}}
    for i in range(1, 40):
        defs[f"d{i}"] = obj({"a": {"$ref": f"#/$defs/d{i - 1}"}, "b": {"$ref": f"#/$defs/d{i - 1}"}})
    with pytest.raises(ConfigError, match="more than 10,000 parts"):
        outline({"$ref": "#/$defs/d39", "$defs": defs})


@pytest.mark.parametrize(
    "part, said",
    [
        ({"type": "string", "maxLength": 5, "pattern": "^a"}, "no grammar holds pattern"),
        ({"type": "string", "maxLength": 30, "format": "email"}, "format is held by neither"),
        ({"type": "integer", "minimum": 0, "maximum": 9, "multipleOf": 3}, "no grammar holds multipleOf"),
        ({"type": "array", "items": A, "maxItems": 2, "uniqueItems": True, "contains": A}, "no grammar holds uniqueItems, contains"),
        (obj({"x": A}, dependentRequired={"x": []}), "no grammar holds dependentRequired"),
        ({**A, "not": {"enum": ["b"]}}, "no grammar holds not"),
        (obj({"x": A, "y": A}, [], anyOf=[{"required": ["x"]}, {"required": ["y"]}]), "no grammar holds anyOf"),
        ({"$ref": "#/properties/n", "maxLength": 2}, "no grammar holds maxLength"),
        ({"oneOf": [A, {"enum": ["b"]}]}, "the grammar holds oneOf as anyOf"),
        ({"enum": ["a", None]}, "enum holds null"),
    ],
)
def test_what_only_validation_holds_is_noted_and_kept_from_the_grammar(part: Any, said: str) -> None:
    found = outline(obj({"m": part, "n": A}))
    assert [note for note in found.notes if note.startswith("answer.m: ") and said in note]
    assert longest(found.schema) == found.longest


def test_a_plain_schema_is_its_own_shape_and_has_no_notes() -> None:
    schema = obj({"s": {"type": "array", "maxItems": 2, "items": obj({"t": {"type": "string", "maxLength": 9}, "l": A})}})
    assert outline(schema).schema == schema
    assert outline(schema).notes == ()
    assert outline(schema).longest == len('{"s": [{"t": "123456789", "l": "a"}, {"t": "123456789", "l": "a"}]}')


def test_objects_that_say_nothing_of_other_fields_are_closed() -> None:
    open_, said = {"type": "object", "properties": {"x": A}}, {"type": "object", "properties": {}, "additionalProperties": True}
    schema = {"anyOf": [open_, said], "$defs": {"p": {"type": ["object", "null"], "properties": {"q": open_}}}, "not": open_}
    shut = {**open_, "additionalProperties": False}
    wanted = {"type": ["object", "null"], "properties": {"q": shut}, "additionalProperties": False}
    assert close_objects(schema) == {"anyOf": [shut, said], "$defs": {"p": wanted}, "not": open_}
