"""Counting a log on a Ray cluster: one task per part of the log, then one per shard of keys.

In: Splits and Rules. Out: totals, gold cells, rows set aside, and finished shards, the same as one process makes. Partial sums
travel through Ray's object store, which spills to disk. Every node must reach the log's files. Knows nothing of stores.
"""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from headtail import cluster
from headtail.intake import GOLD_CELL, Intake, Rules, Totals
from headtail.logfile import Split, Wanted, read
from headtail.tally import Cut, finish


class Spread:
    """A log counted by Ray tasks. `count` first, then `shards`."""

    def __init__(self, system: pafs.FileSystem, rules: Rules, wanted: Wanted, shards: int, workers: int) -> None:
        import ray

        cluster.start()
        self.system, self.rules, self.wanted, self.shard_count = system, rules, wanted, shards
        self.workers = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        self.totals, self.gold = Totals(), [GOLD_CELL.empty_table()]
        self._aside: list[Any] = []
        self._pieces: list[list[Any]] = []  # per part of the log, per shard: a reference to (sums, sides)

    def count(self, parts: Sequence[Split], advance: Callable[[int], None]) -> None:
        """Count every part; at most `workers` at once."""
        import ray

        task = ray.remote(num_cpus=1, num_returns="streaming", max_retries=2)(_count)
        waiting, running = deque(parts), deque[Any]()
        while waiting or running:
            while waiting and len(running) < self.workers:
                running.append(task.remote(self.system, waiting.popleft(), self.rules, self.wanted, self.shard_count))
            head, *pieces = _gathered(running.popleft())
            totals, gold, aside = head
            self.totals.add(totals)
            self.gold.append(gold)
            self._aside.append(aside)
            self._pieces.append(pieces)
            advance(totals.rows)

    def set_aside(self) -> Iterator[pa.Table]:
        """Rows set aside, in the order of the log."""
        yield from self._aside

    def shards(self, cut: Cut) -> Iterator[tuple[pa.Table, pa.Table]]:
        """Finished shards in order of key: queries and later traffic."""
        import ray

        task = ray.remote(num_cpus=1, max_retries=2)(_finish)
        waiting, running = deque(range(self.shard_count)), deque[Any]()
        while waiting or running:
            while waiting and len(running) < self.workers:
                shard = waiting.popleft()
                running.append(task.remote(self.rules.side_inputs, cut, *(pieces[shard] for pieces in self._pieces)))
            yield ray.get(running.popleft())


def _gathered(generator: Any) -> list[Any]:
    """The head of a counting task by value, its shards by reference."""
    import ray

    head, *pieces = list(generator)
    return [_reraised(lambda: ray.get(head)), *pieces]


def _reraised(get: Callable[[], Any]) -> Any:
    """A deliberate error of a task as itself, not wrapped by Ray."""
    import ray

    try:
        return get()
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, Exception) else error from None


def _count(system: pafs.FileSystem, part: Split, rules: Rules, wanted: Wanted, shards: int) -> Iterator[Any]:
    """(totals, gold, set aside), then per shard (sums, sides)."""
    with tempfile.TemporaryDirectory(prefix="headtail-ingest-") as folder:
        intake = Intake(rules, Path(folder), shards)
        for sheet in read(system, part, wanted):
            intake.take(sheet, part.file.name, part.place)
        intake.close()
        yield intake.totals, pa.concat_tables([GOLD_CELL.empty_table(), *intake.gold]), intake.aside.shard(0)
        for shard in range(shards):
            yield intake.parts.shard(shard), {name: spill.shard(shard) for name, spill in intake.sides.items()}


def _finish(side_inputs: Sequence[str], cut: Cut, *pieces: tuple[pa.Table, dict[str, pa.Table]]) -> tuple[pa.Table, pa.Table]:
    return finish([sums for sums, _ in pieces], {name: [sides[name] for _, sides in pieces] for name in side_inputs}, cut)
