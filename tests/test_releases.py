"""CURRENT moves in one step, in one order, survives a kill at any point, and can be taken back."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headtail.adapters.storage import Storage, open_storage
from headtail.cache.manifest import SnapshotManifest, manifest_path, mark_path, require_snapshot
from headtail.core.errors import HeadtailError, InputError, StorageError
from headtail.core.task import Task
from headtail.releases import lookup, release
from headtail.releases.release import Release
from test_cache import answers, good, publish


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """All of this is done on disk and on S3 (moto's server stands in for it)."""
    return open_storage(str(tmp_path / "store") if request.param == "local" else request.getfixturevalue("s3_root"))


def make(store: Storage, tmp_path: Path, task: Task, name: str, **options: str) -> Release:
    """A release whose snapshot holds one answer, to the query `name`."""
    _, manifest = publish(store, tmp_path, answers(good(name, '{"intent":"price"}')))
    return release.make_release(store, snapshot=manifest.id, task=task, **options)  # type: ignore[arg-type]


def test_nothing_is_live_until_promoted(store: Storage, tmp_path: Path, intent: Task) -> None:
    with pytest.raises(InputError, match="no release yet"):
        release.current_release(store)
    made = make(store, tmp_path, intent, "a")
    with pytest.raises(InputError, match="no release yet"):
        release.load_release(store)
    assert release.promote(store, made.id) == made
    assert release.current_release(store) == release.load_release(store, made.id) == made
    assert store.read("CURRENT") == made.id.encode()


def test_the_same_parts_are_the_same_release_written_once(store: Storage, tmp_path: Path, intent: Task, segmentation: Task) -> None:
    first = make(store, tmp_path, intent, "a")
    release.promote(store, first.id)
    assert make(store, tmp_path, intent, "a") == first  # also `created` and `previous`: the file was not written again
    others = [
        make(store, tmp_path, intent, "b"),
        make(store, tmp_path, intent, "a", student="distill/1"),
        make(store, tmp_path, intent, "a", note="x"),
        make(store, tmp_path, segmentation, "a"),
    ]
    assert len({first.id, *(other.id for other in others)}) == 5
    assert others[0].previous == first.id


def test_a_release_needs_its_snapshot_and_an_id_that_exists(store: Storage, intent: Task) -> None:
    with pytest.raises(StorageError, match="not in the store"):
        release.make_release(store, snapshot="0" * 16, task=intent)
    with pytest.raises(InputError, match="no such release"):
        release.promote(store, "feed")
    assert not store.exists("CURRENT")


def test_rollback_undoes_promotions_one_by_one(store: Storage, tmp_path: Path, intent: Task) -> None:
    a, b, c = (make(store, tmp_path, intent, name) for name in "abc")
    for one in (a, b, b, c, a):  # promoting what is current is no move
        release.promote(store, one.id)
    assert [release.rollback(store).id for _ in range(3)] == [c.id, b.id, a.id]
    with pytest.raises(InputError, match="no release to go back to"):
        release.rollback(store)
    assert release.current_release(store) == a
    assert release.promote(store, b.id) == b  # after a rollback the same release can be promoted again
    assert release.rollback(store) == a
    assert [(m.action, m.release) for m in release.move_history(store)][:4] == [("promote", x.id) for x in (a, b, c, a)]


def test_rollback_refuses_a_snapshot_that_is_gone(store: Storage, tmp_path: Path, intent: Task) -> None:
    a, b = (make(store, tmp_path, intent, name) for name in "ab")
    release.promote(store, a.id)
    release.promote(store, b.id)
    store.remove(f"snapshots/{a.snapshot}/manifest.json")
    with pytest.raises(StorageError, match="not in the store: it was collected or deleted") as told:
        release.rollback(store)
    assert "publish it again" in str(told.value)
    assert release.current_release(store) == b
    with pytest.raises(StorageError, match="not in the store"):
        release.promote(store, a.id)
    assert len(release.move_history(store)) == 2


@pytest.mark.parametrize("action", ["promote", "rollback"])
def test_killed_between_the_move_and_current(
    store: Storage, tmp_path: Path, intent: Task, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    a, b, c = (make(store, tmp_path, intent, name) for name in "abc")
    release.promote(store, a.id)
    release.promote(store, b.id)

    def killed(self: object, path: str, data: bytes) -> None:
        raise KeyboardInterrupt

    def act() -> Release:
        return release.promote(store, c.id) if action == "promote" else release.rollback(store)

    with monkeypatch.context() as patch:
        patch.setattr(type(store), "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            act()
    assert release.current_release(store) == b  # nothing half done is live
    assert act() == (c if action == "promote" else a)  # and doing it again finishes it, as one move
    assert len(release.move_history(store)) == 3
    assert release.current_release(store) == (c if action == "promote" else a)


def test_promotions_at_the_same_time_end_in_one_order(store: Storage, tmp_path: Path, intent: Task) -> None:
    made = [make(store, tmp_path, intent, f"q{i}") for i in range(8)]
    threads = [threading.Thread(target=release.promote, args=(store, one.id)) for one in made for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    moves = release.move_history(store)
    assert [m.number for m in moves] == list(range(1, len(moves) + 1))
    assert {m.release for m in moves} == {one.id for one in made}
    assert release.current_id(store) == moves[-1].release  # CURRENT is what the last move says


@settings(max_examples=30)
@given(steps=st.lists(st.sampled_from(["a", "b", "c", "back"]), max_size=12))
def test_moves_behave_as_a_stack(steps: list[str], tmp_path_factory: pytest.TempPathFactory, intent: Task) -> None:
    store = open_storage(str(tmp_path_factory.mktemp("store")))
    scratch = tmp_path_factory.mktemp("scratch")
    made = {name: make(store, scratch, intent, name).id for name in "abc"}
    stack: list[str] = []
    for step in steps:
        if step == "back" and len(stack) < 2:
            with pytest.raises(InputError):
                release.rollback(store)
        elif step == "back":
            stack.pop()
            assert release.rollback(store).id == stack[-1]
        else:
            release.promote(store, made[step])
            if stack[-1:] != [made[step]]:
                stack.append(made[step])
        assert release.current_id(store) == (stack[-1] if stack else "")


def test_the_task_travels_with_the_release(store: Storage, tmp_path: Path, intent: Task, segmentation: Task) -> None:
    for task in (intent, segmentation):
        copy = release.open_task(make(store, tmp_path, task, "a"))
        assert copy.fingerprint == task.fingerprint
        assert copy.score_fingerprint == task.score_fingerprint
        side = {name: ["one"] for name in task.side_inputs}
        assert copy.messages("pizza", side) == task.messages("pizza", side)
        assert copy.fallback("pizza") == task.fallback("pizza")
        assert copy.parse(copy.dump(copy.fallback("x")))[1] == ""


def test_lookup_says_where_an_answer_comes_from(store: Storage, tmp_path: Path, intent: Task) -> None:
    made = make(store, tmp_path, intent, "pizza price")
    release.promote(store, made.id)
    found = lookup.look_up(store, " Pizza  PRICE ", into=tmp_path)
    assert found["cached"]
    assert (found["answer"], found["source"], found["normalised"]) == ({"intent": "price"}, "teacher", "pizza price")
    assert (found["release"], found["snapshot"]) == (made.id, made.snapshot)
    missed = lookup.look_up(store, "nothing of the kind")
    assert not missed["cached"]
    assert missed["answer"] is None
    assert missed["normalised"] == "nothing of the kind"
    assert lookup.look_up(store, "Call +1 555-234-5678")["normalised"] == "call <phone>"


def test_a_snapshot_is_named_by_release_by_id_or_by_its_place(store: Storage, tmp_path: Path, intent: Task) -> None:
    a, b, c = (make(store, tmp_path, intent, name) for name in "abc")
    with pytest.raises(InputError, match="no release yet"):
        release.snapshot_of(store, "current")
    release.promote(store, a.id)
    with pytest.raises(InputError, match="no previous release"):
        release.snapshot_of(store, "previous")
    release.promote(store, b.id)
    release.promote(store, c.id)
    refs = ("current", "previous", a.id, a.snapshot)
    assert [release.snapshot_of(store, ref) for ref in refs] == [c.snapshot, b.snapshot, a.snapshot, a.snapshot]
    release.rollback(store)
    assert release.snapshot_of(store, "previous") == a.snapshot  # where the next rollback would go
    with pytest.raises(InputError, match="neither a release nor a snapshot"):
        release.snapshot_of(store, "feed")
    found = release.diff_references(store, "previous", "current")
    assert (found.before, found.after, found.added.rows, found.dropped.rows) == (a.snapshot, b.snapshot, 1, 1)


def test_a_snapshot_that_is_being_collected_is_not_made_current(
    store: Storage, tmp_path: Path, intent: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of the two looks first: the mark is seen before the move, or after it, and then the move is taken back."""
    a, b, c = (make(store, tmp_path, intent, name) for name in "abc")
    release.promote(store, a.id)
    release.promote(store, b.id)
    store.create(mark_path(c.snapshot), b"")
    with pytest.raises(StorageError, match="being collected") as told:
        release.promote(store, c.id)
    assert "headtail gc" in str(told.value)
    assert len(release.move_history(store)) == 2
    store.remove(mark_path(c.snapshot))
    looks = []

    def marked_at_second_look(which: Storage, snapshot: str) -> SnapshotManifest:
        looks.append(snapshot)
        if len(looks) == 2:
            store.create(mark_path(snapshot), b"")
        return require_snapshot(which, snapshot)

    with monkeypatch.context() as patch:
        patch.setattr(release, "require_snapshot", marked_at_second_look)
        with pytest.raises(StorageError, match="being collected"):
            release.promote(store, c.id)
    assert release.current_release(store) == b
    assert release.rollback(store) == a  # the move that was taken back is not in the way
    assert release.promote(store, b.id) == b


def test_an_edited_release_is_not_loaded(store: Storage, tmp_path: Path, intent: Task) -> None:
    """The id is made over the content: who edits a release, however well-formed, has made another."""
    made = make(store, tmp_path, intent, "a")
    path = f"releases/{made.id}.json"
    text = json.loads(store.read(path))
    changes: list[dict[str, object]] = [
        {"snapshot": "../../x"},
        {"snapshot": "0" * 16},
        {"student": "distill/other"},
        {"thresholds": {"teacher": 0.1}},
        {"evidence": {"evaluate": "evaluate/0a0a"}},
        {"task_copy": {**text["task_copy"], "template": "{% block user %}other{% endblock %}"}},
        {"id": "f" * 16},
    ]
    for change in changes:
        store.replace(path, json.dumps({**text, **change}).encode())
        with pytest.raises(HeadtailError, match=r"another id|one part of a path"):
            release.promote(store, made.id)
    for name in ("../releases/x", "/etc/passwd", "a/b"):
        with pytest.raises(InputError, match="not the id of a release"):
            release.load_release(store, name)
    store.replace(path, json.dumps({**text, "note": "", "created": "2031-01-01", "previous": "ab"}).encode())
    assert release.promote(store, made.id).id == made.id  # when it was made and after what is no part of it
    store.replace("CURRENT", b"../../x")
    with pytest.raises(InputError, match="not the id of a release"):
        release.current_release(store)


def test_an_edited_manifest_is_not_read(store: Storage, tmp_path: Path, intent: Task) -> None:
    made = make(store, tmp_path, intent, "a")
    path = manifest_path(made.snapshot)
    text = json.loads(store.read(path))
    for change in ({"lineage": ["precompute/other"]}, {"content": "0" * 32}, {"min_confidence": {"teacher": 0.9}}, {"id": "0" * 16}):
        store.replace(path, json.dumps({**text, **change}).encode())
        with pytest.raises(HeadtailError, match=r"another id|not below"):
            release.promote(store, made.id)


def test_a_release_of_an_older_version_is_refused(store: Storage, tmp_path: Path, intent: Task) -> None:
    made = make(store, tmp_path, intent, "a")
    release.promote(store, made.id)
    kept = json.loads(store.read(f"releases/{made.id}.json"))
    older = {("generation" if name == "snapshot" else name): value for name, value in kept.items() if name != "format"}
    store.replace(f"releases/{made.id}.json", json.dumps(older).encode())
    with pytest.raises(StorageError, match="this store was written by another version of headtail"):
        release.current_release(store)
