"""A diff of two snapshots says what a dictionary would, for any rows; on disk and on S3."""

from __future__ import annotations

import io
import time
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headtail.adapters.storage import Storage, open_storage
from headtail.cache import SnapshotManifest, merge, publish_snapshot
from headtail.cache.builder import build_snapshot
from headtail.cache.diff import KINDS, SnapshotDiff, diff_snapshots, diff_table
from headtail.core.errors import StorageError
from headtail.core.keys import fingerprint, normalise
from test_cache import answers, good
from timescale import limit


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "store") if request.param == "local" else request.getfixturevalue("s3_root"))


Held = dict[str, tuple[str, str, int]]  # query -> answer, source, count


def snapshot(store: Storage, scratch: Path, held: Held, coverage: float | None = None) -> SnapshotManifest:
    tables = [answers(good(q, a, source), count=count) for q, (a, source, count) in held.items()]
    together = pa.concat_tables([answers(), *tables]).sort_by("query_key")
    (folder := scratch / f"build-{len(list(scratch.iterdir()))}").mkdir()
    built = build_snapshot([[together]], folder)
    return publish_snapshot(store, built, task="t", task_fingerprint=fingerprint(str(folder)), coverage=coverage)


def test_each_kind_with_its_traffic_sources_and_examples(store: Storage, tmp_path: Path) -> None:
    old: Held = {
        "same": ('"s"', "teacher", 50),
        "same by another": ('"s"', "teacher", 10),
        "gone": ('"g"', "batch_student", 7),
        "better": ('"b"', "batch_student", 20),
        "also better": ('"b"', "batch_student", 3),
    }
    new: Held = {
        "same": ('"s"', "teacher", 60),
        "same by another": ('"s"', "batch_student", 10),
        "come": ('"c"', "teacher", 5),
        "better": ('"B"', "teacher", 20),
        "also better": ('"B"', "teacher", 4),
    }
    a, b = snapshot(store, tmp_path, old), snapshot(store, tmp_path, new)
    found = diff_snapshots(store, a.id, b.id, examples=1)
    assert (found.rows_before, found.rows_after) == (5, 5)
    assert (found.traffic, found.of_log) == (60 + 10 + 5 + 20 + 4 + 7, False)
    assert {kind: (getattr(found, kind).rows, getattr(found, kind).events) for kind in KINDS} == {
        "added": (1, 5),
        "dropped": (1, 7),
        "changed": (2, 24),
        "same": (2, 70),
    }
    assert found.same.by_source == {"teacher": 1, "teacher -> batch_student": 1}
    assert found.changed.by_source == {"batch_student -> teacher": 2}
    assert found.changed.share == 24 / 106
    (example,) = found.changed.examples  # the most frequent
    assert example.model_dump() == {"query": "better", "count": 20, "before": '"b"', "after": '"B"', "source": "batch_student -> teacher"}
    assert [(one.query, one.before, one.after) for one in found.dropped.examples] == [("gone", '"g"', None)]
    assert [(one.query, one.before, one.after) for one in found.added.examples] == [("come", None, '"c"')]
    assert found.same.examples == ()
    assert SnapshotDiff.model_validate_json(found.model_dump_json()) == found


def test_shares_are_of_the_log_when_its_coverage_is_known(store: Storage, tmp_path: Path) -> None:
    a = snapshot(store, tmp_path, {"a": ('"1"', "teacher", 40), "x": ('"1"', "teacher", 10)})
    b = snapshot(store, tmp_path, {"a": ('"2"', "teacher", 40)}, coverage=0.4)
    found = diff_snapshots(store, a.id, b.id)
    assert (found.traffic, found.of_log) == (100, True)
    assert (found.changed.share, found.dropped.share, found.added.share) == (0.4, 0.1, 0.0)


def test_a_snapshot_with_itself_and_with_an_empty_one(store: Storage, tmp_path: Path) -> None:
    a, none = snapshot(store, tmp_path, {"a": ('"1"', "teacher", 2)}), snapshot(store, tmp_path, {})
    assert diff_snapshots(store, a.id, a.id).same.rows == 1
    assert diff_snapshots(store, none.id, a.id).added.rows == 1
    assert diff_snapshots(store, a.id, none.id).dropped.rows == 1
    nothing = diff_snapshots(store, none.id, none.id)
    assert (nothing.traffic, nothing.same.share) == (0, None)
    with pytest.raises(StorageError, match="not in the store"):
        diff_snapshots(store, a.id, "0" * 16)


words = st.text(st.sampled_from("abc"), min_size=1, max_size=3).map(normalise)
holdings = st.dictionaries(
    words, st.tuples(st.sampled_from(['"1"', '"2"']), st.sampled_from(["teacher", "batch_student"]), st.integers(0, 9))
)


@settings(max_examples=50)
@given(old=holdings, new=holdings, batch=st.integers(1, 5), examples=st.integers(1, 4))
def test_any_two_snapshots_as_a_dictionary_has_it(
    old: Held, new: Held, batch: int, examples: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    scratch = tmp_path_factory.mktemp("scratch")
    store = open_storage(str(tmp_path_factory.mktemp("store")))
    a, b = snapshot(store, scratch, old), snapshot(store, scratch, new)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge, "BATCH_ROWS", batch)
        found = diff_snapshots(store, a.id, b.id, examples)
    wanted = {
        "added": {q: new[q][2] for q in new.keys() - old.keys()},
        "dropped": {q: old[q][2] for q in old.keys() - new.keys()},
        "changed": {q: new[q][2] for q in old.keys() & new.keys() if old[q][0] != new[q][0]},
        "same": {q: new[q][2] for q in old.keys() & new.keys() if old[q][0] == new[q][0]},
    }
    for kind, counts in wanted.items():
        part = getattr(found, kind)
        assert (part.rows, part.events) == (len(counts), sum(counts.values()))
        assert sum(part.by_source.values()) == part.rows
        first = sorted(counts, key=lambda q: (-counts[q], q))[: examples if kind != "same" else 0]
        assert [one.query for one in part.examples] == first
        for one in part.examples:
            assert (one.before, one.after) == (old.get(one.query, (None,))[0], new.get(one.query, (None,))[0])


def test_people_see_counts_shares_and_examples(store: Storage, tmp_path: Path) -> None:
    from rich.console import Console

    a = snapshot(store, tmp_path, {"pizza": ('"old"', "batch_student", 3)})
    b = snapshot(store, tmp_path, {"pizza": ('"new"', "teacher", 3), "[bold]burger": ('"x"', "teacher", 1)})
    shown_on = io.StringIO()
    Console(width=160, file=shown_on).print(diff_table(diff_snapshots(store, a.id, b.id)))
    text = shown_on.getvalue()
    for shown in ("changed", "75.00%", "student -> teacher 1", '"old"', '"new"', "[bold]burger", a.id, b.id):
        assert shown in text


def test_many_rows_take_seconds_not_minutes(tmp_path: Path) -> None:
    store = open_storage(str(tmp_path / "store"))
    tables = [answers(*(good(f"q{i}", f'"{i % share}"') for i in range(30_000))) for share in (7, 8)]
    ids: list[str] = []
    for table in tables:
        (folder := tmp_path / f"b{len(ids)}").mkdir()
        ids.append(publish_snapshot(store, build_snapshot([[table]], folder), task="t", task_fingerprint="f").id)
    started = time.monotonic()
    found = diff_snapshots(store, ids[0], ids[1])
    assert time.monotonic() - started < limit(3)
    assert found.same.rows + found.changed.rows == 30_000
    assert found.same.rows == sum(i % 7 == i % 8 for i in range(30_000))
