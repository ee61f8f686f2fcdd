"""The students of the releases: started before a release is served, ended after the last front has left it.

In: CURRENT, the releases that fronts serve (from the shared counters). Out: applications of `Students`, at most two at a time: the current
release's and the one before it, which stays for a while so that a rollback finds it. Knows nothing of processes or sockets.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

from headtail.adapters.storage import Storage
from headtail.core.secrets import hide
from headtail.releases import release as releases
from headtail.stages.serve.config import Config
from headtail.stages.serve.students import ServedStudent, resolve_student

log = logging.getLogger("headtail.serve")


class StudentHost(Protocol):
    """What starts and ends students: `Students`, on Ray Serve."""

    def start(self) -> None: ...

    def deploy(self, served: ServedStudent) -> str: ...

    def running(self, name: str) -> bool: ...

    def delete(self, name: str) -> None: ...


class _Held(NamedTuple):
    name: str
    mark: str
    release: str


class StudentFollower:
    """Keeps students in step with CURRENT. `served`: ids of the releases that fronts serve now."""

    def __init__(self, config: Config, store: Storage, students: StudentHost, served: Callable[[], set[str]]) -> None:
        self._config, self._store, self._students, self._served = config, store, students, served
        self._held: list[_Held] = []  # the newest last
        self._release, self._started = "", False
        self._left_at: float | None = None
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def deploy(self, release: releases.Release) -> str:
        """Begin to start the student of a release; the name of its application, empty when it needs none."""
        self._release = release.id
        found = resolve_student(self._config, self._store, release)
        if found is None:
            return ""
        held = next((one for one in self._held if one.mark == found.mark), None)
        if held is None:
            if not self._started:
                self._students.start()
                self._started = True
            held = _Held(self._students.deploy(found), found.mark, release.id)
        else:
            self._held.remove(held)
        self._held.append(held._replace(release=release.id))
        self._left_at = None
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
        while not self._end.wait(min(1.0, self._config.refresh_s)):
            try:
                self.step()
            except Exception as error:  # a store out of reach, a model that does not load: what is served goes on
                log.warning("the student of the current release cannot be started: %s", hide(str(error))[:500])

    def step(self) -> None:
        """One look: start the current release's student; end those that no front needs any more."""
        wanted = releases.current_id(self._store)
        if wanted and wanted != self._release:
            self.deploy(releases.load_release(self._store, wanted))
        if self._served() != {wanted}:
            self._left_at = None
            return  # some front is still with another release
        if self._left_at is None:
            self._left_at = time.monotonic()
        newest = self._held[-1:] if self._held and self._held[-1].release == wanted else []
        missing = bool(newest) and not self._students.running(newest[0].name)  # it may wait for what an old one holds
        if missing or time.monotonic() - self._left_at >= self._config.keep_student_s:
            for old in [held for held in self._held if held not in newest]:
                self._students.delete(old.name)
                self._held.remove(old)
