"""A task's answers in the compact format: no keys, no braces, a choice is one symbol. Pure.

In: a JSON Schema. Out: a Codec: `encode` makes an answer into its compact text, `decode` makes exactly that answer of it, `grammar`
limits an engine to compact answers. Every answer that is valid under the schema has one; a
schema for which this cannot be promised is refused. Texts are read from left to right without looking back: a text
ends at the first bare symbol, and a symbol within a text has a backslash before it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from headtail.core.compact.build import ALPHABET, Builder, Place
from headtail.core.compact.rules import GrammarRules, charset
from headtail.core.compact.streams import CompactError, CompactReader, CompactWriter, json_identity, merge_spans
from headtail.core.errors import InputError

__all__ = ["ALPHABET", "VERSION", "Codec", "CompactError", "DecodedAnswer"]

VERSION = 1  # part of a student's I/O format: raise it when the same answer gets another code


class DecodedAnswer(NamedTuple):
    """An answer, and the [start, end) of what in its code was decided rather than forced, in order and without overlap.

    A span that ends one after the text's end takes in the decision to stop there.
    """

    answer: Any
    spans: list[tuple[int, int]]


class Codec:
    """The code of one schema. ConfigError, naming the place, when not every valid answer could come back exactly."""

    def __init__(self, schema: Mapping[str, Any], where: str = "task.yaml") -> None:
        builder = Builder(schema, where)
        self._root = builder.node(schema, "answer", Place(follow=True, last=True))
        self._symbols = frozenset(builder.used)
        self._bare = re.compile(f"[^{re.escape(''.join(sorted(builder.used)))}\\\\]*")

    def encode(self, answer: Any) -> str:
        """The code of an answer that is valid under the schema."""
        pieces: list[str] = []
        try:
            self._root.write(answer, pieces, CompactWriter(self._symbols))
            code = "".join(pieces)
            if json_identity(self.decode(code).answer) != json_identity(answer):
                raise CompactError("its code says something else")
        except CompactError as error:
            fix = "only answers that are valid under the task's schema have a compact text"
            raise InputError(
                f"an answer cannot be written compactly: {error}", where="answer", value=json_identity(answer), fix=fix
            ) from None
        return code

    def decode(self, code: str) -> DecodedAnswer:
        """The answer that `code` stands for. CompactError when there is none; the schema decides whether it is valid."""
        reader = CompactReader(code, self._symbols, self._bare)
        answer = self._root.read(reader)
        if reader.at < len(code):
            raise CompactError(f"it goes on after its end, at character {reader.at}")
        return DecodedAnswer(answer, merge_spans(reader.spans))

    def grammar(self, max_tokens: int = 0) -> str:
        """EBNF, as xgrammar reads it, of all compact answers.

        Bounds of texts and lists that `max_tokens` implies are left out, and those above rules.LONGEST: a row that oversteps
        one is invalid afterwards.
        """
        rules = GrammarRules(charset(sorted({*self._symbols, "\\"})), max_tokens)
        root = self._root.rule(rules) or '""'
        return "\n".join([f"root ::= {root}", *rules.lines]) + "\n"
