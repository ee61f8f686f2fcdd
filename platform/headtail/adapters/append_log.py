"""Numbered entries in a store: an append-only log with many writers, which is read without listing.

In: a folder and bytes. Out: `<folder>/00000001.json`, `00000002.json`, ... Each number is written once, by a conditional write, so
entries made at the same time are ordered; the last is found by doubling and halving. Numbers have no gaps. Early versions left some
on S3 (they took a 409 for "another was first"); readers skip these gaps. Knows nothing of what an entry means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

from headtail.adapters.progress import say
from headtail.adapters.storage import Storage, read_json
from headtail.core import record
from headtail.core.config import Config
from headtail.core.errors import StorageError

T = TypeVar("T", bound=Config)

GAP = 3  # numbers in a row that an early version may have left without an entry
_LOOKUP_THREADS = 16  # threads that read entries; a look at S3 takes some 20 ms


def entry_path(folder: str, number: int) -> str:
    """Where entry `number` (from 1) is."""
    return f"{folder}/{number:08}.json"


def last_number(store: Storage, folder: str) -> int:
    """The number of the last entry, 0 when there is none: some 2 log2(n) looks, and GAP more to see that nothing comes after a gap."""
    candidate: int | None = 0
    while candidate is not None:
        low, step = candidate, 1
        while store.exists(entry_path(folder, candidate + step)):
            low, step = candidate + step, 2 * step
        high = candidate + step
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if store.exists(entry_path(folder, middle)) else (low, middle)
        candidate = next((number for number in range(high + 1, high + 1 + GAP) if store.exists(entry_path(folder, number))), None)
    return low


def append_entry(store: Storage, folder: str, make: Callable[[int], bytes]) -> int:
    """Write `make(number)` under the next free number; returns it. Of two writers each gets a number of its own.

    A number is skipped only when an entry exists there (`create` is False for nothing else), so gaps cannot appear.
    """
    number = last_number(store, folder) + 1
    while not store.create(entry_path(folder, number), make(number)):
        number += 1
    return number


def read_entries(store: Storage, folder: str, first: int = 1) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every entry from `first` on, in order: its number and its JSON. A number without an entry is skipped; one line says so."""
    numbers = range(first, last_number(store, folder) + 1)
    with ThreadPoolExecutor(_LOOKUP_THREADS) as pool:
        for number, entry in zip(numbers, pool.map(lambda number: _entry(store, folder, number), numbers), strict=True):
            if entry is not None:
                yield number, entry[0]
            else:
                _say_gap(store.uri(entry_path(folder, number)))


def _entry(store: Storage, folder: str, number: int) -> tuple[dict[str, Any]] | None:
    try:
        return (read_json(store, entry_path(folder, number)),)
    except StorageError:
        if store.exists(entry_path(folder, number)):
            raise
        return None


@cache
def _say_gap(where: str) -> None:
    say(f"{where} was never written: an early version left this number out on S3. The entries after it are read; nothing is lost")


def read_entry_records(store: Storage, kind: type[T], folder: str) -> Iterator[T]:
    """Every entry as a `kind`, in order. StorageError names one that is damaged, and each field that is wrong."""
    return (record.validate_record(kind, plain, store.uri(entry_path(folder, number))) for number, plain in read_entries(store, folder))
