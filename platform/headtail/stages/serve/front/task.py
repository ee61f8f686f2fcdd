"""A task in a front process: its release, its way of a miss, its routes, the watch on its CURRENT.

In: the task's plan and folder, what all tasks of the process share. Out: a FrontTask, whose `app` answers. Imports no Ray.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from headtail.adapters.storage import Storage, open_storage
from headtail.releases import release as releases
from headtail.stages.serve.answerer import Answerer, guard_reply
from headtail.stages.serve.dynamic import DynamicTier
from headtail.stages.serve.front.app import FrontApp
from headtail.stages.serve.front.chat import ChatRoutes
from headtail.stages.serve.front.client_hits import ClientHitRoutes
from headtail.stages.serve.front.counters import Counters
from headtail.stages.serve.front.feedback import FeedbackRoutes
from headtail.stages.serve.front.link import StudentLink
from headtail.stages.serve.front.log_pipe import RequestLog
from headtail.stages.serve.front.operations import Operations
from headtail.stages.serve.front.shadow_pipe import ShadowPipe
from headtail.stages.serve.front.store_counts import follow_counts
from headtail.stages.serve.front.tiers import open_tiers
from headtail.stages.serve.front.trace_export import Tracer
from headtail.stages.serve.front.watch import ReleaseWatch, open_served
from headtail.stages.serve.principal import Admit, admit_all
from headtail.stages.serve.run_folder import RunPlan, front_address


class FrontShare(NamedTuple):
    """What all tasks of a front process share."""

    row: int
    admit: Admit
    tracer: Tracer | None


class OtherTasks(Protocol):
    """The further tasks, for the paths of the first task that speak of all. None: not open yet."""

    @property
    def apps(self) -> Mapping[str, FrontApp | None]: ...

    @property
    def operations(self) -> Mapping[str, Operations | None]: ...


@dataclass(frozen=True)
class FrontTask:
    """An open task. `follow` runs as long as the process serves."""

    app: FrontApp
    operations: Operations
    watch: ReleaseWatch
    counters: Counters
    admit: Admit  # whose counts are this task's to write
    link: StudentLink | None
    dynamic: DynamicTier | None

    async def follow(self) -> None:
        """Follow CURRENT, and write the counts of stores."""
        await asyncio.gather(self.watch.follow(), follow_counts(self.counters, self.admit, self.dynamic))

    async def close(self) -> None:
        """Close connections."""
        if self.dynamic is not None:
            await self.dynamic.close()
        if self.link is not None:
            await self.link.close()


async def open_front_task(
    plan: RunPlan, folder: Path, counters: Counters, share: FrontShare, further: OtherTasks | None = None
) -> FrontTask:
    """Open the task of a plan. `folder`: the task's; `further`: given to the first task; None: it is a further one itself."""
    config, store = plan.config, open_storage(plan.config.root)
    served = await asyncio.to_thread(open_served, store, release_to_open(plan, store), config.copies, config.allow_task_code)
    link = await _listen(plan, folder, share.row, counters) if config.realtime_student else None
    tiers = open_tiers(config, link, folder, counters)
    answerer = Answerer(served, config, tiers, [guard_reply])
    operations = Operations(answerer, link, further.operations if further is not None else {})
    request_log = RequestLog(plan.log_pipe, counters)
    app = FrontApp(answerer, config, counters, request_log, share.admit, operations.routes)
    chat = ChatRoutes(app, "", further.apps) if further is not None else ChatRoutes(app, plan.name)
    for routes in (chat.routes, FeedbackRoutes(answerer, counters, request_log).routes, ClientHitRoutes(answerer, counters).routes):
        app.add_routes(routes)
    app.tracer = share.tracer
    app.shadow = ShadowPipe(plan.shadow_pipe, config.shadow, counters) if plan.shadow_pipe is not None else None
    dynamic = next((tier for tier in tiers if isinstance(tier, DynamicTier)), None)
    watch = ReleaseWatch(store, answerer, config, counters, link, dynamic, folder)
    return FrontTask(app, operations, watch, counters, share.admit if further is not None else admit_all, link, dynamic)


def release_to_open(plan: RunPlan, store: Storage) -> str:
    """The current release where CURRENT is followed: since the server was started, the one that it began with may have been taken back
    or removed, and a front that is started again must not open it."""
    return (releases.current_id(store) if plan.config.release == "current" else "") or plan.release


async def _listen(plan: RunPlan, folder: Path, row: int, counters: Counters) -> StudentLink:
    config = plan.config
    token = Path(config.link_token_file).read_text(encoding="utf-8").strip() if config.link_token_file else ""
    link = StudentLink(config.realtime_timeout_ms / 1000, counters, token)
    address = front_address(folder, config, row)
    await link.listen(Path(address.socket), address.host, address.port)
    return link
