"""Delimited text (CSV, TSV) to cells, row by row accounted for, whatever bytes are in it.

In: blocks of whole lines as bytes. Out: Sheets: the wanted cells as bytes with row numbers, and the rows that are not read, with a
reason. Lines without backslashes whose quotes only stand around cells are cut in bulk. Other records are read in every way that the
file's dialect leaves possible: those that fit in two ways are set aside, a quoted cell may run over several lines only when the record
that results fits, and a stray quote costs one row at most. Knows nothing of encodings, files or what a cell means.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv

from headtail.core.errors import InputError, LedgerError
from headtail.stages.ingest.dialect import (
    DOUBLED,
    NONE,
    Dialect,
    canonical_header,
    cut_doubled,
    is_drawn_line,
    is_second_header,
    is_sep_line,
    readings,
)
from headtail.stages.ingest.records import BOM, Ints, Lines, Mask, Record, lines_of, literal, long_records, per_line, record_text

ROW = "\0row"  # the column of row numbers: no file names a column so
_LONGEST_SEP = 11  # bytes: a mark, "sep=;" in quotes, a carriage return
_NUL, _NEWLINE, _RETURN, _QUOTE = 0, 10, 13, 34
_DRAWN_BEGIN = [ord("-"), ord("("), 0xE2]  # bytes with which a line begins that psql or sqlcmd draws


class Reject(NamedTuple):
    """A row no cells could be read from."""

    row: int
    reason: str
    text: bytes


class LongLine(NamedTuple):
    """A line too long to hold: its first bytes."""

    start: bytes


class Sheet(NamedTuple):
    """`table`: int64 column ROW (1 is the first row after the header) and the wanted cells. `rejects`: the other rows."""

    table: pa.Table
    rejects: list[Reject]


def delimited_sheets(blocks: Iterable[bytes | LongLine], form: Dialect, names: Sequence[str]) -> Iterator[Sheet]:
    """The rows of a file whose header has been taken off. Each block but a LongLine is whole lines."""
    row, carry = 1, b""
    for block in blocks:
        if isinstance(block, LongLine):
            rest, _, form = _next(carry, form, names, row, last=True)
            row += _rows(rest)
            yield rest._replace(rejects=[*rest.rejects, Reject(row, "too_long", block.start)])
            row, carry = row + 1, b""
            continue
        data = carry + block
        sheet, used, form = _next(data, form, names, row, last=False)
        row, carry = row + _rows(sheet), data[used:]
        yield sheet
    if carry:
        yield _next(carry, form, names, row, last=True)[0]


def _next(data: bytes, form: Dialect, names: Sequence[str], row: int, last: bool) -> tuple[Sheet, int, Dialect]:
    """As `parse_rows`, and the dialect from here on: where a second file was joined, it may be written in another way."""
    sheet, used = parse_rows(data, form, names, row, last)
    if form.ways not in ((), form.quotes) and any(reject.reason == "header" for reject in sheet.rejects):
        form = form._replace(quotes=form.ways)
        sheet, used = parse_rows(data, form, names, row, last)
    return sheet, used, form


def parse_rows(data: bytes, form: Dialect, names: Sequence[str], first_row: int, last: bool) -> tuple[Sheet, int]:
    """The rows in `data` and how many of its bytes were used: a record that may go on in the next block is left."""
    lines = lines_of(data, form)
    if not len(lines.ends):
        return Sheet(_no_cells(names), []), len(data)
    records, held = long_records(lines, form, last)
    count = held if held is not None else len(lines.ends)
    used = int(lines.starts[held]) if held is not None else len(data)
    lines = Lines(data[:used], lines.raw[:used], *(part[:count] for part in lines[2:]))
    begins = np.ones(count, bool)  # whether a line begins a record
    for record in records:
        begins[record.first + 1 : record.last + 1] = False
    rows = first_row + np.cumsum(begins) - 1
    plain = begins & (lines.slashes == 0) & _neat(lines, form) & ~_unfit(lines, form)
    for record in records:
        plain[record.first : record.last + 1] = False
    bulk = _bulk(lines, plain, form, names)
    spans = {record.first: record for record in records}
    singly = (spans.get(int(i), Record(int(i), int(i), True)) for i in np.flatnonzero(begins & ~plain))
    slow, rejects = _one_by_one(lines, singly, rows, form, names)
    table = bulk.add_column(0, ROW, pa.array(rows[plain], pa.int64()))
    return Sheet(pa.concat_tables([table, slow]) if slow.num_rows else table, rejects), used


def _rows(sheet: Sheet) -> int:
    return int(sheet.table.num_rows) + len(sheet.rejects)


def _no_cells(names: Sequence[str]) -> pa.Table:
    return pa.schema([(ROW, pa.int64()), *((name, pa.binary()) for name in names)]).empty_table()


def _unfit(lines: Lines, form: Dialect) -> Mask:
    """Lines that are not cut in bulk: another number of cells, a lone carriage return (Arrow would cut there), a NUL, a header, `sep=`,
    a line of psql or sqlcmd."""
    data, raw, starts, ends, *_ = lines
    unfit: Mask = per_line(raw == ord(form.delimiter), starts) != form.cells - 1
    returns = np.flatnonzero(raw == _RETURN)
    if len(returns):
        unfit[np.searchsorted(ends, returns[~np.isin(returns + 1, ends)])] = True
    if b"\0" in data:
        unfit |= per_line(raw == _NUL, starts) > 0
    if form.trailing:
        bodies = ends - (raw[np.maximum(ends - 1, 0)] == _RETURN)
        unfit |= raw[np.maximum(bodies - 1, 0)] != ord(form.delimiter)
    # A header that comes again has the same sum, in whatever order its names are, and perhaps a mark.
    wanted = sum(canonical_header(form.header)) + ord(form.delimiter) * form.trailing
    sums = (
        np.add.reduceat(np.frombuffer(canonical_header(data), np.uint8), starts, dtype=np.int64) if len(starts) else np.zeros(0, np.int64)
    )
    unfit |= (sums == wanted) | (sums == wanted + sum(canonical_header(BOM)))
    equals = np.zeros(len(starts), bool)
    for place in (3, 4, 6, 7):  # after sep, "sep, and the same after a mark
        equals |= raw[np.minimum(starts + place, len(raw) - 1)] == ord("=")
    for line in np.flatnonzero(equals & (ends - starts <= _LONGEST_SEP)):
        unfit[line] |= is_sep_line(data[starts[line] : ends[line]], form.delimiter)
    for line in np.flatnonzero(np.isin(raw[np.minimum(starts, len(raw) - 1)], _DRAWN_BEGIN) & ~unfit):
        unfit[line] = is_drawn_line(data[starts[line] : ends[line]], form)
    return unfit


def _neat(lines: Lines, form: Dialect) -> Mask:
    """Lines without quotes; in a file that doubles them, also those with quotes around whole cells alone, which read in one way."""
    neat: Mask = lines.quotes == 0
    if neat.all() or not _doubles(form):
        return neat
    quotes = np.flatnonzero(lines.raw == _QUOTE)
    line = np.repeat(np.arange(len(lines.starts)), lines.quotes)
    first = np.cumsum(lines.quotes) - lines.quotes
    opens = (np.arange(len(quotes)) - first[line]) % 2 == 0
    border = np.zeros(256, bool)
    border[[ord(form.delimiter), _NEWLINE, _RETURN]] = True  # a carriage return elsewhere than before a line's end is unfit anyway
    around = np.concatenate([[np.uint8(_NEWLINE)], lines.raw, [np.uint8(_NEWLINE)]])
    astray = ~border[around[np.where(opens, quotes, quotes + 2)]]
    before = np.cumsum(lines.raw == ord(form.delimiter), dtype=np.int32)[quotes]
    astray[1:] |= ~opens[1:] & (np.diff(before) > 0)  # a delimiter within quotes
    neat = lines.quotes % 2 == 0
    neat[line[astray]] = False
    return neat


def _doubles(form: Dialect) -> bool:
    """Whether a record without a backslash has one reading, with quotes doubled."""
    return form.quotes[0] == DOUBLED and NONE not in form.quotes and not form.trailing


def _bulk(lines: Lines, plain: Mask, form: Dialect, names: Sequence[str]) -> pa.Table:
    """The wanted cells of the lines marked `plain`, cut by Arrow."""
    data = lines.data
    rows = int(plain.sum())
    if not rows:
        return _no_cells(names).drop_columns([ROW])
    if rows < len(plain):
        lengths = np.diff(np.append(lines.starts, len(data)))
        data = np.frombuffer(data, np.uint8)[np.repeat(plain, lengths)].tobytes()
    places = {name: f"c{form.names.index(name)}" for name in names}
    table = pacsv.read_csv(
        pa.BufferReader(data),
        pacsv.ReadOptions(column_names=[f"c{i}" for i in range(form.cells)], block_size=len(data) + 1, use_threads=False),
        pacsv.ParseOptions(delimiter=form.delimiter, quote_char='"' if _doubles(form) else False, ignore_empty_lines=False),
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


def _one_by_one(lines: Lines, records: Iterable[Record], rows: Ints, form: Dialect, names: Sequence[str]) -> tuple[pa.Table, list[Reject]]:
    """The wanted cells of records that need care, and those that cannot be read for certain."""
    numbers: list[int] = []
    columns: list[list[bytes]] = [[] for _ in names]
    rejects: list[Reject] = []
    places = [form.names.index(name) for name in names]
    for first, last, sure in records:
        record = lines.data[lines.starts[first] : lines.ends[last]]
        cells, reason = _cells(record, form) if sure else ((), "ambiguous")
        if reason:
            said = f"{_row_problem(record, form)}: ".encode() if reason == "bad_row" else b""
            rejects.append(Reject(int(rows[first]), reason, said + record))
            continue
        numbers.append(int(rows[first]))
        for column, place in zip(columns, places, strict=True):
            column.append(cells[place].encode("latin-1"))
    arrays = [pa.array(numbers, pa.int64()), *(pa.array(column, pa.binary()) for column in columns)]
    return pa.table(arrays, names=[ROW, *names]), rejects


def _cells(record: bytes, form: Dialect) -> tuple[tuple[str, ...], str]:
    """(cells, "") of one record, or ((), why it is set aside)."""
    text = record_text(record)
    if not record.strip():
        return (), "empty"
    if is_sep_line(record, form.delimiter) or (form.trailing and is_second_header(record, form)):
        return (), "header"
    if "\0" in text:
        return (), "nul"
    if is_drawn_line(record, form):
        return (), "bad_row"
    if "\\" not in text and _doubles(form):  # most
        cells = cut_doubled(text, form.delimiter, sloppy=True)
        found = {cells} if cells is not None and len(cells) == form.cells else set()
    else:
        found = readings(text, form)
    if len(found) > 1:
        return (), "ambiguous"
    cells = found.pop() if found else literal(text, form)
    if cells is None:
        return (), "bad_row"
    near = len(record) - record.count(b" ") <= len(form.header) + 4 * len(cells) + len(BOM)
    return ((), "header") if near and _is_header(cells, form) else (cells, "")


def _row_problem(record: bytes, form: Dialect) -> str:
    """What keeps a record from being a row."""
    if is_drawn_line(record, form):
        return "no row, a line that psql or sqlcmd draws"
    text = record_text(record)
    cells = len(cut_doubled(text, form.delimiter, sloppy=True) or text.split(form.delimiter))
    return "quotes or backslashes that do not fit" if cells == form.cells else f"{cells} cells, the header has {len(form.names)}"


def _is_header(cells: tuple[str, ...], form: Dialect) -> bool:
    """Whether a row repeats the header, as where files were joined. InputError for the same names in another order."""
    names = tuple(" ".join(cell.encode("latin-1").decode("utf-8", "replace").casefold().split()) for cell in cells)
    own = tuple(" ".join(name.casefold().split()) for name in form.names)
    if names == own:
        return True
    if len(names) > 1 and sorted(names) == sorted(own) and len(set(own)) == len(own):
        raise InputError(
            "a second header names the columns in another order: two files were joined",
            value=form.delimiter.join(names),
            fix="keep the files apart, in one folder",
        )
    return False
