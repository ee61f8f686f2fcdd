"""The rows that are with an engine core, and their samples: what each has said so far, until all of a row's are done.

In: rows as they are asked, then the core's outputs step by step. Out: a Completion for each row whose last sample ended.
A few list operations per token: vLLM's own keeping of outputs wraps every token and cost 6 % of a small model's rows/s.
Knows only the shape of the core's outputs, not vLLM.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from headtail.engines.base import Completion, Top
from headtail.engines.tokens import answer_texts

LOWEST = float(np.finfo(np.float16).min)  # stands for minus infinity, which would make NaN of a chance of 0 times it


class Row:
    """A request. `left`: samples that have not ended."""

    __slots__ = ("cached", "id", "left", "samples", "tokens_in")

    def __init__(self, number: int, tokens_in: int, samples: int) -> None:
        self.id, self.tokens_in, self.left, self.cached = number, tokens_in, samples, 0
        self.samples = [Sample(self, i) for i in range(samples)]


class Sample:
    """One answer under way."""

    __slots__ = ("ids", "logprobs", "number", "reason", "row", "top_ids", "top_logprobs")

    def __init__(self, row: Row, number: int) -> None:
        self.row, self.number, self.reason = row, number, ""
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.top_ids: list[np.ndarray] = []
        self.top_logprobs: list[np.ndarray] = []

    def top(self) -> Top:
        """The likeliest tokens, in the types they are stored in."""
        logprobs = np.concatenate(self.top_logprobs).clip(min=LOWEST).astype(np.float16)
        return Top(np.array(self.ids, np.int32), np.concatenate(self.top_ids).astype(np.int32), logprobs)


class Flight:
    """All that is with the core. Its length is in samples: each takes a place. `ends`: tokens that stop an answer.

    `top`: how many of the likeliest tokens the core was asked for.
    """

    def __init__(self, tokenizer: Any, samples: int, ends: frozenset[int], top: int = 0) -> None:
        self._tokenizer, self._samples, self._ends, self._top = tokenizer, samples, ends, top
        self._flying: dict[str, Sample] = {}

    def __len__(self) -> int:
        return len(self._flying)

    def __contains__(self, row: int) -> bool:
        return any(f"{row}/{number}" in self._flying for number in range(self._samples))

    def names(self) -> list[str]:
        """Of all samples that have not ended, as the core knows them."""
        return list(self._flying)

    def add(self, row: int, tokens_in: int) -> list[str]:
        """Names for the samples of a row that is asked now."""
        added = {f"{row}/{sample.number}": sample for sample in Row(row, tokens_in, self._samples).samples}
        self._flying |= added
        return list(added)

    def take(self, outputs: Iterable[Any]) -> Iterator[Row]:
        """Add a step's outputs; the rows that are whole with it."""
        for output in outputs:
            sample = self._flying.get(output.request_id)
            if sample is None:  # of a row that was given up
                continue
            sample.ids += output.new_token_ids
            if output.new_logprobs is not None:
                sample.logprobs += output.new_logprobs.logprobs[:, 0].tolist()  # the sampled token's is the first
                if self._top:
                    sample.top_ids.append(output.new_logprobs.logprob_token_ids[:, 1 : self._top + 1])
                    sample.top_logprobs.append(output.new_logprobs.logprobs[:, 1 : self._top + 1])
            if output.prefill_stats is not None and not sample.number and not sample.row.cached:
                sample.row.cached = output.prefill_stats.num_cached_tokens
            if output.finish_reason is not None:
                del self._flying[output.request_id]
                sample.reason = str(output.finish_reason)
                sample.row.left -= 1
                if not sample.row.left:
                    yield sample.row

    def completion(self, row: Row) -> Completion:
        """Of a whole row. Its first sample is the answer."""
        first, *others = (self._said(sample) for sample in row.samples)
        return replace(first, samples=tuple(others)) if others else first

    def _said(self, sample: Sample) -> Completion:
        row, reason, first = sample.row, sample.reason, not sample.number
        stopped = bool(sample.ids) and sample.ids[-1] in self._ends
        texts = answer_texts(self._tokenizer, sample.ids, stopped)
        broken = reason not in ("stop", "length", "repetition")
        return Completion(
            id=row.id,
            text="".join(texts),
            finish_reason="length" if reason == "repetition" else reason,
            tokens_in=row.tokens_in if first else 0,
            tokens_out=len(sample.ids),
            tokens_cached=row.cached if first else 0,
            token_texts=texts,
            token_logprobs=tuple(sample.logprobs),
            error=f"the engine ended the request: {reason or 'no reason'}" if broken else "",
            transient=broken,
            top=sample.top() if sample.top_ids else None,
        )
