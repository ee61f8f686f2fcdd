"""The routes of OpenAI's format: /v1/chat/completions and /v1/models, over the same answerer as /v1/answer.

In: a request that was let in. Out: a response in that format, errors too. Knows nothing of the format itself: that is `chat_api`.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Mapping, Sequence

from headtail.stages.serve.answerer import Answerer, Reply
from headtail.stages.serve.chat_api import chat_error, chat_response, chat_stream, model_response, models_response, parse_chat
from headtail.stages.serve.front.app import FrontRequest, FrontResponse, Route
from headtail.stages.serve.principal import Principal

_BELOW = "/v1/models/"
_EVENTS = (("content-type", "text/event-stream; charset=utf-8"), ("cache-control", "no-cache"))


class ChatRoutes:
    """The routes. `note`: counts and logs a reply, as the app does its own."""

    def __init__(self, answerer: Answerer, note: Callable[[Reply, Principal, Mapping[str, Sequence[str]]], None]) -> None:
        self._answerer, self._note = answerer, note

    @property
    def routes(self) -> Mapping[str, Route]:
        read = ("GET", "HEAD")
        return {
            "/v1/chat/completions": Route(("POST",), self._complete, "answer", chat_error, waits=True),
            "/v1/models": Route(read, self._models, "answer", chat_error),
            _BELOW: Route(read, self._model, "answer", chat_error),
        }

    async def _complete(self, request: FrontRequest) -> FrontResponse:
        call = parse_chat(request.body, self._tasks())
        reply = await self._answerer.answer(call.query, call.side_inputs, request.request_id)
        self._note(reply, request.caller, call.side_inputs)
        made = int(time.time())
        return (
            FrontResponse(chat_stream(call, reply, made), 200, _EVENTS) if call.stream else FrontResponse(chat_response(call, reply, made))
        )

    async def _models(self, request: FrontRequest) -> FrontResponse:
        return FrontResponse(models_response(self._tasks()))

    async def _model(self, request: FrontRequest) -> FrontResponse:
        return FrontResponse(model_response(request.path.removeprefix(_BELOW), self._tasks()))

    def _tasks(self) -> dict[str, int]:
        """What is served, by task, and when it was made."""
        served = self._answerer.served
        return {served.task.name: int(datetime.datetime.fromisoformat(served.release.created).timestamp())}
