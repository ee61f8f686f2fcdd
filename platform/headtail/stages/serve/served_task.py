"""One task of a running server: its folder, its request log, its shadow process, its students, its watch on a canary.

In: the task's config and release, the server's processes. Out: the parts that are the task's alone, and the plan by which fronts serve it.
Front processes and pages are shared by all tasks: they are the supervisor's. Knows nothing of queries or answers.
"""

from __future__ import annotations

import fcntl
import os

from headtail.adapters.storage import open_storage
from headtail.releases import release as releases
from headtail.releases.canary import read_canary
from headtail.stages.serve.canary_watch import CanaryWatch
from headtail.stages.serve.children import Children
from headtail.stages.serve.config import Config
from headtail.stages.serve.follower import StudentFollower
from headtail.stages.serve.front.counters import read_counters, releases_of
from headtail.stages.serve.run_folder import RunPlan, TaskFolder, front_address, task_mark
from headtail.stages.serve.students import Students

_PIPE_BYTES = 1 << 20  # of the request log: some 4,000 lines while a file is written
_SHADOW_END_S = 10.0
_LOG_END_S = 30.0  # seconds for the last file of the request log


class ServedTask:
    """A task's parts, from `start_processes` to `stop_students`. `name`: of a further task; empty: the server's first. `kind`: the
    student's class, for tests."""

    def __init__(self, name: str, config: Config, release: releases.Release, folder: TaskFolder, kind: type | None = None) -> None:
        store = open_storage(config.root)
        record = read_canary(store)
        folder.drop_seen(record.salt if record is not None and record.state == "running" else "")
        if store.local_path("") is None and not config.cache_dir:
            config = config.model_copy(update={"cache_dir": str(folder.path / "copies")})  # one copy for all fronts
        self.name, self.config, self.release, self._folder = name, config, release, folder
        self.shown = f"task {name}: " if name else ""
        self._suffix = f" of {name}" if name else ""
        addresses = [front_address(folder.path, config, row) for row in range(config.fronts)]
        self._students = Students(config, addresses, kind, task_mark(name))
        self._models: list[str] = []  # applications of the release that it begins with
        self._follower = StudentFollower(config, store, self._students, self._served)
        self._canary = CanaryWatch(store, folder.counters, 2 * config.refresh_s)
        self._pipe: tuple[int, int] | None = None
        self._shadow_pipe: tuple[int, int] | None = None

    # ---- start

    def start_processes(self, children: Children) -> RunPlan:
        """Start the log's collector and the shadow's process; the plan for fronts, which hold the pipes' other ends."""
        config = self.config
        plan = RunPlan(name=self.name or self.release.task, config=config, release=self.release.id, parent=os.getpid())
        write = samples = None
        if config.request_log:
            read, write = self._pipe = os.pipe()
            fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
            path = self._folder.write_plan(plan.model_copy(update={"log_pipe": read}))
            children.add(f"collector{self._suffix}", "headtail.stages.serve.collector", [str(path)], [read])
        if config.shadow.is_on:
            read, samples = self._shadow_pipe = os.pipe()
            path = self._folder.write_plan(plan.model_copy(update={"shadow_pipe": read}))
            children.add(f"shadow{self._suffix}", "headtail.stages.serve.shadow_asker", [str(path)], [read])
        return plan.model_copy(update={"log_pipe": write, "shadow_pipe": samples})

    def start_students(self) -> None:
        """Begin to start the models of the release, where they are this server's to start."""
        if self.config.students == "here":
            self._models = self._follower.deploy(self.release)

    def follow(self) -> None:
        """Follow CURRENT with the students, and watch a canary."""
        config = self.config
        if config.release == "current" and config.realtime_student and config.students == "here":
            self._follower.follow()
        if config.release == "current" and config.count_canary:
            self._canary.start()

    @property
    def in_fronts(self) -> bool:
        """Whether all front processes have opened the release."""
        return sum(row["release"] > 0 for row in self._rows()) == self.config.fronts

    @property
    def has_students(self) -> bool:
        """Whether the models run and are connected to all fronts. EngineError when one cannot run."""
        if not all(map(self._students.running, self._models)):
            return False
        bigger = len(self._models) > 1
        rows = self._rows()[: self.config.fronts]
        return not self._models or all(row["students"] >= 1 and row["bigger_models"] >= bigger for row in rows)

    # ---- end

    def stop_watch(self) -> None:
        """Follow nothing any more; the last window of a canary is taken in."""
        self._canary.close()
        self._follower.close()

    def stop_processes(self, children: Children) -> None:
        """Let the collector and the shadow's process write what they have. The fronts have ended before."""
        if self._pipe is not None:
            for end in self._pipe:
                os.close(end)  # the last writer: the collector writes what it has and ends
            children.wait([f"collector{self._suffix}"], _LOG_END_S)
        if self._shadow_pipe is not None:
            for end in self._shadow_pipe:
                os.close(end)
            children.stop([f"shadow{self._suffix}"], _SHADOW_END_S)  # it gives up what it is asking

    def stop_students(self) -> None:
        """End the models."""
        self._students.stop()

    def _served(self) -> set[str]:
        return releases_of(self._rows())

    def _rows(self) -> list[dict[str, float]]:
        return read_counters(self._folder.counters).rows
