"""What users get of scored answers: an answer that guardrails withhold is never served, so the task's fallback is scored in its place.

In: SCORED rows, a guard. Out: SCORED rows again, and how many answers were withheld by answer source. Pure. The same guard as in publish
and serve, so all three decide the same. Knows nothing of caches: of a withheld answer another source may answer, and be better.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pyarrow as pa

from headtail.core.guardrails import AnswerGuard
from headtail.core.keys import canonical
from headtail.core.rows import SCORED, Source, State


def serve_rows(rows: pa.Table, guard: AnswerGuard) -> tuple[pa.Table, Counter[str]]:
    """`rows` with the fallback in place of each answer that `guard` withholds, and the number of these by answer source."""
    lines, withheld = rows.to_pylist(), Counter[str]()
    for line in lines:
        if line["source"] == Source.FALLBACK or line["state"] != State.ANSWERED:
            continue
        if guard.reason(line["query"], json.loads(line["given"])):
            withheld[line["source"]] += 1
            line.update(_fallback(line, guard))
    return pa.Table.from_pylist(lines, schema=SCORED), withheld


def _fallback(line: dict[str, Any], guard: AnswerGuard) -> dict[str, Any]:
    """The fields of a row that another answer changes."""
    answer = guard.task.fallback(line["query"])
    counts = guard.task.score(json.loads(line["wanted"]), answer, line["query"])
    return {"given": canonical(answer, "fallback"), "confidence": None, **counts._asdict(), "exact": counts.right}
