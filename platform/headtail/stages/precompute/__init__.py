"""Precompute: the answers to whole tables of queries, by a teacher or a batch student."""

from headtail.stages.precompute.stage import Config, plan, run

__all__ = ["Config", "plan", "run"]
