"""Gate: may this student, or this snapshot, be promoted? A statistical test, and its evidence."""

from headtail.stages.gate.result import Result
from headtail.stages.gate.stage import Config, latest_verdict, run

__all__ = ["Config", "Result", "latest_verdict", "run"]
