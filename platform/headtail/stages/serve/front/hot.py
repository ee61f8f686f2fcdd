"""The hot path: bytes of a request in; bytes of the response out where an override or the snapshot answers, else a Miss.

In: the query string of a GET or the body of a POST. Out: a Hit, a Miss, or a RequestError. The stored answer is not decoded: the
response is put together from bytes. Nothing here waits, and nothing here knows of sockets, students or counters.
"""

from __future__ import annotations

import itertools
import json
import secrets
import time
from collections.abc import Mapping
from typing import Annotated, NamedTuple
from urllib.parse import unquote_to_bytes

import msgspec
from pydantic import ValidationError

from headtail.cache import StoredAnswer
from headtail.stages.serve.answerer import Answerer, Miss, OpenRelease, Reply
from headtail.stages.serve.api import ITEM_CHARS, MOST_ITEMS, MOST_SIDE_INPUTS, AnswerRequest
from headtail.stages.serve.errors import RequestError, validation_error

_Item = Annotated[str, msgspec.Meta(max_length=ITEM_CHARS)]
_Items = Annotated[list[_Item], msgspec.Meta(max_length=MOST_ITEMS)]


class _Body(msgspec.Struct, forbid_unknown_fields=True):
    """`api.AnswerRequest`, read ten times as fast."""

    query: str
    side_inputs: Annotated[dict[str, _Items], msgspec.Meta(max_length=MOST_SIDE_INPUTS)] = {}


_decode = msgspec.json.Decoder(_Body).decode
_encode = msgspec.json.Encoder().encode
_MOST_SHAPES = 64  # a release has as many as sources, two releases at a time
_NO_SIDE_INPUTS: Mapping[str, list[str]] = {}


class Hit(NamedTuple):
    """An answer that is ready to be sent. `seconds`: what it took here."""

    body: bytes
    clean: str
    found: StoredAnswer
    served: OpenRelease
    seconds: float


class RequestIds:
    """Ids of requests: a random part per process, then a number; 20 characters."""

    def __init__(self) -> None:
        self._prefix, self._numbers = secrets.token_hex(6), itertools.count(1)

    def next(self) -> str:
        return f"{self._prefix}{next(self._numbers) & 0xFFFFFFFF:08x}"


def read_get(query_string: bytes) -> str:
    """The query of `?query=`, as browsers and curl encode it. RequestError when it is absent or no UTF-8."""
    for part in query_string.split(b"&"):
        if part.startswith(b"query="):
            raw = part[6:]
            if b"+" in raw:
                raw = raw.replace(b"+", b" ")
            if b"%" in raw:
                raw = unquote_to_bytes(raw)
            try:
                return raw.decode()
            except UnicodeDecodeError:
                what = "the query is not UTF-8"
                raise RequestError("invalid", what, field="query", fix="percent-encode the UTF-8 of the text") from None
    raise RequestError("invalid", "the query is missing", field="query", fix="call /v1/answer?query=pizza+near+me")


def read_post(body: bytes) -> tuple[str, Mapping[str, list[str]]]:
    """The query and side inputs in a JSON body. RequestError says what is wrong."""
    try:
        sent = _decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        try:
            checked = AnswerRequest.model_validate_json(body)  # the same rules; its errors name the field
        except ValidationError as error:
            raise validation_error(error) from None
        return checked.query, checked.side_inputs
    return sent.query, sent.side_inputs


class HotPath:
    """Looks queries up in the release that the answerer serves at that moment."""

    def __init__(self, answerer: Answerer) -> None:
        self._answerer = answerer
        self._shapes: dict[tuple[str, str], bytes] = {}

    def get(self, query_string: bytes, request_id: str) -> Hit | Miss:
        """The answer to GET /v1/answer?query=..."""
        return self.look_up(read_get(query_string), _NO_SIDE_INPUTS, request_id)

    def post(self, body: bytes, request_id: str) -> Hit | Miss:
        """The answer to POST /v1/answer."""
        query, side_inputs = read_post(body)
        return self.look_up(query, side_inputs, request_id)

    def look_up(self, query: str, side_inputs: Mapping[str, list[str]], request_id: str) -> Hit | Miss:
        """A Hit with the response's body, or the Miss."""
        started = time.perf_counter()
        answerer = self._answerer
        served = answerer.served
        clean = answerer.clean(query, side_inputs, served)
        if answerer.split is not None:
            served = answerer.split.choose(clean, served)
        found = served.find(clean)
        if found is None:
            return Miss(query, clean, side_inputs, served, request_id, started)
        shown = _encode(query)
        confidence = b"null" if found.confidence is None else b"%.4f" % found.confidence
        seconds = time.perf_counter() - started
        body = self._shape(served, found.source) % (
            shown,
            shown if clean == query else _encode(clean),
            found.answer,
            confidence,
            found.answer_key.hex().encode(),
            seconds * 1000,
            request_id.encode(),
        )
        return Hit(body, clean, found, served, seconds)

    def _shape(self, served: OpenRelease, source: str) -> bytes:
        """The parts of the response that are the same for all hits of one release and source."""
        key = served.release.id, source
        shape = self._shapes.get(key)
        if shape is None:
            if len(self._shapes) > _MOST_SHAPES:
                self._shapes.clear()  # of releases that went by
            named = {"release": served.release.id, "snapshot": served.release.snapshot}
            ids = "".join(f', "{name}": {json.dumps(value)}' for name, value in named.items())
            text = (
                '{"query": %b, "normalised": %b, "answer": %b, "source": '
                + json.dumps(source)
                + ', "cached": true, "degraded": false, "confidence": %b, "answer_key": "%b"'
                + ids
                + ', "latency_ms": %.3f, "reason": "", "request_id": "%b"}'
            )
            shape = self._shapes[key] = text.encode()
        return shape


def reply_bytes(reply: Reply) -> bytes:
    """The body of a response that is not in the snapshot. Fields are in the same order as in a hit."""
    return json.dumps(reply._asdict(), ensure_ascii=False).encode()
