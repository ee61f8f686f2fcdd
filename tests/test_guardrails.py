"""Guardrails refuse text that is not the query's, let through what is, and say the same at publish and live."""

from __future__ import annotations

import collections
import itertools
import random
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from rapidfuzz.distance import OSA

from headtail.core.errors import ConfigError
from headtail.core.guardrails import GUARDRAIL_REASONS, AnswerGuard, Near, OwnCheck, align_spellings, load_own_check, texts_of
from headtail.core.keys import normalise
from headtail.core.task import Task, load_task
from headtail.examples import example_data

WORDS = {"pizza": 900, "near": 800, "me": 800, "orlando": 400, "olrando": 3, "hotel": 90, "hostel": 80, "san": 70, "diego": 70, "price": 60}


def spans(*texts: str) -> dict[str, Any]:
    return {"segments": [{"text": text, "label": "topic"} for text in texts]}


def check_answer(task: Task, query: str, answer: Any, words: Mapping[str, int] | None = None, own_check: OwnCheck | None = None) -> str:
    """The reason why `answer` may not be served to `query`, or ""."""
    return AnswerGuard(task, words, own_check).reason(query, answer)


def variant(task: Task, **fields: Any) -> Task:
    """The task with other guardrails."""
    file = task.file.model_copy(update={"guardrails": task.file.guardrails.model_copy(update=fields)})
    return Task(file, task.folder, task.schema, task.template)


# query, spans, code when the spans must be the whole query, code when they may be pieces of it
CASES = [
    ("pizza near me", ("pizza", "near me"), "", ""),
    ("pizza", ("pizza", "denver"), "span_not_in_query", "span_not_in_query"),  # served once to the most frequent query of all
    ("the place", ("the", "price"), "correction_far", "span_not_in_query"),  # served live once
    ("pizza olrando", ("pizza", "orlando"), "", ""),
    ("pizza orlando", ("pizza", "olrando"), "correction_unknown", "correction_unknown"),
    ("hostel orlando", ("hotel", "orlando"), "correction_of_known", "correction_of_known"),
    ("pizza near me", ("pizza",), "query_not_covered", ""),
    ("pizza near me", ("near me", "pizza"), "span_order", ""),
    ("pizza near me", ("pizza", "near me", "near me"), "span_not_in_query", ""),
    ("pizza near me", (), "query_not_covered", ""),
    ("nearme", ("near me",), "", ""),
    ("near me", ("nearme",), "correction_unknown", "correction_unknown"),
    ("sandeigo", ("san diego",), "", ""),
    ("in orlando", ("orlando",), "query_not_covered", ""),  # a dropped word is no typing error
    ("pizza", ("Pizza",), "", ""),
    ("24 hours", ("25", "hours"), "correction_far", "span_not_in_query"),  # a number is never corrected
    ("pizza, near me!", ("pizza", "near me"), "", ""),
    ("東京ラーメン", ("東京", "ラーメン"), "", ""),
    ("東京ラーメン", ("ラーメン",), "query_not_covered", ""),
    ("東京ラーメン", ("大阪", "ラーメン"), "correction_far", "span_not_in_query"),
    ("carpet cleaning", ("car",), "query_not_covered", "span_not_in_query"),  # a piece of a word is no span
    ("हिंदी किताब", ("हिंदी", "किताब"), "", ""),
]


@pytest.mark.parametrize("query, texts, whole, some", CASES)
def test_spans_are_of_the_query_or_of_its_correction(segmentation: Task, query: str, texts: tuple[str, ...], whole: str, some: str) -> None:
    assert normalise(query) == query
    assert check_answer(segmentation, query, spans(*texts), WORDS) == whole
    assert check_answer(variant(segmentation, cover="some"), query, spans(*texts), WORDS) == some
    assert {whole, some} <= {"", *GUARDRAIL_REASONS}


def test_without_a_word_list_words_are_not_looked_up(segmentation: Task) -> None:
    assert check_answer(segmentation, "pizza orlando", spans("pizza", "olrando")) == ""
    assert check_answer(segmentation, "pizza orlando", spans("pizza", "oleander")) == "correction_far"


def test_they_are_on_for_spans_alone_unless_the_task_says(segmentation: Task, intent: Task) -> None:
    wrong = spans("pizza", "denver")
    assert check_answer(variant(segmentation, enabled=False), "pizza", wrong, WORDS) == ""
    assert check_answer(intent, "pizza", {"intent": "call joe@example.com"}) == ""
    assert check_answer(variant(intent, enabled=True), "pizza", {"intent": "call joe@example.com"}) == "personal_data"


def test_personal_data_must_be_in_the_query(segmentation: Task) -> None:
    loose = variant(segmentation, cover="some", max_edits=4, letters_per_edit=1)
    assert check_answer(variant(loose, personal_data=False), "mail joe@example.com", spans("joe@example.com")) == ""
    assert check_answer(loose, "mail joe@example.com", spans("joe@example.com")) == ""
    assert check_answer(loose, "mail joy@example.com", spans("joe@example.com")) == "personal_data"


CORRECTING = """
name: fix
answer:
  type: object
  properties:
    corrected: {type: string, maxLength: 100}
    segments:
      type: array
      maxItems: 8
      items:
        type: object
        properties: {text: {type: string, maxLength: 100}, label: {enum: [a, b]}}
        required: [text, label]
  required: [corrected, segments]
score: {kind: spans, field: segments}
fallback: {corrected: $query, segments: []}
"""


def write_task(folder: Path, guardrails: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "task.yaml").write_text(CORRECTING + f"guardrails: {guardrails}\n")
    (folder / "prompt.j2").write_text("{% block user %}{{ query }}{% endblock %}")
    return folder


def test_spans_may_be_of_a_field_that_holds_the_correction(tmp_path: Path) -> None:
    task = load_task(write_task(tmp_path, "{correction: corrected, cover: all}"))

    def reason(query: str, corrected: str, *texts: str) -> str:
        return check_answer(task, query, {"corrected": corrected, "segments": [{"text": t, "label": "a"} for t in texts]}, WORDS)

    assert reason("pizza olrando", "pizza orlando", "pizza", "orlando") == ""
    assert reason("pizza olrando", "pizza orlando", "pizza", "olrando") == "correction_far"
    assert reason("pizza olrando", "pizza orlando denver", "pizza", "orlando", "denver") == "span_not_in_query"
    assert reason("pizza orlando", "pizza orlando", "pizza") == "query_not_covered"


@pytest.mark.parametrize(
    "guardrails, message",
    [
        ("{correction: fixed}", "guardrails.correction: not in the answer schema"),
        ("{cover: most}", "guardrails.cover"),
        ("{check: no function}", "guardrails.check"),
        ("{checks: a}", "did you mean check"),
    ],
)
def test_wrong_guardrails_are_named_when_the_task_is_loaded(tmp_path: Path, guardrails: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_task(write_task(tmp_path, guardrails))


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "polite_words.py").write_text(
        "def check(query, answer):\n"
        "    texts = [s['text'] for s in answer['segments']]\n"
        "    if 'bug' in texts: raise KeyError('x')\n"
        "    return 'rude' if 'damn' in texts else 'Not a code!' if 'odd' in texts else None\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "polite_words:check"
    sys.modules.pop("polite_words", None)


def test_a_check_of_ones_own_runs_only_where_code_is_allowed(segmentation: Task, own_module: str) -> None:
    task = variant(segmentation, check=own_module)
    with pytest.raises(ConfigError, match="guardrails name Python code"):
        load_own_check(task, allow_code=False)
    own = load_own_check(task, allow_code=True)
    assert check_answer(task, "damn pizza", spans("damn", "pizza"), own_check=own) == "check.rude"
    assert (
        check_answer(task, "odd pizza", spans("odd", "pizza"), own_check=own) == "check"
    )  # what is no code does not become a metric's name
    assert check_answer(task, "bug pizza", spans("bug", "pizza"), own_check=own) == "check.failed"
    assert check_answer(task, "nice pizza", spans("nice", "pizza"), own_check=own) == ""
    with pytest.raises(ConfigError, match="no attribute"):
        load_own_check(variant(segmentation, check="polite_words:none"), allow_code=True)
    assert load_own_check(segmentation, allow_code=False) is None


letters = st.text(st.characters(codec="utf-8", categories=["L", "Nd"]), min_size=1, max_size=9)
queries = st.lists(letters, min_size=1, max_size=7).map(lambda words: normalise(" ".join(words))).filter(bool)


@given(queries, st.data())
def test_pieces_of_the_query_are_never_refused(query: str, data: st.DataObject) -> None:
    task = load_task("query_segmentation")
    words = query.split(" ")
    cuts = sorted({0, len(words), *data.draw(st.lists(st.integers(0, len(words))))})
    parts = [" ".join(words[a:b]) for a, b in itertools.pairwise(cuts)]
    assert check_answer(task, query, spans(*parts), WORDS) == ""
    some = data.draw(st.lists(st.sampled_from(parts)))
    assert check_answer(variant(task, cover="some"), query, spans(*some), WORDS) == ""


@given(queries, letters.map(normalise).filter(bool), st.integers(0, 7))
def test_a_word_from_nowhere_is_refused(query: str, word: str, place: int) -> None:
    words = query.split(" ")
    squeezed = "".join(words)
    assume(word not in squeezed and all(OSA.distance(word, other) > 2 for other in words))
    assume(" " not in word)
    given_words = [*words[:place], word, *words[place:]]
    task = load_task("query_segmentation")
    assume(any(character.isalnum() for character in word))
    assert check_answer(task, query, spans(*given_words)) in ("span_not_in_query", "correction_far")


@given(
    st.lists(st.sampled_from(["ab", "abcd", "efgh", "efgi", "x"]), max_size=5),
    st.lists(st.sampled_from(["ab", "abcd", "efgh"]), max_size=5),
)
def test_an_alignment_uses_each_word_once_and_in_order(typed: list[str], given_: list[str]) -> None:
    near = Near(lambda a, b: OSA.distance(a, b) if OSA.distance(a, b) < 2 else None, 1)
    steps = align_spellings(typed, given_, near, whole=True)
    assert steps == align_spellings(typed, given_, near._replace(slack=99), whole=True)  # slack only saves time
    if steps is not None:
        assert [word for step in steps for word in step.typed] == typed
        assert [word for step in steps for word in step.given] == given_
    assert (align_spellings(typed, typed, Near(lambda a, b: 0 if a == b else None, 0), whole=True) is not None) is True


def test_texts_are_found_at_any_depth() -> None:
    assert list(texts_of({"a": "x", "b": [{"c": "y"}, 3, None, "z"]})) == ["x", "y", "z"]


def counted_words(config: example_data.Config) -> Mapping[str, int]:
    words: collections.Counter[str] = collections.Counter()
    for _, table in example_data.log_tables(config):
        for query, n in collections.Counter(table["query"].to_pylist()).items():
            words.update(dict.fromkeys(query.split(" "), n))
    return words


def test_right_answers_of_the_example_data_pass_and_planted_faults_do_not(segmentation: Task) -> None:
    """Of right answers none is refused but those to a misspelling that is a word of its own (`hostel` typed as `hotel`)."""
    config = example_data.Config(events=20_000, days=2)
    words = counted_words(config)
    known = sorted(word for word, n in words.items() if n >= 5 and word.isalpha())
    rng = random.Random(1)
    refused, faults, caught = [], 0, 0
    for text, meaning, _ in example_data.sample(config, 1200, "guardrails"):
        query, right = normalise(text), [part for part, _ in meaning.segments]
        reason = check_answer(segmentation, query, spans(*right), words)
        refused += [(query, right, reason)] if reason else []
        at = rng.randrange(len(right))
        changed = right[at].split(" ")
        changed[rng.randrange(len(changed))] = rng.choice(known)
        for fault in ([*right, "denver"], right[:-1], right[::-1], [*right[:at], " ".join(changed), *right[at + 1 :]]):
            if fault != right and " ".join(fault) != query:
                faults += 1
                caught += bool(check_answer(segmentation, query, spans(*fault), words))
    assert len(refused) <= 1, refused
    assert faults > 3000
    assert caught >= 0.995 * faults
