"""Engine for encoder students: one forward pass classifies the words of many queries; no text is written.

In: Requests whose last message is a query alone (a line break, then its side inputs), a model folder with labels.json.
Out: Completions with the task's JSON. Each decision (where a piece begins, its label, a word's spelling, a field's value) is one
entry of `token_logprobs`, on the characters it decides, so that confidence is read as for any engine; `tokens_out` counts them.
Rows are read ahead, sorted by length and cut into batches. Knows nothing of tasks, stores or how the model was trained.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from headtail.core import record
from headtail.core.config import build_config
from headtail.core.errors import ConfigError, EngineError
from headtail.core.keys import fingerprint
from headtail.core.spelling import SpellingIndex
from headtail.core.tagging import Scheme
from headtail.engines.base import Completion, ModelConfig, Request
from headtail.engines.batches import BatchEngine, Prompt
from headtail.engines.decisions import AnswerWriter, Decisions, decide_tags, output_width
from headtail.engines.device import precision, quiet_transformers
from headtail.engines.tokens import load_tokenizer
from headtail.engines.words import WordTokenizer, WordTokens, split_prompt

LABELS = "labels.json"  # beside the weights: the Scheme
VERSION = 2  # raise it when the same weights answer otherwise
CPU_ROOM = (256, 4096)  # rows and tokens of a batch: see docs/engines.md
GPU_ROOM = (2048, 65536)


class EncoderEngine(BatchEngine):
    """A loaded encoder."""

    def __init__(self, config: ModelConfig, path: str, schema: dict[str, Any] | None, sampling: dict[str, Any]) -> None:
        super().__init__(config, CPU_ROOM, GPU_ROOM)
        self.scheme = read_scheme(path, schema)
        model, tokenizer = load_encoder(path, self.scheme, precision(config))
        self._reader, self._near, self._writer = WordTokenizer(tokenizer), SpellingIndex(self.scheme.corrections), AnswerWriter(self.scheme)
        self._limit = min(config.max_model_len, max_positions(model))
        self._typed = getattr(model.config, "type_vocab_size", 0) >= 2
        self._ready(model)

    def facts(self) -> dict[str, Any]:
        return {"engine": "encoder", **super().facts(), "structured_outputs": "labels", "corrections": len(self.scheme.corrections)}

    def _prompts(self, window: Sequence[Request]) -> Iterator[tuple[Prompt, str]]:
        for request in window:
            query, beside = split_prompt(request.messages[-1]["content"])
            tokens = self._reader.read(query, beside)
            problem = "" if tokens.places else "the query is empty"
            if tokens.places and len(tokens.ids) > self._limit:
                problem = f"the query has {len(tokens.ids)} tokens; at most {self._limit} fit"
            yield (request, (query, tokens), tokens.ids), problem

    def _answer(self, batch: Sequence[Prompt]) -> Iterator[Completion]:
        decided = self._decide([query for _, (query, _), _ in batch], [found for _, (_, found), _ in batch])
        for (request, (query, found), ids), row in zip(batch, decided, strict=True):
            texts, logprobs, decisions = self._writer.write(query, found.spoken, row)
            yield Completion(request.id, "".join(texts), "stop", len(ids), decisions, 0, texts, logprobs)

    def _decide(self, queries: Sequence[str], reads: Sequence[WordTokens]) -> list[Decisions]:
        begun = time.monotonic()
        logits = self._forward(reads)
        self._forward_s += time.monotonic() - begun
        return decide_tags(self.scheme, self._near, queries, reads, logits)

    def _forward(self, reads: Sequence[WordTokens]) -> np.ndarray:
        """Logits at each word's first token, words of all rows one after another."""
        torch = self._torch
        ids, mask, kinds = pad_reads(reads, self._reader.pad)
        self._count(len(reads), ids.size, int(mask.sum()))
        rows = np.repeat(np.arange(len(reads)), [len(found.places) for found in reads])
        places = np.concatenate([np.asarray(found.places, np.int64) for found in reads])
        extra: dict[str, Any] = {"token_type_ids": torch.from_numpy(kinds).to(self._device)} if self._typed else {}
        if not mask.all():
            extra["attention_mask"] = torch.from_numpy(mask).to(self._device)
        with torch.inference_mode():
            logits = word_logits(
                self._model, torch.from_numpy(ids).to(self._device), extra, torch.from_numpy(rows), torch.from_numpy(places)
            )
            return np.asarray(logits.float().cpu().numpy())


def read_scheme(path: str, schema: dict[str, Any] | None) -> Scheme:
    """The scheme beside the weights. ConfigError when there is none or it was made for another answer schema."""
    file = Path(path) / LABELS
    if not file.is_file():
        raise ConfigError(f"an encoder needs {LABELS} beside its weights", where=path, fix="distil it with student: encoder")
    found = build_config(Scheme, record.parse_object(file.read_bytes(), str(file), ConfigError, "distil the student again"), str(file))
    if schema is not None and found.schema_digest != fingerprint(schema):
        fix = "distil an encoder for this task, or undo the change of its answer schema"
        raise ConfigError("this encoder was trained for another answer schema", where=path, fix=fix)
    return found


def load_encoder(path: str, scheme: Scheme, dtype: str = "float32", revision: str = "") -> tuple[Any, Any]:
    """(token classifier whose outputs are the scheme's heads one after another, tokenizer). A base without heads gets random ones."""
    import torch
    from transformers import AutoModelForTokenClassification

    quiet_transformers()
    extra: dict[str, Any] = {"revision": revision} if revision else {}
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    try:
        model = AutoModelForTokenClassification.from_pretrained(
            path, num_labels=output_width(scheme), dtype=kind, ignore_mismatched_sizes=True, trust_remote_code=False, **extra
        )
    except (OSError, ValueError) as error:
        fix = "use a BERT, RoBERTa, ELECTRA, ModernBERT or similar model"
        raise EngineError(f"the encoder did not load: {error}", where=path, fix=fix) from error
    return model, load_tokenizer(path, revision, add_prefix_space=True)


def max_positions(model: Any) -> int:
    """Tokens that a model's positions reach; RoBERTa's begin after its padding."""
    found = int(getattr(model.config, "max_position_embeddings", 0) or 1 << 30)
    return found - int(model.config.pad_token_id or 0) - 1 if "roberta" in model.config.model_type else found


def pad_reads(reads: Sequence[Any], pad: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids, mask and segment numbers, shape (rows, tokens) int64, of what has `ids` and `first`, where the second segment begins."""
    wide = max(len(found.ids) for found in reads)
    ids = np.full((len(reads), wide), pad, np.int64)
    mask, kinds = np.zeros_like(ids), np.zeros_like(ids)
    for i, read in enumerate(reads):
        ids[i, : len(read.ids)] = read.ids
        mask[i, : len(read.ids)] = 1
        kinds[i, read.first : len(read.ids)] = 1
    return ids, mask, kinds


def word_logits(model: Any, ids: Any, extra: dict[str, Any], rows: Any, places: Any) -> Any:
    """Logits at (rows, places); only there is the last layer, often wide, worked out."""
    if hasattr(model, "classifier") and not hasattr(model, "head"):
        return model.classifier(model.base_model(input_ids=ids, **extra)[0][rows, places])
    return model(input_ids=ids, **extra).logits[rows, places]
