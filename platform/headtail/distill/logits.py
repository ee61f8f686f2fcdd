"""Logit distillation: the teacher's k likeliest tokens at every token of an answer, stored once, learnt from at every step.

In: a teacher with the student's vocabulary, and examples. Out: per example two flat lists of answer tokens times k, token ids
(int32) and log-probabilities (float16): 6 k bytes a token before compression; and the loss that learns from them. The teacher
reads its answers with one forward pass per row and generates nothing, so answers that a person corrected have logits too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from headtail.config import Config
from headtail.errors import ConfigError
from headtail.form import Form
from headtail.models import Found

COLUMNS = ("teacher_ids", "teacher_logprobs")
ROWS = 16  # rows of one forward pass of the teacher
_FLOOR = 1e-6  # probability below which what is left beside the k tokens counts as nothing


class Logits(Config):
    """Learning from more than the one token that was written (Hinton et al. 2015, with the k likeliest tokens and the rest)."""

    teacher: str = Field(description="model whose logits are learnt: it must have the student's vocabulary; as base.model")
    revision: str = Field("", description="hub revision (commit), required for a hub id")
    k: int = Field(8, ge=1, le=256, description="tokens kept at each position: 6 bytes each")
    share: float = Field(
        0.5, gt=0, le=1, description="share of the loss; the rest is that of the written token. 1 learns from logits alone"
    )


def check_logits(student: str, asked: Form, tokenizer: Any, teacher: Found) -> None:
    """ConfigError when the teacher cannot read what the student reads and writes: kind, form, token ids."""
    from transformers import AutoTokenizer

    if student != "decoder" or not asked.default:
        raise ConfigError(
            "only a decoder in the default form learns from a teacher's logits: the teacher knows no other",
            where="logits",
            value=f"{student}, prompt {asked.prompt}, answer {asked.answer}",
            fix="set logits to null, or form to {prompt: task, answer: json}",
        )
    if AutoTokenizer.from_pretrained(teacher.path).get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            "the teacher's vocabulary is not the student's: their logits cannot be compared",
            where="logits.teacher",
            value=teacher.name,
            fix="start from some of the teacher's layers (base.model and base.layers), or set logits to null",
        )


def soft_loss(scores: Any, ids: Any, logprobs: Any) -> Any:
    """Kullback-Leibler divergence of student from teacher, per position, over the k tokens and one bucket for all others.

    Shapes: scores (n, vocabulary) fp32; ids, logprobs (n, k). With k the whole vocabulary it is the full divergence, else a
    lower bound of it: the bucket keeps the student from being pushed to put all its mass on the k.
    """
    import torch

    mine = scores.log_softmax(-1).gather(1, ids)
    theirs = logprobs.float()
    each = (theirs.exp() * (theirs - mine)).sum(-1)
    rest = (1 - theirs.exp().sum(-1)).clamp(min=0)
    left = (1 - mine.exp().sum(-1)).clamp(min=_FLOOR)
    return each + torch.where(rest > _FLOOR, torch.special.xlogy(rest, rest) - rest * left.log(), torch.zeros_like(rest))


def top_k(model: Any, examples: pa.Table, k: int, pad: int, device: str) -> pa.Table:
    """COLUMNS for examples (ids, answer_start), in their order."""
    import torch

    from headtail.distill.batches import collate, columns

    rows = columns(examples)
    order = np.argsort(rows["length"], kind="stable")
    found: list[tuple[np.ndarray, np.ndarray]] = [(np.zeros(0), np.zeros(0))] * len(order)
    model.eval().to(device)
    for begin in range(0, len(order), ROWS):
        chosen = order[begin : begin + ROWS]
        batch = collate([rows["ids"][i] for i in chosen], rows["answer_start"][chosen], np.ones(len(chosen)), pad)
        arrays = {name: torch.from_numpy(array).to(device) for name, array in batch.arrays.items()}
        with torch.no_grad():
            scores = model(input_ids=arrays["ids"], attention_mask=arrays["mask"], use_cache=False).logits[:, :-1]
            best = scores[arrays["labels"][:, 1:] != -100].float().log_softmax(-1).topk(k, dim=-1)
        ids, logprobs = best.indices.cpu().numpy().astype(np.int32), best.values.cpu().numpy().astype(np.float16)
        ends = np.cumsum([len(rows["ids"][i]) - rows["answer_start"][i] for i in chosen])[:-1]
        for i, a, b in zip(chosen, np.split(ids, ends), np.split(logprobs, ends), strict=True):
            found[i] = (a.ravel(), b.ravel())
    kinds = (pa.list_(pa.int32()), pa.list_(pa.float16()))
    return pa.table({name: pa.array([one[j] for one in found], kinds[j]) for j, name in enumerate(COLUMNS)})
