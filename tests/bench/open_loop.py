"""An open loop: requests at random times (Poisson), whatever became of those before, each over a connection that is free.

In: a URL, queries, a rate. Out: what came back for each, how late each was sent, and how busy this process was. A request whose
connection is lost is not sent again. Knows nothing of what is measured.
"""

from __future__ import annotations

import asyncio
import gc
import random
import time
from collections.abc import Sequence
from typing import NamedTuple

from headtail.stages.simulate.probe import ProbeConnection, ProbeExchange

CONNECTIONS = 64  # open from the start; more are opened when these are taken
LONGEST_S = 20.0  # without an answer: lost


class Sending(NamedTuple):
    """In the order of the queries. `late_ms`: between the time to send and the sending; `busy`: share of a core that this process took."""

    exchanges: list[ProbeExchange]
    late_ms: list[float]
    busy: float


async def send_at_random(url: str, queries: Sequence[str], rate: float, seed: int) -> Sending:
    """Every query once, `rate` per second."""
    rng = random.Random(seed)
    free = [ProbeConnection(url) for _ in range(CONNECTIONS)]
    for connection in free:
        await connection.open()
    found: list[ProbeExchange] = [ProbeExchange(0.0, 0.0, 0, False, b"")] * len(queries)
    late: list[float] = []

    async def one(place: int) -> None:
        connection = free.pop(rng.randrange(len(free))) if free else ProbeConnection(url)
        began = time.perf_counter()
        try:
            async with asyncio.timeout(LONGEST_S):
                found[place] = await connection.exchange(queries[place])
        except (OSError, asyncio.IncompleteReadError) as error:
            connection.close()
            found[place] = ProbeExchange(began, time.perf_counter() - began, 0, False, type(error).__name__.encode())
        free.append(connection)

    due = begun = time.perf_counter()
    worked = time.process_time()
    gc.disable()
    async with asyncio.TaskGroup() as group:
        for place in range(len(queries)):
            due += rng.expovariate(rate)
            if (pause := due - time.perf_counter()) > 0:
                await asyncio.sleep(pause)
            late.append(1000 * (time.perf_counter() - due))
            group.create_task(one(place))
    gc.enable()
    busy = (time.process_time() - worked) / (time.perf_counter() - begun)
    for connection in free:
        connection.close()
    return Sending(found, late, busy)
