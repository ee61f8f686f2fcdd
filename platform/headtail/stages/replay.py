"""Replay: holdout traffic against a running server, and what users would have seen.

    holdout (ingest) -> events drawn as they occurred -> HTTP -> requests (one row each), shares, latency, quality of labelled queries

Latency is what a caller sees, its own client included. The running release is part of the receipt's fingerprint: the
same release and settings are not measured twice. Knows nothing of how the server works inside.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import httpx
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from headtail.adapters import charts
from headtail.adapters.progress import progress_bar
from headtail.adapters.proxies import may_proxy
from headtail.adapters.server_key import key_headers
from headtail.adapters.storage import Storage, open_storage, stream_table
from headtail.adapters.storage.receipts import load_receipt
from headtail.core.config import Config as Fields
from headtail.core.config import StageConfig, execution
from headtail.core.errors import ConfigError, HeadtailError, InputError, LedgerError
from headtail.core.paths import StoreId
from headtail.core.receipt import LATEST, FileRef, Receipt, StageResult
from headtail.core.rows import KEY, Source
from headtail.core.score import Counts, f1
from headtail.core.task import Task, load_task
from headtail.releases.look import record_look
from headtail.releases.seal import sealed_keys
from headtail.stages.base import NotDone, Stage, run_once
from headtail.stages.plan.result import Result as PlanResult

PATHS = ("cache", "realtime", "fallback")

# One request. `source`: the answer source, empty on an error. `status`: HTTP, 0 when there was no reply.
REQUESTS = pa.schema(
    [
        ("query_key", KEY),
        ("query", pa.string()),
        ("source", pa.string()),
        ("cached", pa.bool_()),
        ("degraded", pa.bool_()),
        ("status", pa.int32()),
        ("latency_ms", pa.float64()),
        ("seen", pa.bool_()),
        ("reason", pa.string()),  # why it was degraded or failed
    ]
)


class Config(StageConfig):
    """What is sent where."""

    task: str = Field("query_segmentation", description="task folder or name of a shipped example: how answers are scored")
    log: str = Field(LATEST, description="ingest receipt whose holdout traffic is sent")
    plan: str = Field(LATEST, description="plan receipt: which queries have human labels, and their strata")
    url: str = execution(
        "http://127.0.0.1:8000", "address of the server; the fingerprint covers the release and not the address", pattern=r"^https?://.+"
    )
    release: str = Field("", description="release that the server must serve; empty: the one that it serves")
    requests: int = Field(2000, ge=1, description="events drawn from holdout traffic, each at most once; all of them when there are fewer")
    concurrency: int = Field(8, ge=1, le=1024, description="requests in flight")
    timeout_s: float = Field(10.0, gt=0, description="seconds after which a request counts as an error")
    seed: int = Field(0, ge=0, description="seed of the draw")


class ServedRelease(Fields):
    """What the server said that it serves."""

    id: StoreId = Field(description="id of the release")
    snapshot: StoreId | None = Field(None, description="id of its cache snapshot")
    student: str | None = Field(None, description="folder of the student that answers misses; empty: none does")
    coverage: float | None = Field(None, description="share (0..1) of the log's events that the snapshot answers")
    rows: int | None = Field(None, description="answers in the snapshot")
    realtime: Any = Field(None, description="the realtime student as it was deployed")


class PathFigures(Fields):
    """Replayed requests that took one path, and their latency in ms; null without any."""

    requests: int = Field(ge=0, description="requests")
    p50_ms: float | None = Field(None, description="half were answered within")
    p95_ms: float | None = Field(None, description="95 of 100 within")
    p99_ms: float | None = Field(None, description="99 of 100 within")


class ReplayFigures(Fields):
    """Shares of all requests, and latency of the answered ones."""

    requests: int = Field(ge=0, description="requests that were sent")
    errors: int = Field(ge=0, description="requests without an answer")
    cache_hit_share: float = Field(description="share answered from the snapshot")
    realtime_share: float = Field(description="share answered by the realtime student")
    fallback_share: float = Field(description="share answered by the fallback")
    degraded_share: float = Field(description="share that the fallback answered since the realtime student could not")
    requests_per_s: float = Field(description="requests per second")
    quality: float | None = Field(None, description="micro-F1 on requests whose query has human labels; null without any")
    answered: PathFigures = Field(description="all requests with an answer; `requests` counts errors too")
    paths: dict[str, PathFigures] = Field(description="by path: cache, realtime, fallback")

    def metrics(self) -> dict[str, float]:
        """By the names of a receipt's metrics."""
        found = {name: float(value) for name, value in self.model_dump(exclude={"answered", "paths"}, exclude_none=True).items()}
        for end, path in (("", self.answered), *((f"/{name}", path) for name, path in self.paths.items())):
            found |= {f"{name}{end}": value for name, value in path.model_dump(exclude={"requests"}, exclude_none=True).items()}
        return found


class Result(StageResult):
    """What was replayed against, and what came of it."""

    server: ServedRelease = Field(description="the release that the server served")
    url: str = Field(description="the server")
    figures: ReplayFigures | None = Field(None, description="shares and latency; null: a run of an earlier version")


class Event(NamedTuple):
    """One event of holdout traffic."""

    query_key: bytes
    query: str
    seen: bool


class EventReply(NamedTuple):
    """What the server made of one event. `answer` is None on an error."""

    event: Event
    status: int
    latency_ms: float
    answer: Any = None
    source: str = ""
    cached: bool = False
    degraded: bool = False
    reason: str = ""
    release: str = ""

    @property
    def path(self) -> str:
        """cache, realtime, fallback or errors."""
        if self.status != 200:
            return "errors"
        return "cache" if self.cached else "fallback" if self.source == Source.FALLBACK else "realtime"


def run(config: Config, task: Task | None = None) -> Receipt[Result]:
    """Replay, unless this release was replayed with these settings before. `task`: what `config.task` names, where it is loaded already."""
    served = server_facts(config.url, config.timeout_s)
    release = str(served["id"])
    if config.release and config.release != release:
        fix = "serve that release (--set release=...), or leave this field empty"
        raise ConfigError("the server serves another release", where="release", value=f"asked {config.release}, found {release}", fix=fix)

    def work(stage: Stage, log: Receipt, plan: Receipt, task: Task) -> Result:
        if served["task"] != task.name:
            raise ConfigError("the server serves another task", where="task", value=f"{served['task']}, not {task.name}")
        events = draw_events(stage.store, log, config.requests, config.seed)
        began = time.monotonic()
        with progress_bar("replay", len(events), "requests") as shown:
            met = asyncio.run(send(config, events, shown.advance))
        seconds = time.monotonic() - began
        labels = replay_labels(stage.store, plan, events)
        record_look(stage.store, "replay", task.name, task.policy_digest, _served_rows(met, labels))
        figures = _record(stage, task, met, seconds, labels)
        others = {m.release for m in met if m.release} - {release}
        if others:
            stage.note(f"the current release changed during the replay: some answers are of {', '.join(sorted(others))}")
        server = ServedRelease.model_validate({name: served.get(name) for name in ServedRelease.model_fields})
        return Result(server=server, url=config.url, figures=figures)

    return _run_once(config.model_copy(update={"release": release}), work, task)


def find_replay(config: Config, task: Task | None = None) -> Receipt[Result] | None:
    """The receipt of an earlier replay under `config` (which names the release), or None. Needs no server."""
    try:
        return _run_once(config, None, task)
    except NotDone:
        return None


def _run_once(config: Config, work: Callable[[Stage, Receipt, Receipt, Task], Result] | None, task: Task | None) -> Receipt[Result]:
    """The receipt that `work` makes, or that was made before. NotDone when there is neither."""
    task, store = task or load_task(config.task, config.allow_task_code), open_storage(config.root)
    log, plan = load_receipt(store, "ingest", config.log), load_receipt(store, "plan", config.plan, PlanResult)
    if plan.result.rebuilt:
        raise InputError(
            "this plan's head was chosen on all days: the holdout traffic that a replay sends is part of it and cannot measure it",
            where="plan",
            value=plan.path,
            fix="name a plan with rebuild=false, made before, or replay a log of later days",
        )
    replaces = {"task": task.name, "log": log.path, "plan": plan.path}

    def replay(stage: Stage) -> Result:
        assert work is not None
        return work(stage, log, plan, task)

    return run_once(
        "replay",
        Result,
        config,
        replay,
        inputs={"log": log, "plan": plan},
        task=task,
        version=2,
        replaces=replaces,
        only_found=work is None,
    )


def server_facts(url: str, timeout_s: float) -> dict[str, Any]:
    """What the server serves. InputError when nothing answers, or something that is not headtail."""
    where = f"{url.rstrip('/')}/v1/release"
    try:
        reply = httpx.get(where, timeout=timeout_s, trust_env=may_proxy(where), headers=key_headers(where))
        facts = reply.json()
    except httpx.HTTPError as error:
        raise InputError(f"no server answers: {error}", where="url", value=url, fix="start one: headtail serve, or set url") from None
    except ValueError:
        facts = None
    if not isinstance(facts, dict) or "id" not in facts:
        raise InputError("this is no headtail server", where="url", value=where, fix="set url to what `headtail serve` printed")
    return facts


def draw_events(store: Storage, log: Receipt, requests: int, seed: int) -> list[Event]:
    """Events of holdout traffic in random order, none twice: a query that came 50 times is 50 events."""
    holdout = log.output("holdout")
    counts = [np.asarray(batch.column("count"), dtype=np.int64) for batch in stream_table(store, holdout, ["count"])]
    ends = np.cumsum(np.concatenate(counts)) if counts else np.zeros(0, np.int64)
    total = int(ends[-1]) if len(ends) else 0
    if not total:
        raise InputError(
            "the log has no holdout traffic to replay", where=holdout.path, fix="ingest with holdout_days of at least 1, or a holdout_share"
        )
    chosen = np.random.default_rng(seed).choice(total, size=min(requests, total), replace=False)
    rows = np.searchsorted(ends, chosen, side="right")
    found = _rows(store, holdout, np.unique(rows))
    return [found[int(row)] for row in rows]


def _rows(store: Storage, holdout: FileRef, numbers: npt.NDArray[np.int64]) -> dict[int, Event]:
    """The rows of `holdout` with these numbers (ascending)."""
    found: dict[int, Event] = {}
    start = 0
    for batch in stream_table(store, holdout, ["query_key", "query", "seen"]):
        low, high = np.searchsorted(numbers, [start, start + batch.num_rows])
        mine = numbers[low:high]
        picked = batch.take(pa.array(mine - start)).to_pylist()
        found.update({int(row): Event(**item) for row, item in zip(mine, picked, strict=True)})
        start += batch.num_rows
    return found


async def send(config: Config, events: Sequence[Event], tell: Callable[[int], None]) -> list[EventReply]:
    """Every event once, `concurrency` at a time; a request that fails is an EventReply with its error."""
    queue: Iterator[tuple[int, Event]] = iter(enumerate(events))
    met: list[EventReply | None] = [None] * len(events)
    limits = httpx.Limits(max_connections=config.concurrency, max_keepalive_connections=config.concurrency)
    url, proxied = config.url.rstrip("/"), may_proxy(config.url)
    async with httpx.AsyncClient(
        base_url=url, limits=limits, timeout=config.timeout_s, trust_env=proxied, headers=key_headers(url)
    ) as client:

        async def sender() -> None:
            for place, event in queue:  # shared: each sender takes the next event that is left
                met[place] = await _send_one(client, event)
                tell(1)

        await asyncio.gather(*(sender() for _ in range(config.concurrency)))
    return [found for found in met if found is not None]


async def _send_one(client: httpx.AsyncClient, event: Event) -> EventReply:
    started = time.perf_counter()
    try:
        reply = await client.post("/v1/answer", json={"query": event.query})
        took = (time.perf_counter() - started) * 1000
        body = reply.json()
        if reply.status_code != 200:
            return EventReply(event, reply.status_code, took, reason=str(body)[:200])
        taken = {name: body[name] for name in ("answer", "source", "cached", "degraded", "reason", "release")}
        return EventReply(event, 200, took, **taken)
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        return EventReply(event, 0, (time.perf_counter() - started) * 1000, reason=f"{type(error).__name__}: {error}"[:200])


def replay_labels(store: Storage, plan: Receipt, events: Sequence[Event]) -> dict[bytes, Any]:
    """People's answers to the replayed queries, by query_key; none that is sealed."""
    keys = {event.query_key for event in events} - sealed_keys(store)
    pieces = stream_table(store, plan.output("human_labels"), ["query_key", "answer"])
    rows = (row for piece in pieces for row in piece.to_pylist())
    return {row["query_key"]: json.loads(row["answer"]) for row in rows if row["query_key"] in keys}


def _served_rows(replies: Sequence[EventReply], labels: Mapping[bytes, Any]) -> dict[str, pa.Table]:
    """What is compared with people's answers, as the ledger of looks knows it; nothing without any."""
    given = {m.event.query_key: m.answer for m in replies if m.event.query_key in labels}
    if not given:
        return {}
    columns = {
        "wanted": [json.dumps(labels[key], sort_keys=True) for key in given],
        "given": [json.dumps(a, sort_keys=True) for a in given.values()],
    }
    return {"served": pa.table({"query_key": pa.array(list(given), KEY), **columns})}


def replay_quality(task: Task, replies: Sequence[EventReply], labels: Mapping[bytes, Any]) -> tuple[float | None, int]:
    """(micro-F1, requests) over replayed requests that have human labels; each request counts, an error is an answer missed."""
    scored: list[Counts] = [task.score(labels[m.event.query_key], m.answer, m.event.query) for m in replies if m.event.query_key in labels]
    return (f1(scored) if scored else None), len(scored)


def replay_figures(replies: Sequence[EventReply], seconds: float, quality: float | None = None) -> ReplayFigures:
    """Shares of all requests, and latency in ms of the answered ones, overall and by path."""
    total, paths = len(replies), Counter(m.path for m in replies)
    return ReplayFigures(
        requests=total,
        errors=paths["errors"],
        cache_hit_share=paths["cache"] / total,
        realtime_share=paths["realtime"] / total,
        fallback_share=paths["fallback"] / total,
        degraded_share=sum(m.degraded for m in replies) / total,
        requests_per_s=total / seconds if seconds else 0.0,
        quality=quality,
        answered=_latency([m.latency_ms for m in replies if m.path != "errors"], total),
        paths={name: _latency([m.latency_ms for m in replies if m.path == name], paths[name]) for name in PATHS},
    )


def _latency(latency_ms: Sequence[float], requests: int) -> PathFigures:
    if not latency_ms:
        return PathFigures(requests=requests)
    p50, p95, p99 = (float(value) for value in np.quantile(latency_ms, [0.5, 0.95, 0.99]))
    return PathFigures(requests=requests, p50_ms=p50, p95_ms=p95, p99_ms=p99)


def _record(stage: Stage, task: Task, replies: Sequence[EventReply], seconds: float, labels: Mapping[bytes, Any]) -> ReplayFigures:
    paths = Counter(m.path for m in replies)
    if paths["errors"] == len(replies):
        raise HeadtailError("every request failed", where="url", value=replies[0].reason, fix="see the server's log")
    stage.rows = {"requests": len(replies), **{name: paths[name] for name in ("errors", *PATHS)}}
    if sum(paths.values()) != len(replies):
        raise LedgerError("requests do not add up", value=dict(paths))
    value, judged = replay_quality(task, replies, labels)
    figures = replay_figures(replies, seconds, value)
    stage.metrics = figures.metrics() | {"quality_requests": float(judged)}
    if value is not None:
        stage.note(
            f"quality is over the {judged:,} of {len(replies):,} requests whose query has human labels, as often as people sent them"
        )
    for reason, count in Counter(m.reason for m in replies if m.path == "errors").most_common(3):
        stage.note(f"{count} requests failed: {reason}")
    stage.table("requests", _table(replies))
    taken = {name: [m.latency_ms for m in replies if m.path == name] for name in PATHS}
    stage.figure("latency", charts.latency_chart(taken))
    return figures


def _table(replies: Sequence[EventReply]) -> pa.Table:
    rows = [
        {**m.event._asdict(), **{name: getattr(m, name) for name in ("source", "cached", "degraded", "status", "latency_ms", "reason")}}
        for m in replies
    ]
    return pa.Table.from_pylist(rows, schema=REQUESTS)
