"""The store: whole or absent, one winner, the same on disk and on S3 (moto's server stands in for S3)."""

from __future__ import annotations

import datetime
import errno
import os
import pickle
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from headtail.adapters.storage import (
    LocalStorage,
    Storage,
    fetch_folder,
    open_storage,
    put_folder,
    read_json,
    read_table,
    stream_table,
    write_json,
    write_table,
)
from headtail.core.errors import StorageError
from headtail.core.keys import sha256_file


@pytest.fixture(params=["local", "s3"])
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "store") if request.param == "local" else request.getfixturevalue("s3_root"))


def test_bytes_and_pointers(any_store: Storage) -> None:
    assert not any_store.exists("a/b")
    any_store.replace("a/b", b"one")
    any_store.replace("a/b", b"two")
    assert any_store.read("a/b") == b"two"
    assert any_store.size("a/b") == 3
    with pytest.raises(StorageError, match="not in the store"):
        any_store.read("a/c")


def test_create_has_one_winner(any_store: Storage) -> None:
    wins = []
    threads = [threading.Thread(target=lambda i=i: wins.append((any_store.create("m", str(i).encode()), i))) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [i for won, i in wins if won]
    assert len(winners) == 1
    assert any_store.read("m") == str(winners[0]).encode()


def test_tables_and_their_digest(any_store: Storage, tmp_path: Path) -> None:
    table = pa.table({"x": list(range(1000))})
    ref = write_table(any_store, "t.parquet", (table.slice(i, 100) for i in range(0, 1000, 100)), table.schema)
    assert (ref.rows, ref.bytes) == (1000, any_store.size("t.parquet"))
    assert read_table(any_store, "t.parquet").equals(table)
    assert sum(b.num_rows for b in stream_table(any_store, "t.parquet", batch_rows=64)) == 1000
    assert sha256_file(any_store.fetch("t.parquet", tmp_path / "local")) == ref.sha256
    with pytest.raises(StorageError, match="not in the store"):
        read_table(any_store, "none.parquet")


def test_damaged_table_is_said(any_store: Storage) -> None:
    any_store.replace("bad.parquet", b"PAR1 not really")
    with pytest.raises(StorageError, match="cannot be read"):
        read_table(any_store, "bad.parquet")


def test_folders(any_store: Storage, tmp_path: Path) -> None:
    (tmp_path / "model" / "sub").mkdir(parents=True)
    (tmp_path / "model" / "a.json").write_text("{}")
    (tmp_path / "model" / "b.bin").write_bytes(os.urandom(100))
    refs = put_folder(any_store, tmp_path / "model", "m")
    assert [r.path for r in refs] == ["m/a.json", "m/b.bin"]
    folder = fetch_folder(any_store, [r.path for r in refs], tmp_path / "cache")
    assert sorted(p.name for p in folder.iterdir()) == ["a.json", "b.bin"]


def test_what_is_removed_is_gone_and_only_that(any_store: Storage) -> None:
    for path in ("g/one/a", "g/one/sub/b", "g/two/a", "top"):
        any_store.replace(path, b"123")
    assert [(one.path, one.bytes) for one in any_store.files("g/one")] == [("g/one/a", 3), ("g/one/sub/b", 3)]
    any_store.remove("g/one/sub/b")
    any_store.remove("g/one/a")
    any_store.remove("g/one/a")  # nothing there is fine
    any_store.remove("never/was/there")
    assert [one.path for one in any_store.files("")] == ["g/two/a", "top"]
    assert any_store.files("g/one") == any_store.files("nothing") == []
    (left,) = any_store.files("g")
    any_store.discard(left)
    assert not any_store.exists("g/two/a")


def test_no_empty_folder_is_left_on_disk(tmp_path: Path) -> None:
    store = LocalStorage(str(tmp_path))
    store.replace("g/one/sub/b", b"1")
    store.remove("g/one/sub/b")
    assert list(tmp_path.iterdir()) == []


def test_what_killed_writers_left_is_found_once_it_is_old(any_store: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A temporary file on disk; parts of an upload on S3."""
    any_store.replace("x/whole", b"1")
    if isinstance(any_store, LocalStorage):

        def killed(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killed)
            with pytest.raises(KeyboardInterrupt):
                any_store.replace("x/half", b"12345")
        (tmp_path / "store" / "x" / ".hidden.tmp").write_text("of somebody else")
    else:
        any_store._client.create_multipart_upload(Bucket=any_store._bucket, Key=any_store._key("x/half"))  # type: ignore[attr-defined]
    day = datetime.timedelta(days=1)
    now = datetime.datetime.now(datetime.UTC)
    if isinstance(any_store, LocalStorage):  # moto dates every upload 2010
        assert any_store.litter(now - day) == []  # somebody may be writing it
    (found,) = any_store.litter(now + day)
    assert "half" in found.path
    any_store.discard(found)
    assert any_store.litter(now + day) == []
    assert any_store.read("x/whole") == b"1"


def test_a_stream_holds_a_group_of_rows_not_the_file(any_store: Storage) -> None:
    """pyarrow's own iterator keeps what it has read of every group until the end: memory would grow with the file."""
    table = pa.table({"x": [os.urandom(500) for _ in range(20_000)]})
    write_table(any_store, "t.parquet", (table.slice(i, 250) for i in range(0, 20_000, 250)), table.schema)  # 80 groups
    start, most = pa.total_allocated_bytes(), 0
    for _ in stream_table(any_store, "t.parquet"):
        most = max(most, pa.total_allocated_bytes() - start)
    assert most < table.nbytes / 8  # 3 groups are held (read, decoded, handed out), sometimes 4; ten leave room for threads
    with pytest.raises(StorageError, match="not in the store"):
        next(stream_table(any_store, "none.parquet"))
    any_store.replace("t.parquet", b"PAR1 not really")
    with pytest.raises(StorageError, match="cannot be read"):
        next(stream_table(any_store, "t.parquet"))


def test_json(any_store: Storage) -> None:
    write_json(any_store, "j.json", {"a": [1, "\u00e9"]})
    assert read_json(any_store, "j.json") == {"a": [1, "\u00e9"]}
    any_store.replace("j.json", b"{")
    with pytest.raises(StorageError, match="not JSON"):
        read_json(any_store, "j.json")


def test_pickles(any_store: Storage) -> None:
    any_store.replace("x", b"1")
    assert pickle.loads(pickle.dumps(any_store)).read("x") == b"1"


def test_other_kinds_are_refused() -> None:
    with pytest.raises(StorageError, match="not supported"):
        open_storage("ftp://x")


def test_a_failed_write_leaves_the_old_bytes_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStorage(str(tmp_path))
    store.replace("x", b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left") as error:
        store.replace("x", b"new")
    assert "free space" in error.value.fix
    assert store.read("x") == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 256 KiB."""
    place = tmp_path / "tiny"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs privileges that are not to be had here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_disk_really_full(tiny_disk: Path) -> None:
    store = LocalStorage(str(tiny_disk))
    store.replace("kept", b"old")
    with pytest.raises(StorageError, match="No space left") as error:
        store.replace("kept", os.urandom(1 << 20))
    assert "free space" in error.value.fix
    with pytest.raises(StorageError, match="No space left"):
        write_table(store, "t.parquet", pa.table({"x": os.urandom(1 << 20).hex().split("0")}))
    assert store.read("kept") == b"old"
    assert [p.name for p in tiny_disk.iterdir()] == ["kept"]


def test_no_permission_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStorage(str(tmp_path / "file" / "below"))
    (tmp_path / "file").write_text("I am a file, not a folder")
    with pytest.raises(StorageError, match="cannot write"):
        store.replace("x", b"1")

    def denied(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "replace", denied)
    with pytest.raises(StorageError, match="Permission denied") as error:
        LocalStorage(str(tmp_path / "other")).replace("x", b"1")
    assert "--root" in error.value.fix
