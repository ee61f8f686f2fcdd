"""How many engines of a student run, by their queue. Queries come over the students' own links, so Ray Serve's count of requests is blind:
each replica reports its queue (`StudentReplica.record_autoscaling_stats`), and `scale_by_queue` is the policy of the deployment.

In: a range, a target queue per engine. Out: Serve's autoscaling_config. Serve runs the policy in its controller, to which it sends this
module by value: it imports nothing that a controller may lack. Knows nothing of links or models.
"""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, model_validator

from headtail.core.config import Config

QUEUE = "queue"  # name of the metric
_PUSH_S = 1.0  # between reports of a replica; Serve's own default of 10 s would see a load that has gone


class ReplicaRange(Config):
    """Engines of the realtime student: between `min` and `max`, by their queue."""

    min: int = Field(1, ge=1, description="engines that always run")
    max: int = Field(ge=1, description="engines at most; each asks Ray for the model's cpus, gpus and resources")
    queue: float = Field(8.0, gt=0, description="misses per engine, waiting or being answered, that are aimed at")
    average_s: float = Field(10.0, gt=_PUSH_S, description="seconds over which the queue is averaged")
    up_after_s: float = Field(10.0, ge=0, description="seconds that more engines must be wanted before they are started")
    down_after_s: float = Field(300.0, ge=0, description="seconds that fewer must be wanted before one is ended: a start takes long")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max < self.min:
            raise ValueError(f"max ({self.max}) is below min ({self.min})")
        return self

    def serve_config(self, initial: int = 0) -> dict[str, Any]:
        """Serve's autoscaling_config. `initial`: engines to begin with, within the range."""
        return {
            "min_replicas": self.min,
            "initial_replicas": max(self.min, min(self.max, initial)),
            "max_replicas": self.max,
            "target_ongoing_requests": self.queue,
            "metrics_interval_s": _PUSH_S,  # "deprecated" for two variables, which a replica of Ray 2.60 does not read
            "look_back_period_s": self.average_s,
            "upscale_delay_s": self.up_after_s,
            "downscale_delay_s": self.down_after_s,
            "policy": {"policy_function": f"{__name__}:scale_by_queue"},
        }


def scale_by_queue(ctx: Any) -> tuple[float, dict[str, Any]]:
    """Engines that would each have the target queue (`ctx`: ray.serve.config.AutoscalingContext). Serve keeps to range and delays.

    As many as there are while a replica has not reported yet: no report is no empty queue.
    """
    queues = (ctx.aggregated_metrics or {}).get("queue", {})
    if len(queues) < len(ctx.running_replicas) or not queues:
        return ctx.target_num_replicas, {}
    return sum(queues.values()) / ctx.config.target_ongoing_requests, {}
