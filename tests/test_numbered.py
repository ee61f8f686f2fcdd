"""Numbered entries: no gaps, none lost, one writer each."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from headtail import numbered
from headtail.storage import Storage, open_storage


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 17, 64])
def test_the_last_is_found_without_listing(store: Storage, count: int) -> None:
    for _ in range(count):
        numbered.append(store, "log", lambda number: json.dumps(number).encode())
    assert numbered.last(store, "log") == count
    assert list(numbered.read(store, "log")) == [(i, i) for i in range(1, count + 1)]
    assert list(numbered.read(store, "log", first=3)) == [(i, i) for i in range(3, count + 1)]


def test_writers_at_the_same_time_each_get_a_number(store: Storage) -> None:
    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(lambda who: numbered.append(store, "log", lambda _: json.dumps(who).encode()), range(40)))
    assert sorted(numbers) == list(range(1, 41))
    assert sorted(who for _, who in numbered.read(store, "log")) == list(range(40))
    assert all(store.read(numbered.path("log", number)) == str(who).encode() for who, number in enumerate(numbers))


def test_on_s3(s3_root: str) -> None:
    store = open_storage(s3_root)
    assert [numbered.append(store, "log", lambda number: b"{}") for _ in range(3)] == [1, 2, 3]
    assert numbered.last(store, "log") == 3
