"""The client for asyncio; to be used in one event loop. A head hit does not suspend the caller."""

from __future__ import annotations

import asyncio
from collections.abc import Generator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx

from headtail.adapters.proxies import may_proxy
from headtail.client.answer import Answer, ClientError
from headtail.client.config import ClientConfig
from headtail.client.core import ClientCore, ClientCounts, Rating, SideInputs, reply_of
from headtail.client.exchange import HttpReply, Send, Sleep

T = TypeVar("T")


class AsyncClient:
    """As `Client`, with `await`; it is an asynchronous context manager."""

    def __init__(self, config: ClientConfig) -> None:
        self._core = ClientCore(config)
        self._http = httpx.AsyncClient(trust_env=may_proxy(config.url), **self._core.http_options())

    async def answer(self, query: str, side_inputs: SideInputs | None = None) -> Answer:
        """See `Client.answer`."""
        clean, found = self._core.look_up(query)
        return found if found is not None else await self._drive(self._core.resolve(query, clean, side_inputs))

    async def answers(self, queries: Sequence[str]) -> list[Answer | ClientError]:
        """See `Client.answers`."""
        return await self._drive(self._core.resolve_many(queries))

    async def feedback(
        self, answer: Answer, rating: Rating | None = None, *, used: bool | None = None, corrected: Any = None, comment: str = ""
    ) -> None:
        """See `Client.feedback`."""
        await self._drive(self._core.give_feedback(answer, rating, used, corrected, comment))

    @property
    def counts(self) -> ClientCounts:
        """See `Client.counts`."""
        return self._core.counts

    @property
    def release(self) -> str:
        """See `Client.release`."""
        return self._core.release

    async def refresh(self) -> bool:
        """See `Client.refresh`."""
        return self._core.local is not None and await asyncio.to_thread(self._core.local.refresh)

    async def close(self) -> None:
        """See `Client.close`."""
        await asyncio.to_thread(self._core.close)
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def _drive(self, steps: Generator[Send | Sleep, HttpReply | None, T]) -> T:
        given: Any = None
        while True:
            try:
                step = steps.send(given)
            except StopIteration as done:
                result: T = done.value
                return result
            if isinstance(step, Sleep):
                await asyncio.sleep(step.seconds)
                given = None
            else:
                given = await self._send(step)

    async def _send(self, step: Send) -> HttpReply | None:
        """httpx limits each read; a server that sends a byte now and then is ended by the whole limit."""
        try:
            async with asyncio.timeout(max(step.timeout_s, 0.001)):
                response = await self._http.post(step.path, json=step.body, timeout=self._core.time_limit(step))
                return reply_of(response, response.content)
        except (httpx.HTTPError, TimeoutError):
            return None
