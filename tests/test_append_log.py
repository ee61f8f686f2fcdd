"""Numbered entries: no gaps, none lost, one writer each."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headtail.adapters import append_log
from headtail.adapters.storage import Storage, open_storage
from headtail.core.errors import StorageError


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 17, 64])
def test_the_last_is_found_without_listing(store: Storage, count: int) -> None:
    for _ in range(count):
        append_log.append_entry(store, "log", lambda number: json.dumps({"n": number}).encode())
    assert append_log.last_number(store, "log") == count
    assert list(append_log.read_entries(store, "log")) == [(i, {"n": i}) for i in range(1, count + 1)]
    assert list(append_log.read_entries(store, "log", first=3)) == [(i, {"n": i}) for i in range(3, count + 1)]


def test_writers_at_the_same_time_each_get_a_number(store: Storage) -> None:
    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(lambda who: append_log.append_entry(store, "log", lambda _: json.dumps({"n": who}).encode()), range(40)))
    assert sorted(numbers) == list(range(1, 41))
    assert sorted(entry["n"] for _, entry in append_log.read_entries(store, "log")) == list(range(40))
    assert all(store.read(append_log.entry_path("log", number)) == json.dumps({"n": who}).encode() for who, number in enumerate(numbers))


@settings(max_examples=30)
@given(st.lists(st.integers(1, append_log.GAP + 1), max_size=20))
def test_gaps_of_early_versions_are_passed_over(steps: list[int]) -> None:
    numbers = list(accumulate(steps))
    with TemporaryDirectory() as folder:
        store = open_storage(folder)
        for number in numbers:
            at = Path(folder, append_log.entry_path("log", number))
            at.parent.mkdir(exist_ok=True)
            at.write_text(json.dumps({"n": number}), encoding="utf-8")
        assert append_log.last_number(store, "log") == (numbers[-1] if numbers else 0)
        assert list(append_log.read_entries(store, "log")) == [(number, {"n": number}) for number in numbers]
        assert append_log.append_entry(store, "log", lambda number: b"0") == (numbers[-1] if numbers else 0) + 1


def test_a_gap_is_said_once_and_a_damaged_entry_is_an_error(store: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (1, 3):
        store.replace(append_log.entry_path("log", number), b"{}")
    assert [number for number, _ in [*append_log.read_entries(store, "log"), *append_log.read_entries(store, "log")]] == [1, 3, 1, 3]
    assert capsys.readouterr().err.count("00000002.json was never written") == 1
    store.replace(append_log.entry_path("log", 2), b"{")
    with pytest.raises(StorageError, match="not JSON"):
        list(append_log.read_entries(store, "log"))


def test_on_s3(s3_root: str) -> None:
    store = open_storage(s3_root)
    assert [append_log.append_entry(store, "log", lambda number: b"{}") for _ in range(3)] == [1, 2, 3]
    assert append_log.last_number(store, "log") == 3
