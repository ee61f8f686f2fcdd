"""Any OpenAI-compatible endpoint: messages in, completions out, with as many concurrent requests as the endpoint accepts.

In: Requests. Out: Completions. 429, 5xx, timeouts and broken connections are tried again here, as late as Retry-After
asks of that row, and are `transient` when they do not stop; other 4xx are final for the row; a refused key, an empty account, a
day's quota that is used up or an unknown model ends the job. A body that is not a chat completion is never an answer. The key comes
from $OPENAI_API_KEY and goes to the endpoint only. How fast requests leave is rate_limit.py's.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import email.utils
import math
import os
import queue
import random
import re
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import httpx

from headtail.adapters.proxies import is_loopback, may_proxy
from headtail.core.errors import ConfigError, EngineError, HeadtailError
from headtail.core.io_format import merge_system_message
from headtail.core.secrets import hide
from headtail.engines.base import Completion, ModelConfig, Request
from headtail.engines.chat import completion_of_chat, refused_setting
from headtail.engines.rate_limit import RateLimiter

TRIES = 5  # of one request before its row is failed (transient) and left to the next attempt
BACKOFF_S = 0.5  # before the second try; doubles, with jitter
LONGEST_WAIT_S = 60.0  # a row whose Retry-After is longer ends as failed
FORBIDDEN = 8  # rows refused with a status of address or rights, and none answered, after which it is the config and not the rows
SILENT_S = 600.0  # without an answer to any row, after which an endpoint that answered before counts as down
SILENT_FIRST_S = 60.0  # the same before its first answer, and no less than two time limits of a request
SILENT_ROWS = 5  # that got no answer meanwhile, at least: fewer may be too slow by themselves
MISFITS = 2  # rows refused for a setting, and none answered, after which it is the config: one alone could have put the words there
_PUSHED = (429, 503, 529)
_OF_ROW = (400, 408, 409, 413, 422, 425, 429)  # of 4xx: they may speak of one row; all others speak of address or rights
_UNPAID = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active")  # a 429 that waiting does not remove
# A 429 about a day's quota: Gemini's quotaId (GenerateRequestsPerDayPerProjectPerModel) and metric (..._per_day), OpenAI's and Groq's
# "requests per day (RPD)". A limit per minute passes while a row waits; this one does not, and each try may count against it.
_DAILY = re.compile(r"per[ _-]?day|\bdaily (?:quota|limit)|\b[RT]PD\b", re.IGNORECASE)
_CHARS_PER_TOKEN = 4  # of a prompt, until the endpoint says how many it was
_KEY = "OPENAI_API_KEY"


class OpenAIEngine:
    """Requests to `config.base_url`, at most `config.concurrency` at a time, from one background thread."""

    def __init__(self, config: ModelConfig, model: str, schema: dict[str, Any] | None, sampling: dict[str, Any]) -> None:
        check_url(config.base_url)
        self._key = key_for(config)
        self._config, self._model = config, model
        self._url = config.base_url.rstrip("/") + "/chat/completions"
        self._host = urlsplit(config.base_url).netloc
        self._body = {"model": model, **_sampling(sampling, config.max_tokens_field), **({"logprobs": True} if config.ask_logprobs else {})}
        self._samples = int(sampling.get("n", 1))
        self._most_tokens = int(sampling["max_tokens"]) * self._samples
        if schema is not None:
            self._body["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
        self._pace = RateLimiter(config.concurrency, config.requests_per_minute, config.tokens_per_minute)
        self._line, self._came_back = asyncio.Lock(), asyncio.Event()
        self._answered = self._forbidden = self._misfits = 0
        self._heard_at, self._silent_rows = math.inf, set[int]()  # since when no row got an answer, and which rows waited for one
        self._fatal: HeadtailError | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="openai-engine", daemon=True)
        self._thread.start()
        self._client = self._open_client()

    def __repr__(self) -> str:
        return f"OpenAIEngine({self._model!r} at {self._url!r})"

    def _open_client(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=self._config.concurrency, max_keepalive_connections=self._config.concurrency)
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        return httpx.AsyncClient(timeout=self._config.request_timeout_s, limits=limits, headers=headers, trust_env=may_proxy(self._url))

    def facts(self) -> dict[str, Any]:
        return {
            "engine": "openai",
            "base_url": self._config.base_url,
            "model": self._model,
            "concurrency": self._config.concurrency,
            "concurrency_now": int(self._pace.limit),
            "requests_sent": self._pace.sent,
            "requests_pushed_back": self._pace.pushes,
            "requests_per_minute": self._config.requests_per_minute,
            "tokens_per_minute": self._config.tokens_per_minute,
            "request_timeout_s": self._config.request_timeout_s,
            "tries": TRIES,
            "samples": self._samples,
        }

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Completions as they come back. Pulls a new request for each that ends."""
        source, more, out = iter(requests), True, 0
        arrived: queue.SimpleQueue[Completion] = queue.SimpleQueue()
        flying: set[Any] = set()
        self._heard_at = math.inf
        self._silent_rows.clear()
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

    def submit(self, messages: Sequence[dict[str, str]]) -> concurrent.futures.Future[Completion]:
        """One request, tried once, for a caller who cannot wait for a second try. Cancelling the future gives the request up."""
        return asyncio.run_coroutine_threadsafe(self._once_alone(Request(0, messages)), self._loop)

    async def _once_alone(self, request: Request) -> Completion:
        completion, _ = await self._once(request)
        return completion

    async def _ask(self, request: Request, arrived: queue.SimpleQueue[Completion]) -> None:
        try:
            completion = await self._ask_with_retries(request)
        except HeadtailError as error:
            self._fatal, completion = error, Completion(request.id, finish_reason="error", error=error.what)
        except Exception as error:  # a bug on one row must not make the loop wait for ever
            completion = Completion(request.id, finish_reason="error", error=f"{type(error).__name__}: {hide(str(error))}")
        arrived.put(completion)

    async def _ask_with_retries(self, request: Request) -> Completion:
        completion = Completion(request.id)
        for attempt in range(TRIES):
            completion, asked = await self._once(request)
            self._judge_silence(request, completion)
            if not (completion.error and completion.transient):
                return completion
            if asked > LONGEST_WAIT_S:
                text = f"{completion.error} (the endpoint asks to wait {asked:,.0f} s, the limit is {LONGEST_WAIT_S:g} s)"
                return replace(completion, error=text, transient=False, passing=True)
            if attempt + 1 < TRIES:
                await asyncio.sleep(max(asked, BACKOFF_S * 2**attempt * (0.5 + random.random())))
        return replace(completion, error=f"{completion.error} ({TRIES} tries)")

    async def _once(self, request: Request) -> tuple[Completion, float]:
        """One try, when it is its turn, and the seconds that the endpoint asks this row to wait before the next."""
        tokens = sum(len(message["content"]) for message in request.messages) // _CHARS_PER_TOKEN + self._most_tokens
        await self._turn(tokens)
        self._heard_at = min(self._heard_at, time.monotonic())
        left, pushed, used, wait_s = time.monotonic(), False, tokens, 0.0
        try:
            body = {**self._body, "messages": self._messages(request)}
            sent = self._client.post(self._url, json=body)
            response = await asyncio.wait_for(sent, self._config.request_timeout_s)  # httpx alone restarts its clock at every byte
            pushed = response.status_code in _PUSHED
            if wait_s := retry_after(response.headers.get("retry-after", ""), time.time()):
                self._pace.pause(time.monotonic(), wait_s)
            completion = self._read(request, response, body)
            if not completion.error:
                used = completion.tokens_in + completion.tokens_out + sum(sample.tokens_out for sample in completion.samples)
            return completion, wait_s
        except (TimeoutError, httpx.TimeoutException):
            pushed = True
            return _transient_failure(request.id, f"no answer within {self._config.request_timeout_s:g} s from {self._host}"), wait_s
        except httpx.TransportError as error:
            pushed = True
            return _transient_failure(request.id, f"no connection to {self._host}: {type(error).__name__}: {hide(str(error))}"), wait_s
        except httpx.DecodingError as error:
            return _transient_failure(request.id, f"a reply of {self._host} that cannot be unpacked: {hide(str(error))}"), wait_s
        finally:
            self._pace.back(time.monotonic(), left, pushed, tokens - used)
            self._came_back.set()

    def _judge_silence(self, request: Request, completion: Completion) -> None:
        """EngineError when the endpoint has answered nothing for too long: its rows would wait through all their tries, for hours."""
        now = time.monotonic()
        if not (completion.error and completion.transient):
            self._heard_at = now
            self._silent_rows.clear()
        elif request.sample and not request.again:
            self._silent_rows.add(request.id)
        longest = SILENT_S if self._answered else min(SILENT_S, max(SILENT_FIRST_S, 2 * self._config.request_timeout_s))
        if now - self._heard_at >= longest and len(self._silent_rows) >= SILENT_ROWS:
            raise EngineError(
                f"the endpoint has answered no row for {now - self._heard_at:,.0f} s; the last try: {completion.error}",
                where=self._url,
                value=f"model {self._model}",
                fix="check that it is up and model.base_url; raise model.request_timeout_s if its answers take longer; "
                "finished rows are kept: run again",
            )

    def _messages(self, request: Request) -> list[dict[str, str]]:
        return merge_system_message(request.messages) if self._config.system_role == "merge" else list(request.messages)

    async def _turn(self, tokens: int) -> None:
        """Wait, in line, until the pace lets a request leave, and let it leave."""
        async with self._line:
            while wait := self._pace.wait(time.monotonic()):
                self._came_back.clear()
                try:
                    await asyncio.wait_for(self._came_back.wait(), wait if math.isfinite(wait) else None)
                except TimeoutError:
                    continue
            self._pace.leave(tokens)

    def _read(self, request: Request, response: httpx.Response, sent: dict[str, Any]) -> Completion:
        row, status = request.id, response.status_code
        self._raise_fatal(request, response)
        if status in (400, 422):
            return self._misfit(request, response, sent)
        if status != 200:
            transient = status in (408, 409, 425, 429) or status >= 500
            return Completion(row, finish_reason="error", error=f"HTTP {status}: {self._excerpt(response)}", transient=transient)
        try:
            made = completion_of_chat(row, response.json(), self._samples)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError) as error:
            problem = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"  # ours says it in words
            return _transient_failure(row, f"HTTP 200, but not a chat completion ({problem}): {self._excerpt(response)}")
        self._answered += not made.error
        return made

    def _misfit(self, request: Request, response: httpx.Response, sent: dict[str, Any]) -> Completion:
        """A row that the endpoint does not take. ConfigError when it blames what all rows share, before any other row is answered."""
        said, setting = f"HTTP {response.status_code}: {self._excerpt(response)}", refused_setting(response.text[:4000], sent)
        if setting is None:
            return Completion(request.id, finish_reason="error", error=said)
        self._misfits += not request.again
        if self._misfits >= MISFITS and not self._answered:
            raise ConfigError(said, where=setting.where, value=f"model {self._model}", fix=setting.fix)
        return Completion(request.id, finish_reason="error", error=f"{said} ({setting.where}: {setting.fix})")

    def _raise_fatal(self, request: Request, response: httpx.Response) -> None:
        """Raise for what no other row would fare better with: ConfigError for key, URL and model, EngineError for account and quota."""
        status, words = response.status_code, f"the endpoint answered {response.status_code}: {self._excerpt(response)}"
        walled = 400 <= status < 500 and status not in _OF_ROW
        self._forbidden += walled and not request.again
        certain = not self._answered and self._forbidden >= FORBIDDEN
        if status == 401 or (status == 403 and certain):
            raise ConfigError(
                words, where=self._url, value=f"model {self._model}", fix=f"set ${_KEY} to a valid key that may use this model"
            )
        if status == 404 or (walled and status != 402 and certain):
            fix = "check model.base_url (it ends in /v1) and model.model"
            raise ConfigError(words, where=self._url, value=f"model {self._model}", fix=fix)
        if 300 <= status < 400:
            fix = "set model.base_url to the final address; redirects are not followed, because the key would be sent along"
            raise ConfigError(f"{words}; it redirects to {hide(response.headers.get('location', 'nowhere'))}", where=self._url, fix=fix)
        if status == 402 or (status == 429 and any(code in response.text[:2000] for code in _UNPAID)):
            fix = "the key's account has no money or quota left: add some and run again; finished rows are kept"
            raise EngineError(words, where=self._url, value=f"model {self._model}", fix=fix)
        if status == 429 and _DAILY.search(response.text[:8000]):
            fix = "the key's quota for a day is used up: run again when it is renewed, or ask the provider for more; finished rows are kept"
            raise EngineError(words, where=self._url, value=f"model {self._model}", fix=fix)

    def _excerpt(self, response: httpx.Response) -> str:
        return hide(" ".join(response.text[:2000].split()))[:200]

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._client.aclose(), self._loop).result(timeout=10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        self._loop.close()


def check_url(url: str) -> None:
    """ConfigError unless `url` is http(s) and holds no credentials: it is written into receipts."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        what = "the openai engine needs the endpoint's base URL, with http:// or https:// before its host"
        raise ConfigError(what, where="model.base_url", value=url, fix="for example https://host/v1")
    if parts.username or parts.password or parts.query:
        fix = f"put the key in ${_KEY}"
        raise ConfigError("base_url must hold no credentials: it is written into receipts", where="model.base_url", fix=fix)


def key_for(config: ModelConfig) -> str:
    """The key for `config.base_url`, "" when the environment has none. ConfigError, without the key, when it may not go there.

    It goes over https, to this machine, or to a host that the config names in `key_hosts`. httpx follows no redirect, so nowhere else.
    """
    key, parts = os.environ.get(_KEY, "").strip(), urlsplit(config.base_url)
    if not re.fullmatch(r"[\x21-\x7e]*", key):
        what = "the key holds a blank, a line break or a character that no HTTP header may have"
        raise ConfigError(what, where=f"${_KEY}", fix="set it again, without quotes or line breaks inside")
    host = parts.hostname or ""
    if key and parts.scheme != "https" and not is_loopback(host) and host not in config.key_hosts:
        fix = f"use https; or, when the network between is yours, name the host in model.key_hosts; or unset ${_KEY} if it needs no key"
        raise ConfigError("the key would leave this machine unencrypted", where="model.base_url", value=config.base_url, fix=fix)
    return key


def _sampling(sampling: dict[str, Any], limit: str) -> dict[str, Any]:
    found = {"temperature": sampling["temperature"], "top_p": sampling["top_p"], limit: sampling["max_tokens"]}
    found |= {} if sampling.get("seed") is None else {"seed": sampling["seed"]}
    return found | ({"n": sampling["n"]} if sampling.get("n", 1) > 1 else {})


def _transient_failure(row: int, problem: str) -> Completion:
    return Completion(row, finish_reason="error", error=problem, transient=True)


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
