"""Draw queries for people to label, so that their labels have a design.

    ingest + plan -> a census of the most frequent queries, the rest by traffic within strata -> CSV, JSON Lines, or Label Studio tasks

In: a store. Out: a file with an empty answer per query, its design and its inclusion probability, for the page, a spreadsheet or Label
Studio. The frame is the traffic held out (the log itself, where nothing was). Knows nothing of models: nobody sees an answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from headtail.adapters.progress import say
from headtail.adapters.storage import Storage, open_storage
from headtail.adapters.storage.frequency import head_mask, log_counts
from headtail.adapters.storage.receipts import load_receipt, output_table
from headtail.core.config import StageConfig, execution
from headtail.core.errors import ConfigError, InputError
from headtail.core.label_design import draw_by_traffic, rows_for_gate, rows_for_width
from headtail.core.receipt import Receipt
from headtail.core.redact import PLACEHOLDER
from headtail.core.rows import STRATA, uniform_draw
from headtail.core.strata import stratum_places
from headtail.core.task import Task, load_task
from headtail.review import labelstudio
from headtail.review.formats import csv_text, guard
from headtail.review.transfer import Format, refuse_existing, write_whole

COLUMNS = ("query", "answer", "design", "inclusion", "stratum", "events")


class Config(StageConfig):
    """How many queries are drawn, and for what."""

    task: str = Field("query_segmentation", description="task folder or name of a shipped example")
    plan: str = Field("plan", description="plan receipt ref: its head, and the log that it was made from")
    census: int = Field(100, ge=0, description="queries with the most events that are all labelled")
    rows: int = Field(0, ge=0, description="further queries, drawn by traffic within strata; 0: as many as `width` or `threshold` needs")
    width: float = Field(0.04, gt=0, lt=1, description="width of the 95 % interval of the traffic's quality that is aimed at")
    threshold: float | None = Field(None, gt=0, lt=1, description="minimum of a gate's criterion on traffic; then rows are for its power")
    quality: float = Field(0.9, gt=0, lt=1, description="quality that is expected, for the number of rows")
    delta: float = Field(0.05, gt=0, lt=0.5, description="level of that criterion")
    power: float = Field(0.8, gt=0, lt=1, description="chance of passing that is aimed at")
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
    stratum = _strata(store, plan, log, frame, task)
    top = np.sort(events)[::-1][: config.census].sum() / events.sum()
    rows = config.rows or _rows(config, float(top))
    keys = uniform_draw(frame["query_key"], "labels", config.seed)
    drawn = draw_by_traffic(events, stratum, config.census, rows, config.seed, keys)
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
        }
        for row, i in zip(table, mixed.tolist(), strict=True)
    ]
    write_whole(file, _pieces(lines, kind))
    if config_file is not None:
        write_whole(config_file, iter([labelstudio.labelling_config(task)]))
    census = min(config.census, len(events))
    say(
        f"labels       {len(lines):,} queries written to {file}: the {census:,} most frequent ({top:.1%} of the traffic), others by traffic"
    )
    return len(lines)


def _frame(store: Storage, log: Receipt) -> pa.Table:
    """Queries that may be drawn, with their events: without those in which something was redacted."""
    name = "holdout" if log.output("holdout").rows else "queries"
    table = output_table(store, log, name, ["query_key", "query", "count"])
    frame = table.filter(pc.invert(pc.match_substring_regex(table["query"], PLACEHOLDER))).combine_chunks()
    if not frame.num_rows:
        raise InputError("there is no query to draw", where=log.path, fix="run ingest on a log with queries")
    return frame


def _strata(store: Storage, plan: Receipt, log: Receipt, frame: pa.Table, task: Task) -> npt.NDArray[np.int8]:
    """The stratum of each query, as a place in STRATA: by the log before the cut, also where the plan's head was chosen on all days."""
    keys = frame["query_key"].combine_chunks()
    counts, _ = log_counts(store, log, keys)
    return stratum_places(counts, head_mask(store, plan, keys) & (counts > 0), task.file.strata.torso_min_count)


def _rows(config: Config, certain: float) -> int:
    if config.threshold is None:
        return rows_for_width(config.width, config.quality, certain)
    rows = rows_for_gate(config.threshold, config.quality, certain, config.delta, config.power)
    if rows is None:
        what = "no number of labels shows that the traffic's quality is above this"
        raise ConfigError(what, where="threshold", value=f"{config.threshold:g}, expected quality {config.quality:g}", fix="set it lower")
    return rows


def _pieces(lines: list[dict[str, Any]], kind: Format) -> Iterator[str]:
    if kind == "labelstudio":
        tasks = [{"data": {"text": line["query"], "note": line["stratum"], **{name: line[name] for name in COLUMNS[2:]}}} for line in lines]
        yield json.dumps(tasks, ensure_ascii=False, indent=1) + "\n"
    elif kind == "jsonl":
        yield from (json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    else:
        yield csv_text(COLUMNS, ({**line, "query": guard(line["query"])} for line in lines))
