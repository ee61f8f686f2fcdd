"""JSON Lines to cells: each line is an object, or set aside with a reason.

In: blocks of whole lines as bytes. Out: Sheets, as from delimited text: text as bytes, lists as lists of text, numbers as they are
written, other values as their JSON text, in which a field that occurs twice still does: its reader refuses it. No line can end the
job: neither one nested a hundred thousand deep nor one with a number of ten thousand digits.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from headtail.stages.ingest.delimited import ROW, LongLine, Reject, Sheet
from headtail.stages.ingest.records import BOM

Cell = bytes | list[bytes | None] | None


class _Number(str):
    """A number as it is written."""

    __slots__ = ()


class _NoNumber(str):
    """NaN, Infinity, -Infinity: what json.dumps writes though JSON has no such values."""

    __slots__ = ()


class _FieldsTwice(dict[str, Any]):
    """An object with a field twice. It is written with all its fields again: which value counts cannot be known."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self._pairs = pairs

    def items(self) -> Any:
        return self._pairs


def _all_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    return made if len(made) == len(pairs) else _FieldsTwice(pairs)


_read = json.JSONDecoder(parse_int=_Number, parse_float=_Number, parse_constant=_NoNumber).decode
_read_all = json.JSONDecoder(parse_int=_Number, parse_float=_Number, parse_constant=_NoNumber, object_pairs_hook=_all_fields).decode


def keys_of(lines: Sequence[bytes]) -> tuple[str, ...]:
    """The names in the objects on some lines."""
    keys: dict[str, None] = {}
    for line in lines:
        value, _ = _parse(line, (), ())
        keys.update(dict.fromkeys(value or ()))
    return tuple(keys)


def json_sheets(
    blocks: Iterator[bytes | LongLine], names: Sequence[str], lists: Sequence[str], text: str, separator: str
) -> Iterator[Sheet]:
    """The rows of a file. `lists`: names that hold several values; `text`: the name of queries; `separator`: between items in text."""
    row, needles = 1, tuple(b'"%s"' % name.encode() for name in names)
    for block in blocks:
        if isinstance(block, LongLine):
            yield Sheet(_table([], names, [], lists), [Reject(row, "too_long", block.start)])
            row += 1
            continue
        found: list[list[Cell]] = []
        numbers: list[int] = []
        rejects: list[Reject] = []
        for line in block.removesuffix(b"\n").split(b"\n"):
            value, reason = _parse(line, names, needles)
            cells = None if value is None else _cells(value, names, lists, text, separator)
            if cells is None:
                rejects.append(Reject(row, reason or "bad_row", line))
            else:
                found.append(cells)
                numbers.append(row)
            row += 1
        yield Sheet(_table(found, names, numbers, lists), rejects)


def _parse(line: bytes, once: Sequence[str], needles: Sequence[bytes]) -> tuple[dict[str, Any] | None, str]:
    """(object, "") or (None, reason). A name in `once` that stands twice is no object: which value counts cannot be known."""
    try:
        text = line.removeprefix(BOM).decode("utf-8", "surrogatepass")
        value = _read(text)
        if not isinstance(value, dict):
            return None, "bad_row"
        written_twice = b"\\" in line or any(line.count(needle) > 1 for needle in needles)  # a name may be written with escapes
        if line.count(b":") > len(value) and written_twice and _twice(text, once):
            return None, "name_twice"
        if line.count(b"{") > 1 and any(isinstance(value.get(name), dict | list) for name in once):
            value = _read_all(text)
        return value, ""
    except UnicodeDecodeError:
        return None, "not_utf8"
    except (ValueError, RecursionError):
        return None, "nul" if b"\0" in line else "bad_row" if line.strip() else "empty"


def _twice(line: str, once: Sequence[str]) -> bool:
    pairs: list[list[tuple[str, Any]]] = []

    def keep(found: list[tuple[str, Any]]) -> dict[str, Any]:
        pairs.append(found)
        return dict(found)

    json.loads(line, object_pairs_hook=keep)
    names = [name for name, _ in pairs[-1]]  # the outermost object is closed last
    return any(names.count(name) > 1 for name in once)


def _cells(value: dict[str, Any], names: Sequence[str], lists: Sequence[str], text: str, separator: str) -> list[Cell] | None:
    """The cells of `names`; None when that of `text` is neither text nor a number, or one is too deep to be written again."""
    if isinstance(value.get(text), bool | list | dict):
        return None
    try:
        return [_items(value.get(name), separator) if name in lists else _bytes(value.get(name), as_written=name == text) for name in names]
    except RecursionError:
        return None


def _table(rows: Sequence[list[Cell]], names: Sequence[str], numbers: Sequence[int], lists: Sequence[str]) -> pa.Table:
    columns: Sequence[Sequence[Cell]] = list(zip(*rows, strict=True)) if rows else [()] * len(names)
    kinds = [pa.list_(pa.binary()) if name in lists else pa.binary() for name in names]
    arrays = [pa.array(column, kind) for column, kind in zip(columns, kinds, strict=True)]
    return pa.table([pa.array(numbers, pa.int64()), *arrays], names=[ROW, *names])


def _bytes(value: Any, as_written: bool = True) -> bytes | None:
    """A value as text. A number that is not to be `as_written` (a count, a time) has an exponent only where a float needs one."""
    if value is None or isinstance(value, _NoNumber):
        return None
    if isinstance(value, _Number) and not as_written and not set(".eE").isdisjoint(value):
        return json.dumps(float(value)).encode()
    return (value if isinstance(value, str) else _written(value)).encode("utf-8", "surrogatepass")


def _items(value: Any, separator: str) -> list[bytes | None] | None:
    if isinstance(value, str) and not isinstance(value, _Number | _NoNumber):
        return [_bytes(item) for item in value.split(separator)]
    cell = None if isinstance(value, list) else _bytes(value)
    return [_bytes(item) for item in value] if isinstance(value, list) else None if cell is None else [cell]


def _written(value: Any) -> str:
    """The JSON text of a value, its numbers as they were."""
    if isinstance(value, _Number | _NoNumber):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(name)}: {_written(item)}" for name, item in value.items()) + "}"
    return "[" + ", ".join(map(_written, value)) + "]" if isinstance(value, list) else json.dumps(value)
