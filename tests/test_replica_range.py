"""How many engines are wanted for a queue; a replica that has not reported is no empty queue."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from headtail.core.config import build_config
from headtail.core.errors import ConfigError
from headtail.stages import serve
from headtail.stages.serve.replica_range import QUEUE, ReplicaRange, scale_by_queue


def wanted(queues: dict[str, float] | None, running: int = 2, target: int = 2) -> float:
    config = SimpleNamespace(target_ongoing_requests=8.0)
    metrics = None if queues is None else {QUEUE: queues}
    replicas = [str(number) for number in range(running)]
    return scale_by_queue(
        SimpleNamespace(aggregated_metrics=metrics, running_replicas=replicas, target_num_replicas=target, config=config)
    )[0]


def test_so_many_that_each_has_the_target_queue() -> None:
    assert wanted({"0": 8.0, "1": 8.0}) == 2
    assert wanted({"0": 40.0, "1": 8.0}) == 6
    assert wanted({"0": 0.0, "1": 0.0}) == 0  # Serve keeps `min`


@pytest.mark.parametrize("queues", [None, {}, {"0": 0.0}])
def test_without_a_report_of_each_nothing_changes(queues: dict[str, float] | None) -> None:
    assert wanted(queues, target=5) == 5


def test_serve_takes_the_settings() -> None:
    from ray.serve.config import AutoscalingConfig

    made = AutoscalingConfig(**ReplicaRange(min=2, max=6).serve_config(initial=9))
    assert (made.min_replicas, made.initial_replicas, made.max_replicas) == (2, 6, 6)
    policy = made.policy.get_policy()
    context = SimpleNamespace(aggregated_metrics={QUEUE: {"a": 24.0}}, running_replicas=["a"], target_num_replicas=1, config=made)
    assert policy(context) == (3.0, {})
    assert ReplicaRange(max=4).serve_config()["initial_replicas"] == 1


def test_a_number_or_a_range() -> None:
    assert build_config(serve.Config, {"realtime_replicas": 3}, where="test").realtime_replicas == 3
    assert build_config(serve.Config, {"realtime_replicas": {"max": 3}}, where="test").realtime_replicas == ReplicaRange(max=3)
    for wrong in (0, {"min": 3, "max": 2}, {"min": 1}, {"max": 2, "most": 1}):
        with pytest.raises(ConfigError, match="realtime_replicas"):
            build_config(serve.Config, {"realtime_replicas": wrong}, where="test")
