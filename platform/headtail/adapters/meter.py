"""A job's progress: workers report it, the driver shows it.

In: counts that workers add from anywhere in the cluster. Out: their totals, polled into a progress bar, and back to the
workers a reason to stop, when the driver's `judge` gives one. One small Ray actor per job beside the driver; nobody waits
for it, so a slow meter never slows a worker. Decides nothing.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from headtail.adapters.progress import progress_bar

POLL_S = 0.5


class _Totals:
    def __init__(self) -> None:
        self.totals: dict[str, float] = {}
        self.done: dict[int, float] = {}
        self.before: dict[int, dict[str, float]] = {}
        self.reason = ""

    def add(self, done: dict[int, float] | None = None, before: dict[int, dict[str, float]] | None = None, **amounts: float) -> str:
        self.done.update(done or {})
        self.before = (before or {}) | self.before
        for name, amount in amounts.items():
            self.totals[name] = self.totals.get(name, 0) + amount
        return self.reason

    def stop(self, reason: str) -> None:
        self.reason = self.reason or reason

    def read(self) -> dict[str, float]:
        before: Counter[str] = Counter()
        for amounts in self.before.values():
            before.update(amounts)
        return {**self.totals, **before, "done": sum(self.done.values())}


@contextmanager
def job_meter(
    label: str, total: int | None, unit: str = "rows", done: int = 0, judge: Callable[[Mapping[str, float], float], str] | None = None
) -> Iterator[Any]:
    """A meter actor that drives a bar; workers call `meter.add.remote(...)`, which returns why to stop, or "".

    `done` and `before` are amounts by part of the work, so that a worker that died and came back may tell them again: of
    `done` the last counts, of `before` (named amounts that were there when the part was first opened) the first. Other amounts are
    added up.
    `judge(totals, seconds)` is asked twice a second; what it says is what workers hear.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    meter = ray.remote(num_cpus=0, max_restarts=-1, scheduling_strategy=here)(_Totals).remote()
    stop, begun = threading.Event(), time.monotonic()
    with progress_bar(label, total, unit) as shown:
        shown.begin(done)

        def poll() -> None:
            while not stop.wait(POLL_S):
                try:
                    totals = ray.get(meter.read.remote(), timeout=10)
                    shown.update(done + int(totals.get("done", 0)))
                    if judge is not None and (reason := judge(totals, time.monotonic() - begun)):
                        meter.stop.remote(reason)
                except ray.exceptions.RayError:
                    continue  # the bar stops; the job's own errors are reported elsewhere

        thread = threading.Thread(target=poll, daemon=True)
        thread.start()
        try:
            yield meter
        finally:
            stop.set()
            thread.join(timeout=POLL_S * 4)
            ray.kill(meter)
