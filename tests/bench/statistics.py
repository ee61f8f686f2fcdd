"""Simulations of the statistics, in full: what the tests run in a quick form.

    python -m tests.bench.statistics [--only NAME ...] [--out build/bench/statistics.json]

A simulation is a function that returns figures by name; it prints a table as it goes. Nothing is read but its seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from . import bounds, experiments, judges, label_designs
from .looks import false_passes
from .machine import run_parts

OUT = Path("build/bench/statistics.json")
SIMULATIONS: dict[str, Callable[[], Mapping[str, float]]] = {
    "gates": false_passes,
    **experiments.SIMULATIONS,
    **bounds.SIMULATIONS,
    **judges.SIMULATIONS,
    **label_designs.SIMULATIONS,
}


if __name__ == "__main__":
    run_parts(str(__doc__), SIMULATIONS, OUT)
