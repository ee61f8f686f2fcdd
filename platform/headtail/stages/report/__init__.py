"""The report: everything a pipeline found, on one page and in one JSON."""

from headtail.stages.report.flat import flat_summary
from headtail.stages.report.stage import Config, Result, run
from headtail.stages.report.summary import summarise
from headtail.stages.report.terminal import summary_table
from headtail.stages.report.tree import REPORTED_STAGES

__all__ = ["REPORTED_STAGES", "Config", "Result", "flat_summary", "run", "summarise", "summary_table"]
