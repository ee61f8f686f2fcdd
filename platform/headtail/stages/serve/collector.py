"""The request log's far end: lines from the pipe of all fronts, written as Parquet into the store below requests/.

In: the read end of the pipe. Out: `requests/<day>/<time>-<process>.parquet`, rows of rows.REQUEST_LOG, each file whole or absent. It runs
at a low priority and ends when no front holds the pipe any more. Memory is bounded: two files' rows at most; while both are full, the
pipe fills, and fronts count what they drop.

    python -m headtail.stages.serve.collector PLAN
"""

from __future__ import annotations

import concurrent.futures
import datetime
import logging
import os
import select
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa

from headtail.adapters.storage import Storage, open_storage, write_table
from headtail.core.errors import HeadtailError
from headtail.core.rows import REQUEST_LOG
from headtail.stages.serve.front.counters import Counters
from headtail.stages.serve.run_folder import RunPlan

log = logging.getLogger("headtail.serve")
FOLDER = "requests"
NICE = 10  # of 19: behind fronts and students
_READ = 1 << 18  # bytes at a time


class Collector:
    """Gathers lines, and writes a file when it has `rows` of them or `seconds` after the first."""

    def __init__(self, store: Storage, rows: int, seconds: float, counters: Counters | None = None) -> None:
        self._store, self._most, self._seconds, self._counters = store, rows, seconds, counters
        self._rows: list[Any] = []
        self._since = 0.0
        self._part = b""
        self._decode = msgspec.json.Decoder(list[Any]).decode
        self._writer = concurrent.futures.ThreadPoolExecutor(1)
        self._writing: concurrent.futures.Future[None] | None = None
        self._files = 0

    @property
    def wait_s(self) -> float | None:
        """Seconds until a file is due; None while there is nothing to write."""
        return max(0.0, self._since + self._seconds - time.monotonic()) if self._rows else None

    def feed(self, data: bytes) -> None:
        """Lines as they come from the pipe; the last one may be cut anywhere."""
        *lines, self._part = (self._part + data).split(b"\n")
        for line in lines:
            try:
                row = self._decode(line)
                if len(row) != len(REQUEST_LOG):
                    raise ValueError(f"{len(row)} fields")
            except (msgspec.MsgspecError, ValueError) as error:
                self._drop(1, error)
                continue
            if not self._rows:
                self._since = time.monotonic()
            self._rows.append(row)
            if len(self._rows) >= self._most:
                self.flush()

    def flush(self) -> None:
        """Begin to write what is there; wait for the file before it, so that no more than two are in memory."""
        if self._writing is not None:
            self._writing.result()
        rows, self._rows = self._rows, []
        if rows:
            self._files += 1
            self._writing = self._writer.submit(self._write, rows, self._files)

    def close(self) -> None:
        """Write what is left."""
        self.flush()
        self._writer.shutdown()

    def _write(self, rows: Sequence[Any], number: int) -> None:
        try:
            now = datetime.datetime.now(datetime.UTC)
            path = f"{FOLDER}/{now:%Y-%m-%d}/{now:%H%M%S}-{os.uname().nodename[:40]}-{os.getpid()}-{number}.parquet"
            write_table(self._store, path, log_table(rows))
        except Exception as error:  # a store out of reach must not end the log
            self._drop(len(rows), error)

    def _drop(self, rows: int, error: Exception) -> None:
        if self._counters is not None:
            self._counters.add("log_dropped", rows)
        log.warning("%d rows of the request log were dropped: %s", rows, str(error)[:300])


def log_table(rows: Sequence[Any]) -> pa.Table:
    """Rows as the fronts write them, as a table."""
    columns = zip(*rows, strict=True)
    return pa.table([pa.array(column, field.type) for column, field in zip(columns, REQUEST_LOG, strict=True)], schema=REQUEST_LOG)


def collect(pipe: int, collector: Collector) -> None:
    """Read until the last writer has closed the pipe."""
    poll = select.poll()
    poll.register(pipe, select.POLLIN | select.POLLHUP)
    while True:
        wait = collector.wait_s
        if not poll.poll(None if wait is None else wait * 1000):
            collector.flush()
            continue
        data = os.read(pipe, _READ)
        if not data:
            return
        collector.feed(data)
        if collector.wait_s == 0.0:
            collector.flush()


def main() -> None:
    """Command line: PLAN."""
    path = Path(sys.argv[1])
    plan = RunPlan.model_validate_json(path.read_bytes())
    config, pipe = plan.config, plan.log_pipe
    assert pipe is not None
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends with the pipe, once every line is written
    logging.basicConfig(level=logging.WARNING, format="request log: %(message)s")
    os.nice(NICE)
    try:
        counters = Counters(path.parent / "counters", config.fronts)  # the row after the fronts'
        collector = Collector(open_storage(config.root), config.log_rotate_rows, config.log_rotate_s, counters)
        collect(pipe, collector)
        collector.close()
    except HeadtailError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
