"""A pipe of JSON lines between the front processes and a process that gathers them; writing never makes a request wait.

In: rows. Out: lines of at most 4,096 bytes, which the kernel writes whole or not at all, so that processes share one pipe; at the far
end, bytes as they come. What does not fit is for the caller to count. Knows nothing of what is in a row.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

LINE_BYTES = 4096  # PIPE_BUF: up to here a write to a pipe is atomic
_encode = msgspec.json.Encoder().encode


def write_line(pipe: int, row: Sequence[Any]) -> bool:
    """Write `row` as a line to a descriptor that does not block. False: it is too long, the pipe is full, or nobody reads it."""
    line = _encode(row) + b"\n"
    if len(line) > LINE_BYTES:
        return False
    try:
        os.write(pipe, line)
    except (BlockingIOError, BrokenPipeError):
        return False
    return True


def read_pipe(pipe: int, wait_s: Callable[[], float | None], most_bytes: int) -> Iterator[bytes]:
    """What comes, at most `most_bytes` at a time, until the last writer has closed the pipe.

    `wait_s`: seconds to wait for it, asked anew each time; None is for ever. Nothing in that time gives no bytes.
    """
    poll = select.poll()
    poll.register(pipe, select.POLLIN | select.POLLHUP)
    while True:
        wait = wait_s()
        if not poll.poll(None if wait is None else wait * 1000):
            yield b""
        elif data := os.read(pipe, most_bytes):
            yield data
        else:
            return
