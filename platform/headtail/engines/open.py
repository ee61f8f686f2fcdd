"""Which engine runs a model, started.

In: a ModelConfig, the model's folder, what answers are held to. Out: an Engine. The only module that knows all engines.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from headtail.core import io_format
from headtail.core.errors import ConfigError
from headtail.engines.base import IN_PROCESS, Bound, Engine, ModelConfig


def check_top(engine: str, kind: str) -> None:
    """ConfigError unless this engine tells the likeliest tokens by their ids."""
    if engine != "vllm" or kind != "decoder":
        raise ConfigError(
            "only a decoder that vLLM runs here tells the likeliest tokens by their ids; an endpoint spells them, others have none",
            where="top_logprobs",
            value=engine if engine != "vllm" else f"a student of kind {kind}",
            fix="set top_logprobs to 0",
        )


def open_engine(config: ModelConfig, path: str, bound: Bound, sampling: dict[str, Any], top: int = 0) -> Engine:
    """Start the engine of `config` on the model at `path` (a local folder or hub id), answers held to `bound`.

    `top`: how many of the likeliest tokens come with each token of an answer.
    """
    schema = None if isinstance(bound, str) else bound  # only models in process write code
    kind = io_format.read_format(Path(path)).kind if config.engine in IN_PROCESS else "decoder"  # a hub id is a decoder's
    if top:
        check_top(config.engine, kind)
    if config.engine in IN_PROCESS:
        if kind == "encoder":
            from headtail.engines.encoder import EncoderEngine

            return EncoderEngine(config, path, schema, sampling)
        if kind == "seq2seq" or config.engine == "transformers":
            from headtail.engines.transformers import TransformersEngine

            return TransformersEngine(config, path, bound, sampling)
        from headtail.engines.vllm import VllmEngine

        return VllmEngine(config, path, bound, sampling, top)
    if config.engine == "openai":
        from headtail.engines.openai import OpenAIEngine

        return OpenAIEngine(config, path, schema, sampling)
    from headtail.engines.null import NullEngine

    return NullEngine(schema, path, int(sampling.get("n", 1)))
