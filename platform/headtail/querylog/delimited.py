"""Delimited text (CSV, TSV) to cells, row by row accounted for, whatever bytes are in it.

In: blocks of whole lines as bytes. Out: Sheets: the wanted cells as bytes with row numbers, and the rows that do not fit the
header, with a reason. A stray quote costs one row at most: lines without quotes are cut in bulk, a quoted cell may run over
several lines only when the record that results fits, and anything else is read literally. Tab-separated text has no quoting.
Knows nothing of encodings, files or what a cell means.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv as pacsv

from headtail.errors import LedgerError

DELIMITERS = {".tsv": "\t,;|", ".tab": "\t,;|"}
RECORD_LINES = 50  # a quoted cell may run over this many lines
RECORD_BYTES = 1 << 20
_NEWLINE, _RETURN, _QUOTE = 10, 13, 34

Ints = npt.NDArray[np.int64]


class Reject(NamedTuple):
    """A row no cells could be read from."""

    row: int
    reason: str
    text: bytes


class LongLine(NamedTuple):
    """A line too long to hold: its first bytes."""

    start: bytes


class Sheet(NamedTuple):
    """`table`: int64 column `row` (1 is the first row after the header) and the wanted cells. `rejects`: the other rows."""

    table: pa.Table
    rejects: list[Reject]


class Dialect(NamedTuple):
    """How a delimited file is written."""

    delimiter: str
    quoted: bool
    names: tuple[str, ...]


def dialect(header: bytes, wanted: str, suffix: str = "") -> Dialect:
    """The dialect under which the header line has the column `wanted`; else the likeliest one, for the error message."""
    line = header.removeprefix(b"\xef\xbb\xbf").strip(b"\r\n").decode("utf-8", "replace")
    tried = []
    for delimiter in DELIMITERS.get(suffix, ",\t;|"):
        cells = line.split(delimiter) if delimiter == "\t" else next(csv.reader([line], delimiter=delimiter), [])
        made = Dialect(delimiter, delimiter != "\t", tuple(cell.strip() for cell in cells))
        if wanted in made.names:
            return made
        tried.append(made)
    return max(tried, key=lambda item: len(item.names))


def sheets(blocks: Iterable[bytes | LongLine], form: Dialect, wanted: Sequence[str]) -> Iterator[Sheet]:
    """The rows of a file whose header has been taken off. Each block but a LongLine is whole lines."""
    row, carry = 1, b""
    for block in blocks:
        if isinstance(block, LongLine):
            rest, _ = parse(carry, form, wanted, row, last=True)
            row += _rows(rest)
            yield rest._replace(rejects=[*rest.rejects, Reject(row, "too_long", block.start)])
            row, carry = row + 1, b""
            continue
        data = carry + block
        sheet, used = parse(data, form, wanted, row, last=False)
        row, carry = row + _rows(sheet), data[used:]
        yield sheet
    if carry:
        yield parse(carry, form, wanted, row, last=True)[0]


def parse(data: bytes, form: Dialect, wanted: Sequence[str], first_row: int, last: bool) -> tuple[Sheet, int]:
    """The rows in `data` and how many of its bytes were used: a record that may go on in the next block is left."""
    raw = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(raw == _NEWLINE)
    if len(data) and data[-1] != _NEWLINE:
        ends = np.append(ends, len(data))
    starts = np.concatenate([np.zeros(1, np.int64), ends + 1])[: len(ends)]
    if not len(ends):
        return Sheet(_no_cells(wanted), []), len(data)
    quotes = _per_line(raw == _QUOTE, starts) if form.quoted and b'"' in data else np.zeros(len(ends), np.int64)
    records, held = _long_records(data, starts, ends, np.flatnonzero(quotes % 2), form, last)
    lines = held if held is not None else len(ends)
    used = int(starts[held]) if held is not None else len(data)
    begins = np.ones(lines, bool)  # whether a line begins a record
    for start, end in records:
        begins[start + 1 : end + 1] = False
    rows = first_row + np.cumsum(begins) - 1
    fits = _per_line(raw[:used] == ord(form.delimiter), starts[:lines]) == len(form.names) - 1
    plain = fits & (quotes[:lines] == 0) & ~_lone_return(raw[:used], ends[:lines]) & begins
    for start, end in records:
        plain[start : end + 1] = False
    bulk = _bulk(data[:used], plain, starts[:lines], form, wanted)
    spans = dict(records)
    singly = ((int(i), data[starts[i] : ends[spans.get(int(i), int(i))]]) for i in np.flatnonzero(begins & ~plain))
    slow, rejects = _one_by_one(singly, rows, form, wanted)
    table = bulk.add_column(0, "row", pa.array(rows[plain], pa.int64()))
    return Sheet(pa.concat_tables([table, slow]) if slow.num_rows else table, rejects), used


def _rows(sheet: Sheet) -> int:
    return int(sheet.table.num_rows) + len(sheet.rejects)


def _no_cells(wanted: Sequence[str]) -> pa.Table:
    return pa.schema([("row", pa.int64()), *((name, pa.binary()) for name in wanted)]).empty_table()


def _per_line(hits: npt.NDArray[np.bool_], starts: Ints) -> Ints:
    """How many `hits` there are in each line."""
    return np.add.reduceat(hits, starts, dtype=np.int64) if len(starts) else np.zeros(0, np.int64)


def _lone_return(raw: npt.NDArray[np.uint8], ends: Ints) -> npt.NDArray[np.bool_]:
    """Lines that hold a carriage return other than at their end; Arrow would cut them in two."""
    found = np.zeros(len(ends), bool)
    returns = np.flatnonzero(raw == _RETURN)
    if len(returns):
        found[np.searchsorted(ends, returns[~np.isin(returns + 1, ends)])] = True
    return found


def _long_records(data: bytes, starts: Ints, ends: Ints, odd: Ints, form: Dialect, last: bool) -> tuple[list[tuple[int, int]], int | None]:
    """Records over several lines as (first, last) line, and the line from which on the next block is needed."""
    found: list[tuple[int, int]] = []
    at = 0
    while at < len(odd):
        line = int(odd[at])
        if at + 1 < len(odd):
            end = int(odd[at + 1])
            short = end - line < RECORD_LINES and ends[end] - starts[line] < RECORD_BYTES
            if short and _cells(data[starts[line] : ends[end]], form, strict=True) is not None:
                found.append((line, end))
                at += 2
                continue
        elif not last and len(ends) - line < RECORD_LINES and len(data) - starts[line] < RECORD_BYTES:
            return found, line
        at += 1
    return found, None


def _bulk(data: bytes, plain: npt.NDArray[np.bool_], starts: Ints, form: Dialect, wanted: Sequence[str]) -> pa.Table:
    """The wanted cells of the lines marked `plain`, cut by Arrow."""
    rows = int(plain.sum())
    if not rows:
        return _no_cells(wanted).drop_columns(["row"])
    if rows < len(plain):
        lengths = np.diff(np.append(starts, len(data)))
        data = np.frombuffer(data, np.uint8)[np.repeat(plain, lengths)].tobytes()
    places = {name: f"c{form.names.index(name)}" for name in wanted}
    table = pacsv.read_csv(
        pa.BufferReader(data),
        pacsv.ReadOptions(column_names=[f"c{i}" for i in range(len(form.names))], block_size=len(data) + 1, use_threads=False),
        pacsv.ParseOptions(delimiter=form.delimiter, quote_char=False, ignore_empty_lines=False),
        pacsv.ConvertOptions(
            include_columns=list(places.values()),
            column_types=dict.fromkeys(places.values(), pa.binary()),
            check_utf8=False,
            strings_can_be_null=False,
        ),
    )
    if table.num_rows != rows:
        raise LedgerError("rows were lost while cutting delimited text into cells", value=f"{rows} lines, {table.num_rows} rows")
    return table.rename_columns(list(places))


def _one_by_one(records: Iterable[tuple[int, bytes]], rows: Ints, form: Dialect, wanted: Sequence[str]) -> tuple[pa.Table, list[Reject]]:
    """The wanted cells of records that need care, and those that do not fit the header."""
    numbers: list[int] = []
    columns: list[list[bytes]] = [[] for _ in wanted]
    rejects: list[Reject] = []
    places = [form.names.index(name) for name in wanted]
    for line, record in records:
        cells = _cells(record, form)
        if cells is None:
            rejects.append(Reject(int(rows[line]), "bad_row" if record.strip() else "empty", record))
            continue
        numbers.append(int(rows[line]))
        for column, place in zip(columns, places, strict=True):
            column.append(cells[place])
    arrays = [pa.array(numbers, pa.int64()), *(pa.array(column, pa.binary()) for column in columns)]
    return pa.table(arrays, names=["row", *wanted]), rejects


def _cells(record: bytes, form: Dialect, strict: bool = False) -> list[bytes] | None:
    """The cells of one record, None when their number is not the header's. Quotes that do not pair are literal unless `strict`."""
    text = record.rstrip(b"\r\n").decode("latin-1").replace("\r\n", "\n").replace("\r", " ")  # latin-1: bytes pass through
    cells: list[str] = []
    if form.quoted:
        csv.field_size_limit(1 << 30)
        try:
            found = list(csv.reader([text], delimiter=form.delimiter, strict=strict))
        except csv.Error:
            found = []
        cells = found[0] if len(found) == 1 else []
    if len(cells) != len(form.names) and not strict:
        cells = text.split(form.delimiter)
    if len(cells) != len(form.names):
        return None
    return [cell.encode("latin-1") for cell in cells]
