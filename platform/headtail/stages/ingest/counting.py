"""Counting a log, part by part, then finishing it shard by shard: in this process, or by Ray tasks.

In: LogSplits and IntakeRules. Out: totals, label cells, rows set aside, finished shards: the same from both. On a cluster partial sums
travel through Ray's object store, which spills to disk, and every node must reach the log's files. Knows nothing of stores.
"""

from __future__ import annotations

import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from headtail.adapters import cluster
from headtail.core.errors import InputError
from headtail.stages.ingest.history import HistoryRules
from headtail.stages.ingest.intake import LABEL_CELL, Intake, IntakeRules, Totals
from headtail.stages.ingest.logfile import ColumnSelection, LogSplit, read_split
from headtail.stages.ingest.tally import CountedShard, HoldoutCut, finish_shard

T = TypeVar("T")


class LocalCounter:
    """A log counted in this process. `count` first, then the rest."""

    def __init__(self, system: pafs.FileSystem, rules: IntakeRules, wanted: ColumnSelection, shards: int, folder: Path) -> None:
        self.system, self.selection, self.shard_count = system, wanted, shards
        self.intake = Intake(rules, folder, shards)

    def count(self, parts: Sequence[LogSplit], advance: Callable[[int], None]) -> None:
        """Count every part."""
        for part, sheet in _ahead((one, found) for one in parts for found in read_split(self.system, one, self.selection)):
            self.intake.take(sheet, part.file.name, part.place)
            advance(sheet.table.num_rows + len(sheet.rejects))
        self.intake.close()

    @property
    def totals(self) -> Totals:
        return self.intake.totals

    @property
    def labels(self) -> list[pa.Table]:
        return self.intake.labels

    def set_aside(self) -> Iterator[pa.Table]:
        """Rows set aside, in the order of the log."""
        return self.intake.aside.stream(0)

    def shards(self, cut: HoldoutCut, rules: HistoryRules) -> Iterator[CountedShard]:
        """Finished shards in order of key."""
        with ThreadPoolExecutor(_threads()) as pool:
            waiting, running = deque(range(self.shard_count)), deque[Future[CountedShard]]()
            while waiting or running:
                while waiting and len(running) <= _threads():
                    running.append(pool.submit(self._finish, waiting.popleft(), cut, rules))
                yield running.popleft().result()

    def _finish(self, shard: int, cut: HoldoutCut, rules: HistoryRules) -> CountedShard:
        sides = {name: [spill.shard(shard)] for name, spill in self.intake.sides.items()}
        return finish_shard([self.intake.parts.shard(shard)], sides, cut, rules)


def _threads() -> int:
    return min(4, len(os.sched_getaffinity(0)))


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """`items`, each read by a thread of its own while the one before is worked on."""
    with ThreadPoolExecutor(1) as reader:
        following = reader.submit(next, items, None)
        while (item := following.result()) is not None:
            following = reader.submit(next, items, None)
            yield item


class RayCounter:
    """A log counted by Ray tasks, `workers` at once (0: as many as there are CPUs)."""

    def __init__(self, system: pafs.FileSystem, rules: IntakeRules, wanted: ColumnSelection, shards: int, workers: int) -> None:
        import ray

        cluster.start_cluster()
        self.system, self.rules, self.selection, self.shard_count = system, rules, wanted, shards
        self.workers = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        self.totals, self.labels = Totals(), [LABEL_CELL.empty_table()]
        self._aside: list[Any] = []
        self._pieces: list[list[Any]] = []  # per part of the log, per shard: a reference to (sums, sides)

    def count(self, parts: Sequence[LogSplit], advance: Callable[[int], None]) -> None:
        """Count every part; at most `workers` at once."""
        import ray

        task = ray.remote(num_cpus=1, num_returns="streaming", max_retries=2)(_count)
        waiting, running = deque(parts), deque[Any]()
        while waiting or running:
            while waiting and len(running) < self.workers:
                running.append(task.remote(self.system, waiting.popleft(), self.rules, self.selection, self.shard_count))
            results = list(running.popleft())
            totals, labels = _task_result(results[0])  # first: where a task failed there may be no others
            self.totals.add(totals)
            self.labels.append(labels)
            self._aside.append(results[1])
            self._pieces.append(results[2:])
            advance(totals.rows)

    def set_aside(self) -> Iterator[pa.Table]:
        """Rows set aside, in the order of the log."""
        yield from map(_task_result, self._aside)

    def shards(self, cut: HoldoutCut, rules: HistoryRules) -> Iterator[CountedShard]:
        """Finished shards in order of key."""
        import ray

        task = ray.remote(num_cpus=1, max_retries=2)(_finish)
        waiting, running = deque(range(self.shard_count)), deque[Any]()
        while waiting or running:
            while waiting and len(running) < self.workers:
                shard = waiting.popleft()
                running.append(task.remote(self.rules.side_inputs, cut, rules, *(pieces[shard] for pieces in self._pieces)))
            yield _task_result(running.popleft())


def _task_result(reference: Any) -> Any:
    """A task's result, or its deliberate error as itself, not wrapped by Ray."""
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        raise cluster.unwrap_error(
            error, InputError, "the log could not be counted", fix="run again; HEADTAIL_WORKER_LOGS=1 shows why"
        ) from error


def _count(system: pafs.FileSystem, part: LogSplit, rules: IntakeRules, selection: ColumnSelection, shards: int) -> Iterator[Any]:
    """(totals, human labels), the rows set aside, then per shard (sums, sides)."""
    with tempfile.TemporaryDirectory(prefix="headtail-ingest-") as folder:
        intake = Intake(rules, Path(folder), shards)
        for sheet in read_split(system, part, selection):
            intake.take(sheet, part.file.name, part.place)
        intake.close()
        yield intake.totals, pa.concat_tables([LABEL_CELL.empty_table(), *intake.labels])
        yield intake.aside.shard(0)
        for shard in range(shards):
            yield intake.parts.shard(shard), {name: spill.shard(shard) for name, spill in intake.sides.items()}


def _finish(
    side_inputs: Sequence[str], cut: HoldoutCut, rules: HistoryRules, *pieces: tuple[pa.Table, dict[str, pa.Table]]
) -> CountedShard:
    return finish_shard([sums for sums, _ in pieces], {name: [sides[name] for _, sides in pieces] for name in side_inputs}, cut, rules)
