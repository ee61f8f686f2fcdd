"""The simulator beside the server: the same requests at two loads, simulated from service times that were measured at a low one.

    python -m tests.bench.simulator --root build/quickstart      # make bench-simulate: build/bench/simulate.json

Hits are drawn as people ask them, misses from a pool in which some come again. A round sends requests at random times at two loads, and
measures the service times (requests alone, and misses together) before and after each. These very requests are simulated at the times at
which they were sent, with both measurements: the speed of a shared machine changes within seconds.
The caller, the fronts and the student share the machine: the caller's share of a core is taken off the cores that are simulated, and how
late it sent is among the figures.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from headtail.adapters.storage import open_storage, read_table
from headtail.cache import read_manifest
from headtail.core.config import build_config
from headtail.releases import release as releases
from headtail.stages import serve
from headtail.stages.simulate.design import ServiceTimes, ServingDesign
from headtail.stages.simulate.flow import WAYS, Arrivals, simulate_flow
from headtail.stages.simulate.probe import CROWD, ProbeReply, ask_in_turn, measure_times, metrics_of, probe_reply
from headtail.stages.simulate.stage import unknown_queries

from .machine import machine, write_figures
from .open_loop import send_at_random

LOADS = (0.2, 0.6)  # of the rate at which a student that answers each miss alone would be busy all the time
HITS = 0.75  # share of the requests
SEEDS = 5  # simulations of the same requests
ALONE = 250  # misses of a round that are asked alone, and twice as many hits
POOL = 40_000  # queries that may miss: the first is asked most


class Load(NamedTuple):
    """Requests that were sent at random times. `query`: their numbers; `late_ms`: between the time to send and the sending."""

    replies: list[ProbeReply]
    query: list[int]
    late_ms: list[float]
    caller_busy: float


class Mixture:
    """Draws requests: (number of the query, its text, whether it is a hit)."""

    def __init__(self, root: str, seed: int) -> None:
        store = open_storage(root)
        manifest = read_manifest(store, releases.load_release(store).snapshot)
        table = read_table(store, manifest.files["answers"], ["query", "count"])
        self.known: list[str] = table.column("query").to_pylist()
        self._counts = np.asarray(table.column("count"), np.float64) / float(np.asarray(table.column("count")).sum())
        self._rng, self._fresh = np.random.default_rng(seed), list(unknown_queries(self.known, 3 * POOL, random.Random(seed)))
        self._pool, self._fresh = self._fresh[:POOL], self._fresh[POOL:]
        self._weights = 1 / np.sqrt(np.arange(1, POOL + 1))
        self._weights /= self._weights.sum()

    def draw(self, number: int) -> list[tuple[int, str, bool]]:
        hits = self._rng.random(number) < HITS
        known = self._rng.choice(len(self.known), number, p=self._counts)
        missed = self._rng.choice(POOL, number, p=self._weights)
        return [
            (int(k), self.known[k], True) if hit else (len(self.known) + int(m), self._pool[m], False)
            for hit, k, m in zip(hits, known, missed, strict=True)
        ]

    def hits(self, number: int) -> list[str]:
        return [self.known[k] for k in self._rng.choice(len(self.known), number, p=self._counts)]

    def fresh(self, number: int) -> list[str]:
        """Queries that nobody has asked."""
        taken, self._fresh = self._fresh[:number], self._fresh[number:]
        return taken


async def send(url: str, requests: Sequence[tuple[int, str, bool]], rate: float, seed: int) -> Load:
    """The requests at random times, in the order in which they were sent."""
    sent = await send_at_random(url, [text for _, text, _ in requests], rate, seed)
    replies = sorted(zip(map(probe_reply, sent.exchanges), (number for number, _, _ in requests), strict=True), key=lambda one: one[0].sent)
    return Load([reply for reply, _ in replies], [number for _, number in replies], sent.late_ms, sent.busy)


def take_priority() -> None:
    """Real-time priority for this process and those that it starts from now on. PermissionError when it may not have it."""
    os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))


def take_cores(port: int, folder: Path = Path("/proc")) -> None:
    """The caller and the fronts before the student, as niceness has it otherwise."""
    os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(2))
    front = re.compile(rf"headtail\.stages\.serve\.front\.program.*/serve-{port}/".encode())
    for found in folder.iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            if found.name.isdigit() and front.search((found / "cmdline").read_bytes()):
                os.sched_setscheduler(int(found.name), os.SCHED_RR, os.sched_param(2))


def simulated(
    load: Load, known: int, design: ServingDesign, measured: Sequence[ServiceTimes], cores: float
) -> tuple[np.ndarray, dict[str, float]]:
    """Seconds of the same requests, SEEDS times over with each of the service times, and shares by way."""
    at, query = np.array([reply.sent for reply in load.replies]), np.array(load.query)
    arrivals = Arrivals(at - at[0], query, query < known)
    outcomes = [simulate_flow(arrivals, design, times, seed, cores) for times in measured for seed in range(SEEDS)]
    ways = np.concatenate([outcome.way for outcome in outcomes])
    return np.concatenate([outcome.seconds for outcome in outcomes]), {name: float((ways == i).mean()) for i, name in enumerate(WAYS)}


def quantiles(seconds: Any) -> dict[str, float]:
    return {f"p{q:g}_ms": float(1000 * np.quantile(seconds, q / 100)) for q in (50, 95, 99)}


def medians(times: ServiceTimes) -> dict[str, Any]:
    return {name: value if "rest" in name else float(np.median(value)) for name, value in times.model_dump().items()}


def one_round(url: str, mixture: Mixture, design: ServingDesign, seconds: float, cores: int, seed: int) -> list[dict[str, Any]]:
    """Each load: what was met, and what is simulated with the service times of before and of after it."""

    def probe() -> ServiceTimes:
        return asyncio.run(measure_times(url, metrics_of(url), mixture.hits(2 * ALONE), mixture.fresh(ALONE + CROWD), seed))

    measured = [probe()]
    capacity = 1000 / (1 - HITS) / float(np.median(measured[0].student_ms))
    found = []
    for share in LOADS:
        rate = share * capacity
        load = asyncio.run(send(url, mixture.draw(max(100, round(rate * seconds))), rate, seed))
        met = np.array([reply.seconds for reply in load.replies])
        measured.append(probe())
        made, ways = simulated(load, len(mixture.known), design, measured[-2:], cores - load.caller_busy)
        sources = [reply.source if not reply.cached else "cache" for reply in load.replies]
        found.append({
            "load": share, "rate_per_s": rate, "requests": len(met), "met": quantiles(met), "simulated": quantiles(made),
            "met_shares": {name: sources.count(name) / len(sources) for name in sorted(set(sources))}, "simulated_shares": ways,
            "caller_busy": load.caller_busy, "caller_late_p99_ms": float(np.quantile(load.late_ms, 0.99)),
            "times": [medians(times) for times in measured[-2:]],
            "met_s": met.tolist(), "simulated_s": made.tolist(),
        })  # fmt: skip
        print(
            {name: found[-1][name] for name in ("load", "rate_per_s", "met", "simulated", "caller_busy", "caller_late_p99_ms")}, flush=True
        )
    print(found[-1]["times"], found[-1]["met_shares"], found[-1]["simulated_shares"], flush=True)
    return found


def errors(rounds: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """By load, over all rounds together: what was met beside what was simulated; and the worst relative errors."""
    table: list[dict[str, Any]] = []
    worst: dict[str, float] = {}
    for share in LOADS:
        mine = [one for one in rounds if one["load"] == share]
        met, made = (quantiles(np.concatenate([one[name] for one in mine])) for name in ("met_s", "simulated_s"))
        error = {name: abs(made[name] / met[name] - 1) for name in met}
        table.append({"load": share, "met": met, "simulated": made, "error": error})
        for name, value in error.items():
            worst[name] = max(value, worst.get(name, 0.0))
    return table, {f"simulator_{p}_error": worst[f"{p}_ms"] for p in ("p50", "p99")}


def measure(root: str, port: int, seconds: float, rounds: int, alone: bool = False) -> dict[str, Any]:
    """All figures."""
    mixture, cores = Mixture(root, 0), os.cpu_count() or 1
    config = build_config(serve.Config, {"root": root, "port": port}, where="bench")
    design = ServingDesign(name="served", fronts=config.fronts, max_misses=config.max_misses, dynamic_ttl_s=config.dynamic.ttl_s)
    with serve.start_server(config) as server:
        if alone:
            take_cores(port)
        asyncio.run(ask_in_turn(server.url, [*mixture.hits(1000), *mixture.fresh(300)], 8))  # warm
        found = []
        for number in range(rounds):
            mixture = Mixture(root, number + 1)  # queries of its own: the dynamic tier knows those of the rounds before
            found += one_round(server.url, mixture, design, seconds, cores, number)
    table, worst = errors(found)
    for one in found:
        del one["met_s"], one["simulated_s"]
    return {"figures": worst, "loads": table, "rounds": found}


def simulator_errors(root: str = "build/quickstart") -> dict[str, float | None]:
    """For tests.bench.numbers. Makes the quickstart's store where there is none."""
    if not Path(root, "CURRENT").exists():
        command = ["-m", "headtail.cli", "pipeline", "--config", "jobs/configs/run_pipeline.laptop.yaml", "--root", root]
        subprocess.run([sys.executable, *command], check=True)
    try:
        take_priority()
        alone = True
    except PermissionError:
        print("no real-time priority: other work on this machine is in these figures")
        alone = False
    try:
        return dict(measure(root, 8420, 12.0, 3, alone)["figures"])
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="build/quickstart", help="store with a release that has a student")
    parser.add_argument("--port", type=int, default=8420)
    parser.add_argument("--seconds", type=float, default=12, help="of one load in one round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--real-time", action="store_true", help="real-time priority for server and caller, on a machine with other work (root)"
    )
    parser.add_argument("--out", type=Path, default=Path("build/bench/simulate.json"))
    flags = parser.parse_args()
    if flags.real_time:
        take_priority()
    found = measure(flags.root, flags.port, flags.seconds, flags.rounds, flags.real_time)
    for one in found["loads"]:
        print(one)
    print(found["figures"])
    write_figures(flags.out, {**found, **machine()})


if __name__ == "__main__":
    main()
