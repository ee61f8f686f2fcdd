"""Nothing half published can be reached, whatever kills it where; publishing again is idempotent and puts CURRENT right."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pydantic import ValidationError

from conftest import answered_by, figures_of
from headtail.adapters.storage import Storage, open_storage, read_json, write_json, write_table
from headtail.adapters.storage.receipts import output_table
from headtail.cache import open_snapshot, read_manifest
from headtail.cache.diff import DiffPart, SnapshotDiff, diff_snapshots
from headtail.core.config import TrackingConfig, build_config
from headtail.core.errors import ConfigError, GateRejected, HeadtailError, InputError, StorageError
from headtail.core.evidence import read_evidence, three_figures
from headtail.core.keys import query_key
from headtail.core.receipt import FileRef, Receipt
from headtail.core.rows import QUERY
from headtail.core.task import Task
from headtail.releases import lookup, release
from headtail.stages import publish
from headtail.stages.evaluate.result import Result as EvaluateResult
from headtail.stages.gate.result import Result as GateResult
from headtail.stages.precompute.result import Result as PrecomputeResult
from test_cache import answers, good, kill_at
from test_evidence import evidence
from timescale import limit

OFF = TrackingConfig(enabled=False)


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """All of this is done on disk and on S3 (moto's server stands in for it)."""
    return str(tmp_path / "store") if request.param == "local" else str(request.getfixturevalue("s3_root"))


@pytest.fixture
def store(root: str) -> Storage:
    return open_storage(root)


A, B = '{"intent":"browse"}', '{"intent":"price"}'


def leave(store: Storage, stage: str, mark: str, tables: Mapping[str, pa.Table], **fields: Any) -> Receipt[Any]:
    """A receipt made by hand, as the stage would leave it."""
    path = f"{stage}/{mark * 4}"
    outputs: dict[str, FileRef] = {name: write_table(store, f"{path}/{name}.parquet", table) for name, table in tables.items()}
    made = Receipt(
        stage=stage, fingerprint=mark * 8, path=path, started="2030-01-01T00:00:00+00:00", seconds=1.0, outputs=outputs, **fields
    )
    write_json(store, f"{path}/receipt.json", made.model_dump(mode="json"))
    store.replace(f"{stage}/LATEST", path.encode())
    return made


def gate_result(proof: Mapping[str, Any]) -> GateResult:
    found = read_evidence(proof)
    return GateResult(passed=found.passed, evidence=found, candidate_number=1)


def log(store: Storage, counts: Mapping[str, int]) -> Receipt:
    rows = [{"query_key": query_key(q), "query": q, "count": n} for q, n in counts.items()]
    ingest = leave(store, "ingest", "1090", {"queries": pa.Table.from_pylist(rows, schema=QUERY)})
    return leave(store, "plan", "b1a4", {}, inputs={"log": ingest.path})


def answered(store: Storage, mark: str, task: Task, *tables: pa.Table, inputs: Mapping[str, str] | None = None) -> Receipt:
    in_order = sorted(tables, key=lambda table: table.column("query_key")[0].as_py())  # shards are ranges of keys
    shards = {f"answers/shard-{i:05d}": table for i, table in enumerate(in_order)}
    return leave(store, "precompute", mark, shards, inputs=dict(inputs or {}), task_fingerprint=task.fingerprint, result=answered_by())


@pytest.fixture
def prepared(store: Storage, intent: Task) -> tuple[Receipt, Receipt]:
    """Teacher's and student's answers over a log of 100 events."""
    plan = log(store, {"pizza": 50, "burger": 30, "rare": 15, "never": 5})
    teacher = answered(
        store, "aaaa", intent, answers(good("pizza", A)), answers(good("burger", A, confidence=0.2)), inputs={"plan.head": plan.path}
    )
    rest = answers(good("burger", B, "batch_student"), good("rare", B, "batch_student"), ("never", "", "truncated", None, "batch_student"))
    return teacher, answered(store, "bbbb", intent, rest, inputs={"plan.student_rows": plan.path})


def config(root: str, *receipts: Receipt, **options: Any) -> publish.Config:
    data = {
        "root": root,
        "tracking": OFF,
        "task": "query_intent",
        "answers": tuple(r.path for r in receipts),
        "max_lost_share": 1,
        **options,
    }
    return build_config(publish.Config, data, where="test")


def test_publish_makes_a_snapshot_a_release_and_moves_current(store: Storage, root: str, prepared: tuple[Receipt, Receipt]) -> None:
    receipt = publish.run(config(root, *prepared))
    assert receipt.rows == {
        "published": 3,
        "published.batch_student": 1,
        "published.teacher": 2,
        "left_out": 2,
        "left_out.duplicate": 1,
        "left_out.truncated": 1,
    }
    assert receipt.metrics["coverage"] == 0.95
    assert receipt.result.previous == ""
    now = release.current_release(store)
    assert (now.id, now.snapshot) == (receipt.result.release, receipt.result.snapshot)
    manifest = read_manifest(store, now.snapshot)
    assert manifest.lineage == tuple(r.path for r in prepared)
    assert manifest.coverage == 0.95
    assert manifest.examples[:2] == ("burger", "pizza")
    assert set(receipt.outputs) == {"answers", "lmdb", "manifest", "release"}
    for ref in receipt.outputs.values():
        assert len(store.read(ref.path)) == ref.bytes
    found = lookup.look_up(store, "Burger")
    assert (found["answer"], found["source"]) == ({"intent": "browse"}, "teacher")


def test_a_threshold_by_source_leaves_rows_to_the_next_receipt(store: Storage, root: str, prepared: tuple[Receipt, Receipt]) -> None:
    receipt = publish.run(config(root, *prepared, min_confidence={"teacher": 0.5}))
    assert receipt.rows["left_out.unconfident"] == 1
    assert lookup.look_up(store, "burger")["source"] == "batch_student"
    assert release.current_release(store).thresholds == {"teacher": 0.5}
    with pytest.raises(ConfigError, match="min_confidence"):
        config(root, *prepared, min_confidence={"techer": 0.5})


def test_redacted_queries_go_live_unless_the_task_says_that_they_may_share_an_answer(
    store: Storage, root: str, intent: Task, tmp_path: Path
) -> None:
    teacher = answered(store, "aaaa", intent, answers(good("pizza", A), good("call <phone>", A)))
    receipt = publish.run(config(root, teacher))
    assert (receipt.rows["published"], receipt.rows["left_out.redacted"]) == (1, 1)
    assert any("redacted queries are not in the cache" in note for note in receipt.notes)
    assert lookup.look_up(store, "call 5552345678")["source"] is None
    folder = shutil.copytree(intent.folder, tmp_path / "task")
    (folder / "task.yaml").write_text((folder / "task.yaml").read_text() + "\nredacted: cached\n")
    shared = publish.run(config(root, teacher, task=str(folder)))
    assert (shared.rows["published"], shared.reused) == (2, False)
    assert lookup.look_up(store, "call 5552345678")["source"] == "teacher"


def test_again_builds_nothing_and_after_a_rollback_promotes_again(
    store: Storage, root: str, prepared: tuple[Receipt, Receipt], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = publish.run(config(root, prepared[0]))
    second = publish.run(config(root, *prepared))
    assert second.result.previous == first.result.release
    monkeypatch.setattr(publish.stage, "build_snapshot", lambda *_, **__: pytest.fail("built again"))
    assert publish.run(config(root, *prepared)).reused
    assert len(release.move_history(store)) == 2  # nothing moved
    assert release.rollback(store).id == first.result.release
    again = publish.run(config(root, *prepared))
    assert again.reused
    assert release.current_id(store) == second.result.release
    assert release.rollback(store).id == first.result.release  # and that can be taken back too


def test_without_promote_nothing_goes_live_and_with_it_later_nothing_is_built(
    store: Storage, root: str, prepared: tuple[Receipt, Receipt]
) -> None:
    made = publish.run(config(root, *prepared, promote=False))
    assert release.current_id(store) == ""
    assert publish.run(config(root, *prepared)).reused
    assert release.current_id(store) == made.result.release


STEPS = ("log/", "answers.parquet", "data.mdb", "manifest.json", "releases/", "receipt.json", "LATEST", "moves/", "CURRENT")


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_at_any_write_nothing_half_published_is_reachable(
    store: Storage, root: str, prepared: tuple[Receipt, Receipt], monkeypatch: pytest.MonkeyPatch, step: str, after: bool
) -> None:
    old = publish.run(config(root, prepared[0]))
    hit: list[str] = []
    with monkeypatch.context() as patch:
        kill_at(patch, store, step, after, hit)
        with pytest.raises(KeyboardInterrupt):
            publish.run(config(root, *prepared))
    assert hit
    live = release.current_release(store)
    assert open_snapshot(store, live.snapshot).lookup("pizza") is not None  # whatever is current is whole
    assert lookup.look_up(store, "pizza")["cached"]
    if (step, after) != ("CURRENT", True):
        assert live.id == old.result.release
    new = publish.run(config(root, *prepared))
    assert release.current_id(store) == new.result.release
    assert lookup.look_up(store, "rare")["cached"]
    assert len(release.move_history(store)) == 2
    assert release.rollback(store).id == old.result.release


def test_disk_full_while_building_is_told_and_changes_nothing(
    store: Storage, root: str, prepared: tuple[Receipt, Receipt], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = publish.run(config(root, prepared[0]))

    def full(self: object, local: Path, path: str) -> None:
        raise StorageError("cannot write: No space left on device", where=path, fix="free space")

    with monkeypatch.context() as patch:
        patch.setattr(type(store), "put_file", full)
        with pytest.raises(StorageError, match="No space left"):
            publish.run(config(root, *prepared))
    assert release.current_id(store) == old.result.release
    assert publish.run(config(root, *prepared)).rows["published"] == 3


def test_answers_to_another_prompt_are_refused(store: Storage, root: str, segmentation: Task, prepared: tuple[Receipt, Receipt]) -> None:
    other = answered(store, "cccc", segmentation, answers(good("x")))
    with pytest.raises(ConfigError, match="another version of the task"):
        publish.run(config(root, prepared[0], other))
    assert release.current_id(store) == ""


def test_rows_that_are_missing_from_a_shard_are_noticed(store: Storage, root: str, prepared: tuple[Receipt, Receipt]) -> None:
    path, name = f"{prepared[1].path}/receipt.json", "answers/shard-00000"
    lost = write_table(
        store, prepared[1].outputs[name].path, answers(good("rare", B, "batch_student"))
    )  # two rows fewer than the receipt says
    with pytest.raises(HeadtailError, match="SHA-256 differs"):
        publish.run(config(root, *prepared))
    text = read_json(store, path)
    text["outputs"][name]["sha256"] = lost.sha256  # by a stage that counted wrong, not by damage
    write_json(store, path, text)
    with pytest.raises(HeadtailError, match="do not add up"):
        publish.run(config(root, *prepared))
    assert release.current_id(store) == ""


def test_what_is_missing_is_named(store: Storage, root: str, prepared: tuple[Receipt, Receipt]) -> None:
    with pytest.raises(InputError, match="no finished precompute here"):
        publish.run(config(root, answers=("precompute/feed",)))
    with pytest.raises(InputError, match="distill has not been run"):
        publish.run(config(root, *prepared, student="latest"))


def drop_files(data: bytes) -> bytes:
    return json.dumps(json.loads(data) | {"files": {}}).encode()


def not_a_number(data: bytes) -> bytes:
    return json.dumps(json.loads(data) | {"min_confidence": {"teacher": math.nan}}).encode()


def another_note(data: bytes) -> bytes:
    return json.dumps(json.loads(data) | {"student": "distill/feed"}).encode()


DAMAGE: dict[str, tuple[str, Callable[[bytes], bytes] | None]] = {
    "no lmdb": ("snapshots/{0.snapshot}/lmdb/data.mdb", None),
    "one bit of lmdb": ("snapshots/{0.snapshot}/lmdb/data.mdb", lambda data: data[:-1] + bytes([data[-1] ^ 1])),
    "half of parquet": ("snapshots/{0.snapshot}/answers.parquet", lambda data: data[: len(data) // 2]),
    "no manifest": ("snapshots/{0.snapshot}/manifest.json", None),
    "no files in the manifest": ("snapshots/{0.snapshot}/manifest.json", drop_files),
    "no number in the manifest": ("snapshots/{0.snapshot}/manifest.json", not_a_number),
    "rubbish for a manifest": ("snapshots/{0.snapshot}/manifest.json", lambda data: b"["),
    "no release": ("releases/{0.release}.json", None),
    "another release": ("releases/{0.release}.json", another_note),
}


@pytest.mark.parametrize("receipt", [True, False], ids=["receipt", "no receipt"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_what_was_damaged_is_refused_and_publishing_again_mends_it(
    store: Storage, root: str, prepared: tuple[Receipt, Receipt], tmp_path: Path, damage: str, receipt: bool
) -> None:
    made = publish.run(config(root, *prepared))
    query = output_table(store, made, "answers", ["query"])["query"][0].as_py()
    path, change = DAMAGE[damage][0].format(made.result), DAMAGE[damage][1]
    if change is None:
        store.remove(path)
    else:
        store.replace(path, change(store.read(path)))
    if not receipt:
        store.remove(f"{made.path}/receipt.json")
    if path != f"snapshots/{made.result.snapshot}/answers.parquet":  # only diff reads it
        with pytest.raises(HeadtailError):
            lookup.look_up(store, query, into=tmp_path / "before")
    again = publish.run(config(root, *prepared))
    assert (again.result.snapshot, again.result.release) == (made.result.snapshot, made.result.release)
    assert release.current_id(store) == made.result.release
    assert lookup.look_up(store, query, into=tmp_path / "after")["cached"]
    assert diff_snapshots(store, made.result.snapshot, again.result.snapshot, examples=1).same.rows == made.rows["published"]
    assert publish.run(config(root, *prepared)).reused


def test_a_minimum_confidence_is_a_share() -> None:
    for wrong in (1.5, -0.1, math.nan):
        with pytest.raises(ValidationError):
            publish.Config(min_confidence={"teacher": wrong})


def test_latest_names_what_is_latest_now(store: Storage, root: str, intent: Task, prepared: tuple[Receipt, Receipt]) -> None:
    by_latest = publish.run(config(root, answers=("latest",)))
    assert by_latest.inputs["answers.0"] == prepared[1].path
    assert publish.run(config(root, prepared[1])).reused  # the same thing under its own name
    answered(store, "dddd", intent, answers(good("new", A)))
    assert not publish.run(config(root, answers=("latest",))).reused


def test_evidence_and_student_go_into_the_release(store: Storage, root: str, prepared: tuple[Receipt, Receipt]) -> None:
    metrics = {"quality/teacher/all": 0.9, "ece/teacher": 0.1}
    judged = EvaluateResult(labels="plan/ab:human_labels", answers={})
    seen = leave(store, "evaluate", "eeee", {}, metrics=metrics, inputs={"teacher": prepared[0].path}, result=judged)
    student = leave(store, "distill", "5555", {})
    receipt = publish.run(config(root, *prepared, student=student.path, evaluation=seen.path, note="first try"))
    now = release.current_release(store)
    assert now.student == student.path
    assert now.evidence == release.ReleaseEvidence(evaluate=seen.path, figures={"quality/teacher/all": 0.9})
    assert now.note == "first try"
    assert receipt.notes == (f"the evaluation {seen.path} did not score the answers {prepared[1].path}",)


def test_three_figures_of_each_student_are_its_gates_or_the_evaluations_or_its_cost(
    store: Storage, root: str, prepared: tuple[Receipt, Receipt], intent: Task, computed_anew: None
) -> None:
    def made(old: Receipt, mark: str, source: str, name: str, **known: float) -> Receipt[PrecomputeResult]:
        tables = {label: output_table(store, old, label) for label in old.outputs}
        same = {"inputs": old.inputs, "task_fingerprint": old.task_fingerprint}
        return leave(store, "precompute", mark, tables, result=answered_by(name, source=source, figures=figures_of(**known)), **same)

    student, live = (leave(store, "distill", mark, {}) for mark in ("d1d1", "d2d2"))
    taught = made(prepared[0], "ac01", "teacher", "big", usd_per_million=10.0)
    batch = made(prepared[1], "ac02", "batch_student", student.path, usd_per_million=0.5, rows_per_s=100.0)
    alone = publish.run(config(root, taught, batch, student=live.path))
    assert alone.result.figures["batch_student"].times_cheaper_than_teacher == 20.0
    assert alone.result.figures["batch_student"].quality_against_people is None
    assert alone.result.figures["realtime_student"].usd_per_million_own is None
    assert alone.metrics["figures/batch_student/seconds_per_million_own"] == 10_000.0
    assert "figures/batch_student/quality_against_people" not in alone.metrics
    seen = three_figures(0.9, 0.8, batch.result.figures, taught.result.figures)
    judged = EvaluateResult(labels="plan/ab:human_labels", answers={"batch_student": batch.path}, figures={"batch_student": seen})
    evaluated = leave(store, "evaluate", "ee01", {}, result=judged)
    told = publish.run(config(root, taught, batch, student=live.path, evaluation=evaluated.path))
    assert told.result.figures["batch_student"] == seen
    assert told.metrics["figures/batch_student/quality_against_people"] == 0.9
    proof = evidence(candidate=live.path, policy=intent.policy_digest) | {"figures": three_figures(0.7, None, None, None)}
    gated = leave(store, "gate", "0a0a", {}, result=gate_result(proof))
    both = publish.run(config(root, taught, batch, student=live.path, evaluation=evaluated.path, gates=(gated.path,)))
    assert both.result.figures == {"realtime_student": proof["figures"], "batch_student": seen}
    assert publish.run(config(root, taught)).result.figures == {}, "no student, no figures"


def test_without_a_log_coverage_is_unknown_not_zero(store: Storage, root: str, intent: Task) -> None:
    receipt = publish.run(config(root, answered(store, "aaaa", intent, answers(good("pizza", A)))))
    assert "coverage" not in receipt.metrics
    assert any("coverage is not known" in note for note in receipt.notes)


@pytest.mark.parametrize("first", [True, False])
def test_publishing_nothing_is_refused_and_what_is_live_stays(store: Storage, root: str, intent: Task, first: bool) -> None:
    if not first:
        publish.run(config(root, answered(store, "cccc", intent, answers(good("pizza", A)))))
    live = release.current_id(store)
    empty = answered(store, "aaaa", intent, answers(("pizza", "", "failed", None, "teacher"), ("burger", "", "truncated", None, "teacher")))
    with pytest.raises(InputError, match="nothing is fit to be published") as error:
        publish.run(config(root, empty, accept_loss=True))
    assert (error.value.value, error.value.where) == ("1 failed, 1 truncated", empty.path)
    assert error.value.exit_code == 2
    assert release.current_id(store) == live


def test_a_release_that_loses_live_traffic_needs_a_flag(store: Storage, root: str, intent: Task, prepared: tuple[Receipt, Receipt]) -> None:
    """100 events: pizza 50, burger 30, rare 15; counts are those of the answers (1 each where `good` says nothing)."""
    live = publish.run(config(root, *prepared))
    few = answered(store, "eeee", intent, answers(good("pizza", B), good("new", A)))
    with pytest.raises(
        GateRejected, match=r"66.7% of the current release's events .* 2 queries with 2 events, such as 'burger', 'rare'"
    ) as error:
        publish.run(config(root, few, max_lost_share=publish.Config().max_lost_share))
    assert "accept_loss=true" in error.value.fix
    assert live.result.release in error.value.where
    assert release.current_id(store) == live.result.release
    with pytest.raises(GateRejected):  # the snapshot was built: it is refused again
        publish.run(config(root, few, max_lost_share=0.6))
    made = publish.run(config(root, few, max_lost_share=0.05, accept_loss=True))
    assert made.reused
    assert release.current_id(store) == made.result.release
    assert publish.run(config(root, *prepared, max_lost_share=0.5)).reused, "half is lost on the way back"
    assert publish.run(config(root, few, max_lost_share=0.7)).reused


def test_without_events_the_loss_is_a_share_of_queries() -> None:
    def part(rows: int, events: int) -> DiffPart:
        return DiffPart(rows=rows, events=events, share=None, by_source={})

    def diff(*parts: DiffPart) -> SnapshotDiff:
        dropped, changed, same = parts
        sizes = {"rows_before": 0, "rows_after": 0, "traffic": 0}
        return SnapshotDiff(before="a", after="b", **sizes, of_log=False, added=part(9, 9), dropped=dropped, changed=changed, same=same)

    assert publish.loss.lost_share(diff(part(1, 0), part(1, 0), part(2, 0))) == (
        0.25,
        "the current release's queries (their events are not known)",
    )
    assert publish.loss.lost_share(diff(part(1, 90), part(1, 0), part(2, 10))) == (0.9, "the current release's events")
    assert publish.loss.lost_share(diff(part(0, 0), part(0, 0), part(0, 0)))[0] == 0


def test_answers_without_confidence_are_counted_and_never_all_left_out_silently(store: Storage, root: str, intent: Task) -> None:
    some = answered(store, "aaaa", intent, answers(good("pizza", A), good("burger", A, confidence=None), good("rare", A, confidence=0.1)))
    receipt = publish.run(config(root, some, min_confidence={"teacher": 0.5}))
    assert receipt.rows["left_out.without_confidence.teacher"] == receipt.rows["left_out.unconfident"] == receipt.rows["published"] == 1
    assert any("1 answers of the teacher have no confidence" in note for note in receipt.notes)
    none = answered(store, "bbbb", intent, answers(good("pizza", A, confidence=None), good("burger", A, confidence=None)))
    with pytest.raises(ConfigError, match="no answer of the teacher would be published: 2 have no confidence") as error:
        publish.run(config(root, none, min_confidence={"teacher": 0.5}))
    assert error.value.where == "min_confidence.teacher"


def test_rollback_of_a_large_snapshot_takes_no_longer(store: Storage, root: str, intent: Task) -> None:
    """It moves a pointer: nothing is copied, built or opened. On S3 each step is a request to another machine: 5 s leave room."""
    small = publish.run(config(root, answered(store, "aaaa", intent, answers(good("pizza", A)))))
    many = publish.run(config(root, answered(store, "bbbb", intent, answers(*(good(f"q{i}", A) for i in range(20_000))))))
    assert release.current_id(store) == many.result.release
    started = time.monotonic()
    assert release.rollback(store).id == small.result.release
    assert time.monotonic() - started < limit(5)


def test_answers_out_of_order_are_refused_with_the_receipt_named(store: Storage, root: str, intent: Task) -> None:
    """As receipts of earlier versions have them, whose shards are not ranges of keys."""
    table = answers(*(good(f"q{i}", A) for i in range(10)))
    old = leave(
        store,
        "precompute",
        "0dd0",
        {"answers/shard-00000": table.slice(5), "answers/shard-00001": table.slice(0, 5)},
        task_fingerprint=intent.fingerprint,
        result=answered_by(),
    )
    with pytest.raises(InputError, match="not in order of query_key") as told:
        publish.run(config(root, old))
    assert old.path in str(told.value)
    assert release.current_id(store) == ""


@pytest.fixture
def computed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evidence made by hand has no rows to compute it from: tests/test_looks.py does that with real answers."""
    monkeypatch.setattr("headtail.stages.publish.stage.recheck", lambda store, evidence, task: evidence.missing())


def test_a_student_goes_live_with_the_evidence_of_its_gate(
    store: Storage, root: str, intent: Task, prepared: tuple[Receipt, Receipt], computed_anew: None
) -> None:
    """The evidence is in the release; a refused gate, or one of another student, publishes nothing."""
    student = leave(store, "distill", "dddd", {})
    proof = evidence(candidate=student.path, policy=intent.policy_digest)
    passed = leave(store, "gate", "0a0a", {}, result=gate_result(proof))
    made = publish.run(config(root, *prepared, student=student.path, gates=(passed.path,)))
    assert release.current_release(store).evidence.gates == (read_evidence(proof),)
    refused = leave(store, "gate", "0b0b", {}, result=gate_result(evidence(("tail", 210, 240, 0.85), candidate=student.path)))
    with pytest.raises(GateRejected, match="missing: tail: 993 more labels"):
        publish.run(config(root, *prepared, student=student.path, gates=(refused.path,)))
    other = leave(store, "gate", "0c0c", {}, result=gate_result(evidence(candidate="distill/another")))
    with pytest.raises(GateRejected, match="the given evidence is of distill/another"):
        publish.run(config(root, *prepared, student=student.path, gates=(other.path,)))
    assert release.current_id(store) == made.result.release
