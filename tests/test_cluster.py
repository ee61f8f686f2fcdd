"""The door to Ray: joined once, quiet, left behind clean."""

from __future__ import annotations

import os

import pytest

from headtail.errors import EngineError


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
