"""Answers that guardrails or people keep out of a snapshot, counted by reason, with examples.

In: CACHED tables. Out: a reason for each row, empty where it may be published; of each guardrail's reason the most frequent queries.
A person's own answer passes. Knows nothing of stores; what an answer must show is `core.guardrails`.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping

import pyarrow as pa
import pyarrow.compute as pc
from pydantic_core import from_json

from headtail.core.guardrails import GUARDRAIL_REASONS, AnswerGuard
from headtail.core.rows import Source
from headtail.stages.publish.result import WithheldAnswer

EXAMPLES = 4  # of each reason


class Withholding:
    """What keeps rows out of one publish. `dropped`: answers that people refused, by query_key (of None: any answer)."""

    def __init__(self, guard: AnswerGuard, dropped: Mapping[bytes, bytes | None], deleted: frozenset[bytes]) -> None:
        self._guard, self._dropped, self._deleted = guard, dropped, deleted
        self.counts: Counter[str] = Counter()
        self._top: dict[str, list[WithheldAnswer]] = {}

    def __call__(self, table: pa.Table) -> list[str]:
        """A reason for each row of CACHED, empty where it may be published: `deleted`, `dropped` or `guardrail.<code>`."""
        reasons = self._people(table)
        if not self._guard.active:
            return reasons
        queries, answers, sources = (table.column(name).to_pylist() for name in ("query", "answer", "source"))
        withheld = []
        for at, (query, answer, source) in enumerate(zip(queries, answers, sources, strict=True)):
            if source != Source.HUMAN_OVERRIDE and not reasons[at] and (code := self._guard.reason(query, from_json(answer))):
                reasons[at] = f"guardrail.{code}"
                withheld.append((at, code))
        for at, code in withheld:
            events = table.column("count")[at].as_py() or 0
            self._note(WithheldAnswer(reason=code, query=queries[at], answer=answers[at], source=sources[at], count=events))
        return reasons

    def _people(self, table: pa.Table) -> list[str]:
        """Rows that people dropped, or deleted."""
        reasons = [""] * table.num_rows
        if keys := [*self._dropped, *self._deleted]:
            column = table.column("query_key")
            for at in pc.indices_nonzero(pc.is_in(column, value_set=pa.array(keys, column.type))).to_pylist():
                key, about = column[at].as_py(), table.column("answer_key")[at].as_py()
                if key in self._deleted:
                    reasons[at] = "deleted"
                elif self._dropped[key] in (None, about):
                    reasons[at] = "dropped"
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
