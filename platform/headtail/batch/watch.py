"""End a process whose engine hangs: no exception reaches a call that never returns, but a new process can go on.

In: how long nothing may happen. Out: a function that reports that something happened. When time is up, the process prints the stack of
each thread and exits, as if it had crashed. Ray starts another, and the row on which the engine hung is found in the same way as one that
killed it. The clock is a C thread that needs no GIL. Knows nothing of engines.
"""

from __future__ import annotations

import faulthandler
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_EVERY_S = 1.0  # the clock is reset at most this often, and four times in its run


@contextmanager
def watchdog(seconds: float) -> Iterator[Callable[[float], None]]:
    """Within: unless the yielded function is called with time.monotonic() every `seconds`, the process ends. 0: no limit."""
    if not seconds:
        yield lambda _: None
        return
    last = [time.monotonic()]

    def set_clock() -> None:
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or sys.stderr)

    def alive(now: float) -> None:
        if now - last[0] >= min(_EVERY_S, seconds / 4):
            last[0] = now
            set_clock()

    set_clock()
    try:
        yield alive
    finally:
        faulthandler.cancel_dump_traceback_later()
