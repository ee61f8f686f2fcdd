"""Calls of httpx to a server of this test: no proxy, and a time-out that fits a slow machine instead of httpx's own 5 s."""

from __future__ import annotations

from functools import partial

import httpx

from timescale import limit

request = partial(httpx.request, timeout=limit(30), trust_env=False)
get = partial(httpx.get, timeout=limit(30), trust_env=False)
head = partial(httpx.head, timeout=limit(30), trust_env=False)
post = partial(httpx.post, timeout=limit(30), trust_env=False)
delete = partial(httpx.delete, timeout=limit(30), trust_env=False)
