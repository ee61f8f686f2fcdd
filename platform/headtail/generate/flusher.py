"""Make finished rows safe whatever the engine does: a thread beside it, which flushes shards while it is silent.

In: the open shards of a worker, how to flush one, how many rows the worker has finished. Out: a function that raises what a
flush raised. A row is safe at most `flush_seconds` after it was finished; while a run is young, when that would be most of
what it has done, at most SHARE of the finished rows are unsafe. Knows nothing of engines or files.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from headtail.generate.shard import Shard

SHARE = 0.02  # of the rows that a worker has finished: with the rows of one LOOK and of a write it stays below 5 %
START = 0.75  # of flush_seconds, after which a flush begins: the rest is for the look that sees it and for the write
LOOK = 0.01  # of flush_seconds, between two looks: a flush costs some 10 ms on disk and 100 to S3


def due(held: int, finished: int, waited: float, seconds: float) -> bool:
    """Whether `held` rows of the `finished` should be made safe, `waited` s after the last flush of a job whose limit is `seconds`."""
    return held > 0 and (waited >= START * seconds or held >= SHARE * finished)


@contextmanager
def flushing(
    shards: Sequence[Shard], seconds: float, flush: Callable[[Shard], None], finished: Callable[[], int]
) -> Iterator[Callable[[], None]]:
    """Within: shards are flushed when it is due. Call the yielded function at times: it raises the error of a flush that failed."""
    over, errors = threading.Event(), list[Exception]()

    def watch() -> None:
        last = time.monotonic()
        while not over.wait(LOOK * seconds):
            if not due(sum(shard.held for shard in shards), finished(), time.monotonic() - last, seconds):
                continue
            last = time.monotonic()
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
