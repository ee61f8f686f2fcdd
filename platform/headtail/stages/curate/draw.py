"""The draw: which of the rows that qualify make up a training set of a given size.

In: per row its stratum, answer type, cluster, events and a hash. Out: the rows taken. First people's answers, then every
answer type, then each stratum's share, then the rest over all cells (stratum, type, cluster), by traffic and number but flatter,
so that small cells get rows. Within a cell the smallest hashes: order and sharding change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Objects = npt.NDArray[np.object_]
FLATTER = 0.7  # exponent on a cell's weight: 1: in proportion, 0: all cells the same
_PER_TYPE = 20  # rows of each answer type that come in, if there are so many and types take at most a quarter of the set


class Pool(NamedTuple):
    """The rows to draw from."""

    stratum: Objects
    lot: Floats
    events: Floats
    kind: Objects  # answer type; all alike when unknown
    cluster: npt.NDArray[np.int64]
    first: Bools  # taken before all others: a person answered them

    @classmethod
    def by_stratum(cls, stratum: Objects, lot: Floats, events: Floats) -> Pool:
        """Rows of which only the stratum is known."""
        n = len(lot)
        return cls(stratum, lot, events, np.full(n, "", dtype=object), np.zeros(n, dtype=np.int64), np.zeros(n, dtype=bool))

    def take(self, rows: npt.NDArray[np.int64]) -> Pool:
        """Some of the rows, in that order."""
        return Pool(*(column[rows] for column in self))  # type: ignore[arg-type]


def pick(pool: Pool, size: int, shares: Mapping[str, float]) -> tuple[npt.NDArray[np.intp], list[str]]:
    """At most `size` rows, and a note for each stratum that could not fill its share."""
    n = len(pool.lot)
    size, notes = min(size, n), []
    order = np.argsort(pool.lot, kind="stable")
    taken = np.zeros(n, dtype=bool)
    taken[order[pool.first[order]][:size]] = True
    _every_kind(pool, order, taken, size)
    for name, share in shares.items():
        mine = pool.stratum == name
        wanted = int(np.ceil(share * size - 1e-9))
        room = min(wanted - int((taken & mine).sum()), size - int(taken.sum()))
        _fill(pool, order, taken, mine, room)
        if int(mine.sum()) < wanted:
            notes.append(f"{name}: {int(mine.sum()):,} rows qualify, fewer than its share of {wanted:,}; all are taken")
    _fill(pool, order, taken, np.ones(n, dtype=bool), size - int(taken.sum()))
    return np.flatnonzero(taken), notes


def _every_kind(pool: Pool, order: npt.NDArray[np.intp], taken: Bools, size: int) -> None:
    kinds = sorted(set(pool.kind.tolist()))
    each = max(1, min(_PER_TYPE, size // (4 * max(1, len(kinds)))))
    for kind in kinds if len(kinds) > 1 else ():
        mine = order[(pool.kind[order] == kind)]
        missing = min(each - int(taken[mine].sum()), size - int(taken.sum()))
        if missing > 0:
            taken[mine[~taken[mine]][:missing]] = True


def _fill(pool: Pool, order: npt.NDArray[np.intp], taken: Bools, among: Bools, room: int) -> None:
    """Take `room` more rows of those `among`, spread over their cells; all of them when there are no more."""
    free = order[(among & ~taken)[order]]
    if room <= 0 or not len(free):
        return
    cells = np.asarray([f"{s}\0{k}\0{c}" for s, k, c in zip(pool.stratum[free], pool.kind[free], pool.cluster[free], strict=True)])
    names, cell, rows = np.unique(cells, return_inverse=True, return_counts=True)
    traffic = np.bincount(cell, np.maximum(pool.events[free], 1.0), minlength=len(names))
    weight = (rows / rows.sum() + traffic / traffic.sum()) ** FLATTER
    quota = allot(weight, rows.astype(np.int64), min(room, len(free)))
    by_cell = np.argsort(cell, kind="stable")  # within a cell still by lot
    place = np.arange(len(free)) - np.repeat(np.concatenate([[0], np.cumsum(rows)[:-1]]), rows)
    taken[free[by_cell[place < quota[cell[by_cell]]]]] = True


def allot(weight: Floats, most: npt.NDArray[np.int64], room: int) -> npt.NDArray[np.int64]:
    """Whole numbers that add up to min(room, sum(most)), in proportion to `weight`, none above `most`; largest remainders first."""
    shares = np.zeros(len(weight), dtype=np.int64)
    room = min(room, int(most.sum()))
    while (left := room - int(shares.sum())) > 0:
        open_cells = shares < most
        share = np.where(open_cells, weight, 0.0)
        wished = left * share / share.sum()
        step = np.minimum(np.floor(wished).astype(np.int64), most - shares)
        if not step.any():
            best = np.lexsort((np.arange(len(weight)), -np.where(open_cells, wished, -1.0)))[: min(left, int(open_cells.sum()))]
            step[best] = 1
        shares += step
    return shares
