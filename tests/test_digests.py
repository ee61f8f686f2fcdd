"""What is read is what was written: digests are looked at before bytes are used, everywhere, and not twice for nothing."""

from __future__ import annotations

import ast
import os
import time
from pathlib import Path

import pyarrow as pa
import pytest

import headtail
from conftest import keep
from headtail.adapters.storage import (
    Storage,
    check_digest,
    check_local,
    digests,
    open_storage,
    put,
    read_bytes,
    read_json,
    read_table,
    stream_table,
)
from headtail.adapters.storage import write_table as write
from headtail.adapters.storage.receipts import load_receipt, output_table
from headtail.cache import Cache, open_snapshot
from headtail.core.errors import HeadtailError, StorageError
from headtail.core.receipt import FileRef, Receipt
from test_cache import answers, good, publish

PACKAGE = Path(headtail.__file__).parent
NOT_CHECKED = {
    "batch/ledger.py": "it compares every row of the file with the job's input itself, and the size",
    "stages/precompute/dry_run/compare.py": "a forecast: the job reads the same files with their digests",
    "stages/precompute/dry_run/probe.py": "a forecast, as above",
    "batch/prepare.py": "a part has a CRC-32 per run of rows, looked at as each is read",
    "stages/report/page.py": "looks at the name of the file alone",
    "engines/models.py": "fetches, then compares the copy with the digest itself",
    "stages/distill/resume.py": "a mark found by listing has no digest; checkpoints have one each",
    "stages/distill/finish.py": "files that this very run has just written",
    "adapters/storage/digests.py": "the check itself",
    "adapters/storage/tables.py": "after the check",
    "cache/snapshot.py": "fetches, then opens the copy, which looks at its digest",
}


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "store") if request.param == "local" else request.getfixturevalue("s3_root"))


def change(store: Storage, path: str) -> None:
    """Another byte at the same length, as a store may rot or be written."""
    data = bytearray(store.read(path))
    data[len(data) // 2] ^= 1
    store.replace(path, bytes(data))


def test_a_changed_file_is_not_read_by_anyone_who_has_its_digest(store: Storage, tmp_path: Path) -> None:
    ref = write(store, "plan/ab/head.parquet", pa.table({"x": list(range(1000))}))
    local = tmp_path / "a.json"
    local.write_text('{"a": 1}')
    document = put(store, local, "plan/ab/a.json")
    assert read_table(store, ref)["x"].to_pylist()[-1] == 999
    assert sum(batch.num_rows for batch in stream_table(store, ref)) == 1000
    assert read_json(store, document) == {"a": 1}
    assert read_bytes(store, document) == b'{"a": 1}'
    change(store, ref.path)
    change(store, document.path)
    for read in (
        lambda: read_table(store, ref),
        lambda: list(stream_table(store, ref)),
        lambda: read_json(store, document),
        lambda: read_bytes(store, document),
        lambda: check_digest(store, ref),
    ):
        with pytest.raises(StorageError, match="SHA-256 differs"):
            read()
    store.remove(ref.path)
    with pytest.raises(StorageError, match="not in the store"):
        check_digest(store, ref)


def test_an_output_of_a_receipt_is_checked(store: Storage) -> None:
    keep(store, "plan", "ab", {"head": pa.table({"x": list(range(1000))})})
    receipt: Receipt = load_receipt(store, "plan")
    assert output_table(store, receipt, "head").num_rows == 1000
    change(store, receipt.output("head").path)
    with pytest.raises(StorageError, match="SHA-256 differs"):
        output_table(store, receipt, "head")


def test_a_file_is_read_for_its_digest_once_for_each_state_of_it(store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    ref = write(store, "plan/ab/head.parquet", pa.table({"x": [1, 2, 3]}))
    later = time.time_ns() + 10_000_000_000
    monkeypatch.setattr("time.time_ns", lambda: later)  # S3 tells times in seconds: within one second it may be another file
    check_digest(store, ref)
    with monkeypatch.context() as patch:
        patch.setattr("hashlib.sha256", lambda *_: pytest.fail("read again"))
        check_digest(store, ref)
    with pytest.raises(StorageError, match="differs"):
        check_digest(store, FileRef(path=ref.path, bytes=ref.bytes, sha256="0" * 64))  # another digest of the same file


def test_a_changed_lmdb_file_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same size, other bytes: what was found of LMDB. The note that it was looked at lies with the user, not with the file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    store = open_storage(str(tmp_path / "store"))
    _, manifest = publish(store, tmp_path, answers(good("a")))
    folder, path = tmp_path / "store" / "snapshots" / manifest.id, manifest.files["lmdb"].path
    assert open_snapshot(store, manifest.id).get("a") is not None
    monkeypatch.setattr(digests, "_known", {})
    with monkeypatch.context() as patch:
        patch.setattr(digests, "sha256_file", lambda _: pytest.fail("read again, by another process"))
        Cache.open(folder)
    notes = list((tmp_path / "home" / "headtail" / "checked").iterdir())
    assert len(notes) == 1
    assert notes[0].parent.stat().st_mode & 0o777 == 0o700
    assert not [found for found in (tmp_path / "store").rglob("*") if "checked" in found.name]
    about = os.stat(store.full(path))
    data = bytearray(store.read(path))
    data[-1] ^= 1
    Path(store.full(path)).write_bytes(bytes(data))
    os.utime(store.full(path), ns=(about.st_atime_ns, about.st_mtime_ns))  # as if it had not been touched
    with pytest.raises(StorageError, match="SHA-256 differs"):
        Cache.open(folder)
    with pytest.raises(HeadtailError, match="SHA-256 differs"):
        open_snapshot(store, manifest.id, tmp_path / "copy")


def test_without_a_home_each_process_looks_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"1")
    (tmp_path / "data").write_bytes(b"1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    check_local(tmp_path / "data", "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b")
    with pytest.raises(StorageError, match="differs"):
        check_local(tmp_path / "data", "0" * 64)


def test_no_read_goes_around_a_digest_that_is_there() -> None:
    """Whoever reads `something.path` has the FileRef in hand, and is to read that."""
    readers = {"read_table", "stream_table", "read_json", "read", "fetch"}
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr if isinstance(node.func, ast.Attribute) else ""
                around = [one for one in node.args if isinstance(one, ast.Attribute) and one.attr == "path"]
                if name in readers and around:
                    found.add(str(path.relative_to(PACKAGE)))
    assert found <= NOT_CHECKED.keys(), f"read the FileRef itself in {sorted(found - NOT_CHECKED.keys())}, or say here why not"
