"""The tables that curation writes: training and dropped rows, streamed once more through the answers.

In: a reader of the answers and the verdicts, in the same order. Out: pieces of TRAINING_SET and DROPPED rows, clean of personal data.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from headtail.core.rows import DROPPED, TOP, TRAINING_SET, conform, with_side_inputs, with_top
from headtail.core.task import Task
from headtail.stages.curate.columns import clean_queries
from headtail.stages.curate.scan import Reader, parse_clean, place_pieces, side_column
from headtail.stages.curate.verdicts import KEPT, Verdicts

TEACHER, HUMAN = "teacher", "human"


def training_schema(task: Task, top: int) -> pa.Schema:
    """Of the training rows; `top`: how many of the likeliest tokens the answers hold."""
    return with_side_inputs(with_top(TRAINING_SET, top), task.side_inputs)


def training_rows(read: Reader, task: Task, judged: Verdicts, top: int) -> Iterator[pa.Table]:
    """The kept answers as TRAINING_SET rows with their side inputs, parsed once more and written canonically.

    The likeliest tokens stay with answers that are still the teacher's, word for word.
    """
    schema = training_schema(task, top)
    tops = TOP.names if top else []
    columns = ["query_key", "query", "answer", "stratum", "answer_key", *task.side_inputs, *tops]
    for table, start in place_pieces(read(columns)):
        kept = np.flatnonzero(judged.reason[start : start + table.num_rows] == KEPT)
        if not len(kept):
            continue
        part = table.take(pa.array(kept))
        texts, keys = clean_queries(part)
        people = judged.answer[start + kept].tolist()
        stored = part["answer"].to_pylist()
        answers = [task.dump(parse_clean(task, person or text, query)) for person, text, query in zip(people, stored, texts, strict=True)]
        same = pa.array([answer == text for answer, text in zip(answers, stored, strict=True)])
        written = [person is None or person == text for person, text in zip(people, stored, strict=True)]  # by the teacher
        made = {
            "query_key": keys,
            "query": pa.array(texts, pa.string()),
            "answer": pa.array(answers, pa.string()),
            "weight": pa.array(judged.weight[start + kept], pa.float32()),
            "stratum": part["stratum"],
            "origin": pa.array([TEACHER if person is None else HUMAN for person in people], pa.string()),
            "answer_key": pc.if_else(pa.array(written), part["answer_key"].combine_chunks(), None),
            **{name: side_column(part, name) for name in task.side_inputs},
            **{name: pc.if_else(same, part[name].combine_chunks(), None) for name in tops},
        }
        yield conform(pa.table(made), schema, "training_set")


def dropped_rows(read: Reader, judged: Verdicts) -> Iterator[pa.Table]:
    """The other answers as DROPPED rows."""
    for table, start in place_pieces(read(["query_key", "query", "confidence"])):
        reasons = judged.reason[start : start + table.num_rows]
        gone = np.flatnonzero(reasons != KEPT)
        part = table.take(pa.array(gone))
        texts, keys = clean_queries(part)
        made = {"query_key": keys, "query": pa.array(texts, pa.string()), "reason": pa.array(reasons[gone].tolist(), pa.string())}
        yield conform(pa.table({**made, "confidence": part["confidence"]}), DROPPED, "dropped")
