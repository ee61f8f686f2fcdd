"""The request log's far end: lines from the pipe of all fronts, written as Parquet into the store below requests/ and feedback/.

In: the read end of the pipe. Out: `requests/<day>/<time>-<process>.parquet`, rows of rows.REQUEST_LOG, and `feedback/` alike, rows of
rows.FEEDBACK, each file whole or absent. It runs at a low priority and ends when no front holds the pipe any more. Memory is bounded: two
files' rows of each at most; while both are full, the pipe fills, and fronts count what they drop. No row of a deleted query is written.

    python -m headtail.stages.serve.collector PLAN
"""

from __future__ import annotations

import concurrent.futures
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa

from headtail.adapters.storage import Storage, open_storage
from headtail.adapters.storage.day_files import FEEDBACK_FOLDER, REQUESTS, day_file
from headtail.core.errors import HeadtailError
from headtail.core.rows import FEEDBACK, REQUEST_LOG
from headtail.core.secrets import hide_in_output
from headtail.stages.serve.deleted_rows import UndeletedRows
from headtail.stages.serve.front.counters import Counters
from headtail.stages.serve.front.log_pipe import TAG
from headtail.stages.serve.line_pipe import read_pipe
from headtail.stages.serve.run_folder import read_plan

log = logging.getLogger("headtail.serve")
NICE = 10  # of 19: behind fronts and students
_READ = 1 << 18  # bytes at a time


class _Buffer:
    """Rows of one table that are not written yet. Two files' rows at most are in memory: `writing` is the one before."""

    def __init__(self, folder: str, schema: pa.Schema, dropped: str) -> None:
        self.folder, self.schema, self.dropped = folder, schema, dropped
        self.rows: list[Any] = []
        self.since = 0.0
        self.writing: concurrent.futures.Future[None] | None = None


class Collector:
    """Gathers lines by table, and writes a file when it has `rows` of them or `seconds` after the first."""

    def __init__(self, store: Storage, rows: int, seconds: float, counters: Counters | None = None) -> None:
        self._most, self._seconds, self._counters = rows, seconds, counters
        self._requests = _Buffer(REQUESTS, REQUEST_LOG, "log_dropped")
        self._feedback = _Buffer(FEEDBACK_FOLDER, FEEDBACK, "feedback_dropped")
        self._part = b""
        self._decode = msgspec.json.Decoder(list[Any]).decode
        self._writer = concurrent.futures.ThreadPoolExecutor(1)
        self._files, self._undeleted = 0, UndeletedRows(store)

    @property
    def wait_s(self) -> float | None:
        """Seconds until a file is due; None while there is nothing to write."""
        held = [buffer.since for buffer in (self._requests, self._feedback) if buffer.rows]
        return max(0.0, min(held) + self._seconds - time.monotonic()) if held else None

    def feed(self, data: bytes) -> None:
        """Lines as they come from the pipe; the last one may be cut anywhere."""
        *lines, self._part = (self._part + data).split(b"\n")
        for line in lines:
            buffer = self._requests
            try:
                row = self._decode(line)
                if row and row[0] == TAG:
                    buffer, row = self._feedback, row[1:]
                if len(row) != len(buffer.schema):
                    raise ValueError(f"{len(row)} fields")
            except (msgspec.MsgspecError, ValueError) as error:
                self._drop(buffer, 1, error)
                continue
            if not buffer.rows:
                buffer.since = time.monotonic()
            buffer.rows.append(row)
            if len(buffer.rows) >= self._most:
                self._flush(buffer)

    def flush(self) -> None:
        """Begin to write what is there."""
        self._flush(self._requests)
        self._flush(self._feedback)

    def close(self) -> None:
        """Write what is left."""
        self.flush()
        self._writer.shutdown()

    def _flush(self, buffer: _Buffer) -> None:
        """Begin to write; wait for the file before it."""
        if buffer.writing is not None:
            buffer.writing.result()
        rows, buffer.rows = buffer.rows, []
        if rows:
            self._files += 1
            buffer.writing = self._writer.submit(self._write, buffer, rows, self._files)

    def _write(self, buffer: _Buffer, rows: Sequence[Any], number: int) -> None:
        try:
            place = buffer.schema.get_field_index("query")
            path = day_file(buffer.folder, number)
            self._undeleted.write(path, rows, lambda row: str(row[place]), lambda left: log_table(left, buffer.schema))
        except Exception as error:  # a store out of reach must not end the log
            self._drop(buffer, len(rows), error)

    def _drop(self, buffer: _Buffer, rows: int, error: Exception) -> None:
        if self._counters is not None:
            self._counters.add(buffer.dropped, rows)
        log.warning("%d rows of %s were dropped: %s", rows, buffer.folder, str(error)[:300])


def log_table(rows: Sequence[Any], schema: pa.Schema = REQUEST_LOG) -> pa.Table:
    """Rows as the fronts write them, as a table."""
    if not rows:
        return schema.empty_table()
    columns = zip(*rows, strict=True)
    return pa.table([pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)], schema=schema)


def collect(pipe: int, collector: Collector) -> None:
    """Read until the last writer has closed the pipe."""
    for data in read_pipe(pipe, lambda: collector.wait_s, _READ):
        collector.feed(data)
        if not data or collector.wait_s == 0.0:
            collector.flush()


def main() -> None:
    """Command line: PLAN."""
    hide_in_output()
    path = Path(sys.argv[1])
    plan = read_plan(path)
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
