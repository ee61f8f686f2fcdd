"""How fast an endpoint may be asked: how many requests at once, how many a minute, how many tokens a minute.

In: when requests leave and come back, and whether the endpoint pushed back. Out: how long the next one has to wait. How
many at once is found by additive increase, multiplicative decrease, as TCP finds it (Chiu and Jain 1989): doubling per
round trip until the first push-back, then some more per round trip; a push-back takes three tenths, once per round trip.
The increase is small near where the last push-back came and larger far from it (as CUBIC's, Ha et al. 2008): one more per
round trip would make an endpoint that accepts two refuse every other request. The limits per minute are token buckets with
little room, so that any minute holds them. Pure: the caller brings the time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

START = 4.0  # requests at once, at first
CUT = 0.7  # of the limit that a push-back leaves: halving loses more of the capacity found, as TCP's later forms saw too
SLOWEST = 0.1  # more at once per round trip, at least
NEAR = 0.2  # of the distance to the last push-back, per round trip
SHARED_S = 2.0  # that all requests wait when one is asked to
LONGEST_PAUSE_S = 60.0
_ROUNDING = 1e-9
BURST_S = 0.1  # of a minute's limit that may be spent at once


@dataclass
class Bucket:
    """A limit per minute. `rate` 0 is none."""

    rate: float
    _held: float = field(init=False)
    _room: float = field(init=False)
    _at: float = -math.inf

    def __post_init__(self) -> None:
        self._room = max(1.0, self.rate / 60 * BURST_S)
        self._held = self._room

    def wait(self, now: float) -> float:
        """Seconds until something may be spent."""
        if not self.rate:
            return 0.0
        per_s = (self.rate - self._room + 1) / 60  # the room and a minute's refill are the limit, for any minute
        if self._at > -math.inf:
            self._held = min(self._room, self._held + (now - self._at) * per_s)
        self._at = now
        missing = 1 - self._held
        return missing / per_s if missing > _ROUNDING else 0.0

    def spend(self, amount: float) -> None:
        """Negative amounts give back. More than is held may be spent: what is owed is waited for afterwards."""
        if self.rate:
            self._held = min(self._room, self._held - amount)


class RateLimiter:
    """`most` bounds the requests at once; the limits per minute are off at 0."""

    def __init__(self, most: int, requests_per_minute: int = 0, tokens_per_minute: int = 0) -> None:
        self.most, self.limit, self.out, self.pushes, self.sent = most, min(START, float(most)), 0, 0, 0
        self.requests, self.tokens = Bucket(requests_per_minute), Bucket(tokens_per_minute)
        self._edge: float | None = None  # the limit at the last push-back
        self._cut_at = self._resume_at = -math.inf
        self._pauses = 0  # in a row, without an answer between them

    def wait(self, now: float) -> float:
        """Seconds until a request may leave: 0 for now, infinite for as long as none comes back."""
        if self.out >= int(self.limit):
            return math.inf
        return max(self._resume_at - now, self.requests.wait(now), self.tokens.wait(now), 0.0)

    def leave(self, tokens: int) -> None:
        """A request of about so many tokens leaves."""
        self.out += 1
        self.sent += 1
        self.requests.spend(1)
        self.tokens.spend(tokens)

    def back(self, now: float, left_at: float, pushed: bool, spare_tokens: int = 0) -> None:
        """It came back; `pushed`: with no answer because it was one too many. `spare_tokens` were not used after all."""
        self.out -= 1
        self.tokens.spend(-spare_tokens)
        if not pushed:
            self._pauses = 0
            more = self.limit if self._edge is None else min(self.limit, max(SLOWEST, NEAR * abs(self.limit - self._edge)))
            self.limit = min(float(self.most), self.limit + more / self.limit)  # `limit` such answers are a round trip
            return
        self.pushes += 1
        if left_at >= self._cut_at:  # those that had left before the last cut say nothing new
            self._edge, self._cut_at = self.limit, now
            self.limit = max(1.0, self.limit * CUT)

    def pause(self, now: float, seconds: float) -> None:
        """The endpoint asks one request to wait. All wait, but no longer than SHARED_S, doubled with each such reply since
        an answer came: one row's long delay does not hold the others, and an endpoint that refuses everyone is left alone."""
        if now < self._resume_at:
            return  # a request that had left before the others began to wait
        self._pauses += 1
        self._resume_at = now + min(seconds, SHARED_S * 2 ** (self._pauses - 1), LONGEST_PAUSE_S)
