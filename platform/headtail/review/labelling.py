"""People's answers to queries that `label_draw` drew: given on the page, or in the file; and the labels that come out.

    a drawn file (CSV, JSON Lines) -> the page -> labelling/<task>/, an entry per answer
    the drawn file and that log, or a Label Studio export -> a CSV for `ingest`, each label with its design, its chance, and who gave it

Rows without an answer are left out and counted, and the chances of the others are multiplied by the share that was answered. Knows
nothing of models.
"""

from __future__ import annotations

import json
from collections import ChainMap, Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from headtail.adapters.progress import say
from headtail.adapters.storage import open_storage
from headtail.core.errors import InputError
from headtail.core.keys import normalise, query_key
from headtail.core.label_design import UNKNOWN, resolve_design, thin_design
from headtail.core.query import clean_text
from headtail.core.rows import SUSPECT
from headtail.core.task import Task, load_task
from headtail.review import formats, labelstudio
from headtail.review.commands import reviewer_name
from headtail.review.decision import DROP, canonical_answer
from headtail.review.desk import Desk
from headtail.review.label_draw import COLUMNS, Config, DrawEntry, read_draws
from headtail.review.log import LABELLING, DecisionLog, LoggedDecision
from headtail.review.queue import Queue
from headtail.review.transfer import Format, changed_text, file_bytes, kind_of, write_whole

OUT = (*(name for name in COLUMNS if name != "query_key"), "who")
_READ = (*COLUMNS, "who")
_TOLD = 10  # wrong rows that are shown
Draw = dict[bytes, DrawEntry]  # by query_key


class DrawnQuery(NamedTuple):
    """A row of a drawn file: its number from 1, its cells by column, and what people said."""

    number: int
    cells: dict[str, str]
    problem: str = ""
    answer: str = ""  # canonical; empty: none
    who: str = ""
    dropped: bool = False  # somebody said that no answer can be given
    note: str = ""  # what is not quite as it was drawn
    known: bool = True  # the query is one that was drawn


@dataclass(frozen=True)
class LabelReport:
    """What became of each row. `shares`: of the queries drawn by a design in a stratum, how many have a label, where not all have."""

    rows: int
    labels: int
    unanswered: int
    dropped: int
    problems: tuple[tuple[int, str], ...]
    shares: dict[tuple[str, str], tuple[int, int]]
    notes: tuple[tuple[int, str], ...] = ()  # (row, what): queries that were changed in the file; the drawn ones are used


def label_desk(config: Config, file: Path) -> Desk:
    """The desk of a drawn file: its queries without an answer, and those on which the page has a decision, so that it can be changed."""
    task, store = load_task(config.task, config.allow_task_code), open_storage(config.root)
    log = DecisionLog(store, task.name, LABELLING)
    shown = [
        row
        for row in _drawn_rows(file, task, read_draws(store, task.name))
        if not (row.problem or row.answer) or log.current(_key(row)) is not None
    ]
    return Desk(store, task, _queue_of(shown, f"labels:{file.name}"), reviewer_name(config.who), labelling=True)


def serve_labels(config: Config, file: Path, started: Callable[[str], None] | None = None) -> None:
    """Show the desk of a drawn file on a page of this machine until Ctrl-C. `started` gets the page's address."""
    from headtail.review.server import ReviewServer

    desk = label_desk(config, file)
    with ReviewServer(desk, config.port) as server:
        decided = desk.progress()["decided"]
        say(f"labels       {len(desk.queue):,} queries, {decided:,} decided; queries with an answer in {file} are left out")
        say(f"{'':<12} {server.url}")
        say(f"{'':<12} Ctrl-C ends the page, answers are kept; then: headtail labels read {file} labels.csv")
        if started is not None:
            started(server.url)
        server.wait()


def read_labels(config: Config, file: Path, out: Path) -> LabelReport:
    """Write the labels of a drawn file and of the page, or of a Label Studio export, to a CSV for `ingest`."""
    task, kind = load_task(config.task, config.allow_task_code), kind_of(file, "")
    if out.exists() and out.samefile(file):
        raise InputError("labels cannot go into the file that they come from", where=str(out), fix="give another name")
    if out.suffix.lower() != ".csv":
        raise InputError("labels are written as CSV", where=str(out), value=out.suffix, fix="give a name that ends in .csv")
    store = open_storage(config.root)
    draws = read_draws(store, task.name)
    if kind == "labelstudio":
        rows = list(_annotated_rows(file, task, draws))
    else:
        log = DecisionLog(store, task.name, LABELLING)
        rows = [_merge(row, log.current(_key(row)), task) for row in _drawn_rows(file, task, draws)]
    if not rows:
        raise InputError(
            "there is no query in this file", where=str(file), fix="give a file of labels draw, or Label Studio's JSON export of it"
        )
    shares = _answered_shares(rows, draws)
    lines = [_label(row, shares) for row in rows if row.answer and not row.problem]
    problems = tuple((row.number, row.problem) for row in rows if row.problem)
    dropped = sum(row.dropped and not row.problem for row in rows)
    partly = {name: found for name, found in shares.items() if found[0] < found[1]}
    notes = tuple((row.number, row.note) for row in rows if row.note and not row.problem)
    report = LabelReport(len(rows), len(lines), len(rows) - len(lines) - len(problems) - dropped, dropped, problems, partly, notes)
    write_whole(out, iter([formats.csv_text(OUT, lines)]))  # no apostrophes before formulas: `ingest` takes a query as it stands
    _tell(report, out)
    return report


def _tell(report: LabelReport, out: Path) -> None:
    left_out = f"left out: {report.unanswered:,} without an answer, {report.dropped:,} skipped, {len(report.problems):,} wrong"
    say(f"labels       {report.labels:,} labels written to {out}; {left_out}")
    for (design, stratum), (answered, drawn) in sorted(report.shares.items()):
        where = f"{design or 'no design'}, {stratum or 'no stratum'}"
        say(f"{'':<12} {where}: {answered:,} of {drawn:,} queries have a label; their inclusion is multiplied by {answered / drawn:.3g}")
    if report.notes:
        say(f"{'':<12} the query of {len(report.notes):,} rows was changed in the file; query_key decides, and the drawn query is used")
    for said in (report.notes, report.problems):
        for number, what in said[:_TOLD]:
            say(f"{'':<12} row {number:,}: {what}")
        if len(said) > _TOLD:
            say(f"{'':<12} and {len(said) - _TOLD:,} more")


def _drawn_rows(file: Path, task: Task, draws: Sequence[Draw]) -> Iterator[DrawnQuery]:
    """The rows of a file that `labels draw` wrote, with the answers that people wrote into it."""
    kind, data = kind_of(file, ""), file_bytes(file)
    if kind == "labelstudio":
        raise InputError("this is a file for Label Studio", where=str(file), fix="label there, or draw a .csv or .jsonl")
    known = ChainMap(*draws)
    for number, cells, problem in _records(data, kind, str(file)):
        row = DrawnQuery(number, cells, problem, known=False) if problem else _recognise(number, cells, known)
        typed = row.cells.get("answer", "").strip()
        answer, wrong = canonical_answer(task, typed) if typed and not row.problem else (None, "")
        said = row.problem or (f"answer: {wrong}" if wrong else "")
        yield row._replace(problem=said, answer=answer or "", who=row.cells.get("who", "").strip())


def _recognise(number: int, cells: dict[str, str], known: Mapping[bytes, DrawEntry]) -> DrawnQuery:
    """The row under the query that was drawn. Its key decides; without one, or with an unknown one, its text."""
    text, key = cells.get("query", ""), cells.get("query_key", "").strip()
    try:
        entry = known.get(bytes.fromhex(key))
    except ValueError:
        entry = None
    if entry is None:
        wrong = _problem_of(cells)
        if not wrong.startswith("query: ") and query_key(normalise(text)) not in known:
            has = f"its query_key {key[:40]!r} is of no drawn query either" if key else "the row has no query_key"
            wrong = f"query: {text[:80]!r} was not drawn, and {has}"
        return DrawnQuery(number, cells, wrong, known=not wrong.startswith("query: "))
    note, other = ("", False) if normalise(text) == entry.query else changed_text(text, entry.query, known)
    if other:
        return DrawnQuery(number, cells, f"{note}; were the rows sorted by one column alone?", known=False)
    cells = {**cells, "query": entry.query}
    return DrawnQuery(number, cells, _problem_of(cells), note=note)


def _records(data: bytes, kind: Format, where: str) -> Iterator[tuple[int, dict[str, str], str]]:
    """Per row its number, its cells, and what is wrong with it."""
    if kind == "csv":
        for record in formats.read_records(data, where, _READ, ("query", "answer"), "headtail labels draw"):
            yield record.number, record.cells, record.problem
        return
    for number, line in formats.read_lines(data, where):
        plain, problem = formats.read_object(line)
        if not problem and not isinstance(plain.get("query"), str):
            problem = "query: no text of that name"
        yield number, {} if problem else {name: _cell(plain.get(name)) for name in _READ}, problem


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)


def _annotated_rows(file: Path, task: Task, draws: Sequence[Draw]) -> Iterator[DrawnQuery]:
    """The annotations of a Label Studio export of tasks that `labels draw` wrote."""
    drawn = ChainMap(*draws)
    for row in labelstudio.read_annotations(file_bytes(file), str(file), task):
        item = json.loads(row.text)
        data = item.get("data") if isinstance(item, dict) else None
        cells = {name: _cell(data.get(name)) for name in _READ} | {"query": row.query or ""} if isinstance(data, dict) else {}
        found = _recognise(row.number, cells, drawn) if cells else DrawnQuery(row.number, cells, known=False)
        answer = row.answer if row.verdict not in ("", DROP) else ""
        problem = row.problem or found.problem or found.note  # regions point into the text: a changed one cannot be read
        yield found._replace(problem=problem, answer=answer, who=row.who, dropped=row.verdict == DROP)


def _problem_of(cells: dict[str, str]) -> str:
    query = normalise(cells.get("query", ""))
    if not query:
        return "query: empty"
    if clean_text(query) != query:
        return "query: it holds personal data"  # the draw leaves such queries out
    return resolve_design(cells.get("design", ""), cells.get("inclusion", ""), UNKNOWN)[2]


def _key(row: DrawnQuery) -> bytes:
    return query_key(normalise(row.cells.get("query", "")))


def _queue_of(rows: Sequence[DrawnQuery], ref: str) -> Queue:
    """The rows in their order, as suspects without an answer."""
    table = [
        {
            **dict.fromkeys(SUSPECT.names),
            "query_key": _key(row),
            "query": normalise(row.cells["query"]),
            "stratum": row.cells.get("stratum", ""),
            "count": int(events) if (events := row.cells.get("events", "")).isdecimal() else 0,
        }
        for row in rows
    ]
    return Queue(pa.Table.from_pylist(table, schema=SUSPECT), ref)


def _merge(row: DrawnQuery, kept: LoggedDecision | None, task: Task) -> DrawnQuery:
    """The row with what the page says. An answer in the file and another decision on the page are a problem: nobody guesses which holds."""
    if row.problem or kept is None:
        return row
    decision = kept.decision
    if row.answer and row.answer != decision.answer:
        said = f"answered {decision.answer}" if decision.answer else "skipped the query"
        what = f"answer: {row.answer} in the file, but {decision.who} {said} on the page"
        return row._replace(problem=f"{what}; empty the cell, or decide on the page as the file does")
    answer, wrong = canonical_answer(task, decision.answer) if decision.answer else (None, "")
    problem = f"answer of {decision.who} on the page, no longer valid: {wrong}" if wrong else ""
    who = row.who if row.answer and row.who else decision.who
    return row._replace(problem=problem, answer=answer or "", who=who, dropped=decision.verdict == DROP)


def _class_of(row: DrawnQuery) -> tuple[str, str]:
    return row.cells.get("design", "").strip().lower(), row.cells.get("stratum", "").strip()


def _answered_shares(rows: Sequence[DrawnQuery], draws: Sequence[Draw]) -> dict[tuple[str, str], tuple[int, int]]:
    """Per design and stratum how many queries have a label, of how many that were drawn.

    A row whose query is not known stands for a query of the file's draw that the file lacks; without one, nobody drew it.
    """
    drawn: defaultdict[tuple[str, str], set[bytes]] = defaultdict(set)
    answered: defaultdict[tuple[str, str], set[bytes]] = defaultdict(set)
    for row in (row for row in rows if row.known):
        drawn[_class_of(row)].add(_key(row))
        if row.answer and not row.problem:
            answered[_class_of(row)].add(_key(row))
    size = Counter({name: len(found) for name, found in drawn.items()})
    mine = {key for found in drawn.values() for key in found}
    draw = max(draws, key=lambda one: (len(mine & one.keys()), -len(one)))  # the one that the file is of
    left = Counter((entry.design, entry.stratum) for key, entry in draw.items() if key not in mine)
    classes = {(entry.design, entry.stratum) for entry in draw.values()}
    for row in sorted((row for row in rows if not row.known), key=lambda row: not row.cells):
        most = max(left, key=lambda name: left[name], default=("", ""))
        name = _class_of(row) if _class_of(row) in classes | size.keys() else most
        taken = name if name in classes else most
        if left[taken] > 0:
            left[taken] -= 1
            size[name] += 1
    return {name: (len(answered[name]), count) for name, count in size.items()}


def _label(row: DrawnQuery, shares: dict[tuple[str, str], tuple[int, int]]) -> dict[str, str]:
    """The row of a label. Its chance of having one is that of being drawn times that of being answered, as others like it were."""
    line = {name: row.cells.get(name, "") for name in OUT} | {"answer": row.answer, "who": row.who}
    answered, drawn = shares[_class_of(row)]
    if answered < drawn:
        before, chance, _ = resolve_design(line["design"], line["inclusion"], UNKNOWN)
        design, inclusion = thin_design(before, chance, answered / drawn)
        line |= {"design": design, "inclusion": "" if inclusion is None else f"{inclusion:.9g}"}
    return line
