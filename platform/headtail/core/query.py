"""The text that a query is looked up by: normalised, without personal data. One rule for servers, clients and commands.

In: a query as somebody typed it. Out: its clean text, or InvalidQuery that says what is wrong. Pure. Knows nothing of keys or caches.
"""

from __future__ import annotations

from typing import Any

from headtail.core.redact import redact
from headtail.core.text import normalise


class InvalidQuery(ValueError):
    """No answer can be looked up for it. `fix`: what to do."""

    def __init__(self, what: str, fix: str) -> None:
        self.what, self.fix = what, fix
        super().__init__(what)


def clean_text(text: str) -> str:
    """The normalised text without personal data; it may be empty."""
    return redact(normalise(text)).text


def redact_texts(plain: Any) -> Any:
    """A text, or a JSON value, whose texts that hold personal data are as `clean_text` has them; all else is as it was."""
    if isinstance(plain, str):
        found = redact(normalise(plain))
        return found.text if found.any else plain
    if isinstance(plain, list):
        return [redact_texts(part) for part in plain]
    return {name: redact_texts(part) for name, part in plain.items()} if isinstance(plain, dict) else plain


def check_query(query: str, max_chars: int) -> str:
    """The clean text of a query of at most `max_chars` characters. Lengths are checked before any work is done on it."""
    if len(query) > 4 * max_chars:
        raise InvalidQuery(f"the query has {len(query)} characters, at most {max_chars} are taken", "shorten it")
    if not query.isascii() and any("\ud800" <= character <= "\udfff" for character in query):
        raise InvalidQuery("the query holds half a surrogate pair, which is no character", "send valid Unicode")
    normalised = normalise(query)
    if not normalised:
        raise InvalidQuery("the query is empty", "send at least one visible character")
    if len(normalised) > max_chars:
        what = f"the query has {len(normalised)} characters after normalisation, at most {max_chars} are taken"
        raise InvalidQuery(what, "shorten it")
    return redact(normalised).text
