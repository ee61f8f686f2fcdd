"""Several tasks on one port: the first task has the paths as they are, a further one has them below /tasks/NAME.

In: HTTP requests, as an ASGI server gives them. Out: the same, handed to the task's FrontApp with the path that it knows. A request that
names no task of this server goes to the first task, which refuses it like any other path that is not there. Nothing here waits.
"""

from __future__ import annotations

from collections.abc import Coroutine, Mapping
from typing import Any

from headtail.stages.serve.body import Receive
from headtail.stages.serve.errors import RequestError
from headtail.stages.serve.front.app import FrontApp, FrontRequest, FrontResponse, Route, Scope, Send

TASKS = "/tasks/"
_WHOLE = len(TASKS)


class TaskDispatch:
    """The ASGI callable. `further`: tasks besides `first` by name; None: its release is not open yet."""

    def __init__(self, first: FrontApp, further: Mapping[str, FrontApp | None]) -> None:
        self._first, self._further = first, further
        first.add_routes({TASKS: Route(("GET", "HEAD", "POST"), self._refuse, "answer")})

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Coroutine[Any, Any, None]:
        """It costs a request of the first task 0.3 us, where the app takes 11 for a hit; with a coroutine of its own it would cost more."""
        if scope.get("path", "")[:_WHOLE] == TASKS:
            name, slash, rest = scope["path"][_WHOLE:].partition("/")
            own = name == self._first.answerer.served.task.name
            app = self._further.get(name, self._first if own else None)
            if app is not None:
                return app({**scope, "path": slash + rest, "root_path": TASKS + name}, receive, send)
        return self._first(scope, receive, send)

    async def _refuse(self, request: FrontRequest) -> FrontResponse:
        name = request.path[_WHOLE:].partition("/")[0]
        if name in self._further:
            raise RequestError("not_ready", "the release of this task is not open yet")
        raise RequestError("not_found", "no task of this name is served", fix="see /v1/models")
