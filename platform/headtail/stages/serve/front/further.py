"""The further tasks of a front process: each opened, and tried again where the process takes the place of one that ended.

In: their plans, what all tasks of the process share. Out: their apps and health by name, None while a release is not open. An error at the
start of the server is the start's; later the store of one task may be away while a front is started again, and the other tasks are served.
Knows nothing of requests.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path

from headtail.core.errors import HeadtailError
from headtail.core.secrets import hide
from headtail.stages.serve.front.app import FrontApp
from headtail.stages.serve.front.counters import Counters
from headtail.stages.serve.front.operations import Operations
from headtail.stages.serve.front.task import FrontShare, FrontTask, open_front_task
from headtail.stages.serve.run_folder import RunPlan, task_folder

log = logging.getLogger("headtail.serve")
_FIRST_S = 5.0  # that a front which is started again waits for all tasks before it takes connections: a mapped snapshot takes milliseconds


class FurtherTasks:
    """All but the first. `folder`: the server's."""

    def __init__(self, plans: Sequence[RunPlan], folder: Path, share: FrontShare) -> None:
        self._plans, self._folders, self._share = plans, {plan.name: task_folder(folder, plan.name) for plan in plans}, share
        # At once, also where the release cannot be opened: it takes back what the process before this one left in the row.
        self._counters = {name: Counters(path / "counters", share.row, starts=False) for name, path in self._folders.items()}
        self.apps: dict[str, FrontApp | None] = dict.fromkeys(self._folders)
        self.operations: dict[str, Operations | None] = dict.fromkeys(self._folders)
        self._open: list[FrontTask] = []
        self._running: list[asyncio.Task[None]] = []

    async def open(self, again: bool) -> None:
        """Open them. `again`: the server runs already, and a task that cannot be opened is tried again for as long as the process lives."""
        if again:
            tries = [asyncio.create_task(self._keep_trying(plan)) for plan in self._plans]
            self._running += tries
            if tries:
                await asyncio.wait(tries, timeout=_FIRST_S)
            return
        for plan in self._plans:
            try:
                await self._open_task(plan)
            except HeadtailError as error:
                error.where = f"tasks.{plan.name}: {error.where}"
                raise

    def drain(self) -> None:
        """Say from now on that the process is about to stop."""
        for task in self._open:
            task.operations.draining = True

    async def close(self) -> None:
        """Follow nothing any more, and close connections."""
        for running in self._running:
            running.cancel()
        for task in self._open:
            await task.close()

    async def _keep_trying(self, plan: RunPlan) -> None:
        reported = ""
        while True:
            try:
                await self._open_task(plan)
                return
            except Exception as error:  # its store is away, its release is gone: the next look may find both
                if (message := hide(str(error))[:300]) != reported:
                    log.warning("task %s is not served by this process yet: %s", plan.name, message)
                reported = message
            await asyncio.sleep(plan.config.refresh_s)

    async def _open_task(self, plan: RunPlan) -> None:
        name = plan.name
        task = await open_front_task(plan, self._folders[name], self._counters[name], self._share)
        self._open.append(task)
        self._running.append(asyncio.create_task(task.follow()))
        self.apps[name], self.operations[name] = task.app, task.operations
