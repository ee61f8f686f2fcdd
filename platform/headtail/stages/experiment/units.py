"""Sums by unit as arrays, and slices of them by stratum and by whether the answer changed. Pure.

In: grouped rows, the stratum and the AnswerChange of each query. Out: UnitArrays. Units that met both arms are left out. Knows nothing of
where rows come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headtail.core.rows import ALL
from headtail.stages.experiment.effect import Array, Mask, UnitSums
from headtail.stages.experiment.lookup import AnswerChange, Codes


class QueryFacts(NamedTuple):
    """What was looked up of the distinct `queries`; None: not looked up."""

    queries: Sequence[str]
    strata: Codes | None = None
    changes: Codes | None = None


class UnitArrays(NamedTuple):
    """Groups of requests of one unit, one stratum and one AnswerChange; arms and covariates by unit."""

    treated: Mask  # (units,)
    before: Array | None  # (units,)
    before_requests: Array | None
    unit: npt.NDArray[np.int64]  # (groups,) place of the unit
    stratum: npt.NDArray[np.int64]  # (groups,) place in `strata`
    change: Codes  # (groups,)
    outcome: Array  # (groups,) sums
    requests: Array
    strata: tuple[str, ...]

    def part(self, mask: Mask) -> UnitSums:
        """The sums over some groups; every unit has its row."""
        places, n = self.unit[mask], len(self.treated)
        outcome, requests = (_sum_by_unit(places, values[mask], n) for values in (self.outcome, self.requests))
        return UnitSums(self.treated, outcome, requests, self.before, self.before_requests)

    def change_mask(self) -> Mask:
        """Groups of requests whose answers differ between the arms."""
        return np.asarray(self.change == AnswerChange.CHANGED)

    def of_stratum(self, name: str) -> Mask:
        """Groups of one stratum."""
        return np.asarray(self.stratum == self.strata.index(name))


def unit_arrays(grouped: pa.Table, treatment: str, strata: Sequence[str], facts: QueryFacts, mixed: pa.Array) -> UnitArrays:
    """Arrays over units. `strata`: names in their order, for codes of `facts`; `mixed`: units that met both arms, which are left out."""
    during = grouped.filter(pc.invert(grouped["before"]))
    during = during.filter(pc.invert(pc.is_in(during["unit"], value_set=mixed)))
    arms = during.group_by(["unit"]).aggregate([("arm", "min")])
    names = arms["unit"].combine_chunks()
    before, known = _before(grouped, during, names)
    codes, labels = _strata(during, strata, facts)
    return UnitArrays(
        treated=pc.equal(arms["arm_min"], treatment).fill_null(False).to_numpy(),
        before=before,
        before_requests=known,
        unit=pc.index_in(during["unit"], value_set=names).to_numpy().astype(np.int64),
        stratum=codes,
        change=_changes(during, facts),
        outcome=during["outcome_sum"].to_numpy(),
        requests=during["outcome_count"].to_numpy().astype(np.float64),
        strata=labels,
    )


def _before(grouped: pa.Table, during: pa.Table, names: pa.Array) -> tuple[Array | None, Array | None]:
    """Sums and rows of what is known of each unit from before: its covariate, else its outcomes before the start."""
    if int(pc.sum(during["covariate_count"]).as_py() or 0):
        rows, sums, counts = during, "covariate_sum", "covariate_count"
    else:
        rows, sums, counts = grouped.filter(grouped["before"]), "outcome_sum", "outcome_count"
    if not rows.num_rows:
        return None, None
    places = pc.index_in(rows["unit"], value_set=names)
    there = places.is_valid().to_numpy()
    at, n = places.drop_null().to_numpy(), len(names)
    values = pc.fill_null(rows[sums], 0.0).to_numpy()[there]
    known = rows[counts].to_numpy()[there]
    return _sum_by_unit(at, values, n), _sum_by_unit(at, known, n)


def _sum_by_unit(units: npt.NDArray[np.int64], values: Array, n: int) -> Array:
    return np.asarray(np.bincount(units, values, n), np.float64)


def _strata(during: pa.Table, strata: Sequence[str], facts: QueryFacts) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    if facts.strata is not None:
        return facts.strata[_queries(during, facts)].astype(np.int64), tuple(strata)
    named = pc.fill_null(during["stratum"], ALL)
    labels = [name for name in strata if name in set(named.unique().to_pylist())]
    labels += sorted(set(named.unique().to_pylist()) - set(labels))
    return pc.index_in(named, value_set=pa.array(labels, pa.string())).to_numpy().astype(np.int64), tuple(labels)


def _changes(during: pa.Table, facts: QueryFacts) -> Codes:
    if facts.changes is not None:
        return facts.changes[_queries(during, facts)]
    said = pc.fill_null(during["changed"], True).to_numpy()  # without such a column every answer counts as changed
    return np.where(said, AnswerChange.CHANGED, AnswerChange.SAME).astype(np.int8)


def _queries(during: pa.Table, facts: QueryFacts) -> npt.NDArray[np.int64]:
    return np.asarray(pc.index_in(during["query"], value_set=pa.array(facts.queries, pa.string())).to_numpy(), np.int64)
