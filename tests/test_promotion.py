"""What is promoted was shown on the rows in the store, whoever promotes it; going back and deleting never depend on that."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pytest

import headtail
from conftest import keep
from headtail.adapters.storage import Storage, open_storage
from headtail.adapters.storage.receipts import load_receipt
from headtail.cache.builder import build_snapshot
from headtail.cache.snapshot import publish_snapshot
from headtail.cli import main
from headtail.core.errors import GateRejected
from headtail.core.evidence import Evidence
from headtail.core.rows import HUMAN_LABELS
from headtail.core.score import ScoreConfig
from headtail.core.task import Task
from headtail.releases import canary, release
from headtail.releases.deletion import delete_query
from headtail.releases.look import read_look_log
from headtail.releases.promotion import has_labels, promote_release, unproven_students
from headtail.stages.distill.result import Result as DistillResult
from headtail.stages.precompute.result import Result as PrecomputeResult
from headtail.stages.serve.admin_calls import AdminCalls
from headtail.stages.serve.errors import RequestError
from test_cache import answers, good
from test_gate import GOOD, POOR, evidence_of, put, run_gate, with_policy
from test_gate import STUDENT as STUDENT_MARK

pytestmark = pytest.mark.usefixtures("not_drawn")

PACKAGE = Path(headtail.__file__).parent


class Gated(NamedTuple):
    """A store whose labels were evaluated and gated once, and what the gate found."""

    store: Storage
    evidence: Evidence


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, intent: Task) -> dict[str, Gated]:
    """A student that passes on sealed rows, and one that does not pass. Tests get copies."""
    found = {}
    for name, strata, seal in (("good", GOOD, 0.5), ("poor", POOR, 0.0)):
        store = open_storage(str(tmp_path_factory.mktemp(name) / "store"))
        put(store, intent, strata, seal=seal)
        found[name] = Gated(store, evidence_of(run_gate(store)))
    return found


def copy(kept: Gated, root: str) -> Gated:
    shutil.copytree(kept.store.root, root)
    return Gated(open_storage(root), kept.evidence)


@pytest.fixture
def passing(kept: dict[str, Gated], root: str) -> Gated:
    return copy(kept["good"], root)


@pytest.fixture
def failing(kept: dict[str, Gated], root: str) -> Gated:
    return copy(kept["poor"], root)


def forge(rejected: Evidence) -> Evidence:
    """The same, written by hand as if every criterion were passed; its own figures bear it out."""
    better = {"passed": True, "lower_bound": 0.95, "p": 1e-9, "value": 0.97}
    criteria = [{**criterion.model_dump(), **better} for criterion in rejected.criteria]
    return Evidence.model_validate({**rejected.model_dump(), "passed": True, "criteria": criteria})


def made(store: Storage, tmp_path: Path, task: Task, *gates: Evidence, note: str = "") -> str:
    """The id of a release whose snapshot holds the first labelled query."""
    folder = tmp_path / f"build-{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    built = build_snapshot([[answers(good("head 0", '{"intent":"price"}'), good("pizza", '{"intent":"price"}'))]], folder)
    manifest = publish_snapshot(store, built, task=task.name, task_fingerprint=task.fingerprint)
    evidence = release.ReleaseEvidence(gates=gates)
    return release.make_release(store, snapshot=manifest.id, task=task, evidence=evidence, note=note).id


def by_command(store: Storage, name: str) -> None:
    main(["release", "promote", name, "--root", store.root])


def by_admin_call(store: Storage, name: str) -> None:
    AdminCalls(store, lambda name: None).run("release/promote", f'{{"release": "{name}"}}'.encode(), "ada", "10.0.0.1")


def as_canary(store: Storage, name: str) -> None:
    canary.start_canary(store, name, 0.05, who="ada")
    canary.promote_canary(store, who="ada", accept_undecided=True)


WAYS = (by_command, by_admin_call, as_canary)


@pytest.mark.parametrize("promote", WAYS)
def test_evidence_is_computed_anew_by_whichever_way_a_release_becomes_current(
    promote: Callable[[Storage, str], None], failing: Gated, tmp_path: Path, intent: Task, capsys: pytest.CaptureFixture[str]
) -> None:
    store, forged = failing.store, forge(failing.evidence)
    assert forged.missing() == []
    task = with_policy(intent)
    base, bad = made(store, tmp_path, task), made(store, tmp_path, task, forged)
    promote_release(store, base)
    with pytest.raises((GateRejected, RequestError, SystemExit)) as refused:
        promote(store, bad)
    said = f"{refused.value} {capsys.readouterr().err}"
    assert "computed anew, not shown: tail: " in re.sub(r"\s+", " ", said)
    assert release.current_id(store) == base
    running = canary.read_canary(store)
    assert running is None or running.state == "running"  # it goes on: whoever tried it decides


@pytest.mark.parametrize("promote", WAYS)
def test_what_holds_is_promoted_and_no_look_is_spent(
    promote: Callable[[Storage, str], None], passing: Gated, tmp_path: Path, intent: Task
) -> None:
    (store, own), task = passing, with_policy(intent)
    promote_release(store, made(store, tmp_path, task))
    looks = read_look_log(store)
    proven = made(store, tmp_path, task, own)
    promote(store, proven)
    assert release.current_id(store) == proven
    derived = release.derive_release(store, proven, note="again").id
    promote(store, derived)
    assert release.current_id(store) == derived
    assert read_look_log(store) == looks
    assert evidence_of(run_gate(store)).look == 1


def test_going_back_does_not_depend_on_labels(passing: Gated, tmp_path: Path, intent: Task) -> None:
    (store, own), task = passing, with_policy(intent)
    proven, later = made(store, tmp_path, task, own), made(store, tmp_path, task, note="later")
    promote_release(store, proven)
    promote_release(store, later)
    store.remove("plan/" + "p" * 16 + "/receipt.json")
    assert release.rollback(store).id == proven
    promote_release(store, later)
    with pytest.raises(GateRejected, match="the verdict cannot be computed anew: ") as refused:
        promote_release(store, proven)
    assert "headtail rollback" in refused.value.fix
    assert release.current_id(store) == later
    promote_release(store, later)  # what is current already is not asked again


def test_a_deletion_goes_through_although_a_labelled_row_is_gone_with_it(passing: Gated, tmp_path: Path, intent: Task) -> None:
    (store, own), task = passing, with_policy(intent)
    proven = made(store, tmp_path, task, own)
    promote_release(store, proven)
    deleted = delete_query(store, "head 0", who="ada", why="asked for")
    assert deleted.rows["plan"] == 1
    assert release.current_id(store) == deleted.release != proven
    derived = release.derive_release(store, "current", note="after it").id
    with pytest.raises(GateRejected, match="its rows are not those of the store any more: run headtail gate again"):
        promote_release(store, derived)


def test_a_release_without_a_student_needs_no_evidence(failing: Gated, tmp_path: Path, intent: Task) -> None:
    name = made(failing.store, tmp_path, intent)
    assert promote_release(failing.store, name).id == release.current_id(failing.store) == name


def test_evidence_of_the_format_before_is_kept_and_proves_no_student(passing: Gated, tmp_path: Path, intent: Task) -> None:
    """It names no labels, so nothing can be computed anew: whoever relabels a rejection gains nothing."""
    store, task = passing.store, with_policy(intent)
    former = passing.evidence.model_copy(update={"format": "headtail-gate/3"})
    kept = made(store, tmp_path, task, former)
    assert promote_release(store, kept).id == kept
    with pytest.raises(GateRejected, match=f"there are human labels, and no gate passed {STUDENT}"):
        promote_release(store, with_student(store, tmp_path, task, STUDENT, former))
    rejected = former.model_copy(update={"passed": False})
    with pytest.raises(GateRejected, match="the verdict is: rejected"):
        promote_release(store, made(store, tmp_path, task, rejected))


# ---- a student without evidence


def with_student(store: Storage, tmp_path: Path, task: Task, student: str, *gates: Evidence, lineage: tuple[str, ...] = ()) -> str:
    """The id of a release with a student for misses, and of these answers."""
    folder = tmp_path / f"build-{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    built = build_snapshot([[answers(good("head 0", '{"intent":"price"}'))]], folder)
    manifest = publish_snapshot(store, built, task=task.name, task_fingerprint=task.fingerprint, lineage=lineage)
    evidence = release.ReleaseEvidence(gates=gates)
    return release.make_release(store, snapshot=manifest.id, task=task, student=student, evidence=evidence).id


STUDENT = "distill/" + "d" * 16
ANSWERS = f"precompute/{STUDENT_MARK}"


@pytest.mark.parametrize("promote", WAYS)
@pytest.mark.parametrize("student, lineage", [(STUDENT, ()), ("", (ANSWERS,)), ("", ("precompute/gone",))])
def test_a_student_that_no_gate_passed_is_not_promoted_where_there_are_labels(
    promote: Callable[[Storage, str], None],
    student: str,
    lineage: tuple[str, ...],
    failing: Gated,
    tmp_path: Path,
    intent: Task,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store, task = failing.store, with_policy(intent)
    base = made(store, tmp_path, task)
    promote_release(store, base)
    bare = with_student(store, tmp_path, task, student, lineage=lineage)
    with pytest.raises((GateRejected, RequestError, SystemExit)) as refused:
        promote(store, bare)
    said = re.sub(r"\s+", " ", f"{refused.value} {capsys.readouterr().err}")
    assert f"there are human labels, and no gate passed {student or lineage[0]}" in said
    assert (release.current_id(store), canary.read_canary(store)) == (base, None)
    main(["release", "create", "--like", bare, "--accept-unproven", "--why", "tried elsewhere", "--root", store.root, "--json"])
    accepted = json.loads(capsys.readouterr().out)
    assert accepted["accept_unproven"] is True
    promote(store, accepted["id"])
    assert release.current_release(store).accept_unproven
    again = release.derive_release(store, "current", student="distill/" + "x" * 16)
    assert not again.accept_unproven  # it was accepted of another student
    with pytest.raises(GateRejected, match="no gate passed distill/" + "x" * 16):
        promote_release(store, again.id)


def test_a_students_answers_are_a_students_whatever_they_are_called(failing: Gated, tmp_path: Path, intent: Task) -> None:
    store = failing.store
    keep(store, "distill", "d" * 16, {}, result=DistillResult(digest="D", trained_on=("curate/" + "c" * 16 + ":training_set",)))
    renamed = load_receipt(store, "precompute", ANSWERS, PrecomputeResult).result.model_copy(update={"source": "teacher"})
    keep(store, "precompute", STUDENT_MARK, {}, result=renamed)
    assert unproven_students(store, "query_intent", "", (ANSWERS,), ()) == (ANSWERS,)
    keep(store, "distill", "d" * 16, {}, result=DistillResult(digest="D", trained_on=("ingest/" + "i" * 16 + ":human_labels_train",)))
    assert unproven_students(store, "query_intent", "", (ANSWERS,), ()) == ()  # a teacher that was trained on people's answers


def test_with_its_evidence_or_without_any_labels_a_student_is_promoted(passing: Gated, tmp_path: Path, intent: Task) -> None:
    (store, own), task = passing, with_policy(intent)
    proven = with_student(store, tmp_path, task, STUDENT, own, lineage=(ANSWERS,))
    assert promote_release(store, proven).id == proven
    other = unproven_students(store, "query_intent", "distill/" + "x" * 16, (ANSWERS,), (own,))
    assert other == ("distill/" + "x" * 16,)
    bare = open_storage(str(tmp_path / "bare"))
    assert not has_labels(bare, "query_intent")
    assert promote_release(bare, with_student(bare, tmp_path, task, STUDENT)).student == STUDENT
    keep(bare, "plan", "p" * 16, {"human_labels": HUMAN_LABELS.empty_table()})
    assert not has_labels(bare, "query_intent")
    keep(bare, "plan", "p" * 16, {"human_labels": pa.Table.from_pylist([{"query_key": b"k" * 16}], HUMAN_LABELS)}, task="query_intent")
    assert has_labels(bare, "query_intent")
    assert not has_labels(bare, "query_segmentation")


def test_a_release_whose_answers_are_scored_by_code_says_who_can_promote_it(passing: Gated, tmp_path: Path, intent: Task) -> None:
    (store, own), task = passing, with_policy(intent)
    score = ScoreConfig(kind="custom", function="own:likeness")
    coded = dataclasses.replace(task, file=task.file.model_copy(update={"score": score}))
    with pytest.raises(GateRejected, match="scored by code of the task's folder") as refused:
        promote_release(store, made(store, tmp_path, coded, own))
    assert refused.value.fix.startswith("run the same headtail publish again")


def test_nothing_else_makes_a_release_current() -> None:
    """`publish` computes evidence anew before it builds; a deletion must not depend on it. All others go by promote_release."""
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if re.search(r"(?<!def )(?<!tracker\.)(?<!_)\bpromote\((?!name, version)", path.read_text())
    }
    assert found == {"releases/promotion.py", "releases/deletion.py", "stages/publish/stage.py"}
