"""How far a job has come, told by its workers and shown by its driver.

In: counts that workers add from anywhere in the cluster. Out: their totals, polled into a progress bar. One small Ray
actor per job; adding is fire-and-forget, so a slow meter never slows a worker. Decides nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from headtail.progress import bar

POLL_S = 0.5


class _Totals:
    def __init__(self) -> None:
        self.totals: dict[str, float] = {}

    def add(self, **amounts: float) -> None:
        for name, amount in amounts.items():
            self.totals[name] = self.totals.get(name, 0) + amount

    def read(self) -> dict[str, float]:
        return self.totals


@contextmanager
def metered(label: str, total: int | None, unit: str = "rows", done: int = 0) -> Iterator[Any]:
    """A meter actor whose `done` total drives a bar; workers call `meter.add.remote(done=n)`."""
    import ray

    meter = ray.remote(num_cpus=0)(_Totals).remote()
    stop = threading.Event()
    with bar(label, total, unit) as shown:
        shown.update(done)

        def poll() -> None:
            while not stop.wait(POLL_S):
                try:
                    shown.update(done + int(ray.get(meter.read.remote(), timeout=10).get("done", 0)))
                except ray.exceptions.RayError:
                    return  # the bar stands still; the job's own errors are told elsewhere

        thread = threading.Thread(target=poll, daemon=True)
        thread.start()
        try:
            yield meter
        finally:
            stop.set()
            thread.join(timeout=POLL_S * 4)
            ray.kill(meter)
