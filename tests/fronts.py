"""A front without its process: the ASGI app over an open release, and a function in place of the link to the students."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI

from headtail.adapters.storage import Storage
from headtail.stages import serve
from headtail.stages.serve.admin import make_app
from headtail.stages.serve.answerer import Answerer, AskStudent, OutputCheck, Tier
from headtail.stages.serve.front.app import FrontApp
from headtail.stages.serve.front.chat import ChatRoutes
from headtail.stages.serve.front.client_hits import ClientHitRoutes
from headtail.stages.serve.front.counters import Counters, create_counters, read_counters
from headtail.stages.serve.front.feedback import FeedbackRoutes
from headtail.stages.serve.front.link import StudentLink
from headtail.stages.serve.front.log_pipe import RequestLog
from headtail.stages.serve.front.operations import Operations
from headtail.stages.serve.front.watch import ReleaseWatch, open_served
from headtail.stages.serve.student_tier import StudentTier

_numbers = itertools.count()


class Front:
    """One front over `store`. `folder`: for its counters. `ask`: the student; None: there is none. `tiers`: instead of it."""

    def __init__(
        self,
        store: Storage,
        config: serve.Config,
        folder: Path,
        ask: AskStudent | None = None,
        link: StudentLink | None = None,
        pipe: int | None = None,
        shared: Path | None = None,
        checks: Sequence[OutputCheck] = (),
        tiers: Sequence[Tier] | None = None,
        **options: Any,
    ) -> None:
        self.path = folder / f"counters-{next(_numbers)}"
        create_counters(self.path, 1)
        self.counters = Counters(self.path, 0)
        served = open_served(store, config.release, config.copies)
        if tiers is None:
            tiers = [StudentTier(ask)] if ask else []
        self.answerer = Answerer(served, config, tiers, checks)
        self.operations = Operations(self.answerer, link)
        self.watch = ReleaseWatch(store, self.answerer, config, self.counters, link, folder=shared)
        log = RequestLog(pipe, self.counters)
        self.app = FrontApp(self.answerer, config, self.counters, log, routes=self.operations.routes, **options)
        self.app.add_routes(ChatRoutes(self.app).routes)
        self.app.add_routes(ClientHitRoutes(self.answerer, self.counters).routes)
        self.app.add_routes(FeedbackRoutes(self.answerer, self.counters, log).routes)

    def count(self, name: str) -> float:
        """A counter, as any process reads it."""
        return read_counters(self.path).sums[name]

    @asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        """ASGI in this process. An exception that escapes the app fails the test, as a 500 would."""
        async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://test") as made:
            yield made

    def ask(self, query: Any = "something rare", **more: Any) -> httpx.Response:
        """POST /v1/answer."""

        async def go() -> httpx.Response:
            async with self.client() as http:
                return await http.post("/v1/answer", json={"query": query, **more})

        return asyncio.run(go())

    def pages(self) -> FastAPI:
        """The pages of a server with this front alone."""
        return make_app(
            {self.answerer.served.task.name: self.path}, httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://test")
        )
