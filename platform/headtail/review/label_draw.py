"""Draw queries for people to label, so that their labels have a design.

    ingest + plan -> a census of the most frequent queries, the rest by traffic within strata -> CSV, JSON Lines, or Label Studio tasks

In: a store. Out: a file with an empty answer per query, its design and its inclusion probability, for the page, a spreadsheet or Label
Studio; in the store which queries were drawn (`labelling/<task>/draws/`): a spreadsheet may change the file's texts. The
frame is the traffic held out (the log itself, where nothing was). Knows nothing of models: nobody sees an answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from headtail.adapters.progress import say
from headtail.adapters.storage import Storage, open_storage, read_table, write_table
from headtail.adapters.storage.frequency import head_mask, log_counts
from headtail.adapters.storage.receipts import load_receipt, output_table
from headtail.core.config import StageConfig, execution
from headtail.core.errors import ConfigError, InputError
from headtail.core.keys import KEY_BYTES, fingerprint
from headtail.core.label_rows import DrawFrame, ExpectedQuality, rows_for_gate, rows_for_width, width_of
from headtail.core.near_duplicates import duplicate_clusters
from headtail.core.policy import TaskPolicy
from headtail.core.receipt import Receipt
from headtail.core.redact import PLACEHOLDER
from headtail.core.rows import STRATA, TRAFFIC, uniform_draw
from headtail.core.strata import stratum_places
from headtail.core.task import Task, load_task
from headtail.review import labelstudio
from headtail.review.formats import csv_text, guard
from headtail.review.log import LABELLING
from headtail.review.transfer import Format, refuse_existing, write_whole

COLUMNS = ("query", "answer", "design", "inclusion", "stratum", "events", "query_key")
_DRAWN = pa.schema([("query_key", pa.binary(KEY_BYTES)), ("query", pa.string()), ("design", pa.string()), ("stratum", pa.string())])


class DrawEntry(NamedTuple):
    """A query of a draw: its text, its design, and its stratum."""

    query: str
    design: str
    stratum: str


class Config(StageConfig):
    """How many queries are drawn, and for what."""

    task: str = Field("query_segmentation", description="task folder or name of a shipped example")
    plan: str = Field("plan", description="plan receipt ref: its head, and the log that it was made from")
    census: int = Field(100, ge=0, description="queries with the most events that are all labelled")
    rows: int = Field(0, ge=0, description="further queries, drawn by traffic within strata; 0: as many as `width` or `threshold` needs")
    width: float = Field(0.04, gt=0, lt=1, description="width of the 95 % interval of the traffic's quality that is aimed at")
    threshold: float | None = Field(None, gt=0, lt=1, description="minimum of a gate's criterion on traffic; then rows are for its power")
    quality: float = Field(
        0.9, gt=0, lt=1, description="expected quality (share of right answers) of the queries beyond the census, for the number of rows"
    )
    census_quality: float | None = Field(
        None, gt=0, le=1, description="expected quality of the queries of the census, for the rows that a gate needs; null: as `quality`"
    )
    delta: float | None = Field(
        None,
        gt=0,
        lt=0.5,
        description="level of the criterion on traffic; null: of the first look by the task's policy, over the number of its criteria",
    )
    power: float = Field(0.8, gt=0, lt=1, description="chance of passing that is aimed at")
    gate_share: float = Field(
        1.0, gt=0, le=1, description="share of these labels that the gate reads: the one that is sealed for it; 1: all of them"
    )
    seed: int = Field(0, ge=0, description="seed of the draw")
    who: str = execution("", "name recorded with each answer on the page that has no other name; empty: the user who runs the command")
    port: int = execution(0, "TCP port of the page on 127.0.0.1; 0: any that is free", ge=0, le=65535)


def draw_labels(config: Config, file: Path, kind: Format) -> int:
    """Write the queries to label to `file`; the number of them."""
    config_file = file.with_suffix(".xml") if kind == "labelstudio" else None
    refuse_existing(file, config_file)
    task, store = load_task(config.task, config.allow_task_code), open_storage(config.root)
    plan = load_receipt(store, "plan", config.plan)
    log = load_receipt(store, "ingest", plan.inputs["log"])
    frame = _frame(store, log)
    events = frame["count"].to_numpy().astype(np.float64)
    counts, stratum = _strata(store, plan, log, frame, task)
    top = np.sort(events)[::-1][: config.census].sum() / events.sum()
    keys = uniform_draw(frame["query_key"], "labels", config.seed)

    def clusters(places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return duplicate_clusters(frame["query"].take(pa.array(places)).to_pylist())

    whole = DrawFrame(counts, events, stratum, keys, config.census, config.seed, clusters)
    drawn = whole.draw(config.rows or _rows(config, whole, task.file.gate))
    mixed = np.argsort(keys[drawn.places], kind="stable")  # people tire: frequent and rare ones in any order
    table = frame.take(pa.array(drawn.places[mixed])).to_pylist()
    lines = [
        {
            "query": row["query"],
            "answer": "",
            "design": drawn.designs[i],
            "inclusion": f"{drawn.inclusion[i]:.9g}",
            "stratum": STRATA[stratum[drawn.places[i]]],
            "events": str(row["count"]),
            "query_key": row["query_key"].hex(),
        }
        for row, i in zip(table, mixed.tolist(), strict=True)
    ]
    record_draw(store, task.name, lines)
    write_whole(file, _pieces(lines, kind))
    if config_file is not None:
        write_whole(config_file, iter([labelstudio.labelling_config(task)]))
    census = min(config.census, len(events))
    say(
        f"labels       {len(lines):,} queries written to {file}: the {census:,} most frequent ({top:.1%} of the traffic), others by traffic"
    )
    return len(lines)


def record_draw(store: Storage, task: str, lines: Sequence[Mapping[str, str]]) -> None:
    """Keep which queries were drawn. The same queries are kept once."""
    rows = sorted((bytes.fromhex(line["query_key"]), line["query"], line["design"], line["stratum"]) for line in lines)
    name = fingerprint([[key.hex(), *said] for key, *said in rows])
    table = pa.Table.from_pylist([dict(zip(_DRAWN.names, row, strict=True)) for row in rows], schema=_DRAWN)
    write_table(store, f"{_draws_of(task)}/{name}.parquet", table)


def read_draws(store: Storage, task: str) -> list[dict[bytes, DrawEntry]]:
    """The queries of each draw by key. InputError when nothing was drawn for the task."""
    paths = sorted(one.path for one in store.files(_draws_of(task)) if one.path.endswith(".parquet"))
    if not paths:
        fix = "give the --root and the task of `headtail labels draw`; a draw of an earlier version: draw once more with the same settings"
        raise InputError("no queries were drawn for this task in this store", where=store.uri(_draws_of(task)), fix=fix)
    tables = (read_table(store, path).to_pydict() for path in paths)
    return [dict(zip(table.pop("query_key"), map(DrawEntry, *table.values()), strict=True)) for table in tables]


def _draws_of(task: str) -> str:
    return f"{LABELLING}/{task}/draws"


def _frame(store: Storage, log: Receipt) -> pa.Table:
    """Queries that may be drawn, with their events: without those in which something was redacted."""
    name = "holdout" if log.output("holdout").rows else "queries"
    table = output_table(store, log, name, ["query_key", "query", "count"])
    frame = table.filter(pc.invert(pc.match_substring_regex(table["query"], PLACEHOLDER))).combine_chunks()
    if not frame.num_rows:
        raise InputError("there is no query to draw", where=log.path, fix="run ingest on a log with queries")
    return frame


def _strata(store: Storage, plan: Receipt, log: Receipt, frame: pa.Table, task: Task) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int8]]:
    """Events of each query in the log, and its stratum as a place in STRATA: by the log before the cut, also where the plan's head was
    chosen on all days."""
    keys = frame["query_key"].combine_chunks()
    counts, _ = log_counts(store, log, keys)
    return counts, stratum_places(counts, head_mask(store, plan, keys) & (counts > 0), task.file.strata.torso_min_count)


def _rows(config: Config, frame: DrawFrame, policy: TaskPolicy) -> int:
    """As many rows as the interval or the gate needs."""
    if config.threshold is None:
        rows = rows_for_width(frame, config.width, config.quality)
        reached = width_of(frame, rows, config.quality)
        said = f"the 95 % interval of the traffic is about {reached:.3f} wide at quality {config.quality:g}"
        say(f"labels       {rows:,} rows by traffic: {said}")
        return rows
    level = config.delta or traffic_level(policy)
    expected = ExpectedQuality(config.quality if config.census_quality is None else config.census_quality, config.quality)
    found = rows_for_gate(frame, config.threshold, expected, level, config.power, config.gate_share)
    if found is None:
        what = "labels of all queries would not show that the traffic's quality is above this"
        value = f"{config.threshold:g}, expected quality {expected.others:g}, of the census {expected.census:g}, level {level:.4g}"
        raise ConfigError(what, where="threshold", value=value, fix="set it lower, or draw a larger census")
    say(f"labels       {found:,} rows by traffic pass {config.threshold:g} on traffic with chance {config.power:g} at level {level:.4g}")
    return found


def traffic_level(policy: TaskPolicy) -> float:
    """The level of a criterion on traffic at the first look: by Holm's correction it is not stricter, whatever the other criteria do."""
    return policy.level(1) / (policy.criteria + (TRAFFIC not in policy.minimum))


def _pieces(lines: list[dict[str, Any]], kind: Format) -> Iterator[str]:
    if kind == "labelstudio":
        tasks = [{"data": {"text": line["query"], "note": line["stratum"], **{name: line[name] for name in COLUMNS[2:]}}} for line in lines]
        yield json.dumps(tasks, ensure_ascii=False, indent=1) + "\n"
    elif kind == "jsonl":
        yield from (json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    else:
        yield csv_text(COLUMNS, ({**line, "query": guard(line["query"])} for line in lines))
