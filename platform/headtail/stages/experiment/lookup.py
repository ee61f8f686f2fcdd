"""What is known of a query: its stratum, and whether both arms' releases answer it alike.

In: distinct queries, a plan, two releases. Out: a stratum and an AnswerChange for each. A miss of both snapshots is answered live: with
one and the same student that is no change; with two students it may be one. Knows nothing of units or outcomes.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headtail.adapters.storage import Storage
from headtail.adapters.storage.frequency import query_strata
from headtail.adapters.storage.receipts import load_receipt
from headtail.cache.diff import diff_rounds
from headtail.cache.manifest import read_manifest
from headtail.core.keys import query_key
from headtail.core.receipt import Receipt
from headtail.core.rows import KEY
from headtail.releases.release import Release

Codes = npt.NDArray[np.int8]


class AnswerChange(IntEnum):
    """Whether the arms' answers to a request differ."""

    CHANGED = 0
    SAME = 1  # both arms give this answer: no effect
    NOT_COVERED = 2  # the treatment does nothing here yet: what it would do is not known


def strata_of(store: Storage, planned: Receipt, queries: Sequence[str], torso_min_count: int) -> Codes:
    """The place in STRATA of each query, by a plan and the log that it was made of."""
    keys = pa.array([query_key(query) for query in queries], KEY)
    log = planned if "queries" in planned.outputs else load_receipt(store, "ingest", planned.inputs["log"])
    return query_strata(store, planned, log, keys, torso_min_count)


def query_changes(store: Storage, control: Release, treatment: Release, queries: Sequence[str]) -> Codes:
    """The AnswerChange of each query between two releases."""
    alone = AnswerChange.NOT_COVERED if control.student == treatment.student else AnswerChange.CHANGED
    texts = pa.array(queries, pa.string())
    found = np.full(len(queries), alone, np.int8)
    for parts in diff_rounds(store, read_manifest(store, control.snapshot), read_manifest(store, treatment.snapshot)):
        for kind, table in parts.items():
            code = AnswerChange.SAME if kind == "same" else AnswerChange.CHANGED
            found[np.asarray(pc.is_in(texts, value_set=table["query"].combine_chunks()))] = code
    return found
