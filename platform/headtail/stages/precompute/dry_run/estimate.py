"""Time and cost of the rows that are left, with bounds, from a probe: a random sample of these rows, really answered. Pure.

In: per row of the probe its tokens and when it was finished; how many rows are left. Out: an Estimate with bounds.
A probe of a thousand rows is mostly an engine filling up and running empty. So its rate is measured in the middle, where the
engine is as full as in a long job. Filling, emptying and starting are separate terms; each is seen once, so it is known roughly.
Bounds of tokens are statistics. Bounds of times and money add what is assumed, DRIFT and ONCE; ASSUMED says so to people.
Knows nothing of stores or engines.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field
from scipy import special

from headtail.batch.limits import Limits
from headtail.core.config import Config
from headtail.core.paths import AnswersPath

CONFIDENCE = 0.95
BATCHES = 10  # stretches of equal time that the steady part is cut into (batch means, Law and Carson 1979)
FEWEST = 30  # rows from which a steady part is looked for
DRIFT = 0.10  # never narrower: probes minutes apart on one shared 2-core machine differed by 3 to 12 % (docs/precompute.md)
ONCE = 0.5  # what is seen only once, such as the start of an engine, may be so far off: files that are read again are read faster
ASSUMED = f"assumed: {DRIFT:.0%} for a machine that drifts, {ONCE:.0%} for what is seen once (start, filling, emptying)"

Floats = npt.NDArray[np.float64]


class Bounds(Config):
    """A figure and its bounds."""

    value: float = Field(description="the estimate")
    low: float = Field(description="lower bound at 95 %")
    high: float = Field(description="upper bound at 95 %")


class Moments(Config):
    """A figure per row over a sample of rows."""

    mean: float = Field(description="arithmetic mean")
    sd: float = Field(description="standard deviation, n - 1")
    skew: float = Field(0.0, description="skewness: 0 for a symmetrical figure, above it when few rows are far longer than the rest")


class EnginePace(Config):
    """How fast an engine was. A row's work is 1 + its answer tokens: prompts are similar and mostly cached."""

    rows: int = Field(ge=1, description="rows that were timed")
    at_once: int = Field(ge=1, description="rows that the engine works on at a time")
    steady: bool = Field(description="whether the engine was full for long enough; if not, unit_s is an upper bound")
    unit_s: float = Field(ge=0, description="seconds of one engine per unit of work")
    error: float = Field(ge=0, description="half the 95 % interval of unit_s, as a share of it")
    ramp_s: float = Field(0.0, ge=0, description="seconds lost until the engine is full, once per worker: caches fill, kernels are built")
    drain_s: float = Field(0.0, ge=0, description="seconds lost while the engine runs empty, once per chain of shards")


class Probe(Config):
    """The result of the rows that were asked to estimate the others. The job reuses its answers."""

    path: AnswersPath = Field(description="the probe's folder: a job like any other")
    rows: int = Field(ge=1, description="rows of the sample")
    states: dict[str, int] = Field(description="rows by state")
    tokens_in: Moments = Field(description="prompt tokens of a row")
    tokens_out: Moments = Field(description="answer tokens of a row")
    work: Moments = Field(description="work of a row, see EnginePace")
    pace: EnginePace = Field(description="how fast the engine was")
    start_s: float = Field(ge=0, description="seconds until the engine was up")
    setup_s: float = Field(ge=0, description="seconds for all else: cluster, actors, reading, publishing")
    seconds: float = Field(ge=0, description="engine time of the rows that this probe asked itself")
    usd: float | None = Field(ge=0, description="USD that this probe cost; null when no price is known")
    how: dict[str, Any] = Field({}, description="engine settings that change its pace and no answer: cores, GPUs, rows at a time")


class Estimate(Config):
    """What the rows that are left will take."""

    rows: int = Field(ge=0, description="rows an engine is still to be asked")
    tokens_in: Bounds = Field(description="prompt tokens")
    tokens_out: Bounds = Field(description="answer tokens")
    engine_s: Bounds = Field(description="engine time in seconds, all workers together, starts left out")
    wall_s: Bounds = Field(description="seconds from start to end with the configured workers")
    usd: Bounds | None = Field(
        description="USD: workers for engine time and start, and tokens where a provider bills them; null when no price is known"
    )
    exact: bool = Field(False, description="nothing is left: the probe was all there was to ask")
    at_most: bool = Field(False, description="the probe was too small for this engine: time and money are upper bounds")


def moments(values: Any) -> Moments:
    """Mean and standard deviation of a column."""
    found = np.asarray(values, np.float64)
    spread = float(found.std())
    skew = float(((found - found.mean()) ** 3).mean()) / spread**3 if spread > 1e-9 * abs(float(found.mean())) else 0.0
    return Moments(mean=float(found.mean()), sd=float(found.std(ddof=1)) if len(found) > 1 else 0.0, skew=skew)


def pace(place: npt.NDArray[np.int64], seconds: Floats, work: Floats, at_once: int, spent_s: float) -> EnginePace:
    """The pace of an engine from rows in the order they were finished.

    `place` says as how-manieth a row was asked, `seconds` is the time since the row before was finished, `spent_s` all engine
    time, which exceeds their sum when rows were asked twice. A row begins when one before it leaves a free place and works
    evenly to its end. The engine is full until the last row begins. The first `at_once` rows are left out: they begin together.
    """
    count, total = len(seconds), float(seconds.sum())
    ended = np.cumsum(seconds)
    scale = spent_s / total if total > 0 else 1.0
    steady = count >= max(FEWEST, 3 * at_once) and ended[count - at_once - 1] > ended[at_once - 1]
    if not steady:
        return EnginePace(rows=count, at_once=at_once, steady=False, unit_s=spent_s / float(work.sum()), error=0.0)
    finished, units = np.empty(count), np.empty(count)
    finished[place], units[place] = ended, work
    begun = np.concatenate([np.zeros(at_once), ended[: count - at_once]])
    begun = np.minimum(begun, finished)
    lasted = np.maximum(finished - begun, 1e-9)

    def done(at: float) -> float:
        return float((units * np.clip((at - begun) / lasted, 0, 1)).sum())

    edges = np.linspace(ended[at_once - 1], ended[count - at_once - 1], BATCHES + 1)
    reached = np.array([done(at) for at in edges])
    rates = np.diff(reached) / np.diff(edges)
    unit_s = (edges[-1] - edges[0]) / (reached[-1] - reached[0])
    half = _t(BATCHES) * rates.std(ddof=1) / math.sqrt(BATCHES) / rates.mean()
    ramp = edges[0] - reached[0] * unit_s
    drain = total - edges[-1] - (float(units.sum()) - reached[-1]) * unit_s
    return EnginePace(
        rows=count,
        at_once=at_once,
        steady=True,
        unit_s=unit_s * scale,
        error=float(half),
        ramp_s=max(0.0, ramp * scale),
        drain_s=max(0.0, drain * scale),
    )


def predict(each: Moments, seen: int, left: int) -> Bounds:
    """The sum over `left` rows of which none was seen, from `seen` others drawn from the same rows at random.

    The wider of the t-interval and Hall's (1992, JRSS B 54), which allows for skewness: lengths of texts are skewed, and a t-interval
    misses too often above.
    """
    value = each.mean * left
    if not left:
        return Bounds(value=0, low=0, high=0)
    if seen < 2:
        return Bounds(value=value, low=0, high=2 * value)
    error, t = left * each.sd * math.sqrt(1 / seen + 1 / left), _t(seen)
    return Bounds(
        value=value, low=max(0.0, value - error * max(t, _skewed(t, each, seen))), high=value + error * max(t, -_skewed(-t, each, seen))
    )


def _skewed(t: float, each: Moments, seen: int) -> float:
    """Standard errors that take the place of `t` when the figure is skewed: the inverse of Hall's cubic transformation."""
    a = each.skew / math.sqrt(seen)
    return 3 / a * (math.cbrt(1 + a * (t - a / 6)) - 1) if abs(a) > 1e-6 else t


def _t(count: int) -> float:
    return float(special.stdtrit(count - 1, (1 + CONFIDENCE) / 2))


def estimate(probe: Probe, left: int, chains: int, limits: Limits) -> Estimate:
    """What `left` further rows take, in `chains` Ray tasks on the workers and at the prices of `limits`."""
    tokens_in, tokens_out = (predict(each, probe.rows, left) for each in (probe.tokens_in, probe.tokens_out))
    if not left:
        nothing = Bounds(value=0, low=0, high=0)
        return Estimate(rows=0, tokens_in=nothing, tokens_out=nothing, engine_s=nothing, wall_s=nothing, usd=nothing, exact=True)
    found, workers = probe.pace, min(limits.workers, chains)
    running = _running(probe, left)
    engine = _plus(running, _once(chains * found.drain_s + workers * found.ramp_s))
    rounds = math.ceil(chains / workers) / chains  # share of all chains that the busiest worker gets
    before = _once(probe.start_s + probe.setup_s + found.ramp_s)
    wall = _plus(before, _times(_plus(running, _once(chains * found.drain_s)), rounds))
    held = _plus(engine, _once(probe.start_s * limits.workers))
    ends = ("value", "low", "high")
    usd = Bounds(**{end: limits.price(*(getattr(span, end) for span in (held, tokens_in, tokens_out))) for end in ends})
    return Estimate(
        rows=left,
        tokens_in=tokens_in,
        tokens_out=tokens_out,
        engine_s=engine,
        wall_s=wall,
        usd=usd if limits.priced else None,
        at_most=not found.steady,
    )


def _running(probe: Probe, left: int) -> Bounds:
    """Engine time of the rows themselves: work times time per unit; the errors of both and the machine's own drift add as squares."""
    work, found = predict(probe.work, probe.rows, left), probe.pace
    value = work.value * found.unit_s
    down, up = (math.hypot((end - work.value) / work.value, found.error, DRIFT) if work.value else 0.0 for end in (work.low, work.high))
    return Bounds(value=value, low=max(0.0, value * (1 - down)) if found.steady else 0.0, high=value * (1 + up))


def _once(value: float) -> Bounds:
    return Bounds(value=value, low=value * (1 - ONCE), high=value * (1 + ONCE))


def _plus(one: Bounds, other: Bounds) -> Bounds:
    return Bounds(value=one.value + other.value, low=one.low + other.low, high=one.high + other.high)


def _times(span: Bounds, factor: float) -> Bounds:
    return Bounds(value=span.value * factor, low=span.low * factor, high=span.high * factor)


def budget_problem(estimate: Estimate, limits: Limits, spent_s: float = 0.0) -> str:
    """Which budget the upper bound exceeds, in words, or nothing. `spent_s`: engine time of earlier runs of the job."""
    said = []
    if limits.seconds and estimate.wall_s.high > limits.seconds:
        said.append(f"it may take up to {estimate.wall_s.high:,.0f} s, budget_seconds={limits.seconds:g}")
    usd = limits.price(estimate.wall_s.high * limits.workers + spent_s, estimate.tokens_in.high, estimate.tokens_out.high)
    if limits.usd and usd > limits.usd:
        said.append(f"it may cost up to USD {usd:,.4g}, budget_usd={limits.usd:g}")
    return "; ".join(said)
