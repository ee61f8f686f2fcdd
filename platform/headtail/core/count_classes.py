"""Classes of queries that are alike in a log's history: by their events, and by the days since they last came.

In: counts, days. Out: class numbers, as HISTORY has them. Ingest sums by them; the planner looks queries up by them.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

EXACT_COUNTS = 16  # counts below this are a class each; above, sixteen classes per doubling
_IDLE_FROM = np.array([1, 2, 4, 7, 14, 28])  # days since the last event from which the next class of idleness begins
IDLE_CLASSES = len(_IDLE_FROM) + 1


def count_class(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The class of each count: the count itself below 16, then sixteen classes per doubling. Rising, 0 for 0."""
    low = np.minimum(counts, EXACT_COUNTS)
    steps = np.floor(16 * np.log2(np.maximum(counts, EXACT_COUNTS) / EXACT_COUNTS) + 1e-9).astype(np.int64)
    return np.asarray(low + steps, np.int64)


def idle_class(days: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The class, 0 to 6, of each number of days since a query last came: 0, 1, 2-3, 4-6, 7-13, 14-27, 28 and more."""
    return np.asarray(np.searchsorted(_IDLE_FROM, days, side="right"), np.int64)
