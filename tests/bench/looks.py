"""How often a gate lets a bad candidate pass, whatever is done with human labels in between: by simulation.

Every student here is exactly as good as the threshold, so that each pass is false. Levels are those of a task's policy, numbers of looks
those of the ledger in a real store, tests those of the gate. Beside each figure: what the obvious gate does, which tests at delta
each time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headtail.adapters.storage import open_storage
from headtail.core.bounds import share_p
from headtail.core.keys import query_key
from headtail.core.policy import TaskPolicy
from headtail.core.rows import KEY
from headtail.core.threshold import LabelledRows, choose_threshold
from headtail.releases.look import record_look

THRESHOLD, ROWS, STUDENTS = 0.85, 500, 20
POLICY = TaskPolicy(minimum={"all": THRESHOLD}, max_drop=None, above_fallback=False, delta=0.05)
Bools = npt.NDArray[np.bool_]


def levels(looks: int) -> npt.NDArray[np.float64]:
    """What each of so many looks may spend."""
    return np.asarray([POLICY.level(look) for look in range(1, looks + 1)])


def passes(right: npt.ArrayLike, rows: npt.ArrayLike, level: float | npt.NDArray[np.float64]) -> Bools:
    """Whether the gate's exact test lets them pass."""
    return np.asarray(share_p(right, rows, THRESHOLD) <= level)


def best_of_20(gates: int, rng: np.random.Generator) -> dict[str, float]:
    """20 students are evaluated on the open rows; the best of them is gated."""
    opened = rng.binomial(ROWS, THRESHOLD, (gates, STUDENTS))
    best = opened.argmax(-1)
    sealed = rng.binomial(ROWS, THRESHOLD, gates)  # the best on open rows is no better on others
    top = opened[np.arange(gates), best]
    return {
        "gate_false_pass_best_of_20": float(passes(sealed, ROWS, POLICY.level(1)).mean()),
        "without_seal": float(passes(top, ROWS, levels(STUDENTS)[best]).mean()),
        "at_delta": float(passes(top, ROWS, POLICY.delta).mean()),
    }


def adaptive(gates: int, rng: np.random.Generator, looks: int = 100) -> dict[str, float]:
    """Students that know the open rows by heart are changed and gated until one passes; what comes out of a rejection is used.

    `with_bounds`: were the bound to come out of rejections too, each change that raised it would be kept.
    """
    spent = levels(looks)
    found = {}
    for name, climb in (("gate_false_pass_adaptive", False), ("with_bounds", True)):
        scores = rng.random((gates, ROWS)) < THRESHOLD
        passed = passes(scores.sum(-1), ROWS, spent[0])
        for level in spent[1:]:
            changed = np.where(rng.random((gates, ROWS)) < 0.05, rng.random((gates, ROWS)) < THRESHOLD, scores)
            passed |= passes(changed.sum(-1), ROWS, level)
            keep = changed.sum(-1) > scores.sum(-1) if climb else np.ones(gates, dtype=bool)
            scores = np.where(keep[:, None], changed, scores)
        found[name] = float(passed.mean())
    return {**found, "at_delta": 1.0}  # on the rows that they know by heart


def renamed(gates: int, rng: np.random.Generator) -> dict[str, float]:
    """20 students are gated on the same rows, each as another answer source of another task."""
    right = rng.binomial(ROWS, THRESHOLD, (gates, STUDENTS))
    spent = levels(STUDENTS)[np.asarray(look_numbers()) - 1]
    return {
        "gate_false_pass_renamed": float(passes(right, ROWS, spent).any(-1).mean()),
        "at_delta": float(passes(right, ROWS, POLICY.delta).any(-1).mean()),
    }


def repeated(gates: int, rng: np.random.Generator, looks: int = 10) -> dict[str, float]:
    """One student is gated again after each further 100 labels."""
    right = rng.binomial(100, THRESHOLD, (gates, looks)).cumsum(-1)
    rows = 100 * np.arange(1, looks + 1)
    return {
        "gate_false_pass_repeated": float(passes(right, rows, levels(looks)).any(-1).mean()),
        "at_delta": float(passes(right, rows, POLICY.delta).any(-1).mean()),
    }


def promises(gates: int, rng: np.random.Generator) -> dict[str, float]:
    """20 students, or settings, are calibrated on the same rows until one gets a threshold; above every threshold each of them is right a
    hair too seldom. `at_delta`: each at delta, as if the others were not there."""
    found, spent, false = {}, levels(STUDENTS), np.zeros((gates, 2), dtype=bool)
    for gate in range(gates):
        first = rng.random(ROWS) < 0.5
        for level in spent:
            sure, right = rng.random(ROWS), rng.random(ROWS) < THRESHOLD - 1e-6
            halves = LabelledRows(sure[first], right[first]), LabelledRows(sure[~first], right[~first])
            for column, one in enumerate((level, POLICY.delta)):
                false[gate, column] |= choose_threshold(*halves, THRESHOLD, one).threshold is not None
    found["false_promise_of_20"], found["at_delta"] = false.mean(0).tolist()
    return found


def look_numbers() -> list[int]:
    """The ledger's numbers of 20 students on the same rows, each under another name."""
    keys, numbers = pa.array([query_key(f"q{i}") for i in range(8)], KEY), []
    with tempfile.TemporaryDirectory() as root:
        store = open_storage(f"{root}/store")
        for student in range(STUDENTS):
            given = [f"{student}" if i == student % 8 else "right" for i in range(8)]
            rows = pa.table({"query_key": keys, "wanted": ["right"] * 8, "given": given})
            source, task = f"source_{student}", f"task_{student}"
            numbers.append(record_look(store, "gate", task, "p", {source: rows})[source])
    return numbers


ATTACKS = (best_of_20, adaptive, renamed, repeated, promises)
SIZES = {"adaptive": 10, "promises": 50}  # fewer gates by so much: each takes longer


def false_passes(gates: int = 100_000) -> Mapping[str, float]:
    """All of them, and a table."""
    found: dict[str, float] = {}
    for attack in ATTACKS:
        size = gates // SIZES.get(attack.__name__, 1)
        figures = attack(size, np.random.default_rng(14))
        print(f"{attack.__name__:<12} {size:>6} gates  " + "  ".join(f"{name} {value:.4f}" for name, value in figures.items()), flush=True)
        found |= {name if name.startswith(("gate_", "false_")) else f"{attack.__name__}_{name}": value for name, value in figures.items()}
    return found


def gate_numbers() -> Mapping[str, float | None]:
    """The figures of tests/bench/numbers.py."""
    found = false_passes()
    return {name: found[name] for name in ("gate_false_pass_best_of_20", "gate_false_pass_adaptive", "gate_false_pass_renamed")}
