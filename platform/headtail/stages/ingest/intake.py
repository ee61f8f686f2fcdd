"""From raw cells to counted queries: each row of a log is used, or set aside with a reason.

In: Sheets of raw cells. Out: partial sums by query and day, side inputs seen, label cells, rows set aside, totals. Events are counted
by raw text; a text is cleaned when its sums leave memory. Knows nothing of file formats, of the cut or of stores.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headtail.core import cells
from headtail.core.errors import InputError
from headtail.core.redact import redact
from headtail.core.rows import KEY, SET_ASIDE
from headtail.stages.ingest.days import EVER, DaySpan
from headtail.stages.ingest.delimited import ROW, Sheet
from headtail.stages.ingest.tally import (
    NO_DAY,
    PART_BY_RULES,
    RAW_PART,
    RAW_SIDE,
    SEEN_SIDE,
    Spill,
    last_rows,
    latest_raw,
    one_dictionary,
    raw_texts,
    sum_by,
    sum_raw,
)
from headtail.stages.ingest.texts import CARD, EMAIL, EMPTY, NOT_UTF8, PHONE, Bits, RawTexts, clean_texts, query_keys, screen_texts

REASONS = ("", "not_utf8", "empty", "too_long", "nul", "bad_count", "bad_time", "before_gap", "after_gap", "after_today")
BAD_COUNT, BAD_TIME, BEFORE_GAP, AFTER_GAP, AFTER_TODAY = range(5, 10)
_TIMES = (BAD_TIME, BEFORE_GAP, AFTER_GAP, AFTER_TODAY)
Ints = npt.NDArray[np.int64]
SHOWN_CHARS = 200
FILE_ROWS = 1 << 40  # more rows than a file has: split number and row make one number that orders the whole log

LABEL_CELL = pa.schema(
    [
        ("query_key", KEY),
        ("query", pa.string()),
        ("answer", pa.binary()),
        ("split", pa.binary()),
        ("design", pa.binary()),
        ("inclusion", pa.binary()),
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
    design: str = ""  # of a file of labels: how its rows were drawn
    inclusion: str = ""  # and with which chance
    side_inputs: tuple[str, ...] = ()
    separator: str = "|"
    max_chars: int = 200
    redact: bool = True
    span: DaySpan = EVER  # days outside it are set aside
    every_label: bool = False  # a row without an answer is a label cell too, to be refused

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns to be read."""
        names = (self.query, self.count, self.time, self.labels, self.split, self.design, self.inclusion, *self.side_inputs)
        return tuple(name for name in names if name)


LABELS_FILE = IntakeRules(  # columns of a file of labels
    "query", labels="answer", split="split", design="design", inclusion="inclusion", every_label=True
)


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


def cell_excerpt(value: object, redacting: bool) -> str:
    """A raw cell for a person to read: redacted, then cut."""
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else "" if value is None else str(value)
    text = re.sub(r"\s+", " ", text[: 4 * SHOWN_CHARS]).strip()
    return (redact(text).text if redacting else text)[:SHOWN_CHARS]


class Intake:
    """Takes Sheets in; spills partial sums by shard under `folder`."""

    def __init__(self, rules: IntakeRules, folder: Path, shards: int) -> None:
        self.rules, self.totals = rules, Totals()
        self.parts = Spill(folder / "parts", PART_BY_RULES, shards, sum_raw, self._clean_sums)
        self.sides = {
            name: Spill(folder / f"side-{i}", SEEN_SIDE, shards, latest_raw, self._clean_sides) for i, name in enumerate(rules.side_inputs)
        }
        self.aside = Spill(folder / "aside", SET_ASIDE, 1)
        self.labels: list[pa.Table] = []
        self._lock = Lock()

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
            if coded is None or pa.types.is_boolean(table.schema.field(rules.query).type):
                raise _not_text(table, rules.query, file)
            texts = screen_texts(coded.dictionary, rules.max_chars, rules.redact)
            places = np.asarray(pc.fill_null(coded.indices, -1))
            reasons = np.append(texts.reasons, np.uint8(EMPTY))[places]  # no text: place -1
            count, reasons = self._counts(table, reasons)
            time, reasons = self._times(table, reasons)
            sides, reasons = self._sides(table, reasons, file)
            used = np.flatnonzero(reasons == 0)
            day = time // 86_400 if rules.time else np.full(len(rows), NO_DAY)
            self._count(texts, places[used], day[used], count[used])
            seq = split * FILE_ROWS + rows
            for name, values in sides.items():
                self._note_side_input(name, values, texts, places, reasons == 0, day, time, seq)
            if rules.labels and rules.labels in table.column_names:
                self._labels(table, texts, places, used, seq, rows, file)
            aside += self._label_refusals(table, coded, rows, reasons)
        self._set_aside(aside, file)

    def _text(self, table: pa.Table, name: str, file: str) -> pa.Array:
        found = cells.text(cells.flat(table[name]))
        if found is None:
            raise _not_text(table, name, file)
        return found

    def _counts(self, table: pa.Table, reasons: Bits) -> tuple[Ints, Bits]:
        if not self.rules.count:
            return np.ones(len(reasons), np.int64), reasons
        found = cells.counts(cells.flat(table[self.rules.count]))
        bad = np.asarray(found.is_null())
        return np.asarray(pc.fill_null(found, 0)), np.where((reasons == 0) & bad, BAD_COUNT, reasons)

    def _times(self, table: pa.Table, reasons: Bits) -> tuple[Ints, Bits]:
        if not self.rules.time:
            return np.zeros(len(reasons), np.int64), reasons
        found = cells.times(cells.flat(table[self.rules.time]))
        bad = np.asarray(found.is_null())
        seconds, span = np.asarray(pc.fill_null(found, 0)), self.rules.span
        day = seconds // 86_400
        outside = np.select([day > span.today, day > span.last, day < span.first], [AFTER_TODAY, AFTER_GAP, BEFORE_GAP], 0)
        return seconds, np.where(reasons == 0, np.where(bad, BAD_TIME, outside), reasons).astype(np.int8)

    def _sides(self, table: pa.Table, reasons: Bits, file: str) -> tuple[dict[str, pa.Array], Bits]:
        found: dict[str, pa.Array] = {}
        for name in self.rules.side_inputs:
            if name not in table.column_names or table[name].null_count == table.num_rows:
                continue
            array = cells.flat(table[name])
            if pa.types.is_nested(cells.item_type(array.type)):
                raise _not_text(table, name, file, "write each item as text, for example as JSON")
            try:
                found[name] = cells.lists(array, self.rules.separator)
            except pa.ArrowInvalid:
                fine = np.array([_is_utf8(value) for value in array.to_pylist()])
                reasons = np.where((reasons == 0) & ~fine, NOT_UTF8, reasons)
                found[name] = cells.lists(array.take(pa.array(np.arange(len(array)), mask=~fine)), self.rules.separator)
        return found, reasons

    def _count(self, texts: RawTexts, places: Ints, day: Ints, count: Ints) -> None:
        if not len(places):
            return
        first = int(day.min())
        rows_by_day = np.bincount(day - first)  # times are within 230 years
        span = len(rows_by_day)
        both = places * span + (day - first)
        if not self.rules.count and len(texts.texts) * span < 8 * len(both):  # a sort takes ten times as long
            sums = np.bincount(both)
            both = np.flatnonzero(sums)
            sums = sums[both]
        else:
            both, sums = sum_by(both, count)
        at = both // span
        columns = [raw_texts(texts.texts, at), (both % span + first).astype(np.int32), texts.rules[at], sums]
        self.parts.add(pa.table(columns, schema=RAW_PART))
        if texts.marks.any():
            self._mark(texts.marks[at], sums)
        totals = Totals(used_rows=len(places), used_events=int(sums.sum()))
        if self.rules.time:
            found = np.flatnonzero(rows_by_day)
            totals.days.update(dict(zip((found + first).tolist(), rows_by_day[found].tolist(), strict=True)))
        self.totals.add(totals)

    def _clean_sums(self, table: pa.Table) -> pa.Table:
        """RAW_PART rows as PART_BY_RULES: each distinct text is cleaned, and each distinct query's key made, once."""
        raw = one_dictionary(table["text"])
        clean = clean_texts(raw.dictionary, self.rules.redact)
        queries, codes = clean.queries.dictionary_encode(), np.asarray(raw.indices)
        at = queries.indices.take(raw.indices)
        if clean.marks.any():
            self._mark(clean.marks[codes], np.asarray(table["count"]))
        rules = np.asarray(table["rules"]) | clean.rules[codes]
        columns = [query_keys(queries.dictionary).take(at), queries.dictionary.take(at), table["day"], table["count"], rules]
        return pa.table(columns, schema=PART_BY_RULES)

    def _clean_sides(self, table: pa.Table) -> pa.Table:
        """RAW_SIDE rows as SEEN_SIDE."""
        raw = one_dictionary(table["text"])
        keys = query_keys(clean_texts(raw.dictionary, self.rules.redact).queries).take(raw.indices)
        return pa.table([keys, *table.columns[1:]], schema=SEEN_SIDE)

    def _mark(self, marks: Bits, count: Ints) -> None:
        with self._lock:  # sums are cleaned in threads of their own
            for name, bit in (("email", EMAIL), ("phone", PHONE), ("card", CARD), ("any", EMAIL | PHONE | CARD)):
                self.totals.redacted[name] += int(count[(marks & bit) > 0].sum())

    def _note_side_input(
        self, name: str, values: pa.Array, texts: RawTexts, places: Ints, used: npt.NDArray[np.bool_], day: Ints, time: Ints, seq: Ints
    ) -> None:
        """Side inputs of the rows that are used and have some: the last one of each text and day."""
        rows = np.flatnonzero(used & np.asarray(values.is_valid()))
        if not len(rows):
            return
        first = day[rows].min()
        rows = rows[last_rows(places[rows] * (int(day[rows].max() - first) + 1) + (day[rows] - first), time[rows], seq[rows])]
        at = pa.array(rows)
        columns = [raw_texts(texts.texts, places[rows]), day[rows].astype(np.int32), time[rows], seq[rows], values.take(at)]
        self.sides[name].add(pa.table(columns, schema=RAW_SIDE))

    def _labels(
        self,
        table: pa.Table,
        texts: RawTexts,
        places: Ints,
        used: Ints,
        seq: Ints,
        rows: Ints,
        file: str,
    ) -> None:
        answers = self._text(table, self.rules.labels, file)
        answers = pc.fill_null(answers, b"")
        if not self.rules.every_label:
            used = used[np.asarray(pc.match_substring_regex(answers, r"[^\s]"))[used]]
        if not len(used):
            return
        splits, designs, chances = (
            self._text(table, name, file) if name and name in table.column_names else pa.nulls(len(rows), pa.binary())
            for name in (self.rules.split, self.rules.design, self.rules.inclusion)
        )
        clean, at = clean_texts(texts.texts.take(pa.array(places[used])), self.rules.redact), pa.array(used)
        redacted = pa.array((texts.marks[places[used]] | clean.marks) > 0)
        names = pa.repeat(file, len(used))
        columns = [
            query_keys(clean.queries),
            clean.queries,
            answers.take(at),
            splits.take(at),
            designs.take(at),
            chances.take(at),
            redacted,
            seq[used],
            names,
            rows[used],
        ]
        self.labels.append(pa.table(columns, schema=LABEL_CELL))

    def _label_refusals(self, table: pa.Table, coded: pa.DictionaryArray, rows: Ints, reasons: Bits) -> list[tuple[int, str, str]]:
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


def _not_text(table: pa.Table, name: str, file: str, fix: str = "name a column of text") -> InputError:
    return InputError(f"column {name} does not hold text", where=file, value=table[name].type, fix=fix)


def _is_utf8(value: object) -> bool:
    try:
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, bytes):
                item.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
