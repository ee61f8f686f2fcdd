"""A log of tens of millions of events in a few minutes, for tests/bench/ingest.py.

In: a folder and numbers of events. Out: Parquet by day and CSV.gz. Events are drawn from the example data's law (Zipf over meanings,
misspellings, queries that never come again), and typed as people type: with capitals and blanks too many.
"""

from __future__ import annotations

import datetime
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from headtail.examples.example_data import VARIANTS, Config, _Draws, meaning, misspell

DAYS = 28
GROUP = 1 << 20  # rows per row group
TYPED = np.cumsum(
    [0.80, 0.12, 0.04, 0.03]
)  # shares: as it is, a capital first, all capitals, a blank at the end; the rest two blanks within
SEED = 7
LOG = pa.schema([("query", pa.string()), ("time", pa.timestamp("s", "UTC"))])


def write_log(folder: Path, events: int, csv_events: int) -> None:
    """A file per day below parquet/, the first `csv_events` of the events below csv/; last of all a file `complete`."""
    config = Config(events=events, days=DAYS, seed=SEED)
    draws = _Draws(config)
    ids = [draws.take(events // DAYS + (day < events % DAYS)) for day in range(DAYS)]
    known = np.unique(np.concatenate([np.unique(part) for part in ids]))
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        texts = pa.concat_arrays(pool.map(_texts, np.array_split(known, 64), repeat(config)))
    rng = np.random.default_rng(SEED + 1)
    for kind in ("parquet", "csv"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for day, part in enumerate(ids):
        start = datetime.datetime.combine(config.start + datetime.timedelta(days=day), datetime.time(), datetime.UTC)
        times = np.sort(rng.integers(0, 86_400, len(part))) + int(start.timestamp())
        with pq.ParquetWriter(folder / "parquet" / f"day-{day:02d}.parquet", LOG, compression="zstd") as writer:
            for begin in range(0, len(part), GROUP):
                rows = slice(begin, begin + GROUP)
                query = _typed(texts.take(pa.array(np.searchsorted(known, part[rows]))), rng)
                table = pa.table([query, pa.array(times[rows]).cast(LOG.field("time").type)], schema=LOG)
                writer.write_table(table)
                if csv_events > 0:
                    _write_csv(folder / "csv" / f"day-{day:02d}-{begin // GROUP:03d}.csv.gz", table.slice(0, csv_events))
                csv_events -= table.num_rows
    (folder / "complete").touch()


def _write_csv(path: Path, table: pa.Table) -> None:
    with pa.CompressedOutputStream(str(path), "gzip") as out:
        pacsv.write_csv(table, out)


def _texts(ids: npt.NDArray[np.int64], config: Config) -> pa.Array:
    pairs = (divmod(int(item), VARIANTS) for item in ids)
    return pa.array([misspell(meaning(config.seed, rank, config.universe).text, variant) for rank, variant in pairs], pa.string())


def _typed(query: Any, rng: np.random.Generator) -> Any:
    """One form per event, by chance."""
    form = np.searchsorted(TYPED, rng.random(len(query)))
    for number, change in enumerate((pc.utf8_capitalize, pc.utf8_upper, _blank_after, _blanks_within), 1):
        query = pc.if_else(pa.array(form == number), change(query), query)
    return query


def _blank_after(query: Any) -> Any:
    return pc.binary_join_element_wise(query, "", " ")


def _blanks_within(query: Any) -> Any:
    return pc.replace_substring(query, " ", "  ", max_replacements=1)
