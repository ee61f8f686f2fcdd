"""Plan: where the head ends, who answers what, how much of the traffic to come that is, and what it costs."""

from headtail.stages.plan.config import Config, Head
from headtail.stages.plan.result import Result
from headtail.stages.plan.stage import run

__all__ = ["Config", "Head", "Result", "run"]
