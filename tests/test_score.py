"""Scores against an independent count, and their edge cases."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headtail.score import Counts, ScoreConfig, f1, score

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
    assert score(SPANS, wanted, got) == naive(wanted["segments"], got["segments"])


@given(answers)
def test_right_answer_is_right_and_none_is_all_missed(answer: dict[str, list[dict[str, str]]]) -> None:
    assert score(SPANS, answer, answer).right
    missed = score(SPANS, answer, None)
    assert (missed.tp, missed.fp) == (0, 0)


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("ab")), min_size=1))
def test_label_f1_is_accuracy(pairs: list[tuple[str, str]]) -> None:
    label = ScoreConfig(kind="label", field="intent")
    counts = [score(label, {"intent": a}, {"intent": b}) for a, b in pairs]
    assert abs(f1(counts) - sum(a == b for a, b in pairs) / len(pairs)) < 1e-12


def test_exact_compares_content_not_order() -> None:
    exact = ScoreConfig(kind="exact")
    assert score(exact, {"a": 1, "b": [2]}, {"b": [2], "a": 1}).right
    assert score(exact, {"a": 1}, {"a": 2}) == Counts(0, 1, 1)


def test_odd_shapes_do_not_raise() -> None:
    assert score(SPANS, {"segments": [{"text": "a", "label": "name"}]}, {"segments": "no"}) == Counts(0, 0, 1)
    assert score(SPANS, {"segments": []}, []) == Counts(0, 0, 0)
    assert f1([]) == 1.0
