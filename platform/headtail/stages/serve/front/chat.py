"""The routes of OpenAI's format: /v1/chat/completions and /v1/models, over the same answerers as /v1/answer.

In: a request that was let in; its `model` names the task. Out: a response in that format, errors too. Knows nothing of the format itself:
that is `chat_api`.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Mapping

from headtail.stages.serve.answerer import ReleaseFailed
from headtail.stages.serve.chat_api import chat_error, chat_response, chat_stream, model_response, models_response, parse_chat
from headtail.stages.serve.errors import RequestError
from headtail.stages.serve.front.app import FrontApp, FrontRequest, FrontResponse, Route

_BELOW = "/v1/models/"
_EVENTS = (("content-type", "text/event-stream; charset=utf-8"), ("cache-control", "no-cache"))
_ALONE: Mapping[str, FrontApp | None] = {}


class ChatRoutes:
    """The routes of `app`'s task. `name`: by which it is asked; empty: its release's task. `further`: other tasks that are asked here too,
    by name; None: not open yet."""

    def __init__(self, app: FrontApp, name: str = "", further: Mapping[str, FrontApp | None] = _ALONE) -> None:
        self._app, self._name, self._further = app, name, further

    @property
    def routes(self) -> Mapping[str, Route]:
        read = ("GET", "HEAD")
        return {
            "/v1/chat/completions": Route(("POST",), self._complete, "answer", chat_error, waits=True),
            "/v1/models": Route(read, self._models, "answer", chat_error),
            _BELOW: Route(read, self._model, "answer", chat_error),
        }

    async def _complete(self, request: FrontRequest) -> FrontResponse:
        apps = self._apps()
        call = parse_chat(request.body, apps)
        app = apps[call.model]
        if app is None:
            raise RequestError("not_ready", "the release of this task is not open yet", field="model")
        try:
            reply = await app.answerer.answer(call.query, call.side_inputs, request.request_id)
        except ReleaseFailed as error:
            raise app.note_failure(error, request.request_id) from None  # counted against that task's release
        app.note_reply(reply, request.caller, call.side_inputs)
        made = int(time.time())
        return (
            FrontResponse(chat_stream(call, reply, made), 200, _EVENTS) if call.stream else FrontResponse(chat_response(call, reply, made))
        )

    async def _models(self, request: FrontRequest) -> FrontResponse:
        return FrontResponse(models_response(self._times()))

    async def _model(self, request: FrontRequest) -> FrontResponse:
        return FrontResponse(model_response(request.path.removeprefix(_BELOW), self._times()))

    def _apps(self) -> dict[str, FrontApp | None]:
        return {self._name or self._app.answerer.served.task.name: self._app, **self._further}

    def _times(self) -> dict[str, int]:
        """What is served, by task, and when it was made."""
        served = {name: app.answerer.served for name, app in self._apps().items() if app is not None}
        return {name: int(datetime.datetime.fromisoformat(one.release.created).timestamp()) for name, one in served.items()}
