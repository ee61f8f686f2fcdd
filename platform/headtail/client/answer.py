"""What a client gives its caller: an Answer, or a ClientError.

In: a response of the server. Out: typed values. Fields that a later server adds are ignored. Knows nothing of connections.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from pydantic_core import from_json

# Why an answer is degraded that the client made itself; the server has reasons of its own.
CLIENT_REASONS = {
    "unreachable": "the server cannot be reached, failed several times in a row, or there is none",
    "client_timeout": "the server gave no answer within timeout_ms",
    "rate_limited": "the server refuses more requests of this API key for now",
    "server_busy": "the server refuses requests for now",
    "server_error": "the server failed, or what it sent is no answer",
}


class Answer(NamedTuple):
    """One answer. Compare `degraded` before you use it: then it is the task's fallback, and `reason` says why."""

    query: str
    normalised: str
    answer: Any
    source: str
    cached: bool
    degraded: bool
    confidence: float | None
    answer_key: str | None
    release: str
    snapshot: str
    reason: str
    request_id: str
    local: bool

    @classmethod
    def parse(cls, fields: Any) -> Answer:
        """The answer in a response's JSON. ValueError when it is none."""
        if not isinstance(fields, dict):
            raise ValueError("no JSON object")
        try:
            found = {name: fields[name] for name in _FIELDS}
        except KeyError as error:
            raise ValueError(f"no field {error}") from None
        if not (isinstance(found["source"], str) and isinstance(found["degraded"], bool)):
            raise ValueError("source or degraded has another type")
        return cls(**found, local=False)


_FIELDS = tuple(name for name in Answer._fields if name != "local")


class ClientError(Exception):
    """A request that the server refused, or one without an answer when no fallback can be given.

    `code`: one of the server's codes (`invalid`, `unauthorized` and so on) or of CLIENT_REASONS; `status`: of HTTP, 0 without a response.
    """

    def __init__(self, code: str, message: str, status: int = 0, field: str = "", fix: str = "", request_id: str = "") -> None:
        self.code, self.message, self.status = code, message, status
        self.field, self.fix, self.request_id = field, fix, request_id
        super().__init__(message + (f"; {fix}" if fix else ""))

    @classmethod
    def parse(cls, status: int, body: bytes | dict[str, Any]) -> ClientError:
        """The error that a response holds; a body of another shape, such as a proxy's, is not shown."""
        try:
            error = (from_json(body) if isinstance(body, bytes) else body)["error"]
            texts = {name: str(error[name]) for name in ("code", "message", "field", "do", "request_id")}
        except (ValueError, KeyError, TypeError):
            return cls("server_error", f"the server answered with status {status}", status)
        return cls(texts["code"], texts["message"], status, texts["field"], texts["do"], texts["request_id"])
