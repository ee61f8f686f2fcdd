"""A fixture for tests of what batch inference does rather than of how Ray leads workers.

`answer_here`: all shards of a precompute job in one worker in the test's process, real engine, no Ray Data. Ray's side is tested where
it is the thing under test (test_precompute, test_loop).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from headtail import generate
from headtail.generate.worker import Worker


@pytest.fixture
def answer_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """All shards of a precompute job in one worker in this process."""
    runs = iter(range(1000))

    def spread(job: Any, manifest: Any, asks: Sequence[Any], *_: Any) -> list[dict[str, Any]]:
        worker = Worker(job, manifest, f"run{next(runs)}")
        try:
            return [json.loads(text) for text in worker({"shard": [a.shard for a in asks], "edition": [a.edition for a in asks]})["said"]]
        finally:
            if worker.engine is not None:
                worker.engine.close()

    monkeypatch.setattr(generate, "_spread", spread)
