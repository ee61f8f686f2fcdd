"""Numbered entries in a store: an append-only log that many writers share and nobody lists.

In: a folder and bytes. Out: `<folder>/00000001.json`, `00000002.json`, ... without gaps. Each number is written once, by a
conditional write, so entries made at the same time are ordered; the last is found by doubling and halving. Knows nothing of
what an entry means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from headtail.storage import Storage, read_json

_LOOKS = 16  # threads that read entries; a look at S3 takes some 20 ms


def path(folder: str, number: int) -> str:
    """Where entry `number` (from 1) is."""
    return f"{folder}/{number:08}.json"


def last(store: Storage, folder: str) -> int:
    """The number of the last entry, 0 when there is none. Numbers have no gaps: some 2 log2(n) looks."""
    high = 1
    while store.exists(path(folder, high)):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if store.exists(path(folder, middle)) else (low, middle)
    return low


def append(store: Storage, folder: str, make: Callable[[int], bytes]) -> int:
    """Write `make(number)` under the next free number; returns it. Of two writers each gets a number of its own.

    A number is passed over only when an entry lies there (`create` is False for nothing else), so that no gap can come to be.
    """
    number = last(store, folder) + 1
    while not store.create(path(folder, number), make(number)):
        number += 1
    return number


def read(store: Storage, folder: str, first: int = 1) -> Iterator[tuple[int, Any]]:
    """Every entry from `first` on, in order: its number and its JSON."""
    numbers = range(first, last(store, folder) + 1)
    with ThreadPoolExecutor(_LOOKS) as pool:
        yield from zip(numbers, pool.map(lambda number: read_json(store, path(folder, number)), numbers), strict=True)
