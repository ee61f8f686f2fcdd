"""Compact format: exact for every valid answer of every schema it takes, and the grammar is neither wider nor narrower."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from headtail.core.compact import ALPHABET, Codec, CompactError
from headtail.core.errors import ConfigError, InputError
from headtail.core.task import Task

Pair = tuple[dict[str, Any], st.SearchStrategy[Any]]  # a schema, and values that are mostly valid under it

_CHARS = st.one_of(st.sampled_from(ALPHABET + "`&/\\\n\t\"' ab1-.eE0"), st.characters(exclude_categories=["Cs"]))
_SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-3, 3), st.sampled_from([0.0, 1.0, 2.5, -0.0]), st.text("ab|\\", max_size=2))


def plain(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _texts(least: int, most: int) -> Pair:
    return {"type": "string", "minLength": least, "maxLength": most}, st.text(_CHARS, min_size=least, max_size=most)


def _enum(values: list[Any]) -> Pair:
    equal = [other for value in values for other in ([value, float(value)] if type(value) is int else [value])]
    return {"enum": values}, st.sampled_from(equal)


def _union(pairs: list[Pair], word: str) -> Pair:
    return {word: [schema for schema, _ in pairs]}, st.one_of([values for _, values in pairs])


def _array(pair: Pair, least: int, more: int) -> Pair:
    most = least + more
    return {"type": "array", "items": pair[0], "minItems": least, "maxItems": most}, st.lists(pair[1], min_size=least, max_size=most)


def _object(pairs: list[Pair], required: list[bool]) -> Pair:
    named = {f"p{i}": pair for i, pair in enumerate(pairs)}
    needed = [name for name, must in zip(named, required, strict=False) if must]
    schema = {"type": "object", "properties": {n: p[0] for n, p in named.items()}, "required": needed, "additionalProperties": False}
    fixed = {name: named[name][1] for name in needed}
    return schema, st.fixed_dictionaries(fixed, optional={name: pair[1] for name, pair in named.items() if name not in needed})


_NUMBERS = st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.integers())
_WHOLE = st.one_of(st.integers(), st.integers().map(float), st.sampled_from([-0.0, 1e16, 1e300]))
_LEAVES: st.SearchStrategy[Pair] = st.one_of(
    st.builds(_texts, st.integers(0, 2), st.integers(2, 5)),
    st.builds(_enum, st.lists(_SCALARS, min_size=1, max_size=30)),
    st.builds(_enum, st.lists(st.lists(_SCALARS, max_size=2), min_size=1, max_size=3)),
    st.builds(lambda value: ({"const": value}, st.just(value)), _SCALARS),
    st.sampled_from(
        [
            ({"type": "boolean"}, st.booleans()),
            ({"type": "null"}, st.none()),
            ({"type": "number"}, _NUMBERS),
            ({"type": "integer"}, _WHOLE),
            ({"type": ["string", "null"], "maxLength": 3}, st.none() | st.text(_CHARS, max_size=3)),
            ({"type": ["integer", "boolean"]}, _WHOLE | st.booleans()),
            ({"type": "string", "anyOf": [{"enum": ["a", "b"]}, {"maxLength": 2}]}, st.text("ab|", max_size=2)),
            ({"allOf": [{"type": "string", "maxLength": 4}, {"pattern": "^a"}]}, st.text(_CHARS, max_size=3).map(lambda t: "a" + t)),
        ]
    ),
)


def _inner(children: st.SearchStrategy[Pair]) -> st.SearchStrategy[Pair]:
    return st.one_of(
        st.builds(_array, children, st.integers(0, 2), st.integers(0, 2)),
        st.builds(_object, st.lists(children, max_size=4), st.lists(st.booleans(), min_size=4, max_size=4)),
        st.builds(_union, st.lists(children, min_size=1, max_size=3), st.sampled_from(["anyOf", "oneOf"])),
    )


PAIRS = st.recursive(_LEAVES, _inner, max_leaves=6)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Codec, Any]:
    """A codec, and an answer that is valid under its schema."""
    schema, values = draw(PAIRS)
    if draw(st.booleans()):
        schema = {"$defs": {"a/b c": schema}, "$ref": "#/$defs/a~1b%20c"}
    answer = draw(values)
    assume(jsonschema_rs.Draft202012Validator(schema).is_valid(answer))
    return Codec(schema), answer


def accepts(grammar: str) -> Callable[[str], bool]:
    """Whether xgrammar lets a text pass, byte by byte, to the end."""
    look = accepts_bytes(grammar)
    return lambda text: look(text.encode())


def accepts_bytes(grammar: str) -> Callable[[bytes], bool]:
    import xgrammar

    vocabulary = [bytes([i]) for i in range(256)] + [b"</s>"]
    info = xgrammar.TokenizerInfo(vocabulary, vocab_type=xgrammar.VocabType.RAW, stop_token_ids=[256])
    compiled = xgrammar.GrammarCompiler(info).compile_grammar(grammar)

    def look(data: bytes) -> bool:
        matcher = xgrammar.GrammarMatcher(compiled)
        return all(matcher.accept_token(byte) for byte in data) and bool(matcher.accept_token(256))

    return look


MANY = settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
SOME = settings(MANY, max_examples=120)


@MANY
@given(cases())
def test_every_valid_answer_comes_back_exactly(case: tuple[Codec, Any]) -> None:
    codec, answer = case
    assert plain(codec.decode(codec.encode(answer)).answer) == plain(answer)


@SOME
@given(cases())
def test_the_grammar_lets_every_compact_answer_pass(case: tuple[Codec, Any]) -> None:
    codec, answer = case
    assert accepts(codec.grammar())(codec.encode(answer))


@SOME
@given(cases(), st.data())
def test_what_the_grammar_lets_pass_is_a_compact_answer_and_nothing_else_is(case: tuple[Codec, Any], data: st.DataObject) -> None:
    """A code with some characters changed, as a grammar sees it and as `decode` does."""
    codec, answer = case
    code, passes = codec.encode(answer), accepts(codec.grammar())
    for _ in range(6):
        at = data.draw(st.integers(0, len(code)))
        text = code[:at] + data.draw(st.text(_CHARS, max_size=2)) + code[at + data.draw(st.integers(0, 2)) :]
        problem = _problem(codec, text)
        assert passes(text) == (not problem) or "too large a number" in problem


def _problem(codec: Codec, text: str) -> str:
    try:
        codec.decode(text)
    except CompactError as error:
        return str(error)
    return ""


@MANY
@given(cases())
def test_spans_are_in_order_and_within_the_text(case: tuple[Codec, Any]) -> None:
    codec, answer = case
    code = codec.encode(answer)
    spans = codec.decode(code).spans
    assert all(0 <= start < end <= len(code) + 1 for start, end in spans)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))


# --- what compact answers look like


def _codec(**properties: Any) -> Codec:
    return Codec({"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False})


LABEL = {"enum": ["a", "b", "c"]}
TEXT = {"type": "string", "maxLength": 9}


def test_the_shipped_tasks(segmentation: Task, intent: Task) -> None:
    segments = {"segments": [{"text": "thai food", "label": "topic"}, {"text": "near me", "label": "location"}]}
    assert Codec(segmentation.schema).encode(segments) == "thai food|near me^"
    assert Codec(segmentation.schema).encode({"segments": []}) == ""
    assert Codec(intent.schema).encode({"intent": "price"}) == "<"


def test_a_text_ends_at_the_sign_that_follows_it_and_needs_none_at_the_end() -> None:
    assert _codec(text=TEXT, label=LABEL).encode({"text": '12" | x\\y', "label": "b"}) == '12" \\| x\\\\y~'
    assert _codec(label=LABEL, text=TEXT).encode({"text": "c++", "label": "b"}) == "~c++"
    assert _codec(one=TEXT, two=TEXT).encode({"one": "x", "two": "y"}) == "x\ny"
    assert _codec(one=TEXT, n={"type": "integer"}, two=LABEL).encode({"one": "x", "n": 7, "two": "a"}) == "x\n7|"


def test_lists_end_where_they_must() -> None:
    labels = {"type": "array", "items": LABEL, "maxItems": 4}
    assert _codec(all=labels).encode({"all": ["a", "c", "a"]}) == "|^|"
    assert _codec(all=labels, text=TEXT).encode({"all": ["a"], "text": "x"}) == "|\tx"
    nested = {"type": "array", "items": labels, "maxItems": 3}
    assert _codec(all=nested).encode({"all": [[], ["b"], []]}) == "\t~\t\t"
    followed = _codec(all=nested, text=TEXT)  # here a symbol leads each inner list: its end could be taken for the outer one's
    assert followed.encode({"all": [[], ["b"], []], "text": "x"}) == "|\t|~\t|\t\tx"
    same = {"type": "array", "items": {"const": "x"}, "maxItems": 3}
    assert _codec(all=same).encode({"all": ["x", "x"]}) == "||"  # else two could not be told from none


def test_an_optional_choice_has_one_option_more() -> None:
    codec = Codec({"type": "object", "properties": {"a": LABEL, "b": TEXT}, "additionalProperties": False})
    assert [codec.encode(value) for value in ({}, {"a": "a"}, {"b": "x"}, {"a": "c", "b": ""})] == ["||", "~|", "|~x", "=~"]


def test_more_options_than_signs_are_said_in_letters() -> None:
    many = {"enum": [f"v{i}" for i in range(30)]}
    assert _codec(text=TEXT, one=many).encode({"text": "x", "one": "v27"}) == "x\nbb"


def test_numbers_keep_their_kind() -> None:
    codec = _codec(n={"enum": [1, 2]}, m={"type": "number"}, i={"type": "integer"})
    for value in (
        {"n": 1, "m": 1, "i": 1},
        {"n": 1.0, "m": 1.0, "i": 1.0},
        {"n": 2, "m": -0.0, "i": -0.0},
        {"n": 2, "m": 1e-7, "i": 10**30},
    ):
        assert plain(codec.decode(codec.encode(value)).answer) == plain(value)


def test_spans_leave_out_what_is_forced() -> None:
    codec = _codec(all={"type": "array", "items": LABEL, "maxItems": 4}, text=TEXT)
    assert codec.decode("|~\thello").spans == [(0, 1), (1, 2), (3, 9)]  # a list's end is no decision of JSON's reading either
    assert _codec(text=TEXT, label=LABEL).decode("hi~").spans == [(0, 3)]  # the symbol says where to stop and which it is
    assert _codec(n={"type": "integer"}, m={"type": "integer"}).decode("12\n3").spans == [(0, 2), (3, 4)]


@pytest.mark.parametrize("code", ["x", "x|y", "\\x|", "|\\", "é", "x|\n", "\t"])
def test_what_is_no_compact_answer_is_refused(code: str, segmentation: Task) -> None:
    with pytest.raises(CompactError):
        Codec(segmentation.schema).decode(code)


def test_an_answer_that_is_not_valid_has_no_compact_text(segmentation: Task) -> None:
    answer: Any
    for answer in ({}, {"segments": [{"text": "x"}]}, {"segments": [], "more": 1}, {"segments": [{"text": 1, "label": "topic"}]}, []):
        with pytest.raises(InputError, match="cannot be written compactly"):
            Codec(segmentation.schema).encode(answer)


@pytest.mark.parametrize(
    "schema, place, why",
    [
        ({}, "answer", "anything"),
        ({"type": "object", "properties": {"a": TEXT}}, "answer", "does not name"),
        ({"type": "object", "additionalProperties": False, "patternProperties": {"^x": TEXT}}, "answer", "does not name"),
        ({"type": "array", "maxItems": 2}, "answer", "items"),
        ({"type": "array", "prefixItems": [TEXT], "items": False}, "answer", "prefixItems"),
        ({"type": "object", "properties": {"a": {"maxLength": 3}}, "additionalProperties": False}, "answer.a", "which values"),
        ({"$defs": {"a": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"}, "answer", "back to itself"),
        ({"$ref": "http://elsewhere/schema"}, "answer", "not looked up"),
        ({"type": "array", "items": {"properties": {}}, "maxItems": 1}, "answer[]", "which values"),
        ({"anyOf": [False]}, "answer", "no value"),
    ],
)
def test_a_schema_that_cannot_be_written_exactly_is_refused_with_its_place(schema: dict[str, Any], place: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as error:
        Codec(schema, "task.yaml")
    assert str(error.value).startswith(f"field {place}: ")
    assert error.value.fix


def _laps(text: str, laps: int, grammar: str) -> bool:
    return accepts(grammar)(text * laps)


@pytest.mark.parametrize("data", [b"\xed\xa0\x80", b"\xed\xbf\xbf", b"\xc0\x80", b"\xf4\x90\x80\x80", b"\x80", b"\xe0\x80\x80", b"\xc3"])
def test_bytes_that_are_no_character_are_no_text(data: bytes, segmentation: Task) -> None:
    """Seen with random weights: decoded they become U+FFFD, and more of them than the grammar had counted."""
    passes = accepts_bytes(Codec(segmentation.schema).grammar())
    assert not passes(data + b"|")
    assert passes("\ud7ff\ue000\U0010ffff\0é|".encode())


def test_bounds_are_in_the_grammar_where_they_are_worth_it(segmentation: Task) -> None:
    """A list of 8 is counted; a text of 200 is not, nor what max_tokens implies. xgrammar takes milliseconds per token over `{0,200}`."""
    codec = Codec(segmentation.schema)
    assert [_laps("x|", laps, codec.grammar()) for laps in (0, 8, 9)] == [True, True, False]
    assert _laps("x|", 9, codec.grammar(8))
    assert _laps("x" * 300 + "|", 1, codec.grammar())
    short = _codec(text={"type": "string", "minLength": 2, "maxLength": 4}, label=LABEL)
    assert [accepts(short.grammar())("x" * n + "|") for n in (1, 2, 4, 5)] == [False, True, True, False]
    assert [accepts(short.grammar(4))("x" * n + "|") for n in (1, 2, 5)] == [False, True, True]
    assert "{" not in codec.grammar()
