"""A server for a minute under three times the misses that its student can answer, with hits beside them, in an open loop.

    python -m tests.bench.overload --root build/quickstart --larger      # make bench-overload: build/bench/overload.json

Requests come at random times, whatever became of those before: hits at one rate from the beginning to the end; misses at a third of what
the student answers, then at three times that, then at a third again. Each miss is a query that nobody asked before. Every second the
memory of the fronts and of the student is read. Caller, fronts and student share the machine; with --fronts-first the caller and the
fronts get a core whenever they want one, as if they had cores of their own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any, NamedTuple

import numpy as np
import psutil

from headtail.adapters.storage import open_storage, read_table
from headtail.cache import read_manifest
from headtail.core.config import build_config
from headtail.core.rows import Source
from headtail.releases import release as releases
from headtail.stages import serve
from headtail.stages.simulate.probe import ProbeExchange, ask_in_turn
from headtail.stages.simulate.stage import unknown_queries

from .machine import machine, write_figures
from .open_loop import Sending, send_at_random
from .serve import larger_student

OVERLOAD, CALM = 3.0, 1 / 3  # times what the student can answer
TOGETHER = 64  # misses in flight that show what it can answer
WITHIN_MS = 50.0  # an answer that is not the student's should come in that time
WINDOW_S, AGAIN = 5, 2.0  # recovered: for so many seconds hits have at most so many times the p99 of before, and no miss is degraded
PARTS = {"fronts": "headtail.stages.serve.front.program", "students": "ServeReplica"}


class Answered(NamedTuple):
    """One request. `at`: when it was sent. `kind`: cache, student, withheld, dynamic, fallback, 429, 503, wrong, lost."""

    at: float
    ms: float
    hit: bool
    kind: str


def answered(hit: bool, exchange: ProbeExchange) -> Answered:
    """What became of a request. A refusal without Retry-After, and a hit that is not from the cache, are wrong."""
    if exchange.status == 0:
        kind = "lost"
    elif exchange.status in (429, 503) and exchange.retry_after:
        kind = str(exchange.status)
    elif exchange.status != 200:
        kind = "wrong"
    else:
        kind = answer_kind(json.loads(exchange.body))
        kind = "wrong" if hit != (kind == "cache") else kind
    return Answered(exchange.sent, 1000 * exchange.seconds, hit, kind)


def answer_kind(body: Mapping[str, Any]) -> str:
    """Who answered. `withheld`: the student, and a guardrail refused it."""
    if body["cached"]:
        return "cache"
    if body["degraded"]:
        return "withheld" if body["reason"] == "withheld" else "fallback"
    return "dynamic" if body["source"] == Source.DYNAMIC else "student"


def phase_figures(name: str, requests: Sequence[Answered], began: float, ended: float) -> dict[str, Any]:
    """One line of the table: the requests that were sent between two moments."""
    mine = [one for one in requests if began <= one.at < ended]
    hits, misses = [one for one in mine if one.hit], [one for one in mine if not one.hit]
    excess = [one.ms for one in misses if one.kind in ("fallback", "429", "503")]
    return {
        "phase": name,
        "seconds": ended - began,
        "hits_per_s": len(hits) / (ended - began),
        "hit_p50_ms": _quantile([one.ms for one in hits], 0.5),
        "hit_p99_ms": _quantile([one.ms for one in hits], 0.99),
        "right_hit_share": sum(one.kind == "cache" for one in hits) / len(hits) if hits else None,
        "misses_per_s": len(misses) / (ended - began),
        "misses": dict(Counter(one.kind for one in misses)),
        "student_p99_ms": _quantile([one.ms for one in misses if one.kind == "student"], 0.99),
        "excess_share": len(excess) / len(misses) if misses else None,
        "excess_p50_ms": _quantile(excess, 0.5),
        "excess_p99_ms": _quantile(excess, 0.99),
        "excess_within_50_ms": sum(ms <= WITHIN_MS for ms in excess) / len(excess) if excess else None,
    }


def _quantile(values: Sequence[float], share: float) -> float | None:
    return float(np.quantile(values, share)) if values else None


def recovery_s(requests: Sequence[Answered], ended: float, p99_ms: float, last: float) -> float | None:
    """Whole seconds after the overload from which on, for WINDOW_S seconds, hits have at most AGAIN times `p99_ms`, and each miss has the
    student's answer. None: not up to `last`."""
    for second in range(int(last - ended) - WINDOW_S + 1):
        found = phase_figures("", requests, ended + second, ended + second + WINDOW_S)
        if found["hit_p99_ms"] is not None and found["hit_p99_ms"] <= AGAIN * p99_ms and not found["excess_share"]:
            return float(second)
    return None


def memory_figures(at: Sequence[float], mib: Sequence[float], began: float, ended: float) -> dict[str, float]:
    """Resident memory before the overload, at its maximum, and its slope during it, in MiB per minute."""
    moments, values = np.asarray(at), np.asarray(mib)
    during = (moments >= began) & (moments < ended)
    slope = float(np.polyfit(moments[during], values[during], 1)[0])
    return {
        "before_mib": float(values[moments < began][-1]),
        "most_mib": float(values.max()),
        "last_mib": float(values[-1]),
        "mib_per_minute": 60 * slope,
    }


def part_processes(name: str) -> list[psutil.Process]:
    """The processes of one of PARTS, which are this process's."""
    found = [child for child in psutil.Process().children(recursive=True) if any(PARTS[name] in part for part in child.cmdline())]
    if not found:
        raise SystemExit(f"no processes of the {name} found")
    return found


def put_fronts_first() -> None:
    """Caller and fronts get a core whenever they want one, as if they had their own. PermissionError where this process may not say so."""
    for thread in (0, *(thread.id for process in part_processes("fronts") for thread in process.threads())):
        os.sched_setscheduler(thread, os.SCHED_RR, os.sched_param(1))


@contextmanager
def memory_readings() -> Iterator[dict[str, list[float]]]:
    """Each second: the moment, and MiB of each part, all its processes together."""
    parts = {name: part_processes(name) for name in PARTS}
    found: dict[str, list[float]] = {name: [] for name in ("at", *parts)}
    end = Event()

    def read() -> None:
        while not end.wait(1.0):
            found["at"].append(time.perf_counter())
            for name, processes in parts.items():
                found[name].append(sum(process.memory_info().rss for process in processes) / 2**20)

    thread = Thread(target=read, name="memory")
    thread.start()
    try:
        yield found
    finally:
        end.set()
        thread.join()


class Queries:
    """Hits as people ask them; misses that nobody asked before."""

    def __init__(self, root: str) -> None:
        store, self._rng = open_storage(root), random.Random(0)
        manifest = read_manifest(store, releases.load_release(store).snapshot)
        table = read_table(store, manifest.files["answers"], ["query", "count"])
        self._known, self._counts = table["query"].to_pylist(), table["count"].to_pylist()
        self._unknown = unknown_queries(self._known, 10_000_000, self._rng)

    def hits(self, number: float) -> list[str]:
        return self._rng.choices(self._known, weights=self._counts, k=round(number))

    def misses(self, number: float) -> list[str]:
        return [next(self._unknown) for _ in range(round(number))]


async def send_phases(
    url: str, queries: Queries, hits_per_s: float, phases: Sequence[tuple[str, float, float]]
) -> tuple[list[Answered], list[float], list[Sending]]:
    """Hits and misses at once. `phases`: name, seconds, misses per second. Also the moments between phases, with the first and the last."""
    whole = sum(seconds for _, seconds, _ in phases)
    hits, misses = queries.hits(whole * hits_per_s), [queries.misses(seconds * rate) for _, seconds, rate in phases]
    steady = asyncio.create_task(send_at_random(url, hits, hits_per_s, 1))
    moments, sendings = [time.perf_counter()], []
    running: set[asyncio.Task[Sending]] = set()
    for place, (_, seconds, rate) in enumerate(phases):
        running.add(task := asyncio.create_task(send_at_random(url, misses[place], rate, 2 + place)))
        sendings.append(task)
        await asyncio.sleep(max(0.0, moments[-1] + seconds - time.perf_counter()))
        moments.append(time.perf_counter())
    held, made = await steady, [await task for task in sendings]
    found = [answered(True, one) for one in held.exchanges]
    found += [answered(False, one) for sending in made for one in sending.exchanges]
    return sorted(found), moments, [held, *made]


def measure(flags: argparse.Namespace, root: str, model: str) -> dict[str, Any]:
    """Capacity, then the three phases."""
    fields = {"root": root, "port": flags.port, "model": {"model": model}}
    queries = Queries(root)
    with serve.start_server(build_config(serve.Config, fields, where="bench")) as server:
        asyncio.run(ask_in_turn(server.url, [*queries.hits(1000), *queries.misses(300)], 8))  # warm
        capacity = closed_loop_per_s(server.url, queries, flags.capacity_seconds)
        if flags.fronts_first:
            put_fronts_first()
        print(f"the student answers {capacity:,.0f} misses/s with {TOGETHER} in flight", flush=True)
        phases = [("before", flags.calm, CALM), ("overload", flags.seconds, OVERLOAD), ("after", flags.calm, CALM)]
        with memory_readings() as memory:
            planned = [(name, seconds, times * capacity) for name, seconds, times in phases]
            requests, moments, sendings = asyncio.run(send_phases(server.url, queries, flags.hits, planned))
    rows = [phase_figures(phase[0], requests, *moments[place : place + 2]) for place, phase in enumerate(phases)]
    before, during, _ = rows
    figures = {
        "capacity_per_s": capacity,
        "overload_hit_p99_ratio": during["hit_p99_ms"] / before["hit_p99_ms"],
        "excess_p99_ms": during["excess_p99_ms"],
        "recovery_s": recovery_s(requests, moments[2], before["hit_p99_ms"], moments[3]),
        "answered_share": sum(one.kind not in ("lost", "wrong") for one in requests) / len(requests),
    }
    return {
        "figures": figures, "phases": rows,
        "memory": {name: memory_figures(memory["at"], memory[name], *moments[1:3]) for name in PARTS},
        "memory_by_second": {name: [round(value, 1) for value in memory[name]] for name in PARTS},
        "caller_busy": [one.busy for one in sendings[1:]],
        "caller_late_p99_ms": [_quantile(one.late_ms, 0.99) for one in sendings[1:]],
    }  # fmt: skip


def closed_loop_per_s(url: str, queries: Queries, seconds: float) -> float:
    """Misses per second that the student answers with TOGETHER in flight; what is not its own answer does not count."""
    many, rate = 500, 0.0
    for _ in range(2):  # the first time to see how many fill the seconds
        misses = queries.misses(many)
        began = time.perf_counter()
        replies = asyncio.run(ask_in_turn(url, misses, TOGETHER))
        rate = sum(reply.reason in ("", "withheld") for reply in replies) / (time.perf_counter() - began)
        many = max(500, int(rate * seconds))
    return rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="build/quickstart", help="store with a release that has a student")
    parser.add_argument("--larger", action="store_true", help="the release's encoder in the size of a small BERT, random weights")
    parser.add_argument("--fronts-first", action="store_true", help="caller and fronts get cores before the student does (root)")
    parser.add_argument("--port", type=int, default=8430)
    parser.add_argument("--hits", type=float, default=100, help="per second")
    parser.add_argument("--seconds", type=float, default=60, help="of overload")
    parser.add_argument("--calm", type=float, default=30, help="seconds before it and after it")
    parser.add_argument("--capacity-seconds", type=float, default=8, help="for what the student can answer")
    parser.add_argument("--out", type=Path, default=Path("build/bench/overload.json"))
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="headtail-overload-") as folder:
        root = str(shutil.copytree(flags.root, Path(folder, "store")))  # the request log is written into it
        model = larger_student(root, Path(folder, "student")) if flags.larger else ""
        found = measure(flags, root, model)
    for row in (*found["phases"], found["memory"], found["figures"]):
        print(row)
    write_figures(flags.out, {**found, **machine()})


if __name__ == "__main__":
    main()
