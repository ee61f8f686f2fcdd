"""Curate a teacher's answers into the training set that students learn from."""

from headtail.stages.curate.inspection import Suspicion
from headtail.stages.curate.stage import Config, Result, run

__all__ = ["Config", "Result", "Suspicion", "run"]
