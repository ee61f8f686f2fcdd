"""The body of a request, within bounds of size and time: at the public port, and at the pages' port, where nobody has logged in yet.

In: a request's headers and ASGI's `receive`. Out: the whole body, or a RequestError. Knows nothing of routes or of who may call.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from headtail.stages.serve.errors import RequestError

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
_DRAINED = 1 << 20  # bytes of a body that is too large that are read all the same: a caller who still sends would see a reset, not the 413
_LENGTH_DIGITS = 18  # of an announced length; more are too large for any limit


async def read_body(headers: Iterable[tuple[bytes, bytes]], receive: Receive, most_bytes: int, seconds: float) -> bytes:
    """The whole body. RequestError when it has more bytes, takes longer, or is cut off."""
    for name, value in headers:
        if name == b"content-length" and value.isdigit() and (len(value) > _LENGTH_DIGITS or int(value) > most_bytes):
            raise _too_large(most_bytes)
    data, size = bytearray(), 0
    try:
        async with asyncio.timeout(seconds):
            while True:
                event = await receive()
                part = event.get("body", b"")
                size += len(part)
                if size > most_bytes + _DRAINED:
                    raise _too_large(most_bytes)
                if size <= most_bytes:
                    data += part
                if not event.get("more_body"):
                    break
            if event["type"] == "http.disconnect" and size <= most_bytes:
                what = "the body was cut off before its end, or its chunks are malformed"
                raise RequestError("bad_request", what, field="body", fix="send the whole body")
    except TimeoutError:
        if size <= most_bytes:
            raise RequestError("request_timeout") from None
    if size > most_bytes:
        raise _too_large(most_bytes)
    return bytes(data)


def _too_large(most_bytes: int) -> RequestError:
    """Made where it is raised: a local variable that holds the error would be a cycle with its traceback, and would keep `receive`, and
    with it the connection, until the garbage collector runs."""
    return RequestError("too_large", f"the body has more than {most_bytes} bytes", field="body")
