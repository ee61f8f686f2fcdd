"""Loopback addresses are reached directly, whatever HTTP_PROXY, HTTPS_PROXY and ALL_PROXY say: a proxy's loopback is another machine.

In: an environment, a URL. Out: NO_PROXY with the loopback names, which every client reads (httpx, requests, botocore, gRPC, child
processes), and for our own clients whether they may read proxies at all. Knows nothing of clients.
"""

from __future__ import annotations

import ipaddress
from collections.abc import MutableMapping
from urllib.parse import urlsplit

LOOPBACK = ("localhost", "127.0.0.1", "::1")


def spare_loopback(environ: MutableMapping[str, str]) -> None:
    """Add loopback to NO_PROXY, in both spellings: clients differ in which one they read first."""
    hosts = [name.strip() for name in (environ.get("no_proxy") or environ.get("NO_PROXY") or "").split(",") if name.strip()]
    if "*" not in hosts:
        hosts += [name for name in LOOPBACK if name not in hosts]
    environ["no_proxy"] = environ["NO_PROXY"] = ",".join(hosts)


def is_loopback(host: str) -> bool:
    """Whether a host is this machine by its name alone; no name is looked up."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def may_proxy(url: str) -> bool:
    """Whether a client for `url` may look for proxies (httpx: trust_env); NO_PROXY cannot name all of 127.0.0.0/8 for it."""
    host = (urlsplit(url).hostname or "").rstrip(".")
    return not (is_loopback(host) or host.endswith(".localhost"))
