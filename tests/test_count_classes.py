"""Classes of counts and of idle days."""

from __future__ import annotations

import numpy as np

from headtail.core.count_classes import count_class, idle_class


def test_classes_of_counts_rise_with_counts() -> None:
    classes = count_class(np.arange(100_000))
    assert classes[:17].tolist() == list(range(17))
    assert set(np.diff(classes)) <= {0, 1, 2}
    assert np.diff(classes).min() == 0
    tops = np.flatnonzero(np.diff(classes[1000:])) + 1000
    assert np.all(tops[1:] / tops[:-1] < 1.05), "counts of one class differ by less than a twentieth"


def test_classes_of_idle_days() -> None:
    assert idle_class(np.array([0, 1, 2, 3, 4, 6, 7, 13, 14, 27, 28, 400])).tolist() == [0, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
