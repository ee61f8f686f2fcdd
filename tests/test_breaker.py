"""The circuit breaker: after failures in a row no call is made for a pause, then one is a probe."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headtail.core.breaker import CircuitBreaker


def test_single_failures_do_not_open_it() -> None:
    breaker = CircuitBreaker(failures=3)
    for now in range(20):
        assert breaker.allows(now)
        breaker.record_failure(now)
        breaker.record_failure(now)
        breaker.record_success()
    assert not breaker.is_open


def test_it_opens_probes_and_closes() -> None:
    breaker = CircuitBreaker(failures=2, pause_s=1, longest_s=3)
    breaker.record_failure(10.0)
    breaker.record_failure(10.0)
    assert breaker.is_open
    assert [breaker.allows(now) for now in (10.0, 10.9, 11.0, 11.0, 11.9)] == [False, False, True, False, False]
    breaker.record_failure(11.0)  # the probe: the pause doubles
    assert [breaker.allows(now) for now in (12.9, 13.0)] == [False, True]
    breaker.record_failure(13.0)  # 4 s, but at most 3
    assert [breaker.allows(now) for now in (15.9, 16.0)] == [False, True]
    breaker.record_success()
    assert breaker.allows(20.0)
    breaker.record_failure(20.0)
    breaker.record_failure(20.0)
    assert [breaker.allows(now) for now in (20.9, 21.0)] == [False, True]  # the pause is the first one again


def test_a_probe_that_never_comes_back_is_followed_by_another() -> None:
    breaker = CircuitBreaker(failures=1, pause_s=1)
    breaker.record_failure(0.0)
    assert [breaker.allows(now) for now in (1.0, 1.5, 2.0)] == [True, False, True]


@given(st.lists(st.floats(0.001, 5), min_size=1, max_size=200))
def test_a_dead_server_is_asked_rarely_but_for_ever(steps: list[float]) -> None:
    """However calls come: at most `failures` calls, then one per pause; and after the longest pause there is a probe."""
    breaker, now, calls = CircuitBreaker(failures=3, pause_s=1, longest_s=4), 0.0, 0
    for step in steps:
        now += step
        if breaker.allows(now):
            calls += 1
            breaker.record_failure(now)
    assert calls <= 3 + now / 1
    assert breaker.allows(now + 4)
