"""What a gate reads: who the candidate is, how many were tested on these labelled rows before, a judge's scores, the log's top query.

In: receipts and refs. Out: plain values and arrays. Refuses input that would make the evidence false: rows that are not the ones in
the receipt, a candidate other than the one that was scored, scores that are no scores. Decides nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from headtail.adapters import append_log
from headtail.adapters.storage import Storage
from headtail.adapters.storage.receipts import load_receipt, load_ref, output_table
from headtail.batch import read_answers
from headtail.core.config import Config
from headtail.core.errors import ConfigError, InputError
from headtail.core.evidence import JudgeEvidence
from headtail.core.paths import StoreId, StorePath
from headtail.core.receipt import Receipt
from headtail.core.rows import JUDGED, SCORED, Stratum, conform
from headtail.stages.distill.result import Result as DistillResult
from headtail.stages.evaluate.result import Result as EvaluateResult
from headtail.stages.gate.criteria import JudgeScores, SourceScores
from headtail.stages.gate.result import JudgeResult
from headtail.stages.precompute.result import Result as PrecomputeResult


def scored_rows(store: Storage, evaluation: Receipt) -> pa.Table:
    """The evaluation's scored rows, proven to be the bytes its receipt names."""
    return conform(output_table(store, evaluation, "rows"), SCORED, evaluation.output("rows").path)


def evaluation_labels(store: Storage, evaluation: Receipt[EvaluateResult]) -> tuple[Receipt, str]:
    """The receipt that holds the human labels, and the SHA-256 of the table of human labels."""
    receipt, name = load_ref(store, evaluation.result.labels)
    return receipt, receipt.output(name).sha256


def answers_of(store: Storage, evaluation: Receipt[EvaluateResult], source: str) -> Receipt[PrecomputeResult]:
    """The receipt of the answers that were scored as `source`."""
    named = evaluation.result.answers
    if source not in named:
        raise ConfigError("the evaluation has no answers of this source", where="source", value=source, fix=f"one of: {', '.join(named)}")
    return load_receipt(store, "precompute", named[source], PrecomputeResult)


def candidate_of(store: Storage, ref: str, answers: Receipt[PrecomputeResult]) -> tuple[str, str, list[str]]:
    """(reference, digest, remarks) of what is to be promoted. ConfigError when the scored answers are not its own."""
    model = answers.result.model
    if not ref:
        return model.name, model.digest, []
    remarks = []
    if ref.startswith("snapshots/"):
        from headtail.cache import read_manifest

        manifest = read_manifest(store, ref.removeprefix("snapshots/"))
        digest, own = manifest.content, answers.path in manifest.lineage
        rest = [path for path in manifest.lineage if path != answers.path]
        remarks = (
            [f"{ref} also holds answers of {', '.join(rest)}, of which this says nothing: gate their answer source too"] if rest else []
        )
    else:
        receipt = load_receipt(store, "distill", ref, DistillResult)
        ref, digest = receipt.path, receipt.result.digest
        own = digest == model.digest
    if not own:
        fix = "evaluate the candidate's own answers, or name the candidate that was evaluated"
        value = f"{ref}; the scored answers {answers.path} are by {model.name}"
        raise ConfigError("the evaluation did not score this candidate", where="candidate", value=value, fix=fix)
    return ref, digest, remarks


class CandidateTest(Config):
    """One test on labelled rows: whose answers were judged, and by what."""

    answers: StorePath = Field(description="folder of the answers")
    labels: StoreId = Field(description="SHA-256 of the table of human labels")
    score: str = Field(description="the score that was compared")
    judge: str = Field(description="the judge's answers; empty: none")
    evaluation: StorePath = Field(description="folder of the evaluation")


def candidate_number(store: Storage, folder: str, mine: Mapping[str, str]) -> int:
    """Which candidate this is, counting from 1, of all that were ever gated in this store on labelled rows shared with it.

    Every test on the same labels is another chance to pass by luck. A test is written down before its verdict is known; the
    same one (answers, human labels, score, judge) keeps its number. `mine` also names an evaluation, whose rows tell the labelled queries.
    """
    own, me = _keys(store, mine["evaluation"]), _entry_names(mine)
    earlier: list[tuple[str, ...]] = []
    for entry in append_log.read_entry_records(store, CandidateTest, folder):
        if (named := _entry_names(entry.model_dump())) == me:
            return len(earlier) + 1
        if named not in earlier and (entry.labels == mine["labels"] or own & _keys(store, entry.evaluation, own)):
            earlier.append(named)
    append_log.append_entry(store, folder, lambda _: (json.dumps(dict(mine), indent=2) + "\n").encode())
    return len(earlier) + 1


def _entry_names(entry: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(entry[name] for name in ("answers", "labels", "score", "judge"))


def _keys(store: Storage, evaluation: str, gone: set[bytes] | None = None) -> set[bytes]:
    """The labelled queries of an evaluation; of one that was deleted `gone`, since they may have been the same."""
    if not store.exists(f"{evaluation}/receipt.json"):
        return gone or set()
    return set(output_table(store, load_receipt(store, "evaluate", evaluation), "rows", ["query_key"])["query_key"].to_pylist())


def most_events(store: Storage, planned: Receipt) -> float:
    """Events of the most frequent query in the log; 0 when the human labels are not a plan's."""
    for name in ("head", "student_rows"):
        if name in planned.outputs and planned.output(name).rows:
            return float(pc.max(output_table(store, planned, name, ["count"])["count"]).as_py())
    return 0.0


class JudgeByStratum(NamedTuple):
    """A judge's scores by stratum, and what the evidence says of the judge."""

    by_stratum: dict[str, JudgeScores]
    description: JudgeEvidence
    sha256: str


def read_judge(
    store: Storage, ref: str, answers: Receipt, teacher: Receipt[PrecomputeResult] | None, source: SourceScores
) -> JudgeByStratum:
    """A judge's scores of the candidate's answers, split into rows that people labelled too and rows that they did not.

    Rows without a score count against the candidate: 0 where the judge stands alone, 1 where it is compared with a person's
    label. Rows about other answers are left out, and counted.
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
    labelled = set(source.keys)
    by_stratum = {}
    for stratum in map(str, Stratum):
        beside = [scores_by_key.get(key, float("nan")) for key, inside in zip(source.keys, source.inside(stratum), strict=True) if inside]
        more = [scores_by_key[k] for k in sorted(scores_by_key, key=_shuffle_key) if k not in labelled and known[k][1] == stratum]
        if more:
            by_stratum[stratum] = JudgeScores(np.nan_to_num(np.asarray(beside), nan=1.0), np.nan_to_num(np.asarray(more)))
    model = load_receipt(store, receipt.stage, receipt.path, JudgeResult).result.model
    own = None if model is None or teacher is None else model.digest == teacher.result.model.digest
    about = JudgeEvidence(
        ref=where,
        name=model.name if model else None,
        own_teacher=own,
        rows=len(scores_by_key),
        left_out=len(keys) - len(scores_by_key),
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
