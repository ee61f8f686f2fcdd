"""Precompute: the answers to whole tables of queries, by a teacher or a batch student."""

from headtail.stages.precompute.result import Result
from headtail.stages.precompute.stage import Config, forecast, run

__all__ = ["Config", "Result", "forecast", "run"]
