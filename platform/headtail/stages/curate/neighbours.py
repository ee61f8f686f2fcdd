"""Near neighbours: similar queries should have similar answers.

In: queries. Out: a place for each in a space where similar queries are close (hashed character trigrams, 64 dimensions by SVD),
its nearest neighbours there, and clusters. Knows nothing of answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

_DIMENSIONS = 64
_FIT_ROWS = 20_000  # rows that the space is made from, and among which neighbours are looked for
_CHUNK = 2_000


class Neighbours(NamedTuple):
    """The neighbours of each row, nearest first: row numbers (-1: none) and similarity 0..1."""

    row: npt.NDArray[np.int64]
    similarity: npt.NDArray[np.float32]


def embed(texts: Sequence[str], seed: int) -> npt.NDArray[np.float32]:
    """Unit vectors, one per text."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
    from sklearn.preprocessing import normalize

    hashed = HashingVectorizer(analyzer="char_wb", ngram_range=(3, 3), n_features=2**16, alternate_sign=False, dtype=np.float32)
    grams = hashed.transform(texts)
    every = -(-len(texts) // _FIT_ROWS)
    weighted = TfidfTransformer(sublinear_tf=True).fit(grams[::every]).transform(grams)
    if min(weighted.shape[0], weighted.nnz) <= _DIMENSIONS:  # too few texts for a space of their own
        return np.asarray(normalize(weighted[:, np.unique(weighted.indices)].toarray()), dtype=np.float32)
    space = TruncatedSVD(_DIMENSIONS, n_iter=2, random_state=seed).fit(weighted[::every])
    parts = [space.transform(weighted[at : at + _FIT_ROWS]) for at in range(0, len(texts), _FIT_ROWS)]
    return np.asarray(normalize(np.concatenate(parts)), dtype=np.float32)


def nearest(places: npt.NDArray[np.float32], count: int) -> Neighbours:
    """The `count` nearest other rows by cosine, among an even sample of 20,000 when there are more."""
    every = -(-len(places) // _FIT_ROWS)
    among = np.arange(0, len(places), every)
    count = min(count, len(among) - 1)
    if count < 1:
        return Neighbours(np.full((len(places), 0), -1, dtype=np.int64), np.zeros((len(places), 0), dtype=np.float32))
    rows, similar = [], []
    for start in range(0, len(places), _CHUNK):
        part = np.arange(start, min(start + _CHUNK, len(places)))
        like = places[part] @ places[among].T
        itself = np.flatnonzero(part % every == 0)
        like[itself, part[itself] // every] = -1.0
        best = np.argpartition(-like, count - 1, axis=1)[:, :count]
        value = np.take_along_axis(like, best, axis=1)
        order = np.lexsort((best, -value))
        rows.append(among[np.take_along_axis(best, order, axis=1)])
        similar.append(np.take_along_axis(value, order, axis=1))
    return Neighbours(np.concatenate(rows), np.clip(np.concatenate(similar), 0, 1))


def clusters(places: npt.NDArray[np.float32], count: int, seed: int) -> npt.NDArray[np.int64]:
    """A cluster per row, at most `count` of them."""
    from sklearn.cluster import MiniBatchKMeans

    every = -(-len(places) // _FIT_ROWS)
    sample: Any = places[::every]
    count = min(count, len(np.unique(sample, axis=0)))
    if count < 2:
        return np.zeros(len(places), dtype=np.int64)
    model = MiniBatchKMeans(count, batch_size=2048, n_init=3, max_iter=30, random_state=seed).fit(sample)
    return np.asarray(model.predict(places), dtype=np.int64)
