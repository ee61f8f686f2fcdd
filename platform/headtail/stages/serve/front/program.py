"""A front process: granian around FrontApp, the link to the students, the watch on CURRENT.

In: the plan of the server and the number of this process's row. Out: an HTTP server on the shared port, until SIGTERM: then what is in
flight is answered, and the process ends. Started by `supervisor`; imports no Ray.

    python -m headtail.stages.serve.front.program PLAN ROW
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import sys
from pathlib import Path

import uvloop
from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP1Settings
from granian.server.embed import Server

from headtail.adapters.storage import Storage, open_storage
from headtail.core.errors import HeadtailError
from headtail.core.secrets import hide_in_output
from headtail.releases import release as releases
from headtail.stages.serve.admission import ClusterAdmission, open_admission
from headtail.stages.serve.answerer import Answerer, guard_reply
from headtail.stages.serve.children import end_with_parent
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
from headtail.stages.serve.run_folder import RunPlan, front_address, read_plan


async def serve_front(plan: RunPlan, folder: Path, row: int) -> None:
    """Serve until SIGTERM."""
    config = plan.config
    store = open_storage(config.root)
    counters = Counters(folder / "counters", row)
    served = open_served(store, release_to_open(plan, store), config.copies, config.allow_task_code)
    link = await _listen(plan, folder, row, counters) if config.realtime_student else None
    tiers = open_tiers(config, link, folder, counters)
    answerer = Answerer(served, config, tiers, [guard_reply])
    operations = Operations(answerer, link)
    admit = open_admission(config.api_keys, folder / "limits", config.limits_redis_url)
    request_log = RequestLog(plan.log_pipe, counters)
    app = FrontApp(answerer, config, counters, request_log, admit, operations.routes)
    app.add_routes(ChatRoutes(answerer, app.note_reply).routes)
    app.add_routes(FeedbackRoutes(answerer, counters, request_log).routes)
    app.add_routes(ClientHitRoutes(answerer, counters).routes)
    app.tracer = Tracer(config.traces, counters) if config.traces.endpoint else None
    app.shadow = ShadowPipe(plan.shadow_pipe, config.shadow, counters) if plan.shadow_pipe is not None else None
    dynamic = next((tier for tier in tiers if isinstance(tier, DynamicTier)), None)
    watch = ReleaseWatch(store, answerer, config, counters, link, dynamic, folder)
    following = [asyncio.create_task(watch.follow()), asyncio.create_task(follow_counts(counters, admit, dynamic))]
    server = Server(
        app,
        address=config.host,
        port=config.port,
        interface=Interfaces.ASGI,
        http=HTTPModes.http1,
        websockets=False,
        log_enabled=False,
        backlog=1024,
        backpressure=4096,  # connections that are worked on at once: more than one turn of the loop ever holds
        http1_settings=HTTP1Settings(
            header_read_timeout=int(1000 * config.header_timeout_s), max_buffer_size=config.max_header_bytes, pipeline_flush=False
        ),
    )

    def drain() -> None:
        operations.draining = True
        server.stop()  # type: ignore[no-untyped-call]

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, drain)
    gc.freeze()  # modules and the release stay: the collector need not look at them again
    await server.serve()
    for task in following:
        task.cancel()
    if dynamic is not None:
        await dynamic.close()
    if isinstance(admit, ClusterAdmission):
        await admit.close()
    if link is not None:
        await link.close()
    if app.tracer is not None:
        app.tracer.close()


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


def main() -> None:
    """Command line: PLAN ROW."""
    hide_in_output()
    path, row = Path(sys.argv[1]), int(sys.argv[2])
    plan = read_plan(path)
    end_with_parent(plan.parent)
    logging.basicConfig(level=logging.WARNING, format=f"front {row}: %(message)s")
    try:
        uvloop.run(serve_front(plan, path.parent, row))
    except HeadtailError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
