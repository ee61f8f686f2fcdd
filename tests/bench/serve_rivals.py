"""What the server is held against, each in a process of its own: a bare ASGI function, a stock Ray Serve deployment, the student alone.

    python -m tests.bench.serve_rivals bare ROOT PORT        # granian and one function: look up, decode nothing, send
    python -m tests.bench.serve_rivals stock ROOT PORT       # Ray Serve + FastAPI as their documentation has it
    python -m tests.bench.serve_rivals model ROOT MODEL      # the student, asked in its own process: one line of JSON

The first two print `up` when they answer, and end with their standard input. `MODEL` empty: the release's student.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from typing import Any
from urllib.parse import unquote_plus

from headtail.adapters.storage import open_storage
from headtail.cache import open_snapshot
from headtail.core.keys import normalise
from headtail.core.redact import redact
from headtail.examples import example_data
from headtail.releases import release as releases

QUESTIONS = 300  # asked one after another, for the student's latency
ABREAST = 32
SECONDS = 5.0


def tail_queries(n: int) -> list[str]:
    """Queries as people of the example data ask them, of another seed: a head of the shipped size has few of them."""
    return list(dict.fromkeys(example_data.meaning(99, rank, 10**6).text for rank in range(2 * n)))[:n]


async def _until_stdin_ends() -> None:
    await asyncio.to_thread(sys.stdin.buffer.read)


def bare(root: str, port: int) -> None:
    """The same lookup in one function, without key, limit, metrics or log."""
    from granian.constants import HTTPModes, Interfaces
    from granian.server.embed import Server
    from uvloop import run

    store = open_storage(root)
    cache = open_snapshot(store, releases.load_release(store).snapshot)
    headers = [(b"content-type", b"application/json")]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        query = unquote_plus(scope["query_string"].decode().removeprefix("query="))
        found = cache.find_stored(redact(normalise(query)).text)
        body = found.answer if found else b"null"
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def serve() -> None:
        server = Server(app, port=port, interface=Interfaces.ASGINL, http=HTTPModes.http1, websockets=False, log_enabled=False)
        serving = asyncio.create_task(server.serve())
        await asyncio.sleep(1)
        print("up", flush=True)
        await _until_stdin_ends()
        server.stop()  # type: ignore[no-untyped-call]
        await serving

    run(serve())


def stock(root: str, port: int) -> None:
    """FastAPI in a deployment of Ray Serve, all settings as they come."""
    from fastapi import FastAPI
    from ray import serve

    from headtail.adapters import cluster

    app = FastAPI()

    @serve.deployment
    @serve.ingress(app)
    class Stock:
        def __init__(self) -> None:
            store = open_storage(root)
            self.cache = open_snapshot(store, releases.load_release(store).snapshot)

        @app.get("/v1/answer")
        def answer(self, query: str) -> Any:
            found = self.cache.get(redact(normalise(query)).text)
            return {"query": query, "answer": found.plain_answer() if found else None}

    cluster.start_cluster()
    serve.start(http_options={"port": port})
    serve.run(Stock.bind(), name="stock")  # type: ignore[attr-defined]
    print("up", flush=True)
    sys.stdin.read()
    serve.shutdown()
    cluster.stop_cluster()


def model(root: str, name: str) -> None:
    """Latency of the student one query at a time, and its throughput with ABREAST of them."""
    from headtail.stages.serve.config import Config, RealtimeModel
    from headtail.stages.serve.realtime import Student
    from headtail.stages.serve.students import resolve_student

    store = open_storage(root)
    served = resolve_student(Config(root=root, model=RealtimeModel(model=name)), store, releases.load_release(store))
    if served is None:
        raise SystemExit("this release has no student: name one with --model")
    student = Student(served.model, store.root, served.task, served.stands_for, served.digest)

    queries = tail_queries(20_000)

    async def measure() -> dict[str, float]:
        await student.answer("warm up", {})
        took = []
        for number in range(QUESTIONS):
            started = time.perf_counter()
            await student.answer(queries[number], {})
            took.append(time.perf_counter() - started)
        done, end = 0, time.monotonic() + SECONDS

        async def ask(place: int) -> None:
            nonlocal done
            while time.monotonic() < end:
                await student.answer(queries[(place * 600 + done) % len(queries)], {})
                done += 1

        started = time.monotonic()
        await asyncio.gather(*(ask(place) for place in range(ABREAST)))
        return {"p50_ms": 1000 * sorted(took)[len(took) // 2], "per_s": done / (time.monotonic() - started)}

    print(json.dumps(asyncio.run(measure())), flush=True)
    student.close()
    os._exit(0)  # an engine's threads need not end in order


if __name__ == "__main__":
    {"bare": lambda: bare(sys.argv[2], int(sys.argv[3])), "stock": lambda: stock(sys.argv[2], int(sys.argv[3]))}.get(
        sys.argv[1], lambda: model(sys.argv[2], sys.argv[3])
    )()
