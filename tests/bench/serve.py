"""The server beside what it is held against: hits, misses, overload. Needs wrk (apt-get install wrk) and a quiet machine.

    python -m tests.bench.serve --root build/quickstart      # make bench-serve: build/bench/serve.json
    python -m tests.bench.serve --root build/quickstart --larger --out build/bench/serve_larger.json

Hits: headtail with key check, rate limit, metrics and request log on, a bare ASGI function and a stock Ray Serve deployment that look the
same query up, in turn. Misses: against the student asked in its own process. Overload: three times the misses that the student can
answer, while hits go on. Each hit that is checked is compared with the published answer.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import httpx

from headtail.adapters.storage import open_storage, read_table
from headtail.cache import read_manifest
from headtail.client import Client, ClientConfig
from headtail.core.config import build_config
from headtail.engines import ModelConfig
from headtail.engines.models import find_model
from headtail.releases import release as releases
from headtail.stages import serve
from headtail.stages.serve.api_keys import add_key

from .machine import machine, write_figures
from .serve_rivals import tail_queries
from .wrk import Load, load, load_of, loading

HITS = 8  # connections that ask for hits
MISSES = 32  # that ask for misses, for throughput
CROWD = 150  # that ask for more misses than can be answered
OVERLOAD = 3.0  # times what the student can answer
CHECKED = 2000


class Bench:
    """One release, its head queries, and the servers that are measured on it."""

    def __init__(self, root: str, model: str, port: int, seconds: float, fronts: int, folder: Path) -> None:
        self.root, self.model, self.port, self.seconds, self.fronts, self.folder = root, model, port, seconds, fronts, folder
        store = open_storage(root)
        manifest = read_manifest(store, releases.load_release(store).snapshot)
        table = read_table(store, manifest.files["answers"], ["query", "answer"]).slice(0, 20_000)
        self.answers = dict(zip(table.column("query").to_pylist(), table.column("answer").to_pylist(), strict=True))
        self.hits = [f"/v1/answer?query={quote_plus(query)}" for query in self.answers]
        missing = (query for query in tail_queries(25_000) if query not in self.answers)
        self.misses = [f"/v1/answer?query={quote_plus(query)}" for query in missing]
        self.url = f"http://127.0.0.1:{port}"
        self.key = add_key(folder / "keys", "bench", ["answer"], per_s=1e6, burst=1_000_000)

    @contextlib.contextmanager
    def headtail(self) -> Iterator[None]:
        """The server with all that it does for a request. The dynamic tier is off: every miss is the student's."""
        fields = {
            "root": self.root,
            "port": self.port,
            "fronts": self.fronts,
            "api_keys": str(self.folder / "keys"),
            "model": {"model": self.model},
            "dynamic": {"enabled": False},
            "realtime_timeout_ms": 20_000,
        }
        with serve.start_server(build_config(serve.Config, fields, where="bench")):
            yield

    @contextlib.contextmanager
    def rival(self, name: str) -> Iterator[None]:
        """A bare function in as many processes as there are fronts, or one stock deployment."""
        command = [sys.executable, "-m", "tests.bench.serve_rivals", name, self.root, str(self.port)]
        count = self.fronts if name == "bare" else 1
        started = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(count)]
        for process in started:
            assert process.stdout is not None
            while (line := process.stdout.readline()) != "up\n":
                if not line:
                    raise SystemExit(f"{name} did not start")
        try:
            yield
        finally:
            for process in started:
                process.communicate("")

    def load(self, paths: Sequence[str], connections: int, seconds: float = 0.0, rate: float = 0.0) -> Load:
        return load(self.url, paths, seconds or self.seconds, connections, rate, self.key)

    def right_share(self) -> float:
        """Share of checked hits that are the published answer."""
        random.seed(0)
        drawn = random.choices(list(self.answers), k=CHECKED)
        right = 0
        with httpx.Client(base_url=self.url, headers={"authorization": f"Bearer {self.key}"}, timeout=20) as client:
            for query in drawn:
                body = client.get("/v1/answer", params={"query": query}).json()
                right += body.get("cached") is True and body.get("answer") == json.loads(self.answers[query])
        return right / CHECKED


def hit_rates(bench: Bench, repeats: int) -> dict[str, list[Load]]:
    """Each system in turn, `repeats` times, at full load."""
    systems: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
        "headtail": bench.headtail,
        "bare": lambda: bench.rival("bare"),
        "stock": lambda: bench.rival("stock"),
    }
    found: dict[str, list[Load]] = {name: [] for name in systems}
    for turn in range(repeats):
        for name in list(systems) if turn % 2 == 0 else reversed(systems):
            with systems[name]():
                bench.load(bench.hits, HITS, seconds=1)  # warm
                found[name].append(bench.load(bench.hits, HITS))
                print(f"{name:<10} {found[name][-1].per_s:>10,.0f} hits/s, p99 {found[name][-1].p99_ms:.2f} ms", flush=True)
    return found


def under_overload(bench: Bench, seconds: float, peak: float, student_per_s: float) -> dict[str, float]:
    """Hits at a quarter of the peak, alone and beside three times the misses that the student answers."""
    alone = bench.load(bench.hits, HITS, rate=peak / 4)
    crowd = loading(bench.url, bench.misses, seconds, CROWD, OVERLOAD * student_per_s, bench.key)
    beside = loading(bench.url, bench.hits, seconds, HITS, peak / 4, bench.key)
    with crowd as misses, beside as hits:
        right = bench.right_share()
        served, asked = load_of(hits), load_of(misses)
    sent = served.requests + asked.requests
    return {
        "overload_hit_p99_ratio": served.p99_ms / alone.p99_ms,
        "overload_hit_p99_ms": served.p99_ms,
        "overload_miss_p99_ms": asked.p99_ms,
        "overload_misses_per_s": asked.per_s,
        "answered_share": 1 - (served.lost + asked.lost) / (sent + served.lost + asked.lost),
        "right_hit_share": right,
    }


def client_p99_us(bench: Bench, rounds: int = 50_000) -> float:
    """Of `Client.answer` for head queries, in microseconds."""
    queries, took = list(bench.answers), []
    random.seed(1)
    with Client(ClientConfig(url="", root=bench.root)) as client:
        for query in random.choices(queries, k=rounds):
            started = time.perf_counter()
            client.answer(query)
            took.append(time.perf_counter() - started)
    return 1e6 * sorted(took)[int(0.99 * rounds)]


def measure(bench: Bench, repeats: int, overload_s: float) -> dict[str, Any]:
    """All figures."""
    command = [sys.executable, "-m", "tests.bench.serve_rivals", "model", bench.root, bench.model]
    alone = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    rates = hit_rates(bench, repeats)
    per_s = {name: statistics.median(run.per_s for run in runs) for name, runs in rates.items()}
    figures: dict[str, Any] = {
        "hits_vs_stock_serve": per_s["headtail"] / per_s["stock"],
        "hits_vs_bare_asgi": per_s["headtail"] / per_s["bare"],
        "client_p99_us": client_p99_us(bench),
    }
    with bench.headtail():
        figures["hit_p99_ms_half_load"] = bench.load(bench.hits, 4 * HITS, rate=per_s["headtail"] / 2).p99_ms
        single, many = bench.load(bench.misses, 1), bench.load(bench.misses, MISSES)
        figures["miss_latency_ratio"] = single.p50_ms / alone["p50_ms"]
        figures["miss_throughput_ratio"] = many.per_s / alone["per_s"]
        figures |= under_overload(bench, overload_s, per_s["headtail"], alone["per_s"])
    runs = {name: [run._asdict() for run in taken] for name, taken in rates.items()}
    return {"figures": figures, "hits_per_s": per_s, "student": alone, "runs": runs}


def larger_student(root: str, folder: Path) -> str:
    """The release's encoder with as many parameters as a small BERT (6 layers, width 384) and random weights: as slow, and as wrong."""
    import torch
    from transformers import AutoConfig, AutoModelForTokenClassification

    store = open_storage(root)
    own = Path(find_model(ModelConfig(model=releases.load_release(store).student), store).path)
    shutil.copytree(own, folder)
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    torch.manual_seed(0)
    made = AutoModelForTokenClassification.from_config(AutoConfig.from_pretrained(folder, **sizes))
    print(f"student: {made.num_parameters() / 1e6:.1f} million parameters, random weights")
    made.save_pretrained(folder)
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="build/quickstart", help="store with a release")
    parser.add_argument("--model", default="", help="a model instead of the release's student, as in `headtail serve`")
    parser.add_argument("--larger", action="store_true", help="the release's encoder in the size of a small BERT, random weights")
    parser.add_argument("--port", type=int, default=8010)
    parser.add_argument("--fronts", type=int, default=2, help="front processes, and processes of the bare function")
    parser.add_argument("--seconds", type=float, default=10, help="of one run")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each system")
    parser.add_argument("--overload", type=float, default=60, help="seconds of overload")
    parser.add_argument("--out", type=Path, default=Path("build/bench/serve.json"))
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="headtail-bench-") as folder:
        model = larger_student(flags.root, Path(folder) / "student") if flags.larger else flags.model
        bench = Bench(flags.root, model, flags.port, flags.seconds, flags.fronts, Path(folder))
        found = measure(bench, flags.repeats, flags.overload)
    for name, value in found["figures"].items():
        print(f"{name:<28} {value:>14,.3f}")
    write_figures(flags.out, {**found, **machine()})


if __name__ == "__main__":
    main()
