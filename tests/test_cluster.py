"""A Ray cluster: started or joined once, without log lines, and nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headtail.adapters.cluster import unwrap_error
from headtail.core.errors import ConfigError, EngineError, HeadtailError, LedgerError, StorageError


@pytest.mark.parametrize("fails, ends_well", [(0, True), (1, True), (2, False)])
def test_a_busy_machine_gets_a_second_chance_then_a_clear_error(monkeypatch: pytest.MonkeyPatch, fails: int, ends_well: bool) -> None:
    import ray

    from headtail.adapters import cluster

    tried: list[int] = []

    def init(**_: object) -> None:
        tried.append(1)
        if len(tried) <= fails:
            raise Exception("The current node timed out during startup. This could happen because ...")  # as Ray does

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(cluster, "_private_token", lambda: None)
    if ends_well:
        cluster._start_here(2)
        assert len(tried) == fails + 1
    else:
        with pytest.raises(EngineError, match="did not start") as caught:
            cluster._start_here(2)
        assert caught.value.fix
        assert len(tried) == 2


@pytest.mark.parametrize("long", [False, True])
def test_the_folder_of_sockets_is_private_short_and_never_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, long: bool) -> None:
    from headtail.adapters import cluster

    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr(cluster, "_folders", [])
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("x" * 90)) if long else "/tmp")
    given = [Path(cluster._private_folder()) for _ in range(2)]
    folders = [one.parent for one in given]
    assert len(set(folders)) == 2
    for folder in folders:
        assert folder.stat().st_mode & 0o777 == 0o700
        assert len(f"{folder}/s/session_2026-11-29_08-03-39_426793_4194304/sockets/plasma_store.1") <= 107
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    cluster.stop_cluster()
    assert not any(folder.exists() for folder in folders)
    monkeypatch.setenv("RAY_TMPDIR", asked := tempfile.mkdtemp(dir="/tmp"))
    kept = Path(cluster._private_folder()).parent
    cluster.stop_cluster()
    assert kept.parent == Path(asked)
    assert kept.is_dir()  # asked for: its logs are wanted
    shutil.rmtree(asked)


def test_the_token_is_the_users_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from headtail.adapters import cluster

    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    cluster._private_token()
    token = tmp_path / ".ray" / "auth_token"
    assert re.fullmatch("[0-9a-f]{64}", first := token.read_text())
    assert [path.stat().st_mode & 0o777 for path in (token, token.parent)] == [0o600, 0o700]
    token.chmod(0o644)  # as Ray makes it
    cluster._private_token()
    assert (token.read_text(), token.stat().st_mode & 0o777) == (first, 0o600)
    assert list(token.parent.iterdir()) == [token]


@pytest.mark.slow
def test_a_local_cluster_listens_on_loopback_only(cluster: None) -> None:
    import psutil
    import ray

    node = ray._private.worker._global_node
    assert node.node_ip_address == "127.0.0.1"
    assert Path(node.get_session_dir_path()).parents[1].stat().st_mode & 0o777 == 0o700
    own = re.compile(r"raylet|gcs_server|monitor|dashboard|ray::(DashboardAgent|RuntimeEnvAgent)", re.IGNORECASE)  # not what jobs start
    ports = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if own.search(" ".join([process.name(), *process.cmdline()[:3]])):
                ports += [one.laddr.ip.removeprefix("::ffff:") for one in process.net_connections("inet") if one.status == "LISTEN"]
    assert len(ports) > 5
    assert set(ports) == {"127.0.0.1"}


@pytest.mark.slow
def test_start_twice_is_one_cluster(cluster: None) -> None:
    import ray

    from headtail.adapters.cluster import start_cluster

    before = ray.get_runtime_context().get_job_id()
    start_cluster()
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
    found = unwrap_error(caught.value, EngineError, "a worker broke")
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
    text = f'ray::Map()\n  File "a.py", line 1\n{type(error).__module__}.{type(error).__name__}: {error}{after}'
    found = unwrap_error(text, EngineError, "a worker broke")
    assert (type(found), str(found)) == (type(error), str(error))


def test_another_error_is_told_by_its_own_line() -> None:
    text = 'ray::Map()\n  File "a.py", line 1\nValueError: no such column\n\nray.exceptions.UserCodeException: failed\nTo change ...'
    found = unwrap_error(text, EngineError, "a worker broke", where="here", fix="run again")
    assert (type(found), str(found)) == (EngineError, "a worker broke: ValueError: no such column\n  where: here\n  do:    run again")
    assert str(unwrap_error("", EngineError, "a worker broke")) == "a worker broke: no words"
