"""The client for code that waits by blocking; safe to share between threads, and usable in a forked child."""

from __future__ import annotations

import os
import time
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


class Client:
    """Answers queries: head hits in this process, misses by the server. Keep one per process; it is a context manager."""

    def __init__(self, config: ClientConfig) -> None:
        self._core = ClientCore(config)
        self._connect()

    def answer(self, query: str, side_inputs: SideInputs | None = None) -> Answer:
        """The answer to one query. ClientError when the query or the key is refused, or when there is neither answer nor fallback."""
        clean, found = self._core.look_up(query)
        return found if found is not None else self._drive(self._core.resolve(query, clean, side_inputs))

    def answers(self, queries: Sequence[str]) -> list[Answer | ClientError]:
        """One answer or error for each query, in order; all misses go to the server together."""
        return self._drive(self._core.resolve_many(queries))

    def feedback(
        self, answer: Answer, rating: Rating | None = None, *, used: bool | None = None, corrected: Any = None, comment: str = ""
    ) -> None:
        """Say of an answer whether it was right, whether it was used, or what it should have been.

        ClientError when the server refuses it (a correction that does not fit the task's schema or guardrails), or cannot be reached.
        """
        self._drive(self._core.give_feedback(answer, rating, used, corrected, comment))

    @property
    def counts(self) -> ClientCounts:
        """Hits, misses, fallbacks and so on, so far."""
        return self._core.counts

    @property
    def release(self) -> str:
        """Id of the release whose snapshot is open here; empty without one."""
        return self._core.release

    def refresh(self) -> bool:
        """Look for a new release now; True when another one is open. StorageError when the store cannot be read."""
        return self._core.local is not None and self._core.local.refresh()

    def close(self) -> None:
        """Close connections and end the thread."""
        self._core.close()
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _connect(self) -> None:
        self._pid, self._http = os.getpid(), httpx.Client(trust_env=may_proxy(self._core.config.url), **self._core.http_options())

    def _drive(self, steps: Generator[Send | Sleep, HttpReply | None, T]) -> T:
        if self._pid != os.getpid():
            self._connect()  # a forked child must not write into its parent's connections
        given: Any = None
        while True:
            try:
                step = steps.send(given)
            except StopIteration as done:
                result: T = done.value
                return result
            if isinstance(step, Sleep):
                time.sleep(step.seconds)
                given = None
            else:
                given = self._send(step)

    def _send(self, step: Send) -> HttpReply | None:
        """httpx limits each read; a server that sends a byte now and then is left at the first byte that comes too late."""
        end = time.monotonic() + step.timeout_s
        try:
            with self._http.stream("POST", step.path, json=step.body, timeout=self._core.time_limit(step)) as response:
                parts = []
                for part in response.iter_bytes():
                    parts.append(part)
                    if time.monotonic() > end:
                        return None
                return reply_of(response, b"".join(parts))
        except httpx.HTTPError:
            return None
