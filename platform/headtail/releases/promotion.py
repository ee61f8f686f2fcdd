"""A release becomes current by a promotion: each student in it needs a gate's evidence, and what that says is computed anew from the store.

In: the id of a release. Out: the release, which is current now; GateRejected says which student has no evidence, or which criterion its
rows do not bear out, and what to do. Not asked where one goes back (`rollback` must work when labels are gone), nor where a deletion takes
a query out of the current release. `publish` asks the same before it builds. Knows nothing of canaries or servers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from headtail.adapters.storage import Storage
from headtail.adapters.storage.receipts import load_receipt
from headtail.cache.lineage import find_ancestors
from headtail.cache.manifest import require_snapshot
from headtail.core.errors import GateRejected
from headtail.core.evidence import FORMER_FORMAT, Evidence
from headtail.core.receipt import Receipt
from headtail.core.rows import Source
from headtail.core.score import CODE_KINDS
from headtail.releases.look import read_look_log
from headtail.releases.release import Release, current_id, load_release, open_task, promote

if TYPE_CHECKING:
    from headtail.releases.claim import AnswererResult  # loads SciPy, which no process of a server needs until a student is promoted

_AGAIN = "run headtail gate, then headtail publish with what it finds; to go back to the release before, headtail rollback"
_STUDENT = "distill/"  # how the names of models that were trained here begin


def promote_release(store: Storage, release: str) -> Release:
    """Make `release` current. Nothing changes when it is already. GateRejected unless its evidence holds when computed anew."""
    target = load_release(store, release)
    if current_id(store) != target.id:
        require_proof(store, target)
        _prove_gates(store, target)
    return promote(store, target.id)


def require_proof(store: Storage, release: Release) -> None:
    """GateRejected when a student of the release has no evidence of a passed gate, where there are human labels to have it from, and nobody
    accepted that. Computes nothing anew."""
    answers = require_snapshot(store, release.snapshot).lineage
    found = () if release.accept_unproven else unproven_students(store, release.task, release.student, answers, release.evidence.gates)
    if found:
        fix = f"{_AGAIN}; to accept it all the same: headtail release create --like {release.id} --accept-unproven, which is recorded"
        raise GateRejected(f"release {release.id} is not promoted: {unproven_words(found)}", where=", ".join(found), fix=fix)
    for gate in release.evidence.gates:
        if missing := gate.missing():
            raise GateRejected(f"release {release.id} is not promoted: {'; '.join(missing)}", where=gate.candidate, fix=_AGAIN)


def unproven_students(store: Storage, task: str, student: str, answers: Sequence[str], gates: Sequence[Evidence]) -> tuple[str, ...]:
    """Of what a release is to hold (the student for misses, folders of precompute receipts), the students that no gate passed. Empty
    where the store has no human labels for the task: then there is nothing to prove it on."""
    proven = [gate for gate in gates if gate.format != FORMER_FORMAT and not gate.missing()]
    names = {gate.candidate for gate in proven} | {gate.answers for gate in proven}
    digests = {gate.digest for gate in proven}
    found = [student] if student and student not in names else []
    if answers:
        from headtail.releases.claim import AnswererResult
    for path in answers:
        if path in names:
            continue
        if not store.exists(f"{path}/receipt.json"):
            found.append(path)
            continue
        receipt = load_receipt(store, "precompute", path, AnswererResult)
        model = receipt.result.model
        if (model is None or not {model.name, model.digest} & (names | digests)) and _is_students(store, receipt):
            found.append(path)
    return tuple(found) if found and has_labels(store, task, (*answers, student)) else ()


def unproven_words(found: Sequence[str]) -> str:
    """What is missing, for an error."""
    return f"there are human labels, and no gate passed {', '.join(found)}"


def has_labels(store: Storage, task: str, made: Sequence[str] = ()) -> bool:
    """Whether the store has, or had, human labels for a task: in its latest plan, in a plan that receipts (their folders: `made`) descend
    from, or in the ledger of looks."""
    if any(look.task == task for look in read_look_log(store)):
        return True
    return any(_labelled(plan) for plan in _plans(store, made) if plan.task in ("", task))


def _plans(store: Storage, made: Sequence[str]) -> Iterator[Receipt]:
    if store.exists("plan/LATEST"):
        yield load_receipt(store, "plan")
    yield from find_ancestors(store, {path: path for path in made if path}, "plan")


def _labelled(plan: Receipt) -> bool:
    return "human_labels" in plan.outputs and plan.outputs["human_labels"].rows != 0


def _is_students(store: Storage, answers: Receipt[AnswererResult]) -> bool:
    """Whether answers are a student's: by their source, or by a model that learnt from other answers, whatever its answers are called."""
    from headtail.releases.claim import TrainedResult

    model, source = answers.result.model, answers.result.source
    if source != Source.TEACHER:
        return True
    if model is None or not model.name.startswith(_STUDENT) or not store.exists(f"{model.name}/receipt.json"):
        return False
    return any(ref.startswith("curate/") for ref in load_receipt(store, "distill", model.name, TrainedResult).result.trained_on)


def _prove_gates(store: Storage, release: Release) -> None:
    from headtail.releases.proof import recheck

    task = open_task(release)
    for gate in release.evidence.gates:
        if gate.format == FORMER_FORMAT:  # names no labels: it passed by its own figures, and is no proof where there are labels
            continue
        if task.file.score.kind in CODE_KINDS:
            what = f"its answers are scored by code of the task's folder (score: {task.file.score.kind}), which a release does not hold"
            fix = "run the same headtail publish again: it has the folder, computes the evidence anew and promotes"
            raise GateRejected(f"release {release.id} is not promoted: {what}", where=gate.candidate, fix=fix)
        if found := recheck(store, gate, task):
            raise GateRejected(f"release {release.id} is not promoted: {'; '.join(found)}", where=gate.candidate, fix=_AGAIN)
