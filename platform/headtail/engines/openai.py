"""Any OpenAI-compatible endpoint: messages in, completions out, a bounded number of requests in flight.

In: Requests. Out: Completions. 429, 5xx, timeouts and broken connections are tried again here, as late as Retry-After
asks, and are `transient` when they do not stop; other 4xx are final for the row; a refused key or an unknown model ends
the job. A body that is not a chat completion is never an answer. The key comes from $OPENAI_API_KEY and is told to nobody.
"""

from __future__ import annotations

import asyncio
import email.utils
import os
import queue
import random
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx

from headtail.engines import Completion, ModelConfig, Request
from headtail.errors import ConfigError, EngineError

TRIES = 5  # of one request before its row is failed (transient) and left to the next attempt
BACKOFF_S = 0.5  # before the second try; doubles, with jitter
LONGEST_WAIT_S = 60.0  # a longer Retry-After counts as this
_KEY = "OPENAI_API_KEY"


class OpenAIEngine:
    """Requests to `config.base_url`, `config.concurrency` at a time, from one background thread."""

    def __init__(self, config: ModelConfig, model: str, schema: dict[str, Any] | None, sampling: dict[str, Any]) -> None:
        check_url(config.base_url)
        self._config, self._model = config, model
        self._url = config.base_url.rstrip("/") + "/chat/completions"
        self._body = {"model": model, **_sampling(sampling), "logprobs": True}
        if schema is not None:
            self._body["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
        self._resume_at = 0.0  # no request leaves before this (monotonic seconds): Retry-After holds for all of us
        self._fatal: EngineError | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="openai-engine", daemon=True)
        self._thread.start()
        self._client = self._open_client()

    def __repr__(self) -> str:
        return f"OpenAIEngine({self._model!r} at {self._url!r})"

    def _open_client(self) -> httpx.AsyncClient:
        key = os.environ.get(_KEY, "")
        limits = httpx.Limits(max_connections=self._config.concurrency, max_keepalive_connections=self._config.concurrency)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.AsyncClient(timeout=self._config.request_timeout_s, limits=limits, headers=headers)

    def facts(self) -> dict[str, Any]:
        return {
            "engine": "openai",
            "base_url": self._config.base_url,
            "model": self._model,
            "concurrency": self._config.concurrency,
            "request_timeout_s": self._config.request_timeout_s,
            "tries": TRIES,
        }

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Completions as they come back. Pulls a new request for each that ends."""
        source, more, out = iter(requests), True, 0
        arrived: queue.SimpleQueue[Completion] = queue.SimpleQueue()
        flying: set[Any] = set()
        try:
            while more or out:
                while more and out < self._config.concurrency:
                    request = next(source, None)
                    if request is None:
                        more = False
                        break
                    future = asyncio.run_coroutine_threadsafe(self._ask(request, arrived), self._loop)
                    flying.add(future)
                    future.add_done_callback(flying.discard)
                    out += 1
                if out:
                    completion = arrived.get()  # every _ask puts exactly one
                    out -= 1
                    if self._fatal is not None:
                        raise self._fatal
                    yield completion
        finally:
            for future in list(flying):
                future.cancel()

    async def _ask(self, request: Request, arrived: queue.SimpleQueue[Completion]) -> None:
        try:
            completion = await self._tried(request)
        except EngineError as error:
            self._fatal, completion = error, Completion(request.id, finish_reason="error", error=error.what)
        except Exception as error:  # a fault of ours on one row must not leave the loop waiting for it for ever
            completion = Completion(request.id, finish_reason="error", error=f"{type(error).__name__}: {self._clean(str(error))}")
        arrived.put(completion)

    async def _tried(self, request: Request) -> Completion:
        problem = ""
        for attempt in range(TRIES):
            await self._wait_for_turn()
            try:
                sent = self._client.post(self._url, json={**self._body, "messages": list(request.messages)})
                response = await asyncio.wait_for(sent, self._config.request_timeout_s)  # httpx alone restarts its clock at every byte
            except (TimeoutError, httpx.TimeoutException):
                problem = f"no answer within {self._config.request_timeout_s:g} s"
            except httpx.TransportError as error:
                problem = f"no connection: {type(error).__name__}: {self._clean(str(error))}"
            else:
                made = self._read(request.id, response)
                if not (made.error and made.transient):
                    return made
                problem = made.error
                if asked := retry_after(response.headers.get("retry-after", ""), time.time()):
                    self._resume_at = max(self._resume_at, time.monotonic() + min(asked, LONGEST_WAIT_S))
            if attempt + 1 < TRIES:
                await asyncio.sleep(BACKOFF_S * 2**attempt * (0.5 + random.random()))
        return Completion(request.id, finish_reason="error", error=f"{problem} ({TRIES} tries)", transient=True)

    async def _wait_for_turn(self) -> None:
        while (left := self._resume_at - time.monotonic()) > 0:
            await asyncio.sleep(left)

    def _read(self, row: int, response: httpx.Response) -> Completion:
        status = response.status_code
        if status in (401, 404):
            fix = f"set ${_KEY} to a valid key" if status == 401 else "check model.base_url (it ends in /v1) and model.model"
            raise EngineError(f"the endpoint answered {status}: {self._excerpt(response)}", where=self._url, fix=fix)
        if status != 200:
            transient = status in (408, 409, 425, 429) or status >= 500
            return Completion(row, finish_reason="error", error=f"HTTP {status}: {self._excerpt(response)}", transient=transient)
        try:
            return completion_of(row, response.json())
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            said = f"HTTP 200, but not a chat completion: {self._excerpt(response)}"
            return Completion(row, finish_reason="error", error=said, transient=True)

    def _excerpt(self, response: httpx.Response) -> str:
        return self._clean(" ".join(response.text[:400].split()))[:200]

    def _clean(self, text: str) -> str:
        key = os.environ.get(_KEY, "")
        return text.replace(key, "***") if key else text

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._client.aclose(), self._loop).result(timeout=10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        self._loop.close()


def check_url(url: str) -> None:
    """ConfigError unless `url` is http(s) and holds no credentials: it is written into receipts."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            "the openai engine needs the endpoint's base URL", where="model.base_url", value=url, fix="for example https://host/v1"
        )
    if parts.username or parts.password or parts.query:
        fix = f"put the key in ${_KEY}"
        raise ConfigError("base_url must hold no credentials: it is written into receipts", where="model.base_url", fix=fix)


def _sampling(sampling: dict[str, Any]) -> dict[str, Any]:
    found = {name: sampling[name] for name in ("temperature", "top_p", "max_tokens")}
    return found if sampling.get("seed") is None else {**found, "seed": sampling["seed"]}


def retry_after(header: str, now: float) -> float:
    """Seconds that a Retry-After header asks for: a number or an HTTP date; 0 when absent or unreadable."""
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - now)
    except (TypeError, ValueError):
        return 0.0


def completion_of(row: int, body: Any) -> Completion:
    """The Completion in a chat-completions body. Raises KeyError, TypeError or ValueError when it is something else."""
    if not isinstance(body, dict) or body.get("error"):
        raise ValueError("an error body")
    choice = body["choices"][0]
    message, usage = choice["message"], body.get("usage") or {}
    refused = bool(message.get("refusal"))
    text = message.get("refusal") if refused else message["content"]
    if text is None and choice["finish_reason"] != "content_filter":
        raise ValueError("no content")
    tokens = (choice.get("logprobs") or {}).get("content") or []
    return Completion(
        id=row,
        text=str(text or ""),
        finish_reason="content_filter" if refused else str(choice["finish_reason"]),
        tokens_in=int(usage.get("prompt_tokens") or 0),
        tokens_out=int(usage.get("completion_tokens") or 0),
        token_texts=() if refused else tuple(str(token["token"]) for token in tokens),
        token_logprobs=() if refused else tuple(float(token["logprob"]) for token in tokens),
    )
