"""The overload benchmark: what counts as refused in time, as wrong, as recovered, and the slope of memory."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bench.overload import Answered, answered, memory_figures, phase_figures, recovery_s
from headtail.stages.simulate.probe import ProbeExchange


def exchange(status: int = 200, retry: bool = False, **fields: Any) -> ProbeExchange:
    body = {"cached": False, "degraded": False, "source": "realtime_student", "reason": "", **fields}
    return ProbeExchange(5.0, 0.02, status, retry, json.dumps(body).encode())


@pytest.mark.parametrize(
    "hit, made, kind",
    [
        (True, exchange(cached=True, source="teacher"), "cache"),
        (True, exchange(), "wrong"),  # a hit that the student answered
        (False, exchange(cached=True, source="teacher"), "wrong"),
        (False, exchange(), "student"),
        (False, exchange(source="dynamic"), "dynamic"),
        (False, exchange(degraded=True, source="fallback", reason="overloaded"), "fallback"),
        (False, exchange(degraded=True, source="fallback", reason="withheld"), "withheld"),
        (False, exchange(429, retry=True), "429"),
        (False, exchange(503, retry=False), "wrong"),
        (True, exchange(500), "wrong"),
        (True, exchange(0), "lost"),
    ],
)
def test_what_became_of_a_request(hit: bool, made: ProbeExchange, kind: str) -> None:
    assert answered(hit, made) == Answered(5.0, 20.0, hit, kind)


def test_a_phase_counts_the_requests_that_were_sent_in_it() -> None:
    requests = [Answered(at / 10, 1.0 if at < 100 else 9.0, True, "cache") for at in range(200)]
    requests += [Answered(at / 10, 40.0 if at % 2 else 60.0, False, "fallback" if at >= 100 else "student") for at in range(200)]
    calm, full = phase_figures("calm", requests, 0, 10), phase_figures("full", requests, 10, 20)
    assert (calm["hit_p99_ms"], full["hit_p99_ms"]) == (1.0, 9.0)
    assert calm["hits_per_s"] == full["misses_per_s"] == 10
    assert (calm["excess_share"], full["excess_share"]) == (0.0, 1.0)
    assert calm["excess_p99_ms"] is None
    assert full["excess_within_50_ms"] == 0.5
    assert full["misses"] == {"fallback": 100}


@pytest.mark.parametrize("slow_s, degraded_s, wanted", [(0, 0, 0.0), (3, 0, 3.0), (0, 4.5, 5.0), (18, 0, None)])
def test_recovery_is_when_hits_are_fast_again_and_misses_are_answered(slow_s: float, degraded_s: float, wanted: float | None) -> None:
    at = [moment / 20 for moment in range(400)]
    requests = [Answered(moment, 9.0 if moment < slow_s else 1.9, True, "cache") for moment in at]
    requests += [Answered(moment, 5.0, False, "fallback" if moment < degraded_s else "student") for moment in at]
    assert recovery_s(sorted(requests), 0.0, 1.0, 20.0) == wanted


def test_memory_that_grows_has_a_slope() -> None:
    at = [float(second) for second in range(120)]
    found = memory_figures(at, [100.0 + max(0, min(second, 90) - 30) for second in range(120)], 30, 90)
    assert found == {"before_mib": 100.0, "most_mib": 160.0, "last_mib": 160.0, "mib_per_minute": pytest.approx(60)}
