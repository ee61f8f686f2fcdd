"""The grammar that limits an engine to valid answers, and the masks that apply it to rows.

In: an answer schema, or a grammar in EBNF, and the token limit. Out: a grammar in EBNF; `Masks` for an engine of our own.
Why it differs from the task's schema: it is the schema's outline, which holds what xgrammar can hold and no more; and xgrammar's
string with a length bound knows no escapes, so a quote or backslash cannot be written, raw control characters can, and a mask
costs more. Why EBNF: a schema leaves the blanks between JSON's parts to the program that makes a grammar of it, and vLLM 0.32
makes another one than 0.29; students are taught one spelling. Knows nothing of engines.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from headtail.core.errors import ConfigError
from headtail.core.schema import outline

BACKEND = "xgrammar"
SEPARATORS = (", ", ": ")  # as Task.target writes them
_NAMES = re.compile(r'"(?:[^"\\]|\\.)*"|\[(?:[^\]\\]|\\.)*\]|([A-Za-z_][\w.-]*)')  # a rule's name; empty for a literal or a class
_ESCAPES = re.compile(r"\\(?:x([0-9a-f]{2})|.)")
VERSION = 2  # part of an answer's settings: raise it when the grammar changes


def engine_schema(schema: Mapping[str, Any], max_tokens: int, where: str = "task.yaml") -> Any:
    """The outline of `schema` without the string bounds that `max_tokens` implies: maxLength >= max_tokens.

    Such a string is held in bounds by the token limit (a runaway is `truncated`) and by validation (a longer one is
    `invalid`), and keeps its escapes. A tighter bound stays in the grammar, at the price of escapes in that string.
    """
    return _unbound(outline(schema, where).schema, max_tokens)


def _unbound(part: Any, max_tokens: int) -> Any:
    if isinstance(part, list):
        return [_unbound(item, max_tokens) for item in part]
    if not isinstance(part, dict) or "enum" in part:
        return part
    if part.get("type") == "string" and part["maxLength"] >= max_tokens:
        return {"type": "string"}
    made = {name: _unbound(value, max_tokens) for name, value in part.items() if name != "properties"}
    if "properties" in part:
        made["properties"] = {name: _unbound(child, max_tokens) for name, child in part["properties"].items()}
    return made


def ebnf(bound: Mapping[str, Any] | str | None, max_tokens: int, where: str) -> str:
    """The grammar that holds answers to `bound` (JSON Schema, or EBNF); empty when it is None. ConfigError when xgrammar makes none."""
    if bound is None:
        return ""
    return check_ebnf(bound if isinstance(bound, str) else schema_grammar(engine_schema(bound, max_tokens, where), where), where)


def describe_bound(bound: Mapping[str, Any] | str | None) -> str:
    """How answers are held, for a receipt: to the compact format's grammar, to a JSON Schema's, or not at all."""
    return "none" if bound is None else f"{BACKEND}, {'compact' if isinstance(bound, str) else 'no free whitespace'}"


def check_ebnf(text: str, where: str) -> str:
    """`text` itself; ConfigError when xgrammar cannot read it."""
    import xgrammar

    try:
        xgrammar.Grammar.from_ebnf(text)
    except RuntimeError as error:
        raise ConfigError(f"xgrammar cannot read the grammar: {error}", where=where, fix="keep answer: json for this task") from None
    return text


def schema_grammar(schema: Mapping[str, Any], where: str) -> str:
    """The grammar of `schema`, written with `", "` and `": "` and no other blank; ConfigError when xgrammar can make none."""
    import xgrammar

    text = json.dumps(schema, ensure_ascii=False)
    try:
        rules = _grammar_rules(xgrammar.Grammar.from_json_schema(text, any_whitespace=False, separators=SEPARATORS))
        grammar = "".join(f"{name} ::= {rule}\n" for name, rule in _reachable_rules(rules).items())
        if _grammar_rules(xgrammar.Grammar.from_ebnf(grammar)) != _reachable_rules(rules):
            raise RuntimeError("xgrammar parses its own output differently")
    except RuntimeError as error:
        fix = "simplify the answer schema; docs/task.md lists what a grammar holds"
        raise ConfigError(f"the answer schema cannot be turned into a grammar: {error}", where=where, fix=fix) from None
    return grammar


def _grammar_rules(grammar: Any) -> dict[str, str]:
    """The rules of a grammar by name. xgrammar 0.2.8 writes é0 as `\\xe90` and reads that as U+0E90: `\\u00e90` is read as it is meant."""
    text = _ESCAPES.sub(lambda found: f"\\u00{found[1]}" if found[1] else found[0], str(grammar))
    return dict(line.split(" ::= ", 1) for line in text.split("\n") if line)


def _reachable_rules(rules: Mapping[str, str]) -> dict[str, str]:
    """The rules that `root` leads to; vLLM reads all of them for each row: 55 us instead of 122 for the shipped task."""
    found, todo = set(), ["root"]
    while todo:
        name = todo.pop()
        if name in rules and name not in found:
            found.add(name)
            todo += _NAMES.findall(rules[name])
    return {name: rule for name, rule in rules.items() if name in found}


def apply_masks(logits: Any, places: Sequence[int], masks: np.ndarray[Any, np.dtype[np.int32]]) -> None:
    """Set logits[places[i], token] (on a CPU) to -inf where bit `token` of masks[i] (int32 words, lowest bit first) is 0, in place."""
    import torch

    forbidden = np.zeros((logits.shape[0], masks.shape[1]), dtype=np.int32)
    forbidden[list(places)] = ~masks
    bits = np.unpackbits(forbidden.view(np.uint8), axis=1, count=logits.shape[1], bitorder="little")
    logits.masked_fill_(torch.from_numpy(bits).view(torch.bool), float("-inf"))


class Masks:
    """Holds the rows of a batch to a grammar, all in one call; to nothing when `bound` is None.

    `width`: of the logits, which may be padded beyond the tokenizer; `ends`: tokens that close an answer.
    """

    def __init__(
        self, tokenizer: Any, width: int, ends: list[int], bound: Mapping[str, Any] | str | None, max_tokens: int, threads: int = 1
    ) -> None:
        self.how, self._compiled = "none", None
        self._bits: Any = None
        text = ebnf(bound, max_tokens, "task.yaml answer")
        if not text:
            return
        import xgrammar

        compiler = xgrammar.GrammarCompiler(xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=width, stop_token_ids=ends))
        self._compiled = compiler.compile_grammar(text)
        self.how = describe_bound(bound)
        self._xgrammar, self._width = xgrammar, width
        self._spoken = self._allowed_tokens(tokenizer, ends)
        self._filler = xgrammar.BatchGrammarMatcher(threads)

    def _allowed_tokens(self, tokenizer: Any, ends: list[int]) -> Any:
        """All tokens but special ones: to xgrammar these are text, such as <|user|>, but they add none to an answer."""
        import torch

        words = np.full(self._xgrammar.allocate_token_bitmask(1, self._width).shape[1], 2**32 - 1, np.uint32)
        for token, added in tokenizer.added_tokens_decoder.items():
            if added.special and token not in ends:
                words[token // 32] &= ~np.uint32(1 << token % 32)
        return torch.from_numpy(words.view(np.int32))

    def matcher(self) -> Any:
        """The grammar's state at the start of an answer."""
        return None if self._compiled is None else self._xgrammar.GrammarMatcher(self._compiled)

    def apply(self, logits: Any, matchers: Sequence[Any]) -> None:
        """Set what may not follow to -inf, in place. `logits`: shape (rows, width); a matcher for each row."""
        if self._compiled is None:
            return
        rows = len(matchers)
        if self._bits is None or len(self._bits) < rows:
            self._bits = self._xgrammar.allocate_token_bitmask(rows, self._width)
        bits = self._bits[:rows]
        self._filler.batch_fill_next_token_bitmask(list(matchers), bits, list(range(rows)))
        bits &= self._spoken
        if logits.is_cuda:
            self._xgrammar.apply_token_bitmask_inplace(logits, bits.to(logits.device))
        else:
            apply_masks(logits, range(rows), bits.numpy())
