"""The meter adds up what workers tell it."""

from __future__ import annotations

import pytest

from headtail.meter import metered


@pytest.mark.slow
def test_totals(cluster: None) -> None:
    import ray

    with metered("work", 30) as meter:
        ray.get([meter.add.remote(done=10, tokens=3) for _ in range(3)])
        assert ray.get(meter.read.remote()) == {"done": 30, "tokens": 9}
