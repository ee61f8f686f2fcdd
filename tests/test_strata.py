"""The one rule of strata."""

from __future__ import annotations

import numpy as np

from headtail.core.rows import STRATA
from headtail.core.strata import stratum_places


def test_the_head_comes_before_the_counts() -> None:
    places = stratum_places(np.array([0, 9, 9, 4, 0]), np.array([True, True, False, False, False]), 5)
    assert [STRATA[place] for place in places] == ["head", "head", "torso", "tail", "unseen"]
