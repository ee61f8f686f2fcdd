"""Rows of an evaluation set among rows to train on: the same text, or nearly the same.

In: queries of evaluation sets; then any query. Out: the labelled query that it repeats, or None; `refuse_leaks` makes an error of it.
The same after redaction and normalisation; nearly the same: the same words in another order, or character trigrams whose
Jaccard similarity reaches a bound. Exact, not sketched: sets of human labels are thousands of rows. Knows nothing of files or stages.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from headtail.core.errors import LeakError
from headtail.core.keys import KEY_BYTES, query_key
from headtail.core.query import clean_text

NEAR = 0.8  # Jaccard similarity of trigrams from which two queries are nearly the same; one typing error in 25 characters stays above
_SHOWN = 5


class SimilarQuery(NamedTuple):
    """A labelled query and how similar it is (1: the same text or the same words)."""

    query: str
    similarity: float


def trigrams(text: str) -> set[str]:
    """Character trigrams of a clean text with a blank on either side."""
    padded = f" {text} "
    return {padded[i : i + 3] for i in range(len(padded) - 2)}


class LabelledQueries:
    """The queries of evaluation sets. `near`: similarity from which a query repeats one of them; None: the same text only."""

    def __init__(self, queries: Iterable[str], near: float | None = NEAR) -> None:
        self.near = near
        self._texts = sorted({clean_text(query) for query in queries})
        self._known = set(self._texts)
        self.keys = pa.array(sorted({query_key(text) for text in self._texts}), pa.binary(KEY_BYTES))
        self._by_words: dict[frozenset[str], str] = {}
        self._by_gram: dict[str, list[int]] = defaultdict(list)
        self._grams: list[set[str]] = []
        self._sizes: list[int] = []
        self._counts: Counter[str] = Counter()
        if near is not None:
            self._index(near)

    def __len__(self) -> int:
        return len(self._texts)

    def find(self, text: str) -> SimilarQuery | None:
        """The labelled query that a clean text repeats, the most similar one; None when there is none."""
        if text in self._known:
            return SimilarQuery(text, 1.0)
        if self.near is None:
            return None
        words = self._by_words.get(frozenset(text.split(" ")))
        return SimilarQuery(words, 1.0) if words is not None else self._similar(text, self.near)

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Pairs of these queries, as clean texts, that nearly repeat each other; none when only the same text counts."""
        if self.near is None:
            return
        for number, (text, grams) in enumerate(zip(self._texts, self._grams, strict=True)):
            yield text, self._by_words[frozenset(text.split(" "))]
            yield from ((text, self._texts[other]) for other, _ in self._neighbours(grams, self.near) if other < number)

    def _index(self, near: float) -> None:
        """Each labelled text under the rarest of its trigrams."""
        self._grams = [trigrams(text) for text in self._texts]
        self._sizes = list(map(len, self._grams))
        self._counts = Counter(gram for grams in self._grams for gram in grams)
        for number, (text, grams) in enumerate(zip(self._texts, self._grams, strict=True)):
            self._by_words.setdefault(frozenset(text.split(" ")), text)
            for gram in self._rare(grams, near):
                self._by_gram[gram].append(number)

    def _rare(self, grams: set[str], near: float) -> list[str]:
        """The rarest trigrams of a text, so many that two texts as similar as `near` share one of theirs (Bayardo et al. 2007)."""
        ranked = sorted(grams, key=lambda gram: (self._counts.get(gram, 0), gram))
        return ranked[: len(grams) - math.ceil(near * len(grams) - 1e-9) + 1]

    def _similar(self, text: str, near: float) -> SimilarQuery | None:
        best = max(self._neighbours(trigrams(text), near), key=lambda found: (found[1], -found[0]), default=None)
        return None if best is None else SimilarQuery(self._texts[best[0]], best[1])

    def _neighbours(self, grams: set[str], near: float) -> Iterator[tuple[int, float]]:
        """The labelled texts whose similarity to a text with these trigrams reaches `near`: number and similarity, in no order."""
        least, most = near * len(grams) - 1e-9, len(grams) / near + 1e-9 if near else math.inf  # trigrams of a text as similar
        for number in {number for gram in self._rare(grams, near) for number in self._by_gram.get(gram, ())}:
            if least <= self._sizes[number] <= most:
                common = len(grams & self._grams[number])
                similarity = common / (len(grams) + self._sizes[number] - common)
                if similarity >= near - 1e-9:
                    yield number, similarity


def refuse_leaks(training: Iterable[pa.Table], labels: Iterable[pa.Table], where: str, near: float | None = NEAR) -> None:
    """LeakError when a row of `training` (query_key, query) repeats a query of `human_labels`, with the rows named.

    Stored keys are compared, and keys computed from the texts, so that a wrong key hides nothing.
    """
    held = [table.select(["query_key", "query"]) for table in labels]
    known = LabelledQueries((query for table in held for query in table["query"].to_pylist()), near)
    keys = pa.concat_arrays([known.keys, *(table["query_key"].combine_chunks().cast(known.keys.type) for table in held)])
    found: list[str] = []
    count = 0
    for table in training:
        same = pc.is_in(table["query_key"].combine_chunks().cast(keys.type), value_set=keys).to_pylist()
        for query, by_key in zip(table["query"].to_pylist(), same, strict=True):
            hit = known.find(clean_text(query))
            if hit is None and not by_key:
                continue
            count += 1
            if len(found) < _SHOWN:
                found.append(f"{query!r} = {hit.query!r} ({hit.similarity:.2f})" if hit else f"{query!r} (its key)")
    if count:
        raise LeakError(
            f"{count:,} training rows are in the human labels, or nearly",
            where=where,
            value=", ".join(found),
            fix="mark labelled queries eval_only (plan does) and curate again: it sets near-duplicates aside as near_labels",
        )
