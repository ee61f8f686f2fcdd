"""Places: how many misses of one front process wait for the models of one release at once.

In: ids of releases. Out: places. Each release has its own, so a canary whose student hangs takes none of the champion's. A caller with one
query gets a place at once or not at all. Calls with many queries wait for one of half of them, and take turns. A place is given back before
a miss goes on to a tier with a limit of its own, such as escalation. Knows nothing of queries, tiers or HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Callable


class MissPlace:
    """A place that is taken. `give` may be called twice."""

    def __init__(self, give: Callable[[], None]) -> None:
        self._give: Callable[[], None] | None = give

    def give(self) -> None:
        """Give it back."""
        give, self._give = self._give, None
        if give is not None:
            give()


class MissPlaces:
    """`most` places for each release. For one event loop."""

    def __init__(self, most: int) -> None:
        self._most, self._half = most, max(1, most // 2)
        self._taken: Counter[str] = Counter()
        self._many: weakref.WeakValueDictionary[str, asyncio.Semaphore] = weakref.WeakValueDictionary()  # held by who waits or has a turn

    def take(self, release: str) -> MissPlace | None:
        """A place, or None when all are taken."""
        if self._taken[release] >= self._most:
            return None
        self._taken[release] += 1
        return MissPlace(lambda: self._give(release))

    def call(self) -> MissCall:
        """For the misses of one call with many queries."""
        return MissCall(self, self._half)

    def turns(self, release: str) -> asyncio.Semaphore:
        """What the misses of all calls with many queries share."""
        found = self._many.get(release)
        if found is None:
            found = self._many[release] = asyncio.Semaphore(self._half)
        return found

    def _give(self, release: str) -> None:
        self._taken[release] -= 1
        if not self._taken[release]:
            del self._taken[release]  # releases come and go


class MissCall:
    """One call with many queries. No more than `most` of its misses wait in the line that all calls share, so that calls take turns."""

    def __init__(self, places: MissPlaces, most: int) -> None:
        self._places, self._own = places, asyncio.Semaphore(most)

    @contextlib.asynccontextmanager
    async def turn(self, release: str, end: float) -> AsyncIterator[bool]:
        """Wait for a turn until `end`, by the loop's clock; False when there was none."""
        shared = self._places.turns(release)
        async with contextlib.AsyncExitStack() as held:
            try:
                async with asyncio.timeout_at(end):
                    await held.enter_async_context(self._own)
                    await held.enter_async_context(shared)
            except TimeoutError:
                yield False
            else:
                yield True
