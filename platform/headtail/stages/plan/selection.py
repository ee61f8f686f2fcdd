"""Who answers which query: where the head ends, the teacher's sample.

In: counts of queries by falling count. Out: places and masks over them. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from headtail.stages.plan.config import Head

POINTS = 200
Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


def head_end(counts: Ints, limits: Head, may: Mask, caps: Mapping[str, int] | None = None) -> tuple[int, str]:
    """How many of the queries, in the order in which they are taken, the head ends after, and the name of the limit that said so.

    `counts` and `may` (be in it at all) are in that order; a query with too few events may not. `caps`: further limits in queries, by name.
    """
    may = may & (counts >= limits.min_count)
    enough = np.flatnonzero(counts >= limits.min_count)
    ends = {"min_count": int(enough[-1]) + 1 if len(enough) else 0}
    most = {**({} if limits.rows is None else {"rows": limits.rows}), **(caps or {})}
    ends |= {name: min(len(counts), int(np.searchsorted(np.cumsum(may), rows)) + 1) if rows else 0 for name, rows in most.items()}
    if limits.coverage is not None:
        total = np.cumsum(np.where(may, counts, 0))
        wanted = limits.coverage * float(counts.sum())
        ends["coverage"] = min(len(counts), int(np.searchsorted(total, wanted * (1 - 1e-12), side="left")) + 1)
    limit = min(ends, key=lambda name: ends[name])
    return ends[limit], limit


def draw_teacher_sample(chance: npt.NDArray[np.float64], stratum: npt.NDArray[np.int8], barred: Mask, rows: int) -> Mask:
    """Half torso, half tail by lowest draw, without `barred` ones (labelled, redacted); where one has too few, the other gives more."""
    free = [np.flatnonzero((stratum == code) & ~barred) for code in (1, 2)]
    torso = min(len(free[0]), max(rows // 2, rows - len(free[1])))
    chosen = np.zeros(len(stratum), bool)
    for found, wanted in zip(free, (torso, rows - torso), strict=True):
        order = np.lexsort((found, chance[found])) if wanted < len(found) else np.arange(len(found))
        chosen[found[order[:wanted]]] = True
    return chosen


def zipf_exponent(counts: Ints) -> float:
    """Slope of log count over log rank, least squares over ranks 10 to n/10 taken evenly on the log scale; for information.

    Evenly, or the flat tail would weigh as much as it is long. A straight line is a rough description of real logs
    (Clauset, Shalizi and Newman 2009). All ranks are used when there are fewer than 200; 0.0 for fewer than 3.
    """
    if len(counts) < 3:
        return 0.0
    low, high = (10, len(counts) // 10) if len(counts) >= 200 else (1, len(counts))
    ranks = np.unique(np.geomspace(low, high, POINTS).round().astype(np.int64))
    slope, _ = np.polyfit(np.log(ranks), np.log(counts[ranks - 1]), 1)
    return float(-slope)
