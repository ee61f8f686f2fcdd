"""How a delimited text file is written, and every way in which one of its records can be read.

In: a Dialect, one record. Out: the cells that the record can be. Four ways to write a quote within a cell are known; where a file
leaves several possible, a record is certain only when all that fit give the same cells. Text is Latin-1 here, so that bytes pass
through unchanged. Knows nothing of files.
"""

from __future__ import annotations

import csv
import re
from functools import lru_cache
from typing import NamedTuple

DOUBLED, BACKSLASH, ESCAPED, NONE = "doubled", "backslash", "escaped", "none"
QUOTES = (DOUBLED, BACKSLASH, ESCAPED, NONE)
QUOTES_HELP = (
    'how a quote in a cell is written: doubled ("12"" pizza", Excel, pandas), backslash ("12\\" pizza", Spark, MySQL enclosed by quotes), '
    "escaped (cells have no quotes around them, tabs and the like are \\t: mysql -B, COPY, jq @tsv), none (quotes and backslashes are "
    "text); auto: found from the file, and rows that can be read in two ways are set aside"
)
SEP_LINE = re.compile(rb'(?:\xef\xbb\xbf)?"?sep=([^"\r\n])"?\r?', re.I)  # Excel's: it names the delimiter
_RULE = re.compile(rb"(?:-|\xe2\x94\x80)+")  # of hyphens, or of the box-drawing line that psql can use
_RULE_CHARS = 3  # of the longest cell of a rule: psql draws two more than the name of a column has
_FOOTER = re.compile(rb"\([0-9]+ row(?:s|\(s\))?(?: affected)?\)")
_CONTROL = {"t": "\t", "n": "\n", "r": "\r"}


csv.field_size_limit(max(1 << 30, csv.field_size_limit()))  # the process's; what is too long for a cell is not csv's to say


class Dialect(NamedTuple):
    """How a delimited file is written."""

    delimiter: str
    quotes: tuple[str, ...]  # of QUOTES: those that the start of the file leaves possible
    names: tuple[str, ...]
    header: bytes = b""  # as it stands, without mark and line end
    skip: int = 0  # bytes before the first row: marks, Excel's sep= line, the header
    ways: tuple[str, ...] = ()  # `quotes` as the header left them: where a second file begins, they are all possible again
    trailing: bool = False  # every row ends in a delimiter that the header does not have
    returns: bool = False  # lines end in a carriage return alone

    @property
    def cells(self) -> int:
        """Cells of a row as it stands in the file."""
        return len(self.names) + self.trailing


Cells = tuple[str, ...]

# Two writers of one header differ in capitals, blanks and quotes (0 here). Capitals beyond ASCII have as many bytes, not the same ones.
_ALIKE = bytes(
    1 if byte > 127 else 0 if byte in b' \t\r\n"' else byte + 32 * (ord("A") <= byte <= ord("Z")) for byte in range(256)
)  # fmt: skip


def canonical_header(data: bytes) -> bytes:
    """`data` byte for byte, such that a header is the same however it is written. What is the same may still be no header."""
    return data.translate(_ALIKE)


def is_sep_line(line: bytes, delimiter: str) -> bool:
    """Whether a line is Excel's `sep=;` with this delimiter, as stands before a header: also before one that `cat` glued in."""
    found = SEP_LINE.fullmatch(line)
    return found is not None and found[1].decode("latin-1") == delimiter


def is_drawn_line(line: bytes, form: Dialect) -> bool:
    """Whether a line is no row but drawn around a table by psql or sqlcmd: the rule under a header, or `(2 rows)` after the last row."""
    cells = [cell.strip() for cell in line.split(form.delimiter.encode("latin-1"))]
    if len(cells) != form.cells:
        return False
    if len(cells) == 1 and _FOOTER.fullmatch(cells[0]):
        return True
    return all(map(_RULE.fullmatch, cells)) and max(len(cell.decode("utf-8", "replace")) for cell in cells) >= _RULE_CHARS


def is_second_header(line: bytes, form: Dialect) -> bool:
    """Whether a line is the header again as it stands in the file, or the `sep=` line before it."""
    own, found = (canonical_header(data).replace(b"\0", b"") for data in (form.header, line))
    return own == found or is_sep_line(line, form.delimiter)


def readings(text: str, form: Dialect) -> set[Cells]:
    """Every way in which `text` (without its line end) is a row of `form`; empty when it fits no way."""
    ways = form.quotes
    if "\\" not in text:  # then two of them say no more than two others
        ways = tuple(way for way in ways if (way != BACKSLASH or DOUBLED not in ways) and (way != ESCAPED or NONE not in ways))
    return {cells for way in ways for cells in by_way(text, way, form)}


def by_way(text: str, way: str, form: Dialect) -> set[Cells]:
    """The rows of `form` that `text` is when quotes are written in one way."""
    found, sloppy = set[Cells | None](), NONE not in form.quotes
    if way == DOUBLED:
        found.add(cut_doubled(text, form.delimiter, sloppy))
    elif way == BACKSLASH:
        found |= {cut_backslash(text, form.delimiter, sloppy, undo) for undo in (True, False)}
    elif way == ESCAPED:
        found.add(cut_escaped(text, form.delimiter))
    else:
        found.add(cut_bare(text, form.delimiter))
    fits = {cells for cells in found if cells is not None and len(cells) == form.cells and not (form.trailing and cells[-1])}
    return {cells[: len(form.names)] for cells in fits}


# How cells are cut: a quoted one (group 1) or a bare one (group 2), then the delimiter D or the end. Where it is not known whether
# the file quotes at all, a quote within a bare cell is evidence against it: a program that quotes would have quoted that cell.
_QUOTED = {DOUBLED: r'"((?:[^"]|"")*)"', BACKSLASH: r'"((?:[^"\\]|\\[\s\S])*)"', ESCAPED: r"(?!)()"}
_BARE = {
    "sloppy": r'((?!")[^D\r\n]*)',
    "strict": r'([^D"\r\n]*)',
    "undone": r'((?!")(?:[^D\\\r\n]|\\[\s\S])*)',
    ESCAPED: r"((?:[^D\\\r\n]|\\[\s\S])*)",
}


@lru_cache
def _pattern(quoted: str, bare: str, delimiter: str) -> re.Pattern[str]:
    return re.compile(rf"(?:{_QUOTED[quoted]}|{_BARE[bare]})(?=D|\Z)".replace("D", re.escape(delimiter)))


def _cut(text: str, pattern: re.Pattern[str]) -> list[tuple[str, bool]] | None:
    """Cells as (text, whether quoted); None when the text is not cells and delimiters from end to end."""
    found, at = list[tuple[str, bool]](), 0
    while match := pattern.match(text, at):
        found.append((match[2], False) if match[1] is None else (match[1], True))
        at = match.end() + 1
        if at > len(text):
            return found
    return None


def cut_doubled(text: str, delimiter: str, sloppy: bool) -> Cells | None:
    if not sloppy:
        cells = _cut(text, _pattern(DOUBLED, "strict", delimiter))
        return tuple(cell.replace('""', '"') if quoted else cell for cell, quoted in cells) if cells else None
    try:
        rows = list(csv.reader([text], delimiter=delimiter, strict=True))
    except csv.Error:
        return None
    return tuple(rows[0]) if len(rows) == 1 else None


def cut_backslash(text: str, delimiter: str, sloppy: bool, undo: bool) -> Cells | None:
    """Quoted cells have \\" and \\\\. Cells without quotes stand as they are (Spark), or with `undo` have escapes too (Python)."""
    cells = _cut(text, _pattern(BACKSLASH, "undone" if undo else "sloppy" if sloppy else "strict", delimiter))
    if cells is None or (not sloppy and any('"' in cell for cell, quoted in cells if not quoted)):
        return None
    escape = re.compile(rf'\\(["\\\n{re.escape(delimiter)}])')
    return tuple("" if not quoted and cell == r"\N" else escape.sub(r"\1", cell) if quoted or undo else cell for cell, quoted in cells)


def cut_escaped(text: str, delimiter: str) -> Cells | None:
    cells, found = _cut(text, _pattern(ESCAPED, ESCAPED, delimiter)), list[str]()
    known = {*_CONTROL, "\\", "\n", delimiter, "" if re.search(r'(?<!\\)"', text) else '"'}  # who escapes one quote escapes them all
    for cell, _ in cells or ():
        if cell != r"\N" and not known.issuperset(re.findall(r"\\([\s\S])", cell)):
            return None
        found.append("" if cell == r"\N" else re.sub(r"\\([\s\S])", lambda sign: _CONTROL.get(sign[1], sign[1]), cell))
    return tuple(found) or None


def cut_bare(text: str, delimiter: str) -> Cells | None:
    return None if "\n" in text or "\r" in text else tuple(text.split(delimiter))
