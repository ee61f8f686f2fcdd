"""headtail: an LLM's answers for all of your traffic, at a cost you can bear. Imports no engine or framework."""

import os

from headtail.adapters.proxies import spare_loopback

__version__ = "0.1.0"

spare_loopback(os.environ)  # before any client is made, and for the processes that are started from here
