"""Make finished rows safe whatever the engine does: a thread that flushes shards while the engine is silent.

In: the open shards of a worker, how to flush one, how many rows the worker has finished since when. Out: a function that raises
what a flush raised. A row is safe at most `flush_seconds` after it was finished. That alone would be half of what a run of twice
`flush_seconds` has done: so only a small share of the finished rows is ever unsafe. Knows nothing of engines or files.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from headtail.batch.shard import Shard

SHARE = 0.015  # of the rows that a worker has finished may be unsafe: with those of a LOOK and a write it stays below 5 %
YOUNG, YOUNG_SHARE = 1.8, 0.1  # until it has run for so many flush_seconds: some 30 flushes instead of 200
LATE_SHARE = 0.03
START = 0.75  # of flush_seconds, after which a flush begins: the rest is for the look that sees it and for the write
LOOK = 0.01  # of flush_seconds, between two looks: a flush costs some 10 ms on disk and 100 to S3


def flush_due(held: int, finished: int, waited: float, ran: float, seconds: float) -> bool:
    """Whether `held` rows of the `finished` should be made safe, `waited` s after the last flush, `ran` s after the first row.

    `seconds` is flush_seconds.
    """
    share = YOUNG_SHARE if ran < YOUNG * seconds else SHARE
    return held > 0 and (waited >= START * seconds or held >= share * finished)


def flush_late(held: int, finished: int, ran: float, seconds: float) -> bool:
    """Whether the thread is behind, on a busy machine or after a burst of rows: then who takes the rows flushes them, and no row is
    finished meanwhile. Arguments as in `flush_due`."""
    return held >= LATE_SHARE * finished and ran >= YOUNG * seconds


@contextmanager
def flush_thread(
    shards: Sequence[Shard], seconds: float, flush: Callable[[Shard], None], finished: Callable[[], int], begun: float
) -> Iterator[Callable[[], None]]:
    """Within: shards are flushed when it is due. Call the yielded function at times: it raises the error of a flush that failed.

    `begun`: time.monotonic() when the worker's first row was asked.
    """
    over, errors = threading.Event(), list[Exception]()

    def watch() -> None:
        last = time.monotonic()
        while not over.wait(LOOK * seconds):
            now = time.monotonic()
            if not flush_due(sum(shard.unsaved for shard in shards), finished(), now - last, now - begun, seconds):
                continue
            last = now
            try:
                for shard in list(shards):
                    flush(shard)
            except Exception as error:
                errors.append(error)
                return  # its rows are held still: the worker tries once more as it ends

    def check() -> None:
        if errors:
            raise errors[0]

    thread = threading.Thread(target=watch, name="flusher", daemon=True)
    thread.start()
    try:
        yield check
    finally:
        over.set()
        thread.join()
    check()
