"""A lower bound for traffic that respects how the labelled rows were drawn.

    mean over traffic  =  rows certain to be drawn, known  +  the rest, by betting on the drawn rows

In: scores in 0..1, and what share of the traffic each row is, or stands for (post_stratify.share_traffic). Out: a Proof. Traffic that no
row stands for counts as 0. Knows nothing of strata, answer sources or tables.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from headtail.core.bounds import Array, Game
from headtail.core.post_stratify import Ints

BETTING_ON_TRAFFIC = "betting, post-stratified"


@dataclass(frozen=True)
class TrafficProof:
    """`known`: sum of traffic share x score of the certain rows, `certain` their share; `share`: of the traffic that `rest` is about."""

    known: float
    certain: float
    share: float
    rest: Game
    rows: int  # labelled rows, near-duplicates as one
    method: str = BETTING_ON_TRAFFIC

    @property
    def n(self) -> int:
        return self.rows

    @property
    def value(self) -> float:
        """Of the traffic that some row stands for; NaN when there is none."""
        lit = self.certain + self.share
        return (self.known + (self.share * self.rest.value if self.share else 0.0)) / lit if lit else math.nan

    def p(self, least: float) -> float:
        if self.share <= 0:
            return 0.0 if self.known > least else 1.0
        rest = (least - self.known) / self.share
        return 0.0 if rest < 0 else 1.0 if rest >= 1 else self.rest.p(rest)

    def low(self, level: float) -> float:
        return self.known + self.share * (self.rest.low(level) if self.share > 0 else 0.0)

    def rows_needed(self, least: float, level: float, power: float, lean: float = 0.0) -> int | None:
        rest = (least - self.known) / self.share if self.share > 0 else 1.0
        found = self.rest.rows_needed(max(rest, 0.0), level, power, lean) if rest < 1 else None
        return None if found is None else found + self.rows - self.rest.n


def traffic_proof(scores: Array, certain: Array, drawn: Array, dark: float, cluster: Ints, level: float) -> TrafficProof:
    """Proof that the mean over traffic is above a value. Rows in random order; a cluster of near-duplicates is bet on as one.

    A drawn row's weight is the traffic that it stands for, over the most that one stands for: then the mean gain of a bet is that of
    the traffic, whatever the draw preferred.
    """
    known, share = float(certain @ scores), float(drawn.sum())
    assert abs(float(certain.sum()) + share + dark - 1) < 1e-6, "shares of traffic must sum to 1"
    _, first, place = np.unique(cluster, return_index=True, return_inverse=True)
    weight, worth = np.bincount(place, drawn), np.bincount(place, drawn * scores)
    order = np.argsort(first, kind="stable")
    order = order[weight[order] > 0]
    weight, worth = weight[order], worth[order]
    top = float(weight.max()) if len(weight) else 1.0
    game = Game(worth / np.where(weight > 0, weight, 1.0), level, weights=weight / top)
    return TrafficProof(known, float(certain.sum()), share, game, len(first))
