"""A server under load while its parts are killed, its release is swapped, and it is stopped: what callers see of it.

    python -m tests.bench.serve_failures --root build/quickstart      # make bench-failures: build/bench/serve_failures.json

Real parts: front processes, two students on Ray Serve on two nodes of a Ray cluster, Redis, a second release of `--keys` more keys.
Callers ask for hits and misses at a steady rate; each hit is compared with the published answer of the release that it names. A request
whose connection is lost is sent once more over a new one. Needs redis-server.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from headtail.adapters.storage import Storage, open_storage
from headtail.cache import publish_snapshot, read_manifest
from headtail.cache.builder import OFFERED, build_snapshot
from headtail.core.rows import CACHED
from headtail.releases import release as releases
from headtail.stages.serve.api_keys import add_key

from .cache import make_input, read
from .callers import Answers, Callers, Outcome, Result, percentile_ms, share
from .machine import machine, write_figures

Event = tuple[str, Callable[[], None]]
READY = "Ctrl-C ends it"
NORMAL: tuple[Result, ...] = ("right", "student", "withheld")


def other_release(store: Storage, base: releases.Release, keys: int, folder: Path) -> releases.Release:
    """A release of the same queries with other answers, and of `keys` made-up queries."""
    manifest = read_manifest(store, base.snapshot)
    table = pq.read_table(store.local_path(manifest.files["answers"].path), columns=CACHED.names)
    answers = [json.dumps({"segments": [{"label": "topic", "text": query}]}) for query in table.column("query").to_pylist()]
    table = table.set_column(table.schema.get_field_index("answer"), "answer", pa.array(answers))
    streams: list[Any] = [[table.append_column("state", pa.array(["answered"] * table.num_rows)).select(OFFERED.names).cast(OFFERED)]]
    if keys:
        made = folder / "keys.parquet"
        make_input(made, keys)
        streams.append(read(made))
    (work := folder / "work").mkdir()
    built = build_snapshot(streams, work)
    published = publish_snapshot(store, built, task=base.task, task_fingerprint=base.task_fingerprint)
    return releases.derive_release(store, base.id, snapshot=published.id)


def answers_of(store: Storage, release: releases.Release, queries: Sequence[str]) -> dict[str, Any]:
    """What a release has published for these queries."""
    wanted, found = set(queries), {}
    path = store.local_path(read_manifest(store, release.snapshot).files["answers"].path)
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(columns=["query", "answer"]):
            rows = zip(batch.column("query").to_pylist(), batch.column("answer").to_pylist(), strict=True)
            found.update({query: json.loads(answer) for query, answer in rows if query in wanted})
    return found


class Redis:
    """Debian's redis-server on a Unix socket, without a disk."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "redis.sock"
        self.url = f"unix://{self._path}"
        self.start()

    def start(self) -> None:
        command = ["redis-server", "--port", "0", "--unixsocket", str(self._path), "--dir", str(self._path.parent), "--save", ""]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while not self._path.exists():
            if self._process.poll() is not None:
                raise SystemExit("redis-server ended at its start")
            time.sleep(0.02)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._path.unlink(missing_ok=True)


class Nodes:
    """A Ray cluster of two nodes, each with room for one student."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(initialize_head=True, head_node_args={**self._room(), "include_dashboard": False})
        self._second = self._cluster.add_node(wait=True, **self._room())
        self.address: str = self._cluster.address

    @staticmethod
    def _room() -> dict[str, Any]:
        return {"num_cpus": 2, "resources": {"student": 1}, "object_store_memory": 100_000_000}

    def kill_second(self) -> None:
        """As when its machine is lost: the raylet and all that it started."""
        self._second.kill_all_processes(check_alive=False, allow_graceful=False)

    def replace_second(self) -> None:
        self._second = self._cluster.add_node(wait=False, **self._room())

    def close(self) -> None:
        for node in (self._second, self._cluster.head_node):
            node.kill_all_processes(check_alive=False, allow_graceful=False)


class Trial:
    """The server and everything that can be killed."""

    def __init__(self, root: str, port: int, key_file: Path, redis: Redis, nodes: Nodes) -> None:
        self._root, self.port, self._keys, self.redis, self.nodes = root, port, key_file, redis, nodes
        self.store = open_storage(root)
        self.start()

    def start(self) -> None:
        """Start `headtail serve`; returns when it is ready."""
        fields = {
            "port": self.port,
            "api_keys": self._keys,
            "dynamic.redis_url": self.redis.url,
            "realtime_replicas": 2,
            "model.resources": '{"student": 1}',
            "model.cpus": 1,
            "refresh_s": 1,
        }
        sets = [part for name, value in fields.items() for part in ("--set", f"{name}={value}")]
        command = [sys.executable, "-m", "headtail.cli", "serve", "--root", self._root, *sets]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "RAY_ADDRESS": self.nodes.address}
        self.process = subprocess.Popen(command, env=environment, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        said = ""
        while READY not in said:
            line = self.process.stderr.readline()
            if not line:
                raise SystemExit(f"the server did not start:\n{said}")
            said += line
        self._drain()

    def close(self) -> None:
        """Stop the server if it runs."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait()

    def _drain(self) -> None:
        """What it says from now on is read by nobody; a full pipe would stop it."""
        stream = self.process.stderr
        threading.Thread(target=lambda: [None for _ in stream or ()], daemon=True).start()

    def kill_child(self, module: str) -> None:
        """The first child of the server that runs this module."""
        for child in psutil.Process(self.process.pid).children():
            if any(module in part for part in child.cmdline()):
                child.kill()
                return
        raise SystemExit(f"no process of {module} found")

    def kill_ray(self, title: str, most: int = 1) -> None:
        """Workers of the cluster by what Ray calls them."""
        found = [child for child in psutil.Process().children(recursive=True) if any(title in part for part in _cmdline(child))]
        if not found:
            raise SystemExit(f"no process {title} found")
        for child in found[:most]:
            child.kill()

    def swap(self, release: str) -> None:
        releases.promote(self.store, release)
        self._wait_for(release)

    def rollback(self) -> None:
        self._wait_for(releases.rollback(self.store).id)

    def _wait_for(self, release: str) -> None:
        with httpx.Client(base_url=f"http://127.0.0.1:{self.port + 1}", trust_env=False, timeout=20) as client:
            end = time.monotonic() + 300
            while f'release="{release}"' not in client.get("/metrics").text:
                if time.monotonic() > end:
                    raise SystemExit(f"release {release} is not served after 300 s")
                time.sleep(0.2)


def _cmdline(process: Any) -> list[str]:
    try:
        found: list[str] = process.cmdline()
    except psutil.Error:
        return []
    return found


def events_of(trial: Trial, second: releases.Release) -> Iterator[Event]:
    """What is done, in order."""
    yield "nothing", lambda: None
    yield "kill -9 of a front process", lambda: trial.kill_child("front.program")
    yield "kill -9 of a student", lambda: trial.kill_ray("ServeReplica")
    yield "kill -9 of both students", lambda: trial.kill_ray("ServeReplica", 2)
    yield "kill -9 of Serve's controller", lambda: trial.kill_ray("ServeController")
    yield "kill -9 of the log's collector", lambda: trial.kill_child("serve.collector")
    yield "kill -9 of the pages", lambda: trial.kill_child("serve.admin")
    yield "kill -9 of Redis", trial.redis.kill
    yield "Redis comes back", trial.redis.start
    yield "a node is lost", trial.nodes.kill_second
    yield "a node comes back", trial.nodes.replace_second
    yield "swap to the larger release", lambda: trial.swap(second.id)
    yield "rollback", trial.rollback


def report(name: str, began: float, ended: float, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """One line of the table: what was asked and seen between two moments."""
    mine = [outcome for outcome in outcomes if began <= outcome.at < ended]
    hits, misses = [one for one in mine if one.hit], [one for one in mine if not one.hit]
    odd = [one for one in mine if one.lost or one.result not in NORMAL]
    return {
        "event": name,
        "seconds": ended - began,
        "hits": len(hits),
        "right_hit_share": share(hits, "right"),
        "hit_p99_ms": percentile_ms(hits, 0.99),
        "misses": len(misses),
        "student_share": share(misses, "student", "withheld"),
        "miss_p99_ms": percentile_ms(misses, 0.99),
        "answered_share": share(mine, *NORMAL, "fallback", "refused"),
        "lost_connections": sum(one.lost for one in mine),
        "odd_until_s": max(one.at for one in odd) - began if odd else 0.0,
        "details": dict(Counter(f"{one.result}: {one.detail}" for one in odd)),
    }


def show(row: dict[str, Any]) -> None:
    print(
        f"{row['event']:<32} {row['hits']:>7,} {row['right_hit_share']:>9.4%} {row['hit_p99_ms']:>8.1f} {row['misses']:>6,} "
        f"{row['student_share']:>8.1%} {row['miss_p99_ms']:>8.0f} {row['answered_share']:>9.4%} {row['lost_connections']:>5} "
        f"{row['odd_until_s']:>7.1f}  {row['details'] or ''}",
        flush=True,
    )


def restart(trial: Trial) -> dict[str, float]:
    """kill -9 of the server itself, and the same command again at once: seconds until it answers hits. Then SIGTERM."""
    trial.process.kill()
    trial.process.wait()
    began = time.monotonic()
    trial.start()
    ready = time.monotonic() - began
    trial.process.terminate()
    began = time.monotonic()
    status = trial.process.wait(120)
    return {"restart_ready_s": ready, "stop_s": time.monotonic() - began, "stop_status": status}


def measure(flags: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All events, one after another, on a copy of the store: releases are promoted in it."""
    root = folder / "store"
    shutil.copytree(flags.root, root)
    store = open_storage(str(root))
    first = releases.load_release(store)
    began = time.monotonic()
    second = other_release(store, first, flags.keys, folder)
    print(f"second release: {read_manifest(store, second.snapshot).rows:,} keys, made in {time.monotonic() - began:.0f} s", flush=True)
    path = store.local_path(read_manifest(store, first.snapshot).files["answers"].path)
    queries = pq.read_table(path, columns=["query"]).column("query").to_pylist()
    answers: Answers = {release.id: answers_of(store, release, queries) for release in (first, second)}
    key = add_key(folder / "keys", "bench", ["answer"], per_s=1e6, burst=1_000_000)
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        redis, nodes = Redis(folder), Nodes()
        stack.callback(redis.kill)
        stack.callback(nodes.close)
        trial = Trial(str(root), flags.port, folder / "keys", redis, nodes)
        stack.callback(trial.close)
        with Callers(flags.port, key, answers, (flags.hits, flags.misses)) as callers:
            time.sleep(2)
            for name, act in events_of(trial, second):
                start = time.monotonic()
                act()
                time.sleep(flags.seconds)
                rows.append(report(name, start, time.monotonic(), callers.outcomes))
                show(rows[-1])
        after = restart(trial)
        print(
            f"kill -9 of the server: ready again after {after['restart_ready_s']:.1f} s; SIGTERM: ended after {after['stop_s']:.1f} s",
            flush=True,
        )
    hits = sum(row["hits"] for row in rows)
    total = hits + sum(row["misses"] for row in rows)
    figures = {
        "right_hit_share": sum(row["hits"] * row["right_hit_share"] for row in rows) / hits,
        "answered_share": sum((row["hits"] + row["misses"]) * row["answered_share"] for row in rows) / total,
        **after,
    }
    return {"figures": figures, "events": rows, "keys_of_second_release": read_manifest(store, second.snapshot).rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="build/quickstart", help="store with a release that has a student")
    parser.add_argument("--port", type=int, default=8010)
    parser.add_argument("--seconds", type=float, default=15, help="after each event")
    parser.add_argument("--hits", type=float, default=300, help="per second")
    parser.add_argument("--misses", type=float, default=20, help="per second")
    parser.add_argument("--keys", type=int, default=10_000_000, help="made-up keys of the second release")
    parser.add_argument("--out", type=Path, default=Path("build/bench/serve_failures.json"))
    flags = parser.parse_args()
    heads = ("event", "hits", "right", "p99 ms", "misses", "student", "p99 ms", "answered", "lost", "odd s")
    with tempfile.TemporaryDirectory(prefix="headtail-failures-") as folder:
        print("{:<32} {:>7} {:>9} {:>8} {:>6} {:>8} {:>8} {:>9} {:>5} {:>7}".format(*heads))
        found = measure(flags, Path(folder))
    for name, value in found["figures"].items():
        print(f"{name:<28} {value:>14,.5f}")
    write_figures(flags.out, {**found, **machine()})


if __name__ == "__main__":
    main()
