"""moto's S3 over HTTP: it is not S3, but it answers boto3 and Arrow as S3 does. A fixture of conftest, and a program for the crash harness.

moto's own server asks for each request which of some 200 services it is for, and closes each connection. This one has S3 alone and keeps
connections open, as S3 does: half the processor time of a call.

    python tests/moto_s3.py PORT PARENT      # until the process PARENT is gone
"""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any


def serve_s3(port: int) -> Any:
    """A running server on 127.0.0.1, in threads of this process; `shutdown` ends it."""
    from moto.moto_server.werkzeug_app import MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    class Handler(MotoRequestHandler):  # type: ignore[misc]
        protocol_version = "HTTP/1.1"

    server = make_server("127.0.0.1", port, create_backend_app("s3"), threaded=True, request_handler=Handler)
    server.log = lambda *_: None  # type: ignore[method-assign]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


if __name__ == "__main__":
    serve_s3(int(sys.argv[1]))
    while os.getppid() == int(sys.argv[2]):
        time.sleep(0.5)
