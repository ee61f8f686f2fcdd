"""The pace at which an endpoint is asked, in simulated time: what it settles at, and that a limit per minute holds."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter

import pytest

from headtail.engines.rate_limit import SHARED_S, Bucket, RateLimiter


class Endpoint:
    """Answers `capacity` requests at once, each in `takes` seconds; one more is pushed back after a tenth of that."""

    def __init__(self, capacity: int, takes: float = 0.1) -> None:
        self.capacity, self.takes, self.busy = capacity, takes, 0

    def run(self, pace: RateLimiter, seconds: float) -> tuple[Counter[str], list[float]]:
        """Requests without end for so many seconds: how many came to which end, and the limit over time."""
        now, ends, limits, number = 0.0, Counter[str](), [], itertools.count()
        flying: list[tuple[float, int, float, bool]] = []  # comes back at, number, left at, pushed back
        while now < seconds:
            while not (wait := pace.wait(now)):
                pace.leave(1)
                pushed = self.busy >= self.capacity
                self.busy += not pushed
                heapq.heappush(flying, (now + self.takes * (0.1 if pushed else 1), next(number), now, pushed))
            if flying and flying[0][0] <= now + wait:
                now, _, left, pushed = heapq.heappop(flying)
                self.busy -= not pushed
                pace.back(now, left, pushed)
                ends["pushed" if pushed else "answered"] += 1
            else:
                now += wait
            limits.append(pace.limit)
        return ends, limits


class Fixed(RateLimiter):
    """What a fixed number at once does."""

    def back(self, now: float, left_at: float, pushed: bool, spare_tokens: int = 0) -> None:
        super().back(now, left_at, pushed, spare_tokens)
        self.limit = float(self.most)


@pytest.mark.parametrize("capacity", [1, 5, 20, 60])
def test_the_pace_settles_near_what_the_endpoint_bears(capacity: int) -> None:
    ends, limits = Endpoint(capacity).run(RateLimiter(64), 60)
    fixed_ends, _ = Endpoint(capacity).run(Fixed(64), 60)
    late = limits[len(limits) // 2 :]
    assert 0.6 * capacity <= sum(late) / len(late) <= 1.2 * capacity + 1
    assert min(late) >= max(1, 0.5 * capacity)  # no collapse
    assert ends["answered"] >= 0.75 * capacity * 60 / 0.1
    assert ends["pushed"] < 0.2 * ends["answered"]
    assert ends["pushed"] < 0.05 * fixed_ends["pushed"]


def test_the_pace_takes_all_that_is_allowed_where_nobody_pushes_back() -> None:
    ends, limits = Endpoint(1000).run(RateLimiter(64), 20)
    assert limits[-1] == 64
    assert ends["pushed"] == 0
    assert ends["answered"] >= 0.95 * 64 * 20 / 0.1


def test_a_capacity_that_returns_is_found_again() -> None:
    endpoint, pace = Endpoint(40), RateLimiter(64)
    endpoint.run(pace, 20)
    endpoint.capacity, endpoint.busy, pace.out = 4, 0, 0
    assert endpoint.run(pace, 20)[1][-1] < 8
    endpoint.capacity, endpoint.busy, pace.out = 40, 0, 0
    assert endpoint.run(pace, 60)[1][-1] > 25


def test_one_round_of_push_backs_counts_once() -> None:
    pace = RateLimiter(100)
    pace.limit = 50.0
    for _ in range(50):
        pace.leave(0)
    for i in range(50):
        pace.back(1.0 + i / 1000, left_at=0.5, pushed=True)
    assert pace.limit == pytest.approx(35)
    assert (pace.pushes, pace.out) == (50, 0)


@pytest.mark.parametrize("rate", [1, 2, 7, 60, 599, 6000, 60000])
def test_no_minute_has_more_than_its_limit(rate: int) -> None:
    bucket, now = Bucket(rate), 0.0
    times: list[float] = []
    while now < 150 and len(times) < 200_000:
        if wait := bucket.wait(now):
            now += wait
            continue
        bucket.spend(1)
        times.append(now)
    for start in times[:: max(1, len(times) // 50)]:
        within = sum(start <= moment < start + 60 - 1e-6 for moment in times)
        assert within <= rate
    assert len(times) >= rate * 2  # and the limit is used


def test_tokens_are_charged_as_they_were_used() -> None:
    pace = RateLimiter(8, tokens_per_minute=6000)  # 100 a second
    now, used = 0.0, 0
    while now < 120:
        if wait := pace.wait(now):
            now += wait
            continue
        pace.leave(500)  # as feared
        pace.back(now, now, pushed=False, spare_tokens=300)
        used += 200
    assert 0.9 * 12000 <= used <= 12000 + 700


def test_a_pause_is_short_until_no_answer_comes_between() -> None:
    pace = RateLimiter(8)
    pace.pause(10.0, 0.5)
    assert pace.wait(10.0) == pytest.approx(0.5)
    assert pace.wait(10.5) == 0
    pace.leave(1)
    pace.back(10.6, 10.5, pushed=False)
    pace.pause(20.0, 3600.0)  # asked of one row, while others are answered
    assert pace.wait(20.0) == pytest.approx(SHARED_S)
    pace.pause(20.1, 3600.0)  # had left before
    assert pace.wait(20.0) == pytest.approx(SHARED_S)
    now, waits = 30.0, []
    for _ in range(8):  # every request is asked to wait
        pace.pause(now, 3600.0)
        waits.append(pace.wait(now))
        now += waits[-1]
    assert waits == pytest.approx([4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0, 60.0])
