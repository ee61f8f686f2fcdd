"""Logit distillation: the teacher's k likeliest tokens at every token of an answer, stored once, learnt from at every step.

In: examples, and training rows with what was stored when the teacher answered, or a teacher with the student's vocabulary. Out:
per example two flat lists of answer tokens times k, token ids (int32) and log-probabilities (float16): 6 k bytes a token before
compression; and the loss that learns from them. A teacher that is asked reads its answers with one forward pass per row and
generates nothing, so answers that a person corrected have logits too; stored ones are those of the teacher's own words.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from headtail.core.config import Config
from headtail.core.errors import ConfigError
from headtail.core.io_format import ModelFormat
from headtail.core.receipt import Receipt
from headtail.core.rows import TOP
from headtail.engines.models import ResolvedModel
from headtail.engines.tokens import load_tokenizer, vocabulary_fingerprint
from headtail.stages.distill.batches import UNTAUGHT, collate, example_columns
from headtail.stages.precompute.result import Result as PrecomputeResult

COLUMNS = ("teacher_ids", "teacher_logprobs")
KINDS = (pa.list_(pa.int32()), pa.list_(pa.float16()))
ROWS = 16  # rows of one forward pass of the teacher
_FLOOR = 1e-6  # probability below which the tokens beside the k count as nothing


class Logits(Config):
    """Learning from more than the one token that was written (Hinton et al. 2015, with the k likeliest tokens and the rest)."""

    teacher: str = Field(
        "",
        description="model whose logits are learnt; it is asked before training and must have the student's "
        "vocabulary; named as base.model is. "
        "Empty: the likeliest tokens that are stored with the training rows (precompute's top_logprobs)",
    )
    revision: str = Field("", description="hub revision (commit), required for a hub id")
    k: int = Field(8, ge=1, le=256, description="tokens kept at each position: 6 bytes each")
    share: float = Field(
        0.5, gt=0, le=1, description="share of this loss; the rest is the loss of the written token. 1 learns from logits only"
    )

    @property
    def stored(self) -> int:
        """How many of the stored tokens are learnt from; 0: a teacher is asked."""
        return 0 if self.teacher else self.k


def check_logits(student: str, student_format: ModelFormat, tokenizer: Any, teacher: ResolvedModel, revision: str = "") -> None:
    """ConfigError when the teacher cannot read what the student reads and writes: kind, I/O format, token ids."""
    if student != "decoder" or not student_format.default:
        raise ConfigError(
            "only a decoder in the default I/O format learns from a teacher's logits: the teacher knows no other",
            where="logits",
            value=f"{student}, prompt {student_format.prompt}, output {student_format.output}",
            fix="set logits to null, or I/O format to {prompt: full, output: json}",
        )
    if load_tokenizer(teacher.path, revision).get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            "the teacher's vocabulary is not the student's: their logits cannot be compared",
            where="logits.teacher",
            value=teacher.name,
            fix="start from some of the teacher's layers (base.model and base.layers), or set logits to null",
        )


def check_stored(student: str, tokenizer: Any, answers: Receipt[PrecomputeResult] | None, where: str) -> None:
    """ConfigError unless the student writes tokens, and the teacher's answers hold their likeliest under the same ids."""
    if student != "decoder":
        fix = "set logits to null, or student to decoder"
        raise ConfigError("only a decoder learns from stored log-probabilities", where="logits", value=student, fix=fix)
    theirs = answers.result.vocabulary if answers is not None else ""
    if not theirs:
        raise ConfigError(
            "no likeliest tokens are stored with these training rows",
            where=f"logits.teacher is empty; {where}",
            value=answers.path if answers is not None else "rows that no teacher's answers are known of",
            fix="run precompute with top_logprobs=8, then curate again; or name logits.teacher; or set logits to null",
        )
    if theirs != vocabulary_fingerprint(tokenizer):
        raise ConfigError(
            "the teacher's vocabulary is not the student's: their log-probabilities cannot be compared",
            where=where,
            value=str(answers and answers.path),
            fix="start from some of the teacher's layers (base.model and base.layers), or set logits to null",
        )


def add_stored_logits(examples: pa.Table, training_set: pa.Table, k: int) -> pa.Table:
    """A decoder's examples with COLUMNS out of TOP of the training rows (same order), and `soft`: whether a row had them.

    It has them when the tokens stored are the very ones that the student is to write. Another row learns from the written
    token alone: that is what a teacher comes to that is certain of it.
    """
    asked, kept = example_columns(examples.select(["ids", "answer_start"])), example_columns(training_set.select(TOP.names))
    ids, logprobs, soft = [], [], []
    for row, start, tokens, best, sure in zip(asked["ids"], asked["answer_start"], *kept.values(), strict=True):
        written = row[start:]
        soft.append(len(written) > 0 and np.array_equal(tokens, written))
        if soft[-1]:
            wide = len(best) // len(written)
            if wide < k:
                what = "fewer of the likeliest tokens are stored than are to be learnt from"
                raise ConfigError(what, where="logits.k", value=f"{k}, stored are {wide}", fix=f"set logits.k to {wide}")
            ids.append(best.reshape(-1, wide)[:, :k].ravel())
            logprobs.append(sure.reshape(-1, wide)[:, :k].ravel())
        else:
            alone = np.zeros((len(written), k), np.int32)
            alone[:, 0] = written
            certain = np.full(alone.shape, np.finfo(np.float16).min, np.float16)
            certain[:, 0] = 0
            ids.append(alone.ravel())
            logprobs.append(certain.ravel())
    for name, values, kind in zip(COLUMNS, (ids, logprobs), KINDS, strict=True):
        examples = examples.append_column(name, pa.array(values, kind))
    return examples.append_column("soft", pa.array(soft, pa.bool_()))


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


def answer_scores(engine: Any, arrays: Mapping[str, Any]) -> Any:
    """A decoder's logits at the tokens that are to be learnt, shape (tokens, vocabulary), fp32. `arrays`: a Batch's, as tensors.

    Only those tokens meet the head: of a vocabulary of 150,000 it is a quarter of a 0.5 B model's work, and the logits of all tokens are
    its largest tensor by far (262,144 tokens: 1 MB for each token read).
    """
    chosen = arrays["labels"][:, 1:] != UNTAUGHT
    head = getattr(engine, "module", engine).get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, given: (given[0][:, :-1][chosen],))
    try:
        return engine(input_ids=arrays["ids"], attention_mask=arrays["mask"], use_cache=False).logits.float()
    finally:
        hook.remove()


def top_k(model: Any, examples: pa.Table, k: int, pad: int, device: str) -> pa.Table:
    """COLUMNS for examples (ids, answer_start), in their order."""
    import torch

    rows = example_columns(examples)
    order = np.argsort(rows["length"], kind="stable")
    found: list[tuple[np.ndarray, np.ndarray]] = [(np.zeros(0), np.zeros(0))] * len(order)
    model.eval().to(device)
    for begin in range(0, len(order), ROWS):
        chosen = order[begin : begin + ROWS]
        batch = collate([rows["ids"][i] for i in chosen], rows["answer_start"][chosen], np.ones(len(chosen)), pad)
        arrays = {name: torch.from_numpy(array).to(device) for name, array in batch.arrays.items()}
        with torch.no_grad():
            best = answer_scores(model, arrays).log_softmax(-1).topk(k, dim=-1)
        ids, logprobs = best.indices.cpu().numpy().astype(np.int32), best.values.cpu().numpy().astype(np.float16)
        ends = np.cumsum([len(rows["ids"][i]) - rows["answer_start"][i] for i in chosen])[:-1]
        for i, a, b in zip(chosen, np.split(ids, ends), np.split(logprobs, ends), strict=True):
            found[i] = (a.ravel(), b.ravel())
    return pa.table({name: pa.array([one[j] for one in found], KINDS[j]) for j, name in enumerate(COLUMNS)})
