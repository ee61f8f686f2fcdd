"""A running server: front processes, the pages, and of each task the request log's collector and the students, started and ended together.

In: for each task a config and the release to begin with. Out: all of it running, each part started again when it dies; `stop` answers what
is in flight and leaves nothing behind. Knows nothing of queries or answers.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import httpx

from headtail.adapters import cluster
from headtail.adapters.progress import say
from headtail.core.errors import EngineError
from headtail.releases import release as releases
from headtail.stages.serve.children import Children
from headtail.stages.serve.config import Config
from headtail.stages.serve.run_folder import RunFolder, RunPlan, TaskFolder, task_folder
from headtail.stages.serve.served_task import ServedTask

_TELL_S = 10.0


class TaskToServe(NamedTuple):
    """A task that a server begins with."""

    config: Config
    release: releases.Release


class Supervisor:
    """Everything of one server. `further`: the tasks besides the first, by name; `kind`: the student's class, for tests."""

    def __init__(self, first: TaskToServe, further: Mapping[str, TaskToServe], kind: type | None = None) -> None:
        self._config, self._folder = first.config, RunFolder(first.config)
        self._fronts = [f"front-{row}" for row in range(first.config.fronts)]
        self._children, self._held = Children(), _hold_port(first.config)
        self._tasks = [ServedTask("", *first, self._folder, kind)]
        for name, task in further.items():
            folder = TaskFolder(task_folder(self._folder.path, name), first.config.fronts)
            self._tasks.append(ServedTask(name, *task, folder, kind))
        self._owns_ray = False
        self._stopped = False

    def start(self) -> None:
        """Start all parts and wait until queries are answered. EngineError when a part does not come up."""
        began = time.monotonic()
        plan = self._start_children()
        self._owns_ray = not _in_ray()
        for task in self._tasks:
            task.start_students()
        self._wait(lambda: all(task.in_fronts for task in self._tasks), "the front processes", began)
        for task in self._tasks:
            self._wait(lambda task=task: task.has_students, f"{task.shown}the student", began)  # type: ignore[misc]
        self._greet()
        self._folder.write_plan(plan.model_copy(update={"started": True}))
        for task in self._tasks:
            task.follow()

    def stop(self) -> None:
        """Let the fronts answer what is in flight, then end everything. Safe to call twice."""
        if self._stopped:
            return
        self._stopped = True
        for task in self._tasks:
            task.stop_watch()
        self._children.stop([*self._fronts], self._config.drain_s)
        for task in self._tasks:
            task.stop_processes(self._children)
        self._children.stop(["pages"], 5)
        self._children.close()
        if _in_ray():
            for task in self._tasks:
                task.stop_students()
            if self._owns_ray:
                cluster.stop_cluster()
        self._held.close()
        self._folder.close()

    def _start_children(self) -> RunPlan:
        """Start the processes; the plan of the fronts."""
        first, *further = [task.start_processes(self._children) for task in self._tasks]
        plan = first.model_copy(update={"tasks": tuple(further)})
        path = self._folder.write_plan(plan)
        descriptors = [end for task in (first, *further) for end in (task.log_pipe, task.shadow_pipe) if end is not None]
        for row, name in enumerate(self._fronts):
            self._children.add(name, "headtail.stages.serve.front.program", [str(path), str(row)], descriptors)
        self._children.add("pages", "headtail.stages.serve.admin", [str(path)])
        return plan

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
