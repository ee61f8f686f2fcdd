"""The rows of a claim: a candidate's answers, and those it is compared with, scored against people's.

In: a table of human labels, receipts of answers. Out: SCORED rows: the sealed labels where any are sealed, else all; never a query that the
candidate was trained on. Refuses a comparison with answers that are not there or are the candidate's own. Knows nothing of criteria.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ConfigDict, Field

from headtail.adapters.storage import Storage
from headtail.adapters.storage.receipts import load_receipt, load_ref, output_table
from headtail.batch import read_answers
from headtail.batch.answer_scores import ABSENT, COLUMNS, find_answers, score_rows
from headtail.cache import read_manifest
from headtail.core.config import Config
from headtail.core.errors import ConfigError, InputError
from headtail.core.evidence import ReferenceEvidence
from headtail.core.post_stratify import TrafficCells
from headtail.core.receipt import Receipt, StageResult
from headtail.core.rows import KEY, Source
from headtail.core.task import Task
from headtail.releases.look import answers_digest
from headtail.releases.seal import split_labels
from headtail.releases.traffic import label_rows, read_traffic, with_traffic

_STUDENT = "distill/"  # how the names of models that were trained here begin


class NamedModel(Config):
    """Who answered."""

    model_config = ConfigDict(extra="ignore")

    name: str = Field(description="its name, such as distill/<fingerprint>")
    digest: str = Field(description="digest of its weights, or what pins it at an endpoint")


class AnswererResult(StageResult):
    """What a claim needs to know of a receipt of answers, or of a judge's scores."""

    source: str = Field("teacher", description="the answer source")
    model: NamedModel | None = Field(None, description="the model; null: not said")


class TrainedResult(StageResult):
    """What a claim needs to know of a student."""

    digest: str = Field("", description="digest of its weights")
    base: str = Field("", description="what training started from")
    trained_on: tuple[str, ...] = Field((), description="table refs of its training rows and of the rows that stopped its training")


class Claim(NamedTuple):
    """What a gate tests, and on what."""

    rows: pa.Table  # SCORED: the candidate, its references, the fallback
    cells: TrafficCells | None  # the traffic that the labels speak for; None: not known
    sealed: bool  # whether the rows are sealed
    open: pa.Table | None  # SCORED of the open rows, for guidance, where the rows are sealed
    excluded: int  # labelled rows that the candidate was trained on
    apart: frozenset[bytes]  # queries that a judge's rows must not have: people labelled them, or the candidate learnt from them
    references: tuple[ReferenceEvidence, ...]
    digests: dict[str, str]  # SHA-256 of what the claim rests on


def read_claim(store: Storage, task: Task, labels: str, source: str, answers: Mapping[str, str]) -> Claim:
    """Score the answers (folder of each receipt, by source) of the candidate `source` and of what it is compared with.

    InputError when no labelled row is left. ConfigError when another source was not asked on some row, or is the candidate itself.
    """
    where, name = load_ref(store, labels)
    every = label_rows(output_table(store, where, name), where.output(name).path)
    opened, sealed = split_labels(store, every)
    receipts = {one: load_receipt(store, "precompute", path, AnswererResult) for one, path in answers.items()}
    trained = training_keys(store, receipts[source])
    tested = sealed if sealed.num_rows else opened
    left = _without(tested, trained)
    if not left.num_rows:
        fix = "draw labels of queries that the candidate was not trained on"
        raise InputError("no labelled row is left to test the candidate on", where=labels, value=f"{tested.num_rows:,} rows", fix=fix)
    rows, cells = _scored(store, task, where, left, receipts)
    digests = {"rows": rows_digest(rows), "human_labels": where.output(name).sha256}
    guide = _scored(store, task, where, _without(opened, trained), receipts)[0] if sealed.num_rows and opened.num_rows else None
    excluded, apart = tested.num_rows - left.num_rows, frozenset(trained.union(every["query_key"].to_pylist()))
    return Claim(rows, cells, bool(sealed.num_rows), guide, excluded, apart, _references(rows, source, receipts), digests)


def training_keys(store: Storage, answers: Receipt[AnswererResult]) -> set[bytes]:
    """Keys of the queries that the model behind these answers, and what it was made from, learnt from. Empty for a model from elsewhere."""
    keys: set[bytes] = set()
    name = answers.result.model.name if answers.result.model else ""
    while name.startswith(_STUDENT) and store.exists(f"{name}/receipt.json"):
        student = load_receipt(store, "distill", name, TrainedResult)
        for ref in student.result.trained_on:
            receipt, output = load_ref(store, ref)
            keys |= set(output_table(store, receipt, output, ["query_key"])["query_key"].to_pylist())
        name = student.result.base
    return keys


def answers_are_own(store: Storage, candidate: str, digest: str, answers: str, model: str) -> bool:
    """Whether what is to be promoted, of this digest, gave the answers of a receipt, which a model of digest `model` made. InputError or
    StorageError when it is not in the store."""
    if candidate.startswith("snapshots/"):
        manifest = read_manifest(store, candidate.removeprefix("snapshots/"))
        return manifest.content == digest and answers in manifest.lineage
    if candidate.startswith(_STUDENT) and load_receipt(store, "distill", candidate, TrainedResult).result.digest != digest:
        return False
    return model == digest


def rows_digest(rows: pa.Table) -> str:
    """SHA-256 over who answered what to which labelled query, whatever the order of the rows."""
    return answers_digest(rows, ["source", "query_key", "wanted", "given"])


def source_part(rows: pa.Table, source: str) -> pa.Table:
    """The rows of one answer source."""
    return rows.filter(pc.equal(rows["source"], source))


def _without(labels: pa.Table, keys: set[bytes]) -> pa.Table:
    return labels.filter(pc.invert(pc.is_in(labels["query_key"], value_set=pa.array(sorted(keys), KEY)))) if keys else labels


def _scored(
    store: Storage, task: Task, origin: Receipt, labels: pa.Table, receipts: Mapping[str, Receipt]
) -> tuple[pa.Table, TrafficCells | None]:
    """SCORED rows, and the traffic that they speak for."""
    keys = labels["query_key"].combine_chunks()
    traffic = read_traffic(store, origin, keys)
    given = {one: find_answers(task, read_answers(store, receipt, COLUMNS), keys, receipt.path) for one, receipt in receipts.items()}
    return score_rows(task, with_traffic(labels, traffic), given), traffic.cells if traffic else None


def _references(rows: pa.Table, source: str, receipts: Mapping[str, Receipt[AnswererResult]]) -> tuple[ReferenceEvidence, ...]:
    return tuple(_reference(rows, source, one, receipts) for one in receipts if one != source)


def _reference(rows: pa.Table, source: str, other: str, receipts: Mapping[str, Receipt[AnswererResult]]) -> ReferenceEvidence:
    mine, its = receipts[source].result.model, receipts[other].result.model
    part, path = source_part(rows, other), receipts[other].path
    if its is None or (mine is not None and its.digest == mine.digest):
        what = f"{other} is the candidate itself: a comparison with it proves nothing"
        raise ConfigError(
            what, where=path, value=its.digest if its else None, fix=f"evaluate with the real {other}, or set gate.max_drop: null"
        )
    absent = pc.sum(pc.equal(part["state"], ABSENT)).as_py() or 0
    if absent:
        what = f"{other} was not asked on {absent:,} of the {part.num_rows:,} rows of this claim"
        raise ConfigError(what, where=path, fix="run precompute with all human labels among its inputs, then evaluate")
    return ReferenceEvidence(source=other, answers=path, digest=its.digest, rows=rows_digest(part))


def needed_answers(source: str, named: Mapping[str, str], max_drop: float | None) -> dict[str, str]:
    """Of the receipts that an evaluation names, those that a claim rests on. ConfigError when there are none of the teacher."""
    teacher = str(Source.TEACHER)
    if max_drop is not None and teacher not in named:
        fix = "evaluate with the teacher's answers, or set gate.max_drop: null in task.yaml"
        raise ConfigError("the evaluation has no answers of the teacher to compare with", where="evaluation", fix=fix)
    return {source: named[source], **({teacher: named[teacher]} if max_drop is not None else {})}
