"""A circuit breaker: whether something that failed is asked again. Pure: the caller brings the time.

In: successes and failures of calls. Out: whether the next call may be made. After some failures in a row no call is made for a
pause; then one call is a probe. Its success closes the breaker; its failure doubles the pause, up to a limit.
"""

from __future__ import annotations


class CircuitBreaker:
    """`failures` in a row open it for `pause_s` seconds at first, `longest_s` at most. Times are of one clock, in seconds.

    Used from several threads, a race may let a second probe through; nothing else can go wrong.
    """

    def __init__(self, failures: int = 3, pause_s: float = 1.0, longest_s: float = 30.0) -> None:
        self._most, self._first, self._longest = failures, pause_s, longest_s
        self._in_a_row, self._pause, self._until = 0, pause_s, 0.0

    @property
    def is_open(self) -> bool:
        """Whether calls are held back, but for probes."""
        return self._in_a_row >= self._most

    def allows(self, now: float) -> bool:
        """Whether a call may be made. A True of an open breaker is the probe: the caller must make that call."""
        if not self.is_open:
            return True
        if now < self._until:
            return False
        self._until = now + self._pause  # the next probe, should this one never come back
        return True

    def record_success(self) -> None:
        """A call came back well."""
        self._in_a_row, self._pause = 0, self._first

    def record_failure(self, now: float) -> None:
        """A call failed, or came back too late."""
        self._in_a_row += 1
        if self._in_a_row == self._most:
            self._until = now + self._pause
        elif self._in_a_row > self._most:
            self._pause = min(2 * self._pause, self._longest)
            self._until = now + self._pause
