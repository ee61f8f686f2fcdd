"""Rate limits: GCRA against a reference model, one file for several processes, and Redis that may be away."""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headtail.adapters.redis_link import RedisLink
from headtail.stages.serve.api_keys import ApiKey
from headtail.stages.serve.errors import RequestError
from headtail.stages.serve.rate_limit import RedisLimiter, SharedLimiter, gcra
from redis_server import RedisServer, needs_redis
from timescale import limit


class LeakyBucket:
    """The reference: a bucket that leaks one unit each `interval` seconds and holds `burst` units; in exact numbers.

    The standard gives both forms and says that they admit the same requests.
    """

    def __init__(self, interval: Fraction, burst: int) -> None:
        self.interval, self.burst, self.level, self.at = interval, burst, Fraction(0), Fraction(0)

    def admits(self, now: Fraction, cost: int) -> bool:
        level = max(Fraction(0), self.level - (now - self.at) / self.interval)
        if level + cost > self.burst:
            return False
        self.level, self.at = level + cost, now
        return True


# Halves, quarters and so on are exact as float64, so no decision hangs on rounding.
steps = st.lists(st.tuples(st.integers(0, 600), st.integers(1, 4)), min_size=1, max_size=120)


@given(
    steps=steps, tick=st.sampled_from([1 / 64, 1 / 8, 1.0]), interval=st.sampled_from([1 / 32, 1 / 4, 1.0, 2.0]), burst=st.integers(1, 9)
)
def test_it_admits_what_the_reference_admits(steps: list[tuple[int, int]], tick: float, interval: float, burst: int) -> None:
    model, arrival, now = LeakyBucket(Fraction(interval), burst), 0.0, 4096.0
    model.at = Fraction(now)
    for step, cost in steps:
        now += step * tick
        wait, arrival = gcra(arrival, now, interval, burst, cost)
        assert (wait == 0) == model.admits(Fraction(now), cost)


@given(steps=steps, interval=st.sampled_from([1 / 32, 1 / 4, 1.0]), burst=st.integers(1, 9))
def test_the_wait_is_exact(steps: list[tuple[int, int]], interval: float, burst: int) -> None:
    """A refused request that waits as long as it was told is admitted, and not a tick sooner."""
    arrival, now = 0.0, 4096.0
    for step, cost in steps:
        now += step / 64
        wait, after = gcra(arrival, now, interval, burst, cost)
        if cost > burst:
            assert math.isinf(wait)
        elif wait:
            assert after == arrival
            assert gcra(arrival, now + wait, interval, burst, cost)[0] == 0
            assert gcra(arrival, now + wait - 1 / 1024, interval, burst, cost)[0] > 0
        arrival = after


@given(steps=st.lists(st.floats(0, 2), min_size=1, max_size=300), interval=st.floats(0.001, 1), burst=st.integers(1, 20))
def test_no_window_admits_more_than_burst_and_rate(steps: list[float], interval: float, burst: int) -> None:
    arrival, now, admitted = 0.0, 1e6, []
    for step in steps:
        now += step
        wait, arrival = gcra(arrival, now, interval, burst)
        if not wait:
            admitted.append(now)
    for first in range(0, len(admitted), 7):
        for last in range(first, len(admitted)):
            assert last - first + 1 <= burst + (admitted[last] - admitted[first]) / interval + 1e-3


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    return tmp_path / "limits"


def key(interval: float = 1.0, burst: int = 2, slot: int = 1, name: str = "a") -> ApiKey:
    return ApiKey(name, frozenset(), slot, interval, burst, math.inf)


def test_keys_have_their_own_limits(shared: Path) -> None:
    limiter = SharedLimiter(shared, clock=lambda: 1000.0)
    for slot in (1, 2, 4095):
        assert [limiter.wait(slot, 1.0, 2) for _ in range(3)] == [0, 0, 1.0]
    assert [limiter.wait(3, 0.0, 1) for _ in range(100)] == [0] * 100, "an interval of 0 is no limit"
    limiter.close()


def test_a_refusal_says_when_to_come_back(shared: Path) -> None:
    now = 1000.0
    limiter = SharedLimiter(shared, clock=lambda: now)
    limiter.admit(key(10.0, 1))
    now += 2.5
    with pytest.raises(RequestError) as caught:
        limiter.admit(key(10.0, 1))
    assert (caught.value.status, caught.value.headers) == (429, [("retry-after", "8")])
    now += 7.5
    limiter.admit(key(10.0, 1))
    with pytest.raises(RequestError) as caught:
        limiter.admit(key(10.0, 4), cost=5)
    assert caught.value.status == 413
    limiter.close()


def test_many_queries_at_once_count_as_many(shared: Path) -> None:
    limiter = SharedLimiter(shared, clock=lambda: 1000.0)
    assert limiter.wait(1, 0.5, 10, cost=7) == 0
    assert limiter.wait(1, 0.5, 10, cost=4) == 0.5
    assert limiter.wait(1, 0.5, 10, cost=3) == 0
    limiter.close()


def test_a_reboot_or_another_limit_shuts_nobody_out(shared: Path) -> None:
    now = 1e7
    limiter = SharedLimiter(shared, clock=lambda: now)
    assert [limiter.wait(1, 60.0, 2) for _ in range(2)] == [0, 0]
    now = 5.0  # the machine's clock began anew
    assert limiter.wait(1, 60.0, 2) == 60.0
    assert limiter.wait(1, 0.01, 2) == pytest.approx(0.01)  # the limit was raised
    limiter.close()


def test_a_second_process_goes_on_where_the_first_was(shared: Path) -> None:
    first, second = SharedLimiter(shared, clock=lambda: 1000.0), SharedLimiter(shared, clock=lambda: 1000.0)
    assert [limiter.wait(1, 1.0, 3) for limiter in (first, second, first, second)] == [0, 0, 0, 1.0]
    first.close()
    assert second.wait(1, 1.0, 3) == 1.0
    second.close()
    third = SharedLimiter(shared, slots=8192, clock=lambda: 1000.0)  # of a version with more places
    assert (third.wait(1, 1.0, 3), third.wait(8191, 1.0, 3)) == (1.0, 0)
    third.close()


HAMMER = """
import sys, time
from pathlib import Path
from headtail.stages.serve.rate_limit import SharedLimiter
limiter, start, admitted = SharedLimiter(Path(sys.argv[1])), float(sys.argv[2]), 0
while time.monotonic() < start:
    pass
while time.monotonic() < start + 1.0:
    admitted += not limiter.wait(1, 1 / 2000, 100)
print(admitted)
"""


@pytest.mark.slow
def test_processes_at_once_admit_a_few_more_at_most(shared: Path) -> None:
    """Three processes that do nothing else for a second, at 2,000/s and a burst of 100: 2,100 in all, and what races let through."""
    SharedLimiter(shared).close()
    start = str(time.monotonic() + limit(3))
    command = [sys.executable, "-c", HAMMER, str(shared), start]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    admitted = sum(int(process.communicate(timeout=limit(60))[0]) for process in running)
    print(f"admitted {admitted} of 2,100")
    assert 1000 < admitted < 1.5 * 2100, "without a shared file it would be 6,300; with writes that lose what others wrote, 3,800"


@needs_redis
def test_redis_keeps_the_limit_of_several_nodes(tmp_path: Path) -> None:
    async def use(url: str) -> None:
        links = [RedisLink(url, timeout_s=limit(5)) for _ in range(2)]
        first, second = map(RedisLimiter, links)
        assert [await limiter.wait("a", 100.0, 3) for limiter in (first, second, first)] == [0, 0, 0]
        assert 99 < await second.wait("a", 100.0, 3) <= 100
        assert await second.wait("b", 100.0, 3) == 0
        assert math.isinf(await first.wait("b", 100.0, 3, cost=4))
        assert await first.wait("c", 0.0, 1) == 0
        with pytest.raises(RequestError, match="too many requests"):
            await first.admit(key(100.0, 3, name="a"))
        found = await asyncio.gather(*(limiter.wait("d", 100.0, 7) for limiter in (first, second) for _ in range(10)))
        assert sum(not wait for wait in found) == 7, "its script runs whole, so no race admits more"
        assert first.open_admissions == 0
        for link in links:
            await link.close()

    with RedisServer(tmp_path) as server:
        asyncio.run(use(server.url))


@needs_redis
def test_redis_agrees_with_the_reference_over_time(tmp_path: Path) -> None:
    async def use(url: str) -> None:
        link = RedisLink(url, timeout_s=limit(5))
        limiter, interval, waits = RedisLimiter(link), 0.02, []
        loop = asyncio.get_running_loop()
        started = loop.time()
        while loop.time() < started + 1:
            waits.append(await limiter.wait("a", interval, 5))
            await asyncio.sleep(0.002)
        admitted, elapsed = sum(not wait for wait in waits), loop.time() - started
        assert 5 + 0.3 * elapsed / interval < admitted <= 5 + elapsed / interval + 1
        assert max(waits) <= interval + 1e-5
        await link.close()

    with RedisServer(tmp_path) as server:
        asyncio.run(use(server.url))


def test_without_redis_every_request_is_admitted_and_counted(tmp_path: Path) -> None:
    async def use() -> None:
        link = RedisLink(f"unix://{tmp_path}/none.sock")
        limiter = RedisLimiter(link)
        assert [await limiter.wait("a", 100.0, 1) for _ in range(10)] == [0] * 10
        assert limiter.open_admissions == 10
        assert link.failures == 3
        await link.close()

    asyncio.run(use())
