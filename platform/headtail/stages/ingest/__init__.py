"""Ingest: a query log of any size to counted queries, holdout traffic and human labels."""

from headtail.stages.ingest.result import Result
from headtail.stages.ingest.stage import Config, LogColumns, find_labels, find_log, run

__all__ = ["Config", "LogColumns", "Result", "find_labels", "find_log", "run"]
