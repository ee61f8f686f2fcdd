"""Gate: may this student, or this snapshot, be promoted? A statistical test, and its evidence."""

from headtail.stages.gate.stage import Config, latest_verdict, run, verdict

__all__ = ["Config", "latest_verdict", "run", "verdict"]
