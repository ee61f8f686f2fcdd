"""The door to Ray: joined once, quiet, left behind clean."""

from __future__ import annotations

import os

import pytest


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
