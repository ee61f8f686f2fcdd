"""The most that a GPU can do by its own data sheet: rows per second of a decoder, from bytes moved and FLOPs done.

    python -m tests.bench.bound

In: a model's shape, a device's bandwidth and peak, tokens of a row, rows decoded together. Out: seconds per decode step and
rows per second, and which of the two limits them. It is what figures measured on a GPU are held against; it measures nothing.

A step that decodes one token of each of B rows reads every weight once and each row's KV cache once, and does 2 FLOPs per weight and
row (Pope et al. 2022, "Efficiently scaling transformer inference"); a prompt's tokens cost 2 FLOPs per weight each and read the
weights once per 8192 of them. Attention's own FLOPs, launch times, sampling and grammar masks are left out, so no engine reaches it.
"""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table

from headtail.adapters.progress import console
from headtail.core.cost import LLAMA_8B, ModelShape

PREFILL_TOKENS = 8192  # prompt tokens of one step


@dataclass(frozen=True)
class Device:
    """A GPU's data sheet: bytes/s of memory, dense FLOP/s by bytes per weight."""

    name: str
    bandwidth: float
    flops: dict[int, float]


@dataclass(frozen=True)
class Bound:
    """Seconds of one decode step and of one row's share of prefill, rows/s, and what the decode step waits for."""

    step_s: float
    prefill_s: float
    rows_per_s: float
    limit: str


H200 = Device("H200 SXM", 4.8e12, {2: 989e12, 1: 1979e12})  # NVIDIA H200 data sheet, 2024; without sparsity
ONE_B = ModelShape(16, 2048, 32, 8, 64, 8192, 128_256)  # Llama 3.2 1B, whose output shares the input's embedding
SHAPES = {"1 B (Llama 3.2)": ONE_B, "8 B (Llama 3.1)": LLAMA_8B}


def kv_cache(shape: ModelShape, each: int) -> int:
    """Bytes of KV cache of one token at `each` bytes per number."""
    return 2 * shape.layers * shape.kv_heads * shape.head_width * each


def bound(
    shape: ModelShape, device: Device, *, weight_bytes: int, kv_bytes: int = 2, rows: int, fresh: float, cached: float, out: float
) -> Bound:
    """Of rows with `fresh` prompt tokens to compute, `cached` ones that were found, and `out` answer tokens, `rows` decoded together."""
    peak, used = device.flops[weight_bytes], shape.body + shape.head
    weights = used * weight_bytes
    context = fresh + cached + out / 2  # of a row, on average while it decodes
    moved = (weights + rows * context * kv_cache(shape, kv_bytes)) / device.bandwidth
    done = 2 * used * rows / peak
    step = max(moved, done)
    prefill = fresh * max(2 * used / peak, weights / PREFILL_TOKENS / device.bandwidth)
    return Bound(step, prefill, 1 / (prefill + out * step / rows), "bandwidth" if moved >= done else "FLOPs")


def main() -> None:
    """The table of docs/engines.md."""
    heads = ("shape", "weights", "rows together", "decode step, ms", "limit", "rows/s at most")
    found = Table(*heads, title="H200, 400 + 100 tokens in, 24 out")
    for called, shape in SHAPES.items():
        for weight_bytes, name in ((2, "bf16"), (1, "FP8")):
            for rows in (256, 1024):
                made = bound(shape, H200, weight_bytes=weight_bytes, rows=rows, fresh=100, cached=400, out=24)
                found.add_row(called, name, f"{rows:,}", f"{1000 * made.step_s:.2f}", made.limit, f"{made.rows_per_s:,.0f}")
    console.print(found)


if __name__ == "__main__":
    main()
