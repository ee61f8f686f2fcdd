"""A driver with its cluster, as processes: started in a session of its own, known by pid, killed one by one, all gone in the end.

In: a spec of the run. Out: processes by role. Only processes that descend from the driver are ever touched, and each is
remembered with its time of creation, so that a pid that was given to somebody else is left alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from .driver import PLACE
from .faults import VARIABLE
from .spec import SLOWER, TESTS

_GONE_S = 8.0 * SLOWER  # after its driver died a cluster has this long to go by itself
# Ray takes 15 s and more to believe that a node or its head is gone. Here sooner, so that a kill costs less time; nothing else changes.
_SOON = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
}


class Driver:
    """A started driver. `folder` is its own; `plan` a plan of faults for all of its processes."""

    def __init__(self, folder: Path, fields: Mapping[str, Any], plan: Path, environment: Mapping[str, str], nodes: int = 0) -> None:
        folder.mkdir()
        spec, self._output = folder / "spec.json", folder / "output"
        spec.write_text(json.dumps({"fields": dict(fields), "nodes": nodes}))
        self._ray = tempfile.mkdtemp(prefix="chaos-", dir="/tmp")  # sockets of Ray need short paths
        paths = filter(None, (str(Path(__file__).parent / "site"), str(TESTS), os.environ.get("PYTHONPATH")))
        own = {VARIABLE: str(plan), "RAY_TMPDIR": self._ray, "PYTHONPATH": os.pathsep.join(paths), **_SOON}
        inherited = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_JOB_ID")}
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "chaos.driver", str(spec)],
                env={**inherited, **environment, **own},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started = time.time()
        self._own = psutil.Process(self.process.pid)
        self._seen: dict[int, psutil.Process] = {self.process.pid: self._own}

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    @property
    def said(self) -> str:
        return self._output.read_text(encoding="utf-8", errors="replace")

    def look(self) -> list[psutil.Process]:
        """The living processes of the cluster, the driver's descendants; remembered."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for one in self._own.children(recursive=True):
                self._seen[one.pid] = one
        return [one for one in self._seen.values() if _lives(one)]

    def find(self, role: str, workers: list[int]) -> list[psutil.Process]:
        """Living processes in a role: driver, gcs, raylet, node (raylet of a further one), actor, core."""
        living = self.look()
        if role == "driver":
            return [one for one in living if one.pid == self.process.pid]
        wanted: Callable[[psutil.Process, str], bool] = {
            "actor": lambda one, line: one.pid in workers or line.startswith("ray::MapWorker"),
            "raylet": lambda _, line: _program(line) == "raylet",
            "node": lambda _, line: _program(line) == "raylet" and PLACE in line,
            "gcs": lambda _, line: _program(line) == "gcs_server",
            "core": lambda _, line: "EngineCore" in line,
        }[role]
        return [one for one in living if wanted(one, _line(one))]

    def kill(self, victim: psutil.Process, whole: bool) -> None:
        """SIGKILL. `whole`: to all that it started too, as when a machine is taken away."""
        with contextlib.suppress(psutil.NoSuchProcess):
            below = victim.children(recursive=True) if whole else []
            for one in [victim, *below]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()

    def stop(self) -> None:
        """End a driver that hangs."""
        self.look()
        self.process.kill()
        self.process.wait()

    def end(self) -> list[str]:
        """All of it gone; what did not go by itself within some seconds is told. Ray's agents, which linger, are not waited for."""
        if self.alive:
            self.look()
            self.process.kill()
        self.process.wait()
        end = time.monotonic() + _GONE_S
        while True:
            left = [one for one in self._seen.values() if _lives(one)]
            for one in left:  # children of what is orphaned now
                with contextlib.suppress(psutil.NoSuchProcess):
                    self._seen |= {child.pid: child for child in one.children(recursive=True)}
            if all("Agent" in _line(one) for one in left) or time.monotonic() > end:
                break
            time.sleep(0.2)
        names = [_line(one).strip()[:60] for one in left]
        for one in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        shutil.rmtree(self._ray, ignore_errors=True)
        return names


def _lives(one: psutil.Process) -> bool:
    try:
        return bool(one.is_running() and one.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _line(one: psutil.Process) -> str:
    """The command line, or the title of what renamed itself (Ray's workers, vLLM's core)."""
    try:
        return " ".join(one.cmdline()) or str(one.name())
    except psutil.NoSuchProcess:
        return ""


def _program(line: str) -> str:
    return Path(line.split(" ")[0]).name
