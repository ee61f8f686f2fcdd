"""wrk (Debian's package) as a load generator: GETs drawn at random from a list, as fast as they are answered or at a given rate.

In: a URL, paths, how long and from how many connections. Out: requests per second, latency, errors. Knows nothing of what is measured.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

_SCRIPT = """
local requests, n = {}, 0
function init(args)
  for line in io.lines(args[1]) do n = n + 1; requests[n] = wrk.format("GET", line) end
  math.randomseed(os.time() + tonumber(string.sub(tostring({}), 8), 16) % 100000)
end
function request() return requests[math.random(n)] end
function done(summary, latency)
  local e = summary.errors
  print(string.format('{"requests": %d, "seconds": %f, "p50_ms": %f, "p99_ms": %f, "max_ms": %f, "refused": %d, "lost": %d}',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3, latency.max / 1e3,
    e.status, e.connect + e.read + e.write + e.timeout))
end
"""
# Between the answer and the next request of a connection: exponential, so that requests come at random times.
_DELAY = "function delay() return -math.log(1 - math.random()) * %f end\n"


class Load(NamedTuple):
    """What wrk saw. `refused`: answers with a status of 400 or more; `lost`: requests without an answer."""

    requests: int
    seconds: float
    p50_ms: float
    p99_ms: float
    max_ms: float
    refused: int
    lost: int

    @property
    def per_s(self) -> float:
        return self.requests / self.seconds


@contextmanager
def loading(
    url: str, paths: Sequence[str], seconds: float, connections: int, rate: float = 0.0, key: str = ""
) -> Iterator[subprocess.Popen[str]]:
    """wrk at work; `rate`: requests per second over all connections, 0 for as many as are answered. Its output is for `load_of`."""
    if shutil.which("wrk") is None:
        raise SystemExit("wrk is not installed: apt-get install wrk")
    with tempfile.TemporaryDirectory() as folder:
        script, listed = Path(folder, "load.lua"), Path(folder, "paths")
        script.write_text(_SCRIPT + (_DELAY % (1000 * connections / rate) if rate else ""), encoding="utf-8")
        listed.write_text("\n".join(paths) + "\n", encoding="utf-8")
        options = ["-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", "20s", "-s", str(script)]
        options += ["-H", f"Authorization: Bearer {key}"] if key else []
        with subprocess.Popen(["wrk", *options, url, "--", str(listed)], stdout=subprocess.PIPE, text=True) as process:
            yield process


def load_of(process: subprocess.Popen[str]) -> Load:
    """What a finished run saw."""
    text, _ = process.communicate()
    found = [line for line in text.splitlines() if line.startswith("{")]
    if process.returncode or not found:
        raise SystemExit(f"wrk failed:\n{text}")
    return Load(**json.loads(found[-1]))


def load(url: str, paths: Sequence[str], seconds: float, connections: int, rate: float = 0.0, key: str = "") -> Load:
    """One run from its start to its end."""
    with loading(url, paths, seconds, connections, rate, key) as process:
        return load_of(process)
