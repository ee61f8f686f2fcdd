"""The figures that say whether this project's numbers can be trusted, in one file.

    python -m tests.bench.numbers [--only NAME ...] [--out build/bench/numbers.json]

A part is a function that measures and returns figures by name. What a part prints says how its figures came about.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from . import bounds
from .experiments import experiment_numbers
from .forecast import forecast_numbers
from .ingest import ingest_numbers
from .label_designs import label_numbers
from .looks import gate_numbers
from .machine import run_parts
from .simulator import simulator_errors

OUT = Path("build/bench/numbers.json")
PARTS: dict[str, Callable[[], Mapping[str, float | None]]] = {
    "ingest": ingest_numbers,
    "labels": label_numbers,
    "simulator": simulator_errors,
    "paired_labels_needed": bounds.paired_labels_needed,
    "gates": gate_numbers,
    "experiments": experiment_numbers,
    "forecast": forecast_numbers,
}


if __name__ == "__main__":
    run_parts(str(__doc__), PARTS, OUT)
