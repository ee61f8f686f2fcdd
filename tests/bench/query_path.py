"""A log line becomes a served answer in one process: ingest, plan, precompute with the null engine, publish, one request.

No Ray: the shards are answered by one worker here, so that whoever watches sees every function that runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from headtail.adapters import progress
from headtail.adapters.storage import open_storage
from headtail.batch import driver
from headtail.batch.worker import Worker
from headtail.core.config import TrackingConfig
from headtail.engines import ModelConfig
from headtail.stages import ingest, plan, precompute, publish, serve
from headtail.stages.serve.answerer import Answerer
from headtail.stages.serve.front.app import FrontApp
from headtail.stages.serve.front.counters import Counters, create_counters
from headtail.stages.serve.front.log_pipe import RequestLog
from headtail.stages.serve.front.watch import open_served

from .in_process import answer_shards, replace_attribute


def spread(job: Any, manifest: Any, asks: Sequence[Any], *_: Any) -> list[dict[str, Any]]:
    return answer_shards(Worker(job, manifest, "run"), asks)


def walk(folder: Path) -> None:
    """Raises if the request is not answered from the snapshot."""
    log = folder / "log.csv"
    log.write_text("query\n" + "pizza near me\n" * 3 + "thai food\n" * 2, encoding="utf-8")
    root = str(folder / "store")
    common: dict[str, Any] = {
        "root": root,
        "tracking": TrackingConfig(enabled=False),
        "task": "query_intent",
    }  # labels: null writes no spans
    progress.quiet()
    replace_attribute(driver, "_spread", spread)
    ingest.run(ingest.Config(**common, log=str(log)))
    plan.run(plan.Config(**common))
    precompute.run(precompute.Config(**common, model=ModelConfig(engine="null", model="null")))
    publish.run(publish.Config(**common))
    store = open_storage(root)
    create_counters(folder / "counters", 1)
    counters = Counters(folder / "counters", 0)
    app = FrontApp(Answerer(open_served(store, "current"), serve.Config()), serve.Config(), counters, RequestLog(None, counters))

    async def request() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.post("/v1/answer", json={"query": "Pizza near me"})

    found = asyncio.run(request()).json()
    assert found["cached"], found
