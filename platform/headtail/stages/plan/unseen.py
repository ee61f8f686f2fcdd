"""Queries that have never come yet: how many a longer log would bring.

In: how many queries were seen once, twice, ... Out: an estimate without an interval. Pure.
"""

from __future__ import annotations

import numpy as np
from scipy import special

from headtail.core.intervals import Array


def new_queries(spectrum: Array, times: float) -> float:
    """How many distinct queries, never seen in n events, the next `times` x n events bring, if traffic stays as it is.

    `spectrum[i]` is the number of queries seen i + 1 times. Up to one more log: Good and Toulmin's (1956) alternating sum. Beyond that
    it diverges, so each term is weighed by the chance that a Poisson number reaches it, with the mean log(n (t + 1)^2 / (t - 1)) / (2 t)
    of Orlitsky, Suresh and Wu (2016), who show that nothing can be said beyond about log n more logs. At least 0.
    """
    seen = np.arange(1, len(spectrum) + 1)
    terms = -((-times) ** seen.astype(np.float64)) * spectrum
    if times > 1:
        events = float(seen @ spectrum)
        mean = np.log(max(np.e, events * (times + 1) ** 2 / (times - 1))) / (2 * times)
        terms = terms * special.pdtrc(seen - 1, mean)
    return max(0.0, float(terms.sum()))


def farthest(events: float) -> float:
    """How many times the log's events the estimate reaches: log n (Orlitsky, Suresh and Wu 2016)."""
    return float(np.log(max(np.e, events)))
