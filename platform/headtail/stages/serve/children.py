"""The processes of a server, started and watched: whichever ends is started again, and all end with the supervisor.

In: names and commands. Out: running processes. All are started by one thread that lives as long as they do: Linux tells a child of its
parent's death when the thread that started it ends. Knows nothing of what the processes do.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from headtail.adapters.progress import say
from headtail.core.errors import EngineError

_PR_SET_PDEATHSIG = 1
_POLL_S = 0.05  # how soon a dead process is seen
_PAUSES_S = (0.0, 0.2, 1.0, 5.0)  # before a process that ended soon after its start is started again
_STEADY_S = 5.0  # a process that ran so long has started well


def end_with_parent(parent: int) -> None:
    """Called first in a child: the kernel kills it when the supervisor, process `parent`, is gone."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the call
        os._exit(1)


@dataclass
class _Child:
    name: str
    command: Sequence[str]
    descriptors: tuple[int, ...]
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    failures: int = 0
    due: float = 0.0
    ending: bool = False
    codes: list[int] = field(default_factory=list)


class Children:
    """Processes that are kept alive until `stop`."""

    def __init__(self) -> None:
        self._children: dict[str, _Child] = {}
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="headtail-children", daemon=True)
        self._thread.start()

    def add(self, name: str, module: str, arguments: Sequence[str], descriptors: Sequence[int] = ()) -> None:
        """Start `python -m module arguments` and keep it running. `descriptors`: those that it inherits."""
        with self._lock:
            self._children[name] = _Child(name, [sys.executable, "-m", module, *arguments], tuple(descriptors))

    def pid(self, name: str) -> int:
        """Process id of a child; 0 while it does not run."""
        child = self._children[name]
        return child.process.pid if child.process is not None and child.process.poll() is None else 0

    def check_start(self) -> None:
        """EngineError when a child ended before it was up: what it wrote to stderr says why."""
        for child in list(self._children.values()):
            if child.codes and child.failures:
                fix = "see its message above"
                raise EngineError(f"the process {child.name} ended while starting", value=f"exit status {child.codes[-1]}", fix=fix)

    def stop(self, names: Sequence[str], seconds: float) -> None:
        """Ask these to end, wait, and kill what has not ended after `seconds`."""
        with self._lock:
            ending = [child for child in self._children.values() if child.name in names and not child.ending]
            for child in ending:
                child.ending = True
        for child in ending:
            _signal(child, signal.SIGTERM)
        self.wait(names, seconds)

    def wait(self, names: Sequence[str], seconds: float) -> None:
        """Wait for these to end by themselves; kill what has not after `seconds`. They are not started again."""
        end = time.monotonic() + seconds
        with self._lock:
            waiting = [child for child in self._children.values() if child.name in names]
            for child in waiting:
                child.ending = True
        for child in waiting:
            if (process := child.process) is not None:
                try:
                    process.wait(max(0.0, end - time.monotonic()))
                except subprocess.TimeoutExpired:
                    say(f"serve        {child.name} did not end within {seconds:.0f} s and is killed")
                    process.kill()
                    process.wait()

    def close(self) -> None:
        """Kill what is left and end the thread."""
        self._end.set()
        self._thread.join()
        for child in self._children.values():
            if child.process is not None and child.process.poll() is None:
                child.process.kill()
                child.process.wait()

    def _watch(self) -> None:
        while not self._end.is_set():
            with self._lock:
                for child in self._children.values():
                    self._tend(child)
            self._end.wait(_POLL_S)

    def _tend(self, child: _Child) -> None:
        now = time.monotonic()
        if child.process is not None:
            code = child.process.poll()
            if code is None:
                return
            child.process = None
            child.codes.append(code)
            if child.ending:
                return
            child.failures = child.failures + 1 if now - child.started < _STEADY_S else 0
            child.due = now + _PAUSES_S[min(child.failures, len(_PAUSES_S) - 1)]
            say(f"serve        {child.name} ended with status {code} and is started again")
        if not child.ending and now >= child.due:
            child.started = now
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
            child.process = subprocess.Popen(
                child.command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # stdout is for receipts
                pass_fds=child.descriptors,
                start_new_session=True,  # Ctrl-C in a terminal goes to the supervisor alone
            )


def _signal(child: _Child, number: int) -> None:
    if child.process is not None:
        with contextlib.suppress(ProcessLookupError):
            child.process.send_signal(number)
