"""Evaluation must not flatter: an oracle written apart from it, missing and broken answers, small strata, ties."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from conftest import answered_by, keep
from headtail.adapters.storage import Storage, read_json, read_table
from headtail.adapters.storage.receipts import load_receipt, output_table
from headtail.batch.answer_scores import SourceAnswer, score_rows
from headtail.core.config import TrackingConfig, build_config
from headtail.core.errors import ConfigError, InputError
from headtail.core.keys import canonical, query_key
from headtail.core.receipt import Receipt
from headtail.core.rows import ANSWER, HUMAN_LABELS, QUALITY, SCORED, with_side_inputs
from headtail.core.task import Task
from headtail.releases.seal import seal_labels, split_labels
from headtail.releases.traffic import read_traffic, with_traffic
from headtail.stages import evaluate
from headtail.stages.evaluate.scoring import Sureness, by_source, quality_rows, source_differences

LABELS = ("topic", "name", "location", "none")
INTENTS = ("browse", "price", "booking", "delivery")
OFF = TrackingConfig(enabled=False)
LATEST = {"teacher": "latest"}


def labels_table(rows: Sequence[tuple[str, Any, str, int]]) -> pa.Table:
    """(query, answer, stratum, count) as HUMAN_LABELS."""
    lines = [{"query_key": query_key(q), "query": q, "answer": canonical(a), "count": n, "stratum": s} for q, a, s, n in rows]
    return pa.Table.from_pylist(lines, schema=HUMAN_LABELS)


def answer_table(rows: Sequence[tuple[str, Any, str, float | None]], side_inputs: Sequence[str] = ()) -> pa.Table:
    """(query, answer, state, confidence) as ANSWER."""
    lines = [
        {"query_key": query_key(q), "query": q, "answer_key": query_key(f"{q}{i}"), "state": state, "confidence": confidence}
        | {"answer": canonical(a) if state == "answered" else None, "count": 1, "stratum": "head", "eval_only": True}
        for i, (q, a, state, confidence) in enumerate(rows)
    ]
    return pa.Table.from_pylist(lines, schema=with_side_inputs(ANSWER, side_inputs))


def answers_receipt(store: Storage, mark: str, table: pa.Table, task: Task, shards: int = 2) -> Receipt[Any]:
    """A precompute receipt over `table`: of a student where `mark` begins with an s, else of the teacher."""
    parts = {f"answers/shard-{i:05d}": table.take(pa.array(range(i, table.num_rows, shards), pa.int64())) for i in range(shards)}
    made = answered_by(f"model-{mark}", source="batch_student" if mark.startswith("s") else "teacher")
    return keep(store, "precompute", mark, parts, task_fingerprint=task.fingerprint, result=made)


def intent_of(name: str) -> dict[str, str]:
    return {"intent": name}


def segments(*pairs: tuple[str, str]) -> dict[str, Any]:
    return {"segments": [{"text": text, "label": label} for label, text in pairs]}


# ---- an oracle written from the definition, apart from headtail.core.score and headtail.core.intervals


def oracle_f1(pairs: Sequence[tuple[Any, Any]], weights: Sequence[float] | None = None) -> float | None:
    """Micro-F1 over (label, text) pairs as multisets; a missing answer is None."""
    hit = given_units = wanted_units = 0.0
    for i, (wanted, answer) in enumerate(pairs):
        want = [(s["label"], s["text"]) for s in wanted["segments"]]
        got = [(s["label"], s["text"]) for s in answer["segments"]] if answer is not None else []
        weight = weights[i] if weights else 1.0
        wanted_units += weight * len(want)
        given_units += weight * len(got)
        for unit in got:
            if unit in want:
                want.remove(unit)
                hit += weight
    if not wanted_units + given_units:
        return None
    precision = hit / given_units if given_units else 0.0
    recall = hit / wanted_units if wanted_units else 0.0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


SEGMENTS = st.lists(st.tuples(st.sampled_from(LABELS[:3]), st.sampled_from(["a", "b", "c"])), max_size=4).map(lambda x: segments(*x))
ROW = st.tuples(SEGMENTS, st.none() | SEGMENTS, st.sampled_from(["head", "torso", "tail", "unseen"]), st.integers(0, 20))


@given(st.lists(ROW, min_size=1, max_size=25))
@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_quality_is_the_oracles(segmentation: Task, rows: list[tuple[Any, Any, str, int]]) -> None:
    labels = labels_table([(f"q{i}", wanted, stratum, count) for i, (wanted, _, stratum, count) in enumerate(rows)])
    answers = {
        query_key(f"q{i}"): SourceAnswer(given, "answered" if given is not None else "invalid", None)
        for i, (_, given, _, _) in enumerate(rows)
    }
    scored = score_rows(segmentation, labels, {"teacher": answers})
    assert scored.schema == SCORED
    table = quality_rows(scored, Sureness(resamples=200))
    assert table.schema == QUALITY
    for line in table.to_pylist():
        if line["source"] != "teacher":
            continue
        name = line["stratum"]
        mine = [r for r in rows if name == "all" or r[2] == name]  # none for traffic: nobody says how these were drawn
        assert line["n"] == len(mine)
        assert line["answered"] == sum(r[1] is not None for r in mine)
        if not mine:
            assert line["quality"] is None
            continue
        wanted = oracle_f1([(w, g) for w, g, _, _ in mine])
        exact = [g is not None and sorted(map(str, w["segments"])) == sorted(map(str, g["segments"])) for w, g, _, _ in mine]
        assert line["exact"] == pytest.approx(np.mean(exact))
        assert line["quality"] == pytest.approx(np.mean(exact) if wanted is None else wanted)
        assert line["low"] - 1e-9 <= line["quality"] <= line["high"] + 1e-9


@given(st.lists(st.tuples(st.sampled_from(INTENTS), st.sampled_from(INTENTS)), min_size=1, max_size=60))
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_labels_are_sklearns_micro_f1(intent: Task, rows: list[tuple[str, str]]) -> None:
    labels = labels_table([(f"q{i}", intent_of(w), "head", 1) for i, (w, _) in enumerate(rows)])
    answers = {query_key(f"q{i}"): SourceAnswer(intent_of(g), "answered", 0.5) for i, (_, g) in enumerate(rows)}
    line = quality_rows(score_rows(intent, labels, {"teacher": answers}), Sureness(resamples=200)).to_pylist()[0]
    assert line["quality"] == pytest.approx(f1_score([w for w, _ in rows], [g for _, g in rows], average="micro"))
    assert line["quality"] == pytest.approx(line["exact"])


def setup_store(store: Storage, task: Task, n: int = 60) -> dict[str, str]:
    """Human labels on all strata; a teacher 9 in 10 right and sure of it, a student 7 in 10 right; two broken rows each."""
    rng = np.random.default_rng(4)
    strata = ["head", "torso", "tail", "unseen"]
    rows = [(f"query {i}", intent_of(INTENTS[i % 4]), strata[i % 4] if i >= 8 else "head", 0 if i % 4 == 3 else n - i) for i in range(n)]
    keep(store, "plan", "p" * 16, {"human_labels": labels_table(rows).append_column("businesses", pa.nulls(n, pa.list_(pa.string())))})
    for mark, right in (("t", 0.9), ("s", 0.7)):
        lines: list[tuple[str, Any, str, float | None]] = []
        for i, (query, wanted, _, _) in enumerate(rows):
            good = bool(rng.random() < right)
            given = wanted if good else intent_of("how_to")
            state = "truncated" if i == 5 else "invalid" if i == 6 else "answered"
            lines.append((query, given, state, (0.95 if good else 0.4) if state == "answered" else None))
        lines.append(("not human labels", intent_of("browse"), "answered", 0.99))
        answers_receipt(store, mark * 16, answer_table(lines), task)
    return {"teacher": "precompute/" + "t" * 16, "batch_student": "s" * 16}


def test_run(store: Storage, root: str, intent: Task) -> None:
    sources = setup_store(store, intent)
    config = evaluate.Config(root=root, tracking=OFF, task="query_intent", answers=sources)
    receipt = evaluate.run(config)
    rows, quality = output_table(store, receipt, "rows"), output_table(store, receipt, "quality")
    assert rows.num_rows == 60 * 3  # nothing disappears: a row per labelled row and answer source
    assert quality.column("source").unique().to_pylist() == ["teacher", "batch_student", "fallback"]
    m = receipt.metrics
    assert m["quality/teacher/all"] > m["quality/batch_student/all"] > m["quality/fallback/all"]
    assert m["low/teacher/head"] <= m["quality/teacher/head"] <= m["high/teacher/head"]
    assert m["auroc/teacher"] == 1.0  # the sure ones are the right ones
    assert m["ece/teacher"] == pytest.approx(0.9 * 0.05 + 0.1 * 0.4, abs=0.05)
    assert 0 < m["ece_noise_floor/teacher"] < 0.2
    assert m["accuracy/teacher/all"] == m["exact/teacher/all"]
    assert "ece/fallback" not in m
    assert m["difference/batch_student/low"] <= m["difference/batch_student/value"] <= m["difference/batch_student/high"]
    assert m["difference/batch_student/value"] == pytest.approx(m["quality/batch_student/all"] - m["quality/teacher/all"])
    assert receipt.rows == {"human_labels": 60, "answered.teacher": 58, "answered.batch_student": 58, "answered.fallback": 60}
    figures = receipt.result.figures["batch_student"]
    assert figures.quality_against_people == m["quality/batch_student/all"]
    assert figures.agreement_with_teacher == m["agreement/batch_student"]
    assert figures.times_cheaper_than_teacher is None  # these answers were made by hand and cost nothing
    assert m["figures/batch_student/quality_against_people"] == m["quality/batch_student/all"]
    assert "figures/batch_student/times_cheaper_than_teacher" not in m
    assert receipt.result.figures["teacher"].agreement_with_teacher is None
    assert any("agreement/batch_student" in note and "not a quality figure" in note for note in receipt.notes)
    assert any(note.startswith("torso: only 13 labelled rows") for note in receipt.notes)
    assert set(receipt.outputs) >= {"rows", "quality", "traffic", "quality.svg", "calibration.svg", "report"}
    assert evaluate.run(config).reused


def test_report_is_helm_like(store: Storage, root: str, intent: Task) -> None:
    receipt = evaluate.run(evaluate.Config(root=root, tracking=OFF, task="query_intent", answers=setup_store(store, intent)))
    report = read_json(store, receipt.output("report").path)
    assert report["task"]["fingerprint"] == intent.fingerprint
    assert [run["source"] for run in report["runs"]] == ["teacher", "batch_student", "fallback"]
    teacher = report["runs"][0]
    assert teacher["model"] == {"name": "model-" + "t" * 16, "digest": "digest"}
    assert teacher["prompt_fingerprint"] == intent.fingerprint
    assert teacher["answers"] == "precompute/" + "t" * 16
    metric = next(m for m in teacher["metrics"] if (m["name"], m["split"]) == ("micro_f1", "all"))
    assert {"n", "answered", "value", "low", "high", "method", "effective_n"} <= metric.keys()
    assert {m["name"] for m in teacher["metrics"]} == {
        "micro_f1",
        "exact_match",
        "ece_15_equal_mass_bins",
        "ece_noise_floor",
        "auroc_confidence_vs_exact_match",
    }
    assert sum(b["n"] for b in teacher["reliability"]) == 58
    assert {d["split"] for d in report["differences"] if d["source"] == "batch_student"} == {"head", "torso", "tail", "unseen", "all"}
    assert report["interval"]["unit"] == "labelled row"
    assert "headtail" in report["versions"]
    json.dumps(report, allow_nan=False)


def test_an_unanswered_row_is_missed_not_skipped(intent: Task) -> None:
    labels = labels_table([("a", intent_of("browse"), "head", 1), ("b", intent_of("browse"), "head", 1)])
    one = {query_key("a"): SourceAnswer(intent_of("browse"), "answered", 0.9), query_key("b"): SourceAnswer(None, "truncated", None)}
    scored = score_rows(intent, labels, {"teacher": one}).to_pylist()
    assert [(r["tp"], r["fp"], r["fn"], r["exact"]) for r in scored if r["source"] == "teacher"] == [(1, 0, 0, True), (0, 0, 1, False)]


def test_silence_is_not_praised(segmentation: Task) -> None:
    """Human labels with nothing to find, and an answer source that answered nothing: no unit is wrong, yet it must not score 1."""
    labels = labels_table([(f"q{i}", segments(), "head", 1) for i in range(3)])
    silent = {query_key(f"q{i}"): SourceAnswer(None, "failed", None) for i in range(3)}
    line = quality_rows(score_rows(segmentation, labels, {"teacher": silent}), Sureness()).to_pylist()[0]
    assert (line["quality"], line["exact"]) == (0.0, 0.0)
    right = {query_key(f"q{i}"): SourceAnswer(segments(), "answered", None) for i in range(3)}
    line = quality_rows(score_rows(segmentation, labels, {"teacher": right}), Sureness()).to_pylist()[0]
    assert (line["quality"], line["exact"]) == (1.0, 1.0)
    assert line["low"] < 0.5  # three rows


def test_fallback_is_the_tasks(segmentation: Task) -> None:
    labels = labels_table(
        [("pizza", segments(("topic", "pizza")), "tail", 1), ("joes pizza", segments(("name", "joe's"), ("topic", "pizza")), "tail", 1)]
    )
    scored = score_rows(segmentation, labels, {"teacher": {}}).to_pylist()
    assert [(r["tp"], r["fp"], r["fn"]) for r in scored if r["source"] == "fallback"] == [(1, 0, 0), (0, 1, 2)]


def test_answered_wins_over_a_retry_that_failed(store: Storage, root: str, intent: Task) -> None:
    keep(store, "plan", "p" * 16, {"human_labels": labels_table([("a", intent_of("price"), "head", 3)])})
    lines = [("a", None, "failed", None), ("a", intent_of("price"), "answered", 0.8), ("a", None, "invalid", None)]
    answers_receipt(store, "t" * 16, answer_table(lines), intent, shards=3)
    receipt = evaluate.run(evaluate.Config(root=root, tracking=OFF, task="query_intent", answers=LATEST))
    assert receipt.metrics["quality/teacher/all"] == 1.0


def test_a_labelled_query_never_asked_counts_as_missed_and_is_said(store: Storage, root: str, intent: Task) -> None:
    keep(
        store,
        "plan",
        "p" * 16,
        {"human_labels": labels_table([("a", intent_of("price"), "head", 3), ("b", intent_of("price"), "tail", 1)])},
    )
    answers_receipt(store, "t" * 16, answer_table([("a", intent_of("price"), "answered", None)]), intent)
    receipt = evaluate.run(evaluate.Config(root=root, tracking=OFF, task="query_intent", answers=LATEST))
    assert receipt.metrics["exact/teacher/all"] == 0.5
    assert "teacher: 1 of 2 labelled queries were never asked; they count as missed" in receipt.notes
    assert "absent" in output_table(store, receipt, "rows")["state"].to_pylist()
    assert "ece/teacher" not in receipt.metrics  # no confidences


def test_answers_under_an_older_prompt_are_told(store: Storage, root: str, intent: Task, segmentation: Task) -> None:
    keep(store, "plan", "p" * 16, {"human_labels": labels_table([("a", intent_of("price"), "head", 3)])})
    answers_receipt(store, "t" * 16, answer_table([("a", intent_of("price"), "answered", None)]), segmentation)
    receipt = evaluate.run(evaluate.Config(root=root, tracking=OFF, task="query_intent", answers=LATEST))
    assert any("another prompt or schema" in note for note in receipt.notes)


def test_refusals(store: Storage, root: str, intent: Task) -> None:
    config = evaluate.Config(root=root, tracking=OFF, task="query_intent", answers=LATEST)
    with pytest.raises(InputError, match="plan has not been run"):
        evaluate.run(config)
    keep(store, "plan", "p" * 16, {"human_labels": labels_table([])})
    answers_receipt(store, "t" * 16, answer_table([("a", segments(), "answered", None)]), intent)
    with pytest.raises(InputError, match="no labelled rows"):
        evaluate.run(config)
    keep(store, "plan", "q" * 16, {"human_labels": labels_table([("a", intent_of("price"), "head", 3)])})
    with pytest.raises(InputError, match="not valid under task query_intent"):
        evaluate.run(config)
    keep(store, "plan", "r" * 16, {"human_labels": labels_table([("zzz", intent_of("price"), "head", 3)])})
    with pytest.raises(InputError, match="no labelled query is among the answers of teacher"):
        evaluate.run(config)
    broken = labels_table([("a", intent_of("price"), "head", 3)]).set_column(2, "answer", pa.array(["{"]))
    keep(store, "plan", "s" * 16, {"human_labels": broken})
    answers_receipt(store, "u" * 16, answer_table([("a", intent_of("price"), "answered", None)]), intent)
    with pytest.raises(InputError, match="a human label is not JSON"):
        evaluate.run(config)
    with pytest.raises(ConfigError, match="the fallback is computed from the task"):
        build_config(evaluate.Config, {"answers": {"fallback": "precompute"}}, "test")


def test_latest_never_enters_the_fingerprint(store: Storage, root: str, intent: Task) -> None:
    sources = setup_store(store, intent)
    named = evaluate.run(evaluate.Config(root=root, tracking=OFF, task="query_intent", answers={"batch_student": sources["batch_student"]}))
    latest = evaluate.run(evaluate.Config(root=root, tracking=OFF, task="query_intent", answers={"batch_student": "latest"}))
    assert latest.reused
    assert latest.fingerprint == named.fingerprint
    assert "latest" not in json.dumps(named.settings)


def test_differences_are_paired_on_the_same_rows(intent: Task) -> None:
    labels = labels_table([(f"q{i}", intent_of("browse"), "head", 1) for i in range(40)])

    def source(right: int) -> dict[bytes, SourceAnswer]:
        return {query_key(f"q{i}"): SourceAnswer(intent_of("browse" if i < right else "price"), "answered", None) for i in range(40)}

    scored = by_source(score_rows(intent, labels, {"teacher": source(36), "batch_student": source(20)}))
    found = {(d["source"], d["split"]): d for d in source_differences(scored, Sureness())}
    assert found["batch_student", "all"]["value"] == pytest.approx(20 / 40 - 36 / 40)
    assert found["batch_student", "all"]["high"] < 0
    assert ("batch_student", "torso") not in found


def test_s3(s3_root: str, intent: Task) -> None:
    from headtail.adapters.storage import open_storage

    store = open_storage(s3_root)
    receipt = evaluate.run(evaluate.Config(root=s3_root, tracking=OFF, task="query_intent", answers=setup_store(store, intent)))
    assert read_table(store, receipt.output("rows").path).num_rows == 180


def test_an_answer_that_is_never_served_counts_as_what_users_get(store: Storage, root: str, segmentation: Task) -> None:
    """Guardrails refuse a span that is not in the query, so publish withholds the answer and the caller gets the fallback."""
    right = {q: segments(("topic", q)) for q in ("pizza", "sushi", "ramen", "tacos")}
    wrong = segments(("topic", "pizza"), ("location", "denver"))
    keep(store, "plan", "p" * 16, {"human_labels": labels_table([(q, a, "head", 1) for q, a in right.items()]).append_column(
        "businesses", pa.nulls(4, pa.list_(pa.string())))})  # fmt: skip
    answers_receipt(
        store, "t" * 16, answer_table([(q, wrong if q == "pizza" else a, "answered", 0.9) for q, a in right.items()]), segmentation
    )
    answers_receipt(store, "s" * 16, answer_table([(q, a, "answered", 0.9) for q, a in right.items()]), segmentation)
    sources = {"teacher": "precompute/" + "t" * 16, "batch_student": "s" * 16}
    receipt = evaluate.run(evaluate.Config(root=root, tracking=OFF, answers=sources))
    fallback = [(right[q], segmentation.fallback("pizza") if q == "pizza" else right[q]) for q in right]
    assert receipt.metrics["quality/teacher/all"] == pytest.approx(
        oracle_f1([(right[q], wrong if q == "pizza" else right[q]) for q in right])
    )
    assert receipt.metrics["served/teacher/all"] == pytest.approx(oracle_f1(fallback))
    assert receipt.metrics["served/batch_student/all"] == receipt.metrics["quality/batch_student/all"] == 1.0
    assert (receipt.rows["withheld.teacher"], receipt.rows["withheld.batch_student"]) == (1, 0)
    (note,) = (text for text in receipt.notes if "guardrails withhold" in text)
    assert note.startswith("teacher: guardrails withhold 1 of its answers to the 4 labelled queries")
    given = {
        row["query"]: json.loads(row["given"]) for row in output_table(store, receipt, "rows").to_pylist() if row["source"] == "teacher"
    }
    assert given["pizza"] == wrong, "the rows say what the model answered"


# ---- figures for traffic


def traffic_store(store: Storage, task: Task, design: str) -> evaluate.Config:
    """A log of 40 frequent queries, answered right, and 400 rare ones, answered wrong; a day held out, with 20 new ones, answered right."""
    names = [f"{kind} {word}" for kind, count in (("often", 40), ("seldom", 400), ("new", 20)) for word in map(str, range(count))]
    counts, later = [100] * 40 + [1] * 400 + [0] * 20, [10] * 40 + [1] * 100 + [0] * 300 + [2] * 20
    queries = pa.table({"query_key": [query_key(q) for q in names], "count": counts})
    labels = [
        {"query_key": query_key(q), "query": q, "answer": canonical(intent_of("browse")), "count": n, "stratum": "", "design": design}
        for q, n in zip(names, counts, strict=True)
        if int(q.split(" ")[1]) % 4 == 0
    ]
    holdout = pa.table({"query_key": queries["query_key"], "query": names, "count": later, "seen": [n > 0 for n in counts]})
    tables = {"queries": queries.slice(0, 440), "holdout": holdout.filter(pc.greater(holdout["count"], 0))}
    keep(store, "ingest", "i" * 16, {**tables, "human_labels": pa.Table.from_pylist(labels, schema=HUMAN_LABELS)})
    given = [(q, intent_of("price" if q.startswith("seldom") else "browse"), "answered", 0.9) for q in names]
    answers_receipt(store, "t" * 16, answer_table(given), task)
    answers = {"teacher": "precompute/" + "t" * 16}
    return evaluate.Config(root=store.root, tracking=OFF, task="query_intent", labels="ingest:human_labels", answers=answers)


def test_traffic_is_the_logs_not_the_labelled_rows(store: Storage, intent: Task) -> None:
    receipt = evaluate.run(traffic_store(store, intent, "even"))
    quality = {row["stratum"]: row for row in output_table(store, receipt, "quality").to_pylist() if row["source"] == "teacher"}
    assert quality["all"]["quality"] == pytest.approx(15 / 115)
    assert quality["traffic"]["quality"] == pytest.approx((400 + 40) / 540)
    assert quality["traffic"]["low"] < 440 / 540 < quality["traffic"]["high"]
    assert quality["traffic"]["method"] == "post-stratified"
    cells = output_table(store, receipt, "traffic")
    assert dict(zip(cells["cell"].to_pylist(), cells["events"].to_pylist(), strict=True)).items() >= {0: 40.0, 1: 100.0, 7: 400.0}.items()


def test_sealed_rows_make_a_census_a_draw(store: Storage, intent: Task) -> None:
    traffic_store(store, intent, "census")
    receipt = load_receipt(store, "ingest", "ingest")
    rows = output_table(store, receipt, "human_labels").slice(0, 8)
    rows = rows.set_column(rows.schema.get_field_index("inclusion"), "inclusion", pa.array([1.0] * 8))
    traffic = read_traffic(store, receipt, rows["query_key"].combine_chunks())
    assert with_traffic(rows, traffic)["inclusion"].to_pylist() == [1.0] * 8
    sealed, _ = seal_labels(store, "ingest:human_labels", rows, 0.5)
    assert 0 < sealed < 8
    for part, n in zip(split_labels(store, rows), (8 - sealed, sealed), strict=True):
        drawn = with_traffic(part, read_traffic(store, receipt, part["query_key"].combine_chunks()))
        assert drawn["inclusion"].to_pylist() == [n / 8] * n
        assert set(drawn["design"].to_pylist()) == {"by_probability"}


def test_without_a_design_there_is_no_figure_for_traffic(store: Storage, intent: Task) -> None:
    receipt = evaluate.run(traffic_store(store, intent, "unknown"))
    line = next(row for row in output_table(store, receipt, "quality").to_pylist() if row["stratum"] == "traffic")
    assert (line["n"], line["quality"], line["low"], line["high"]) == (0, None, None, None)
    assert "quality/teacher/traffic" not in receipt.metrics
    assert any(note.startswith("traffic: no figure, since nobody says how") for note in receipt.notes)
