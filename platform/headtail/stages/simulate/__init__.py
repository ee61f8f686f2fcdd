"""Simulate: a day of requests through designs of a server, side by side."""

from headtail.stages.simulate.config import Config
from headtail.stages.simulate.result import Result
from headtail.stages.simulate.stage import run

__all__ = ["Config", "Result", "run"]
