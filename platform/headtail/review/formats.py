"""Review files as CSV and JSON Lines: export and import.

In: suspects with their valid decision, if any. Out: text; and from text, rows as written, unchecked. Writing and
reading give back exactly what went in. A CSV is safe to open in a spreadsheet: no cell can begin a formula, whichever
separator the program cuts at. Knows nothing of the store or of what a valid decision is.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from headtail.core.errors import InputError
from headtail.core.task import FieldTwice, unique_fields
from headtail.review.decision import Decision
from headtail.review.queue import Item

CELL_CHARS = 1 << 24
COLUMNS = (
    "rank", "query", "before", "verdict", "answer", "why", "reasons", "alternatives", "side_inputs", "count", "score", "gain",
    "confidence", "agreement", "stratum", "who", "at", "query_key", "answer_key", "queue",
)  # fmt: skip
NEEDED = ("query_key", "answer_key", "before", "verdict", "answer")  # a decision without these says nothing one could check


class ReviewRow(NamedTuple):
    """One row of a file that came back. Answers are JSON text, keys hex; empty text where a cell is empty."""

    number: int  # from 1, as people count: records of a CSV without its header, lines, tasks
    text: str = ""  # the row as written, for the list of rows set aside
    problem: str = ""  # what is wrong with it already
    note: str = ""  # what was corrected in it
    query_key: str = ""
    answer_key: str = ""
    query: str | None = ""  # None: the file does not say it
    before: str = ""
    verdict: str = ""
    answer: str = ""
    why: str = ""
    who: str = ""
    at: str = ""
    queue: str = ""


FIELDS = ReviewRow._fields[4:]
Sent = tuple[Item, Decision | None]  # what is exported: a suspect, and what holds for it


def csv_text(names: Sequence[str], lines: Iterable[Mapping[str, str]]) -> str:
    """A CSV with this header. Cells stand there as they are."""
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, names, lineterminator="\r\n")
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()


def write_csv(rows: Iterable[Sent], queue: str) -> Iterator[str]:
    """Lines of a CSV: UTF-8 with a byte order mark (spreadsheets ask for it), every cell quoted and guarded."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, quoting=csv.QUOTE_ALL, lineterminator="\r\n")
    buffer.write("\ufeff")
    writer.writerow(COLUMNS)
    for item, decision in rows:
        writer.writerow([guard(cell) for cell in _cells(item, decision, queue)])
        yield buffer.getvalue()
        buffer.seek(0)
        buffer.truncate()
    yield buffer.getvalue()


def _cells(item: Item, decision: Decision | None, queue: str) -> list[str]:
    def number(value: float | None) -> str:
        return "" if value is None else repr(value)

    fields = _decision_fields(decision)
    return [
        str(item.rank), item.query, item.answer or "", fields["verdict"], fields["answer"], fields["why"], _json(item.reasons),
        "\n".join(item.alternatives), _json(item.side) if item.side else "", str(item.count), number(item.score), number(item.gain),
        number(item.confidence), number(item.agreement), item.stratum, fields["who"], fields["at"], item.query_key,
        item.answer_key or "", queue,
    ]  # fmt: skip


def _decision_fields(decision: Decision | None) -> dict[str, str]:
    if decision is None:
        return dict.fromkeys(("verdict", "answer", "why", "who", "at"), "")
    answer = decision.answer if decision.verdict == "correct" else None
    return {"verdict": decision.verdict, "answer": answer or "", "why": decision.why, "who": decision.who, "at": decision.at}


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


# Where a cell may begin: at the start, and after whatever another program may cut at (a semicolon in half of Europe, a tab, a new
# line when it does not heed the quotes). There an apostrophe goes before what makes a formula, as OWASP's "CSV Injection" page
# advises (its list, and the full-width forms). Apostrophes that stand there already are counted, so that it can be undone exactly.
_BEGIN, _FORMULA = r"""(?:\A|(?<=[;|\t\r\n]))([" ]*)""", r"""('*)(?=[=+\-@\t\r\n＝＋－＠])"""
_OPEN, _GUARDED = re.compile(_BEGIN + _FORMULA), re.compile(_BEGIN + "'" + _FORMULA)


def guard(text: str) -> str:
    """`text` with an apostrophe before everything a spreadsheet could take for a formula."""
    return _OPEN.sub(r"\1'\2", text)


def unguard(text: str) -> str:
    """What `guard` was given."""
    return _GUARDED.sub(r"\1\2", text)


_SEP = re.compile(r'"?sep=[^"\r\n]"?[,;\t]*\r?\n', re.I)
_NULL = frozenset({"null", "nan", "none", "n/a", "#n/a", "<na>"})


class CsvRecord(NamedTuple):
    """A record of a CSV: its number from 1, its text, what is wrong with it, and the cells of the columns that are known."""

    number: int
    text: str
    problem: str
    cells: dict[str, str]


def read_csv(data: bytes, where: str) -> Iterator[ReviewRow]:
    """The rows of a review file; a cell that says null is empty."""
    for number, text, problem, fields in read_records(data, where, FIELDS, NEEDED, "headtail review export"):
        nulls = {name: "" for name in fields if fields[name].strip().lower() in _NULL and _is_null(name, fields)}
        yield ReviewRow(number, text, problem, query=fields.pop("query", None), **(fields | nulls))


def read_records(data: bytes, where: str, known: Sequence[str], needed: Sequence[str], maker: str) -> Iterator[CsvRecord]:
    """The records of a CSV, also as a spreadsheet saved it again.

    It may be cut at commas, semicolons or tabs (with Excel's `sep=` line or without), have a mark, columns in another order, further
    ones, and rows that end early or in empty cells. InputError names columns that lack; `maker`: the command that writes such a file.
    """
    text = _decode(data, where)
    text = text[text.index("\n") + 1 :] if _SEP.match(text) else text
    csv.field_size_limit(max(CELL_CHARS, csv.field_size_limit()))  # the limit is the process's: never lower it
    reader, names = _header(text, known)
    try:
        _require(names, where, known, needed, maker)
        for number, cells in enumerate(reader, 1):
            if not any(cells):
                continue
            padded, extra = [*cells[: len(names)], *[""] * (len(names) - len(cells))], cells[len(names) :]
            if any(extra):
                yield CsvRecord(number, ",".join(cells), f"{len(cells)} cells, the header has {len(names)}", {})
                continue
            fields = {name: unguard(cell) for name, cell in zip(names, padded, strict=True) if name in known}
            yield CsvRecord(number, ",".join(cells), "", fields)
    except csv.Error as error:
        raise InputError(f"not a CSV: {error}", where=f"{where}, line {reader.line_num}", fix="save it as CSV UTF-8 again") from error


def _header(text: str, known: Sequence[str]) -> tuple[Any, list[str]]:
    """A reader after the header, and the header's names: cut at the delimiter that gives the most names that are known."""
    found = []
    for delimiter in ",;\t":
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        try:
            names = [name.strip().lower() for name in next(reader, [])]
        except csv.Error:
            names = []
        found.append((reader, names))
    return max(found, key=lambda pair: len(set(known).intersection(pair[1])))


def _is_null(name: str, row: dict[str, str]) -> bool:
    """Whether a word for nothing says nothing: a query or a remark may be that word, and a correction a label of that name."""
    return name not in ("query", "why", "who") and (name != "answer" or row.get("verdict", "").strip().lower() != "correct")


def _require(names: list[str], where: str, known: Sequence[str], needed: Sequence[str], maker: str) -> None:
    missing = [name for name in needed if name not in names]
    twice = [name for name in known if names.count(name) > 1]
    if missing or twice:
        what = f"lacks column{'s' if len(missing) > 1 else ''} {', '.join(missing)}" if missing else f"names a column twice: {twice[0]}"
        raise InputError(f"the header {what}", where=where, value=", ".join(names), fix=f"start from a file of `{maker}`")


def write_jsonl(rows: Iterable[Sent], queue: str) -> Iterator[str]:
    """One JSON object per line. Answers are JSON values, not text in text; null: none."""
    for item, decision in rows:
        said = _decision_fields(decision)
        line = {
            **{name: getattr(item, name) for name in ("rank", "query")},
            "before": value_of(item.answer),
            **said,
            "answer": value_of(said["answer"] or None),
            "reasons": item.reasons,
            "alternatives": [value_of(text) for text in item.alternatives],
            "side_inputs": item.side,
            **{name: getattr(item, name) for name in ("count", "score", "gain", "confidence", "agreement", "stratum")},
            "query_key": item.query_key,
            "answer_key": item.answer_key,
            "queue": queue,
        }
        yield _json(line) + "\n"


def value_of(text: str | None) -> Any:
    """The JSON value of a queue's answer; None: there is none."""
    try:
        return None if text is None else json.loads(text)
    except ValueError as error:
        raise InputError(f"an answer of the queue is not JSON: {error}", where="review queue", value=text) from None


def read_jsonl(data: bytes, where: str) -> Iterator[ReviewRow]:
    """The rows of a review file in JSON Lines."""
    return (_jsonl_row(number, line) for number, line in read_lines(data, where))


def read_lines(data: bytes, where: str) -> Iterator[tuple[int, str]]:
    """The lines of a file with their numbers from 1; blank lines are passed over."""
    for number, line in enumerate(_decode(data, where).split("\n"), 1):
        if line.strip():
            yield number, line.rstrip("\r")


def read_object(line: str) -> tuple[dict[str, Any], str]:
    """(the object of a line, "") or ({}, what is wrong): also where a field of it, or of an object in it, occurs twice."""
    try:
        found = json.loads(line, object_pairs_hook=unique_fields)
    except FieldTwice as error:
        return {}, str(error)
    except (ValueError, RecursionError) as error:
        return {}, f"not JSON: {error}"
    return (found, "") if isinstance(found, dict) else ({}, "not a JSON object")


def _jsonl_row(number: int, line: str) -> ReviewRow:
    found, problem = read_object(line)
    if problem:
        return ReviewRow(number, line, problem)
    missing = [name for name in ("query_key", "answer_key", "before", "verdict") if name not in found]
    if missing:
        return ReviewRow(number, line, f"{missing[0]}: missing")
    values: dict[str, str] = {}
    for name in FIELDS:
        value = found.get(name)
        if name in ("before", "answer"):
            values[name] = "" if value is None else _json(value)
        elif value is not None and not isinstance(value, str):
            return ReviewRow(number, line, f"{name}: not text")
        else:
            values[name] = value or ""
    row = ReviewRow(number, line, **values)
    return row if "query" in found else row._replace(query=None)


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        what = "UTF-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else f"{error.reason} at byte {error.start:,}"
        raise InputError(f"not UTF-8: {what}", where=where, fix="save it as UTF-8 (CSV UTF-8)") from None
