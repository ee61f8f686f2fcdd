"""JSON Lines to cells: each line is an object, or set aside with a reason.

In: blocks of whole lines as bytes. Out: Sheets, as from delimited text: text as bytes, lists as lists of text, other values as their
JSON text, in which a field that occurs twice still does: its reader refuses it. No line can end the job: neither one
nested a hundred thousand deep nor one with a number of ten thousand digits.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from headtail.stages.ingest.delimited import ROW, LongLine, Reject, Sheet


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
    """The rows of a file. `lists`: names that hold several values; `text`: the name that must not; `separator`: between items in text."""
    row, needles = 1, tuple(b'"%s"' % name.encode() for name in names)
    for block in blocks:
        if isinstance(block, LongLine):
            yield Sheet(_table([], names, [], lists, separator), [Reject(row, "too_long", block.start)])
            row += 1
            continue
        found: list[dict[str, Any]] = []
        numbers: list[int] = []
        rejects: list[Reject] = []
        for line in block.removesuffix(b"\n").split(b"\n"):
            value, reason = _parse(line, names, needles)
            if value is not None and (b"[" in line or line.count(b"{") > 1) and not _fits(value, names, text):
                reason = "bad_row"
            if reason:
                rejects.append(Reject(row, reason, line))
            elif value is not None:
                found.append(value)
                numbers.append(row)
            row += 1
        yield Sheet(_table(found, names, numbers, lists, separator), rejects)


def _fits(value: dict[str, Any], names: Sequence[str], text: str) -> bool:
    """Whether `text` is no list or object, and the others can be written again: some that can be read are too deep for that."""
    try:
        return not isinstance(value.get(text), list | dict) and all(json.dumps(value.get(name)) for name in names)
    except RecursionError:
        return False


def _parse(line: bytes, once: Sequence[str], needles: Sequence[bytes]) -> tuple[dict[str, Any] | None, str]:
    """(object, "") or (None, reason). A name in `once` that stands twice is no object: which value counts cannot be known."""
    try:
        value = json.loads(line)
        if not isinstance(value, dict):
            return None, "bad_row"
        written_twice = b"\\" in line or any(line.count(needle) > 1 for needle in needles)  # a name may be written with escapes
        if line.count(b":") > len(value) and written_twice and _twice(line, once):
            return None, "name_twice"
        if line.count(b"{") > 1 and any(isinstance(value.get(name), dict | list) for name in once):
            value = json.loads(line, object_pairs_hook=_all_fields)
        return value, ""
    except UnicodeDecodeError:
        return None, "not_utf8"
    except (ValueError, RecursionError):
        return None, "bad_row" if line.strip() else "empty"


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


def _twice(line: bytes, once: Sequence[str]) -> bool:
    pairs: list[list[tuple[str, Any]]] = []

    def keep(found: list[tuple[str, Any]]) -> dict[str, Any]:
        pairs.append(found)
        return dict(found)

    json.loads(line, object_pairs_hook=keep)
    names = [name for name, _ in pairs[-1]]  # the outermost object is closed last
    return any(names.count(name) > 1 for name in once)


def _table(rows: Sequence[dict[str, Any]], names: Sequence[str], numbers: Sequence[int], lists: Sequence[str], separator: str) -> pa.Table:
    arrays = [pa.array(numbers, pa.int64())]
    for name in names:
        values = [row.get(name) for row in rows]
        if name in lists:
            arrays.append(pa.array([_items(value, separator) for value in values], pa.list_(pa.binary())))
        else:
            arrays.append(pa.array([_bytes(value) for value in values], pa.binary()))
    return pa.table(arrays, names=[ROW, *names])


def _bytes(value: Any) -> bytes | None:
    if value is None:
        return None
    return (value if isinstance(value, str) else json.dumps(value)).encode("utf-8", "surrogatepass")


def _items(value: Any, separator: str) -> list[bytes | None] | None:
    if value is None:
        return None
    return [_bytes(item) for item in (value if isinstance(value, list) else str(value).split(separator))]
