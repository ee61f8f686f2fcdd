"""Which engine runs a model, started.

In: a ModelConfig, the model's folder, what answers are held to. Out: an Engine. The only module that knows all engines.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from headtail.core import io_format
from headtail.core.errors import ConfigError
from headtail.engines import control
from headtail.engines.base import Bound, Engine, ModelConfig
from headtail.engines.grammar import VERSION


def runs_vllm(model: ModelConfig, kind: str) -> bool:
    """Whether vLLM itself runs this model: students that are no decoders have engines of their own."""
    return model.engine == "vllm" and kind == "decoder"


def text_versions(model: ModelConfig, kind: str) -> int | list[int]:
    """Versions of how an engine in this process reads and writes text: of the grammar, of control tokens, of what reads labels."""
    if not model.traits.in_process:
        return 0
    if runs_vllm(model, kind):
        return [VERSION, control.VERSION]
    from headtail.engines import encoder, transformers

    return encoder.VERSION if kind == "encoder" else [VERSION, control.VERSION, transformers.VERSION]


def check_top(model: ModelConfig, kind: str) -> None:
    """ConfigError unless this engine tells the likeliest tokens by their ids."""
    if not runs_vllm(model, kind):
        raise ConfigError(
            "only a decoder that vLLM runs here tells the likeliest tokens by their ids; an endpoint spells them, others have none",
            where="top_logprobs",
            value=model.engine if model.engine != "vllm" else f"a student of kind {kind}",
            fix="set top_logprobs to 0",
        )


def check_key(model: ModelConfig) -> None:
    """ConfigError when this machine has a key that `model`'s endpoint may not get, or that no request can carry. Opens nothing."""
    if model.traits.endpoint:
        from headtail.engines.openai import key_for

        key_for(model)


def open_engine(config: ModelConfig, path: str, bound: Bound, sampling: dict[str, Any], top: int = 0) -> Engine:
    """Start the engine of `config` on the model at `path` (a local folder or hub id), answers held to `bound`.

    `top`: how many of the likeliest tokens come with each token of an answer.
    """
    schema = None if isinstance(bound, str) else bound  # only models in process write code
    kind = io_format.read_format(Path(path)).kind if config.traits.in_process else "decoder"  # a hub id is a decoder's
    if top:
        check_top(config, kind)
    if config.traits.in_process:
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
