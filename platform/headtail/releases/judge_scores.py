"""A judge's scores of a candidate's answers, by stratum, and what the evidence says of the judge.

In: a table of query_key and score, the candidate's answers, its scored rows. Out: scores of labelled rows and of others. Refuses scores
that are no scores and a query that is there twice. Knows nothing of criteria.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from headtail.adapters.storage import Storage
from headtail.adapters.storage.receipts import load_receipt, load_ref, output_table
from headtail.batch import read_answers
from headtail.core.errors import InputError
from headtail.core.evidence import JudgeEvidence
from headtail.core.receipt import Receipt
from headtail.core.rows import JUDGED, Stratum, conform
from headtail.releases.claim import AnswererResult
from headtail.releases.criteria import JudgeScores, SourceScores


class JudgeByStratum(NamedTuple):
    """A judge's scores by stratum, and what the evidence says of the judge."""

    by_stratum: dict[str, JudgeScores]
    description: JudgeEvidence
    sha256: str


def read_judge(
    store: Storage, ref: str, answers: Receipt, teacher: str, source: SourceScores, apart: Collection[bytes] = ()
) -> JudgeByStratum:
    """A judge's scores of the candidate's answers, split into rows that people labelled too and rows that they did not.
    `teacher`: digest of the candidate's teacher; empty: not known. `apart`: queries that are no even draw of those without a label (the
    candidate learnt from them, or they have a label that `source` does not): left out, and counted.

    Rows without a score count against the candidate: 0 where the judge stands alone, 1 where it is compared with a person's
    label. Rows about other answers are left out, and counted. InputError when none is left, or none of a query without a label: such a
    table says nothing that people's labels do not.
    """
    receipt, name = load_ref(store, ref)
    where = f"{receipt.path}:{name}"
    raw = output_table(store, receipt, name)
    table = conform(raw, JUDGED, where)
    scores = table["score"].fill_null(float("nan")).to_numpy()
    if np.any((scores < 0) | (scores > 1)):
        raise InputError("a judge's score must lie between 0 and 1", where=where, value=f"{np.nanmin(scores):g} to {np.nanmax(scores):g}")
    keys = table["query_key"].to_pylist()
    if len(set(keys)) < len(keys):
        raise InputError("a judge's table has a query twice; rows must be independent", where=where)
    known = _answers_to(store, answers, table["query_key"].combine_chunks())
    its = raw["answer_key"].to_pylist() if "answer_key" in raw.column_names else None
    fits = [key in known and (its is None or its[i] == known[key][0]) for i, key in enumerate(keys)]
    scores_by_key = {key: float(score) for key, score, fit in zip(keys, scores, fits, strict=True) if fit}
    if not scores_by_key:
        judged = receipt.inputs.get("answers", "")
        value = f"{len(keys):,} rows, of {judged or 'other answers'}; the candidate's are {answers.path}"
        fix = f"run headtail judge --set answers={answers.path}"
        raise InputError("the judge's table is not about the candidate's answers", where=where, value=value, fix=fix)
    labelled, about_others = set(source.keys), len(keys) - len(scores_by_key)
    left_apart = len((scores_by_key.keys() - labelled) & set(apart))
    scores_by_key = {key: score for key, score in scores_by_key.items() if key in labelled or key not in apart}
    by_stratum = {}
    for stratum in map(str, Stratum):
        beside = [scores_by_key.get(key, float("nan")) for key, inside in zip(source.keys, source.inside(stratum), strict=True) if inside]
        more = [scores_by_key[k] for k in sorted(scores_by_key, key=_shuffle_key) if k not in labelled and known[k][1] == stratum]
        if more:
            by_stratum[stratum] = JudgeScores(np.nan_to_num(np.asarray(beside), nan=1.0), np.nan_to_num(np.asarray(more)))
    if not by_stratum:
        what = (
            "the judge's table has no query without a person's label that the candidate did not learn from: it adds nothing to the labels"
        )
        value = f"{len(scores_by_key):,} judged rows with a label, {left_apart:,} left out"
        raise InputError(what, where=where, value=value, fix="run headtail judge with rows above 0")
    model = load_receipt(store, receipt.stage, receipt.path, AnswererResult).result.model
    own = None if model is None or not teacher else model.digest == teacher
    about = JudgeEvidence(
        ref=where,
        name=model.name if model else None,
        own_teacher=own,
        rows=len(scores_by_key),
        left_out=about_others,
        apart=left_apart,
        labelled_without_score=sum(key not in scores_by_key for key in source.keys),
        answers_checked=its is not None,
    )
    return JudgeByStratum(by_stratum, about, receipt.output(name).sha256)


def _shuffle_key(key: bytes) -> bytes:
    return hashlib.blake2b(key, digest_size=8, person=b"gate").digest()


def _answers_to(store: Storage, answers: Receipt, keys: pa.Array) -> dict[bytes, tuple[bytes, str]]:
    """(answer_key, stratum) of the candidate's answers to `keys`."""
    found: dict[bytes, tuple[bytes, str]] = {}
    for table in read_answers(store, answers, ["query_key", "answer_key", "stratum"]):
        for row in table.filter(pc.is_in(table["query_key"], value_set=keys)).to_pylist():
            found[row["query_key"]] = (row["answer_key"], row["stratum"])
    return found
