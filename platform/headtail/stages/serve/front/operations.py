"""The paths by which people and machines see that a front works: /healthz, /readyz, /v1/release.

In: the answerer, the link to the students. Out: routes for `FrontApp`. Knows nothing of how answers come about.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headtail import __version__
from headtail.stages.serve.answerer import Answerer
from headtail.stages.serve.errors import RequestError
from headtail.stages.serve.front.app import FrontRequest, FrontResponse, Route, json_response
from headtail.stages.serve.front.link import StudentLink


def describe(answerer: Answerer, link: StudentLink | None) -> dict[str, Any]:
    """What is being served, for people and for `replay`."""
    served = answerer.served
    manifest = served.cache.manifest
    return {
        **served.release.model_dump(mode="json", exclude={"task_copy"}),
        "task_description": served.task.file.description,
        "side_inputs": list(served.task.side_inputs),
        "schema": served.task.schema,
        "score": served.task.file.score.model_dump(mode="json"),
        "rows": manifest.rows,
        "rows_by_source": manifest.rows_by_source,
        "coverage": manifest.coverage,
        "published": manifest.created,
        "lineage": list(manifest.lineage),
        "since": served.since,
        "realtime": {
            "student": (link.model(served) if link else "") or None,
            "bigger_model": (link.bigger_model(served) if link else "") or None,
            "last_failure": answerer.last_failure or None,
        },
        "examples": list(manifest.examples),
        "headtail": __version__,
    }


_ALONE: Mapping[str, Operations | None] = {}


class Operations:
    """The routes of a task. `draining`: set once the process is told to stop, so that a balancer sends it no more. `further`: of the other
    tasks without which this process is not ready, by name; None: not open yet."""

    def __init__(self, answerer: Answerer, link: StudentLink | None, further: Mapping[str, Operations | None] = _ALONE) -> None:
        self._answerer, self._link, self._further = answerer, link, further
        self.draining = False

    @property
    def routes(self) -> Mapping[str, Route]:
        methods = ("GET", "HEAD")
        return {
            "/healthz": Route(methods, self._alive),
            "/readyz": Route(methods, self._ready),
            "/v1/release": Route(methods, self._release, "answer"),
        }

    async def _alive(self, request: FrontRequest) -> FrontResponse:
        return json_response({"status": "ok"})

    async def _ready(self, request: FrontRequest) -> FrontResponse:
        if self.draining:
            raise RequestError("not_ready", "this server is about to stop")
        state = {"status": "ready", **self._state()}
        if self._further:
            closed = [name for name, task in self._further.items() if task is None]
            if closed:
                raise RequestError("not_ready", f"the release of task {closed[0]} is not open yet")
            state["tasks"] = {name: task._state() for name, task in self._further.items() if task is not None}
        return json_response(state)

    def _state(self) -> dict[str, Any]:
        shown = describe(self._answerer, self._link)
        return {"release": shown["id"], "realtime": shown["realtime"]}

    async def _release(self, request: FrontRequest) -> FrontResponse:
        return json_response(describe(self._answerer, self._link))
