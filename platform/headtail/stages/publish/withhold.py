"""Answers that guardrails keep out of a snapshot, counted by reason, with examples.

In: CACHED tables. Out: a reason code for each row, empty where it may be published; of each reason the most frequent queries.
Knows nothing of stores; what an answer must show is `core.guardrails`.
"""

from __future__ import annotations

import heapq
from collections import Counter

import pyarrow as pa
from pydantic_core import from_json

from headtail.core.guardrails import GUARDRAIL_REASONS, AnswerGuard
from headtail.stages.publish.result import WithheldAnswer

EXAMPLES = 4  # of each reason


class Withholding:
    """A guard over the rows of one publish."""

    def __init__(self, guard: AnswerGuard) -> None:
        self._guard = guard
        self.counts: Counter[str] = Counter()
        self._top: dict[str, list[WithheldAnswer]] = {}

    def __call__(self, table: pa.Table) -> list[str]:
        """A reason code for each row of CACHED, empty where it may be published."""
        queries, answers = (table.column(name).to_pylist() for name in ("query", "answer"))
        reasons = [self._guard.reason(query, from_json(answer)) for query, answer in zip(queries, answers, strict=True)]
        withheld = [at for at, reason in enumerate(reasons) if reason]
        for at, row in zip(withheld, table.select(["source", "count"]).take(pa.array(withheld, pa.int64())).to_pylist(), strict=True):
            self._note(
                WithheldAnswer(reason=reasons[at], query=queries[at], answer=answers[at], source=row["source"], count=row["count"] or 0)
            )
        return reasons

    def _note(self, one: WithheldAnswer) -> None:
        self.counts[one.reason] += 1
        top = [*self._top.get(one.reason, ()), one]
        self._top[one.reason] = heapq.nsmallest(EXAMPLES, top, key=lambda held: (-held.count, held.query, held.source))

    @property
    def examples(self) -> tuple[WithheldAnswer, ...]:
        """The most frequent of each reason, most frequent first."""
        return tuple(sorted((one for top in self._top.values() for one in top), key=lambda held: (-held.count, held.query, held.source)))

    def note(self) -> str:
        """One sentence for people; empty when nothing was withheld."""
        if not self.counts:
            return ""
        parts = [f"{rows:,} {reason} ({GUARDRAIL_REASONS[reason.split('.')[0]]})" for reason, rows in self.counts.most_common()]
        return f"{self.counts.total():,} answers are withheld by the task's guardrails: {'; '.join(parts)}"
