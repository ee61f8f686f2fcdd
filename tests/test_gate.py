"""The gate: what passes was shown, what is rejected says why, and nothing is said of rows, models or judges that were not there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from mlflow import MlflowClient
from scipy import stats

from conftest import answered_by, keep
from headtail.adapters.storage import Storage, read_json, write_table
from headtail.adapters.storage.receipts import load_receipt, output_table
from headtail.core.bounds import Game, Share
from headtail.core.config import TrackingConfig, build_config
from headtail.core.errors import ConfigError, InputError, StorageError
from headtail.core.evidence import Evidence, JudgeEvidence
from headtail.core.keys import canonical, query_key
from headtail.core.receipt import Receipt
from headtail.core.rows import ANSWER, HUMAN_LABELS, PLANNED
from headtail.core.task import Task
from headtail.stages import evaluate, gate
from headtail.stages.distill.result import Result as DistillResult
from headtail.stages.evaluate.result import Result as EvaluateResult
from headtail.stages.gate.criteria import GatePolicy, SourceScores, criterion_tests, decide, source_rows
from headtail.stages.gate.result import JudgeResult
from headtail.stages.gate.sources import candidate_number, read_judge
from headtail.stages.precompute.result import AnsweringModel
from headtail.stages.precompute.result import Result as PrecomputeResult

OFF = TrackingConfig(enabled=False)
TEACHER, STUDENT = "t" * 16, "s" * 16
RIGHT, WRONG = {"intent": "price"}, {"intent": "how_to"}  # the task's fallback is browse: always wrong here

# stratum -> rows, of them right by the student, right by the teacher
GOOD = {"head": (200, 198, 200), "torso": (150, 147, 148), "tail": (240, 232, 236), "unseen": (160, 152, 156)}
POOR = {**GOOD, "tail": (240, 205, 236)}


def queries(strata: Mapping[str, tuple[int, int, int]]) -> list[tuple[str, str, int]]:
    """(query, stratum, place in the stratum)."""
    return [(f"{name} {i}", name, i) for name, (n, _, _) in strata.items() for i in range(n)]


def answered(store: Storage, task: Task, mark: str, rows: Sequence[tuple[str, str, bool]], digest: str, name: str) -> None:
    """A precompute receipt with one answer per row: (query, stratum, right)."""
    source = "teacher" if mark == TEACHER else "batch_student"
    lines: list[dict[str, Any]] = [
        {"query_key": query_key(q), "query": q, "answer_key": query_key(mark + q), "state": "answered", "stratum": stratum, "count": 1}
        | {"answer": canonical(RIGHT if right else WRONG), "confidence": 0.9, "source": source}
        for q, stratum, right in rows
    ]
    table = pa.Table.from_pylist(sorted(lines, key=lambda line: bytes(line["query_key"])), schema=ANSWER)
    metrics = {"usd_per_million": 8.0 if mark == TEACHER else 0.5, "tokens_in_per_row": 40.0, "tokens_out_per_row": 8.0, "rows_per_s": 50.0}
    made = {"task_fingerprint": task.fingerprint, "result": answered_by(name, digest, source), "metrics": metrics}
    keep(store, "precompute", mark, {"answers/shard-00000": table}, **made)


def put(store: Storage, task: Task, strata: Mapping[str, tuple[int, int, int]] = GOOD, more: int = 0, student: str = STUDENT) -> None:
    """Plan, answers of teacher and student (and of `more` tail queries that nobody labelled), and their evaluation."""
    rows = queries(strata)
    events = {"head": 40, "torso": 3, "tail": 1, "unseen": 0}
    labels = [{"query_key": query_key(q), "query": q, "answer": canonical(RIGHT), "count": events[s], "stratum": s} for q, s, _ in rows]
    top = [{"query_key": query_key("top"), "query": "top", "count": 50, "rank": 1, "stratum": "head", "eval_only": False}]
    keep(store, "plan", "p" * 16, {"human_labels": pa.Table.from_pylist(labels, HUMAN_LABELS), "head": pa.Table.from_pylist(top, PLANNED)})
    others = [(f"other {i}", "tail", i % 20 != 0) for i in range(more)]
    answered(store, task, TEACHER, [(q, s, i < strata[s][2]) for q, s, i in rows], "T", "teacher-model")
    answered(store, task, student, [(q, s, i < strata[s][1]) for q, s, i in rows] + others, "D", "distill/" + "d" * 16)
    keep(store, "distill", "d" * 16, {}, result=DistillResult(digest="D"))
    keep(store, "distill", "x" * 16, {}, result=DistillResult(digest="X"))
    sources = {"teacher": TEACHER, "batch_student": student}
    evaluate.run(evaluate.Config(root=store.root, tracking=OFF, task="query_intent", answers=sources, resamples=200))


def asking(store: Storage, **changes: Any) -> gate.Config:
    data = {"root": store.root, "tracking": OFF, "task": "query_intent", "minimum": {"tail": 0.9, "unseen": 0.85}, **changes}
    return gate.Config.model_validate(data)


def evidence_of(receipt: Receipt[gate.Result]) -> Evidence:
    return receipt.result.evidence


def test_a_good_student_passes(store: Storage, intent: Task) -> None:
    put(store, intent)
    receipt = gate.run(asking(store, candidate="distill/" + "d" * 16))
    found = evidence_of(receipt)
    assert receipt.result.passed is True
    assert [(criterion.kind, criterion.stratum, criterion.n) for criterion in found.criteria] == [
        ("quality", "tail", 240),
        ("quality", "unseen", 160),
        ("drop", "all", 750),
        ("above", "all", 750),
    ]
    tail, unseen, drop, above = found.criteria
    assert (tail.right, tail.method) == (232, "clopper-pearson")
    assert tail.value == pytest.approx(232 / 240)
    assert tail.p == pytest.approx(stats.binomtest(232, 240, 0.9, alternative="greater").pvalue)
    assert tail.lower_bound == pytest.approx(stats.binomtest(232, 240, alternative="greater").proportion_ci(1 - tail.level, "exact").low)
    assert tail.lower_bound > 0.9
    assert unseen.lower_bound > 0.85
    assert drop.value == pytest.approx((729 - 740) / 750)
    assert -0.05 <= drop.lower_bound < -11 / 750
    assert above.value == pytest.approx(729 / 750)
    assert sorted(criterion.level for criterion in found.criteria) == pytest.approx([0.05 / 4, 0.05 / 3, 0.05 / 2, 0.05])
    assert (found.candidate, found.digest, found.candidates) == ("distill/" + "d" * 16, "D", 1)
    assert found.data["human_labels"] == receipt_of(store, "plan").output("human_labels").sha256
    assert found.data["rows"] == receipt_of(store, "evaluate").output("rows").sha256
    assert receipt.rows["human_labels.tail"] == 240
    assert receipt.metrics["lower_bound/quality/tail"] == tail.lower_bound
    assert read_json(store, receipt.output("verdict").path) == receipt.result.evidence.model_dump(mode="json")
    assert store.read(receipt.output("gate.svg").path).startswith(b"<?xml")
    assert found.figures.quality_against_people == pytest.approx(729 / 750)
    assert found.figures.times_cheaper_than_teacher == 16.0
    assert found.figures == load_receipt(store, "evaluate", "latest", EvaluateResult).result.figures["batch_student"]
    assert receipt.metrics["figures/times_cheaper_than_teacher"] == 16.0
    assert found.figures.agreement_with_teacher == pytest.approx(739 / 750)
    assert found.figures.tokens_per_row_own == 48.0
    assert found.figures.seconds_per_million_teacher == 20_000.0
    assert gate.run(asking(store, candidate="distill/" + "d" * 16)).reused


def receipt_of(store: Storage, stage: str) -> Any:
    return load_receipt(store, stage)


def test_a_rejection_is_an_answer(store: Storage, intent: Task, capsys: pytest.CaptureFixture[str]) -> None:
    put(store, intent, POOR)
    receipt = gate.run(asking(store, minimum={"tail": 0.82, "unseen": 0.85}, max_drop=0.04))
    assert receipt.result.passed is False
    tail, drop = (note for note in receipt.notes)
    assert tail.startswith("tail: ")
    assert " more labels, or " in tail
    assert "0.854 on 240 labels" in tail
    assert drop.startswith("all, minus the teacher: ")
    assert evidence_of(receipt).missing() == [tail, drop]
    shown = capsys.readouterr().err
    assert "REJECTED" in shown
    assert f"failed {tail}" in shown
    criterion = evidence_of(receipt).criteria[0]
    assert criterion.more == Share(205, 240).rows_needed(0.82, criterion.level, 0.8) - 240  # type: ignore[operator]
    assert receipt.metrics["more_labels/quality/tail"] == criterion.more
    assert receipt.metrics["passed"] == 0.0


def test_a_stratum_without_labels_is_refused(store: Storage, intent: Task) -> None:
    put(store, intent, {name: GOOD[name] for name in ("head", "torso", "tail")})
    receipt = gate.run(asking(store))
    assert receipt.notes[0].startswith("unseen: no labels at all, ")


def test_the_order_of_rows_decides_nothing(store: Storage, intent: Task) -> None:
    put(store, intent)
    rows = output_table(store, receipt_of(store, "evaluate"), "rows")
    wanted = asking(store, score="f1", minimum={"tail": 0.9}).policy(1)
    rng, found = np.random.default_rng(0), set()
    for _ in range(3):
        mixed = rows.take(pa.array(rng.permutation(rows.num_rows)))
        sources = {name: source_rows(mixed, name, "f1") for name in ("batch_student", "teacher", "fallback")}
        found.add(decide(list(criterion_tests(wanted, sources, "batch_student", "f1", {}, 0)), wanted))
    assert len(found) == 1


def test_f1_per_row_is_a_bounded_mean(store: Storage, segmentation: Task) -> None:
    """Scores of span rows lie between 0 and 1; nothing wanted and nothing given is 1 only if it was answered."""
    table = {"query_key": [query_key(str(i)) for i in range(4)], "source": ["batch_student"] * 4, "stratum": ["tail"] * 4, "count": [1] * 4}
    table |= {"tp": [1, 0, 0, 2], "fp": [1, 0, 0, 0], "fn": [0, 0, 0, 0], "exact": [False, True, False, True]}
    rows = pa.table({**table, "query_key": pa.array(table["query_key"], HUMAN_LABELS.field("query_key").type)})
    scores = dict(zip(source_rows(rows, "batch_student", "f1").keys, source_rows(rows, "batch_student", "f1").score, strict=True))
    assert [scores[query_key(str(i))] for i in range(4)] == pytest.approx([2 / 3, 1.0, 0.0, 1.0])
    with pytest.raises(InputError, match="more than once"):
        source_rows(pa.concat_tables([rows, rows]), "batch_student", "f1")


def test_f1_is_gated_by_betting(store: Storage, intent: Task) -> None:
    put(store, intent)
    criterion = evidence_of(gate.run(asking(store, score="f1"))).criteria[0]
    assert (criterion.method, criterion.right) == ("betting", None)
    assert criterion.lower_bound > 0.9
    assert criterion.value == pytest.approx(232 / 240)


def test_traffic_is_gated_with_its_weights(store: Storage, intent: Task) -> None:
    put(store, intent)
    criterion = evidence_of(gate.run(asking(store, minimum={"traffic": 0.9}))).criteria[0]
    events = {"head": 40, "torso": 3, "tail": 1}
    value = sum(GOOD[s][1] * w for s, w in events.items()) / sum(GOOD[s][0] * w for s, w in events.items())
    assert (criterion.n, criterion.passed) == (590, True)
    assert criterion.value == pytest.approx(value)
    assert (
        criterion.lower_bound < stats.binomtest(198, 200, alternative="greater").proportion_ci(1 - criterion.level, "exact").low
    )  # 200 rows carry it
    plan = receipt_of(store, "plan")
    keep(store, "plan", "p" * 16, {"human_labels": output_table(store, plan, "human_labels")})
    with pytest.raises(ConfigError, match="most frequent query"):
        gate.run(asking(store, minimum={"traffic": 0.91}))


# ---- who is judged, on what, how often


def test_another_candidate_than_the_one_scored_is_an_error(store: Storage, intent: Task) -> None:
    put(store, intent)
    with pytest.raises(ConfigError, match="did not score this candidate"):
        gate.run(asking(store, candidate="distill/" + "x" * 16))
    with pytest.raises(ConfigError, match="no answers of this source"):
        gate.run(asking(store, source="fallback"))
    with pytest.raises(ConfigError, match="another task"):
        gate.run(asking(store, task="query_segmentation"))
    old = receipt_at(store, "precompute", STUDENT)
    keep(store, "precompute", STUDENT, {}, task_fingerprint="0" * 32, result=old.result)
    with pytest.raises(ConfigError, match="another version of the task"):
        gate.run(asking(store))


def test_a_snapshot_is_gated_by_its_own_answers(store: Storage, intent: Task) -> None:
    from headtail.stages import publish

    put(store, intent)
    for mark in (STUDENT, TEACHER):
        receipt = receipt_at(store, "precompute", mark)
        keep(
            store,
            "precompute",
            mark,
            {k: output_table(store, receipt, k) for k in receipt.outputs},
            result=receipt.result,
            task_fingerprint=intent.fingerprint,
        )
    made = publish.run(publish.Config(root=store.root, tracking=OFF, task="query_intent", answers=(STUDENT, TEACHER)))
    snapshot = f"snapshots/{made.result.snapshot}"
    receipt = gate.run(asking(store, candidate=snapshot))
    found = evidence_of(receipt)
    assert (found.candidate, len(found.digest)) == (snapshot, 32)
    assert any(note.startswith(f"{snapshot} also holds answers of precompute/{TEACHER}") for note in receipt.notes)
    made = publish.run(publish.Config(root=store.root, tracking=OFF, task="query_intent", answers=(STUDENT,), note="alone"))
    snapshot = f"snapshots/{made.result.snapshot}"
    with pytest.raises(ConfigError, match="did not score this candidate"):
        gate.run(asking(store, candidate=snapshot, source="teacher", max_drop=None))


def receipt_at(store: Storage, stage: str, mark: str) -> Any:
    return load_receipt(store, stage, f"{stage}/{mark}", PrecomputeResult)


def test_rows_that_are_not_the_evaluations_are_refused(store: Storage, intent: Task) -> None:
    put(store, intent)
    found = receipt_of(store, "evaluate")
    rows = output_table(store, found, "rows")
    better = rows.set_column(rows.schema.get_field_index("exact"), "exact", pa.array([True] * rows.num_rows))
    write_table(store, found.output("rows").path, better)
    with pytest.raises(StorageError, match="SHA-256 differs"):
        gate.run(asking(store))


def test_every_look_at_the_same_labels_counts(store: Storage, intent: Task) -> None:
    """The third student on the same labels is judged at a third of delta, and told so; asking the same again is no new look."""
    put(store, intent)
    first = gate.run(asking(store))
    for mark in ("u" * 16, "v" * 16):
        put(store, intent, student=mark)
        last = gate.run(asking(store))
    assert (first.result.candidate_number, last.result.candidate_number) == (1, 3)
    found = last.result.evidence
    assert found.candidates == 3
    assert min(criterion.level for criterion in found.criteria) == pytest.approx(0.05 / 3 / 4)
    assert any(note.startswith("test 3 on these labelled rows") and "0.092" in note for note in last.notes)
    put(store, intent)
    assert gate.run(asking(store)).path == first.path
    put(store, intent, student="w" * 16)
    assert evidence_of(gate.run(asking(store, candidates=9))).candidates == 9


def test_looks_at_other_labels_do_not_count(store: Storage) -> None:
    def mine(mark: str, queries: str, labels: str) -> dict[str, str]:
        rows = pa.table({"query_key": pa.array([query_key(q) for q in queries], HUMAN_LABELS.field("query_key").type)})
        keep(store, "evaluate", mark * 16, {"rows": rows})
        return {"answers": mark, "labels": labels, "score": "exact", "judge": "", "evaluation": f"evaluate/{mark * 16}"}

    first, fresh, grown = mine("a", "abc", "g1"), mine("b", "xyz", "g2"), mine("c", "cde", "g3")
    assert [candidate_number(store, "looks", entry) for entry in (first, fresh, grown, first, grown)] == [1, 1, 2, 1, 2]


# ---- the judge


def judge(store: Storage, rows: Mapping[str, float | None], model: Mapping[str, str] | None = None, keys: bool = False) -> str:
    """A judge's table over these queries; returns its ref."""
    columns: dict[str, Any] = {"query_key": pa.array([query_key(q) for q in rows], HUMAN_LABELS.field("query_key").type)}
    columns["score"] = pa.array(list(rows.values()), pa.float64())
    if keys:
        columns["answer_key"] = pa.array([query_key(STUDENT + q) for q in rows], HUMAN_LABELS.field("query_key").type)
    keep(
        store,
        "judge",
        "j" * 16,
        {"scores": pa.table(columns)},
        result=JudgeResult(model=AnsweringModel.model_validate(model) if model else None),
    )
    return "judge/" + "j" * 16 + ":scores"


def opinions(more: int) -> dict[str, float | None]:
    """A judge that is always right, on the tail's labelled rows and on `more` rows that nobody labelled."""
    labels: dict[str, float | None] = {f"tail {i}": float(i < GOOD["tail"][1]) for i in range(240)}
    return labels | {f"other {i}": float(i % 20 != 0) for i in range(more)}


def test_a_judge_sharpens_the_bound(store: Storage, intent: Task) -> None:
    put(store, intent, more=3000)
    plain = evidence_of(gate.run(asking(store))).criteria[0]
    receipt = gate.run(asking(store, judge=judge(store, opinions(3000), {"name": "judge-model", "digest": "J"}, keys=True), candidates=2))
    found = evidence_of(receipt)
    criterion = found.criteria[0]
    assert (criterion.n, criterion.judged) == (240, 3000)
    assert criterion.method == "clopper-pearson or prediction-powered betting"
    assert criterion.value == pytest.approx(0.95, abs=0.004)  # the 3240 rows', not the 240's 0.967
    same = Share(232, 240).low(criterion.level / 2)
    assert criterion.lower_bound >= same
    assert plain.judged == 0
    about = {"ref": "judge/" + "j" * 16 + ":scores", "name": "judge-model", "own_teacher": False, "rows": 3240, "left_out": 0}
    assert found.judge == JudgeEvidence.model_validate({**about, "labelled_without_score": 510, "answers_checked": True})
    assert found.data["judge"] == receipt_of(store, "judge").output("scores").sha256


def test_a_judge_that_is_the_teacher_is_named_as_such(store: Storage, intent: Task) -> None:
    put(store, intent, more=200)
    receipt = gate.run(asking(store, judge=judge(store, opinions(200), {"name": "teacher-model", "digest": "T"})))
    judge_found = receipt.result.evidence.judge
    assert judge_found is not None
    assert judge_found.own_teacher is True
    assert any("teacher-model is the candidate's own teacher" in note for note in receipt.notes)
    assert any("no answer_key" in note for note in receipt.notes)


def test_a_judges_silence_counts_against_the_candidate(store: Storage, intent: Task) -> None:
    put(store, intent, more=400)
    full = opinions(400)
    gaps = {q: None if q.endswith("7") else score for q, score in full.items()}
    low = {}
    for name, rows in (("full", full), ("gaps", gaps)):
        table = judge(store, rows)
        read = read_judge(store, table, receipt_at(store, "precompute", STUDENT), None, student_rows(store))
        low[name] = read.by_stratum["tail"]
        assert list(read.by_stratum) == ["tail"]
    assert low["gaps"].more.mean() < low["full"].more.mean()
    assert low["gaps"].labelled.mean() >= low["full"].labelled.mean()


def student_rows(store: Storage) -> SourceScores:
    return source_rows(output_table(store, receipt_of(store, "evaluate"), "rows"), "batch_student", "exact")


def test_scores_of_other_answers_are_left_out_and_bad_tables_refused(store: Storage, intent: Task) -> None:
    put(store, intent, more=50)
    own = receipt_at(store, "precompute", STUDENT)
    read = read_judge(store, judge(store, {**opinions(50), "never asked": 1.0}), own, None, student_rows(store))
    assert (read.description.rows, read.description.left_out) == (290, 1)
    read = read_judge(store, judge(store, opinions(50), keys=True), receipt_at(store, "precompute", TEACHER), None, student_rows(store))
    assert (read.description.rows, read.description.left_out) == (0, 290)  # they are about the student's answers, not the teacher's
    with pytest.raises(InputError, match="between 0 and 1"):
        gate.run(asking(store, judge=judge(store, {"other 1": 1.5})))
    columns = {"query_key": pa.array([query_key("other 1")] * 2, HUMAN_LABELS.field("query_key").type), "score": [1.0, 1.0]}
    keep(store, "judge", "k" * 16, {"scores": pa.table(columns)})
    with pytest.raises(InputError, match="twice"):
        gate.run(asking(store, judge="judge/" + "k" * 16 + ":scores"))


# ---- the decision as a whole


def test_two_thousand_gates_as_the_stage_decides_them() -> None:
    """A student on the boundary on the tail, just good enough elsewhere, through the stage's own functions; then a good one."""
    delta, rng = 0.1, np.random.default_rng(0)
    wanted = GatePolicy({"tail": 0.85, "head": 0.8}, 0.2, True, ("all",), delta, 1, 0.8)
    strata = np.asarray(["tail"] * 60 + ["head"] * 60, dtype=object)
    keys, events = [bytes([i]) for i in range(120)], np.ones(120)
    passes = {0.85: 0, 0.98: 0}
    for truth in passes:
        for _ in range(2000):
            score = (rng.random(120) < np.where(strata == "tail", truth, 0.99)).astype(float)
            other = (rng.random(120) < 0.95).astype(float)
            sources = {
                n: SourceScores(keys, strata, events, s)
                for n, s in (("batch_student", score), ("teacher", other), ("fallback", np.zeros(120)))
            }
            asked = list(criterion_tests(wanted, sources, "batch_student", "exact", {}, 0))
            passes[truth] += all(asked_p(a) for a in asked) and all(criterion.passed for criterion in decide(asked, wanted))
    assert stats.binomtest(passes[0.85], 2000, delta, alternative="greater").pvalue > 1e-4
    assert passes[0.85] > 0  # it can err, and the test would see it
    assert passes[0.98] > 1000


def asked_p(asked: Any) -> bool:
    """Whether this criterion could pass at all: spares the simulation the words of refusals."""
    least = (asked.threshold + 1) / 2 if isinstance(asked.proof, Game) else asked.threshold
    return bool(asked.proof.p(least) <= 0.1)


# ---- config, MLflow


def test_configs_that_ask_nothing_or_nonsense_are_refused() -> None:
    for data, match in (
        ({"minimum": {}, "max_drop": None, "above_fallback": False}, "there is no criterion"),
        ({"minimum": {"tial": 0.9}}, "unknown stratum tial"),
        ({"minimum": {"tail": 1.0}}, "no number of labels can show 1"),
        ({"relative_on": ["everyone"]}, "unknown stratum everyone"),
        ({"delta": 0.6}, "delta"),
    ):
        with pytest.raises(ConfigError, match=match):
            build_config(gate.Config, data, "test")


def test_the_verdict_is_in_mlflow(store: Storage, intent: Task, tmp_path: Path) -> None:
    put(store, intent, POOR)
    receipt = gate.run(asking(store, tracking=TrackingConfig(uri=f"sqlite:///{tmp_path}/ml.db")))
    client = MlflowClient(f"sqlite:///{tmp_path}/ml.db")
    run = client.get_run(receipt.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["headtail.gate"] == "rejected"
    assert run.data.metrics["short/quality/tail"] > 0
    verdict = client.download_artifacts(receipt.run_id, "verdict.json", str(tmp_path))
    assert json.loads(Path(verdict).read_text(encoding="utf-8"))["passed"] is False
    assert "gate.svg" in {item.path for item in client.list_artifacts(receipt.run_id)}
