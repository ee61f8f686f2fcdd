"""The parts that a codec is made of: each writes a value as code, reads it back, and says its grammar.

In: values; a Reader on a text. Out: pieces of text; values; rules of EBNF. Which part stands for which schema, and what a part
may rely on about what follows it, is decided in `build`. Pure.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from headtail.core.compact.rules import GrammarRules, quote
from headtail.core.compact.streams import CompactError, CompactReader, CompactWriter, json_identity

STOP, END = "\n", "\t"  # of a text or number that nothing else ends; of a list that more follows
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_WHOLE = re.compile(r"-?(0|[1-9][0-9]*)(\.0)?")


@dataclass(frozen=True)
class Node:
    """A part of a text. `empty`: its text may be nothing; `marked`: else it begins with a symbol; `ends`: that may be END."""

    empty: bool = True
    marked: bool = True
    ends: bool = False

    def write(self, value: Any, into: list[str], to: CompactWriter) -> None:
        raise NotImplementedError

    def read(self, reader: CompactReader) -> Any:
        raise NotImplementedError

    def rule(self, rules: GrammarRules) -> str:
        """Its grammar; "" when its code is always nothing."""
        raise NotImplementedError


@dataclass(frozen=True)
class Const(Node):
    """A value that needs no code."""

    value: Any = None

    def write(self, value: Any, into: list[str], to: CompactWriter) -> None:
        if json_identity(value) != json_identity(self.value):
            raise CompactError(f"{json_identity(value)[:80]} is not {json_identity(self.value)[:80]}")

    def read(self, reader: CompactReader) -> Any:
        return json.loads(json_identity(self.value))  # a new one each time: callers may change their answers

    def rule(self, rules: GrammarRules) -> str:
        return ""


class Absent:
    """Stands for the value of a property that is not there."""


ABSENT = Absent()


@dataclass(frozen=True)
class Nothing(Node):
    """A property that is not there."""

    def write(self, value: Any, into: list[str], to: CompactWriter) -> None:
        if value is not ABSENT:
            raise CompactError("it is there")

    def read(self, reader: CompactReader) -> Any:
        return ABSENT

    def rule(self, rules: GrammarRules) -> str:
        return ""


def check_count(node: Text | List, count: int, of: str) -> None:
    """CompactError unless `count` is within the node's bounds: another option may take what this one does not."""
    if count < node.least or (node.most is not None and count > node.most):
        raise CompactError(f"{count} {of}, where {node.least} to {'any' if node.most is None else node.most} may stand")


@dataclass(frozen=True)
class Text(Node):
    """A string as it is, up to the first bare symbol. `stop`: a STOP ends it."""

    stop: bool = False
    least: int = 0
    most: int | None = None

    def write(self, value: Any, into: list[str], to: CompactWriter) -> None:
        if not isinstance(value, str):
            raise CompactError(f"{json_identity(value)[:80]} is not text")
        check_count(self, len(value), "characters")
        into += [to.escape(value), STOP * self.stop]

    def read(self, reader: CompactReader) -> str:
        start, made = reader.at, [reader.take_plain()]
        while reader.next == "\\":
            symbol = reader.text[reader.at + 1 : reader.at + 2]
            if symbol != "\\" and symbol not in reader.symbols:
                raise reader.fail("a symbol after a backslash")
            reader.at += 2
            made += [symbol, reader.take_plain()]
        text = "".join(made)
        reader.mark_decision(start, stopped=True)
        if self.stop and not reader.take(STOP):
            raise reader.fail("the end of a text")
        check_count(self, len(text), "characters")
        return text

    def rule(self, rules: GrammarRules) -> str:
        return " ".join(filter(None, (rules.text(self.least, self.most), quote(STOP) if self.stop else "")))


@dataclass(frozen=True)
class Number(Node):
    """A number as JSON writes it. `whole`: without a fraction, but 1.0 stays 1.0."""

    stop: bool = False
    whole: bool = False

    def write(self, value: Any, into: list[str], to: CompactWriter) -> None:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or (self.whole and isinstance(value, float) and not value.is_integer()):
            raise CompactError(f"{json_identity(value)[:80]} is not a {'whole ' if self.whole else ''}number")
        spelled = json_identity(value)
        if self.whole and isinstance(value, float):
            spelled = "-0.0" if spelled == "-0.0" else f"{int(value)}.0"
        into.append(spelled + STOP * self.stop)

    def read(self, reader: CompactReader) -> int | float:
        found = (_WHOLE if self.whole else _NUMBER).match(reader.text, reader.at)
        if found is None:
            raise reader.fail("a number")
        start, reader.at = reader.at, found.end()
        reader.mark_decision(start)
        if self.stop and not reader.take(STOP):
            raise reader.fail("the end of a number")
        try:
            number: int | float = json.loads(found.group())
        except ValueError as error:  # more digits than Python takes
            raise CompactError(str(error)) from None
        if number in (float("inf"), float("-inf")):
            raise CompactError(f"{found.group()[:40]} is too large a number")
        return number

    def rule(self, rules: GrammarRules) -> str:
        rest = '(".0")?' if self.whole else '("." [0-9]+)? ([eE] [+-]? [0-9]+)?'
        return rules.add(f'"-"? ("0" | [1-9] [0-9]*) {rest}') + (" " + quote(STOP) if self.stop else "")


@dataclass(frozen=True)
class Choice(Node):
    """One of several, said by a symbol (letters when there are too many), then what that one is."""

    options: tuple[Node, ...] = ()
    symbols: tuple[str, ...] = ()

    def write(self, value: Any, into: list[str], to: CompactWriter) -> None:
        for symbol, option in zip(self.symbols, self.options, strict=True):
            inner: list[str] = []
            try:
                option.write(value, inner, to)
            except CompactError:
                continue
            into += [symbol, *inner]
            return
        raise CompactError(f"{'absence' if value is ABSENT else json_identity(value)[:80]} is none of the options")

    def read(self, reader: CompactReader) -> Any:
        start, width = reader.at, len(self.symbols[0])
        symbol = reader.text[start : start + width]
        if symbol not in self.symbols:
            raise reader.fail("the symbol of an option")
        reader.at += width
        reader.mark_decision(start)
        return self.options[self.symbols.index(symbol)].read(reader)

    def rule(self, rules: GrammarRules) -> str:
        said = (" ".join(filter(None, (quote(s), o.rule(rules)))) for s, o in zip(self.symbols, self.options, strict=True))
        return rules.add(" | ".join(said))


@dataclass(frozen=True)
class List(Node):
    """Items one after the other. `end`: an END comes after the last; `lead`: a symbol comes before each."""

    item: Node = Node()
    end: bool = False
    lead: str = ""
    least: int = 0
    most: int | None = None

    def write(self, value: Any, into: list[str], to: CompactWriter) -> None:
        if not isinstance(value, list):
            raise CompactError(f"{json_identity(value)[:80]} is not a list")
        check_count(self, len(value), "items")
        for item in value:
            into.append(self.lead)
            self.item.write(item, into, to)
        into.append(END * self.end)

    def read(self, reader: CompactReader) -> list[Any]:
        made: list[Any] = []
        while reader.next and not (self.end and reader.next == END) and (not self.lead or reader.take(self.lead)):
            made.append(self.item.read(reader))
        if self.end and not reader.take(END):
            raise reader.fail("the end of a list")
        check_count(self, len(made), "items")
        return made

    def rule(self, rules: GrammarRules) -> str:
        item = rules.add(" ".join(filter(None, (self.lead and quote(self.lead), self.item.rule(rules)))))
        return " ".join(filter(None, (rules.repeat((item,), self.least, self.most), quote(END) if self.end else "")))


@dataclass(frozen=True)
class Object(Node):
    """Its properties in the schema's order. An optional one is a choice whose first option is that it is not there."""

    properties: tuple[tuple[str, Node, bool], ...] = ()  # name, node, whether it may be absent

    def write(self, value: Any, into: list[str], to: CompactWriter) -> None:
        if not isinstance(value, dict):
            raise CompactError(f"{json_identity(value)[:80]} is not an object")
        known = [name for name, _, _ in self.properties]
        if strange := [name for name in value if name not in known]:
            raise CompactError(f"unknown property {strange[0]!r}")
        for name, node, optional in self.properties:
            if name not in value and not optional:
                raise CompactError(f"property {name!r} is missing")
            node.write(value.get(name, ABSENT), into, to)

    def read(self, reader: CompactReader) -> dict[str, Any]:
        made = {name: node.read(reader) for name, node, _ in self.properties}
        return {name: value for name, value in made.items() if value is not ABSENT}

    def rule(self, rules: GrammarRules) -> str:
        return " ".join(filter(None, (node.rule(rules) for _, node, _ in self.properties)))
