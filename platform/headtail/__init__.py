"""headtail: an LLM's answers for all of your traffic, at a cost you can bear. Imports no engine or framework."""

__version__ = "0.1.0"
