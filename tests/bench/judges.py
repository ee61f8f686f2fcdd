"""Judges whose faults are known, and how often the intervals of `headtail judge` hold what they say.

python -m tests.bench.statistics --only judge_intervals
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from headtail.stages.judge.calibration import JudgeRows, judge_figures

REPETITIONS = 1000
# Of a judge that errs on a tenth of the rows, whatever it sees: people call 0.7 of the answers right and 0.6 of the others. Errors pull
# towards one half, so that it is a little harder on the better source.
TRUE_PAIRWISE = {"bias_length": 0.0, "bias_family": 0.1 * (1 - 2 * 0.55), "bias_position": 0.0}
TRUE_POINTWISE = {
    "bias_length": 0.0,
    "bias_family": 0.1 * (1 - 2 * 0.7) - 0.1 * (1 - 2 * 0.6),
    "agreement": 0.9,
    "kappa": (0.9 - 0.564) / (1 - 0.564),
    "passes_wrong": 0.1,
    "fails_right": 0.1,
}


def planted(n: int, seed: int, pairwise: bool = False, **shift: float) -> JudgeRows:
    """A judge that errs on a tenth of the rows, and leans towards long answers, the first place or the first source as `shift` says."""
    rng = np.random.default_rng(seed)
    people, other = (rng.random(n) < 0.7).astype(float), (rng.random(n) < 0.6).astype(float)
    length, length_other = rng.integers(10, 90, n).astype(float), rng.integers(10, 90, n).astype(float)

    def judged(truth: Any, lean: Any) -> Any:
        noisy = np.where(rng.random(n) < 0.1, 1 - truth, truth)
        return np.where(rng.random(n) < np.abs(lean), (lean > 0).astype(float), noisy)

    if not pairwise:
        first = judged(people, shift.get("length", 0) * (length > 50) + shift.get("family", 0))
        return JudgeRows(
            np.full(n, "tail", object), first, judged(other, 0.0 * length), people, other, length, length_other, np.ones(n, bool)
        )
    truth, lean = (1 + people - other) / 2, shift.get("length", 0) * np.sign(length - length_other) + shift.get("family", 0)
    first, second = (judged(truth, lean + sign * shift.get("position", 0)) for sign in (1, -1))
    return JudgeRows(np.full(n, "tail", object), first, second, people, other, length, length_other, np.ones(n, bool))


def judge_intervals() -> Mapping[str, float]:
    """The share of 95 % intervals that hold the true value, the smallest over figures, kinds of judge and numbers of labels."""
    shares: dict[str, float] = {}
    for pairwise in (False, True):
        true = TRUE_PAIRWISE if pairwise else TRUE_POINTWISE
        for n in (60, 300):
            held: dict[str, list[bool]] = {name: [] for name in true}
            for seed in range(REPETITIONS):
                for found in judge_figures(planted(n, seed, pairwise), pairwise, 0.95):
                    if found.figure in true and found.stratum == "all" and found.low is not None and found.high is not None:
                        held[found.figure].append(found.low <= true[found.figure] <= found.high)
            for name, cover in held.items():
                if cover:
                    shares[f"{'pairwise' if pairwise else 'pointwise'} {name}, {n} labels"] = float(np.mean(cover))
    for name, share in shares.items():
        print(f"{name:<40} {share:.3f}", flush=True)
    return {"judge_interval_cover_min": min(shares.values())}


SIMULATIONS: dict[str, Callable[[], Mapping[str, float]]] = {"judge_intervals": judge_intervals}
