"""A front process: granian around the apps of its tasks, the links to their students, the watches on their CURRENT.

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

from headtail.core.errors import HeadtailError
from headtail.core.secrets import hide_in_output
from headtail.stages.serve.admission import ClusterAdmission, open_admission
from headtail.stages.serve.children import end_with_parent
from headtail.stages.serve.front.counters import Counters
from headtail.stages.serve.front.dispatch import TaskDispatch
from headtail.stages.serve.front.further import FurtherTasks
from headtail.stages.serve.front.store_counts import follow_processor
from headtail.stages.serve.front.task import FrontShare, open_front_task
from headtail.stages.serve.front.trace_export import Tracer
from headtail.stages.serve.run_folder import RunPlan, read_plan


async def serve_front(plan: RunPlan, folder: Path, row: int) -> None:
    """Serve until SIGTERM."""
    config = plan.config
    counters = Counters(folder / "counters", row)
    admit = open_admission(config.api_keys, folder / "limits", config.limits_redis_url)
    share = FrontShare(row, admit, Tracer(config.traces, counters) if config.traces.endpoint else None)
    further = FurtherTasks(plan.tasks, folder, share)
    first = await open_front_task(plan, folder, counters, share, further)
    await further.open(again=plan.started)
    following = [asyncio.create_task(first.follow()), asyncio.create_task(follow_processor(counters))]
    app = TaskDispatch(first.app, further.apps) if plan.tasks else first.app
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
        first.operations.draining = True
        further.drain()
        server.stop()  # type: ignore[no-untyped-call]

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, drain)
    gc.freeze()  # modules and the release stay: the collector need not look at them again
    await server.serve()
    for task in following:
        task.cancel()
    await further.close()
    await first.close()
    if isinstance(admit, ClusterAdmission):
        await admit.close()
    if share.tracer is not None:
        share.tracer.close()


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
