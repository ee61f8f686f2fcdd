"""A task's answers as compact code: no keys, no braces, a choice is one sign. Pure.

In: a JSON Schema. Out: a Codec: `encode` makes an answer into its code, `decode` makes exactly that answer of it, `grammar`
is what an engine is bound by so that it can write nothing but codes. Every answer that the schema lets pass has a code; a
schema for which that cannot be promised is refused. Codes are read from left to right without looking back: what is text
ends at the first bare sign, and a sign within a text has a backslash before it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from headtail.core.compact.build import ALPHABET, Builder, Place
from headtail.core.compact.rules import Rules, charset
from headtail.core.compact.streams import Reader, Unfit, Writer, merged, same
from headtail.core.errors import InputError

__all__ = ["ALPHABET", "VERSION", "Codec", "Decoded", "Unfit"]

VERSION = 1  # part of a student's form: raise it when the same answer gets another code


class Decoded(NamedTuple):
    """An answer, and the [start, end) of what in its code was decided rather than forced, in order and without overlap.

    A span that ends one after the code's end takes in the decision to stop there.
    """

    answer: Any
    spans: list[tuple[int, int]]


class Codec:
    """The code of one schema. ConfigError, naming the place, when not every valid answer could come back exactly."""

    def __init__(self, schema: Mapping[str, Any], where: str = "task.yaml") -> None:
        builder = Builder(schema, where)
        self._root = builder.node(schema, "answer", Place(follow=True, last=True))
        self._signs = frozenset(builder.used)
        self._bare = re.compile(f"[^{re.escape(''.join(sorted(builder.used)))}\\\\]*")

    def encode(self, answer: Any) -> str:
        """The code of an answer that is valid under the schema."""
        pieces: list[str] = []
        try:
            self._root.write(answer, pieces, Writer(self._signs))
            code = "".join(pieces)
            if same(self.decode(code).answer) != same(answer):
                raise Unfit("its code says something else")
        except Unfit as error:
            fix = "only answers that are valid under the task's schema have a code"
            raise InputError(f"an answer cannot be coded: {error}", where="answer", value=same(answer), fix=fix) from None
        return code

    def decode(self, code: str) -> Decoded:
        """The answer that `code` stands for. Unfit when it is none; whether that is valid is for the schema to say."""
        reader = Reader(code, self._signs, self._bare)
        answer = self._root.read(reader)
        if reader.at < len(code):
            raise Unfit(f"it goes on after its end, at character {reader.at}")
        return Decoded(answer, merged(reader.spans))

    def grammar(self, max_tokens: int = 0) -> str:
        """EBNF, as xgrammar reads it, of all codes.

        Bounds of texts and lists that `max_tokens` implies are left out, and those above rules.LONGEST: a row that oversteps
        one is invalid afterwards.
        """
        rules = Rules(charset(sorted({*self._signs, "\\"})), max_tokens)
        root = self._root.rule(rules) or '""'
        return "\n".join([f"root ::= {root}", *rules.lines]) + "\n"
