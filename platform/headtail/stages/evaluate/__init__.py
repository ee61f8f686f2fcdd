"""Evaluate answers against people's gold, by tier and stratum, with intervals."""

from headtail.stages.evaluate.stage import Config, run

__all__ = ["Config", "run"]
