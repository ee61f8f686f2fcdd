"""The figures of a design, from the outcome of its flow: latency, queues, cost, the machines that a target takes.

In: outcomes, prices, a target. Out: parts of the Result. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from headtail.core.intervals import Array
from headtail.core.rows import STRATA, Source
from headtail.stages.simulate.config import SimulatedPrices, Target
from headtail.stages.simulate.design import ServiceTimes, ServingDesign
from headtail.stages.simulate.flow import CACHE, DYNAMIC, ESCALATED, FALLBACK, REALTIME, WAYS, WHY, Arrivals, FlowOutcome, simulate_flow
from headtail.stages.simulate.result import CostFigures, LatencyFigures, NeededMachines, QueueFigures, WayFigures

LATE = (WHY.index("timeout"), WHY.index("overloaded"))


def latency_figures(seconds: Array) -> LatencyFigures | None:
    """Quantiles in milliseconds; None without any."""
    if not len(seconds):
        return None
    p50, p95, p99 = (float(1000 * value) for value in np.quantile(seconds, [0.5, 0.95, 0.99]))
    return LatencyFigures(p50_ms=p50, p95_ms=p95, p99_ms=p99)


def way_figures(outcome: FlowOutcome) -> dict[str, WayFigures]:
    """By way, those that were taken."""
    made = {}
    for place, name in enumerate(WAYS):
        some = outcome.seconds[outcome.way == place]
        if len(some):
            made[name] = WayFigures(requests=len(some), share=len(some) / len(outcome.way), latency=latency_figures(some))
    return made


def reason_counts(outcome: FlowOutcome) -> dict[str, int]:
    """Requests by reason, where there is one."""
    counts = np.bincount(outcome.why, minlength=len(WHY))
    return {name: int(count) for name, count in zip(WHY, counts, strict=True) if name and count}


def queue_figures(outcome: FlowOutcome, design: ServingDesign) -> dict[str, QueueFigures]:
    """By kind of process, those that there are."""
    many = {"front": design.fronts, "student": design.students, "escalation": design.escalation.slots}
    came = {
        "front": np.ones(len(outcome.way), np.bool_),
        "student": np.isin(outcome.way, (REALTIME, ESCALATED)),
        "escalation": outcome.way == ESCALATED,
    }
    waits = {"front": outcome.front_wait, "student": outcome.student_wait, "escalation": outcome.bigger_wait}
    made = {}
    for name, processes in many.items():
        if not processes:
            continue
        some = waits[name][came[name]]
        p50, p99 = (1000 * np.quantile(some, [0.5, 0.99])).tolist() if len(some) else (0.0, 0.0)
        made[name] = QueueFigures(
            processes=processes, busy=outcome.busy[name], longest=outcome.longest[name], wait_p50_ms=p50, wait_p99_ms=p99
        )
    return made


def late_share(outcome: FlowOutcome) -> float:
    """Share of the requests whose fallback comes from a student that is late or overloaded."""
    return float(np.isin(outcome.why, LATE).mean())


def needed_machines(
    arrivals: Arrivals, design: ServingDesign, times: ServiceTimes, outcome: FlowOutcome, target: Target, seed: int
) -> tuple[ServingDesign, FlowOutcome, bool]:
    """The design with the fewest processes that meet the target, its outcome, and whether it does. Each process has a core of its own."""

    def attempt(fronts: int, students: int) -> tuple[ServingDesign, FlowOutcome, bool]:
        one = design.model_copy(update={"fronts": fronts, "students": students})
        found = simulate_flow(arrivals, one, times, seed)
        return one, found, float(np.quantile(found.seconds, 0.99)) * 1000 <= target.p99_ms and late_share(found) <= target.late_share

    def fewest(fronts: int) -> tuple[ServingDesign, FlowOutcome, bool]:
        if not design.students:
            return attempt(fronts, 0)
        low, best = 0, attempt(fronts, 1)
        while not best[2] and best[0].students < target.most_students:
            low = best[0].students
            best = attempt(fronts, min(2 * low, target.most_students))
        while best[2] and best[0].students - low > 1:
            middle = attempt(fronts, (low + best[0].students) // 2)
            low, best = (low, middle) if middle[2] else (middle[0].students, best)
        return best

    best = fewest(_fronts_needed(arrivals, outcome, design.fronts, target))
    again = _fronts_needed(arrivals, best[1], best[0].fronts, target)
    return fewest(again) if again > best[0].fronts else best  # misses that an overloaded front sheds are no work for it until then


def _fronts_needed(arrivals: Arrivals, outcome: FlowOutcome, fronts: int, target: Target) -> int:
    """By their work per second of arrivals: what was left over when the last request came is work too, and no front is busy beyond 1."""
    came = max(float(arrivals.at[-1] - arrivals.at[0]), min(outcome.span_s, 1.0))  # a handful within a millisecond is no rate
    return max(1, math.ceil(outcome.busy["front"] * fronts * outcome.span_s / came / target.front_busy))


def needed_figures(found: tuple[ServingDesign, FlowOutcome, bool], cost: CostFigures) -> NeededMachines:
    """What `needed_machines` found, and its cost."""
    design, outcome, met = found
    latency = latency_figures(outcome.seconds)
    assert latency is not None
    return NeededMachines(
        fronts=design.fronts,
        students=design.students if met else None,
        p99_ms=latency.p99_ms,
        late_share=late_share(outcome),
        usd_per_million=cost.total if met else None,
    )


def cost_figures(
    design: ServingDesign,
    outcome: FlowOutcome,
    prices: SimulatedPrices,
    rows: Mapping[str, int],
    per_million: Mapping[str, float],
    day_requests: float,
) -> CostFigures:
    """USD per million requests. `rows`: answers of the cache by source; `per_million`: what a million of them cost."""
    hour = _sum(_times(design.fronts, prices.front_usd_per_hour), _times(design.students, prices.student_usd_per_hour))
    machines = None if hour is None else 24 * hour / day_requests * 1e6
    made = _sum(*(_times(count, per_million.get(source)) for source, count in rows.items() if source != Source.HUMAN_OVERRIDE))
    ahead = None if made is None else made / prices.kept_days / day_requests
    escalation = _times(int((outcome.way == ESCALATED).sum()) / len(outcome.way), prices.escalated_usd_per_million)
    return CostFigures(machines=machines, ahead=ahead, escalation=escalation, total=_sum(machines, ahead, escalation))


def answer_counts(
    outcome: FlowOutcome, cached: npt.NDArray[np.object_], strata: npt.NDArray[np.int8], realtime: str, bigger: str
) -> dict[str, Array]:
    """Requests of each stratum by the source of the evaluation that stands for who answered. `cached`: source of the cache's answer."""
    names = {DYNAMIC: realtime, REALTIME: realtime, ESCALATED: bigger, FALLBACK: str(Source.FALLBACK)}
    found: dict[str, Array] = {}
    for way, name in names.items():
        _add(found, name, strata[outcome.way == way])
    hit = outcome.way == CACHE
    for name in set(cached[hit]) - {Source.HUMAN_OVERRIDE}:  # a person's answer is not measured by people's labels
        _add(found, str(name), strata[hit & (cached == name)])
    return found


def _add(found: dict[str, Array], name: str, strata: npt.NDArray[np.int8]) -> None:
    if len(strata):
        found[name] = found.get(name, np.zeros(len(STRATA))) + np.bincount(strata, minlength=len(STRATA))


def _times(count: float, price: float | None) -> float | None:
    return 0.0 if not count else None if price is None else count * price


def _sum(*parts: float | None) -> float | None:
    return None if None in parts else sum(part for part in parts if part is not None)
