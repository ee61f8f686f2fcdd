"""Spellings: how far apart, and which known ones are near."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from rapidfuzz.distance import OSA

from headtail.core.spelling import SpellingIndex, similar


def plain_distance(a: str, b: str) -> int:
    """Optimal string alignment as it is written in textbooks, one cell at a time."""
    cost = {(i, 0): i for i in range(len(a) + 1)} | {(0, j): j for j in range(len(b) + 1)}
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            cost[i, j] = min(cost[i - 1, j] + 1, cost[i, j - 1] + 1, cost[i - 1, j - 1] + (a[i - 1] != b[j - 1]))
            if i > 1 and j > 1 and a[i - 1] == b[j - 2] and a[i - 2] == b[j - 1]:
                cost[i, j] = min(cost[i, j], cost[i - 2, j - 2] + 1)
    return cost[len(a), len(b)]


@given(st.text("abcd", max_size=7) | st.text(max_size=7), st.text("abcd", max_size=7) | st.text(max_size=7), st.integers(0, 4))
def test_distances_are_those_of_the_textbook(a: str, b: str, most: int) -> None:
    apart = plain_distance(a, b)
    assert OSA.distance(a, b) == apart
    assert OSA.distance(a, b, score_cutoff=most) == min(apart, most + 1)
    bound = min(1 if min(len(a), len(b)) <= 3 else 2, min(len(a), len(b)) - 1)
    assert similar(a, b) == (apart <= bound)


@given(st.lists(st.text("abc", min_size=1, max_size=6), max_size=12, unique=True), st.text("abc", min_size=1, max_size=6))
def test_near_finds_all_similar_words_and_no_others(known: list[str], asked: str) -> None:
    assert set(SpellingIndex(known).find(asked)) == {i for i, other in enumerate(known) if other != asked and similar(asked, other)}


def test_short_words_are_meant_as_they_are() -> None:
    assert not similar("a", "o")
    assert similar("the", "te")
    assert not similar("tea", "spa")
    assert similar("dentst", "dentist")


def test_a_very_long_word_costs_no_more_than_a_short_one() -> None:
    assert SpellingIndex(["pizza"]).find("x" * 5000) == ()
