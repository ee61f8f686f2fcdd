"""What coverage costs, on numbers that can be checked by hand; and plans by money, on logs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import figures_of
from headtail import pipeline
from headtail.adapters import append_log
from headtail.adapters.storage import open_storage, read_json, write_json
from headtail.adapters.storage.receipts import output_table
from headtail.batch import catalog
from headtail.core.config import TrackingConfig
from headtail.core.errors import ConfigError, InputError
from headtail.core.receipt import Receipt
from headtail.examples import example_data
from headtail.stages import replay
from headtail.stages.ingest import Config as LogConfig
from headtail.stages.ingest import LogColumns
from headtail.stages.ingest import run as ingest
from headtail.stages.plan import Config, Head, Result, run
from headtail.stages.plan.config import Price, Prices
from headtail.stages.plan.forecast import Forecast
from headtail.stages.plan.money import Costs, affordable, break_even, does_pay, steps, stop_words, student_break_even
from headtail.stages.precompute.result import AnsweringModel
from headtail.stages.precompute.result import Result as PrecomputeResult

OFF = TrackingConfig(enabled=False)
PRICES = Prices(
    teacher=Price(usd_per_million=300.0), batch_student=Price(usd_per_million=6.0), realtime_student=Price(usd_per_million=20.0)
)


def curve(*points: tuple[int, float]) -> list[Forecast]:
    return [Forecast(7, rows, value, None, None, value, 0, 0, False) for rows, value in points]


COSTS = Costs(teacher=3e-4, batch_student=6e-6, realtime_student=2e-5)
LINE = curve((10, 0.1), (110, 0.2), (1110, 0.3))  # 1 queries per 1 %, then 10, then 100


def test_a_further_per_cent_costs_what_its_queries_cost() -> None:
    found = steps(LINE, COSTS, 1e6, np.array([10, 110, 1110]) * 3e-4)
    assert [step.coverage for step in found] == pytest.approx(np.arange(30) / 100)
    assert [step.more_rows for step in found] == pytest.approx([1] * 10 + [10] * 10 + [100] * 10)
    assert [step.teacher_per_point for step in found][::10] == pytest.approx([3e-4, 3e-3, 3e-2])
    assert [step.batch_per_point for step in found][::10] == pytest.approx([6e-6, 6e-5, 6e-4])
    assert [step.realtime_per_point for step in found] == pytest.approx([0.01 * 1e6 * 2e-5] * 30)
    assert found[10].teacher_usd == pytest.approx(10 * 3e-4)
    unknown = steps(LINE, Costs(None, None, None), 1e6, None)
    assert {(step.teacher_per_point, step.batch_per_point, step.realtime_per_point) for step in unknown} == {(None, None, None)}
    assert steps(curve((1, 0.001)), COSTS, 1e6, np.array([3e-4])) == []


def test_noise_in_the_forecast_does_not_make_a_later_per_cent_cheaper() -> None:
    rng = np.random.default_rng(1)
    sizes = np.unique(np.geomspace(1, 10_000, 60).round().astype(int))
    noisy = curve(*((int(n), float(0.09 * np.log(n + 1) + rng.normal(0, 0.004))) for n in sizes))
    costs = [step.more_rows for step in steps(noisy, COSTS, 1e6, None)]
    assert costs == sorted(costs)


def test_the_break_even_is_where_a_query_costs_what_its_hits_save() -> None:
    """1 % of 1,000 events saves 10 x 2e-5 USD: less than a query. Of 100,000: 0.02 USD, 66 queries at 3e-4. Of 1e6: 0.2, all."""
    for events, rows in ((1_000, 0), (100_000, 110), (1_000_000, 1110)):
        assert break_even(steps(LINE, COSTS, events, np.array([10, 110, 1110]) * 3e-4), COSTS, events) == rows
    assert break_even(steps(LINE, COSTS, None, None), COSTS, None) is None
    worth = Costs(3e-4, None, None, hit_value=2e-5)
    assert break_even(steps(LINE, worth, 1e5, np.array([10, 110, 1110]) * 3e-4), worth, 1e5) == 110
    assert student_break_even(COSTS, 2.94) == 10_000
    assert student_break_even(Costs(1e-6, 2e-6, None), 1.0) is None
    assert affordable(np.array([1.0, 1.0, 2.0, 5.0]), 4.0) == 3


def test_it_is_said_when_it_does_not_pay() -> None:
    flat = does_pay(0.12, 0.5, None, LINE)
    assert flat[0] is False
    assert "not power-law enough" in flat[1]
    assert does_pay(0.6, 0.8, None, LINE)[0] is None
    assert does_pay(0.6, 0.8, 2, LINE)[0] is False, "2 of 10 queries cover 2 %"
    pays, why = does_pay(0.6, 0.8, 110, LINE)
    assert pays
    assert why == "up to 110 queries (20.0% of future events) save more in the horizon than the teacher costs"
    text = stop_words("budget", 110, steps(LINE, COSTS, 1e6, np.array([10, 110, 1110]) * 3e-4), COSTS, 1e6)
    assert text == (
        "stop here, at 110 queries: budget_usd is spent: the next 1 % of future coverage costs teacher USD 0.03, "
        "batch student USD 0.0006, realtime student USD 0.20; its hits save USD 0.20"
    )


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are drawn in test_plan.py."""
    monkeypatch.setattr("headtail.adapters.charts.svg", lambda _: "<svg/>")
    monkeypatch.setattr("headtail.stages.plan.picture.plan_page", lambda *_: None)
    monkeypatch.setattr("headtail.stages.plan.picture.coverage_figure", lambda *_: None)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Sixteen days of drifting example data, ingested, the last day held out."""
    root = str(tmp_path_factory.mktemp("money") / "store")
    shape: dict[str, Any] = {"events": 24_000, "days": 16, "universe": 3000, "drift": 0.1, "labels": 20, "tasks": ("query_intent",)}
    config = example_data.Config(root=root, tracking=OFF, **shape)
    made = example_data.run(config)
    log = open_storage(root).uri(f"{made.path}/log")
    ingest(LogConfig(root=root, log=log, task="query_intent", columns=LogColumns(time="time"), tracking=OFF))
    return root


def plan(root: str, **fields: Any) -> Receipt[Result]:
    return run(Config(**({"root": root, "task": "query_intent", "tracking": OFF, "teacher_sample_rows": 100} | fields)))


def test_a_budget_is_spent_and_not_more(store: str) -> None:
    receipt = plan(store, budget_usd=0.2, prices=PRICES, head={"break_even": False})
    assert receipt.result.head_limit == "budget"
    rows = receipt.rows["head"] + receipt.rows["teacher_sample"]
    assert 0.2 - 3e-4 < rows * 3e-4 <= 0.2
    assert any("budget_usd is spent" in line for line in receipt.result.decision)
    more = plan(store, budget_usd=0.3, prices=PRICES, head={"break_even": False})
    assert more.metrics["head_coverage_forecast"] > receipt.metrics["head_coverage_forecast"]
    with pytest.raises(ConfigError, match="needs the teacher's price"):
        plan(store, budget_usd=0.2)
    with pytest.raises(ConfigError, match="spent before the head"):
        plan(store, budget_usd=0.01, prices=PRICES)
    assert Config(budget_usd=1.0).head.coverage is None
    assert Config(budget_usd=1.0, head=Head(coverage=0.4)).head.coverage == 0.4


def test_the_head_ends_at_the_break_even(store: str) -> None:
    receipt = plan(store, prices=PRICES, head={"coverage": 1.0})
    assert receipt.result.head_limit == "break_even"
    facts = read_json(open_storage(store), receipt.output("outlook").path)
    assert facts["break_even_rows"] == receipt.rows["head"]
    beyond = [step for step in facts["steps"] if step["rows"] > receipt.rows["head"]]
    assert min(step["teacher_per_point"] for step in beyond) > beyond[0]["realtime_per_point"]
    dear = Prices(teacher=Price(usd_per_million=1e6), realtime_student=Price(usd_per_million=0.001))
    with pytest.raises(InputError, match="no head pays"):
        plan(store, prices=dear)
    assert plan(store, prices=dear, head={"break_even": False}).result.pays is False


def test_a_drifting_log_is_taken_by_value_and_covers_more_of_the_held_out_day(store: str) -> None:
    limits = {"rows": 300, "coverage": None}
    auto, count = plan(store, head=limits, horizon_days=2), plan(store, head={**limits, "order": "count"}, horizon_days=2)
    assert (auto.result.head_order, count.result.head_order) == ("value", "count")
    assert auto.metrics["head_coverage_holdout"] > count.metrics["head_coverage_holdout"] + 0.01
    assert auto.rows["head"] == count.rows["head"] == 300
    forecast = auto.result.forecasts[0]
    assert forecast.low is not None
    assert forecast.high is not None
    assert forecast.low <= auto.metrics["head_coverage_holdout"] <= forecast.high, "a day that the plan did not see"
    assert auto.metrics["head_coverage"] > auto.metrics["head_coverage_forecast"], "in-sample coverage is not the headline"
    assert auto.result.replan_days is not None
    assert auto.result.replan_days <= 3


def test_longer_queries_cost_more_and_give_way(store: str) -> None:
    prices = PRICES.model_copy(update={"teacher_usd_per_million_chars": 100.0})
    limits = {"rows": 300, "coverage": None, "order": "value", "break_even": False}
    plain, by_length = plan(store, head=limits, prices=PRICES), plan(store, head=limits, prices=prices)
    tables = [output_table(open_storage(store), one, "head") for one in (plain, by_length)]
    means = [np.mean([len(text) for text in table["query"].to_pylist()]) for table in tables]
    assert means[1] < means[0] - 1


def test_the_head_is_chosen_again_on_all_days(store: str) -> None:
    measured, rebuilt = plan(store), plan(store, rebuild=True)
    assert rebuilt.metrics["head_coverage_holdout"] == measured.metrics["head_coverage_holdout"], "measured before it was chosen again"
    assert rebuilt.result.rebuilt
    logged = open_storage(store)
    both = {}
    table = output_table(logged, Receipt.model_validate(read_json(logged, f"{rebuilt.inputs['log']}/receipt.json")), "holdout")
    before = {row["query_key"]: row["count"] for name in ("head", "teacher_sample", "student_rows") for row in rows(store, measured, name)}
    both = before | {row["query_key"]: before.get(row["query_key"], 0) + row["count"] for row in table.to_pylist()}
    after = [row for name in ("head", "teacher_sample", "student_rows") for row in rows(store, rebuilt, name)]
    assert {row["query_key"]: row["count"] for row in after} == both
    ranked = sorted(after, key=lambda row: row["rank"])
    assert [(-row["count"], row["query_key"]) for row in ranked] == sorted((-n, key) for key, n in both.items())
    with pytest.raises(InputError, match="cannot measure it"):
        replay.find_replay(replay.Config(root=store, task="query_intent", tracking=OFF, plan=rebuilt.path, release="r"))
    with pytest.raises(ConfigError, match="cannot be measured by replay_holdout"):
        pipeline.run(pipeline.Config(root=store, tracking=OFF, plan=Config(rebuild=True)))


def rows(root: str, receipt: Receipt, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = output_table(open_storage(root), receipt, name).to_pylist()
    return found


@pytest.fixture
def ingest_rows(root: str, tmp_path: Path) -> Callable[..., None]:
    def do(counts: dict[str, int], **fields: Any) -> None:
        path = tmp_path / "log.jsonl"
        path.write_text("".join(json.dumps({"query": query, "n": n}) + "\n" for query, n in counts.items()))
        how = {"root": root, "log": str(path), "task": "query_intent", "tracking": OFF, "columns": LogColumns(count="n")}
        ingest(LogConfig(**(how | fields)))

    return do


def test_a_log_without_days_has_an_estimate_and_no_band(root: str, ingest_rows: Callable[..., None]) -> None:
    ingest_rows({f"query {i}": max(1, 2000 // (i + 1)) for i in range(3000)})
    receipt = plan(root)
    assert [(one.low, one.high) for one in receipt.result.forecasts] == [(None, None)] * 4
    assert receipt.metrics["head_coverage_forecast"] == pytest.approx(receipt.metrics["head_coverage_holdout"], abs=0.03)
    assert receipt.result.headline[0] == "no band: the log has no days, so drift and ageing are not known either"
    assert receipt.result.replan_days is None


def test_flat_traffic_is_called_flat(root: str, ingest_rows: Callable[..., None]) -> None:
    ingest_rows({f"query {i}": 2 + i % 2 for i in range(2000)}, holdout_share=0.0)
    receipt = plan(root)
    assert receipt.result.pays is False
    assert any("not power-law enough" in line for line in receipt.result.decision)


def test_a_labelled_query_in_the_head_is_paid_for_once(root: str, tmp_path: Path, ingest_rows: Callable[..., None]) -> None:
    """Of 60 labelled queries 25 are the most frequent ones, 25 are rare, 10 never came: a budget of 110 answers buys 30 more."""
    names = [f"query {i}" for i in range(300)]
    labelled = [*names[:25], *names[-25:], *(f"new {i}" for i in range(10))]
    labels = tmp_path / "labels.jsonl"
    labels.write_text("".join(json.dumps({"query": name, "answer": '{"intent": "browse"}'}) + "\n" for name in labelled))
    ingest_rows({name: 3000 // (i + 1) for i, name in enumerate(names)}, labels=str(labels), holdout_share=0.0)
    limits = {"break_even": False, "order": "count"}
    receipt = plan(root, budget_usd=110 * 3e-4, teacher_sample_rows=20, prices=PRICES, head=limits)
    assert (receipt.result.head_limit, receipt.rows["head"]) == ("budget", 55)
    asked = {row["query_key"] for name in ("head", "teacher_sample", "human_labels") for row in rows(root, receipt, name)}
    assert len(asked) == 110
    stop, cost = receipt.result.headline[-2:]
    assert stop.startswith("stop here, at 55 queries: budget_usd is spent")
    assert cost == "the teacher is asked 110 queries: head, sample and human labels; they cost USD 0.033 of a budget of USD 0.033"
    assert set(receipt.result.headline) <= set(receipt.result.decision)
    whole = plan(root, budget_usd=0.2, teacher_sample_rows=2000, prices=PRICES, head=limits)
    assert whole.rows["head"] == 300, "a sample that the log has no queries for costs nothing"


def precomputed(root: str, mark: str, source: str, known: dict[str, float], task: str = "query_intent") -> None:
    """A finished precompute, in the catalog."""
    found = PrecomputeResult(source=source, model=AnsweringModel(name="m", digest="d"), figures=figures_of(**known))
    made = Receipt(stage="precompute", fingerprint=mark, path=f"precompute/{mark}", started="", seconds=0, result=found)
    entry = {"path": made.path, "task": task, "source": source, "model": "m", "settings": "s", "parts": {}, "template": "", "began": ""}
    store = open_storage(root)
    append_log.append_entry(store, catalog.FOLDER, lambda _: json.dumps(entry).encode())
    write_json(store, f"{made.path}/receipt.json", made.model_dump(mode="json"))
    store.replace("precompute/LATEST", made.path.encode())


def test_a_price_comes_from_a_receipt_of_that_source(root: str, ingest_rows: Callable[..., None]) -> None:
    ingest_rows({f"query {i}": max(1, 500 // (i + 1)) for i in range(300)})
    precomputed(root, "ab", "teacher", {"usd_per_million": 500.0, "generate_s": 40.0, "engine_start_s": 60.0})
    precomputed(root, "ef", "teacher", {"usd_per_million": 9.0}, task="other")
    precomputed(root, "cd", "batch_student", {"usd_per_million": 7.0})
    named = {"teacher": {"receipt": "precompute/ab"}}
    for prices in (named, {name: {"receipt": "latest"} for name in ("teacher", "batch_student")}):
        found = read_json(open_storage(root), plan(root, prices=prices).output("outlook").path)["usd_per_answer"]
        assert found["teacher"] == pytest.approx(200e-6)
        assert found["batch_student"] == (None if prices is named else pytest.approx(7e-6))
    with pytest.raises(InputError, match="of another answer source than teacher"):
        plan(root, prices={"teacher": {"receipt": "precompute/cd"}})
    with pytest.raises(InputError, match="no finished precompute of this store is of realtime_student"):
        plan(root, prices={"realtime_student": {"receipt": "latest"}})
    precomputed(root, "gh", "teacher", {})
    with pytest.raises(InputError, match="no price"):
        plan(root, prices={"teacher": {"receipt": "latest"}})
