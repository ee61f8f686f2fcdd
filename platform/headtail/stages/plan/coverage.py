"""What the most frequent queries cover: of the events up to the cut, and of holdout traffic. In-sample figures: see `forecast`.

In: counts up to the cut and of holdout traffic. Out: a Coverage by rank, the curve as JSON. Pure.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from headtail.stages.plan.selection import POINTS, Ints, Mask


class Coverage(NamedTuple):
    """Cumulative events of the queries in the order in which a head takes them: up to the cut, and of holdout traffic."""

    seen: Ints
    holdout: Ints
    total: int  # events up to the cut, also of queries that no cache may answer
    holdout_total: int  # events of holdout traffic, unseen queries included

    def shares(self, rows: int) -> tuple[float, float]:
        """Share of events covered by the first `rows` queries: before the cut, and of the holdout (0 without holdout traffic)."""
        if not rows or not len(self.seen):
            return 0.0, 0.0
        return float(self.seen[rows - 1] / self.total), float(self.holdout[rows - 1] / max(1, self.holdout_total))


def count_coverage(holdout: pa.Table, keys: pa.ChunkedArray, counts: Ints, may: Mask, order: Ints) -> Coverage:
    """Events in this order of queries that a cache may answer, of the log and of holdout traffic (query_key, count)."""
    after = np.zeros(len(counts), np.int64)
    places = pc.index_in(keys, holdout["query_key"].combine_chunks())
    found = np.flatnonzero(np.asarray(places.is_valid()))
    after[found] = holdout["count"].to_numpy()[np.asarray(places.drop_null())]
    seen, after = np.where(may, counts, 0)[order], np.where(may, after, 0)[order]
    return Coverage(np.cumsum(seen), np.cumsum(after), int(counts.sum()), int(pc.sum(holdout["count"]).as_py() or 0))


def coverage_curve(counts: Ints, covered: Coverage, head: int, limit: str) -> dict[str, Any]:
    """The coverage curve as JSON: about 200 ranks even on a log scale, with 1, the head's end and the last."""
    n = len(counts)
    ranks = np.unique(np.concatenate([np.geomspace(1, n, POINTS).round().astype(np.int64), [max(1, head), n]]))
    share, holdout = covered.shares(head)
    points = []
    for rank in ranks.tolist():
        seen, after = covered.shares(rank)
        points.append(
            {"rank": rank, "count": int(counts[rank - 1]), "share": seen, "share_holdout": after if covered.holdout_total else None}
        )
    return {
        "queries": n,
        "events": covered.total,
        "holdout_events": covered.holdout_total,
        "head": {
            "rows": head,
            "limit": limit,
            "last_count": int(counts[head - 1]) if head else 0,
            "share": share,
            "share_holdout": holdout if covered.holdout_total else None,
        },
        "points": points,
    }
