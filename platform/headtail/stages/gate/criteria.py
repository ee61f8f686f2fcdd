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

from headtail.core.bounds import Array, Either, Game, Proof, Share, holm, judge_assisted_proof
from headtail.core.errors import ConfigError, InputError
from headtail.core.evidence import Criterion
from headtail.core.rows import ALL, TRAFFIC, Source, uniform_draw

Kind = Literal["quality", "drop", "above"]
ScoreName = Literal["exact", "f1"]


class SourceScores(NamedTuple):
    """One answer source's labelled rows: key, stratum, events and score (0..1) of each, in an order drawn from the keys."""

    keys: list[bytes]
    stratum: npt.NDArray[np.object_]
    events: Array
    score: Array

    def inside(self, name: str) -> npt.NDArray[np.bool_]:
        """The rows of a stratum; `traffic` has those that were seen before the cut."""
        if name == ALL:
            return np.ones(len(self.keys), dtype=bool)
        return self.events > 0 if name == TRAFFIC else self.stratum == name


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
    candidates: int
    power: float


class CriterionTest(NamedTuple):
    """One criterion and its proof. A difference lies in -1..1; its proof is of (difference + 1) / 2."""

    kind: Kind
    stratum: str
    threshold: float
    proof: Proof
    right: int | None = None
    judged: int = 0

    @property
    def relative(self) -> bool:
        return self.kind != "quality"


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
    return SourceScores(part["query_key"].to_pylist(), stratum, events, right if score == "exact" else f1)


def criterion_tests(
    policy: GatePolicy,
    sources: Mapping[str, SourceScores],
    own: str,
    score: ScoreName,
    judged: Mapping[str, JudgeScores],
    most_events: float,
) -> Iterator[CriterionTest]:
    """Every criterion with its proof. `judged` by stratum; `most_events`: events of the log's most frequent query, 0 when not known."""
    each = policy.delta / policy.candidates / _criteria(policy)  # the strictest level of Holm's: what bets are tuned to
    source = sources[own]
    for name, least in policy.minimum.items():
        inside, weights = source.inside(name), _weights(source, name, most_events)
        scores = source.score[inside]
        right = int(scores.sum()) if score == "exact" else None
        if weights is not None:
            yield CriterionTest("quality", name, least, Game(scores, each, weights=weights), right)
        elif name in judged:
            found = judged[name]
            helped = judge_assisted_proof(scores, found.labelled, found.more, each / 2 if right is not None else each)
            proof = Either(Share(right, len(scores)), helped) if right is not None else helped
            yield CriterionTest("quality", name, least, proof, right, len(found.more))
        else:
            yield CriterionTest("quality", name, least, Share(right, len(scores)) if right is not None else Game(scores, each), right)
    for kind, other, least in _relative(policy):
        for name in policy.relative_on:
            inside, weights = source.inside(name), _weights(source, name, most_events)
            yield CriterionTest(kind, name, least, Game((source.score - sources[other].score + 1)[inside] / 2, each, weights=weights))


def decide(tests: Sequence[CriterionTest], policy: GatePolicy) -> tuple[Criterion, ...]:
    """The verdict on every criterion: Holm's correction over the criteria, at delta divided by the number of candidates."""
    ps = [a.proof.p(_unit(a, a.threshold)) for a in tests]
    passed, levels = holm(ps, policy.delta / policy.candidates)
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


def _weights(source: SourceScores, name: str, most_events: float) -> Array | None:
    """Events of each row over the most any query has: weights in 0..1, as the bound needs them."""
    if name != TRAFFIC:
        return None
    events = source.events[source.inside(name)]
    if not most_events or (len(events) and events.max() > most_events):
        what = "`traffic` needs the log's most frequent query, to bound the weights"
        fix = "evaluate on a plan's human labels, or draw human labels in proportion to traffic and test `all`"
        raise ConfigError(what, where="minimum, relative_on", value=most_events, fix=fix)
    return np.asarray(events / most_events)


def _unit(tests: CriterionTest, value: float) -> float:
    """From the criterion's scale to 0..1: differences lie in -1..1."""
    return (value + 1) / 2 if tests.relative else value


def _natural(tests: CriterionTest, value: float) -> float:
    return 2 * value - 1 if tests.relative else value


def _criterion(tests: CriterionTest, p: float, passed: bool, level: float, policy: GatePolicy) -> Criterion:
    proof, least = tests.proof, _unit(tests, tests.threshold)
    low, value = _natural(tests, proof.low(level)), proof.value
    needed = None if passed else proof.rows_needed(least, level, policy.power)
    return Criterion(
        kind=tests.kind,
        stratum=tests.stratum,
        threshold=tests.threshold,
        n=proof.n,
        right=tests.right,
        judged=tests.judged,
        value=None if value != value else _natural(tests, value),
        lower_bound=max(low, tests.threshold) if passed else low,  # bound and p-value agree but for rounding
        level=level,
        p=p,
        method=proof.method,
        passed=passed,
        more=None if needed is None else max(1, needed - proof.n),
    )
