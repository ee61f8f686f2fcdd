"""Detect how a delimited file is written, from its first bytes, where that is certain.

In: the first bytes of a file and the column wanted. Out: its Dialect: delimiter, header, and the ways to write quotes that its first
rows leave possible. Knows nothing of how rows are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from headtail.stages.ingest.dialect import (
    BACKSLASH,
    DOUBLED,
    ESCAPED,
    QUOTES,
    SEP_LINE,
    Cells,
    Dialect,
    by_way,
    cut_backslash,
    cut_bare,
    cut_doubled,
    cut_escaped,
    is_second_header,
    readings,
)
from headtail.stages.ingest.records import BOM, RECORD_LINES, lines_of, long_records

DELIMITERS = {".tsv": "\t,;|", ".tab": "\t,;|"}
_SAMPLE = 5000  # records with quotes or backslashes that are looked at
_SEP = re.compile(SEP_LINE.pattern + rb"\n", re.I)


def detect(head: bytes, whole: bool, query_column: str, suffix: str, quotes: str) -> Dialect:
    """The dialect of a file that begins with `head` (`whole`: that is all of it) and should have the column `query_column`.

    Without that column it is the likeliest dialect, for an error message. `quotes`: one of QUOTES, or auto.
    """
    returns = b"\n" not in head and b"\r" in head
    data = head.replace(b"\r", b"\n") if returns else head
    start = _SEP.match(data)
    begin = start.end() if start else len(BOM) * data.startswith(BOM)
    delimiters = start[1].decode("latin-1") if start else DELIMITERS.get(suffix, ",\t;|")
    lines = data[begin : begin + (1 << 20)].split(b"\n", RECORD_LINES)[:RECORD_LINES]
    tried = []
    for delimiter in delimiters:
        ways = QUOTES[::-1] if delimiter == "\t" else QUOTES[:2]
        form = Dialect(delimiter, ways if quotes == "auto" else (quotes,), (), returns=returns)
        for named in _headers(lines, form):
            if query_column in named.names:
                begin += named.skip
                return _refine_dialect(data[begin:], whole, named._replace(skip=begin, ways=named.quotes))
            tried.append(named)
    return max(tried, key=lambda form: len(form.names))


def _headers(lines: list[bytes], form: Dialect) -> Iterator[Dialect]:
    """`form` with the names in the header, for each way to read it and of the fewest lines that can be read so."""
    left = list(form.quotes)
    for count in range(1, len(lines) + 1):
        raw = b"\n".join(lines[:count])
        header = raw.removesuffix(b"\r")
        found: dict[Cells, list[str]] = {}
        for way in tuple(left):
            cells = _header(header.decode("utf-8", "replace"), way, form.delimiter)
            if cells is not None:
                left.remove(way)
                found.setdefault(tuple(" ".join(c.split()) if "\n" in c else c.strip() for c in cells), []).append(way)
        for names, ways in found.items():
            yield form._replace(names=names, quotes=tuple(ways), header=header, skip=len(raw) + 1)
        if not left or lines[0].count(b'"') % 2 == 0:
            break
    names = tuple(cell.strip() for cell in lines[0].decode("utf-8", "replace").split(form.delimiter))
    yield form._replace(names=names, header=lines[0].removesuffix(b"\r"), skip=len(lines[0]) + 1)


def _header(text: str, way: str, delimiter: str) -> Cells | None:
    if way == DOUBLED:
        return cut_doubled(text, delimiter, sloppy=True)
    if way == BACKSLASH:
        return cut_backslash(text, delimiter, sloppy=True, undo=True)
    return cut_escaped(text, delimiter) if way == ESCAPED else cut_bare(text, delimiter)


def _refine_dialect(data: bytes, whole: bool, form: Dialect) -> Dialect:
    """`form` with what the first rows say: whether all end in a delimiter too many, and which ways to write quotes remain."""
    data = data if whole else data[: data.rfind(b"\n") + 1]
    lines = lines_of(data, form)
    texts = [lines.text(i, i) for i in range(len(lines.ends))]
    headers = [is_second_header(text.encode("latin-1"), form) for text in texts]
    rows = [text for text, header in zip(texts, headers, strict=True) if text.strip() and not header]
    plain = [row for row in rows if '"' not in row and "\\" not in row]
    extra = form._replace(trailing=True)
    if rows and all(row.endswith(form.delimiter) for row in rows) and all(row.count(form.delimiter) == len(form.names) for row in plain):
        form = extra if plain or any(readings(row, extra) for row in rows[:_SAMPLE]) else form
    if any(headers):  # files were joined: of one tool or of two
        return form
    records, _ = long_records(lines, form, last=True)
    inside = np.zeros(len(texts), bool)
    for first, last, _ in records:
        inside[first : last + 1] = True
    special = np.flatnonzero(((lines.quotes > 0) | (lines.slashes > 0)) & ~inside)[:_SAMPLE]
    shown = [*(texts[i] for i in special), *(lines.text(first, last) for first, last, sure in records[:_SAMPLE] if sure)]
    fits = [{way for way in form.quotes if by_way(text, way, form)} for text in shown]
    certain = set(form.quotes).intersection(*(found for found in fits if found))
    return form._replace(quotes=tuple(way for way in form.quotes if way in certain)) if certain else form
