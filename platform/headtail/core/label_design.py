"""How human labels are drawn: the design that a label carries, what it makes of the label, and a draw that is good for traffic.

In: names of designs and inclusion probabilities as people write them; or the events of queries. Out: the chance with which each labelled
query was drawn; or which queries to label. Figures for traffic need it: rows that somebody chose speak for themselves alone.
Knows nothing of tables or answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from headtail.core.intervals import Array

EVEN = "even"  # every query of the log alike
BY_TRAFFIC = "by_traffic"  # queries in proportion to their events
BY_STRATUM = "by_stratum"  # alike within each stratum
CENSUS = "census"  # all of the most frequent queries
BY_PROBABILITY = "by_probability"  # with the inclusion probability that stands beside it
UNKNOWN = "unknown"  # nobody says
NamedDesign = Literal["even", "by_traffic", "by_stratum", "census", "unknown"]  # a design that needs no probability beside it
DESIGNS = (EVEN, BY_TRAFFIC, BY_STRATUM, CENSUS, BY_PROBABILITY, UNKNOWN)


def resolve_design(text: str, inclusion: str, otherwise: str) -> tuple[str, float | None, str]:
    """(design, inclusion probability, "") of a label as its file says it, or what is wrong with it in the last place.

    `otherwise`: the design of a label that names none and has no probability.
    """
    design, chance, number = text.strip().lower(), None, inclusion.strip()
    number = "" if number.lower() == "nan" else number  # an empty cell, as pandas writes it to Parquet
    if design and design not in DESIGNS:
        return UNKNOWN, None, f"design {design[:40]!r}: not one of {', '.join(DESIGNS)}"
    if number:
        try:
            chance = float(number)
        except ValueError:
            chance = -1.0
        if not 0 < chance <= 1:
            return UNKNOWN, None, f"inclusion {number[:40]!r}: not a number above 0 and up to 1"
    design = design or (BY_PROBABILITY if chance is not None else otherwise)
    if design == BY_PROBABILITY and chance is None:
        return UNKNOWN, None, f"design {BY_PROBABILITY} needs a number in the column inclusion"
    return design, 1.0 if design == CENSUS and chance is None else chance, ""


def thin_design(design: str, inclusion: float | None, share: float) -> tuple[str, float | None]:
    """Design and probability of a label that was kept with chance `share`, as labels are that did not go to training."""
    if share >= 1 or inclusion is None:
        return design, inclusion
    return (BY_PROBABILITY if design == CENSUS else design), inclusion * share


def inclusion_chances(designs: Sequence[str | None], inclusion: Array, counts: Array, total: float, band: Array) -> Array:
    """The chance with which each labelled query was drawn; NaN where the design is unknown.

    `inclusion`: NaN where the file says none; `counts`: events of each query, of `total` in all; `band`: share of the queries of like
    frequency that were labelled, by row. Of names alone `by_traffic` gives 1 - exp(-n counts / total), the others the band's share.
    """
    names = np.asarray([name or UNKNOWN for name in designs], dtype=object)
    drawn = int(np.count_nonzero(names == BY_TRAFFIC))
    chance = np.where(names == BY_TRAFFIC, -np.expm1(-drawn * np.maximum(counts, 1.0) / max(total, 1.0)), band)
    chance = np.where(np.isnan(inclusion), chance, inclusion)
    return np.where(names == UNKNOWN, np.nan, np.clip(chance, 1e-12, 1.0))


class LabelDraw(NamedTuple):
    """Queries to label: their places, and design and chance of each."""

    places: npt.NDArray[np.int64]
    designs: list[str]
    inclusion: Array


def draw_by_traffic(
    events: Array, stratum: npt.NDArray[np.integer[Any]], census: int, rows: int, seed: int, keys: npt.NDArray[np.float64]
) -> LabelDraw:
    """All of the `census` queries with the most events, and `rows` of the others in proportion to their events within each stratum.

    Half of `rows` go to the strata in proportion to their events, half evenly, as far as a stratum has so many. `keys`: a number per
    query that orders it by chance (uniform_draw): systematic sampling in that order, so each chance is exact.
    """
    order = np.lexsort((keys, -events))
    top = order[: min(census, len(order))]
    rest = np.ones(len(events), bool)
    rest[top] = False
    strata = [np.flatnonzero(rest & (stratum == name)) for name in np.unique(stratum[rest])]
    traffic = np.array([events[part].sum() for part in strata])
    wanted = rows / 2 * (traffic / max(traffic.sum(), 1.0) + 1 / max(len(strata), 1))
    places, chances = [top], [np.ones(len(top))]
    start = np.random.default_rng(seed)
    for part, count in zip(strata, wanted, strict=True):
        chance = _chances_of(events[part], min(float(len(part)), float(round(count))))
        by_chance = np.argsort(keys[part], kind="stable")
        steps = np.floor(np.cumsum(chance[by_chance]) + start.random() + 1e-9)
        drawn = by_chance[np.diff(np.concatenate([[0.0], steps])) >= 1] if len(part) else by_chance
        places.append(part[drawn])
        chances.append(chance[drawn])
    found = np.concatenate(places)
    designs = [CENSUS] * len(top) + [BY_TRAFFIC] * (len(found) - len(top))
    return LabelDraw(found, designs, np.concatenate(chances))


def _chances_of(events: Array, rows: float) -> Array:
    """Chances in proportion to events whose sum is `rows`, none above 1."""
    sure = np.zeros(len(events), bool)
    while True:
        left = rows - sure.sum()
        chance = np.where(sure, 1.0, left * events / max(float(events[~sure].sum()), 1e-300))
        more = ~sure & (chance >= 1)
        if not more.any():
            return np.asarray(np.clip(chance, 0.0, 1.0), np.float64)
        sure |= more
