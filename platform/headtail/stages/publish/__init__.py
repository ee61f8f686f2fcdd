"""Publish: answers become a snapshot, the snapshot a release, the release the current one."""

from headtail.stages.publish.result import Result
from headtail.stages.publish.stage import Config, find_publish, run

__all__ = ["Config", "Result", "find_publish", "run"]
