"""One suite for every store: what is done to it ends the same on disk, on S3, and on either while calls fail.

Each scenario is run once without faults. Then again for each kind of fault at each of its calls, and must end the same: on S3
without an error; on disk perhaps with a StorageError, after which the same is done once more. moto's server stands in for S3.
"""

from __future__ import annotations

import datetime
import errno
import gzip
import hashlib
import io
import itertools
import os
import random
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import csv

from headtail.adapters import append_log
from headtail.adapters.storage import Storage, local, open_storage, put, read_table, retries, s3, stream_table, write_once, write_table
from headtail.batch import remove_work_files
from headtail.batch.prepare import prepare_input, read_shard
from headtail.cache import LocalSnapshot, publish_snapshot
from headtail.core.errors import StorageError
from headtail.core.keys import sha256_file
from headtail.core.task import Task
from headtail.releases import release
from headtail.stages.ingest import files, logfile
from null_jobs import maker, planned
from s3_proxy import TRANSIENT, Proxy

Scenario = Callable[[Storage, Path], Any]
_roots = itertools.count()


def operations(store: Storage, tmp: Path) -> Any:
    """Every operation that a store has, but for uploads in parts."""
    store.replace("a", b"one")
    store.replace("a", b"two")
    seen: list[Any] = [store.read("a"), store.size("a"), store.exists("a"), store.exists("b")]
    seen += [store.create("made", b"1"), store.create("made", b"2"), store.read("made")]
    (tmp / "f").write_bytes(b"file")
    ref = put(store, tmp / "f", "folder/f")
    seen += [ref.sha256, store.fetch("folder/f", tmp / "fetched").read_bytes(), [one.path for one in store.files("folder")]]
    store.remove("made")
    store.remove("made")
    return [*seen, store.exists("made"), (tmp / "f").exists()]


def log(store: Storage, tmp: Path) -> Any:
    """Two writers of one log, one of which is late."""
    append_log.append_entry(store, "log", lambda number: b'{"by": "a"}')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(append_log, "last_number", lambda *_: 0)  # it looked before the first had written
        append_log.append_entry(store, "log", lambda number: b'{"by": "b"}')
    append_log.append_entry(store, "log", lambda number: b'{"by": "c"}')
    return append_log.last_number(store, "log"), list(append_log.read_entries(store, "log"))


def manifest(store: Storage, tmp: Path) -> Any:
    """A snapshot published twice: files first, manifest last, once."""
    for _ in range(2):
        folder = tmp / "built"
        folder.mkdir(exist_ok=True)
        (folder / "answers.parquet").write_bytes(b"answers")
        (folder / "data.mdb").write_bytes(b"lmdb")
        built = LocalSnapshot(folder / "answers.parquet", folder, {"teacher": 1}, {}, ("q",), "content", np.zeros(1, np.uint64))
        made = publish_snapshot(store, built, task="t", task_fingerprint="f")
    held = {name: store.read(ref.path) for name, ref in made.files.items()}
    begun = [entry["snapshot"] for _, entry in append_log.read_entries(store, "snapshots/log")]
    return made.id, held, set(begun), write_once(store, "x", b"1"), write_once(store, "x", b"2")


def pointer(store: Storage, tmp: Path) -> Any:
    """Two promotions and a rollback."""
    for name in ("a" * 16, "b" * 16):
        made = release.make_release(store, snapshot=_snapshot(store, name), task=POINTED[0])
        release.promote(store, made.id)
    release.rollback(store)
    moves = [(move.number, move.action, move.release, move.before) for move in release.move_history(store)]
    return release.current_id(store), moves


def _snapshot(store: Storage, name: str) -> str:
    from headtail.cache import SnapshotManifest
    from headtail.cache.manifest import manifest_path

    def manifest(identity: str) -> SnapshotManifest:
        files = {file: {"path": f"snapshots/{identity}/{file}", "bytes": 0, "sha256": "0" * 64} for file in ("answers", "lmdb")}
        return SnapshotManifest.model_validate(
            {"id": identity, "task": "t", "task_fingerprint": "f", "rows": 0, "rows_by_source": {}, "left_out": {}, "min_confidence": {}}
            | {"content": name, "files": files, "created": "2030-01-01T00:00:00+00:00"}
        )

    made = manifest(manifest(name).own_id)
    store.create(manifest_path(made.id), made.model_dump_json().encode())
    return made.id


WRITES = ("put", "create", "delete")
LATER = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=2)
POINTED: list[Task] = []
SCENARIOS: tuple[Scenario, ...] = (operations, log, manifest, pointer)


@pytest.fixture(autouse=True)
def _task(intent: Task) -> None:
    POINTED[:] = [intent]


@pytest.fixture(scope="module")
def proxy(_moto: str) -> Iterator[Proxy]:
    """A proxy before moto's server; boto is pointed at it and waits little."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retries, "FIRST_DELAY_S", 0.001)
        patch.setattr(retries, "TIMEOUT_S", 0.2)
        patch.setattr(retries, "ATTEMPTS", 3)
        made = Proxy(_moto, silence_s=0.4)
        import boto3

        boto3.client("s3").create_bucket(Bucket="conformance")
        patch.setenv("AWS_ENDPOINT_URL", made.url)
        s3._s3.cache_clear()
        yield made
        made.close()
        s3._s3.cache_clear()


def fresh(kind: str, tmp_path: Path) -> tuple[Storage, Path]:
    """A new store and a folder for local files."""
    number = next(_roots)
    tmp = tmp_path / str(number)
    tmp.mkdir()
    return open_storage(str(tmp / "store") if kind == "local" else f"s3://conformance/{number}"), tmp


def first_of_each(fault: str, *calls: str) -> Callable[[str, int], str]:
    """Each call (of these kinds, if any are named) meets `fault` at its first attempt, and passes at its second."""
    return lambda call, nth: fault if nth % 2 == 0 and (not calls or call in calls) else ""


def once(fault: str, call: str, nth: int) -> str:
    return "" if nth else fault


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda one: one.__name__)
def test_s3_ends_as_the_disk_does_though_each_call_fails_once(scenario: Scenario, proxy: Proxy, tmp_path: Path) -> None:
    expected = scenario(*fresh("local", tmp_path))
    for fault in ("", *TRANSIENT):
        if scenario is pointer and fault not in ("", "409", "reset after", "silence after"):
            continue  # many calls, no new kinds of them
        silent = ("create",) if scenario is pointer else WRITES  # silence costs time, and says nothing new of reads
        proxy.reset(first_of_each(fault, *(silent if fault == "silence after" else ())))
        assert scenario(*fresh("s3", tmp_path)) == expected, f"{fault}: {proxy.calls}"
    proxy.reset(first_of_each("412", "create"))  # it says that there is one, and there is none
    assert scenario(*fresh("s3", tmp_path)) == expected
    proxy.reset(lambda call, nth: "409 for 412")  # and a store that says 409 for good
    assert scenario(*fresh("s3", tmp_path)) == expected


@pytest.mark.parametrize("scenario", [log, manifest, pointer], ids=lambda one: one.__name__)
def test_a_listing_is_never_the_truth(scenario: Scenario, proxy: Proxy, tmp_path: Path) -> None:
    proxy.reset(lambda call, nth: "stale listing")
    assert scenario(*fresh("s3", tmp_path)) == scenario(*fresh("local", tmp_path))


PARTS = ("start upload", "upload part", "complete upload")


def test_uploads_in_parts_survive_each_fault(proxy: Proxy, tmp_path: Path) -> None:
    data = random.Random(1).randbytes(9 << 20)
    for fault in TRANSIENT:
        store, tmp = fresh("s3", tmp_path)
        proxy.reset(first_of_each(fault, *(PARTS if fault != "truncated" else ("get",))))
        (tmp / "f").write_bytes(data)
        ref = put(store, tmp / "f", "f")
        assert sha256_file(store.fetch("f", tmp / "fetched")) == ref.sha256, fault
        assert not (tmp / "f").exists()
        assert set(PARTS) <= set(proxy.calls)
        proxy.reset()


def test_tables_are_read_though_calls_fail(proxy: Proxy, tmp_path: Path) -> None:
    """Arrow reads them with a client of its own."""
    store, _ = fresh("s3", tmp_path)
    table = pa.table({"x": list(range(1000))})
    write_table(store, "t.parquet", table)
    for fault in ("429", "503", "reset before", "truncated"):
        proxy.reset(partial(once, fault))
        assert read_table(store, "t.parquet").equals(table), fault
        assert proxy.calls.count("head") >= 3, "no fault was met"
    proxy.reset(lambda call, nth: "403")
    for read in (read_table, lambda *args: list(stream_table(*args))):
        with pytest.raises(StorageError, match=r"ACCESS_DENIED|Forbidden") as error:
            read(store, "t.parquet")
        assert "s3:GetObject" in error.value.fix


def many(fault: str, first: int = 0) -> Callable[[str, int], str]:
    """Reads of one file meet a fault from the `first` on, more often than Arrow's own client tries."""
    return lambda call, nth: fault if call in ("get", "head", "list") and first <= nth < first + 2 * retries.ATTEMPTS else ""


def test_a_stream_that_meets_a_fault_midway_loses_no_row(proxy: Proxy, tmp_path: Path) -> None:
    proxy.reset()
    store, _ = fresh("s3", tmp_path)
    rows = np.random.default_rng(1).random(300_000)
    write_table(store, "t.parquet", [pa.table({"x": part}) for part in np.split(rows, 3)], pa.schema([("x", pa.float64())]))
    for first in range(4):
        for fault in ("429", "503", "truncated"):
            proxy.reset(many(fault, first))
            assert np.concatenate([batch["x"] for batch in stream_table(store, "t.parquet")]).tolist() == rows.tolist(), (fault, first)


def test_a_jobs_input_is_sorted_and_read_though_calls_fail(proxy: Proxy, segmentation: Task, tmp_path: Path) -> None:
    queries = [f"q{i}" for i in range(200)]
    for fault in ("", "429", "503", "truncated", "403"):
        proxy.reset()
        job = maker(fresh("s3", tmp_path)[0].root, segmentation)(planned(queries), shards=3)
        store, sorted_rows = open_storage(job.root), list[str]()
        proxy.reset(many(fault))
        if fault == "403":
            with pytest.raises(StorageError, match=r"403|Forbidden") as error:
                prepare_input(job)
            assert "s3:GetObject" in error.value.fix
            continue
        manifest = prepare_input(job)
        proxy.reset(many(fault))
        for shard in range(3):
            sorted_rows += read_shard(store, manifest, shard)["query"].to_pylist()
        assert sorted(sorted_rows) == sorted(queries), fault
        proxy.reset(first_of_each(fault and "429", "get", "list", "delete", "delete many"))
        remove_work_files(store, job)


LOG = b"query,user\n" + b"".join(b"pizza %d,u%d\n" % (i, i) for i in range(100))


def write_logs(store: Storage, tmp: Path) -> None:
    """One log in each kind of file, text also packed."""
    pq.write_table(csv.read_csv(io.BytesIO(LOG)), tmp / "a.parquet")
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("a.csv", LOG)
    files = {"a.csv": LOG, "a.csv.gz": gzip.compress(LOG), "a.csv.zst": pa.compress(LOG, "zstd", asbytes=True)}
    files |= {"a.csv.zip": packed.getvalue(), "a.parquet": (tmp / "a.parquet").read_bytes()}
    files |= {"a.jsonl": b"".join(b'{"query": "pizza %d", "user": "u%d"}\n' % (i, i) for i in range(100))}
    for name, data in files.items():
        store.replace(f"logs/{name}", data)


def test_logs_are_read_though_calls_fail(proxy: Proxy, tmp_path: Path) -> None:
    proxy.reset()
    store, tmp = fresh("s3", tmp_path)
    write_logs(store, tmp)
    expected = [b"pizza %d" % i for i in range(100)]
    for fault in ("", "429", "503", "truncated"):
        proxy.reset(many(fault))
        found = files.list_files(f"{store.root}/logs")
        assert (len(found.files), found.skipped) == (6, [])
        for file in found.files:
            proxy.reset(many(fault))
            assert logfile.log_digest(found.system, file) == hashlib.sha256(store.read(f"logs/{file.name}")).hexdigest()
            proxy.reset(many(fault))
            (part,) = logfile.split_log(found.system, [logfile.probe_file(found.system, file, "query")])
            tables = [sheet.table for sheet in logfile.read_split(found.system, part, logfile.ColumnSelection(("query",)))]
            cells = pa.concat_tables(tables)["query"].cast(pa.binary()).to_pylist()
            assert cells == expected, (file.name, fault)
    proxy.reset(lambda call, nth: "403")
    reads: list[Callable[[], Any]] = [lambda: files.list_files(f"{store.root}/logs"), lambda: files.list_files(f"{store.root}/logs/*.csv")]
    reads += [
        lambda: logfile.probe_file(found.system, file, "query"),
        lambda: list(logfile.read_split(found.system, part, logfile.ColumnSelection(("query",)))),
    ]
    for read in reads:
        with pytest.raises(StorageError, match=r"403|AccessDenied") as error:
            read()
        assert "s3:GetObject" in error.value.fix


def test_no_hard_links_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """exFAT, SMB and most FUSE mounts: Linux renames without overwriting there, which is one step too."""
    expected = [scenario(*fresh("local", tmp_path)) for scenario in SCENARIOS]
    for code in (errno.EPERM, errno.ENOTSUP):
        with monkeypatch.context() as patch:
            patch.setattr(os, "link", failing(code))
            assert [scenario(*fresh("local", tmp_path)) for scenario in SCENARIOS] == expected
            store, _ = fresh("local", tmp_path)
            with ThreadPoolExecutor(8) as pool:
                assert sum(pool.map(partial(store.create, "one"), [b"1", b"2", b"3", b"4"])) == 1
            patch.setattr(local, "_rename_new", lambda source, target: errno.EINVAL)
            with pytest.raises(StorageError, match="neither hard links nor") as error:
                store.create("two", b"")
            assert "--root" in error.value.fix
            assert not store.exists("two")
            assert store.litter(LATER) == []


def failing(code: int) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda one: one.__name__)
def test_a_full_disk_is_said_at_any_write_and_leaves_nothing_half(
    scenario: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, count = os.fsync, itertools.count()
    monkeypatch.setattr(os, "fsync", lambda handle: (next(count) and None) or plain(handle))
    scenario(*fresh("local", tmp_path))
    for number in range(next(count)):
        left = iter(range(number))
        monkeypatch.setattr(
            os, "fsync", lambda handle, left=left: plain(handle) if next(left, None) is not None else failing(errno.ENOSPC)()
        )
        store, tmp = fresh("local", tmp_path)
        with pytest.raises(StorageError, match="No space left") as error:
            scenario(store, tmp)
        assert "free space" in error.value.fix
        assert store.litter(LATER) == []
        assert all(store.size(one.path) for one in store.files(""))


CALLS: dict[str, Callable[[Storage, Path], Any]] = {
    "replace": lambda store, tmp: store.replace("a", b"1"),
    "create": lambda store, tmp: store.create("a", b"1"),
    "read": lambda store, tmp: store.read("a"),
    "exists": lambda store, tmp: store.exists("a"),
    "size": lambda store, tmp: store.size("a"),
    "put_file": lambda store, tmp: store.put_file(tmp, "a"),
    "fetch": lambda store, tmp: store.fetch("a", tmp.parent / "in"),
    "remove": lambda store, tmp: store.remove("a"),
    "files": lambda store, tmp: store.files("a"),
    "litter": lambda store, tmp: store.litter(LATER),
}


CURES = {"503": "AWS_ENDPOINT_URL", "reset before": "AWS_ENDPOINT_URL", "403": "s3:ListBucket", "301": "AWS_DEFAULT_REGION"}
CURES |= {"501": "AWS_REQUEST_CHECKSUM_CALCULATION=when_required"}


@pytest.mark.parametrize("fault", CURES)
def test_a_fault_that_stays_is_an_error_with_the_cure(fault: str, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "PATIENCE_S", 0.02)
    monkeypatch.setattr(retries, "STRANGER_PATIENCE_S", 0.02)
    for call in CALLS.values():
        store, tmp = fresh("s3", tmp_path)
        (tmp / "f").write_bytes(b"1")
        proxy.reset(lambda kind, nth: fault if kind != "head bucket" else "")
        with pytest.raises(StorageError, match="cannot") as error:
            call(store, tmp / "f")
        assert CURES[fault] in error.value.fix
        assert store.root in error.value.where
        assert (tmp / "f").exists()


def test_no_credentials_no_bucket_no_such_name(proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy.reset()
    with pytest.raises(StorageError, match="NoSuchBucket") as error:
        open_storage("s3://nobody-made-this/x").replace("a", b"1")
    assert "create the bucket" in error.value.fix
    with pytest.raises(StorageError, match="Invalid bucket name") as error:
        open_storage("s3://No Bucket/x").replace("a", b"1")
    assert "s3://bucket/prefix" in error.value.fix
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(retries, "STRANGER_PATIENCE_S", 0.02)
    with pytest.raises(StorageError, match="Could not connect") as error:
        open_storage("s3://conformance/x").read("a")
    assert "AWS_ENDPOINT_URL" in error.value.fix
    monkeypatch.setenv("AWS_ENDPOINT_URL", "nonsense")
    with pytest.raises(StorageError, match="nonsense"):
        open_storage("s3://conformance/x").read("a")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(StorageError, match="Unable to locate credentials") as error:
        open_storage("s3://conformance/x").exists("a")
    assert "AWS_ACCESS_KEY_ID" in error.value.fix


def test_a_store_that_ignores_conditions_is_never_trusted(proxy: Proxy, tmp_path: Path) -> None:
    store, _ = fresh("s3", tmp_path)
    proxy.reset()
    proxy.ignores_conditions = True
    for path in ("a", "b"):
        with pytest.raises(StorageError, match="ignores If-None-Match"):
            store.create(path, b"1")
        assert not store.exists(path)
    proxy.ignores_conditions = False
    assert store.create("a", b"1")


def test_a_store_that_refuses_new_checksums_works_unless_they_are_asked_for(
    proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy.reset()
    proxy.refuses_checksums = True
    assert operations(*fresh("s3", tmp_path)) == operations(*fresh("local", tmp_path))
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_supported")
    store, _ = fresh("s3", tmp_path)
    with pytest.raises(StorageError, match="NotImplemented") as error:
        store.replace("a", b"1")
    assert "AWS_REQUEST_CHECKSUM_CALCULATION=when_required" in error.value.fix


def test_amazons_own_endpoint_keeps_botos_checksums(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    found = open_storage("s3://bucket/x")._client.meta.config  # type: ignore[attr-defined]
    assert found.request_checksum_calculation == "when_supported"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://minio.example:9000")
    found = open_storage("s3://bucket/x")._client.meta.config  # type: ignore[attr-defined]
    assert found.request_checksum_calculation == "when_required"


def test_addresses_are_paths(proxy: Proxy, tmp_path: Path) -> None:
    """Most stores that speak S3 have no name in DNS for each bucket."""
    proxy.reset()
    operations(*fresh("s3", tmp_path))
    assert all(address.startswith("/conformance") for _, address in proxy.seen)
