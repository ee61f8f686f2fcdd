"""The students of the releases: started before a release is served, ended after the last front has left it.

In: CURRENT, the canary, the releases that fronts serve (from the shared counters). Out: applications of `Students`: the current release's,
a canary's, and for a while the one before, so that a rollback finds it. Knows nothing of processes or sockets.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from headtail.adapters.storage import Storage
from headtail.core.errors import HeadtailError
from headtail.core.secrets import hide
from headtail.releases import release as releases
from headtail.releases.canary import CanaryRecord, read_canary
from headtail.stages.serve.config import Config
from headtail.stages.serve.students import ServedStudent, resolve_models

log = logging.getLogger("headtail.serve")


class StudentHost(Protocol):
    """Starts and ends students. The real one is `Students`, on Ray Serve."""

    def start(self) -> None: ...

    def deploy(self, served: ServedStudent) -> str: ...

    def running(self, name: str) -> bool: ...

    def is_there(self, name: str) -> bool: ...

    def delete(self, name: str) -> None: ...


class _Held(NamedTuple):
    name: str
    mark: str


class StudentFollower:
    """Starts the students that CURRENT and a canary need, and ends the others. `served`: ids of the releases that fronts serve now."""

    def __init__(self, config: Config, store: Storage, students: StudentHost, served: Callable[[], set[str]]) -> None:
        self._config, self._store, self._students, self._served = config, store, students, served
        self._held: list[_Held] = []  # applications
        self._marks: dict[str, list[str]] = {}  # by release, the marks of its student and of the bigger model
        self._record: CanaryRecord | None = None
        self._started = False
        self._left_at: float | None = None
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def deploy(self, release: releases.Release) -> list[str]:
        """Begin to start the models of a release, its student first; the names of their applications."""
        found = resolve_models(self._config, self._store, release)
        self._marks[release.id] = [one.mark for one in found]
        self._left_at = None
        return [self._deploy(one) for one in found]

    def _deploy(self, found: ServedStudent) -> str:
        held = next((one for one in self._held if one.mark == found.mark), None)
        if held is None:
            if not self._started:
                self._students.start()
                self._started = True
            held = _Held(self._students.deploy(found), found.mark)
            self._held.append(held)
        return held.name

    def follow(self) -> None:
        """Look at CURRENT every `refresh_s`, in a thread of its own, until `close`."""
        self._thread = threading.Thread(target=self._follow, name="headtail-students", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread; students stay."""
        self._end.set()
        if self._thread is not None:
            self._thread.join()

    def _follow(self) -> None:
        reported = ""
        while not self._end.wait(min(1.0, self._config.refresh_s)):
            try:
                self.step()
                reported = ""
            except Exception as error:  # the store cannot be reached, or a model does not load: the students that run go on
                if (message := hide(str(error))[:500]) != reported:
                    log.warning("students cannot follow the current release: %s", message)
                reported = message

    def step(self) -> None:
        """Look once: start the students of the current release and of a canary; end those that no front needs any more."""
        wanted = releases.current_id(self._store)
        self._record = record = read_canary(self._store, self._record)
        trial = record.canary if record is not None and record.state == "running" and record.champion == wanted else ""
        self._held = [held for held in self._held if self._students.is_there(held.name)]  # one that reached no front has ended
        alive = {held.mark for held in self._held}
        self._marks = {release: marks for release, marks in self._marks.items() if alive.issuperset(marks)}
        for release in filter(None, (wanted, trial)):
            if release not in self._marks:
                self.deploy(releases.load_release(self._store, release))
        self._marks = {release: marks for release, marks in self._marks.items() if release in (wanted, trial)}
        if self._served() != {wanted}:
            self._left_at = None
            return  # some front is still with another release
        if self._left_at is None:
            self._left_at = time.monotonic()
        marks = {mark for needed in self._marks.values() for mark in needed}
        needed = [held for held in self._held if held.mark in marks]
        old = [held for held in self._held if held not in needed]
        if old and (self._is_awaited(needed) or time.monotonic() - self._left_at >= self._config.keep_student_s):
            for held in old:
                self._students.delete(held.name)
                self._held.remove(held)

    def _is_awaited(self, needed: Sequence[_Held]) -> bool:
        """Whether a student does not run yet: it may wait for what an old one holds."""
        try:
            return not all(self._students.running(held.name) for held in needed)
        except HeadtailError:  # it cannot start, or is being replaced
            return True
