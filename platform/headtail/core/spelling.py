"""Which known spellings a word may stand for. Pure.

In: words. Out: whether two are near, in typing errors (insertions, deletions, replacements and swaps of neighbours: optimal string
alignment, by rapidfuzz), and an index that finds all near words of a vocabulary without looking at each (symmetric deletes,
Garbe 2012). Knows nothing of tasks or models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

from rapidfuzz.distance import OSA

MOST = 2  # typing errors between a word and the meant one; 1 when either has three letters or fewer


@lru_cache(1 << 16)
def similar(a: str, b: str) -> bool:
    """Whether one can be meant by the other."""
    shorter = min(len(a), len(b))
    bound = min(1 if shorter <= 3 else MOST, shorter - 1)
    return abs(len(a) - len(b)) <= bound and OSA.distance(a, b, score_cutoff=bound) <= bound


class SpellingIndex:
    """Finds the words of `known` that are similar to a word, by number in `known`. Answers are remembered."""

    def __init__(self, known: Sequence[str]) -> None:
        self.known = list(known)
        self._index: dict[str, list[int]] = {}
        for number, word in enumerate(self.known):
            for form in set(_deletes(word)):
                self._index.setdefault(form, []).append(number)
        self._remembered: dict[str, tuple[int, ...]] = {}

    def find(self, word: str) -> tuple[int, ...]:
        """Numbers of similar words, the word itself left out."""
        numbers = self._remembered.get(word)
        if numbers is None:
            seen = {number for form in set(_deletes(word)) for number in self._index.get(form, ())}
            numbers = tuple(sorted(n for n in seen if self.known[n] != word and similar(word, self.known[n])))
            if len(self._remembered) >= _REMEMBERED:
                self._remembered.clear()
            self._remembered[word] = numbers
        return numbers


_REMEMBERED = 1 << 18  # words: some 50 MB
_LONGEST = 32  # letters; longer words are product codes and the like, of which deletes are many and corrections none


def _deletes(word: str) -> Iterator[str]:
    """`word` and all that is left of it without one or two letters."""
    yield word
    if len(word) > _LONGEST:
        return
    for i in range(len(word)):
        once = word[:i] + word[i + 1 :]
        yield once
        for j in range(i, len(once)):
            yield once[:j] + once[j + 1 :]
