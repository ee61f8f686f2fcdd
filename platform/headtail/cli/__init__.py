"""The command line: one command per stage, the same flags everywhere, errors that say what to do."""

from headtail.cli.entry import app, job, main
from headtail.cli.options import STAGES, read_config

__all__ = ["STAGES", "app", "job", "main", "read_config"]
