"""The report: everything a loop found, on one page and in one JSON."""

from headtail.stages.report.stage import Config, run
from headtail.stages.report.summary import STATIONS, summarise
from headtail.stages.report.terminal import table

__all__ = ["STATIONS", "Config", "run", "summarise", "table"]
