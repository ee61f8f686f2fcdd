"""What people found out about earlier suspects: each answer's evidence when it was in the queue, and whether it was wrong.

In: the review log of a task, and the queues that its decisions were made on. Out: Reviewed, one entry per decision that can be used, with
the number of answers that it stands for. Accepted answers were right; corrected and dropped ones count as wrong. Decisions on answers
of another model or under another prompt say nothing of these scores and are left out. Knows nothing of what is fitted to them.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import defaultdict
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from headtail.adapters.storage import Storage
from headtail.adapters.storage.receipts import load_receipt, load_ref, output_table
from headtail.core.errors import HeadtailError
from headtail.core.task import Task
from headtail.review.decision import ACCEPT
from headtail.review.log import DecisionLog, LoggedDecision
from headtail.review.queue import REF
from headtail.stages.curate.columns import Bools, Floats
from headtail.stages.precompute.result import Result as PrecomputeResult

_NEEDED = ["query_key", "answer_key", "gain", "evidence", "drawn_from"]


class Reviewed(NamedTuple):
    """One entry per decision, by evidence. `stands_for`: answers of the queue's frame; 1 for one that was sure to be reviewed."""

    evidence: Floats
    wrong: Bools
    at_random: Bools
    stands_for: Floats
    left_out: int  # decisions on answers of a queue that is not one of these answers, or that is not known

    @property
    def digest(self) -> str:
        """Of all that a fit rests on; empty without a decision."""
        columns = (self.evidence, self.wrong, self.at_random, self.stands_for)
        whole = hashlib.blake2b(b"".join(np.ascontiguousarray(column).tobytes() for column in columns), digest_size=16)
        return whole.hexdigest() if len(self.evidence) else ""


NO_VERDICTS = Reviewed(np.zeros(0), np.zeros(0, bool), np.zeros(0, bool), np.zeros(0), 0)


class _Queue(NamedTuple):
    """The decisions on the rows of one queue, and how many rows of its frame are as good as reviewed."""

    evidence: Floats
    wrong: Bools
    drawn_from: Floats  # NaN: chosen for its gain
    sure: Bools  # its gain is at least the least gain of a chosen row that was reviewed
    sure_rows: int  # of the whole queue


def read_reviewed(store: Storage, task: Task, model: str) -> Reviewed:
    """The decisions on answers of the model with digest `model`, under the task as it is now."""
    by_queue: dict[str, list[LoggedDecision]] = defaultdict(list)
    for kept in DecisionLog(store, task.name).current_decisions():
        by_queue[kept.queue].append(kept)
    found, used = [], 0
    for ref, logged in sorted(by_queue.items()):
        table = _queue_table(store, ref, task, model)
        if table is not None:
            found.append(_match(table, logged))
            used += len(found[-1].evidence)
    return _join(found, sum(map(len, by_queue.values())) - used)


def _queue_table(store: Storage, ref: str, task: Task, model: str) -> pa.Table | None:
    """The rows of a queue of these answers with their evidence; None where it is another one's."""
    if not REF.fullmatch(ref) or not ref.startswith("curate/"):
        return None
    with contextlib.suppress(HeadtailError):  # a queue that was deleted, or that an older release made
        receipt, name = load_ref(store, ref)
        answers = load_receipt(store, "precompute", receipt.inputs["answers"], PrecomputeResult)
        if receipt.task_fingerprint == task.fingerprint and answers.result.model.digest == model:
            table = output_table(store, receipt, name)
            return table.select(_NEEDED) if set(_NEEDED) <= set(table.column_names) else None
    return None


def _match(table: pa.Table, logged: list[LoggedDecision]) -> _Queue:
    """Decisions with the evidence of the answer that was looked at."""
    said = {(kept.decision.query_key, kept.decision.answer_key): kept.decision.verdict != ACCEPT for kept in logged}
    rows = list(zip(table["query_key"].to_pylist(), table["answer_key"].to_pylist(), strict=True))
    gain, evidence, drawn_from = (table[name].cast("float64").fill_null(float("nan")).to_numpy() for name in _NEEDED[2:])
    mine = np.array([row in said for row in rows], bool) & ~np.isnan(evidence)
    wrong = np.array([said[rows[at]] for at in np.flatnonzero(mine).tolist()], bool)
    chosen = gain[mine & np.isnan(drawn_from)]
    sure = (gain >= chosen.min()) & ~np.isnan(evidence) if len(chosen) else np.zeros(len(rows), bool)
    return _Queue(evidence[mine], wrong, drawn_from[mine], sure[mine], int(sure.sum()))


def _join(queues: list[_Queue], left_out: int) -> Reviewed:
    """All queues as one. Rows drawn at random stand for the rows of lesser gain of their frame; the slices of all queues for one frame."""
    if not sum(len(queue.evidence) for queue in queues):
        return NO_VERDICTS._replace(left_out=left_out)
    lesser = [~np.isnan(queue.drawn_from) & ~queue.sure for queue in queues]
    drawn = sum(int(rows.sum()) for rows in lesser)
    stands_for = [
        np.where(rows, np.maximum(queue.drawn_from - queue.sure_rows, 1.0) / max(drawn, 1), 1.0)
        for queue, rows in zip(queues, lesser, strict=True)
    ]
    evidence, wrong, at_random = (
        np.concatenate(parts)
        for parts in ([q.evidence for q in queues], [q.wrong for q in queues], [~np.isnan(q.drawn_from) for q in queues])
    )
    order = np.lexsort((wrong, evidence))
    return Reviewed(evidence[order], wrong[order], at_random[order], np.concatenate(stands_for)[order], left_out)
