"""Which labelled queries nearly repeat each other: one cluster, which counts as one row where chance is reckoned with.

In: queries. Out: a cluster number for each. In one cluster are queries with the same words in any order, with character trigrams whose
Jaccard similarity reaches leaks.NEAR, or with one word spelt a little differently; and what is linked by such pairs. By letters alone:
paraphrases with other words are not found.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from rapidfuzz.distance import OSA

from headtail.core.leaks import LabelledQueries
from headtail.core.query import clean_text
from headtail.core.spelling import SpellingIndex

_SHORT, _LONG = 5, 9  # letters from which one, and two, typing errors leave a word recognisable


def duplicate_clusters(queries: Sequence[str]) -> npt.NDArray[np.int64]:
    """A cluster for each query, numbered from 0 in order of appearance."""
    texts = [clean_text(query) for query in queries]
    parent = {text: text for text in texts}

    def root(text: str) -> str:
        while parent[text] != text:
            parent[text] = text = parent[parent[text]]
        return text

    for one, other in (*LabelledQueries(texts).pairs(), *_misspelt_pairs(sorted(parent))):
        if _numbers(one) == _numbers(other):
            parent[root(one)] = root(other)
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(root(text), len(numbers)) for text in texts], dtype=np.int64)


def _numbers(text: str) -> set[str]:
    """Words with a digit: `iphone 11` and `iphone 12` are two questions."""
    return {word for word in text.split(" ") if not word.isalpha() and any(letter.isdigit() for letter in word)}


def _misspelt_pairs(texts: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Pairs with the same words but one, which is spelt a little differently."""
    alike: dict[tuple[str, ...], dict[str, str]] = defaultdict(dict)  # the other words -> that word -> a text
    for text in texts:
        words = sorted(text.split(" "))
        for place, word in enumerate(words):
            if len(word) >= _SHORT and word.isalpha():
                alike[(*words[:place], *words[place + 1 :])][word] = text
    for by_word in alike.values():
        if len(by_word) < 2:
            continue
        index = SpellingIndex(list(by_word))
        for word, text in by_word.items():
            for other in (index.known[number] for number in index.find(word)):
                if OSA.distance(word, other) <= (2 if min(len(word), len(other)) >= _LONG else 1):
                    yield text, by_word[other]
