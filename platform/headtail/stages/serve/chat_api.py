"""The chat-completions format of OpenAI, as pure functions: a client that speaks it can ask for answers.

In: the body of a request; a Reply. Out: a ChatCall (which query, which options); the body of the response. `model` is the task's name,
the query is the text of the last message of role `user`; other messages and fields that do not concern us are ignored, as OpenAI's
servers do. The answer is the message's content as JSON, or the arguments of the function that the caller demands. Errors have OpenAI's
shape and our code, field and request id in it. Knows nothing of servers, and asks nobody.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError

from headtail.stages.serve.answerer import Reply
from headtail.stages.serve.errors import RequestError, validation_error

# What OpenAI's clients call our statuses; their exceptions go by the status, people by the type.
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_NO_LOGPROB = -9999.0  # what OpenAI writes for a probability of 0, since JSON has no infinity
_OWNER = "headtail"


class ChatPart(BaseModel):
    """A part of a message."""

    type: str = Field(description="`text`; others are refused")
    text: str | None = Field(None, description="the text")


class ChatMessage(BaseModel):
    """A message. Only the last one of role `user` counts: it is the query."""

    role: str = Field(description="user, or another one, which is ignored")
    content: str | list[ChatPart] | None = Field(None, description="the query")


class ChatStreamOptions(BaseModel):
    """What a stream holds."""

    include_usage: bool | None = Field(None, description="end with a chunk that counts tokens; they are 0")


class ChatRequest(BaseModel):
    """A request for a chat completion. Fields that are not listed are ignored."""

    model: str = Field(description="name of the task", examples=["query_segmentation"])
    messages: list[ChatMessage] = Field(description="the last message of role `user` is the query", min_length=1)
    stream: bool | None = Field(None, description="answer as server-sent events, in one chunk")
    stream_options: ChatStreamOptions | None = Field(None, description="for a stream")
    logprobs: bool | None = Field(None, description="give the confidence, as the log-probability of one token: the whole content")
    n: Annotated[int, Field(ge=1, le=1)] | None = Field(None, description="1: a query has one answer")
    tools: list[Any] | None = Field(None, description="functions; used with `tool_choice` only")
    tool_choice: Any = Field(None, description="`required`, or one function: the answer is then the arguments of a call of it")
    side_inputs: dict[str, Annotated[list[Annotated[str, Field(max_length=500)]], Field(max_length=50)]] = Field(
        {}, description="our own addition: columns of the task joined to the query", max_length=16
    )


@dataclass(frozen=True)
class ChatCall:
    """What is asked. `function`: name of the function whose arguments the answer is to be; empty: it is the content."""

    model: str
    query: str
    side_inputs: Mapping[str, Sequence[str]]
    stream: bool
    include_usage: bool
    logprobs: bool
    function: str


def parse_chat(body: bytes, tasks: Collection[str]) -> ChatCall:
    """The call in a request's body. `tasks`: names of the tasks that are served. RequestError when it cannot be taken."""
    try:
        sent = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise validation_error(error) from None
    if sent.model not in tasks:
        names = ", ".join(sorted(tasks))
        raise RequestError("not_found", "no task of this name is served", field="model", fix=f"set model to one of: {names}")
    usage = sent.stream_options is not None and bool(sent.stream_options.include_usage)
    function = _forced_function(sent)
    return ChatCall(sent.model, _last_query(sent.messages), sent.side_inputs, bool(sent.stream), usage, bool(sent.logprobs), function)


def _last_query(messages: Sequence[ChatMessage]) -> str:
    place, last = next(((i, m) for i, m in reversed(list(enumerate(messages))) if m.role == "user"), (0, None))
    if last is None or last.content is None:
        raise RequestError("invalid", "no message of role user has a text", field="messages", fix="send the query as the last user message")
    if isinstance(last.content, str):
        return last.content
    for part in last.content:
        if part.type != "text" or part.text is None:
            what = "only parts of type text are taken"
            raise RequestError("invalid", what, field=f"messages.{place}.content", fix="send the query as text")
    return "".join(part.text or "" for part in last.content)


def _forced_function(sent: ChatRequest) -> str:
    """Name of the one function that the caller demands a call of; empty when it demands none."""
    choice = sent.tool_choice
    if choice == "required" and sent.tools and len(sent.tools) == 1:
        choice = sent.tools[0]
    name = _function_name(choice)
    if name and name not in map(_function_name, sent.tools or ()):
        what = "tool_choice names a function that is not in tools"
        raise RequestError("bad_request", what, field="tool_choice", fix="send the function in tools too")
    return name[:64]


def _function_name(tool: Any) -> str:
    """Of an entry of `tools`, or of `tool_choice`; empty when it names none."""
    function = tool.get("function") if isinstance(tool, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else ""


def chat_response(call: ChatCall, reply: Reply, created: int) -> bytes:
    """The body of the response. `created`: seconds since 1970."""
    text = _text(reply)
    choice = {"index": 0, "message": _message(call, text, reply), "logprobs": _logprobs(call, text, reply), "finish_reason": "stop"}
    return _encode({**_head("chat.completion", call, reply, created), "choices": [choice], "usage": _USAGE, "headtail": _origin(reply)})


def chat_stream(call: ChatCall, reply: Reply, created: int) -> bytes:
    """The body of a stream: server-sent events with the whole answer in one chunk, as text/event-stream."""
    text, head = _text(reply), _head("chat.completion.chunk", call, reply, created)
    choice = {
        "index": 0,
        "delta": _message(call, text, reply, stream=True),
        "logprobs": _logprobs(call, text, reply),
        "finish_reason": "stop",
    }
    chunks: list[dict[str, Any]] = [{**head, "choices": [choice], "headtail": _origin(reply)}]
    if call.include_usage:
        chunks.append({**head, "choices": [], "usage": _USAGE})
    return b"".join(b"data: %b\n\n" % _encode(chunk) for chunk in chunks) + b"data: [DONE]\n\n"


def chat_error(error: RequestError, request_id: str) -> bytes:
    """The body of a refusal."""
    kind = _TYPES.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    fields = {"message": f"{error.message}: {error.fix}", "type": kind, "param": error.field or None, "code": error.code}
    return _encode({"error": {**fields, "field": error.field, "do": error.fix, "request_id": request_id}})


def models_response(tasks: Mapping[str, int]) -> bytes:
    """The body of `/v1/models`. `tasks`: name of each task and when its release was made, in seconds since 1970."""
    return _encode({"object": "list", "data": [_model(name, created) for name, created in sorted(tasks.items())]})


def model_response(name: str, tasks: Mapping[str, int]) -> bytes:
    """The body of `/v1/models/NAME`. RequestError 404 when it is not served."""
    if name not in tasks:
        raise RequestError("not_found", "no task of this name is served", field="model", fix="see /v1/models")
    return _encode(_model(name, tasks[name]))


def _model(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": _OWNER}


_USAGE = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}  # an answer from the cache takes none


def _encode(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()  # ASCII: half a surrogate pair stays an escape


def _text(reply: Reply) -> str:
    return json.dumps(reply.answer, ensure_ascii=False, separators=(",", ":"))


def _head(kind: Literal["chat.completion", "chat.completion.chunk"], call: ChatCall, reply: Reply, created: int) -> dict[str, Any]:
    """`system_fingerprint` is what OpenAI has for "what made this answer": here the release."""
    name = f"chatcmpl-{reply.request_id}"
    return {"id": name, "object": kind, "created": created, "model": call.model, "system_fingerprint": reply.release}


def _message(call: ChatCall, text: str, reply: Reply, stream: bool = False) -> dict[str, Any]:
    if not call.function:
        return {"role": "assistant", "content": text, "refusal": None}
    made: dict[str, Any] = {
        "id": f"call_{reply.request_id}",
        "type": "function",
        "function": {"name": call.function, "arguments": text},
    }
    return {"role": "assistant", "content": None, "refusal": None, "tool_calls": [{"index": 0, **made} if stream else made]}


def _logprobs(call: ChatCall, text: str, reply: Reply) -> dict[str, Any] | None:
    """The confidence is that of the whole answer, so the whole content is one token."""
    if not call.logprobs or reply.confidence is None or call.function:
        return None
    logprob = math.log(reply.confidence) if reply.confidence > 0 else _NO_LOGPROB
    token = {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8", "surrogatepass")), "top_logprobs": []}
    return {"content": [token], "refusal": None}


def _origin(reply: Reply) -> dict[str, Any]:
    """What OpenAI's format has no field for."""
    fields = ("normalised", "source", "cached", "degraded", "reason", "confidence", "answer_key", "release", "snapshot", "request_id")
    return {name: getattr(reply, name) for name in fields}
