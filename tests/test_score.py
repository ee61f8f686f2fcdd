"""Scores against an independent count, and their edge cases."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nervaluate import Evaluator

from headtail.core.errors import ConfigError
from headtail.core.schema import outline
from headtail.core.score import Counts, ScoreConfig, check_score, f1, most_units, score_answer

SPANS = ScoreConfig(kind="spans", field="segments", ignore=("none",))
segment = st.fixed_dictionaries({"text": st.sampled_from("abc"), "label": st.sampled_from(["topic", "name", "none"])})
answers = st.fixed_dictionaries({"segments": st.lists(segment, max_size=5)})


def naive(wanted: list[dict[str, str]], given_: list[dict[str, str]]) -> Counts:
    left = [(s["text"], s["label"]) for s in given_ if s["label"] != "none"]
    want = [(s["text"], s["label"]) for s in wanted if s["label"] != "none"]
    hits = 0
    for unit in want:
        if unit in left:
            left.remove(unit)
            hits += 1
    return Counts(hits, len(left), len(want) - hits)


@given(answers, answers)
def test_spans_match_a_naive_count(wanted: dict[str, list[dict[str, str]]], got: dict[str, list[dict[str, str]]]) -> None:
    assert score_answer(SPANS, wanted, got) == naive(wanted["segments"], got["segments"])


@given(answers)
def test_right_answer_is_right_and_none_is_all_missed(answer: dict[str, list[dict[str, str]]]) -> None:
    assert score_answer(SPANS, answer, answer).right
    missed = score_answer(SPANS, answer, None)
    assert (missed.tp, missed.fp) == (0, 0)


def labelled_words(words: list[str], labels: list[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """An answer whose pieces are all words in order, and nervaluate's entities of it."""
    ends = [sum(len(word) + 1 for word in words[: i + 1]) - 1 for i in range(len(words))]
    pieces = [{"text": word, "label": label} for word, label in zip(words, labels, strict=True)]
    spans = zip(words, labels, ends, strict=True)
    return {"segments": pieces}, [{"label": label, "start": end - len(word), "end": end} for word, label, end in spans if label != "none"]


LABELS = st.lists(st.sampled_from(["topic", "name", "none"]), min_size=6, max_size=6)


@given(st.lists(st.sampled_from(["pizza", "hut", "a"]), min_size=1, max_size=6), LABELS, LABELS)
@settings(max_examples=150)
def test_spans_are_counted_as_nervaluate_counts_them_strictly(words: list[str], wanted: list[str], got: list[str]) -> None:
    """Words repeat, so that places decide; `none` is no unit by itself."""
    (want, truth), (have, found) = (labelled_words(words, labels[: len(words)]) for labels in (wanted, got))
    counts = score_answer(ScoreConfig(kind="spans", field="segments"), want, have, query=" ".join(words))
    strict = Evaluator([truth], [found], tags=["topic", "name"], loader="dict").evaluate()["overall"]["strict"]
    assert counts == Counts(strict.correct, strict.actual - strict.correct, strict.possible - strict.correct)


def test_the_place_of_a_text_that_repeats_decides() -> None:
    want = {"segments": [{"text": "pizza", "label": "none"}, {"text": "pizza", "label": "name"}, {"text": "hut", "label": "name"}]}
    got = {"segments": [{"text": "pizza", "label": "name"}, {"text": "pizza", "label": "none"}, {"text": "hut", "label": "name"}]}
    assert score_answer(SPANS, want, got, query="Pizza pizza hut") == Counts(1, 1, 1)
    assert score_answer(SPANS, want, got) == Counts(2, 0, 0)  # without the query nobody can tell
    once = {"segments": [{"text": "hut", "label": "name"}]}
    assert score_answer(SPANS, once, once, query="pizza hut").right
    assert score_answer(SPANS, once, once, query="pizza huts").right  # not a word of the query: no place


@pytest.mark.parametrize("ignore, counts", [(None, Counts(0, 0, 0)), ((), Counts(1, 0, 0)), (("buy",), Counts(1, 0, 0))])
def test_none_is_no_unit_unless_the_task_says_so(ignore: tuple[str, ...] | None, counts: Counts) -> None:
    label = ScoreConfig(kind="label", field="intent", ignore=ignore)
    assert score_answer(label, {"intent": "none"}, {"intent": "none"}) == counts
    spans = ScoreConfig(kind="spans", field="segments", ignore=ignore)
    answer = {"segments": [{"text": "a", "label": "none"}]}
    assert score_answer(spans, answer, answer) == counts
    assert most_units(label, {}) == 2


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("ab")), min_size=1))
def test_label_f1_is_accuracy(pairs: list[tuple[str, str]]) -> None:
    label = ScoreConfig(kind="label", field="intent")
    counts = [score_answer(label, {"intent": a}, {"intent": b}) for a, b in pairs]
    assert abs(f1(counts) - sum(a == b for a, b in pairs) / len(pairs)) < 1e-12


def test_exact_compares_content_not_order() -> None:
    exact = ScoreConfig(kind="exact")
    assert score_answer(exact, {"a": 1, "b": [2]}, {"b": [2], "a": 1}).right
    assert score_answer(exact, {"a": 1}, {"a": 2}) == Counts(0, 1, 1)


def test_odd_shapes_do_not_raise() -> None:
    assert score_answer(SPANS, {"segments": [{"text": "a", "label": "name"}]}, {"segments": "no"}) == Counts(0, 0, 1)
    assert score_answer(SPANS, {"segments": []}, []) == Counts(0, 0, 0)
    assert f1([]) == 1.0


PIECE = {"type": "object", "properties": {"text": {"type": "string", "maxLength": 9}, "label": {"enum": ["topic", "none"]}}}
SCHEMA = {
    "type": "object",
    "properties": {
        "segments": {"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#/$defs/piece"}, "maxItems": 3}]},
        "intent": {"enum": ["a"]},
    },
    "$defs": {"piece": PIECE},
}


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"kind": "label", "field": "intnt"}, "score.field: .*\n.*\n.*value: intnt.*\n.*the answer schema has segments, intent there"),
        ({"kind": "label"}, "score.field"),
        ({"kind": "spans", "field": "pieces"}, "score.field"),
        ({"kind": "spans", "field": "intent"}, "score.field: not a list"),
        ({"kind": "spans", "field": "segments", "text": "words"}, "score.text: .*\n.*\n.*words.*\n.*text, label there"),
        ({"kind": "spans", "field": "segments", "label": "kind"}, "score.label"),
        ({"kind": "label", "field": "intent", "ignore": ["nobody"]}, "score.ignore: .*\n.*\n.*nobody.*\n.*a there"),
        ({"kind": "spans", "field": "segments", "ignore": ["nobody"]}, "score.ignore: .*\n.*\n.*nobody.*\n.*topic, none there"),
    ],
)
def test_names_that_the_schema_lacks_are_said(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_score(ScoreConfig.model_validate(fields), outline(SCHEMA).schema, "task.yaml")


def test_names_that_the_schema_has_pass() -> None:
    for fields in ({"kind": "label", "field": "intent"}, {"kind": "spans", "field": "segments", "ignore": ("none",)}, {"kind": "exact"}):
        check_score(ScoreConfig.model_validate(fields), outline(SCHEMA).schema, "task.yaml")
    assert most_units(ScoreConfig(kind="spans", field="segments"), outline(SCHEMA).schema) == 6


def test_span_texts_are_compared_in_the_normal_form_of_queries() -> None:
    typed = {"segments": [{"text": " Thai  Food", "label": "topic"}, {"text": "cafe\u0301", "label": "name"}]}
    copied = {"segments": [{"text": "thai food", "label": "topic"}, {"text": "caf\u00e9", "label": "name"}]}
    assert score_answer(SPANS, typed, copied) == Counts(2, 0, 0)
    assert not score_answer(
        SPANS, {"segments": [{"text": "10\u2075", "label": "topic"}]}, {"segments": [{"text": "105", "label": "topic"}]}
    ).tp
