"""Queries as token ids, word by word, for models that classify words.

In: a tokenizer, queries and their side inputs. Out: per query its ids, where each word's first token is, and how many
tokens the query itself takes. A word's tokens do not depend on its neighbours (the tokenizer is asked for each word alone, as
Hugging Face's `is_split_into_words` does), so words are asked once and remembered. Knows nothing of labels or weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from headtail.core.errors import ConfigError
from headtail.core.tagging import word_spans
from headtail.engines.control import Encoder

_REMEMBERED = 1 << 18  # words


class WordTokens(NamedTuple):
    """A query as a model reads it. `places`: index of each word's first token; `first`: tokens before what stands beside it."""

    ids: list[int]
    places: list[int]
    first: int
    spoken: list[tuple[int, int]]


class WordTokenizer:
    """Turns queries into ids: [CLS] query [SEP], and after it what stands beside it [SEP]."""

    def __init__(self, tokenizer: Any) -> None:
        self._encoder, self._unknown = Encoder(tokenizer), tokenizer.unk_token_id
        self._remembered: dict[str, list[int]] = {}
        self.start, self.end = _special(tokenizer, "cls", "bos"), _special(tokenizer, "sep", "eos")
        self.pad = _special(tokenizer, "pad", "sep")

    def read(self, query: str, beside: str = "") -> WordTokens:
        """One query, and the text beside it."""
        spoken = word_spans(query)
        ids, places = [self.start], []
        for piece in self._ids([query[a:b] for a, b in spoken]):
            places.append(len(ids))
            ids += piece
        ids.append(self.end)
        first = len(ids)
        if beside:
            for piece in self._ids([beside[a:b] for a, b in word_spans(beside)]):
                ids += piece
            ids.append(self.end)
        return WordTokens(ids, places, first, spoken)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        known = self._remembered
        new = [text for text in texts if text not in known]
        if new:
            if len(known) + len(new) > _REMEMBERED:
                known.clear()
                new = list(texts)
            unknown = self.end if self._unknown is None else self._unknown
            for text, ids in zip(new, self._encoder.words(new), strict=True):
                known[text] = ids or [unknown]  # each word has a place, whatever it is
        return [known[text] for text in texts]


def _special(tokenizer: Any, *names: str) -> int:
    for name in names:
        found = getattr(tokenizer, f"{name}_token_id", None)
        if found is not None:
            return int(found)
    fix = "use a BERT, RoBERTa, ELECTRA, ModernBERT or similar model"
    raise ConfigError(f"the tokenizer has no {names[0]} token: this is no encoder", where=str(tokenizer.name_or_path), fix=fix)


def split_prompt(text: str) -> tuple[str, str]:
    """(query, what stands beside it) of a bare prompt: a query is normalised and holds no line break."""
    query, _, beside = text.partition("\n")
    return query, beside
