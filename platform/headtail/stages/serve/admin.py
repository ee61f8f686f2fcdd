"""The pages of a running server, on a port of their own: try it, API documentation, /metrics, what is served; admin calls where on.

In: the shared counters, a client of the public port. Out: a FastAPI app; that of a further task is below /tasks/NAME/. Calls of the API go
on to the public port, so that the page shows what callers get. It listens on loopback unless it is told otherwise. Knows nothing of how
queries are answered.

    python -m headtail.stages.serve.admin PLAN
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import httpx
import uvicorn
from fastapi import FastAPI, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel

from headtail import __version__
from headtail.adapters.proxies import is_loopback
from headtail.adapters.storage import open_storage
from headtail.core.secrets import hide_in_output
from headtail.stages.serve.admin_calls import CALLS, AdminCalls
from headtail.stages.serve.admission import open_admission
from headtail.stages.serve.api import AnswerRequest, AnswerResponse, AnswersRequest, AnswersResponse, FeedbackRequest, FeedbackResponse
from headtail.stages.serve.api_page import api_page
from headtail.stages.serve.body import read_body
from headtail.stages.serve.children import end_with_parent
from headtail.stages.serve.config import Config
from headtail.stages.serve.errors import RequestError, openapi_errors
from headtail.stages.serve.front.counters import Counters, read_counters
from headtail.stages.serve.login import FailedLogins, Login, caller_network
from headtail.stages.serve.metrics import prometheus_text
from headtail.stages.serve.page_requests import add_errors
from headtail.stages.serve.run_folder import RunPlan, read_plan, task_folder

PAGE = Path(__file__).parent / "page.html"
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
MOST_BYTES = 65_536  # of an admin call: an answer and its reason
_PassOn = Callable[[Request], Awaitable[Response]]
_SENT_ON = ("authorization", "content-type")  # headers that matter to the public port
_ERRORS = openapi_errors(
    "bad_request",
    "unauthorized",
    "forbidden",
    "request_timeout",
    "too_large",
    "invalid",
    "rate_limited",
    "internal",
    "overloaded",
    "not_ready",
)


def make_app(
    counters: Mapping[str, Path],
    public: httpx.AsyncClient,
    login: Login | None = None,
    calls: AdminCalls | None = None,
    open_metrics: bool = True,
    config: Config | None = None,
    here_alone: bool = False,
    further: str = "",
) -> FastAPI:
    """The app of a task. `counters`: of all tasks by name, the first one first; `public`: a client whose base URL is the public port;
    `open_metrics`: whether /metrics needs no login; `further`: name of the task below whose path the app is mounted; empty: of the first.

    `here_alone`: whether it answers only to names of this machine, so that no site's name can be made to lead here (DNS rebinding).

    `config`: its limits on bodies hold here too; None: the default ones.
    """
    limits = config or Config()
    description = "Answers search queries from a published cache, else a realtime student, else the task's fallback."
    app = FastAPI(title="headtail", version=__version__, description=description, docs_url=None, redoc_url=None)
    add_errors(app, here_alone)

    async def pass_on(request: Request) -> Response:
        return await _pass_on(request, public, limits)

    _add_answer(app, pass_on)
    _add_operations(app, counters, pass_on, None if open_metrics else login)
    _add_pages(app, _links(list(counters), further))
    if calls is not None and login is not None:
        for name in CALLS:
            _add_call(app, name, calls, login, limits.body_timeout_s)
    return app


async def _pass_on(request: Request, public: httpx.AsyncClient, limits: Config) -> Response:
    """The public port's response to this request."""
    body = await read_body(request.scope["headers"], request.receive, limits.max_body_bytes, limits.body_timeout_s)
    headers = {name: value for name, value in request.headers.items() if name in _SENT_ON}
    url = httpx.URL(path=request.url.path, query=request.url.query.encode())
    try:
        found = await public.request(request.method, url, content=body, headers=headers)
    except httpx.HTTPError:
        raise RequestError("not_ready", "no front process answers", fix="see the server's log") from None
    kept = {name: found.headers[name] for name in ("retry-after", "www-authenticate", "allow") if name in found.headers}
    return Response(found.content, found.status_code, kept, found.headers.get("content-type"))


def _add_answer(app: FastAPI, pass_on: _PassOn) -> None:
    def body(model: type[BaseModel]) -> dict[str, Any]:
        return {"requestBody": {"required": True, "content": {"application/json": {"schema": model.model_json_schema()}}}}

    one: dict[int | str, dict[str, Any]] = {200: {"model": AnswerResponse}, **_ERRORS}
    many: dict[int | str, dict[str, Any]] = {200: {"model": AnswersResponse}, **_ERRORS}

    @app.post("/v1/answer", responses=one, response_class=JSONResponse, openapi_extra=body(AnswerRequest), summary="Answer one query")
    async def post_answer(request: Request) -> Response:
        return await pass_on(request)

    @app.get("/v1/answer", responses=one, response_class=JSONResponse, summary="Answer one query, from a browser or curl")
    async def get_answer(request: Request, query: Annotated[str | None, Query(description="what a person typed")] = None) -> Response:
        return await pass_on(request)

    @app.post(
        "/v1/answers", responses=many, response_class=JSONResponse, openapi_extra=body(AnswersRequest), summary="Answer up to 1,000 queries"
    )
    async def post_answers(request: Request) -> Response:
        return await pass_on(request)

    taken: dict[int | str, dict[str, Any]] = {202: {"model": FeedbackResponse}, **_ERRORS}

    @app.post(
        "/v1/feedback",
        responses=taken,
        status_code=202,
        response_class=JSONResponse,
        openapi_extra=body(FeedbackRequest),
        summary="Say whether an answer was right, was used, or what it should have been",
    )
    async def post_feedback(request: Request) -> Response:
        return await pass_on(request)


def _add_operations(app: FastAPI, counters: Mapping[str, Path], pass_on: _PassOn, login: Login | None) -> None:
    @app.get("/v1/release", summary="What is being served, since when, on what evidence; queries to try")
    async def what_is_served(request: Request) -> Response:
        return await pass_on(request)

    @app.get("/healthz", summary="A front process is alive")
    async def alive(request: Request) -> Response:
        return await pass_on(request)

    @app.get("/readyz", summary="A release is open; the student may be away, then misses are degraded")
    async def ready(request: Request) -> Response:
        return await pass_on(request)

    @app.get("/metrics", response_class=PlainTextResponse, summary="Prometheus metrics of all front processes together")
    async def metrics(request: Request) -> Response:
        if login is not None:
            login.check(request.headers.get("authorization", ""), _network(request), "metrics")
        readings = {name: read_counters(path) for name, path in counters.items()}
        return Response(prometheus_text(readings), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_call(app: FastAPI, name: str, calls: AdminCalls, login: Login, body_s: float) -> None:
    """The admin call `name`, below /admin/. Its key is checked before its body is read."""
    call = CALLS[name]
    extra = {"requestBody": {"content": {"application/json": {"schema": call.body.model_json_schema()}}}} if call.method == "POST" else None

    async def endpoint(request: Request) -> Response:
        network = _network(request)
        who = login.check(request.headers.get("authorization", ""), network, "admin")
        body = await read_body(request.scope["headers"], request.receive, MOST_BYTES, body_s)
        made = await run_in_threadpool(calls.run, name, body, who, network)
        return Response(made, media_type="application/json")

    summary, options = f"{call.summary} (scope admin)", {"response_class": Response, "responses": _ERRORS}
    app.add_api_route(f"/admin/{name}", endpoint, methods=[call.method], summary=summary, openapi_extra=extra, **options)  # type: ignore[arg-type]


def _network(request: Request) -> str:
    return caller_network(request.client.host if request.client is not None else "")


def _links(tasks: Sequence[str], further: str) -> str:
    """HTML: where the pages of all tasks are, seen from one of them; empty when there is one task. Names need no escape: see Config."""
    top = "../../" if further else "./"
    places = {tasks[0]: top, **{name: f"{top}tasks/{name}/" for name in tasks[1:]}} if len(tasks) > 1 else {}
    here = further or tasks[0]
    return "".join(f'<a href="{place}"{" aria-current=page" if name == here else ""}>{name}</a>' for name, place in places.items())


def _add_pages(app: FastAPI, links: str) -> None:
    page = PAGE.read_text(encoding="utf-8").replace("<!-- tasks -->", links)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def try_it() -> Response:
        return HTMLResponse(page, headers={**HEADERS, "content-security-policy": POLICY})

    assets = _swagger()

    @app.get("/docs", response_class=HTMLResponse, include_in_schema=False)
    async def docs() -> HTMLResponse:
        if assets is None:
            return HTMLResponse(api_page(app.openapi()), headers={**HEADERS, "content-security-policy": POLICY})
        local: dict[str, Any] = {"swagger_js_url": "docs/swagger-ui-bundle.js", "swagger_css_url": "docs/swagger-ui.css"}
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
    """Swagger UI as vLLM ships it, so that /docs works without a network; None without vLLM: then /docs is a plain page (`api_page`)."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "entrypoints" / "serve" / "instrumentator" / "static"
    return folder if (folder / "swagger-ui-bundle.js").is_file() else None


def _longest(plan: RunPlan) -> float:
    """Seconds that the public port may take for a task's answer, with some to spare."""
    config = plan.config
    return max(config.realtime_timeout_ms + config.escalation.timeout_ms, config.answers_timeout_ms) / 1000 + 10


def main() -> None:
    """Command line: PLAN."""
    hide_in_output()
    path = Path(sys.argv[1])
    plan = read_plan(path)
    end_with_parent(plan.parent)
    config = plan.config
    folders = {plan.name: path.parent, **{task.name: task_folder(path.parent, task.name) for task in plan.tasks}}
    counters = {name: folder / "counters" for name, folder in folders.items()}
    client = httpx.AsyncClient(base_url=config.url, timeout=max(map(_longest, (plan, *plan.tasks))), trust_env=False)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s")
    login, count = None, None
    if config.api_keys:
        admit = open_admission(config.api_keys, path.parent / "limits", "")
        count = Counters(counters[plan.name], config.fronts + 1).add  # the row after the collector's
        login = Login(admit, FailedLogins(), count)
    here_alone = is_loopback(config.admin_host)

    def pages(task: RunPlan, further: str = "") -> FastAPI:
        calls = AdminCalls(open_storage(task.config.root), count) if count is not None and config.admin_calls else None
        alone = here_alone and not further  # a further task's are behind the check of the first's
        return make_app(counters, client, login, calls, here_alone or not config.api_keys, task.config, alone, further)

    app = pages(plan)
    for task in plan.tasks:
        app.mount(f"/tasks/{task.name}", pages(task, task.name))
    options: dict[str, Any] = {"log_level": "error", "ws": "none", "proxy_headers": False}  # a header does not say who calls
    options |= {"http": "h11", "h11_max_incomplete_event_size": config.max_header_bytes}  # its other parser has no limit on headers
    uvicorn.Server(uvicorn.Config(app, host=config.admin_host, port=config.admin, **options)).run()


if __name__ == "__main__":
    main()
