"""Ingest at scale beside DuckDB: the same files, the same counts, in one run.

    python -m tests.bench.ingest [--events 50000000] [--csv-events 10000000] [--runs 2] [--data build/bench/ingest-log]

In: numbers of events. Out: seconds and peak memory of each program, and in how many queries their counts differ: build/bench/ingest.json.
Each measurement is a process of its own, one after the other; the least of `runs` counts. DuckDB writes what `ingest` writes as `queries`
and `holdout`, by three statements; the fastest is the one to beat (docs/benchmarks/2026-11-30-ingest.md says what it leaves out). Without
DuckDB (pip install duckdb) headtail is measured alone. The log (tests/bench/ingest_log.py) is kept for the next run.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .ingest_log import write_log
from .machine import machine, write_figures

OUT, DATA = Path("build/bench/ingest.json"), Path("build/bench/ingest-log")
EVENTS, CSV_EVENTS, RUNS = 50_000_000, 10_000_000, 2

# As near to the normal form as DuckDB's own functions come: it has NFC, no NFKC, and one call per sign.
_FORM = r"trim(regexp_replace(lower(nfc_normalize(replace(query, '’', ''''))), '\s+', ' ', 'g'))"
_SOURCE = {
    "parquet": "read_parquet('{}')",
    "csv": "read_csv('{}', header = true, columns = {{'query': 'VARCHAR', 'time': 'TIMESTAMPTZ'}})",
}
_RAW = """WITH raw AS (SELECT query, count(*) FILTER (time < {cut}) AS n, count(*) FILTER (time >= {cut}) AS h,
    min(time)::DATE AS a, max(time)::DATE AS b FROM {source} GROUP BY query), texts AS (SELECT {form} AS q, n, h, a, b FROM raw)"""
_RAW_BY_DAY = """WITH raw AS (SELECT query, time::DATE AS d, count(*) AS c FROM {source} GROUP BY ALL),
    texts AS (SELECT {form} AS q, CASE WHEN d < {cut} THEN c ELSE 0 END AS n, CASE WHEN d < {cut} THEN 0 ELSE c END AS h, d AS a, d AS b
    FROM raw)"""
_EVERY_ROW = """WITH texts AS (SELECT {form} AS q, (time < {cut})::INT AS n, (time >= {cut})::INT AS h, time::DATE AS a, time::DATE AS b
    FROM {source})"""
_SUMS = """ SELECT q AS query, sum(n)::BIGINT AS count, sum(h)::BIGINT AS held, min(a) AS first_day, max(b) AS last_day
    FROM texts GROUP BY q ORDER BY count DESC, q"""
STATEMENTS = {"raw": _RAW + _SUMS, "raw_by_day": _RAW_BY_DAY + _SUMS, "every_row": _EVERY_ROW + _SUMS}


def run_headtail(log: str, out: Path) -> dict[str, Any]:
    """`ingest` as a user runs it: digests of the files, keys, redaction, the history, holdout traffic and a receipt among its work."""
    from headtail.core.config import TrackingConfig
    from headtail.stages import ingest

    columns, tracking = ingest.LogColumns(time="time"), TrackingConfig(enabled=False)
    config = ingest.Config(root=str(out), log=log, task="query_intent", columns=columns, tracking=tracking, workers=1)
    began = time.perf_counter()
    receipt = ingest.run(config)
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "table": str(out / receipt.outputs["queries"].path),
        "holdout_from": receipt.result.holdout_from,
        "rules": [rule.model_dump() for rule in receipt.result.rules],
        "rows": receipt.rows,
    }


def run_duckdb(log: str, out: Path, form: str, holdout_from: str) -> dict[str, Any]:
    """One statement that writes the counted queries as Parquet, the most frequent first; a thread per core."""
    duckdb: Any = import_module("duckdb")
    table = out / "queries.parquet"
    source = _SOURCE["csv" if log.endswith(".csv.gz") else "parquet"].format(log)
    sql = STATEMENTS[form].format(source=source, form=_FORM, cut=f"TIMESTAMPTZ '{holdout_from} 00:00:00+00'")
    began = time.perf_counter()
    with duckdb.connect(config={"threads": len(os.sched_getaffinity(0))}) as connection:
        connection.execute("SET TimeZone = 'UTC'")
        connection.execute(f"COPY ({sql}) TO '{table}' (FORMAT parquet, COMPRESSION zstd)")
    return {"seconds": time.perf_counter() - began, "table": str(table)}


def queries_that_differ(own: str, other: str) -> int:
    """Queries that one of the tables lacks, or counts otherwise."""
    duckdb: Any = import_module("duckdb")
    sql = f"""SELECT count(*) FROM '{own}' AS a FULL JOIN (SELECT * FROM '{other}' WHERE count > 0) AS b USING (query)
        WHERE a.count IS DISTINCT FROM b.count OR a.first_day IS DISTINCT FROM b.first_day"""
    with duckdb.connect() as connection:
        (found,) = connection.execute(sql).fetchone() or (0,)
    return int(found)


def measure(log: str, folder: Path, runs: int) -> dict[str, Any]:
    """Every program on one log: the best of `runs`, in turn."""
    forms = STATEMENTS if find_spec("duckdb") else {}
    best: dict[str, dict[str, Any]] = {}
    for turn in range(runs):
        for name in ("headtail", *forms):
            cut = best["headtail"]["holdout_from"] if name != "headtail" else ""
            found = _one(name, log, folder / f"{turn}-{name}", cut)
            print(f"  {name:<12} {found['seconds']:6.1f} s  {found['peak_gib']:.2f} GiB", flush=True)
            if name not in best or found["seconds"] < best[name]["seconds"]:
                best[name] = found
    for name in forms:
        best[name]["queries_that_differ"] = queries_that_differ(best["headtail"]["table"], best[name]["table"])
    if forms:
        fastest = min(forms, key=lambda name: best[name]["seconds"])
        best["beside"] = {"fastest": fastest, **{name: best["headtail"]["seconds"] / best[name]["seconds"] for name in forms}}
    return best


def _one(name: str, log: str, out: Path, holdout_from: str) -> dict[str, Any]:
    out.mkdir(parents=True)
    command = [sys.executable, "-m", "tests.bench.ingest", "--one", name, "--log", log, "--to", str(out), "--cut", holdout_from]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def log_of(events: int, csv_events: int, data: Path) -> Path:
    """The folder with the log; written when it is not there."""
    folder = data / f"{events}-{csv_events}"
    if not (folder / "complete").exists():
        print(f"writing {events:,} events to {folder}", flush=True)
        write_log(folder, events, csv_events)
    return folder


def figures(events: int, csv_events: int, runs: int, data: Path) -> dict[str, Any]:
    """Both kinds of files, and headtail alone on a quarter of the log."""
    folder = log_of(events, csv_events, data)
    found: dict[str, Any] = {"events": events, "csv_events": csv_events}
    with tempfile.TemporaryDirectory(prefix="headtail-bench-") as scratch:
        print(f"{events:,} events, Parquet")
        found["parquet"] = measure(f"{folder}/parquet/*.parquet", Path(scratch, "parquet"), runs)
        found["quarter"] = quarter = _one("headtail", f"{folder}/parquet/day-0[0-6].parquet", Path(scratch, "quarter"), "")
        print(f"  a quarter of it: {quarter['seconds']:.1f} s  {quarter['peak_gib']:.2f} GiB")
        if csv_events:
            print(f"{csv_events:,} events, CSV.gz")
            found["csv"] = measure(f"{folder}/csv/*.csv.gz", Path(scratch, "csv"), 1)
    return found


def ingest_numbers() -> dict[str, float | None]:
    """For tests.bench.numbers. `ingest_vs_duckdb`: seconds of headtail by those of DuckDB's fastest form; below 1, headtail is faster."""
    folder = log_of(EVENTS, CSV_EVENTS, DATA)
    with tempfile.TemporaryDirectory(prefix="headtail-bench-") as scratch:
        found = measure(f"{folder}/parquet/*.parquet", Path(scratch), RUNS)
    beside = found.get("beside")
    return {"ingest_vs_duckdb": beside[beside["fastest"]] if beside else None, "ingest_peak_gib": found["headtail"]["peak_gib"]}


def main() -> None:
    """Measure and write, or be one of the measured processes (--one)."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.ingest", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--events", type=int, default=EVENTS)
    parser.add_argument("--csv-events", type=int, default=CSV_EVENTS)
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--out", type=Path, default=OUT)
    for name in ("--one", "--log", "--to", "--cut"):
        parser.add_argument(name, default="", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if not chosen.one:
        write_figures(chosen.out, {**machine(), **figures(chosen.events, chosen.csv_events, chosen.runs, chosen.data)})
        return
    to = Path(chosen.to)
    found = run_headtail(chosen.log, to) if chosen.one == "headtail" else run_duckdb(chosen.log, to, chosen.one, chosen.cut)
    print(json.dumps({**found, "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}))


if __name__ == "__main__":
    main()
