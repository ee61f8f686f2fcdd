"""From trained weights to a model that can be served: LoRA merged in, saved in Hugging Face format, checked.

In: base folder and trained folder. Out: a merged folder, and how far its logits are from those of base + adapter.
An unmerged adapter costs a third to a half of the throughput in serving. Knows nothing of training.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from headtail.core.errors import TrainingError
from headtail.stages.distill.batches import Batch
from headtail.stages.distill.learner import Learner

MAX_DRIFT = 0.05  # share of the logits' standard deviation: bf16 rounding of weights stays well below, a lost adapter well above


def merge_lora(learner: Learner, base: Any, adapter: Path, into: Path, probes: list[Batch]) -> float:
    """Write base + adapter, merged in fp32 and stored in bf16, to `into` (which holds the tokenizer); returns the drift of its logits.

    The drift is the root mean square difference of logits on the probes over their standard deviation, between adapter
    applied at run time and the stored merged weights. TrainingError above MAX_DRIFT.
    """
    import torch
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(base, str(adapter))
    adapted.eval()
    before = [_logits(learner, adapted, batch) for batch in probes]
    merged = adapted.merge_and_unload()
    merged.to(torch.bfloat16).save_pretrained(into, safe_serialization=True)
    return _compare_logits(learner, before, into, probes)


def check_saved(learner: Learner, trained: Any, into: Path, probes: list[Batch]) -> float:
    """The drift between a model as it was trained and as it is loaded from `into` again. TrainingError above MAX_DRIFT."""
    trained.eval()
    return _compare_logits(learner, [_logits(learner, trained, batch) for batch in probes], into, probes)


def _compare_logits(learner: Learner, before: list[np.ndarray], folder: Path, probes: list[Batch]) -> float:
    again, _ = learner.load(str(folder))
    again.eval()
    drift = relative_drift(before, (_logits(learner, again, batch) for batch in probes))
    if not drift <= MAX_DRIFT:
        what = "the saved model, loaded again, does not give the logits of the one that was trained"
        raise TrainingError(what, value=f"drift {drift:.4f}", fix=f"expected at most {MAX_DRIFT}")
    return drift


def relative_drift(before: Iterable[np.ndarray], after: Iterable[np.ndarray]) -> float:
    """Root mean square difference over the standard deviation of `before`. Of `after` one array is held at a time."""
    count, total, squares, apart = 0, 0.0, 0.0, 0.0
    for one, other in zip(before, after, strict=True):
        count += one.size
        total += float(one.sum(dtype=np.float64))
        squares += float(np.square(one).sum(dtype=np.float64))
        apart += float(np.square(one - other).sum(dtype=np.float64))
    deviation = math.sqrt(max(squares / count - (total / count) ** 2, 0.0))
    return math.sqrt(apart / count) / (deviation or math.nan)


def _logits(learner: Learner, model: Any, batch: Batch) -> np.ndarray:
    import torch

    with torch.no_grad():
        arrays = {name: torch.from_numpy(array) for name, array in batch.arrays.items()}
        return np.asarray(learner.outputs(model, arrays).float().numpy())
