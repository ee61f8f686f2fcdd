"""States and confidence: pure functions over completions."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headtail.batch.parsed_answer import classify, confidence, scalar_spans
from headtail.core.rows import State
from headtail.core.task import Task
from headtail.engines import Completion

GOOD = '{"segments": [{"text": "thai food", "label": "topic"}]}'


def _spelled(*pieces: tuple[str, float]) -> tuple[str, tuple[str, ...], tuple[float, ...]]:
    return "".join(text for text, _ in pieces), tuple(text for text, _ in pieces), tuple(logprob for _, logprob in pieces)


@pytest.mark.parametrize(
    "completion, state, reason",
    [
        (Completion(0, GOOD, "stop"), State.ANSWERED, ""),
        (Completion(0, GOOD, "length", tokens_out=9), State.TRUNCATED, "length limit after 9"),
        (Completion(0, GOOD, "content_filter"), State.REFUSED, "declined"),
        (Completion(0, GOOD, "stop", error="HTTP 500"), State.FAILED, "HTTP 500"),
        (Completion(0, GOOD, "tool_calls"), State.FAILED, "tool_calls"),
        (Completion(0, GOOD, ""), State.FAILED, "finish reason"),
        (Completion(0, GOOD[:-1], "stop"), State.INVALID, "not JSON"),
        (Completion(0, "```json\n" + GOOD + "\n```", "stop"), State.INVALID, "not JSON"),
        (Completion(0, '{"segments": [{"text": "a", "label": "dish"}]}', "stop"), State.INVALID, "schema"),
        (Completion(0, '{"error": {"message": "overloaded"}}', "stop"), State.INVALID, "schema"),
        (Completion(0, "", "stop"), State.INVALID, "not JSON"),
    ],
)
def test_states(segmentation: Task, completion: Completion, state: State, reason: str) -> None:
    """DESIGN 5 and 6: an error body is no answer, a cut text is truncated even if it parses, nothing is repaired."""
    parsed = classify(segmentation, completion)
    assert parsed.state == state
    assert reason in parsed.reason
    if state == State.ANSWERED:
        assert parsed.answer == segmentation.dump(json.loads(GOOD))
        assert parsed.raw is None
    else:
        assert (parsed.answer, parsed.confidence, parsed.raw) == (None, None, completion.text or None)


@given(st.text(st.characters(exclude_categories=()), max_size=40), st.sampled_from(["stop", "length", "content_filter", "odd"]))
def test_what_is_kept_of_a_row_without_an_answer_can_be_stored(segmentation: Task, text: str, reason: str) -> None:
    found = classify(segmentation, Completion(0, text=text, finish_reason=reason))
    assert (found.reason + (found.raw or "")).encode().decode() == found.reason + (found.raw or "")
    assert found.raw == text.encode("utf-8", "replace").decode() or not text
    assert classify(segmentation, Completion(0, error=text or "x")).reason.encode()


@pytest.mark.parametrize("depth", [100, 250, 260, 500, 900, 5000])
def test_an_answer_nested_deeply_is_invalid(segmentation: Task, depth: int) -> None:
    for text in ("[" * depth + "]" * depth, '{"segments":' * depth + "1" + "}" * depth):
        assert classify(segmentation, Completion(0, text=text, finish_reason="stop")).state == State.INVALID


def test_confidence_counts_values_alone() -> None:
    text, texts, logprobs = _spelled(
        ('{"', -9.0), ("intent", -9.0), ('": "', -9.0), ("near", -0.1), ("_me", -0.3), ('"', -0.2), ("}", -9.0)
    )
    assert confidence(text, texts, logprobs) == pytest.approx(math.exp(-0.2))


def test_a_token_that_only_touches_a_value_counts() -> None:
    text, texts, logprobs = _spelled(('{"a": "x', -0.5), ('"}', -0.1))
    assert confidence(text, texts, logprobs) == pytest.approx(math.exp(-0.3))


def test_an_empty_string_is_the_decision_to_stop() -> None:
    text, texts, logprobs = _spelled(('{"a": "', -3.0), ('"', -0.7), ("}", -3.0))
    assert confidence(text, texts, logprobs) == pytest.approx(math.exp(-0.7))


@pytest.mark.parametrize("change", ["none", "count", "spelling"])
def test_no_figure_rather_than_a_wrong_one(change: str) -> None:
    text, texts, logprobs = _spelled(('{"a": ', -0.1), ("1", -0.2), ("}", -0.1))
    if change == "none":
        texts, logprobs = (), ()
    elif change == "count":
        logprobs = logprobs[:-1]
    else:
        texts = ("{", "1", "}")
    assert confidence(text, texts, logprobs) is None


def test_nothing_to_decide_has_no_confidence() -> None:
    assert confidence('{"a": []}', ('{"a": []}',), (-0.1,)) is None


def test_special_tokens_spell_nothing_and_count_for_nothing() -> None:
    text, texts, logprobs = _spelled(('{"a": ', 0.0), ("7", -0.4), ("}", 0.0), ("", -5.0))
    assert confidence(text, texts, logprobs) == pytest.approx(math.exp(-0.4))


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def _scalars(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [scalar for child in value.values() for scalar in _scalars(child)]
    if isinstance(value, list):
        return [scalar for child in value for scalar in _scalars(child)]
    return [value]


@given(_JSON, st.booleans())
def test_spans_are_the_scalars_in_order(value: Any, escaped: bool) -> None:
    text = json.dumps(value, ensure_ascii=escaped)
    found = [text[start:end] for start, end in scalar_spans(text)]
    assert [json.loads('"' + piece if piece.endswith('"') else piece) for piece in found] == _scalars(value)


@given(_JSON, st.lists(st.tuples(st.integers(1, 5), st.floats(-8, 0)), min_size=1, max_size=300))
def test_confidence_is_a_probability(value: Any, cuts: list[tuple[int, float]]) -> None:
    text, texts, logprobs, at = json.dumps(value), [], [], 0
    for length, logprob in cuts:
        if at < len(text):
            texts.append(text[at : at + length])
            logprobs.append(logprob)
            at += length
    if at < len(text):
        texts.append(text[at:])
        logprobs.append(-1.0)
    sure = confidence(text, texts, logprobs)
    assert (sure is None) == (not _scalars(value))
    assert sure is None or 0.0 < sure <= 1.0


# --- several samples


def _label(name: str, logprob: float = -0.1) -> Completion:
    text = json.dumps({"segments": [{"text": "thai", "label": name}]})
    return Completion(0, text, "stop", tokens_out=2, token_texts=(text,), token_logprobs=(logprob,))


def test_the_answer_most_samples_give_is_taken_and_all_are_kept(segmentation: Task) -> None:
    cut = Completion(0, '{"segm', "length", tokens_out=3)
    first = dataclasses.replace(_label("name", -2.0), samples=(_label("topic"), cut, _label("topic", -0.5)))
    parsed = classify(segmentation, first)
    assert json.loads(parsed.answer or "")["segments"][0]["label"] == "topic"
    assert parsed.state is State.ANSWERED
    assert parsed.agreement == 0.5
    assert parsed.confidence == pytest.approx(math.exp(-0.1))
    assert parsed.samples is not None
    assert [sample["state"] for sample in parsed.samples] == ["answered", "answered", "truncated", "answered"]
    assert [sample["tokens_out"] for sample in parsed.samples] == [2, 2, 3, 2]
    assert parsed.samples[2]["answer"] is None


def test_of_equals_the_earliest_sample_is_taken(segmentation: Task) -> None:
    parsed = classify(segmentation, dataclasses.replace(_label("name"), samples=(_label("topic"),)))
    assert json.loads(parsed.answer or "")["segments"][0]["label"] == "name"
    assert parsed.agreement == 0.5


def test_without_any_answer_the_row_ends_as_its_first_sample(segmentation: Task) -> None:
    cut, odd = Completion(0, "{", "length"), Completion(0, "[]", "stop")
    parsed = classify(segmentation, dataclasses.replace(cut, samples=(odd,)))
    assert parsed.state is State.TRUNCATED
    assert (parsed.agreement, parsed.answer) == (0.0, None)
    assert classify(segmentation, _label("name")).agreement is None
