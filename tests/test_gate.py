"""The gate: what passes was shown, what is rejected says why, and nothing is said of rows, models or judges that were not there."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from mlflow import MlflowClient
from scipy import stats

from conftest import answered_by, figures_of, keep
from headtail.adapters.storage import Storage, read_json, write_table
from headtail.adapters.storage.receipts import load_receipt, output_table
from headtail.core.bounds import Game, Share
from headtail.core.config import TrackingConfig
from headtail.core.errors import ConfigError, GateRejected, InputError, StorageError
from headtail.core.evidence import Criterion, Evidence, JudgeEvidence
from headtail.core.keys import canonical, query_key
from headtail.core.paired import PairedShare
from headtail.core.policy import TaskPolicy
from headtail.core.post_stratify import labelled_traffic, traffic_cells
from headtail.core.receipt import Receipt
from headtail.core.rows import ANSWER, HUMAN_LABELS, KEY, PLANNED, SCORED
from headtail.core.task import Task, load_task
from headtail.releases.criteria import GatePolicy, SourceScores, criterion_tests, decide, source_rows
from headtail.releases.judge_scores import read_judge
from headtail.releases.proof import look_policy
from headtail.releases.seal import seal_labels
from headtail.stages import evaluate, gate
from headtail.stages.distill.result import Result as DistillResult
from headtail.stages.evaluate.result import Result as EvaluateResult
from headtail.stages.gate.result import JudgeResult
from headtail.stages.precompute.result import AnsweringModel
from headtail.stages.precompute.result import Result as PrecomputeResult

OFF = TrackingConfig(enabled=False)
TEACHER, STUDENT = "t" * 16, "s" * 16
RIGHT, WRONG = {"intent": "price"}, {"intent": "how_to"}  # the task's fallback is browse: always wrong here

# stratum -> rows, of them right by the student, right by the teacher
GOOD = {"head": (200, 198, 200), "torso": (150, 147, 148), "tail": (240, 232, 236), "unseen": (160, 152, 156)}
POOR = {**GOOD, "tail": (240, 205, 236)}
POLICY: dict[str, Any] = {"minimum": {"tail": 0.9, "unseen": 0.85}}


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
    usd = 8.0 if mark == TEACHER else 0.5
    known = figures_of(usd_per_million=usd, tokens_in_per_row=40.0, tokens_out_per_row=8.0, rows_per_s=50.0)
    made = {"task_fingerprint": task.fingerprint, "result": answered_by(name, digest, source, figures=known)}
    keep(store, "precompute", mark, {"answers/shard-00000": table}, **made)


def with_policy(task: Task, **policy: Any) -> Task:
    """The same task under another policy."""
    gated = TaskPolicy.model_validate({**POLICY, **policy})
    return dataclasses.replace(task, file=task.file.model_copy(update={"gate": gated}))


def put(
    store: Storage, task: Task, strata: Mapping[str, tuple[int, int, int]] = GOOD, more: int = 0, student: str = STUDENT, seal: float = 0.0
) -> None:
    """Plan, answers of teacher and student (and of `more` tail queries that nobody labelled), and their evaluation: two looks."""
    rows = queries(strata)
    events = {"head": 40, "torso": 3, "tail": 1, "unseen": 0}
    labels = [{"query_key": query_key(q), "query": q, "answer": canonical(RIGHT), "count": events[s], "stratum": s} for q, s, _ in rows]
    top = [{"query_key": query_key("top"), "query": "top", "count": 50, "rank": 1, "stratum": "head", "eval_only": False}]
    wanted = pa.Table.from_pylist(labels, HUMAN_LABELS)
    keep(store, "plan", "p" * 16, {"human_labels": wanted, "head": pa.Table.from_pylist(top, PLANNED)})
    if seal:
        seal_labels(store, "plan/" + "p" * 16 + ":human_labels", wanted, seal)
    others = [(f"other {i}", "tail", i % 20 != 0) for i in range(more)]
    answered(store, task, TEACHER, [(q, s, i < strata[s][2]) for q, s, i in rows], "T", "teacher-model")
    answered(store, task, student, [(q, s, i < strata[s][1]) for q, s, i in rows] + others, "D", "distill/" + "d" * 16)
    keep(store, "distill", "d" * 16, {}, result=DistillResult(digest="D"))
    keep(store, "distill", "x" * 16, {}, result=DistillResult(digest="X"))
    sources = {"teacher": TEACHER, "batch_student": student}
    how = evaluate.Config(root=store.root, tracking=OFF, task="query_intent", answers=sources, resamples=200)
    evaluate.run(how, task=with_policy(task))


def run_gate(store: Storage, **changes: Any) -> Receipt[gate.Result]:
    """The gate with these fields of the policy and of its config."""
    policy = {name: changes.pop(name) for name in TaskPolicy.model_fields if name in changes}
    config = gate.Config.model_validate({"root": store.root, "tracking": OFF, "task": "query_intent", **changes})
    return gate.run(config, task=with_policy(load_task(config.task), **policy))


def low(criterion: Criterion) -> float:
    """The lower bound of rows that are not sealed."""
    assert criterion.lower_bound is not None
    return criterion.lower_bound


def evidence_of(receipt: Receipt[gate.Result]) -> Evidence:
    return receipt.result.evidence


def test_a_good_student_passes(store: Storage, intent: Task) -> None:
    put(store, intent)
    receipt = run_gate(store, candidate="distill/" + "d" * 16)
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
    assert low(tail) > 0.9
    assert low(unseen) > 0.85
    assert drop.value == pytest.approx((729 - 740) / 750)
    assert drop.method == "exact paired"
    assert -0.05 <= low(drop) < -11 / 750
    assert above.value == pytest.approx(729 / 750)
    assert sorted(criterion.level for criterion in found.criteria) == pytest.approx([0.05 / 6 / k for k in (4, 3, 2, 1)])
    assert (found.look, found.sealed, found.excluded) == (2, False, 0)  # the teacher's evaluation was the first look
    assert (found.candidate, found.digest, found.candidates) == ("distill/" + "d" * 16, "D", 6)
    assert found.data["human_labels"] == receipt_of(store, "plan").output("human_labels").sha256
    (teacher,) = found.references
    assert (teacher.source, teacher.answers, teacher.digest, len(teacher.rows)) == ("teacher", f"precompute/{TEACHER}", "T", 64)
    assert found.policy == with_policy(intent).policy_digest
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
    assert run_gate(store, candidate="distill/" + "d" * 16).reused


def receipt_of(store: Storage, stage: str) -> Any:
    return load_receipt(store, stage)


def test_a_rejection_is_an_answer(store: Storage, intent: Task, capsys: pytest.CaptureFixture[str]) -> None:
    put(store, intent, POOR)
    receipt = run_gate(store, minimum={"tail": 0.82, "unseen": 0.85}, max_drop=0.04)
    assert receipt.result.passed is False
    tail, drop = receipt.notes[:2]
    assert tail.startswith("tail: ")
    assert " more labels (likely " in tail
    assert "0.854 on 240 labels" in tail
    assert drop.startswith("all, minus the teacher: ")
    assert evidence_of(receipt).missing() == [tail, drop]
    assert receipt.notes[2].startswith("look 3 at these labelled rows")  # another policy than at the evaluation: a look of its own
    shown = capsys.readouterr().err
    assert "REJECTED" in shown
    assert f"failed {tail}" in shown
    criterion = evidence_of(receipt).criteria[0]
    next_level = criterion.level * 12 / 20  # this look is the third, at delta / 12; the next is at delta / 20
    assert criterion.more == Share(205, 240).rows_needed(0.82, next_level, 0.8) - 240  # type: ignore[operator]
    assert criterion.more_least is not None
    assert criterion.more_least < criterion.more
    assert receipt.metrics["more_labels/quality/tail"] == criterion.more
    assert receipt.metrics["passed"] == 0.0


def test_a_stratum_without_labels_is_refused(store: Storage, intent: Task) -> None:
    put(store, intent, {name: GOOD[name] for name in ("head", "torso", "tail")})
    receipt = run_gate(store)
    assert receipt.notes[0].startswith("unseen: no labels at all, ")


def test_the_order_of_rows_decides_nothing(store: Storage, intent: Task) -> None:
    put(store, intent)
    rows = output_table(store, receipt_of(store, "evaluate"), "rows")
    wanted = look_policy(TaskPolicy(score="f1", minimum={"tail": 0.9}), 1, 0.8)
    rng, found = np.random.default_rng(0), set()
    for _ in range(3):
        mixed = rows.take(pa.array(rng.permutation(rows.num_rows)))
        sources = {name: source_rows(mixed, name, "f1") for name in ("batch_student", "teacher", "fallback")}
        found.add(decide(list(criterion_tests(wanted, sources, "batch_student", "f1", {}, None)), wanted))
    assert len(found) == 1


def test_f1_per_row_is_a_bounded_mean(store: Storage, segmentation: Task) -> None:
    """Scores of span rows lie between 0 and 1; nothing wanted and nothing given is 1 only if it was answered."""
    table: dict[str, Any] = {
        "query_key": [query_key(str(i)) for i in range(4)],
        "source": ["batch_student"] * 4,
        "stratum": ["tail"] * 4,
        "count": [1] * 4,
    }
    table |= {"tp": [1, 0, 0, 2], "fp": [1, 0, 0, 0], "fn": [0, 0, 0, 0], "exact": [False, True, False, True]}
    table |= {name: pa.nulls(4, SCORED.field(name).type) for name in ("inclusion", "events", "cluster")}
    rows = pa.table({**table, "query_key": pa.array(table["query_key"], HUMAN_LABELS.field("query_key").type)})
    scores = dict(zip(source_rows(rows, "batch_student", "f1").keys, source_rows(rows, "batch_student", "f1").score, strict=True))
    assert [scores[query_key(str(i))] for i in range(4)] == pytest.approx([2 / 3, 1.0, 0.0, 1.0])
    with pytest.raises(InputError, match="more than once"):
        source_rows(pa.concat_tables([rows, rows]), "batch_student", "f1")


def test_f1_is_gated_by_betting(store: Storage, intent: Task) -> None:
    put(store, intent)
    criterion = evidence_of(run_gate(store, score="f1")).criteria[0]
    assert (criterion.method, criterion.right) == ("betting", None)
    assert low(criterion) > 0.9
    assert criterion.value == pytest.approx(232 / 240)


def test_micro_f1_is_gated_on_the_scale_of_the_headline(store: Storage, intent: Task) -> None:
    put(store, intent)
    criterion = evidence_of(run_gate(store, score="micro_f1", minimum={"all": 0.9})).criteria[0]
    quality = receipt_of(store, "evaluate").metrics["quality/batch_student/all"]
    assert (criterion.method, criterion.passed) == ("betting", True)
    assert criterion.value == pytest.approx(quality)
    with pytest.raises(ConfigError, match="micro_f1"):
        run_gate(store, score="micro_f1", judge="judge:judged")


def test_traffic_needs_a_design(store: Storage, intent: Task) -> None:
    put(store, intent)
    with pytest.raises(ConfigError, match="human labels of a known design"):
        run_gate(store, minimum={"traffic": 0.9})


def test_traffic_is_gated_by_its_design() -> None:
    """The head is right, the tail is not; the rows are half of each, the traffic nearly all of it the head's."""
    counts = np.repeat([64, 1], 150)
    cells = traffic_cells(np.repeat([64, 1], [2000, 2000]), np.repeat([64, 1], [2000, 2000]))
    wanted = GatePolicy({"traffic": 0.95}, None, False, (), 0.05, 0.8)
    right = np.repeat([1.0, 0.0], 150)
    order = np.random.default_rng(0).permutation(300)
    keys, tail = [b""] * 300, np.full(300, "tail", dtype=object)

    def criterion(chance: float) -> Criterion:
        rows = labelled_traffic(counts[order], np.zeros(300), np.full(300, chance), np.arange(300))
        scores = SourceScores(keys, tail, counts[order].astype(float), right[order], traffic=rows)
        return decide(list(criterion_tests(wanted, {"s": scores}, "s", "exact", {}, cells)), wanted)[0]

    found = criterion(0.01)
    assert (found.passed, found.n, found.right) == (True, 300, None)
    assert found.value == pytest.approx(64 / 65)
    with pytest.raises(ConfigError, match="human labels of a known design"):
        criterion(float("nan"))


def test_how_many_labels_a_student_that_equals_its_teacher_needs() -> None:
    """As docs/labels.md and docs/questions.md say, by look, under the default policy."""
    policy = TaskPolicy()
    assert policy.max_drop is not None
    bounded = (1 - policy.max_drop) / 2
    needed = [next(n for n in range(1, 500) if PairedShare(0, 0, n).p(bounded) <= policy.level(look)) for look in (1, 2, 3)]
    assert needed == [73, 102, 120]
    docs = Path(__file__).parent.parent / "docs"
    said = re.compile(r"needs (\d+) (?:labels )?at the first look(?: at them)?, (\d+) at the second, (\d+) at the third")
    for page in ("labels.md", "questions.md"):
        (found,) = said.findall((docs / page).read_text(encoding="utf-8"))
        assert list(map(int, found)) == needed


# ---- who is judged, on what, how often


def test_another_candidate_than_the_one_scored_is_an_error(store: Storage, intent: Task) -> None:
    put(store, intent)
    with pytest.raises(ConfigError, match="did not score this candidate"):
        run_gate(store, candidate="distill/" + "x" * 16)
    with pytest.raises(ConfigError, match="no answers of this source"):
        run_gate(store, source="fallback")
    with pytest.raises(ConfigError, match="another task"):
        run_gate(store, task="query_segmentation")
    old = receipt_at(store, "precompute", STUDENT)
    keep(store, "precompute", STUDENT, {}, task_fingerprint="0" * 32, result=old.result)
    with pytest.raises(ConfigError, match="another version of the task"):
        run_gate(store)


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
    made = publish.run(publish.Config(root=store.root, tracking=OFF, task="query_intent", answers=(STUDENT, TEACHER), accept_unproven=True))
    snapshot = f"snapshots/{made.result.snapshot}"
    receipt = run_gate(store, candidate=snapshot)
    found = evidence_of(receipt)
    assert (found.candidate, len(found.digest)) == (snapshot, 32)
    assert any(note.startswith(f"{snapshot} also holds answers of precompute/{TEACHER}") for note in receipt.notes)
    made = publish.run(publish.Config(root=store.root, tracking=OFF, task="query_intent", answers=(STUDENT,), accept_unproven=True))
    snapshot = f"snapshots/{made.result.snapshot}"
    with pytest.raises(ConfigError, match="did not score this candidate"):
        run_gate(store, candidate=snapshot, source="teacher", max_drop=None)


def receipt_at(store: Storage, stage: str, mark: str) -> Any:
    return load_receipt(store, stage, f"{stage}/{mark}", PrecomputeResult)


def test_what_the_gate_rejected_is_not_published_where_there_are_labels(store: Storage, intent: Task) -> None:
    """Neither the student nor its answers, by leaving the gate out; who accepts it leaves a trace in the release."""
    from headtail.releases import release
    from headtail.stages import publish

    put(store, intent, POOR, seal=0.5)
    rejected = run_gate(store)
    assert not rejected.result.passed
    for mark in (STUDENT, TEACHER):
        receipt = receipt_at(store, "precompute", mark)
        tables = {k: output_table(store, receipt, k) for k in receipt.outputs}
        keep(store, "precompute", mark, tables, result=receipt.result, task_fingerprint=intent.fingerprint)
    common = {"root": store.root, "tracking": OFF, "task": "query_intent"}
    live = {"student": "distill/" + "d" * 16}
    for parts in ({"answers": (TEACHER,), **live}, {"answers": (STUDENT, TEACHER)}, {"answers": (STUDENT,), **live, "promote": False}):
        with pytest.raises(GateRejected, match="there are human labels, and no gate passed"):
            publish.run(publish.Config.model_validate({**common, **parts}))
    with pytest.raises(GateRejected, match="is not published; missing: tail"):
        publish.run(
            publish.Config.model_validate({**common, **live, "answers": (TEACHER,), "gates": (rejected.path,)}), with_policy(intent)
        )
    assert release.current_id(store) == ""
    alone = publish.run(publish.Config.model_validate({**common, "answers": (TEACHER,)}))  # a teacher's answers need no gate
    assert not release.load_release(store, alone.result.release).accept_unproven
    made = publish.run(publish.Config.model_validate({**common, **live, "answers": (STUDENT, TEACHER), "accept_unproven": True}))
    now = release.current_release(store)
    assert (now.id, now.student, now.accept_unproven) == (made.result.release, live["student"], True)


def test_labels_that_were_changed_are_refused(store: Storage, intent: Task) -> None:
    put(store, intent)
    plan = receipt_of(store, "plan")
    rows = output_table(store, plan, "human_labels")
    write_table(store, plan.output("human_labels").path, rows.slice(1))
    with pytest.raises(StorageError, match="SHA-256 differs"):
        run_gate(store)


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
    plain = evidence_of(run_gate(store)).criteria[0]
    receipt = run_gate(store, judge=judge(store, opinions(3000), {"name": "judge-model", "digest": "J"}, keys=True))
    found = evidence_of(receipt)
    criterion = found.criteria[0]
    assert (criterion.n, criterion.judged) == (240, 3000)
    assert criterion.method == "clopper-pearson or prediction-powered betting"
    assert criterion.value == pytest.approx(0.95, abs=0.004)  # the 3240 rows', not the 240's 0.967
    same = Share(232, 240).low(criterion.level / 2)
    assert low(criterion) >= same
    assert plain.judged == 0
    about = {"ref": "judge/" + "j" * 16 + ":scores", "name": "judge-model", "own_teacher": False, "rows": 3240, "left_out": 0}
    assert found.judge == JudgeEvidence.model_validate({**about, "labelled_without_score": 510, "answers_checked": True})
    assert found.data["judge"] == receipt_of(store, "judge").output("scores").sha256


def test_a_judge_that_is_the_teacher_is_named_as_such(store: Storage, intent: Task) -> None:
    put(store, intent, more=200)
    receipt = run_gate(store, judge=judge(store, opinions(200), {"name": "teacher-model", "digest": "T"}))
    judge_found = receipt.result.evidence.judge
    assert judge_found is not None
    assert judge_found.own_teacher is True
    assert any("teacher-model is the candidate's own teacher" in note for note in receipt.notes)
    assert any("no answer_key" in note for note in receipt.notes)


def test_a_judges_silence_counts_against_the_candidate(store: Storage, intent: Task) -> None:
    put(store, intent, more=400)
    full = opinions(400)
    gaps = {q: None if q.endswith("7") else score for q, score in full.items()}
    scores = {}
    for name, rows in (("full", full), ("gaps", gaps)):
        table = judge(store, rows)
        read = read_judge(store, table, receipt_at(store, "precompute", STUDENT), "", student_rows(store))
        scores[name] = read.by_stratum["tail"]
        assert list(read.by_stratum) == ["tail"]
    assert scores["gaps"].more.mean() < scores["full"].more.mean()
    assert scores["gaps"].labelled.mean() >= scores["full"].labelled.mean()


def student_rows(store: Storage) -> SourceScores:
    return source_rows(output_table(store, receipt_of(store, "evaluate"), "rows"), "batch_student", "exact")


def test_scores_of_other_answers_are_left_out_and_bad_tables_refused(store: Storage, intent: Task) -> None:
    put(store, intent, more=50)
    own = receipt_at(store, "precompute", STUDENT)
    read = read_judge(store, judge(store, {**opinions(50), "never asked": 1.0}), own, "", student_rows(store))
    assert (read.description.rows, read.description.left_out) == (290, 1)
    mixed = {**opinions(50), "never asked": 1.0}
    teachers = receipt_at(store, "precompute", TEACHER)
    with pytest.raises(InputError, match="not about the candidate's answers") as refused:  # but about the student's
        read_judge(store, judge(store, mixed, keys=True), teachers, "", student_rows(store))
    assert f"291 rows, of other answers; the candidate's are {teachers.path}" in str(refused.value)
    looks = [look.path for look in store.files("looks")]
    with pytest.raises(InputError, match="not about the candidate's answers"):
        run_gate(store, judge=judge(store, {"never asked": 1.0}))
    with pytest.raises(InputError, match="no query without a person's label that the candidate did not learn from"):
        run_gate(store, judge=judge(store, opinions(0)))
    with pytest.raises(InputError, match="between 0 and 1"):
        run_gate(store, judge=judge(store, {"other 1": 1.5}))
    columns = {"query_key": pa.array([query_key("other 1")] * 2, HUMAN_LABELS.field("query_key").type), "score": [1.0, 1.0]}
    keep(store, "judge", "k" * 16, {"scores": pa.table(columns)})
    with pytest.raises(InputError, match="twice"):
        run_gate(store, judge="judge/" + "k" * 16 + ":scores")
    assert [look.path for look in store.files("looks")] == looks, "what is refused spends nothing"


OTHERS = [f"other {i}" for i in range(3000)]


def learn(store: Storage, mark: str, texts: Sequence[str]) -> None:
    """The student learnt from these queries."""
    keep(store, "curate", mark * 16, {"training_set": pa.table({"query_key": pa.array([query_key(q) for q in texts], KEY)})})
    keep(store, "distill", "d" * 16, {}, result=DistillResult(digest="D", trained_on=("curate/" + mark * 16 + ":training_set",)))


def test_judged_rows_are_neither_the_candidates_training_rows_nor_labelled_elsewhere(store: Storage, intent: Task) -> None:
    put(store, intent, more=3000)
    learn(store, "c", OTHERS[:1500])
    found = evidence_of(run_gate(store, judge=judge(store, opinions(3000), keys=True)))
    assert (found.criteria[0].n, found.criteria[0].judged, found.excluded) == (240, 1500, 0)
    assert found.judge is not None
    assert (found.judge.rows, found.judge.apart, found.judge.left_out) == (240 + 1500, 1500, 0)
    learn(store, "e", [f"tail {i}" for i in range(120)])  # labelled rows that are left out do not come back as unlabelled ones
    receipt = run_gate(store, judge=judge(store, opinions(3000), keys=True))
    found = evidence_of(receipt)
    assert (found.criteria[0].n, found.criteria[0].judged, found.excluded) == (120, 3000, 120)
    assert any(note.startswith("120 judged rows are left out") for note in receipt.notes)
    learn(store, "f", OTHERS)
    with pytest.raises(InputError, match="that the candidate did not learn from"):
        run_gate(store, judge=judge(store, opinions(3000), keys=True))


def test_open_labelled_rows_are_no_judged_rows_of_a_sealed_claim(store: Storage, intent: Task) -> None:
    put(store, intent, more=300, seal=0.5)
    found = evidence_of(run_gate(store, judge=judge(store, opinions(300), keys=True)))
    tail = found.criteria[0]
    assert found.judge is not None
    assert (found.sealed, tail.judged, tail.n + found.judge.apart) == (True, 300, 240)


def test_training_rows_beside_a_judge_would_let_bad_students_pass(store: Storage, intent: Task) -> None:
    """100 students that are exactly as good as the threshold, and 0.99 right on their own training rows, half of what was judged."""
    put(store, intent, {**GOOD, "tail": (150, 140, 145)}, more=1200)
    own, rng, truth = receipt_at(store, "precompute", STUDENT), np.random.default_rng(0), 0.85
    learnt = frozenset(query_key(q) for q in OTHERS[:600])
    labelled = [f"tail {i}" for i in range(150)]
    rule = GatePolicy({"tail": truth}, None, False, (), 0.05, 0.8)
    passes = {"without": 0, "with": 0}
    for _ in range(100):
        people = (rng.random(150) < truth).astype(float)
        more = (rng.random(1200) < np.where(np.arange(1200) < 600, 0.99, truth)).astype(float)
        table = judge(store, dict(zip([*labelled, *OTHERS[:1200]], [*people.tolist(), *more.tolist()], strict=True)))
        source = SourceScores([query_key(q) for q in labelled], np.full(150, "tail", dtype=object), np.ones(150), people)
        for name, apart in (("without", learnt), ("with", frozenset[bytes]())):
            scores = read_judge(store, table, own, "", source, apart)
            (asked,) = criterion_tests(rule, {"s": source}, "s", "exact", scores.by_stratum, None)
            passes[name] += asked.proof.p(truth) <= rule.delta
    assert stats.binomtest(passes["without"], 100, rule.delta, alternative="greater").pvalue > 1e-4
    assert passes["with"] > 40, "what the rule is for"


# ---- the decision as a whole


def test_gates_as_the_stage_decides_them() -> None:
    """A student on the boundary on the tail, just good enough elsewhere, through the stage's own functions; then a good one."""
    delta, rng = 0.1, np.random.default_rng(0)
    wanted = GatePolicy({"tail": 0.85, "head": 0.8}, 0.2, True, ("all",), delta, 0.8)
    strata = np.asarray(["tail"] * 60 + ["head"] * 60, dtype=object)
    keys, events = [bytes([i]) for i in range(120)], np.ones(120)
    passes = {0.85: 0, 0.98: 0}
    for truth in passes:
        for _ in range(400):
            score = (rng.random(120) < np.where(strata == "tail", truth, 0.99)).astype(float)
            other = (rng.random(120) < 0.95).astype(float)
            sources = {
                n: SourceScores(keys, strata, events, s)
                for n, s in (("batch_student", score), ("teacher", other), ("fallback", np.zeros(120)))
            }
            asked = list(criterion_tests(wanted, sources, "batch_student", "exact", {}, None))
            passes[truth] += all(asked_p(a) for a in asked) and all(criterion.passed for criterion in decide(asked, wanted))
    assert stats.binomtest(passes[0.85], 400, delta, alternative="greater").pvalue > 1e-4
    assert passes[0.85] > 0  # it can err, and the test would see it
    assert passes[0.98] > 200


def asked_p(asked: Any) -> bool:
    """Whether this criterion could pass at all: spares the simulation the words of refusals."""
    least = (asked.threshold + 1) / 2 if isinstance(asked.proof, Game) else asked.threshold
    return bool(asked.proof.p(least) <= 0.1)


# ---- MLflow


def test_the_verdict_is_in_mlflow(store: Storage, intent: Task, tmp_path: Path) -> None:
    put(store, intent, POOR)
    receipt = run_gate(store, tracking=TrackingConfig(uri=f"sqlite:///{tmp_path}/ml.db"))
    client = MlflowClient(f"sqlite:///{tmp_path}/ml.db")
    run = client.get_run(receipt.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["headtail.gate"] == "rejected"
    assert run.data.metrics["short/quality/tail"] > 0
    verdict = client.download_artifacts(receipt.run_id, "verdict.json", str(tmp_path))
    assert json.loads(Path(verdict).read_text(encoding="utf-8"))["passed"] is False
    assert "gate.svg" in {item.path for item in client.list_artifacts(receipt.run_id)}
