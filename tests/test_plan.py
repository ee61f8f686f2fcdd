"""The plan against plain Python: where the head ends, who answers what, what holdout traffic finds covered."""

from __future__ import annotations

import datetime
import json
import random
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headtail.adapters.storage import open_storage, read_json, read_table, stream_table
from headtail.adapters.storage.receipts import load_ref, output_table
from headtail.core.config import TrackingConfig
from headtail.core.errors import InputError, LedgerError
from headtail.core.receipt import Receipt
from headtail.core.rows import HUMAN_LABELS, PLANNED, with_side_inputs
from headtail.core.strata import stratum_places
from headtail.core.task import load_task
from headtail.stages.ingest import Config as LogConfig
from headtail.stages.ingest import LogColumns
from headtail.stages.ingest import run as ingest
from headtail.stages.plan import Config, Head, queries, run, tables
from headtail.stages.plan.selection import draw_teacher_sample, head_end, zipf_exponent

OFF = TrackingConfig(enabled=False)
ANSWER = json.dumps({"segments": []})
COUNTS = st.lists(st.integers(1, 50), min_size=1, max_size=40).map(lambda found: np.array(sorted(found, reverse=True)))


@given(COUNTS, st.none() | st.floats(0.01, 1), st.none() | st.integers(1, 50), st.integers(1, 60), st.integers(0, 2**40 - 1))
def test_the_tightest_limit_ends_the_head(
    counts: np.ndarray[Any, np.dtype[np.int64]], coverage: float | None, rows: int | None, low: int, barred: int
) -> None:
    """Queries that may not be head fill no limit."""
    may = np.array([not barred >> i & 1 for i in range(len(counts))])
    end, limit = head_end(counts, Head(coverage=coverage, rows=rows, min_count=low), may)
    total, fits = int(counts.sum()), []
    for n in range(len(counts) + 1):
        before = (counts * may)[: max(0, n - 1)].sum(), may[: max(0, n - 1)].sum()
        reached = n > 0 and (
            (coverage is not None and before[0] >= coverage * total * (1 - 1e-12)) or (rows is not None and before[1] >= rows)
        )
        fits.append(not reached and (n == 0 or counts[n - 1] >= low))
    assert end == max(n for n, fine in enumerate(fits) if fine)
    assert limit in ("coverage", "rows", "min_count")


def test_the_limit_that_rules_is_named() -> None:
    counts = np.array([50, 30, 10, 5, 3, 1, 1])
    assert head_end(counts, Head(coverage=0.5), counts > 0) == (1, "coverage")
    assert head_end(counts, Head(coverage=0.51), counts > 0) == (2, "coverage")
    assert head_end(counts, Head(coverage=0.9, rows=2), counts > 0) == (2, "rows")
    assert head_end(counts, Head(coverage=1.0), counts > 0) == (5, "min_count")
    assert head_end(counts, Head(coverage=1.0, min_count=1), counts > 0) == (7, "min_count")
    assert head_end(np.array([], np.int64), Head(), np.array([], bool)) == (0, "min_count")


@given(COUNTS, st.integers(0, 40), st.integers(0, 2**30), st.integers(1, 5))
def test_the_teacher_sample(counts: np.ndarray[Any, np.dtype[np.int64]], rows: int, seed: int, torso: int) -> None:
    rng = np.random.default_rng(seed)
    stratum, eval_only = stratum_places(counts, np.arange(len(counts)) < 3, torso), rng.random(len(counts)) < 0.2
    chosen = draw_teacher_sample(rng.random(len(counts)), stratum, eval_only, rows)
    assert not (chosen & eval_only).any()
    assert not (chosen & (stratum == 0)).any()
    free = [int(((stratum == code) & ~eval_only).sum()) for code in (1, 2)]
    taken = [int((chosen & (stratum == code)).sum()) for code in (1, 2)]
    assert sum(taken) == min(rows, sum(free)), "where one stratum has too few the other gives more"
    assert taken[0] >= min(rows // 2, free[0])
    assert taken[1] >= min(rows - rows // 2, free[1])


def test_the_zipf_exponent_is_found_again() -> None:
    for exponent in (0.8, 1.0, 1.3):
        counts = np.floor(1e9 * np.arange(1, 20_001, dtype=float) ** -exponent).astype(np.int64)
        assert zipf_exponent(counts) == pytest.approx(exponent, abs=0.01)
    assert zipf_exponent(np.array([9, 3, 1])) > 1
    assert zipf_exponent(np.array([5, 5])) == 0.0


@pytest.fixture
def log(root: str, tmp_path: Path) -> Callable[..., Receipt]:
    """Ingest events (query, day) with human labels for some queries; side inputs for queries that end in 0."""

    def do(events: list[tuple[str, int]], labels: list[str] = [], **fields: Any) -> Receipt:  # noqa: B006
        path = tmp_path / "log.jsonl"
        side = {query: [f"{query} shop"] for query, _ in events if query.endswith("0")}
        rows = [
            {"query": query, "time": str(datetime.date(2024, 1, 1) + datetime.timedelta(day)), "businesses": side.get(query)}
            for query, day in events
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "labels.jsonl").write_text("".join(json.dumps({"query": query, "answer": ANSWER}) + "\n" for query in labels))
        where = {"labels": str(tmp_path / "labels.jsonl")} if labels else {}
        return ingest(LogConfig(root=root, log=str(path), columns=LogColumns(time="time"), tracking=OFF, **where, **fields))

    return do


BEFORE = [f"q{i}" for i in range(60) for _ in range(max(1, 30 // (i + 1)))]
LAST = 40  # so many days that the last, of four events, is a whole one
EVENTS = [*((query, n % LAST) for n, query in enumerate(BEFORE)), *((query, LAST) for query in ("q3", "q50", "new", "new"))]
TRAINING_SET = ["q0", "q7", "q20", "q59", "q30", "new", "never asked"]


def do(root: str, **fields: Any) -> Receipt:
    return run(Config(**({"root": root, "tracking": OFF, "teacher_sample_rows": 10} | fields)))


def rows(root: str, receipt: Receipt, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = output_table(open_storage(root), receipt, name).to_pylist()
    return found


def test_every_query_has_its_place(log: Callable[..., Receipt], root: str) -> None:
    ingested = log(EVENTS, TRAINING_SET)
    receipt = do(root)
    parts = {name: rows(root, receipt, name) for name in ("head", "teacher_sample", "student_rows")}
    everything = sorted((row for part in parts.values() for row in part), key=lambda row: row["rank"])
    assert [row["rank"] for row in everything] == list(range(1, 61)), "disjoint, and together all queries"
    columns = ("query_key", "query", "count", "first_day", "last_day", "businesses")
    assert [{name: row[name] for name in columns} for row in everything] == rows(root, ingested, "queries")
    for name, part in parts.items():
        assert output_table(open_storage(root), receipt, name).schema == with_side_inputs(PLANNED, ["businesses"])
        assert [row["rank"] for row in part] == sorted(row["rank"] for row in part)
    assert {row["query"] for row in everything if row["eval_only"]} == {"q0", "q7", "q20", "q59", "q30"}
    assert not any(row["eval_only"] for row in parts["teacher_sample"])
    assert {row["stratum"] for row in parts["head"]} == {"head"}
    assert all(row["stratum"] == ("torso" if row["count"] > 1 else "tail") for row in parts["teacher_sample"] + parts["student_rows"])
    assert sorted(row["stratum"] for row in parts["teacher_sample"]) == ["tail"] * 5 + ["torso"] * 5
    torso = sum(row["stratum"] == "torso" for row in everything)
    expected = {
        "head": len(parts["head"]),
        "torso": torso,
        "teacher_sample": 10,
        "student_rows": len(parts["student_rows"]),
        "human_labels": 7,
        "eval_only": 5,
        "left_out": 0,
    }
    assert expected.items() <= receipt.rows.items()
    assert sum(receipt.rows[name] for name in ("head", "torso", "tail")) == 60


def test_human_labels_have_strata_and_side_inputs(log: Callable[..., Receipt], root: str) -> None:
    log(EVENTS, TRAINING_SET)
    receipt = do(root)
    labels = output_table(open_storage(root), receipt, "human_labels")
    assert labels.schema == with_side_inputs(HUMAN_LABELS, ["businesses"])
    found = {row["query"]: row for row in labels.to_pylist()}
    wanted = {"q0": "head", "q7": "torso", "q20": "tail", "q59": "tail", "q30": "tail", "new": "unseen", "never asked": "unseen"}
    assert {query: row["stratum"] for query, row in found.items()} == wanted
    assert {query: row["businesses"] for query, row in found.items() if row["businesses"]} == {
        "q0": ["q0 shop"],
        "q20": ["q20 shop"],
        "q30": ["q30 shop"],
    }
    assert {query: row["count"] for query, row in found.items()} == {
        "q0": 30,
        "q7": 3,
        "q20": 1,
        "q59": 1,
        "q30": 1,
        "new": 0,
        "never asked": 0,
    }
    assert [receipt.rows[f"human_labels.{name}"] for name in ("head", "torso", "tail", "unseen")] == [1, 1, 3, 2]


def test_coverage_is_what_a_cache_of_the_head_would_have_hit(log: Callable[..., Receipt], root: str) -> None:
    log(EVENTS, TRAINING_SET)
    receipt = do(root)
    head = {row["query"] for row in rows(root, receipt, "head")}
    before = [query for query, day in EVENTS if day < LAST]
    holdout = [query for query, day in EVENTS if day == LAST]
    assert receipt.metrics["head_coverage"] == pytest.approx(sum(q in head for q in before) / len(before))
    assert receipt.metrics["head_coverage_holdout"] == pytest.approx(sum(q in head for q in holdout) / len(holdout)) == 0.25
    assert receipt.metrics["seen_coverage_holdout"] == 0.5
    assert receipt.metrics["head_rows"] == len(head)
    found = read_json(open_storage(root), receipt.output("coverage").path)
    ranked = [
        row["query"]
        for row in sorted(
            rows(root, receipt, "head") + rows(root, receipt, "teacher_sample") + rows(root, receipt, "student_rows"),
            key=lambda r: r["rank"],
        )
    ]
    for point in found["points"]:
        covered = set(ranked[: point["rank"]])
        assert point["share"] == pytest.approx(sum(q in covered for q in before) / len(before))
        assert point["share_holdout"] == pytest.approx(sum(q in covered for q in holdout) / len(holdout))
    assert [found["points"][i]["rank"] for i in (0, -1)] == [1, 60]
    assert found["head"] | {"rows": len(head), "limit": "coverage"} == found["head"]
    assert len(head) in {point["rank"] for point in found["points"]}


def test_the_figure_says_it(log: Callable[..., Receipt], root: str) -> None:
    log(EVENTS)
    receipt = do(root)
    svg = open_storage(root).read(receipt.output("coverage.svg").path).decode()
    ET.fromstring(svg)
    for text in ("head ends", "up to the cut 100%", "holdout traffic 50%", "queries in the head, log scale", "of 60 queries", "expected"):
        assert text in svg
    log([("a", 1), ("a", 1), ("b", 1)], holdout_days=0)
    alone = do(root)
    assert ET.fromstring(open_storage(root).read(alone.output("plan.svg").path).decode()).tag.endswith("svg")
    assert "holdout traffic" not in open_storage(root).read(alone.output("coverage.svg").path).decode()
    assert any("no holdout traffic" in note for note in alone.notes)


def test_the_plan_does_not_depend_on_the_order_of_the_log(log: Callable[..., Receipt], root: str) -> None:
    log(EVENTS, TRAINING_SET)
    first = do(root)
    shuffled = EVENTS.copy()
    random.Random(1).shuffle(shuffled)
    log(shuffled, TRAINING_SET)
    second = do(root)
    assert second.fingerprint != first.fingerprint, "another log"
    for name in ("head", "teacher_sample", "student_rows", "human_labels"):
        assert rows(root, second, name) == rows(root, first, name)
    third = do(root, seed=1)
    assert {row["query"] for row in rows(root, third, "teacher_sample")} != {row["query"] for row in rows(root, first, "teacher_sample")}
    assert rows(root, third, "head") == rows(root, first, "head")


def test_a_cap_on_the_student_rows_leaves_out_the_least_frequent(log: Callable[..., Receipt], root: str) -> None:
    log(EVENTS)
    whole, capped = do(root), do(root, max_student_rows=20)
    assert rows(root, capped, "student_rows") == rows(root, whole, "student_rows")[:20]
    assert capped.rows["left_out"] == whole.rows["student_rows"] - 20
    assert any("in no table" in note for note in capped.notes)


def test_a_second_run_is_reused_and_refs_work(log: Callable[..., Receipt], root: str) -> None:
    ingested = log(EVENTS, TRAINING_SET)
    first = do(root)
    assert do(root).reused
    assert do(root, log=ingested.path).reused
    assert do(root, log=ingested.fingerprint).reused
    assert do(root, task="query_segmentation", head=Head(coverage=0.6)).fingerprint != first.fingerprint
    store = open_storage(root)
    receipt, name = load_ref(store, "plan:human_labels")
    assert receipt.output(name).rows == 7
    assert first.inputs["log"] == ingested.path


def test_what_a_user_did_wrong_is_said(log: Callable[..., Receipt], root: str) -> None:
    with pytest.raises(InputError, match="ingest has not been run"):
        do(root)
    log([("a", 1), ("b", 1), ("c", 2)])
    with pytest.raises(InputError, match="the head is empty") as error:
        do(root)
    assert "most frequent query has 1 events" in str(error.value)
    assert not open_storage(root).exists("plan/LATEST")
    assert do(root, head=Head(min_count=1)).rows["head"] == 1
    with pytest.raises(InputError, match="another task than query_intent"):
        do(root, task="query_intent")


def test_few_queries_and_labels_in_the_head_alone_are_noted(log: Callable[..., Receipt], root: str) -> None:
    log([("a", 1), ("a", 1), ("b", 1), ("c", 2)], ["a"])
    receipt = do(root)
    assert any("only 1 of 10 rows in the teacher's sample" in note for note in receipt.notes)
    assert any("all human labels are in the head" in note for note in receipt.notes)


def test_rows_that_do_not_add_up_end_the_job(log: Callable[..., Receipt], root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    log(EVENTS)
    real = stream_table

    def lossy(*arguments: Any) -> Any:
        for batch in real(*arguments):
            yield batch.slice(0, batch.num_rows - (len(arguments) == columns))

    columns = 2  # where all are read
    monkeypatch.setattr(tables, "stream_table", lossy)
    monkeypatch.setattr(queries, "stream_table", lossy)
    with pytest.raises(LedgerError, match="are not the queries of the log"):
        do(root)
    columns = 3  # where the texts alone are
    with pytest.raises(LedgerError, match="are not the queries of the log"):
        do(root)
    assert not open_storage(root).exists("plan/LATEST")


def test_a_table_out_of_order_is_refused(log: Callable[..., Receipt], root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    log(EVENTS)
    real = read_table

    def reversed_table(*arguments: Any) -> pa.Table:
        found = real(*arguments)
        return found.take(pa.array(range(len(found) - 1, -1, -1)))

    monkeypatch.setattr("headtail.stages.plan.queries.read_table", reversed_table)
    with pytest.raises(LedgerError, match="not by falling count"):
        do(root)


def test_redacted_queries_take_no_room_in_the_head_unless_they_share_an_answer(root: str, tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    log.write_text("query,n\ncall 5552345678,500\ncall 5552349999,500\npizza,60\nsushi,40\nramen,30\ncard 4111111111111111,1\n")
    task = shutil.copytree(load_task("query_intent").folder, tmp_path / "task")
    ingest(LogConfig(root=root, tracking=OFF, log=str(log), columns=LogColumns(count="n"), task=str(task), holdout_share=0.0))
    limits = Head(rows=2, coverage=None, min_count=1)
    store = open_storage(root)

    def texts(receipt: Receipt, name: str) -> set[str]:
        return set(output_table(store, receipt, name)["query"].to_pylist())

    uncached = run(Config(root=root, tracking=OFF, task=str(task), head=limits, teacher_sample_rows=0))
    assert (texts(uncached, "head"), texts(uncached, "student_rows")) == ({"pizza", "sushi"}, {"ramen"})
    assert uncached.rows["redacted"] == 2
    sampled = run(Config(root=root, tracking=OFF, task=str(task), head=limits, teacher_sample_rows=5))
    assert (texts(sampled, "teacher_sample"), texts(sampled, "student_rows"), sampled.rows["redacted"]) == ({"ramen"}, set(), 2)
    assert uncached.metrics["head_coverage"] == pytest.approx(100 / 1131)
    assert any(note.startswith("2 redacted queries are in no table") for note in uncached.notes)
    (task / "task.yaml").write_text((task / "task.yaml").read_text() + "\nredacted: cached\n")
    cached = run(Config(root=root, tracking=OFF, task=str(task), head=limits, teacher_sample_rows=0))
    assert (texts(cached, "head"), texts(cached, "student_rows")) == ({"call <phone>", "pizza"}, {"sushi", "ramen", "card <card>"})
    assert cached.rows["redacted"] == 0
