"""Export of the queue to a file and import of the decisions that come back.

In: a queue, a log, a file. Out: a file; or entries of the log, and every row of the file counted as recorded, known before,
undecided or set aside with a reason. Importing a file a second time records nothing. Knows nothing of the page.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from collections import defaultdict
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from headtail.adapters.storage import Storage
from headtail.core.errors import HeadtailError, InputError, LedgerError
from headtail.core.keys import normalise, query_key
from headtail.core.redact import redact
from headtail.core.task import Task
from headtail.review import formats, labelstudio
from headtail.review.decision import Decision, canonical_answer, current_moment, read_moment, read_person, resolve_verdict
from headtail.review.formats import ReviewRow
from headtail.review.log import DecisionLog, decision_identity, identities
from headtail.review.queue import REF, Item, Queue, load_queue

Format = Literal["csv", "jsonl", "labelstudio"]
_BY_SUFFIX: dict[str, Format] = {".csv": "csv", ".jsonl": "jsonl", ".json": "labelstudio"}
_BATCH = 500  # decisions in one entry of the log: a kill loses at most this much work, and importing again makes it up
_SHOWN_CHARS = 200


@dataclass(frozen=True)
class ExportReport:
    """What was written. `config`: Label Studio's labelling config, beside the file."""

    file: Path
    rows: int
    left_out: int  # beyond the number asked for
    decided: int  # left out because someone has decided
    config: Path | None = None


@dataclass(frozen=True)
class ImportReport:
    """The result of each row of a file. `problems`: (row, reason) of those set aside; `aside`: their list in the store.

    `notes`: (row, what) of rows that are not set aside, but are not quite as they should be.
    """

    rows: int
    recorded: int
    known: int
    undecided: int
    problems: tuple[tuple[int, str], ...]
    aside: str = ""
    notes: tuple[tuple[int, str], ...] = ()


def kind_of(file: Path, given: str) -> Format:
    """The format: as named, or by the file's ending."""
    kind = given or _BY_SUFFIX.get(file.suffix.lower(), "")
    if kind not in _BY_SUFFIX.values():
        known = ", ".join(f"{kind} ({suffix})" for suffix, kind in _BY_SUFFIX.items())
        raise InputError("the format of a review file is not known", where=str(file), value=given or file.suffix, fix=f"one of: {known}")
    return cast(Format, kind)


def export_queue(
    file: Path, kind: Format, queue: Queue, log: DecisionLog, task: Task, rows: int = 0, decided: bool = False
) -> ExportReport:
    """Write the first `rows` (0: all) of the queue without a decision; with `decided` also those with one, and the decision."""
    config = file.with_suffix(".xml") if kind == "labelstudio" else None
    refuse_existing(file, config)
    holding = {kept.decision.query_key: kept.decision for kept in log.current_decisions()}
    done = {place for key in holding for place in queue.places.get(key, ())}
    open_places = [place for place in range(len(queue)) if decided or place not in done]
    chosen = open_places[:rows] if rows else open_places
    sent = ((item, holding.get(bytes.fromhex(item.query_key))) for item in queue.items(chosen))
    if config is not None:
        write_whole(config, iter([labelstudio.labelling_config(task)]))
        write_whole(file, labelstudio.write_tasks(sent, queue.ref, task))
    else:
        write_whole(file, (formats.write_csv if kind == "csv" else formats.write_jsonl)(sent, queue.ref))
    return ExportReport(file, len(chosen), len(open_places) - len(chosen), len(queue) - len(open_places), config)


def refuse_existing(*files: Path | None) -> None:
    """InputError when one of them is there: what people wrote into it would be lost."""
    for file in filter(None, files):
        if file.exists():
            raise InputError("this file exists; it may hold someone's decisions", where=str(file), fix="give another name, or move it away")


def write_whole(file: Path, pieces: Iterator[str]) -> None:
    """The whole file or nothing."""
    aside = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with aside.open("x", encoding="utf-8", newline="") as out:
            out.writelines(pieces)
            out.flush()
            os.fsync(out.fileno())
        os.replace(aside, file)
    except OSError as error:
        raise InputError(f"cannot write: {error.strerror or error}", where=str(file), fix="choose another place") from error
    finally:
        aside.unlink(missing_ok=True)


def file_bytes(file: Path) -> bytes:
    """What is in the file. InputError when it cannot be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read: {error.strerror or error}", where=str(file), fix="check the path") from error


def import_decisions(file: Path, kind: Format, store: Storage, log: DecisionLog, task: Task, queue: str, who: str) -> ImportReport:
    """Record the decisions of a file. `queue`: ref for rows that name none; `who`: decided, where a row does not say."""
    data = file_bytes(file)
    log.refresh()
    judge = DecisionReader(store, task, queue, who, texts_decide=kind == "labelstudio")
    mark = hashlib.sha256(data).hexdigest()[:16]
    known, source = identities(kept.decision for kept in log.all()), f"import:{kind}:{file.name}:{mark}"
    seen = any(kept.source.endswith(f":{mark}") for kept in log.all())  # this very file: then it does not matter who reads it now
    counts = {"rows": 0, "recorded": 0, "known": 0, "undecided": 0}
    aside: list[tuple[ReviewRow, str]] = []
    notes: list[tuple[int, str]] = []
    waiting: dict[str, list[Decision]] = defaultdict(list)  # by queue
    for row in _read(data, kind, str(file), task):
        counts["rows"] += 1
        if not row.problem and not row.verdict.strip() and not row.answer.strip():
            counts["undecided"] += 1
            continue
        decision, problem = judge(row)
        if decision is None:
            aside.append((row, problem))
            continue
        notes += [(row.number, note) for note in (row.note, problem) if note]
        if decision_identity(decision, who=bool(row.who.strip()) or not seen, at=bool(row.at.strip())) in known:
            counts["known"] += 1
            continue
        known |= identities([decision])
        counts["recorded"] += 1
        ref = judge.queue_ref(row)
        waiting[ref].append(decision)
        if len(waiting[ref]) == _BATCH:
            log.record(waiting.pop(ref), source, ref)
    for ref, left in waiting.items():
        log.record(left, source, ref)
    if counts["rows"] != counts["recorded"] + counts["known"] + counts["undecided"] + len(aside):
        raise LedgerError("the file's rows are not the sum of recorded, known, undecided and set aside", where=str(file), value=counts)
    problems = tuple((row.number, problem) for row, problem in aside)
    return ImportReport(**counts, problems=problems, aside=_set_aside(store, log.folder, file, mark, aside), notes=tuple(notes))


def _read(data: bytes, kind: Format, where: str, task: Task) -> Iterator[ReviewRow]:
    if kind == "labelstudio":
        return labelstudio.read_annotations(data, where, task)
    return (formats.read_csv if kind == "csv" else formats.read_jsonl)(data, where)


def _set_aside(store: Storage, folder: str, file: Path, mark: str, aside: list[tuple[ReviewRow, str]]) -> str:
    """The rows set aside as JSON Lines with the columns of rows.SET_ASIDE; the same file gives the same list."""
    if not aside:
        return ""
    path = f"{folder}/set_aside/{mark}.jsonl"
    lines = [
        json.dumps(
            {"file": file.name, "row": row.number, "reason": problem, "text": redact(row.text).text[:_SHOWN_CHARS]}, ensure_ascii=False
        )
        for row, problem in aside
    ]
    store.replace(path, ("\n".join(lines) + "\n").encode("utf-8", "replace"))
    return store.uri(path)


class DecisionReader:
    """Turns a row of a file into a decision, or says what is wrong with it."""

    def __init__(self, store: Storage, task: Task, queue: str, who: str, texts_decide: bool = False) -> None:
        """`texts_decide`: decisions point into the query's text, so that it must be the queue's."""
        self.texts_decide = texts_decide
        self.store, self.task, self.default, self.who, self.at = store, task, queue, who, current_moment()
        self._queues: dict[str, Queue | str] = {}

    def __call__(self, row: ReviewRow) -> tuple[Decision | None, str]:
        """(decision, what to note, if anything) or (None, what is wrong)."""
        if row.problem:
            return None, row.problem
        item, said = self._find_item(row)
        if item is None:
            return None, said
        who, why, problem = read_person(row.who or self.who, row.why)
        at, late = read_moment(row.at) if row.at.strip() else (self.at, "")
        answer, wrong = resolve_verdict(self.task, row.verdict.strip().lower(), row.answer.strip() or None, item.answer)
        for found in (wrong, problem, late):
            if found:
                return None, found
        key = bytes.fromhex(item.answer_key) if item.answer_key else None
        return Decision(
            bytes.fromhex(item.query_key), item.query, row.verdict.strip().lower(), answer, item.answer, key, who, at, why
        ), said

    def queue_ref(self, row: ReviewRow) -> str:
        """The queue that a row is about; empty where there is none."""
        queue = self._queue(row.queue.strip())
        return "" if isinstance(queue, str) else queue.ref

    def _find_item(self, row: ReviewRow) -> tuple[Item | None, str]:
        """(suspect that this row is about, what to note) or (None, what is wrong): its keys and the answer must be the queue's."""
        queue = self._queue(row.queue.strip())
        if isinstance(queue, str):
            return None, queue
        try:
            places = queue.places.get(bytes.fromhex(row.query_key.strip()), [])
        except ValueError:
            places = []
        if not places:
            return None, f"query_key: {row.query_key[:40]!r} is not in {queue.ref}"
        found = [item for item in queue.items(places) if (item.answer_key or "") == row.answer_key.strip().lower()]
        if not found:
            return None, f"answer_key: {row.answer_key[:40]!r} is not the one of this query in {queue.ref}"
        item = found[0]
        note = ""
        if row.query is not None and row.query != item.query:
            note, other = changed_text(row.query, item.query, queue.places)
            if self.texts_decide or other:
                return None, f"{note}; were the rows sorted by one column alone?"
        if not self._same(row.before, item.answer):
            return None, "before: not the answer that this row is about; it is not to be edited, a new one goes to `answer`"
        return item, note

    def _same(self, given: str, expected: str | None) -> bool:
        if not given.strip() or expected is None:
            return not given.strip() and expected is None
        return given == expected or canonical_answer(self.task, given)[0] == (canonical_answer(self.task, expected)[0] or expected)

    def _queue(self, ref: str) -> Queue | str:
        if ref not in self._queues:
            self._queues[ref] = self._open(ref)
        return self._queues[ref]

    def _open(self, ref: str) -> Queue | str:
        if not ref:
            return load_queue(self.store, self.default, self.task)
        if not REF.fullmatch(ref):
            return f"queue: {ref[:80]!r} is not stage/fingerprint:output"
        with contextlib.suppress(HeadtailError):
            return load_queue(self.store, ref, self.task)
        return f"queue: {ref} cannot be read in this store, or belongs to another task"


def changed_text(written: str, query: str, known: Container[bytes]) -> tuple[str, bool]:
    """(what to note of a text that is not that of its row's key, whether it is another query of `known` and not the same number)."""
    note = f"query: {written[:80]!r} is not the one of this query_key, which is {query[:80]!r}"
    meant = query_key(normalise(written))
    return note, meant in known and meant != query_key(query) and not _same_number(written, query)


def _same_number(one: str, other: str) -> bool:
    """Whether a spreadsheet may have made the one of the other: 007 is 7 to it."""
    try:
        return float(one) == float(other)
    except ValueError:
        return False
