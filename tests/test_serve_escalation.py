"""The bigger model: who is escalated, what callers get when it fails, what it may cost; with real sockets, a model and an endpoint."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fronts import Front
from headtail.adapters.storage import Storage
from headtail.core.calibration import ConfidenceMap, StudentCalibration
from headtail.core.config import build_config
from headtail.core.errors import ConfigError
from headtail.core.task import Task
from headtail.engines import ModelConfig
from headtail.engines.models import find_model
from headtail.releases import release
from headtail.stages import serve
from headtail.stages.serve.answerer import ANY_RELEASE, ESCALATION, Miss, MissFailed, RealtimeReply, Reply, guard_reply
from headtail.stages.serve.budget import DEAREST, HOUR_USD, EscalationBudget
from headtail.stages.serve.dynamic import DynamicTier, LocalAnswers
from headtail.stages.serve.escalation import AskBigger, EscalationConfig, EscalationTier
from headtail.stages.serve.front.counters import ESCALATION_RESULTS
from headtail.stages.serve.front.link import StudentLink
from headtail.stages.serve.front.operations import describe
from headtail.stages.serve.front.tiers import open_tiers
from headtail.stages.serve.realtime import Student
from headtail.stages.serve.run_folder import BUDGET
from headtail.stages.serve.student_link import FrontAddress
from headtail.stages.serve.student_tier import StudentTier
from headtail.stages.serve.students import resolve_bigger
from test_engines_openai import Server, chat
from test_serve import STUDENT, config, published, reply, segments
from test_serve_link import Pupil, linked, until
from timescale import limit

BIG = segments("rare", "location")  # what the bigger model says
SMALL = segments("rare")  # what the student says
Bigger = AskBigger
PROMISE = StudentCalibration(
    receipt="calibrate/a1",
    map=ConfidenceMap(method="isotonic", knots=((0.0, 0.1), (1.0, 0.6))),
    target=0.9,
    delta=0.05,
    threshold=0.85,
)


def calibrated(store: Storage, tmp_path: Path, task: Task, promise: StudentCalibration | None = PROMISE) -> None:
    """A release whose student (0.8 of confidence, in these tests) is unsure below 0.85."""
    base = published(store, tmp_path, task)
    made = release.make_release(store, snapshot=base.snapshot, task=task, student=STUDENT, calibration=promise)
    release.promote(store, made.id)


def bigger(task: Task, answer: Any = BIG, **changes: Any) -> Bigger:
    async def ask(miss: Miss, seconds: float) -> RealtimeReply:
        return reply(task, answer, **{"stands_for": ESCALATION, "confidence": 0.99, "tokens_in": 1000, "tokens_out": 100, **changes})

    return ask


def fails(error: BaseException) -> Bigger:
    async def ask(miss: Miss, seconds: float) -> RealtimeReply:
        raise error

    return ask


async def hangs(miss: Miss, seconds: float) -> RealtimeReply:
    await asyncio.sleep(60)
    raise AssertionError("was not cancelled")


def front_of(store: Storage, tmp_path: Path, student: Any, ask: Bigger | None, dynamic: bool = False, **options: Any) -> Front:
    async def ask_student(miss: Miss) -> RealtimeReply:
        if isinstance(student, BaseException):
            raise student
        found: RealtimeReply = student
        return found

    made = build_config(EscalationConfig, {"timeout_ms": int(1000 * limit(0.2)), **options}, where="test")
    tiers: list[Any] = [StudentTier(ask_student, made.threshold)]
    if dynamic:
        tiers.insert(0, DynamicTier(LocalAnswers(1 << 20), 60.0, keeps_unsure=ask is None))
    front = Front(store, serve.Config(realtime_timeout_ms=int(1000 * limit(5))), tmp_path, tiers=tiers, checks=[guard_reply])
    if ask is not None:
        budget = EscalationBudget(tmp_path / BUDGET, made.per_minute, made.usd_per_hour, made.usd_per_day)
        front.answerer.tiers = (*tiers, EscalationTier(ask, made, budget, front.counters))
    return front


def results(front: Front) -> dict[str, float]:
    return {result: count for result in ESCALATION_RESULTS if (count := front.count(f"escalation/{result}"))}


# ---- who is escalated


def test_a_sure_answer_stays_and_an_unsure_one_goes_to_the_bigger_model(store: Storage, tmp_path: Path, segmentation: Task) -> None:
    calibrated(store, tmp_path, segmentation)
    sure = front_of(store, tmp_path, reply(segmentation, SMALL, confidence=0.9), bigger(segmentation)).ask("rare").json()
    assert (sure["source"], sure["reason"]) == ("realtime_student", "")
    assert sure["confidence"] == pytest.approx(0.55), "as the release's map has it: 0.1 + 0.5 x 0.9"
    for confidence in (0.8, None):
        front = front_of(store, tmp_path, reply(segmentation, SMALL, confidence=confidence), bigger(segmentation))
        found = front.ask("rare").json()
        assert (found["source"], found["answer"], found["degraded"], found["reason"], found["cached"]) == (
            "escalated",
            BIG,
            False,
            "",
            False,
        )
        assert found["confidence"] == 0.99
        assert results(front) == {"answered": 1}
        assert front.count("requests/escalated/escalated") == 1


@pytest.mark.parametrize("reason", ["invalid", "truncated", "withheld"])
def test_a_query_on_which_the_student_fails_is_escalated(store: Storage, tmp_path: Path, segmentation: Task, reason: str) -> None:
    calibrated(store, tmp_path, segmentation)
    said = {
        "invalid": reply(segmentation, "no json"),
        "truncated": reply(segmentation, finish_reason="length"),
        "withheld": reply(segmentation, segments("denver"), confidence=0.99),  # not a word of the query
    }[reason]
    assert front_of(store, tmp_path, said, None).ask("rare").json()["reason"] == reason
    found = front_of(store, tmp_path, said, bigger(segmentation)).ask("rare").json()
    assert (found["source"], found["degraded"]) == ("escalated", False)
    again = front_of(store, tmp_path, said, fails(MissFailed("unavailable"))).ask("rare").json()
    assert (again["source"], again["degraded"], again["reason"]) == ("fallback", True, reason)


@pytest.mark.parametrize("reason", ["unavailable", "overloaded", "outdated", "no_student", "timeout", "error"])
def test_what_ails_the_students_process_is_not_escalated(store: Storage, tmp_path: Path, segmentation: Task, reason: str) -> None:
    """A student that is gone would send every miss to the bigger model."""
    calibrated(store, tmp_path, segmentation)
    front = front_of(store, tmp_path, MissFailed(reason), fails(AssertionError("was asked")))
    assert front.ask("rare").json()["reason"] == reason
    assert results(front) == {}


def test_a_promise_speaks_of_its_own_student_alone(store: Storage, tmp_path: Path, segmentation: Task) -> None:
    calibrated(store, tmp_path, segmentation)
    for other in (ANY_RELEASE, "distill/fedcba9876543210"):
        found = front_of(store, tmp_path, reply(segmentation, SMALL, stands_for=other), bigger(segmentation)).ask("rare").json()
        assert (found["source"], found["confidence"]) == ("realtime_student", 0.8)


def test_a_flag_outranks_the_release_and_is_about_the_confidence_that_is_shown(store: Storage, tmp_path: Path, segmentation: Task) -> None:
    calibrated(store, tmp_path, segmentation)
    shown = 0.1 + 0.5 * 0.8
    for threshold, source in ((shown - 0.01, "realtime_student"), (shown + 0.01, "escalated")):
        front = front_of(store, tmp_path, reply(segmentation, SMALL), bigger(segmentation), threshold=threshold)
        assert front.ask("rare").json()["source"] == source


def test_a_release_that_promises_nothing_has_no_unsure_answers(store: Storage, tmp_path: Path, segmentation: Task) -> None:
    for promise in (None, PROMISE.model_copy(update={"threshold": None})):
        calibrated(store, tmp_path, segmentation, promise)
        found = front_of(store, tmp_path, reply(segmentation, SMALL), bigger(segmentation)).ask("rare").json()
        assert (found["source"], found["reason"]) == ("realtime_student", "")


# ---- faults of the bigger model

FAULTS: dict[str, tuple[Callable[[Task], Bigger], str]] = {
    "gone": (lambda task: fails(MissFailed("unavailable")), "unavailable"),
    "full": (lambda task: fails(MissFailed("overloaded")), "overloaded"),
    "late": (lambda task: hangs, "timeout"),
    "raises": (lambda task: fails(RuntimeError("boom")), "error"),
    "of another task": (lambda task: bigger(task, task_fingerprint="0" * 32), "outdated"),
    "no JSON": (lambda task: bigger(task, "I think that"), "invalid"),
    "cut short": (lambda task: bigger(task, finish_reason="length"), "truncated"),
    "not of the query": (lambda task: bigger(task, segments("denver")), "withheld"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_when_the_bigger_model_fails_the_student_answers(store: Storage, tmp_path: Path, segmentation: Task, fault: str) -> None:
    calibrated(store, tmp_path, segmentation)
    ask, result = FAULTS[fault]
    front = front_of(store, tmp_path, reply(segmentation, SMALL), ask(segmentation))
    found = front.ask("rare").json()
    assert (found["source"], found["answer"], found["degraded"], found["reason"]) == ("realtime_student", SMALL, False, "unsure")
    assert results(front) == {result: 1}
    assert front.answerer.in_flight == 0


def test_the_bigger_model_has_its_own_time_and_its_own_places(store: Storage, tmp_path: Path, segmentation: Task) -> None:
    calibrated(store, tmp_path, segmentation)

    async def slow(miss: Miss, seconds: float) -> RealtimeReply:
        await asyncio.sleep(limit(0.1))
        return reply(segmentation, BIG)

    front = front_of(store, tmp_path, reply(segmentation, SMALL), slow, max_waiting=2, timeout_ms=int(1000 * limit(5)))
    front.answerer._config = front.answerer._config.model_copy(update={"realtime_timeout_ms": int(1000 * limit(0.05))})

    async def use() -> list[Reply]:
        return await asyncio.gather(*(front.answerer.answer("rare") for _ in range(5)))

    found = asyncio.run(use())
    assert sorted(one.source for one in found) == ["escalated"] * 2 + ["realtime_student"] * 3
    assert results(front) == {"answered": 2, "overloaded": 3}


def test_a_caller_who_leaves_ends_an_escalation_that_is_paid_all_the_same(store: Storage, tmp_path: Path, segmentation: Task) -> None:
    calibrated(store, tmp_path, segmentation)
    priced: dict[str, Any] = {"usd_per_hour": 10.0, "model": {"model": "m", "usd_per_million_tokens_in": 1000.0}}
    front = front_of(store, tmp_path, reply(segmentation, SMALL), bigger(segmentation), **priced)
    front.ask("rare")
    tier = front.answerer.tiers[-1]
    assert isinstance(tier, EscalationTier)
    assert tier._budget._held[DEAREST] == pytest.approx(1.0)  # 1,000 tokens at a tenth of a cent
    tier._ask = hangs

    async def use() -> None:
        leaving = asyncio.create_task(front.answerer.answer("rare"))
        await asyncio.sleep(0.05)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving

    asyncio.run(use())
    assert (tier.waiting, front.answerer.in_flight) == (0, 0)
    assert results(front) == {"answered": 1, "left": 1}
    assert tier._budget._held[HOUR_USD] in (pytest.approx(2.0), pytest.approx(1.0))  # 1 when an hour began in between
    assert front.count("escalation_nanousd") == pytest.approx(2e9)


# ---- the dynamic tier


def test_an_escalated_answer_is_given_again_and_an_unsure_one_is_not(store: Storage, tmp_path: Path, segmentation: Task) -> None:
    calibrated(store, tmp_path, segmentation)
    student = reply(segmentation, SMALL)

    def sources(ask: Bigger | None) -> list[tuple[str, str]]:
        front = front_of(store, tmp_path, student, ask, dynamic=True)

        async def use() -> list[tuple[str, str]]:
            found = []
            for _ in range(2):
                one = await front.answerer.answer("rare")
                await asyncio.sleep(0)
                found.append((one.source, one.reason))
            return found

        return asyncio.run(use())

    assert sources(bigger(segmentation)) == [("escalated", ""), ("dynamic", "")]
    gone = fails(MissFailed("unavailable"))
    assert sources(gone) == [("realtime_student", "unsure")] * 2, "the bigger model may be back for the next one"
    assert sources(None) == [("realtime_student", "unsure"), ("dynamic", "unsure")], "without a bigger model it is as good as any"


# ---- the budget

MIDNIGHT = 1e9 // 86400 * 86400


def test_the_budget_holds_over_processes_and_restarts(tmp_path: Path) -> None:
    now = [MIDNIGHT]
    one, two = (EscalationBudget(tmp_path / BUDGET, 3, 0.0, 0.0, clock=lambda: now[0]) for _ in range(2))
    assert [budget.reserve() is not None for budget in (one, two, one, two, one)] == [True] * 3 + [False] * 2
    for budget in (one, two):
        budget.close()
    again = EscalationBudget(tmp_path / BUDGET, 3, 0.0, 0.0, clock=lambda: now[0])
    assert again.reserve() is None
    now[0] += 60
    assert again.reserve() is not None


def test_money_is_reserved_at_what_the_dearest_cost(tmp_path: Path) -> None:
    now = [MIDNIGHT]
    budget = EscalationBudget(tmp_path / BUDGET, 0, 1.0, 2.5, clock=lambda: now[0])
    first = budget.reserve()
    assert first is not None
    budget.charge(first, 0.4)
    second = budget.reserve()
    assert second is not None
    assert second.usd == 0.4
    assert budget.reserve() is None, "0.4 + 0.4 + 0.4 would be more than 1"
    budget.charge(second, 0.0)  # it never reached the model
    spent = 0.4
    for _ in range(6):  # what is left of this hour, then two in each hour, until the day's 2.5 are spent
        while (held := budget.reserve()) is not None:
            budget.charge(held, 0.4)
            spent += 0.4
        now[0] += 3600
    assert spent == pytest.approx(2.4)
    now[0] += 86400
    assert budget.reserve() is not None


def _reserve(path: Path, many: int) -> int:
    budget = EscalationBudget(path, 500, 0.0, 0.0, clock=lambda: MIDNIGHT)
    return sum(budget.reserve() is not None for _ in range(many))


def test_processes_at_once_get_no_more_than_the_budget(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        counts = pool.starmap(_reserve, [(tmp_path / BUDGET, 400)] * 2)
    assert 450 <= sum(counts) <= 500  # one that does not get the lock for 2 ms goes without


def test_a_spent_budget_leaves_the_students_answer(store: Storage, tmp_path: Path, segmentation: Task) -> None:
    calibrated(store, tmp_path, segmentation)
    front = front_of(store, tmp_path, reply(segmentation, SMALL), bigger(segmentation), per_minute=2)
    tier = front.answerer.tiers[-1]
    assert isinstance(tier, EscalationTier)
    tier._budget._clock = lambda: MIDNIGHT
    found = [front.ask("rare").json() for _ in range(4)]
    assert [one["source"] for one in found] == ["escalated"] * 2 + ["realtime_student"] * 2
    assert [one["reason"] for one in found] == ["", "", "unsure", "unsure"]
    assert results(front) == {"answered": 2, "budget": 2}


# ---- before a server starts


def test_a_budget_in_money_needs_a_price() -> None:
    fields = {"escalation": {"model": {"model": "m"}, "usd_per_day": 5.0}}
    with pytest.raises(ConfigError, match="needs a price"):
        build_config(serve.Config, fields, where="test")


def test_a_server_does_not_guess_a_threshold(
    store: Storage, root: str, tmp_path: Path, segmentation: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headtail.adapters.cluster.start_cluster", lambda: pytest.fail("Ray was started"))
    calibrated(store, tmp_path, segmentation, None)
    with pytest.raises(ConfigError, match="no threshold for its student's confidence"):
        serve.start_server(config(root, escalation={"model": {"model": "example:teacher"}}))
    made = config(root, model={"model": "example:teacher"}, escalation={"model": {"model": "example:x"}, "threshold": 0.5})
    with pytest.raises(ConfigError, match="no such shipped model"):
        resolve_bigger(made, store, release.current_release(store))
    made = config(root, model={"model": "example:teacher"}, escalation={"model": {"model": "x", "engine": "null"}, "threshold": 0.5})
    with pytest.raises(ConfigError, match="this engine cannot serve"):
        resolve_bigger(made, store, release.current_release(store))


# ---- real parts: sockets, a model, an endpoint


def model(task: Task, root: str, store: Storage, **fields: Any) -> Student:
    made = ModelConfig(**fields)
    return Student(made, root, task, ESCALATION, find_model(made, store).digest)


def test_over_sockets_with_a_real_model_and_with_a_real_endpoint(store: Storage, root: str, tmp_path: Path, segmentation: Task) -> None:
    """A student that is never sure; then no bigger model, the shipped teacher, an endpoint that answers, breaks and is slow."""
    calibrated(store, tmp_path, segmentation)
    fields = {"model": {"model": "example:teacher"}, "timeout_ms": int(1000 * limit(20)), "per_minute": 0}
    made = build_config(serve.Config, {"escalation": fields, "dynamic": {"enabled": False}}, where="test")
    endpoint, query = Server(), "cheap pizza chicago"
    teacher = model(segmentation, root, store, model="example:teacher", engine="transformers")
    hosted = model(segmentation, root, store, model="big", engine="openai", base_url=endpoint.url)

    async def use() -> None:
        link, socket = StudentLink(limit(5)), tmp_path / "s"
        await link.listen(socket)
        front = Front(store, made, tmp_path, link=link, tiers=[], checks=[guard_reply])
        front.answerer.tiers = tuple(open_tiers(made, link, tmp_path, front.counters))
        link._counters = front.counters
        address, bound = FrontAddress(str(socket)), Pupil(segmentation, ESCALATION)
        escalated, unsure = ("escalated", ""), ("realtime_student", "unsure")

        async def ask() -> tuple[str, str]:
            found = await front.answerer.answer(query)
            assert segmentation.parse(json.dumps(found.answer))[1] == ""
            return found.source, found.reason

        async with linked(Pupil(segmentation), [address]):  # with a confidence of 0.5
            await until(lambda: link.connections)
            assert await ask() == unsure
            async with linked(bound, [address], teacher.answer):
                await until(lambda: link.bigger)
                assert (len(link.connections), front.count("students"), front.count("bigger_models")) == (1, 1, 1)
                assert describe(front.answerer, link)["realtime"]["bigger_model"] == "m"
                assert await ask() == escalated, results(front)
            await until(lambda: not link.bigger)
            assert await ask() == unsure
            async with linked(bound, [address], hosted.answer):
                await until(lambda: link.bigger)
                endpoint.reply = lambda text, nth: (200, chat(json.dumps(segments(query))), {})
                assert await ask() == escalated
                tried = len(endpoint.asked)
                endpoint.reply = lambda text, nth: (503, {"error": "busy"}, {})
                assert await ask() == unsure
                assert len(endpoint.asked) == tried + 1, "one try: the caller waits"
                endpoint.reply = lambda text, nth: (200, chat("Certainly! Here it is"), {})
                assert await ask() == unsure
                endpoint.reply = lambda text, nth: (time.sleep(limit(1)), (200, chat("{}"), {}))[1]  # type: ignore[func-returns-value]
                tier = front.answerer.tiers[-1]
                assert isinstance(tier, EscalationTier)
                tier._config = made.escalation.model_copy(update={"timeout_ms": int(1000 * limit(0.2))})
                clock = time.perf_counter()
                assert await ask() == unsure
                assert time.perf_counter() - clock < limit(0.9)
                endpoint.http.shutdown()
                endpoint.http.server_close()
                assert await ask() == unsure
        assert results(front).keys() == {"answered", "unavailable", "error", "invalid", "timeout"}
        assert results(front)["answered"] == 2
        assert front.count("escalation_tokens_in") > front.count("tokens_in") == 0
        await link.close()

    try:
        asyncio.run(use())
    finally:
        hosted.close()
        teacher.close()
