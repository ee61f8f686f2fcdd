"""No engine process outlives the worker that started it: it would keep its GPU memory for ever.

In: process ids. Out: a guard, a small process that reads a pipe whose other end is this process: when this process ends in any way,
the pipe ends and the guard kills them. vLLM's core does not look for its parent, and Ray does not reap a killed worker's children.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

_GUARD = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
if not sys.stdin.buffer.read():
    for pid in sys.argv[1:]:
        try:
            os.kill(int(pid), signal.SIGKILL)
        except ProcessLookupError:
            pass
"""


class Guard:
    """Kills `pids` when this process is gone. After `release` it does nothing."""

    def __init__(self, pids: Sequence[int]) -> None:
        command = [sys.executable, "-I", "-S", "-c", _GUARD, *map(str, pids)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def release(self) -> None:
        """They have ended by themselves, or may go on."""
        self._process.kill()
        self._process.communicate()
