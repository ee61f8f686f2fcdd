"""headtail: batch answers of a strong LLM for the head of a query log, and distilled students for the other queries. Imports no engine."""

import os

from headtail.adapters.proxies import spare_loopback

__version__ = "0.1.0"

spare_loopback(os.environ)  # before any client is made, and for the processes that are started from here
