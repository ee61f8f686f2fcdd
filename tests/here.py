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

ALONE = {"MASTER_ADDR": "127.0.0.1", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu"}


class Meter:
    """Counts nothing."""

    class add:  # noqa: N801
        @staticmethod
        def remote(**amounts: Any) -> None: ...


@contextlib.contextmanager
def _unmetered(*_: Any) -> Iterator[Meter]:
    yield Meter()


def _rank(spec: Any, port: int) -> None:
    """The child: as a Ray Train worker is when distill.train begins."""
    os.environ.update({**ALONE, "MASTER_PORT": str(port)})
    import torch
    from ray import train

    from headtail.stages.distill.train import train_worker

    vars(train)["get_context"] = lambda: SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
    torch.distributed.init_process_group("gloo")
    train_worker(spec)


@pytest.fixture
def train_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """distill.run trains in one process of its own; `workers` of its config does not count."""

    def fit(config: Any, stage: Any, spec: Any) -> None:
        from ports import free_port

        child = multiprocessing.get_context("spawn").Process(target=_rank, args=(spec, free_port()))
        child.start()
        child.join()
        assert child.exitcode == 0, "the rank broke: its output is in the captured stderr"

    monkeypatch.setattr(launch, "_fit", fit)
    monkeypatch.setattr("headtail.adapters.cluster.start_cluster", lambda cpus=None: None)
    monkeypatch.setattr("headtail.adapters.meter.job_meter", _unmetered)


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
