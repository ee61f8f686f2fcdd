"""Serve a release over HTTP: the cache, the student behind it, the fallback behind that."""

from headtail.stages.serve.config import Config
from headtail.stages.serve.stage import Server, from_args, run_forever, start_server

__all__ = ["Config", "Server", "from_args", "run_forever", "start_server"]
