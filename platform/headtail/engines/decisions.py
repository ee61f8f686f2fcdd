"""From an encoder's logits to decisions, and from decisions to the JSON of an answer with a log-prob for each. Pure.

In: a Scheme, logits at words and at each row's start. Out: Decisions per row; its text in parts, each decision on the characters
that it decides, as the tokens of a decoder's answer are. Knows nothing of models, devices or batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from json.encoder import encode_basestring
from typing import NamedTuple

import numpy as np
from scipy.special import log_softmax

from headtail.core.spelling import SpellingIndex
from headtail.core.tagging import ABSENT, BEGIN, DELETE, FIRST_FIX, INSIDE, KEEP, NONE, OUTSIDE, Scheme, decode_pieces
from headtail.engines.words import WordTokens

_FORCED = 0.0  # log-prob of what is no decision


class Decisions(NamedTuple):
    """What was decided for one query: as tagging.Tags, and the log-prob of each."""

    kinds: list[int]
    labels: list[int]
    fixes: list[int]
    values: list[int]
    word_sure: list[float]  # of a word's kind and correction together
    label_sure: list[float]  # of the label of the word's piece
    value_sure: list[float]


def head_slices(scheme: Scheme) -> dict[str, slice]:
    """Where each head's classes are among the model's outputs: fields first, then kind, label and correction of a word."""
    found: dict[str, slice] = {}
    at = 0
    sizes = [(f"field:{head.name}", len(head.values)) for head in scheme.fields]
    if scheme.spans is not None:
        sizes += [("kind", 3), ("label", len(scheme.spans.labels)), ("fix", scheme.fixes)]
    for name, size in sizes:
        found[name] = slice(at, at + size)
        at += size
    return found


def output_width(scheme: Scheme) -> int:
    """Outputs of a model for `scheme`."""
    return max(int(part.stop) for part in head_slices(scheme).values())


def decide_tags(
    scheme: Scheme, near: SpellingIndex, queries: Sequence[str], reads: Sequence[WordTokens], logits: np.ndarray
) -> list[Decisions]:
    """Per row: kinds, labels and corrections of its words, values of its fields, and the log-probs of each of the last-named.

    `logits`: shape (words of all rows, outputs). Kind is decided word by word; the label of a piece over all its words together,
    a field over all words of its query (their mean); a correction only among spellings that are near the word, so that no word
    can become an unlike one.
    """
    parts, counts = head_slices(scheme), np.array([len(found.places) for found in reads])
    ends = np.cumsum(counts)
    means = [np.add.reduceat(logits[:, parts[f"field:{head.name}"]], ends - counts, axis=0) / counts[:, None] for head in scheme.fields]
    values = [log_softmax(mean, axis=-1) for mean in means]
    chosen = [found.argmax(1).tolist() for found in values]
    sure = [found.max(1).tolist() for found in values]
    made: list[Decisions] = []
    if scheme.spans is None:
        return [Decisions([], [], [], [c[i] for c in chosen], [], [], [s[i] for s in sure]) for i in range(len(reads))]
    kinds, word_sure = _best(logits[:, parts["kind"]])
    named, label_sure = _labels(kinds, ends, log_softmax(logits[:, parts["label"]], axis=-1))
    fixes = [KEEP] * len(kinds)
    if scheme.fixes:
        fixes, logprobs = _fixes(scheme, near, queries, reads, kinds.tolist(), logits[:, parts["fix"]])
        word_sure += logprobs
    kind_list, named_list, sure_list, label_list = kinds.tolist(), named.tolist(), word_sure.tolist(), label_sure.tolist()
    for i, found in enumerate(reads):
        here = slice(int(ends[i]) - len(found.places), int(ends[i]))
        row = kind_list[here], named_list[here], fixes[here], [c[i] for c in chosen]
        made.append(Decisions(*row, sure_list[here], label_list[here], [s[i] for s in sure]))
    return made


def _fixes(
    scheme: Scheme, near: SpellingIndex, queries: Sequence[str], reads: Sequence[WordTokens], kinds: Sequence[int], logits: np.ndarray
) -> tuple[list[int], np.ndarray]:
    """Correction of each word, and its log-prob among keeping the word, near spellings and, where that is known, leaving it out."""
    fixes, sure = [KEEP] * len(kinds), np.zeros(len(kinds))
    always = [KEEP, DELETE] if scheme.deletes else [KEEP]
    rows: list[int] = []  # words with more than one option
    options: list[int] = []  # of all of them, one after another
    begins: list[int] = []
    at = -1
    for query, found in zip(queries, reads, strict=True):
        for a, b in found.spoken:
            at += 1
            if kinds[at] == OUTSIDE:
                continue
            spellings = near.find(query[a:b])
            if spellings or (scheme.deletes and kinds[at] == INSIDE):
                rows.append(at)
                begins.append(len(options))
                options += always
                options += [FIRST_FIX + number for number in spellings]
    if rows:
        counts = np.diff([*begins, len(options)])
        held = logits[np.repeat(rows, counts), options]
        most = np.maximum.reduceat(held, begins)
        total = np.add.reduceat(np.exp(held - np.repeat(most, counts)), begins)
        sure[rows] = -np.log(total)
        number = np.repeat(np.arange(len(rows)), counts)
        for place in np.flatnonzero(held == np.repeat(most, counts))[::-1].tolist():  # backwards: the first of equals stays
            fixes[rows[number[place]]] = options[place]
    return fixes, sure


def _best(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(likeliest class, its log-prob) of each row."""
    found = log_softmax(logits, axis=-1)
    return found.argmax(1), found.max(1)


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


class AnswerWriter:
    """Writes decisions as JSON, keys in the schema's order with ", " and ": ", in parts such that each decision has one."""

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme
        self._fields = {head.name: i for i, head in enumerate(scheme.fields)}
        if scheme.spans is not None:
            spans = scheme.spans
            self._text, self._label = encode_basestring(spans.text) + ": ", encode_basestring(spans.label) + ": "

    def write(self, query: str, spoken: Sequence[tuple[int, int]], decided: Decisions) -> tuple[tuple[str, ...], tuple[float, ...], int]:
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
        return out.finish()

    def _pieces(self, out: _Parts, query: str, spoken: Sequence[tuple[int, int]], decided: Decisions) -> None:
        spans = self.scheme.spans
        assert spans is not None  # a name of `order` that is no field is the list
        word_sure, label_sure = decided.word_sure, decided.label_sure
        comma = ""
        for at, parts, label in decode_pieces(self.scheme, query, spoken, decided.kinds, decided.labels, decided.fixes):
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

    def finish(self) -> tuple[tuple[str, ...], tuple[float, ...], int]:
        if self._glue:
            self.texts.append(self._glue)
            self.logprobs.append(_FORCED)
        return tuple(self.texts), tuple(self.logprobs), self.decisions
