"""What vLLM is told so that an answer can be any valid one, and nothing else.

In: an answer schema, or a grammar in EBNF, and the token limit. Out: the text handed to xgrammar. Imports xgrammar only to check.
Why it differs from the task's schema: xgrammar 's string with a length bound knows no escapes, so a quote or backslash
cannot be written, raw control characters can, and a mask costs more. Knows nothing of engines.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from headtail.errors import ConfigError

BACKEND = "xgrammar"
_VALUES = ("enum", "const", "default", "examples")  # these hold values, not schemas
FORM = 1  # part of an answer's settings: raise it when what the engine is told changes


def for_engine(schema: Any, max_tokens: int) -> Any:
    """`schema` without the string bounds that `max_tokens` implies: maxLength >= max_tokens.

    Such a string is held in bounds by the token limit (a runaway is `truncated`) and by validation (a longer one is
    `invalid`), and keeps its escapes. A tighter bound stays in the grammar, at the price of escapes in that string.
    """
    if isinstance(schema, list):
        return [for_engine(item, max_tokens) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = schema
    if schema.get("type") == "string" and isinstance(schema.get("maxLength"), int) and schema["maxLength"] >= max_tokens:
        kept = {name: value for name, value in schema.items() if name not in ("maxLength", "minLength")}
    return {name: value if name in _VALUES else for_engine(value, max_tokens) for name, value in kept.items()}


def told(bound: Mapping[str, Any] | str | None, max_tokens: int, where: str) -> dict[str, str]:
    """The one field of vLLM's structured outputs that holds answers to `bound` (JSON Schema or EBNF); none when it is None."""
    if bound is None:
        return {}
    if isinstance(bound, str):
        return {"grammar": check_ebnf(bound, where)}
    return {"json": check(for_engine(bound, max_tokens), where)}


def check_ebnf(text: str, where: str) -> str:
    """`text` itself; ConfigError when xgrammar cannot read it."""
    import xgrammar

    try:
        xgrammar.Grammar.from_ebnf(text)
    except RuntimeError as error:
        raise ConfigError(f"xgrammar cannot read the grammar: {error}", where=where, fix="keep answer: json for this task") from None
    return text


def check(schema: dict[str, Any], where: str) -> str:
    """`schema` as the JSON text to hand over; ConfigError when xgrammar cannot make a grammar of it."""
    import xgrammar

    text = json.dumps(schema, ensure_ascii=False)
    try:
        xgrammar.Grammar.from_json_schema(text, any_whitespace=False)
    except RuntimeError as error:
        fix = "simplify the answer schema: no uniqueItems, patternProperties, multipleOf; no pattern together with maxLength"
        raise ConfigError(f"the answer schema cannot be turned into a grammar: {error}", where=where, fix=fix) from None
    return text
