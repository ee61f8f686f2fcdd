"""What both clients share: the local lookup, the exchange with the server, the fallback, and what is counted.

In: a query. Out: an Answer at once, or a generator of Send and Sleep that ends in one. Knows nothing of how to wait.
"""

from __future__ import annotations

import ssl
import time
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import httpx

from headtail.adapters.proxies import may_proxy
from headtail.adapters.server_key import key_headers
from headtail.client.answer import CLIENT_REASONS, Answer, ClientError
from headtail.client.config import ClientConfig
from headtail.client.exchange import Exchanges, HttpReply, NoAnswer, Send, Sleep
from headtail.client.local import LocalHead, clean_query
from headtail.client.report import HitReport
from headtail.core.errors import ConfigError

MOST_QUERIES = 1000  # that the server takes at once
SideInputs = Mapping[str, Sequence[str]]
Rating = Literal["up", "down"]
Steps = Generator[Send | Sleep, HttpReply | None, Answer]
BatchSteps = Generator[Send | Sleep, HttpReply | None, list[Answer | ClientError]]


class ClientCounts(NamedTuple):
    """What a client did so far. Local hits are in no log of the server: count or log them where you call."""

    hits: int
    misses: int
    fallbacks: int
    retries: int
    refresh_failures: int
    breaker_open: bool
    unreported: int = 0  # hits whose report the server did not take


class ClientCore:
    """A client without its connection."""

    def __init__(self, config: ClientConfig) -> None:
        if not config.url and not config.root:
            raise ConfigError("a client needs a server or a store", where="url, root", fix="set url, or root, or both")
        self.config, self.exchanges = config, Exchanges(config)
        self.local = LocalHead(config.root, config.cache_dir, config.refresh_s) if config.root else None
        self._hits = self._misses = self._fallbacks = 0
        self._closed = False
        self._report = HitReport(self._open_http, config.report_s) if config.report_s and config.url and config.root else None

    @property
    def counts(self) -> ClientCounts:
        """The counts so far. With several threads a few counts may be lost."""
        failures = self.local.refresh_failures if self.local else 0
        shared, lost = self.exchanges, self._report.lost if self._report else 0
        return ClientCounts(self._hits, self._misses, self._fallbacks, shared.retries, failures, shared.breaker.is_open, lost)

    def look_up(self, query: str, times: int = 1) -> tuple[str, Answer | None]:
        """The clean text of a query, and its answer when it is here. ClientError when it cannot be taken. `times`: occurrences."""
        if self._closed:
            raise ClientError("closed", "the client is closed", fix="make a new one, or close it later")
        report = self._report
        started = time.perf_counter() if report is not None else 0.0
        clean = clean_query(query, self.config.max_query_chars)
        found = self.local.look_up(query, clean) if self.local is not None else None
        if found is None:
            self._misses += times
        else:
            self._hits += times
            if report is not None:
                report.note(found.release, found.source, time.perf_counter() - started, times)
        return clean, found

    def close(self) -> None:
        """End the threads; the last report is sent. No query is answered after it."""
        self._closed = True
        if self.local is not None:
            self.local.close()
        if self._report is not None:
            self._report.close()

    def _open_http(self) -> httpx.Client:
        return httpx.Client(trust_env=may_proxy(self.config.url), **self.http_options())

    def resolve(self, query: str, clean: str, side_inputs: SideInputs | None) -> Steps:
        """The answer to a miss."""
        body: dict[str, Any] = {"query": query}
        if side_inputs:
            body["side_inputs"] = {name: list(values) for name, values in side_inputs.items()}
        try:
            return Answer.parse((yield from self._ask("/v1/answer", body)))
        except NoAnswer as failure:
            return self._fall_back(query, clean, failure.reason)
        except ValueError:
            return self._fall_back(query, clean, "server_error")

    def resolve_many(self, queries: Sequence[str]) -> BatchSteps:
        """An answer or an error for each query, in order. A query that occurs more than once is asked for once."""
        found: dict[str, Answer | ClientError] = {}
        misses: dict[str, str] = {}
        for query, times in Counter(queries).items():
            try:
                clean, answer = self.look_up(query, times)
            except ClientError as error:
                found[query] = error
            else:
                if answer is not None:
                    found[query] = answer
                else:
                    misses[query] = clean
        waiting = list(misses)
        for start in range(0, len(waiting), MOST_QUERIES):
            part = waiting[start : start + MOST_QUERIES]
            found.update(zip(part, (yield from self._many(part, misses)), strict=True))
        return [found[query] for query in queries]

    def _many(self, part: list[str], clean: Mapping[str, str]) -> BatchSteps:
        try:
            server_ms = max(1, self.config.timeout_ms * 9 // 10)  # what is ready by then comes in time, the rest as the fallback
            rows = (yield from self._ask("/v1/answers", {"queries": part, "timeout_ms": server_ms}))["answers"]
            if len(rows) != len(part):
                raise ValueError("another number of answers than of queries")
            return [ClientError.parse(200, row) if "error" in row else Answer.parse(row) for row in rows]
        except NoAnswer as failure:
            reason = failure.reason
        except (ValueError, KeyError, TypeError):
            reason = "server_error"
        return [self._fall_back(query, clean[query], reason) for query in part]

    @property
    def release(self) -> str:
        """Id of the release whose snapshot is open here; empty without one."""
        return self.local.release if self.local else ""

    def give_feedback(
        self, answer: Answer, rating: Rating | None, used: bool | None, corrected: Any, comment: str
    ) -> Generator[Send | Sleep, HttpReply | None, None]:
        """Tell the server what is said of `answer`. ClientError when it does not take it."""
        body: dict[str, Any] = {"request_id": answer.request_id, "query": answer.query}
        if answer.answer_key is not None:
            body["answer_key"] = answer.answer_key
        if answer.request_id and not answer.degraded:
            body["shown"] = answer.answer
        given = {"rating": rating, "used": used, "answer": corrected, "comment": comment or None}
        body |= {name: value for name, value in given.items() if value is not None}
        try:
            yield from self._ask("/v1/feedback", body)
        except NoAnswer as failure:
            raise ClientError(failure.reason, CLIENT_REASONS[failure.reason], fix="give the feedback again later") from None

    def _ask(self, path: str, body: dict[str, Any]) -> Generator[Send | Sleep, HttpReply | None, Any]:
        if not self.config.url:
            raise NoAnswer("unreachable")
        return (yield from self.exchanges.ask(path, body))

    def _fall_back(self, query: str, clean: str, reason: str) -> Answer:
        if self.local is None or not self.config.fallback:
            raise ClientError(reason, CLIENT_REASONS[reason], fix="ask again later")
        self._fallbacks += 1
        return self.local.fallback(query, clean, reason)

    def http_options(self) -> dict[str, Any]:
        """Arguments of httpx.Client and httpx.AsyncClient, besides `trust_env`: whether the URL is another machine's."""
        config = self.config
        return {
            "base_url": config.url.rstrip("/"),
            "headers": key_headers(config.url, config.api_key, config.key_without_tls) if config.url else {},
            "limits": httpx.Limits(max_connections=config.connections, max_keepalive_connections=config.connections, keepalive_expiry=30.0),
            **({"verify": _trusted(config.ca_file)} if config.ca_file else {}),
            "follow_redirects": False,  # a redirect would carry queries to another host
        }

    def time_limit(self, step: Send) -> httpx.Timeout:
        """Limits of one try: what is left of the caller's time; shorter for a new connection, or for a wait until one is free."""
        left = max(step.timeout_s, 0.001)
        connect = min(left, self.config.connect_timeout_ms / 1000)
        return httpx.Timeout(left, connect=connect, pool=connect)


def _trusted(ca_file: str) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:  # ssl's own errors are among them
        raise ConfigError(f"the certificates cannot be read: {error}", where="ca_file", value=ca_file, fix="name a PEM file") from None


def reply_of(response: httpx.Response, body: bytes) -> HttpReply:
    """A response of httpx without httpx."""
    return HttpReply(response.status_code, body, response.headers.get("retry-after", ""))
