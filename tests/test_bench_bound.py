"""The bound of a GPU: known sizes come out, and it moves the way it must."""

from __future__ import annotations

import pytest

from bench.bound import H200, ONE_B, bound, kv_cache
from headtail.core.cost import LLAMA_8B as EIGHT_B


def test_shapes_have_the_sizes_that_their_makers_state() -> None:
    assert ONE_B.body + ONE_B.head == pytest.approx(1.236e9, rel=0.002)
    assert EIGHT_B.body + 2 * EIGHT_B.head == pytest.approx(8.03e9, rel=0.002)  # input and output each have an embedding
    assert kv_cache(EIGHT_B, 2) == 131_072  # 128 KiB a token, as Llama 3.1 8B needs


def test_one_row_is_bound_by_the_weights_alone() -> None:
    made = bound(EIGHT_B, H200, weight_bytes=2, rows=1, fresh=0, cached=0, out=1e-9)
    assert made.step_s == pytest.approx((EIGHT_B.body + EIGHT_B.head) * 2 / 4.8e12)
    assert made.limit == "bandwidth"


def test_more_rows_share_the_weights_until_flops_or_kv_limit() -> None:
    few, many = (bound(ONE_B, H200, weight_bytes=2, rows=rows, fresh=100, cached=0, out=24) for rows in (8, 512))
    assert many.rows_per_s > few.rows_per_s
    assert many.step_s > few.step_s
    wide = bound(EIGHT_B, H200, weight_bytes=2, rows=4096, fresh=0, cached=0, out=24)
    assert wide.limit == "FLOPs"
    assert wide.step_s == pytest.approx(2 * (EIGHT_B.body + EIGHT_B.head) * 4096 / 989e12)


def test_fp8_halves_what_weights_cost() -> None:
    bf16, fp8 = (bound(EIGHT_B, H200, weight_bytes=size, rows=1, fresh=10, cached=0, out=1e-9) for size in (2, 1))
    assert bf16.step_s / fp8.step_s == pytest.approx(2, rel=0.01)
