"""The meter adds up what workers tell it."""

from __future__ import annotations

import time

import pytest

from headtail.adapters.meter import job_meter
from timescale import limit


@pytest.mark.slow
def test_totals(cluster: None) -> None:
    import ray

    with job_meter("work", 30) as meter:
        told = [
            ({0: 4}, {0: {"kept": 1.5}}),
            ({1: 10}, {1: {"kept": 2.0}}),
            ({0: 9}, {0: {"kept": 7.5}}),
        ]  # the last one died in between, and tells part 0 again
        assert ray.get([meter.add.remote(done, before, tokens=3) for done, before in told]) == ["", "", ""]
        assert ray.get(meter.read.remote()) == {"done": 19, "kept": 3.5, "tokens": 9}


@pytest.mark.slow
def test_workers_hear_why_to_stop(cluster: None) -> None:
    import ray

    with job_meter("work", 30, judge=lambda told, seconds: "enough" if told["done"] >= 5 and seconds > 0 else "") as meter:
        assert ray.get(meter.add.remote({0: 4})) == ""
        deadline = time.monotonic() + limit(20)
        while (heard := ray.get(meter.add.remote({0: 5}))) == "":
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert heard == "enough"
