"""How long tests wait. Every time limit of a test goes through `limit`, so that one variable fits all of them to a slow machine.

HEADTAIL_TEST_TIME_SCALE=3 makes each limit three times as long, pytest's own included (conftest.py); the default is 1. Two workers that
test at the same time (pytest -n 2) double it. `limit` is for what must not happen: a hang. A time that is part of what is tested (a
stall that a client must survive) is not scaled.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from typing import Any

VARIABLE = "HEADTAIL_TEST_TIME_SCALE"
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))  # they share the cores
SCALE = float(os.environ.get(VARIABLE, "1")) * WORKERS


def limit(seconds: float) -> float:
    """`seconds` on the machine of CI; longer on a slow one."""
    return seconds * SCALE


def eventually(check: Callable[[], Any], seconds: float = 30) -> Any:
    """What `check` gives as soon as it is true; the test fails when that takes longer than `limit(seconds)`."""
    end = time.monotonic() + limit(seconds)
    while not (found := check()):
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)
    return found


def read_banner(process: subprocess.Popen[str], words: str = "Ctrl-C ends it") -> str:
    """What a program writes to stderr until it has said these words; the test fails when it ends before."""
    assert process.stderr is not None
    told = ""
    while words not in told:
        line = process.stderr.readline()
        assert line, told
        told += line
    return told
