"""What is needed is never collected; what is collected is gone whole, whatever kills the collector where; on disk and on S3."""

from __future__ import annotations

import datetime
import io
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headtail.adapters.storage import LocalStorage, Storage, open_storage
from headtail.cache import collect, manifest, open_snapshot, publish_snapshot
from headtail.cache.builder import build_snapshot
from headtail.cache.collect import collection_table
from headtail.cache.manifest import mark_path
from headtail.core.errors import ConfigError, InputError, StorageError
from headtail.core.task import Task
from headtail.releases import garbage, lookup, release
from headtail.releases.release import Release
from test_cache import answers, good, kill_at, publish


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "store") if request.param == "local" else request.getfixturevalue("s3_root"))


def make(store: Storage, tmp_path: Path, task: Task, name: str) -> Release:
    """A release whose snapshot holds one answer, to the query `name`."""
    _, made = publish(store, tmp_path, answers(good(name, '{"intent":"price"}')))
    return release.make_release(store, snapshot=made.id, task=task)


def promoted(store: Storage, tmp_path: Path, task: Task, names: str) -> list[Release]:
    made = [make(store, tmp_path, task, name) for name in names]
    for one in made:
        release.promote(store, one.id)
    return made


def later(patch: pytest.MonkeyPatch, days: float) -> None:
    """From now on it is `days` later, for who asks how old something is."""
    moment = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
    for module in (collect, manifest):
        patch.setattr(module, "utc_now", lambda: moment)


def test_what_is_old_and_unneeded_goes_whole_and_the_rest_stays(
    store: Storage, tmp_path: Path, intent: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = promoted(store, tmp_path, intent, "abcdef")
    never = make(store, tmp_path, intent, "never promoted")
    assert garbage.collect_garbage(store, keep=2).gone == ()  # all of it is young
    later(monkeypatch, 15)
    young = make(store, tmp_path, intent, "young")
    plan = garbage.collect_garbage(store, keep=2, dry_run=True)
    assert {one.path.split("/")[1] for one in plan.gone} == {made[i].snapshot for i in range(3)} | {never.snapshot}
    sizes = [sum(ref.bytes for ref in manifest.read_manifest(store, one.path.split("/")[1]).files.values()) for one in plan.gone]
    assert plan.bytes == sum(sizes) > 0
    done = garbage.collect_garbage(store, keep=2)
    assert (done.gone, done.kept) == (plan.gone, plan.kept)
    assert not done.dry_run
    for one in (*made[:3], never):
        assert store.files(f"snapshots/{one.snapshot}") == []
    for one in (*made[3:], young):  # d: two rollbacks reach it; e, f: the last two; young: by its age
        assert open_snapshot(store, one.snapshot, tmp_path / one.snapshot).manifest.rows == 1
    assert "current" in done.kept[made[5].snapshot]
    assert "rollbacks reach" in done.kept[made[3].snapshot]
    assert "younger than 14 days" in done.kept[young.snapshot]
    assert garbage.collect_garbage(store, keep=2).gone == ()  # again: nothing to do


def test_rollbacks_within_the_promise_work_and_the_next_is_told(
    store: Storage, tmp_path: Path, intent: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = promoted(store, tmp_path, intent, "abcd")
    later(monkeypatch, 15)
    garbage.collect_garbage(store, keep=2)
    assert [release.rollback(store).id for _ in range(2)] == [made[2].id, made[1].id]
    with pytest.raises(StorageError, match="collected or deleted") as told:
        release.rollback(store)
    assert "publish it again" in str(told.value)
    assert release.current_release(store) == made[1]
    with pytest.raises(StorageError, match="collected or deleted"):
        release.promote(store, made[0].id)


def test_a_collected_snapshot_can_be_published_again(store: Storage, tmp_path: Path, intent: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    made = promoted(store, tmp_path, intent, "abc")
    later(monkeypatch, 15)
    garbage.collect_garbage(store, keep=1)
    assert not store.exists(f"snapshots/{made[0].snapshot}/manifest.json")
    again = make(store, tmp_path, intent, "a")
    assert again.id == made[0].id
    assert release.promote(store, again.id) == made[0]
    kept = garbage.collect_garbage(store, keep=1).kept
    assert again.snapshot in kept


STEPS = [("COLLECTING", False), ("COLLECTING", True), ("manifest.json", False), ("manifest.json", True), ("answers.parquet", True)]
STEPS += [("data.mdb", False), ("data.mdb", True)]


@pytest.mark.parametrize("step, after", STEPS)
def test_killed_anywhere_the_next_collection_goes_on(
    store: Storage, tmp_path: Path, intent: Task, monkeypatch: pytest.MonkeyPatch, step: str, after: bool
) -> None:
    """Also at once, without waiting for what is left to grow old."""
    made = promoted(store, tmp_path, intent, "abc")
    with monkeypatch.context() as patch:
        kill_at(patch, store, step, after)
        with pytest.raises(KeyboardInterrupt):
            garbage.collect_garbage(store, keep=1, days=0)
    gone = made[0].snapshot
    if store.exists(f"snapshots/{gone}/manifest.json"):  # whole, or it does not exist
        assert open_snapshot(store, gone, tmp_path / "x").lookup("a") is not None
    if store.exists(mark_path(gone)):
        with pytest.raises(StorageError, match="being collected"):
            publish(store, tmp_path, answers(good("a", '{"intent":"price"}')))
    assert store.exists(f"snapshots/{made[2].snapshot}/manifest.json")
    if (step, after) == ("COLLECTING", False):
        garbage.collect_garbage(store, keep=1, days=0)
    else:
        done = garbage.collect_garbage(store, keep=1, days=0, dry_run=True)
        assert [one.path for one in done.gone] == [f"snapshots/{gone}"]
        garbage.collect_garbage(store, keep=1, days=0)
    assert store.files(f"snapshots/{gone}") == []
    again = make(store, tmp_path, intent, "a")
    assert release.promote(store, again.id).snapshot == gone
    assert lookup.look_up(store, "a", into=tmp_path / "y")["cached"]


def test_a_mark_left_on_what_is_needed_again_is_taken_off(store: Storage, tmp_path: Path, intent: Task) -> None:
    (made,) = promoted(store, tmp_path, intent, "a")
    store.create(mark_path(made.snapshot), b"")
    assert garbage.collect_garbage(store, days=0).gone == ()
    assert not store.exists(mark_path(made.snapshot))


def test_who_begins_to_use_a_snapshot_before_the_mark_is_seen_keeps_it(
    store: Storage, tmp_path: Path, intent: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A promotion, then a publish, each between the collector's plan and its mark."""
    old, other, *_ = promoted(store, tmp_path, intent, "abcd")
    plain = type(store).create
    raced: set[str] = set()

    def racing(self: Storage, path: str, data: bytes) -> bool:
        if path == mark_path(old.snapshot) and path not in raced:
            raced.add(path)
            release.promote(store, old.id)
        if path == mark_path(other.snapshot) and path not in raced:
            raced.add(path)
            manifest.log_start(store, other.snapshot)
        return plain(self, path, data)

    later(monkeypatch, 15)
    with monkeypatch.context() as patch:
        patch.setattr(type(store), "create", racing)
        done = garbage.collect_garbage(store, keep=1)
    assert len(raced) == 2
    assert "is current" in done.kept[old.snapshot]
    assert "younger" in done.kept[other.snapshot]
    for one in (old, other):
        assert not store.exists(mark_path(one.snapshot))
        assert open_snapshot(store, one.snapshot, tmp_path / one.id).manifest.rows == 1


def test_a_publish_that_was_killed_is_swept_when_it_is_a_day_old(
    store: Storage, tmp_path: Path, intent: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    promoted(store, tmp_path, intent, "a")
    (folder := tmp_path / "half").mkdir()
    built = build_snapshot([[answers(good("half"))]], folder)
    with monkeypatch.context() as patch:
        kill_at(patch, store, "manifest.json", after=False)
        with pytest.raises(KeyboardInterrupt):
            publish_snapshot(store, built, task="t", task_fingerprint="f")
    done = garbage.collect_garbage(store, days=0)
    assert done.gone == ()
    assert "being published, or killed" in " ".join(done.kept.values())
    later(monkeypatch, 1.5)
    (gone,) = garbage.collect_garbage(store, dry_run=True).gone
    assert gone.what == "unfinished snapshot"
    assert gone.bytes == sum(one.bytes for one in store.files(gone.path)) > 0
    assert garbage.collect_garbage(store).gone == (gone,)
    assert store.files(gone.path) == []


def test_litter_of_killed_writers_is_swept(store: Storage, tmp_path: Path, intent: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    promoted(store, tmp_path, intent, "a")
    if isinstance(store, LocalStorage):
        Path(store.root, "plan").mkdir()
        Path(store.root, "plan", ".head.parquet.0123456789ab.tmp").write_bytes(b"1234")
        assert garbage.collect_garbage(store).gone == ()
    else:
        store._client.create_multipart_upload(Bucket=store._bucket, Key=store._key("plan/head.parquet"))  # type: ignore[attr-defined]
    later(monkeypatch, 1.5)
    (gone,) = garbage.collect_garbage(store).gone
    assert gone.what == "unfinished write"
    assert "head.parquet" in gone.path
    assert garbage.collect_garbage(store).gone == ()


def test_a_server_goes_on_with_a_snapshot_that_was_collected(tmp_path: Path, intent: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a local store it is mapped in place: the file lives until it is let go."""
    store = open_storage(str(tmp_path / "store"))
    made = promoted(store, tmp_path, intent, "abc")
    served = open_snapshot(store, made[0].snapshot)
    garbage.collect_garbage(store, keep=1, days=0)
    assert not served.folder.exists()
    assert served.lookup("a") is not None
    served.close()


def test_a_store_without_releases_and_one_from_before_the_log(store: Storage, tmp_path: Path, intent: Task) -> None:
    assert garbage.collect_garbage(store).gone == ()
    promoted(store, tmp_path, intent, "abc")
    for one in store.files("snapshots/log"):
        store.remove(one.path)
    done = garbage.collect_garbage(store, keep=1, days=0)
    assert len(done.gone) == 1  # known through the release it belongs to


def test_flags_that_would_take_what_is_live_are_refused(store: Storage) -> None:
    for keep, days in ((0, 14), (5, -1)):
        with pytest.raises(ConfigError, match="keep must be 1"):
            garbage.collect_garbage(store, keep=keep, days=days)


def test_people_see_what_goes_and_why_the_rest_stays(store: Storage, tmp_path: Path, intent: Task) -> None:
    from rich.console import Console

    made = promoted(store, tmp_path, intent, "abc")
    found = garbage.collect_garbage(store, keep=1, days=0, dry_run=True)
    shown_on = io.StringIO()
    Console(width=160, file=shown_on).print(collection_table(found))
    text = shown_on.getvalue()
    for shown in ("would go: snapshot", made[0].snapshot, "which is current", "0.000"):
        assert shown in text
    assert json.loads(found.model_dump_json())["dry_run"] is True


def undo_all(store: Storage, stack: list[str]) -> None:
    """Roll back until that cannot be done."""
    while True:
        release.rollback(store)
        stack.pop()


@settings(max_examples=15)
@given(steps=st.lists(st.sampled_from(["a", "b", "c", "d", "back", "gc1", "gc2"]), max_size=14))
def test_no_order_of_moves_and_collections_loses_what_rollback_may_reach(
    steps: list[str], tmp_path_factory: pytest.TempPathFactory, intent: Task
) -> None:
    """The model: a stack of promotions; after a collection with keep=n, the n below the top still exist."""
    store = open_storage(str(tmp_path_factory.mktemp("store")))
    scratch = tmp_path_factory.mktemp("scratch")
    stack: list[str] = []
    sure = 0  # rollbacks that must work
    for step in steps:
        if step == "back":
            if sure:
                stack.pop()
                assert release.rollback(store).id == stack[-1]
                sure -= 1
            else:
                with pytest.raises((InputError, StorageError)):  # nothing below, or it was collected
                    undo_all(store, stack)
        elif step.startswith("gc"):
            garbage.collect_garbage(store, keep=int(step[2]), days=0)
            sure = min(sure, int(step[2]))
        else:
            made = make(store, scratch, intent, step).id
            if stack[-1:] != [made]:
                release.promote(store, made)
                sure = sure + 1 if stack else 0
                stack.append(made)
        if stack:
            live = release.current_release(store)
            assert live.id == stack[-1]
            assert open_snapshot(store, live.snapshot).manifest.rows == 1
