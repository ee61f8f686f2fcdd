"""Calibrate a student's confidence, and choose from where its answers are sure."""

from headtail.stages.calibrate.result import Result
from headtail.stages.calibrate.stage import Config, run

__all__ = ["Config", "Result", "run"]
