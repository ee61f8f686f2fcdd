"""The Serve replica that takes requests: an app over an open release, built after the process has started.

In: the config, a handle to the student or None. Out: the ASGI app that Serve runs. LMDB is opened here, in the process
that answers. Knows nothing of routes.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from headtail.adapters.storage import open_storage
from headtail.stages.serve.app import ServeState, make_app, open_served

if TYPE_CHECKING:
    from headtail.stages.serve.config import Config


class Ingress:
    """Wrapped by `serve.ingress()`, which calls `__serve_build_asgi_app__` once this is made."""

    def __init__(self, config: Config, realtime: Any, deployed: str, stands_for: str | None) -> None:
        from headtail.stages.serve.realtime import student_client

        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        store = open_storage(config.root)
        served, student = open_served(store, config.release, config.copies), student_client(realtime) if realtime is not None else None
        self.state = ServeState(store, served, config, student, deployed, stands_for)

    def __serve_build_asgi_app__(self) -> Any:
        return make_app(self.state)
