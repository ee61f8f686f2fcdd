"""What a compact text is written to and read from: its characters and the symbols in force.

In: text. Out: a Reader with a place in the text and the decisions so far; a Writer that sets backslashes.
Knows nothing of schemas or nodes.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any


class CompactError(ValueError):
    """A value that has no code here, or a text that is none; says why."""


def json_identity(value: Any) -> str:
    """A text that two values share when they are the same JSON: 1 is not 1.0, true is not 1."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


@dataclass
class CompactWriter:
    """A text being written. `symbols`: what gets a backslash within text."""

    symbols: frozenset[str]

    def escape(self, text: str) -> str:
        return "".join("\\" + symbol if symbol == "\\" or symbol in self.symbols else symbol for symbol in text)


@dataclass
class CompactReader:
    """A code being read. `spans`: what was decided so far."""

    text: str
    symbols: frozenset[str]
    bare: re.Pattern[str]  # of characters that are neither symbols nor backslashes
    at: int = 0
    spans: list[tuple[int, int]] = field(default_factory=list)

    @property
    def next(self) -> str:
        return self.text[self.at : self.at + 1]

    def take_plain(self) -> str:
        """The characters up to the next symbol or backslash; they are taken."""
        start, self.at = self.at, self.bare.match(self.text, self.at).end()  # type: ignore[union-attr]  # it matches nothing, too
        return self.text[start : self.at]

    def take(self, symbol: str) -> bool:
        if self.next != symbol:
            return False
        self.at += 1
        return True

    def mark_decision(self, start: int, stopped: bool = False) -> None:
        """All since `start` was a decision; `stopped`: so is what comes next, by which it ended."""
        self.spans.append((start, self.at + stopped))

    def fail(self, expected: str) -> CompactError:
        return CompactError(f"{expected} is missing at character {self.at}" + ("" if self.next else ", where it ends"))


def merge_spans(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, end in spans:
        if merged and start < merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        elif end > start:
            merged.append((start, end))
    return merged
