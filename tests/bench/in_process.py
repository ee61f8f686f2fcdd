"""Batch inference without Ray, for tests and benchmarks: one worker answers all shards in this process."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from headtail.batch.worker import Worker


def replace_attribute(module: Any, name: str, value: Any) -> None:
    """Put `value` in the place of what `module` calls `name`, which must be there."""
    assert hasattr(module, name), f"{module.__name__} has no {name} any more"
    setattr(module, name, value)


def answer_shards(worker: Worker, asks: Sequence[Any]) -> list[dict[str, Any]]:
    """The worker's reports on `asks`: what `driver._spread` returns of a cluster."""
    batch = {"shard": [ask.shard for ask in asks], "edition": [ask.edition for ask in asks]}
    return [json.loads(text) for text in worker(batch)["report"]]
