"""Ingest: a query log of any size to counted queries, held-out later traffic and gold."""

from headtail.stages.ingest.stage import Columns, Config, run

__all__ = ["Columns", "Config", "run"]
