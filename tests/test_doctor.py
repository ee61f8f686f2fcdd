"""The doctor names what would go wrong before it costs anything."""

from __future__ import annotations

import socket

import pytest

from conftest import free_port
from headtail import doctor, loop
from headtail.config import load


def found(sets: list[str]) -> dict[str, doctor.Result]:
    return {result.check: result for result in doctor.examine(load(loop.Config, None, sets))}


def test_this_machine_passes(root: str) -> None:
    results = found([f"root={root}", f"serve.port={free_port()}"])
    assert [r for r in results.values() if r.status == "bad"] == []
    assert results["store"].status == "ok"
    assert results["vllm"].found == doctor.VLLM


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
            [f"root={root}", "teacher.model=/no/such/model", f"serve.port={busy.getsockname()[1]}", "distill.base.model=example:none"]
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
