"""How a worker of Ray ended, from the logs that Ray keeps on this node.

In: the folder of the logs, found from this worker's own. Out: the name of a signal. Ray tells the driver of a dead worker only that its
connection ended. Knows nothing of jobs.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

_SIGNAL = re.compile(rb"\*\*\* (SIG[A-Z]+) received")  # as Ray's handler of fatal signals writes it
_LOGS, _BYTES = 50, 1 << 20  # logs that are read, the newest first, and the end of each


def log_folder(stderr: str = "/proc/self/fd/2") -> Path | None:
    """Where Ray keeps this worker's output; None outside a worker, or where its output goes elsewhere."""
    try:
        path = Path(os.readlink(stderr))
    except OSError:
        return None
    return path.parent if path.name.startswith("worker-") else None


def last_fatal_signal(folder: Path | None) -> str:
    """The signal that ended a worker last, such as SIGILL or SIGSEGV; empty: none is known. SIGKILL leaves nothing in a log."""
    logs = sorted(folder.glob("worker-*.err"), key=lambda path: path.stat().st_mtime, reverse=True) if folder else []
    for path in logs[:_LOGS]:
        with path.open("rb") as log:
            log.seek(max(0, path.stat().st_size - _BYTES))
            found = _SIGNAL.findall(log.read())
        if found:
            return str(found[-1], "ascii")
    return ""
