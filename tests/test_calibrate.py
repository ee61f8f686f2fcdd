"""The stage calibrate: what goes into a release, and what it says when nothing can be promised."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from conftest import answered_by, figures_of, keep
from headtail import pipeline
from headtail.adapters.storage import Storage
from headtail.adapters.storage.receipts import load_receipt, output_table
from headtail.adapters.tracking import Tracker
from headtail.core.config import TrackingConfig, build_config
from headtail.core.errors import ConfigError
from headtail.core.keys import canonical, query_key
from headtail.core.policy import TaskPolicy
from headtail.core.receipt import Receipt
from headtail.core.rows import ANSWER, HUMAN_LABELS
from headtail.core.task import Task
from headtail.releases import release
from headtail.stages import calibrate, evaluate, publish
from headtail.stages.calibrate.stage import confidence_rows
from headtail.stages.distill.result import Result as DistillResult

OFF = TrackingConfig(enabled=False)
RIGHT, WRONG = {"intent": "price"}, {"intent": "how_to"}
STUDENT = "distill/" + "d" * 16


def answered(
    store: Storage, task: Task, mark: str, source: str, rows: list[tuple[str, bool, float | None]], digest: str, name: str
) -> None:
    """A precompute receipt: (query, right, confidence)."""
    lines: list[dict[str, Any]] = [
        {"query_key": query_key(q), "query": q, "answer_key": query_key(mark + q), "state": "answered", "stratum": "unseen", "count": 0}
        | {"answer": canonical(RIGHT if right else WRONG), "confidence": confidence, "source": source}
        for q, right, confidence in rows
    ]
    table = pa.Table.from_pylist(sorted(lines, key=lambda line: bytes(line["query_key"])), schema=ANSWER)
    known = figures_of(usd_per_million=80.0 if source == "teacher" else 0.5, rows_per_s=50.0)
    made = {"task_fingerprint": task.fingerprint, "result": answered_by(name, digest, source, figures=known)}
    keep(store, "precompute", mark, {"answers/shard-00000": table}, **made)


def put(
    store: Storage,
    task: Task,
    n: int = 1200,
    chance: Callable[[float], float] | None = None,
    known: bool = True,
    name: Callable[[int], str] = "q {}".format,
) -> None:
    """Labelled rows, the student's answers, the teacher's (19 of 20 right) and their evaluation. A tenth of the rows is head."""
    draw = np.random.default_rng(n)
    confidence = draw.random(n).astype(np.float32)
    right = draw.random(n) < [(chance or (lambda c: 0.5 + 0.5 * min(1.0, 2 * c)))(float(c)) for c in confidence]
    queries = [name(i) for i in range(n)]
    labels = [
        {"query_key": query_key(q), "query": q, "answer": canonical(RIGHT), "count": 0, "stratum": "head" if i % 10 == 0 else "unseen"}
        for i, q in enumerate(queries)
    ]
    keep(store, "plan", "p" * 16, {"human_labels": pa.Table.from_pylist(labels, HUMAN_LABELS)})
    rows = [(q, bool(r), float(c) if known else None) for q, r, c in zip(queries, right, confidence, strict=True)]
    answered(store, task, "s" * 16, "realtime_student", rows, "D", STUDENT)
    answered(store, task, "t" * 16, "teacher", [(q, i % 20 != 1, 0.9) for i, q in enumerate(queries)], "T", "teacher-model")
    keep(store, "distill", "d" * 16, {}, result=DistillResult(digest="D"))
    keep(store, "distill", "e" * 16, {}, result=DistillResult(digest="E"))
    sources = {"teacher": "t" * 16, "realtime_student": "s" * 16}
    evaluate.run(evaluate.Config(root=store.root, tracking=OFF, task="query_intent", answers=sources, resamples=200))


def run(store: Storage, **changes: Any) -> Receipt[calibrate.Result]:
    fields = {"root": store.root, "tracking": OFF, "task": "query_intent", "strata": ["unseen"], "target": 0.9, **changes}
    return calibrate.run(build_config(calibrate.Config, fields, where="test"))


def test_a_promise_with_its_cost_and_gain(store: Storage, intent: Task, capsys: pytest.CaptureFixture[str]) -> None:
    """The truth: right with chance min(1, 0.5 + c); from t on 0.9 is reached wherever t is; below it the teacher is better."""
    put(store, intent)
    receipt = run(store)
    found, kept = receipt.result, receipt.result.calibration
    assert (found.verdict, found.source, found.student, found.digest) == ("promised", "realtime_student", STUDENT, "D")
    assert kept.threshold == found.figures.threshold
    assert kept.threshold is not None
    assert 0.05 < kept.threshold < 0.4, "all with a confidence of 0.12 or more are right 9 times in 10"
    assert found.figures.rows_first + found.figures.rows == 1080, "head queries are hits: their labels say nothing of misses"
    assert found.mapped.ece is not None
    assert found.own.ece is not None
    assert found.mapped.floor_high is not None
    assert found.mapped.ece < found.mapped.floor_high < found.own.ece
    assert found.figures.precision.value is not None
    assert found.figures.precision.value > 0.9
    escalated = found.figures.escalated.value
    assert escalated is not None
    assert found.figures.usd_per_million == pytest.approx(80 * escalated)
    before, after, gain = found.figures.before, found.figures.after, found.figures.gain
    assert before.value is not None
    assert after.value is not None
    assert gain.value is not None
    assert gain.value == pytest.approx(after.value - before.value)
    assert gain.value > 0
    assert gain.low is not None
    assert gain.low > 0
    assert "calibration.svg" in receipt.outputs
    said = capsys.readouterr().err
    assert "of 1,000 misses are below it, USD" in said
    assert run(store).reused


def test_queries_that_nearly_repeat_each_other_are_one_row(store: Storage, intent: Task) -> None:
    """Each question in four orders of its words: a quarter of the rows is left, and no question is in both halves."""
    draw = np.random.default_rng(7)
    words = [["".join(draw.choice(list("abcdefghijklmnopqrstuvwxyz"), 9)) for _ in range(3)] for _ in range(100)]
    orders = ((0, 1, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
    put(store, intent, n=400, name=lambda i: " ".join(words[i // 4][place] for place in orders[i % 4]))
    receipt = run(store, strata=["head", "unseen"])
    assert receipt.rows["human_labels"] == 100
    assert any(note.startswith("300 more nearly repeat one of these") for note in receipt.notes)
    table = output_table(store, load_receipt(store, "evaluate"), "rows")
    rows = confidence_rows(table, "realtime_student", "teacher", ("head", "unseen"), 0.5, 0)
    assert [len(rows.right), len(rows.confidence), len(rows.bigger if rows.bigger is not None else ()), len(rows.first)] == [100] * 4


def test_what_is_not_shown_is_not_promised(store: Storage, intent: Task) -> None:
    put(store, intent, n=60)
    few = run(store, target=0.95).result
    assert (few.verdict, few.calibration.threshold) == ("too_few_labels", None)
    assert few.figures.labels_needed is not None
    assert few.figures.labels_needed > 54
    assert few.calibration.map is not None, "confidence is calibrated all the same"
    assert any("labelled rows would do, there are 54" in note for note in run(store, target=0.95).notes)


def test_a_student_that_is_not_right_enough_is_told_so(store: Storage, intent: Task) -> None:
    put(store, intent, n=400, chance=lambda c: 0.6)
    assert run(store).result.verdict == "not_right_enough"


def test_without_confidences_there_is_nothing_to_promise(store: Storage, intent: Task) -> None:
    put(store, intent, n=100, known=False)
    found = run(store).result
    assert (found.verdict, found.calibration.map, found.own.ece) == ("no_confidence", None, None)


def test_a_stratum_without_labels_promises_nothing(store: Storage, intent: Task) -> None:
    put(store, intent, n=100)
    receipt = run(store, strata=["tail"])
    assert (receipt.result.verdict, receipt.rows["human_labels"]) == ("no_confidence", 0)


def test_a_cost_limit_and_a_price(store: Storage, intent: Task) -> None:
    put(store, intent)
    free = run(store, max_usd_per_million=79.0).result
    assert free.verdict == "promised"
    dear = run(store, max_usd_per_million=0.01).result
    assert (dear.verdict, dear.calibration.threshold, dear.figures.threshold) == ("too_costly", None, free.figures.threshold)
    unpriced = run(store, bigger="", max_usd_per_million=79.0).result
    assert unpriced.verdict == "too_costly", "a limit that cannot be checked is not met"
    assert unpriced.figures.after.value is None
    assert run(store, usd_per_million=1000.0).result.figures.usd_per_million == pytest.approx(
        1000 / 80 * (free.figures.usd_per_million or 0)
    )


def test_each_choice_is_a_look_and_the_same_again_is_none(store: Storage, intent: Task) -> None:
    """Evaluate looked at teacher and student. What can steer a promise is another look; prices, power and the bigger model are none."""
    put(store, intent)
    first = run(store)
    assert first.result.look == 3
    assert first.result.level == pytest.approx(0.05 / 12)
    assert any("look 3 at these labelled rows in this store, judged at level 0.0042" in note for note in first.notes)
    for other in (
        {"power": 0.9},
        {"usd_per_million": 3.0},
        {"max_usd_per_million": 50.0},
        {"bigger": ""},
        {"strata": ["unseen", "unseen"]},
    ):
        assert run(store, **other).result.look == 3
    choices: list[dict[str, Any]] = [{"target": 0.85}, {"delta": 0.1}, {"first_share": 0.4}, {"seed": 1}, {"strata": ["unseen", "tail"]}]
    for look, choice in enumerate([*choices, {"strata": ["head"]}], 4):
        made = run(store, **choice).result
        assert made.look == look
        assert made.level == pytest.approx(choice.get("delta", 0.05) / (look * (look + 1)))
    assert run(store, strata=["tail", "unseen"]).result.look == 8
    assert run(store).reused
    renamed = [
        json.loads(store.read(one.path))["stage"]
        for one in sorted(store.files("looks"), key=lambda one: one.path)
        if "/rows/" not in one.path
    ]
    assert renamed == ["evaluate"] * 2 + ["calibrate"] * 7


def test_another_student_on_the_same_rows_is_a_look_and_so_is_another_confidence(store: Storage, intent: Task) -> None:
    put(store, intent)
    evaluated = load_receipt(store, "evaluate", "evaluate", evaluate.Result)
    rows, known = output_table(store, evaluated, "rows"), run(store).result.look
    changes = {"given": [canonical(WRONG)] * 7 + rows["given"].to_pylist()[7:], "confidence": [0.5] * len(rows)}
    for look, (name, values) in enumerate(changes.items(), known + 1):
        column = pa.array(values, rows.schema.field(name).type)
        other = rows.set_column(rows.column_names.index(name), rows.schema.field(name), column)
        keep(store, "evaluate", name[0] * 16, {"rows": other}, task="query_intent", result=evaluated.result)
        assert run(store).result.look == look


def test_a_later_look_promises_less_and_planned_looks_end(store: Storage, intent: Task) -> None:
    put(store, intent)
    first = run(store).result.figures.threshold
    planned = dataclasses.replace(intent, file=intent.file.model_copy(update={"gate": TaskPolicy(looks=4)}))
    fields = {"root": store.root, "tracking": OFF, "task": "query_intent", "strata": ["unseen"], "target": 0.9}
    found = calibrate.run(build_config(calibrate.Config, fields, where="test"), task=planned).result
    assert found.look == 4
    assert found.level == pytest.approx(0.05 / 4)
    assert found.figures.threshold is not None
    assert first is not None
    assert found.figures.threshold <= first
    spent = calibrate.run(build_config(calibrate.Config, {**fields, "seed": 5}, where="test"), task=planned)
    assert (spent.result.verdict, spent.result.calibration.threshold, spent.result.level) == ("looks_spent", None, 0.0)
    assert spent.result.calibration.map is not None
    assert any("look 5 at these labelled rows: the policy plans 4" in note for note in spent.notes)


def test_the_pipeline_calibrates_on_what_the_student_meets(store: Storage, intent: Task) -> None:
    """Without a batch student that passed, torso and tail are misses too."""
    put(store, intent, n=100)
    config = pipeline.Config(root=store.root, tracking=OFF, task="query_intent")
    whole = pipeline._Pipeline(config, intent, Tracker(OFF, store.root), "")
    quality = load_receipt(store, "evaluate", "evaluate")
    student: Any = object()
    for passed, strata in (
        ({"realtime_student": student}, ["torso", "tail", "unseen"]),
        ({"realtime_student": student, "batch_student": student}, ["unseen"]),
    ):
        made = pipeline._calibrate(whole, quality, passed)
        assert (made.result.source, made.settings["config"]["strata"]) == ("realtime_student", strata)
        assert whole.receipts["calibrate"] == made


def test_a_source_that_was_not_evaluated(store: Storage, intent: Task) -> None:
    put(store, intent, n=60)
    with pytest.raises(ConfigError, match="no answers of this source"):
        run(store, source="batch_student")
    with pytest.raises(ConfigError, match="name one or more of"):
        run(store, strata=["all"])


def test_publish_takes_it_into_the_release_of_its_own_student_alone(store: Storage, intent: Task) -> None:
    put(store, intent)
    receipt = run(store)
    common = {"root": store.root, "tracking": OFF, "task": "query_intent", "answers": ["t" * 16], "calibration": receipt.path}
    for student in ("", "e" * 16):
        with pytest.raises(ConfigError, match="not of the student that is published"):
            publish.run(build_config(publish.Config, {**common, "student": student}, where="test"))
    made = publish.run(build_config(publish.Config, {**common, "student": "d" * 16, "accept_unproven": True}, where="test"))
    held = release.load_release(store, made.result.release)
    assert held.calibration == receipt.result.calibration
    assert release.derive_release(store, held.id, note="again").calibration == held.calibration
    assert release.derive_release(store, held.id, student="", note="bare").calibration is None
