"""From raw cells to counted queries: each row of a log is used, or set aside with a reason.

In: Sheets of raw cells. Out: partial sums by query and day, side inputs seen, label cells, rows set aside, totals. Text is
normalised and redacted once per distinct text of a batch. Knows nothing of file formats, of the cut or of stores.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headtail.core.errors import InputError
from headtail.core.keys import normalise, query_key
from headtail.core.redact import CANDIDATE, redact
from headtail.core.rows import KEY, SET_ASIDE
from headtail.stages.ingest import cells
from headtail.stages.ingest.days import EVER, DaySpan
from headtail.stages.ingest.delimited import ROW, Sheet
from headtail.stages.ingest.tally import NO_DAY, PART, SEEN_SIDE, Spill, latest_by_day, sum_days

REASONS = ("", "not_utf8", "empty", "too_long", "bad_count", "bad_time", "before_gap", "after_gap", "after_today")
NOT_UTF8, EMPTY, TOO_LONG, BAD_COUNT, BAD_TIME, BEFORE_GAP, AFTER_GAP, AFTER_TODAY = range(1, 9)
_TIMES = (BAD_TIME, BEFORE_GAP, AFTER_GAP, AFTER_TODAY)
EMAIL, PHONE, CARD = 1, 2, 4
SHOWN_CHARS = 200
FILE_ROWS = 1 << 40  # more rows than a file has: split number and row make one number that orders the whole log

# Text that `normalise` leaves as it is: printable ASCII without capitals, single blanks. Found in bulk, so that most texts skip Python.
PLAIN = r"^[!-@\[-~]+(?: [!-@\[-~]+)*$"

LABEL_CELL = pa.schema(
    [
        ("query_key", KEY),
        ("query", pa.string()),
        ("answer", pa.binary()),
        ("split", pa.binary()),
        ("redacted", pa.bool_()),
        ("seq", pa.int64()),
        ("file", pa.string()),
        ("row", pa.int64()),
    ]
)


@dataclass(frozen=True)
class IntakeRules:
    """Which columns mean what (empty: the log has none) and how text is cleaned."""

    query: str
    count: str = ""
    time: str = ""
    labels: str = ""
    split: str = ""  # of a file of labels: train or test
    side_inputs: tuple[str, ...] = ()
    separator: str = "|"
    max_chars: int = 200
    redact: bool = True
    span: DaySpan = EVER  # days outside it are set aside
    every_label: bool = False  # a row without an answer is a label cell too, to be refused

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns to be read."""
        return tuple(name for name in (self.query, self.count, self.time, self.labels, self.split, *self.side_inputs) if name)


@dataclass
class Totals:
    """Rows and events counted on the way in."""

    rows: int = 0
    used_rows: int = 0
    used_events: int = 0
    set_aside: Counter[str] = field(default_factory=Counter)
    redacted: Counter[str] = field(default_factory=Counter)
    days: Counter[int] = field(default_factory=Counter)  # used rows by day since 1970; empty for a log without times

    def add(self, other: Totals) -> None:
        """The totals of another part of the log."""
        self.rows += other.rows
        self.used_rows += other.used_rows
        self.used_events += other.used_events
        self.set_aside += other.set_aside
        self.redacted += other.redacted
        self.days.update(other.days)


class Texts(NamedTuple):
    """Distinct raw texts, cleaned. `codes[i]` is the place in `queries` of raw text i, or -1 with `reasons[i]` > 0."""

    codes: npt.NDArray[np.int64]
    reasons: npt.NDArray[np.int8]
    marks: npt.NDArray[np.int8]  # EMAIL | PHONE | CARD of raw text i
    queries: pa.Array
    keys: pa.Array


def clean_texts(raw: pa.Array, rules: IntakeRules) -> Texts:
    """Distinct raw texts (bytes) to normalised, redacted queries."""
    plain = pc.and_(pc.match_substring_regex(raw, PLAIN), pc.less_equal(pc.binary_length(raw), rules.max_chars))
    if rules.redact:
        plain = pc.and_not(plain, pc.match_substring_regex(raw, CANDIDATE))
    codes, reasons, marks = np.full(len(raw), -1, np.int64), np.zeros(len(raw), np.int8), np.zeros(len(raw), np.int8)
    index: dict[str, int] = {}
    for i, (value, fine) in enumerate(zip(raw.to_pylist(), plain.to_pylist(), strict=True)):
        if fine:
            text = value.decode("ascii")
        else:
            text, reasons[i], marks[i] = _clean(value, rules)
            if reasons[i]:
                continue
        codes[i] = index.setdefault(text, len(index))
    queries = list(index)
    return Texts(codes, reasons, marks, pa.array(queries, pa.string()), pa.array(map(query_key, queries), KEY))


def _clean(value: bytes, rules: IntakeRules) -> tuple[str, int, int]:
    """(query, 0, marks) or ("", reason, 0)."""
    if len(value) > 64 * rules.max_chars:  # a megabyte is not worth normalising
        return "", EMPTY if not value.strip() else TOO_LONG, 0
    try:
        text = normalise(value.decode("utf-8"))
    except UnicodeDecodeError:
        return "", NOT_UTF8, 0
    if not text or len(text) > rules.max_chars:
        return "", TOO_LONG if text else EMPTY, 0
    if not rules.redact:
        return text, 0, 0
    redaction = redact(text)
    return redaction.text, 0, EMAIL * redaction.email | PHONE * redaction.phone | CARD * redaction.card


def cell_excerpt(value: object, redacting: bool) -> str:
    """A raw cell for a person to read: redacted, then cut."""
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else "" if value is None else str(value)
    text = re.sub(r"\s+", " ", text[: 4 * SHOWN_CHARS]).strip()
    return (redact(text).text if redacting else text)[:SHOWN_CHARS]


class Intake:
    """Takes Sheets in; spills partial sums by shard under `folder`."""

    def __init__(self, rules: IntakeRules, folder: Path, shards: int) -> None:
        self.rules, self.totals = rules, Totals()
        self.parts = Spill(folder / "parts", PART, shards, sum_days)
        self.sides = {name: Spill(folder / f"side-{i}", SEEN_SIDE, shards, latest_by_day) for i, name in enumerate(rules.side_inputs)}
        self.aside = Spill(folder / "aside", SET_ASIDE, 1)
        self.labels: list[pa.Table] = []

    def close(self) -> None:
        """No more sheets."""
        for spill in (self.parts, self.aside, *self.sides.values()):
            spill.close()

    def take(self, sheet: Sheet, file: str, split: int) -> None:
        """Count the rows of one sheet, the `split`-th part of the log."""
        table, rules = sheet.table, self.rules
        rows = np.asarray(table[ROW])
        self.totals.rows += len(rows) + len(sheet.rejects)
        aside = [(reject.row, reject.reason, cell_excerpt(reject.text, rules.redact)) for reject in sheet.rejects]
        if len(rows):
            coded = cells.dictionary_cells(table[rules.query])
            if coded is None:
                raise _not_text(table, rules.query, file)
            texts = clean_texts(coded.dictionary, rules)
            places = np.asarray(pc.fill_null(coded.indices, -1))
            reasons = np.where(places < 0, EMPTY, np.append(texts.reasons, 0)[places])
            count, reasons = self._counts(table, reasons)
            time, reasons = self._times(table, reasons)
            sides, reasons = self._sides(table, reasons)
            used = np.flatnonzero(reasons == 0)
            codes, day = texts.codes[places[used]], time[used] // 86_400 if rules.time else np.full(len(used), NO_DAY)
            self._count(texts, codes, day, count[used])
            self._mark(texts.marks[places[used]], count[used])
            seq = split * FILE_ROWS + rows
            for name, values in sides.items():
                self._note_side_input(name, values, texts, texts.codes[places], reasons == 0, time, seq)
            if rules.labels and rules.labels in table.column_names:
                self._labels(table, texts, places, used, seq, rows, file)
            aside += self._label_refusals(table, coded, rows, reasons)
        self._set_aside(aside, file)

    def _text(self, table: pa.Table, name: str, file: str) -> pa.Array:
        found = cells.text(cells.flat(table[name]))
        if found is None:
            raise _not_text(table, name, file)
        return found

    def _counts(self, table: pa.Table, reasons: npt.NDArray[np.int8]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int8]]:
        if not self.rules.count:
            return np.ones(len(reasons), np.int64), reasons
        found = cells.counts(cells.flat(table[self.rules.count]))
        bad = np.asarray(found.is_null())
        return np.asarray(pc.fill_null(found, 0)), np.where((reasons == 0) & bad, BAD_COUNT, reasons)

    def _times(self, table: pa.Table, reasons: npt.NDArray[np.int8]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int8]]:
        if not self.rules.time:
            return np.zeros(len(reasons), np.int64), reasons
        found = cells.times(cells.flat(table[self.rules.time]))
        bad = np.asarray(found.is_null())
        seconds, span = np.asarray(pc.fill_null(found, 0)), self.rules.span
        day = seconds // 86_400
        outside = np.select([day > span.today, day > span.last, day < span.first], [AFTER_TODAY, AFTER_GAP, BEFORE_GAP], 0)
        return seconds, np.where(reasons == 0, np.where(bad, BAD_TIME, outside), reasons).astype(np.int8)

    def _sides(self, table: pa.Table, reasons: npt.NDArray[np.int8]) -> tuple[dict[str, pa.Array], npt.NDArray[np.int8]]:
        found: dict[str, pa.Array] = {}
        for name in self.rules.side_inputs:
            if name not in table.column_names or table[name].null_count == table.num_rows:
                continue
            array = cells.flat(table[name])
            try:
                found[name] = cells.lists(array, self.rules.separator)
            except pa.ArrowInvalid:
                fine = np.array([_is_utf8(value) for value in array.to_pylist()])
                reasons = np.where((reasons == 0) & ~fine, NOT_UTF8, reasons)
                found[name] = cells.lists(array.take(pa.array(np.arange(len(array)), mask=~fine)), self.rules.separator)
        return found, reasons

    def _count(self, texts: Texts, codes: npt.NDArray[np.int64], day: npt.NDArray[np.int64], count: npt.NDArray[np.int64]) -> None:
        if not len(codes):
            return
        seen = pa.table({"code": codes, "day": day.astype(np.int32), "count": count})
        sums = seen.group_by(["code", "day"]).aggregate([("count", "sum")])
        self.parts.add(
            pa.table([texts.keys.take(sums["code"]), texts.queries.take(sums["code"]), sums["day"], sums["count_sum"]], schema=PART)
        )
        totals = Totals(used_rows=len(codes), used_events=int(count.sum()))
        if self.rules.time:
            found, rows = np.unique(day, return_counts=True)
            totals.days.update(dict(zip(found.tolist(), rows.tolist(), strict=True)))
        self.totals.add(totals)

    def _mark(self, marks: npt.NDArray[np.int8], count: npt.NDArray[np.int64]) -> None:
        if marks.any():
            for name, bit in (("email", EMAIL), ("phone", PHONE), ("card", CARD), ("any", EMAIL | PHONE | CARD)):
                self.totals.redacted[name] += int(count[(marks & bit) > 0].sum())

    def _note_side_input(
        self,
        name: str,
        values: pa.Array,
        texts: Texts,
        codes: npt.NDArray[np.int64],
        used: npt.NDArray[np.bool_],
        time: npt.NDArray[np.int64],
        seq: npt.NDArray[np.int64],
    ) -> None:
        """Side inputs of the rows that are used and have some."""
        rows = np.flatnonzero(used & np.asarray(values.is_valid()))
        day = time[rows] // 86_400 if self.rules.time else np.full(len(rows), NO_DAY)
        columns = [texts.keys.take(pa.array(codes[rows])), day.astype(np.int32), time[rows], seq[rows], values.take(pa.array(rows))]
        self.sides[name].add(latest_by_day(pa.table(columns, schema=SEEN_SIDE)))

    def _labels(
        self,
        table: pa.Table,
        texts: Texts,
        places: npt.NDArray[np.int64],
        used: npt.NDArray[np.int64],
        seq: npt.NDArray[np.int64],
        rows: npt.NDArray[np.int64],
        file: str,
    ) -> None:
        answers = self._text(table, self.rules.labels, file)
        answers = pc.fill_null(answers, b"")
        if not self.rules.every_label:
            used = used[np.asarray(pc.match_substring_regex(answers, r"[^\s]"))[used]]
        if not len(used):
            return
        has_split = self.rules.split and self.rules.split in table.column_names
        splits = self._text(table, self.rules.split, file) if has_split else pa.nulls(len(rows), pa.binary())
        codes, at = pa.array(texts.codes[places[used]]), pa.array(used)
        redacted = pa.array(texts.marks[places[used]] > 0)
        names = pa.repeat(file, len(used))
        columns = [
            texts.keys.take(codes),
            texts.queries.take(codes),
            answers.take(at),
            splits.take(at),
            redacted,
            seq[used],
            names,
            rows[used],
        ]
        self.labels.append(pa.table(columns, schema=LABEL_CELL))

    def _label_refusals(
        self, table: pa.Table, coded: pa.DictionaryArray, rows: npt.NDArray[np.int64], reasons: npt.NDArray[np.int8]
    ) -> list[tuple[int, str, str]]:
        bad = np.flatnonzero(reasons)
        texts = coded.take(pa.array(bad)).to_pylist()
        found = [(int(rows[i]), REASONS[reasons[i]], cell_excerpt(text, self.rules.redact)) for i, text in zip(bad, texts, strict=True)]
        for code, name in ((BAD_COUNT, self.rules.count), *((code, self.rules.time) for code in _TIMES)):  # the cell says more
            for at in np.flatnonzero(reasons[bad] == code):
                cell = cell_excerpt(table[name][int(bad[at])].as_py(), self.rules.redact)
                row, reason, text = found[at]
                found[at] = (row, reason, f"{cell[: SHOWN_CHARS // 2]!r} for {text}"[:SHOWN_CHARS])
        return found

    def _set_aside(self, refusals: list[tuple[int, str, str]], file: str) -> None:
        if not refusals:
            return
        refusals.sort()
        rows, reasons, texts = zip(*refusals, strict=True)
        self.totals.set_aside.update(reasons)
        self.aside.add(pa.table([pa.repeat(file, len(rows)), rows, reasons, texts], schema=SET_ASIDE))


def _not_text(table: pa.Table, name: str, file: str) -> InputError:
    return InputError(f"column {name} does not hold text", where=file, value=table[name].type, fix="name a column of text")


def _is_utf8(value: object) -> bool:
    try:
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, bytes):
                item.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
