"""The stated formula: against counts known from elsewhere, and against a sum written out token by token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headtail.core.cost import ENCODER_30M, LLAMA_8B, QWEN_HALF_B, ModelShape, Tokens, decoder_flops, encoder_flops, shape_of, tokens_of
from headtail.core.errors import ConfigError


@pytest.mark.parametrize(
    "shape, weights, tied, published",
    [(LLAMA_8B, 8_030_261_248, False, 1e-3), (QWEN_HALF_B, 494_032_768, True, 1e-3), (ENCODER_30M, 33_360_000, True, 0.02)],
)
def test_shapes_have_the_weights_that_are_published(shape: ModelShape, weights: int, tied: bool, published: float) -> None:
    """Norms, biases and positions, which are left out, are what differs."""
    assert shape.body + shape.head * (1 if tied else 2) == pytest.approx(weights, rel=published)


@given(st.integers(1, 60), st.integers(0, 40), st.integers(0, 60))
def test_a_decoders_row_is_the_sum_over_its_tokens(prompt: int, answer: int, cached: int) -> None:
    cached, shape = min(cached, prompt), ModelShape(3, 64, 4, 2, 16, 96, 500)
    tokens = sum(2 * shape.body + shape.attention * position for position in range(cached + 1, prompt + answer + 1))
    assert decoder_flops(shape, Tokens(prompt, answer, cached)) == tokens + 2 * shape.head * answer


def test_body_and_attention_are_what_a_layer_does() -> None:
    """One layer, written out: q, k, v, o, gate, up, down; then a score and a value per head for one token looked at."""
    shape = ModelShape(1, 64, 4, 2, 16, 96, 500)
    assert shape.body == 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96
    assert shape.attention == 4 * (2 * 16 + 2 * 16)


def test_an_encoders_row_looks_both_ways_and_writes_nothing() -> None:
    shape = ModelShape(2, 64, 4, 4, 16, 128, 500, gated=False)
    assert encoder_flops(shape, Tokens(10, 30)) == 10 * (2 * shape.body + 10 * shape.attention)


def test_what_is_cached_costs_nothing_but_is_looked_at() -> None:
    free = decoder_flops(LLAMA_8B, Tokens(1000, 1, 1000)) / decoder_flops(LLAMA_8B, Tokens(0, 1, 0))
    assert 1.0 < free < 1.1


def test_the_sizes_that_are_spoken_of() -> None:
    """An 8 B teacher under a prompt of 400 tokens, 300 of them shared and cached, against students that see the query alone."""
    teacher = decoder_flops(LLAMA_8B, Tokens(400, 40, 300))
    assert teacher / decoder_flops(QWEN_HALF_B, Tokens(8, 8)) > 100
    assert teacher / encoder_flops(ENCODER_30M, Tokens(8, 0)) > 1000


def test_a_shape_is_read_from_a_config(teacher_path: Path) -> None:
    shape = shape_of(json.loads((teacher_path / "config.json").read_text()))
    assert shape.gated
    assert shape.heads * shape.head_width == shape.hidden
    bert = {"num_attention_heads": 12, "hidden_size": 384, "num_hidden_layers": 12, "intermediate_size": 1536, "vocab_size": 30522}
    assert shape_of({**bert, "hidden_act": "gelu"}) == ENCODER_30M
    with pytest.raises(ConfigError, match="num_attention_heads"):
        shape_of({"model_type": "t5", "d_model": 8})


def test_tokens_come_from_a_receipt() -> None:
    metrics = {"tokens_in_per_row": 60.0, "tokens_out_per_row": 20.0, "prefix_hit_rate": 0.5}
    assert tokens_of(metrics) == Tokens(60.0, 20.0, 30.0)
    assert tokens_of({"tokens_in_per_row": 60.0, "tokens_out_per_row": 20.0}).cached == 0
