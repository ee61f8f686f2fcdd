"""From scores to verdicts, pure: which claims are asked, how each is tested, which hold together.

    tiers' scores + what is asked (+ a judge's scores) -> Asked -> Claim (evidence) by Holm's correction

Rows are put in an order drawn from their keys, so that the table's order decides nothing. Reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headtail.core.bounds import Array, Either, Game, Proof, Share, assisted, holm
from headtail.core.errors import ConfigError, InputError
from headtail.core.evidence import Claim
from headtail.core.rows import ALL, TRAFFIC, Source, draw

Kind = Literal["quality", "drop", "above"]
ScoreName = Literal["exact", "f1"]


class Tier(NamedTuple):
    """One tier's gold rows: key, stratum, events and score (0..1) of each, in an order drawn from the keys."""

    keys: list[bytes]
    stratum: npt.NDArray[np.object_]
    events: Array
    score: Array

    def inside(self, name: str) -> npt.NDArray[np.bool_]:
        """The rows of a stratum; `traffic` has those that were seen before the cut."""
        if name == ALL:
            return np.ones(len(self.keys), dtype=bool)
        return self.events > 0 if name == TRAFFIC else self.stratum == name


class Judged(NamedTuple):
    """A judge's scores on one stratum: of the labelled rows (in the tier's order), and of rows without people's labels."""

    labelled: Array
    more: Array


class Wanted(NamedTuple):
    """What is asked of a candidate."""

    minimum: Mapping[str, float]
    max_drop: float | None
    above_fallback: bool
    relative_on: Sequence[str]
    delta: float
    candidates: int
    power: float


class Asked(NamedTuple):
    """One claim and its proof. A difference lies in -1..1; its proof is of (difference + 1) / 2."""

    kind: Kind
    stratum: str
    least: float
    proof: Proof
    right: int | None = None
    judged: int = 0

    @property
    def relative(self) -> bool:
        return self.kind != "quality"


def tier_rows(rows: pa.Table, tier: str, score: ScoreName) -> Tier:
    """The rows of one tier. InputError when there are none, or a query is scored twice: rows must be independent."""
    part = rows.filter(pc.equal(rows["tier"], tier))
    if not part.num_rows:
        known = ", ".join(rows["tier"].unique().to_pylist())
        raise InputError("the evaluation has no rows of this tier", where="tier", value=tier, fix=f"one of: {known}")
    if len(part["query_key"].unique()) < part.num_rows:
        raise InputError("a query is scored more than once; rows must be independent", where=f"rows of {tier}", fix="run evaluate again")
    part = part.take(pa.array(np.argsort(draw(part["query_key"], "gate", 0), kind="stable")))
    tp, fp, fn = (part[name].cast(pa.float64()).to_numpy() for name in ("tp", "fp", "fn"))
    right = part["exact"].cast(pa.float64()).to_numpy()
    units = 2 * tp + fp + fn
    f1 = np.where(units > 0, 2 * tp / np.maximum(units, 1), right)  # nothing wanted, nothing given: right only if answered
    stratum = np.asarray(part["stratum"].to_pylist(), dtype=object)
    events = np.nan_to_num(part["count"].cast(pa.float64()).to_numpy(zero_copy_only=False), nan=0.0)
    return Tier(part["query_key"].to_pylist(), stratum, events, right if score == "exact" else f1)


def ask(
    wanted: Wanted, tiers: Mapping[str, Tier], own: str, score: ScoreName, judged: Mapping[str, Judged], most_events: float
) -> Iterator[Asked]:
    """Every claim with its proof. `judged` by stratum; `most_events`: events of the log's most frequent query, 0 when not known."""
    each = wanted.delta / wanted.candidates / _claims(wanted)  # the strictest level of Holm's: what bets are tuned to
    tier = tiers[own]
    for name, least in wanted.minimum.items():
        inside, weights = tier.inside(name), _weights(tier, name, most_events)
        scores = tier.score[inside]
        right = int(scores.sum()) if score == "exact" else None
        if weights is not None:
            yield Asked("quality", name, least, Game(scores, each, weights=weights), right)
        elif name in judged:
            found = judged[name]
            helped = assisted(scores, found.labelled, found.more, each / 2 if right is not None else each)
            proof = Either(Share(right, len(scores)), helped) if right is not None else helped
            yield Asked("quality", name, least, proof, right, len(found.more))
        else:
            yield Asked("quality", name, least, Share(right, len(scores)) if right is not None else Game(scores, each), right)
    for kind, other, least in _relative(wanted):
        for name in wanted.relative_on:
            inside, weights = tier.inside(name), _weights(tier, name, most_events)
            yield Asked(kind, name, least, Game((tier.score - tiers[other].score + 1)[inside] / 2, each, weights=weights))


def decide(asked: Sequence[Asked], wanted: Wanted) -> tuple[Claim, ...]:
    """The verdict on every claim: Holm's correction over the claims, at delta divided by the number of candidates."""
    ps = [a.proof.p(_unit(a, a.least)) for a in asked]
    passed, levels = holm(ps, wanted.delta / wanted.candidates)
    return tuple(_claim(a, p, bool(ok), float(level), wanted) for a, p, ok, level in zip(asked, ps, passed, levels, strict=True))


def others(wanted: Wanted) -> list[str]:
    """The tiers that the candidate is compared with."""
    return [other for _, other, _ in _relative(wanted)]


def _relative(wanted: Wanted) -> list[tuple[Kind, str, float]]:
    found: list[tuple[Kind, str, float]] = []
    if wanted.max_drop is not None:
        found.append(("drop", str(Source.TEACHER), -wanted.max_drop))
    if wanted.above_fallback:
        found.append(("above", str(Source.FALLBACK), 0.0))
    return found


def _claims(wanted: Wanted) -> int:
    return len(wanted.minimum) + len(_relative(wanted)) * len(wanted.relative_on)


def _weights(tier: Tier, name: str, most_events: float) -> Array | None:
    """Events of each row over the most any query has: weights in 0..1, as the bound needs them."""
    if name != TRAFFIC:
        return None
    events = tier.events[tier.inside(name)]
    if not most_events or (len(events) and events.max() > most_events):
        what = "`traffic` needs the log's most frequent query, to bound the weights"
        fix = "evaluate on a plan's gold, or draw gold in proportion to traffic and ask of `all`"
        raise ConfigError(what, where="minimum, relative_on", value=most_events, fix=fix)
    return np.asarray(events / most_events)


def _unit(asked: Asked, value: float) -> float:
    """From the claim's scale to 0..1: differences lie in -1..1."""
    return (value + 1) / 2 if asked.relative else value


def _natural(asked: Asked, value: float) -> float:
    return 2 * value - 1 if asked.relative else value


def _claim(asked: Asked, p: float, passed: bool, level: float, wanted: Wanted) -> Claim:
    proof, least = asked.proof, _unit(asked, asked.least)
    low, value = _natural(asked, proof.low(level)), proof.value
    needed = None if passed else proof.rows_needed(least, level, wanted.power)
    return Claim(
        kind=asked.kind,
        stratum=asked.stratum,
        least=asked.least,
        n=proof.n,
        right=asked.right,
        judged=asked.judged,
        value=None if value != value else _natural(asked, value),
        low=max(low, asked.least) if passed else low,  # bound and p-value agree but for rounding
        level=level,
        p=p,
        method=proof.method,
        passed=passed,
        more=None if needed is None else max(1, needed - proof.n),
    )
