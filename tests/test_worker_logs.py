"""Of a dead worker its signal is named: with real Ray, and for an engine that dies of it at each start."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from headtail.adapters.worker_logs import last_fatal_signal, log_folder
from headtail.batch import worker
from headtail.batch.prepare import prepare_input
from headtail.core.errors import EngineError
from null_jobs import MakeJob, planned
from timescale import eventually


def test_the_newest_log_with_a_signal_counts(tmp_path: Path) -> None:
    assert last_fatal_signal(None) == ""
    assert last_fatal_signal(tmp_path) == ""
    for age, (name, text) in enumerate(
        [("c.err", b""), ("b.err", b"x\n*** SIGILL received at\n*** SIGSEGV received"), ("a.err", b"*** SIGBUS received")]
    ):
        path = tmp_path / f"worker-{name}"
        path.write_bytes(b"a line\n" + text)
        os.utime(path, (1000 - age, 1000 - age))
    assert last_fatal_signal(tmp_path) == "SIGSEGV"


def test_outside_a_worker_there_is_no_folder(tmp_path: Path) -> None:
    link = tmp_path / "2"
    assert log_folder(str(link)) is None
    link.symlink_to(tmp_path / "pipe")
    assert log_folder(str(link)) is None
    link.unlink()
    link.symlink_to(tmp_path / "worker-1.err")
    assert log_folder(str(link)) == tmp_path


@pytest.mark.slow
def test_ray_leaves_the_signal_of_a_dead_worker(cluster: None) -> None:
    import ray

    @ray.remote(num_cpus=0, max_retries=0)  # type: ignore[untyped-decorator]
    def die() -> None:
        os.kill(os.getpid(), signal.SIGILL)

    @ray.remote(num_cpus=0)  # type: ignore[untyped-decorator]
    def look() -> str:
        return last_fatal_signal(log_folder())

    with pytest.raises(ray.exceptions.WorkerCrashedError):
        ray.get(die.remote())
    assert eventually(lambda: ray.get(look.remote())) == "SIGILL"


@pytest.mark.parametrize(
    "signal_name, starts", [("SIGILL", worker.MOST_ILLEGAL), ("SIGSEGV", worker.MOST_STARTS), ("", worker.MOST_STARTS)]
)
def test_an_engine_that_dies_at_every_start_ends_the_job_with_its_signal(
    make_local_job: MakeJob, monkeypatch: pytest.MonkeyPatch, signal_name: str, starts: int
) -> None:
    """No row is to blame for an illegal instruction: the job does not try sixteen times."""
    monkeypatch.setattr(worker, "last_fatal_signal", lambda folder: signal_name)
    job = make_local_job(planned(["a", "b"]), shards=1)
    manifest = prepare_input(job)
    for _ in range(starts):
        worker.Worker(job, manifest, "run0").ensure_engine()
    with pytest.raises(EngineError) as error:
        worker.Worker(job, manifest, "run0").ensure_engine()
    assert f"the engine died {starts} times" in str(error.value)
    assert signal_name in str(error.value)
    assert ("instruction" in str(error.value)) == (signal_name == "SIGILL")
