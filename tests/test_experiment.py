"""The stage experiment: the statistics against tea-tasting and against known truths; checks and refusals; logs as they come."""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
import tea_tasting
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from bench.experiments import cover_of_effects, cover_of_looks, full_coverage_outcomes
from conftest import keep
from headtail.adapters.storage import Storage, read_table, write_table
from headtail.adapters.storage.receipts import output_table
from headtail.core.config import TrackingConfig
from headtail.core.errors import ConfigError, InputError
from headtail.core.keys import query_key
from headtail.core.rows import PLANNED, QUERY, REQUEST_LOG
from headtail.core.task import Task
from headtail.releases.release import make_release
from headtail.stages import experiment
from headtail.stages.experiment.effect import Levels, UnitSums, look_factor, sample_ratio_p, unit_effect
from headtail.stages.experiment.lookup import AnswerChange, query_changes
from test_cache_diff import Held, snapshot

OFF = TrackingConfig(enabled=False)
COLUMNS = {"unit": "user", "arm": "arm", "outcome": "clicks", "time": "day", "stratum": "stratum", "key": "user"}


def run(store: Storage, **options: Any) -> Any:
    return experiment.run(experiment.Config(root=store.root, tracking=OFF, **{"control": "a", "treatment": "b", **options}))


def write_csv(folder: Path, name: str, columns: dict[str, Any]) -> str:
    pa_csv.write_csv(pa.table(columns), folder / name)
    return str(folder / name)


def sums(rng: np.random.Generator, n: int, several: bool) -> tuple[UnitSums, pa.Table]:
    """Units of one or several requests, with a covariate; the same as a table for tea-tasting."""
    treated = rng.random(n) < 0.4
    requests = np.asarray(rng.poisson(3, n) + 1.0 if several else np.ones(n), float)
    habit = rng.gamma(2, 1, n)
    before_requests = np.asarray(rng.poisson(2, n) + 1.0 if several else np.ones(n), float)
    before = rng.poisson(habit * before_requests).astype(float)
    outcome = rng.poisson(habit * requests * (1 + 0.1 * treated)).astype(float)
    columns = {"variant": treated.astype(int), "y": outcome, "n": requests, "x": before, "m": before_requests}
    return UnitSums(treated, outcome, requests, before, before_requests), pa.table(columns)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("several", [False, True], ids=["one request", "several requests"])
@pytest.mark.parametrize("covariate", [False, True], ids=["plain", "CUPED"])
def test_effects_are_those_of_tea_tasting(seed: int, several: bool, covariate: bool) -> None:
    units, table = sums(np.random.default_rng(seed), 400, several)
    names = {"numer_covariate": "x", "denom_covariate": "m"} if covariate else {}
    oracle = tea_tasting.Experiment({"e": tea_tasting.RatioOfMeans("y", "n", **names)}).analyze(table)["e"]
    if not several:
        oracle = tea_tasting.Experiment({"e": tea_tasting.Mean("y", "x" if covariate else None)}).analyze(table)["e"]
    found = unit_effect(units if covariate else units._replace(before=None), Levels())
    mine = [found.control.mean, found.treatment.mean, found.value, found.low, found.high, found.p, found.value / found.se]
    theirs = ["control", "treatment", "effect_size", "effect_size_ci_lower", "effect_size_ci_upper", "pvalue", "statistic"]
    assert mine == pytest.approx([getattr(oracle, name) for name in theirs], rel=1e-6, abs=1e-12)
    assert (found.variance_left < 0.9) == covariate


@given(st.integers(0, 3000), st.integers(0, 3000), st.sampled_from([0.05, 0.5, 0.7]))
def test_the_sample_ratio_is_that_of_tea_tasting(control: int, treatment: int, share: float) -> None:
    if control + treatment == 0:
        assert sample_ratio_p(control, treatment, share) == 1
        return
    counts = {0: tea_tasting.aggr.Aggregates(control, {}, {}, {}), 1: tea_tasting.aggr.Aggregates(treatment, {}, {}, {})}
    oracle = tea_tasting.SampleRatio(share / (1 - share), method="binom").analyze(counts, 0, 1)
    assert sample_ratio_p(control, treatment, share) == pytest.approx(oracle.pvalue, rel=1e-6, abs=1e-300)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """Some of the full simulation (tests/bench/statistics.py): 95 % within what 2,000 experiments tell, 1 point and two standard errors."""
    for name, share in cover_of_effects(experiments=2000, kinds=("clicks", "skewed")).items():
        assert abs(share - 0.95) < 0.015, f"{name}: {share}"


def test_looking_at_every_step_is_free() -> None:
    for name, share in cover_of_looks(experiments=250, kinds=("clicks", "returning")).items():
        assert share >= 0.95 - 0.011, f"{name}: {share}"


def test_a_thin_tail_is_refused_and_a_full_one_is_not() -> None:
    found = full_coverage_outcomes(experiments=120)
    assert min(share for name, share in found.items() if name.startswith(("refused", "answered"))) >= 0.95
    assert min(found["cover_enough"], found["cover_just_enough"]) >= 0.95 - 0.01 - 3 * math.sqrt(0.95 * 0.05 / 120)
    assert found["cover_head_only_extrapolated"] < 0.5  # what the refusal keeps people from


def test_the_confidence_sequence_is_narrowest_where_it_is_told_to_be() -> None:
    levels = Levels(0.95, 5000)
    grid = np.geomspace(100, 200_000, 400)
    widths = [look_factor(n, levels) / math.sqrt(n) * math.sqrt(5000) for n in (4000, 5000, 6300)]
    assert min(look_factor(n, levels) for n in grid) > 1.96
    at_5000 = [look_factor(5000, Levels(0.95, tight)) for tight in (1000, 4000, 5000, 6300, 30_000)]
    assert min(at_5000) == pytest.approx(at_5000[2], rel=1e-3)
    assert widths == sorted(widths, reverse=True)


def two_arms(rng: np.random.Generator, users: int, effect: float, per_user: int = 4, tail_treated: bool = True) -> dict[str, Any]:
    """Rows of users who ask about the head and about the tail; the treatment adds `effect` in the head and nothing in the tail."""
    user = np.repeat(np.arange(users), per_user)
    arm = rng.random(users)[user] < 0.5
    head = rng.random(len(user)) < 0.5
    clicks = rng.random(len(user)) < 0.3 + 0.1 * rng.standard_normal(users)[user] + effect * (arm & head)
    return {
        "user": [f"u{n}" for n in user],
        "arm": np.where(arm, "b", "a"),
        "stratum": np.where(head, "head", "tail"),
        "changed": head | tail_treated,
        "clicks": clicks.astype(int),
        "day": [datetime.date(2031, 2, 1)] * len(user),
    }


def test_an_experiment_of_ones_own_tables(store: Storage, tmp_path: Path) -> None:
    log = write_csv(tmp_path, "log.csv", two_arms(np.random.default_rng(1), 3000, 0.1))
    receipt = run(store, log=log, columns=COLUMNS, trigger="all")
    result = receipt.result
    assert result.verdict == "higher"
    assert [effect.stratum for effect in result.effects] == ["all", "changed", "head", "tail"]
    by_stratum = {effect.stratum: effect for effect in result.effects}
    assert by_stratum["head"].low < 0.1 < by_stratum["head"].high
    assert by_stratum["tail"].low < 0 < by_stratum["tail"].high
    full = result.full.estimate
    assert full.low < 0.05 < full.high
    assert full.always_low < full.low < full.value < full.high < full.always_high
    assert result.full.shares == pytest.approx({"head": 0.5, "tail": 0.5}, abs=0.02)
    assert receipt.rows == {
        "in": 12_000,
        "used": 12_000,
        "before": 0,
        "no_time": 0,
        "no_unit": 0,
        "other_arm": 0,
        "no_outcome": 0,
        "after": 0,
    }
    assert output_table(store, receipt, "effects")["stratum"].to_pylist()[-1] == "full coverage"
    assert "effects.svg" in receipt.outputs
    assert run(store, log=log, columns=COLUMNS, trigger="all").reused


def test_a_head_only_experiment_says_nothing_of_all_traffic(store: Storage, tmp_path: Path) -> None:
    log = write_csv(tmp_path, "log.csv", two_arms(np.random.default_rng(2), 3000, 0.1, tail_treated=False))
    table = pa_csv.read_csv(log)
    rows = {name: table[name] for name in table.column_names}
    result = run(store, log=log, columns={**COLUMNS, "changed": "changed"}, trigger="column").result
    assert result.verdict == "higher"
    assert result.full.estimate is not None  # the tail's answers are the same in both arms: they have no effect
    assert result.full.changes == {"head": 1.0, "tail": 0.0}
    few = {**rows, "changed": pa.array([s == "head" or n % 400 == 0 for n, s in enumerate(rows["stratum"].to_pylist())])}
    result = run(store, log=write_csv(tmp_path, "few.csv", few), columns={**COLUMNS, "changed": "changed"}, trigger="column").result
    assert result.full.estimate is None
    assert [(one.stratum, one.units_needed) for one in result.full.thin] == [("tail", 200)]
    absent = {"head": 0.6, "tail": 0.395, "unseen": 0.005}
    result = run(store, log=log, columns=COLUMNS, traffic=absent).result
    assert result.full.left_out == {"unseen": 0.005}
    assert result.full.shares == pytest.approx({"head": 0.6 / 0.995, "tail": 0.395 / 0.995})


def test_a_wrong_split_stops_the_experiment(store: Storage, tmp_path: Path) -> None:
    rows = two_arms(np.random.default_rng(3), 3000, 0.1)
    left = np.random.default_rng(4).random(3000) > 0.2  # a fifth of the treated users never reached the log
    keep_row = [left[int(user[1:])] or arm == "a" for user, arm in zip(rows["user"], rows["arm"], strict=True)]
    log = write_csv(tmp_path, "log.csv", {name: np.asarray(column)[keep_row] for name, column in rows.items()})
    receipt = run(store, log=log, columns=COLUMNS)
    assert receipt.result.verdict == "sample_ratio"
    assert not receipt.result.effects
    assert receipt.result.full is None
    assert "NOT as planned" in " ".join(receipt.notes)
    # the log may be whole while the treatment decides whose request counts as changed
    chosen = {**rows, "changed": [arm == "b" or int(user[1:]) % 3 > 0 for arm, user in zip(rows["arm"], rows["user"], strict=True)]}
    log = write_csv(tmp_path, "chosen.csv", chosen)
    ratio = run(store, log=log, columns={**COLUMNS, "changed": "changed"}, trigger="column").result.ratio
    assert ratio.p > 0.001 > ratio.changed_p
    assert not ratio.passed


def test_units_in_both_arms_are_left_out_and_many_stop_it(store: Storage, tmp_path: Path) -> None:
    rows = two_arms(np.random.default_rng(5), 3000, 0.1)
    rows["arm"][:4] = ["a", "b", "a", "b"]
    result = run(store, log=write_csv(tmp_path, "one.csv", rows), columns=COLUMNS).result
    assert (result.ratio.mixed, result.effects[0].units_control + result.effects[0].units_treatment) == (1, 2999)
    rows["arm"][:4000:4] = "a"
    rows["arm"][1:4000:4] = "b"
    assert run(store, log=write_csv(tmp_path, "many.csv", rows), columns=COLUMNS).result.verdict == "mixed_units"


def test_arms_and_outcomes_from_tables_of_their_own(store: Storage, tmp_path: Path) -> None:
    rows = two_arms(np.random.default_rng(6), 3000, 0.0)
    whole = run(store, log=write_csv(tmp_path, "whole.csv", rows), columns=COLUMNS).result
    ids = [f"r{n}" for n in range(len(rows["user"]))]
    log = write_csv(tmp_path, "log.csv", {"id": ids, "user": rows["user"], "stratum": rows["stratum"]})
    clicked = np.flatnonzero(rows["clicks"])
    outcomes = write_csv(tmp_path, "clicks.csv", {"id": [ids[n] for n in clicked], "clicks": [1] * len(clicked)})
    users, first = np.unique(rows["user"], return_index=True)
    arms = write_csv(tmp_path, "arms.csv", {"user": [*users, "absent"], "arm": [*np.asarray(rows["arm"])[first], "a"]})
    columns = {**COLUMNS, "key": "id"}
    result = run(store, log=log, assignments=arms, outcomes=outcomes, columns=columns).result
    assert result.effects == whole.effects
    assert result.full == whole.full
    assert result.ratio.control == whole.ratio.control + 1
    twice = write_csv(tmp_path, "twice.csv", {"id": [ids[0]] * 2, "clicks": [1, 1]})
    with pytest.raises(InputError, match="more than one row of outcomes"):
        run(store, log=log, assignments=arms, outcomes=twice, columns=columns)
    with pytest.raises(ConfigError, match="this column is not there"):
        run(store, log=log, assignments=arms, outcomes=outcomes, columns={**columns, "outcome": "buys"})
    with pytest.raises(InputError, match="does not exist"):
        run(store, log="nowhere.csv")


def test_what_came_before_the_start_is_the_covariate(store: Storage, tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    users, days = 2000, 8
    habit = np.repeat(rng.beta(1, 2, users), days)
    user, day = np.repeat(np.arange(users), days), np.tile(np.arange(days), users)
    arm = (rng.random(users) < 0.5)[user]
    rows = {
        "user": user,
        "arm": np.where((day < 4) | ~arm, "a", "b"),  # before the start all have the old release
        "clicks": (rng.random(len(user)) < habit).astype(int),
        "day": [datetime.date(2031, 2, 1 + int(n)) for n in day],
        "stratum": ["head"] * len(user),
    }
    log = write_csv(tmp_path, "log.csv", rows)
    receipt = run(store, log=log, columns=COLUMNS, start="2031-02-05", end="2031-02-08")
    assert (receipt.rows["before"], receipt.rows["used"], receipt.rows["after"]) == (8000, 6000, 2000)
    assert receipt.result.ratio.mixed == 0
    assert receipt.result.effects[0].variance_left < 0.75
    assert receipt.result.effects[0].units_control + receipt.result.effects[0].units_treatment == 2000


def request_log(store: Storage, queries: Sequence[str], releases: Sequence[str], degraded: Sequence[bool]) -> None:
    when = datetime.datetime(2031, 2, 1, tzinfo=datetime.UTC)
    fields = {"source": "teacher", "cached": True, "reason": "", "confidence": None, "latency_ms": 1.0, "caller": "", "time": when}
    rows = [
        {"query": q, "release": r, "degraded": d, "request_id": f"r{n}", **fields}
        for n, (q, r, d) in enumerate(zip(queries, releases, degraded, strict=True))
    ]
    write_table(store, "requests/2031-02-01/120000-n-1-1.parquet", pa.Table.from_pylist(rows, schema=REQUEST_LOG))


def test_a_canary_from_the_request_log_with_the_strata_of_a_plan(store: Storage, tmp_path: Path) -> None:
    """Queries are the units: each went to one release. The plan's head, and the counts of its log, are the strata."""
    rng = np.random.default_rng(8)
    names = [f"query {n}" for n in range(3000)]
    day = datetime.date(2031, 1, 31)
    counts = [10] * 500 + [3] * 800 + [1] * 700  # the last 1,000 are not in the log
    logged = [
        {"query_key": query_key(q), "query": q, "count": c, "first_day": day, "last_day": day} for q, c in zip(names, counts, strict=False)
    ]
    keep(store, "ingest", "cd", {"queries": pa.Table.from_pylist(logged, schema=QUERY)})
    head = [{**row, "rank": n + 1, "stratum": "head", "eval_only": False} for n, row in enumerate(logged[:500])]
    keep(store, "plan", "ab", {"head": pa.Table.from_pylist(head, schema=PLANNED)}, inputs={"log": "ingest/cd"})
    canary = rng.random(3000) < 0.5
    queries = names + names[:500]
    arms = ["b" if canary[n % 3000] else "a" for n in range(3500)]
    request_log(store, queries, arms, [bool(rng.random() < (0.2 if arm == "b" else 0.4)) for arm in arms])
    result = run(store, plan="plan").result
    assert result.verdict == "lower"
    assert {effect.stratum: effect.requests for effect in result.effects[2:]} == {"head": 1000, "torso": 800, "tail": 700, "unseen": 1000}
    assert result.ratio.control + result.ratio.treatment == 3000
    assert result.full.estimate.value == pytest.approx(-0.2, abs=0.05)
    rows = {"query": [f"other {n}" for n in range(40)], "release": ["a", "b"] * 20, "degraded": [0, 1] * 20}
    with pytest.raises(InputError, match="the plan knows no query of the log"):
        run(store, plan="plan", log=write_csv(tmp_path, "other.csv", rows))


def test_only_answers_that_differ_between_two_releases_count(store: Storage, tmp_path: Path, segmentation: Task) -> None:
    """Counterfactual from the snapshots: queries that both releases answer alike are no treatment, whichever arm they met."""
    kinds = ("same", "better", "come", "gone", "miss")
    queries = [f"{kind} {n}" for kind in kinds for n in range(120)]
    old: Held = {q: ('"s"', "teacher", 1) for q in queries if q.startswith(("same", "better", "gone"))}
    new: Held = {q: ('"s"' if q.startswith("same") else '"B"', "teacher", 1) for q in queries if q.startswith(("same", "better", "come"))}
    a, b = (make_release(store, snapshot=snapshot(store, tmp_path, held).id, task=segmentation) for held in (old, new))
    assert a.id != b.id
    other = b.model_copy(update={"student": "distill/ab"})
    codes = {"same": AnswerChange.SAME, "better": 0, "come": 0, "gone": 0, "miss": AnswerChange.NOT_COVERED}
    assert query_changes(store, a, b, queries).tolist() == [codes[q.split()[0]] for q in queries]
    assert query_changes(store, a, other, queries).tolist() == [codes[q.split()[0]] if q[:4] == "same" else 0 for q in queries]
    rng = np.random.default_rng(10)
    arms = np.where(rng.random(len(queries)) < 0.5, b.id, a.id)
    request_log(store, queries, arms.tolist(), [arm == b.id and q.startswith("better") for arm, q in zip(arms, queries, strict=True)])
    result = run(store, control=a.id, treatment=b.id, trigger="snapshots").result
    everything, changed = result.effects
    assert (everything.requests, changed.requests) == (600, 360)
    assert changed.value == pytest.approx(1 / 3, abs=0.1)
    assert everything.value == pytest.approx(1 / 5, abs=0.1)


def test_without_a_log_it_says_how_one_comes(store: Storage) -> None:
    with pytest.raises(InputError, match="no request log"):
        run(store)
    for arms in ({"control": ""}, {"control": "b"}):
        with pytest.raises(ConfigError, match="the two arms are not named"):
            run(store, **arms)


def test_before_the_start_it_says_what_can_be_detected(store: Storage, tmp_path: Path) -> None:
    """The effect that it names is found as often as it says, and the thin stratum is named in advance."""
    rng = np.random.default_rng(9)
    rows = {name: column for name, column in two_arms(rng, 4000, 0.0).items() if name != "arm"}
    rows["stratum"] = np.where(np.arange(16_000) % 100 == 0, "unseen", rows["stratum"])
    receipt = run(store, log=write_csv(tmp_path, "log.csv", rows), columns=COLUMNS, mode="power", control="", treatment="", effect=0.02)
    power = {one.stratum: one for one in receipt.result.power}
    assert receipt.result.verdict == "power"
    assert list(power) == ["all", "head", "tail", "unseen"]
    assert [name for name, one in power.items() if one.thin] == ["unseen"]
    effect = power["all"].detectable
    assert power["all"].times_as_long == pytest.approx((effect / 0.02) ** 2)
    assert power["all"].always_detectable > effect
    shown = 0
    for _ in range(400):
        habit = 0.3 + 0.1 * rng.standard_normal(4000)
        treated = rng.random(4000) < 0.5
        clicks = rng.binomial(4, np.clip(habit + effect * treated, 0, 1)).astype(float)
        shown += unit_effect(UnitSums(treated, clicks, np.full(4000, 4.0)), Levels()).p < 0.05
    assert shown / 400 == pytest.approx(0.8, abs=0.06)


def plain_rows(n: int = 40) -> dict[str, Any]:
    """A log of n users, a row each, days 1 to 4 of February, both arms."""
    return {
        "user": [f"u{i}" for i in range(n)],
        "arm": ["a" if i % 2 else "b" for i in range(n)],
        "stratum": ["head"] * n,
        "clicks": [i % 3 % 2 for i in range(n)],
        "day": [f"2031-02-0{1 + i % 4}" for i in range(n)],
    }


def write_every(folder: Path, name: str, columns: dict[str, list[Any]]) -> list[str]:
    """The same table as CSV with blank cells, as Parquet, and as Parquet with blank texts."""
    table = pa.table(columns)
    blank = {n: [("" if v is None else v) for v in column] if table[n].type == pa.string() else column for n, column in columns.items()}
    paths = [str(folder / f"{name}.{end}") for end in ("csv", "parquet", "blank.parquet")]
    pa_csv.write_csv(table, paths[0])
    pq.write_table(table, paths[1])
    pq.write_table(pa.table(blank), paths[2])
    return paths


@pytest.mark.parametrize("column, reason", [("user", "no_unit"), ("arm", "other_arm"), ("clicks", "no_outcome"), ("day", "no_time")])
def test_an_empty_cell_is_a_row_set_aside_in_every_format(store: Storage, tmp_path: Path, column: str, reason: str) -> None:
    rows = plain_rows()
    rows[column][:6] = [None] * 6
    for log in write_every(tmp_path, "log", rows):
        counts = run(store, log=log, columns=COLUMNS, start="2031-02-01", trigger="all").rows
        assert (counts["used"], counts[reason]) == (34, 6), log


def test_days_are_utc_days_in_every_format(store: Storage, tmp_path: Path) -> None:
    """11 pm in New York is the next day in UTC."""
    rows = plain_rows()
    utc = [datetime.datetime(2031, 2, 1 + i % 4, 4, tzinfo=datetime.UTC) for i in range(40)]
    zone = pa.array(utc, pa.timestamp("us", "America/New_York"))
    seconds = [int(when.timestamp()) for when in utc]
    offset = [f"{when - datetime.timedelta(hours=5):%Y-%m-%dT%H:%M:%S}-05:00" for when in utc]
    for n, day in enumerate(
        (zone, zone.cast(pa.timestamp("us", "UTC")), pa.array(seconds), pa.array(offset), pa.array(utc).cast(pa.date32()))
    ):
        table = pa.table({**rows, "day": day})
        pq.write_table(table, tmp_path / f"{n}.parquet")
        pa_csv.write_csv(table.set_column(4, "day", day.cast(pa.string())) if n > 1 else table, tmp_path / f"{n}.csv")
        for log in (tmp_path / f"{n}.parquet", tmp_path / f"{n}.csv"):
            counts = run(store, log=str(log), columns=COLUMNS, start="2031-02-02", end="2031-02-04").rows
            assert (counts["used"], counts["before"], counts["after"]) == (20, 10, 10), log


@pytest.mark.parametrize(
    "column, cell, said",
    [
        ("clicks", float("inf"), "not a number"),
        ("clicks", "yes", "not a number"),
        ("day", "31/12/2031", "not a time"),
        ("day", "Feb 09 2031", "not a time"),
    ],
)
def test_a_cell_that_is_no_outcome_or_no_time_is_named(store: Storage, tmp_path: Path, column: str, cell: Any, said: str) -> None:
    rows = plain_rows()
    rows[column] = [cell if n == 6 else type(cell)(value) for n, value in enumerate(rows[column])]
    log = str(tmp_path / "log.parquet")
    pq.write_table(pa.table(rows), log)
    name = {"clicks": "outcome", "day": "time"}[column]
    for path in (log, write_csv(tmp_path, "log.csv", rows)):
        with pytest.raises(InputError, match=said) as error:
            run(store, log=path, columns=COLUMNS, start="2031-02-01")
        assert (error.value.where, error.value.value) == (f"log, columns.{name}={column}, row 7", cell)


def test_missing_is_for_a_request_without_a_row_of_outcomes_alone(store: Storage, tmp_path: Path) -> None:
    rows = plain_rows()
    ids = [f"{n:03}" for n in range(40)]
    log = write_csv(tmp_path, "log.csv", {"id": [*ids[:38], None, "040"], **{name: rows[name] for name in ("user", "arm", "day")}})
    outcomes = write_csv(tmp_path, "clicks.csv", {"id": ids[:20], "clicks": [None, *[1] * 19]})
    receipt = run(store, log=log, outcomes=outcomes, columns={**COLUMNS, "key": "id", "stratum": ""})
    assert (receipt.rows["used"], receipt.rows["no_outcome"]) == (38, 2)
    everything = receipt.result.effects[0]
    assert everything.control * everything.units_control + everything.treatment * everything.units_treatment == pytest.approx(19)
    counts = run(store, log=log, outcomes=outcomes, columns={**COLUMNS, "key": "id", "stratum": ""}, missing=None).rows
    assert (counts["used"], counts["no_outcome"]) == (19, 21)


def test_an_outcome_never_counts_twice(store: Storage, tmp_path: Path) -> None:
    rows = plain_rows()
    ids = [f"r{n}" for n in range(40)]
    both = write_csv(tmp_path, "both.csv", {"id": ids, **rows})
    twice = write_csv(tmp_path, "log.csv", {"id": [*ids[:39], "r3"], **{name: rows[name] for name in ("user", "arm", "day")}})
    outcomes = write_csv(tmp_path, "clicks.csv", {"id": ids, "clicks": rows["clicks"]})
    columns = {**COLUMNS, "key": "id", "stratum": ""}
    with pytest.raises(InputError, match="more than one row of the log") as error:
        run(store, log=twice, outcomes=outcomes, columns=columns)
    assert error.value.value == "r3"
    with pytest.raises(InputError, match="in the log and in outcomes"):
        run(store, log=both, outcomes=outcomes, columns=columns)
    request_log(store, ["q"] * 3, ["a", "b", "a"], [False] * 3)  # the same request in two files
    again = read_table(store, "requests/2031-02-01/120000-n-1-1.parquet")
    write_table(store, "requests/2031-02-02/120000-n-1-1.parquet", again)
    clicks = write_csv(tmp_path, "requests.csv", {"request_id": ["r0"], "clicks": [1]})
    with pytest.raises(InputError, match="more than one row of the log"):
        run(store, outcomes=clicks, columns={"outcome": "clicks"})


def test_an_arm_that_no_row_has_is_named_with_those_that_are_there(store: Storage, tmp_path: Path) -> None:
    log = write_csv(tmp_path, "log.csv", plain_rows())
    for arms, value in (({"treatment": "new"}, "new"), ({"control": "x", "treatment": "y"}, "x")):
        with pytest.raises(InputError, match="no row has this arm") as error:
            run(store, log=log, columns=COLUMNS, **arms)
        assert (error.value.value, error.value.fix) == (value, "name one of: a, b")


@pytest.mark.parametrize("column", ["stratum", "changed"])
def test_a_stratum_or_a_change_that_is_not_known_is_not_guessed(store: Storage, tmp_path: Path, column: str) -> None:
    rows = {**plain_rows(), "changed": [True] * 40}
    rows[column][2] = None
    columns = {**COLUMNS, "changed": "changed"}
    for log in write_every(tmp_path, "log", rows):
        with pytest.raises(InputError, match="requests have no value in this column") as error:
            run(store, log=log, columns=columns, trigger="column")
        assert (error.value.where, error.value.value) == (f"log, columns.{column}={column}", "1 rows")


def test_users_of_a_csv_are_text(store: Storage, tmp_path: Path) -> None:
    rows = plain_rows()
    rows["user"] = [f"{n:0{1 + n % 2 * 2}}" for n in range(10, 50)]  # 10, 011, 12, 013
    (tmp_path / "arms.csv").write_text("user,arm\n" + "".join(f"{u},{a}\n" for u, a in zip(rows["user"], rows.pop("arm"), strict=True)))
    log = tmp_path / "log.csv"
    log.write_text("\n".join([",".join(rows), *(",".join(map(str, cells)) for cells in zip(*rows.values(), strict=True))]))
    counts = run(store, log=str(log), assignments=str(tmp_path / "arms.csv"), columns=COLUMNS).rows
    assert counts["used"] == 40


def test_a_start_that_is_no_day_is_refused(store: Storage) -> None:
    for day in ("2031-13-45", "20310131", "tomorrow"):
        with pytest.raises(ValidationError, match="no day"):
            experiment.Config(start=day)
