"""A running server: front processes, the request log's collector, the pages, and the students, started and ended together.

In: a config, the release to begin with. Out: all of it running, each part started again when it dies; `stop` answers what is in flight
and leaves nothing behind. Knows nothing of queries or answers.
"""

from __future__ import annotations

import fcntl
import os
import socket
import sys
import time
from collections.abc import Callable

import httpx

from headtail.adapters import cluster
from headtail.adapters.progress import say
from headtail.adapters.storage import open_storage
from headtail.core.errors import EngineError
from headtail.releases import release as releases
from headtail.releases.canary import read_canary
from headtail.stages.serve.canary_watch import CanaryWatch
from headtail.stages.serve.children import Children
from headtail.stages.serve.config import Config
from headtail.stages.serve.follower import StudentFollower
from headtail.stages.serve.front.counters import read_counters, releases_of
from headtail.stages.serve.run_folder import RunFolder, RunPlan, front_address
from headtail.stages.serve.students import Students

_PIPE_BYTES = 1 << 20  # of the request log: some 4,000 lines while a file is written
_TELL_S = 10.0
_SHADOW_END_S = 10.0
_LOG_END_S = 30.0  # seconds for the last file of the request log


class Supervisor:
    """Everything of one server. `kind`: the student's class, for tests."""

    def __init__(self, config: Config, release: releases.Release, kind: type | None = None) -> None:
        self._folder = RunFolder(config)
        record = read_canary(open_storage(config.root))
        self._folder.drop_seen(record.salt if record is not None and record.state == "running" else "")
        if open_storage(config.root).local_path("") is None and not config.cache_dir:
            config = config.model_copy(update={"cache_dir": str(self._folder.path / "copies")})  # one copy for all fronts
        self._config, self._release = config, release
        self._fronts = [f"front-{row}" for row in range(config.fronts)]
        self._children, self._held = Children(), _hold_port(config)
        addresses = [front_address(self._folder.path, config, row) for row in range(config.fronts)]
        self._students = Students(config, addresses, kind)
        self._owns_ray = False
        self._follower = StudentFollower(config, open_storage(config.root), self._students, self._served)
        self._canary = CanaryWatch(open_storage(config.root), self._folder.counters, 2 * config.refresh_s)
        self._pipe: tuple[int, int] | None = None
        self._shadow_pipe: tuple[int, int] | None = None
        self._stopped = False

    def start(self) -> None:
        """Start all parts and wait until queries are answered. EngineError when a part does not come up."""
        config, began = self._config, time.monotonic()
        self._start_children()
        self._owns_ray = not _in_ray()
        models = self._follower.deploy(self._release) if config.students == "here" else []
        ready = [(self._fronts_ready, "the front processes")]
        if models:
            ready.append((lambda: all(map(self._students.running, models)) and self._connected(len(models) > 1), "the student"))
        for check, what in ready:
            self._wait(check, what, began)
        self._greet()
        if config.release == "current" and config.realtime_student and config.students == "here":
            self._follower.follow()
        if config.release == "current" and config.count_canary:
            self._canary.start()

    def stop(self) -> None:
        """Let the fronts answer what is in flight, then end everything. Safe to call twice."""
        if self._stopped:
            return
        self._stopped = True
        self._canary.close()
        self._follower.close()
        self._children.stop([*self._fronts], self._config.drain_s)
        if self._pipe is not None:
            for end in self._pipe:
                os.close(end)  # the last writer: the collector writes what it has and ends
            self._children.wait(["collector"], _LOG_END_S)
        if self._shadow_pipe is not None:
            for end in self._shadow_pipe:
                os.close(end)
            self._children.stop(["shadow"], _SHADOW_END_S)  # it writes what it has, and gives up what it is asking
        self._children.stop(["pages"], 5)
        self._children.close()
        if _in_ray():
            self._students.stop()
            if self._owns_ray:
                cluster.stop_cluster()
        self._held.close()
        self._folder.close()

    def _start_children(self) -> None:
        config, me = self._config, os.getpid()
        write = read = None
        if config.request_log:
            read, write = self._pipe = os.pipe()
            fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        plan = RunPlan(config=config, release=self._release.id, parent=me)
        if read is not None and write is not None:
            path = self._folder.write_plan(plan.model_copy(update={"log_pipe": read}))
            self._children.add("collector", "headtail.stages.serve.collector", [str(path)], [read])
        samples = self._start_shadow(plan) if config.shadow.is_on else None
        path = self._folder.write_plan(plan.model_copy(update={"log_pipe": write, "shadow_pipe": samples}))
        descriptors = [end for end in (write, samples) if end is not None]
        for row, name in enumerate(self._fronts):
            self._children.add(name, "headtail.stages.serve.front.program", [str(path), str(row)], descriptors)
        path = self._folder.write_plan(plan)
        self._children.add("pages", "headtail.stages.serve.admin", [str(path)])

    def _start_shadow(self, plan: RunPlan) -> int:
        """Start the process that asks the shadow model; the end of the pipe where fronts write."""
        read, write = self._shadow_pipe = os.pipe()
        path = self._folder.write_plan(plan.model_copy(update={"shadow_pipe": read}))
        self._children.add("shadow", "headtail.stages.serve.shadow_asker", [str(path)], [read])
        return write

    def _served(self) -> set[str]:
        return releases_of(read_counters(self._folder.counters).rows)

    def _fronts_ready(self) -> bool:
        return sum(row["release"] > 0 for row in read_counters(self._folder.counters).rows) == self._config.fronts

    def _connected(self, bigger: bool) -> bool:
        rows = read_counters(self._folder.counters).rows[: self._config.fronts]
        return all(row["students"] >= 1 and row["bigger_models"] >= bigger for row in rows)

    def _greet(self) -> None:
        """One request by way of the port itself. Proxies of the environment have nothing to do with it."""
        with httpx.Client(trust_env=False, timeout=5) as client:
            for url in (f"{self._config.url}/readyz", f"{self._config.admin_url}/"):
                self._wait(lambda url=url: _answers(client, url), f"an answer from {url}", time.monotonic())  # type: ignore[misc]

    def _wait(self, check: Callable[[], bool], what: str, began: float) -> None:
        told = time.monotonic()
        while not check():
            self._children.check_start()
            now = time.monotonic()
            if now - began > self._config.start_timeout_s:
                what = f"the server was not ready after {self._config.start_timeout_s:.0f} s: it waited for {what}"
                raise EngineError(what, fix="raise start_timeout_s, or check free CPUs and GPUs with: ray status")
            if now - told > _TELL_S:
                told = now
                say(f"serve        waiting for {what}: {now - began:.0f} s")
            time.sleep(0.05)


def _answers(client: httpx.Client, url: str) -> bool:
    try:
        return client.get(url).status_code == 200
    except httpx.HTTPError:
        return False


def _hold_port(config: Config) -> socket.socket:
    """The port, bound and not listened on: while fronts come and go, no other program takes it."""
    held = socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    held.bind((config.host, config.port))
    return held


def _in_ray() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())
