"""Answers become labels and come back; what cannot is said, never hidden."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headtail.core import tagging
from headtail.core.errors import ConfigError
from headtail.core.keys import canonical
from headtail.core.tagging import BEGIN, DELETE, FIRST_FIX, INSIDE, KEEP, NONE, OUTSIDE, Scheme, Spans, Tags
from headtail.core.task import Task
from headtail.engines.decisions import head_slices, output_width

LABELS = ('"a"', '"b"', "3")
SPANS = Spans(name="segments", text="text", label="label", labels=LABELS)
PLAIN = Scheme(schema_digest="", order=("segments",), spans=SPANS, corrections=("pizza", "icecream", "ice cream"), deletes=True)
word = st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=8)
queries = st.lists(word, min_size=1, max_size=8).map(" ".join)


def seg(*pairs: tuple[str, Any]) -> dict[str, Any]:
    return {"segments": [{"text": text, "label": label} for text, label in pairs]}


@st.composite
def labelled(draw: st.DrawFn) -> tuple[str, Tags]:
    """A query with any labels at all."""
    query = draw(queries)
    n = len(tagging.word_spans(query))
    kinds = draw(st.lists(st.sampled_from([OUTSIDE, BEGIN, INSIDE]), min_size=n, max_size=n))
    named = draw(st.lists(st.integers(NONE, len(LABELS) - 1), min_size=n, max_size=n))
    fixes = draw(st.lists(st.sampled_from([KEEP, KEEP, KEEP, DELETE, FIRST_FIX, FIRST_FIX + 1]), min_size=n, max_size=n))
    return query, Tags(tuple(kinds), tuple(named), tuple(fixes), (), False)


@st.composite
def cut(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A query and an answer whose texts are consecutive pieces of it, some of it left out between them."""
    query = draw(queries)
    spoken = tagging.word_spans(query)
    at, pairs = 0, []
    while at < len(spoken):
        end = draw(st.integers(at + 1, len(spoken)))
        if draw(st.booleans()) or draw(st.booleans()):
            pairs.append((query[spoken[at][0] : spoken[end - 1][1]], draw(st.sampled_from(["a", "b", 3]))))
        at = end
    return query, seg(*pairs)


@given(cut())
@settings(max_examples=300)
def test_pieces_of_the_query_come_back_exactly(case: tuple[str, dict[str, Any]]) -> None:
    query, given_answer = case
    made = tagging.encode_tags(PLAIN, query, given_answer)
    assert tagging.decode_tags(PLAIN, query, made) == given_answer or not made.exact
    texts = [query[a:b] for a, b in tagging.word_spans(query)]
    if len(set(texts)) == len(texts):  # a word that occurs twice may be read off the wrong one of them
        assert made.exact


@given(labelled())
@settings(max_examples=300)
def test_any_labels_decode_and_exact_never_lies(case: tuple[str, Tags]) -> None:
    query, made = case
    shown = tagging.decode_tags(PLAIN, query, made)
    again = tagging.encode_tags(PLAIN, query, shown)
    assert again.exact == (canonical(tagging.decode_tags(PLAIN, query, again)) == canonical(shown))
    for piece in shown["segments"]:
        assert piece["text"]
        assert canonical(piece["label"]) in LABELS


@pytest.mark.parametrize(
    "query,answer,exact",
    [
        ("piza near me", seg(("pizza", "a"), ("near me", "b")), True),
        ("icecrem shop", seg(("ice cream shop", "a")), True),  # one word for two
        ("pizz a shop", seg(("pizza shop", "a")), True),  # two for one
        ("st. louis", seg(("st louis", "a")), True),  # a mark left out inside a piece
        ("pizza, chicago", seg(("pizza", "a"), ("chicago", "b")), True),  # a mark that is in no piece
        ("tea house", seg(("tea house", "a"), ("hours", "b")), False),  # the answer invents a word
        ("sushi bar", seg(("sashimi bar", "a")), False),  # a spelling that is no known correction
        ("chicago pizza", seg(("pizza", "a"), ("chicago", "b")), False),  # another order
        ("a b", {"segments": [{"text": "a", "label": "zz"}]}, False),
    ],
)
def test_spelling_and_what_labels_cannot_hold(query: str, answer: dict[str, Any], exact: bool) -> None:
    made = tagging.encode_tags(PLAIN, query, answer)
    assert made.exact is exact
    assert (tagging.decode_tags(PLAIN, query, made) == answer) is exact


def test_corrections_are_learnt_from_answers_by_frequency() -> None:
    rows = [("piza", seg(("pizza", "a")))] * 3 + [("sushi", seg(("sushi", "b")))] * 2 + [("taco", seg(("tacos", "b")))]
    found, counts = tagging.with_corrections(PLAIN.model_copy(update={"corrections": (), "deletes": False}), rows, 10)
    assert found.corrections == ("pizza", "sushi")
    assert counts == {"pizza": 3, "sushi": 2}
    assert not found.deletes
    assert tagging.with_corrections(PLAIN, rows, 1)[0].corrections == ("pizza",)


def test_a_task_that_never_respells_has_no_corrections() -> None:
    rows = [("find sushi near here", seg(("sushi", "a"))), ("book sushi", seg(("sushi", "b")))] * 5
    found, counts = tagging.with_corrections(PLAIN.model_copy(update={"corrections": ()}), rows, 10)
    assert (found.corrections, counts) == ((), {})


@pytest.mark.parametrize(
    "query,pieces", [("book a boon brick store", ["boon brick store"]), ("add sun to my sunny run", ["sun", "sunny run"])]
)
def test_words_in_no_piece_are_not_read_as_misspelt_ones(query: str, pieces: list[str]) -> None:
    assert tagging.encode_tags(PLAIN, query, seg(*((text, "a") for text in pieces))).exact


def test_the_shipped_tasks_fit(segmentation: Task, intent: Task) -> None:
    found = tagging.scheme(segmentation.schema)
    assert found.spans is not None
    assert found.spans.labels[:2] == ('"topic"', '"name"')
    assert output_width(found) == 3 + 6
    found = tagging.scheme(intent.schema)
    assert found.fields[0].values[0] == '"find_business"'
    assert head_slices(found) == {"field:intent": slice(0, 8)}
    given_answer = {"intent": "browse"}
    made = tagging.encode_tags(found, "pizza", given_answer)
    assert made.exact
    assert tagging.decode_tags(found, "pizza", made) == given_answer


def test_fields_of_every_closed_kind_and_left_out_ones_come_back() -> None:
    schema = {
        "type": "object",
        "properties": {
            "a": {"enum": ["x", 1, None]},
            "b": {"type": "boolean"},
            "c": {"anyOf": [{"$ref": "#/$defs/a~1kind%20of"}, {"type": "null"}]},
            "d": {"const": "only"},
        },
        "required": ["a", "b"],
        "$defs": {"a/kind of": {"enum": ["k", "l"]}},
    }
    found = tagging.scheme(schema)
    for a in ("x", 1, None):
        for rest in ({}, {"c": "l"}, {"c": None, "d": "only"}):
            given_answer = {"a": a, "b": True, **rest}
            made = tagging.encode_tags(found, "query", given_answer)
            assert made.exact
            assert tagging.decode_tags(found, "query", made) == given_answer


@pytest.mark.parametrize(
    "part,why",
    [
        ({"type": "string", "maxLength": 9}, "free text"),
        ({"type": "integer"}, "number"),
        ({"type": "array", "maxItems": 3, "items": {"type": "string", "maxLength": 9}}, "not of pieces"),
        ({"type": "object", "properties": {}}, "cannot hold"),
    ],
)
def test_a_task_that_does_not_fit_is_refused_with_the_reason(part: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why) as error:
        tagging.scheme({"type": "object", "properties": {"x": part}, "required": ["x"]})
    assert "x" in str(error.value)


def test_words_are_runs_of_letters_marks_and_ideographs() -> None:
    text = "st. mary's 東京ramen"
    assert [text[a:b] for a, b in tagging.word_spans(text)] == ["st", ".", "mary", "'", "s", "東", "京", "ramen"]
