"""What headtail itself costs as jobs grow: the null engine through Ray at several sizes, memory and time against rows.

    python -m tests.bench.scale --rows 1000000 5000000 20000000

In: sizes. Out: a table and build/bench/scale.json: per size rows/s, processor time of all processes together (Ray's own among
them), the driver's and the largest worker's peak memory; over all sizes the slope of wall and of processor time, and how
straight each line is. Each size runs in a process and a cluster of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa

from headtail.adapters.progress import progress_bar
from headtail.adapters.storage import open_storage, write_json, write_table
from headtail.core.keys import query_key
from headtail.core.receipt import Receipt
from headtail.core.rows import PLANNED, with_side_inputs

from .machine import machine

OUT = Path("build/bench/scale.json")
SIDE = ("businesses",)
_BATCH = 100_000
_POLL_S = 0.5


def plan_of(rows: int) -> Iterator[pa.Table]:
    """`rows` planned queries, streamed."""
    schema = with_side_inputs(PLANNED, SIDE)
    for start in range(0, rows, _BATCH):
        numbers = range(start, min(start + _BATCH, rows))
        texts = [f"best pizza near me {i}" for i in numbers]
        count = len(texts)
        columns: dict[str, Any] = {
            "query_key": [query_key(text) for text in texts],
            "query": texts,
            "count": np.arange(rows - start, rows - start - count, -1),
            "rank": np.arange(start + 1, start + count + 1),
            "stratum": pa.repeat("head", count),
            "eval_only": pa.repeat(False, count),
        }
        yield pa.table([pa.array(columns[f.name], f.type) if f.name in columns else pa.nulls(count, f.type) for f in schema], schema=schema)


def one(rows: int, workers: int) -> dict[str, float]:
    """One job in this process, which is its driver."""
    from headtail.core.config import TrackingConfig, build_config
    from headtail.stages import precompute

    folder = Path(tempfile.mkdtemp(prefix="headtail-scale-"))
    try:
        store = open_storage(str(folder))
        with progress_bar(f"input of {rows:,}", rows) as shown:
            ref = write_table(store, "plan/x/head.parquet", _shown(plan_of(rows), shown), with_side_inputs(PLANNED, SIDE))
        receipt = Receipt(stage="plan", fingerprint="x", path="plan/x", started="", seconds=0, outputs={"head": ref})
        write_json(store, "plan/x/receipt.json", receipt.model_dump(mode="json"))
        made_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        model = {"engine": "null", "model": "null", "cpus": 1}
        config = build_config(
            precompute.Config,
            {
                "root": str(folder),
                "tracking": TrackingConfig(enabled=False),
                "inputs": ["plan/x:head"],
                "model": model,
                "workers": workers,
            },
            "bench",
        )
        watch = _Watch()
        watch.start()
        started = time.monotonic()
        made = precompute.run(config)
        seconds = time.monotonic() - started
        watch.stop()
        assert made.rows["answered"] == rows, made.rows
        return {
            "rows": rows,
            "seconds": round(seconds, 2),
            "rows_per_s": round(rows / seconds, 1),
            "worker_us_per_row": round(made.metrics["generate_s"] * workers / rows * 1e6, 2),
            "driver_peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
            "driver_peak_before_mib": round(made_rss, 1),
            "worker_peak_mib": round(watch.peak_mib, 1),
            "cpu_s": round(watch.cpu_s, 2),
            "shards": len([name for name in made.outputs if name.startswith("answers/")]),
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _shown(tables: Iterator[pa.Table], shown: Any) -> Iterator[pa.Table]:
    for table in tables:
        yield table
        shown.advance(table.num_rows)


class _Watch(threading.Thread):
    """The processes of this job's own cluster: the largest resident size of a worker, and processor time of all of them."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_mib = 0.0
        self._cpu: dict[int, float] = {}
        self._over = threading.Event()
        self._me = psutil.Process()
        self._begun = sum(self._me.cpu_times()[:2])

    def run(self) -> None:
        while not self._over.wait(_POLL_S):
            self._look()

    def stop(self) -> None:
        self._over.set()
        self.join()
        self._look()

    @property
    def cpu_s(self) -> float:
        """Seconds of processor time since the start; a process that ended counts up to its last look."""
        return float(sum(self._cpu.values()) - self._begun)

    def _look(self) -> None:
        for one in [self._me, *self._me.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess, OSError):
                self._cpu[one.pid] = sum(one.cpu_times()[:2])
                if "ray::MapWorker" in " ".join(one.cmdline()):
                    text = Path(f"/proc/{one.pid}/status").read_text()
                    size = next((int(line.split()[1]) / 1024 for line in text.splitlines() if line.startswith("VmHWM")), 0.0)
                    self.peak_mib = max(self.peak_mib, size)


def fit(rows: list[float], seconds: list[float]) -> dict[str, float]:
    """Seconds as a straight line over rows: slope in microseconds a row, what is left at 0 rows, and r squared."""
    slope, start = np.polyfit(rows, seconds, 1)
    left = np.asarray(seconds) - (slope * np.asarray(rows) + start)
    spread = np.asarray(seconds) - np.mean(seconds)
    return {
        "slope_us_per_row": float(slope * 1e6),
        "intercept_s": float(start),
        "r2": float(1 - (left**2).sum() / max((spread**2).sum(), 1e-12)),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 5_000_000, 20_000_000], help="sizes of the jobs")
    parser.add_argument("--workers", type=int, default=2, help="workers, one core each")
    parser.add_argument("--out", type=Path, default=OUT, help="where the figures go")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # a single size, in this process
    flags = parser.parse_args()
    if flags.one:
        print(json.dumps(one(flags.rows[0], flags.workers)), flush=True)
        return
    found = []
    for rows in flags.rows:
        command = [sys.executable, "-m", "tests.bench.scale", "--one", "--rows", str(rows), "--workers", str(flags.workers)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ)
        found.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    result = {"jobs": found, **machine()}
    if len(found) > 1:
        rows = [job["rows"] for job in found]
        result |= {"wall": fit(rows, [job["seconds"] for job in found]), "cpu": fit(rows, [job["cpu_s"] for job in found])}
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    flags.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
