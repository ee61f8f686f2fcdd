"""Two fixtures for tests of what models do rather than of how Ray leads workers.

`train_here`: one rank of distill.train in a process of its own, on gloo, real DeepSpeed, no Ray Train. `answer_here`: all shards of a
precompute job in one worker in the test's process, real engine, no Ray Data. Ray's side of both is tested where it is the thing under
test (test_distill, test_distill_logits, test_distill_train, test_precompute, test_pipeline).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from bench.in_process import answer_shards
from headtail.batch import driver
from headtail.batch.worker import Worker
from headtail.stages.distill import launch


class Meter:
    """Counts nothing."""

    class add:  # noqa: N801
        @staticmethod
        def remote(**amounts: Any) -> None: ...


@contextlib.contextmanager
def unmetered(*_: Any) -> Iterator[Meter]:
    """In place of meter.job_meter."""
    yield Meter()


def _rank(spec: Any, port: int, rank: int, ranks: int) -> None:
    """A child: as a Ray Train worker is when distill.train begins."""
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu", **place})
    import torch
    from ray import train

    from headtail.stages.distill.train import train_worker

    vars(train)["get_context"] = lambda: SimpleNamespace(get_world_rank=lambda: rank, get_world_size=lambda: ranks)
    torch.distributed.init_process_group("gloo")
    train_worker(spec)


def fit_here(ranks: int) -> Any:
    """In place of launch._fit: so many ranks, each in a process of its own; `workers` of the config does not count."""

    def fit(config: Any, stage: Any, spec: Any) -> None:
        from ports import free_port

        port, spawn = free_port(), multiprocessing.get_context("spawn")
        children = [spawn.Process(target=_rank, args=(spec, port, rank, ranks)) for rank in range(ranks)]
        for child in children:
            child.start()
        for child in children:
            child.join()
        assert [child.exitcode for child in children] == [0] * ranks, "a rank broke: its output is in the captured stderr"

    return fit


@pytest.fixture
def train_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """distill.run trains in one process of its own."""
    monkeypatch.setattr(launch, "_fit", fit_here(1))
    monkeypatch.setattr("headtail.adapters.cluster.start_cluster", lambda cpus=None: None)
    monkeypatch.setattr("headtail.adapters.meter.job_meter", unmetered)


@pytest.fixture
def answer_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """All shards of a precompute job in one worker in this process."""
    runs = iter(range(1000))

    def spread(job: Any, manifest: Any, asks: Sequence[Any], *_: Any) -> list[dict[str, Any]]:
        worker = Worker(job, manifest, f"run{next(runs)}")
        try:
            return answer_shards(worker, asks)
        finally:
            if worker.engine is not None:
                worker.engine.close()

    monkeypatch.setattr(driver, "_spread", spread)
