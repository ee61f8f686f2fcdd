"""A generation holds exactly the right rows, in order, whatever the partitioning; a lookup is never wrong."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from pathlib import Path

import lmdb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headtail import cache as cache_module
from headtail.cache import Built, Cache, Manifest, coverage, open_generation, publish_generation, read_manifest
from headtail.cache.builder import build_generation
from headtail.errors import InputError, StorageError
from headtail.keys import normalise, query_key
from headtail.rows import ANSWER, CACHED
from headtail.storage import Storage, open_storage, read_table

Row = tuple[str, str, str, float | None, str]  # query, answer, state, confidence, source


def answers(*rows: Row, count: int = 1) -> pa.Table:
    """ANSWER rows."""
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
                "withheld": False,
                "source": source,
                "model": "m",
            }
            for query, answer, state, confidence, source in rows
        ],
        schema=ANSWER,
    )


def good(query: str, answer: str = '{"a":1}', source: str = "teacher", confidence: float | None = 0.9) -> Row:
    return query, answer, "answered", confidence, source


def publish(store: Storage, tmp_path: Path, *tables: pa.Table, **options: object) -> tuple[Built, Manifest]:
    folder = tmp_path / f"build-{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    built = build_generation([[table] for table in tables], folder, **options)  # type: ignore[arg-type]
    return built, publish_generation(store, built, task="t", task_fingerprint="f")


def test_lookup_normalises_and_returns_what_was_published(store: Storage, tmp_path: Path) -> None:
    _, manifest = publish(store, tmp_path, answers(good("pizza near me", '{"label":"topic","text":"é"}'), good("bar", confidence=None)))
    opened = open_generation(store, manifest.id)
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
        good("h", source="student", confidence=0.1),  # no minimum for the student
    )
    built, manifest = publish(store, tmp_path, table, min_confidence={"teacher": 0.5, "student": 0.0})
    assert built.left_out == {"truncated": 1, "invalid": 1, "failed": 1, "unconfident": 2}
    assert sorted(read_table(store, manifest.files["answers"].path).column("query").to_pylist()) == ["a", "f", "h"]
    assert manifest.rows + sum(manifest.left_out.values()) == table.num_rows
    assert manifest.rows_by_source == {"student": 1, "teacher": 2}


def test_first_stream_wins_but_only_with_an_answer_that_may_be_published(store: Storage, tmp_path: Path) -> None:
    teacher = answers(good("a", '"T"'), ("b", "", "invalid", None, "teacher"), good("c", '"T"', confidence=0.1))
    student = answers(*(good(q, '"S"', "student") for q in "abcd"))
    built, manifest = publish(store, tmp_path, teacher, student, min_confidence={"teacher": 0.5})
    opened = open_generation(store, manifest.id)
    assert [(opened.get(q) or pytest.fail(q)).answer for q in "abcd"] == ['"T"', '"S"', '"S"', '"S"']
    assert built.left_out == {"invalid": 1, "unconfident": 1, "duplicate": 1}


def test_a_hash_collision_is_a_miss(store: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, manifest = publish(store, tmp_path, answers(good("pizza")))
    opened = open_generation(store, manifest.id)
    monkeypatch.setattr(cache_module, "query_key", lambda text: query_key("pizza"))  # every text has pizza's hash now
    assert opened.lookup("burger") is None
    assert opened.lookup("pizza") is not None


def test_two_texts_with_one_key_are_counted_as_a_collision(store: Storage, tmp_path: Path) -> None:
    table = answers(*(good(f"q{i}") for i in range(70)))
    queries = table.column("query").to_pylist()
    queries[69] = "another text"
    keys = table.column("query_key").to_pylist()
    keys[69] = keys[3]  # row 69 lies outside the sample on which keys are checked
    table = table.set_column(0, "query_key", pa.array(keys, pa.binary(16))).set_column(1, "query", pa.array(queries))
    built, manifest = publish(store, tmp_path, table)
    assert built.left_out == {"collision": 1}
    assert manifest.rows == 69


def test_personal_data_in_a_request_finds_the_redacted_query(store: Storage, tmp_path: Path) -> None:
    _, manifest = publish(store, tmp_path, answers(good("<email> login")))
    opened = open_generation(store, manifest.id)
    assert opened.lookup("Someone@Example.com login") is not None


words = st.text(min_size=1, max_size=12).map(normalise).filter(bool)


@settings(max_examples=40, deadline=None)
@given(
    teacher=st.lists(st.tuples(words, st.text(max_size=9), st.booleans()), max_size=40),
    student=st.lists(st.tuples(words, st.text(max_size=9), st.booleans()), max_size=40),
    partition_rows=st.integers(1, 50),
)
def test_any_rows_in_any_partitioning(
    teacher: list[tuple[str, str, bool]],
    student: list[tuple[str, str, bool]],
    partition_rows: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    streams = [
        [answers(*((q, repr(a), "answered" if ok else "failed", 0.5, name) for q, a, ok in part))]
        for name, part in (("teacher", teacher), ("student", student))
    ]
    wanted: dict[str, tuple[str, str]] = {}
    for name, part in (("teacher", teacher), ("student", student)):
        for q, a, ok in part:
            if ok:
                wanted.setdefault(q, (repr(a), name))
    built = [
        build_generation(streams, tmp_path_factory.mktemp("build"), expect=len(teacher) + len(student), partition_rows=rows)
        for rows in (partition_rows, 10_000)
    ]
    assert built[0].content == built[1].content  # how it was partitioned leaves no trace
    assert built[0].rows + sum(built[0].left_out.values()) == len(teacher) + len(student)
    store = open_storage(str(tmp_path_factory.mktemp("store")))
    opened = open_generation(store, publish_generation(store, built[0], task="t", task_fingerprint="f").id)
    found = {q: opened.get(q) for q in wanted}
    assert {q: (a.answer, a.source) for q, a in found.items() if a} == wanted
    keys = read_table(store, opened.manifest.files["answers"].path).column("query_key").to_pylist()
    assert keys == sorted(query_key(q) for q in wanted)
    opened.close()


def test_lmdb_and_parquet_hold_the_same_rows_in_the_same_order(store: Storage, tmp_path: Path) -> None:
    rows = [good(f"query {i}", '{"x":"' + "y" * (i % 5000) + '"}') for i in range(3000)]  # some values take whole pages
    _, manifest = publish(store, tmp_path, answers(*rows), expect=3000, partition_rows=500)
    table = read_table(store, manifest.files["answers"].path)
    assert table.schema == CACHED
    opened = open_generation(store, manifest.id)
    for row in table.select(["query", "answer"]).to_pylist():
        found = opened.get(row["query"])
        assert found is not None
        assert found.answer == row["answer"]
    with opened._env.handle.begin() as txn:
        assert list(txn.cursor().iternext(values=False)) == table.column("query_key").to_pylist()


def test_the_same_content_is_the_same_generation_and_other_lineage_another(store: Storage, tmp_path: Path) -> None:
    built, first = publish(store, tmp_path, answers(good("a"), good("b")))
    _, again = publish(store, tmp_path, answers(good("b"), good("a")))
    assert again == first  # order of arrival does not matter; the first manifest stands, with its date
    _, other = publish(store, tmp_path, answers(good("a"), good("b", '{"a":2}')))
    assert other.id != first.id
    assert read_manifest(store, first.id) == first
    assert built.content == first.content


def test_killed_before_the_manifest_means_no_generation(store: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "build"
    folder.mkdir()
    built = build_generation([[answers(good("a"))]], folder)

    def killed(self: object, path: str, data: bytes) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(store), "create", killed)
        with pytest.raises(KeyboardInterrupt):
            publish_generation(store, built, task="t", task_fingerprint="f")
    (half,) = (Path(store.root) / "generations").iterdir()
    with pytest.raises(StorageError, match="not in the store"):
        open_generation(store, half.name)
    _, manifest = publish(store, tmp_path, answers(good("a")))  # and the next attempt succeeds
    assert manifest.id == half.name
    assert open_generation(store, manifest.id).lookup("a") is not None


def test_wrong_key_unknown_source_and_missing_answer_are_refused(tmp_path: Path) -> None:
    table = answers(good("a"))
    (folder := tmp_path / "x").mkdir()
    with pytest.raises(InputError, match="not the key of its query"):
        build_generation([[table.set_column(1, "query", pa.array(["b"]))]], folder)
    with pytest.raises(InputError, match="unknown source"):
        build_generation([[answers(good("a", source="oracle"))]], folder)
    with pytest.raises(InputError, match="has no answer"):
        build_generation([[table.set_column(4, "answer", pa.array([None], pa.string()))]], folder)
    with pytest.raises(InputError, match="lacks column"):
        build_generation([[table.drop_columns(["state"])]], folder)


def test_an_empty_generation_opens_and_misses(store: Storage, tmp_path: Path) -> None:
    _, manifest = publish(store, tmp_path, answers())
    assert open_generation(store, manifest.id).lookup("a") is None
    assert manifest.rows == 0


def test_damage_is_told(store: Storage, tmp_path: Path) -> None:
    _, manifest = publish(store, tmp_path, answers(good("a")))
    path = Path(store.full(manifest.files["lmdb"].path))
    path.write_bytes(path.read_bytes()[:-4096])
    with pytest.raises(StorageError, match="does not match its manifest"):
        open_generation(store, manifest.id)
    with pytest.raises(StorageError, match="not in the store"):
        open_generation(store, "0" * 16)


def test_disk_full_is_told_and_leaves_nothing(store: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise lmdb.DiskError("mdb_txn_commit: No space left on device")

    (folder := tmp_path / "x").mkdir()
    monkeypatch.setattr("headtail.cache.builder.lmdb.open", full)
    with pytest.raises(StorageError, match="No space left") as told:
        build_generation([[answers(good("a"))]], folder)
    assert "TMPDIR" in str(told.value)
    assert not (Path(store.root) / "generations").exists()


def test_one_file_opened_twice_after_fork_and_after_pickling(store: Storage, tmp_path: Path) -> None:
    _, manifest = publish(store, tmp_path, answers(good("a")))
    first, second = open_generation(store, manifest.id), open_generation(store, manifest.id)
    first.close()
    assert second.lookup("a") is not None
    assert pickle.loads(pickle.dumps(second)).lookup("a") == second.lookup("a")
    pid = os.fork()  # as a pre-forking server does
    if pid == 0:
        os._exit(0 if second.lookup("a") is not None and open_generation(store, manifest.id).lookup("b") is None else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert second.lookup("a") is not None
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_remote, (second,)) is True


def _remote(opened: Cache) -> bool:
    return opened.lookup("a") is not None


def test_a_mapped_generation_survives_the_replacement_of_its_file(store: Storage, tmp_path: Path) -> None:
    _, manifest = publish(store, tmp_path, answers(good("a")))
    opened = open_generation(store, manifest.id)
    store.replace(manifest.files["lmdb"].path, b"rubbish")
    assert opened.lookup("a") is not None


def test_a_network_mount_is_copied_before_it_is_mapped(store: Storage, tmp_path: Path) -> None:
    _, manifest = publish(store, tmp_path, answers(good("a")))
    (local := tmp_path / "local").mkdir()
    opened = open_generation(store, manifest.id, into=local)
    assert opened.folder.is_relative_to(local)
    assert opened.lookup("a") is not None
    assert store.exists(manifest.files["lmdb"].path)  # copied, not moved
    assert sorted(p.name for p in (opened.folder / "lmdb").iterdir()) == ["data.mdb"]


def test_coverage_counts_events_of_the_log(tmp_path: Path) -> None:
    (folder := tmp_path / "x").mkdir()
    built = build_generation([[answers(*(good(f"q{i}") for i in range(100)))]], folder)
    log = pa.table({"query_key": pa.array([query_key(f"q{i}") for i in range(200)], pa.binary(16)), "count": list(range(200))})
    assert coverage(built.prefixes, log.to_batches(max_chunksize=17)) == sum(range(100)) / sum(range(200))
    assert coverage(np.empty(0, np.uint64), [log]) == 0
    assert coverage(built.prefixes, []) is None


@pytest.mark.slow
def test_from_s3(s3_root: str, tmp_path: Path) -> None:
    store = open_storage(s3_root)
    _, manifest = publish(store, tmp_path, answers(good("a")))
    (local := tmp_path / "local").mkdir()
    opened = open_generation(store, manifest.id, into=local)
    assert opened.folder.is_relative_to(local)
    assert opened.lookup("A ") is not None
    store.replace(manifest.files["lmdb"].path, bytes(manifest.files["lmdb"].bytes))
    with pytest.raises(StorageError, match="SHA-256"):
        open_generation(store, manifest.id, into=tmp_path / "other")
