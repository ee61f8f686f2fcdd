"""The HTTP side: a FastAPI app over an Answerer, its metrics, and the watch on CURRENT.

In: requests, a ServeState. Out: JSON, the try-it page, Prometheus text. The cache is read in this process, inside the request;
no handle is used before a miss. When CURRENT moves, the new release is opened and then replaces the old one in one step.
Knows nothing of Ray Serve or of how the student runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import importlib.util
import json
import logging
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from uuid import uuid4

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from headtail import __version__
from headtail.adapters.storage import Storage
from headtail.cache import open_snapshot
from headtail.core.secrets import hide
from headtail.releases import release
from headtail.stages.serve.answerer import REASONS, Answerer, AskStudent, OpenRelease, Reply, StudentTier
from headtail.stages.serve.errors import RequestError, openapi_errors, validation_error

if TYPE_CHECKING:
    from headtail.stages.serve.config import Config

log = logging.getLogger("headtail.serve")
PAGE = Path(__file__).parent / "page.html"
BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)  # seconds
# The pages are shown in no other page, and do not send their address. The try-it page runs no script but its own and talks to no host but
# this one; Swagger UI's is FastAPI's, so only what holds for any page holds for it.
HEADERS = {
    "cache-control": "no-cache",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "content-security-policy": "frame-ancestors 'none'; base-uri 'none'; object-src 'none'; form-action 'self'",
}
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'"
)


class AnswerRequest(BaseModel):
    """One query."""

    model_config = ConfigDict(extra="forbid")
    query: str = Field(description="what a person typed", examples=["pizza near me"])
    side_inputs: dict[str, Annotated[list[Annotated[str, Field(max_length=500)]], Field(max_length=50)]] = Field(
        {}, description="columns of the task joined to the query; used by the realtime student only", max_length=16
    )


class AnswerResponse(BaseModel):
    """One answer and where it comes from."""

    query: str = Field(description="as it was sent")
    normalised: str = Field(description="the form that was looked up, without personal data on a miss")
    answer: Any = Field(description="JSON valid under the task's schema")
    source: str = Field(description="teacher, student or fallback")
    cached: bool = Field(description="whether it came from the published snapshot")
    degraded: bool = Field(description="whether this is the fallback, given because nothing better could be had")
    confidence: float | None = Field(description="0..1; null when unknown")
    answer_key: str | None = Field(description="provenance: the key under which the answer was made; null for a fallback")
    release: str = Field(description="id of the release that answered")
    snapshot: str = Field(description="id of its cache snapshot")
    latency_ms: float = Field(description="time spent in this process and on the student")
    reason: str = Field(description="empty, or one of: " + "; ".join(f"{name}: {text}" for name, text in REASONS.items()))
    request_id: str = Field(description="of this request, for logs and feedback")


class Metrics:
    """Prometheus metrics of this process; each ingress replica has its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        settings: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("headtail_requests", "answered requests", ["path", "source"], **settings)
        self.seconds = Histogram("headtail_request_seconds", "time to answer", ["path"], buckets=BUCKETS, **settings)
        self.degraded = Counter("headtail_degraded", "requests that got the fallback", ["reason"], **settings)
        self.rejected = Counter("headtail_rejected", "requests refused", ["field"], **settings)
        self.release = Gauge("headtail_release_info", "1 for the release being served", ["release", "snapshot"], **settings)
        self.redeploy = Gauge("headtail_redeploy_needed", "1 when the release asks for another student than the deployed one", **settings)
        self.refresh_failures = Counter("headtail_refresh_failures", "looks at CURRENT that failed", **settings)
        self.in_flight = Gauge("headtail_realtime_in_flight", "requests waiting for the student", **settings)

    def count(self, reply: Reply) -> None:
        self.requests.labels(reply.path, reply.source).inc()
        self.seconds.labels(reply.path).observe(reply.latency_ms / 1000)
        if reply.degraded:
            self.degraded.labels(reply.reason).inc()


class ServeState:
    """What the app works on: an open release and the student's interface.

    `deployed`: name of the model that runs; `stands_for`: the release's student it was deployed for, None when it is switched off.
    """

    def __init__(
        self,
        store: Storage,
        served: OpenRelease,
        config: Config,
        realtime: AskStudent | None = None,
        deployed: str = "",
        stands_for: str | None = None,
    ) -> None:
        self.store, self.config = store, config
        self.answerer = Answerer(served, config, [StudentTier(realtime)] if realtime else [])
        self.deployed, self.stands_for = deployed, stands_for
        self.metrics = Metrics()
        self._swap(served)

    @property
    def redeploy_needed(self) -> bool:
        """Whether the release asks for another student than the one that runs."""
        return self.stands_for is not None and self.answerer.served.release.student != self.stands_for

    async def refresh(self) -> bool:
        """Follow CURRENT if it moved; True when another release is served now."""
        found = await asyncio.to_thread(release.current_id, self.store)
        if not found or found == self.answerer.served.release.id:
            return False
        old = self.answerer.served
        self._swap(await asyncio.to_thread(open_served, self.store, found, self.config.copies))
        ours = self.store.local_path("") is None or self.config.copies is not None  # a copy of our own, not the store's file
        if ours and old.cache.folder != self.answerer.served.cache.folder:
            shutil.rmtree(old.cache.folder, ignore_errors=True)  # a mapped file stays readable until it is closed
        return True

    def _swap(self, served: OpenRelease) -> None:
        self.answerer.served = served  # one assignment, between two awaits: no request sees half of it
        self.metrics.release.clear()
        self.metrics.release.labels(served.release.id, served.release.snapshot).set(1)
        self.metrics.redeploy.set(self.redeploy_needed)

    async def watch(self) -> None:
        """Look at CURRENT every `refresh_s` seconds; a look that fails leaves what is served as it is."""
        while True:
            await asyncio.sleep(self.config.refresh_s)
            try:
                if await self.refresh():
                    log.warning("now serving release %s", self.answerer.served.release.id)
            except Exception as error:  # a store out of reach, a release half copied: keep serving
                self.metrics.refresh_failures.inc()
                log.warning("cannot follow CURRENT, still serving %s: %s", self.answerer.served.release.id, hide(str(error)))


def open_served(store: Storage, ref: str, cache_dir: Path | None = None) -> OpenRelease:
    """A release, opened: its snapshot mapped, its task rebuilt. `cache_dir`: where snapshots of S3 are fetched to."""
    found = release.load_release(store, ref)
    if cache_dir is None and store.local_path("") is None:
        cache_dir = Path(tempfile.mkdtemp(prefix="headtail-serve-"))
    cache = open_snapshot(store, found.snapshot, cache_dir)
    return OpenRelease(found, cache, release.open_task(found), datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))


def describe(state: ServeState) -> dict[str, Any]:
    """What is being served, for people and for `replay`."""
    served = state.answerer.served
    shown = served.release.model_dump(mode="json", exclude={"task_copy"})
    manifest = served.cache.manifest
    return {
        **shown,
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
        "realtime": {"student": state.deployed or None, "last_failure": state.answerer.last_failure or None},
        "redeploy_needed": state.redeploy_needed,
        "examples": list(manifest.examples),
        "headtail": __version__,
    }


def make_app(state: ServeState) -> FastAPI:
    """The app; its lifespan runs the watch on CURRENT."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(state.watch()) if state.config.release == "current" else None
        yield
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    description = "Answers search queries from a published cache, else a realtime student, else the task's fallback."
    app = FastAPI(
        title="headtail",
        version=__version__,
        description=description,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        strict_content_type=False,
    )
    _add_answer(app, state)
    _add_operations(app, state)
    _add_pages(app, state)

    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> Response:
        return _refuse(state, error)

    @app.exception_handler(RequestValidationError)
    async def bad_request(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]  # FastAPI puts where it was sent first: query, body
        return _refuse(state, RequestError("invalid", str(first["msg"]), field=".".join(map(str, first["loc"][1:])) or "body"))

    return app


def _refuse(state: ServeState, error: RequestError) -> Response:
    state.metrics.rejected.labels(error.field if error.field in AnswerRequest.model_fields else "body").inc()
    return Response(error.body(uuid4().hex), error.status, dict(error.headers), "application/json")


def _add_answer(app: FastAPI, state: ServeState) -> None:
    documented: dict[int | str, dict[str, Any]] = {200: {"model": AnswerResponse}, **openapi_errors("bad_request", "invalid")}

    async def answer(query: str, side_inputs: dict[str, list[str]]) -> Response:
        reply = await state.answerer.answer(query, side_inputs, uuid4().hex)
        state.metrics.count(reply)
        return Response(json.dumps(reply._asdict(), ensure_ascii=False), media_type="application/json")

    # Read here rather than by FastAPI, which takes JSON only under its content type: `curl -d` sends another.
    body = {"required": True, "content": {"application/json": {"schema": AnswerRequest.model_json_schema()}}}

    @app.post(
        "/v1/answer", responses=documented, response_class=JSONResponse, openapi_extra={"requestBody": body}, summary="Answer one query"
    )
    async def post_answer(request: Request) -> Response:
        try:
            asked = AnswerRequest.model_validate_json(await request.body())
        except ValidationError as error:
            return _refuse(state, validation_error(error))
        return await answer(asked.query, asked.side_inputs)

    @app.get("/v1/answer", responses=documented, response_class=JSONResponse, summary="Answer one query, from a browser or curl")
    async def get_answer(query: Annotated[str, Query(description="what a person typed")]) -> Response:
        return await answer(query, {})


def _add_operations(app: FastAPI, state: ServeState) -> None:
    @app.get("/v1/release", summary="What is being served, since when, on what evidence; queries to try")
    async def what_is_served() -> dict[str, Any]:
        return describe(state)

    @app.get("/healthz", summary="This process is alive")
    async def alive() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", summary="A release is open; the student may be away, then misses are degraded")
    async def ready() -> dict[str, Any]:
        shown = describe(state)
        return {"status": "ready", "release": shown["id"], "realtime": shown["realtime"], "redeploy_needed": shown["redeploy_needed"]}

    @app.get("/metrics", response_class=PlainTextResponse, summary="Prometheus metrics of the replica that answers this request")
    async def metrics() -> Response:
        state.metrics.in_flight.set(state.answerer.in_flight)
        return Response(generate_latest(state.metrics.registry), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_pages(app: FastAPI, state: ServeState) -> None:
    page = PAGE.read_text(encoding="utf-8")

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def try_it() -> Response:
        return HTMLResponse(page, headers={**HEADERS, "content-security-policy": POLICY})

    assets = _swagger()

    @app.get("/docs", response_class=HTMLResponse, include_in_schema=False)
    async def docs() -> HTMLResponse:
        local: dict[str, Any] = {"swagger_js_url": "docs/swagger-ui-bundle.js", "swagger_css_url": "docs/swagger-ui.css"} if assets else {}
        page = get_swagger_ui_html(openapi_url="openapi.json", title="headtail API", swagger_favicon_url="data:,", **local)
        page.headers.update(HEADERS)
        return page

    for name in ("swagger-ui-bundle.js", "swagger-ui.css") if assets else ():
        app.add_api_route(f"/docs/{name}", _sender(assets / name), include_in_schema=False)  # type: ignore[operator]


def _sender(path: Path) -> Callable[[], Any]:
    async def send() -> FileResponse:
        return FileResponse(path)

    return send


def _swagger() -> Path | None:
    """Swagger UI as vLLM ships it, so that /docs works without a network; without vLLM it comes from FastAPI's CDN."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "entrypoints" / "serve" / "instrumentator" / "static"
    return folder if (folder / "swagger-ui-bundle.js").is_file() else None
