"""What the simulator's probe makes of a server: its parts' times are found again, from outside and from its metrics."""

from __future__ import annotations

import asyncio
import contextlib
import json

import numpy as np
import pytest

from headtail.core.errors import InputError
from headtail.stages.simulate import probe
from headtail.stages.simulate.design import ServiceTimes
from headtail.stages.simulate.probe import CROWD, RESTS_MS, AloneTimes, row_share, service_times
from timescale import limit


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_the_share_of_a_further_row_is_found_again(share: float) -> None:
    """Sixteen callers, each with its next miss as soon as it is answered: the simulator's own engine, driven by hand."""
    alone, waiting, now, answered = 0.005, 15, 0.0, 0
    batch = 1
    while answered < 10_000:
        now += alone * (1 + (batch - 1) * share)
        answered, batch, waiting = answered + batch, waiting, batch
    assert row_share(now / answered, alone, 16) == pytest.approx(share, abs=0.01)


def test_times_that_are_measured_are_found_again() -> None:
    """What the probe sees of a server whose parts work as long as these say, and of its processor time, gives these again."""
    rng, rests = np.random.default_rng(0), np.tile(np.arange(len(RESTS_MS)), 100)
    front, student, paces = np.array([0.2, 0.3, 0.4, 0.5]), np.full(4, 2.0), (0.5, 0.6, 0.8, 1.0)
    for _ in range(20):  # a front rests while the student works, and a student while the front works
        reply = 1.5 * np.interp(student, RESTS_MS, front)
        student = 4 * np.interp(np.array(RESTS_MS) + 0.1 + front + reply, RESTS_MS, paces)
    hit = AloneTimes((0.1 + front[rests] + rng.exponential(0.02, 400)) / 1000, rests, float(front.mean()) / 1000)
    miss = AloneTimes((0.1 + (front + reply + student)[rests]) / 1000, rests, float((front + reply).mean()) / 1000)
    found = service_times(hit, miss, 0.0004)
    assert found.front_ms[0] == pytest.approx(0.5, rel=0.05)
    assert found.front_rest == pytest.approx((0.4, 0.6, 0.8, 1), abs=0.03)
    assert np.median(found.wire_ms) == pytest.approx(0.1, rel=0.2)
    assert found.miss_ms[0] == pytest.approx(0.75, rel=0.05)
    assert np.median(found.student_ms) == pytest.approx(4.0, rel=0.05)
    assert found.student_rest[1:] == pytest.approx(paces[1:], abs=0.03)
    assert paces[0] <= found.student_rest[0] <= paces[1]  # no student was seen without a rest
    assert found.row_share == row_share(0.0004, found.student_rest[0] * float(np.median(found.student_ms)) / 1000, 16)


def test_a_server_is_measured_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server of this process: hits at once, each miss after 20 ms. Its metrics say that a miss takes a front 5 ms."""
    monkeypatch.setattr(probe, "COUNTED_S", 0)
    worked = 0.0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal worked
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if b"/metrics" in head:
                    body = f"headtail_front_cpu_seconds_total {worked}\n".encode()
                else:
                    hit = b"query=hit" in head
                    worked += 0 if hit else 0.005
                    await asyncio.sleep(0 if hit else 0.02)
                    body = json.dumps({"cached": hit, "source": "teacher" if hit else "realtime_student", "reason": ""}).encode()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        writer.close()

    async def measured(misses: int) -> ServiceTimes:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server:
            hits, unknown = [f"hit {n}" for n in range(80)], [f"miss {n}" for n in range(misses)]
            return await probe.measure_times(url, f"{url}/metrics", hits, unknown, 0)

    found = asyncio.run(measured(CROWD + 80))
    assert len(found.wire_ms) == 80 - probe.CONNECTIONS
    assert len(found.student_ms) == 80 - probe.CONNECTIONS
    assert 8 < np.median(found.student_ms) < 15 + limit(10)  # 15 on a machine that does nothing else; the arithmetic is tested above
    assert 1 < found.miss_ms[0] < 15  # 5 there
    assert found.row_share < 0.25


def test_a_server_without_such_metrics_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "COUNTED_S", 0)
    with pytest.raises(InputError, match="no metrics"):
        asyncio.run(probe.front_seconds("http://127.0.0.1:9/metrics"))


@pytest.mark.parametrize(
    "url, wanted",
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8001/metrics"),
        ("https://[::1]:8443/", "https://[::1]:8444/metrics"),
        ("http://answers", "http://answers:81/metrics"),
    ],
)
def test_metrics_are_on_the_port_of_the_pages(url: str, wanted: str) -> None:
    assert probe.metrics_of(url) == wanted
