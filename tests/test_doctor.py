"""The doctor names what would go wrong before it costs anything."""

from __future__ import annotations

import errno
import os
import shutil
import socket
from collections import namedtuple
from pathlib import Path

import pytest

from conftest import free_port
from headtail import pipeline
from headtail.adapters.storage import local
from headtail.cli import doctor
from headtail.core.config import load


def found(sets: list[str]) -> dict[str, doctor.Result]:
    return {result.check: result for result in doctor.examine(load(pipeline.Config, None, sets))}


def test_this_machine_passes(root: str) -> None:
    results = found([f"root={root}", f"serve.port={free_port()}"])
    assert [r for r in results.values() if r.status == "bad"] == []
    assert results["store"].status == "ok"
    assert results["vllm"].found == doctor.VLLM[0]


def test_wrong_version_is_named(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "TESTED", {"ray": "1.0.0", "no-such-package": "1"})
    results = found([f"root={root}"])
    assert (results["ray"].status, results["no-such-package"].status) == ("warn", "bad")
    assert "tested with 1.0.0" in results["ray"].fix


def test_breaking_package_is_named(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: {"torch": "2.13.0+cpu", "torchvision": "0.28.0"}.get(name) or real(name))
    assert found([f"root={root}"])["torchvision"].status == "bad"


def test_missing_model_busy_port_bad_store(root: str) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        results = found(
            [f"root={root}", "teacher.model=/no/such/model", f"serve.port={busy.getsockname()[1]}", "distill_batch.base.model=example:none"]
        )
    assert results["teacher"].status == "bad"
    assert "/no/such/model" in results["teacher"].found
    assert results["port"].status == "bad"
    assert "example:student-base" in results["student base"].fix or "example:" in results["student base"].fix
    assert found(["root=/proc/nowhere"])["store"].status == "bad"


def test_endpoint_out_of_reach_and_no_secret_shown(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    results = found([f"root={root}", "teacher.model=m", "teacher.engine=openai", "teacher.base_url=http://127.0.0.1:9/v1"])
    assert results["teacher"].status == "bad"
    assert "sk-very-secret" not in repr(results)


@pytest.mark.parametrize("url", ["127.0.0.1:8901/v1", "ftp://x/v1", "host/v1"])
def test_a_base_url_without_its_scheme_is_named_as_such(root: str, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    result = found([f"root={root}", "teacher.model=m", "teacher.engine=openai", f"teacher.base_url={url}"])["teacher"]
    assert (result.status, "with http:// or https://" in result.found) == ("bad", True)


def test_a_tracking_server_that_does_not_answer_is_a_warning(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    result = found([f"root={root}"])["tracking"]
    assert (result.status, "MLFLOW_TRACKING_URI" in result.fix) == ("warn", True)


def test_cluster_without_token_is_named(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    assert found([f"root={root}"])["cluster"].status == "warn"
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "x" * 32)
    assert found([f"root={root}"])["cluster"].status == "ok"


def test_table_puts_the_worst_first() -> None:
    table = doctor.table([doctor.Result(check="a", status="ok", found=""), doctor.Result(check="b", status="bad", found="")])
    assert list(table.columns[1].cells) == ["b", "a"]


def failing(*_: object) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


def test_the_store_is_tried_and_left_as_it_was(root: str, s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results = found([f"root={root}"])
    assert (results["store"].status, results["store"].found) == ("ok", f"{root}; names by hard link")
    assert list(Path(root).iterdir()) == []
    assert "conditional puts hold" in found([f"root={s3_root}"])["store"].found
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", failing)
        assert found([f"root={root}"])["store"].found == f"{root}; names by rename without overwriting"
        patch.setattr(local, "_rename_new", lambda source, target: errno.EINVAL)
        none = found([f"root={root}"])["store"]
        assert (none.status, "neither hard links" in none.found, "--root" in none.fix) == ("bad", True, True)
        assert list(Path(root).iterdir()) == []


def test_a_store_without_a_bucket_or_keys_is_named(s3_root: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bad = found(["root=s3://nobody-made-this/x"])["store"]
    assert (bad.status, "NoSuchBucket" in bad.found, "create the bucket" in bad.fix) == ("bad", True, True)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    bad = found([f"root={s3_root}"])["store"]
    assert (bad.status, "AWS_ACCESS_KEY_ID" in bad.fix) == ("bad", True)


def test_a_disk_that_is_nearly_full_and_a_mounted_bucket_are_named(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 40, 1 << 40, 300 << 20))
    assert found([f"root={root}"])["disk"].status == "warn"
    assert "300 MiB are free" in local.low_space(root)
    monkeypatch.setattr(doctor, "file_system", lambda path, mounts: "fuse.s3fs")
    assert "s3://bucket/prefix" in found([f"root={root}"])["file system"].fix


def test_the_file_system_is_that_of_the_deepest_mount() -> None:
    mounts = "overlay / overlay rw 0 0\ns3fs /mnt/my\\040bucket fuse.s3fs rw 0 0\n/dev/sdb /mnt ext4 rw 0 0\n"
    kinds = [doctor.file_system(path, mounts) for path in ("/home", "/mnt/my bucket/store", "/mnt/my bucket", "/mnt/mybucket", "relative")]
    assert kinds == ["overlay", "fuse.s3fs", "fuse.s3fs", "ext4", ""]
