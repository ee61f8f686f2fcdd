"""Records of delimited text: which lines belong together because a cell goes on over the end of a line.

In: whole lines as bytes, and a dialect. Out: where lines begin and end, and the records of several lines. Several lines are one
record only when what results fits the dialect; where both are possible, the caller gets to know. Knows nothing of cells' meaning.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from headtail.stages.ingest.dialect import NONE, Dialect, readings

RECORD_LINES = 50  # a cell may run over this many lines
RECORD_BYTES = 1 << 20
JOINS = 8  # of them are tried as a record's end: those on which a cell may end
BOM = b"\xef\xbb\xbf"
_NEWLINE, _QUOTE, _BACKSLASH = 10, 34, 92

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


class Lines(NamedTuple):
    """Lines of some bytes: where each begins and ends, and how many quotes and backslashes it has (0 where these are text)."""

    data: bytes
    raw: npt.NDArray[np.uint8]
    starts: Ints
    ends: Ints
    quotes: Ints
    slashes: Ints

    def text(self, first: int, last: int) -> str:
        """Lines `first` to `last` as a record."""
        return record_text(self.data[self.starts[first] : self.ends[last]])


class Record(NamedTuple):
    """Lines `first` to `last`. Not `sure`: they may be several records, or end elsewhere."""

    first: int
    last: int
    sure: bool


def record_text(record: bytes) -> str:
    """A record without mark and line end, as text in which bytes pass through."""
    return record.removeprefix(BOM).removesuffix(b"\r").decode("latin-1").replace("\r\n", "\n")


def lines_of(data: bytes, form: Dialect) -> Lines:
    """The lines of `data`."""
    raw = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(raw == _NEWLINE)
    if len(data) and data[-1] != _NEWLINE:
        ends = np.append(ends, len(data))
    starts = np.concatenate([np.zeros(1, np.int64), ends + 1])[: len(ends)]
    signs = form.quotes != (NONE,)
    quotes = per_line(raw == _QUOTE, starts) if signs and b'"' in data else np.zeros(len(ends), np.int64)
    slashes = per_line(raw == _BACKSLASH, starts) if signs and b"\\" in data else np.zeros(len(ends), np.int64)
    return Lines(data, raw, starts, ends, quotes, slashes)


def per_line(hits: Mask, starts: Ints) -> Ints:
    """How many `hits` there are in each line."""
    return np.add.reduceat(hits, starts, dtype=np.int64) if len(starts) else np.zeros(0, np.int64)


def long_records(lines: Lines, form: Dialect, last: bool) -> tuple[list[Record], int | None]:
    """Records over several lines, and the line from which on the next block is needed (`last`: there is none)."""
    records: list[Record] = []
    edges = _edges(lines) if form.quotes != (NONE,) else np.zeros(0, np.int64)
    at = 0
    while at < len(edges):
        first = int(edges[at])
        ends, more = _ends(lines, edges[at : at + 1 + JOINS], form)
        if more and not last:
            return records, first
        sure = len(ends) == 1 and not readings(lines.text(first, first), form)
        end = at
        while ends:
            end = int(np.searchsorted(edges, ends[-1]))
            ends, more = _ends(lines, edges[end : end + 1 + JOINS], form) if not sure else ([], False)  # it may end within another
            if more and not last:
                return records, first
        if end > at:
            records.append(Record(first, int(edges[end]), sure))
        at = end + 1
    return records, None


def _edges(lines: Lines) -> Ints:
    """Lines on which a cell of several lines may begin or end.

    They have an odd number of quotes, or of those that no backslash stands before, or follow a backslash at a line's end.
    """
    found = lines.quotes % 2 > 0
    for line in np.flatnonzero(lines.slashes):
        text = lines.text(line, line)
        found[line] |= text.replace("\\\\", "").replace('\\"', "").count('"') % 2 > 0
        if text.endswith("\\"):
            found[line : line + 2] = True
    return np.flatnonzero(found)


def _ends(lines: Lines, edges: Ints, form: Dialect) -> tuple[list[int], bool]:
    """Lines at which a record may end that begins on the first of `edges`, and whether the next block may hold more.

    A line that is no row takes the next with it, not to be sure of, after a backslash at its end, or all that are tried where they are
    so many that its end may be beyond.
    """
    first, starts, ends = int(edges[0]), lines.starts, lines.ends
    near = [int(end) for end in edges[1:] if end - first < RECORD_LINES and ends[end] - starts[first] < RECORD_BYTES]
    more = len(near) == len(edges) - 1 < JOINS and len(ends) - first < RECORD_LINES and len(lines.data) - starts[first] < RECORD_BYTES
    fits = [end for end in near if readings(lines.text(first, end), form)]
    alone = lines.text(first, first)
    if not fits and literal(alone, form) is None and not readings(alone, form):
        if alone.endswith("\\"):
            return near[:1] * 2, more
        if len(near) == JOINS:
            return near[-1:] * 2, more
    return fits, more


def literal(text: str, form: Dialect) -> tuple[str, ...] | None:
    """Cells with quotes that do not pair, read as they stand; None when a backslash or the number of cells speaks against it."""
    cells = text.split(form.delimiter)
    if len(cells) != form.cells or (form.trailing and cells[-1]) or "\\" in text or "\n" in text or "\r" in text:
        return None
    return tuple(cells[: len(form.names)])
