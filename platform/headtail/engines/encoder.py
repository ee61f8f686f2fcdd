"""Encoder students behind the engines' door: one forward pass classifies the words of many queries; nothing is written.

In: Requests whose last message is a bare query (a line break, then what stands beside it), a model folder with labels.json.
Out: Completions with the task's JSON. Each decision (where a piece begins, its label, a word's spelling, a field's value) is one
entry of `token_logprobs`, on the characters it decides, so that confidence is read as for any engine; `tokens_out` counts them.
Rows are read ahead, sorted by length and cut into batches. Knows nothing of tasks, stores or how the model was trained.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from itertools import islice
from json.encoder import encode_basestring
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from headtail.engines import Completion, ModelConfig, Request
from headtail.engines.device import precision, set_environment
from headtail.engines.words import Read, Reader, split
from headtail.errors import ConfigError, EngineError
from headtail.keys import fingerprint
from headtail.labels import ABSENT, BEGIN, DELETE, FIRST_FIX, INSIDE, KEEP, NONE, OUTSIDE, Scheme, pieces
from headtail.spelling import Near

LABELS = "labels.json"  # beside the weights: the Scheme
FORM = 1  # raise it when the same weights answer otherwise
AHEAD = 2048  # rows read ahead and sorted by length
CPU_ROOM = (256, 4096)  # rows and tokens of a batch: see docs/engines.md
GPU_ROOM = (2048, 65536)
_FORCED = 0.0  # log-prob of what is no decision


class Decided(NamedTuple):
    """What was decided for one query: as labels.Labels, and the log-prob of each."""

    kinds: list[int]
    labels: list[int]
    fixes: list[int]
    values: list[int]
    word_sure: list[float]  # of a word's kind and correction together
    label_sure: list[float]  # of the label of the word's piece
    value_sure: list[float]


class EncoderEngine:
    """A loaded encoder."""

    def __init__(self, config: ModelConfig, path: str, schema: dict[str, Any] | None, sampling: dict[str, Any]) -> None:
        started = time.monotonic()
        set_environment(config)
        import torch

        self.config, self.scheme = config, read_scheme(path, schema)
        self._torch, self._device = torch, "cuda" if config.gpus else "cpu"
        if not config.gpus:
            torch.set_num_threads(max(1, int(config.cpus)))
        self._model, tokenizer = load(path, self.scheme, precision(config))
        self._model.to(self._device).eval()
        self._reader, self._near = Reader(tokenizer), Near(self.scheme.corrections)
        rows, tokens = GPU_ROOM if config.gpus else CPU_ROOM
        self._rows, self._tokens = config.max_num_seqs or rows, config.max_num_batched_tokens or tokens
        self._limit = min(config.max_model_len, longest(self._model))
        self._typed = getattr(self._model.config, "type_vocab_size", 0) >= 2
        self._writer = Writer(self.scheme)
        self._asked = self._cells = self._real = 0
        self._forward_s = 0.0
        self.start_s = time.monotonic() - started

    def facts(self) -> dict[str, Any]:
        """What is in force, and how it went so far."""
        import transformers

        return {
            "engine": "encoder",
            "version": transformers.__version__,
            "device": self._device,
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "max_model_len": self._limit,
            "max_num_seqs": self._rows,
            "max_num_batched_tokens": self._tokens,
            "structured_outputs": "labels",
            "corrections": len(self.scheme.corrections),
            "threads": None if self.config.gpus else self._torch.get_num_threads(),
            "engine_process": False,
            "samples": 1,
            "start_s": round(self.start_s, 2),
            "forward_s": round(self._forward_s, 3),
            "real_token_share": round(self._real / self._cells, 4) if self._cells else None,
        }

    def generate(self, requests: Iterable[Request]) -> Generator[Completion]:
        """Completions, batch by batch; within what is read ahead in order of length."""
        source = iter(requests)
        while window := list(islice(source, AHEAD)):
            asked: list[tuple[Request, str, Read]] = []
            for request in window:
                query, beside = split(request.messages[-1]["content"])
                found = self._reader.read(query, beside)
                if len(found.ids) > self._limit:
                    problem = f"the query has {len(found.ids)} tokens; at most {self._limit} fit"
                    yield Completion(request.id, finish_reason="error", error=problem)
                else:
                    asked.append((request, query, found))
            asked.sort(key=lambda one: len(one[2].ids))
            for batch in batches(asked, self._rows, self._tokens):
                yield from self._answer(batch)

    def _answer(self, batch: Sequence[tuple[Request, str, Read]]) -> Iterator[Completion]:
        decided = self._decide([query for _, query, _ in batch], [found for *_, found in batch])
        for (request, query, found), row in zip(batch, decided, strict=True):
            texts, logprobs, decisions = self._writer.write(query, found.spoken, row)
            yield Completion(request.id, "".join(texts), "stop", len(found.ids), decisions, 0, texts, logprobs)

    def _decide(self, queries: Sequence[str], reads: Sequence[Read]) -> list[Decided]:
        begun = time.monotonic()
        at_words, at_start = self._forward(reads)
        self._forward_s += time.monotonic() - begun
        return decide(self.scheme, self._near, queries, reads, at_words, at_start)

    def _forward(self, reads: Sequence[Read]) -> tuple[np.ndarray, np.ndarray]:
        """Logits at each word's first token, words of all rows one after another, and at each row's first token."""
        torch = self._torch
        ids, mask, kinds = padded(reads, self._reader.pad)
        self._asked, self._cells, self._real = self._asked + len(reads), self._cells + ids.size, self._real + int(mask.sum())
        rows = np.repeat(np.arange(len(reads)), [len(found.places) for found in reads])
        places = np.concatenate([np.asarray(found.places, np.int64) for found in reads])
        extra: dict[str, Any] = {"token_type_ids": torch.from_numpy(kinds).to(self._device)} if self._typed else {}
        if not mask.all():
            extra["attention_mask"] = torch.from_numpy(mask).to(self._device)
        with torch.inference_mode():
            logits = heads(
                self._model, self.scheme, torch.from_numpy(ids).to(self._device), extra, torch.from_numpy(rows), torch.from_numpy(places)
            )
            return tuple(part.float().cpu().numpy() for part in logits)

    def close(self) -> None:
        del self._model


def read_scheme(path: str, schema: dict[str, Any] | None) -> Scheme:
    """The scheme beside the weights. ConfigError when there is none or it was made for another answer schema."""
    file = Path(path) / LABELS
    if not file.is_file():
        raise ConfigError(f"an encoder needs {LABELS} beside its weights", where=path, fix="distil it with student: encoder")
    found = Scheme.model_validate_json(file.read_text(encoding="utf-8"))
    if schema is not None and found.schema_digest != fingerprint(schema):
        fix = "distil an encoder for this task, or undo the change of its answer schema"
        raise ConfigError("this encoder was taught another answer schema", where=path, fix=fix)
    return found


def load(path: str, scheme: Scheme, dtype: str = "float32", revision: str = "") -> tuple[Any, Any]:
    """(token classifier whose outputs are the scheme's heads one after another, tokenizer). A base without heads gets random ones."""
    import torch
    from transformers import AutoModelForTokenClassification, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    extra: dict[str, Any] = {"revision": revision} if revision else {}
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    try:
        model = AutoModelForTokenClassification.from_pretrained(
            path, num_labels=width(scheme), dtype=kind, ignore_mismatched_sizes=True, **extra
        )
    except (OSError, ValueError) as error:
        fix = "take a BERT, RoBERTa, ELECTRA, ModernBERT or like model"
        raise EngineError(f"the encoder did not load: {error}", where=path, fix=fix) from error
    return model, AutoTokenizer.from_pretrained(path, add_prefix_space=True, **extra)


def longest(model: Any) -> int:
    """Tokens that a model's positions reach; RoBERTa's begin after its padding."""
    found = int(getattr(model.config, "max_position_embeddings", 0) or 1 << 30)
    return found - int(model.config.pad_token_id or 0) - 1 if "roberta" in model.config.model_type else found


def slices(scheme: Scheme) -> dict[str, slice]:
    """Where each head's classes are among the model's outputs: fields first, then kind, label and correction of a word."""
    found: dict[str, slice] = {}
    at = 0
    sizes = [(f"field:{head.name}", len(head.values)) for head in scheme.fields]
    if scheme.spans is not None:
        sizes += [("kind", 3), ("label", len(scheme.spans.labels)), ("fix", scheme.fixes if scheme.corrections else 0)]
    for name, size in sizes:
        found[name] = slice(at, at + size)
        at += size
    return found


def width(scheme: Scheme) -> int:
    """Outputs of a model for `scheme`."""
    return max(int(part.stop) for part in slices(scheme).values())


def padded(reads: Sequence[Read], pad: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids, mask and segment numbers, shape (rows, tokens) int64."""
    wide = max(len(found.ids) for found in reads)
    ids = np.full((len(reads), wide), pad, np.int64)
    mask, kinds = np.zeros_like(ids), np.zeros_like(ids)
    for i, found in enumerate(reads):
        ids[i, : len(found.ids)] = found.ids
        mask[i, : len(found.ids)] = 1
        kinds[i, found.first : len(found.ids)] = 1
    return ids, mask, kinds


def heads(model: Any, scheme: Scheme, ids: Any, extra: dict[str, Any], rows: Any, places: Any) -> tuple[Any, Any]:
    """Logits at (rows, places) and at each row's first token; only where they are asked is the last layer, often wide, worked out."""
    if hasattr(model, "classifier") and not hasattr(model, "head"):
        hidden, last = model.base_model(input_ids=ids, **extra)[0], model.classifier
    else:
        hidden, last = model(input_ids=ids, **extra).logits, lambda logits: logits
    at_words = last(hidden[rows, places]) if scheme.spans is not None else hidden[:0, 0]
    return at_words, last(hidden[:, 0]) if scheme.fields else hidden[:0, 0]


def batches(asked: Sequence[Any], rows: int, tokens: int) -> Iterator[Sequence[Any]]:
    """Cut rows sorted by length so that a batch has at most `rows` rows and, padded, `tokens` tokens; never less than a row."""
    begin = 0
    while begin < len(asked):
        end = min(begin + rows, len(asked))
        while end - begin > 1 and (end - begin) * len(asked[end - 1][2].ids) > tokens:
            end = begin + max(1, min(end - begin - 1, tokens // len(asked[end - 1][2].ids)))
        yield asked[begin:end]
        begin = end


def decide(
    scheme: Scheme, near: Near, queries: Sequence[str], reads: Sequence[Read], at_words: np.ndarray, at_start: np.ndarray
) -> list[Decided]:
    """Per row: kinds, labels and corrections of its words, values of its fields, and the log-probs of each of the last-named.

    Kind is decided word by word; the label of a piece over all its words together; a correction only among spellings that are
    near the word, so that no word can become an unlike one.
    """
    parts = slices(scheme)
    values = [log_softmax(at_start[:, parts[f"field:{head.name}"]]) for head in scheme.fields]
    chosen = [found.argmax(1).tolist() for found in values]
    sure = [found.max(1).tolist() for found in values]
    ends = np.cumsum([len(found.places) for found in reads])
    made: list[Decided] = []
    if scheme.spans is None:
        return [Decided([], [], [], [c[i] for c in chosen], [], [], [s[i] for s in sure]) for i in range(len(reads))]
    kinds, word_sure = _best(at_words[:, parts["kind"]])
    named, label_sure = _labels(kinds, ends, log_softmax(at_words[:, parts["label"]]))
    fixing = at_words[:, parts["fix"]] if scheme.corrections else None
    kind_list, sure_list, named_list, label_list = kinds.tolist(), word_sure.tolist(), named.tolist(), label_sure.tolist()
    for i, (query, found) in enumerate(zip(queries, reads, strict=True)):
        here = slice(int(ends[i]) - len(found.places), int(ends[i]))
        row, row_sure = kind_list[here], sure_list[here]
        fixes = [KEEP] * len(row)
        if fixing is not None:
            for at, (a, b) in enumerate(found.spoken):
                options = near.find(query[a:b]) if row[at] != OUTSIDE else ()
                if options or (scheme.deletes and row[at] == INSIDE):
                    fixes[at], logprob = _fix(fixing[here.start + at], options, scheme.deletes)
                    row_sure[at] += logprob
        made.append(Decided(row, named_list[here], fixes, [c[i] for c in chosen], row_sure, label_list[here], [s[i] for s in sure]))
    return made


def _best(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(likeliest class, its log-prob) of each row."""
    found = log_softmax(logits)
    return found.argmax(1), found.max(1)


def _fix(logits: np.ndarray, options: Sequence[int], deletes: bool) -> tuple[int, float]:
    """(correction, log-prob) among keeping the word, `options` and, where that is known, leaving it out."""
    numbers = [KEEP, *([DELETE] if deletes else ()), *(FIRST_FIX + option for option in options)]
    held = logits[numbers]
    at = int(held.argmax())
    return numbers[at], float(held[at] - held.max() - np.log(np.exp(held - held.max()).sum()))


def _labels(kinds: np.ndarray, ends: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Label of each word's piece and the mean log-prob of it over the piece's words; NONE and 0 outside."""
    named, sure = np.full(len(kinds), NONE), np.zeros(len(kinds))
    inside = np.flatnonzero(kinds != OUTSIDE)
    if not len(inside):
        return named, sure
    opens = kinds == BEGIN
    opens[inside[(inside == 0) | (kinds[inside - 1] == OUTSIDE)]] = True
    begins = ends[:-1][ends[:-1] < len(kinds)]
    opens[begins[kinds[begins] != OUTSIDE]] = True  # a row's first word
    first = np.flatnonzero(opens[inside])
    number = np.cumsum(opens[inside]) - 1
    mean = np.add.reduceat(labels[inside], first, axis=0) / np.bincount(number)[:, None]
    best = mean.argmax(1)
    named[inside], sure[inside] = best[number], mean.max(1)[number]
    return named, sure


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Along the last axis."""
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


class Writer:
    """Writes decisions as JSON, keys in the schema's order with ", " and ": ", in parts such that each decision has one."""

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme
        self._fields = {head.name: i for i, head in enumerate(scheme.fields)}
        if scheme.spans is not None:
            spans = scheme.spans
            self._text, self._label = encode_basestring(spans.text) + ": ", encode_basestring(spans.label) + ": "

    def write(self, query: str, spoken: Sequence[tuple[int, int]], decided: Decided) -> tuple[tuple[str, ...], tuple[float, ...], int]:
        """(parts of the text, their log-probs, how many are decisions)."""
        values, value_sure = decided.values, decided.value_sure
        out = _Parts()
        comma = ""
        out.glue("{")
        for name in self.scheme.order:
            at = self._fields.get(name)
            if at is None:
                out.glue(f"{comma}{encode_basestring(name)}: [")
                self._pieces(out, query, spoken, decided)
                out.glue("]")
            elif (value := self.scheme.fields[at].values[values[at]]) != ABSENT:
                out.glue(f"{comma}{encode_basestring(name)}: ")
                out.value(value, value_sure[at])
            else:
                continue
            comma = ", "
        out.glue("}")
        return out.done()

    def _pieces(self, out: _Parts, query: str, spoken: Sequence[tuple[int, int]], decided: Decided) -> None:
        spans = self.scheme.spans
        assert spans is not None  # a name of `order` that is no field is the list
        word_sure, label_sure = decided.word_sure, decided.label_sure
        comma = ""
        for at, parts, label in pieces(self.scheme, query, spoken, decided.kinds, decided.labels, decided.fixes):
            sure, named = word_sure[at : at + len(parts)], label_sure[at]
            out.glue(comma + "{")
            if not spans.text_first:
                out.glue(self._label)
                out.value(spans.labels[label], named)
                out.glue(", ")
            out.glue(self._text + '"')
            out.words([encode_basestring(part)[1:-1] for part in parts], sure)
            if spans.text_first:
                out.glue(", " + self._label)
                out.value(spans.labels[label], named)
            out.glue("}")
            comma = ", "


class _Parts:
    """Parts of a JSON text. Glue is gathered, so that no part is empty of meaning."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.logprobs: list[float] = []
        self._glue = ""
        self.decisions = 0

    def glue(self, text: str) -> None:
        self._glue += text

    def _put(self, text: str, logprob: float) -> None:
        if self._glue:
            self.texts.append(self._glue)
            self.logprobs.append(_FORCED)
            self._glue = ""
        self.texts.append(text)
        self.logprobs.append(logprob)
        self.decisions += 1

    def value(self, text: str, logprob: float) -> None:
        if text[0] == '"':  # an opening quote belongs to what is forced: see outcome.scalar_spans
            self._glue += '"'
            text = text[1:]
        self._put(text, logprob)

    def words(self, texts: Sequence[str], logprobs: Sequence[float]) -> None:
        for i, (text, logprob) in enumerate(zip(texts, logprobs, strict=True)):
            self._put(text + '"' if i == len(texts) - 1 else text, logprob)

    def done(self) -> tuple[tuple[str, ...], tuple[float, ...], int]:
        if self._glue:
            self.texts.append(self._glue)
            self.logprobs.append(_FORCED)
        return tuple(self.texts), tuple(self.logprobs), self.decisions
