"""Hide keys and logins in text: secrets of this process's environment are shown to nobody. Pure except for the environment.

In: text or plain values on their way to a person, a receipt, a page or a tracking server. Out: the same with `***` in place of each
secret, also where it is percent-encoded, escaped, base64 or split by white space, and of the login in any URL. A secret is the
value of a variable whose name says key, token, secret, password, credential, connection string or webhook, and the login in any variable
that holds a URL.
Knows nothing of files: a secret that is in no variable is not known here.
"""

from __future__ import annotations

import base64
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, TextIO, cast
from urllib.parse import quote, quote_plus, unquote

HIDDEN = "***"
SHORTEST = 6  # characters; a shorter value would be taken out of ordinary words
_NAME = re.compile(
    r"(?:(?:^|_)(?:KEYS?|PASS|PAT|DSN)|[A-Z0-9]_PWD|APIKEY|TOKENS?|SECRETS?|PASSWORDS?|PASSWD|PASSPHRASE|CREDENTIALS?"
    r"|CONN(?:ECTION)?_?STR(?:ING)?|WEBHOOK(?:_URL)?)(?:_ID)?$",
    re.IGNORECASE,
)
_FIELDS = re.compile(
    r"(?:^|[;\s])[\w ]*(?:key|password|pwd|secret|token|signature)\s*=\s*([^;\s]+)", re.IGNORECASE
)  # of a connection string
_URL_LOGIN = re.compile(r"(?<=://)[^\s/?#\"'<>]*@")
_LOGIN = re.compile(r"://([^\s:/@]*:\S*|[^\s/?#]*)@")  # of a variable: to the last @, since a password may hold one, or a slash
_URL_FIELD = re.compile(
    r"(?<=[?&;])((?:[\w.-]*[_.-])?(?:password|passwd|pwd|token|secret|signature|credential|api_?key)=)[^\s&;#\"'<>]+", re.IGNORECASE
)


def is_secret_name(name: str) -> bool:
    """Whether an environment variable of this name holds a secret, such as OPENAI_API_KEY; not RAY_AUTH_TOKEN_PATH."""
    return _NAME.search(name) is not None


def hide(text: str) -> str:
    """`text` without secrets."""
    return _hide(text, _pattern(tuple(os.environ.items())))


def _hide(text: str, known: re.Pattern[str] | None) -> str:
    clean = known.sub(HIDDEN, text) if known is not None else text
    if "://" in clean:
        clean = _URL_FIELD.sub(rf"\1{HIDDEN}", _URL_LOGIN.sub(f"{HIDDEN}@", clean))
    return clean


def hide_in(value: Any) -> Any:
    """Plain values (mappings, lists, text) with `hide` done to every text in them, keys too. Other values stay as they are."""
    known = _pattern(tuple(os.environ.items()))

    def inner(value: Any) -> Any:
        if isinstance(value, str):
            return _hide(value, known)
        if isinstance(value, Mapping):
            return {inner(key): inner(item) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(map(inner, value))
        return value

    return inner(value)


@lru_cache(4)
def _pattern(environment: tuple[tuple[str, str], ...]) -> re.Pattern[str] | None:
    """Every way in which a secret of `environment` may be written, the longest first."""
    ways = {way for name, value in environment for secret in _secrets(name, value) for way in _ways(secret)}
    written = sorted((way for way in ways if len(way) >= SHORTEST), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, written))) if written else None


def _secrets(name: str, value: str) -> Iterator[str]:
    if is_secret_name(name):
        yield value
        yield from _FIELDS.findall(value)
        if "://" in value:
            yield value.partition("://")[2].partition("/")[2]  # of a webhook: whoever knows the path may call it
    if "://" in value or name.upper().endswith("_PROXY"):
        for login in _LOGIN.findall(value if "://" in value else f"://{value}"):
            user, _, password = login.partition(":")
            yield from (login, password or user)


def _ways(secret: str) -> Iterator[str]:
    for plain in {secret, unquote(secret), *secret.split(), "".join(secret.split())}:
        yield from (plain, plain.strip(), quote(plain), quote(plain, safe=""), quote_plus(plain))
        yield from (quote(plain, safe="").replace("%", "%25"), repr(plain)[1:-1], json.dumps(plain)[1:-1])
        data = plain.encode("utf-8", "surrogateescape")
        yield from (repr(data)[2:-1], data.hex())
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            for ahead in range(3):  # `Basic` encodes user:password: what lies ahead shifts the text by 0, 1 or 2 bytes
                whole = encode(b"\0" * ahead + data).decode().rstrip("=")
                yield whole[-(-ahead * 8 // 6) : len(whole) - ((ahead + len(data)) % 3 > 0)]


class _HidingStream:
    """A text stream that hides secrets in all that is written to it; everything else is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(hide(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def hide_in_stream(stream: TextIO) -> TextIO:
    """`stream` with secrets hidden in what is written from now on, such as standard error."""
    return stream if isinstance(stream, _HidingStream) else cast(TextIO, _HidingStream(stream))


def hide_in_output() -> None:
    """The same for this process's standard output and error: first of all in a program, before logging takes hold of them."""
    sys.stdout, sys.stderr = hide_in_stream(sys.stdout), hide_in_stream(sys.stderr)
