"""A snapshot holds exactly the right rows, in order, however they come in batches; a lookup is never wrong."""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import pickle
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headtail.adapters import append_log
from headtail.adapters.storage import Storage, open_storage, read_table
from headtail.cache import (
    Cache,
    CachedAnswer,
    LocalSnapshot,
    SnapshotManifest,
    builder,
    merge,
    open_snapshot,
    publish_snapshot,
    read_manifest,
    snapshot_coverage,
)
from headtail.cache import snapshot as cache_module
from headtail.cache.builder import build_snapshot
from headtail.cache.lmdb_file import LmdbFile, Values
from headtail.cache.manifest import LOG
from headtail.core.errors import InputError, LedgerError, StorageError
from headtail.core.keys import canonical, normalise, query_key
from headtail.core.rows import ANSWER, CACHED, key_words

Row = tuple[str, str, str, float | None, str]  # query, answer, state, confidence, source


def answers(*rows: Row, count: int = 1) -> pa.Table:
    """ANSWER rows, in order of key as precompute leaves them; rows of one key stay in the order given."""
    return pa.Table.from_pylist(
        [
            {
                "query_key": query_key(query),
                "query": query,
                "answer_key": query_key(source + query),
                "state": state,
                "answer": answer if state == "answered" else None,
                "confidence": confidence,
                "finish_reason": "stop",
                "count": count,
                "stratum": "head",
                "eval_only": False,
                "source": source,
                "model": "m",
            }
            for query, answer, state, confidence, source in sorted(rows, key=lambda row: query_key(row[0]))
        ],
        schema=ANSWER,
    )


def cut(table: pa.Table, rows: int) -> list[pa.Table]:
    """The same rows as a stream of tables of `rows` rows."""
    return [table.slice(i, rows) for i in range(0, table.num_rows, rows)]


def good(query: str, answer: str = '{"a":1}', source: str = "teacher", confidence: float | None = 0.9) -> Row:
    return query, answer, "answered", confidence, source


@pytest.fixture(params=["local", "s3"])
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "store") if request.param == "local" else request.getfixturevalue("s3_root"))


def publish(store: Storage, tmp_path: Path, *tables: pa.Table, **options: object) -> tuple[LocalSnapshot, SnapshotManifest]:
    folder = tmp_path / f"build-{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    built = build_snapshot([[table] for table in tables], folder, **options)  # type: ignore[arg-type]
    return built, publish_snapshot(store, built, task="t", task_fingerprint="f")


def test_lookup_normalises_and_returns_what_was_published(store: Storage, tmp_path: Path) -> None:
    _, manifest = publish(store, tmp_path, answers(good("pizza near me", '{"label":"topic","text":"é"}'), good("bar", confidence=None)))
    opened = open_snapshot(store, manifest.id)
    found = opened.lookup("  PIZZA\u00a0 near\tme ")
    assert found is not None
    assert found._replace(confidence=None) == (
        "pizza near me",
        '{"label":"topic","text":"é"}',
        "teacher",
        None,
        query_key("teacherpizza near me"),
    )
    assert found.confidence == pytest.approx(0.9)
    bar = opened.lookup("bar")
    assert bar is not None
    assert bar.confidence is None  # unknown, not 0 and not NaN
    assert opened.lookup("pizza") is None
    assert opened.lookup("") is None
    assert len(opened) == 2


def test_only_answered_and_confident_rows_are_published_and_every_other_is_counted(store: Storage, tmp_path: Path) -> None:
    table = answers(
        good("a"),
        ("b", "", "truncated", 0.9, "teacher"),
        ("c", "", "invalid", None, "teacher"),
        ("d", "", "failed", None, "teacher"),
        good("e", confidence=0.49),
        good("f", confidence=0.5),
        good("g", confidence=None),
        good("h", source="batch_student", confidence=0.1),  # no minimum for the student
    )
    built, manifest = publish(store, tmp_path, table, min_confidence={"teacher": 0.5, "batch_student": 0.0})
    assert built.left_out == {"truncated": 1, "invalid": 1, "failed": 1, "unconfident": 1, "without_confidence.teacher": 1}
    assert sorted(read_table(store, manifest.files["answers"].path).column("query").to_pylist()) == ["a", "f", "h"]
    assert manifest.rows + sum(manifest.left_out.values()) == table.num_rows
    assert manifest.rows_by_source == {"batch_student": 1, "teacher": 2}


def test_first_stream_wins_but_only_with_an_answer_that_may_be_published(store: Storage, tmp_path: Path) -> None:
    teacher = answers(good("a", '"T"'), ("b", "", "invalid", None, "teacher"), good("c", '"T"', confidence=0.1))
    student = answers(*(good(q, '"S"', "batch_student") for q in "abcd"))
    built, manifest = publish(store, tmp_path, teacher, student, min_confidence={"teacher": 0.5})
    opened = open_snapshot(store, manifest.id)
    assert [(opened.get(q) or pytest.fail(q)).answer for q in "abcd"] == ['"T"', '"S"', '"S"', '"S"']
    assert built.left_out == {"invalid": 1, "unconfident": 1, "duplicate": 1}


def test_a_hash_collision_is_a_miss(store: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, manifest = publish(store, tmp_path, answers(good("pizza")))
    opened = open_snapshot(store, manifest.id)
    monkeypatch.setattr(cache_module, "query_key", lambda text: query_key("pizza"))  # every text has pizza's hash now
    assert opened.lookup("burger") is None
    assert opened.lookup("pizza") is not None


def test_two_texts_with_one_key_are_counted_as_a_collision(store: Storage, tmp_path: Path) -> None:
    table = answers(*(good(f"q{i}") for i in range(70)))
    keys = table.column("query_key").to_pylist()
    keys[69] = keys[68]  # row 69 lies outside the sample on which keys are checked
    table = table.set_column(0, "query_key", pa.array(keys, pa.binary(16)))
    built, manifest = publish(store, tmp_path, table)
    assert built.left_out == {"collision": 1}
    assert manifest.rows == 69


def test_redacted_queries_are_in_the_cache_only_when_they_may_share_an_answer(store: Storage, tmp_path: Path) -> None:
    table = answers(good("<email> login"), good("call <phone>"), good("<phone"), ("card <card>", "", "failed", None, "teacher"))
    built, manifest = publish(store, tmp_path, table)
    assert built.left_out == {"redacted": 2, "failed": 1}
    assert open_snapshot(store, manifest.id).lookup("Someone@Example.com login") is None
    _, manifest = publish(store, tmp_path, table, share_redacted=True)
    opened = open_snapshot(store, manifest.id)
    assert opened.lookup("Someone@Example.com login") is not None
    assert opened.lookup("call 5552345678") is not None


words = st.text(min_size=1, max_size=12).map(normalise).filter(bool)
offers = st.lists(st.tuples(words, st.text(max_size=9), st.sampled_from(["answered", "answered", "failed"])), max_size=40)


@settings(max_examples=60)
@given(parts=st.lists(offers, min_size=1, max_size=3), batch=st.integers(1, 9), piece=st.integers(1, 30), table=st.integers(1, 50))
def test_any_rows_in_any_batches(
    parts: list[list[tuple[str, str, str]]], batch: int, piece: int, table: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    names = ["teacher", "batch_student", "teacher"]
    tables = [answers(*((q, repr(a), state, 0.5, name) for q, a, state in part)) for name, part in zip(names, parts, strict=False)]
    wanted: dict[str, tuple[str, str]] = {}
    for name, part in zip(names, parts, strict=False):
        for q, a, state in part:
            if state == "answered":
                wanted.setdefault(q, (repr(a), name))
    whole = build_snapshot([[one] for one in tables], tmp_path_factory.mktemp("build"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge, "BATCH_ROWS", batch)
        patch.setattr(builder, "PIECE_ROWS", piece)
        built = build_snapshot([cut(one, table) for one in tables], tmp_path_factory.mktemp("build"))
    assert (built.content, built.left_out, built.examples) == (whole.content, whole.left_out, whole.examples)  # batches leave no trace
    assert built.rows + sum(built.left_out.values()) == sum(map(len, parts))
    store = open_storage(str(tmp_path_factory.mktemp("store")))
    opened = open_snapshot(store, publish_snapshot(store, built, task="t", task_fingerprint="f").id)
    found = {q: opened.get(q) for q in wanted}
    assert {q: (a.answer, a.source) for q, a in found.items() if a} == wanted
    keys = read_table(store, opened.manifest.files["answers"].path).column("query_key").to_pylist()
    assert keys == sorted(query_key(q) for q in wanted)
    opened.close()


@settings(max_examples=60)
@given(
    keys=st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), max_size=30), min_size=1, max_size=4), rows=st.integers(1, 7)
)
def test_rounds_hold_all_rows_of_a_key_in_order_of_key(keys: list[list[tuple[int, int]]], rows: int) -> None:
    """Also where keys share their first 8 bytes, which hashes never do."""
    tables = [pa.table({"query_key": pa.array([packed(k) for k in sorted(run)], pa.binary(16))}) for run in keys]
    met: list[bytes] = []
    seen: list[list[bytes]] = [[] for _ in tables]
    for pieces in merge.merge_rounds([merge.sorted_batches(cut(table, rows), "x") for table in tables]):
        here = [piece.column("query_key").to_pylist() if piece.num_rows else [] for piece in pieces]
        for run, some in zip(seen, here, strict=True):
            run.extend(some)
        together = sorted({key for some in here for key in some})
        assert not met or together[0] > met[-1]  # every row of a key is in one round
        met += together
        high, low = key_words(pa.array([key for some in here for key in some], pa.binary(16)))
        order, first = merge.merge_order(high, low)
        flat = [key for some in here for key in some]
        assert [flat[i] for i in order] == sorted(flat)
        assert [flat[i] for i in order[first]] == together
    assert seen == [table.column("query_key").to_pylist() for table in tables]


def packed(words: tuple[int, int]) -> bytes:
    return struct.pack(">QQ", *words)


def test_rows_out_of_order_are_refused_by_name_and_leave_no_snapshot(tmp_path: Path) -> None:
    table = answers(*(good(f"q{i}") for i in range(9)))
    for rows in (9, 2):  # within a table, and between tables
        (folder := tmp_path / f"x{rows}").mkdir()
        mixed = cut(table.take(pa.array([0, 1, 2, 3, 8, 4, 5, 6, 7])), rows)
        with pytest.raises(InputError, match="not in order of query_key") as told:
            build_snapshot([[answers(good("a"))], mixed], folder, labels=["precompute/aaaa", "precompute/bbbb"])
        assert "precompute/bbbb" in str(told.value)
        assert "run precompute again" in str(told.value)


def test_a_stream_is_read_as_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded because a table is let go once the next was asked for, whatever the number of tables."""
    monkeypatch.setattr(merge, "BATCH_ROWS", 100)
    monkeypatch.setattr(builder, "PIECE_ROWS", 100)
    ahead: list[int] = []
    written = 0

    class Watched(LmdbFile):
        def add(self, piece: pa.Table, values: Values) -> None:
            nonlocal written
            super().add(piece, values)
            written += piece.num_rows

    monkeypatch.setattr(builder, "LmdbFile", Watched)

    def stream(source: str) -> Iterator[pa.Table]:
        read = 0
        for table in cut(answers(*(good(f"q{i}", source=source) for i in range(3000))), 100):
            read += table.num_rows
            ahead.append(read - written)
            yield table

    built = build_snapshot([stream("teacher"), stream("batch_student")], tmp_path)
    assert (built.rows, built.left_out) == (3000, {"duplicate": 3000})
    assert max(ahead) <= 400


def test_lmdb_and_parquet_hold_the_same_rows_in_the_same_order(store: Storage, tmp_path: Path) -> None:
    rows = [good(f"query {i}", '{"x":"' + "y" * (i % 5000) + '"}') for i in range(3000)]  # some values take whole pages
    _, manifest = publish(store, tmp_path, answers(*rows))
    table = read_table(store, manifest.files["answers"].path)
    assert table.schema == CACHED
    opened = open_snapshot(store, manifest.id)
    for row in table.select(["query", "answer"]).to_pylist():
        found = opened.get(row["query"])
        assert found is not None
        assert found.answer == row["answer"]
    with opened._env.handle.begin() as txn:
        assert list(txn.cursor().iternext(values=False)) == table.column("query_key").to_pylist()


def test_the_same_content_is_the_same_snapshot_and_other_lineage_another(store: Storage, tmp_path: Path) -> None:
    built, first = publish(store, tmp_path, answers(good("a"), good("b")))
    _, again = publish(store, tmp_path, answers(good("b"), good("a")))
    assert again == first  # order of arrival does not matter; the first manifest stands, with its date
    _, other = publish(store, tmp_path, answers(good("a"), good("b", '{"a":2}')))
    assert other.id != first.id
    assert read_manifest(store, first.id) == first
    assert built.content == first.content


@pytest.mark.parametrize("step", ["log/", "answers.parquet", "data.mdb", "manifest.json"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_at_any_write_there_is_no_snapshot_until_its_manifest(
    any_store: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, after: bool
) -> None:
    table = answers(good("a"))
    with monkeypatch.context() as patch:
        kill_at(patch, any_store, step, after)
        with pytest.raises(KeyboardInterrupt):
            publish(any_store, tmp_path, table)
    begun = [entry["snapshot"] for _, entry in append_log.read_entries(any_store, LOG)]
    assert len(begun) == ((step, after) != ("log/", False))  # known before anything of it is written
    exists = (step, after) == ("manifest.json", True)
    for one in begun:
        assert any_store.exists(f"snapshots/{one}/manifest.json") == exists
    _, manifest = publish(any_store, tmp_path, table)  # the next attempt completes it
    assert {manifest.id, *begun} == {manifest.id}
    assert open_snapshot(any_store, manifest.id).lookup("a") is not None


def kill_at(patch: pytest.MonkeyPatch, store: Storage, step: str, after: bool, hit: list[str] | None = None) -> None:
    """From now on a write to a path that has `step` in it dies, before or after it was done."""

    def killing(plain: Callable[..., object], place: int) -> Callable[..., object]:
        def write(self: Storage, *arguments: Any) -> object:
            if step not in str(arguments[place]):
                return plain(self, *arguments)
            if after:
                plain(self, *arguments)
            if hit is not None:
                hit.append(str(arguments[place]))
            raise KeyboardInterrupt

        return write

    for name in ("replace", "create", "put_file", "remove"):
        patch.setattr(type(store), name, killing(getattr(type(store), name), 1 if name == "put_file" else 0))


def test_wrong_key_unknown_source_and_missing_answer_are_refused(tmp_path: Path) -> None:
    table = answers(good("a"))
    (folder := tmp_path / "x").mkdir()
    with pytest.raises(InputError, match="not the key of its query"):
        build_snapshot([[table.set_column(1, "query", pa.array(["b"]))]], folder)
    with pytest.raises(InputError, match="unknown source"):
        build_snapshot([[answers(good("a", source="oracle"))]], folder)
    with pytest.raises(InputError, match="has no answer"):
        build_snapshot([[table.set_column(4, "answer", pa.array([None], pa.string()))]], folder)
    with pytest.raises(InputError, match="lacks column"):
        build_snapshot([[table.drop_columns(["state"])]], folder)


def test_an_empty_snapshot_opens_and_misses(store: Storage, tmp_path: Path) -> None:
    _, manifest = publish(store, tmp_path, answers())
    assert open_snapshot(store, manifest.id).lookup("a") is None
    assert manifest.rows == 0


def test_damage_is_told(store: Storage, tmp_path: Path) -> None:
    _, manifest = publish(store, tmp_path, answers(good("a")))
    path = Path(store.full(manifest.files["lmdb"].path))
    path.write_bytes(path.read_bytes()[:-4096])
    with pytest.raises(StorageError, match="does not match its manifest"):
        open_snapshot(store, manifest.id)
    with pytest.raises(StorageError, match="not in the store"):
        open_snapshot(store, "0" * 16)


def test_disk_full_is_told_and_leaves_nothing(store: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise lmdb.DiskError("mdb_txn_commit: No space left on device")

    (folder := tmp_path / "x").mkdir()
    monkeypatch.setattr("headtail.cache.lmdb_file.lmdb.open", full)
    with pytest.raises(StorageError, match="No space left") as told:
        build_snapshot([[answers(good("a"))]], folder)
    assert "TMPDIR" in str(told.value)
    assert not (Path(store.root) / "snapshots").exists()


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MiB."""
    (place := tmp_path / "tiny").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs privileges that are not to be had here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_really_full(tiny_disk: Path, tmp_path: Path) -> None:
    """While building, and while moving what was built into the store: told, and what was there stays."""
    small, large = answers(good("a")), answers(*(good(f"q{i}", '"' + os.urandom(500).hex() + '"') for i in range(2000)))
    (full := tiny_disk / "build").mkdir()
    with pytest.raises(StorageError, match="No space left") as told:
        build_snapshot([[large]], full)
    assert "TMPDIR" in str(told.value)
    shutil.rmtree(full)
    store = open_storage(str(tiny_disk / "store"))
    _, kept = publish(store, tmp_path, small)
    (folder := tmp_path / "large").mkdir()
    built = build_snapshot([[large]], folder)
    with pytest.raises(StorageError, match="No space left"):
        publish_snapshot(store, built, task="t", task_fingerprint="f")
    assert open_snapshot(store, kept.id).lookup("a") is not None
    assert not store.litter(datetime.datetime.max.replace(tzinfo=datetime.UTC))
    subprocess.run(["mount", "-o", "remount,size=8m", str(tiny_disk)], check=True)  # space was freed: the same build is published
    assert open_snapshot(store, publish_snapshot(store, built, task="t", task_fingerprint="f").id).lookup("q7") is not None


def test_one_file_opened_twice_after_fork_and_after_pickling(store: Storage, tmp_path: Path) -> None:
    _, manifest = publish(store, tmp_path, answers(good("a")))
    first, second = open_snapshot(store, manifest.id), open_snapshot(store, manifest.id)
    first.close()
    assert second.lookup("a") is not None
    assert pickle.loads(pickle.dumps(second)).lookup("a") == second.lookup("a")
    pid = os.fork()  # as a pre-forking server does
    if pid == 0:
        os._exit(0 if second.lookup("a") is not None and open_snapshot(store, manifest.id).lookup("b") is None else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert second.lookup("a") is not None
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_remote, (second,)) is True


def _remote(opened: Cache) -> bool:
    return opened.lookup("a") is not None


def test_a_mapped_snapshot_survives_the_replacement_of_its_file(store: Storage, tmp_path: Path) -> None:
    _, manifest = publish(store, tmp_path, answers(good("a")))
    opened = open_snapshot(store, manifest.id)
    store.replace(manifest.files["lmdb"].path, b"rubbish")
    assert opened.lookup("a") is not None


def test_a_network_mount_is_copied_before_it_is_mapped(store: Storage, tmp_path: Path) -> None:
    _, manifest = publish(store, tmp_path, answers(good("a")))
    (local := tmp_path / "local").mkdir()
    opened = open_snapshot(store, manifest.id, into=local)
    assert opened.folder.is_relative_to(local)
    assert opened.lookup("a") is not None
    assert store.exists(manifest.files["lmdb"].path)  # copied, not moved
    assert sorted(p.name for p in (opened.folder / "lmdb").iterdir()) == ["data.mdb"]


def test_processes_share_a_copy_and_a_damaged_one_is_fetched_again(store: Storage, tmp_path: Path) -> None:
    _, manifest = publish(store, tmp_path, answers(good("a")))
    (local := tmp_path / "local").mkdir()
    data = open_snapshot(store, manifest.id, into=local).folder / "lmdb" / "data.mdb"
    first = data.stat().st_ino
    assert open_snapshot(store, manifest.id, into=local).lookup("a") is not None
    assert data.stat().st_ino == first  # not fetched twice
    data.write_bytes(bytes(data.stat().st_size))
    assert open_snapshot(store, manifest.id, into=local).lookup("a") is not None
    assert data.stat().st_ino != first


def test_coverage_counts_events_of_the_log(tmp_path: Path) -> None:
    (folder := tmp_path / "x").mkdir()
    built = build_snapshot([[answers(*(good(f"q{i}") for i in range(100)))]], folder)
    log = pa.table({"query_key": pa.array([query_key(f"q{i}") for i in range(200)], pa.binary(16)), "count": list(range(200))})
    assert snapshot_coverage(built.prefixes, log.to_batches(max_chunksize=17)) == sum(range(100)) / sum(range(200))
    assert snapshot_coverage(np.empty(0, np.uint64), [log]) == 0
    assert snapshot_coverage(built.prefixes, []) is None


def test_a_snapshot_is_opened_from_disk_and_from_s3(any_store: Storage, tmp_path: Path) -> None:
    _, manifest = publish(any_store, tmp_path, answers(good("a")))
    (local := tmp_path / "local").mkdir()
    opened = open_snapshot(any_store, manifest.id, into=local)
    assert opened.folder.is_relative_to(local)
    assert opened.lookup("A ") is not None
    any_store.replace(manifest.files["lmdb"].path, bytes(manifest.files["lmdb"].bytes))
    with pytest.raises(StorageError, match="SHA-256"):
        open_snapshot(any_store, manifest.id, into=tmp_path / "other")


def test_a_copy_from_s3_lives_as_long_as_its_cache(s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store = open_storage(s3_root)
    _, manifest = publish(store, tmp_path, answers(good("a")))
    opened = open_snapshot(store, manifest.id)
    folder = opened.folder
    assert opened.lookup("a") is not None
    pid = os.fork()
    if pid == 0:
        del opened  # in a child: the parent's copy stays
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert folder.is_dir()
    del opened
    assert not folder.exists()
    store.replace(manifest.files["lmdb"].path, b"damaged")
    with pytest.raises(StorageError, match="does not match its manifest"):
        open_snapshot(store, manifest.id)
    assert not list(tmp_path.glob("headtail-cache-*"))


def test_each_thread_look_log_up_for_itself(store: Storage, tmp_path: Path) -> None:
    _, manifest = publish(store, tmp_path, answers(*(good(f"q{i}", str(i)) for i in range(500))))
    opened = open_snapshot(store, manifest.id)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: opened.get(f"q{i % 500}"), range(4000)))
    assert [one and one.answer for one in found] == [str(i % 500) for i in range(4000)]
    opened.close()
    assert open_snapshot(store, manifest.id).get("q1") is not None


plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=4), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=100)
@given(value=plain_values)
def test_an_answer_is_decoded_as_json_does(value: object) -> None:
    answer = CachedAnswer("q", canonical(value), "teacher", None, b"")
    assert repr(answer.plain_answer()) == repr(json.loads(answer.answer))


def test_an_answer_nested_deeply_is_decoded_too() -> None:
    text = "[" * 400 + "]" * 400
    assert CachedAnswer("q", text, "teacher", None, b"").plain_answer() == json.loads(text)


def test_a_value_of_another_format_is_refused(store: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("headtail.cache.lmdb_file.FORMAT", 7)
        _, manifest = publish(store, tmp_path, answers(good("a")))
    with pytest.raises(StorageError, match="unknown format"):
        open_snapshot(store, manifest.id).get("a")
    for name in ("FORMAT", "NORMALISATION"):
        with monkeypatch.context() as patch:
            patch.setattr(f"headtail.cache.snapshot.{name}", 9)
            with pytest.raises(StorageError, match="another version of headtail"):
                open_snapshot(store, manifest.id)


def test_an_lmdb_file_that_lost_rows_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = LmdbFile.finish

    def lossy(self: LmdbFile) -> None:
        with self._env.begin(write=True) as txn:
            txn.delete(query_key("b"))
        plain(self)

    monkeypatch.setattr(LmdbFile, "finish", lossy)
    with pytest.raises(LedgerError, match="does not hold what was written"):
        build_snapshot([[answers(good("a"), good("b"))]], tmp_path)


def test_long_answers_and_queries_of_every_length(store: Storage, tmp_path: Path) -> None:
    rows = [good("q" * n, '"' + "y" * size + '"') for n, size in ((1, 0), (100, 2000), (1000, 4096), (70_000, 10), (3, 3_000_000))]
    _, manifest = publish(store, tmp_path, answers(*rows))
    opened = open_snapshot(store, manifest.id)
    for query, answer, *_ in rows:
        found = opened.get(query)
        assert found is not None
        assert found.answer == answer
    assert opened.get("q" * 99) is None


def test_the_map_grows_as_rows_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headtail.cache.lmdb_file._SPARE", 1 << 20)
    monkeypatch.setattr(builder, "PIECE_ROWS", 64)
    built = build_snapshot([[answers(*(good(f"q{i}", '"' + "z" * 20_000 + '"') for i in range(1000)))]], tmp_path)
    assert built.rows == 1000
    assert (built.lmdb / "data.mdb").stat().st_size > 20_000_000


def test_a_query_with_nul_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="NUL"):
        build_snapshot([[answers(good("a\0b"))]], tmp_path)
