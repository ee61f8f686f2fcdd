"""What a person types is read alike in a file of labels and on the review page."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headtail.core import typed_answer
from headtail.core.task import Task, load_task
from headtail.review.decision import CORRECT, canonical_answer, resolve_verdict
from headtail.stages.ingest.human_labels import _answer

TASK = load_task("query_intent")
LABELS = TASK.schema["properties"]["intent"]["enum"]


@given(st.sampled_from(LABELS), st.lists(st.booleans(), min_size=20, max_size=20), st.sampled_from(["", " ", "\n"]), st.booleans())
def test_a_label_in_any_letters_is_that_label_for_both(label: str, large: list[bool], blank: str, whole: bool) -> None:
    typed = "".join(letter.upper() if up else letter for letter, up in zip(label, large, strict=False))
    text = blank + (json.dumps({"intent": typed}) if whole else typed) + blank
    assert canonical_answer(TASK, text) == _answer(text.encode(), TASK) == (TASK.dump({"intent": label}), "")


@given(st.text(max_size=12) | st.sampled_from(LABELS).map(json.dumps))
def test_both_take_and_refuse_the_same_for_the_same_reason(text: str) -> None:
    assert canonical_answer(TASK, text) == _answer(text.encode(), TASK)


def test_a_correction_is_read_as_a_label_of_a_file() -> None:
    other = next(label for label in LABELS if "_" in label)
    before = json.dumps({"intent": next(label for label in LABELS if label != other)})
    assert resolve_verdict(TASK, CORRECT, other.title(), before) == (TASK.dump({"intent": other}), "")


@pytest.mark.parametrize("text", ["{\u201cintent\u201d: \u201cprice\u201d}", "{\u00abintent\u00bb: 1}", "{\u201eintent\u201c: 1}"])
def test_smart_quotes_are_named(text: str, segmentation: Task) -> None:
    for task in (TASK, segmentation):
        assert typed_answer.parse_typed_answer(task, text)[1].startswith(f"not JSON: it has the quotation mark {text[1]} where JSON has")


def test_a_label_that_is_none_is_told_as_one() -> None:
    assert typed_answer.parse_typed_answer(TASK, "far_away")[1].startswith("schema: intent: ")
    assert typed_answer.parse_typed_answer(TASK, '{"intent": ')[1].startswith("not JSON: ")


@pytest.mark.parametrize("text, is_label", [('"price"', True), ('"Price"', True), ('"far"', False), ("3", False), ('["price"]', False)])
def test_a_label_as_json_text_is_that_label(text: str, is_label: bool) -> None:
    answer, problem = typed_answer.parse_typed_answer(TASK, text)
    assert (answer, problem == "") == ({"intent": "price"} if is_label else None, is_label)


def test_a_models_answer_is_read_strictly() -> None:
    assert TASK.parse(json.dumps({"intent": LABELS[0].upper()}))[1]
