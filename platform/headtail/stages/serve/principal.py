"""Who sends a request: what an authentication check returns, and the check that lets everyone in.

In: the Authorization header of a request, the scope that the call needs, its cost. Out: a Principal, or a RequestError (401, 403, 429).
The front calls one such function before it looks at a body. Knows nothing of keys, limits or routes.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NamedTuple


class Principal(NamedTuple):
    """A caller. `name` is for logs, never the key itself."""

    name: str = ""


# (Authorization header, scope, queries); raises RequestError. Only a limit that other nodes share has to be waited for.
Admit = Callable[[bytes | None, str, int], Principal | Awaitable[Principal]]

ANYONE = Principal()


def admit_all(authorization: bytes | None, scope: str, queries: int) -> Principal:
    """Lets every request in, as one caller without a name."""
    return ANYONE
