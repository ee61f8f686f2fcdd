"""The private folder of a running server: its lock, its plan, the sockets and counters that its processes share.

In: a config. Out: a folder of this user alone, locked for as long as the server's process lives; a further task has a folder in it. What a
killed server left in it is taken over; what escalations cost and which queries a canary counted stays for the next server. Knows nothing
of the processes themselves.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import shutil
import stat
import sys
import tempfile
from hashlib import blake2b
from pathlib import Path

from pydantic import BaseModel, Field

from headtail.core.errors import ConfigError
from headtail.releases.canary import SeenQueries
from headtail.stages.serve.config import Config
from headtail.stages.serve.front.counters import LAYOUT, create_counters
from headtail.stages.serve.student_link import FrontAddress

BUDGET = "budget"  # file: what escalations cost so far
_SEEN = "seen-"  # files: the queries that a canary counted. A canary outlives servers, so they do too
_SEEN_BYTES = 1 << 20  # a bit per query: 8 million
_TASK = "task-"  # folders: of further tasks
_SOCKET_BYTES = 100  # of a Unix socket's path; Linux takes 107


class RunPlan(BaseModel):
    """What every process of a server is told of a task. Descriptors are inherited."""

    name: str = Field("", description="of the task: its address and its `model`")
    config: Config = Field(description="of the server; of a further task: as if it had that task alone")
    release: str = Field(description="id of the release to open at the start")
    parent: int = Field(description="process id of the supervisor: without it they end")
    layout: str = Field(LAYOUT, description="of the shared counters")
    log_pipe: int | None = Field(None, description="descriptor of the request log; each process has its own end of it")
    shadow_pipe: int | None = Field(None, description="descriptor of shadow mode's samples, likewise")
    tasks: tuple[RunPlan, ...] = Field((), description="of the further tasks, for processes that all tasks share")
    started: bool = Field(False, description="the server runs: a front that starts now takes the place of one that ended")


class TaskFolder:
    """What the processes share of one task: its counters, its plans, its sockets."""

    def __init__(self, path: Path, fronts: int) -> None:
        self.path = path
        path.mkdir(mode=0o700, exist_ok=True)
        create_counters(self.counters, fronts + 3)  # one row for the collector, one for the pages, one for shadow mode

    @property
    def counters(self) -> Path:
        """The file of shared counters."""
        return self.path / "counters"

    def write_plan(self, plan: RunPlan) -> Path:
        """The plan as a file of this user alone, whole or as it was before."""
        path = self.path / f"plan-{plan.log_pipe or 'none'}-{plan.shadow_pipe or 'none'}-{len(plan.tasks)}.json"
        part = path.with_suffix(".part")
        part.touch(mode=0o600)
        part.write_text(plan.model_dump_json(), encoding="utf-8")
        part.replace(path)
        return path

    def drop_seen(self, salt: str) -> None:
        """Remove what canaries counted, but for that of `salt`: the one that runs. Empty: none runs."""
        for left in self.path.glob(f"{_SEEN}*"):
            if not salt or not left.name.startswith(f"{_SEEN}{salt}"):
                left.unlink(missing_ok=True)


class RunFolder(TaskFolder):
    """The folder of the server and of its first task, locked. `close` gives it back."""

    def __init__(self, config: Config) -> None:
        sockets = [task_folder(Path(), name) / "link-63.sock" for name in ("", *config.tasks)]
        self.path = _private_folder(f"serve-{config.port}", max(sockets, key=lambda path: len(str(path))))
        self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held = os.pread(self._lock, 32, 0).decode(errors="replace").strip()
            os.close(self._lock)
            fix = "stop it, or choose another port"
            raise ConfigError("a server for this port runs already", where="port", value=f"process {held}", fix=fix) from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, str(os.getpid()).encode(), 0)
        _clean(self.path)  # of a server that was killed: its processes ended with it
        super().__init__(self.path, config.fronts)

    def close(self) -> None:
        """Remove what is in it, but for what escalations cost and what a canary counted, and give back the lock."""
        _clean(self.path)
        os.close(self._lock)


def task_folder(folder: Path, name: str) -> Path:
    """Where in a server's folder that of a further task is; the server's own for the first task, without a name."""
    return folder / f"{_TASK}{task_mark(name)}" if name else folder


def task_mark(name: str) -> str:
    """Eight characters for the name of a further task, where a name is too long; empty for the first task, without a name."""
    return blake2b(name.encode(), digest_size=4).hexdigest() if name else ""


def _clean(folder: Path) -> None:
    for left in folder.iterdir():
        if left.name.startswith(_TASK):
            _clean(left)
        elif left.name not in ("lock", BUDGET) and not left.name.startswith(_SEEN):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def read_plan(path: Path) -> RunPlan:
    """The plan, in a process of the server. Ends the process when its code is not the supervisor's: they would misread each other."""
    plan = RunPlan.model_validate_json(path.read_bytes())
    if plan.layout != LAYOUT:
        sys.exit("error: headtail was changed on disk while this server ran\n  do:    stop the server and start it again")
    return plan


def open_seen(folder: Path, salt: str, what: str = "") -> SeenQueries:
    """The queries that were counted under a canary, in a file that all processes of a server map. `what`: empty, or what else counts."""
    held = os.open(folder / f"{_SEEN}{salt}{what}", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.ftruncate(held, _SEEN_BYTES)  # a new file is all zeros
        return SeenQueries(memoryview(mmap.mmap(held, _SEEN_BYTES)))
    finally:
        os.close(held)


def front_address(folder: Path, config: Config, row: int) -> FrontAddress:
    """Where front `row` takes students' connections."""
    return FrontAddress(str(folder / f"link-{row}.sock"), config.link_host, config.link_port + row)


def _private_folder(name: str, longest: Path) -> Path:
    """A folder that no other user can enter. `longest`: the path of a socket in it. ConfigError when somebody else has made one of its
    name."""
    places = [os.environ.get("XDG_RUNTIME_DIR", ""), tempfile.gettempdir(), "/tmp"]
    for place in filter(None, places):
        parent = Path(place) / f"headtail-{os.getuid()}"
        if len(os.fsencode(parent / name / longest)) > _SOCKET_BYTES or not os.access(place, os.W_OK):
            continue
        parent.mkdir(mode=0o700, exist_ok=True)
        found = parent.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            fix = f"remove {parent}, or set XDG_RUNTIME_DIR to a folder of your own"
            raise ConfigError("the folder for running servers is not this user's alone", where=str(parent), fix=fix)
        (parent / name).mkdir(mode=0o700, exist_ok=True)
        return parent / name
    raise ConfigError("no folder is short enough for the server's sockets", where="TMPDIR", fix="set XDG_RUNTIME_DIR to a short path")
