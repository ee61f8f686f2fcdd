"""Spellings: how far apart, and which known ones are near."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headtail.core.spelling import SpellingIndex, distance, similar


@given(st.text("abcd", max_size=7), st.text("abcd", max_size=7))
def test_distance_is_a_symmetric_count_of_slips(a: str, b: str) -> None:
    assert distance(a, b) == distance(b, a) <= max(len(a), len(b))
    assert (distance(a, b) == 0) == (a == b)


@given(st.lists(st.text("abc", min_size=1, max_size=6), max_size=12, unique=True), st.text("abc", min_size=1, max_size=6))
def test_near_finds_all_similar_words_and_no_others(known: list[str], asked: str) -> None:
    assert set(SpellingIndex(known).find(asked)) == {i for i, other in enumerate(known) if other != asked and similar(asked, other)}


@pytest.mark.parametrize(
    "a,b,apart", [("pizza", "piza", 1), ("pizza", "pziza", 1), ("pizza", "pizzza", 1), ("pizza", "tacos", 5), ("", "abc", 3)]
)
def test_distance_counts_a_swap_as_one(a: str, b: str, apart: int) -> None:
    assert distance(a, b) == apart


def test_short_words_are_meant_as_they_are() -> None:
    assert not similar("a", "o")
    assert similar("the", "te")
    assert not similar("tea", "spa")
    assert similar("dentst", "dentist")


def test_a_very_long_word_costs_no_more_than_a_short_one() -> None:
    assert SpellingIndex(["pizza"]).find("x" * 5000) == ()
