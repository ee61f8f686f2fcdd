"""What headtail adds to a row: CPU time of a worker with the null engine, less the null engine's own.

In: a number of rows. Out: microseconds of CPU per row of the process that a Ray actor would be: reading the shard, prompts,
keys, states, checks, Parquet, publishing. The worker's thread and its helpers' count; Ray, which carries no row, is not in it.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time

ROWS = 60_000
TURNS = 3


def once(rows: int) -> tuple[float, float]:
    """(microseconds per row of a worker, of the null engine alone) in this process."""
    from headtail.adapters.storage import open_storage, write_table
    from headtail.batch import InputTable, Job
    from headtail.batch.prepare import prepare_input
    from headtail.batch.worker import Ask, Worker
    from headtail.core.rows import PLANNED, with_side_inputs
    from headtail.core.task import load_task
    from headtail.engines import ModelConfig, Request
    from headtail.engines.null import NullEngine

    from .scale import SIDE, plan_of

    with tempfile.TemporaryDirectory(prefix="headtail-overhead-") as root:
        write_table(open_storage(root), "plan/x/head.parquet", plan_of(rows), with_side_inputs(PLANNED, SIDE))
        task = load_task("query_segmentation")
        job = Job(
            root=root,
            path="precompute/x",
            task=task,
            model=ModelConfig(engine="null", model="null"),
            digest="null",
            name="null",
            source="teacher",
            tables=(InputTable("plan/x/head.parquet", "plan/x:head"),),
        )
        manifest = prepare_input(job)
        asked = [Request(i, [{"role": "user", "content": f"Query: best pizza near me {i}"}]) for i in range(rows)]
        started = time.process_time()
        for _ in NullEngine(task.schema).generate(asked):
            pass
        alone = time.process_time() - started
        del asked
        worker = Worker(job, manifest, "run")
        started = time.process_time()
        made = worker.work([Ask(shard, 0) for shard in range(manifest.shards)])
        spent = time.process_time() - started
        assert sum(receipt.states["answered"] for receipt in made) == rows
        return spent / rows * 1e6, alone / rows * 1e6


def overhead_us(rows: int = ROWS, turns: int = TURNS) -> dict[str, float]:
    """Medians over some processes."""
    command = [sys.executable, "-m", "tests.bench.overhead", str(rows)]
    found = []
    for _ in range(turns):
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ)
        found.append([float(value) for value in done.stdout.split()])
    whole, alone = (statistics.median(column) for column in zip(*found, strict=True))
    return {"overhead_us_per_row": round(whole - alone, 2), "null_engine_us_per_row": round(alone, 2)}


if __name__ == "__main__":
    print(*once(int(sys.argv[1])))
