"""Two drivers of one job: the second waits, takes over from one that died, and no row is paid for twice."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from headtail.adapters import append_log
from headtail.adapters.storage import Storage, open_storage, read_json
from headtail.batch import driver, lease
from headtail.batch.lease import Lease, hold_lease, holder_gone
from headtail.batch.worker import Worker
from headtail.core.config import build_config
from headtail.core.errors import StorageError
from headtail.stages import precompute
from test_precompute import config, plan
from timescale import limit

FOLDER = "precompute/x/work/drivers"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LOOK_S", 0.01)


def held(store: Storage, number: int) -> Lease:
    return build_config(Lease, read_json(store, append_log.entry_path(FOLDER, number)), "test")


def test_a_lease_ends_with_its_driver_also_when_that_fails(store: Storage) -> None:
    with hold_lease(store, "precompute/x"):
        assert (held(store, 1).ended, held(store, 1).pid) == (False, os.getpid())
    with pytest.raises(RuntimeError), hold_lease(store, "precompute/x"):
        raise RuntimeError
    assert [held(store, number).ended for number in (1, 2)] == [True, True]
    with hold_lease(store, "precompute/x"):
        assert append_log.last_number(store, FOLDER) == 3


def test_the_second_says_who_drives_and_waits(any_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store, said, order = open_storage(any_root), list[str](), list[str]()
    monkeypatch.setattr(lease, "say", said.append)

    def second() -> None:
        with hold_lease(store, "precompute/x"):
            order.append("second")

    with hold_lease(store, "precompute/x"):
        thread = threading.Thread(target=second)
        thread.start()
        end = time.monotonic() + limit(20)
        while not said and time.monotonic() < end:
            time.sleep(0.01)
        order.append("first")
    thread.join(limit(20))
    assert order == ["first", "second"]
    assert f"process {os.getpid()} on " in said[0]
    assert "since 20" in said[0]


def test_a_lease_that_is_not_renewed_is_taken_over_by_one(store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another machine, whose clock and processes say nothing here."""
    monkeypatch.setattr(lease, "SILENT_S", 0.3)
    store.create(append_log.entry_path(FOLDER, 1), Lease(host="other", pid=1, since="2040-01-01T00:00:00+00:00").model_dump_json().encode())
    inside, most, taken = 0, 0, list[float]()
    lock, begun = threading.Lock(), time.monotonic()

    def drive() -> None:
        nonlocal inside, most
        with hold_lease(store, "precompute/x"):
            with lock:
                inside += 1
                most = max(most, inside)
                taken.append(time.monotonic() - begun)
            time.sleep(0.02)
            with lock:
                inside -= 1

    threads = [threading.Thread(target=drive) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(limit(30))
    assert (most, len(taken)) == (1, 4)
    assert min(taken) >= 0.3


@pytest.mark.slow
def test_a_lease_that_is_renewed_is_not_taken_over(store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "SILENT_S", limit(1.0))
    monkeypatch.setattr(lease, "BEAT_S", 0.02)
    monkeypatch.setattr(lease, "_machine", lambda: "")  # as if each were on a machine of its own
    entered = threading.Event()

    def second() -> None:
        with hold_lease(store, "precompute/x"):
            entered.set()

    with hold_lease(store, "precompute/x"):
        thread = threading.Thread(target=second)
        thread.start()
        assert not entered.wait(limit(2.0))
    thread.join(limit(20))
    assert entered.is_set()


def test_a_lease_that_cannot_be_written_is_said_and_ends_no_job(store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    said, done = list[str](), []
    monkeypatch.setattr(lease, "say", said.append)

    def full(*_: object) -> None:
        raise StorageError("cannot write: No space left on device")

    with hold_lease(store, "precompute/x"):
        monkeypatch.setattr(type(store), "replace", full)
        done.append(1)
    assert done
    assert "No space left" in said[0]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="Linux says when a process started")
def test_after_kill_9_the_next_driver_does_not_wait(store: Storage) -> None:
    code = f"import time; from headtail.batch.lease import hold_lease; from headtail.adapters.storage import open_storage\n\
with hold_lease(open_storage({store.root!r}), 'precompute/x'):\n    print('in', flush=True); time.sleep(600)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"in\n"
    assert not holder_gone(held(store, 1))
    process.kill()
    process.wait()
    process.stdout.close()
    assert holder_gone(held(store, 1))
    begun = time.monotonic()
    with hold_lease(store, "precompute/x"):
        assert time.monotonic() - begun < lease.SILENT_S / 2
    assert not held(store, 1).ended


def test_two_drivers_of_one_job_pay_for_each_row_once(root: str, store: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Today's case: 3,001 rows, two drivers, 6,002 rows paid for."""
    rows, log = 3001, tmp_path / "asked"
    plan(store, head=[f"q{i}" for i in range(rows)])

    def here(job: Any, manifest: Any, asks: Sequence[Any], *_: Any) -> list[dict[str, Any]]:
        worker = Worker(job, manifest, f"run-{threading.get_ident()}")
        receipts = worker.work(asks)
        worker._drop_engine()
        told = {"worker": worker.name, "engine": {}, "start_s": 0.0, "restarts": 0, "reasons": {}}
        return [told | {"receipts": [receipt.model_dump(mode="json") for receipt in receipts]}]

    monkeypatch.setattr(driver, "_spread", here)
    found = []

    def drive() -> None:
        found.append(precompute.run(config(root, model=f"null:delay_us=300,log={log}", flush_seconds=1000)))

    threads = [threading.Thread(target=drive) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(limit(60))
    assert log.stat().st_size == rows
    assert sorted(receipt.reused for receipt in found) == [False, True]
