"""What the key file, the dynamic tier and Redis did in this front process, and its processor time, for /metrics.

In: the admission check, the dynamic tier. Out: numbers in the shared counters, once a second: on the way of a request nothing is written.
"""

from __future__ import annotations

import asyncio
import time

from headtail.stages.serve.admission import ClusterAdmission, KeyAdmission
from headtail.stages.serve.dynamic import DynamicTier, RedisAnswers
from headtail.stages.serve.front.counters import Counters
from headtail.stages.serve.principal import Admit

_EVERY_S = 1.0


def store_counts(admit: Admit, dynamic: DynamicTier | None) -> dict[str, int]:
    """By name of the counter."""
    links = [dynamic.store.link] if dynamic is not None and isinstance(dynamic.store, RedisAnswers) else []
    links += [admit.limiter.link] if isinstance(admit, ClusterAdmission) else []
    return {
        "dynamic_misses": dynamic.misses if dynamic is not None else 0,
        "dynamic_spoiled": dynamic.spoiled if dynamic is not None else 0,
        "redis_failures": sum(link.failures for link in links),
        "redis_skipped": sum(link.skipped for link in links),
        "unlimited": admit.limiter.open_admissions if isinstance(admit, ClusterAdmission) else 0,
        "key_file_failures": admit.reload_failures if isinstance(admit, KeyAdmission | ClusterAdmission) else 0,
    }


async def follow_counts(counters: Counters, admit: Admit, dynamic: DynamicTier | None) -> None:
    """Write them for as long as the process serves."""
    while True:
        for name, value in store_counts(admit, dynamic).items():
            counters.set(name, value)
        await asyncio.sleep(_EVERY_S)


async def follow_processor(counters: Counters) -> None:
    """Write the processor time of this process, for all its tasks, for as long as it serves."""
    while True:
        counters.set("cpu_microseconds", 1e6 * time.process_time())
        await asyncio.sleep(_EVERY_S)
