"""The operations per row, from token counts and a model's shape: how a measured ratio changes with model size.

In: a Shape (from a config.json, or a known one) and the Tokens of a row (from a receipt's metrics). Out: floating point
operations per row. Pure. It is a count, not a time: it leaves out padding, memory traffic (the limit when few rows are
decoded together) and how well a device is used. docs/cost.md has the formula with its figures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from headtail.core.errors import ConfigError


class Tokens(NamedTuple):
    """Mean per row. `cached`: those of the prompt that an engine found in its prefix cache."""

    prompt: float
    answer: float
    cached: float = 0.0


@dataclass(frozen=True)
class ModelShape:
    """A transformer's matrices. `gated`: feed-forward layers have three matrices (SwiGLU), else two."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_width: int
    feed_forward: int
    vocabulary: int
    gated: bool = True

    @property
    def body(self) -> int:
        """Weights that every token is multiplied with: attention and feed-forward, no embeddings, norms or biases."""
        attention = 2 * self.hidden * self.head_width * (self.heads + self.kv_heads)
        return self.layers * (attention + (3 if self.gated else 2) * self.hidden * self.feed_forward)

    @property
    def head(self) -> int:
        """Weights that a state is multiplied with to choose the next token. Looking embeddings up costs no arithmetic."""
        return self.vocabulary * self.hidden

    @property
    def attention(self) -> int:
        """Operations by which one token looks at one other: a product for the score, one for the value, in every head."""
        return 4 * self.layers * self.heads * self.head_width


LLAMA_8B = ModelShape(32, 4096, 32, 8, 128, 14336, 128256)  # Llama 3.1 8B: 8.03e9 weights with embeddings and head
QWEN_HALF_B = ModelShape(24, 896, 14, 2, 64, 4864, 151936)  # Qwen 2.5 0.5B: 0.494e9 with its tied embeddings
ENCODER_30M = ModelShape(12, 384, 12, 12, 32, 1536, 30522, gated=False)  # MiniLM-L12-H384: 33e6 with embeddings


def shape_of(config: Mapping[str, Any]) -> ModelShape:
    """The Shape in a Hugging Face config.json of a Llama type or BERT type model."""
    try:
        heads = int(config["num_attention_heads"])
        hidden = int(config["hidden_size"])
        return ModelShape(
            layers=int(config["num_hidden_layers"]),
            hidden=hidden,
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_width=int(config.get("head_dim") or hidden // heads),
            feed_forward=int(config["intermediate_size"]),
            vocabulary=int(config["vocab_size"]),
            gated=config.get("hidden_act") in ("silu", "swiglu"),
        )
    except KeyError as error:
        kind = str(config.get("model_type", "?"))
        raise ConfigError(f"no {error} in it", where="config.json", value=kind, fix="a Llama type or BERT type model has one") from None


def tokens_of(metrics: Mapping[str, float]) -> Tokens:
    """A row's Tokens from the metrics of a precompute receipt. Without a hit rate, nothing was found cached."""
    prompt = metrics["tokens_in_per_row"]
    return Tokens(prompt, metrics["tokens_out_per_row"], prompt * metrics.get("prefix_hit_rate", 0.0))


def decoder_flops(shape: ModelShape, tokens: Tokens) -> float:
    """Operations for one row of a decoder.

    2 x body x (prompt - cached + answer) + 2 x head x answer + attention x (sum of the positions from cached + 1 to the last):
    a multiplication and an addition per weight and token (Kaplan et al. 2020, section 2.1), the head where a token is chosen.
    """
    last = tokens.prompt + tokens.answer
    seen = (last * (last + 1) - tokens.cached * (tokens.cached + 1)) / 2
    return 2 * shape.body * (last - tokens.cached) + 2 * shape.head * tokens.answer + shape.attention * seen


def encoder_flops(shape: ModelShape, tokens: Tokens) -> float:
    """Operations for one row of an encoder: every token looks at all others, and nothing is written.

    Its answer's head has a few labels instead of a vocabulary and is left out.
    """
    return 2 * shape.body * tokens.prompt + shape.attention * tokens.prompt**2
