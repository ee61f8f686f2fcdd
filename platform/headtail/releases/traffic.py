"""The traffic that figures speak for, and what each labelled query is of it.

In: the receipt that holds the human labels, and the labels. Out: the traffic by cell; the labels with the events of their queries, the
chance with which each was drawn, and clusters of near-duplicates. Holdout traffic stands for the traffic to come; of a log without any,
the log itself. Knows nothing of answers.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headtail.adapters.storage import Storage
from headtail.adapters.storage.frequency import log_counts
from headtail.adapters.storage.receipts import output_table
from headtail.cache.lineage import find_logs
from headtail.core.label_design import UNKNOWN, inclusion_chances
from headtail.core.near_duplicates import duplicate_clusters
from headtail.core.post_stratify import CELLS, TrafficCells, cell_of, traffic_cells
from headtail.core.receipt import Receipt
from headtail.core.rows import HUMAN_LABELS, TRAFFIC_CELL, conform


class LogTraffic(NamedTuple):
    """The traffic by cell, the events of each labelled query in it, and the events of the log before the cut."""

    cells: TrafficCells
    events: npt.NDArray[np.int64]
    log_events: int
    held_out: bool  # of days after the cut; else the log itself


def read_traffic(store: Storage, labels: Receipt, keys: pa.Array) -> LogTraffic | None:
    """The traffic of the log that the labels belong to. None when they go back to no log, to several, or to one without a query."""
    logs = [labels] if labels.stage == "ingest" else find_logs(store, [labels])
    if len(logs) != 1 or "holdout" not in logs[0].outputs or not logs[0].output("queries").rows:
        return None
    held_out = bool(logs[0].output("holdout").rows)
    table = output_table(store, logs[0], "holdout" if held_out else "queries", ["query_key", "count"])
    its_keys, events = table["query_key"].combine_chunks(), table["count"].to_numpy()
    counts, total = log_counts(store, logs[0], its_keys)
    mine = pc.index_in(keys, its_keys)
    own = np.zeros(len(keys), np.int64)
    own[np.asarray(mine.is_valid())] = events[np.asarray(mine.drop_null())]
    return LogTraffic(traffic_cells(counts, events), own, total, held_out)


def with_traffic(labels: pa.Table, traffic: LogTraffic | None) -> pa.Table:
    """HUMAN_LABELS rows with `events` and `cluster`, and with `inclusion` filled in: null where the design is unknown."""
    clusters = duplicate_clusters(labels["query"].to_pylist())
    events = pa.nulls(len(labels), pa.int64()) if traffic is None else pa.array(traffic.events)
    chance = pa.nulls(len(labels), pa.float64())
    if traffic is not None:
        counts, cell = labels["count"].to_numpy(), cell_of(labels["count"].to_numpy())
        labelled = np.bincount(cell, traffic.events > 0, CELLS)
        rate = labelled / np.maximum(traffic.cells.queries, 1.0)
        given = labels["inclusion"].fill_null(float("nan")).to_numpy()
        found = inclusion_chances(labels["design"].to_pylist(), given, counts.astype(np.float64), traffic.log_events, rate[cell])
        chance = pa.array(found, mask=np.isnan(found))
    columns = {"inclusion": chance, "events": events, "cluster": pa.array(clusters)}
    kept = {name: labels[name] for name in HUMAN_LABELS.names if name not in columns}
    return pa.table({**kept, **columns})


def label_rows(labels: pa.Table, where: str) -> pa.Table:
    """A table of human labels as HUMAN_LABELS rows; of one from before labels had a design it is unknown. InputError when columns lack."""
    for name, value in (("design", UNKNOWN), ("inclusion", None)):
        if name not in labels.column_names:
            labels = labels.append_column(HUMAN_LABELS.field(name), pa.array([value] * len(labels), HUMAN_LABELS.field(name).type))
    return conform(labels, HUMAN_LABELS, where)


def traffic_table(traffic: LogTraffic | None) -> pa.Table:
    """TRAFFIC_CELL rows; none when there is no traffic to speak for."""
    if traffic is None:
        return TRAFFIC_CELL.empty_table()
    return pa.table([pa.array(np.arange(CELLS)), *map(pa.array, traffic.cells)], schema=TRAFFIC_CELL)


def traffic_note(labels: pa.Table, traffic: LogTraffic | None) -> str:
    """Why there is no figure for traffic, or what it leaves out; empty when there is nothing to say."""
    unknown = labels["inclusion"].null_count
    if traffic is None:
        return "traffic: no figure, since the human labels do not go back to one log whose traffic is known"
    if unknown == len(labels):
        return "traffic: no figure, since nobody says how the human labels were drawn (docs/labels.md: design, or headtail labels draw)"
    left_out = f"traffic: {unknown:,} labelled rows of unknown design are left out" if unknown else ""
    return left_out if traffic.held_out else "; ".join(filter(None, (left_out, "traffic: of the log itself, for want of holdout traffic")))
