"""A latency is in exactly one bucket, and the sums that Prometheus gets only grow."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headtail.core.buckets import BUCKETS, bucket_of, cumulate_buckets


@given(st.lists(st.floats(0, 100)))
def test_each_latency_is_counted_once_and_at_most_its_bound(latencies: list[float]) -> None:
    counts = [0] * (len(BUCKETS) + 1)
    for seconds in latencies:
        counts[bucket_of(seconds)] += 1
    for bound, count in cumulate_buckets(counts):
        assert count == sum(seconds <= float(bound) for seconds in latencies)
