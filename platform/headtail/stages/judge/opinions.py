"""From a judge's verdicts to scores, and what to say of the judge. Pure: rows and verdicts in, a table, arrays and sentences out.

An answer that is not there is wrong without asking; equal answers are a tie. The judge's silence stays null: the gate counts it against
the candidate. Knows nothing of stores or engines.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from headtail.core.rows import JUDGED, SMALL
from headtail.core.score import f1
from headtail.core.task import Task
from headtail.stages.judge.calibration import JudgeFigure, JudgeRows
from headtail.stages.judge.questions import DRAWN
from headtail.stages.judge.result import Result
from headtail.stages.judge.rubric import Rubric

# A judged row: what the gate reads (JUDGED, answer_key), and what was said. Null scores: the judge gave no answer.
JUDGEMENT = pa.schema(
    [
        *JUDGED,  # pairwise: the preference for `answer` over `other`, the mean of both orders
        *(field for field in DRAWN if field.name != "query_key"),
        ("verdict", pa.string()),  # of the first round
        ("score_first", pa.float64()),
        ("verdict_second", pa.string()),  # of the second
        ("score_second", pa.float64()),  # pointwise: of `other`; pairwise: for `answer`, shown second
    ]
)


def judgements(rubric: Rubric, rows: Sequence[Mapping[str, Any]], first: Mapping[bytes, str], second: Mapping[bytes, str]) -> pa.Table:
    """JUDGEMENT rows. An answer that is not there scores 0; in a pair the one that is there is preferred, and equal ones are a tie."""
    lines = []
    for row in rows:
        said, also = first.get(row["query_key"]), second.get(row["query_key"])
        one = None if said is None else rubric.scores[said]
        two = None if also is None else rubric.scores[also]
        if rubric.kind == "pairwise":
            two = None if two is None else 1 - two
            if row["answer"] is None or row["other"] is None or row["answer"] == row["other"]:
                one = two = (1 + (row["answer"] is not None) - (row["other"] is not None)) / 2
            known = [value for value in (one, two) if value is not None]
            score = sum(known) / len(known) if known else None
        else:
            one, two = (0.0 if row["answer"] is None else one), (0.0 if row["other_key"] and row["other"] is None else two)
            score = one
        made = {"score": score, "verdict": said, "score_first": one, "verdict_second": also, "score_second": two}
        lines.append({**row, **made})
    return pa.Table.from_pylist(lines, schema=JUDGEMENT)


def row_score(task: Task, kind: str, query: str, label: str, answer: str | None) -> float:
    """What a person's label says of an answer: exact (1 when wholly right) or f1."""
    counts = task.score(json.loads(label), json.loads(answer) if answer is not None else None, query)
    return float(answer is not None and (counts.right if kind == "exact" else f1([counts])))


def judgement_arrays(task: Task, kind: str, score: str, labels: Mapping[bytes, str], table: pa.Table) -> JudgeRows:
    """JUDGEMENT rows as arrays, with what people's `labels` (answers by key) say of both answers. `kind`: of the rubric."""
    rows, nan = table.to_pylist(), float("nan")

    def people(row: Mapping[str, Any], key: str, answer: str) -> float:
        known = row["query_key"] in labels and row[key] is not None
        return row_score(task, score, row["query"], labels[row["query_key"]], row[answer]) if known else nan

    pairs = [row["answer"] is not None and row["other"] is not None and row["answer"] != row["other"] for row in rows]
    first, second = (table[name].fill_null(nan).to_numpy() for name in ("score_first", "score_second"))
    return JudgeRows(
        np.asarray([row["stratum"] for row in rows], dtype=object),
        first,
        second,
        np.asarray([people(row, "answer_key", "answer") for row in rows], float),
        np.asarray([people(row, "other_key", "other") for row in rows], float),
        np.asarray([len(row["answer"] or "") for row in rows], float),
        np.asarray([len(row["other"] or "") for row in rows], float),
        np.asarray(pairs if kind == "pairwise" else [row["answer"] is not None for row in rows], bool),
    )


def judge_remarks(result: Result, figures: Mapping[str, JudgeFigure], silent: int) -> Iterator[str]:
    """What a reader should know before the judge is believed."""
    if result.same_family:
        yield (
            f"the judge {result.model.name} is of the family of the answers' model or its teacher ({result.families['judge'][0]}): "
            "models are kind to their own family; judge with another one"
        )
    if not result.labelled:
        yield "no judged row has a person's label: nothing is known of how good this judge is"
    elif result.labelled < SMALL:
        yield f"only {result.labelled} judged rows have a person's label: the figures of the judge have wide intervals"
    for name, what in (("agreement", "agrees with people"), ("kappa", "agrees beyond chance (kappa)")):
        if name in figures:
            yield f"the judge {what}: {_words(figures[name])}"
    for name, what in (
        ("bias_position", "prefers the answer that is shown first"),
        ("bias_length", "prefers longer answers, more than people do"),
        ("bias_family", "is kinder to the answers than to those they are compared with, beyond people's view"),
    ):
        if (found := figures.get(name)) and found.low is not None and found.high is not None and not found.low <= 0 <= found.high:
            less = what.replace("prefers", "avoids").replace("kinder to", "harder on")
            yield f"the judge {what if found.value > 0 else less}: {_words(found)}"
    if "bias_family" not in figures:
        yield "bias by model family is not known: name answers of another family as `against`, with labels"
    if silent:
        yield f"{silent:,} rows have no verdict; the gate counts them against the candidate"


def _words(figure: JudgeFigure) -> str:
    interval = f" ({figure.low:.3f} to {figure.high:.3f})" if figure.low is not None else ""
    return f"{figure.value:.3f}{interval} on {figure.n:,} rows"
