"""The report: everything a pipeline found, on one page and in one JSON."""

from headtail.stages.report.stage import Config, run
from headtail.stages.report.summary import REPORTED_STAGES, summarise
from headtail.stages.report.terminal import summary_table

__all__ = ["REPORTED_STAGES", "Config", "run", "summarise", "summary_table"]
