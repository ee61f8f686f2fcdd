"""The realtime student: one engine, asked query by query.

In: a query and its side inputs. Out: a RealtimeReply: the text of its answer, its confidence and answer_key, made with the same
I/O format, grammar, sampling and key as `precompute` uses. vLLM's batches rows join and leave as they come; students in other
engines answer all that wait together. Knows nothing of caches, HTTP or Ray.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from headtail.adapters.storage import open_storage
from headtail.batch.job import answer_settings
from headtail.batch.parsed_answer import confidence
from headtail.core.errors import EngineError
from headtail.core.keys import answer_key, fingerprint
from headtail.core.task import Task
from headtail.engines import Completion, ModelConfig, Request, runs_vllm
from headtail.engines.models import ResolvedModel, check_weights, find_model
from headtail.stages.serve.answerer import RealtimeReply


class Student:
    """A started student.

    `stands_for`: the release's student that it is deployed as; another model runs when the config names one. `digest`: of its weights,
    where the deployment was started.
    """

    def __init__(self, config: ModelConfig, root: str, task: Task, stands_for: str, digest: str) -> None:
        weights = check_weights(find_model(config, open_storage(root)), digest)
        if Path(weights.path).is_dir():
            os.environ.setdefault("HF_HUB_OFFLINE", "1")
        self.task, self.stands_for, self.io_format = task, stands_for, weights.io_format.check(task)
        self._settings = fingerprint(answer_settings(task, config, weights.digest, self.io_format))
        kind: type[_StreamEngine | _BatchedEngine | _EndpointEngine] = _BatchedEngine
        if config.traits.endpoint:
            kind = _EndpointEngine
        elif runs_vllm(config, self.io_format.kind):
            kind = _StreamEngine
        self._engine: _StudentEngine = kind(config, weights, task)

    async def answer(self, query: str, side_inputs: Mapping[str, Sequence[str]]) -> RealtimeReply:
        """The student's answer to one query. A cancelled call takes no more of the engine than it must."""
        messages = self.io_format.messages(self.task, query, side_inputs)
        started, clock = time.time(), time.perf_counter()
        completion = await self._engine.ask(messages)
        seconds = time.perf_counter() - clock
        found = self.io_format.parse_text(self.task, completion.text)
        sure = confidence(completion.text, completion.token_texts, completion.token_logprobs, found.spans)
        key = answer_key(messages, self._settings).hex()
        text = self.io_format.as_json(self.task, completion.text, found)
        return RealtimeReply(
            text, completion.finish_reason, sure, key, self.stands_for, self.task.fingerprint, completion.tokens_in, completion.tokens_out,
            started, seconds,
        )  # fmt: skip

    async def check(self) -> None:
        """Raises when the engine is dead."""
        await self._engine.check()

    def close(self) -> None:
        """End the engine."""
        self._engine.close()


class _StudentEngine(Protocol):
    """An engine that is asked row by row by many callers at once."""

    async def ask(self, messages: Sequence[dict[str, str]]) -> Completion: ...

    async def check(self) -> None: ...

    def close(self) -> None: ...


class _StreamEngine:
    """A decoder in vLLM: each row joins the running batch, and a cancelled one is taken out of it."""

    def __init__(self, config: ModelConfig, model: ResolvedModel, task: Task) -> None:
        from headtail.engines.vllm import VllmEngine

        sampling = task.file.sampling.model_dump() | {"n": 1}
        self._engine = VllmEngine(config, model.path, model.io_format.bound(task, sampling["max_tokens"]), sampling)

    async def ask(self, messages: Sequence[dict[str, str]]) -> Completion:
        future = self._engine.submit(messages)
        await asyncio.wrap_future(future)  # a cancelled call cancels it
        return _check_completion(self._engine.completion(0, future))

    async def check(self) -> None:
        self._engine.check()

    def close(self) -> None:
        self._engine.close()


class _BatchedEngine:
    """Another student: while one batch is with the engine, callers gather for the next. One pass is a few milliseconds."""

    def __init__(self, config: ModelConfig, model: ResolvedModel, task: Task) -> None:
        from headtail.engines import open_engine

        sampling = task.file.sampling.model_dump()
        self._engine = open_engine(config, model.path, model.io_format.bound(task, sampling["max_tokens"]), sampling)
        self._waiting: list[tuple[Sequence[dict[str, str]], asyncio.Future[Completion]]] = []
        self._running: asyncio.Task[None] | None = None

    async def ask(self, messages: Sequence[dict[str, str]]) -> Completion:
        mine: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self._waiting.append((messages, mine))
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())
        return _check_completion(await mine)

    async def _run(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            waiting = [(messages, mine) for messages, mine in batch if not mine.done()]
            try:
                completions = await asyncio.to_thread(self._all, [messages for messages, _ in waiting])
            except Exception as error:
                completions = {row: Completion(row, error=f"{type(error).__name__}: {error}") for row in range(len(waiting))}
            for row, (_, mine) in enumerate(waiting):
                if not mine.done():  # its caller left meanwhile
                    mine.set_result(completions[row])

    def _all(self, messages: Sequence[Sequence[dict[str, str]]]) -> dict[int, Completion]:
        return {made.id: made for made in self._engine.generate(Request(row, asked) for row, asked in enumerate(messages))}

    async def check(self) -> None:
        """It lives in this process: what breaks it breaks the replica."""

    def close(self) -> None:
        self._engine.close()


class _EndpointEngine:
    """A model behind an endpoint: each row is a request of its own, with one try, and a cancelled one is given up."""

    def __init__(self, config: ModelConfig, model: ResolvedModel, task: Task) -> None:
        from headtail.engines.openai import OpenAIEngine

        sampling = task.file.sampling.model_dump() | {"n": 1}
        bound = model.io_format.bound(task, sampling["max_tokens"])
        self._engine = OpenAIEngine(config, model.path, bound if isinstance(bound, dict) else None, sampling)

    async def ask(self, messages: Sequence[dict[str, str]]) -> Completion:
        return _check_completion(await asyncio.wrap_future(self._engine.submit(messages)))

    async def check(self) -> None:
        """An endpoint that is down is no fault of this process: a new one would find it down too."""

    def close(self) -> None:
        self._engine.close()


def _check_completion(completion: Completion) -> Completion:
    if completion.error:
        raise EngineError(completion.error)
    return completion
