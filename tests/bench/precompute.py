"""headtail beside raw vLLM and ray.data.llm, constrained beside free decoding, and what headtail adds to a row.

    python -m tests.bench.precompute                 some 10 minutes on 2 cores
    python -m tests.bench.precompute --cache         with the cache's figures (tests.bench.cache)

In: nothing but this checkout. Out: a table and build/bench/precompute.json. Every system runs the reference teacher on the
same rows with the same engine arguments, sampling and grammar, each run in a process of its own, in turn. Rows per second
are rows over the difference in seconds of a large and a small run, so that nobody is charged for starting up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from headtail.adapters.progress import console

from .machine import machine
from .overhead import overhead_us
from .systems import model, parts, queries
from .turns import in_turn

OUT = Path("build/bench/precompute.json")
SYSTEMS = ("raw", "raw-plain", "ray-data-llm", "headtail")
FREE_ROWS = 1500  # of each turn of constrained and free decoding


def rate(seconds: dict[str, float]) -> float:
    """Rows per second from the seconds of a small and a large run."""
    (small, quick), (large, slow) = sorted((int(rows), taken) for rows, taken in seconds.items())
    if slow <= quick:
        raise ValueError(f"{large} rows took no longer than {small}: {slow} s, {quick} s")
    return (large - small) / (slow - quick)


def turns(repeats: int, sizes: Sequence[int], threads: int) -> list[dict[str, Any]]:
    """Every system's seconds per size, and what it said of itself."""
    return in_turn(
        SYSTEMS, repeats, lambda system: [sys.executable, "-m", "tests.bench.systems", system, *map(str, sizes), "--threads", str(threads)]
    )


def constrained_and_free(repeats: int, threads: int) -> dict[str, list[float]]:
    """Rows per second of headtail's engine with and without the task's grammar, in turn, in this process; uneven answers too."""
    from headtail.engines import Request
    from headtail.engines.vllm import VllmEngine

    task, path, _, sampling, _ = parts(threads)
    engines = {name: VllmEngine(model(threads), path, schema, sampling) for name, schema in (("constrained", task.schema), ("free", None))}
    asked = [Request(i, task.messages(query)) for i, query in enumerate(queries(FREE_ROWS))]
    found: dict[str, list[float]] = {name: [] for name in engines}
    tokens = dict.fromkeys(engines, 0)
    for name, engine in engines.items():
        list(engine.generate(asked[:300]))  # warm
        del name
    for turn in range(repeats):
        for name in engines if turn % 2 == 0 else reversed(engines):
            started = time.monotonic()
            done = list(engines[name].generate(asked))
            found[name].append(len(done) / (time.monotonic() - started))
            tokens[name] = sum(completion.tokens_out for completion in done)
    found["tokens_out"] = [float(tokens["constrained"]), float(tokens["free"])]
    for engine in engines.values():
        engine.close()
    return found


def summary(runs: Sequence[dict[str, Any]], decoding: dict[str, list[float]], overhead: dict[str, float]) -> dict[str, float]:
    """The figures that are claimed: medians, and ratios of medians."""
    speed = {name: statistics.median(rate(run["seconds"]) for run in runs if run["system"] == name) for name in SYSTEMS}
    told = [line for run in runs if run["system"] == "headtail" for line in run["said"]]
    largest: dict[str, Any] = max(told, key=lambda line: line["facts"].get("engine_rows", 0), default={"facts": {}})["facts"]
    return {
        **{f"{name.replace('-', '_')}_rows_per_s": round(value, 1) for name, value in speed.items()},
        "ratio_vs_raw_generate": round(speed["headtail"] / speed["raw"], 3),
        "ratio_vs_raw_without_logprobs": round(speed["headtail"] / speed["raw-plain"], 3),
        "ratio_vs_ray_data_llm": round(speed["headtail"] / speed["ray-data-llm"], 3),
        "constrained_over_free": round(statistics.median(decoding["constrained"]) / statistics.median(decoding["free"]), 3),
        **overhead,
        **{name: largest[name] for name in ("occupancy", "occupancy_fed", "prefix_hit_rate") if name in largest},
    }


def show(figures: dict[str, float]) -> None:
    """The table."""
    table = Table("figure", "value", title="precompute", title_justify="left")
    for name, value in figures.items():
        table.add_row(name, f"{value:,.3f}" if value < 100 else f"{value:,.0f}")
    console.print(table)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs=2, default=[1000, 7000], help="rows of a small and of a large run")
    parser.add_argument("--repeats", type=int, default=3, help="turns")
    parser.add_argument("--threads", type=int, default=2, help="cores of the engine")
    parser.add_argument("--cache", action="store_true", help="also build and read a cache, beside its rivals")
    parser.add_argument("--keys", type=int, default=10_000_000, help="keys of that cache")
    parser.add_argument("--out", type=Path, default=OUT, help="where the figures go")
    flags = parser.parse_args()
    started = time.monotonic()
    overhead = overhead_us()
    runs = turns(flags.repeats, flags.rows, flags.threads)
    decoding = constrained_and_free(2 * flags.repeats, flags.threads)
    figures = summary(runs, decoding, overhead)
    detail: dict[str, Any] = {"runs": runs, "decoding": decoding}
    if flags.cache:
        from .cache import figures as cache_figures

        cache = cache_figures(flags.keys)
        detail["cache"] = cache
        figures |= {name: cache[name] for name in ("lookup_p50_us", "lookup_p99_us", "build_rows_per_s")}
    show(figures)
    result = {**figures, "seconds": round(time.monotonic() - started, 1), **machine(), "detail": detail}
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    flags.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    console.print(f"{flags.out}")


if __name__ == "__main__":
    main()
