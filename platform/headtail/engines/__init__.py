"""Inference engines behind one door: messages in, completions out, as they finish."""

from headtail.engines.base import IN_PROCESS, Bound, Completion, Engine, ModelConfig, Request, Top
from headtail.engines.open import check_top, open_engine

__all__ = ["IN_PROCESS", "Bound", "Completion", "Engine", "ModelConfig", "Request", "Top", "check_top", "open_engine"]
