"""The model that training starts from: loaded, cut to some of its layers, or made with random weights.

In: a BaseModelConfig. Out: a Hugging Face causal language model and its tokenizer, in memory. Random weights are refused
under LoRA: adapters on noise learn noise.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from headtail.core.config import Config
from headtail.core.errors import ConfigError
from headtail.engines.device import quiet_transformers

# Settings with a value per layer: which ones have a sliding window (Gemma, Qwen), are sparse, or have no rotary positions (SmolLM3).
_OF_EACH_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")


class Shape(Config):
    """A Llama-type decoder made from nothing."""

    vocabulary: int = Field(2048, ge=300, description="tokens of the byte-level BPE trained on the training rows")
    hidden: int = Field(192, ge=16, description="width")
    layers: int = Field(6, ge=1, description="depth")
    heads: int = Field(3, ge=1, description="attention heads; hidden / heads is the head's width, best 64")
    feed_forward: int = Field(512, ge=16, description="width of the feed-forward layers")
    positions: int = Field(1024, ge=64, description="longest sequence in tokens")


class BaseModelConfig(Config):
    """What training starts from: exactly one of `model` and `shape`."""

    model: str = Field("", description="hub id, local folder, store ref (distill/...) or shipped model (example:student-base)")
    revision: str = Field("", description="hub revision (commit), required for a hub id")
    layers: int = Field(0, ge=0, description="keep this many layers of `model`, evenly spaced with the first and last; 0 keeps all")
    shape: Shape | None = Field(None, description="make a model of this shape from random weights, with its own tokenizer")

    @model_validator(mode="after")
    def _one(self) -> BaseModelConfig:
        if bool(self.model) == (self.shape is not None):
            raise ValueError("name either base.model or base.shape")
        return self


def silence_training() -> None:
    """transformers' and PEFT's own words off: our progress says what matters."""
    import warnings

    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # peft asks for it on every merge
    quiet_transformers()


def make_decoder_base(shape: Shape, tokenizer: Any, seed: int) -> Any:
    """A LlamaForCausalLM of random fp32 weights for a tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    silence_training()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,  # a multiple of 64 keeps matrix kernels on their fast path
        hidden_size=shape.hidden,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def load_base(path: str, revision: str = "", layers: int = 0, kind: str = "decoder") -> tuple[Any, Any]:
    """(model of a kind in fp32, tokenizer) from a folder or hub id, cut to `layers` layers when asked."""
    from headtail.engines.transformers import load_generator

    silence_training()
    model, tokenizer = load_generator(path, revision=revision, kind=kind)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if layers and layers < model.config.num_hidden_layers:
        keep_layers(model, layers)
    return model, tokenizer


def keep_layers(model: Any, layers: int) -> None:
    """Drop all but `layers` of a model's layers (a usual start for a smaller student); see `spread_layers`."""
    from torch import nn

    body = model.base_model
    stack = next((stack_layers for name in ("encoder", "transformer") if (stack_layers := getattr(body, name, None)) is not None), body)
    name = "layer" if hasattr(stack, "layer") else "layers"
    stack_layers = getattr(stack, name, None)
    if stack_layers is None:
        fix = "set base.layers to 0"
        raise ConfigError("this model's layers cannot be cut", where="base.layers", value=model.config.model_type, fix=fix)
    numbers, config = spread_layers(len(stack_layers), layers), model.config
    kept = nn.ModuleList([stack_layers[i] for i in numbers])
    setattr(stack, name, kept)
    for i, layer in enumerate(kept):
        if hasattr(layer, "self_attn"):  # a decoder's: it finds its part of the cache by this
            layer.self_attn.layer_idx = i
    config.num_hidden_layers = len(kept)
    for of_each in _OF_EACH_LAYER:
        if (values := getattr(config, of_each, None)) is not None:
            setattr(config, of_each, [values[i] for i in numbers])


def spread_layers(available: int, count: int) -> list[int]:
    """Numbers of `count` of the `available` layers, evenly spaced with the first and the last."""
    return sorted({round(i * (available - 1) / max(count - 1, 1)) for i in range(count)})
