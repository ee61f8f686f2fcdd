"""Experiment: what a release changes for users, by stratum, and whether that holds for all traffic."""

from headtail.stages.experiment.config import Config
from headtail.stages.experiment.result import Result
from headtail.stages.experiment.stage import run

__all__ = ["Config", "Result", "run"]
