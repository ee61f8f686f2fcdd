"""The door to Ray: joined once, quiet, left behind clean."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headtail.cluster import unwrapped
from headtail.errors import ConfigError, EngineError, HeadtailError, LedgerError, StorageError


@pytest.mark.parametrize("fails, ends_well", [(0, True), (1, True), (2, False)])
def test_a_busy_machine_gets_a_second_chance_then_a_clear_error(monkeypatch: pytest.MonkeyPatch, fails: int, ends_well: bool) -> None:
    import ray

    from headtail import cluster

    tried: list[int] = []

    def init(**_: object) -> None:
        tried.append(1)
        if len(tried) <= fails:
            raise Exception("The current node timed out during startup. This could happen because ...")  # as Ray does

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    if ends_well:
        cluster._start_here(2)
        assert len(tried) == fails + 1
    else:
        with pytest.raises(EngineError, match="did not start") as caught:
            cluster._start_here(2)
        assert caught.value.fix
        assert len(tried) == 2


@pytest.mark.slow
def test_start_twice_is_one_cluster(cluster: None) -> None:
    import ray

    from headtail.cluster import start

    before = ray.get_runtime_context().get_job_id()
    start()
    assert ray.get_runtime_context().get_job_id() == before
    assert ray.cluster_resources()["CPU"] == 4


@pytest.mark.slow
def test_workers_see_the_package_and_data_is_quiet(cluster: None) -> None:
    import ray

    def version() -> str:
        import headtail

        return headtail.__version__

    assert ray.get(ray.remote(num_cpus=0.1)(version).remote()).startswith("0.")
    assert not ray.data.DataContext.get_current().enable_progress_bars
    assert os.environ["RAY_TRAIN_V2_ENABLED"] == "1"


# --- the error of ours inside what Ray wraps around it. Serve's is in test_serve_ray.py


def wrong(*_: object) -> Any:
    raise ConfigError("the endpoint answered 404: no such model", where="model.model", value="some/model", fix="check it\nand run again")


class Wrong:
    """Breaks when it is called; with `early` when it is made."""

    def __init__(self, early: bool = False) -> None:
        if early:
            wrong()

    def __call__(self, batch: Any) -> Any:
        wrong()


def _task() -> None:
    import ray

    ray.get(ray.remote(num_cpus=0.1)(wrong).remote())


def _actor(early: bool) -> None:
    import ray

    ray.get(ray.remote(num_cpus=0.1)(Wrong).remote(early).__call__.remote(1))


def _data(rows: Callable[[Any], Any]) -> None:
    import ray

    list(rows(ray.data.from_items([{"a": 1}, {"a": 2}], override_num_blocks=2)).iter_rows())


def _batches(data: Any) -> Any:
    import ray

    return data.map_batches(Wrong, compute=ray.data.ActorPoolStrategy(size=1), num_cpus=0.1)


def _train(folder: Path) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    TorchTrainer(
        wrong,
        train_loop_config={},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=1, use_gpu=False, resources_per_worker={"CPU": 0.1}),
        run_config=RunConfig(storage_path=str(folder), failure_config=FailureConfig(max_failures=0)),
    ).fit()


@pytest.mark.slow
@pytest.mark.parametrize("where", ["task", "actor", "actor's start", "data", "data's actor", "train"])
def test_an_error_of_ours_comes_back_whole(cluster: None, where: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ways: dict[str, Callable[[], None]] = {
        "task": _task,
        "actor": lambda: _actor(early=False),
        "actor's start": lambda: _actor(early=True),
        "data": lambda: _data(lambda data: data.map(wrong, num_cpus=0.1)),
        "data's actor": lambda: _data(_batches),
        "train": lambda: _train(tmp_path),
    }
    with pytest.raises(Exception) as caught:  # which one is Ray's to choose
        ways[where]()
    found = unwrapped(caught.value, EngineError, "a worker broke")
    assert type(found) is ConfigError
    assert (found.what, found.where) == ("the endpoint answered 404: no such model", "model.model")
    assert (found.value, found.fix) == ("some/model", "check it\nand run again")
    if where.startswith("data"):
        said = "".join(capfd.readouterr())
        assert "ERROR" not in said
        assert "Traceback" not in said


@pytest.mark.parametrize(
    "error", [LedgerError("one\ntwo", where="a", value="b: c", fix="d"), StorageError("alone"), ConfigError("x", value=3)]
)
@pytest.mark.parametrize(
    "after", ["", "\n", "\n\nThe above exception was the direct cause of ...\nray.exceptions.UserCodeException: UDF failed"]
)
def test_an_error_of_ours_is_made_again_from_its_traceback(error: HeadtailError, after: str) -> None:
    text = f'ray::Map()\n  File "a.py", line 1\nheadtail.errors.{type(error).__name__}: {error}{after}'
    found = unwrapped(text, EngineError, "a worker broke")
    assert (type(found), str(found)) == (type(error), str(error))


def test_another_error_is_told_by_its_own_line() -> None:
    text = 'ray::Map()\n  File "a.py", line 1\nValueError: no such column\n\nray.exceptions.UserCodeException: failed\nTo change ...'
    found = unwrapped(text, EngineError, "a worker broke", where="here", fix="run again")
    assert (type(found), str(found)) == (EngineError, "a worker broke: ValueError: no such column\n  where: here\n  do:    run again")
    assert str(unwrapped("", EngineError, "a worker broke")) == "a worker broke: no words"
