"""A release: a snapshot, the student for its misses, the task, and the evidence that let it pass; and which one is current.

In: what a publish made. Out: `releases/<id>.json` (written once), `CURRENT` (the id that is current, moved in one atomic
step) and `releases/moves/<n>.json` (who was made current when; each number can be written once, so two promotions at
the same time are ordered). Rollback undoes the last promotion. `diff_references` compares two of them by name. Knows nothing of
servers, canaries or how a snapshot is made.
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from headtail.adapters import append_log
from headtail.adapters.storage import Storage, read_record, read_text, write_once
from headtail.cache import read_manifest
from headtail.cache.diff import SnapshotDiff, diff_snapshots
from headtail.cache.manifest import manifest_path, require_snapshot
from headtail.cache.words import load_words
from headtail.core.calibration import StudentCalibration
from headtail.core.config import Config, build_config
from headtail.core.errors import ConfigError, InputError, StorageError
from headtail.core.evidence import FORMER_FORMAT, Evidence
from headtail.core.guardrails import AnswerGuard, load_own_check
from headtail.core.keys import fingerprint
from headtail.core.paths import StoreId, StoreIdOrEmpty, StorePathOrEmpty, StudentOrEmpty, store_id
from headtail.core.query import redact_texts
from headtail.core.task import Task, TaskFile

_AGAIN = "run headtail publish again: it writes the release anew; if nobody edited it, see docs/security.md"
CURRENT = "CURRENT"
FOLDER = "releases"
MOVES = f"{FOLDER}/moves"
FORMAT = 3  # layout of a release: raise it when one of an older version can no longer be read


class TaskCopy(Config):
    """The task as it was when it was published, whole: an edited folder cannot change what a release answers."""

    file: dict[str, Any] = Field(description="task.yaml")
    json_schema: dict[str, Any] = Field(description="JSON Schema of an answer")
    template: str = Field(description="the prompt")

    @classmethod
    def of(cls, task: Task) -> TaskCopy:
        return cls(file=task.file.model_dump(mode="json"), json_schema=task.schema, template=task.template)


class ReleaseEvidence(Config):
    """What let a release pass."""

    evaluate: StorePathOrEmpty = Field("", description="receipt of the evaluation; empty: none was given")
    figures: dict[str, float] = Field({}, description="quality and exact match of that evaluation, by source and stratum")
    gates: tuple[Evidence, ...] = Field((), description="evidence of each gate that was passed")


class Release(Config):
    """What is served together. The id is made over its parts, not over when it was made or after what."""

    format: int = Field(FORMAT, description="layout of this record")
    id: StoreId = Field(description="16 hex digits over snapshot, student, task, thresholds, evidence and note")
    snapshot: StoreId = Field(description="id of the published cache")
    student: StudentOrEmpty = Field("", description="distill/<fingerprint> that answers misses; empty: misses get the task's fallback")
    task: StoreId = Field(description="name of the task")
    task_fingerprint: StoreId = Field(description="over all of the task that changes an answer")
    task_copy: TaskCopy = Field(description="the task itself")
    thresholds: dict[str, float] = Field({}, description="least confidence by source that was published")
    calibration: StudentCalibration | None = Field(
        None, description="of the student's confidence, and from where its answers are sure; null: not known"
    )
    evidence: ReleaseEvidence = Field(ReleaseEvidence(), description="what let it pass: the evaluation, its figures, the gates")
    accept_unproven: bool = Field(False, description="whether somebody accepted that no gate passed a student in it")
    previous: StoreIdOrEmpty = Field(
        "", description="the release that was current when this one was first made; for people, rollback goes by the moves"
    )
    created: str = Field(description="UTC, ISO 8601")
    note: str = Field("", description="why, in words")

    @property
    def own_id(self) -> str:
        """The id that this content has."""
        parts = {name: getattr(self, name) for name in ("snapshot", "student", "thresholds", "note")}
        copies: dict[str, Any] = {"evidence": self.evidence.model_dump(mode="json"), "task": self.task_copy.model_dump()}
        for gate in copies["evidence"]["gates"]:
            _drop_new_fields(gate)
        if self.calibration is not None:  # a release without one keeps the id that it had before there was this field
            copies["calibration"] = self.calibration.model_dump(mode="json")
        if self.accept_unproven:  # as for a calibration
            copies["accept_unproven"] = True
        return fingerprint({**parts, **copies}, "release")[:16]


def _drop_new_fields(gate: dict[str, Any]) -> None:
    """Evidence that was made before a field was there keeps the content, and so the release the id, that it had."""
    if not gate["ledger"]:
        del gate["ledger"]
    if gate["judge"] and not gate["judge"]["apart"]:
        del gate["judge"]["apart"]
    if gate["format"] == FORMER_FORMAT:
        for name in ("look", "policy", "labels", "sealed", "excluded", "references"):
            del gate[name]
        for criterion in gate["criteria"]:
            for name in ("open_value", "least_labels", "more_least", "more_most"):
                del criterion[name]


class Move(Config):
    """One change of CURRENT."""

    number: int = Field(ge=1, description="1 for the first")
    action: Literal["promote", "rollback"] = Field(description="what was asked for")
    release: StoreId = Field(description="the release that became current")
    before: StoreIdOrEmpty = Field("", description="the release that was current; empty for the first")
    at: str = Field(description="UTC, ISO 8601")


def make_release(
    store: Storage,
    *,
    snapshot: str,
    task: Task,
    student: str = "",
    thresholds: dict[str, float] | None = None,
    calibration: StudentCalibration | None = None,
    evidence: ReleaseEvidence | None = None,
    accept_unproven: bool = False,
    note: str = "",
) -> Release:
    """Record a release; nothing is promoted by this. The same parts give the same release, which is written once."""
    read_manifest(store, snapshot)  # a release never names a missing snapshot
    copy = TaskCopy.of(task)
    release = Release(
        id="0",
        snapshot=snapshot,
        student=student,
        task=task.name,
        task_fingerprint=task.fingerprint,
        task_copy=copy,
        thresholds=thresholds or {},
        calibration=calibration,
        evidence=evidence or ReleaseEvidence(),
        accept_unproven=accept_unproven,
        previous=current_id(store),
        created=_now(),
        note=str(redact_texts(note)),
    )
    release = release.model_copy(update={"id": release.own_id})
    data = (release.model_dump_json(indent=2) + "\n").encode()
    write_once(store, _path(release.id), data)
    try:
        return load_release(store, release.id)
    except StorageError:  # what was there was changed by hand: its content has another id
        store.replace(_path(release.id), data)
        return load_release(store, release.id)


def derive_release(
    store: Storage, base: str, *, snapshot: str = "", student: str | None = None, note: str = "", accept_unproven: bool = False
) -> Release:
    """Record a release that is `base` but for its snapshot (named as `snapshot_of` takes it) or its student (empty: none).

    Task and thresholds are those of `base`; so are evidence and calibration where the student is the same, and `accept_unproven` where
    the snapshot is too. ConfigError when the snapshot is of another task.
    """
    held = load_release(store, base)
    chosen = snapshot_of(store, snapshot) if snapshot else held.snapshot
    if snapshot and (manifest := read_manifest(store, chosen)).task_fingerprint != held.task_fingerprint:
        what = f"this snapshot is of another task, or another version of it: {manifest.task}"
        raise ConfigError(
            what, where="--snapshot", value=chosen, fix=f"name one of task {held.task}, or publish with the task as it is now"
        )
    return make_release(
        store,
        snapshot=chosen,
        task=open_task(held),
        student=held.student if student is None else student,
        thresholds=held.thresholds,
        calibration=held.calibration if student in (None, held.student) else None,
        evidence=held.evidence if student in (None, held.student) else None,
        accept_unproven=accept_unproven or (held.accept_unproven and (chosen, student or held.student) == (held.snapshot, held.student)),
        note=note,
    )


def load_release(store: Storage, release: str = "current") -> Release:
    """A release by id, or the current one. InputError says what to do when there is none."""
    if release == "current":
        return current_release(store)
    if not store.exists(_path(release)):
        raise InputError(
            "no such release", where=store.uri(FOLDER), value=release, fix="`current`, or an id that `headtail publish` printed"
        )
    record = read_record(store, Release, _path(release), FORMAT)
    if not release == record.id == record.own_id:
        what = "this release was changed after it was published: its content has another id"
        raise StorageError(what, where=store.uri(_path(release)), value=record.own_id, fix=_AGAIN)
    return record


def current_id(store: Storage) -> str:
    """The id that CURRENT holds; empty when nothing was promoted yet."""
    return read_text(store, CURRENT).strip() if store.exists(CURRENT) else ""


def current_release(store: Storage) -> Release:
    """The release that is current. InputError when nothing was promoted yet."""
    found = current_id(store)
    if not found:
        raise InputError("this store has no release yet", where=store.uri(CURRENT), fix=f"run: headtail publish --root {store.root}")
    return load_release(store, found)


def open_task(release: Release) -> Task:
    """The task that a release was published with."""
    copy = release.task_copy
    return Task(build_config(TaskFile, copy.file, where=f"release {release.id}"), Path(), copy.json_schema, copy.template)


def open_guard(store: Storage, release: Release, allow_code: bool = False) -> AnswerGuard:
    """The guardrails that a release was published under, with the words of its log. `allow_code`: whether `guardrails.check` may run."""
    task = open_task(release)
    guard = AnswerGuard(task, own_check=load_own_check(task, allow_code))
    return AnswerGuard(task, load_words(store, release.snapshot), guard.own_check) if guard.active else guard


def promote(store: Storage, release: str) -> Release:
    """Make `release` current. Nothing changes when it is already. Its evidence is not looked at: promotion.promote_release does that."""
    target = load_release(store, release)
    if current_id(store) != target.id:
        require_snapshot(store, target.snapshot)
        _move(store, target, "promote")
    return target


def rollback(store: Storage) -> Release:
    """Undo the last promotion that was not undone yet. InputError when there is none before it."""
    stack = standing_promotions(store)
    if len(stack) < 2:
        raise InputError(
            "there is no release to go back to", where=store.uri(MOVES), value=stack[-1] if stack else "nothing promoted", fix="publish one"
        )
    found = load_release(store, stack[-2])
    require_snapshot(store, found.snapshot)  # never point at a snapshot that was collected
    _move(store, found, "rollback")
    return found


def move_history(store: Storage) -> list[Move]:
    """Every change of CURRENT, oldest first."""
    return list(append_log.read_entry_records(store, Move, MOVES))


def rolled_back(store: Storage) -> bool:
    """Whether the last change of CURRENT was a rollback."""
    last = append_log.last_number(store, MOVES)
    return last > 0 and _read_move(store, last).action == "rollback"


def snapshot_of(store: Storage, ref: str) -> str:
    """The snapshot that `ref` names: `current`, `previous` (what rollback would go to), a release's id or a snapshot's."""
    if ref == "previous":
        stack = standing_promotions(store)
        if len(stack) < 2:
            raise InputError("there is no previous release", where=store.uri(MOVES), fix="name a release or a snapshot by its id")
        ref = stack[-2]
    if ref == "current" or store.exists(_path(ref)):
        return load_release(store, ref).snapshot
    if store.exists(manifest_path(ref)):
        return ref
    fix = "`current`, `previous`, or an id that `headtail publish` printed"
    raise InputError("neither a release nor a snapshot has this id", where=store.root, value=ref, fix=fix)


def diff_references(store: Storage, before: str, after: str, examples: int = 10) -> SnapshotDiff:
    """What changed from one snapshot to another, each named as `snapshot_of` takes it."""
    return diff_snapshots(store, snapshot_of(store, before), snapshot_of(store, after), examples)


def _path(release: str) -> str:
    try:
        store_id(release)
    except ValueError as error:
        raise InputError(f"not the id of a release: {error}", where=FOLDER, value=repr(release), fix="see `headtail status`") from None
    return f"{FOLDER}/{release}.json"


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _move(store: Storage, release: Release, action: Literal["promote", "rollback"]) -> None:
    """Write the move, then CURRENT. If another move came in between, CURRENT follows that one: the last number wins."""
    while True:
        number, before = append_log.last_number(store, MOVES) + 1, current_id(store)
        last = _read_move(store, number - 1) if number > 1 else None
        if last is not None and last.release == release.id and last.action == action and before == last.before:
            number -= 1  # killed between the move and CURRENT: finish that move
            break
        if _write_move(store, number, action, release.id, before):
            break
    try:
        require_snapshot(store, release.snapshot)  # again: a collector that did not see the move had marked it before this look
    except StorageError:
        if before:  # the move is taken back, unless another came after it; the first of all is no move until CURRENT says so
            _write_move(store, number + 1, "rollback" if action == "promote" else "promote", before, before)
        raise
    store.replace(CURRENT, release.id.encode())
    while store.exists(_move_path(number + 1)):
        number += 1
        store.replace(CURRENT, _read_move(store, number).release.encode())


def _write_move(store: Storage, number: int, action: Literal["promote", "rollback"], release: str, before: str) -> bool:
    move = Move(number=number, action=action, release=release, before=before, at=_now())
    return store.create(_move_path(number), (move.model_dump_json(indent=2) + "\n").encode())


def standing_promotions(store: Storage) -> list[str]:
    """Promotions that stand, oldest first; the last is current."""
    moves, current = move_history(store), current_id(store)
    if moves and moves[-1].release != current:
        moves.pop()  # cut short between the move and CURRENT: it did not happen
    stack: list[str] = []
    for move in moves:
        if move.action == "promote":
            stack.append(move.release)
        elif len(stack) > 1:
            stack.pop()
    return stack if not current or stack[-1:] == [current] else [*stack, current]


def _read_move(store: Storage, number: int) -> Move:
    return read_record(store, Move, _move_path(number))


def _move_path(number: int) -> str:
    return append_log.entry_path(MOVES, number)
