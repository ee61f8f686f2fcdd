"""Curate a teacher's answers into the golden set that students learn from. First version: valid, confident, one per
query, never a gold query, every stratum with its share.

    answers -> (one reason each) dropped
            -> golden: query with its side inputs, canonical answer, weight by traffic, where it came from

Golden and dropped rows are the answers that came in, counted. Two passes: the first reads a few narrow columns and
decides, the second streams the text, so that memory grows with rows by about 100 bytes each.
Knows nothing of how answers were made or of training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, field_validator

from headtail.config import StageConfig
from headtail.errors import InputError, LeakError, LedgerError
from headtail.generate import answers as read_answers
from headtail.keys import KEY_BYTES, normalise, query_key
from headtail.receipt import Receipt, load_receipt, load_ref
from headtail.rows import DROPPED, GOLDEN, Source, State, Stratum, conform, draw, key_words, with_side_inputs
from headtail.station import Station, run_once
from headtail.storage import open_storage
from headtail.task import Task, load_task

# Reasons a row is dropped; a row that is not answered has its state as the reason. The first that holds counts.
WITHHELD, UNCONFIDENT, DUPLICATE, OVER_QUOTA = "withheld", "unconfident", "duplicate", "over_quota"
_KEPT = ""
_BATCH = 16_384


class Config(StageConfig):
    """Which answers a student may learn from."""

    task: str = Field("query_segmentation", description="task folder or name of a shipped example")
    answers: str = Field("precompute", description="precompute receipt ref of the teacher's answers")
    gold: str = Field("plan:gold", description="table ref of the gold rows, which are never trained on")
    min_confidence: float = Field(0.5, ge=0, le=1, description="answers less sure than this are dropped; 0 keeps all")
    max_rows: int = Field(20_000, ge=1, description="rows of the golden set at most")
    strata_shares: dict[str, float] = Field(
        {"head": 0.2, "torso": 0.2, "tail": 0.2},
        description="share of the golden set kept free for each stratum when more rows qualify than max_rows; the rest is drawn evenly",
    )
    seed: int = Field(0, ge=0, description="seed of the draw")

    @field_validator("strata_shares")
    @classmethod
    def _shares(cls, value: dict[str, float]) -> dict[str, float]:
        unknown = sorted(set(value) - {str(s) for s in Stratum})
        if unknown:
            raise ValueError(f"unknown stratum {unknown[0]}; known: {', '.join(Stratum)}")
        if any(not 0 <= share <= 1 for share in value.values()) or sum(value.values()) > 1 + 1e-9:
            raise ValueError("shares are between 0 and 1 and add up to at most 1")
        return value


def run(config: Config) -> Receipt:
    """Choose the rows, check that nothing leaked or was lost, write golden and dropped."""
    task, store = load_task(config.task), open_storage(config.root)
    receipt = load_receipt(store, "precompute", config.answers)
    gold, name = load_ref(store, config.gold)
    made_under = receipt.task_fingerprint
    if made_under and made_under != task.fingerprint:
        raise InputError(
            f"these answers were made under another task, prompt or schema than {task.name} has now",
            where=receipt.path,
            value=f"{made_under[:16]}, now {task.fingerprint[:16]}",
            fix="run precompute again, or name the task the answers were made with",
        )

    def work(station: Station) -> None:
        gold_keys = leak_keys(gold.table(store, name, ["query"])["query"].to_pylist())
        judged = judge(read_answers(store, receipt, NARROW), gold_keys, config)
        _account(judged, receipt)
        _write(station, config, task, judged, lambda columns: read_answers(store, receipt, columns))

    replaces = {"task": task.name, "answers": receipt.path, "gold": f"{gold.path}:{name}"}
    return run_once("curate", config, work, inputs={"answers": receipt, "gold": gold}, task=task, replaces=replaces)


def leak_keys(queries: Iterable[str]) -> pa.Array:
    """The keys of gold queries, made anew from their text, so that a wrong key in a table hides no leak."""
    return pa.array(sorted({query_key(normalise(query)) for query in queries}), pa.binary(KEY_BYTES))


NARROW = ["query_key", "query", "answer_key", "state", "confidence", "count", "stratum", "withheld"]


class Judged(NamedTuple):
    """The verdict on every answer, in reading order."""

    reason: npt.NDArray[np.object_]  # empty for golden rows
    weight: npt.NDArray[np.float64]  # of golden rows; 0 elsewhere
    stratum: npt.NDArray[np.object_]
    confidence: npt.NDArray[np.float64]  # NaN when the engine gave none
    notes: list[str]


class _Columns(NamedTuple):
    key: npt.NDArray[np.uint64]  # n x 2, words of query_key
    answer_key: npt.NDArray[np.uint64]  # n x 2
    lot: npt.NDArray[np.float64]  # by query_key and seed alone, so that shards and order change nothing
    state: npt.NDArray[np.object_]
    confidence: npt.NDArray[np.float64]
    events: npt.NDArray[np.float64]
    stratum: npt.NDArray[np.object_]
    withheld: npt.NDArray[np.bool_]


def judge(tables: Iterable[pa.Table], gold_keys: pa.Array, config: Config) -> Judged:
    """Give every answer its reason to go, or a weight. The verdict does not depend on the order of rows or shards.

    LeakError when a gold query is there and not marked withheld: the plan that let it through is wrong as a whole.
    """
    rows = _read(tables, gold_keys, config.seed)
    reason = np.full(len(rows.state), _KEPT, dtype=object)

    def drop(which: npt.NDArray[np.bool_], why: str | npt.NDArray[np.object_]) -> None:
        which = which & (reason == _KEPT)
        reason[which] = why if isinstance(why, str) else why[which]

    drop(rows.withheld, WITHHELD)
    drop(rows.state != State.ANSWERED, rows.state)
    with np.errstate(invalid="ignore"):
        drop(rows.confidence < config.min_confidence, UNCONFIDENT)  # NaN is not below: unknown is not unsure
    drop(_duplicates(rows, reason == _KEPT), DUPLICATE)
    candidates = np.flatnonzero(reason == _KEPT)
    chosen, notes = pick(rows.stratum[candidates], rows.lot[candidates], config.max_rows, config.strata_shares)
    over = np.ones(len(reason), dtype=bool)
    over[candidates[chosen]] = False
    drop(over, OVER_QUOTA)
    unknown = int(np.isnan(rows.confidence[reason == _KEPT]).sum())
    if unknown and config.min_confidence > 0:
        notes.append(f"{unknown:,} golden rows have no confidence (the engine gave no log-probabilities): they were not filtered by it")
    weight = np.zeros(len(reason))
    weight[reason == _KEPT] = traffic_weights(rows.events[reason == _KEPT])
    return Judged(reason, weight, rows.stratum, rows.confidence, notes)


def traffic_weights(counts: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """log(1 + events) over its mean: frequent queries matter more, but a thousandfold count only about tenfold."""
    if not len(counts):
        return counts
    raw = np.log1p(np.maximum(counts, 1.0))
    return np.asarray(raw / raw.mean(), dtype=np.float64)


def pick(
    strata: npt.NDArray[np.object_], lots: npt.NDArray[np.float64], size: int, shares: Mapping[str, float]
) -> tuple[npt.NDArray[np.intp], list[str]]:
    """At most `size` rows: each stratum's share of `size` first, the rest evenly; within, the smallest lots.

    Also returns a note for each stratum that could not fill its share.
    """
    order = np.argsort(lots, kind="stable")
    size, notes = min(size, len(order)), []
    taken = np.zeros(len(order), dtype=bool)
    for name, share in shares.items():
        wanted = int(np.ceil(share * size - 1e-9))
        mine = order[strata[order] == name][:wanted]
        room = size - int(taken.sum())
        taken[mine[:room]] = True
        if len(mine) < wanted:
            notes.append(f"{name}: {len(mine):,} rows qualify, fewer than its share of {wanted:,}; all are taken")
    rest = order[~taken[order]][: size - int(taken.sum())]
    taken[rest] = True
    return np.flatnonzero(taken), notes


def _read(tables: Iterable[pa.Table], gold_keys: pa.Array, seed: int) -> _Columns:
    parts: dict[str, list[Any]] = {name: [] for name in _Columns._fields}
    for table in tables:
        _refuse_leaks(table, gold_keys)
        known = pc.is_in(table["query_key"], value_set=gold_keys)
        parts["key"].append(np.column_stack(key_words(table["query_key"])))
        parts["answer_key"].append(np.column_stack(key_words(table["answer_key"])))
        parts["lot"].append(draw(table["query_key"], "curate", seed))
        parts["confidence"].append(table["confidence"].cast(pa.float64()).fill_null(float("nan")).to_numpy())
        parts["events"].append(table["count"].cast(pa.float64()).fill_null(0.0).to_numpy())
        parts["withheld"].append(pc.or_(known, table["withheld"].fill_null(False)).to_numpy())
        for name in ("state", "stratum"):  # dictionary-encoded, so that a million rows hold five strings
            coded = table[name].fill_null("").combine_chunks().dictionary_encode()
            parts[name].append(np.asarray(coded.dictionary.to_pylist(), dtype=object)[coded.indices.to_numpy()])
    if not sum(map(len, parts["state"])):
        raise InputError("no answers to curate", where="answers", fix="run precompute on at least one row")
    return _Columns(**{name: np.concatenate(found) for name, found in parts.items()})


def _refuse_leaks(table: pa.Table, gold_keys: pa.Array) -> None:
    keys = pa.array([query_key(normalise(query)) for query in table["query"].to_pylist()], pa.binary(KEY_BYTES))
    gold = pc.or_(pc.is_in(keys, value_set=gold_keys), pc.is_in(table["query_key"].combine_chunks(), value_set=gold_keys))
    marked = table["withheld"].fill_null(False).combine_chunks()
    leaked = table.filter(pc.and_(gold, pc.invert(marked)))
    if leaked.num_rows:
        raise LeakError(
            f"{leaked.num_rows:,} answers belong to gold queries and are not marked withheld: a student would be tested on what it learnt",
            where="answers",
            value=", ".join(repr(query) for query in leaked["query"].to_pylist()[:3]),
            fix="run plan with this gold, then precompute again",
        )


def _duplicates(rows: _Columns, among: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Rows whose query has a better answer: the most confident stays, ties by answer_key."""
    index = np.flatnonzero(among)
    sure = -np.nan_to_num(rows.confidence[index], nan=-1.0)
    keys, answers = rows.key[index], rows.answer_key[index]
    order = np.lexsort((answers[:, 1], answers[:, 0], sure, keys[:, 1], keys[:, 0]))
    same = np.all(keys[order][1:] == keys[order][:-1], axis=1)
    found = np.zeros(len(among), dtype=bool)
    found[index[order[1:][same]]] = True
    return found


def _account(judged: Judged, receipt: Receipt) -> None:
    states = [receipt.rows[state] for state in State if state in receipt.rows]
    if len(states) == len(State) and sum(states) != len(judged.reason):
        raise LedgerError(
            "precompute's receipt and its answers do not add up", where=receipt.path, value=f"{sum(states)} rows, {len(judged.reason)} read"
        )


def _write(station: Station, config: Config, task: Task, judged: Judged, read: Callable[[list[str]], Iterable[pa.Table]]) -> None:
    kept = judged.reason == _KEPT
    reasons = Counter(judged.reason[~kept].tolist())
    if not kept.any():
        told = ", ".join(f"{count:,} {why}" for why, count in reasons.most_common())
        raise InputError(
            "no answer is fit to train on", where="answers", value=told, fix="lower min_confidence, or look at the teacher's receipt"
        )
    golden = station.table("golden", golden_rows(read, task, judged), with_side_inputs(GOLDEN, task.side_inputs))
    dropped = station.table("dropped", dropped_rows(read, judged), DROPPED)
    station.rows |= {"in": len(judged.reason), "golden": int(golden.rows or 0), "dropped": int(dropped.rows or 0)}
    station.rows |= {f"dropped.{why}": count for why, count in sorted(reasons.items())}
    station.rows |= {f"golden.{name or 'none'}": count for name, count in sorted(Counter(judged.stratum[kept].tolist()).items())}
    if station.rows["golden"] + station.rows["dropped"] != len(judged.reason) or station.rows["golden"] != int(kept.sum()):
        raise LedgerError("golden and dropped rows are not the answers that came in", where=station.path, value=dict(station.rows))
    weights, confidence = judged.weight[kept], judged.confidence[kept]
    station.metrics |= {
        "golden_share": float(kept.mean()),
        "weight_max": float(weights.max()),
        "effective_rows": float(weights.sum() ** 2 / (weights**2).sum()),
    }
    if not np.isnan(confidence).all():
        station.metrics["confidence_mean"] = float(np.nanmean(confidence))
    for text in judged.notes:
        station.note(text)
    station.note("answers are the teacher's, unreviewed: a student learns its mistakes too")


def golden_rows(read: Callable[[list[str]], Iterable[pa.Table]], task: Task, judged: Judged) -> Iterator[pa.Table]:
    """The kept answers as GOLDEN rows with their side inputs, parsed once more and written canonically."""
    schema = with_side_inputs(GOLDEN, task.side_inputs)
    columns = ["query_key", "query", "answer", "stratum", "answer_key", *task.side_inputs]
    for table, start in _numbered(read(columns)):
        kept = np.flatnonzero(judged.reason[start : start + table.num_rows] == _KEPT)
        if not len(kept):
            continue
        part = table.take(pa.array(kept))
        answers = [_canonical(task, text, query) for text, query in zip(part["answer"].to_pylist(), part["query"].to_pylist(), strict=True)]
        part = part.set_column(part.column_names.index("answer"), "answer", pa.array(answers, pa.string()))
        part = part.append_column("weight", pa.array(judged.weight[start + kept], pa.float32()))
        part = part.append_column("origin", pa.array([Source.TEACHER.value] * len(kept), pa.string()))
        yield conform(part, schema, "golden")


def dropped_rows(read: Callable[[list[str]], Iterable[pa.Table]], judged: Judged) -> Iterator[pa.Table]:
    """The other answers as DROPPED rows."""
    for table, start in _numbered(read(["query_key", "query", "confidence"])):
        reasons = judged.reason[start : start + table.num_rows]
        gone = np.flatnonzero(reasons != _KEPT)
        part = table.take(pa.array(gone)).append_column("reason", pa.array(reasons[gone].tolist(), pa.string()))
        yield conform(part, DROPPED, "dropped")


def _numbered(tables: Iterable[pa.Table]) -> Iterator[tuple[pa.Table, int]]:
    start = 0
    for table in tables:
        for offset in range(0, table.num_rows, _BATCH):
            yield table.slice(offset, _BATCH), start + offset
        start += table.num_rows


def _canonical(task: Task, text: str, query: str) -> str:
    answer, problem = task.parse(text)
    if problem:
        raise InputError(
            f"an answered row is not valid under task {task.name}: {problem}",
            where=f"query {query!r}",
            value=text,
            fix="run precompute again",
        )
    return task.dump(answer)
