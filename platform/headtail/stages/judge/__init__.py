"""Judge answers with a model: a task whose question is another task's answer. Calibrated against people before it is believed."""

from headtail.stages.judge.result import Result
from headtail.stages.judge.stage import Config, run

__all__ = ["Config", "Result", "run"]
