"""Cells of a user's file: each form of a count, a time and a list is read as what it says, all else is null."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headtail.core import cells


def binary(*values: bytes | None) -> pa.Array:
    return pa.array(values, pa.binary())


def test_counts() -> None:
    texts = binary(b"3", b"3.0", b" +3 ", b"007", b"0", b"2.5", b"-1", b"1,000", b"", None, b"9" * 14, b"\xff", b"nan", b"1e3")
    assert cells.counts(texts).to_pylist() == [3, 3, 3, 7, *[None] * 10]
    assert cells.counts(pa.array([1.0, 2.5, float("nan"), float("inf"), 1e15, None, -1.0])).to_pylist() == [1, *[None] * 6]
    assert cells.counts(pa.array([2**63, 5, 0], pa.uint64())).to_pylist() == [None, 5, None]
    assert cells.counts(pa.nulls(2)).to_pylist() == [None, None]


@pytest.mark.parametrize(
    "text, wanted",
    [
        (b"2024-01-31", 1706659200),
        (b"20240131", 1706659200),
        (b"2024-01-31T10:11", 1706695860),
        (b"2024-01-31 10:11:12.345Z", 1706695872),
        (b"2024-01-31T23:30:00-05:00", 1706761800),
        (b"2024-01-31T101112+0530", 1706676072),
        (b"1706659200", 1706659200),
        (b"1706659200.75", 1706659200),
        (b"1706659200123", 1706659200),
        (b"1706659200123456", 1706659200),
        (b"1706659200123456789", 1706659200),
    ]
    + [
        (bad, None)
        for bad in (b"2024-02-30", b"20240230", b"2024-13-01", b"01/31/2024", b"2024-01-31 25:00", b"x", b"", b"\xff", b"0", b"9" * 20)
    ]
    + [(b"2026-11-28T10:00:00" + zone, None) for zone in (b"+25:00", b"+99:99", b"-15:00", b"+2460", b"+05:60")]
    + [(b"2026-11-28T10:00:00" + zone, 1795860000 - 3600 * hours) for zone, hours in ((b"+14:00", 14), (b"-12", -12), (b"+0000", 0))],
)
def test_times(text: bytes, wanted: int | None) -> None:
    assert cells.times(binary(text)).to_pylist() == [wanted]
    assert cells.times(binary(text, b"2024-01-31 10:00")).to_pylist()[0] == wanted


def test_times_of_arrow_types() -> None:
    for unit in ("s", "ms", "us", "ns"):
        made = pa.array([1706659200]).cast(pa.timestamp("s")).cast(pa.timestamp(unit))
        assert cells.times(made).to_pylist() == [1706659200]
        assert cells.times(made.cast(pa.timestamp(unit, "Europe/Berlin"))).to_pylist() == [1706659200]
    assert cells.times(pa.array([19753, None], pa.int32()).cast(pa.date32())).to_pylist() == [1706659200, None]
    assert cells.times(pa.array([1706659200, 1706659200123, 20240131, None, -5])).to_pylist() == [1706659200] * 3 + [None, None]
    assert cells.times(pa.array([1.7066592e9, float("nan"), 1e300])).to_pylist() == [1706659200, None, None]


def test_floats_as_text() -> None:
    found = cells.text(pa.array([7.0, 1.1, 4006381333931.0, -0.0, 1e20, float("nan"), float("-inf"), None]))
    assert found is not None
    assert found.to_pylist() == [b"7", b"1.1", b"4006381333931", b"0", b"1e+20", None, None, None]
    assert cells.lists(pa.array([[1.0, float("nan")], [2.5]]), "|").to_pylist() == [["1"], ["2.5"]]


def test_lists() -> None:
    assert cells.lists(binary(b"a|b | |c", b"", None, b"x"), "|").to_pylist() == [["a", "b", "c"], None, None, ["x"]]
    made = pa.array([["a", " "], [], None, [None, "b"]])
    assert cells.lists(made, "|").to_pylist() == [["a"], None, None, ["b"]]
    assert cells.lists(made.slice(2), "|").to_pylist() == [None, ["b"]]
    with pytest.raises(pa.ArrowInvalid):
        cells.lists(binary(b"\xff"), "|")


@settings(max_examples=30)
@given(st.lists(st.none() | st.lists(st.text(alphabet="ab |", max_size=4), max_size=3), max_size=8))
def test_lists_keep_what_is_in_them(values: list[list[str] | None]) -> None:
    wanted = [[item.strip() for item in value or [] if item.strip()] or None for value in values]
    assert cells.lists(pa.array(values, pa.list_(pa.string())), "|").to_pylist() == wanted
    assert cells.lists(pa.array(values, pa.large_list(pa.large_string())), "|").to_pylist() == wanted


@pytest.mark.parametrize("unit, size", [("s", 1), ("ms", 10**3), ("us", 10**6), ("ns", 10**9)])
def test_parts_of_a_second_are_what_times_cut_off(unit: str, size: int) -> None:
    """As a timestamp, a number and a text alike."""
    ticks = pa.array([1_900_000_000 * size + size // 4, 1_900_000_000 * size], pa.int64())
    for column in (ticks.cast(pa.timestamp(unit)), ticks, ticks.cast(pa.string())):
        assert cells.times(column).to_pylist() == [1_900_000_000] * 2
        assert cells.second_parts(column).tolist() == [size // 4 / size, 0.0]
    assert cells.second_parts(pa.array(["2031-01-02T03:04:05.25Z", None, ""])).tolist() == [0.25, 0.0, 0.0]
