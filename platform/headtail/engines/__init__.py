"""The protocol of inference engines: messages in, completions out, as they finish."""

from headtail.engines.base import ENGINES, Bound, Completion, Engine, ModelConfig, Request, Top
from headtail.engines.open import check_key, check_top, open_engine, runs_vllm, text_versions

__all__ = [
    "ENGINES",
    "Bound",
    "Completion",
    "Engine",
    "ModelConfig",
    "Request",
    "Top",
    "check_key",
    "check_top",
    "open_engine",
    "runs_vllm",
    "text_versions",
]
