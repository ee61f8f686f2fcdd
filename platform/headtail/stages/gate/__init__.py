"""Gate: may this student, or this snapshot, be promoted? A statistical test, and its evidence."""

from headtail.stages.gate.stage import Config, run

__all__ = ["Config", "run"]
