"""What each rule of the normal form brings: the events that it adds to queries which are also asked in a form that needs no such rule.

In: sums by query, day and the rules that changed the text. Out: RuleMerges per rule, which add up over shards. An event is merged by a
rule when it took the rule and its query also came without: a cache of texts as typed would have had to hold both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from headtail.stages.ingest.result import RuleCoverage
from headtail.stages.ingest.texts import RULES


class RuleMerges(NamedTuple):
    """By rule, in the order of RULES: events that it changed, those of them that it merged, and queries that came both ways."""

    changed: tuple[int, ...]
    merged: tuple[int, ...]
    queries: tuple[int, ...]


def merges_by_rule(query: npt.NDArray[np.int64], count: npt.NDArray[np.int64], rules: npt.NDArray[np.uint8]) -> RuleMerges:
    """Of sums of events by number of the query and the rules that changed its text (bit i: RULES[i])."""
    size, found = int(query.max(initial=-1)) + 1, []
    for bit in range(len(RULES)):
        took = (rules & (1 << bit)) > 0
        without = np.zeros(size, bool)
        without[query[~took]] = True
        both = without[query] & took
        found.append((int(count[took].sum()), int(count[both].sum()), len(np.unique(query[both]))))
    changed, merged, queries = zip(*found, strict=True)
    return RuleMerges(changed, merged, queries)


def rule_coverage(shards: Sequence[RuleMerges], events: int) -> tuple[RuleCoverage, ...]:
    """Summed over the shards, of `events` in all."""
    sums = np.array(shards, np.int64).sum(axis=0) if shards else np.zeros((3, len(RULES)), np.int64)
    return tuple(
        RuleCoverage(
            rule=rule,
            changed_events=float(sums[0, i]) / max(1, events),
            merged_events=float(sums[1, i]) / max(1, events),
            merged_queries=int(sums[2, i]),
        )
        for i, rule in enumerate(RULES)
    )
