"""The realtime student that is no decoder: callers who wait together are answered together, each with its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from headtail.core.errors import EngineError
from headtail.core.task import Task
from headtail.engines import Completion, ModelConfig, Request
from headtail.engines.models import ResolvedModel
from headtail.stages.serve.realtime import _BatchedEngine
from timescale import limit


class Engine:
    """Answers a batch, last row first, with what it was asked; waits for `go` before the first."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.go = threading.Event()
        self.closed = False

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        asked = list(requests)
        self.batches.append([str(request.messages[-1]["content"]) for request in asked])
        assert self.go.wait(limit(10))
        for request in reversed(asked):
            text = str(request.messages[-1]["content"])
            if text == "break":
                raise RuntimeError("broken")
            yield Completion(request.id, text, "stop", error="too long" if text == "long" else "")

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    made = Engine()
    monkeypatch.setattr("headtail.engines.open_engine", lambda *_: made)
    return made


def ask(asked: _BatchedEngine, text: str) -> Any:
    return asked.ask([{"role": "user", "content": text}])


async def started(engine: Engine, batches: int) -> None:
    while len(engine.batches) < batches:
        await asyncio.sleep(0.001)


def test_callers_gather_while_a_batch_runs(engine: Engine, intent: Task) -> None:
    async def main() -> None:
        asked = _BatchedEngine(ModelConfig(), ResolvedModel("", "d", "m"), intent)
        first = asyncio.create_task(ask(asked, "q0"))
        await started(engine, 1)
        others = [asyncio.create_task(ask(asked, f"q{i}")) for i in range(1, 30)]
        left = asyncio.create_task(ask(asked, "left"))
        await asyncio.sleep(0)
        left.cancel()  # its caller went away before its turn
        await asyncio.sleep(0)
        engine.go.set()
        assert (await first).text == "q0"
        assert [(await other).text for other in others] == [f"q{i}" for i in range(1, 30)]
        assert engine.batches == [["q0"], [f"q{i}" for i in range(1, 30)]]
        assert (await ask(asked, "later")).text == "later"
        asked.close()

    asyncio.run(main())
    assert engine.closed


def test_a_row_that_fails_fails_alone_and_an_engine_that_breaks_its_batch(engine: Engine, intent: Task) -> None:
    engine.go.set()

    async def main() -> None:
        asked = _BatchedEngine(ModelConfig(), ResolvedModel("", "d", "m"), intent)
        found = await asyncio.gather(*(ask(asked, text) for text in ("a", "long", "b")), return_exceptions=True)
        assert [getattr(one, "text", str(one)) for one in found] == ["a", "too long", "b"]
        with pytest.raises(EngineError, match="RuntimeError: broken"):
            await ask(asked, "break")
        assert (await ask(asked, "after")).text == "after"

    asyncio.run(main())
