"""The simulator against queueing theory, against rules that a server keeps, and whole on a small store."""

from __future__ import annotations

import datetime
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from conftest import keep
from headtail.adapters.storage import Storage, write_table
from headtail.adapters.storage.receipts import output_table
from headtail.core.config import TrackingConfig, build_config
from headtail.core.errors import ConfigError, InputError
from headtail.core.keys import query_key
from headtail.core.receipt import Receipt
from headtail.core.rows import HOLDOUT, PLANNED, QUERY, REQUEST_LOG, SCORED, STRATA
from headtail.core.task import Task
from headtail.releases import release
from headtail.stages import simulate
from headtail.stages.simulate.config import SimulatedPrices, Target
from headtail.stages.simulate.design import EscalationDesign, ServiceTimes, ServingDesign
from headtail.stages.simulate.events import timed_requests
from headtail.stages.simulate.figures import cost_figures, needed_machines, queue_figures, reason_counts, way_figures
from headtail.stages.simulate.flow import CACHE, DYNAMIC, ESCALATED, FALLBACK, REALTIME, Arrivals, FlowOutcome, simulate_flow
from headtail.stages.simulate.quality import mixture_quality, mixture_sums, quality_difference, scored_cells, why_unknown
from headtail.stages.simulate.traffic import busiest_stretch
from test_cache import answers, good, publish

N = 20_000
EXPONENTIAL = tuple((1000 * np.random.default_rng(9).exponential(1, 50_000)).tolist())  # ms, mean 1 s
NOTHING: dict[str, Any] = {"wire_ms": (0,), "front_ms": (0,), "miss_ms": (0,), "row_share": 0}


def design(**fields: Any) -> ServingDesign:
    """One front, one student, and no limit that matters."""
    return ServingDesign(**{"name": "d", "fronts": 1, "realtime_timeout_ms": 1e9, "max_misses": 10**9, "dynamic_ttl_s": 0} | fields)


def times(**fields: Any) -> ServiceTimes:
    return ServiceTimes(**NOTHING | fields)


def poisson(rate: float, cached: bool, n: int = N, queries: int = 0) -> Arrivals:
    rng = np.random.default_rng(3)
    query = rng.integers(queries, size=n) if queries else np.arange(n)
    return Arrivals(np.cumsum(rng.exponential(1 / rate, n)), query, np.full(n, cached))


def erlang_wait(rate: float, servers: int) -> float:
    """Mean wait of M/M/c with a mean service of 1 s (Erlang C)."""
    last = rate**servers / math.factorial(servers) * servers / (servers - rate)
    return last / (sum(rate**k / math.factorial(k) for k in range(servers)) + last) / (servers - rate)


@pytest.mark.parametrize("service, wait", [(EXPONENTIAL, 0.6 / 0.4), ((1000,), 0.6 / 0.8)])
def test_a_front_is_one_server_with_a_queue(service: tuple[float, ...], wait: float) -> None:
    """M/M/1 and M/D/1 (Pollaczek-Khinchine) at a load of 0.6."""
    found = simulate_flow(poisson(0.6, True), design(), times(front_ms=service), 1)
    assert found.front_wait.mean() == pytest.approx(wait, rel=0.08)
    assert found.busy["front"] == pytest.approx(0.6, rel=0.03)


@pytest.mark.parametrize("servers", [2, 4])
def test_slots_are_servers_before_one_queue(servers: int) -> None:
    """M/M/c at a load of 0.7."""
    found = simulate_flow(poisson(0.7 * servers, False), design(slots=servers), times(student_ms=EXPONENTIAL), 1)
    assert found.student_wait.mean() == pytest.approx(erlang_wait(0.7 * servers, servers), rel=0.12)
    assert found.busy["student"] == pytest.approx(0.7, rel=0.03)


@pytest.mark.parametrize("rate", [0.3, 1.5, 4.0])
def test_what_waits_together_is_one_batch(rate: float) -> None:
    """With batches that all take 1 s: a cycle has `rate` arrivals that wait half a batch on average, and, with the chance that
    nobody came, one that waits for nothing."""
    found = simulate_flow(poisson(rate, False), design(), times(student_ms=(1000,)), 1)
    assert found.student_wait.mean() == pytest.approx(rate / 2 / (rate + math.exp(-rate)), rel=0.03)
    assert found.batch_rows == pytest.approx(rate + math.exp(-rate), rel=0.03)


def test_cores_are_shared_evenly() -> None:
    """Forty fronts on two cores are M/M/2 with shared cores, whose time in the system is that of M/M/2."""
    found = simulate_flow(poisson(1.2, True), design(fronts=40), times(front_ms=EXPONENTIAL), 1, cores=2)
    assert found.seconds.mean() == pytest.approx(1 + erlang_wait(1.2, 2), rel=0.06)


def mixed(n: int = 6000, rate: float = 300) -> Arrivals:
    rng = np.random.default_rng(5)
    query = np.minimum(rng.zipf(1.3, n), 3000)
    return Arrivals(np.cumsum(rng.exponential(1 / rate, n)), query, query % 3 == 0)


FULL = design(
    fronts=2, students=2, realtime_timeout_ms=150, max_misses=9, dynamic_ttl_s=5, dynamic_answers=50,
    escalation=EscalationDesign(slots=3, unsure_share=0.3, timeout_ms=300, per_minute=900, max_waiting=5),
)  # fmt: skip
REAL = ServiceTimes(student_ms=tuple(np.random.default_rng(1).exponential(40, 500).tolist()), escalated_ms=(50, 100, 400))


def check_requests(arrivals: Arrivals, one: ServingDesign, found: FlowOutcome) -> None:
    """Each request is answered once, by what could answer it, and within its limits."""
    assert len(found.way) == len(arrivals.at)
    assert ((found.way == CACHE) == arrivals.cached).all()
    assert sum(way.requests for way in way_figures(found).values()) == len(arrivals.at)
    assert (found.why[found.way == FALLBACK] > 0).all()
    assert not found.why[np.isin(found.way, (CACHE, DYNAMIC, ESCALATED))].any()
    assert (found.seconds + 1e-9 >= found.front_wait + found.student_wait * (found.way == REALTIME)).all()
    assert all(0 <= busy <= 1 for busy in found.busy.values())
    late = (one.realtime_timeout_ms + (one.escalation.timeout_ms if one.escalation.slots else 0)) / 1000
    assert (found.seconds - found.front_wait).max() <= late + 0.1


def test_requests_are_conserved_under_every_limit() -> None:
    arrivals = mixed()
    found = simulate_flow(arrivals, FULL, REAL, 1)
    check_requests(arrivals, FULL, found)
    assert {"cache", "dynamic", "realtime", "escalated", "fallback"} == set(way_figures(found))
    assert {"timeout", "overloaded", "unsure"} == set(reason_counts(found))
    assert set(queue_figures(found, FULL)) == {"front", "student", "escalation"}
    again, other = simulate_flow(arrivals, FULL, REAL, 1), simulate_flow(arrivals, FULL, REAL, 2)
    assert (again.seconds == found.seconds).all()
    assert (again.way == found.way).all()
    assert (other.seconds != found.seconds).any()


@pytest.mark.parametrize(
    "change, ways",
    [
        ({"students": 0, "escalation": EscalationDesign()}, {"cache", "fallback"}),
        ({"dynamic_ttl_s": 0, "escalation": EscalationDesign(), "realtime_timeout_ms": 1e6, "max_misses": 10**6}, {"cache", "realtime"}),
        ({"dynamic_shared": True, "slots": 8}, {"cache", "dynamic", "realtime", "escalated", "fallback"}),
    ],
)
def test_each_design_answers_by_what_it_has(change: dict[str, Any], ways: set[str]) -> None:
    one = FULL.model_copy(update=change)
    found = simulate_flow(mixed(), one, REAL, 1)
    check_requests(mixed(), one, found)
    assert set(way_figures(found)) == ways


def test_the_dynamic_tier_answers_again_until_its_time_is_over() -> None:
    at = np.array([0.0, 1.0, 2.0, 5.5, 6.5])
    arrivals = Arrivals(at, np.zeros(5, np.int64), np.zeros(5, np.bool_))
    found = simulate_flow(arrivals, design(dynamic_ttl_s=5), times(student_ms=(100,)), 1)
    assert found.way.tolist() == [REALTIME, DYNAMIC, DYNAMIC, REALTIME, DYNAMIC]
    assert found.seconds[[0, 3]] == pytest.approx([0.1, 0.1])


def test_budget_of_escalations_is_of_a_minute() -> None:
    rules = EscalationDesign(slots=9, unsure_share=1, per_minute=3)
    found = simulate_flow(
        Arrivals(np.arange(80, dtype=np.float64), np.arange(80), np.zeros(80, np.bool_)),
        design(escalation=rules),
        times(student_ms=(1,)),
        1,
    )
    assert np.flatnonzero(found.way == ESCALATED).tolist() == [0, 1, 2, 60, 61, 62]
    assert reason_counts(found) == {"unsure": 74}


def test_the_fewest_students_that_meet_the_target() -> None:
    """Engines that answer one row at a time (slots=1), 50 ms each, for 60 misses a second: three would just not do, for ever more wait."""
    arrivals, one = poisson(60, False, 6000), design(slots=1, fronts=1)
    target = Target(p99_ms=150)
    first = simulate_flow(arrivals, one, times(student_ms=(50,)), 1)
    found, outcome, met = needed_machines(arrivals, one, times(student_ms=(50,)), first, target, 1)
    fewer = simulate_flow(arrivals, found.model_copy(update={"students": found.students - 1}), times(student_ms=(50,)), 1)
    assert met
    assert found.students >= 4
    assert np.quantile(outcome.seconds, 0.99) <= 0.15 < np.quantile(fewer.seconds, 0.99)
    assert not needed_machines(arrivals, one, times(student_ms=(200,)), first, Target(p99_ms=150, most_students=8), 1)[2]


def test_fronts_that_are_overloaded_are_counted_by_the_work_that_came() -> None:
    """Requests of 10 ms, 1,000 a second: ten fronts at work. One front alone is busy all the time, and for ten times as long."""
    arrivals, service = poisson(1000, True, 6000), times(front_ms=(10,))
    first = simulate_flow(arrivals, design(), service, 1)
    found, outcome, met = needed_machines(arrivals, design(students=0), service, first, Target(), 1)
    assert met
    assert found.fronts == pytest.approx(10 / 0.7, abs=1)
    assert outcome.busy["front"] <= 0.72


def test_cost_is_of_machines_answers_and_escalations() -> None:
    found = simulate_flow(mixed(), FULL, REAL, 1)
    prices = SimulatedPrices(front_usd_per_hour=0.5, student_usd_per_hour=1, escalated_usd_per_million=1000, kept_days=10)
    cost = cost_figures(FULL, found, prices, {"teacher": 2000, "human_override": 5}, {"teacher": 500.0}, 1e6)
    escalated = float((found.way == ESCALATED).mean())
    assert (cost.machines, cost.ahead, cost.escalation) == pytest.approx((24 * 3, 1.0 / 10, 1000 * escalated))
    assert cost.total == pytest.approx(72.1 + 1000 * escalated)
    unknown = cost_figures(FULL, found, SimulatedPrices(), {"teacher": 2000}, {}, 1e6)
    assert (unknown.machines, unknown.ahead, unknown.total) == (None, None, None)


def scored(stratum: str, source: str, key: int, tp: int, inclusion: float | None = 0.5) -> dict[str, Any]:
    return {
        "query_key": key.to_bytes(16),
        "stratum": stratum,
        "source": source,
        "tp": tp,
        "fp": 1 - tp,
        "fn": 1 - tp,
        "inclusion": inclusion,
    }


def test_quality_weighs_each_stratum_by_its_requests() -> None:
    """The teacher is right on 9 of 10 rows everywhere, the fallback on half of the head and none of the tail."""
    rows = [
        scored(stratum, source, 100 * place + key, int(right))
        for place, stratum in enumerate(STRATA)
        for key in range(40)
        for source, right in (("teacher", key % 10 > 0), ("fallback", stratum == "head" and key % 2 == 0))
    ]
    cells = scored_cells(table(SCORED, rows), 0)
    teacher, fallback = (mixture_sums(cells, {s: np.array([60.0, 20, 10, 10])}) for s in ("teacher", "fallback"))
    part = mixture_sums(cells, {"teacher": np.array([60.0, 0, 0, 0]), "fallback": np.array([0, 20.0, 10, 10])})
    assert teacher
    assert fallback
    assert part
    whole, head = mixture_quality(cells, part), mixture_quality(cells, fallback, 0)
    assert whole
    assert whole.low < whole.value < whole.high
    assert (round(whole.value, 9), whole.rows) == (0.54, 160)
    assert head
    assert (head.value, head.rows) == (0.5, 40)
    value, low, high = quality_difference(fallback, teacher)
    assert value == pytest.approx(0.3 - 0.9)
    assert low < value < high < 0
    same, least, most = quality_difference(teacher, teacher)
    assert same == 0
    assert -0.06 < least < -0.02, "two sources that agree on these rows may differ on others"
    assert most == -least
    assert mixture_sums(cells, {"batch_student": np.array([1.0, 0, 0, 0])}) is None


def test_a_labelled_row_counts_as_what_it_stands_for() -> None:
    """A third of the rows was drawn with a tenth of the others' chance, and is wrong: it stands for 10 of 12 parts. Of rows of which nobody
    knows how they were drawn there is no figure."""
    rows = [scored("head", "teacher", key, int(key % 3 > 0), 0.05 if key % 3 == 0 else 0.5) for key in range(180)]
    requests = {"teacher": np.array([5.0, 0, 0, 0])}
    cells = scored_cells(table(SCORED, rows), 0)
    sums = mixture_sums(cells, requests)
    assert sums
    found = mixture_quality(cells, sums)
    assert found
    assert found.value == pytest.approx(2 / 12)
    twins = scored_cells(table(SCORED, [row | {"cluster": place // 6 * 3 + place % 3} for place, row in enumerate(rows)]), 0)
    together = mixture_sums(twins, requests)
    assert together
    pair = mixture_quality(twins, together)
    assert pair
    assert pair.high - pair.low > found.high - found.low
    assert mixture_sums(scored_cells(table(SCORED, [row | {"inclusion": None} for row in rows]), 0), requests) is None


def test_few_rows_say_little_of_a_design() -> None:
    """One label per stratum, all right: no figure. Forty, all right: an interval, and a difference that is not shown to be small."""
    requests = np.array([60.0, 20, 10, 10])

    def designs(each: int) -> tuple[Any, Any, Any]:
        made = [scored(s, who, 100 * p + k, 1) for p, s in enumerate(STRATA) for k in range(each) for who in ("teacher", "fallback")]
        cells = scored_cells(table(SCORED, made), 0)
        return cells, mixture_sums(cells, {"teacher": requests}), mixture_sums(cells, {"fallback": requests})

    cells, first, second = designs(1)
    assert (first, second) == (None, None)
    assert "fewer than 30" in why_unknown(cells, {"teacher": requests})
    cells, first, second = designs(10)
    assert first is None, "40 rows with weights of 60, 20, 10 and 10 count as 24"
    cells, first, second = designs(40)
    found = mixture_quality(cells, first)
    assert found
    assert (found.value, found.high) == (1.0, 1.0)
    assert 0.95 < found.low < 0.98
    assert quality_difference(second, first) == pytest.approx((0.0, -0.038, 0.038), abs=0.002)


def test_intervals_of_few_rows_cover() -> None:
    """Truth 0.97 and a rival that is right on the same rows but for one in a hundred: 95 % intervals hold in at least 93 % of 300 draws."""
    rng, held, paired = np.random.default_rng(0), 0, 0
    for _ in range(300):
        mine = rng.random(80) < 0.97
        other = mine & (rng.random(80) >= 0.01)
        rows = [scored(STRATA[k % 4], who, k, int(ok[k])) for k in range(80) for who, ok in (("teacher", mine), ("fallback", other))]
        cells = scored_cells(table(SCORED, rows), 0)
        first, second = (mixture_sums(cells, {who: np.full(4, 25.0)}) for who in ("teacher", "fallback"))
        assert first
        assert second
        found = mixture_quality(cells, first)
        assert found
        held += found.low <= 0.97 <= found.high
        _, low, high = quality_difference(second, first)
        paired += low <= -0.0097 <= high
    assert held >= 279
    assert paired >= 279


@pytest.mark.parametrize("rest", [0.5, 50.0])
def test_a_part_that_has_rested_is_slower(rest: float) -> None:
    """Requests that come one at a time, each after a rest of so many seconds."""
    rests = {"rest_ms": (0, 1000), "front_rest": (0.4, 1), "student_rest": (0.2, 1)}
    service = times(front_ms=(100,), miss_ms=(100,), student_ms=(1000,), **rests)
    share = {name: 1 - (1 - shares[0]) * (1 - min(rest, 1)) for name, shares in rests.items() if name != "rest_ms"}
    hit = 0.1 * share["front_rest"]
    hits = Arrivals(np.linspace(1, 1 + 48 * (rest + hit), 49), np.arange(49), np.full(49, True))
    assert simulate_flow(hits, design(), service, 1).seconds[9:] == pytest.approx(np.full(40, hit), rel=1e-4)
    misses = Arrivals(np.linspace(1, 48_001, 49), np.arange(49), np.full(49, False))
    assert simulate_flow(misses, design(), service, 1).seconds == pytest.approx(np.full(49, 1.2))  # the front rests while the student works


def test_a_part_without_rest_keeps_its_pace() -> None:
    """All at once: the first request finds parts that have rested, the others do not."""
    service = times(front_ms=(100,), student_ms=(1000,), rest_ms=(0, 10), front_rest=(0.4, 1), student_rest=(0.2, 1))
    hits = Arrivals(np.zeros(5), np.arange(5), np.full(5, True))
    assert simulate_flow(hits, design(), service, 1).seconds == pytest.approx([0.1, 0.14, 0.18, 0.22, 0.26])
    misses = Arrivals(np.zeros(2), np.arange(2), np.full(2, False))
    assert simulate_flow(misses, design(slots=2), service, 1).seconds == pytest.approx([1.1, 0.14 + 0.2])
    assert simulate_flow(misses, design(), service, 1).seconds == pytest.approx([1.1, 1.3])


def test_rests_and_their_shares_belong_together() -> None:
    with pytest.raises(ValidationError, match="give as many values of each"):
        times(rest_ms=(0, 2))
    with pytest.raises(ValidationError, match="ascending order"):
        times(rest_ms=(2, 0), front_rest=(1, 1), student_rest=(1, 1))


def test_the_busiest_stretch() -> None:
    at = np.array([0, 10, 20, 21, 22, 23, 40, 50.0])
    assert (busiest_stretch(at, 4), busiest_stretch(at, 8)) == (slice(2, 6), slice(0, 8))


COUNTS = {"often": 60, "twice": 2, "once": 1}  # in the log before the cut
HELD_OUT = {"often": 30, "twice": 6, "once": 3, "new": 11}
CACHED = {"often": "teacher", "twice": "batch_student"}


def table(schema: pa.Schema, rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist([dict.fromkeys(schema.names) | row for row in rows], schema=schema)


@pytest.fixture
def filled(store: Storage, tmp_path: Path, intent: Task) -> Storage:
    """A log with a head of one query, a release, and labelled rows: the teacher is right, the student on 3 of 4, the fallback on 1 of 4."""
    named = [{"query_key": query_key(query), "query": query, "count": count} for query, count in COUNTS.items()]
    later = [{"query_key": query_key(q), "query": q, "count": count, "seen": q != "new"} for q, count in HELD_OUT.items()]
    keep(store, "ingest", "1" * 16, {"queries": table(QUERY, named), "holdout": table(HOLDOUT, later)})
    keep(store, "plan", "2" * 16, {"head": table(PLANNED, named[:1])})
    scores = {"teacher": 4, "batch_student": 3, "fallback": 1}
    labelled = [
        scored(stratum, source, 100 * place + key, int(key % 4 < right))
        for place, stratum in enumerate(STRATA)
        for key in range(40)
        for source, right in scores.items()
    ]
    keep(store, "evaluate", "3" * 16, {"rows": table(SCORED, labelled)})
    rows = answers(*(good(query, '{"intent":"browse"}', source) for query, source in CACHED.items()))
    _, manifest = publish(store, tmp_path, rows)
    release.promote(store, release.make_release(store, snapshot=manifest.id, task=intent, student="distill/x").id)
    return store


def run(store: Storage, **fields: Any) -> Receipt[simulate.Result]:
    prices = {"front_usd_per_hour": 1, "student_usd_per_hour": 2, "cached_usd_per_million": {"teacher": 0, "batch_student": 0}}
    own = {"root": store.root, "tracking": TrackingConfig(enabled=False), "task": "query_intent", "prices": prices}
    return simulate.run(build_config(simulate.Config, {**own, **fields}, where="test"))


def test_designs_side_by_side(filled: Storage) -> None:
    receipt = run(filled)
    found = {one.name: one for one in receipt.result.designs}
    assert {
        name: {way: part.requests for way, part in one.ways.items() if way in ("cache", "fallback")} for name, one in found.items()
    } == {
        "as_served": {"cache": 36},
        "head_and_student": {"cache": 30},
        "student_alone": {},
        "no_student": {"cache": 36, "fallback": 14},
        "heuristic_alone": {"fallback": 50},
    }
    for one in found.values():
        assert sum(part.requests for part in one.ways.values()) == one.requests == 50
        assert {name: part.share for name, part in one.quality.strata.items()} == {"head": 0.6, "torso": 0.12, "tail": 0.06, "unseen": 0.22}
    values = {name: one.quality.value for name, one in found.items()}
    assert values == pytest.approx(
        {
            "as_served": 0.6 + 0.4 * 0.75,
            "head_and_student": 0.9,
            "student_alone": 0.75,
            "no_student": 0.6 + 0.12 * 0.75 + 0.28 * 0.25,
            "heuristic_alone": 0.25,
        }
    )
    assert (receipt.result.best, receipt.result.enough) == ("as_served", ())
    machines = 24 * 1e6 / (50 * 86_400)  # of 1 USD per hour, per million of 50 requests/s
    assert found["as_served"].cost.total == pytest.approx(4 * machines)
    assert found["no_student"].cost.total == pytest.approx(2 * machines)
    assert found["no_student"].needed.students == 0
    assert "is not shown to be enough" in receipt.result.decision[0]
    assert {"latency", "designs.svg"} == receipt.outputs.keys()
    assert output_table(filled, receipt, "latency")["design"].unique().to_pylist() == list(found)
    assert run(filled).reused


def test_the_heuristic_is_enough_where_little_may_be_missed(filled: Storage) -> None:
    result = run(filled, quality_margin=0.4).result
    assert result.enough == ("no_student",)
    assert any("no student is needed: no_student is enough" in line for line in result.decision)
    unknown = run(filled, evaluation="").result
    assert (unknown.best, unknown.designs[0].quality.value) == (None, None)
    assert "not known" in unknown.decision[0]
    slow = run(filled, quality_margin=0.4, target={"p99_ms": 0.1}).result
    assert (slow.enough, [line for line in slow.decision if "no student is needed" in line]) == ((), [])
    assert "no_student does not meet the target" in slow.decision[0]
    alone = run(filled, designs=[{"name": "a", "students": 0}]).result
    assert (alone.best, alone.decision) == (
        None,
        ("whether a student is needed is not known: no design has a student; set `students` of one to at least 1",),
    )


def test_nothing_is_concluded_where_a_design_is_not_known_or_overloaded(filled: Storage) -> None:
    """The evaluation has no student: all designs but the heuristic are unknown. Then a student that is far too slow: as good as none."""
    labelled = [scored(STRATA[key % 4], source, key, 1) for key in range(200) for source in ("teacher", "fallback")]
    keep(filled, "evaluate", "4" * 16, {"rows": table(SCORED, labelled)})
    result = run(filled, evaluation="evaluate/" + "4" * 16).result
    assert result.designs[-1].quality.value == 1.0
    assert (result.best, result.enough) == (None, ())
    assert result.decision == ("whether a student is needed is not known: the quality of as_served is not (a student has no scored rows)",)
    late = run(filled, evaluation="evaluate/" + "3" * 16, times={"student_ms": [60_000]}).result
    assert late.designs[0].late_share > 0.1
    assert (late.best, late.enough, len(late.decision)) == (None, (), 1)
    assert "as_served is overloaded" in late.decision[0]


def test_a_request_log_is_replayed_when_its_requests_came(filled: Storage, tmp_path: Path) -> None:
    began = datetime.datetime(2031, 1, 31, 12, tzinfo=datetime.UTC)
    rows = [{"time": began + datetime.timedelta(milliseconds=2500 * n), "query": ["often", "New"][n % 2]} for n in range(60)]
    write_table(filled, "requests/2031-01-31/120000-n-1-1.parquet", table(REQUEST_LOG, rows))
    short = [{"name": "d", "dynamic_ttl_s": 12}]  # of the 30 misses of 150 s every third finds nothing
    receipt = run(filled, traffic={"events": "requests"}, designs=short)
    (one,) = receipt.result.designs
    assert one.ways["cache"].requests == 30
    assert one.ways["dynamic"].requests + one.ways["realtime"].requests == 30
    assert one.ways["realtime"].requests >= 10
    assert receipt.notes[0] == "requests of 2031-01-31"
    fast = run(filled, traffic={"events": "requests", "rate_per_s": 4}, designs=short)
    assert fast.notes[1] == "they are simulated 5,760.00 times as fast as they came, for traffic.rate_per_s=4"
    assert fast.result.designs[0].latency.p99_ms > one.latency.p99_ms
    file = tmp_path / "day.csv"
    file.write_text("query,time\noften,2031-02-01 10:00:00\noften,2031-02-01 10:00:01\n", encoding="utf-8")
    assert run(filled, traffic={"events": str(file)}).result.designs[0].ways["cache"].requests == 2
    file.write_text("query,time\noften,2031-02-01\n", encoding="utf-8")
    with pytest.raises(InputError, match="the times of this log are days"):
        run(filled, traffic={"events": str(file)})
    file.write_text('query,time\noften,2031-02-01 10:00:00\n,2031-02-01 10:00:01\n"  ",2031-02-01 10:00:02\n', encoding="utf-8")
    left = run(filled, traffic={"events": str(file)})
    assert (left.result.designs[0].requests, left.notes[1]) == (1, "rows left out: 2 without a query")
    with pytest.raises(InputError, match="no request is of this day") as found:
        run(filled, traffic={"events": str(file), "day": "2031-01-31"})
    assert "2031-02-01" in found.value.fix


DAY = np.datetime64("2031-02-01T00:00:00")
TIMES = DAY + np.array([0, 36_000_250, 36_001_500, 86_399_999], "timedelta64[ms]")  # sorted, within one day


@pytest.mark.parametrize(
    "column",
    [
        *(pa.array(TIMES.astype(f"datetime64[{unit}]")) for unit in ("ms", "us", "ns")),
        pa.array(TIMES.astype("datetime64[us]")).cast(pa.timestamp("us", "America/New_York")),
        *(pa.array(TIMES.astype(f"datetime64[{unit}]").astype(np.int64)) for unit in ("ms", "us", "ns")),
        pa.array(TIMES.astype("datetime64[ms]").astype(np.int64) / 1000),
        pa.array((TIMES.astype("datetime64[ms]").astype(np.int64) / 1000).tolist()).cast(pa.decimal128(20, 3)),
        pa.array([str(time) for time in TIMES]).dictionary_encode(),
        pa.array([f"{np.datetime64(time, 'ns') + np.timedelta64(2, 'h')}+02:00" for time in TIMES]),
        pa.array([str(time.astype(np.int64)) for time in TIMES.astype("datetime64[ns]")]),
    ],
    ids=lambda column: str(column.type),
)
def test_the_same_times_however_they_are_written(column: pa.Array) -> None:
    found = timed_requests(pa.table({"query": ["a", "B ", None, "b"], "time": column}), "x")
    assert set(found.day) == {(DAY - np.datetime64("1970-01-01T00:00:00")).astype(int) // 86_400}
    assert found.at == pytest.approx([0, 36_000.25, 86_399.999], abs=2e-6)
    assert [found.queries[place] for place in found.query] == ["a", "b", "b"]
    assert found.left_out == "rows left out: 1 without a query"


def test_whole_seconds_since_1970_are_no_microseconds() -> None:
    seconds = pa.array([*TIMES.astype("datetime64[s]").astype(np.int64).tolist(), None])
    found = timed_requests(pa.table({"query": ["a"] * 5, "time": seconds}), "x")
    assert found.at == pytest.approx([0, 36_000, 36_001, 86_399])
    assert found.left_out == "rows left out: 1 without a time"


@pytest.mark.parametrize(
    "column, says",
    [
        (["2031-02-01 10:00:00", "noon"], "row 2\n  value: noon"),
        ([1e9, -5.0], "row 2\n  value: -5.0"),
        ([None, None], "no row has a query and a time"),
        ([[1], [2]], "row 1"),
        ([float("nan"), None], "no row has a query and a time"),
    ],
)
def test_a_time_that_is_none_is_named(column: list[Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        timed_requests(pa.table({"query": ["a", "b"], "time": pa.array(column)}), "x")
    with pytest.raises(InputError, match="column query holds no text"):
        timed_requests(pa.table({"query": [[1]], "time": [1]}), "x")
    with pytest.raises(InputError, match="no column time") as found:
        timed_requests(pa.table({"query": ["a"], "when": [1]}), "x")
    assert found.value.value == "x has query, when"


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"traffic": {"events": "requests"}}, "the store has no request log"),
        ({"traffic": {"events": "/nowhere/day.csv"}}, "this file does not exist"),
        ({"traffic": {"day": "2031-02-30"}}, "day is out of range"),
        ({"designs": [{"name": "a", "colour": 1}]}, "unknown field designs.0.colour .*known: cached, [^\n]*\n  where"),
        ({"times_url": "http://127.0.0.1:9"}, "no server answers"),
        ({"prices": {"cached_usd_per_million": {"techer": 1}}}, "a snapshot has no answers of techer"),
        ({"realtime": "nobody"}, "no answers of this source"),
        ({"bigger": "nobody", "designs": [{"name": "a", "escalation": {"slots": 1}}]}, "no answers of this source"),
        ({"designs": [{"name": "a"}, {"name": "a"}]}, "a is there twice"),
        ({"designs": [{"name": "a", "cached": ["fallback"]}]}, "a snapshot has no answers of fallback"),
        ({"designs": [{"name": "a", "students": 0, "escalation": {"slots": 1}}]}, "without students nothing is unsure"),
    ],
)
def test_what_cannot_be_simulated_is_said(filled: Storage, fields: dict[str, Any], says: str) -> None:
    with pytest.raises((InputError, ConfigError), match=says):
        run(filled, **fields)
