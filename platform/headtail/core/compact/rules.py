"""A grammar being written, in the EBNF that xgrammar reads.

In: bodies of rules. Out: their names; `lines` is the grammar. Every symbol is written as an escape, so that nothing in a schema
can be mistaken for EBNF. Knows nothing of schemas or nodes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

LONGEST = 64  # bound of a text or list that a grammar still counts; xgrammar compiles 64 steps in 0.1 s, 200 in more than one
_HALVES = "\\ud800-\\udfff"  # xgrammar takes the bytes of half a surrogate pair for a character; decoded, they become three


@dataclass
class GrammarRules:
    """A grammar being written. `symbols`: what a backslash stands before."""

    symbols: str
    max_tokens: int
    lines: list[str] = field(default_factory=list)
    known: dict[str, str] = field(default_factory=dict)

    def add(self, body: str) -> str:
        """The name of a rule with this body."""
        if body not in self.known:
            self.known[body] = f"r{len(self.lines)}"
            self.lines.append(f"{self.known[body]} ::= {body}")
        return self.known[body]

    def text(self, least: int, most: int | None) -> str:
        return self.repeat((f"[^{self.symbols}{_HALVES}]", f'"\\\\" [{self.symbols}]'), least, most)

    def repeat(self, ways: tuple[str, ...], least: int, most: int | None) -> str:
        """One of `ways`, again and again: a rule for each time, because xgrammar takes milliseconds per token over `{0,20}`."""
        if most is None or most > LONGEST or 0 < self.max_tokens <= most:
            one = self.add(" | ".join(ways))
            return " ".join([*([one] * min(least, LONGEST)), f"{one}*"])
        if not most:
            return ""
        rest = ""
        for at in reversed(range(most)):
            on = " | ".join(f"{way} {rest}".strip() for way in ways)
            rest = self.add(f'"" | {on}' if at >= least else on)
        return rest


def quote(text: str) -> str:
    return '"' + "".join(c if c.isalnum() and c.isascii() else f"\\u{ord(c):04x}" for c in text) + '"'


def charset(symbols: list[str]) -> str:
    return "".join(f"\\u{ord(symbol):04x}" for symbol in symbols)
