"""Buckets of the histograms of latency: the same in the server's processes and in clients, so that their counts add up.

In: seconds; counts by bucket. Out: the bucket of a latency; counts as Prometheus writes them. Knows nothing of who counts.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

# upper bounds, seconds; one bucket more is for what is longer
BUCKETS = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


def bucket_of(seconds: float) -> int:
    """The bucket, from 0, of a latency: the first whose bound it does not exceed."""
    return bisect_left(BUCKETS, seconds)


def cumulate_buckets(counts: Sequence[float]) -> list[tuple[str, float]]:
    """(bound, how many took at most so long) for each bucket. `counts`: one more than BUCKETS."""
    return list(zip((*map(str, BUCKETS), "+Inf"), accumulate(counts), strict=True))
