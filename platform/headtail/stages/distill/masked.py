"""An encoder base from random weights: a small BERT that learns to guess hidden words of queries (masked LM).

In: a shape and texts. Out: a token classifier whose heads are random and whose body has learnt to guess hidden words, and its
tokenizer. One process, fp32, minutes on two cores; for real use start from a hub model. Knows nothing of tasks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from headtail.adapters.progress import progress_bar, say
from headtail.core.tagging import Scheme
from headtail.engines.decisions import output_width
from headtail.engines.device import spin_briefly
from headtail.engines.words import WordTokenizer
from headtail.stages.distill.base import Shape, silence_training
from headtail.stages.distill.batches import UNTAUGHT
from headtail.stages.distill.tokenizer import WORD_SPECIAL, train_word_tokenizer

if TYPE_CHECKING:
    from headtail.stages.distill.encoder import Settings

HIDDEN_SHARE = 0.2  # of words; 8 of 10 are masked, one becomes another, one stays (Devlin et al. 2019)
BATCH_TOKENS = 2048


def make_encoder_base(shape: Shape, texts: Sequence[str], seed: int, settings: Settings, scheme: Scheme) -> tuple[Any, Any]:
    """(BertForTokenClassification in fp32, tokenizer)."""
    spin_briefly()  # before torch is imported
    import torch
    from transformers import BertConfig, BertForMaskedLM, BertForTokenClassification

    silence_training()
    tokenizer = train_word_tokenizer(texts, shape.vocabulary)
    tokenizer.model_max_length = shape.positions
    config = BertConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.feed_forward,
        max_position_embeddings=shape.positions,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=output_width(scheme),
    )
    torch.manual_seed(seed)
    body = BertForMaskedLM(config)
    if settings.pretrain_epochs:
        pretrain(body, tokenizer, texts[: settings.pretrain_rows], settings.pretrain_epochs, settings.pretrain_rate, seed)
    model = BertForTokenClassification(config)
    model.bert.load_state_dict(body.bert.state_dict())
    return model, tokenizer


def pretrain(model: Any, tokenizer: Any, texts: Sequence[str], epochs: float, rate: float, seed: int) -> float:
    """Train `model` to guess hidden words of `texts`; returns the mean loss of the last tenth of the steps."""
    import torch

    reader, rng = WordTokenizer(tokenizer), np.random.default_rng(seed)
    limit = model.config.max_position_embeddings
    reads = [found for found in (reader.read(text) for text in texts) if found.places and len(found.ids) <= limit]
    lengths = np.array([len(found.ids) for found in reads])
    plan = [batch for number in range(math.ceil(epochs)) for batch in _batches(lengths, np.random.default_rng((seed, number)))]
    plan = plan[: max(1, round(len(plan) * epochs / math.ceil(epochs)))]
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    model.train()
    losses, begun = [], time.monotonic()
    with progress_bar("pretrain", len(plan), "steps") as shown:
        for step, chosen in enumerate(plan):
            for group in optimizer.param_groups:
                group["lr"] = _rate(step, len(plan), rate)
            ids, mask, wanted = mask_words([reads[i] for i in chosen], reader, tokenizer.mask_token_id, len(tokenizer), rng)
            loss = model(input_ids=ids, attention_mask=mask, labels=wanted).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(float(loss.detach()))
            shown.advance(1)
    last = float(np.mean(losses[-max(1, len(losses) // 10) :]))
    say(f"pretrain     {len(reads):,} queries, {len(plan):,} steps, loss per hidden word {last:.3f}, {time.monotonic() - begun:.0f} s")
    return last


def mask_words(
    reads: Sequence[Any], reader: WordTokenizer, mask_id: int, vocabulary: int, rng: np.random.Generator
) -> tuple[Any, Any, Any]:
    """(ids, mask, wanted) of one batch: whole words hidden, at least one of each row; wanted only there."""
    import torch

    wide = max(len(found.ids) for found in reads)
    ids = np.full((len(reads), wide), reader.pad, np.int64)
    mask, wanted = np.zeros_like(ids), np.full_like(ids, UNTAUGHT)
    for i, found in enumerate(reads):
        ids[i, : len(found.ids)] = found.ids
        mask[i, : len(found.ids)] = 1
        chosen = rng.random(len(found.places)) < HIDDEN_SHARE
        chosen[rng.integers(len(found.places))] |= not chosen.any()
        ends = [*found.places[1:], found.first - 1]
        for at in np.flatnonzero(chosen):
            here = slice(found.places[at], ends[at])
            wanted[i, here] = ids[i, here]
            how = rng.random()
            if how < 0.8:
                ids[i, here] = mask_id
            elif how < 0.9:
                ids[i, here] = rng.integers(len(WORD_SPECIAL), vocabulary, ends[at] - found.places[at])
    return torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(wanted)


def _batches(lengths: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Rows of like length, about BATCH_TOKENS tokens each, in random order."""
    order = rng.permutation(len(lengths))
    order = order[np.argsort(lengths[order], kind="stable")]
    cut = np.flatnonzero(np.diff(np.cumsum(lengths[order]) // BATCH_TOKENS)) + 1
    found = [part for part in np.split(order, cut) if len(part)]
    return [found[i] for i in rng.permutation(len(found))]


def _rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over a tenth, then linear down to nothing."""
    warmup = max(1, steps // 10)
    return peak * min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
