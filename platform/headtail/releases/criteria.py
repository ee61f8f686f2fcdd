"""From scores to verdicts, pure: which criteria are tested, how, and which are passed together.

    answer sources' scores + the policy (+ a judge's scores) -> CriterionTest -> Criterion (evidence) by Holm's correction

Rows are put in an order drawn from their keys, so that the table's order decides nothing. Reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headtail.core.bounds import Array, Either, Game, Proof, Share, count_labels_needed, holm, judge_assisted_proof
from headtail.core.errors import ConfigError, InputError
from headtail.core.evidence import Criterion
from headtail.core.paired import PairedShare
from headtail.core.post_stratify import LabelledTraffic, TrafficCells, share_traffic, traffic_columns
from headtail.core.rows import ALL, TRAFFIC, Source, uniform_draw
from headtail.core.traffic_proof import traffic_proof

Kind = Literal["quality", "drop", "above"]
ScoreName = Literal["exact", "f1", "micro_f1"]


class SourceScores(NamedTuple):
    """One answer source's labelled rows: key, stratum, events, score (0..1) and units of each, in an order drawn from the keys."""

    keys: list[bytes]
    stratum: npt.NDArray[np.object_]
    events: Array
    score: Array
    traffic: LabelledTraffic | None = None
    units: Array | None = None  # wanted and given, of each row; None where every row counts the same

    def inside(self, name: str) -> npt.NDArray[np.bool_]:
        """The rows of a stratum, of near-duplicates the first; `traffic` has all rows whose design is known."""
        if name == TRAFFIC:
            return np.zeros(len(self.keys), bool) if self.traffic is None else ~np.isnan(self.traffic.chance)
        found = np.flatnonzero(np.ones(len(self.keys), bool) if name == ALL else self.stratum == name)
        if self.traffic is not None:
            found = found[np.unique(self.traffic.cluster[found], return_index=True)[1]]
        mask = np.zeros(len(self.keys), bool)
        mask[found] = True
        return mask


class JudgeScores(NamedTuple):
    """A judge's scores on one stratum: of the labelled rows (in the answer source's order), and of rows without people's labels."""

    labelled: Array
    more: Array


class GatePolicy(NamedTuple):
    """What a candidate must pass."""

    minimum: Mapping[str, float]
    max_drop: float | None
    above_fallback: bool
    relative_on: Sequence[str]
    delta: float
    power: float
    next_share: float = 1.0  # level of the next look at these labels, as a share of this look's: what labels needed are computed for


class CriterionTest(NamedTuple):
    """One criterion and its proof. A difference lies in -1..1; its proof is of (difference + 1) / 2."""

    kind: Kind
    stratum: str
    threshold: float
    proof: Proof
    right: int | None = None
    judged: int = 0

    @property
    def proof_threshold(self) -> float:
        """The threshold on the scale of the proof."""
        return (self.threshold + 1) / 2 if self.kind != "quality" else self.threshold

    def natural(self, value: float) -> float:
        """A value of the proof on the criterion's own scale."""
        return 2 * value - 1 if self.kind != "quality" else value

    def labels_needed(self, level: float, policy: GatePolicy, have: int) -> dict[str, int | None]:
        """How many labels beside `have` it would likely take to pass at the next look: likely, at least and at most."""
        needed = count_labels_needed(self.proof, self.proof_threshold, level * policy.next_share, policy.power)
        names = ("more", "more_least", "more_most")
        return {name: None if rows is None else max(1, rows - have) for name, rows in zip(names, needed, strict=True)}


def source_rows(rows: pa.Table, source: str, score: ScoreName) -> SourceScores:
    """The rows of one answer source. InputError when there are none, or a query is scored twice: rows must be independent."""
    part = rows.filter(pc.equal(rows["source"], source))
    if not part.num_rows:
        known = ", ".join(rows["source"].unique().to_pylist())
        raise InputError("the evaluation has no rows of this source", where="source", value=source, fix=f"one of: {known}")
    if len(part["query_key"].unique()) < part.num_rows:
        raise InputError("a query is scored more than once; rows must be independent", where=f"rows of {source}", fix="run evaluate again")
    part = part.take(pa.array(np.argsort(uniform_draw(part["query_key"], "gate", 0), kind="stable")))
    tp, fp, fn = (part[name].cast(pa.float64()).to_numpy() for name in ("tp", "fp", "fn"))
    right = part["exact"].cast(pa.float64()).to_numpy()
    units = 2 * tp + fp + fn
    f1 = np.where(units > 0, 2 * tp / np.maximum(units, 1), right)  # nothing wanted, nothing given: right only if answered
    stratum = np.asarray(part["stratum"].to_pylist(), dtype=object)
    events = np.nan_to_num(part["count"].cast(pa.float64()).to_numpy(zero_copy_only=False), nan=0.0)
    weights = units if score == "micro_f1" else None
    scores = right if score == "exact" else f1
    return SourceScores(part["query_key"].to_pylist(), stratum, events, scores, traffic_columns(part), weights)


def criterion_tests(
    policy: GatePolicy,
    sources: Mapping[str, SourceScores],
    own: str,
    score: ScoreName,
    judged: Mapping[str, JudgeScores],
    cells: TrafficCells | None,
    most_units: float = 2.0,
) -> Iterator[CriterionTest]:
    """Every criterion with its proof. `judged` by stratum; `cells`: the traffic that the evaluation speaks for; None: not known;
    `most_units`: the most that are wanted and given in a row, as the task's schema bounds them."""
    each = policy.delta / _criteria(policy)  # the strictest level of Holm's: what bets are tuned to
    source = sources[own]
    for name, least in policy.minimum.items():
        inside = source.inside(name)
        scores = source.score[inside]
        right = int(scores.sum()) if score == "exact" else None
        if name == TRAFFIC:
            yield CriterionTest("quality", name, least, _traffic(source, source.score, cells, each))
        elif source.units is not None:
            yield CriterionTest("quality", name, least, Game(scores, each, weights=_unit_weights(source.units[inside], most_units)))
        elif name in judged:
            found = judged[name]
            helped = judge_assisted_proof(scores, found.labelled, found.more, each / 2 if right is not None else each)
            assisted = Either(Share(right, len(scores)), helped) if right is not None else helped
            yield CriterionTest("quality", name, least, assisted, right, len(found.more))
        else:
            yield CriterionTest("quality", name, least, Share(right, len(scores)) if right is not None else Game(scores, each), right)
    for kind, other, least in _relative(policy):
        for name in policy.relative_on:
            gaps, inside = source.score - sources[other].score, source.inside(name)
            proof: Proof
            if name == TRAFFIC:
                proof = _traffic(source, (gaps + 1) / 2, cells, each)
            elif score == "exact":
                proof = PairedShare(int((gaps[inside] > 0).sum()), int((gaps[inside] < 0).sum()), int(inside.sum()))
            else:
                proof = Game((gaps[inside] + 1) / 2, each)
            yield CriterionTest(kind, name, least, proof)


def decide(tests: Sequence[CriterionTest], policy: GatePolicy) -> tuple[Criterion, ...]:
    """The verdict on every criterion: Holm's correction over the criteria."""
    ps = [a.proof.p(a.proof_threshold) for a in tests]
    passed, levels = holm(ps, policy.delta)
    return tuple(_criterion(a, p, bool(ok), float(level), policy) for a, p, ok, level in zip(tests, ps, passed, levels, strict=True))


def compared_sources(policy: GatePolicy) -> list[str]:
    """The answer sources that the candidate is compared with."""
    return [other for _, other, _ in _relative(policy)]


def _relative(policy: GatePolicy) -> list[tuple[Kind, str, float]]:
    found: list[tuple[Kind, str, float]] = []
    if policy.max_drop is not None:
        found.append(("drop", str(Source.TEACHER), -policy.max_drop))
    if policy.above_fallback:
        found.append(("above", str(Source.FALLBACK), 0.0))
    return found


def _criteria(policy: GatePolicy) -> int:
    return len(policy.minimum) + len(_relative(policy)) * len(policy.relative_on)


def _traffic(source: SourceScores, scores: Array, cells: TrafficCells | None, level: float) -> Proof:
    """Proof of a mean over traffic. ConfigError when nobody says how the labels were drawn: then no figure is the traffic's."""
    inside = source.inside(TRAFFIC)
    if cells is None or source.traffic is None or not inside.any():
        what = "a criterion on `traffic` needs human labels of a known design, from a log whose traffic is known"
        fix = "draw human labels with headtail labels draw, say how they were drawn (docs/labels.md), or name strata instead"
        raise ConfigError(what, where="minimum, relative_on", value=f"{int(inside.sum()):,} of {len(inside):,} rows", fix=fix)
    rows = source.traffic.take(inside)
    shares = share_traffic(rows, cells)
    return traffic_proof(scores[inside], shares.certain, shares.drawn, shares.dark, rows.cluster, level)


def _unit_weights(units: Array, most: float) -> Array:
    """Units of each row over the most that a row can have: weights in 0..1."""
    if len(units) and units.max() > most:
        what = "a row has more units than the task's schema allows: micro-F1 cannot be bounded"
        raise InputError(what, where="score", value=f"{units.max():g} units, at most {most:g}", fix="run evaluate again")
    return np.asarray(units / most)


def _criterion(tests: CriterionTest, p: float, passed: bool, level: float, policy: GatePolicy) -> Criterion:
    proof = tests.proof
    low, value = tests.natural(proof.low(level)), proof.value
    return Criterion(
        kind=tests.kind,
        stratum=tests.stratum,
        threshold=tests.threshold,
        n=proof.n,
        right=tests.right,
        judged=tests.judged,
        value=None if value != value else tests.natural(value),
        lower_bound=max(low, tests.threshold) if passed else min(low, tests.threshold),  # bound and p-value agree but for rounding
        level=level,
        p=p,
        method=proof.method,
        passed=passed,
        **({} if passed else tests.labels_needed(level, policy, proof.n)),
    )
