"""Evaluate answers against human labels, by answer source and stratum, with intervals."""

from headtail.stages.evaluate.result import Result
from headtail.stages.evaluate.stage import Config, run

__all__ = ["Config", "Result", "run"]
