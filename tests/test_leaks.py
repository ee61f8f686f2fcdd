"""Leaks: what repeats a labelled query is found, however it is written; what does not is left alone; the index changes nothing."""

from __future__ import annotations

import random
import time
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headtail.core import leaks
from headtail.core.errors import LeakError
from headtail.core.keys import query_key
from headtail.core.leaks import LabelledQueries, trigrams
from headtail.core.query import clean_text
from timescale import limit


def rows(*queries: str) -> pa.Table:
    return pa.table({"query_key": pa.array([query_key(q) for q in queries], pa.binary(16)), "query": list(queries)})


@pytest.mark.parametrize(
    "text",
    [
        "best pizza restaurants in chicago",
        "  Best PIZZA restaurants\u200b in Chicago ",
        "best pizza restaurants chicago in",  # other order
        "best pizza restaurants in chicagoo",  # a slip
        "the best pizza restaurants in chicago",
    ],
)
def test_the_same_and_nearly_the_same_are_found(text: str) -> None:
    near = LabelledQueries(["best pizza restaurants in chicago", "gym"]).find(clean_text(text))
    assert near is not None
    assert near.query == "best pizza restaurants in chicago"
    assert near.similarity >= leaks.NEAR


@pytest.mark.parametrize("text", ["best pizza restaurants in seattle", "pizza", "gyms near me", "chicago"])
def test_other_queries_are_left_alone(text: str) -> None:
    assert LabelledQueries(["best pizza restaurants in chicago", "gym"]).find(text) is None


def test_without_a_bound_only_the_same_text_counts() -> None:
    labels = LabelledQueries(["pizza chicago"], near=None)
    assert labels.find("chicago pizza") is None
    assert labels.find("pizza chicago") == ("pizza chicago", 1.0)


def test_personal_data_does_not_hide_a_leak() -> None:
    """Human labels as people typed it and a training row as ingest kept it are the same query."""
    assert LabelledQueries(["mail anna@example.org"]).find(clean_text("mail <email>")) == ("mail <email>", 1.0)


WORDS = st.lists(st.sampled_from(["pizza", "piza", "near", "me", "chicago", "chicgo", "best", "sushi"]), min_size=1, max_size=5).map(
    " ".join
)


@given(st.lists(WORDS, min_size=1, max_size=12), WORDS, st.sampled_from([0.3, 0.5, 0.8, 0.95, 1.0]))
@settings(max_examples=150)
def test_the_index_finds_what_comparing_with_all_finds(labels: list[str], text: str, near: float) -> None:
    def similarity(a: str, b: str) -> float:
        if sorted(set(a.split())) == sorted(set(b.split())):
            return 1.0
        x, y = trigrams(a), trigrams(b)
        return len(x & y) / len(x | y)

    best = max(similarity(text, query) for query in labels)
    found = LabelledQueries(labels, near).find(text)
    assert (found is not None) == (best >= near - 1e-9)
    assert found is None or found.similarity == pytest.approx(best)


def test_refuse_names_the_rows() -> None:
    labels = rows("best pizza restaurants in chicago", "plumber")
    leaks.refuse_leaks([rows("sushi"), rows("tacos")], [labels], "here")
    with pytest.raises(LeakError, match="2 training rows are in the human labels") as caught:
        leaks.refuse_leaks([rows("sushi", "best pizza restaurants in chicag"), rows("plumber")], [labels], "here")
    assert "'best pizza restaurants in chicag' = 'best pizza restaurants in chicago'" in str(caught.value)
    wrong_key = rows("sushi").set_column(1, "query", pa.array(["plumber"]))
    with pytest.raises(LeakError, match="1 training rows"):
        leaks.refuse_leaks([wrong_key], [labels], "here")
    same_key = rows("plumber").set_column(1, "query", pa.array(["something else altogether"]))
    with pytest.raises(LeakError, match="its key"):
        leaks.refuse_leaks([same_key], [labels], "here")


def test_texts_of_few_words_are_compared_with_few() -> None:
    """People use the same words. Only the rare trigrams of both texts lead from one to the other."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 8))) for _ in range(200)]
    texts = [" ".join(rng.choices(words, k=rng.randint(3, 6))) for _ in range(2000)]
    labels, looks = LabelledQueries(texts[:1000]), 0

    class Counted(list[set[str]]):
        def __getitem__(self, index: Any) -> Any:
            nonlocal looks
            looks += 1
            return super().__getitem__(index)

    labels._grams = Counted(labels._grams)
    for text in texts[1000:]:
        labels.find(text)
    assert looks < 20 * 1000  # of a million pairs


def test_ten_thousand_labelled_rows_are_no_burden() -> None:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 9))) for _ in range(3000)]
    texts = [" ".join(rng.choices(words, k=rng.randint(2, 5))) for _ in range(20_000)]
    labels = LabelledQueries(texts[:10_000])
    start = time.process_time()
    found = sum(labels.find(text) is not None for text in texts[10_000:])
    assert time.process_time() - start < limit(10)  # 10,000 queries; under 1 s on an idle core
    assert found < 200
