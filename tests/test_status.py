"""`headtail status`: what a store holds and what goes on in it, by real runs of the command on small stores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from headtail.adapters.storage import Storage, write_json
from headtail.batch.lease import hold_lease
from headtail.cli import main
from headtail.cli.status import status, status_table
from headtail.core.config import TrackingConfig
from headtail.core.errors import InputError
from headtail.core.task import Task
from headtail.examples import example_data
from headtail.stages import gate
from headtail.stages.distill.checkpoints import Marker
from headtail.stages.distill.run_record import LoopRecord
from test_gate import POOR, put, run_gate
from test_precompute import plan
from timescale import limit

ROWS = 400
# `headtail precompute` in a process of its own, without Ray: 5 ms a row
DRIVER = """
import sys, threading
from headtail.batch import driver
from headtail.batch.worker import Worker

def here(job, manifest, asks, *_):
    worker = Worker(job, manifest, f"run-{threading.get_ident()}")
    receipts = [one.model_dump(mode="json") for one in worker.work(asks)]
    return [{"worker": worker.name, "engine": {}, "start_s": 0.0, "restarts": 0, "reasons": {}, "receipts": receipts}]

driver._spread = here
from headtail.cli import main
main(sys.argv[1:])
"""


def precompute(root: str, delay_us: int) -> subprocess.Popen[bytes]:
    flags = ["--root", root, "--set", "inputs=[plan:head]", "--set", "model.engine=null", "--set", f"model.model=null:delay_us={delay_us}"]
    flags += ["--set", "flush_rows=20", "--set", "tracking.enabled=false", "--set", "shards=2"]
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, "precompute", *flags], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )


def shown(root: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    main(["status", "--root", root, "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def text(root: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "headtail.cli", "status", "--root", root],
        capture_output=True,
        text=True,
        timeout=limit(120),
        check=True,
        env={**os.environ, "COLUMNS": "160"},
    )
    return done.stdout


def test_latest_stage_and_no_release_yet(root: str) -> None:
    receipt = example_data.run(example_data.Config(root=root, tracking=TrackingConfig(enabled=False), events=100, labels=5))
    found = status(root)
    assert found["release"] is None
    assert found["stages"]["example-data"]["path"] == receipt.path
    assert "no release yet" in str(status_table(found).renderables[0])
    assert "No job is unfinished." in text(root)


@pytest.mark.slow
def test_a_job_is_running_then_dead_then_done(root: str, store: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    plan(store, head=[f"q{i}" for i in range(ROWS)])
    process = precompute(root, 10_000)
    try:
        end = time.monotonic() + limit(60)
        job: dict[str, Any] = {"rows_done": 0}
        while not job["rows_done"] and time.monotonic() < end and process.poll() is None:
            time.sleep(0.1)
            job = next(iter(shown(root, capsys)["jobs"]), job)
        assert (job["state"], job["rows"], job["source"], job["model"]) == ("running", ROWS, "teacher", "null")
        assert 0 < job["rows_done"] < ROWS
        assert 0 <= job["silent_s"] < limit(60)
        assert f"process {process.pid} on " in job["driver"]
    finally:
        process.kill()
        process.wait()
    dead = shown(root, capsys)["jobs"][0]
    assert (dead["state"], dead["path"], dead["rows"]) == ("dead", job["path"], ROWS)
    assert job["rows_done"] <= dead["rows_done"] < ROWS
    table = text(root)
    assert f"{dead['rows_done']} of {ROWS} rows" in table
    assert "dead" in table
    assert " s ago" in table or " min ago" in table
    assert precompute(root, 0).wait(limit(60)) == 0
    done = shown(root, capsys)
    assert done["jobs"] == []
    assert done["sources"][0]["rows"] == {"in": ROWS, "answered": ROWS, "truncated": 0, "invalid": 0, "refused": 0, "failed": 0}
    assert f"{ROWS} of {ROWS} answered" in text(root)


def test_a_job_that_ended_with_an_error_is_stopped(root: str, store: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    plan(store, head=[f"q{i} !fail" for i in range(40)])
    flags = ["--set", "inputs=[plan:head]", "--set", "model.engine=null", "--set", "model.model=null:faults", "--set", "attempts=1"]
    command = [sys.executable, "-c", DRIVER, "precompute", "--root", root, *flags, "--set", "tracking.enabled=false"]
    assert subprocess.run(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, check=False).returncode == 1
    assert [job["state"] for job in shown(root, capsys)["jobs"]] == ["stopped"]


def test_a_silent_lease_of_another_machine_is_dead(any_root: str) -> None:
    from headtail.adapters import append_log
    from headtail.adapters.storage import open_storage
    from headtail.batch import job_state, lease

    store = open_storage(any_root)
    other = lease.Lease(host="elsewhere", machine="another", pid=7, since="2030-01-01T00:00:00+00:00")
    store.create(append_log.entry_path("precompute/x/work/drivers", 1), other.model_dump_json().encode())
    alive = job_state.job_state(store, "precompute/x")
    assert (alive.phase, alive.driver, alive.rows) == ("running", "process 7 on elsewhere", None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job_state, "SILENT_S", 0.0)
        assert job_state.job_state(store, "precompute/x").phase == "dead"
    assert job_state.job_state(store, "precompute/y").phase == "waiting"


def test_a_training_that_did_not_end_shows_its_step(root: str, store: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a" * 16, "b" * 16):
        write_json(store, f"distill/{name}/work/settings.json", {"student": "decoder"})
    whole = Marker(tag="step-00000120", files={}, state=LoopRecord(step=120), steps=400)
    write_json(store, f"distill/{'a' * 16}/work/checkpoints/COMPLETE", whole.model_dump())
    write_json(store, f"distill/{'b' * 16}/receipt.json", {})
    trainings = shown(root, capsys)["trainings"]
    assert [(one["path"], one["state"], one["step"], one["steps"]) for one in trainings] == [(f"distill/{'a' * 16}", "waiting", 120, 400)]
    with hold_lease(store, f"distill/{'a' * 16}"):
        running = shown(root, capsys)["trainings"][0]
        assert (running["state"], running["driver"].startswith(f"process {os.getpid()} on ")) == ("running", True)
        assert "checkpoint of step 120 of 400" in text(root)
    assert shown(root, capsys)["trainings"][0]["state"] == "stopped"


def test_the_gate_of_each_student_is_shown(root: str, store: Storage, intent: Task) -> None:
    put(store, intent, POOR)
    assert gate.latest_verdict(store, "query_intent", "batch_student") is None
    rejected = run_gate(store, minimum={"tail": 0.9})
    found = gate.latest_verdict(store, "query_intent", "batch_student")
    assert found is not None
    assert (found.passed, rejected.result.evidence) == (False, found)
    put(store, intent, student="u" * 16)
    run_gate(store, minimum={"tail": 0.9})
    now = gate.latest_verdict(store, "query_intent", "batch_student")
    assert now is not None
    assert now.passed


@pytest.mark.parametrize("name, said", [("nosuch", "no store here"), ("file", "a file, not a directory"), ("", "root is empty")])
def test_a_store_that_is_not_there_is_an_error(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=said) as error:
        status(str(tmp_path / name) if name else "")
    assert error.value.fix
