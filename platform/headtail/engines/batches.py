"""Rows sorted by length and cut into batches, for models whose rows of a batch go through together. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def cut(asked: Sequence[T], length: Callable[[T], int], rows: int, tokens: int) -> Iterator[Sequence[T]]:
    """`asked` in order of length, a batch at a time: at most `rows` rows and, padded, `tokens` tokens; never less than a row."""
    asked = sorted(asked, key=length)
    begin = 0
    while begin < len(asked):
        end = min(begin + rows, len(asked))
        while end - begin > 1 and (end - begin) * length(asked[end - 1]) > tokens:
            end = begin + max(1, min(end - begin - 1, tokens // length(asked[end - 1])))
        yield asked[begin:end]
        begin = end
