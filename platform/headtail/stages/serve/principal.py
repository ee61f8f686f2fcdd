"""Who sends a request: what an authentication check returns, and the check that lets everyone in.

In: the headers of a request, as ASGI has them. Out: a Principal, or a RequestError (401, 403, 429). The front calls one such function
per request, before it looks at anything else. Knows nothing of keys, limits or routes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple


class Principal(NamedTuple):
    """A caller. `id`: a name for logs, never the key itself; `scopes`: what it may do."""

    id: str = ""
    scopes: frozenset[str] = frozenset(("answer",))


Headers = Iterable[tuple[bytes, bytes]]  # names in lower case
Admit = Callable[[Headers], Principal]  # raises RequestError

ANYONE = Principal()


def admit_all(headers: Headers) -> Principal:
    """Lets every request in, as one caller without a name."""
    return ANYONE
