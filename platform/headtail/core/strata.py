"""The stratum of a query by how often it came: the one rule for plan, draws of labels, experiments and simulations.

In: events of each query in the log before the cut, and whether it is in the plan's head. Out: places in STRATA. Pure.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from headtail.core.rows import STRATA, Stratum

HEAD, TORSO, TAIL, UNSEEN = map(STRATA.index, Stratum)


def stratum_places(counts: npt.NDArray[np.int64], head: npt.NDArray[np.bool_], torso_min_count: int) -> npt.NDArray[np.int8]:
    """The place in STRATA of each query; one that the log does not have (0 events) is unseen."""
    return np.select([head, counts >= torso_min_count, counts > 0], [HEAD, TORSO, TAIL], UNSEEN).astype(np.int8)
