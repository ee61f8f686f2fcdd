"""The check of keys on the pages' port: one Admit, and a limit on failed logins by address.

In: a request, the scope that it needs. Out: the key's name, or a RequestError (401, 403, 429). An address that failed often waits, also
with a right key: so a guess costs time, and the log stays readable. Knows nothing of what is done with the login.
"""

from __future__ import annotations

import ipaddress
import logging
import time
from collections import OrderedDict
from collections.abc import Callable

from headtail.stages.serve.errors import RequestError
from headtail.stages.serve.principal import Admit, Principal
from headtail.stages.serve.rate_limit import gcra

log = logging.getLogger("headtail.audit")
BURST, INTERVAL_S = 5, 10.0  # failed logins at once; seconds until one more
MOST_ADDRESSES = 10_000  # that are remembered: some 1 MB; the one that failed longest ago is forgotten first


class FailedLogins:
    """When each address may try again."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._arrivals: OrderedDict[str, float] = OrderedDict()

    def wait(self, address: str) -> float:
        """Seconds until this address may try again; 0: now."""
        return gcra(self._arrivals.get(address, 0.0), self._clock(), INTERVAL_S, BURST)[0]

    def add(self, address: str) -> None:
        """It failed once more."""
        self._arrivals[address] = gcra(self._arrivals.get(address, 0.0), self._clock(), INTERVAL_S, BURST)[1]
        self._arrivals.move_to_end(address)
        if len(self._arrivals) > MOST_ADDRESSES:
            self._arrivals.popitem(last=False)

    def forget(self, address: str) -> None:
        """It logged in: its failures count no more."""
        self._arrivals.pop(address, None)


class Login:
    """Checks keys of requests to the pages. `count`: of an event, by its counter's name."""

    def __init__(self, admit: Admit, failed: FailedLogins, count: Callable[[str], None]) -> None:
        self._admit, self._failed, self._count = admit, failed, count

    def check(self, authorization: str, address: str, scope: str) -> str:
        """The name of the key in an Authorization header. `address`: of `caller_network`. RequestError 401, 403, 429."""
        if wait := self._failed.wait(address):
            self._count("limited_logins")
            raise RequestError("rate_limited", "too many failed logins from this address", retry_after_s=wait)
        try:
            caller = self._admit(authorization.encode("latin-1"), scope, 1)
        except RequestError as error:
            if error.status == 401:  # a key without the scope is no guess
                self._failed.add(address)
                self._count("failed_logins")
            log.warning("a call from %s that needs the scope %s was refused: %s", address, scope, error.code)
            raise
        assert isinstance(caller, Principal)  # the pages' limits are not in Redis
        self._failed.forget(address)
        return caller.name


def caller_network(host: str) -> str:
    """The address that a request comes from; of IPv6 its network of 64 bits, which one caller may have whole."""
    try:
        found = ipaddress.ip_address(host)
    except ValueError:
        return host[:64]
    return str(ipaddress.ip_network((found, 64), strict=False)) if found.version == 6 else host
