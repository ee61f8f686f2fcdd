"""Errors of the HTTP interface: one shape, one table of codes.

In: what is wrong with a request. Out: status, headers and body of the response, and the same for OpenAPI. The body is always
`{"error": {"code", "message", "field", "do", "request_id"}}`. A response never holds the text of an internal error: what
nobody foresaw is `internal`, and the log has the rest under the request id. Knows nothing of servers or routes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel, Field, ValidationError

MESSAGE_CHARS = 300  # characters of a message, since it may quote a name that the caller sent
FIELD_CHARS = 80


class ErrorCode(NamedTuple):
    """What a code stands for. `message` and `fix` are the texts when nothing more precise is known."""

    status: int
    message: str
    fix: str


CODES = {
    "bad_request": ErrorCode(400, "the request cannot be read", 'send a JSON object such as {"query": "pizza near me"}'),
    "unauthorized": ErrorCode(401, "this call needs a valid API key", "send the header `Authorization: Bearer KEY`"),
    "forbidden": ErrorCode(403, "this API key may not make this call", "use a key with the scope that the call needs"),
    "not_found": ErrorCode(404, "there is nothing at this address", "the documentation lists the paths"),
    "method_not_allowed": ErrorCode(405, "this path does not take this method", "use a method of the header Allow"),
    "request_timeout": ErrorCode(408, "the request did not arrive in time", "send the whole request at once"),
    "too_large": ErrorCode(413, "the body is too large", "send fewer queries at once"),
    "invalid": ErrorCode(422, "a field is wrong", "correct the field"),
    "rate_limited": ErrorCode(429, "this API key sends too many requests", "wait as long as Retry-After says"),
    "internal": ErrorCode(500, "the server failed", "report the request id to those who run the server"),
    "overloaded": ErrorCode(503, "the server has too much to do", "wait as long as Retry-After says"),
    "not_ready": ErrorCode(503, "no release is open yet, or the server is about to stop", "wait as long as Retry-After says"),
}


class ErrorBody(BaseModel):
    """Why a request was refused."""

    code: str = Field(description="one of: " + ", ".join(CODES), examples=["invalid"])
    message: str = Field(description="what is wrong, for people", examples=["the query is empty"])
    field: str = Field(description="the field that is wrong; empty when it is not one field", examples=["query"])
    do: str = Field(description="what to do", examples=["send at least one visible character"])
    request_id: str = Field(description="of this request; the server's log has it")


class ErrorResponse(BaseModel):
    """The body of every response with a status of 400 or more."""

    error: ErrorBody = Field(description="why")


class RequestError(Exception):
    """A request that gets no answer. `code`: one of CODES; empty texts are those of the code.

    `retry_after_s`: seconds until a retry makes sense; `headers`: more of them, such as Allow.
    """

    def __init__(
        self,
        code: str,
        message: str = "",
        *,
        field: str = "",
        fix: str = "",
        retry_after_s: float | None = None,
        headers: Sequence[tuple[str, str]] = (),
    ) -> None:
        kind = CODES[code]
        self.code, self.status, self.retry_after_s = code, kind.status, retry_after_s
        self.message, self.field, self.fix = (message or kind.message)[:MESSAGE_CHARS], field[:FIELD_CHARS], fix or kind.fix
        self._headers = tuple(headers)
        super().__init__(self.message)

    def body(self, request_id: str) -> bytes:
        """The response's body, UTF-8. Half of a surrogate pair is escaped, since a caller's text may hold one."""
        fields = {"code": self.code, "message": self.message, "field": self.field, "do": self.fix, "request_id": request_id}
        return json.dumps({"error": fields}, ensure_ascii=True).encode()

    @property
    def headers(self) -> list[tuple[str, str]]:
        """Headers of the response besides its content type: lower case, as ASGI has them."""
        held = list(self._headers)
        if self.status == 401:
            held.append(("www-authenticate", "Bearer"))
        if self.status in (429, 503):  # whole seconds, never 0: a caller that comes back at once only adds load
            held.append(("retry-after", str(max(1, math.ceil(self.retry_after_s or 0)))))
        return held


def validation_error(error: ValidationError, prefix: Sequence[Any] = ()) -> RequestError:
    """The error of a body that pydantic refuses. It does not repeat the body, which may be a megabyte. A body that is no JSON is a 400."""
    first = error.errors(include_input=False, include_url=False)[0]
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        if has_half_character(error):
            return RequestError("invalid", "a text has half a surrogate pair", field="body", fix="escape both halves, or send UTF-8")
        return RequestError("bad_request", message, field="body")
    field = ".".join(map(str, (*prefix, *first["loc"]))) or "body"
    return RequestError("invalid", message, field=field, fix="see the documentation of this call")


def has_half_character(error: ValidationError) -> bool:
    """Whether pydantic refuses the body for an escape of half a surrogate pair, such as that of U+D800: JSON, but no text."""
    first = error.errors(include_input=False, include_url=False)[0]
    return first["type"] == "json_invalid" and "hex escape" in first["msg"]


def method_error(*allowed: str) -> RequestError:
    """A method that a path does not take; `allowed`: those that it takes."""
    return RequestError("method_not_allowed", headers=[("allow", ", ".join(allowed))])


def openapi_errors(*codes: str) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a FastAPI route that may end in these codes."""
    found: dict[int | str, dict[str, Any]] = {}
    for code in codes:
        kind = CODES[code]
        entry = found.setdefault(kind.status, {"model": ErrorResponse, "description": ""})
        entry["description"] += ("; " if entry["description"] else "") + f"`{code}`: {kind.message}"
        if kind.status in (429, 503):
            retry = {"description": "seconds until a retry makes sense", "schema": {"type": "integer", "minimum": 1}}
            entry["headers"] = {"Retry-After": retry}
    return found
