"""Scores that no comparison of units gives: edit distance, and functions that say how alike two answers are.

In: two texts, or two answers and a function. Out: counts of units right, given but not wanted, wanted but not given, so that they are a
micro-F1 as any score. A likeness of 0..1 counts as hundredths. Knows nothing of tasks or encoders.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from rapidfuzz.distance import LCSseq

from headtail.core.errors import InputError

SEMANTIC = "headtail.engines.similarity:encoder_similarity"  # of an encoder's folder: a function of two texts
_UNITS = 100
Numbers = tuple[int, int, int]


def edit_counts(wanted: str, given: str) -> Numbers:
    """Characters of the longest common subsequence, those to delete and those to insert: F1 is 1 - insertions and deletions over all
    characters (the normalised Indel similarity)."""
    if not wanted and not given:
        return 1, 0, 0
    same = LCSseq.similarity(wanted, given)
    return same, len(given) - same, len(wanted) - same


class Measure(NamedTuple):
    """A function of a wanted and a given answer, and the digest of all that decides what it says."""

    function: Callable[[Any, Any], Any]
    digest: str
    name: str

    def counts(self, wanted: Any, given: Any, least: float) -> Numbers:
        """Its likeness (0..1) in hundredths, wholly right from `least` on; or the counts that it gives itself. InputError for others."""
        if given is None:
            return 0, 0, _UNITS
        try:
            value = self.function(wanted, given)
        except Exception as error:
            what = f"a score's function raised {type(error).__name__}: {error}"
            raise InputError(what, where=self.name, value=given, fix="correct the function") from error
        if isinstance(value, tuple) and len(value) == 3 and all(isinstance(part, int) and part >= 0 for part in value):
            return value
        if not isinstance(value, int | float) or not 0 <= value <= 1:
            fix = "return a likeness from 0 to 1, or three counts: right, given but not wanted, wanted but not given"
            raise InputError("a score's function returned neither a likeness nor counts", where=self.name, value=value, fix=fix)
        same = _UNITS if value >= least else min(_UNITS - 1, round(_UNITS * value))
        return same, _UNITS - same, _UNITS - same
